"""Look into LoRA files, and make others of them: exact where sums and ranks are concerned.

python tools/lora.py info FILE…                          what is in them
python tools/lora.py convert FILE OUT --to diffusers     the same LoRA for another kind of reader
python tools/lora.py merge OUT FILE=0.7 FILE=-0.4        one LoRA that acts as all of them together
python tools/lora.py resize FILE OUT --rank 8            the nearest one of fewer directions
python tools/lora.py extract BASE TUNED OUT --rank 32    what turns one model into another
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.program import command_line, refuse, run, table, take_events
from train_lora import PICKLES, Emitter, Phase, StopRequest, choose_device, counted

if TYPE_CHECKING:
    import torch

    from tools.lora_file import LoRA

MOST_RANK = 1280  # no layer of a family's denoiser has more directions on its narrow side
PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def parse_term(text: str) -> tuple[Path, float]:
    """Read FILE=STRENGTH."""
    name, equals, strength = text.rpartition("=")
    try:
        return (Path(name), float(strength)) if equals else (Path(text), 1.0)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected FILE=STRENGTH, got {text!r}") from error


def parse_rank(text: str) -> int:
    """Read a number of directions."""
    rank = int(text)
    if not 0 < rank <= MOST_RANK:
        raise argparse.ArgumentTypeError(f"expected 1 to {MOST_RANK}, got {text}")
    return rank


def parse_energy(text: str) -> float:
    """Read a share above 0 and up to 1."""
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0, at most 1, got {text}")
    return share


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    whole = command_line(__doc__)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="say what is in LoRA files")
    info.add_argument("files", nargs="+", type=Path, metavar="FILE")
    convert = commands.add_parser("convert", help="name it for another kind of reader")
    merge = commands.add_parser("merge", help="add LoRAs up, each with its strength")
    resize = commands.add_parser("resize", help="reduce the rank")
    merge.add_argument("out", type=Path)
    merge.add_argument("terms", nargs="+", type=parse_term, metavar="FILE=STRENGTH")
    extract = commands.add_parser("extract", help="find the LoRA between two models")
    extract.add_argument("base", metavar="BASE", help="a folder, a file or an id")
    extract.add_argument("tuned", metavar="TUNED", help="what was made of it")
    for command in (convert, resize):
        command.add_argument("file", type=Path, metavar="FILE")
    for command in (convert, resize, extract):
        command.add_argument("out", type=Path)
    for command in (merge, resize, extract):
        amount = command.add_mutually_exclusive_group(required=command is not merge)
        amount.add_argument("--rank", type=parse_rank, help="directions kept in each module")
        amount.add_argument("--energy", type=parse_energy, help="share of the square kept in each")
    extract.add_argument(
        "--conv-rank", type=parse_rank, help="of convolutions; --rank unless given"
    )
    extract.add_argument("--text-encoder", choices=("auto", "no"), default="auto")
    extract.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    for command in (convert, merge, resize, extract):
        command.add_argument("--to", choices=("kohya", "diffusers"), default="kohya", help="names")
        command.add_argument("--dtype", choices=list(PRECISIONS), help="of the numbers")
        command.add_argument("--overwrite", action="store_true", help="replace OUT")
        command.add_argument("--dry-run", action="store_true", help="say what would be written")
    for command in (info, convert, merge, resize, extract):
        take_events(command)
    return whole


def work(
    arguments: argparse.Namespace, events: Emitter, stop: StopRequest
) -> tuple[str, list[str]]:
    """Do one of the commands; return what was done and the files."""
    from tools.lora_file import merge, read_lora, reduce_rank

    if arguments.command == "info":
        for file in arguments.files:
            stop.check()
            describe(read_lora(file), arguments)
        return f"{counted(len(arguments.files), 'LoRA')} read", []
    if arguments.out.suffix in PICKLES:
        raise refuse(arguments.out, "a name for safetensors", "one for a pickle")
    if arguments.out.exists() and not arguments.overwrite:
        raise refuse(arguments.out, "a new name", "something that is there", "Or use --overwrite.")
    if arguments.command == "extract":
        return extract(arguments, events, stop)
    terms = getattr(arguments, "terms", None) or [(arguments.file, 1.0)]
    loras = []
    for file, strength in terms:
        stop.check()
        loras.append((read_lora(file), strength))
    lora = merge(loras) if arguments.command == "merge" else loras[0][0]
    if arguments.command != "convert" and (arguments.rank or arguments.energy):
        phase = Phase("reducing ranks", len(lora.layers), events, stop)
        lora = reduce_rank(lora, arguments.rank, arguments.energy, phase)
    return write(lora, loras[0][0].dtype, arguments)


def extract(
    arguments: argparse.Namespace, events: Emitter, stop: StopRequest
) -> tuple[str, list[str]]:
    """Find what turns one model into another, and say how much of it a LoRA can hold."""
    import torch

    from tools import extraction
    from tools.base_model import ask_for

    asked = extraction.Wanted(
        rank=arguments.rank,
        conv_rank=arguments.conv_rank,
        energy=arguments.energy,
        text_encoders=arguments.text_encoder == "auto",
        naming=arguments.to,
        device=str(choose_device(ask_for(arguments.base, device=arguments.device))),
    )
    names = (arguments.base, arguments.tuned)
    if arguments.dry_run:
        base, _ = extraction.find_both(names, events)
        return f"Would compare two {base.family.title} models", []
    lora, found = extraction.extract(names, asked, events, stop)
    lora = replace(lora, header={**lora.header, "ss_output_name": arguments.out.stem})
    summary, files = write(lora, torch.float16, arguments)
    return f"{summary}; {found.summary}", files


def write(lora: LoRA, dtype: torch.dtype, arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """Write the result, and say what it is."""
    import torch

    from tools.lora_file import write_lora

    dtype = getattr(torch, PRECISIONS[arguments.dtype]) if arguments.dtype else dtype
    ranks = sorted({layer.rank for layer in lora.layers.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    told = f"{arguments.out.name}: {counted(len(lora.layers), 'module')}, {rank}"
    if arguments.dry_run:
        return f"Would write {told}", []
    off = write_lora(arguments.out, lora, arguments.to, dtype)
    return f"{told}, {off:.1e} off", [str(arguments.out)]


def describe(lora: LoRA, arguments: argparse.Namespace) -> None:
    """Print what a person wants to know of a file."""
    if arguments.events:
        return
    sys.stdout.write(f"\n{lora.source}: {lora.naming} names, {str(lora.dtype)[6:]}\n")
    rows: list[Sequence[object]] = [("network", "modules", "rank", "strength", "adds")]
    for network in lora.networks:
        layers = [layer for module, layer in lora.layers.items() if module.network == network]
        length = sum(layer.norm() ** 2 for layer in layers) ** 0.5
        ranks, scales = span(la.rank for la in layers), span(la.scale for la in layers)
        rows.append((network, len(layers), ranks, scales, f"{length:.3g}"))
    table(rows)
    for key in ("ss_output_name", "modelspec.title", "ss_base_model_version", "ss_steps"):
        if key in lora.header:
            sys.stdout.write(f"{key}: {lora.header[key][:200]}\n")
    if len({layer.scale * layer.rank for layer in lora.layers.values()}) > 1:
        sys.stdout.write("Its alphas differ: diffusers applies it wrongly; convert it.\n")


def span(values: Iterable[float]) -> str:
    """Say one value, or from which to which."""
    found = sorted(set(values))
    return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} … {found[-1]:g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    return run(parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
