"""What goes out: the event classes, their lines, and the writer that carries them to a host."""

from __future__ import annotations

import itertools
import json
import math
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import (
    EVENT_VALIDATOR,
    PROGRAM,
    ROOT,
    Record,
    Recorder,
    check_stream,
    is_terminal,
    refuse,
    write_config,
)
from processes import Ended, run_program

import train_lora
from train_lora import (
    CheckpointEvent,
    CompleteEvent,
    DatasetFacts,
    DeviceFacts,
    Emitter,
    ErrorCode,
    ErrorEvent,
    Event,
    Facts,
    InterruptedEvent,
    LineWriter,
    MemoryFacts,
    ModelFacts,
    PhaseFacts,
    Problem,
    ProgressEvent,
    RequestFacts,
    ResumeFacts,
    SampleEvent,
    StartEvent,
    ValidationEvent,
    ValidFacts,
    WarningCode,
    WarningEvent,
    encode_line,
)

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell and descriptors")
has_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")

CODES = [*ErrorCode, *WarningCode]
EMOJI_MEGABYTE = "🖼" * 2**18  # a megabyte as UTF-8, twelve characters each as ASCII JSON


def progress(step: int = 1, total_steps: int = 10, **changes: Any) -> ProgressEvent:
    """Make a progress event in which everything is known."""
    known: Record = {"percent": 42, "epoch": 1, "loss": 0.125, "learning_rate": 1e-4}
    known |= {"grad_norm": 1.5, "images_per_second": 4.0, "seconds_per_step": 0.25}
    known |= {"elapsed_seconds": 2.5, "eta_seconds": 7.5, "memory_bytes": 2**30}
    return ProgressEvent(step=step, total_steps=total_steps, **(known | changes))


def error(**changes: Any) -> ErrorEvent:
    """Make the error of a config that is not there."""
    known: Record = {"code": ErrorCode.CONFIG_NOT_FOUND, "step": None, "path": None}
    known |= {"hint": "Look there.", "problems": (), "message": "No config."}
    return ErrorEvent(**(known | changes))


def warning(message: str = "Something to know", **data: Any) -> WarningEvent:
    """Make a warning."""
    return WarningEvent(code=WarningCode.IMAGE_SKIPPED, message=message, data=data)


def start(config: Record) -> StartEvent:
    """Make the first line of a run that echoes a config."""
    return StartEvent(
        protocol=train_lora.PROTOCOL,
        version="1.2.3",
        run_id="ab12",
        pid=4711,
        resumed_step=0,
        total_steps=10,
        config=config,
    )


VALIDATION = ValidationEvent(step=2, loss=0.25, by_time=(0.1, 0.2, None, 0.4), best_step=1)
COMPLETE = CompleteEvent(
    step=10,
    percent=100,
    final_path="out/lora_final.safetensors",
    bytes=1000,
    sha256="0" * 64,
    copy_path=None,
    total_time=60.0,
    final_loss=0.5,
    images_per_second=2.0,
    peak_memory_bytes=2**30,
)
CHECKPOINT = CheckpointEvent(step=5, path="out/a.safetensors", bytes=1000, reason="periodic")
INTERRUPTED = InterruptedEvent(step=0, reason="SIGTERM", path=None, total_time=1.0)
SAMPLE = SampleEvent(step=5, image_path="out/samples/step_5.png", prompt="zkb {a dog}", seed=0)

COUNTS: Record = {"images": 3, "skipped": 0, "captions_found": 1, "captions_missing": 2}
COUNTS |= {"resolutions": {"640x480": 3}, "regularization_images": 0, "cropped": 0, "masks": 0}
COUNTS["images_per_resolution"] = {"512": 3}
COUNTS["buckets"] = {"512x512": {"images": 3, "cropped": 0.25, "cropped_at_most": 0.25}}
VALID = ValidFacts(
    **COUNTS,
    effective_batch=1,
    steps_per_epoch=3,
    total_steps=30,
    resumed_step=0,
    family="sd1",
    device="cpu",
    disk_needed_bytes=1000,
    disk_free_bytes=10**9,
    warnings={"image_skipped": 2},
)
FACTS: list[Facts] = [
    DeviceFacts(kind="cpu", name="A chip", memory_total_bytes=8, memory_free_bytes=4, driver=None),
    ModelFacts(source="hub", cached=True, family="sd1", parameters=860_000_000),
    DatasetFacts(**COUNTS),
    train_lora.PresetFacts(
        verb="would set",
        preset="style",
        family="sd1",
        values={"lora_rank": 32, "lora_targets": "all"},
        reasons={"lora_rank": "published: so others have it"},
    ),
    train_lora.PriorFacts(missing=5, updates=34),
    PhaseFacts(name="checking images", done=1, total=2),
    MemoryFacts(phase="encoding", in_use_bytes=1, peak_bytes=2, planned_bytes=3),
    ResumeFacts(step=0, aimed_at=None, set_aside=None),
    RequestFacts(step=3, asked={"preview": True}),
    VALID,
]
EXAMPLES: list[Event] = [
    *(start({"seed": 0}), warning(file="a.png"), progress(), VALIDATION, SAMPLE, CHECKPOINT),
    *(COMPLETE, INTERRUPTED, error(problems=(Problem(path="$", expected="", found="", hint=""),))),
]


def event_name(event: Event) -> str:
    """Name a parametrized case after the event's type."""
    return event.wire["type"]


def topic_name(facts: Facts) -> str:
    """Name a parametrized case after the topic."""
    return facts.wire["topic"]


def parse(line: bytes) -> Record:
    """Read a line as a strict host does."""
    record: Record = json.loads(line, parse_constant=refuse)
    return record


# --- Classes and schema ------------------------------------------------------


