"""Draw what LoRAs do: prompts × LoRAs × strengths × seeds, with contact sheets and a list of all.

python tools/generate.py --base MODEL --lora RUN_DIR --prompts FILE --seeds 1-4 --out DIR
python tools/generate.py --base MODEL --lora FILE --strengths 0.8 --fuse DIR

RUN_DIR stands for all LoRAs of a run. What is drawn already is not drawn again.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_lora
from tools.program import as_json, command_line, refuse, remark, run, take_events
from train_lora import Emitter, Phase, Record, StopRequest, TrainingConfig

if TYPE_CHECKING:
    from PIL import Image

    from tools.lora_file import LoRA

MOST_SIDE = 16_384  # pixels of a sheet; beyond, it goes on on another
MARGIN, LINE = 8, 20
CELL_KEY = "lora_grid"  # where a picture says which cell it is


@dataclass(frozen=True)
class Source:
    """A LoRA by the name it has in the grid; the base has no file."""

    name: str
    file: Path | None = None

    @property
    def step(self) -> int | None:
        """Take the step from a checkpoint's name."""
        found = re.search(r"step_(\d+)", self.file.stem) if self.file else None
        return int(found[1]) if found else None

    @functools.cached_property
    def digest(self) -> str | None:
        """Tell the file by its bytes."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest() if self.file else None


@dataclass(frozen=True)
class Cell:
    """One picture of the grid."""

    source: Source
    strength: float
    prompt: Record
    seed: int

    @property
    def name(self) -> str:
        """Name its file."""
        place = f"{self.prompt['id']}_w{self.strength:.2f}_s{self.seed}.png"
        return f"images/{self.source.name}/{place}"


# --- What is asked for ---


def parse_numbers(text: str) -> list[int]:
    """Read 1,2,5 and 1-4."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            found += range(int(first), int(last if dash else first) + 1)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected 1-4 or 1,2,5, got {text!r}") from error
    if not found or min(found) < 0 or len(found) > 10_000:
        raise argparse.ArgumentTypeError(f"expected 1 to 10,000 seeds from 0 on, got {text!r}")
    return list(dict.fromkeys(found))


def parse_strengths(text: str) -> list[float]:
    """Read 0.6,0.8,1."""
    try:
        return list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected 0.6,0.8,1, got {text!r}") from error


def find_sources(asked: Sequence[Path]) -> list[Source]:
    """Find the files; a run's folder stands for its checkpoints and what came of it."""
    files: list[Path] = []
    for path in asked:
        if path.is_dir() and not (path / "adapter_config.json").is_file():
            steps = sorted(
                path.glob("checkpoints/*.safetensors"), key=lambda p: train_lora.natural_key(p.name)
            )
            found = [*steps, *path.glob("lora_final.safetensors")]
            if not found:
                raise refuse(path, "a LoRA file or the output_path of a run", "neither")
            files += found
        else:
            files.append(path)
    names = [file.stem.removeprefix("lora_") for file in files]
    twice = {name for name in names if names.count(name) > 1}
    full = [
        f"{folder_of(file).name}_{name}" if name in twice else name
        for file, name in zip(files, names, strict=True)
    ]
    if len(set(full)) < len(full):
        raise refuse(files[-1], "LoRAs with names of their own", f"{full[-1]} twice")
    plain = [re.sub(r"[^\w.-]", "_", name) for name in full]
    return [Source(name, file) for name, file in zip(plain, files, strict=True)]


def folder_of(file: Path) -> Path:
    """Find the folder that a LoRA's run wrote to."""
    return file.parent.parent if file.parent.name == "checkpoints" else file.parent


