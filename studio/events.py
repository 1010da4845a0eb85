"""What programs have said: the files of a job's attempts, and everyone who wants to hear of them.

The file is the only truth. A line is known by its position, `attempt.offset behind it`, so that a
reader who was cut off names the last one it has and gets the exact rest. Nothing is queued for
readers: who is slow reads the file later, and costs nothing until then.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from anyio import to_thread
from starlette.responses import StreamingResponse

from studio.engine import TERMINAL
from studio.problems import Problem, problem_at
from studio.series import Series
from studio.store import FINAL, UnknownJob, utc

if TYPE_CHECKING:
    from starlette.types import Message, Send

    from studio.settings import Settings
    from studio.store import Job, Store

log = logging.getLogger("studio")
Record = dict[str, Any]

STREAM = "stdout.jsonl"
CHUNK_BYTES = 64 * 2**10
MOST_LINE_BYTES = 2**20  # the trainer promises 60 KiB
MOST_TEXT = 2_000  # characters of a line that is no event
MOST_RECENT, MOST_WARNINGS, MOST_MESSAGES, MOST_STORIES = 256, 200, 1_000, 32
FLEETING = ("phase", "memory")  # topics that nobody reads again
TICK_SECONDS, STATE_SECONDS, PING_SECONDS, STALL_SECONDS = 0.25, 1.0, 10.0, 30.0
RETRY_MILLISECONDS = 2_000
LISTED = 200  # jobs whose changes are told
# Colours, titles, links and cursor moves of terminals, and what turns the direction of writing.
ESCAPES = re.compile(r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-Z\\-_]?")
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Position(NamedTuple):
    """Where a line ends: in which attempt, and at which byte."""

    attempt: int = 0
    offset: int = 0

    def __str__(self) -> str:
        """Write it as the id of an event."""
        return f"{self.attempt}.{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """Read the id of an event; no id is the beginning."""
        if not text:
            return cls()
        if not re.fullmatch(r"\d{1,9}\.\d{1,15}", text, re.ASCII):
            raise position_refused(text)
        attempt, _, offset = text.partition(".")
        return cls(int(attempt), int(offset))


def position_refused(text: str) -> Problem:
    """Say that no line ends there."""
    expected, hint = "the id of an event of this job", "Leave it out to begin at the beginning."
    problem = problem_at("after", expected, text, hint)
    return Problem(400, "position_unknown", f"No event of this job ends at {text}.", [problem])


@dataclass(frozen=True)
class Line:
    """One event: where it ends, its text, and what that says."""

    position: Position
    text: bytes
    record: Record = field(repr=False)


# --- Reading ---


def attempts_of(folder: Path) -> list[int]:
    """List the attempts of a job, the first one first."""
    found = (folder / "attempts").glob("[0-9]*")
    return sorted(int(path.name) for path in found if path.name.isdecimal())


def check_position(folder: Path, position: Position) -> None:
    """Refuse a position at which no line ends."""
    if position == Position():
        return
    path = folder / "attempts" / str(position.attempt) / STREAM
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, position.offset - 1))
        if not position.offset or file.read(1) == b"\n":
            return
    raise position_refused(str(position))


def lines_after(folder: Path, after: Position) -> tuple[Line, ...]:
    """Read the next lines of a job, at most a chunk of them; none when there are no more."""
    for attempt in attempts_of(folder):
        if attempt < after.attempt:
            continue
        begin = after.offset if attempt == after.attempt else 0
        lines = read_lines(folder / "attempts" / str(attempt) / STREAM, attempt, begin)
        if lines:
            return lines
    return ()


def read_lines(path: Path, attempt: int, offset: int) -> tuple[Line, ...]:
    """Read whole lines of one file, at most a chunk of them, or one that is longer."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(offset)
        piece = file.read(CHUNK_BYTES)
        while b"\n" not in piece:
            more = file.read(CHUNK_BYTES)
            if not more:
                return ()
            piece += more
            if len(piece) > MOST_LINE_BYTES:
                return skip_line(file.read, attempt, offset + len(piece), len(piece))
        return lines_in(piece[: piece.rfind(b"\n") + 1], attempt, offset)
    return ()


