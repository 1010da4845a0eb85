"""The pages of datasets without a script, and the jobs that work on a dataset."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from serving import Served, picture, serving
from studio_ground import wait_until

from studio import datasets

if TYPE_CHECKING:
    import httpx

NUMBERS = itertools.count()
HTML = {"Accept": "text/html"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Provide one studio for all tests here."""
    with serving(tmp_path_factory.mktemp("studio"), slots="cpu:1") as studio:
        yield studio


@pytest.fixture
def cat(served: Served) -> Path:
    """Provide a dataset of three pictures, two of which have captions."""
    folder = datasets.create(served.settings, f"cat & {next(NUMBERS)}")
    for number in (1, 2, 3):
        (folder / f"a#{number}.png").write_bytes(picture(size=(60 + number, 64)))
    (folder / "a#1.txt").write_text("cat, grass\n")
    (folder / "a#2.txt").write_text("cat, sofa\n")
    return folder


def show(served: Served, folder: Path, **query: Any) -> str:
    """Get the page of a dataset, as a person reads it."""
    answer = served.client.get(f"/data/{quote(folder.name)}", params=query, headers=HTML)
    assert answer.status_code == 200
    return unescape(answer.text)


def send(served: Served, folder: Path, what: str, **form: str) -> httpx.Response:
    """Send a form of the page."""
    return served.client.post(f"/data/{quote(folder.name)}/{what}", data=form, headers=HTML)


def etag_of(text: str, name: str) -> str:
    """Find in the page which caption it was made with."""
    found = re.search(rf'data-name="{name}" data-etag="(\w+)"', text)
    assert found
    return found[1]


def test_a_dataset_is_made_and_listed(served: Served) -> None:
    """The list leads to its page, whatever the name."""
    answer = served.client.post("/data", data={"name": " Größe! no "})
    assert (answer.status_code, answer.headers["location"]) == (
        303,
        "/data/Gr%C3%B6%C3%9Fe%21%20no",
    )
    listed = served.client.get("/data", headers=HTML).text
    assert 'href="/data/Gr%C3%B6%C3%9Fe%21%20no"' in listed
    assert "<b>Größe! no</b>" in listed


def test_a_name_that_will_not_do_is_explained(served: Served) -> None:
    """A person gets a page that says what a name may be."""
    answer = served.client.post("/data", data={"name": "a/b"}, headers=HTML)
    assert answer.status_code == 422
    assert "none of / \\ : * ?" in unescape(answer.text)


def test_captions_are_saved_without_a_script(served: Served, cat: Path) -> None:
    """The form goes back to the part of the dataset that it came from."""
    tag = etag_of(show(served, cat), "a#1.png")
    form = {"text": "a cat\r\non grass", "etag": tag, "page": "1", "filter": "grass"}
    answer = send(served, cat, f"captions/{quote('a#1.png')}", **form)
    assert answer.status_code == 303
    assert answer.headers["location"] == f"/data/{quote(cat.name)}?page=1&filter=grass"
    assert (cat / "a#1.txt").read_text() == "a cat\non grass\n"


def test_two_people_who_write_one_caption_see_both(served: Served, cat: Path) -> None:
    """The second one gets both texts, and can keep either."""
    tag = etag_of(show(served, cat), "a#1.png")
    (cat / "a#1.txt").write_text("theirs <b>\n")
    path = f"captions/{quote('a#1.png')}"
    answer = send(served, cat, path, text="mine", etag=tag)
    assert answer.status_code == 412
    assert ">theirs &lt;b&gt;</textarea>" in answer.text
    assert ">mine</textarea>" in answer.text
    found = re.search(r'name="etag" value="(\w+)"', answer.text)
    assert found
    assert send(served, cat, path, text="mine", etag=found[1]).status_code == 303
    assert (cat / "a#1.txt").read_text() == "mine\n"


def test_bulk_changes_and_undo_work_without_a_script(served: Served, cat: Path) -> None:
    """The page says what was changed last, and a button takes it back."""
    send(served, cat, "change", former="cat", by="<zkb>")
    send(served, cat, "change", prefix="photo of", filter="sofa")
    assert (cat / "a#2.txt").read_text() == "photo of, <zkb>, sofa\n"
    assert "Last change: “photo of” put in front in 1 captions" in show(served, cat)
    send(served, cat, "undo")
    assert "Last change: “cat” replaced by “<zkb>” in 2 captions" in show(served, cat)
    send(served, cat, "undo")
    assert (cat / "a#2.txt").read_text() == "cat, sofa\n"
    assert "Last change" not in show(served, cat)


