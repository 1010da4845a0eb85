"""Turn templates into pages: the Jinja environment, how numbers read, and forms that come back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from studio.problems import Problem
from studio.status import briefs

if TYPE_CHECKING:
    from fastapi import Request

TEMPLATES = Path(__file__).with_name("templates")
PLACES = (
    ("/", "Runs"),
    ("/data", "Datasets"),
    ("/new", "New run"),
    ("/compare", "Compare"),
    ("/machine", "Machine"),
)
THEMES = ("light", "dark")
MOST_FIELDS = 1_000
OPEN_PAGES = ("login.html", "problem.html")  # shown to strangers too: nothing of jobs in them


def read_time(value: str) -> datetime:
    """Read a time as jobs and events hold it."""
    return datetime.fromisoformat(value)


def show_bytes(value: float | None) -> str:
    """Show a size in the unit that suits it: 52 KB, 12.4 MB, 6.8 GB."""
    if value is None:
        return "unknown"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if value >= size:
            amount = value / size
            return f"{amount:.1f} {unit}" if amount < 100 else f"{amount:.0f} {unit}"
    return f"{value:.0f} bytes"


def show_duration(seconds: float | None) -> str:
    """Show a length of time by its two largest units: 3 min 5 s, 2 h 10 min."""
    if seconds is None or not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole < 600 else f"{whole // 60} min"
    hours, minutes = divmod(whole // 60, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def show_number(value: float | None) -> str:
    """Show a number with as many digits as help: 1,500, 0.083, 1e-4."""
    if value is None:
        return "unknown"
    if isinstance(value, int) or value == int(value):
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.1f}"


def show_share(value: float) -> str:
    """Show a part of a whole: 12 %, 0.4 %."""
    return f"{show_number(float(f'{100 * value:.2g}'))} %"


def show_clock(value: str | None) -> str:
    """Show a time as people on this machine say it: 14:32, or 3 Nov 14:32 on another day."""
    if value is None:
        return "unknown"
    local = read_time(value).astimezone()
    if local.date() == datetime.now().astimezone().date():
        return f"{local:%H:%M}"
    return f"{local.day} {local:%b %H:%M}"


def show_ago(value: str | None) -> str:
    """Show how long ago something was."""
    if value is None:
        return "unknown"
    seconds = (datetime.now(UTC) - read_time(value)).total_seconds()
    return "just now" if seconds < 10 else f"{show_duration(seconds)} ago"


def plural(count: int, one: str, many: str | None = None) -> str:
    """Count things: 1 image, 24 images."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


@cache
def environment() -> Environment:
    """Make the one environment: everything is escaped, and a missing name is an error."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        bytes=show_bytes,
        duration=show_duration,
        number=show_number,
        clock=show_clock,
        ago=show_ago,
        plural=plural,
    )
    made.globals.update(places=PLACES, ui=made.get_template("macros.html").module)
    return made


def place(path: str) -> str:
    """Say to which place of the frame a page belongs."""
    first = "/" + path.lstrip("/").split("/", 1)[0]
    return "/" if first == "/runs" else first


def running_job(request: Request) -> dict[str, Any] | None:
    """Say in brief what the machine is at, for the frame of every page."""
    active = request.app.state.store.active()
    return briefs(request.app.state.store, active[:1])[0] if active else None


def render(
    request: Request, template: str, /, *, status_code: int = 200, **values: Any
) -> HTMLResponse:
    """Render a page in its frame."""
    theme = request.cookies.get("theme")
    frame = {
        "bare": False,
        "running": None if template in OPEN_PAGES else running_job(request),
        "here": request.url.path if request.method == "GET" else place(request.url.path),
        "place": place(request.url.path),
        "theme": theme if theme in THEMES else None,
    }
    text = environment().get_template(template).render(frame | values)
    return HTMLResponse(text, status_code, headers={"Cache-Control": "no-store"})


async def read_form(request: Request) -> list[tuple[str, str]]:
    """Read an urlencoded form, also a name that stands in it several times."""
    body = (await request.body()).decode("utf-8", "replace")
    try:
        return parse_qsl(body, keep_blank_values=True, max_num_fields=MOST_FIELDS)
    except ValueError as error:
        detail = f"Expected a form of at most {MOST_FIELDS:,} fields, got more."
        raise Problem(413, "form_too_large", detail) from error


def go_to(address: str) -> RedirectResponse:
    """Send the browser on after a form; only to a page of the studio itself."""
    parts = urlsplit(address)
    inside = not parts.scheme and not parts.netloc and address.startswith("/")
    return RedirectResponse(address if inside and "\\" not in address else "/", 303)


def first_values(form: Sequence[tuple[str, str]]) -> Mapping[str, str]:
    """Take the first value of each name."""
    return dict(reversed(form))
