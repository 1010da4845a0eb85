"""Tiny random Stable Diffusion models: diffusers folders and original single files."""

from __future__ import annotations

import functools
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

Tensors = dict[str, torch.Tensor]

torch.set_num_threads(1)  # networks this small only wait for each other; the bits depend on it

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MERGES = ["p h", "t o</w>", "o f</w>", "c a", "ca t</w>", "d o", "do g</w>", "i n", "in g</w>"]
HIDDEN, HIDDEN_2 = 32, 40  # widths of the two text encoders; they must differ, as in real SDXL
TIME_DIM = 8  # SDXL: one sinusoidal embedding of this width per micro-conditioning number
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SAMPLING: dict[str, Any] = BETAS | {"num_train_timesteps": 1000, "steps_offset": 1}
CLASSIC = {"set_alpha_to_one": False, "clip_sample": False}
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd1": (PNDMScheduler, {"set_alpha_to_one": False, "skip_prk_steps": True}),
    "sd2": (DDIMScheduler, CLASSIC | {"prediction_type": "v_prediction"}),
    "sdxl": (EulerDiscreteScheduler, {"timestep_spacing": "leading"}),
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"attention_head_dim": 8, "cross_attention_dim": HIDDEN},
    "sd2": {
        "attention_head_dim": [2, 4],
        "cross_attention_dim": HIDDEN,
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        "attention_head_dim": [2, 4],
        "cross_attention_dim": HIDDEN + HIDDEN_2,
        "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_DIM,
        "projection_class_embeddings_input_dim": 6 * TIME_DIM + HIDDEN_2,
    },
}
FAMILIES = tuple(UNETS)
PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
}


# --- a complete diffusers folder ---------------------------------------------------------------


BUILT = tempfile.TemporaryDirectory()  # removed when the process ends


def build_tiny(family: str, folder: Path, tokens: int = 77, vae_levels: int = 6) -> Path:
    """Write a complete diffusers folder of tiny random models; the same bytes every time."""
    built = _build_once(family, tokens, vae_levels)
    return Path(shutil.copytree(built, folder, dirs_exist_ok=True))


@functools.cache
def _build_once(family: str, tokens: int, vae_levels: int) -> Path:
    """Build a folder to copy from: copying takes a tenth of the time."""
    folder = Path(BUILT.name, f"{family}_{tokens}_{vae_levels}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        _unet(family).save_pretrained(folder / "unet")
        _vae(family, vae_levels).save_pretrained(folder / "vae")
        for suffix, encoder in _text_encoders(family, tokens).items():
            _save_text_encoder(encoder, folder / f"text_encoder{suffix}")
            pad = EOS if family == "sd1" or (family == "sdxl" and not suffix) else "!"
            write_tokenizer(folder / f"tokenizer{suffix}", pad)
    kind, options = SCHEDULERS[family]
    kind(**SAMPLING, **options).save_pretrained(folder / "scheduler")
    _write_json(folder / "model_index.json", _model_index(family))
    return folder


def _unet(family: str) -> Any:
    """Two levels; as in the real families, SDXL attends in the lower one and the others above."""
    down, up = ["CrossAttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"]
    if family == "sdxl":
        down, up = down[::-1], up[::-1]
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=2,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        **UNETS[family],
    )


def _vae(family: str, levels: int) -> Any:
    """Six levels make 8 latents of 256 pixels, the smallest size that can be trained.

    The real families have four, which would make 16 times as much to compute.
    """
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(8, 8, 16, 16, 16, 16)[:levels],
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
        force_upcast=family == "sdxl",
    )


def _text_encoders(family: str, tokens: int) -> dict[str, Any]:
    """The text encoders by folder suffix: one, or two for SDXL."""
    act = "gelu" if family == "sd2" else "quick_gelu"
    encoders: dict[str, Any] = {"": CLIPTextModel(_text_config(HIDDEN, act, tokens))}
    if family == "sdxl":
        encoders["_2"] = CLIPTextModelWithProjection(_text_config(HIDDEN_2, "gelu", tokens))
    return encoders


