"""Who may ask, from where, for how much, and for which places: through real HTTP, as it is met."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from acting import MODEL, PROBLEM_SCHEMA, acting, submitted, wanted
from conftest import ROOT
from fastapi.routing import APIRoute
from serving import Served, tree
from starlette.routing import Mount, Route
from studio_ground import wait_until

from studio import forms, local, security
from studio.__main__ import main
from studio.problems import Problem
from studio.security import HEADERS, KNOBS, Failures, Nonces
from studio.settings import Settings, write_secret

UNSAFE = ("POST", "PUT", "PATCH", "DELETE")
FORM = "application/x-www-form-urlencoded"


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Provide a studio that the tests of this file share."""
    with acting(tmp_path_factory.mktemp("security")) as served:
        yield served


@pytest.fixture
def stranger(studio: Served) -> Iterator[httpx.Client]:
    """Provide a client that knows no secret."""
    with httpx.Client(base_url=studio.settings.url, timeout=30) as client:
        yield client


@pytest.fixture
def browser(studio: Served) -> Iterator[httpx.Client]:
    """Provide a client that is logged in as browsers are: by a cookie."""
    with httpx.Client(base_url=studio.settings.url, timeout=30) as client:
        answer = client.get(security.invitation(studio.app))
        assert answer.status_code == 303
        yield client


def spoken(studio: Served, text: bytes) -> bytes:
    """Send bytes to the studio as they are, and return what comes back."""
    with studio.connect() as connection:
        connection.sendall(text)
        return connection.recv(65_536)


def count_jobs(studio: Served) -> int:
    """Count the jobs there are."""
    return len(studio.client.get("/jobs?limit=200").json()["jobs"])


def own(studio: Served) -> str:
    """Return the origin of the studio's own pages."""
    return studio.settings.url


# --- Host ---


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1.evil.example:{port}",
        "localhost:1",
        "localhost",
        "127.1:{port}",
        "0.0.0.0:{port}",
        "[::1]evil:{port}",
        "[::1%25eth0]:{port}",
        "localhost.:{port}",
        "",
    ],
)
def test_no_other_name_leads_here(studio: Served, host: str) -> None:
    """S1: a page of another site cannot make its own name mean this studio."""
    headers = {"Host": host.format(port=studio.settings.port)}
    answer = studio.client.get("/jobs", headers=headers)
    assert answer.status_code in (400, 421)
    assert "set-cookie" not in answer.headers
    assert "job_id" not in answer.text


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "127.0.0.1", "[::1]"])
def test_own_names_are_answered(studio: Served, name: str) -> None:
    """The names of this machine are good, in capitals too."""
    headers = {"Host": f"{name}:{studio.settings.port}"}
    assert studio.client.get("/jobs", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "lines",
    [
        b"GET /jobs HTTP/1.0\r\n\r\n",
        b"GET /jobs HTTP/1.1\r\nHost: localhost:PORT\r\nHost: evil.example\r\n\r\n",
    ],
    ids=["none", "two"],
)
def test_host_is_said_once(studio: Served, lines: bytes) -> None:
    """S1, S2: without a name, or with two of them, nothing is answered."""
    said = spoken(studio, lines.replace(b"PORT", str(studio.settings.port).encode()))
    assert re.match(rb"HTTP/1\.[01] 4(00|21) ", said)


def test_further_names_are_allowed_one_by_one() -> None:
    """A name that a proxy passes on counts with our port, and as it was given."""
    settings = Settings(Path("/x"), port=8000, allowed_hosts=("Studio.example", "other:8443"))
    names = set(security.hosts_of(settings))
    assert {"studio.example", "studio.example:8000", "other:8443"} <= names
    assert not {"other", "other:8000", "localhost"} & names


def test_every_address_is_no_name() -> None:
    """Who listens on all addresses has to say by which names it is called."""
    names = set(security.hosts_of(Settings(Path("/x"), host="0.0.0.0", port=8000)))
    assert names == {"localhost:8000", "127.0.0.1:8000", "[::1]:8000"}


