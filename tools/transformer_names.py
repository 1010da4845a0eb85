"""LoRA files of the transformer families, in the names that diffusers has for their layers.

Every program names these layers in its own way, and joins some of them. diffusers reads all of
that, so its own readers are asked; the trainer's families write.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import diffusers.loaders.lora_pipeline as readers

import train_lora
from train_lora import Family, Tensors

if TYPE_CHECKING:
    import torch

READERS: dict[str, Any] = {
    "z_image": readers.ZImageLoraLoaderMixin,
    "flux2_klein": readers.Flux2LoraLoaderMixin,
    "flux1": readers.FluxLoraLoaderMixin,
    "krea2": readers.Krea2LoraLoaderMixin,
}
# How layers are called that no UNet has.
MARKS = re.compile(
    r"^(transformer|diffusion_model)\.|^base_model\.model\.(layers|double_blocks|single_blocks)\."
    r"|^lora_unet_(layers|double_blocks|single_blocks|transformer_blocks)_"
)
# Strengths beside layers that have diffusers' names: its readers drop them, or rename the layers.
OWN_ALPHA = re.compile(r"(transformer|text_encoder)\..+\.alpha")


@functools.cache
def families() -> list[Family]:
    """List the families that the trainer knows here."""
    return list(train_lora.all_families().values())


def is_transformer(tensors: Mapping[str, Any]) -> bool:
    """Tell whether a file is for a denoiser that is a transformer."""
    return any(MARKS.match(key) for key in tensors)


def family_of(header: Mapping[str, str]) -> Family | None:
    """Find the family that a header names, in the words that many programs write."""
    said = header.get("modelspec.architecture", "").lower()
    return next(
        (
            family
            for family in families()
            for words in family.headers.values()
            if said and words["modelspec.architecture"].lower() == said
        ),
        None,
    )


def in_diffusers_names(tensors: Tensors, family: Family) -> Tensors:
    """Give each layer the name that it has in diffusers; alphas go into it, or stay beside it."""
    alphas = {key: value for key, value in tensors.items() if OWN_ALPHA.fullmatch(key)}
    others = {key: value for key, value in tensors.items() if key not in alphas}
    return {**READERS[family.name].lora_state_dict(others), **alphas}


def in_own_names(matrices: Tensors, family: Family) -> dict[str, torch.Tensor]:
    """Name the matrices of diffusers' layers as the family's files do."""
    assert family.write_lora  # every family of the table above has one
    return {key: matrix.contiguous() for key, matrix in family.write_lora(matrices, 1.0).items()}
