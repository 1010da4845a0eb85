"""FLUX.1 dev and schnell: T5 reads the text, CLIP sums it up, and dev is told a guidance."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from train_lora import (
    CLIP,
    TOKENIZER,
    BaseModel,
    Conditioning,
    Family,
    Headers,
    Located,
    Part,
    Record,
    encode_kl,
)

from . import files, flow, patches

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from train_lora import torch  # which is imported when it is asked for

LAYERS = {
    "double_blocks.{}.img_attn.qkv": (
        "transformer_blocks.{}.attn.to_q",
        "transformer_blocks.{}.attn.to_k",
        "transformer_blocks.{}.attn.to_v",
    ),
    "double_blocks.{}.txt_attn.qkv": (
        "transformer_blocks.{}.attn.add_q_proj",
        "transformer_blocks.{}.attn.add_k_proj",
        "transformer_blocks.{}.attn.add_v_proj",
    ),
    "double_blocks.{}.img_attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
    "double_blocks.{}.txt_attn.proj": ("transformer_blocks.{}.attn.to_add_out",),
    "single_blocks.{}.linear1": (
        "single_transformer_blocks.{}.attn.to_q",
        "single_transformer_blocks.{}.attn.to_k",
        "single_transformer_blocks.{}.attn.to_v",
        # Which is four times as wide.
        *(f"single_transformer_blocks.{{}}.proj_mlp.{quarter}" for quarter in range(4)),
    ),
}
# Which others have in part.
MARKS = {"context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"}
MARKS |= {"single_transformer_blocks.0.proj_mlp.weight"}
GUIDANCE = ("guidance_in.in_layer.weight", "time_text_embed.guidance_embedder.linear_1.weight")
RELATIVES = {"kontext": "FLUX.1 Kontext", "384": "FLUX.1 Fill", "128": "FLUX.1 Canny or Depth"}
CLIP_TOKENS = 77
# Of dev, where the config is still to be fetched.
PUBLISHED = {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24}
PUBLISHED |= {"attention_head_dim": 128, "joint_attention_dim": 4096, "in_channels": 64}
PUBLISHED |= {"guidance_embeds": True}


def recognise(headers: Headers, _: Family) -> bool:
    """Tell FLUX.1 from FLUX.2, whose blocks share their modulation, and from Chroma."""
    shapes = headers.shapes(TRANSFORMER)
    others = ("double_stream_modulation", "distilled_guidance_layer")
    foreign = any(name.startswith(others) for name in shapes)
    known = "double_blocks.0.img_attn.norm.key_norm.scale" in shapes or shapes.keys() >= MARKS
    return (known and not foreign) or files.is_class(headers, TRANSFORMER.class_name)


def is_dev(headers: Headers) -> bool:
    """Tell dev from schnell, which is told no guidance."""
    config = headers.configs.get("transformer", {})
    inside = files.shape_of(headers.shapes(TRANSFORMER), *GUIDANCE)
    return bool(config.get("guidance_embeds", inside))


def measure(parts: Mapping[Part, Located]) -> Record:
    """Take the sizes that are told of a model from its configs."""
    config = PUBLISHED | parts[TRANSFORMER].config
    tokens = 512 if config.get("guidance_embeds") else 256
    blocks = int(config["num_layers"]) + int(config["num_single_layers"])
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    return patches.vae_sizes(parts[patches.VAE]) | {
        "kept": flow.Kept(blocks, width, 16, tokens),
        "latent_channels": int(config["in_channels"]) // 4,
        "tokens": tokens,
        "text_width": int(config["joint_attention_dim"]),
    }


def tokenize(tokenizers: Sequence[Any], text: str, base: BaseModel) -> Conditioning:
    """Turn a text into as many token ids as there is room for, for both encoders."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    pairs = zip(tokenizers, (CLIP_TOKENS, base.tokens), strict=True)
    short, long = (each(text, max_length=most, **options).input_ids for each, most in pairs)
    return Conditioning(input_ids_1=short, input_ids_2=long)


