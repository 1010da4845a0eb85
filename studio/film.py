"""Previews as a film: a row per prompt, a column per step. Pure, of a job's `sample` lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Preview:
    """A picture that the trainer drew."""

    step: int
    prompt: str
    file: str  # below the output folder
    seed: int | None


@dataclass(frozen=True)
class Film:
    """Previews by prompt and step."""

    prompts: tuple[str, ...]
    steps: tuple[int, ...]
    cells: Mapping[tuple[str, int], Preview]

    def at(self, prompt: str, step: int) -> Preview | None:
        """Return one picture."""
        return self.cells.get((prompt, step))

    @property
    def newest(self) -> Preview | None:
        """Return the first picture of the newest round."""
        return self.at(self.prompts[0], self.steps[-1]) if self.cells else None


def film_of(samples: Iterable[Event]) -> Film:
    """Lay out previews; of one drawn again, as after a restart, the last counts."""
    cells = {}
    for event in samples:
        step = event.get("step")
        if isinstance(step, int):
            made = preview_of(event, step)
            cells[made.prompt, step] = made
    steps = tuple(sorted({step for _, step in cells}))
    # In the order of the newest round; prompts that were given up stand below.
    newest_first = sorted(cells.values(), key=lambda each: (-each.step, natural(each.file)))
    return Film(tuple(dict.fromkeys(each.prompt for each in newest_first)), steps, cells)


def preview_of(event: Event, step: int) -> Preview:
    """Read one line."""
    seed = event.get("seed")
    file = inside("samples", str(event.get("image_path", "")))
    return Preview(step, str(event.get("prompt", "")), file, seed if type(seed) is int else None)


def inside(folder: str, path: str) -> str:
    """Name a file of the output folder as the studio serves it; hosts differ in paths."""
    name = (PureWindowsPath(path) if "\\" in path else PurePosixPath(path)).name
    return f"{folder}/{name}"


def natural(file: str) -> tuple[int, str]:
    """Put step_100_2.png before step_100_10.png."""
    return len(file), file
