"""What a request becomes: a folder with all that a program needs, its command line, and a row.

The folder comes first and the row last, so that nothing is started that is not whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from studio import captions, datasets, webhook
from studio.preflight import TOPICS, ask_trainer
from studio.problems import Problem, invalid, problem_at, problem_of, sentence, show
from studio.security import audit, confine, confine_config, knobs_of
from studio.status import job_of
from studio.store import FINAL, Job, StateConflict, new_id, utc

if TYPE_CHECKING:
    from starlette.datastructures import State

    from studio.settings import Settings

Record = dict[str, Any]

LOCKS = [threading.Lock() for _ in range(64)]  # requests of one idempotency key wait for each other
FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*\ud800-\udfff]')
MOST_PICTURES = 10_000


def plain(text: str) -> str:
    """Refuse what would break a line, or is blank."""
    if not text.strip() or not text.isprintable():
        raise ValueError("one line of printable characters")
    return text


Words = Annotated[str, Field(min_length=1, max_length=1_000), AfterValidator(plain)]
Name = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(plain)]


class Wanted(BaseModel):
    """What all requests for a job may say."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Name | None = None
    priority: int = Field(default=0, ge=-100, le=100)
    notify_url: str | None = Field(
        default=None, description="told of every change of the job's state"
    )


class Training(Wanted):
    """Train a LoRA."""

    config: Record = Field(description="what config_schema.json describes, without output_path")
    dataset: Name | None = Field(
        default=None, description="a dataset of the studio, instead of a path"
    )
    engine: str = Field(default="local", description="where it is to run, as engines.json names it")


class Captioning(Wanted):
    """Write captions beside the pictures of a dataset."""

    dataset: Name
    captioner: Literal["template", "florence2", "blip", "vlm", "tagger"]
    model: Words | None = None
    task: Literal["caption", "detailed", "more_detailed", "tags"] | None = None
    prompt: Words | None = None
    template: Words | None = Field(
        default=None, description="with {trigger}, {caption}, {label}, {name}"
    )
    threshold: float | None = Field(default=None, ge=0, le=1)
    exclude: list[Words] = Field(default=[], max_length=1_000)
    prefix: Words | None = Field(default=None, description="the trigger word")
    overwrite: bool = False


class Preparing(Wanted):
    """Judge the pictures and captions of a dataset."""

    dataset: Name
    resolution: int = Field(default=512, ge=64, le=4096)
    trigger_words: list[Words] = Field(default=[], max_length=32)


class Drawing(Wanted):
    """Draw checkpoints × prompts × seeds × strengths."""

    job_id: str = Field(description="the training")
    checkpoints: list[str] | None = Field(
        default=None, max_length=1_000, description="all unless given"
    )
    prompts: list[Words] = Field(min_length=1, max_length=1_000)
    seeds: list[Annotated[int, Field(ge=0, le=2**32 - 1)]] = Field(default=[0], min_length=1)
    scales: list[Annotated[float, Field(ge=-5, le=5)]] = Field(default=[1.0], min_length=1)
    steps: int | None = Field(default=None, ge=1, le=1_000)
    guidance: float | None = Field(default=None, ge=0, le=50)
    negative: Words | None = None
    resolution: int | None = Field(default=None, ge=64, le=4096)


class Judging(Drawing):
    """Draw, and judge what was drawn against what was trained on."""

    clip: Words | None = None
    vision: Words | None = None
    class_word: Words | None = None


@dataclass(frozen=True)
class Order:
    """What is to be run for a job."""

    kind: str
    name: str
    config: Record
    commands: list[list[str]]
    slots: int = 1
    parent: str | None = None
    engine: str = "local"


# --- Submitting ---


def submit(studio: State, wanted: Wanted, key: str | None = None) -> tuple[Job, bool]:
    """Make a job of a request; a request that is sent again gets the job it has, and False."""
    refuse_at_the_end(studio)
    webhook.check(studio.settings, wanted.notify_url)
    digest = fingerprint(wanted)
    with LOCKS[hash(key) % len(LOCKS)] if key else contextlib.nullcontext():
        earlier = studio.store.job_with_key(key) if key else None
        if earlier is None:
            job = place(studio, wanted, key, digest)
            announce(studio)
            return job, True
    if earlier.request_hash != digest:
        detail = f"The Idempotency-Key {show(key)} belongs to another request."
        raise Problem(422, "idempotency_key_reused", detail)
    return earlier, False


