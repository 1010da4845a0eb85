"""Another studio as an engine: two of them on this machine, and a wire between that can be cut."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from acting import acting, is_in, status_when, wanted, write_dataset
from serving import Served, picture
from studio_ground import CPUS, QUICK, rounds_until, wait_until, write_command

from studio import local, peer
from studio.engines import EnginesUnusable, further
from studio.peer import Peer, is_output, moved
from studio.reconcile import Reconciler
from studio.remote import Refused, Remote
from studio.store import Job, new_id

if TYPE_CHECKING:
    from studio.engine import Engine
    from studio.settings import Settings
    from studio.store import Store


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Provide the other studio."""
    with acting(tmp_path_factory.mktemp("there"), switches={"step-seconds": 0.05}) as served:
        yield served


@dataclasses.dataclass
class Here:
    """The studio on our side: what it knows, and who looks after its jobs."""

    settings: Settings
    store: Store
    reconciler: Reconciler

    def send(self, steps: int = 12, dataset: Path | None = None, **config: Any) -> Job:
        """Queue a training that is to be done by the other studio."""
        job_id = new_id()
        folder = self.settings.job(job_id)
        if dataset:
            shutil.copytree(dataset, folder / "dataset")
        else:
            write_dataset(folder / "dataset")
        places = {"dataset_path": str(folder / "dataset"), "output_path": str(folder / "output")}
        whole = {**wanted(steps=steps, **config)["config"], **places}
        (folder / "output").mkdir()
        (folder / "config.json").write_text(json.dumps(whole), encoding="utf-8")
        write_command(self.settings, job_id, "python", "train_lora.py", "--config=config.json")
        return self.store.insert(Job(job_id, "train", "Sent", whole, engine="peer:there"))

    def until(self, job: Job, *states: str) -> Job:
        """Make rounds until a job is in one of these states."""
        rounds_until(self.reconciler, lambda: self.store.job(job.id).state in states, 60)
        return self.store.job(job.id)

    def until_step(self, job: Job, step: int) -> None:
        """Make rounds until a job has come so far."""
        rounds_until(self.reconciler, lambda: (self.store.job(job.id).step or 0) >= step, 60)

    def lines(self, job: Job, n: int = 1) -> list[dict[str, Any]]:
        """Read what an attempt has said."""
        path = self.settings.job(job.id) / "attempts" / str(n) / "stdout.jsonl"
        return [json.loads(line) for line in path.read_bytes().splitlines()]


Make = Callable[[str, str], Here]


@pytest.fixture
def make_here(settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Provide a function that makes a studio with an engine at an address."""
    monkeypatch.setattr(peer, "AGAIN_SECONDS", 0.1)

    def make(url: str, token: str) -> Here:
        engines: dict[str, Engine] = {
            "local": local.Local(settings),
            "peer:there": Peer(settings, url, token),
        }
        return Here(settings, store, Reconciler(settings, store, engines, CPUS, QUICK))

    return make


@pytest.fixture
def here(make_here: Make, there: Served) -> Here:
    """Provide a studio that knows the other one."""
    return make_here(there.settings.url, there.settings.token)


def job_there(here: Here, job: Job) -> str:
    """Tell which job of the other studio a job is."""
    return str(local.read_json(here.settings.job(job.id) / "peer.json")["job_id"])


def test_a_training_elsewhere_leaves_what_one_here_would(here: Here, there: Served) -> None:
    """The same files, the same lines, and each file before the line that tells of it."""
    job = here.until(here.send(), "completed", "failed")
    assert (job.state, job.error) == ("completed", None)
    mine = here.settings.job(job.id)
    other = there.settings.job(job_there(here, job))
    for name in (
        "lora_final.safetensors",
        "samples/step_4.png",
        "checkpoints/lora_step_4.safetensors",
    ):
        assert (mine / "output" / name).read_bytes() == (other / "output" / name).read_bytes()
    said = (other / "attempts" / "1" / "stdout.jsonl").read_bytes()
    assert (mine / "attempts" / "1" / "stdout.jsonl").read_bytes() == moved(
        said, str(other), str(mine)
    )
    samples = [line for line in here.lines(job) if line["type"] == "sample"]
    assert samples
    assert all(Path(line["image_path"]).is_relative_to(mine / "output") for line in samples)
    assert job.final
    assert job.final["final_path"] == str(mine / "output" / "lora_final.safetensors")


def test_pictures_and_captions_arrive_as_they_are(
    here: Here, there: Served, tmp_path: Path
) -> None:
    """Whatever their names; the copy that was only sent is gone afterwards."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "猫 #1.png").write_bytes(picture(size=(300, 300)))
    (folder / "猫 #1.txt").write_text("zkb, “quoted”\n", encoding="utf-8")
    (folder / "b.JPG").write_bytes(picture("JPEG", (300, 320)))
    job = here.until(here.send(dataset=folder, trigger_words=["zkb"]), "completed", "failed")
    assert job.state == "completed", job.error
    copy = there.settings.job(job_there(here, job)) / "dataset"
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }
    assert not any(path.name.startswith("sent") for path in there.settings.datasets.iterdir())


