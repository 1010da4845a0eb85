"""Go the whole way from a folder of pictures to a judged LoRA; what is done is not done again.

python tools/pipeline.py --config pipeline.yaml              do what is not done yet
python tools/pipeline.py --config pipeline.yaml --dry-run    say what that would be, and why
python tools/pipeline.py --keys                              list what the file may hold

The file has an output_path and up to five sections: data, caption, training, generate, evaluate.
Each runs one program, again only when what it reads or is asked for has changed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import glob
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_lora
from tools import evaluate, generate, prepare, prompts
from tools.child import follow
from tools.program import as_json, command_line, refuse, remark, run, table, take_events
from tools.reading import read_file
from train_lora import (
    Emitter,
    ErrorCode,
    Facts,
    Problem,
    Record,
    StopRequest,
    TrainError,
    TrainingConfig,
    write_whole,
)

ROOT = Path(__file__).resolve().parents[1]
STATE = "pipeline.json"
FORMAT, VERSION = "lora-pipeline", 1
AFTER = "a step before it comes first"
# By which options tools/generate.py is told of the base model what the training is.
BASE = {
    "base": "base_model",
    "vae": "vae",
    "model-config": "model_config_path",
    "prediction-type": "prediction_type",
    "zero-terminal-snr": "zero_terminal_snr",
}
UNSAID = (None, "", "auto")
# What a person looks for at the end.
RESULTS = ("dataset/manifest.json", "run/lora_final.safetensors", "grid/grid.json", "eval.json")


class StepFacts(Facts, topic="step"):
    """How a step of the way stands."""

    says = "{name}: {state}"
    name: Annotated[str, "`data`, `caption`, `training`, `generate` or `evaluate`"]
    state: Annotated[str, "what happens, in a few words"]
    number: Annotated[int, "which step, from 1"]
    of: Annotated[int, "steps in all"]


# --- What may stand in the file ---


@dataclass(frozen=True)
class Step:
    """A section of the file, and the program it runs."""

    name: str
    program: str
    whole: Callable[[], argparse.ArgumentParser] | None = None  # all it takes; the trainer: knobs
    asked: Callable[[], argparse.ArgumentParser] | None = None  # what of it the file may say
    follows: Sequence[str] = ()  # what of that follows from the rest of the file
    needs: str | None = None  # the section that has to be there too


def asked_of_data() -> argparse.ArgumentParser:
    """List what a dataset may be made of, and how."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", help="folder with the pictures; it stays as it is")
    prepare.describe_build(parser)
    return parser


def asked_of_captions() -> argparse.ArgumentParser:
    """List who may write captions, and how."""
    parser = argparse.ArgumentParser()
    prepare.describe_caption(parser)
    return parser


DATA = Step("data", "tools/prepare.py", prepare.parser, asked_of_data, ("target",))
CAPTION = Step(
    "caption", "tools/prepare.py", prepare.parser, asked_of_captions, ("source",), "data"
)
TRAINING = Step("training", "train_lora.py")
GENERATE = Step(
    *("generate", "tools/generate.py", generate.parser, generate.parser),
    follows=(*(option.replace("-", "_") for option in BASE), "lora", "out", "fuse"),
    needs="training",
)
EVALUATE = Step(
    *("evaluate", "tools/evaluate.py", evaluate.parser, evaluate.parser),
    follows=("folder", "train", "out"),
    needs="generate",
)
STEPS = (DATA, CAPTION, TRAINING, GENERATE, EVALUATE)
COMMON = ("help", "events", "dry_run", "trigger")  # for no file


def keys_of(step: Step) -> dict[str, argparse.Action]:
    """List the keys of a section: the options of its program, without dashes in front."""
    found = {}
    for action in step.asked()._actions if step.asked else ():  # noqa: SLF001, the only list
        name = (action.option_strings or [action.dest])[-1].lstrip("-").replace("-", "_")
        if name not in (*COMMON, *step.follows):
            found[name] = action
    return found


def list_keys() -> None:
    """Print what the file may hold."""
    rows = [("key", "what it says"), ("output_path", "folder for all that is made")]
    for step in STEPS:
        rows += [(f"{step.name}.{key}", a.help or "") for key, a in keys_of(step).items()]
        if step is TRAINING:
            told = "the knobs of REFERENCE.md; output_path and, with data, dataset_path follow"
            rows.append((f"{step.name}.…", told))
    table(rows)


