"""A night of work in minutes: many runs, two slots, and somebody who kills at random."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from studio_ground import attempt_folder, enqueue, final_bytes, pid_of, service, shim_of

if TYPE_CHECKING:
    from studio.settings import Settings
    from studio.store import Job, Store

RUNS = 200
STEPS = 30
MINUTES = 20  # a quiet machine needs five
PAUSE_SECONDS = (0.2, 1.2)  # between two kills


def kill_something(settings: Settings, job: Job, n: int, chance: random.Random) -> None:
    """Kill the program of an attempt, or its shim, or both at once, if they are there."""
    folder = attempt_folder(settings, job, n)
    shim = shim_of(folder)  # none where the program is over, whose pid may be another's by now
    if shim:
        pids = [pid_of(folder), shim]
        for pid in chance.choice([pids, pids[:1], pids[1:]]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def run_service(settings: Settings, store: Store, chance: random.Random) -> None:
    """Let a service work for a while, and kill among what it runs, and then itself."""
    with service(settings):
        for _ in range(chance.randint(5, 25)):
            time.sleep(chance.uniform(*PAUSE_SECONDS))
            active = store.active()
            if not active and not store.queue():
                return
            if active and chance.random() < 0.7:
                job = chance.choice(active)
                kill_something(settings, job, store.attempts(job.id)[-1].n, chance)


def made_in_peace() -> bytes:
    """Compute what a run makes that nobody disturbs."""
    content = b""
    for step in range(1, STEPS + 1):
        content = hashlib.sha256(content + step.to_bytes(8, "big")).digest()
    return content


def orphans(settings: Settings) -> list[str]:
    """List the processes that have to do with a data root."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
    return [line for line in lines if str(settings.root) in line]


@pytest.mark.slow
def test_two_hundred_runs_survive_kills_of_all_kinds(settings: Settings, store: Store) -> None:
    """Services, shims and trainers are killed all the time; every run ends, with its file."""
    chance = random.Random(0)
    config = {"checkpoint_steps": 2, "validation_steps": 10**6}
    jobs = [enqueue(settings, store, steps=STEPS, config=config) for _ in range(RUNS)]
    deadline = time.monotonic() + MINUTES * 60
    while (store.active() or store.queue()) and time.monotonic() < deadline:
        run_service(settings, store, chance)
    assert store.counts() == {("train", "completed"): RUNS}
    assert {final_bytes(settings, job) for job in jobs} == {made_in_peace()}
    assert (store.holds(), orphans(settings)) == ({}, [])
    attempts = [each for job in jobs for each in store.attempts(job.id)]
    assert sum(each.outcome == "vanished" for each in attempts) > RUNS / 10
