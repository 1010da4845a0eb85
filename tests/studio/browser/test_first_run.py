"""From an empty studio to a LoRA in a real browser: by keyboard alone, and without any script."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from acting import MODEL, acting, is_in, status_when, submitted, wanted
from looking import PHONE, expect, logged_in, looking, needs_chromium
from serving import picture
from test_pages import planted

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Locator, Page
    from serving import Served

pytestmark = [pytest.mark.browser, needs_chromium]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Provide a studio."""
    with acting(tmp_path_factory.mktemp("first")) as served:
        yield served


@pytest.fixture
def desk(browser: Browser, studio: Served) -> Iterator[BrowserContext]:
    """Provide a session of the test's own."""
    with logged_in(browser, studio) as context:
        yield context


def press(page: Page, target: Locator, key: str = "Enter") -> None:
    """Use a control as those do who have no mouse."""
    target.focus()
    page.keyboard.press(key)


def type_into(page: Page, label: str, text: str) -> None:
    """Fill a field in by keyboard."""
    page.get_by_label(label, exact=True).focus()
    page.keyboard.press("Control+a")
    page.keyboard.type(text)


@pytest.fixture
def empty(browser: Browser, tmp_path: Path) -> Iterator[tuple[Served, BrowserContext]]:
    """Provide a studio in which nothing was done yet, and a session with it."""
    with acting(tmp_path) as studio, logged_in(browser, studio) as context:
        yield studio, context


def test_from_nothing_to_a_file_by_keyboard(empty: tuple[Served, BrowserContext]) -> None:
    """An empty page, a dataset, pictures, a form, a run, a download (B1)."""
    studio, context = empty
    with looking(context, studio, "/") as page:
        press(page, page.get_by_role("link", name="Datasets").last)
        add_pictures(page)
        press(page, page.get_by_role("link", name="Train"))
        fill_in(page)
        press(page, page.get_by_role("button", name="Start"))
        expect(page.locator("#state")).to_contain_text("completed")
        link = page.get_by_role("link", name="Download", exact=True).first
        with page.expect_download() as download:
            press(page, link)
        assert download.value.suggested_filename == "cats.safetensors"
        assert Path(download.value.path()).stat().st_size > 0


def add_pictures(page: Page) -> None:
    """Make a dataset of four pictures."""
    name = page.get_by_role("textbox").first
    name.focus()
    page.keyboard.type("cats")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("cats")
    files = [{"name": f"{n}.png", "mimeType": "image/png", "buffer": picture()} for n in "abcd"]
    page.get_by_text("Add images…").wait_for()  # the script is there
    page.set_input_files("#files", files)  # type: ignore[arg-type]
    expect(page.locator(".caption")).to_have_count(4)


def fill_in(page: Page) -> None:
    """Fill the form in, and wait for what the trainer says."""
    expect(page.get_by_label("Dataset", exact=True)).to_have_value("cats")
    type_into(page, "Base model", str(MODEL))
    type_into(page, "Trigger words", "zkb cat")
    type_into(page, "Steps", "12")
    type_into(page, "Resolution", "256")
    expect(page.locator("#check")).to_contain_text("4 images")
    expect(page.locator("#check")).to_contain_text("Fits")


def test_a_bad_value_is_told_beside_its_field_while_one_types(
    desk: BrowserContext, studio: Served
) -> None:
    """And goes away when it is mended; Enter in a field starts nothing (B10)."""
    with looking(desk, studio, "/new?dataset=imps") as page:
        type_into(page, "Base model", str(MODEL))
        type_into(page, "Trigger words", "zkb")
        type_into(page, "Resolution", "500")
        page.keyboard.press("Enter")
        told = page.locator("#resolution-problem")
        expect(told).to_contain_text("multiple of 8")
        field = page.get_by_label("Resolution", exact=True)
        expect(field).to_have_attribute("aria-invalid", "true")
        assert "resolution-problem" in str(field.get_attribute("aria-describedby"))
        press(page, page.locator("#check a").first)
        assert page.evaluate("document.activeElement.id") == "resolution"
        type_into(page, "Resolution", "256")
        expect(page.locator("#check")).to_contain_text("Fits")
        expect(told).to_be_hidden()
        expect(page).to_have_url(f"{studio.settings.url}/new?dataset=imps")


