"""Pictures side by side: previews of runs, and what was drawn of their files at other strengths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from studio import jobs, words
from studio.film import film_of
from studio.problems import invalid, problem_at
from studio.run_page import THUMBNAIL, file_of, loras_of, newest_picture, told_so_far
from studio.status import briefs, job_of, read_result
from studio.store import UnknownJob
from studio.views import show_number

if TYPE_CHECKING:
    from starlette.datastructures import State

    from studio.forms import Form
    from studio.problems import Problem
    from studio.store import Job

Record = dict[str, Any]

MOST_RUNS = 4
MOST_OFFERED, MOST_DRAWINGS = 60, 20
DRAWN = ("generate", "evaluate")
# What an evaluation measures, as tools/evaluate.py calls it, and what people call it.
SCORES = (
    ("quality", "Quality"),
    ("fidelity", "Like the subject"),
    ("text_fit", "True to the prompt"),
    ("drift", "Drift without the subject"),
    ("diversity", "Diversity"),
)


def compare_values(
    studio: State, wanted: Sequence[str], asked: Form | None = None, problem: Problem | None = None
) -> Record:
    """Gather all that the page shows."""
    runs = runs_of(studio, wanted)
    drawings = drawings_of(studio, {run.id for run in runs})
    return {
        "runs": runs,
        "offered": [] if runs else offered(studio),
        "table": previews_of(studio, runs),
        "grids": [grid_of(studio, job) for job in drawings if job.state == "completed"],
        "under_way": rows_under_way(studio, drawings),
        "form": form_of(studio, runs, asked) if len(runs) == 1 else None,
        "problem": problem,
        "wrong": wrong_of(problem),
        "thumb": THUMBNAIL,
        "most_runs": MOST_RUNS,
    }


def runs_of(studio: State, wanted: Sequence[str]) -> list[Job]:
    """Find the trainings that are meant; one that is gone is left out."""
    found = []
    for job_id in dict.fromkeys(wanted):
        try:
            job = studio.store.job(job_id)
        except UnknownJob:
            continue
        if job.kind == "train":
            found.append(job)
    return found[:MOST_RUNS]


def offered(studio: State) -> list[Record]:
    """List the trainings there is something to see of."""
    found = [job for job in studio.store.jobs(kind="train", limit=MOST_OFFERED) if job.step]
    rows = []
    for job, brief in zip(found, briefs(studio.store, found), strict=True):
        picture = newest_picture(studio, job)
        rows.append({**brief, "state_word": words.state_word(brief), "picture": picture})
    return [row for row in rows if row["picture"]]


# --- Previews that are there anyway ---


def previews_of(studio: State, runs: Sequence[Job]) -> Record:
    """Lay out previews: for each prompt a row per run, and a column per step."""
    films = {run.id: film_of(told_so_far(studio.hub.story(run.id)).samples) for run in runs}
    prompts = dict.fromkeys(prompt for film in films.values() for prompt in film.prompts)
    steps = sorted({step for film in films.values() for step in film.steps})
    groups = []
    for prompt in prompts:
        rows = [
            {
                "name": run.name,
                "cells": [preview_cell(run, films[run.id].at(prompt, step)) for step in steps],
            }
            for run in runs
        ]
        groups.append({"prompt": prompt, "rows": [row for row in rows if any(row["cells"])]})
    return {"steps": [f"Step {show_number(step)}" for step in steps], "groups": groups}


def preview_cell(run: Job, preview: Any) -> Record | None:
    """Show one preview."""
    if preview is None:
        return None
    place = f"step {show_number(preview.step)}"
    return {
        "file": f"/jobs/{run.id}/files/output/{preview.file}",
        "told": f"{run.name} · {place} · {preview.prompt}",
    }


# --- Pictures that were drawn of the files ---


def drawings_of(studio: State, run_ids: set[str]) -> list[Job]:
    """Find the jobs that drew what these runs came to, the newest first."""
    found = [job for kind in DRAWN for job in studio.store.jobs(kind=kind, limit=500)]
    ours = [job for job in found if job.parent in run_ids]
    return sorted(ours, key=lambda job: job.id, reverse=True)[:MOST_DRAWINGS]


def rows_under_way(studio: State, drawings: Iterable[Job]) -> list[Record]:
    """Say of drawings that are not finished how they stand."""
    found = [job for job in drawings if job.state != "completed"]
    told = zip(found, briefs(studio.store, found), strict=True)
    return [
        words.shown({**b, "picture": None, "final": None, "continues_from": j.continues_from})
        for j, b in told
    ]


def grid_of(studio: State, job: Job) -> Record:
    """Lay out a grid: for each prompt a row per checkpoint, a column per strength and seed."""
    output = studio.settings.job(job.id) / "output"
    grid, scores = read_result(output / "grid.json"), read_result(output / "eval.json")
    images = [image for image in grid.get("images", []) if is_image(image)]
    columns = sorted({(image["strength"], image["seed"]) for image in images if image["strength"]})
    seeds = {seed for _, seed in columns}
    cells = {
        (image["prompt"], image["lora"], image["strength"], image["seed"]): image
        for image in images
    }
    found = {
        "job": job,
        "columns": [column_name(strength, seed, len(seeds)) for strength, seed in columns],
        "groups": [
            {"prompt": str(p.get("text")), "rows": rows_of(job, p.get("id"), grid, columns, cells)}
            for p in grid.get("prompts", [])
        ],
        "scores": scores_of(scores),
    }
    return found | {"choice": choice_of(grid, scores, job)}


def is_image(image: Any) -> bool:
    """Tell whether an entry of a grid is one we can show."""
    if not isinstance(image, dict) or not isinstance(image.get("strength"), (int, float)):
        return False
    file = image.get("file")
    return isinstance(file, str) and re.fullmatch(r"images/[^/\\]+/[^/\\]+\.png", file) is not None


def column_name(strength: float, seed: int, seeds: int) -> str:
    """Name a column."""
    return f"Strength {strength:g}" + (f", seed {seed}" if seeds > 1 else "")


def rows_of(
    job: Job,
    prompt: Any,
    grid: Mapping[str, Any],
    columns: Sequence[tuple[float, int]],
    cells: Mapping[tuple[Any, ...], Record],
) -> list[Record]:
    """Lay out the rows of one prompt; the model without any LoRA comes first."""
    rows = []
    for lora in grid.get("loras", []):
        name, base = str(lora.get("id")), lora.get("file") is None
        found = [cells.get((prompt, name, 0 if base else s, seed)) for s, seed in columns]
        label = "Without the LoRA" if base else label_of(lora)
        row = [grid_cell(job, image, label) for image in found]
        rows.append({"name": label, "cells": once(row) if base else row})
    return [row for row in rows if any(row["cells"])]


def once(row: Sequence[Record | None]) -> list[Record | None]:
    """Show the base's pictures once per seed, not again for every strength."""
    seen: set[str] = set()
    shown: list[Record | None] = []
    for cell in row:
        fresh = cell is not None and cell["file"] not in seen
        shown.append(cell if fresh else None)
        if cell is not None:
            seen.add(cell["file"])
    return shown


