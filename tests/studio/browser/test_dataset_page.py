"""The page of a dataset in a real browser: uploads, and captions that save themselves."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from looking import expect, logged_in, looking, needs_chromium
from serving import Served, picture, serving

from studio import datasets

if TYPE_CHECKING:
    from playwright.sync_api import Browser, FilePayload, Page

pytestmark = [pytest.mark.browser, needs_chromium]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Provide one studio for all tests here."""
    with serving(tmp_path_factory.mktemp("studio"), slots="cpu:1") as studio:
        yield studio


@pytest.fixture
def folder(served: Served, tmp_path: Path) -> Path:
    """Provide an empty dataset of the test's own, which is another one if it is tried again."""
    return datasets.create(served.settings, tmp_path.name)


@pytest.fixture
def page(served: Served, browser: Browser, folder: Path) -> Iterator[Page]:
    """Provide its page; anything that the browser complains of fails the test."""
    address = f"/data/{quote(folder.name)}"
    with logged_in(browser, served) as desk, looking(desk, served, address) as shown:
        yield shown


def file(name: str, content: bytes | None = None) -> FilePayload:
    """Make a file as a person would choose it."""
    return {"name": name, "mimeType": "", "buffer": picture() if content is None else content}


def drop(page: Page, files: dict[str, bytes]) -> None:
    """Drop files on the page."""
    contents = {name: base64.b64encode(content).decode() for name, content in files.items()}
    transfer = page.evaluate_handle(
        """(files) => {
          const transfer = new DataTransfer();
          for (const [name, text] of Object.entries(files)) {
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            transfer.items.add(new File([bytes], name));
          }
          return transfer;
        }""",
        contents,
    )
    page.dispatch_event("main", "drop", {"dataTransfer": transfer})


def saved(page: Page, number: int) -> Any:
    """Find what the page says of a caption."""
    return page.locator(f"#caption-{number}-state")


def test_pictures_come_by_button_with_their_captions(page: Page, folder: Path) -> None:
    """Texts of the same names become captions, and the page shows both without a reload."""
    files = [file("b.txt", b"a dog"), file("a.png"), file("b.png"), file("c.txt", b"nobody's")]
    page.set_input_files("#files", files)
    expect(page.locator("#upload-state")).to_have_text("3 added, 1 not")
    expect(page.locator(".caption")).to_have_count(2)
    expect(page.locator("#caption-2")).to_have_value("a dog")
    expect(page.locator("#counts")).to_contain_text("2 images · 1 caption")
    assert (folder / "b.txt").read_text() == "a dog\n"


def test_pictures_come_by_drag(page: Page, folder: Path) -> None:
    """Anywhere on the page, the same as by the button."""
    drop(page, {"猫.png": picture(), "b.jpg": picture("JPEG"), "b.txt": b"a dog"})
    expect(page.locator(".caption")).to_have_count(2)
    assert sorted(path.name for path in folder.iterdir() if path.suffix != "") >= ["b.jpg", "b.txt"]
    assert (folder / "猫.png").read_bytes() == picture()


def test_of_many_uploads_those_that_failed_are_tried_again(page: Page, folder: Path) -> None:
    """Forty files, three of which meet a server in trouble: only these are sent once more."""
    sent: list[str] = []

    def in_trouble(route: Any) -> None:
        name = route.request.url.rpartition("/")[2]
        sent.append(name)
        if name in ("p3.png", "p17.png", "p29.png") and sent.count(name) == 1:
            route.fulfill(
                status=503, json={"detail": "The studio is about to end.", "problems": []}
            )
        else:
            route.continue_()

    page.route(
        "**/images/p*.png",
        lambda route: in_trouble(route) if route.request.method == "PUT" else route.continue_(),
    )
    page.set_input_files("#files", [file(f"p{n}.png", picture(size=(9, 8 + n))) for n in range(40)])
    expect(page.locator("#upload-state")).to_have_text("37 added, 3 not")
    expect(page.locator("#upload-list li")).to_have_count(3)
    page.click("#retry")
    expect(page.locator("#upload-state")).to_have_text("40 added")
    assert len(list(folder.glob("*.png"))) == 40
    assert len(sent) == 43


def test_what_cannot_be_used_is_named_and_not_tried_again(page: Page, folder: Path) -> None:
    """A text that calls itself a picture, and a kind that is not taken."""
    page.set_input_files("#files", [file("a.png", b"no picture"), file("b.gif"), file("c.png")])
    expect(page.locator("#upload-state")).to_have_text("1 added, 2 not")
    told = page.locator("#upload-list").inner_text()
    assert "b.gif\nOnly .png" in told
    assert "a.png\nexpected a whole PNG" in told
    page.click("#dismiss")
    expect(page.locator("#uploads")).to_be_hidden()


