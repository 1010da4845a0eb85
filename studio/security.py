"""Who may ask, from where, for how much, and for which places on the disk.

One guard stands before all routes: Host, Origin, credentials, size and pace of the body; it puts
the headers on every answer. Nobody is let in by a route that forgot to ask.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from anyio import to_thread
from fastapi import APIRouter, FastAPI, Request, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import RedirectResponse

from studio.problems import Problem, as_problem, problem_at, respond, show
from studio.views import first_values, go_to, read_form, render

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from studio.settings import Settings
    from studio.store import Store

SAFE = ("GET", "HEAD", "OPTIONS")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; font-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    # With no-referrer, browsers send `Origin: null` with the forms of our own pages.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
CORS_HEADERS = {
    "access-control-allow-methods": "GET, POST, PUT, PATCH, DELETE",
    "access-control-allow-headers": "Authorization, Content-Type, Idempotency-Key, If-Match, "
    "Last-Event-ID",
    "access-control-max-age": "600",
    "vary": "Origin",
}
MOST_BYTES = 2**20  # of a body
MOST_IMAGE_BYTES = 64 * 2**20
IMAGE = re.compile(r"/datasets/[^/]+/images/")
PATIENCE_SECONDS, LEAST_BYTES_PER_SECOND = 30, 32 * 2**10  # of a body
SESSION_SECONDS, ONCE_SECONDS = 30 * 86_400, 60
MOST_FAILURES, FAILURE_SECONDS = 10, 60  # wrong tokens

audit = logging.getLogger("studio.audit")


class Guard:
    """Stands before all routes."""

    def __init__(self, app: ASGIApp, settings: Settings, store: Store) -> None:
        """Take whom it guards, and what it goes by."""
        self.app, self.settings, self.store = app, settings, store
        self.hosts = frozenset(hosts_of(settings))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or say why not."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no web sockets here
            return
        answer = Answer(scope, send, self.settings)
        if answer.only_head:
            scope = {**scope, "method": "GET"}
        intake = Intake(scope, receive)
        try:
            response = await self.admit(scope)
            if response is None:
                intake.check_length()
                await self.app(scope, intake.receive, answer.send)
            else:
                await response(scope, receive, answer.send)
        except ClientDisconnect:
            return
        except Exception as error:
            if answer.begun:
                raise
            await respond(Request(scope), as_problem(error))(scope, receive, answer.send)

    async def admit(self, scope: Scope) -> Response | None:
        """Check where a request comes from and who sends it; a preflight is answered here."""
        headers = Headers(scope=scope)
        self.check_host(headers)
        if scope["method"] == "OPTIONS" and allowed_origin(headers, self.settings):
            return Response(status_code=204, headers=CORS_HEADERS)
        credentials = await self.credentials(scope, headers)
        if not credentials and not is_open(scope["path"]):
            return self.ask_for_credentials(scope, headers)
        self.check_origin(scope["method"], headers, credentials)
        return None

    def check_host(self, headers: Headers) -> None:
        """Answer by our own names alone, so that no other name can be made to lead here."""
        said = headers.getlist("host")
        if len(said) != 1 or said[0].lower() not in self.hosts:
            found = show(", ".join(said)) or "none"
            hint = "Start the studio with --allowed-host to use another name."
            problem = problem_at("Host", "a name of this studio", found, hint)
            raise Problem(421, "host_unknown", f"This is no studio called {found}.", [problem])

    async def credentials(self, scope: Scope, headers: Headers) -> str:
        """Tell by what a request proves that it may ask: bearer, cookie, or nothing."""
        if not self.settings.authenticated:
            return "bearer"
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and same(token, self.settings.token):
            return "bearer"
        cookie = Request(scope).cookies.get(cookie_name(self.settings))
        if cookie is None:
            return ""
        known = await to_thread.run_sync(self.store.has_session, digest(cookie))
        return "cookie" if known else ""

    def ask_for_credentials(self, scope: Scope, headers: Headers) -> Response:
        """Send a person to the login, and tell a program what is missing."""
        if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
            return RedirectResponse(f"/login?next={quote(scope['path'], safe='')}", 303)
        detail = "Send Authorization: Bearer with the token of the studio."
        raise Problem(401, "unauthorized", detail, headers={"WWW-Authenticate": "Bearer"})

    def check_origin(self, method: str, headers: Headers, credentials: str) -> None:
        """Let no page of another site change anything, as Go's CrossOriginProtection does."""
        if method in SAFE:
            return
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if credentials == "bearer" and allowed_origin(headers, self.settings):
            return
        if site is not None:
            allowed = site in ("same-origin", "none")
        elif origin is not None:
            allowed = origin.partition("://")[2].lower() == headers["host"].lower()
        else:  # no browser of these days: a program, which has no cookie of ours by accident
            allowed = credentials == "bearer"
        if not allowed:
            detail = (
                f"A page of {show(origin or site or 'unknown origin')} may change nothing here."
            )
            raise Problem(403, "origin_refused", detail)


