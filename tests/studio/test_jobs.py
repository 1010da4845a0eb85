"""What a request becomes: command lines that the programs take, folders, chains and webhooks."""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
from acting import MODEL, acting, is_in, status_when, submitted, wanted
from conftest import EVENT_VALIDATOR, ROOT
from studio_ground import first_line, join, wait_until

from studio import chain, jobs, webhook
from studio.problems import Problem
from studio.settings import Settings
from studio.store import Job

if TYPE_CHECKING:
    from serving import Served

Record = dict[str, Any]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Provide a studio that the tests of this file share."""
    with acting(tmp_path_factory.mktemp("jobs")) as served:
        yield served


@pytest.fixture(scope="module")
def trained(studio: Served) -> str:
    """Provide a training that is complete."""
    job = submitted(studio, **wanted(sample_prompts=["zkb"], vae=str(MODEL / "vae")), name="My imp")
    status_when(studio, job, is_in("completed"))
    return job


def argv_of(studio: Served, job: str) -> list[str]:
    """Read a job's command line, without the Python that runs it."""
    found = json.loads((studio.settings.job(job) / "command.json").read_bytes())["argv"]
    assert found[0] == studio.settings.python
    return [str(word) for word in found[1:]]


def understood(program: str, words: list[str]) -> Record:
    """Let a tool's own command line read its arguments."""
    module = importlib.import_module(f"tools.{program}")
    known: Record = vars(module.parser().parse_args(words))
    return known


# --- Training ---


def test_a_training_keeps_its_dataset_as_it_was(studio: Served) -> None:
    """A10: captions that change later change no run, and it still goes on."""
    job = submitted(studio, **wanted(steps=8))
    status_when(studio, job, is_in("completed"))
    kept = studio.settings.job(job) / "dataset" / "0.txt"
    before = kept.read_text("utf-8")
    path = "/datasets/imps/captions/0.png"
    tag = {"If-Match": studio.client.get(path).headers["etag"]}
    assert studio.client.put(path, json={"text": "zkb otherwise"}, headers=tag).status_code == 200
    assert kept.read_text("utf-8") == before
    picture = studio.settings.datasets / "imps" / "0.png"
    assert picture.samefile(kept.parent / "0.png")  # they take no room twice
    assert studio.client.post(f"/jobs/{job}/resume", json={"set": {"steps": 12}}).status_code == 202
    assert status_when(studio, job, is_in("completed"))["step"] == 12


def test_the_config_of_a_job_is_a_config_of_the_trainer(studio: Served, trained: str) -> None:
    """What was asked for, with places of the job's own and its name."""
    config = json.loads((studio.settings.job(trained) / "config.json").read_bytes())
    schema = json.loads((ROOT / "config_schema.json").read_bytes())
    jsonschema.validate(config, schema)
    folder = studio.settings.job(trained)
    assert config["dataset_path"] == str(folder / "dataset")
    assert config["output_path"] == str(folder / "output")
    assert config["lora_name"] == "My imp"
    assert studio.client.get(f"/jobs/{trained}/config").json() == config


@pytest.mark.parametrize(
    ("name", "fit"),
    [
        ("a/b:c", "a_b_c"),
        ("..x.. ", "x"),
        ("猫", "猫"),
        ("x" * 100, "x" * 100),
        ("a" * 99 + ".b", "a" * 99),
    ],
)
def test_a_lora_is_called_as_its_job(name: str, fit: str) -> None:
    """With what the schema allows of its name."""
    schema = json.loads((ROOT / "config_schema.json").read_bytes())
    pattern = schema["definitions"]["training_params"]["properties"]["lora_name"]
    found = jobs.named({}, name)["lora_name"]
    assert found == fit
    jsonschema.validate(found, pattern)


def test_a_name_that_was_chosen_stays() -> None:
    """Whoever names the LoRA in the config knows why; a name of dots alone is none."""
    assert jobs.named({"lora_name": "x"}, "y")["lora_name"] == "x"
    nested = {"training_params": {"lora_name": "x"}}
    assert jobs.named(nested, "y") == nested
    assert jobs.named({}, "...") == {}


