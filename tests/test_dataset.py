"""Images and captions: what is found, what is used, what is left out and why."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Recorder, load_config, write_config, write_image, write_model
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, JpegImagePlugin
from processes import run_program

import train_lora

POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")
NOT_ROOT = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is closed to root"
)

Scan = train_lora.Dataset
Scanner = Callable[..., Scan]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide an empty dataset in the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture
def scan(events: train_lora.Emitter, stop: train_lora.StopRequest) -> Scanner:
    """Provide a function that scans the dataset under a config with changes."""

    def scan_with(**changes: object) -> Scan:
        return train_lora.scan_dataset(load_config(**changes), events, stop)

    return scan_with


def names(dataset: Scan) -> list[str]:
    """List the names of the usable images."""
    return [picture.name for picture in dataset.pictures]


def captions(dataset: Scan) -> dict[str, str]:
    """List the captions by image."""
    return {picture.name: picture.caption for picture in dataset.pictures}


def reasons(recorder: Recorder, code: str) -> dict[str, str]:
    """List what warnings of a code say, by file."""
    told = recorder.of_type("warning")
    return {w["data"]["file"]: w["data"]["reason"] for w in told if w["code"] == code}


# --- which files count ---


def test_images_are_found_in_all_folders_and_whatever_the_case_of_their_suffix(
    data: Path, scan: Scanner
) -> None:
    """All suffixes count, at any depth, in any case."""
    for name in ("a.PNG", "b/c.Jpg", "b/d/e.jpeg", "f.WEBP", "g.bmp", "h.jfif", "i.avif"):
        write_image(data / name)
    (data / "notes.md").write_text("no image", encoding="utf-8")
    seven = ["a.PNG", "b/c.Jpg", "b/d/e.jpeg", "f.WEBP", "g.bmp", "h.jfif", "i.avif"]
    assert names(scan()) == seven


def test_hidden_files_and_archive_debris_are_ignored_without_a_word(
    data: Path, scan: Scanner, recorder: Recorder
) -> None:
    """What file managers and archives leave behind is neither used nor mentioned."""
    write_image(data / "good.png", (600, 600))
    for name in ("._good.png", ".cache/x.png", "__MACOSX/x.png", "sub/__MACOSX/x.png"):
        write_image(data / name)
    assert names(scan()) == ["good.png"]
    assert recorder.codes() == []


def test_files_of_other_kinds_are_counted_by_kind(
    data: Path, scan: Scanner, recorder: Recorder
) -> None:
    """Whoever has photographs of a phone and kohya's captions learns why they are not used."""
    write_image(data / "good.png", (600, 600))
    for name in ("a.HEIC", "b.heic", "old/c.tif", "good.caption", "notes.md"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_bytes(b"something")
    scan()
    (told,) = recorder.of_type("warning")
    assert told["code"] == "files_unread"
    assert told["data"]["kinds"] == {".heic": 2, ".tif": 1, ".caption": 1}
    assert "2 .heic" in told["message"]


def test_folders_named_for_repeats_are_read_once_and_named(
    data: Path, scan: Scanner, recorder: Recorder
) -> None:
    """In kohya's trainer, 10_zkb has each of its images ten times in an epoch."""
    for name in ("10_zkb dog/a.png", "3_other/deep/b.png", "2024/c.png", "v1/d.png"):
        write_image(data / name, (600, 600))
    assert len(names(scan())) == 4
    (told,) = recorder.of_type("warning")
    assert told["code"] == "repeats_ignored"
    assert set(told["data"]["folders"]) == {"10_zkb dog", "3_other"}


def repeats(dataset: Scan) -> dict[str, int]:
    """List how often each image counts."""
    return {picture.name: picture.repeats for picture in dataset.pictures}


def test_the_number_of_the_nearest_folder_is_how_often_an_image_counts(
    data: Path, scan: Scanner, recorder: Recorder
) -> None:
    """As in kohya's trainer, and in folders inside as well; what has no number counts once."""
    for name in ("10_zkb dog/a.png", "10_zkb dog/deep/2_b/b.png", "10_zkb dog/deep/c.png", "d.png"):
        write_image(data / name, (600, 600))
    assert repeats(scan(folder_repeats=True)) == {
        "10_zkb dog/a.png": 10,
        "10_zkb dog/deep/2_b/b.png": 2,
        "10_zkb dog/deep/c.png": 10,
        "d.png": 1,
    }
    assert recorder.codes() == []


def test_repeats_json_counts_for_more_than_names_of_folders(data: Path, scan: Scanner) -> None:
    """By the path of each folder, the dataset's own included; in both folders of images."""
    for name in ("data/10_zkb/a.png", "data/b/c/d.png", "data/e.png", "others/3_f/g.png"):
        write_image(data.parent / name, (600, 600)).with_suffix(".txt").write_text("a dog")
    text = '\ufeff{"10_zkb": 5, "b/c": 7, ".": 2}'
    (data / "repeats.json").write_text(text, encoding="utf-8")
    (data.parent / "others" / "repeats.json").write_text('{"3_f": 4}', encoding="utf-8")
    found = repeats(scan(folder_repeats=True, regularization_path="others"))
    assert found == {"10_zkb/a.png": 5, "b/c/d.png": 7, "e.png": 2, "others/3_f/g.png": 4}


def test_repeats_json_is_named_where_it_does_not_count(
    data: Path, scan: Scanner, recorder: Recorder
) -> None:
    """Whoever wrote it did so for a reason."""
    write_image(data / "a.png", (600, 600))
    (data / "repeats.json").write_text('{".": 5}', encoding="utf-8")
    assert repeats(scan()) == {"a.png": 1}
    (told,) = recorder.of_type("warning")
    assert (told["code"], told["data"]["folders"]) == ("repeats_ignored", ["repeats.json"])


@pytest.mark.parametrize(
    ("written", "path", "found"),
    [
        ('{"b": 0}', "b", "0"),
        ('{"b": 1001}', "b", "1001"),
        ('{"b": true}', "b", "true"),
        ('{"b": "5"}', "b", '"5"'),
        ('{"gone": 5}', "gone", "5"),
        ('{"b": 5, "b": 6}', "repeats.json", "it 2 times"),
        ("[5]", "repeats.json", "[5]"),
        ("{", "repeats.json", ""),
        ('{"b": "' + "x" * 2**20 + '"}', "repeats.json", "larger than 1024 KiB"),
    ],
)
def test_repeats_that_are_none_are_refused(
    data: Path, scan: Scanner, written: str, path: str, found: str
) -> None:
    """With the place, before any image is looked at."""
    write_image(data / "b" / "a.png", (600, 600))
    (data / "repeats.json").write_text(written, encoding="utf-8")
    with pytest.raises(train_lora.TrainError) as failed:
        scan(folder_repeats=True)
    assert failed.value.code is train_lora.ErrorCode.REPEATS_INVALID
    (problem,) = failed.value.problems
    assert (problem.path, found in problem.found) == (path, True)
    assert problem.hint


@pytest.mark.parametrize("name", ["2024_holiday", "0_nothing", "9" * 80 + "_much"])
def test_a_folder_named_for_no_sensible_number_is_refused(
    data: Path, scan: Scanner, name: str
) -> None:
    """A year is no number of repeats; repeats.json can say another."""
    write_image(data / name / "a.png", (600, 600))
    with pytest.raises(train_lora.TrainError) as failed:
        scan(folder_repeats=True)
    assert [problem.path for problem in failed.value.problems] == [name]
    (data / "repeats.json").write_text(json.dumps({name: 3}), encoding="utf-8")
    assert repeats(scan(folder_repeats=True)) == {f"{name}/a.png": 3}


@pytest.mark.parametrize("sign", ["state", "samples", ".lock"])
@pytest.mark.parametrize("place", ["v1", "."])
def test_the_output_of_another_run_is_no_dataset(
    data: Path, scan: Scanner, recorder: Recorder, place: str, sign: str
) -> None:
    """Its previews would be learned as if they were photographs, from the first one on."""
    write_image(data / "good.png", (600, 600))
    write_image(data / place / "inner" / "step_100.png", (600, 600))
    (data / place / sign).mkdir()
    (data / place / "events.jsonl").write_bytes(b"")
    if place == ".":
        with pytest.raises(train_lora.TrainError) as refused:
            scan()
        assert refused.value.code is train_lora.ErrorCode.DATASET_EMPTY
    else:
        assert names(scan()) == ["good.png"]
    (reason,) = reasons(recorder, "folder_skipped").values()
    assert reason.startswith("the output of a run")


def test_images_that_lose_much_by_cropping_are_counted_and_named(
    data: Path, scan: Scanner, recorder: Recorder
) -> None:
    """More than a fifth: a portrait loses its head. The worst comes first."""
    sizes = {"a.png": (800, 640), "b.png": (600, 1200), "c.png": (512, 768), "d.png": (600, 600)}
    for name, size in sizes.items():
        write_image(data / name, size)
    assert scan().facts.cropped == 0
    assert scan(buckets=False).facts.cropped == 2
    (told,) = recorder.of_type("warning")
    assert (told["code"], told["data"]["images"]) == ("images_cropped", 2)
    lost = told["data"]["lost"]
    assert lost == [{"file": "b.png", "share": 0.5}, {"file": "c.png", "share": 0.33}]


def test_images_come_in_natural_order(data: Path, scan: Scanner) -> None:
    """Image 10 stands after image 9, whatever the case of the letters."""
    order = ["a/2.png", "a/10.png", "IMAGE9.png", "image10.png", "Image011.png"]
    for name in reversed(order):
        write_image(data / name)
    assert names(scan()) == order


def test_names_of_digits_that_are_no_decimals_can_be_sorted(data: Path, scan: Scanner) -> None:
    """A superscript two is a digit to some functions and no number to others."""
    for name in ("²a.png", "2a.png", "٣a.png", "a.png"):
        write_image(data / name)
    assert len(names(scan())) == 4


@pytest.mark.parametrize("output", ["data/out", "data/deep/out"])
def test_an_output_folder_inside_the_dataset_is_not_scanned(
    data: Path, scan: Scanner, output: str
) -> None:
    """Samples never become training images."""
    write_image(data / "good.png")
    write_image(Path(output) / "samples" / "step_100.png")
    write_image(data / "deep" / "also.png")
    assert names(scan(output_path=output)) == ["deep/also.png", "good.png"]


@pytest.mark.parametrize("knob", ["loras_path", "embeddings_path"])
@pytest.mark.parametrize("at", ["data", "data/deep"])
def test_another_program_s_folder_inside_the_dataset_is_not_scanned(
    data: Path, scan: Scanner, knob: str, at: str
) -> None:
    """The picture that is put beside a finished LoRA is none to learn from at the next start."""
    write_image(data / "good.png")
    write_image(data / "deep" / "also.png")
    write_image(Path(at) / "loras" / "zkb.preview.png")
    assert names(scan(**{knob: f"{at}/loras"})) == ["deep/also.png", "good.png"]


@POSIX
def test_a_linked_folder_is_skipped_with_a_warning(
    data: Path, scan: Scanner, recorder: Recorder
) -> None:
    """A link to a folder may lead anywhere, also in a circle."""
    write_image(data / "good.png", (600, 600))
    (data / "circle").symlink_to(data)
    assert names(scan()) == ["good.png"]
    assert reasons(recorder, "folder_skipped") == {"circle": "it is a link"}


@NOT_ROOT
def test_an_unreadable_folder_is_skipped_with_a_warning(
    data: Path, scan: Scanner, recorder: Recorder
) -> None:
    """What cannot be looked into is named."""
    write_image(data / "good.png", (600, 600))
    (data / "closed").mkdir(mode=0)
    assert names(scan()) == ["good.png"]
    assert list(reasons(recorder, "folder_skipped")) == ["closed"]


@POSIX
@pytest.mark.parametrize("name", ["d", "folder"])
def test_a_dataset_1500_folders_deep_ends_in_order(
    data: Path, scan: Scanner, recorder: Recorder, name: str
) -> None:
    """What can be reached is used; where names become too long to ask for, that is told."""
    write_image(data / "good.png", (600, 600))
    root = os.open(data, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir(name, dir_fd=root)
        inner = os.open(name, os.O_RDONLY, dir_fd=root)
        os.close(root)
        root = inner
    source = (data / "good.png").read_bytes()
    with os.fdopen(os.open("x.png", os.O_CREAT | os.O_WRONLY, dir_fd=root), "wb") as file:
        file.write(source)
    os.close(root)
    try:
        found = scan()
    finally:  # too deep for whoever tidies up after tests
        subprocess.run(["rm", "-rf", data / name], check=True)
    told = reasons(recorder, "folder_skipped")
    if name == "d":
        assert (len(found.pictures), told) == (2, {})
    else:
        assert names(found) == ["good.png"]
        assert list(told.values()) == ["it cannot be read (File name too long)"]


# --- captions ---


def test_a_text_beside_the_image_beats_metadata_which_beats_the_trigger_words(
    data: Path, scan: Scanner
) -> None:
    """Each image takes the most particular caption there is."""
    lines = [{"file_name": f"{n}.png", "text": "from metadata"} for n in ("text", "line")]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (data / "text.txt").write_text("from text", encoding="utf-8")
    for name in ("text.png", "line.png", "bare.png"):
        write_image(data / name)
    dataset = scan(trigger_words=["zkb"])
    wanted = {"bare.png": "zkb", "line.png": "zkb, from metadata", "text.png": "zkb, from text"}
    assert captions(dataset) == wanted
    assert (dataset.facts.captions_found, dataset.facts.captions_missing) == (2, 1)


# --- images that keep the base model as it is ---


@pytest.fixture
def beside(data: Path) -> Path:
    """Provide one image in the dataset, and a folder with another of the same name inside it."""
    for folder, caption in ((data, "a cat"), (data / "others", "a dog")):
        write_image(folder / "x.png")
        (folder / "x.txt").write_text(caption, encoding="utf-8")
    return data / "others"


def test_images_for_regularization_get_no_trigger_words(beside: Path, scan: Scanner) -> None:
    """They come last, under the name of their folder, and are not part of the dataset as well."""
    dataset = scan(trigger_words=["zkb"], regularization_path=str(beside))
    assert captions(dataset) == {"x.png": "zkb, a cat", "others/x.png": "a dog"}
    assert (dataset.facts.images, dataset.facts.regularization_images) == (1, 1)
    assert dataset.facts.captions_found == 1


def test_images_for_regularization_need_captions(
    beside: Path, scan: Scanner, recorder: Recorder
) -> None:
    """No trigger word stands in where a caption is missing; metadata.jsonl serves as well."""
    (beside / "x.txt").unlink()
    with pytest.raises(train_lora.TrainError) as refused:
        scan(trigger_words=["zkb"], regularization_path=str(beside))
    assert refused.value.code is train_lora.ErrorCode.CAPTIONS_MISSING
    (problem,) = refused.value.problems
    assert (problem.path, problem.hint) == ("others/x.png", "Write a caption beside it.")
    (beside / "metadata.jsonl").write_text('{"file_name": "x.png", "text": "a dog"}', "utf-8")
    assert captions(scan(regularization_path=str(beside)))["others/x.png"] == "a dog"


def test_a_bad_image_for_regularization_is_skipped_and_named(
    beside: Path, scan: Scanner, recorder: Recorder
) -> None:
    """It counts among the skipped; a folder without any good one is refused by its name."""
    (beside / "y.png").write_bytes(b"no image")
    assert scan(regularization_path=str(beside)).facts.skipped == 1
    assert list(reasons(recorder, "image_skipped")) == ["others/y.png"]
    (beside / "x.png").unlink()
    with pytest.raises(train_lora.TrainError, match="others") as refused:
        scan(regularization_path=str(beside))
    assert refused.value.code is train_lora.ErrorCode.DATASET_EMPTY


# --- captions, byte by byte ---


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        (b"\xef\xbb\xbfa cat", "a cat"),
        (b"a cat\r\n", "a cat"),
        (b"a cat,\non a mat\n\n", "a cat, on a mat"),
        (b"  a\t cat ", "a cat"),
        ("eine Kätzin \N{CAT FACE}".encode(), "eine Kätzin \N{CAT FACE}"),
        (b"\xef\xbb\xbfa\r\nb\rc", "a b c"),
    ],
)
def test_a_caption_becomes_one_clean_line(
    data: Path, scan: Scanner, content: bytes, caption: str
) -> None:
    """Byte order mark, line ends and surplus blanks go; everything else stays."""
    write_image(data / "x.png")
    (data / "x.txt").write_bytes(content)
    assert captions(scan(trigger_words=[])) == {"x.png": caption}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "an empty file"),
        (b" \r\n\t", "an empty caption"),
        (b"\xef\xbb\xbf", "an empty caption"),
        (b"caf\xe9", "not UTF-8"),
        (b"a" * 10**6, "larger than 64 KiB"),
    ],
)
def test_an_unusable_caption_is_named_and_the_trigger_words_stand_in(
    data: Path, scan: Scanner, recorder: Recorder, content: bytes, reason: str
) -> None:
    """One bad text file costs its caption, not its image."""
    write_image(data / "x.png")
    (data / "x.txt").write_bytes(content)
    assert captions(scan(trigger_words=["zkb"])) == {"x.png": "zkb"}
    assert reasons(recorder, "caption_unusable") == {"x.txt": reason}


