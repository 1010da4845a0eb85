"""Pictures made for tests: something like photos, things on white, and copies of them."""

from __future__ import annotations

import colorsys
import io
import random

import numpy as np
from PIL import Image, ImageChops, ImageDraw


def scene(seed: int, side: int = 512) -> Image.Image:
    """Draw something like a photo: soft light, several things, fine texture."""
    chance = random.Random(seed)
    colours = [tuple(chance.randrange(256) for _ in range(3)) for _ in range(2)]
    ground = [Image.new("RGB", (side, side), colour) for colour in colours]
    ramp = Image.linear_gradient("L").resize((side, side))
    image = Image.composite(ground[0], ground[1], ramp)
    draw = ImageDraw.Draw(image)
    for _ in range(9):
        x, y, size = (chance.randrange(side) for _ in range(3))
        box = (x - size // 3, y - size // 3, x + size // 3, y + size // 3)
        fill = tuple(chance.randrange(256) for _ in range(3))
        (draw.ellipse if chance.random() < 0.5 else draw.rectangle)(box, fill=fill)
    noise = Image.fromarray(np.random.default_rng(seed).integers(0, 12, (side, side, 3), np.uint8))
    return ImageChops.add(image, noise)


def centred(seed: int) -> Image.Image:
    """Draw one thing in the middle of white, as a shop does; each in a colour of its own."""
    chance = random.Random(seed)
    image = Image.new("RGB", (512, 512), "white")
    colour = tuple(round(200 * part) for part in colorsys.hsv_to_rgb(seed / 40, 0.8, 1))
    wide, high = chance.randrange(60, 200), chance.randrange(60, 200)
    shape = ImageDraw.Draw(image)
    draw = shape.ellipse if chance.random() < 0.5 else shape.rectangle
    draw((256 - wide, 256 - high, 256 + wide, 256 + high), fill=colour)
    return image


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Store it with losses."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def marked(image: Image.Image) -> Image.Image:
    """Write a small mark into a corner."""
    copy = image.copy()
    ImageDraw.Draw(copy).text((380, 480), "(c) somebody", "white")
    return copy
