"""tools/evaluate.py: planted truths are found, and what cannot be known is not claimed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_json
from PIL import Image
from scenes import scene

from tools import evaluate
from tools.evaluate import Arm, Grid, Judge, conclusion, quality, read_grid, verdict_on
from tools.intervals import unit
from train_lora import TrainError

BASE = Arm("base", 0.0, None)
SUBJECT, PRIOR = [f"s{n}" for n in range(12)], [f"p{n}" for n in range(6)]
SIZE = 48  # of the vectors


def direction(seed: int) -> np.ndarray:
    """Draw a direction of its own."""
    return np.asarray(np.random.default_rng(seed).standard_normal(SIZE) / np.sqrt(SIZE))


TRAIN = unit(direction(0) + 0.5 * direction(100 + n) for n in range(12))


def planted(arms: dict[Arm, tuple[float, float]], copies: float = 0.0) -> Judge:
    """Make the vectors of a grid: each arm moves by its shares towards subject and elsewhere."""
    chance = np.random.default_rng(1)
    prompts = {n: {"role": "subject"} for n in SUBJECT} | {n: {"role": "prior"} for n in PRIOR}
    files, vectors = {}, {}
    for number, prompt in enumerate(prompts):
        for seed in range(4):
            own = direction(1000 + 10 * number + seed) + direction(5000 + number)
            for arm, (subject, drift) in arms.items():
                towards = subject * direction(0) if prompt in SUBJECT else drift * direction(7)
                vector = own + towards + 0.05 * direction(int(chance.integers(10**9)))
                if chance.random() < copies and arm != BASE:
                    vector = TRAIN[chance.integers(len(TRAIN))]
                files[arm, prompt, seed] = Path(f"{arm.name}/{prompt}/{seed}")
                vectors[files[arm, prompt, seed]] = unit([vector])[0]
    grid = Grid(Path(), prompts, list(arms), list(range(4)), files)
    return Judge(grid, vectors, TRAIN)


def arm(step: int, strength: float = 1.0) -> Arm:
    """Name a checkpoint."""
    return Arm(f"step_{step}", strength, step)


def test_a_lora_that_does_nothing_is_called_so() -> None:
    """And one that does is not."""
    judge = planted({BASE: (0, 0), arm(1): (0, 0), arm(500): (2, 0.1)})
    result = verdict_on(judge, {})
    assert result["does_nothing"] == ["step_1 at 1"]
    assert result["recommended"] == "step_500 at 1"
    idle = verdict_on(planted({BASE: (0, 0), arm(1): (0, 0)}), {})
    assert conclusion(idle).startswith("No LoRA here does anything")


def test_more_of_the_subject_scores_higher_and_further_scores_more_drift() -> None:
    """In the order in which it was planted, each score for itself."""
    arms = {BASE: (0.0, 0.0), arm(1): (0.5, 0.0), arm(2): (1.0, 0.2), arm(3): (2.0, 1.0)}
    scored = verdict_on(planted(arms), {})["arms"]
    likeness = [each["fidelity"]["mean"] for each in scored]
    drift = [each["drift"]["mean"] for each in scored]
    assert likeness == sorted(likeness)
    assert drift[3] > 5 * drift[1]
    assert drift[0] == 0
    assert all(each["fidelity"]["half_width"] for each in scored)


def test_of_checkpoints_that_are_alike_the_earliest_is_recommended() -> None:
    """The others are named as not to be told from it."""
    arms = {BASE: (0.0, 0.0), **{arm(step): (1.5, 0.1) for step in (100, 200, 300, 400)}}
    result = verdict_on(planted(arms), {})
    assert len(result["not_distinguishable"]) >= 3
    names = [each["arm"] for each in result["arms"][1:]]
    assert result["recommended"] == min(result["not_distinguishable"], key=names.index)


def test_pictures_that_are_copies_are_seen_as_such() -> None:
    """Far more of them than chance would have, and the prompts count for nothing."""
    honest = verdict_on(planted({BASE: (0, 0), arm(1): (2, 0)}), {})
    copied = verdict_on(planted({BASE: (0, 0), arm(1): (2, 0)}, copies=1.0), {})
    shares = [result["arms"][1]["nearer_than_training"] for result in (honest, copied)]
    assert shares[0] <= 2 * honest["nearer_expected"] < 0.5 < shares[1]
    assert copied["arms"][1]["cmmd"] < honest["arms"][1]["cmmd"]


def test_quality_wants_both_likeness_and_truth_to_the_prompt() -> None:
    """By its formula."""
    fidelity, floor = {"a": [0.8, 0.4]}, {"a": [0.4, 0.4]}
    assert quality(fidelity, floor, 0.8, {}, {}) == {"a": [1, 0]}
    fit, known = {"a": [0.15, 0.3]}, {"a": [0.3]}
    assert quality(fidelity, floor, 0.8, fit, known) == {"a": [pytest.approx(0.5**0.5), 0]}


# --- grids on disk ---


def write_grid(folder: Path, **changes: Any) -> Path:
    """Write a grid of pictures: the base, and a LoRA that turns everything red."""
    (folder / "images").mkdir(parents=True)
    images = []
    for lora, strength in (("base", 0.0), ("step_9", 1.0)):
        for prompt in range(4):
            for seed in range(2):
                file = f"images/{lora}_{prompt}_{seed}.png"
                picture = scene(10 * prompt + seed, 64)
                if lora != "base":
                    picture = Image.blend(picture, Image.new("RGB", (64, 64), "red"), 0.8)
                picture.save(folder / file)
                place = {"prompt": f"p{prompt}", "lora": lora, "strength": strength, "seed": seed}
                images.append({"file": file} | place)
    prompts = [{"id": f"p{n}", "text": f"zkb {n}", "plain": f"thing {n}"} for n in range(4)]
    loras = [{"id": "base", "file": None}, {"id": "step_9", "file": "x", "step": 9}]
    document = {"format": "lora-grid", "prompts": prompts, "loras": loras, "images": images}
    write_json(folder / "grid.json", document | changes)
    return folder


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """Provide six reddish training pictures, one of them twice."""
    folder = tmp_path / "train"
    folder.mkdir()
    for number in range(6):
        red = Image.blend(scene(50 + number, 64), Image.new("RGB", (64, 64), "red"), 0.8)
        red.save(folder / f"{number}.png")
    red.save(folder / "again.png")
    return folder


def test_pictures_are_judged_from_folder_to_verdict(
    tmp_path: Path, train: Path, eyes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By real models, tiny ones; copies of training pictures count once."""
    grid = write_grid(tmp_path / "grid")
    models = ["--vision", str(eyes / "dino"), "--clip", str(eyes / "clip")]
    assert evaluate.main([str(grid), "--train", str(train), *models]) == 0
    shown = capfd.readouterr().out
    assert "step_9 at 1" in shown
    assert "±" in shown
    result = json.loads((grid / "eval.json").read_text(encoding="utf-8"))
    assert result["features"] == {"vision": "dino", "clip": "clip"}
    assert result["training_images"] == 6
    assert [each["arm"] for each in result["arms"]] == ["base", "step_9 at 1"]
    assert str(tmp_path) not in json.dumps(result)


