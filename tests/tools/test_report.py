"""tools/report.py: one page tells a run, whatever became of it, and holds nothing foreign."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_image, write_json
from PIL import Image
from web_page import HOSTILE, Page

from tools import report
from tools.page import POLICY
from train_lora import StopRequest

START = {
    "type": "start",
    "version": "0.1.0",
    "resumed_step": 0,
    "config": {"base_model": "sd15", "lora_rank": 8, "seed": 0, "lora_name": "zkb"},
}
COMPLETE = {
    "type": "complete",
    "step": 4,
    "total_time": 3723.4,
    "bytes": 7,
    "sha256": "ab12",
    "final_path": "/output/lora_final.safetensors",
    "peak_memory_bytes": 2**30,
}


def progress(step: int, loss: float | None = 0.5) -> dict[str, Any]:
    """Make a progress line."""
    return {"type": "progress", "step": step, "total_steps": 4, "loss": loss}


def sample(step: int, prompt: str = "zkb", name: str | None = None) -> dict[str, Any]:
    """Make the line of a preview."""
    path = f"/output/samples/{name or f'step_{step}.png'}"
    return {"type": "sample", "step": step, "prompt": prompt, "image_path": path}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Provide the folder of a run with pictures of two rounds."""
    for step in (2, 4):
        write_image(tmp_path / "samples" / f"step_{step}.png", (512, 512))
    return tmp_path


