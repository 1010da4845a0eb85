"""Datasets over HTTP: for programs below /datasets, for people below /data."""

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from studio import captions, datasets, pictures
from studio.api import PROBLEM
from studio.captions import Caption
from studio.datasets import Picture, refusal
from studio.engine import Record
from studio.problems import Problem, StrictRoute
from studio.settings import Settings
from studio.store import Job, Store

router = APIRouter(route_class=StrictRoute, responses={"default": PROBLEM})
PER_PAGE, MOST_PER_PAGE = 60, 1000
REPORT_BYTES = 64 * 2**20
THUMBNAIL_SIDES = (192, 384)  # a screen's pixels for one column of a page, and twice as many
FOREVER = "private, max-age=31536000, immutable"  # an address names one content


class Body(BaseModel):
    """A JSON body; a key that nobody reads is a mistake."""

    model_config = ConfigDict(extra="forbid", strict=True)


class NewDataset(Body):
    """What a new dataset is called."""

    name: str


class NewCaption(Body):
    """What is to be said of a picture."""

    text: str


class Replacement(Body):
    """A text that takes the place of another."""

    former: str = Field(alias="from")
    by: str = Field(alias="to")


class BulkChange(Body):
    """A change of all captions, or of those that a filter leaves."""

    replace: Replacement | None = None
    add_prefix: str | None = None
    filter: str = ""
    dry_run: bool = False


def settings_of(request: Request) -> Settings:
    """Return what the service was told at its start."""
    settings: Settings = request.app.state.settings
    return settings


def store_of(request: Request) -> Store:
    """Return what the service knows of jobs."""
    store: Store = request.app.state.store
    return store


def folder_of(request: Request, name: str) -> Path:
    """Return the folder of a dataset."""
    return datasets.folder_of(settings_of(request), name)


def address(place: str, name: str, *more: str) -> str:
    """Write the path of something in a dataset."""
    return "/".join(["", place, *(quote(part, safe="") for part in (name, *more))])


# --- Datasets ---


@router.get("/datasets")
def list_datasets(request: Request) -> Record:
    """List the datasets."""
    return {"datasets": all_briefs(settings_of(request))}


def all_briefs(settings: Settings) -> list[Record]:
    """Say in brief what each dataset holds."""
    return [brief(settings.datasets / name) for name in datasets.names(settings)]


def brief(folder: Path) -> Record:
    """Say how many pictures and captions a dataset holds."""
    found = datasets.scan(folder)
    return {
        "name": folder.name,
        "images": len(found),
        "captions": sum(picture.captioned for picture in found),
        "bytes": sum(picture.bytes for picture in found),
    }


@router.post("/datasets", status_code=201)
def create_dataset(request: Request, body: NewDataset, response: Response) -> Record:
    """Make an empty dataset."""
    folder = datasets.create(settings_of(request), body.name)
    response.headers["Location"] = address("datasets", folder.name)
    return brief(folder)


@router.get("/datasets/{name}")
def show_dataset(
    request: Request,
    name: str,
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=MOST_PER_PAGE)] = PER_PAGE,
    filter: str = "",  # noqa: A002, as the address has it
) -> Record:
    """Show a part of a dataset, and what is known of all of it."""
    return view(request, name, range(offset, offset + limit), filter)


def view(request: Request, name: str, part: range, wanted: str) -> Record:
    """Say what a dataset holds; pictures are opened for this part alone."""
    folder = folder_of(request, name)
    found = datasets.scan(folder)
    said = captions.captions_of(folder, found)
    chosen = [picture for picture in found if fits(picture, said[picture.name], wanted)]
    report = newest_report(request, name)
    flags = report["flags"] if report else {}
    shown = chosen[part.start : part.stop]
    images = [describe(folder, each, said[each.name], flags.get(each.name, [])) for each in shown]
    return {
        "name": folder.name,
        "images": images,
        "matching": len(chosen),
        "next": part.stop if part.stop < len(chosen) else None,
        "total": len(found),
        "captions": sum(bool(caption.text) for caption in said.values()),
        "bytes": sum(picture.bytes for picture in found),
        "tags": captions.tags(said),
        "undo": captions.undoable(folder),
        "report": report and {key: report[key] for key in report if key != "flags"},
    }


