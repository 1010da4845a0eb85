"""A studio that answers on a port of this machine, for tests that speak HTTP with it."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn
from PIL import Image
from studio_ground import join

from studio.app import create_app
from studio.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI


@dataclass(frozen=True)
class Served:
    """A studio at work, and a client that may do everything with it."""

    settings: Settings
    app: FastAPI
    client: httpx.Client

    def connect(self) -> socket.socket:
        """Open a bare connection, for what no client would send."""
        return socket.create_connection((self.settings.host, self.settings.port), timeout=30)


def bind() -> socket.socket:
    """Take a port that is free."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    return listener


@contextlib.contextmanager
def serving(root: Path, **options: Any) -> Iterator[Served]:
    """Serve a data root until the end of the block."""
    with bind() as listener:
        settings = Settings(root=root, port=listener.getsockname()[1], **options)
        app = create_app(settings)
        config = uvicorn.Config(
            app,
            access_log=False,
            server_header=False,
            log_level="warning",
            timeout_graceful_shutdown=2,
        )
        server = app.state.server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        headers = {"Authorization": f"Bearer {settings.token}"}
        try:
            with httpx.Client(base_url=settings.url, headers=headers, timeout=60) as client:
                yield Served(settings, app, client)
        finally:
            server.should_exit = True
            join(thread)


def picture(format: str = "PNG", size: tuple[int, int] = (64, 48), **options: Any) -> bytes:  # noqa: A002, as Pillow calls it
    """Make the bytes of a picture."""
    target = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(target, format, **options)
    return target.getvalue()


def tree(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Record every entry below a folder with its kind, size and time of change."""
    stats = {str(path): path.lstat() for path in [folder, *folder.rglob("*")]}
    return {name: (s.st_mode, s.st_size, s.st_mtime_ns) for name, s in stats.items()}
