"""The LoRA that turns one model into another: the largest directions of what differs.

Two models are read tensor by tensor, from folders and single files alike, so that no more than one
pair of tensors is in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

import train_lora
from tools.base_model import ask_for, find_model, title_of
from tools.lora_file import Layer, LoRA, Module, diffusers_name, enough
from tools.program import refuse, remark
from train_lora import BaseModel, Emitter, Part, Phase, StopRequest, counted

SPARE = 16  # directions followed beside those that are wanted, so that those settle sooner
SETTLED, MOST_TURNS = 1e-6, 60  # growth of what is found in a turn, after which no more is
ROUNDING = 0.5  # of the largest direction that rounding may make; measured: about 0.25
COMPUTED = 1e-6  # of the longest direction: what computing in single precision leaves

Read = Callable[["Piece"], torch.Tensor]


@dataclass(frozen=True)
class Wanted:
    """What was asked for."""

    rank: int | None = None
    conv_rank: int | None = None
    energy: float | None = None
    text_encoders: bool = True
    naming: str = "kohya"
    device: str = "cpu"
    blocks_only: bool = False  # whether names reach no further into the denoiser

    def rank_for(self, weight: torch.Tensor) -> int | None:
        """Tell how many directions a module gets: kernels that look around may have another."""
        return self.conv_rank or self.rank if math.prod(weight.shape[2:]) > 1 else self.rank


@dataclass
class Extraction:
    """What was found: a LoRA, and how much of the change it holds."""

    layers: dict[Module, Layer] = field(default_factory=dict)
    kept: float = 0.0  # squares of lengths: in the LoRA, …
    held: float = 0.0  # … of all modules that it could hold, …
    lost: dict[str, float] = field(default_factory=dict)  # … and of each tensor that it cannot

    @property
    def summary(self) -> str:
        """Say how much of the change is in the LoRA."""
        told = f"{self.kept / self.held:.2%} of the change of their weights"
        share = sum(self.lost.values()) / (self.held + sum(self.lost.values()))
        some = ", ".join(f"{kind} ({count})" for kind, count in self.kinds().items())
        return f"{told}; not held: {some}, {share:.2%} of all" if self.lost else told

    def kinds(self) -> dict[str, int]:
        """Count what no LoRA can hold, by kind."""
        found: dict[str, int] = {}
        for name in self.lost:
            kind = "norms" if "norm" in name else "biases" if name.endswith("bias") else "others"
            found[kind] = found.get(kind, 0) + 1
        return found


class Piece(NamedTuple):
    """Where the numbers of a tensor lie: in OpenCLIP's files, three share one place."""

    file: Path
    key: str
    shape: tuple[int, ...]
    third: int | None = None


# --- Names ---

# OpenCLIP's names for what the published encoder calls otherwise.
OPEN_CLIP = (
    *((r"^transformer\.resblocks\.", "encoder.layers."), (r"\.attn\.", ".self_attn.")),
    *((r"\.ln_(\d)\.", r".layer_norm\1."), (r"\.mlp\.c_fc\.", ".mlp.fc1.")),
    *((r"\.mlp\.c_proj\.", ".mlp.fc2."), (r"^ln_final\.", "final_layer_norm.")),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "embeddings.token_embedding."),
)


