#!/usr/bin/env python3
"""Train a LoRA for Stable Diffusion from a JSON config and report in JSON lines.

    python train_lora.py --config config.json                    train, or continue
    python train_lora.py --config config.json --validate-only    check everything, train nothing
    python train_lora.py --event-schema                          what a line may hold

Data flow:

    config.json ─── TrainingConfig.from_json ──┐
    images, captions ─── scan_dataset ─────────┤
    base model headers ─── inspect_model ──────┼── LoRATrainer ─── files in output_path
    disk, lock, device ─── Preflight ──────────┘      │   ▲
    stdout, events.jsonl ◄── LineWriter ◄── Emitter ◄─┘   └── StopRequest ◄── signals, host

Two contracts frame the program. What comes in is owned by config_schema.json: names, ranges,
defaults and prose. What goes out is owned by the event classes below, from which --event-schema,
event_schema.json and the README's tables are made. Standard output carries events alone.

Exit codes: 0 complete or valid, 1 error, 2 wrong command line, 128 + signal when interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import itertools
import json
import math
import os
import platform
import re
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import traceback
import types
import typing
import uuid
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

if TYPE_CHECKING:
    from jsonschema import ValidationError

__version__ = "0.1.0"

# The number hosts look at. The minor part grows with added types, fields and values;
# the major part would say that something they rely on has changed.
PROTOCOL = "1.0"

SCHEMA_PATH = Path(__file__).resolve().parent / "config_schema.json"

Record = dict[str, Any]  # one JSON object, coming in or going out


# === Errors ==================================================================


class Code(Enum):
    """A stable word for hosts, with its meaning and, for people, what to do."""

    def __init__(self, meaning: str, hint: str) -> None:
        """Keep the two sentences of the README's table."""
        self.meaning, self.hint = meaning, hint

    @property
    def word(self) -> str:
        """Spell the code as hosts see it."""
        return self.name.lower()


class ErrorCode(Code):
    """Why a run failed."""

    CONFIG_NOT_FOUND = "The config cannot be read.", "Check the path given to --config."
    CONFIG_NOT_JSON = "The config is not strict JSON.", "Mend the place named under problems."
    CONFIG_INVALID = "The config breaks config_schema.json.", "Mend the values under problems."
    CONFIG_CONFLICT = "Values do not go together.", "Change one of those under problems."
    DATASET_NOT_FOUND = "dataset_path is no readable folder.", "In a container: the path inside it."
    DATASET_EMPTY = "No usable image was found.", "Add png, jpg, webp or bmp images."
    CAPTIONS_MISSING = "Images have neither caption nor trigger word.", "Give trigger_words."
    MODEL_NOT_FOUND = "base_model leads nowhere.", "Give a folder, a file or a Hugging Face id."
    MODEL_UNSUPPORTED = "The base model is of another kind.", "Use SD 1.x, 2.x or SDXL safetensors."
    MODEL_DAMAGED = "The base model is incomplete or broken.", "Download it again."
    OUTPUT_UNUSABLE = "output_path cannot be written.", "Choose a folder this user may write."
    OUTPUT_BUSY = "Another run uses output_path.", "Wait for it, stop it, or choose another folder."
    DISK_FULL = (
        "The run needs more space than is free.",
        "Free some, or save and sample less often.",
    )
    PACKAGE_MISSING = "A Python package is missing.", "Run: pip install -r requirements.txt"
    NOT_IMPLEMENTED = "This version checks but does not train.", "Use --validate-only."
    INTERNAL_ERROR = "The program met what it does not expect.", "Run with --debug and report it."


class WarningCode(Code):
    """What is worth knowing although the run goes on."""

    CONFIG_VALUE_TWICE = (
        "A knob stands twice, with two values.",
        "training_params wins; remove one.",
    )
    LEARNING_RATE_LOW = "Little will be learned at this rate.", "1e-4 suits most runs."
    RESOLUTION_UNUSUAL = "The base was made for another size.", "Use the model's own size."
    TRIGGER_WORDS_EMPTY = "Only captions call the concept.", "Give a word unless this is a style."
    IMAGE_SKIPPED = "An image is not used.", "Convert or remove it."
    FOLDER_SKIPPED = "A folder in the dataset is not read.", "Copy its images into the dataset."
    IMAGES_SMALL = "Images will be enlarged.", "Use larger images or a lower resolution."
    CAPTION_UNUSABLE = "A caption file is empty or unreadable.", "Save it as UTF-8 text."
    METADATA_LINE_REFUSED = "A line of metadata.jsonl is not used.", "Give file_name and text."
    MODEL_NOT_CACHED = "The base model is not on this machine yet.", "None when online."
    MIRROR_FAILED = "events.jsonl cannot be written.", "Look at the disk behind output_path."


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with the input, in the four parts a person needs to mend it."""

    path: Annotated[str, "where: a JSON path in the config, or a file"]
    expected: Annotated[str, "what should stand there"]
    found: Annotated[str, "what stands there"]
    hint: Annotated[str, "what to do"]

    def __str__(self) -> str:
        """Say it in one or two sentences."""
        return f"{self.path}: expected {self.expected}, got {self.found}. {self.hint}".rstrip()


class TrainError(Exception):
    """A run cannot go on, for a reason that has a code."""

    def __init__(self, code: ErrorCode, message: str, problems: Sequence[Problem] = ()) -> None:
        """Take the hint from the first problem, or else from the code."""
        super().__init__(message)
        self.code = code
        self.problems = tuple(problems)
        self.hint = (problems[0].hint if problems else "") or code.hint

    @classmethod
    def listing(cls, code: ErrorCode, problems: Sequence[Problem]) -> TrainError:
        """Sum up several problems in one error that lists them all."""
        head = f"{len(problems)} problems, the first: " if len(problems) > 1 else ""
        return cls(code, head + str(problems[0]), problems)

    @classmethod
    def at(
        cls, code: ErrorCode, path: object, expected: str, found: str, hint: str = ""
    ) -> TrainError:
        """Report a single problem."""
        hint = hint or code.hint
        problem = Problem(path=str(path), expected=expected, found=found, hint=hint)
        return cls.listing(code, [problem])


StopReason = Literal["SIGINT", "SIGTERM", "SIGHUP", "stop_file", "host_gone"]


class TrainingInterrupted(BaseException):
    """A stop request on its way out of the depths.

    Like KeyboardInterrupt it is no Exception, so that no library swallows it by accident.
    """

    def __init__(self, reason: StopReason, step: int = 0, path: str | None = None) -> None:
        """Remember why, after which update, and what a restart continues from."""
        super().__init__(reason)
        self.reason, self.step, self.path = reason, step, path


# === Events ==================================================================


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What an info line holds in `data`. The class name gives its topic."""

    says: ClassVar[str]

    @classmethod
    def topic(cls) -> str:
        """Name the topic as hosts see it."""
        return cls.__name__.removesuffix("Facts").lower()


@dataclass(frozen=True, kw_only=True)
class DeviceFacts(Facts):
    """The processor that will train, as far as it is known without loading torch."""

    says: ClassVar[str] = "Device: {name} ({kind})"
    kind: Annotated[str, "`cuda`, `mps` or `cpu`"]
    name: Annotated[str, "as its maker calls it"]
    memory_total_bytes: Annotated[int | None, "memory of the device"]
    memory_free_bytes: Annotated[int | None, "memory free at the moment"]
    driver: Annotated[str | None, "driver version"]


@dataclass(frozen=True, kw_only=True)
class ModelFacts(Facts):
    """The base model, as far as its headers tell; null while it is not downloaded."""

    says: ClassVar[str] = "Base model: {source}, family {family}, {parameters} parameters"
    source: Annotated[str, "`folder`, `file` or `hub`"]
    cached: Annotated[bool, "whether the weights are on this machine"]
    family: Annotated[str | None, "`sd1`, `sd2` or `sdxl`"] = None
    prediction_type: Annotated[str | None, "`epsilon` or `v_prediction`, when stated"] = None
    native_resolution: Annotated[int | None, "size the base was made for, pixels"] = None
    parameters: Annotated[int | None, "numbers in all weights"] = None
    weights_bytes: Annotated[int | None, "size of the weights on disk"] = None


@dataclass(frozen=True, kw_only=True)
class DatasetFacts(Facts):
    """The training images and their captions."""

    says: ClassVar[str] = "Dataset: {images} images, {captions_found} captions, {skipped} skipped"
    images: Annotated[int, "usable images"]
    skipped: Annotated[int, "images left out, each named in a warning"]
    captions_found: Annotated[int, "images with a caption of their own"]
    captions_missing: Annotated[int, "images described by the trigger words alone"]
    resolutions: Annotated[dict[str, int], "images per size, the ten most frequent"]


@dataclass(frozen=True, kw_only=True)
class PhaseFacts(Facts):
    """How far a longer preparation has come."""

    says: ClassVar[str] = "{name}: {done} of {total}"
    name: Annotated[str, "what is done: `checking images`, …"]
    done: Annotated[int, "items done"]
    total: Annotated[int | None, "items in all"]


@dataclass(frozen=True, kw_only=True)
class ResumeFacts(Facts):
    """Where the run begins."""

    says: ClassVar[str] = "Beginning at step {step}"
    step: Annotated[int, "updates done by earlier starts"]
    set_aside: Annotated[str | None, "where `--fresh` moved the earlier run"]


