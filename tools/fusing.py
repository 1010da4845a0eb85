"""A LoRA put into its base: the whole model saved anew, and held against both of them."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import train_lora
from tools.base_model import Attached, ask_for, draw, find_layers, load_models, networks_of
from tools.program import as_json, refuse, remark
from train_lora import Emitter, Models, PhaseFacts, Record, Sketch, StopRequest, counted

if TYPE_CHECKING:
    from PIL import Image

    from tools.lora_file import LoRA
    from train_lora import TrainingConfig

FORMAT, VERSION = "fused-model", 1
NOTE = "fused.json"  # stands in the folder, and says what was made of what
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VISIBLE = 1.0  # of 255: two pictures nearer to each other are one to the eye


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is put together, and the picture by which it is checked; None checks nothing."""

    config: TrainingConfig  # which names the model
    base: Record  # what it is
    lora: LoRA
    digest: str | None  # of the LoRA's file
    strength: float
    precision: str
    sketch: Sketch | None
    prompt: str
    seed: int


@dataclass(frozen=True)
class Views:
    """The same picture by the base alone, and by base and LoRA side by side."""

    alone: Image.Image
    both: Image.Image


def fuse(wish: Wish, out: Path, events: Emitter, stop: StopRequest) -> str:
    """Save the model with the LoRA in it, if it draws what both draw; return what was done."""
    staging = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)  # of a start that was killed
    try:
        models = load_models(wish.config, events, stop, exact=True)
        views = views_of(models, wish, stop) if wish.sketch else None
        stop.check()
        changed, unknown = add_to_weights(models, wish.lora, wish.strength)
        if unknown:
            some = f"{counted(len(unknown), 'layer')}, such as {unknown[0]}"
            remark(events, f"{wish.lora.source} changes {some} that the base does not have")
        told = f"{out.name}: {counted(changed, 'layer')} changed, saved in {wish.precision}"
        save(models, staging, PRECISIONS[wish.precision], events)
        del models
        check = compare(staging, wish, views, events, stop) if views else None
        train_lora.write_whole(staging / NOTE, as_json(note_of(wish, changed, check)))
        settle(staging)
        staging.rename(out)
        train_lora.sync_folder(out.absolute().parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return f"{told}; {sentence(check)}" if check else told


def views_of(models: Models, wish: Wish, stop: StopRequest) -> Views:
    """Draw what the fused model will be held against."""
    attached, views = Attached(models, wish.lora), []
    for strength in (0.0, wish.strength):
        attached.strength = strength
        views.append(view(models, wish, stop))
    attached.remove()
    return Views(*views)


def view(models: Models, wish: Wish, stop: StopRequest) -> Image.Image:
    """Draw the picture that is compared."""
    sketch = wish.sketch or Sketch(0, 0, 0, 0, "")
    texts = [("the prompt", wish.prompt), ("the negative prompt", sketch.negative)]
    tokens = train_lora.tokenize(texts, models, Emitter())
    (image,) = draw(models, tokens, [(wish.prompt, wish.seed)], sketch, stop)
    if image is None:
        found = f"numbers beyond all bounds at strength {wish.strength:g} in {wish.precision}"
        raise refuse(wish.lora.source, "a LoRA with which the base draws", found)
    return image


def add_to_weights(models: Models, lora: LoRA, strength: float) -> tuple[int, list[str]]:
    """Change the model's own numbers as a LoRA does; count the layers, and name the unknown."""
    found, unknown = find_layers(models, lora)
    with torch.no_grad():
        for target, layer in found:
            target.weight += (strength * layer.delta()).to(target.weight)
    return len(found), unknown


def save(models: Models, folder: Path, dtype: torch.dtype, events: Emitter) -> None:
    """Save a model as a folder that diffusers loads; it is rounded only after all was added."""
    events.emit(PhaseFacts(name="saving the model", done=0, total=None))
    if models.base.family.write_lora:
        save_around(models, folder, dtype)
        return
    for network in (*networks_of(models).values(), models.load_vae()):
        network.to(dtype)
    pipeline_of(models).save_pretrained(folder, safe_serialization=True)


def save_around(models: Models, folder: Path, dtype: torch.dtype) -> None:
    """Save a transformer among copies of all else: its text encoders were not loaded as a whole."""
    parts, denoiser = models.base.parts, models.base.family.denoiser
    index = parts[denoiser].folder.parent / "model_index.json"
    if not index.is_file():
        raise refuse("--base", "a folder that diffusers loads", "a file of the transformer alone")
    folder.mkdir()
    shutil.copyfile(index, folder / index.name)
    for part in models.base.family.configured:
        if part != denoiser:
            shutil.copytree(parts[part].folder, folder / part.folder)
    models.denoiser.to(dtype).save_pretrained(folder / denoiser.folder)


def pipeline_of(models: Models) -> Any:
    """Put the networks together as diffusers knows them."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    parts, family = networks_of(models), models.base.family
    parts |= {part.folder: t for part, t in zip(family.tokenizers, models.tokenizers, strict=True)}
    parts |= {family.vae.folder: models.vae, family.sampler.folder: models.schedule}
    if len(family.text_encoders) > 1:
        return StableDiffusionXLPipeline(**parts)
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, **nothing)


def compare(folder: Path, wish: Wish, views: Views, events: Emitter, stop: StopRequest) -> Record:
    """Load what was saved, and tell how far its picture is from the one it should draw."""
    models = load_models(ask_for(str(folder)), events, stop, exact=True)
    off, most = apart(view(models, wish, stop), views.both)
    moved, _ = apart(views.alone, views.both)
    if off > max(VISIBLE, moved / 2):
        found = f"one that is {off:.1f} of 255 off, where the LoRA changes {moved:.1f}"
        raise refuse(folder.name, "the picture of base and LoRA", found, "Try --dtype fp32.")
    return {"off": round(off, 4), "off_at_most": most, "lora_changes": round(moved, 4)}


def apart(one: Image.Image, other: Image.Image) -> tuple[float, int]:
    """Tell how far two pictures are apart, on average and at most, of 255."""
    from PIL import ImageChops, ImageStat

    gaps = ImageStat.Stat(ImageChops.difference(one, other))
    return sum(gaps.mean) / len(gaps.mean), int(max(high for _, high in gaps.extrema))


def sentence(check: Record) -> str:
    """Say how close the fused model is."""
    off, most, moved = check["off"], check["off_at_most"], check["lora_changes"]
    return (
        f"it draws what base and LoRA draw but for {off:.2f} of 255, {most} at most "
        f"(the LoRA changes {moved:.1f})"
    )


def note_of(wish: Wish, changed: int, check: Record | None) -> Record:
    """Write down what was made of what."""
    asked = {"prompt": wish.prompt, "seed": wish.seed, **(vars(wish.sketch) if wish.sketch else {})}
    return {
        "format": FORMAT,
        "version": VERSION,
        "base": wish.base,
        "lora": {"file": wish.lora.source, "sha256": wish.digest},
        "strength": wish.strength,
        "dtype": wish.precision,
        "layers": changed,
        "check": check and asked | check,
    }


def settle(folder: Path) -> None:
    """Wait until the disk has all of a folder: it is renamed only then."""
    for path in folder.rglob("*"):
        if path.is_dir():
            train_lora.sync_folder(path)
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
    train_lora.sync_folder(folder)