def read_prompts(asked: Sequence[str], trigger_words: Sequence[str]) -> list[Record]:
    """Read prompts from a text or JSON file, or take them as they are."""
    entries: list[Any] = []
    for text in asked:
        path = Path(text)
        if path.suffix == ".json":
            try:
                entries += json.loads(path.read_text(encoding="utf-8-sig"))
            except (OSError, ValueError, TypeError, RecursionError) as error:
                raise refuse(path, "a list of prompts in JSON", str(error)) from error
        elif path.suffix == ".txt":
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            entries += [line.strip() for line in lines if line.strip() and line[0] != "#"]
        else:
            entries.append(text)
    prompts = []
    for number, entry in enumerate(entries):
        said = {"text": entry} if isinstance(entry, str) else entry
        if not isinstance(said, dict) or not isinstance(said.get("text"), str):
            raise refuse("--prompts", "texts, or objects with a text", train_lora.show(entry))
        plain = said.get("plain", without(said["text"], trigger_words))
        known = {"id": f"p{number:02}", "role": "subject", "plain": plain}
        prompts.append(known | said)
    if not prompts:
        raise refuse("--prompts", "at least one prompt", "none")
    return prompts


def without(text: str, words: Sequence[str]) -> str:
    """Leave trigger words out, which nobody but the LoRA knows."""
    for word in words:
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", "", text, flags=re.IGNORECASE)
    return " ".join(text.split()).strip(" ,")


def config_of(arguments: argparse.Namespace) -> TrainingConfig:
    """Say it as the trainer's previews are asked for."""
    out = arguments.out or arguments.fuse
    asked: Record = {
        "base_model": arguments.base,
        "dataset_path": str(out / ".no data"),
        "output_path": str(out),
        "trigger_words": ["none"],
        "sample_steps": arguments.steps,
        "sample_guidance": arguments.guidance,
        "sample_negative_prompt": arguments.negative,
        "device": arguments.device,
        "resume": "never",
    }
    if arguments.resolution:
        asked["resolution"] = arguments.resolution
    return TrainingConfig.from_record(asked)


# --- A LoRA beside a model ---


class Attached:
    """A LoRA at work: its layers add what they compute to what the model's layers compute.

    The model's own numbers stay as they are, so that nothing of one LoRA or strength is left when
    the next one comes.
    """

    def __init__(self, models: Any, lora: LoRA) -> None:
        """Put hooks on the layers it is for; refuse a LoRA of another family."""
        self.strength, self.handles, unknown = 1.0, [], []
        networks = networks_of(models)
        for module, layer in lora.layers.items():
            target = find_module(networks.get(module.network), module.name)
            if target is None:
                unknown.append(f"{module.network}.{module.name}")
                continue
            if tuple(target.weight.shape[1:]) != tuple(layer.down.shape[1:]):
                found = f"{[*layer.down.shape]} for {[*target.weight.shape]} at {module.name}"
                raise refuse(lora.source, "a LoRA of the base's family", found)
            self.handles.append(target.register_forward_hook(self.hook(target, layer)))
        self.unknown = unknown
        if not self.handles:
            found = f"none of its {len(unknown)} layers, such as {unknown[0]}"
            raise refuse(lora.source, "a LoRA of the base's family", found)

    def hook(self, target: Any, layer: Any) -> Any:
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


def networks_of(models: Any) -> dict[str, Any]:
    """List the networks that a LoRA may change, by their folders' names."""
    family = models.base.family
    texts = zip(family.text_encoders, models.text_encoders, strict=True)
    return {family.denoiser.folder: models.denoiser, **{part.folder: net for part, net in texts}}


def find_module(network: Any, name: str) -> Any:
    """Find a layer by its name in files; some versions of libraries have one level more."""
    for place in (name, f"text_model.{name}"):
        try:
            return network.get_submodule(place)
        except AttributeError:
            continue
    return None


def load_models(config: TrainingConfig, events: Emitter) -> Any:
    """Load all of a base model, by the trainer's own loaders; text is read in full precision."""
    import torch

    train_lora.quiet_libraries()
    _, base = train_lora.download_model(config, events)
    device = train_lora.choose_device(config)
    dtype = train_lora.choose_precision(config, device, events)
    models = train_lora.Models.prepare(base, device, dtype)
    models.load_text_encoders(torch.float32)
    models.load_denoiser("auto")
    models.load_vae()
    return models