def _text_config(hidden: int, act: str, tokens: int) -> CLIPTextConfig:
    """A two-layer CLIP text config; eos id 2 is what every real SD config says."""
    return CLIPTextConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        projection_dim=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokens,
        hidden_act=act,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )


def _save_text_encoder(encoder: Any, folder: Path) -> None:
    """Save with the published key names, which transformers 5 leaves off for a new model."""
    encoder.config.architectures = [type(encoder).__name__]
    encoder.config.save_pretrained(folder)
    published = ("text_model.", "text_projection.")
    state = encoder.state_dict()
    state = {k if k.startswith(published) else f"text_model.{k}": v for k, v in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def _vocabulary() -> dict[str, int]:
    """CLIP's order: byte symbols, the same ending a word, the merges, start, end (highest)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = range(256, 256 + 256 - len(shown))
    symbols = [chr(code) for code in (*shown, *hidden)]
    merged = [pair.replace(" ", "") for pair in MERGES]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *merged, BOS, EOS]
    return {token: index for index, token in enumerate(tokens)}


def write_tokenizer(folder: Path, pad: str) -> None:
    """Write CLIPTokenizer files in the layout of the published repositories."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
    _write_json(folder / "vocab.json", _vocabulary())
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), "utf-8")
    _write_json(folder / "special_tokens_map.json", special)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    _write_json(folder / "tokenizer_config.json", special | config)


