"""A small CLIP that learned to see and read the shapes of the examples, in a minute.

No published model can be fetched by a test. This one has seen thousands of coloured shapes with
their captions, as the bundled base model has, and never the imp: what it knows of the imp is what
a published CLIP knows of a subject that it was not taught either.
"""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from shapes import PALETTE, draw_scene, invent_scene

TINY_SD = Path(__file__).resolve().parents[2] / "examples" / "tiny-sd"
SIDE, SCENES, STEPS, BATCH = 64, 3000, 400, 64
SIZES: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4}


def new_clip(tokenizer: Any) -> Any:
    """Make one that has learned nothing."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = CLIPTextConfig(
        **SIZES,
        **ids,
        vocab_size=len(tokenizer),
        max_position_embeddings=16,
        num_hidden_layers=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    seen = CLIPVisionConfig(**SIZES, image_size=SIDE, patch_size=8, num_hidden_layers=3)
    parts = {"text_config": text.to_dict(), "vision_config": seen.to_dict()}
    return CLIPModel(CLIPConfig(**parts, projection_dim=48))


def make_shape_eyes(folder: Path) -> Path:
    """Teach a CLIP which pictures and captions of shapes belong together; save it."""
    torch.manual_seed(0)
    chance = random.Random(5)
    shutil.copytree(TINY_SD / "tokenizer", folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    options: dict[str, Any] = {"size": {"shortest_edge": SIDE}, "crop_size": size}
    processor = CLIPImageProcessorPil(**options)
    scenes = [invent_scene(chance) for _ in range(SCENES)]
    pictures = [draw_scene(scene).resize((SIDE, SIDE)) for scene in scenes]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    limits: dict[str, Any] = {"padding": "max_length", "max_length": 16, "truncation": True}
    words = tokenizer([s.caption for s in scenes], **limits, return_tensors="pt")
    clip = new_clip(tokenizer)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-3, weight_decay=0.05)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, STEPS)
    for _ in range(STEPS):
        rows = torch.randperm(SCENES)[:BATCH]
        given = {name: numbers[rows] for name, numbers in words.items()}
        loss = clip(pixel_values=pixels[rows], **given, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    clip.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    sys.stdout.write(f"{make_shape_eyes(Path(sys.argv[1]))}: {len(PALETTE)} colours\n")
