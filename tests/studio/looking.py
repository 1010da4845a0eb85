"""A real browser that looks at the studio: what it complains of fails the test that looked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

if TYPE_CHECKING:
    from playwright.sync_api import (
        Browser,
        BrowserContext,
        ConsoleMessage,
        Page,
        Request,
        ViewportSize,
    )
    from serving import Served

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 30_000  # milliseconds, on a machine under load
DESK: ViewportSize = {"width": 1280, "height": 800}
PHONE: ViewportSize = {"width": 360, "height": 740}
VIOLATIONS = """
  window.violations = [];
  addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
"""

needs_chromium = pytest.mark.skipif(
    not CHROMIUM.exists(), reason="not run: Debian's chromium is not installed"
)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a browser."""
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield started
        started.close()


@contextmanager
def logged_in(browser: Browser, studio: Served, **options: Any) -> Iterator[BrowserContext]:
    """Open a profile of its own that has a session."""
    options = {"viewport": DESK, **options}
    context = browser.new_context(base_url=studio.settings.url, **options)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.goto(f"/login?once={studio.app.state.nonces.issue()}")
    page.close()
    yield context
    context.close()


class Complaints(list[str]):
    """What a browser says against a page."""

    def __init__(self, page: Page, own: str) -> None:
        """Listen from now on."""
        super().__init__()
        self.page, self.own = page, own
        page.add_init_script(VIOLATIONS)
        page.on("console", self.hear)
        page.on("pageerror", lambda error: self.append(f"error: {error}"))
        page.on("request", self.follow)
        page.on("dialog", self.refuse)

    def hear(self, said: ConsoleMessage) -> None:
        """Note errors and warnings; a connection that fails is for the test to judge."""
        if said.type in ("error", "warning") and "Failed to load resource" not in said.text:
            self.append(f"{said.type}: {said.text}")

    def follow(self, request: Request) -> None:
        """Note whatever leaves the studio."""
        parts = urlsplit(request.url)
        if parts.scheme not in ("blob", "data") and not request.url.startswith(self.own):
            self.append(f"request: {request.url}")

    def refuse(self, dialog: Any) -> None:
        """Note a dialog, which only a script that slipped in would open."""
        self.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def all(self) -> list[str]:
        """List them, with what broke the policy."""
        return [*self, *self.page.evaluate("window.violations ?? []")]


@contextmanager
def looking(context: BrowserContext, studio: Served, address: str) -> Iterator[Page]:
    """Look at a page; complaints fail the test."""
    page = context.new_page()
    complaints = Complaints(page, studio.settings.url)
    page.goto(address)
    yield page
    assert complaints.all() == []
    page.close()


def expect(place: Any) -> Any:
    """Wait until something is so."""
    return sync_api.expect(place)


sync_api.expect.set_options(timeout=PATIENCE)