@dataclass(frozen=True, kw_only=True)
class ValidFacts(DatasetFacts):
    """The whole report of a preflight that found nothing wrong. Always the last line."""

    says: ClassVar[str] = "Valid: {images} images, {total_steps} steps on {device}"
    effective_batch: Annotated[int, "images per update"]
    steps_per_epoch: Annotated[int, "updates in which every image is seen once"]
    total_steps: Annotated[int, "updates in all"]
    family: Annotated[str | None, "family of the base model; null while not downloaded"]
    device: Annotated[str, "`cuda`, `mps` or `cpu`"]
    disk_needed_bytes: Annotated[int | None, "what the run will write, at most"]
    disk_free_bytes: Annotated[int, "free space behind output_path"]
    warnings: Annotated[dict[str, int], "how many warnings of each code were given"]


FACTS: tuple[type[Facts], ...] = (
    *(DeviceFacts, ModelFacts, DatasetFacts, PhaseFacts, ResumeFacts, ValidFacts),
)


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line on stdout. The class name gives its type, the docstring tells when it is sent."""

    says: ClassVar[str] = "{message}"
    ends_run: ClassVar[bool] = False

    @classmethod
    def type(cls) -> str:
        """Name the type as hosts see it."""
        return cls.__name__.removesuffix("Event").lower()


@dataclass(frozen=True, kw_only=True)
class StartEvent(Event):
    """First line once the config is valid."""

    says: ClassVar[str] = "train_lora {version}, protocol {protocol}"
    protocol: Annotated[str, "version of this event protocol"]
    version: Annotated[str, "version of the program"]
    run_id: Annotated[str, "names this start of the program"]
    pid: Annotated[int, "process to send a stop signal to"]
    resumed_step: Annotated[int, "updates done by earlier starts"]
    total_steps: Annotated[int | None, "updates in all; null until the images are counted"]
    config: Annotated[dict[str, Any], "resolved config, defaults filled in; never a secret"]


@dataclass(frozen=True, kw_only=True)
class InfoEvent(Event):
    """A fact worth showing."""

    topic: Annotated[str, "what it is about; fixes the fields of `data`"]
    data: Annotated[Facts, "the fact; see the topics"]
    message: str


@dataclass(frozen=True, kw_only=True)
class WarningEvent(Event):
    """Something to know; the run goes on."""

    code: Annotated[WarningCode, "which warning"]
    data: Annotated[dict[str, Any], "particulars, such as the file"]
    message: str


@dataclass(frozen=True, kw_only=True)
class ProgressEvent(Event):
    """At most 2 per second and about 1,000 per run; always the first and the last step."""

    says: ClassVar[str] = "Step {step} of {total_steps}, loss {loss}"
    step: Annotated[int, "updates done"]
    total_steps: Annotated[int, "updates in all"]
    percent: Annotated[int, "0 … 99; 100 stands in `complete` alone"]
    epoch: Annotated[int, "times every image was seen"]
    loss: Annotated[float | None, "mean since the last progress line"]
    learning_rate: Annotated[float | None, "of the update just made"]
    grad_norm: Annotated[float | None, "before clipping"]
    images_per_second: Annotated[float | None, "speed of late"]
    seconds_per_step: Annotated[float | None, "speed of late"]
    elapsed_seconds: Annotated[float, "since the program started"]
    eta_seconds: Annotated[float | None, "until the last step"]
    memory_bytes: Annotated[int | None, "device memory in use"]


@dataclass(frozen=True, kw_only=True)
class SampleEvent(Event):
    """A preview image is complete on disk."""

    says: ClassVar[str] = "Sample at step {step}: {prompt}"
    step: Annotated[int, "updates done"]
    image_path: Annotated[str, "the picture"]
    prompt: Annotated[str, "what it was asked to show"]
    seed: Annotated[int, "of its noise"]


@dataclass(frozen=True, kw_only=True)
class CheckpointEvent(Event):
    """A checkpoint is complete on disk."""

    says: ClassVar[str] = "Checkpoint at step {step}"
    step: Annotated[int, "updates done"]
    path: Annotated[str, "the usable LoRA file"]
    bytes: Annotated[int, "its size"]
    reason: Annotated[Literal["periodic", "interrupted"], "why it was written"]


@dataclass(frozen=True, kw_only=True)
class CompleteEvent(Event):
    """Last line of a finished run."""

    says: ClassVar[str] = "Complete: {step} steps in {total_time:.0f} s"
    ends_run: ClassVar[bool] = True
    step: Annotated[int, "updates done"]
    percent: Annotated[int, "100"]
    final_path: Annotated[str, "lora_final.safetensors"]
    bytes: Annotated[int, "its size"]
    sha256: Annotated[str, "its checksum"]
    total_time: Annotated[float, "seconds since the program started"]
    final_loss: Annotated[float | None, "mean of the last progress line"]
    images_per_second: Annotated[float | None, "over the whole run"]
    peak_memory_bytes: Annotated[int | None, "most device memory ever in use"]


@dataclass(frozen=True, kw_only=True)
class InterruptedEvent(Event):
    """Last line of a stopped run."""

    says: ClassVar[str] = "Interrupted by {reason} at step {step}"
    ends_run: ClassVar[bool] = True
    step: Annotated[int, "updates done"]
    reason: Annotated[StopReason, "who asked"]
    path: Annotated[str | None, "what a restart continues from; null when nothing was done"]
    total_time: Annotated[float, "seconds since the program started"]


@dataclass(frozen=True, kw_only=True)
class ErrorEvent(Event):
    """Last line of a failed run."""

    ends_run: ClassVar[bool] = True
    code: Annotated[ErrorCode, "which error"]
    step: Annotated[int | None, "updates done; null before the first"]
    hint: Annotated[str, "what to do"]
    problems: Annotated[tuple[Problem, ...], "what is wrong with the input; else empty"]
    message: str


EVENTS: tuple[type[Event], ...] = (
    *(StartEvent, InfoEvent, WarningEvent, ProgressEvent, SampleEvent, CheckpointEvent),
    *(CompleteEvent, InterruptedEvent, ErrorEvent),
)

ENVELOPE: dict[str, Any] = {
    "type": Annotated[str, "which event"],
    "seq": Annotated[int, "from 1; a gap means dropped progress"],
    "timestamp": Annotated[str, "RFC 3339, UTC, milliseconds"],
    "message": Annotated[str, "one sentence for a status bar; never parse it"],
}

JSON_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}


def describe_type(hint: Any) -> Record:
    """Translate a type annotation into JSON Schema."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return {**describe_type(arguments[0]), "description": arguments[1]}
    if origin in (typing.Union, types.UnionType):
        return {"type": [describe_type(argument)["type"] for argument in arguments]}
    if origin is Literal:
        return {"type": "string", "enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": describe_type(arguments[0])}
    if origin is dict:
        values = {} if arguments[1] is Any else describe_type(arguments[1])
        return {"type": "object", "additionalProperties": values}
    if issubclass(hint, Code):
        return {"type": "string", "enum": [code.word for code in hint]}
    if issubclass(hint, (Facts, Problem)):
        return describe_object(payload_types(hint), hint.__doc__ or "")
    return {"type": JSON_TYPES[hint]}


def payload_types(cls: type) -> dict[str, Any]:
    """List an event's own fields with their annotations; the message belongs to the envelope."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.name not in ENVELOPE}


def describe_object(fields: Mapping[str, Any], description: str) -> Record:
    """Describe an object whose fields are always all present."""
    return {
        "type": "object",
        "description": description,
        "required": list(fields),
        "properties": {name: describe_type(hint) for name, hint in fields.items()},
    }


def describe_event(cls: type[Event], facts: type[Facts] | None = None) -> Record:
    """Describe one type of line; for `info`, one topic of it."""
    fields = ENVELOPE | payload_types(cls) | ({"data": facts} if facts else {})
    schema = describe_object(fields, cls.__doc__ or "")
    schema["properties"]["type"] = {"const": cls.type()}
    if facts:
        schema["properties"]["topic"] = {"const": facts.topic()}
    return schema


def event_schema() -> Record:
    """Describe every line the program can print, from the event classes alone."""
    lines = [describe_event(cls) for cls in EVENTS if cls is not InfoEvent]
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": f"Events of train_lora.py, protocol {PROTOCOL}",
        "description": "One JSON object per line. Ignore types, fields and values you do not know.",
        "oneOf": lines + [describe_event(InfoEvent, facts) for facts in FACTS],
    }


def plain(value: Any) -> Any:
    """Reduce a value to what JSON knows; `null` stands for a number that is none."""
    if dataclasses.is_dataclass(value):
        return plain(vars(value))
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Code):
        return value.word
    return str(value) if isinstance(value, Path) else value


def utc_now() -> str:
    """Tell the time as RFC 3339 in UTC with milliseconds."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return now.replace("+00:00", "Z")


PROGRESS_SECONDS = 0.5  # a person cannot follow more than two lines a second
PROGRESS_LINES = 1000  # a chart does not get better with more points


