"""Captions of a dataset: one text file per picture, changed with care, and changed back.

Every change first writes down what was there, into `.history/` of the dataset, so that the last
ones can be undone, the newest first.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio import datasets
from studio.datasets import CHANGING, LIMITS, Picture, refusal
from studio.problems import Problem

HISTORY, KEPT = ".history", 50  # changes that can be undone
TYPING_SECONDS = 60  # within which changes of one caption count as one
TAGS = 12  # the most frequent ones, for the page


@dataclass(frozen=True)
class Caption:
    """What stands in a caption's file; nothing, if there is none."""

    content: bytes = b""
    problem: str | None = None  # why the trainer would not use it

    @property
    def text(self) -> str:
        """Return it for people."""
        return self.content.decode("utf-8-sig", "replace").strip()

    @property
    def etag(self) -> str:
        """Tell this content from any other."""
        return digest(self.content)


def digest(content: bytes) -> str:
    """Name some bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def read(folder: Path, picture: Picture) -> Caption:
    """Read the caption of a picture, never more than the limit."""
    return read_text(folder / picture.text) if picture.captioned else Caption()


def read_text(path: Path) -> Caption:
    """Read a caption's file; one that is no regular file holds nothing."""
    if datasets.status_of(path) is None:
        return Caption()
    try:
        with path.open("rb") as file:
            content = file.read(LIMITS.caption_bytes + 1)
    except OSError as error:
        return Caption(problem=f"its caption cannot be read ({error.strerror})")
    if len(content) > LIMITS.caption_bytes:
        return Caption(content, f"its caption is larger than {LIMITS.caption_bytes // 1024} KiB")
    return Caption(content, None if is_text(content) else "its caption is not UTF-8")


def is_text(content: bytes) -> bool:
    """Tell whether bytes are UTF-8, as all captions are."""
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return False
    return True


def captions_of(folder: Path, pictures: Sequence[Picture]) -> dict[str, Caption]:
    """Read the captions of pictures, by their names."""
    return {picture.name: read(folder, picture) for picture in pictures}


def tags(captions: Mapping[str, Caption]) -> list[tuple[str, int]]:
    """Count what stands between commas; what only one caption has is no tag."""
    parts = [{part.strip() for part in c.text.split(",")} - {""} for c in captions.values()]
    counts = Counter(part for each in parts for part in each if len(part) <= 40)
    return [(part, count) for part, count in counts.most_common(TAGS) if count > 1]


# --- Changes ---


def set_one(folder: Path, name: str, text: str, expected: str | None) -> Caption:
    """Give a picture its caption, if what stands there is what its writer last saw.

    `expected` is an entity tag, "*" for anything, None for nothing at all.
    """
    with CHANGING:
        picture = datasets.picture_in(folder, name)
        there = read(folder, picture)
        if expected != "*" and (expected or digest(b"")) != there.etag:
            detail = f"The caption of {name} was changed elsewhere: {shortened(there.text)}"
            raise Problem(412, "caption_changed", detail)
        what = f"Caption of {name}" if expected else f"First caption of {name}"
        return change(folder, {picture.text: (there, text)}, what)[picture.text]


def shortened(text: str) -> str:
    """Cut a text to what a message can hold."""
    return text if len(text) <= 200 else text[:200] + "…"


def set_all(folder: Path, texts: Mapping[str, str], what: str) -> int:
    """Give pictures captions, by their names; return how many are new."""
    with CHANGING:
        pictures = {picture.name: picture for picture in datasets.scan(folder)}
        wanted = {}
        for name, text in texts.items():
            there = read(folder, pictures[name])
            if text != there.text:
                wanted[pictures[name].text] = (there, text)
        change(folder, wanted, what)
        return len(wanted)


def change(
    folder: Path, wanted: Mapping[str, tuple[Caption, str]], what: str
) -> dict[str, Caption]:
    """Write captions, by their files, after what stands there; return what then stands there."""
    made = {}
    for file, (there, text) in wanted.items():
        check_size(file, there.content, "Shorten it with an editor first.")  # undo holds no more
        made[file] = packed(file, text)
    if made:
        before = {file: there for file, (there, _) in wanted.items()}
        remember(folder, what, before, made)
        write_all(folder, {file: caption.content for file, caption in made.items()})
    return made


def packed(file: str, text: str) -> Caption:
    """Turn what someone wrote into what the file will hold; nothing gives no file."""
    text = text.replace("\r\n", "\n").strip()
    content = f"{text}\n".encode() if text else b""
    check_size(file, content)
    return Caption(content)


