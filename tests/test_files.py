"""Files out: LoRA files that act elsewhere as in training, whole or not there, and the history."""

from __future__ import annotations

import copy
import functools
import getpass
import hashlib
import json
import math
import os
import shutil
import stat
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import FAMILIES, _original_unet, _unet_key
from tiny_runs import Ready, prepare, tiny_base, tiny_config

import train_lora
from launches import NARROW
from models import DENOISERS
from train_lora import ErrorCode, TrainError

PIPELINES: dict[str, Any] = {
    "sd1": StableDiffusionPipeline,
    "sd2": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
}
STRENGTHS = [(1.0, 4), (4.0, 4), (8.0, 4)]
SHAPES = [("sd1", *strength, True) for strength in STRENGTHS]
SHAPES += [(family, 3.7, 8, text) for family in FAMILIES for text in (False, True)]


# --- the effect in diffusers and ComfyUI ---


def trained(ground: Path, out: Path, family: str, precision: str = "fp32", **shape: Any) -> Ready:
    """Make two strong updates, once for each shape of an adapter, and save as a run does."""
    known = learned(ground, family, **shape)
    ready = copy.copy(known)
    ready.config = replace(known.config, output_path=out, save_precision=precision)
    ready.finish()
    return ready


@functools.cache
def learned(ground: Path, family: str, **shape: Any) -> Ready:
    """Make two strong updates, which nobody may add to."""
    ready = prepare(tiny_config(ground, family, learning_rate=0.05, **shape))
    ready.make_updates(2)
    return ready


def base_of(config: train_lora.TrainingConfig) -> train_lora.BaseModel:
    """Look at the headers of a config's base model."""
    _, base = train_lora.inspect_model(config)
    assert base
    return base


def load_pipeline(base: Path) -> Any:
    """Load the base model as a user of diffusers does."""
    kind = next(PIPELINES[name] for name in FAMILIES if base.name == name)
    options = {"use_safetensors": True, "local_files_only": True}
    return kind.from_pretrained(str(base), **options)


def weights_of(network: Any) -> dict[str, torch.Tensor]:
    """Copy a network's weights, named as without adapter and without the level left out."""
    state = {k.replace(".base_layer", ""): v for k, v in network.state_dict().items()}
    return {k.removeprefix("text_model."): v.clone() for k, v in state.items() if "lora_" not in k}


def products(ready: Ready, part: str) -> dict[str, torch.Tensor]:
    """Multiply B and A of a network in training, by weight."""
    own = {n: p.detach() for n, p in ready.learner.matrices.items() if n.startswith(f"{part}.")}
    found = {}
    for name, down in own.items():
        if ".lora_A." in name:
            weight = name.partition(".")[2].partition(".lora_A")[0].removeprefix("text_model.")
            found[f"{weight}.weight"] = own[name.replace(".lora_A.", ".lora_B.")] @ down
    return found


@pytest.mark.parametrize(("family", "alpha", "rank", "text"), SHAPES)
def test_diffusers_adds_alpha_by_rank_times_b_a(
    family: str, alpha: float, rank: int, text: bool, ground: Path, tmp_path: Path
) -> None:
    """Loaded from the output folder and fused, every adapted weight moves so, and no other."""
    shape: dict[str, Any] = {"lora_alpha": alpha, "lora_rank": rank, "train_text_encoder": text}
    ready = trained(ground, tmp_path / "out", family, **shape)
    pipe = load_pipeline(tiny_base(family, ground / "bases"))
    parts = ["unet", *(part.folder for part in ready.models.base.family.text_encoders)]
    before = {part: weights_of(getattr(pipe, part)) for part in parts}
    pipe.load_lora_weights(str(tmp_path / "out"))
    pipe.fuse_lora(components=parts if text else ["unet"])
    pipe.unload_lora_weights()
    for part in parts:
        expected = products(ready, part)
        assert bool(expected) == (part == "unet" or text)
        for name, value in weights_of(getattr(pipe, part)).items():
            moved = value - before[part][name]
            change = alpha / rank * expected[name] if name in expected else torch.zeros(1)
            assert torch.allclose(moved, change, atol=1e-6)
        assert all(float(value.abs().max()) > 1e-4 for value in expected.values())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_file_answers_as_the_model_in_training(
    family: str, precision: str, ground: Path, tmp_path: Path
) -> None:
    """Exactly with fp32; half precision costs what its digits cost."""
    shape: dict[str, Any] = {"lora_alpha": 3.7, "lora_rank": 8, "train_text_encoder": True}
    ready = trained(ground, tmp_path / "out", family, precision, **shape)
    pipe = load_pipeline(tiny_base(family, ground / "bases"))
    plain = answer(ready, pipe)
    pipe.load_lora_weights(str(tmp_path / "out"), weight_name="lora_final.safetensors")
    loaded, own = answer(ready, pipe), answer(ready)
    tolerance = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 5e-2}[precision]
    assert float((loaded - own).abs().max()) < tolerance
    assert float((plain - own).abs().max()) > 2 * tolerance


