"""Measure the studio with much of everything: how soon a page is seen, and what the service takes.

    python benchmarks/studio_load.py [--runs 200] [--events 10000] [--pictures 2000] [--readers 50]

A service of its own on an empty root, filled before it starts; Debian's chromium looks at each
page in a fresh profile. The first preparation of thumbnails is a part of what is measured.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # in place of this folder, in which `studio` is another thing

from studio.settings import Settings  # noqa: E402, found by the line above
from studio.store import Job, Store, new_id, utc  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM, EXAMPLES = "/usr/bin/chromium", ROOT / "examples"
LOOKS = 3  # at each page, of which the middle one counts
# A function, as the pages' policy lets no text be run.
PAINTED = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
LIVE_STEPS = 20  # of the run that is followed while it trains
Line = dict[str, Any]


# --- What is there before the service starts ---


def told(kind: str, message: str, **fields: Any) -> Line:
    """Make a line as the trainer writes it, without its number."""
    return {"type": kind, "timestamp": utc(), "message": message, **fields}


def lines_of_a_run(count: int) -> list[Line]:
    """Make as many lines as that: progress, one warning of ten, and the last one."""
    head = {"run_id": "x", "resumed_step": 0, "total_steps": count, "protocol": "1.1"}
    lines = [told("start", "train_lora", config={}, pid=1, version="0.1.0", **head)]
    for step in range(1, count - 1):
        if step % 10:
            pace = {"seconds_per_step": 0.5, "learning_rate": 1e-4, "grad_norm": 0.1, "epoch": 1}
            pace |= {"total_steps": count, "percent": 99 * step // count, "loss": 1 / step}
            lines.append(told("progress", f"Step {step}", step=step, **pace))
        else:
            lines.append(told("warning", f"Image {step} is small", code="images_small", data={}))
    return [*lines, told("complete", "Complete", step=count, percent=100, sha256="", bytes=0)]


def write_run(settings: Settings, store: Store, name: str, lines: list[Line]) -> str:
    """Leave a completed run behind, with a preview."""
    progress = next((line for line in reversed(lines) if line["type"] == "progress"), None)
    columns: Any = {"step": len(lines), "total_steps": len(lines), "progress": progress}
    config = {"trigger_words": ["zkb"], "base_model": "x", "steps": len(lines)}
    job = Job(new_id(), "train", name, config, state="completed", final=lines[-1], **columns)
    store.insert(job)
    folder = settings.job(job.id)
    for path in (folder / "attempts" / "1", folder / "output" / "samples"):
        path.mkdir(parents=True)
    (folder / "command.json").write_text("{}")  # without it, it would be put away at the start
    numbered = [json.dumps({"seq": n, **line}) + "\n" for n, line in enumerate(lines, start=1)]
    (folder / "attempts" / "1" / "stdout.jsonl").write_text("".join(numbered), encoding="ascii")
    shutil.copy(EXAMPLES / "strip.png", folder / "output" / "samples" / "step_1.png")
    with store.writing() as db:
        db.execute(
            "UPDATE jobs SET started_at = ?, ended_at = ? WHERE id = ?", (utc(), utc(), job.id)
        )
        db.execute(
            "INSERT INTO attempts(job, n, handle, started_at, ended_at, outcome, exit_code) "
            "VALUES(?, 1, 'x', ?, ?, 'complete', 0)",
            (job.id, utc(), utc()),
        )
    return job.id


def write_pictures(folder: Path, count: int) -> None:
    """Write a dataset of different pictures with captions."""
    folder.mkdir(parents=True)
    source = Image.linear_gradient("L").resize((768, 768))
    for number in range(count):
        Image.merge("RGB", [source.rotate(number % 90), source, source]).save(
            folder / f"{number:05}.jpg", quality=90
        )
        (folder / f"{number:05}.txt").write_text(f"zkb, picture {number}, tag{number % 20}")


# --- The service ---


@dataclass
class Service:
    """A studio as a process."""

    settings: Settings
    address: str  # that lets one browser in
    pid: int

    def memory(self, what: str = "VmRSS") -> float:
        """Read what it holds, or held at most (VmHWM), in MiB."""
        status = Path(f"/proc/{self.pid}/status").read_text("ascii")
        found = re.search(rf"{what}:\s+(\d+)", status)
        return int(found[1]) / 1024 if found else 0.0

    def ask(self, path: str, body: object = None) -> http.client.HTTPResponse:
        """Ask it something as a program does; the answer is to be read."""
        caller = http.client.HTTPConnection("127.0.0.1", self.settings.port, timeout=600)
        headers = {"Authorization": f"Bearer {self.settings.token}"}
        headers["Content-Type"] = "application/json"
        text = None if body is None else json.dumps(body)
        caller.request("GET" if text is None else "POST", path, text, headers)
        return caller.getresponse()


@contextmanager
def serving(root: Path) -> Iterator[Service]:
    """Start one, and end it with what it has started."""
    command = [sys.executable, "-m", "studio", "--root", str(root), "--port", "0", "--no-browser"]
    command += ["--slots", "cpu:1", "--allow-root", str(EXAMPLES), "--stop-jobs"]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout
        address = process.stdout.readline().split()[-1]
        port = int(re.findall(r":(\d+)/", address)[0])
        try:
            yield Service(Settings(root=root, port=port), address, process.pid)
        finally:
            process.terminate()


# --- What is measured ---


def look(browser: Browser, service: Service, state: Any, path: str) -> tuple[float, int]:
    """Open a page in a fresh profile; tell how many milliseconds it took, and its size."""
    context = browser.new_context(base_url=service.settings.url, storage_state=state)
    page = context.new_page()
    page.goto(path)
    painted = page.wait_for_function(PAINTED, timeout=60_000).json_value()
    size = page.evaluate("performance.getEntriesByType('navigation')[0].decodedBodySize")
    context.close()
    return float(painted), int(size)


def paint(service: Service, pages: dict[str, str]) -> list[str]:
    """Look at all pages; return a row of each."""
    from playwright.sync_api import sync_playwright

    rows = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        context = browser.new_context()
        context.new_page().goto(service.address)
        state: Any = context.storage_state()
        for name, path in pages.items():
            looks = [look(browser, service, state, path) for _ in range(LOOKS)]
            first, middle = looks[0][0], statistics.median(each[0] for each in looks)
            cells = (
                f"{first:.0f} | {middle:.0f} | {looks[0][1] / 1000:.0f} | {service.memory():.0f}"
            )
            rows.append(f"| {name} | {cells} |")
            sys.stderr.write(f"{rows[-1]}\n")
        browser.close()
    return rows


@dataclass
class Reader:
    """One who follows a stream."""

    response: http.client.HTTPResponse
    delays: list[float] = field(default_factory=list)
    lines: int = 0

    def read(self) -> None:
        """Read to the last line; note how late each line came."""
        while line := self.response.readline():
            if not line.strip():
                continue
            said = json.loads(line)
            self.lines += 1
            self.delays.append(time.time() - seconds_of(said["timestamp"]))
            if said["type"] in ("complete", "interrupted", "error"):
                return


def seconds_of(timestamp: str) -> float:
    """Read a time as the trainer writes it."""
    from datetime import datetime

    return datetime.fromisoformat(timestamp).timestamp()


def follow(service: Service, job_id: str, count: int) -> tuple[list[Reader], float]:
    """Let so many read a run's lines at once; tell how long that took."""
    began = time.monotonic()
    at = f"/jobs/{job_id}/events?follow=1"
    readers = [Reader(service.ask(at)) for _ in range(count)]
    threads = [threading.Thread(target=reader.read) for reader in readers]
    each_of(threads, threading.Thread.start)
    each_of(threads, threading.Thread.join)
    return readers, time.monotonic() - began


