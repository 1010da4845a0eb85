"""The config: what the schema says, what the loader takes, and how it refuses the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import operator
import os
import random
import shutil
import struct
import subprocess
import sys
import tracemalloc
import types
import typing
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import ROOT, Record, Recorder, load_config, write_config, write_json
from processes import run_program

import train_lora
from train_lora import ErrorCode, TrainError, TrainingConfig, WarningCode

SCHEMA: Record = json.loads((ROOT / "config_schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)
NESTED: Record = SCHEMA["definitions"]["training_params"]["properties"]
TOP: Record = {name: SCHEMA["properties"][name] for name in SCHEMA["required"]}
KNOBS: Record = TOP | NESTED

VALID: Record = {
    "dataset_path": "data",
    "base_model": "model",
    "output_path": "out",
    "trigger_words": ["zkb"],
}

# The table of the contract: name, default, values that are taken, values that are refused.
TABLE: list[tuple[str, Any, list[Any], list[Any]]] = [
    ("learning_rate", 1e-4, [1e-6, 0.1], [9e-7, 0, 1.01]),
    ("batch_size", 1, [1, 64], [0, 65, 1.5]),
    ("gradient_accumulation_steps", 1, [1, 1000], [0, -1]),
    ("steps", 1000, [1, 10**6], [0, None]),
    ("epochs", 10, [1, 10**6], [0, None]),
    ("resolution", 512, [256, 264, 2048, [512, 768]], [248, 255, 260, 2056, []]),
    ("lora_rank", 16, [1, 256], [0, 257, -4]),
    ("lora_alpha", 32, [0.001, 0.5, 64], [0, -1]),
    ("checkpoint_steps", 500, [1, 10**6], [0]),
    ("validation_steps", 100, [1, 10**6], [0]),
    ("seed", 0, [0, 2**32 - 1], [-1, 0.5]),
    ("resume", "auto", ["auto", "never"], ["always", "AUTO", True]),
    ("stop_with_parent", False, [True, False], [0, 1, "true"]),
]
TAKEN = [(name, value) for name, _, taken, _ in TABLE for value in taken]
REFUSED = [(name, value) for name, _, _, refused in TABLE for value in refused]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every test of this file begin in an empty folder."""
    monkeypatch.chdir(tmp_path)


def refusal(
    path: str | Path = "config.json", overrides: dict[str, Any] | None = None
) -> TrainError:
    """Load a config that must be refused and return the error."""
    with pytest.raises(TrainError) as caught:
        TrainingConfig.from_json(path, overrides)
    return caught.value


def refusal_of(content: bytes) -> TrainError:
    """Return the error that a config file of these bytes ends with."""
    Path("config.json").write_bytes(content)
    return refusal()


def refusal_with(**changes: Any) -> TrainError:
    """Return the error that a valid config with these changes ends with."""
    return refusal(write_config(Path.cwd(), **changes))


def verdict(path: Path) -> str:
    """Return the code of the error that loading ends with, and an empty word for none."""
    recorder = Recorder()
    with contextlib.suppress(TrainError), train_lora.reporting(train_lora.Emitter(recorder)):
        TrainingConfig.from_json(path)
    return str(recorder.records[-1]["code"]) if recorder.records else ""


def remarks(config: TrainingConfig) -> list[str]:
    """List the codes of what loading had to say."""
    return [remark.code.word for remark in config.remarks]


# --- The schema ---------------------------------------------------------------


def test_the_schema_is_valid_draft_07() -> None:
    """The schema keeps the rules of the draft it names."""
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "http://json-schema.org/draft-07/schema#"


@pytest.mark.parametrize("name", KNOBS)
def test_every_knob_explains_itself(name: str) -> None:
    """Title, sentence, type, examples and hint are there; a default too, unless it is required."""
    knob = KNOBS[name]
    assert {"title", "description", "type", "examples", "hint"} <= set(knob)
    assert all(knob[key] for key in ("title", "description", "examples", "hint"))
    assert knob["description"].endswith(".")
    assert ("default" in knob) == (name not in TOP)


def patterned(schema: Any) -> list[Record]:
    """List all that has a pattern, however deep in a schema."""
    if isinstance(schema, list):
        return [found for item in schema for found in patterned(item)]
    if not isinstance(schema, dict):
        return []
    inner = [found for item in schema.values() for found in patterned(item)]
    return [schema] if "pattern" in schema else inner


def as_elsewhere(schema: Record) -> Record:
    """Let `$` mean the very end; to Python it is also the place before a last line break."""
    changed = {key: as_elsewhere(value) for key, value in schema.items() if isinstance(value, dict)}
    pattern = {"pattern": schema["pattern"].replace("$", r"\Z")} if "pattern" in schema else {}
    return {**schema, **changed, **pattern}


@pytest.mark.parametrize("knob", patterned(SCHEMA))
def test_every_pattern_means_the_same_to_all_validators(knob: Record) -> None:
    """A host that checks a config in another language comes to the same verdict."""
    here, elsewhere = (jsonschema.Draft7Validator(each) for each in (knob, as_elsewhere(knob)))
    offered = [*knob.get("examples", []), knob.get("default"), "a", ""]
    for text in (text for text in offered if isinstance(text, str)):
        for other in (text, text + "\n", "\n" + text, text + "\r\n", text + "\0", text + "\0\n"):
            assert here.is_valid(other) == elsewhere.is_valid(other)


@pytest.mark.parametrize("name", ["device", "dataset_path", "vae", "cache_dir"])
def test_a_value_followed_by_what_does_not_belong_to_it_is_refused(name: str) -> None:
    """A line break behind a device, a NUL behind a path."""
    behind = "\n" if name == "device" else "\0"
    for value in (f"cpu{behind}", f"{behind}cpu"):
        assert [problem.path for problem in refusal_with(**{name: value}).problems] == [name]


@pytest.mark.parametrize("value", ["cpu", "mps", "auto", "cuda", "cuda:0", "cuda:9", "cuda:10"])
def test_a_device_is_named_as_torch_names_it(value: str) -> None:
    """With the number of a card, where there are several."""
    assert load_config(device=value).device == value


@pytest.mark.parametrize("value", ["", "cuda:", "cuda:01", "cuda:100", "cpu:0", "xcpu", "gpu"])
def test_what_is_no_device_is_refused(value: str) -> None:
    """By the schema, before anything is looked for."""
    assert refusal_with(device=value).code is ErrorCode.CONFIG_INVALID


@pytest.mark.parametrize("name", KNOBS)
def test_examples_and_defaults_are_valid(name: str) -> None:
    """What the schema offers as an example or default, it also accepts."""
    knob = KNOBS[name]
    offered = knob["examples"] + [knob[key] for key in ("default",) if key in knob]
    validator = jsonschema.Draft7Validator(knob)
    assert [value for value in offered if not validator.is_valid(value)] == []


