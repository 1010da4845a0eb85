"""Watchers: TensorBoard, a file and a small server are told of a run, and cannot disturb it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import torch.utils.tensorboard  # noqa: F401, takes seconds, which a run has before
from conftest import Recorder, load_config, snapshot, write_config, write_image
from processes import run_program, wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import tiny_base

import train_lora
from train_lora import (
    Emitter,
    ErrorEvent,
    ProgressEvent,
    SampleEvent,
    StartEvent,
    TrainError,
    TrainingConfig,
    WarningCode,
)

NUMBERS: dict[str, Any] = {
    "total_steps": 40,
    "percent": 5,
    "epoch": 0,
    "learning_rate": 1e-5,
    "grad_norm": None,
    "images_per_second": 2.0,
    "seconds_per_step": 0.5,
    "elapsed_seconds": 9.0,
    "eta_seconds": 20.0,
    "memory_bytes": 2**20,
}


def began(config: TrainingConfig, step: int = 0) -> StartEvent:
    """Make a first line."""
    said = config.as_record()
    return StartEvent(run_id="a1", resumed_step=step, total_steps=40, config=said)


def made(step: int, loss: float = 0.25) -> ProgressEvent:
    """Make a progress line."""
    return ProgressEvent(step=step, loss=loss, **NUMBERS)


def failed() -> ErrorEvent:
    """Make a last line."""
    code, hint = train_lora.ErrorCode.INTERNAL_ERROR, "Look."
    return ErrorEvent(code=code, step=1, path=None, hint=hint, problems=(), message="It fails")


def tell(events: Emitter, *lines: train_lora.Event) -> None:
    """Send lines without the pause between two progress lines."""
    for line in lines:
        events._progress_step = None
        events.emit(line)


@contextlib.contextmanager
def telling(config: TrainingConfig, events: Emitter, step: int = 0) -> Iterator[None]:
    """Begin a run's lines with those who watch, into its events.jsonl."""
    output = config.output_path
    output.mkdir(exist_ok=True)
    with train_lora.watched(config, events), train_lora.mirrored(events, output, lambda: None):
        tell(events, began(config, step))
        yield


def free_port() -> int:
    """Find a port that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        port: int = door.getsockname()[1]
        return port


# --- Numbers for Prometheus ---

SAMPLE = re.compile(r'(?P<name>[a-zA-Z_:][\w:]*)\{lora="zkb",run_id="a1"\} (?P<value>[-+0-9.e]+)\n')


def samples(text: str) -> dict[str, float]:
    """Read Prometheus' text format: a type before each metric, and every line is one or other."""
    found = {}
    for typed, line in zip(*[iter(text.splitlines(keepends=True))] * 2, strict=True):
        sample = SAMPLE.fullmatch(line)
        assert sample
        assert typed == f"# TYPE {sample['name']} gauge\n"
        found[sample["name"]] = float(sample["value"])
    return found


def test_the_metrics_file_holds_the_newest_numbers(in_workspace: Path, events: Emitter) -> None:
    """Of each type of line; what is unknown is left out, and nothing else lies beside it."""
    config = load_config(metrics_file="watch/zkb.prom", lora_name="zkb")
    with telling(config, events):
        tell(events, made(2, 0.5), made(3, 0.25))
    found = samples((in_workspace / "watch" / "zkb.prom").read_text("ascii"))

    assert found["train_lora_progress_loss"] == 0.25
    assert found["train_lora_progress_step"] == 3
    assert found["train_lora_start_total_steps"] == 40
    assert "train_lora_progress_grad_norm" not in found
    assert abs(found["train_lora_progress_timestamp_seconds"] - time.time()) < 60
    assert [path.name for path in (in_workspace / "watch").iterdir()] == ["zkb.prom"]


def test_a_metrics_file_that_cannot_be_written_is_told_once(
    in_workspace: Path, events: Emitter, recorder: Recorder
) -> None:
    """The warning names the knob, and the lines go on."""
    (in_workspace / "full").touch()
    config = load_config(metrics_file="full/zkb.prom")
    with telling(config, events):
        wait_until(lambda: recorder.codes() == ["watcher_failed"])
        tell(events, made(2), made(3))
    (told,) = recorder.of_type("warning")

    assert told["data"]["knob"] == "metrics_file"
    assert [record["type"] for record in recorder.records][-2:] == ["progress", "progress"]


