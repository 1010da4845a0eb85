"""Pages that change while one looks: they tell the truth, also after what goes wrong between."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import uvicorn
from acting import acting, is_in, status_when, submitted, wanted, write_dataset, write_repository
from conftest import ROOT
from looking import expect, logged_in, looking, needs_chromium
from serving import Served, bind
from studio_ground import end_all, join, wait_until

from studio.app import create_app
from studio.settings import Settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

pytestmark = [pytest.mark.browser, needs_chromium]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Provide a studio whose runs take a while."""
    with acting(tmp_path_factory.mktemp("live"), switches={"step-seconds": 0.05}) as served:
        yield served


@pytest.fixture
def desk(browser: Browser, studio: Served) -> Iterator[BrowserContext]:
    """Provide a session of the test's own."""
    with logged_in(browser, studio) as context:
        yield context


def step_of(page: Page) -> int:
    """Read the step that a page shows."""
    text = page.locator("#progress-line b").inner_text()
    return int(text.split()[1].replace(",", "")) if text.startswith("Step") else 0


def until(page: Page, true: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something comes true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not so after {seconds:.0f} s"
        page.wait_for_timeout(100)


def test_a_run_moves_by_itself_from_the_queue_to_its_end(
    desk: BrowserContext, studio: Served
) -> None:
    """Step, chart, previews, files, messages and buttons, without a reload (B2, B20, B24)."""
    job_id = submitted(studio, **wanted(steps=120, checkpoint_steps=40, validation_steps=40))
    with looking(desk, studio, f"/runs/{job_id}") as page:
        page.evaluate("window.unchanged = true")
        page.evaluate(
            """() => {
              window.spoken = [];
              new MutationObserver(() => spoken.push(document.getElementById("spoken").textContent))
                .observe(document.getElementById("spoken"), { childList: true });
            }"""
        )
        expect(page).to_have_title(re.compile(r"^\d+ % · imps"))
        expect(page.locator("link[rel=icon]")).to_have_attribute("href", re.compile("^blob:"))
        expect(page.locator("#film a").first).to_be_visible()
        expect(page.locator("#state")).to_contain_text("completed")
        expect(page.locator("#film a")).to_have_count(3)
        expect(page.locator("#files tbody tr")).to_have_count(4)
        expect(page.get_by_role("link", name="Download", exact=True).first).to_be_visible()
        expect(page.locator("#messages")).to_contain_text("Checkpoint at step")
        expect(page.locator("#chart-told")).to_contain_text("over 120 steps")
        assert page.evaluate("document.querySelector('#hero-picture').src").endswith("step_120.png")
        assert page.evaluate("window.unchanged")
        assert 1 <= len(page.evaluate("window.spoken")) <= 12
        expect(page).to_have_title("imps · LoRA Studio")


def test_a_reload_shows_the_same(desk: BrowserContext, studio: Served) -> None:
    """Nothing of what is seen lives in the page alone (B3)."""
    job_id = submitted(studio, **wanted(steps=40, checkpoint_steps=20, validation_steps=20))
    with looking(desk, studio, f"/runs/{job_id}") as page:
        expect(page.locator("#state")).to_contain_text("completed")
        expect(page.locator("#film a")).to_have_count(2)
        expect(page.locator("#messages li").last).to_contain_text("Complete")
        expect(page.locator("#files tbody tr")).to_have_count(3)
        parts = ("#progress-line", "#film", "#files", "#messages", "#actions", "#chart-told")
        before = [page.locator(part).inner_text() for part in parts]
        page.reload()
        assert [page.locator(part).inner_text() for part in parts] == before


def checkpoints_told(page: Page) -> int:
    """Count what the messages say of checkpoints."""
    return page.locator("#messages li", has_text="Checkpoint at").count()


HIDDEN = """
  window.away = false;
  Object.defineProperty(Document.prototype, "hidden", { get: () => away });
  window.hide = (value) => {
    away = value;
    document.dispatchEvent(new Event("visibilitychange"));
  };
"""


def readers(studio: Served, job_id: str) -> int:
    """Count the streams that tell of a job."""
    watch = studio.app.state.hub.watched.get(job_id)
    return watch.readers if watch else 0


def test_a_tab_that_nobody_looks_at_gives_its_connection_back(
    desk: BrowserContext, studio: Served
) -> None:
    """After a minute; seen again, it knows all that it has missed (B7)."""
    job_id = submitted(studio, **wanted(steps=200, checkpoint_steps=20, validation_steps=200))
    desk.add_init_script(HIDDEN)
    with looking(desk, studio, "/machine") as page:
        page.clock.install()
        page.goto(f"/runs/{job_id}")
        until(page, lambda: readers(studio, job_id) == 1)
        page.evaluate("hide(true)")
        page.clock.fast_forward(61_000)
        until(page, lambda: readers(studio, job_id) == 0)
        status_when(studio, job_id, is_in("completed"))
        page.evaluate("hide(false)")
        page.clock.run_for(3_000)
        expect(page.locator("#messages li").last).to_contain_text("Complete")
        assert checkpoints_told(page) == 10


def test_many_tabs_leave_a_connection_for_the_next(desk: BrowserContext, studio: Served) -> None:
    """Hidden ones step back at once for the one that is seen (B6)."""
    job_id = submitted(studio, **wanted(steps=400, checkpoint_steps=400, validation_steps=400))
    desk.add_init_script(HIDDEN)
    tabs = []
    for _ in range(7):
        tab = desk.new_page()
        tab.goto(f"/runs/{job_id}")
        tab.evaluate("hide(true)")
        tabs.append(tab)
    with looking(desk, studio, f"/runs/{job_id}") as page:
        until(page, lambda: step_of(page) > 0)
        until(page, lambda: readers(studio, job_id) <= 2)
    for tab in tabs:
        tab.close()
    studio.client.post(f"/jobs/{job_id}/stop", json={})


def test_a_run_is_stopped_and_continued_by_buttons(desk: BrowserContext, studio: Served) -> None:
    """While it saves, the button says so; then the page says from where it goes on (B8)."""
    job_id = submitted(studio, **wanted(steps=300, checkpoint_steps=300, validation_steps=300))
    with looking(desk, studio, f"/runs/{job_id}") as page:
        until(page, lambda: step_of(page) > 5)
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#state")).to_contain_text("stopped")
        expect(page.locator("#outcome")).to_contain_text("continues from step")
        stopped = step_of(page)
        page.get_by_label("Continue to").fill(str(stopped + 10))
        page.get_by_role("button", name="Continue").click()
        expect(page.locator("#state")).to_contain_text("completed")
        assert step_of(page) == stopped + 10


NOTICES = """
  window.told = [];
  window.asked = 0;
  window.Notification = class {
    static permission = "default";
    static async requestPermission() {
      asked += 1;
      return "granted";
    }
    constructor(title) {
      told.push(title);
    }
  };
"""


def test_who_asks_for_it_is_told_when_it_ends(desk: BrowserContext, studio: Served) -> None:
    """The browser is asked for leave on a click alone (B24)."""
    job_id = submitted(studio, **wanted(steps=400, checkpoint_steps=400, validation_steps=400))
    desk.add_init_script(NOTICES)
    with looking(desk, studio, f"/runs/{job_id}") as page:
        until(page, lambda: step_of(page) > 2)
        assert page.evaluate("asked") == 0
        page.get_by_role("button", name="Tell me when it ends").click()
        expect(page.locator("#notify")).to_have_text("You will be told when it ends")
        studio.client.post(f"/jobs/{job_id}/stop", json={})
        expect(page.locator("#notify")).to_be_hidden()
        assert page.evaluate("told") == ["imps: stopped"]


def test_the_list_moves_by_itself(desk: BrowserContext, studio: Served) -> None:
    """A run goes from what runs to what has ended, and its row tells how far it is."""
    job_id = submitted(studio, **wanted(steps=100, checkpoint_steps=100, validation_steps=50))
    with looking(desk, studio, "/") as page:
        page.evaluate("window.unchanged = true")
        row = page.locator(f"#job-{job_id}")
        expect(row).to_contain_text("Step ")
        expect(row).to_have_attribute("data-state", "completed")
        expect(row).to_contain_text("100 steps")
        assert page.evaluate("window.unchanged")


def test_a_preview_is_asked_for_by_button(desk: BrowserContext, studio: Served) -> None:
    """The request lies where the trainer looks for it, and the page stays."""
    job_id = submitted(studio, **wanted(steps=300, checkpoint_steps=300, validation_steps=300))
    with looking(desk, studio, f"/runs/{job_id}") as page:
        until(page, lambda: step_of(page) > 5)
        page.get_by_role("button", name="Preview now").click()
        page.wait_for_load_state()
        asked = studio.settings.job(job_id) / "output" / "request.json"
        assert asked.read_text("utf-8").count("preview") == 1
    studio.client.post(f"/jobs/{job_id}/stop", json={})


def test_the_log_is_read_on_while_it_is_open(desk: BrowserContext, studio: Served) -> None:
    """As the program wrote it, and without what would move a terminal's cursor."""
    job_id = submitted(studio, **wanted(steps=300, checkpoint_steps=300, validation_steps=300))
    with looking(desk, studio, f"/runs/{job_id}") as page:
        until(page, lambda: step_of(page) > 2)
        page.get_by_text("Log", exact=True).click()
        log = studio.settings.job(job_id) / "attempts" / "1" / "stderr.log"
        with log.open("ab") as file:
            file.write(b"\x1b[31m<b>Careful</b>\x1b[0m\n")
        expect(page.locator("#log-text")).to_have_text("<b>Careful</b>")
        studio.client.post(f"/jobs/{job_id}/stop", json={})
        expect(page.locator("#state")).to_contain_text("stopped")
        page.reload()
        expect(page.locator("#log-text")).to_have_text("<b>Careful</b>")


# --- The service goes away under an open page ---


class Service:
    """A studio that can be ended and started again, on the same port and root."""

    def __init__(self, folder: Path) -> None:
        """Start it, with a dataset and runs that take a while."""
        repository = write_repository(folder / "repository", **{"step-seconds": 0.05})
        write_dataset(folder / "root" / "datasets" / "imps")
        with bind() as listener:
            port = listener.getsockname()[1]
        roots = (ROOT / "examples",)
        self.settings = Settings(
            folder / "root", port=port, repository=repository, slots="cpu:1", allowed_roots=roots
        )
        self.start()

    def start(self) -> None:
        """Serve until it is ended."""
        self.app = create_app(self.settings)
        config = uvicorn.Config(self.app, log_level="warning", port=self.settings.port)
        config.timeout_graceful_shutdown = 1
        self.server = self.app.state.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started or not self.thread.is_alive())
        assert self.server.started  # or the port was taken meanwhile

    def end(self) -> None:
        """End it; what runs goes on."""
        self.server.should_exit = True
        join(self.thread)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """Provide one that is ended with all that it has started."""
    made = Service(tmp_path)
    yield made
    made.end()
    end_all(made.settings)


