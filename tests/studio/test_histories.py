"""Whatever happens in whatever order: no slot is given twice, and what has ended stays so."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from studio_ground import CPUS, attempt_folder, enqueue, reconciler_of, rounds_until

from studio import local, reconcile
from studio import store as database
from studio.engine import Attempt, Record, Seen
from studio.reconcile import Pace, Reconciler
from studio.settings import Settings
from studio.store import ACTIVE, FINAL, Job, Store, new_id

COMPLETE = {"type": "complete"}
INTERRUPTED = {"type": "interrupted", "path": None}
ERROR = {"type": "error", "code": "disk_full", "message": "", "hint": "", "problems": []}
ENDS: dict[str, Record | None] = {
    "complete": COMPLETE,
    "interrupted": INTERRUPTED,
    "error": ERROR,
    "killed": None,
}


class Imagined:
    """An engine whose programs do what a test says."""

    def __init__(self) -> None:
        """Run nothing yet."""
        self.seen: dict[str, Seen] = {}

    def submit(self, attempt: Attempt) -> str:
        """Start a program, once."""
        handle = f"{attempt.job}/{attempt.n}"
        self.seen.setdefault(handle, Seen(alive=True))
        return handle

    def observe(self, handle: str) -> Seen:
        """Tell how a program is."""
        return self.seen[handle]

    def stop(self, handle: str, *, force: bool = False) -> None:
        """End a program, if by force; the others hear it, and end when they like."""
        if force and self.seen[handle].alive:
            self.end(handle, "killed")

    def end(self, handle: str, how: str) -> None:
        """Let a program end."""
        self.seen[handle] = Seen(alive=False, terminal=ENDS[how])

    def events(self, _handle: str, _after: int = 0) -> Iterator[tuple[int, bytes]]:
        """Say nothing."""
        yield from ()

    def living(self) -> list[str]:
        """List what runs."""
        return [handle for handle, seen in self.seen.items() if seen.alive]


class Histories(RuleBasedStateMachine):
    """Users, programs, crashes and reboots in any order."""

    def __init__(self) -> None:
        """Begin with an empty data root."""
        super().__init__()
        self.settings = Settings(root=Path(tempfile.mkdtemp()))
        self.settings.prepare()
        self.store, self.engine = Store(self.settings.database), Imagined()
        self.ended: dict[str, str] = {}
        self.begin_service()

    @rule()
    def begin_service(self) -> None:
        """Let the service crash and begin anew."""
        pace = Pace(pauses=(0.0,), saving=0.0)
        engines = {"local": self.engine}
        self.reconciler = Reconciler(self.settings, self.store, engines, CPUS, pace)

    @rule()
    def pass_time(self) -> None:
        """Let a second pass."""
        self.reconciler.make_round()

    @rule(slots=st.integers(0, 2), priority=st.integers(0, 2))
    def add(self, slots: int, priority: int) -> None:
        """Queue a job."""
        job = Job(new_id(), "train", "A run", {}, slots=slots, priority=priority)
        self.settings.job(job.id).mkdir()
        path = self.settings.job(job.id) / "command.json"
        path.write_text(json.dumps({"argv": ["x"]}), encoding="utf-8")
        self.store.insert(job)

    @rule(data=st.data(), wish=st.sampled_from(["request_stop", "hold", "resume"]))
    def ask(self, data: st.DataObject, wish: str) -> None:
        """Let a user ask for something."""
        if jobs := self.store.jobs():
            job = data.draw(st.sampled_from(jobs))
            with contextlib.suppress(database.StateConflict):
                getattr(self.store, wish)(job.id)
                if wish == "resume":
                    self.ended.pop(job.id, None)

    @precondition(lambda self: self.engine.living())
    @rule(data=st.data(), how=st.sampled_from(sorted(ENDS)))
    def end_program(self, data: st.DataObject, how: str) -> None:
        """Let a program end in some way."""
        self.engine.end(data.draw(st.sampled_from(self.engine.living())), how)

    @precondition(lambda self: self.engine.living())
    @rule()
    def reboot(self) -> None:
        """Start the machine anew."""
        for handle in self.engine.living():
            self.engine.seen[handle] = Seen(alive=False, same_boot=False)
        self.begin_service()

    @invariant()
    def each_active_job_has_its_slots_and_nobody_else_any(self) -> None:
        """Slots are held by what runs, as many as it needs."""
        holds = list(self.store.holds().values())
        for job in self.store.jobs():
            assert holds.count(job.id) == (job.slots if job.state in ACTIVE else 0)

    @invariant()
    def no_job_runs_twice(self) -> None:
        """A job has one program at a time, and one that has ended has none."""
        running = [handle.partition("/")[0] for handle in self.engine.living()]
        assert len(set(running)) == len(running)
        assert not {job.id for job in self.store.jobs() if job.state in FINAL} & set(running)

    @invariant()
    def what_has_ended_stays_so(self) -> None:
        """Only a user's word leads out of a final state."""
        for job in self.store.jobs():
            assert self.ended.get(job.id, job.state) == job.state
            if job.state in FINAL:
                self.ended[job.id] = job.state

    def teardown(self) -> None:
        """In the end, all that nobody holds comes to its end."""
        self.reconciler.make_round()
        while living := self.engine.living():
            for handle in living:
                self.engine.end(handle, "complete")
            self.reconciler.make_round()
        left = [job for job in self.store.jobs() if job.state not in FINAL]
        assert all(job.desired == "hold" for job in left)
        self.store.close()
        shutil.rmtree(self.settings.root)


