"""Another studio as an engine: a training is sent there, and what comes of it is brought here.

A thread per attempt follows the other studio's stream. Lines are kept as a program of this machine
would have written them, and a file is here before the line that tells of it; so nobody else needs
to know where a training runs. How far it came is written down at each step, and the thread goes on
from there after a crash of either side.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import quote

from studio import captions, datasets, local
from studio.engine import EngineError, Record, Seen, Unreachable
from studio.jobs import write_json
from studio.remote import Refused, Remote
from studio.store import FINAL

if TYPE_CHECKING:
    from studio.engine import Attempt
    from studio.remote import Said
    from studio.settings import Settings

AGAIN_SECONDS = 3.0  # after a connection was lost
QUICK_SECONDS = 3.0  # for an answer that others wait for
STREAM, NEWS, END, ASKED = "stdout.jsonl", "peer.json", "exit.json", "asked"
# Of events, what names files.
PLACES = ("image_path", "path", "embedding_path", "final_path", "best_path", "strip_path")
OURS = ("output_path", "dataset_path")  # knobs that each studio sets itself

log = logging.getLogger("studio")


class Peer:
    """Runs trainings in another studio. A handle is `JOB/N`, which names the attempt's folder."""

    def __init__(self, settings: Settings, url: str, token: str) -> None:
        """Keep in mind where it is."""
        self._jobs, self._files = settings.jobs, local.Local(settings)
        self._remote, self._quick = Remote(url, token), Remote(url, token, QUICK_SECONDS)
        self._mirrors: dict[str, Mirror] = {}

    def submit(self, attempt: Attempt) -> str:
        """Begin to send a training, if the other studio answers."""
        if not any(word.endswith("train_lora.py") for word in attempt.command[:2]):
            raise ValueError("Another studio takes trainings alone.")
        self._check_health()
        attempt.folder.mkdir(parents=True, exist_ok=True)
        handle = f"{attempt.job}/{attempt.n}"
        self._mirror(handle).begin()
        return handle

    def observe(self, handle: str) -> Seen:
        """Look at what was brought here; see to it that somebody brings it."""
        folder = self._folder(handle)
        end, said = local.read_json(folder / END), folder / STREAM
        if not end:
            self._mirror(handle).begin()
        return Seen(
            alive=not end,
            terminal=last_word(said, end) if end else None,
            silent_for=time.time() - local.changed_at(said),
            ended_at=end.get("ended_at"),
            failure=end.get("failure", ""),
        )

    def stop(self, handle: str, *, force: bool = False) -> None:
        """Ask the other studio to stop; it uses force by itself, unless it is gone."""
        (self._folder(handle) / ASKED).touch()
        if force:
            self._check_health()
        threading.Thread(target=self._mirror(handle).ask_to_stop, daemon=True).start()

    def events(self, handle: str, after: int = 0) -> Iterator[tuple[int, bytes]]:
        """Read what was brought here."""
        return self._files.events(handle, after)

    def _check_health(self) -> None:
        """Fail unless the other studio answers, and is well."""
        try:
            self._quick.ask("GET", "/healthz")
        except Refused as error:
            raise EngineError(f"The studio at {self._quick.url} is not well: {error}") from error

    def _folder(self, handle: str) -> Path:
        """Find the folder of an attempt."""
        job, _, n = handle.partition("/")
        return self._jobs / job / "attempts" / n

    def _mirror(self, handle: str) -> Mirror:
        """Return who follows an attempt."""
        return self._mirrors.setdefault(handle, Mirror(self._remote, self._folder(handle)))


def last_word(said: Path, end: Record) -> Record | None:
    """Return how an attempt ended: as its program says, or the other studio where that is mute."""
    match local.last_line(said), end.get("state"):
        case (dict() as line, _):
            return line
        case (_, "failed"):
            return {"type": "error", **(end.get("error") or {})}
        case (_, "stopped" | "cancelled"):
            return {"type": "interrupted"}
        case (_, "completed"):
            return {"type": "complete"}
    return None


