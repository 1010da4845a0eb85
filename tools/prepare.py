"""Judge a folder of pictures, and make a dataset of it. What is in the folder stays as it is.

python tools/prepare.py check SRC                        what is good, what is doubtful, and why
python tools/prepare.py build SRC DST --trigger zkb      train and validation folders with captions
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.program import as_json, command_line, refuse, remark, run, table, take_events
from train_lora import Emitter, Record, StopRequest, write_whole

if TYPE_CHECKING:
    from tools.dataset import Found, Wishes

DROPS = ("exact", "near", "small", "broken")


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


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    whole = command_line(__doc__)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="judge the pictures and their captions")
    build = commands.add_parser("build", help="make folders to train on and to validate with")
    for command in (check, build):
        command.add_argument("source", type=Path, metavar="SRC")
        command.add_argument("--resolution", type=int, default=512, help="of the training")
        command.add_argument("--trigger", action="append", default=[], help="a trigger word")
        take_events(command)
    check.add_argument("--report", type=Path, help="also write all of it as JSON")
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
    add("--captions-from", metavar="FILE", help="JSON of another program, or a pattern: the newest")
    add("--image-key", default="image", help="where a picture's name stands in it, as a.b.c")
    add("--caption-key", default="caption", help="where its caption stands in it")
    add("--validation", type=parse_share, default=0.1, help="share that is held back")
    add("--seed", type=int, default=0, help="chooses which ones are held back")
    add("--dry-run", action="store_true", help="say what would be done, write nothing")
    return whole


def work(
    arguments: argparse.Namespace, events: Emitter, stop: StopRequest
) -> tuple[str, list[str]]:
    """Look at the pictures; judge them, or make a dataset of them."""
    from tools.dataset import Wishes, find_pictures, judge

    wishes = Wishes(**{k: v for k, v in vars(arguments).items() if k in Wishes.__annotations__})
    if arguments.command == "build":
        check_places(arguments.source, arguments.target)
    found = find_pictures(arguments.source, wishes, events, stop)
    remarks = judge(found, wishes)
    for sentence in remarks:
        remark(events, sentence)
    if arguments.command == "check":
        return tell(found, remarks, arguments)
    return make(found, wishes, arguments, events, stop)


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
    return f"{len(found)} pictures, {good} without a remark{'; ' if told else ''}{told}", files


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
    ours = {"manifest.json", ".building", "train/metadata.jsonl", "validation/metadata.jsonl"}
    ours |= {name for image in manifest["images"] for name in (image["file"], image["text_file"])}
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
