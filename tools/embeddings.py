"""Pictures and texts as vectors, by models that see and read: DINOv2 and CLIP.

Models come from a local folder or from the Hugging Face cache; nothing is downloaded here.
Pictures are prepared by Pillow, whatever else is installed, so that a number means the same
everywhere.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import train_lora
from tools.intervals import unit
from tools.program import refuse
from train_lora import Phase, Record

if TYPE_CHECKING:
    from PIL import Image

Numbers = np.ndarray[Any, np.dtype[Any]]

VISION = "facebook/dinov2-small"
CLIP = (
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"  # no family's own text encoder: it would judge itself
)
AT_ONCE = 16


def load(name: str, class_name: str) -> Any:
    """Load one of the library's classes, from safetensors on this machine alone."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ["HF_HUB_OFFLINE"] = "1"
    options: dict[str, Any] = {"local_files_only": True}
    if class_name == "AutoImageProcessor":
        options["backend"] = "pil"
    elif class_name.endswith("Model"):
        options["use_safetensors"] = True
    try:
        return getattr(transformers, class_name).from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:
        hint = f"With a network: hf download {name}" if "/" in name else "Give another folder."
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise refuse(name, f"a {class_name} on this machine", said[0], hint) from error


class Eye:
    """A model that turns pictures into unit vectors: DINOv2, or the seeing half of CLIP."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        """Load it with what prepares pictures for it."""
        self.name, self.device = Path(name).name if Path(name).is_dir() else name, device
        self.folder = config_of(name).parent
        kind = train_lora.read_json_file(self.folder / "config.json").get("model_type")
        self.reads = kind == "clip"
        if kind not in ("clip", "dinov2", "vit"):
            raise refuse(name, "a CLIP, DINOv2 or ViT model", f"one of type {kind}")
        class_name = {"clip": "CLIPModel", "dinov2": "Dinov2Model", "vit": "ViTModel"}[str(kind)]
        self.model = load(name, class_name).eval().to(device)
        self.processor = load(name, "AutoImageProcessor")
        self.tokenizer = load(name, "AutoTokenizer") if self.reads else None

    @functools.cached_property
    def digest(self) -> str | None:
        """Tell the model by its numbers."""
        files = sorted(self.folder.glob("*.safetensors"))
        whole = hashlib.sha256()
        for file in files:
            with file.open("rb") as opened:
                whole.update(hashlib.file_digest(opened, "sha256").digest())
        return whole.hexdigest() if files else None

    def record(self) -> Record:
        """Say which model a number was made with."""
        return {"model": self.name, "sha256": self.digest}

    def see(self, files: Sequence[Path], phase: Phase, done: int = 0) -> Numbers:
        """Turn pictures, of which is known that they can be read, into rows of length one."""
        rows: list[Numbers] = []
        for begin in range(0, len(files), AT_ONCE):
            phase.at(done + begin)
            images = [train_lora.load_picture(file) for file in files[begin : begin + AT_ONCE]]
            rows += list(self.vectors(images))
        return unit(rows)

    def vectors(self, images: Sequence[Image.Image]) -> Numbers:
        """Let the model see some pictures; in full precision, alike whatever the batch."""
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            pixels = pixels.to(self.device, torch.float32)
            if self.reads:
                found = self.model.get_image_features(pixel_values=pixels).pooler_output
            else:  # the pooled output of some of these has numbers that were never trained
                found = self.model(pixel_values=pixels).last_hidden_state[:, 0]
        return np.asarray(found.double().cpu().numpy())

    def read(self, texts: Sequence[str]) -> Numbers:
        """Turn texts into rows of length one; only CLIP reads."""
        if self.tokenizer is None:
            raise refuse(self.name, "a model that reads", "one that only sees")
        options = {"padding": True, "truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizer(list(texts), **options).to(self.device)
        with torch.no_grad():
            found = self.model.get_text_features(**tokens).pooler_output
        return unit(found.double().cpu().numpy())


def config_of(name: str) -> Path:
    """Find a model's config: in its folder, or in the Hugging Face cache."""
    if Path(name).is_dir():
        return Path(name) / "config.json"
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    if not isinstance(found, str):
        hint = f"With a network: hf download {name}"
        raise refuse(name, "a folder, or a model in the Hugging Face cache", "neither", hint)
    return Path(found)
