"""A bare step: forward, backward, clip, update, on random latents, and nothing else.

It also counts the operations of a step, and measures how many this machine does in plain matrix
products, which nothing in a step can exceed.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from reference import TARGETS, parse_arguments, tell


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the best rate of a large matrix product, in operations per second."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in "ab")
    best = float("inf")
    for _ in range(8):
        began = time.monotonic()
        for _ in range(4):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.monotonic() - began) / 4)
    return 2 * side**3 / best


def main() -> None:
    """Make the steps."""
    given = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = matmul_rate(device, dtype)
    unet: Any = UNet2DConditionModel.from_pretrained(given.model / "unet", torch_dtype=dtype)
    unet.requires_grad_(requires_grad=False).to(device)
    unet.add_adapter(LoraConfig(r=given.rank, lora_alpha=given.rank, target_modules=TARGETS))
    cast_training_params(unet, torch.float32)
    layers = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(layers, lr=1e-4, fused=True)

    side = given.resolution // 8
    noisy, wanted = (torch.randn(given.batch, 4, side, side, device=device) for _ in "ab")
    times = torch.randint(0, 1000, (given.batch,), device=device)
    tokens = 16 if unet.config.cross_attention_dim < 256 else 77
    hidden = torch.randn(given.batch, tokens, unet.config.cross_attention_dim, device=device)
    told = None
    if unet.config.addition_embed_type:
        sizes = 6 * unet.config.addition_time_embed_dim
        pooled = unet.config.projection_class_embeddings_input_dim - sizes
        told = {"text_embeds": torch.randn(given.batch, pooled, device=device)}
        told["time_ids"] = torch.full((given.batch, 6), 1024.0, device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            answer = unet(noisy, times, hidden, added_cond_kwargs=told).sample
        functional.mse_loss(answer.float(), wanted).backward()
        torch.nn.utils.clip_grad_norm_(layers, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    unet.train()
    for number in range(1, given.steps + 1):
        began = time.monotonic()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        tell(step=number, seconds=time.monotonic() - began)
    with FlopCounterMode(display=False) as counter:
        step()
    peak = torch.cuda.max_memory_reserved() if device.type == "cuda" else None
    tell(peak_bytes=peak, operations=counter.get_total_flops(), rate=rate)


if __name__ == "__main__":
    main()