def fits(picture: Picture, caption: Caption, wanted: str) -> bool:
    """Tell whether a picture or its caption has a text in it, whatever the case."""
    wanted = wanted.casefold()
    return wanted in picture.name.casefold() or wanted in caption.text.casefold()


def describe(folder: Path, picture: Picture, caption: Caption, flags: list[str]) -> Record:
    """Say what is known of a picture."""
    size = pictures.measure(folder / picture.name)
    width, height = size or (None, None)
    here = address("datasets", folder.name, "images", picture.name)
    return {
        "name": picture.name,
        "width": width,
        "height": height,
        "bytes": picture.bytes,
        "caption": caption.text,
        "etag": caption.etag,
        "problem": caption.problem if size else "it cannot be opened as a picture",
        "flags": flags,
        "url": f"{here}?v={picture.stamp}",
        "thumbnail": f"{here}?thumb=384&v={picture.stamp}",
    }


def newest_report(request: Request, name: str) -> Record | None:
    """Return what the last look of the tool at this dataset has found."""
    settings = settings_of(request)
    for job in store_of(request).jobs(state="completed", kind="prepare", limit=200):
        if job.config.get("dataset") == name:
            report = read_report(settings.job(job.id) / "output" / "report.json")
            return report and report | {"job_id": job.id, "at": job.ended_at}
    return None


def read_report(path: Path) -> Record | None:
    """Read what `tools/prepare.py check` wrote; of a picture, what is to be looked at."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        if path.stat().st_size <= REPORT_BYTES:
            report = json.loads(path.read_bytes())
            flags = {each["source"]: each["flags"] for each in report["pictures"] if each["flags"]}
            checked, remarks = len(report["pictures"]), report["remarks"]
            return {"checked": checked, "flagged": len(flags), "remarks": remarks, "flags": flags}
    return None


@router.delete("/datasets/{name}", status_code=204)
def delete_dataset(request: Request, name: str) -> None:
    """Put a dataset into the trash."""
    folder_of(request, name)
    if job := job_at_work(store_of(request), name):
        raise Problem(409, "in_use", f"{job.name} works on {name}. Stop it first, or wait for it.")
    datasets.remove(settings_of(request), name)


def job_at_work(store: Store, name: str) -> Job | None:
    """Return a job that works on the very folder; runs have a snapshot of their own."""
    for state in ("running", "stopping", "queued"):
        for job in store.jobs(state=state, limit=1000):
            if job.kind in ("caption", "prepare") and job.config.get("dataset") == name:
                return job
    return None


# --- Pictures ---


@router.put("/datasets/{name}/images/{file}", status_code=201)
async def upload(request: Request, name: str, file: str, response: Response) -> Record:
    """Take a picture: the body is the file's bytes. One that is there already changes nothing."""
    folder, file = folder_of(request, name), datasets.clean_picture_name(file)
    length = int(request.headers.get("content-length", 0))
    await run_in_threadpool(datasets.check_room, folder, length)
    part = datasets.part_in(folder)
    try:
        await receive(request.stream(), part)
        new = await run_in_threadpool(datasets.publish, folder, part, file)
    finally:
        part.unlink(missing_ok=True)
    response.status_code = 201 if new else 200
    picture = datasets.picture_in(folder, file)
    return describe(folder, picture, captions.read(folder, picture), [])


async def receive(chunks: AsyncIterator[bytes], part: Path) -> None:
    """Write a body into a file as it comes; the guard counts its bytes and its seconds."""
    try:
        with part.open("wb") as file:
            async for chunk in chunks:
                await run_in_threadpool(file.write, chunk)
    except OSError as error:
        raise datasets.disk_full() from error


