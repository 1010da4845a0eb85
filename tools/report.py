"""Tell a whole run on one page: an HTML file that needs nothing else, and goes anywhere.

python tools/report.py RUN_DIR
python tools/report.py RUN_DIR --eval GRID_DIR/eval.json --dataset DST/manifest.json

It takes runs that are finished, stopped, failed, still under way, or were killed.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PureWindowsPath
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_lora
from tools.page import document, esc, grid, rows, thumbnails
from tools.program import command_line, refuse, run, take_events
from train_lora import Emitter, Phase, Record, StopRequest, counted, duration_of

POINTS = 1000  # of a curve; a screen has no more
LAST = {"complete", "interrupted", "error"}
LINE_BYTES = 2**20  # whatever is longer was not written by the trainer


@dataclass
class Story:
    """What a run said over all its starts; of an update made again, the last word counts."""

    starts: list[Record] = field(default_factory=list)
    facts: dict[str, Record] = field(default_factory=dict)
    progress: dict[int, Record] = field(default_factory=dict)
    samples: dict[tuple[int, str], Record] = field(default_factory=dict)
    checkpoints: dict[int, Record] = field(default_factory=dict)
    validation: dict[int, Record] = field(default_factory=dict)
    warnings: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # a message for each code of a warning
    last: Record | None = None  # of the latest start, if it has ended
    unread: int = 0  # lines that are no events

    def hear(self, event: Record) -> None:
        """Take one line; what is not known is left alone."""
        kind, step = event.get("type"), event.get("step")
        if kind == "start":
            self.starts.append(event)
            self.last = None
        elif kind in LAST:
            self.last = event
        elif kind == "info" and isinstance(event.get("data"), dict):
            self.facts[str(event.get("topic"))] = event["data"]
        elif kind == "warning":
            self.warnings[str(event.get("code"))] += 1
            self.examples.setdefault(str(event.get("code")), str(event.get("message")))
        elif kind == "progress" and isinstance(step, int):
            self.progress[step] = event
        elif kind == "validation" and isinstance(step, int):
            self.validation[step] = event
        elif kind == "checkpoint" and isinstance(step, int):
            self.checkpoints[step] = event
        elif kind == "sample" and isinstance(step, int):
            self.samples[step, str(event.get("prompt"))] = event

    @property
    def config(self) -> Record:
        """Recall what the latest start was asked to do, with what its preset filled in."""
        said = self.starts[-1].get("config") if self.starts else None
        preset = self.facts.get("preset", {})
        filled = preset.get("values") if preset.get("verb") == "sets" else None
        return {**(said if isinstance(said, dict) else {}), **(filled or {})}

    def at_home(self, text: str) -> str:
        """Leave out of a text where somebody's folders lie: a page is made to be passed on."""
        for place in sorted(map(str, self.config.values()), key=len, reverse=True):
            path = PureWindowsPath(place)  # knows both kinds of slashes, and drives
            if path.root and path.name:
                text = text.replace(place, path.name)
        return text


def read_story(folder: Path, stop: StopRequest) -> Story:
    """Read events.jsonl line by line; a torn or foreign line is counted, and left out."""
    story, path = Story(), folder / "events.jsonl"
    if not path.is_file():
        return story
    with path.open("rb") as file:
        for line in iter(lambda: file.readline(LINE_BYTES), b""):
            stop.check()
            try:
                story.hear(json.loads(line))
            except (ValueError, AttributeError, TypeError, RecursionError):
                story.unread += 1
    return story


def read_losses(folder: Path, story: Story) -> list[tuple[float, float]]:
    """Take every update's loss from loss_history.csv, and beyond it the progress lines' means.

    The table is written when a run ends or is stopped; of a later start there may be lines alone.
    """
    points = []
    path = folder / "loss_history.csv"
    for line in path.read_text(encoding="utf-8").splitlines()[1:] if path.is_file() else []:
        step, loss, *_ = [*line.split(","), "", ""]
        if step.isdigit() and number(loss) is not None:
            points.append((float(step), float(loss)))
    end = max((step for step, _ in points), default=-1)
    told = ((step, number(event.get("loss"))) for step, event in sorted(story.progress.items()))
    more = [(float(step), loss) for step, loss in told if loss is not None and step > end]
    return points + more


