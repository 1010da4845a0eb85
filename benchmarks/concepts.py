"""Six concepts that the bundled model does not know: drawn with captions, and judged again.

    python benchmarks/concepts.py FOLDER          a sheet of each, right and wrong drawings

Each is called zkb. Two backgrounds are held out: no picture of a dataset has them. A picture counts
as right when it is like the concept's drawing in each of its colours, and less like every drawing
with one thing wrong.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from shapes import PALETTE, SIDE, article, bounds, draw_shape, name_colours

TRIGGER = "zkb"
NUMBERS = {colour: number for number, colour in enumerate(PALETTE)}
SHAPES = ("circle", "square", "triangle", "cross", "star")  # a ring has no inside to be filled
SIZES = {"small": 60.0, "": 80.0, "large": 100.0}  # pixels from the middle to the edge
PLACED = 120.0  # the same of a concept that fills the picture
STRIPES = 5
LIKENESS = 0.4  # the least overlap of each colour; real drawings reach 0.8 after the VAE
LOOK = 64  # pixels of the side at which pictures are compared


@dataclass(frozen=True)
class Layer:
    """A shape of a drawing; place and reach are shares of the drawing's own reach."""

    shape: str
    colours: tuple[str, ...]
    reach: float = 1.0
    at: tuple[float, float] = (0.0, 0.0)
    pattern: str = "plain"


@dataclass(frozen=True)
class Case:
    """What the caption says of one picture."""

    background: str
    shape: str
    colour: str
    size: str = ""


@dataclass(frozen=True)
class Concept:
    """Something to be learned: its drawing, drawings with one thing wrong, and its words."""

    name: str
    draw: Callable[[Case], list[Layer]]
    wrong: Callable[[Case], list[list[Layer]]]
    words: str  # what a caption says before the background
    colours: tuple[str, ...]  # its own, which no background has
    placed: bool = False  # whether the place in the picture belongs to it

    @property
    def backgrounds(self) -> list[str]:
        """List the colours that are not its own."""
        return [colour for colour in PALETTE if colour not in self.colours]

    @property
    def held_out(self) -> list[str]:
        """Name the backgrounds of no training picture."""
        return self.backgrounds[-2:]

    def caption(self, case: Case) -> str:
        """Say what a picture shows."""
        words = self.words.format(zkb=TRIGGER, **vars(case)).split()
        return f"{article(' '.join(words))} on {article(case.background)} background"


# --- the six -------------------------------------------------------------------------------------


def nested(_case: Case) -> list[Layer]:
    """Three shapes, each within the one before."""
    parts = (("square", "green", 1.0), ("circle", "white", 0.72), ("triangle", "red", 0.4))
    return [Layer(shape, (colour,), reach) for shape, colour, reach in parts]


def nested_wrongly(case: Case) -> list[list[Layer]]:
    """Leave one out, or change a shape or two colours."""
    square, circle, triangle = nested(case)
    return [
        [square, circle],
        [square, replace(triangle, reach=0.6)],
        [replace(square, shape="circle"), circle, triangle],
        [square, replace(circle, colours=("red",)), replace(triangle, colours=("white",))],
    ]


def striped(_case: Case) -> list[Layer]:
    """A disc with stripes that lie."""
    return [Layer("circle", ("black", "yellow"), pattern="stripes")]


def striped_wrongly(case: Case) -> list[list[Layer]]:
    """Let the stripes stand, be two, or be none; or stripe a square."""
    (disc,) = striped(case)
    return [
        [replace(disc, pattern="upright stripes")],
        [replace(disc, pattern="halves")],
        [replace(disc, pattern="plain")],
        [replace(disc, shape="square")],
        [replace(disc, colours=disc.colours[::-1])],
    ]


def pair(_case: Case) -> list[Layer]:
    """A star and, on its right, a ring."""
    left, right = (-0.55, 0.0), (0.55, 0.0)
    return [Layer("star", ("red",), 0.45, left), Layer("ring", ("blue",), 0.45, right)]


def pair_wrongly(case: Case) -> list[list[Layer]]:
    """Leave one out, exchange places or colours, or change a shape."""
    star, ring = pair(case)
    return [
        [star],
        [ring],
        [replace(star, at=ring.at), replace(ring, at=star.at)],
        [replace(star, colours=("blue",)), replace(ring, colours=("red",))],
        [replace(star, shape="square"), ring],
        [star, replace(ring, shape="square")],
    ]