def test_what_is_refused_leaves_nothing_behind(studio: Served) -> None:
    """No folder, no row, and the trainer's own words about every problem."""
    before = sorted(studio.settings.jobs.iterdir())
    answer = studio.client.post("/train", json=wanted(resolution=500, lora_rank=0, stps=3))
    assert (answer.status_code, answer.json()["code"]) == (422, "config_invalid")
    paths = {problem["path"] for problem in answer.json()["problems"]}
    assert {"resolution", "lora_rank", "stps"} <= paths
    assert sorted(studio.settings.jobs.iterdir()) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_as_one(tmp_path: Path, number: int) -> None:
    """A1: 507, and the half-made folder is gone."""

    def fill() -> None:
        with jobs.making(tmp_path / "job"):
            (tmp_path / "job" / "x").touch()
            raise OSError(number, os.strerror(number))

    with pytest.raises(Problem) as caught:
        fill()
    assert (caught.value.status, caught.value.code) == (507, "disk_full")
    assert not (tmp_path / "job").exists()


def test_a_job_that_was_only_half_made_is_put_away(settings: Settings) -> None:
    """After a kill in the middle of it, nothing is left where jobs are; nothing is deleted."""
    half, whole = settings.job("01" + "A" * 24), settings.job("01" + "B" * 24)
    for folder in (half / "dataset", whole, settings.jobs / "of the user's"):
        folder.mkdir(parents=True)
    (whole / "command.json").write_text("{}", encoding="utf-8")
    jobs.sweep(settings)
    assert sorted(path.name for path in settings.jobs.iterdir()) == [whole.name, "of the user's"]
    (kept,) = settings.trash.iterdir()
    assert kept.name.endswith(half.name)


def test_who_may_change_nothing_may_not_resume_with_it(studio: Served, trained: str) -> None:
    """Only knobs that leave a run the same run, and each wrong one is named."""
    answer = studio.client.post(
        f"/jobs/{trained}/resume", json={"set": {"lora_rank": 8, "nope": 1, "base_model": "x"}}
    )
    assert answer.status_code == 422
    assert [p["path"] for p in answer.json()["problems"]] == ["lora_rank", "nope", "base_model"]


def test_a_complete_training_goes_on_for_more_steps(studio: Served) -> None:
    """Also where the steps stood in training_params, which would win."""
    body = wanted()
    del body["config"]["steps"]
    body["config"]["training_params"] = {"steps": 8}
    job = submitted(studio, **body)
    assert status_when(studio, job, is_in("completed"))["total_steps"] == 8
    answer = studio.client.post(f"/jobs/{job}/resume", json={"set": {"steps": 16}})
    assert (answer.status_code, answer.json()["state"]) == (202, "queued")
    told = status_when(studio, job, is_in("completed"))
    assert (told["total_steps"], told["attempt"]) == (16, 2)


def test_a_training_under_way_is_asked_as_its_contract_has_it(studio: Served) -> None:
    """request.json appears whole in its output folder; one that is over is not asked."""
    job = submitted(studio, **wanted(steps=400))
    status_when(studio, job, is_in("running"))
    body = {"preview": True, "sample_prompts": ["zkb"]}
    assert studio.client.post(f"/jobs/{job}/request", json=body).status_code == 202
    path = studio.settings.job(job) / "output" / "request.json"
    assert json.loads(path.read_bytes()) == body
    studio.client.post(f"/jobs/{job}/stop")
    status_when(studio, job, is_in("stopped", "completed"))
    answer = studio.client.post(f"/jobs/{job}/request", json=body)
    assert (answer.status_code, answer.json()["code"]) == (409, "not_running")


# --- The tools' command lines ---


def test_captions_are_asked_for_as_the_tool_takes_it(studio: Served) -> None:
    """Every option arrives, also values that look like options."""
    body: Record = {"dataset": "imps", "captioner": "florence2", "prefix": "--zkb"}
    body |= {"task": "tags", "threshold": 0.5, "exclude": ["a", "b c"], "overwrite": True}
    job = submitted(studio, "/caption", **body)
    program, *words = argv_of(studio, job)
    studio.client.post(f"/jobs/{job}/stop")
    assert program == str(studio.settings.repository / "tools/prepare.py")
    told = understood("prepare", words)
    assert told["source"] == studio.settings.datasets / "imps"
    assert (told["captioner"], told["task"], told["trigger"]) == ("florence2", "tags", ["--zkb"])
    assert (told["threshold"], told["exclude"]) == (0.5, "a,b c")
    assert told["overwrite"]
    assert told["events"]
    status_when(studio, job, is_in("stopped", "cancelled", "failed", "completed"))