def _model_index(family: str) -> dict[str, Any]:
    """The component table of a published pipeline."""
    suffixes = ("", "_2") if family == "sdxl" else ("",)
    index: dict[str, Any] = {
        "_class_name": PIPELINES[family],
        "_diffusers_version": "0.21.0",
        "scheduler": ["diffusers", SCHEDULERS[family][0].__name__],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for suffix in suffixes:
        kind = "CLIPTextModelWithProjection" if suffix else "CLIPTextModel"
        index[f"text_encoder{suffix}"] = ["transformers", kind]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
    if family == "sdxl":
        return index | {"force_zeros_for_empty_prompt": True}
    absent = {"safety_checker": [None, None], "feature_extractor": [None, None]}
    return index | absent | {"requires_safety_checker": False}


def _write_json(path: Path, value: Any) -> None:
    """Write indented UTF-8 JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def change_weights(path: Path, change: Callable[[Tensors], object]) -> None:
    """Change numbers in a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


# --- the same weights as one file in the original layout -----------------------------------------


def write_single_file(folder: Path, target: Path, family: str) -> Path:
    """Write a diffusers folder as one file with the original CompVis / StabilityAI key names."""
    state = _original_unet(_weights(folder / "unet"), _config(folder / "unet"))
    state |= _original_vae(_weights(folder / "vae"))
    state |= _original_text(folder, family)
    state["alphas_cumprod"] = torch.linspace(0.9991, 0.0047, 1000)  # published files carry it
    save_file({k: v.contiguous() for k, v in state.items()}, target, {"format": "pt"})
    return target


def _config(folder: Path) -> dict[str, Any]:
    """A component's config."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return config


def _weights(folder: Path) -> Tensors:
    """A component's weights as they lie on disk."""
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def _substitute(key: str, rules: Iterable[tuple[str, str]]) -> str:
    """Apply the regular-expression rules in order."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


TOP_RULES = [
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
    (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"^mid_block\.resnets\.0\.", "middle_block.0."),
    (r"^mid_block\.attentions\.0\.", "middle_block.1."),
    (r"^mid_block\.resnets\.1\.", "middle_block.2."),
]
RESNET_RULES = [
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
]
UNET_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)")
VAE_RULES = [
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
]
OPEN_CLIP_RULES = [
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.embeddings\.", ""),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.", ".attn."),
]


def _original_unet(weights: Tensors, config: dict[str, Any]) -> Tensors:
    """The UNet under the CompVis block numbers."""
    return {f"model.diffusion_model.{_unet_key(k, config)}": v for k, v in weights.items()}


def _unet_key(key: str, config: dict[str, Any]) -> str:
    """One UNet key: the original numbers blocks through and its modules within a block."""
    if ".resnets." in key:
        key = _substitute(key, RESNET_RULES)
    if not (match := UNET_BLOCK.match(key)):
        return _substitute(key, TOP_RULES)
    side, block, part, index, rest = match.groups()
    width = config["layers_per_block"] + 1  # entries of one level, on either side
    stem, first = ("input_blocks", 1) if side == "down" else ("output_blocks", 0)
    number = first + int(block) * width + int(index)
    if part == "downsamplers":
        return f"{stem}.{number + width - 1}.0.op.{rest.removeprefix('conv.')}"
    if part == "upsamplers":
        attends = config["up_block_types"][int(block)].startswith("CrossAttn")
        return f"{stem}.{number + width - 1}.{1 + attends}.{rest}"
    return f"{stem}.{number}.{0 if part == 'resnets' else 1}.{rest}"


def _original_vae(weights: Tensors) -> Tensors:
    """The VAE: decoder levels count upwards, attention weights are 1x1 convolutions."""
    last = max(int(m[1]) for k in weights if (m := re.match(r"decoder\.up_blocks\.(\d+)", k)))
    state = {}
    for key, value in weights.items():
        turned = re.sub(r"up_blocks\.(\d+)", lambda m: f"up_blocks.{last - int(m[1])}", key)
        name = f"first_stage_model.{_substitute(turned, VAE_RULES)}"
        convolution = ".attn_1." in name and value.ndim == 2
        state[name] = value[:, :, None, None] if convolution else value
    return state


def _original_text(folder: Path, family: str) -> Tensors:
    """The text encoder or encoders under the names each family uses."""
    first = _weights(folder / "text_encoder")
    if family == "sd1":
        return _original_clip(first, "cond_stage_model.transformer.")
    if family == "sd2":
        return _original_open_clip(first, "cond_stage_model.model.", unused_layer=True)
    second = _weights(folder / "text_encoder_2")
    state = _original_clip(first, "conditioner.embedders.0.transformer.")
    return state | _original_open_clip(second, "conditioner.embedders.1.model.")


def _original_clip(weights: Tensors, prefix: str) -> Tensors:
    """OpenAI CLIP keeps the transformers names, plus the position ids older versions saved."""
    state = {prefix + key: value for key, value in weights.items()}
    return state | {f"{prefix}text_model.embeddings.position_ids": torch.arange(77)[None]}


def _original_open_clip(weights: Tensors, prefix: str, unused_layer: bool = False) -> Tensors:
    """OpenCLIP fuses q, k and v, transposes the projection and (SD 2) has one layer more."""
    state: Tensors = {"logit_scale": torch.tensor(4.6052)}
    for key, value in weights.items():
        if "text_projection" in key:
            state["text_projection"] = value.T
        elif not re.search(r"\.[qkv]_proj\.", key):
            state[_substitute(key, OPEN_CLIP_RULES)] = value
        elif ".q_proj." in key:
            fused = [weights[key.replace(".q_proj.", f".{name}_proj.")] for name in "qkv"]
            name = re.sub(r"\.q_proj\.(\w+)$", r".in_proj_\1", key)
            state[_substitute(name, OPEN_CLIP_RULES)] = torch.cat(fused)
    if unused_layer:
        state |= {"text_projection": torch.eye(HIDDEN)} | _copy_of_last_block(state)
    return {prefix + key: value for key, value in state.items()}


def _copy_of_last_block(state: Tensors) -> Tensors:
    """One more transformer block, which diffusers folders of SD 2 leave out."""
    stem = "transformer.resblocks."
    last = max(int(key.split(".")[2]) for key in state if key.startswith(stem))
    old, new = f"{stem}{last}.", f"{stem}{last + 1}."
    return {k.replace(old, new): v + 1 for k, v in state.items() if k.startswith(old)}
