"""Krea 2: many layers of its text encoder are read, and its VAE was made for films."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from train_lora import BaseModel, Conditioning, Family, Headers, Located, Part, Record

from . import files, flow, patches

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from train_lora import torch  # which is imported when it is asked for

SYSTEM = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n"
)
SYSTEM_TOKENS = 34  # are read, and not told to the denoiser
END, END_TOKENS = "<|im_end|>\n<|im_start|>assistant\n", 5
# Where the config is still to be fetched.
PUBLISHED = {"num_layers": 28, "num_attention_heads": 48, "attention_head_dim": 128}
PUBLISHED |= {"num_text_layers": 12, "text_hidden_dim": 2560, "in_channels": 64}
NAMES = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "wo": "to_out.0", "gate": "to_gate"}
LAYERS = {
    f"blocks.{{}}.attn.{own}": (f"transformer_blocks.{{}}.attn.{name}",)
    for own, name in NAMES.items()
}
MARKS = ("txtfusion.projector.weight", "text_fusion.projector.weight")
RELATIVES = {"edit": "a Krea 2 for editing"}
TURBO_SHIFT = 3.158193  # e to the 1.15, whatever the size


def read_layers(layers: int) -> list[int]:
    """Name the layers of the text encoder that are read: every third, from the second on."""
    return list(range(2, layers, 3))


def refuse(headers: Headers, family: Family) -> str | None:
    """Name a relative that reads other layers, or is given pictures."""
    named = headers.index.get("text_encoder_select_layers")
    if named is not None and named != read_layers(max(named) + 1):
        return "a relative of Krea 2 that reads other layers of its text encoder"
    return files.refuse_relative(headers, family, RELATIVES)


def measure(parts: Mapping[Part, Located]) -> Record:
    """Take the sizes that are told of a model from its configs."""
    config, vae = PUBLISHED | parts[TRANSFORMER].config, parts[VAE]
    factor = 2 ** len(vae.config.get("temperal_downsample", (False, True, True)))
    texts = int(config["num_text_layers"]) * int(config["text_hidden_dim"])
    blocks = int(config["num_layers"])
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    return {
        "vae_scale_factor": factor,
        "vae_width": vae.shapes.get("decoder.conv_out.weight", (3, 96))[1],
        "pixel_step": 2 * factor,
        "kept": flow.Kept(blocks, width, 22.5),
        "latent_channels": int(config["in_channels"]) // 4,
        "tokens": 512,
        "text_width": texts,
    }


def tokenize(tokenizers: Sequence[Any], text: str, base: BaseModel) -> Conditioning:
    """Ask for a description, as the model was taught; what is said counts, not its length."""
    (tokenizer,) = tokenizers
    room = base.tokens + SYSTEM_TOKENS - END_TOKENS
    begin = flow.tokens_of(tokenizer, SYSTEM + text, room)
    end = flow.tokens_of(tokenizer, END, END_TOKENS)
    return Conditioning(input_ids=torch.cat([begin, end], dim=1))


def read_text(encoders: Sequence[Any], tokens: Sequence[Tensor]) -> Conditioning:
    """Take what many layers say of the caption."""
    (encoder,), (ids,) = encoders, tokens
    said = encoder(ids, output_hidden_states=True, use_cache=False).hidden_states
    chosen = [said[layer] for layer in read_layers(len(said))]
    return flow.with_mask(torch.stack(chosen, dim=2)[:, SYSTEM_TOKENS:])


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Let the VAE see one picture, as a film of one frame."""
    found = vae.encode(pixels.unsqueeze(2)).latent_dist
    return torch.cat([found.mean, found.std]).squeeze(2)