def label_of(lora: Mapping[str, Any]) -> str:
    """Name a checkpoint by its step."""
    step, final = lora.get("step"), lora.get("file") == "lora_final.safetensors"
    if step is None or final:
        return "Finished LoRA" if final else str(lora.get("id"))
    return f"Step {show_number(step)}"


def grid_cell(job: Job, image: Record | None, label: str) -> Record | None:
    """Show one picture of a grid."""
    if image is None:
        return None
    strength = f" · strength {image['strength']:g}" if image["strength"] else ""
    return {
        "file": f"/jobs/{job.id}/files/output/{image['file']}",
        "told": f"{label}{strength} · seed {image.get('seed')}",
    }


def scores_of(scores: Mapping[str, Any]) -> Record | None:
    """Lay out what an evaluation measured."""
    arms = [arm for arm in scores.get("arms", []) if isinstance(arm, dict)]
    if not arms:
        return None
    there = [(key, name) for key, name in SCORES if any(key in arm for arm in arms)]
    alike = scores.get("not_distinguishable") or []
    rows = [
        {
            "arm": str(arm.get("arm")),
            "best": arm.get("arm") == scores.get("recommended"),
            "alike": arm.get("arm") in alike,
            "flags": ", ".join(map(str, arm.get("flags") or [])),
            "values": [plus_minus(arm.get(key)) for key, _ in there],
        }
        for arm in arms
    ]
    doubts = [str(doubt) for doubt in scores.get("doubts") or []]
    return {"head": [name for _, name in there], "rows": rows, "doubts": doubts}


