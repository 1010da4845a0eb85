"""Count what a step of each flow-matching family takes: operations, and the memory that is planned.

    python benchmarks/on_meta.py

Networks of real size are built without memory, so that this takes a minute on any machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train_lora import (
    BaseModel,
    DeviceFacts,
    Located,
    MemoryPlan,
    Part,
    TrainingConfig,
    all_families,
)

SIDE = 1024
CAPTION = 128  # tokens of an ordinary one, where texts are not filled up
CARD = 80 * 2**30
PLACES = {"dataset_path": "images", "base_model": "base", "output_path": "out"}
WAYS = {"bf16": {}, "nf4": {"base_precision": "nf4"}}
Shapes = dict[str, tuple[int, ...]]


def qwen3(width: int, inner: int, heads: int) -> Any:
    """Build the text encoder of Z-Image and FLUX.2 klein."""
    config = transformers.Qwen3Config(
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=8,
        num_hidden_layers=36,
        head_dim=128,
    )
    return transformers.Qwen3Model(config)


def t5() -> Any:
    """Build FLUX.1's second text encoder."""
    shape: dict[str, Any] = {"d_model": 4096, "d_ff": 10_240, "num_layers": 24, "num_heads": 64}
    config = transformers.T5Config(**shape, vocab_size=32_128, feed_forward_proj="gated-gelu")
    return transformers.T5EncoderModel(config)


def kl_vae(kind: Any, channels: int) -> Any:
    """Build a VAE of the usual size."""
    return kind(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
    )


Build = Callable[[], Any]
KLEIN = {"num_single_layers": 20, "num_layers": 5, "num_attention_heads": 24}
KLEIN |= {"joint_attention_dim": 7680, "guidance_embeds": False}
KLEIN_9B = KLEIN | {"num_single_layers": 24, "num_layers": 8, "num_attention_heads": 32}
KLEIN_9B |= {"joint_attention_dim": 12_288}
TITLES = {  # by the ids that configs name
    "Tongyi-MAI/Z-Image": "Z-Image",
    "black-forest-labs/FLUX.2-klein-base-4B": "FLUX.2 klein 4B",
    "black-forest-labs/FLUX.2-klein-base-9B": "FLUX.2 klein 9B",
    "black-forest-labs/FLUX.1-dev": "FLUX.1",
    "krea/Krea-2-Raw": "Krea 2",
}
NETWORKS: dict[str, tuple[str, dict[str, Build]]] = {
    "Z-Image": (
        "z_image",
        {
            "transformer": diffusers.ZImageTransformer2DModel,
            "vae": lambda: kl_vae(diffusers.AutoencoderKL, 16),
            "text_encoder": lambda: qwen3(2560, 9728, 32),
        },
    ),
    "FLUX.2 klein 4B": (
        "flux2_klein",
        {
            "transformer": lambda: diffusers.Flux2Transformer2DModel(**KLEIN),
            "vae": lambda: kl_vae(diffusers.AutoencoderKLFlux2, 32),
            "text_encoder": lambda: qwen3(2560, 9728, 32),
        },
    ),
    "FLUX.2 klein 9B": (
        "flux2_klein",
        {
            "transformer": lambda: diffusers.Flux2Transformer2DModel(**KLEIN_9B),
            "vae": lambda: kl_vae(diffusers.AutoencoderKLFlux2, 32),
            "text_encoder": lambda: qwen3(4096, 12_288, 32),
        },
    ),
    "FLUX.1": (
        "flux1",
        {
            "transformer": lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
            "vae": lambda: kl_vae(diffusers.AutoencoderKL, 16),
            "text_encoder_2": t5,
        },
    ),
    "Krea 2": (
        "krea2",
        {
            "transformer": diffusers.Krea2Transformer2DModel,
            "vae": diffusers.AutoencoderKLQwenImage,
            "text_encoder": lambda: qwen3(2560, 9728, 32),
        },
    ),
}


def look_at(title: str) -> tuple[BaseModel, Any]:
    """Describe a base model as its headers would; return its denoiser too."""
    name, builds = NETWORKS[title]
    family = all_families()[name]
    with torch.device("meta"):
        networks = {folder: build() for folder, build in builds.items()}
    parts = {part: describe(part, networks) for part in family.configured}
    base = BaseModel(
        name=title,
        family=family,
        objective=family.objectives[0],
        parts=parts,
        reference=None,
        **family.measure(parts),
    )
    return base, networks["transformer"]


def describe(part: Part, networks: Mapping[str, Any]) -> Located:
    """List a network's config and shapes."""
    network = networks.get(part.folder)
    if network is None:
        return Located()
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    config = dict(network.config) if part.library == "diffusers" else {}
    return Located(config=config, shapes=shapes)


def operations(base: BaseModel, denoiser: Any) -> float:
    """Count, in tera, the operations of one picture's way there, and as many back."""
    side = SIDE // base.vae_scale_factor
    noisy = torch.zeros(1, base.latent_channels, side, side, device="meta")
    told = conditioning(base, denoiser)
    with FlopCounterMode(display=False) as counter:
        base.family.predict(denoiser, noisy, torch.zeros(1, device="meta"), told)
    return float(2 * counter.get_total_flops() / 1e12)


def conditioning(base: BaseModel, denoiser: Any) -> Any:
    """Make an ordinary text as the family has it, which may fill it up."""
    from train_lora import Conditioning

    config, words = denoiser.config, CAPTION if base.family.ragged else base.tokens
    shape = [1, words, base.text_width]
    if "num_text_layers" in config:
        shape = [1, words, config.num_text_layers, config.text_hidden_dim]
    told = Conditioning(prompt_embeds=torch.zeros(shape, device="meta"))
    told["pooled_prompt_embeds"] = torch.zeros(1, 768, device="meta")
    told["prompt_mask"] = torch.ones(1, words, dtype=torch.bool)  # numbers are asked for
    return told


def planned(base: BaseModel, resolution: int, **way: Any) -> float:
    """Plan the memory of a run on a large card, in GiB."""
    document = {**PLACES, "trigger_words": ["zkb"], "resolution": resolution, **way}
    config = TrainingConfig.from_record({**document, "gradient_checkpointing": True})
    card = DeviceFacts(kind="cuda", name="card", memory_total_bytes=CARD, memory_free_bytes=CARD)
    return MemoryPlan.make(config, base, 20, card).phases["training"] / 2**30


def main() -> int:
    """Print a table."""
    write = sys.stdout.write
    write("| | weights, billions | TFLOP of a step | with checkpointing ")
    write("".join(f"| {side} px, {way} " for way in WAYS for side in (512, 1024)) + "|\n")
    write("| --- " + "| ---: " * (3 + 2 * len(WAYS)) + "|\n")
    for title in NETWORKS:
        base, denoiser = look_at(title)
        there_and_back = operations(base, denoiser)
        cells = [f"{base.numbers(base.family.denoiser) / 1e9:.2f}", f"{there_and_back:.0f}"]
        cells += [f"{1.5 * there_and_back:.0f}"]
        cells += [f"{planned(base, s, **w):.1f}" for w in WAYS.values() for s in (512, 1024)]
        write(f"| {title} | {' | '.join(cells)} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
