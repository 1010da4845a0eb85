"""Resuming: a run stopped at any point and started again ends as one that was never stopped."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Install, Record, Recorder, change_json, check_stream, write_image, write_json
from processes import program, started
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES
from tiny_runs import tiny_base

import train_lora
from train_lora import (
    Earlier,
    Emitter,
    ErrorCode,
    LoRATrainer,
    StopRequest,
    TrainError,
    TrainingConfig,
    TrainingInterrupted,
    read_state,
    state_folders,
)

# Five images and three to an update: no epoch ends with an update. Chance is at work in the order,
# the noise, the flips and the dropout; the learning rate changes with every step.
CHANCY: Record = {
    "trigger_words": ["zkb"],
    "resolution": 256,
    "steps": 12,
    "gradient_accumulation_steps": 3,
    "lora_rank": 2,
    "lora_alpha": 2,
    "lora_dropout": 0.2,
    "flip": True,
    "learning_rate": 0.01,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 3,
    "checkpoint_steps": 10**6,
    "validation_steps": 10**6,
    "sample_steps": 1,
    "sample_prompts": ["zkb"],
    "device": "cpu",
}
LORA, TABLE = "lora_final.safetensors", "loss_history.csv"


@dataclass(frozen=True)
class Place:
    """A folder with a dataset, a config, and whatever earlier starts left in `out`."""

    folder: Path

    @property
    def out(self) -> Path:
        """Return the output folder."""
        return self.folder / "out"

    @property
    def config(self) -> Record:
        """Return what stands in config.json."""
        config: Record = json.loads((self.folder / "config.json").read_text("utf-8"))
        return config

    def change(self, **changes: Any) -> None:
        """Write some knobs anew; None removes one."""
        config = self.config | changes
        kept = {key: value for key, value in config.items() if value is not None}
        write_json(self.folder / "config.json", kept)

    def copy(self, target: Path) -> Place:
        """Copy everything to another folder, with the times of the files."""
        shutil.copytree(self.folder, target)
        place = Place(target)
        place.change(dataset_path=str(target / "data"), output_path=str(target / "out"))
        return place

    def results(self) -> tuple[bytes, ...]:
        """Return the bytes that have to be the same however often a run was stopped."""
        words = sorted(self.out.glob("embeddings/*_embedding.safetensors"))
        return tuple(path.read_bytes() for path in (self.out / LORA, self.out / TABLE, *words))

    def states(self) -> list[str]:
        """Name the states on disk, the newest first."""
        return [folder.name for folder in state_folders(self.out)]

    def tree(self) -> dict[str, tuple[int, bytes]]:
        """Return every path in the output folder with its time and content."""
        return {
            str(path.relative_to(self.out)): (
                path.stat().st_mtime_ns,
                path.read_bytes() if path.is_file() else b"",
            )
            for path in [self.out, *self.out.rglob("*")]
        }

    def events(self) -> list[Record]:
        """Return the lines of events.jsonl."""
        lines = (self.out / "events.jsonl").read_text(encoding="ascii").splitlines()
        return [json.loads(line) for line in lines]


def write_place(folder: Path, base: Path, **changes: Any) -> Place:
    """Write five images of different shapes, two captions, and a config."""
    for number in range(5):
        write_image(folder / "data" / f"{number}.png", (256 + 24 * number, 256))
    (folder / "data" / "1.txt").write_text("a photo of zkb, a cat", encoding="utf-8")
    places = {"dataset_path": folder / "data", "base_model": base, "output_path": folder / "out"}
    places["cache_dir"] = base.parent / "cache"  # what is encoded once serves all tests
    write_json(folder / "config.json", CHANCY | {k: str(p) for k, p in places.items()} | changes)
    return Place(folder)


class StopAfter(StopRequest):
    """A request that comes after an update, and after some batches of the next one."""

    def __init__(self, step: int | None, batches: int = 0) -> None:
        """Take the moment; without one, nobody ever asks."""
        super().__init__()
        self.step, self.batches = step, batches
        self.trainer: LoRATrainer | None = None

    def check(self) -> None:
        """Ask for a stop when the moment has come, and look as ever."""
        run = self.trainer
        training = run and run.phase == "training"
        if run and training and self.step is not None and run.state.step >= self.step:
            self.batches -= 1
            if self.batches < 0:
                self.request("SIGTERM")
        super().check()


def start(
    place: Place,
    after: int | None = None,
    batches: int = 0,
    listener: Recorder | None = None,
    *,
    fresh: bool = False,
) -> Recorder:
    """Start a run and let it end, or stop it after an update; return what it told."""
    heard, stop = listener or Recorder(), StopAfter(after, batches)
    config = TrainingConfig.from_json(place.folder / "config.json")
    stop.trainer = LoRATrainer(config, Emitter(heard), stop, fresh=fresh)
    with pytest.raises(TrainingInterrupted) if after is not None else contextlib.nullcontext():
        stop.trainer.train()
    check_stream(b"".join(map(train_lora.encode_line, heard.records)))
    return heard


class Glance(Recorder):
    """A listener that asks for a stop before any weight is loaded."""

    def __init__(self, stop: StopRequest) -> None:
        """Take the request to make."""
        super().__init__()
        self.stop = stop

    def __call__(self, record: Record) -> None:
        """Keep the record, and stop once the device is known."""
        super().__call__(record)
        if record.get("topic") == "device":
            self.stop.request("SIGTERM")


def glance(place: Place, *, fresh: bool = False) -> Recorder:
    """Start a run that is accepted and stopped before any weight is loaded."""
    stop = StopRequest()
    heard = Glance(stop)
    config = TrainingConfig.from_json(place.folder / "config.json")
    with pytest.raises(TrainingInterrupted):
        LoRATrainer(config, Emitter(heard), stop, fresh=fresh).train()
    return heard


def phases_of(heard: Recorder) -> list[str]:
    """Name the phases of which the memory was told; all but planning load something."""
    told = [record["data"] for record in heard.of_type("info") if record["topic"] == "memory"]
    return [data["phase"] for data in told]


def refused(place: Place, code: ErrorCode, listener: Recorder | None = None) -> TrainError:
    """Start a run that is refused before any weight is loaded; return why."""
    heard = listener or Recorder()
    config = TrainingConfig.from_json(place.folder / "config.json")
    with pytest.raises(TrainError) as failed:
        LoRATrainer(config, Emitter(heard)).train()
    assert failed.value.code is code
    if heard.records[0]["type"] == "start":
        check_stream(b"".join(map(train_lora.encode_line, heard.records)))
    assert not heard.of_type("progress")
    assert phases_of(heard) in ([], ["planning"])  # nothing was loaded
    return failed.value


class Copyist(Recorder):
    """A listener that keeps the output folder as a killed process would leave it."""

    def __init__(self, place: Place, target: Path) -> None:
        """Take the run to copy from and the folder to copy to."""
        super().__init__()
        self.place, self.target = place, target

    def __call__(self, record: Record) -> None:
        """Copy when a checkpoint is announced."""
        super().__call__(record)
        if record["type"] == "checkpoint":
            self.place.copy(self.target / f"step_{record['step']}")


@pytest.fixture(scope="session")
def base(ground: Path) -> Path:
    """Provide the base model with the fastest step."""
    return tiny_base("sd2", ground / "bases")


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Provide a run that was never stopped."""
    place = write_place(tmp_path_factory.mktemp("whole"), base)
    start(place)
    return place


