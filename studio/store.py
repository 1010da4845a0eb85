"""What the service knows of jobs: SQLite for what is to be and what is; events stay in files.

One connection behind a lock, as writes are rare and short. Every change is one transaction that
looks and writes, so that a crash at any instant leaves a state the reconciler understands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from studio.engine import Record

KINDS = ("train", "caption", "prepare", "generate", "evaluate")
FINAL = ("completed", "stopped", "failed", "cancelled")
ACTIVE = ("running", "stopping")
SIDE_JOBS = 2  # jobs without a slot that may run at once
ELSEWHERE = 1  # other engines have queues of their own: there is always room for one more

# One script per version of the database; a database of version n has had the first n.
SCHEMA = (
    """
    CREATE TABLE jobs(
      id TEXT PRIMARY KEY,
      kind TEXT NOT NULL CHECK(kind IN('train','caption','prepare','generate','evaluate')),
      name TEXT NOT NULL,
      config TEXT NOT NULL CHECK(json_valid(config)),
      state TEXT NOT NULL DEFAULT 'queued' CHECK(state IN(
        'queued','running','stopping','completed','stopped','failed','cancelled')),
      desired TEXT NOT NULL DEFAULT 'run' CHECK(desired IN('run','hold','stop')),
      slots INTEGER NOT NULL DEFAULT 1 CHECK(slots >= 0),
      priority INTEGER NOT NULL DEFAULT 0,
      parent TEXT,                       -- the job whose result this one is about
      engine TEXT NOT NULL DEFAULT 'local',
      idempotency_key TEXT UNIQUE,
      request_hash TEXT,
      notify_url TEXT,
      phase TEXT,                        -- these five are read from events, and only kept here
      step INTEGER,
      total_steps INTEGER,
      progress TEXT CHECK(progress IS NULL OR json_valid(progress)),
      final TEXT CHECK(final IS NULL OR json_valid(final)),
      continues_from TEXT,
      error TEXT CHECK(error IS NULL OR json_valid(error)),
      created_at TEXT NOT NULL,
      queued_at TEXT NOT NULL,
      not_before TEXT,
      started_at TEXT,
      stopping_at TEXT,
      ended_at TEXT
    ) STRICT;
    CREATE INDEX queue ON jobs(state, priority DESC, queued_at);
    CREATE TABLE attempts(
      job TEXT NOT NULL REFERENCES jobs(id) ON DELETE CASCADE,
      n INTEGER NOT NULL,
      handle TEXT NOT NULL DEFAULT '',   -- empty until the engine has confirmed the start
      started_at TEXT NOT NULL,
      left_at TEXT,                      -- when the service ended in order while this ran
      ended_at TEXT,
      exit_code INTEGER,
      outcome TEXT,
      first_step INTEGER,
      last_step INTEGER,
      PRIMARY KEY(job, n)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE holds(
      slot TEXT PRIMARY KEY,
      job TEXT NOT NULL REFERENCES jobs(id)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE sessions(
      hash TEXT PRIMARY KEY,
      created_at TEXT NOT NULL,
      expires_at TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    """,
)
PARSED = ("config", "progress", "final", "error")

# Higher priority first, then who came first; who was interrupted has kept its place.
QUEUE_ORDER = "priority DESC, queued_at, id"


class UnknownJob(KeyError):
    """No job has this id."""


class StateConflict(Exception):
    """What was asked for does not go with the state that a job is in."""


class DatabaseTooNew(Exception):
    """The database was written by a newer version of this program."""


@dataclass(frozen=True)
class Job:
    """A row of jobs."""

    id: str
    kind: str
    name: str
    config: Record
    state: str = "queued"
    desired: str = "run"  # what the user wants: run, hold or stop
    slots: int = 1
    priority: int = 0
    parent: str | None = None
    engine: str = "local"
    idempotency_key: str | None = None
    request_hash: str | None = None
    notify_url: str | None = None
    phase: str | None = None
    step: int | None = None
    total_steps: int | None = None
    progress: Record | None = None  # the last progress line
    final: Record | None = None  # the line `complete`
    continues_from: str | None = None
    error: Record | None = None  # code, message, hint, problems; tail of stderr where it vanished
    created_at: str = ""
    queued_at: str = ""
    not_before: str | None = None
    started_at: str | None = None
    stopping_at: str | None = None
    ended_at: str | None = None


@dataclass(frozen=True)
class AttemptRow:
    """A row of attempts."""

    job: str
    n: int
    handle: str
    started_at: str
    left_at: str | None = None
    ended_at: str | None = None
    exit_code: int | None = None
    outcome: str | None = None  # complete, interrupted, error, vanished, rebooted
    first_step: int | None = None
    last_step: int | None = None


@dataclass(frozen=True)
class Claim:
    """A job that was given its slots."""

    job: Job
    n: int
    slots: tuple[str, ...]


class Ids:
    """Makes ids of 26 letters and digits that sort by time: 48 bits of it, 80 random ones."""

    def __init__(self) -> None:
        """Begin."""
        self._lock, self._last = threading.Lock(), 0

    def __call__(self) -> str:
        """Make one that is behind all before it, also within a millisecond."""
        with self._lock:
            fresh = int(time.time() * 1000) << 80 | secrets.randbits(80)
            self._last = number = max(fresh, self._last + 1)
        alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
        return "".join(alphabet[number >> shift & 31] for shift in range(125, -1, -5))


new_id = Ids()


def utc(moment: datetime | None = None) -> str:
    """Write a time, by default the present one, as events do."""
    text = (moment or datetime.now(UTC)).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def from_now(seconds: float) -> str:
    """Write the time so many seconds away."""
    return utc(datetime.now(UTC) + timedelta(seconds=seconds))


def as_row(job: Job) -> Record:
    """Write a job for the database."""
    values = dataclasses.asdict(job)
    return values | encoded({name: values[name] for name in PARSED})


def encoded(values: Record) -> Record:
    """Write as JSON what the database keeps as JSON."""
    return {
        name: json.dumps(value) if name in PARSED and value is not None else value
        for name, value in values.items()
    }


def as_job(row: sqlite3.Row) -> Job:
    """Read a job from the database."""
    values = dict(row)
    for name in PARSED:
        if values[name] is not None:
            values[name] = json.loads(values[name])
    return Job(**values)


class Store:
    """The database. Its methods may be called from any thread."""

    def __init__(self, path: Path) -> None:
        """Open the database, and bring it to the present version."""
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        for setting in (
            "journal_mode=WAL",
            "synchronous=FULL",  # what was accepted has to survive a power cut
            "foreign_keys=ON",
            "busy_timeout=5000",
        ):
            self._db.execute(f"PRAGMA {setting}")
        self._migrate()

    def _migrate(self) -> None:
        """Run the scripts that this database has not had."""
        with self.writing() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > len(SCHEMA):
                raise DatabaseTooNew(
                    f"studio.db: expected a database of version {len(SCHEMA)} or older, "
                    f"got {version}. Use the newer studio that wrote it, or another --root."
                )
            for script in SCHEMA[version:]:
                for statement in script.split(";"):
                    db.execute(statement)
            db.execute(f"PRAGMA user_version={len(SCHEMA)}")

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Make one transaction of what is done inside, which from its start nobody disturbs."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """Read."""
        with self._lock:
            return self._db.execute(query, values).fetchall()

    # --- Jobs ---

    def insert(self, job: Job) -> Job:
        """Add a job, and return it as it is kept.

        Where a job with the same idempotency key is there, that one is returned: who asks compares
        ids and request hashes.
        """
        now = utc()
        row = as_row(dataclasses.replace(job, created_at=now, queued_at=now))
        names, marks = ", ".join(row), ", ".join("?" * len(row))
        with self.writing() as db:
            db.execute(
                f"INSERT INTO jobs({names}) VALUES({marks}) "
                "ON CONFLICT(idempotency_key) DO NOTHING",
                tuple(row.values()),
            )
            kept = db.execute(
                "SELECT * FROM jobs WHERE id = ? OR idempotency_key = ?",
                (job.id, job.idempotency_key),
            ).fetchone()
        return as_job(kept)

    def job(self, job_id: str) -> Job:
        """Read one job."""
        rows = self._rows("SELECT * FROM jobs WHERE id = ?", job_id)
        if not rows:
            raise UnknownJob(job_id)
        return as_job(rows[0])

    def job_with_key(self, key: str) -> Job | None:
        """Find the job that a request with this idempotency key has made."""
        rows = self._rows("SELECT * FROM jobs WHERE idempotency_key = ?", key)
        return as_job(rows[0]) if rows else None

    def jobs(
        self,
        state: str | None = None,
        kind: str | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> list[Job]:
        """Read the newest jobs, of one state or kind, or those older than one."""
        rows = self._rows(
            "SELECT * FROM jobs WHERE (?1 IS NULL OR state = ?1) AND (?2 IS NULL OR kind = ?2) "
            "AND (?3 IS NULL OR id < ?3) ORDER BY id DESC LIMIT ?4",
            *(state, kind, before, limit),
        )
        return [as_job(row) for row in rows]

    def active(self) -> list[Job]:
        """Read the jobs that have an attempt under way."""
        rows = self._rows("SELECT * FROM jobs WHERE state IN ('running', 'stopping') ORDER BY id")
        return [as_job(row) for row in rows]

    def queue(self) -> list[Job]:
        """Read the jobs that wait, in the order of their turns."""
        order = f"SELECT * FROM jobs WHERE state = 'queued' ORDER BY {QUEUE_ORDER}"
        return [as_job(row) for row in self._rows(order)]

    def position(self, job_id: str) -> int | None:
        """Tell the how manieth a job is in the queue, from 1."""
        waiting = [job.id for job in self.queue()]
        return waiting.index(job_id) + 1 if job_id in waiting else None

    def counts(self) -> dict[tuple[str, str], int]:
        """Count the jobs of each kind and state."""
        rows = self._rows("SELECT kind, state, count(*) FROM jobs GROUP BY kind, state")
        return {(kind, state): count for kind, state, count in rows}

    def attempts(self, job_id: str) -> list[AttemptRow]:
        """Read the attempts of a job, oldest first."""
        rows = self._rows("SELECT * FROM attempts WHERE job = ? ORDER BY n", job_id)
        return [AttemptRow(**dict(row)) for row in rows]

    def holds(self) -> dict[str, str]:
        """Tell which slots are taken, and by which job."""
        return {slot: job for slot, job in self._rows("SELECT slot, job FROM holds")}  # noqa: C416

    # --- What users ask for ---

    def request_stop(self, job_id: str) -> Job:
        """Note that a job is to stop; one that has ended stays as it is."""
        return self._ask(
            job_id, "state NOT IN ('completed','stopped','failed','cancelled')", "stop"
        )

    def hold(self, job_id: str) -> Job:
        """Let a waiting job wait until someone resumes it."""
        return self._ask(job_id, "state = 'queued'", "hold")

    def _ask(self, job_id: str, where: str, desired: str) -> Job:
        """Note what a user wants of a job, if its state is such."""
        with self.writing() as db:
            db.execute(f"UPDATE jobs SET desired = ? WHERE id = ? AND {where}", (desired, job_id))
        return self.job(job_id)

    def resume(self, job_id: str, config: Record | None = None) -> Job:
        """Queue a job that has ended once more, perhaps with another config, or end its hold."""
        with self.writing() as db:
            job = self.job(job_id)
            if job.state in ACTIVE or (job.state, job.desired) == ("queued", "stop"):
                raise StateConflict(f"{job_id} is {job.state}")
            changes: Record = {"state": "queued", "desired": "run", "not_before": None}
            if job.state in FINAL:
                changes |= {"queued_at": utc(), "ended_at": None, "error": None, "phase": None}
            if config is not None:
                changes["config"] = config
            self._set(db, job_id, changes)
        return self.job(job_id)

    def change(self, job_id: str, **changes: Any) -> Job:
        """Give a job another name or priority."""
        with self.writing() as db:
            self.job(job_id)
            self._set(db, job_id, changes)
        return self.job(job_id)

    def delete(self, job_id: str) -> None:
        """Forget a job that has ended."""
        with self.writing() as db:
            job = self.job(job_id)
            if job.state not in FINAL:
                raise StateConflict(f"{job_id} is {job.state}")
            db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))

    # --- What the reconciler does ---

    def claim(self, slots: Sequence[str]) -> Claim | None:
        """Start the next attempt of the first job whose turn it is, if its slots are free.

        Nobody passes a job that waits for slots, or one that needs many would never get them.
        """
        with self.writing() as db:
            taken = self.holds()
            free = [slot for slot in slots if slot not in taken]
            side = SIDE_JOBS - sum(job.engine == "local" and not job.slots for job in self.active())
            due = "state = 'queued' AND desired = 'run' AND coalesce(not_before, '') <= ?"
            for sort, enough in (
                ("engine = 'local' AND slots > 0", len(free)),
                ("engine = 'local' AND slots = 0", side),
                ("engine <> 'local'", ELSEWHERE),
            ):
                row = db.execute(
                    f"SELECT * FROM jobs WHERE {due} AND {sort} ORDER BY {QUEUE_ORDER} LIMIT 1",
                    (utc(),),
                ).fetchone()
                needs = row["slots"] if row and row["engine"] == "local" else 0
                if row and enough >= max(1, needs):
                    return self._start(db, as_job(row), tuple(free[:needs]))
        return None

    def _start(self, db: sqlite3.Connection, job: Job, slots: tuple[str, ...]) -> Claim:
        """Give a job its slots and its next attempt."""
        now = utc()
        last = db.execute("SELECT max(n) FROM attempts WHERE job = ?", (job.id,)).fetchone()[0]
        n = (last or 0) + 1
        db.executemany("INSERT INTO holds VALUES(?, ?)", [(slot, job.id) for slot in slots])
        db.execute("INSERT INTO attempts(job, n, started_at) VALUES(?, ?, ?)", (job.id, n, now))
        changes: Record = {"state": "running", "not_before": None, "stopping_at": None}
        changes |= {"phase": None, "final": None, "error": None, "continues_from": None}
        changes["started_at"] = job.started_at or now
        self._set(db, job.id, changes)
        return Claim(self.job(job.id), n, slots)

    def confirm(self, job_id: str, n: int, handle: str) -> None:
        """Note by which word the engine knows an attempt that it has started."""
        with self.writing() as db:
            db.execute(
                "UPDATE attempts SET handle = ? WHERE job = ? AND n = ?", (handle, job_id, n)
            )

    def note(self, job_id: str, n: int, **facts: Any) -> None:
        """Keep what events say of a job and its attempt."""
        steps: Record = {}
        for name in facts.keys() & {"first_step", "last_step"}:
            steps[name] = facts.pop(name)
        with self.writing() as db:
            if facts:
                self._set(db, job_id, facts)
            if steps:
                self._set_attempt(db, job_id, n, steps)

    def transition(
        self, job_id: str, state: str, *, attempt: Record | None = None, **changes: Any
    ) -> Job:
        """Bring a job into another state; with what is known of its last attempt, end that.

        Whatever is neither running nor stopping holds no slot from then on.
        """
        with self.writing() as db:
            job = self.job(job_id)
            if job.state in FINAL:
                raise StateConflict(f"{job_id} is {job.state}")
            self._set(db, job_id, {"state": state, **changes})
            if state not in ACTIVE:
                db.execute("DELETE FROM holds WHERE job = ?", (job_id,))
            if state in FINAL:
                self._set(db, job_id, {"ended_at": utc()})
            if attempt is not None:
                last = self.attempts(job_id)[-1].n
                self._set_attempt(db, job_id, last, {"ended_at": utc(), **attempt})
        return self.job(job_id)

    def leave(self) -> None:
        """Note that the service ends in order: who stops an attempt soon after may be the same."""
        with self.writing() as db:
            db.execute("UPDATE attempts SET left_at = ? WHERE ended_at IS NULL", (utc(),))

    def check_writable(self) -> None:
        """Write something, and fail as all writing would."""
        with self.writing() as db:
            db.execute(f"PRAGMA user_version={len(SCHEMA)}")

    def hold_all(self) -> None:
        """Let all jobs that wait do so until someone resumes them."""
        with self.writing() as db:
            db.execute("UPDATE jobs SET desired='hold' WHERE state='queued' AND desired='run'")

    def _set(self, db: sqlite3.Connection, job_id: str, changes: Record) -> None:
        """Write some values of a job."""
        names = ", ".join(f"{name} = ?" for name in changes)
        values = encoded(changes).values()
        db.execute(f"UPDATE jobs SET {names} WHERE id = ?", (*values, job_id))

    def _set_attempt(self, db: sqlite3.Connection, job_id: str, n: int, changes: Record) -> None:
        """Write some values of an attempt."""
        names = ", ".join(f"{name} = ?" for name in changes)
        values = (*changes.values(), job_id, n)
        db.execute(f"UPDATE attempts SET {names} WHERE job = ? AND n = ?", values)

    # --- Sessions of browsers; only hashes are kept ---

    def open_session(self, digest: str, seconds: float) -> None:
        """Keep a session for so long, and forget those that are over."""
        with self.writing() as db:
            db.execute("DELETE FROM sessions WHERE expires_at <= ?", (utc(),))
            db.execute("INSERT INTO sessions VALUES(?, ?, ?)", (digest, utc(), from_now(seconds)))

    def has_session(self, digest: str) -> bool:
        """Tell whether a session is open."""
        query = "SELECT 1 FROM sessions WHERE hash = ? AND expires_at > ?"
        return bool(self._rows(query, digest, utc()))

    def close_session(self, digest: str) -> None:
        """End a session."""
        with self.writing() as db:
            db.execute("DELETE FROM sessions WHERE hash = ?", (digest,))
