"""Compare train_lora.py with the textbook loop and with a bare step.

    python benchmarks/bench.py                                    the bundled model
    python benchmarks/bench.py --model sd15 --rounds 2            the size of Stable Diffusion 1.5
    python benchmarks/bench.py --sweep images                     how cost grows with one thing

Each contestant is a process of its own, watched from outside, and they take turns. Tables go to
standard output.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).resolve().parent
PROGRAM = HERE.parent / "train_lora.py"
SWEEPS: dict[str, tuple[int, ...]] = {
    "images": (10, 100, 1000, 10_000),
    "resolution": (256, 384, 512),
    "rank": (4, 16, 64),
    "batch": (1, 2, 4),
}


Line = tuple[float, dict[str, Any]]  # when it came, and what it said


@dataclass(frozen=True)
class Task:
    """What all contestants are to do."""

    model: Path
    resolution: int
    batch: int
    rank: int
    steps: int
    images: int


@dataclass
class Measured:
    """What a finished process took."""

    step_seconds: list[float] = field(default_factory=list)
    first_step_seconds: float = 0.0  # from the start of the process
    peak_bytes: int = 0  # of the device, or of the whole process on a CPU
    spans: dict[str, float] = field(default_factory=dict)  # seconds of other parts, by name
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Take the median step, without the first ones, which warm up."""
        return statistics.median(self.step_seconds[2:] or self.step_seconds)


def watch(command: list[object]) -> tuple[list[Line], int]:
    """Run a process; return its lines with the seconds at which they came, and its peak memory."""
    began = time.monotonic()
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=errors
        ) as process,
    ):
        assert process.stdout is not None
        lines = [(time.monotonic() - began, json.loads(line)) for line in process.stdout]
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{command} failed:\n{errors.read().decode()}{lines[-1:]}")
    return lines, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_loop(script: str, task: Task, data: Path) -> Measured:
    """Run one of the loops beside this file."""
    options = [("--resolution", task.resolution), ("--batch", task.batch)]
    options += [("--rank", task.rank), ("--steps", task.steps)]
    flat = [part for option in options for part in option]
    lines, peak = watch([HERE / script, task.model, data, *flat])
    steps = [(at, line) for at, line in lines if "step" in line]
    facts = lines[-1][1]
    seconds = [line["seconds"] for _, line in steps]
    return Measured(seconds, steps[0][0], facts.pop("peak_bytes") or peak, facts=facts)


def run_trainer(task: Task, data: Path, **changes: object) -> Measured:
    """Run the program as a host does."""
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "dataset_path": str(data),
            "base_model": str(task.model),
            "output_path": f"{folder}/out",
            "trigger_words": ["zkb"],
            "resolution": task.resolution,
            "batch_size": task.batch,
            "lora_rank": task.rank,
            "lora_alpha": task.rank,
            "steps": task.steps,
            "checkpoint_steps": task.steps,
            "validation_steps": task.steps,
            "sample_steps": 1,
            **changes,
        }
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config), "utf-8")
        began = time.monotonic()
        watch([PROGRAM, "--config", path, "--validate-only"])
        preflight = time.monotonic() - began
        lines, peak = watch([PROGRAM, "--config", path])
    return replace(read_events(lines, peak), spans={"preflight": preflight} | spans(lines))


def read_events(lines: list[Line], peak: int) -> Measured:
    """Read the steps from the progress lines, which may stand for several steps each."""
    told = [line for _, line in lines if line["type"] == "progress"]
    seconds = [
        (now["elapsed_seconds"] - then["elapsed_seconds"]) / (now["step"] - then["step"])
        for then, now in itertools.pairwise(told)
    ]
    memory = {line["data"]["phase"]: line["data"] for _, line in lines if is_about(line, "memory")}
    on_device = any(
        is_about(line, "device") and line["data"]["kind"] == "cuda" for _, line in lines
    )
    if on_device:
        peak = lines[-1][1]["peak_memory_bytes"]
    first = next(at for at, line in lines if line["type"] == "progress")
    return Measured(seconds, first, peak, facts={"memory": memory})


def is_about(line: dict[str, Any], topic: str) -> bool:
    """Tell whether a line is of one topic of the info lines."""
    return bool(line.get("topic") == topic)


def spans(lines: list[Line]) -> dict[str, float]:
    """Tell how long the parts of a run took that are not steps."""

    def first(wanted: Callable[[dict[str, Any]], bool]) -> float:
        return next(at for at, line in lines if wanted(line))

    def end(phase: str) -> float:
        return first(lambda line: is_about(line, "memory") and line["data"]["phase"] == phase)

    last_step = [at for at, line in lines if line["type"] == "progress"][-1]
    # The device is told twice: by the system, and by torch once that is imported.
    imported = [at for at, line in lines if is_about(line, "device")][-1]
    return {
        "look and import": imported - first(lambda line: line["type"] == "start"),
        "encode": end("encoding") - imported,
        "load": end("loading") - end("encoding"),
        "save": first(lambda line: line["type"] == "checkpoint") - last_step,
    }