def each_of(threads: list[threading.Thread], do: Callable[[threading.Thread], None]) -> None:
    """Do the same with all."""
    for thread in threads:
        do(thread)


def train(service: Service) -> str:
    """Start a short training of the bundled model."""
    config: dict[str, Any] = {
        "base_model": str(EXAMPLES / "tiny-sd"),
        "trigger_words": ["zkb"],
        "device": "cpu",
    }
    config |= {"steps": LIVE_STEPS, "resolution": 256, "validation_steps": LIVE_STEPS}
    config |= {"sample_steps": 1, "checkpoint_steps": LIVE_STEPS}
    answer = service.ask("/train", {"dataset": "imps", "config": config})
    return str(json.loads(answer.read())["job_id"])


def streams(service: Service, long: str, asked: argparse.Namespace) -> list[str]:
    """Follow a long run that has ended, and one that trains."""
    rows = []
    for name, job_id in ((f"{asked.events:,} lines at once", long), ("a training", train(service))):
        readers, seconds = follow(service, job_id, asked.readers)
        delays = [delay for reader in readers for delay in reader.delays]
        live = job_id != long
        late = f"{statistics.median(delays):.2f} | {max(delays):.2f}" if live else " | "
        lines = min(reader.lines for reader in readers)
        memory = f"{service.memory():.0f} | {service.memory('VmHWM'):.0f}"
        rows.append(f"| {name} | {lines:,} | {seconds:.1f} | {late} | {memory} |")
        sys.stderr.write(f"{rows[-1]}\n")
    return rows


def measure(root: Path, asked: argparse.Namespace) -> str:
    """Fill a studio, measure, and lay out the tables."""
    settings = Settings(root=root)
    settings.prepare()
    store = Store(settings.database)
    for number in range(asked.runs):
        write_run(settings, store, f"Run {number}", lines_of_a_run(20))
    long = write_run(settings, store, "Long", lines_of_a_run(asked.events))
    store.close()
    write_pictures(settings.datasets / "many", asked.pictures)
    shutil.copytree(EXAMPLES / "images", settings.datasets / "imps")
    pages = {
        f"runs, {asked.runs}": "/",
        f"a run of {asked.events:,} lines": f"/runs/{long}",
        f"a dataset of {asked.pictures:,} pictures": "/data/many",
        "its last page": f"/data/many?page={-(-asked.pictures // 60)}",
        "new run": "/new?dataset=imps",
        "compare": "/compare",
        "machine": "/machine",
    }
    with serving(root) as service:
        head = (
            "page | first look, ms | paint, ms | HTML, kB | service, MiB |\n|---|--:|--:|--:|--:|"
        )
        text = [f"| at rest | | | | {service.memory():.0f} |", *paint(service, pages)]
        more = f"{asked.readers} readers of | lines | s | late, s | at most | MiB | peak |"
        more += "\n|---|--:|--:|--:|--:|--:|--:|"
        return "\n".join([f"| {head}", *text, "", f"| {more}", *streams(service, long, asked)])


def main() -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, usual in (("runs", 200), ("events", 10_000), ("pictures", 2_000), ("readers", 50)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(measure(Path(folder) / "root", parser.parse_args()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