def test_the_flat_form_refers_to_the_nested_form() -> None:
    """Each knob stands once: flat, it is a reference to the one definition."""
    others = {"$schema", "$comment", "training_params", *TOP}
    flat = {name: knob for name, knob in SCHEMA["properties"].items() if name not in others}
    where = "#/definitions/training_params/properties/"
    assert flat == {name: {"$ref": where + name} for name in NESTED}


def test_both_forms_refuse_unknown_keys() -> None:
    """Neither form takes a key that the schema does not name."""
    assert SCHEMA["additionalProperties"] is False
    assert SCHEMA["definitions"]["training_params"]["additionalProperties"] is False


def test_knobs_that_hold_a_path_say_so() -> None:
    """A host can tell from the schema for which knobs to offer a picker."""
    paths = {name for name, knob in KNOBS.items() if knob.get("format") == "path"}
    required = {"dataset_path", "base_model", "output_path"}
    optional = {"model_config_path", "vae", "cache_dir", "regularization_path", "loras_path"}
    optional |= {"init_lora", "embeddings_path", "validation_path", "metrics_file"}
    assert paths == required | optional


def test_the_contract_and_the_schema_name_the_same_knobs() -> None:
    """The schema begins with the table above, copied from the contract; further knobs follow."""
    assert [name for name, *_ in TABLE] == list(NESTED)[: len(TABLE)]


def test_every_knob_belongs_to_a_group() -> None:
    """A form can be laid out by the schema alone; no group is empty."""
    groups = [KNOBS[name]["x-group"] for name in KNOBS]
    assert set(groups) == set(SCHEMA["x-groups"])
    assert {name for name in KNOBS if KNOBS[name]["x-group"] == "Required"} == set(TOP)


def test_a_word_of_another_trainer_means_one_thing() -> None:
    """No word stands for two knobs, for a knob and for none, or for a knob of another name."""
    words = [word for knob in KNOBS.values() for word in knob.get("x-also", ())]
    words += [word for reason in SCHEMA["x-without"].values() for word in reason]
    assert [word for word in words if words.count(word) > 1 or word in KNOBS] == []
    assert [word for word in words if word != word.lower() or "-" in word] == []


# --- The class ----------------------------------------------------------------


def python_type(name: str) -> Any:
    """Say which Python type the schema's type of a knob stands for."""
    if name == "steps":
        return int | None  # none when epochs count
    kind = KNOBS[name]["type"]
    words = kind if isinstance(kind, list) else [kind]
    is_path = KNOBS[name].get("format") == "path" and name not in ("base_model", "vae")  # hub ids
    named: Record = {"string": Path if is_path else str, "integer": int, "number": float}
    named |= {"boolean": bool, "object": dict[str, Any], "array": tuple[str, ...]}
    if KNOBS[name].get("items", {}).get("type") == "number":
        named["array"] = tuple[float, ...]
    if KNOBS[name].get("items", {}).get("type") == "integer":
        named["array"] = tuple[int, ...]
    kinds = [named[word] for word in words if word != "null"]
    return functools.reduce(operator.or_, kinds + [None] * ("null" in words))


def test_fields_have_the_names_and_types_of_the_schema() -> None:
    """The class repeats the schema's names and types, and nothing else but the remarks."""
    hints = typing.get_type_hints(TrainingConfig)
    del hints["remarks"], hints["processes"], hints["given"]
    assert hints == {name: python_type(name) for name in KNOBS}


def test_no_default_is_written_in_python() -> None:
    """Only what is no knob has a default in the class."""
    nothing = dataclasses.MISSING
    fields = dataclasses.fields(TrainingConfig)
    with_default = [
        field.name
        for field in fields
        if field.default is not nothing or field.default_factory is not nothing
    ]
    assert with_default == ["remarks", "processes", "given"]


def test_a_config_cannot_be_written_to() -> None:
    """What was loaded stays as it is."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config().seed = 1  # type: ignore[misc]  # the very thing that must fail


@pytest.mark.parametrize("name", KNOBS)
def test_values_have_the_types_of_their_fields(name: str) -> None:
    """Loading leaves no list where a tuple is promised and no whole number where a float is."""
    value = getattr(load_config(), name)
    expected = python_type(name)
    kinds = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    assert isinstance(value, tuple(typing.get_origin(kind) or kind for kind in kinds))


def test_the_record_of_a_config_is_json_and_holds_every_knob() -> None:
    """What the start line shows are the knobs, resolved, and not the remarks."""
    record = load_config(learning_rate=1e-6).as_record()
    assert set(record) == set(KNOBS)
    assert json.loads(json.dumps(record)) == record


# --- Values -------------------------------------------------------------------


@pytest.mark.parametrize(("name", "default"), [row[:2] for row in TABLE])
def test_defaults_are_those_of_the_contract(name: str, default: Any) -> None:
    """A knob that is not given has the contract's default."""
    assert load_config().as_record()[name] == default


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("name", "value"), TAKEN)
def test_values_within_the_range_are_taken(name: str, value: Any, nested: bool) -> None:
    """In both forms, a value within the contract's range is what the config then holds."""
    changes = {"training_params": {name: value}} if nested else {name: value}
    assert load_config(**changes).as_record()[name] == value


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_values_outside_the_range_are_refused(name: str, value: Any, nested: bool) -> None:
    """In both forms, a value outside the contract's range is refused at its own path."""
    document = VALID | ({"training_params": {name: value}} if nested else {name: value})
    error = refusal_of(json.dumps(document).encode())
    assert error.code is ErrorCode.CONFIG_INVALID
    assert [problem.path for problem in error.problems] == ["training_params." * nested + name]


@pytest.mark.parametrize("name", ["steps", "batch_size", "learning_rate", "lora_alpha"])
@pytest.mark.parametrize("value", [True, "512", [512], {}, None])
def test_only_numbers_are_numbers(name: str, value: Any) -> None:
    """Neither true nor a text with digits nor null is a number."""
    error = refusal_of(json.dumps(VALID | {name: value}).encode())
    assert [problem.path for problem in error.problems] == [name]
    assert error.problems[0].found == json.dumps(value)


def test_a_number_is_one_however_its_host_writes_it() -> None:
    """JavaScript reads 3.0 and writes 3; what takes a whole number gets one either way."""
    arguments = {"slice_p": 11, "d_coef": 2, "d0": 0.5, "decouple": True}
    for kind in (int, float):
        given = arguments | {"slice_p": kind(11), "d_coef": kind(2)}
        changes = {"optimizer": "prodigy", "learning_rate": 1, "optimizer_arguments": given}
        config = load_config(**changes, timestep_shift=kind(3))
        assert repr(config.timestep_shift) == "3.0"
        assert str(config.optimizer_arguments) == str(dict(sorted(arguments.items())))


def test_a_whole_number_may_be_written_with_a_point() -> None:
    """512.0 is a whole number, as in draft-07, and arrives as one."""
    config = load_config(resolution=512.0, steps=1e3)
    assert [type(config.resolution), type(config.steps)] == [int, int]


