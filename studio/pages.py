"""Pages for people: each is a function of what is in the store and in the files.

What a page asks for, it asks by forms, which work without JavaScript: every verb is a route of its
own that calls what the REST API calls, and sends the browser back to the page.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.datastructures import State

from studio import jobs, words
from studio.compare_page import compare_values, order_pictures
from studio.machine_page import machine_values
from studio.new_page import (
    check_of,
    draft_of_form,
    draft_of_job,
    draft_of_preset,
    form_values,
    start,
)
from studio.problems import Problem
from studio.run_page import newest_picture, part_values, run_values
from studio.status import briefs, final_of, job_of
from studio.store import FINAL, KINDS, Job
from studio.views import THEMES, environment, first_values, go_to, read_form, render

router = APIRouter(include_in_schema=False)

Record = dict[str, Any]

PER_PAGE = 50
PARTS = ("state", "film", "files", "row")
YEAR = 365 * 86_400


async def sent(request: Request) -> Sequence[tuple[str, str]]:
    """Read the form of a request."""
    return await read_form(request)


Form = Annotated[Sequence[tuple[str, str]], Depends(sent)]


# --- Runs ---


@router.get("/")
def show_runs(request: Request, kind: str | None = None, before: str | None = None) -> HTMLResponse:
    """List the jobs: what runs, what waits, what has ended."""
    studio = request.app.state
    kind = kind if kind in KINDS else None
    found = studio.store.jobs(kind=kind, before=before, limit=PER_PAGE + 1)
    older = found[PER_PAGE - 1].id if len(found) > PER_PAGE else None
    under_way = [] if before else [*studio.store.active(), *studio.store.queue()]
    first = [job for job in under_way if kind in (None, job.kind)]
    ended = [job for job in found[:PER_PAGE] if job.state in FINAL]
    return render(
        request,
        "runs.html",
        lists=lists_of(rows_of(studio, [*first, *ended])),
        filtered=bool(kind or before),
        kinds=[("", "All kinds"), *words.KINDS.items()],
        kind=kind or "",
        older=older,
        has_datasets=any(studio.settings.datasets.iterdir()),
    )


def rows_of(studio: State, found: Sequence[Job]) -> list[Record]:
    """Say of several jobs how they stand, with their newest pictures."""
    told = briefs(studio.store, found)
    return [row_of(studio, job, brief) for job, brief in zip(found, told, strict=True)]


def row_of(studio: State, job: Job, brief: Record) -> Record:
    """Complete what a list says of a job."""
    final = final_of(studio.settings.job(job.id), job)
    whole = {**brief, "final": final, "continues_from": job.continues_from}
    return {**words.shown(whole), "picture": newest_picture(studio, job)}


def lists_of(rows: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Part rows by what becomes of them."""
    parts = (("Now", ("running", "stopping")), ("Waiting", ("queued",)), ("Ended", FINAL))
    lists = [(name, [row for row in rows if row["state"] in states]) for name, states in parts]
    return [(name, found) for name, found in lists if found]


# --- One run ---


@router.get("/runs/{job_id}")
def show_run(request: Request, job_id: str) -> HTMLResponse:
    """Show one job."""
    return render(request, "run.html", **run_values(request.app.state, job_id))


@router.get("/runs/{job_id}/part/{part}")
def show_part(request: Request, job_id: str, part: str) -> HTMLResponse:
    """Render a part of a page anew, for the script that puts it in place."""
    studio = request.app.state
    if part not in PARTS:
        raise Problem(404, "part_unknown", f"A page has no part {part}.")
    if part == "row":
        (row,) = rows_of(studio, [job_of(studio.store, job_id)])
        return render(request, "run_part.html", part=part, job=row)
    return render(request, "run_part.html", part=part, **part_values(studio, job_id, part))


@router.post("/runs/{job_id}/stop")
def stop(request: Request, job_id: str) -> RedirectResponse:
    """Stop a job, or take it from the queue."""
    jobs.stop(request.app.state, job_id)
    return back(request, job_id)


@router.post("/runs/{job_id}/resume")
def resume(request: Request, job_id: str, form: Form) -> RedirectResponse:
    """Continue a job, maybe to more steps."""
    studio, steps = request.app.state, first_values(form).get("steps", "")
    job = job_of(studio.store, job_id)
    asked = int(steps) if steps.isascii() and steps.isdecimal() else steps
    changes = {"steps": asked} if steps and asked != job.total_steps else None
    jobs.resume(studio, job_id, changes)
    return back(request, job_id)


