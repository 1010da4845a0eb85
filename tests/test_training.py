"""Training: whole runs on tiny models, from the first line to the last file."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Record, Recorder, change_json, check_stream, write_image, write_json
from PIL import Image
from processes import CONTRACT_SECONDS, Ended, program, run_program, started, wait_until
from safetensors.torch import load_file
from tiny_models import FAMILIES, build_tiny, change_weights, write_single_file

import train_lora
from train_lora import CompleteEvent, Emitter, ErrorCode, LoRATrainer, StopRequest, TrainingConfig

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends signals, reads /proc")

QUICK = "sd2"  # the tiny model with the fastest step, where the family does not matter

# Four updates, two checkpoints, a preview on the way and one at the end.
SHORT: Record = {
    "sample_prompts": ["zkb"],
    "trigger_words": ["zkb"],
    "resolution": 256,
    "steps": 4,
    "checkpoint_steps": 2,
    "validation_steps": 3,
    "sample_steps": 1,
    "lora_rank": 2,
    "learning_rate": 0.01,
    "device": "cpu",
}
NO_EXTRAS: Record = {"checkpoint_steps": 10**6, "validation_steps": 10**6}

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Provide a tiny base model of every family."""
    folder = tmp_path_factory.mktemp("bases")
    return {family: build_tiny(family, folder / family) for family in FAMILIES}


def write_workspace(folder: Path, base: Path, images: int = 3, **changes: Any) -> Path:
    """Write a dataset, and a config for a short run on a base model; return the folder."""
    for number in range(images):
        write_image(folder / "data" / f"image{number}.png", (320, 300))
    places = {"dataset_path": folder / "data", "base_model": base, "output_path": folder / "out"}
    places["cache_dir"] = base.parent / "cache"  # what is encoded once serves all tests
    config = SHORT | {key: str(path) for key, path in places.items()} | changes
    kept = {key: value for key, value in config.items() if value is not None}
    write_json(folder / "config.json", kept)
    return folder


@dataclass
class Witness(Recorder):
    """A listener that looks at a file at the moment it is announced."""

    records: list[Record] = field(default_factory=list)
    seen: list[tuple[str, int]] = field(default_factory=list)

    def __call__(self, record: Record) -> None:
        """Keep the record, and open what it speaks of."""
        self.records.append(record)
        if record["type"] == "sample":
            with Image.open(record["image_path"]) as image:
                image.load()
                self.seen.append(("sample", image.width))
        if record["type"] in ("checkpoint", "complete"):
            path = record["path" if record["type"] == "checkpoint" else "final_path"]
            assert load_file(path)
            self.seen.append((record["type"], Path(path).stat().st_size))


@dataclass(frozen=True)
class Trained:
    """A finished run and what it told."""

    folder: Path
    result: CompleteEvent
    events: Recorder

    @property
    def tensors(self) -> Tensors:
        """Return the numbers in the final file."""
        return load_file(self.result.final_path)

    @property
    def history(self) -> list[Record]:
        """Return the rows of loss_history.csv."""
        with (self.folder / "out" / "loss_history.csv").open(newline="") as file:
            return list(csv.DictReader(file))


def train(folder: Path, listener: Recorder | None = None, *, fresh: bool = False) -> Trained:
    """Train in this process, as somebody's own Python program would."""
    events = listener or Recorder()
    config = TrainingConfig.from_json(folder / "config.json")
    result = LoRATrainer(config, Emitter(events), fresh=fresh).train()
    return Trained(folder, result, events)