def test_a_caption_saves_itself_and_is_taken_back(page: Page, folder: Path) -> None:
    """No button: a pause is enough, and Undo returns what was there."""
    page.set_input_files("#files", [file("a.png"), file("a.txt", b"a cat")])
    page.fill("#caption-1", "a cat on a sofa")
    expect(saved(page, 1)).to_have_text("Saved")
    assert (folder / "a.txt").read_text() == "a cat on a sofa\n"
    page.click("button:text('Undo')")
    expect(page.locator("#caption-1")).to_have_value("a cat")
    assert (folder / "a.txt").read_text() == "a cat\n"


def test_words_written_in_a_hurry_are_all_kept(page: Page, folder: Path) -> None:
    """Whoever leaves the page at once has still saved."""
    page.set_input_files("#files", [file("a.png")])
    page.locator("#caption-1").press_sequentially("a cat on a mat", delay=5)
    page.goto("/data")
    for _ in range(50):
        if (folder / "a.txt").exists():
            break
        page.wait_for_timeout(100)
    assert (folder / "a.txt").read_text() == "a cat on a mat\n"


def test_a_caption_changed_elsewhere_is_shown_beside_ones_own(page: Page, folder: Path) -> None:
    """Neither text is lost, and one click decides."""
    page.set_input_files("#files", [file("a.png"), file("b.png")])
    expect(page.locator(".caption")).to_have_count(2)
    (folder / "a.txt").write_text("theirs")
    page.fill("#caption-1", "mine")
    expect(page.locator(".conflict")).to_contain_text("There it says: theirs")
    expect(page.locator("#caption-1")).to_have_value("mine")
    page.click("text=Keep mine")
    expect(saved(page, 1)).to_have_text("Saved")
    assert (folder / "a.txt").read_text() == "mine\n"
    (folder / "b.txt").write_text("theirs")
    page.fill("#caption-2", "mine")
    page.click("text=Take that")
    expect(page.locator("#caption-2")).to_have_value("theirs")
    assert (folder / "b.txt").read_text() == "theirs"


def test_keys_go_from_caption_to_caption(page: Page, folder: Path) -> None:
    """Ctrl and an arrow, and what was written is saved on the way."""
    page.set_input_files("#files", [file("a.png"), file("b.png")])
    page.locator("#caption-1").fill("one")
    page.keyboard.press("Control+ArrowDown")
    expect(page.locator("#caption-2")).to_be_focused()
    page.keyboard.press("Control+ArrowUp")
    expect(page.locator("#caption-1")).to_be_focused()
    expect(saved(page, 1)).to_have_text("Saved")


def test_a_replacement_is_counted_before_it_is_made(page: Page, folder: Path) -> None:
    """What was just written counts, too."""
    page.set_input_files("#files", [file(name) for name in ("a.png", "b.png")])
    page.fill("#caption-1", "a cat")
    page.fill("#caption-2", "two cats")
    page.click("text=Change captions together")
    expect(saved(page, 2)).to_have_text("Saved")
    page.fill("#former", "cat")
    page.fill("#by", "zkb")
    expect(page.locator("#replace-count")).to_have_text("2 captions")
    page.click("#replace button")
    expect(page.locator("#caption-2")).to_have_value("two zkbs")


def test_a_removed_picture_goes_without_a_reload(page: Page, served: Served, folder: Path) -> None:
    """Its neighbour gets the focus, and it lies in the trash."""
    page.set_input_files("#files", [file("a.png"), file("b.png")])
    page.click("[aria-label='Remove a.png']")
    expect(page.locator(".caption")).to_have_count(1)
    assert list(served.settings.trash.glob("*/a.png"))


def test_a_program_that_writes_captions_is_watched(page: Page, folder: Path) -> None:
    """The page says that it works, and shows its captions when it is done, without a reload."""
    page.set_input_files("#files", [file("a.png", picture(size=(300, 300)))])
    expect(page.locator(".caption")).to_have_count(1)
    page.select_option("#captioner", "template")
    page.fill("#template", "a photo of {trigger}")
    page.fill("#trigger", "zkb")
    page.click("button:text('Write captions')")
    expect(page.locator(".job")).to_be_visible()
    expect(page.locator("#caption-1")).to_have_value("a photo of zkb", timeout=60_000)
    expect(page.locator(".job")).to_have_count(0)


def test_a_phone_shows_all_of_it(page: Page, folder: Path) -> None:
    """No sideways scrolling at 360 pixels."""
    page.set_input_files("#files", [file("a" * 100 + ".png"), file("a" * 100 + ".txt", b"b" * 300)])
    expect(page.locator(".caption")).to_have_count(1)
    page.set_viewport_size({"width": 360, "height": 740})
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 360