@router.post("/runs/{job_id}/sooner")
def start_sooner(request: Request, job_id: str) -> RedirectResponse:
    """Let a job start before all others that wait."""
    studio = request.app.state
    highest = max((job.priority for job in studio.store.queue() if job.id != job_id), default=0)
    jobs.change(studio, job_id, priority=highest + 1)
    return back(request, job_id)


@router.post("/runs/{job_id}/preview")
def ask_for_preview(request: Request, job_id: str) -> RedirectResponse:
    """Ask a training for a picture now."""
    jobs.ask(request.app.state, job_id, preview=True)
    return back(request, job_id)


@router.post("/runs/{job_id}/rename")
def rename(request: Request, job_id: str, form: Form) -> RedirectResponse:
    """Give a job another name."""
    name = first_values(form).get("name", "").strip()
    if not name or len(name) > 100 or not name.isprintable():
        raise Problem(422, "name_invalid", "A name is a line of 1 to 100 printable characters.")
    jobs.change(request.app.state, job_id, name=name)
    return go_to(f"/runs/{job_id}")


@router.post("/runs/{job_id}/delete")
def delete(request: Request, job_id: str) -> RedirectResponse:
    """Move a job to the trash."""
    jobs.delete(request.app.state, job_id)
    return go_to("/")


def back(request: Request, job_id: str) -> RedirectResponse:
    """Return to where the button was: the list, or the job's page."""
    return go_to("/" if "list" in request.query_params else f"/runs/{job_id}")


# --- A new run ---


@router.get("/new")
def show_form(
    request: Request,
    dataset: str = "",
    preset: str = "",
    focus: str = "",
    source: Annotated[str, Query(alias="from")] = "",
) -> HTMLResponse:
    """Show the form: empty, from an earlier run, or from a ready-made config."""
    studio = request.app.state
    draft = draft_of_job(studio, source) if source else draft_of_preset(studio, preset)
    if dataset:
        draft.dataset = dataset
    return render(request, "new.html", **form_values(studio, draft), focus=focus)


@router.post("/new")
def take_form(request: Request, form: Form) -> Response:
    """Check what was filled in, or start it; what was typed is there again."""
    studio = request.app.state
    draft = draft_of_form(studio, form)
    if first_values(form).get("do") != "start":
        values = form_values(studio, draft, check=check_of(studio, draft))
        return render(request, "new.html", **values, focus="")
    try:
        job = start(studio, draft)
    except Problem as problem:
        values = form_values(studio, draft, problem=problem)
        return render(request, "new.html", status_code=problem.status, **values, focus="problems")
    return go_to(f"/runs/{job.id}")


@router.post("/new/check")
def check_form(request: Request, form: Form) -> HTMLResponse:
    """Say what the trainer thinks of a form, for the script that puts it in place."""
    studio = request.app.state
    check = check_of(studio, draft_of_form(studio, form))
    return HTMLResponse(environment().get_template("new_check.html").render(check=check))


# --- What is on this machine ---


@router.get("/machine")
def show_machine(request: Request) -> HTMLResponse:
    """Show processors, disks, models, and what is at work."""
    return render(request, "machine.html", **machine_values(request.app.state))


# --- Comparing ---


@router.get("/compare")
def show_comparison(
    request: Request, run: Annotated[list[str] | None, Query()] = None
) -> HTMLResponse:
    """Lay pictures of one run or several side by side."""
    return render(request, "compare.html", **compare_values(request.app.state, run or []))


@router.post("/compare/{job_id}")
def draw(request: Request, job_id: str, form: Form) -> Response:
    """Have pictures drawn of checkpoints × prompts × strengths, and judged where asked."""
    studio = request.app.state
    try:
        order_pictures(studio, job_id, form)
    except Problem as problem:
        values = compare_values(studio, [job_id], asked=form, problem=problem)
        return render(request, "compare.html", status_code=problem.status, **values)
    return go_to(f"/compare?run={job_id}")


# --- How it looks ---


@router.post("/theme")
def choose_theme(form: Form) -> Response:
    """Keep whether pages are light or dark; neither is what the system says."""
    values = first_values(form)
    response = go_to(values.get("back", "/"))
    theme = values.get("theme")
    if theme in THEMES:
        response.set_cookie("theme", theme, max_age=YEAR, httponly=True, samesite="strict")
    else:
        response.delete_cookie("theme")
    return response
