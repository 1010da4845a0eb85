"""Presets: what they fill in, with a reason for each number, and what they leave alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import Record, load_config, write_config
from processes import Ended, run_program
from test_resume import Place, preflight, start, write_place
from tiny_runs import dataset_of, tiny_base

import train_lora
from train_lora import ModelFacts, Picture, Preflight

PRESETS = train_lora.config_schema()["x-presets"]
ROWS: list[Record] = PRESETS["rows"]
KNOBS = train_lora.knobs()
NAMES = [name for name in KNOBS["preset"]["enum"] if name]
FAMILIES = [name for name in KNOBS["model_family"]["enum"] if name != "auto"]
# What a run reads before it knows the family, which a preset would change too late.
READ_BEFORE = {"resolution", "batch_size", "gradient_accumulation_steps", "seed", "masked_loss"}
READ_BEFORE |= {name for name, knob in KNOBS.items() if knob.get("format") == "path"}
READ_BEFORE |= {name for name in KNOBS if name.startswith(("bucket", "prior", "validation"))}
READ_BEFORE |= {name for name in KNOBS if name.startswith(("caption_l", "caption_e", "folder"))}


def named(row: Record) -> str:
    """Name a test by the row it looks at."""
    return f"{row['knob']}-{row['presets'][0]}-{row['families'][0]}"


def filled(
    preset: str | None, family: str | None, images: int = 20, **given: Any
) -> train_lora.PresetFacts:
    """Work out what a preset gives for so many images."""
    config = load_config(**given | ({"preset": preset} if preset else {}))
    pictures = [Picture(f"{n}.png", Path(f"{n}.png"), 512, 512, "zkb") for n in range(images)]
    facts = ModelFacts(source="hub", cached=family is not None, family=family)
    return Preflight(config, facts, None, dataset_of(pictures, config)).preset()


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let configs be written somewhere."""
    monkeypatch.chdir(tmp_path)


# --- The rows ---


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_a_row_gives_what_its_knob_takes_and_says_why(row: Record) -> None:
    """Its value, or both its bounds; and where the number comes from."""
    bounds = [row[word] for word in ("minimum", "maximum") if word in row]
    taken = [row["value"]] if "value" in row else bounds
    validator = jsonschema.Draft7Validator(KNOBS[row["knob"]])
    assert all(map(validator.is_valid, taken))
    assert row["evidence"] in ("measured", "published")
    assert row["reason"].endswith(".")
    assert 20 < len(row["reason"]) < 200


