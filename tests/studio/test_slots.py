"""What can train here, and what its programs see of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from studio import slots
from studio.slots import MIB, Slot, SlotsUnknown, devices, find_slots, measured

ANSWER = """\
GPU-aaaa, NVIDIA GeForce RTX 4090, 24564, 6802
GPU-bbbb, NVIDIA GB10, [N/A], [N/A]
"""


@pytest.fixture
def two_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program in the path that answers as nvidia-smi does with two cards."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nprint({ANSWER!r}, end='')\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    slots.asked.cache_clear()


@pytest.fixture
def no_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no nvidia-smi."""
    monkeypatch.setenv("PATH", str(tmp_path))
    slots.asked.cache_clear()


def test_each_card_is_a_slot(two_cards: None) -> None:
    """Named by its uuid; what the driver does not know is unknown."""
    assert find_slots() == (
        Slot("GPU-aaaa", "NVIDIA GeForce RTX 4090", 24564 * MIB, 6802 * MIB),
        Slot("GPU-bbbb", "NVIDIA GB10", None, None),
    )


@pytest.mark.parametrize("wish", ["1", "GPU-bbbb", "1,GPU-bbbb,1"])
def test_cards_are_chosen_by_number_or_uuid(two_cards: None, wish: str) -> None:
    """Each counts once."""
    assert [slot.id for slot in find_slots(wish)] == ["GPU-bbbb"]


@pytest.mark.parametrize("wish", ["2", "GPU-cccc", "cpu:0", "cpu:x", "", "cpu:65", "all"])
def test_slots_that_are_not_there_are_refused(two_cards: None, wish: str) -> None:
    """The message lists what there is."""
    expected = r"--slots: expected some of auto, cpu:N, GPU-aaaa, GPU-bbbb, 0, 1; got"
    with pytest.raises(SlotsUnknown, match=expected):
        find_slots(wish)


def test_without_a_card_the_processor_trains(no_cards: None) -> None:
    """One slot; more of them are asked for."""
    assert [slot.id for slot in find_slots()] in (["cpu:0"], ["mps:0"])
    assert [slot.id for slot in find_slots("cpu:2")] == ["cpu:0", "cpu:1"]


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("echo NVIDIA-SMI has failed.; exit 9", "NVIDIA-SMI has failed. Mend"),
        ("exit 15", "it ends with 15"),
        ("exec sleep 9", "no answer in 0.2 seconds"),
    ],
)
@pytest.mark.parametrize("wish", ["auto", "0"])
def test_cards_that_cannot_be_told_are_no_processor(
    no_cards: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wish: str,
    program: str,
    why: str,
) -> None:
    """A driver that fails is told at the start, with the way on; later, memory is unknown."""
    path = tmp_path / "nvidia-smi"
    path.write_text(f"#!/bin/sh\nPATH=/bin:/usr/bin\n{program}\n", encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setattr(slots, "SMI_SECONDS", 0.2 if "sleep" in program else 10)
    with pytest.raises(SlotsUnknown, match=f"{why}.*--slots cpu:1"):
        find_slots(wish)
    assert [slot.id for slot in find_slots("cpu:1")] == ["cpu:0"]
    assert measured([Slot("GPU-aaaa", "A card", 9)])[0].used_bytes is None


def test_memory_in_use_is_measured_anew(two_cards: None) -> None:
    """What was found at the start gets the present numbers."""
    there = (Slot("GPU-aaaa", "A card", 9), Slot("cpu:0", "Processor"))
    assert [slot.used_bytes for slot in measured(there)] == [6802 * MIB, None]


def test_programs_see_the_cards_of_their_slots_alone() -> None:
    """And none where they have none."""
    assert devices(["GPU-bbbb"])["CUDA_VISIBLE_DEVICES"] == "GPU-bbbb"
    assert devices(["cpu:0"])["CUDA_VISIBLE_DEVICES"] == ""
    assert devices([])["CUDA_VISIBLE_DEVICES"] == ""
    assert devices(["mps:0"]) == {}
