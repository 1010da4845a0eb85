"""Starts of the program as a process of its own, as hosts make them."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import os
import subprocess
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from conftest import PROGRAM, ROOT, Record, check_stream, refuse

CONTRACT_SECONDS = 8  # from the request for a stop to the end; `docker stop` gives 10

# --- Cold and forked starts ---


def starting(command: tuple[object, ...], environment: Mapping[str, str], cold: bool) -> Record:
    """Give the options that start a command.

    A cold start of this Python imports everything anew, torch alone for seconds. Any other is a
    fork of this process that goes on as Python does: the same file or text, with arguments,
    streams, folder and environment of its own, but for what is read while modules are imported.
    """
    words = [str(word) for word in command]
    if cold or words[0] != sys.executable or sys.platform == "win32":
        return {"args": words, "env": environment}
    go_on = functools.partial(be_python, words[1:], environment)
    return {"args": words, "preexec_fn": go_on, "restore_signals": False}  # Python ignores SIGPIPE


def be_python(words: list[str], environment: Mapping[str, str]) -> NoReturn:
    """Go on as a Python that was started with these words; Popen has seen to the streams."""
    code = 1
    try:
        gc.freeze()  # looking through what is shared would copy it
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # Popen waits for the last one
        forget_the_tests()
        os.environ.clear()
        os.environ.update(environment)
        text, sys.argv = (words[1], ["-c", *words[2:]]) if words[0] == "-c" else ("", words)
        main = types.ModuleType("__main__")
        main.__file__ = words[0]
        sys.modules["__main__"] = main
        exec(compile(text, "-c", "exec") if text else compiled(words[0]), vars(main))
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001, the end of the process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def forget_the_tests() -> None:
    """Give streams, warnings and logs back, which tests look into."""
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, buffering, closefd=False)
        for number, mode, buffering in ((0, "r", -1), (1, "w", -1), (2, "w", 1))
    )
    warnings.resetwarnings()
    warnings.simplefilter("ignore", DeprecationWarning)
    logging.root.handlers.clear()


@functools.cache
def compiled(path: str) -> types.CodeType:
    """Compile a file once."""
    code: types.CodeType = compile(Path(path).read_bytes(), path, "exec")
    return code


compiled(str(PROGRAM))  # here, for all forks

# --- From the start to the end ---


@dataclass(frozen=True)
class Ended:
    """A finished run of the program."""

    code: int
    lines: list[Record]
    stdout: bytes
    stderr: str

    @property
    def last(self) -> Record:
        """The terminal line."""
        return self.lines[-1]


def run_program(
    *arguments: object, cwd: Path, stdin: bytes = b"", cold: bool = False, **environment: str
) -> Ended:
    """Run train_lora.py as a host does, hold its lines against the contract, and return them."""
    command = (sys.executable, PROGRAM, *arguments)
    done = subprocess.run(
        **starting(command, {**os.environ, **environment}, cold),
        cwd=cwd,
        input=stdin,
        capture_output=True,
        timeout=120,
        check=False,
    )
    check_stream(done.stdout)
    lines = [json.loads(line, parse_constant=refuse) for line in done.stdout.splitlines()]
    return Ended(done.returncode, lines, done.stdout, done.stderr.decode())


# --- A process under way ---


class Child:
    """A process whose lines are read as they come."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        """Take the process and note what it prints."""
        self.process = process
        self.received = b""

    @property
    def stdout(self) -> IO[bytes]:
        """Our end of its standard output."""
        assert self.process.stdout
        return self.process.stdout

    def line(self) -> Record:
        """Wait for the next line."""
        text = self.stdout.readline()
        self.received += text
        record: Record = json.loads(text)
        return record

    def end(self, seconds: float = CONTRACT_SECONDS) -> int:
        """Read until it ends, which has to come in time, and return its exit code."""
        rest, _ = self.process.communicate(timeout=seconds)
        self.received += rest or b""
        return self.process.returncode

    @property
    def last(self) -> Record:
        """The last line, once the whole stream keeps its promises."""
        check_stream(self.received)
        record: Record = json.loads(self.received.splitlines()[-1])
        return record


@contextlib.contextmanager
def started(
    *command: object,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    cold: bool = False,
    **pipes: Any,
) -> Iterator[Child]:
    """Start a process, and leave nothing of it behind."""
    whole = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    process: subprocess.Popen[bytes] = subprocess.Popen(
        **starting(command, whole, cold),
        cwd=cwd,
        bufsize=0,  # what is not read stays in the pipe
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **pipes},
    )
    with process:
        try:
            yield Child(process)
        finally:
            process.kill()


def script(text: str, *arguments: object) -> tuple[object, ...]:
    """Give the command that runs a script."""
    return (sys.executable, "-c", text, *arguments)


def program(*arguments: object) -> tuple[object, ...]:
    """Give the command that runs the program on the workspace's config."""
    return (sys.executable, PROGRAM, "--config", "config.json", *arguments)


def wait_until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something to come true, and fail when it does not."""
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert true()
