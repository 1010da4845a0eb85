"""Put the studio together: what it keeps, who guards it, who answers, and what goes on beside."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from anyio import to_thread
from fastapi import FastAPI
from starlette.staticfiles import StaticFiles

from studio import (
    api,
    dataset_api,
    dataset_pages,
    datasets,
    jobs,
    pages,
    preflight,
    security,
    status,
)
from studio.engines import further
from studio.events import Hub
from studio.local import Local
from studio.problems import tell_problems
from studio.reconcile import Reconciler
from studio.security import Failures, Guard, Nonces
from studio.slots import find_slots
from studio.store import Job, Store
from studio.webhook import Notifier

if TYPE_CHECKING:
    from starlette.datastructures import State

    from studio.settings import Settings

HERE = Path(__file__).parent
THREADS = 100  # for requests that wait for a disk or for the trainer's answer


def create_app(settings: Settings) -> FastAPI:
    """Build the application; nothing runs before its lifespan begins."""
    app = FastAPI(
        title="LoRA Studio",
        summary="Prepare, caption, train, watch, stop, continue, judge and download.",
        docs_url=None,  # these pages would load scripts from another host
        redoc_url=None,
        lifespan=lifespan,
    )
    furnish(app, settings)
    tell_problems(app)
    app.add_middleware(Guard, settings=settings, store=app.state.store)
    for part in (security, api, dataset_api, dataset_pages, pages):
        app.include_router(part.router)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    return app


def furnish(app: FastAPI, settings: Settings) -> None:
    """Give the routes all that they work with."""
    settings.prepare()
    state, store = app.state, Store(settings.database)
    state.settings, state.store, state.server = settings, store, None
    state.nonces, state.failures = Nonces(), Failures()
    state.engines = {"local": Local(settings)} | further(settings)
    state.reconciler = Reconciler(settings, store, state.engines, find_slots(settings.slots))
    state.hub = Hub(settings, store, partial(status.briefs, store))
    state.notifier = Notifier(settings, lambda job: status.briefs(store, [job])[0])

    def changed(job: Job) -> None:
        state.hub.changed()
        state.notifier.changed(job)

    state.reconciler.listeners.append(changed)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Begin what goes on beside the requests, and end it."""
    state = app.state
    to_thread.current_default_thread_limiter().total_tokens = THREADS
    for sweep in (datasets.sweep, jobs.sweep):
        await to_thread.run_sync(sweep, state.settings)
    await to_thread.run_sync(state.reconciler.start)
    state.notifier.start()
    news = asyncio.create_task(watch(state))
    yield
    news.cancel()
    state.notifier.stop()
    await to_thread.run_sync(state.reconciler.stop)
    state.store.close()


async def watch(state: State) -> None:
    """Look for news until the service ends; then nobody waits any more for what is checked."""
    await state.hub.run(lambda: bool(state.server and state.server.should_exit))
    preflight.end_all()
