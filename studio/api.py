"""REST: what a program may ask. Each route parses, calls, and answers.

Routes that read files or the database are plain functions, which run in threads; those that stream
are coroutines.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from typing import TYPE_CHECKING, Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Header, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, StreamingResponse

from studio import events, files, jobs, metrics, preflight, slots, status
from studio.events import Position, Stream
from studio.problems import Problem, StrictRoute
from studio.store import FINAL, Job

if TYPE_CHECKING:
    from starlette.datastructures import State

Record = dict[str, Any]

PROBLEM = {
    "description": "What went wrong, as RFC 9457 has it.",
    "content": {
        "application/problem+json": {
            "schema": {
                "type": "object",
                "required": ["type", "title", "status", "detail", "instance", "code", "problems"],
                "properties": {
                    "type": {"type": "string"},
                    "title": {"type": "string"},
                    "status": {"type": "integer"},
                    "detail": {"type": "string"},
                    "instance": {"type": "string"},
                    "code": {"type": "string", "description": "stable, for programs"},
                    "problems": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["path", "expected", "found", "hint"],
                            "additionalProperties": {"type": "string"},
                        },
                    },
                },
            }
        }
    },
}
SHOWN = 50  # jobs that a stream begins with

router = APIRouter(route_class=StrictRoute, responses={"default": PROBLEM})

JobId = Annotated[str, Path(min_length=1, max_length=64)]
Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=200)]
JobState = Literal["queued", "running", "stopping", "completed", "stopped", "failed", "cancelled"]
Kind = Literal["train", "caption", "prepare", "generate", "evaluate"]


class Body(BaseModel):
    """What a request may say."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Checking(Body):
    """A config to be checked."""

    config: Record
    dataset: str | None = None


class Stopping(Body):
    """Which attempt is meant."""

    attempt: int | None = Field(
        default=None, ge=1, description="refused where another one is at work"
    )


class Resuming(Body):
    """What is to be different."""

    set: Record = Field(default={}, description="knobs that may change in a run, such as steps")


class Asking(Body):
    """What a training under way is to do."""

    preview: bool = False
    checkpoint: bool = False
    sample_prompts: list[str] | None = Field(default=None, max_length=16)


class Changing(Body):
    """What is to be different."""

    name: jobs.Name | None = None
    priority: int | None = Field(default=None, ge=-100, le=100)


# --- Beginning a job ---


@router.post("/train", status_code=202)
def train(request: Request, wanted: jobs.Training, key: Key = None) -> JSONResponse:
    """Train a LoRA; the config is checked by the trainer itself before this answers."""
    return submitted(request, wanted, key)


@router.post("/caption", status_code=202)
def caption(request: Request, wanted: jobs.Captioning, key: Key = None) -> JSONResponse:
    """Write captions beside the pictures of a dataset."""
    return submitted(request, wanted, key)


@router.post("/prepare", status_code=202)
def prepare(request: Request, wanted: jobs.Preparing, key: Key = None) -> JSONResponse:
    """Judge the pictures and captions of a dataset."""
    return submitted(request, wanted, key)


@router.post("/generate", status_code=202)
def generate(request: Request, wanted: jobs.Drawing, key: Key = None) -> JSONResponse:
    """Draw checkpoints × prompts × seeds × strengths."""
    return submitted(request, wanted, key)


@router.post("/evaluate", status_code=202)
def evaluate(request: Request, wanted: jobs.Judging, key: Key = None) -> JSONResponse:
    """Draw, and judge what was drawn against what was trained on."""
    return submitted(request, wanted, key)


def submitted(request: Request, wanted: jobs.Wanted, key: str | None) -> JSONResponse:
    """Answer with the job that a request has become, or became before."""
    studio = request.app.state
    job, fresh = jobs.submit(studio, wanted, key)
    told = {
        "job_id": job.id,
        "state": job.state,
        "position": studio.store.position(job.id),
        "status": f"/status/{job.id}",
        "page": f"/runs/{job.id}",
    }
    return JSONResponse(told, 202 if fresh else 200, {"Location": told["status"]})


@router.post("/validate")
def validate(request: Request, wanted: Checking) -> Record:
    """Let the trainer check a config, and start nothing."""
    return jobs.preflight(request.app.state, wanted.config, wanted.dataset)


# --- How jobs stand ---