def plus_minus(score: Any) -> str:
    """Show a mean with the half width of its interval."""
    if not isinstance(score, dict) or not isinstance(score.get("mean"), (int, float)):
        return "–"
    width = score.get("half_width")
    half = f" ± {width:.3f}" if isinstance(width, (int, float)) else ""
    return f"{score['mean']:.3f}{half}"


def choice_of(grid: Mapping[str, Any], scores: Mapping[str, Any], job: Job) -> Record | None:
    """Say which file an evaluation recommends, at which strength, and where to get it."""
    wanted = scores.get("recommended_lora")
    lora = next((each for each in grid.get("loras", []) if each.get("id") == wanted), None)
    if lora is None or not isinstance(lora.get("file"), str) or "/" in lora["file"]:
        return None
    file = lora["file"]
    folder = "" if file == "lora_final.safetensors" else "checkpoints/"
    return {
        "label": label_of(lora),
        "strength": scores.get("recommended_strength"),
        "address": f"/jobs/{job.parent}/files/output/{folder}{file}",
    }


# --- Asking for more ---


def form_of(studio: State, runs: Sequence[Job], asked: Form | None) -> Record:
    """Fill the form that asks for pictures."""
    (run,) = runs
    output = studio.settings.job(run.id) / "output"
    files = [file_of(path, output) for path in loras_of(output)]
    prompts = jobs.knob(studio.settings, run.config, "sample_prompts") or []
    known = dict(asked or [])
    chosen = [value for name, value in asked or [] if name == "checkpoint"]
    return {
        "run": run,
        "files": files,
        "chosen": chosen or [files[at]["name"].rsplit("/", 1)[-1] for at in first_choice(files)],
        "prompts": known.get("prompts", "\n".join(prompts or run.config.get("trigger_words", []))),
        "strengths": known.get("strengths", "0.6, 0.8, 1"),
        "seeds": known.get("seeds", "0"),
        "class_word": known.get("class_word", ""),
    }


def first_choice(files: Sequence[Record]) -> list[int]:
    """Propose the finished file, and the one that was half as long in the making."""
    return sorted({0, len(files) // 2}) if files else []


def order_pictures(studio: State, job_id: str, form: Form) -> Job:
    """Ask for what a form says."""
    last = dict(form)
    asked: Record = {
        "job_id": job_id,
        "checkpoints": [value for name, value in form if name == "checkpoint"] or None,
        "prompts": [line.strip() for line in last.get("prompts", "").splitlines() if line.strip()],
        "scales": numbers("strengths", last.get("strengths", ""), float),
        "seeds": numbers("seeds", last.get("seeds", ""), int),
    }
    config = job_of(studio.store, job_id).config  # pictures are drawn as its previews were
    asked["steps"] = jobs.knob(studio.settings, config, "sample_steps")
    asked["guidance"] = jobs.knob(studio.settings, config, "sample_guidance")
    asked["negative"] = jobs.knob(studio.settings, config, "sample_negative_prompt") or None
    if last.get("do") == "judge":
        asked["class_word"] = last.get("class_word", "").strip() or None
        return jobs.begin(studio, jobs.Judging, asked)
    return jobs.begin(studio, jobs.Drawing, asked)


def numbers(field: str, text: str, kind: type[float] | type[int]) -> list[Any]:
    """Read numbers that stand between commas or blanks."""
    try:
        return [kind(word) for word in re.split(r"[,;\s]+", text.strip()) if word]
    except ValueError as error:
        expected = "numbers with commas between, such as " + ("0.6, 1" if kind is float else "0, 1")
        raise invalid(problem_at(field, expected, text)) from error


def wrong_of(problem: Problem | None) -> dict[str, str]:
    """Put problems to the fields of that form."""
    names = {"scales": "strengths", "job_id": "prompts"}
    found = {}
    for each in problem.problems if problem else []:
        path = re.split(r"[.\[]", each["path"])[0]
        field = names.get(path, path)
        found[field] = f"Expected {each['expected']}, got {each['found']}."
    return found
