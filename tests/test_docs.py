"""What is written down says what the code does."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import docs
import pytest
from conftest import ROOT

import train_lora

PAGES = sorted(path for path in ROOT.glob("*.md") if path.is_file())


def test_generated_files_are_up_to_date() -> None:
    """event_schema.json and REFERENCE.md come from the code."""
    names = [path.name for path in docs.stale()]

    assert names == [], f"{', '.join(names)} is stale; run: make docs"


def test_the_example_config_is_valid() -> None:
    """The config to start from passes the loader without a remark."""
    config = train_lora.TrainingConfig.from_json(ROOT / "example_config.json")

    assert config.remarks == ()


def test_every_event_line_in_the_readme_is_json() -> None:
    """What a host author copies from the README parses and has the envelope."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith('{"type"')]

    assert lines
    assert all(train_lora.ENVELOPE.keys() <= json.loads(line).keys() for line in lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_links_between_files_lead_somewhere(page: Path) -> None:
    """A relative link in a page names a file that exists."""
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))

    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_function_and_class_says_what_it_does() -> None:
    """Each definition in the program opens with a docstring, nested ones excepted."""
    tree = ast.parse((ROOT / "train_lora.py").read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    inside = [node for body in classes for node in body.body]
    defined = (ast.FunctionDef, ast.ClassDef)
    found = [node for node in [*tree.body, *inside] if isinstance(node, defined)]

    assert [node.name for node in found if not ast.get_docstring(node)] == []


def test_nothing_heavy_is_imported_at_module_level() -> None:
    """Importing the program costs no more than the standard library."""
    tree = ast.parse((ROOT / "train_lora.py").read_text(encoding="utf-8"))
    names = {a.name.split(".")[0] for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    names |= {(n.module or "").split(".")[0] for n in tree.body if isinstance(n, ast.ImportFrom)}

    assert names.isdisjoint({"torch", "diffusers", "transformers", "peft", "numpy", "PIL"})