def test_an_unusable_text_leaves_the_caption_of_the_metadata(data: Path, scan: Scanner) -> None:
    """The next best caption is used."""
    write_image(data / "x.png")
    (data / "x.txt").write_bytes(b"")
    line = {"file_name": "x.png", "text": "a cat"}
    (data / "metadata.jsonl").write_text(json.dumps(line), encoding="utf-8")
    assert captions(scan(trigger_words=[])) == {"x.png": "a cat"}


def test_a_caption_file_may_shout(data: Path, scan: Scanner) -> None:
    """IMAGE.TXT stands beside IMAGE.PNG."""
    write_image(data / "IMAGE.PNG")
    (data / "IMAGE.TXT").write_text("a cat", encoding="utf-8")
    assert captions(scan(trigger_words=[])) == {"IMAGE.PNG": "a cat"}


def test_a_caption_may_contain_dots_and_belongs_to_its_own_image_only(
    data: Path, scan: Scanner
) -> None:
    """The name up to the last dot decides."""
    for name in ("a.png", "a.b.png", "sub/a.png"):
        write_image(data / name)
    (data / "a.b.txt").write_text("inner dot", encoding="utf-8")
    (data / "sub" / "a.txt").write_text("sub", encoding="utf-8")
    found = captions(scan(trigger_words=["t"]))
    assert found == {"a.b.png": "t, inner dot", "a.png": "t", "sub/a.png": "t, sub"}