@pytest.mark.parametrize("name", ["dataset_path", "base_model", "output_path"])
@pytest.mark.parametrize("value", ["", "da\0ta", 5, None, ["data"]])
def test_a_path_is_text_without_nul(name: str, value: Any) -> None:
    """A path that no system call takes is refused by the schema."""
    error = refusal_of(json.dumps(VALID | {name: value}).encode())
    assert error.code is ErrorCode.CONFIG_INVALID
    assert [problem.path for problem in error.problems] == [name]


@pytest.mark.parametrize(
    "words", ["zkb", None, [1], [""], [" \t"], ["x" * 201], [str(n) for n in range(33)]]
)
def test_trigger_words_are_a_short_list_of_texts(words: Any) -> None:
    """Anything else than up to 32 texts of up to 200 characters is refused."""
    error = refusal_of(json.dumps(VALID | {"trigger_words": words}).encode())
    assert error.code is ErrorCode.CONFIG_INVALID
    assert error.problems[0].path.startswith("trigger_words")


def test_the_schema_key_is_for_editors() -> None:
    """$schema is allowed at the top and leaves no trace."""
    assert load_config(**{"$schema": "./config_schema.json"}) == load_config()


def test_a_comment_is_for_readers() -> None:
    """$comment is allowed at the top and leaves no trace, not even in what `start` repeats."""
    config = load_config(**{"$comment": "For a card of 8 GB."})
    assert config == load_config()
    assert "$comment" not in config.as_record()


def test_a_comment_stands_at_the_top_alone() -> None:
    """Among the knobs it is an unknown key, as $schema is."""
    error = refusal_with(training_params={"$comment": "For a card of 8 GB."})
    assert [problem.path for problem in error.problems] == ["training_params.$comment"]


@pytest.mark.parametrize("key", ["comment", "_comment"])
def test_who_means_a_comment_is_told_its_name(key: str) -> None:
    """The usual spellings of other programs lead to the one that is allowed."""
    assert refusal_with(**{key: "For a card of 8 GB."}).problems[0].hint == "Did you mean $comment?"


def test_a_leading_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """~ is resolved in both folders."""
    monkeypatch.setenv("HOME", "/home/zkb")
    config = load_config(dataset_path="~/data", output_path="~")
    assert (config.dataset_path, config.output_path) == (Path("/home/zkb/data"), Path("/home/zkb"))


def test_the_home_of_nobody_is_an_ordinary_name() -> None:
    """~ with the name of a user who does not exist is left alone."""
    assert (
        load_config(dataset_path="~no-such-user/x").dataset_path == Path.cwd() / "~no-such-user/x"
    )


def test_a_base_model_may_lie_in_the_home_folder(
    in_workspace: Path, monkeypatch: pytest.MonkeyPatch, events: train_lora.Emitter
) -> None:
    """~ is resolved in base_model too, where the model is looked for."""
    monkeypatch.setenv("HOME", str(in_workspace))
    config = load_config(base_model="~/model")
    assert train_lora.LoRATrainer(config, events).validate().family == "sd1"


# --- The stairs: reading ------------------------------------------------------


@pytest.mark.parametrize("path", ["missing.json", ".", "missing/config.json", "nul\0.json"])
def test_a_config_that_cannot_be_read_is_not_found(path: str) -> None:
    """No file, a folder, a path that no system takes: one error that names the path."""
    error = refusal(path)
    assert error.code is ErrorCode.CONFIG_NOT_FOUND
    assert path in str(error)


@pytest.mark.parametrize("kind", [str, Path])
def test_the_path_may_be_text_or_a_path(kind: type[str | Path]) -> None:
    """From Python, from_json takes what open() takes."""
    assert TrainingConfig.from_json(kind(write_config(Path.cwd()))).base_model == "model"


def test_a_byte_order_mark_is_no_obstacle() -> None:
    """What Windows editors put in front of UTF-8 is passed over."""
    Path("config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(VALID).encode())
    assert TrainingConfig.from_json("config.json").trigger_words == ("zkb",)


NOT_STRICT: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "blank": (b" \r\n\t", "an empty file"),
    "only a byte order mark": (b"\xef\xbb\xbf", "an empty file"),
    "UTF-16": ('{"seed": 1}'.encode("utf-16"), "byte 0"),
    "UTF-16 without mark": ('{"seed": 1}'.encode("utf-16-le"), "line 1, column 2"),
    "Latin-1": ('{"base_model": "é"}'.encode("latin-1"), "byte 16"),
    "NaN": (b'{"learning_rate": NaN}', "NaN"),
    "Infinity": (b'{"learning_rate": Infinity}', "Infinity"),
    "-Infinity": (b'{"learning_rate": [-Infinity]}', "-Infinity"),
    "1e400": (b'{"learning_rate": 1e400}', "1e400"),
    "-1E400": (b'{"learning_rate": -1E400}', "-1E400"),
    "cut short": (b'{"seed": 1', "line 1, column 11"),
    "trailing comma": (b'{\n"seed": 1,\n}', "line 3, column 1"),
    "comment": (b'{"seed": 1} // one', "line 1, column 13"),
    "single quotes": (b"{'seed': 1}", "line 1, column 2"),
    "line break in a text": (b'{"base_model": "a\nb"}', "line 1, column 18"),
    "two documents": (b"{}{}", "line 1, column 3"),
    "list": (b'[{"seed": 1}]', '[{"seed": 1}]'),
    "number": (b"5", "5"),
    "null": (b"null", "null"),
    "text": (b'"config"', '"config"'),
    "100,000 open brackets": (b"[" * 100_000, "beyond all measure"),
    "100,000 nested lists": (b"[" * 100_000 + b"]" * 100_000, "beyond all measure"),
    "100,000 nested objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "beyond all measure"),
    "half a surrogate pair": (b'{"base_model": "\\ud800"}', "half of a surrogate pair"),
    "half a surrogate pair in a key": (b'{"\\udc00": 1}', "half of a surrogate pair"),
    "2 MiB": (b" " * 2**21, "more"),
}


@pytest.mark.parametrize(("content", "found"), NOT_STRICT.values(), ids=NOT_STRICT.keys())
def test_what_is_not_strict_json_is_refused(content: bytes, found: str) -> None:
    """One problem says what was found, as precisely as it can be known."""
    error = refusal_of(content)
    assert error.code is ErrorCode.CONFIG_NOT_JSON
    assert len(error.problems) == 1
    assert found in error.problems[0].found
    assert error.problems[0].expected
    assert error.problems[0].hint


