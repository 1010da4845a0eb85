"""Draw what LoRAs do: prompts × LoRAs × strengths × seeds, with contact sheets and a list of all.

python tools/generate.py --base MODEL --lora RUN_DIR --prompts FILE --seeds 1-4 --out DIR
python tools/generate.py --base MODEL --lora FILE --strengths 0.8 --fuse DIR --dtype fp16

RUN_DIR stands for all LoRAs of a run. What is drawn already is not drawn again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_lora
from tools.base_model import Attached, ask_for, draw, find_model, load_models, title_of
from tools.program import as_json, command_line, refuse, remark, run, take_events
from tools.prompts import read_prompts
from tools.sheets import write_sheets
from train_lora import (
    Emitter,
    Models,
    Phase,
    Record,
    Sketch,
    StopRequest,
    TrainError,
    TrainingConfig,
    counted,
    natural_key,
)

if TYPE_CHECKING:
    from PIL import Image

    from tools.base_model import Tokens

LEAST, MOST = 64, 4096  # pixels of a side
FEW_STEPS = 4  # of a picture that is compared; a processor takes seconds for each
PEFT_FILE = "adapter_model.safetensors"
CELL_KEY = "lora_grid"  # where a picture says which cell it is
READ_AS = {"ss_max_token_length": "max_tokens", "ss_clip_skip": "clip_skip"}  # in a LoRA's header
Reading = dict[str, int]  # knobs by which texts are read otherwise than usual


@dataclass(frozen=True)
class Source:
    """A LoRA by the name it has in the grid; the base has no file."""

    name: str
    file: Path | None = None

    @property
    def weights(self) -> Path | None:
        """Name the file itself, also in a folder of PEFT's."""
        return self.file / PEFT_FILE if self.file and self.file.is_dir() else self.file

    @functools.cached_property
    def header(self) -> dict[str, str]:
        """Read what the file says of itself."""
        if self.weights is None:
            return {}
        from tools.lora_file import read_metadata

        return read_metadata(self.weights)

    @property
    def step(self) -> int | None:
        """Take the step from a checkpoint's name, or from what the file says."""
        found = re.search(r"step_(\d+)", self.file.stem) if self.file else None
        said = found[1] if found else self.header.get("ss_steps", "")
        return int(said) if said.isdecimal() else None

    @property
    def short_hash(self) -> str:
        """Tell what A1111 and Civitai know the file by: of its numbers, where it says so."""
        return str(self.header.get("sshs_model_hash") or self.digest)[:12]

    @functools.cached_property
    def digest(self) -> str | None:
        """Tell the file by its bytes."""
        return file_digest(self.weights) if self.weights else None


@dataclass(frozen=True)
class Cell:
    """One picture of the grid."""

    source: Source
    strength: float
    prompt: Record
    seed: int

    @property
    def name(self) -> str:
        """Name its file; two digits of the strength do unless it has more."""
        short = f"{self.strength:.2f}"
        strength = short if float(short) == self.strength else f"{self.strength}"
        place = f"{self.prompt['id']}_w{strength}_s{self.seed}.png"
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


