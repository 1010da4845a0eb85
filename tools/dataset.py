"""From pictures and what is said about them to a dataset: judge, caption, split, write."""

from __future__ import annotations

import errno
import functools
import glob
import hashlib
import io
import json
import os
import re
import string
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

import train_lora
from tools.pictures import Measures, clusters, has_location, measure
from tools.program import refuse, remark
from train_lora import Emitter, Phase, Record, StopRequest, counted

FORMAT, VERSION = "lora-dataset", 1
FEW, ENOUGH = 5, 10  # pictures: hardly anything is learned; a share can be held back
SMALL, BLURRED, SOFT = 0.75, 25.0, 100.0  # of the resolution; of sharpness, alone and beside others
SHARED, LOOPS = 0.8, 4  # of all captions; the same three words so often
TOKENS, TOKENS_PER_WORD = 75, 1.35  # what text encoders read; an estimate
FOLDER = re.compile(r"(\d{1,4})_(.+)")  # as kohya's programs name them: 10_zkb dog
FOREIGN = re.compile(r'[\x00-\x1f<>:"\\|?*\ud800-\udfff]')  # to some file system, or no text
REFUSALS = re.compile(r"\b(i can(?:no|')t|as an ai|i'm sorry|i am sorry)\b", re.IGNORECASE)
OPENINGS = re.compile(r"^(the|this) (image|picture|photo)\w* (shows|is|depicts)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What was asked for."""

    resolution: int | list[int] = 512
    squares: bool = False
    trigger: Sequence[str] = ()
    drop: set[str] = field(default_factory=lambda: {"exact", "broken"})
    fit: str = "keep"
    link: str = "hard"
    template: str | None = None
    existing: str = "keep"
    captions_from: str | None = None
    image_key: str = "image"
    caption_key: str = "caption"
    validation: float = 0.1
    seed: int = 0

    def config(self, source: Path) -> train_lora.TrainingConfig:
        """Ask of a folder what the trainer would, by its own rules."""
        places = {"dataset_path": str(source), "output_path": str(source / ".no output")}
        known: Record = {"base_model": "none", "resolution": self.resolution, **places}
        known |= {"buckets": not self.squares and self.fit != "crop", "folder_repeats": True}
        return train_lora.TrainingConfig.from_record(known | {"trigger_words": list(self.trigger)})


@dataclass(kw_only=True)
class Found:
    """One picture of the source, with what was found out about it."""

    name: str  # path inside the source, with forward slashes
    path: Path
    width: int = 0
    height: int = 0
    bytes: int = 0
    caption: str = ""
    caption_from: str | None = None
    mask: str | None = None  # the name of what shows which part counts; its own for its alpha
    repeats: int | None = None  # in an epoch, where a folder or repeats.json says so
    small: bool = False
    crop_loss: float = 0.0  # the share that training crops
    measures: Measures | None = None  # none for what cannot be used
    cluster: int = -1
    flags: list[str] = field(default_factory=list)
    excluded: Record | None = None  # why it is no part of the dataset

    @property
    def label(self) -> str | None:
        """Take its folder's name; kohya's programs write a number of repeats in front of it."""
        folder = PurePosixPath(self.name).parent.name
        numbered = FOLDER.fullmatch(folder)
        return (numbered[2] if numbered else folder) or None

    def record(self) -> Record:
        """Write down what is known."""
        return {
            "source": self.name,
            "source_size": [self.width, self.height],
            "label": self.label,
            "repeats": self.repeats,
            "mask": self.mask,
            "cropped": round(self.crop_loss, 3),
            "caption": self.caption,
            "caption_from": self.caption_from,
            "sharpness": round(self.measures.sharpness, 1) if self.measures else None,
            "phash": f"{self.measures.phash:016x}" if self.measures else None,
            "pixels": self.measures.pixels if self.measures else None,
            "cluster": self.cluster,
            "flags": self.flags,
        }


# --- Finding ---


class SourceFolder(train_lora.ImageFolder):
    """A folder as the trainer reads it; numbers that are no repeats, such as years, end nothing."""

    def read_repeats(self) -> None:
        """Tell of numbers that make no sense; the trainer refuses them when it is to heed them."""
        try:
            super().read_repeats()
        except train_lora.TrainError as error:
            for problem in error.problems:
                remark(self.events, f"Repeats are not heeded: {problem}", file=problem.path)


def find_pictures(source: Path, wishes: Wishes, events: Emitter, stop: StopRequest) -> list[Found]:
    """Look at all pictures as the trainer does; what it would skip is named, and excluded."""
    if not source.is_dir():
        raise refuse(source, "a folder with pictures", "no folder")
    config = wishes.config(source)
    folder = SourceFolder(config.dataset_path, config, events, stop)
    folder.scan(thorough=False)  # what is broken further in is found when it is measured
    paths = {name: folder.files[name] for name in folder.images}
    given = captions_of(wishes, paths, events) if wishes.captions_from else {}
    phase = Phase("measuring pictures", len(folder.images), events, stop)
    looked = train_lora.ahead(functools.partial(look_at, folder=folder), folder.pictures)
    found = []
    for done, (name, usable) in enumerate(folder.images.items()):
        phase.at(done)
        picture = Found(name=name, path=folder.files[name], flags=["broken"])
        picture.excluded = {"reason": "broken"}
        if usable:
            _, outcome = next(looked)
            with folder.leaving_out(train_lora.WarningCode.IMAGE_SKIPPED, name, "Skipped"):
                picture = outcome.result()
        own = name in folder.captions
        picture.caption = given.get(name) or folder.captions.get(name, "")
        where = "metadata" if own and not has_sidecar(name, folder.files) else "txt"
        picture.caption_from = "given" if given.get(name) else where if own else None
        found.append(picture)
    if not any(each.measures for each in found):
        raise refuse(source, "usable pictures", "none")
    return found


def look_at(known: train_lora.Picture, folder: train_lora.ImageFolder) -> Found:
    """Measure one picture of the folder, at the largest resolution that it fills."""
    config, size, path = folder.config, (known.width, known.height), known.path
    with folder.room_for(known.width * known.height):
        picture = train_lora.load_picture(path)
        found = Found(name=known.name, path=path, width=picture.width, height=picture.height)
        side = train_lora.sides_of(size, config)[-1]
        found.bytes, found.measures = path.stat().st_size, measure(picture, side)
    found.flags = ["location"] if has_location(path) else []
    found.small = not train_lora.fills(size, round(SMALL * config.sides[0]), config)
    found.crop_loss = known.crop_loss
    found.repeats = known.repeats if known.repeats > 1 else None
    look_at_mask(found, folder)
    return found


def look_at_mask(found: Found, folder: train_lora.ImageFolder) -> None:
    """Find what shows which part of a picture counts, and flag what the trainer would refuse."""
    with Image.open(found.path, formats=train_lora.IMAGE_FORMATS) as opened:
        clear = opened.has_transparency_data
    try:
        mask = folder.mask_of(found.name, (found.width, found.height), clear)
    except train_lora.Unusable as reason:
        found.flags.append(str(reason))
        return
    found.mask = folder.name_of(mask) if mask else None


def has_sidecar(name: str, files: Mapping[str, Path]) -> bool:
    """Tell whether the trainer would read a text beside a picture."""
    stem = name.rpartition(".")[0]
    return any(f"{stem}{ending}" in files for ending in (".txt", ".TXT"))


def captions_of(wishes: Wishes, paths: Mapping[str, Path], events: Emitter) -> dict[str, str]:
    """Read captions that another program wrote, by the names of the pictures' files.

    Where several files have one name, folders tell them apart; where these do not, none is taken.
    """
    pattern = str(wishes.captions_from)
    files = sorted(map(Path, glob.glob(pattern)), key=os.path.getmtime)  # noqa: PTH207, absolute ones too
    if not files:
        raise refuse(pattern, "a JSON file, or a pattern that matches one", "nothing there")
    try:
        document = json.loads(files[-1].read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(files[-1], "JSON in UTF-8", str(error)) from error
    fitting = fitting_captions(document, wishes, paths)
    for name, captions in fitting.items():
        if len(captions) > 1:
            remark(events, f"{name}: {len(captions)} captions fit it; none is taken", file=name)
    found = {name: captions.pop() for name, captions in fitting.items() if len(captions) == 1}
    if not found:
        expected = f"captions under {wishes.image_key} and {wishes.caption_key}"
        raise refuse(files[-1], expected, "none for these pictures")
    events.emit(train_lora.PhaseFacts(name="captions found", done=len(found), total=len(paths)))
    return found


def fitting_captions(
    document: Any, wishes: Wishes, paths: Mapping[str, Path]
) -> dict[str, set[str]]:
    """Find the captions whose paths and a picture's have the longest end in common."""
    own = {name: ends_of(path.absolute().as_posix()) for name, path in paths.items()}
    known = {end for ends in own.values() for end in ends}
    by_end: defaultdict[str, set[str]] = defaultdict(set)
    for entry in entries_in(document):
        image, caption = dig(entry, wishes.image_key), dig(entry, wishes.caption_key)
        if isinstance(image, str) and isinstance(caption, str) and caption.strip():
            ends = ends_of(image.replace("\\", "/"))
            if end := next((end for end in ends if end in known), None):
                by_end[end].add(" ".join(caption.split()))
    best = {name: next((e for e in ends if e in by_end), None) for name, ends in own.items()}
    return {name: set(by_end[end]) for name, end in best.items() if end}


def ends_of(path: str) -> list[str]:
    """List what a path ends with, the longest first: of a/b.png that, then b.png."""
    parts = PurePosixPath(path).parts
    return ["/".join(parts[begin:]) for begin in range(len(parts))]


def entries_in(document: Any) -> Iterator[Any]:
    """List the objects of a JSON document, whatever list or table they stand in."""
    if isinstance(document, list):
        for item in document:
            yield from entries_in(item)
    elif isinstance(document, dict):
        yield document
        for key, item in document.items():
            if isinstance(item, (list, dict)):
                yield from entries_in(item)
            elif isinstance(item, str):
                yield {"image": key, "caption": item}


def dig(entry: Any, path: str) -> Any:
    """Follow a dotted path into an object."""
    for key in path.split("."):
        entry = entry.get(key) if isinstance(entry, dict) else None
    return entry


# --- Judging ---


def judge(found: Sequence[Found], wishes: Wishes) -> list[str]:
    """Flag what is doubtful, choose one of each cluster; return remarks on all of them."""
    usable = [each for each in found if each.measures]
    for each in usable:
        each.flags += flags_of(each)
    soft = middle([each.measures.sharpness for each in usable if each.measures]) / 4
    for each in usable:
        sharpness = each.measures.sharpness if each.measures else 0
        doubtful = sharpness < BLURRED or sharpness < min(soft, SOFT)
        if doubtful and "small" not in each.flags:
            each.flags.append("blurred")
    mark_duplicates(usable, wishes)
    if "small" in wishes.drop:
        for each in usable:
            if "small" in each.flags and not each.excluded:
                each.excluded = {"reason": "small"}
    return [*remarks_on_set(usable, wishes), *remarks_on_captions(usable, wishes)]


def middle(numbers: Sequence[float]) -> float:
    """Take the median."""
    return sorted(numbers)[len(numbers) // 2]


def flags_of(found: Found) -> Iterator[str]:
    """List what one picture alone shows."""
    if found.small:
        yield "small"
    if found.crop_loss > train_lora.CROP_LOSS:
        yield f"cropped by {found.crop_loss:.0%}"
    if found.measures and found.measures.light:
        yield found.measures.light


def mark_duplicates(usable: Sequence[Found], wishes: Wishes) -> None:
    """Number the clusters; of each keep the largest picture, then the largest file."""
    measured = [each.measures for each in usable if each.measures]
    for number, cluster in enumerate(clusters(measured)):
        members = [usable[index] for index in cluster]
        members.sort(key=lambda each: (-each.width * each.height, -each.bytes, each.name))
        kept, known = members[0], {pixels_of(members[0])}
        for each in members:
            each.cluster = number
        for each in members[1:]:
            kind = "exact" if pixels_of(each) in known else "near"
            known.add(pixels_of(each))
            each.flags.append(f"{kind} duplicate")
            if kind in wishes.drop:
                each.excluded = {"reason": f"{kind}_duplicate", "of": kept.name}


def pixels_of(found: Found) -> str:
    """Tell a picture by what it shows."""
    return found.measures.pixels if found.measures else ""


def remarks_on_set(usable: Sequence[Found], wishes: Wishes) -> Iterator[str]:
    """Say what all pictures together lack."""
    kept = [each for each in usable if not each.excluded]
    if len(kept) < FEW:
        few = counted(len(kept), "picture")
        yield f"Only {few}: a subject needs {FEW} or more, better {ENOUGH}"
    near = sum(any("duplicate" in flag for flag in each.flags) for each in kept)
    if len(kept) > 50 and near > 0.2 * len(kept):
        yield f"{near} of {len(kept)} pictures are near duplicates: they count for more than others"
    if len(kept) >= ENOUGH and wishes.validation and not held_back(kept, wishes):
        yield "None is held back to validate with: all pictures are alike"
    grey = sum(bool(each.measures and each.measures.grey) for each in kept)
    if 0 < grey < len(kept) / 2:
        yield f"Beside {len(kept) - grey} pictures with colour: {counted(grey, 'picture')} without"
    repeated = Counter(each.repeats for each in kept if each.repeats)
    for times, count in sorted(repeated.items()):
        few, counts = counted(count, "picture"), "counts" if count == 1 else "count"
        yield f"{few} {counts} {times} times by folder or repeats.json, with folder_repeats true"
    masked = sum(each.mask is not None for each in kept)
    if masked:
        few = counted(masked, "picture")
        yield f"{few} of {len(kept)} with a mask or an alpha channel, heeded with masked_loss true"
    stems = Counter(each.name.rpartition(".")[0] for each in usable)
    for stem in (stem for stem, count in stems.items() if count > 1):
        yield f"{stems[stem]} pictures are called {stem}: they share one caption file"


def remarks_on_captions(usable: Sequence[Found], wishes: Wishes) -> Iterator[str]:
    """Say what is odd about the captions."""
    captions = {each.name: each.caption for each in usable if each.caption}
    if not captions:
        return
    for name, caption in captions.items():
        if (tokens := round(len(caption.split()) * TOKENS_PER_WORD)) > TOKENS:
            yield f"{name}: about {tokens} tokens (estimated), of which {TOKENS} are read"
        if repeats_itself(caption):
            yield f"{name}: its caption repeats itself"
        if REFUSALS.search(caption):
            yield f"{name}: its caption is a refusal"
        if OPENINGS.match(caption):
            yield f"{name}: its caption begins with words that say nothing"
    if len(captions) > 1 and len(set(captions.values())) == 1:
        yield "All captions are the same: then trigger words alone say as much"
        return
    trigger = {word.casefold() for word in wishes.trigger}
    parts = [{p.strip().casefold() for p in c.split(",")} - trigger for c in captions.values()]
    counts = Counter(part for each in parts for part in each if part)
    for part, count in counts.most_common(3):
        if count >= max(3, SHARED * len(captions)):
            share = f"{count} of {len(captions)} captions"
            yield f'"{part}" stands in {share}: it may take the place of the trigger word'


def repeats_itself(caption: str) -> bool:
    """Tell whether the same three words come again and again, as models go round in circles."""
    words = caption.split()
    threes = Counter(zip(words, words[1:], words[2:], strict=False))
    return bool(threes) and threes.most_common(1)[0][1] >= LOOPS


# --- Planning ---


class Template(string.Formatter):
    """A caption with places to fill: {trigger} {label} {name} {caption}."""

    KNOWN = ("trigger", "label", "name", "caption")

    def __init__(self, text: str) -> None:
        """Refuse what could not be filled, before anything is written."""
        self.text = text
        try:
            names = {name for _, name, _, _ in self.parse(text) if name is not None}
        except ValueError as error:
            raise refuse("--template", "braces in pairs", str(error)) from error
        if unknown := names - set(self.KNOWN):
            expected = " ".join(f"{{{name}}}" for name in self.KNOWN)
            raise refuse("--template", expected, f"{{{unknown.pop()}}}")

    def fill(self, found: Found, wishes: Wishes) -> str:
        """Make a caption; what is empty leaves no double space or comma behind."""
        values = {
            "trigger": ", ".join(wishes.trigger),
            "label": (found.label or "").replace("_", " "),
            "name": PurePosixPath(found.name).stem.replace("_", " "),
            "caption": found.caption,
        }
        filled = " ".join(self.vformat(self.text, (), values).split())
        return re.sub(r"(, )+", ", ", re.sub(r" ,", ",", filled)).strip(", ")


def caption_for(found: Found, wishes: Wishes, template: Template | None) -> tuple[str, str | None]:
    """Choose what is said of a picture, and tell where that comes from."""
    made = template.fill(found, wishes) if template else ""
    own, mode = found.caption, wishes.existing if found.caption and made else "keep"
    texts = {
        "keep": own or made,
        "replace": made,
        "prepend": f"{made}, {own}",
        "append": f"{own}, {made}",
    }
    text = train_lora.compose_caption(texts[mode], wishes.trigger)
    own_stays = own and mode != "replace"
    return text, found.caption_from if own_stays else "template" if made else None


def plan(found: Sequence[Found], wishes: Wishes) -> Record:
    """Say all that will be written. The same pictures and wishes give the same plan."""
    template = Template(wishes.template) if wishes.template else None
    kept = [each for each in found if not each.excluded]
    held = held_back(kept, wishes)
    taken: set[str] = set()
    images = []
    for each in kept:
        split = "validation" if each.cluster in held else "train"
        caption, source = caption_for(each, wishes, template)
        file = free_name(split, each, wishes, taken)
        text_file = f"{file.rpartition('.')[0]}.txt"
        action = "crop" if wishes.fit == "crop" else wishes.link
        own: Record = {"file": file, "text_file": text_file, "split": split, "action": action}
        own["mask_file"] = mask_file_of(each, file, wishes)
        images.append(each.record() | own | {"caption": caption, "caption_from": source})
    excluded = [{"source": each.name} | each.excluded for each in found if each.excluded]
    counts = Counter(image["split"] for image in images)
    settings = {k: sorted(v) if isinstance(v, set) else v for k, v in vars(wishes).items()}
    settings["captions_from"] = wishes.captions_from and Path(wishes.captions_from).name
    return {
        "format": FORMAT,
        "version": VERSION,
        "settings": settings,
        "counts": {
            "train": counts["train"],
            "validation": counts["validation"],
            "excluded": len(excluded),
        },
        "images": images,
        "excluded": excluded,
    }


def mask_file_of(found: Found, file: str, wishes: Wishes) -> str | None:
    """Name the mask beside a picture; an alpha channel needs none where its picture stays whole."""
    apart = found.mask != found.name or wishes.fit == "crop"
    return f"{file.rpartition('.')[0]}{train_lora.MASK_SUFFIX}" if found.mask and apart else None


def held_back(kept: Sequence[Found], wishes: Wishes) -> set[int]:
    """Choose clusters for validation, each by itself: a new picture moves no other.

    But never more than half of the pictures, which clusters of many could make.
    """
    if len(kept) < ENOUGH or not wishes.validation:
        return set()
    first: dict[int, bytes] = {}
    for each in kept:
        first.setdefault(each.cluster, f"{wishes.seed} {pixels_of(each)}".encode())
    ranks = {n: int(hashlib.sha256(key).hexdigest(), 16) / 2**256 for n, key in first.items()}
    sizes, room, chosen = Counter(each.cluster for each in kept), len(kept) // 2, set[int]()
    for number in sorted(ranks, key=lambda number: ranks[number]):
        wanted = ranks[number] < wishes.validation or not chosen
        if wanted and sizes[number] <= room:
            chosen.add(number)
            room -= sizes[number]
    return chosen


def free_name(split: str, found: Found, wishes: Wishes, taken: set[str]) -> str:
    """Name a picture in the dataset; no two names may be one on any file system.

    Its folder says how often it counts, as kohya's trainer has it; it looks like nobody's mask.
    """
    suffix = ".png" if wishes.fit == "crop" else PurePosixPath(found.name).suffix.lower()
    folder = f"{found.repeats}_{found.label or 'images'}" if found.repeats else found.label
    name = re.sub(r"\.mask$", "_mask", PurePosixPath(found.name).stem, flags=re.IGNORECASE)
    parts = [split, *([folder] if folder else []), name]
    plain = [FOREIGN.sub("_", part)[:100].strip(". ") or "_" for part in parts]
    stem = "/".join(plain)
    numbers = iter(range(2, 10**6))
    name = stem
    while (key := unicodedata.normalize("NFC", name).casefold()) in taken:
        name = f"{stem}_{next(numbers)}"
    taken.add(key)
    return f"{name}{suffix}"


# --- Writing ---


def write_dataset(
    source: Path, target: Path, manifest: Record, wishes: Wishes, events: Emitter, stop: StopRequest
) -> None:
    """Write pictures and captions; what is there already, as it should be, stays."""
    phase = Phase("writing the dataset", len(manifest["images"]), events, stop)
    lines = defaultdict(list)
    for done, image in enumerate(manifest["images"]):
        phase.at(done)
        write_picture(source / image["source"], target / image["file"], image["action"], wishes)
        if image["mask_file"]:
            write_mask(source, target, image, wishes)
        write_once(target / image["text_file"], (image["caption"] + "\n").encode())
        split, _, inside = image["file"].partition("/")
        lines[split].append({"file_name": inside, "text": image["caption"]})
    for split, entries in lines.items():
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        write_once(target / split / "metadata.jsonl", text.encode())


def write_picture(source: Path, target: Path, action: str, wishes: Wishes) -> None:
    """Put a picture where it belongs: the same bytes, or cropped to what training sees."""
    if action == "crop":
        write_once(target, as_square(train_lora.load_picture(source), wishes))
    elif not (action == "hard" and linked(source, target)):
        write_once(target, source.read_bytes())


def write_mask(source: Path, target: Path, image: Record, wishes: Wishes) -> None:
    """Put a mask beside its picture, and crop it alike."""
    place, mask = target / image["mask_file"], source / image["mask"]
    if image["action"] != "crop":
        write_picture(mask, place, image["action"], wishes)
        return
    size: tuple[int, int] = (image["source_size"][0], image["source_size"][1])
    known = train_lora.Picture(image["source"], source / image["source"], *size, "", mask=mask)
    write_once(place, as_square(train_lora.load_mask(known), wishes))


def as_square(picture: Image.Image, wishes: Wishes) -> bytes:
    """Crop to the largest square that is trained, as a PNG."""
    said, buffer = wishes.resolution, io.BytesIO()
    side = max(said) if isinstance(said, list) else said
    train_lora.fit_picture(picture, (side, side))[0].save(buffer, "PNG")
    return buffer.getvalue()


def linked(source: Path, target: Path) -> bool:
    """Give a file a second name, where the file system can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except FileExistsError:
        return source.samefile(target)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            return False  # another disk, or one that knows no links
        raise
    return True


def write_once(path: Path, content: bytes) -> None:
    """Write a file, unless it is there and the same."""
    if not (path.is_file() and path.read_bytes() == content):
        train_lora.write_whole(path, content)
