"""Judge pictures of a grid: how like the subject, how true to the prompt, how far from the base.

python tools/evaluate.py GRID_DIR --train DATASET        scores with intervals, and a recommendation
python tools/evaluate.py GRID_A GRID_B --train DATASET   two LoRAs against each other

GRID_DIR is what tools/generate.py made. Nothing is drawn here, and no diffusion model is loaded.
eval.json and eval.html are written there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.program import as_json, command_line, remark, run, table, take_events
from train_lora import (
    Emitter,
    Phase,
    Record,
    StopRequest,
    choose_device,
    counted,
    load_picture,
    write_whole,
)

if TYPE_CHECKING:
    from tools.embeddings import Eye
    from tools.grid import Arm, Grid
    from tools.judging import Seen


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    whole = command_line(__doc__)
    add = whole.add_argument
    add("folder", nargs="+", type=Path, metavar="GRID_DIR")
    add("--train", type=Path, required=True, metavar="DATASET", help="what was trained on")
    add("--heldout", type=Path, metavar="DATASET", help="pictures of the subject that were not")
    add("--class-word", metavar="WORD", help="what the subject is, as dog: does it leak there?")
    add("--vision", help="folder or id of DINOv2; facebook/dinov2-small unless given")
    add("--clip", help="folder or id of a CLIP: how true to the prompt pictures are")
    add("--fid", action="store_true", help="FID too, though it tells nothing of few pictures")
    add("--device", default="cpu", help="cpu, cuda or mps")
    add("--out", type=Path, metavar="FILE", help="GRID_DIR/eval.json unless given")
    add("--max-mb", type=float, default=5, help="most that the page's pictures may take")
    add("--dry-run", action="store_true", help="say what would be judged")
    take_events(whole)
    return whole


def work(
    arguments: argparse.Namespace, events: Emitter, stop: StopRequest
) -> tuple[str, list[str]]:
    """Look at all pictures, and write what they tell."""
    from tools.grid import join, read_grid, without_bad_cells

    grid = join([read_grid(folder) for folder in arguments.folder])
    if arguments.dry_run:
        told = (
            f"Would judge {counted(len(grid.files), 'picture')}: {counted(len(grid.arms), 'arm')}"
        )
        asked = f"{counted(len(grid.prompts), 'prompt')}, {counted(len(grid.seeds), 'seed')}"
        return f"{told}, {asked}", []
    phase = Phase("checking pictures", len(grid.files), events, stop)
    grid = without_bad_cells(grid, events, phase)
    result = judge(grid, arguments, events, stop)
    out = arguments.out or arguments.folder[0] / "eval.json"
    page = out.with_suffix(".html")
    write_whole(out, as_json(result))
    write_whole(page, page_of(result, grid, arguments, events, stop))
    if not arguments.events:
        show(result)
    from tools.verdict import conclusion

    return conclusion(result), [str(out), str(page)]


def judge(grid: Grid, arguments: argparse.Namespace, events: Emitter, stop: StopRequest) -> Record:
    """Let models look, and conclude."""
    from tools.base_model import ask_for
    from tools.embeddings import VISION, Eye
    from tools.judging import FEW_IMAGES, Judge
    from tools.verdict import verdict_on

    training = training_files(arguments.train, events, stop)
    if len(training) < FEW_IMAGES:
        few = counted(len(training), "different training picture")
        remark(events, f"Only {few}: little can be concluded")
    heldout = training_files(arguments.heldout, events, stop) if arguments.heldout else []
    place = (arguments.out or arguments.folder[0] / "eval.json").parent
    look = Looking(grid, (training, heldout), place, events, stop)
    device = str(choose_device(ask_for("none", device=arguments.device)))
    eye = Eye(arguments.vision or VISION, device)
    reader = Eye(arguments.clip, device) if arguments.clip else None
    judged = Judge(
        grid,
        look.through(eye),
        look.through(reader) if reader else None,
        arguments.class_word,
        look.for_copies(),
    )
    features = {"vision": eye.record(), "clip": reader.record() if reader else None}
    found = verdict_on(judged, with_fid=arguments.fid)
    return found | {"features": features, "heldout_images": len(heldout)}


class Looking:
    """All pictures that models look at."""

    def __init__(
        self,
        grid: Grid,
        others: tuple[Sequence[Path], Sequence[Path]],  # of training, and held back
        place: Path,
        events: Emitter,
        stop: StopRequest,
    ) -> None:
        """Collect them; what models see is kept in a place, should this start be stopped."""
        self.grid, self.place, (self.training, self.heldout) = grid, place, others
        self.files = list(dict.fromkeys(grid.files.values()))
        self.total = len(self.files) + len(self.training) + len(self.heldout)
        self.events, self.stop = events, stop

    def through(self, eye: Eye) -> Seen:
        """Let a model look at them, and read the prompts if it reads."""
        from tools.embeddings import Kept
        from tools.judging import Seen

        kept = Kept(eye, self.place)
        phase = Phase(f"looking with {eye.name}", self.total, self.events, self.stop)
        asked = self.grid.role("subject")
        plain = [self.grid.prompts[prompt]["plain"] for prompt in asked]
        texts = eye.read(plain) if eye.reads and plain else None
        count, known = len(self.files), len(self.files) + len(self.training)
        pictures = eye.see(self.files, phase, 0, kept)
        seen = Seen(
            pictures=dict(zip(self.files, pictures, strict=True)),
            train=eye.see(self.training, phase, count, kept),
            heldout=eye.see(self.heldout, phase, known, kept) if self.heldout else None,
            texts=dict(zip(asked, texts, strict=True)) if texts is not None else None,
        )
        kept.tidy()
        return seen

    def for_copies(self) -> dict[Arm, list[Record]]:
        """Find pictures that are training pictures again, as a dataset's near duplicates are."""
        from PIL import Image, ImageOps

        from tools.pictures import are_near, measure

        total = len(self.files) + len(self.training)
        phase = Phase("looking for copies", total, self.events, self.stop)
        with Image.open(self.files[0], formats=("PNG",)) as first:
            size = first.size
        known = []
        for done, file in enumerate(self.training):
            phase.at(done)
            fitted = ImageOps.fit(load_picture(file), size, Image.Resampling.LANCZOS)
            known.append((file.name, measure(fitted, min(size))))
        found: dict[Arm, list[Record]] = {}
        for done, ((arm, _, _), file) in enumerate(self.grid.files.items(), start=len(known)):
            phase.at(done)
            own = measure(load_picture(file), min(size))
            for name, other in known:
                if are_near(own, other):
                    place = "/".join(file.parts[-2:])
                    found.setdefault(arm, []).append({"file": place, "of": name})
        return found


