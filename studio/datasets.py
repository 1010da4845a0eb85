"""Datasets: folders of pictures below the data root. The folder is the truth, and nothing else.

Whatever reaches a folder was checked first and appears whole; whatever leaves it goes to the trash.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import threading
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from studio.pictures import FORMATS, check_picture, suffix_of
from studio.problems import Problem, problem_at, show

if TYPE_CHECKING:
    from studio.settings import Settings


@dataclass(frozen=True)
class Limits:
    """What a dataset may hold; the page shows them."""

    caption_bytes: int = 64 * 2**10  # the trainer reads no more
    files: int = 50_000
    dataset_bytes: int = 20 * 2**30
    free_bytes: int = 2 * 2**30  # that stay free on the disk


LIMITS = Limits()
# One service owns a data root, so this is all that keeps two requests from one name or caption.
CHANGING = threading.RLock()
FORBIDDEN = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|\ud800-\udfff]')
DEVICES = {"con", "prn", "aux", "nul"} | {
    f"{port}{n}" for port in ("com", "lpt") for n in range(10)
}
NAME_CHARACTERS, FILE_BYTES = 64, 240  # file systems take 255 bytes, and a part needs some more


# --- Names ---


def clean_name(name: str, what: str = "name") -> str:
    """Return a name as all file systems can hold it, Unicode kept; refuse what some cannot."""
    name = unicodedata.normalize("NFC", name)
    expected = None
    if not name or FORBIDDEN.search(name):
        expected = 'some characters, and none of / \\ : * ? " < > |'
    elif name.startswith(".") or name.endswith((".", " ")) or name != name.strip():
        expected = "no dot at the front, no dot at the end, no space at either"
    elif name.partition(".")[0].casefold() in DEVICES:
        expected = "no name of a device of Windows"
    elif len(name.encode()) > FILE_BYTES:
        expected = f"at most {FILE_BYTES} bytes"
    if expected:
        raise refusal(422, "name_invalid", what, expected, name)
    return name


def clean_dataset_name(name: str) -> str:
    """Return the name of a dataset, if it can be one."""
    if len(name) > NAME_CHARACTERS:
        found = f"{len(name)} characters"
        raise refusal(422, "name_invalid", "name", f"at most {NAME_CHARACTERS} characters", found)
    return clean_name(name)


def clean_picture_name(name: str) -> str:
    """Return the name of a picture's file, if it can be one."""
    name = clean_name(name, "file")
    if suffix_of(name) not in FORMATS or name == suffix_of(name):
        endings = " ".join(FORMATS)
        raise refusal(
            415, "not_an_image", name, f"one of {endings}", suffix_of(name) or "no ending"
        )
    return name


def refusal(
    status: int, code: str, path: str, expected: str, found: str, hint: str = ""
) -> Problem:
    """Say what is wrong with one thing of a request."""
    problem = problem_at(show(path), expected, found, hint)
    detail = "{path}: expected {expected}, got {found}. {hint}".format_map(problem).strip()
    return Problem(status, code, detail, [problem])


def key_of(name: str) -> str:
    """Return what two names have in common that are one on some file system."""
    return unicodedata.normalize("NFC", name).casefold()


def stem_key(name: str) -> str:
    """Return what pictures have in common that would share a caption."""
    return key_of(PurePath(name).stem)


# --- Datasets ---


def folder_of(settings: Settings, name: str) -> Path:
    """Return the folder of a dataset."""
    folder = settings.datasets / clean_dataset_name(name)
    if folder.is_symlink() or not folder.is_dir():
        raise Problem(404, "dataset_unknown", f"There is no dataset {show(name)}.")
    return folder


