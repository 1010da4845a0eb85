"""Scores of pictures from what models see in them: likeness, truth to the prompt, drift, copies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.intervals import Numbers, estimate, higher_share, leading_share

if TYPE_CHECKING:
    from tools.grid import Arm, Grid
    from train_lora import Record

Cells = dict[str, list[float]]  # scores by prompt, one for each seed
FEW_IMAGES = 5  # of training or held back, below which nothing can be said of learning by heart
FLOOR = 1e-6
NOTHING = 0.02  # of the way from the base to the training pictures: less is no use to anybody
NEARER = 1.8  # divided by the number of training pictures: honest pictures that look like copies


@dataclass(frozen=True)
class Seen:
    """What a model sees, as vectors of length one; and what it reads, if it does."""

    pictures: Mapping[Path, Numbers]
    train: Numbers  # [training pictures, size]
    heldout: Numbers | None = None
    texts: Mapping[str, Numbers] | None = None  # by prompt, without trigger words


class Judge:
    """The scores of every arm of a grid; what all of them need is computed once."""

    def __init__(
        self,
        grid: Grid,
        vision: Seen,
        clip: Seen | None = None,
        class_word: str | None = None,
        copies: Mapping[Arm, list[Record]] | None = None,
    ) -> None:
        """Compare all pictures with those of training; `copies` were found by their pixels."""
        self.grid, self.vision, self.clip, self.class_word = grid, vision, clip, class_word
        self.copies = copies or {}
        self.base = grid.arms[0]
        self.subject, self.others = grid.role("subject"), grid.prior(class_word, with_it=False)
        self.likeness, self.nearest = compare(vision)
        self.clip_likeness = compare(clip)[0] if clip else {}
        inner = vision.train @ vision.train.T
        count = len(inner)
        pairs = max(1, count * (count - 1))
        self.ceiling = float((inner.sum() - np.trace(inner)) / pairs) if count > 1 else 1.0
        self.closest = float((inner - 2 * np.eye(count)).max())

    def cells(
        self, arm: Arm, prompts: Sequence[str], score: Callable[[Path, str, int], float]
    ) -> Cells:
        """Score every picture of an arm, by prompt."""
        files = self.grid.files
        return {
            prompt: [
                score(files[arm, prompt, seed], prompt, seed)
                for seed in self.grid.seeds
                if (arm, prompt, seed) in files
            ]
            for prompt in prompts
        }

    def fidelity(self, arm: Arm, prompts: Sequence[str] | None = None) -> Cells:
        """Tell how alike pictures are to those of training: the mean cosine."""
        asked = self.subject if prompts is None else prompts
        return self.cells(arm, asked, lambda file, _, __: self.likeness[file])

    def clip_fidelity(self, arm: Arm) -> Cells:
        """Tell the same by CLIP, for comparing with what others publish."""
        prompts = self.subject if self.clip else []
        return self.cells(arm, prompts, lambda file, _, __: self.clip_likeness[file])

    def text_fit(self, arm: Arm) -> Cells:
        """Tell how well pictures fit their prompts, without the trigger words nobody knows."""
        if self.clip is None or self.clip.texts is None:
            return {}
        pictures, texts = self.clip.pictures, self.clip.texts
        return self.cells(arm, self.subject, lambda file, p, _: float(pictures[file] @ texts[p]))

    def memory(self, arm: Arm, *roles: str) -> Cells:
        """Tell how alike each picture is to the nearest of training."""
        prompts = self.grid.role(*(roles or ("subject", "memory")))
        return self.cells(arm, prompts, lambda file, _, __: self.nearest[file])

    def drift(self, arm: Arm, prompts: Sequence[str]) -> Cells:
        """Tell how far pictures went from those of the base, same seed."""
        files, seen = self.grid.files, self.vision.pictures
        return self.cells(
            arm, prompts, lambda file, p, s: 1 - float(seen[file] @ seen[files[self.base, p, s]])
        )

    def leak(self, arm: Arm) -> Cells:
        """Tell how much nearer to the subject pictures of its class went that should not."""
        return self.above_base(lambda each: self.fidelity(each, self.of_class), arm)

    @property
    def of_class(self) -> list[str]:
        """List the prompts of the subject's class, without the subject."""
        return self.grid.prior(self.class_word, with_it=True)

    def diversity(self, arm: Arm, prompts: Sequence[str] | None = None) -> Cells:
        """Tell how different pictures of one prompt are: 1 less the cosine, over pairs of seeds."""
        files, found = self.grid.files, {}
        for prompt in self.subject if prompts is None else prompts:
            cells = [(arm, prompt, seed) for seed in self.grid.seeds]
            rows = [self.vision.pictures[files[cell]] for cell in cells if cell in files]
            found[prompt] = [1 - float(a @ b) for a, b in itertools.combinations(rows, 2)]
        return {prompt: pairs for prompt, pairs in found.items() if pairs}

    def above_base(self, score: Callable[[Arm], Cells], arm: Arm) -> Cells:
        """Tell by how much a score is above the base's, same prompt and seed."""
        own, base = score(arm), score(self.base)
        return {p: [a - b for a, b in zip(own[p], base[p], strict=True)] for p in own}

    def way(self) -> float:
        """Tell how far it is from the base's pictures to those of training."""
        base = self.fidelity(self.base)
        return max(FLOOR, self.ceiling - estimate(base).mean) if base else FLOOR

    def does_something(self, arm: Arm) -> bool | None:
        """Tell whether pictures surely moved, to the subject or away; None where too few tell."""
        if not self.subject:
            return None
        moved = estimate(self.above_base(self.fidelity, arm))
        if moved.half_width is None:
            return None
        return moved.surely_not_zero and abs(moved.mean) >= NOTHING * self.way()

    def quality(self, arm: Arm) -> Cells:
        """Join likeness and truth to the prompt to one score for each prompt, 0 … 1."""
        floor, known = self.fidelity(self.base), self.text_fit(self.base)
        return quality(self.fidelity(arm), floor, self.ceiling, self.text_fit(arm), known)

    def copying(self, arm: Arm) -> Record | None:
        """Tell what speaks for learning by heart; None where too few training pictures tell.

        Honest pictures too are sometimes nearer to one of training than any two of those are to
        each other: that share is told beside the observed one, and how far chance may go beyond.
        """
        cells = self.memory(arm)
        if not cells or len(self.vision.train) < FEW_IMAGES:
            return None
        flat = [value > self.closest for values in cells.values() for value in values]
        share, expected = sum(flat) / len(flat), NEARER / len(self.vision.train)
        band = leading_share(1 / expected - 1, len(cells))
        return {
            "nearer_than_training": round(share, 4),
            "expected": round(expected, 4),
            "by_chance_at_most": round(band, 4),
            "alarm": share > band,
            **self.beside_heldout(cells),
        }

    def beside_heldout(self, cells: Cells) -> Record:
        """Tell whether pictures are nearer to those of training than pictures held back are."""
        held = self.vision.heldout
        if held is None or len(held) < FEW_IMAGES:
            return {}
        nearest = (held @ self.vision.train.T).max(1)
        share, chance = higher_share([sum(v) / len(v) for v in cells.values()], nearest.tolist())
        return {"above_heldout": round(share, 4), "above_heldout_p": round(chance, 4)}


