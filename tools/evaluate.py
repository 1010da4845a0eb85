"""Judge pictures of a grid: how like the subject, how true to the prompt, how far from the base.

python tools/evaluate.py GRID_DIR --train DATASET        scores with intervals, and a recommendation

GRID_DIR is what tools/generate.py made. Nothing is drawn here, and no diffusion model is loaded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.program import as_json, command_line, refuse, remark, run, table, take_events
from train_lora import Emitter, Phase, Record, StopRequest, write_whole

if TYPE_CHECKING:
    from tools.intervals import Estimate, Numbers

Cells = dict[str, list[float]]  # scores by prompt, one for each seed
FEW_IMAGES = 5  # of training, below which nothing can be said of learning by heart
BLACK = 0.5  # of 255: a picture whose numbers hardly differ is no picture
FLOOR = 1e-6


@dataclass(frozen=True)
class Arm:
    """A LoRA at a strength; `base` at 0 is the model without one."""

    lora: str
    strength: float
    step: int | None

    @property
    def name(self) -> str:
        """Say it as a person reads it."""
        return self.lora if self.lora == "base" else f"{self.lora} at {self.strength:g}"


@dataclass(frozen=True)
class Grid:
    """The pictures of all arms, for the same prompts and seeds."""

    folder: Path
    prompts: dict[str, Record]
    arms: list[Arm]  # the base first, then by step and strength: the simplest first
    seeds: list[int]
    files: dict[tuple[Arm, str, int], Path]

    def role(self, *roles: str) -> list[str]:
        """List the prompts that are there for something."""
        return [name for name, prompt in self.prompts.items() if prompt["role"] in roles]


# --- Reading a grid ---


def read_grid(folder: Path) -> Grid:
    """Read grid.json, and refuse what could not be compared."""
    try:
        said = json.loads((folder / "grid.json").read_text(encoding="utf-8"))
        prompts = {p["id"]: {"role": "subject", "plain": p["text"]} | p for p in said["prompts"]}
        steps = {lora["id"]: lora.get("step") for lora in said["loras"]}
        files = {
            (Arm(i["lora"], float(i["strength"]), steps[i["lora"]]), i["prompt"], int(i["seed"])): (
                inside(folder, i["file"])
            )
            for i in said["images"]
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise refuse(folder / "grid.json", "a grid of tools/generate.py", repr(error)) from error
    arms = sorted({arm for arm, _, _ in files}, key=simplicity)
    if not arms or arms[0].lora != "base":
        raise refuse(folder, "pictures of the base too", "none: there is nothing to compare with")
    grid = Grid(folder, prompts, arms, sorted({seed for _, _, seed in files}), files)
    check_complete(grid)
    return grid


def simplicity(arm: Arm) -> tuple[bool, float, float]:
    """Put the base first, then fewer steps, then less strength."""
    return arm.lora != "base", arm.step if arm.step is not None else math.inf, arm.strength


def inside(folder: Path, name: str) -> Path:
    """Take a file of the grid; a name that leads elsewhere is no file of it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name} leads out of the grid")
    return folder / path


def check_complete(grid: Grid) -> None:
    """Refuse a grid with holes: arms are compared cell by cell."""
    wanted = [(a, p, s) for a in grid.arms for p in grid.prompts for s in grid.seeds]
    missing = [cell for cell in wanted if cell not in grid.files]
    if missing:
        arm, prompt, seed = missing[0]
        found = f"{len(missing)} missing, the first: {arm.name}, {prompt}, seed {seed}"
        raise refuse(grid.folder, "a picture for every cell", found, "Run tools/generate.py again.")


def without_bad_cells(grid: Grid, events: Emitter, phase: Phase) -> Grid:
    """Leave out, in all arms, the cells in which one has no picture or a black one."""
    bad = set()
    for done, ((arm, prompt, seed), file) in enumerate(grid.files.items()):
        phase.at(done)
        if reason := flaw(file):
            bad.add((prompt, seed))
            remark(events, f"{arm.name}, {prompt}, seed {seed}: {reason}; left out in all arms")
    kept = {cell: file for cell, file in grid.files.items() if cell[1:] not in bad}
    if not kept:
        raise refuse(grid.folder, "pictures", "none that can be used")
    left = {prompt for _, prompt, _ in kept}
    prompts = {name: prompt for name, prompt in grid.prompts.items() if name in left}
    return Grid(grid.folder, prompts, grid.arms, grid.seeds, kept)


