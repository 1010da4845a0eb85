"""tools/pictures.py: measures of pictures, held against formulas and against made pictures."""

from __future__ import annotations

import io
import itertools
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageEnhance, ImageFilter
from scenes import centred, jpeg, marked, scene

from tools.pictures import (
    Measures,
    are_near,
    close_hashes,
    clusters,
    digest_of,
    has_location,
    light_of,
    measure,
    phash_of,
    sharpness_of,
    worst_tile,
)


def test_the_hash_is_that_of_the_published_definition() -> None:
    """The cosine transform by its sum, number by number, and the signs about its median."""
    image = scene(3)
    grey = image.convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    cosines = [[math.cos(math.pi * k * (2 * n + 1) / 64) for n in range(32)] for k in range(8)]
    lines = np.asarray(grey).tolist()
    values = [
        sum(lines[y][x] * cosines[v][y] * cosines[u][x] for y in range(32) for x in range(32))
        for v in range(8)
        for u in range(8)
    ]
    middle = statistics.median(values)
    bits = "".join("1" if value > middle else "0" for value in values)
    assert phash_of(image) == int(bits, 2)


def test_equal_pixels_are_equal_pictures_whatever_holds_them() -> None:
    """And two flat pictures of one colour and area are not."""
    image = scene(1, 64)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    assert digest_of(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")) == digest_of(image)
    assert digest_of(Image.new("RGB", (2, 8))) != digest_of(Image.new("RGB", (4, 4)))


EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "stored with losses": lambda image: jpeg(image, 30),
    "half the size": lambda image: image.resize((256, 256), Image.Resampling.LANCZOS),
    "a small mark": marked,
    "moved by a little": lambda image: ImageChops.offset(image, 2, 1),
    "lighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.75),
    "harder": lambda image: ImageEnhance.Contrast(image).enhance(1.2),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(4)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_picture_and_its_edited_copy_are_near(edit: str) -> None:
    """For nearly all of two dozen pictures."""
    pairs = [(scene(seed), EDITS[edit](scene(seed))) for seed in range(24)]
    near = [are_near(measure(one, 256), measure(other, 256)) for one, other in pairs]
    assert sum(near) >= 22


def test_different_things_in_the_middle_of_white_are_not_near() -> None:
    """Of 780 pairs none, though many of them have close hashes."""
    measures = [measure(centred(seed), 256) for seed in range(40)]
    pairs = list(itertools.combinations(measures, 2))
    assert len(pairs) == 780
    assert sum(are_near(*pair) for pair in pairs) == 0
    assert len(list(close_hashes([each.phash for each in measures]))) > 20


def test_black_and_white_are_not_one_but_for_their_light() -> None:
    """What an edit would not do is not made up for."""
    black, white = (measure(Image.new("RGB", (64, 64), name), 64) for name in ("black", "white"))
    assert worst_tile(black, white) == 255
    assert worst_tile(black, black) == 0


def test_the_same_in_other_colours_is_another_picture() -> None:
    """The hash sees only light; the thumbnails see more."""
    red, green, blue = scene(5).split()
    one, other = (measure(Image.merge("RGB", bands), 256) for bands in ((red, green, blue),) * 2)
    recoloured = measure(Image.merge("RGB", (blue, red, green)), 256)
    assert are_near(one, other)
    assert not are_near(one, recoloured)


def test_clusters_hold_what_is_near_by_way_of_a_third() -> None:
    """In the order of the pictures, each of them once."""
    first, last = scene(1), scene(2)
    images = [first, last, jpeg(first, 50), marked(first), centred(1)]
    assert clusters([measure(image, 256) for image in images]) == [[0, 2, 3], [1], [4]]


def test_all_pairs_of_many_are_compared() -> None:
    """Strip by strip the same pairs as one by one."""
    chance = random.Random(0)
    base = [chance.getrandbits(64) for _ in range(300)]
    hashes = [number ^ (1 << chance.randrange(64)) for number in base * 4]
    found = set(close_hashes(hashes))
    pairs = itertools.combinations(range(len(hashes)), 2)
    assert found == {(a, b) for a, b in pairs if (hashes[a] ^ hashes[b]).bit_count() <= 10}


def test_blur_is_measured_where_the_picture_is_sharp() -> None:
    """A blurred picture has less, a sharp thing before soft ground hardly less than all of it."""
    sharp = scene(4)
    blurred = [sharp.filter(ImageFilter.GaussianBlur(radius)) for radius in (1, 2, 4)]
    values = [sharpness_of(image) for image in (sharp, *blurred)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 5 * values[2]
    part = blurred[2].copy()
    part.paste(sharp.crop((128, 128, 384, 384)), (128, 128))
    assert sharpness_of(part) > 0.3 * values[0] > values[2]
    assert sharpness_of(Image.new("RGB", (512, 512), "grey")) == 0


@pytest.mark.parametrize(
    ("low", "high", "light"), [(0, 5, "dark"), (250, 255, "bright"), (0, 255, None), (90, 99, None)]
)
def test_a_picture_without_light_or_without_shade_is_told(
    low: int, high: int, light: str | None
) -> None:
    """One with all tones, or soft ones, is not."""
    ramp = np.linspace(low, high, 64)[:, None, None]
    assert light_of(np.broadcast_to(ramp, (64, 64, 3))) == light


def test_a_grey_picture_is_told_from_a_coloured_one() -> None:
    """Also when it is stored in colour, with losses."""
    grey = jpeg(scene(6).convert("L").convert("RGB"), 80)
    assert measure(grey, 256).grey
    assert not measure(scene(6), 256).grey


def test_a_photo_that_says_where_it_was_taken_is_told(tmp_path: Path) -> None:
    """Whoever passes a dataset on should know."""
    image, exif = scene(7, 64), Image.Exif()
    exif.get_ifd(0x8825)[1] = "N"
    image.save(tmp_path / "here.jpg", exif=exif)
    image.save(tmp_path / "nowhere.jpg")
    assert has_location(tmp_path / "here.jpg")
    assert not has_location(tmp_path / "nowhere.jpg")


def test_measures_take_little_memory() -> None:
    """Ten thousand pictures have to fit."""
    found: Measures = measure(scene(8), 256)
    assert found.thumbnail.nbytes <= 2**14