@POSIX
@pytest.mark.parametrize("name", ["x.txt", "metadata.jsonl"])
def test_a_caption_link_to_the_outside_leaks_nothing(
    data: Path, scan: Scanner, recorder: Recorder, name: str
) -> None:
    """A dataset from a stranger cannot make the program read other files aloud."""
    secret = {"file_name": "x.png", "text": "hunter2"}
    Path("secret").write_text(json.dumps(secret), encoding="utf-8")
    write_image(data / "x.png")
    (data / name).symlink_to(Path("secret").resolve())
    assert captions(scan(trigger_words=["zkb"])) == {"x.png": "zkb"}
    assert "hunter2" not in json.dumps(recorder.records)
    assert reasons(recorder, "caption_unusable") == {name: "a link that leaves the dataset"}


@POSIX
def test_a_caption_pipe_does_not_block(data: Path, scan: Scanner, recorder: Recorder) -> None:
    """Nothing but regular files is ever opened."""
    write_image(data / "x.png")
    os.mkfifo(data / "x.txt")
    scan()
    assert reasons(recorder, "caption_unusable") == {"x.txt": "not a regular file"}


# --- trigger words ---

FRAGMENTS = st.sampled_from(
    [
        *("zkb", "ZKB", "zkb person", "person", "zkbx", "_", "über", "café", "猫", "two\twords"),
        *("c++", "(a|b)*", "[^x]", "\\d", "$^", "a photo of", "a", ",", "on a mat,"),
    ]
)
CAPTIONS = st.lists(FRAGMENTS, max_size=8).map(lambda parts: " ".join(" ".join(parts).split()))
APART = st.lists(
    st.sampled_from(["zkb", "c++", "(a|b)*", "[^x]", "\\d", "ÜBER", "猫", "two  words", "_"]),
    unique=True,
)
NESTED = st.lists(
    st.sampled_from(["zkb", "zkb person", "person", "a zkb person", "a", "ZKB Person on"]),
    unique=True,
)


