"""Model families: one record each, in one table, and room for another."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from conftest import PROGRAM, Recorder, load_config, write_image, write_json
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from tiny_models import build_tiny

import train_lora
from train_lora import ModelFacts

if TYPE_CHECKING:
    import pytest

# --- one table ---


def test_no_other_section_asks_which_family_it_is() -> None:
    """A new family is one record; its name stands in its own section and in prose alone."""
    text = PROGRAM.read_text(encoding="utf-8")
    tree = ast.parse(text)
    rulers = [n for n, line in enumerate(text.splitlines(), 1) if line.startswith("# === ")]
    begin = next(n for n in rulers if "Model families" in text.splitlines()[n - 1])
    end = min(n for n in rulers if n > begin)
    name = re.compile(r"\b(" + "|".join(train_lora.FAMILIES) + r")\b")
    prose = {id(node) for part in ast.walk(tree) for node in described(part)}
    literals = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in prose]
    named = [n.lineno for n in literals if isinstance(n.value, str) and name.search(n.value)]
    assert [line for line in named if not begin < line < end] == []
    assert named != []


def described(node: ast.AST) -> list[ast.AST]:
    """List the literals that only describe: docstrings, and what stands in Annotated."""
    if isinstance(node, ast.Expr):
        return [node.value]
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Annotated":
        return list(ast.walk(node))
    return []


def test_the_description_of_the_family_names_all_of_them() -> None:
    """What a host reads in the schema of events is the table."""
    fields = train_lora.describe_type(ModelFacts)["properties"]
    named = re.findall(r"`(\w+)`", fields["family"]["description"])
    assert named == list(train_lora.FAMILIES)


def test_every_family_stands_under_its_own_name() -> None:
    """A record is found by what it is called."""
    assert [family.name for family in train_lora.FAMILIES.values()] == list(train_lora.FAMILIES)


# --- room for another family ---


def flow_matching() -> train_lora.Objective:
    """Teach the straight way from noise to picture, whose times are shares of noise."""

    def share(times: torch.Tensor) -> torch.Tensor:
        return times.view(-1, 1, 1, 1)

    def solver(schedule: Any, steps: int, latents: torch.Tensor) -> Any:
        schedule.set_timesteps(steps, device=latents.device)
        return schedule

    return train_lora.Objective(
        prediction_type="flow",
        load_schedule=lambda base: FlowMatchEulerDiscreteScheduler(
            shift=base.parts[base.family.sampler].config["shift"]
        ),
        draw_time=lambda _, __, latents, chance: (
            torch.rand((), generator=chance) * len(latents) / 4
        ),
        time_at=lambda _, __, latents, share_of: share_of * len(latents) / 4,
        mix=lambda _, latents, noise, t: (1 - share(t)) * latents + share(t) * noise,
        target=lambda _, latents, noise, __: noise - latents,
        snr=lambda _, times: ((1 - times) / times).square(),
        solver=solver,
    )


def another_family() -> train_lora.Family:
    """Describe a family with a denoiser, an objective and conditioning of its own."""
    sd1 = train_lora.SD1

    def predict(denoiser: Any, noisy: Any, times: Any, told: train_lora.Conditioning) -> Any:
        assert told["mask"].dtype == torch.bool
        return denoiser(noisy, times * 1000, told["words"]).sample

    def read(encoders: Any, tokens: Any) -> train_lora.Conditioning:
        words = encoders[0](tokens[0]).last_hidden_state
        return train_lora.Conditioning(words=words, mask=tokens[0] != 0)

    return replace(
        sd1,
        name="another",
        title="Another",
        denoiser=replace(sd1.denoiser, folder="transformer", lora_prefix="lora_another"),
        recognises=lambda headers, _: "transformer" in headers.configs,
        refuses=lambda *_: None,
        native_resolution=256,
        states=lambda *_: ("flow", False),
        measure=lambda _: {
            "kept": lambda places, checkpointing: places * (4.0 if checkpointing else 8.0),
            "vae_scale_factor": 8,
            "vae_width": 8,
            "tokens": 77,
            "text_width": 32,
        },
        read_text=read,
        predict=predict,
        objectives=(flow_matching(),),
        headers={"flow": {"modelspec.architecture": "another/lora"}},
    )


def test_another_family_is_one_record(
    tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model is found, planned, trained by its own objective, drawn and saved; SD's still is."""
    monkeypatch.setitem(train_lora.all_families(), "another", another_family())
    monkeypatch.chdir(tmp_path)
    folder = build_tiny("sd1", tmp_path / "model")
    assert train_lora.inspect_model(load_config(base_model="model"))[0].family == "sd1"
    (folder / "unet").rename(folder / "transformer")
    config_path = folder / "transformer" / "config.json"
    built = json.loads(config_path.read_text("utf-8"))
    write_json(config_path, built | {"sample_size": None})
    write_json(folder / "scheduler" / "scheduler_config.json", {"shift": 3.0})
    write_image(tmp_path / "data" / "image.png", (256, 256))
    short = {"sample_steps": 2, "sample_prompts": ["zkb"], "steps": 2}
    config = load_config(resolution=256, lora_rank=2, learning_rate=0.01, **short)
    done = train_lora.LoRATrainer(config, train_lora.Emitter(recorder)).train()
    learned = load_file(done.final_path)
    assert all(name.startswith("lora_another_") for name in learned)
    assert all(value.any() for name, value in learned.items() if "lora_up" in name)
    assert len(recorder.of_type("sample")) == 1
    assert recorder.codes() == []
