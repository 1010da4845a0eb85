"""REST: what a program may ask. Each route parses, calls, and answers."""

from __future__ import annotations

from fastapi import APIRouter, Request

from studio.problems import StrictRoute

router = APIRouter(route_class=StrictRoute)


@router.get("/healthz")
def tell_health(request: Request) -> dict[str, str]:
    """Tell whether the studio can do its work."""
    with request.app.state.store.writing():
        return {"status": "ok"}
