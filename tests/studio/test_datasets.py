"""Datasets: what may come in, what stays, and what can be taken back, over real HTTP."""

from __future__ import annotations

import io
import itertools
import json
import os
import resource
import socket
import struct
import unicodedata
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from PIL import Image
from serving import Served, picture, serving, tree

from studio import captions, datasets, pictures, security
from studio.datasets import Limits
from studio.store import Job, new_id

if TYPE_CHECKING:
    import httpx


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Provide one studio for all tests here; each test has a dataset of its own."""
    with serving(tmp_path_factory.mktemp("studio")) as studio:
        yield studio


@dataclass(frozen=True)
class Cat:
    """A dataset as a client sees it, and as it lies on the disk."""

    client: httpx.Client
    url: str
    folder: Path

    def put(self, name: str, content: bytes | None = None) -> httpx.Response:
        """Upload a picture."""
        url = f"{self.url}/images/{quote(name, safe='')}"
        return self.client.put(url, content=picture() if content is None else content)

    def say(self, name: str, text: str, **headers: str) -> httpx.Response:
        """Write a caption, whatever stands there."""
        url = f"{self.url}/captions/{quote(name, safe='')}"
        return self.client.put(url, json={"text": text}, headers=headers or {"If-Match": "*"})

    def change(self, **body: Any) -> httpx.Response:
        """Change many captions."""
        return self.client.post(f"{self.url}/captions", json=body)

    def undo(self) -> httpx.Response:
        """Take the last change back."""
        return self.client.post(f"{self.url}/undo")

    def show(self, **query: Any) -> dict[str, Any]:
        """Read what the dataset holds."""
        answer: dict[str, Any] = self.client.get(self.url, params=query).json()
        return answer

    def texts(self) -> dict[str, bytes]:
        """Read the captions from the disk."""
        return {path.stem: path.read_bytes() for path in sorted(self.folder.glob("*.txt"))}

    def names(self) -> list[str]:
        """List the files, hidden ones too, but for the history."""
        return sorted(path.name for path in self.folder.iterdir() if path.name != ".history")


NUMBERS = itertools.count()


@pytest.fixture
def cat(served: Served) -> Cat:
    """Provide an empty dataset."""
    folder = datasets.create(served.settings, f"cat {next(NUMBERS)}")
    return Cat(served.client, f"/datasets/{quote(folder.name)}", folder)


@pytest.fixture
def three(cat: Cat) -> Cat:
    """Provide a dataset of three pictures, two of which have captions."""
    for number in (1, 2, 10):
        (cat.folder / f"image{number}.png").write_bytes(picture())
    (cat.folder / "image1.txt").write_text("cat, grass\n")
    (cat.folder / "image2.txt").write_text("cat, sofa\n")
    return cat


def code(response: httpx.Response) -> tuple[int, str]:
    """Return how a request was refused."""
    assert response.headers["content-type"] == "application/problem+json"
    return response.status_code, response.json()["code"]


# --- Names ---


def test_names_of_all_scripts_stay_apart(cat: Cat) -> None:
    """Two pictures with no Latin letter are two pictures."""
    names = ["Größe 5 (2).png", "犬.png", "猫.png"]
    for name in names:
        assert cat.put(name).json()["name"] == name
    assert [image["name"] for image in cat.show()["images"]] == names


def test_names_are_kept_in_one_normal_form(cat: Cat) -> None:
    """A Mac's way to write é gives the file that any other's gives."""
    apart = unicodedata.normalize("NFD", "café.png")
    assert cat.put(apart).json()["name"] == "café.png" == cat.names()[0]
    assert cat.client.get(f"{cat.url}/images/{quote(apart)}").status_code == 200


def test_a_dataset_is_the_only_one_of_its_name_whatever_the_case(served: Served) -> None:
    """On some file systems both would be one folder."""
    assert served.client.post("/datasets", json={"name": "Maße"}).status_code == 201
    answer = served.client.post("/datasets", json={"name": "MASSE"})
    assert code(answer) == (409, "name_taken")


BAD_NAMES = [
    "",
    ".",
    "..",
    ".hidden",
    "a/b",
    "a\\b",
    "a:b",
    "a*b",
    "NUL",
    "con.x",
    "a.",
    "a ",
    " a",
]
BAD_NAMES += ["a\x00b", "a\nb", "x" * 65, "C:", "../../etc", "\x7f"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_some_file_system_cannot_hold_is_refused(served: Served, name: str) -> None:
    """Nothing appears, and the answer says what a name may be."""
    before = tree(served.settings.datasets)
    answer = served.client.post("/datasets", json={"name": name})
    assert code(answer) == (422, "name_invalid")
    assert answer.json()["problems"][0]["expected"]
    assert tree(served.settings.datasets) == before


ESCAPES = ["..%2f..%2fx.png", "%2e%2e/x.png", "%2e%2e%2fx.png", "..%5cx.png", "%2fetc%2fx.png"]
ESCAPES += ["C:%5cx.png", "%5c%5chost%5cshare%5cx.png", "x%00.png", "%00.png", "..%c0%afx.png"]
ESCAPES += ["x.png.", "x.png%20", "x.png:evil", "x.png::$DATA", "CON.png", "nul.tar.png", ".png"]
ESCAPES += ["%20.png", "a%0ab.png", "x" * 300 + ".png", "..", ".history", "....%2f%2fx.png"]


@pytest.mark.parametrize("path", ESCAPES)
def test_no_file_name_leads_out_of_its_dataset(served: Served, three: Cat, path: str) -> None:
    """Nothing inside or outside is touched by a hostile path."""
    before = tree(served.settings.root)
    for verb in ("PUT", "GET", "DELETE"):
        with served.connect() as connection:
            answer = speak(served, connection, verb, f"{three.url}/images/{path}", picture())
        assert answer.split()[1] in (b"404", b"405", b"415", b"422", b"307"), (verb, answer)
    assert tree(served.settings.root) == before


def speak(served: Served, connection: socket.socket, verb: str, path: str, body: bytes) -> bytes:
    """Send a request exactly as it is written here; return the answer."""
    head = f"{verb} {path} HTTP/1.1\r\nHost: 127.0.0.1:{served.settings.port}\r\n"
    head += f"Authorization: Bearer {served.settings.token}\r\nConnection: close\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return b"".join(iter(lambda: connection.recv(65536), b""))


# --- Uploads ---


def test_a_picture_arrives_as_it_was_sent(cat: Cat) -> None:
    """The same once more changes nothing; another under its name is refused."""
    content = picture("JPEG")
    assert cat.put("a.jpg", content).status_code == 201
    assert (cat.folder / "a.jpg").read_bytes() == content
    assert cat.put("a.jpg", content).status_code == 200
    assert code(cat.put("a.jpg", picture("JPEG", (80, 80)))) == (409, "name_taken")
    assert (cat.folder / "a.jpg").read_bytes() == content
    assert cat.names() == ["a.jpg"]


@pytest.mark.parametrize("name", ["A.png", "a.PNG", "a.jpg", "A.JPEG"])
def test_two_pictures_never_share_a_caption(cat: Cat, name: str) -> None:
    """Neither by another ending nor by another case."""
    cat.put("a.png")
    content = picture("PNG" if name.lower().endswith("png") else "JPEG", (70, 70))
    assert code(cat.put(name, content)) in ((409, "stem_taken"), (409, "name_taken"))
    assert cat.names() == ["a.png"]


def test_of_pictures_that_come_together_one_gets_the_name(cat: Cat) -> None:
    """Eight uploads for one caption at the same time: the first wins, the others are told."""
    kinds = ["png", "jpg", "webp", "bmp"] * 2
    with ThreadPoolExecutor(8) as pool:
        sizes = [(60 + index, 60) for index in range(8)]
        formats = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP"}
        contents = [picture(formats[k], s) for k, s in zip(kinds, sizes, strict=True)]
        answers = list(pool.map(lambda k, c: cat.put(f"a.{k}", c).status_code, kinds, contents))
    assert sorted(answers) == [201] + [409] * 7
    assert len(cat.names()) == 1


def png_of(width: int, height: int) -> bytes:
    """Write a PNG whose header promises many pixels and whose body has none."""

    def part(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = part(b"IHDR", header) + part(b"IDAT", zlib.compress(bytes(1000))) + part(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def animation() -> bytes:
    """Make a WebP of two frames."""
    other = Image.new("RGB", (64, 48), "red")
    return picture("WEBP", save_all=True, append_images=[other])


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
NO_PICTURES = {
    "svg.png": SVG,
    "bomb.png": png_of(50_000, 50_000),
    "large.png": png_of(10_000, 10_000),
    "cut.png": picture("PNG", (640, 480))[:-100],
    "cut.jpg": picture("JPEG", (640, 480))[:-300],
    "cut.webp": picture("WEBP", (640, 480))[:-60],
    "moving.webp": animation(),
    "other.jpg": picture("PNG"),
    "really.png": picture("GIF"),
    "page.gif": picture("GIF"),
    "scan.tiff": picture("TIFF"),
    "image.svg": SVG,
    "text.png": b"hello",
    "nothing.png": b"",
    "noending": picture("PNG"),
    "page.html": b"<html>",
    "zip.png": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_whole_still_picture_is_refused(cat: Cat, name: str) -> None:
    """Nothing of it stays, and the answer says what was expected."""
    answer = cat.put(name, NO_PICTURES[name])
    assert code(answer) == (415, "not_an_image")
    assert answer.json()["problems"][0]["found"]
    assert cat.names() == []


def test_bytes_behind_a_picture_stay_bytes(cat: Cat) -> None:
    """A picture that is also a page is served as a picture, and nothing guesses."""
    content = picture() + b"<html><script>alert(1)</script></html>"
    cat.put("both.png", content)
    answer = cat.client.get(f"{cat.url}/images/both.png", headers={"Accept": "text/html"})
    assert answer.content == content
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_script_in_a_description_is_nothing_but_bytes(cat: Cat) -> None:
    """What a camera's fields say reaches no page."""
    exif = Image.Exif()
    exif[0x010E] = "<script>alert(1)</script>"
    cat.put("a.jpg", picture("JPEG", exif=exif))
    assert "script" not in json.dumps(cat.show())


