"""The files of a job on their way out: one by one, as an archive, and what programs logged.

A path is taken part by part, no link is followed, and what is opened is what is sent, also when
another file takes its name meanwhile.
"""

from __future__ import annotations

import io
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import quote

from starlette.responses import Response, StreamingResponse

from studio import pictures
from studio.events import attempts_of, clean
from studio.problems import Problem, show

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import Send

    from studio.store import Job

Record = dict[str, Any]

IMAGES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
TEXTS = {
    ".json": "application/json",
    ".jsonl": "application/x-ndjson",
    ".csv": "text/csv; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".log": "text/plain; charset=utf-8",
    ".html": "text/html; charset=utf-8",
}
TYPES = IMAGES | TEXTS | {".safetensors": "application/octet-stream"}
PRIVATE = "state"  # the trainer's own, from which it goes on
UNFIT = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|\ud800-\udfff]')
MOST_FILES, CHUNK_BYTES, LOG_BYTES = 10_000, 256 * 2**10, 64 * 2**10
ZIP_BEGINS = (1980, 1, 1, 0, 0, 0)


def list_files(folder: Path) -> list[Record]:
    """List what a job has made, the newest first."""
    found = []
    for path, size, modified in walk(folder / "output"):
        name = path.relative_to(folder).as_posix()
        moment = datetime.fromtimestamp(modified, UTC).isoformat(timespec="seconds")
        found.append({"path": name, "bytes": size, "modified": moment.replace("+00:00", "Z")})
    return sorted(found, key=lambda each: each["modified"], reverse=True)


def walk(output: Path) -> Iterator[tuple[Path, int, float]]:
    """Find the files that may be seen: regular ones of known kinds, no links, nothing private."""
    count = 0
    for root, folders, names in os.walk(output):
        here = Path(root)
        folders[:] = sorted(f for f in folders if f[0] != "." and here / f != output / PRIVATE)
        for name in sorted(names):
            path = here / name
            if path.suffix.lower() not in TYPES or UNFIT.search(name) or name[0] == ".":
                continue
            with suppress(OSError):  # it went away meanwhile
                found = path.lstat()
                if stat.S_ISREG(found.st_mode):
                    yield path, found.st_size, found.st_mtime
                    count += 1
            if count >= MOST_FILES:
                return


def open_file(folder: Path, name: str) -> BinaryIO:
    """Open a file of a job by its name, which comes from outside."""
    parts = name.split("/")
    fit = all(part and part[0] != "." and not UNFIT.search(part) for part in parts)
    path = folder.joinpath(*parts) if fit else folder
    if fit and path.suffix.lower() in TYPES and parts[:2] != ["output", PRIVATE]:
        with suppress(OSError, ValueError):
            if path.resolve(strict=True) == folder.resolve() / name:  # no link on the way
                return open_regular(path)
    raise Problem(404, "file_unknown", f"This job has no file {show(name)}.")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file; a pipe that has its name is neither waited for nor read."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file")
    return os.fdopen(descriptor, "rb")


# --- One file ---


def send_file(job: Job, folder: Path, name: str, headers: Mapping[str, str]) -> Response:
    """Answer with a file, or the part of it that is asked for."""
    file = open_file(folder, name)
    try:
        state = os.fstat(file.fileno())
        etag = etag_of(state)
        kind = Path(name).suffix.lower()
        said = {"etag": etag, "cache-control": "private, no-cache", "accept-ranges": "bytes"}
        if knows(headers, etag):
            file.close()
            return Response(status_code=304, headers=said)
        if kind not in IMAGES:
            said["content-disposition"] = attachment(download_name(job, name))
        part = range_of(headers, etag, state.st_size)
        return Download(file, part, state.st_size, said, TYPES[kind])
    except BaseException:
        file.close()
        raise


def etag_of(state: os.stat_result) -> str:
    """Tell a file's content by what changes with it."""
    return f'"{state.st_ino:x}-{state.st_size:x}-{state.st_mtime_ns:x}"'


def knows(headers: Mapping[str, str], etag: str) -> bool:
    """Tell whether the client has this very content."""
    known = headers.get("if-none-match", "")
    return known == "*" or etag in [each.strip().removeprefix("W/") for each in known.split(",")]


def attachment(name: str) -> str:
    """Say under which name a file is to be saved."""
    plain = re.sub(r'[^ -~]|["%\\]', "_", name)  # for curl -OJ, which knows no other
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"


def download_name(job: Job, name: str) -> str:
    """Name a LoRA as its job: in a folder of downloads, lora_final says nothing.

    A learned word keeps its name, by which programs call it.
    """
    stem, ending = Path(name).stem, Path(name).suffix
    words = UNFIT.sub("_", job.name).replace("/", "_").strip(". ")
    if ending != ".safetensors" or not stem.startswith("lora_") or not words:
        return Path(name).name
    kept = stem.removeprefix("lora_").removeprefix("final")
    return f"{words}_{kept}{ending}" if kept else f"{words}{ending}"