class Emitter:
    """Number, stamp and pace events, and hand each as a record to everyone who listens."""

    def __init__(self, *listeners: Callable[[Record], None]) -> None:
        """Start counting lines and time."""
        self.listeners = list(listeners)
        self.warnings: Counter[str] = Counter()
        self.ended = False
        self._seq = 0
        self._started = time.monotonic()
        self._progress_step: int | None = None
        self._progress_time = 0.0
        # Reentrant: a listener that fails may have a warning to give.
        self._lock = threading.RLock()

    def elapsed_seconds(self) -> float:
        """Tell how long the program has been at work."""
        return round(time.monotonic() - self._started, 3)

    def wants_progress(self, step: int, total_steps: int) -> bool:
        """Tell whether a progress line would go out; for the first and the last step, always."""
        if self._progress_step is None or step >= total_steps:
            return step != self._progress_step
        waited = time.monotonic() - self._progress_time >= PROGRESS_SECONDS
        return waited and (step - self._progress_step) * PROGRESS_LINES >= total_steps

    def emit(self, event: Event) -> None:
        """Send one event, unless the last line is out or a progress line comes too soon."""
        with self._lock:
            if self.ended:
                return
            if isinstance(event, ProgressEvent):
                if not self.wants_progress(event.step, event.total_steps):
                    return
                self._progress_step, self._progress_time = event.step, time.monotonic()
            if isinstance(event, WarningEvent):
                self.warnings[event.code.word] += 1
            self._seq += 1
            self.ended = event.ends_run
            record = self._record(event)
            for listener in self.listeners:
                listener(record)

    def _record(self, event: Event) -> Record:
        """Put the envelope around the payload."""
        payload: Record = plain(event)
        head = {"type": event.type(), "seq": self._seq, "timestamp": utc_now()}
        return head | {"message": event.says.format_map(payload)} | payload

    def info(self, facts: Facts) -> None:
        """Send facts worth showing."""
        message = facts.says.format_map(plain(facts))
        with self._lock:
            self.emit(InfoEvent(topic=facts.topic(), data=facts, message=message))
            self.ended |= isinstance(facts, ValidFacts)

    def warn(self, code: WarningCode, message: str, **data: Any) -> None:
        """Send a warning."""
        self.emit(WarningEvent(code=code, message=message, data=data))


LINE_BYTES = 4095  # with its newline a line fits into one atomic write to a pipe


def shorten(value: Any, limit: int) -> Any:
    """Cut texts and lists down; `…` marks a cut text, the message counts a cut list."""
    if isinstance(value, str):
        return value if len(value) <= limit else value[: limit - 1] + "…"
    if isinstance(value, dict):
        return {key: shorten(item, limit) for key, item in value.items()}
    if isinstance(value, list):
        return [shorten(item, limit) for item in value[: max(1, limit // 16)]]
    return value


def encode_line(record: Record) -> bytes:
    """Write a record as one line of strict ASCII JSON, shortening its texts until it fits."""
    limit = 2 * LINE_BYTES
    while True:
        limit //= 2
        text = json.dumps(shorten(record, limit), allow_nan=False, separators=(",", ":"))
        if len(text) < LINE_BYTES or limit <= 2:
            return text.encode("ascii") + b"\n"


class LineWriter:
    """Write lines to a file descriptor from a thread of its own.

    Whoever reads slowly slows nobody: while the backlog is long, progress lines are dropped and
    all others wait here.
    """

    BACKLOG_LINES = 256

    def __init__(self, descriptor: int, on_failure: Callable[[OSError], None]) -> None:
        """Take the descriptor over and start the thread."""
        self._descriptor = descriptor
        self._on_failure = on_failure
        self._lines: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._finished = False
        self._thread = threading.Thread(target=self._drain, name="events", daemon=True)
        self._thread.start()

    def __call__(self, record: Record) -> None:
        """Queue one record; never wait."""
        droppable = record["type"] == "progress"
        with self._changed:
            if self._finished or (droppable and len(self._lines) >= self.BACKLOG_LINES):
                return
            self._lines.append(encode_line(record))
            self._changed.notify_all()

    def close(self, patient: Callable[[], bool]) -> None:
        """Wait until everything is written, as long as there is patience, and let go."""
        with self._changed:
            while self._lines and patient():
                self._changed.wait(0.05)
            self._finished = True
            self._changed.notify_all()
        # A thread that hangs in a write to a full pipe is left behind with its descriptor.
        self._thread.join(0.1)
        if not self._thread.is_alive():
            os.close(self._descriptor)

    def _drain(self) -> None:
        """Write line after line until told to finish or until nobody can receive them."""
        while line := self._next_line():
            try:
                self._write(line)
            except OSError as error:
                with self._changed:
                    self._finished = True
                    self._lines.clear()
                    self._changed.notify_all()
                self._on_failure(error)
                return
            with self._changed:
                if self._lines:
                    self._lines.popleft()
                self._changed.notify_all()

    def _next_line(self) -> bytes:
        """Wait for a line; an empty one means that no more will come."""
        with self._changed:
            while not self._lines and not self._finished:
                self._changed.wait()
            return b"" if self._finished else self._lines[0]

    def _write(self, line: bytes) -> None:
        """Write the whole line, also to a pipe that somebody made non-blocking."""
        while line:
            try:
                line = line[os.write(self._descriptor, line) :]
            except BlockingIOError:
                time.sleep(0.02)


# === Configuration ===========================================================

CONFIG_BYTES = 2**20  # a config is a page; whatever is larger is a mistake
REQUIRED_ROOM = 10**9  # an upper limit from here on means that there is none

# A rate above this destroys the adapter, except under optimizers that set their own scale.
HIGH_LEARNING_RATE = 0.1
LOW_LEARNING_RATE = 1e-5


@functools.cache
def config_schema() -> Record:
    """Read config_schema.json, which owns every knob."""
    schema: Record = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))
    return schema


def knobs() -> Record:
    """List the knobs that may stand at the top level or inside training_params."""
    found: Record = config_schema()["definitions"]["training_params"]["properties"]
    return found


def read_config(path: str | Path) -> str:
    """Read the config file, or standard input for `-`, and never more than a config can be."""
    source: Any = 0 if str(path) == "-" else path
    try:
        with open(source, "rb", closefd=source != 0) as file:
            content = file.read(CONFIG_BYTES + 1)
    except (OSError, ValueError) as error:
        raise TrainError(
            ErrorCode.CONFIG_NOT_FOUND, f"Cannot read config {path}: {error}"
        ) from error
    if len(content) > CONFIG_BYTES:
        raise not_json("at most 1 MiB", "more", "This is not a config for this program.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = "Save the file as UTF-8."
        raise not_json("UTF-8 text", f"byte {error.start} that is none", hint) from error


def not_json(expected: str, found: str, hint: str) -> TrainError:
    """Say what is wrong with the file as a whole."""
    return TrainError.at(ErrorCode.CONFIG_NOT_JSON, "$", expected, found, hint)


def parse_config(text: str) -> Record:
    """Parse a config the strict way and list everything that strict JSON forbids."""
    if not text.strip():
        raise not_json("a JSON object", "an empty file", "Start from example_config.json.")
    try:
        document, problems = parse_json(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise not_json("strict JSON", f"{error.msg} at {place}", "Mend this place.") from error
    except (RecursionError, ValueError) as error:  # 100,000 brackets; a number of 5,000 digits
        raise not_json("a config", f"JSON beyond all measure ({error})", "") from error
    if problems:
        raise TrainError.listing(ErrorCode.CONFIG_NOT_JSON, problems)
    if not isinstance(document, dict):
        hint = "Put the knobs between { and }."
        raise not_json("a JSON object", show(document), hint)
    return document


def parse_json(text: str) -> tuple[Any, list[Problem]]:
    """Parse JSON, noting what Python's parser lets pass: NaN, infinity, a key given twice."""
    problems: list[Problem] = []

    def note(path: str, expected: str, found: str) -> None:
        problems.append(Problem(path=path, expected=expected, found=found, hint="Mend the file."))

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            note("$", "a finite number", digits)
        return value

    def unique(pairs: list[tuple[str, Any]]) -> Record:
        counts = Counter(key for key, _ in pairs)
        for key, count in counts.items():
            if count > 1:
                note(key, "every key once", f"it {count} times")
        return dict(pairs)

    document = json.loads(text, parse_constant=number, parse_float=number, object_pairs_hook=unique)
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        note("$", "Unicode text", "half of a surrogate pair")
    return document, problems


# What parsing text of unknown origin, and looking into the result, can raise.
NOT_JSON = (ValueError, RecursionError, TypeError, AttributeError)


def parse_override(text: str) -> tuple[str, Any]:
    """Read KEY=JSON of the command line; a value that is not strict JSON is a string."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=JSON, got {text!r}")
    try:
        document, problems = parse_json(value)
    except NOT_JSON:
        return key, value
    return key, value if problems else document


def override(document: Record, overrides: Mapping[str, Any]) -> None:
    """Put the overrides wherever their key stands already, so that they win in both forms."""
    nested = document.get("training_params")
    for key, value in overrides.items():
        if isinstance(nested, dict) and key in nested:
            nested[key] = value
        else:
            document[key] = value


def show(value: Any) -> str:
    """Quote a value from the config, not more of it than fits into a sentence."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "deeply nested brackets"
    return text if len(text) <= 60 else text[:59] + "…"


TYPE_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "object": "an object",
}


def describe_values(knob: Record) -> str:
    """Say which values a knob takes, for problems and for the README."""
    if "enum" in knob:
        return "one of " + ", ".join(json.dumps(value) for value in knob["enum"])
    if knob["type"] == "array":
        return f"a list of texts, {describe_values(knob['items']).removeprefix('text ')} each"
    if knob["type"] == "string":
        longest = f" of 1 … {knob['maxLength']} characters" if "maxLength" in knob else ""
        return "a path" if knob.get("format") == "path" else "text" + longest
    return TYPE_WORDS[knob["type"]] + describe_range(knob)


def describe_range(knob: Record) -> str:
    """Say how small and how large a number may be."""
    low, high = knob.get("minimum"), knob.get("maximum", REQUIRED_ROOM)
    if "exclusiveMinimum" in knob:
        return f" above {knob['exclusiveMinimum']}, at most {high}"
    if low is None:
        return ""
    span = f" ≥ {low:g}" if high >= REQUIRED_ROOM and low else f" {low:g} … {high:.10g}"
    return span + (f", a multiple of {knob['multipleOf']}" if "multipleOf" in knob else "")


def check_schema(document: Record) -> None:
    """Hold the document against the schema and list everything that breaks it."""
    import jsonschema

    problems: dict[str, Problem] = {}
    for error in jsonschema.Draft7Validator(config_schema()).iter_errors(document):
        for problem in translate(error):
            problems.setdefault(problem.path, problem)
    if problems:
        raise TrainError.listing(ErrorCode.CONFIG_INVALID, list(problems.values()))


def translate(error: ValidationError) -> Iterator[Problem]:
    """Turn the library's finding into problems that name path, expectation and remedy."""
    place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error.absolute_path)
    prefix = f"{place}.".removeprefix(".")
    knob: Record = error.schema
    if error.validator == "additionalProperties":
        for key in sorted(set(error.instance) - set(knob["properties"])):
            hint = nearest_key(key, knob["properties"])
            yield Problem(
                path=prefix + key, expected="a known key", found="an unknown one", hint=hint
            )
    elif error.validator == "required":
        for key in (key for key in knob["required"] if key not in error.instance):
            wanted = knob["properties"][key]
            expected = describe_values(wanted)
            yield Problem(path=key, expected=expected, found="nothing", hint=wanted["hint"])
    else:
        found, hint = show(error.instance), knob.get("hint", "")
        expected = describe_values(knob)
        if error.validator == "uniqueItems":
            expected = "every item once"
        yield Problem(
            path=place.removeprefix(".") or "$", expected=expected, found=found, hint=hint
        )


def nearest_key(key: str, known: Iterable[str]) -> str:
    """Guess which key was meant."""
    if key in config_schema()["required"]:
        return "It belongs at the top level."
    likely = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.5)
    return f"Did you mean {likely[0]}?" if likely else "The README lists the known keys."