# --- Origin ---


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Origin": "http://[::1"},
        {"Origin": "127.0.0.1:{port}"},
        {"Origin": "http://localhost:{port}.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Origin": "http://127.0.0.1:{port}"},
        {},
    ],
    ids=str,
)
def test_pages_of_other_sites_change_nothing(
    studio: Served, browser: httpx.Client, headers: dict[str, str]
) -> None:
    """S3, S4, S5: a cookie alone is not enough; the browser has to say that the page is ours."""
    port, before = studio.settings.port, count_jobs(studio)
    said = {name: value.format(port=port) for name, value in headers.items()}
    answer = browser.post("/train", json=wanted(), headers=said)
    assert (answer.status_code, answer.json()["code"]) == (403, "origin_refused")
    assert count_jobs(studio) == before


@pytest.mark.parametrize("site", ["same-origin", "none", None])
def test_our_own_pages_may_change_things(
    studio: Served, browser: httpx.Client, site: str | None
) -> None:
    """What a browser says of our own pages is good, in older ones by Origin alone."""
    headers = {"Sec-Fetch-Site": site} if site else {"Origin": own(studio)}
    assert browser.post("/train", json={}, headers=headers).status_code == 422


def test_a_program_needs_no_origin(studio: Served) -> None:
    """S4: who sends the token is no page that was lured here."""
    assert studio.client.post("/train", json=wanted()).status_code == 202


@pytest.mark.parametrize("method", ["OPTIONS", "GET"])
def test_other_sites_get_no_cors_headers(studio: Served, method: str) -> None:
    """S13: without leave, no script of another site reads an answer."""
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = studio.client.request(method, "/jobs", headers=headers)
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_site_that_was_allowed_may_ask_with_the_token(tmp_path: Path) -> None:
    """An origin that was named reads answers and sends the token; never the cookie."""
    origin = "https://app.example"
    headers = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
    with acting(tmp_path, allowed_origins=(origin,)) as studio:
        preflight = httpx.options(f"{studio.settings.url}/train", headers=headers)
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-origin"] == origin
        assert "access-control-allow-credentials" not in preflight.headers
        answer = studio.client.post("/train", json={}, headers=headers)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (422, origin)
        with httpx.Client(base_url=studio.settings.url) as browser:
            browser.get(security.invitation(studio.app))
            assert browser.post("/train", json={}, headers=headers).status_code == 403


# --- Bodies ---