def test_a_metrics_file_is_written_again_once_the_disk_has_room(
    in_workspace: Path, events: Emitter, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What failed after it had worked is no reason to give up."""
    written, write_whole, full = [], train_lora.write_whole, threading.Event()

    def write(path: Path, content: bytes) -> None:
        if path.suffix == ".prom":
            written.append(path)
            if full.is_set():
                raise OSError(28, "No space left on device")
        write_whole(path, content)

    monkeypatch.setattr(train_lora, "write_whole", write)
    config = load_config(metrics_file="zkb.prom", lora_name="zkb")
    with telling(config, events):
        wait_until(lambda: len(written) == 1)
        full.set()
        tell(events, made(2))
        wait_until(lambda: len(written) == 2)
        full.clear()
        tell(events, made(3))
    found = samples((in_workspace / "zkb.prom").read_text("ascii"))

    assert found["train_lora_progress_step"] == 3
    assert recorder.codes() == []


@pytest.mark.parametrize("value", ["zkb.txt", "out/lora_final.safetensors", "a.prom\n"])
def test_only_a_file_of_metrics_is_ever_rewritten(in_workspace: Path, value: str) -> None:
    """No result and no text of somebody else can be named by mistake."""
    with pytest.raises(TrainError) as refused:
        load_config(metrics_file=value)

    assert [problem.path for problem in refused.value.problems] == ["metrics_file"]


# --- TensorBoard ---


def drawn(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[int]]]:
    """Read what TensorBoard shows: the points of each curve, and the steps of each picture."""
    board = EventAccumulator(str(folder)).Reload()
    tags = board.Tags()
    curves = {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in tags["scalars"]}
    return curves, {tag: [e.step for e in board.Images(tag)] for tag in tags["images"]}


def test_tensorboard_shows_numbers_and_previews(in_workspace: Path, events: Emitter) -> None:
    """As they were told; a picture stands under its prompt."""
    config = load_config(report_to=["tensorboard"])
    image = write_image(in_workspace / "step_2.png", (64, 32))
    shown = SampleEvent(step=2, image_path=str(image), prompt="zkb", seed=7)
    with telling(config, events):
        tell(events, made(1, 0.5), made(2, 0.25), shown)
    curves, pictures = drawn(in_workspace / "out" / "tensorboard")

    assert curves["progress/loss"] == [(1, 0.5), (2, 0.25)]
    assert "progress/grad_norm" not in curves
    assert pictures == {"samples/zkb (seed 7)": [2]}


def test_a_restart_draws_no_point_twice(in_workspace: Path) -> None:
    """What a killed start drew beyond its last checkpoint gives way to what is made of it anew."""
    config = load_config(report_to=["tensorboard"])
    with telling(config, Emitter(lambda _: None)):
        pass  # nothing to draw, and no file of it
    for begin, end, loss in ((0, 6, 0.5), (3, 9, 0.25)):
        events = Emitter(lambda _: None)
        with telling(config, events, begin):
            tell(events, *(made(step, loss) for step in range(begin + 1, end)))
        time.sleep(1)  # files are named after the second
    curves, _ = drawn(in_workspace / "out" / "tensorboard")

    assert curves["progress/loss"] == [(n, 0.5 if n <= 3 else 0.25) for n in range(1, 9)]


def test_a_picture_that_is_gone_ends_the_drawing_alone(
    in_workspace: Path, events: Emitter, recorder: Recorder
) -> None:
    """The warning says what it lacks."""
    config = load_config(report_to=["tensorboard"])
    lost = SampleEvent(step=1, image_path=str(in_workspace / "lost.png"), prompt="zkb", seed=7)
    with telling(config, events):
        tell(events, lost)
        wait_until(lambda: recorder.codes() == ["watcher_failed"])
        tell(events, made(2))

    assert recorder.records[-1]["step"] == 2


def test_preflight_says_what_to_install_for_tensorboard(
    in_workspace: Path, events: Emitter, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything heavy, and for nobody who does not ask for it."""
    find = importlib.util.find_spec

    def lacking(name: str) -> Any:
        return None if name == "tensorboard" else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", lacking)
    train_lora.LoRATrainer(load_config(), events).validate()
    with pytest.raises(TrainError) as refused:
        train_lora.LoRATrainer(load_config(report_to=["tensorboard"])).validate()

    assert refused.value.code is train_lora.ErrorCode.PACKAGE_MISSING
    assert refused.value.hint == "Run: pip install tensorboard"


# --- The server ---


def ask(port: int, path: str, **headers: str) -> tuple[int, Message, str]:
    """Ask the server; return status, headers and text."""
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def say(port: int, request: bytes) -> bytes:
    """Send bytes as they are and read the answer to its end."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as caller:
        caller.sendall(request)
        return b"".join(iter(lambda: caller.recv(4096), b""))


@contextlib.contextmanager
def serving(events: Emitter, **changes: Any) -> Iterator[int]:
    """Serve a run that has begun."""
    port = free_port()
    with telling(load_config(http_port=port, lora_name="zkb", **changes), events):
        wait_until(lambda: port_answers(port))
        yield port


def port_answers(port: int) -> bool:
    """Tell whether somebody listens."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def test_the_server_tells_the_newest_line_and_the_numbers(
    in_workspace: Path, events: Emitter, recorder: Recorder
) -> None:
    """Under /healthz and /metrics; whatever else is asked leads nowhere."""
    with serving(events) as port:
        tell(events, made(2))
        wait_until(lambda: "progress" in ask(port, "/metrics?x=1")[2])
        health, metrics = ask(port, "/healthz"), ask(port, "/metrics")
        elsewhere = ask(port, "/out/events.jsonl")

    assert health[0] == 200
    assert json.loads(health[2]) == recorder.records[-1]
    assert samples(metrics[2])["train_lora_progress_step"] == 2
    assert metrics[1]["Content-Type"].startswith("text/plain; version=0.0.4")
    assert elsewhere[0] == 404


