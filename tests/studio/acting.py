"""A studio whose trainer checks configs as the real one does, and trains as the replay does."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conftest import ROOT, write_image
from serving import Served, serving
from studio_ground import end_all

from studio.reconcile import Pace

Record = dict[str, Any]

REPLAY = Path(__file__).with_name("replay.py")
PROGRAM = """
import json, os, runpy, sys
program = {replay!r}
words = {words!r}
if "--validate-only" in sys.argv:
    config = json.load(sys.stdin)
    config["output_path"] += " of nobody"  # a replay's states are none that the trainer knows
    ready, tell = os.pipe()
    os.write(tell, json.dumps(config).encode())
    os.close(tell)
    os.dup2(ready, 0)
    program, words = {real!r}, []
sys.argv += words
runpy.run_path(program, run_name="__main__")
"""
BRISK = Pace(round=0.1)
MODEL = ROOT / "examples" / "tiny-sd"
PROBLEM_SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "instance", "code", "problems"],
    "additionalProperties": False,
    "properties": {
        "type": {"type": "string", "pattern": "^/problems/[a-z-]+$"},
        "title": {"type": "string", "minLength": 1},
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "detail": {"type": "string", "minLength": 1},
        "instance": {"type": "string", "pattern": "^/"},
        "code": {"type": "string", "pattern": "^[a-z_]+$"},
        "problems": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["path", "expected", "found", "hint"],
                "additionalProperties": {"type": "string"},
            },
        },
    },
}


def write_repository(folder: Path, **switches: Any) -> Path:
    """Make a folder with a trainer that acts; switches make it misbehave."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "config_schema.json", folder)
    (folder / "tools").symlink_to(ROOT / "tools")  # they find the real trainer
    words = [f"--{name}={value}" for name, value in switches.items()]
    values = {"real": str(ROOT / "train_lora.py"), "replay": str(REPLAY), "words": words}
    (folder / "train_lora.py").write_text(PROGRAM.format(**values), encoding="utf-8")
    return folder


@contextmanager
def acting(folder: Path, **options: Any) -> Iterator[Served]:
    """Serve a studio with a dataset of three pictures, whose runs are replays."""
    switches = options.pop("switches", {"step-seconds": 0.01})
    repository = write_repository(folder / "repository", **switches)
    write_dataset(folder / "root" / "datasets" / "imps")
    options = {"slots": "cpu:2", "allowed_roots": (ROOT / "examples",), **options}
    with serving(folder / "root", repository=repository, **options) as served:
        served.app.state.reconciler._pace = BRISK
        try:
            yield served
        finally:
            end_all(served.settings)


def write_dataset(folder: Path) -> None:
    """Write three pictures with captions."""
    folder.mkdir(parents=True)
    for number in range(3):
        write_image(folder / f"{number}.png", (300, 300 + number))
        (folder / f"{number}.txt").write_text(f"zkb number {number}", encoding="utf-8")


def wanted(**config: Any) -> Record:
    """Ask for a short training of that dataset."""
    short = {"steps": 12, "resolution": 256, "checkpoint_steps": 4, "validation_steps": 4}
    base = {"base_model": str(MODEL), "trigger_words": ["zkb"]}
    return {"dataset": "imps", "config": base | short | config}


def submitted(studio: Served, path: str = "/train", **body: Any) -> str:
    """Submit a job, a training unless said otherwise, and return its id."""
    answer = studio.client.post(path, json=body or wanted())
    assert answer.status_code == 202, answer.text
    return str(answer.json()["job_id"])


def status_when(studio: Served, job_id: str, true: Callable[[Record], bool]) -> Record:
    """Ask for a job's status until something is true of it."""
    deadline = time.monotonic() + 60
    while True:
        told: Record = studio.client.get(f"/status/{job_id}").json()
        if true(told):
            return told
        assert time.monotonic() < deadline, told
        time.sleep(0.05)


def is_in(*states: str) -> Callable[[Record], bool]:
    """Make a question of a status: is the job in one of these states."""
    return lambda told: told["state"] in states
