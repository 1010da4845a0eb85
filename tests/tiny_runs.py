"""Real runs of tiny models, stopped just before their first update so that tests can look."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Recorder, write_config
from diffusers import DDPMScheduler
from tiny_models import build_tiny

import train_lora
from train_lora import Dataset, ImageOrder, LoRATrainer, Picture, TrainingConfig

# A run collects garbage before it loads the denoiser; let it not look through all libraries.
train_lora.import_libraries()
gc.collect()
gc.freeze()


@functools.lru_cache
def tiny_base(family: str, parent: Path) -> Path:
    """Build a tiny base model once per session."""
    return build_tiny(family, parent / family)


def tiny_config(ground: Path, family: str = "sd1", **changes: Any) -> TrainingConfig:
    """Load a config for a tiny base model."""
    values = {
        "dataset_path": str(ground / "data"),
        "base_model": str(tiny_base(family, ground / "bases")),
        "output_path": str(ground / "out"),
        "cache_dir": str(ground / "cache"),  # what is encoded once serves all tests
        "lora_name": "tiny",
        "resolution": 256,
        "lora_rank": 4,
        "lora_alpha": 4,
        "sample_steps": 1,
        "sample_prompts": ["zkb"],
        "device": "cpu",
    }
    return TrainingConfig.from_json(write_config(ground, **values | changes))


@dataclass
class Ready(LoRATrainer):
    """A run just before its first update."""

    recorder: Recorder = field(default_factory=Recorder)

    def make_updates(self, times: int = 1, total_steps: int = 100) -> None:
        """Make updates and report them."""
        self.total_steps = total_steps
        for _ in range(times):
            self.update()
            self.report()

    def networks(self) -> dict[str, Any]:
        """Name the denoiser and the text encoders that are kept."""
        kept = dict(
            zip(
                [p.folder for p in self.models.base.family.text_encoders],
                self.models.text_encoders,
                strict=False,
            )
        )
        return {"unet": self.models.denoiser, **kept}


def prepare(config: TrainingConfig) -> Ready:
    """Go through a run's preparations; then keep a corner of the latents, to save time."""
    recorder = Recorder()
    ready = Ready(config, train_lora.Emitter(recorder), recorder=recorder)
    facts, base = train_lora.inspect_model(config)
    assert base is not None
    ready.models = ready.load(base)
    dataset = train_lora.scan_dataset(config, ready.events, ready.stop)
    images = ready.encode(dataset)
    corners = (replace(i, latent_dist=i.latent_dist[..., :8, :8].clone()) for i in images.images)
    ready.cache = replace(images, images=tuple(corners))
    ready.learner = ready.adapt(facts)
    ready.order, ready.total_steps = ImageOrder(config, len(images.images)), 100
    ready.origin = {"run_id": "test", "identity": {}}
    ready.phase = "training"
    return ready


def dataset_of(pictures: Sequence[Picture], config: TrainingConfig) -> Dataset:
    """Make a dataset of pictures that nobody looked for."""
    facts: Any = SimpleNamespace(images=len(pictures))
    sized = (replace(p, sizes=train_lora.sizes_of((p.width, p.height), config)) for p in pictures)
    return Dataset(pictures=tuple(sized), facts=facts)


def one_of(steps: int) -> Any:
    """Stand in for models whose objective draws one of so many time steps."""
    base = SimpleNamespace(objective=train_lora.DDPM_EPSILON)
    schedule = DDPMScheduler(num_train_timesteps=steps)
    return SimpleNamespace(base=base, schedule=schedule, device=torch.device("cpu"))


def fail_once(run: LoRATrainer, at: int) -> None:
    """Let the allocator fail in one update, half way through the denoiser."""
    calls: list[int] = []

    def ask_for_too_much(*_: object) -> None:
        if run.state.step + 1 == at and not calls:
            calls.append(at)
            torch.empty(2**60)

    run.models.denoiser.mid_block.register_forward_hook(ask_for_too_much)


def going_short_of_memory(at: int) -> Callable[[LoRATrainer], None]:
    """Stand in for LoRATrainer.go and let memory run out in one update."""
    go = LoRATrainer.go

    def go_short(run: LoRATrainer) -> None:
        fail_once(run, at)
        go(run)

    return go_short


@dataclass(eq=False, repr=False)
class StopAfter(train_lora.StopRequest):
    """A request that comes after an update, or never."""

    last: int | None = None
    trainer: LoRATrainer | None = None

    def check(self) -> None:
        """Ask for a stop when the update is made, and look as ever."""
        run = self.trainer
        if run and run.phase == "training" and run.state.step == self.last:
            self.request("SIGTERM")
        super().check()


def start_until(config: TrainingConfig, last: int | None = None) -> LoRATrainer:
    """Start a run and let it end, or stop it after an update."""
    stop = StopAfter(last=last)
    stop.trainer = run = LoRATrainer(config, train_lora.Emitter(), stop)
    with pytest.raises(train_lora.TrainingInterrupted) if last else contextlib.nullcontext():
        run.train()
    return run
