"""What the page of one run shows, from its row, its story and its files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio import forms, preflight, words
from studio.files import read_log
from studio.film import film_of, natural
from studio.series import VALIDATION
from studio.status import final_of, job_of, status
from studio.store import FINAL
from studio.views import show_bytes, show_duration, show_number, show_share

if TYPE_CHECKING:
    from starlette.datastructures import State

    from studio.events import Story
    from studio.store import AttemptRow, Job

Record = dict[str, Any]
Points = list[tuple[int, float]]

THUMBNAIL = "?thumb=384"
OTHER_FILES = {"train": (".csv",)}  # beside tensors; of jobs of other kinds, what follows
TOLD_FILES = (".json", ".html", ".csv", ".txt")
MOST_PICTURES = 400
MOST_MESSAGES = 500
NOTES = {"warning": "warn", "error": "bad", "complete": "good", "interrupted": "warn"}
CURVES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "images_per_second": "Images per second",
    "seconds_per_step": "Seconds per step",
    "memory_bytes": "Memory",
}
WIDTH, HEIGHT = 800, 240  # of the curve that needs no script
BUCKETS = 160
SAME = 0.05  # share by which a loss has to change to be said to


@cache
def schema_of(repository: Path) -> Record:
    """Read the trainer's schema."""
    return dict(json.loads(preflight.schema(repository)))


@cache
def controls_of(repository: Path) -> dict[str, forms.Control]:
    """Make the controls of its knobs."""
    return forms.controls(schema_of(repository))


@dataclass(frozen=True)
class Told:
    """What a job has said, at one moment: a stream that goes on from there leaves nothing out."""

    position: str
    start: Record
    progress: Record
    messages: list[Record]
    samples: list[Record]
    checkpoints: list[Record]
    dataset: Record
    preset: Record  # what it filled in
    losses: Points
    held_losses: Points  # on images held back


def told_so_far(story: Story) -> Told:
    """Take all that a page shows at once, as the story goes on in another thread."""
    with story.lock:
        return Told(
            position=str(story.recent.end),
            start=story.start or {},
            progress=story.progress or {},
            messages=list(story.messages)[-MOST_MESSAGES:],
            samples=list(story.samples),
            checkpoints=list(story.checkpoints),
            dataset=story.facts.get("dataset", {}),
            preset=story.facts.get("preset", {}),
            losses=list(story.series.curves.get("loss", ())),
            held_losses=list(story.series.curves.get(VALIDATION, ())),
        )


def run_values(studio: State, job_id: str) -> Record:
    """Gather all that the page shows."""
    job, told = job_of(studio.store, job_id), told_so_far(studio.hub.story(job_id))
    folder = studio.settings.job(job_id)
    config, training = used(job, told), job.kind == "train"
    return {
        **state_values(studio, job, told),
        **film_values(job, told),
        **file_values(studio, job, config),
        "final": job.state in FINAL,
        "first_preview": 0 if config.get("sample_at_start") else config.get("validation_steps"),
        "position": told.position,
        "messages": [message_of(line) for line in told.messages],
        "curves": list(CURVES.items()),
        "lines": polylines(averaged(told.losses), told.held_losses),
        "buckets": buckets_of(told.dataset),
        "checkpoint_steps": [line["step"] for line in told.checkpoints if line.get("step")],
        "pictures": [] if training else pictures_of(folder / "output"),
        "settings": settings_of(config, knobs_of(studio)) if training else [],
        "attempts": studio.store.attempts(job.id),
        "steps_of": steps_of,
        "log": read_log(folder, None, None)["text"],
    }


def used(job: Job, told: Told) -> Record:
    """Say with which config a run works, or would: a preset's values are told apart from it."""
    filled = told.preset.get("values") if told.preset.get("verb") == "sets" else None
    return {**job.config, **(told.start.get("config") or {}), **(filled or {})}


def part_values(studio: State, job_id: str, part: str) -> Record:
    """Gather what one part of the page shows: it is asked for often."""
    job, told = job_of(studio.store, job_id), told_so_far(studio.hub.story(job_id))
    if part == "state":
        return state_values(studio, job, told)
    if part == "film":
        return film_values(job, told)
    return file_values(studio, job, used(job, told))


def state_values(studio: State, job: Job, told: Told) -> Record:
    """Say how it stands."""
    story = studio.hub.story(job.id)
    return {
        "job": words.shown(status(studio.settings, studio.store, job, story)),
        "problems": forms.placed((job.error or {}).get("problems") or [], knobs_of(studio)),
        "facts": facts_of(job, told.progress),
        "chart_told": sentences(told),
    }


def film_values(job: Job, told: Told) -> Record:
    """Lay out the previews."""
    film = film_of(told.samples)
    return {"film": film, "files_at": f"/jobs/{job.id}/files/output/", "thumb": THUMBNAIL}