def test_an_upload_of_65_mib_is_refused_before_it_is_sent(served: Served, cat: Cat) -> None:
    """The answer comes upon the length alone."""
    with served.connect() as connection:
        head = request_head(served, f"{cat.url}/images/a.png", f"Content-Length: {65 * 2**20}")
        connection.sendall(head)
        assert connection.recv(65536).split()[1] == b"413"
    assert cat.names() == []


def request_head(served: Served, path: str, *lines: str) -> bytes:
    """Write the head of an upload."""
    own = [f"Host: 127.0.0.1:{served.settings.port}"]
    own.append(f"Authorization: Bearer {served.settings.token}")
    return "\r\n".join([f"PUT {path} HTTP/1.1", *own, *lines, "", ""]).encode()


def test_an_upload_that_does_not_tell_its_length_is_refused(cat: Cat) -> None:
    """Else nobody could say in time that it does not fit."""
    answer = cat.client.put(f"{cat.url}/images/a.png", content=iter([picture()]))
    assert code(answer)[0] == 411
    assert cat.names() == []


@pytest.mark.parametrize("said", [100, 100_000])
def test_an_upload_that_ends_early_leaves_nothing(served: Served, cat: Cat, said: int) -> None:
    """Whoever lies about the length, or loses the connection, has uploaded nothing."""
    with served.connect() as connection:
        head = request_head(served, f"{cat.url}/images/a.png", f"Content-Length: {said}")
        connection.sendall(head + picture()[:99])
        connection.shutdown(socket.SHUT_WR)
        connection.recv(65536)
    assert cat.put("b.png").status_code == 201
    assert cat.names() == ["b.png"]