def test_a_bad_picture_is_left_out_in_all_arms(
    tmp_path: Path, train: Path, eyes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """So that arms stay comparable; black ones too."""
    grid = write_grid(tmp_path / "grid")
    (grid / "images" / "base_0_0.png").write_bytes(b"none")
    Image.new("RGB", (64, 64)).save(grid / "images" / "step_9_1_1.png")
    options = ["--train", str(train), "--vision", str(eyes / "dino")]
    assert evaluate.main([str(grid), *options]) == 0
    told = capfd.readouterr().err
    assert "base, p0, seed 0: no picture" in told
    assert "step_9 at 1, p1, seed 1: all one colour" in told


WRONG: dict[str, Callable[[dict[str, Any]], None]] = {
    "missing": lambda grid: grid["images"].pop(),
    "pictures of the base": lambda grid: grid.update(images=grid["images"][8:]),
    "leads out": lambda grid: grid["images"][0].update(file="../secret.png"),
    "a grid of": lambda grid: grid.pop("prompts"),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_compared_is_refused(words: str, tmp_path: Path) -> None:
    """With the first thing that is wrong."""
    folder = write_grid(tmp_path / "grid")
    grid = json.loads((folder / "grid.json").read_text(encoding="utf-8"))
    WRONG[words](grid)
    write_json(folder / "grid.json", grid)
    with pytest.raises(TrainError, match=words):
        read_grid(folder)