@lru_cache(maxsize=64)  # many who read a run from its beginning share the work
def lines_in(piece: bytes, attempt: int, offset: int) -> tuple[Line, ...]:
    """Read the lines of a piece of a file."""
    lines = []
    for text in piece.split(b"\n")[:-1]:
        offset += len(text) + 1
        lines.append(line_of(Position(attempt, offset), text))
    return tuple(lines)


def skip_line(
    read: Callable[[int], bytes], attempt: int, offset: int, size: int
) -> tuple[Line, ...]:
    """Find the end of a line that nobody can want, and say that it was there."""
    while piece := read(CHUNK_BYTES):
        end = piece.find(b"\n") + 1
        size += end or len(piece)
        offset += end or len(piece)
        if end:
            told = wrapped(f"A line of {size:,} bytes was left out.")
            return (Line(Position(attempt, offset), as_text(told), told),)
    return ()


def line_of(position: Position, text: bytes) -> Line:
    """Read a line; what is no event is told as one."""
    stripped = text.strip()
    try:
        record = json.loads(stripped, parse_constant=refuse)
        if isinstance(record, dict) and isinstance(record.get("type"), str):
            inside = stripped if b"\r" not in stripped else as_text(record)
            return Line(position, inside, record)
    except (ValueError, RecursionError):
        pass
    told = wrapped(clean(text.decode("utf-8", "replace")).strip()[:MOST_TEXT])
    return Line(position, as_text(told), told)


def refuse(constant: str) -> Any:
    """Refuse NaN, which no browser reads."""
    raise ValueError(constant)


def wrapped(message: str) -> Record:
    """Make an event of what is none."""
    return {"type": "info", "topic": "stdout", "message": message, "data": {}}


def as_text(record: Record) -> bytes:
    """Write an event as programs do."""
    return json.dumps(record, separators=(",", ":")).encode()


def clean(text: str) -> str:
    """Leave out what would move a cursor, change colours or turn the direction of writing."""
    return CONTROLS.sub("", ESCAPES.sub("", text.replace("\r\n", "\n").replace("\r", "\n")))


def replay(folder: Path) -> Iterator[Line]:
    """Read all that a job has said, from its first attempt on."""
    position = Position()
    while lines := lines_after(folder, position):
        yield from lines
        position = lines[-1].position


# --- What the lines of a job say so far ---


class Recent(NamedTuple):
    """The last lines of a job, and the position before them."""

    before: Position = Position()
    lines: tuple[Line, ...] = ()

    @property
    def end(self) -> Position:
        """Return where they end."""
        return self.lines[-1].position if self.lines else self.before

    def after(self, position: Position) -> tuple[Line, ...] | None:
        """Return what comes behind a position; None if that lies further back."""
        if position == self.before:
            return self.lines
        for index in range(len(self.lines) - 1, -1, -1):
            if self.lines[index].position == position:
                return self.lines[index + 1 :]
        return None


class Story:
    """What a job has said so far. It may be brought up to date from any thread."""

    def __init__(self, folder: Path) -> None:
        """Begin before the first line."""
        self.folder, self.lock, self.recent = folder, threading.Lock(), Recent()
        self.series = Series()
        self.start: Record | None = None
        self.progress: Record | None = None
        self.terminal: Record | None = None  # the last line, where it was one
        self.phase: str | None = None
        self.facts: dict[str, Record] = {}  # what the last info of each topic said
        self.plan: Record | None = None  # of memory, before anything was loaded
        self.messages: deque[Record] = deque(maxlen=MOST_MESSAGES)  # what a person reads again
        self.warnings: list[Record] = []
        self.samples: list[Record] = []
        self.checkpoints: list[Record] = []

    def advance(self) -> Story:
        """Read what has come."""
        with self.lock:
            while lines := lines_after(self.folder, self.recent.end):
                for line in lines:
                    self.take(line.record)
                kept = (*self.recent.lines, *lines)
                cut = max(0, len(kept) - MOST_RECENT)
                before = kept[cut - 1].position if cut else self.recent.before
                self.recent = Recent(before, kept[cut:])
        return self

    def curves(self, points: int) -> Record:
        """Sum up the numbers so far."""
        with self.lock:
            return self.series.summary(points)

    def take(self, line: Record) -> None:
        """Take what a line says."""
        kind = line["type"]
        self.series.take(line)
        self.terminal = line if kind in TERMINAL else None
        if kind == "start":
            self.begin(line)
        elif kind == "progress":
            self.progress = line
        elif kind == "sample":
            self.samples.append(line)
        elif kind == "checkpoint":
            self.checkpoints.append(line)
        elif kind == "warning":
            self.warnings = [*self.warnings[-MOST_WARNINGS + 1 :], line]
        elif kind == "info":
            self.learn(line)
        fleeting = kind == "info" and line.get("topic") in FLEETING
        if kind not in ("start", "progress", "sample") and not fleeting:
            self.messages.append(line)

    def begin(self, line: Record) -> None:
        """Begin another start: what was said of later steps is taken back."""
        resumed = step_of(line, "resumed_step")
        self.start, self.progress, self.phase, self.warnings = line, None, None, []
        self.samples = [each for each in self.samples if step_of(each) <= resumed]
        self.checkpoints = [each for each in self.checkpoints if step_of(each) <= resumed]

    def learn(self, line: Record) -> None:
        """Keep a fact."""
        topic, data = str(line.get("topic")), line.get("data")
        if topic == "stdout" or not isinstance(data, dict):
            return
        self.facts[topic] = data
        if topic == "phase":
            self.phase = str(data.get("name"))
        if topic == "memory" and data.get("phase") == "planning":
            self.plan = data


