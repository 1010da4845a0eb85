"""Ordeals: a run that is stopped again and again ends as one that nobody stopped."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import Record, check_stream, write_image
from faults import Faults, die, forked
from processes import CONTRACT_SECONDS
from tiny_runs import tiny_config

import train_lora

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and sends signals")

# What every scene has: something is due at almost every update.
EVERYTHING_DUE: Record = {
    "steps": 5,
    "checkpoint_steps": 2,
    "validation_steps": 2,
    "sample_at_start": True,
}
SCENES: dict[str, Record] = {
    "sd1": {"train_text_encoder": True, "lr_scheduler": "cosine", "gradient_accumulation_steps": 2},
    "sd2": {
        "sample_prompts": ["zkb", "a cat"],
        "lora_dropout": 0.1,
        "flip": True,
        "lr_scheduler": "linear",
        "lr_warmup_steps": 3,
    },
    "sdxl": {"train_text_encoder": True, "lora_dropout": 0.1, "regularization_share": 0.3},
}
STRIKES = ("kill", "die at a file", "SIGTERM", "SIGINT", "SIGTERM at a file")


def write_scene(ground: Path, folder: Path, family: str) -> Path:
    """Write a config with much that can be lost; return its folder."""
    values = EVERYTHING_DUE | SCENES[family] | {"output_path": str(folder / "out")}
    values["cache_dir"] = str(folder / "cache")
    if "regularization_share" in values:
        others = ground / "others"
        for number in range(2):
            path = write_image(others / f"{number}.png", (256, 256))
            path.with_suffix(".txt").write_text(f"plain {number}", encoding="utf-8")
        values["regularization_path"] = str(others)
    tiny_config(ground, family, **values)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ground / "config.json", folder / "config.json")
    return folder


def results(folder: Path) -> dict[str, bytes]:
    """Read what a run is to leave behind, but for what tells of time."""
    out = folder / "out"
    kinds = ("*.safetensors", "checkpoints/*", "samples/*", "loss_history.csv")
    return {str(p.relative_to(out)): p.read_bytes() for kind in kinds for p in out.glob(kind)}


def run_main(folder: Path, faults: Faults | None = None) -> int:
    """Be the program, with a fault where one is asked for."""
    with faults.injected() if faults else contextlib.nullcontext():
        return train_lora.main(["--config", str(folder / "config.json")])


def terminate() -> None:
    """Ask oneself to stop."""
    os.kill(os.getpid(), signal.SIGTERM)


@dataclass(frozen=True)
class Undisturbed:
    """What a run that nobody stopped leaves behind, and how much time and calls it takes."""

    results: dict[str, bytes]
    seconds: float
    calls: int  # that change the disk


@dataclass
class Ordeal:
    """A run that is struck again and again, and how long it took to end."""

    folder: Path
    chance: random.Random
    undisturbed: Undisturbed
    slowest: float = 0.0
    struck: dict[str, int] = field(default_factory=dict)

    def strike(self) -> bool:
        """Start, and strike at some moment; tell whether the run was over before."""
        kind = self.chance.choice(STRIKES)
        self.struck[kind] = self.struck.get(kind, 0) + 1
        if kind.endswith("at a file"):
            call = terminate if "SIGTERM" in kind else die
            faults = Faults(self.chance.randrange(self.undisturbed.calls) + 1, call)
            return self.start(functools.partial(run_main, self.folder, faults), None)
        number = signal.SIGKILL if kind == "kill" else signal.Signals[kind]
        return self.start(functools.partial(run_main, self.folder), number)

    def start(self, work: Callable[[], int], number: signal.Signals | None) -> bool:
        """Start, send a signal where there is one, and hold what was said against the promises."""
        with forked(work) as child:
            if number:
                time.sleep(self.chance.uniform(0, self.undisturbed.seconds))
                os.kill(child.pid, number)
            struck_at = time.monotonic()
            code, stream = child.end()
        if number:
            self.slowest = max(self.slowest, time.monotonic() - struck_at)
        assert code in (0, 130, 143, 137, -signal.SIGKILL), stream.decode()
        if code in (0, 130, 143):
            check_stream(stream)
        return code == 0

    def endure(self, strikes: int) -> int:
        """Strike until the run is complete; return how often it was struck in vain."""
        for count in range(strikes):
            if self.strike():
                return count
        assert self.start(functools.partial(run_main, self.folder), None)
        return strikes


def check_announcements(folder: Path) -> None:
    """Find nothing announced twice, but for what was made again after a start that says so."""
    told: set[tuple[Any, ...]] = set()
    lines = (folder / "out" / "events.jsonl").read_text(encoding="ascii").splitlines()
    for record in map(json.loads, lines):
        if record["type"] == "start":
            told = {key for key in told if key[1] <= record["resumed_step"]}
        if record["type"] in ("sample", "checkpoint"):
            path = record.get("path", record.get("image_path"))
            key = (path, record["step"])
            assert key not in told, record
            assert Path(path).is_file(), record
            told.add(key)
    assert record["type"] == "complete"


@pytest.fixture(scope="module")
def undisturbed(
    ground: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Undisturbed]:
    """Provide what a run that nobody stopped leaves behind, by family."""

    @functools.cache
    def leave(family: str) -> Undisturbed:
        folder = write_scene(ground, tmp_path_factory.mktemp(f"{family}_undisturbed"), family)
        counted = folder / "calls"
        began = time.monotonic()
        with forked(functools.partial(run_counting, folder, counted)) as child:
            code, stream = child.end()
        assert code == 0, stream.decode()
        check_announcements(folder)
        calls = int(counted.read_text(encoding="ascii"))
        return Undisturbed(results(folder), time.monotonic() - began, calls)

    return leave


def run_counting(folder: Path, counted: Path) -> int:
    """Be the program, and write down how often it changed the disk."""
    with Faults(0, die).injected() as faults:
        code = train_lora.main(["--config", str(folder / "config.json")])
    counted.write_text(str(len(faults.calls)), encoding="ascii")
    return code


@pytest.mark.parametrize("family", SCENES)
@pytest.mark.parametrize("strikes", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_a_run_struck_at_random_ends_as_one_that_was_not(
    family: str,
    strikes: int,
    ground: Path,
    tmp_path: Path,
    undisturbed: Callable[[str], Undisturbed],
) -> None:
    """Same bytes, every preview and checkpoint file, nothing told twice, every stop in time."""
    whole, made, slowest, seed = undisturbed(family), 0, 0.0, 0
    while made < strikes:
        folder = write_scene(ground, tmp_path / str(seed), family)
        ordeal = Ordeal(folder, random.Random(f"{family} {strikes} {seed}"), whole)
        made += max(1, ordeal.endure(min(10, strikes - made)))
        found = results(folder)
        missing = whole.results.keys() - found.keys()
        changed = [n for n in whole.results.keys() - missing if found[n] != whole.results[n]]
        assert (missing, changed) == (set(), [])
        check_announcements(folder)
        assert not list((folder / "out").rglob(".*.tmp"))
        slowest, seed = max(slowest, ordeal.slowest), seed + 1
    assert slowest < CONTRACT_SECONDS
