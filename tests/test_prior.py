"""Class images: the base draws what keeps it as it is, where that is missing, and only there."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Recorder, load_config, write_image
from PIL import Image
from tiny_runs import tiny_config

import train_lora
from train_lora import Emitter, ErrorCode, LoRATrainer, StopRequest, TrainError, TrainingConfig

PROMPT = "a  photo of\n a dog"  # is read as it would be from a file
SAID = "a photo of a dog"


@dataclass(eq=False, repr=False)
class AfterSome(StopRequest):
    """A stop that is asked for as soon as there are some pictures in a folder."""

    folder: Path = Path()
    pictures: int = 1

    def check(self) -> None:
        """Look before anybody asks."""
        if len(list(self.folder.glob("*.png"))) >= self.pictures:
            self.request("SIGTERM")
        super().check()


def config_in(ground: Path, folder: Path, out: str = "out", **changes: Any) -> TrainingConfig:
    """Ask for three class images beside those of the ground."""
    values: dict[str, Any] = {
        "regularization_path": str(folder / "class"),
        "output_path": str(folder / out),
        "prior_preservation": True,
        "prior_prompt": PROMPT,
        "prior_images": 3,
        "steps": 2,
    }
    return tiny_config(ground, **values | changes)


def train(config: TrainingConfig, stop: StopRequest | None = None) -> tuple[str, Recorder]:
    """Train, and return the checksum of what came of it."""
    recorder = Recorder()
    done = LoRATrainer(config, Emitter(recorder), stop or StopRequest()).train()
    return done.sha256, recorder


def contents(folder: Path) -> dict[str, bytes]:
    """Return what lies in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def drawn(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, bytes]]:
    """Provide what a run learned that drew all class images, and these."""
    folder = tmp_path_factory.mktemp("whole")
    sha256, _ = train(config_in(ground, folder))
    return sha256, contents(folder / "class")


def test_a_killed_run_goes_on_with_the_class_images_that_are_there(
    drawn: tuple[str, dict[str, bytes]], ground: Path, tmp_path: Path
) -> None:
    """Each has its caption; however often it was stopped, all is the same to the last byte."""
    sha256, pictures = drawn
    stems = {Path(name).stem for name in pictures}
    assert len(stems) == 3
    assert set(pictures) == {f"{stem}{end}" for stem in stems for end in (".png", ".txt")}
    assert {text for name, text in pictures.items() if ".txt" in name} == {SAID.encode()}
    assert len({text for name, text in pictures.items() if ".png" in name}) == 3
    config = config_in(ground, tmp_path)
    folder = tmp_path / "class"
    with pytest.raises(train_lora.TrainingInterrupted):
        train(config, AfterSome(folder=folder, pictures=2))
    assert contents(folder).items() < pictures.items()
    again, recorder = train(config)
    (foreseen,) = [r for r in recorder.of_type("info") if r["topic"] == "prior"]
    assert foreseen["data"]["missing"] == 1
    assert contents(folder) == pictures
    assert again == sha256
    # Another run, with another seed, finds all of them; so does this one, with another name.
    assert train(config_in(ground, tmp_path, out="other"))[0] == sha256
    assert contents(folder) == pictures


def test_class_images_that_were_removed_come_back_and_the_run_goes_on(
    drawn: tuple[str, dict[str, bytes]], ground: Path, tmp_path: Path
) -> None:
    """They are the same, so that it is the same run; one that was changed is not."""
    sha256, pictures = drawn
    train(config_in(ground, tmp_path, steps=1))
    shutil.rmtree(tmp_path / "class")
    assert LoRATrainer(config_in(ground, tmp_path)).validate().resumed_step == 1
    assert train(config_in(ground, tmp_path))[0] == sha256
    assert contents(tmp_path / "class") == pictures
    one = next((tmp_path / "class").glob("*.png"))
    Image.new("RGB", (256, 256), "red").save(one)
    with pytest.raises(TrainError) as caught:
        train(config_in(ground, tmp_path, steps=3))
    assert caught.value.code is ErrorCode.RUN_CHANGED
    assert [problem.path for problem in caught.value.problems] == ["dataset_path"]


