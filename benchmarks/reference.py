"""The textbook loop, to compare with: what diffusers' own text-to-image LoRA examples do.

Every step decodes and resizes its images, lets the VAE encode them and the text encoders read
their captions; PEFT adapts the attention layers, AdamW learns, and accelerate does the rest. One
JSON line a step goes to standard output.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENS = 77
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


def parse_arguments() -> argparse.Namespace:
    """Read the command line, which all loops share."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--save", type=Path, help="folder for the LoRA")
    return parser.parse_args()


def tell(**facts: Any) -> None:
    """Write one line."""
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


class Pictures(Dataset[dict[str, torch.Tensor]]):
    """Images and captions, prepared each time they are asked for."""

    def __init__(self, folder: Path, tokenizers: list[Any], resolution: int, length: int) -> None:
        """List the files and read the captions."""
        self.files, self.resolution = sorted(folder.glob("*.png")), resolution
        captions = [path.with_suffix(".txt").read_text("utf-8").strip() for path in self.files]
        options = {"padding": "max_length", "max_length": length, "truncation": True}
        self.tokens = [t(captions, return_tensors="pt", **options).input_ids for t in tokenizers]

    def __len__(self) -> int:
        """Count the images."""
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Load one image, resized and cropped to a square."""
        side = self.resolution
        picture = Image.open(self.files[index]).convert("RGB")
        scale = side / min(picture.size)
        wide, high = (max(side, round(length * scale)) for length in picture.size)
        picture = picture.resize((wide, high), Image.Resampling.BILINEAR)
        left, top = (wide - side) // 2, (high - side) // 2
        pixels = np.asarray(picture.crop((left, top, left + side, top + side)), dtype=np.float32)
        item = {"pixels": torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)}
        return item | {f"tokens_{n}": each[index] for n, each in enumerate(self.tokens)}


def read_captions(encoders: list[Any], batch: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    """Let the text encoders read a batch of captions."""
    if len(encoders) == 1:
        return encoders[0](batch["tokens_0"]).last_hidden_state, None
    said = [e(batch[f"tokens_{n}"], output_hidden_states=True) for n, e in enumerate(encoders)]
    return torch.cat([s.hidden_states[-2] for s in said], dim=-1), said[1].text_embeds


@dataclass
class Networks:
    """What a base model consists of."""

    unet: Any
    vae: Any
    encoders: list[Any]
    tokenizers: list[Any]
    schedule: Any

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> Networks:
        """Load everything at once and freeze it."""
        kinds: list[Any] = [CLIPTextModel, CLIPTextModelWithProjection]
        parts = [p for p in ("text_encoder", "text_encoder_2") if (folder / p).is_dir()]
        loaded = cls(
            unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
            vae=AutoencoderKL.from_pretrained(folder / "vae"),
            encoders=[k.from_pretrained(folder / p) for k, p in zip(kinds, parts, strict=False)],
            tokenizers=[
                CLIPTokenizer.from_pretrained(folder / part.replace("text_encoder", "tokenizer"))
                for part in parts
            ],
            schedule=DDPMScheduler.from_pretrained(folder / "scheduler"),
        )
        # SDXL's own VAE overflows in half precision, so its example keeps that one in full.
        loaded.vae.to(device, torch.float32 if len(parts) > 1 else dtype)
        for network in (loaded.unet, *loaded.encoders):
            network.to(device, dtype)
        for network in (loaded.unet, loaded.vae, *loaded.encoders):
            network.requires_grad_(requires_grad=False)
        return loaded

    def loss(self, unet: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Encode a batch, add noise to it and hold the denoiser's answer against that."""
        pixels = batch["pixels"].to(self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.sample() * self.vae.config.scaling_factor
        latents = latents.to(self.unet.dtype)
        noise, count = torch.randn_like(latents), len(latents)
        times = torch.randint(0, len(self.schedule), (count,), device=latents.device).long()
        noisy = self.schedule.add_noise(latents, noise, times)
        hidden, pooled = read_captions(self.encoders, batch)
        told = None
        if pooled is not None:
            size = list(pixels.shape[2:])
            sizes = torch.tensor([[*size, 0, 0, *size]] * count, device=latents.device)
            told = {"text_embeds": pooled, "time_ids": sizes.to(latents.dtype)}
        answer = unet(noisy, times, hidden, added_cond_kwargs=told, return_dict=False)[0]
        wanted = noise
        if self.schedule.config.prediction_type == "v_prediction":
            wanted = self.schedule.get_velocity(latents, noise, times)
        return functional.mse_loss(answer.float(), wanted.float())


def main() -> None:
    """Train as the examples do."""
    given = parse_arguments()
    if given.seed is not None:
        set_seed(given.seed)
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    device, half = accelerator.device, accelerator.mixed_precision == "bf16"
    networks = Networks.load(given.model, device, torch.bfloat16 if half else torch.float32)
    networks.unet.add_adapter(
        LoraConfig(
            r=given.rank,
            lora_alpha=given.rank,
            init_lora_weights="gaussian",
            target_modules=TARGETS,
        )
    )
    if half:
        cast_training_params(networks.unet, torch.float32)
    layers = [p for p in networks.unet.parameters() if p.requires_grad]

    length = min(TOKENS, *(e.config.max_position_embeddings for e in networks.encoders))
    data = Pictures(given.data, networks.tokenizers, given.resolution, length)
    loader: Any = DataLoader(data, batch_size=given.batch, shuffle=True)
    optimizer: Any = torch.optim.AdamW(layers, lr=given.rate, weight_decay=1e-2)
    rates: Any = get_scheduler("constant", optimizer)
    unet, optimizer, loader, rates = accelerator.prepare(networks.unet, optimizer, loader, rates)

    unet.train()
    step, began = 0, time.monotonic()
    while step < given.steps:
        for batch in itertools.islice(loader, given.steps - step):
            with accelerator.accumulate(unet):
                loss = networks.loss(unet, batch)
                mean = accelerator.gather(loss.repeat(given.batch)).mean().item()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(layers, 1.0)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
            step, now = step + 1, time.monotonic()
            tell(step=step, loss=mean, seconds=now - began)
            began = now
    if given.save:
        layers_of_lora = get_peft_model_state_dict(accelerator.unwrap_model(unet))
        StableDiffusionPipeline.save_lora_weights(
            given.save, convert_state_dict_to_diffusers(layers_of_lora)
        )
    tell(peak_bytes=torch.cuda.max_memory_reserved() if device.type == "cuda" else None)


if __name__ == "__main__":
    main()