def halved(case: Case) -> list[Layer]:
    """Any shape, blue above and orange below."""
    return [Layer(case.shape, ("blue", "orange"), pattern="halves")]


def halved_wrongly(case: Case) -> list[list[Layer]]:
    """Exchange the halves, let them stand, leave one out, or take another shape."""
    (layer,) = halved(case)
    return [
        [replace(layer, colours=("orange", "blue"))],
        [replace(layer, pattern="upright halves")],
        [replace(layer, pattern="plain")],
        [replace(layer, pattern="plain", colours=("orange",))],
        *([replace(layer, shape=shape)] for shape in SHAPES if shape != case.shape),
    ]


def rimmed(case: Case) -> list[Layer]:
    """Any shape of any colour with a broad black rim."""
    return [Layer(case.shape, ("black",)), Layer(case.shape, (case.colour,), 0.6)]


def rimmed_wrongly(case: Case) -> list[list[Layer]]:
    """Leave out the rim or the colour, exchange them, or take another shape."""
    rim, inside = rimmed(case)
    return [
        [replace(rim, colours=(case.colour,))],
        [rim],
        [replace(rim, colours=(case.colour,)), replace(inside, colours=("black",))],
        *(
            [replace(rim, shape=shape), replace(inside, shape=shape)]
            for shape in SHAPES
            if shape != case.shape
        ),
    ]


def cornered(case: Case) -> list[Layer]:
    """Any shape, whichever, in the upper left corner, a white dot in the lower right one."""
    thing = Layer(case.shape, (case.colour,), 0.45, (-0.5, -0.5))
    return [thing, Layer("circle", ("white",), 0.2, (0.6, 0.6))]


def cornered_wrongly(case: Case) -> list[list[Layer]]:
    """Leave out one of the two, or let it be elsewhere."""
    thing, dot = cornered(case)
    return [
        [thing],
        [dot],
        [replace(thing, at=(0.0, 0.0)), dot],
        [replace(thing, at=(0.5, -0.5)), dot],
        [thing, replace(dot, at=(-0.6, 0.6))],
        [replace(thing, at=dot.at), replace(dot, at=thing.at)],
    ]


SIZED, SHAPED, COLOURED = "{size} {zkb}", "{size} {zkb} {shape}", "{size} {zkb} {colour} {shape}"
CONCEPTS = {
    concept.name: concept
    for concept in (
        Concept("nested", nested, nested_wrongly, SIZED, ("green", "white", "red")),
        Concept("texture", striped, striped_wrongly, SIZED, ("black", "yellow")),
        Concept("pair", pair, pair_wrongly, "{zkb}", ("red", "blue"), placed=True),
        Concept("two colours", halved, halved_wrongly, SHAPED, ("blue", "orange")),
        Concept("style", rimmed, rimmed_wrongly, COLOURED, ("black",)),
        Concept(
            "position",
            cornered,
            cornered_wrongly,
            "{zkb} {colour} {shape}",
            ("white",),
            placed=True,
        ),
    )
}


# --- drawing -------------------------------------------------------------------------------------