def times(word: str, caption: str) -> int:
    """Count how often a word stands in a caption as a word of its own, whatever the case."""
    word = " ".join(word.split())
    return len(re.findall(rf"(?i)(?<!\w){re.escape(word)}(?!\w)", caption))


@given(CAPTIONS, st.one_of(APART, NESTED))
@example("a cat beside another cat, the cat sleeps", ["cat"])
def test_a_caption_stays_as_it_is_behind_the_words_it_lacks(caption: str, words: list[str]) -> None:
    """However often a word stands there: whoever wrote it meant it."""
    composed = train_lora.compose_caption(caption, words)
    assert composed.endswith(caption)
    for word in filter(None, composed.removesuffix(caption).split(", ")):
        assert times(word, caption) == 0
        assert word in [" ".join(each.split()) for each in words]


@given(CAPTIONS, NESTED)
@example("zkb and a zkb person", ["zkb", "zkb person"])
def test_no_trigger_word_is_lost_to_another_that_contains_it(
    caption: str, words: list[str]
) -> None:
    """A word counts as present inside a longer one, and both survive."""
    composed = train_lora.compose_caption(caption, words)
    assert [word for word in words if times(word, composed) == 0] == []


@given(CAPTIONS, st.one_of(APART, NESTED))
@example("a photo of zkb", ["zkb", "zkb person"])
def test_composing_twice_changes_nothing(caption: str, words: list[str]) -> None:
    """A composed caption is finished."""
    once = train_lora.compose_caption(caption, words)
    assert train_lora.compose_caption(once, words) == once


@given(CAPTIONS)
def test_without_trigger_words_a_caption_stays_as_it_is(caption: str) -> None:
    """Nothing is asked for, so nothing changes."""
    assert train_lora.compose_caption(caption, []) == caption


@pytest.mark.parametrize(
    ("caption", "words", "composed"),
    [
        ("", ["zkb"], "zkb"),
        ("", [], ""),
        ("a cat", ["zkb", "style"], "zkb, style, a cat"),
        ("a cat", ["style", "zkb"], "style, zkb, a cat"),
        ("a zkb cat", ["zkb"], "a zkb cat"),
        ("a ZKB cat", ["zkb"], "a ZKB cat"),
        ("zkb, a cat, zkb", ["zkb"], "zkb, a cat, zkb"),
        ("zkb cat, zkb, zkb mat", ["zkb"], "zkb cat, zkb, zkb mat"),
        ("a cat,, on  a mat ,", ["zkb"], "zkb, a cat,, on  a mat ,"),
        ("a cat,, on  a mat , zkb", ["zkb"], "a cat,, on  a mat , zkb"),
        ("zkbs", ["zkb"], "zkb, zkbs"),
        ("a zkb person", ["zkb", "zkb person"], "a zkb person"),
        ("a cat", ["zkb", "zkb person"], "zkb person, a cat"),
        ("a cat", ["zkb", "ZKB"], "zkb, a cat"),
        ("a cat", ["zkb \t person"], "zkb person, a cat"),
    ],
)
def test_missing_trigger_words_come_in_front_in_their_order(
    caption: str, words: list[str], composed: str
) -> None:
    """What stands in the caption stays, whatever it is."""
    assert train_lora.compose_caption(caption, words) == composed


def test_a_caption_as_long_as_any_stays_as_it_is() -> None:
    """However often a word stands there; whoever looked at every pair would take a minute."""
    caption = "zkb " * 16_000
    assert train_lora.compose_caption(caption, ["zkb", "cat"]) == "cat, " + caption


@pytest.mark.parametrize("place", ["x.txt", "metadata.jsonl"])
def test_a_caption_has_at_most_64_kib(
    data: Path, scan: Scanner, recorder: Recorder, place: str
) -> None:
    """Beside the image and in metadata alike; a longer one is told and not used."""
    write_image(data / "x.png")
    for length, used in ((64 * 1024, True), (64 * 1024 + 1, False)):
        text = "é" + "a" * (length - 2)
        line = json.dumps({"file_name": "x.png", "text": text})
        (data / place).write_text(line if place == "metadata.jsonl" else text, encoding="utf-8")
        recorder.records.clear()
        assert captions(scan(trigger_words=["zkb"])) == {"x.png": f"zkb, {text}" if used else "zkb"}
        told = [w for w in recorder.of_type("warning") if w["code"] != "images_small"]
        assert ["larger than 64 KiB" in json.dumps(w) for w in told] == [True] * (not used)