def test_pictures_that_are_there_count_and_stay_as_they_are(ground: Path, tmp_path: Path) -> None:
    """Whatever they are called, also as drawn ones are; the same order is trained on later."""
    folder = tmp_path / "class"
    config = config_in(ground, tmp_path, prior_images=4)
    missing = train_lora.scan_dataset(config, Emitter(), StopRequest()).missing
    names = [picture.path.name for picture in missing]
    for name in ("a.png", "z.png", names[1]):
        write_image(folder / name, (256, 256))
        (folder / name).with_suffix(".txt").write_text(f"mine, {name}", encoding="utf-8")
    mine = contents(folder)
    sha256, recorder = train(config)
    added = contents(folder).items() - mine.items()
    assert contents(folder).items() > mine.items()
    assert {name for name, _ in added} == {names[0], names[0].replace(".png", ".txt")}
    (told,) = [r["data"] for r in recorder.of_type("info") if r["topic"] == "dataset"]
    assert told["regularization_images"] == 4
    assert train(config_in(ground, tmp_path, out="again", prior_images=2))[0] == sha256


# --- preflight ---


def validate(in_folder: Path, **changes: Any) -> tuple[train_lora.ValidFacts, Recorder]:
    """Preflight a config that asks for class images."""
    asked: dict[str, Any] = {"prior_preservation": True, "prior_prompt": PROMPT}
    asked |= {"regularization_path": "class/deep", "prior_images": 30, "resolution": 512}
    recorder = Recorder()
    report = LoRATrainer(load_config(**asked | changes), Emitter(recorder)).validate()
    assert not (in_folder / "class" / "deep").exists()
    return report, recorder


def test_preflight_tells_what_will_be_drawn_and_draws_nothing(in_workspace: Path) -> None:
    """30 pictures of 25 steps are asked twice: as long as 500 updates, each of three ways."""
    report, recorder = validate(in_workspace, epochs=2)
    (foreseen,) = [r for r in recorder.of_type("info") if r["topic"] == "prior"]
    assert foreseen["data"] == {"missing": 30, "updates": 500}
    assert (
        foreseen["message"] == "Class images to draw: 30, which takes about as long as 500 updates"
    )
    assert report.regularization_images == 30
    assert report.total_steps == 11  # three images twice, and as many others in between
    bare, _ = validate(in_workspace, sample_guidance=1, prior_images=1, epochs=2)
    assert report.disk_needed_bytes is not None
    assert bare.disk_needed_bytes is not None
    assert report.disk_needed_bytes - bare.disk_needed_bytes == 29 * 3 * 512**2


def test_nothing_is_drawn_where_images_are_held_back(in_workspace: Path) -> None:
    """Class images belong into their own folder, not into that of validation."""
    write_image(in_workspace / "held" / "a.png", (400, 300))
    report, recorder = validate(in_workspace, validation_path="held")
    (facts,) = [r["data"] for r in recorder.of_type("info") if r["topic"] == "dataset"]
    assert (report.regularization_images, facts["validation_images"]) == (30, 1)


def test_a_place_where_nothing_can_be_drawn_is_refused(in_workspace: Path) -> None:
    """A file, a place below a file, a link to nowhere, a name that no system has."""
    (in_workspace / "link").symlink_to("nowhere")
    for folder in ("config.json", "config.json/class", "link", 300 * "x"):
        with pytest.raises(TrainError) as caught:
            validate(in_workspace, regularization_path=folder)
        assert [problem.path for problem in caught.value.problems] == ["regularization_path"]


def test_a_disk_that_is_full_ends_the_run_and_names_the_picture(tmp_path: Path) -> None:
    """What is drawn so far stays; a file where the folder should be stands for the disk."""
    (tmp_path / "class").touch()
    place = tmp_path / "class" / "prior_1.png"
    picture = train_lora.Picture("prior_1.png", place, 256, 256, SAID, seed=1)
    with pytest.raises(TrainError) as caught:
        train_lora.put_class_images([picture], [b"png"])
    assert caught.value.code is ErrorCode.SAVE_FAILED
    assert caught.value.problems[0].path == str(place)