def test_a_training_elsewhere_is_stopped_and_goes_on(here: Here, there: Served) -> None:
    """Both times by the verbs of this studio; more steps go along, and the end is the same."""
    job = here.send(steps=60)
    here.until_step(job, 5)
    here.store.request_stop(job.id)
    stopped = here.until(job, "stopped", "completed", "failed")
    assert stopped.state == "stopped"
    assert here.lines(job)[-1]["type"] == "interrupted"
    path = here.settings.job(job.id) / "config.json"
    changed = {**stopped.config, "steps": 64}
    path.write_text(json.dumps(changed), encoding="utf-8")
    here.store.resume(job.id, changed)
    assert here.until(job, "completed", "failed").state == "completed"
    assert here.lines(job, 2)[0]["resumed_step"] > 0
    whole = there.client.post("/train", json=wanted(steps=64)).json()["job_id"]
    status_when(there, whole, is_in("completed"))
    final = "output/lora_final.safetensors"
    alone = (there.settings.job(whole) / final).read_bytes()
    assert (here.settings.job(job.id) / final).read_bytes() == alone


def test_a_training_that_waits_elsewhere_is_taken_back(here: Here, there: Served) -> None:
    """All slots there are taken: it never began, and is stopped here."""
    busy = [there.client.post("/train", json=wanted(steps=2000)).json()["job_id"] for _ in "ab"]
    try:
        job = here.send()
        rounds_until(
            here.reconciler,
            lambda: bool(local.read_json(here.settings.job(job.id) / "peer.json")),
            60,
        )
        here.store.request_stop(job.id)
        assert here.until(job, "stopped", "completed", "failed").state == "stopped"
    finally:
        for each in busy:
            there.client.post(f"/jobs/{each}/stop")
            status_when(there, each, is_in("stopped"))


def test_what_was_not_written_down_comes_again(here: Here, there: Served) -> None:
    """A crash here between a line and its note: no line is missing, none is there twice."""
    job = here.until(here.send(), "completed", "failed")
    folder = here.settings.job(job.id) / "attempts" / "1"
    whole = (folder / "stdout.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    kept = b"".join(lines[:5])
    other = there.settings.job(job_there(here, job))
    said = (other / "attempts" / "1" / "stdout.jsonl").read_bytes()
    offset = len(b"".join(said.splitlines(keepends=True)[:5]))
    news = local.read_json(here.settings.job(job.id) / "peer.json")
    news |= {"after": f"1.{offset}", "size": len(kept)}
    (here.settings.job(job.id) / "peer.json").write_text(json.dumps(news))
    (folder / "stdout.jsonl").write_bytes(kept + lines[5] + b'{"type": "torn')
    (folder / "exit.json").unlink()
    engine = Peer(here.settings, there.settings.url, there.settings.token)
    wait_until(lambda: not engine.observe(f"{job.id}/1").alive)
    assert (folder / "stdout.jsonl").read_bytes() == whole


def test_a_note_that_was_lost_costs_nothing(here: Here, there: Served) -> None:
    """The same job is the same training there, so that it is found again by its key."""
    job = here.until(here.send(), "completed", "failed")
    folder = here.settings.job(job.id)
    whole = (folder / "attempts" / "1" / "stdout.jsonl").read_bytes()
    before = job_there(here, job)
    (folder / "peer.json").unlink()
    (folder / "attempts" / "1" / "exit.json").unlink()
    engine = Peer(here.settings, there.settings.url, there.settings.token)
    wait_until(lambda: not engine.observe(f"{job.id}/1").alive)
    assert job_there(here, job) == before
    assert (folder / "attempts" / "1" / "stdout.jsonl").read_bytes() == whole


class Wire:
    """A connection to a port that can be cut and mended."""

    def __init__(self, port: int) -> None:
        """Take where it leads."""
        self.target, self.open = port, True
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.ends: list[socket.socket] = []
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        """Take connections, and pass them on while the wire is whole."""
        with suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                if not self.open:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self.target))
                self.ends += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=(source, sink), daemon=True).start()

    def cut(self) -> None:
        """End all connections, and take no new ones."""
        self.open = False
        for end in self.ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.ends.clear()

    def mend(self) -> None:
        """Take connections again."""
        self.open = True


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Pass bytes on until an end is closed."""
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


@pytest.fixture
def wire(there: Served) -> Iterator[Wire]:
    """Provide a wire to the other studio; it knows that name as well."""
    made = Wire(there.settings.port)
    yield made
    made.cut()
    made.listener.close()


@pytest.fixture
def far(make_here: Make, wire: Wire, tmp_path: Path) -> Iterator[Here]:
    """Provide a studio that reaches another by the wire alone."""
    host, slowly = wire.url.removeprefix("http://"), {"step-seconds": 0.05}
    with acting(tmp_path / "behind", allowed_hosts=(host,), switches=slowly) as behind:
        wire.target = behind.settings.port
        yield make_here(wire.url, behind.settings.token)


def test_a_cut_wire_costs_no_line(far: Here, wire: Wire) -> None:
    """The training goes on; what was said meanwhile is brought when the wire is mended."""
    job = far.send(steps=40)
    far.until_step(job, 5)
    wire.cut()
    before = len(far.lines(job))
    for _ in range(10):
        far.reconciler.make_round()
        time.sleep(0.1)
    assert far.store.job(job.id).state == "running"
    assert len(far.lines(job)) <= before + 1
    wire.mend()
    assert far.until(job, "completed", "failed").state == "completed"
    assert [line["seq"] for line in far.lines(job)] == list(range(1, len(far.lines(job)) + 1))


def test_a_studio_that_does_not_answer_is_waited_for(make_here: Make) -> None:
    """The job says whom it waits for, and can be stopped all the same."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        here = make_here(f"http://127.0.0.1:{unused.getsockname()[1]}", "token")
        job = here.send()
        rounds_until(
            here.reconciler, lambda: "cannot be reached" in (here.store.job(job.id).phase or "")
        )
        assert here.store.job(job.id).state == "running"
        here.store.request_stop(job.id)
        assert here.until(job, "stopped", "failed").state == "stopped"