def test_every_class_and_topic_of_the_contract_exists() -> None:
    """The types are those of the contract, and the examples below cover them and all topics."""
    types = ["start", "info", "warning", "progress", "validation", "sample", "checkpoint"]

    assert [cls.wire["type"] for cls in train_lora.EVENTS] == [
        *types,
        *("complete", "interrupted", "error"),
    ]
    assert {type(event) for event in EXAMPLES} == set(train_lora.EVENTS) - {Facts}
    assert tuple(type(facts) for facts in FACTS) == train_lora.FACTS


@pytest.mark.parametrize("event", EXAMPLES, ids=event_name)
def test_a_line_is_the_envelope_followed_by_every_field(
    event: Event, events: Emitter, recorder: Recorder
) -> None:
    """Type, number, time and message come first; then the payload, none of it left out."""
    events.emit(event)
    (record,) = recorder.records

    assert list(record) == [*train_lora.ENVELOPE, *train_lora.payload_types(type(event))]
    assert list(record)[:4] == ["type", "seq", "timestamp", "message"]
    assert (record["type"], record["seq"]) == (event.wire["type"], 1)
    EVENT_VALIDATOR.validate(record)


@pytest.mark.parametrize("facts", FACTS, ids=topic_name)
def test_an_info_line_holds_all_facts_of_its_topic(
    facts: Facts, events: Emitter, recorder: Recorder
) -> None:
    """The topic fixes the fields of `data`."""
    events.emit(facts)
    (record,) = recorder.records

    assert list(record) == ["type", "seq", "timestamp", "message", "topic", "data"]
    assert (record["type"], record["topic"]) == ("info", facts.wire["topic"])
    assert record["data"] == vars(facts)
    EVENT_VALIDATOR.validate(record)


@pytest.mark.parametrize("event", EXAMPLES, ids=event_name)
def test_a_message_is_one_sentence(event: Event, events: Emitter, recorder: Recorder) -> None:
    """It fits a status bar: one short line, with no template left in it."""
    events.emit(event)
    message = recorder.records[0]["message"]

    assert re.fullmatch(r"[A-Za-z].{3,120}", message)
    assert "{" not in message.replace("{a dog}", "")


@pytest.mark.parametrize("facts", FACTS, ids=topic_name)
def test_the_message_of_facts_is_one_sentence(
    facts: Facts, events: Emitter, recorder: Recorder
) -> None:
    """What an info line says fits a status bar too."""
    events.emit(facts)

    assert re.fullmatch(r"[A-Za-z][^{}]{3,120}", recorder.records[0]["message"])


def test_a_message_does_not_say_none(events: Emitter, recorder: Recorder) -> None:
    """What is unknown is null for programs and not Python's word for it for people."""
    events.emit(ModelFacts(source="hub", cached=False))
    events.emit(PhaseFacts(name="downloading", done=1, total=None))
    events.emit(progress(loss=math.nan))

    assert [r["message"] for r in recorder.records if "None" in r["message"]] == []


def test_numbers_are_written_for_people(events: Emitter, recorder: Recorder) -> None:
    """A status bar shows neither powers of ten nor a row of digits."""
    events.emit(replace(FACTS[1], parameters=860_000_000))  # type: ignore[call-arg]
    events.emit(replace(COMPLETE, step=20_000, total_time=12_345.678))

    assert recorder.records[0]["message"].endswith("family sd1, 860,000,000 parameters")
    assert recorder.records[1]["message"] == "Complete: 20,000 steps in 3 h 25 min"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        *((0, "0 MiB"), (1, "1 MiB"), (2**20, "1 MiB"), (2**20 + 1, "2 MiB")),
        *((2**30 - 1, "1,024 MiB"), (2**30, "1.0 GiB"), (123 * 2**29, "61.5 GiB")),
        (5000 * 2**30, "5,000.0 GiB"),
    ],
)
def test_a_size_is_told_as_people_count_it(size: int, text: str) -> None:
    """Never as less than it is, where that is small."""
    assert train_lora.size_of(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0.0 s"), (0.04, "0.0 s"), (17.42, "17.4 s"), (59.4, "59.4 s")),
        *((59.97, "1 min 00 s"), (60, "1 min 00 s"), (3599.4, "59 min 59 s")),
        *((3599.9, "1 h 00 min"), (12_345, "3 h 25 min"), (100 * 3600, "100 h 00 min")),
    ],
)
def test_a_time_is_told_as_a_clock_would(seconds: float, text: str) -> None:
    """Nothing is rounded to sixty of anything."""
    assert train_lora.duration_of(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 images"), (1, "1 image"), (2, "2 images"), (12_000, "12,000 images")],
)
def test_one_thing_is_no_plural(number: int, text: str) -> None:
    """And many have a comma."""
    assert train_lora.counted(number, "image") == text


def test_what_is_unknown_is_left_out_of_a_sentence(events: Emitter, recorder: Recorder) -> None:
    """Between its commas; a sentence that would be empty keeps its first part."""
    events.emit(ModelFacts(source="hub", cached=False))
    events.emit(MemoryFacts(phase="planning", planned_bytes=3 * 2**30))
    events.emit(MemoryFacts(phase="encoding", peak_bytes=2**20, planned_bytes=None))
    events.emit(progress(loss=None))
    events.emit(PhaseFacts(name="downloading", done=1, total=None))
    events.emit(replace(SAMPLE, prompt="a, {b}, c"))
    assert [record["message"] for record in recorder.records] == [
        "Base model: hub",
        "Memory while planning, 3.0 GiB planned",
        "Memory while encoding, 1 MiB measured",
        "Step 1 of 10",
        "downloading",
        "Sample at step 5: a, {b}, c",
    ]


class Renamed(ProgressEvent):
    """A class with a name that no host knows."""


class RenamedFacts(PhaseFacts):
    """Facts with such a name."""


