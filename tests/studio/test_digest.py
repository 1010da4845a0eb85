"""What events say of a run, in brief, whatever else is in the stream."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from studio_ground import HERE

from studio.digest import Digest


def heard(*lines: bytes) -> Digest:
    """Read lines."""
    return functools.reduce(Digest.heard, lines, Digest())


def line(kind: str, **fields: Any) -> bytes:
    """Write an event."""
    return json.dumps({"type": kind, **fields}).encode()


RECORDED = (HERE / "recorded.jsonl").read_bytes().splitlines()


def test_a_recorded_run_is_summed_up() -> None:
    """Step, total, phase and last progress at every line, and the result at the end."""
    assert heard(RECORDED[0]) == Digest("starting", step=0, total_steps=24, first_step=0)
    assert heard(*RECORDED[:7]).phase == "encoding images"
    half_way = heard(*RECORDED[:15])
    assert (half_way.phase, half_way.step, half_way.last_step) == ("training", 9, 9)
    assert half_way.progress
    assert half_way.progress["loss"] > 0
    whole = heard(*RECORDED)
    assert whole.final
    assert (whole.step, whole.final["percent"]) == (24, 100)


def test_of_a_tool_the_preparation_is_all_there_is() -> None:
    """How far it has come is how far the job has."""
    data = {"name": "drawing", "done": 3, "total": 12, "unit": "items"}
    assert heard(line("info", topic="phase", data=data)) == Digest("drawing", 3, 12)


def test_a_stopped_run_says_from_where_it_goes_on() -> None:
    """A path, or nothing."""
    said = line("interrupted", step=5, path="/output/state/step_5")
    assert heard(said) == Digest(step=5, last_step=5, continues_from="/output/state/step_5")
    assert heard(line("error", step=None, path=None)) == Digest()


@pytest.mark.parametrize(
    "garbage",
    [
        *(b"", b"\n", b"no event", b"\xff\xfe", b"[1]", b"{}", b"null", b"[" * 100_000, b'"text"'),
        *(b'{"type": "progress", "loss": NaN}', b'{"type": "progress", "loss": 1e400}'),
        *(b'{"type": "info", "topic": "phase"}', b'{"type": ["progress"]}'),
        b'{"type": "unknown", "step": 7}',
    ],
)
def test_what_is_no_event_changes_nothing(garbage: bytes) -> None:
    """Nor does what is no strict JSON, which the database would refuse."""
    before = heard(*RECORDED[:20])
    assert before.heard(garbage) == before


@pytest.mark.parametrize("step", [-1, 2**70, 1.5, "3", None, True, [1]])
def test_a_step_that_is_no_count_is_unknown(step: object) -> None:
    """The database keeps whole numbers."""
    assert heard(line("progress", step=step, total_steps=step)).step is None


def test_names_that_are_no_unicode_can_be_kept() -> None:
    """Half a surrogate pair becomes a question mark."""
    assert heard(line("interrupted", path="/output/\ud800")).continues_from == "/output/?"
