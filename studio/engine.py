"""What runs attempts: four verbs, and what goes through them.

An attempt is one start of a program for a job. A handle is the engine's own word for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Record = dict[str, Any]

# The last line of a program: after it nothing more is said.
TERMINAL = frozenset({"complete", "interrupted", "error"})


@dataclass(frozen=True)
class Attempt:
    """What is to be run."""

    job: str
    n: int  # 1, 2, … for a job; with it the same attempt is known again
    command: tuple[str, ...]
    environment: Mapping[str, str]  # all of it; nothing is inherited
    folder: Path  # of this attempt
    output: Path  # where its program writes


@dataclass(frozen=True)
class Seen:
    """What an engine sees of an attempt."""

    alive: bool  # something of it still runs
    terminal: Record | None = None  # its last line, once that was said
    exit_code: int | None = None  # 128 + signal where a signal ended it; None is not known
    signal: int | None = None
    same_boot: bool = True  # the machine has not been started anew since
    silent_for: float = 0.0  # seconds since it last said something
    ended_at: float | None = None  # seconds since 1970
    failure: str = ""  # why its program could not be started
    tail: str = ""  # the end of stderr, of an attempt that is over without a last line


def parse(line: bytes) -> Record | None:
    """Read an event; a program may also say what is none, or what is no strict JSON."""
    try:
        record = json.loads(line)
        json.dumps(record, allow_nan=False)  # NaN, and numbers too large to be finite
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


class Engine(Protocol):
    """What the reconciler needs of whatever runs attempts. Each verb may be repeated."""

    def submit(self, attempt: Attempt) -> str:
        """Start an attempt, once however often it is asked for, and return its handle."""

    def observe(self, handle: str) -> Seen:
        """Look how an attempt is."""

    def stop(self, handle: str, *, force: bool = False) -> None:
        """Ask an attempt to save and end, or end it by force."""

    def events(self, handle: str, after: int = 0, /) -> Iterator[tuple[int, bytes]]:
        """Yield each whole line that an attempt has said, with the position behind it."""


class EngineError(Exception):
    """An engine cannot do what it was asked to; the message says why."""


class Unreachable(EngineError):
    """Nobody answers; it may be different later."""
