"""All that a person does with the studio, in one go, while its service dies in the middle.

Nothing acts here: the real service, the real trainer and the bundled model.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from acting import MODEL
from conftest import ROOT
from looking import DESK, chromium, expect, needs_chromium
from serving import bind
from studio_ground import end_all, first_line, wait_until

from studio import local
from studio.settings import Settings

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(1800), needs_chromium]

IMPS = sorted((ROOT / "examples" / "images").glob("*.png"))
PATIENCE_MS = 600_000  # a preview takes minutes where eight others use the same two cores
# From the address that a new service prints to what is true on the page, where nothing else wants
# the processors; and how often that may be tried.
TRUTH_SECONDS, KILLS = 2.0, 3
MORE_STEPS = 6  # after the stop: however fast a machine is, it is stopped before the end
ASKED = {
    "base_model": str(MODEL),
    "trigger_words": "zkb",
    "steps": "5000",
    "resolution": "256",
    "lora_rank": "4",
    "validation_steps": "8",
    "checkpoint_steps": "8",
    "sample_steps": "1",
    "sample_width": "64",
    "sample_height": "64",
    "sample_prompts": "zkb on a red background",
    "device": "cpu",
}


@dataclass
class Service:
    """The studio as a process, which can be killed and started again."""

    settings: Settings
    process: subprocess.Popen[str] | None = None
    address: str = ""  # that lets a browser in, once

    def start(self) -> float:
        """Start it; tell when it said where it is."""
        where = ["--root", self.settings.root, "--port", self.settings.port]
        options = ["--no-browser", "--slots", "cpu:1", "--allow-root", ROOT / "examples"]
        command = [sys.executable, "-m", "studio", *map(str, [*where, *options])]
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
        self.address = first_line(self.process).split()[-1]
        return time.monotonic()

    def kill(self) -> None:
        """End it as a power cut does."""
        if self.process:
            self.process.send_signal(signal.SIGKILL)
            self.process.communicate(timeout=30)


@contextmanager
def running(root: Path) -> Iterator[Service]:
    """Run a service, and leave nothing of it behind."""
    with bind() as listener:
        port = listener.getsockname()[1]
    service = Service(Settings(root=root, port=port))
    service.start()
    try:
        yield service
    finally:
        service.kill()
        end_all(service.settings)


@contextmanager
def sitting(service: Service) -> Iterator[Page]:
    """Sit down before a browser that is let in."""
    with chromium() as browser:
        page = browser.new_page(base_url=service.settings.url, viewport=DESK)
        page.set_default_timeout(PATIENCE_MS)
        page.goto(service.address)
        yield page


def upload(page: Page) -> None:
    """Make a dataset of the twelve imps."""
    page.goto("/data")
    page.get_by_role("textbox").first.fill("imps")
    page.keyboard.press("Enter")
    page.get_by_text("Add images…").wait_for()  # the script is there
    page.set_input_files("#files", [str(path) for path in IMPS])
    expect(page.locator(".caption")).to_have_count(len(IMPS))


def caption(page: Page) -> None:
    """Write captions by a template."""
    page.locator("#captioner").select_option("template")
    page.locator("#trigger").fill("zkb")
    page.locator("#template").fill("{trigger} called {name}")
    page.get_by_role("button", name="Write captions").click()
    told = f"zkb called {IMPS[0].stem.replace('_', ' ')}"
    until_reloaded(page, "/data/imps", lambda: page.locator("#caption-1").input_value() == told)


def until_reloaded(page: Page, address: str, true: Callable[[], bool]) -> None:
    """Look again and again until something is so."""
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not true():
        assert time.monotonic() < deadline, f"{address} does not come to show it"
        page.wait_for_timeout(1000)
        page.goto(address)


def begin(page: Page) -> str:
    """Fill the form in, wait for what the trainer says, and start; return the job's id."""
    page.goto("/new?dataset=imps")
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    for name, value in ASKED.items():
        page.locator(f"#{name}").fill(value)
    expect(page.locator("#check")).to_contain_text("12 images")
    page.get_by_role("button", name="Start").click()
    page.wait_for_url("**/runs/*")
    return page.url.rpartition("/")[2]


def lines_of(output: Path) -> list[dict[str, Any]]:
    """Read what the trainer has said, over all starts."""
    path = output / "events.jsonl"
    text = path.read_text("ascii") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def step_in(output: Path) -> int:
    """Tell how many updates are done."""
    return max((line["step"] for line in lines_of(output) if line["type"] == "progress"), default=0)


