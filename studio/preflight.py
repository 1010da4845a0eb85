"""Ask the trainer itself what it thinks of a config: `--validate-only`, which needs no torch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio import local
from studio.events import clean
from studio.problems import Problem

if TYPE_CHECKING:
    from studio.settings import Settings

Record = dict[str, Any]

MOST_SECONDS = 120  # a large dataset on a slow disk
WAITING_SECONDS = 30
AT_WORK = threading.BoundedSemaphore(2)
CHILDREN: set[subprocess.Popen[bytes]] = set()
TAIL = 500  # characters of stderr
TOPICS = ("device", "model", "dataset", "memory", "preset")  # of what it found


def ask_trainer(settings: Settings, config: Mapping[str, Any]) -> Record:
    """Return what the trainer says of a config: whether it would train, what it found, and why."""
    lines = [*events_of(run(settings, json.dumps(config), "--config", "-", "--validate-only"))]
    last = lines[-1] if lines else {}
    facts = {line.get("topic"): line.get("data") for line in lines if line["type"] == "info"}
    warnings = [
        {name: line.get(name) for name in ("code", "message", "data")}
        for line in lines
        if line["type"] == "warning"
    ]
    if last.get("type") not in ("error", "info"):
        raise Problem(503, "trainer_failed", "The trainer ended without an answer.")
    failed = last if last["type"] == "error" else {}
    return {
        "valid": not failed,
        "report": facts.get("valid"),
        "warnings": warnings,
        "problems": failed.get("problems", []),
        "code": failed.get("code"),
        "message": last.get("message"),
        "hint": failed.get("hint"),
        **{topic: facts.get(topic) for topic in TOPICS},
    }


def events_of(said: bytes) -> list[Record]:
    """Read the lines of a program."""
    records = [json.loads(line) for line in said.splitlines() if line.startswith(b"{")]
    return [record for record in records if isinstance(record.get("type"), str)]


def run(settings: Settings, stdin: str, *options: str) -> bytes:
    """Run the trainer to its end, which is near, and return what it said."""
    command = [settings.python, str(settings.repository / "train_lora.py"), *options]
    if not AT_WORK.acquire(timeout=WAITING_SECONDS):
        raise Problem(503, "busy", "Other configs are being checked.", headers={"Retry-After": "5"})
    try:
        stdout, stderr = output_of(command, stdin.encode(), settings.models)
    except OSError as error:
        raise Problem(503, "trainer_failed", f"{settings.python} cannot be run: {error}") from error
    except subprocess.TimeoutExpired as error:
        detail = f"The trainer took more than {MOST_SECONDS} seconds to check this."
        raise Problem(503, "trainer_slow", detail) from error
    finally:
        AT_WORK.release()
    if not stdout:
        tail = clean(stderr.decode("utf-8", "replace"))[-TAIL:]
        raise Problem(503, "trainer_failed", f"The trainer gave no answer: {tail}")
    return stdout


def output_of(command: list[str], stdin: bytes, folder: Path) -> tuple[bytes, bytes]:
    """Run a program in a folder where a model's id is no path; what is one was made absolute."""
    pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    own_group: Any = {} if sys.platform == "win32" else {"process_group": 0}
    with subprocess.Popen(
        command, **pipes, **own_group, env=local.environment(), cwd=folder
    ) as child:
        CHILDREN.add(child)
        try:
            return child.communicate(stdin, MOST_SECONDS)
        finally:
            CHILDREN.discard(child)
            end(child)


def end(child: subprocess.Popen[bytes]) -> None:
    """End a program, with all that it has started."""
    if child.poll() is not None:
        return
    if sys.platform == "win32":
        child.kill()
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def end_all() -> None:
    """End all checks under way: the service ends, and nobody waits for them."""
    for child in list(CHILDREN):
        end(child)


def schema(repository: Path) -> bytes:
    """Return the schema of the trainer's config as it stands."""
    return (repository / "config_schema.json").read_bytes()