def test_a_page_recovers_when_the_service_was_restarted(browser: Browser, service: Service) -> None:
    """Training went on meanwhile, and the page tells so without a reload (B5)."""
    headers = {"Authorization": f"Bearer {service.settings.token}"}
    with httpx.Client(base_url=service.settings.url, headers=headers, timeout=60) as client:
        served = Served(service.settings, service.app, client)
        job_id = submitted(served, **wanted(steps=300, checkpoint_steps=50, validation_steps=100))
        with logged_in(browser, served) as desk, looking(desk, served, f"/runs/{job_id}") as page:
            page.evaluate("window.unchanged = true")
            until(page, lambda: step_of(page) > 5)
            service.end()
            expect(page.locator("#banner")).to_be_visible()
            service.start()
            expect(page.locator("#banner")).to_be_hidden()
            expect(page.locator("#state")).to_contain_text("completed")
            expect(page.locator("#messages li").last).to_contain_text("Complete")
            assert checkpoints_told(page) == 6
            assert page.evaluate("window.unchanged")


# --- The network goes away ---

KEPT_PLOT = """
  Object.defineProperty(window, "uPlot", {
    configurable: true,
    get: () => window.plotClass,
    set: (plain) => {
      window.plotClass = class extends plain {
        constructor(...all) {
          super(...all);
          window.plot = this;
        }
      };
    },
  });
"""