def put(document: Record, key: str, value: Any) -> None:
    """Override one value, such as training.steps."""
    *path, last = key.split(".")
    place = document
    for part in path:
        inner = place.setdefault(part, {})
        if not isinstance(inner, dict):
            raise refuse(f"--set {key}", "a key inside a section", train_lora.show(inner))
        place = inner
    place[last] = value


def check_document(document: Record) -> None:
    """Refuse what cannot be meant, all of it at once, before anything is done."""
    problems = [*problems_of_sections(document)]
    for step in STEPS if not problems else ():
        known = keys_of(step)
        strange = [key for key in document.get(step.name, ()) if known and key not in known]
        problems += [unknown(key, known, f"{step.name}.") for key in strange]
        if step is DATA and not document.get("data", {"source": 1}).get("source"):
            problems.append(Problem("data.source", "a folder with pictures", "nothing", "Name it."))
    if problems:
        raise TrainError.listing(ErrorCode.CONFIG_INVALID, problems)


def problems_of_sections(document: Record) -> Iterator[Problem]:
    """Check that there is a place for the results, and sections that go together."""
    known = ["output_path", *(step.name for step in STEPS)]
    yield from (unknown(key, known, "") for key in document if key not in known)
    if not isinstance(document.get("output_path"), str) or not document["output_path"]:
        found = train_lora.show(document.get("output_path"))
        yield Problem("output_path", "a folder for all that is made", found, "")
    for step in STEPS:
        section = document.get(step.name, {})
        if not isinstance(section, dict):
            yield Problem(step.name, "keys and values", train_lora.show(section), "")
        if step.name in document and step.needs and step.needs not in document:
            hint = f"Add a section {step.needs}, or remove this one."
            yield Problem(step.name, f"it behind {step.needs}", "it alone", hint)
    if "data" in document and "training" not in document:
        yield Problem("training", "a section with trigger_words", "nothing", "Add it.")


def unknown(key: str, known: Iterable[str], prefix: str) -> Problem:
    """Guess which key was meant."""
    known = [*known]
    likely = difflib.get_close_matches(key.lower().replace("-", "_"), known, n=1, cutoff=0.5)
    hint = f"Did you mean {likely[0]}?" if likely else f"Known are: {', '.join(known)}."
    return Problem(f"{prefix}{key}", "a known key", "an unknown one", hint)


def as_options(step: Step, section: Record) -> list[str]:
    """Write a section as the options of its program."""
    options, known = [], keys_of(step)
    for name, value in section.items():
        path, flag = f"{step.name}.{name}", f"--{name.replace('_', '-')}"
        if name == "prompts":  # they may be more than words, and go through a file
            continue
        if not known[name].option_strings:
            options.append(as_word(path, value))
        elif known[name].nargs == 0:
            if not isinstance(value, bool):
                raise refuse(path, "true or false", train_lora.show(value))
            options += [flag] * value
        else:
            options.append(f"{flag}={as_word(path, value)}")
    return options


