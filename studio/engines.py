"""Engines beside this machine: engines.json in the data root names them, and says where they are.

{"peer:big": {"url": "http://10.0.0.5:8000", "token": "…"}}
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from studio.peer import Peer

if TYPE_CHECKING:
    from studio.engine import Engine
    from studio.settings import Settings

KINDS = {"peer": (Peer, ("url", "token"))}


class EnginesUnusable(Exception):
    """The file says something that no engine can be made of."""


def further(settings: Settings) -> dict[str, Engine]:
    """Make the engines that the owner of this studio has named."""
    path = settings.root / "engines.json"
    if not path.exists():
        return {}
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise EnginesUnusable(f"{path}: expected JSON, got {error}") from error
    if not isinstance(said, dict):
        raise EnginesUnusable(f"{path}: expected an object of engines, got {said!r}")
    return {name: make(settings, name, options) for name, options in said.items()}


def make(settings: Settings, name: str, options: Any) -> Engine:
    """Make one engine; its name begins with its kind."""
    kind = name.partition(":")[0]
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise EnginesUnusable(f"engines.json: expected names that begin with {known}, got {name}")
    build, needed = KINDS[kind]
    if not isinstance(options, dict) or set(options) != set(needed):
        found = sorted(options) if isinstance(options, dict) else options
        raise EnginesUnusable(f"engines.json: {name}: expected {', '.join(needed)}, got {found}")
    try:
        return build(settings, **options)
    except (ValueError, TypeError) as error:
        raise EnginesUnusable(f"engines.json: {name}: {error}") from error
