"""Masks: which part of a picture is learned from, and what becomes of one that is no good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Recorder, write_image
from PIL import Image
from tiny_runs import Ready, prepare, start_until, tiny_config

import train_lora
from train_lora import TrainingConfig


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Provide a picture that is half as high as wide, in a folder of its own."""
    write_image(tmp_path / "data" / "a.jpg", (256, 128))
    return tmp_path


def write_mask(path: Path, size: tuple[int, int] = (256, 128), share: float = 0.5) -> Path:
    """Write a mask of which the left is white."""
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[:, : round(share * size[0])] = 255
    Image.fromarray(pixels).save(path)
    return path


def ready_with(place: Path, **changes: Any) -> Ready:
    """Prepare a run with masks, whose latents are whole."""
    return prepare(tiny_config(place, **{"masked_loss": True, "resolution": 256, **changes}))


def mask_of(ready: Ready, number: int = 0) -> torch.Tensor:
    """Return a picture's mask as it is cached."""
    mask = ready.cache.images[number].mask
    assert mask is not None
    return mask


def test_a_mask_is_fitted_like_its_picture_and_mirrored_with_it(place: Path) -> None:
    """The middle 192 of 224 columns are kept, which are 6 latents, the first 3 of them white."""
    write_image(place / "data" / "a.jpg", (448, 640))
    write_mask(place / "data" / "a.mask.png", (448, 640))
    ready = ready_with(place, flip=True)
    plain, mirrored = mask_of(ready)
    assert plain.shape == (1, 10, 6)
    assert (plain[..., :3] > 0.97).all()
    assert (plain[..., 3:] < 0.03).all()
    assert torch.allclose(mirrored, plain.flip(-1), atol=1e-6)


def test_a_mask_is_cropped_where_its_picture_is(place: Path) -> None:
    """Of a picture that is itself white where it counts, both say the same."""
    write_mask(place / "data" / "a.png", (192, 128), share=0.6)
    write_mask(place / "data" / "a.mask.png", (192, 128), share=0.6)
    config = tiny_config(place, masked_loss=True, crop="random", flip=True, bucket_step=128)
    path = place / "data" / "a.png"
    picture = train_lora.Picture("a.png", path, 192, 128, "", mask=path.with_suffix(".mask.png"))
    for form in train_lora.show_picture(picture, (128, 128), config):
        assert form.mask is not None
        assert torch.allclose(form.mask, form.pixels[:1] / 2 + 0.5)


def test_an_alpha_channel_is_a_mask_unless_there_is_another(place: Path) -> None:
    """What is transparent does not count; what has neither counts whole."""
    clear = Image.new("RGBA", (256, 256), (200, 10, 10, 0))
    clear.paste((10, 200, 10, 255), (0, 0, 256, 128))
    clear.save(place / "data" / "b.png")
    clear.save(place / "data" / "c.png")
    write_mask(place / "data" / "c.mask.png", (256, 256))
    ready = ready_with(place)
    assert (mask_of(ready, 0) == 1).all()
    assert mask_of(ready, 1)[0, 0].mean(dim=1).round().tolist() == [1] * 4 + [0] * 4
    assert mask_of(ready, 2)[0, 0].mean(dim=0).round().tolist() == [1] * 4 + [0] * 4
    (told,) = (r["data"] for r in ready.recorder.of_type("info") if r["topic"] == "dataset")
    assert (told["images"], told["masks"]) == (3, 2)


def test_the_loss_is_the_mean_over_what_counts(place: Path) -> None:
    """By a loop over all latents, in double precision."""
    write_mask(place / "data" / "a.mask.png", share=0.3)
    write_image(place / "data" / "b.png", (256, 128))
    ready = ready_with(place)
    slots = [(0, 0), (1, 1)]
    batch = train_lora.draw_batch(ready.models, ready.cache, ready.config, 1, slots)
    answers: list[torch.Tensor] = []
    ready.models.denoiser.register_forward_hook(lambda *told: answers.append(told[-1].sample))
    with torch.no_grad():
        losses = train_lora.batch_losses(ready.models, batch)
    assert batch.mask is not None
    for answer, noise, mask, loss in zip(answers[0], batch.noise, batch.mask, losses, strict=True):
        weights = mask.double().expand_as(noise)
        errors = weights * (answer.double() - noise.double()) ** 2
        assert loss.item() == pytest.approx(float(errors.sum() / weights.sum()), rel=1e-5)