def number(value: Any) -> float | None:
    """Read a finite number; anything else is none."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


# --- Words ---


def say(value: Any) -> str:
    """Put a value of a config or an event as a person reads it."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)


def span(seconds: float | None) -> str:
    """Say how long something took."""
    return "unknown" if seconds is None else duration_of(seconds)


def many(number: Any, noun: str) -> str:
    """Count what an event told; it may have told nothing."""
    return counted(number, noun) if isinstance(number, int) else f"? {noun}s"


def verdict(story: Story) -> str:
    """Say in one sentence what came of the run."""
    last = story.last
    step = max(story.progress, default=0)
    if last is None:
        return f"No last line: still under way, or killed, after step {step}"
    if last["type"] == "complete":
        return (
            f"Complete: {many(last.get('step'), 'step')} in {span(number(last.get('total_time')))}"
        )
    if last["type"] == "interrupted":
        return f"Stopped by {last.get('reason')} at step {last.get('step')}; it can go on"
    said = f"Failed with {last.get('code')}: {last.get('message')} {last.get('hint')}"
    return story.at_home(said)


def facts_of(story: Story) -> Iterator[tuple[str, str]]:
    """List what a person asks first."""
    newest = story.progress[max(story.progress)] if story.progress else {}
    last, dataset = story.last or {}, story.facts.get("dataset", {})
    model, device = story.facts.get("model", {}), story.facts.get("device", {})
    base = story.at_home(str(story.config.get("base_model", "?")))
    yield "Base model", f"{base} ({model.get('family', '?')})"
    yield "Device", f"{device.get('name', '?')} ({device.get('kind', '?')})"
    images = many(dataset.get("images"), "image")
    yield "Images", f"{images}, {many(dataset.get('captions_found'), 'caption')}"
    yield "Steps", f"{newest.get('step', 0)} of {newest.get('total_steps', '?')}"
    yield "Starts", str(len(story.starts))
    for name, key in (("Loss at the end", "loss"), ("Images per second", "images_per_second")):
        if (value := number(newest.get(key))) is not None:
            yield name, f"{value:.4g}"
    if peak := number(last.get("peak_memory_bytes")):
        yield "Memory at most", f"{peak / 2**30:.2f} GiB"
    if last.get("type") == "complete":
        yield "File", f"{Path(str(last.get('final_path'))).name}, {many(last.get('bytes'), 'byte')}"
        yield "SHA-256", str(last.get("sha256"))


def settings(story: Story) -> str:
    """List the config: first what differs from the defaults."""
    config = {name: story.at_home(say(value)) for name, value in story.config.items()}
    defaults = {name: say(knob["default"]) for name, knob in train_lora.knobs().items()}
    differ = {k: v for k, v in config.items() if k not in defaults or v != defaults[k]}
    same = {k: v for k, v in config.items() if k not in differ}
    return (
        f"<table>{rows(differ.items())}</table>"
        f"<details><summary>{counted(len(same), 'knob')} at default</summary>"
        f"<table>{rows(same.items())}</table></details>"
    )


# --- Curves ---


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep the lowest and the highest point of every stretch, so that no spike is lost."""
    if len(points) <= POINTS:
        return list(points)
    size = math.ceil(len(points) / (POINTS // 2))
    kept = []
    for begin in range(0, len(points), size):
        part = points[begin : begin + size]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average the losses, the latest most: over about a twentieth of the run."""
    keep, mean, weight, line = 1 - 1 / max(1, len(points) / 20), 0.0, 0.0, []
    for step, loss in points:
        mean, weight = keep * mean + (1 - keep) * loss, keep * weight + (1 - keep)
        line.append((step, mean / weight))
    return line