def training_files(folder: Path, events: Emitter, stop: StopRequest) -> list[Path]:
    """List the training pictures; of copies one, as they would count for more."""
    from tools.dataset import Wishes, find_pictures, mark_duplicates

    wishes = Wishes(resolution=512, trigger=["x"])
    found = [each for each in find_pictures(folder, wishes, events, stop) if each.measures]
    mark_duplicates(found, wishes)
    first = {each.cluster: each.path for each in reversed(found)}
    return list(first.values())


def page_of(
    result: Record, grid: Grid, arguments: argparse.Namespace, events: Emitter, stop: StopRequest
) -> bytes:
    """Write the page."""
    from tools.evaluation_page import pictures_of, sections
    from tools.page import document, esc

    phase = Phase("drawing the page", len(grid.files), events, stop)
    pictures = pictures_of(grid, int(arguments.max_mb * 2**20), phase.at)
    title = "Evaluation of " + " and ".join(f.resolve().name for f in arguments.folder)
    return document(title, [f"<h1>{esc(title)}</h1>", *sections(result, pictures)])


def show(result: Record) -> None:
    """Print the scores for a person."""
    from tools.evaluation_page import plus_minus

    head = ("", "like the subject", "true to the prompt", "drift", "diversity", "quality")
    names = ("fidelity", "text_fit", "drift", "diversity", "quality")
    lines = [[arm["arm"], *(plus_minus(arm.get(n)) for n in names)] for arm in result["arms"]]
    table([head, *lines])
    for doubt in result["doubts"]:
        sys.stdout.write(f"- {doubt}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    return run(parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
