"""What only a CUDA device can show. Skipped elsewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Recorder
from safetensors.torch import load_file
from tiny_models import FAMILIES
from tiny_runs import prepare, tiny_config

import train_lora
from train_lora import LoRATrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # the libraries' own, which would end previews
]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_in_every_precision(
    ground: Path, tmp_path: Path, family: str, precision: str
) -> None:
    """The loss is finite, and every layer has learned something."""
    choices = {"device": "cuda", "mixed_precision": precision, "output_path": str(tmp_path)}
    done = LoRATrainer(tiny_config(ground, family, steps=8, **choices)).train()
    learned = load_file(done.final_path)
    assert done.final_loss is not None
    assert math.isfinite(done.final_loss)
    assert all(value.any() for name, value in learned.items() if "lora_up" in name)


@pytest.mark.parametrize("base", ["fp32", "fp16", "bf16"])
def test_a_base_may_lie_there_in_any_precision(ground: Path, tmp_path: Path, base: str) -> None:
    """The run computes in its own, and learns."""
    choices = {"device": "cuda", "mixed_precision": "bf16", "output_path": str(tmp_path)}
    done = LoRATrainer(tiny_config(ground, steps=4, base_precision=base, **choices)).train()
    learned = load_file(done.final_path)
    assert all(value.any() for name, value in learned.items() if "lora_up" in name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_stopped_run_goes_on_with_scaler_and_moments(
    ground: Path, tmp_path: Path, precision: str
) -> None:
    """The file of a run in two parts is that of a run in one, but for the last bits."""
    choices = {"device": "cuda", "mixed_precision": precision}
    whole = tiny_config(ground, steps=8, output_path=str(tmp_path / "whole"), **choices)
    parts = tiny_config(ground, steps=4, output_path=str(tmp_path / "parts"), **choices)
    expected = load_file(LoRATrainer(whole).train().final_path)
    LoRATrainer(parts).train()
    longer = tiny_config(ground, steps=8, output_path=str(tmp_path / "parts"), **choices)
    found = load_file(LoRATrainer(longer).train().final_path)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("learns_text", [False, True])
def test_a_recorded_update_learns_what_its_calls_learn(
    ground: Path, tmp_path: Path, precision: str, *, learns_text: bool
) -> None:
    """But for the last bits, with dropout, and without a warning."""
    choices: dict[str, Any] = {"device": "cuda", "mixed_precision": precision, "steps": 6}
    choices |= {"train_text_encoder": learns_text, "lora_dropout": 0.1, "compile": "off"}
    choices |= {"gradient_accumulation_steps": 2}
    learned, recorder = [], Recorder()
    for recording in ("auto", "off"):
        output = str(tmp_path / recording)
        config = tiny_config(ground, "sdxl", cuda_graph=recording, output_path=output, **choices)
        trainer = LoRATrainer(config, train_lora.Emitter(recorder))
        learned.append(load_file(trainer.train().final_path))
        assert bool(trainer.replay) == (recording == "auto")
    assert set(recorder.codes()) == {"resolution_unusual"}
    for name, value in learned[1].items():
        torch.testing.assert_close(learned[0][name], value, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("learns_text", [False, True])
@pytest.mark.parametrize("recording", [False, True])
def test_an_update_never_waits_for_its_own_numbers(
    ground: Path, precision: str, *, learns_text: bool, recording: bool
) -> None:
    """Nothing in an update reads one back; the first ones warm the libraries up."""
    choices: dict[str, Any] = {"train_text_encoder": learns_text, "lora_dropout": 0.1}
    ready = prepare(tiny_config(ground, device="cuda", mixed_precision=precision, **choices))
    if recording:
        card = train_lora.device_facts(ready.models.device)
        ready.memory = train_lora.MemoryPlan.make(ready.config, ready.models.base, 3, card)
        ready.record()
        assert ready.replay
    ready.update()
    ready.update()
    torch.cuda.set_sync_debug_mode("error")
    ready.update()
    torch.cuda.set_sync_debug_mode("default")
    assert ready.state.step == 3


def test_no_more_than_a_batch_waits_for_the_device(ground: Path) -> None:
    """However slow it is, and though a recording is asked for at once: a stop waits for all."""
    ready = prepare(tiny_config(ground, device="cuda", mixed_precision="bf16", compile="off"))
    card = train_lora.device_facts(ready.models.device)
    ready.memory = train_lora.MemoryPlan.make(ready.config, ready.models.base, 3, card)
    ready.record()
    assert ready.replay
    ends = []
    for _ in range(5):
        torch.cuda._sleep(10**9)  # half a second, in which many updates could be asked for
        ready.update()
        ends.append(torch.cuda.current_stream().record_event())
        assert all(end.query() for end in ends[:-2])


@pytest.mark.parametrize(("precision", "matmuls"), [("no", "highest"), ("bf16", "high")])
def test_full_precision_stays_full_where_it_was_asked_for(
    ground: Path, precision: str, matmuls: str
) -> None:
    """Only a run in half precision lets the rest be rounded to TF32."""
    torch.set_float32_matmul_precision("highest")
    prepare(tiny_config(ground, device="cuda", mixed_precision=precision))
    assert torch.get_float32_matmul_precision() == matmuls


def test_memory_is_that_of_the_device(ground: Path) -> None:
    """What is told is less than the device has, and more than the adapter needs."""
    ready = prepare(tiny_config(ground, device="cuda"))
    ready.make_updates(1)
    used, _ = train_lora.memory_held(ready.models.device)
    assert used is not None
    assert 0 < used < torch.cuda.get_device_properties(0).total_memory
    assert used == torch.cuda.memory_reserved(0)


def test_torch_describes_the_card_that_was_chosen(ground: Path) -> None:
    """It is the current one, too, for what asks for no card by number."""
    ready = prepare(tiny_config(ground, device="cuda"))
    facts = train_lora.device_facts(ready.models.device)
    assert ready.models.device == torch.device("cuda", torch.cuda.current_device())
    assert (facts.kind, facts.name) == ("cuda", torch.cuda.get_device_name())
    assert facts.memory_total_bytes == torch.cuda.mem_get_info()[1]


def test_the_vae_waits_in_main_memory_and_draws_on_the_card(ground: Path, tmp_path: Path) -> None:
    """Two pictures at once, in the run's precision."""
    choices: dict[str, Any] = {"device": "cuda", "output_path": str(tmp_path)}
    ready = prepare(tiny_config(ground, sample_prompts=["a cat", "a dog"], **choices))
    ready.models.previews_at_once = 2
    ready.preview()
    assert len(ready.recorder.of_type("sample")) == 2
    assert ready.models.vae.device.type == "cpu"


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_packed_weights_train_and_save_an_adapter_like_any_other(
    ground: Path, tmp_path: Path, precision: str
) -> None:
    """The adapter itself is not packed, and previews are drawn."""
    choices = {"device": "cuda", "base_precision": precision, "output_path": str(tmp_path)}
    done = LoRATrainer(tiny_config(ground, steps=4, **choices)).train()
    plain = tiny_config(ground, steps=4, device="cuda", output_path=str(tmp_path / "plain"))
    expected = load_file(LoRATrainer(plain).train().final_path)
    learned = load_file(done.final_path)
    assert {n: v.shape for n, v in learned.items()} == {n: v.shape for n, v in expected.items()}
    assert len(list(tmp_path.glob("samples/step_*.png"))) == 1