# --- Drawing ---


def cells_of(
    sources: Sequence[Source], prompts: Sequence[Record], arguments: argparse.Namespace
) -> list[Cell]:
    """List the pictures; the base is drawn once for each prompt and seed."""
    arms = [(Source("base"), 0.0)]
    arms += [(source, strength) for source in sources for strength in arguments.strengths]
    return [Cell(*arm, p, seed) for arm in arms for p in prompts for seed in arguments.seeds]


def is_drawn(path: Path, key: str) -> bool:
    """Tell whether a picture is there and was drawn for the same request."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            return bool(json.loads(image.info.get(CELL_KEY, "{}")).get("key") == key)
    except (OSError, ValueError, AttributeError):
        return False


def write_picture(path: Path, image: Image.Image, cell: Cell, key: str, config: Any) -> None:
    """Write a picture with what it was made from, as A1111 says it and as this program does."""
    from PIL.PngImagePlugin import PngInfo

    side, info, buffer = config.resolution, PngInfo(), io.BytesIO()
    told = f"{cell.prompt['text']}\nNegative prompt: {config.sample_negative_prompt}\n"
    told += f"Steps: {config.sample_steps}, Sampler: DPM++ 2M, "
    told += f"CFG scale: {config.sample_guidance}, "
    told += f"Seed: {cell.seed}, Size: {side}x{side}, Lora: {cell.source.name}:{cell.strength:g}"
    place = {"lora": cell.source.name, "strength": cell.strength, "prompt": cell.prompt["id"]}
    info.add_itxt("parameters", told)
    info.add_itxt(CELL_KEY, json.dumps(place | {"seed": cell.seed, "key": key}))
    image.save(buffer, "PNG", pnginfo=info)
    train_lora.write_whole(path, buffer.getvalue())


def draw_all(
    cells: Sequence[Cell],
    config: TrainingConfig,
    arguments: argparse.Namespace,
    events: Emitter,
    stop: StopRequest,
) -> None:
    """Draw what is missing, LoRA after LoRA and strength after strength."""
    from tools.lora_file import read_lora

    keys = {cell.name: key_of(cell, config) for cell in cells}
    missing = [c for c in cells if not is_drawn(arguments.out / c.name, keys[c.name])]
    phase = Phase("drawing", len(cells), events, stop)
    if not missing:
        return
    models = load_models(config, events)
    texts = [cell.prompt["text"] for cell in missing]
    tokens = train_lora.tokenize([*texts, config.sample_negative_prompt], models, events)
    cache, done = train_lora.Cache((), tokens), len(cells) - len(missing)
    for source in dict.fromkeys(cell.source for cell in missing):
        attached = Attached(models, read_lora(source.file)) if source.file else None
        if attached and attached.unknown:
            some = f"{len(attached.unknown)} layers, such as {attached.unknown[0]}"
            remark(events, f"{source.name} changes {some} that the base does not have")
        for part in batches([c for c in missing if c.source == source], arguments.batch):
            if attached:
                attached.strength = part[0].strength
            wanted = [(cell.prompt["text"], cell.seed) for cell in part]
            images = train_lora.draw_previews(models, cache, wanted, config, stop)
            for cell, image in zip(part, images, strict=True):
                write_picture(arguments.out / cell.name, image, cell, keys[cell.name], config)
                done += 1
            phase.at(done)
        if attached:
            attached.remove()


def key_of(cell: Cell, config: TrainingConfig) -> str:
    """Sum up what a picture depends on."""
    knobs = ("base_model", "resolution", "sample_steps", "sample_guidance")
    asked = [str(config.value(knob)) for knob in (*knobs, "sample_negative_prompt")]
    what = [asked, cell.source.digest, cell.strength, cell.prompt["text"], cell.seed]
    return train_lora.digest_of(what, 12)


def batches(cells: Sequence[Cell], most: int) -> Iterator[list[Cell]]:
    """Cut cells into batches of one strength each."""
    for strength in dict.fromkeys(cell.strength for cell in cells):
        alike = [cell for cell in cells if cell.strength == strength]
        for begin in range(0, len(alike), most):
            yield alike[begin : begin + most]


# --- Sheets ---


def write_sheets(cells: Sequence[Cell], out: Path, side: int) -> list[Path]:
    """Lay the pictures of each prompt out: a row for each LoRA and strength, a column a seed."""
    written = []
    for prompt in {cell.prompt["id"]: cell.prompt for cell in cells}.values():
        own = [cell for cell in cells if cell.prompt["id"] == prompt["id"]]
        rows: dict[str, list[Cell]] = {}
        for cell in own:
            rows.setdefault(f"{cell.source.name} at {cell.strength:g}", []).append(cell)
        edge = min(side, 256)
        most = max(1, (MOST_SIDE - LINE) // (edge + LINE + MARGIN))
        labels = list(rows)
        for page, begin in enumerate(range(0, len(labels), most), start=1):
            part = {label: rows[label] for label in labels[begin : begin + most]}
            number = f"_{page}" if len(labels) > most else ""
            path = out / f"sheet_{prompt['id']}{number}.png"
            train_lora.write_whole(path, train_lora.encode_png(sheet(part, prompt, out, edge)))
            written.append(path)
    return written


def sheet(rows: dict[str, list[Cell]], prompt: Record, out: Path, edge: int) -> Image.Image:
    """Draw one contact sheet."""
    from PIL import Image, ImageDraw, ImageFont

    columns = min(max(map(len, rows.values())), MOST_SIDE // (edge + MARGIN) - 1)
    size = (columns * (edge + MARGIN) + MARGIN, LINE + len(rows) * (edge + LINE + MARGIN))
    page = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    draw.text((MARGIN, 2), prompt["text"], "black", font)
    for number, (label, cells) in enumerate(rows.items()):
        top = LINE + number * (edge + LINE + MARGIN)
        seeds = ", ".join(str(cell.seed) for cell in cells[:columns])
        draw.text((MARGIN, top), f"{label}; seeds {seeds}", "black", font)
        for column, cell in enumerate(cells[:columns]):
            with Image.open(out / cell.name, formats=("PNG",)) as opened:
                small = opened.convert("RGB").resize((edge, edge), Image.Resampling.LANCZOS)
            page.paste(small, (MARGIN + column * (edge + MARGIN), top + LINE))
    return page


# --- The program ---


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    whole = command_line(__doc__)
    add = whole.add_argument
    add("--base", required=True, help="the model: a folder, a file or an id")
    add("--lora", type=Path, action="append", default=[], metavar="RUN_DIR|FILE")
    add(
        "--prompts", action="append", default=[], metavar="FILE|TEXT", help=".txt, .json, or a text"
    )
    add("--trigger", action="append", default=[], help="a trigger word, for judging without it")
    add("--strengths", type=parse_strengths, default=[1.0], help="0.6,0.8,1")
    add("--seeds", type=parse_numbers, default=[1, 2, 3, 4], help="1-4")
    add("--out", type=Path, help="folder for the pictures")
    add("--fuse", type=Path, help="instead: save the model with the LoRA in it there")
    add("--resolution", type=int, help="the model's own unless given")
    add("--steps", type=int, default=25)
    add("--guidance", type=float, default=7.0)
    add("--negative", default="", help="what pictures should not show")
    add("--batch", type=int, default=4, help="pictures drawn together")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--dry-run", action="store_true", help="say what would be drawn")
    take_events(whole)
    return whole


def work(
    arguments: argparse.Namespace, events: Emitter, stop: StopRequest
) -> tuple[str, list[str]]:
    """Draw a grid, or fuse a LoRA into its base."""
    if bool(arguments.out) == bool(arguments.fuse):
        raise refuse("--out", "either --out or --fuse", "both" if arguments.out else "neither")
    sources = find_sources(arguments.lora)
    if arguments.fuse:
        return fuse(sources, arguments, events)
    prompts = read_prompts(arguments.prompts, arguments.trigger)
    cells = cells_of(sources, prompts, arguments)
    if arguments.dry_run:
        return f"Would draw {len(cells)} pictures: {len(sources)} LoRAs, {len(prompts)} prompts", []
    config = config_of(arguments)
    if not arguments.resolution:
        facts, _ = train_lora.inspect_model(config)
        arguments.resolution = facts.native_resolution or 512
        config = config_of(arguments)
    draw_all(cells, config, arguments, events, stop)
    sheets = write_sheets(cells, arguments.out, config.resolution)
    grid = grid_record(cells, sources, prompts, config)
    train_lora.write_whole(arguments.out / "grid.json", as_json(grid))
    files = [arguments.out / "grid.json", *sheets]
    return f"{len(cells)} pictures in {arguments.out.name}", list(map(str, files))


def grid_record(
    cells: Sequence[Cell], sources: Sequence[Source], prompts: Sequence[Record], config: Any
) -> Record:
    """List everything, for whoever judges it."""
    loras: list[Record] = [{"id": "base", "file": None}]
    for source in sources:
        file = source.file.name if source.file else None
        loras.append(
            {"id": source.name, "file": file, "step": source.step, "sha256": source.digest}
        )
    return {
        "format": "lora-grid",
        "version": 1,
        "settings": {
            "steps": config.sample_steps,
            "guidance": config.sample_guidance,
            "negative": config.sample_negative_prompt,
            "width": config.resolution,
            "height": config.resolution,
        },
        "prompts": list(prompts),
        "loras": loras,
        "images": [
            {
                "file": cell.name,
                "prompt": cell.prompt["id"],
                "lora": cell.source.name,
                "strength": cell.strength,
                "seed": cell.seed,
            }
            for cell in cells
        ],
    }


def fuse(
    sources: Sequence[Source], arguments: argparse.Namespace, events: Emitter
) -> tuple[str, list[str]]:
    """Save the whole model with a LoRA in it, as a folder that diffusers loads."""
    import torch

    from tools.lora_file import read_lora

    if len(sources) != 1 or len(arguments.strengths) != 1:
        raise refuse("--lora", "one LoRA at one strength", f"{len(sources)} LoRAs")
    if arguments.fuse.exists():
        raise refuse(arguments.fuse, "a new name", "something that is there")
    models = load_models(config_of(arguments), events)
    networks = networks_of(models)
    models.denoiser.float()  # half precision would round small changes away
    lora, changed = read_lora(sources[0].file or Path()), 0
    for module, layer in lora.layers.items():
        target = find_module(networks.get(module.network), module.name)
        if target is not None:
            delta = arguments.strengths[0] * layer.delta()
            if delta.shape != target.weight.shape:
                raise refuse(lora.source, "a LoRA of the base's family", f"another {module.name}")
            with torch.no_grad():
                target.weight += delta.to(target.weight)
            changed += 1
    if not changed:
        raise refuse(lora.source, "a LoRA of the base's family", "no layer that the base has")
    staging = arguments.fuse.with_name(f".{arguments.fuse.name}.tmp")
    pipeline_of(models).save_pretrained(staging, safe_serialization=True)
    staging.rename(arguments.fuse)
    return f"{arguments.fuse.name}: {changed} layers changed", [str(arguments.fuse)]


def pipeline_of(models: Any) -> Any:
    """Put the networks together as diffusers knows them."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    parts, family = networks_of(models), models.base.family
    parts |= {part.folder: t for part, t in zip(family.tokenizers, models.tokenizers, strict=True)}
    parts |= {family.vae.folder: models.vae, family.sampler.folder: models.schedule}
    if len(family.text_encoders) > 1:
        return StableDiffusionXLPipeline(**parts)
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, **nothing)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    return run(parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