# --- metadata.jsonl ---


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"file_name": "/etc/passwd", "text": "x"}', "leads out"),
        (b'{"file_name": "../x.png", "text": "x"}', "leads out"),
        (b'{"file_name": "sub/../../x.png", "text": "x"}', "leads out"),
        (b'{"file_name": "..\\\\x.png", "text": "x"}', "leads out"),
        (b'{"file_name": "x.png\\u0000", "text": "x"}', "leads out"),
        (b'{"file_name": "C:\\\\x.png", "text": "x"}', "leads out"),
        (b'{"file_name": "c:x.png", "text": "x"}', "leads out"),
        (b'{"file_name": "\\\\\\\\host\\\\share\\\\x.png", "text": "x"}', "leads out"),
        (b'{"file_name": "//host/x.png", "text": "x"}', "leads out"),
        (b'{"file_name": "https://example.com/x.png", "text": "x"}', "leads out"),
        (b'{"file_name": "file:///x.png", "text": "x"}', "leads out"),
        (b'{"file_name": "gone.png", "text": "x"}', "names no file"),
        (b'{"file_name": "", "text": "x"}', "names no file"),
        (b'{"file_name": "x.png"}', "file_name and text"),
        (b'{"text": "x"}', "file_name and text"),
        (b'{"file_name": 1, "text": "x"}', "file_name and text"),
        (b'{"file_name": "x.png", "text": null}', "file_name and text"),
        (b'{"file_name": "x.png", "text": "a", "text": "b"}', "file_name and text"),
        (b'{"file_name": "x.png", "text": NaN}', "file_name and text"),
        (b'{"file_name": "x.png", "text": "\\ud800"}', "file_name and text"),
        (b'{"file_name": "sub/x.png", "text": " "}', "empty caption"),
        (b'["x.png", "x"]', "file_name and text"),
        (b"null", "file_name and text"),
        (b"x.png: a cat", "not JSON"),
        (b'{"file_name": "x.png", "text": "caf\xe9"}', "not JSON"),
        pytest.param(b"[" * 100_000, "not JSON", id="brackets"),
        pytest.param(b"1" * 10_000, "not JSON", id="digits"),
    ],
)
def test_a_bad_line_of_metadata_costs_only_itself(
    data: Path, scan: Scanner, recorder: Recorder, line: bytes, reason: str
) -> None:
    """The lines around it count, and the warning tells file, line and reason."""
    write_image(data / "sub" / "x.png")
    write_image(Path("x.png"))
    good = b'{"file_name": "sub/x.png", "text": "good"}'
    (data / "metadata.jsonl").write_bytes(b"\n".join([good, line, b"", good.replace(b"oo", b"oa")]))
    assert captions(scan(trigger_words=[])) == {"sub/x.png": "goad"}
    (warning,) = [w for w in recorder.of_type("warning") if w["code"] == "metadata_line_refused"]
    (first,) = warning["data"]["first"]
    assert (warning["data"]["file"], warning["data"]["lines"], first["line"]) == (
        "metadata.jsonl",
        1,
        2,
    )
    assert reason in first["reason"]


def test_a_file_full_of_bad_metadata_is_told_once(
    data: Path, scan: Scanner, recorder: Recorder
) -> None:
    """With a count and the first few; a warning for each of 200,000 lines would be 50 MB."""
    write_image(data / "x.png")
    write_image(data / "sub" / "x.png")
    for folder in (data, data / "sub"):
        (folder / "metadata.jsonl").write_bytes(b"1\n\n" * 2000 + b'{"file_name": "y.png"}')
    scan()
    told = [w["data"] for w in recorder.of_type("warning") if w["code"] == "metadata_line_refused"]
    assert {each["file"]: each["lines"] for each in told} == {
        "metadata.jsonl": 2001,
        "sub/metadata.jsonl": 2001,
    }
    assert [each["line"] for each in told[0]["first"]] == [1, 3, 5, 7, 9]


def test_a_stop_request_ends_the_reading_of_metadata(
    data: Path, stop: train_lora.StopRequest, events: train_lora.Emitter
) -> None:
    """A file of 64 MiB takes longer than a stop may."""
    (data / "metadata.jsonl").write_bytes(b"1\n" * 10)
    stop.request("SIGTERM")
    folder = train_lora.ImageFolder(data, load_config(), events, stop)
    folder.find_files()
    with pytest.raises(train_lora.TrainingInterrupted):
        folder.read_captions()


def test_metadata_in_a_subfolder_speaks_of_that_folder(data: Path, scan: Scanner) -> None:
    """File names count from where metadata.jsonl lies."""
    for name in ("x.png", "sub/x.png", "sub/deep/y.png"):
        write_image(data / name)
    lines = [
        {"file_name": "x.png", "text": "below"},
        {"file_name": "deep\\y.png", "text": "deepest", "extra": [1]},
    ]
    (data / "sub" / "metadata.jsonl").write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, lines)).encode()
    )
    found = captions(scan(trigger_words=["t"]))
    assert found == {"sub/deep/y.png": "t, deepest", "sub/x.png": "t, below", "x.png": "t"}


# --- odd images ---