def file_digest(file: Path) -> str:
    """Take a file's checksum, piece by piece."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def files_of(path: Path) -> list[Path]:
    """List the checkpoints of a run and what came of it, once where that is the last of them."""
    if path.is_file() or (path / PEFT_FILE).is_file():
        return [path]
    found = sorted(path.glob("checkpoints/*.safetensors"), key=lambda p: natural_key(p.name))
    for final in path.glob("lora_final.safetensors"):
        if not found or file_digest(found[-1]) != file_digest(final):
            found.append(final)
    if not found:
        alone = (path / train_lora.EMBEDDINGS).is_dir()
        told = "a run that learned a word alone, which is not drawn with" if alone else "neither"
        raise refuse(path, "a LoRA file or the output_path of a run", told)
    return found


def find_sources(asked: Sequence[Path]) -> list[Source]:
    """Find the files, and names by which they can be told apart."""
    files = [file for path in asked for file in files_of(path)]
    plain = names_for(files)
    if twice := [name for name in plain if plain.count(name) > 1]:
        raise refuse(files[-1], "LoRAs with names of their own", f"{twice[-1]} twice")
    return [Source(name, file) for name, file in zip(plain, files, strict=True)]


def names_for(files: Sequence[Path]) -> list[str]:
    """Name LoRAs by their files, and those of one name by as many folders as tell them apart."""
    places = [folder_of(file).resolve().parts[1:] for file in files]
    names = [file.stem.removeprefix("lora_") for file in files]
    for level in range(1, max(map(len, places), default=0) + 1):
        twice = {name for name in names if names.count(name) > 1}
        names = [
            f"{place[-level]}_{name}" if name in twice and level <= len(place) else name
            for place, name in zip(places, names, strict=True)
        ]
    return [re.sub(r"[^\w.-]", "_", name) for name in names]


def folder_of(file: Path) -> Path:
    """Find the folder that a LoRA's run wrote to."""
    return file.parent.parent if file.parent.name == "checkpoints" else file.parent


def remark_words(sources: Sequence[Source], events: Emitter) -> None:
    """Name the runs whose LoRAs go with a word of its own, which is not drawn with."""
    runs = dict.fromkeys(folder_of(source.file) for source in sources if source.file)
    for run_folder in runs:
        if (run_folder / train_lora.EMBEDDINGS).is_dir():
            told = f"{run_folder.resolve().name} learned a word of its own too, which is in"
            remark(events, f"{told} {train_lora.EMBEDDINGS}: it is not drawn with")


def config_of(arguments: argparse.Namespace, **reading: int) -> TrainingConfig:
    """Say which model is meant, where it is to work, and how it is to read."""
    parts = {"vae": arguments.vae, "model_config_path": arguments.model_config}
    return ask_for(arguments.base, device=arguments.device, **parts, **taught(arguments), **reading)


def taught(arguments: argparse.Namespace) -> Record:
    """List what is said of the model that it does not say itself, by the trainer's knobs."""
    zero = arguments.zero_terminal_snr
    said = {
        "prediction_type": arguments.prediction_type,
        "zero_terminal_snr": zero and zero == "true",
    }
    return {knob: value for knob, value in said.items() if value is not None}


def choose_sides(arguments: argparse.Namespace, events: Emitter) -> tuple[Sketch, Record]:
    """Settle the pictures' size: as asked for, or the model's own; tell what the model is."""
    config = config_of(arguments)
    facts, base = find_model(config, events)
    square = arguments.resolution or facts.native_resolution or 512
    width, height = arguments.width or square, arguments.height or square
    step = math.lcm(base.vae_scale_factor, base.pixel_step)
    for option, side in (("--width", width), ("--height", height)):
        if side % step or not LEAST <= side <= MOST:
            expected = f"a multiple of {step} from {LEAST} to {MOST}"
            raise refuse(option, f"{expected}, as the model's pictures are made of", str(side))
    steps, guidance = base.family.previews[base.distilled]
    steps = steps if arguments.steps is None else arguments.steps
    guidance = guidance if arguments.guidance is None else arguments.guidance
    sketch = Sketch(width, height, steps, guidance, arguments.negative)
    own = {"vae": Path(config.vae).name} if config.vae else {}
    about = {"id": title_of(config), "family": base.family.name}
    return sketch, {**about, **own, **taught(arguments)}