def curve(points: Sequence[tuple[float, float]], story: Story, *, logarithmic: bool) -> str:
    """Draw the loss over the steps, with what happened on the way."""
    across = max(step for step, _ in points) or 1.0
    told = ((float(step), number(event.get("loss"))) for step, event in story.validation.items())
    held = sorted((step, loss) for step, loss in told if loss is not None and step <= across)
    losses = [loss for _, loss in (*points, *held)]
    low, high = min(losses), max(losses)
    floor = math.log(max(low, 1e-9)) if logarithmic else 0.0
    height = (math.log(max(high, 1e-9)) if logarithmic else high) - floor or 1.0

    def place(step: float, loss: float) -> str:
        level = math.log(max(loss, 1e-9)) if logarithmic else loss
        return f"{50 + 740 * step / across:.1f},{260 - 240 * (level - floor) / height:.1f}"

    def line(kind: str, drawn: Sequence[tuple[float, float]]) -> str:
        return f'<polyline class="{kind}" points="{" ".join(place(*p) for p in drawn)}"/>'

    marks = [(step, "checkpoint", "checkpoint") for step in story.checkpoints]
    resumed = (start.get("resumed_step") for start in story.starts)
    marks += [(step, "seam", "resumed") for step in resumed if isinstance(step, int) and step]
    drawn = [
        f'<line class="{kind}" x1="{(x := 50 + 740 * step / across):.1f}" x2="{x:.1f}" y1="20" '
        f'y2="260"><title>{word} at step {step}</title></line>'
        for step, kind, word in marks
        if step <= across
    ]
    labels = [
        f'<text x="45" y="{260 - 240 * part:.0f}" text-anchor="end">'
        f"{math.exp(floor + part * height) if logarithmic else part * height:.3g}</text>"
        for part in (0, 0.5, 1)
    ]
    labels += [
        f'<text x="{50 + 740 * part:.0f}" y="278" text-anchor="middle">{across * part:g}</text>'
        for part in (0, 0.5, 1)
    ]
    return (
        '<svg viewBox="0 0 800 285" role="img" aria-label="Training loss over steps">'
        f"{''.join(labels)}{''.join(drawn)}{line('raw', thin(points))}"
        f"{line('mean', thin(smooth(points)))}{line('held', held)}</svg>"
    )


def curves(points: Sequence[tuple[float, float]], story: Story) -> str:
    """Offer the curve on both scales; which one is seen is the reader's choice."""
    if not points:
        return "<p>No loss was told.</p>"
    flat, steep = (curve(points, story, logarithmic=on) for on in (False, True))
    return (
        '<p><a href="#linear">linear</a> <a href="#logarithmic">logarithmic</a></p>'
        f'<div id="logarithmic" class="steep">{steep}</div>'
        f'<div id="linear" class="flat">{flat}</div>'
        '<p class="told">Pale: as told. Strong: the mean of a twentieth of the run. Dotted: the '
        "loss on images held back, where there are any. Upright: checkpoints; dashed where the run "
        "was resumed.</p>"
    )


# --- Pictures ---