def refuse_at_the_end(studio: State) -> None:
    """Begin nothing while the service ends."""
    if studio.hub.closing:
        raise Problem(503, "shutting_down", "The studio is about to end.")


def announce(studio: State) -> None:
    """Have a change looked at now, rather than at the next turn."""
    studio.reconciler.wake()
    studio.hub.changed()


def fingerprint(wanted: Wanted) -> str:
    """Sum up a request, to know it again."""
    said = [type(wanted).__name__, wanted.model_dump()]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def place(studio: State, wanted: Wanted, key: str | None, digest: str) -> Job:
    """Make the folder of a job, and then its row."""
    job_id = new_id()
    folder = studio.settings.job(job_id)
    with making(folder):
        order = PLANS[type(wanted)](studio, wanted, folder)
        (folder / "output").mkdir()
        write_json(folder / "request.json", wanted.model_dump(mode="json"))
        write_json(folder / "config.json", order.config)
        write_json(folder / "command.json", {"argv": argv_of(studio.settings, order.commands)})
        job = Job(
            id=job_id,
            kind=order.kind,
            name=wanted.name or order.name,
            config=order.config,
            slots=order.slots,
            priority=wanted.priority,
            parent=order.parent,
            engine=order.engine,
            idempotency_key=key,
            request_hash=digest,
            notify_url=wanted.notify_url,
        )
        kept: Job = studio.store.insert(job)
        return kept


@contextlib.contextmanager
def making(folder: Path) -> Iterator[None]:
    """Make a job's folder, and leave nothing of it where that fails."""
    try:
        folder.mkdir()
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if is_full(error):
            raise Problem(507, "disk_full", "The disk of the studio is full.") from error
        raise


def is_full(error: BaseException) -> bool:
    """Tell whether a disk is full, or a share of it used up."""
    if isinstance(error, sqlite3.OperationalError):
        return error.sqlite_errorcode == sqlite3.SQLITE_FULL
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def write_json(path: Path, document: object) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def argv_of(settings: Settings, commands: list[list[str]]) -> list[str]:
    """Write one command line; several programs go one after another."""
    whole = [[settings.python, str(settings.repository / each[0]), *each[1:]] for each in commands]
    if len(whole) == 1:
        return whole[0]
    chain = str(Path(__file__).with_name("chain.py"))
    return [settings.python, chain, json.dumps(whole)]


def sweep(settings: Settings) -> None:
    """Put away the folders of jobs that the service was killed in the middle of making."""
    for folder in settings.jobs.glob("*"):
        if len(folder.name) == len(new_id()) and not (folder / "command.json").exists():
            put_away(settings, folder)


def put_away(settings: Settings, folder: Path) -> None:
    """Move a folder to the trash."""
    folder.rename(settings.trash / f"{utc().replace(':', '-')} {folder.name}")


# --- Training ---


def plan_training(studio: State, wanted: Training, folder: Path) -> Order:
    """Check a config by the trainer's own rules, and keep the dataset as it is."""
    settings = studio.settings
    if wanted.engine not in studio.engines:
        raise invalid(problem_at("engine", "one of " + ", ".join(studio.engines), wanted.engine))
    config = ready(settings, wanted.config, wanted.dataset, folder)
    if wanted.dataset:
        refuse_while_captioning(studio, wanted.dataset, "dataset_changing")
    name = wanted.name or wanted.dataset or Path(str(config.get("dataset_path", "LoRA"))).name
    config = named(config, name)
    check_config(settings, config)
    if wanted.dataset:
        datasets.snapshot(settings, wanted.dataset, folder / "dataset")
        config["dataset_path"] = str(folder / "dataset")
    command = ["train_lora.py", f"--config={folder / 'config.json'}"]
    return Order("train", name, config, [command], engine=wanted.engine)


def ready(
    settings: Settings, config: Mapping[str, Any], dataset: str | None, folder: Path
) -> Record:
    """Complete a config with the places that the studio chooses; refuse those it does not allow."""
    found = confine_config(settings, config)
    if dataset is not None:
        if "dataset_path" in config:
            problem = problem_at("dataset_path", "nothing beside dataset", config["dataset_path"])
            raise invalid(problem, code="config_invalid")
        found["dataset_path"] = str(datasets.folder_of(settings, dataset))
    return found | {"output_path": str(folder / "output")}