def answer(ready: Ready, pipe: Any = None) -> torch.Tensor:
    """Let the model in training, or a pipeline's networks, predict for a caption they read."""
    models = ready.models
    if pipe:
        encoders = [getattr(pipe, part.folder) for part in models.base.family.text_encoders]
        models = replace(models, denoiser=pipe.unet, text_encoders=encoders)
    networks = (models.denoiser, *models.text_encoders)
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for network in networks:
            network.eval()
        text = models.read_text(ready.cache.read([ready.cache.images[0].caption]))
        sizes = ready.cache.images[0].time_ids[None]
        return models.predict(latents, torch.tensor([500]), text, sizes)


COMFY_TEXT = {"text_encoder": ["lora_te_", "lora_te1_"], "text_encoder_2": ["lora_te2_"]}


def comfy_keys(base: Path, family: str) -> dict[str, tuple[str, str]]:
    """Name a base's weights as ComfyUI does; A1111 wants te_ for one encoder, te1_ for two."""
    names = {}
    (unet,) = (base / "unet").glob("*.safetensors")
    for key in load_file(unet):
        if key.endswith(".weight"):
            config = json.loads((base / "unet" / "config.json").read_text("utf-8"))
            # It knows SDXL's denoiser by both names; kohya's programs know the original alone.
            stem = (_unet_key(key, config) if family == "sdxl" else key).removesuffix(".weight")
            names["lora_unet_" + stem.replace(".", "_")] = ("unet", key)
    for part in sorted(base.glob("text_encoder*")):
        prefix = COMFY_TEXT[part.name][family == "sdxl" and part.name == "text_encoder"]
        for key in load_file(part / "model.safetensors"):
            if key.endswith(".weight"):
                stem = key.removesuffix(".weight").replace(".", "_")
                names[prefix + stem] = (part.name, key)
    return names


