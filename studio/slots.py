"""What on this machine can train: one slot for each graphics card, else one for the processor."""

from __future__ import annotations

import dataclasses
import functools
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

FRESH_SECONDS = 5  # pages ask often, nvidia-smi takes long
SMI_SECONDS = 10
MIB = 1 << 20


@dataclass(frozen=True)
class Slot:
    """Room for one job at a time."""

    id: str  # the uuid of a card, mps:0, cpu:0
    name: str
    total_bytes: int | None = None
    used_bytes: int | None = None  # by whatever program


class SlotsUnknown(Exception):
    """--slots names what is not there, or nobody can tell what is."""


def find_slots(wish: str = "auto") -> tuple[Slot, ...]:
    """Find what there is, or choose of it: `auto`, `cpu:2`, `0,1` or uuids of cards."""
    kind, _, count = wish.partition(":")
    if kind == "cpu" and count.isdecimal() and 1 <= int(count) <= 64:
        return tuple(Slot(f"cpu:{n}", "Processor") for n in range(int(count)))
    there, failure = asked(present())
    if failure:
        hint = "Mend its driver, or train on the processor by --slots cpu:1."
        raise SlotsUnknown(f"--slots: nvidia-smi cannot tell the cards: {failure}. {hint}")
    if wish == "auto":
        return there or (without_card(),)
    by_name = {slot.id: slot for slot in there} | {str(n): s for n, s in enumerate(there)}
    chosen = wish.split(",")
    if unknown := [word for word in chosen if word not in by_name]:
        expected = ", ".join(["auto", "cpu:N", *by_name])
        raise SlotsUnknown(f"--slots: expected some of {expected}; got {unknown[0]}")
    return tuple({by_name[word].id: by_name[word] for word in chosen}.values())


def cards() -> tuple[Slot, ...]:
    """List the graphics cards, in the order of their places on the bus; none if they are mute."""
    return asked(present())[0]


def present() -> int:
    """Count the time in what an answer of nvidia-smi is good for."""
    return int(time.monotonic() / FRESH_SECONDS)


@functools.lru_cache(maxsize=1)
def asked(_: int) -> tuple[tuple[Slot, ...], str]:
    """Ask nvidia-smi, once in a while, for the cards; or tell why it fails."""
    if not shutil.which("nvidia-smi"):  # a machine without such cards
        return (), ""
    query = "--query-gpu=uuid,name,memory.total,memory.used"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True
        )
    except subprocess.CalledProcessError as error:
        said = (error.stdout + error.stderr).strip().partition("\n")[0]
        return (), said.rstrip(".") or f"it ends with {error.returncode}"
    except subprocess.TimeoutExpired:
        return (), f"no answer in {SMI_SECONDS} seconds"
    except OSError as error:
        return (), str(error)
    found = (card(line) for line in done.stdout.splitlines() if line.count(",") >= 3)
    return tuple(found), ""


def card(line: str) -> Slot:
    """Read a line of nvidia-smi; what the driver does not know, it says in words."""
    uuid, name, *sizes = (word.strip() for word in line.split(","))
    total, used = (int(size) * MIB if size.isdecimal() else None for size in sizes[-2:])
    return Slot(uuid, name, total, used)


def without_card() -> Slot:
    """Name what trains where there is no card of NVIDIA."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return Slot("mps:0", "Apple GPU")
    return Slot("cpu:0", "Processor")


def measured(slots: Sequence[Slot]) -> tuple[Slot, ...]:
    """Tell how much of each slot's memory is in use at present."""
    used = {slot.id: slot.used_bytes for slot in cards()}
    return tuple(dataclasses.replace(slot, used_bytes=used.get(slot.id)) for slot in slots)


def devices(ids: Sequence[str]) -> dict[str, str]:
    """Let a program see the cards of its slots, and no other."""
    if any(slot.startswith("mps:") for slot in ids):
        return {}
    uuids = [slot for slot in ids if not slot.startswith("cpu:")]
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(uuids)}
