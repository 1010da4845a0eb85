"""REST as programs meet it: every route, every way to go wrong, and a job from first to last."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
from acting import PROBLEM_SCHEMA, acting, is_in, status_when, submitted, wanted
from conftest import ROOT
from studio_ground import wait_until

from studio import files, jobs, metrics, preflight
from studio.problems import Problem
from studio.store import Job

if TYPE_CHECKING:
    from pathlib import Path

    import httpx
    from serving import Served

Record = dict[str, Any]

# What README.md promises; a route of a program's that is not here is not documented.
PROMISED = {
    ("POST", "/train"),
    ("POST", "/caption"),
    ("POST", "/prepare"),
    ("POST", "/generate"),
    ("POST", "/evaluate"),
    ("POST", "/validate"),
    ("GET", "/status/{job_id}"),
    ("GET", "/jobs"),
    ("PATCH", "/jobs/{job_id}"),
    ("DELETE", "/jobs/{job_id}"),
    ("POST", "/jobs/{job_id}/stop"),
    ("POST", "/jobs/{job_id}/resume"),
    ("POST", "/jobs/{job_id}/request"),
    ("GET", "/jobs/{job_id}/config"),
    ("GET", "/jobs/{job_id}/files"),
    ("GET", "/jobs/{job_id}/files/{path}"),
    ("GET", "/jobs/{job_id}/archive"),
    ("GET", "/jobs/{job_id}/log"),
    ("GET", "/jobs/{job_id}/metrics"),
    ("GET", "/jobs/{job_id}/events"),
    ("GET", "/events"),
    ("GET", "/schema"),
    ("GET", "/devices"),
    ("GET", "/metrics"),
    ("GET", "/healthz"),
}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Provide a studio that the tests of this file share."""
    with acting(tmp_path_factory.mktemp("api"), slots="cpu:3") as served:
        yield served


@pytest.fixture(scope="module")
def done(studio: Served) -> str:
    """Provide a training that is complete."""
    job = submitted(studio, **wanted(sample_prompts=["zkb"]), name="My imp")
    status_when(studio, job, is_in("completed"))
    return job


@pytest.fixture(scope="module")
def running(studio: Served) -> str:
    """Provide a training that goes on for as long as the tests do."""
    job = submitted(studio, **wanted(steps=100_000))
    status_when(studio, job, lambda told: bool(told["step"]))
    return job


@pytest.fixture(scope="module")
def empty(studio: Served) -> str:
    """Provide a training that was cancelled before it had made anything."""
    held = studio.app.state.store
    folder = studio.settings.job("01" + "0" * 24)
    (folder / "output").mkdir(parents=True)
    job: Job = held.insert(Job(folder.name, "train", "Nothing", {"base_model": "x"}))
    held.transition(job.id, "cancelled")
    return job.id


@pytest.fixture(scope="module")
def known(done: str, running: str, empty: str) -> dict[str, str]:
    """Provide the jobs above by name."""
    return {"done": done, "running": running, "empty": empty}


# --- What is promised ---


def test_the_description_lists_what_there_is(studio: Served) -> None:
    """A2: /openapi.json names every route for programs, and no other; pages are not among them."""
    document = studio.client.get("/openapi.json").json()
    found = {(method.upper(), path) for path, each in document["paths"].items() for method in each}
    assert found >= PROMISED
    assert not {path for _, path in found - PROMISED if not path.startswith("/datasets")}


def test_the_description_says_how_each_can_fail(studio: Served) -> None:
    """A2: every route has a sentence, and problems in one shape."""
    paths = studio.client.get("/openapi.json").json()["paths"]
    for method, path in PROMISED:
        told = paths[path][method.lower()]
        assert told["description"]
        assert "application/problem+json" in told["responses"]["default"]["content"]


def test_the_documentation_comes_from_here_alone(studio: Served) -> None:
    """The framework's pages would load scripts from another host; they are not there."""
    for path in ("/docs", "/redoc"):
        assert studio.client.get(path).status_code == 404


# --- Going wrong ---

