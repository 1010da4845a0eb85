"""Preflight: everything wrong is found at once, quickly, and without a trace."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    PROGRAM,
    ROOT,
    Ended,
    load_config,
    run_program,
    write_config,
    write_image,
    write_safetensors,
)

import train_lora

POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
NOT_ROOT = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is closed to root"
)


def validate(folder: Path, *arguments: str, **environment: str) -> Ended:
    """Run a preflight of the config in a folder."""
    command = ("--config", "config.json", "--validate-only", *arguments)
    return run_program(*command, cwd=folder, stdin=b"", **environment)


def paths(ended: Ended) -> list[str]:
    """List the places a run complains about."""
    return [problem["path"] for problem in ended.last["problems"]]


# --- the report ---


def test_the_last_line_carries_the_whole_report(workspace: Path) -> None:
    """All that a host shows before it offers the start button."""
    (workspace / "data" / "image1.txt").write_text("a cat", encoding="utf-8")
    (workspace / "data" / "broken.png").write_bytes(b"x")
    write_config(workspace, epochs=4, batch_size=2, resolution=256)
    ended = validate(workspace, PATH="")
    assert (ended.code, ended.last["type"], ended.last["topic"]) == (0, "info", "valid")
    report = ended.last["data"]
    assert report.pop("disk_free_bytes") > report.pop("disk_needed_bytes") > 0
    assert report == {
        "images": 3,
        "skipped": 1,
        "captions_found": 1,
        "captions_missing": 2,
        "resolutions": {"320x300": 3},
        "regularization_images": 0,
        "effective_batch": 2,
        "steps_per_epoch": 2,
        "total_steps": 6,
        "family": "sd1",
        "device": "cpu",
        "warnings": {"image_skipped": 1, "resolution_unusual": 1},
    }


def test_the_facts_come_one_by_one_before_the_report(workspace: Path) -> None:
    """Each as soon as it is known."""
    lines = validate(workspace).lines
    topics = [line["topic"] for line in lines if line["type"] == "info"]
    assert lines[0]["type"] == "start"
    assert topics == ["model", "dataset", "device", "memory", "valid"]


def test_a_model_that_is_not_cached_leaves_gaps_and_a_warning(workspace: Path) -> None:
    """Offline is no error: what is not known is null."""
    write_config(workspace, base_model="some/model")
    ended = validate(workspace, HF_HOME=str(workspace / "hub"))
    assert ended.code == 0
    assert (ended.last["data"]["family"], ended.last["data"]["disk_needed_bytes"]) == (None, None)
    assert ended.last["data"]["warnings"]["model_not_cached"] == 1


@pytest.mark.parametrize(
    ("resolution", "unusual"), [(256, True), (384, False), (512, False), (768, False), (776, True)]
)
def test_a_resolution_far_from_the_models_own_is_remarked(
    workspace: Path, resolution: int, unusual: bool
) -> None:
    """The base was made for 512; a little less and half as much again are fine."""
    write_config(workspace, resolution=resolution)
    assert ("resolution_unusual" in validate(workspace).last["data"]["warnings"]) is unusual


# --- without a trace ---


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Record every entry below a folder with its kind, size and times of change."""
    stats = {str(path): path.lstat() for path in [folder, *folder.rglob("*")]}
    return {name: (s.st_mode, s.st_size, s.st_mtime_ns) for name, s in stats.items()}