@router.get("/datasets/{name}/images/{file}", response_class=FileResponse)
def picture(
    request: Request, name: str, file: str, thumb: int | None = None, v: str | None = None
) -> Response:
    """Send a picture, or a small one of it; `v` is there for caches."""
    folder = folder_of(request, name)
    found = datasets.picture_in(folder, file)
    headers = {"Cache-Control": FOREVER if v == found.stamp else "private, no-cache"}
    headers["ETag"] = f'"{found.stamp}-{thumb or "full"}"'
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    if thumb is None:
        return FileResponse(
            folder / found.name, headers=headers, media_type=pictures.media_type(file)
        )
    if thumb not in THUMBNAIL_SIDES:
        raise refusal(422, "request_invalid", "thumb", "192 or 384", str(thumb))
    small = pictures.thumbnail(folder / found.name, found.stamp, thumb)
    return Response(small, headers=headers, media_type="image/webp")


@router.delete("/datasets/{name}/images/{file}", status_code=204)
def delete_picture(request: Request, name: str, file: str) -> None:
    """Put a picture and its caption into the trash."""
    datasets.remove_picture(settings_of(request), folder_of(request, name), file)


# --- Captions ---


@router.get("/datasets/{name}/captions/{file}")
def read_caption(request: Request, name: str, file: str, response: Response) -> Record:
    """Read the caption of a picture; the entity tag is needed to change it."""
    folder = folder_of(request, name)
    return told(captions.read(folder, datasets.picture_in(folder, file)), response)


def told(caption: Caption, response: Response) -> Record:
    """Answer with a caption and its entity tag."""
    response.headers["ETag"] = f'"{caption.etag}"'
    return {"text": caption.text, "etag": caption.etag}


def expected_tag(
    if_match: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> str | None:
    """Read which caption a writer has seen: an entity tag, any (*), or none at all (None)."""
    if if_match is None and if_none_match != "*":
        hint = "Send the ETag of the caption that you have read, or If-None-Match: *."
        raise refusal(428, "precondition_required", "If-Match", "an entity tag", "nothing", hint)
    return None if if_match is None else if_match.removeprefix("W/").strip('"')


@router.put("/datasets/{name}/captions/{file}")
def write_caption(
    request: Request,
    name: str,
    file: str,
    body: NewCaption,
    expected: Annotated[str | None, Depends(expected_tag)],
    response: Response,
) -> Record:
    """Write the caption of a picture, if it still is the one that its writer has seen."""
    return told(captions.set_one(folder_of(request, name), file, body.text, expected), response)


@router.post("/datasets/{name}/captions")
def change_captions(request: Request, name: str, body: BulkChange) -> Record:
    """Change many captions at once: replace a text, or put one in front."""
    return {"changed": change_many(folder_of(request, name), body)}


def change_many(folder: Path, body: BulkChange) -> int:
    """Change the captions that a filter leaves; count those that change."""
    with datasets.CHANGING:
        found = datasets.scan(folder)
        said = captions.captions_of(folder, found)
        said = {p.name: said[p.name] for p in found if fits(p, said[p.name], body.filter)}
        if body.replace and body.add_prefix is None:
            former, by = body.replace.former, body.replace.by
            made, what = captions.replaced(said, former, by), f"“{former}” replaced by “{by}”"
        elif body.add_prefix is not None and not body.replace:
            made, what = (
                captions.prefixed(said, body.add_prefix),
                f"“{body.add_prefix}” put in front",
            )
        else:
            raise refusal(
                422, "request_invalid", "body", "replace or add_prefix", "both or neither"
            )
        if body.dry_run:
            return len(made)
        return captions.set_all(folder, made, f"{what} in {len(made)} captions")


@router.post("/datasets/{name}/undo")
def undo(request: Request, name: str) -> Record:
    """Take the last change of captions back."""
    return captions.undo(folder_of(request, name))