def test_compiled_blocks_learn_what_others_learn(ground: Path, tmp_path: Path) -> None:
    """But for the last bits, and the compiler is not warned of."""
    recorder = Recorder()
    choices: dict[str, Any] = {"device": "cuda", "steps": 8}
    fast = tiny_config(ground, compile="on", output_path=str(tmp_path / "fast"), **choices)
    plain = tiny_config(ground, compile="off", output_path=str(tmp_path / "plain"), **choices)
    found = load_file(LoRATrainer(fast, train_lora.Emitter(recorder)).train().final_path)
    expected = load_file(LoRATrainer(plain).train().final_path)
    assert recorder.codes() == ["resolution_unusual"]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.05, atol=2e-3)


def test_a_full_card_is_an_error_with_remedies(ground: Path, tmp_path: Path) -> None:
    """What the plan did not foresee is reported when it happens."""
    config = tiny_config(ground, device="cuda", batch_size=8, output_path=str(tmp_path))
    with small_card(), pytest.raises(train_lora.TrainError) as caught:
        LoRATrainer(config).train()
    assert caught.value.code == train_lora.ErrorCode.OUT_OF_MEMORY
    assert caught.value.problems


@contextlib.contextmanager
def small_card() -> Iterator[None]:
    """Leave this process next to nothing of the card's memory."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