BACKSLASH = "JSON wants \\\\ for a backslash; / does as well in a path."
QUOTES = 'Only straight double quotes count: "…".'
COMMENT = "JSON has no comments; the key $comment may hold one."
LAST_COMMA = "Remove the comma before the closing bracket."


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ('{"dataset_path": "C:\\Users\\me"}', BACKSLASH),
        ('{"dataset_path": "C:\\ux"}', BACKSLASH),
        ('{"seed": 1,}', LAST_COMMA),
        ('{"seed": 1,\n}', LAST_COMMA),
        ('{"trigger_words": ["zkb", ]}', LAST_COMMA),
        ("{'seed': 1}", QUOTES),
        ("{\"resume\": 'auto'}", QUOTES),
        ('{"resume": “auto”}', QUOTES),
        ('{"seed": 1, // one\n"steps": 2}', COMMENT),
        ('{"seed": 1 # one\n}', COMMENT),
        ('/* mine */ {"seed": 1}', COMMENT),
        ('{"flip": True}', "Write true."),
        ('{"flip": False}', "Write false."),
        ('{"steps": None}', "Write null."),
        ("{seed: 1}", "Put double quotes around the name."),
        ('{"seed": 1, steps: 2}', "Put double quotes around the name."),
        ('{"seed": 1 "steps": 2}', "A comma may be missing before this place."),
        ('{"trigger_words": ["zkb"]\n"steps": 2}', "A comma may be missing before this place."),
        ('{"seed": 1', "The end is missing, such as a closing bracket."),
        ('{"trigger_words": ["zkb"', "The end is missing, such as a closing bracket."),
        ('{"base_model": "a', "A closing quote is missing."),
        ('{"base_model": "a\nb"}', "A text ends in its line; \\n stands for a line break in it."),
        ('{"seed" 1}', "Mend this place."),
        ("seed", "Mend this place."),
    ],
)
def test_a_usual_mistake_in_json_is_named(text: str, hint: str) -> None:
    """Beside the place; of what is not recognised, the place alone is told."""
    assert refusal_of(text.encode()).hint == hint


@pytest.mark.parametrize(
    ("knob", "value", "hint"),
    [
        ("learning_rate", "1e-4", "Remove the quotes."),
        ("steps", "60", "Remove the quotes."),
        ("train_text_encoder", "true", "Remove the quotes."),
        ("train_text_encoder", "True", "Remove the quotes."),
        ("gradient_checkpointing", "true", "Remove the quotes."),
        ("optimizer", "AdamW8bit", "Did you mean adamw8bit?"),
        ("optimizer", "Lion", "Did you mean lion?"),
        ("mixed_precision", "fp-16", "Did you mean fp16?"),
        ("trigger_words", "zkb", 'Write ["zkb"].'),
        ("device", "gpu", NESTED["device"]["hint"]),
        ("resume", "xyzzy", NESTED["resume"]["hint"]),
        ("steps", "many", NESTED["steps"]["hint"]),
    ],
)
def test_a_value_that_is_almost_right_is_corrected(knob: str, value: str, hint: str) -> None:
    """Any other gets the hint of its knob."""
    assert refusal_with(**{knob: value}).hint == hint


def test_an_integer_of_5000_digits_is_refused() -> None:
    """A number that Python may not even read ends like any other wrong value."""
    error = refusal_of(b'{"seed": ' + b"9" * 5000 + b"}")
    assert error.code in (ErrorCode.CONFIG_NOT_JSON, ErrorCode.CONFIG_INVALID)


@pytest.mark.parametrize(
    "text", ["9" * 1000, "-" + "9" * 1000, "0." + "3" * 1000, "1" * 1000 + "e-990"]
)
def test_a_number_has_no_more_digits_than_anybody_writes(text: str) -> None:
    """Computing with a few thousand long numbers could hold the interpreter for half a minute."""
    for document in (text, f'{{"shape": [1, {text}]}}'):
        with pytest.raises(ValueError, match=r"a number of 1\d\d\d characters"):
            train_lora.parse_json(document)
    assert "characters" in refusal_of(f'{{"seed": {text}}}'.encode()).problems[0].found


@pytest.mark.parametrize(
    ("digits", "count", "found"), [(4000, 600, "a number of 4000 char"), (18, 120_000, "a shape")]
)
def test_a_header_of_long_numbers_is_refused_before_any_is_multiplied(
    digits: int, count: int, found: str
) -> None:
    """2.4 MB are enough for half a minute without hearing a signal."""
    shape = ", ".join(["9" * digits] * count)
    entry = f'{{"dtype": "F32", "shape": [{shape}], "data_offsets": [0, 4]}}'
    header = f'{{"w": {entry}}}'.encode()
    path = Path("model.safetensors")
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(TrainError, match=found) as refused:
        train_lora.read_header(path)
    assert refused.value.code is ErrorCode.MODEL_DAMAGED


@pytest.mark.parametrize("name", ["seed", "learning_rate", "lora_alpha", "resolution"])
def test_an_integer_of_400_digits_is_out_of_range(name: str) -> None:
    """A number that no float can hold is compared all the same."""
    error = refusal_of(json.dumps(VALID | {name: 10**400}).encode())
    assert [problem.path for problem in error.problems] == [name]


def test_all_that_strict_json_forbids_is_told_at_once() -> None:
    """Several keys given twice, a NaN and an infinity make one problem each."""
    text = b'{"seed": 1, "seed": 2, "steps": 1, "steps": 1, "epochs": NaN, "lora_alpha": 1e999}'
    error = refusal_of(text)
    assert error.code is ErrorCode.CONFIG_NOT_JSON
    assert sorted(problem.path for problem in error.problems) == ["$", "$", "seed", "steps"]


def test_a_key_given_twice_is_found_inside_training_params() -> None:
    """Strictness does not end at the top level."""
    error = refusal_of(b'{"training_params": {"seed": 1, "seed": 1, "seed": 1}}')
    assert error.code is ErrorCode.CONFIG_NOT_JSON
    assert error.problems[0].found == "it 3 times"


@pytest.mark.parametrize("depth", [10, 100, 300, 500, 800, 900, 940, 980])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_nesting_of_any_depth_is_refused_in_words(depth: int, brackets: str) -> None:
    """A config deep enough for the parser but too deep for whoever looks into it is refused too."""
    opening = '{"a":' if brackets == "{}" else "["
    value = opening * depth + "1" + brackets[1] * depth
    error = refusal_of(f'{{"trigger_words": [{value}, {value}], "seed": {value}}}'.encode())
    assert error.code in (ErrorCode.CONFIG_NOT_JSON, ErrorCode.CONFIG_INVALID)


def test_a_file_of_100_mb_is_not_read_to_its_end() -> None:
    """No more is read than a config can be."""
    Path("config.json").write_bytes(b'{"seed": "')
    os.truncate("config.json", 100_000_000)
    tracemalloc.start()
    error = refusal()
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert error.code is ErrorCode.CONFIG_NOT_JSON
    assert peak_bytes < 10_000_000


CROWDED: dict[str, Record] = {
    "numbers": {"trigger_words": list(range(100_000))},
    "objects": {"trigger_words": [{"a": number} for number in range(4000)]},
    "texts and a number": {"trigger_words": [1, *map(str, range(50_000))]},
    "unknown keys": {f"lora_rank_{number}": 1 for number in range(40_000)},
}