def test_what_a_class_is_called_does_not_reach_the_host(
    events: Emitter, recorder: Recorder
) -> None:
    """Types and topics are words of their own, so that a class can be renamed."""
    events.emit(Renamed(**vars(progress())))
    events.emit(RenamedFacts(name="checking images", done=1, total=2))

    assert [record["type"] for record in recorder.records] == ["progress", "info"]
    assert recorder.records[1]["topic"] == "phase"


def test_the_schema_takes_words_that_a_later_version_adds(
    events: Emitter, recorder: Recorder
) -> None:
    """A host that validates lines goes on with 1.x; known words are told all the same."""
    for event in (warning(), error(), INTERRUPTED, CHECKPOINT):
        events = Emitter(recorder)
        events.emit(event)
        record = recorder.records[-1]
        key = "code" if "code" in record else "reason"
        EVENT_VALIDATOR.validate(record | {key: "of_a_later_version"})
    assert '"host_gone"' in json.dumps(train_lora.event_schema())


def test_the_timestamp_is_utc_with_milliseconds(events: Emitter, recorder: Recorder) -> None:
    """RFC 3339 with a Z, whatever zone the machine is in."""
    events.emit(warning())
    stamp = recorder.records[0]["timestamp"]

    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", stamp)


def test_the_schema_file_is_up_to_date() -> None:
    """event_schema.json holds what the classes say."""
    written = json.loads((ROOT / "event_schema.json").read_text(encoding="utf-8"))

    assert written == train_lora.event_schema(), "event_schema.json is stale; run: make docs"


def test_the_program_prints_the_schema(tmp_path: Path) -> None:
    """--event-schema prints the same without any config."""
    done = run_raw("--event-schema", cwd=tmp_path)

    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout) == train_lora.event_schema()


@pytest.mark.parametrize("event", EXAMPLES, ids=event_name)
def test_the_schema_demands_every_field(event: Event, events: Emitter, recorder: Recorder) -> None:
    """A line that lacks any one of its fields is refused by the schema."""
    events.emit(event)
    (record,) = recorder.records
    lacking = [{k: v for k, v in record.items() if k != field} for field in record]

    assert [r for r in lacking if EVENT_VALIDATOR.is_valid(r)] == []


# --- Lines -------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_becomes_null(
    value: float, events: Emitter, recorder: Recorder
) -> None:
    """Neither NaN nor Infinity reaches a host, at any depth."""
    events.emit(progress(loss=value, grad_norm=value))
    events.emit(warning(deep={"list": [value, 1.5]}))
    first, second = [parse(encode_line(record)) for record in recorder.records]

    assert (first["loss"], first["grad_norm"]) == (None, None)
    assert second["data"]["deep"]["list"] == [None, 1.5]


@pytest.mark.parametrize("text", ["Müller", "日本\u2028語", "\x1b[31mred\x1b[0m\r\n\ttwo\x00\x7f"])
def test_any_text_stays_one_ascii_line_and_arrives_as_it_was(
    text: str, events: Emitter, recorder: Recorder
) -> None:
    """Umlauts, line separators and terminal escapes are spelled out."""
    events.emit(warning(text, file=text))
    line = encode_line(recorder.records[0])

    assert re.fullmatch(rb"[ -~]+\n", line)
    assert (parse(line)["message"], parse(line)["data"]["file"]) == (text, text)


def test_a_file_name_that_is_not_unicode_makes_no_broken_text(
    events: Emitter, recorder: Recorder
) -> None:
    """Half a surrogate pair, which is how Python reads such names, would fail strict parsers."""
    name = os.fsdecode(b"image\xff.png")
    events.emit(warning(f"Skipped {name}", file=name))
    line = encode_line(recorder.records[0])

    assert re.search(rb"\\ud[89a-f]", line, re.IGNORECASE) is None
    assert parse(line)["data"]["file"].endswith(".png")


PROBLEM = Problem(path="$.x" * 20, expected="1 … 256", found="🖼" * 1000, hint="Mend it. " * 40)
HUGE: dict[str, Event] = {
    "long message": warning("x" * 2**20),
    "long message of emoji": error(message=EMOJI_MEGABYTE, hint=EMOJI_MEGABYTE),
    "500 problems": error(problems=(PROBLEM,) * 500),
    "an unknown key": error(problems=(replace(PROBLEM, path=EMOJI_MEGABYTE), *[PROBLEM] * 99)),
    "many texts": warning(**{f"text_{number}": EMOJI_MEGABYTE for number in range(60)}),
    "long data": warning(file="a/" * 2**19, reason="\x00" * 2**20),
    "long lists": warning(names=["x" * 200] * 10**4, numbers=list(range(10**6))),
}


@pytest.mark.parametrize("event", HUGE.values(), ids=HUGE.keys())
def test_a_line_fits_into_60_kib_and_stays_a_valid_event(
    event: Event, events: Emitter, recorder: Recorder
) -> None:
    """Long texts are shortened, yet the line keeps its envelope and every field."""
    events.emit(event)
    (record,) = recorder.records
    line = encode_line(record)

    assert 2**14 < len(line) <= 60 * 1024
    assert line.isascii()
    EVENT_VALIDATOR.validate(parse(line))
    unchanged = ("type", "seq", "timestamp")
    assert [parse(line)[key] for key in unchanged] == [record[key] for key in unchanged]


def test_a_shortened_text_ends_with_an_ellipsis(events: Emitter, recorder: Recorder) -> None:
    """As much as fits is kept, and the cut is visible."""
    events.emit(warning("x" * 2**20))
    message = parse(encode_line(recorder.records[0]))["message"]

    assert re.fullmatch(r"x{1000,}…", message)