def compare(seen: Seen) -> tuple[dict[Path, float], dict[Path, float]]:
    """Tell how alike each picture is to those of training: on average, and to the nearest."""
    files = list(seen.pictures)
    alike = np.asarray([seen.pictures[file] for file in files]) @ seen.train.T
    mean, most = (
        dict(zip(files, each.tolist(), strict=True)) for each in (alike.mean(1), alike.max(1))
    )
    return mean, most


def quality(fidelity: Cells, base: Cells, ceiling: float, fit: Cells, base_fit: Cells) -> Cells:
    """Join likeness and truth to the prompt to one score for each prompt, said for each seed.

    Their geometric mean: neither a copy that ignores the prompt nor a LoRA that does nothing
    gets far. Means are taken before they are cut off: of noise about zero, half would count.
    """
    found: Cells = {}
    for prompt, values in fidelity.items():
        floor = mean_of(base[prompt])
        like = (mean_of(values) - floor) / max(ceiling - floor, FLOOR)
        true = mean_of(fit[prompt]) / max(mean_of(base_fit[prompt]), FLOOR) if fit else 1.0
        joined = math.sqrt(min(1.0, max(0.0, like)) * min(1.0, max(0.0, true)))
        found[prompt] = [joined] * len(values)
    return found


def mean_of(values: Sequence[float]) -> float:
    """Average."""
    return sum(values) / len(values)


def rows_of(judge: Judge, arm: Arm) -> tuple[Numbers, list[str]]:
    """Put the vectors of an arm's pictures of the subject under each other, with their prompts."""
    cells: list[tuple[Any, str]] = [
        (judge.vision.pictures[file], prompt)
        for (each, prompt, _), file in judge.grid.files.items()
        if each == arm and prompt in judge.subject
    ]
    return np.asarray([vector for vector, _ in cells]), [prompt for _, prompt in cells]