def test_every_preset_is_described_and_offered() -> None:
    """The knob takes those that the table has, and its prose names each."""
    assert list(PRESETS["about"]) == NAMES
    assert all(f"{name}: " in KNOBS["preset"]["description"] for name in NAMES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", NAMES)
def test_every_preset_answers_for_every_family(preset: str, family: str) -> None:
    """Once for each knob, with what decides most, and all of it fits a plain config."""
    knobs = [r["knob"] for r in ROWS if preset in r["presets"] and family in r["families"]]
    assert len(knobs) == len(set(knobs))
    assert set(knobs) >= {"learning_rate", "steps", "lora_rank", "lora_alpha", "lr_scheduler"}
    facts = filled(preset, family)
    assert list(facts.values) == knobs
    assert facts.reasons.keys() == facts.values.keys()
    for knob, value in train_lora.plain(facts.values).items():
        jsonschema.Draft7Validator(KNOBS[knob]).validate(value)
    if train_lora.all_families()[family].write_lora:
        assert facts.values.get("lora_targets", "attention") == "attention"


def test_rows_rest_on_what_is_known_when_they_are_worked_out() -> None:
    """On the dataset, or on a row before; and none changes what was read before."""
    known = {"steps_per_epoch"}
    for row in ROWS:
        assert row["knob"] in KNOBS
        assert row.get("of", "steps_per_epoch") in known
        known.add(row["knob"])
    assert known.isdisjoint(READ_BEFORE)


# --- What is filled in ---


def test_what_a_config_gives_stays_and_what_depends_on_it_follows() -> None:
    """The rank tells alpha, wherever it comes from; a default that is written down counts."""
    values = filled("style", "sd1", lora_rank=4, lr_scheduler="constant").values
    assert values.keys().isdisjoint({"lora_rank", "lr_scheduler"})
    assert values["lora_alpha"] == 4.0
    nested = filled("style", "sd1", training_params={"lora_rank": 8}).values
    assert (nested["lora_alpha"], "lora_rank" in nested) == (8.0, False)


@pytest.mark.parametrize(("images", "batch", "steps"), [(2, 1, 500), (12, 2, 600), (90, 1, 2000)])
def test_steps_follow_the_images_within_bounds(images: int, batch: int, steps: int) -> None:
    """Each is seen a hundred times, whatever the batch."""
    facts = filled("character", "sdxl", images, batch_size=batch)
    assert (facts.values["steps"], facts.values["lr_warmup_steps"]) == (steps, steps // 20)


def test_epochs_that_are_given_say_when_the_run_ends() -> None:
    """The warm-up is a part of that run."""
    values = filled("character", "sd1", 20, epochs=30).values
    assert ("steps" in values, values["lr_warmup_steps"]) == (False, 30)


def test_what_does_not_go_with_a_given_value_is_left_out() -> None:
    """An optimizer that has no schedule is the user's choice, and no reason to refuse the run."""
    facts = filled("style", "sd1", optimizer="schedulefree", learning_rate=1e-3)
    assert "lr_scheduler" not in facts.values
    assert facts.values["lora_rank"] == 32


def test_while_the_family_is_unknown_only_what_holds_for_all_is_filled_in() -> None:
    """model_family says it where the base model is yet to come."""
    unknown = filled("character", None)
    assert (unknown.family, unknown.values["steps"]) == (None, 2000)
    assert "lora_rank" not in unknown.values
    told = filled("character", None, model_family="krea2")
    assert (told.family, told.values["learning_rate"]) == ("krea2", 3e-4)


# --- In a preflight and in a run ---


def validate(folder: Path, *arguments: str, **changes: Any) -> Ended:
    """Run a preflight of the workspace."""
    write_config(folder, **changes)
    return run_program("--config", "config.json", "--validate-only", *arguments, cwd=folder)


def preset_of(ended: Ended) -> Record:
    """Find the line that tells of a preset."""
    (line,) = [line for line in ended.lines if line.get("topic") == "preset"]
    return line


def test_a_preflight_tells_what_a_preset_fills_in(workspace: Path) -> None:
    """The first line holds null for what the base model decides; the last counts with it."""
    ended = validate(workspace, "--set", "preset=draft", lora_rank=4)
    start_line, told = ended.lines[0], preset_of(ended)
    assert (start_line["total_steps"], start_line["config"]["steps"]) == (None, None)
    assert (start_line["config"]["lora_rank"], start_line["config"]["lora_alpha"]) == (4, None)
    assert told["data"]["verb"] == "sets"
    assert told["message"].startswith("Preset draft sets learning_rate 0.0005, steps 200, ")
    assert told["data"]["reasons"]["lora_targets"].startswith("measured: ")
    assert ended.last["data"]["total_steps"] == 200


def test_without_a_preset_one_line_tells_what_one_would_do(workspace: Path) -> None:
    """Nothing is changed by it."""
    ended = validate(workspace)
    told = preset_of(ended)
    assert told["message"].startswith("Preset character would set ")
    assert told["data"]["verb"] == "would set"
    assert ended.lines[0]["config"]["lora_rank"] == 16
    assert ended.last["data"]["total_steps"] == 1000


@pytest.mark.parametrize("own", ["learning_rate", "lora_rank"])
def test_who_has_a_recipe_is_offered_none(workspace: Path, own: str) -> None:
    """Not even if it is the default, written down."""
    ended = validate(workspace, **{own: KNOBS[own]["default"]})
    assert "preset" not in [line.get("topic") for line in ended.lines]


def test_a_value_that_does_not_fit_what_is_filled_in_is_refused(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would be if all stood in the config."""
    (rate, *_) = [row for row in ROWS if row["knob"] == "learning_rate"]
    monkeypatch.setitem(rate, "value", 0.05)
    monkeypatch.chdir(workspace)
    config = load_config(preset="character", lora_plus_ratio=16)
    with pytest.raises(train_lora.TrainError, match="lora_plus_ratio"):
        train_lora.LoRATrainer(config).validate()


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let drafts be as short as a test."""
    (row,) = [row for row in ROWS if row["knob"] == "steps" and row["presets"] == ["draft"]]
    monkeypatch.setitem(row, "value", 4)


OPEN = dict.fromkeys(("steps", "learning_rate", "lora_rank", "lora_alpha", "lr_scheduler"))
OPEN |= dict.fromkeys(("lr_warmup_steps", "ema_decay", "lora_targets", "epochs"))


def place_of(folder: Path, ground: Path, **changes: Any) -> Place:
    """Write a place whose config leaves all to its preset, but for what is given."""
    place = write_place(folder, tiny_base("sd1", ground / "bases"), validation_steps=99)
    place.change(**OPEN, **changes)
    return place


@pytest.mark.usefixtures("brief")
def test_a_preset_and_its_numbers_written_out_are_the_same_run(
    ground: Path, tmp_path: Path
) -> None:
    """Begun with the one and continued with the other, it ends with the same bytes."""
    plain, parted = (place_of(tmp_path / part, ground, preset="draft") for part in ("a", "b"))
    heard = start(plain)
    (told,) = [line["data"] for line in heard.records if line.get("topic") == "preset"]
    assert (told["family"], told["values"]["steps"]) == ("sd1", 4)
    start(parted, after=2)
    parted.change(preset=None, **told["values"])
    start(parted)
    assert parted.results() == plain.results()


@pytest.mark.usefixtures("brief")
def test_a_finished_run_with_a_preset_is_left_as_it_is(ground: Path, tmp_path: Path) -> None:
    """Started again it says complete; under a preset with other numbers it is another run."""
    place = place_of(tmp_path / "a", ground, preset="draft")
    done = start(place).records[-1]
    before = place.tree()
    again = start(place).records[-1]
    assert (again["type"], again["sha256"]) == ("complete", done["sha256"])
    assert place.tree() == before
    place.change(preset="style")
    refused = preflight(place).records[-1]
    assert refused["code"] == "run_changed"
    assert {problem["path"] for problem in refused["problems"]} >= {"lora_rank", "lora_alpha"}