@pytest.fixture(scope="module")
def halfway(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Provide a run stopped after the sixth of twelve updates, with states of 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("halfway")
    place = write_place(folder / "place", base, checkpoint_steps=2)
    start(place, after=6, listener=Copyist(place, folder))
    assert place.states() == ["step_6", "step_4", "step_2"]
    return place


@pytest.fixture
def half(halfway: Place, tmp_path: Path) -> Place:
    """Provide a copy of the halfway run to go on with."""
    return halfway.copy(tmp_path / "half")


@pytest.fixture
def done(whole: Place, tmp_path: Path) -> Place:
    """Provide a copy of the whole run to start again."""
    return whole.copy(tmp_path / "done")


# --- The same bytes ---


def test_a_run_stopped_in_its_last_preview_ends_like_one_that_was_not(
    whole: Place, base: Path, tmp_path: Path
) -> None:
    """All updates are made by then, and what is left is to write the files."""
    place = write_place(tmp_path, base)
    assert start(place, after=12).records[-1]["step"] == 12
    again = start(place)
    assert again.records[0]["resumed_step"] == 12
    assert not again.of_type("progress")
    assert place.results() == whole.results()


def test_captions_worded_anew_are_told_alike_over_a_restart(
    whole: Place, base: Path, tmp_path: Path
) -> None:
    """Orders, lines, what is left out and how often images count depend on the step alone."""
    told: Record = {"shuffle_tags": True, "tag_dropout": 0.3, "keep_tokens": 1}
    told |= {"caption_lines": "random", "folder_repeats": True, "max_tokens": 150, "clip_skip": 2}
    told |= {"caption_dropout": 0.2}
    runs = []
    for name, stops in (("at once", []), ("in parts", [3, 8])):
        place = write_place(tmp_path / name, base, **told)
        data = place.folder / "data"
        (data / "0.txt").write_text("cat, red, big\ndog, blue, small, old", encoding="utf-8")
        write_json(data / "repeats.json", {".": 2})
        write_image(data / "3_more" / "5.png", (256, 256))
        for step in stops:
            start(place, step, batches=1)
        start(place)
        runs.append(place.results())
    assert runs[0] == runs[1] != whole.results()


# The last update has no next one in which to stop.
ANYWHERE = [(step, batches) for step in range(1, 12) for batches in range(3)] + [(12, 0)]


@pytest.mark.slow
@pytest.mark.parametrize(("step", "batches"), ANYWHERE)
def test_a_run_stopped_anywhere_ends_like_one_that_was_not(
    step: int, batches: int, whole: Place, base: Path, tmp_path: Path
) -> None:
    """After every update, and after every batch of the next one."""
    place = write_place(tmp_path, base)
    start(place, step, batches)
    start(place)
    assert place.results() == whole.results()


SEGMENTS = {2: [7], 3: [2, 7], 10: [1, 2, 3, 5, 6, 8, 9, 10, 11]}


@pytest.mark.slow
@pytest.mark.parametrize("count", SEGMENTS)
def test_a_run_in_segments_ends_like_one_that_was_not_stopped(
    count: int, whole: Place, base: Path, tmp_path: Path
) -> None:
    """However many there are, and however short."""
    place = write_place(tmp_path, base)
    for step in SEGMENTS[count]:
        start(place, step)
    start(place)
    assert place.results() == whole.results()


def forget_buckets(state: Path) -> None:
    """Take from a manifest what a version without buckets did not write."""
    record = train_lora.unseal(state / "manifest.json")
    for key in ("buckets", "bucket_step", "bucket_upscale"):
        del record["identity"][key]
    (state / "manifest.json").write_bytes(train_lora.seal(record))


def test_a_run_of_a_version_without_buckets_goes_on_with_squares_alone(
    base: Path, tmp_path: Path
) -> None:
    """As it began, to the same bytes; in their own shapes, its pictures would be others."""
    whole, place = (write_place(tmp_path / name, base, buckets=False) for name in ("one", "two"))
    start(whole)
    start(place, after=5)
    forget_buckets(place.out / "state" / "step_5")
    place.change(buckets=None)
    (problem,) = refused(place, ErrorCode.RUN_CHANGED).problems
    assert (problem.path, problem.expected, problem.found) == ("buckets", "False", "True")
    place.change(buckets=False)
    start(place)
    assert place.results() == whole.results()


def test_a_run_of_a_version_without_buckets_goes_on_where_all_are_squares(
    base: Path, tmp_path: Path
) -> None:
    """With the defaults of today."""
    whole, place = (write_place(tmp_path / name, base) for name in ("one", "two"))
    for each in (whole, place):
        for picture in (each.folder / "data").glob("*.png"):
            write_image(picture, (256 + int(picture.stem),) * 2)
    start(whole)
    start(place, after=5)
    forget_buckets(place.out / "state" / "step_5")
    assert start(place).records[0]["resumed_step"] == 5
    assert place.results() == whole.results()


def regularize(place: Place) -> None:
    """Add images of other things, which are a third of all that is trained on."""
    for number in range(2):
        path = write_image(place.folder / "others" / f"{number}.png", (300, 256 + number))
        path.with_suffix(".txt").write_text("a dog", encoding="utf-8")
    others = str(place.folder / "others")
    place.change(regularization_path=others, regularization_share=0.34, prior_weight=0.5)


def test_images_for_regularization_keep_their_turns_over_a_restart(
    whole: Place, base: Path, tmp_path: Path
) -> None:
    """They are trained on as well, and which comes when depends on the step alone."""
    runs = []
    for name, stops in (("at once", []), ("in parts", [5])):
        place = write_place(tmp_path / name, base)
        regularize(place)
        for step in stops:
            start(place, step)
        start(place)
        runs.append(place.results())
    assert runs[0] == runs[1] != whole.results()


TAUGHT: Record = {"loss": "huber", "huber_delta": 0.2, "snr_gamma": 5.0, "noise_offset": 0.1}
TAUGHT |= {"timestep_range": [100, 900], "timestep_sampling": "sigmoid"}
VARIATIONS: dict[str, Record] = {
    "another objective": TAUGHT,
    "text encoders learn": {"train_text_encoder": True, "text_encoder_learning_rate": 0.003},
    "a word beside a LoRA": {"embedding_tokens": 2, "train_text_encoder": True},
    "full precision file": {"save_precision": "fp32"},
    "half precision": {"mixed_precision": "bf16", "lr_scheduler": "linear"},
    "recomputed activations": {"gradient_checkpointing": True},
    "epochs": {"steps": None, "epochs": 3, "gradient_accumulation_steps": 2, "batch_size": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIATIONS)
def test_resuming_is_exact_with_other_knobs(name: str, base: Path, tmp_path: Path) -> None:
    """Whatever learns and however it is rounded, the state holds all of it."""
    changes = {"steps": 4} | VARIATIONS[name]
    changes = {key: value for key, value in changes.items() if value is not None}
    plain, parted = (write_place(tmp_path / part, base, **changes) for part in ("a", "b"))
    if "epochs" in changes:
        for place in (plain, parted):
            place.change(steps=None)
    start(plain)
    start(parted, after=2, batches=1)
    start(parted)
    assert parted.results() == plain.results()


@pytest.mark.parametrize(
    "family", ["sdxl", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "sdxl")]
)
def test_resuming_is_exact_for_every_family(family: str, ground: Path, tmp_path: Path) -> None:
    """Also where two text encoders learn."""
    base = tiny_base(family, ground / "bases")
    changes = {"steps": 2, "train_text_encoder": True}
    plain, parted = (write_place(tmp_path / part, base, **changes) for part in ("a", "b"))
    start(plain)
    start(parted, after=1, batches=2)
    start(parted)
    assert parted.results() == plain.results()


def test_a_word_is_learned_exactly_over_a_stop(ground: Path, tmp_path: Path) -> None:
    """Its vectors and their moments, and the checkpoint on the way, which a stop writes too."""
    base = tiny_base("sdxl", ground / "bases")
    changes = {"steps": 2, "embedding_tokens": 2, "train_lora": False, "checkpoint_steps": 1}
    plain, parted = (write_place(tmp_path / part, base, **changes) for part in ("a", "b"))
    start(plain)
    start(parted, after=1, batches=1)
    heard = start(parted)
    assert [line["step"] for line in heard.of_type("checkpoint")] == [2]
    found = [
        {path.name: path.read_bytes() for path in place.out.glob("embeddings/*")}
        for place in (plain, parted)
    ]
    assert found[0].keys() == {
        "embedding_step_1.safetensors",
        "embedding_step_2.safetensors",
        "out_embedding.safetensors",
    }
    assert found[0] == found[1]
    assert (plain.out / TABLE).read_bytes() == (parted.out / TABLE).read_bytes()


def test_previews_and_cadences_leave_no_trace_in_what_is_learned(half: Place, whole: Place) -> None:
    """Half the run kept every second state and drew nothing; the rest does otherwise."""
    half.change(validation_steps=4, checkpoint_steps=5, sample_prompts=["zkb, a dog"])
    heard = start(half)
    assert [r["step"] for r in heard.of_type("sample")] == [8, 12]
    assert [r["step"] for r in heard.of_type("checkpoint")] == [10]
    assert half.results() == whole.results()


def test_a_killed_run_goes_on_from_its_newest_checkpoint(
    halfway: Place, whole: Place, tmp_path: Path
) -> None:
    """The updates since then are made again, and come to the same."""
    killed = Place(halfway.folder.parent / "step_4").copy(tmp_path / "killed")
    with (killed.out / "events.jsonl").open("a") as mirror:
        mirror.write('{"type": "progress", "st')  # torn by the kill
    again = start(killed)
    assert again.records[0]["resumed_step"] == 4
    assert killed.results() == whole.results()
    lines = (killed.out / "events.jsonl").read_text(encoding="ascii").splitlines()
    assert [json.loads(line) for line in lines[-len(again.records) :]] == again.records


def test_the_program_goes_on_where_a_python_program_stopped(half: Place, whole: Place) -> None:
    """Both ways to start a run share states, events and results."""
    environment = {"OMP_NUM_THREADS": "1"}
    with started(
        *program(), cwd=half.folder, environment=environment, stderr=subprocess.DEVNULL
    ) as child:
        assert child.line()["resumed_step"] == 6
        assert child.end(seconds=60) == 0
    assert child.last["type"] == "complete"
    assert half.results() == whole.results()


# --- What is told ---


@pytest.fixture(scope="module")
def parted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, list[Recorder]]:
    """Provide a run in three segments and what each of them told."""
    place = write_place(tmp_path_factory.mktemp("parted"), base, checkpoint_steps=4)
    return place, [start(place, step, batches=2) for step in (3, 8, None)]


