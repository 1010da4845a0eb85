"""Latents and tokens of transformers: the VAE that several share, and how latents become tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from train_lora import Located, Part, Record, decode_kl

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from train_lora import torch  # which is imported when it is asked for

VAE = Part(
    folder="vae",
    library="diffusers",
    class_name="AutoencoderKL",
    stem="diffusion_pytorch_model",
    limits={
        "latent_channels": (16, 16),
        "scaling_factor": (1e-3, 1e3),
        "shift_factor": (-1e3, 1e3),
        "block_out_channels": (1, 16_384),
    },
)


def scale_kl(latents: Tensor, vae: Record) -> Tensor:
    """Give latents the scale and the centre that the denoiser knows."""
    return (latents - float(vae["shift_factor"])) * float(vae["scaling_factor"])


def decode_shifted_kl(vae: Any, latents: Tensor, tile: int | None) -> Tensor:
    """Turn what the denoiser sees into pixels, in pieces where a size for them is given."""
    return decode_kl(vae, latents + vae.config.shift_factor * vae.config.scaling_factor, tile)


def pack(latents: Tensor) -> Tensor:
    """Make tokens of 2 × 2 latents: [b, c, h, w] to [b, h/2 · w/2, 4 · c]."""
    batch, channels, high, wide = latents.shape
    cut = latents.view(batch, channels, high // 2, 2, wide // 2, 2)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, high * wide // 4, 4 * channels)


def unpack(tokens: Tensor, high: int, wide: int) -> Tensor:
    """Put tokens back to their places: the way back of `pack`."""
    batch, _, channels = tokens.shape
    cut = tokens.view(batch, high // 2, wide // 2, channels // 4, 2, 2)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, high, wide)


def places(high: int, wide: int, axes: int, device: torch.device) -> Tensor:
    """Number the tokens of a picture by row and column, on the second and third axis."""
    ids = torch.zeros(high, wide, axes, device=device)
    ids[..., 1] += torch.arange(high, device=device)[:, None]
    ids[..., 2] += torch.arange(wide, device=device)
    return ids.view(high * wide, axes)


def vae_sizes(vae: Located, patch: int = 2) -> Record:
    """Take from a VAE of the usual kind how far it reduces a side, and how wide it is."""
    factor: int = 2 ** (len(vae.config.get("block_out_channels", (128, 256, 512, 512))) - 1)
    width = vae.shapes.get("decoder.conv_out.weight", (3, 128))[1]
    return {"vae_scale_factor": factor, "vae_width": width, "pixel_step": factor * patch}