def file_values(studio: State, job: Job, config: Record) -> Record:
    """List the files."""
    folder = studio.settings.job(job.id)
    best = (final_of(folder, job) or {}).get("best_checkpoint")
    return {
        "files": files_of(folder / "output", OTHER_FILES.get(job.kind, TOLD_FILES), best),
        "files_at": f"/jobs/{job.id}/files/output/",
        "first_checkpoint": config.get("checkpoint_steps") if job.kind == "train" else None,
    }


def knobs_of(studio: State) -> dict[str, forms.Control]:
    """Name the controls of all knobs."""
    return controls_of(studio.settings.repository)


# --- Facts ---


def facts_of(job: Job, progress: Record) -> list[tuple[str, str | None]]:
    """Say how fast it is and what it takes; of a finished run, what it came to."""
    if job.kind != "train":
        return []
    if job.state == "completed" and job.final:
        return ended_facts(job.final)
    found = progress.get
    return [
        ("Loss", known(found("loss"), show_number)),
        ("Per step", known(found("seconds_per_step"), show_seconds)),
        ("Images per second", known(found("images_per_second"), show_number)),
        ("Memory", known(found("memory_bytes"), show_bytes)),
        ("Epoch", known(found("epoch"), show_number)),
        ("Running for", known(found("elapsed_seconds"), show_duration)),
    ]


def ended_facts(final: Record) -> list[tuple[str, str | None]]:
    """Say what a finished run came to."""
    return [
        ("Loss at the end", known(final.get("final_loss"), show_number)),
        *learned_facts(final),
        ("Time", known(final.get("total_time"), show_duration)),
        ("Images per second", known(final.get("images_per_second"), show_number)),
        ("Memory at most", known(final.get("peak_memory_bytes"), show_bytes)),
        ("Size", known(final.get("bytes"), show_bytes)),
    ]


def learned_facts(final: Record) -> list[tuple[str, str | None]]:
    """Say what was learned: by the loss with and without it, and by what it changes."""
    numbers = (final.get("loss_before"), final.get("loss_after"))
    before, after = (known(value, show_number) for value in numbers)
    images = "the images" if final.get("best_step") is None else "images held back"
    moved, otherwise = (
        known(final.get(name), show_share) for name in ("moved", "moved_without_trigger")
    )
    without = f", {otherwise} without the trigger words" if otherwise else ""
    return [
        (f"Loss on {images}", f"{after}, {before} without it" if before and after else None),
        ("Least at step", known(final.get("best_step"), show_number)),
        ("It changes predictions by", moved and moved + without),
    ]


def known(value: Any, how: Callable[[float], str]) -> str | None:
    """Show a number that is there."""
    return how(value) if isinstance(value, (int, float)) else None


def show_seconds(value: float) -> str:
    """Show a short time."""
    return f"{show_number(value)} s"


# --- Messages, files, pictures, settings ---


def message_of(line: Mapping[str, Any]) -> Record:
    """Say one line that a person reads again."""
    return {
        "time": line.get("timestamp"),
        "kind": NOTES.get(str(line.get("type")), ""),
        "text": str(line.get("message", "")),
    }


def files_of(output: Path, others: Sequence[str], best: str | None = None) -> list[Record]:
    """List what there is to take along: LoRAs, learned words, files with some other endings."""
    found = [*loras_of(output), *newest_first(output / "embeddings")]
    found += [path for path in listed(output) if path.suffix in others]
    return [file_of(path, output, best) for path in found]


def loras_of(output: Path) -> list[Path]:
    """List the LoRA and its checkpoints, the newest first."""
    return [*newest_first(output), *newest_first(output / "checkpoints")]


def newest_first(folder: Path) -> list[Path]:
    """List the tensors of a folder: what is finished, and then the steps before."""
    found = [path for path in listed(folder) if path.suffix == ".safetensors"]
    steps = {path: words.step_of(path.stem) for path in found}
    return sorted(found, key=lambda path: (steps[path] is not None, -(steps[path] or 0)))


def listed(folder: Path) -> list[Path]:
    """List the regular files of a folder that may not be there; none that is still written."""
    with contextlib.suppress(OSError):
        return sorted(
            path
            for path in folder.iterdir()
            if not path.name.startswith(".") and path.is_file() and not path.is_symlink()
        )
    return []


def file_of(path: Path, output: Path, best: str | None = None) -> Record:
    """Say what a file is called and how large it is; one that has just gone is of no size."""
    name = path.relative_to(output).as_posix()
    title, note = titled(path)
    if best == f"output/{name}":
        note = "least loss on images held back"
    try:
        return {"name": name, "title": title, "note": note, "bytes": path.stat().st_size}
    except OSError:
        return {"name": name, "title": title, "note": "gone", "bytes": 0}