@pytest.mark.parametrize("crowd", CROWDED.values(), ids=CROWDED.keys())
def test_of_a_config_full_of_mistakes_only_the_first_are_put_into_words(crowd: Record) -> None:
    """However many values are wrong, a config error takes no time: words are what costs."""
    Path("config.json").write_bytes(json.dumps(VALID | crowd).encode())
    error = refusal()
    assert error.code is ErrorCode.CONFIG_INVALID
    assert 0 < len(error.problems) <= train_lora.MOST_PROBLEMS


# --- The stairs: schema and rules ---------------------------------------------


def test_all_problems_are_told_at_once() -> None:
    """Wrong, unknown and missing values of both forms stand in one list."""
    params = {"lora_rank": 0, "lr": 1}
    document = {"dataset_path": "data", "output_path": 3, "bach_size": 1, "resolution": 513}
    error = refusal_of(json.dumps(document | {"training_params": params}).encode())
    nested = ["training_params.lora_rank", "training_params.lr"]
    missing = ["base_model", "trigger_words"]
    expected = sorted([*nested, *missing, "output_path", "bach_size", "resolution"])
    assert sorted(problem.path for problem in error.problems) == expected
    assert str(error).startswith("7 problems, the first: ")


PROBLEMS: dict[str, Record] = {
    "missing": {"base_model": None},
    "unknown": {"xyzzy": 1},
    "wrong type": {"steps": "many"},
    "out of range": {"steps": 0},
    "no multiple of 8": {"resolution": 513},
    "not in the list": {"resume": "perhaps"},
    "empty path": {"output_path": ""},
    "no list": {"trigger_words": "zkb"},
    "wrong item": {"trigger_words": [5]},
    "empty item": {"trigger_words": ["zkb", ""]},
    "blank item": {"trigger_words": [" "]},
    "too many items": {"trigger_words": [str(number) for number in range(33)]},
    "no object": {"training_params": 5},
    "schema no text": {"$schema": 5},
    "comment no text": {"$comment": ["One.", "Two."]},
    "conflict": {"learning_rate": 0.5},
}


@pytest.mark.parametrize("changes", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_every_problem_has_all_four_parts(changes: Record) -> None:
    """Path, expectation, finding and remedy are never left empty."""
    problem = refusal_with(**changes).problems[0]
    assert all(dataclasses.astuple(problem))


RANK = "expected a whole number 1 … 256, got 0. 4 to 32 suits a style or a character."
ONE_OF = 'expected one of "auto", "never"'
KNOWN = "expected a known key"
SIZE = "expected a whole number 256 … 2048, a multiple of 8 or a list of at most 8 different "
SIZE += "numbers of that kind, got 513."


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lora_rank": 0}, f"lora_rank: {RANK}"),
        ({"training_params": {"lora_rank": 0}}, f"training_params.lora_rank: {RANK}"),
        ({"resolution": 513}, f"resolution: {SIZE} {NESTED['resolution']['hint']}"),
        ({"resume": "no"}, f'resume: {ONE_OF}, got "no". {NESTED["resume"]["hint"]}'),
        ({"xyz": 8}, f"xyz: {KNOWN}, got an unknown one. REFERENCE.md lists the known keys."),
        (
            {"base_model": None},
            f"base_model: expected a path, got nothing. {TOP['base_model']['hint']}",
        ),
    ],
)
def test_a_problem_reads_as_a_sentence(changes: Record, text: str) -> None:
    """The message names path, expectation, finding and remedy, in this order."""
    assert str(refusal_with(**changes)) == text


def test_the_number_of_trigger_words_is_told() -> None:
    """Who gives too many words learns how many there may be."""
    error = refusal_with(trigger_words=[str(number) for number in range(33)])
    assert "32" in error.problems[0].expected


def test_a_long_value_is_quoted_in_part() -> None:
    """A problem stays a sentence, whatever was found."""
    assert len(refusal_with(seed="x" * 100_000).problems[0].found) <= 60


LOSS = "Of the loss, loss, snr_gamma and noise_offset can be chosen, and nothing else."
CAPTIONS = "Captions stand in image.txt or metadata.jsonl, and are read as they are."


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("lora_rnk", "Did you mean lora_rank?"),
        ("learningRate", "Did you mean learning_rate?"),
        ("Batch_Size", "Did you mean batch_size?"),
        ("max_train_steps", "It is called steps here."),
        ("Network-Dim", "It is called lora_rank here."),
        ("network_alpha", "It is called lora_alpha here."),
        ("unet_lr", "It is called learning_rate here."),
        ("train_batch_size", "It is called batch_size here."),
        ("train_data_dir", "It is called dataset_path here."),
        ("pretrained_model_name_or_path", "It is called base_model here."),
        ("instance_prompt", "It is called trigger_words here."),
        ("caption_prefix", CAPTIONS),
        ("shuffle_caption", "It is called shuffle_tags here."),
        ("max_token_length", "It is called max_tokens here."),
        ("min_snr_gamma", "It is called snr_gamma here."),
        ("debiased_estimation_loss", LOSS),
        ("xyzzy", "REFERENCE.md lists the known keys."),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, hint: str, nested: bool) -> None:
    """In both forms an unknown key is refused, with the known key that comes closest."""
    error = refusal_with(**{"training_params": {key: 1}} if nested else {key: 1})
    assert [problem.path for problem in error.problems] == ["training_params." * nested + key]
    assert error.hint == hint


@pytest.mark.parametrize("name", TOP)
def test_a_required_key_does_not_belong_into_training_params(name: str) -> None:
    """A required key in the wrong place is told where it belongs."""
    error = refusal_with(**{name: None, "training_params": {name: VALID[name]}})
    hints = {problem.path: problem.hint for problem in error.problems}
    assert set(hints) == {name, f"training_params.{name}"}
    assert hints[f"training_params.{name}"] == "It belongs at the top level."


def test_a_stair_is_reached_only_when_the_one_before_holds() -> None:
    """NaN hides a wrong rank, and a wrong rank hides a rate that goes with no optimizer."""
    text = b'{"learning_rate": 0.5, "lora_rank": 0, "seed": NaN}'
    assert refusal_of(text).code is ErrorCode.CONFIG_NOT_JSON
    assert refusal_with(learning_rate=0.5, lora_rank=0).code is ErrorCode.CONFIG_INVALID
    assert refusal_with(learning_rate=0.5).code is ErrorCode.CONFIG_CONFLICT


def test_all_conflicts_are_told_at_once() -> None:
    """Values that are fine alone and wrong together are listed like all other problems."""
    error = refusal_with(learning_rate=0.11, output_path="data")
    assert error.code is ErrorCode.CONFIG_CONFLICT
    assert [problem.path for problem in error.problems] == ["learning_rate", "output_path"]


@pytest.mark.parametrize("knob", ["output_path", "regularization_path"])
def test_a_folder_inside_the_dataset_may_be_any(knob: str) -> None:
    """The dataset's scan leaves it out, whatever its name."""
    for inner in ("data/samples", "data/out"):
        given = {"dataset_path": "data", "output_path": "out", knob: inner}
        assert vars(load_config(**given))[knob] == Path(inner).absolute()