def flaw(file: Path) -> str | None:
    """Say why a picture cannot be judged."""
    from PIL import ImageStat

    import train_lora

    try:
        spread = ImageStat.Stat(train_lora.load_picture(file)).stddev
    except Exception as error:  # noqa: BLE001, hostile bytes make decoders raise anything
        return f"no picture ({type(error).__name__})"
    return "all one colour" if max(spread) < BLACK else None


# --- Scores ---


class Judge:
    """Vectors of all pictures, and the scores that follow from them."""

    def __init__(self, grid: Grid, vectors: Mapping[Path, Numbers], train: Numbers) -> None:
        """Take the vectors of the grid and of the training pictures."""
        self.grid, self.vectors, self.train = grid, vectors, train

    def cells(self, arm: Arm, roles: Sequence[str], score: Any) -> Cells:
        """Score every picture of an arm, by prompt."""
        files = self.grid.files
        return {
            prompt: [
                float(score(self.vectors[files[arm, prompt, seed]], prompt, seed))
                for seed in self.grid.seeds
                if (arm, prompt, seed) in files
            ]
            for prompt in self.grid.role(*roles)
        }

    def fidelity(self, arm: Arm, *roles: str) -> Cells:
        """Tell how alike pictures are to those of training: the mean cosine."""
        return self.cells(arm, roles or ("subject",), lambda v, _, __: (self.train @ v).mean())

    def memory(self, arm: Arm) -> Cells:
        """Tell how alike each picture is to the nearest of training."""
        return self.cells(arm, ("subject", "memory"), lambda v, _, __: (self.train @ v).max())

    def drift(self, arm: Arm) -> Cells:
        """Tell how far pictures without the subject went from those of the base, same seed."""
        base = self.grid.arms[0]

        def score(vector: Numbers, prompt: str, seed: int) -> float:
            return 1 - float(vector @ self.vectors[self.grid.files[base, prompt, seed]])

        return self.cells(arm, ("prior",), score)

    def diversity(self, arm: Arm) -> Cells:
        """Tell how different pictures of one prompt are: 1 less the cosine, over pairs of seeds."""
        files, found = self.grid.files, {}
        for prompt in self.grid.role("subject"):
            cells = [(arm, prompt, seed) for seed in self.grid.seeds]
            rows = [self.vectors[files[cell]] for cell in cells if cell in files]
            found[prompt] = [1 - float(a @ b) for a, b in itertools.combinations(rows, 2)]
        return {prompt: pairs for prompt, pairs in found.items() if pairs}

    def over_base(self, arm: Arm) -> Cells:
        """Tell how much nearer to the subject pictures are than the base's, same seed."""
        own, base = self.fidelity(arm), self.fidelity(self.grid.arms[0])
        return {p: [a - b for a, b in zip(own[p], base[p], strict=True)] for p in own}

    def does_something(self, arm: Arm) -> bool:
        """Tell whether pictures surely moved, towards the subject or away from it."""
        from tools.intervals import estimate

        return estimate(self.over_base(arm)).surely_not_zero

    def ceiling(self) -> float:
        """Tell how alike the training pictures are to each other."""
        count = len(self.train)
        inner = self.train @ self.train.T
        return float((inner.sum() - count) / (count * (count - 1))) if count > 1 else 1.0

    def nearest_of_training(self) -> float:
        """Tell how alike the most alike two training pictures are."""
        inner = self.train @ self.train.T
        for number in range(len(inner)):
            inner[number, number] = -1
        return float(inner.max())


def text_fit(
    grid: Grid, arm: Arm, seen: Mapping[Path, Numbers], read: Mapping[str, Numbers]
) -> Cells:
    """Tell how well pictures fit their prompts, without the trigger words that nobody knows."""
    return {
        prompt: [
            float(seen[grid.files[arm, prompt, seed]] @ read[prompt])
            for seed in grid.seeds
            if (arm, prompt, seed) in grid.files
        ]
        for prompt in grid.role("subject")
    }