def titled(path: Path) -> tuple[str, str]:
    """Say what people call a file, and what they may want to know beside that."""
    step, tensors = words.step_of(path.stem), path.suffix == ".safetensors"
    word = path.parent.name == "embeddings"
    if not tensors:
        return path.name, ""
    if step is not None:
        return f"Step {step:,}", "learned word" if word else ""
    return ("Learned word" if word else "Finished LoRA"), path.name


def pictures_of(output: Path) -> list[str]:
    """List the pictures that another kind of job has made."""
    found = (path for path in output.rglob("*.png") if path.is_file() and not path.is_symlink())
    names = sorted((path.relative_to(output).as_posix() for path in found), key=natural)
    return names[:MOST_PICTURES]


def settings_of(config: Mapping[str, Any], knobs: Mapping[str, forms.Control]) -> list[Record]:
    """List all settings, those that are not at their default first."""
    texts = forms.texts_of(knobs, config)
    rows = [
        {
            "label": each.label,
            "value": texts.get(each.knob, each.default_text) or "–",
            "default": each.default_text or "–",
            "changed": texts.get(each.knob, each.default_text) != each.default_text,
        }
        for each in knobs.values()
    ]
    return sorted(rows, key=lambda row: not row["changed"])


def buckets_of(dataset: Mapping[str, Any]) -> list[tuple[str | None, ...]]:
    """Lay out at which sizes images are trained, how many, and what cropping takes of them."""
    table = dataset.get("buckets")
    rows = table.items() if isinstance(table, dict) else ()
    return [
        (
            size.replace("x", "\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}"),
            known(row.get("images"), show_number),
            known(row.get("cropped"), show_share),
            known(row.get("cropped_at_most"), show_share),
        )
        for size, row in rows
        if isinstance(row, dict)
    ]


def steps_of(attempt: AttemptRow) -> str:
    """Say from which step to which an attempt came."""
    if attempt.last_step is None:
        return "none"
    return f"{show_number(attempt.first_step or 0)} to {show_number(attempt.last_step)}"


def newest_picture(studio: State, job: Job) -> str | None:
    """Find the newest preview of a training, by the files alone: lists are to be quick."""
    if job.kind != "train" or not job.step:
        return None
    samples = studio.settings.job(job.id) / "output" / "samples"
    steps = (words.step_of(path.name) for path in samples.glob("step_*.png"))
    step = max((step for step in steps if step is not None), default=None)
    address = f"/jobs/{job.id}/files/output/samples/step_{step}.png{THUMBNAIL}"
    return None if step is None else address


# --- The curve that needs no script ---


def averaged(points: Points) -> Points:
    """Sum up a curve in a few points."""
    size = max(1, -(-len(points) // BUCKETS))
    groups = [points[begin : begin + size] for begin in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def polylines(*curves: Points) -> list[str]:
    """Write curves as SVG does, in one frame; what has less than two points is no curve."""
    points = [point for curve in curves for point in curve]
    steps, values = [step for step, _ in points], [value for _, value in points]
    first, low = min(steps, default=0), min(values, default=0)
    across = WIDTH / max(1, max(steps, default=0) - first)
    up = HEIGHT / ((max(values, default=0) - low) or 1)

    def place(step: int, value: float) -> str:
        return f"{(step - first) * across:.1f},{HEIGHT - (value - low) * up:.1f}"

    return [" ".join(place(*point) for point in curve) if curve[1:] else "" for curve in curves]


def sentences(told: Told) -> str:
    """Say what the losses did."""
    said = [sentence("The loss", averaged(told.losses))]
    if len(told.held_losses) > 1:
        least, value = min(told.held_losses, key=lambda point: point[1])
        best = f" It was least at step {show_number(least)}: {show_number(value)}."
        said.append(
            sentence("On images held back (the line with dots) it", told.held_losses) + best
        )
    return " ".join(said)


def sentence(what: str, points: Points) -> str:
    """Say what a loss did, by its first and last tenth."""
    if len(points) < 2:
        return "The loss is drawn here from the second measurement on."
    tenth = max(1, len(points) // 10)
    before, after = mean(points[:tenth]), mean(points[-tenth:])
    word = "stayed" if abs(after - before) <= SAME * abs(before) else "fell"
    word = "rose" if word == "fell" and after > before else word
    numbers = f"from {show_number(before)} to {show_number(after)}"
    numbers = f"about {show_number(after)}" if word == "stayed" else numbers
    return f"{what} {word} {numbers} over {show_number(points[-1][0])} steps."


def mean(points: Iterable[tuple[int, float]]) -> float:
    """Average the values."""
    values = [value for _, value in points]
    return sum(values) / len(values)
