"""Numbers over steps, in buckets that never move: a curve that is looked at while it grows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

Record = dict[str, Any]
Point = tuple[int, float]

# What a progress line holds that is worth a curve.
CURVES = (
    "loss",
    "learning_rate",
    "grad_norm",
    "images_per_second",
    "seconds_per_step",
    "memory_bytes",
)
VALIDATION = "validation_loss"


@dataclass
class Series:
    """The curves of a job over all its starts."""

    curves: dict[str, list[Point]] = field(default_factory=dict)
    sessions: list[Record] = field(default_factory=list)  # from, to, and what was kept of it
    total_steps: int = 0

    def take(self, line: Record) -> None:
        """Take what a line says."""
        kind, step = line.get("type"), line.get("step")
        if kind == "start":
            self.begin(line)
        elif isinstance(step, int) and kind == "progress":
            for name in CURVES:
                self.add(name, step, line.get(name))
            self.reach(step, line.get("total_steps"))
        elif isinstance(step, int) and kind == "validation":
            self.add(VALIDATION, step, line.get("loss"))

    def begin(self, line: Record) -> None:
        """Begin a session; what was said of later steps is taken back, as they are made again."""
        resumed = line.get("resumed_step")
        first = resumed if isinstance(resumed, int) else 0
        for session in self.sessions:
            session["kept_to"] = min(session["kept_to"], first)
        for name, points in self.curves.items():
            self.curves[name] = [point for point in points if point[0] <= first]
        self.sessions.append({"from": first, "to": first, "kept_to": first})
        self.reach(first, line.get("total_steps"))

    def add(self, name: str, step: int, value: object) -> None:
        """Add a point, if it is one."""
        if isinstance(value, (int, float)) and math.isfinite(value):
            self.curves.setdefault(name, []).append((step, float(value)))

    def reach(self, step: int, total: object) -> None:
        """Note how far the present session came, and how far it will go."""
        if self.sessions:
            self.sessions[-1]["to"] = self.sessions[-1]["kept_to"] = step
        self.total_steps = total if isinstance(total, int) else max(self.total_steps, step)

    def summary(self, most: int) -> Record:
        """Sum up all curves in at most so many buckets of equal width."""
        last = max((points[-1][0] for points in self.curves.values() if points), default=0)
        width = width_of(max(last, self.total_steps), most)
        curves = {name: buckets(points, width) for name, points in self.curves.items()}
        numbers = sorted({number for found in curves.values() for number in found})
        return {
            "steps": [steps_at(number, curves.values()) for number in numbers],
            "series": {name: columns(found, numbers) for name, found in curves.items()},
            "sessions": [dict(session) for session in self.sessions],
        }


@dataclass(frozen=True)
class Bucket:
    """What the points of some steps have in common."""

    step: int  # the last of them
    least: float
    most: float
    mean: float


def width_of(last: int, most: int) -> int:
    """Return how many steps make a bucket: a power of two, so that buckets only ever pair up."""
    width = 1
    while last > width * most:
        width *= 2
    return width


def buckets(points: Iterable[Point], width: int) -> dict[int, Bucket]:
    """Put points into buckets: step 1 to width is the first."""
    found = {}
    for number, group in groupby(points, lambda point: max(0, point[0] - 1) // width):
        inside = list(group)
        values = [value for _, value in inside]
        mean = math.fsum(values) / len(values)
        found[number] = Bucket(inside[-1][0], min(values), max(values), mean)
    return found


def steps_at(number: int, curves: Iterable[dict[int, Bucket]]) -> int:
    """Return the last step of a bucket that any curve has a point of."""
    return max(found[number].step for found in curves if number in found)


def columns(found: dict[int, Bucket], numbers: Sequence[int]) -> Record:
    """Lay out a curve; a bucket without a point of it is null."""
    inside = [found.get(number) for number in numbers]
    return {
        "min": [each and each.least for each in inside],
        "max": [each and each.most for each in inside],
        "mean": [each and each.mean for each in inside],
    }