Parted = tuple[Place, list[Recorder]]


def test_a_run_in_three_segments_ends_like_one_that_was_not_stopped(
    parted: Parted, whole: Place
) -> None:
    """The second resume is the one that breaks where the first one forgot something."""
    place, _ = parted
    assert place.results() == whole.results()


def test_every_start_says_where_it_begins(parted: Parted) -> None:
    """It is the same run all the while."""
    _, told = parted
    starts = [heard.records[0] for heard in told]
    assert [line["resumed_step"] for line in starts] == [0, 3, 8]
    assert len({line["run_id"] for line in starts}) == 1
    facts = [r["data"] for h in told for r in h.records if r.get("topic") == "resume"]
    ahead = {"aimed_at": 12, "set_aside": None}
    assert facts == [{"step": 3, **ahead}, {"step": 8, **ahead}]


def test_no_step_is_told_twice_or_left_out(parted: Parted) -> None:
    """Every segment begins with the step after the last one's end."""
    place, told = parted
    events = place.events()
    assert events == [record for heard in told for record in heard.records]
    assert [heard.of_type("progress")[0]["step"] for heard in told] == [1, 4, 9]
    steps = [record["step"] for record in events if record["type"] == "progress"]
    assert steps == sorted(set(steps))
    with (place.out / TABLE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 13))


def test_every_start_numbers_its_lines_from_one(parted: Parted) -> None:
    """In events.jsonl a new start is recognised by that."""
    place, _ = parted
    firsts = [record["type"] for record in place.events() if record["seq"] == 1]
    assert firsts == ["start"] * 3


def test_percent_and_checkpoints_go_on(parted: Parted) -> None:
    """Each checkpoint is announced once, and percent never falls."""
    place, _ = parted
    checkpoints = [(r["step"], r["reason"]) for r in place.events() if r["type"] == "checkpoint"]
    assert checkpoints[0] == (3, "interrupted")
    assert [step for step, _ in checkpoints if step % 4 == 0] == sorted(
        step for step, _ in checkpoints if step % 4 == 0
    )
    percents = [r["percent"] for r in place.events() if "percent" in r]
    assert percents == sorted(percents)


def test_the_last_line_names_what_a_restart_continues_from(parted: Parted, halfway: Place) -> None:
    """A folder that is there, and whose state is sound."""
    _, told = parted
    for heard, step in zip(told, (3, 8), strict=False):
        last = heard.records[-1]
        assert (last["type"], last["step"], Path(last["path"]).name) == (
            *("interrupted", step),
            f"step_{step}",
        )
    last = halfway.events()[-1]
    assert Path(last["path"]) == halfway.out / "state" / "step_6"
    assert read_state(Path(last["path"]))["step"] == 6


def test_a_resumed_run_stopped_before_its_first_update_names_the_old_state(half: Place) -> None:
    """While the model is loading there is something to continue from already."""
    last = glance(half).records[-1]
    assert (last["type"], last["path"]) == ("interrupted", str(half.out / "state" / "step_6"))
    assert last["step"] == 6
    assert glance(half).records[0]["resumed_step"] == 6


def test_a_stop_before_the_first_new_update_saves_nothing_again(half: Place) -> None:
    """What is on disk is what would be written."""
    before = {name: entry for name, entry in half.tree().items() if name.startswith("state/")}
    last = start(half, after=6).records[-1]
    assert (last["step"], last["path"]) == (6, str(half.out / "state" / "step_6"))
    after = half.tree()
    assert {name: after.get(name) for name in before} == before


# --- More and fewer steps ---


def test_more_steps_go_on_from_the_final_state(done: Place) -> None:
    """The learning rate follows the new length, and the earlier rows stay."""
    before = (done.out / TABLE).read_text(encoding="ascii")
    done.change(steps=14)
    heard = start(done)
    assert (heard.records[0]["resumed_step"], heard.records[-1]["step"]) == (12, 14)
    assert heard.records[-1]["type"] == "complete"
    after = (done.out / TABLE).read_text(encoding="ascii")
    assert after.startswith(before)
    config = TrainingConfig.from_json(done.folder / "config.json")
    rates = [float(row.split(",")[2]) for row in after.splitlines()[-2:]]
    wanted = [0.01 * train_lora.rate(config, step, 14) for step in (13, 14)]
    assert rates == pytest.approx(wanted)
    assert start(done).records[-1]["sha256"] == heard.records[-1]["sha256"]


def test_more_steps_at_a_constant_rate_equal_a_longer_run(base: Path, tmp_path: Path) -> None:
    """Nothing of the first end is left in the result."""
    flat: Record = {
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "steps": 4,
        "batch_size": 3,
        "gradient_accumulation_steps": 1,
    }
    longer = write_place(tmp_path / "longer", base, **flat)
    extended = write_place(tmp_path / "extended", base, **flat | {"steps": 2})
    start(longer)
    start(extended)
    extended.change(steps=4)
    start(extended)
    assert extended.results() == longer.results()


def test_more_epochs_are_mirrored_as_well(base: Path, tmp_path: Path) -> None:
    """A host that reads events.jsonl sees the second run too."""
    place = write_place(tmp_path, base)
    place.change(steps=None, epochs=1)
    start(place)
    place.change(epochs=2)
    heard = start(place)
    assert heard.records[-1]["step"] == 4
    assert place.events()[-len(heard.records) :] == heard.records


def test_fewer_steps_than_done_end_at_once_with_what_was_learned(half: Place) -> None:
    """And the next start finds a completed run."""
    half.change(steps=4)
    first = start(half).records
    assert not [record for record in first if record["type"] == "progress"]
    assert (first[-1]["type"], first[-1]["step"]) == ("complete", 6)
    before = half.tree()
    assert start(half).records[-1]["sha256"] == first[-1]["sha256"]
    assert half.tree() == before