def names(settings: Settings) -> list[str]:
    """List the datasets in natural order."""
    with contextlib.suppress(FileNotFoundError), os.scandir(settings.datasets) as entries:
        found = [e.name for e in entries if e.is_dir(follow_symlinks=False)]
        return sorted((n for n in found if not n.startswith(".")), key=natural_key)
    return []


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort image10 after image9, whatever the case."""
    parts = re.split(r"(\d+)", name.casefold())
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts] + [(2, name)]


def create(settings: Settings, name: str) -> Path:
    """Make an empty dataset."""
    name = clean_dataset_name(name)
    with CHANGING:
        for other in names(settings):
            if key_of(other) == key_of(name):
                raise Problem(409, "name_taken", f"There is a dataset {show(other)} already.")
        folder = settings.datasets / name
        folder.mkdir(parents=True)
        flush_folder(settings.datasets)
    return folder


def remove(settings: Settings, name: str) -> Path:
    """Put a dataset into the trash; return where it lies there."""
    with CHANGING:
        return to_trash(settings, folder_of(settings, name))


def to_trash(settings: Settings, *paths: Path) -> Path:
    """Put files or a folder into a folder of their own in the trash."""
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    place = settings.trash / f"{now}-{secrets.token_hex(4)}"
    place.mkdir(parents=True)
    for path in paths:
        path.rename(place / path.name)
    return place


def flush_file(path: Path) -> None:
    """Make a file's content survive a power cut."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make names in a folder survive a power cut; Windows does that by itself."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- What a dataset holds ---


@dataclass(frozen=True)
class Picture:
    """One picture of a dataset, as the folder has it."""

    name: str
    bytes: int
    changed_ns: int
    text: str  # the name of its caption's file, which need not be there
    captioned: bool

    @property
    def stamp(self) -> str:
        """Tell this content of the file from any earlier one."""
        return f"{self.bytes:x}-{self.changed_ns:x}"


def scan(folder: Path) -> list[Picture]:
    """List the pictures in natural order; links, pipes, folders and hidden files are none."""
    with os.scandir(folder) as entries:
        files = [e for e in entries if not e.name.startswith(".") and is_regular(e)]
    texts = {e.name[:-4]: e.name for e in files if e.name.lower().endswith(".txt")}
    pictures = []
    for entry in files:
        stem, suffix = os.path.splitext(entry.name)  # noqa: PTH122, a Path for each takes longer
        if suffix.lower() in FORMATS:
            status = entry.stat(follow_symlinks=False)
            text, captioned = texts.get(stem, f"{stem}.txt"), stem in texts
            facts = (status.st_size, status.st_mtime_ns)
            pictures.append(Picture(entry.name, *facts, text, captioned))
    return sorted(pictures, key=lambda picture: natural_key(picture.name))


def is_regular(entry: os.DirEntry[str]) -> bool:
    """Tell a file from a link, a folder, a pipe and a device."""
    return entry.is_file(follow_symlinks=False)


def picture_in(folder: Path, name: str) -> Picture:
    """Return one picture of a dataset; what is none is not there."""
    name = clean_name(name, "file")
    path = folder / name
    status = status_of(path)
    if status is None or suffix_of(name) not in FORMATS:
        raise Problem(404, "image_unknown", f"There is no picture {show(name)} in {folder.name}.")
    stem = PurePath(name).stem
    there = [text for text in (f"{stem}.txt", f"{stem}.TXT") if status_of(folder / text)]
    text = there[0] if there else f"{stem}.txt"
    return Picture(name, status.st_size, status.st_mtime_ns, text, bool(there))


def status_of(path: Path) -> os.stat_result | None:
    """Return what is known of a regular file; None for anything else."""
    with contextlib.suppress(OSError):
        status = path.lstat()
        return status if stat.S_ISREG(status.st_mode) else None
    return None


# --- Uploads ---


def check_room(folder: Path, length: int) -> None:
    """Refuse a file that is too large for the dataset or the disk."""
    with os.scandir(folder) as entries:
        sizes = [e.stat(follow_symlinks=False).st_size for e in entries if is_regular(e)]
    if len(sizes) >= LIMITS.files:
        raise refusal(413, "dataset_full", folder.name, f"at most {LIMITS.files} files", "more")
    if sum(sizes) + length > LIMITS.dataset_bytes:
        most = f"at most {LIMITS.dataset_bytes // 2**30} GiB"
        raise refusal(413, "dataset_full", folder.name, most, "more")
    if shutil.disk_usage(folder).free - length < LIMITS.free_bytes:
        raise disk_full()


