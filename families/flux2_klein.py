"""FLUX.2 klein, 4B and 9B: the smallest of these; its latents are normalised by the VAE itself."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from train_lora import BaseModel, Conditioning, Family, Headers, Located, Part, Record, encode_kl

from . import files, flow, patches

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from train_lora import torch  # which is imported when it is asked for

READ_LAYERS = (9, 18, 27)  # of the text encoder; what is above them is not loaded
# Of the 4B, where the config is still to be fetched.
PUBLISHED = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24}
PUBLISHED |= {"attention_head_dim": 128, "joint_attention_dim": 7680, "in_channels": 128}
LAYERS = {
    "double_blocks.{}.img_attn.qkv": (
        "transformer_blocks.{}.attn.to_q",
        "transformer_blocks.{}.attn.to_k",
        "transformer_blocks.{}.attn.to_v",
    ),
    "double_blocks.{}.img_attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
    "single_blocks.{}.linear1": ("single_transformer_blocks.{}.attn.to_qkv_mlp_proj",),
    "single_blocks.{}.linear2": ("single_transformer_blocks.{}.attn.to_out",),
}
MARKS = tuple(f"double_stream_modulation_img.{kind}.weight" for kind in ("lin", "linear"))
GUIDANCE = ("guidance_in.in_layer.weight", "time_guidance_embed.guidance_embedder.linear_1.weight")
RELATIVES = {"kv": "FLUX.2 klein KV"}
WIDTH_9B = 12_288  # of its texts, where the 4B has 7,680 and FLUX.2 dev 15,360


def text_columns(headers: Headers) -> int:
    """Tell how wide the texts are that a denoiser reads."""
    config = headers.configs.get("transformer", {})
    names = ("txt_in.weight", "context_embedder.weight")
    columns = files.shape_of(headers.shapes(TRANSFORMER), *names) or (0,)
    return int(config.get("joint_attention_dim", columns[-1]))


def refuse(headers: Headers, family: Family) -> str | None:
    """Name relatives that would need other text encoders, or are given pictures."""
    config, shapes = headers.configs.get("transformer", {}), headers.shapes(TRANSFORMER)
    if config.get("guidance_embeds") or files.shape_of(shapes, *GUIDANCE):
        return f"FLUX.2 dev; take {reference(headers)}"
    return files.refuse_relative(headers, family, RELATIVES)


def reference(headers: Headers) -> str:
    """Tell who has the text encoder and the VAE of a file."""
    size = "9B" if text_columns(headers) == WIDTH_9B else "4B"
    return f"black-forest-labs/FLUX.2-klein-base-{size}"


def is_distilled(headers: Headers, _: Record) -> bool:
    """Tell by the index of a folder, or by the name of a file: the weights look alike."""
    named = files.is_called(headers, "klein") and not files.is_called(headers, "base")
    return named or bool(headers.index.get("is_distilled"))


def measure(parts: Mapping[Part, Located]) -> Record:
    """Take the sizes that are told of a model from its configs."""
    config = PUBLISHED | parts[TRANSFORMER].config
    sizes = patches.vae_sizes(parts[VAE])
    blocks = int(config["num_layers"]) + int(config["num_single_layers"])
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    return sizes | {
        "vae_scale_factor": sizes["pixel_step"],  # a latent here is four of the VAE's
        "kept": flow.Kept(blocks, width, 25, patch=1),
        "latent_channels": int(config["in_channels"]),
        "tokens": 512,
        "text_width": int(config["joint_attention_dim"]),
    }


def tokenize(tokenizers: Sequence[Any], text: str, base: BaseModel) -> Conditioning:
    """Put the caption as a question that is to be answered at once, filled up: it is all read."""
    (tokenizer,) = tokenizers
    asked = flow.as_chat(tokenizer, text, thinking=False)
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = tokenizer(asked, max_length=base.tokens, **options)
    return Conditioning(input_ids=ids.input_ids, attention_mask=ids.attention_mask)


def read_text(encoders: Sequence[Any], tokens: Sequence[Tensor]) -> Conditioning:
    """Take what three layers say, side by side."""
    ids, mask = tokens
    options = {"output_hidden_states": True, "use_cache": False}
    said = encoders[0](ids, attention_mask=mask, **options).hidden_states
    return Conditioning(prompt_embeds=torch.cat([said[layer] for layer in READ_LAYERS], dim=-1))


def remembered(vae: Any) -> tuple[Tensor, Tensor]:
    """Tell centre and spread that the VAE remembers of its latents."""
    spread = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    return vae.bn.running_mean.view(1, -1, 1, 1), spread.view(1, -1, 1, 1)


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Let the VAE see one picture; four of its latents are one here."""
    mean, deviation = encode_kl(vae, pixels).chunk(2)
    centre, spread = remembered(vae)
    return torch.cat([(join(mean) - centre) / spread, join(deviation) / spread])


