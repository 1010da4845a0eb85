"""Loss history: a table and a curve of all updates."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import train_lora
from train_lora import LossPoint

CURVES: dict[str, list[float | None]] = {
    "one": [0.5],
    "two": [0.5, 0.25],
    "ten": [1.0 / n for n in range(1, 11)],
    "five thousand": [0.1 + abs(math.sin(n)) / n for n in range(1, 5001)],
    "gaps": [0.5, None, None, 0.25, 0.2, None],
    "no number": [0.5, math.nan, math.inf, 0.25],
    "zeros": [0.0] * 5,
    "huge": [1e30, 1.0, 1e-30],
}


def history(losses: list[float | None]) -> list[LossPoint]:
    """Make rows of a history."""
    return [LossPoint(n, loss, 1e-4 / n, 1.0) for n, loss in enumerate(losses, start=1)]


@functools.lru_cache
def colours(png: bytes) -> dict[tuple[int, int, int], int]:
    """Count the colours of a picture."""
    counted: Any = Image.open(io.BytesIO(png)).convert("RGB").getcolors(10**6)
    return {colour: count for count, colour in counted}


def blue(png: bytes) -> int:
    """Count the pixels of the curve: clearly more blue than red."""
    return sum(count for (r, _, b), count in colours(png).items() if b > r + 40)


@pytest.mark.parametrize("name", CURVES)
def test_a_history_is_written_as_a_table_and_a_curve(name: str, tmp_path: Path) -> None:
    """Every update has its row, a gap is an empty cell, and the curve can be seen."""
    points = history(CURVES[name])
    train_lora.write_history(tmp_path, points)
    rows = list(csv.DictReader((tmp_path / "loss_history.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [point.step for point in points]
    finite = [None if p.loss is None or not math.isfinite(p.loss) else p.loss for p in points]
    assert [float(row["loss"]) if row["loss"] else None for row in rows] == finite
    for row, point in zip(rows, points, strict=True):
        assert float(row["learning_rate"]) == pytest.approx(point.learning_rate, rel=1e-9)
    png = (tmp_path / "loss_curve.png").read_bytes()
    assert Image.open(io.BytesIO(png)).size == (1200, 600)
    assert blue(png) > 20
    assert len(png) < 500_000


@pytest.mark.parametrize("losses", [[], [None, None], [math.nan]])
def test_a_history_without_a_loss_has_an_empty_picture(
    losses: list[float | None], tmp_path: Path
) -> None:
    """Nothing to draw is no error."""
    train_lora.write_history(tmp_path, history(losses))
    png = (tmp_path / "loss_curve.png").read_bytes()
    assert Image.open(io.BytesIO(png)).size == (1200, 600)
    assert blue(png) == 0


def test_the_curve_falls_where_the_loss_falls() -> None:
    """The height of the strong line follows the losses, scaled from zero."""
    image = train_lora.draw_curve(history([1.0 - n / 200 for n in range(100)])).convert("RGB")
    heights = [height(image, x) for x in (200, 400, 600, 800, 1000)]
    falls = [lower - upper for upper, lower in itertools.pairwise(heights)]
    assert min(falls) > 20
    assert max(falls) - min(falls) < 5


def height(image: Image.Image, x: int) -> float:
    """Find the middle of the strong line in a column."""
    pixels: list[Any] = [image.getpixel((x, y)) for y in range(image.height)]
    rows = [y for y, (red, _, strong) in enumerate(pixels) if strong > red + 80]
    return sum(rows) / len(rows)


@pytest.mark.parametrize(
    ("high", "ticks"),
    [(1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.11, [0, 0.05, 0.1, 0.15]), (7.0, [0, 2, 4, 6, 8])],
)
def test_axes_are_divided_at_round_numbers(high: float, ticks: list[float]) -> None:
    """Few of them, from zero to the highest value or beyond."""
    assert train_lora.round_ticks(high) == pytest.approx(ticks)