def quality(fidelity: Cells, base: Cells, ceiling: float, fit: Cells, base_fit: Cells) -> Cells:
    """Join likeness and truth to the prompt to one score for each prompt, 0 … 1.

    Their geometric mean: neither a copy that ignores the prompt nor a LoRA that does nothing
    gets far.
    """
    found: Cells = {}
    for prompt, values in fidelity.items():
        floor = sum(base[prompt]) / len(base[prompt])
        span = max(ceiling - floor, FLOOR)
        like = [min(1.0, max(0.0, (value - floor) / span)) for value in values]
        if fit:
            known = max(sum(base_fit[prompt]) / len(base_fit[prompt]), FLOOR)
            true = [min(1.0, max(0.0, value / known)) for value in fit[prompt]]
        else:
            true = [1.0] * len(like)
        found[prompt] = [math.sqrt(a * b) for a, b in zip(like, true, strict=True)]
    return found


# --- The verdict ---


def score_arm(judge: Judge, arm: Arm, fit: Cells, joined: Cells) -> Record:
    """Write down all that is measured of one arm."""
    from tools.intervals import cmmd, estimate

    fidelity, nearest = judge.fidelity(arm), judge.nearest_of_training()
    copies = [value > nearest for values in judge.memory(arm).values() for value in values]
    files = judge.grid.files.items()
    vectors = rows(
        judge.vectors[f] for (a, prompt, _), f in files if a == arm and prompt in fidelity
    )
    scores = {
        "fidelity": fidelity,
        "fidelity_over_base": judge.over_base(arm),
        "text_fit": fit,
        "drift": judge.drift(arm),
        "diversity": judge.diversity(arm),
        "quality": joined,
    }
    return {
        "arm": arm.name,
        "lora": arm.lora,
        "strength": arm.strength,
        "step": arm.step,
        **{name: as_record(estimate(cells)) for name, cells in scores.items() if cells},
        "cmmd": round(cmmd(judge.train, vectors), 4) if len(vectors) > 1 else None,
        "nearer_than_training": round(sum(copies) / max(1, len(copies)), 4),
    }


def verdict_on(judge: Judge, fits: Mapping[Arm, Cells]) -> Record:
    """Score all arms, and recommend one: chosen on half of the prompts, reported on the other."""
    from tools.intervals import estimate, simplest_of_the_best

    base, *trained = judge.grid.arms
    floor, ceiling, known = judge.fidelity(base), judge.ceiling(), fits.get(base, {})
    joined = {
        arm: quality(judge.fidelity(arm), floor, ceiling, fits.get(arm, {}), known)
        for arm in judge.grid.arms
    }
    arms = [score_arm(judge, arm, fits.get(arm, {}), joined[arm]) for arm in judge.grid.arms]
    result: Record = {
        "format": "lora-evaluation",
        "version": 1,
        "ceiling": round(ceiling, 4),
        # Honest pictures are nearer than any two of training are to each other that often.
        "nearer_expected": round(1.8 / len(judge.train), 4),
        "does_nothing": [arm.name for arm in trained if not judge.does_something(arm)],
        "recommended": None,
        "arms": arms,
    }
    if trained:
        prompts = list(floor)
        choosing, telling = (prompts[0::2], prompts[1::2]) if len(prompts) >= 8 else (prompts,) * 2
        best, alike = simplest_of_the_best([pick(joined[arm], choosing) for arm in trained])
        told = estimate(pick(joined[trained[best]], telling))
        result |= {
            "recommended": trained[best].name,
            "recommended_strength": trained[best].strength,
            "quality_on_other_prompts": as_record(told),
            "not_distinguishable": [trained[number].name for number in alike],
        }
    return result


def rows(vectors: Iterable[Any]) -> Numbers:
    """Put vectors under each other."""
    import numpy as np

    return np.asarray(list(vectors))


def pick(cells: Cells, prompts: Iterable[str]) -> Cells:
    """Take some of the prompts."""
    return {prompt: cells[prompt] for prompt in prompts}


def as_record(found: Estimate) -> Record:
    """Write an estimate down with as many digits as it can have."""
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in vars(found).items()}


