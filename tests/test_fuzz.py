"""Thousands of damaged configs: each ends with one line that says why, and never in surprise."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import Record, Recorder, check_stream, write_config, write_image, write_model
from processes import run_program

import train_lora

VALID: Record = {
    "$schema": "./config_schema.json",
    "dataset_path": "data",
    "base_model": "model",
    "output_path": "out",
    "trigger_words": ["zkb", "person"],
    "resolution": 512,
    "learning_rate": 1e-4,
    "epochs": 2,
    "training_params": {"lora_rank": 8, "lora_alpha": 8.5, "steps": 20, "resume": "never"},
}

PATHS = ["dataset_path", "base_model", "output_path"]
AMOUNTS = [
    *("learning_rate", "batch_size", "gradient_accumulation_steps", "steps", "epochs", "seed"),
    *("resolution", "lora_rank", "lora_alpha", "checkpoint_steps", "validation_steps"),
]
KNOWN = [*PATHS, *AMOUNTS, "$schema", "trigger_words", "training_params", "resume"]
KEYS = [*KNOWN, "stop_with_parent", "lora_rnk", "Steps", "", " ", "\0", "\u2028", "k" * 5000]

TEXTS = [
    *("", " ", "0", "512", "true", "null", "NaN", "\0", "a\0b", "\n", "\r\n", "\x1b[31m", "\u2028"),
    *("\ufeff", "\U0001f600" * 300, "é" * 5000, "x" * 300, "x" * 5000, "a/" * 3000, "a//b", "-"),
    *("a/" + "b" * 400, "../x", "x/../data", "./data/", ".", "~", "~/data", "~nobody-here"),
    *("C:\\data", "\\\\host\\data", "file:///data", "https://host/a", "/dev/null", "/dev/null/x"),
    *("data", "data/image.png", "data/out", "config.json", "config.json/x", "model", "model/unet"),
    *("model/unet/diffusion_pytorch_model.safetensors", "model.ckpt", "model.safetensors", "out"),
    *("host/model", "zkb", "ZKB", "(zkb", "[", "\\", "a, b", ",", "auto", "never", "AUTO"),
]

NUMBERS: list[float] = [
    *(0, 1, -1, 2, 7, 64, 256, 512, 512.0, 1024, 2048, 0.5, -0.0, 1e-320, 1e-6, 0.1, 0.11, 1e308),
    *(10**9, 2**31, 2**32 - 1, 2**53 + 1, 2**64, 10**400, -(10**30)),
]

VALUES: list[Any] = [
    *(None, True, False, *NUMBERS, *TEXTS, [], {}, [[]], [None], {"seed": 1}, {"x": {}}),
    *(["zkb", "zkb"], ["zkb", "ZKB"], [1, "1"], [0, False], [str(number) for number in range(33)]),
    *({"training_params": {"seed": 1}}, {"dataset_path": "data"}, json.loads("[" * 60 + "]" * 60)),
]

PIECES = [
    *(b"NaN", b"-Infinity", b"1e999", b"1e-999", b"9" * 5000, b"-", b"+1", b"0x10", b"01", b"1."),
    *(b'"seed": 1,', b'"seed": 1, "seed": 2,', b"null", b"{", b"}", b"[", b"]", b"[" * 3000),
    *(b'{"a":' * 400, b",", b":", b'"', b"\\", b"\\u0000", b"\\ud800", b"\\udc00\\ud800", b"\\x"),
    *(b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x00", b"\xef\xbb\xbf", b"\xff\xfe", b"// no", b"\n"),
]


def containers(value: Any) -> list[Any]:
    """List the objects and lists inside a value that hold anything, itself among them."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if inner else []
    return own + [container for item in inner for container in containers(item)]


def change_values(document: Record, chance: random.Random) -> None:
    """Delete, rename, replace, wrap, swap or add values anywhere in a document."""
    place = chance.choice(containers(document) or [document])
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    if not keys:
        place[chance.choice(KEYS)] = copy.deepcopy(chance.choice(VALUES))
        return
    key, other = chance.choice(keys), chance.choice(keys)
    new_key = chance.choice(KEYS) if isinstance(place, dict) else other
    value = copy.deepcopy(chance.choice(VALUES))
    changes: list[tuple[Any, Any]] = [
        (key, value),
        (new_key, value),
        (new_key, copy.deepcopy(place[key])),
        (key, copy.deepcopy(place[other])),
        (key, [place[key]]),
        (key, {new_key: place[key]}),
        (key, str(place[key])),
    ]
    action = chance.randrange(len(changes) + 2)
    if action < len(changes):
        where, what = changes[action]
        place[where] = what
    else:
        moved = place.pop(key)
        if action > len(changes) and isinstance(document.get("training_params"), dict):
            document["training_params"][str(new_key)] = moved


def change_kindly(document: Record, chance: random.Random) -> None:
    """Give a knob a value of its own type, so that the config may well be valid."""
    words = [chance.choice(TEXTS) for _ in range(chance.randrange(4))]
    key, value = chance.choice(
        [
            (chance.choice(PATHS), chance.choice(TEXTS)),
            (chance.choice(AMOUNTS), chance.choice(NUMBERS)),
            ("trigger_words", words),
        ]
    )
    nested = key in AMOUNTS and chance.random() < 0.5
    (document.setdefault("training_params", {}) if nested else document)[key] = value