def test_a_white_mask_changes_nothing(place: Path) -> None:
    """Not a bit of what is learned."""
    learned = []
    for masked in (False, True):
        write_mask(place / "data" / "a.mask.png", share=1)
        ready = ready_with(place, masked_loss=masked)
        ready.make_updates(2)
        learned.append(ready.learner.learned)
    assert torch.equal(*learned)


def scan(config: TrainingConfig) -> tuple[train_lora.Dataset, Recorder]:
    """Look at the pictures."""
    recorder = Recorder()
    stop = train_lora.StopRequest()
    return train_lora.scan_dataset(config, train_lora.Emitter(recorder), stop), recorder


@pytest.mark.parametrize("masked", [True, False])
def test_a_mask_is_no_picture_of_its_own(masked: bool, place: Path) -> None:
    """Unless there is no picture to which it belongs."""
    write_mask(place / "data" / "a.mask.png")
    write_mask(place / "data" / "lonely.mask.png")
    dataset, _ = scan(tiny_config(place, masked_loss=masked))
    assert [p.name for p in dataset.pictures] == ["a.jpg", "lonely.mask.png"]
    assert dataset.facts.masks == masked


def test_pictures_with_a_mask_that_does_not_fit_are_left_out(place: Path) -> None:
    """One of another size, one that leaves nothing, one that is none; each is named."""
    for name in "bcd":
        write_image(place / "data" / f"{name}.png", (320, 320))
    write_mask(place / "data" / "b.mask.png", (320, 300))
    write_mask(place / "data" / "c.mask.png", (320, 320), share=0)
    (place / "data" / "d.mask.png").write_bytes(b"no picture")
    dataset, recorder = scan(tiny_config(place, masked_loss=True))
    assert [p.name for p in dataset.pictures] == ["a.jpg"]
    skipped = [w["data"] for w in recorder.of_type("warning") if w["code"] == "image_skipped"]
    assert {each["file"]: each["reason"] for each in skipped} == {
        "b.png": "its mask: 320x300 pixels, not those of the image",
        "c.png": "its mask: it is black",
        "d.png": "its mask: not a png, jpeg, webp, avif or bmp image",
    }


def test_masks_that_are_not_there_are_missed(place: Path) -> None:
    """Else all would be learned from, unnoticed."""
    _, recorder = scan(tiny_config(place, masked_loss=True))
    told = recorder.of_type("warning")[-1]
    assert (told["code"], told["data"]["key"]) == ("knob_without_effect", "masked_loss")


def test_another_mask_is_another_run(place: Path) -> None:
    """A run that was stopped ends as one that was not, unless a mask has changed meanwhile."""
    write_mask(place / "data" / "a.mask.png")
    options: dict[str, Any] = {"masked_loss": True, "steps": 3, "flip": True, "cache_dir": None}
    one, two = (tiny_config(place, output_path=str(place / n), **options) for n in "ab")
    start_until(one)
    start_until(two, 2)
    start_until(two)
    results = [(c.output_path / "lora_final.safetensors").read_bytes() for c in (one, two)]
    assert results[0] == results[1]
    write_mask(place / "data" / "a.mask.png", share=0.4)
    with pytest.raises(train_lora.TrainError) as refused:
        start_until(two)
    assert [problem.path for problem in refused.value.problems] == ["dataset_path"]


def test_a_mask_is_turned_with_its_picture(place: Path) -> None:
    """A picture that is white where it counts says the same as its mask, in every form."""
    path = write_mask(place / "data" / "a.mask.png", (256, 256))
    Image.open(path).convert("RGB").save(place / "data" / "a.png")
    config = tiny_config(place, masked_loss=True, augment=["rotate"])
    picture = train_lora.Picture("a.png", place / "data" / "a.png", 256, 256, "", mask=path)
    (size,) = train_lora.sizes_of((picture.width, picture.height), config)
    for form in train_lora.show_picture(picture, size, config):
        assert form.mask is not None
        assert torch.equal(form.mask[0] > 0.5, form.pixels[0] > 0)