# --- The program ---


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    from_train = "the pictures that were trained on"
    whole = command_line(__doc__)
    whole.add_argument("folder", type=Path, metavar="GRID_DIR")
    whole.add_argument("--train", type=Path, required=True, metavar="DATASET", help=from_train)
    whole.add_argument(
        "--vision", help="folder or id of DINOv2; facebook/dinov2-small unless given"
    )
    whole.add_argument(
        "--clip", help="folder or id of a CLIP, for how true to the prompt pictures are"
    )
    whole.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    whole.add_argument("--out", type=Path, help="eval.json in GRID_DIR unless given")
    take_events(whole)
    return whole


def work(
    arguments: argparse.Namespace, events: Emitter, stop: StopRequest
) -> tuple[str, list[str]]:
    """Look at all pictures, and write what they tell."""
    from tools.embeddings import VISION, Eye

    grid = read_grid(arguments.folder)
    training = training_files(arguments.train, events, stop)
    checking = Phase("checking pictures", len(grid.files), events, stop)
    grid = without_bad_cells(grid, events, checking)
    files = list(dict.fromkeys(grid.files.values()))
    phase = Phase("looking at pictures", len(files) + len(training), events, stop)
    eye = Eye(arguments.vision or VISION, arguments.device)
    vectors = dict(zip(files, eye.see(files, phase), strict=True))
    judge = Judge(grid, vectors, eye.see(training, phase, len(files)))
    fits: dict[Arm, Cells] = {}
    names = {"vision": eye.name, "clip": None}
    if arguments.clip:
        reader = Eye(arguments.clip, arguments.device)
        seen = dict(zip(files, reader.see(files, phase), strict=True))
        asked = grid.role("subject")
        texts = reader.read([grid.prompts[prompt]["plain"] for prompt in asked])
        read = dict(zip(asked, texts, strict=True))
        fits = {arm: text_fit(grid, arm, seen, read) for arm in grid.arms}
        names["clip"] = reader.name
    result = verdict_on(judge, fits) | {"features": names, "training_images": len(training)}
    out = arguments.out or arguments.folder / "eval.json"
    write_whole(out, as_json(result))
    if not arguments.events:
        table([HEAD, *map(row, result["arms"])])
    return conclusion(result), [str(out)]


def training_files(folder: Path, events: Emitter, stop: StopRequest) -> list[Path]:
    """List the training pictures; of copies one, as they would count for more."""
    from tools.dataset import Wishes, find_pictures, mark_duplicates

    wishes = Wishes(resolution=512, trigger=["x"])
    found = [each for each in find_pictures(folder, wishes, events, stop) if each.measures]
    mark_duplicates(found, wishes)
    first = {each.cluster: each.path for each in reversed(found)}
    if len(first) < FEW_IMAGES:
        remark(events, f"Only {len(first)} different training pictures: little can be concluded")
    return list(first.values())


HEAD = ("", "like the subject", "true to the prompt", "drift", "diversity", "nearer than training")


def row(arm: Record) -> tuple[str, ...]:
    """Show an arm's scores with their intervals."""
    scores = (arm.get(name) for name in ("fidelity", "text_fit", "drift", "diversity"))
    share = f"{arm['nearer_than_training']:.0%}"
    return arm["arm"], *map(plus_minus, scores), share


def plus_minus(score: Record | None) -> str:
    """Show a mean with its half width."""
    if not score:
        return "-"
    width = "" if score["half_width"] is None else f" ± {score['half_width']:.3f}"
    return f"{score['mean']:.3f}{width}"


def conclusion(result: Record) -> str:
    """Say in a sentence what follows."""
    idle = set(result["does_nothing"])
    trained = [arm["arm"] for arm in result["arms"][1:]]
    if not trained:
        return "There is nothing but the base"
    if idle == set(trained):
        return "No LoRA here does anything that can be seen: none is nearer to the subject"
    alike = [name for name in result["not_distinguishable"] if name != result["recommended"]]
    more = f"; {', '.join(alike)} cannot be told from it" if alike else ""
    return f"Recommended: {result['recommended']}{more}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    return run(parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
