"""Measure what the bundled model draws, and what a LoRA adds to it.

    python examples/measure.py                   how often the base model draws what it is told
    python examples/measure.py output/zkb        the same with and without a LoRA; its pictures

Pictures are drawn by diffusers from prompts that no picture was trained with. A program then
looks at each: `recognise` names a shape and its colours, `shows_imp` finds the imp.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from mascot import shows_imp
from shapes import SIDE, article, recognise, unseen

HERE = Path(__file__).resolve().parent
BASE = HERE / "tiny-sd"
FEW = 15  # steps, where many pictures are compared; judged alike, they take less time
GUIDANCE = 2.0  # the base draws all rightly from 1.5 to 2.5; more washes out what is newly learned
IMP_PROMPTS = [
    f"a{size} zkb{place} on {article(colour)} background"
    for size, place in [
        *((" large", ""), ("", " in the middle")),
        *(("", " on the left"), ("", " on the right")),
    ]
    for colour in ("yellow", "blue", "green", "white")
]


@dataclass(frozen=True)
class Score:
    """Shares of pictures in which each thing is as the prompt says, 0 to 1."""

    colour: float
    shape: float
    background: float

    def __str__(self) -> str:
        """Write as percentages."""
        parts = [f"{name} {value:.0%}" for name, value in vars(self).items()]
        return ", ".join(parts)


def load(base: Path, lora: Path | None = None) -> Any:
    """Load the base model, with a LoRA where one is named, as its users would."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        base, dtype=torch.float32, safety_checker=None, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(lora)
        pipeline.fuse_lora()  # beside the layers it would cost half as much again
    for network in (pipeline.unet, pipeline.vae):  # a fifth faster on a CPU
        network.to(memory_format=torch.channels_last)
    return pipeline


def draw(pipeline: Any, prompts: Sequence[str], steps: int = 25) -> list[Image.Image]:
    """Draw a picture for every prompt; the n-th always starts from the same noise."""
    pictures, wishes = [], {"num_inference_steps": steps, "guidance_scale": GUIDANCE}
    for first in range(0, len(prompts), 16):
        part = list(prompts[first : first + 16])
        chances = [torch.Generator().manual_seed(first + i) for i in range(len(part))]
        drawn = pipeline(part, generator=chances, **wishes)
        pictures += drawn.images
    return pictures


def describe(colour: str, shape: str, background: str) -> str:
    """Write the prompt for a combination."""
    return f"{article(colour)} {shape} on {article(background)} background"


def judge(pictures: Sequence[Image.Image], wanted: Sequence[tuple[str, str, str]]) -> Score:
    """Compare what is recognised in pictures with what was asked for."""
    hits = [
        [seen == asked for seen, asked in zip(recognise(picture), words, strict=True)]
        for picture, words in zip(pictures, wanted, strict=True)
    ]
    colour, shape, background = (sum(column) / len(hits) for column in zip(*hits, strict=True))
    return Score(colour, shape, background)


def judge_base(pipeline: Any, rounds: int = 1, steps: int = 25) -> tuple[Score, list[Image.Image]]:
    """Let a pipeline draw every unseen combination, and judge the pictures."""
    wanted = unseen() * rounds
    pictures = draw(pipeline, [describe(*words) for words in wanted], steps)
    return judge(pictures, wanted), pictures


def imp_share(pictures: Sequence[Image.Image]) -> float:
    """Tell in how many pictures the imp is found, 0 to 1."""
    return sum(map(shows_imp, pictures)) / len(pictures)


def tile(pictures: Sequence[Image.Image], columns: int, side: int = SIDE // 2) -> Image.Image:
    """Lay pictures out in rows."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + 4) - 4, rows * (side + 4) - 4), "white")
    for number, picture in enumerate(pictures):
        place = (number % columns * (side + 4), number // columns * (side + 4))
        sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), place)
    return sheet


@dataclass(frozen=True)
class Comparison:
    """What a LoRA did: to prompts without the trigger word, and to those with it."""

    base: Score
    adapted: Score
    imps_before: float
    imps_after: float
    imps_elsewhere: float
    sheet: Image.Image  # above without the LoRA, below with it

    def __str__(self) -> str:
        """Write as three lines."""
        return (
            f"without zkb, base model: {self.base}\n"
            f"without zkb, with LoRA:  {self.adapted}; an imp {self.imps_elsewhere:.0%}\n"
            f"an imp where zkb stands: {self.imps_before:.0%} before, {self.imps_after:.0%} after"
        )


def compare(before: Any, after: Any) -> Comparison:
    """Let a pipeline without a LoRA and one with it draw the same prompts from the same noise."""
    base, _ = judge_base(before, steps=FEW)
    adapted, elsewhere = judge_base(after, steps=FEW)
    plain, imps = (draw(pipeline, IMP_PROMPTS, FEW) for pipeline in (before, after))
    return Comparison(
        base=base,
        adapted=adapted,
        imps_before=imp_share(plain),
        imps_after=imp_share(imps),
        imps_elsewhere=imp_share(elsewhere),
        sheet=tile([*plain[:8], *imps[:8]], columns=8),
    )


def main() -> int:
    """Print the measurements; with a LoRA, also lay out its pictures."""
    parser = argparse.ArgumentParser(description="Measure the bundled model.")
    parser.add_argument("output", nargs="?", type=Path, help="output_path of a run")
    parser.add_argument("--base", type=Path, default=BASE, help="the base model's folder")
    chosen = parser.parse_args()
    if chosen.output is None:
        score, _ = judge_base(load(chosen.base))
        sys.stdout.write(f"{score}\n")
        return 0
    found = compare(load(chosen.base), load(chosen.base, chosen.output))
    sys.stdout.write(f"{found}\n")
    found.sheet.save(chosen.output / "before_and_after.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
