"""The device: what is there, told before torch is imported and by torch itself."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from processes import run_program
from tiny_runs import tiny_config

import train_lora
from train_lora import ErrorCode, TrainError

if TYPE_CHECKING:
    from conftest import Recorder

POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


# --- before torch is there ---


def write_program(path: Path, script: str) -> Path:
    """Write an executable shell script."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide a file whose text a program called nvidia-smi answers with, its arguments beside."""
    script = f'echo "$@" > "{tmp_path}/arguments"; /bin/cat "{tmp_path}/answer"'
    program = write_program(tmp_path / "bin" / "nvidia-smi", script)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(train_lora, "built_for_cpu", lambda: False)
    return tmp_path / "answer"


@POSIX
@pytest.mark.parametrize("version", ["2.13.0+cpu", "2.13.0+cu130", "2.13.0", None])
def test_a_torch_built_for_cpus_sees_no_card(
    answer: Path, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    """Where its version says so; a build that does not say, or none yet, is taken for able."""
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(answer.parent / "bin"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    package = answer.parent / "packages" / "torch-0.dist-info"
    package.mkdir(parents=True)
    if version:
        text = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
        (package / "METADATA").write_text(text, encoding="utf-8")
    monkeypatch.setattr("sys.path", [str(package.parent)])
    answer.write_text(FAST + "\n", encoding="utf-8")
    blind = version == "2.13.0+cpu"
    assert train_lora.built_for_cpu() is blind
    assert train_lora.inspect_device("auto").kind == ("cpu" if blind else "cuda")
    with pytest.raises(TrainError) if blind else contextlib.nullcontext() as refused:
        train_lora.inspect_device("cuda")
    if refused:
        assert refused.value.code is ErrorCode.DEVICE_UNAVAILABLE
        assert refused.value.problems[0].path == "device"


@POSIX
def test_preflight_says_of_a_device_what_training_says(
    answer: Path, ground: Path, recorder: Recorder
) -> None:
    """Beside a card and a torch that sees none, both refuse cuda; auto is the CPU for both."""
    answer.write_text(FAST + "\n", encoding="utf-8")
    if not torch.cuda.is_available():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_lora, "built_for_cpu", lambda: True)
            config = tiny_config(ground, device="cuda", output_path=str(answer.parent / "out"))
            with pytest.raises(TrainError) as refused:
                train_lora.LoRATrainer(config).validate()
            with pytest.raises(TrainError) as failed:
                train_lora.choose_device(config)
            assert refused.value.code is failed.value.code is ErrorCode.DEVICE_UNAVAILABLE
            config = tiny_config(ground, device="auto", output_path=str(answer.parent / "out"))
            report = train_lora.LoRATrainer(config, train_lora.Emitter(recorder)).validate()
            assert report.device == train_lora.choose_device(config).type


@POSIX
def test_cards_are_listed_by_the_names_that_device_takes(answer: Path) -> None:
    """The fastest first, as torch counts them, and the CPU last."""
    answer.write_text(f"{SLOW}\n{FAST}\n", encoding="utf-8")
    listed = [(each["device"], each["name"]) for each in train_lora.list_devices()]
    assert listed[:2] == [("cuda:0", NVIDIA_NAMES["fast"]), ("cuda:1", NVIDIA_NAMES["slow"])]
    assert listed[-1][0] == "cpu"


@POSIX
def test_a_driver_is_asked_once_for_all_cards(answer: Path) -> None:
    """It can take seconds each time, and a machine has eight."""
    answer.write_text(f"{SLOW}\n{FAST}\n", encoding="utf-8")
    script = f'echo asked >> "{answer.parent}/log"; /bin/cat "{answer}"'
    write_program(answer.parent / "bin" / "nvidia-smi", script)
    assert [each["device"] for each in train_lora.list_devices()][:2] == ["cuda:0", "cuda:1"]
    assert (answer.parent / "log").read_text(encoding="utf-8") == "asked\n"


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
def test_in_training_torch_says_which_device_there_is(workspace: Path) -> None:
    """nvidia-smi, which may be absent or count otherwise, is not even asked."""
    program = write_program(workspace / "bin" / "nvidia-smi", f"touch asked; echo '{FAST}'")
    path = f"{program.parent}:{os.environ['PATH']}"
    if torch.cuda.is_available():
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


# --- as torch sees it ---


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "mps"])
def test_a_device_that_is_not_there_is_an_error(ground: Path, name: str) -> None:
    """Training does not quietly move to a slower one."""
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("needs a machine without accelerator")
    with pytest.raises(TrainError) as refused:
        train_lora.LoRATrainer(tiny_config(ground, device=name)).train()
    assert refused.value.code is ErrorCode.DEVICE_UNAVAILABLE
    assert refused.value.problems[0].path == "device"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_on_a_processor_that_is_not_good_at_it_is_warned_of(
    ground: Path, precision: str, recorder: Recorder
) -> None:
    """fp32 is used instead."""
    config = tiny_config(ground, mixed_precision=precision)
    events = train_lora.Emitter(recorder)
    device = train_lora.choose_device(config)
    assert device == torch.device("cpu")
    assert train_lora.choose_precision(config, device, events) == torch.float32
    assert recorder.codes() == ["precision_changed"]


@pytest.mark.parametrize("precision", ["auto", "no"])
def test_full_precision_is_what_a_processor_is_good_at(
    ground: Path, precision: str, recorder: Recorder
) -> None:
    """There is nothing to warn of."""
    config, events = tiny_config(ground, mixed_precision=precision), train_lora.Emitter(recorder)
    assert train_lora.choose_precision(config, torch.device("cpu"), events) == torch.float32
    assert recorder.codes() == []


def test_what_a_card_holds_is_what_its_driver_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what the allocator keeps for later use, which is not free for others."""
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 7)
    card = torch.device("cuda", 0)
    assert train_lora.memory_held(card) == (5, 7)


@pytest.mark.parametrize("reason", [OSError, AttributeError, TypeError])
def test_a_c_library_without_these_options_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, reason: type[Exception]
) -> None:
    """They make a run faster, and it goes on without them."""
    asked = []

    def refuse(name: object) -> None:
        asked.append(name)
        raise reason

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    train_lora.keep_freed_memory()
    assert asked == [None]
