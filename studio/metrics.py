"""How the studio is, in the text format of Prometheus."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from studio import slots
from studio.store import ACTIVE, FINAL, KINDS

if TYPE_CHECKING:
    from starlette.datastructures import State

    from studio.store import Job

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Sample = tuple[Mapping[str, str], object]

# Of each job under way: what is told, and under which name it stands in a progress line.
PROGRESS = {
    "loss": ("loss", "Mean loss since the last line."),
    "learning_rate": ("learning_rate", "Learning rate of the last update."),
    "seconds_per_step": ("seconds_per_step", "Time of an update."),
    "images_per_second": ("images_per_second", "Images trained on per second."),
    "eta_seconds": ("eta_seconds", "Time to the end."),
    "memory_bytes": ("memory_bytes", "Memory in use on the device."),
}


def exposition(studio: State) -> str:
    """Write all of it."""
    store, reconciler = studio.store, studio.reconciler
    counts, holds, active = store.counts(), store.holds(), store.active()
    known = slots.measured(reconciler.slots)
    lines = [
        *family(
            "jobs",
            "Jobs by kind and state.",
            (
                ({"kind": kind, "state": state}, counts.get((kind, state), 0))
                for kind in KINDS
                for state in ("queued", *ACTIVE, *FINAL)
            ),
        ),
        *family("slots", "Slots for jobs.", [({}, len(known))]),
        *family(
            "slot_held", "Whether a job holds a slot.", ((named(s), s.id in holds) for s in known)
        ),
        *family(
            "slot_memory_bytes", "Memory of the device.", ((named(s), s.total_bytes) for s in known)
        ),
        *family(
            "slot_memory_used_bytes",
            "Memory in use, by whatever program.",
            ((named(s), s.used_bytes) for s in known),
        ),
        *family("stalled", "Whether jobs are not looked after.", [({}, reconciler.stalled())]),
        *family("job_step", "Updates done.", ((label(job), job.step) for job in active)),
        *family("job_total_steps", "Updates in all.", ((label(j), j.total_steps) for j in active)),
        *progress_of(active),
    ]
    return "\n".join(lines) + "\n"


def progress_of(active: list[Job]) -> Iterator[str]:
    """Write what the last progress lines say."""
    for name, (field, about) in PROGRESS.items():
        samples = [(label(job), (job.progress or {}).get(field)) for job in active]
        yield from family(f"job_{name}", about, samples)


def family(name: str, about: str, samples: Iterable[Sample]) -> Iterator[str]:
    """Write one metric with all that is known of it; what is unknown is left out."""
    whole = f"lora_studio_{name}"
    yield f"# HELP {whole} {about}"
    yield f"# TYPE {whole} gauge"
    for labels, value in samples:
        if isinstance(value, (int, float)) and math.isfinite(value):
            inside = ",".join(f'{key}="{escaped(text)}"' for key, text in labels.items())
            yield f"{whole}{{{inside}}} {float(value):.10g}" if inside else f"{whole} {value:g}"


def named(slot: Any) -> dict[str, str]:
    """Name a slot."""
    return {"slot": slot.id, "name": slot.name}


def label(job: Job) -> dict[str, str]:
    """Name a job."""
    return {"job": job.id, "kind": job.kind, "name": job.name}


def escaped(text: str) -> str:
    """Write a label's value."""
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
