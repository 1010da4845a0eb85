"""What all programs in this folder do alike: speak, stop, and end."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, cast

from train_lora import (
    Code,
    Emitter,
    ErrorCode,
    Event,
    LineWriter,
    Record,
    StopRequest,
    TrainError,
    TrainingInterrupted,
    WarningCode,
    claim_stdout,
    deadline_in,
    draw,
    exit_code,
    fill_closed_streams,
    plain,
    reason_of,
    reporting,
    stop_for,
)

PATIENCE_SECONDS = 5.0  # for a reader of the last line


class ToolCode(Code):
    """Why a program failed."""

    INPUT_UNUSABLE = "What was given cannot be used.", "Mend it, or give another."


class ToolWarning(Code):
    """What is worth knowing although the program goes on."""

    WORTH_A_LOOK = "Something about the input is doubtful.", "See the message."


class Done(Event, type="complete", ends_run=True):
    """Last line of a program that did what was asked."""

    says = "{summary}"
    summary: Annotated[str, "what was done, in one sentence"]
    files: Annotated[list[str], "what was written"]
    total_time: Annotated[float, "seconds since the program started"]


Work = Callable[[argparse.Namespace, Emitter, StopRequest], tuple[str, list[str]]]


def refuse(path: object, expected: str, found: str, hint: str = "") -> TrainError:
    """Say what is wrong with an input."""
    code = cast("ErrorCode", ToolCode.INPUT_UNUSABLE)  # an event takes any word
    return TrainError.at(code, path, expected, found, hint)


def remark(events: Emitter, message: str, **data: Any) -> None:
    """Tell of something doubtful."""
    code = cast("WarningCode", ToolWarning.WORTH_A_LOOK)  # an event takes any word
    events.warn(code, message, **data)


def table(rows: Iterable[Sequence[object]]) -> None:
    """Print columns for a person. Where events go to stdout, this reaches stderr."""
    texts = [[shown(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def shown(value: object) -> str:
    """Write a value for a person; a file's name may hold what moves the cursor, or is no text."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "?", str(value))


def tell(record: Record) -> None:
    """Tell a person what an event says; a table says more than the last line of a success."""
    if record["type"] == "progress":
        if sys.stderr.isatty():  # a log is better off without
            sys.stderr.write(draw(record).decode())
        return
    if record["type"] == "interrupted":
        record = {**record, "message": f"Stopped by {record['reason']}; started again, it goes on"}
    problems = record.get("problems") or []
    lines = [record["message"]] if len(problems) < 2 else [f"{len(problems)} problems:"]
    lines += [
        f"  {p['path']}: expected {p['expected']}, got {p['found']}. {p['hint']}"
        for p in problems[len(problems) == 1 :]
    ]
    stream = sys.stdout if record["type"] == "complete" else sys.stderr
    clear = "\r\x1b[K" if stream.isatty() else ""  # of a bar
    stream.write(clear + "\n".join(map(shown, lines)) + "\n")


@contextlib.contextmanager
def naming_the_disk() -> Iterator[None]:
    """Tell a disk that fails from a program that does."""
    try:
        yield
    except OSError as error:
        path, reason = error.filename or "the result", reason_of(error)
        raise TrainError.at(
            ErrorCode.SAVE_FAILED, path, "a file that can be used", reason
        ) from error


def command_line(about: str | None) -> argparse.ArgumentParser:
    """Begin a command line with what a program says of itself, laid out as it stands there."""
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=about, formatter_class=layout)


def as_json(document: Record) -> bytes:
    """Write JSON for people and for comparing: the same content gives the same bytes."""
    return (json.dumps(plain(document), indent=1, ensure_ascii=False) + "\n").encode()


def take_events(parser: argparse.ArgumentParser) -> None:
    """Add the option that every command has."""
    parser.add_argument(
        "--events", action="store_true", help="JSON lines on stdout, as the trainer"
    )


def run(parser: argparse.ArgumentParser, work: Work, argv: Sequence[str] | None = None) -> int:
    """Do the work and tell how it ended; return the exit code."""
    closed, stop = fill_closed_streams(), StopRequest()
    with stop.on_signals(), contextlib.ExitStack() as audience:
        arguments = parser.parse_args(argv)
        events = Emitter()
        if arguments.events:
            stdout = 2 if 1 in closed else claim_stdout()
            writer = LineWriter(stdout, functools.partial(stop_for, stop))
            events.listeners.append(writer)
            audience.callback(lambda: writer.close(deadline_in(PATIENCE_SECONDS)))
        else:
            events.listeners.append(tell)
        with contextlib.suppress(TrainError, TrainingInterrupted), reporting(events):
            with naming_the_disk():
                summary, files = work(arguments, events, stop)
            events.emit(Done(summary=summary, files=files, total_time=events.elapsed_seconds()))
        return exit_code(events)