def test_a_shortened_list_says_how_many_more_there_were(
    events: Emitter, recorder: Recorder
) -> None:
    """What stands for the rest has the form of the others, so that readers need no exception."""
    events.emit(warning(names=["x" * 200] * 10**4))
    events.emit(error(problems=(PROBLEM,) * 500))
    names = parse(encode_line(recorder.records[0]))["data"]["names"]
    problems = parse(encode_line(recorder.records[1]))["problems"]

    more = re.fullmatch(r"… (\d+) more", problems[-1]["path"])
    assert more
    assert int(more[1]) + len(problems) - 1 == 500
    assert names[-1] == f"… {10**4 - len(names) + 1} more"


PATH = "/" + "é/" * 1364  # as long as a path can be


def test_a_path_is_never_cut(events: Emitter, recorder: Recorder) -> None:
    """What stands beside it gives way, so that a host finds the file."""
    events.emit(replace(SAMPLE, image_path=PATH, prompt=EMOJI_MEGABYTE))
    events.emit(error(problems=(replace(PROBLEM, path=PATH, expected="🖼" * 5000),) * 50))
    sample, problems = [parse(encode_line(record)) for record in recorder.records]

    assert (sample["image_path"], sample["prompt"][-1]) == (PATH, "…")
    assert problems["problems"][0]["path"] == PATH


LONG_CONFIGS = [
    {"sample_prompts": ["語" * 1000] * 9, "trigger_words": ["猫" * 200]},
    {"trigger_words": ["🖼" * 200] * 20},
]


@pytest.mark.parametrize("changes", LONG_CONFIGS)
def test_a_config_is_never_cut(changes: Record, in_workspace: Path) -> None:
    """A host finds in `start` what the run was asked for, to the last letter."""
    write_config(in_workspace, **changes)
    ended = run_program("--config", "config.json", "--validate-only", cwd=in_workspace)
    first = ended.lines[0]

    assert ended.code == 0
    assert len(ended.stdout.splitlines()[0]) > 48_000
    assert {key: first["config"][key] for key in changes} == changes
    assert len(first["run_id"]) == 32


def test_a_config_too_long_for_a_line_is_refused(in_workspace: Path) -> None:
    """Every value may be fine by itself; a config that could not be told whole is none."""
    write_config(in_workspace, sample_prompts=["語" * 1000] * 16)
    ended = run_program("--config", "config.json", "--validate-only", cwd=in_workspace)

    assert (ended.code, ended.last["code"]) == (1, "config_conflict")
    assert "prompts" in ended.last["hint"]


def test_a_line_that_fits_is_not_shortened(events: Emitter, recorder: Recorder) -> None:
    """A text of 50,000 characters and a list of 1,000 stand as they are."""
    events.emit(warning("x" * 50_000, numbers=list(range(1000))))

    assert parse(encode_line(recorder.records[0])) == recorder.records[0]


# --- Emitter -----------------------------------------------------------------


def in_threads(count: int, work: Callable[[int], object]) -> None:
    """Run the same work in several threads that begin at the same moment."""
    gate = threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda number: (gate.wait(), work(number)), range(count)))


def test_numbers_have_no_gap_under_eight_threads(events: Emitter, recorder: Recorder) -> None:
    """Lines are numbered in the order in which listeners see them."""

    def work(_: int) -> None:
        for _ in range(500):
            events.emit(warning())

    in_threads(8, work)

    assert [record["seq"] for record in recorder.records] == list(range(1, 4001))
    assert events.warnings == {"image_skipped": 4000}


@pytest.mark.parametrize("last", [COMPLETE, INTERRUPTED, error()], ids=event_name)
def test_threads_that_race_for_the_end_make_one_last_line(
    last: Event, events: Emitter, recorder: Recorder
) -> None:
    """The first terminal line wins, and nothing follows it."""

    def work(_: int) -> None:
        for event in (warning(), last, last, warning(), progress()):
            events.emit(event)

    in_threads(8, work)

    assert [is_terminal(r) for r in recorder.records].count(True) == 1
    assert recorder.records[-1]["type"] == last.wire["type"]
    assert [r["seq"] for r in recorder.records] == list(range(1, len(recorder.records) + 1))


def test_the_report_of_a_preflight_is_a_last_line(events: Emitter, recorder: Recorder) -> None:
    """After the topic `valid` nothing is sent, and no second report."""
    in_threads(8, lambda _: events.emit(VALID))
    events.emit(warning())

    assert [record["type"] for record in recorder.records] == ["info"]


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        """Begin at some odd time, as a monotonic clock does."""
        self.now = 12345.678

    def __call__(self) -> float:
        """Tell the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Provide a clock that the program reads and the test sets."""
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def simulate(clock: Clock, events: Emitter, steps: int, seconds_per_step: float) -> list[float]:
    """Report every step of a run and return the times at which a line was wanted."""
    times = []
    for step in range(1, steps + 1):
        clock.now += seconds_per_step
        if events.wants_progress(step, steps):
            times.append(clock.now)
        events.emit(progress(step, steps))
    return times


@pytest.mark.parametrize("seconds_per_step", [0.001, 0.05, 0.4, 1.0, 60.0])
def test_a_long_run_makes_about_a_thousand_progress_lines_at_most(
    seconds_per_step: float, clock: Clock, events: Emitter, recorder: Recorder
) -> None:
    """10,000 steps stay below 1,000 lines, two per second and 1 MiB, whatever their speed."""
    times = simulate(clock, events, 10_000, seconds_per_step)
    steps = [record["step"] for record in recorder.records]

    assert (steps[0], steps[-1]) == (1, 10_000)
    assert steps == sorted(set(steps))
    assert len(steps) == len(times) <= 1002
    # The last step is sent at once, however soon after the one before.
    gaps = [later - sooner for sooner, later in itertools.pairwise(times[:-1])]
    assert min(gaps, default=1.0) >= 0.5 - 1e-6
    assert sum(len(encode_line(record)) for record in recorder.records) < 2**20


