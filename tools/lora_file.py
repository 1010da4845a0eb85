"""A LoRA file of any naming as one thing: what it adds to which module, and back to a file.

A layer adds `scale * up @ down` to the weight of its module. Modules are called as diffusers calls
them, in dotted form, whatever the file called them, so that files of all programs can be compared,
joined and written for any reader.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

import train_lora
from tools import transformer_names
from tools.program import refuse
from train_lora import Family, Phase, Tensors, TrainError


class Module(NamedTuple):
    """Where a layer stands: the folder of a network, such as `unet`, and the name inside it."""

    network: str
    name: str


@dataclass(frozen=True)
class Layer:
    """What a LoRA adds to one module: `scale * up @ down`, [out, rank] and [rank, in, …]."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Count the directions it has."""
        return len(self.down)

    def delta(self) -> torch.Tensor:
        """Multiply it out in full precision, [out, in, …]."""
        flat = self.up.double().flatten(1) @ self.down.double().flatten(1)
        return self.scale * flat.view(len(self.up), *self.down.shape[1:])

    def norm(self) -> float:
        """Measure the length of what it adds, without multiplying it out."""
        up, down = self.up.double().flatten(1), self.down.double().flatten(1)
        square = ((up.mT @ up) * (down @ down.mT)).sum().clamp(min=0)
        return abs(self.scale) * math.sqrt(square)


@dataclass(frozen=True)
class LoRA:
    """All layers of a file, with what its header says."""

    layers: dict[Module, Layer]
    header: dict[str, str]
    naming: str = "kohya"
    source: str = ""

    @property
    def networks(self) -> list[str]:
        """List the networks it changes."""
        return sorted({module.network for module in self.layers})

    @property
    def is_sdxl(self) -> bool:
        """Recognise SDXL by its header, its second text encoder, or what its attention reads."""
        if "stable-diffusion-xl" in self.header.get("modelspec.architecture", ""):
            return True
        reads = {
            layer.down.shape[1]
            for module, layer in self.layers.items()
            if module.name.endswith("attn2.to_k")
        }
        return "text_encoder_2" in self.networks or 2048 in reads

    @property
    def family(self) -> Family:
        """Tell which family's names and readers it has: of a UNet's, they differ for SDXL alone."""
        if "transformer" in self.networks and (told := transformer_names.family_of(self.header)):
            return told
        return train_lora.SDXL if self.is_sdxl else train_lora.SD1

    @property
    def dtype(self) -> torch.dtype:
        """Tell the precision that most of it is in."""
        return Counter(layer.down.dtype for layer in self.layers.values()).most_common(1)[0][0]


# --- Names ---

WORDS = (
    *("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "proj_in", "proj_out"),
    *("to_q", "to_k", "to_v", "to_out", "time_emb_proj", "conv_shortcut", "conv_in", "conv_out"),
    *("time_embedding", "add_embedding", "linear_1", "linear_2", "text_model", "self_attn"),
    *("q_proj", "k_proj", "v_proj", "out_proj", "text_projection", "input_blocks", "middle_block"),
    *("output_blocks", "in_layers", "out_layers", "emb_layers", "skip_connection", "time_embed"),
    *("label_emb", "token_embedding", "position_embedding"),
)
ONE_WORD = re.compile(rf"(?:{'|'.join(WORDS)})(?=_|$)|[A-Za-z0-9]+")
PREFIXES = {
    part.lora_prefix: part.folder
    for family in train_lora.FAMILIES.values()
    for part in (family.denoiser, *family.text_encoders)
}
# Outside of all blocks of the original code.
OUTER = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def dotted(name: str) -> str:
    """Find the dots that kohya's names lost to underscores."""
    return ".".join(ONE_WORD.findall(name))


def diffusers_name(name: str) -> str:
    """Name a module of the original denoiser as diffusers does; others keep their names."""
    return OUTER.get(name) or train_lora.diffusers_name(name)


KOHYA = re.compile(r"(lora_(?:unet|te[12]?))_(.+?)\.(.+)")
DIFFUSERS = re.compile(
    r"(?:(unet|transformer|text_encoder(?:_2)?)\.)?(.+)\.(lora.+|alpha|dora_scale|hada.+)"
)
SIDES = {
    **dict.fromkeys(("lora_down.weight", "lora_A.weight", "lora.down.weight"), "down"),
    **dict.fromkeys(("lora_up.weight", "lora_B.weight", "lora.up.weight"), "up"),
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_mid.weight": "mid",
    "alpha": "alpha",
    "dora_scale": "dora",
}
OTHER_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "diff": "full weights",
    "a1.": "GLoRA",
    "w_norm": "norms",
    "b_norm": "norms",
}


