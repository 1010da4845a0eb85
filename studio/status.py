"""How a job stands: from its row, and from what it has said."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio.events import STREAM, Story
from studio.problems import Problem, show
from studio.store import ACTIVE, UnknownJob

if TYPE_CHECKING:
    from studio.settings import Settings
    from studio.store import Job, Store

Record = dict[str, Any]

MOST_RESULT_BYTES = 16 * 2**20
PROGRESS = ("loss", "learning_rate", "images_per_second", "seconds_per_step", "eta_seconds")
# Of the last line of a job, what is told as it is, and which files are, by other names.
ENDED = (
    *("bytes", "sha256", "total_time", "final_loss", "images_per_second", "peak_memory_bytes"),
    *("best_step", "loss_before", "loss_after", "loss_spread", "moved", "moved_without_trigger"),
    *("summary", "files"),
)
NAMED = {"path": "final_path", "best_checkpoint": "best_path", "embedding": "embedding_path"}


def job_of(store: Store, job_id: str) -> Job:
    """Find a job."""
    try:
        return store.job(job_id)
    except UnknownJob as error:
        raise Problem(404, "job_unknown", f"There is no job {show(job_id)}.") from error


def briefs(store: Store, jobs: Iterable[Job]) -> list[Record]:
    """Say of several jobs how they stand, in brief."""
    positions = {job.id: place for place, job in enumerate(store.queue(), start=1)}
    slots = {job: slot for slot, job in store.holds().items()}
    return [brief(job, positions.get(job.id), slots.get(job.id)) for job in jobs]


def brief(job: Job, position: int | None, slot: str | None) -> Record:
    """Say how a job stands, in brief."""
    progress = job.progress or {}
    return {
        "job_id": job.id,
        "kind": job.kind,
        "name": job.name,
        "state": job.state,
        "desired": job.desired,
        "priority": job.priority,
        "parent": job.parent,
        "engine": job.engine,
        "phase": job.phase,
        "position": position,
        "slot": slot,
        "step": job.step,
        "total_steps": job.total_steps,
        "percent": percent_of(job),
        **{name: progress.get(name) for name in PROGRESS},
        "created_at": job.created_at,
        "started_at": job.started_at,
        "ended_at": job.ended_at,
        "error": job.error,
    }


def percent_of(job: Job) -> int | None:
    """Tell how far a job is; 100 is kept for what is complete."""
    if job.state == "completed":
        return 100
    if not job.total_steps or job.step is None:
        return None
    return min(99, job.step * 100 // job.total_steps)


def status(settings: Settings, store: Store, job: Job, story: Story) -> Record:
    """Say all that there is to say of how a job stands."""
    (found,) = briefs(store, [job])
    folder = settings.job(job.id)
    attempts = store.attempts(job.id)
    last = attempts[-1].n if attempts else None
    return found | {
        "attempt": last,
        "silent_seconds": silence(folder, last) if job.state in ACTIVE else None,
        "continues_from": inside(folder, job.continues_from),
        "final": final_of(folder, job),
        "results": results_of(folder, job),
        "warnings": [
            {name: line.get(name) for name in ("code", "message")} for line in story.warnings
        ],
        "links": {
            "page": f"/runs/{job.id}",
            "status": f"/status/{job.id}",
            "events": f"/events?job={job.id}",
            "lines": f"/jobs/{job.id}/events",
            "files": f"/jobs/{job.id}/files",
            "log": f"/jobs/{job.id}/log",
        },
    }


def silence(folder: Path, attempt: int | None) -> float | None:
    """Tell for how long a program has said nothing."""
    with contextlib.suppress(OSError):
        changed = (folder / "attempts" / str(attempt) / STREAM).stat().st_mtime
        return round(max(0.0, time.time() - changed), 1)
    return None


def inside(folder: Path, path: object) -> str | None:
    """Write a path as one of the job's own files, as the API names them."""
    if not isinstance(path, str):
        return None
    with contextlib.suppress(ValueError):
        return Path(path).relative_to(folder).as_posix()
    return Path(path).name


def final_of(folder: Path, job: Job) -> Record | None:
    """Say what came of a job."""
    if job.final is None or job.state != "completed":
        return None
    found = {name: job.final[name] for name in ENDED if name in job.final}
    if "files" in found:
        found["files"] = [inside(folder, path) for path in found["files"]]
    if "final_path" in job.final:
        found |= {name: inside(folder, job.final.get(key)) for name, key in NAMED.items()}
    return found


def results_of(folder: Path, job: Job) -> Record | None:
    """List the pictures that a job has drawn, and how they were judged."""
    if job.kind not in ("generate", "evaluate"):
        return None
    grid = read_result(folder / "output" / "grid.json")
    texts = {prompt.get("id"): prompt.get("text") for prompt in grid.get("prompts", [])}
    files = {lora.get("id"): lora.get("file") for lora in grid.get("loras", [])}
    images = [
        {
            "checkpoint": files.get(image["lora"]),
            "prompt": texts.get(image["prompt"]),
            "seed": image["seed"],
            "scale": image["strength"],
            "path": f"output/{image['file']}",
        }
        for image in grid.get("images", [])
    ]
    return {"images": images, "scores": read_result(folder / "output" / "eval.json") or None}


def read_result(path: Path) -> Record:
    """Read what a tool has written; empty while there is nothing."""
    try:
        if path.stat().st_size > MOST_RESULT_BYTES:
            return {}
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
