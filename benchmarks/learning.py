"""Measure what a LoRA learns per update, and what it forgets.

    python benchmarks/learning.py run [--recipes NAME …] [--concepts …] [--seeds …]
    python benchmarks/learning.py table                         what learning.jsonl has, as tables

A run teaches the bundled model one of six concepts (`concepts.py`) from twelve pictures, by
train_lora.py as its users start it, or by the textbook loop (`reference.py`). One judge measures
the LoRAs of both: the loss on pictures that neither was trained on, at fixed noise and times; the
share of pictures, on backgrounds that were held out, in which every part is right; and how far
pictures of other things moved. learning.jsonl has a line per run; what is there is not run again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn import functional

import concepts
import measure
from concepts import CONCEPTS, TRIGGER, Concept
from shapes import unseen

if TYPE_CHECKING:
    from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PICTURES, HELD_BACK, TIMES = 12, 8, 8
TEXTBOOK = "textbook"
MAIN = [TEXTBOOK, "quarter, 2e-3", "example"]  # what all concepts and three seeds are run with
RESULTS = ROOT / "benchmarks" / "learning.jsonl"


@dataclass(frozen=True)
class Recipe:
    """How to train: so many updates with knobs of the config."""

    steps: int
    knobs: dict[str, Any] = field(default_factory=dict)


BASE: dict[str, Any] = {"batch_size": 4, "lora_rank": 8, "lora_alpha": 8, "learning_rate": 1e-3}
COSINE = {"lr_scheduler": "cosine"}
ALL = {"lora_targets": "all"}
KNOWN = {"regularization_path": str(ROOT / "examples" / "regularization")}
QUARTER = COSINE | ALL | KNOWN | {"train_text_encoder": True, "regularization_share": 0.25}
EXAMPLE = QUARTER | {"learning_rate": 2e-3}  # as example_config.json has it, with 200 steps
PRODIGY = {"optimizer": "prodigy", "learning_rate": 1.0}
RECIPES = {
    TEXTBOOK: Recipe(300),
    "same": Recipe(300),
    "half": Recipe(150),
    "defaults": Recipe(
        1000, {"batch_size": 1, "lora_rank": 16, "lora_alpha": 32, "learning_rate": 1e-4}
    ),
    "cosine": Recipe(150, COSINE),
    "ema": Recipe(150, {"ema_decay": 0.98}),
    "cosine, ema": Recipe(150, COSINE | {"ema_decay": 0.98}),
    "rate 2e-3": Recipe(150, COSINE | {"learning_rate": 2e-3}),
    "rank 32": Recipe(150, COSINE | {"lora_rank": 32, "lora_alpha": 32}),
    "rslora 32": Recipe(150, COSINE | {"lora_rank": 32, "lora_alpha": 32, "use_rslora": True}),
    "lora+": Recipe(150, COSINE | {"lora_plus_ratio": 4}),
    "with mlp": Recipe(150, COSINE | {"lora_targets": "attention-mlp"}),
    "all": Recipe(150, COSINE | ALL),
    "all, 100": Recipe(100, COSINE | ALL),
    "all, rank 2": Recipe(150, COSINE | ALL | {"lora_rank": 2, "lora_alpha": 2}),
    "all, ema": Recipe(150, COSINE | ALL | {"ema_decay": 0.98}),
    "all, 2e-3": Recipe(150, COSINE | ALL | {"learning_rate": 2e-3}),
    "all, 5e-4": Recipe(150, COSINE | ALL | {"learning_rate": 5e-4}),
    "all, text encoder": Recipe(150, COSINE | ALL | {"train_text_encoder": True}),
    "text encoder": Recipe(150, COSINE | {"train_text_encoder": True}),
    "all, regularization": Recipe(150, COSINE | ALL | KNOWN),
    "all, text encoder, regularization": Recipe(
        150, COSINE | ALL | KNOWN | {"train_text_encoder": True}
    ),
    "quarter": Recipe(150, QUARTER),
    "quarter, 2e-3": Recipe(150, EXAMPLE),
    "quarter, rank 32": Recipe(150, QUARTER | {"lora_rank": 32, "lora_alpha": 32}),
    "example": Recipe(200, EXAMPLE),
    "example, 600": Recipe(600, EXAMPLE),
    "example, 4e-3": Recipe(200, EXAMPLE | {"learning_rate": 4e-3}),
    "example, batch 2": Recipe(400, EXAMPLE | {"batch_size": 2, "learning_rate": 1.4e-3}),
    "example, batch 8": Recipe(300, EXAMPLE | {"batch_size": 8}),
    "example, rank 32": Recipe(200, EXAMPLE | {"lora_rank": 32, "lora_alpha": 32}),
    "example, noisy times": Recipe(200, EXAMPLE | {"timestep_sampling": "cubic"}),
    "example, prodigy": Recipe(200, EXAMPLE | PRODIGY),
    "all, min-snr": Recipe(150, COSINE | ALL | {"snr_gamma": 5}),
    "all, noisy times": Recipe(150, COSINE | ALL | {"timestep_range": [300, 1000]}),
    "all, caption dropout": Recipe(150, COSINE | ALL | {"caption_dropout": 0.1}),
    "all, dropout": Recipe(150, COSINE | ALL | {"lora_dropout": 0.1}),
    "all, batch 8": Recipe(75, COSINE | ALL | {"batch_size": 8}),
    "all, batch 1": Recipe(600, COSINE | ALL | {"batch_size": 1, "learning_rate": 5e-4}),
    "all, prodigy": Recipe(150, COSINE | ALL | PRODIGY),
    "all, dora": Recipe(150, COSINE | ALL | {"adapter": "dora"}),
    "all, loha": Recipe(150, COSINE | ALL | {"adapter": "loha"}),
    "all, lokr": Recipe(150, COSINE | ALL | {"adapter": "lokr"}),
}


# --- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One run of the study."""

    recipe: str
    concept: str
    seed: int


