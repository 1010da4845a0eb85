"""Files of transformers: what tells a base model, and how LoRA files name what was learned."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from train_lora import DIFFUSERS, Headers, Tensors

if TYPE_CHECKING:
    from torch import Tensor


def is_class(headers: Headers, name: str) -> bool:
    """Tell whether a folder's denoiser is of a class."""
    return headers.configs.get("transformer", {}).get("_class_name") == name


def is_called(headers: Headers, word: str) -> bool:
    """Tell whether a single file's name has a word, where nothing in it tells as much."""
    return bool(headers.weights) and word in headers.path.stem.lower()


def refuse_packed(headers: Headers) -> str | None:
    """Name a file whose numbers mean nothing without scales that are read elsewhere."""
    if headers.dtypes & {"F8_E4M3", "F8_E5M2", "I8", "U8", "F4"}:
        return "a quantised file (fp8, int8 or fp4); take the one in bf16"
    marks = ("weight_scale", "scale_weight", "comfy_quant", "scaled_fp8")
    if any(name.endswith(marks) for name in headers.weights):
        return "a quantised file with scales; take the one in bf16"
    return None


Pairs = dict[str, tuple["Tensor", "Tensor"]]  # A and B of each layer, by its name in the denoiser


def gather_pairs(matrices: Mapping[str, Tensor], strength: float) -> Pairs:
    """Put A and B together; B takes the strength in, as not every reader knows alphas here."""
    found = re.compile(r"transformer\.(.+)\.lora_A\..*weight")
    pairs: Pairs = {}
    for name, down in matrices.items():
        if match := found.fullmatch(name):
            up = matrices[name.replace(".lora_A.", ".lora_B.")]
            pairs[match[1]] = down.detach(), up.detach() * strength
    return pairs


def peft_names(pairs: Pairs, prefix: str) -> Tensors:
    """Name the matrices as PEFT does."""
    return {
        f"{prefix}{module}.lora_{side}.weight": matrix
        for module, pair in pairs.items()
        for side, matrix in zip("AB", pair, strict=True)
    }


def called(architecture: str) -> dict[str, str]:
    """Tell a model's kind in the words of LoRA files."""
    return {"modelspec.architecture": f"{architecture}/lora", "modelspec.implementation": DIFFUSERS}
