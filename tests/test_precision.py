"""Runs in half precision, which are for CUDA, followed on a CPU, which is slower and as exact."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import FAMILIES, Ready, one_of, prepare, tiny_config

import train_lora
from launches import Calls

pytestmark = pytest.mark.usefixtures("one_thread")

Tensors = dict[str, torch.Tensor]


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def half(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Let runs choose half precision where they would not."""
    dtype: torch.dtype = request.param
    monkeypatch.setattr(train_lora, "choose_precision", lambda *_: dtype)
    return dtype


def gradients(ready: Ready, strength: float = 1.0, slots: int = 4) -> Tensors:
    """Compute where images would move an awake adapter, without moving it."""
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ready.learner.matrices.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=chance))
    ready.learner.refresh()
    for slot in range(slots):
        batch = train_lora.draw_batch(ready.cache, ready.config, 1, [(slot, slot)], one_of(1000))
        (train_lora.batch_losses(ready.models, batch).sum() * strength).backward()
        ready.learner.collect()
    return {name: g.clone() / strength for name, g in ready.learner.gradients.items()}


def largest_error(found: Tensors, expected: Tensors) -> float:
    """Compare matrix by matrix."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - e).norm() / e.norm()) for n, e in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_right_but_for_rounding(
    family: str, ground: Path, half: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For text encoders too; fp16 rounds to a thousandth, bf16 eight times as coarsely."""
    config = tiny_config(ground, family, train_text_encoder=True)
    found = gradients(prepare(config), strength=1024)
    monkeypatch.undo()
    expected = gradients(prepare(config))
    assert largest_error(found, expected) < (0.25 if half == torch.bfloat16 else 0.03)


def test_a_base_in_another_precision_is_computed_with_in_the_runs(
    ground: Path, half: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with base_precision fp32 on a card; the adapter is in half all the same."""
    config = tiny_config(ground)
    ready = prepare(config)
    for parameter in ready.models.denoiser.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.float()
    ready.models.mixes = True
    found = gradients(ready, strength=1024)
    monkeypatch.undo()
    expected = gradients(prepare(config))
    assert largest_error(found, expected) < (0.25 if half == torch.bfloat16 else 0.03)


def test_the_adapter_learns_in_full_precision(ground: Path, half: torch.dtype) -> None:
    """Half of it would lose updates as small as an adapter's; networks get the rounded numbers."""
    ready = prepare(tiny_config(ground, train_text_encoder=True))
    before = snapshot(ready)
    ready.make_updates(2)
    learned = ready.learner.matrices.values()
    used = [p for net in ready.networks().values() for p in net.parameters() if p.requires_grad]
    assert {p.dtype for p in learned} == {torch.float32}
    assert {p.dtype for net in ready.networks().values() for p in net.parameters()} == {half}
    assert any((p != before[name]).any() for name, p in ready.learner.matrices.items())
    assert Counter(map(fingerprint, used)) == Counter(fingerprint(p.to(half)) for p in learned)
    assert all(p.grad is None for p in used)
    assert not any(g.any() for g in ready.learner.gradients.values())


def fingerprint(matrix: torch.Tensor) -> tuple[Any, ...]:
    """Tell a matrix from others."""
    return (*matrix.shape, *matrix.detach().flatten().tolist())


def test_gradients_of_a_window_add_up_in_full_precision(ground: Path, half: torch.dtype) -> None:
    """In half, a small one would be lost beside a large one."""
    ready = prepare(tiny_config(ground))
    alone = gradients(ready, slots=1)
    ready.learner.forget()
    both = gradients(ready, slots=2)
    rounded = [value for value in both.values() if torch.equal(value, value.to(half).float())]
    assert alone.keys() == both.keys()
    assert len(rounded) < len(both) / 10


def test_a_run_in_two_parts_is_the_run_in_one(
    ground: Path, tmp_path: Path, half: torch.dtype
) -> None:
    """To the last bit, from what was learned and not from what is rounded of it."""
    del half

    def run(name: str, steps: int) -> Tensors:
        config = tiny_config(ground, steps=steps, output_path=str(tmp_path / name))
        precise = replace(config, save_precision="fp32")
        return load_file(train_lora.LoRATrainer(precise).train().final_path)

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4)
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_a_run_goes_on_in_another_precision(
    ground: Path, tmp_path: Path, half: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From full to half, from one half to the other, and back: a scaler is only fp16's."""
    dtypes = iter((torch.float32, half, torch.bfloat16, torch.float16, torch.float32))
    monkeypatch.setattr(train_lora, "choose_precision", lambda *_: next(dtypes))
    for steps in range(1, 6):
        config = tiny_config(ground, steps=steps, output_path=str(tmp_path / "out"))
        done = train_lora.LoRATrainer(config).train()
    assert done.step == 5
    assert all(value.isfinite().all() for value in load_file(done.final_path).values())


def test_a_matrix_that_no_gradient_reaches_counts_as_zero(ground: Path, half: torch.dtype) -> None:
    """Its networks leave none at all."""
    ready = prepare(tiny_config(ground))
    first, *others = ready.learner.parameters.values()
    sum(p.sum() for p in others).backward()
    assert first.grad is None
    ready.learner.collect()
    zero, *ones = ready.learner.gradients.values()
    assert not zero.any()
    assert all((gradient == 1).all() for gradient in ones)


def test_an_update_that_overflows_moves_nothing(ground: Path, half: torch.dtype) -> None:
    """The next one finds nothing of it; in fp16, it comes with a smaller factor."""
    ready = prepare(tiny_config(ground))
    ready.make_updates(1)
    learner, before = ready.learner, snapshot(ready)
    scale = learner.scaler.get_scale()
    learner.gradient[0] = torch.inf
    assert not learner.step(1.0).isfinite()
    assert all(torch.equal(value, before[name]) for name, value in snapshot(ready).items())
    assert not learner.gradient.any()
    assert learner.scaler.get_scale() == (scale / 2 if half == torch.float16 else scale)
    ready.make_updates(1)
    assert all(value.isfinite().all() for value in snapshot(ready).values())
    assert any((value != before[name]).any() for name, value in snapshot(ready).items())


def snapshot(ready: Ready) -> Tensors:
    """Copy what is learned."""
    return {name: p.detach().clone() for name, p in ready.learner.matrices.items()}


@pytest.mark.parametrize("rank", [2, 4])
def test_nothing_is_converted_layer_by_layer(ground: Path, half: torch.dtype, rank: int) -> None:
    """There are 60 matrices; on a card each conversion costs as much time as a small layer."""
    del half
    ready = prepare(tiny_config(ground, lora_rank=rank))
    ready.make_updates(1)
    calls = Calls()
    with calls:
        ready.update()
    assert len(ready.learner.matrices) > 60
    assert calls.names["aten::_to_copy"] + calls.names["aten::copy_"] < 20
