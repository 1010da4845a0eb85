"""The tools with LoRAs of transformers: named by diffusers' own readers, drawn by the trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_config, write_image
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_flow import FLOW_FAMILIES, build_flow
from tiny_runs import Ready, prepare

from tools import generate, lora
from tools.lora_file import difference, read_lora
from train_lora import TrainError, TrainingConfig

each_family = pytest.mark.parametrize("family", FLOW_FAMILIES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Ready]]:
    """Provide a base of each family, the file of a LoRA for it, and the run that learned it."""
    folder = tmp_path_factory.mktemp("transformers")
    write_image(folder / "data" / "0.png", (256, 256)).with_suffix(".txt").write_text("a zkb dog")
    return {family: train(folder, family) for family in FLOW_FAMILIES}


def train(folder: Path, family: str) -> tuple[Path, Path, Ready]:
    """Train a LoRA with two updates."""
    place = folder / f"run of {family}"
    place.mkdir()
    config = write_config(
        place,
        dataset_path=str(folder / "data"),
        base_model=str(build_flow(family, folder / family)),
        output_path=str(place / "out"),
        trigger_words=["zkb"],
        resolution=256,
        lora_rank=2,
        lora_alpha=3,
        learning_rate=0.01,
        save_precision="fp32",
        device="cpu",
    )
    ready = prepare(TrainingConfig.from_json(config))
    ready.make_updates(2)
    file = place / "lora_final.safetensors"
    ready.write_files({"lora": file})
    return folder / family, file, ready


Trained = dict[str, tuple[Path, Path, Ready]]


@each_family
def test_a_file_adds_what_was_learned_to_the_layers_of_diffusers(
    family: str, trained: Trained
) -> None:
    """Layer by layer, against PEFT's own products."""
    _, file, ready = trained[family]
    read = read_lora(file)
    learned = {
        name: module.get_delta_weight("default")
        for name, module in ready.models.denoiser.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert {module.name for module in read.layers} == learned.keys()
    for module, layer in read.layers.items():
        assert module.network == "transformer"
        assert layer.rank == 2
        assert torch.allclose(layer.delta().float(), learned[module.name], atol=1e-6)


@each_family
def test_a_file_comes_back_from_the_names_of_diffusers(
    family: str, trained: Trained, tmp_path: Path
) -> None:
    """There and back it is the same LoRA, and half the rank is nearly that."""
    _, file, _ = trained[family]
    there, back, less = (str(tmp_path / f"{name}.safetensors") for name in ("a", "b", "c"))
    assert lora.main(["convert", str(file), there, "--to", "diffusers"]) == 0
    assert all(key.startswith("transformer.") for key in load_file(there))
    assert lora.main(["convert", there, back]) == 0
    assert load_file(back).keys() == load_file(file).keys()
    assert difference(read_lora(file), read_lora(Path(back))) < 1e-6
    assert lora.main(["resize", str(file), less, "--rank", "1"]) == 0
    assert {layer.rank for layer in read_lora(Path(less)).layers.values()} == {1}


@each_family
def test_a_grid_is_drawn_with_a_transformers_lora(
    family: str, trained: Trained, tmp_path: Path
) -> None:
    """The base at no strength, something else at full strength."""
    base, file, _ = trained[family]
    asked: list[Any] = ["--base", base, "--out", tmp_path, "--lora", file, "--prompts", "zkb"]
    asked += [
        "--strengths",
        "0,1",
        "--seeds",
        1,
        "--steps",
        2,
        "--resolution",
        256,
        "--device",
        "cpu",
    ]
    assert generate.main([str(each) for each in asked]) == 0
    pictures = json.loads((tmp_path / "grid.json").read_text(encoding="utf-8"))["images"]
    drawn = [Image.open(tmp_path / each["file"]) for each in pictures]
    plain, none, full = (image.convert("RGB").tobytes() for image in drawn)
    assert plain == none != full
    assert "Sampler: Euler" in drawn[0].info["parameters"]


def test_a_file_that_does_not_say_what_it_is_for_is_refused(
    trained: Trained, tmp_path: Path
) -> None:
    """Layers of the same names belong to models of different sizes."""
    _, file, _ = trained["flux1"]
    save_file(load_file(file), tmp_path / "bare.safetensors")
    with pytest.raises(TrainError) as caught:
        read_lora(tmp_path / "bare.safetensors")
    assert "z_image, flux2_klein, flux1, krea2" in caught.value.problems[0].expected


@pytest.mark.parametrize("family", ["flux2_klein", "z_image"])
def test_a_transformer_with_its_lora_in_it_is_saved(
    family: str, trained: Trained, tmp_path: Path
) -> None:
    """As a folder that diffusers loads, whose layers hold what was learned."""
    base, file, ready = trained[family]
    fused = tmp_path / "fused"
    asked: list[Any] = ["--base", base, "--lora", file, "--fuse", fused, "--device", "cpu"]
    asked += ["--resolution", 256, "--steps", 2]
    assert generate.main([str(each) for each in asked]) == 0
    pipe = DiffusionPipeline.from_pretrained(str(fused), local_files_only=True)
    layer = next(iter(read_lora(file).layers))
    plain = ready.models.denoiser.get_submodule(layer.name)
    learned = plain.base_layer.weight + plain.get_delta_weight("default")
    now = pipe.transformer.get_submodule(layer.name).weight
    assert torch.allclose(now, learned, atol=1e-6)
    assert not torch.allclose(now, plain.base_layer.weight, atol=1e-6)