def readings_of(
    sources: Sequence[Source], arguments: argparse.Namespace, events: Emitter
) -> dict[Source, Reading]:
    """Tell how texts were read in each training; the base reads them as in the first of these."""
    family = find_model(config_of(arguments), events)[1].family
    usual = {"max_tokens": train_lora.LEAST_TOKENS, "clip_skip": next(iter(family.clip_skips), 0)}
    found: dict[Source, Reading] = {}
    for source in sources:
        said = {knob: source.header.get(word, "") for word, knob in READ_AS.items()}
        numbers = {k: int(n) for k, n in said.items() if re.fullmatch("[0-9]{1,3}", n)}
        reading = {k: n for k, n in numbers.items() if n != usual[k]}
        try:
            if reading:  # else as above
                find_model(config_of(arguments, **reading), events)
        except TrainError as error:
            remark(events, f"{source.name} was read as the base cannot be: {error}")
            reading = {}
        found[source] = reading
    return {Source("base"): next(iter(found.values()), {})} | found


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


def key_of(cell: Cell, base: Record, sketch: Sketch, reading: Reading) -> str:
    """Sum up what a picture depends on."""
    what = [base, vars(sketch), cell.source.digest, cell.strength, cell.prompt["text"], cell.seed]
    return train_lora.digest_of([*what, *([reading] if reading else [])], 12)


@dataclass
class Studio:
    """Draws the cells of a grid, what is missing of them, into a folder."""

    out: Path
    base: Record  # what the model is
    sketch: Sketch
    cells: Sequence[Cell]
    readings: Mapping[Source, Reading]

    def __post_init__(self) -> None:
        """Look what is there already."""
        known = self.base, self.sketch
        self.keys = {c.name: key_of(c, *known, self.readings[c.source]) for c in self.cells}
        drawn = {name for name, key in self.keys.items() if is_drawn(self.out / name, key)}
        self.missing = [cell for cell in self.cells if cell.name not in drawn]
        self.drawn = len(drawn)

    def draw_all(self, arguments: argparse.Namespace, events: Emitter, stop: StopRequest) -> None:
        """Draw what is missing; of LoRAs that were read alike, one after the other."""
        phase = Phase("drawing", len(self.cells), events, stop)

        def words(source: Source) -> list[tuple[str, int]]:
            return sorted(self.readings[source].items())

        sources = sorted(dict.fromkeys(cell.source for cell in self.missing), key=words)
        for reading, alike in itertools.groupby(sources, words):
            models = load_models(config_of(arguments, **dict(reading)), events, stop)
            self.draw_alike(list(alike), models, arguments.batch, phase)
            del models  # before the next ones are loaded

    def draw_alike(
        self, sources: Sequence[Source], models: Models, at_once: int, phase: Phase
    ) -> None:
        """Draw LoRA after LoRA and strength after strength."""
        from tools.lora_file import read_lora

        events, stop = phase.events, phase.stop
        texts = [(cell.name, cell.prompt["text"]) for cell in self.missing]
        texts.append(("the negative prompt", self.sketch.negative))
        tokens = train_lora.tokenize(texts, models, events)
        for source in sources:
            attached = Attached(models, read_lora(source.file)) if source.file else None
            if attached and attached.unknown:
                some = f"{counted(len(attached.unknown), 'layer')}, such as {attached.unknown[0]}"
                remark(events, f"{source.name} changes {some} that the base does not have")
            own = [cell for cell in self.missing if cell.source == source]
            for part in batches(own, at_once):
                if attached:
                    attached.strength = part[0].strength
                self.draw_batch(part, models, tokens, events, stop)
                self.drawn += len(part)
                phase.at(self.drawn)
            if attached:
                attached.remove()

    def draw_batch(
        self, cells: list[Cell], models: Models, tokens: Tokens, events: Emitter, stop: StopRequest
    ) -> None:
        """Draw some cells together; in halves where memory is short."""
        wanted = [(cell.prompt["text"], cell.seed) for cell in cells]
        try:
            images = draw(models, tokens, wanted, self.sketch, stop)
        except RuntimeError as error:
            if not train_lora.is_out_of_memory(error) or len(cells) == 1:
                raise
        else:
            for cell, image in zip(cells, images, strict=True):
                if image is None:
                    remark(events, f"{cell.name}: numbers beyond all bounds; the picture is black")
                self.write(cell, image or black(self.sketch))
            return
        # Here, what the attempt held is gone with its frames.
        half = len(cells) // 2
        for part in (cells[:half], cells[half:]):
            self.draw_batch(part, models, tokens, events, stop)

    def write(self, cell: Cell, image: Image.Image) -> None:
        """Write a picture with what it was made from, as A1111 says it and as this program does."""
        from PIL.PngImagePlugin import PngInfo

        from tools.transformer_names import READERS

        sketch, info, buffer = self.sketch, PngInfo(), io.BytesIO()
        told = f"{cell.prompt['text']}\nNegative prompt: {sketch.negative}\n"
        sampler = "Euler" if self.base["family"] in READERS else "DPM++ 2M"
        told += f"Steps: {sketch.steps}, Sampler: {sampler}, CFG scale: {sketch.guidance}, "
        told += f"Seed: {cell.seed}, Size: {sketch.width}x{sketch.height}, "
        reading = self.readings[cell.source]
        told += f"Clip skip: {reading['clip_skip']}, " if "clip_skip" in reading else ""
        told += f"Model: {self.base['id']}"
        if cell.source.file:
            told += f', Lora hashes: "{cell.source.name}: {cell.source.short_hash}", '
            told += f"Lora strength: {cell.strength:g}"
        place = {"lora": cell.source.name, "strength": cell.strength, "prompt": cell.prompt["id"]}
        info.add_itxt("parameters", told)
        info.add_itxt(
            CELL_KEY, json.dumps({**place, "seed": cell.seed, "key": self.keys[cell.name]})
        )
        image.save(buffer, "PNG", pnginfo=info)
        train_lora.write_whole(self.out / cell.name, buffer.getvalue())