def preflight(place: Place, *, fresh: bool = False) -> Recorder:
    """Check a config and hear what is told, to the last line, whatever that is."""
    heard = Recorder()
    config = TrainingConfig.from_json(place.folder / "config.json")
    with contextlib.suppress(TrainError):
        LoRATrainer(config, Emitter(heard), fresh=fresh).validate()
    check_stream(b"".join(map(train_lora.encode_line, heard.records)))
    return heard


@pytest.mark.parametrize(("finished", "made"), [(False, 6), (True, 12)])
def test_who_asks_for_fewer_steps_than_were_made_is_told(
    finished: bool, made: int, half: Place, whole: Place, tmp_path: Path
) -> None:
    """By a preflight and by a start, of an unfinished run and of one that is complete."""
    place = whole.copy(tmp_path / "done") if finished else half
    place.change(steps=4)
    checked, started = preflight(place), start(place)
    for heard in (checked, started):
        (warned,) = [w for w in heard.of_type("warning") if w["code"] == "steps_done"]
        assert warned["data"] == {"done": made, "total_steps": 4}
        assert f"has made {made}" in warned["message"]
    report = checked.records[-1]["data"]
    assert (report["resumed_step"], report["total_steps"]) == (made, 4)
    assert report["disk_needed_bytes"] > 0
    assert (started.records[-1]["type"], started.records[-1]["step"]) == ("complete", made)


@pytest.mark.parametrize("steps", [6, 7, 12, 20])
def test_who_asks_for_as_many_steps_as_were_made_or_more_is_told_nothing(
    steps: int, half: Place
) -> None:
    """Only what will not be done is worth a warning."""
    half.change(steps=steps)
    heard = preflight(half)
    assert "steps_done" not in heard.codes()
    assert heard.records[-1]["data"]["total_steps"] == steps


def test_fewer_steps_than_planned_end_where_they_say(half: Place) -> None:
    """Shortening is allowed as long as the end is ahead."""
    half.change(steps=7)
    last = start(half).records[-1]
    assert (last["type"], last["step"]) == ("complete", 7)


# --- A completed run ---


def said(record: Record) -> Record:
    """Leave out what is new in every line."""
    return {key: value for key, value in record.items() if key not in ("seq", "timestamp")}


def test_a_completed_run_started_again_says_so_and_touches_nothing(done: Place) -> None:
    """The same last line, and not even the time of a file changes."""
    first = done.events()[-1]
    before = done.tree()
    heard = start(done)
    assert said(heard.records[-1]) == said(first)
    assert heard.records[0]["resumed_step"] == 12
    assert phases_of(heard) in ([], ["planning"])  # nothing was loaded
    assert done.tree() == before


def lose_the_last_line(mirror: Path) -> None:
    """Keep what a disk had taken when it was full."""
    mirror.write_bytes(b"".join(mirror.read_bytes().splitlines(keepends=True)[:-1]))


def tear_the_last_line(mirror: Path) -> None:
    """Keep what was written of it when the power failed."""
    mirror.write_bytes(mirror.read_bytes()[:-20])


LOSSES = [lose_the_last_line, tear_the_last_line, Path.unlink, lambda mirror: mirror.write_text("")]


@pytest.mark.parametrize("lose", LOSSES)
def test_a_lost_last_line_is_written_by_the_next_start(
    lose: Callable[[Path], object], done: Place
) -> None:
    """A host that knows the run from events.jsonl alone learns that it is complete."""
    told = done.events()[-1]
    lose(done.out / "events.jsonl")
    heard = start(done)
    assert done.events()[-len(heard.records) :] == heard.records
    assert said(done.events()[-1]) == said(told)
    before = done.tree()
    start(done)
    assert done.tree() == before


@dataclass
class Remover(Recorder):
    """A listener that removes the output folder after an update, and looks a line later."""

    place: Place
    records: list[Record] = field(default_factory=list)
    gone: bool = False
    locked: bool = False

    def __call__(self, record: Record) -> None:
        """Keep the record, and strike once."""
        self.records.append(record)
        if record["type"] == "progress" and not self.gone:
            shutil.rmtree(self.place.out)
            self.gone = True
        if record["type"] == "complete":
            with pytest.raises(TrainError, match="another run"):
                train_lora.check_output(self.place.out)
            self.locked = True


def test_an_output_folder_removed_under_a_run_is_made_again(
    base: Path, whole: Place, tmp_path: Path
) -> None:
    """The run goes on and says so; the folder is its own again, and mirrors what is told."""
    place = write_place(tmp_path, base)
    heard = Remover(place)
    start(place, listener=heard)
    assert heard.codes().count("output_removed") == 1
    assert heard.locked
    assert place.results() == whole.results()
    assert place.events() == heard.records[-len(place.events()) :]
    assert "output_removed" in [record.get("code") for record in place.events()]


def test_a_completed_run_whose_file_is_gone_is_exported_again(done: Place, whole: Place) -> None:
    """No update is made for that."""
    (done.out / LORA).unlink()
    heard = start(done)
    assert not heard.of_type("progress")
    assert done.results() == whole.results()


def test_a_completed_run_without_states_is_not_silently_repeated(done: Place) -> None:
    """More steps cannot be added to what is gone, and the finished file is not overwritten."""
    shutil.rmtree(done.out / "state" / "step_12")
    done.change(steps=14)
    before = (done.out / LORA).read_bytes()
    last = preflight(done).records[-1]
    failure = refused(done, ErrorCode.RUN_EXISTS)
    assert (last["type"], last["message"]) == ("error", str(failure))
    assert (done.out / LORA).read_bytes() == before


def test_a_completed_run_without_states_knows_what_it_was(done: Place) -> None:
    """Another rank is another run, even if only the finished file is left."""
    shutil.rmtree(done.out / "state" / "step_12")
    done.change(lora_rank=4)
    assert [p.path for p in refused(done, ErrorCode.RUN_CHANGED).problems] == ["lora_rank"]


def test_no_flipped_bit_of_complete_json_keeps_a_run_from_going_on(done: Place) -> None:
    """It only records the past: it is told and written again."""
    path = done.out / "state" / "complete.json"
    content = path.read_bytes()
    for position in range(len(content)):
        flipped = bytes([content[position] ^ 1])
        path.write_bytes(content[:position] + flipped + content[position + 1 :])
        earlier = Earlier.find(done.out)
        assert (earlier.complete, list(earlier.ignored)) == ({}, [path])
        assert earlier.step == 12


def test_a_completed_run_whose_record_is_damaged_completes_again(done: Place, whole: Place) -> None:
    """A warning tells; no update is made for that, and nothing is drawn again."""
    (done.out / "state" / "complete.json").write_bytes(b'{"event": {"step": 12}}')
    heard = start(done)
    assert heard.codes().count("state_ignored") == 1
    assert not [r for r in heard.records if r["type"] in ("progress", "sample")]
    assert done.results() == whole.results()
    assert said(start(done).records[-1]) == said(heard.records[-1])


def test_a_completed_run_whose_states_are_damaged_is_complete_all_the_same(done: Place) -> None:
    """They would only be needed to go on."""
    truncate(done.out / "state" / "step_12")
    heard = start(done)
    assert heard.records[-1]["type"] == "complete"
    assert heard.codes().count("state_ignored") == 1


# --- What was due ---


def due_of(heard: Recorder) -> list[tuple[str, int]]:
    """Name the checkpoints and previews that were announced."""
    told = [r for r in heard.records if r["type"] in ("checkpoint", "sample")]
    return [(record["type"], record["step"]) for record in told]


def test_what_was_due_when_a_run_was_stopped_is_made_at_the_restart(half: Place) -> None:
    """The state of the sixth update was saved, and neither its LoRA file nor its preview."""
    (half.out / "checkpoints" / "lora_step_6.safetensors").unlink()
    half.change(validation_steps=3)
    assert due_of(start(half, after=7)) == [("checkpoint", 6), ("sample", 6), ("checkpoint", 7)]
    assert len(load_file(half.out / "checkpoints" / "lora_step_6.safetensors")) > 2