def check_size(file: str, content: bytes, hint: str = "") -> None:
    """Refuse a caption that no trainer would read."""
    if len(content) > LIMITS.caption_bytes:
        most = f"at most {LIMITS.caption_bytes // 1024} KiB"
        raise refusal(413, "caption_too_large", file, most, "more", hint)


def write_all(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files of a folder; so many flushes at a time cost hardly more than one."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda file: write(folder / file, contents[file]), contents))
    datasets.flush_folder(folder)


def write(path: Path, content: bytes) -> None:
    """Put a file there whole, or take it away if it is to hold nothing."""
    if not content:
        path.unlink(missing_ok=True)
        return
    part = datasets.part_in(path.parent)
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)  # never in place: a run's snapshot may be a link to the former file
    except OSError as error:
        part.unlink(missing_ok=True)
        raise datasets.disk_full() from error


def replaced(captions: Mapping[str, Caption], former: str, by: str) -> dict[str, str]:
    """Replace a text wherever captions have it; return the captions that would change."""
    if not former:
        raise refusal(422, "request_invalid", "replace.from", "some text", "nothing")
    having = {name: c.text for name, c in captions.items() if former in c.text and not c.problem}
    return {name: text.replace(former, by) for name, text in having.items()}


def prefixed(captions: Mapping[str, Caption], prefix: str) -> dict[str, str]:
    """Put a text in front of the captions that do not begin with it."""
    if not prefix.strip():
        raise refusal(422, "request_invalid", "add_prefix", "some text", "nothing")
    front = prefix.strip().rstrip(",").strip()
    usable = {name: caption.text for name, caption in captions.items() if not caption.problem}
    lacking = {name: text for name, text in usable.items() if not text.startswith(front)}
    return {name: f"{front}, {text}" if text else front for name, text in lacking.items()}


# --- Undo ---


def remember_all(folder: Path, what: str) -> None:
    """Write down all captions, as another program is about to change some of them."""
    with CHANGING:
        pictures = datasets.scan(folder)
        before = {picture.text: read(folder, picture) for picture in pictures}
        remember(folder, what, before, None)


def remember(
    folder: Path, what: str, before: Mapping[str, Caption], after: Mapping[str, Caption] | None
) -> None:
    """Write down what a change finds, and what it leaves where that is known."""
    (folder / HISTORY).mkdir(exist_ok=True)
    texts = {
        file: caption.content.decode("utf-8", "surrogateescape") for file, caption in before.items()
    }
    tags = None if after is None else {file: caption.etag for file, caption in after.items()}
    entry = {"what": what, "at": time.time(), "before": texts, "after": tags}
    files = entries(folder)
    number = int(files[-1].stem) + 1 if files else 1
    if files and continues(load(files[-1]), entry):
        number, entry["before"] = number - 1, load(files[-1])["before"]
    write(folder / HISTORY / f"{number:08d}.json", json.dumps(entry).encode())
    for old in entries(folder)[:-KEPT]:
        old.unlink()


def continues(last: dict[str, Any], entry: dict[str, Any]) -> bool:
    """Tell whether a change goes on with the last one, as someone types a single caption."""
    alone = len(entry["before"]) == 1 and last["what"] == entry["what"]
    return alone and entry["at"] - last["at"] < TYPING_SECONDS and bool(last["after"])


def entries(folder: Path) -> list[Path]:
    """List the changes that can be undone, the newest last."""
    return sorted((folder / HISTORY).glob("[0-9]*.json"))


def load(file: Path) -> dict[str, Any]:
    """Read what was written down of one change."""
    entry: dict[str, Any] = json.loads(file.read_bytes())
    return entry


def undoable(folder: Path) -> str | None:
    """Say what an undo would take back."""
    files = entries(folder)
    return str(load(files[-1])["what"]) if files else None


def undo(folder: Path) -> dict[str, Any]:
    """Take the last change back; captions that were changed since stay, and are counted."""
    with CHANGING:
        files = entries(folder)
        if not files:
            raise Problem(409, "nothing_to_undo", f"Nothing was changed in {folder.name}.")
        entry, restored, kept = load(files[-1]), {}, 0
        for file, text in entry["before"].items():
            there, former = read_text(folder / file), text.encode("utf-8", "surrogateescape")
            if there.content == former:
                continue
            if entry["after"] is None or there.etag == entry["after"][file]:
                restored[file] = former
            else:
                kept += 1
        write_all(folder, restored)
        files[-1].unlink()
    return {"undone": entry["what"], "restored": len(restored), "kept": kept}
