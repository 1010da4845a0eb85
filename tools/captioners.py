"""Models that say what a picture shows: Florence-2, BLIP, any that is asked, and taggers.

Models come from a local folder or from the Hugging Face cache; one that was asked for by its id,
and is not there, is downloaded. None brings code of its own, and none is a pickle.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import train_lora
from tools.dataset import repeats_itself
from tools.program import refuse
from train_lora import (
    Emitter,
    ErrorCode,
    PhaseFacts,
    Record,
    StopRequest,
    TrainError,
    TrainingConfig,
)

if TYPE_CHECKING:
    from PIL import Image

# Asked for by name alone, these have to be on this machine already.
USUAL_MODELS = {
    "florence2": "florence-community/Florence-2-base",
    "blip": "Salesforce/blip-image-captioning-base",
    "tagger": "SmilingWolf/wd-vit-tagger-v3",
}
TAGGER_FILES = ("model.onnx", "selected_tags.csv")
MODEL_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "*.safetensors")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a captioner."""

    captioner: str | None
    model: str | None
    task: str
    prompt: str | None
    threshold: float
    character_threshold: float
    exclude: str
    device: str
    batch: int
    overwrite: bool


class Captioner(Protocol):
    """Whatever says what pictures show."""

    def __init__(self, folder: Path, request: Request, events: Emitter, /) -> None:
        """Load it."""

    def describe(self, pictures: Sequence[Image.Image]) -> list[str]:
        """Say it of some pictures, in their order."""


# --- Finding a model ---


def find_model(request: Request, events: Emitter, stop: StopRequest) -> Path:
    """Find a captioner's folder, and download what was asked for by its id."""
    kind = str(request.captioner)
    name = request.model or USUAL_MODELS.get(kind)
    if name is None:
        raise refuse("--model", "a folder or a Hugging Face id", "nothing")
    hub_id, folder = train_lora.look_up(name, "--model", "a folder")
    lacks = lacking(folder, kind) if folder else "all of it"
    if folder and not lacks:
        return folder
    if hub_id is None:
        raise refuse(name, f"a folder with a {kind} model", f"none: it lacks {lacks}")
    if not request.model:
        hint = f"With a network: --model {name}"
        raise refuse("--model", f"{name} on this machine, or a model's name", "neither", hint)
    events.emit(PhaseFacts(name="downloading the captioner", done=0, total=None))
    files = TAGGER_FILES if kind == "tagger" else MODEL_FILES
    folder = train_lora.fetch(events, stop, hub_id, list(files), "--model")
    if lacks := lacking(folder, kind):
        raise refuse(name, f"a {kind} model", f"one without {lacks}")
    return folder


def lacking(folder: Path, kind: str) -> str:
    """Name what a model's folder does not have."""
    wanted = list(TAGGER_FILES if kind == "tagger" else ["config.json"])
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        wanted += sorted(set(train_lora.read_json_file(index).get("weight_map", {}).values()))
    elif kind != "tagger":
        wanted.append("model.safetensors")
    return next((name for name in wanted if not (folder / name).is_file()), "")


# --- Models that see and write ---


class Network:
    """A model of transformers that sees and writes, with what prepares its input."""

    def __init__(self, folder: Path, kinds: Sequence[str], device: str, events: Emitter) -> None:
        """Load it, from safetensors alone, without code that comes with it."""
        import torch

        self.folder, self.torch = folder, torch
        check_kind(folder, kinds)
        config = config_for(folder, device)
        self.device = train_lora.choose_device(config)
        self.dtype = train_lora.choose_precision(config, self.device, events)
        self.processor = self.load("AutoProcessor")
        self.model = self.load(
            "AutoModelForImageTextToText", use_safetensors=True, dtype=self.dtype
        )
        self.model = self.model.eval().to(self.device)

    def load(self, class_name: str, **options: Any) -> Any:
        """Load one of its parts."""
        train_lora.quiet_libraries()
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        options |= {"local_files_only": True, "trust_remote_code": False}
        try:
            return getattr(transformers, class_name).from_pretrained(self.folder, **options)
        except Exception as error:  # damaged files make libraries raise anything
            if train_lora.is_out_of_memory(error):
                raise
            said = " ".join(str(error).split()) or type(error).__name__
            package = "torchvision" if "orchvision" in said else None
            hint = f"This one needs another package: pip install {package}" if package else ""
            raise refuse(self.folder, "a model that can be loaded", said[:200], hint) from error

    def prepare(self, **given: Any) -> Any:
        """Turn pictures and texts into what the model takes."""
        return self.processor(return_tensors="pt", **given).to(self.device, self.dtype)

    def write(self, inputs: Any, **options: Any) -> Any:
        """Let the model write; the same every time."""
        with self.torch.no_grad():
            return self.model.generate(**inputs, do_sample=False, **options)

    def texts(self, ids: Any) -> list[str]:
        """Read what the model wrote."""
        read = self.processor.batch_decode(ids, skip_special_tokens=True)
        return [" ".join(text.split()) for text in read]


