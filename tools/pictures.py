"""What can be measured of a picture: is it sharp, is it well lit, is it there twice."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import train_lora

Numbers = np.ndarray[Any, np.dtype[Any]]

# Two pictures are near when their rough forms are, and no part of them is far off. The hash alone
# takes all centred things on white for one; measured, see tests/tools/test_measures.py.
HASH_BITS, HASH_DISTANCE, TILE_DIFFERENCE = 64, 10, 24.0
LIGHTER, HARDER = 64.0, 1.5  # so much light and contrast may differ; of 255, and as a factor
ROWS_AT_ONCE = 512  # of the table of all pairs; ten thousand pictures have fifty million
GPS = 0x8825
CLIPPED, MIDDLE = 0.5, 0.1  # shares of pixels: so many at an end, and so few between


@dataclass(frozen=True)
class Measures:
    """What is kept of a picture when the next one is looked at."""

    pixels: str  # a digest of what a viewer shows
    phash: int
    thumbnail: Numbers  # [64, 64, 3]
    sharpness: float  # of what training would see
    light: str | None  # `dark` or `bright`
    grey: bool


def measure(picture: Image.Image, side: int) -> Measures:
    """Measure a picture that is upright and in RGB; `side` is that of training."""
    fitted, _ = train_lora.fit_picture(picture, (side, side))
    thumbnail = np.asarray(picture.resize((64, 64), Image.Resampling.LANCZOS))
    return Measures(
        pixels=digest_of(picture),
        phash=phash_of(picture),
        thumbnail=thumbnail,
        sharpness=sharpness_of(fitted),
        light=light_of(thumbnail),
        grey=bool(np.ptp(thumbnail.astype(int), axis=2).max() < 8),
    )


def digest_of(picture: Image.Image) -> str:
    """Tell pictures apart by what they show: size and every pixel."""
    digest = hashlib.sha256(f"{picture.width}x{picture.height}".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()


def phash_of(picture: Image.Image) -> int:
    """Reduce a picture to 64 signs of its lowest frequencies, as the library imagehash does."""
    grey = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
    places = np.arange(32)
    waves = 2 * np.cos(np.pi * places[:, None] * (2 * places + 1) / 64)  # [frequency, place]
    low = (waves @ grey @ waves.T)[:8, :8]
    bits = (low > np.median(low)).flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def sharpness_of(picture: Image.Image) -> float:
    """Measure how strongly the sharper parts of a picture change from pixel to pixel.

    The subject may be a small part of it, so the tenth of an eight by eight grid counts that is
    next to the sharpest. It has to be measured at the size of training: a picture of half the
    side has many times as much.
    """
    grey = np.asarray(picture.convert("L"), float)
    inner = grey[1:-1, 1:-1]
    edges = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
    tiles = [tile for row in np.array_split(edges, 8) for tile in np.array_split(row, 8, axis=1)]
    return float(np.percentile([tile.var() for tile in tiles], 90))


def light_of(thumbnail: Numbers) -> str | None:
    """Tell a picture that is almost black or almost white, with nothing in between."""
    grey = thumbnail.mean(axis=2)
    if ((grey >= 64) & (grey <= 192)).mean() >= MIDDLE:
        return None
    ends = {"dark": (grey < 8).mean(), "bright": (grey > 247).mean()}
    return next((name for name, share in ends.items() if share > CLIPPED), None)


def has_location(path: Path) -> bool:
    """Tell whether a photo says where it was taken."""
    with Image.open(path, formats=train_lora.IMAGE_FORMATS) as opened:
        return bool(opened.getexif().get_ifd(GPS))


# --- Duplicates ---


def are_near(one: Measures, other: Measures) -> bool:
    """Tell whether two pictures are the same but for size, format or a small edit."""
    return (one.phash ^ other.phash).bit_count() <= HASH_DISTANCE and worst_tile(
        one, other
    ) <= TILE_DIFFERENCE


def worst_tile(one: Measures, other: Measures) -> float:
    """Compare two thumbnails, an eighth of their side at a time; 0 … 255.

    Light and contrast are made alike first: on photos made lighter by 15 %, parts are further
    apart than between pictures that have nothing in common.
    """
    a, b = one.thumbnail.astype(float), other.thumbnail.astype(float)
    apart = (np.abs(matched(a, b) - b), np.abs(matched(b, a) - a))
    return min(float(tiles.mean(axis=2).reshape(8, 8, 8, 8).mean((1, 3)).max()) for tiles in apart)


def matched(picture: Numbers, other: Numbers) -> Numbers:
    """Give a picture the light and contrast of another, as far as an edit would."""
    light = other.mean() - picture.mean()
    if abs(light) > LIGHTER:
        return picture
    rest = picture - picture.mean()
    contrast = (rest * (other - other.mean())).sum() / max((rest**2).sum(), 1.0)
    return np.asarray(rest * np.clip(contrast, 1 / HARDER, HARDER) + other.mean())


def close_hashes(hashes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """List the pairs whose hashes are close, a strip of the table of all pairs at a time."""
    numbers = np.array(hashes, dtype=np.uint64)
    for begin in range(0, len(numbers), ROWS_AT_ONCE):
        rows = numbers[begin : begin + ROWS_AT_ONCE]
        distances = np.bitwise_count(rows[:, None] ^ numbers[None, begin:])
        for row, column in zip(*np.nonzero(distances <= HASH_DISTANCE), strict=True):
            if column > row:
                yield begin + int(row), begin + int(column)


def clusters(measures: Sequence[Measures]) -> list[list[int]]:
    """Put pictures together that are the same or near, also by way of a third; by their numbers."""
    parents = list(range(len(measures)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    for one, other in close_hashes([each.phash for each in measures]):
        if root(one) != root(other) and are_near(measures[one], measures[other]):
            parents[max(root(one), root(other))] = min(root(one), root(other))
    numbered = sorted((root(number), number) for number in range(len(measures)))
    groups = itertools.groupby(numbered, key=lambda pair: pair[0])
    return [[number for _, number in group] for _, group in groups]
