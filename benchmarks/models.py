"""Base models of real size with random weights: speed and memory do not know the difference."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

HERE = Path(__file__).resolve().parent
BUNDLED = HERE.parent / "examples" / "tiny-sd"

DENOISERS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
SMALL_TEXT: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
}
LARGE_TEXT: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
}
SAMPLES = {"sd15": 512, "sdxl": 1024}


def build(size: str, root: Path) -> Path:
    """Write a model in diffusers layout and half precision, unless it is there already."""
    folder = root / size
    if size == "tiny" or (folder / "model_index.json").is_file():
        return BUNDLED if size == "tiny" else folder
    torch.manual_seed(0)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")  # to draw fast
    unet: Any = UNet2DConditionModel(**DENOISERS[size])
    unet.half().save_pretrained(folder / "unet")
    vae: Any = AutoencoderKL(
        sample_size=SAMPLES[size],
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.13025 if size == "sdxl" else 0.18215,
    )
    vae.half().save_pretrained(folder / "vae")
    betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}
    schedule: Any = DDPMScheduler(**betas, beta_schedule="scaled_linear")
    schedule.save_pretrained(folder / "scheduler")
    write_text_parts(folder, two=size == "sdxl")
    (folder / "model_index.json").write_text("{}\n", "utf-8")  # last: the model is whole
    return folder


def write_text_parts(folder: Path, *, two: bool) -> None:
    """Write one text encoder, or two, each with the bundled model's tokenizer."""
    small = CLIPTextConfig(**SMALL_TEXT, num_attention_heads=12, vocab_size=49408)
    CLIPTextModel(small).half().save_pretrained(folder / "text_encoder")
    shutil.copytree(BUNDLED / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    if two:
        large = CLIPTextConfig(
            **LARGE_TEXT, num_attention_heads=20, vocab_size=49408, projection_dim=1280
        )
        CLIPTextModelWithProjection(large).half().save_pretrained(folder / "text_encoder_2")
        shutil.copytree(BUNDLED / "tokenizer", folder / "tokenizer_2", dirs_exist_ok=True)


if __name__ == "__main__":
    sys.stdout.write(f"{build(sys.argv[1], Path(sys.argv[2]))}\n")
