"""Engines beside this machine: engines.json in the data root names them, and says where they are.

{"peer:big": {"url": "http://10.0.0.5:8000", "token": "…"},
 "kubernetes": {"image": "registry.example/lora-studio", "claim": "studio", "gpus": 1}}
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from studio.kubernetes import Kubernetes, Options
from studio.peer import Peer

if TYPE_CHECKING:
    from studio.engine import Engine
    from studio.settings import Settings


def in_cluster(settings: Settings, **options: Any) -> Engine:
    """Make the engine of a cluster."""
    return Kubernetes(settings, Options(**options))


# What makes an engine of each kind; with the options it needs, and those it may have.
KINDS: dict[str, tuple[Callable[..., Engine], set[str], set[str]]] = {
    "peer": (Peer, {"url", "token"}, set()),
    "kubernetes": (in_cluster, {"image", "claim"}, {"namespace", "gpus", "secret", "api"}),
}


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
    build, needed, free = KINDS[kind]
    if not isinstance(options, dict) or not needed <= set(options) <= needed | free:
        found = sorted(options) if isinstance(options, dict) else options
        expected = ", ".join(sorted(needed)) + (f", perhaps {', '.join(sorted(free))}" * bool(free))
        raise EnginesUnusable(f"engines.json: {name}: expected {expected}, got {found}")
    try:
        return build(settings, **options)
    except (ValueError, TypeError) as error:
        raise EnginesUnusable(f"engines.json: {name}: {error}") from error
