"""The benchmark runs, and its contestants do the same work."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_image
from tiny_models import build_tiny

import bench
import launches
from bench import Task

LINES: list[bench.Line] = [
    (0.1, {"type": "start"}),
    (0.2, {"type": "info", "topic": "device", "data": {"kind": "cpu"}}),
    (0.25, {"type": "info", "topic": "memory", "data": {"phase": "planning"}}),
    (0.3, {"type": "info", "topic": "device", "data": {"kind": "cpu"}}),
    (1.3, {"type": "info", "topic": "memory", "data": {"phase": "encoding"}}),
    (1.8, {"type": "info", "topic": "memory", "data": {"phase": "loading"}}),
    (2.0, {"type": "progress", "step": 1, "elapsed_seconds": 2.0}),
    (3.0, {"type": "progress", "step": 3, "elapsed_seconds": 3.0}),
    (3.4, {"type": "progress", "step": 5, "elapsed_seconds": 3.4}),
    (3.6, {"type": "progress", "step": 6, "elapsed_seconds": 3.5}),
    (3.9, {"type": "checkpoint"}),
    (4.0, {"type": "complete", "peak_memory_bytes": 7}),
]


def test_steps_are_read_from_the_lines_of_a_run() -> None:
    """A progress line may stand for several steps; the first two are left out."""
    measured = bench.read_events(LINES, 5)
    assert measured.step_seconds == pytest.approx([0.5, 0.2, 0.1])
    assert measured.seconds == pytest.approx(0.1)
    assert (measured.first_step_seconds, measured.peak_bytes) == (2.0, 5)
    parts = {"look and import": 0.2, "encode": 1.0, "load": 0.5, "save": 0.3}
    assert bench.spans(LINES) == pytest.approx(parts)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_all_three_contestants_finish(tmp_path: Path, family: str) -> None:
    """Textbook loop, program and bare step, on a tiny model; the table has a row for each."""
    model = build_tiny(family, tmp_path / "model")
    data = bench.draw_data(tmp_path / "data", 3, 512)
    text = bench.compare(Task(model, 256, 1, 4, 4, 3), data, 1)
    rows = [line.split(" | ")[0] for line in text.splitlines()]
    assert {"| textbook loop", "| train_lora.py", "| bare step", "| training"} <= set(rows)


def test_a_contestant_that_fails_ends_the_benchmark(tmp_path: Path) -> None:
    """A table with holes would be read as one without."""
    write_image(tmp_path / "data" / "a.png")
    with pytest.raises(SystemExit, match="failed"):
        bench.run_loop("reference.py", Task(tmp_path, 256, 1, 4, 4, 1), tmp_path / "data")


def test_an_adapter_is_not_converted_call_by_call() -> None:
    """A handful of conversions for 256 matrices, where autocast makes several for each."""
    there, here = launches.textbook("sd15"), launches.ours("sd15")
    assert there["aten::mm"] == here["aten::mm"] > 500
    assert there["aten::_to_copy"] > 1000
    assert here["aten::_to_copy"] < 10
