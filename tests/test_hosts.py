"""The example hosts: each shows a real run, stops it, and catches up with it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAM, ROOT, Record, write_image, write_json
from processes import Child, started, wait_until
from tiny_runs import tiny_base

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals, locks files")

SECONDS = 60  # far more than anything here takes
ENVIRONMENT = {"TRAIN_LORA_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
PROGRAMS = {
    "host.py": (sys.executable,),
    "host.mjs": ("node",),
    "host.sh": ("bash", "jq", "flock", "setsid"),
}
TINY: Record = {
    "trigger_words": ["zkb"],
    "resolution": 256,
    "steps": 3,
    "checkpoint_steps": 2,
    "validation_steps": 2,
    "sample_steps": 1,
    "lora_rank": 2,
    "device": "cpu",
}
ENDLESS: Record = {"steps": 10**6, "checkpoint_steps": 10**6, "validation_steps": 10**6}


@dataclass(frozen=True)
class Place:
    """A folder with a dataset, a config, and what its runs write."""

    folder: Path

    @property
    def output(self) -> Path:
        """Return the output folder."""
        return self.folder / "out"

    def events(self) -> list[Record]:
        """Return what the runs have said."""
        text = (self.output / "events.jsonl").read_text(encoding="ascii")
        return [json.loads(line) for line in text.splitlines()]

    def say(self, *lines: object) -> Place:
        """Let events.jsonl hold these lines."""
        self.output.mkdir(exist_ok=True)
        texts = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
        (self.output / "events.new").write_text("".join(texts), encoding="latin-1")
        (self.output / "events.new").rename(self.output / "events.jsonl")
        return self


@dataclass(frozen=True)
class Host:
    """One of the examples."""

    name: str
    environment: dict[str, str] = field(default_factory=lambda: ENVIRONMENT)

    def command(self, *arguments: object) -> list[str]:
        """Give the command that runs it."""
        program = ROOT / "examples" / "hosts" / self.name
        return [PROGRAMS[self.name][0], str(program), *map(str, arguments)]

    def run(self, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(
            self.command(*arguments),
            cwd=cwd,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )

    @contextlib.contextmanager
    def started(self, *arguments: object, cwd: Path) -> Iterator[Child]:
        """Start it as a terminal does, in a group of its own."""
        options: dict[str, Any] = {"cwd": cwd, "environment": self.environment}
        with started(*self.command(*arguments), start_new_session=True, **options) as child:
            yield child


def find_host(name: str) -> Host:
    """Return one of the examples, if it can run here."""
    missing = [program for program in PROGRAMS[name] if not shutil.which(program)]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
    return Host(name)


@pytest.fixture(params=PROGRAMS)
def host(request: pytest.FixtureRequest) -> Host:
    """Provide each of the examples that can run here."""
    return find_host(request.param)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide the tiny base model with the fastest step."""
    return tiny_base("sd2", tmp_path_factory.mktemp("bases"))


def write_place(folder: Path, base: Path, **changes: Any) -> Place:
    """Write two images and a config."""
    for number in (1, 2):
        write_image(folder / "data" / f"{number}.png", (256, 256))
    places = {"dataset_path": "data", "base_model": str(base), "output_path": "out"}
    write_json(folder / "config.json", TINY | places | changes)
    return Place(folder)


@pytest.fixture
def endless(base: Path, tmp_path: Path) -> Place:
    """Provide a place for a run that does not end by itself."""
    return write_place(tmp_path, base, **ENDLESS)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Provide a place in which nothing ever ran."""
    return Place(tmp_path)


@dataclass(frozen=True)
class Finished(Place):
    """A place with a finished run, and what its host showed."""

    code: int
    shown: str


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Provide a run that the host in Python has seen from its start to its end."""
    folder = write_place(tmp_path_factory.mktemp("finished"), base).folder
    done = Host("host.py").run("config.json", cwd=folder)
    return Finished(folder, done.returncode, done.stdout)


def read_until(words: str, child: Child) -> str:
    """Wait for a line with these words."""
    lines = iter(child.stdout.readline, b"")
    line = next((line.decode() for line in lines if words in line.decode()), None)
    assert line is not None
    return line


def end(child: Child) -> tuple[int, str]:
    """Wait for the end; return the exit code and the rest of what was shown."""
    rest, _ = child.process.communicate(timeout=SECONDS)
    return child.process.returncode, rest.decode()


# --- From the start to the end ---


def test_a_run_is_shown_from_its_start_to_its_end(finished: Finished) -> None:
    """Progress, a preview, a checkpoint, and the file that came out."""
    assert finished.code == 0
    assert "33 %  step 1/3  loss " in finished.shown
    assert "99 %  step 3/3  loss " in finished.shown
    assert f"Sample: {finished.output}/samples/step_2.png\n" in finished.shown
    assert f"Checkpoint: {finished.output}/checkpoints/lora_step_2.safetensors" in finished.shown
    assert finished.shown.endswith(f"Complete: {finished.output}/lora_final.safetensors\n")