def step_of(line: Record, name: str = "step") -> int:
    """Return the step that a line is about; 0 where it says none."""
    step = line.get(name)
    return step if isinstance(step, int) else 0


# --- Telling it to everyone who listens ---


@contextmanager
def going_on(what: str) -> Iterator[None]:
    """Let no news that cannot be read be the end of all other; the next tick tries again."""
    try:
        yield
    except Exception as error:  # noqa: BLE001, whatever it is; in a line, as ticks are many
        log.warning("%s cannot be read: %r", what, error)


@dataclass
class Watch:
    """A job that is looked at: by how many, what it has said, and whether that is all."""

    story: Story | None
    readers: int = 0
    seen: tuple[Recent, bool] = (Recent(), False)


class Hub:
    """Looks for news, once for all readers, and wakes them."""

    def __init__(
        self, settings: Settings, store: Store, briefs: Callable[[list[Job]], list[Record]]
    ) -> None:
        """Take where news are found, and how jobs are told of in brief."""
        self.settings, self.store, self.briefs = settings, store, briefs
        self.stories: OrderedDict[str, Story] = OrderedDict()
        self.lock = threading.Lock()
        self.watched: dict[str | None, Watch] = {}
        self.states: dict[str, tuple[int, Record]] = {}  # with the version that they are of
        self.version, self.stale, self.read_at = 0, True, 0.0
        self.closing = False
        self.news = asyncio.Event()

    def story(self, job_id: str) -> Story:
        """Return what a job has said, up to date."""
        with self.lock:
            story = self.stories.pop(job_id, None) or Story(self.settings.job(job_id))
            self.stories[job_id] = story
            while len(self.stories) > MOST_STORIES:
                self.stories.popitem(last=False)
        return story.advance()

    def forget(self, job_id: str) -> None:
        """Forget a job that was deleted."""
        with self.lock:
            self.stories.pop(job_id, None)
        self.states.pop(job_id, None)

    def changed(self) -> None:
        """Have the states of jobs read at the next tick; may be called from any thread."""
        self.stale = True

    async def run(self, ends: Callable[[], bool]) -> None:
        """Look for news until the service ends."""
        while not ends():
            if self.watched:
                with going_on("News"):
                    await to_thread.run_sync(self.look)
                self.wake()
            await asyncio.sleep(TICK_SECONDS)
        self.close()

    def close(self) -> None:
        """Let all readers go."""
        self.closing = True
        self.wake()

    def wake(self) -> None:
        """Wake all who wait."""
        self.news.set()
        self.news = asyncio.Event()

    def look(self) -> None:
        """Look at the states of jobs, and at what those say that someone listens to."""
        if self.stale or time.monotonic() - self.read_at > STATE_SECONDS:
            self.stale, self.read_at = False, time.monotonic()
            self.note(self.store.jobs(limit=LISTED))
        for job_id, watch in list(self.watched.items()):
            if job_id:
                with going_on(f"Job {job_id}"):
                    self.look_at(job_id, watch)

    def look_at(self, job_id: str, watch: Watch) -> None:
        """Look at one job: first at its state, as behind a final one nothing more is said."""
        try:
            job = self.store.job(job_id)
        except UnknownJob:  # it was deleted meanwhile
            watch.seen = (watch.seen[0], True)
            return
        self.note([job])
        watch.story = self.story(job_id)
        watch.seen = (watch.story.recent, job.state in FINAL)

    def note(self, jobs: list[Job]) -> None:
        """Keep the states that have changed."""
        for brief in self.briefs(jobs):
            job_id = brief["job_id"]
            if job_id not in self.states or self.states[job_id][1] != brief:
                self.version += 1
                self.states[job_id] = (self.version, brief)

    def changes(self, since: int) -> list[Record]:
        """List the states that have changed since a version."""
        states = list(self.states.values())
        return [brief for version, brief in states if version > since]

    @contextmanager
    def watching(self, job_id: str | None) -> Iterator[Watch]:
        """Keep an eye on a job for as long as someone listens; on none, for its state alone."""
        watch = self.watched.setdefault(job_id, Watch(None))
        watch.readers += 1
        try:
            yield watch
        finally:
            watch.readers -= 1
            if not watch.readers:
                self.watched.pop(job_id, None)

    async def follow(self, job_id: str | None, after: Position) -> AsyncGenerator[tuple[Line, ...]]:
        """Yield the lines of a job as they come, and none at each tick, until it ends."""
        position = after
        with self.watching(job_id) as watch:
            if job_id:
                await to_thread.run_sync(self.look_at, job_id, watch)
            while not self.closing:
                recent, ended = watch.seen
                lines = recent.after(position)
                if lines is None:  # they lie further back than what is at hand
                    folder = self.settings.job(str(job_id))
                    lines = await to_thread.run_sync(lines_after, folder, position)
                if lines:
                    position = lines[-1].position
                elif ended:
                    return
                yield lines
                if not lines:
                    await self.news.wait()