def named(config: Record, name: str) -> Record:
    """Call the LoRA as the job: its folder's name, the trainer's default, says nothing here."""
    nested = config.get("training_params")
    said = config.get("lora_name") or (isinstance(nested, dict) and nested.get("lora_name"))
    fit = FORBIDDEN.sub("_", name).strip(". ")[:100].rstrip(". ")
    return config if said or not fit else config | {"lora_name": fit}


def check_config(settings: Settings, config: Record) -> None:
    """Refuse what the trainer would refuse, in its own words."""
    answer = ask_trainer(settings, config)
    if not answer["valid"]:
        problems = answer["problems"]
        detail = sentence(problems) if problems else answer["message"]
        raise Problem(422, answer["code"] or "config_invalid", detail, problems)


def preflight(studio: State, config: Mapping[str, Any], dataset: str | None = None) -> Record:
    """Tell what the trainer thinks of a config that is not submitted yet."""
    refuse_at_the_end(studio)
    folder = studio.settings.job(new_id())  # where nothing is, and nothing comes to be
    try:
        return ask_trainer(studio.settings, ready(studio.settings, config, dataset, folder))
    except Problem as problem:
        if problem.status != 422:
            raise
        nothing = dict.fromkeys(("report", *TOPICS))
        told = {"code": problem.code, "message": problem.detail, "hint": None}
        return {"valid": False, "warnings": [], "problems": problem.problems, **told, **nothing}


def refuse_while_captioning(studio: State, dataset: str, code: str) -> None:
    """Refuse to use a dataset whose captions a job is about to change."""
    waiting = [*studio.store.active(), *studio.store.queue()]
    for job in waiting:
        if job.kind == "caption" and job.config.get("dataset") == dataset:
            detail = f"{job.name} ({job.id}) is about to change this dataset. Wait for it."
            raise Problem(409, code, detail)


# --- The tools ---


def plan_captions(studio: State, wanted: Captioning, folder: Path) -> Order:  # noqa: ARG001
    """Write captions into a dataset; how they were is kept."""
    settings = studio.settings
    place = datasets.folder_of(settings, wanted.dataset)
    refuse_while_captioning(studio, wanted.dataset, "in_use")
    captions.remember_all(place, "Captions by a program")
    said = {
        "with": wanted.captioner,
        "model": wanted.model and confine(settings, "model", wanted.model),
        "task": wanted.task,
        "prompt": wanted.prompt,
        "template": wanted.template,
        "threshold": wanted.threshold,
        "exclude": ",".join(wanted.exclude) or None,
        "trigger": wanted.prefix,
    }
    command = ["tools/prepare.py", "caption", str(place), *options(said), "--events"]
    if wanted.overwrite:
        command.append("--overwrite")
    slots = 0 if wanted.captioner == "template" else 1
    name = f"Captions of {wanted.dataset}"
    return Order("caption", name, wanted.model_dump(mode="json"), [command], slots)


def options(said: Mapping[str, object]) -> list[str]:
    """Write options in one word each: a value that begins with a dash is none of its own."""
    return [f"--{name}={value}" for name, value in said.items() if value is not None]


def plan_check(studio: State, wanted: Preparing, folder: Path) -> Order:
    """Judge a dataset."""
    place = datasets.folder_of(studio.settings, wanted.dataset)
    said = {"resolution": wanted.resolution, "report": folder / "output" / "report.json"}
    triggers = [f"--trigger={word}" for word in wanted.trigger_words]
    command = ["tools/prepare.py", "check", str(place), *options(said), *triggers, "--events"]
    name = f"Check of {wanted.dataset}"
    return Order("prepare", name, wanted.model_dump(mode="json"), [command], slots=0)


