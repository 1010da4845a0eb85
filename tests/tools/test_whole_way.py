"""The example's way, from its drawings to a verdict, and what the verdict is worth."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from PIL import Image
from wide_eyes import make_wide_eyes

from mascot import shows_imp
from tools.reading import read_file
from train_lora import Emitter, LoRATrainer, TrainingConfig

pytestmark = pytest.mark.slow
CONFIG = ROOT / "examples" / "pipeline.yaml"


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide the embedding."""
    return make_wide_eyes(tmp_path_factory.mktemp("eyes") / "dino")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, eyes: Path) -> Path:
    """Go the whole way as a person does, from the root of the repository."""
    folder = tmp_path_factory.mktemp("way") / "out"
    changes = (f"output_path={folder}", f"evaluate.vision={eyes}")
    command = [sys.executable, "tools/pipeline.py", "--config", str(CONFIG)]
    command += [word for change in changes for word in ("--set", change)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def share_of_imps(grid: Path, lora: str, role: str) -> float:
    """Look at the pictures of a LoRA; the program that finds the imp knows nothing of scores."""
    said = json.loads((grid / "grid.json").read_text("utf-8"))
    prompts = {prompt["id"] for prompt in said["prompts"] if prompt["role"] == role}
    images = [i for i in said["images"] if i["lora"] == lora and i["prompt"] in prompts]
    return sum(shows_imp(Image.open(grid / i["file"])) for i in images) / len(images)


def verdict(path: Path) -> dict[str, Any]:
    """Read what was found."""
    result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return result


def test_the_recommended_checkpoint_draws_the_imp(out: Path) -> None:
    """Where it is called, and nowhere else; the base does not, and the first one hardly does."""
    result = verdict(out / "eval.json")
    (chosen,) = [arm for arm in result["arms"] if arm["arm"] == result["recommended"]]
    shares = {a["lora"]: share_of_imps(out / "grid", a["lora"], "subject") for a in result["arms"]}
    assert shares["base"] == 0
    assert shares[chosen["lora"]] >= 0.7
    assert shares[chosen["lora"]] >= max(shares.values()) - 0.2
    assert share_of_imps(out / "grid", chosen["lora"], "prior") == 0
    assert result["recommended"] not in result["does_nothing"]


def test_a_lora_that_learned_nothing_is_said_to_do_nothing(
    out: Path, eyes: Path, tmp_path: Path
) -> None:
    """Trained as the others, at a rate of 1e-7, which the trainer's own schema forbids."""
    document = read_file(CONFIG)
    said = document["training"] | {"steps": 40, "checkpoint_steps": 40}
    places = {"dataset_path": str(out / "dataset" / "train"), "output_path": str(tmp_path / "run")}
    for key in ("base_model", "regularization_path"):
        places[key] = str(ROOT / said[key])
    config = dataclasses.replace(TrainingConfig.from_record(said | places), learning_rate=1e-7)
    LoRATrainer(config, Emitter()).train()
    grid = tmp_path / "grid"
    options = ["--base", places["base_model"], "--lora", str(tmp_path / "run"), "--trigger", "zkb"]
    options += ["--prompts", str(out / "prompts.json"), "--resolution=256", "--out", str(grid)]
    options += [f"--{key}={document['generate'][key]}" for key in ("seeds", "steps", "guidance")]
    tool("generate", *options)
    train = ["--train", places["dataset_path"], "--vision", str(eyes)]
    assert "No LoRA here does anything that can be seen" in tool("evaluate", str(grid), *train)
    result = verdict(grid / "eval.json")
    assert result["does_nothing"] == [arm["arm"] for arm in result["arms"][1:]]


def tool(name: str, *options: str) -> str:
    """Run a program as a person does; return what it says."""
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *options]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
