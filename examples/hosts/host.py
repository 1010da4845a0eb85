"""A host in Python: starts train_lora.py, shows what it says, stops it gently, catches up.

    python host.py CONFIG [further arguments of train_lora.py]
    python host.py --attach OUTPUT_PATH      # follow a run that another process started

The duties of a host that it shows: read stdout as JSON lines, and let no unknown line, type or
field do harm; never let stderr fill a pipe, as that would block the trainer; stop by one SIGTERM
and wait for the last line; take a stream without one for a run that was killed; catch up from
events.jsonl, where a `start` takes back what was said of steps after its `resumed_step`, as those
are made again (a chart has to forget them). A host that dies closes the pipe, and the trainer saves
and ends. To outlive its host, a run needs a stdout that stays, such as a file or a container's log;
--attach follows it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if sys.platform == "win32":
    import msvcrt

    STOP = signal.CTRL_BREAK_EVENT
    OWN_GROUP: dict[str, Any] = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
else:
    import fcntl

    STOP = signal.SIGTERM
    OWN_GROUP: dict[str, Any] = {"start_new_session": True}

TRAINER = os.environ.get("TRAIN_LORA", str(Path(__file__).resolve().parents[2] / "train_lora.py"))
PYTHON = os.environ.get("TRAIN_LORA_PYTHON", sys.executable)
PATIENCE_SECONDS = 30  # the trainer promises to end within 8
STOPPING = "Stopping: the trainer saves and ends within 8 seconds."
TEMPLATES = {
    "start": "Start: {message}, process {pid}",
    "progress": "{percent} %  step {step}/{total_steps}  loss {loss}  {eta_seconds} s left",
    "warning": "Warning {code}: {message}",
    "sample": "Sample: {image_path}",
    "checkpoint": "Checkpoint: {path}",
    "complete": "Complete: {final_path}",
    "interrupted": "Interrupted by {reason} at step {step}, saved: {path}",
}
PROBLEM = "{path}: expected {expected}, got {found}. {hint}"
stop_wanted = threading.Event()


class View:
    """What a person sees of a run, and how its latest start ended."""

    last: dict[str, Any] | None = None
    refused = False

    def see(self, line: bytes) -> None:
        """Show one line; what is no event does no harm."""
        try:
            event = json.loads(line)
            kind, valid = event.get("type"), event.get("topic") == "valid"
        except (ValueError, AttributeError, RecursionError):
            return
        if kind == "start":  # after an earlier last line: then that was not the end
            self.last = None
            self.refused = not str(event.get("protocol")).startswith("1.")
            if self.refused:
                show(f"Protocol {event.get('protocol')} is unknown; this host speaks 1.x")
        if kind in ("complete", "interrupted", "error") or (kind == "info" and valid):
            self.last = event
        if kind == "error":
            show(describe_error(event))
        else:
            show(fill(TEMPLATES.get(str(kind), "{message}"), event), passing=kind == "progress")


def describe_error(event: dict[str, Any]) -> str:
    """List what is wrong. Of a wrong config, the message repeats the first problem."""
    problems = [fill(PROBLEM, problem) for problem in event.get("problems") or ()]
    repeated = problems and str(event.get("message")).endswith(problems[0])
    head = fill("Error {code}" if repeated else "Error {code}: {message}", event)
    return "\n  ".join([head, *(problems or [str(event.get("hint"))])])


def fill(template: str, event: dict[str, Any]) -> str:
    """Put fields into words; null means that a value is not known."""
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in event.items()}
    known = {key: value for key, value in rounded.items() if value is not None}
    return template.format_map(defaultdict(lambda: "?", known))


def show(text: str, *, passing: bool = False) -> None:
    """Print a line; on a terminal the next one takes the place of a passing one."""
    # A file name may hold what moves the cursor.
    text = re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", "?", text)
    if sys.stdout.isatty():
        text = f"\r\x1b[K{text}"
    line = text if passing and sys.stdout.isatty() else f"{text}\n"
    # Nor need it be valid Unicode.
    sys.stdout.buffer.write(line.encode(sys.stdout.encoding, "replace"))
    sys.stdout.flush()


def run(config: str, arguments: list[str]) -> int:
    """Start the trainer, follow it to its end and return its exit code."""
    view, command = View(), [PYTHON, TRAINER, "--config", config, *arguments]
    with tempfile.TemporaryFile() as stderr:  # a file takes all; a pipe would fill up
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
        # Ctrl-C reaches the whole group of a terminal. In a group of its own the trainer hears of
        # it from us alone, and once: a second signal, a second later, would end it at once.
        child = subprocess.Popen(command, **pipes, stderr=stderr, **OWN_GROUP)
        # In a thread, as on Windows no signal gets through to a thread that waits for a pipe.
        reader = threading.Thread(target=lambda: [*map(view.see, child.stdout or ())], daemon=True)
        reader.start()
        give_up_at = float("inf")
        while child.poll() is None:
            time.sleep(0.1)
            if (stop_wanted.is_set() or view.refused) and give_up_at == float("inf"):
                show(STOPPING)
                child.send_signal(STOP)
                give_up_at = time.monotonic() + PATIENCE_SECONDS
            if time.monotonic() > give_up_at:
                child.kill()  # the last resort: costs all updates since the last checkpoint
        reader.join(5)  # not for ever: a helper of the trainer may still hold the pipe
        code = child.returncode if child.returncode >= 0 else 128 - child.returncode
        if view.last is None:
            show(f"Killed by signal {code - 128}" if code > 128 else f"No last line, code {code}")
            stderr.seek(0)
            sys.stderr.write(stderr.read().decode(errors="replace")[-4000:])
    return code


def attach(output: Path) -> int:
    """Replay what a run has said, follow it to its end, and return the code it ended with."""
    view, asked, batches = View(), False, read_batches(output / "events.jsonl")
    while True:
        alive = is_alive(output)  # before reading, as the last line comes before the lock goes
        for line in next(batches):
            view.see(line)
        if view.refused or not alive:
            return 1 if view.refused else end_of(view)
        if stop_wanted.is_set() and not asked:
            show(STOPPING)
            (output / "stop").touch()  # works where the pid means nothing, as for a container
            asked = True
        time.sleep(0.3)


def read_batches(path: Path) -> Iterator[list[bytes]]:
    """Yield again and again the lines that are new.

    A torn one has to wait for its end, and is read from its beginning then: if it never gets one, a
    restart puts another line in its place. --fresh moves the file away, which Windows could not do
    if it were kept open: begin anew.
    """
    inode, position = 0, 0
    while True:
        lines: list[bytes] = []
        # For a moment there is none.
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            found = os.fstat(file.fileno())
            if found.st_ino != inode or found.st_size < position:
                inode, position = found.st_ino, 0
            file.seek(position)
            *lines, torn = file.read().split(b"\n")
            position = file.tell() - len(torn)
        yield lines


def is_alive(output: Path) -> bool:
    """Tell whether a run holds its lock, which the system takes back however the run ends.

    The pid in `start` says less: by now it may belong to another process.
    """
    try:
        with (output / ".lock").open("rb") as lock:
            if sys.platform == "win32":
                msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
            else:  # shared, so that two hosts do not take each other for a run
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except (BlockingIOError, PermissionError):
        return True
    return False


def end_of(view: View) -> int:
    """Derive the exit code from the last line; without one, the run was killed."""
    if view.last is None:
        show("Killed: no last line, and nobody holds the lock")
        return 128 + 9
    if view.last["type"] == "interrupted":
        return {"SIGINT": 130, "SIGHUP": 129}.get(str(view.last.get("reason")), 143)
    return 1 if view.last["type"] == "error" else 0


def main(arguments: list[str]) -> int:
    """Start a run or follow one; the handlers only note that a stop is wanted."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop_wanted.set())
    match arguments:
        case ["--attach", output] if (Path(output) / "events.jsonl").is_file():
            return attach(Path(output))
        case [config, *further] if config != "--attach":
            return run(config, further)
    sys.stderr.write("Usage: host.py CONFIG [ARGUMENT ...] | --attach OUTPUT_PATH (of a run)\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