def read_text(encoders: Sequence[Any], tokens: Sequence[Tensor]) -> Conditioning:
    """Take CLIP's sum of the text and T5's last layer, filled places included."""
    clip, t5 = encoders
    short, long = tokens
    pooled = clip(short).pooler_output
    return Conditioning(prompt_embeds=t5(long).last_hidden_state, pooled_prompt_embeds=pooled)


def predict(denoiser: Any, noisy: Tensor, sigmas: Tensor, told: Conditioning) -> Tensor:
    """Ask for the direction to the noise; while training, dev is asked without guidance."""
    text, (high, wide) = told["prompt_embeds"], noisy.shape[-2:]
    guidance = told.get("guidance", torch.ones_like(sigmas))
    (answer,) = denoiser(
        hidden_states=patches.pack(noisy),
        timestep=sigmas,
        guidance=guidance.float() if denoiser.config.guidance_embeds else None,
        pooled_projections=told["pooled_prompt_embeds"],
        encoder_hidden_states=text,
        txt_ids=torch.zeros(text.shape[1], 3, device=text.device),
        img_ids=patches.places(high // 2, wide // 2, 3, noisy.device),
        return_dict=False,
    )
    return patches.unpack(answer, high, wide)


TRANSFORMER = dataclasses.replace(
    flow.TRANSFORMER,
    class_name="FluxTransformer2DModel",
    limits={
        "num_layers": (1, 256),
        "num_single_layers": (1, 256),
        "num_attention_heads": (1, 1024),
        "attention_head_dim": (1, 1024),
        "joint_attention_dim": (1, 262_144),
        "in_channels": (4, 1024),
    },
    library_names=functools.partial(files.diffusers_names, LAYERS),
    targets=r"(single_)?transformer_blocks\.\d+\.attn\."
    r"(to_(q|k|v|out\.0)|add_(q|k|v)_proj|to_add_out)",
)
CLIP_L = dataclasses.replace(CLIP, original=None, publish=None, targets="", lora_prefix="")
T5 = Part(
    folder="text_encoder_2",
    library="transformers",
    class_name="T5EncoderModel",
    stem="model",
    limits={"num_layers": (1, 256), "d_model": (1, 65_536)},
    packed=flow.BLOCKS,
)
T5_TOKENIZER = Part(
    folder="tokenizer_2",
    library="transformers",
    class_name="T5TokenizerFast",
    needs=("tokenizer.json",),
)
FAMILY = Family(
    name="flux1",
    title="FLUX.1",
    native_resolution=1024,
    denoiser=TRANSFORMER,
    vae=patches.VAE,
    text_encoders=(CLIP_L, T5),
    tokenizers=(TOKENIZER, T5_TOKENIZER),
    sampler=flow.SAMPLER,
    reference=lambda headers: f"black-forest-labs/FLUX.1-{'dev' if is_dev(headers) else 'schnell'}",
    recognises=recognise,
    refuses=lambda headers, family: files.refuse_relative(headers, family, RELATIVES),
    states=lambda _, __: flow.FLOW_STATES,
    distilled=lambda headers, _: not is_dev(headers),
    measure=measure,
    tokenize=tokenize,
    read_text=read_text,
    text_precision="bf16",
    encode=encode_kl,
    scale=patches.scale_kl,
    decode=patches.decode_shifted_kl,
    objectives=(flow.flow_matching(flow.flux_shift, flow.scheduler_shift),),
    predict=predict,
    previews=((28, 3.5), (4, 1.0)),
    embedded_guidance=True,
    precisions=frozenset({"bf16", "nf4"}),
    headers={"flow": files.called("flux-1-dev")},
    write_lora=lambda matrices, strength: files.peft_names(
        files.gather_pairs(matrices, strength), "transformer."
    ),
)