async def as_events(
    hub: Hub, snapshot: Record, since: int, job_id: str | None, after: Position
) -> AsyncGenerator[bytes]:
    """Tell a page what it shows, and then of all that has changed since it was so."""
    told = time.monotonic()
    yield f"retry: {RETRY_MILLISECONDS}\n\n".encode() + frame("snapshot", as_text(snapshot))
    async with aclosing(hub.follow(job_id, after)) as news:
        async for lines in news:
            version = hub.version  # first, so that a change is told twice rather than never
            frames = [frame("trainer", line.text, str(line.position)) for line in lines]
            frames += [frame("state", as_text(brief)) for brief in hub.changes(since)]
            since = version
            if not frames and time.monotonic() - told > PING_SECONDS:
                frames.append(frame("ping", as_text({"now": utc()})))
            if frames:
                told = time.monotonic()
                yield b"".join(frames)
    if not hub.closing:
        for brief in hub.changes(since):
            yield frame("state", as_text(brief))
        yield frame("end", as_text({"job_id": job_id}))


def frame(event: str, data: bytes, position: str = "") -> bytes:
    """Write one event for an EventSource."""
    mark = f"id: {position}\n" if position else ""
    return f"{mark}event: {event}\ndata: ".encode() + data + b"\n\n"


async def as_lines(
    hub: Hub, job_id: str, after: Position, *, following: bool
) -> AsyncGenerator[bytes]:
    """Yield the lines of a job untouched; those that are there, or also those to come."""
    async with aclosing(hub.follow(job_id, after)) as news:
        async for lines in news:
            if lines:
                yield b"".join(line.text + b"\n" for line in lines)
            elif not following:
                return


class Stream(StreamingResponse):
    """An answer that goes on; a reader who takes nothing for long is given up."""

    def __init__(self, told: AsyncGenerator[bytes], kind: str) -> None:
        """Take what is told."""
        super().__init__(told, media_type=kind, headers={"X-Accel-Buffering": "no"})
        self.told = told

    async def stream_response(self, send: Send) -> None:
        """Send part after part."""

        async def patiently(message: Message) -> None:
            async with asyncio.timeout(STALL_SECONDS):
                await send(message)

        with suppress(TimeoutError):
            async with aclosing(self.told):
                await super().stream_response(patiently)
