"""A folder with everything that goes wrong is judged in bounded memory, and stays as it is."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageCms
from scenes import scene

FILES = 10_000
GOOD, CUT = 2000, 3000  # ordinary pictures with captions, and pictures that end too soon
MOST_MEMORY = 1200 * 2**20  # of the whole process; a single picture may take half of it

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="pipes and such names are POSIX's"),
]


def noise(seed: int, *shape: int) -> Image.Image:
    """Draw a small picture like no other."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Store a picture."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    """Write a part of a PNG."""
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def black(width: int, height: int, *, whole: bool = True) -> bytes:
    """Write a small PNG that says it is large; its pixels may not be there at all."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((width + 1) * height) if whole else b"", 1)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def turned(number: int) -> bytes:
    """Store a photo that says how it is to be turned."""
    exif = Image.Exif()
    exif[0x0112] = number
    return encoded(scene(100 + number, 300).crop((0, 0, 300, 260)), "JPEG", exif=exif)


def odd() -> dict[str, bytes]:
    """Make pictures that are odd, and as good as others."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    sixteen = Image.fromarray(np.arange(90000, dtype=np.uint16).reshape(300, 300))
    return {
        **{f"turned {number}.jpg": turned(number) for number in range(1, 9)},
        "rgba.png": encoded(scene(200, 300).convert("RGBA"), "PNG"),
        "la.png": encoded(scene(201, 300).convert("LA"), "PNG"),
        "palette.png": encoded(scene(202, 300).convert("P"), "PNG", transparency=3),
        "sixteen.png": encoded(sixteen, "PNG"),
        "cmyk.jpg": encoded(scene(203, 300).convert("CMYK"), "JPEG"),
        "profile.jpg": encoded(scene(204, 300), "JPEG", icc_profile=profile),
        "broken profile.jpg": encoded(scene(205, 300), "JPEG", icc_profile=b"none" * 50),
        "phone.jpg": encoded(
            scene(206, 300), "MPO", save_all=True, append_images=[scene(207, 300)]
        ),
        "strip.png": encoded(noise(4, 1, 9000, 3), "PNG"),
        "dot.png": encoded(noise(5, 1, 1, 3), "PNG"),
        "large.png": black(9000, 7000),
        "\u00e9.png": encoded(noise(6, 64, 64, 3), "PNG"),
        "e\u0301.png": encoded(noise(7, 64, 64, 3), "PNG"),
        "-dash.png": encoded(noise(8, 64, 64, 3), "PNG"),
        "new\nline.png": encoded(noise(9, 64, 64, 3), "PNG"),
        "\U0001f47f.png": encoded(noise(10, 64, 64, 3), "PNG"),
        f"{'n' * 251}.png": encoded(noise(11, 64, 64, 3), "PNG"),
        "UPPER.PNG": encoded(noise(12, 64, 64, 3), "PNG"),
        "format.png": encoded(noise(13, 64, 64, 3), "JPEG"),
    }


def none() -> dict[str, bytes]:
    """Make what no picture is, whatever it is called."""
    one, *others = (noise(seed, 64, 64, 3) for seed in (1, 2, 3))
    return {
        "moves.png": encoded(one, "PNG", save_all=True, append_images=others),
        "moves.webp": encoded(one, "WEBP", save_all=True, append_images=others),
        "gif.png": encoded(one, "GIF"),
        "tiff.jpg": encoded(one, "TIFF"),
        "cut.jpg": encoded(scene(208, 300), "JPEG")[:-2000],
        "cut.webp": encoded(scene(208, 300), "WEBP")[:-2000],
        "cut.bmp": encoded(scene(208, 300), "BMP")[:-2000],
        "empty.png": b"",
        "text.jpg": b"not a picture at all",
        "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "bomb.png": black(30_000, 30_000, whole=False),
        "zeros.png": bytes(5000),
    }


OTHER: dict[str, bytes] = {
    "cmyk.txt": b"\xef\xbb\xbfa dog\r\non grass\r\n",
    "rgba.txt": b"caf\xe9",
    "la.txt": b"a\0b",
    "profile.txt": b"word " * 60_000,
    "palette.txt": b" \n",
    "phone.caption": b"another program's",
    "Thumbs.db": bytes(100),
    ".hidden.png": b"none",
    "._rgba.png": b"none",
    "metadata.jsonl": b'{"file_name": "../out.png", "text": "x"}\n{"file_name": NaN}\nno JSON\n'
    b'{"file_name": "none.png", "text": "x"}\n{"file_name": "cmyk.jpg", "text": "less"}\n',
}


def link_out(path: Path) -> None:
    """Lead out of the folder."""
    path.symlink_to(path.parent.parent / "secret.png")


