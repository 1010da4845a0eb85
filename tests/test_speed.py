"""What makes updates fast, and what notices that they are not."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from conftest import Ended, run_program, write_config
from safetensors.torch import load_file
from tiny_runs import prepare, tiny_base, tiny_config

import train_lora
from train_lora import Pace

pytestmark = pytest.mark.usefixtures("one_thread")


# --- Slow updates ---


def test_a_pace_that_drops_is_noticed() -> None:
    """Against the best between two progress lines, not against the mean."""
    pace = Pace()
    lines = [(1.0, 10), (3.0, 20), (10.0, 30), (10.0, 30), (18.0, 40), (19.0, 50)]
    assert [pace.slowed(*line) for line in lines] == [False] * 4 + [True, False]
    assert (pace.best, pace.latest) == (0.1, 0.1)


@pytest.mark.parametrize("free", [0.01, 0.5])
def test_slow_updates_on_a_full_card_are_told_once(
    ground: Path, monkeypatch: pytest.MonkeyPatch, free: float
) -> None:
    """A slow card with free memory is only slow."""
    ready = prepare(tiny_config(ground))
    ready.models.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free * 2**30), 2**30))
    for seconds in (1.0, 2.0, 60.0, 120.0, 180.0):
        ready.state.busy_seconds, ready.state.timed_steps = seconds, ready.state.timed_steps + 10
        ready.watch_pace()
    assert ready.recorder.codes() == ["memory_spilled"] * (free < 0.03)


def test_main_memory_is_never_a_full_card() -> None:
    """On a CPU the system swaps, which its owner sees."""
    assert not train_lora.memory_full(torch.device("cpu"))


# --- Compiled blocks ---


def run_with(ground: Path, folder: Path, **environment: str) -> Ended:
    """Run the program on a tiny model with its blocks compiled."""
    write_config(
        folder,
        dataset_path=str(ground / "data"),
        base_model=str(tiny_base("sd1", ground / "bases")),
        output_path=str(folder / "out"),
        resolution=256,
        steps=3,
        sample_steps=1,
        compile="on",
    )
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")
    environment["OMP_NUM_THREADS"] = "1"
    return run_program("--config", "config.json", cwd=folder, stdin=b"", **environment)


def test_a_denoiser_that_cannot_be_compiled_runs_as_it_is(ground: Path, tmp_path: Path) -> None:
    """Without a C++ compiler, the run warns and learns the same."""
    ended = run_with(ground, tmp_path, CXX="/nowhere/c++")
    warned = [line["code"] for line in ended.lines if line["type"] == "warning"]
    assert (ended.code, warned) == (0, ["resolution_unusual", "compile_failed"])
    plain = tiny_config(
        ground, steps=3, output_path=str(tmp_path / "plain"), lora_rank=16, lora_alpha=32
    )
    done = train_lora.LoRATrainer(plain).train()
    same(load_file(ended.last["final_path"]), load_file(done.final_path))


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(ground: Path, tmp_path: Path) -> None:
    """But for the last bits; previews are drawn too."""
    ended = run_with(ground, tmp_path)
    kinds = [line["type"] for line in ended.lines]
    assert (ended.code, kinds.count("warning"), kinds.count("sample")) == (0, 1, 1)
    plain = tiny_config(
        ground, steps=3, output_path=str(tmp_path / "plain"), lora_rank=16, lora_alpha=32
    )
    done = train_lora.LoRATrainer(plain).train()
    same(load_file(ended.last["final_path"]), load_file(done.final_path))


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare two adapters but for their last bits and their strength."""
    for name, value in expected.items():
        if not name.endswith(".alpha"):
            torch.testing.assert_close(found[name], value, rtol=0.01, atol=1e-4)


def test_nothing_is_compiled_unless_that_is_asked_for(ground: Path, tmp_path: Path) -> None:
    """Compiling takes a minute, and its gradients are not trusted yet."""
    config = tiny_config(ground, steps=2000)
    trainer = train_lora.LoRATrainer(config)
    ready = prepare(config)
    trainer._compile(ready.models, ready.cache, ready.learner)
    assert not any(vars(m).get("_compiled_call_impl") for m in ready.models.unet.modules())


# --- The heap ---


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