def resolve(document: Record) -> tuple[Record, list[WarningEvent]]:
    """Merge defaults, top level and training_params, each winning over the one before."""
    flat = {k: v for k, v in document.items() if k not in ("$schema", "training_params")}
    nested = document.get("training_params", {})
    values = {name: knob["default"] for name, knob in knobs().items()} | flat | nested
    if "steps" not in flat | nested and "epochs" in flat | nested:
        values["steps"] = None
    remarks = [
        WarningEvent(
            code=WarningCode.CONFIG_VALUE_TWICE,
            data={"key": key, "top_level": flat[key], "training_params": nested[key]},
            message=f"{key} is given twice; training_params wins with {show(nested[key])}",
        )
        for key in sorted(flat.keys() & nested.keys())
        if flat[key] != nested[key]
    ]
    return values, remarks


def expand_home(path: str) -> Path:
    """Resolve a leading ~, and leave alone the home of a user who does not exist."""
    return Path(os.path.expanduser(path))  # noqa: PTH111, Path.expanduser raises in that case


# From JSON to the types of the fields; draft-07 takes 1e3 for a whole number.
FIELD_TYPES: dict[str, Callable[[Any], Any]] = {
    "Path": expand_home,
    "tuple[str, ...]": tuple,
    "float": float,
    "int": int,
    "int | None": int,
}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What the user asked for, checked and complete.

    Names and types alone: ranges, defaults and prose stand in config_schema.json.
    """

    dataset_path: Path
    base_model: str
    output_path: Path
    trigger_words: tuple[str, ...]
    learning_rate: float
    batch_size: int
    gradient_accumulation_steps: int
    steps: int | None
    epochs: int
    resolution: int
    lora_rank: int
    lora_alpha: float
    checkpoint_steps: int
    validation_steps: int
    seed: int
    resume: str
    stop_with_parent: bool

    # No knob: what to tell the user as soon as somebody listens.
    remarks: tuple[WarningEvent, ...] = ()

    @classmethod
    def from_json(
        cls, path: str | Path, overrides: Mapping[str, Any] | None = None
    ) -> TrainingConfig:
        """Load a config and check all that can be known without looking at other files."""
        document = parse_config(read_config(path))
        override(document, overrides or {})
        check_schema(document)
        values, remarks = resolve(document)
        for name, value in values.items():
            convert = FIELD_TYPES.get(cls.__annotations__[name])
            values[name] = convert(value) if convert and value is not None else value
        config = cls(**values)
        check_rules(config)
        return dataclasses.replace(config, remarks=(*remarks, *remark_on(config)))

    @property
    def effective_batch(self) -> int:
        """Count the images behind one update."""
        return self.batch_size * self.gradient_accumulation_steps

    def steps_per_epoch(self, images: int) -> int:
        """Count the updates in which every image is seen at least once."""
        return math.ceil(images / self.effective_batch)

    def total_steps(self, images: int) -> int:
        """Count the updates; epochs run on across their borders, only the last may be short."""
        return self.steps or math.ceil(self.epochs * images / self.effective_batch)

    def as_record(self) -> Record:
        """Show every knob as JSON."""
        record: Record = plain(self)
        del record["remarks"]
        return record


def check_rules(config: TrainingConfig) -> None:
    """List values that are fine alone but do not go together."""
    rate, output = config.learning_rate, config.output_path
    rules = [
        (
            rate <= HIGH_LEARNING_RATE,
            *("learning_rate", f"at most {HIGH_LEARNING_RATE} with this optimizer", show(rate)),
            "1e-4 suits most runs.",
        ),
        (
            output.absolute() != config.dataset_path.absolute(),
            *("output_path", "a folder other than dataset_path", show(str(output))),
            "Samples would become training images.",
        ),
    ]
    problems = [
        Problem(path=path, expected=expected, found=found, hint=hint)
        for holds, path, expected, found, hint in rules
        if not holds
    ]
    if problems:
        raise TrainError.listing(ErrorCode.CONFIG_CONFLICT, problems)


def remark_on(config: TrainingConfig) -> Iterator[WarningEvent]:
    """Warn of values that are allowed but seldom meant."""
    if config.learning_rate < LOW_LEARNING_RATE:
        rate = config.learning_rate
        yield WarningEvent(
            code=WarningCode.LEARNING_RATE_LOW,
            data={"learning_rate": rate},
            message=f"learning_rate {rate:g} is very low; 1e-4 suits most runs",
        )
    if not config.trigger_words:
        yield WarningEvent(
            code=WarningCode.TRIGGER_WORDS_EMPTY,
            data={},
            message="No trigger words: only what the captions say will call the concept",
        )


# === Stopping ================================================================

# SIGBREAK is how Windows asks a console program to end; SIGHUP exists only elsewhere.
STOP_SIGNALS: dict[str, StopReason] = {
    "SIGINT": "SIGINT",
    "SIGTERM": "SIGTERM",
    "SIGHUP": "SIGHUP",
    "SIGBREAK": "SIGTERM",
}

EXIT_CODES: dict[StopReason, int] = {
    "SIGINT": 130,
    "SIGTERM": 143,
    "SIGHUP": 129,
    "stop_file": 143,
    "host_gone": 143,
}

# Ctrl-C under a launcher arrives twice within milliseconds; a person who means it waits longer.
SECOND_SIGNAL_SECONDS = 1.0


class StopRequest:
    """The first reason to stop, remembered for whoever asks."""

    def __init__(self) -> None:
        """Start with no reason."""
        self.reason: StopReason | None = None
        self.requested_at = math.inf
        self._first_signal_at = math.inf
        self._pid = os.getpid()
        self._watching = threading.Event()

    def request(self, reason: StopReason) -> None:
        """Ask for a stop; later reasons do not count."""
        if self.reason is None:
            self.requested_at = time.monotonic()
            self.reason = reason

    def check(self) -> None:
        """Leave by TrainingInterrupted when a stop was asked for."""
        if self.reason is not None:
            raise TrainingInterrupted(self.reason)

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[StopRequest]:
        """Let signals ask for a stop; give them back to their former handlers afterwards."""
        former: dict[signal.Signals, Any] = {}
        self._watching.set()
        try:
            if threading.current_thread() is threading.main_thread():
                for name in STOP_SIGNALS:
                    self._take_over(name, former)
            yield self
        finally:
            self._watching.clear()
            for number, handler in former.items():
                signal.signal(number, handler)

    def _take_over(self, name: str, former: dict[signal.Signals, Any]) -> None:
        """Handle one signal where the platform has it; nohup's wish to ignore SIGHUP stands."""
        number = signal.Signals.__members__.get(name)
        if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
            return
        former[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: types.FrameType | None) -> None:
        """Set the request and nothing else: no I/O is safe here. A later second signal ends it."""
        if os.getpid() != self._pid:  # a forked helper ends like any other program
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if now - self._first_signal_at >= SECOND_SIGNAL_SECONDS:
            os._exit(128 + number)
        self._first_signal_at = min(now, self._first_signal_at)
        self.request(STOP_SIGNALS[signal.Signals(number).name])

    def watch(self, cause: Callable[[], bool], reason: StopReason) -> None:
        """Look twice a second whether something came true that asks for a stop."""
        threading.Thread(target=self._watch, args=(cause, reason), daemon=True).start()

    def _watch(self, cause: Callable[[], bool], reason: StopReason) -> None:
        """Look until it came true, or until the run is over."""
        while self._watching.is_set() and self.reason is None:
            if cause():
                self.request(reason)
            time.sleep(0.5)