SPECIAL: dict[str, Callable[[Path], None]] = {
    "pipe.png": os.mkfifo,
    "out.png": link_out,
    "circle.png": lambda path: path.symlink_to(path.name),
    "nowhere.png": lambda path: path.symlink_to("not there.png"),
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide ten thousand files of every kind."""
    folder = tmp_path_factory.mktemp("hostile") / "source"
    (folder / "named like one.png").mkdir(parents=True)
    (folder / "__MACOSX").mkdir()
    (folder.parent / "secret.png").write_bytes(encoded(noise(1, 64, 64, 3), "PNG"))
    for name, content in (odd() | none() | OTHER).items():
        (folder / name).write_bytes(content)
    for name, make in SPECIAL.items():
        make(folder / name)
    (folder / os.fsdecode(b"\xff.png")).write_bytes(encoded(noise(14, 64, 64, 3), "PNG"))
    for number in range(GOOD):
        place = folder / f"{number % 7}" / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(encoded(noise(1000 + number, 256, 256), "PNG"))
        place.with_suffix(".txt").write_text(f"number {number}", encoding="utf-8")
    whole = encoded(noise(1, 64, 64, 3), "PNG")
    for number in range(CUT):
        (folder / f"cut {number}.png").write_bytes(whole[: 100 + number])
    left = FILES - sum(1 for path in folder.rglob("*") if not path.is_dir())
    for number in range(left):
        (folder / "3" / f"{number}.dat").write_bytes(bytes(number % 50))
    return folder


def fingerprint(folder: Path) -> dict[str, object]:
    """Take down all that could have changed."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        plain = path.is_file() and not path.is_symlink()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if plain else None
        known = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_nlink)
        found[str(path)] = (*known, digest)
    return found


@pytest.fixture(scope="module")
def checked(hostile: Path) -> tuple[list[dict[str, Any]], dict[str, Any], int]:
    """Check the folder once; provide the lines, the report, and the memory it took."""
    before = fingerprint(hostile)
    assert sum(1 for path in hostile.rglob("*") if not path.is_dir()) == FILES
    report = hostile.parent / "report.json"
    program = (
        "import resource, sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "from tools import prepare\n"
        "code = prepare.main()\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "sys.stderr.write(f'{peak}')\n"
        "sys.exit(code)"
    )
    arguments = ["check", str(hostile), "--resolution", "256", "--report", str(report), "--events"]
    command = [sys.executable, "-c", program, str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.splitlines()[-1]
    assert fingerprint(hostile) == before
    peak = int(done.stderr.split()[-1]) * (1024 if sys.platform == "linux" else 1)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return lines, json.loads(report.read_text("utf-8")), peak


def test_ten_thousand_files_take_no_more_memory_than_one_large_picture(
    checked: tuple[list[dict[str, Any]], dict[str, Any], int],
) -> None:
    """What is kept of a picture is small; nothing in the folder changed."""
    assert checked[2] < MOST_MEMORY


def test_every_problem_is_named_once(
    checked: tuple[list[dict[str, Any]], dict[str, Any], int],
) -> None:
    """In the stream, and in the report."""
    lines, report, _ = checked
    skipped = Counter(line["data"]["file"] for line in lines if line.get("code") == "image_skipped")
    cut = {f"cut {number}.png" for number in range(CUT)}
    assert set(skipped) == {*none(), *SPECIAL, *cut}
    assert set(skipped.values()) == {1}
    known = Counter(picture["source"] for picture in report["pictures"])
    assert set(known.values()) == {1}
    broken = {p["source"] for p in report["pictures"] if "broken" in p["flags"]}
    assert broken == {*none(), *SPECIAL, *cut}
    codes = Counter(line["code"] for line in lines if line["type"] == "warning")
    assert codes["folder_skipped"] == 1
    assert codes["metadata_line_refused"] == 1
    unread = [line["data"]["file"] for line in lines if line.get("code") == "caption_unusable"]
    assert sorted(unread) == ["palette.txt", "profile.txt", "rgba.txt"]


def test_what_is_odd_but_sound_is_used(
    checked: tuple[list[dict[str, Any]], dict[str, Any], int],
) -> None:
    """Turned as a viewer turns it, with the caption that counts."""
    pictures = {picture["source"]: picture for picture in checked[1]["pictures"]}
    assert all(pictures[name]["pixels"] for name in odd())
    sizes = {number: pictures[f"turned {number}.jpg"]["source_size"] for number in range(1, 9)}
    assert sizes == {n: [300, 260] if n < 5 else [260, 300] for n in range(1, 9)}
    assert pictures["cmyk.jpg"]["caption"] == "a dog on grass"
    assert "small" in pictures["dot.png"]["flags"]
    assert "dark" in pictures["large.png"]["flags"]
    assert sum(picture["source"].endswith(".png") for picture in checked[1]["pictures"]) > GOOD