def test_a_slow_upload_is_ended(served: Served, cat: Cat, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then does not keep a place for ever."""
    monkeypatch.setattr(security, "PATIENCE_SECONDS", 0.5)
    with served.connect() as connection:
        head = request_head(served, f"{cat.url}/images/a.png", "Content-Length: 1000")
        connection.sendall(head + picture()[:10])
        assert connection.recv(65536).split()[1] == b"408"
    assert cat.put("b.png").status_code == 201
    assert cat.names() == ["b.png"]


@pytest.mark.parametrize(
    ("limits", "refused"),
    [
        (Limits(files=3), (413, "dataset_full")),
        (Limits(dataset_bytes=1000), (413, "dataset_full")),
        (Limits(free_bytes=2**60), (507, "disk_full")),
    ],
)
def test_what_does_not_fit_is_refused(
    three: Cat, monkeypatch: pytest.MonkeyPatch, limits: Limits, refused: tuple[int, str]
) -> None:
    """Too many files, too many bytes, too little of the disk left."""
    monkeypatch.setattr(datasets, "LIMITS", limits)
    before = three.names()
    assert code(three.put("more.png", picture(size=(640, 480)))) == refused
    assert three.names() == before


def test_a_disk_that_fails_while_writing_is_told(cat: Cat) -> None:
    """The part of the upload is gone, and the studio goes on."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    content = picture("BMP", (64, 64))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, former[1]))
    try:
        answer = cat.put("a.bmp", content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert code(answer) == (507, "disk_full")
    assert cat.names() == []
    assert cat.put("a.bmp", content).status_code == 201


def test_what_a_killed_service_left_is_swept_away(served: Served, three: Cat) -> None:
    """Half an upload is never a picture, and does not stay."""
    (three.folder / ".0123456789abcdef.part").write_bytes(b"half")
    assert three.show()["total"] == 3
    datasets.sweep(served.settings)
    assert not any(name.endswith(".part") for name in three.names())


# --- What is no plain file ---


def test_links_pipes_and_folders_are_no_pictures(three: Cat, tmp_path: Path) -> None:
    """None is listed, sent, followed or waited for; a hard link is a file like any other."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture())
    (three.folder / "link.png").symlink_to(secret)
    (three.folder / "folder.png").mkdir()
    os.mkfifo(three.folder / "pipe.png")
    (three.folder / "image1.txt").unlink()
    os.mkfifo(three.folder / "image1.txt")
    (three.folder / "image10.txt").symlink_to("/etc/passwd")
    (three.folder / "hard.png").hardlink_to(secret)
    shown = {image["name"]: image["caption"] for image in three.show()["images"]}
    assert shown == {"hard.png": "", "image1.png": "", "image2.png": "cat, sofa", "image10.png": ""}
    for name in ("link.png", "folder.png", "pipe.png"):
        for query in ("", "?thumb=384"):
            answer = three.client.get(f"{three.url}/images/{name}{query}")
            assert code(answer) == (404, "image_unknown")


def test_a_dataset_that_is_a_link_is_none(served: Served, tmp_path: Path) -> None:
    """It is neither listed nor opened."""
    (served.settings.datasets / "linked").symlink_to(tmp_path)
    names = [each["name"] for each in served.client.get("/datasets").json()["datasets"]]
    assert "linked" not in names
    assert code(served.client.get("/datasets/linked")) == (404, "dataset_unknown")
    (served.settings.datasets / "linked").unlink()


# --- Showing ---


def test_a_dataset_comes_in_parts_in_natural_order(
    cat: Cat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures are opened for the part alone that is asked for."""
    content = picture(size=(8, 8))
    for number in range(150):
        (cat.folder / f"image{number}.png").write_bytes(content)
    opened: list[Path] = []
    measure = pictures.measure

    def counted(path: Path) -> tuple[int, int] | None:
        opened.append(path)
        return measure(path)

    monkeypatch.setattr(pictures, "measure", counted)
    part = cat.show(offset=60, limit=40)
    assert [image["name"] for image in part["images"]] == [f"image{n}.png" for n in range(60, 100)]
    assert (part["next"], part["total"], len(opened)) == (100, 150, 40)
    assert cat.show(offset=140)["next"] is None


def test_a_filter_looks_into_names_and_captions(three: Cat) -> None:
    """Whatever the case; the counts stay those of the whole."""
    assert [image["name"] for image in three.show(filter="SOFA")["images"]] == ["image2.png"]
    found = three.show(filter="image1")
    assert (found["matching"], found["total"], found["captions"]) == (2, 3, 2)


def test_what_stands_between_commas_is_counted(three: Cat) -> None:
    """What only one caption has is no tag."""
    assert three.show()["tags"] == [["cat", 2]]


def test_a_picture_is_shown_upright(cat: Cat) -> None:
    """A camera that lay on its side says so in the file."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = cat.put("a.jpg", picture("JPEG", (640, 480), exif=exif)).json()
    assert (image["width"], image["height"]) == (480, 640)
    small = cat.client.get(image["thumbnail"])
    with Image.open(as_file(small)) as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("WEBP", (288, 384))


def as_file(response: httpx.Response) -> Any:
    """Open the body of an answer as a file."""
    return io.BytesIO(response.content)


MODES = {"1": "PNG", "P": "PNG", "LA": "PNG", "I;16": "PNG", "RGBA": "WEBP", "CMYK": "JPEG"}


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_picture_has_a_thumbnail(cat: Cat, mode: str) -> None:
    """Palettes, transparency, 16 bits and print colours become what a browser shows."""
    target, kind = io.BytesIO(), MODES[mode]
    grey = Image.linear_gradient("L").resize((600, 400))
    image = (
        grey.convert("I").point(lambda v: v * 257).convert("I;16")
        if mode == "I;16"
        else grey.convert(mode)
    )
    image.save(target, kind)
    name = f"a.{kind.lower()}".replace("jpeg", "jpg")
    small = cat.client.get(cat.put(name, target.getvalue()).json()["thumbnail"])
    with Image.open(as_file(small)) as thumbnail:
        assert thumbnail.size == (384, 256)
        brightness = thumbnail.convert("L").tobytes()
    assert min(brightness) < 20
    assert max(brightness) > 235


def test_a_picture_is_sent_once_and_kept_by_its_address(three: Cat) -> None:
    """The address that a page has names one content; without it the tag is asked for."""
    image = three.show()["images"][0]
    for address in (image["url"], image["thumbnail"]):
        answer = three.client.get(address)
        assert "immutable" in answer.headers["cache-control"]
        again = three.client.get(address, headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    plain = three.client.get(f"{three.url}/images/image1.png", headers={"Range": "bytes=0-7"})
    assert (plain.status_code, plain.content) == (206, b"\x89PNG\r\n\x1a\n")
    assert "no-cache" in plain.headers["cache-control"]


def test_looking_changes_nothing(served: Served, three: Cat) -> None:
    """Neither thumbnails nor tags are kept on the disk."""
    before = tree(served.settings.root)
    for address in ("", "?filter=cat", "/images/image1.png", "/images/image1.png?thumb=384"):
        assert three.client.get(f"{three.url}{address}").status_code == 200
    assert three.client.get(f"{three.url}/captions/image1.png").json()["text"] == "cat, grass"
    assert tree(served.settings.root) == before


def test_a_report_is_shown_beside_the_pictures(served: Served, three: Cat) -> None:
    """The newest look of the tool at this dataset counts; a damaged report is none."""
    for text in (json.dumps(report(["blurred"])), "{"):
        config = {"dataset": three.folder.name}
        job = Job(new_id(), "prepare", "Check", config, state="completed")
        served.app.state.store.insert(job)
        output = served.settings.job(job.id) / "output"
        output.mkdir(parents=True)
        (output / "report.json").write_text(text)
        shown = three.show()
        if text == "{":
            assert shown["report"] is None
            continue
        assert shown["report"]["remarks"] == ["Only 3 pictures"]
        assert (shown["report"]["checked"], shown["report"]["flagged"]) == (2, 1)
        assert [image["flags"] for image in shown["images"]] == [["blurred"], [], []]


def report(flags: list[str]) -> dict[str, Any]:
    """Make a report of two pictures as the tool writes it."""
    found = [{"source": "image1.png", "flags": flags}, {"source": "image2.png", "flags": []}]
    return {"pictures": found, "remarks": ["Only 3 pictures"]}


# --- Captions ---


def test_a_caption_is_changed_by_whoever_has_seen_it(three: Cat) -> None:
    """A second writer is told what stands there, and nothing is lost."""
    tag = three.client.get(f"{three.url}/captions/image1.png").headers["etag"]
    first = three.say("image1.png", "a cat on grass\n", **{"If-Match": tag})
    assert (first.status_code, first.json()["text"]) == (200, "a cat on grass")
    second = three.say("image1.png", "mine", **{"If-Match": tag})
    assert code(second) == (412, "caption_changed")
    assert "a cat on grass" in second.json()["detail"]
    assert three.say("image1.png", "mine", **{"If-Match": first.headers["etag"]}).status_code == 200
    assert three.texts()["image1"] == b"mine\n"


def test_a_caption_is_never_written_blindly(three: Cat) -> None:
    """Without a condition the answer is 428; If-None-Match writes only where nothing is."""
    url = f"{three.url}/captions/image10.png"
    assert code(three.client.put(url, json={"text": "x"})) == (428, "precondition_required")
    assert three.say("image10.png", "new", **{"If-None-Match": "*"}).status_code == 200
    assert code(three.say("image10.png", "newer", **{"If-None-Match": "*"}))[0] == 412
    assert code(three.say("image11.png", "x")) == (404, "image_unknown")


def test_an_empty_caption_is_no_file(three: Cat) -> None:
    """The trainer would warn of an empty one."""
    three.say("image1.png", "  \n ")
    assert list(three.texts()) == ["image2"]
    assert three.undo().json() == {"undone": "Caption of image1.png", "restored": 1, "kept": 0}
    assert three.texts()["image1"] == b"cat, grass\n"


def test_a_caption_has_a_limit(three: Cat) -> None:
    """No trainer reads more; what was there stays."""
    assert code(three.say("image1.png", "é" * 33_000)) == (413, "caption_too_large")
    assert three.texts()["image1"] == b"cat, grass\n"


def test_captions_are_changed_together_and_back(three: Cat) -> None:
    """Replace, put in front, count before; each undo takes one change back, byte for byte."""
    (three.folder / "image2.txt").write_bytes(b"\xef\xbb\xbfcat,  sofa\r\n")
    before = three.texts()
    assert three.change(replace={"from": "cat", "to": "x"}, dry_run=True).json() == {"changed": 2}
    assert three.texts() == before
    assert three.change(replace={"from": "cat", "to": "zkb"}).json() == {"changed": 2}
    assert three.change(add_prefix="photo, ").json() == {"changed": 3}
    assert three.texts()["image2"] == b"photo, zkb,  sofa\n"
    assert three.texts()["image10"] == b"photo\n"
    assert three.change(add_prefix="photo").json() == {"changed": 0}
    assert three.show()["undo"] == "“photo, ” put in front in 3 captions"
    assert three.undo().json()["restored"] == 3
    assert three.undo().json()["restored"] == 2
    assert three.texts() == before


def test_a_change_goes_no_further_than_the_filter(three: Cat) -> None:
    """What the page shows is what is changed."""
    three.change(replace={"from": "cat", "to": "dog"}, filter="sofa")
    assert three.texts() == {"image1": b"cat, grass\n", "image2": b"dog, sofa\n"}


@pytest.mark.parametrize(
    "body",
    [{}, {"replace": {"from": "", "to": "x"}}, {"add_prefix": " "}, {"add_prefix": "a", "to": 1}],
)
def test_a_change_that_says_nothing_is_refused(three: Cat, body: dict[str, Any]) -> None:
    """As is one that says two things, or a key that nobody knows."""
    assert code(three.change(**body)) == (422, "request_invalid")
    both = {"replace": {"from": "a", "to": "b"}, "add_prefix": "c"}
    assert code(three.change(**both)) == (422, "request_invalid")


def test_an_undo_leaves_what_was_changed_since(three: Cat) -> None:
    """An editor's later words are not thrown away, and the answer counts them."""
    three.change(replace={"from": "cat", "to": "dog"})
    (three.folder / "image1.txt").write_text("written by hand")
    assert (three.undo().json()["restored"], three.texts()["image2"]) == (1, b"cat, sofa\n")
    assert three.texts()["image1"] == b"written by hand"


def test_an_undo_without_a_change_says_so(cat: Cat) -> None:
    """It is no error of ours."""
    assert code(cat.undo()) == (409, "nothing_to_undo")


def test_typing_is_one_change(three: Cat) -> None:
    """A caption that saves itself while someone writes is undone as a whole."""
    three.say("image2.png", "a dog")
    for text in ("a", "a c", "a cat"):
        three.say("image10.png", text)
    three.undo()
    assert list(three.texts()) == ["image1", "image2"]
    three.undo()
    assert three.texts()["image2"] == b"cat, sofa\n"


def test_what_another_program_writes_can_be_taken_back(three: Cat) -> None:
    """A captioner overwrites and adds; one undo gives the former captions back."""
    before = three.texts()
    captions.remember_all(three.folder, "Captions by florence2")
    for number in (1, 2, 10):
        (three.folder / f"image{number}.txt").write_text("a picture of something\n")
    assert three.undo().json() == {"undone": "Captions by florence2", "restored": 3, "kept": 0}
    assert three.texts() == before


def test_a_caption_that_is_no_text_is_named_and_comes_back(three: Cat) -> None:
    """Nothing changes it but a person, and an undo returns the very bytes."""
    (three.folder / "image1.txt").write_bytes(b"caf\xe9 cat")
    assert three.show()["images"][0]["problem"] == "its caption is not UTF-8"
    assert three.change(replace={"from": "cat", "to": "dog"}).json() == {"changed": 1}
    three.say("image1.png", "café")
    three.undo()
    assert three.texts()["image1"] == b"caf\xe9 cat"


def test_history_is_bounded_and_no_part_of_the_dataset(
    three: Cat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the last changes are kept, hidden from trainers."""
    monkeypatch.setattr(captions, "KEPT", 5)
    for number in range(8):
        three.say(f"image{(1, 2)[number % 2]}.png", f"text {number}")
    assert len(list((three.folder / ".history").iterdir())) == 5
    assert not any("history" in name for name in three.names())


# --- Leaving ---


def test_a_removed_picture_lies_in_the_trash_with_its_caption(served: Served, three: Cat) -> None:
    """Nothing is deleted."""
    assert three.client.delete(f"{three.url}/images/image1.png").status_code == 204
    assert three.names() == ["image10.png", "image2.png", "image2.txt"]
    trashed = max(served.settings.trash.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert sorted(path.name for path in trashed.iterdir()) == ["image1.png", "image1.txt"]
    assert code(three.client.delete(f"{three.url}/images/image1.png")) == (404, "image_unknown")


def test_a_removed_dataset_lies_in_the_trash(served: Served, three: Cat) -> None:
    """A job that works on it keeps it where it is."""
    config = {"dataset": three.folder.name}
    store, job = (
        served.app.state.store,
        Job(new_id(), "caption", "Captions", config, desired="hold"),
    )
    store.insert(job)
    assert code(three.client.delete(three.url)) == (409, "in_use")
    with store.writing() as db:
        db.execute("UPDATE jobs SET state = 'completed' WHERE id = ?", (job.id,))
    assert three.client.delete(three.url).status_code == 204
    assert code(three.client.get(three.url)) == (404, "dataset_unknown")
    assert list(served.settings.trash.glob(f"*/{three.folder.name}/image1.txt"))


# --- Snapshots ---


def test_a_snapshot_is_what_the_trainer_would_have_found(
    served: Served, three: Cat, tmp_path: Path
) -> None:
    """Pictures are links, captions copies, and nothing hidden or linked comes along."""
    (three.folder / "more").mkdir()
    (three.folder / "more" / "a.png").write_bytes(picture())
    (three.folder / "metadata.jsonl").write_text("{}")
    (three.folder / "outside.png").symlink_to("/etc/passwd")
    (three.folder / ".part").write_text("hidden")
    target = tmp_path / "job" / "dataset"
    try:
        assert datasets.snapshot(served.settings, three.folder.name, target) == 4
    finally:
        (three.folder / "outside.png").unlink()
    kept = sorted(p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file())
    images = ["image1.png", "image1.txt", "image10.png", "image2.png", "image2.txt"]
    assert kept == [*images, "metadata.jsonl", "more/a.png"]
    assert (target / "image1.png").samefile(three.folder / "image1.png")
    assert not (target / "image1.txt").samefile(three.folder / "image1.txt")


def test_no_later_change_reaches_a_snapshot(served: Served, three: Cat, tmp_path: Path) -> None:
    """Neither edits in the studio, nor an editor that writes in place, nor a removed picture."""
    target = tmp_path / "dataset"
    datasets.snapshot(served.settings, three.folder.name, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    three.change(replace={"from": "cat", "to": "dog"})
    with (three.folder / "image2.txt").open("r+") as file:
        file.write("in place")
    three.client.delete(f"{three.url}/images/image1.png")
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