def write_dataset(concept: Concept, seed: int, folder: Path) -> None:
    """Draw what a run is trained on, a caption beside each picture."""
    chance = random.Random(seed)
    seen = [b for b in concept.backgrounds if b not in concept.held_out]
    for number, case in enumerate(concepts.cases(concept, seen, PICTURES, seed)):
        path = folder / f"{number:02d}.png"
        concepts.draw(concept, case, chance).save(path)
        path.with_suffix(".txt").write_text(concept.caption(case), "utf-8")


def train(task: Task, data: Path, folder: Path) -> Path:
    """Train as a user does; return the folder of the LoRA."""
    recipe = RECIPES[task.recipe]
    if task.recipe == TEXTBOOK:
        script = [ROOT / "benchmarks" / "reference.py", measure.BASE, data, "--save", folder]
        options = [("steps", recipe.steps), ("batch", BASE["batch_size"]), ("seed", task.seed)]
        options += [("rank", BASE["lora_rank"]), ("rate", BASE["learning_rate"])]
        flags = [part for name, value in options for part in (f"--{name}", value)]
        command = [*script, *flags]
    else:
        config = {
            "dataset_path": str(data),
            "base_model": str(measure.BASE),
            "output_path": str(folder),
            "trigger_words": [TRIGGER],
            "resolution": 256,
            "seed": task.seed,
            "steps": recipe.steps,
            "checkpoint_steps": recipe.steps,
            "validation_steps": recipe.steps,
            "sample_prompts": [],
            **BASE,
            **recipe.knobs,
        }
        path = data / "config.json"
        path.write_text(json.dumps(config), "utf-8")
        command = [ROOT / "train_lora.py", "--config", path]
    ended = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise SystemExit(f"{task} failed:\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}")
    return folder


# --- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wish:
    """How many pictures are to be drawn and judged, and where they are to be seen."""

    pictures: int
    sheet: Path | None = None


@functools.cache
def base_model() -> Any:
    """Load the bundled model once per process."""
    return measure.load(measure.BASE)