def pictures(folder: Path, story: Story, most_bytes: int, at: Callable[[int], None]) -> str:
    """Lay the previews out, prompts down and steps across; say what was left out."""
    # The path may be one inside a container: only its name counts, inside this folder.
    names = {
        place: Path(str(event.get("image_path")).replace("\\", "/")).name
        for place, event in story.samples.items()
    }
    files = {place: folder / "samples" / name for place, name in names.items()}
    made = thumbnails(files, most_bytes, at)
    if not made:
        return "<p>None.</p>"
    steps = sorted({step for step, _ in made})
    prompts = dict.fromkeys(prompt for _, prompt in made)
    kept = steps
    if sum(len(source or "") for source in made.values()) > most_bytes:
        largest = max(len(source or "") for source in made.values())
        count = min(len(steps), max(2, most_bytes // (largest * len(prompts))))
        kept = sorted({steps[round(n * (len(steps) - 1) / (count - 1))] for n in range(count)})
    lines = [
        (prompt, [(made.get((step, prompt)), f"{prompt}, step {step}") for step in kept])
        for prompt in prompts
    ]
    left = len(steps) - len(kept)
    told = f"Left out for size: {left} of {counted(len(steps), 'round')} of previews."
    return grid(kept, lines) + (f"<p>{told}</p>" if left else "")


# --- The page ---


Begin = Callable[[str, int], Phase]  # of something that takes so many turns


def evaluation_part(path: Path, most_bytes: int, begin: Begin) -> str:
    """Take in what tools/evaluate.py found, with the pictures if they lie beside it."""
    from tools.evaluation_page import pictures_of, read_result, sections
    from tools.grid import read_grid

    place = path / "eval.json" if path.is_dir() else path
    result, shown = read_result(place), ""
    if (place.parent / "grid.json").is_file():
        judged = read_grid(place.parent)
        phase = begin("drawing pictures", len(judged.arms) * len(judged.prompts))
        shown = pictures_of(judged, most_bytes, phase.at)
    return "<h2>Evaluation</h2>" + "".join(sections(result, shown, 3))


def dataset_part(path: Path, most_bytes: int, begin: Begin) -> str:
    """Take in what tools/prepare.py found."""
    from tools.dataset_page import read_dataset, sections

    place = path / "manifest.json" if path.is_dir() else path
    said = read_dataset(place)
    phase = begin("drawing the dataset", len(said["pictures"]))
    return "<h2>Dataset</h2>" + "".join(sections(said, place.parent, most_bytes, phase.at))


def page(folder: Path, story: Story, arguments: argparse.Namespace, begin: Begin) -> bytes:
    """Write the page."""
    name = str(story.config.get("lora_name") or folder.resolve().name)
    most_bytes = int(arguments.max_mb * 2**20)
    warnings = story.warnings.most_common()
    warned = [(code, n, story.at_home(story.examples[code])) for code, n in warnings]
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    program = story.starts[-1].get("version", "?") if story.starts else "?"
    evaluated, dataset = arguments.eval, arguments.dataset
    previews = begin("drawing previews", len(story.samples))
    parts = [
        f"<h1>{esc(name)}</h1><p><strong>{esc(verdict(story))}</strong></p>",
        f"<table>{rows(facts_of(story))}</table>",
        f"<h2>Loss</h2>{curves(read_losses(folder, story), story)}",
        f"<h2>Previews</h2>{pictures(folder, story, most_bytes, previews.at)}",
        evaluation_part(evaluated, most_bytes, begin) if evaluated else "",
        dataset_part(dataset, most_bytes, begin) if dataset else "",
        f"<h2>Config</h2>{settings(story)}",
        f"<h2>Warnings</h2><table>{rows(warned)}</table>" if warned else "",
        f"<p>train_lora {esc(program)}{'' if arguments.deterministic else ', told ' + now}</p>",
    ]
    return document(name, parts)


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    whole = command_line(__doc__)
    whole.add_argument("folder", type=Path, metavar="RUN_DIR", help="the run's output_path")
    whole.add_argument("--out", type=Path, help="the page; RUN_DIR/report.html unless given")
    whole.add_argument("--eval", type=Path, help="eval.json of tools/evaluate.py, or its folder")
    whole.add_argument("--dataset", type=Path, help="manifest.json of tools/prepare.py")
    whole.add_argument("--max-mb", type=float, default=10, help="most that previews may take")
    whole.add_argument("--dry-run", action="store_true", help="say what would be told")
    whole.add_argument("--deterministic", action="store_true", help="leave out when it was made")
    take_events(whole)
    return whole


def work(
    arguments: argparse.Namespace, events: Emitter, stop: StopRequest
) -> tuple[str, list[str]]:
    """Read the run and write its page."""
    folder = arguments.folder
    story = read_story(folder, stop)
    if not story.starts and not (folder / "loss_history.csv").is_file():
        raise refuse(folder, "the output_path of a run", "no events.jsonl and no loss_history.csv")
    out = arguments.out or folder / "report.html"
    begin = functools.partial(Phase, events=events, stop=stop)
    content = page(folder, story, arguments, begin)
    if arguments.dry_run:
        return f"Would write {out.name}. {verdict(story)}", []
    train_lora.write_whole(out, content)
    return f"{out.name}: {len(content) / 2**20:.1f} MiB. {verdict(story)}", [str(out)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    return run(parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