def plan_drawing(studio: State, wanted: Drawing, folder: Path) -> Order:
    """Draw what the LoRAs of a training do."""
    parent = training_of(studio, wanted.job_id)
    files = chosen(studio.settings.job(parent.id), wanted.checkpoints)
    seeds, scales = dict.fromkeys(wanted.seeds), dict.fromkeys(wanted.scales)
    pictures = (len(files) * len(scales) + 1) * len(wanted.prompts) * len(seeds)
    if pictures > MOST_PICTURES:
        most = f"at most {MOST_PICTURES:,} pictures"
        raise invalid(problem_at("prompts", most, f"{pictures:,}"))
    write_json(folder / "prompts.json", wanted.prompts)
    said = {
        "base": parent.config["base_model"],
        "vae": knob(studio.settings, parent.config, "vae"),
        "model-config": knob(studio.settings, parent.config, "model_config_path"),
        "prompts": folder / "prompts.json",
        "seeds": ",".join(map(str, seeds)),
        "strengths": ",".join(map(str, scales)),
        "steps": wanted.steps,
        "guidance": wanted.guidance,
        "negative": wanted.negative,
        "resolution": wanted.resolution or side_of(studio.settings, parent.config),
        "out": folder / "output",
    }
    loras = [f"--lora={file}" for file in files]
    triggers = [f"--trigger={word}" for word in parent.config.get("trigger_words", [])]
    command = ["tools/generate.py", *options(said), *loras, *triggers, "--events"]
    config, name = wanted.model_dump(mode="json"), f"Pictures of {parent.name}"
    return Order("generate", name, config, [command], parent=parent.id)


def side_of(settings: Settings, config: Record) -> Any:
    """Return how large pictures of a training are drawn: of several sizes, the largest."""
    sides = knob(settings, config, "resolution")
    return max(sides) if isinstance(sides, list) else sides


def plan_judging(studio: State, wanted: Judging, folder: Path) -> Order:
    """Draw, and judge that."""
    drawing, settings = plan_drawing(studio, wanted, folder), studio.settings
    parent = training_of(studio, wanted.job_id)
    said = {
        "train": parent.config["dataset_path"],
        "clip": wanted.clip and confine(settings, "clip", wanted.clip),
        "vision": wanted.vision and confine(settings, "vision", wanted.vision),
        "class-word": wanted.class_word,
        "device": device_of(studio),
    }
    command = ["tools/evaluate.py", str(folder / "output"), *options(said), "--events"]
    name = f"Evaluation of {parent.name}"
    return Order("evaluate", name, drawing.config, [*drawing.commands, command], parent=parent.id)


def device_of(studio: State) -> str:
    """Name the kind of device that the slots are, for a tool that does not choose by itself."""
    kind = studio.reconciler.slots[0].id.partition(":")[0]
    return kind if kind in ("cpu", "mps") else "cuda"


def training_of(studio: State, job_id: str) -> Job:
    """Find a training."""
    job = job_of(studio.store, job_id)
    if job.kind != "train":
        raise invalid(problem_at("job_id", "a training", job.kind))
    return job


def chosen(folder: Path, names: list[str] | None) -> list[Path]:
    """Find the LoRA files of a training that are meant."""
    output = folder / "output"
    found = [*output.glob("checkpoints/*.safetensors"), *output.glob("*.safetensors")]
    there = {path.name: path for path in sorted(found)}
    if not there:
        raise Problem(409, "no_checkpoint", "This training has no LoRA yet.")
    for number, name in enumerate(names or []):
        if name not in there:
            expected = "one of " + ", ".join(there)
            raise invalid(problem_at(f"checkpoints.{number}", expected, name))
    return [there[name] for name in dict.fromkeys(names or there)]


def knob(settings: Settings, config: Record, name: str) -> Any:
    """Return what a config says of a knob, or what that is by default."""
    nested = config.get("training_params") or {}
    default = knobs_of(settings.repository)[name].get("default")
    return nested.get(name, config.get(name, default))


PLANS: dict[type[Wanted], Callable[[State, Any, Path], Order]] = {
    Training: plan_training,
    Captioning: plan_captions,
    Preparing: plan_check,
    Drawing: plan_drawing,
    Judging: plan_judging,
}


def begin(studio: State, kind: type[Wanted], said: Mapping[str, Any]) -> Job:
    """Make a job of what a form says, as strictly as of JSON."""
    try:
        wanted = kind(**said)
    except ValidationError as error:
        found = ({**each, "loc": ("form", *each["loc"])} for each in error.errors())
        raise invalid(*map(problem_of, found)) from error
    return submit(studio, wanted)[0]


# --- What becomes of a job later ---