def test_what_is_there_at_a_restart_is_neither_made_nor_told_again(half: Place) -> None:
    """Of two prompts the one that was not drawn is."""
    half.change(validation_steps=3, sample_prompts=["zkb, a cat", "zkb, a dog"])
    (half.out / "samples").mkdir(exist_ok=True)
    (half.out / "samples" / "step_6.png").write_bytes(b"drawn")
    heard = start(half, after=6, batches=2)
    assert [Path(r["image_path"]).name for r in heard.of_type("sample")] == ["step_6_2.png"]
    assert not heard.of_type("checkpoint")
    assert (half.out / "samples" / "step_6.png").read_bytes() == b"drawn"
    assert due_of(start(half, after=6)) == []


def test_the_base_model_is_drawn_once_however_often_a_run_is_started(
    base: Path, tmp_path: Path
) -> None:
    """Nothing was saved before the first update; another prompt is another picture."""
    place = write_place(tmp_path, base, sample_at_start=True)
    assert due_of(start(place, after=0, batches=1)) == [("sample", 0)]
    assert due_of(start(place, after=0, batches=1)) == []
    place.change(sample_prompts=["zkb, a dog"])
    assert due_of(start(place, after=0, batches=1)) == [("sample", 0)]


def test_the_last_preview_comes_after_the_final_file(base: Path, tmp_path: Path) -> None:
    """A stop amid it loses nothing, and the next start draws it, once, and completes."""
    place = write_place(tmp_path, base, steps=2)
    last = start(place, after=2).records[-1]
    assert (last["type"], last["path"]) == ("interrupted", str(place.out / "state" / "step_2"))
    before = (place.out / LORA).read_bytes()
    assert not (place.out / "state" / "complete.json").exists()
    heard = start(place)
    assert due_of(heard) == [("sample", 2)]
    assert heard.records[-1]["type"] == "complete"
    assert (place.out / LORA).read_bytes() == before
    assert due_of(start(place)) == []


# --- Errors ---


@dataclass
class Failing(Recorder):
    """A listener that fails once, when an update is told."""

    step: int = 0
    error: Exception = field(default_factory=Exception)
    before: Callable[[], object] = dict
    records: list[Record] = field(default_factory=list)

    def __call__(self, record: Record) -> None:
        """Keep the record, and fail when it is the chosen one."""
        self.records.append(record)
        if record["type"] == "progress" and record["step"] == self.step:
            self.before()
            raise self.error


def fail(place: Place, listener: Recorder | None = None) -> Record:
    """Start a run that ends by an error; return its last line."""
    heard = listener or Recorder()
    config = TrainingConfig.from_json(place.folder / "config.json")
    with pytest.raises(TrainError):
        LoRATrainer(config, Emitter(heard)).train()
    assert heard.records[-1]["type"] == "error"
    check_stream(b"".join(map(train_lora.encode_line, heard.records)))
    return heard.records[-1]


ERRORS = {"internal_error": LookupError("a bug"), "out_of_memory": MemoryError("nothing left")}


@pytest.mark.parametrize("code", ERRORS)
def test_an_error_between_two_updates_loses_nothing(code: str, half: Place, whole: Place) -> None:
    """The state is saved as before a stop, and the last line tells what a restart goes on with."""
    last = fail(half, Failing(step=7, error=ERRORS[code]))
    assert (last["code"], last["step"]) == (code, 7)
    assert last["path"] == str(half.out / "state" / "step_7")
    assert (half.out / "checkpoints" / "lora_step_7.safetensors").is_file()
    if code == "out_of_memory":
        assert start(half).records[0]["resumed_step"] == 7
        assert half.results() == whole.results()


def test_a_failure_to_save_does_not_hide_the_error_before_it(half: Place) -> None:
    """It is told as a warning; what was saved earlier is what a restart goes on with."""

    def obstruct() -> None:
        (half.out / "state").rename(half.out / "moved")
        (half.out / "state").touch()

    heard = Failing(step=7, error=LookupError("a bug"), before=obstruct)
    last = fail(half, heard)
    assert heard.codes()[-1] == "checkpoint_failed"
    assert (last["code"], last["message"]) == ("internal_error", "LookupError: a bug")
    assert last["path"] == str(half.out / "state" / "step_6")


TORN = """
import torch

class Lion(torch.optim.SGD):
    calls = 0

    def __init__(self, params, weight_decay):
        super().__init__(params, lr=0.1, weight_decay=weight_decay)

    def step(self, closure=None):
        self.calls += 1
        if self.calls == 3:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(7.0)
            raise LookupError("half of the numbers are changed")
        return super().step(closure)
"""


def test_an_error_amid_the_optimizers_step_saves_no_torn_numbers(
    base: Path, tmp_path: Path, install: Install
) -> None:
    """A restart goes on from the checkpoint before."""
    install("lion_pytorch/__init__.py", TORN)
    place = write_place(tmp_path / "place", base, optimizer="lion", checkpoint_steps=1)
    last = fail(place)
    assert (last["step"], last["path"]) == (2, str(place.out / "state" / "step_2"))
    assert place.states() == ["step_2", "step_1"]
    assert not (place.out / "checkpoints" / "lora_step_3.safetensors").exists()


def test_an_error_before_the_first_update_names_the_old_state(half: Place) -> None:
    """Whatever the error is about, there is something to continue from."""
    half.change(seed=1)
    last = fail(half)
    assert (last["code"], last["step"]) == ("run_changed", 6)
    assert last["path"] == str(half.out / "state" / "step_6")


def test_a_late_stop_before_the_first_update_names_the_old_state(half: Place) -> None:
    """Also where another thread speaks, because the main thread is deep in loading."""
    told: list[tuple[int, str | None]] = []

    class Rescuer(Glance):
        """A listener that saves in the main thread's place."""

        def __call__(self, record: Record) -> None:
            """Save as a late stop does, and stop."""
            if record.get("topic") == "device":
                stopped = TrainingInterrupted("SIGTERM")
                self.stop.save(stopped)
                told.append((stopped.step, stopped.path))
            super().__call__(record)

    stop = StopRequest()
    config = TrainingConfig.from_json(half.folder / "config.json")
    with pytest.raises(TrainingInterrupted):
        LoRATrainer(config, Emitter(Rescuer(stop)), stop).train()
    assert set(told) == {(6, str(half.out / "state" / "step_6"))}


# --- Identity ---


def repaint(place: Place) -> None:
    """Change a picture's bytes, and neither its name nor its size."""
    path = place.folder / "data" / "2.png"
    size = path.stat().st_size
    write_image(path, (256, 256))
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))


def retell(place: Place) -> None:
    """Change a caption."""
    (place.folder / "data" / "1.txt").write_text("a photo of zkb, a dog", encoding="utf-8")


def add_picture(place: Place) -> None:
    """Add an image."""
    write_image(place.folder / "data" / "9.png", (256, 256))


def other_weights(place: Place) -> None:
    """Give a base model of the same structure and size that was trained further."""
    folder = place.folder / "base"
    shutil.copytree(place.config["base_model"], folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v + 0.01 for k, v in load_file(path).items()}, path, {"format": "pt"})
    place.change(base_model=str(folder))


def knob(**changes: Any) -> Callable[[Place], None]:
    """Change the config alone."""
    return lambda place: place.change(**changes)


TOLD: Record = {"caption_lines": "random", "shuffle_tags": True, "keep_tokens": 1, "clip_skip": 2}
TOLD |= {"tag_dropout": 0.1, "caption_dropout": 0.1, "max_tokens": 150}


def repeat(place: Place) -> None:
    """Let every image count twice."""
    write_json(place.folder / "data" / "repeats.json", {".": 2})
    place.change(folder_repeats=True)


