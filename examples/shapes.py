"""Pictures of coloured shapes: drawn with their captions, and recognised again.

`build_tiny_sd.py` trains the bundled model on them, and judges by them what it draws.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
Point = tuple[float, float]

SIDE = 256  # pixels
PALETTE: dict[str, Colour] = {
    "red": (220, 40, 45),
    "orange": (245, 145, 35),
    "yellow": (250, 225, 60),
    "green": (45, 165, 75),
    "blue": (45, 90, 215),
    "purple": (145, 65, 180),
    "white": (250, 250, 250),
    "black": (25, 25, 30),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
# What is not named is of middling size and in the middle: a caption leaves little open, so that a
# small model learns it in minutes.
SIZES = {"small": (42, 50), "": (62, 70), "large": (84, 92)}  # middle to edge, in pixels
PLACES = {"on the left": (-1, 0), "on the right": (1, 0), "at the top": (0, -1)}
PLACES |= {"at the bottom": (0, 1), "in the middle": (0, 0), "": (0, 0)}


@dataclass(frozen=True)
class Thing:
    """One shape in a picture; x, y and reach in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    reach: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows, and the words for it."""

    caption: str
    background: str
    things: tuple[Thing, ...]


# --- captions and what they mean -----------------------------------------------------------------


def held_out(colour: str, shape: str, background: str) -> bool:
    """Tell the combinations that no training picture shows, one in seven."""
    names = list(PALETTE)
    number = names.index(colour) + 2 * SHAPES.index(shape) + 3 * names.index(background)
    return number % 7 == 0


def unseen() -> list[tuple[str, str, str]]:
    """List the combinations of colour, shape and background that training left out."""
    every = itertools.product(PALETTE, SHAPES, PALETTE)
    return [(c, s, b) for c, s, b in every if c != b and held_out(c, s, b)]


def article(words: str) -> str:
    """Put a or an in front."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def invent_scene(chance: random.Random) -> Scene:
    """Think up one picture: mostly one thing, else two of them, side by side or nested."""
    background, colour, other = chance.sample(sorted(PALETTE), 3)
    shape, second = chance.choice(SHAPES), chance.choice(SHAPES)
    if held_out(colour, shape, background) or held_out(other, second, background):
        return invent_scene(chance)
    ending = f"on {article(background)} background"
    kind = chance.random()
    if kind < 0.8:
        return one_thing(chance, colour, shape, background)
    if kind < 0.9:
        caption = f"{article(colour)} {shape} and {article(other)} {second} {ending}"
        return Scene(caption, background, side_by_side(chance, (colour, shape), (other, second)))
    caption = f"{article(colour)} {shape} with {article(other)} {second} {ending}"
    return Scene(caption, background, nested(chance, (colour, shape), (other, second)))


def one_thing(chance: random.Random, colour: str, shape: str, background: str) -> Scene:
    """Describe a single thing; its size, place and kind are not always named."""
    size, place = chance.choice([*SIZES]), chance.choice([*PLACES, "", ""])
    reach, (across, down) = chance.uniform(*SIZES[size]), PLACES[place]
    room = SIDE / 2 - reach - 6
    x, y = (SIDE / 2 + side * room + chance.uniform(-5, 5) for side in (across, down))
    # A word without meaning stands for any shape, so that new words are free to be learned.
    name = nonsense(chance) if chance.random() < 0.06 else shape
    words = " ".join(word for word in (size, colour, name) if word)
    if name != shape and chance.random() < 0.7:
        words = name
    parts = [article(words), place, f"on {article(background)} background"]
    caption = " ".join(part for part in parts if part)
    return Scene(caption, background, (Thing(colour, shape, x, y, reach),))


def nonsense(chance: random.Random) -> str:
    """Make up a word of three or four letters."""
    return "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(3, 4)))


def side_by_side(
    chance: random.Random, left: tuple[str, str], right: tuple[str, str]
) -> tuple[Thing, ...]:
    """Place two things beside each other."""
    y = SIDE / 2 + chance.uniform(-8, 8)
    places = (SIDE * 0.27, SIDE * 0.73)
    return tuple(
        Thing(*thing, x + chance.uniform(-5, 5), y, chance.uniform(44, 52))
        for thing, x in zip((left, right), places, strict=True)
    )


def nested(
    chance: random.Random, outer: tuple[str, str], inner: tuple[str, str]
) -> tuple[Thing, ...]:
    """Place a small thing on a large one."""
    x, y = (SIDE / 2 + chance.uniform(-5, 5) for _ in "xy")
    reach = chance.uniform(86, 94)
    return Thing(*outer, x, y, reach), Thing(*inner, x, y, reach * chance.uniform(0.38, 0.44))


