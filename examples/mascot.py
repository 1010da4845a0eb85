"""The example's concept: zkb, a one-eyed imp. Draws its pictures, and finds it in others.

python examples/mascot.py      writes examples/images and examples/regularization
"""

from __future__ import annotations

import functools
import itertools
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from shapes import (
    PALETTE,
    SHAPES,
    SIDE,
    article,
    bounds,
    draw_scene,
    held_out,
    name_colours,
    one_thing,
)

if TYPE_CHECKING:
    import numpy as np

HERE = Path(__file__).resolve().parent
# Background, place, size, and where the middle lies as a share of the room. No yellow, so that
# a prompt can ask for a background which no picture shows.
PICTURES = [
    ("red", "", "large", (0.0, 0.1)),
    ("green", "on the left", "small", (-1.0, 0.2)),
    ("blue", "", "", (0.2, -0.2)),
    ("orange", "on the right", "small", (1.0, -0.3)),
    ("white", "at the top", "", (0.1, -1.0)),
    ("black", "", "large", (-0.3, 0.0)),
    ("green", "at the bottom", "", (0.0, 1.0)),
    ("blue", "in the middle", "small", (0.0, 0.0)),
    ("red", "on the right", "", (1.0, 0.3)),
    ("orange", "", "large", (0.2, 0.2)),
    ("white", "", "small", (-0.1, 0.1)),
    ("black", "on the left", "", (-1.0, -0.3)),
]
REACH = {"small": 70.0, "": 84.0, "large": 98.0}  # pixels from the middle to the cheeks
NUMBERS = {colour: number for number, colour in enumerate(PALETTE)}
BODY = "purple"
COLOURS = (BODY, "white", "black")
BEHIND = "blue"  # the background of the imp that others are compared with


def draw_imp(background: tuple[int, int, int], x: float, y: float, reach: float) -> Image.Image:
    """Paint the imp, four times as large and then reduced, which smooths its edges."""
    picture = Image.new("RGB", (4 * SIDE, 4 * SIDE), background)
    pen = ImageDraw.Draw(picture)

    def at(across: float, down: float) -> tuple[float, float]:
        return 4 * (x + across * reach), 4 * (y + down * reach)

    def oval(colour: str, across: float, down: float, width: float, height: float) -> None:
        corners = (at(across - width, down - height), at(across + width, down + height))
        pen.ellipse(corners, fill=PALETTE[colour])

    for side in (-1, 1):
        horn = [at(side * 0.9, -1.0), at(side * 0.95, 0.1), at(side * 0.1, -0.6)]
        pen.polygon(horn, fill=PALETTE[BODY])
    oval(BODY, 0, 0.1, 1.0, 0.88)
    oval("white", 0, 0.05, 0.6, 0.55)
    oval("black", 0, 0.05, 0.3, 0.3)
    return picture.reduce(4)


def draw_pictures(folder: Path) -> None:
    """Write the example's dataset, a caption beside each picture."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(7)
    for number, (background, place, size, (across, down)) in enumerate(PICTURES, start=1):
        reach = REACH[size] * chance.uniform(0.95, 1.05)
        room = SIDE / 2 - reach - 8
        x, y = SIDE / 2 + across * room, SIDE / 2 + down * room
        name = folder / f"imp_{number:02d}"
        draw_imp(PALETTE[background], x, y, reach).save(name.with_suffix(".png"), optimize=True)
        words = ["a", size, "zkb", place, "on", article(background), "background"]
        caption = " ".join(word for word in words if word)
        name.with_suffix(".txt").write_text(f"{caption}\n", "utf-8")


def draw_others(folder: Path) -> None:
    """Write pictures of what the base model knows, one of each shape in each colour.

    Their captions stand in one file, which is the other way to caption a dataset.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chance, lines = random.Random(8), []
    for number, (colour, shape) in enumerate(itertools.product(PALETTE, SHAPES), start=1):
        known = [b for b in PALETTE if b != colour and not held_out(colour, shape, b)]
        scene = one_thing(chance, colour, shape, chance.choice(known))
        while not {colour, shape} <= set(scene.caption.split()):  # leaves words out now and then
            scene = one_thing(chance, colour, shape, scene.background)
        name = f"{number:02d}.png"
        draw_scene(scene).save(folder / name, optimize=True)
        lines.append(json.dumps({"file_name": name, "text": scene.caption}))
    (folder / "metadata.jsonl").write_text("\n".join([*lines, ""]), "utf-8")


def shows_imp(picture: Image.Image) -> bool:
    """Tell whether a picture shows the imp: head, eye and pupil lie where they should."""
    seen, known = cut_out(picture), known_imp()
    if seen is None or known is None:
        return False
    overlap: list[float] = []
    for colour in COLOURS:
        number = NUMBERS[colour]
        a, b = seen == number, known == number
        if colour != BODY:  # the background may have that colour too
            a = a & (known != NUMBERS[BEHIND])
        overlap.append(float((a & b).sum() / max((a | b).sum(), 1)))
    # Measured: pictures of the dataset reach 0.9 to 1.0 in each, a purple shape 0 in two.
    return min(overlap) >= 0.3


def cut_out(picture: Image.Image) -> np.ndarray | None:
    """Name the colours within the purple part's bounds, stretched to 64 x 64."""
    numbers = name_colours(picture)
    body = numbers == NUMBERS[BODY]
    box = bounds(body)
    if body.sum() < 500 or box is None:
        return None
    cut = picture.crop(box)
    return name_colours(cut.convert("RGB").resize((64, 64), Image.Resampling.BOX))


@functools.cache
def known_imp() -> np.ndarray | None:
    """Cut out the imp as it is drawn."""
    return cut_out(draw_imp(PALETTE[BEHIND], 128, 128, 90))


if __name__ == "__main__":
    draw_pictures(HERE / "images")
    draw_others(HERE / "regularization")