TestHistories = Histories.TestCase
TestHistories.settings = hypothesis.settings(
    max_examples=15,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)


# --- A crash of the service between any two lines ---

WATCHED = {str(Path(module.__file__ or "")) for module in (reconcile, database, local)}


def counting(reached: Callable[[int], None]) -> Callable[[types.FrameType, str, Any], Any]:
    """Make a tracer that tells the number of each line that our modules begin."""
    lines = 0

    def trace(frame: types.FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in WATCHED:
            return None
        if event == "line":
            lines += 1
            reached(lines)
        return trace

    return trace


def make_traced_round(settings: Settings, reached: Callable[[int], None]) -> None:
    """Let a new service make one round."""
    store = Store(settings.database)
    reconciler = reconciler_of(settings, store)
    before = sys.gettrace()
    sys.settrace(counting(reached))
    try:
        reconciler.make_round()
    finally:
        sys.settrace(before)
        store.close()


def crash_at(settings: Settings, fatal: int) -> bool:
    """Let a service crash at a line of its first round; tell whether it came so far."""

    def reached(line: int) -> None:
        if line == fatal:
            os._exit(9)

    child = os.fork()
    if child == 0:
        make_traced_round(settings, reached)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def begin(settings: Settings, *, stopping: bool) -> Job:
    """Queue a short run; or a long one, which runs and is to stop."""
    store = Store(settings.database)
    if stopping:
        job = enqueue(settings, store, steps=100_000)
        reconciler_of(settings, store).make_round()
        store.request_stop(job.id)
    else:
        job = enqueue(settings, store, "--step-seconds=0", steps=8)
    store.close()
    return job


def converge(settings: Settings, job: Job) -> None:
    """Let a new service go on, and look at what became of the job."""
    store = Store(settings.database)
    reconciler = reconciler_of(settings, store)
    rounds_until(reconciler, lambda: store.job(job.id).state in FINAL)
    ended, tries, holds = store.job(job.id), store.attempts(job.id), store.holds()
    store.close()
    assert ended.state == ("stopped" if ended.desired == "stop" else "completed")
    assert (len(tries), holds) == (1, {})
    said = (attempt_folder(settings, job) / "stdout.jsonl").read_text("ascii")
    assert said.count('"type": "start"') <= 1


def crash_everywhere(settings: Settings, points: int | None, *, stopping: bool) -> None:
    """Crash at every line of a round, or at so many of them, and go on each time."""
    lines: list[int] = []
    job = begin(settings, stopping=stopping)
    make_traced_round(settings, lines.append)
    converge(settings, job)
    step = max(1, len(lines) // points) if points else 1
    crashes = 0
    for fatal in range(1, len(lines) + 1, step):
        job = begin(settings, stopping=stopping)
        crashes += crash_at(settings, fatal)
        converge(settings, job)
    # Rounds differ a little in how much there is to hear.
    assert crashes > len(lines) // step // 2


@pytest.mark.parametrize("stopping", [False, True])
def test_a_crash_in_a_round_changes_nothing_in_the_end(settings: Settings, stopping: bool) -> None:
    """Wherever a service dies while it starts or stops a job, the next one does what was wanted."""
    crash_everywhere(settings, 6, stopping=stopping)


@pytest.mark.slow
@pytest.mark.parametrize("stopping", [False, True])
def test_a_crash_at_any_line_changes_nothing_in_the_end(settings: Settings, stopping: bool) -> None:
    """The same for every line there is."""
    crash_everywhere(settings, None, stopping=stopping)