IDENTITY: dict[str, tuple[Callable[[Place], None], set[str]]] = {
    "base model": (other_weights, {"base_model"}),
    "image bytes": (repaint, {"dataset_path"}),
    "one image more": (add_picture, {"dataset_path"}),
    "caption": (retell, {"dataset_path"}),
    "trigger words": (knob(trigger_words=["qxw"]), {"dataset_path"}),
    "resolution": (knob(resolution=264), {"resolution"}),
    "rank": (knob(lora_rank=4), {"lora_rank"}),
    "alpha": (knob(lora_alpha=2.5), {"lora_alpha"}),
    "dropout": (knob(lora_dropout=0.1), {"lora_dropout"}),
    "adapter": (knob(adapter="dora"), {"adapter"}),
    "layers": (knob(lora_targets=["attn2"]), {"lora_targets"}),
    "rank-stabilised": (knob(use_rslora=True), {"use_rslora"}),
    "flip": (knob(flip=False), {"flip"}),
    "squares": (knob(buckets=False), {"buckets"}),
    "finer buckets": (knob(bucket_step=32), {"bucket_step"}),
    "masks": (knob(masked_loss=True), {"masked_loss"}),
    "random crops": (knob(crop="random"), {"crop"}),
    "altered pictures": (knob(augment=["color"]), {"augment"}),
    "enlarged": (knob(bucket_upscale=True), {"bucket_upscale"}),
    "text encoder": (knob(train_text_encoder=True), {"train_text_encoder"}),
    "a word alone": (
        knob(embedding_tokens=2, train_lora=False),
        {"embedding_tokens", "train_lora", "trigger_words"},
    ),
    "a word's beginning": (
        knob(embedding_tokens=2, embedding_init="cat"),
        {"embedding_tokens", "embedding_init", "trigger_words"},
    ),
    "optimizer": (knob(optimizer="lion"), {"optimizer"}),
    "betas": (knob(betas=[0.9, 0.99]), {"betas"}),
    "arguments": (knob(optimizer_arguments={"eps": 1e-6}), {"optimizer_arguments"}),
    "average": (knob(ema_decay=0.9), {"ema_decay"}),
    "LoRA+": (knob(lora_plus_ratio=4), {"lora_plus_ratio"}),
    "seed": (knob(seed=1), {"seed"}),
    "how captions are told": (knob(**TOLD), set(TOLD)),
    "repeats": (repeat, {"folder_repeats"}),
    "objective": (knob(**TAUGHT), {*TAUGHT}),
    "regularization": (regularize, {"regularization_path", "dataset_path"}),
    "global batch": (knob(gradient_accumulation_steps=4), {"batch_size"}),
    "images held back": (
        knob(validation_split=1),
        {"validation_split", "validation_path", "dataset_path"},
    ),
    "two at once": (knob(seed=1, lora_rank=4), {"seed", "lora_rank"}),
}


def test_every_knob_that_the_schema_calls_fixed_is_tried() -> None:
    """But for a VAE, which would have to be a whole one, and what other families alone have."""
    fixed = {name for name, knob in train_lora.knobs().items() if knob.get("x-fixed")}
    tried = {path for _, differing in IDENTITY.values() for path in differing}
    assert fixed - tried == {"vae", "timestep_shift"}


@pytest.mark.parametrize("name", IDENTITY)
def test_another_run_is_refused_with_all_that_differs(
    name: str, half: Place, install: Install
) -> None:
    """Nothing is loaded and nothing that was saved is touched."""
    install("lion_pytorch/__init__.py", "class Lion: pass\n")
    change, differing = IDENTITY[name]
    change(half)
    before = half.tree()
    failure = refused(half, ErrorCode.RUN_CHANGED)
    assert {problem.path for problem in failure.problems} == differing
    assert all(p.expected != p.found and "--fresh" in p.hint for p in failure.problems)
    assert {k: v for k, v in half.tree().items() if k != "events.jsonl"} == {
        k: v for k, v in before.items() if k != "events.jsonl"
    }


@pytest.mark.parametrize("name", IDENTITY)
def test_preflight_refuses_another_run_as_training_does(
    name: str, half: Place, install: Install
) -> None:
    """With the same list; nothing is written, not even a line to events.jsonl."""
    install("lion_pytorch/__init__.py", "class Lion: pass\n")
    IDENTITY[name][0](half)
    before = half.tree()
    last = preflight(half).records[-1]
    assert half.tree() == before
    failure = refused(half, ErrorCode.RUN_CHANGED)
    assert (last["type"], last["code"]) == ("error", "run_changed")
    assert last["problems"] == [vars(problem) for problem in failure.problems]
    assert preflight(half, fresh=True).records[-1]["topic"] == "valid"


def test_a_number_that_an_earlier_version_kept_as_it_was_written_is_no_difference() -> None:
    """3 and 3.0 are the same, alone and among arguments; 30, or a name with a point, is not."""
    said = {
        "timestep_shift": "3",
        "optimizer_arguments": "{'d_coef': 2.0, 'r': 0.5}",
        "vae": "v1.0",
    }
    now = said | {"timestep_shift": "3.0", "optimizer_arguments": "{'d_coef': 2, 'r': 0.5}"}
    train_lora.Earlier(manifest={"identity": said}).check(now)
    other = {"timestep_shift": "30.0", "optimizer_arguments": "{'d_coef': 2, 'r': 5}", "vae": "v1"}
    with pytest.raises(TrainError) as caught:
        train_lora.Earlier(manifest={"identity": said}).check(other)
    assert {problem.path for problem in caught.value.problems} == set(other)


def test_what_differs_is_told_under_the_knob_that_a_form_can_mark(half: Place) -> None:
    """There is no knob for the images per update; batch_size is one behind them."""
    half.change(gradient_accumulation_steps=4)
    (problem,) = preflight(half).records[-1]["problems"]
    told = (problem["path"], problem["expected"], problem["found"])
    assert told == ("batch_size", "3 per update", "4 per update")
    assert {knob for knob, _ in train_lora.KNOBS_BEHIND.values()} <= set(half.config) | set(
        train_lora.knobs()
    )


def move_base(place: Place) -> None:
    """Give the same base model under another path."""
    shutil.copytree(place.config["base_model"], place.folder / "moved")
    place.change(base_model=str(place.folder / "moved"))


MUTABLE: dict[str, Callable[[Place], None]] = {
    "steps": knob(steps=20),
    "cadences": knob(checkpoint_steps=7, validation_steps=3, keep_checkpoints=1),
    "prompts": knob(sample_prompts=["zkb in the snow"], sample_steps=2, sample_guidance=2.0),
    "batch split": knob(batch_size=3, gradient_accumulation_steps=1),
    "device": knob(device="auto"),
    "place of the base model": move_base,
}


@pytest.mark.parametrize("name", MUTABLE)
def test_what_does_not_make_another_run_may_change(name: str, half: Place) -> None:
    """The run goes on from the same step."""
    MUTABLE[name](half)
    checked = preflight(half).records
    assert checked[-1]["topic"] == "valid"
    assert checked[0]["resumed_step"] == checked[-1]["data"]["resumed_step"] == 6
    assert glance(half).records[0]["resumed_step"] == 6


def test_fresh_sets_the_earlier_run_aside(half: Place, halfway: Place) -> None:
    """Whatever differs, a new run begins, and the old one is kept whole."""
    half.change(seed=1, lora_rank=4)
    first = glance(half, fresh=True).records
    assert first[0]["resumed_step"] == 0
    assert first[0]["run_id"] != halfway.events()[0]["run_id"]
    facts = [record["data"] for record in first if record.get("topic") == "resume"]
    moved = str(half.out / "earlier_1")
    assert facts == [{"step": 0, "aimed_at": None, "set_aside": moved}]
    assert read_state(half.out / "earlier_1" / "state" / "step_6")["step"] == 6
    assert not half.states()


def test_never_resuming_refuses_what_could_be_continued(half: Place) -> None:
    """The earlier run is neither continued nor overwritten."""
    half.change(resume="never")
    before = half.tree()
    last = preflight(half).records[-1]
    failure = refused(half, ErrorCode.RUN_EXISTS)
    assert (last["code"], last["message"]) == ("run_exists", str(failure))
    fresh = preflight(half, fresh=True).records
    assert (fresh[0]["resumed_step"], fresh[-1]["topic"]) == (0, "valid")
    assert fresh[-1]["data"]["resumed_step"] == 0
    assert half.tree() == before


