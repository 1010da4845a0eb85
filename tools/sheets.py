"""Contact sheets of a grid: every picture of a prompt on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train_lora import Sketch, encode_png, write_whole

if TYPE_CHECKING:
    from PIL import Image

    from tools.generate import Cell

MOST_SIDE = 16_384  # pixels of a sheet; beyond, it goes on on another
MARGIN, LINE, THUMBNAIL = 8, 20, 256


def write_sheets(cells: Sequence[Cell], out: Path, sketch: Sketch) -> list[Path]:
    """Lay the pictures of each prompt out: a row for each LoRA and strength, a column a seed."""
    written = []
    small = min(1.0, THUMBNAIL / max(sketch.width, sketch.height))
    size = (round(sketch.width * small), round(sketch.height * small))
    most = max(1, (MOST_SIDE - LINE) // (size[1] + LINE + MARGIN))
    for prompt in {cell.prompt["id"]: cell.prompt for cell in cells}.values():
        rows: dict[str, list[Cell]] = {}
        for cell in cells:
            if cell.prompt["id"] == prompt["id"]:
                rows.setdefault(f"{cell.source.name} at {cell.strength:g}", []).append(cell)
        labels = list(rows)
        for page, begin in enumerate(range(0, len(labels), most), start=1):
            part = {label: rows[label] for label in labels[begin : begin + most]}
            number = f"_{page}" if len(labels) > most else ""
            path = out / f"sheet_{prompt['id']}{number}.png"
            drawn = sheet(part, prompt["text"], out, size)
            write_whole(path, encode_png(drawn))
            written.append(path)
    return written


def sheet(rows: dict[str, list[Cell]], title: str, out: Path, size: tuple[int, int]) -> Image.Image:
    """Draw one contact sheet."""
    from PIL import Image, ImageDraw, ImageFont

    wide, high = size[0] + MARGIN, size[1] + LINE + MARGIN
    columns = min(max(map(len, rows.values())), MOST_SIDE // wide - 1)
    page = Image.new("RGB", (columns * wide + MARGIN, LINE + len(rows) * high), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    pen.text((MARGIN, 2), title, "black", font)
    for number, (label, cells) in enumerate(rows.items()):
        top = LINE + number * high
        seeds = ", ".join(str(cell.seed) for cell in cells[:columns])
        pen.text((MARGIN, top), f"{label}; seeds {seeds}", "black", font)
        for column, cell in enumerate(cells[:columns]):
            with Image.open(out / cell.name, formats=("PNG",)) as opened:
                small = opened.convert("RGB").resize(size, Image.Resampling.LANCZOS)
            page.paste(small, (MARGIN + column * wide, top + LINE))
    return page