NEVER = "01" + "Z" * 24


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/train", {}, 422, "request_invalid"),
        ("POST", "/train", [], 422, "request_invalid"),
        ("POST", "/train", {"config": {}, "unknown": 1}, 422, "request_invalid"),
        ("POST", "/train", {"config": {}, "priority": "high"}, 422, "request_invalid"),
        ("POST", "/train", {"config": {}, "priority": 101}, 422, "request_invalid"),
        ("POST", "/train", {"config": {}, "priority": True}, 422, "request_invalid"),
        ("POST", "/train", {"config": {}}, 422, "config_invalid"),
        ("POST", "/train", {"config": {}, "dataset": "nobody"}, 404, "dataset_unknown"),
        ("POST", "/train", {"config": {}, "dataset": "../x"}, 422, "name_invalid"),
        ("POST", "/train", {"config": {"vae": "/etc"}}, 422, "path_refused"),
        ("POST", "/train", {"config": {"dataset_path": "/etc"}}, 422, "path_refused"),
        ("POST", "/caption", {"dataset": "imps"}, 422, "request_invalid"),
        ("POST", "/caption", {"dataset": "imps", "captioner": "x"}, 422, "request_invalid"),
        ("POST", "/caption", {"dataset": "no", "captioner": "blip"}, 404, "dataset_unknown"),
        (
            "POST",
            "/caption",
            {"dataset": "imps", "captioner": "blip", "model": "/etc"},
            422,
            "path_refused",
        ),
        ("POST", "/prepare", {"dataset": "no"}, 404, "dataset_unknown"),
        ("POST", "/generate", {"job_id": NEVER, "prompts": ["x"]}, 404, "job_unknown"),
        ("POST", "/generate", {"job_id": "{done}", "prompts": []}, 422, "request_invalid"),
        ("POST", "/generate", {"job_id": "{empty}", "prompts": ["x"]}, 409, "no_checkpoint"),
        (
            "POST",
            "/generate",
            {"job_id": "{done}", "prompts": ["x"], "checkpoints": ["../x"]},
            422,
            "request_invalid",
        ),
        (
            "POST",
            "/generate",
            {"job_id": "{done}", "prompts": ["x"] * 100, "seeds": list(range(100))},
            422,
            "request_invalid",
        ),
        ("POST", "/evaluate", {"job_id": NEVER, "prompts": ["x"]}, 404, "job_unknown"),
        ("POST", "/evaluate", {"job_id": "{empty}", "prompts": ["x"]}, 409, "no_checkpoint"),
        (
            "POST",
            "/evaluate",
            {"job_id": "{done}", "prompts": ["x"], "clip": "../../x"},
            422,
            "path_refused",
        ),
        ("POST", "/validate", {"config": 1}, 422, "request_invalid"),
        ("POST", "/validate", {"config": {}, "dataset": "no"}, 404, "dataset_unknown"),
        ("GET", f"/status/{NEVER}", None, 404, "job_unknown"),
        ("GET", "/jobs?limit=0", None, 422, "request_invalid"),
        ("GET", "/jobs?state=lost", None, 422, "request_invalid"),
        ("PATCH", f"/jobs/{NEVER}", {"name": "x"}, 404, "job_unknown"),
        ("PATCH", "/jobs/{done}", {"name": ""}, 422, "request_invalid"),
        ("PATCH", "/jobs/{done}", {"state": "queued"}, 422, "request_invalid"),
        ("DELETE", f"/jobs/{NEVER}", None, 404, "job_unknown"),
        ("DELETE", "/jobs/{running}", None, 409, "not_final"),
        ("DELETE", "/jobs/{done}?files=burn", None, 422, "request_invalid"),
        ("POST", f"/jobs/{NEVER}/stop", None, 404, "job_unknown"),
        ("POST", "/jobs/{done}/stop", None, 409, "already_final"),
        ("POST", "/jobs/{running}/stop", {"attempt": 7}, 409, "attempt_superseded"),
        ("POST", "/jobs/{running}/stop", {"attempt": 0}, 422, "request_invalid"),
        ("POST", f"/jobs/{NEVER}/resume", None, 404, "job_unknown"),
        ("POST", "/jobs/{done}/resume", None, 409, "not_resumable"),
        ("POST", "/jobs/{running}/resume", None, 409, "not_resumable"),
        ("POST", "/jobs/{running}/resume", {"set": {"steps": 9}}, 409, "not_resumable"),
        ("POST", "/jobs/{done}/resume", {"set": {"steps": "x"}}, 422, "config_invalid"),
        ("POST", "/jobs/{done}/resume", {"set": {"seed": 1}}, 422, "config_invalid"),
        ("POST", "/jobs/{done}/request", {"preview": True}, 409, "not_running"),
        ("POST", "/jobs/{running}/request", {"dance": True}, 422, "request_invalid"),
        ("GET", f"/jobs/{NEVER}/config", None, 404, "job_unknown"),
        ("GET", f"/jobs/{NEVER}/files", None, 404, "job_unknown"),
        ("GET", "/jobs/{done}/files/output/none.png", None, 404, "file_unknown"),
        ("GET", "/jobs/{done}/files/output/events.jsonl?thumb=64", None, 404, "file_unknown"),
        ("GET", "/jobs/{done}/files/output/x.png?thumb=9999", None, 422, "request_invalid"),
        ("GET", f"/jobs/{NEVER}/archive", None, 404, "job_unknown"),
        ("GET", f"/jobs/{NEVER}/log", None, 404, "job_unknown"),
        ("GET", "/jobs/{done}/log?after=-1", None, 422, "request_invalid"),
        ("GET", "/jobs/{done}/metrics?points=1", None, 422, "request_invalid"),
        ("GET", f"/jobs/{NEVER}/metrics", None, 404, "job_unknown"),
        ("GET", f"/jobs/{NEVER}/events", None, 404, "job_unknown"),
        ("GET", "/jobs/{done}/events?after=1.7", None, 400, "position_unknown"),
        ("GET", f"/events?job={NEVER}", None, 404, "job_unknown"),
        ("GET", "/events?job={done}&after=x", None, 400, "position_unknown"),
        ("GET", "/nowhere", None, 404, "not_found"),
        ("PUT", "/train", None, 405, "method_not_allowed"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, (dict, list)) else str(value),
)
def test_whatever_goes_wrong_is_told_in_one_shape(  # noqa: PLR0917, the table has five columns
    studio: Served, known: dict[str, str], method: str, path: str, body: Any, status: int, code: str
) -> None:
    """A1: the status, a stable code, a sentence, and the problems one by one."""
    asked = json.dumps([path, body])
    for name, job in known.items():
        asked = asked.replace(f"{{{name}}}", job)
    path, body = json.loads(asked)
    answer = studio.client.request(method, path, json=body)
    told = answer.json()
    assert (answer.status_code, told["code"]) == (status, code), told
    assert answer.headers["content-type"] == "application/problem+json"
    jsonschema.validate(told, PROBLEM_SCHEMA)
    assert (told["status"], told["instance"]) == (status, path.partition("?")[0])


