"""Compare pictures of many shapes with squares: what a megapixel of each takes.

    python benchmarks/buckets.py

The bundled model on one core, in turns; CPU time, which others on the machine do not change much.
Shapes are those of photographs, upright and lying, and squares; each update has eight pictures in
batches of four, and a batch is of one shape.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image

from train_lora import Emitter, LoRATrainer, TrainingConfig

ROOT = Path(__file__).resolve().parent.parent
STEPS, ROUNDS, WARM_UP = 22, 2, 8
SETS = {
    "squares": ((1024, 1024),),
    "three shapes": ((1024, 1024), (800, 1200), (1200, 800)),
    "seven shapes": (
        *((1024, 1024), (800, 1200), (1200, 800), (900, 1200), (1200, 900), (720, 1280)),
        (1280, 720),
    ),
}


@dataclass
class Timed(LoRATrainer):
    """A run that notes what its updates take, and how many pixels they have."""

    seconds: list[float] = field(default_factory=list)
    megapixels: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def update(self) -> None:
        """Make one update with a clock around it."""
        window = self.order.window(self.state.step + 1)
        began = time.process_time()
        super().update()
        self.seconds.append(time.process_time() - began)
        sizes = [self.cache.images[image].time_ids[-2:] for image in window]
        self.megapixels.append(sum(float(size.prod()) for size in sizes) / 1e6)
        self.counts.append(len(list(self.batches(window))))

    @property
    def pace(self) -> float:
        """Tell the seconds of a megapixel, once libraries have met each shape."""
        pairs = zip(self.seconds, self.megapixels, strict=True)
        return statistics.median(seconds / size for seconds, size in list(pairs)[WARM_UP:])


def draw_data(folder: Path, shapes: tuple[tuple[int, int], ...]) -> Path:
    """Draw 56 pictures, as many of each shape as of the others."""
    folder.mkdir()
    for number, size in zip(range(56), itertools.cycle(shapes)):
        turned = Image.radial_gradient("L").rotate(6 * number)
        bands = (Image.linear_gradient("L"), turned, turned.rotate(90))
        Image.merge("RGB", bands).resize(size).save(folder / f"{number}.png")
    return folder


def train(data: Path, output: Path) -> Timed:
    """Train on one set."""
    document: dict[str, Any] = {
        "dataset_path": str(data),
        "base_model": str(ROOT / "examples" / "tiny-sd"),
        "output_path": str(output),
        "cache_dir": str(output.parent / "cache"),
        "trigger_words": ["zkb"],
        "resolution": 256,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps": STEPS,
        "validation_steps": STEPS + 1,
        "checkpoint_steps": STEPS + 1,
        "sample_steps": 1,
        "device": "cpu",
    }
    path = output.with_suffix(".json")
    path.write_text(json.dumps(document), "utf-8")
    run = Timed(TrainingConfig.from_json(path), Emitter())
    run.train()
    return run


def main() -> int:
    """Print a table."""
    write = sys.stdout.write
    found: dict[str, list[Timed]] = {name: [] for name in SETS}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = {name: draw_data(root / name, shapes) for name, shapes in SETS.items()}
        for turn, name in itertools.product(range(ROUNDS), SETS):
            found[name].append(train(data[name], root / f"{name} {turn}"))
    write("| | megapixels per update | batches per update | s per megapixel | against squares |\n")
    write("| --- | ---: | ---: | ---: | ---: |\n")
    for name, runs in found.items():
        paces = [run.pace for run in runs]
        ratios = [pace / base.pace for pace, base in zip(paces, found["squares"], strict=True)]
        size, passes = (statistics.mean(each) for each in (runs[0].megapixels, runs[0].counts))
        write(f"| {name} | {size:.2f} | {passes:.2f} | {statistics.median(paces):.3f} ")
        write(f"| {statistics.median(ratios):.3f} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