def test_what_cannot_start_comes_back_with_the_focus_on_the_reasons(
    desk: BrowserContext, studio: Served
) -> None:
    """A summary with links, and nothing of what was typed is lost (B10)."""
    with looking(desk, studio, "/new?dataset=imps") as page:
        type_into(page, "Base model", str(MODEL))
        type_into(page, "Trigger words", "zkb")
        type_into(page, "Steps", "many")
        press(page, page.get_by_role("button", name="Start"))
        expect(page.get_by_role("alert")).to_contain_text("It was not started")
        assert page.evaluate("document.activeElement.id") == "problems"
        expect(page.get_by_label("Steps", exact=True)).to_have_value("many")


def test_a_setting_is_found_by_what_others_call_it(desk: BrowserContext, studio: Served) -> None:
    """Its group opens; what does not match is out of the way."""
    with looking(desk, studio, "/new") as page:
        page.get_by_label("Find a setting").fill("network_alpha")
        expect(page.get_by_label("LoRA alpha", exact=True)).to_be_visible()
        expect(page.locator("#found")).to_have_text("1 setting found")
        page.get_by_label("Find a setting").fill("")
        expect(page.get_by_label("LoRA alpha", exact=True)).to_be_hidden()


def test_a_draft_outlives_the_page(desk: BrowserContext, studio: Served) -> None:
    """Until the run is started; a form that came from a run is not overwritten by it."""
    with looking(desk, studio, "/new") as page:
        type_into(page, "Name of the run", "Half done")
        page.goto("/machine")
        page.goto("/new")
        expect(page.get_by_label("Name of the run")).to_have_value("Half done")
        page.goto("/new?dataset=imps")
        expect(page.get_by_label("Name of the run")).to_have_value("")


def test_a_failed_run_leads_to_the_field_to_change(desk: BrowserContext, studio: Served) -> None:
    """In a form filled in with the run's own settings, the field has the focus (B9)."""
    problem = {"path": "lora_dropout", "expected": "0", "found": "0.5", "hint": "Less."}
    error = {"code": "config_conflict", "message": "No.", "hint": "Mend.", "problems": [problem]}
    config = {"lora_dropout": 0.5, "steps": 77}
    job_id = planted(studio, "failed", step=3, error=error, config=config)
    with looking(desk, studio, f"/runs/{job_id}") as page:
        press(page, page.get_by_role("link", name="LoRA dropout"))
        expect(page.get_by_label("LoRA dropout", exact=True)).to_be_focused()
        expect(page.get_by_label("LoRA dropout", exact=True)).to_have_value("0.5")
        expect(page.get_by_label("Steps", exact=True)).to_have_value("77")


def test_all_works_without_a_script(browser: Browser, studio: Served) -> None:
    """The list, the form with its problems, a run with its curve, and stopping it (B25)."""
    with (
        logged_in(browser, studio, java_script_enabled=False, viewport=PHONE) as context,
        looking(context, studio, "/new?dataset=imps") as page,
    ):
        page.get_by_label("Base model", exact=True).fill(str(MODEL))
        page.get_by_label("Trigger words", exact=True).fill("zkb")
        page.get_by_label("Resolution", exact=True).fill("500")
        page.get_by_role("button", name="Start").click()
        expect(page.locator("#resolution-problem")).to_contain_text("multiple of 8")
        page.get_by_label("Resolution", exact=True).fill("256")
        page.get_by_label("Steps", exact=True).fill("2000")
        page.get_by_role("button", name="Start").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("imps")
        page.get_by_role("button", name="Stop").click()
        job_id = page.url.rpartition("/")[2]
        status_when(studio, job_id, is_in("stopped", "cancelled"))
        page.goto("/")
        expect(page.locator(f"#job-{job_id}")).to_contain_text("stopped")


def test_a_run_without_a_script_shows_its_curve_and_pictures(
    browser: Browser, studio: Served
) -> None:
    """Drawn by the server (B25)."""
    job_id = submitted(studio, **wanted())
    status_when(studio, job_id, is_in("completed"))
    with (
        logged_in(browser, studio, java_script_enabled=False) as context,
        looking(context, studio, f"/runs/{job_id}") as page,
    ):
        expect(page.locator("#chart polyline")).to_be_visible()
        expect(page.locator("#film img")).to_have_count(3)
        expect(page.locator("#hero-picture")).to_be_visible()
