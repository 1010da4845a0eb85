"""The engine of this machine: a shim per attempt, watched through the files it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from studio import shim
from studio.engine import TERMINAL, Seen, parse

if TYPE_CHECKING:
    from studio.engine import Attempt, Record
    from studio.settings import Settings

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

SHIM_SECONDS = 30  # a shim answers in a tenth of one
TAIL_BYTES = 4096
LONGEST_LINE = 1 << 20  # events are shorter than 64 KiB; what is longer is none
LOG_BYTES = 64 << 20  # of stderr.log; then its beginning goes
LOG_KEPT_BYTES = 1 << 20

# What a program may know of its surroundings. HF_TOKEN is the user's word to the hub.
PASSED_ON = (
    *("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "XDG_CACHE_HOME"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_HOME", "LD_LIBRARY_PATH"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
    *("SYSTEMROOT", "USERPROFILE", "APPDATA", "LOCALAPPDATA", "TEMP", "TMP", "PATHEXT"),
)


def environment() -> dict[str, str]:
    """Choose what of the service's environment its children get."""
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ}


class Local:
    """Runs attempts on this machine. A handle is `JOB/N`, which names the attempt's folder."""

    def __init__(self, settings: Settings) -> None:
        """Keep in mind where jobs have their folders, and in which life of the machine we are."""
        self._jobs = settings.jobs
        self._boot_id = shim.boot_id()

    def submit(self, attempt: Attempt) -> str:
        """Start a shim, which sees to it that it is the only one."""
        attempt.folder.mkdir(parents=True, exist_ok=True)
        if not (attempt.folder / "stdout.jsonl").exists():
            (attempt.output / "stop").unlink(missing_ok=True)  # from an earlier attempt
        command = [sys.executable, "-I", "-S", shim.__file__, str(attempt.folder), *attempt.command]
        quiet: Any = dict.fromkeys(("stdin", "stdout"), subprocess.DEVNULL)
        if sys.platform == "win32":
            flags = subprocess.DETACHED_PROCESS | subprocess.CREATE_BREAKAWAY_FROM_JOB
            subprocess.Popen(command, creationflags=flags, **quiet)
            return self._handle(attempt)
        quiet |= {"env": dict(attempt.environment), "cwd": self._jobs / attempt.job}
        with (attempt.folder / "stderr.log").open("ab") as stderr:
            done = run_shim(command, stderr=stderr, start_new_session=True, **quiet)
        if done.returncode:
            raise ChildProcessError(tail_of(attempt.folder / "stderr.log") or "no shim")
        return self._handle(attempt)

    def _handle(self, attempt: Attempt) -> str:
        """Name an attempt."""
        return f"{attempt.job}/{attempt.n}"

    def _folder(self, handle: str) -> Path:
        """Find the folder of an attempt."""
        job, _, n = handle.partition("/")
        return self._jobs / job / "attempts" / n

    def observe(self, handle: str) -> Seen:
        """Look at the lock, then at what is written: the last line comes before the lock goes."""
        folder = self._folder(handle)
        alive = is_locked(folder / "alive")
        process, end = read_json(folder / "process.json"), read_json(folder / "exit.json")
        said = folder / "stdout.jsonl"
        terminal = last_line(said)
        shorten(folder / "stderr.log")
        return Seen(
            alive=alive,
            terminal=terminal,
            exit_code=end.get("code"),
            signal=end.get("signal"),
            same_boot=process.get("boot_id", self._boot_id) == self._boot_id,
            silent_for=time.time() - changed_at(said),
            ended_at=None if alive else end.get("ended_at", changed_at(said)),
            failure=end.get("failure", ""),
            tail="" if alive or terminal else tail_of(folder / "stderr.log"),
        )

    def stop(self, handle: str, *, force: bool = False) -> None:
        """Ask by a file, which works whatever the pid, and by a signal, which is quicker: once."""
        folder = self._folder(handle)
        process, asked = read_json(folder / "process.json"), folder / "asked"
        if force:
            self._kill(process)
        elif not asked.exists():
            output = folder.parent.parent / "output"
            if obeys := (output / ".lock").exists():  # the trainer's, who looks for the file
                (output / "stop").touch()
            if obeys if sys.platform == "win32" else process:
                asked.touch()  # first, as a second signal would end it at once
                self._ask(process)

    def _ask(self, process: Record) -> None:
        """Send the signal that asks for an end, where there is one that is no order."""
        if sys.platform != "win32" and self._knows(process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process["pid"], signal.SIGTERM)

    def _kill(self, process: Record) -> None:
        """End the program with all that it has started, if it is the one we mean."""
        if not self._knows(process):
            return
        with contextlib.suppress(ProcessLookupError):
            if sys.platform == "win32":
                os.kill(process["pid"], signal.SIGTERM)  # which there ends it at once
            else:
                os.killpg(process["pid"], signal.SIGKILL)

    def _knows(self, process: Record) -> bool:
        """Tell whether a pid still belongs to the program that was started.

        It may have ended while what it started lives on in its group, which keeps the pid from
        being given away.
        """
        if process.get("boot_id") != self._boot_id:
            return False
        return shim.started_of(process["pid"]) in (process["started"], None)

    def events(self, handle: str, after: int = 0) -> Iterator[tuple[int, bytes]]:
        """Read the lines behind a position; one that has no end yet waits for it."""
        path = self._folder(handle) / "stdout.jsonl"
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(after)
            whole = True  # what is read next begins a line
            while piece := file.readline(LONGEST_LINE):
                ends = piece.endswith(b"\n")
                if ends and whole:
                    yield file.tell(), piece
                whole = ends


def run_shim(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run a shim until it has gone into the background."""
    try:
        return subprocess.run(command, timeout=SHIM_SECONDS, check=False, **options)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"no answer in {SHIM_SECONDS} seconds") from error


def is_locked(path: Path) -> bool:
    """Tell whether somebody holds a lock; two who only look do not disturb each other."""
    try:
        with path.open("rb") as lock:
            return not take_lock(lock, shared=True)
    except FileNotFoundError:
        return False


def take_lock(lock: IO[Any], *, shared: bool = False) -> bool:
    """Lock an open file, until it is closed, unless somebody else does."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def read_json(path: Path) -> Record:
    """Read a small file of the shim; empty while it is not there, or where it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def changed_at(path: Path) -> float:
    """Tell when a file was last written to."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def last_line(path: Path) -> Record | None:
    """Return what a program said last, if that was its last word."""
    *lines, _ = read_end(path, 1 << 17).split(b"\n")  # behind the last break is a torn line
    record = parse(lines[-1]) if lines else None
    return record if record and record.get("type") in TERMINAL else None


def read_end(path: Path, size: int) -> bytes:
    """Read the last bytes of a file that may still grow."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - size))
        return file.read(size)
    return b""


def tail_of(path: Path) -> str:
    """Return the last lines of a log."""
    text = read_end(path, TAIL_BYTES).decode("utf-8", "replace")
    return "\n".join(text.splitlines()[-20:])


def shorten(path: Path) -> None:
    """Keep a log from filling the disk: of one that has grown too long, only the end stays.

    It is open for appending, so what comes next follows the new end.
    """
    with contextlib.suppress(OSError):
        if path.stat().st_size > LOG_BYTES:
            kept = read_end(path, LOG_KEPT_BYTES)
            with path.open("ab") as file:
                file.truncate(0)
                file.write(b"[the beginning was too long to be kept]\n" + kept)