@pytest.mark.parametrize("folder", ["data", "out", "out/samples"])
def test_images_for_regularization_lie_in_a_folder_of_their_own(folder: str) -> None:
    """What is to stay as it is cannot be what is taught, nor what the run draws."""
    error = refusal_with(dataset_path="data", output_path="out", regularization_path=folder)
    assert error.code is ErrorCode.CONFIG_CONFLICT
    assert [problem.path for problem in error.problems] == ["regularization_path"]


@pytest.mark.parametrize("knob", ["dataset_path", "regularization_path", "validation_path"])
def test_finished_loras_lie_in_no_folder_of_images(knob: str) -> None:
    """Their previews would be learned from at the next start."""
    error = refusal_with(**{"dataset_path": "data", knob: "images"}, loras_path="images")
    assert error.code is ErrorCode.CONFIG_CONFLICT
    assert [problem.path for problem in error.problems] == ["loras_path"]


@pytest.mark.parametrize("knob", ["dataset_path", "regularization_path"])
@pytest.mark.parametrize(
    "folder", ["samples", "samples/deeper", "checkpoints", "state/step_5", "earlier_3/samples"]
)
def test_what_a_run_writes_is_no_data(knob: str, folder: str) -> None:
    """Samples would become training images, and --fresh would move them away."""
    for made in (False, True):
        if made:
            Path("out", folder).mkdir(parents=True)
        error = refusal_with(output_path="./out/", **{knob: f"x/../out/{folder}"})
        assert error.code is ErrorCode.CONFIG_CONFLICT
        assert [problem.path for problem in error.problems] == [knob]


@pytest.mark.parametrize("folder", ["out/images", "out/samples_of_mine", "out/images/samples"])
def test_images_may_lie_beside_what_a_run_writes(folder: str) -> None:
    """Some keep everything about a LoRA in one folder."""
    assert load_config(dataset_path=folder).dataset_path == Path(folder).absolute()


def mounted(*arguments: str) -> int:
    """Preflight where the folder `data` can also be reached as `again`, without a link."""
    Path("data", "out").mkdir(parents=True, exist_ok=True)
    Path("again").mkdir(exist_ok=True)
    command = f'mount --bind data again && exec "{sys.executable}" "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, "sh", *arguments], capture_output=True, check=False
    )
    return done.returncode


def test_one_folder_under_two_names_is_one_folder() -> None:
    """As where the file system does not care for case: the system is asked, not the spelling."""
    if not shutil.which("unshare") or mounted("-c", "") != 0:
        pytest.skip("needs the right to mount")
    for changes in (
        {"output_path": "again"},
        {"regularization_path": "again"},
        {"output_path": "data/out", "regularization_path": "again/out/samples"},
        {"output_path": "data/out", "dataset_path": "again/out/samples"},
    ):
        write_config(Path.cwd(), **changes)
        look = "import train_lora; train_lora.TrainingConfig.from_json('config.json')"
        check = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {look}"
        assert mounted("-c", check) == 1
    write_config(Path.cwd(), output_path="again/out")
    assert mounted("-c", check) == 0


@pytest.mark.parametrize("output", ["data", "./data/", "data/.", "data/../data", "link"])
def test_the_output_may_not_go_into_the_dataset_folder_itself(output: str) -> None:
    """However the folder is spelled, samples must not become training images."""
    Path("data").mkdir()
    Path("link").symlink_to("data")
    assert refusal_with(output_path=output).code is ErrorCode.CONFIG_CONFLICT


def test_class_images_need_a_folder_and_a_prompt() -> None:
    """Both are named at once, each with an example of what to give."""
    error = refusal_with(prior_preservation=True)
    assert error.code is ErrorCode.CONFIG_CONFLICT
    assert [problem.path for problem in error.problems] == ["regularization_path", "prior_prompt"]
    given: Record = {"regularization_path": "others", "prior_prompt": "a dog"}
    assert load_config(prior_preservation=True, **given).remarks == ()


@pytest.mark.parametrize("ends", [[5, 5], [900, 100]])
def test_a_range_of_times_begins_before_it_ends(ends: list[int]) -> None:
    """Two whole numbers, the lower first."""
    error = refusal_with(timestep_range=ends)
    assert error.code is ErrorCode.CONFIG_CONFLICT
    assert [problem.path for problem in error.problems] == ["timestep_range"]
    expected = "a list of at most 2 numbers, a whole number 0 … 1000 each"
    for wrong in ([1], [1, 2, 3], 5):
        assert refusal_with(timestep_range=wrong).problems[0].expected == expected
    assert load_config(timestep_range=[0.0, 1e3]).timestep_range == (0, 1000)


@pytest.mark.parametrize("knob", ["learning_rate", "text_encoder_learning_rate"])
def test_no_network_learns_at_a_rate_that_destroys_it(knob: str) -> None:
    """What the denoiser cannot stand, the text encoders cannot either."""
    error = refusal_with(train_text_encoder=True, **{knob: 0.11})
    assert error.code is ErrorCode.CONFIG_CONFLICT
    assert [problem.path for problem in error.problems] == [knob]
    assert vars(load_config(train_text_encoder=True, **{knob: 0.1}))[knob] == 0.1


@pytest.mark.parametrize("ending", [".png", ".JPG", ".jsonl"])
def test_captions_do_not_stand_in_images(ending: str) -> None:
    """Nor in the file that has a line for each of them."""
    error = refusal_with(caption_extension=ending)
    assert error.code is ErrorCode.CONFIG_CONFLICT
    assert [problem.path for problem in error.problems] == ["caption_extension"]


@pytest.mark.parametrize("ending", ["txt", "", ".", "../.txt", ".a/b", ".txt\n"])
def test_what_ends_no_name_is_no_caption_extension(ending: str) -> None:
    """By the schema, before anything is looked for."""
    assert refusal_with(caption_extension=ending).code is ErrorCode.CONFIG_INVALID


@pytest.mark.parametrize("tokens", [0, 74, 76, 77, 300])
def test_captions_are_read_in_pieces_of_75_tokens(tokens: int) -> None:
    """Up to three of them."""
    assert refusal_with(max_tokens=tokens).code is ErrorCode.CONFIG_INVALID


