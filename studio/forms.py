"""A form made from config_schema.json alone: its controls, what comes back, where problems go.

Nothing here knows a knob by name but those that the studio sets itself; a knob that the schema
gains gets its control, help and place without a line of code. Values are not judged here: what
does not parse goes to the trainer as it was typed, and comes back as the trainer's own problem.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Schema = Mapping[str, Any]
Form = Sequence[tuple[str, str]]

NO_KNOBS = ("$schema", "$comment", "training_params")
SET_BY_STUDIO = ("output_path",)
FIRST_GROUPS = ("Required", "First of all")
KINDS = {"boolean": "check", "integer": "integer", "number": "number", "object": "object"}
WORDS = {"integer", "number", "string"}  # what is told apart as it is typed
MOST_RADIOS = 4
LONG_TEXT = 500  # letters from which on a text gets several lines


@dataclass(frozen=True)
class Control:
    """How a knob is asked for."""

    knob: str
    kind: str  # check, checks, choice, select, integer, number, numbers, lines, long, object, any
    label: str
    group: str
    help: str
    hint: str
    default: Any
    required: bool
    fixed: bool  # for a run once it is begun
    options: tuple[tuple[str, Any], ...]  # text in the form, value in the config
    single: str | None  # of a list: what one value looks like that may stand for it
    examples: tuple[str, ...]
    also: tuple[str, ...]  # what other trainers call it, for the search

    @property
    def default_text(self) -> str:
        """Show the default as the form would hold it."""
        return to_text(self, self.default)

    @property
    def searched(self) -> str:
        """Say what a search looks through."""
        return " ".join((self.knob, self.label, self.help, self.group, *self.also)).lower()


# --- Schema to controls ---


def controls(schema: Schema) -> dict[str, Control]:
    """Make one control for every knob, in the schema's order."""
    made = {}
    for knob, rule in schema["properties"].items():
        if knob not in NO_KNOBS and knob not in SET_BY_STUDIO:
            made[knob] = control(knob, resolve(schema, rule), knob in schema["required"])
    return made