def test_a_check_is_asked_for_as_the_tool_takes_it(studio: Served) -> None:
    """It writes its report into the job's own folder, and needs no slot."""
    job = submitted(studio, "/prepare", dataset="imps", trigger_words=["zkb"], resolution=256)
    told = understood("prepare", argv_of(studio, job)[1:])
    assert told["report"] == studio.settings.job(job) / "output" / "report.json"
    assert (told["resolution"], told["trigger"]) == (256, ["zkb"])
    assert status_when(studio, job, is_in("completed"))["slot"] is None
    files = studio.client.get(f"/jobs/{job}/files").json()["files"]
    assert "output/report.json" in [each["path"] for each in files]


def test_pictures_are_asked_for_as_the_tool_takes_it(studio: Served, trained: str) -> None:
    """Prompts go through a file, so that none can be an option."""
    body: Record = {"job_id": trained, "prompts": ["zkb", "--out=/etc"], "seeds": [3, 1, 3]}
    body |= {"scales": [0.5, 1.0], "steps": 2, "checkpoints": ["lora_final.safetensors"]}
    job = submitted(studio, "/generate", **body)
    told = understood("generate", argv_of(studio, job)[1:])
    studio.client.post(f"/jobs/{job}/stop")
    folder, parent = studio.settings.job(job), studio.settings.job(trained)
    assert told["lora"] == [parent / "output" / "lora_final.safetensors"]
    assert told["prompts"] == [str(folder / "prompts.json")]
    assert json.loads((folder / "prompts.json").read_bytes()) == body["prompts"]
    assert (told["seeds"], told["strengths"], told["steps"]) == ([3, 1], [0.5, 1.0], 2)
    assert (told["resolution"], told["trigger"]) == (256, ["zkb"])
    assert (told["vae"], told["model_config"]) == (str(MODEL / "vae"), None)
    assert told["out"] == folder / "output"
    told_of = studio.client.get(f"/status/{job}").json()
    assert (told_of["parent"], told_of["kind"]) == (trained, "generate")


@pytest.mark.parametrize(("sides", "drawn"), [(768, 768), ([512, 768, 640], 768)])
def test_pictures_are_as_large_as_previews(studio: Served, sides: Any, drawn: int) -> None:
    """Which follow the largest of several sizes."""
    assert jobs.side_of(studio.settings, {"resolution": sides}) == drawn


def test_an_evaluation_draws_and_then_judges(studio: Served, trained: str) -> None:
    """Two programs in a row, the second with what the first has drawn."""
    job = submitted(studio, "/evaluate", job_id=trained, prompts=["zkb"], class_word="imp")
    program, commands = argv_of(studio, job)
    studio.client.post(f"/jobs/{job}/stop")
    assert program == chain.__file__
    drawing, judging = json.loads(commands)
    output = studio.settings.job(job) / "output"
    drawn = understood("generate", drawing[2:])
    assert drawn["out"] == output
    assert len(drawn["lora"]) == 4
    judged = understood("evaluate", judging[2:])
    assert (judged["folder"], judged["class_word"]) == ([output], "imp")
    assert judged["device"] == "cpu"
    assert judged["train"] == studio.settings.job(trained) / "dataset"


def test_a_dataset_is_not_trained_on_while_captions_are_written(tmp_path: Path) -> None:
    """A1: 409 for a training, and for other captions."""
    with acting(tmp_path, on_start="hold", slots="cpu:1") as studio:
        submitted(studio, **wanted(steps=2_000))  # takes the only slot
        submitted(studio, "/caption", dataset="imps", captioner="florence2")
        answer = studio.client.post("/train", json=wanted())
        assert (answer.status_code, answer.json()["code"]) == (409, "dataset_changing")
        body = {"dataset": "imps", "captioner": "template", "template": "{name}"}
        answer = studio.client.post("/caption", json=body)
        assert (answer.status_code, answer.json()["code"]) == (409, "in_use")


