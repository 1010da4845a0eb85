"""What the events of an attempt say, in brief: kept in the database for lists of jobs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from studio.engine import parse

if TYPE_CHECKING:
    from studio.engine import Record


@dataclass(frozen=True)
class Digest:
    """How far an attempt has come."""

    phase: str | None = None
    step: int | None = None
    total_steps: int | None = None
    progress: Record | None = None
    first_step: int | None = None
    last_step: int | None = None
    final: Record | None = None
    continues_from: str | None = None

    def heard(self, line: bytes) -> Digest:
        """Go on with one more line; what is no event that is known changes nothing."""
        record = parse(line)
        return dataclasses.replace(self, **facts_of(record, self)) if record else self

    def facts(self) -> Record:
        """Return what is known."""
        known = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {name: value for name, value in known.items() if value is not None}


def facts_of(record: Record, before: Digest) -> Record:
    """Take from an event what it says about how far an attempt has come."""
    match record.get("type"):
        case "start":
            step = whole(record.get("resumed_step"))
            total = whole(record.get("total_steps"))
            return {"phase": "starting", "step": step, "total_steps": total, "first_step": step}
        case "info" if record.get("topic") == "phase" and isinstance(record.get("data"), dict):
            return phase_of(record["data"], before)
        case "progress":
            step, total = whole(record.get("step")), whole(record.get("total_steps"))
            changes = {"phase": "training", "step": step, "total_steps": total, "last_step": step}
            return {**changes, "progress": record}
        case "complete":
            return {"final": record, **step_of(record)}
        case "interrupted" | "error":
            path = record.get("path")
            return {"continues_from": words(path) if path else None, **step_of(record)}
    return {}


def phase_of(data: Record, before: Digest) -> Record:
    """Name a preparation; of a program that trains nothing, it is also how far that has come."""
    changes: Record = {"phase": words(data.get("name"))}
    if before.first_step is None:
        changes |= {"step": whole(data.get("done")), "total_steps": whole(data.get("total"))}
    return changes


def words(value: Any) -> str:
    """Take a text as the database can keep it; a file's name may be no Unicode."""
    return str(value).encode("utf-8", "replace").decode()


def step_of(record: Record) -> Record:
    """Take the step of a last line, if that knows one."""
    step = whole(record.get("step"))
    return {} if step is None else {"step": step, "last_step": step}


def whole(value: Any) -> int | None:
    """Take a count as the database can keep it; anything else is unknown."""
    return value if type(value) is int and 0 <= value < 1 << 62 else None
