"""tools/prepare.py: a folder is judged, and becomes a dataset; nothing in it changes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, load_config, write_config, write_image
from PIL import Image
from scenes import jpeg, marked, scene

import train_lora
from tools import dataset, prepare
from tools.dataset import Template, Wishes
from train_lora import Emitter, StopRequest


def tree(folder: Path) -> dict[str, str]:
    """Take a digest of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def write(folder: Path, name: str, image: Image.Image, caption: str | None = None) -> Path:
    """Write a picture, maybe with a caption."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Provide twelve different pictures, one of them three times, and some that are none."""
    folder = tmp_path / "source"
    for number in range(12):
        write(folder, f"{number:02}.png", scene(number, 256), f"thing {number}")
    write(folder, "again/copy.png", scene(3, 256), "a copy")
    write(folder, "again/lossy.jpg", jpeg(scene(3, 256), 60))
    (folder / "broken.png").write_bytes((folder / "00.png").read_bytes()[:999])
    (folder / "notes.md").write_text("No picture.", encoding="utf-8")
    return folder


def build(source: Path, *options: str, code: int = 0) -> dict[str, Any]:
    """Make a dataset beside the source; return its manifest."""
    target = source.parent / "made"
    arguments = ["build", str(source), str(target), "--resolution", "256", *options]
    assert prepare.main(arguments) == code
    manifest = target / "manifest.json"
    return dict(json.loads(manifest.read_text(encoding="utf-8"))) if manifest.exists() else {}


# --- check ---