def test_names_and_captions_are_shown_as_text(served: Served, cat: Path) -> None:
    """No name and no caption becomes a part of the page, and no template is run."""
    evil = "'><img src=x onerror=alert(1)>{{7*7}}"
    (cat / f"{evil}.png").write_bytes(picture())
    (cat / f"{evil}.txt").write_text(evil * 2)
    answer = served.client.get(f"/data/{quote(cat.name)}", params={"filter": evil}, headers=HTML)
    assert "<img src=x" not in answer.text
    assert unescape(answer.text).count("{{7*7}}") >= 3


def test_pictures_and_datasets_are_removed_without_a_script(served: Served, cat: Path) -> None:
    """Both go to the trash."""
    send(served, cat, f"images/{quote('a#1.png')}/remove")
    assert sorted(path.name for path in cat.glob("a#1*")) == []
    answer = send(served, cat, "remove")
    assert (answer.status_code, answer.headers["location"]) == (303, "/data")
    assert not cat.exists()


def test_a_large_dataset_has_pages(served: Served, cat: Path) -> None:
    """Sixty pictures each; a filter is carried along."""
    for number in range(120):
        (cat / f"b{number}.png").write_bytes(picture(size=(8, 8)))
    first = show(served, cat, filter=".png")
    assert first.count("<textarea") == 60
    assert f'href="/data/{quote(cat.name)}?page=2&filter=.png"' in first
    assert "Page 3 of 3" in show(served, cat, page=3)


def newest(served: Served, kind: str) -> dict[str, Any]:
    """Return the newest job of a kind, once it has ended."""

    def jobs() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = served.client.get(f"/jobs?kind={kind}").json()["jobs"]
        return found

    wait_until(lambda: jobs()[0]["ended_at"] is not None, 60)
    return jobs()[0]


def test_captions_are_written_by_template_and_taken_back(served: Served, cat: Path) -> None:
    """The tool writes what is missing; the page shows it at work, and one undo ends it."""
    form = {"captioner": "template", "template": "a photo of {trigger}", "prefix": "zkb"}
    assert send(served, cat, "caption", **form).status_code == 303
    answer = served.client.delete(f"/datasets/{quote(cat.name)}")
    assert answer.status_code == 409
    assert newest(served, "caption")["state"] == "completed"
    assert (cat / "a#3.txt").read_text() == "a photo of zkb\n"
    assert (cat / "a#1.txt").read_text() == "cat, grass\n"
    send(served, cat, "undo")
    assert not (cat / "a#3.txt").exists()


def test_the_report_of_the_tool_stands_beside_the_pictures(served: Served, cat: Path) -> None:
    """A check is a job; what it finds is on the page when it is done."""
    assert send(served, cat, "check", resolution="256").status_code == 303
    assert newest(served, "prepare")["state"] == "completed"
    text = show(served, cat)
    assert "3 images looked at" in text
    assert "Only 3 pictures" in text
    shown = served.client.get(f"/datasets/{quote(cat.name)}").json()
    assert any("duplicate" in " ".join(image["flags"]) for image in shown["images"])


def test_a_job_that_failed_is_not_passed_over(served: Served, cat: Path) -> None:
    """The page says why, until a later one of its kind does better."""
    for template in ("{nonsense}", "a zkb"):
        form = {"captioner": "template", "template": template}
        assert send(served, cat, "caption", **form).status_code == 303
        assert newest(served, "caption")["state"] == ("failed" if "{" in template else "completed")
        told = show(served, cat)
        assert ("{nonsense}" in told) == (template == "{nonsense}")


@pytest.mark.parametrize(
    ("what", "form", "path"),
    [
        ("check", {"resolution": "many"}, "resolution"),
        ("check", {"resolution": "1"}, "resolution"),
        ("caption", {}, "captioner"),
        ("caption", {"captioner": "someone"}, "captioner"),
    ],
)
def test_a_form_that_asks_for_nonsense_is_explained(
    served: Served, cat: Path, what: str, form: dict[str, str], path: str
) -> None:
    """No job is made, and the answer names the field."""
    answer = served.client.post(f"/data/{quote(cat.name)}/{what}", data=form)
    assert answer.status_code == 422
    assert answer.json()["problems"][0]["path"] == path


def test_only_a_page_of_ours_may_send_a_form(served: Served, cat: Path) -> None:
    """A foreign page that knows the address changes nothing."""
    answer = served.client.get("/login", params={"once": served.app.state.nonces.issue()})
    cookie = answer.headers["set-cookie"].partition(";")[0]
    foreign = {"Authorization": "", "Cookie": cookie, "Origin": "https://evil.example"}
    answer = served.client.post(f"/data/{quote(cat.name)}/remove", headers=foreign)
    assert answer.status_code == 403
    assert cat.is_dir()