def test_a_slow_short_run_reports_every_step(
    clock: Clock, events: Emitter, recorder: Recorder
) -> None:
    """Pacing takes nothing away where there is time enough."""
    simulate(clock, events, 20, 5.0)

    assert [record["step"] for record in recorder.records] == list(range(1, 21))


@pytest.mark.parametrize(("steps", "sent"), [(1, [1]), (2, [1, 2]), (50, [1, 50])])
def test_a_run_of_an_instant_reports_its_first_and_its_last_step_once(
    steps: int, sent: list[int], clock: Clock, events: Emitter, recorder: Recorder
) -> None:
    """Both ends are always told, and neither twice."""
    simulate(clock, events, steps, 0.0)
    events.emit(progress(steps, steps))

    assert [record["step"] for record in recorder.records] == sent


def test_other_lines_are_not_paced(clock: Clock, events: Emitter, recorder: Recorder) -> None:
    """Only progress is held back; dropped progress takes no number."""
    for step in range(1, 6):
        events.emit(progress(step, 1000))
        events.emit(warning())

    assert [r["type"] for r in recorder.records] == ["progress", *["warning"] * 5]
    assert [r["seq"] for r in recorder.records] == [1, 2, 3, 4, 5, 6]


def test_the_values_of_a_progress_line_stay_the_callers(
    events: Emitter, recorder: Recorder
) -> None:
    """The emitter stamps and paces; it computes no percentage and rounds no loss."""
    event = progress(7, 9, percent=99, loss=0.12345678901234567)
    events.emit(event)

    assert vars(event).items() <= recorder.records[0].items()


# --- Writer ------------------------------------------------------------------


class Pipe:
    """A real pipe with a writer at one end."""

    def __init__(self) -> None:
        """Open the pipe and let the writer own its one end."""
        self.read_end, self.write_end = os.pipe()
        self.failures: queue.Queue[OSError] = queue.Queue()
        self.writer = LineWriter(self.write_end, self.failures.put)

    def finish(self) -> list[Record]:
        """Wake the reader, close the writer, and return what arrived in between."""
        with ThreadPoolExecutor(1) as reader, os.fdopen(self.read_end, "rb") as stream:
            content = reader.submit(stream.read)
            self.writer.close(lambda: True)
            return [parse(line) for line in content.result(timeout=60).splitlines()]


@pytest.fixture
def pipe() -> Pipe:
    """Provide a pipe nobody reads yet."""
    return Pipe()


def record(kind: str, number: int, message: str = "") -> Record:
    """Make the envelope alone of a line with a number."""
    stamp = "2026-01-01T00:00:00.000Z"
    return {"type": kind, "seq": number, "timestamp": stamp, "message": message}


def busy_stream(calls: int, pause_seconds: float) -> Iterator[Record]:
    """Yield progress with a warning after every hundredth, spread over some time."""
    for number in range(1, calls + 1):
        yield record("progress", number, "x" * 250)
        if number % 100 == 0:
            yield record("warning", number)
            time.sleep(pause_seconds)


