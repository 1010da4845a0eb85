"""What the service was told at its start, and where its files lie."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # and which of it this machine can call


@dataclass(frozen=True)
class Settings:
    """The command line, and the places below the data root. Nothing writes to it."""

    root: Path
    host: str = "127.0.0.1"
    port: int = 8000
    python: str = sys.executable  # runs the trainer and the tools
    repository: Path = Path(__file__).resolve().parent.parent
    allowed_roots: tuple[Path, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    notify_hosts: tuple[str, ...] = ()  # where webhooks may go beside this machine
    slots: str = "auto"
    on_start: str = "resume"
    stop_jobs: bool = False  # when the service ends, as in a container everything ends with it
    authenticated: bool = True

    @property
    def datasets(self) -> Path:
        """Folders of images and captions."""
        return self.root / "datasets"

    @property
    def models(self) -> Path:
        """Base models that the form offers."""
        return self.root / "models"

    @property
    def jobs(self) -> Path:
        """One folder per job."""
        return self.root / "jobs"

    @property
    def trash(self) -> Path:
        """What was deleted."""
        return self.root / "trash"

    @property
    def database(self) -> Path:
        """Jobs, attempts, held slots and sessions."""
        return self.root / "studio.db"

    @property
    def loopback(self) -> bool:
        """Tell whether only this machine can reach the service."""
        return self.host in LOOPBACK

    @property
    def url(self) -> str:
        """Where the service answers, as this machine calls it."""
        host = EVERYWHERE.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def job(self, job_id: str) -> Path:
        """Where a job keeps its files."""
        return self.jobs / job_id

    def prepare(self) -> None:
        """Make the data root, readable by its owner alone."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self.datasets, self.models, self.jobs, self.trash):
            folder.mkdir(exist_ok=True)

    @cached_property
    def token(self) -> str:
        """The secret of all who may use the service; made at the first start."""
        path = self.root / "token"
        if not path.exists():
            write_secret(path, secrets.token_urlsafe(32))
        token = path.read_text("ascii").strip()
        if not token:
            hint = "Delete that file; the next start makes another."
            raise TokenBlank(f"{path}: expected the token, got an empty file. {hint}")
        return token


class TokenBlank(Exception):
    """The file of the token is there, and says nothing; everybody knows that."""


def write_secret(path: Path, secret: str) -> None:
    """Write a file for its owner alone, whole or not at all, and never over another."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another start was quicker
            name_it(part, path)
    finally:
        part.unlink(missing_ok=True)


def name_it(part: Path, path: Path) -> None:
    """Give a file a name that nobody has."""
    try:
        path.hardlink_to(part)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        part.rename(path)
