"""How a job stands, in words: of its status object a page's, and nothing but that."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote

from studio.views import show_bytes, show_clock, show_duration, show_number

Status = Mapping[str, Any]

KINDS = {
    "train": "Training",
    "caption": "Captions",
    "prepare": "Check of a dataset",
    "generate": "Pictures",
    "evaluate": "Evaluation",
}
FINAL = ("completed", "stopped", "failed", "cancelled")
SILENT = 120  # seconds without an event that are worth a word
PROGRESS_LINES = 1000  # in a training, about, however many steps it has
ORDINALS = {1: "1st", 2: "2nd", 3: "3rd"}
# What the trainer doubts of a finished run, and what to do about it.
REMEDIES = {
    "nothing_learned": "Train on to more steps, or begin anew with a higher learning rate.",
    "overfitted": "Take the LoRA of that step; next time, fewer steps or a lower rank will do.",
    "measure_failed": "Look at the previews.",
}


def shown(status: Status) -> dict[str, Any]:
    """Add to a status what the pages say of it."""
    return {
        **status,
        "kind_word": KINDS.get(status["kind"], status["kind"]),
        "state_word": state_word(status),
        "symbol": status["state"],
        "told": told(status),
        "step_told": step_told(status),
        "left_told": left_told(status),
        "stale": stale(status),
        "download": download(status),
        "doubts": doubts(status),
        "resumable": status["state"] in ("stopped", "failed", "cancelled"),
    }


def state_word(status: Status) -> str:
    """Name the state; a queue that is held is no queue."""
    if status["state"] == "stopping":
        return "saving"
    if status["state"] == "queued" and status.get("desired") == "hold":
        return "held"
    return str(status["state"])


def told(status: Status) -> str:
    """Say in one line how it stands."""
    return TELLING[status["state"]](status)


def queued_told(status: Status) -> str:
    """Say when its turn is."""
    if status.get("desired") == "hold":
        return "Waits until you continue it."
    position = status.get("position")
    if position == 1:
        return "Next in the queue."
    if position is None:
        return "In the queue."
    return f"{ORDINALS.get(position, f'{position}th')} in the queue."


def running_told(status: Status) -> str:
    """Say how far it is and how long it will take."""
    parts = [step_told(status)]
    if status.get("loss") is not None:
        parts.append(f"loss {show_number(status['loss'])}")
    if left_told(status):
        parts.append(left_told(status))
    return " · ".join(parts)


def completed_told(status: Status) -> str:
    """Say what came out."""
    final = status.get("final") or {}
    if isinstance(final.get("summary"), str):
        return str(final["summary"])
    parts = []
    if status.get("step"):
        parts.append(f"{show_number(status['step'])} steps")
    if final.get("total_time") is not None:
        parts.append(show_duration(final["total_time"]))
    if final.get("bytes") is not None:
        parts.append(show_bytes(final["bytes"]))
    return " · ".join(parts) or f"Done {show_clock(status.get('ended_at'))}."


def stopped_told(status: Status) -> str:
    """Say where it stands and from where it goes on."""
    if status.get("error"):  # such as that nobody knows whether it stopped
        return str(status["error"]["message"])
    saved = step_of(status.get("continues_from"))
    if status.get("step") is None:
        return "Stopped before the first step."
    words = f"Stopped at step {show_number(status['step'])}"
    if status.get("total_steps"):
        words += f" of {show_number(status['total_steps'])}"
    return f"{words}; continues from step {show_number(saved)}." if saved else f"{words}."


def failed_told(status: Status) -> str:
    """Say why, and what to do."""
    error = status.get("error") or {}
    first = next(iter(error.get("problems") or []), None)
    remedy = f"{first['path']}: {first['expected']}" if first else error.get("hint")
    parts = (str(part or "").rstrip(".") for part in (error.get("message"), remedy))
    return ". ".join(part for part in parts if part) + "." if error else "It failed."


def stopping_told(_: Status) -> str:
    """Say what takes so long."""
    return "Saving what was learned; this takes a few seconds."


def cancelled_told(_: Status) -> str:
    """Say that nothing was done."""
    return "Cancelled before it began."


TELLING: dict[str, Callable[[Status], str]] = {
    "queued": queued_told,
    "running": running_told,
    "stopping": stopping_told,
    "completed": completed_told,
    "stopped": stopped_told,
    "failed": failed_told,
    "cancelled": cancelled_told,
}


def step_of(path: str | None) -> int | None:
    """Read the step from the name of what a restart continues from."""
    found = re.search(r"step_(\d+)", path or "")
    return int(found[1]) if found else None


def step_told(status: Status) -> str:
    """Say the step, or what is done before the first."""
    step, total = status.get("step"), status.get("total_steps")
    if status["state"] == "running" and (not step or status["kind"] != "train"):
        phase = status.get("phase") or "starting"
        return str(phase)[:1].upper() + str(phase)[1:]
    if step is None:
        return ""
    return f"Step {show_number(step)}" + (f" of {show_number(total)}" if total else "")


def left_told(status: Status) -> str:
    """Say how long it will take, and when that is."""
    seconds = status.get("eta_seconds")
    if seconds is None or status["state"] != "running":
        return ""
    done = datetime.now().astimezone() + timedelta(seconds=seconds)
    return f"{show_duration(seconds)} left, done about {show_clock(done.isoformat())}"


def stale(status: Status) -> str | None:
    """Say that there has been no news, which may be nothing or a fault."""
    silent = status.get("silent_seconds")
    steps = max(20, 2 * (status.get("total_steps") or 0) / PROGRESS_LINES)
    usual = steps * (status.get("seconds_per_step") or 0)
    if status["state"] != "running" or silent is None or silent < max(SILENT, usual):
        return None
    return f"No news for {show_duration(silent)}. The process is alive; a step may take long."


def download(status: Status, name: str = "path") -> str | None:
    """Name the address of what a training came to, or of another of its files."""
    path = (status.get("final") or {}).get(name)
    if status["kind"] != "train" or not path:
        return None
    return f"/jobs/{status['job_id']}/files/{quote(path)}"


def doubts(status: Status) -> list[tuple[str, str | None]]:
    """Say of a finished training what speaks against it, and which file to take instead."""
    if status["state"] != "completed":
        return []
    found = [each for each in status.get("warnings") or [] if each["code"] in REMEDIES]
    better = {"overfitted": download(status, "best_checkpoint")}
    return [(f"{w['message']}. {REMEDIES[w['code']]}", better.get(w["code"])) for w in found]