def place_of(key: str) -> tuple[Module, str, str]:
    """Tell the module that a key of a file is about, which side it is, and the naming."""
    if found := KOHYA.fullmatch(key):
        module = Module(PREFIXES[found[1]], diffusers_name(dotted(found[2])))
        return inside(module), SIDES.get(found[3], found[3]), "kohya"
    key = re.sub(r"\.processor\.(to_\w+?)_lora\.", r".\1.lora.", key).replace(".default.", ".")
    key = key.removeprefix("base_model.model.")
    if not (found := DIFFUSERS.fullmatch(key)):
        raise ValueError(f"{key} belongs to no LoRA that is known")
    text = "self_attn" in found[2] or "text_model" in found[2]
    network = found[1] or ("text_encoder" if text else "unet")
    name = found[2].replace(".to_out.lora", ".to_out.0.lora")
    if network == "unet":
        name = re.sub(r"\.to_out$", ".to_out.0", name)
    naming = "diffusers" if found[1] else "peft"
    return inside(Module(network, name)), SIDES.get(found[3], found[3]), naming


def inside(module: Module) -> Module:
    """Leave out the level that some programs put into the names of a text encoder's modules."""
    return Module(module.network, module.name.removeprefix("text_model."))


# --- Reading ---


def read_lora(path: Path) -> LoRA:
    """Read a LoRA file, or the folder that PEFT writes."""
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    if file.suffix in train_lora.PICKLES:
        raise refuse(path, "a safetensors file", "a pickle, which can run code when loaded")
    if not file.is_file():
        raise refuse(path, "a LoRA file", "no such file")
    try:
        train_lora.read_header(file)  # tells what is wrong with a damaged one
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            header = dict(opened.metadata() or {})
    except TrainError as error:
        raise refuse(file, "a LoRA file", error.problems[0].found) from error
    except (OSError, SafetensorError) as error:
        raise refuse(file, "a LoRA file", f"what cannot be read ({error})") from error
    return sort_out(tensors, header, alphas_beside(path, header), path)


def read_metadata(file: Path) -> dict[str, str]:
    """Read what a file says of itself, and none of its numbers."""
    try:
        with safe_open(file, "pt") as opened:
            return dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise refuse(file, "a LoRA file", f"what cannot be read ({error})") from error


