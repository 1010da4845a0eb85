"""The form of a new run: made from the schema, read back without loss, problems at their fields."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import pytest

from studio import forms
from studio.forms import config_of, controls, knob_of, texts_of

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "config_schema.json").read_text("utf-8"))
CONTROLS = controls(SCHEMA)
RULES = {knob: forms.resolve(SCHEMA, rule) for knob, rule in SCHEMA["properties"].items()}
LETTERS = "ab 1,.;\n[]{}\"'\\<>&é猫🦊"


def test_every_knob_has_exactly_one_control() -> None:
    """Also one that is added tomorrow; only what the studio sets itself is left out."""
    left_out = {*forms.NO_KNOBS, *forms.SET_BY_STUDIO}
    assert set(CONTROLS) == set(SCHEMA["properties"]) - left_out
    in_groups = [each.knob for group in forms.groups(SCHEMA, CONTROLS) for each in group.controls]
    assert sorted(in_groups) == sorted(CONTROLS)


def test_the_first_group_is_the_required_one_and_the_second_has_five_knobs() -> None:
    """They stand before all others on the page."""
    first, second = forms.groups(SCHEMA, CONTROLS)[:2]
    assert (first.name, second.name) == forms.FIRST_GROUPS
    assert [each.knob for each in second.controls if each.knob != "preset"] == [
        "learning_rate",
        "batch_size",
        "steps",
        "resolution",
        "lora_rank",
    ]


def test_a_knob_of_a_new_kind_and_group_appears_without_code() -> None:
    """It stands last, under the group that it names."""
    rule = {"type": "string", "x-group": "Novelties", "title": "New", "default": "a"}
    schema = {**SCHEMA, "properties": {**SCHEMA["properties"], "novelty": rule}}
    last = forms.groups(schema, controls(schema))[-1]
    assert (last.name, [each.knob for each in last.controls]) == ("Novelties", ["novelty"])


@pytest.mark.parametrize(
    ("knob", "kind"),
    [
        ("steps", "integer"),
        ("learning_rate", "number"),
        ("flip", "check"),
        ("mixed_precision", "choice"),
        ("optimizer", "select"),
        ("optimizer_arguments", "object"),
        ("betas", "numbers"),
        ("base_precision", "select"),
        ("sample_prompts", "lines"),
        ("sample_negative_prompt", "long"),
        ("vae", "path"),
        ("device", "text"),
        ("text_encoder_learning_rate", "number"),
        ("report_to", "checks"),
        ("metrics_file", "path"),
        ("http_port", "integer"),
    ],
)
def test_the_type_of_a_knob_decides_how_it_is_asked_for(knob: str, kind: str) -> None:
    """Few choices are all visible, many are folded."""
    assert CONTROLS[knob].kind == kind


def test_a_form_that_nobody_touched_gives_an_empty_config() -> None:
    """But for the trigger words, which may be none and have to be said."""
    chosen = ("choice", "select", "checks", "check")
    untouched = [
        (each.knob, each.default_text if each.kind in chosen else "") for each in CONTROLS.values()
    ]
    assert config_of(CONTROLS, untouched) == {"trigger_words": []}


# --- There and back ---


def value_of(rule: forms.Schema, chance: Random) -> Any:
    """Make a value that a rule of the schema allows."""
    if "enum" in rule:
        return chance.choice(rule["enum"])
    types = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
    name = chance.choice([each for each in types if each != "null"])
    low, high = rule.get("minimum", 0), rule.get("maximum", 10**9)
    step = rule.get("multipleOf", 1)
    if name == "boolean":
        return chance.random() < 0.5
    if name == "integer":
        return chance.randrange(low, high + 1, step)
    if name == "number":
        return chance.uniform(low, high)
    if "pattern" in rule and {"number", "array"} & set(types) and name == "string":
        return rule["default"]  # one of few words beside numbers or lists
    if name == "array":
        items = rule["items"]
        if "enum" in items:
            return [value for value in items["enum"] if chance.random() < 0.5]
        texts = items["type"] == "string"
        return [
            text_of(chance) if texts else value_of(items, chance)
            for _ in range(how_many(rule, chance))
        ]
    if name == "object":
        return {text_of(chance): chance.random() for _ in range(chance.randrange(3))}
    return text_of(chance)


def how_many(rule: forms.Schema, chance: Random) -> int:
    """Choose how long a list is to be."""
    return chance.randint(rule.get("minItems", 0), min(rule.get("maxItems", 3), 3))


def text_of(chance: Random) -> str:
    """Make a text, also one that looks like JSON, has several lines, or is in other letters."""
    inner = "".join(chance.choices(LETTERS, k=chance.randrange(12)))
    return chance.choice(("[x", '["y"]', "\\(z\\)", "ink", "猫", "true", "7")) + inner + "."


def test_a_thousand_configs_go_into_the_form_and_come_back() -> None:
    """What is at its default may be left out."""
    chance = Random(16)
    defaults = {knob: each.default for knob, each in CONTROLS.items()}
    for _ in range(1000):
        given = chance.sample(sorted(CONTROLS), chance.randrange(len(CONTROLS)))
        config = {knob: value_of(RULES[knob], chance) for knob in given}
        back = config_of(CONTROLS, list(texts_of(CONTROLS, config).items()))
        assert defaults | back == defaults | config


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "configs").glob("*.json")))
def test_a_ready_made_config_survives_the_form(file: Path) -> None:
    """They are what people start from, and group their knobs."""
    config = json.loads(file.read_text("utf-8"))
    flat = {**config, **config.pop("training_params", {})}
    back = config_of(CONTROLS, list(texts_of(CONTROLS, config | flat).items()))
    asked = {knob: value for knob, value in flat.items() if knob in CONTROLS}
    changed = {knob: value for knob, value in asked.items() if value != CONTROLS[knob].default}
    assert {**changed, **back} == back
    assert {**asked, **back} == asked
    jsonschema.validate({**back, "output_path": "x"}, SCHEMA)


def test_steps_that_equal_the_default_are_still_said() -> None:
    """They win over epochs, which count only where steps are absent."""
    form = [("steps", "1000"), ("epochs", "5")]
    assert config_of(CONTROLS, form) == {"steps": 1000, "epochs": 5}


@pytest.mark.parametrize(
    ("typed", "value"),
    [("1e-4", 1e-4), ("5", 5), (" 0.5 ", 0.5), ("0,5", "0,5"), ("nan", "nan"), ("1_0", "1_0")],
)
def test_what_is_no_number_goes_to_the_trainer_as_typed(typed: str, value: object) -> None:
    """It knows what it expected, and says so."""
    assert config_of(CONTROLS, [("learning_rate", typed)]) == {"learning_rate": value}


def test_lines_may_be_a_list_in_json_and_brackets_are_no_json() -> None:
    """A prompt may well be in brackets."""
    knob = "sample_prompts"
    assert config_of(CONTROLS, [(knob, "a cat\r\n\r\n [a dog]")]) == {knob: ["a cat", "[a dog]"]}
    assert config_of(CONTROLS, [(knob, '["two\\nlines"]')]) == {knob: ["two\nlines"]}


def test_a_box_that_is_not_ticked_says_no() -> None:
    """The field behind it comes first, and counts where the box is silent."""
    assert config_of(CONTROLS, [("flip", "false"), ("flip", "true")]) == {"flip": True}
    assert config_of(CONTROLS, [("flip", "false")]) == {}


# --- Problems ---


@pytest.mark.parametrize(
    ("path", "knob"),
    [
        ("steps", "steps"),
        ("training_params.steps", "steps"),
        ("sample_prompts[2]", "sample_prompts"),
        ("trigger_words[0]", "trigger_words"),
        ("dataset_path", "dataset_path"),
        ("training_params", None),
        ("lora_rnak", None),
        ("", None),
        (None, None),
    ],
)
def test_a_problem_finds_its_field_by_its_path(path: str | None, knob: str | None) -> None:
    """What has no field is told above the form."""
    assert knob_of(path, CONTROLS) == knob


def test_every_problem_of_the_trainer_that_is_about_a_knob_finds_its_field() -> None:
    """Ask the trainer itself what is wrong with a config in which everything is."""
    command = [sys.executable, str(ROOT / "train_lora.py"), "--config", "-", "--validate-only"]
    halves = list(CONTROLS)[::2], list(CONTROLS)[1::2]  # it tells a hundred problems at most
    placed = []
    for half in halves:
        wrong = {knob: {"no": "value"} for knob in half} | {"output_path": "/nowhere/x"}
        done = subprocess.run(
            command,
            input=json.dumps(wrong),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        placed += forms.placed(json.loads(done.stdout.splitlines()[-1])["problems"], CONTROLS)
    assert {each["field"] for each in placed} == set(CONTROLS)
    assert all(each["text"].startswith("Expected ") for each in placed)


def test_a_problem_reads_as_a_sentence() -> None:
    """Expected, found, and what to do."""
    problem = {"path": "resolution", "expected": "a multiple of 8", "found": "500", "hint": "496."}
    assert forms.say(problem) == "Expected a multiple of 8, got 500. 496."
    assert forms.say({"path": "x"}) == "This is not accepted."


# Shapes of rules that a schema may have, with what is typed and what it means.
SIDES = {"type": ["integer", "array"], "items": {"type": "integer"}, "default": 512}
PARTS = {"type": ["string", "array"], "pattern": "^all$", "items": {"type": "string"}}
EITHER = {"anyOf": [{"type": "number"}, {"type": "array", "items": {"type": "number"}}]}
PAIR = {"type": ["array", "null"], "items": {"type": "number"}, "default": None}
TICKED = {"type": "array", "items": {"enum": ["color", "rotate"]}, "default": ["color"]}
MORE = {"type": "object", "default": {}}
PRESET = {"type": ["string", "null"], "enum": [None, "subject", "style"], "default": None}
UNSAID = {"type": ["boolean", "null"], "default": None}
ONE_OF = {"anyOf": [{"enum": ["low", "high"]}, {"type": "null"}], "default": None}
ANY = {"type": ["boolean", "string", "integer"], "default": "auto"}

TYPED: list[tuple[Any, str, Any]] = [
    (SIDES, "768", 768),
    (SIDES, "512, 768 1024", [512, 768, 1024]),
    (SIDES, "[768]", [768]),
    (SIDES, "", None),
    (SIDES, "512, x", [512, "x"]),
    (PARTS, "all", "all"),
    (PARTS, "attn2", ["attn2"]),
    (PARTS, "attn2\nff.net", ["attn2", "ff.net"]),
    (EITHER, "0.5", 0.5),
    (EITHER, "0.5; 1", [0.5, 1]),
    (PAIR, "0.9, 0.99", [0.9, 0.99]),
    (PAIR, "0.9", [0.9]),
    (PAIR, " ", None),
    (TICKED, "", []),
    (TICKED, "color", None),
    (TICKED, "color\nrotate", ["color", "rotate"]),
    (MORE, '{"d0": 1e-5}', {"d0": 1e-5}),
    (MORE, "d0 = 1", "d0 = 1"),
    (MORE, "{}", None),
    (MORE, "", None),
    (PRESET, "", None),
    (PRESET, "style", "style"),
    (UNSAID, "", None),
    (UNSAID, "false", False),
    (ONE_OF, "high", "high"),
    (ANY, "false", False),
    (ANY, "3", 3),
    (ANY, "a place", "a place"),
    (ANY, "auto", None),
]


@pytest.mark.parametrize(("rule", "text", "value"), TYPED)
def test_lists_and_what_may_stand_for_them_are_read_as_people_write_them(
    rule: forms.Schema, text: str, value: Any
) -> None:
    """What cannot be read goes to the trainer as it is; what is as it was is left out."""
    made = forms.control("knob", rule, required=False)
    assert forms.from_text(made, text) == value
    if value not in (None, "d0 = 1"):
        assert forms.from_text(made, forms.to_text(made, value)) == value


@pytest.mark.parametrize("rule", [PRESET, UNSAID, ONE_OF])
def test_a_choice_that_nobody_made_is_the_one_that_is_shown(rule: forms.Schema) -> None:
    """A browser sends what is shown, and nothing of that may get into a config."""
    made = forms.control("knob", rule, required=False)
    assert made.kind == "choice"
    assert [value for text, value in made.options if text == made.default_text] == [None]


def test_all_boxes_that_are_ticked_count() -> None:
    """The empty field before them tells that none is."""
    made = {"augment": forms.control("augment", TICKED, required=False)}
    form = [("augment", ""), ("augment", "color"), ("augment", "rotate")]
    assert config_of(made, form) == {"augment": ["color", "rotate"]}
    assert config_of(made, form[:1]) == {"augment": []}
    assert config_of(made, form[:2]) == {}
    assert config_of(made, []) == {}
