"""Options together: any two values of any two of them train, stop, continue and load.

The rows below hold every such pair at least once. What the program refuses, it refuses by name,
before anything is loaded.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_image
from safetensors.torch import load_file
from test_resume import Place, start, write_place
from tiny_models import FAMILIES
from tiny_runs import tiny_base

from train_lora import Problem, Record, TrainError, TrainingConfig

# Of each option its default first, and what acts in another way.
VALUES: dict[str, tuple[Any, ...]] = {
    "batch_size": (1, 2),
    "gradient_accumulation_steps": (1, 2),
    "resolution": (256, [256, 288]),
    "buckets": (True, False),
    "flip": (False, True),
    "shuffle_tags": (False, True),
    "tag_dropout": (0.0, 0.3),
    "caption_dropout": (0.0, 0.5),
    "max_tokens": (75, 150),
    "regularization_path": (None, "others"),
    "adapter": ("lora", "dora", "loha", "lokr"),
    "lora_targets": ("attention", "attention-mlp", "all"),
    "lora_dropout": (0.0, 0.2),
    "use_rslora": (False, True),
    "train_text_encoder": (False, True),
    "embedding_tokens": (0, 2),
    "snr_gamma": (None, 5.0),
    "noise_offset": (0.0, 0.05),
    "loss": ("mse", "huber", "l1"),
    "timestep_range": ([0, 1000], [100, 900]),
    "optimizer": ("adamw", "adafactor", "prodigy", "schedulefree"),
    "lr_scheduler": ("constant", "cosine_restarts", "rex"),
    "ema_decay": (0.0, 0.9),
    "lora_plus_ratio": (1.0, 4.0),
    "validation_split": (0, 2),
    "gradient_checkpointing": (False, True),
    "save_precision": ("fp16", "fp32"),
}
Choice = tuple[str, int]  # an option, and the number of its value
Choices = dict[str, int]
Pair = frozenset[Choice]
Missing = dict[Pair, None]  # in a fixed order
NOTHING: Record = {"dataset_path": "d", "base_model": "b", "output_path": "o"}


def asked(choices: Choices | Pair) -> Record:
    """Say in a config what was chosen, but for defaults; the rate is one for the optimizer."""
    chosen = dict(choices)
    said = {name: VALUES[name][chosen[name]] for name in VALUES if chosen.get(name)}
    return said | ({"learning_rate": 0.5} if said.get("optimizer") == "prodigy" else {})


@functools.cache
def refusal(pair: Pair) -> tuple[Problem, ...]:
    """Ask the program what is wrong with two values together."""
    try:
        TrainingConfig.from_record(NOTHING | {"trigger_words": ["zkb"]} | asked(pair))
    except TrainError as error:
        return tuple(error.problems)
    return ()


def goes_together(pair: Pair) -> bool:
    """Tell whether two values may stand in one config."""
    return not refusal(pair)


def all_pairs() -> Missing:
    """List what must occur, in a fixed order."""
    every = [(name, number) for name, values in VALUES.items() for number in range(len(values))]
    return {
        frozenset(two): None for two in itertools.combinations(every, 2) if two[0][0] != two[1][0]
    }


def fits(row: Choices, one: Choice) -> bool:
    """Tell whether a value goes with all that was chosen before it."""
    return all(goes_together(frozenset([one, other])) for other in row.items())


def gain(row: Choices, one: Choice, missing: Missing) -> int:
    """Count the missing pairs that a value would bring."""
    return sum(frozenset([one, other]) in missing for other in row.items())


def completed(row: Choices, missing: Missing) -> Choices:
    """Choose for every other option what fits and brings most of what is missing."""
    for name, values in VALUES.items():
        choices = [(name, n) for n in range(len(values))] if name not in row else []
        fitting = [one for one in choices if fits(row, one)]
        if fitting:
            best = max(fitting, key=lambda one: (gain(row, one, missing), -one[1]))
            row = row | dict([best])
    return row


def rows() -> Iterator[Choices]:
    """Find few rows that hold every pair: each begins with one that is missing."""
    missing = all_pairs()
    while missing:
        first = next(iter(missing))
        del missing[first]
        if goes_together(first):
            row = completed(dict(first), missing)
            for pair in itertools.combinations(row.items(), 2):
                missing.pop(frozenset(pair), None)
            yield row


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a folder for bases and what was encoded."""
    return tmp_path_factory.mktemp("combinations")


def place_for(ground: Path, folder: Path, family: str, row: Choices) -> Place:
    """Write a dataset of two shapes with tags, and a config of these options."""
    defaults: Record = {"lora_dropout": 0.0, "flip": False, "gradient_accumulation_steps": 1}
    defaults |= {"lr_scheduler": "constant", "lr_warmup_steps": 0}
    changes: Record = {"steps": 2, "learning_rate": 1e-3} | defaults | asked(row)
    if "regularization_path" in changes:
        changes["regularization_path"] = str(folder / "others")
        other = write_image(folder / "others" / "other.png", (256, 320))
        other.with_suffix(".txt").write_text("a cat, blue", encoding="utf-8")
    place = write_place(folder, tiny_base(family, ground / "bases"), **changes)
    for number in range(5):
        caption = folder / "data" / f"{number}.txt"
        caption.write_text(f"zkb, red, round, number {number}", encoding="utf-8")
    return place


def check(ground: Path, folder: Path, family: str, row: Choices) -> None:
    """Train as a whole and in two parts to the same bytes; look at the file."""
    whole = place_for(ground, folder / "whole", family, row)
    parts = whole.copy(folder / "parts")
    start(whole)
    start(parts, after=1)
    start(parts)
    assert parts.results() == whole.results()
    tensors = load_file(whole.out / "lora_final.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_what_does_not_go_together_is_said_with_a_remedy() -> None:
    """A path, and what to do about it."""
    refused = [problem for pair in all_pairs() for problem in refusal(pair)]
    assert refused
    assert all(problem.path and problem.hint for problem in refused)


@pytest.mark.parametrize(("number", "family"), list(enumerate(FAMILIES)))
def test_some_options_together_train_and_continue(
    number: int, family: str, ground: Path, tmp_path: Path
) -> None:
    """The first rows that are not all defaults, one in each family."""
    check(ground, tmp_path, family, next(itertools.islice(rows(), number + 1, None)))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_any_two_options_together_train_and_continue(
    family: str, ground: Path, tmp_path: Path
) -> None:
    """All rows; each that fails is told."""
    failed = {}
    for number, row in enumerate(rows()):
        try:
            check(ground, tmp_path / str(number), family, row)
        except Exception as error:  # noqa: BLE001, the other rows are tried all the same
            failed[str(asked(row))] = repr(error)
    assert not failed