def pieces_of(base: BaseModel, part: Part) -> dict[str, Piece]:
    """List the tensors of a network by the names that diffusers and transformers have for them."""
    located, found = base.parts[part], {}
    for file in located.files:
        for key, shape in train_lora.read_header(file).items():
            if located.original is None:
                found[key.removeprefix("text_model.")] = Piece(file, key, shape)
            elif key.startswith(located.original):
                for name, third in published(key.removeprefix(located.original), part):
                    own = shape if third is None else (shape[0] // 3, *shape[1:])
                    found[name] = Piece(file, key, own, third)
    return found if located.original is None else without_unread(found, part)


def without_unread(pieces: dict[str, Piece], part: Part) -> dict[str, Piece]:
    """Leave out the last layer of OpenCLIP's files, which nothing reads but a projection."""
    if part.publish is not train_lora.publish_open_clip or "Projection" in part.class_name:
        return pieces
    last = max(int(name.split(".")[2]) for name in pieces if name.startswith("encoder.layers."))
    unread = f"encoder.layers.{last}."
    return {name: piece for name, piece in pieces.items() if not name.startswith(unread)}


def published(name: str, part: Part) -> Iterator[tuple[str, int | None]]:
    """Translate a name of a single file; what holds queries, keys and values becomes three."""
    if part.publish is train_lora.publish_open_clip:
        for pattern, word in OPEN_CLIP:
            name = re.sub(pattern, word, name)
        if found := re.fullmatch(r"(.+)\.in_proj_(weight|bias)", name):
            yield from ((f"{found[1]}.{q}_proj.{found[2]}", n) for n, q in enumerate("qkv"))
            return
        yield name, None
    elif part.library == "transformers":
        yield name.removeprefix("text_model."), None
    else:
        module, _, kind = name.rpartition(".")
        yield f"{diffusers_name(module)}.{kind}", None


def module_for(name: str, weight: torch.Tensor, part: Part, asked: Wanted) -> str | None:
    """Name the module that a LoRA changes to change this tensor; None where none can.

    Kohya's names for SDXL reach into blocks alone, and names for text encoders into their layers.
    """
    module, _, kind = name.rpartition(".")
    if kind != "weight" or weight.ndim < 2:
        return None
    if part.library == "transformers":
        return module if module.startswith("encoder.layers.") else None
    return module if "_block" in module or not asked.blocks_only else None


# --- Reading two models ---


def find_both(names: tuple[str, str], events: Emitter) -> tuple[BaseModel, BaseModel]:
    """Find two models; refuse those of which no LoRA leads from one to the other."""
    (_, base), (_, tuned) = (find_model(ask_for(name), events) for name in names)
    if base.family is not tuned.family:
        expected = f"a {base.family.title} model, as {title_of(ask_for(names[0]))} is"
        raise refuse(names[1], expected, f"{tuned.family.title}")
    if base.objective.prediction_type != tuned.objective.prediction_type:
        types = [each.objective.prediction_type for each in (base, tuned)]
        remark(events, f"One model predicts {types[0]} and the other {types[1]}, by what they say")
    return base, tuned


def check_alike(one: dict[str, Piece], other: dict[str, Piece], part: Part, tuned: str) -> None:
    """Refuse two networks of different layers."""
    alone = sorted(one.keys() ^ other.keys())
    if (alone and part.library == "diffusers") or not one.keys() & other.keys():
        some, first = counted(len(alone), "tensor"), ", ".join(alone[:1])
        found = f"{some} that only one of both has, such as {first}"
        raise refuse(tuned, f"the same layers in its {part.folder}", found)
    for name in sorted(one.keys() & other.keys()):
        if one[name].shape != other[name].shape:
            found = f"{name} of {[*other[name].shape]} beside {[*one[name].shape]}"
            raise refuse(tuned, f"the same layers in its {part.folder}", found)


def opened(files: Iterable[Path], stack: contextlib.ExitStack) -> Read:
    """Open files of weights; nothing of them is in memory but what is being read."""
    handles = {file: stack.enter_context(safe_open(file, "pt", backend="pread")) for file in files}

    def read(piece: Piece) -> torch.Tensor:
        tensor: torch.Tensor = handles[piece.file].get_tensor(piece.key)
        return tensor if piece.third is None else tensor.chunk(3)[piece.third]

    return read


# --- Taking the difference ---


def extract(
    names: tuple[str, str], asked: Wanted, events: Emitter, stop: StopRequest
) -> tuple[LoRA, Extraction]:
    """Find the LoRA that turns the first model into the second."""
    base, tuned = find_both(names, events)
    family, found = base.family, Extraction()
    asked = dataclasses.replace(
        asked, blocks_only=asked.naming == "kohya" and family.original_names
    )
    parts = [family.denoiser, *(family.text_encoders if asked.text_encoders else ())]
    for part in parts:
        one, other = pieces_of(base, part), pieces_of(tuned, part)
        check_alike(one, other, part, names[1])
        both = sorted(one.keys() & other.keys(), key=train_lora.natural_key)
        phase = Phase(f"comparing {part.folder}", len(both), events, stop)
        with contextlib.ExitStack() as stack:
            read = opened({piece.file for piece in (*one.values(), *other.values())}, stack)
            for done, name in enumerate(both):
                phase.at(done)
                compare(name, read(one[name]), read(other[name]), part, asked, found)
    if not found.layers:
        raise refuse(names[1], "a model that differs in what a LoRA can change", "none that does")
    return LoRA(dict(sorted(found.layers.items())), header_of(names, tuned)), found


def compare(
    name: str,
    before: torch.Tensor,
    after: torch.Tensor,
    part: Part,
    asked: Wanted,
    found: Extraction,
) -> None:
    """Add what changed of one tensor to what was found."""
    if not before.is_floating_point() or (delta := change(before, after)) is None:
        return
    square = float(delta.double().square().sum())
    module = module_for(name, delta, part, asked)
    if module is None:
        found.lost[f"{part.folder}.{name}"] = square
        return
    layer = largest(delta.to(asked.device), asked, rounding_of(after))
    if layer:
        found.held += square
        found.kept += layer.norm() ** 2
        found.layers[Module(part.folder, module)] = layer


def change(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor | None:
    """Subtract; None for what is the same in the coarser of both precisions."""
    coarse = max((before.dtype, after.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    if torch.equal(before.to(coarse).float(), after.to(coarse).float()):
        return None
    return after.float() - before.float()


def rounding_of(weight: torch.Tensor) -> float:
    """Tell how long a direction may be that rounding alone makes of a weight: a random matrix's."""
    eps = torch.finfo(weight.dtype).eps
    rows, columns = len(weight), weight[0].numel()
    mean_square = float(weight.double().square().mean())
    return ROUNDING * eps * math.sqrt(mean_square) * (math.sqrt(rows) + math.sqrt(columns))


def largest(delta: torch.Tensor, asked: Wanted, rounding: float) -> Layer | None:
    """Find the nearest product of so few directions; None for nothing but rounding."""
    rank, flat = asked.rank_for(delta), delta.flatten(1)
    left, sizes, right = directions(flat, None if asked.energy else rank)
    shortest = max(rounding, COMPUTED * float(sizes[0]))
    count = min(enough(sizes, rank, asked.energy), int((sizes > shortest).sum()))
    if not count:
        return None
    root = sizes[:count].sqrt()  # on both sides, so that half precision holds both
    up, down = left[:, :count] * root, (right[:, :count] * root).mT
    kernel = [1] * (delta.ndim - 2)
    return Layer(
        down.reshape(count, *delta.shape[1:]).cpu().contiguous(),
        up.reshape(len(up), count, *kernel).cpu().contiguous(),
    )


def directions(matrix: torch.Tensor, count: int | None) -> tuple[torch.Tensor, ...]:
    """Decompose a matrix: whole, or its longest directions alone, by turns until they settle.

    A whole decomposition of a large layer takes a minute, and ten turns take seconds.
    """
    most = min(matrix.shape)
    if count is None or 4 * (count + SPARE) > most:
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, sizes, right.mT
    chance = torch.Generator().manual_seed(0)
    basis = torch.randn((matrix.shape[1], count + SPARE), generator=chance).to(matrix)
    before = 0.0
    for _ in range(MOST_TURNS):
        across = torch.linalg.qr(matrix @ basis).Q
        inner = matrix.mT @ across  # [columns, count]
        basis, small = torch.linalg.qr(inner)
        found = float(torch.linalg.svdvals(small)[:count].double().square().sum())
        if found - before <= SETTLED * found:
            break
        before = found
    right, sizes, left = torch.linalg.svd(inner, full_matrices=False)
    return across @ left.mT, sizes, right


def header_of(names: tuple[str, str], tuned: BaseModel) -> dict[str, str]:
    """Say what the file is, in the words that the trainer's own files have for it."""
    base, other = (title_of(ask_for(name)) for name in names)
    kind = tuned.objective.prediction_type
    return {
        "modelspec.description": f"What turns {base} into {other}",
        "modelspec.prediction_type": kind.removesuffix("_prediction"),
        "modelspec.sai_model_spec": "1.0.0",
        **tuned.family.headers[kind],
        "ss_network_module": "networks.lora",
        "ss_sd_model_name": base,
        "train_lora_version": train_lora.__version__,
    }