def config_for(folder: Path, device: str) -> TrainingConfig:
    """Ask for a device as the trainer is asked."""
    places = {"dataset_path": str(folder), "output_path": str(folder / ".no output")}
    known: Record = {"base_model": "none", "trigger_words": ["none"], "device": device}
    return TrainingConfig.from_record(known | places)


def check_kind(folder: Path, kinds: Sequence[str]) -> None:
    """Refuse a model that another program has to load; the library would not say why."""
    config = train_lora.read_json_file(folder / "config.json")
    text = config.get("text_config")
    inner = text.get("model_type") if isinstance(text, dict) else None
    if inner == "florence2_language" or "auto_map" in config:
        hint = "Of Florence-2 there are converted copies: florence-community/Florence-2-base"
        raise refuse(folder, "a model that transformers knows", "one with code of its own", hint)
    if kinds and config.get("model_type") not in kinds:
        expected = f"a model of type {' or '.join(kinds)}"
        raise refuse(folder, expected, f"one of type {config.get('model_type')}")


# Any other would be passed on as if it were a question, and be answered.
TASKS = {
    "caption": "<CAPTION>",
    "detailed": "<DETAILED_CAPTION>",
    "more_detailed": "<MORE_DETAILED_CAPTION>",
    "tags": "<OD>",
}
PLACE = re.compile(r"(?:<loc_\d+>)+")  # behind the name of each thing that is found
MARKS = re.compile(r"</?s>|<pad>")
SAYS_NOTHING = re.compile(r"^(the|this) (image|picture|photo)\w* (shows|depicts) ", re.IGNORECASE)


class Florence:
    """Florence-2, which knows a few tasks by name."""

    def __init__(self, folder: Path, request: Request, events: Emitter) -> None:
        """Load it."""
        self.task = TASKS[request.task]
        self.network = Network(folder, ["florence2"], request.device, events)

    def describe(self, pictures: Sequence[Image.Image]) -> list[str]:
        """Write captions, or the names of the things that are seen."""
        asked = {"text": [self.task] * len(pictures), "images": list(pictures), "padding": True}
        ids = self.network.write(self.network.prepare(**asked), max_new_tokens=256, num_beams=3)
        if self.task != TASKS["tags"]:
            return [SAYS_NOTHING.sub("", text) for text in self.network.texts(ids)]
        read = self.network.processor.batch_decode(ids, skip_special_tokens=False)
        return [things_in(text) for text in read]


def things_in(text: str) -> str:
    """List the things that were found, each once: what stands in front of places."""
    *names, _ = PLACE.split(MARKS.sub("", text))
    return ", ".join(dict.fromkeys(filter(None, map(str.strip, names))))


class Blip:
    """BLIP, which goes on with the beginning of a sentence, or writes one."""

    def __init__(self, folder: Path, request: Request, events: Emitter) -> None:
        """Load it."""
        self.beginning = request.prompt
        self.network = Network(folder, ["blip"], request.device, events)

    def describe(self, pictures: Sequence[Image.Image]) -> list[str]:
        """Write a sentence about each."""
        asked: dict[str, Any] = {"images": list(pictures)}
        if self.beginning:
            asked["text"] = [self.beginning] * len(pictures)
        ids = self.network.write(self.network.prepare(**asked), max_new_tokens=50, num_beams=3)
        return self.network.texts(ids)


QUESTION = (
    "Describe this picture in one sentence: what happens, where, in which light, how it is framed. "
    "Leave out what it always looks like, and do not say that it is a picture."
)


class Chat:
    """A model that is asked about a picture: LLaVA, JoyCaption, Idefics and their like."""

    def __init__(self, folder: Path, request: Request, events: Emitter) -> None:
        """Load it; what it is asked stands in front, so that it is filled up from the left."""
        self.network = Network(folder, (), request.device, events)
        self.processor = self.network.processor
        self.processor.tokenizer.padding_side = "left"
        self.text = request.prompt
        if self.processor.chat_template:
            asked = {"type": "text", "text": request.prompt or QUESTION}
            said = [{"role": "user", "content": [{"type": "image"}, asked]}]
            options = {"tokenize": False, "add_generation_prompt": True}
            self.text = self.processor.apply_chat_template(said, enable_thinking=False, **options)

    def describe(self, pictures: Sequence[Image.Image]) -> list[str]:
        """Ask about each; once more where the answer goes round in circles."""
        answers = self.ask(pictures)
        for number, answer in enumerate(answers):
            if repeats_itself(answer):
                answers[number] = self.ask([pictures[number]], repetition_penalty=1.1)[0]
        return answers

    def ask(self, pictures: Sequence[Image.Image], **options: Any) -> list[str]:
        """Ask, and read the answers without the question and without the thoughts."""
        asked: dict[str, Any] = {"images": list(pictures)}
        if self.text:
            asked |= {"text": [self.text] * len(pictures), "padding": True}
        inputs = self.network.prepare(**asked)
        ids = self.network.write(inputs, max_new_tokens=200, **options)
        question = inputs.get("input_ids")
        if question is not None:
            length = question.shape[1]
            if ids.shape[1] >= length and bool((ids[:, :length] == question).all()):
                ids = ids[:, length:]
        return [text.rpartition("</think>")[2].strip() for text in self.network.texts(ids)]