def write_earlier_run(output: Path) -> None:
    """Leave behind what a run leaves behind."""
    for name in ("checkpoints/lora_step_1.safetensors", "samples/step_1.png", "state/step_1/x"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("earlier", encoding="utf-8")
    for name in ("events.jsonl", "loss_history.csv", "lora_final.safetensors", ".lock", "stop"):
        (output / name).write_text("earlier", encoding="utf-8")


@pytest.mark.parametrize("arguments", [(), ("--fresh",), ("--debug",)])
@pytest.mark.parametrize("earlier", [False, True])
def test_preflight_writes_nothing(
    workspace: Path, earlier: bool, arguments: tuple[str, ...]
) -> None:
    """No file appears, changes or goes, whatever lies in the output folder."""
    if earlier:
        write_earlier_run(workspace / "out")
    before = snapshot(workspace)
    assert validate(workspace, *arguments).code == 0
    assert snapshot(workspace) == before


def test_a_failed_preflight_writes_nothing(workspace: Path) -> None:
    """Nor does one that finds something wrong."""
    (workspace / "model" / "unet" / "config.json").write_text("{", encoding="utf-8")
    before = snapshot(workspace)
    assert validate(workspace).code == 1
    assert snapshot(workspace) == before


# --- places that do not work ---


def test_all_three_places_are_complained_about_at_once(workspace: Path) -> None:
    """Nobody mends one path to be told of the next."""
    (workspace / "file").touch()
    write_config(workspace, dataset_path="gone", output_path="file", base_model="nothing")
    ended = validate(workspace)
    assert (ended.code, len(ended.lines), ended.last["code"]) == (1, 1, "dataset_not_found")
    assert paths(ended) == ["dataset_path", "output_path", "base_model"]
    assert all(problem["hint"] for problem in ended.last["problems"])


@pytest.mark.parametrize("folder", ["gone", "config.json", "config.json/inner", 300 * "x"])
@pytest.mark.parametrize("knob", ["dataset_path", "regularization_path"])
def test_images_in_no_folder_are_refused(workspace: Path, knob: str, folder: str) -> None:
    """Missing, a file, below a file, or with a name no system has."""
    write_config(workspace, **{knob: folder})
    ended = validate(workspace)
    assert (ended.last["code"], paths(ended)) == ("dataset_not_found", [knob])


@NOT_ROOT
def test_a_dataset_without_the_right_to_look_is_refused(workspace: Path) -> None:
    """It exists, but not for this user."""
    (workspace / "data").chmod(0)
    assert validate(workspace).last["code"] == "dataset_not_found"


@pytest.mark.parametrize(
    "output", ["config.json", "config.json/out/deep", 300 * "y", "x/" + 300 * "y", 100 * "猫"]
)
def test_an_output_that_cannot_be_made_is_refused(workspace: Path, output: str) -> None:
    """It is a file, lies below a file, or has a name no system has."""
    write_config(workspace, output_path=output)
    ended = validate(workspace)
    assert (ended.last["code"], paths(ended)) == ("output_unusable", ["output_path"])


@POSIX
@pytest.mark.parametrize("output", ["link", "link/deep"])
def test_an_output_behind_a_broken_link_is_refused(workspace: Path, output: str) -> None:
    """A link to a disk that is not mounted must not fill the disk in front of it."""
    (workspace / "link").symlink_to(workspace / "unmounted")
    write_config(workspace, output_path=output)
    assert validate(workspace).last["code"] == "output_unusable"


@pytest.mark.parametrize("name", ["state", "checkpoints", "samples"])
def test_a_file_where_a_folder_belongs_is_refused(workspace: Path, name: str) -> None:
    """Otherwise the run would train to its end and have nowhere to put what it learned."""
    (workspace / "out").mkdir()
    (workspace / "out" / name).touch()
    ended = validate(workspace)
    assert (ended.last["code"], paths(ended)) == ("output_unusable", ["output_path"])


@POSIX
@pytest.mark.parametrize("arguments", [("--validate-only",), ()])
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_lock_that_is_no_file_is_refused(
    workspace: Path, kind: str, arguments: tuple[str, ...]
) -> None:
    """A pipe would be waited for, and what a link leads to is none of ours to make."""
    (workspace / "out").mkdir()
    if kind == "pipe":
        os.mkfifo(workspace / "out" / ".lock")
    else:
        (workspace / "out" / ".lock").symlink_to(workspace / "elsewhere")
    ended = run_program("--config", "config.json", *arguments, cwd=workspace)
    assert (ended.code, ended.last["code"]) == (1, "output_unusable")
    assert not (workspace / "elsewhere").exists()


@NOT_ROOT
def test_a_read_only_output_is_refused(workspace: Path) -> None:
    """Found out without trying to write."""
    (workspace / "out").mkdir(mode=0o555)
    assert validate(workspace).last["code"] == "output_unusable"


@POSIX
@pytest.mark.parametrize("name", ["a b", "ä ö 猫", "'quoted\"", "a\\b", "-out", 200 * "x"])
def test_a_place_may_have_any_name(workspace: Path, name: str) -> None:
    """Blanks, quotes and the letters of every language work for all three."""
    changes = {key: name + key for key in ("dataset_path", "base_model", "output_path")}
    (workspace / "data").rename(workspace / changes["dataset_path"])
    (workspace / "model").rename(workspace / changes["base_model"])
    (workspace / changes["output_path"]).mkdir()
    write_config(workspace, **changes)
    assert validate(workspace).code == 0


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
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"held"
        yield process
        process.kill()


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
        assert validate(workspace).last["code"] == "output_busy"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert validate(workspace).code == 0


def write_program(path: Path, script: str) -> Path:
    """Write an executable shell script."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@POSIX
def test_of_two_real_runs_the_second_is_refused(workspace: Path) -> None:
    """The first has said its first line, and imports its libraries for a while."""
    command = [sys.executable, str(PROGRAM), "--config", "config.json"]
    with subprocess.Popen(command, cwd=workspace, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert b'"start"' in first.stdout.readline()
        first.send_signal(signal.SIGSTOP)
        second = run_program("--config", "config.json", cwd=workspace)
        first.kill()
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


# --- space ---


def test_a_run_that_cannot_fit_is_refused_before_it_begins(workspace: Path) -> None:
    """A full disk after a night of training helps nobody."""
    write_config(workspace, steps=10**9, checkpoint_steps=1, validation_steps=1, resolution=2048)
    ended = validate(workspace)
    assert (ended.code, ended.last["code"], paths(ended)) == (1, "disk_full", ["output_path"])


# Eight weights of 8 by 8 take an adapter of rank × 16 numbers each. A LoRA file holds them in
# 2 bytes; each of four states holds them and two moments in 4; a picture has 3 bytes a pixel.
NUMBERS = 8 * (8 + 8)


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, 3 * 2 * 16 * NUMBERS + 4 * 12 * 16 * NUMBERS + 11 * 3 * 512**2),
        ({"lora_rank": 1}, 3 * 2 * NUMBERS + 4 * 12 * NUMBERS + 11 * 3 * 512**2),
        ({"steps": 1}, 2 * 16 * NUMBERS + 4 * 12 * 16 * NUMBERS + 3 * 512**2),
        (
            {"steps": 10, "checkpoint_steps": 3, "validation_steps": 5, "resolution": 256},
            4 * 2 * 16 * NUMBERS + 4 * 12 * 16 * NUMBERS + 3 * 3 * 256**2,
        ),
    ],
)
def test_the_space_needed_is_added_up_from_shapes(
    in_workspace: Path, changes: dict[str, Any], needed: int
) -> None:
    """LoRA files, the states kept for resuming, and previews, counted by hand."""
    config = load_config(**changes)
    _, structure = train_lora.inspect_model(config)
    assert structure is not None
    assert (
        train_lora.disk_needed(config, structure, train_lora.ImageOrder(config, 3).total_steps)
        == needed
    )


def test_layers_without_an_adapter_take_no_space(in_workspace: Path) -> None:
    """Convolutions, norms and biases stay as they are."""
    name = "diffusion_pytorch_model.safetensors"
    config = load_config(steps=1)
    _, before = train_lora.inspect_model(config)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    kept = {f"{block}.attn{a}.to_{p}.weight": (8, 8) for a in (1, 2) for p in ("q", "k")}
    other = {f"{block}.norm1.weight": (8,), f"{block}.ff.net.0.proj.weight": (64, 8)}
    write_safetensors(in_workspace / "model" / "unet" / name, {**kept, **other})
    _, after = train_lora.inspect_model(config)
    assert before is not None
    assert after is not None
    saved = train_lora.disk_needed(config, before, 1) - train_lora.disk_needed(config, after, 1)
    assert saved == (2 + 4 * 12) * 16 * NUMBERS // 2


# --- the device ---


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide a file whose text a program called nvidia-smi answers with, its arguments beside."""
    script = f'echo "$@" > "{tmp_path}/arguments"; /bin/cat "{tmp_path}/answer"'
    program = write_program(tmp_path / "bin" / "nvidia-smi", script)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "answer"


SLOW = "GPU-1a2b, 6.1, NVIDIA GeForce GTX 1080 Ti, 11264, 11000, 580.95.05"
FAST = "GPU-3c4d, 8.9, NVIDIA GeForce RTX 4090, 24564, 23950, 580.95.05"
NVIDIA_NAMES = {"slow": "NVIDIA GeForce GTX 1080 Ti", "fast": "NVIDIA GeForce RTX 4090"}


@POSIX
def test_a_graphics_card_is_described_by_its_driver(answer: Path) -> None:
    """Name, memory and version, without loading torch."""
    answer.write_text(FAST + "\n", encoding="utf-8")
    assert train_lora.inspect_device("auto") == train_lora.DeviceFacts(
        kind="cuda",
        name="NVIDIA GeForce RTX 4090",
        memory_total_bytes=24564 * 2**20,
        memory_free_bytes=23950 * 2**20,
        driver="580.95.05",
    )


@POSIX
def test_a_card_that_shares_the_main_memory_is_still_a_card(answer: Path) -> None:
    """Such a driver does not tell the memory: unknown is null, and the card trains."""
    answer.write_text("GPU-1, 12.1, NVIDIA GB10, [N/A], [N/A], 580.95.05\n", encoding="utf-8")
    device = train_lora.inspect_device("auto")
    assert (device.kind, device.name, device.memory_total_bytes) == ("cuda", "NVIDIA GB10", None)


@POSIX
@pytest.mark.parametrize(
    "text", ["", "garbage", "a, b, c, d, e", "a, b, c, d, e, f", "No devices were found", "\0\0"]
)
def test_a_driver_that_answers_nonsense_means_no_card(answer: Path, text: str) -> None:
    """A broken driver trains nothing, and is no reason to fail."""
    answer.write_text(text, encoding="utf-8")
    assert train_lora.inspect_device("auto").kind in ("cpu", "mps")


@POSIX
def test_a_driver_that_answers_in_no_known_letters_means_no_card(answer: Path) -> None:
    """Bytes that are no text are an answer like any other nonsense."""
    answer.write_bytes(b"\xff\xfe\x00")
    assert train_lora.inspect_device("auto").kind in ("cpu", "mps")


@POSIX
@pytest.mark.parametrize("script", ["exit 9", "kill -SEGV $$"])
def test_a_driver_that_fails_means_no_card(answer: Path, script: str) -> None:
    """Installed tools without hardware are common in containers."""
    write_program(answer.parent / "bin" / "nvidia-smi", script)
    assert train_lora.inspect_device("auto").kind in ("cpu", "mps")


@POSIX
@pytest.mark.parametrize("visible", ["", "-1", "-1,0", "7", "GPU-ffff"])
def test_a_hidden_card_is_not_seen(
    answer: Path, monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    """CUDA_VISIBLE_DEVICES rules here as it does in torch, also over a card that is asked for."""
    answer.write_text(FAST + "\n", encoding="utf-8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert train_lora.inspect_device("auto").kind in ("cpu", "mps")
    with pytest.raises(train_lora.TrainError) as refused:
        train_lora.inspect_device("cuda")
    assert refused.value.code is train_lora.ErrorCode.DEVICE_UNAVAILABLE


@POSIX
@pytest.mark.parametrize(
    ("wanted", "visible", "order", "found"),
    [
        ("auto", None, None, "fast"),
        ("cuda:1", None, None, "slow"),
        ("cuda", None, "PCI_BUS_ID", "slow"),
        ("cuda:1", None, "PCI_BUS_ID", "fast"),
        ("cuda", "1", None, "slow"),
        ("cuda:1", "1,0", "PCI_BUS_ID", "slow"),
        ("cuda", "GPU-1a2b", None, "slow"),
        ("cuda:1", "GPU-1a2b, GPU-3c4d", None, "fast"),
    ],
)
def test_a_card_is_counted_as_cuda_counts_it(
    answer: Path,
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    visible: str | None,
    order: str | None,
    found: str,
) -> None:
    """The fastest first unless CUDA_DEVICE_ORDER says otherwise; nvidia-smi goes by slots."""
    answer.write_text(f"{SLOW}\n{FAST}\n", encoding="utf-8")
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("CUDA_DEVICE_ORDER", order)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert train_lora.inspect_device(wanted).name == NVIDIA_NAMES[found]


@POSIX
@pytest.mark.parametrize("wanted", ["auto", "cuda", "cuda:1"])
def test_a_card_that_nvidia_smi_cannot_describe_has_unknown_memory(
    answer: Path, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    """Containers often have the driver alone; what torch will find there is not known."""
    (answer.parent / "bin" / "nvidia-smi").unlink()
    monkeypatch.setattr(train_lora, "CARD_NODES", (str(answer.parent),))
    device = train_lora.inspect_device(wanted)
    assert (device.kind, device.memory_free_bytes) == ("cuda", None)


@POSIX
def test_a_part_of_a_card_has_unknown_memory(answer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A MIG instance stands in no list of cards."""
    answer.write_text(FAST + "\n", encoding="utf-8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5e6f")
    device = train_lora.inspect_device("cuda")
    assert (device.kind, device.memory_free_bytes) == ("cuda", None)


@POSIX
@pytest.mark.parametrize("name", ["cuda", "cuda:3", "mps"])
def test_a_device_that_training_refuses_is_refused_before(workspace: Path, name: str) -> None:
    """Preflight says no to what cannot begin."""
    (workspace / "bin").mkdir()
    write_config(workspace, device=name)
    ended = validate(workspace, PATH=str(workspace / "bin"))
    assert (ended.code, ended.last["code"]) == (1, "device_unavailable")
    assert paths(ended) == ["device"]


@POSIX
def test_in_training_torch_says_which_device_there_is(workspace: Path) -> None:
    """nvidia-smi, which may be absent or count otherwise, is not even asked."""
    program = write_program(workspace / "bin" / "nvidia-smi", f"touch asked; echo '{FAST}'")
    path = f"{program.parent}:{os.environ['PATH']}"
    code = "import sys, torch; sys.exit(torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", code], check=False).returncode:
        pytest.skip("needs a machine without a card")
    ended = run_program("--config", "config.json", cwd=workspace, PATH=path)
    devices = [line["data"]["kind"] for line in ended.lines if line.get("topic") == "device"]
    planned = [line["data"] for line in ended.lines if line.get("topic") == "memory"]
    assert devices == ["cpu"]
    assert planned[0]["free_bytes"] != 23950 * 2**20 - train_lora.CONTEXT_BYTES
    assert not (workspace / "asked").exists()


def test_without_a_card_the_processor_is_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name and main memory, as far as the system tells."""
    monkeypatch.setenv("PATH", str(tmp_path))
    device = train_lora.inspect_device("auto")
    assert device.kind in ("cpu", "mps")
    assert device.name
    assert device.driver is None


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


# --- quickly ---


@pytest.mark.parametrize(("suffix", "side"), [("jpg", 1024), ("png", 1024), ("webp", 512)])
def test_a_preflight_of_100_photos_reads_none_thrice_and_imports_nothing_heavy(
    workspace: Path, suffix: str, side: int
) -> None:
    """Which is why it takes less than a second."""
    first = write_image(workspace / "data" / f"0.{suffix}", (side, side))
    for number in range(1, 97):
        os.link(first, workspace / "data" / f"{number}.{suffix}")
    program = (
        "import collections, json, sys; opened = collections.Counter()\n"
        "sys.addaudithook(lambda n, given: n == 'open' and opened.update([str(given[0])]))\n"
        f"sys.path.insert(0, {str(ROOT)!r}); import train_lora\n"
        "code = train_lora.main(['--config', 'config.json', '--validate-only'])\n"
        f"photos = [n for path, n in opened.items() if path.endswith({suffix!r})]\n"
        "heavy = sorted({'torch', 'numpy', 'diffusers', 'transformers'} & sys.modules.keys())\n"
        "print(json.dumps([code, len(photos), max(photos), heavy]), file=sys.stderr)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=workspace, capture_output=True, check=True)
    code, photos, most, heavy = json.loads(done.stderr.splitlines()[-1])
    # What Pillow has verified it does not decode: such a file is opened again.
    assert (code, most, heavy) == (0, 2 if suffix == "png" else 1, [])
    assert photos == (100 if suffix == "png" else 97)  # three are there as png anyway


def test_ten_times_the_images_take_about_ten_times_as_long(
    in_workspace: Path, events: train_lora.Emitter, stop: train_lora.StopRequest
) -> None:
    """Nothing in the scan looks at every pair of files; a pair-wise scan would take a hundred."""

    def seconds(folder: str, images: int) -> float:
        first = write_image(in_workspace / folder / "0.png")
        for number in range(1, images):
            os.link(first, in_workspace / folder / f"{number}.png")
            (in_workspace / folder / f"{number}.txt").write_text("a cat", encoding="utf-8")
        config = load_config(dataset_path=folder)
        began = time.monotonic()
        train_lora.scan_dataset(config, events, stop)
        return time.monotonic() - began

    few = seconds("few", 300)
    assert seconds("many", 3000) < 40 * few
