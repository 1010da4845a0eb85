"""Files of transformers: what tells a base model, and how its layers are called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from train_lora import DIFFUSERS, Family, Headers, Shape, Shapes, Tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from train_lora import torch  # which is imported when it is asked for

# --- base models -------------------------------------------------------------------------------

# The layers that take tokens in and give them out, in published files and in diffusers' own.
FIRST = ("x_embedder.weight", "img_in.weight", "first.weight", "all_x_embedder.2-1.weight")
LAST = (
    "proj_out.weight",
    "final_layer.linear.weight",
    "last.linear.weight",
    "all_final_layer.2-1.linear.weight",
)
ADDED = {"control": "a ControlNet", "siglip": "Z-Image-Omni"}


def is_class(headers: Headers, name: str) -> bool:
    """Tell whether a folder's denoiser is of a class."""
    return headers.configs.get("transformer", {}).get("_class_name") == name


def is_called(headers: Headers, word: str) -> bool:
    """Tell whether a single file's name has a word, where nothing in it tells as much."""
    return bool(headers.weights) and word in headers.path.stem.lower()


def shape_of(shapes: Shapes, *names: str) -> Shape:
    """Look up a weight that has another name in each layout."""
    return next((shapes[name] for name in names if name in shapes), ())


def refuse_relative(headers: Headers, family: Family, kinds: Mapping[str, str]) -> str | None:
    """Name what is given more than noise and text, with what to take instead; or half a file.

    Kinds are told by a word of a name, or by how many numbers of a token are taken in.
    """
    shapes = headers.shapes(family.denoiser)
    kind = named(headers, kinds) or added(shapes) or taking_more(headers, shapes, kinds)
    return f"{kind}; take {family.reference(headers)}" if kind else refuse_file(headers)


def named(headers: Headers, kinds: Mapping[str, str]) -> str | None:
    """Name what looks like its base by a word of a file's name, or of its folder's pipeline."""
    pipeline = str(headers.index.get("_class_name", "")).lower()
    inside = re.split("[^a-z]+", headers.path.stem.lower()) if headers.weights else []
    return next((kinds[word] for word in kinds if word in inside or word in pipeline), None)


def added(shapes: Shapes) -> str | None:
    """Name what has networks for pictures by what their weights' names begin with."""
    return next((ADDED[mark] for mark in ADDED for name in shapes if name.startswith(mark)), None)


def taking_more(headers: Headers, shapes: Shapes, kinds: Mapping[str, str]) -> str | None:
    """Name what takes in more numbers of a token than it gives out."""
    config = headers.configs.get("transformer", {})
    first, last = shape_of(shapes, *FIRST), shape_of(shapes, *LAST)
    taken = first[-1] if first else config.get("in_channels")
    given = last[0] if last else config.get("out_channels")
    if taken is None or given is None or taken == given:
        return None
    return kinds.get(str(taken), "a model that is given a picture")


def refuse_file(headers: Headers) -> str | None:
    """Name a file whose numbers mean nothing without what is read elsewhere."""
    if headers.weights and re.search(r"-\d{5}-of-\d{5}$", headers.path.stem):
        return "one of several files of a model; take the folder of all"
    if headers.dtypes & {"F8_E4M3", "F8_E5M2", "I8", "U8", "F4"}:
        return "a quantised file (fp8, int8 or fp4); take the one in bf16"
    marks = ("weight_scale", "scale_weight", "comfy_quant", "scaled_fp8")
    if any(name.endswith(marks) for name in headers.weights):
        return "a quantised file with scales; take the one in bf16"
    return None


# --- names of layers ---------------------------------------------------------------------------

# The layers of published files that diffusers calls otherwise, and how; some are several there,
# of as many rows each. Braces stand for what is the same.
Layers = Mapping[str, tuple[str, ...]]
Pairs = dict[str, tuple["Tensor", "Tensor"]]  # A and B of each layer, by its name in the denoiser


def pattern(template: str) -> re.Pattern[str]:
    """Find what stands for the braces."""
    return re.compile(re.escape(template).replace(r"\{\}", "(.+)"))


def diffusers_names(layers: Layers, layer: str) -> tuple[str, ...]:
    """Name what diffusers makes of a published layer; the others keep their names."""
    for template, names in layers.items():
        if match := pattern(template).fullmatch(layer):
            return tuple(name.format(match[1]) for name in names)
    return (layer,)


def published(pairs: Pairs, layers: Layers) -> Pairs:
    """Name pairs as published files do; where several are one layer there, they become one."""
    for template, names in layers.items():
        for layer in list(pairs):
            if match := pattern(names[0]).fullmatch(layer):
                several = [pairs.pop(name.format(match[1])) for name in names]
                down, up = zip(*several, strict=True)
                pairs[template.format(match[1])] = torch.cat(down), torch.block_diag(*up)
    return pairs


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


def write_published(layers: Layers, matrices: Mapping[str, Tensor], strength: float) -> Tensors:
    """Name the matrices as published files do, where ComfyUI and others look for them."""
    return peft_names(published(gather_pairs(matrices, strength), layers), "diffusion_model.")


def called(architecture: str) -> dict[str, str]:
    """Tell a model's kind in the words of LoRA files."""
    return {"modelspec.architecture": f"{architecture}/lora", "modelspec.implementation": DIFFUSERS}