def test_a_person_gets_a_page_of_what_went_wrong(studio: Served) -> None:
    """Who asks for HTML gets HTML, with the same status."""
    answer = studio.client.get(f"/status/{NEVER}", headers={"Accept": "text/html"})
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("text/html")


def test_a_trainer_that_cannot_be_run_is_told_so(tmp_path: Path) -> None:
    """A1: 503 with the reason, and no job that could never begin."""
    with acting(tmp_path, python=str(tmp_path / "no-python")) as studio:
        answer = studio.client.post("/train", json=wanted())
        assert (answer.status_code, answer.json()["code"]) == (503, "trainer_failed")
        assert "no-python" in answer.json()["detail"]
        assert studio.client.get("/jobs").json()["jobs"] == []


def test_a_trainer_that_says_nothing_is_told_with_its_last_words(tmp_path: Path) -> None:
    """A1: what stood on stderr is the best hint there is."""
    with acting(tmp_path) as studio:
        program = studio.settings.repository / "train_lora.py"
        program.write_text("raise SystemExit('no such module: \\x1b[31mjsonschema')", "utf-8")
        answer = studio.client.post("/validate", json={"config": {}})
        assert (answer.status_code, answer.json()["code"]) == (503, "trainer_failed")
        assert "no such module: jsonschema" in answer.json()["detail"]


