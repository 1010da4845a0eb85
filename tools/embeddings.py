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
KEY_BYTES, NUMBER = 32, np.dtype("<f8")  # of a row in a file: whose it is, and what it holds


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

    @property
    def width(self) -> int:
        """Count the numbers of a row."""
        config = self.model.config
        return int(config.projection_dim if self.reads else config.hidden_size)

    @functools.cached_property
    def key(self) -> str:
        """Tell all that a row depends on, beside the picture."""
        import transformers

        told = [self.digest, self.device, torch.__version__, transformers.__version__]
        configs = (self.model.config.to_json_string(), self.processor.to_json_string())
        return train_lora.digest_of([*told, *configs], 12)

    def record(self) -> Record:
        """Say which model a number was made with."""
        return {"model": self.name, "sha256": self.digest}

    def see(
        self, files: Sequence[Path], phase: Phase, done: int = 0, kept: Kept | None = None
    ) -> Numbers:
        """Turn pictures, of which is known that they can be read, into rows of length one.

        What an earlier start has kept is taken from there.
        """
        kept = kept or Kept(self)
        keys = [digest_of(file) for file in files]
        unseen = {k: file for k, file in zip(keys, files, strict=True) if k not in kept.rows}
        for begin in range(0, len(unseen), AT_ONCE):
            phase.at(done + len(files) - len(unseen) + begin)
            some = [*unseen][begin : begin + AT_ONCE]
            images = [train_lora.load_picture(unseen[key]) for key in some]
            kept.add(dict(zip(some, unit(self.vectors(images)), strict=True)))
        return kept.of(keys)

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


def digest_of(file: Path) -> bytes:
    """Tell a picture by its bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


class Kept:
    """What a model has seen, by picture; in a file that grows as it sees, for a second start."""

    def __init__(self, eye: Eye, folder: Path | None = None) -> None:
        """Take what an earlier start left. Without a folder, nothing outlives this one."""
        self.path = folder / f".seen_{eye.key}" if folder else None
        self.rows: dict[bytes, Numbers] = {}
        self.asked: set[bytes] = set()
        self.width, self.size = eye.width, KEY_BYTES + eye.width * NUMBER.itemsize
        if self.path and self.path.is_file():
            self.take(self.path.read_bytes())

    def take(self, content: bytes) -> None:
        """Read rows up to one that is torn, or that is no row of length one."""
        for begin in range(0, len(content) - self.size + 1, self.size):
            key, place = content[begin : begin + KEY_BYTES], begin + KEY_BYTES
            row = np.frombuffer(content, NUMBER, self.width, place)
            if not (np.abs(row) <= 1).all() or abs(np.linalg.norm(row) - 1) > 1e-9:
                break
            self.rows[key] = row
        if self.path and len(content) != len(self.rows) * self.size:
            train_lora.write_whole(self.path, written(self.rows))

    def add(self, rows: dict[bytes, Numbers]) -> None:
        """Keep rows, at the end of the file."""
        self.rows |= rows
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(written(rows))

    def of(self, keys: Sequence[bytes]) -> Numbers:
        """Take the rows of some pictures."""
        self.asked.update(keys)
        return np.asarray([self.rows[key] for key in keys])

    def tidy(self) -> None:
        """Forget pictures that nobody asked for, when they are most of what is kept."""
        if self.path and len(self.rows) > 2 * len(self.asked):
            rows = {key: row for key, row in self.rows.items() if key in self.asked}
            train_lora.write_whole(self.path, written(rows))


def written(rows: dict[bytes, Numbers]) -> bytes:
    """Write rows as a file holds them."""
    return b"".join(key + row.astype(NUMBER).tobytes() for key, row in rows.items())


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
