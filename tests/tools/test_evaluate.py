"""tools/evaluate.py: planted truths are found, and what cannot be known is not claimed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_json
from PIL import Image
from scenes import scene
from web_page import HOSTILE, Page

from tools import embeddings, evaluate
from tools.embeddings import Eye
from tools.grid import Arm, Grid, join, read_grid
from tools.intervals import unit
from tools.judging import Judge, Seen, quality
from tools.page import POLICY
from tools.verdict import conclusion, surely_above, verdict_on
from train_lora import TrainError

BASE = Arm("base", 0.0, None)
SUBJECT, PRIOR = [f"s{n}" for n in range(12)], [f"p{n}" for n in range(6)]
SIZE = 48  # of the vectors


def direction(seed: int) -> np.ndarray:
    """Draw a direction of its own."""
    return np.asarray(np.random.default_rng(seed).standard_normal(SIZE) / np.sqrt(SIZE))


TRAIN = unit(direction(0) + 0.5 * direction(100 + n) for n in range(12))


def planted(
    arms: dict[Arm, tuple[float, float]],
    copies: float = 0.0,
    *,
    alike: float = 0.0,
    subject: list[str] = SUBJECT,
    train: np.ndarray = TRAIN,
    **options: Any,
) -> Judge:
    """Make the vectors of a grid: each arm moves by its shares towards subject and elsewhere."""
    chance = np.random.default_rng(1)
    prompts = {n: {"role": "subject", "plain": n} for n in subject}
    prompts |= {n: {"role": "prior", "plain": f"a dog {n}"} for n in PRIOR}
    files, vectors = {}, {}
    for number, prompt in enumerate(prompts):
        for seed in range(4):
            own = direction(1000 + 10 * number + seed) + direction(5000 + number)
            for arm, (towards, drift) in arms.items():
                goal = towards * direction(0) if prompt in subject else drift * direction(7)
                vector = own + goal + 0.05 * direction(int(chance.integers(10**9)))
                if chance.random() < copies and arm != BASE:
                    vector = train[chance.integers(len(train))]
                if chance.random() < alike and arm != BASE:
                    vector = direction(9) + direction(0) + direction(5000 + number)
                files[arm, prompt, seed] = Path(f"{arm.name}/{prompt}/{seed}")
                vectors[files[arm, prompt, seed]] = unit([vector])[0]
    grid = Grid(Path(), prompts, list(arms), list(range(4)), files)
    return Judge(grid, Seen(vectors, train), **options)


def arm(step: int, strength: float = 1.0) -> Arm:
    """Name a checkpoint."""
    return Arm(f"step_{step}", strength, step)


def test_a_lora_that_does_nothing_is_called_so() -> None:
    """And one that does is not."""
    judge = planted({BASE: (0, 0), arm(1): (0, 0), arm(500): (2, 0.1)})
    result = verdict_on(judge)
    assert result["does_nothing"] == ["step_1 at 1"]
    assert result["recommended"] == "step_500 at 1"
    idle = verdict_on(planted({BASE: (0, 0), arm(1): (0, 0)}))
    assert conclusion(idle).startswith("No LoRA here does anything")


def test_more_of_the_subject_scores_higher_and_further_scores_more_drift() -> None:
    """In the order in which it was planted, each score for itself."""
    arms = {BASE: (0.0, 0.0), arm(1): (0.5, 0.0), arm(2): (1.0, 0.2), arm(3): (2.0, 1.0)}
    scored = verdict_on(planted(arms))["arms"]
    likeness = [each["fidelity"]["mean"] for each in scored]
    drift = [each["drift"]["mean"] for each in scored]
    assert likeness == sorted(likeness)
    assert drift[3] > 5 * drift[1]
    assert drift[0] == 0
    assert all(each["fidelity"]["half_width"] for each in scored)


def test_of_checkpoints_that_are_alike_the_earliest_is_recommended() -> None:
    """The others are named as not to be told from it."""
    arms = {BASE: (0.0, 0.0), **{arm(step): (1.5, 0.1) for step in (100, 200, 300, 400)}}
    result = verdict_on(planted(arms))
    assert len(result["not_distinguishable"]) >= 3
    names = [each["arm"] for each in result["arms"][1:]]
    assert result["recommended"] == min(result["not_distinguishable"], key=names.index)


def test_pictures_that_are_copies_are_seen_as_such() -> None:
    """Far more of them than chance would have, and the prompts count for nothing."""
    honest = verdict_on(planted({BASE: (0, 0), arm(1): (2, 0)}))
    copied = verdict_on(planted({BASE: (0, 0), arm(1): (2, 0)}, copies=1.0))
    told = [result["arms"][1]["copying"] for result in (honest, copied)]
    assert [each["alarm"] for each in told] == [False, True]
    assert told[0]["expected"] == round(1.8 / 12, 4)
    assert told[0]["nearer_than_training"] < 0.5 < told[1]["nearer_than_training"]
    assert copied["arms"][1]["flags"][0] == "learned by heart"
    assert copied["arms"][1]["cmmd"]["mean"] < honest["arms"][1]["cmmd"]["mean"]


def test_quality_wants_both_likeness_and_truth_to_the_prompt() -> None:
    """By its formula."""
    floor = {"a": [0.4, 0.4]}
    assert quality({"a": [0.9, 0.7]}, floor, 0.8, {}, {}) == {"a": [1, 1]}
    assert quality({"a": [0.7, 0.3]}, floor, 0.8, {}, {}) == {"a": [pytest.approx(0.5)] * 2}
    assert quality({"a": [0.3, 0.3]}, floor, 0.8, {}, {}) == {"a": [0, 0]}
    fit, known = {"a": [0.1, 0.2]}, {"a": [0.3]}
    joined = quality({"a": [0.8, 0.8]}, floor, 0.8, fit, known)
    assert joined == {"a": [pytest.approx(0.5**0.5)] * 2}


def test_pictures_that_are_all_training_pictures_are_as_like_as_those() -> None:
    """The ceiling is the mean of all pairs, by its sum."""
    pairs = [float(a @ b) for i, a in enumerate(TRAIN) for j, b in enumerate(TRAIN) if i != j]
    judge = planted({BASE: (0, 0)})
    assert judge.ceiling == pytest.approx(np.mean(pairs))
    assert judge.closest == pytest.approx(max(pairs))


def test_an_arm_that_is_the_base_moves_nothing() -> None:
    """Drift and way are zero."""
    judge = planted({BASE: (0, 0)})
    assert np.allclose(list(judge.drift(BASE, judge.others).values()), 0)
    assert not np.any(list(judge.above_base(judge.fidelity, BASE).values()))


def test_what_hardly_moves_does_nothing_however_surely() -> None:
    """A hundredth of the way, the same in every picture, is of no use to anybody."""
    judge = planted({BASE: (0, 0), arm(1): (0, 0)})
    toward = unit([TRAIN.mean(0)])[0]
    for (each, prompt, seed), file in judge.grid.files.items():
        if each != BASE:
            base = judge.vision.pictures[judge.grid.files[BASE, prompt, seed]]
            judge.vision.pictures[file] = unit([base + 0.005 * toward])[0]  # type: ignore[index]
    again = Judge(judge.grid, judge.vision)
    assert again.does_something(arm(1)) is False
    assert conclusion(verdict_on(again)).startswith("No LoRA here does anything")


def test_too_few_pictures_conclude_nothing() -> None:
    """Neither that a LoRA does something nor that it does not."""
    judge = planted({BASE: (0, 0), arm(1): (2, 0)}, subject=SUBJECT[:3])
    result = verdict_on(judge)
    assert (judge.does_something(arm(1)), result["does_nothing"]) == (None, [])
    assert conclusion(result).startswith("Too few pictures to tell")
    assert "3 prompts with 4 seeds give no interval" in result["doubts"][0]


def test_what_cannot_be_told_is_told() -> None:
    """Few training pictures, no CLIP, no prompt without the subject, few prompts."""
    few = verdict_on(planted({BASE: (0, 0), arm(1): (2, 0)}, train=TRAIN[:3], subject=SUBJECT[:6]))
    told = " ".join(few["doubts"])
    assert "fewer than 8 prompts" in told
    assert "3 training pictures cannot tell" in told
    assert "Without --clip" in told
    assert [each["copying"] for each in few["arms"]] == [None, None]


def test_a_lora_that_changes_everything_or_always_draws_the_same_is_no_choice() -> None:
    """However like the subject its pictures are; each is told by its name."""
    arms = {BASE: (0.0, 0.0), arm(1): (1.0, 0.1), arm(2): (1.0, 9.0)}
    result = verdict_on(planted(arms))
    assert result["arms"][2]["flags"] == ["changes what it should not"]
    assert result["recommended"] == "step_1 at 1"
    same = verdict_on(planted({BASE: (0.0, 0.0), arm(1): (1.0, 0.1)}, alike=1.0))
    assert "always the same picture" in same["arms"][1]["flags"]


def test_a_subject_may_be_drawn_alike_where_the_base_draws_anything() -> None:
    """Of an unknown word; the measure is how the base draws what it knows."""
    judge = planted({BASE: (0, 0), arm(1): (1, 0)}, alike=0.9)
    assert "always the same picture" in verdict_on(judge)["arms"][1]["flags"]
    pictures = dict(judge.vision.pictures)
    for prompt in PRIOR:  # the base knows them, and hardly varies
        first = pictures[judge.grid.files[BASE, prompt, 0]]
        for seed in range(1, 4):
            near = first + 0.01 * direction(seed)
            pictures[judge.grid.files[BASE, prompt, seed]] = unit([near])[0]
    known = Judge(judge.grid, Seen(pictures, TRAIN))
    assert "always the same picture" not in verdict_on(known)["arms"][1]["flags"]


def test_what_may_be_chance_is_held_against_nobody() -> None:
    """A mean is above a limit when its whole interval is."""
    assert not surely_above({"mean": 0.05, "half_width": 0.1}, 0.01)
    assert surely_above({"mean": 0.05, "half_width": 0.03}, 0.01)
    assert surely_above({"mean": 0.05, "half_width": None}, 0.01)


def test_a_subject_that_leaks_into_its_class_is_seen_there_alone() -> None:
    """Prompts with the class word are apart from the others."""
    arms = {BASE: (0.0, 0.0), arm(1): (1.0, 0.0)}
    judge = planted(arms, class_word="dog")
    assert (judge.of_class, judge.others) == (PRIOR, [])
    for prompt in PRIOR:
        for seed in range(4):
            file = judge.grid.files[arm(1), prompt, seed]
            moved = judge.vision.pictures[file] + 0.7 * direction(0)
            judge.vision.pictures[file] = unit([moved])[0]  # type: ignore[index]
    leaking = verdict_on(Judge(judge.grid, judge.vision, None, "dog"))["arms"][1]
    assert leaking["leak"]["mean"] > leaking["leak"]["half_width"] > 0
    assert "drift" not in leaking
    assert planted(arms, class_word="og").of_class == []


def test_pictures_nearer_than_those_held_back_are_told() -> None:
    """Copies always are; pictures that only resemble the subject are not."""
    held = unit(direction(0) + 0.5 * direction(300 + n) for n in range(8))
    found = []
    for share in (0.0, 1.0):
        judge = planted({BASE: (0, 0), arm(1): (2, 0)}, copies=share)
        seen = Seen(judge.vision.pictures, TRAIN, held)
        found.append(Judge(judge.grid, seen).copying(arm(1)))
    assert found[0]
    assert found[1]
    assert found[1]["above_heldout"] == 1 > found[0]["above_heldout"]
    assert found[1]["above_heldout_p"] <= 0.01 < found[0]["above_heldout_p"]


@pytest.mark.parametrize("count", [10, 20, 50])
def test_honest_pictures_are_seldom_taken_for_copies(count: int) -> None:
    """Pictures drawn as the training pictures were, of 200 sets: the share is what it says."""
    chance, alarms, shares = np.random.default_rng(count), 0, []
    for _ in range(200):
        rows = unit(np.eye(8)[0] + chance.standard_normal((count + 12, 8)) / 3)
        train, drawn = rows[:count], rows[count:]
        prompts = {f"s{n}": {"role": "subject", "plain": ""} for n in range(12)}
        files = {(BASE, name, 0): Path(name) for name in prompts}
        vectors = dict(zip(files.values(), drawn, strict=True))
        told = Judge(Grid(Path(), prompts, [BASE], [0], files), Seen(vectors, train)).copying(BASE)
        assert told
        alarms += told["alarm"]
        shares.append(told["nearer_than_training"])
    assert np.mean(shares) == pytest.approx(1.8 / count, rel=0.35)
    assert alarms / 200 < 0.1


def test_of_ten_equal_arms_the_reported_score_is_not_flattered() -> None:
    """Chosen on half of the prompts, reported on the other: the mean gap to the truth is none."""
    from tools.verdict import recommend

    chance, gaps = np.random.default_rng(3), []
    arms = [arm(step) for step in range(10)]
    for _ in range(200):
        centres = 0.6 + 0.02 * chance.standard_normal(12)
        joined = {
            each: {
                f"s{n}": [float(c + 0.03 * chance.standard_normal())] * 4
                for n, c in enumerate(centres)
            }
            for each in arms
        }
        gaps.append(recommend(arms, joined)["quality_on_other_prompts"]["mean"] - 0.6)
    assert abs(np.mean(gaps)) < 2 * np.std(gaps) / 200**0.5


def test_the_front_holds_whoever_nobody_beats_in_both() -> None:
    """And differences to what is recommended come with a p-value."""
    from tools.verdict import front_of

    scores = {arm(1): (0.5, 0.3), arm(2): (0.6, 0.2), arm(3): (0.4, 0.2)}
    scored = {
        each: {"fidelity": {"mean": a}, "text_fit": {"mean": b}} for each, (a, b) in scores.items()
    }
    assert front_of(list(scores), scored) == ["step_1 at 1", "step_2 at 1"]
    result = verdict_on(planted({BASE: (0, 0), arm(1): (0.3, 0), arm(2): (1.5, 0)}))
    gap = result["arms"][1]["against_recommended"]["fidelity"]
    assert (result["recommended"], gap["p"]) == ("step_2 at 1", 2 / 2**12)
    assert gap["mean"] < -gap["half_width"]


# --- grids on disk ---


def write_grid(folder: Path, **changes: Any) -> Path:
    """Write a grid of pictures: the base, and a LoRA that turns everything red."""
    (folder / "images").mkdir(parents=True)
    images = []
    for lora, strength in (("base", 0.0), ("step_9", 1.0)):
        for prompt in range(4):
            for seed in range(2):
                file = f"images/{lora}_{prompt}_{seed}.png"
                picture = scene(10 * prompt + seed, 64)
                if lora != "base":
                    picture = Image.blend(picture, Image.new("RGB", (64, 64), "red"), 0.8)
                picture.save(folder / file)
                place = {"prompt": f"p{prompt}", "lora": lora, "strength": strength, "seed": seed}
                images.append({"file": file} | place)
    prompts = [{"id": f"p{n}", "text": f"zkb {n}", "plain": f"thing {n}"} for n in range(4)]
    loras = [{"id": "base", "file": None}, {"id": "step_9", "file": "x", "step": 9}]
    document = {"format": "lora-grid", "prompts": prompts, "loras": loras, "images": images}
    write_json(folder / "grid.json", document | changes)
    return folder


def judge_grid(grids: list[Path], train: Path, eyes: Path, *options: str, code: int = 0) -> None:
    """Run the program with a tiny DINOv2."""
    arguments = [*map(str, grids), "--train", str(train), "--vision", str(eyes / "dino")]
    assert evaluate.main([*arguments, *options]) == code


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """Provide six reddish training pictures, one of them twice."""
    folder = tmp_path / "train"
    folder.mkdir()
    for number in range(6):
        red = Image.blend(scene(50 + number, 64), Image.new("RGB", (64, 64), "red"), 0.8)
        red.save(folder / f"{number}.png")
    red.save(folder / "again.png")
    return folder


def test_pictures_are_judged_from_folder_to_verdict(
    tmp_path: Path, train: Path, eyes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By real models, tiny ones; copies of training pictures count once."""
    grid = write_grid(tmp_path / "grid")
    models = ["--vision", str(eyes / "dino"), "--clip", str(eyes / "clip")]
    assert evaluate.main([str(grid), "--train", str(train), *models]) == 0
    shown = capfd.readouterr().out
    assert "step_9 at 1" in shown
    assert "±" in shown
    result = json.loads((grid / "eval.json").read_text(encoding="utf-8"))
    assert {kind: said["model"] for kind, said in result["features"].items()} == {
        "vision": "dino",
        "clip": "clip",
    }
    assert len(result["features"]["vision"]["sha256"]) == 64
    assert result["training_images"] == 6
    assert [each["arm"] for each in result["arms"]] == ["base", "step_9 at 1"]
    assert str(tmp_path) not in json.dumps(result)


