"""What flow-matching transformers share: their objective, their previews, texts and latents.

A picture is noise at sigma 1 and itself at sigma 0, on a straight line; the denoiser is asked for
the direction from the picture to the noise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from train_lora import TIMES, BaseModel, Conditioning, Objective, Part

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from train_lora import torch  # which is imported when it is asked for

Shift = Callable[[int], float]  # by the tokens that a picture has

# --- objective and previews --------------------------------------------------------------------


@dataclass(frozen=True)
class Flow:
    """How sigmas are drawn for training, and walked down for a preview."""

    shift: Shift
    preview_shift: Callable[[int, int], float]  # by tokens and steps
    patch: int  # latents that the denoiser takes as one token, along each side

    def tokens(self, latents: Tensor) -> int:
        """Count what the denoiser cuts a picture into."""
        return latents.shape[-2] * latents.shape[-1] // self.patch**2


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Move times towards the noise, which large pictures need more of."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigma_at(objective: Objective, flow: Flow, latents: Tensor, share: Tensor) -> Tensor:
    """Give the time that a share of those that are drawn lies below, shifted and fitted."""
    sigma = TIMES[objective.timestep_sampling](share)
    low, high = (end / 1000 for end in objective.timestep_range)
    return low + (high - low) * shifted(sigma, flow.shift(flow.tokens(latents)))


def draw_sigma(
    objective: Objective, flow: Flow, latents: Tensor, chance: torch.Generator
) -> Tensor:
    """Draw a time."""
    return sigma_at(objective, flow, latents, torch.rand((), generator=chance))


def mix(_: Flow, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Put pictures on their way to noise."""
    share = sigmas.view(-1, 1, 1, 1)
    return (1 - share) * latents + share * noise


class Ladder:
    """Euler's method from pure noise down to a picture."""

    def __init__(self, flow: Flow, steps: int, latents: Tensor) -> None:
        """Choose the rungs."""
        even = torch.linspace(1, 1 / steps, steps)
        rungs = shifted(even, flow.preview_shift(flow.tokens(latents), steps))
        self.sigmas = torch.cat([rungs, torch.zeros(1)]).to(latents.device)
        self.timesteps = self.sigmas[:-1]
        self.done = 0

    def step(self, answer: Tensor, _: Tensor, latents: Tensor, **__: object) -> tuple[Tensor]:
        """Go one rung down."""
        here, there = self.sigmas[self.done], self.sigmas[self.done + 1]
        self.done += 1
        return (latents + (there - here) * answer,)


def flow_matching(
    shift: Shift, preview_shift: Callable[[BaseModel, int, int], float], patch: int = 2
) -> Objective:
    """Describe flow matching with a family's own shifts."""

    def load(base: BaseModel) -> Flow:
        asked = base.objective.timestep_shift
        chosen: Shift = shift if isinstance(asked, str) else (lambda _: float(asked))
        previews = functools.partial(preview_shift, base)
        return Flow(chosen, previews, patch)

    return Objective(
        prediction_type="flow",
        load_schedule=load,
        draw_time=draw_sigma,
        time_at=sigma_at,
        mix=mix,
        target=lambda _, latents, noise, __: noise - latents,
        solver=Ladder,
        snr=lambda _, sigmas: ((1 - sigmas) / sigmas).square(),
        timestep_sampling="sigmoid",  # most often one of the middle
    )


def shift_line(tokens: int, low: tuple[int, float], high: tuple[int, float]) -> float:
    """Give the shift between two published sizes: its logarithm grows evenly with the tokens."""
    (few, least), (many, most) = low, high
    return math.exp(least + (tokens - few) * (most - least) / (many - few))


def flux_shift(tokens: int) -> float:
    """Give the shift that is published for training FLUX.1 and FLUX.2."""
    return shift_line(tokens, (256, 0.5), (4096, 1.15))


def scheduler_shift(base: BaseModel, tokens: int, _: int = 0) -> float:
    """Give the shift by which a base's own sampler makes a picture of so many tokens."""
    said = base.parts[base.family.sampler].config
    if not said.get("use_dynamic_shifting"):
        return float(said.get("shift", 1.0))
    low = int(said.get("base_image_seq_len", 256)), float(said.get("base_shift", 0.5))
    high = int(said.get("max_image_seq_len", 4096)), float(said.get("max_shift", 1.15))
    return shift_line(tokens, low, high)


# --- texts -------------------------------------------------------------------------------------


def tokens_of(tokenizer: Any, text: str, length: int) -> Tensor:
    """Turn a text into token ids, without padding."""
    ids: Tensor = tokenizer(text, truncation=True, max_length=length, return_tensors="pt").input_ids
    return ids


def as_chat(tokenizer: Any, text: str, *, thinking: bool) -> str:
    """Put a caption to a Qwen model as a person's message."""
    message = [{"role": "user", "content": text}]
    options = {"add_generation_prompt": True, "enable_thinking": thinking}
    said: str = tokenizer.apply_chat_template(message, tokenize=False, **options)
    return said


def with_mask(prompt_embeds: Tensor) -> Conditioning:
    """Mark what is text, as a longer neighbour in the batch brings empty places."""
    mask = prompt_embeds.new_ones(prompt_embeds.shape[:2], dtype=torch.bool)
    return Conditioning(prompt_embeds=prompt_embeds, prompt_mask=mask)


# --- what is known before loading --------------------------------------------------------------

# What may be packed: the layers of repeated blocks. The few around them are read more exactly.
BLOCKS = r".*\.\d+\..+"
# What each family's own is made of, with its class, its limits and its targets.
TRANSFORMER = Part(
    folder="transformer",
    library="diffusers",
    class_name="",
    stem="diffusion_pytorch_model",
    original="model.diffusion_model.",
    bare=True,
    packed=BLOCKS,
)
SAMPLER = Part(
    folder="scheduler",
    library="diffusers",
    class_name="FlowMatchEulerDiscreteScheduler",
    needs=("scheduler_config.json",),
    limits={"shift": (1e-3, 1e3)},
)
QWEN_TOKENIZER = Part(
    folder="tokenizer",
    library="transformers",
    class_name="Qwen2Tokenizer",
    needs=("vocab.json", "merges.txt"),
)
QWEN3 = Part(
    folder="text_encoder",
    library="transformers",
    class_name="Qwen3Model",
    stem="model",
    limits={"num_hidden_layers": (1, 256), "hidden_size": (1, 65_536)},
    unread_layers=1,
    cut=True,
    packed=BLOCKS,
)
FLOW_STATES = ("flow", False)


@dataclass(frozen=True)
class Kept:
    """Foresees what is kept of a picture for the way back, by the blocks that it goes through."""

    blocks: int
    width: int  # of a token
    widths: float  # that a block keeps of each
    tokens: int = 512  # of a text
    patch: int = 2

    def __call__(self, places: int, checkpointing: bool) -> float:
        """Count numbers; with checkpointing, each block's input and all of one block."""
        tokens = places // self.patch**2 + self.tokens
        times = self.blocks + self.widths if checkpointing else self.blocks * self.widths
        return tokens * self.width * times