def test_a_page_that_was_offline_catches_up_without_a_gap(
    desk: BrowserContext, studio: Served
) -> None:
    """It says that it is, and then has every checkpoint and every point once (B4)."""
    job_id = submitted(studio, **wanted(steps=200, checkpoint_steps=20, validation_steps=200))
    desk.add_init_script(KEPT_PLOT)
    with looking(desk, studio, f"/runs/{job_id}") as page:
        page.evaluate("window.unchanged = true")
        until(page, lambda: step_of(page) > 5)
        desk.set_offline(True)
        page.wait_for_timeout(5_000)
        expect(page.locator("#banner")).to_be_visible()
        desk.set_offline(False)
        expect(page.locator("#banner")).to_be_hidden()
        expect(page.locator("#state")).to_contain_text("completed")
        expect(page.locator("#messages li").last).to_contain_text("Complete")
        assert checkpoints_told(page) == 10
        until(page, lambda: page.evaluate("plot.data[0].at(-1)") == 200)
        drawn = page.evaluate("plot.data[0]")
        told = studio.client.get(f"/jobs/{job_id}/metrics?points=800").json()["steps"]
        assert drawn == told
        assert page.evaluate("window.unchanged")


def test_the_loss_on_images_held_back_is_drawn_as_it_is_measured(
    desk: BrowserContext, studio: Served
) -> None:
    """Beside the loss, without a reload, each point at its step."""
    asked = wanted(steps=80, checkpoint_steps=20, validation_steps=20, validation_split=1)
    job_id = submitted(studio, **asked)
    desk.add_init_script(KEPT_PLOT)
    with looking(desk, studio, f"/runs/{job_id}") as page:
        page.evaluate("window.unchanged = true")
        expect(page.locator("#state")).to_contain_text("completed")
        expect(page.locator("#chart-told")).to_contain_text("It was least at step 40")
        points = "window.plot?.data[0].filter((_, at) => plot.data[3][at] !== null)"
        until(page, lambda: page.evaluate(points) == [20, 40, 60, 80])
        assert page.evaluate("window.unchanged")
        page.reload()
        until(page, lambda: page.evaluate(points) == [20, 40, 60, 80])


