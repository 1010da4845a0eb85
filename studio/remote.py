"""Another studio, as a program speaks to it: its REST API, and nothing that is not in there."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, NamedTuple

from studio.engine import Record, Unreachable

PATIENCE_SECONDS = 30.0  # without a byte; an open stream says something every 10 s
MOST_ANSWER_BYTES = 64 * 2**20


class Refused(Exception):
    """The other studio says no, and why."""

    def __init__(self, status: int, document: Record) -> None:
        """Take what its answer says."""
        self.status, self.code = status, str(document.get("code", "unknown"))
        self.problems: list[Record] = document.get("problems") or []
        super().__init__(str(document.get("detail") or f"it answers {status}"))


class Said(NamedTuple):
    """One event of a stream."""

    event: str
    position: str
    data: bytes


class StayHere(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: the token would go along to wherever it leads."""

    def redirect_request(self, *_: Any) -> None:
        """Let it be an error."""


class Remote:
    """A studio at an address."""

    def __init__(self, url: str, token: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Keep in mind where it is, what lets us in, and how long an answer may take."""
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url: expected http:// or https://, got {url}")
        self.url, self._token, self._seconds = url.rstrip("/"), token, seconds
        self._opener = urllib.request.build_opener(StayHere)

    def ask(
        self,
        method: str,
        path: str,
        body: Record | None = None,
        headers: dict[str, str] | None = None,
    ) -> Any:
        """Send a request with JSON, and return what the answer says."""
        content = None if body is None else json.dumps(body).encode()
        if method in ("POST", "PUT", "PATCH") and content is None:
            content = b""
        kind = {} if body is None else {"Content-Type": "application/json"}
        with self.open(method, path, content, {**kind, **(headers or {})}) as answer:
            text = answer.read(MOST_ANSWER_BYTES)
        return json.loads(text) if text else {}

    @contextlib.contextmanager
    def open(
        self,
        method: str,
        path: str,
        content: bytes | IO[bytes] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Iterator[Any]:
        """Send a request; the answer may be read as it comes."""
        said = {"Authorization": f"Bearer {self._token}", "Accept": "application/json"}
        request = urllib.request.Request(
            self.url + path, data=content, headers={**said, **(headers or {})}, method=method
        )
        try:
            with self._opener.open(request, timeout=self._seconds) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            with error:
                raise Refused(error.code, document_of(error)) from error
        except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
            reason = getattr(error, "reason", None) or error
            raise Unreachable(f"The studio at {self.url} cannot be reached: {reason}") from error

    def send(self, path: str, file: Path) -> None:
        """Upload a file."""
        length = {"Content-Length": str(file.stat().st_size)}
        with file.open("rb") as content, self.open("PUT", path, content, length) as answer:
            answer.read(MOST_ANSWER_BYTES)

    def fetch(self, path: str, target: Path) -> None:
        """Download a file; it appears whole or not at all."""
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{secrets.token_hex(8)}.part")
        try:
            with self.open("GET", path) as answer, part.open("wb") as file:
                shutil.copyfileobj(answer, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def listen(self, path: str) -> Iterator[Said]:
        """Yield the events of a stream until it ends."""
        with self.open("GET", path, headers={"Accept": "text/event-stream"}) as answer:
            found: dict[str, bytes] = {}
            for line in answer:
                name, _, value = line.rstrip(b"\r\n").partition(b": ")
                if name:
                    found[name.decode("ascii", "replace")] = value
                elif found:
                    event, position = found.get("event", b""), found.get("id", b"")
                    yield Said(event.decode(), position.decode(), found.get("data", b""))
                    found = {}


def document_of(error: urllib.error.HTTPError) -> Record:
    """Read why a request was refused; a proxy in between may answer anything."""
    try:
        document = json.loads(error.read(MOST_ANSWER_BYTES))
    except (OSError, ValueError, HTTPException):
        return {}
    return document if isinstance(document, dict) else {}