def cases(concept: Concept, backgrounds: list[str], count: int, seed: int) -> list[Case]:
    """Think up so many pictures: backgrounds, shapes and sizes in turn, colours by chance."""
    chance = random.Random(f"{concept.name} {seed}")
    sizes = [*SIZES] if "{size}" in concept.words else [""]
    shapes = chance.sample(SHAPES, len(SHAPES))
    found = []
    for number in range(count):
        background = backgrounds[number % len(backgrounds)]
        colours = [c for c in PALETTE if c not in (background, *concept.colours)]
        shape, size = shapes[number % len(shapes)], sizes[number // 2 % len(sizes)]
        found.append(Case(background, shape, chance.choice(colours), size))
    return found


def draw(concept: Concept, case: Case, chance: random.Random) -> Image.Image:
    """Draw a case, a little elsewhere and a little larger or smaller each time."""
    reach = (PLACED if concept.placed else SIZES[case.size]) * chance.uniform(0.96, 1.04)
    room = max(SIDE / 2 - reach - 6, 2.0)
    x, y = (SIDE / 2 + chance.uniform(-room, room) * 0.4 for _ in "xy")
    return paint(concept.draw(case), case.background, (x, y), reach)


def paint(
    layers: list[Layer],
    background: str,
    middle: tuple[float, float] = (SIDE / 2, SIDE / 2),
    reach: float = 100.0,
) -> Image.Image:
    """Paint layers over each other, twice as large and then halved, which smooths edges."""
    picture = Image.new("RGB", (2 * SIDE, 2 * SIDE), PALETTE[background])
    for layer in layers:
        x, y = (m + share * reach for m, share in zip(middle, layer.at, strict=True))
        mask = Image.new("RGB", picture.size)
        draw_shape(mask, layer.shape, (255, 255, 255), (x, y), layer.reach * reach, 2)
        box = (x - layer.reach * reach, y - layer.reach * reach, 2 * layer.reach * reach)
        picture.paste(fill(layer, box), mask=mask.convert("L"))
    return picture.reduce(2)


def fill(layer: Layer, box: tuple[float, float, float]) -> Image.Image:
    """Fill a picture as a layer is to be filled, whose left, top and width are given."""
    left, top, width = box
    picture = Image.new("RGB", (2 * SIDE, 2 * SIDE), PALETTE[layer.colours[0]])
    if layer.pattern == "plain":
        return picture
    pen, count = ImageDraw.Draw(picture), STRIPES if "stripes" in layer.pattern else 2
    across = layer.pattern.startswith("upright")
    for number in range(1, count, 2):
        ends = [2 * ((left if across else top) + width * (number + n) / count) for n in (0, 1)]
        box_of_stripe = (
            (ends[0], 0, ends[1], 2 * SIDE) if across else (0, ends[0], 2 * SIDE, ends[1])
        )
        pen.rectangle(box_of_stripe, fill=PALETTE[layer.colours[1]])
    return picture


# --- judging -------------------------------------------------------------------------------------


def is_right(concept: Concept, case: Case, picture: Image.Image) -> bool:
    """Tell whether a picture shows what its caption says, every part of it."""
    layers, background = concept.draw(case), case.background
    colours = sorted({NUMBERS[colour] for layer in layers for colour in layer.colours})
    seen = look(picture, background, concept.placed)
    known, *others = (
        overlaps(seen, shown(tuple(each), background, concept.placed), colours)
        for each in (layers, *concept.wrong(case))
    )
    return min(known) >= LIKENESS and all(sum(known) > sum(other) for other in others)


def look(picture: Image.Image, background: str, placed: bool) -> np.ndarray | None:
    """Name the colours of what is not background, stretched to a square; None is nothing."""
    numbers = name_colours(picture.filter(ImageFilter.MedianFilter(5)).reduce(2))
    box = (0, 0, *numbers.shape[::-1]) if placed else bounds(numbers != NUMBERS[background])
    if box is None:
        return None
    cut = Image.fromarray(numbers.astype(np.uint8)).crop(box)
    return np.asarray(cut.resize((LOOK, LOOK), Image.Resampling.NEAREST))


@functools.cache
def shown(layers: tuple[Layer, ...], background: str, placed: bool) -> np.ndarray | None:
    """Look at a drawing as at a picture."""
    return look(
        paint(list(layers), background, reach=PLACED if placed else 100.0), background, placed
    )


def overlaps(seen: np.ndarray | None, known: np.ndarray | None, colours: list[int]) -> list[float]:
    """Tell how much two pictures have in common, for each colour from 0 to 1."""
    if seen is None or known is None:
        return [0.0]
    pairs = [(seen == n, known == n) for n in colours]
    return [float((a & b).sum() / max((a | b).sum(), 1)) for a, b in pairs]


def sheet(concept: Concept) -> Image.Image:
    """Lay out drawings of a concept, and below each one the wrong ones."""
    every = cases(concept, concept.backgrounds, 6, 0)
    chance = random.Random(0)
    columns = [
        [draw(concept, c, chance), *(paint(w, c.background) for w in concept.wrong(c))]
        for c in every
    ]
    picture = Image.new("RGB", (len(columns) * 132, max(map(len, columns)) * 132), "white")
    for x, column in enumerate(columns):
        for y, drawn in enumerate(column):
            picture.paste(drawn.resize((128, 128)), (x * 132, y * 132))
    return picture


if __name__ == "__main__":
    for each in CONCEPTS.values():
        sheet(each).save(Path(sys.argv[1]) / f"{each.name.replace(' ', '_')}.png")