def draw_data(folder: Path, count: int, side: int) -> Path:
    """Write so many different pictures with captions."""
    folder.mkdir(parents=True)
    for number in range(count):
        picture = Image.effect_noise((side // 8, side // 8), 40 + number % 60).resize((side, side))
        picture.convert("RGB").save(folder / f"{number:05d}.png", compress_level=1)
        words = f"a {['red', 'blue', 'green'][number % 3]} circle number {number % 50}"
        (folder / f"{number:05d}.txt").write_text(words, "utf-8")
    return folder


# --- tables --------------------------------------------------------------------------------------


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Lay out a Markdown table."""
    lines = [list(head), ["---"] + ["---:" for _ in list(head)[1:]], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def gib(size: float) -> str:
    """Write an amount of memory."""
    return f"{size / 2**30:.2f} GiB"


def compare(task: Task, data: Path, rounds: int) -> str:
    """Let the three take turns, and lay out what each took at the median."""
    contestants: dict[str, Callable[[], Measured]] = {
        "textbook loop": lambda: run_loop("reference.py", task, data),
        "train_lora.py": lambda: run_trainer(task, data),
        "bare step": lambda: run_loop("bare.py", task, data),
    }
    runs: dict[str, list[Measured]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            runs[name].append(contestant())
            say(f"{name}: {runs[name][-1].seconds:.3f} s per step")
    bare, ours = runs["bare step"][0], runs["train_lora.py"]
    least = bare.facts["operations"] / bare.facts["rate"]
    rows = []
    for name, measured in runs.items():
        seconds = statistics.median(each.seconds for each in measured)
        ratios = [
            a.seconds / b.seconds for a, b in zip(runs["textbook loop"], measured, strict=True)
        ]
        first = statistics.median(each.first_step_seconds for each in measured)
        peak = statistics.median(each.peak_bytes for each in measured)
        rows.append(
            [
                name,
                f"{seconds:.3f}",
                f"{statistics.median(ratios):.2f} ×",
                f"{task.batch / seconds:.2f}",
                gib(peak),
                f"{first:.1f}",
                f"{least / seconds:.0%}",
            ]
        )
    head = ["", "s per step", "against textbook", "images/s", "peak memory", "first step after, s"]
    parts = table([*head, "of matmul rate"], rows)
    spent = {name: statistics.median(run.spans[name] for run in ours) for name in ours[0].spans}
    names = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in spent.items())
    return (
        f"{parts}\n\nA step has {bare.facts['operations'] / 1e12:.3f} TFLOP; the machine does "
        f"{bare.facts['rate'] / 1e9:,.0f} GFLOP/s in matrix products.\n"
        f"train_lora.py: {names}.\n\n{plan_table(ours[0])}"
    )


def plan_table(run: Measured) -> str:
    """Hold the plan against what each phase came to."""
    rows = [
        [phase, gib(told["planned_bytes"]), gib(told["peak_bytes"]), share(told)]
        for phase, told in run.facts["memory"].items()
        if told["peak_bytes"]
    ]
    return table(["phase", "planned", "measured", "planned / measured"], rows)


def share(told: dict[str, Any]) -> str:
    """Tell how far the plan is from what came."""
    return f"{told['planned_bytes'] / told['peak_bytes']:.2f}"


def sweep(task: Task, name: str, root: Path) -> str:
    """Let one thing grow, and lay out what grows with it."""
    rows = []
    for value in SWEEPS[name]:
        changes: dict[str, Any] = {name: value}
        grown = replace(task, **changes)
        data = draw_data(root / f"{name}_{value}", grown.images, grown.resolution)
        run = run_trainer(grown, data)
        say(f"{name} {value}: {run.seconds:.3f} s per step")
        training = run.facts["memory"]["training"]
        rows.append(
            [
                f"{value:,}",
                f"{run.seconds:.3f}",
                f"{run.first_step_seconds:.1f}",
                *(f"{run.spans[part]:.2f}" for part in ("preflight", "encode", "save")),
                gib(run.peak_bytes),
                share(training),
            ]
        )
    head = [name, "s per step", "first step after, s", "preflight, s", "encode, s", "save, s"]
    return table([*head, "peak memory", "planned / measured"], rows)


def say(words: str) -> None:
    """Show progress."""
    sys.stderr.write(f"{words}\n")


def describe_machine() -> str:
    """Say where and when this was measured."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft"))
    processor = platform.processor() or platform.machine()
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        processor = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    elif Path("/proc/cpuinfo").exists():
        told = Path("/proc/cpuinfo").read_text("utf-8")
        names = [line.partition(": ")[2] for line in told.splitlines() if "model name" in line]
        processor = f"{os.cpu_count()} cores of {names[0]}" if names else processor
    return f"{datetime.now().astimezone():%Y-%m-%d}, {processor}, {packages}"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure train_lora.py.")
    parser.add_argument("--model", choices=["tiny", "sd15", "sdxl"], default="tiny")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sweep", choices=list(SWEEPS))
    given = parser.parse_args()
    # In a process of its own, as a child begins with its parent's peak of memory.
    building = [sys.executable, HERE / "models.py", given.model, HERE / ".models"]
    built = subprocess.run(building, check=True, stdout=subprocess.PIPE, text=True)
    model = Path(built.stdout.strip())
    task = Task(model, given.resolution, given.batch, given.rank, given.steps, given.images)
    with tempfile.TemporaryDirectory() as folder:
        if given.sweep:
            result = sweep(task, given.sweep, Path(folder))
        else:
            data = draw_data(Path(folder) / "data", task.images, 2 * task.resolution)
            result = compare(task, data, given.rounds)
    asked = " ".join(sys.argv[1:]) or "no options"
    sys.stdout.write(f"{describe_machine()}; {asked}\n\n{result}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
