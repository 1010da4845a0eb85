"""Tell another program of a job's state: to this machine or hosts that were allowed, and briefly.

Nothing waits for it: what cannot be told in three tries is not told.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import logging
import queue
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from studio.problems import Problem, problem_at, sentence

if TYPE_CHECKING:
    from studio.settings import Settings
    from studio.store import Job

Record = dict[str, Any]

TIMEOUT_SECONDS = 5.0
PAUSES = (0.0, 1.0, 5.0)  # before each try
MOST_WAITING = 1_000
PORTS = {"http": 80, "https": 443}

log = logging.getLogger("studio")


def check(settings: Settings, url: str | None) -> None:
    """Refuse an address that nobody allowed."""
    if url is None or is_allowed(settings, url):
        return
    expected = "http or https to this machine, or to a host of --notify-host; no name or password"
    problem = problem_at("notify_url", expected, url)
    raise Problem(422, "notify_url_refused", sentence([problem]), [problem])


def is_allowed(settings: Settings, url: str) -> bool:
    """Tell whether an address is on this machine or on a host that was allowed by name."""
    if len(url) > 2_000 or not url.isascii() or not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return False
    if parts.scheme not in PORTS or parts.username is not None or parts.password is not None:
        return False
    named = {host, f"{host}:{port or PORTS[parts.scheme]}"}
    return is_loopback(host) or bool(named & {each.lower() for each in settings.notify_hosts})


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine, by its address or its one name that cannot lie."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class Notifier:
    """Tells of states, one after another, in a thread of its own."""

    def __init__(self, settings: Settings, brief: Callable[[Job], Record]) -> None:
        """Take what is allowed, and how a job is told of."""
        self.settings, self.brief = settings, brief
        self.waiting: queue.Queue[Job | None] = queue.Queue(MOST_WAITING)
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self.run, name="webhooks", daemon=True)

    def changed(self, job: Job) -> None:
        """Note that a job is to be told of."""
        if job.notify_url:
            try:
                self.waiting.put_nowait(job)
            except queue.Full:
                log.warning("Too many webhooks wait; that %s is %s is not told", job.id, job.state)

    def start(self) -> None:
        """Begin."""
        self.thread.start()

    def stop(self) -> None:
        """End soon; what waits is not told."""
        self.closing.set()
        with contextlib.suppress(queue.Full):
            self.waiting.put_nowait(None)

    def run(self) -> None:
        """Tell of one after another."""
        while (job := self.waiting.get()) and not self.closing.is_set():
            self.tell(job)

    def tell(self, job: Job) -> None:
        """Tell of a job, more than once where nobody answers."""
        body = json.dumps(self.brief(job)).encode()
        for pause in PAUSES:
            if self.closing.wait(pause):
                return
            try:
                code = post(str(job.notify_url), body)
            except (OSError, http.client.HTTPException) as error:
                log.info("Webhook of %s: %s", job.id, error)
                continue
            if code < 500:  # whatever it says, it has heard; redirects are not followed
                return


def post(url: str, body: bytes) -> int:
    """Send a document, and return the status of the answer."""
    parts = urlsplit(url)
    connection = connect(parts)
    timer = threading.Timer(TIMEOUT_SECONDS, cut, (connection,))  # drop by drop is no answer either
    timer.start()
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Content-Type": "application/json", "User-Agent": "lora-studio"}
        connection.request("POST", path, body, headers)
        return connection.getresponse().status
    finally:
        timer.cancel()
        connection.close()


def cut(connection: http.client.HTTPConnection) -> None:
    """End a connection that another thread waits for."""
    with contextlib.suppress(OSError, AttributeError):  # it may be over, or not be there yet
        connection.sock.shutdown(socket.SHUT_RDWR)


def connect(parts: SplitResult) -> http.client.HTTPConnection:
    """Connect at once and without any proxy."""
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.hostname or "", parts.port, timeout=TIMEOUT_SECONDS)