# --- Much of everything ---


def held(page: Page) -> tuple[float, float]:
    """Tell how many MiB of objects and how many nodes a page holds, what is dropped apart."""
    session = page.context.new_cdp_session(page)
    session.send("HeapProfiler.collectGarbage")
    session.send("Performance.enable")
    found = {
        each["name"]: each["value"] for each in session.send("Performance.getMetrics")["metrics"]
    }
    session.detach()
    return found["JSHeapUsedSize"] / 2**20, found["Nodes"]


@pytest.mark.slow
def test_a_page_that_is_left_open_does_not_grow(browser: Browser, tmp_path: Path) -> None:
    """From its first third to the end of a run of three thousand steps (B22, shortened)."""
    with (
        acting(tmp_path, switches={"step-seconds": 0.004}) as studio,
        logged_in(browser, studio) as desk,
    ):
        asked = wanted(steps=3000, checkpoint_steps=3000, validation_steps=3000)
        job_id = submitted(studio, **asked)
        with looking(desk, studio, f"/runs/{job_id}") as page:
            until(page, lambda: step_of(page) >= 1000)
            early, few = held(page)
            expect(page.locator("#state")).to_contain_text("completed")
            late, many = held(page)
            assert late - early < 4
            assert many - few < 1_000


def test_ten_thousand_messages_leave_the_page_quick(desk: BrowserContext, studio: Served) -> None:
    """The list is kept short, and no tick holds the page up for long (B21)."""
    job_id = submitted(studio, **wanted(steps=5, checkpoint_steps=5, validation_steps=5))
    status_when(studio, job_id, is_in("completed"))
    stream = studio.settings.job(job_id) / "attempts" / "1" / "stdout.jsonl"
    line = stream.read_bytes().splitlines(keepends=True)[-1]
    told = [
        json.dumps({"type": "warning", "message": f"Number {n}", "code": "x", "data": {}}).encode()
        for n in range(10_000)
    ]
    with stream.open("ab") as file:
        file.write(b"\n".join([*told, b""]) + line)
    studio.app.state.hub.forget(job_id)
    with looking(desk, studio, f"/runs/{job_id}") as page:
        expect(page.locator("#messages li").last).to_contain_text("Complete")
        assert page.locator("#messages li").count() <= 1_000
