"""What programs have said: lines and their positions, curves, and streams to many readers."""

from __future__ import annotations

import asyncio
import errno
import json
import random
import subprocess
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import pytest
from acting import acting, is_in, status_when, submitted, wanted
from hypothesis import example, given
from hypothesis import strategies as st

from studio import events, status
from studio.events import Hub, Line, Position, Story, lines_after, replay
from studio.problems import Problem
from studio.series import Series
from studio.store import Job, Store, new_id

if TYPE_CHECKING:
    from serving import Served

    from studio.settings import Settings

Record = dict[str, Any]
Found = TypeVar("Found")


def run(reading: Coroutine[Any, Any, Found]) -> Found:
    """Read to the end, and fail where that does not come."""
    return asyncio.run(asyncio.wait_for(reading, 120))


def said(step: int, **more: Any) -> Record:
    """Make a progress line."""
    head = {"type": "progress", "seq": step, "timestamp": "t", "message": f"Step {step}"}
    return {**head, "step": step, "total_steps": 1_000, "loss": 1 / (step + 1), **more}


def write_attempt(folder: Path, n: int, *lines: Record | bytes) -> Path:
    """Write what an attempt has said."""
    path = folder / "attempts" / str(n) / "stdout.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        for line in lines:
            file.write(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n")
    return path


def rest(folder: Path, position: Position) -> list[Line]:
    """Read all lines behind a position."""
    found: list[Line] = []
    while lines := lines_after(folder, position):
        found += lines
        position = lines[-1].position
    return found


# --- Lines ---


def test_every_position_gives_the_exact_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A4: after each of 500 lines, what follows is what was not yet told, over two attempts."""
    monkeypatch.setattr(events, "CHUNK_BYTES", 2_000)  # a few lines at a time
    write_attempt(tmp_path, 1, *(said(step) for step in range(300)))
    write_attempt(tmp_path, 2, *(said(step) for step in range(300, 500)))
    lines = list(replay(tmp_path))
    texts = [line.text for line in lines]
    assert [json.loads(text)["step"] for text in texts] == list(range(500))
    for number, line in enumerate(lines, start=1):
        events.check_position(tmp_path, line.position)
        following = [each.text for each in lines_after(tmp_path, line.position)]
        assert following == texts[number : number + len(following)]
        assert following or number == 500
    for number in range(0, 500, 50):
        behind = [each.text for each in rest(tmp_path, lines[number].position)]
        assert behind == texts[number + 1 :]


def test_the_middle_of_a_line_is_no_position(tmp_path: Path) -> None:
    """A4: a reader with a wrong id is told so, and gets no half of a line."""
    path = write_attempt(tmp_path, 1, said(1), said(2))
    size = path.stat().st_size
    for text in ("1.3", f"1.{size + 1}", "2.10", "0.5", "x", "1", "1.2.3", "-1.0", "1.x"):
        with pytest.raises(Problem) as caught:
            events.check_position(tmp_path, Position.parse(text))
        assert (caught.value.status, caught.value.code) == (400, "position_unknown")
    for text in ("", "1.0", f"1.{size}"):
        events.check_position(tmp_path, Position.parse(text))


def test_a_line_that_has_no_end_yet_waits(tmp_path: Path) -> None:
    """Half a line is not told; the whole one is, once."""
    write_attempt(tmp_path, 1, said(1), b'{"type":"pro')
    first = lines_after(tmp_path, Position())
    assert len(first) == 1
    assert not lines_after(tmp_path, first[-1].position)
    write_attempt(tmp_path, 1, b'gress"}\n')
    (second,) = lines_after(tmp_path, first[-1].position)
    assert second.text == b'{"type":"progress"}'


def test_a_torn_line_does_not_hold_up_the_next_attempt(tmp_path: Path) -> None:
    """What a killed program began to say is passed over."""
    write_attempt(tmp_path, 1, said(1), b'{"type":"pro')
    write_attempt(tmp_path, 2, said(2))
    assert [line.record["step"] for line in replay(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"hello\n", "hello"),
        (b"\n", ""),
        (b'{"type":1}\n', '{"type":1}'),
        (b"[1]\n", "[1]"),
        (b'{"type":"x","loss":NaN}\n', '{"type":"x","loss":NaN}'),
        (b"\xff\xfe\n", "\ufffd\ufffd"),
        (b"\x1b[31mred\x1b[0m \x1b]8;;http://evil.example\x07link\x1b]8;;\x07\n", "red link"),
        ("a\u202eb\u2066c\n".encode(), "abc"),
        (b"\x1b]0;title\x1b\\done\x07\n", "done"),
        (b"[" * 100_000 + b"\n", "[" * 2_000),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_event_is_told_as_one(tmp_path: Path, text: bytes, message: str) -> None:
    """S21: noise on stdout is shown as text, without what moves cursors or makes links."""
    write_attempt(tmp_path, 1, text, said(1))
    noise, event = replay(tmp_path)
    assert (noise.record["topic"], noise.record["message"]) == ("stdout", message)
    assert json.loads(noise.text) == noise.record
    assert event.record["step"] == 1


def test_an_event_is_told_untouched(tmp_path: Path) -> None:
    """Order of keys, spaces and escapes stay as the program wrote them."""
    line = b'{"type": "info",  "topic":"x", "z":1.50, "a":"\\u00e9"}'
    write_attempt(tmp_path, 1, line + b"\n", b'{"type":\r"info"}\n')
    plain, other = replay(tmp_path)
    assert plain.text == line
    assert b"\r" not in other.text  # it would end a line of an event stream


@pytest.mark.parametrize("size", [events.CHUNK_BYTES - 1, events.CHUNK_BYTES * 3, 10 * 2**20])
def test_a_line_of_any_length_is_passed(tmp_path: Path, size: int) -> None:
    """S21: a line of ten megabytes is named rather than kept, and what follows is told."""
    write_attempt(tmp_path, 1, b"x" * size + b"\n", said(1))
    long, event = replay(tmp_path)
    assert len(long.text) < 5_000
    assert event.record["step"] == 1
    assert event.position.offset > size


def test_a_line_without_end_is_waited_for(tmp_path: Path) -> None:
    """Megabytes without a line break say nothing yet."""
    write_attempt(tmp_path, 1, b"x" * (3 * 2**20))
    assert not lines_after(tmp_path, Position())


@example([b"a\rb", b"\x0b\x0c\x1c\x85", b"{}\r", b""])
@given(st.lists(st.binary(max_size=60), max_size=30))
def test_whatever_is_written_is_read_in_order(tmp_path_factory: Any, pieces: list[bytes]) -> None:
    """Any bytes give as many lines as they have line breaks, each of them JSON."""
    folder = tmp_path_factory.mktemp("any")
    content = b"\n".join(pieces)
    write_attempt(folder, 1, content)
    lines = list(replay(folder))
    assert len(lines) == content.count(b"\n")
    assert [line.position.offset for line in lines] == ends(content)
    assert all(json.loads(line.text)["type"] for line in lines)


def ends(content: bytes) -> list[int]:
    """List where lines end."""
    return [place + 1 for place, byte in enumerate(content) if byte == 10]


# --- Stories ---


def start(resumed: int) -> Record:
    """Make a start line."""
    return {"type": "start", "resumed_step": resumed, "total_steps": 1_000, "config": {}}


def sample(step: int) -> Record:
    """Make a sample line."""
    return {"type": "sample", "step": step, "image_path": f"/x/step_{step}.png", "prompt": "zkb"}


def test_a_start_takes_back_what_was_said_of_later_steps(tmp_path: Path) -> None:
    """What is made again is told again; curves, samples and checkpoints hold it once."""
    lines = [said(step) for step in range(1, 11)]
    write_attempt(tmp_path, 1, start(0), *lines, sample(4), sample(8))
    story = Story(tmp_path).advance()
    assert [each["step"] for each in story.samples] == [4, 8]
    write_attempt(tmp_path, 2, start(5), said(6), said(7), sample(8))
    story.advance()
    assert [each["step"] for each in story.samples] == [4, 8]
    told = story.curves(1_000)
    assert told["steps"] == [1, 2, 3, 4, 5, 6, 7]
    assert told["sessions"] == [
        {"from": 0, "to": 10, "kept_to": 5},
        {"from": 5, "to": 7, "kept_to": 7},
    ]


def test_a_story_read_in_pieces_is_the_same(tmp_path: Path) -> None:
    """Reading as it comes gives what reading at once gives."""
    source = [start(0), *(said(step) for step in range(1, 700)), sample(5)]
    grown = Story(tmp_path / "grown")
    for begin in range(0, len(source), 37):
        write_attempt(tmp_path / "grown", 1, *source[begin : begin + 37])
        grown.advance()
    write_attempt(tmp_path / "whole", 1, *source)
    whole = Story(tmp_path / "whole").advance()
    assert grown.curves(50) == whole.curves(50)
    assert grown.recent.end == whole.recent.end
    assert [line.text for line in grown.recent.lines] == [line.text for line in whole.recent.lines]
    assert len(whole.recent.lines) == events.MOST_RECENT


def test_a_story_keeps_what_pages_show(tmp_path: Path) -> None:
    """Facts by topic, the plan of memory, warnings of this start, messages of all."""
    warning = {"type": "warning", "code": "x", "message": "Look", "data": {}}
    planning = {"phase": "planning", "planned_bytes": 1}
    facts = [{"type": "info", "topic": "memory", "data": planning, "message": "m"}]
    facts.append({"type": "info", "topic": "memory", "data": {"phase": "loading"}, "message": "m"})
    facts.append({"type": "info", "topic": "phase", "data": {"name": "encoding"}, "message": "m"})
    write_attempt(tmp_path, 1, start(0), warning, *facts, said(1))
    story = Story(tmp_path).advance()
    assert (story.plan, story.phase) == (planning, "encoding")
    assert story.warnings == list(story.messages) == [warning]
    write_attempt(tmp_path, 2, start(1), {"type": "complete", "message": "Done"})
    story.advance()
    assert (story.warnings, [line["type"] for line in story.messages]) == (
        [],
        ["warning", "complete"],
    )
    assert story.terminal == {"type": "complete", "message": "Done"}


# --- Curves ---


def summary(values: list[float], points: int, total: int = 0) -> Record:
    """Sum up a loss that has a value at every step."""
    series = Series(total_steps=total)
    for step, value in enumerate(values, start=1):
        series.take({"type": "progress", "step": step, "total_steps": total or None, "loss": value})
    return series.summary(points)


@pytest.mark.parametrize("points", [2, 7, 64, 800])
def test_buckets_hold_every_extreme(points: int) -> None:
    """A8: least, greatest and mean of each bucket are what brute force finds."""
    numbers = random.Random(1)
    values = [numbers.gauss(0, 1) for _ in range(1_000)]
    told = summary(values, points)
    assert len(told["steps"]) <= points
    edges = [0, *told["steps"]]
    for number, (begin, end) in enumerate(zip(edges, told["steps"], strict=False)):
        inside = values[begin:end]
        assert told["series"]["loss"]["min"][number] == min(inside)
        assert told["series"]["loss"]["max"][number] == max(inside)
        assert told["series"]["loss"]["mean"][number] == pytest.approx(sum(inside) / len(inside))


def test_buckets_never_move_while_a_curve_grows() -> None:
    """A8: what has been drawn stays where it is, to the end of the run."""
    numbers = random.Random(2)
    values = [numbers.random() for _ in range(1_000)]
    before = summary(values[:300], 100, total=1_000)
    for count in (301, 450, 999, 1_000):
        after = summary(values[:count], 100, total=1_000)
        kept = len(before["steps"]) - 1  # the last one may be filling up
        assert after["steps"][:kept] == before["steps"][:kept]
        for name in ("min", "max", "mean"):
            assert after["series"]["loss"][name][:kept] == before["series"]["loss"][name][:kept]
        before = after


def test_what_is_no_number_is_no_point() -> None:
    """Unknown, infinite and wrong values leave gaps rather than wrong points."""
    series = Series()
    wrong: list[Any] = [None, "0.5", float("nan"), float("inf"), [], {}]
    for step, value in enumerate(wrong, start=1):
        series.take({"type": "progress", "step": step, "loss": value})
    series.take({"type": "progress", "step": "7", "loss": 1.0})
    series.take({"type": "progress"})
    assert series.summary(10) == {"steps": [], "series": {}, "sessions": []}


def test_the_validation_loss_is_a_curve_of_its_own() -> None:
    """Where it was not measured, it is null beside the loss."""
    series = Series()
    for step in (1, 2, 3):
        series.take(said(step))
    series.take({"type": "validation", "step": 2, "loss": 0.5})
    told = series.summary(1_000)
    assert told["series"]["validation_loss"]["mean"] == [None, 0.5, None]


# --- Many readers ---


@pytest.fixture
def watched(settings: Settings, store: Store) -> Job:
    """Provide a running job that has said something."""
    job = store.insert(Job(new_id(), "train", "A run", {}, state="running"))
    write_attempt(settings.job(job.id), 1, start(0), *(said(step) for step in range(1, 4)))
    return job


def hub_of(settings: Settings, store: Store) -> Hub:
    """Make a hub."""
    return Hub(settings, store, lambda jobs: status.briefs(store, jobs))


async def collect(hub: Hub, job: Job, after: Position = Position()) -> list[Line]:  # noqa: B008, it is frozen
    """Read all lines of a job as they come."""
    return [line async for lines in hub.follow(job.id, after) for line in lines]


def test_fifty_readers_cost_one_read(
    settings: Settings, store: Store, watched: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A7: all of them get every line, and the file is read once for all."""
    reads, read = [], events.read_lines

    def counted(path: Path, attempt: int, offset: int) -> tuple[Line, ...]:
        found = read(path, attempt, offset)
        reads.append(len(found))
        return found

    monkeypatch.setattr(events, "read_lines", counted)
    lines = run(read_by_many(settings, store, watched, 50))
    assert {len(each) for each in lines} == {104}
    assert len({tuple(line.position for line in each) for each in lines}) == 1
    assert sum(reads) == 104


async def read_by_many(settings: Settings, store: Store, job: Job, count: int) -> list[list[Line]]:
    """Let many read while a job goes on, and ends."""
    hub, over = hub_of(settings, store), False
    looking = asyncio.create_task(hub.run(lambda: over))
    readers = [asyncio.create_task(collect(hub, job)) for _ in range(count)]
    for step in range(4, 104, 10):
        await asyncio.sleep(0.1)
        write_attempt(settings.job(job.id), 1, *(said(step + more) for more in range(10)))
    store.transition(job.id, "completed")
    found = await asyncio.wait_for(asyncio.gather(*readers), 30)
    over = True
    await looking
    assert not hub.watched
    return found


def test_a_slow_reader_holds_up_nobody_and_misses_nothing(
    settings: Settings, store: Store, watched: Job
) -> None:
    """A7: who falls behind what is kept at hand reads on in the file."""

    async def read() -> tuple[list[Line], list[Line]]:
        hub, over = hub_of(settings, store), False
        looking = asyncio.create_task(hub.run(lambda: over))
        slow: list[Line] = []

        async def read_slowly() -> None:
            async for lines in hub.follow(watched.id, Position()):
                slow.extend(lines)
                await asyncio.sleep(0.7)

        tasks = [asyncio.create_task(read_slowly()), asyncio.create_task(collect(hub, watched))]
        for step in range(4, 2_004, 500):
            write_attempt(settings.job(watched.id), 1, *(said(step + n) for n in range(500)))
            await asyncio.sleep(0.3)
        store.transition(watched.id, "completed")
        quick = await asyncio.wait_for(tasks[1], 30)
        await asyncio.wait_for(tasks[0], 30)
        over = True
        await looking
        assert isinstance(quick, list)
        return slow, quick

    slow, quick = run(read())
    steps = [line.record.get("step") for line in quick]
    assert steps == [None, *range(1, 2_004)]
    assert [line.position for line in slow] == [line.position for line in quick]


def test_the_end_of_the_service_lets_readers_go(
    settings: Settings, store: Store, watched: Job
) -> None:
    """P12: an open stream ends within a tick or two of the wish to end."""

    async def read() -> float:
        hub = hub_of(settings, store)
        looking = asyncio.create_task(hub.run(lambda: begun + 0.5 < time.monotonic()))
        begun = time.monotonic()
        await asyncio.gather(collect(hub, watched), looking)
        return time.monotonic() - begun

    assert run(read()) < 10


def test_what_cannot_be_read_ends_no_news(
    settings: Settings, store: Store, watched: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails for a while, and one job that always fails, leave the others their news."""
    other = store.insert(Job(new_id(), "train", "Another", {}, state="running"))
    failures = iter(["states"])
    jobs, look_at = store.jobs, Hub.look_at

    def failing_once(**options: Any) -> list[Job]:
        if next(failures, None):
            raise OSError(errno.EMFILE, "Too many open files")
        return jobs(**options)

    def failing_for_one(hub: Hub, job_id: str, watch: events.Watch) -> None:
        if job_id == other.id:
            raise OSError(errno.EIO, "Input/output error")
        look_at(hub, job_id, watch)

    async def read() -> int:
        hub = hub_of(settings, store)
        looking = asyncio.create_task(hub.run(lambda: False))
        with hub.watching(other.id):
            reader = asyncio.create_task(collect(hub, watched))
            await asyncio.sleep(0.5)
            store.transition(watched.id, "stopped")
            found = await asyncio.wait_for(reader, 10)
        looking.cancel()
        return len(found)

    monkeypatch.setattr(store, "jobs", failing_once)
    monkeypatch.setattr(Hub, "look_at", failing_for_one)
    assert run(read()) == 4
    assert next(failures, None) is None


def test_a_job_deleted_under_its_readers_ends_their_streams(
    settings: Settings, store: Store, watched: Job
) -> None:
    """Who watches a job that goes away is let go."""

    async def read() -> int:
        hub = hub_of(settings, store)
        looking = asyncio.create_task(hub.run(lambda: False))
        reader = asyncio.create_task(collect(hub, watched))
        await asyncio.sleep(0.5)
        store.transition(watched.id, "stopped")
        store.delete(watched.id)
        found = await asyncio.wait_for(reader, 10)
        looking.cancel()
        return len(found)

    assert run(read()) == 4


# --- Through HTTP ---


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Provide a studio that the tests below share."""
    with acting(tmp_path_factory.mktemp("events")) as served:
        yield served


def frames(text: str) -> list[dict[str, str]]:
    """Read an event stream as a browser does."""
    found = []
    for block in text.split("\n\n"):
        pairs = [line.partition(": ")[::2] for line in block.splitlines() if line]
        found.append(dict(pairs))
    return [frame for frame in found if "event" in frame]


@pytest.fixture(scope="module")
def finished(studio: Served) -> str:
    """Provide a training that is complete."""
    job = submitted(studio)
    status_when(studio, job, is_in("completed"))
    return job


def test_a_page_hears_of_a_run_from_its_first_line_to_its_end(studio: Served) -> None:
    """First how all stands, then each line with its position, then that it is over."""
    job = submitted(studio)
    with studio.client.stream("GET", f"/events?job={job}") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = frames("".join(answer.iter_text()))
    kinds = [frame["event"] for frame in told]
    assert (kinds[0], kinds[-1]) == ("snapshot", "end")
    snapshot = json.loads(told[0]["data"])
    assert snapshot["job"]["job_id"] == job
    assert job in [each["job_id"] for each in snapshot["jobs"]]
    lines = [frame for frame in told if frame["event"] == "trainer"]
    source = (studio.settings.job(job) / "attempts/1/stdout.jsonl").read_bytes()
    assert [frame["data"].encode() for frame in lines] == source.splitlines()
    assert [frame["id"] for frame in lines] == [f"1.{end}" for end in ends(source)]
    states = [json.loads(frame["data"]) for frame in told if frame["event"] == "state"]
    assert states[-1]["state"] == "completed"


def test_a_page_that_was_cut_off_gets_the_exact_rest(studio: Served, finished: str) -> None:
    """A4: Last-Event-ID counts more than what the address says."""
    whole = studio.client.get(f"/events?job={finished}").text
    lines = [frame for frame in frames(whole) if frame["event"] == "trainer"]
    for number in range(0, len(lines) - 1, 3):
        headers = {"Last-Event-ID": lines[number]["id"]}
        again = frames(studio.client.get(f"/events?job={finished}&after=1.0", headers=headers).text)
        assert [f for f in again if f["event"] == "trainer"] == lines[number + 1 :]


def test_a_page_that_knows_all_comes_no_more(studio: Served, finished: str) -> None:
    """A6: 204 ends an EventSource for good."""
    lines = frames(studio.client.get(f"/events?job={finished}").text)
    last = [frame["id"] for frame in lines if "id" in frame][-1]
    answer = studio.client.get(f"/events?job={finished}", headers={"Last-Event-ID": last})
    assert (answer.status_code, answer.content) == (204, b"")


def test_programs_get_the_lines_as_they_are(studio: Served, finished: str) -> None:
    """A5: one JSON object per line, with everything that was said, and from a position on."""
    answer = studio.client.get(f"/jobs/{finished}/events")
    assert answer.headers["content-type"] == "application/x-ndjson"
    source = (studio.settings.job(finished) / "attempts/1/stdout.jsonl").read_bytes()
    assert answer.content == source
    some = ends(source)[2]
    assert studio.client.get(f"/jobs/{finished}/events?after=1.{some}").content == source[some:]
    assert studio.client.get(f"/jobs/{finished}/events?after=1.3").status_code == 400


def test_curl_follows_a_run_to_its_end(studio: Served) -> None:
    """A5: as the README has it; it ends by itself when the run does."""
    job = submitted(studio, **wanted(steps=60))
    url = f"{studio.settings.url}/jobs/{job}/events?follow=1"
    command = ["curl", "--silent", "--no-buffer", "--max-time", "60"]
    command += ["--header", f"Authorization: Bearer {studio.settings.token}", url]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    source = (studio.settings.job(job) / "attempts/1/stdout.jsonl").read_bytes()
    assert done.stdout == source
    assert json.loads(done.stdout.splitlines()[-1])["type"] == "complete"


def test_a_stream_of_all_jobs_tells_of_their_states(studio: Served) -> None:
    """The list of runs stays true without asking again."""
    heard: list[Record] = []
    listening, done = threading.Event(), threading.Event()

    def listen() -> None:
        with studio.client.stream("GET", "/events") as answer:
            for line in answer.iter_lines():
                listening.set()
                if line.startswith("data: ") and "job_id" in line:
                    heard.append(json.loads(line[6:]))
                if heard and heard[-1].get("state") == "completed":
                    break
        done.set()

    threading.Thread(target=listen, daemon=True).start()
    assert listening.wait(10), "the stream says nothing"
    job = submitted(studio)
    assert done.wait(60), "no job was told to be completed"
    states = [each["state"] for each in heard if each.get("job_id") == job]
    assert states[-1] == "completed"


def test_fifty_pages_on_one_run_are_served_at_once(studio: Served) -> None:
    """A7: through real connections, beside which others are answered."""
    job = submitted(studio, **wanted(steps=100))
    limits = httpx.Limits(max_connections=None)
    headers = {"Authorization": f"Bearer {studio.settings.token}"}

    async def read() -> list[str]:
        url = studio.settings.url
        async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits) as client:
            asked = [client.get(f"/events?job={job}", timeout=60) for _ in range(50)]
            health = client.get("/healthz", timeout=20)
            *answers, alive = await asyncio.gather(*asked, health)
            assert alive.status_code == 200
            return [answer.text for answer in answers]

    texts = run(read())
    lines = [[f["id"] for f in frames(text) if "id" in f] for text in texts]
    assert len({tuple(each) for each in lines}) == 1
    assert len(lines[0]) > 20
