"""Compare a run that two processes share with the same run in one, with as many threads in all.

    python benchmarks/team.py

The bundled model on this machine's cores, by gloo. What is counted as exchange is the time between
asking for the sum of the gradients and having it, in which the faster process waits too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train_lora import Emitter, LoRATrainer, Team, TrainingConfig

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
STEPS = 60
IMAGES = 8  # of an update


def write_config(folder: Path, processes: int) -> Path:
    """Write a run of the bundled example without previews."""
    document = {
        "dataset_path": str(ROOT / "examples" / "images"),
        "base_model": str(ROOT / "examples" / "tiny-sd"),
        "output_path": str(folder / f"out_{processes}"),
        "trigger_words": ["zkb"],
        "resolution": 256,
        "batch_size": IMAGES // processes,
        "steps": STEPS,
        "validation_steps": STEPS + 1,
        "checkpoint_steps": STEPS + 1,
        "sample_steps": 1,
        "device": "cpu",
    }
    path = folder / f"{processes}.json"
    path.write_text(json.dumps(document), "utf-8")
    return path


def train(path: str) -> None:
    """Train, and print what it took; under a launcher, the first process does."""
    exchange: list[float] = []
    add_up = Team.add_up

    def timed(team: Team, sums: torch.Tensor) -> None:
        began = time.monotonic()
        add_up(team, sums)
        exchange.append(time.monotonic() - began)

    setattr(Team, "add_up", timed)  # noqa: B010, a method, with a clock around it
    trainer = LoRATrainer(TrainingConfig.from_json(path), Emitter())
    trainer.train()
    if trainer.team.leads:
        pace = trainer.state.seconds_per_step
        told = {"seconds_per_step": pace, "exchange_seconds": sum(exchange[1:]) / (STEPS - 1)}
        sys.stdout.write(json.dumps(told) + "\n")


def measure(folder: Path, processes: int, threads: int) -> dict[str, float]:
    """Run once, in processes of so many threads each."""
    inside = [str(Path(__file__).resolve()), str(write_config(folder, processes))]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), *inside]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def main() -> int:
    """Print a table."""
    if len(sys.argv) > 1:
        train(sys.argv[1])
        return 0
    write = sys.stdout.write
    write("| | images per second | s per update | of it exchange |\n| --- | ---: | ---: | ---: |\n")
    with tempfile.TemporaryDirectory() as folder:
        for processes, threads in ((1, 2), (2, 1)):
            told = measure(Path(folder), processes, threads)
            pace = told["seconds_per_step"]
            share = told["exchange_seconds"] / pace
            name = f"{processes} × {threads} thread{'s' if threads > 1 else ''}"
            write(f"| {name} | {IMAGES / pace:.2f} | {pace:.3f} | {share:.0%} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
