"""tools/prepare.py caption: models say what pictures show, and nothing that is there is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_json
from PIL import Image
from scenes import scene
from tiny_captioners import make_blip, make_florence, make_llava, make_tagger

from tools import captioners, captions, prepare
from tools.captioners import Request, things_in
from train_lora import Emitter, StopRequest, TrainError, TrainingInterrupted

MAKERS: dict[str, Callable[[Path], Path]] = {
    "florence2": make_florence,
    "blip": make_blip,
    "vlm": make_llava,
    "tagger": make_tagger,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide one tiny model of each kind; nobody may change them."""
    root = tmp_path_factory.mktemp("captioners")
    for kind, make in MAKERS.items():
        make(root / kind)
    return root


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Provide four pictures of different sizes: two without a caption, one with, one blank."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(["a.png", "b.jpg", "c.png", "more/d.png"]):
        scene(number, 60 + 30 * number).resize((90, 60 + 30 * number)).save(folder / name)
    (folder / "b.txt").write_text("by hand", encoding="utf-8")
    (folder / "c.txt").write_text("\ufeff \n", encoding="utf-8")
    return folder


def caption(folder: Path, *options: object, code: int = 0) -> dict[str, str]:
    """Run the program on a folder; return the texts that then stand in it."""
    assert prepare.main(["caption", str(folder), *map(str, options)]) == code
    texts = sorted(folder.rglob("*.txt"))
    return {t.relative_to(folder).as_posix(): t.read_text("utf-8-sig").strip() for t in texts}


def request(kind: str, **changes: Any) -> Request:
    """Ask a captioner as the command line does."""
    said = prepare.parser().parse_args(["caption", "x", "--with", kind, "--device", "cpu"])
    known = {key: value for key, value in vars(said).items() if key in Request.__annotations__}
    return Request(**known | changes)


# --- what models say ---


@pytest.mark.parametrize("kind", MAKERS)
def test_each_kind_of_model_captions_a_folder(kind: str, models: Path, pictures: Path) -> None:
    """Each picture that has no caption gets one of its own; the others keep theirs."""
    told = caption(pictures, "--with", kind, "--model", models / kind, "--trigger", "zkb")
    assert set(told) == {"a.txt", "b.txt", "c.txt", "more/d.txt"}
    assert told["b.txt"] == "by hand"
    said = {name: text for name, text in told.items() if name != "b.txt"}
    assert all(text.startswith("zkb, ") or kind == "tagger" for text in said.values())
    assert all(text.count("zkb") == 1 for text in said.values())
    assert len(set(said.values())) > 1 or kind == "tagger"


@pytest.mark.parametrize("kind", MAKERS)
def test_a_batch_says_what_each_picture_alone_would_be_told(kind: str, models: Path) -> None:
    """Whatever stands beside it, and in the same order."""
    captioner = captioners.CAPTIONERS[kind](models / kind, request(kind), Emitter())
    shown = [scene(number, 90) for number in range(5)]
    together = captioner.describe(shown)
    assert together == [captioner.describe([picture])[0] for picture in shown]
    assert len(set(together)) > 1
    assert all(together)