def take_stop_file(path: Path) -> bool:
    """Honour a stop file: it is there exactly if it can be removed."""
    try:
        path.unlink()
    except OSError:
        return False
    return True


def parent_ended(parent: int) -> bool:
    """Tell whether the process that started this one is gone."""
    return os.getppid() != parent


def reader_gone(descriptor: int) -> bool:
    """Tell whether nobody holds the other end of a pipe any more."""
    if sys.platform == "win32":  # has no poll for pipes; the next write tells
        return False
    poller = select.poll()
    poller.register(descriptor, 0)
    return any(flags & (select.POLLERR | select.POLLNVAL) for _, flags in poller.poll(0))


# === Dataset =================================================================

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # no other decoder ever sees a user's bytes
EXIF_ORIENTATION = 0x0112
CAPTION_BYTES = 64 * 1024  # a text encoder reads 77 tokens of it
METADATA_BYTES = 64 * 2**20


class Unusable(Exception):
    """A file in the dataset cannot be used; the text is the reason."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One training image with what is said about it."""

    name: str  # path inside the dataset, with forward slashes
    path: Path
    width: int  # pixels, as a viewer shows it
    height: int
    caption: str


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The usable pictures in natural order, and how the others fared."""

    pictures: tuple[Picture, ...]
    facts: DatasetFacts


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort image10 after image9, whatever the case."""
    parts = re.split(r"(\d+)", name.casefold())
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts] + [(2, name)]


def find_files(config: TrainingConfig, events: Emitter) -> dict[str, Path]:
    """List the dataset's files by their path inside it, leaving out what the run itself writes."""
    root, output = config.dataset_path.resolve(), config.output_path.resolve()
    found: dict[str, Path] = {}

    def unreadable(error: OSError) -> None:
        skip(Path(error.filename), f"it cannot be read ({error.strerror})")

    def skip(folder: Path, reason: str) -> None:
        name = folder.relative_to(root).as_posix()
        message = f"Skipped folder {name}: {reason}"
        events.warn(WarningCode.FOLDER_SKIPPED, message, file=name, reason=reason)

    for here, folders, files in os.walk(root, onerror=unreadable):
        folder = Path(here)
        for name in list(folders):
            named_like_image = name.lower().endswith(IMAGE_SUFFIXES)
            if is_hidden(name) or folder / name == output:
                folders.remove(name)
            elif named_like_image or (folder / name).is_symlink():
                folders.remove(name)
                skip(folder / name, "named like an image" if named_like_image else "it is a link")
        for name in files:
            if not is_hidden(name):
                found[(folder / name).relative_to(root).as_posix()] = folder / name
    return found


def is_hidden(name: str) -> bool:
    """Recognise what archives and file managers leave behind."""
    return name.startswith(".") or name == "__MACOSX"


def check_regular(path: Path, root: Path) -> None:
    """Refuse what must not be opened: pipes, devices, links that lead out of the dataset."""
    try:
        if path.is_symlink() and not path.resolve(strict=True).is_relative_to(root):
            raise Unusable("a link that leaves the dataset")
        status = path.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise Unusable("a link that leads nowhere, or no right to look") from error
    if not stat.S_ISREG(status.st_mode):
        raise Unusable("not a regular file")
    if status.st_size == 0:
        raise Unusable("an empty file")


def inspect_image(path: Path, root: Path) -> tuple[int, int]:
    """Decode an image far enough to trust it; return width and height as a viewer shows them."""
    from PIL import Image, UnidentifiedImageError

    check_regular(path, root)
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            # Phones write JPEGs with further pictures behind the first; only that one counts.
            if image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:
                raise Unusable("an animation")
            width, height = image.size
            # A PNG's orientation may stand behind the pixels; looking there would decode them.
            early = image.format != "PNG" or "exif" in image.info
            sideways = early and image.getexif().get(EXIF_ORIENTATION, 1) >= 5
            if image.format == "PNG":
                image.verify()  # the checksums of all chunks, without unpacking them
            else:
                image.draft("RGB", (64, 64))  # a JPEG is read whole, but drawn small
                image.load()
    except Unusable:
        raise
    except UnidentifiedImageError as error:
        raise Unusable("not a png, jpeg, webp or bmp image") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise Unusable("more pixels than any photo has") from error
    except Exception as error:  # hostile bytes make decoders raise anything
        raise Unusable(f"damaged ({error})") from error
    return (height, width) if sideways else (width, height)


def inspect_images(
    files: Sequence[tuple[str, Path]], root: Path, events: Emitter, stop: StopRequest
) -> dict[str, tuple[int, int]]:
    """Decode all images in parallel and in order; return the sizes of the usable ones."""
    from PIL import Image

    sizes: dict[str, tuple[int, int]] = {}
    reported = time.monotonic()
    pool = ThreadPoolExecutor(thread_name_prefix="images")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            tasks = [(name, pool.submit(inspect_image, path, root)) for name, path in files]
            for done, (name, task) in enumerate(tasks):
                stop.check()
                if time.monotonic() - reported >= 1:
                    events.info(PhaseFacts(name="checking images", done=done, total=len(tasks)))
                    reported = time.monotonic()
                try:
                    sizes[name] = task.result()
                except Unusable as reason:
                    message = f"Skipped {name}: {reason}"
                    events.warn(WarningCode.IMAGE_SKIPPED, message, file=name, reason=str(reason))
        finally:
            pool.shutdown(cancel_futures=True)
    return sizes


def read_inside(path: Path, root: Path, limit_bytes: int) -> bytes:
    """Read a file of the dataset, never more than the limit and never from outside."""
    check_regular(path, root)
    try:
        with path.open("rb") as file:
            content = file.read(limit_bytes + 1)
    except OSError as error:
        raise Unusable(f"it cannot be read ({error.strerror})") from error
    if len(content) > limit_bytes:
        raise Unusable(f"larger than {limit_bytes // 1024} KiB")
    return content