def test_a_finished_run_started_again_is_complete(host: Host, finished: Finished) -> None:
    """The exit code is the trainer's, and the last line names the file."""
    done = host.run("config.json", cwd=finished.folder)
    assert done.returncode == 0
    assert done.stdout.endswith(f"Complete: {finished.output}/lora_final.safetensors\n")
    assert done.stderr == ""


def test_arguments_reach_the_trainer(host: Host, finished: Finished) -> None:
    """A preflight ends with a last line of its own."""
    done = host.run("config.json", "--validate-only", "--set", "steps=7", cwd=finished.folder)
    assert done.returncode == 0
    assert "Valid: 2 images, 7 steps" in done.stdout.splitlines()[-1]


def test_an_invalid_config_is_refused_with_its_problems(host: Host, endless: Place) -> None:
    """All of them, each with the place where it stands."""
    wrong = ("--set", "lora_rank=0", "--set", "stepps=1")
    done = host.run("config.json", *wrong, cwd=endless.folder)
    assert done.returncode == 1
    assert done.stdout.startswith("Error config_invalid\n")
    problems = done.stdout.splitlines()[1:]
    assert sorted(line.split(":")[0].strip() for line in problems) == ["lora_rank", "stepps"]


def test_a_wrong_command_line_is_explained(host: Host, endless: Place) -> None:
    """No event tells of it, so what stands on stderr is shown."""
    done = host.run("config.json", "--bogus", cwd=endless.folder)
    assert (done.returncode, done.stdout) == (2, "No last line, code 2\n")
    assert "unrecognized arguments: --bogus" in done.stderr


# --- Stopping ---


# Importing torch takes seconds; below, every host stops a run before it gets there.
SAVING = [
    "host.py",
    *(pytest.param(name, marks=pytest.mark.slow) for name in PROGRAMS if name != "host.py"),
]


@pytest.mark.parametrize("name", SAVING)
def test_a_stopped_host_saves_the_run_and_others_see_it(name: str, endless: Place) -> None:
    """What was learned is saved; whoever follows the file sees progress and the end."""
    host, folder = find_host(name), endless.folder
    with contextlib.ExitStack() as stack:
        child = stack.enter_context(host.started("config.json", cwd=folder))
        read_until("step 1/", child)
        able = [other for other in PROGRAMS if all(map(shutil.which, PROGRAMS[other]))]
        followers = [Host(o).started("--attach", "out", cwd=folder) for o in able]
        children = [child, *map(stack.enter_context, followers)]
        for follower in children[1:]:
            read_until("step 1/", follower)
        child.process.terminate()
        ends = [end(each) for each in children]
    last = endless.events()[-1]
    line = f"Interrupted by SIGTERM at step {last['step']}, saved: {last['path']}\n"
    assert [code for code, _ in ends] == [143] * len(children)
    assert all(shown.endswith(line) for _, shown in ends)
    assert Path(last["path"], "manifest.json").is_file()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_host_that_dies_leaves_no_run_behind(
    number: signal.Signals, host: Host, endless: Place
) -> None:
    """Whoever else holds the pipe, the trainer notices, saves and ends."""
    with host.started("config.json", cwd=endless.folder) as child:
        wait_for_file(endless)
        os.kill(child.process.pid, number)
        wait_until(lambda: any(event["type"] == "interrupted" for event in endless.events()))
    assert endless.events()[-1]["reason"] == "host_gone"


def wait_for_file(place: Place) -> Path:
    """Wait until a run has begun to tell; return its folder."""
    wait_until((place.output / "events.jsonl").is_file)
    return place.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_the_trainer_as_one_sigterm(
    number: signal.Signals, host: Host, endless: Place
) -> None:
    """A terminal signals a whole group of processes; the trainer is not in it."""
    with host.started("config.json", cwd=endless.folder) as child:
        read_until("Start: ", child)
        os.killpg(child.process.pid, number)
        os.killpg(child.process.pid, number)
        code, shown = end(child)
    assert code == 143
    assert shown.count("Stopping: ") == 1
    assert shown.endswith("Interrupted by SIGTERM at step 0, saved: ?\n")


def test_a_stop_while_attached_stops_the_run(host: Host, endless: Place) -> None:
    """A host that did not start the run leaves a stop file."""
    trainer = (sys.executable, PROGRAM, "--config", "config.json")
    with started(*trainer, cwd=endless.folder, stdout=subprocess.DEVNULL) as run:
        with host.started("--attach", wait_for_file(endless), cwd=endless.folder) as follower:
            read_until("Start: ", follower)
            follower.process.terminate()
            code, shown = end(follower)
        assert (code, run.process.wait(SECONDS)) == (143, 143)
    assert "Interrupted by stop_file" in shown
    assert not (endless.output / "stop").exists()