def as_word(path: str, value: Any) -> str:
    """Write a value as it stands on a command line; a list has commas."""
    if isinstance(value, list):
        return ",".join(as_word(path, item) for item in value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise refuse(path, "text, a number or a list of them", train_lora.show(value))
    return str(value)


def check_command(step: Step, command: Sequence[str]) -> None:
    """Let the program's own command line check the values."""
    if step.whole is None:
        return
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            step.whole().parse_args(command)
        except SystemExit:
            found = said.getvalue().strip().rpartition("error: ")[2]
            raise refuse(step.name, f"what {step.program} takes", found, "See --keys.") from None


# --- What follows from the file ---


@dataclass
class Plan:
    """The file, and where things of it lie."""

    document: Record
    out: Path
    done: dict[str, Record] = field(default_factory=dict)  # what STATE remembers of each step

    @classmethod
    def of(cls, document: Record) -> Plan:
        """Check all that can be checked before anything is done."""
        check_document(document)
        plan = cls(document, train_lora.expand_home(document["output_path"]))
        if "training" in document:
            plan.config()
        if "generate" in document:
            plan.check_pictures()
        for step in plan.steps:
            check_command(step, plan.command(step))
        with contextlib.suppress(OSError, LookupError, *train_lora.NOT_JSON):
            known = json.loads((plan.out / STATE).read_bytes())
            plan.done = {name: dict(entry) for name, entry in known["steps"].items()}
        return plan

    @property
    def steps(self) -> list[Step]:
        """List the steps in their order."""
        return [step for step in STEPS if step.name in self.document]

    @property
    def dataset(self) -> Path:
        """Tell what is trained on."""
        if "data" in self.document:
            return self.out / "dataset" / "train"
        return train_lora.expand_home(str(self.knobs["dataset_path"]))

    @property
    def heldout(self) -> Path | None:
        """Tell where the pictures are that data held back from training, if it did."""
        place = self.out / "dataset" / "validation"
        return place if "data" in self.document and place.is_dir() else None

    @property
    def knobs(self) -> Record:
        """List the knobs of the training as they count; those of training_params win."""
        said: Record = self.document["training"]
        nested = said.get("training_params")
        return said | (nested if isinstance(nested, dict) else {})

    @property
    def triggers(self) -> list[str]:
        """List the trigger words."""
        return [str(word) for word in self.knobs.get("trigger_words") or ()]

    def training(self) -> Record:
        """Complete the knobs of the training."""
        said = self.knobs
        follows = {"output_path": str(self.out / "run")}
        if "data" in self.document:
            follows["dataset_path"] = str(self.dataset)
            follows |= self.held_back(self.heldout)
        for key in follows.keys() & said.keys():
            raise refuse(f"training.{key}", "nothing: it follows from the rest", said[key])
        return {**self.document["training"], **follows}

    def held_back(self, place: Path | None) -> dict[str, str]:
        """Hand on what data holds back, unless the training says itself what it validates by."""
        own = {"validation_path", "validation_split"} & self.knobs.keys()
        return {"validation_path": str(place)} if place and not own else {}

    def config(self) -> TrainingConfig:
        """Check the knobs of the training by the trainer's own rules."""
        # What data has yet to hold back counts as there: some knobs go with it alone.
        coming = self.out / "dataset" / "validation" if "data" in self.document else None
        try:
            return TrainingConfig.from_record(self.training() | self.held_back(coming))
        except TrainError as error:
            problems = [
                dataclasses.replace(problem, path=f"training.{problem.path}")
                for problem in error.problems
            ]
            raise TrainError.listing(error.code, problems) from error

    def prompts(self) -> list[Record]:
        """List the prompts: texts, objects with a text, or what stands in a file."""
        asked, place = self.document["generate"].get("prompts"), "generate.prompts"
        entries = prompts.read_entries(asked) if isinstance(asked, str) else asked
        if not isinstance(entries, list):
            raise refuse(
                place, "a list of texts, or of objects with a text", train_lora.show(entries)
            )
        return prompts.complete(entries, self.triggers, place)

    def check_pictures(self) -> None:
        """Refuse to draw what cannot be drawn."""
        self.prompts()
        if not self.config().train_lora:
            hint = "Remove this section, or set train_lora to true."
            raise refuse("generate", "a training of a LoRA", "one of a word alone", hint)

    def command(self, step: Step) -> list[str]:
        """Write down how the program of a step is called."""
        triggers = [f"--trigger={word}" for word in self.triggers]
        section, out = self.document[step.name], self.out
        if step is TRAINING:
            return ["--config", str(out / "training.json")]
        options, dataset = as_options(step, section), str(out / "dataset")
        if step is DATA:
            config = self.config()
            sides = [f"--resolution={','.join(map(str, config.sides))}"]
            sides += [] if config.buckets else ["--squares"]
            return ["build", *options, dataset, *sides, *triggers]
        size = [f"--resolution={self.config().side}"]
        if step is CAPTION:
            return ["caption", dataset, *options, *triggers]
        if step is GENERATE:
            places = [f"--lora={out / 'run'}", f"--out={out / 'grid'}"]
            places.append(f"--prompts={out / 'prompts.json'}")
            if {"resolution", "width", "height"} & set(section):
                size = []
            return [*self.base(), *places, *size, *options, *triggers]
        held = self.heldout and not section.get("heldout")
        places = [f"--train={self.dataset}", f"--out={out / 'eval.json'}"]
        places += [f"--heldout={self.heldout}"] if held else []
        return [str(out / "grid"), *places, *options]

    def base(self) -> list[str]:
        """Tell tools/generate.py of the base model what the training is told."""
        said = {option: self.knobs.get(knob) for option, knob in BASE.items()}
        words = {o: str(v).lower() if isinstance(v, bool) else v for o, v in said.items()}
        return [f"--{option}={word}" for option, word in words.items() if word not in UNSAID]

    def write_files(self, step: Step) -> None:
        """Write what the program of a step reads."""
        if step is TRAINING:
            write_whole(self.out / "training.json", as_json(self.training()))
        if step is GENERATE:
            text = json.dumps(self.prompts(), indent=1, ensure_ascii=False)
            write_whole(self.out / "prompts.json", text.encode())

    def reads(self, step: Step) -> list[Path]:
        """List the files and folders that a step reads."""
        out, section = self.out, self.document[step.name]
        knobs = self.knobs
        base = [knobs.get(key) for key in ("base_model", "vae", "model_config_path")]
        given = glob.glob(str(section.get("captions_from", "")))  # noqa: PTH207, absolute ones too
        reads = {
            "data": [section.get("source"), *given],
            "caption": [section.get("model"), *given],
            "training": [
                *(self.dataset, *base, knobs.get("regularization_path")),
                knobs.get("validation_path") or self.heldout,
            ],
            "generate": [out / "run/checkpoints", out / "run/lora_final.safetensors", *base],
            "evaluate": [
                *(out / "grid", self.dataset, section.get("heldout") or self.heldout),
                *(section.get("clip"), section.get("vision")),
            ],
        }
        return [train_lora.expand_home(str(path)) for path in reads[step.name] if path]

    def makes(self, step: Step) -> list[Path]:
        """List the files that a step has made."""
        out, dataset = self.out, self.out / "dataset"
        if step.name in ("data", "caption"):
            ending = ".txt" if step is CAPTION else ""
            files = [p for p in dataset.rglob("*") if p.is_file() and p.name.endswith(ending)]
            return [p for p in files if not p.name.startswith(".")]
        if step is GENERATE:
            return [out / "grid" / "grid.json", *(out / "grid" / "images").rglob("*.png")]
        name = {"training": "run/lora_final.safetensors", "evaluate": "eval.json"}[step.name]
        return [out / name]

    def inputs(self, step: Step) -> str:
        """Sum up what a step is asked for and what it reads."""
        asked: list[Any] = [self.document[step.name], self.command(step)]
        if step is TRAINING:
            asked.append(self.training())
        if step is GENERATE:
            asked.append(self.prompts())
        if step is CAPTION:  # it changes what it reads, which so tells nothing
            asked.append(self.done.get("data", {}).get("inputs"))
        return train_lora.digest_of([*asked, *map(contents, self.reads(step))], 12)

    def reason(self, step: Step) -> str | None:
        """Say why a step has to be done; none where it need not be."""
        known = self.done.get(step.name)
        if known is None:
            return "it was never done"
        if known["inputs"] != self.inputs(step):
            return "what it reads or is asked for has changed"
        if known.get("outputs") is None:
            return "it was not finished"
        missing = [name for name in known["outputs"] if not (self.out / name).is_file()]
        return f"{missing[0]} is missing" if missing else None

    def remember(self, step: Step, inputs: str, outputs: list[Path] | None) -> None:
        """Note what a step began with, and in the end what it made."""
        names = None
        if outputs is not None:
            names = sorted(path.relative_to(self.out).as_posix() for path in outputs)
        self.done[step.name] = {"inputs": inputs, "outputs": names}
        known = {"format": FORMAT, "version": VERSION, "steps": self.done}
        write_whole(self.out / STATE, as_json(known))


def contents(path: Path) -> Any:
    """Tell a file or a folder by what is in it; an id of a model by itself."""
    if path.is_file():
        return train_lora.sampled_digest(path)
    if not path.is_dir():
        return str(path)
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            told = [file.relative_to(path).as_posix(), train_lora.sampled_digest(file)]
            found.update(json.dumps(told).encode())
    return found.hexdigest()


# --- Going the way ---


@dataclass
class Walk:
    """One start: which steps are made anew, and who is told."""

    plan: Plan
    begin: str | None  # the first step to be made anew
    events: Emitter
    stop: StopRequest
    anew: bool = False

    def go(self, *, dry: bool) -> tuple[str, list[str]]:
        """Do the steps that have to be done; return what the last one said, and the results."""
        plan, told = self.plan, "Nothing to do: all is done"
        would: list[str] = []
        for step in plan.steps:
            self.stop.check()
            self.anew = self.anew or step.name == self.begin
            reason = self.reason(step, AFTER if would else None)
            if not reason:
                self.tell(step, "done already")
            elif dry:
                would.append(step.name)
                self.tell(step, f"would run, as {reason}")
            else:
                self.tell(step, f"runs, as {reason}")
                told = self.do(step)
                self.tell(step, told)
        if dry:
            return f"Would run: {', '.join(would) or 'nothing'}", []
        return told, [str(plan.out / name) for name in RESULTS if (plan.out / name).exists()]

    def reason(self, step: Step, waits: str | None) -> str | None:
        """Say why a step is done; of what waits for another, the files are yet to come."""
        if self.anew:
            return "it was asked for"
        return waits or self.plan.reason(step)

    def tell(self, step: Step, state: str) -> None:
        """Say how a step stands."""
        number, of = self.plan.steps.index(step) + 1, len(self.plan.steps)
        self.events.emit(StepFacts(name=step.name, state=state, number=number, of=of))

    def do(self, step: Step) -> str:
        """Do one step, and note that it is done; return what it said."""
        plan, inputs = self.plan, self.plan.inputs(step)
        known = plan.done.get(step.name, {})
        begun = known.get("inputs") == inputs and known["outputs"] is None
        if self.anew or (step is DATA and not begun):
            self.set_aside(step)
        if step is DATA:  # the new dataset has none of the captions written into the former one
            plan.done.pop(CAPTION.name, None)
        plan.remember(step, inputs, None)
        plan.write_files(step)
        command = [str(ROOT / step.program), *plan.command(step)]
        command += ["--events"] if step.whole else []
        if self.anew and step is CAPTION:
            command.append("--overwrite")
        try:
            told = follow(step.name, command, self.events, self.stop)
        except TrainError as error:
            if error.code not in (ErrorCode.RUN_CHANGED, ErrorCode.RUN_EXISTS):
                raise
            # The trainer alone knows what goes on with an earlier run, such as more steps.
            told = follow(step.name, [*command, "--fresh"], self.events, self.stop)
        plan.remember(step, inputs, plan.makes(step))
        return told

    def set_aside(self, step: Step) -> None:
        """Keep what an earlier start made, under another name."""
        folder = {"data": "dataset", "training": "run", "generate": "grid"}.get(step.name)
        if not folder or not (self.plan.out / folder).exists():
            return
        target = train_lora.free_name(self.plan.out / f"{folder}_earlier")
        (self.plan.out / folder).rename(target)
        remark(self.events, f"What was in {folder} is in {target.name} now")


# --- The program ---


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    whole = command_line(__doc__)
    names, add = [step.name for step in STEPS], whole.add_argument
    add("--config", type=Path, metavar="FILE", help="YAML or JSON")
    add("--set", type=train_lora.parse_override, action="append", default=[], metavar="KEY=JSON")
    add("--from", dest="begin", choices=names, help="do this step and those behind it anew")
    add("--dry-run", action="store_true", help="say what would be done, and why")
    add("--keys", action="store_true", help="list what the file may hold")
    take_events(whole)
    return whole


def work(
    arguments: argparse.Namespace, events: Emitter, stop: StopRequest
) -> tuple[str, list[str]]:
    """Go the way."""
    if arguments.keys:
        list_keys()
        return "That is all", []
    if not arguments.config:
        raise refuse("--config", "a file in YAML or JSON", "nothing")
    document = read_file(arguments.config)
    for key, value in arguments.set:
        put(document, key, value)
    plan = Plan.of(document)
    if arguments.begin and arguments.begin not in document:
        raise refuse("--from", "a section of the file", arguments.begin)
    walk = Walk(plan, arguments.begin, events, stop)
    if arguments.dry_run:
        return walk.go(dry=True)
    with train_lora.claimed(plan.out):
        return walk.go(dry=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    return run(parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
