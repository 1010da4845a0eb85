"""The output folder: one run at a time, nothing lost, every file whole."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Recorder, load_config, snapshot, write_earlier_run
from processes import program, run_program, script, started
from tiny_runs import tiny_base, tiny_config

import train_lora
from train_lora import ErrorCode, TrainError

POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
PREFLIGHT = ("--config", "config.json", "--validate-only")


# --- one run per folder ---

HOLDER = """
import pathlib, sys, time, train_lora
with train_lora.claimed(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Let another process hold a folder as a live run does, and kill it in the end."""
    with started(*script(HOLDER, folder)) as child:
        assert child.stdout.readline().strip() == b"held"
        yield child.process


@pytest.mark.parametrize("arguments", [("--validate-only",), (), ("--fresh",)])
def test_a_folder_in_use_is_refused_and_left_as_it_is(
    workspace: Path, arguments: tuple[str, ...]
) -> None:
    """Two runs in one folder would destroy each other's files."""
    write_earlier_run(workspace / "out")
    with held(workspace / "out"):
        before = snapshot(workspace)
        ended = run_program("--config", "config.json", *arguments, cwd=workspace)
        assert (ended.code, ended.last["code"]) == (1, "output_busy")
        assert snapshot(workspace) == before


@POSIX
def test_a_killed_run_leaves_its_folder_free(workspace: Path) -> None:
    """The system lets go of the lock, however the process ended."""
    with held(workspace / "out") as process:
        assert run_program(*PREFLIGHT, cwd=workspace).last["code"] == "output_busy"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert run_program(*PREFLIGHT, cwd=workspace).code == 0


@POSIX
def test_of_two_real_runs_the_second_is_refused(workspace: Path) -> None:
    """The first has said its first line, and imports its libraries for a while."""
    with started(*program(), cwd=workspace) as first:
        assert first.line()["type"] == "start"
        first.process.send_signal(signal.SIGSTOP)
        second = run_program("--config", "config.json", cwd=workspace)
    assert (second.code, len(second.lines), second.last["code"]) == (1, 1, "output_busy")


def test_a_preflight_in_passing_does_not_stop_a_run_from_starting(in_workspace: Path) -> None:
    """A host that looks again and again must not break what it looks at."""
    output = in_workspace / "out"
    output.mkdir()
    descriptor = os.open(output / ".lock", os.O_RDWR | os.O_CREAT)
    assert train_lora.try_lock(descriptor)
    threading.Timer(0.3, os.close, [descriptor]).start()
    with held(output) as process:
        assert process.poll() is None


def test_two_preflights_at_once_do_not_refuse_each_other(tmp_path: Path) -> None:
    """The lock that one of them holds for an instant is no run."""
    descriptor = train_lora.lock(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    threading.Timer(0.2, os.close, [descriptor]).start()
    train_lora.check_output(tmp_path)


def test_a_folder_that_another_run_has_taken_meanwhile_is_not_taken_back(tmp_path: Path) -> None:
    """The lock of the removed one is worth nothing, however often it is asked for."""
    with train_lora.claimed(tmp_path / "out") as claim:
        shutil.rmtree(tmp_path / "out")
        with train_lora.claimed(tmp_path / "out"):
            for _ in range(2):
                with pytest.raises(TrainError, match="another run"):
                    claim()
        claim()
        with pytest.raises(TrainError, match="another run"):
            train_lora.check_output(tmp_path / "out")


# --- an earlier run ---


def contents(folder: Path) -> dict[str, str]:
    """Read all files below a folder, but for the lock."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in files}


def test_an_earlier_run_is_moved_aside_and_never_deleted(tmp_path: Path) -> None:
    """Each into a folder of its own, with everything the run had written."""
    write_earlier_run(tmp_path)
    (tmp_path / "stop").unlink()
    first = contents(tmp_path)
    assert train_lora.set_aside(tmp_path) == tmp_path / "earlier_1"
    assert contents(tmp_path / "earlier_1") == first
    write_earlier_run(tmp_path)
    assert train_lora.set_aside(tmp_path) == tmp_path / "earlier_2"
    assert contents(tmp_path / "earlier_1") == first


def test_without_an_earlier_run_nothing_is_moved(tmp_path: Path) -> None:
    """Files of others stay where they are."""
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / ".lock").touch()
    assert train_lora.set_aside(tmp_path) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "notes.txt"]


def test_a_fresh_run_sets_the_earlier_one_aside_and_says_where(workspace: Path) -> None:
    """The new run begins in a clean folder."""
    write_earlier_run(workspace / "out")
    (workspace / "out" / "notes.txt").write_text("mine", encoding="utf-8")
    ended = run_program("--config", "config.json", "--fresh", cwd=workspace)
    (resume,) = [line for line in ended.lines if line.get("topic") == "resume"]
    assert Path(resume["data"]["set_aside"]).name == "earlier_1"
    earlier = contents(workspace / "out" / "earlier_1")
    assert earlier["lora_final.safetensors"] == earlier["events.jsonl"] == "earlier"
    assert (workspace / "out" / "notes.txt").exists()
    mirror = (workspace / "out" / "events.jsonl").read_bytes()
    assert json.loads(mirror.splitlines()[0])["type"] == "start"


def test_a_fresh_run_in_a_new_folder_has_nothing_to_set_aside(workspace: Path) -> None:
    """The flag does no harm where it is not needed."""
    ended = run_program("--config", "config.json", "--fresh", cwd=workspace)
    assert ended.lines[0]["type"] == "start"
    assert not (workspace / "out" / "earlier_1").exists()


# --- paths that lead nowhere ---


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no file tell that this is a container."""
    monkeypatch.setattr(train_lora, "IN_CONTAINER", ())


def test_a_path_that_leads_nowhere_is_told_from_where_on(tmp_path: Path, outside: None) -> None:
    """The nearest folder there is, with names in it that are alike."""
    for name in ("datasets", "dataset_old", "models", "Zeta"):
        (tmp_path / name).mkdir()
    nearest = f"The nearest folder there is: {tmp_path}"
    assert train_lora.whereabouts(tmp_path / "zzz" / "deep" / "er") == f"{nearest}."
    told = train_lora.whereabouts(tmp_path / "dataset" / "v1")
    assert told == f"{nearest}, which has datasets, dataset_old."
    assert train_lora.whereabouts(tmp_path / "zeta").endswith(", which has Zeta.")


@pytest.mark.parametrize("path", ["C:\new\bilder", "data\tzkb", "a\x08b"])
def test_a_path_with_a_swallowed_backslash_is_recognised(path: str, outside: None) -> None:
    """No name has a line break or a tab in it that somebody meant."""
    assert "backslash" in train_lora.whereabouts(Path(path))
    assert "nearest" not in train_lora.whereabouts(Path(path))


@pytest.mark.parametrize("inside", [True, False])
def test_a_container_is_spoken_of_inside_one_alone(
    inside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Docker and Podman leave a file that tells."""
    marks = (str(tmp_path / "gone"), str(tmp_path / "mark"))
    monkeypatch.setattr(train_lora, "IN_CONTAINER", marks)
    if inside:
        (tmp_path / "mark").touch()
    assert ("This is a container" in train_lora.whereabouts(tmp_path / "nowhere")) is inside


def test_a_path_on_a_drive_that_is_not_there_is_told(
    tmp_path: Path, outside: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows not even its root exists; whatever a path is for, the answer names it."""
    path = tmp_path / "out"
    monkeypatch.setattr(os.path, "lexists", lambda _: False)
    assert train_lora.whereabouts(path) == ""
    with pytest.raises(TrainError, match=str(path)) as refused:
        train_lora.check_output(path)
    assert refused.value.code is ErrorCode.OUTPUT_UNUSABLE
    with pytest.raises(TrainError, match=str(path)) as refused:
        train_lora.check_images(path, "regularization_path", drawn=True)
    assert refused.value.code is ErrorCode.DATASET_NOT_FOUND


def test_only_so_many_names_are_compared(
    tmp_path: Path, outside: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of a million files is not looked through for a hint."""
    monkeypatch.setattr(train_lora, "MOST_NAMES", 2)
    for number in range(5):
        (tmp_path / f"dataset{number}").touch()
    assert train_lora.whereabouts(tmp_path / "dataset").count("dataset") == 2


@pytest.mark.parametrize("knob", ["dataset_path", "base_model"])
def test_the_error_about_a_path_names_what_is_there(
    workspace: Path, outside: None, knob: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of images and of the base model."""
    monkeypatch.chdir(workspace)
    wrong = {"dataset_path": "./dat", "base_model": "./modle"}[knob]
    with pytest.raises(train_lora.TrainError) as refused:
        train_lora.check_paths(load_config(**{knob: wrong}))
    right = {"dataset_path": "data", "base_model": "model"}[knob]
    assert refused.value.hint.endswith(f"{workspace}, which has {right}.")


# --- whole or not at all ---


@pytest.fixture
def model(ground: Path) -> Path:
    """Provide a tiny base model."""
    return tiny_base("sd1", ground / "bases")


@pytest.fixture
def small_disk(model: Path) -> Iterator[int]:
    """Let no file grow beyond 16 KiB, as on a disk that is full once the model is there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, before[1]))
    yield 16384
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("before", [None, b"earlier"])
def test_a_write_that_fails_leaves_nothing_behind(
    before: bytes | None, small_disk: int, tmp_path: Path
) -> None:
    """What was there stays as it was."""
    path = tmp_path / "file"
    if before:
        path.write_bytes(before)
    with pytest.raises(OSError, match="File too large"):
        train_lora.write_whole(path, bytes(small_disk + 1))
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before] * bool(before)
    train_lora.write_whole(path, bytes(small_disk))
    assert path.read_bytes() == bytes(small_disk)


def test_a_run_on_a_full_disk_ends_with_save_failed(
    ground: Path, tmp_path: Path, small_disk: int
) -> None:
    """No half file has a final name."""
    out = tmp_path / "out"
    recorder = Recorder()
    config = tiny_config(ground, steps=1, output_path=str(out))
    with pytest.raises(train_lora.TrainError):
        train_lora.LoRATrainer(config, train_lora.Emitter(recorder)).train()
    assert recorder.records[-1]["code"] == "save_failed"
    assert not list(out.rglob("*.safetensors"))
    assert not list(out.rglob("*.tmp"))
