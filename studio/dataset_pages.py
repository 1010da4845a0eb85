"""Datasets as people see them. Forms work without a script; only uploads need one."""

import math
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from studio import captions, datasets, jobs, pictures
from studio.dataset_api import (
    PER_PAGE,
    BulkChange,
    address,
    all_briefs,
    change_many,
    delete_dataset,
    folder_of,
    job_at_work,
    settings_of,
    store_of,
    view,
)
from studio.datasets import LIMITS
from studio.problems import Problem
from studio.security import MOST_IMAGE_BYTES
from studio.store import Job, Store
from studio.views import first_values, go_to, read_form, render

Record = dict[str, Any]

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)
COVERS = 4  # pictures that stand for a dataset in the list


async def read(request: Request) -> Mapping[str, str]:
    """Read the form of a request; a route that takes it may block after that."""
    return first_values(await read_form(request))


Form = Annotated[Mapping[str, str], Depends(read)]


def to_page(name: str, form: Mapping[str, str] | None = None, anchor: str = "") -> RedirectResponse:
    """Send the browser back to the part of a dataset that it came from."""
    kept = {key: form[key] for key in ("page", "filter") if form and form.get(key)}
    query = f"?{urlencode(kept)}" if kept else ""
    return go_to(f"{address('data', name)}{query}{anchor}")


# --- What there is ---


@router.get("/data")
def list_page(request: Request) -> HTMLResponse:
    """Show all datasets."""
    found = all_briefs(settings_of(request))
    for each in found:
        each["covers"] = covers(request, each["name"])
    return render(request, "datasets.html", datasets=found)


def covers(request: Request, name: str) -> list[str]:
    """Return the addresses of the first pictures of a dataset, small."""
    found = datasets.scan(folder_of(request, name))[:COVERS]
    return [
        f"{address('datasets', name, 'images', each.name)}?thumb=192&v={each.stamp}"
        for each in found
    ]


@router.post("/data")
def create(request: Request, form: Form) -> RedirectResponse:
    """Make an empty dataset and show it."""
    name = datasets.create(settings_of(request), form.get("name", "").strip()).name
    return to_page(name)


@router.get("/data/{name}")
def dataset_page(
    request: Request,
    name: str,
    page: Annotated[int, Query(ge=1, le=10**6)] = 1,
    filter: str = "",  # noqa: A002, as the address has it
) -> HTMLResponse:
    """Show a page of a dataset."""
    begin = (page - 1) * PER_PAGE
    shown = view(request, name, range(begin, begin + PER_PAGE), filter)
    job = job_at_work(store_of(request), name)
    return render(
        request,
        "dataset.html",
        dataset=shown,
        job=job,
        failures=failures(store_of(request), name),
        page=page,
        pages=max(1, math.ceil(shown["matching"] / PER_PAGE)),
        filter=filter,
        base=address("data", name),
        api=address("datasets", name),
        limits=LIMITS,
        image_bytes=MOST_IMAGE_BYTES,
        endings=",".join(pictures.FORMATS),
    )


def failures(store: Store, name: str) -> list[Job]:
    """List the newest job of each kind that worked on a dataset, if it has failed."""
    found = []
    for kind in ("caption", "prepare"):
        ours = (
            job for job in store.jobs(kind=kind, limit=200) if job.config.get("dataset") == name
        )
        newest = next(ours, None)
        found += [newest] if newest and newest.state == "failed" and newest.error else []
    return found


# --- What changes ---


@router.post("/data/{name}/captions/{file}")
def save_caption(request: Request, name: str, file: str, form: Form) -> Response:
    """Write one caption; where another was written meanwhile, show both."""
    folder, text = folder_of(request, name), form.get("text", "")
    try:
        captions.set_one(folder, file, text, form.get("etag", ""))
    except Problem as problem:
        if problem.code != "caption_changed":
            raise
        there = captions.read(folder, datasets.picture_in(folder, file))
        values: Record = {"file": file, "there": there, "mine": text, "form": form}
        here = address("data", name, "captions", file)
        return render(request, "conflict.html", status_code=412, action=here, **values)
    return to_page(name, form)


@router.post("/data/{name}/change")
def change(request: Request, name: str, form: Form) -> RedirectResponse:
    """Change many captions at once."""
    folder, shown = folder_of(request, name), form.get("filter", "")
    if "prefix" in form:
        change_many(folder, BulkChange(add_prefix=form["prefix"], filter=shown))
    else:
        pair = {"from": form.get("former", ""), "to": form.get("by", "")}
        change_many(folder, BulkChange.model_validate({"replace": pair, "filter": shown}))
    return to_page(name, form)


@router.post("/data/{name}/undo")
def undo(request: Request, name: str, form: Form) -> RedirectResponse:
    """Take the last change of captions back."""
    captions.undo(folder_of(request, name))
    return to_page(name, form)


@router.post("/data/{name}/images/{file}/remove")
def remove_picture(request: Request, name: str, file: str, form: Form) -> RedirectResponse:
    """Put a picture into the trash."""
    datasets.remove_picture(settings_of(request), folder_of(request, name), file)
    return to_page(name, form)


@router.post("/data/{name}/remove")
def remove(request: Request, name: str) -> RedirectResponse:
    """Put a dataset into the trash."""
    delete_dataset(request, name)
    return go_to("/data")


# --- Jobs ---


@router.post("/data/{name}/caption")
def caption(request: Request, name: str, form: Form) -> RedirectResponse:
    """Let a program write captions."""
    knobs = ("captioner", "model", "template", "prefix")
    said: Record = {knob: form[knob].strip() for knob in knobs if form.get(knob, "").strip()}
    said |= {"dataset": name, "overwrite": "overwrite" in form}
    jobs.begin(request.app.state, jobs.Captioning, said)
    return to_page(name, form)


@router.post("/data/{name}/check")
def check(request: Request, name: str, form: Form) -> RedirectResponse:
    """Let a program judge the pictures and captions."""
    resolution = form.get("resolution", "")
    value = int(resolution) if resolution.isdecimal() else resolution
    said = {"dataset": name, "resolution": value}
    jobs.begin(request.app.state, jobs.Preparing, said)
    return to_page(name, form)