def black(sketch: Sketch) -> Image.Image:
    """Make the picture that stands for none."""
    from PIL import Image

    return Image.new("RGB", (sketch.width, sketch.height))


def batches(cells: Sequence[Cell], most: int) -> Iterator[list[Cell]]:
    """Cut cells into batches of one strength each."""
    for strength in dict.fromkeys(cell.strength for cell in cells):
        alike = [cell for cell in cells if cell.strength == strength]
        for begin in range(0, len(alike), most):
            yield alike[begin : begin + most]


# --- The program ---


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    whole = command_line(__doc__)
    add = whole.add_argument
    add("--base", required=True, help="the model: a folder, a file or an id")
    add("--vae", help="another VAE, as for a training")
    add(
        "--model-config",
        metavar="DIR",
        help="folder with a single file's configs, as model_config_path",
    )
    add("--prediction-type", choices=("epsilon", "v_prediction"), help="as for a training")
    add("--zero-terminal-snr", choices=("true", "false"), help="as for a training")
    add("--lora", type=Path, action="append", default=[], metavar="RUN_DIR|FILE")
    add(
        "--prompts", action="append", default=[], metavar="FILE|TEXT", help=".txt, .json, or a text"
    )
    add("--trigger", action="append", default=[], help="a trigger word, for judging without it")
    add("--strengths", type=parse_strengths, default=[1.0], metavar="LIST", help="0.6,0.8,1")
    add("--seeds", type=parse_numbers, default=[1, 2, 3, 4], help="1-4")
    add("--out", type=Path, help="folder for the pictures")
    add("--fuse", type=Path, help="instead: save the model with the LoRA in it there")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="of what is saved; fp32 unless given")
    add("--no-verify", dest="verify", action="store_false", help="do not draw with what was saved")
    add("--width", type=int, help="of the pictures; the model's own unless given")
    add("--height", type=int)
    add("--resolution", type=int, metavar="SIDE", help="both of them")
    add("--steps", type=int, help="the model's own unless given")
    add("--guidance", type=float, help="the model's own unless given")
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
    remark_words(sources, events)
    if arguments.fuse:
        return fuse_into_base(sources, arguments, events, stop)
    if arguments.dtype or not arguments.verify:
        raise refuse("--dtype", "it with --fuse, as --no-verify too", "--out")
    prompts = read_prompts(arguments.prompts, arguments.trigger)
    sketch, base = choose_sides(arguments, events)
    cells = cells_of(sources, prompts, arguments)
    readings = readings_of(sources, arguments, events)
    studio = Studio(arguments.out, base, sketch, cells, readings)
    listed = arguments.out / "grid.json"
    if arguments.dry_run:
        told = f"Would draw {len(studio.missing)} of {counted(len(cells), 'picture')}"
        return f"{told}: {counted(len(sources), 'LoRA')}, {counted(len(prompts), 'prompt')}", []
    grid = as_json(grid_record(studio, sources, prompts))
    if listed.is_file() and listed.read_bytes() != grid:
        listed.unlink()  # a list of other pictures, until all of these are there
    studio.draw_all(arguments, events, stop)
    sheets = write_sheets(cells, arguments.out, sketch)
    train_lora.write_whole(listed, grid)
    return f"{counted(len(cells), 'picture')} in {arguments.out.name}", [
        str(listed),
        *map(str, sheets),
    ]