def alphas_beside(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """Find what PEFT says of the strength, which stands in no tensor there."""
    try:
        if path.is_dir():
            return dict(json.loads((path / "adapter_config.json").read_text(encoding="utf-8")))
        return dict(json.loads(header.get("lora_adapter_metadata", "{}")))
    except (OSError, ValueError) as error:
        raise refuse(path, "a LoRA with a config of PEFT's", str(error)) from error


def sort_out(tensors: Tensors, header: dict[str, str], peft: Mapping[str, Any], path: Path) -> LoRA:
    """Put the parts of each layer together."""
    found: dict[Module, Tensors] = {}
    namings: set[str] = set()
    if transformer_names.is_transformer(tensors):
        tensors = read_by_diffusers(tensors, header, path)
    for key, tensor in tensors.items():
        kind = next((kind for mark, kind in OTHER_KINDS.items() if f".{mark}" in key), None)
        if kind:
            raise refuse(path, "a LoRA of plain pairs", f"a file with {kind}, such as {key}")
        try:
            module, side, naming = place_of(key)
        except ValueError as error:
            raise refuse(path, "a LoRA", str(error)) from error
        namings.add(naming)
        parts = found.setdefault(module, {})
        if side in parts:
            raise refuse(path, "each module once", f"{module.name} under two names")
        parts[side] = tensor
    if not found:
        raise refuse(path, "a LoRA", "a file without tensors")
    layers = {m: layer_of(m, parts, peft, path) for m, parts in sorted(found.items())}
    return LoRA(layers, header, min(namings), path.name)


def read_by_diffusers(tensors: Tensors, header: dict[str, str], path: Path) -> Tensors:
    """Give a transformer's layers the names that diffusers has for them."""
    family = transformer_names.family_of(header)
    if family is None or family.name not in transformer_names.READERS:
        told = header.get("modelspec.architecture", "none")
        names = ", ".join(transformer_names.READERS)
        raise refuse(path, f"a header that names one of {names}", f"the architecture {told}")
    try:
        return transformer_names.in_diffusers_names(tensors, family)
    except (KeyError, ValueError, AttributeError, IndexError) as error:
        raise refuse(
            path, f"a LoRA of {family.title}", f"layers of something else ({error})"
        ) from error


def layer_of(module: Module, parts: Tensors, peft: Mapping[str, Any], path: Path) -> Layer:
    """Make a layer of what a file holds for one module; refuse what is no pair."""
    name = f"{module.network}.{module.name}"
    if "dora" in parts or (strange := parts.keys() - {"down", "up", "mid", "alpha"}):
        kind = "DoRA, which is no sum" if "dora" in parts else ", ".join(sorted(strange))
        raise refuse(path, "a LoRA of plain pairs", f"{name} with {kind}")
    if not {"down", "up"} <= parts.keys():
        raise refuse(path, "pairs of matrices", f"half of one at {name}")
    down, up = parts["down"], parts["up"]
    if "mid" in parts:  # Tucker: a 3×3 kernel between two 1×1 ones
        down = torch.einsum("abhw,bc->achw", parts["mid"].float(), down.flatten(1).float())
    if down.ndim < 2 or up.ndim < 2 or len(down) != up.flatten(1).shape[1]:
        raise refuse(path, "matrices that fit", f"{name} of {[*up.shape]} and {[*down.shape]}")
    if not all(part.isfinite().all() for part in parts.values()):
        raise refuse(path, "finite numbers", f"others at {name}")
    alpha = train_lora.alpha_said(peft, name, len(down))
    scale = float(parts.get("alpha", alpha)) / len(down)
    if module.network == "transformer" and (used := up.any(dim=0)).any():
        down, up = down[used], up[:, used]  # layers that a file joins share all directions
    return Layer(down, up, scale)


# --- Sums and ranks ---


def merge(terms: Sequence[tuple[LoRA, float]]) -> LoRA:
    """Put LoRAs beside each other: exactly the sum of what they add, each at its strength."""
    titles = {lora.family.title: lora.source for lora, _ in terms}
    if len(titles) > 1:
        raise refuse(terms[-1][0].source, "LoRAs of one family", " beside ".join(titles))
    layers: dict[Module, Layer] = {}
    for lora, strength in terms:
        for module, layer in lora.layers.items():
            down, up = layer.down.float(), layer.up.float() * (layer.scale * strength)
            if before := layers.get(module):
                if before.down.shape[1:] != down.shape[1:] or len(before.up) != len(up):
                    raise refuse(lora.source, "LoRAs of one family", f"another {module.name}")
                down = torch.cat([before.down, down])
                up = torch.cat([before.up, up], dim=1)
            layers[module] = Layer(down, up)
    told = ", ".join(f"{lora.source} × {strength:g}" for lora, strength in terms)
    header = terms[0][0].header | {"modelspec.merged_from": told}
    return LoRA(dict(sorted(layers.items())), header, source=told)


def reduce_rank(lora: LoRA, rank: int | None, energy: float | None, phase: Phase) -> LoRA:
    """Keep the longest directions of each module: at most so many, or a share of the square."""
    layers = {}
    for done, (module, layer) in enumerate(lora.layers.items()):
        phase.at(done)
        if rank and rank >= layer.rank:
            layers[module] = layer
        elif reduced := shorten(layer, rank, energy):
            layers[module] = reduced
    if not layers:
        raise refuse(lora.source, "a LoRA that adds something", "zeros")
    return replace(lora, layers=layers)


def shorten(layer: Layer, rank: int | None, energy: float | None) -> Layer | None:
    """Find the nearest product of fewer directions, from the factors alone; None for nothing."""
    q_up, r_up = torch.linalg.qr(layer.up.double().flatten(1))
    q_down, r_down = torch.linalg.qr(layer.down.double().flatten(1).mT)
    left, sizes, right = torch.linalg.svd(layer.scale * r_up @ r_down.mT)
    count = enough(sizes, rank, energy)
    if not count:
        return None
    root = sizes[:count].sqrt()  # on both sides, so that half precision holds both
    up, down = q_up @ left[:, :count] * root, q_down @ right.mT[:, :count] * root
    return Layer(
        down.mT.reshape(count, *layer.down.shape[1:]).float(),
        up.reshape(len(up), count, *layer.up.shape[2:]).float(),
    )


def enough(sizes: torch.Tensor, rank: int | None, energy: float | None) -> int:
    """Count the directions to keep: so many, or as few as hold a share of the square."""
    there = int((sizes > 1e-12 * sizes[0]).sum())
    if energy is None:
        return min(rank or there, there)
    held = sizes.square().cumsum(0) / sizes.square().sum()
    return min(int((held < energy * (1 - 1e-12)).sum()) + 1, there)


# --- Writing ---

# Written numbers are rounded to their precision; more than that would be a mistake of the writer.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}  # and else 1e-5


def same_alpha(lora: LoRA) -> tuple[LoRA, float]:
    """Give all layers one alpha: diffusers applies unequal ones wrongly, without a word.

    What is most frequent stays as it is, bit for bit; the other layers' strength moves into `up`.
    """
    alphas = Counter(layer.scale * layer.rank for layer in lora.layers.values())
    alpha = alphas.most_common(1)[0][0]
    layers = {}
    for module, layer in lora.layers.items():
        factor = layer.scale * layer.rank / alpha
        up = layer.up if factor == 1 else (layer.up.double() * factor).to(layer.up.dtype)
        layers[module] = Layer(layer.down, up, alpha / layer.rank)
    return replace(lora, layers=layers), alpha


def named(lora: LoRA, naming: str) -> Tensors:
    """Give every tensor the name that a kind of reader knows."""
    even, alpha = same_alpha(lora)
    family, tensors = lora.family, Tensors()
    joins = naming == "kohya" and family.write_lora  # transformers' files have names of their own
    if joins and lora.networks != ["transformer"]:
        expected, found = f"layers of {family.title}'s transformer alone", "a text encoder's too"
        raise refuse(lora.source, expected, found, "With --to diffusers they go along.")
    for module, layer in even.layers.items():
        if naming == "kohya" and not joins:
            for side, matrix in (("A", layer.down), ("B", layer.up)):
                place = f"{module.network}.{module.name}.lora_{side}"
                key = train_lora.kohya_name(place, family)
                tensors[key] = matrix
                tensors[f"{key.partition('.')[0]}.alpha"] = torch.tensor(alpha)
        else:  # their readers take no alpha for strength 1
            level = "text_model." if module.network.startswith("text") else ""
            name = f"{module.network}.{level}{module.name}"
            up = (layer.up.double() * layer.scale).to(layer.up.dtype)
            tensors |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": up}
    return transformer_names.in_own_names(tensors, family) if joins else tensors


def ranks_of(lora: LoRA) -> Iterator[int]:
    """List the ranks of all layers."""
    return (layer.rank for layer in lora.layers.values())


# What a changed file would say wrongly of itself, and folders that name people.
STALE = ("sshs_", "modelspec.hash", "ss_dataset_dirs", "ss_bucket_info", "lora_adapter_metadata")


def header_of(lora: LoRA, **changes: str) -> dict[str, str]:
    """Carry a header over, without what is no longer true."""
    kept = {k: v for k, v in lora.header.items() if not k.startswith(STALE)}
    ranks, (_, alpha) = set(ranks_of(lora)), same_alpha(lora)
    rank = str(max(ranks)) if len(ranks) == 1 else "Dynamic"
    return kept | {"ss_network_dim": rank, "ss_network_alpha": f"{alpha:.10g}"} | changes


def write_lora(path: Path, lora: LoRA, naming: str, dtype: torch.dtype | None = None) -> float:
    """Write a file, read it back, and return how far it is off, relative to what it adds.

    It takes its name after that, so that one that fails leaves what stood there before.
    """
    tensors, most = named(lora, naming), TOLERANCE.get(dtype or lora.dtype, 1e-5)
    if dtype:
        tensors = {k: v if k.endswith(".alpha") else v.to(dtype) for k, v in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{os.getpid()}.draft.tmp")
    try:
        whole = {k: v.contiguous() for k, v in tensors.items()}
        train_lora.save_lora(draft, whole, header_of(lora))
        off = difference(lora, read_lora(draft))
        if not off <= most:
            raise refuse(path, "numbers that the precision holds", f"{off:.1%} off")
        draft.replace(path)
        train_lora.sync_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)
    return off


def difference(one: LoRA, other: LoRA) -> float:
    """Tell how far two LoRAs are apart, relative to the length of the first."""
    if one.layers.keys() != other.layers.keys():
        return float("inf")
    apart = length = 0.0
    for module, layer in one.layers.items():
        twin = other.layers[module]
        both = Layer(
            torch.cat([layer.down.double(), twin.down.double().view(-1, *layer.down.shape[1:])]),
            torch.cat(
                [
                    layer.scale * layer.up.double().flatten(1),
                    -twin.scale * twin.up.double().flatten(1),
                ],
                dim=1,
            ),
        )
        apart, length = apart + both.norm() ** 2, length + layer.norm() ** 2
    return float((apart / length) ** 0.5) if length else apart**0.5