def test_without_a_prompt_of_the_subject_nothing_is_recommended(
    tmp_path: Path, train: Path, eyes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The rest is told, on the page as well."""
    prompts = [{"id": f"p{n}", "text": f"thing {n}", "role": "prior"} for n in range(4)]
    grid = write_grid(tmp_path / "grid", prompts=prompts)
    judge_grid([grid], train, eyes, "--clip", str(eyes / "clip"), "--heldout", str(train))
    assert "No prompt asks for the subject" in capfd.readouterr().out
    result = json.loads((grid / "eval.json").read_text(encoding="utf-8"))
    assert result["recommended"] is None
    assert result["arms"][1]["drift"]["mean"] > 0
    assert "No prompt asks for the subject" in (grid / "eval.html").read_text(encoding="ascii")


def test_a_bad_picture_is_left_out_in_all_arms(
    tmp_path: Path, train: Path, eyes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """So that arms stay comparable; black ones too."""
    grid = write_grid(tmp_path / "grid")
    (grid / "images" / "base_0_0.png").write_bytes(b"none")
    Image.new("RGB", (64, 64)).save(grid / "images" / "step_9_1_1.png")
    options = ["--train", str(train), "--vision", str(eyes / "dino")]
    assert evaluate.main([str(grid), *options]) == 0
    told = capfd.readouterr().err
    assert "base, p0, seed 0: no picture" in told
    assert "step_9 at 1, p1, seed 1: all one colour" in told


def test_the_page_needs_nothing_and_shows_hostile_words_as_words(
    tmp_path: Path, train: Path, eyes: Path
) -> None:
    """Every arm, every prompt, what is not known; no place, no script, no address."""
    grid = write_grid(tmp_path / "grid")
    document = json.loads((grid / "grid.json").read_text(encoding="utf-8"))
    document["prompts"][0]["text"] = HOSTILE
    write_json(grid / "grid.json", document)
    judge_grid([grid], train, eyes, "--fid", "--heldout", str(train))
    text = (grid / "eval.html").read_text(encoding="ascii")
    page = Page(text)
    assert page.open == []
    assert "http" not in text.replace("http-equiv", "")
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert [a["content"] for tag, a in page.tags if a.get("http-equiv")] == [POLICY]
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2 * 4
    assert all(str(image["src"]).startswith("data:image/webp") for image in images)
    assert HOSTILE in page.text
    for words in ("like the subject (dino)", "FID (dino)", "step_9 at 1", "Files are compared"):
        assert words in page.text
    assert str(tmp_path) not in text


def test_the_same_pictures_give_the_same_bytes(tmp_path: Path, train: Path, eyes: Path) -> None:
    """Neither a time nor an order of chance is in what is written."""
    grid, contents = write_grid(tmp_path / "grid"), []
    for _ in range(2):
        judge_grid([grid], train, eyes, "--heldout", str(train))
        contents.append([(grid / name).read_bytes() for name in ("eval.json", "eval.html")])
    assert contents[0] == contents[1]


def seeing(monkeypatch: pytest.MonkeyPatch, most: int = 10**6) -> list[int]:
    """Count the pictures that a model looks at; after so many comes Ctrl-C."""
    counts: list[int] = []
    vectors = Eye.vectors

    def look(eye: Eye, images: list[Image.Image]) -> np.ndarray:
        if sum(counts) == most:
            signal.raise_signal(signal.SIGINT)
        counts.append(len(images))
        return vectors(eye, images)

    monkeypatch.setattr(Eye, "vectors", look)
    return counts


def test_what_was_seen_before_ctrl_c_is_not_looked_at_again(
    tmp_path: Path, train: Path, eyes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it a third time; the numbers are those of one start, to the last byte."""
    one, other = write_grid(tmp_path / "one"), write_grid(tmp_path / "other")
    monkeypatch.setattr(embeddings, "AT_ONCE", 4)
    judge_grid([one], train, eyes)
    monkeypatch.undo()
    monkeypatch.setattr(embeddings, "AT_ONCE", 4)
    counts = seeing(monkeypatch, 8)
    judge_grid([other], train, eyes, code=130)
    assert not (other / "eval.json").exists()
    first = sum(counts)
    judge_grid([other], train, eyes)
    assert (first, sum(counts)) == (12, 16 + 6)
    judge_grid([other], train, eyes)
    assert sum(counts) == 16 + 6
    assert (one / "eval.json").read_bytes() == (other / "eval.json").read_bytes()


@pytest.mark.parametrize("damage", ["torn", "zeros", "foreign"])
def test_what_is_torn_of_what_was_seen_is_looked_at_again(
    damage: str, tmp_path: Path, train: Path, eyes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut leaves half a row, or one of zeros."""
    grid = write_grid(tmp_path / "grid")
    judge_grid([grid], train, eyes)
    before = (grid / "eval.json").read_bytes()
    (kept,) = grid.glob(".seen_*")
    size = kept.stat().st_size // (16 + 6)
    content = kept.read_bytes()
    other = {"torn": content[:-5], "zeros": content[:-size] + bytes(size), "foreign": b"x" * size}
    kept.write_bytes(other[damage])
    counts = seeing(monkeypatch)
    judge_grid([grid], train, eyes)
    assert sum(counts) == (16 + 6 if damage == "foreign" else 1)
    assert kept.stat().st_size == size * (16 + 6)
    assert (grid / "eval.json").read_bytes() == before


def test_a_picture_that_changed_and_another_model_are_looked_at_anew(
    tmp_path: Path, train: Path, eyes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what nobody asks for any more is forgotten in the end."""
    grid = write_grid(tmp_path / "grid")
    judge_grid([grid], train, eyes)
    counts = seeing(monkeypatch)
    (grid / "images" / "step_9_2_0.png").write_bytes((train / "3.png").read_bytes())
    judge_grid([grid], train, eyes)
    assert counts == []  # it is one that was seen already
    judge_grid([grid], train, eyes, "--vision", str(eyes / "clip"))
    assert sum(counts) == 15 + 6
    for number, file in enumerate(sorted((grid / "images").iterdir())):
        scene(500 + number, 64).save(file)
    for file in train.glob("[0-4].png"):
        file.unlink()
    (kept,) = set(grid.glob(".seen_*")) - {max(grid.glob(".seen_*"), key=os.path.getmtime)}
    before = kept.stat().st_size
    judge_grid([grid], train, eyes)
    assert kept.stat().st_size < before


def test_training_pictures_in_the_grid_are_called_copies(
    tmp_path: Path, train: Path, eyes: Path
) -> None:
    """By their pixels, whatever a model sees in them."""
    grid = write_grid(tmp_path / "grid")
    (grid / "images" / "step_9_2_0.png").write_bytes((train / "3.png").read_bytes())
    judge_grid([grid], train, eyes)
    base, trained = json.loads((grid / "eval.json").read_text(encoding="utf-8"))["arms"]
    assert base["copies"] == []
    assert {"file": "images/step_9_2_0.png", "of": "3.png"} in trained["copies"]
    assert "learned by heart" in trained["flags"]


def test_two_grids_are_judged_side_by_side(tmp_path: Path, train: Path, eyes: Path) -> None:
    """Arms of one name by their folders; the base counts once."""
    grids = [write_grid(tmp_path / name) for name in ("one", "two")]
    joined = join([read_grid(grid) for grid in grids])
    assert [each.name for each in joined.arms] == ["base", "one/step_9 at 1", "two/step_9 at 1"]
    judge_grid(grids, train, eyes, "--out", str(tmp_path / "both.json"))
    result = json.loads((tmp_path / "both.json").read_text(encoding="utf-8"))
    gaps = [each["against_recommended"]["fidelity"] for each in result["arms"][1:]]
    assert [gap["mean"] for gap in gaps] == [0, 0]
    assert (tmp_path / "both.html").is_file()


@pytest.mark.parametrize("what", ["prompts", "seeds", "settings"])
def test_grids_that_were_asked_for_differently_are_not_compared(what: str, tmp_path: Path) -> None:
    """Pictures of other prompts, seeds or steps say nothing of two LoRAs."""
    one, other = (write_grid(tmp_path / name) for name in ("one", "two"))
    document = json.loads((other / "grid.json").read_text(encoding="utf-8"))
    if what == "prompts":
        document["prompts"][0]["text"] = "another"
    elif what == "seeds":
        for image in document["images"]:
            image["seed"] += 7
    else:
        document["settings"] = {"steps": 7}
    write_json(other / "grid.json", document)
    with pytest.raises(TrainError, match=f"a grid of the same {what}"):
        join([read_grid(one), read_grid(other)])


def test_a_dry_run_reads_the_list_alone(
    tmp_path: Path, train: Path, eyes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And writes nothing."""
    grid = write_grid(tmp_path / "grid")
    before = sorted(tmp_path.rglob("*"))
    judge_grid([grid], train, eyes, "--dry-run")
    assert "Would judge 16 pictures: 2 arms, 4 prompts, 2 seeds" in capfd.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_device_that_is_not_there_is_told_in_a_sentence(
    tmp_path: Path, train: Path, eyes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As the trainer tells it."""
    grid = write_grid(tmp_path / "grid")
    judge_grid([grid], train, eyes, "--device", "cuda:99", "--events", code=1)
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert last["code"] == "device_unavailable"


@pytest.mark.parametrize("name", ["gone", "empty"])
def test_a_grid_that_is_not_there_is_told_in_a_sentence(
    name: str, tmp_path: Path, train: Path, eyes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a code, and what to do."""
    (tmp_path / "empty").mkdir()
    judge_grid([tmp_path / name], train, eyes, "--events", code=1)
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert last["code"] == "input_unusable"
    assert "Errno" not in last["message"]
    assert "Draw it with tools/generate.py" in last["hint"]


WRONG: dict[str, Callable[[dict[str, Any]], None]] = {
    "missing": lambda grid: grid["images"].pop(),
    "pictures of the base": lambda grid: grid.update(images=grid["images"][8:]),
    "leads out": lambda grid: grid["images"][0].update(file="../secret.png"),
    "a grid of": lambda grid: grid.pop("prompts"),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_compared_is_refused(words: str, tmp_path: Path) -> None:
    """With the first thing that is wrong."""
    folder = write_grid(tmp_path / "grid")
    grid = json.loads((folder / "grid.json").read_text(encoding="utf-8"))
    WRONG[words](grid)
    write_json(folder / "grid.json", grid)
    with pytest.raises(TrainError, match=words):
        read_grid(folder)