# --- Taggers ---

MOST_TAGS = 30  # more than that, a text encoder does not read
GENERAL, CHARACTER = 0, 4  # of the categories; the others rate a picture
KAOMOJI = {
    *("0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3"),
    *("6_9", ">_o", "@_@", "^_^", "o_o", "u_u", "x_x", "|_|", "||_||"),
}


class Tagger:
    """A tagger in the form of the WD ones: a graph of ONNX, and a table of its tags."""

    def __init__(self, folder: Path, request: Request, _: Emitter) -> None:
        """Load it."""
        try:
            import onnxruntime
        except ImportError as error:
            code, hint = ErrorCode.PACKAGE_MISSING, "Run: pip install -r tools/requirements.txt"
            expected = "the package onnxruntime"
            raise TrainError.at(code, "--with tagger", expected, "none", hint) from error
        self.folder, self.request = folder, request
        self.excluded = {readable(word.strip()) for word in request.exclude.split(",")}
        self.tags = read_tags(folder / "selected_tags.csv")
        wanted = ["CUDAExecutionProvider"] * (request.device != "cpu") + ["CPUExecutionProvider"]
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
        try:
            self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=providers)
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise refuse(folder / "model.onnx", "a graph of ONNX", said) from error
        (self.given,) = self.session.get_inputs()

    def describe(self, pictures: Sequence[Image.Image]) -> list[str]:
        """List the tags of each; some graphs take one picture at a time."""
        most, side = self.given.shape[0], self.given.shape[1]
        most = most if isinstance(most, int) else len(pictures)
        found: list[str] = []
        for begin in range(0, len(pictures), most):
            rows = [squared(picture, side) for picture in pictures[begin : begin + most]]
            told = self.session.run(None, {self.given.name: stacked(rows)})[0]
            if told.shape[1] != len(self.tags):
                numbers = f"{len(self.tags)} beside {told.shape[1]} numbers of the graph"
                raise refuse(self.folder / "selected_tags.csv", "as many tags as numbers", numbers)
            found += [self.tags_of(row) for row in told.tolist()]
        return found

    def tags_of(self, likely: Sequence[float]) -> str:
        """Take what is likely enough: characters first, then what is most likely."""
        least = {GENERAL: self.request.threshold, CHARACTER: self.request.character_threshold}
        chosen = [
            (category != CHARACTER, -share, name)
            for (name, category), share in zip(self.tags, likely, strict=True)
            if share >= least.get(category, 2.0) and name not in self.excluded
        ]
        chosen.sort(key=lambda each: each[:2])
        return ", ".join(name for _, _, name in chosen[:MOST_TAGS])


def read_tags(path: Path) -> list[tuple[str, int]]:
    """Read the table of tags: a readable name and a category for each number of the graph."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [(readable(row["name"]), int(row["category"])) for row in csv.DictReader(file)]
    except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
        raise refuse(path, "a table with name and category", repr(error)) from error


def readable(tag: str) -> str:
    """Write a tag as captions do; faces made of signs stay as they are."""
    return tag if tag in KAOMOJI else tag.replace("_", " ")


def squared(picture: Image.Image, side: int) -> Image.Image:
    """Put a picture on a white square, as taggers were taught."""
    from PIL import Image

    edge = max(picture.size)
    square = Image.new("RGB", (edge, edge), "white")
    square.paste(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
    return square.resize((side, side), Image.Resampling.BICUBIC)


def stacked(pictures: Sequence[Image.Image]) -> Any:
    """Turn pictures into numbers as taggers take them: 0 … 255, blue first."""
    import numpy as np

    return np.stack([np.asarray(each, np.float32)[..., ::-1] for each in pictures])


CAPTIONERS: dict[str, type[Captioner]] = {
    "florence2": Florence,
    "blip": Blip,
    "vlm": Chat,
    "tagger": Tagger,
}
