"""Tiny models of the real classes that see and read, for tests without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import write_tokenizer
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
)

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def make_vision(folder: Path) -> Path:
    """Make a DINOv2 that has learned nothing."""
    torch.manual_seed(0)
    config = Dinov2Config(**SIZES, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    size, crop = {"shortest_edge": 28}, {"height": 28, "width": 28}
    BitImageProcessorPil(size=size, crop_size=crop).save_pretrained(folder)
    return folder


def make_clip(folder: Path) -> Path:
    """Make a CLIP that has learned nothing, with a real tokenizer."""
    torch.manual_seed(0)
    write_tokenizer(folder, "<|endoftext|>")
    sizes = SIZES | {"intermediate_size": 32, "projection_dim": 8}
    text = CLIPTextConfig(**sizes, vocab_size=1000).to_dict()
    seen = CLIPVisionConfig(**sizes, image_size=32, patch_size=16).to_dict()
    config = CLIPConfig(text_config=text, vision_config=seen, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    size, crop = {"shortest_edge": 32}, {"height": 32, "width": 32}
    CLIPImageProcessorPil(size=size, crop_size=crop).save_pretrained(folder)
    return folder
