"""What stands in examples/ works as it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, Record, Recorder

import train_lora
from train_lora import Emitter, ModelFacts, TrainingConfig

READY_MADE = sorted((ROOT / "examples" / "configs").glob("*.json"))
CONFIGS = [ROOT / "example_config.json", *READY_MADE]


def name_of(path: Path) -> str:
    """Name a test by the file it looks at."""
    return path.stem


def read(path: Path) -> Record:
    """Read a config as it was written."""
    document: Record = json.loads(path.read_text(encoding="utf-8"))
    return document


# --- The configs --------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_a_config_passes_the_loader_without_a_remark(path: Path) -> None:
    """Whoever starts from it begins with nothing to mend."""
    assert TrainingConfig.from_json(path).remarks == ()


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_an_editor_finds_the_schema_from_a_config(path: Path) -> None:
    """$schema counts from the file it stands in."""
    assert (path.parent / read(path)["$schema"]).resolve() == train_lora.SCHEMA_PATH


@pytest.mark.parametrize("path", READY_MADE, ids=name_of)
def test_a_ready_made_config_says_what_it_is_for(path: Path) -> None:
    """One sentence, short enough for a table."""
    comment = read(path)["$comment"]
    assert comment.endswith(".")
    assert 40 < len(comment) < 250


@pytest.mark.parametrize("path", READY_MADE, ids=name_of)
def test_a_config_uses_a_base_model_at_the_size_it_was_made_for(path: Path) -> None:
    """The hub ids are the living ones, and preflight will find no fault with the resolution."""
    config = TrainingConfig.from_json(path)
    families = {family.reference: family for family in train_lora.FAMILIES.values()}
    family = families[config.base_model]
    facts = ModelFacts(
        source="hub", cached=True, family=family.name, native_resolution=family.native_resolution
    )
    recorder = Recorder()
    train_lora.report_model(replace(config, prediction_type="epsilon"), facts, Emitter(recorder))
    assert [record["type"] for record in recorder.records] == ["info"]


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_a_config_needs_no_package_beyond_the_requirements(path: Path) -> None:
    """An optimizer that has to be installed first is a choice to make, not to begin with."""
    assert TrainingConfig.from_json(path).optimizer not in train_lora.OPTIMIZER_PACKAGES


@pytest.mark.parametrize("path", READY_MADE, ids=name_of)
def test_every_preview_of_a_config_calls_the_concept(path: Path) -> None:
    """A prompt without a trigger word would show the base model alone."""
    config = TrainingConfig.from_json(path)
    prompts = train_lora.preview_prompts(config)
    assert [p for p in prompts if not any(word in p for word in config.trigger_words)] == []


def test_configs_that_are_tried_one_after_another_stay_apart() -> None:
    """Each writes into a folder of its own."""
    outputs = [TrainingConfig.from_json(path).output_path for path in CONFIGS]
    assert READY_MADE
    assert len(set(outputs)) == len(CONFIGS)