def held_out_loss(pipeline: Any, concept: Concept, backgrounds: list[str]) -> float:
    """Ask of new pictures at fixed noise and times, as training asks."""
    every = concepts.cases(concept, backgrounds, HELD_BACK, 1000)
    latents = encode([concepts.draw(concept, c, random.Random(f"{c}")) for c in every])
    words = [concept.caption(case) for case in every]
    prompt_embeds = pipeline.encode_prompt(words, "cpu", 1, do_classifier_free_guidance=False)[0]
    schedule: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
    chance, losses = torch.Generator().manual_seed(0), []
    for number in range(TIMES):
        times = torch.full((len(latents),), int((number + 0.5) / TIMES * len(schedule)))
        noise = torch.randn(latents.shape, generator=chance)
        noisy, wanted = (
            schedule.add_noise(latents, noise, times),
            schedule.get_velocity(latents, noise, times),
        )
        losses.append(
            functional.mse_loss(pipeline.unet(noisy, times, prompt_embeds).sample, wanted)
        )
    return float(torch.stack(losses).mean())


def encode(pictures: Sequence[Image.Image]) -> Tensor:
    """Turn pictures into latents, [pictures, 4, height / 8, width / 8]."""
    vae = base_model().vae
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    values = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    latents: Tensor = vae.encode(values).latent_dist.mean * vae.config.scaling_factor
    return latents


def draw_concept(pipeline: Any, concept: Concept, wish: Wish) -> list[bool]:
    """Draw the concept on backgrounds that no training picture has, and judge each picture."""
    every = concepts.cases(concept, concept.held_out, wish.pictures, 2000)
    pictures = measure.draw(pipeline, [concept.caption(case) for case in every])
    if wish.sheet:
        measure.tile(pictures, columns=8).save(wish.sheet)
    return [concepts.is_right(concept, *pair) for pair in zip(every, pictures, strict=True)]


def other_pictures(pipeline: Any, count: int) -> list[Image.Image]:
    """Draw what the base model knows, without the trigger word."""
    chosen = unseen()[:: len(unseen()) // count][:count]
    return measure.draw(pipeline, [measure.describe(*words) for words in chosen])


@functools.cache
def base_pictures(count: int) -> list[Image.Image]:
    """Draw them once without any LoRA."""
    return other_pictures(base_model(), count)


def drift(pictures: Sequence[Image.Image]) -> float:
    """Tell by how much pixels differ from the base model's, 0 to 1."""
    pairs = zip(pictures, base_pictures(len(pictures)), strict=True)
    return statistics.mean(
        float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean()) / 255
        for a, b in pairs
    )


@torch.no_grad()
def judge(folder: Path | None, concept: Concept, wish: Wish) -> dict[str, float]:
    """Measure the base model, with a LoRA where one is given."""
    pipeline = measure.load(measure.BASE, lora_file(folder)) if folder else base_model()
    seen = [b for b in concept.backgrounds if b not in concept.held_out]
    return {
        "loss": held_out_loss(pipeline, concept, seen),
        "loss_held_out": held_out_loss(pipeline, concept, concept.held_out),
        "right": statistics.mean(draw_concept(pipeline, concept, wish)),
        "drift": drift(other_pictures(pipeline, wish.pictures)),
    }


def lora_file(folder: Path) -> Path:
    """Find the LoRA that a run left."""
    return next(iter(folder.glob("*.safetensors")))


# --- the study -----------------------------------------------------------------------------------


def run_task(task: Task, wish: Wish) -> dict[str, Any]:
    """Train and measure one run."""
    concept, steps = CONCEPTS[task.concept], RECIPES[task.recipe].steps
    with tempfile.TemporaryDirectory() as scratch:
        data, folder = Path(scratch) / "data", Path(scratch) / "out"
        data.mkdir()
        write_dataset(concept, task.seed, data)
        began = time.monotonic()
        train(task, data, folder)
        seconds = time.monotonic() - began
        return asdict(task) | {"steps": steps, "seconds": seconds} | judge(folder, concept, wish)


def one_thread() -> None:
    """Let the processes of the study share the cores."""
    torch.set_num_threads(1)