def stop(studio: State, job_id: str, attempt: int | None = None) -> Job:
    """Ask a job to save and end; where an attempt is named, that one only."""
    job = job_of(studio.store, job_id)
    if job.state in FINAL:
        raise Problem(409, "already_final", f"This job is {job.state}.")
    attempts = studio.store.attempts(job_id)
    if attempt is not None and (not attempts or attempts[-1].n != attempt):
        last = attempts[-1].n if attempts else 0
        detail = f"Attempt {attempt} is over or was never; the last is {last}."
        raise Problem(409, "attempt_superseded", detail)
    asked: Job = studio.store.request_stop(job_id)
    audit.info("job %s is asked to stop", job_id)
    announce(studio)
    return asked


def resume(studio: State, job_id: str, changes: Mapping[str, Any] | None = None) -> Job:
    """Queue a job that has ended once more, perhaps with other values where those may change."""
    job = job_of(studio.store, job_id)
    if job.state == "completed" and not changes:
        raise Problem(409, "not_resumable", "This job is complete. Give it more steps.")
    if not changes:
        return requeue(studio, job, None)
    config = changed_config(studio.settings, job, changes)
    check_config(studio.settings, config)
    with replaced_config(studio, job, config):
        return requeue(studio, job, config)


def requeue(studio: State, job: Job, config: Record | None) -> Job:
    """Queue a job again."""
    try:
        queued: Job = studio.store.resume(job.id, config)
    except StateConflict as error:
        raise Problem(409, "not_resumable", f"This job is {job.state}.") from error
    announce(studio)
    return queued


def changed_config(settings: Settings, job: Job, changes: Mapping[str, Any]) -> Record:
    """Change a training's config where that makes no other run of it."""
    knobs = knobs_of(settings.repository)
    free = {
        name
        for name, each in knobs.items()
        if job.kind == "train" and "default" in each and not each.get("x-fixed")
        if each.get("format") != "path"
    }
    if wrong := [name for name in changes if name not in free]:
        expected = "a knob that may change: " + (", ".join(sorted(free)) or "none of this job")
        problems = [problem_at(name, expected, changes[name]) for name in wrong]
        raise invalid(*problems, code="config_invalid")
    config = job.config | dict(changes)
    if isinstance(config.get("training_params"), dict):
        nested = config["training_params"]
        config["training_params"] = {k: v for k, v in nested.items() if k not in changes}
    return config


@contextlib.contextmanager
def replaced_config(studio: State, job: Job, config: Record) -> Iterator[None]:
    """Write a job's config anew; the earlier one comes back where the row is not changed."""
    if job.state not in FINAL:
        raise Problem(409, "not_resumable", f"This job is {job.state}.")
    path = studio.settings.job(job.id) / "config.json"
    write_json(path, config)
    try:
        yield
    except BaseException:
        write_json(path, job.config)
        raise


def change(studio: State, job_id: str, name: str | None = None, priority: int | None = None) -> Job:
    """Give a job another name or place in the queue."""
    job = job_of(studio.store, job_id)
    changes = {"name": name, "priority": priority}
    given = {key: value for key, value in changes.items() if value is not None}
    changed: Job = studio.store.change(job_id, **given) if given else job
    announce(studio)
    return changed


def delete(studio: State, job_id: str, files: str = "trash") -> None:
    """Forget a job that has ended; its files go to the trash, or stay where they are."""
    job, settings = job_of(studio.store, job_id), studio.settings
    if job.state not in FINAL:
        raise Problem(409, "not_final", f"This job is {job.state}. Stop it first.")
    if files == "trash" and settings.job(job_id).exists():
        put_away(settings, settings.job(job_id))
    studio.store.delete(job_id)
    audit.info("job %s was deleted", job_id)
    studio.hub.forget(job_id)


def ask(
    studio: State,
    job_id: str,
    *,
    preview: bool = False,
    checkpoint: bool = False,
    sample_prompts: list[str] | None = None,
) -> Job:
    """Ask a training under way for a picture or a checkpoint, as its contract has it."""
    job = job_of(studio.store, job_id)
    if job.kind != "train" or job.state != "running":
        raise Problem(409, "not_running", f"This is no training under way: it is {job.state}.")
    asked: Record = {"preview": True} if preview else {}
    asked |= {"checkpoint": True} if checkpoint else {}
    asked |= {"sample_prompts": sample_prompts} if sample_prompts else {}
    write_json(studio.settings.job(job_id) / "output" / "request.json", asked)
    return job