def normal(config: Record, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Tell centre and spread of each channel of latents."""
    rows = (config["latents_mean"], config["latents_std"])
    centre, spread = (latents.new_tensor(row).view(1, -1, 1, 1) for row in rows)
    return centre, spread


def scale(latents: Tensor, vae: Record) -> Tensor:
    """Give latents the scale and the centre that the denoiser knows."""
    centre, spread = normal(vae, latents)
    return (latents - centre) / spread


def decode(vae: Any, latents: Tensor, tile: int | None) -> Tensor:
    """Turn what the denoiser sees into pixels."""
    if tile:
        vae.enable_tiling()
    centre, spread = normal(vae.config, latents)
    pixels: Tensor = vae.decode((latents * spread + centre).unsqueeze(2)).sample.squeeze(2)
    return pixels


def predict(denoiser: Any, noisy: Tensor, sigmas: Tensor, told: Conditioning) -> Tensor:
    """Ask for the direction to the noise; a mask is told only where it says something."""
    text, mask, (high, wide) = told["prompt_embeds"], told["prompt_mask"], noisy.shape[-2:]
    words = torch.zeros(text.shape[1], 3, device=text.device)
    (answer,) = denoiser(
        hidden_states=patches.pack(noisy),
        encoder_hidden_states=text,
        timestep=sigmas,
        position_ids=torch.cat([words, patches.places(high // 2, wide // 2, 3, noisy.device)]),
        encoder_attention_mask=None if len(text) == 1 or mask.all() else mask,
        return_dict=False,
    )
    return patches.unpack(answer, high, wide)


def preview_shift(base: BaseModel, tokens: int, _: int) -> float:
    """Give the shift of the published sampler, which Turbo has fixed."""
    line = flow.shift_line(tokens, (256, 0.5), (6400, 1.15))
    return TURBO_SHIFT if base.distilled else line


TRANSFORMER = dataclasses.replace(
    flow.TRANSFORMER,
    class_name="Krea2Transformer2DModel",
    limits={
        "num_layers": (1, 256),
        "num_attention_heads": (1, 1024),
        "attention_head_dim": (1, 1024),
        "num_text_layers": (1, 128),
        "text_hidden_dim": (1, 65_536),
        "in_channels": (64, 64),
    },
    # Their numbers are counted from one, and lose what half precision has no room for.
    exact=r"(.*\.)?(norm|norm1|norm2|norm_q|norm_k)\.weight|.*\.scale",
    library_names=functools.partial(files.diffusers_names, LAYERS),
    targets=r"transformer_blocks\.\d+\.attn\.to_(q|k|v|gate|out\.0)",
)
VAE = Part(
    folder="vae",
    library="diffusers",
    class_name="AutoencoderKLQwenImage",
    stem="diffusion_pytorch_model",
    limits={"z_dim": (16, 16), "base_dim": (1, 16_384)},
)
QWEN3_VL = Part(
    folder="text_encoder",
    library="transformers",
    class_name="Qwen3VLTextModel",
    stem="model",
    inner="language_model.",
    unread_layers=1,
    cut=True,
    packed=flow.BLOCKS,
)
FAMILY = Family(
    name="krea2",
    title="Krea 2",
    native_resolution=1024,
    denoiser=TRANSFORMER,
    vae=VAE,
    text_encoders=(QWEN3_VL,),
    tokenizers=(flow.QWEN_TOKENIZER,),
    sampler=flow.SAMPLER,
    reference=lambda _: "krea/Krea-2-Raw",
    recognises=lambda headers, _: (
        files.is_class(headers, TRANSFORMER.class_name)
        or bool(files.shape_of(headers.shapes(TRANSFORMER), *MARKS))
    ),
    refuses=refuse,
    states=lambda _, __: flow.FLOW_STATES,
    distilled=lambda headers, _: (
        bool(headers.index.get("is_distilled")) or files.is_called(headers, "turbo")
    ),
    measure=measure,
    tokenize=tokenize,
    read_text=read_text,
    text_precision="bf16",
    encode=encode,
    scale=scale,
    decode=decode,
    objectives=(flow.flow_matching(lambda _: 2.5, preview_shift),),
    predict=predict,
    previews=((28, 5.5), (8, 1.0)),
    precisions=frozenset({"bf16", "nf4"}),
    ragged=True,
    headers={"flow": files.called("Krea-2")},
    write_lora=functools.partial(files.write_published, LAYERS),
)