def test_a_killed_trainer_is_reported(host: Host, endless: Place) -> None:
    """A stream without a last line says so, and so does the file afterwards."""
    with host.started("config.json", cwd=endless.folder) as child:
        pid = int(read_until("Start: ", child).split()[-1])
        wait_for_file(endless)
        os.kill(pid, signal.SIGKILL)
        code, shown = end(child)
    later = host.run("--attach", "out", cwd=endless.folder)
    assert (code, later.returncode) == (137, 137)
    assert "Killed by signal 9" in shown
    assert "Killed: no last line" in later.stdout


# --- Catching up ---


def test_attaching_after_the_end_replays_the_run(host: Host, finished: Finished) -> None:
    """Who comes late reads what the first host has read."""
    done = host.run("--attach", "out", cwd=finished.folder)
    assert done.returncode == 0
    assert without_numbers(done.stdout) == without_numbers(finished.shown)


def without_numbers(shown: str) -> str:
    """Leave loss and time out, which every language writes in its own way."""
    return re.sub(r"loss .* left", "", shown)


def test_a_start_after_a_last_line_is_a_new_attempt(
    host: Host, finished: Finished, place: Place
) -> None:
    """An earlier end is not the end; a torn line is no line."""
    events = finished.events()
    place.say(*events, events[0], '{"type":"complete","final')
    done = host.run("--attach", "out", cwd=place.folder)
    assert done.returncode == 137
    assert "Killed: no last line" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", ["host.py", "host.mjs"])
def test_a_torn_line_gives_way_to_the_next_start(
    name: str, finished: Finished, place: Place
) -> None:
    """A restart cuts it off and goes on in its place."""
    host, (first, *_, last) = find_host(name), finished.events()
    torn = '{"type":"info","message":"Never to be ended, however long'
    place.say(first, {"type": "info", "message": "Before"}, torn)
    with locked(place), host.started("--attach", "out", cwd=place.folder) as follower:
        read_until("Before", follower)
        with (place.output / "events.jsonl").open("r+") as mirror:
            mirror.seek(0, os.SEEK_END)
            mirror.seek(mirror.tell() - len(torn))
            mirror.write(json.dumps(first) + "\n" + json.dumps(last) + "\n")
        read_until("Start: ", follower)
        read_until("Complete: ", follower)


def test_a_file_that_fresh_has_replaced_is_read_anew(
    host: Host, finished: Finished, place: Place
) -> None:
    """The earlier one is set aside, so that the new one may be shorter."""
    first, *_, last = finished.events()
    place.say(first, {"type": "info", "message": "Before"})
    with locked(place), host.started("--attach", "out", cwd=place.folder) as follower:
        read_until("Before", follower)
        place.say(first, {"type": "info", "message": "Now"})
        read_until("Now", follower)
        place.say(last)
        read_until("Complete: ", follower)
        assert follower.process.poll() is None
    assert host.run("--attach", "out", cwd=place.folder).returncode == 0


@contextlib.contextmanager
def locked(place: Place) -> Iterator[None]:
    """Hold the lock, as a run does while it is alive."""
    with (place.output / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_there_is_nothing_to_attach_to(host: Host, place: Place) -> None:
    """A wrong path is told, and nothing is made there."""
    done = host.run("--attach", "out", cwd=place.folder)
    assert done.returncode == 2
    assert "Usage: " in done.stderr
    assert not place.output.exists()


# --- What is not known ---


def test_what_is_no_event_does_no_harm(host: Host, finished: Finished, place: Place) -> None:
    """Garbage is passed over; of an unknown type, the message is shown."""
    garbage = ["\n", "no JSON\n", "[1]\n", "null\n", '"text"\n', "7\n", "\xff\xfe\n", "{\n", "{}\n"]
    novel = {"type": "novel", "problems": 7, "loss": "?", "message": "A new fact \x1b[2J, \udc80"}
    known = finished.events()[0] | {"novel": [None]}
    place.say(known, *garbage, novel, {"type": 7}, {"type": "progress"}, finished.events()[-1])
    done = host.run("--attach", "out", cwd=place.folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "A new fact ?[2J, " in done.stdout
    assert "Complete: " in done.stdout.splitlines()[-1]


# Writes more to stderr than a pipe holds, speaks a protocol that does not exist yet, goes on.
FUTURE = """
import sys, time
sys.stderr.write("x" * 2**20)
while True:
    print('{"type":"start","protocol":"2.0","message":"Hello","pid":1}', flush=True)
    time.sleep(0.1)
"""


def test_an_unknown_protocol_is_refused(host: Host, place: Place) -> None:
    """The run is stopped rather than misread, and a full stderr keeps nobody waiting."""
    (place.folder / "future.py").write_text(FUTURE, encoding="utf-8")
    newer = replace(host, environment=ENVIRONMENT | {"TRAIN_LORA": "future.py"})
    done = newer.run("config.json", cwd=place.folder)
    assert done.returncode != 0
    assert "Protocol 2.0 is unknown" in done.stdout
    assert host.run("--attach", place.say(HELLO).output, cwd=place.folder).returncode == 1


HELLO = {"type": "start", "protocol": "2.0", "message": "Hello", "pid": 1}
