"""Make the README's pictures of the studio from a real run.

python -m studio.screenshots [FOLDER] [--python PATH]

A studio of its own is started, the twelve imps are put into it, the bundled model is trained on
them, and what came out is compared. That takes some minutes without a graphics card. Needs the
packages of requirements-dev.txt and Debian's chromium.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from PIL import Image
from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from playwright.sync_api import Page, ViewportSize

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
DESK: ViewportSize = {"width": 1280, "height": 860}
PHONE: ViewportSize = {"width": 390, "height": 780}
QUALITY = 80  # of WebP: five pictures take about 200 KB
MINUTE = 60_000
HALF_WAY = 17  # the picture with this number is there
PROMPTS = (
    "a large zkb on a yellow background",
    "a small zkb on the left on a blue background",
    "a zkb at the bottom on a green background",
)


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    whole = argparse.ArgumentParser(prog="python -m studio.screenshots", description=__doc__)
    whole.add_argument("folder", nargs="?", type=Path, default=EXAMPLES / "studio")
    whole.add_argument("--python", default=sys.executable, help="runs the trainer")
    return whole


def main() -> int:
    """Make all pictures."""
    arguments = parser().parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        studio(Path(folder), arguments.python) as address,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport=DESK, base_url=address)
        page.set_default_timeout(20 * MINUTE)
        page.goto(address)
        fill(Path(folder), address)
        walk(page, arguments.folder)
        browser.close()
    return 0


@contextmanager
def studio(folder: Path, python: str) -> Iterator[str]:
    """Run a studio, and yield the address that logs a browser in."""
    command = [sys.executable, "-m", "studio", "--root", str(folder), "--port", "0"]
    command += ["--no-browser", "--slots", "cpu:1", "--allow-root", str(EXAMPLES), "--stop-jobs"]
    command += ["--python", python]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            line = next(line for line in process.stdout or () if "http://" in line)
            yield line[line.index("http://") :].split()[0]
        finally:
            process.terminate()


def fill(folder: Path, address: str) -> None:
    """Put the bundled model in, and the twelve imps with their captions."""
    shutil.copytree(EXAMPLES / "tiny-sd", folder / "models" / "tiny-sd")
    token = (folder / "token").read_text("ascii").strip()
    headers = {"Authorization": f"Bearer {token}"}
    base = address.partition("/login")[0]
    with httpx.Client(base_url=base, headers=headers, timeout=60) as client:
        client.post("/datasets", json={"name": "imps"}).raise_for_status()
        for path in sorted((EXAMPLES / "images").glob("*.png")):
            kind = {"Content-Type": "image/png"}
            at = f"/datasets/imps/images/{path.name}"
            client.put(at, content=path.read_bytes(), headers=kind).raise_for_status()
            put_caption(client, path)


def put_caption(client: httpx.Client, path: Path) -> None:
    """Put one caption in."""
    at = f"/datasets/imps/captions/{path.name}"
    tag = {"If-Match": client.get(at).headers["etag"]}
    text = path.with_suffix(".txt").read_text("utf-8")
    client.put(at, json={"text": text}, headers=tag).raise_for_status()


def walk(page: Page, target: Path) -> None:
    """Go the way of a first run, and take a picture at every place worth one."""
    page.goto("/data/imps")
    take(page, target / "dataset.webp")
    page.emulate_media(color_scheme="dark")
    page.goto("/new?dataset=imps")
    ask(page)
    take(page, target / "new.webp")
    page.get_by_role("button", name="Start").click()
    page.wait_for_url("**/runs/*")
    page.emulate_media(color_scheme="light")
    page.locator("#film td:has(a)").nth(HALF_WAY).wait_for(state="attached")
    take(page, target / "run.webp")
    page.set_viewport_size(PHONE)
    page.emulate_media(color_scheme="dark")
    take(page, target / "phone.webp")
    page.set_viewport_size(DESK)
    page.locator("#state .completed").wait_for()
    compare(page, target)


def ask(page: Page) -> None:
    """Fill the form in with what the example says, and wait for what the trainer says to it."""
    config = json.loads((ROOT / "example_config.json").read_text("utf-8"))
    apart = ("$schema", "$comment", "dataset_path", "output_path")
    values: dict[str, Any] = {name: each for name, each in config.items() if name not in apart}
    values |= {"sample_prompts": "\n".join(PROMPTS), "trigger_words": "zkb"}
    values |= {"steps": 240, "validation_steps": 30, "checkpoint_steps": 80}
    values |= {"base_model": "tiny-sd", "regularization_path": str(EXAMPLES / "regularization")}
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    for name, value in values.items():
        put(page, name, value)
    page.locator("#check .checks").wait_for()
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = false))")
    page.evaluate("scrollTo(0, 0)")


def put(page: Page, name: str, value: Any) -> None:
    """Put a value into its control."""
    if isinstance(value, bool):
        page.locator(f"#{name}").set_checked(value)
    elif page.locator(f"select#{name}").count():
        page.locator(f"#{name}").select_option(value)
    elif page.locator(f"fieldset#{name}").count():
        page.locator(f"#{name} input[value='{value}']").check()
    else:
        page.locator(f"#{name}").fill(str(value))


def compare(page: Page, target: Path) -> None:
    """Draw two checkpoints at three strengths."""
    page.goto(f"/compare?run={page.url.rpartition('/')[2]}")
    page.locator("#prompts").fill("\n".join(PROMPTS[:2]))
    page.locator("#strengths").fill("0.4, 0.7, 1")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator("#grid-1 img").first.wait_for()
    page.evaluate("scrollTo(0, 0)")
    take(page, target / "compare.webp")


def take(page: Page, path: Path) -> None:
    """Take a picture once all that it shows is there, and keep it small."""
    page.wait_for_load_state()
    page.wait_for_timeout(1_000)
    with Image.open(io.BytesIO(page.screenshot())) as shot:
        shot.convert("RGB").save(path, "WEBP", quality=QUALITY, method=6)
    print(f"{path.name}: {path.stat().st_size // 1000} KB")  # noqa: T201, told at a terminal


if __name__ == "__main__":
    sys.exit(main())