def range_of(headers: Mapping[str, str], etag: str, size: int) -> tuple[int, int] | None:
    """Read which bytes are asked for; None means all. Several parts at once are not served."""
    asked = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", headers.get("range", ""), re.ASCII)
    if not asked or not any(asked.groups()) or headers.get("if-range", etag) != etag:
        return None
    first, last = asked.groups()
    begin = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if begin >= end:
        detail = f"The file has {size:,} bytes."
        unsatisfied = {"content-range": f"bytes */{size}"}
        raise Problem(416, "range_not_satisfiable", detail, headers=unsatisfied)
    return begin, end


class Download(StreamingResponse):
    """Bytes of one open file."""

    def __init__(
        self,
        file: BinaryIO,
        part: tuple[int, int] | None,
        size: int,
        headers: Mapping[str, str],
        kind: str,
    ) -> None:
        """Take the file, which is closed in the end."""
        begin, end = part or (0, size)
        said = {**headers, "content-length": str(end - begin)}
        if part:
            said["content-range"] = f"bytes {begin}-{end - 1}/{size}"
        self.file = file
        super().__init__(pieces(file, begin, end), 206 if part else 200, said, kind)

    async def stream_response(self, send: Send) -> None:
        """Send it."""
        with self.file:
            await super().stream_response(send)


def pieces(file: BinaryIO, begin: int, end: int) -> Iterator[bytes]:
    """Read some bytes of a file, piece by piece."""
    file.seek(begin)
    while begin < end and (piece := file.read(min(CHUNK_BYTES, end - begin))):
        begin += len(piece)
        yield piece


def send_thumbnail(folder: Path, name: str, side: int, headers: Mapping[str, str]) -> Response:
    """Answer with a picture, drawn small."""
    with open_file(folder, name) as file:
        etag = f'{etag_of(os.fstat(file.fileno()))[:-1]}-{side}"'
    said = {"etag": etag, "cache-control": "private, no-cache"}
    if knows(headers, etag):
        return Response(status_code=304, headers=said)
    if Path(name).suffix.lower() not in IMAGES:
        raise Problem(404, "file_unknown", f"{show(name)} is no picture.")
    return Response(pictures.thumbnail(folder / name, etag, side), 200, said, "image/webp")


# --- All of them ---


def archive(job: Job, folder: Path) -> Iterator[bytes]:
    """Pack all files of a job, as they are read; images and tensors do not get smaller."""
    top = UNFIT.sub("_", job.name).replace("/", "_").strip(". ") or job.id
    sink = Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as packed:
        for path, _, modified in walk(folder / "output"):
            name = path.relative_to(folder / "output").as_posix()
            moment = max(ZIP_BEGINS, datetime.fromtimestamp(modified, UTC).timetuple()[:6])
            member = zipfile.ZipInfo(f"{top}/{name}", moment)
            with (
                suppress(FileNotFoundError),
                open_regular(path) as file,
                packed.open(member, "w", force_zip64=True) as target,
            ):
                while piece := file.read(CHUNK_BYTES):
                    target.write(piece)
                    yield sink.take()
    yield sink.take()


class Sink(io.RawIOBase):
    """What a zip file is written to: its bytes go on at once."""

    def __init__(self) -> None:
        """Begin empty."""
        self.held = bytearray()

    def writable(self) -> bool:
        """Say that it can be written to, and, by not saying more, that there is no going back."""
        return True

    def write(self, content: Any) -> int:
        """Hold some bytes."""
        self.held += content
        return len(content)

    def take(self) -> bytes:
        """Return what is held."""
        taken, self.held = bytes(self.held), bytearray()
        return taken


# --- The log ---


def read_log(folder: Path, attempt: int | None, after: int | None) -> Record:
    """Read what a program wrote to stderr: its end, or what follows a place, as plain text."""
    attempts = attempts_of(folder)
    number = attempt or (attempts[-1] if attempts else 0)
    told: Record = {"attempt": number, "text": "", "next": after or 0}
    with suppress(FileNotFoundError), (folder / f"attempts/{number}/stderr.log").open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        begin = max(0, size - LOG_BYTES) if after is None or after > size else after
        file.seek(begin)
        content = file.read(LOG_BYTES)
        cut = content.rfind(b"\n") + 1 or len(content)  # no half of a line, nor of a character
        text = content[:cut].decode("utf-8", "replace")
        told |= {"text": clean(text), "next": begin + cut}
    return told