def test_a_run_that_failed_is_not_healthy(in_workspace: Path, events: Emitter) -> None:
    """For as long as it can still be asked."""
    with serving(events) as port:
        tell(events, failed())
        wait_until(lambda: ask(port, "/healthz")[0] == 503)


@pytest.mark.parametrize(
    ("request_line", "host", "status"),
    [
        ("POST /metrics", "127.0.0.1", 405),
        ("HEAD /metrics", "127.0.0.1", 405),
        ("nonsense", "127.0.0.1", 405),
        ("GET /metrics", "evil.example", 421),
        ("GET /metrics", "127.0.0.1.evil.example:80", 421),
        ("GET /metrics", "127.0.0.1\r\nHost: evil.example", 421),
        ("GET /metrics", "LOCALHOST:8080", 200),
        ("GET /metrics", "127.0.0.1", 200),
    ],
)
def test_only_get_and_only_this_machines_names_are_answered(
    in_workspace: Path, events: Emitter, request_line: str, host: str, status: int
) -> None:
    """A page whose name leads to 127.0.0.1 reads nothing of a run."""
    with serving(events) as port:
        said = say(port, f"{request_line} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())

    assert int(said.split()[1]) == status
    assert (b"train_lora_" in said) == (status == 200)


def numbered(text: str) -> list[tuple[int, dict[str, Any]]]:
    """Read server-sent events by their specification: their ids and what they hold."""
    found = []
    for block in text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((int(fields["id"]), json.loads(fields["data"])))
    return found


ASKED: list[tuple[str, dict[str, str], int]] = [
    ("/events", {}, 1),
    ("/events?from=3", {}, 3),
    ("/events?from=0", {}, 1),
    ("/events?from=4", {"Last-Event-ID": "1"}, 2),
    ("/events?from=900", {}, 1),
]


@pytest.mark.parametrize(("path", "headers", "first"), ASKED)
def test_lines_are_read_from_any_one_on_to_the_last(
    in_workspace: Path,
    events: Emitter,
    recorder: Recorder,
    path: str,
    headers: dict[str, str],
    first: int,
) -> None:
    """Those of earlier starts count; who has seen more than there is gets all."""
    heard: list[str] = []
    with telling(load_config(), Emitter(lambda _: None)):
        pass
    with serving(events) as port:
        tell(events, made(1), made(2))
        mirror = in_workspace / "out" / "events.jsonl"
        wait_until(lambda: mirror.read_bytes().count(b"\n") == 4)
        reader = threading.Thread(target=lambda: heard.append(ask(port, path, **headers)[2]))
        reader.start()
        time.sleep(0.3)
        tell(events, failed())
    reader.join(10)
    lines = [json.loads(line) for line in mirror.read_text().splitlines()]

    assert numbered(heard[0]) == list(enumerate(lines, start=1))[first - 1 :]
    assert lines[1:] == recorder.records


def test_readers_who_do_not_read_slow_nobody(
    in_workspace: Path, events: Emitter, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than there is room for: they are dropped, and short questions find an answer."""
    monkeypatch.setattr(train_lora, "ANSWER_SECONDS", 0.5)
    heavy = "x" * 50_000
    with serving(events) as port, contextlib.ExitStack() as readers:
        for _ in range(3 * train_lora.STREAMS):
            caller = readers.enter_context(socket.create_connection(("127.0.0.1", port)))
            caller.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        began = time.monotonic()
        for _ in range(100):
            events.warn(WarningCode.IMAGE_SKIPPED, heavy)
        assert time.monotonic() - began < 5
        wait_until(lambda: ask(port, "/healthz")[0] == 200, 20)
        threads = [t for t in threading.enumerate() if t.daemon]
        assert len(threads) < train_lora.ANSWERS + 20

    assert len(recorder.of_type("warning")) == 100


def test_whoever_says_nothing_is_left(
    in_workspace: Path, events: Emitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it help to say one letter after the other."""
    monkeypatch.setattr(train_lora, "ANSWER_SECONDS", 0.3)
    with serving(events) as port, socket.create_connection(("127.0.0.1", port)) as silent:
        silent.settimeout(10)
        assert silent.recv(100) == b""


def test_a_port_that_is_taken_costs_a_warning(
    in_workspace: Path, events: Emitter, recorder: Recorder
) -> None:
    """After the first line, and before anything heavy."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with telling(load_config(http_port=port), events):
            wait_until(lambda: recorder.codes() == ["watcher_failed"])

    assert [record["type"] for record in recorder.records] == ["start", "warning"]
    assert recorder.records[1]["data"]["knob"] == "http_port"


# --- A whole run ---


def test_a_run_that_is_watched_learns_the_same(ground: Path, workspace: Path) -> None:
    """To the byte, by the program itself; a completed one started again touches nothing of it."""
    same = {
        "base_model": str(tiny_base("sd1", ground / "bases")),
        "resolution": 256,
        "steps": 2,
        "sample_steps": 1,
        "sample_prompts": ["zkb"],
    }
    same |= {"device": "cpu", "lora_rank": 2, "lora_name": "zkb", "cache_dir": "cache"}
    watched = {"report_to": ["tensorboard"], "metrics_file": "m.prom", "http_port": free_port()}
    results = []
    for number, more in enumerate(({}, watched)):
        write_config(workspace, output_path=f"out{number}", **same, **more)
        ended = run_program("--config", "config.json", cwd=workspace)
        assert (ended.code, ended.last["type"]) == (0, "complete")
        results.append((workspace / f"out{number}" / "lora_final.safetensors").read_bytes())
    before = snapshot(workspace / "out1" / "tensorboard")
    again = run_program("--config", "config.json", cwd=workspace)
    curves, pictures = drawn(workspace / "out1" / "tensorboard")

    assert results[0] == results[1]
    assert [step for step, _ in curves["progress/loss"]] == [1, 2]
    assert list(pictures.values()) == [[2]]
    assert "train_lora_complete_step" in (workspace / "m.prom").read_text()
    assert again.code == 0
    assert snapshot(workspace / "out1" / "tensorboard") == before