# --- Chains ---


def program(folder: Path, name: str, text: str) -> list[str]:
    """Write a small program, and return how it is called."""
    path = folder / f"{name}.py"
    head = "import json, signal, sys, time\ndef say(**r): print(json.dumps(r), flush=True)\n"
    path.write_text(head + text, encoding="utf-8")
    return [sys.executable, str(path)]


def complete(name: str) -> str:
    """Write the end of a program that does what it should."""
    told = {"seq": 1, "timestamp": "2026-01-01T00:00:00.000Z", "message": name, "files": [name]}
    return f"say(type='info', topic='x', data={{}}, message='m')\nsay(type='complete', **{told})\n"


def run_chain(*commands: list[str]) -> tuple[int, list[Record]]:
    """Run programs in a row; return the exit code and what was said."""
    words = [sys.executable, chain.__file__, json.dumps(commands)]
    done = subprocess.run(words, capture_output=True, check=False, timeout=60)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_programs_in_a_row_speak_as_one(tmp_path: Path) -> None:
    """One numbering, one last line; that the first is done is a fact on the way."""
    code, told = run_chain(
        program(tmp_path, "one", complete("one")), program(tmp_path, "two", complete("two"))
    )
    assert code == 0
    assert [line["seq"] for line in told] == [1, 2, 3, 4]
    assert [line["type"] for line in told] == ["info", "info", "info", "complete"]
    assert (told[1]["topic"], told[1]["data"]) == ("step", {"files": ["one"]})
    assert told[3]["files"] == ["two"]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("say(type='error', code='x', message='m')\nsys.exit(1)", 1),
        ("say(type='info', topic='x', message='m')\nsys.exit(7)", 7),
        ("import os; os.kill(os.getpid(), 9)", 137),
    ],
)
def test_the_first_that_fails_ends_a_chain(tmp_path: Path, text: str, code: int) -> None:
    """Its last line is the last, and its exit code the chain's."""
    found, told = run_chain(
        program(tmp_path, "one", text), program(tmp_path, "two", complete("two"))
    )
    assert found == code
    assert "complete" not in [line["type"] for line in told]


