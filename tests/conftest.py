"""Shared ground of the tests: a folder to train on, a base model of headers, and a way to run."""

from __future__ import annotations

import importlib
import json
import math
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image

import train_lora

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "train_lora.py"

pytest_plugins = ["studio_ground"]  # fixtures of tests/studio

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else programs inherit it

Record = dict[str, Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let no test wait forever: one that takes minutes by itself may take an hour."""
    for item in items:
        minutes = 60 if item.get_closest_marker("slow") else 5
        item.add_marker(pytest.mark.timeout(60 * minutes))


def refuse(constant: str) -> None:
    """Fail on NaN and Infinity, which are not JSON."""
    raise AssertionError(constant)


EVENT_VALIDATOR = jsonschema.Draft7Validator(train_lora.event_schema())


def check_stream(stdout: bytes) -> None:
    """Hold a whole stream against what the contract promises of every stream."""
    assert stdout.endswith(b"\n")
    lines = stdout.splitlines(keepends=True)
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert all(len(line) <= 60 * 1024 and line.isascii() for line in lines)
    assert [record["seq"] for record in records] == list(range(1, len(records) + 1))
    for record in records:
        EVENT_VALIDATOR.validate(record)
    assert [is_terminal(record) for record in records] == [False] * (len(records) - 1) + [True]


def is_terminal(record: Record) -> bool:
    """Tell whether nothing may follow this line."""
    if record["type"] == "info":
        return bool(record["topic"] == "valid")
    return record["type"] in ("complete", "interrupted", "error")


class Recorder:
    """An emitter's listener that keeps every record."""

    def __init__(self) -> None:
        """Start with none."""
        self.records: list[Record] = []

    def __call__(self, record: Record) -> None:
        """Keep one."""
        self.records.append(record)

    def of_type(self, name: str) -> list[Record]:
        """Return the records of one type."""
        return [record for record in self.records if record["type"] == name]

    def codes(self) -> list[str]:
        """Return the codes of all warnings in order, but for what is true of every tiny run."""
        codes = [record["code"] for record in self.of_type("warning")]
        return [code for code in codes if code != "nothing_learned"]


@pytest.fixture
def recorder() -> Recorder:
    """Provide a listener that keeps every record."""
    return Recorder()


@pytest.fixture
def events(recorder: Recorder) -> train_lora.Emitter:
    """Provide an emitter whose records the recorder keeps."""
    return train_lora.Emitter(recorder)


@pytest.fixture
def stop() -> train_lora.StopRequest:
    """Provide a stop request that nobody has made."""
    return train_lora.StopRequest()


def write_image(path: Path, size: tuple[int, int] = (64, 52), **options: Any) -> Path:
    """Write a picture that is not of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize(size).convert("RGB").save(path, **options)
    return path


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """Write a safetensors file of zeros in half precision, byte for byte by the format."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return path


def write_json(path: Path, content: object) -> Path:
    """Write a JSON file, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def change_json(path: Path, **changes: Any) -> Path:
    """Change values of a JSON file."""
    return write_json(path, json.loads(path.read_text("utf-8")) | changes)


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def write_model(folder: Path, family: str = "sd1", **unet: Any) -> Path:
    """Write a diffusers folder with all the headers and structure of a family, and no sense."""
    config: Record = {"in_channels": 4, "sample_size": 64, "cross_attention_dim": 8}
    config["use_linear_projection"] = family != "sd1"
    if family == "sdxl":
        config |= {"addition_embed_type": "text_time", "sample_size": 128}
    names = [f"{BLOCK}.attn{a}.to_{p}.weight" for a in (1, 2) for p in ("q", "k", "v", "out.0")]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (8, 8))
    shapes["conv_in.weight"] = (8, 4, 3, 3)
    prediction = "v_prediction" if family == "sd2" else "epsilon"
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    write_json(folder / "unet" / "config.json", config | unet)
    write_json(folder / "vae" / "config.json", {"block_out_channels": [8, 8, 8, 8]})
    write_json(folder / "scheduler" / "scheduler_config.json", {"prediction_type": prediction})
    write_safetensors(folder / "unet" / "diffusion_pytorch_model.safetensors", shapes)
    write_safetensors(folder / "vae" / "diffusion_pytorch_model.safetensors", {"w": (4, 4)})
    for encoder in ["text_encoder"] + ["text_encoder_2"] * (family == "sdxl"):
        write_safetensors(folder / encoder / "model.safetensors", {"w": (4, 4)})
        write_json(folder / encoder / "config.json", {})
        tokenizer = folder / encoder.replace("text_encoder", "tokenizer")
        write_json(tokenizer / "vocab.json", {})
        (tokenizer / "merges.txt").touch()
    return folder


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Record every entry below a folder with its kind, size and times of change."""
    stats = {str(path): path.lstat() for path in [folder, *folder.rglob("*")]}
    return {name: (s.st_mode, s.st_size, s.st_mtime_ns) for name, s in stats.items()}


def write_earlier_run(output: Path) -> None:
    """Leave behind what a run leaves behind."""
    for name in ("checkpoints/lora_step_1.safetensors", "samples/step_1.png", "state/step_1/x"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("earlier", encoding="utf-8")
    for name in ("events.jsonl", "loss_history.csv", "lora_final.safetensors", ".lock", "stop"):
        (output / name).write_text("earlier", encoding="utf-8")


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Provide a folder with three images, a base model and a valid config."""
    for number in (1, 2, 10):
        write_image(tmp_path / "data" / f"image{number}.png", (320, 300))
    write_model(tmp_path / "model")
    write_config(tmp_path)
    return tmp_path


def write_config(folder: Path, **changes: Any) -> Path:
    """Write config.json for a workspace; a change to None removes the key."""
    config = {
        "dataset_path": "data",
        "base_model": "model",
        "output_path": "out",
        "trigger_words": ["zkb"],
        **changes,
    }
    kept = {key: value for key, value in config.items() if value is not None}
    return write_json(folder / "config.json", kept)


@pytest.fixture
def in_workspace(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide the workspace and make it the current folder."""
    monkeypatch.chdir(workspace)
    return workspace


def load_config(**changes: Any) -> train_lora.TrainingConfig:
    """Load a config from the current folder, with changes."""
    return train_lora.TrainingConfig.from_json(write_config(Path.cwd(), **changes))


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a folder with six images of different content."""
    folder = tmp_path_factory.mktemp("ground")
    for number in range(6):
        path, size = folder / "data" / f"{number}.png", (256 + 10 * number, 256)
        upright = Image.linear_gradient("L")
        lying = upright.transpose(Image.Transpose.ROTATE_90)
        path.parent.mkdir(exist_ok=True)
        turned = Image.radial_gradient("L").rotate(10 * number)
        Image.merge("RGB", (upright, lying, turned)).resize(size).save(path)
    return folder


Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Provide a function that makes a package of one file, which is gone after the test."""
    folder, names = tmp_path / "packages", set()

    def install_file(name: str, text: str) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text, encoding="utf-8")
        names.add(path.relative_to(folder).parts[0])
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(folder)
    yield install_file
    for module in [name for name in sys.modules if name.partition(".")[0] in names]:
        del sys.modules[module]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide one folder and one single file for every family; nobody may change them."""
    from tiny_models import build_tiny, write_single_file

    root = tmp_path_factory.mktemp("models")
    for family in ("sd1", "sd2", "sdxl"):
        build_tiny(family, root / family)
        write_single_file(root / family, root / f"{family}.safetensors", family)
    return root


@pytest.fixture(scope="session")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a tiny DINOv2 and a tiny CLIP; nobody may change them."""
    from tiny_eyes import make_clip, make_vision

    root = tmp_path_factory.mktemp("eyes")
    make_vision(root / "dino")
    make_clip(root / "clip")
    return root