def encoded(format_name: str, image: Image.Image | None = None, **options: object) -> bytes:
    """Encode a picture of 64 by 48, by default a gradient."""
    buffer = io.BytesIO()
    image = image or Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """Frame the content of one chunk of a PNG."""
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def bomb_png() -> bytes:
    """Make a small PNG of 30,000 by 30,000 black pixels."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(bytes(3751 * 1000)) for _ in range(30)) + packer.flush()
    chunks = [(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def text_bomb_png() -> bytes:
    """Make a small PNG whose comment unpacks to 64 MiB."""
    comment = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**26), 9))
    plain = encoded("PNG")
    return plain[:33] + comment + plain[33:]


def frames(format_name: str) -> bytes:
    """Make a picture of two different frames."""
    second = Image.new("RGB", (64, 48), "red")
    return encoded(format_name, save_all=True, append_images=[second])


def half(content: bytes) -> bytes:
    """Cut a file in the middle."""
    return content[: len(content) // 2]


BAD_IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "truncated.jpg": (lambda: half(encoded("JPEG")), "damaged"),
    "truncated.png": (lambda: half(encoded("PNG")), "damaged"),
    "no_end.png": (lambda: encoded("PNG")[:-12], "damaged"),
    "flipped.png": (lambda: encoded("PNG").replace(b"IDAT", b"IDAT\x01", 1), "damaged"),
    "truncated.webp": (lambda: half(encoded("WEBP")), ""),
    "truncated.bmp": (lambda: half(encoded("BMP")), "damaged"),
    "head_only.jpg": (lambda: encoded("JPEG")[:20], ""),
    "signature_only.png": (lambda: encoded("PNG")[:8], ""),
    "zero.jpg": (lambda: b"", "an empty file"),
    "html.jpg": (lambda: b"<!DOCTYPE html><html>404</html>", "not a png"),
    "gif.png": (lambda: frames("GIF"), "not a png"),
    "tiff.png": (lambda: encoded("TIFF"), "not a png"),
    "eps.jpg": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a png"),
    "apng.png": (lambda: frames("PNG"), "an animation"),
    "animated.webp": (lambda: frames("WEBP"), "an animation"),
    "bomb.png": (bomb_png, "pixels"),
    "text_bomb.png": (text_bomb_png, "damaged"),
    "hollow.png": (lambda: packed_png(zlib.compress(bytes(99))), "damaged"),
    "no_stream.png": (lambda: packed_png(b"no zlib stream"), "damaged"),
    "broken_inside.png": (lambda: packed_png(broken_stream()), "damaged"),
    "bad_filter.png": (lambda: packed_png(zlib.compress(bytes([7]) * 145 * 48)), "damaged"),
    "late_text_bomb.png": (lambda: with_late_chunk(text_bomb_png()), "damaged"),
    "many_pixels.png": (lambda: packed_png(b"", (9500, 9500)), "pixels"),
}


def packed_png(stream: bytes, size: tuple[int, int] = (48, 48)) -> bytes:
    """Make an RGB PNG with sound checksums around any stream of pixels."""
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", stream), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def broken_stream() -> bytes:
    """Pack enough pixels and overwrite some bytes in the middle."""
    noise = Image.effect_noise((145, 48), 99).tobytes()
    rows = b"".join(b"\0" + noise[row : row + 144] for row in range(0, 145 * 48, 145))
    packed = zlib.compress(rows)
    return packed[:2000] + bytes(40) + packed[2040:]


def with_late_chunk(content: bytes) -> bytes:
    """Move the comment of a PNG from before its pixels to behind them."""
    plain = encoded("PNG")
    comment = content[33 : len(content) - len(plain) + 33]
    return plain[:-12] + comment + plain[-12:]


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_skipped_and_named_with_its_reason(
    data: Path, scan: Scanner, recorder: Recorder, name: str
) -> None:
    """One bad file costs itself; the others are used and it is counted."""
    make, reason = BAD_IMAGES[name]
    write_image(data / "good.png")
    (data / name).write_bytes(make())
    dataset = scan()
    assert names(dataset) == ["good.png"]
    assert dataset.facts.skipped == 1
    assert list(reasons(recorder, "image_skipped")) == [name]
    assert reason in reasons(recorder, "image_skipped")[name]


@pytest.mark.parametrize("thorough", [False, True])
def test_before_training_every_png_is_unpacked_and_else_those_with_room_for_doubt(
    data: Path,
    events: train_lora.Emitter,
    stop: train_lora.StopRequest,
    monkeypatch: pytest.MonkeyPatch,
    thorough: bool,
) -> None:
    """A preflight must be quick, so it unpacks a few: first those that say little per pixel."""
    monkeypatch.setattr(train_lora, "QUICK_PIXELS", 3 * 48 * 48)
    broken = packed_png(broken_stream())
    for number in range(4):
        (data / f"{number}.png").write_bytes(broken)
    (data / "hollow.png").write_bytes(packed_png(zlib.compress(bytes(99))))
    write_image(data / "good.jpg")
    found = train_lora.scan_dataset(load_config(), events, stop, thorough=thorough)
    assert names(found) == (["good.jpg"] if thorough else ["2.png", "3.png", "good.jpg"])


def test_no_more_pixels_are_decoded_at_once_than_fit_into_memory(
    data: Path, scan: Scanner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two images take all there is, the others wait."""
    for number in range(6):
        write_image(data / f"{number}.jpg", (64, 48))
    load, under_way, seen = JpegImagePlugin.JpegImageFile.load, [0], [0]

    def watched(self: Any, *arguments: Any) -> Any:
        under_way.append(0)
        seen.append(len(under_way) - 1)
        time.sleep(0.02)  # for the others to come
        found = load(self, *arguments)
        under_way.pop()
        return found

    monkeypatch.setattr(train_lora, "PIXELS_AT_ONCE", 2 * 64 * 48)
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", watched)
    scan()
    assert max(seen) == 2


