"""All pages in a real browser: on any screen, in any light, by keyboard, from nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from typing import TYPE_CHECKING

import pytest
from acting import acting, is_in, status_when, submitted, wanted
from looking import DESK, PHONE, expect, logged_in, looking, needs_chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page
    from serving import Served

pytestmark = [pytest.mark.browser, needs_chromium]

HOSTILE = '"><img src=x onerror=alert(1)>{{7*7}}<script>alert(2)</script>'
PAGES = (
    "/",
    "/data",
    "/data/imps",
    "/new",
    "/compare",
    "/machine",
    "/runs/{run}",
    "/compare?run={run}",
)
SERIOUS = ("serious", "critical")
AXE = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text("utf-8")
WIDTH = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
# Elements without a visible ring would leave those who use no mouse in the dark.
RING = """() => {
  const style = getComputedStyle(document.activeElement);
  return style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0;
}"""


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Provide a studio with something on every page, some of it with hostile names."""
    with acting(tmp_path_factory.mktemp("looks")) as served:
        (served.settings.datasets / "imps" / "0.txt").write_text(HOSTILE)
        yield served


@pytest.fixture(scope="module")
def run(studio: Served) -> str:
    """Provide a finished run whose name and prompts are hostile."""
    config = wanted(sample_prompts=[HOSTILE, "a cat"], trigger_words=[HOSTILE])
    job_id = submitted(studio, **config, name=HOSTILE[:90])
    status_when(studio, job_id, is_in("completed"))
    return job_id


@pytest.fixture(scope="module")
def desk(browser: Browser, studio: Served) -> Iterator[BrowserContext]:
    """Provide a session at a desk."""
    with logged_in(browser, studio) as context:
        yield context


@pytest.mark.parametrize("address", PAGES)
def test_no_page_asks_another_host_or_breaks_the_policy(
    desk: BrowserContext, studio: Served, run: str, address: str
) -> None:
    """Nor says the browser anything against it, and hostile names are text (B14, B15)."""
    with looking(desk, studio, address.format(run=run)) as page:
        page.wait_for_load_state(
            "networkidle"
        ) if "/runs/" not in address else page.wait_for_timeout(500)
        assert page.locator("img[src='x']").count() == 0
        assert page.locator("h1").count() == 1


@pytest.mark.parametrize("address", PAGES)
def test_no_page_is_wider_than_its_window(
    desk: BrowserContext, studio: Served, run: str, address: str
) -> None:
    """On phones and at twice the size, which halves the window: what is wide scrolls (B16)."""
    with looking(desk, studio, address.format(run=run)) as page:
        for width in (3840, DESK["width"] // 2, PHONE["width"], 320):
            page.set_viewport_size({"width": width, "height": 740})
            assert page.evaluate(WIDTH) <= 0, width


@pytest.mark.parametrize("address", [*PAGES, "/runs/NOPE"])
def test_axe_finds_nothing_serious(
    desk: BrowserContext, studio: Served, run: str, address: str
) -> None:
    """On any page, in both themes: contrast, names, roles and order (B18)."""
    with looking(desk, studio, address.format(run=run)) as page:
        page.emulate_media(color_scheme="light", reduced_motion="reduce")
        found = violations(page)
        page.emulate_media(color_scheme="dark")
        assert found + violations(page, "color-contrast") == []


def violations(page: Page, *rules: str) -> list[str]:
    """Let axe judge a page, by all rules or by some."""
    page.evaluate(AXE)
    options = {"resultTypes": ["violations"], **({"runOnly": list(rules)} if rules else {})}
    result = page.evaluate("(options) => axe.run(document, options)", options)
    bad = [each for each in result["violations"] if each["impact"] in SERIOUS]
    return [f"{each['id']} {[n['html'][:160] for n in each['nodes'][:3]]}" for each in bad]


def test_the_login_page_is_sound_too(browser: Browser, studio: Served) -> None:
    """It is the first that anyone sees; a wrong token is told."""
    context = browser.new_context(base_url=studio.settings.url, viewport=PHONE)
    with looking(context, studio, "/machine") as page:
        expect(page).to_have_url(f"{studio.settings.url}/login?next=%2Fmachine")
        page.get_by_label("Token").fill("wrong")
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("alert")).to_be_visible()
        assert violations(page) == []
        page.get_by_label("Token").fill(studio.settings.token)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_have_text("What is on this machine")
    context.close()


@pytest.mark.parametrize("address", ["/", "/new", "/runs/{run}", "/compare?run={run}"])
def test_all_that_can_be_used_is_reached_by_tab_and_seen(
    desk: BrowserContext, studio: Served, run: str, address: str
) -> None:
    """In the order of reading; the first key leads past the frame (B19)."""
    with looking(desk, studio, address.format(run=run)) as page:
        page.wait_for_timeout(300)
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
        seen = []
        for _ in range(12):
            page.keyboard.press("Tab")
            seen.append(page.evaluate("document.activeElement.outerHTML.slice(0, 80)"))
            assert page.evaluate(RING), seen[-1]
        assert len(set(seen)) == len(seen)


def test_a_picture_opens_large_and_keys_walk_through_the_grid(
    desk: BrowserContext, studio: Served, run: str
) -> None:
    """Arrows by step and prompt, space back to the first, Escape closes (B23)."""
    with looking(desk, studio, f"/compare?run={run}") as page:
        first = page.locator("#previews a").first
        first.focus()
        page.keyboard.press("Enter")
        told = page.locator("#viewer-told")
        expect(told).to_contain_text("step 4 ·")
        page.keyboard.press("ArrowRight")
        expect(told).to_contain_text("step 8 ·")
        page.keyboard.press("ArrowDown")
        expect(told).to_contain_text("a cat")
        page.keyboard.down(" ")
        expect(told).to_contain_text("step 4 ·")
        page.keyboard.up(" ")
        expect(told).to_contain_text("a cat")
        page.keyboard.press("Escape")
        expect(page.locator("#viewer")).to_be_hidden()
        assert page.evaluate("document.activeElement.matches('#previews a')")


def test_the_theme_is_chosen_by_button_and_stays(desk: BrowserContext, studio: Served) -> None:
    """Against what the system says."""
    with looking(desk, studio, "/machine") as page:
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.get_by_role("button", name="Dark").click()
        page.wait_for_load_state()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
        expect(page.get_by_role("button", name="Dark")).to_have_attribute("aria-pressed", "true")
        page.get_by_role("button", name="Auto").click()
        page.wait_for_load_state()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == light


def test_forced_colours_leave_everything_visible(
    browser: Browser, studio: Served, run: str
) -> None:
    """Where people choose the colours, buttons have edges and progress is seen (B17)."""
    with (
        logged_in(browser, studio, forced_colors="active") as context,
        looking(context, studio, f"/runs/{run}") as page,
    ):
        border = "getComputedStyle(document.querySelector('.button')).borderTopWidth"
        assert page.evaluate(border) != "0px"
        assert page.evaluate("document.querySelector('progress').clientHeight") > 2


def test_no_other_site_shows_the_studio_in_a_frame(browser: Browser, studio: Served) -> None:
    """A page around it could lead clicks astray (S24)."""
    with logged_in(browser, studio) as context:
        page = context.new_page()
        page.goto("about:blank")
        page.set_content(f'<iframe src="{studio.settings.url}/"></iframe>')
        page.wait_for_timeout(500)
        assert page.frames[1].url == "chrome-error://chromewebdata/"
