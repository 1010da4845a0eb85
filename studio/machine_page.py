"""What is on this machine: processors and who uses them, disks, base models, programs."""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio import preflight, slots
from studio.problems import Problem
from studio.status import briefs, read_result

if TYPE_CHECKING:
    from starlette.datastructures import State

    from studio.settings import Settings

Record = dict[str, Any]

FRESH_SECONDS = 15
MOST_LISTED = 200
MODEL_SUFFIXES = (".safetensors",)


def machine_values(studio: State) -> Record:
    """Gather all that the page shows."""
    settings = studio.settings
    return {
        "slots": slots_of(studio),
        "devices": devices(settings, int(time.monotonic() / FRESH_SECONDS)),
        "disk": shutil.disk_usage(settings.root),
        "folders": folders_of(settings),
        "models": local_models(settings),
        "cached": cached_models(),
        "allowed": [str(path) for path in settings.allowed_roots],
        "programs": [
            ("Trainer", trainer_version(settings)),
            ("Python of the trainer", settings.python),
            ("Studio", f"Python {platform.python_version()} on {platform.system()}"),
        ],
        "waiting": len(studio.store.queue()),
    }


def slots_of(studio: State) -> list[Record]:
    """Say of each processor what it does, and how much of its memory others use."""
    holds = studio.store.holds()
    running = {brief["job_id"]: brief for brief in briefs(studio.store, studio.store.active())}
    fresh = {slot.id: slot for slot in slots.cards()}
    found = (fresh.get(slot.id, slot) for slot in studio.reconciler.slots)
    return [
        {
            "id": slot.id,
            "name": slot.name,
            "total": slot.total_bytes,
            "used": slot.used_bytes,
            "job": running.get(holds.get(slot.id, "")),
        }
        for slot in found
    ]


@functools.lru_cache(maxsize=4)
def devices(settings: Settings, _: int) -> list[Record]:
    """Ask the trainer what could train here; nothing where it cannot say."""
    try:
        said = json.loads(preflight.run(settings, "", "--devices"))
    except (Problem, ValueError):
        return []
    found = said.get("devices") if isinstance(said, dict) else None
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


@functools.lru_cache(maxsize=4)
def trainer_version(settings: Settings) -> str:
    """Ask the trainer its version."""
    try:
        return preflight.run(settings, "", "--version").decode("utf-8", "replace").strip()
    except Problem as problem:
        return problem.detail


def folders_of(settings: Settings) -> list[tuple[str, str, int]]:
    """Say where things lie, and how many there are."""
    named = (
        ("Datasets", settings.datasets),
        ("Runs", settings.jobs),
        ("Base models", settings.models),
        ("Trash", settings.trash),
    )
    return [(name, str(folder), sum(1 for _ in folder.iterdir())) for name, folder in named]


def local_models(settings: Settings) -> list[Record]:
    """List the base models in the studio's own folder."""
    found = sorted(settings.models.iterdir())[:MOST_LISTED]
    return [
        {"name": path.name, **model_of(path)} for path in found if not path.name.startswith(".")
    ]


def model_of(path: Path) -> Record:
    """Say what a model is, as far as its outside tells."""
    if path.is_dir():
        index = read_result(path / "model_index.json")
        whole = index.get("_class_name", "no diffusers folder: model_index.json is missing")
        return {"what": str(whole), "bytes": None}
    usable = path.suffix in MODEL_SUFFIXES
    what = "single file" if usable else "not read: only safetensors are"
    return {"what": what, "bytes": path.stat().st_size}


def cached_models() -> list[str]:
    """List the models of the hub that were downloaded, by the names of their folders."""
    home = os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE", Path(home) / "hub"))
    if not hub.is_dir():
        return []
    names = sorted(path.name for path in hub.glob("models--*--*"))[:MOST_LISTED]
    return [name.removeprefix("models--").replace("--", "/", 1) for name in names]