@router.get("/status/{job_id}")
def show_status(request: Request, job_id: JobId) -> Response:
    """Say how a job stands."""
    told = status_of(request.app.state, job_id)
    steady = {name: value for name, value in told.items() if name != "silent_seconds"}
    etag = f'"{hashlib.sha256(json.dumps(steady).encode()).hexdigest()[:32]}"'
    if files.knows(request.headers, etag):
        return Response(status_code=304, headers={"ETag": etag})
    return JSONResponse(told, headers={"ETag": etag})


def status_of(studio: State, job_id: str) -> Record:
    """Read how a job stands: first its row, as a final one has said all by then."""
    job = status.job_of(studio.store, job_id)
    return status.status(studio.settings, studio.store, job, studio.hub.story(job_id))


@router.get("/jobs")
def list_jobs(
    request: Request,
    state: JobState | None = None,
    kind: Kind | None = None,
    before: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> Record:
    """List jobs in brief, the newest first; `next` goes into `before` for older ones."""
    store = request.app.state.store
    found = store.jobs(state, kind, before, limit)
    following = found[-1].id if len(found) == limit else None
    return {"jobs": status.briefs(store, found), "next": following}


@router.post("/jobs/{job_id}/stop", status_code=202)
def stop(request: Request, job_id: JobId, wanted: Stopping | None = None) -> Record:
    """Ask a job to save and end."""
    jobs.stop(request.app.state, job_id, wanted.attempt if wanted else None)
    return status_of(request.app.state, job_id)


@router.post("/jobs/{job_id}/resume", status_code=202)
def resume(request: Request, job_id: JobId, wanted: Resuming | None = None) -> Record:
    """Let a job go on where it stopped, failed or was complete, perhaps for more steps."""
    jobs.resume(request.app.state, job_id, wanted.set if wanted else None)
    return status_of(request.app.state, job_id)


@router.post("/jobs/{job_id}/request", status_code=202)
def ask(request: Request, job_id: JobId, wanted: Asking) -> Record:
    """Ask a training under way for a preview, a checkpoint or other prompts."""
    jobs.ask(request.app.state, job_id, **wanted.model_dump())
    return status_of(request.app.state, job_id)


@router.patch("/jobs/{job_id}")
def change(request: Request, job_id: JobId, wanted: Changing) -> Record:
    """Give a job another name or priority."""
    jobs.change(request.app.state, job_id, wanted.name, wanted.priority)
    return status_of(request.app.state, job_id)


@router.delete("/jobs/{job_id}", status_code=204)
def delete(
    request: Request,
    job_id: JobId,
    kept: Annotated[Literal["trash", "keep"], Query(alias="files")] = "trash",
) -> None:
    """Forget a job that has ended; its files go to the trash, or stay where they are."""
    jobs.delete(request.app.state, job_id, kept)


# --- What a job has made ---


@router.get("/jobs/{job_id}/config")
def show_config(request: Request, job_id: JobId) -> Record:
    """Return what a job was asked for."""
    return status.job_of(request.app.state.store, job_id).config


@router.get("/jobs/{job_id}/files")
def list_files(request: Request, job_id: JobId) -> Record:
    """List the files that a job has made, the newest first."""
    return {"files": files.list_files(place_of(request, job_id))}


def place_of(request: Request, job_id: str) -> Any:
    """Return the folder of a job that is there."""
    job = status.job_of(request.app.state.store, job_id)
    return request.app.state.settings.job(job.id)


@router.get("/jobs/{job_id}/files/{path:path}", response_class=Response)
def send_file(
    request: Request,
    job_id: JobId,
    path: str,
    thumb: Annotated[int | None, Query(ge=32, le=1024)] = None,
) -> Response:
    """Return a file of a job, or a part of it; a picture also as a small WebP."""
    job: Job = status.job_of(request.app.state.store, job_id)
    folder = request.app.state.settings.job(job.id)
    if thumb:
        return files.send_thumbnail(folder, path, thumb, request.headers)
    return files.send_file(job, folder, path, request.headers)


@router.get("/jobs/{job_id}/archive", response_class=Response)
def send_archive(request: Request, job_id: JobId) -> Response:
    """Return all files of a job in one zip file, packed while it is sent."""
    job = status.job_of(request.app.state.store, job_id)
    content = files.archive(job, request.app.state.settings.job(job.id))
    name = files.download_name(job, "lora_final.safetensors").removesuffix(".safetensors")
    headers = {"content-disposition": files.attachment(f"{name}.zip")}
    return StreamingResponse(content, media_type="application/zip", headers=headers)


@router.get("/jobs/{job_id}/log")
def show_log(
    request: Request,
    job_id: JobId,
    attempt: Annotated[int | None, Query(ge=1)] = None,
    after: Annotated[int | None, Query(ge=0)] = None,
) -> Record:
    """Return what a program wrote to stderr: the end, or what follows `after`."""
    return files.read_log(place_of(request, job_id), attempt, after)


@router.get("/jobs/{job_id}/metrics")
def show_series(
    request: Request, job_id: JobId, points: Annotated[int, Query(ge=2, le=5_000)] = 800
) -> Record:
    """Return the curves of a job in buckets, each with its least, greatest and mean value."""
    job = status.job_of(request.app.state.store, job_id)
    story: events.Story = request.app.state.hub.story(job.id)
    return story.curves(points)


# --- Events ---

After = Annotated[str, Query(max_length=40, description="the id of the last event known")]


@router.get("/jobs/{job_id}/events", response_class=Response)
async def send_lines(
    request: Request, job_id: JobId, after: After = "", follow: bool = False
) -> Response:
    """Return what a job has said, its lines as they are; with `follow`, also what is to come."""
    studio, position = request.app.state, Position.parse(after)
    place = await to_thread.run_sync(place_of, request, job_id)
    await to_thread.run_sync(events.check_position, place, position)
    lines = events.as_lines(studio.hub, job_id, position, following=follow)
    return Stream(lines, "application/x-ndjson")


@router.get("/events", response_class=Response)
async def send_events(
    request: Request,
    job: Annotated[str | None, Query(max_length=64)] = None,
    after: After = "",
    known: Annotated[str | None, Header(alias="Last-Event-ID", max_length=40)] = None,
) -> Response:
    """Tell a page what changes: a `snapshot`, then `state` of all jobs and `trainer` of one."""
    studio, position = request.app.state, Position.parse(known or after)
    since = studio.hub.version
    if job:
        over: bool = await to_thread.run_sync(is_over, studio, job, position)
        if over:  # an EventSource that gets this comes no more
            return Response(status_code=204)
    snapshot = await to_thread.run_sync(snapshot_of, studio, job)
    told = events.as_events(studio.hub, snapshot, since, job, position)
    return Stream(told, "text/event-stream")


def is_over(studio: State, job_id: str, position: Position) -> bool:
    """Tell whether a job will never say more than is known."""
    job = status.job_of(studio.store, job_id)
    events.check_position(studio.settings.job(job_id), position)
    return job.state in FINAL and studio.hub.story(job_id).recent.end == position


def snapshot_of(studio: State, job_id: str | None) -> Record:
    """Say how jobs stand: the newest and all that wait or work in brief, one of them in full."""
    store = studio.store
    found = {job.id: job for job in (*store.jobs(limit=SHOWN), *store.queue(), *store.active())}
    told = status_of(studio, job_id) if job_id else None
    return {"jobs": status.briefs(store, found.values()), "job": told}


# --- The studio itself ---


@router.get("/schema")
def show_schema(request: Request) -> Response:
    """Return config_schema.json: what a config may hold."""
    content = preflight.schema(request.app.state.settings.repository)
    return Response(content, media_type="application/schema+json")


@router.get("/devices")
def list_devices(request: Request) -> Record:
    """List the slots for jobs, with what is in use of their memory, by whatever program."""
    studio = request.app.state
    holds = studio.store.holds()
    found = [
        {
            "id": slot.id,
            "name": slot.name,
            "total_bytes": slot.total_bytes,
            "used_bytes": slot.used_bytes,
            "job": holds.get(slot.id),
        }
        for slot in slots.measured(studio.reconciler.slots)
    ]
    return {"slots": found}


@router.get("/metrics", response_class=Response)
def show_metrics(request: Request) -> Response:
    """Return how the studio is, for Prometheus."""
    return Response(metrics.exposition(request.app.state), media_type=metrics.MEDIA_TYPE)


@router.get("/healthz")
def tell_health(request: Request) -> Record:
    """Tell whether the studio can do its work; this alone needs no token."""
    studio = request.app.state
    try:
        studio.store.check_writable()
    except sqlite3.Error as error:
        raise Problem(503, "unhealthy", "The database cannot be written.") from error
    if studio.reconciler.stalled():
        raise Problem(503, "unhealthy", "Nobody looks after the jobs.")
    return {"status": "ok"}