@pytest.mark.parametrize("seconds", [1.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_a_reader_asleep_slows_nobody_and_misses_progress_alone(seconds: float, pipe: Pipe) -> None:
    """10,000 calls return before it wakes; what waits is bounded; all else arrives then."""
    for line in busy_stream(10_000, seconds / 100):
        pipe.writer(line)
    pipe.writer(record("complete", 10_001))
    lines = pipe.finish()

    numbers = [line["seq"] for line in lines if line["type"] == "warning"]
    assert numbers == list(range(100, 10_001, 100))
    assert lines[-1]["type"] == "complete"
    assert len(lines) < 1000  # 64 KiB in the pipe and one backlog, not 10,000


def test_warnings_are_never_dropped_however_many_wait(pipe: Pipe) -> None:
    """Only progress gives way to a long backlog."""
    for number in range(3000):
        pipe.writer(record("warning", number, "x" * 100))

    assert [line["seq"] for line in pipe.finish()] == list(range(3000))
    assert pipe.failures.empty()


def test_a_pipe_that_does_not_block_loses_nothing(pipe: Pipe) -> None:
    """Hosts that read asynchronously may have made their pipe so."""
    os.set_blocking(pipe.write_end, False)
    for number in range(1000):
        pipe.writer(record("warning", number, "x" * 1000))
    time.sleep(0.2)  # the pipe is full by then

    assert [line["seq"] for line in pipe.finish()] == list(range(1000))
    assert pipe.failures.empty()


def test_patience_with_a_reader_ends(pipe: Pipe) -> None:
    """Closing returns when patience does, although the pipe is full and nobody reads."""
    for number in range(1000):
        pipe.writer(record("warning", number, "x" * 1000))
    looks = iter([True, True, False])
    pipe.writer.close(lambda: next(looks))

    assert list(looks) == []
    os.close(pipe.read_end)  # lets go of the thread that still writes
    assert isinstance(pipe.failures.get(timeout=5), BrokenPipeError)


def test_a_closed_pipe_is_told_once_and_raises_nothing(pipe: Pipe) -> None:
    """A reader that left is a call of on_failure; later lines go nowhere."""
    os.close(pipe.read_end)
    pipe.writer(record("warning", 1))
    failure = pipe.failures.get(timeout=5)
    for _ in range(100):
        pipe.writer(record("warning", 1))
    pipe.writer.close(lambda: True)

    assert isinstance(failure, BrokenPipeError)
    assert pipe.failures.empty()


@has_dev_full
def test_a_full_disk_is_told_and_raises_nothing() -> None:
    """A file that takes no more is a call of on_failure."""
    failures: queue.Queue[OSError] = queue.Queue()
    writer = LineWriter(os.open("/dev/full", os.O_WRONLY), failures.put)
    writer(record("warning", 1))

    assert failures.get(timeout=5).strerror == "No space left on device"
    writer.close(lambda: True)


def test_the_last_line_has_its_time_however_late_it_comes(pipe: Pipe) -> None:
    """A main thread that took long to notice a stop may still tell how the run ended."""
    stop = train_lora.StopRequest()
    stop.request("SIGTERM")
    stop.requested_at -= 7.0  # seconds ago
    for number in range(1000):
        pipe.writer(record("warning", number, "x" * 1000))
    with ThreadPoolExecutor(1) as closer, os.fdopen(pipe.read_end, "rb") as stream:
        closing = closer.submit(pipe.writer.close, train_lora.patience(stop))
        time.sleep(0.2)  # the host is late as well
        lines = stream.read().splitlines()
        closing.result(timeout=5)

    assert [parse(line)["seq"] for line in lines] == list(range(1000))


def test_closing_twice_touches_nothing_that_was_opened_since(pipe: Pipe, tmp_path: Path) -> None:
    """Two threads may end a run at once; the number of the descriptor may be another's by then."""
    assert pipe.finish() == []
    with (tmp_path / "file").open("wb") as file:
        assert file.fileno() in (pipe.write_end, pipe.read_end)
        in_threads(4, lambda _: pipe.writer.close(lambda: True))
        file.write(b"still open")


@pytest.mark.parametrize("closers", [2, 8])
def test_threads_that_close_at_once_deliver_everything(closers: int, pipe: Pipe) -> None:
    """Each waits for the same end, and none of them fails."""
    for number in range(300):
        pipe.writer(record("warning", number, "x" * 1000))
    with ThreadPoolExecutor(1) as reader, os.fdopen(pipe.read_end, "rb") as stream:
        content = reader.submit(stream.read)
        in_threads(closers, lambda _: pipe.writer.close(lambda: True))
        lines = content.result(timeout=60).splitlines()

    assert [parse(line)["seq"] for line in lines] == list(range(300))


FULL_DISK = """
import os, resource, signal, sys, time
import train_lora as t

def allow(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def seq(number):
    stamp = "2026-01-01T00:00:00.000Z"
    return {"type": "warning", "seq": number, "timestamp": stamp, "message": "x" * 100}
"""

FULL_OUTPUT = (
    FULL_DISK
    + """
failures = []
writer = t.LineWriter(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), failures.append)
allow(1000)  # in the middle of a line
for number in range(50):
    writer(seq(number))
while not failures:
    time.sleep(0.01)
allow(10**6)
writer.close(lambda: True)
print(len(failures))
"""
)


@posix
def test_lines_that_a_full_disk_refused_are_written_when_it_has_room(tmp_path: Path) -> None:
    """The last of them too, which is tried again when the run ends; none is torn or doubled."""
    done = run_child(FULL_OUTPUT, tmp_path / "events")

    assert (done.stdout, done.stderr) == (b"1\n", b"")
    lines = (tmp_path / "events").read_bytes().splitlines()
    assert [parse(line)["seq"] for line in lines] == list(range(50))


def test_closing_closes_the_descriptor(pipe: Pipe) -> None:
    """The reader sees the end of the file, and nothing else can be written there."""
    assert pipe.finish() == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pipe.write_end)


# --- Standard output ---------------------------------------------------------

CHILD = """
import ctypes, os, subprocess, sys
import train_lora as t
t.fill_closed_streams()
descriptor = t.claim_stdout()
"""

POLLUTING = (
    CHILD
    + """
libc = ctypes.CDLL(None)
writer = t.LineWriter(descriptor, lambda error: os._exit(9))
events = t.Emitter(writer)
events.emit(t.PhaseFacts(name="first", done=0, total=1))
print("from print")
sys.stdout.write("from a text without an end")
os.write(1, b"from the descriptor\\n")
os.system("echo from a shell")
subprocess.run(["echo", "from a child"], check=True)
libc.puts(b"from puts")
libc.printf(b"from a buffer never flushed")
events.emit(t.InterruptedEvent(step=0, reason="SIGTERM", path=None, total_time=0.0))
writer.close(lambda: True)
os.write(1, b"after the end\\n")
"""
)

POLLUTION = ["print", "a text without an end", "the descriptor", "a shell", "a child", "puts"]
POLLUTION += ["a buffer never flushed"]


def run_child(
    script: str, *arguments: object, redirect: str = ""
) -> subprocess.CompletedProcess[bytes]:
    """Run a script that imports the program, with the shell's redirections."""
    return run_shell([sys.executable, "-c", script, *map(str, arguments)], redirect, ROOT)


def run_shell(command: list[str], redirect: str, cwd: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a command under the shell's redirections, such as >&- for a closed stdout."""
    shell = ["sh", "-c", f'exec "$@" {redirect}', "sh", *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        shell, cwd=cwd, env=environment, input=b"", capture_output=True, timeout=60, check=False
    )


def run_raw(*arguments: str, cwd: Path, redirect: str = "") -> subprocess.CompletedProcess[bytes]:
    """Run the program and look at nothing."""
    return run_shell([sys.executable, str(PROGRAM), *arguments], redirect, cwd)


@posix
def test_whatever_else_is_printed_reaches_stderr() -> None:
    """Python, C, a shell and a child write to descriptor 1, and the host sees events alone."""
    done = run_child(POLLUTING)

    assert done.returncode == 0
    check_stream(done.stdout)
    assert len(done.stdout.splitlines()) == 2
    assert [text for text in POLLUTION if f"from {text}" not in done.stderr.decode()] == []
    assert b"after the end" in done.stderr


@posix
def test_stdout_stays_pure_when_other_streams_are_closed() -> None:
    """What pollutes goes nowhere rather than to the host."""
    done = run_child(POLLUTING, redirect="<&- 2>&-")

    assert done.returncode == 0
    check_stream(done.stdout)
    assert len(done.stdout.splitlines()) == 2


LOW_DESCRIPTORS = (
    CHILD
    + """
opened = [os.open(path, os.O_CREAT | os.O_RDWR) for path in sys.argv[1:]]
os.write(1, b"noise")
assert descriptor > 2, descriptor
assert min(opened) > 2, opened
"""
)


@posix
@pytest.mark.parametrize("redirect", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_file_opened_later_takes_the_place_of_a_closed_stream(
    redirect: str, tmp_path: Path
) -> None:
    """A data file on descriptor 1 would be filled with what libraries print."""
    files = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    done = run_child(LOW_DESCRIPTORS, *files, redirect=redirect)

    assert (done.returncode, done.stdout) == (0, b"")
    assert [path.read_bytes() for path in files] == [b"", b"", b""]


HELPER_STREAMS = (
    CHILD
    + """
sys.exit(subprocess.run(["sh", "-c", "cat && echo out && echo err >&2"]).returncode)
"""
)


@posix
@pytest.mark.parametrize("redirect", ["<&-", ">&-", "2>&-"])
def test_a_helper_process_finds_all_three_streams_open(redirect: str) -> None:
    """A stream closed by the host is replaced for child processes as well."""
    assert run_child(HELPER_STREAMS, redirect=redirect).returncode == 0


@posix
@pytest.mark.parametrize("redirect", ["<&- 2>&-", "2>/dev/full"])
def test_a_preflight_needs_neither_stdin_nor_stderr(redirect: str, workspace: Path) -> None:
    """The whole stream arrives although the other streams are closed or full."""
    done = run_raw("--config", "config.json", "--validate-only", cwd=workspace, redirect=redirect)

    assert (done.returncode, done.stderr) == (0, b"")
    check_stream(done.stdout)
    assert parse(done.stdout.splitlines()[-1])["topic"] == "valid"


@posix
@pytest.mark.parametrize("redirect", [">&-", "<&- >&- 2>&-"])
def test_a_closed_stdout_is_a_host_that_left(redirect: str, workspace: Path) -> None:
    """The program ends as if asked to stop, and puts its events nowhere else."""
    done = run_raw("--config", "config.json", "--validate-only", cwd=workspace, redirect=redirect)

    assert (done.returncode, done.stdout, done.stderr) == (143, b"", b"")


@posix
def test_a_config_from_a_closed_stdin_is_an_error(workspace: Path) -> None:
    """There is nothing to read, which is said in one line."""
    done = run_raw("--config", "-", "--validate-only", cwd=workspace, redirect="<&-")

    check_stream(done.stdout)
    (record,) = [parse(line) for line in done.stdout.splitlines()]
    assert (done.returncode, record["type"]) == (1, "error")


@posix
@has_dev_full
@pytest.mark.parametrize(("config", "code"), [("config.json", 143), ("missing.json", 1)])
def test_a_full_disk_behind_stdout_is_no_traceback(config: str, code: int, workspace: Path) -> None:
    """The run ends by its own exit code, never by 120, and quietly: nobody could read more."""
    done = run_raw("--config", config, "--validate-only", cwd=workspace, redirect=">/dev/full")

    assert (done.returncode, done.stderr) == (code, b"")


@posix
@pytest.mark.parametrize(("config", "codes"), [("config.json", {143}), ("missing.json", {1, 143})])
def test_a_reader_that_left_before_the_first_line_is_no_traceback(
    config: str, codes: set[int], workspace: Path
) -> None:
    """A broken pipe ends the run by an exit code of its own, never by 120, and quietly."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as stdout:
        done = subprocess.run(
            [sys.executable, PROGRAM, "--config", config, "--validate-only"],
            cwd=workspace,
            stdout=stdout,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )

    assert done.returncode in codes
    assert done.stderr == b""


@posix
@has_dev_full
@pytest.mark.parametrize("redirect", [">/dev/full", ">&-"])
@pytest.mark.parametrize("flag", ["--event-schema", "--help", "--version"])
def test_printing_where_nobody_receives_is_no_traceback(
    flag: str, redirect: str, tmp_path: Path
) -> None:
    """What is printed without a run may fail to arrive, yet quietly and never with 120."""
    done = run_raw(flag, cwd=tmp_path, redirect=redirect)

    assert b"Traceback" not in done.stderr
    assert done.returncode in (0, 1)


@posix
@has_dev_full
def test_debug_output_that_cannot_be_written_changes_nothing(workspace: Path) -> None:
    """With stderr full, an error still is one line and exit code 1."""
    arguments = ("--config", "missing.json", "--debug")
    done = run_raw(*arguments, cwd=workspace, redirect="2>/dev/full")

    check_stream(done.stdout)
    assert (done.returncode, len(done.stdout.splitlines())) == (1, 1)


# --- Mirror ------------------------------------------------------------------


@pytest.fixture
def unusable(workspace: Path) -> Path:
    """Provide a workspace whose run warns of broken images and then ends for lack of others."""
    for path in (workspace / "data").glob("*.png"):
        path.write_bytes(b"no image")
    return workspace


def run_to_the_error(folder: Path) -> Ended:
    """Run without --validate-only until the scan finds nothing usable."""
    ended = run_program("--config", "config.json", cwd=folder)
    assert (ended.code, ended.last["code"]) == (1, "dataset_empty")
    return ended


def mirror_of(folder: Path) -> Path:
    """Name the file that repeats stdout."""
    return folder / "out" / "events.jsonl"


def test_the_mirror_equals_stdout_line_by_line(unusable: Path) -> None:
    """A host that was restarted finds in events.jsonl all that it missed, the end included."""
    ended = run_to_the_error(unusable)

    assert len(ended.lines) > 3
    assert mirror_of(unusable).read_bytes() == ended.stdout


def test_the_mirror_goes_on_over_all_starts(unusable: Path) -> None:
    """A second start appends."""
    first, second = run_to_the_error(unusable), run_to_the_error(unusable)

    assert mirror_of(unusable).read_bytes() == first.stdout + second.stdout


@pytest.mark.parametrize("torn", [b'{"type":"progress","seq":7,"time', b"{", b"\x00" * 5000])
def test_the_torn_end_of_a_mirror_is_dropped(torn: bytes, unusable: Path) -> None:
    """A crash leaves half a line; it neither swallows the next one nor stays as no JSON."""
    first = run_to_the_error(unusable)
    with mirror_of(unusable).open("ab") as mirror:
        mirror.write(torn)
    second = run_to_the_error(unusable)

    assert mirror_of(unusable).read_bytes() == first.stdout + second.stdout


DAMAGED = [b'{"message":"no type"}\n', b"null\n", b"[" * 10**5 + b"\n", b"\xff\n", b"\n\n"]


@pytest.mark.parametrize("damage", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_mirror_never_keeps_a_run_from_going_on(damage: bytes, unusable: Path) -> None:
    """It records the past; what stands there is left as it is."""
    mirror_of(unusable).parent.mkdir()
    mirror_of(unusable).write_bytes(damage)
    ended = run_to_the_error(unusable)

    assert mirror_of(unusable).read_bytes() == damage + ended.stdout


FULL_MIRROR = (
    FULL_DISK
    + """
import pathlib
output, heard = pathlib.Path(sys.argv[1]), []
mirror = output / "events.jsonl"
events = t.Emitter(heard.append)
with t.claimed(output) as claim, t.mirrored(events, output, claim):
    for number in range(60):
        events.warn(t.WarningCode.IMAGE_SKIPPED, "x" * 100)
        if number == 20:
            while not mirror.exists() or not mirror.stat().st_size:
                time.sleep(0.01)
            allow(mirror.stat().st_size + 50)
    while t.WarningCode.MIRROR_FAILED.word not in events.warnings:
        time.sleep(0.01)
    allow(10**6)
sys.stdout.buffer.write(b"".join(map(t.encode_line, heard)))
"""
)


@posix
def test_mirroring_is_taken_up_again_when_a_full_disk_has_room(tmp_path: Path) -> None:
    """All that was missed follows, and no line of the file is torn."""
    done = run_child(FULL_MIRROR, tmp_path / "out")

    assert done.stderr == b""
    assert done.stdout.count(b"mirror_failed") == 1
    assert mirror_of(tmp_path).read_bytes() == done.stdout


def test_a_preflight_writes_no_mirror(workspace: Path) -> None:
    """--validate-only writes nothing at all."""
    run_program("--config", "config.json", "--validate-only", cwd=workspace)

    assert not (workspace / "out").exists()


def make_folder(path: Path) -> None:
    """Let a folder stand in the place of the mirror."""
    path.mkdir(parents=True)


def make_full(path: Path) -> None:
    """Let the mirror lie on a full disk."""
    path.parent.mkdir(parents=True)
    path.symlink_to("/dev/full")


def make_pipe(path: Path) -> None:
    """Let a pipe that nobody reads stand there."""
    path.parent.mkdir(parents=True)
    os.mkfifo(path)


def make_link(path: Path) -> None:
    """Let the mirror be a link to what is to be made elsewhere."""
    path.parent.mkdir(parents=True)
    path.symlink_to("/proc/of/nobody")


SPOILS = [make_folder, pytest.param(make_full, marks=has_dev_full), make_pipe, make_link]


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_mirror_that_cannot_be_written_is_a_warning(
    spoil: Callable[[Path], None], unusable: Path
) -> None:
    """The run goes on without it and ends as it would have."""
    spoil(mirror_of(unusable))
    ended = run_to_the_error(unusable)

    codes = [line["code"] for line in ended.lines if line["type"] == "warning"]
    assert codes.count("mirror_failed") == 1
    assert codes.count("image_skipped") == 3


# --- later versions ---

LATER: Record = {"seq": 1, "timestamp": "2026-01-01T00:00:00.000Z", "message": "m"}


@pytest.mark.parametrize(
    "line",
    [
        {"type": "novelty"},
        {"type": "info", "topic": "novelty", "data": {}},
        {"type": "interrupted", "step": 1, "reason": "novelty", "path": None, "total_time": 1.0},
        {"type": "warning", "code": "novelty", "data": {}},
    ],
)
def test_the_schema_takes_what_a_later_version_may_add(line: Record) -> None:
    """A host that validates goes on when the minor part of the protocol grows."""
    EVENT_VALIDATOR.validate({**LATER, **line})


@pytest.mark.parametrize(
    "line", [{"type": "start"}, {"type": "info"}, {"type": "info", "topic": "phase", "data": {}}]
)
def test_the_schema_is_strict_about_what_it_knows(line: Record) -> None:
    """A known type lacks no field."""
    assert not EVENT_VALIDATOR.is_valid({**LATER, **line})


@pytest.mark.parametrize(("kind", "wrong"), [("complete", 99), ("progress", 100)])
def test_only_a_complete_run_stands_at_100_percent(kind: str, wrong: int) -> None:
    """The schema knows it, too: hosts mark a job as done when they see it."""
    (described,) = [
        each["properties"]["percent"]
        for each in train_lora.event_schema()["oneOf"]
        if each["properties"]["type"].get("const") == kind
    ]
    jsonschema.validate({"complete": 100, "progress": 99}[kind], described)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, described)
