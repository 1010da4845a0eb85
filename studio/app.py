"""Put the studio together: what it keeps, who guards it, and who answers."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.staticfiles import StaticFiles

from studio import security
from studio.problems import tell_problems
from studio.security import Failures, Guard, Nonces
from studio.store import Store

if TYPE_CHECKING:
    from studio.settings import Settings

HERE = Path(__file__).parent
ROUTES = ("api", "dataset_api", "pages")


def create_app(settings: Settings) -> FastAPI:
    """Build the application; nothing runs before its lifespan begins."""
    app = FastAPI(
        title="LoRA Studio",
        summary="Prepare, caption, train, watch, stop, continue, judge and download.",
        docs_url=None,  # these pages would load scripts from another host
        redoc_url=None,
        lifespan=lifespan,
    )
    settings.prepare()
    state = app.state
    state.settings, state.store = settings, Store(settings.database)
    state.nonces, state.failures, state.server = Nonces(), Failures(), None
    tell_problems(app)
    app.add_middleware(Guard, settings=settings, store=state.store)
    app.include_router(security.router)
    for name in ROUTES:
        if importlib.util.find_spec(f"studio.{name}"):
            app.include_router(importlib.import_module(f"studio.{name}").router)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    return app


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Begin what goes on beside the requests, and end it."""
    yield
    app.state.store.close()