@pytest.mark.parametrize("text", [False, True], ids=["unet", "unet and text"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_names_a_module_in_comfyui(
    family: str, text: bool, ground: Path, tmp_path: Path
) -> None:
    """Down, up and alpha for every module, shapes that fit its weight, and one alpha for all."""
    ready = trained(ground, tmp_path, family, train_text_encoder=text, lora_alpha=3.7, lora_rank=8)
    base = tiny_base(family, ground / "bases")
    known, tensors = comfy_keys(base, family), load_file(tmp_path / "lora_final.safetensors")
    modules = {key.partition(".")[0] for key in tensors}
    kinds = ("alpha", "lora_down.weight", "lora_up.weight")
    assert {f"{module}.{kind}" for module in modules for kind in kinds} == set(tensors)
    assert modules <= known.keys()
    assert len(modules) == len(ready.learner.matrices) / 2
    assert {known[module][0] for module in modules} == {
        name.partition(".")[0] for name in ready.learner.matrices
    }
    assert {float(tensors[f"{module}.alpha"]) for module in modules} == {float(torch.tensor(3.7))}
    for module in modules:
        part, key = known[module]
        (file,) = (base / part).glob("*.safetensors")
        with safe_open(file, framework="pt") as weights:
            change = tensors[f"{module}.lora_up.weight"] @ tensors[f"{module}.lora_down.weight"]
            assert tuple(weights.get_slice(key).get_shape()) == tuple(change.shape)


@pytest.mark.parametrize(
    ("precision", "kind"),
    [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)],
)
def test_weights_are_saved_in_the_precision_asked_for(
    precision: str, kind: torch.dtype, ground: Path, tmp_path: Path
) -> None:
    """Each number is the nearest of its format to the one in training."""
    ready = trained(ground, tmp_path, "sd1", precision)
    tensors = load_file(tmp_path / "lora_final.safetensors")
    assert {v.dtype for k, v in tensors.items() if not k.endswith("alpha")} == {kind}
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    own = ready.learner.matrices[f"unet.{name}.lora_B.default.weight"].detach()
    assert torch.equal(tensors[f"lora_unet_{name.replace('.', '_')}.lora_up.weight"], own.to(kind))


# Where kohya's programs, and all who choose blocks by them, have what diffusers calls so.
KOHYA_BLOCKS = {
    "down_blocks.1.attentions.0": "input_blocks_4_1",
    "down_blocks.1.attentions.1": "input_blocks_5_1",
    "down_blocks.2.attentions.0": "input_blocks_7_1",
    "down_blocks.2.attentions.1": "input_blocks_8_1",
    "mid_block.attentions.0": "middle_block_1",
    "up_blocks.0.attentions.0": "output_blocks_0_1",
    "up_blocks.0.attentions.1": "output_blocks_1_1",
    "up_blocks.0.attentions.2": "output_blocks_2_1",
    "up_blocks.1.attentions.0": "output_blocks_3_1",
    "up_blocks.1.attentions.1": "output_blocks_4_1",
    "up_blocks.1.attentions.2": "output_blocks_5_1",
}


def test_sdxl_has_kohyas_block_numbers_and_the_others_diffusers() -> None:
    """As published; a program that knows these alone would pass over any other without a word."""
    layer = "transformer_blocks.0.attn1.to_out.0"
    for block, kohya in KOHYA_BLOCKS.items():
        name = f"unet.{block}.{layer}.lora_A.default.weight"
        ending = "transformer_blocks_0_attn1_to_out_0.lora_down.weight"
        assert train_lora.kohya_name(name, train_lora.SDXL) == f"lora_unet_{kohya}_{ending}"
        plain = block.replace(".", "_")
        for family in (train_lora.SD1, train_lora.SD2):
            assert train_lora.kohya_name(name, family) == f"lora_unet_{plain}_{ending}"


def test_all_layers_in_blocks_of_sdxl_have_the_names_that_diffusers_converts() -> None:
    """Of a denoiser with SDXL's depth, also those that have no adapter."""
    shape = DENOISERS["sdxl"] | NARROW["sdxl"] | {"cross_attention_dim": 64}
    unet: Any = UNet2DConditionModel(**shape)
    weights = unet.state_dict()
    numbered = {key: torch.tensor(number) for number, key in enumerate(weights)}
    originals = _original_unet(numbered, dict(unet.config))
    converted = convert_ldm_unet_checkpoint(dict(originals), dict(unet.config))
    names = {int(number): key for key, number in originals.items()}
    prefix = "model.diffusion_model."
    blocks = {k: v for k, v in weights.items() if v.ndim > 1 and "block" in k}
    layers = [key.removesuffix(".weight") for key in blocks]
    assert len(layers) > 700
    for layer in layers:
        original = names[int(converted[f"{layer}.weight"])].removeprefix(prefix)
        assert train_lora.original_name(layer) == original.removesuffix(".weight")


# --- the header ---


def header_of(path: Path) -> dict[str, str]:
    """Read the header's own fields as they stand in the file, byte for byte by the format."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    fields = json.loads(content[8 : 8 + length])
    header: dict[str, str] = fields["__metadata__"]
    return header


VERSIONS = {"sd1": ("sd_", "False"), "sd2": ("sd_v2", "True"), "sdxl": ("sdxl_", "False")}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_header_tells_programs_and_people_what_the_file_is(
    family: str, ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strings in sorted order; nothing of the machine, its user or a token."""
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    words: dict[str, Any] = {"trigger_words": ["zkb", "blue mug"], "seed": 9, "lora_name": "tiny"}
    config = tiny_config(ground, family, lora_alpha=3.7, lora_rank=8, **words)
    header = train_lora.lora_header(config, base_of(config), 2, 6)
    train_lora.save_lora(tmp_path / "lora_final.safetensors", sample_tensors(), header)
    header = header_of(tmp_path / "lora_final.safetensors")
    assert list(header) == sorted(header)
    assert all(type(value) is str for value in header.values())
    everything = json.dumps(header)
    for secret in ("hf_secret", str(ground), str(tmp_path), str(Path.home()) + "/"):
        assert secret not in everything
    assert not any(value.startswith(("/", "~")) or ":\\" in value for value in header.values())
    assert getpass.getuser() not in header.values()
    prefix, second = VERSIONS[family]
    assert header["ss_base_model_version"].startswith(prefix)
    assert (header["ss_base_model_version"][:4] == "sdxl") == (family == "sdxl")
    assert header["ss_v2"] == second
    expected = {"ss_network_alpha": "3.7", "ss_network_dim": "8", "ss_steps": "2", "ss_seed": "9"}
    assert expected.items() <= header.items()
    assert header["modelspec.trigger_phrase"] == "zkb, blue mug"
    assert header["modelspec.resolution"] == "256x256"
    assert header["ss_sd_model_name"] == family


def test_the_header_names_a_model_of_the_hub_by_its_id(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An id is no path."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--stabilityai--sdxl-turbo"
    shutil.copytree(tiny_base("sdxl", ground / "bases"), home / "snapshots" / "one")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("one")
    config = tiny_config(ground, base_model="stabilityai/sdxl-turbo")
    header = train_lora.lora_header(config, base_of(config), 1, 6)
    assert header["ss_sd_model_name"] == "stabilityai/sdxl-turbo"


def test_the_header_never_says_where_a_base_lay_that_is_gone(ground: Path, tmp_path: Path) -> None:
    """A disk may be taken out in the midst of a run."""
    shutil.copytree(tiny_base("sd1", ground / "bases"), tmp_path / "mine")
    config = tiny_config(ground, base_model=str(tmp_path / "mine"))
    base = base_of(config)
    shutil.rmtree(tmp_path / "mine")
    header = train_lora.lora_header(config, base, 1, 6)
    assert header["ss_sd_model_name"] == "mine"
    assert str(tmp_path) not in json.dumps(header)


@pytest.mark.parametrize(
    ("prediction", "said"),
    [
        ("epsilon", "stable-diffusion-v2-512/lora"),
        ("v_prediction", "stable-diffusion-v2-768-v/lora"),
    ],
)
def test_the_header_tells_the_two_kinds_of_sd2_apart(
    prediction: str, said: str, ground: Path
) -> None:
    """The model spec has a name for each."""
    config = tiny_config(ground, "sd2", prediction_type=prediction)
    header = train_lora.lora_header(config, base_of(config), 1, 6)
    assert header["modelspec.architecture"] == said


@pytest.mark.parametrize(
    ("knob", "said"), [(True, {"ss_zero_terminal_snr": "True"}), (False, {}), ("auto", {})]
)
def test_the_header_tells_of_zero_terminal_snr_where_it_was_trained_with(
    knob: bool | str, said: dict[str, str], ground: Path
) -> None:
    """In kohya's word; files of other runs have no such field."""
    config = tiny_config(ground, prediction_type="v_prediction", zero_terminal_snr=knob)
    header = train_lora.lora_header(config, base_of(config), 1, 6)
    assert {key: header[key] for key in header if "snr" in key} == said


@pytest.mark.parametrize("alpha", [1e-05, 0.3333333333, 12345.678, 65504.0])
def test_the_header_tells_alpha_as_the_tensors_do(alpha: float, ground: Path) -> None:
    """No digit of it is lost."""
    base = base_of(tiny_config(ground))
    header = train_lora.lora_header(tiny_config(ground, lora_alpha=alpha), base, 1, 6)
    assert float(header["ss_network_alpha"]) == pytest.approx(alpha, rel=1e-9)


def a1111_family(header: dict[str, str]) -> str:
    """Decide as A1111 and Forge do which models a LoRA is offered for."""
    if header.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    return "SD2" if header.get("ss_v2") == "True" else "SD1"


# kohya's own words: with velocity, SD 1 and 2 are versions of their own, and SDXL is not.
KOHYA_VERSIONS = {
    ("sd1", "epsilon"): "sd_v1",
    ("sd1", "v_prediction"): "sd_v1_v",
    ("sd2", "epsilon"): "sd_v2",
    ("sd2", "v_prediction"): "sd_v2_v",
    ("sdxl", "epsilon"): "sdxl_base_v1-0",
    ("sdxl", "v_prediction"): "sdxl_base_v1-0",
}
KOHYA_ARCHITECTURES = {
    "sd_v1": "stable-diffusion-v1/lora",
    "sd_v1_v": "stable-diffusion-v1/lora",
    "sd_v2": "stable-diffusion-v2-512/lora",
    "sd_v2_v": "stable-diffusion-v2-768-v/lora",
    "sdxl_base_v1-0": "stable-diffusion-xl-v1-base/lora",
}
REQUIRED = ("sai_model_spec", "architecture", "implementation", "title", "resolution")


@pytest.mark.parametrize(("family", "prediction"), KOHYA_VERSIONS)
def test_the_header_follows_the_published_rules(family: str, prediction: str, ground: Path) -> None:
    """Those of A1111, of kohya and of the model spec."""
    config = tiny_config(ground, family, prediction_type=prediction, trigger_words=["zkb", "mug"])
    header = train_lora.lora_header(config, base_of(config), 7, 6)
    version = KOHYA_VERSIONS[family, prediction]
    assert header["ss_base_model_version"] == version
    assert header["modelspec.architecture"] == KOHYA_ARCHITECTURES[version]
    assert header["modelspec.prediction_type"] == {"epsilon": "epsilon"}.get(prediction, "v")
    assert a1111_family(header) == family.upper()
    assert all(header[f"modelspec.{field}"] for field in REQUIRED)
    assert header["modelspec.sai_model_spec"] == "1.0.0"
    generative = "https://github.com/Stability-AI/generative-models"
    assert (header["modelspec.implementation"] == generative) == (family == "sdxl")
    assert json.loads(header["ss_tag_frequency"]) == {"tiny": {"zkb": 6, "mug": 6}}
    assert header["ss_num_train_images"] == "6"
    assert header["ss_clip_skip"] == ("2" if family == "sdxl" else "1")


def test_the_header_tells_how_captions_were_read_in_kohyas_words(ground: Path) -> None:
    """Where that is not as by default; else it says nothing of it."""
    words = ["ss_shuffle_caption", "ss_keep_tokens", "ss_caption_dropout_rate"]
    words += ["ss_caption_tag_dropout_rate", "ss_max_token_length"]
    plain = tiny_config(ground)
    header = train_lora.lora_header(plain, base_of(plain), 1, 6)
    assert not header.keys() & set(words)
    told: dict[str, Any] = {"shuffle_tags": True, "keep_tokens": 2, "caption_dropout": 0.05}
    config = tiny_config(ground, **told, tag_dropout=0.1, max_tokens=225, clip_skip=2)
    header = train_lora.lora_header(config, base_of(config), 1, 6)
    assert [header[word] for word in words] == ["True", "2", "0.05", "0.1", "225"]
    assert header["ss_clip_skip"] == "2"


def test_the_header_has_the_name_and_nothing_empty(ground: Path) -> None:
    """Titles differ from step to step, and from one LoRA to another."""
    base = base_of(tiny_config(ground))
    config = tiny_config(ground, lora_name="blue mug", trigger_words=[])
    headers = [train_lora.lora_header(config, base, step, 6) for step in (1, 2)]
    headers.append(train_lora.lora_header(replace(config, lora_name="red mug"), base, 2, 6))
    assert [h["ss_output_name"] for h in headers] == ["blue mug", "blue mug", "red mug"]
    assert len({h["modelspec.title"] for h in headers}) == 3
    assert all(h["modelspec.title"].startswith(h["ss_output_name"]) for h in headers)
    assert "modelspec.trigger_phrase" not in headers[0]
    assert all(value for header in headers for value in header.values())


@pytest.mark.parametrize(
    ("folder", "name"),
    [("zkb", "zkb"), ("a/../zkb", "zkb"), ("zkb/", "zkb"), ("z\udc80", "z\ufffd"), ("/", "lora")],
)
def test_a_lora_is_named_as_its_folder_unless_told(folder: str, name: str, ground: Path) -> None:
    """A folder's name need not be text; a header's must."""
    config = replace(tiny_config(ground), lora_name=None, output_path=Path(folder).absolute())
    assert config.name == name
    assert replace(config, lora_name="mug").name == "mug"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", ".a", "a.", "a ", "a\n", "a:b", "a?"]
)
def test_a_name_that_is_no_plain_file_name_is_refused(name: str, ground: Path) -> None:
    """It becomes one."""
    with pytest.raises(TrainError) as refused:
        tiny_config(ground, lora_name=name)
    assert refused.value.problems[0].path == "lora_name"


def test_the_header_has_the_hash_of_the_tensors(ground: Path, tmp_path: Path) -> None:
    """As kohya's programs and the model spec take it: of all that follows the header."""
    trained(ground, tmp_path, "sd1")
    content = (tmp_path / "lora_final.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    digest = hashlib.sha256(content[8 + length :]).hexdigest()
    header = header_of(tmp_path / "lora_final.safetensors")
    assert header["sshs_model_hash"] == digest
    assert header["modelspec.hash_sha256"] == f"0x{digest}"


# --- a copy for another program ---


def train_for(loras: Path, ground: Path, out: Path, **changes: Any) -> train_lora.CompleteEvent:
    """Make a run whose LoRA is also put into another program's folder."""
    options: dict[str, Any] = {"loras_path": str(loras), "output_path": str(out)}
    options |= {"steps": 1, "lora_name": "mug"}
    return train_lora.LoRATrainer(tiny_config(ground, **options | changes)).train()


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    """Provide another program's folder, with somebody's LoRA in it."""
    folder = tmp_path / "loras"
    folder.mkdir()
    (folder / "other.safetensors").write_bytes(b"somebody's")
    return folder


def test_a_finished_lora_is_put_where_another_program_looks(
    ground: Path, tmp_path: Path, loras: Path
) -> None:
    """With the last picture, and with what A1111 reads about it."""
    done = train_for(loras, ground, tmp_path / "out", trigger_words=["zkb", "mug"])
    names = {"mug.safetensors", "mug.preview.png", "mug.json", "other.safetensors"}
    assert {path.name for path in loras.iterdir()} == names
    assert done.copy_path == str(loras / "mug.safetensors")
    assert hashlib.sha256(Path(done.copy_path).read_bytes()).hexdigest() == done.sha256
    shown = (tmp_path / "out" / "samples" / "step_1.png").read_bytes()
    assert (loras / "mug.preview.png").read_bytes() == shown
    assert json.loads((loras / "mug.json").read_text("ascii")) == {
        "activation text": "zkb, mug",
        "preferred weight": 1.0,
        "sd version": "SD1",
    }


def test_a_longer_run_replaces_what_it_put_there_and_nothing_edited(
    ground: Path, tmp_path: Path, loras: Path
) -> None:
    """Somebody may have written notes beside it."""
    first = train_for(loras, ground, tmp_path / "out")
    (loras / "mug.json").write_text('{"notes": "mine"}')
    second = train_for(loras, ground, tmp_path / "out", steps=2)
    assert second.copy_path == first.copy_path
    content = (loras / "mug.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == second.sha256 != first.sha256
    assert (loras / "mug.json").read_text() == '{"notes": "mine"}'


def test_a_fresh_run_replaces_what_the_one_set_aside_put_there(
    ground: Path, tmp_path: Path, loras: Path
) -> None:
    """Preflight says so, and so does the start; of the earlier one, all lies in earlier_1."""
    options: dict[str, Any] = {"loras_path": str(loras), "output_path": str(tmp_path / "out")}
    options |= {"steps": 1, "lora_name": "mug"}
    first = train_lora.LoRATrainer(tiny_config(ground, **options)).train()
    trainer = train_lora.LoRATrainer(tiny_config(ground, **options, seed=1), fresh=True)
    trainer.validate()
    second = trainer.train()
    assert second.copy_path == first.copy_path
    content = (loras / "mug.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == second.sha256 != first.sha256
    kept = (tmp_path / "out" / "earlier_1" / "lora_final.safetensors").read_bytes()
    assert hashlib.sha256(kept).hexdigest() == first.sha256


@pytest.mark.parametrize("ending", ["safetensors", "preview.png", "json"])
def test_a_file_of_somebody_else_is_never_replaced(
    ending: str, ground: Path, tmp_path: Path, loras: Path
) -> None:
    """Preflight names it, and so does a start, before anything is learned."""
    taken = loras / f"mug.{ending}"
    taken.write_bytes(b"somebody's")
    options: Any = {"loras_path": str(loras), "output_path": str(tmp_path / "out")}
    options["lora_name"] = "mug"
    trainer = train_lora.LoRATrainer(tiny_config(ground, **options))
    for refuse in (trainer.validate, trainer.train):
        with pytest.raises(TrainError) as refused:
            refuse()
        assert refused.value.code is ErrorCode.RUN_EXISTS
        assert str(taken) in str(refused.value)
    assert taken.read_bytes() == b"somebody's"
    assert len(list(loras.iterdir())) == 2


def test_a_large_file_of_somebody_else_is_not_read_into_memory(
    ground: Path, tmp_path: Path, loras: Path
) -> None:
    """It may be a whole model under the LoRA's name."""
    with (loras / "mug.safetensors").open("wb") as file:
        file.truncate(32 * 2**20)
    options: Any = {"loras_path": str(loras), "output_path": str(tmp_path / "out")}
    config = tiny_config(ground, **options, lora_name="mug")
    tracemalloc.start()
    with pytest.raises(TrainError):
        train_lora.check_copies(config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 2**20


def test_a_lora_that_came_meanwhile_stays_and_the_run_is_complete(
    ground: Path, tmp_path: Path, loras: Path
) -> None:
    """What was learned lies in output_path all the same."""
    options = {"loras_path": str(loras), "output_path": str(tmp_path / "out")}
    ready = prepare(tiny_config(ground, **options))
    ready.make_updates()
    lora = loras / "tiny.safetensors"
    lora.write_bytes(b"somebody's")
    assert ready.finish().copy_path is None
    assert ready.recorder.codes()[-1] == "copy_failed"
    assert lora.read_bytes() == b"somebody's"


@pytest.mark.parametrize("kind", ["none", "file"])
def test_a_folder_of_loras_that_is_none_is_refused_by_preflight(
    kind: str, ground: Path, tmp_path: Path
) -> None:
    """Nobody wants to find a folder with a typing error in it."""
    path = tmp_path / "lorras"
    if kind == "file":
        path.touch()
    config = tiny_config(ground, loras_path=str(path), output_path=str(tmp_path / "out"))
    with pytest.raises(TrainError) as refused:
        train_lora.LoRATrainer(config).validate()
    assert refused.value.problems[0].path == "loras_path"
    assert not path.is_dir()


def test_what_only_has_the_name_of_the_list_of_copies_is_not_opened(
    ground: Path, tmp_path: Path, loras: Path
) -> None:
    """A pipe would never answer; without its list, a run has put nothing there."""
    config = tiny_config(ground, loras_path=str(loras), output_path=str(tmp_path / "out"))
    (tmp_path / "out" / "state").mkdir(parents=True)
    os.mkfifo(tmp_path / "out" / "state" / "copies.json")
    assert train_lora.known_copies(config) == set()


def sample_tensors() -> dict[str, torch.Tensor]:
    """Make three small tensors."""
    return {f"lora_unet_{n}.alpha": torch.full((8, 8), float(n)) for n in range(3)}


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    """The library alone writes header fields in a new order each time."""
    header = {f"key_{number}": "word" for number in range(30)}
    shuffled = dict(reversed(header.items()))
    orders = [header, shuffled] * 5
    found = {b"".join(train_lora.safetensors_pieces(sample_tensors(), h)) for h in orders}
    assert len(found) == 1
    (content,) = found
    (tmp_path / "x.safetensors").write_bytes(content)
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in sample_tensors().items())
    assert header_of(tmp_path / "x.safetensors") == header


def test_the_library_reads_what_is_written_piece_by_piece(tmp_path: Path) -> None:
    """Every kind of number, scalars, nothing at all, and what does not lie in one piece."""
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8)
    tensors = {str(kind): torch.arange(7).to(kind) for kind in kinds}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 3), "yes": torch.tensor([True])}
    tensors |= {"turned": torch.arange(6.0).view(2, 3).T, "learns": torch.ones(2).requires_grad_()}
    path = tmp_path / "x.safetensors"
    said = train_lora.write_whole(path, *train_lora.safetensors_pieces(tensors))
    assert said["bytes"] == path.stat().st_size
    assert said["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    assert all(loaded[name].dtype == value.dtype for name, value in tensors.items())


def test_a_state_is_written_without_a_copy_of_it_in_memory(tmp_path: Path) -> None:
    """It may be larger than what is left; torch's own memory is not counted here."""
    content = {"numbers": torch.zeros(4 * 2**20), "more": torch.zeros(4 * 2**20)}
    manifest = {"step": 1, "total_steps": 2, "run_id": "x", "identity": {}, "progress": {}}
    names = ("adapter.safetensors", "optimizer.safetensors")
    tracemalloc.start()
    train_lora.write_state(tmp_path, dict.fromkeys(names, content), manifest)
    train_lora.read_state(tmp_path / "state" / "step_1")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22 < sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors"))


def test_a_run_saves_what_its_parts_save(ground: Path, tmp_path: Path) -> None:
    """Three real runs and none of their bytes differs; nothing else lies at the top level."""
    digests = set()
    for number in range(3):
        out = tmp_path / str(number)
        options: dict[str, Any] = {"steps": 3, "checkpoint_steps": 2, "output_path": str(out)}
        done = train_lora.LoRATrainer(tiny_config(ground, **options)).train()
        content = (out / "lora_final.safetensors").read_bytes()
        assert (done.bytes, done.final_path) == (len(content), str(out / "lora_final.safetensors"))
        digests.add(hashlib.sha256(content).hexdigest())
        assert [file.name for file in out.glob("*.safetensors")] == ["lora_final.safetensors"]
        names = [file.name for file in (out / "checkpoints").iterdir()]
        assert names == ["lora_step_2.safetensors"]
        assert not list(out.rglob("*.tmp"))
        assert header_of(out / "checkpoints" / names[0])["ss_steps"] == "2"
    assert len(digests) == 1


# --- whole or not at all ---


def flip_byte(descriptor: int, place: int) -> None:
    """Change one byte of an open file; none of those tested is an A before."""
    os.pwrite(descriptor, b"A", place)


DAMAGE: dict[str, Callable[[int, int], None]] = {
    "the header": lambda descriptor, _: flip_byte(descriptor, 12),
    "the length": lambda descriptor, _: flip_byte(descriptor, 3),
    "the end": lambda descriptor, size: os.ftruncate(descriptor, size - 10),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_disk_that_spoils_a_file_is_noticed(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read back; one that is not sound does not keep its name."""
    flush = os.fsync

    def spoil(descriptor: int) -> None:
        """Damage what was just written, as a broken disk does."""
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode):
            DAMAGE[damage](descriptor, found.st_size)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", spoil)
    path = tmp_path / "lora_final.safetensors"
    with pytest.raises(OSError, match="does not return what was written"):
        train_lora.save_lora(path, sample_tensors(), {"format": "pt"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_none_are_not_saved(number: float, tmp_path: Path) -> None:
    """The earlier file of that name stays, and nothing else does."""
    path = tmp_path / "lora_final.safetensors"
    train_lora.save_lora(path, sample_tensors(), {"format": "pt"})
    before = path.read_bytes()
    tensors = sample_tensors()
    tensors["lora_unet_1.alpha"][0, 0] = number
    with pytest.raises(OSError, match="too large for the format"):
        train_lora.save_lora(path, tensors, {"format": "pt"})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o000, 0o666)])
def test_files_have_the_mode_the_user_wants(umask: int, mode: int, tmp_path: Path) -> None:
    """The library's own writer makes 0600, which a container's host user cannot read."""
    former = os.umask(umask)
    train_lora.save_lora(tmp_path / "x.safetensors", sample_tensors(), {"format": "pt"})
    os.umask(former)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == mode