def hosts_of(settings: Settings) -> Iterator[str]:
    """List the values of Host that mean this studio."""
    own = settings.host.strip("[]")
    own = f"[{own}]" if ":" in own else own
    names = [*LOOPBACK, *settings.allowed_hosts]
    if own not in ("0.0.0.0", "[::]", *names):
        names.append(own)
    for name in map(str.lower, names):
        has_port = name.rpartition(":")[2].isdecimal()
        yield name if has_port else f"{name}:{settings.port}"
        if name in map(str.lower, settings.allowed_hosts) or settings.port == 80:
            yield name  # as a proxy in front passes it on


def allowed_origin(headers: Headers, settings: Settings) -> str | None:
    """Return the origin of a request if it is one of those that were allowed by name."""
    origin = headers.get("origin")
    return origin if origin in settings.allowed_origins else None


def is_open(path: str) -> bool:
    """Tell whether a path answers everyone."""
    return path in ("/healthz", "/login") or path.startswith("/static/")


def same(given: str, known: str) -> bool:
    """Compare secrets in a time that tells nothing; what is empty is none."""
    equal = hmac.compare_digest(given.encode("utf-8", "surrogateescape"), known.encode())
    return equal and bool(known)


def digest(secret: str) -> str:
    """Return what is kept of a secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def cookie_name(settings: Settings) -> str:
    """Name the cookie by the port: browsers give a cookie to all ports of a host."""
    return f"studio_{settings.port}"


class Answer:
    """What goes back: every answer has the same headers."""

    def __init__(self, scope: Scope, send: Send, settings: Settings) -> None:
        """Take where it goes."""
        self.pass_on, self.begun = send, False
        self.only_head = scope["method"] == "HEAD"  # what GET would answer, without its body
        self.origin = allowed_origin(Headers(scope=scope), settings)

    async def send(self, message: Message) -> None:
        """Send a part, the headers with the first."""
        if message["type"] == "http.response.start":
            self.begun = True
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            if self.origin:
                headers["access-control-allow-origin"] = self.origin
                headers["cross-origin-resource-policy"] = "cross-origin"
        elif self.only_head:
            goes_on, message = message.get("more_body"), {"type": "http.response.body"}
            if goes_on:  # maybe for ever
                await self.pass_on(message)
                raise ClientDisconnect
        await self.pass_on(message)


class Intake:
    """The body of a request: no more than is fit, and no slower."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        """Take where it comes from."""
        headers = Headers(scope=scope)
        self.take, self.length = receive, headers.get("content-length")
        self.is_image = scope["method"] == "PUT" and IMAGE.match(scope["path"]) is not None
        self.most = MOST_IMAGE_BYTES if self.is_image else MOST_BYTES
        self.size, self.begun, self.done = 0, time.monotonic(), False

    def check_length(self) -> None:
        """Refuse what says of itself that it is too large."""
        if self.is_image and self.length is None:
            raise Problem(411, "length_required", "Send Content-Length with an image.")
        if self.length is not None and self.length.isdecimal() and int(self.length) > self.most:
            raise self.too_large()

    def too_large(self) -> Problem:
        """Say how large it may be."""
        return Problem(413, "too_large", f"A body of at most {self.most:,} bytes is taken here.")

    async def receive(self) -> Message:
        """Take the next part; behind the last one, only the end of the connection is waited for."""
        if self.done:
            return await self.take()
        deadline = self.begun + PATIENCE_SECONDS + self.size / LEAST_BYTES_PER_SECOND
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                message = await self.take()
        except TimeoutError as error:
            raise Problem(408, "too_slow", "The body did not come in time.") from error
        self.size += len(message.get("body", b""))
        self.done = not message.get("more_body", False)
        if self.size > self.most:
            raise self.too_large()
        return message


# --- Sessions of browsers ---

router = APIRouter(include_in_schema=False)


class Nonces:
    """Words that let a browser in once, soon after they were given out."""

    def __init__(self) -> None:
        """Begin with none."""
        self.known: dict[str, float] = {}

    def issue(self) -> str:
        """Give one out."""
        nonce = secrets.token_urlsafe(32)
        self.known[nonce] = time.monotonic() + ONCE_SECONDS
        return nonce

    def redeem(self, nonce: str) -> bool:
        """Take one back; it is good for nothing then."""
        found = next((known for known in self.known if same(nonce, known)), "")
        return time.monotonic() < self.known.pop(found, 0.0)


def invitation(app: FastAPI) -> str:
    """Return the address that lets the browser of whoever started the studio in, once."""
    return f"/login?once={app.state.nonces.issue()}"


class Failures:
    """Counts wrong tokens. A right one always counts, so that nobody can lock the owner out."""

    def __init__(self) -> None:
        """Begin with none."""
        self.times: deque[float] = deque(maxlen=MOST_FAILURES)

    def note(self) -> None:
        """Note one, and refuse to answer when there were many."""
        now = time.monotonic()
        if len(self.times) == MOST_FAILURES and now - self.times[0] < FAILURE_SECONDS:
            wait = str(int(FAILURE_SECONDS - (now - self.times[0])) + 1)
            detail = f"Too many wrong tokens. Wait {wait} seconds."
            raise Problem(429, "too_many_attempts", detail, headers={"Retry-After": wait})
        self.times.append(now)


@router.get("/login", response_class=Response)
def show_login(request: Request, once: str = "", next: str = "/") -> Response:  # noqa: A002, in URLs
    """Ask for the token; a browser that the studio opened itself brings a word instead."""
    state = request.app.state
    if once:
        if state.nonces.redeem(once):
            return let_in(request, next)
        state.failures.note()
        return login_page(request, next, "This address was used already, or is too old.", 401)
    return login_page(request, next, None, 200)


@router.post("/login", response_class=Response)
async def log_in(request: Request) -> Response:
    """Take the token from the form."""
    said, state = first_values(await read_form(request)), request.app.state
    onward = said.get("next", "/")
    if same(said.get("token", "").strip(), state.settings.token):
        return await to_thread.run_sync(let_in, request, onward)
    state.failures.note()
    audit.warning("a wrong token was refused")
    return login_page(request, onward, "This is not the token.", 401)


@router.post("/logout", response_class=Response)
def log_out(request: Request) -> Response:
    """Forget the session."""
    state, name = request.app.state, cookie_name(request.app.state.settings)
    state.store.close_session(digest(request.cookies.get(name, "")))
    audit.info("a browser logged out")
    response = RedirectResponse("/login", 303)
    response.delete_cookie(name, path="/", httponly=True, samesite="strict")
    return response


def login_page(request: Request, onward: str, problem: str | None, status: int) -> Response:
    """Show the form."""
    path = str(request.app.state.settings.root / "token")
    values: dict[str, Any] = {"problem": problem, "next": onward, "token_path": path}
    return render(request, "login.html", status_code=status, bare=True, **values)


def let_in(request: Request, onward: str) -> Response:
    """Open a session and send the browser on."""
    settings, secret = request.app.state.settings, secrets.token_urlsafe(32)
    request.app.state.store.open_session(digest(secret), SESSION_SECONDS)
    audit.info("a browser logged in")
    response = go_to(onward)
    response.set_cookie(
        cookie_name(settings),
        secret,
        max_age=SESSION_SECONDS,
        path="/",
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )
    return response


# --- Places on the disk ---

MODEL, PICTURES, WRITTEN, OWN = "model", "pictures", "written", "own"
# What a knob that names a place may name. One that is missing here is held to all of it.
KNOBS = {
    "dataset_path": PICTURES,
    "regularization_path": PICTURES,
    "validation_path": PICTURES,
    "base_model": MODEL,
    "model_config_path": MODEL,
    "vae": MODEL,
    "init_lora": MODEL,
    "cache_dir": WRITTEN,
    "loras_path": WRITTEN,
    "embeddings_path": WRITTEN,
    "metrics_file": WRITTEN,
    "output_path": OWN,
}
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


def confine_config(settings: Settings, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config whose places are all allowed; tell of all that are not."""
    problems: list[dict[str, str]] = []

    def confined(section: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(section)
        for knob in path_knobs(settings, section):
            try:
                found[knob] = confine(settings, knob, section[knob])
            except Problem as problem:
                problems.extend(problem.problems)
        return found

    allowed = confined(config)
    if isinstance(config.get("training_params"), dict):
        allowed["training_params"] = confined(config["training_params"])
    if problems:
        detail = "; ".join(f"{p['path']}: {p['found']} is not allowed" for p in problems)
        raise Problem(422, "path_refused", detail, problems)
    return allowed


def path_knobs(settings: Settings, section: Mapping[str, Any]) -> Iterator[str]:
    """List the knobs given that name a place: those of the schema, and those with a rule."""
    knobs = knobs_of(settings.repository)
    for knob, value in section.items():
        names_place = knob in KNOBS or knobs.get(knob, {}).get("format") == "path"
        if names_place and isinstance(value, str):
            yield knob


@cache
def knobs_of(repository: Path) -> dict[str, dict[str, Any]]:
    """Read what the trainer's schema says of each knob."""
    schema = json.loads((repository / "config_schema.json").read_bytes())
    nested = schema["definitions"]["training_params"]["properties"]
    return {name: nested.get(name, knob) for name, knob in schema["properties"].items()}


def confine(settings: Settings, knob: str, value: str) -> str:
    """Return the real path of what a knob names, or a model's id; refuse all other places."""
    rule = KNOBS.get(knob, MODEL)
    if rule is OWN:
        raise refused(knob, "nothing: the studio chooses it", value, "Leave it out.")
    places = places_of(settings, rule)
    expected = "a path inside " + ", ".join(map(str, places))
    if not places:
        expected = "a path inside a folder of --allow-root"
    if rule is MODEL:
        expected += ", or a Hugging Face id"
    hint = "--allow-root adds further folders when the studio starts."
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", value):
        raise refused(knob, expected, value, hint)
    for path in candidates(value, places):
        inside = any(path.is_relative_to(place) for place in places)
        if inside and (rule is WRITTEN or os.path.exists(path)):  # noqa: PTH110, raises nothing
            return str(path)
    if rule is MODEL and HUB_ID.fullmatch(value):
        return value
    raise refused(knob, expected, value, hint)


def places_of(settings: Settings, rule: str) -> list[Path]:
    """List the folders that a rule allows."""
    own = {MODEL: [settings.models], PICTURES: [settings.datasets], WRITTEN: []}[rule]
    return [Path(path).resolve() for path in (*own, *settings.allowed_roots)]


def candidates(value: str, places: Iterable[Path]) -> Iterator[Path]:
    """Read a path as it stands, and a relative one as lying in each of the folders."""
    if Path(value).is_absolute():
        yield real(Path(value))
    else:
        yield from (real(place / value) for place in places)


def real(path: Path) -> Path:
    """Follow all links; a path that loops leads nowhere."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return Path("/nowhere")


def refused(knob: str, expected: str, value: str, hint: str) -> Problem:
    """Say that a place is not allowed."""
    problem = problem_at(knob, expected, value, hint)
    return Problem(422, "path_refused", f"{knob}: {problem['found']} is not allowed", [problem])
