"""What the page of a new run shows, and what becomes of what is filled in there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from studio import datasets, forms, jobs
from studio.problems import Problem
from studio.run_page import buckets_of, controls_of, schema_of
from studio.status import job_of, read_result
from studio.views import plural

if TYPE_CHECKING:
    from starlette.datastructures import State

    from studio.settings import Settings
    from studio.store import Job

Record = dict[str, Any]

CHOSEN_APART = "dataset_path"  # by name, among the studio's datasets
NOT_TAKEN_OVER = (CHOSEN_APART, "output_path", "lora_name", "$schema", "$comment")
MOST_OFFERED = 50


@dataclass
class Draft:
    """A run that someone is about to ask for."""

    name: str = ""
    dataset: str = ""
    texts: dict[str, str] = field(default_factory=dict)  # what the controls hold
    config: Record = field(default_factory=dict)
    engine: str = "local"
    came_from: str = ""
    remark: str = ""


# --- Where a draft comes from ---


def draft_of_form(studio: State, form: forms.Form) -> Draft:
    """Read a form that came back."""
    knobs = knobs_of(studio)
    last = dict(form)
    config = forms.config_of(knobs, form)
    texts = forms.read_form(knobs, form)
    engine = last.get("engine", "local")
    return Draft(last.get("name", "").strip(), last.get("dataset", ""), texts, config, engine)


def draft_of_job(studio: State, job_id: str) -> Draft:
    """Begin with what an earlier run was asked for."""
    job = job_of(studio.store, job_id)
    asked = read_result(studio.settings.job(job_id) / "request.json")
    config = asked.get("config")
    draft = draft_of_config(studio, config if isinstance(config, dict) else job.config)
    draft.dataset = str(asked.get("dataset") or "")
    draft.name, draft.came_from = f"{job.name} 2", job.name
    return draft


def draft_of_preset(studio: State, key: str) -> Draft:
    """Begin with a ready-made config, or with nothing."""
    found = presets(studio.settings).get(key, {})
    draft = draft_of_config(studio, {**found, "trigger_words": [], "sample_prompts": []})
    draft.came_from, draft.remark = (key, str(found.get("$comment", ""))) if found else ("", "")
    return draft


def draft_of_config(studio: State, config: Mapping[str, Any]) -> Draft:
    """Begin with a config, less what belongs to one run alone."""
    kept = {name: value for name, value in config.items() if name not in NOT_TAKEN_OVER}
    return Draft(texts=forms.texts_of(knobs_of(studio), kept), config=kept)


def presets(settings: Settings) -> dict[str, Record]:
    """Read the ready-made configs."""
    files = sorted((settings.repository / "examples" / "configs").glob("*.json"))
    return {file.stem: read_result(file) for file in files}


def knobs_of(studio: State) -> dict[str, forms.Control]:
    """Name the controls of the form, less the one that is chosen apart."""
    knobs = controls_of(studio.settings.repository)
    return {knob: each for knob, each in knobs.items() if knob != CHOSEN_APART}


# --- What the page shows ---


def form_values(
    studio: State, draft: Draft, check: Record | None = None, problem: Problem | None = None
) -> Record:
    """Gather all that the page shows."""
    knobs = knobs_of(studio)
    parts = forms.groups(schema_of(studio.settings.repository), knobs)
    first, rest = parts[: len(forms.FIRST_GROUPS)], parts[len(forms.FIRST_GROUPS) :]
    wrong = placed(studio, problem.problems if problem else (check or {}).get("problems", []))
    return {
        "name": draft.name,
        "dataset": draft.dataset,
        "texts": draft.texts,
        "came_from": draft.came_from,
        "remark": draft.remark,
        "draft": "" if draft.came_from or draft.dataset else "new-run",
        "required": first[0].controls,
        "first": first[1:],
        "more": rest,
        "changed": sum(group.changed(draft.texts) for group in rest),
        "wrong": {each["field"]: each["text"] for each in reversed(wrong) if each["field"]},
        "problems_title": title_of(problem),
        "problems": wrong if problem else [],
        "check": check,
        "datasets": datasets.names(studio.settings),
        "candidates": candidates(studio.settings),
        "presets": list(presets(studio.settings)),
        "turn": turn_of(studio),
        "engine": draft.engine,
        "engines": list(studio.engines),
    }


def placed(studio: State, problems: Sequence[Mapping[str, Any]]) -> list[Record]:
    """Give problems their fields; the dataset is one of these."""
    return forms.placed(problems, controls_of(studio.settings.repository))


def title_of(problem: Problem | None) -> str:
    """Say above the form what is wrong."""
    if problem is None:
        return ""
    count = len(problem.problems)
    return f"It was not started: {plural(count, 'problem')}." if count else problem.detail


def candidates(settings: Settings) -> dict[str, list[str]]:
    """Offer what is on this machine for knobs that name a place."""
    models = sorted(path.name for path in settings.models.iterdir())[:MOST_OFFERED]
    knobs = controls_of(settings.repository)
    known = [*models, *(each for each in knobs["base_model"].examples if is_hub_id(each))]
    pictures = datasets.names(settings)[:MOST_OFFERED]
    return {
        "base_model": list(dict.fromkeys([*known, *hub_ids(settings)])),
        "vae": models,
        "model_config_path": models,
        "regularization_path": pictures,
    }


def hub_ids(settings: Settings) -> list[str]:
    """Name the base models of the ready-made configs."""
    found = (str(each.get("base_model", "")) for each in presets(settings).values())
    return list(dict.fromkeys(name for name in found if is_hub_id(name)))


def is_hub_id(name: str) -> bool:
    """Tell an id from a path."""
    return name.count("/") == 1 and not name.startswith((".", "/"))


def turn_of(studio: State) -> str:
    """Say when a run would start."""
    before = len(studio.store.queue()) + len(studio.store.active())
    if not before:
        return "It starts at once."
    return f"{plural(before, 'job')} before it; it starts when a processor is free."


# --- What the trainer says ---


def check_of(studio: State, draft: Draft) -> Record:
    """Ask the trainer, and put what it says beside the fields."""
    try:
        answer = jobs.preflight(studio, draft.config, draft.dataset or None)
    except Problem as problem:
        nothing = {"valid": False, "message": problem.detail, "problems": problem.problems}
        answer = {**nothing, "warnings": []}
    config = json.dumps(draft.config, indent=2, ensure_ascii=False)
    told: Record = {"placed": placed(studio, answer["problems"]), "config": config}
    told |= {"buckets": buckets_of(answer.get("report") or {})}
    return {**answer, **told, "filled": filled_in(studio, answer.get("preset") or {})}


def filled_in(studio: State, told: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Lay out what a preset sets: knob by knob, with its value and the reason."""
    knobs, reasons = knobs_of(studio), told.get("reasons", {})
    return [
        (knobs[knob].label, forms.to_text(knobs[knob], value), str(reasons.get(knob, "")))
        for knob, value in told.get("values", {}).items()
        if knob in knobs
    ]


def start(studio: State, draft: Draft) -> Job:
    """Ask for what a program would ask for."""
    asked: Record = {"config": draft.config, "engine": draft.engine}
    asked |= {"dataset": draft.dataset or None, "name": draft.name or None}
    return jobs.begin(studio, jobs.Training, asked)