def decode(vae: Any, latents: Tensor, tile: int | None) -> Tensor:
    """Turn what the denoiser sees into pixels."""
    if tile:
        vae.enable_tiling()
    centre, spread = remembered(vae)
    latents = latents * spread + centre
    batch, channels, high, wide = latents.shape
    cut = latents.view(batch, channels // 4, 2, 2, high, wide).permute(0, 1, 4, 2, 5, 3)
    pixels: Tensor = vae.decode(cut.reshape(batch, channels // 4, 2 * high, 2 * wide)).sample
    return pixels


def join(latents: Tensor) -> Tensor:
    """Make channels of 2 × 2 latents."""
    batch, channels, high, wide = latents.shape
    cut = latents.view(batch, channels, high // 2, 2, wide // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return cut.reshape(batch, 4 * channels, high // 2, wide // 2)


def predict(denoiser: Any, noisy: Tensor, sigmas: Tensor, told: Conditioning) -> Tensor:
    """Ask for the direction to the noise; each token is told where it stands."""
    text, (high, wide) = told["prompt_embeds"], noisy.shape[-2:]
    order = torch.zeros(text.shape[1], 4, device=text.device)
    order[:, 3] = torch.arange(text.shape[1], device=text.device)
    (answer,) = denoiser(
        hidden_states=noisy.flatten(2).transpose(1, 2),
        timestep=sigmas,
        guidance=None,
        encoder_hidden_states=text,
        txt_ids=order,
        img_ids=patches.places(high, wide, 4, noisy.device),
        return_dict=False,
    )
    directions: Tensor = answer.transpose(1, 2).unflatten(2, (high, wide))
    return directions


def preview_shift(_: BaseModel, tokens: int, steps: int) -> float:
    """Give the published shift, fitted to ladders of 10 and of 200 steps."""
    long = 0.00016927 * tokens + 0.45666666
    short = 8.73809524e-05 * tokens + 1.89833333
    return math.exp(long if tokens > 4300 else long + (short - long) * (200 - steps) / 190)


TRANSFORMER = dataclasses.replace(
    flow.TRANSFORMER,
    class_name="Flux2Transformer2DModel",
    limits={
        "num_layers": (1, 256),
        "num_single_layers": (1, 256),
        "num_attention_heads": (1, 1024),
        "attention_head_dim": (1, 1024),
        "joint_attention_dim": (1, 262_144),
        "in_channels": (4, 1024),
    },
    library_names=functools.partial(files.diffusers_names, LAYERS),
    targets=r"transformer_blocks\.\d+\.attn\.(to_(q|k|v)|to_out\.0)"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)",
)
VAE = Part(
    folder="vae",
    library="diffusers",
    class_name="AutoencoderKLFlux2",
    stem="diffusion_pytorch_model",
    limits={"latent_channels": (1, 256), "block_out_channels": (1, 16_384)},
)
QWEN3 = dataclasses.replace(flow.QWEN3, unread_layers=36 - max(READ_LAYERS))
FAMILY = Family(
    name="flux2_klein",
    title="FLUX.2 klein",
    native_resolution=1024,
    denoiser=TRANSFORMER,
    vae=VAE,
    text_encoders=(QWEN3,),
    tokenizers=(flow.QWEN_TOKENIZER,),
    sampler=flow.SAMPLER,
    reference=reference,
    recognises=lambda headers, _: (
        files.is_class(headers, TRANSFORMER.class_name)
        or bool(files.shape_of(headers.shapes(TRANSFORMER), *MARKS))
    ),
    refuses=refuse,
    states=lambda _, __: flow.FLOW_STATES,
    distilled=is_distilled,
    measure=measure,
    tokenize=tokenize,
    read_text=read_text,
    text_precision="bf16",
    encode=encode,
    scale=lambda latents, _: latents,
    decode=decode,
    objectives=(flow.flow_matching(flow.flux_shift, preview_shift, patch=1),),
    predict=predict,
    previews=((50, 4.0), (4, 1.0)),
    precisions=frozenset({"bf16", "nf4"}),
    headers={"flow": files.called("Flux.2-klein")},
    write_lora=functools.partial(files.write_published, LAYERS),
)