def grid_record(studio: Studio, sources: Sequence[Source], prompts: Sequence[Record]) -> Record:
    """List everything, for whoever judges it."""
    loras: list[Record] = [{"id": "base", "file": None}]
    for source in sources:
        file = source.file.name if source.file else None
        said = {"step": source.step, "sha256": source.digest, **studio.readings[source]}
        loras.append({"id": source.name, "file": file} | said)
    images = [
        {
            "file": cell.name,
            "prompt": cell.prompt["id"],
            "lora": cell.source.name,
            "strength": cell.strength,
            "seed": cell.seed,
        }
        for cell in studio.cells
    ]
    return {
        "format": "lora-grid",
        "version": 1,
        "base": studio.base,
        "settings": vars(studio.sketch),
        "prompts": list(prompts),
        "loras": loras,
        "images": images,
    }


def fuse_into_base(
    sources: Sequence[Source], arguments: argparse.Namespace, events: Emitter, stop: StopRequest
) -> tuple[str, list[str]]:
    """Save the whole model with a LoRA in it, as a folder that diffusers loads."""
    from tools.fusing import Wish, fuse
    from tools.lora_file import read_lora

    if len(sources) != 1 or len(arguments.strengths) != 1:
        found = (
            f"{counted(len(sources), 'LoRA')} at {counted(len(arguments.strengths), 'strength')}"
        )
        raise refuse("--lora", "one LoRA at one strength", found)
    if arguments.fuse.exists():
        raise refuse(arguments.fuse, "a new name", "something that is there")
    lora, (strength,) = read_lora(sources[0].file or Path()), arguments.strengths
    sketch, base = choose_sides(arguments, events)
    if arguments.dry_run:
        told = f"Would add {counted(len(lora.layers), 'layer')} at {strength:g}"
        return f"{told}, and save the model", []
    prompts = read_prompts(arguments.prompts or [trigger_of(lora.header)], arguments.trigger)
    wish = Wish(
        config=config_of(arguments),
        base=base,
        lora=lora,
        digest=sources[0].digest,
        strength=strength,
        precision=arguments.dtype or "fp32",
        sketch=quick(sketch, arguments) if arguments.verify else None,
        prompt=prompts[0]["text"],
        seed=arguments.seeds[0],
    )
    return fuse(wish, arguments.fuse, events, stop), [str(arguments.fuse)]


def quick(sketch: Sketch, arguments: argparse.Namespace) -> Sketch:
    """Make a picture small that only numbers are compared by, unless its size was asked for."""
    steps = min(FEW_STEPS, sketch.steps)
    if arguments.resolution or arguments.width or arguments.height:
        return dataclasses.replace(sketch, steps=steps)
    return Sketch(sketch.width // 2, sketch.height // 2, steps, sketch.guidance, sketch.negative)


def trigger_of(header: dict[str, str]) -> str:
    """Find words that a LoRA answers to."""
    return header.get("modelspec.trigger_phrase") or "a photo"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    return run(parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