def test_doubtful_pictures_are_listed_with_the_cause(
    source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each of them once, in a table; the sum in the last line."""
    write_image(source / "tiny.png", (90, 90))
    scene(20, 256).resize((256, 100)).save(source / "wide.png")
    soft = scene(21, 64).resize((256, 256), Image.Resampling.BICUBIC)
    soft.save(source / "soft.png")
    Image.new("RGB", (256, 256), "black").save(source / "black.png")
    assert prepare.main(["check", str(source), "--resolution", "256"]) == 0
    lines = dict(line.split(None, 1) for line in capfd.readouterr().out.splitlines()[1:-1])
    assert lines["broken.png"] == "broken"
    assert lines["tiny.png"].startswith("small")
    assert "cropped by 36%" in lines["wide.png"]  # to 256x64
    assert "blurred" in lines["soft.png"]
    assert "dark" in lines["black.png"]
    twins = {lines[name] for name in ("again/copy.png", "again/lossy.jpg") if name in lines}
    assert "near duplicate" in twins
    assert not any(f"{number:02}.png" in lines for number in range(12) if number != 3)


def test_a_check_changes_nothing_and_writes_what_it_is_told(source: Path) -> None:
    """The report is JSON, the same every time, without a word on where things lie."""
    before = tree(source)
    reports = [source.parent / name for name in ("a.json", "b.json")]
    for report in reports:
        assert prepare.main(["check", str(source), "--report", str(report)]) == 0
    assert tree(source) == before
    assert reports[0].read_bytes() == reports[1].read_bytes()
    assert str(source.parent) not in reports[0].read_text(encoding="utf-8")
    known = json.loads(reports[0].read_text(encoding="utf-8"))
    assert len(known["pictures"]) == 15


def judged(tmp_path: Path, captions: list[str], **wishes: Any) -> list[str]:
    """Judge pictures with these captions; return what is said of all of them."""
    for number, caption in enumerate(captions):
        write(tmp_path / "said", f"{number}.png", scene(number, 256), caption)
    wanted = Wishes(resolution=256, trigger=["zkb"], **wishes)
    found = dataset.find_pictures(tmp_path / "said", wanted, Emitter(), StopRequest())
    return dataset.judge(found, wanted)


@pytest.mark.parametrize(
    ("captions", "words"),
    [
        (["zkb, red hat, a dog", "red hat, a cat", "red hat, zkb"], '"red hat" stands in 3 of 3'),
        (["a dog"] * 5, "All captions are the same"),
        (["I cannot describe this image", "b"], "0.png: its caption is a refusal"),
        (["The image shows a dog", "b"], "begins with words that say nothing"),
        (["a b c " * 5, "b"], "0.png: its caption repeats itself"),
        ([" ".join(map(str, range(70))), "b"], "0.png: about 94 tokens (estimated)"),
        (["a"], "Only 1 picture:"),
    ],
)
def test_odd_captions_are_named(captions: list[str], words: str, tmp_path: Path) -> None:
    """What teaches the wrong thing, or nothing."""
    assert any(words in remark for remark in judged(tmp_path, captions))


def test_sound_captions_are_left_alone(tmp_path: Path) -> None:
    """The trigger word stands in all of them, as it should."""
    captions = [f"zkb, {thing} on a table" for thing in ("a dog", "a cat", "a cup", "a jar", "ink")]
    assert judged(tmp_path, captions) == []


# --- build ---


def test_a_dataset_is_what_the_trainer_would_make_of_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preflight takes it without a warning on an image, and reads the same captions."""
    manifest = build(source, "--trigger", "zkb")
    monkeypatch.chdir(tmp_path)
    config = load_config(dataset_path="made/train", trigger_words=["zkb"], resolution=256)
    events = Emitter()
    pictures = train_lora.scan_dataset(config, events, StopRequest()).pictures
    assert events.warnings == {}
    said = {f"train/{picture.name}": picture.caption for picture in pictures}
    assert said == {i["file"]: i["caption"] for i in manifest["images"] if i["split"] == "train"}
    assert all(caption.startswith("zkb") for caption in said.values())


def test_the_texts_and_the_table_say_the_same(source: Path) -> None:
    """Whichever of them a program reads."""
    build(source)
    made = source.parent / "made"
    for split in ("train", "validation"):
        lines = (made / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        for entry in map(json.loads, lines):
            text = (made / split / entry["file_name"]).with_suffix(".txt")
            assert text.read_text(encoding="utf-8") == entry["text"] + "\n"


def test_what_is_certainly_of_no_use_is_left_out(source: Path) -> None:
    """Broken ones and exact copies; near ones only when asked for."""
    manifest = build(source)
    reasons = {each["source"]: each["reason"] for each in manifest["excluded"]}
    assert reasons["broken.png"] == "broken"
    assert list(reasons.values()).count("exact_duplicate") == 1
    assert manifest["counts"]["train"] + manifest["counts"]["validation"] == 13


def test_near_copies_can_be_left_out_and_the_best_stays(source: Path) -> None:
    """The largest picture of them."""
    write(source, "large.png", marked(scene(5, 512)))
    manifest = build(source, "--drop", "exact,near,broken")
    excluded = {each["source"]: each.get("of") for each in manifest["excluded"]}
    assert excluded["05.png"] == "large.png"
    assert "again/lossy.jpg" in excluded


def test_twice_is_the_same_to_the_last_byte(source: Path) -> None:
    """A second build finds all of it there; another folder gets the same."""
    before = tree(source)
    build(source)
    first = tree(source.parent / "made")
    build(source)
    assert tree(source.parent / "made") == first
    (source.parent / "made").rename(source.parent / "other")
    build(source)
    assert tree(source.parent / "made") == first
    assert tree(source) == before


def test_links_take_no_space_and_copies_are_apart(source: Path) -> None:
    """Who wants to retouch asks for copies."""
    build(source)
    made = source.parent / "made"
    (file,) = list(made.rglob("01.png"))
    assert file.samefile(source / "01.png")
    made.rename(source.parent / "linked")
    build(source, "--link", "copy")
    (file,) = list(made.rglob("01.png"))
    assert not file.samefile(source / "01.png")


def test_a_disk_without_links_gets_copies(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another disk does."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    manifest = build(source)
    file = manifest["images"][0]["file"]
    assert (source.parent / "made" / file).read_bytes() == (source / "00.png").read_bytes()


def test_cropped_pictures_are_what_training_sees(source: Path) -> None:
    """Upright squares of the resolution, without a word on where they were taken."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8825)[1] = "N"
    scene(30, 600).crop((0, 0, 600, 400)).save(source / "photo.jpg", exif=exif)
    manifest = build(source, "--fit", "crop")
    (entry,) = [i for i in manifest["images"] if i["source"] == "photo.jpg"]
    with Image.open(source.parent / "made" / entry["file"]) as image:
        assert (image.size, image.format, dict(image.getexif())) == ((256, 256), "PNG", {})
        fitted, _ = train_lora.fit_picture(
            train_lora.load_picture(source / "photo.jpg"), (256, 256)
        )
        assert image.tobytes() == fitted.tobytes()
    assert entry["source_size"] == [400, 600]
    assert "location" in entry["flags"]


# --- what the trainer reads beside pictures ---


def scanned(folder: Path, **changes: Any) -> tuple[train_lora.Picture, ...]:
    """Let the trainer look at a folder."""
    path = write_config(folder.parent, dataset_path=str(folder), resolution=256, **changes)
    config = train_lora.TrainingConfig.from_json(path)
    return train_lora.scan_dataset(config, Emitter(), StopRequest()).pictures


def report_of(source: Path, *options: str) -> tuple[dict[str, Any], list[str]]:
    """Check a folder; return what is said of each picture, and of all of them."""
    report = source.parent / "report.json"
    arguments = ["check", str(source), "--resolution", "256", "--report", str(report), *options]
    assert prepare.main(arguments) == 0
    said = json.loads(report.read_text(encoding="utf-8"))
    return {each["source"]: each for each in said["pictures"]}, said["remarks"]


@pytest.mark.parametrize("options", [[], ["--squares"]])
def test_what_cropping_costs_is_what_the_trainer_says(options: list[str], tmp_path: Path) -> None:
    """In shapes of their own, or where squares are asked for."""
    for number, size in enumerate([(256, 256), (512, 288), (288, 512), (400, 300), (256, 100)]):
        write(tmp_path / "source", f"{number}.png", scene(number, 900).crop((0, 0, *size)), "x")
    told, _ = report_of(tmp_path / "source", *options)
    pictures = scanned(tmp_path / "source", buckets=not options)
    assert {p.name: round(p.crop_loss, 3) for p in pictures} == {
        name: each["cropped"] for name, each in told.items()
    }
    flagged = {n for n, each in told.items() if any("cropped" in flag for flag in each["flags"])}
    assert flagged == {p.name for p in pictures if p.crop_loss > train_lora.CROP_LOSS}
    assert len(flagged) == (4 if options else 1)


def test_several_resolutions_are_judged_by_the_least(tmp_path: Path) -> None:
    """What fills 256 is not small because 512 is trained too."""
    write(tmp_path / "source", "a.png", scene(1, 256), "x")
    write(tmp_path / "source", "b.png", scene(2, 150), "x")
    told, _ = report_of(tmp_path / "source", "--resolution", "256,512")
    assert [("small" in told[name]["flags"]) for name in ("a.png", "b.png")] == [False, True]
    with pytest.raises(SystemExit):
        prepare.main(["check", str(tmp_path / "source"), "--resolution", "256,many"])


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """Provide masks beside pictures: sound, of another size, black, alpha, and one for none."""
    source, mask = tmp_path / "source", Image.new("L", (256, 256))
    mask.paste(255, (0, 0, 128, 256))
    masks = (mask, Image.new("L", (20, 20), 255), Image.new("L", (256, 256)))
    for number, each in enumerate(masks):
        write(source, f"{number}.png", scene(number, 256), "x")
        each.save(source / f"{number}.mask.png")
    clear = scene(50, 256).convert("RGBA")
    clear.putalpha(mask)
    clear.save(source / "clear.png")
    scene(51, 256).save(source / "lonely.mask.png")  # belongs to no picture, and is one
    return source


def test_masks_go_with_their_pictures(masked: Path) -> None:
    """The same bytes; what the trainer would refuse is flagged, and stays behind."""
    told, remarks = report_of(masked)
    assert "0.mask.png" not in told
    assert [told[n]["mask"] for n in ("0.png", "1.png", "clear.png", "lonely.mask.png")] == [
        *("0.mask.png", None, "clear.png", None)
    ]
    assert "its mask: 20x20 pixels, not those of the image" in told["1.png"]["flags"]
    assert "its mask: it is black" in told["2.png"]["flags"]
    assert any("2 pictures of 5 with a mask or an alpha channel" in each for each in remarks)
    images = {each["source"]: each for each in build(masked)["images"]}
    made = masked.parent / "made"
    assert (made / images["0.png"]["mask_file"]).samefile(masked / "0.mask.png")
    assert images["0.png"]["mask_file"] == images["0.png"]["file"].replace(".png", ".mask.png")
    assert images["clear.png"]["mask_file"] is None
    assert images["lonely.mask.png"]["file"].endswith("/lonely_mask.png")
    assert build(masked) == json.loads((made / "manifest.json").read_text(encoding="utf-8"))
    found = scanned(made / "train", masked_loss=True)
    assert {p.name for p in found if p.mask} == {"0.png", "clear.png"}


def test_masks_are_cropped_as_their_pictures_are(masked: Path) -> None:
    """And what was clear in a picture becomes a mask, as a square has no alpha channel."""
    wide = Image.new("L", (512, 256))
    wide.paste(255, (0, 0, 256, 256))
    scene(60, 512).crop((0, 0, 512, 256)).save(masked / "wide.png")
    wide.save(masked / "wide.mask.png")
    images = {each["source"]: each for each in build(masked, "--fit", "crop")["images"]}
    for name in ("wide.png", "clear.png", "0.png"):
        with Image.open(masked.parent / "made" / images[name]["mask_file"]) as mask:
            assert mask.size == (256, 256)
            shares = [mask.convert("L").getpixel((x, 128)) for x in (20, 236)]
        assert shares == [255, 0]


def test_repeats_are_kept_as_folders_that_say_them(tmp_path: Path) -> None:
    """Those of folders, and those of repeats.json; the trainer reads the same from the dataset."""
    source = tmp_path / "source"
    for number, folder in enumerate(("10_zkb", "plain", "deep/5_cat/inside", "", "2024_trip")):
        write(source / folder, f"{number}.png", scene(number, 256), "x")
    listed = {"plain": 3, ".": 2, "2024_trip": 1}
    (source / "repeats.json").write_text(json.dumps(listed), encoding="utf-8")
    told, remarks = report_of(source)
    before = {f"{n}.png": times for n, times in enumerate((10, 3, 5, 2, None))}
    assert {Path(name).name: each["repeats"] for name, each in told.items()} == before
    assert any("1 picture counts 10 times" in each for each in remarks)
    files = {Path(i["source"]).name: i["file"] for i in build(source)["images"]}
    assert files["0.png"] == "train/10_zkb/0.png"
    assert files["3.png"] == "train/2_images/3.png"
    assert files["2.png"] == "train/5_inside/2.png"
    assert files["4.png"] == "train/trip/4.png"
    pictures = scanned(tmp_path / "made" / "train", folder_repeats=True)
    assert {Path(p.name).name: p.repeats for p in pictures} == {
        name: times or 1 for name, times in before.items()
    }


def test_numbers_that_are_no_repeats_end_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They are named, as the trainer would refuse them."""
    write(tmp_path / "source", "2024_trip/1.png", scene(1, 256), "x")
    told, _ = report_of(tmp_path / "source")
    assert told["2024_trip/1.png"]["repeats"] is None
    assert "Repeats are not heeded: 2024_trip" in capfd.readouterr().err


# --- the split ---


def test_copies_never_stand_on_both_sides(source: Path) -> None:
    """Else validation would praise what was learned by heart."""
    for number in range(12):
        jpeg(scene(number, 256), 50).save(source / f"lossy_{number}.jpg")
    manifest = build(source, "--validation", "0.4", "--drop", "broken")
    sides: dict[int, set[str]] = {}
    for image in manifest["images"]:
        sides.setdefault(image["cluster"], set()).add(image["split"])
    assert all(len(side) == 1 for side in sides.values())
    assert manifest["counts"]["validation"] > 0


def test_a_new_picture_moves_no_other(source: Path) -> None:
    """Whether one is held back depends on itself and the seed."""
    former = {i["source"]: i["split"] for i in build(source, "--validation", "0.3")["images"]}
    write(source, "03a.png", scene(40, 256), "new")
    (source.parent / "made").rename(source.parent / "former")
    latter = {i["source"]: i["split"] for i in build(source, "--validation", "0.3")["images"]}
    assert {name: latter[name] for name in former} == former
    assert "validation" in former.values()


@pytest.mark.parametrize(("others", "held"), [(0, 0), (1, 1)])
def test_most_pictures_are_trained_on_though_many_are_alike(
    others: int, held: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A cluster is held back as a whole, so never one of more than half; no other is told."""
    for quality in range(40, 52):
        write(tmp_path / "source", f"{quality}.jpg", jpeg(scene(1, 256), quality), "x")
    for number in range(others):
        write(tmp_path / "source", f"{number}.png", scene(7 + number, 256), "y")
    told = build(tmp_path / "source", "--validation", "0.5")["counts"]
    assert (told["train"], told["validation"]) == (12, held)
    assert ("None is held back" in capfd.readouterr().err) == (not held)


def test_held_back_clusters_are_half_of_the_pictures_together_at_most() -> None:
    """Whatever seed orders them."""
    kept = [dataset.Found(name=str(n), path=Path(), cluster=n // 6) for n in range(12)]
    for seed in range(20):
        assert len(dataset.held_back(kept, Wishes(validation=0.5, seed=seed))) == 1


def test_few_pictures_are_all_trained_on(tmp_path: Path) -> None:
    """None can be spared."""
    for number in range(9):
        write(tmp_path / "source", f"{number}.png", scene(number, 256), "x")
    assert build(tmp_path / "source")["counts"]["validation"] == 0


# --- captions ---


@pytest.mark.parametrize(
    ("mode", "own", "caption"),
    [
        ("keep", "a dog", "zkb, a dog"),
        ("replace", "a dog", "a photo of zkb poodle"),
        ("prepend", "a dog", "a photo of zkb poodle, a dog"),
        ("append", "a dog", "a dog, a photo of zkb poodle"),
        ("keep", None, "a photo of zkb poodle"),
        ("append", " \n", "a photo of zkb poodle"),
        ("keep", "\ufeffA ZKB\r\nsleeps", "A ZKB sleeps"),
    ],
)
def test_a_template_meets_captions_as_asked(
    mode: str, own: str | None, caption: str, tmp_path: Path
) -> None:
    """An empty one counts as missing; a trigger word stands there once, whatever its case."""
    write(tmp_path / "source", "10_poodle/1.png", scene(1, 256), own)
    template = ("--template", "a photo of {trigger} {label}")
    manifest = build(tmp_path / "source", "--trigger", "zkb", *template, "--existing", mode)
    (image,) = manifest["images"]
    assert (image["caption"], image["repeats"]) == (caption, 10)


@pytest.mark.parametrize("text", ["a {colour} dog", "a {", "{0}", "{trigger.x}"])
def test_a_template_that_cannot_be_filled_writes_nothing(text: str, source: Path) -> None:
    """It is told which words there are."""
    assert build(source, "--template", text, code=1) == {}
    assert not (source.parent / "made").exists()


def test_a_template_may_have_braces_of_its_own() -> None:
    """Doubled, as everywhere in Python."""
    found = dataset.Found(name="dogs/1.png", path=Path("1.png"))
    wishes = Wishes(resolution=256, trigger=["zkb"])
    assert Template("{{{trigger}}}, {label}").fill(found, wishes) == "{zkb}, dogs"


@pytest.mark.parametrize(
    ("document", "keys"),
    [
        ([{"image": "/data/in/00.png", "caption": "given"}], ()),
        ({"00.png": "given"}, ()),
        ({"items": [{"file": {"name": "C:\\in\\00.png"}, "text": "given"}]}, ("file.name", "text")),
    ],
)
def test_captions_of_another_program_are_taken(
    document: Any, keys: tuple[str, ...], source: Path
) -> None:
    """By the names of the files, from the newest that matches; they win over texts beside."""
    for age, content in ((9, {"00.png": "old"}), (0, document)):
        file = source.parent / f"captions_{age}.json"
        file.write_text(json.dumps(content), encoding="utf-8")
        os.utime(file, (10**9 - age, 10**9 - age))
    options = ["--captions-from", str(source.parent / "captions_*.json")]
    options += [f"--{k}-key={v}" for k, v in zip(("image", "caption"), keys, strict=False)]
    images = {i["source"]: i for i in build(source, *options)["images"]}
    assert (images["00.png"]["caption"], images["00.png"]["caption_from"]) == ("given", "given")
    assert (images["01.png"]["caption"], images["01.png"]["caption_from"]) == ("thing 1", "txt")


def test_captions_are_told_apart_by_folders(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those whose paths have the longest end in common; of what fits alike none is taken."""
    names = ("001.png", "a/001.png", "b/001.png", "c/002.png", "d/003.png")
    for number, name in enumerate(names):
        write(tmp_path / "source", name, scene(number, 256), "own")
    given = [(f"/in/source/{name}", name) for name in names if name[0] in "0a"]
    given += [("C:\\in\\c\\002.png", "second"), ("x/003.png", "one"), ("y/003.png", "other")]
    file = tmp_path / "captions.json"
    file.write_text(json.dumps([{"image": i, "caption": c} for i, c in given]), encoding="utf-8")
    images = build(tmp_path / "source", "--captions-from", str(file))["images"]
    said = {i["source"]: i["caption"] for i in images}
    assert said == dict(zip(names, ("001.png", "a/001.png", "own", "second", "own"), strict=True))
    assert "d/003.png: 2 captions fit it" in capfd.readouterr().err


@pytest.mark.parametrize("content", [None, "{", '[{"other": 1}]'])
def test_captions_that_are_not_there_are_an_error(content: str | None, source: Path) -> None:
    """Nothing is written instead."""
    file = source.parent / "captions.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    assert build(source, "--captions-from", str(file), code=1) == {}


# --- hostile input, and accidents ---


def test_names_that_are_one_on_other_systems_get_numbers(tmp_path: Path) -> None:
    """Case, composed letters, what Windows forbids, and pictures that would share a text."""
    names = ["a.png", "A.png", "a.jpg", "e\u0301.png", "\u00e9.png", 'b:"?.png', "-x.png", "c .png"]
    for number, name in enumerate(names):
        write(tmp_path / "source", name, scene(number, 256))
    files = [image["file"] for image in build(tmp_path / "source", "--trigger", "zkb")["images"]]
    assert len({name.casefold().rpartition(".")[0] for name in files}) == len(names)
    assert not any(set('<>:"\\|?*') & set(name) for name in files)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_text_does_no_harm(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nor one that would move the cursor; in the dataset they have plain ones."""
    names = [os.fsdecode(b"a\xff.png"), "b\x1b[2J\n.png"]
    for number, name in enumerate(names):
        write(tmp_path / "source", name, scene(number, 64))
    files = [i["file"] for i in build(tmp_path / "source", "--trigger", "zkb")["images"]]
    assert sorted(files) == ["train/a_.png", "train/b_[2J_.png"]
    assert prepare.main(["check", str(tmp_path / "source")]) == 0
    told = capfd.readouterr()
    assert "a?.png" in told.out
    assert "\x1b" not in told.out + told.err


def test_links_and_pipes_are_named_and_left_out(source: Path) -> None:
    """Nothing outside is read, and nothing is waited for."""
    write_image(source.parent / "secret.png")
    (source / "out.png").symlink_to(source.parent / "secret.png")
    os.mkfifo(source / "pipe.png")
    (source / "folder.png").mkdir()
    excluded = {each["source"] for each in build(source)["excluded"]}
    assert {"out.png", "pipe.png"} <= excluded


def test_places_inside_each_other_are_refused(source: Path) -> None:
    """The dataset would become part of itself."""
    for target in (source, source / "made", source.parent):
        assert prepare.main(["build", str(source), str(target)]) == 1


def test_a_target_with_other_things_is_refused_untouched(source: Path) -> None:
    """Whatever it is, it is not this dataset."""
    made = source.parent / "made"
    write_image(made / "train" / "mine.png")
    assert build(source, code=1) == {}
    assert list(tree(made)) == ["train/mine.png"]


def test_a_dry_run_writes_nothing(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It says what would become of every picture."""
    assert build(source, "--dry-run") == {}
    assert not (source.parent / "made").exists()
    assert "00.png" in capfd.readouterr().out


def test_a_build_that_was_killed_is_gone_on_with(source: Path) -> None:
    """To the same bytes; the manifest comes last."""
    build(source, "--link", "copy")
    whole = tree(source.parent / "made")
    (source.parent / "made").rename(source.parent / "whole")
    program = (
        f"import sys, os; sys.path[:0] = [{str(ROOT)!r}]\n"
        "import train_lora; from tools import prepare\n"
        "calls = [0]\n"
        "def strike(event, _):\n"
        "    if event == 'os.rename':\n"
        "        calls[0] += 1\n"
        f"        if calls[0] == 9: os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "sys.addaudithook(strike)\n"
        "prepare.main(sys.argv[1:])"
    )
    made = source.parent / "made"
    command = [sys.executable, "-c", program, "build", str(source), str(made)]
    command += ["--resolution", "256", "--link", "copy"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert 0 < len(tree(made)) < len(whole)
    assert not (made / "manifest.json").exists()
    build(source, "--link", "copy")
    assert {k: v for k, v in tree(made).items() if not k.endswith(".tmp")} == whole


def test_the_example_passes_from_folder_to_preflight(tmp_path: Path) -> None:
    """The whole way, as a user goes it."""
    made = tmp_path / "imps"
    options = ["--trigger", "zkb", "--resolution", "256"]
    assert prepare.main(["build", str(ROOT / "examples" / "images"), str(made), *options]) == 0
    base = str(ROOT / "examples" / "tiny-sd")
    changes: dict[str, Any] = {"dataset_path": str(made / "train"), "base_model": base}
    path = write_config(tmp_path, resolution=256, trigger_words=["zkb"], **changes)
    config = train_lora.TrainingConfig.from_json(path)
    assert train_lora.LoRATrainer(config).validate().images == 10
