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


FLUX1 = {"modelspec.architecture": "flux-1-dev/lora"}


@each_family
def test_alphas_beside_the_matrices_are_heeded(
    family: str, trained: Trained, tmp_path: Path
) -> None:
    """By the rank that stands in the file, also where a direction adds nothing."""
    _, file, _ = trained[family]
    there, strong = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert lora.main(["convert", str(file), str(there), "--to", "diffusers"]) == 0
    tensors = load_file(there)
    for key in [key for key in tensors if key.endswith("lora_B.weight")]:
        tensors[key][:, 1:] = 0
        tensors[key.replace("lora_B.weight", "alpha")] = torch.tensor(0.5)
    save_file(tensors, strong, read_lora(there).header)
    found = read_lora(strong)
    assert {(layer.rank, layer.scale) for layer in found.layers.values()} == {(1, 0.25)}


@pytest.fixture
def with_text(tmp_path: Path) -> Path:
    """Provide a file of FLUX.1 as kohya's programs write it, with layers of its text encoder."""
    names = "unet_double_blocks_0_img_attn_proj", "te1_text_model_encoder_layers_0_mlp_fc1"
    tensors = {}
    for name in names:
        tensors[f"lora_{name}.lora_down.weight"] = torch.ones(2, 3)
        tensors[f"lora_{name}.lora_up.weight"] = torch.ones(4, 2)
        tensors[f"lora_{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "text.safetensors", FLUX1)
    return tmp_path / "text.safetensors"


def test_layers_of_a_text_encoder_go_along_to_diffusers(with_text: Path, tmp_path: Path) -> None:
    """It is one family's LoRA all the same."""
    out = tmp_path / "out.safetensors"
    assert lora.main(["convert", str(with_text), str(out), "--to", "diffusers"]) == 0
    found = read_lora(out)
    assert (found.networks, found.family.name) == (["text_encoder", "transformer"], "flux1")
    assert difference(read_lora(with_text), found) < 1e-6


@pytest.mark.parametrize("command", ["convert", "merge"])
def test_layers_of_a_text_encoder_have_no_place_in_a_transformers_file(
    command: str, with_text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Said in words, with the way that there is."""
    places = [with_text, tmp_path / "out.safetensors"]
    places = places[::-1] if command == "merge" else places
    assert lora.main([command, *map(str, places)]) == 1
    assert "With --to diffusers" in capfd.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


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
