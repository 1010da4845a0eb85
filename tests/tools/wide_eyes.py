"""An embedding for the example's drawings, where no published model can be fetched.

A DINOv2 that has learned nothing, but is wide: the mean of many random features of patches. It
tells drawings of few colours apart by which colours and edges they are made of, wherever those
lie, as places count for nothing in it. Photos it would not tell apart as a learned one does.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

SIDE, WIDTH, SPREAD = 224, 384, 0.1


def make_wide_eyes(folder: Path, seed: int = 0) -> Path:
    """Draw its weights, and save it."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Dinov2Config(**sizes, image_size=SIDE, patch_size=14)  # type: ignore[arg-type]
    model = Dinov2Model(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "weight" in name:
                weight.normal_(std=SPREAD)
        model.embeddings.position_embeddings.zero_()
    model.save_pretrained(folder)
    size, crop = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    BitImageProcessorPil(size=size, crop_size=crop).save_pretrained(folder)
    return folder