def shown_step(page: Page) -> int:
    """Read the step that the page shows."""
    found = re.match(r"Step ([\d,]+)", page.locator("#progress-line b").inner_text())
    return int(found[1].replace(",", "")) if found else 0


def watch_a_picture_come(page: Page) -> None:
    """See the first preview appear on a page that is not loaded anew."""
    page.evaluate("window.unchanged = true")
    page.locator("#film a").first.wait_for()
    assert page.evaluate("window.unchanged")
    assert page.evaluate("document.getElementById('hero-picture').naturalWidth") > 0


def survive(page: Page, service: Service, output: Path) -> None:
    """Kill the service under the page; the next one shows what is true, and soon."""
    told = []
    for _ in range(KILLS):
        took, most = seconds_to_truth(page, service, output), TRUTH_SECONDS * crowd()
        if took < most:
            return
        told.append(f"{took:.1f} of {most:.1f} s")
    raise AssertionError(told)


def crowd() -> float:
    """Tell how many want each processor: by so much everything takes longer."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def seconds_to_truth(page: Page, service: Service, output: Path) -> float:
    """Kill the service; tell how long after the next one is there the page knows all."""
    service.kill()
    expect(page.locator("#banner")).to_be_visible()
    before = step_in(output)
    wait_until(lambda: step_in(output) > before, PATIENCE_MS / 1000)  # the training goes on
    known, began = step_in(output), service.start()
    page.goto(page.url, wait_until="domcontentloaded")  # pictures may come later
    assert "running" in page.locator("#state").inner_text()
    assert shown_step(page) >= known
    return time.monotonic() - began


def stop_and_continue(page: Page) -> None:
    """Press the one button, and then the other, for a few more steps."""
    page.get_by_role("button", name="Stop").click()
    page.locator("#state .stopped").wait_for()
    stopped = shown_step(page)
    assert 0 < stopped < int(ASKED["steps"])
    page.get_by_label("Continue to").fill(str(stopped + MORE_STEPS))
    page.get_by_role("button", name="Continue").click()
    page.locator("#state .completed").wait_for()
    assert shown_step(page) == stopped + MORE_STEPS


def trained_by_command(settings: Settings, job_id: str, output: Path) -> bytes:
    """Train the same on the command line, without a stop; what it measures then changes nothing."""
    config = json.loads((settings.job(job_id) / "config.json").read_bytes())
    alone = output.with_suffix(".json")
    alone.write_text(json.dumps({**config, "output_path": str(output)}), encoding="utf-8")
    command = [sys.executable, str(ROOT / "train_lora.py"), "--config", str(alone)]
    final = output / "lora_final.safetensors"
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, env=local.environment(), stdout=quiet) as process:
        wait_until(lambda: final.exists() or process.poll() is not None, PATIENCE_MS / 1000)
        process.terminate()
        process.wait(60)
    return final.read_bytes()


def compare(page: Page, job_id: str) -> None:
    """Draw the LoRA at two strengths."""
    page.goto(f"/compare?run={job_id}")
    page.locator("#prompts").fill("zkb on a red background")
    page.locator("#strengths").fill("0.5, 1")
    page.locator("#seeds").fill("1")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator("#grid-1 img").first.wait_for()
    assert page.locator("#grid-1 img").count() == 5  # two files at two strengths, and neither


def download(page: Page, job_id: str) -> bytes:
    """Take the file home."""
    page.goto(f"/runs/{job_id}")
    with page.expect_download() as coming:
        page.get_by_role("link", name="Download", exact=True).first.click()
    return Path(coming.value.path()).read_bytes()


def test_from_twelve_pictures_to_a_file_through_a_killed_service(tmp_path: Path) -> None:
    """Upload, caption, form, train, kill, look, stop, continue, compare, download.

    What is downloaded has the same bytes as what the command line makes without a stop.
    """
    with running(tmp_path / "root") as service, sitting(service) as page:
        upload(page)
        caption(page)
        job_id = begin(page)
        output = service.settings.job(job_id) / "output"
        watch_a_picture_come(page)
        survive(page, service, output)
        stop_and_continue(page)
        taken = download(page, job_id)
        compare(page, job_id)
        assert httpx.get(f"{service.settings.url}/healthz").json() == {"status": "ok"}
        assert taken == trained_by_command(service.settings, job_id, tmp_path / "alone")
