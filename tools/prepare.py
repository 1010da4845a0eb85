"""Judge a folder of pictures, make a dataset of it, and caption that. The folder stays as it is.

python tools/prepare.py check SRC                        what is good, what is doubtful, and why
python tools/prepare.py build SRC DST --trigger zkb      train and validation folders with captions
python tools/prepare.py caption DIR --with florence2     captions beside pictures that have none
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.program import as_json, command_line, refuse, remark, run, table, take_events
from train_lora import Emitter, Record, StopRequest, counted, write_whole

if TYPE_CHECKING:
    from tools.dataset import Found, Wishes

DROPS = ("exact", "near", "small", "broken")
WRITERS = ("template", "florence2", "blip", "vlm", "tagger")
TASKS = ("caption", "detailed", "more_detailed", "tags")


def parse_drops(text: str) -> set[str]:
    """Read what is to be left out, separated by commas."""
    words = set(filter(None, text.split(",")))
    if unknown := words - set(DROPS):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(DROPS)}, got {unknown.pop()}")
    return words


def parse_share(text: str) -> float:
    """Read a share from 0 to a half."""
    share = float(text)
    if not 0 <= share <= 0.5:
        raise argparse.ArgumentTypeError(f"expected 0 … 0.5, got {text}")
    return share


def parse_sides(text: str) -> int | list[int]:
    """Read one resolution, or several between commas."""
    try:
        sides = [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected 512, or 512,768, got {text!r}") from None
    return sides if len(sides) > 1 else sides[0]


def parse_batch(text: str) -> int:
    """Read how many pictures a model looks at together."""
    number = int(text)
    if not 1 <= number <= 1024:
        raise argparse.ArgumentTypeError(f"expected 1 … 1024, got {text}")
    return number


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    whole = command_line(__doc__)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="judge the pictures and their captions")
    build = commands.add_parser("build", help="make folders to train on and to validate with")
    caption = commands.add_parser("caption", help="write captions beside pictures")
    for command in (check, build):
        command.add_argument("source", type=Path, metavar="SRC")
        add = command.add_argument
        add("--resolution", type=parse_sides, default=512, help="of the training: 512, or 512,768")
        add("--squares", action="store_true", help="judge what buckets false crops")
    check.add_argument("--report", type=Path, help="also write all of it as JSON")
    describe_build(build)
    describe_caption(caption)
    for command in (check, build, caption):
        command.add_argument("--trigger", action="append", default=[], help="a trigger word")
        take_events(command)
    return whole


def describe_build(build: argparse.ArgumentParser) -> None:
    """Describe what a dataset may be made of, and how."""
    add = build.add_argument
    add("target", type=Path, metavar="DST")
    add(
        "--drop",
        type=parse_drops,
        default="exact,broken",
        help="what is left out: " + ",".join(DROPS),
    )
    add("--fit", choices=("keep", "crop"), default="keep", help="crop: squares of the resolution")
    add("--link", choices=("hard", "copy"), default="hard", help="hard: no space, the same bytes")
    add("--template", help="a caption for pictures without one: a photo of {trigger} {label}")
    add("--existing", choices=("keep", "replace", "prepend", "append"), default="keep")
    take_given_captions(build)
    add("--validation", type=parse_share, default=0.1, help="share that is held back")
    add("--seed", type=int, default=0, help="chooses which ones are held back")
    add("--dry-run", action="store_true", help="say what would be done, write nothing")


def take_given_captions(command: Any) -> None:
    """Add the options for captions that another program wrote."""
    add = command.add_argument
    add("--captions-from", metavar="FILE", help="JSON of another program, or a pattern: the newest")
    add(
        "--image-key",
        default="image",
        metavar="KEY",
        help="where a picture's name stands in it, as a.b.c",
    )
    add("--caption-key", default="caption", metavar="KEY", help="where its caption stands in it")


def describe_caption(caption: argparse.ArgumentParser) -> None:
    """Describe who may write captions, and how."""
    add = caption.add_argument
    add("source", type=Path, metavar="DIR")
    add("--with", dest="captioner", choices=WRITERS, help="who writes them")
    add(
        "--model",
        metavar="MODEL",
        help="folder or Hugging Face id; the usual one, if it is here, unless given",
    )
    add("--task", choices=TASKS, default="detailed", help="of florence2: " + ", ".join(TASKS))
    add("--prompt", metavar="TEXT", help="question to a vlm; beginning of a sentence for blip")
    add("--threshold", type=float, default=0.35, metavar="N", help="how likely a tag has to be")
    add(
        "--character-threshold",
        type=float,
        default=0.85,
        metavar="N",
        help="the same, of a character's name",
    )
    add("--exclude", default="", metavar="TAGS", help="tags to leave out: a,b,c")
    add(
        "--template", metavar="TEXT", help="what becomes of it: {trigger}, {caption} at the {label}"
    )
    take_given_captions(caption)
    add("--overwrite", action="store_true", help="replace captions that are there")
    add("--batch", type=parse_batch, default=8, help="pictures described together")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--dry-run", action="store_true", help="say how many captions would be written")


def work(
    arguments: argparse.Namespace, events: Emitter, stop: StopRequest
) -> tuple[str, list[str]]:
    """Look at the pictures; judge them, make a dataset of them, or caption them."""
    from tools.dataset import Wishes, find_pictures, judge

    known = vars(arguments)
    wishes = Wishes(**{key: known[key] for key in Wishes.__annotations__ if key in known})
    if arguments.command == "caption":
        return caption(wishes, arguments, events, stop)
    if arguments.command == "build":
        check_places(arguments.source, arguments.target)
    found = find_pictures(arguments.source, wishes, events, stop)
    remarks = judge(found, wishes)
    for sentence in remarks:
        remark(events, sentence)
    if arguments.command == "check":
        return tell(found, remarks, arguments)
    return make(found, wishes, arguments, events, stop)


def caption(
    wishes: Wishes, arguments: argparse.Namespace, events: Emitter, stop: StopRequest
) -> tuple[str, list[str]]:
    """Write captions beside pictures."""
    from tools.captioners import Request
    from tools.captions import Job, caption_folder

    if bool(arguments.captioner) == bool(arguments.captions_from):
        found = "both" if arguments.captioner else "neither"
        raise refuse("--with", "either --with or --captions-from", found)
    if arguments.captioner == "template" and not arguments.template:
        raise refuse("--template", "a caption with places to fill", "nothing")
    known = vars(arguments)
    request = Request(**{key: known[key] for key in Request.__annotations__})
    job = Job.find(arguments.source, wishes, request, events, stop)
    if arguments.dry_run:
        return f"Would write {counted(len(job.wanted), 'caption')}, and keep {job.kept}", []
    return caption_folder(job, events, stop), [str(arguments.source)]


def check_places(source: Path, target: Path) -> None:
    """Refuse a target that would become part of the source, or the other way round."""
    inner, outer = target.resolve(), source.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise refuse(target, "a folder of its own", "one that is part of the other")


def tell(
    found: Sequence[Found], remarks: Sequence[str], arguments: argparse.Namespace
) -> tuple[str, list[str]]:
    """Show what was found to a person, and write it down where that was asked for."""
    flags = Counter(flag for each in found for flag in each.flags)
    if not arguments.events:
        rows = [(each.name, ", ".join(each.flags)) for each in found if each.flags]
        table([("picture", "what to look at"), *rows] if rows else [("Nothing to look at.",)])
    files = []
    if arguments.report:
        report = {"pictures": [each.record() for each in found], "remarks": list(remarks)}
        write_whole(arguments.report, as_json(report))
        files.append(str(arguments.report))
    good = sum(not each.flags for each in found)
    told = ", ".join(f"{count} {flag}" for flag, count in sorted(flags.items()))
    return (
        f"{counted(len(found), 'picture')}, {good} without a remark{'; ' if told else ''}{told}",
        files,
    )


def make(
    found: Sequence[Found],
    wishes: Wishes,
    arguments: argparse.Namespace,
    events: Emitter,
    stop: StopRequest,
) -> tuple[str, list[str]]:
    """Write the dataset, its manifest last of all."""
    from tools.dataset import plan, write_dataset

    manifest = plan(found, wishes)
    counts = manifest["counts"]
    told = f"{counts['train']} to train on, {counts['validation']} to validate with, "
    told += f"{counts['excluded']} left out"
    if arguments.dry_run:
        if not arguments.events:
            table([("picture", "becomes"), *((i["source"], i["file"]) for i in manifest["images"])])
        return f"Would write {told}", []
    target = arguments.target
    check_target(target, manifest)
    write_dataset(arguments.source, target, manifest, wishes, events, stop)
    write_whole(target / "manifest.json", as_json(manifest))
    (target / ".building").unlink(missing_ok=True)
    return f"{target.name}: {told}", [str(target / "manifest.json")]


def check_target(target: Path, manifest: Record) -> None:
    """Refuse a folder that holds what this dataset does not; what was begun is gone on with."""
    there = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    ours = {
        "manifest.json",
        ".building",
        ".captioning",
        "train/metadata.jsonl",
        "validation/metadata.jsonl",
    }
    kinds = ("file", "text_file", "mask_file")
    ours |= {image[kind] for image in manifest["images"] for kind in kinds if image[kind]}
    if foreign := sorted(name for name in there - ours if not name.endswith(".tmp")):
        hint = "Give another folder, or remove this one."
        raise refuse(target, "an empty folder, or this very dataset", foreign[0], hint)
    target.mkdir(parents=True, exist_ok=True)
    write_whole(target / ".building", b"")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    return run(parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