@pytest.mark.parametrize("kind", ["text/plain", None, FORM, "multipart/form-data; boundary=x"])
def test_json_has_to_say_that_it_is(studio: Served, kind: str | None) -> None:
    """S6: what a form of another site can send is not read."""
    before = count_jobs(studio)
    headers = {"Content-Type": kind} if kind else {}
    answer = studio.client.post("/train", content=json.dumps(wanted()), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert count_jobs(studio) == before


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b'{"config": NaN}',
        b'{"config": {}, "config": {}}',
        b'{"config": {"learning_rate": 1e400}}',
        b'{"config": "\xff"}',
        b'{"config": "\\ud800"}',
        b"[" * 2**19 + b"]" * 2**19,
        b'{"a":' * 2**17,
        b'{"config": ' + b"9" * 5_000 + b"}",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_json_that_is_none_is_refused_at_once(studio: Served, body: bytes) -> None:
    """S30: nesting, NaN, keys that are there twice and numbers beyond all bounds are no JSON."""
    begun = time.monotonic()
    answer = studio.client.post(
        "/train", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code in (400, 422)
    assert time.monotonic() - begun < 5  # seconds would be minutes with a parser that backtracks


def test_a_body_has_a_limit(studio: Served) -> None:
    """S18: more than a megabyte is refused, before it is sent where it says so."""
    headers = {"Content-Type": "application/json"}
    large = b" " * (2**20 + 1)
    assert studio.client.post("/train", content=large, headers=headers).status_code == 413
    head = f"POST /train HTTP/1.1\r\nHost: localhost:{studio.settings.port}\r\n"
    head += f"Authorization: Bearer {studio.settings.token}\r\n"
    announced = spoken(studio, f"{head}Content-Length: {10**12}\r\n\r\n".encode())
    assert announced.startswith(b"HTTP/1.1 413 ")


def test_a_body_without_length_is_counted(studio: Served) -> None:
    """S18: chunks are counted as they come."""

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 2**15

    headers = {"Content-Type": "application/json"}
    answer = studio.client.post("/train", content=chunks(), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


def test_an_image_says_its_length(studio: Served) -> None:
    """S18: an upload without Content-Length is refused."""
    answer = studio.client.put(
        "/datasets/imps/images/x.png", content=iter([b"x"]), headers={"Content-Type": "image/png"}
    )
    assert (answer.status_code, answer.json()["code"]) == (411, "length_required")


def test_who_sends_drop_by_drop_is_given_up(
    studio: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S18: a body has to come at a pace that a poor line has."""
    monkeypatch.setattr(security, "PATIENCE_SECONDS", 0.3)
    head = f"POST /train HTTP/1.1\r\nHost: localhost:{studio.settings.port}\r\n"
    head += f"Authorization: Bearer {studio.settings.token}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    with studio.connect() as connection:
        connection.sendall(head.encode())
        said = dripped(connection)
    assert said.startswith(b"HTTP/1.1 408 ")


def dripped(connection: socket.socket) -> bytes:
    """Send a byte now and then until there is an answer."""
    connection.settimeout(0.1)
    for _ in range(200):
        connection.sendall(b" ")
        try:
            return connection.recv(4_096)
        except TimeoutError:
            continue
    return b""


# --- Credentials ---


def routes(studio: Served, **known: str) -> list[tuple[str, str]]:
    """List all routes by method and an address that they answer, of what is known to be there."""
    found = []
    for route in walk(studio.app.routes):
        path = re.sub(r"\{(\w+)[^}]*\}", lambda name: known.get(name[1], "x"), route.path)
        found += [(method, path) for method in sorted(route.methods or ())]
    return found


def walk(known: Any) -> Iterator[Route | APIRoute]:
    """Find all routes, also those that were included."""
    for route in known:
        if isinstance(route, (Route, APIRoute)):
            yield route
        elif not isinstance(route, Mount):
            yield from walk(route.original_router.routes)


def test_nothing_is_told_to_strangers(studio: Served, stranger: httpx.Client) -> None:
    """S8, S9: every route there is asks for credentials, but for those that say why not."""
    known = routes(studio)
    assert len(known) > 30
    for method, path in known:
        if path in ("/healthz", "/login"):
            continue
        answer = stranger.request(method, path)
        assert answer.status_code == 401, (method, path)
        if method != "HEAD":
            jsonschema.validate(answer.json(), PROBLEM_SCHEMA)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200),
        ("/healthz", 200),
        ("/openapi.json", 200),
        ("/static/style.css", 200),
        ("/events", 200),  # a stream without an end
        ("/train", 405),
        ("/nowhere", 404),
    ],
)
def test_head_answers_as_get_without_a_body(studio: Served, path: str, status: int) -> None:
    """Also where GET would not come to an end; what GET may not ask, HEAD may not."""
    answer = studio.client.head(path, timeout=10)
    assert (answer.status_code, answer.content) == (status, b"")
    if path not in ("/", "/events"):
        assert answer.headers["content-type"] == studio.client.get(path).headers["content-type"]


def test_people_are_sent_to_the_login(stranger: httpx.Client) -> None:
    """A page that needs a login leads there, and from there back."""
    answer = stranger.get("/runs/x?y=1", headers={"Accept": "text/html"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=%2Fruns%2Fx")


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Basic {token}"},
        {"Authorization": "Bearer {upper}"},
        {"Authorization": "Bearer {token}x"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer \xe9\xff"},
        {"Cookie": "studio_{port}={token}"},
        {"Cookie": "studio_{port}="},
    ],
    ids=str,
)
def test_a_token_is_taken_in_one_way_only(
    studio: Served, stranger: httpx.Client, headers: dict[str, str]
) -> None:
    """S10: not in capitals, not as a password, not as a cookie."""
    settings = studio.settings
    values = {"token": settings.token, "upper": settings.token.swapcase(), "port": settings.port}
    said = {n.encode(): v.format(**values).encode("latin-1") for n, v in headers.items()}
    assert stranger.get("/jobs", headers=said).status_code == 401


def test_a_token_in_the_address_is_none(studio: Served, stranger: httpx.Client) -> None:
    """S10: addresses are kept in histories and logs."""
    assert stranger.get(f"/jobs?token={studio.settings.token}").status_code == 401


def test_wrong_tokens_are_slowed_down_and_the_right_one_never(
    studio: Served, stranger: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S10: after ten wrong ones there is a pause; nobody can lock the owner out by that."""
    monkeypatch.setitem(studio.app.state._state, "failures", Failures())
    headers = {"Origin": own(studio)}
    codes = [
        stranger.post("/login", data={"token": "wrong"}, headers=headers).status_code
        for _ in range(11)
    ]
    assert codes == [401] * 10 + [429]
    right = {"token": studio.settings.token, "next": "/runs/x"}
    answer = stranger.post("/login", data=right, headers=headers)
    assert (answer.status_code, answer.headers["location"]) == (303, "/runs/x")


def test_secrets_are_compared_in_a_time_that_tells_nothing() -> None:
    """S10: no `==` decides about a token, anywhere."""
    text = Path(security.__file__).read_text("utf-8")
    assert "compare_digest" in text
    assert not re.search(r"[=!]=\s*[\w.]*token|token\s*[=!]=", text)


def test_an_empty_secret_is_none() -> None:
    """S10: who gives nothing is not let in by what says nothing."""
    assert not security.same("", "")
    assert not security.same("", "secret")
    assert security.same("secret", "secret")


def test_a_token_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S10: a crash in the middle of the first start leaves no file that says nothing."""
    with monkeypatch.context() as crashing:
        crashing.setattr(os, "fsync", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _ = Settings(root=tmp_path).token
    assert list(tmp_path.iterdir()) == []
    token = Settings(root=tmp_path).token
    assert Settings(root=tmp_path).token == token != ""
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_token_is_never_written_over(tmp_path: Path) -> None:
    """S10: of two that start at once, the second takes what the first has made."""
    write_secret(tmp_path / "token", "first")
    write_secret(tmp_path / "token", "second")
    assert Settings(root=tmp_path).token == "first"


def test_a_studio_without_a_secret_does_not_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """S10: a blank file is told, and what to do about it."""
    (tmp_path / "token").write_text("\n", "ascii")
    arguments = ["--root", str(tmp_path), "--port", "0", "--slots", "cpu:1", "--no-browser"]
    assert main(arguments) == 1
    assert "token: expected the token, got an empty file. Delete" in capsys.readouterr().err


def test_an_invitation_is_good_once(studio: Served, stranger: httpx.Client) -> None:
    """S11: the address that the studio prints lets one browser in."""
    address = security.invitation(studio.app)
    assert stranger.get(address).status_code == 303
    stranger.cookies.clear()
    assert stranger.get(address).status_code == 401
    assert stranger.get("/login?once=guessed").status_code == 401


def test_an_invitation_grows_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """S11: after a minute it is good for nothing."""
    nonces = Nonces()
    nonce, now = nonces.issue(), time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    assert not nonces.redeem(nonce)


def test_the_cookie_is_for_us_alone(studio: Served, stranger: httpx.Client) -> None:
    """S12: it is named by the port, no script sees it, and no other site sends it."""
    said = stranger.get(security.invitation(studio.app)).headers["set-cookie"]
    assert said.startswith(f"studio_{studio.settings.port}=")
    flags = {part.strip().lower() for part in said.split(";")[1:]}
    assert {"httponly", "samesite=strict", "path=/", "max-age=2592000"} <= flags


def test_logging_out_ends_the_session(studio: Served, browser: httpx.Client) -> None:
    """S12: the cookie is worth nothing afterwards, also to who kept it."""
    kept = dict(browser.cookies)
    assert browser.get("/jobs").status_code == 200
    assert browser.post("/logout", headers={"Origin": own(studio)}).status_code == 303
    browser.cookies.update(kept)
    assert browser.get("/jobs").status_code == 401


def test_a_session_outlives_the_service(tmp_path: Path) -> None:
    """S12: who is logged in stays so when the studio is started again."""
    with acting(tmp_path) as studio:
        answer = httpx.get(f"{studio.settings.url}{security.invitation(studio.app)}")
        (cookie,) = answer.cookies.values()
        known = security.digest(cookie)
        assert cookie not in studio.settings.database.read_bytes().decode("latin-1")
    from studio.store import Store

    store = Store(studio.settings.database)
    assert store.has_session(known)
    store.close()


@pytest.mark.parametrize("onward", ["//evil.example", "https://evil.example", "/\\evil.example"])
def test_the_login_leads_nowhere_else(studio: Served, stranger: httpx.Client, onward: str) -> None:
    """A link to our login cannot send people on to another site."""
    answer = stranger.get(security.invitation(studio.app), params={"next": onward})
    where = httpx.get(
        f"{studio.settings.url}{security.invitation(studio.app)}&next={onward}"
    ).headers["location"]
    assert where == "/"
    assert "evil" not in answer.headers.get("location", "")


def test_without_authentication_other_sites_still_change_nothing(tmp_path: Path) -> None:
    """--no-auth lets programs in without a token, and no page but our own."""
    with acting(tmp_path, authenticated=False) as studio:
        url = studio.settings.url
        assert httpx.post(f"{url}/train", json={}).status_code == 422
        headers = {"Origin": "https://evil.example"}
        assert httpx.post(f"{url}/train", json={}, headers=headers).status_code == 403


# --- Answers ---


def test_every_answer_has_the_headers(studio: Served, stranger: httpx.Client) -> None:
    """S23: good answers, errors, streams, files and pages that nobody may frame or sniff."""
    job = submitted(studio)
    answers = [
        studio.client.get(path)
        for path in ("/healthz", "/jobs", "/nowhere", f"/jobs/{job}/events", "/static/style.css")
    ]
    answers += [stranger.get("/jobs"), stranger.get("/login"), studio.client.post("/train")]
    answers.append(studio.client.get("/jobs", headers={"Host": "evil.example"}))
    with studio.client.stream("GET", "/events") as stream:
        answers.append(stream)
    for answer in answers:
        for name, value in HEADERS.items():
            if name != "cache-control":
                assert answer.headers[name] == value, (answer.request.url, name)
        assert "server" not in answer.headers


def test_a_mistake_of_ours_shows_a_number_and_no_more(
    studio: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What went wrong stands in the log, under the number that the answer gives."""
    monkeypatch.delattr(studio.app.state, "reconciler")
    answer = studio.client.get("/devices")
    assert answer.status_code == 500
    jsonschema.validate(answer.json(), PROBLEM_SCHEMA)
    (number,) = re.findall(r"[0-9a-f]{16}", answer.json()["detail"])
    assert "Traceback" not in answer.text
    assert number in caplog.text
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_looking_changes_nothing(studio: Served, trained: str) -> None:
    """S7: no GET writes to the disk or the database, whatever it is asked for."""
    for client_path in ("/jobs", "/healthz"):  # what they read has been opened once
        studio.client.get(client_path)
    file = {"job_id": trained, "path": "output/events.jsonl", "part": "state"}
    there = {**file, "name": "imps", "file": "0.png"}
    before = quiet_tree(studio), rows(studio)
    seen = []
    for method, path in [*routes(studio), *routes(studio, **there)]:
        if method == "GET" and path != "/events":
            seen.append(studio.client.get(path).status_code)
    assert seen.count(200) > 20
    assert (quiet_tree(studio), rows(studio)) == before


def rows(studio: Served) -> list[str]:
    """Read all that the database holds."""
    with contextlib.closing(sqlite3.connect(studio.settings.database)) as db:
        return list(db.iterdump())


def quiet_tree(studio: Served) -> dict[str, tuple[int, int, int]]:
    """Record all files, but for those that a database touches to read."""
    jobs = studio.client.get("/jobs?limit=200").json()["jobs"]
    deadline = time.monotonic() + 60
    while any(job["ended_at"] is None for job in jobs) and time.monotonic() < deadline:
        time.sleep(0.1)
        jobs = studio.client.get("/jobs?limit=200").json()["jobs"]
    found = tree(studio.settings.root)
    return {name: facts for name, facts in found.items() if "studio.db" not in name}


# --- Places ---


@pytest.fixture
def ground(tmp_path: Path) -> Settings:
    """Provide settings with a root, and folders that lie outside."""
    settings = Settings(tmp_path / "root", allowed_roots=(tmp_path / "allowed",))
    settings.prepare()
    (tmp_path / "outside").mkdir()
    (tmp_path / "allowed" / "in").mkdir(parents=True)
    (settings.models / "base").mkdir()
    (settings.models / "link").symlink_to(tmp_path / "outside")
    (settings.models / "loop").symlink_to(settings.models / "loop")
    return settings


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("base_model", "/etc"),
        ("base_model", "/etc/passwd"),
        ("base_model", "{root}/models/../token"),
        ("base_model", "link"),
        ("base_model", "loop"),
        ("base_model", "../outside"),
        ("base_model", "../.."),
        ("base_model", "~/models"),
        ("base_model", "owner/name/more"),
        ("base_model", "-owner/name"),
        ("base_model", "owner/name\nx"),
        ("base_model", "https://evil.example/x"),
        ("vae", "../../x"),
        ("vae", "//host/share"),
        ("vae", "\\\\host\\share"),
        ("vae", "a\0b"),
        ("vae", "x" * 5_000),
        ("model_config_path", "file:///etc"),
        ("regularization_path", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("dataset_path", "{root}"),
        ("cache_dir", "/tmp/x"),
        ("loras_path", "{root}/models"),
        ("output_path", "/tmp/x"),
        ("output_path", "{root}/jobs/x"),
        ("a_knob_of_tomorrow", "/etc"),
    ],
)
def test_a_knob_names_no_other_place(ground: Settings, knob: str, value: str) -> None:
    """S16: whatever a config names lies where it may, or is a model's id."""
    with pytest.raises(Problem) as caught:
        security.confine(ground, knob, value.format(root=ground.root))
    (problem,) = caught.value.problems
    assert (caught.value.status, problem["path"]) == (422, knob)
    assert problem["hint"]


def test_allowed_places_come_back_as_they_really_are(ground: Settings, tmp_path: Path) -> None:
    """A name of a model, a path of an allowed folder and an id are taken."""
    assert security.confine(ground, "base_model", "base") == str(ground.models / "base")
    inside = str(tmp_path / "allowed" / "in")
    assert security.confine(ground, "vae", inside) == inside
    assert security.confine(ground, "base_model", "owner/a.model-1") == "owner/a.model-1"
    new = str(tmp_path / "allowed" / "cache" / "new")
    assert security.confine(ground, "cache_dir", new) == new


def test_nested_knobs_are_no_way_around(ground: Settings) -> None:
    """S16: training_params may hold the same knobs, and all wrong ones are told at once."""
    config = {"base_model": "/etc", "training_params": {"vae": "/root", "cache_dir": "/tmp"}}
    with pytest.raises(Problem) as caught:
        security.confine_config(ground, config)
    paths = {problem["path"] for problem in caught.value.problems}
    assert paths == {"base_model", "vae", "cache_dir"}


def test_every_knob_that_names_a_place_has_a_rule() -> None:
    """S17: a new knob of the trainer that names a path cannot be forgotten here."""
    for name, knob in security.knobs_of(ROOT).items():
        prose = knob.get("description", "")
        names_place = bool(re.search(r"path|dir$|folder|file$", name)) or knob.get("format")
        names_place = names_place or bool(re.search(r"^(Folder|File|Path)|local folder", prose))
        if names_place and "string" in forms.types_of(knob):
            assert name in KNOBS, name


def test_a_refused_place_starts_nothing(studio: Served) -> None:
    """S16: through the API, with the path and what to do."""
    before = count_jobs(studio)
    answer = studio.client.post("/train", json=wanted(base_model="/etc"))
    assert (answer.status_code, answer.json()["code"]) == (422, "path_refused")
    assert "--allow-root" in answer.json()["problems"][0]["hint"]
    assert count_jobs(studio) == before


# --- Files of a job ---


@pytest.fixture(scope="module")
def trained(studio: Served) -> str:
    """Provide a job with all kinds of things in its folder."""
    job = submitted(studio)
    output = studio.settings.job(job) / "output"
    wait_until((output / "lora_final.safetensors").exists, 60)
    (output / "passwd.txt").symlink_to("/etc/passwd")
    (output / "elsewhere").symlink_to("/etc")
    (output / "a.html").write_text("<script>alert(1)</script>", encoding="utf-8")
    (output / "a.svg").write_text("<svg onload='alert(1)'/>", encoding="utf-8")
    (output / "hard.txt").hardlink_to(output / "events.jsonl")
    os.mkfifo(output / "pipe.png")
    (output / "folder.png").mkdir()
    (output / ".hidden.txt").write_text("x", encoding="utf-8")
    (output / "state").mkdir(exist_ok=True)
    (output / "state" / "secret.json").write_text("{}", encoding="utf-8")
    return job


@pytest.mark.parametrize(
    "path",
    [
        "..%2f..%2f..%2ftoken",
        "%2e%2e/%2e%2e/token",
        "../../../token",
        "..%5c..%5ctoken",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "C:%5cWindows%5cwin.ini",
        "%5c%5chost%5cshare",
        "output/x%00.png",
        "output/%c0%ae%c0%ae/token",
        "output/events.jsonl.",
        "output/events.jsonl:evil",
        "output/events.jsonl%20",
        "output//events.jsonl",
        "output/%2e/events.jsonl",
        "output/CON.png",
        "output/" + "x" * 300 + ".png",
        "output/passwd.txt",
        "output/elsewhere/hosts.txt",
        "output/a.svg",
        "output/pipe.png",
        "output/folder.png",
        "output/.hidden.txt",
        "output/state/secret.json",
        "output",
        "",
    ],
)
def test_no_path_leads_out_of_a_job(studio: Served, trained: str, path: str) -> None:
    """S14, S15: dots, links, pipes, devices and names of other systems find nothing, at once."""
    answer = studio.client.get(f"/jobs/{trained}/files/{path}")
    assert answer.status_code in (404, 405, 422)
    assert "root:" not in answer.text
    assert studio.settings.token not in answer.text


def test_a_hard_link_is_a_file(studio: Served, trained: str) -> None:
    """S15: what is no link to look at is served."""
    answer = studio.client.get(f"/jobs/{trained}/files/output/hard.txt")
    assert answer.status_code == 200


def test_only_pictures_are_shown_in_place(studio: Served, trained: str) -> None:
    """HTML and text are saved rather than shown; pictures are pictures, whatever is in them."""
    page = studio.client.get(f"/jobs/{trained}/files/output/a.html")
    assert page.headers["content-disposition"].startswith("attachment")
    listed = studio.client.get(f"/jobs/{trained}/files").json()["files"]
    picture = next(each["path"] for each in listed if each["path"].endswith(".png"))
    shown = studio.client.get(f"/jobs/{trained}/files/{picture}")
    assert shown.headers["content-type"] == "image/png"
    assert "content-disposition" not in shown.headers


def test_lists_and_archives_hold_no_links_and_nothing_private(studio: Served, trained: str) -> None:
    """S15, S31: what is not served is not listed, nor packed."""
    import io
    import zipfile

    listed = [each["path"] for each in studio.client.get(f"/jobs/{trained}/files").json()["files"]]
    packed = zipfile.ZipFile(io.BytesIO(studio.client.get(f"/jobs/{trained}/archive").content))
    for name in [*listed, *packed.namelist()]:
        assert not name.startswith("/")
        assert ".." not in name.split("/")
        assert not re.search(r"passwd|elsewhere|pipe|folder\.png|hidden|state/|svg", name)
    assert packed.testzip() is None
    assert {name.partition("/")[0] for name in packed.namelist()} == {"imps"}


# --- Names ---

HOSTILE = "-rf; rm -rf ~ \"'`$(touch x)` && <img src=x onerror=alert(1)> {{7*7}}"


def test_a_name_is_never_part_of_a_command(studio: Served) -> None:
    """S27: whatever a job is called, its command line is the same."""
    job = submitted(studio, **wanted(), name=HOSTILE)
    folder = studio.settings.job(job)
    argv = json.loads((folder / "command.json").read_bytes())["argv"]
    trainer = str(studio.settings.repository / "train_lora.py")
    assert argv == [studio.settings.python, trainer, f"--config={folder / 'config.json'}"]
    assert studio.client.get(f"/status/{job}").json()["name"] == HOSTILE


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "\u202egnp.exe", "", " ", "x" * 101])
def test_a_name_is_one_line_of_text(studio: Served, name: str) -> None:
    """S21, S27: no control characters, nothing that turns the direction of writing."""
    answer = studio.client.post("/train", json={**wanted(), "name": name})
    assert (answer.status_code, answer.json()["problems"][0]["path"]) == (422, "name")


def test_children_know_no_secret_of_ours(studio: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """S26: neither the token nor what else the service's environment holds reaches a program."""
    monkeypatch.setenv("CANARY_OF_THE_SERVICE", "seen")
    monkeypatch.setenv("HF_TOKEN", "meant for them")
    known = local.environment()
    assert "CANARY_OF_THE_SERVICE" not in known
    assert known["HF_TOKEN"] == "meant for them"
    assert studio.settings.token not in "".join(known.values())


def test_versions_are_pinned() -> None:
    """S32: what is installed tomorrow is what was tried today."""
    lines = (ROOT / "studio" / "requirements.txt").read_text("ascii").splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    assert packages
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in packages)


def test_the_log_holds_no_secret(studio: Served, caplog: pytest.LogCaptureFixture) -> None:
    """S26: logging in leaves a line, and no token in it."""
    with caplog.at_level("DEBUG"):
        address = security.invitation(studio.app)
        httpx.get(f"{studio.settings.url}{address}")
        data, headers = {"token": studio.settings.token}, {"Origin": own(studio)}
        httpx.post(f"{studio.settings.url}/login", data=data, headers=headers)
    ours = [r.getMessage() for r in caplog.records if r.name.startswith(("studio", "uvicorn"))]
    assert "a browser logged in" in ours
    assert not [line for line in ours if studio.settings.token in line or address in line]


def test_nothing_hostile_hangs_the_service(studio: Served) -> None:
    """After all of this, and beside connections that say nothing, it still answers at once."""
    idle = [studio.connect() for _ in range(50)]
    done = threading.Event()

    def ask() -> None:
        assert studio.client.get("/healthz").status_code == 200
        done.set()

    threading.Thread(target=ask, daemon=True).start()
    assert done.wait(20), "/healthz was not answered"
    for connection in idle:
        connection.close()


def test_the_example_model_is_where_these_tests_look() -> None:
    """The tests above would pass for the wrong reason if this were not so."""
    assert (MODEL / "model_index.json").is_file()
