"""What the studio knows of picture files: which kinds it takes, whether one is whole, how it looks.

Every byte here comes from outside: no decoder but those of FORMATS sees it, none gets more than
MOST_PIXELS, and no more than two are at work at a time.
"""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from PIL import Image, ImageOps, UnidentifiedImageError

from studio.problems import Problem, problem_at, sentence

JPEG = ("JPEG", "MPO")  # phones write further pictures behind the first
FORMATS = {
    ".png": ("PNG",),
    ".jpg": JPEG,
    ".jpeg": JPEG,
    ".jfif": JPEG,
    ".webp": ("WEBP",),
    ".avif": ("AVIF",),
    ".bmp": ("BMP",),
}
DECODERS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP")
MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
MEDIA_TYPES |= {"AVIF": "image/avif", "BMP": "image/bmp"}
MOST_PIXELS = 89_478_485  # as Pillow, and so the trainer, has it
UPRIGHT_FROM = 5  # EXIF orientations from here on lie on their side
EXIF_ORIENTATION = 0x0112
DECODING = threading.BoundedSemaphore(2)  # the largest picture takes a gigabyte unpacked


def suffix_of(name: str) -> str:
    """Return the ending that tells what kind of picture a file is."""
    return PurePath(name).suffix.lower()


def media_type(name: str) -> str:
    """Return the media type of a picture, by its name."""
    return MEDIA_TYPES[FORMATS[suffix_of(name)][0]]


def check_picture(path: Path, name: str) -> None:
    """Refuse what is no whole, still picture of the kind that its name says."""
    with DECODING, explaining(name), opened(path) as image:
        if image.format not in FORMATS[suffix_of(name)]:
            expected = f"{FORMATS[suffix_of(name)][0]} content, as its name says"
            hint = f"Give it the ending that belongs to {image.format}."
            raise unusable(name, expected, str(image.format), hint)
        # Single pictures of some formats do not have the attribute at all.
        if image.format not in JPEG and getattr(image, "n_frames", 1) > 1:
            raise unusable(name, "a still picture", "an animation")
        if image.format == "PNG":
            image.verify()  # the checksums of all parts, without unpacking them
        else:
            image.draft("RGB", (64, 64))  # a JPEG is read whole, but drawn small
            image.load()


@contextmanager
def explaining(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into an answer."""
    try:
        yield
    except Problem:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        expected = f"at most {MOST_PIXELS // 10**6} million pixels"
        raise unusable(name, expected, "more") from error
    except Exception as error:  # hostile bytes make decoders raise anything
        known = isinstance(error, UnidentifiedImageError)
        found = "something else" if known else f"damage ({error})"
        raise unusable(name, "a whole PNG, JPEG, WebP, AVIF or BMP picture", found) from error


SAVE_AGAIN = "Save it again from a picture program, or leave it out."


def unusable(name: str, expected: str, found: str, hint: str = SAVE_AGAIN) -> Problem:
    """Say why a file is no picture that can be trained on."""
    problem = problem_at(name, expected, found, hint)
    return Problem(415, "not_an_image", sentence([problem]), [problem])


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture whose header promises no more pixels than are allowed."""
    with Image.open(path, formats=DECODERS) as image:
        if image.width * image.height > MOST_PIXELS:
            raise Image.DecompressionBombError
        yield image


def measure(path: Path) -> tuple[int, int] | None:
    """Read width and height as a viewer shows them; None for what cannot be opened."""
    try:
        with opened(path) as image:
            width, height = image.size
            # A PNG's orientation may stand behind the pixels; looking there would decode them.
            early = image.format != "PNG" or "exif" in image.info
            turned = early and image.getexif().get(EXIF_ORIENTATION, 1) >= UPRIGHT_FROM
            return (height, width) if turned else (width, height)
    except Exception:  # noqa: BLE001, a file that was put there by hand may hold anything
        return None


@functools.lru_cache(maxsize=1024)  # about ten megabytes; browsers keep their own as well
def thumbnail(path: Path, stamp: str, side: int) -> bytes:  # noqa: ARG001, the stamp is for the cache
    """Draw a picture small, as WebP; the stamp tells its content from what was there before."""
    with DECODING, explaining(path.name), opened(path) as image:
        image.draft("RGB", (2 * side, 2 * side))
        small = in_colour(image)
        small.thumbnail((side, side))
        target = io.BytesIO()
        ImageOps.exif_transpose(small).save(target, "WEBP", quality=80)
        return target.getvalue()


def in_colour(image: Image.Image) -> Image.Image:
    """Bring a picture into a mode that WebP has."""
    if image.mode.startswith("I"):  # Pillow clips 16-bit grey to white instead of scaling it
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.mode in ("RGB", "RGBA"):
        return image
    return image.convert("RGBA" if image.has_transparency_data else "RGB")
