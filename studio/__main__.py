"""Serve the studio.

python -m studio                                on 127.0.0.1, and open the browser
python -m studio --root /data --no-browser      with another place for everything it keeps
python -m studio mcp                            the same verbs for an assistant
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import uvicorn

from studio import security
from studio.app import create_app
from studio.engines import EnginesUnusable
from studio.local import is_locked, take_lock
from studio.settings import LOOPBACK, Settings, TokenBlank
from studio.slots import SlotsUnknown
from studio.store import DatabaseTooNew

if TYPE_CHECKING:
    from fastapi import FastAPI

GRACE_SECONDS = 2  # for open requests; streams watch for the end themselves


class Refused(Exception):
    """The service cannot start; the message says why, and what to do."""


def main(argv: Sequence[str]) -> int:
    """Run the program."""
    if argv[:1] == ["mcp"]:
        code: int = importlib.import_module("studio.mcp").main(list(argv[1:]))
        return code
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        serve(settings_of(arguments), browser=arguments.browser)
    except (Refused, TokenBlank, SlotsUnknown, DatabaseTooNew, EnginesUnusable) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    layout = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser("python -m studio", description=__doc__, formatter_class=layout)
    add = whole.add_argument
    add("--root", type=Path, default=Path("studio-data"), help="where everything is kept")
    add("--host", default="127.0.0.1", help="address to answer on; others need the token, too")
    add("--port", type=int, default=8000, help="0 takes any that is free")
    add("--python", default=sys.executable, help="Python that runs the trainer and the tools")
    add("--slots", default="auto", help="auto, cpu:N, or cards by number or uuid: 0,1")
    add(
        "--on-start",
        choices=("resume", "hold"),
        default="resume",
        help="what waits: goes on or not",
    )
    several: Any = {"action": "append", "default": []}
    add("--allow-root", type=Path, **several, metavar="DIR", help="folder that configs may name")
    add("--allowed-host", **several, metavar="HOST", help="further name of this machine")
    add("--allowed-origin", **several, metavar="URL", help="site whose scripts may use a token")
    add("--notify-host", **several, metavar="HOST", help="where webhooks may go beside here")
    add("--no-auth", dest="auth", action="store_false", help="ask for no token; only on loopback")
    add("--no-browser", dest="browser", action="store_false", help="open no browser")
    # A container ends with its first process, and all others with it.
    end = "when the service ends, let jobs save and end first; they go on at the next start"
    add("--stop-jobs", action="store_true", default=os.getpid() == 1, help=end)
    return whole


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Make settings of the command line."""
    if not arguments.auth and arguments.host not in LOOPBACK:
        raise Refused(f"--no-auth: expected a --host of this machine alone, got {arguments.host}")
    return Settings(
        root=arguments.root.absolute(),
        host=arguments.host,
        port=arguments.port,
        python=arguments.python,
        allowed_roots=tuple(path.resolve() for path in arguments.allow_root),
        allowed_hosts=tuple(arguments.allowed_host),
        allowed_origins=tuple(arguments.allowed_origin),
        notify_hosts=tuple(arguments.notify_host),
        slots=arguments.slots,
        on_start=arguments.on_start,
        stop_jobs=arguments.stop_jobs,
        authenticated=arguments.auth,
    )


def serve(settings: Settings, *, browser: bool) -> None:
    """Serve until a signal says otherwise."""
    settings.prepare()
    with alone(settings) as lock, listening(settings) as ear:
        settings = dataclasses.replace(settings, port=ear.getsockname()[1])
        app = create_app(settings)
        config = uvicorn.Config(
            app,
            access_log=False,  # addresses may hold what lets a browser in
            log_level="warning",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        app.state.server = server = uvicorn.Server(config)
        announce(settings, app, lock, browser=browser)
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again at its end
            signal.signal(number, lambda *_: sys.exit(0))
        server.run([ear])


@contextlib.contextmanager
def alone(settings: Settings) -> Iterator[IO[str]]:
    """Be the only service of a data root; two would start everything twice."""
    path = settings.root / "studio.lock"
    with path.open("a+", encoding="utf-8") as lock:
        if not take_lock(lock):
            address = path.read_text("utf-8").strip() or "an address that it is about to take"
            raise Refused(f"--root: {settings.root} is in use by the studio at {address}")
        if not is_locked(path):
            expected = "a folder on a local disk, where locks work"
            raise Refused(f"--root: expected {expected}, got {settings.root}")
        yield lock


def listening(settings: Settings) -> socket.socket:
    """Take the address before anything else is done; a browser may come at once."""
    kind = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    ear = socket.socket(kind)
    try:
        if sys.platform != "win32":  # there, it would let two listen to one port
            ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ear.bind((settings.host, settings.port))
        ear.listen(128)
    except OSError as error:
        ear.close()
        where, hint = f"{settings.host}:{settings.port}", "Give another --port; 0 takes any."
        raise Refused(f"--port: {where} cannot be used: {error.strerror}. {hint}") from error
    return ear


def announce(settings: Settings, app: FastAPI, lock: IO[str], *, browser: bool) -> None:
    """Tell the person at the terminal, and whoever tries to start a second one, where we are."""
    lock.truncate(0)
    lock.write(settings.url)
    lock.flush()
    url = settings.url + security.invitation(app)
    sys.stdout.write(f"The studio is at {url}\n")
    if settings.authenticated and settings.token:  # which is made here, if it never was
        token = settings.root / "token"
        sys.stdout.write(f"That address works once, for a minute; then it asks for {token}\n")
    if not settings.loopback:
        sys.stdout.write(
            "Others can reach it, and nothing is encrypted: put a server with https in front,\n"
            "and say by --allowed-host how that calls this machine.\n"
        )
    sys.stdout.flush()
    if browser:
        threading.Thread(target=webbrowser.open, args=[url], daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
