"""A dataset as people read it: what to look at, what was left out, and a sheet of pictures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from tools.page import bullets, sheet, table, thumbnails
from tools.program import refuse
from train_lora import NOT_JSON, Record, counted

MOST, SIDE = 48, 128  # of the sheet, which shows the first of many; pixels


def read_dataset(path: Path) -> Record:
    """Read the manifest of a dataset, or the report of a check."""
    try:
        said: Any = json.loads(path.read_text(encoding="utf-8"))
        pictures = said["images"] if "images" in said else said["pictures"]
        found = [
            {
                "name": str(each.get("file") or each["source"]),
                "caption": str(each.get("caption") or ""),
                "flags": [str(flag) for flag in each.get("flags") or ()],
            }
            for each in pictures
        ]
        excluded = [(str(each["source"]), str(each["reason"])) for each in said.get("excluded", ())]
        remarks = [str(each) for each in said.get("remarks", ())]
    except (OSError, LookupError, *NOT_JSON) as error:
        expected = "a manifest.json or a --report of tools/prepare.py"
        raise refuse(path, expected, f"something else ({error!r:.80})") from error
    return {"pictures": found, "excluded": excluded, "remarks": remarks}


def sections(
    said: Record, folder: Path, most_bytes: int, at: Callable[[int], None]
) -> Iterator[str]:
    """Write what there is to know, and show the pictures that lie beside the manifest."""
    flags = Counter(flag for each in said["pictures"] for flag in each["flags"])
    firsts = {
        flag: next(each["name"] for each in said["pictures"] if flag in each["flags"])
        for flag in flags
    }
    good = sum(not each["flags"] for each in said["pictures"])
    yield f"<p>{counted(len(said['pictures']), 'picture')}, {good} without a remark.</p>"
    if flags:
        body = [(flag, count, firsts[flag]) for flag, count in flags.most_common()]
        yield table(("to look at", "pictures", "the first"), body)
    if said["excluded"]:
        yield table(("left out", "why"), said["excluded"])
    yield bullets(said["remarks"])
    shown = [each for each in said["pictures"] if is_inside(each["name"])][:MOST]
    files = {each["name"]: folder / each["name"] for each in shown}
    made = thumbnails(files, most_bytes, at, SIDE)
    if any(made.values()):
        yield sheet((made[each["name"]], each["name"], each["caption"]) for each in shown)


def is_inside(name: str) -> bool:
    """Tell whether a name leads to a file of the dataset."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
