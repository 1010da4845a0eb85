"""Shared ground of the studio's tests: a data root, its store, and jobs that replay a run.

A plugin and no conftest.py, as that name is taken by the tests of the trainer.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from studio import local
from studio.local import Local
from studio.reconcile import Pace, Reconciler
from studio.settings import Settings
from studio.slots import Slot
from studio.store import Job, Store, new_id

if TYPE_CHECKING:
    from playwright.sync_api import Browser

HERE = Path(__file__).resolve().parent
ROOT, REPLAY = HERE.parent.parent, HERE / "replay.py"
QUICK = Pace(round=0.05, saving=1.0, ending=0.5, pauses=(0.05, 0.1, 0.2), leaving=5.0)
CPUS = (Slot("cpu:0", "Processor"), Slot("cpu:1", "Processor"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Try again what waits for processes, sockets and a browser that share two cores.

    Only here, and told at the end: the trainer's own promises hold at the first try, and so does
    what takes minutes, which has the patience for a machine under load.
    """
    for item in items:
        if item.path.is_relative_to(HERE) and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.flaky(reruns=2, reruns_delay=1))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Provide Chromium."""
    from looking import chromium  # which skips the test where playwright is not installed

    with chromium() as started:
        yield started


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    """Provide settings with a data root of their own; nothing that ran there outlives the test."""
    made = Settings(root=tmp_path / "root", slots="cpu:2")
    made.prepare()
    yield made
    end_all(made)


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    """Provide an empty store."""
    opened = Store(settings.database)
    yield opened
    opened.close()


@pytest.fixture
def reconciler(settings: Settings, store: Store) -> Reconciler:
    """Provide a reconciler of two slots, quick and not yet started."""
    return reconciler_of(settings, store)


def reconciler_of(settings: Settings, store: Store, pace: Pace = QUICK) -> Reconciler:
    """Make a reconciler with the engine of this machine."""
    return Reconciler(settings, store, {"local": Local(settings)}, CPUS, pace)


def enqueue(settings: Settings, store: Store, *switches: object, **options: Any) -> Job:
    """Queue a job that replays a run of so many steps; further options are columns of its row."""
    config = {"steps": options.pop("steps", 24), **options.pop("config", {})}
    job = Job(new_id(), options.pop("kind", "train"), options.pop("name", "A run"), config)
    folder = settings.job(job.id)
    folder.mkdir()
    path = folder / "config.json"
    content = {**config, "output_path": str(folder / "output")}
    path.write_text(json.dumps(content), encoding="utf-8")
    command = [sys.executable, REPLAY, "--config", path, *switches]
    write_command(settings, job.id, *command)
    return store.insert(Job(**{**vars(job), **options}))


def write_command(settings: Settings, job_id: str, *command: object) -> None:
    """Say what a job runs."""
    content = json.dumps({"argv": [str(word) for word in command]})
    (settings.job(job_id) / "command.json").write_text(content, encoding="utf-8")


def attempt_folder(settings: Settings, job: Job, n: int = 1) -> Path:
    """Find the folder of an attempt."""
    return settings.job(job.id) / "attempts" / str(n)


def rounds_until(reconciler: Reconciler, true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Make rounds until something comes true, and fail when it does not."""

    def look() -> bool:
        if true():
            return True
        reconciler.make_round()
        return False

    wait_until(look, seconds)


def in_state(store: Store, job: Job, state: str) -> Callable[[], bool]:
    """Make a question of whether a job is in a state."""
    return lambda: store.job(job.id).state == state


def pid_of(folder: Path) -> int:
    """Read which process runs an attempt."""
    pid = local.read_json(folder / "process.json").get("pid", 0)
    return int(pid)


def end_all(settings: Settings) -> None:
    """End whatever still runs below a data root, and wait for it."""
    for folder in settings.jobs.glob("*/attempts/*"):
        deadline = time.monotonic() + 5
        while lives(folder) and time.monotonic() < deadline:
            if pid := pid_of(folder):
                kill_group(pid)
            time.sleep(0.02)


def lives(folder: Path) -> bool:
    """Tell whether an attempt runs, or is about to: a killed service may just have started it."""
    begins = (folder / "stderr.log").exists() and not (folder / "stdout.jsonl").exists()
    return begins or local.is_locked(folder / "alive")


def kill_group(pid: int) -> None:
    """End a program with all that it has started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def shim_of(folder: Path) -> int | None:
    """Find the shim of an attempt: the parent of its program, unless that has lost it."""
    with contextlib.suppress(FileNotFoundError):
        stat = Path(f"/proc/{pid_of(folder)}/stat").read_bytes()
        parent = int(stat.rpartition(b")")[2].split()[1])
        if b"shim.py" in Path(f"/proc/{parent}/cmdline").read_bytes():
            return parent
    return None


def wait_until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for something to come true, and fail when it does not."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not so after {seconds:.0f} s"
        time.sleep(0.02)


def at_step(store: Store, job: Job, step: int) -> Callable[[], bool]:
    """Make a question of whether a job has come to a step."""
    return lambda: (store.job(job.id).step or 0) >= step


def final_bytes(settings: Settings, job: Job) -> bytes:
    """Read what a run made."""
    return (settings.job(job.id) / "output" / "lora_final.safetensors").read_bytes()


@contextlib.contextmanager
def service(settings: Settings, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Run the studio until the test is over with it."""
    own = ["--root", str(settings.root), "--port", "0", "--no-browser", "--slots", "cpu:2"]
    command = [sys.executable, "-m", "studio", *own, *options]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        try:
            first_line(process)
            yield process
        finally:
            process.kill()


def first_line(process: subprocess.Popen[str], seconds: float = 60.0) -> str:
    """Read what a program says first; one that says nothing is killed, and the test fails."""
    said, stdout = list[str](), process.stdout
    assert stdout
    reader = threading.Thread(target=lambda: said.append(stdout.readline()), daemon=True)
    reader.start()
    reader.join(seconds)
    if reader.is_alive():
        process.kill()
    assert any(said), f"{process.args!r} has said nothing in {seconds:.0f} s"
    return said[0]


def join(thread: threading.Thread, seconds: float = 30.0) -> None:
    """Wait for a thread to end, and fail when it does not."""
    thread.join(seconds)
    assert not thread.is_alive(), f"{thread.name} has not ended in {seconds:.0f} s"
