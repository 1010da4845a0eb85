"""Faults: a shim before the system's calls, and children that die without mourning."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import os
import pathlib
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Record

CHANGES = ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir")


def run_out_of_space() -> None:
    """Fail as a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def become_read_only() -> None:
    """Fail as a disk does that the system has mounted read-only after an error."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def die() -> None:
    """End as if killed, with nothing flushed and nothing cleaned up."""
    os._exit(137)


@dataclass
class Faults:
    """Count all calls that change the disk, and let one of them, or all from there on, fail."""

    number: int
    strike: Callable[[], None]
    lasting: bool = False
    calls: list[tuple[str, str]] = field(default_factory=list)

    def note(self, name: str, place: object) -> None:
        """Write one call down before it is made, and strike if its turn has come."""
        if isinstance(place, int):
            place = Path(f"/proc/self/fd/{place}").readlink()
        self.calls.append((name, str(place)))
        count = len(self.calls)
        if count == self.number or (self.lasting and count > self.number):
            self.strike()

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Note a call of one of the system's functions."""

        def call(place: Any, *others: Any, **named: Any) -> Any:
            self.note(name, place)
            return function(place, *others, **named)

        return call

    def wrap_open(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Note the writes to a file, in their middle."""

        def call(place: Any, mode: str = "r", *others: Any, **named: Any) -> Any:
            file = function(place, mode, *others, **named)
            if "w" in mode:
                vars(file)["write"] = functools.partial(self.tear, file, file.write)
            return file

        return call

    def tear(self, file: Any, write: Callable[[bytes], int], content: bytes) -> int:
        """Write one half, then perhaps the other; of many pieces look at ever fewer."""
        vars(file)["pieces"] = pieces = vars(file).get("pieces", 0) + 1
        if pieces & (pieces - 1):
            return write(content)
        write(content[: len(content) // 2])
        file.flush()
        self.note("write", file.name)
        write(content[len(content) // 2 :])
        return len(content)

    @contextlib.contextmanager
    def injected(self) -> Iterator[Faults]:
        """Stand between the program and the system."""
        former = getattr(pathlib, "_NormalAccessor", None)  # how Python 3.10 calls the system
        with pytest.MonkeyPatch.context() as patch:
            wrapped = {name: self.wrap(name, vars(os)[name]) for name in CHANGES}
            opener = self.wrap_open(io.open)
            for name, function in wrapped.items():
                patch.setattr(os, name, function)
            patch.setattr(io, "open", opener)
            for name, function in {**wrapped, "open": opener}.items() if former else ():
                patch.setattr(former, name, staticmethod(function), raising=False)
            yield self


@dataclass
class Forked:
    """A child that shares what this process has loaded, which saves seconds."""

    pid: int
    reader: io.BufferedReader

    def line(self) -> Record:
        """Wait for the next line."""
        record: Record = json.loads(self.reader.peek() and self.reader.readline())
        return record

    def end(self) -> tuple[int, bytes]:
        """Read until it ends; return its exit code and what it printed last."""
        rest = self.reader.read()
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status), rest


@contextlib.contextmanager
def forked(work: Callable[[], int]) -> Iterator[Forked]:
    """Work in a child whose standard output is ours to read; leave nothing of it behind."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.close(ours)
            os.dup2(theirs, 1)
            os.close(theirs)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            warnings.simplefilter("ignore")
            code = work()
        finally:
            os._exit(code)
    os.close(theirs)
    with os.fdopen(ours, "rb") as reader:
        child = Forked(pid, reader)
        try:
            yield child
        finally:
            if child.pid:
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)