def test_a_studio_that_went_away_keeps_no_job(far: Here, wire: Wire) -> None:
    """A stop that nobody hears ends the job here, and says that it may still run there."""
    job = far.send(steps=100_000)
    far.until_step(job, 5)
    wire.cut()
    far.store.request_stop(job.id)
    stopped = far.until(job, "stopped", "failed")
    assert stopped.state == "stopped"
    assert "may still run there" in (stopped.error or {})["message"]


@pytest.mark.parametrize(
    ("token", "config", "said"),
    [
        ("wrong", {}, "Bearer"),
        ("", {"base_model": "/etc"}, "base_model"),
        ("", {"lora_rank": 0}, "lora_rank"),
    ],
)
def test_what_the_other_studio_refuses_fails_here(
    make_here: Make, there: Served, token: str, config: dict[str, Any], said: str
) -> None:
    """The job tells its words."""
    here = make_here(there.settings.url, token or there.settings.token)
    job = here.until(here.send(**config), "completed", "failed")
    assert job.state == "failed"
    assert said in json.dumps(job.error)


def test_only_trainings_are_sent(here: Here) -> None:
    """A tool's work is about files here."""
    job = here.send()
    write_command(here.settings, job.id, "python", "tools/prepare.py", "check", "folder")
    failed = here.until(job, "completed", "failed")
    assert "takes trainings alone" in json.dumps(failed.error)


@pytest.mark.parametrize(
    "name",
    [
        "x",
        "output",
        "output/",
        "output/../x",
        "/output/x",
        "output/./x",
        "output\\..\\x",
        "output/a\0",
    ],
)
def test_no_name_from_there_leads_out_of_the_output(name: str) -> None:
    """Whatever the other studio says, only what a program writes is written here."""
    assert not is_output(name)
    assert is_output("output/samples/step_1.png")


def test_a_redirect_is_not_followed(there: Served) -> None:
    """The token would go along."""
    asked: list[str] = []

    class Elsewhere(BaseHTTPRequestHandler):
        """Sends everybody to the other studio."""

        def do_GET(self) -> None:
            """Redirect."""
            asked.append(self.headers["Authorization"])
            self.send_response(302)
            self.send_header("Location", f"{there.settings.url}/jobs")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002, its name there
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        remote = Remote(f"http://127.0.0.1:{server.server_port}", there.settings.token)
        with pytest.raises(Refused, match="302"):
            remote.ask("GET", "/jobs")
        server.shutdown()
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "expected JSON"),
        ("[]", "expected an object"),
        ('{"cloud": {}}', "names that begin with peer"),
        ('{"peer:a": {"url": "http://x"}}', "expected token, url"),
        ('{"peer:a": {"url": "file:///etc", "token": "x"}}', "http"),
    ],
)
def test_a_file_of_engines_that_says_nonsense_is_explained(
    settings: Settings, text: str, expected: str
) -> None:
    """The studio does not start without what its owner has named."""
    (settings.root / "engines.json").write_text(text)
    with pytest.raises(EnginesUnusable, match=expected):
        further(settings)


def test_engines_are_named_in_a_file(settings: Settings) -> None:
    """Without it there is this machine alone."""
    assert further(settings) == {}
    said = {"peer:big": {"url": "http://127.0.0.1:1", "token": "x"}}
    (settings.root / "engines.json").write_text(json.dumps(said))
    assert isinstance(further(settings)["peer:big"], Peer)