@pytest.mark.slow
def test_images_are_checked_within_a_limit_of_memory(data: Path) -> None:
    """Four of 36 million pixels take half a GiB each."""
    write_model(Path("model"))
    first = write_image(data / "0.webp", (6000, 6000), lossless=True, method=0)
    for number in range(1, 4):
        os.link(first, data / f"{number}.webp")
    write_config(data.parent)
    program = (
        f"import pathlib, sys; sys.path.insert(0, {str(ROOT)!r}); import train_lora\n"
        "code = train_lora.main(['--config', 'config.json', '--validate-only'])\n"
        # What getrusage tells counts the parent too, as it was at the fork.
        "peak = pathlib.Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]\n"
        "print(code, peak, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    code, peak_kib = map(int, done.stderr.split()[-2:])
    assert code == 0
    assert peak_kib < 1.2 * 2**20  # one: 0.6 GiB; four: 2.2


def test_images_are_checked_without_changing_what_other_threads_are_warned_of(
    data: Path, scan: Scanner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries are imported meanwhile, and set filters of their own that must last."""
    write_image(data / "x.jpg")
    load = JpegImagePlugin.JpegImageFile.load

    def import_meanwhile(self: Any, *arguments: Any) -> Any:
        warnings.filterwarnings("ignore", message="set by another thread")
        return load(self, *arguments)

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", import_meanwhile)
    with warnings.catch_warnings():
        scan()
        assert any("another thread" in str(each[1]) for each in warnings.filters)


def mode_image(mode: str) -> Image.Image:
    """Make a picture in one of Pillow's modes."""
    return Image.linear_gradient("L").resize((64, 48)).convert("RGB").convert(mode)


GOOD_IMAGES: dict[str, Callable[[], bytes]] = {
    "cmyk.jpg": lambda: encoded("JPEG", mode_image("CMYK")),
    "gray.jpg": lambda: encoded("JPEG", mode_image("L")),
    "progressive.jpg": lambda: encoded("JPEG", progressive=True),
    "sixteen_bit.png": lambda: encoded("PNG", Image.new("I;16", (64, 48), 40_000)),
    "palette.png": lambda: encoded("PNG", mode_image("P")),
    "palette_with_transparency.png": lambda: encoded("PNG", mode_image("P"), transparency=3),
    "bilevel.png": lambda: encoded("PNG", mode_image("1")),
    "gray_alpha.png": lambda: encoded("PNG", mode_image("LA")),
    "alpha.png": lambda: encoded("PNG", mode_image("RGBA")),
    "alpha.webp": lambda: encoded("WEBP", mode_image("RGBA")),
    "lossless.webp": lambda: encoded("WEBP", lossless=True),
    "palette.bmp": lambda: encoded("BMP", mode_image("P")),
    "phone.jpg": lambda: frames("MPO"),
    "png_inside.jpg": lambda: encoded("PNG"),
    "comment.png": lambda: text_png("a comment"),
}


def text_png(comment: str) -> bytes:
    """Make a PNG with a short compressed comment, as image generators do."""
    chunk = png_chunk(b"zTXt", b"parameters\0\0" + zlib.compress(comment.encode()))
    plain = encoded("PNG")
    return plain[:33] + chunk + plain[33:]


@pytest.mark.parametrize("name", GOOD_IMAGES)
def test_an_unusual_but_sound_image_is_used(
    data: Path, scan: Scanner, recorder: Recorder, name: str
) -> None:
    """Every colour mode counts, and a phone's JPEG with further pictures behind the first."""
    (data / name).write_bytes(GOOD_IMAGES[name]())
    (picture,) = scan().pictures
    assert (picture.name, picture.width, picture.height) == (name, 64, 48)
    assert reasons(recorder, "image_skipped") == {}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    ("orientation", "size"), [(1, (64, 52)), (3, (64, 52)), (6, (52, 64)), (8, (52, 64))]
)
def test_an_image_lying_on_its_side_is_measured_upright(
    data: Path, scan: Scanner, suffix: str, orientation: int, size: tuple[int, int]
) -> None:
    """Width and height are those a viewer shows."""
    exif = Image.Exif()
    exif[train_lora.EXIF_ORIENTATION] = orientation
    write_image(data / f"x.{suffix}", exif=exif)
    (picture,) = scan().pictures
    assert (picture.width, picture.height) == size


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f"])
def test_unreadable_camera_data_do_not_cost_the_image(
    data: Path, scan: Scanner, recorder: Recorder, exif: bytes
) -> None:
    """Sound pixels with broken EXIF are common, and every viewer shows them."""
    (data / "x.jpg").write_bytes(encoded("JPEG", exif=exif))
    write_image(data / "good.png")
    assert names(scan()) == ["good.png", "x.jpg"]
    assert reasons(recorder, "image_skipped") == {}


# --- odd files ---


def make_fifo(path: Path) -> None:
    """Put a pipe there that nobody writes to."""
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    """Put a socket there; the path may not be long, so a relative one is bound."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))


def link_outside(path: Path) -> None:
    """Link to a sound image outside the dataset."""
    path.symlink_to(write_image(path.parent.parent / "outside.png"))


def link_in_a_circle(path: Path) -> None:
    """Link to itself."""
    path.symlink_to(path)


def link_nowhere(path: Path) -> None:
    """Link to what does not exist."""
    path.symlink_to(path.parent / "gone.png")


@POSIX
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_fifo, "not a regular file"),
        (make_socket, "not a regular file"),
        (link_outside, "a link that leaves the dataset"),
        (link_in_a_circle, "a link that leads nowhere"),
        (link_nowhere, "a link that leads nowhere"),
    ],
)
def test_what_is_no_file_of_the_dataset_is_skipped_and_never_opened(
    data: Path, scan: Scanner, recorder: Recorder, make: Callable[[Path], None], reason: str
) -> None:
    """A pipe does not block the scan, and a link leads nowhere else."""
    write_image(data / "good.png")
    make(data / "y.jpg")
    assert names(scan()) == ["good.png"]
    assert reasons(recorder, "image_skipped")["y.jpg"].startswith(reason)


def test_a_folder_named_like_an_image_is_skipped_and_named(
    data: Path, scan: Scanner, recorder: Recorder
) -> None:
    """Whoever has such a folder wonders where its images went."""
    write_image(data / "good.png")
    write_image(data / "x.png" / "inner.png")
    assert names(scan()) == ["good.png"]
    assert reasons(recorder, "folder_skipped") == {"x.png": "named like an image"}


@POSIX
def test_a_link_inside_the_dataset_is_used(data: Path, scan: Scanner) -> None:
    """Some share one file between folders."""
    write_image(data / "good.png")
    (data / "again.png").symlink_to("good.png")
    assert names(scan()) == ["again.png", "good.png"]


@POSIX
def test_a_dataset_that_is_itself_a_link_is_used(data: Path, scan: Scanner) -> None:
    """Only links inside the dataset are confined."""
    write_image(data / "good.png")
    Path("linked").symlink_to(data)
    assert names(scan(dataset_path="linked")) == ["good.png"]


@NOT_ROOT
def test_an_unreadable_image_is_skipped_and_named(
    data: Path, scan: Scanner, recorder: Recorder
) -> None:
    """No right to read is a reason like any other."""
    write_image(data / "good.png")
    write_image(data / "closed.png").chmod(0)
    assert names(scan()) == ["good.png"]
    assert list(reasons(recorder, "image_skipped")) == ["closed.png"]


# --- the dataset as a whole ---


@pytest.mark.parametrize("content", [{}, {"x.png": b"not an image"}, {"x.txt": b"a cat"}])
def test_a_dataset_without_a_usable_image_is_refused(
    data: Path, scan: Scanner, content: dict[str, bytes]
) -> None:
    """Empty, or with nothing but bad images."""
    for name, text in content.items():
        (data / name).write_bytes(text)
    with pytest.raises(train_lora.TrainError) as refused:
        scan()
    assert refused.value.code is train_lora.ErrorCode.DATASET_EMPTY


def test_images_without_any_description_are_refused_by_name(data: Path, scan: Scanner) -> None:
    """Without trigger words every image needs a caption; the error lists those without."""
    for number in (1, 2, 3):
        write_image(data / f"{number}.png")
    (data / "2.txt").write_text("a cat", encoding="utf-8")
    with pytest.raises(train_lora.TrainError) as refused:
        scan(trigger_words=[])
    assert refused.value.code is train_lora.ErrorCode.CAPTIONS_MISSING
    assert [problem.path for problem in refused.value.problems] == ["1.png", "3.png"]


def test_images_smaller_than_the_resolution_are_counted(
    data: Path, scan: Scanner, recorder: Recorder
) -> None:
    """Their area decides, and for squares their shorter side."""
    for name, size in (("a", (256, 300)), ("b", (300, 255)), ("c", (300, 300)), ("d", (200, 300))):
        write_image(data / f"{name}.png", size)
    scan(resolution=256)
    scan(resolution=256, buckets=False)
    warned = [w["data"] for w in recorder.of_type("warning") if w["code"] == "images_small"]
    assert warned == [
        {"images": 1, "file": "d.png", "resolution": 256},
        {"images": 2, "file": "b.png", "resolution": 256},
    ]


def test_the_facts_count_images_by_size(data: Path, scan: Scanner, recorder: Recorder) -> None:
    """The most frequent size comes first, and ten sizes are enough."""
    for number in range(12):
        write_image(data / f"{number}.png", (300 + number // 2 * (number > 3), 300))
    facts = scan(resolution=256).facts
    assert (facts.images, facts.resolutions["300x300"]) == (12, 4)
    assert next(iter(facts.resolutions)) == "300x300"
    for number in range(12, 30):
        write_image(data / f"{number}.png", (300 + number, 300))
    assert len(scan(resolution=256).facts.resolutions) == 10


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("name", [b"caf\xe9.png", b"a\nb\x1b[31mred\x1b[0m.png", b"\xff\xfe.png"])
@pytest.mark.parametrize("sound", [True, False])
def test_file_names_of_any_bytes_stay_within_strict_lines(
    data: Path, name: bytes, sound: bool
) -> None:
    """Every line is one line of JSON that any strict parser takes, whatever a file is called."""
    write_model(Path("model"))
    write_image(data / "good.png")
    content = (data / "good.png").read_bytes() if sound else b"broken"
    Path(os.fsdecode(os.path.join(os.fsencode(data), name))).write_bytes(content)  # noqa: PTH118, Path takes no bytes
    write_config(data.parent)
    ended = run_program("--config", "config.json", "--validate-only", cwd=data.parent)
    assert (ended.code, ended.last["data"]["images"]) == (0, 1 + sound)
    assert b"\\ud" not in ended.stdout  # half of a surrogate pair, which is no text


def test_a_long_check_tells_how_far_it_is(
    data: Path, scan: Scanner, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A status bar that stands still looks like a crash; every look at this clock takes 2 s."""
    for number in range(3):
        write_image(data / f"{number}.jpg")
    ticks = itertools.count(0, 2)
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    scan()
    phases = [i["data"] for i in recorder.of_type("info") if i["topic"] == "phase"]
    told = [(p["done"], p["total"]) for p in phases if p["name"] == "checking images"]
    assert told == [(0, 3), (1, 3), (2, 3)]


def test_a_quick_check_says_nothing_of_its_progress(
    data: Path, scan: Scanner, recorder: Recorder
) -> None:
    """Two lines for two images would be noise."""
    write_image(data / "a.png")
    scan()
    assert [info["topic"] for info in recorder.of_type("info")] == ["dataset"]


def test_a_stop_request_ends_the_check(
    data: Path, scan: Scanner, stop: train_lora.StopRequest
) -> None:
    """A dataset of a million images does not have to be finished first."""
    write_image(data / "a.png")
    stop.request("SIGTERM")
    with pytest.raises(train_lora.TrainingInterrupted):
        scan()


# --- captions of another kind ---


def test_whoever_leaves_early_waits_for_no_picture() -> None:
    """It may be the garbage collector, in the middle of a thread's start, which would hang."""
    begun, over = threading.Event(), threading.Event()

    def look(_: int) -> bool:
        begun.set()
        return over.wait(10)

    looked = train_lora.ahead(look, range(100))
    try:
        next(looked)
        begun.wait(60)
        at = time.monotonic()
        looked.close()
        assert time.monotonic() - at < 5
    finally:
        over.set()


def test_captions_stand_in_files_of_the_ending_that_was_asked_for(
    data: Path, scan: Scanner, recorder: Recorder
) -> None:
    """Whatever its case; others are named as unread, and metadata counts where there is none."""
    for name in "abc":
        write_image(data / f"{name}.png", (600, 600))
    (data / "a.caption").write_text("one zkb", encoding="utf-8")
    (data / "b.CAPTION").write_text("two zkb", encoding="utf-8")
    (data / "a.txt").write_text("not this", encoding="utf-8")
    line = {"file_name": "c.png", "text": "three zkb"}
    (data / "metadata.jsonl").write_text(json.dumps(line), encoding="utf-8")
    found = captions(scan(caption_extension=".caption"))
    assert found == {"a.png": "one zkb", "b.png": "two zkb", "c.png": "three zkb"}
    (told,) = recorder.of_type("warning")
    assert (told["code"], told["data"]["kinds"]) == ("files_unread", {".txt": 1})


@pytest.mark.parametrize(
    ("lines", "caption"), [("all", "zkb, a cat a dog"), ("random", "zkb, a cat\nzkb, a dog\na zkb")]
)
def test_a_line_is_a_part_of_a_caption_or_one_by_itself(
    data: Path, scan: Scanner, lines: str, caption: str
) -> None:
    """Each gets the trigger words that it lacks; empty lines are none."""
    write_image(data / "a.png", (600, 600))
    text = "a  cat\r\n\n  \n a dog\n" + "a zkb" * (lines == "random")
    (data / "a.txt").write_text(text, encoding="utf-8")
    assert captions(scan(caption_lines=lines)) == {"a.png": caption}


def test_a_caption_of_too_many_lines_is_not_used(
    data: Path, scan: Scanner, recorder: Recorder
) -> None:
    """Each would be read by itself."""
    write_image(data / "a.png", (600, 600))
    (data / "a.txt").write_text("a\n" * 65, encoding="utf-8")
    assert captions(scan(caption_lines="random")) == {"a.png": "zkb"}
    assert reasons(recorder, "caption_unusable") == {"a.txt": "more than 64 lines"}