def decode_caption(content: bytes) -> str:
    """Turn bytes into one line of text."""
    try:
        text = " ".join(content.decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise Unusable("not UTF-8") from error
    if not text:
        raise Unusable("an empty caption")
    return text


def read_metadata(files: Mapping[str, Path], root: Path, events: Emitter) -> dict[str, str]:
    """Read the captions of every metadata.jsonl, keyed by the image's path inside the dataset."""
    captions: dict[str, str] = {}
    for name in (n for n in files if PurePosixPath(n).name == "metadata.jsonl"):
        try:
            lines = read_inside(files[name], root, METADATA_BYTES).split(b"\n")
        except Unusable as reason:
            warn_caption(name, reason, events)
            continue
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip():
                    image, caption = parse_metadata(line, PurePosixPath(name).parent, files)
                    captions[image] = caption
            except Unusable as reason:
                message = f"Cannot use line {number} of {name}: {reason}"
                data = {"file": name, "line": number, "reason": str(reason)}
                events.warn(WarningCode.METADATA_LINE_REFUSED, message, **data)
    return captions


def parse_metadata(
    line: bytes, folder: PurePosixPath, files: Mapping[str, Path]
) -> tuple[str, str]:
    """Take image and caption from one line, if the image lies inside the dataset."""
    try:
        entry, problems = parse_json(line.decode("utf-8-sig"))
    except NOT_JSON as error:
        raise Unusable("not JSON in UTF-8") from error
    name, text = (entry.get("file_name"), entry.get("text")) if isinstance(entry, dict) else (0, 0)
    if problems or not isinstance(name, str) or not isinstance(text, str):
        raise Unusable("not an object with file_name and text")
    path = PureWindowsPath(name)  # knows both kinds of slashes, and drives
    if path.anchor or ".." in path.parts or "\0" in name or "://" in name:
        raise Unusable("file_name leads out of the dataset")
    image = (folder / path.as_posix()).as_posix()
    if image not in files:
        raise Unusable("file_name names no file")
    return image, decode_caption(text.encode())


def warn_caption(name: str, reason: Unusable, events: Emitter) -> None:
    """Tell that a caption file is of no use."""
    message = f"Cannot use {name}: {reason}"
    events.warn(WarningCode.CAPTION_UNUSABLE, message, file=name, reason=str(reason))


def read_sidecars(files: Mapping[str, Path], root: Path, events: Emitter) -> dict[str, str]:
    """Read image.txt beside every image that has one, keyed by the image's path."""
    texts = {name[:-4]: name for name in files if name.lower().endswith(".txt")}
    captions: dict[str, str] = {}
    for image in files:
        stem, _, suffix = image.rpartition(".")
        name = texts.get(stem)
        if name is None or f".{suffix.lower()}" not in IMAGE_SUFFIXES:
            continue
        try:
            captions[image] = decode_caption(read_inside(files[name], root, CAPTION_BYTES))
        except Unusable as reason:
            warn_caption(name, reason, events)
    return captions


def compose_caption(caption: str, trigger_words: Iterable[str]) -> str:
    """Let every trigger word stand in the caption exactly once, in front where it was missing."""
    words = [" ".join(word.split()) for word in trigger_words]
    missing: list[str] = []
    # A word inside a longer one counts as present, so the longer ones come first.
    for word in sorted(words, key=len, reverse=True):
        pattern = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
        first = pattern.search(caption)
        if first is None and not any(pattern.search(other) for other in missing):
            missing.append(word)
        elif first and pattern.search(caption, first.end()):
            rest = re.sub(r"\s*(,\s*)+", ", ", pattern.sub("", caption[first.end() :]))
            caption = " ".join((caption[: first.end()] + rest).split()).rstrip(" ,")
    front = [word for word in words if word in missing]
    return ", ".join([*front, caption] if caption else front)


def scan_dataset(config: TrainingConfig, events: Emitter, stop: StopRequest) -> Dataset:
    """Find the usable images and their captions; name whatever is left out."""
    root = config.dataset_path.resolve()
    files = find_files(config, events)
    candidates = sorted((n for n in files if n.lower().endswith(IMAGE_SUFFIXES)), key=natural_key)
    sizes = inspect_images([(name, files[name]) for name in candidates], root, events, stop)
    captions = read_metadata(files, root, events) | read_sidecars(files, root, events)
    pictures = tuple(
        Picture(
            name=name,
            path=files[name],
            width=width,
            height=height,
            caption=compose_caption(captions.get(name, ""), config.trigger_words),
        )
        for name, (width, height) in sizes.items()
    )
    check_pictures(pictures, config, events)
    counts = Counter(f"{width}x{height}" for width, height in sizes.values())
    facts = DatasetFacts(
        images=len(pictures),
        skipped=len(candidates) - len(pictures),
        captions_found=sum(name in captions for name in sizes),
        captions_missing=sum(name not in captions for name in sizes),
        resolutions=dict(counts.most_common(10)),
    )
    events.info(facts)
    return Dataset(pictures=pictures, facts=facts)


def check_pictures(pictures: Sequence[Picture], config: TrainingConfig, events: Emitter) -> None:
    """Refuse a dataset that cannot be trained on; warn of one that is poor."""
    if not pictures:
        message = f"No usable image in {config.dataset_path}"
        raise TrainError(ErrorCode.DATASET_EMPTY, message)
    bare = [picture.name for picture in pictures if not picture.caption]
    if bare:
        hint = "Write a caption beside it, or give trigger_words."
        raise TrainError.listing(
            ErrorCode.CAPTIONS_MISSING,
            [Problem(path=name, expected="a caption", found="none", hint=hint) for name in bare],
        )
    small = [p.name for p in pictures if min(p.width, p.height) < config.resolution]
    if small:
        message = (
            f"{len(small)} images are smaller than {config.resolution} pixels, such as {small[0]}"
        )
        events.warn(WarningCode.IMAGES_SMALL, message, images=len(small), file=small[0])


# === Model families ==========================================================

HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
Shapes = dict[str, tuple[int, ...]]

# The layers that get an adapter, named alike in folders and in single files.
ATTENTION = re.compile(r"attn[12]\.to_(q|k|v|out\.0)\.weight$")


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What a base model's headers give away about how it is built."""

    source: Literal["folder", "file"]
    shapes: Shapes  # of the weights of the denoiser, without prefix
    parameters: int  # of all components
    weights_bytes: int
    input_channels: int
    micro_conditioning: bool  # image size and crop are told to the denoiser
    linear_projection: bool  # into the attention blocks; SD 1 has convolutions there
    text_encoders: tuple[bool, bool]  # whether the first and the second are there
    sample_size: int | None  # side of the latent image it was made for
    prediction_type: str | None


@dataclass(frozen=True, kw_only=True)
class Family:
    """All that differs between model families. No other code asks which one it is."""

    name: str
    native_resolution: int
    recognises: Callable[[Structure], bool]


FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="sd1",
            native_resolution=512,
            recognises=lambda it: not it.micro_conditioning and not it.linear_projection,
        ),
        Family(
            name="sd2",
            native_resolution=768,
            recognises=lambda it: not it.micro_conditioning and it.linear_projection,
        ),
        Family(name="sdxl", native_resolution=1024, recognises=lambda it: it.micro_conditioning),
    )
}


def damaged(path: Path, found: str) -> TrainError:
    """Say which file of the base model is broken."""
    return TrainError.at(ErrorCode.MODEL_DAMAGED, path, "a complete model", found)


def unsupported(kind: str) -> TrainError:
    """Say what the base model is instead of what can be trained."""
    expected = "a Stable Diffusion 1.x, 2.x or SDXL base"
    return TrainError.at(ErrorCode.MODEL_UNSUPPORTED, "base_model", expected, kind)


def read_header(path: Path) -> Shapes:
    """Read the names and shapes of a safetensors file; refuse one that is cut short."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > HEADER_BYTES:
                raise ValueError("its header is larger than any")
            header, problems = parse_json(file.read(length).decode())
            header.pop("__metadata__", None)
            shapes = {name: tuple(map(int, entry["shape"])) for name, entry in header.items()}
            ends = [int(entry["data_offsets"][1]) for entry in header.values()]
            size = file.seek(0, os.SEEK_END)
    except (OSError, ArithmeticError, LookupError, struct.error, *NOT_JSON) as error:
        raise damaged(path, f"no safetensors header ({error})") from error
    if problems or not shapes or size != 8 + length + max(ends):
        raise damaged(path, "a file that does not hold what its header says")
    return shapes


def read_json_file(path: Path) -> Record:
    """Read one of the base model's own JSON files."""
    try:
        document, problems = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, *NOT_JSON) as error:
        raise damaged(path, f"no readable JSON ({type(error).__name__})") from error
    if problems or not isinstance(document, dict):
        raise damaged(path, "no JSON object")
    return document


def find_weights(component: Path, stem: str) -> list[Path]:
    """Find a component's safetensors: whole, in half precision, or in shards."""
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (component / name).is_file():
            return [component / name]
    index = component / f"{stem}.safetensors.index.json"
    if index.is_file():
        shards = read_json_file(index).get("weight_map", {})
        return [component / Path(str(name)).name for name in sorted(set(shards.values()))]
    if any(component.glob(f"{stem}*.bin")):
        raise unsupported("stored as pickle (.bin), which can run code when loaded")
    raise damaged(component, f"no {stem}.safetensors")


def read_folder(folder: Path) -> Structure:
    """Read the structure of a model in diffusers layout."""
    if (folder / "transformer").is_dir() and not (folder / "unet").is_dir():
        raise unsupported("a transformer (DiT) model such as SD 3 or FLUX")
    unet = read_json_file(folder / "unet" / "config.json")
    schedule = read_json_file(folder / "scheduler" / "scheduler_config.json")
    encoders = [name for name in ("text_encoder", "text_encoder_2") if (folder / name).is_dir()]
    files = find_weights(folder / "unet", "diffusion_pytorch_model")
    denoiser = len(files)
    files += find_weights(folder / "vae", "diffusion_pytorch_model")
    for name in encoders:
        files += find_weights(folder / name, "model")
    headers = [read_header(file) for file in files]
    return Structure(
        source="folder",
        shapes={name: shape for header in headers[:denoiser] for name, shape in header.items()},
        parameters=sum(math.prod(shape) for header in headers for shape in header.values()),
        weights_bytes=sum(file.stat().st_size for file in files),
        input_channels=int(unet.get("in_channels", 4)),
        micro_conditioning=unet.get("addition_embed_type") == "text_time",
        linear_projection=bool(unet.get("use_linear_projection")),
        text_encoders=("text_encoder" in encoders, "text_encoder_2" in encoders),
        sample_size=unet.get("sample_size"),
        prediction_type=schedule.get("prediction_type", "epsilon"),
    )


def read_file(path: Path) -> Structure:
    """Read the structure of a single file in the original layout."""
    if path.suffix.lower() in PICKLES:
        raise unsupported("a pickle file, which can run code when loaded")
    everything = read_header(path)
    if any(name.startswith(("lora_", "unet.")) and "lora" in name for name in everything):
        raise unsupported("a LoRA, not a base model")
    prefix = "model.diffusion_model."
    shapes = {n.removeprefix(prefix): s for n, s in everything.items() if n.startswith(prefix)}
    if any("joint_blocks" in name or "double_blocks" in name for name in everything):
        raise unsupported("a transformer (DiT) model such as SD 3 or FLUX")
    if "input_blocks.0.0.weight" not in shapes:
        raise unsupported("no checkpoint in the original Stable Diffusion layout")
    encoders = ("cond_stage_model.", "conditioner.embedders.0.transformer.")
    second = "conditioner.embedders.1.model."
    projection = next((s for n, s in shapes.items() if n.endswith("proj_in.weight")), ())
    return Structure(
        source="file",
        shapes=shapes,
        parameters=sum(math.prod(shape) for shape in everything.values()),
        weights_bytes=path.stat().st_size,
        input_channels=shapes["input_blocks.0.0.weight"][1],
        micro_conditioning="label_emb.0.0.weight" in shapes,
        linear_projection=len(projection) == 2,
        text_encoders=(
            any(name.startswith(encoders) for name in everything),
            any(name.startswith(second) for name in everything),
        ),
        sample_size=None,
        # Checkpoints trained for velocity carry an empty tensor that says so.
        prediction_type="v_prediction" if "v_pred" in everything else None,
    )