IDLE: list[tuple[Record, list[str]]] = [
    ({"steps": 5, "epochs": 3}, ["epochs"]),
    ({"steps": 5, "training_params": {"epochs": 3}}, ["epochs"]),
    ({"epochs": 3}, []),
    ({"steps": 5, "epochs": 10}, []),
    ({"text_encoder_learning_rate": 1e-5}, ["text_encoder_learning_rate"]),
    ({"text_encoder_learning_rate": 1e-5, "train_text_encoder": True}, []),
    ({"regularization_share": 0.25}, ["regularization_share"]),
    ({"regularization_share": 0.25, "regularization_path": "others"}, []),
    ({"regularization_share": 0.5}, []),
    ({"prior_weight": 0.5}, ["prior_weight"]),
    ({"prior_weight": 0.5, "regularization_path": "others"}, []),
    ({"prior_prompt": "a dog", "prior_images": 5}, ["prior_prompt", "prior_images"]),
    ({"huber_delta": 0.2}, ["huber_delta"]),
    ({"huber_delta": 0.2, "loss": "l1"}, ["huber_delta"]),
    ({"huber_delta": 0.2, "loss": "huber"}, []),
    ({"steps": 5, "epochs": 3, "regularization_share": 0.25}, ["epochs", "regularization_share"]),
    ({"keep_tokens": 1}, ["keep_tokens"]),
    ({"keep_tokens": 1, "shuffle_tags": True}, []),
    ({"keep_tokens": 1, "tag_dropout": 0.1}, []),
]


@pytest.mark.parametrize(("changes", "idle"), IDLE)
def test_a_knob_without_effect_is_remarked_on(changes: Record, idle: list[str]) -> None:
    """With what keeps it from having one; what equals the default surprises nobody."""
    config = load_config(**changes)
    assert [remark.data["key"] for remark in config.remarks] == idle
    assert {remark.code for remark in config.remarks} <= {WarningCode.KNOB_WITHOUT_EFFECT}
    assert all(remark.data["because"] in KNOBS for remark in config.remarks)


def test_an_override_without_effect_is_remarked_on() -> None:
    """Who types it waits for something to happen."""
    config = TrainingConfig.from_json(write_config(Path.cwd(), steps=5), {"epochs": 3})
    (remark,) = config.remarks
    assert remark.data == {"key": "epochs", "value": 3, "because": "steps"}
    assert remark.message == "epochs 3 has no effect beside steps 5"


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({}, []),
        ({"learning_rate": 1e-5}, []),
        ({"learning_rate": 9.9e-6}, ["learning_rate_low"]),
        ({"trigger_words": []}, ["trigger_words_empty"]),
        (
            {"trigger_words": [], "learning_rate": 1e-6},
            ["learning_rate_low", "trigger_words_empty"],
        ),
    ],
)
def test_what_is_seldom_meant_is_remarked_on(changes: Record, codes: list[str]) -> None:
    """A rate below 1e-5 and an empty list of words are allowed, with a warning."""
    assert remarks(load_config(**changes)) == codes


@pytest.mark.parametrize("place", ["x" * 300, "x/" * 3000, "data/" + "x" * 300 + "/y"])
@pytest.mark.parametrize("knob", [name for name in KNOBS if KNOBS[name].get("format") == "path"])
def test_a_path_longer_than_any_ends_in_an_error_that_has_a_name(
    in_workspace: Path, events: train_lora.Emitter, recorder: Recorder, knob: str, place: str
) -> None:
    """The file system refuses even to look; cache and metrics may fail later, with a warning."""
    config = load_config(**{knob: place + ".prom" * (knob == "metrics_file")})
    with contextlib.suppress(TrainError):
        train_lora.LoRATrainer(config, events).validate()
    last = recorder.records[-1]
    assert last.get("code") != "internal_error"
    assert (last["type"] == "error") == (knob not in ("cache_dir", "metrics_file"))


# --- Two forms ----------------------------------------------------------------


def test_training_params_win_over_the_top_level() -> None:
    """Where both forms give a value, the nested one counts."""
    config = load_config(lora_rank=8, seed=1, training_params={"lora_rank": 4})
    assert (config.lora_rank, config.seed, config.lora_alpha) == (4, 1, 32)


def test_two_different_values_are_remarked_on() -> None:
    """The remark names the knob and both values; it says who wins."""
    (remark,) = load_config(lora_rank=8, training_params={"lora_rank": 4}).remarks
    assert remark.code is WarningCode.CONFIG_VALUE_TWICE
    assert remark.data == {"key": "lora_rank", "top_level": 8, "training_params": 4}
    assert "training_params wins" in remark.message


@pytest.mark.parametrize("value", [512, 512.0])
def test_two_equal_values_are_not_remarked_on(value: float) -> None:
    """Saying the same twice is no contradiction."""
    assert remarks(load_config(resolution=512, training_params={"resolution": value})) == []


def test_remarks_reach_the_stream(
    in_workspace: Path, events: train_lora.Emitter, recorder: Recorder
) -> None:
    """What loading had to say is a warning right behind the first line."""
    config = load_config(seed=1, training_params={"seed": 2})
    train_lora.LoRATrainer(config, events).validate()
    assert [record["type"] for record in recorder.records[:2]] == ["start", "warning"]
    assert recorder.codes()[0] == "config_value_twice"


# --- Overrides ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("k=8", 8),
        ("k=1e-4", 1e-4),
        ("k=true", True),
        ("k=null", None),
        ('k=["a","b"]', ["a", "b"]),
        ('k="8"', "8"),
        ("k=never", "never"),
        ("k=/workspace/data", "/workspace/data"),
        ("k=/a=b c", "/a=b c"),
        (r"k=C:\data", r"C:\data"),
        ("k=", ""),
        ("k=[", "["),
        ("k=NaN", "NaN"),
        ("k=-Infinity", "-Infinity"),
        ("k=1e400", "1e400"),
        ('k={"a":1,"a":2}', '{"a":1,"a":2}'),
        ("k=" + "[" * 100_000, "[" * 100_000),
    ],
)
def test_the_value_of_an_override_is_strict_json_or_else_a_text(text: str, value: Any) -> None:
    """What strict JSON would refuse is taken as it was typed."""
    assert train_lora.parse_arguments(["--config", "c", "--set", text]).set == [("k", value)]


