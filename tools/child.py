"""A program of this folder, or the trainer, run as a process of its own.

What it says goes into one stream with what else there is to say; a stop is passed on to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any

import train_lora
from tools.program import ToolCode, ToolWarning, refuse
from train_lora import (
    Code,
    Emitter,
    ErrorCode,
    Event,
    Facts,
    Problem,
    Record,
    StopRequest,
    TrainError,
    TrainingInterrupted,
    WarningCode,
)

STOPS = {"SIGINT": signal.SIGINT}  # all other reasons are passed on as SIGTERM
STOP = signal.SIGTERM
# In a group of its own it hears of Ctrl-C from here alone, and once.
OWN_GROUP: dict[str, Any] = {"process_group": 0}
if sys.platform == "win32":
    STOPS, STOP = {}, signal.CTRL_BREAK_EVENT
    OWN_GROUP = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}


def follow(name: str, command: Sequence[str], events: Emitter, stop: StopRequest) -> str:
    """Run a program to its end, pass its events on, and a stop to it; return its last words."""
    last: Record = {}
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, *command], **pipes, **OWN_GROUP) as child:
        try:
            for record in records_of(child, stop):
                last = record
                if event := as_event(record):
                    events.emit(event)
            child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
    if last.get("type") == "complete":
        return str(last["message"])
    if last.get("type") == "interrupted":
        raise TrainingInterrupted(stop.reason or last["reason"], last["step"], last["path"])
    raise failure(name, last, child.returncode)


def records_of(child: subprocess.Popen[bytes], stop: StopRequest) -> Iterator[Record]:
    """Read what a program says until it says no more; a stop is passed on to it, once."""
    lines: SimpleQueue[bytes] = SimpleQueue()

    def read() -> None:
        for line in child.stdout or ():
            lines.put(line)
        lines.put(b"")

    train_lora.beside(read)
    told = False
    while True:
        if stop.reason and not told:
            told = True
            with contextlib.suppress(OSError):
                child.send_signal(STOPS.get(stop.reason, STOP))
        with contextlib.suppress(Empty, ValueError):
            line = lines.get(timeout=0.1)
            if not line:
                return
            yield json.loads(line)


def as_event(record: Record) -> Event | None:
    """Make an event of what a program said, for a stream that numbers its own lines."""
    kinds = {cls.wire["type"]: cls for cls in train_lora.EVENTS if cls is not Facts}
    topics = {cls.wire["topic"]: cls for cls in train_lora.FACTS if "topic" in cls.wire}
    cls = topics.get(record.get("topic", "")) or kinds.get(record["type"])
    if cls is None or cls.ends_run:
        return None
    said = record["data"] if issubclass(cls, Facts) else record
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # each kind of event is made one
    values = {each.name: said[each.name] for each in fields if each.name in said}
    if "code" in values:
        values["code"] = code_called(str(record["code"]), (WarningCode, ToolWarning))
    return cls(**values)


def code_called(word: str, tables: Iterable[type[Code]]) -> Any:
    """Find a code by its word."""
    found = (code for each in tables for code in each if code.word == word)
    return next(found, ToolCode.INPUT_UNUSABLE)


def failure(name: str, last: Record, code: int) -> TrainError:
    """Say how a program failed: in its own words, if it had any."""
    if last.get("type") != "error":
        found = f"an end without a last line (exit code {code})"
        return refuse(name, "a program that ends as it should", found, "Look at stderr.")
    known = code_called(last["code"], (ErrorCode, ToolCode))
    problems = [Problem(**problem) for problem in last["problems"]]
    error = TrainError(known, f"{name}: {last['message']}", problems)
    error.hint, error.path, error.step = last["hint"], last["path"], last["step"]
    return error