def cached_snapshot(hub_id: str) -> Path | None:
    """Find a Hugging Face model in the local cache, without asking the network."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    folder = cache / f"models--{hub_id.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    snapshot = folder / "snapshots" / revision
    # A download that was given up leaves the small files of a model behind.
    return snapshot if (snapshot / "unet" / "config.json").is_file() else None


def read_structure(config: TrainingConfig) -> Structure | None:
    """Find the base model and read its headers; None stands for one that must be downloaded."""
    path = expand_home(config.base_model)
    if path.is_dir():
        return read_folder(path)
    if path.is_file():
        return read_file(path)
    if not HUB_ID.fullmatch(config.base_model) or path.suffix in (".safetensors", *PICKLES):
        expected, found = "a folder, a .safetensors file or a Hugging Face id", config.base_model
        raise TrainError.at(
            ErrorCode.MODEL_NOT_FOUND, "base_model", expected, f"{found}, which is none"
        )
    snapshot = cached_snapshot(config.base_model)
    return read_folder(snapshot) if snapshot else None


UNSUPPORTED_INPUTS = {5: "a depth model", 8: "an instruct-pix2pix model", 9: "an inpainting model"}


def inspect_model(config: TrainingConfig) -> tuple[ModelFacts, Structure | None]:
    """Tell from headers alone what the base model is, and refuse what cannot be trained."""
    structure = read_structure(config)
    if structure is None:
        return ModelFacts(source="hub", cached=False), None
    if structure.input_channels != 4:
        kind = UNSUPPORTED_INPUTS.get(structure.input_channels, "a model with other inputs")
        raise unsupported(kind)
    if structure.micro_conditioning and not structure.text_encoders[0]:
        raise unsupported("an SDXL refiner")
    if not any(structure.text_encoders):
        raise unsupported("a denoiser without text encoder")
    family = next(family for family in FAMILIES.values() if family.recognises(structure))
    size = structure.sample_size
    facts = ModelFacts(
        source=structure.source if expand_home(config.base_model).exists() else "hub",
        cached=True,
        family=family.name,
        prediction_type=structure.prediction_type,
        native_resolution=size * 8 if isinstance(size, int) else family.native_resolution,
        parameters=structure.parameters,
        weights_bytes=structure.weights_bytes,
    )
    return facts, structure


# === Output folder ===========================================================

LOCK_SECONDS = 0.5  # a preflight may hold the lock for an instant


def nearest_folder(path: Path) -> Path:
    """Find the folder that exists already and would hold the path."""
    path = path.absolute()
    while not os.path.lexists(path):
        path = path.parent
    return path


def check_output(path: Path) -> None:
    """Tell without writing anything whether the output folder can be made and written."""
    try:
        folder = nearest_folder(path)
        if not folder.is_dir():
            raise unusable_output(f"{folder}, which is a file")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise unusable_output(f"{folder}, which is read-only")
        if is_locked(path / ".lock"):
            raise busy(path)
    except OSError as error:
        raise unusable_output(str(error)) from error


def unusable_output(found: str) -> TrainError:
    """Say why nothing can be written."""
    expected = "a folder that can be made and written"
    return TrainError.at(ErrorCode.OUTPUT_UNUSABLE, "output_path", expected, found)


def busy(path: Path) -> TrainError:
    """Say that the folder is taken."""
    found = f"{path}, which another run is writing to"
    return TrainError.at(ErrorCode.OUTPUT_BUSY, "output_path", "a folder of its own", found)


def is_locked(path: Path) -> bool:
    """Tell whether a live run holds the lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(descriptor)
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Lock a file if nobody else does. The system unlocks it when the process ends, however."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        # A file system without locks, such as some NFS: better to run than to refuse.
        return True
    return True


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Make the output folder and hold its lock."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise unusable_output(str(error)) from error
    try:
        patience = time.monotonic() + LOCK_SECONDS
        while not try_lock(descriptor):
            if time.monotonic() > patience:
                raise busy(path)
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


# What a run writes. Only these are ever set aside, so that a shared folder stays as it is.
OWN_FILES = (
    *("checkpoints", "samples", "state", "events.jsonl", "loss_history.csv"),
    *("loss_curve.png", "lora_final.safetensors"),
)


def set_aside(output: Path) -> Path | None:
    """Move an earlier run into a folder of its own; a mounted volume could not be renamed."""
    earlier = [output / name for name in OWN_FILES if os.path.lexists(output / name)]
    if not earlier:
        return None
    number = next(n for n in itertools.count(1) if not os.path.lexists(output / f"earlier_{n}"))
    target = output / f"earlier_{number}"
    try:
        target.mkdir()
        for path in earlier:
            path.rename(target / path.name)
    except OSError as error:
        raise unusable_output(str(error)) from error
    return target