def test_never_resuming_does_not_mind_an_empty_folder(base: Path, tmp_path: Path) -> None:
    """It is a wish about earlier runs, and here is none."""
    place = write_place(tmp_path, base, resume="never")
    assert glance(place).records[0]["resumed_step"] == 0


def test_never_resuming_refuses_a_completed_run(done: Place) -> None:
    """It would say complete without having trained."""
    done.change(resume="never")
    refused(done, ErrorCode.RUN_EXISTS)


@pytest.mark.parametrize("name", [LORA, "checkpoints/lora_step_5.safetensors"])
def test_a_lora_without_a_state_is_refused(
    name: str, whole: Place, base: Path, tmp_path: Path
) -> None:
    """A finished file put into place is nothing to continue from, and nothing to overwrite."""
    place = write_place(tmp_path, base)
    path = place.out / name
    path.parent.mkdir(parents=True)
    shutil.copy(whole.out / LORA, path)
    before = path.read_bytes()
    refused(place, ErrorCode.RUN_EXISTS)
    assert path.read_bytes() == before


# --- Damaged states ---


def truncate(state: Path) -> None:
    """Cut a file short."""
    path = state / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def flip_byte(state: Path) -> None:
    """Change one byte in the middle of a file."""
    path = state / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def remove_file(state: Path) -> None:
    """Take a file away."""
    (state / "adapter.safetensors").unlink()


def remove_manifest(state: Path) -> None:
    """Take the manifest away."""
    (state / "manifest.json").unlink()


def write_manifest(text: str) -> Callable[[Path], object]:
    """Put something else in the manifest's place."""
    return lambda state: (state / "manifest.json").write_bytes(text.encode())


def edit_manifest(**changes: Any) -> Callable[[Path], object]:
    """Change entries of the manifest."""
    return lambda state: change_json(state / "manifest.json", **changes)


def replace_text(old: str, new: str) -> Callable[[Path], None]:
    """Change letters of the manifest, as a failing disk does."""

    def replace(state: Path) -> None:
        path = state / "manifest.json"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    return replace


def replace_by_file(state: Path) -> None:
    """Put a file where the folder was."""
    shutil.rmtree(state)
    state.touch()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a file cut short": truncate,
    "a flipped byte": flip_byte,
    "a missing file": remove_file,
    "no manifest": remove_manifest,
    "an empty manifest": write_manifest(""),
    "a manifest of zeros": write_manifest("\0" * 500),
    "a manifest that is a list": write_manifest("[]"),
    "a manifest that is null": write_manifest("null"),
    "a manifest without entries": write_manifest("{}"),
    "another step": edit_manifest(step=5),
    "a foreign version": edit_manifest(version=99),
    "no list of files": edit_manifest(files={}),
    "files that are none": edit_manifest(files=["adapter.safetensors"]),
    "a flipped letter in the identity": replace_text('"seed": "0"', '"seed": "1"'),
    "a flipped letter in the run": replace_text('"run_id": "', '"run_ie": "'),
    "a file instead of a folder": replace_by_file,
}


Tensors = dict[str, torch.Tensor]


def forge(state: Path, file: str = "", change: Callable[[Tensors], object] = dict.clear) -> None:
    """Change the tensors of a state's file, and put a checksum for it into the manifest."""
    path = state / f"{file}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    files = json.loads((state / "manifest.json").read_text("utf-8"))["files"]
    forge_manifest(
        files=files | {path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}}
    )(state)


def forge_manifest(**changes: Any) -> Callable[[Path], None]:
    """Change entries of the manifest, or leave them out, together with its checksum."""

    def change(state: Path) -> None:
        path = state / "manifest.json"
        manifest = json.loads(path.read_text("utf-8")) | changes
        kept = {k: v for k, v in manifest.items() if v is not None and k != "checksum"}
        kept["checksum"] = train_lora.digest_of(kept, 12)
        path.write_text(json.dumps(kept, indent=1), encoding="utf-8")

    return change


def take_entry(tensors: Tensors) -> None:
    """Leave a tensor out."""
    tensors.popitem()


def halve_entry(tensors: Tensors) -> None:
    """Leave out most of what belongs to the matrices."""
    name = next(name for name, value in tensors.items() if value.ndim)
    tensors[name] = tensors[name][:1].clone()


def foreign_file(state: Path) -> None:
    """Name a file beside the output folder, with its checksum."""
    files = json.loads((state / "manifest.json").read_text("utf-8"))["files"]
    name = "../../../data/0.png"
    entry = {"sha256": hashlib.sha256((state / name).read_bytes()).hexdigest()}
    forge_manifest(files=files | {name: entry})(state)


def step_99(state: Path) -> None:
    """Claim more updates than there are."""
    forge_manifest(step=99)(state)
    state.rename(state.with_name("step_99"))


NONSENSE: dict[str, Callable[[Path], object]] = {
    "a matrix too few": lambda state: forge(state, "adapter", take_entry),
    "half of a matrix": lambda state: forge(state, "adapter", halve_entry),
    "a moment too few": lambda state: forge(state, "optimizer", take_entry),
    "half of a moment": lambda state: forge(state, "optimizer", halve_entry),
    "step 99 of 12": step_99,
    "nobody's": forge_manifest(run_id=None),
    "no identity": forge_manifest(identity=None),
    "no number of steps": forge_manifest(total_steps=None),
    "a file from elsewhere": foreign_file,
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_state_that_is_whole_and_makes_no_sense_is_left_out(name: str, half: Place) -> None:
    """Its checksums are right; it is told all the same, and the run goes on from the one before."""
    NONSENSE[name](half.out / "state" / "step_6")
    heard = start(half, after=5)
    (warning,) = [r for r in heard.of_type("warning") if r["code"] == "state_ignored"]
    assert warning["data"]["reason"]
    assert Path(warning["data"]["path"]).exists()
    assert heard.of_type("progress")[0]["step"] == 5
    assert heard.records[-1]["path"] == str(half.out / "state" / "step_5")


def test_a_state_that_makes_no_sense_does_not_stand_for_a_new_one(
    half: Place, whole: Place
) -> None:
    """The update is made again, saved under the same name, and the end has the same bytes."""
    forge(half.out / "state" / "step_6", "adapter", halve_entry)
    start(half, after=6)
    assert read_state(half.out / "state" / "step_6")["step"] == 6
    assert start(half).records[0]["resumed_step"] == 6
    assert half.results() == whole.results()


def test_states_without_any_sense_are_an_error(half: Place) -> None:
    """Never a silent new beginning, also where it turns out after the model is loaded."""
    for state in state_folders(half.out):
        forge(state, "adapter", halve_entry)
    with pytest.raises(TrainError) as failed:
        start(half)
    assert failed.value.code is ErrorCode.STATE_DAMAGED
    assert all(f"step_{step}" in failed.value.problems[0].found for step in (2, 4, 6))


def test_an_error_leads_to_no_state_that_was_set_aside(half: Place) -> None:
    """The only one made no sense and has another name; there is nothing to continue from."""
    newest, *older = state_folders(half.out)
    forge(newest, "adapter", halve_entry)
    for state in older:
        shutil.rmtree(state)
    heard = Recorder()
    with pytest.raises(TrainError):
        start(half, listener=heard)
    last = heard.records[-1]
    assert (last["code"], last["step"], last["path"]) == ("state_damaged", None, None)


@pytest.mark.parametrize("history", [[["many", 1, 2, 3]], [[1, 2]], [None], "rows", 5])
def test_a_history_that_makes_no_sense_costs_the_history_alone(
    history: object, half: Place, whole: Place
) -> None:
    """It records the past; what was learned is whole."""
    progress = {"bad_in_a_row": 0, "reported": 6, "loss": 0.5, "history": history}
    forge_manifest(progress=progress)(half.out / "state" / "step_6")
    heard = start(half, after=None if history == 5 else 7)
    assert "state_ignored" in heard.codes()
    assert heard.of_type("progress")[0]["step"] == 7
    if history == 5:
        assert half.results()[0] == whole.results()[0]


def test_a_state_of_an_earlier_version_is_not_called_damaged(half: Place) -> None:
    """The disk is well; the program has changed."""
    forge_manifest(version=1)(half.out / "state" / "step_6")
    heard = glance(half)
    (warning,) = [r for r in heard.of_type("warning") if r["code"] == "state_ignored"]
    assert "earlier version" in warning["message"]
    assert "damaged" not in warning["message"]


OWN = ["state/complete.json", "state/step_6/manifest.json", "state/step_6/adapter.safetensors"]


@pytest.mark.parametrize("kind", ["pipe", "link"])
@pytest.mark.parametrize("name", OWN)
def test_what_only_has_the_name_of_a_saved_file_is_not_opened(
    name: str, kind: str, half: Place
) -> None:
    """A pipe would never answer, and a link may lead anywhere."""
    path = half.out / name
    if path.exists():
        path.rename(half.folder / "moved")
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(half.folder / "moved")
        (half.folder / "moved").touch()
    heard = glance(half)
    (warning,) = [r for r in heard.of_type("warning") if r["code"] == "state_ignored"]
    assert Path(warning["data"]["path"]) in (path, path.parent)
    assert heard.records[0]["resumed_step"] == (6 if "complete" in name else 4)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_is_named_and_the_one_before_is_used(name: str, half: Place) -> None:
    """A warning tells which and why; nothing has been loaded by then."""
    DAMAGES[name](half.out / "state" / "step_6")
    heard = glance(half)
    (warning,) = [r for r in heard.of_type("warning") if r["code"] == "state_ignored"]
    assert warning["data"]["path"] == str(half.out / "state" / "step_6")
    assert warning["data"]["reason"]
    assert heard.records[0]["resumed_step"] == 4


def test_no_flipped_bit_of_a_manifest_goes_unnoticed(half: Place) -> None:
    """It holds counters and the identity, so it needs a checksum as any other file."""
    state = half.out / "state" / "step_6"
    path = state / "manifest.json"
    content = path.read_bytes()
    unnoticed = []
    for position in range(len(content)):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
        )
        with contextlib.suppress(ValueError):
            read_state(state)
            unnoticed.append(position)
    assert not unnoticed