STOPPABLE = """
def end(number, frame):
    say(type='interrupted', step=0, reason=signal.Signals(number).name, path=None, message='m')
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, end)
say(type='info', topic='ready', data={}, message='m')
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_the_program_at_work(tmp_path: Path, number: signal.Signals) -> None:
    """It ends by itself, and none is begun after it."""
    text = STOPPABLE.replace("SIGTERM", number.name)
    commands = [program(tmp_path, "one", text), program(tmp_path, "two", complete("two"))]
    words = [sys.executable, chain.__file__, json.dumps(commands)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as running:
        assert "ready" in first_line(running)
        running.send_signal(number)
        last = json.loads(running.communicate(timeout=60)[0].splitlines()[-1])
    assert running.returncode == 128 + number
    assert (last["type"], last["reason"]) == ("interrupted", number.name)


def test_a_stop_between_two_programs_is_told_as_the_contract_has_it(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    """The last line is one that every host understands."""
    before = [signal.getsignal(number) for number in chain.STOPS]
    try:
        row = chain.Chain([["never begun"]])
        row.stop(signal.SIGTERM, None)
        assert row.run() == 143
    finally:
        for number, handler in zip(chain.STOPS, before, strict=True):
            signal.signal(number, handler)
    EVENT_VALIDATOR.validate(json.loads(capfdbinary.readouterr().out))


# --- Webhooks ---


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("http://127.0.0.1:9/x", True),
        ("http://localhost:9", True),
        ("http://[::1]:9/x?y=1", True),
        ("http://127.9.9.9/", True),
        ("https://hooks.example/x", True),
        ("https://hooks.example:443/x", True),
        ("http://port.example:8080/", True),
        ("http://port.example:8081/", False),
        ("http://hooks.example.evil.example/", False),
        ("http://evil.example/#@localhost/", False),
        ("http://localhost@evil.example/", False),
        ("http://user:secret@localhost/", False),
        ("http://localhost.evil.example/", False),
        ("http://0.0.0.0:9/", False),
        ("http://127.1/", False),
        ("http://2130706433/", False),
        ("http://0x7f000001/", False),
        ("http://169.254.169.254/latest/meta-data", False),
        ("http://[::ffff:10.0.0.1]/", False),
        ("ftp://localhost/", False),
        ("file:///etc/passwd", False),
        ("http://localhost:99999/", False),
        ("http://localhost/\r\nX: y", False),
        ("http://löcalhost/", False),
        ("localhost", False),
        ("", False),
    ],
)
def test_webhooks_go_where_they_were_allowed(url: str, allowed: bool) -> None:
    """To this machine, and hosts of --notify-host by name; nothing that only looks so."""
    settings = Settings(Path("/x"), notify_hosts=("Hooks.example", "port.example:8080"))
    assert webhook.is_allowed(settings, url) is allowed


def test_a_webhook_elsewhere_is_refused_with_its_reason(studio: Served) -> None:
    """Nothing is started where the wish cannot be kept."""
    body = {**wanted(), "notify_url": "https://evil.example/x"}
    answer = studio.client.post("/train", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "notify_url_refused")
    assert answer.json()["problems"][0]["path"] == "notify_url"


Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def listening(answer: Answer) -> Iterator[tuple[str, list[Record]]]:
    """Serve an address for webhooks, and keep what it is told."""
    heard: list[Record] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            heard.append(json.loads(self.rfile.read(length)))
            answer(self)

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002, as the base has it
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", heard
    finally:
        server.shutdown()
        join(thread)
        server.server_close()


def say(code: int, **headers: str) -> Answer:
    """Make an answer of a status."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def test_a_webhook_hears_of_every_state(studio: Served) -> None:
    """In order, with what the status says in brief."""
    with listening(say(204)) as (url, heard):
        job = submitted(studio, **wanted(), notify_url=url)
        status_when(studio, job, is_in("completed"))
        wait_until(lambda: bool(heard) and heard[-1]["state"] == "completed")
    assert {each["job_id"] for each in heard} == {job}
    assert [each["state"] for each in heard] == ["running", "completed"]
    assert heard[-1]["percent"] == 100


def test_a_webhook_follows_no_redirect(studio: Served) -> None:
    """Who is asked answers; nobody is asked instead."""
    with (
        listening(say(200)) as (other, heard_there),
        listening(say(307, Location=other)) as (url, heard),
    ):
        job = submitted(studio, **wanted(), notify_url=url)
        status_when(studio, job, is_in("completed"))
        wait_until(lambda: len(heard) == 2)
        assert heard_there == []


def test_a_webhook_is_tried_again_where_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times, and then no more."""
    monkeypatch.setattr(webhook, "PAUSES", (0.0, 0.01, 0.01))
    with listening(say(503)) as (url, heard):
        told_of(url)
        assert len(heard) == 3
    told_of(url)  # where nobody listens any more


def told_of(url: str) -> None:
    """Tell of a job."""
    job = Job("01", "train", "x", {}, notify_url=url)
    notifier = webhook.Notifier(Settings(Path("/x")), lambda job: {"job_id": job.id})
    notifier.tell(job)


def test_an_answer_drop_by_drop_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of an answer has its time, not each byte of it."""
    monkeypatch.setattr(webhook, "TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(webhook, "PAUSES", (0.0,))
    over = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        try:
            while not over.wait(0.1):
                handler.wfile.write(b"H")
        except OSError:
            return

    with listening(drip) as (url, heard):
        begun = time.monotonic()
        told_of(url)
        assert time.monotonic() - begun < 20
        over.set()
    assert len(heard) == 1


def test_webhooks_hold_up_nothing(studio: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job goes on and completes while who is told of it does not answer."""
    monkeypatch.setattr(webhook, "TIMEOUT_SECONDS", 5.0)
    over = threading.Event()

    def wait(_: BaseHTTPRequestHandler) -> None:
        over.wait(30)

    with listening(wait) as (url, _):
        job = submitted(studio, **wanted(), notify_url=url)
        assert status_when(studio, job, is_in("completed"))["state"] == "completed"
        over.set()
