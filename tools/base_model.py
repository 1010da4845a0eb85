"""A base model as the trainer finds it and loads it, for programs that draw with or compare it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import train_lora
from tools.program import refuse
from train_lora import (
    BaseModel,
    Cache,
    Conditioning,
    Emitter,
    ModelFacts,
    Models,
    Record,
    Sketch,
    StopRequest,
    TrainError,
    TrainingConfig,
    Wanted,
    counted,
)

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from tools.lora_file import Layer, LoRA

Tokens = dict[str, Conditioning]  # of every text, for each text encoder


def ask_for(base_model: str, **knobs: Any) -> TrainingConfig:
    """Say which model is meant, and what of it is wanted, as the trainer is asked for it."""
    nowhere: Record = {"dataset_path": ".no dataset", "output_path": ".no output"}
    asked = {"base_model": base_model, "trigger_words": ["none"], "resume": "never", **nowhere}
    return TrainingConfig.from_record(asked | {k: v for k, v in knobs.items() if v is not None})


def find_model(
    config: TrainingConfig, events: Emitter, stop: StopRequest | None = None
) -> tuple[ModelFacts, BaseModel]:
    """Find a model on this machine, or fetch it; an error names the model and no knob."""
    try:
        facts, base = train_lora.inspect_model(config)
        if base:
            return facts, base
        return train_lora.download_model(config, events, stop or StopRequest())
    except TrainError as error:
        problem = error.problems[0]
        if problem.path != "base_model":
            raise
        found, hint = problem.found, problem.hint
        raise refuse(config.base_model, problem.expected, found, hint) from error


def title_of(config: TrainingConfig) -> str:
    """Name a model as it may be passed on: never where it lies on somebody's disk."""
    place = train_lora.expand_home(config.base_model)
    return place.name if place.exists() else config.base_model


def load_models(
    config: TrainingConfig, events: Emitter, stop: StopRequest, *, exact: bool = False
) -> Models:
    """Load all of a base model, by the trainer's own loaders; text is read in full precision.

    What is to be saved again is loaded exactly, where there is room for it: in main memory.
    """
    import torch

    train_lora.quiet_libraries()
    find_model(config, events, stop)  # whose errors name the model
    _, base = train_lora.download_model(config, events, stop)
    device = torch.device("cpu") if exact else train_lora.choose_device(config)
    dtype = torch.float32
    if not exact:
        dtype = train_lora.choose_precision(config, device, events, base.family)
    models = Models.prepare(base, device, dtype)
    models.load_text_encoders(models.text_dtype)
    models.load_denoiser()
    models.load_vae()
    return models


def networks_of(models: Models) -> dict[str, Any]:
    """List the networks that a LoRA may change, by their folders' names."""
    family = models.base.family
    texts = zip(family.text_encoders, models.text_encoders, strict=True)
    return {family.denoiser.folder: models.denoiser, **{part.folder: net for part, net in texts}}


def find_layers(models: Models, lora: LoRA) -> tuple[list[tuple[Any, Layer]], list[str]]:
    """Find the layers that a LoRA is for, and name those that the base does not have."""
    networks, found, unknown = networks_of(models), [], []
    for module, layer in lora.layers.items():
        target = find_layer(networks.get(module.network), module.name)
        if target is None:
            unknown.append(f"{module.network}.{module.name}")
            continue
        if tuple(target.weight.shape[1:]) != tuple(layer.down.shape[1:]):
            told = f"{[*layer.down.shape]} for {[*target.weight.shape]} at {module.name}"
            raise refuse(lora.source, "a LoRA of the base's family", told)
        found.append((target, layer))
    if not found:
        told = f"none of its {counted(len(unknown), 'layer')}, such as {unknown[0]}"
        raise refuse(lora.source, "a LoRA of the base's family", told)
    return found, unknown


def find_layer(network: Any, name: str) -> Any:
    """Find a layer by its name in files; some versions of libraries have one level more."""
    for place in (name, f"text_model.{name}"):
        try:
            return network.get_submodule(place)
        except AttributeError:
            continue
    return None


# --- A LoRA beside a model ---


class Attached:
    """A LoRA at work: its layers add what they compute to what the model's layers compute.

    The model's own numbers stay as they are, so that nothing of one LoRA or strength is left when
    the next one comes.
    """

    def __init__(self, models: Models, lora: LoRA) -> None:
        """Put hooks on the layers it is for; refuse a LoRA of another family."""
        found, self.unknown = find_layers(models, lora)
        self.strength = 1.0
        self.handles = [
            target.register_forward_hook(self.hook(target, layer)) for target, layer in found
        ]

    def hook(self, target: Any, layer: Layer) -> Any:
        """Make what runs after a layer."""
        import torch

        weight, convolves = target.weight, isinstance(target, torch.nn.Conv2d)
        down = layer.down.to(weight.device, weight.dtype)
        up = (layer.up.float() * layer.scale).to(weight.device, weight.dtype)

        def add(_: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            if not self.strength:
                return output
            compute = torch.nn.functional.linear
            if convolves:
                own = {"stride": target.stride, "padding": target.padding}
                inner = torch.nn.functional.conv2d(inputs[0], down, **own)
                return output + self.strength * torch.nn.functional.conv2d(inner, up)
            return output + self.strength * compute(compute(inputs[0], down), up)

        return add

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self.handles:
            handle.remove()


# --- Drawing ---


def draw(
    models: Models, tokens: Tokens, wanted: Wanted, sketch: Sketch, stop: StopRequest
) -> list[Image.Image | None]:
    """Draw pictures together as the trainer's previews are drawn, of any size.

    None stands for one whose numbers went beyond all bounds, as of a LoRA at too much strength.
    """
    import torch

    with torch.no_grad():
        prompts, seeds = zip(*wanted, strict=True)
        pairs = train_lora.read_pairs(models, Cache((), tokens), prompts, sketch)
        latents = train_lora.sample_latents(models, pairs, sketch, seeds, stop)
        vae = models.load_vae().to(models.device)
        try:
            return [decode(models, each[None]) for each in latents]
        finally:
            vae.to("cpu")


def decode(models: Models, latents: torch.Tensor) -> Image.Image | None:
    """Turn latents into a picture, if they are numbers."""
    try:
        return train_lora.decode_picture(models, latents)
    except ArithmeticError:
        return None
