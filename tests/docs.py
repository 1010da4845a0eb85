"""Rewrite event_schema.json and REFERENCE.md from the code and the config schema.

python tests/docs.py            write them
python tests/docs.py --check    only tell whether they are up to date
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_lora

ROOT = Path(train_lora.__file__).resolve().parent


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Lay out a Markdown table."""
    lines = [list(head), ["---" for _ in head], *map(list, rows)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def every_knob() -> dict[str, Any]:
    """List all knobs with what the schema says of them, the required ones first."""
    schema = train_lora.config_schema()
    return {name: schema["properties"][name] for name in schema["required"]} | train_lora.knobs()


def knob_tables() -> str:
    """List the knobs by groups, each with its default, its values and its meaning."""
    sections = []
    for group in train_lora.config_schema()["x-groups"]:
        rows = [
            [
                f"`{name}`",
                f"`{json.dumps(knob['default'])}`" if "default" in knob else "required",
                train_lora.describe_values(knob),
                f"{knob['description']} {knob['hint']}",
            ]
            for name, knob in every_knob().items()
            if knob["x-group"] == group
        ]
        sections.append(f"### {group}\n\n{table(['knob', 'default', 'values', 'meaning'], rows)}")
    return "\n\n".join(sections)


def synonym_tables() -> str:
    """List what other trainers call the knobs, and what has no knob and why."""
    called = [
        [f"`{name}`", ", ".join(f"`{word}`" for word in knob["x-also"])]
        for name, knob in every_knob().items()
        if "x-also" in knob
    ]
    without = train_lora.config_schema()["x-without"]
    none = [[why, ", ".join(f"`{w}`" for w in words)] for why, words in without.items()]
    return f"{table(['here', 'elsewhere'], called)}\n\n{table(['no knob, as', 'elsewhere'], none)}"


def preset_tables() -> str:
    """List the presets, and what they fill in, each with its reason."""
    presets = train_lora.config_schema()["x-presets"]
    about = [[f"`{name}`", text] for name, text in presets["about"].items()]
    rows = [
        [
            f"`{row['knob']}`",
            preset_value(row),
            ", ".join(row["presets"]),
            ", ".join(row["families"]),
            f"{row['evidence']}: {row['reason']}",
        ]
        for row in presets["rows"]
    ]
    head = ["knob", "value", "presets", "families", "why"]
    return f"{table(['preset', 'for what'], about)}\n\n{table(head, rows)}"


def preset_value(row: Mapping[str, Any]) -> str:
    """Write a value as it stands, or how it is worked out."""
    if "value" in row:
        return f"`{json.dumps(row['value'])}`"
    words = {"minimum": "at least", "maximum": "at most"}
    bounds = [f"{said} {row[word]}" for word, said in words.items() if word in row]
    return ", ".join([f"{row['times']:g} × `{row['of']}`", *bounds])


def by_number(path: Path) -> list[str | int]:
    """Order names as people do: a card of 8 GB before one of 12."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.stem)]


def examples_table() -> str:
    """List the ready-made configs by what sets them apart."""
    rows = []
    for path in sorted((ROOT / "examples" / "configs").glob("*.json"), key=by_number):
        config = train_lora.TrainingConfig.from_json(path)
        rows.append(
            [
                f"[{path.stem}]({path.relative_to(ROOT).as_posix()})",
                config.base_model.rpartition("/")[2],
                ", ".join(map(str, config.sides)),
                f"{config.batch_size} × {config.gradient_accumulation_steps}",
                str(config.lora_rank),
                str(config.steps),
                json.loads(path.read_text(encoding="utf-8"))["$comment"],
            ]
        )
    head = ["config", "base model", "pixels", "batch × accumulation", "rank", "steps", "for what"]
    return table(head, rows)


def describe_fields(fields: Mapping[str, Any]) -> str:
    """List the fields of an event or of a topic with their meanings."""
    return "; ".join(f"`{name}`: {get_args(hint)[1]}" for name, hint in fields.items())


def event_table() -> str:
    """List every type of line."""
    rows = [
        [f"`{cls.wire['type']}`", cls.__doc__ or "", describe_fields(train_lora.payload_types(cls))]
        for cls in train_lora.EVENTS
    ]
    return table(["type", "when", "fields"], rows)


def topic_table() -> str:
    """List every topic of the info lines."""
    rows = [
        [
            f"`{facts.wire['topic']}`",
            facts.__doc__ or "",
            describe_fields(train_lora.field_types(facts)),
        ]
        for facts in train_lora.FACTS
    ]
    return table(["topic", "what it tells", "fields of `data`"], rows)


def code_table(codes: type[train_lora.Code]) -> str:
    """List every code with its meaning and what to do."""
    rows = [[f"`{code.word}`", code.meaning, code.hint] for code in codes]
    return table(["code", "meaning", "what to do"], rows)


def exit_table() -> str:
    """List the exit codes."""
    stopped: dict[int, list[str]] = {}
    for reason, code in train_lora.EXIT_CODES.items():
        stopped.setdefault(code, []).append(f"`{reason}`")
    rows = [
        ["0", "`complete`, or `--validate-only` found nothing wrong"],
        ["1", "`error`; its `code` says which"],
        ["2", "wrong command line; usage on stderr, nothing on stdout"],
        *(
            [str(code), "`interrupted` by " + ", ".join(why)]
            for code, why in sorted(stopped.items())
        ),
    ]
    return table(["exit code", "meaning"], rows)


REFERENCE = """\
# Reference

Everything that the program takes and tells, written by `make docs` from `config_schema.json`, from
the events and codes in `train_lora.py`, and from `examples/configs`. [README.md](README.md) says
how to use it.

## Knobs

They stand at the top level of the config, or inside an object `training_params`, which wins where
both give a value.

{knobs}

## Presets

What `preset` fills in where the config gives nothing, worked out in this order, after the images
are counted and the family of the base model is known; `steps_per_epoch` is the number of updates
in which every image is seen once. A number was measured here, on the small base in
`examples/tiny-sd`, or published for the real models. What does not go with a value that is given
is left out.

{presets}

## Coming from another trainer

What kohya's scripts, diffusers' examples, OneTrainer and ai-toolkit call things. The program gives
these hints too when it meets such a key.

{synonyms}

## Ready-made configs

Each is complete but for your images and trigger words, which stand in `sample_prompts` as well.

{examples}

## Events

One JSON object per line, described by [event_schema.json](event_schema.json). Every line has
`type`, `seq`, `timestamp` and `message`, and then:

{events}

An `info` line's `topic` fixes the fields of its `data`:

{topics}

## Exit codes

{exits}

## Errors

{errors}

## Warnings

{warnings}
"""


def reference() -> str:
    """Write REFERENCE.md."""
    return REFERENCE.format(
        knobs=knob_tables(),
        presets=preset_tables(),
        synonyms=synonym_tables(),
        examples=examples_table(),
        events=event_table(),
        topics=topic_table(),
        exits=exit_table(),
        errors=code_table(train_lora.ErrorCode),
        warnings=code_table(train_lora.WarningCode),
    )


def generated() -> dict[Path, str]:
    """Make the text of every generated file."""
    schema = as_json(train_lora.event_schema())
    return {ROOT / "REFERENCE.md": reference(), ROOT / "event_schema.json": schema}


def as_json(document: Any) -> str:
    """Lay out a JSON file for readers."""
    return json.dumps(document, indent=2) + "\n"


def stale() -> dict[Path, str]:
    """Find the files whose text differs from what the code says."""
    return {
        path: text
        for path, text in generated().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }


def main() -> int:
    """Write or check the generated files."""
    found = stale()
    if "--check" in sys.argv[1:]:
        for path in found:
            sys.stderr.write(f"{path.name} is stale; run: make docs\n")
        return 1 if found else 0
    for path, text in found.items():
        path.write_text(text, encoding="utf-8")
        sys.stderr.write(f"wrote {path.name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