@pytest.fixture(scope="module", params=[*FAMILIES, "single file"])
def trained(
    request: pytest.FixtureRequest, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """Provide one short run for every kind of base model."""
    folder = tmp_path_factory.mktemp("trained")
    if request.param in bases:
        return train(write_workspace(folder, bases[request.param]), Witness())
    return train(write_file_workspace(folder, bases[QUICK]), Witness())


def write_file_workspace(folder: Path, base: Path) -> Path:
    """Write a workspace whose base model is a single file in the original layout."""
    file = write_single_file(base, folder / "base.safetensors", QUICK)
    return write_workspace(folder, file, model_config_path=str(base))


@pytest.fixture(scope="module")
def quick(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Provide one short run to look at from all sides."""
    return train(write_workspace(tmp_path_factory.mktemp("quick"), bases[QUICK]), Witness())


# --- What a run tells ---


def test_every_line_keeps_the_contract(trained: Trained) -> None:
    """Numbered without gaps, valid, short, and exactly one of them the last."""
    check_stream(b"".join(map(train_lora.encode_line, trained.events.records)))
    assert trained.events.records[-1]["type"] == "complete"


def test_lines_come_in_the_promised_order(trained: Trained) -> None:
    """Facts before the first update; no update after the last line."""
    words = [record.get("topic", record["type"]) for record in trained.events.records]
    assert words[0] == "start"
    first = words.index("progress")
    assert {"device", "model", "dataset", "memory"} <= set(words[1:first])
    assert not {"device", "dataset"} & set(words[first:])
    steps = [r["step"] for r in trained.events.records if r["type"] in ("progress", "checkpoint")]
    assert steps == sorted(steps)


def test_progress_begins_with_the_first_and_ends_with_the_last_step(trained: Trained) -> None:
    """A short run may leave out some in between, but never these."""
    steps = [record["step"] for record in trained.events.of_type("progress")]
    assert (steps[0], steps[-1]) == (1, 4)
    assert len(set(steps)) == len(steps)


def test_percent_reaches_100_in_the_last_line_alone(trained: Trained) -> None:
    """Hosts take 100 for the end."""
    percents = [r["percent"] for r in trained.events.records if "percent" in r]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert max(percents[:-1]) < 100


def test_a_file_is_whole_when_it_is_announced(trained: Trained) -> None:
    """The listener opened each one from within the event."""
    events = trained.events
    assert isinstance(events, Witness)
    sizes = [r["bytes"] for r in events.records if r["type"] in ("checkpoint", "complete")]
    assert [size for kind, size in events.seen if kind != "sample"] == sizes
    assert [size for kind, size in events.seen if kind == "sample"] == [256, 256]
    assert [r["step"] for r in events.of_type("checkpoint")] == [2, 4]
    assert [r["step"] for r in events.of_type("sample")] == [3, 4]


def test_the_last_line_describes_the_final_file(trained: Trained) -> None:
    """Checksum, size and figures are those of the file and the run."""
    last = trained.events.records[-1]
    content = Path(last["final_path"]).read_bytes()
    assert Path(last["final_path"]) == trained.folder / "out" / "lora_final.safetensors"
    assert last["sha256"] == hashlib.sha256(content).hexdigest()
    assert (last["bytes"], last["step"]) == (len(content), 4)
    assert last["final_loss"] == trained.events.of_type("progress")[-1]["loss"]
    # Linux counts pages for each thread and adds them up late: the peak may lack a few of them.
    held = trained.events.of_type("progress")[-1]["memory_bytes"]
    assert last["peak_memory_bytes"] >= 0.99 * held > 0


def test_only_promised_files_are_left(trained: Trained) -> None:
    """One LoRA at the top, no temporary file anywhere."""
    output = trained.folder / "out"
    top = {"checkpoints", "samples", "state", "events.jsonl", ".lock", "loss_history.csv"}
    assert {p.name for p in output.iterdir()} == top | {"loss_curve.png", "lora_final.safetensors"}
    names = [p.name for p in sorted(output.glob("*/*"))]
    assert names == [
        *("lora_step_2.safetensors", "lora_step_4.safetensors"),
        *("step_3.png", "step_4.png", "strip.png"),
        *("complete.json", "step_2", "step_4"),
    ]


def test_the_trainable_numbers_are_counted(trained: Trained) -> None:
    """The count told is the count in the file, without the strengths."""
    told = trained.events.records
    facts = [r["data"] for r in told if r.get("topic") == "model" and r["data"]["precision"]]
    counted = sum(v.numel() for k, v in trained.tensors.items() if not k.endswith(".alpha"))
    assert [(f["trainable_parameters"], f["precision"]) for f in facts] == [(counted, "float32")]


def test_the_history_has_a_row_for_every_step(trained: Trained) -> None:
    """And its mean over a progress line's steps is that line's loss."""
    rows = trained.history
    assert [list(row) for row in rows] == [["step", "loss", "learning_rate", "validation_loss"]] * 4
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert {float(row["learning_rate"]) for row in rows} == {0.01}
    told = 0
    for line in trained.events.of_type("progress"):
        losses = [float(row["loss"]) for row in rows[told : line["step"]]]
        assert line["loss"] == pytest.approx(sum(losses) / len(losses))
        told = line["step"]


def test_the_curve_is_a_picture_with_something_in_it(trained: Trained) -> None:
    """It decodes, and is neither blank nor tiny."""
    with Image.open(trained.folder / "out" / "loss_curve.png") as image:
        colours = image.convert("RGB").getcolors(10**6)
    assert image.width >= 800
    assert colours
    assert len(colours) > 10


def test_the_mirror_holds_the_same_lines(trained: Trained) -> None:
    """From the first to the last."""
    text = (trained.folder / "out" / "events.jsonl").read_text(encoding="ascii")
    assert [json.loads(line) for line in text.splitlines()] == trained.events.records


# --- Figures ---


class Slow(Recorder):
    """A listener that takes its time over pictures and checkpoints."""

    slept = 0.0

    def __call__(self, record: Record) -> None:
        """Keep the record and pause outside the updates."""
        super().__call__(record)
        if record["type"] in ("sample", "checkpoint"):
            time.sleep(0.4)
            self.slept += 0.4


def test_speed_counts_updates_alone(tmp_path: Path, bases: dict[str, Path]) -> None:
    """Neither the first update nor previews and saving are in it."""
    events = Slow()
    train(write_workspace(tmp_path, bases[QUICK], batch_size=2), events)
    first, *_, last = events.of_type("progress")
    assert first["seconds_per_step"] is first["images_per_second"] is first["eta_seconds"] is None
    between = last["elapsed_seconds"] - first["elapsed_seconds"]
    assert 0 < 3 * last["seconds_per_step"] <= between - (events.slept - 2 * 0.4) + 0.01


def test_figures_fit_each_other(tmp_path: Path, bases: dict[str, Path]) -> None:
    """Speed, time left, epoch and percent follow from one another."""
    changes: Record = {"batch_size": 2, "gradient_accumulation_steps": 2, "steps": 6} | NO_EXTRAS
    run = train(write_workspace(tmp_path, bases[QUICK], **changes))
    lines = run.events.of_type("progress")
    for line in lines[1:]:
        assert line["images_per_second"] * line["seconds_per_step"] == pytest.approx(4)
        left = line["seconds_per_step"] * (6 - line["step"])
        assert line["eta_seconds"] == pytest.approx(left)
    assert [line["epoch"] for line in lines] == [line["step"] * 4 // 3 for line in lines]
    assert [line["percent"] for line in lines[:-1]] == [
        100 * line["step"] // 6 for line in lines[:-1]
    ]
    assert lines[-1]["eta_seconds"] == 0
    elapsed = [line["elapsed_seconds"] for line in lines]
    assert elapsed == sorted(elapsed)


# --- What is learned ---


def test_the_same_seed_writes_the_same_bytes_and_overwrites_nothing(
    tmp_path: Path, bases: dict[str, Path], quick: Trained
) -> None:
    """With --fresh the second run sets the first one aside."""
    folder = write_workspace(tmp_path, bases[QUICK])
    shutil.copytree(quick.folder / "out", folder / "out")
    before = {p.name: p.read_bytes() for p in (folder / "out").glob("*.*") if p.is_file()}
    second = train(folder, fresh=True)
    assert second.result.sha256 == quick.result.sha256
    earlier = folder / "out" / "earlier_1"
    (resume,) = [r for r in second.events.of_type("info") if r["topic"] == "resume"]
    assert resume["data"]["set_aside"] == str(earlier)
    del before[".lock"]
    assert {p.name: p.read_bytes() for p in earlier.iterdir() if p.is_file()} == before
    assert (earlier / "state" / "complete.json").is_file()


def test_another_seed_writes_other_bytes(
    tmp_path: Path, bases: dict[str, Path], quick: Trained
) -> None:
    """Not in the header alone: every module has learned something else."""
    other = train(write_workspace(tmp_path, bases[QUICK], seed=1, **NO_EXTRAS)).tensors
    same = [k for k, v in quick.tensors.items() if v.ndim and torch.equal(v, other[k])]
    assert not same


def test_a_single_file_trains_the_same_as_its_folder(
    tmp_path: Path, bases: dict[str, Path], quick: Trained
) -> None:
    """Only the model's name in the header differs."""
    from_file = train(write_file_workspace(tmp_path, bases[QUICK])).tensors
    assert from_file.keys() == quick.tensors.keys()
    assert all(torch.equal(v, from_file[k]) for k, v in quick.tensors.items())


def test_one_image_is_learned(tmp_path: Path) -> None:
    """On a base that is wrong by a constant, 20 updates remove half of the loss."""
    base = build_tiny(QUICK, tmp_path / "base", vae_levels=4)  # many pixels, for a steady loss
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    change_weights(weights, lambda state: state["conv_out.bias"].fill_(1.0))
    folder = write_workspace(tmp_path, base, 1, lora_rank=8, steps=20, **NO_EXTRAS)
    losses = [float(row["loss"]) for row in train(folder).history]
    assert sum(losses[-10:]) / 10 < 0.5 * losses[0]


def copy_base(folder: Path, base: Path) -> Path:
    """Copy a base model, to change it."""
    return Path(shutil.copytree(base, folder / "base"))


COMBINATIONS: dict[str, tuple[str, int, Record]] = {
    "short last window, two encoders": (
        "sdxl",
        2,
        {
            "steps": None,
            "epochs": 2,
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "train_text_encoder": True,
            "text_encoder_learning_rate": 5e-3,
            "lora_dropout": 0.2,
            "flip": True,
            "gradient_checkpointing": True,
        },
    ),
    "batch larger than the dataset": ("sd2", 2, {"batch_size": 4, "flip": True, "steps": 2}),
    "encoder, dropout, schedule": (
        "sd2",
        3,
        {
            "steps": 3,
            "train_text_encoder": True,
            "lora_dropout": 0.5,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 1,
            "sample_prompts": ["a cat", "a dog"],
            "save_precision": "bf16",
        },
    ),
    "one update": ("sd1", 1, {"steps": 1, "save_precision": "fp32", "max_grad_norm": 0}),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_options_work_together(name: str, tmp_path: Path, bases: dict[str, Path]) -> None:
    """The promised number of updates is made, and every module has learned."""
    family, steps, changes = COMBINATIONS[name]
    run = train(write_workspace(tmp_path, bases[family], **changes))
    assert run.result.step == steps == len(run.history)
    ups = {key: value for key, value in run.tensors.items() if ".lora_up" in key}
    assert ups
    assert all(value.isfinite().all() and value.any() for value in ups.values())
    assert any(key.startswith("lora_te") for key in ups) == ("train_text_encoder" in changes)
    assert run.events.codes() == []


# --- Losses that are no numbers ---


@pytest.fixture
def poisoned(tmp_path: Path, bases: dict[str, Path]) -> Path:
    """Provide a workspace in which one image's caption makes every number infinite."""
    base = copy_base(tmp_path, bases[QUICK])
    vocabulary = json.loads((base / "tokenizer" / "vocab.json").read_text("utf-8"))
    name = "text_model.embeddings.token_embedding.weight"
    poison = vocabulary["q</w>"]
    change_weights(
        base / "text_encoder" / "model.safetensors", lambda s: s[name][poison].fill_(math.nan)
    )
    folder = write_workspace(tmp_path, base, 2, steps=6, **NO_EXTRAS)
    (folder / "data" / "image1.txt").write_text("q", encoding="utf-8")
    return folder


def test_an_update_without_finite_loss_is_skipped_and_told(poisoned: Path) -> None:
    """The image is named, the run goes on, and nothing but numbers is saved."""
    run = train(poisoned)
    skipped = [r for r in run.events.of_type("warning") if r["code"] == "update_skipped"]
    assert [r["data"]["images"] for r in skipped] == [["image1.png"]] * 3
    assert all(value.isfinite().all() for value in run.tensors.values())
    assert any(value.any() for key, value in run.tensors.items() if ".lora_up" in key)
    steps = {r["data"]["step"] for r in skipped}
    assert {int(row["step"]) for row in run.history if not row["loss"]} == steps


def test_a_skipped_update_changes_nothing(poisoned: Path) -> None:
    """After ten of them the run ends, with the number of updates made and no LoRA."""
    (poisoned / "data" / "image0.txt").write_text("q", encoding="utf-8")
    change_json(poisoned / "config.json", steps=50, checkpoint_steps=5)
    events = Recorder()
    with pytest.raises(train_lora.TrainError) as failed:
        train(poisoned, events)
    assert failed.value.code is ErrorCode.LOSS_NOT_FINITE
    last = events.records[-1]
    assert (last["type"], last["step"], Path(last["path"]).name) == ("error", 10, "step_10")
    saved = load_file(poisoned / "out" / "checkpoints" / "lora_step_5.safetensors")
    assert not any(value.any() for key, value in saved.items() if ".lora_up" in key)
    assert not (poisoned / "out" / "lora_final.safetensors").exists()


def test_a_run_given_up_at_its_last_update_is_not_complete_when_started_again(
    poisoned: Path,
) -> None:
    """All its updates are made, and nothing was learned."""
    (poisoned / "data" / "image0.txt").write_text("q", encoding="utf-8")
    change_json(poisoned / "config.json", steps=2)
    for _ in range(2):
        with pytest.raises(train_lora.TrainError) as failed:
            train(poisoned)
        assert (failed.value.code, failed.value.step) == (ErrorCode.LOSS_NOT_FINITE, 2)
    assert not (poisoned / "out" / "lora_final.safetensors").exists()


# --- From Python ---


def test_signal_handlers_stay_as_they_are(tmp_path: Path, bases: dict[str, Path]) -> None:
    """They belong to the program that calls."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    during: list[Any] = []

    class Look(Recorder):
        """A listener that looks at the handlers."""

        def __call__(self, record: Record) -> None:
            """Note them."""
            super().__call__(record)
            during.append([signal.getsignal(number) for number in numbers])

    train(write_workspace(tmp_path, bases[QUICK], steps=1), Look())
    assert len(during) > 5
    assert all(handlers == before for handlers in during)


def test_fresh_sets_aside_what_a_plain_start_would_continue(
    tmp_path: Path, bases: dict[str, Path]
) -> None:
    """Also a run that has not trained anything yet."""
    folder = write_workspace(tmp_path, bases[QUICK], steps=1)
    (folder / "out" / "samples").mkdir(parents=True)
    (folder / "out" / "samples" / "step_1.png").write_bytes(b"old")
    (folder / "out" / "notes.txt").write_text("mine", encoding="utf-8")
    train(folder, fresh=True)
    old = folder / "out" / "earlier_1" / "samples" / "step_1.png"
    assert old.read_bytes() == b"old"
    assert (folder / "out" / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_a_long_run_leaks_nothing(tmp_path: Path, bases: dict[str, Path]) -> None:
    """Open files, threads and memory are at the end what they were after the first third."""

    @dataclass
    class Measure(Recorder):
        """A listener that counts at every checkpoint."""

        records: list[Record] = field(default_factory=list)
        counts: list[tuple[int, int, int]] = field(default_factory=list)

        def __call__(self, record: Record) -> None:
            """Count what the system lends to this process."""
            if record["type"] == "checkpoint":
                pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
                descriptors = len(list(Path("/proc/self/fd").iterdir()))
                self.counts.append((descriptors, threading.active_count(), pages * 4096))

    measure = Measure()
    changes = {"steps": 24, "checkpoint_steps": 2, "validation_steps": 8}
    train(write_workspace(tmp_path, bases[QUICK], **changes), measure)
    early, late = measure.counts[4], measure.counts[-1]
    assert len(measure.counts) == 12
    assert late[:2] == early[:2]
    assert late[2] - early[2] < 16 * 2**20


def test_a_finished_run_gives_everything_back(
    tmp_path: Path, bases: dict[str, Path], quick: Trained
) -> None:
    """A program may train one LoRA after the other."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    threads = threading.active_count()
    train(write_workspace(tmp_path, bases[QUICK], steps=1, **NO_EXTRAS))
    wait_until(lambda: threading.active_count() <= threads)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- Stopping ---


def at(word: str, number: int = 1) -> Callable[[Record], bool]:
    """Recognise an event by its type or topic, the given time it comes."""
    count = iter(range(1, 10**6))
    return lambda record: word in (record["type"], record.get("topic")) and next(count) == number


@dataclass
class Sender(Recorder):
    """A listener that sends a signal at a chosen event."""

    number: signal.Signals
    chosen: Callable[[Record], bool]
    records: list[Record] = field(default_factory=list)
    sent_at: float = 0.0

    def __call__(self, record: Record) -> None:
        """Keep the record, and send the signal when it is the chosen one."""
        self.records.append(record)
        if self.chosen(record):
            self.sent_at = time.monotonic()
            signal.raise_signal(self.number)


def interrupt(folder: Path, sender: Sender) -> StopRequest:
    """Train until the sender's signal ends it, in time."""
    config, stop = TrainingConfig.from_json(folder / "config.json"), StopRequest()
    with stop.on_signals(), pytest.raises(train_lora.TrainingInterrupted):
        LoRATrainer(config, Emitter(sender), stop).train()
    assert time.monotonic() - sender.sent_at < CONTRACT_SECONDS
    check_stream(b"".join(map(train_lora.encode_line, sender.records)))
    return stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_before_the_first_update_leaves_no_lora(
    number: signal.Signals, tmp_path: Path, bases: dict[str, Path]
) -> None:
    """While images are encoded there is nothing to save."""
    sender = Sender(number, at("device"))
    interrupt(write_workspace(tmp_path, bases[QUICK]), sender)
    last = sender.records[-1]
    assert (last["type"], last["reason"], last["step"]) == ("interrupted", number.name, 0)
    assert last["path"] is None
    assert not sender.of_type("memory")
    assert not list((tmp_path / "out").rglob("*.safetensors"))


MOMENTS = {
    "training": (at("progress"), {"steps": 1000, **NO_EXTRAS}, 1),
    "preview": (at("progress"), {"steps": 1000, "validation_steps": 1, "sample_steps": 200}, 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stop_keeps_what_was_learned(moment: str, tmp_path: Path, bases: dict[str, Path]) -> None:
    """A usable checkpoint and the history are there before the last line."""
    chosen, changes, step = MOMENTS[moment]
    sender = Sender(signal.SIGTERM, chosen)
    interrupt(write_workspace(tmp_path, bases[QUICK], **changes), sender)
    *_, checkpoint, last = sender.records
    assert (last["type"], last["reason"], last["step"]) == ("interrupted", "SIGTERM", step)
    assert (checkpoint["type"], checkpoint["reason"]) == ("checkpoint", "interrupted")
    saved = load_file(checkpoint["path"])
    assert any(value.any() for key, value in saved.items() if ".lora_up" in key)
    rows = (tmp_path / "out" / "loss_history.csv").read_text(encoding="ascii").splitlines()
    assert len(rows) == 1 + step
    assert (tmp_path / "out" / "loss_curve.png").is_file()
    assert not sender.of_type("sample")


def test_a_stop_just_after_a_checkpoint_does_not_announce_it_twice(
    tmp_path: Path, bases: dict[str, Path]
) -> None:
    """Its file is there; the history is written as before any stop."""
    sender = Sender(signal.SIGTERM, at("checkpoint"))
    changes = {"steps": 1000, **NO_EXTRAS, "checkpoint_steps": 2}
    interrupt(write_workspace(tmp_path, bases[QUICK], **changes), sender)
    told = [(record["step"], record["reason"]) for record in sender.of_type("checkpoint")]
    assert told == [(2, "periodic")]
    assert Path(sender.records[-1]["path"]).name == "step_2"
    rows = (tmp_path / "out" / "loss_history.csv").read_text(encoding="ascii").splitlines()
    assert len(rows) == 3


def test_an_interrupted_checkpoint_equals_a_periodic_one(
    tmp_path: Path, bases: dict[str, Path], quick: Trained
) -> None:
    """A stop in the middle of an update takes nothing of it along."""
    sender = Sender(signal.SIGTERM, at("sample"))
    interrupt(write_workspace(tmp_path, bases[QUICK], checkpoint_steps=10, steps=4), sender)
    assert sender.records[-1]["step"] == 3
    folder = write_workspace(tmp_path / "whole", bases[QUICK], steps=3, checkpoint_steps=3)
    whole = load_file(train(folder).folder / "out" / "checkpoints" / "lora_step_3.safetensors")
    saved = load_file(tmp_path / "out" / "checkpoints" / "lora_step_3.safetensors")
    assert all(torch.equal(value, saved[key]) for key, value in whole.items())


# --- What is asked of a living run ---


@dataclass
class Asking(Recorder):
    """A listener that writes request.json once a moment has come."""

    out: Path
    content: bytes
    moment: Callable[[Record], bool]
    records: list[Record] = field(default_factory=list)

    def __call__(self, record: Record) -> None:
        """Keep the record, and ask."""
        self.records.append(record)
        if self.moment(record):
            self.ask()

    def ask(self) -> None:
        """Put the file there whole, as hosts do."""
        (self.out / "asking").write_bytes(self.content)
        (self.out / "asking").replace(self.out / "request.json")


def asking(folder: Path, asked: Record, moment: Callable[[Record], bool]) -> Asking:
    """Ask for something at a moment of a run in a folder."""
    return Asking(folder / "out", json.dumps(asked).encode(), moment)


def told(heard: Recorder) -> list[tuple[str, int, str]]:
    """List pictures and checkpoints with their prompts and reasons."""
    keys = {"sample": "prompt", "checkpoint": "reason"}
    return [(r["type"], r["step"], r[keys[r["type"]]]) for r in heard.records if r["type"] in keys]


ALL_AT_ONCE: Record = {"preview": True, "checkpoint": True, "sample_prompts": ["a zkb", "a cat"]}


@pytest.mark.parametrize("text_encoder", [False, True])
def test_a_living_run_draws_saves_and_changes_prompts_on_demand(
    text_encoder: bool, tmp_path: Path, bases: dict[str, Path]
) -> None:
    """At the next update, also of prompts it never read; what it learns stays the same."""
    changes: Record = {"train_text_encoder": text_encoder, **NO_EXTRAS}
    plain = train(write_workspace(tmp_path / "plain", bases[QUICK], **changes))
    folder = write_workspace(tmp_path / "asked", bases[QUICK], **changes)
    heard = asking(folder, ALL_AT_ONCE, at("progress"))
    done = train(folder, heard)
    check_stream(b"".join(map(train_lora.encode_line, heard.records)))
    both = [("sample", 1, "a zkb"), ("sample", 1, "a cat")]
    last = [("sample", 4, "a zkb"), ("sample", 4, "a cat")]
    assert told(heard) == [("checkpoint", 1, "requested"), *both, *last]
    (answer,) = [r["data"] for r in heard.of_type("info") if r["topic"] == "request"]
    assert answer == {"step": 1, "asked": ALL_AT_ONCE}
    assert not (folder / "out" / "request.json").exists()
    assert load_file(folder / "out" / "checkpoints" / "lora_step_1.safetensors")
    assert done.result.sha256 == plain.result.sha256


def test_what_is_asked_for_and_due_anyway_is_made_once(
    tmp_path: Path, bases: dict[str, Path]
) -> None:
    """One preview and one checkpoint of a step, told in one line each."""
    changes: Record = {"steps": 2, "validation_steps": 1, "checkpoint_steps": 1}
    folder = write_workspace(tmp_path, bases[QUICK], **changes)
    heard = asking(folder, {"preview": True, "checkpoint": True}, at("progress"))
    train(folder, heard)
    assert told(heard) == [
        *(("checkpoint", 1, "requested"), ("sample", 1, "zkb")),
        *(("checkpoint", 2, "periodic"), ("sample", 2, "zkb")),
    ]


def test_an_empty_list_of_prompts_means_those_of_the_config(
    tmp_path: Path, bases: dict[str, Path]
) -> None:
    """As in the config, where it means those of the program."""
    changes: Record = {"steps": 2, "validation_steps": 1, "sample_prompts": ["zkb"]}
    folder = write_workspace(tmp_path, bases[QUICK], **changes)
    heard = asking(folder, {"sample_prompts": ["a dog"]}, at("progress"))
    heard.moment = lambda record: record["type"] in ("progress", "sample")

    def ask_otherwise() -> None:
        Asking.ask(heard)
        heard.content = b'{"sample_prompts": []}'

    heard.ask = ask_otherwise  # type: ignore[method-assign]
    train(folder, heard)
    assert told(heard)[0] == ("sample", 1, "a dog")
    assert told(heard)[-1] == ("sample", 2, "zkb")


def test_a_request_before_the_first_update_is_answered_after_it(
    tmp_path: Path, bases: dict[str, Path]
) -> None:
    """There is nothing to save before; it is not lost."""
    folder = write_workspace(tmp_path, bases[QUICK], **NO_EXTRAS)
    heard = asking(folder, {"checkpoint": True}, at("start"))
    train(folder, heard)
    assert told(heard)[0] == ("checkpoint", 1, "requested")


NO_REQUESTS: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{", "Expecting"),
    "no text": (b"\xff\xfe", "UTF-8"),
    "no object": (b"[1]", "object"),
    "NaN": (b'{"preview": NaN}', "finite"),
    "unknown key": (b'{"preview": true, "pause": true}', "pause"),
    "wrong type": (b'{"checkpoint": "yes"}', "true or false"),
    "one prompt": (b'{"sample_prompts": "zkb"}', "a list"),
    "empty prompt": (b'{"sample_prompts": [" "]}', "sample_prompts[0]"),
    "too many prompts": (json.dumps({"sample_prompts": ["a"] * 17}).encode(), "at most 16 texts"),
    "10 MB": (b'{"preview": true}' + b" " * 10**7, "at most 1 MiB"),
    "brackets": (b"[" * 10**6, "recursion"),
}


@pytest.mark.parametrize("name", NO_REQUESTS)
def test_a_request_without_sense_is_refused_and_removed(
    name: str, tmp_path: Path, bases: dict[str, Path], quick: Trained
) -> None:
    """A warning says why; the run goes on to the same bytes."""
    content, reason = NO_REQUESTS[name]
    folder = write_workspace(tmp_path, bases[QUICK])
    heard = Asking(folder / "out", content, at("progress"))
    done = train(folder, heard)
    (warned,) = [w for w in heard.of_type("warning") if w["code"] == "request_refused"]
    assert reason in warned["data"]["reason"]
    assert len(warned["message"]) < 300
    assert not (folder / "out" / "request.json").exists()
    assert not [r for r in heard.of_type("info") if r["topic"] == "request"]
    assert done.result.sha256 == quick.result.sha256


def make_pipe(path: Path) -> None:
    """Make a pipe that nobody writes to."""
    os.mkfifo(path)


def make_link(path: Path) -> None:
    """Make a link to a request that lies elsewhere."""
    elsewhere = path.parent.parent / "elsewhere.json"
    elsewhere.write_text('{"preview": true}', encoding="utf-8")
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("make", [make_pipe, make_link, Path.mkdir])
def test_what_only_has_the_name_of_a_request_is_refused_once(
    make: Callable[[Path], object], tmp_path: Path, bases: dict[str, Path]
) -> None:
    """It is not waited for and not followed; a folder, which stays, is not told of every update."""
    folder = write_workspace(tmp_path, bases[QUICK], **NO_EXTRAS)
    heard = asking(folder, {}, at("progress"))
    path = folder / "out" / "request.json"
    heard.ask = lambda: make(path)  # type: ignore[method-assign, assignment]
    train(folder, heard)
    assert heard.codes().count("request_refused") == 1
    assert path.is_dir() is (make is Path.mkdir)
    assert [kind for kind, step, _ in told(heard) if step == 1] == []
    if make is make_link:
        assert (folder / "elsewhere.json").is_file()


@pytest.mark.parametrize(
    ("number", "awaited", "code"),
    [(signal.SIGTERM, "start", 143), (signal.SIGINT, "progress", 130)],
    ids=["importing", "training"],
)
def test_a_signal_ends_the_program_in_time(
    number: signal.Signals, awaited: str, code: int, tmp_path: Path, bases: dict[str, Path]
) -> None:
    """With one last line and the exit code of the signal."""
    write_workspace(tmp_path, bases[QUICK], steps=1000, **NO_EXTRAS)
    with started(*program(), cwd=tmp_path, stderr=subprocess.DEVNULL) as child:
        while child.line()["type"] != awaited:
            pass
        child.process.send_signal(number)
        assert child.end() == code
    assert (child.last["type"], child.last["reason"]) == ("interrupted", number.name)
    assert (child.last["step"] > 0) == (awaited == "progress")


# --- The streams of the program ---

NOISY = """
import os
import torch

print("noise")

class Lion(torch.optim.SGD):
    def __init__(self, params, weight_decay):
        super().__init__(params, lr=0.1, weight_decay=weight_decay)

    def step(self, closure=None):
        print("noise")
        os.write(1, b"noise")
        os.system("echo noise")
        return super().step(closure)
"""


@pytest.fixture(scope="module")
def noisy(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """Provide a run of the program with a package that prints in every way there is."""
    folder = tmp_path_factory.mktemp("noisy")
    (folder / "lion_pytorch.py").write_text(NOISY, encoding="utf-8")
    write_workspace(folder, bases["sdxl"], optimizer="lion", train_text_encoder=True)
    environment: dict[str, Any] = {
        "PYTHONPATH": str(folder),
        "HF_TOKEN": TOKEN,
        "OMP_NUM_THREADS": "1",
    }
    command = ("--config", "config.json", "--debug")
    return folder, run_program(*command, cwd=folder, cold=True, **environment)


TOKEN = "hf_ThisIsNobodysToken"


def test_stdout_carries_events_alone(noisy: tuple[Path, Ended]) -> None:
    """What libraries print ends on stderr, also from C code and children, also with --debug."""
    _, ended = noisy
    assert (ended.code, ended.last["type"]) == (0, "complete")
    assert ended.stderr.count("noise") == 1 + 3 * 4
    assert b"noise" not in ended.stdout.replace(b"denoiser", b"").replace(b"noise_offset", b"")


def test_there_is_no_bar_where_nobody_looks(noisy: tuple[Path, Ended]) -> None:
    """A log file is not drawn into."""
    _, ended = noisy
    assert "█" not in ended.stderr
    assert "\x1b[" not in ended.stderr


def test_the_token_appears_nowhere(noisy: tuple[Path, Ended]) -> None:
    """Not in an event, not on stderr, not in a file."""
    folder, ended = noisy
    files = [path for path in (folder / "out").rglob("*") if path.is_file()]
    everything = [ended.stdout, ended.stderr.encode(), *(path.read_bytes() for path in files)]
    assert len(everything) > 8
    assert not any(TOKEN.encode() in content for content in everything)


def test_a_terminal_shows_a_bar_and_is_not_controlled(
    tmp_path: Path, bases: dict[str, Path]
) -> None:
    """A file name cannot clear the screen."""
    write_workspace(tmp_path, bases[QUICK])
    (tmp_path / "data" / "evil\x1b[2J\x9b.png").write_text("no image", encoding="utf-8")
    code, shown = run_on_terminal(tmp_path)
    assert code == 0
    assert "4/4" in shown
    assert "1/4" in shown
    assert "loss" in shown
    assert "evil?[2J?.png" in shown
    assert set(shown.split("\x1b")[1:]) == {
        part for part in shown.split("\x1b") if part[:2] == "[K"
    }


def run_on_terminal(folder: Path) -> tuple[int, str]:
    """Run the program with a terminal as its stderr and return what was shown there."""
    ours, theirs = os.openpty()
    with started(*program(), cwd=folder, stderr=theirs) as child:
        os.close(theirs)
        shown = b"".join(read_terminal(ours))
        code = child.end(seconds=60)
    os.close(ours)
    assert child.last["type"] == "complete"
    return code, shown.decode()


def read_terminal(descriptor: int) -> Iterator[bytes]:
    """Read until nobody holds the other end, which a terminal reports as an error."""
    with contextlib.suppress(OSError):
        while chunk := os.read(descriptor, 4096):
            yield chunk


# --- The network ---


def test_a_cached_model_never_asks_the_network(
    tmp_path: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither when it is loaded nor when text encoders are saved."""
    cache = tmp_path / "cache" / "models--some--tiny"
    shutil.copytree(bases["sdxl"], cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc", encoding="ascii")
    asked: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise OSError("no network")

    for owner, name in ((socket.socket, "connect"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    changes: Record = {"steps": 2, "train_text_encoder": True, "cache_dir": None}
    folder = write_workspace(tmp_path, Path("some/tiny"), **changes)
    run = train(folder)
    assert not asked
    assert run.events.of_type("checkpoint")