def test_a_run_from_the_state_before_ends_with_the_same_bytes(half: Place, whole: Place) -> None:
    """Two damaged states cost four updates and nothing else."""
    truncate(half.out / "state" / "step_6")
    flip_byte(half.out / "state" / "step_4")
    heard = start(half)
    assert heard.records[0]["resumed_step"] == 2
    assert heard.codes().count("state_ignored") == 2
    assert half.results() == whole.results()
    assert all(read_state(folder) for folder in state_folders(half.out))


def test_a_damaged_state_does_not_push_out_a_sound_one(half: Place) -> None:
    """Only sound states count for how many are kept."""
    truncate(half.out / "state" / "step_6")
    half.change(keep_checkpoints=1, checkpoint_steps=5)
    last = start(half, after=5).records[-1]
    assert Path(last["path"]).name == "step_5"
    assert read_state(Path(last["path"]))["step"] == 5
    assert Earlier.find(half.out).step == 5


def test_no_sound_state_at_all_is_an_error(half: Place) -> None:
    """Never a silent new beginning; every state and its trouble are named."""
    for state in state_folders(half.out):
        truncate(state)
    before = half.tree()
    failure = refused(half, ErrorCode.STATE_DAMAGED)
    found = failure.problems[0].found
    assert all(f"step_{step}" in found for step in (2, 4, 6))
    assert {k: v[1] for k, v in half.tree().items()} == {k: v[1] for k, v in before.items()}


# --- What a state is ---


def test_a_state_holds_tensors_and_json_alone(halfway: Place) -> None:
    """Nothing in it can run code when it is read."""
    for state in state_folders(halfway.out):
        names = sorted(path.name for path in state.iterdir())
        assert names == ["adapter.safetensors", "manifest.json", "optimizer.safetensors"]
        assert all(load_file(path) for path in state.glob("*.safetensors"))
        assert all(json.loads(path.read_text("utf-8")) for path in state.glob("*.json"))


@pytest.mark.filterwarnings("error")
def test_no_pickle_is_read_on_the_way_back(half: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run resumes where torch cannot load pickles."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    assert start(half, after=7).records[-1]["step"] == 7


def test_the_adapter_is_kept_in_full_precision(base: Path, tmp_path: Path) -> None:
    """Also when the model computes in less and the LoRA file holds less."""
    place = write_place(tmp_path, base, mixed_precision="bf16", save_precision="fp16")
    start(place, after=1)
    state = place.out / "state" / "step_1"
    for name in ("adapter", "optimizer"):
        values = load_file(state / f"{name}.safetensors").values()
        assert {value.dtype for value in values} == {torch.float32}
    adapter = load_file(state / "adapter.safetensors")
    assert any((value != value.half().float()).any() for value in adapter.values())


# --- Keeping and clearing ---


@dataclass
class Census(Recorder):
    """A listener that counts states when a checkpoint is announced."""

    out: Path = Path()
    records: list[Record] = field(default_factory=list)
    seen: list[list[str]] = field(default_factory=list)

    def __call__(self, record: Record) -> None:
        """Keep the record and name the states."""
        super().__call__(record)
        if record["type"] == "checkpoint":
            self.seen.append([folder.name for folder in state_folders(self.out)])


def test_only_the_newest_states_are_kept(base: Path, tmp_path: Path) -> None:
    """All LoRA files stay, because they are what people choose from."""
    place = write_place(tmp_path, base, steps=4, checkpoint_steps=1, keep_checkpoints=2)
    census = Census(out=place.out)
    start(place, listener=census)
    assert census.seen == [
        *(["step_1"], ["step_2", "step_1"]),
        *(["step_3", "step_2"], ["step_4", "step_3"]),
    ]
    names = sorted(path.name for path in (place.out / "checkpoints").iterdir())
    assert names == [f"lora_step_{step}.safetensors" for step in (1, 2, 3, 4)]


def sound_states(out: Path) -> list[str]:
    """Name the states that could be continued from if the process died at this instant."""
    found = []
    for folder in state_folders(out):
        with contextlib.suppress(ValueError):
            read_state(folder)
            found.append(folder.name)
    return found


def test_there_is_a_sound_state_at_every_instant(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only one is kept, it goes after the newer one is there; also in the final save."""
    place = write_place(
        tmp_path, base, steps=4, checkpoint_steps=2, keep_checkpoints=1, lora_dropout=0
    )
    seen: list[list[str]] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            seen.append(sound_states(place.out))
            return result

        return call

    for name in ("rename", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    start(place)
    first = next(number for number, states in enumerate(seen) if states)
    assert len(seen) > first + 10
    assert all(seen[first:])


LEFTOVERS = (
    *(".lora_final.safetensors.77.tmp", "checkpoints/.lora_step_7.safetensors.77.tmp"),
    *("samples/.step_3.png.77.tmp", "state/.complete.json.77.tmp"),
    *("state/.step_7.77.tmp/adapter.safetensors", "state/.step_2.77.old.tmp/manifest.json"),
)


def test_what_a_killed_run_left_half_written_is_removed(half: Place) -> None:
    """Files and folders, at the next start, and nothing else with them."""
    before = set(half.tree())
    for name in LEFTOVERS:
        path = half.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    (half.out / "notes.tmp").write_text("mine", encoding="utf-8")
    assert glance(half).records[0]["resumed_step"] == 6
    after = set(half.tree())
    assert after - {"samples"} == before | {"notes.tmp"}


def test_a_state_half_written_is_no_state(half: Place) -> None:
    """A staging folder is not continued from, however complete it looks."""
    state = half.out / "state"
    shutil.copytree(state / "step_6", state / ".step_8.77.tmp")
    assert glance(half).records[0]["resumed_step"] == 6
    assert half.states() == ["step_6", "step_4", "step_2"]