def resolve(schema: Schema, rule: Schema) -> Schema:
    """Follow a rule to where it stands."""
    while "$ref" in rule:
        found: Any = schema
        for part in rule["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        rule = found
    return rule


def control(knob: str, rule: Schema, required: bool) -> Control:
    """Make the control of one knob."""
    kind = kind_of(rule)
    values = values_of(rule) or items_of(rule).get("enum", ())
    return Control(
        knob=knob,
        kind=kind,
        label=rule.get("title", knob),
        group=rule.get("x-group", "Other"),
        help=rule.get("description", ""),
        hint=rule.get("hint", ""),
        default=rule.get("default"),
        required=required,
        fixed=rule.get("x-fixed", False),
        options=tuple(("" if value is None else plain(value), value) for value in values),
        single=rule.get("pattern", "") if types_of(rule) - {"array", "null"} else None,
        examples=examples_of(rule, kind),
        also=tuple(rule.get("x-also", ())),
    )


def kind_of(rule: Schema) -> str:
    """Choose how a value is asked for, by its types."""
    types, values = types_of(rule) - {"null"}, values_of(rule)
    if values:
        return "choice" if len(values) <= MOST_RADIOS else "select"
    if rule.get("format") == "path":
        return "path"
    if "array" in types:
        items = items_of(rule)
        numbers = types_of(items) & {"integer", "number"}
        return "checks" if "enum" in items else "numbers" if numbers else "lines"
    if len(types) > 1 and not types <= WORDS:
        return "any"
    for name, kind in KINDS.items():
        if name in types:
            return kind
    return "long" if rule.get("maxLength", 0) >= LONG_TEXT else "text"


def values_of(rule: Schema) -> Sequence[Any]:
    """List the values among which one is chosen; none where it may be another, too."""
    if "enum" in rule:
        return list(rule["enum"])
    if types_of(rule) == {"boolean", "null"}:
        return [None, True, False]
    known = [values_of(each) or [None] * (types_of(each) == {"null"}) for each in others_of(rule)]
    return [value for each in known for value in each] if all(known) else []


def types_of(rule: Schema) -> set[str]:
    """Name all types that a value may have."""
    own = rule.get("type", [])
    others = (types_of(each) for each in others_of(rule))
    return {own} if isinstance(own, str) else set(own).union(*others)


def items_of(rule: Schema) -> Schema:
    """Find what the items of a list have to be."""
    own = (each["items"] for each in (rule, *others_of(rule)) if "items" in each)
    return next(own, {})


def others_of(rule: Schema) -> Sequence[Schema]:
    """List the rules of which a value has to meet one."""
    found: Sequence[Schema] = rule.get("anyOf") or rule.get("oneOf") or ()
    return found


def plain(value: Any) -> str:
    """Write a single value as people do: a text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def examples_of(rule: Schema, kind: str) -> tuple[str, ...]:
    """Take the examples that fit into one line."""
    found = [each for each in rule.get("examples", ()) if each is not None]
    if kind == "numbers":
        found = [", ".join(map(plain, each)) if isinstance(each, list) else each for each in found]
    return tuple(plain(each) for each in found if not isinstance(each, list))


# --- Values to text, and back ---


def to_text(made: Control, value: Any) -> str:
    """Show a value in its control; what the words of a list cannot hold, as JSON."""
    if value is None or (made.kind == "object" and value == {}):
        return ""
    if made.kind == "check":
        return "true" if value else "false"
    if not isinstance(value, list):
        return plain(value)
    words = (", " if made.kind == "numbers" else "\n").join(map(plain, value))
    return words if read_list(made, words) == value else json.dumps(value, ensure_ascii=False)


def read_list(made: Control, text: str) -> Any:
    """Read a list: a text per line, numbers between commas, or JSON; or the one value for it."""
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            pass  # a prompt may well begin with a bracket
        else:
            return list(found)
    if made.kind == "numbers":
        values = [read_number(word) for word in re.split(r"[,;\s]+", text) if word]
        return values[0] if len(values) == 1 and made.single is not None else values
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    one = len(lines) == 1 and made.single is not None and re.search(made.single, lines[0])
    return lines[0] if one else lines


def read_number(text: str) -> int | float | str:
    """Read a number, or leave what is none to the trainer, which says what it expected."""
    cleaned = text.strip()
    if re.fullmatch(r"[+-]?[0-9]{1,30}", cleaned):
        return int(cleaned)
    try:
        number = float(cleaned) if "_" not in cleaned else math.nan
    except ValueError:
        return cleaned
    return number if math.isfinite(number) else cleaned


def read_json(text: str) -> Any:
    """Read a value in JSON, or leave what is none to the trainer as the text it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def from_text(made: Control, text: str) -> Any:
    """Read what a control holds; None where that is nothing of its own."""
    text = text.replace("\r\n", "\n")
    if made.kind == "checks":
        value = [dict(made.options).get(line, line) for line in text.split("\n") if line]
        return None if value == made.default else value
    if made.kind in ("lines", "numbers"):
        value = read_list(made, text)
        return value if value != [] or made.required else None
    if made.options:
        value = dict(made.options).get(text, text)
        return None if value == made.default else value
    if made.kind == "check":
        ticked = text == "true"
        return None if ticked == made.default else ticked
    if not text.strip():
        return None
    if made.kind in ("integer", "number"):
        return read_number(text)
    if made.kind in ("object", "any"):
        value = read_json(text)
        return None if value == made.default else value
    return text.strip() if made.kind == "path" else text


def read_form(made: Mapping[str, Control], form: Form) -> dict[str, str]:
    """Read what the controls hold: of several boxes all that are ticked, else what comes last."""
    found = {name: text for name, text in form if name in made}  # a box stands behind an empty one
    for knob in found:
        if made[knob].kind == "checks":
            found[knob] = "\n".join(text for name, text in form if name == knob and text)
    return found


def config_of(made: Mapping[str, Control], form: Form) -> dict[str, Any]:
    """Read a whole form: what is left empty, or as it was, is left out."""
    texts = read_form(made, form)
    values = {knob: from_text(made[knob], text) for knob, text in texts.items()}
    return {knob: value for knob, value in values.items() if value is not None}


def texts_of(made: Mapping[str, Control], config: Mapping[str, Any]) -> dict[str, str]:
    """Fill a form from a config, flat or with training_params."""
    nested = config.get("training_params")
    flat = {**config, **(nested if isinstance(nested, dict) else {})}
    return {knob: to_text(each, flat[knob]) for knob, each in made.items() if knob in flat}


# --- What stands where ---


@dataclass(frozen=True)
class Group:
    """Controls under one heading."""

    name: str
    controls: tuple[Control, ...]

    def changed(self, texts: Mapping[str, str]) -> int:
        """Count the controls that hold something of their own."""
        return sum(
            texts.get(each.knob, "") not in ("", each.default_text) for each in self.controls
        )


def groups(schema: Schema, made: Mapping[str, Control]) -> list[Group]:
    """Put controls into the schema's groups, in its order; groups it does not list come last."""
    names = dict.fromkeys([*schema.get("x-groups", ()), *(each.group for each in made.values())])
    found = [Group(name, tuple(c for c in made.values() if c.group == name)) for name in names]
    return [group for group in found if group.controls]


# --- Problems to fields ---


def knob_of(path: str | None, made: Mapping[str, Control]) -> str | None:
    """Find the field that a path speaks of: steps, sample_prompts[2], training_params.steps."""
    inner = (path or "").removeprefix("$.").removeprefix("training_params.")
    found = re.match(r"[A-Za-z_$][A-Za-z0-9_$]*", inner)
    return found[0] if found and found[0] in made else None


def say(problem: Mapping[str, Any]) -> str:
    """Put a problem into a sentence."""
    words = ""
    if problem.get("expected"):
        words = f"Expected {problem['expected']}"
        if problem.get("found") not in (None, ""):
            words += f", got {problem['found']}"
        words += ". "
    return (words + str(problem.get("hint") or "")).strip() or "This is not accepted."


def placed(
    problems: Sequence[Mapping[str, Any]], made: Mapping[str, Control]
) -> list[dict[str, Any]]:
    """Give every problem its sentence, and its field where it has one."""
    found = []
    for problem in problems:
        knob = knob_of(problem.get("path"), made)
        label = made[knob].label if knob else problem.get("path") or ""
        found.append({"field": knob, "label": label, "text": say(problem)})
    return found
