"""What is to be, and what is: decide() says what follows, and a loop does it, once a second.

The loop is the only path. A crash of the service, a reboot, a killed program: all are met by
looking at what is there and deciding anew. Every action may be repeated, and cut short anywhere.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from studio import local, slots
from studio.digest import Digest
from studio.engine import Attempt, EngineError, Seen, Unreachable
from studio.store import ACTIVE, from_now, utc

if TYPE_CHECKING:
    from studio.engine import Engine, Record
    from studio.settings import Settings
    from studio.slots import Slot
    from studio.store import AttemptRow, Job, Store

log = logging.getLogger("studio")


@dataclass(frozen=True)
class Pace:
    """How long things may take, in seconds."""

    round: float = 1.0
    saving: float = 20.0  # from the wish to stop until force is used; the contract says 8
    ending: float = 30.0  # from the last line to the end of the process
    pauses: tuple[float, ...] = (5.0, 30.0, 120.0)  # before what vanished is started again
    leaving: float = 9.0  # for jobs to end with the service; containers get 10 by default
    stalled: float = 10.0


FRUITLESS = 3  # attempts in a row that vanish without having come further
TOGETHER_SECONDS = 15  # the service's end and a stop so soon after it have the same cause


# --- What follows from what is seen ---


@dataclass(frozen=True)
class Wait:
    """Nothing is to be done."""


@dataclass(frozen=True)
class Submit:
    """Start what was claimed, or make sure that it was started."""


@dataclass(frozen=True)
class Ask:
    """Ask the program to save and end."""


@dataclass(frozen=True)
class Kill:
    """End the program by force."""


@dataclass(frozen=True)
class Finish:
    """The job is over."""

    state: str
    outcome: str | None = None  # of the attempt, if there was one
    error: Record | None = None


@dataclass(frozen=True)
class Requeue:
    """The job is to go on in another attempt."""

    outcome: str
    seconds: float = 0.0


Action = Wait | Submit | Ask | Kill | Finish | Requeue


def decide(
    job: Job, attempts: Sequence[AttemptRow], seen: Seen | None, now: datetime, pace: Pace
) -> Action:
    """Say what follows for a job. `seen` is None where the engine has not confirmed the start."""
    if job.state == "queued":
        if job.desired == "stop":
            return Finish("stopped" if attempts else "cancelled")
        return Wait()
    if seen is None:
        return Submit()
    if seen.alive:
        return of_living(job, seen, now, pace)
    return of_dead(job, attempts, seen, pace)


def of_living(job: Job, seen: Seen, now: datetime, pace: Pace) -> Action:
    """Say what follows while something of the attempt runs."""
    if job.state == "stopping" and seconds_since(job.stopping_at, now) >= pace.saving:
        return Kill()
    if seen.terminal and seen.silent_for >= pace.ending:
        return Kill()  # until then, it may be giving back the card's memory
    if job.state == "stopping" or job.desired == "stop":
        return Ask()
    return Wait()


def of_dead(job: Job, attempts: Sequence[AttemptRow], seen: Seen, pace: Pace) -> Action:
    """Say what follows when nothing of the attempt is left."""
    last = seen.terminal or {}
    outcome = str(last.get("type", "vanished"))
    wanted_to_end = job.state == "stopping" or job.desired == "stop"
    if outcome == "complete":
        return Finish("completed", outcome)
    if outcome == "error":
        return Finish("failed", outcome, error_of(last))
    if wanted_to_end:
        return Finish("stopped", outcome)
    if outcome == "interrupted":
        gone = not seen.same_boot or went_with_service(attempts[-1], seen)
        return Requeue(outcome) if gone else Finish("stopped", outcome)
    if seen.failure:
        return Finish("failed", "not_started", not_started(seen.failure))
    if not seen.same_boot:
        return Requeue("rebooted")
    return after_vanishing(job, attempts, seen, pace)


def seconds_since(moment: str | None, now: datetime) -> float:
    """Tell how long ago something was."""
    return (now - datetime.fromisoformat(moment)).total_seconds() if moment else 0.0


def error_of(last: Record) -> Record:
    """Take over how a program says that it failed."""
    kept = ("code", "message", "hint", "problems")
    return {name: last.get(name) for name in kept}


def not_started(failure: str) -> Record:
    """Say that a program could not be started."""
    hint = "Look at --python, which names the Python of the trainer, and at the disk."
    return failed("not_started", f"The program cannot be started: {failure}", hint)


def failed(code: str, message: str, hint: str, tail: str = "") -> Record:
    """Say how a job failed for which no program speaks."""
    return {"code": code, "message": message, "hint": hint, "problems": [], "tail": tail}


def went_with_service(attempt: AttemptRow, seen: Seen) -> bool:
    """Tell whether an attempt was stopped because service or machine were going down."""
    if attempt.left_at is None or seen.ended_at is None:
        return False
    left = datetime.fromisoformat(attempt.left_at).timestamp()
    return -1 <= seen.ended_at - left <= TOGETHER_SECONDS


def after_vanishing(
    job: Job, attempts: Sequence[AttemptRow], seen: Seen, pace: Pace
) -> Finish | Requeue:
    """Start again what was killed, later each time, unless it never comes any further."""
    tries = [each for each in attempts if each.started_at >= job.queued_at]
    in_a_row = vanished_in_a_row(tries)
    if fruitless_in_a_row(in_a_row, tries) >= FRUITLESS:
        if seen.failure:
            return Finish("failed", "not_started", not_started(seen.failure))
        hint = "Look at the end of its log, and at the memory of this machine."
        return Finish("failed", "vanished", failed("process_vanished", how(seen), hint, seen.tail))
    pause = pace.pauses[min(len(in_a_row), len(pace.pauses)) - 1]
    return Requeue("vanished", pause)


def vanished_in_a_row(tries: Sequence[AttemptRow]) -> list[AttemptRow]:
    """Return the latest attempts that vanished, this one included; a reboot is nobody's fault."""
    row = [tries[-1]]
    for each in reversed(tries[:-1]):
        if each.outcome == "vanished":
            row.append(each)
        elif each.outcome not in ("rebooted", "interrupted"):
            break
    return row