def disk_full() -> Problem:
    """Say that the disk has no room."""
    detail = f"The disk is full: {LIMITS.free_bytes / 2**30:g} GiB are to stay free. Make room."
    return Problem(507, "disk_full", detail)


def part_in(folder: Path) -> Path:
    """Name a file for an upload under way; hidden, so that nobody trains on half a picture."""
    return folder / f".{secrets.token_hex(8)}.part"


def publish(folder: Path, part: Path, name: str) -> bool:
    """Give a complete upload its name; return whether it is new, or is there already."""
    check_picture(part, name)
    flush_file(part)
    with CHANGING:
        if (taken := holder_of(folder, name)) is None:
            part.rename(folder / name)
            flush_folder(folder)
            return True
    if taken == name and same_bytes(part, folder / name):
        part.unlink()
        return False
    if key_of(taken) == key_of(name):
        detail = f"There is another picture {show(taken)} in {folder.name}."
        raise Problem(409, "name_taken", f"{detail} Remove it first, or give this one a new name.")
    detail = f"{show(name)} would share its caption with {show(taken)}."
    raise Problem(409, "stem_taken", f"{detail} Give it another name.")


def holder_of(folder: Path, name: str) -> str | None:
    """Return the picture whose caption would be that of this name."""
    alike = [picture.name for picture in scan(folder) if stem_key(picture.name) == stem_key(name)]
    return name if name in alike else next(iter(alike), None)


def same_bytes(one: Path, other: Path) -> bool:
    """Tell whether two files hold the same."""
    with one.open("rb") as first, other.open("rb") as second:
        while block := first.read(2**20):
            if block != second.read(2**20):
                return False
        return not second.read(1)


def sweep(settings: Settings) -> None:
    """Remove what uploads left behind when the service was killed."""
    for name in names(settings):
        for part in (settings.datasets / name).glob(".*.part"):
            part.unlink(missing_ok=True)


def remove_picture(settings: Settings, folder: Path, name: str) -> None:
    """Put a picture into the trash, together with its caption."""
    with CHANGING:
        picture = picture_in(folder, name)
        there = [folder / picture.text] if picture.captioned else []
        to_trash(settings, folder / picture.name, *there)


# --- Snapshots ---


def snapshot(settings: Settings, name: str, target: Path) -> int:
    """Keep a dataset as it is for one run: pictures as hard links, all else as copies.

    A picture is never written in place, a caption might be by an editor. Returns how many pictures.
    """
    source = folder_of(settings, name)
    target.mkdir(parents=True)
    with CHANGING:  # no half of a bulk change
        files = list(files_below(source))
        for path in files:
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(8) as pool:  # so many flushes at a time cost hardly more than one
            list(pool.map(lambda path: keep(path, target / path.relative_to(source)), files))
    flush_folder(target)
    return sum(suffix_of(path.name) in FORMATS for path in files)


def files_below(folder: Path) -> Iterator[Path]:
    """List the files that a trainer would find, and no link, pipe or hidden one."""
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as found:
            entries = [entry for entry in found if not entry.name.startswith(".")]
        waiting += [Path(e.path) for e in entries if e.is_dir(follow_symlinks=False)]
        yield from (Path(e.path) for e in entries if is_regular(e))


def keep(path: Path, target: Path) -> None:
    """Link a picture, or copy what cannot be linked or may change, and flush the copy."""
    if suffix_of(path.name) in FORMATS:
        with contextlib.suppress(OSError):  # another disk, or a file system without links
            target.hardlink_to(path)
            return
    shutil.copyfile(path, target)
    flush_file(target)
    shutil.copystat(path, target)


def total_bytes(pictures: Iterable[Picture]) -> int:
    """Sum up the sizes of pictures."""
    return sum(picture.bytes for picture in pictures)
