"""Z-Image and Z-Image-Turbo: one kind of block, one text encoder, no guidance inside."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from train_lora import BaseModel, Conditioning, Family, Headers, Located, Part, Record, encode_kl

from . import files, flow, patches

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from train_lora import torch  # which is imported when it is asked for

LUMINA_WIDTH = 2304
LAYERS = {
    "{}.attention.qkv": ("{}.attention.to_q", "{}.attention.to_k", "{}.attention.to_v"),
    "{}.attention.out": ("{}.attention.to_out.0",),
}
# Where the config is still to be fetched.
PUBLISHED = {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "in_channels": 16}
PUBLISHED |= {"cap_feat_dim": 2560}
RELATIVES = {"edit": "Z-Image-Edit", "omni": "Z-Image-Omni"}
TURBO_SHIFT = 3.0  # of its sampler, where the base has 6: nothing else tells them apart


def recognise(headers: Headers, _: Family) -> bool:
    """Tell Z-Image from its relative Lumina 2, which is narrower."""
    shapes, norm = headers.shapes(TRANSFORMER), "noise_refiner.0.attention.{}.weight"
    known = files.shape_of(shapes, norm.format("k_norm"), norm.format("norm_k"))
    caption = shapes.get("cap_embedder.1.weight", (LUMINA_WIDTH,))
    in_file = bool(known) and caption[0] != LUMINA_WIDTH
    controls = "control_all_x_embedder.2-1.weight" in shapes  # a file of these alone
    return in_file or controls or files.is_class(headers, TRANSFORMER.class_name)


def is_turbo(headers: Headers, sampler: Record) -> bool:
    """Tell Turbo by its sampler, or by the name of a file, which may stand beside the base's."""
    return sampler.get("shift") == TURBO_SHIFT or files.is_called(headers, "turbo")


def measure(parts: Mapping[Part, Located]) -> Record:
    """Take the sizes that are told of a model from its configs."""
    config = PUBLISHED | parts[TRANSFORMER].config
    blocks = int(config["n_layers"]) + 2 * int(config["n_refiner_layers"])
    return patches.vae_sizes(parts[patches.VAE]) | {
        "kept": flow.Kept(blocks, int(config["dim"]), 32),
        "latent_channels": int(config["in_channels"]),
        "tokens": 512,
        "text_width": int(config["cap_feat_dim"]),
    }


def tokenize(tokenizers: Sequence[Any], text: str, base: BaseModel) -> Conditioning:
    """Put the caption as a question that is to be thought about, as the model was taught."""
    (tokenizer,) = tokenizers
    asked = flow.as_chat(tokenizer, text, thinking=True)
    return Conditioning(input_ids=flow.tokens_of(tokenizer, asked, base.tokens))


def read_text(encoders: Sequence[Any], tokens: Sequence[Tensor]) -> Conditioning:
    """Take what the last layer but one says, which is the last that is loaded."""
    return flow.with_mask(encoders[0](tokens[0], use_cache=False).last_hidden_state)


def predict(denoiser: Any, noisy: Tensor, sigmas: Tensor, told: Conditioning) -> Tensor:
    """Ask for the direction to the noise; this denoiser counts time, and looks, the other way."""
    pairs = zip(told["prompt_embeds"], told["prompt_mask"], strict=True)
    texts = [text[mask] for text, mask in pairs]
    pictures = list(noisy.unsqueeze(2).unbind())  # each with a time of one frame
    (answers,) = denoiser(pictures, 1 - sigmas, texts, return_dict=False)
    return -torch.stack(answers).squeeze(2)


TRANSFORMER = dataclasses.replace(
    flow.TRANSFORMER,
    class_name="ZImageTransformer2DModel",
    limits={
        "dim": (1, 65_536),
        "n_layers": (1, 256),
        "n_refiner_layers": (1, 64),
        "in_channels": (16, 16),
        "cap_feat_dim": (1, 65_536),
    },
    library_names=functools.partial(files.diffusers_names, LAYERS),
    targets=r".*(layers|noise_refiner|context_refiner)\.\d+\.attention\.to_(q|k|v|out\.0)",
)
FAMILY = Family(
    name="z_image",
    title="Z-Image",
    native_resolution=1024,
    denoiser=TRANSFORMER,
    vae=patches.VAE,
    text_encoders=(flow.QWEN3,),
    tokenizers=(flow.QWEN_TOKENIZER,),
    sampler=flow.SAMPLER,
    reference=lambda headers: (
        "Tongyi-MAI/Z-Image-Turbo" if is_turbo(headers, {}) else "Tongyi-MAI/Z-Image"
    ),
    recognises=recognise,
    refuses=lambda headers, family: files.refuse_relative(headers, family, RELATIVES),
    states=lambda _, __: flow.FLOW_STATES,
    distilled=is_turbo,
    measure=measure,
    tokenize=tokenize,
    read_text=read_text,
    text_precision="bf16",
    encode=encode_kl,
    scale=patches.scale_kl,
    decode=patches.decode_shifted_kl,
    objectives=(flow.flow_matching(lambda _: 2.0, flow.scheduler_shift),),
    predict=predict,
    previews=((28, 4.0), (9, 1.0)),
    precisions=frozenset({"bf16", "nf4"}),
    ragged=True,
    headers={"flow": files.called("Z-Image")},
    write_lora=functools.partial(files.write_published, {}),  # q, k and v stay apart there
)