@pytest.mark.parametrize("text", ["steps", "=5", ""])
def test_an_override_without_key_or_value_is_a_wrong_command_line(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program ends with 2, says what it expected and prints no event."""
    with pytest.raises(SystemExit) as ended:
        train_lora.main(["--config", "config.json", "--set", text])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert "KEY=JSON" in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_rank": 8},
        {"training_params": {"lora_rank": 4}},
        {"lora_rank": 8, "training_params": {"lora_rank": 4}},
        {"training_params": {}},
    ],
)
def test_an_override_wins_wherever_the_value_stands(changes: Record) -> None:
    """Flat, nested, both or nowhere: what --set says counts."""
    path = write_config(Path.cwd(), **changes)
    assert TrainingConfig.from_json(path, {"lora_rank": 2}).lora_rank == 2


@pytest.mark.parametrize("order", [1, -1])
def test_an_override_wins_beside_one_of_training_params(order: int) -> None:
    """Replacing training_params as a whole swallows no other override."""
    path = write_config(Path.cwd(), training_params={"lora_rank": 4, "steps": 7})
    pairs: list[tuple[str, Any]] = [("training_params", {"seed": 1}), ("lora_rank", 2)]
    config = TrainingConfig.from_json(path, dict(pairs[::order]))
    assert (config.lora_rank, config.seed, config.steps) == (2, 1, 1000)


def test_an_override_of_one_knob_brings_no_remark() -> None:
    """A single value is replaced where it stands, so that nothing stands twice."""
    path = write_config(Path.cwd(), training_params={"lora_rank": 4})
    assert remarks(TrainingConfig.from_json(path, {"lora_rank": 2})) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_rank", 0),
        ("lora_rank", "NaN"),
        ("lora_rnk", 1),
        ("lora_alpha", float("nan")),
        ("learning_rate", float("inf")),
    ],
)
def test_an_override_is_checked_like_the_file(key: str, value: Any) -> None:
    """What JSON or the schema forbids is refused with a code, also when it comes from Python."""
    error = refusal(write_config(Path.cwd()), {key: value})
    assert error.code in (ErrorCode.CONFIG_NOT_JSON, ErrorCode.CONFIG_INVALID)


def test_an_override_from_python_may_be_a_path() -> None:
    """A caller need not turn a path into text."""
    path = write_config(Path.cwd())
    config = TrainingConfig.from_json(path, {"output_path": Path("here")})
    assert config.output_path == Path.cwd() / "here"


def test_an_override_supplies_what_the_file_lacks() -> None:
    """A required key may come from the command line."""
    path = write_config(Path.cwd(), dataset_path=None)
    config = TrainingConfig.from_json(path, {"dataset_path": "/workspace/datasets"})
    assert config.dataset_path == Path("/workspace/datasets")


# --- Through the program ------------------------------------------------------


def test_the_config_may_come_from_standard_input(in_workspace: Path) -> None:
    """A dash stands for standard input."""
    document = json.dumps(VALID | {"seed": 5}).encode()
    ended = run_program("--config", "-", "--validate-only", cwd=in_workspace, stdin=document)
    assert (ended.code, ended.last["topic"]) == (0, "valid")
    assert ended.lines[0]["config"]["seed"] == 5


def test_problems_stand_in_the_error_line(tmp_path: Path) -> None:
    """A host gets every problem in four fields, and the first in the message."""
    write_config(tmp_path, lora_rank=0, lora_rnk=1)
    ended = run_program("--config", "config.json", cwd=tmp_path)
    problems = {problem.pop("path"): problem for problem in ended.last["problems"]}
    assert set(problems) == {"lora_rank", "lora_rnk"}
    assert problems["lora_rank"] == {
        "expected": "a whole number 1 … 256",
        "found": "0",
        "hint": "4 to 32 suits a style or a character.",
    }


def test_bytes_that_are_no_text_reach_the_stream_as_text(tmp_path: Path) -> None:
    """A path typed in another encoding is shown in characters that every JSON reader takes."""
    path = write_config(tmp_path)
    ended = run_program("--config", path, "--set", "base_model=caf\udce9", cwd=tmp_path)
    assert json.dumps(ended.lines, ensure_ascii=False).encode().decode()


# --- Derived numbers ----------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "images", "batch", "accumulation", "total", "per_epoch"),
    [
        ({}, 3, 1, 1, 1000, 3),
        ({}, 3, 4, 2, 1000, 1),
        ({"steps": 5}, 3, 1, 1, 5, 3),
        ({"steps": 5, "epochs": 10}, 3, 1, 1, 5, 3),
        ({"steps": 5, "training_params": {"epochs": 10}}, 3, 1, 1, 5, 3),
        ({"epochs": 7, "training_params": {"steps": 5}}, 3, 1, 1, 5, 3),
        ({"epochs": 10}, 3, 1, 1, 30, 3),
        ({"training_params": {"epochs": 10}}, 3, 1, 1, 30, 3),
        ({"epochs": 10}, 3, 2, 1, 15, 2),
        ({"epochs": 1}, 3, 2, 1, 2, 2),
        ({"epochs": 3}, 7, 2, 2, 6, 2),
        ({"epochs": 1}, 1, 64, 4, 1, 1),
        ({"epochs": 10}, 1, 64, 4, 1, 1),
        ({"epochs": 2}, 100, 4, 5, 10, 5),
        ({"epochs": 10**9}, 100_000, 1, 1, 10**14, 100_000),
    ],
)
def test_steps_and_epochs_become_updates(
    given: Record, images: int, batch: int, accumulation: int, total: int, per_epoch: int
) -> None:
    """Steps are updates and win; epochs run on across their borders, only the last is short."""
    sizes = {"batch_size": batch, "gradient_accumulation_steps": accumulation}
    config = load_config(**given, **sizes)
    assert config.effective_batch == batch * accumulation
    order = train_lora.ImageOrder(config, images)
    assert (order.total_steps, order.steps(epochs=1)) == (total, per_epoch)


def test_a_preflight_tells_the_updates_of_epochs(
    in_workspace: Path, events: train_lora.Emitter, recorder: Recorder
) -> None:
    """The first line cannot know the total of epochs yet, the last one does."""
    train_lora.LoRATrainer(load_config(epochs=4, batch_size=2), events).validate()
    first, last = recorder.records[0], recorder.records[-1]["data"]
    assert first["total_steps"] is None
    assert (last["total_steps"], last["steps_per_epoch"], last["effective_batch"]) == (6, 2, 2)


# --- Loader and schema agree --------------------------------------------------

PIECES: list[Any] = [
    *(None, True, False, 0, 1, -1, 8, 256, 512, 512.0, 513, 2048, 2**32, 10**30, 0.5, 1e-6, 1e-7),
    *("", " ", "auto", "never", "512", "data", "a\0b", [], ["zkb"], ["a", "a"], ["a", 1], [" "]),
    *({}, {"seed": 1}, {"lora_rank": 0}, {"steps": 5.0, "epochs": 2}, {"dataset_path": "data"}),
]
NAMES = [*SCHEMA["properties"], "lora_rnk", "Seed", ""]


def random_config(seed: int) -> Record:
    """Make a config that is right in most places and, often, wrong in one."""
    chance = random.Random(seed)
    document: Record = dict(VALID)
    for name, knob in NESTED.items():
        if chance.random() < 0.3:
            document[name] = chance.choice([*knob["examples"], knob["default"]])
    for _ in range(chance.choice([0, 0, 1, 1, 2])):
        document[chance.choice(NAMES)] = chance.choice(PIECES)
    if chance.random() < 0.3:
        document["training_params"] = {chance.choice(list(NESTED)): chance.choice(PIECES)}
    if chance.random() < 0.1:
        del document[chance.choice(list(VALID))]
    return document


def test_the_loader_refuses_what_the_schema_refuses(tmp_path: Path) -> None:
    """Any other validator, given the raw document and the schema, comes to the same verdict."""
    accepted = 0
    for seed in range(200):
        document = random_config(seed)
        path = write_json(tmp_path / "config.json", document)
        valid = VALIDATOR.is_valid(document)
        assert (verdict(path) == "config_invalid") == (not valid), document
        accepted += valid
    assert 50 <= accepted <= 150  # of both kinds