def fruitless_in_a_row(row: Sequence[AttemptRow], tries: Sequence[AttemptRow]) -> int:
    """Count the latest attempts that came no further than all before them."""
    for count, each in enumerate(row):
        before = [t.last_step for t in tries if t.n < each.n and t.last_step is not None]
        furthest = max([each.first_step or 0, *before])
        if each.last_step is not None and each.last_step > furthest:
            return count
    return len(row)


def how(seen: Seen) -> str:
    """Say how a process ended without a word."""
    if seen.signal is None:
        code = "" if seen.exit_code is None else f", with exit code {seen.exit_code}"
        return f"The process ended without a last line{code}."
    known = {number.value: number.name for number in signal.Signals}
    name = known.get(seen.signal, f"signal {seen.signal}")
    often = ": often for want of main memory" if name == "SIGKILL" else ""
    return f"The process was ended by {name}{often}."


# --- Doing it ---


@dataclass(frozen=True)
class Heard:
    """How much of an attempt's events was read, and what they say."""

    position: int = 0
    digest: Digest = field(default_factory=Digest)


class Reconciler:
    """Brings what is to what is to be. One thread; all else goes through the store."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        engines: Mapping[str, Engine],
        room: Sequence[Slot],
        pace: Pace | None = None,
    ) -> None:
        """Take what there is to work with; nothing runs before start()."""
        self.listeners: list[Callable[[Job], None]] = []  # called from this thread
        self.slots = tuple(room)
        self._settings, self._store, self._engines = settings, store, engines
        self._pace = pace or Pace()
        self._heard: dict[tuple[str, int], Heard] = {}
        self._mute: dict[str, str] = {}  # engines that have not answered in this round, and why
        self._deaf_since: dict[str, float] = {}  # jobs that no wish to stop can reach
        self._wanted, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._go, name="reconciler", daemon=True)
        self._beat = time.monotonic()

    def start(self) -> None:
        """Look at what earlier services left, and go on from there."""
        self.look_after_all()
        if self._settings.on_start == "hold":
            self._store.hold_all()
        self._thread.start()

    def wake(self) -> None:
        """Begin the next round at once."""
        self._wanted.set()

    def stalled(self) -> bool:
        """Tell whether rounds have ceased."""
        return time.monotonic() - self._beat > self._pace.stalled

    def stop(self) -> None:
        """End; what runs goes on without us, unless it was to end with the service."""
        self._over.set()
        self._wanted.set()
        if self._thread.ident is not None:
            self._thread.join(self._pace.stalled)  # it ends with us, also if an engine is mute
        self._store.leave()
        if self._settings.stop_jobs:
            self._stop_jobs()

    def _stop_jobs(self) -> None:
        """Ask all that runs to save and end, and wait for it."""
        deadline = time.monotonic() + self._pace.leaving
        here = [job for job in self._store.active() if job.engine == "local"]
        while time.monotonic() < deadline:
            here = [job for job in here if self._asked_to_end(job)]
            if not here:
                return
            time.sleep(0.1)

    def _asked_to_end(self, job: Job) -> bool:
        """Ask the attempt of a job to end; tell whether it still runs."""
        attempt, engine = self._store.attempts(job.id)[-1], self._engine(job)
        if not attempt.handle or not engine.observe(attempt.handle).alive:
            return False
        engine.stop(attempt.handle)
        return True

    def _go(self) -> None:
        """Make rounds until the end."""
        while not self._over.is_set():
            self.make_round()
            self._wanted.wait(self._pace.round)
            self._wanted.clear()

    def make_round(self) -> None:
        """Look after all jobs, and start those whose turn it is."""
        self._beat = time.monotonic()
        try:
            self.look_after_all()
            while claim := self._store.claim([slot.id for slot in self.slots]):
                self._tell(claim.job)
                self._submit(claim.job, claim.n, claim.slots)
        except Exception:  # such as a full disk; the next round tries again
            log.exception("A round cannot be made")

    def look_after_all(self) -> None:
        """Do for each job what follows from how it is. One that makes trouble stops no other."""
        self._mute = {}
        unwanted = [job for job in self._store.queue() if job.desired == "stop"]
        for job in [*self._store.active(), *unwanted]:
            try:
                self._look_after(job)
                self._deaf_since.pop(job.id, None)
            except EngineError as error:
                self._wait_for(job, error)
            except Exception:  # whatever it is, the others and the next round must go on
                log.exception("Job %s cannot be looked after", job.id)

    def _look_after(self, job: Job) -> None:
        """Do what follows for one job."""
        seen, attempts = None, self._store.attempts(job.id)
        if job.state in ACTIVE and attempts[-1].handle:
            engine, last = self._engine(job), attempts[-1]
            seen = engine.observe(last.handle)
            self._listen(job, last, engine)  # after looking, so that of the dead nothing is missed
            attempts = self._store.attempts(job.id)
        action = decide(job, attempts, seen, datetime.now(UTC), self._pace)
        self._do(action, job, attempts, seen)

    def _engine(self, job: Job) -> Engine:
        """Find what runs a job."""
        if job.engine not in self._engines:
            raise EngineError(f"The engine {job.engine} is not there.")
        if job.engine in self._mute:  # to ask it again for each job would hold up all others
            raise Unreachable(self._mute[job.engine])
        return self._engines[job.engine]

    def _wait_for(self, job: Job, error: EngineError) -> None:
        """Wait for an engine; but a job that is to stop ends without one that stays away."""
        self._note_mute(job, error)
        self._say(job, str(error))
        if job.desired != "stop":
            return
        since = self._deaf_since.setdefault(job.id, time.monotonic())
        if time.monotonic() - since >= self._pace.saving:
            del self._deaf_since[job.id]
            hint = "Look there, and end it if it runs."
            told = failed("out_of_reach", f"{error} It may still run there.", hint)
            self._do(Finish("stopped", "out_of_reach", told), job, (), None)

    def _note_mute(self, job: Job, error: EngineError) -> None:
        """Keep in mind that an engine does not answer, until the next round."""
        if isinstance(error, Unreachable):
            self._mute[job.engine] = str(error)

    def _say(self, job: Job, phase: str) -> None:
        """Tell what a job waits for."""
        if job.phase != phase:
            self._store.note(job.id, 0, phase=phase)

    def _listen(self, job: Job, attempt: AttemptRow, engine: Engine) -> None:
        """Keep what new events say."""
        heard = self._heard.get((job.id, attempt.n), Heard())
        position, digest = heard.position, heard.digest
        for end, line in engine.events(attempt.handle, heard.position):
            position, digest = end, digest.heard(line)
        # The phase may have been an engine's that was out of reach.
        if digest != heard.digest or (digest.phase and digest.phase != job.phase):
            self._store.note(job.id, attempt.n, **digest.facts())
        self._heard[job.id, attempt.n] = Heard(position, digest)

    def _do(
        self, action: Action, job: Job, attempts: Sequence[AttemptRow], seen: Seen | None
    ) -> None:
        """Do what was decided."""
        match action:
            case Submit():
                held = [slot for slot, holder in self._store.holds().items() if holder == job.id]
                self._submit(job, attempts[-1].n, held)
            case Ask():
                # First ask, then note since when: a crash in between only asks again.
                self._engine(job).stop(attempts[-1].handle)
                if job.state == "running":
                    self._change(job.id, "stopping", stopping_at=utc())
            case Kill():
                log.warning("Job %s is ended by force", job.id)
                self._engine(job).stop(attempts[-1].handle, force=True)
            case Finish(state, outcome, error):
                self._change(job.id, state, attempt=end_of(outcome, seen), error=error)
            case Requeue(outcome, seconds):
                later = from_now(seconds) if seconds else None
                self._change(job.id, "queued", attempt=end_of(outcome, seen), not_before=later)

    def _change(self, job_id: str, state: str, **changes: Any) -> None:
        """Bring a job into another state."""
        job = self._store.transition(job_id, state, **changes)
        if state not in ACTIVE:
            self._heard = {key: heard for key, heard in self._heard.items() if key[0] != job_id}
        log.info("Job %s is %s", job_id, state)
        self._tell(job)

    def _tell(self, job: Job) -> None:
        """Tell all who listen that a job has changed."""
        for listener in self.listeners:
            listener(job)

    def _submit(self, job: Job, n: int, held: Sequence[str]) -> None:
        """Start an attempt that was claimed."""
        try:
            handle = self._engine(job).submit(self._attempt(job, n, held))
        except EngineError as error:  # nothing runs, and it may go later
            self._note_mute(job, error)
            self._say(job, str(error))
            if job.desired == "stop":
                self._change(job.id, "stopped", attempt={"outcome": "not_started"})
        except (OSError, ValueError, KeyError) as error:
            seen = Seen(alive=False, failure=str(error))
            action = after_vanishing(job, self._store.attempts(job.id), seen, self._pace)
            self._do(action, job, (), seen)
        else:
            self._store.confirm(job.id, n, handle)

    def _attempt(self, job: Job, n: int, held: Sequence[str]) -> Attempt:
        """Describe an attempt by what the job's folder holds."""
        folder = self._settings.job(job.id)
        command = json.loads((folder / "command.json").read_bytes())["argv"]
        return Attempt(
            job=job.id,
            n=n,
            command=tuple(command),
            environment=local.environment() | slots.devices(held),
            folder=folder / "attempts" / str(n),
            output=folder / "output",
        )


def end_of(outcome: str | None, seen: Seen | None) -> Record | None:
    """Write down how an attempt ended, if there was one."""
    if outcome is None:
        return None
    return {"outcome": outcome, "exit_code": seen.exit_code if seen else None}
