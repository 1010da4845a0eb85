"""Give pictures of a folder their captions: from a template, another program, or a model.

Captions are written beside the pictures, one after the other, so that what is done stays done.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import train_lora
from tools.captioners import CAPTIONERS, Captioner, Request, find_model
from tools.dataset import (
    FORMAT,
    Found,
    SourceFolder,
    Template,
    Wishes,
    captions_of,
    remarks_on_captions,
)
from tools.program import as_json, refuse, remark
from train_lora import (
    Emitter,
    ImageFolder,
    Phase,
    PhaseFacts,
    StopRequest,
    TrainError,
    WarningCode,
    counted,
    write_whole,
)

if TYPE_CHECKING:
    from PIL import Image

MOST_PIXELS = 2**20  # of what a captioner is shown; none of them looks at more
HOPELESS = 10  # pictures that failed, with none that did not
JOURNAL = ".captioning"  # what is done of captions that replace others; gone at the end


@dataclass(frozen=True)
class Job:
    """A folder of pictures that is to get captions."""

    images: ImageFolder
    wishes: Wishes
    request: Request
    texts: dict[str, Path]  # where the caption of each picture stands, or will

    @classmethod
    def find(
        cls, source: Path, wishes: Wishes, request: Request, events: Emitter, stop: StopRequest
    ) -> Job:
        """Look at a folder as the trainer does; of pictures that share a caption one counts."""
        if not source.is_dir():
            raise refuse(source, "a folder with pictures", "no folder")
        config = wishes.config(source)
        images = SourceFolder(config.dataset_path, config, events, stop)
        images.scan(thorough=False)  # what is broken further in is found when it is looked at
        if not images.pictures:
            raise refuse(source, "usable pictures", "none")
        known = {n[:-4]: path for n, path in images.files.items() if n.lower().endswith(".txt")}
        owners: dict[Path, str] = {}
        for name in (picture.name for picture in images.pictures):
            stem = name.rpartition(".")[0]
            text = known.get(stem) or images.root / f"{stem}.txt"
            if owners.setdefault(text, name) != name:
                remark(events, f"{name} has its caption in common with {owners[text]}", file=name)
        return cls(images, wishes, request, {name: text for text, name in owners.items()})

    @functools.cached_property
    def wanted(self) -> list[str]:
        """List the pictures that are to get a caption."""
        return [n for n in self.texts if self.request.overwrite or self.is_free(n)]

    @property
    def kept(self) -> int:
        """Count the pictures whose caption stays."""
        return len(self.texts) - len(self.wanted)

    def is_free(self, name: str) -> bool:
        """Tell whether a picture has no caption, or trigger words alone, as a dataset gets them.

        One that cannot be read is one.
        """
        text, said = self.texts[name], self.images.captions.get(name)
        if said and said == train_lora.compose_caption("", self.wishes.trigger):
            return True
        if said or text.is_symlink():
            return False
        return not text.exists() or (text.is_file() and is_blank(text))

    def caption_from(self, said: str, name: str, template: Template | None) -> str:
        """Put what was said of a picture into the words that were asked for."""
        found = Found(name=name, path=self.texts[name], caption=said)
        text = template.fill(found, self.wishes) if template else " ".join(said.split())
        return train_lora.compose_caption(text, self.wishes.trigger) if text else ""

    def found(self) -> list[Found]:
        """List the pictures with their captions, for whoever judges those."""
        said = self.images.captions
        return [Found(name=n, path=p, caption=said.get(n, "")) for n, p in self.texts.items()]


def is_blank(path: Path) -> bool:
    """Tell whether a file holds nothing to read."""
    with path.open("rb") as file:
        return not file.read(train_lora.CAPTION_BYTES).strip(b"\xef\xbb\xbf \t\r\n")


def caption_folder(job: Job, events: Emitter, stop: StopRequest) -> str:
    """Write the captions that a folder lacks, or all of them; return what was done."""
    template = Template(job.wishes.template) if job.wishes.template else None
    journal = Journal(job)
    waiting = [name for name in job.wanted if name not in journal.done]
    for name, said in said_of(job, waiting, events, stop):
        if caption := job.caption_from(said, name, template):
            write_whole(job.texts[name], f"{caption}\n".encode())
            job.images.captions[name] = caption
            journal.note(name)
        else:
            remark(events, f"{name}: the captioner says nothing; its caption stays", file=name)
    if waiting and not journal.done:
        found, who = f"nothing, for {counted(len(waiting), 'picture')}", job.request.captioner
        raise refuse(job.request.model or who, "captions", found, "Take another model.")
    refresh_tables(job)
    journal.remove()
    for sentence in remarks_on_captions(job.found(), job.wishes):
        remark(events, sentence)
    failed = len(job.wanted) - len(journal.done)
    told = f"{counted(len(journal.done), 'caption')} written, {job.kept} kept"
    return told + (f", {counted(failed, 'picture')} without a new one" if failed else "")


class Journal:
    """The names of pictures that have their new caption, for a second start to go on with.

    Captions that are there tell as much, unless they are to be replaced.
    """

    def __init__(self, job: Job) -> None:
        """Go on with what an earlier start noted, if that was asked for the same; else begin."""
        self.path = job.images.root / JOURNAL
        self.needed = job.request.overwrite and not job.wishes.captions_from
        self.done: set[str] = set()
        if not self.needed:
            return
        knobs = {k: v for k, v in vars(job.request).items() if k not in ("batch", "device")}
        asked = train_lora.digest_of([knobs, job.wishes.template, [*job.wishes.trigger]], 12)
        lines = self.path.read_text("utf-8").split("\n") if self.path.is_file() else [""]
        if lines[0] == asked:  # the last line is empty, or torn
            self.done = set(map(json.loads, lines[1:-1])) & set(job.wanted)
        kept = [asked, *map(json.dumps, sorted(self.done)), ""]
        write_whole(self.path, "\n".join(kept).encode())

    def note(self, name: str) -> None:
        """Note a picture that is done."""
        self.done.add(name)
        if self.needed:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(name) + "\n")

    def remove(self) -> None:
        """Forget it, as all is done."""
        if self.needed:
            self.path.unlink(missing_ok=True)


def said_of(
    job: Job, names: Sequence[str], events: Emitter, stop: StopRequest
) -> Iterator[tuple[str, str]]:
    """Tell what is said of pictures: by another program, by a model, by a template alone."""
    phase = Phase("captioning pictures", len(names), events, stop)
    if job.request.captioner in CAPTIONERS and names:
        folder = find_model(job.request, events, stop)
        events.emit(PhaseFacts(name="loading the captioner", done=0, total=None))
        captioner = CAPTIONERS[str(job.request.captioner)](folder, job.request, events)
        try:
            yield from looked_at(job, names, captioner, phase)
        finally:
            del captioner
            free_memory()
        return
    said = job.images.captions
    if job.wishes.captions_from:
        paths = {name: job.images.files[name] for name in job.texts}
        said = captions_of(job.wishes, paths, events)
    for done, name in enumerate(names):
        phase.at(done)
        yield name, said.get(name, "")


def looked_at(
    job: Job, names: Sequence[str], captioner: Captioner, phase: Phase
) -> Iterator[tuple[str, str]]:
    """Let a model describe pictures, a batch at a time; those that it cannot are named."""
    load = functools.partial(load_small, files=job.images.files)
    loaded, good, bad = train_lora.ahead(load, names), 0, 0
    for begin in range(0, len(names), job.request.batch):
        phase.at(begin)
        batch = {}
        for name, outcome in itertools.islice(loaded, job.request.batch):
            with job.images.leaving_out(WarningCode.IMAGE_SKIPPED, name, "Skipped"):
                batch[name] = outcome.result()
        for name, said in describe(captioner, batch):
            if isinstance(said, str):
                good += 1
                yield name, said
                continue
            bad += 1
            if bad == HOPELESS and not good:
                raise said
            with job.images.leaving_out(WarningCode.IMAGE_SKIPPED, name, "No caption for"):
                raise said


def load_small(name: str, files: Mapping[str, Path]) -> Image.Image:
    """Load a picture as training sees it, and no larger than a captioner needs."""
    picture = train_lora.load_picture(files[name])
    scale = min(1.0, (MOST_PIXELS / (picture.width * picture.height)) ** 0.5)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture if size == picture.size else picture.resize(size)


def describe(
    captioner: Captioner, batch: Mapping[str, Image.Image]
) -> Iterator[tuple[str, str | Exception]]:
    """Describe a batch; where it fails as a whole, one by one, so that one costs no other."""
    if not batch:
        return
    said: list[tuple[str, str | Exception]] = []
    try:
        said += zip(batch, captioner.describe(list(batch.values())), strict=True)
    except TrainError:
        raise
    except Exception as error:  # noqa: BLE001, libraries raise anything, and memory ends
        traceback.clear_frames(error.__traceback__)  # else they hold the memory on
        said = [(name, error) for name in batch] if len(batch) == 1 else []
    if said:
        yield from said
        return
    for name, picture in batch.items():  # not above, where the error still stands
        yield from describe(captioner, {name: picture})


def free_memory() -> None:
    """Give a card back what a model held of it."""
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


def refresh_tables(job: Job) -> None:
    """Let metadata.jsonl and the manifest of a dataset say what now stands beside pictures."""
    for name, path in job.images.files.items():
        if PurePosixPath(name).name != "metadata.jsonl":
            continue
        with contextlib.suppress(train_lora.Unusable):  # of which the scan has told
            former = job.images.read(name, train_lora.METADATA_BYTES)
            folder = PurePosixPath(name).parent
            lines = [refreshed(line, folder, job.images.captions) for line in former.split(b"\n")]
            if (made := b"\n".join(lines)) != former:
                write_whole(path, made)
    if (job.images.root / "manifest.json").is_file():
        refresh_manifest(job, job.images.root / "manifest.json")


def refreshed(line: bytes, folder: PurePosixPath, captions: Mapping[str, str]) -> bytes:
    """Put a caption into its line; a line that names no picture with one stays as it is."""
    try:
        entry = json.loads(line)
        caption = captions.get((folder / entry["file_name"]).as_posix())
        if caption is None or entry["text"] == caption:
            return line
        return json.dumps(entry | {"text": caption}, ensure_ascii=False).encode()
    except (ValueError, LookupError, TypeError):
        return line


def refresh_manifest(job: Job, path: Path) -> None:
    """Put captions into the manifest of a dataset; another program's stays as it is."""
    how = "given" if job.wishes.captions_from else job.request.captioner
    try:
        manifest = json.loads(path.read_bytes())
        former = as_json(manifest)
        for image in manifest["images"] if manifest["format"] == FORMAT else ():
            caption = job.images.captions.get(image["file"], image["caption"])
            if caption != image["caption"]:
                image |= {"caption": caption, "caption_from": how}
    except (LookupError, *train_lora.NOT_JSON):
        return
    if (made := as_json(manifest)) != former:
        write_whole(path, made)
