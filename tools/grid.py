"""The pictures of tools/generate.py as a table of cells, for whoever compares them."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tools.program import refuse, remark
from train_lora import NOT_JSON, Emitter, Phase, Record, load_picture

BLACK = 0.5  # of 255: a picture whose numbers hardly differ is no picture


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
    settings: Record = field(default_factory=dict)

    def role(self, *roles: str) -> list[str]:
        """List the prompts that are there for something."""
        return [name for name, prompt in self.prompts.items() if prompt["role"] in roles]

    def prior(self, class_word: str | None, *, with_it: bool) -> list[str]:
        """List the prompts without the subject: those of its class, or all the others."""
        word = rf"\b{re.escape(class_word)}\b" if class_word else r"(?!)"
        found = self.role("prior")
        return [
            name
            for name in found
            if bool(re.search(word, self.prompts[name]["plain"], re.IGNORECASE)) is with_it
        ]


def read_grid(folder: Path) -> Grid:
    """Read grid.json, and refuse what could not be compared."""
    listed = folder / "grid.json"
    if not listed.is_file():
        found = "a folder without grid.json" if folder.is_dir() else "no such folder"
        hint = "Draw it with tools/generate.py, to its end."
        raise refuse(folder, "a grid of tools/generate.py", found, hint)
    try:
        said = json.loads(listed.read_text(encoding="utf-8"))
        prompts = {p["id"]: {"role": "subject", "plain": p["text"]} | p for p in said["prompts"]}
        steps = {lora["id"]: lora.get("step") for lora in said["loras"]}
        files = {
            (Arm(i["lora"], float(i["strength"]), steps[i["lora"]]), i["prompt"], int(i["seed"])): (
                inside(folder, i["file"])
            )
            for i in said["images"]
        }
        settings = {"base": said.get("base"), **said.get("settings", {})}
    except (OSError, LookupError, *NOT_JSON) as error:
        raise refuse(listed, "a grid of tools/generate.py", repr(error)) from error
    arms = sorted({arm for arm, _, _ in files}, key=simplicity)
    if not arms or arms[0].lora != "base":
        raise refuse(folder, "pictures of the base too", "none: there is nothing to compare with")
    seeds = sorted({seed for _, _, seed in files})
    grid = Grid(folder, prompts, arms, seeds, files, settings)
    check_complete(grid)
    return grid


def simplicity(arm: Arm) -> tuple[bool, float, float, str]:
    """Put the base first, then fewer steps, then less strength; names only for a fixed order."""
    step = arm.step if arm.step is not None else math.inf
    return arm.lora != "base", step, arm.strength, arm.lora


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


def join(grids: Sequence[Grid]) -> Grid:
    """Put grids beside each other whose pictures were asked for alike; the first one's base counts.

    Arms of one name in two grids are told apart by their folders.
    """
    first, files = grids[0], dict(grids[0].files)
    told = Counter(arm.name for grid in grids for arm in grid.arms)
    for number, grid in enumerate(grids):
        texts = [{n: p["text"] for n, p in g.prompts.items()} for g in (first, grid)]
        for what, one, other in (
            ("prompts", *texts),
            ("seeds", first.seeds, grid.seeds),
            ("settings", first.settings, grid.settings),
        ):
            if one != other:
                found = f"others than in {first.folder.name}"
                raise refuse(grid.folder, f"a grid of the same {what}", found)
        for (arm, prompt, seed), file in grid.files.items():
            if arm.lora == "base" and number:
                continue
            twice = arm.lora != "base" and told[arm.name] > 1
            name = f"{grid.folder.resolve().name}/{arm.lora}" if twice else arm.lora
            if not number and twice:
                del files[arm, prompt, seed]
            files[dataclasses.replace(arm, lora=name), prompt, seed] = file
    arms = sorted({arm for arm, _, _ in files}, key=simplicity)
    return dataclasses.replace(first, arms=arms, files=files)


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
    return dataclasses.replace(grid, prompts=prompts, files=kept)


def flaw(file: Path) -> str | None:
    """Say why a picture cannot be judged."""
    from PIL import ImageStat

    try:
        spread = ImageStat.Stat(load_picture(file)).stddev
    except Exception as error:  # noqa: BLE001, hostile bytes make decoders raise anything
        return f"no picture ({type(error).__name__})"
    return "all one colour" if max(spread) < BLACK else None