def test_configs_are_checked_a_few_at_a_time(
    studio: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A1: who sends hundreds is told to wait, rather than served with hundreds of processes."""
    monkeypatch.setattr(preflight, "WAITING_SECONDS", 0.01)
    with preflight.AT_WORK, preflight.AT_WORK:
        answer = studio.client.post("/validate", json={"config": {}})
    assert (answer.status_code, answer.json()["code"]) == (503, "busy")
    assert answer.headers["retry-after"]


def test_a_check_under_way_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """P12: who waits for the trainer's answer is told so, and the service ends at once."""
    with acting(tmp_path) as studio, ThreadPoolExecutor(1) as pool:
        program = studio.settings.repository / "train_lora.py"
        program.write_text("import subprocess; subprocess.run(['sleep', '300'])", "utf-8")
        waiting = pool.submit(studio.client.post, "/validate", json={"config": {}})
        wait_until(lambda: bool(preflight.CHILDREN))
        studio.app.state.server.should_exit = True
        begun = time.monotonic()
        assert waiting.result(60).status_code == 503
        assert time.monotonic() - begun < 30


def test_nothing_new_is_begun_when_the_service_ends(tmp_path: Path) -> None:
    """A1: 503, so that a program tries again later."""
    with acting(tmp_path) as studio:
        studio.app.state.hub.closing = True
        answer = studio.client.post("/train", json=wanted())
        assert (answer.status_code, answer.json()["code"]) == (503, "shutting_down")


def test_health_is_what_it_says(studio: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """503 when nobody looks after the jobs, or nothing can be written down."""
    state = studio.app.state
    assert studio.client.get("/healthz").json() == {"status": "ok"}
    with monkeypatch.context() as patched:
        patched.setattr(state.reconciler, "stalled", lambda: True)
        assert studio.client.get("/healthz").status_code == 503

    def fail() -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(state.store, "check_writable", fail)
    answer = studio.client.get("/healthz")
    assert (answer.status_code, answer.json()["code"]) == (503, "unhealthy")


# --- Idempotency ---


def test_a_request_that_is_sent_again_is_one_job(studio: Served) -> None:
    """A3: 202 and then 200, with the same id."""
    headers = {"Idempotency-Key": "once"}
    first = studio.client.post("/train", json=wanted(), headers=headers)
    again = studio.client.post("/train", json=wanted(), headers=headers)
    assert (first.status_code, again.status_code) == (202, 200)
    assert first.json()["job_id"] == again.json()["job_id"]


def test_fifty_at_once_are_one_job(studio: Served) -> None:
    """S28: however they race."""
    headers = {"Idempotency-Key": "fifty"}

    def send(_: int) -> httpx.Response:
        return studio.client.post("/train", json=wanted(steps=4), headers=headers)

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(send, range(50)))
    assert {answer.json()["job_id"] for answer in answers} != set()
    assert len({answer.json()["job_id"] for answer in answers}) == 1
    assert sorted(answer.status_code for answer in answers) == [200] * 49 + [202]


@pytest.mark.parametrize("changed", ["body", "route"])
def test_a_key_belongs_to_one_request(studio: Served, changed: str) -> None:
    """A3: the same key with something else is a mistake, and told as one."""
    headers = {"Idempotency-Key": f"mine-{changed}"}
    body: Record = {"dataset": "imps", "resolution": 256}
    assert studio.client.post("/prepare", json=body, headers=headers).status_code == 202
    path, other = "/prepare", {**body, "resolution": 512}
    if changed == "route":
        path, other = "/train", wanted()
    answer = studio.client.post(path, json=other, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_key_reused")


def test_what_was_refused_may_be_sent_again_with_its_key(studio: Served) -> None:
    """A key is used up by a job, not by a problem."""
    headers = {"Idempotency-Key": "second-try"}
    assert (
        studio.client.post("/train", json=wanted(lora_rank=0), headers=headers).status_code == 422
    )
    assert studio.client.post("/train", json=wanted(), headers=headers).status_code == 202


# --- A job's life ---


def test_a_training_from_beginning_to_end(studio: Served) -> None:
    """Accepted, queued, running with numbers, complete with what came of it."""
    answer = studio.client.post(
        "/train", json={**wanted(steps=150), "name": "A cat", "priority": 3}
    )
    told = answer.json()
    assert answer.headers["location"] == told["status"] == f"/status/{told['job_id']}"
    assert (told["state"], told["page"]) == ("queued", f"/runs/{told['job_id']}")
    running = status_when(studio, told["job_id"], lambda status: bool(status["loss"]))
    assert running["slot"].startswith("cpu:")
    assert (running["name"], running["priority"], running["attempt"]) == ("A cat", 3, 1)
    assert 0 <= running["percent"] < 100
    done = status_when(studio, told["job_id"], is_in("completed"))
    assert (done["step"], done["total_steps"], done["percent"]) == (150, 150, 100)
    assert done["final"]["path"] == "output/lora_final.safetensors"
    assert set(done["final"]) >= {"bytes", "sha256", "total_time", "final_loss", "best_checkpoint"}
    assert done["created_at"] <= done["started_at"] <= done["ended_at"]
    file = studio.client.get(f"{done['links']['files']}/{done['final']['path']}")
    assert len(file.content) == done["final"]["bytes"]


def test_a_training_is_stopped_and_goes_on(studio: Served) -> None:
    """Stopping twice is stopping once; what it continues from is told; then it is complete."""
    job = submitted(studio, **wanted(steps=150))
    status_when(studio, job, lambda told: (told["step"] or 0) > 5)
    first = studio.client.post(f"/jobs/{job}/stop", json={"attempt": 1})
    assert (first.status_code, first.json()["desired"]) == (202, "stop")
    again = studio.client.post(f"/jobs/{job}/stop")
    assert again.status_code in (202, 409)
    stopped = status_when(studio, job, is_in("stopped"))
    assert stopped["continues_from"].startswith("output/")
    assert studio.client.post(f"/jobs/{job}/resume").status_code == 202
    done = status_when(studio, job, is_in("completed"))
    assert (done["attempt"], done["step"]) == (2, 150)
    sessions = studio.client.get(f"/jobs/{job}/metrics").json()["sessions"]
    assert [session["to"] for session in sessions][-1] == 150
    assert sessions[1]["from"] == sessions[0]["kept_to"]


def test_a_training_that_fails_says_how(tmp_path: Path) -> None:
    """The trainer's own code, sentence and hint."""
    with acting(tmp_path, switches={"error-at": 3}) as studio:
        told = status_when(studio, submitted(studio), is_in("failed"))
    assert told["error"]["code"] == "out_of_memory"
    assert told["error"]["message"]
    assert told["final"] is None


def test_a_job_is_called_otherwise_and_moved_up(studio: Served, done: str) -> None:
    """Only what is given changes."""
    told = studio.client.patch(f"/jobs/{done}", json={"priority": 5}).json()
    assert (told["name"], told["priority"]) == ("My imp", 5)
    told = studio.client.patch(f"/jobs/{done}", json={"name": "Your imp"}).json()
    assert (told["name"], told["priority"]) == ("Your imp", 5)
    studio.client.patch(f"/jobs/{done}", json={"name": "My imp"})


@pytest.mark.parametrize("files", ["trash", "keep"])
def test_a_deleted_job_is_gone_and_its_files_are_not(studio: Served, files: str) -> None:
    """They lie in the trash, or where they were."""
    job = submitted(studio, "/prepare", dataset="imps")
    status_when(studio, job, is_in("completed"))
    assert studio.client.delete(f"/jobs/{job}?files={files}").status_code == 204
    assert studio.client.get(f"/status/{job}").status_code == 404
    kept = studio.settings.job(job).exists()
    trashed = [path for path in studio.settings.trash.iterdir() if job in path.name]
    assert (kept, len(trashed)) == ((False, 1) if files == "trash" else (True, 0))


def test_jobs_are_listed_page_by_page(studio: Served, done: str, running: str) -> None:
    """The newest first, each once, by state and kind where asked."""
    seen: list[str] = []
    before = ""
    for _ in range(200):
        page = studio.client.get(f"/jobs?limit=2{before}").json()
        seen += [job["job_id"] for job in page["jobs"]]
        if page["next"] is None:
            break
        before = f"&before={page['next']}"
    assert page["next"] is None
    assert seen == sorted(set(seen), reverse=True)
    assert {done, running} <= set(seen)
    found = studio.client.get("/jobs?state=running&kind=train").json()["jobs"]
    assert running in [job["job_id"] for job in found]
    assert {job["state"] for job in found} == {"running"}


def test_a_status_that_did_not_change_is_not_sent_again(studio: Served, done: str) -> None:
    """Who asks often asks with the tag of the last answer."""
    first = studio.client.get(f"/status/{done}")
    headers = {"If-None-Match": first.headers["etag"]}
    assert studio.client.get(f"/status/{done}", headers=headers).status_code == 304


def test_a_config_is_checked_without_a_job(studio: Served) -> None:
    """What the trainer found comes back whole: images, device, memory, warnings, problems."""
    before = len(studio.client.get("/jobs?limit=200").json()["jobs"])
    told = studio.client.post("/validate", json=wanted(learning_rate=1e-6)).json()
    assert told["valid"]
    assert told["report"]["images"] == 3
    assert told["memory"]["planned_bytes"] > 0
    assert [warning["code"] for warning in told["warnings"]] == ["learning_rate_low"]
    told = studio.client.post("/validate", json=wanted(resolution=500, vae="/etc")).json()
    assert (told["valid"], told["code"]) == (False, "path_refused")
    told = studio.client.post("/validate", json=wanted(resolution=500)).json()
    assert [problem["path"] for problem in told["problems"]] == ["resolution"]
    assert len(studio.client.get("/jobs?limit=200").json()["jobs"]) == before


def test_a_folder_of_pictures_outside_is_trained_on_in_place(studio: Served) -> None:
    """Where --allow-root allows it, nothing is copied."""
    body = wanted(dataset_path=str(ROOT / "examples" / "images"))
    del body["dataset"]
    job = submitted(studio, **body)
    config = studio.client.get(f"/jobs/{job}/config").json()
    assert config["dataset_path"] == str(ROOT / "examples" / "images")
    assert not (studio.settings.job(job) / "dataset").exists()
    body["dataset"] = "imps"
    answer = studio.client.post("/train", json=body)
    assert answer.json()["problems"][0]["path"] == "dataset_path"


# --- Files ---


def test_a_part_of_a_file_is_served(studio: Served, done: str) -> None:
    """A9: the bytes that are asked for, with what a download manager needs."""
    url = f"/jobs/{done}/files/output/lora_final.safetensors"
    whole = studio.client.get(url)
    size = len(whole.content)
    assert whole.headers["accept-ranges"] == "bytes"
    for asked, begin, end in (
        ("bytes=0-3", 0, 4),
        ("bytes=5-", 5, size),
        ("bytes=-7", size - 7, size),
        (f"bytes=2-{10**9}", 2, size),
    ):
        part = studio.client.get(url, headers={"Range": asked})
        assert (part.status_code, part.content) == (206, whole.content[begin:end])
        assert part.headers["content-range"] == f"bytes {begin}-{end - 1}/{size}"
    for odd in ("bytes=0-1,3-4", "bytes=x", "items=0-1", "bytes=-"):
        assert studio.client.get(url, headers={"Range": odd}).status_code == 200
    for beyond in (f"bytes={size}-", "bytes=5-2"):
        answer = studio.client.get(url, headers={"Range": beyond})
        assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{size}")


def test_a_file_that_is_known_is_not_sent_again(studio: Served, done: str) -> None:
    """A9: neither whole nor in part; a part of another content is not mixed in."""
    url = f"/jobs/{done}/files/output/lora_final.safetensors"
    tag = studio.client.get(url).headers["etag"]
    known = studio.client.get(url, headers={"If-None-Match": f'"x", {tag}'})
    assert (known.status_code, known.content) == (304, b"")
    part = studio.client.get(url, headers={"Range": "bytes=0-3", "If-Range": tag})
    assert part.status_code == 206
    other = studio.client.get(url, headers={"Range": "bytes=0-3", "If-Range": '"old"'})
    assert other.status_code == 200


def test_a_lora_is_saved_under_the_name_of_its_job(studio: Served, done: str) -> None:
    """In a folder of downloads, lora_final says nothing."""
    for path, name in (
        ("output/lora_final.safetensors", "My imp.safetensors"),
        ("output/checkpoints/lora_step_4.safetensors", "My imp_step_4.safetensors"),
        ("output/events.jsonl", "events.jsonl"),
    ):
        said = studio.client.get(f"/jobs/{done}/files/{path}").headers["content-disposition"]
        coded = name.replace(" ", "%20")
        assert said == f"attachment; filename=\"{name}\"; filename*=UTF-8''{coded}"


def test_a_name_of_any_letters_is_told_in_both_ways() -> None:
    """Programs that know no coded names get one of plain letters, and it ends where it should."""
    said = files.attachment('猫"%\r\n.zip')
    plain, _, coded = said.partition("; filename*=UTF-8''")
    assert (plain, coded) == ('attachment; filename="_____.zip"', "%E7%8C%AB%22%25%0D%0A.zip")
    assert said.isascii()
    assert said.isprintable()


def test_the_readme_names_every_route() -> None:
    """A2: what a program may ask is written down for people too."""
    text = (ROOT / "studio" / "README.md").read_text("utf-8")
    assert not [path for _, path in PROMISED if f"`{path}`" not in text]


def test_previews_come_small_where_asked(studio: Served, done: str) -> None:
    """A page shows hundreds of them."""
    listed = studio.client.get(f"/jobs/{done}/files").json()["files"]
    path = next(each["path"] for each in listed if each["path"].endswith(".png"))
    small = studio.client.get(f"/jobs/{done}/files/{path}?thumb=32")
    assert small.headers["content-type"] == "image/webp"
    assert small.content[8:12] == b"WEBP"
    headers = {"If-None-Match": small.headers["etag"]}
    again = studio.client.get(f"/jobs/{done}/files/{path}?thumb=32", headers=headers)
    assert again.status_code == 304


def test_a_file_that_is_replaced_meanwhile_is_sent_as_it_was(studio: Served, done: str) -> None:
    """S31: what was opened is what is sent, to its last byte."""
    path = studio.settings.job(done) / "output" / "large.txt"
    path.write_bytes(b"a" * 30_000_000)
    with studio.client.stream("GET", f"/jobs/{done}/files/output/large.txt") as answer:
        pieces = answer.iter_bytes(1_000_000)
        first = next(pieces)
        other = path.with_suffix(".part")
        other.write_bytes(b"b" * 10)
        other.replace(path)
        content = first + b"".join(pieces)
    path.unlink()
    assert content == b"a" * 30_000_000


def test_the_log_is_read_on_where_it_was_left(studio: Served, done: str) -> None:
    """The end first, then what is new; as text without escapes."""
    path = studio.settings.job(done) / "attempts" / "1" / "stderr.log"
    path.write_bytes(b"x" * 100_000 + b"\n\x1b[31mred\x1b[0m\nlast\n")
    told = studio.client.get(f"/jobs/{done}/log").json()
    assert told["attempt"] == 1
    assert told["text"].endswith("x\nred\nlast\n")
    assert len(told["text"]) < 70_000
    with path.open("ab") as file:
        file.write(b"new\xff\nhalf")
    told = studio.client.get(f"/jobs/{done}/log?after={told['next']}").json()
    assert told["text"] == "new\ufffd\n"
    told = studio.client.get(f"/jobs/{done}/log?after={told['next']}").json()
    assert told["text"] == "half"


# --- The studio itself ---

SAMPLE = re.compile(r'[a-z_]+(\{[a-z_]+="(?:[^"\\]|\\.)*"(,[a-z_]+="(?:[^"\\]|\\.)*")*\})? \S+')


def test_prometheus_gets_what_it_reads(studio: Served, running: str) -> None:
    """Every line is a comment or a sample of a described metric; the run's numbers are there."""
    name = 'A "quoted" \\ name'
    studio.client.patch(f"/jobs/{running}", json={"name": name})
    answer = studio.client.get("/metrics")
    assert answer.headers["content-type"] == metrics.MEDIA_TYPE
    described: set[str] = set()
    values: dict[str, float] = {}
    for line in answer.text.splitlines():
        if line.startswith("# TYPE "):
            described.add(line.split()[2])
        elif not line.startswith("#"):
            assert SAMPLE.fullmatch(line), line
            assert re.split("[{ ]", line)[0] in described
            key, _, value = line.rpartition(" ")
            values[key] = float(value)
    assert values['lora_studio_jobs{kind="train",state="running"}'] >= 1
    assert values["lora_studio_slots"] == 3
    label = f'{{job="{running}",kind="train",name="A \\"quoted\\" \\\\ name"}}'
    for metric in ("job_step", "job_total_steps", "job_loss", "job_memory_bytes"):
        assert values[f"lora_studio_{metric}{label}"] > 0


def test_metrics_need_the_token(studio: Served) -> None:
    """Names of runs are nobody else's business."""
    studio_url = studio.settings.url
    import httpx

    assert httpx.get(f"{studio_url}/metrics").status_code == 401


def test_devices_and_schema_are_told(studio: Served, running: str) -> None:
    """Which slot does what, and what a config may hold, byte for byte."""
    told = studio.client.get("/devices").json()["slots"]
    assert [slot["id"] for slot in told] == ["cpu:0", "cpu:1", "cpu:2"]
    assert running in [slot["job"] for slot in told]
    schema = studio.client.get("/schema")
    assert schema.content == (ROOT / "config_schema.json").read_bytes()


def test_curves_are_summed_up(studio: Served, done: str) -> None:
    """As many points as asked for at most, of every curve there is."""
    told = studio.client.get(f"/jobs/{done}/metrics?points=4").json()
    assert 1 <= len(told["steps"]) <= 4
    assert {"loss", "learning_rate"} <= set(told["series"])
    for curve in told["series"].values():
        assert {len(column) for column in curve.values()} == {len(told["steps"])}


def test_results_of_drawing_are_told_with_the_job(studio: Served, done: str) -> None:
    """Which picture shows what, and how it was judged; half a file is none yet."""
    state = studio.app.state
    folder = studio.settings.job("02" + "0" * 24)
    (folder / "output").mkdir(parents=True)
    job = state.store.insert(Job(folder.name, "evaluate", "x", {}, parent=done))
    state.store.transition(job.id, "cancelled")
    grid = {
        "prompts": [{"id": "p00", "text": "zkb"}],
        "loras": [{"id": "base", "file": None}, {"id": "final", "file": "lora_final.safetensors"}],
        "images": [
            {"file": "images/f.png", "prompt": "p00", "lora": "final", "strength": 0.5, "seed": 3}
        ],
    }
    (folder / "output" / "grid.json").write_text(json.dumps(grid), "utf-8")
    (folder / "output" / "eval.json").write_text('{"half', "utf-8")
    told = studio.client.get(f"/status/{job.id}").json()["results"]
    image = {"checkpoint": "lora_final.safetensors", "prompt": "zkb", "seed": 3, "scale": 0.5}
    assert told == {"images": [{**image, "path": "output/images/f.png"}], "scores": None}


def test_paths_of_events_that_lie_elsewhere_are_not_linked(studio: Served, done: str) -> None:
    """S22: a program may say what it likes; only the job's own files have an address."""
    from studio.status import inside

    folder = studio.settings.job(done)
    assert inside(folder, str(folder / "output" / "x.png")) == "output/x.png"
    assert inside(folder, "/etc/passwd") == "passwd"
    assert inside(folder, "javascript:alert(1)") == "javascript:alert(1)"
    assert inside(folder, 7) is None
    assert studio.client.get(f"/jobs/{done}/files/passwd").status_code == 404


def test_a_form_of_a_page_is_no_way_around_the_checks(studio: Served) -> None:
    """What pages call is what routes call: the same refusals."""
    with pytest.raises(Problem) as caught:
        jobs.begin(studio.app.state, jobs.Training, {"config": {"base_model": "/etc"}})
    assert caught.value.code == "path_refused"


def test_answers_come_while_configs_are_checked(studio: Served) -> None:
    """A slow check holds up nobody else."""
    with ThreadPoolExecutor(4) as pool:
        checks = [pool.submit(studio.client.post, "/validate", json=wanted()) for _ in range(4)]
        begun = time.monotonic()
        assert studio.client.get("/jobs").status_code == 200
        assert time.monotonic() - begun < 10
        assert {check.result(60).status_code for check in checks} == {200}
