"""Prompts as people write them, and all that is said of each in a grid."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.program import refuse
from train_lora import Record, show, without_words

LISTED = "a list of prompts in JSON"


def read_prompts(asked: Sequence[str], trigger_words: Sequence[str]) -> list[Record]:
    """Read prompts from text or JSON files, or take them as they are."""
    return complete([entry for text in asked for entry in read_entries(text)], trigger_words)


def read_entries(text: str) -> list[Any]:
    """Read what a file lists, a line each or in JSON; what names no file is a prompt itself."""
    path = Path(text)
    if path.suffix == ".txt":
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return [line.strip() for line in lines if line.strip() and line[0] != "#"]
    if path.suffix != ".json":
        return [text]
    try:
        listed = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(path, LISTED, str(error)) from error
    if not isinstance(listed, list):
        raise refuse(path, LISTED, show(listed))
    return listed


def complete(
    entries: Sequence[Any], trigger_words: Sequence[str], place: str = "--prompts"
) -> list[Record]:
    """Add to each prompt what it leaves open: an id, a role, its text without trigger words."""
    prompts: list[Record] = []
    for number, entry in enumerate(entries):
        said = {"text": entry} if isinstance(entry, str) else entry
        if not isinstance(said, dict) or not isinstance(said.get("text"), str):
            raise refuse(place, "texts, or objects with a text", show(entry))
        plain = said.get("plain", without_words(said["text"], trigger_words))
        known = {"id": f"p{number:02}", "role": "subject", "plain": plain}
        prompts.append(known | said)
    if not prompts:
        raise refuse(place, "at least one prompt", "none")
    check_ids([prompt["id"] for prompt in prompts], place)
    return prompts


def check_ids(ids: Sequence[Any], place: str) -> None:
    """Refuse what cannot name pictures: no plain word, or the same one for two prompts."""
    taken = set()
    for name in ids:
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]{1,64}", name):
            raise refuse(place, "an id of up to 64 letters, digits, - and _", show(name))
        if name.casefold() in taken:  # some disks do not tell small letters from large ones
            raise refuse(place, "an id of its own for each prompt", f"{name} twice")
        taken.add(name.casefold())