def disk_needed(config: TrainingConfig, structure: Structure, total_steps: int) -> int:
    """Add up, from shapes alone, what a run of this length writes at most."""
    numbers = sum(
        config.lora_rank * (shape[0] + shape[1])
        for name, shape in structure.shapes.items()
        if ATTENTION.search(name) and len(shape) >= 2
    )
    lora = 2 * numbers  # half precision
    state = 3 * 4 * numbers  # the adapter and two moments of the optimizer, full precision
    picture = 3 * config.resolution**2  # a PNG is never larger than its pixels by much
    return (
        lora * (1 + total_steps // config.checkpoint_steps)
        + state * 4  # three are kept while the next is written
        + picture * (1 + total_steps // config.validation_steps)
    )


# === Preflight ===============================================================


@contextlib.contextmanager
def collecting(errors: list[TrainError]) -> Iterator[None]:
    """Note an error and go on, so that the next check is made too."""
    try:
        yield
    except TrainError as error:
        errors.append(error)


def check_paths(config: TrainingConfig) -> tuple[ModelFacts, Structure | None]:
    """Look at the three places the config names and list all that is wrong with them at once."""
    errors: list[TrainError] = []
    with collecting(errors):
        check_dataset_folder(config.dataset_path)
    with collecting(errors):
        check_output(config.output_path)
    with collecting(errors):
        model = inspect_model(config)
    if errors:
        problems = [problem for error in errors for problem in error.problems]
        raise TrainError.listing(errors[0].code, problems)
    return model


def check_dataset_folder(path: Path) -> None:
    """Refuse a dataset that is no folder or may not be read."""
    found = f"{path}, which does not exist"
    try:
        if path.is_dir() and os.access(path, os.R_OK | os.X_OK):
            return
        if path.exists():
            found = f"{path}, which is no readable folder"
    except OSError as error:
        found = str(error)
    expected = "a folder with images"
    raise TrainError.at(ErrorCode.DATASET_NOT_FOUND, "dataset_path", expected, found)


def inspect_device() -> DeviceFacts:
    """Ask the system, not torch, which processor will train."""
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    return query_nvidia() or DeviceFacts(
        kind="mps" if apple else "cpu",
        name=processor_name(),
        memory_total_bytes=memory_bytes("SC_PHYS_PAGES"),
        memory_free_bytes=memory_bytes("SC_AVPHYS_PAGES"),
        driver=None,
    )


def query_nvidia() -> DeviceFacts | None:
    """Read the first visible GPU from nvidia-smi, where there is one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    program = shutil.which("nvidia-smi")
    if program is None or visible in ("", "-1"):
        return None
    query = "--query-gpu=name,memory.total,memory.free,driver_version"
    command = [program, query, "--format=csv,noheader,nounits", f"--id={visible}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        name, total, free, driver = answer.stdout.strip().split(", ")
        return DeviceFacts(
            kind="cuda",
            name=name,
            memory_total_bytes=int(total) * 2**20,
            memory_free_bytes=int(free) * 2**20,
            driver=driver,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None  # a driver that does not answer trains nothing


def processor_name() -> str:
    """Name the CPU as its maker calls it, where the system tells."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    found = re.search(r"model name\s*: (.+)", cpuinfo)
    return found.group(1) if found else platform.machine()


def memory_bytes(pages: str) -> int | None:
    """Read an amount of main memory, where the system tells."""
    if sys.platform == "win32" or pages not in os.sysconf_names:
        return None
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """Everything that is known before the first weight is loaded."""

    dataset: Dataset
    device: DeviceFacts
    model: ModelFacts
    total_steps: int
    disk_needed_bytes: int | None
    disk_free_bytes: int

    @classmethod
    def make(
        cls,
        config: TrainingConfig,
        model: tuple[ModelFacts, Structure | None],
        events: Emitter,
        stop: StopRequest,
    ) -> Preflight:
        """Look at everything and tell what there is; refuse what cannot end well."""
        facts, structure = model
        report_model(config, facts, events)
        with ThreadPoolExecutor(1) as aside:  # nvidia-smi can take a second to wake up
            asked = aside.submit(inspect_device)
            dataset = scan_dataset(config, events, stop)
            device = asked.result()
        events.info(device)
        total_steps = config.total_steps(len(dataset.pictures))
        needed = disk_needed(config, structure, total_steps) if structure else None
        free = shutil.disk_usage(nearest_folder(config.output_path)).free
        if needed is not None and needed > free:
            expected = f"{needed:,} bytes free"
            raise TrainError.at(ErrorCode.DISK_FULL, "output_path", expected, f"{free:,}")
        return cls(
            dataset=dataset,
            device=device,
            model=facts,
            total_steps=total_steps,
            disk_needed_bytes=needed,
            disk_free_bytes=free,
        )

    def report(self, config: TrainingConfig, warnings_given: Mapping[str, int]) -> ValidFacts:
        """Sum everything up for the last line of --validate-only."""
        return ValidFacts(
            **vars(self.dataset.facts),
            effective_batch=config.effective_batch,
            steps_per_epoch=config.steps_per_epoch(len(self.dataset.pictures)),
            total_steps=self.total_steps,
            family=self.model.family,
            device=self.device.kind,
            disk_needed_bytes=self.disk_needed_bytes,
            disk_free_bytes=self.disk_free_bytes,
            warnings=dict(warnings_given),
        )


def report_model(config: TrainingConfig, model: ModelFacts, events: Emitter) -> None:
    """Tell what the base model is, and warn of what may come as a surprise."""
    events.info(model)
    if not model.cached:
        message = f"{config.base_model} is not in the local cache; training will download it"
        events.warn(WarningCode.MODEL_NOT_CACHED, message, base_model=config.base_model)
    native = model.native_resolution
    if native and not 0.75 <= config.resolution / native <= 1.5:
        message = f"resolution {config.resolution} is far from the base model's {native}"
        data = {"resolution": config.resolution, "native_resolution": native}
        events.warn(WarningCode.RESOLUTION_UNUSUAL, message, **data)


# === Training ================================================================


class LoRATrainer:
    """One run: look at everything, then train."""

    def __init__(
        self,
        config: TrainingConfig,
        events: Emitter | None = None,
        stop: StopRequest | None = None,
        *,
        fresh: bool = False,
    ) -> None:
        """Take the config; from Python, `Emitter(callable)` passes every event to the callable."""
        self.config = config
        self.events = events or Emitter()
        self.stop = stop or StopRequest()
        self.fresh = fresh

    def validate(self) -> ValidFacts:
        """Check all that can be checked without loading a model, and write nothing."""
        with reporting(self.events):
            model = check_paths(self.config)
            self._start()
            preflight = Preflight.make(self.config, model, self.events, self.stop)
            self.stop.check()
            report = preflight.report(self.config, self.events.warnings)
            self.events.info(report)
        return report

    def train(self) -> None:
        """Train one LoRA into the output folder."""
        output = self.config.output_path
        with reporting(self.events):
            model = check_paths(self.config)
            with claimed(output):
                aside = set_aside(output) if self.fresh else None
                # Reports before the mirror closes and the lock goes, so that both hold the end.
                with mirrored(self.events, output) as mirror, reporting(self.events):
                    self._start()
                    self._tell_circumstances(mirror, aside)
                    Preflight.make(self.config, model, self.events, self.stop)
                    self.stop.check()
                    raise TrainError(ErrorCode.NOT_IMPLEMENTED, "Training is not implemented yet")

    def _start(self) -> None:
        """Send the first line, and what the loader had to say."""
        self.stop.check()
        self.events.emit(
            StartEvent(
                protocol=PROTOCOL,
                version=__version__,
                run_id=uuid.uuid4().hex,
                pid=os.getpid(),
                resumed_step=0,
                total_steps=self.config.steps,
                config=self.config.as_record(),
            )
        )
        for remark in self.config.remarks:
            self.events.emit(remark)

    def _tell_circumstances(self, mirror: OSError | None, aside: Path | None) -> None:
        """Watch for requests to stop, and tell what happened before the first line."""
        stop_file = self.config.output_path / "stop"
        take_stop_file(stop_file)  # one left from an earlier run
        self.stop.watch(functools.partial(take_stop_file, stop_file), "stop_file")
        if self.config.stop_with_parent:
            self.stop.watch(functools.partial(parent_ended, os.getppid()), "host_gone")
        if mirror:
            warn_mirror(self.events, mirror)
        if aside:
            self.events.info(ResumeFacts(step=0, set_aside=str(aside)))


@contextlib.contextmanager
def mirrored(events: Emitter, output: Path) -> Iterator[OSError | None]:
    """Append all events to events.jsonl; yield what kept that file from being opened."""
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        descriptor = os.open(output / "events.jsonl", flags, 0o644)
    except OSError as error:
        yield error
        return
    writer = LineWriter(descriptor, functools.partial(warn_mirror, events))
    events.listeners.append(writer)
    try:
        yield None
    finally:
        events.listeners.remove(writer)
        patience = time.monotonic() + MIRROR_SECONDS
        writer.close(lambda: time.monotonic() < patience)


def warn_mirror(events: Emitter, error: OSError) -> None:
    """Tell that events.jsonl will be incomplete."""
    reason = error.strerror or str(error)
    events.warn(WarningCode.MIRROR_FAILED, f"Cannot write events.jsonl: {reason}", reason=reason)


@contextlib.contextmanager
def reporting(events: Emitter) -> Iterator[None]:
    """Let exactly one last line tell how the enclosed work ended; pass the exception on."""
    try:
        yield
    except TrainingInterrupted as stopped:
        events.emit(
            InterruptedEvent(
                step=stopped.step,
                reason=stopped.reason,
                path=stopped.path,
                total_time=events.elapsed_seconds(),
            )
        )
        raise
    except Exception as error:
        failure = explain(error)
        events.emit(
            ErrorEvent(
                code=failure.code,
                step=None,
                hint=failure.hint,
                problems=failure.problems,
                message=str(failure),
            )
        )
        raise failure from error


def explain(error: Exception) -> TrainError:
    """Give every exception a code."""
    if isinstance(error, TrainError):
        return error
    if isinstance(error, ImportError):
        return TrainError(ErrorCode.PACKAGE_MISSING, f"Cannot import {error.name}: {error}")
    return TrainError(ErrorCode.INTERNAL_ERROR, f"{type(error).__name__}: {error}")


# === Command line ============================================================

# How long a finished run waits for a host that does not read, and a stopped one.
STALL_SECONDS = 300.0
STOPPED_STALL_SECONDS = 6.0
MIRROR_SECONDS = 2.0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a LoRA for Stable Diffusion; events go to stdout as JSON lines.",
        epilog="Everything else is in the config; see config_schema.json and README.md.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="PATH", help="the JSON config, or - for standard input")
    add("--validate-only", action="store_true", help="check everything, train and write nothing")
    add(
        "--set",
        metavar="KEY=JSON",
        action="append",
        default=[],
        type=parse_override,
        help="override one config value (repeatable); what is not JSON is a string",
    )
    add("--fresh", action="store_true", help="set an earlier run in output_path aside, start anew")
    add("--debug", action="store_true", help="show tracebacks and library logs on stderr")
    add("--event-schema", action="store_true", help="print the JSON Schema of all events and exit")
    add("--version", action="version", version=f"train_lora {__version__}, protocol {PROTOCOL}")
    arguments = parser.parse_args(argv)
    if not (arguments.config or arguments.event_schema):
        parser.error("--config is required")
    return arguments


def claim_stdout() -> int | None:
    """Keep standard output for events alone: whoever else writes to it reaches stderr instead."""
    closed = {number for number in (0, 1, 2) if not is_open(number)}
    for _ in closed:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: one of the three
    events = None if 1 in closed else os.dup(1)
    os.dup2(2, 1)
    return events


def is_open(descriptor: int) -> bool:
    """Tell whether a file descriptor is in use."""
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def run(arguments: argparse.Namespace, events: Emitter, stop: StopRequest) -> int:
    """Do what the command line asks and tell how it ended by the exit code."""
    try:
        with reporting(events):
            stop.check()
            config = TrainingConfig.from_json(arguments.config, dict(arguments.set))
            trainer = LoRATrainer(config, events, stop, fresh=arguments.fresh)
            if arguments.validate_only:
                trainer.validate()
            else:
                trainer.train()
    except TrainingInterrupted as stopped:
        return EXIT_CODES[stopped.reason]
    except TrainError:
        if arguments.debug:
            traceback.print_exc()
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; stdout is its own from here on."""
    stop = StopRequest()
    with stop.on_signals():
        arguments = parse_arguments(argv)
        if arguments.event_schema:
            sys.stdout.write(json.dumps(event_schema(), indent=2) + "\n")
            return 0
        events, stdout = Emitter(), claim_stdout()
        if stdout is None:
            stop.request("host_gone")
            return run(arguments, events, stop)
        writer = LineWriter(stdout, lambda _: stop.request("host_gone"))
        events.listeners.append(writer)
        stop.watch(functools.partial(reader_gone, stdout), "host_gone")
        code = run(arguments, events, stop)
        writer.close(functools.partial(worth_waiting, stop, time.monotonic() + STALL_SECONDS))
        return code


def worth_waiting(stop: StopRequest, deadline: float) -> bool:
    """Tell whether a host that does not read its last lines still deserves patience."""
    return time.monotonic() < min(deadline, stop.requested_at + STOPPED_STALL_SECONDS)


def settle_streams() -> None:
    """Flush what libraries wrote; where nobody receives it, end quietly instead of with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        settle_streams()