# --- drawing -------------------------------------------------------------------------------------


def draw_scene(scene: Scene) -> Image.Image:
    """Paint a picture, twice as large and then halved, which smooths its edges."""
    picture = Image.new("RGB", (2 * SIDE, 2 * SIDE), PALETTE[scene.background])
    for thing in scene.things:
        draw_shape(picture, thing.shape, PALETTE[thing.colour], (thing.x, thing.y), thing.reach, 2)
    return picture.reduce(2)


def draw_shape(
    picture: Image.Image, shape: str, colour: Colour, middle: Point, reach: float, scale: float
) -> None:
    """Paint one shape."""
    pen = ImageDraw.Draw(picture)
    x, y, r = middle[0] * scale, middle[1] * scale, reach * scale
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=round(r * 0.36))
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "cross":
        arm = r * 0.34
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=colour)
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=colour)
    else:
        pen.polygon([(x + r * a, y + r * b) for a, b in corners(shape)], fill=colour)


def corners(shape: str) -> list[Point]:
    """Give the corners of a triangle or a star of reach 1."""
    if shape == "triangle":
        return [(0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)]
    turns = [(i * math.pi / 5, 0.42 if i % 2 else 1.0) for i in range(10)]
    return [(math.sin(turn) * reach, -math.cos(turn) * reach) for turn, reach in turns]


def draw_clutter(chance: random.Random) -> Image.Image:
    """Paint shapes of any colour over each other: the VAE must know more than the palette."""

    def any_colour() -> Colour:
        return chance.randrange(256), chance.randrange(256), chance.randrange(256)

    colours = [any_colour() for _ in range(8)] + chance.sample(list(PALETTE.values()), 4)
    picture = Image.new("RGB", (2 * SIDE, 2 * SIDE), chance.choice(colours))
    for _ in range(chance.randint(4, 14)):
        middle, reach = (chance.uniform(0, SIDE), chance.uniform(0, SIDE)), chance.uniform(5, 90)
        draw_shape(picture, chance.choice(SHAPES), chance.choice(colours), middle, reach, 2)
    return picture.reduce(2)


# --- recognising ---------------------------------------------------------------------------------


def name_colours(picture: Image.Image) -> np.ndarray:
    """Give every pixel the number of the palette's nearest colour."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    palette = np.array(list(PALETTE.values()), dtype=np.float32)
    distance = ((pixels[:, :, None] - palette) ** 2).sum(axis=3)
    nearest: np.ndarray = distance.argmin(axis=2)
    return nearest


def recognise(picture: Image.Image) -> tuple[str, str, str]:
    """Say the colour and shape of the largest thing in a picture, and its background."""
    names = list(PALETTE)
    numbers = name_colours(picture)
    edge = np.ones(numbers.shape, dtype=bool)
    edge[8:-8, 8:-8] = False
    background = np.bincount(numbers[edge], minlength=len(names)).argmax()
    inside = numbers[numbers != background]
    if inside.size < 300:
        return "", "", names[background]
    colour = np.bincount(inside, minlength=len(names)).argmax()
    return names[colour], nearest_shape(numbers == colour), names[background]


def bounds(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Find left, top, right and bottom of what is set, but for stray pixels."""
    rows, columns = (np.flatnonzero(mask.sum(axis=axis) > 2) for axis in (1, 0))
    if not rows.size or not columns.size:
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def nearest_shape(mask: np.ndarray) -> str:
    """Find the shape that overlaps a mask best, each stretched to the same square.

    Edges are soft, so that one may have come out somewhat fatter than it was drawn.
    """
    box = bounds(mask)
    if box is None:
        return ""
    cut = Image.fromarray(mask).crop(box)
    seen = np.asarray(cut.convert("L").resize((48, 48), Image.Resampling.BILINEAR)) > 127
    overlap = {}
    for shape, growth in itertools.product(SHAPES, (0, 8, 16)):
        known = template(shape, growth)
        overlap[shape, growth] = (seen & known).sum() / (seen | known).sum()
    return max(overlap, key=lambda found: overlap[found])[0]


@functools.cache
def template(shape: str, growth: int) -> np.ndarray:
    """Draw a shape alone, grown by some pixels, and cut it out as a mask of 48 x 48."""
    drawn = Image.new("RGB", (SIDE, SIDE), 0)
    draw_shape(drawn, shape, (255, 255, 255), (SIDE / 2, SIDE / 2), 96, 1)
    canvas = drawn.convert("L").filter(ImageFilter.MaxFilter(2 * growth + 1))
    cut = canvas.crop(canvas.getbbox())
    return np.asarray(cut.resize((48, 48), Image.Resampling.BILINEAR)) > 127