class Mirror:
    """Follows one attempt in another studio."""

    def __init__(self, remote: Remote, folder: Path) -> None:
        """Take whom to follow; nothing is asked before begin()."""
        self._remote, self._folder, self._job = remote, folder, folder.parent.parent
        self._thread: threading.Thread | None = None
        self._starting, self._asking = threading.Lock(), threading.Lock()

    def begin(self) -> None:
        """See to it that a thread is at work."""
        with self._starting:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._go, name="peer", daemon=True)
                self._thread.start()

    def _go(self) -> None:
        """Bring everything here, however often the connection is lost."""
        while not (self._folder / END).exists():
            try:
                end = self._bring()
            except (Refused, ValueError) as error:
                end = {"failure": f"The studio at {self._remote.url} refuses: {error}"}
            except Unreachable:
                time.sleep(AGAIN_SECONDS)
                continue
            except OSError:  # such as a full disk here
                log.exception("Job %s cannot be followed", self._job.name)
                time.sleep(AGAIN_SECONDS)
                continue
            write_json(self._folder / END, {**end, "ended_at": time.time()})

    def _bring(self) -> Record:
        """Send the training, bring its lines and files, and return how it ended."""
        news = self._news()
        if "job_id" not in news:
            if self._is_asked():
                return {"state": "stopped"}
            news = self._note(**self._submit())
        if self._is_asked():
            self.ask_to_stop()
        address = f"/status/{news['job_id']}"
        while not self._listen() or self._remote.ask("GET", address)["state"] not in FINAL:
            pass
        self._fetch_rest()
        status = self._remote.ask("GET", address)
        return {"state": status["state"], "error": status["error"]}

    def _is_asked(self) -> bool:
        """Tell whether the training is to stop."""
        return (self._folder / ASKED).exists()

    def ask_to_stop(self) -> None:
        """Ask the other studio to stop the training; one request at a time."""
        news = self._news()
        if "job_id" in news and self._asking.acquire(blocking=False):
            try:
                with contextlib.suppress(Refused, Unreachable):  # it has ended; it is asked again
                    self._remote.ask("POST", f"/jobs/{news['job_id']}/stop")
            finally:
                self._asking.release()

    # --- What is known ---

    def _news(self) -> Record:
        """Return how far this attempt has come; of an earlier one, nothing."""
        news = local.read_json(self._job / NEWS)
        return news if news.get("attempt") == int(self._folder.name) else {}

    def _note(self, **news: object) -> Record:
        """Write down how far this attempt has come.

        Nothing is flushed: should a power cut take it, the same training is found by its key.
        """
        whole = {"attempt": int(self._folder.name), **news}
        part = self._job / f".{NEWS}.part"
        part.write_text(json.dumps(whole), encoding="utf-8")
        part.replace(self._job / NEWS)
        return whole

    # --- Sending ---

    def _submit(self) -> Record:
        """Let the training go on there, or send it; return what is known of it then."""
        earlier = local.read_json(self._job / NEWS)
        if "job_id" in earlier:
            try:
                self._resume(earlier["job_id"])
                return {"job_id": earlier["job_id"], "after": earlier["after"], "size": 0}
            except Refused as error:
                if error.status != 404:  # it was deleted there
                    raise
        return {"job_id": self._train(), "after": "", "size": 0}

    def _resume(self, job_id: str) -> None:
        """Let a training go on, with what has changed here since."""
        if self._remote.ask("GET", f"/status/{job_id}")["state"] not in FINAL:
            return
        theirs = self._remote.ask("GET", f"/jobs/{job_id}/config")
        ours = local.read_json(self._job / "config.json")
        changed = {k: v for k, v in ours.items() if k not in OURS and theirs.get(k) != v}
        try:
            self._remote.ask("POST", f"/jobs/{job_id}/resume", {"set": changed})
        except Refused as error:
            if error.code != "not_resumable":  # it is complete, and nothing has changed
                raise

    def _train(self) -> str:
        """Send a training with its pictures; the same job is the same training there."""
        config, name = local.read_json(self._job / "config.json"), f"sent {self._job.name}"
        self._send_pictures(Path(config["dataset_path"]), name)
        wanted = {key: value for key, value in config.items() if key not in OURS}
        body = {"config": wanted, "dataset": name, "name": config.get("lora_name") or name}
        key = {"Idempotency-Key": self._job.name}
        job_id = str(self._remote.ask("POST", "/train", body, key)["job_id"])
        with contextlib.suppress(Refused):  # the training has a copy of its own
            self._remote.ask("DELETE", f"/datasets/{quote(name)}")
        return job_id

    def _send_pictures(self, folder: Path, name: str) -> None:
        """Send pictures with their captions."""
        pictures = datasets.scan(folder)
        if len(list(datasets.files_below(folder))) > sum(1 + each.captioned for each in pictures):
            raise ValueError("pictures in one folder, with captions beside them, are taken alone")
        with contextlib.suppress(Refused):  # it is there, from an earlier try
            self._remote.ask("POST", "/datasets", {"name": name})
        for each in pictures:
            place = f"/datasets/{quote(name)}"
            file = quote(each.name, safe="")
            self._remote.send(f"{place}/images/{file}", folder / each.name)
            text = captions.read(folder, each).text
            if text:
                words, any_text = {"text": text}, {"If-Match": "*"}
                self._remote.ask("PUT", f"{place}/captions/{file}", words, any_text)

    # --- Bringing ---

    def _listen(self) -> bool:
        """Bring lines until the stream ends; tell whether all is said."""
        news, ended = self._news(), True  # an empty answer means that all was said before
        with (self._folder / STREAM).open("ab") as file:
            file.truncate(news["size"])  # what came later was not written down, and comes again
        address = f"/events?job={news['job_id']}&after={quote(news['after'])}"
        for said in self._remote.listen(address):
            ended = said.event == "end"
            if said.event == "trainer":
                self._take(said)
        return ended

    def _take(self, said: Said) -> None:
        """Keep one line, after the files that it tells of."""
        news, record = self._news(), json.loads(said.data)
        if record.get("type") == "start":
            output = (record.get("config") or {}).get("output_path", "")
            news["there"] = str(PurePosixPath(output).parent)
        line = moved(said.data, news.get("there"), str(self._job))
        for path in (value for key, value in json.loads(line).items() if key in PLACES):
            self._fetch(news["job_id"], self._inside(path))
        with (self._folder / STREAM).open("ab") as file:
            file.write(line + b"\n")
            size = file.tell()
        self._note(**{**news, "after": said.position, "size": size})

    def _inside(self, path: object) -> str | None:
        """Return a path inside the job's folder, if it leads to what a program has written."""
        with contextlib.suppress(ValueError, TypeError):
            inner = PurePosixPath(str(path)).relative_to(self._job.as_posix())
            return inner.as_posix() if is_output(inner.as_posix()) else None
        return None

    def _fetch(self, job_id: str, name: str | None) -> None:
        """Bring a file; one that may not leave the other studio stays there."""
        if name:
            with contextlib.suppress(Refused):
                self._remote.fetch(f"/jobs/{job_id}/files/{quote(name)}", self._job / name)

    def _fetch_rest(self) -> None:
        """Bring the files that no line tells of."""
        job_id = self._news()["job_id"]
        for file in self._remote.ask("GET", f"/jobs/{job_id}/files")["files"]:
            name = str(file["path"])
            if is_output(name) and size_of(self._job / name) != file["bytes"]:
                self._fetch(job_id, name)


def moved(line: bytes, there: str | None, here: str) -> bytes:
    """Let a line speak of the job's folder here instead of the one there."""
    if not there:
        return line
    return line.replace(json.dumps(there)[1:-1].encode(), json.dumps(here)[1:-1].encode())


def is_output(name: str) -> bool:
    """Tell whether a name, which comes from outside, means a file below `output`."""
    parts = name.split("/")
    fit = all(part not in ("", ".", "..") and "\\" not in part for part in parts)
    return fit and parts[0] == "output" and len(parts) > 1 and "\0" not in name


def size_of(path: Path) -> int | None:
    """Return the size of a file that is there."""
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return None