def run(tasks: Iterable[Task], results: Path, jobs: int, wish: Wish) -> None:
    """Run what is not there yet, and add a line for each run as soon as it is known."""
    done = {Task(row["recipe"], row["concept"], row["seed"]) for row in read(results)}
    os.environ["OMP_NUM_THREADS"] = "1"  # of the trainings, which are processes of their own
    with ProcessPoolExecutor(jobs, initializer=one_thread) as pool:
        begun = [
            pool.submit(run_task, task, sheet_of(task, wish)) for task in tasks if task not in done
        ]
        for number, ended in enumerate(as_completed(begun), start=1):
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(ended.result()) + "\n")
            sys.stderr.write(f"{number} of {len(begun)}: {ended.result()}\n")


def sheet_of(task: Task, wish: Wish) -> Wish:
    """Name the sheet of a run, where its folder is given."""
    name = "_".join(map(str, (task.recipe, task.concept, task.seed)))
    sheet = wish.sheet / f"{name.replace(',', '').replace(' ', '-')}.png" if wish.sheet else None
    return Wish(wish.pictures, sheet)


def read(results: Path) -> list[dict[str, Any]]:
    """Read the lines of a study; none where there is no file."""
    if not results.is_file():
        return []
    return [json.loads(line) for line in results.read_text("utf-8").splitlines()]


def interval(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Write a mean with its 95 percent interval."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {1.96 * statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def recipes_of(rows: list[dict[str, Any]]) -> list[str]:
    """Name the recipes of some runs, in the order they have above."""
    return [recipe for recipe in RECIPES if any(row["recipe"] == recipe for row in rows)]


def table(rows: list[dict[str, Any]]) -> str:
    """Write a line per recipe: means, and what they are off from the same runs of the textbook."""
    off = "off the textbook's"
    columns = ["recipe", "updates", "runs", "loss", off, "loss, new backgrounds", off]
    columns += ["every part right", "drift", off]
    lines = [f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    known = {(r["concept"], r["seed"]): r for r in rows if r["recipe"] == TEXTBOOK}
    for recipe in recipes_of(rows):
        mine = [row for row in rows if row["recipe"] == recipe]
        pairs = [(row, known.get((row["concept"], row["seed"]))) for row in mine]
        cells = [recipe, str(mine[0]["steps"]), str(len(mine))]
        for name in ("loss", "loss_held_out", "right", "drift"):
            mean = statistics.mean(row[name] for row in mine)
            cells.append(f"{mean:.0%}" if name == "right" else f"{mean:.3f}")
            gaps = [row[name] - other[name] for row, other in pairs if other]
            if name != "right":
                cells.append(interval(gaps, 3, "+") if gaps and recipe != TEXTBOOK else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def by_concept(rows: list[dict[str, Any]]) -> str:
    """Write a line per concept and recipe."""
    lines = [
        "| concept | recipe | runs | loss | loss, new backgrounds | every part right | drift |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for concept, recipe in itertools.product(CONCEPTS, recipes_of(rows)):
        mine = [r for r in rows if (r["concept"], r["recipe"]) == (concept, recipe)]
        if mine:
            means = [
                statistics.mean(r[n] for r in mine) for n in ("loss", "loss_held_out", "drift")
            ]
            right = f"{statistics.mean(r['right'] for r in mine):.0%}"
            first, second, drifted = (f"{mean:.3f}" for mean in means)
            cells = [concept, recipe, str(len(mine)), first, second, right, drifted]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Run the study, or write its tables."""
    parser = argparse.ArgumentParser(description="Measure what a LoRA learns per update.")
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=MAIN)
    parser.add_argument("--concepts", nargs="+", choices=CONCEPTS, default=[*CONCEPTS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=16, help="drawn per run and judged")
    parser.add_argument("--sheets", type=Path, help="folder for these pictures")
    given = parser.parse_args()
    if given.command == "run":
        every = itertools.product(given.recipes, given.seeds, given.concepts)
        tasks = [Task(recipe, concept, seed) for recipe, seed, concept in every]
        run(tasks, given.results, given.jobs, Wish(given.pictures, given.sheets))
    rows = read(given.results)
    chosen = [row for row in rows if row["recipe"] in given.recipes]
    sys.stdout.write(f"{table(rows)}\n\n{by_concept(chosen)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