def test_florence_is_asked_for_the_task(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a token of its own; an unknown one would be read as a question."""
    shown, told = [scene(0, 90)], {}
    for task in captioners.TASKS:
        asked = request("florence2", task=task)
        captioner = captioners.Florence(models / "florence2", asked, Emitter())
        (told[task],) = captioner.describe(shown)
    assert len({told["caption"], told["detailed"], told["more_detailed"]}) == 3


def test_things_are_read_without_their_places() -> None:
    """As Florence-2 writes them: each with four places, some several times."""
    text = "</s><s>car<loc_52><loc_334><loc_932><loc_774>door handle<loc_1><loc_2><loc_3><loc_4>"
    text += "<loc_5><loc_6><loc_7><loc_8>car<loc_0><loc_0><loc_9><loc_9></s><pad><pad>"
    assert things_in(text) == "car, door handle"
    assert things_in("</s><s></s>") == ""


def test_blip_goes_on_with_a_beginning(models: Path) -> None:
    """It is part of the caption, as words that were asked for."""
    asked = request("blip", prompt="a photo of")
    captioner = captioners.Blip(models / "blip", asked, Emitter())
    assert captioner.describe([scene(1, 90)])[0].startswith("a photo of")


def test_an_answer_is_cut_from_question_and_thoughts(models: Path) -> None:
    """Only what is behind them is a caption; what goes round in circles is asked again."""
    chat = captioners.Chat(models / "vlm", request("vlm", prompt="What?"), Emitter())
    assert "What?" in str(chat.text)
    wrote = iter(["a b c " * 4, "<think>hm</think> a dog"])
    chat.network.texts = lambda ids: [next(wrote) for _ in ids]  # type: ignore[method-assign]
    assert chat.describe([scene(0, 90)]) == ["a dog"]


def test_a_tagger_tells_red_from_blue(models: Path, pictures: Path) -> None:
    """Colours go in blue first; faces keep their signs, characters come first, ratings never."""
    Image.new("RGB", (64, 64), "red").save(pictures / "red.png")
    Image.new("RGBA", (64, 64), (0, 0, 255, 255)).save(pictures / "blue.png")
    told = caption(pictures, "--with", "tagger", "--model", models / "tagger", "--trigger", "zkb")
    assert told["red.txt"] == "zkb (imp), red theme, ^_^"
    assert told["blue.txt"] == "zkb (imp), blue theme, ^_^"


def test_tags_are_chosen_by_how_likely_they_are(models: Path) -> None:
    """General ones and characters by their own measure; what is unwanted is left out."""
    red = [Image.new("RGB", (32, 20), "red")]
    changes = {"threshold": 0.2, "character_threshold": 0.7, "exclude": "^_^, red_theme"}
    tagger = captioners.Tagger(models / "tagger", request("tagger", **changes), Emitter())
    assert tagger.describe(red) == ["zkb (imp), hatsune miku, long hair"]


def test_a_picture_is_put_on_white_for_a_tagger() -> None:
    """In the middle of a square, not stretched."""
    square = captioners.squared(Image.new("RGB", (40, 20), "red"), 40)
    assert [square.getpixel((20, y)) for y in (2, 20, 37)] == [
        (255, 255, 255),
        (255, 0, 0),
        (255, 255, 255),
    ]


# --- what becomes of captions ---


def test_a_template_takes_what_a_model_says(models: Path, pictures: Path) -> None:
    """And the folder's name."""
    template = "photo of {trigger}, {label}: {caption}"
    options = ("--with", "tagger", "--model", models / "tagger", "--trigger", "abc")
    told = caption(pictures, *options, "--template", template)
    assert told["more/d.txt"].startswith("photo of abc, more: zkb (imp)")


def test_a_template_alone_needs_no_model(pictures: Path) -> None:
    """Pictures without a caption get it filled."""
    told = caption(pictures, "--with", "template", "--template", "{trigger} {name}", "--trigger=x")
    assert told == {"a.txt": "x a", "b.txt": "by hand", "c.txt": "x c", "more/d.txt": "x d"}


def test_captions_of_another_program_are_put_beside_pictures(pictures: Path) -> None:
    """As build takes them; pictures that it does not name are left as they are."""
    given = write_json(pictures.parent / "given.json", {"a.png": "given", "b.jpg": "other"})
    told = caption(pictures, "--captions-from", given)
    assert (told["a.txt"], told["b.txt"], told["c.txt"]) == ("given", "by hand", "")
    assert caption(pictures, "--captions-from", given, "--overwrite")["b.txt"] == "other"


def test_captions_are_replaced_only_when_asked(models: Path, pictures: Path) -> None:
    """Then all of them, and no note of it remains."""
    options = ("--with", "tagger", "--model", models / "tagger", "--overwrite")
    assert "by hand" not in caption(pictures, *options).values()
    assert not (pictures / captions.JOURNAL).exists()


def test_trigger_words_alone_are_no_caption(pictures: Path, models: Path) -> None:
    """A dataset has them where nothing else was known; so it can be captioned as it is."""
    made = pictures.parent / "made"
    triggers = ("--trigger", "zkb", "--trigger", "big imp")
    assert prepare.main(["build", str(pictures), str(made), *triggers]) == 0
    told = caption(made, "--with", "tagger", "--model", models / "tagger", *triggers)
    assert told.pop("train/b.txt") == "zkb, big imp, by hand"
    assert all(text.startswith("big imp, zkb (imp), ") for text in told.values())


def test_what_cannot_be_read_as_a_caption_is_not_lost(pictures: Path) -> None:
    """It may be all that somebody wrote; and nobody waits for a pipe."""
    (pictures / "a.txt").write_bytes(b"caf\xe9")
    (pictures / "c.txt").unlink()
    os.mkfifo(pictures / "c.txt")
    assert prepare.main(["caption", str(pictures), "--with=template", "--template=new"]) == 0
    assert (pictures / "a.txt").read_bytes() == b"caf\xe9"
    assert (pictures / "c.txt").is_fifo()
    assert (pictures / "more" / "d.txt").read_text("utf-8") == "new\n"


def test_pictures_that_share_a_text_are_told(
    pictures: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One of them can be described."""
    shutil.copy(pictures / "b.jpg", pictures / "a.jpg")
    caption(pictures, "--with", "template", "--template", "{name}")
    assert "a.png has its caption in common with a.jpg" in capfd.readouterr().err


def test_tables_say_what_stands_beside_the_pictures(pictures: Path, models: Path) -> None:
    """metadata.jsonl and the manifest of a dataset, whose other lines stay as they are."""
    made = pictures.parent / "made"
    assert prepare.main(["build", str(pictures), str(made), "--trigger", "zkb"]) == 0
    foreign = b'{"file_name": "none.png", "text": "\\u00e9", "more": 1}'
    table = made / "train" / "metadata.jsonl"
    table.write_bytes(table.read_bytes() + foreign)
    options = ("--with", "tagger", "--model", models / "tagger", "--trigger", "zkb", "--overwrite")
    told = caption(made, *options)
    lines = table.read_bytes().splitlines()
    assert lines.pop() == foreign
    entries = {f"train/{e['file_name']}": e["text"] for e in map(json.loads, lines)}
    manifest = json.loads((made / "manifest.json").read_text("utf-8"))
    assert {i["file"]: i["caption"] for i in manifest["images"]} == entries
    assert {i["caption_from"] for i in manifest["images"]} == {"tagger"}
    assert {Path(name).with_suffix(".txt").as_posix(): t for name, t in entries.items()} == told


# --- stops and failures ---


class Moody:
    """A captioner that fails at pictures of some widths, and counts the others."""

    def __init__(self, fails: set[int], error: BaseException) -> None:
        """Begin with nothing seen."""
        self.fails, self.error, self.seen = fails, error, 0

    def __call__(self, *_: object) -> Moody:
        """Be loaded."""
        return self

    def describe(self, pictures: list[Image.Image]) -> list[str]:
        """Describe pictures by their widths."""
        if self.fails.intersection(picture.width for picture in pictures):
            raise self.error
        self.seen += len(pictures)
        return [f"{picture.width} wide" for picture in pictures]


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Provide twenty pictures, 21 to 40 pixels wide, each with a caption."""
    for number in range(20):
        name = tmp_path / "many" / f"{number:02}.png"
        name.parent.mkdir(exist_ok=True)
        Image.linear_gradient("L").resize((21 + number, 30)).save(name)
        name.with_suffix(".txt").write_text("old", encoding="utf-8")
    return tmp_path / "many"


def with_moody(
    monkeypatch: pytest.MonkeyPatch, fails: set[int], error: BaseException | None = None
) -> Moody:
    """Put a captioner that can fail into the place of one."""
    moody = Moody(fails, error or RuntimeError("shape '[3, -1]' is invalid"))
    monkeypatch.setitem(captioners.CAPTIONERS, "blip", moody)
    monkeypatch.setattr(captions, "find_model", lambda *_: Path())
    return moody


def test_a_picture_that_fails_costs_no_other(
    many: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It keeps its caption, and is named; so is a file that broke."""
    with_moody(monkeypatch, {24})
    (many / "05.png").write_bytes((many / "05.png").read_bytes()[:60])
    told = caption(many, "--with", "blip", "--overwrite")
    assert (told["03.txt"], told["05.txt"]) == ("old", "old")
    assert set(told.values()) == {"old", *(f"{w} wide" for w in range(21, 41) if w not in (24, 26))}
    assert "No caption for 03.png" in capfd.readouterr().err


def test_what_failed_holds_no_memory_while_others_are_described(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a batch, nor a picture alone: a card that was full would be full again."""
    held: list[weakref.ref[set[int]]] = []
    still_there: list[set[int] | None] = []

    class Greedy(Moody):
        """A captioner that a batch is too much for, and one picture too."""

        def describe(self, pictures: list[Image.Image]) -> list[str]:
            """Describe pictures, and see what is left of those before."""
            still_there.extend(ref() for ref in held if ref())
            tensors = {picture.width for picture in pictures}
            held.append(weakref.ref(tensors))
            if len(tensors) > 1 or 24 in tensors:
                raise RuntimeError("out of memory")
            return super().describe(pictures)

    monkeypatch.setitem(captioners.CAPTIONERS, "blip", Greedy(set(), RuntimeError()))
    monkeypatch.setattr(captions, "find_model", lambda *_: Path())
    assert "21 wide" in caption(many, "--with", "blip", "--overwrite").values()
    assert (len(held), still_there) == (23, [])


def test_a_model_that_fails_on_everything_is_an_error(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soon, and nothing was touched."""
    moody = with_moody(monkeypatch, set(range(99)))
    assert set(caption(many, "--with", "blip", "--overwrite", code=1).values()) == {"old"}
    assert moody.seen == 0


def test_a_second_start_goes_on_where_captions_are_replaced(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done is not done again, though nothing else tells; another question begins anew."""
    moody = with_moody(monkeypatch, {35}, TrainingInterrupted("SIGINT"))
    options = ("--with", "blip", "--overwrite", "--batch", "4")
    caption(many, *options, code=130)
    with (many / captions.JOURNAL).open("a", encoding="utf-8") as file:
        file.write('"to')  # as a crash may leave it
    moody.fails, moody.seen = set(), 0
    told = caption(many, *options)
    assert (moody.seen, "old" in told.values()) == (8, False)
    caption(many, *options, "--prompt", "a")
    assert moody.seen == 28


@pytest.mark.skipif(os.name != "posix", reason="the signal is POSIX's")
def test_ctrl_c_keeps_what_is_done_and_a_second_start_goes_on(tmp_path: Path) -> None:
    """As a person does it, in the middle of a folder."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(300):
        scene(0, 32).save(folder / f"{number}.png")
    program = (
        f"import os, signal, sys; sys.path[:0] = [{str(ROOT)!r}]\n"
        "import train_lora; from tools import captions, prepare\n"
        "whole, calls = captions.write_whole, [0]\n"
        "def write(*what):\n"
        "    calls[0] += 1\n"
        "    if calls[0] == 50: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return whole(*what)\n"
        "captions.write_whole = write\n"
        "sys.exit(prepare.main(sys.argv[1:]))"
    )
    arguments = ["caption", str(folder), "--with", "template", "--template", "{name}", "--events"]
    command = [sys.executable, "-c", program, *arguments]
    stopped = subprocess.run(command, check=False, capture_output=True)
    assert stopped.returncode == 130
    assert json.loads(stopped.stdout.splitlines()[-1])["type"] == "interrupted"
    done = len(list(folder.glob("*.txt")))
    assert 50 <= done < 300
    assert not list(folder.glob(".*.tmp"))
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.txt")}
    assert prepare.main(arguments) == 0
    assert len(list(folder.glob("*.txt"))) == 300
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


# --- models that cannot be used ---


def wrong_kind(folder: Path, models: Path) -> None:
    """Put a BLIP where a Florence-2 belongs."""
    shutil.copytree(models / "blip", folder)


def legacy(folder: Path, models: Path) -> None:
    """Make the config of Florence-2 as Microsoft publishes it."""
    shutil.copytree(models / "florence2", folder)
    config = {"model_type": "florence2", "text_config": {"model_type": "florence2_language"}}
    write_json(folder / "config.json", config)


def pickled(folder: Path, models: Path) -> None:
    """Leave nothing but a pickle of the weights."""
    shutil.copytree(models / "florence2", folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def damaged(folder: Path, models: Path) -> None:
    """Cut the weights off."""
    shutil.copytree(models / "florence2", folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def for_videos(folder: Path, models: Path) -> None:
    """Let the processor be one that also takes videos, by another package."""
    shutil.copytree(models / "florence2", folder)
    config = json.loads((folder / "processor_config.json").read_text("utf-8"))
    write_json(folder / "processor_config.json", config | {"processor_class": "Qwen2VLProcessor"})
    videos = {"video_processor_type": "Qwen2VLVideoProcessor"}
    write_json(folder / "video_preprocessor_config.json", videos)


BAD: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "nothing": (lambda *_: None, "which is none"),
    "empty": (lambda folder, _: folder.mkdir(), "it lacks config.json"),
    "wrong kind": (wrong_kind, "one of type blip"),
    "legacy": (legacy, "converted copies: florence-community/Florence-2-base"),
    "pickled": (pickled, "it lacks model.safetensors"),
    "damaged": (damaged, "a model that can be loaded"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_model_that_cannot_be_used_is_refused_with_the_reason(
    name: str, models: Path, pictures: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before anything is written."""
    spoil, words = BAD[name]
    spoil(pictures.parent / "model", models)
    options = ("--with", "florence2", "--model", pictures.parent / "model")
    assert set(caption(pictures, *options, code=1)) == {"b.txt", "c.txt"}
    assert words in capfd.readouterr().err


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is there")
def test_a_model_that_needs_another_package_says_which(
    models: Path, pictures: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those that also take videos need torchvision."""
    for_videos(pictures.parent / "model", models)
    options = ("--with", "vlm", "--model", pictures.parent / "model")
    caption(pictures, *options, code=1)
    assert "pip install torchvision" in capfd.readouterr().err


def test_the_usual_model_is_not_downloaded_unasked(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who names it wants it; a model for vlm has to be named."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(TrainError, match="With a network: --model florence-community"):
        captioners.find_model(request("florence2"), Emitter(), StopRequest())
    with pytest.raises(TrainError, match="got nothing"):
        captioners.find_model(request("vlm"), Emitter(), StopRequest())


def test_a_model_in_the_cache_is_found_by_its_id(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network."""
    place = tmp_path / "cache" / "models--some--tagger"
    shutil.copytree(models / "tagger", place / "snapshots" / "1")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("1", encoding="ascii")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    found = captioners.find_model(request("tagger", model="some/tagger"), Emitter(), StopRequest())
    assert found == place / "snapshots" / "1"


def test_a_tagger_without_its_package_says_what_to_install(
    models: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The other captioners do without it."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    caption(pictures, "--with", "tagger", "--model", models / "tagger", code=1)
    assert "pip install -r tools/requirements.txt" in capfd.readouterr().err


@pytest.mark.parametrize("spoil", ["short", "no table", "no graph"])
def test_a_tagger_whose_files_do_not_fit_is_refused(
    spoil: str, models: Path, pictures: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Tags that are off by one would all be wrong."""
    folder = Path(shutil.copytree(models / "tagger", pictures.parent / "tagger"))
    tags = (folder / "selected_tags.csv").read_text("utf-8")
    if spoil == "no graph":
        (folder / "model.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    else:
        rows = tags.splitlines()[:-1] if spoil == "short" else ["a,b", "1,2"]
        (folder / "selected_tags.csv").write_text("\n".join(rows), encoding="utf-8")
    caption(pictures, "--with", "tagger", "--model", folder, code=1)
    words = {"short": "7 beside 8", "no table": "name and category", "no graph": "graph of ONNX"}
    assert words[spoil] in capfd.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--with", "template"),
        ("--with", "template", "--template", "{colour}"),
        ("--with", "blip", "--captions-from", "x.json"),
        ("--captions-from", "missing.json"),
    ],
)
def test_a_request_that_makes_no_sense_writes_nothing(
    options: tuple[str, ...], pictures: Path
) -> None:
    """It is refused before any picture is looked at by a model."""
    assert set(caption(pictures, *options, code=1)) == {"b.txt", "c.txt"}


def test_what_can_be_asked_for_is_there() -> None:
    """Every word of the command line names something."""
    assert tuple(captioners.TASKS) == prepare.TASKS
    assert {"template", *captioners.CAPTIONERS} == set(prepare.WRITERS)


def test_a_dry_run_counts_and_writes_nothing(
    pictures: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nor is a model needed for it."""
    told = caption(pictures, "--with", "florence2", "--model", "none/none", "--dry-run")
    assert set(told) == {"b.txt", "c.txt"}
    assert "Would write 3 captions, and keep 1" in capfd.readouterr().out