def write_events(folder: Path, *lines: object) -> None:
    """Write events.jsonl; a text stands as it is."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "events.jsonl").write_text("\n".join(texts), encoding="latin-1")


def make(folder: Path, *options: str) -> str:
    """Run the program; return the page."""
    assert report.main([str(folder), "--deterministic", *options]) == 0
    return (folder / "report.html").read_text(encoding="ascii")


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (COMPLETE, "Complete: 4 steps in 1 h 02 min"),
        ({"type": "interrupted", "reason": "SIGTERM", "step": 3}, "Stopped by SIGTERM at step 3"),
        ({"type": "error", "code": "out_of_memory", "hint": "See."}, "Failed with out_of_memory"),
        ({"type": "info", "topic": "novel", "data": 7}, "No last line: still under way, or killed"),
    ],
)
def test_the_first_sentence_says_what_became_of_the_run(
    last: dict[str, Any], words: str, folder: Path
) -> None:
    """Also of one that was killed."""
    write_events(folder, START, progress(1), progress(4), last)
    assert words in Page(make(folder)).text


def test_the_page_needs_nothing_and_runs_nothing(folder: Path) -> None:
    """Balanced, with a policy, no address and no script; pictures stand in the page."""
    write_events(folder, START, progress(1), sample(2), progress(4), sample(4), COMPLETE)
    text = make(folder)
    page = Page(text)
    assert page.open == []
    assert "http" not in text.replace("http-equiv", "")
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    policy = [a["content"] for tag, a in page.tags if a.get("http-equiv")]
    assert policy == [POLICY]
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [image["alt"] for image in images] == ["zkb, step 2", "zkb, step 4"]
    assert all(str(image["src"]).startswith("data:image/webp;base64,") for image in images)


def test_hostile_words_are_shown_and_not_obeyed(folder: Path) -> None:
    """From every place that a text can come from."""
    start = {**START, "config": {"base_model": HOSTILE, HOSTILE: HOSTILE, "lora_name": HOSTILE}}
    warning = {"type": "warning", "code": HOSTILE, "message": HOSTILE}
    error = {"type": "error", "code": HOSTILE, "message": HOSTILE, "hint": HOSTILE}
    write_events(folder, start, progress(1), sample(2, HOSTILE), warning, error)
    page = Page(make(folder))
    assert [tag for tag, _ in page.tags if tag in ("script", "img")] == ["img"]
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert page.text.count(HOSTILE) >= 6


def test_a_picture_is_taken_from_the_run_alone(folder: Path, tmp_path: Path) -> None:
    """Whatever path an event names, and whatever lies there."""
    write_image(tmp_path / "secret.png")
    (folder / "samples" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 99)
    named = [sample(1, name="../secret.png"), sample(2, name="broken.png"), sample(3)]
    write_events(folder, START, *named)
    assert "<img" not in make(folder)


def test_the_page_says_nothing_of_where_things_lie(folder: Path) -> None:
    """It is made to be passed on; a path names people."""
    places = {"output_path": "/home/me/out/zkb", "dataset_path": "C:\\Users\\me\\images"}
    error = {"type": "error", "message": "No room in /home/me/out/zkb/state", "hint": "Mend it."}
    write_events(folder, {**START, "config": places}, error)
    text = Page(make(folder)).text
    assert "/home" not in text
    assert "Users" not in text
    assert "No room in zkb/state" in text
    assert "images" in text


def test_of_an_update_made_again_the_last_word_counts(folder: Path) -> None:
    """A seam shows where the run went on."""
    again = {**START, "resumed_step": 2}
    write_events(folder, START, *map(progress, (1, 2, 3)), again, progress(3, 0.25), progress(4))
    story = report.read_story(folder, StopRequest())
    assert [event["loss"] for event in story.progress.values()] == [0.5, 0.5, 0.25, 0.5]
    assert "resumed at step 2" in make(folder)


def test_what_is_no_event_is_left_out(folder: Path) -> None:
    """A torn last line, a number, a list, a deep one, bytes that are no text."""
    deep = "[" * 100_000
    write_events(folder, START, "7", "[1]", deep, "\xff", progress(1, None), '{"type": "progr')
    assert report.read_story(folder, StopRequest()).unread == 5
    assert "No loss was told" in make(folder)


def test_losses_come_from_the_table_where_there_is_one(folder: Path) -> None:
    """A run without events still has a page."""
    table = "step,loss,learning_rate\n1,0.5,1e-4\n2,,1e-4\n3,nan,1e-4\n4,0.25,1e-4\n"
    (folder / "loss_history.csv").write_text(table, encoding="utf-8")
    assert report.read_losses(folder, report.Story()) == [(1.0, 0.5), (4.0, 0.25)]
    assert "<polyline" in make(folder)


def test_the_curve_goes_on_where_the_table_ends(folder: Path) -> None:
    """The table is of an earlier stop, if what went on since then was killed or is under way."""
    (folder / "loss_history.csv").write_text("step,loss\n1,0.5\n2,0.25\n", encoding="utf-8")
    again = {**START, "resumed_step": 2}
    write_events(folder, START, progress(2, 0.4), again, progress(3, 0.3), progress(4, 0.2))
    story = report.read_story(folder, StopRequest())
    told = [(1.0, 0.5), (2.0, 0.25), (3.0, 0.3), (4.0, 0.2)]
    assert report.read_losses(folder, story) == told


def test_a_long_curve_keeps_its_spikes() -> None:
    """A thousand points are drawn of a million; the highest is among them."""
    points = [(float(n), 9.0 if n == 123_456 else 0.5) for n in range(1_000_000)]
    kept = report.thin(points)
    assert len(kept) <= report.POINTS
    assert (123_456.0, 9.0) in kept
    assert kept == sorted(kept)


def test_a_page_is_no_larger_than_asked_for(folder: Path) -> None:
    """Pictures shrink first; then some rounds are left out, and it says so."""
    noise = Image.effect_noise((512, 512), 99).convert("RGB")
    for step in range(10, 50):
        noise.save(folder / "samples" / f"step_{step}.png")
    write_events(folder, START, *map(sample, range(10, 50)))
    whole, small = len(make(folder)), make(folder, "--max-mb", "0.1")
    assert whole > 2**20 > 2 * len(small)
    assert "of 40 rounds of previews" in small
    assert 'step 10"' in small
    assert 'step 49"' in small


def write_manifest(folder: Path, **more: Any) -> Path:
    """Write the manifest of two pictures beside them."""
    for number in range(2):
        write_image(folder / "train" / f"{number}.png", (64, 64))
    images = [
        {"file": "train/0.png", "source": "a.jpg", "caption": HOSTILE, "flags": []},
        {"file": "train/1.png", "source": "b.jpg", "caption": "zkb", "flags": ["small", HOSTILE]},
    ]
    excluded = [{"source": "c.jpg", "reason": "exact_duplicate", "of": "a.jpg"}]
    document = {"format": "lora-dataset", "images": images, "excluded": excluded}
    return write_json(folder / "manifest.json", document | more)


def test_the_dataset_is_told_with_its_pictures(folder: Path, tmp_path: Path) -> None:
    """What to look at, what was left out; a name that leads elsewhere shows nothing."""
    write_events(folder, START, COMPLETE)
    place = write_manifest(tmp_path / "set")
    page = Page(make(folder, "--dataset", str(place)))
    assert "2 pictures, 1 without a remark" in page.text
    assert "exact_duplicate" in page.text
    images = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert images == ["train/0.png", "train/1.png"]
    assert HOSTILE in page.text
    write_image(tmp_path / "secret.png")
    outside = [{"file": "../secret.png", "caption": "x"}]
    write_manifest(tmp_path / "set", images=outside)
    assert "<img" not in make(folder, "--dataset", str(place.parent))
    report_of_check = {"pictures": [{"source": "a.jpg", "flags": ["blurred"]}], "remarks": ["Few"]}
    text = make(folder, "--dataset", str(write_json(tmp_path / "check.json", report_of_check)))
    assert "blurred" in text
    assert "<li>Few</li>" in text


def test_the_evaluation_is_told_with_its_pictures(folder: Path, tmp_path: Path) -> None:
    """As on its own page, one level below."""
    from test_evaluate import BASE, arm, planted, write_grid

    from tools.verdict import verdict_on

    write_events(folder, START, COMPLETE)
    grid = write_grid(tmp_path / "grid")
    features = {"vision": {"model": HOSTILE}, "clip": None}
    result = verdict_on(planted({BASE: (0, 0), arm(9): (2, 0)})) | {"features": features}
    place = write_json(grid / "eval.json", result)
    page = Page(make(folder, "--eval", str(place)))
    assert "Recommended: step_9 at 1" in page.text
    assert f"like the subject ({HOSTILE})" in page.text
    assert [tag for tag, _ in page.tags].count("img") == 8
    (grid / "grid.json").unlink()
    assert "<img" not in make(folder, "--eval", str(grid))


@pytest.mark.parametrize("content", ["{}", "[]", "nonsense", '{"format": "lora-evaluation"}'])
@pytest.mark.parametrize("option", ["--eval", "--dataset"])
def test_what_is_no_evaluation_and_no_dataset_is_refused(
    option: str, content: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Naming the file and who writes such; no page is written."""
    write_events(folder, START, COMPLETE)
    (tmp_path / "x.json").write_text(content, encoding="utf-8")
    assert report.main([str(folder), option, str(tmp_path / "x.json")]) == 1
    told = capfd.readouterr().err
    assert "x.json: expected" in told
    assert "tools/" in told
    assert not (folder / "report.html").exists()


def test_the_same_run_gives_the_same_page(folder: Path) -> None:
    """But for the line that says when, which can be left out."""
    write_events(folder, START, progress(1), sample(2), COMPLETE)
    assert make(folder) == make(folder)


def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And nothing is written into it."""
    assert report.main([str(tmp_path)]) == 1
    assert "no events.jsonl" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_is_an_error_with_a_reason(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The disk is named, not the program."""
    write_events(folder, START)
    assert report.main([str(folder), "--out", str(folder / "events.jsonl" / "x"), "--events"]) == 1
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (last["type"], last["code"]) == ("error", "save_failed")