def change_bytes(text: bytes, chance: random.Random) -> bytes:
    """Cut, double, overwrite or insert bytes anywhere in a text."""
    begin, end = sorted(chance.randrange(len(text) + 1) for _ in range(2))
    short = min(end, begin + chance.randrange(1, 12))
    return chance.choice(
        [
            text[:begin],
            text[begin:],
            text[:begin] + text[short:],
            text[:begin] + text[end:],
            text[:end] + text[begin:],
            text[:short] + text[begin:],
            text[:begin] + bytes([chance.randrange(256)]) + text[begin + 1 :],
            text[:begin] + chance.choice(PIECES) + text[begin:],
            text[:begin] + chance.choice(PIECES) + text[short:],
            text.decode("utf-8", "replace").encode(chance.choice(["utf-16", "utf-8-sig"])),
        ]
    )


def mutate(number: int) -> tuple[bytes, list[str]]:
    """Make the config and the overrides of one mutation; the number decides everything."""
    chance = random.Random(number)
    document = copy.deepcopy(VALID)
    for _ in range(chance.choice([1, 1, 2, 3])):
        change_kindly(document, chance)
    harshness = chance.choice([0, 0, 1, 2])
    for _ in range(chance.choice([0, 1, 1, 2, 5]) if harshness else 0):
        change_values(document, chance)
    indent, ascii_only = chance.choice([None, 2]), chance.random() < 0.5
    content = json.dumps(document, indent=indent, ensure_ascii=ascii_only).encode()
    for _ in range(chance.choice([1, 1, 2, 4]) if harshness == 2 else 0):
        content = change_bytes(content, chance)
    value = json.dumps(chance.choice(VALUES))[: chance.randrange(1, 6000)]
    override = ["--set", f"{chance.choice(KNOWN)}={value}"]
    return content, override if chance.random() < 0.15 else []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a workspace that all mutations share, deep enough that .. leads nowhere."""
    folder = tmp_path_factory.mktemp("fuzz") / "host" / "workspace"
    write_image(folder / "data" / "image.png")
    write_image(folder / "data" / "image2.jpg")
    write_model(folder / "model")
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in the workspace, with a home and a model cache of its own, and ask no GPU."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("HF_HOME", str(folder / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")


def preflight(number: int) -> list[Record]:
    """Run the preflight of one mutation and hold what it said against every promise."""
    content, overrides = mutate(number)
    Path("config.json").write_bytes(content)
    line = ["--config", "config.json", "--validate-only", *overrides]
    recorder = Recorder()
    events, stop = train_lora.Emitter(recorder), train_lora.StopRequest()
    code = train_lora.run(train_lora.parse_arguments(line), events, stop)
    lines = [train_lora.encode_line(record) for record in recorder.records]
    check_stream(b"".join(lines))
    last = recorder.records[-1]
    assert {path.name for path in Path().iterdir()} == {"config.json", "data", "model"}
    assert code == (1 if last["type"] == "error" else 0)
    assert last.get("code") != "internal_error", f"mutation {number}: {last['message']}"
    return recorder.records


THOUSANDS = range(250, 10_000, 250)


def ending(records: list[Record]) -> str:
    """Name how a preflight ended: the error's code, or the topic of the report."""
    return str(records[-1].get("code") or records[-1]["topic"])


CONFIGS = {"config_not_json", "config_invalid", "config_conflict"}
FILES = {"model_not_found", "dataset_not_found", "output_unusable", "valid"}


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in THOUSANDS)]
)
def test_a_damaged_config_ends_with_one_line_that_says_why(first: int) -> None:
    """Whatever became of a config, a preflight ends with its report or an error that has a name.

    Damage is neither so small that all is valid nor so large that nothing else is tried.
    """
    many = [preflight(number) for number in range(first, first + 250)]
    endings = [ending(records) for records in many]
    assert endings.count("valid") >= 20
    assert set(endings) >= CONFIGS | FILES
    alone = [records for records in many if ending(records).startswith("config_")]
    assert {len(records) for records in alone} == {1}


@pytest.mark.parametrize("number", range(4))
def test_a_damaged_config_ends_the_process_in_order(number: int, folder: Path) -> None:
    """The real program says the same as in process and leaves no traceback."""
    content, _ = mutate(number)
    (folder / "config.json").write_bytes(content)
    ended = run_program("--config", "config.json", "--validate-only", cwd=folder)
    assert ended.code == (1 if ended.last["type"] == "error" else 0)
    assert ended.last.get("code") != "internal_error"
    assert ended.stderr == ""


def test_a_valid_config_is_valid() -> None:
    """What the mutations start from has nothing wrong."""
    write_config(Path.cwd(), **VALID)
    arguments = train_lora.parse_arguments(["--config", "config.json", "--validate-only"])
    events, stop = train_lora.Emitter(), train_lora.StopRequest()
    assert train_lora.run(arguments, events, stop) == 0
