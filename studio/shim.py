"""Run the program of one attempt, and outlive the service that started it.

    python shim.py FOLDER COMMAND ...

The lock on FOLDER/alive tells life from death, without pids, across restarts of the service and of
the machine. It belongs to the open file, which the program inherits: if this process is killed, the
program still holds it, and only when both are gone it is free. The service never waits for an
attempt; it looks at the lock and at these files:

    stdout.jsonl   what the program says; who makes this file runs the attempt, and nobody else
    stderr.log     what else there is to say
    process.json   pid, started, boot_id: enough to recognise the program before it is killed
    exit.json      code, signal, ended_at, failure: written when the program is over

Imports nothing of ours, as an update of the service must not reach into what runs.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

NOT_STARTED = 127  # what a shell says of a command that cannot be run

OWN_SESSION: dict[str, Any] = {"start_new_session": True}
if sys.platform == "win32":
    import msvcrt

    OWN_SESSION = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
else:
    import fcntl


def main(folder: Path, command: list[str]) -> int:
    """Start the command, once for a folder; the first process returns as soon as that is sure."""
    said = folder / "stdout.jsonl"
    if said.exists():  # it runs, and may hold the lock for days, or has run
        return 0
    with (folder / "alive").open("wb") as lock:
        wait_for(lock)  # before the file is made, as one whose lock is free has run
        try:
            stdout = said.open("xb")
        except FileExistsError:  # another was quicker, and is over
            return 0
        if detach():
            run(folder, command, stdout, lock)
    return 0


def wait_for(lock: IO[bytes]) -> None:
    """Take the lock. Who only looks at it lets go at once."""
    if sys.platform == "win32":
        msvcrt.locking(lock.fileno(), msvcrt.LK_LOCK, 1)
    else:
        fcntl.flock(lock, fcntl.LOCK_EX)


def detach() -> bool:
    """Go on in a process that nobody waits for, and of which no terminal knows."""
    if sys.platform == "win32":  # started detached, as there is no fork
        return True
    if os.fork():
        return False
    os.setsid()
    return True


def run(folder: Path, command: list[str], stdout: IO[bytes], lock: IO[bytes]) -> None:
    """Run the command to its end, and write down what became of it."""
    # A stop is meant for the program. A handler, as an ignored signal would be inherited.
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: None)
    options = (
        OWN_SESSION if sys.platform == "win32" else OWN_SESSION | {"pass_fds": [lock.fileno()]}
    )
    failure, code = "", NOT_STARTED
    try:
        with stdout, (folder / "stderr.log").open("ab") as stderr:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, **options
            )
    except OSError as error:
        failure = f"{command[0]}: {error.strerror}"
    else:
        identity = {"pid": child.pid, "started": started_of(child.pid), "boot_id": boot_id()}
        write(folder / "process.json", identity)
        code = child.wait()
    number = -code if code < 0 else None
    end = {"code": 128 - code if code < 0 else code, "signal": number}
    write(folder / "exit.json", {**end, "ended_at": time.time(), "failure": failure})


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a small file whole or not at all; a full disk does not end what runs."""
    part = path.with_suffix(".part")
    with contextlib.suppress(OSError):
        part.write_text(json.dumps(content), encoding="ascii")
        part.replace(path)


def started_of(pid: int) -> str | None:
    """Tell when a process was started, in the words of the system; None if there is none."""
    if sys.platform == "linux":
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return None
        # The second field is the name, in brackets, and may hold anything.
        return stat.rpartition(b")")[2].split()[19].decode()
    return answer_of("ps", "-o", "lstart=", "-p", str(pid)) or None


def boot_id() -> str:
    """Name the present life of the machine, or of the container; empty where that is unknown."""
    if sys.platform == "linux":
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{kernel}.{started_of(1)}"
    return answer_of("sysctl", "-n", "kern.boottime")


def answer_of(*command: str) -> str:
    """Ask a program of the system."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
