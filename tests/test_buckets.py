"""Pictures in their own shapes: the sizes they get, the order they come in, what is learned."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_image
from PIL import Image
from tiny_runs import Ready, prepare, start_until, tiny_config

import train_lora
from train_lora import ImageOrder, Size, TrainingConfig, sizes_of

SHAPES: tuple[Size, ...] = ((256, 256), (640, 360), (360, 640), (600, 400), (400, 600), (400, 400))


def config_of(ground: Path, **changes: Any) -> TrainingConfig:
    """Load a config for sizes that are not those of the tiny models."""
    return tiny_config(ground, **{"resolution": 1024, **changes})


def bucket_of(picture: Size, config: TrainingConfig) -> Size:
    """Choose the size of a picture that has but one."""
    (size,) = sizes_of(picture, config)
    return size


# --- sizes ---


@pytest.mark.parametrize(
    ("picture", "bucket"),
    [
        ((4000, 4000), (1024, 1024)),
        ((4000, 3000), (1152, 896)),
        ((3000, 4000), (896, 1152)),
        ((3000, 2000), (1216, 832)),
        ((1920, 1080), (1344, 768)),
        ((1080, 1920), (768, 1344)),
        ((9000, 900), (2048, 512)),  # more than four times as long as wide
        ((500, 400), (448, 384)),  # too small: nothing is enlarged
        ((30, 30), (64, 64)),  # smaller than any
    ],
)
def test_pictures_get_the_published_sizes_of_their_shape(
    picture: Size, bucket: Size, ground: Path
) -> None:
    """Those with which SDXL was trained, where a picture has such a shape."""
    assert bucket_of(picture, config_of(ground)) == bucket


@pytest.mark.parametrize("upscale", [False, True])
def test_no_picture_loses_a_step_or_gets_more_pixels_than_it_has(
    upscale: bool, ground: Path
) -> None:
    """Whatever its size, the resolution and the step."""
    chance, some = random.Random(7), config_of(ground, bucket_upscale=upscale)
    for _ in range(400):
        side, step = 8 * chance.randint(32, 128), 8 * chance.randint(1, 16)
        config = replace(some, resolution=side, bucket_step=step)
        width = chance.randint(200, 3000)
        height = round(width * math.exp(chance.uniform(-1.3, 1.3)))
        size = bucket_of((width, height), config)
        scale = max(size[0] / width, size[1] / height)
        assert {(length - side) % step for length in size} == {0}
        assert math.prod(size) <= side**2
        assert max(width * scale - size[0], height * scale - size[1]) < step
        assert upscale or scale <= 1 or min(width, height) < min(size) < 64 + step
        if upscale or width * height >= side**2:  # a step on either side is what may be lacking
            assert (size[0] + step) * (size[1] + step) > side**2


@pytest.mark.parametrize(("side", "step"), [(512, 64), (520, 64), (1000, 48), (256, 256)])
def test_squares_stay_as_they_are(side: int, step: int, ground: Path) -> None:
    """A step is counted from the side of the square, whatever that is."""
    config = config_of(ground, resolution=side, bucket_step=step)
    for length in (side, side + 1, 1023, 1024, 3333):
        assert bucket_of((max(length, side),) * 2, config) == (side, side)
    for picture in ((300, 3000), (10, 10)):
        assert bucket_of(picture, replace(config, buckets=False)) == (side, side)


def test_the_size_numbers_of_a_turned_photograph_are_those_of_its_bucket(
    tmp_path: Path, ground: Path
) -> None:
    """3000 x 4000 once it stands: 896 x 1194.67 whole, of which 43 rows go, 21 above."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4000, 3000)).save(tmp_path / "a.jpg", exif=exif)
    picture = train_lora.load_picture(tmp_path / "a.jpg")
    fitted, numbers = train_lora.fit_picture(picture, bucket_of(picture.size, config_of(ground)))
    assert fitted.size == (896, 1152)
    assert numbers == [4000, 3000, 21, 0, 1152, 896]


def test_only_the_middle_of_what_does_not_fit_is_kept(ground: Path) -> None:
    """Of 320 x 256, all rows are there, and 32 columns are gone on either side."""
    pixels = np.zeros((256, 320, 3), np.uint8)
    pixels[:, 32:288] = 255
    picture = Image.fromarray(pixels)
    config = config_of(ground, resolution=256, bucket_step=72)
    fitted, _ = train_lora.fit_picture(picture, bucket_of(picture.size, config))
    assert fitted.size == (256, 256)
    assert (np.asarray(fitted) == 255).all()


# --- order ---


def order_of(config: TrainingConfig, *counts: int, **changes: Any) -> ImageOrder:
    """Make the order of so many images of each of some shapes."""
    shapes = [(64 * n, 64) for n, count in enumerate(counts, start=1) for _ in range(count)]
    return ImageOrder(replace(config, **changes), len(shapes), shapes=shapes)


@pytest.mark.parametrize("counts", [(9, 7, 8), (30, 1), (1, 1, 1), (3, 5), (40, 40, 40), (16, 16)])
@pytest.mark.parametrize("batch", [1, 4, 8])
def test_every_image_is_seen_once_an_epoch_whatever_its_shape(
    counts: tuple[int, ...], batch: int, ground: Path
) -> None:
    """Windows run on across epochs, and most are of one shape where there are enough of it."""
    config = tiny_config(ground, epochs=7, batch_size=batch)
    order = order_of(config, *counts)
    windows = [order.window(step) for step in range(1, order.total_steps + 1)]
    seen = list(itertools.chain(*windows))
    for epoch in range(7):
        part = seen[epoch * order.own : (epoch + 1) * order.own]
        assert sorted(part) == list(range(order.own))
    mixed = sum(len({order.shapes[image] for image in window}) > 1 for window in windows)
    # Of each shape, less than a window is left over in an epoch, and one is opened to begin.
    assert mixed <= 7 * (len(counts) + 1)


def test_shapes_come_in_turns_that_change_with_epoch_and_seed(ground: Path) -> None:
    """Nor do the same images always fill a window together."""
    config = tiny_config(ground, batch_size=4)
    first, *others = (
        [frozenset(order_of(config, 16, 16, seed=seed).window(step)) for step in steps]
        for seed, steps in ((0, range(1, 9)), (0, range(9, 17)), (1, range(1, 9)))
    )
    assert all(set(first) != set(other) for other in others)
    shapes = [[max(window) // 16 for window in windows] for windows in (first, *others)]
    assert len({tuple(each) for each in shapes}) > 1


def test_one_shape_alone_comes_in_the_order_of_squares(ground: Path) -> None:
    """So does all that is trained image by image, or beside images for regularization."""
    config = tiny_config(ground, batch_size=3)
    alone = replace(config, batch_size=1)
    for step in range(1, 12):
        plain = ImageOrder(config, 10).window(step)
        assert order_of(config, 10).window(step) == plain
        single = ImageOrder(alone, 10).window(step)
        assert order_of(alone, 5, 5).window(step) == single
        beside = ImageOrder(config, 10, 4).window(step)
        assert replace(order_of(config, 5, 5), others=4).window(step) == beside


# --- what is learned ---


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide portraits, landscapes and squares."""
    folder = tmp_path_factory.mktemp("mixed")
    for number, size in enumerate(SHAPES):
        write_image(folder / "data" / f"{number}.png", size)
    return folder


def test_an_update_of_several_shapes_is_the_mean_over_its_images(mixed: Path) -> None:
    """As if each went through alone, and the sum was divided by their number."""
    ready = prepare(tiny_config(mixed, "sdxl", batch_size=4, gradient_accumulation_steps=2))
    shapes = {tuple(image.latent_dist.shape) for image in ready.cache.images}
    assert len(shapes) > 1
    window = ready.order.window(1)
    parts = list(ready.batches(window))
    assert sorted(slot for part in parts for slot, _ in part) == list(range(8))
    assert all(len({ready.cache.images[i].latent_dist.shape for _, i in p}) == 1 for p in parts)
    with ready.learner.moved(0.02):
        together = gradient_of(ready, parts)
        apart = gradient_of(ready, [[slot] for slot in enumerate(window)])
    assert torch.allclose(together, apart, rtol=1e-4, atol=1e-7)


def gradient_of(ready: Ready, parts: Any) -> torch.Tensor:
    """Collect the gradient of an update of eight images in these parts."""
    ready.learner.forget()
    for part in parts:
        batch = train_lora.draw_batch(ready.models, ready.cache, ready.config, 1, part)
        train_lora.there_and_back(ready.models, ready.learner, batch, 8)
    return ready.learner.gradient.clone()


def test_a_mixed_set_is_seen_whole_evenly_and_alike_over_stops(
    ground: Path, tmp_path: Path
) -> None:
    """Portraits, landscapes and squares in batches of four, two to an update; none is enlarged."""
    for number, (width, height) in enumerate([(400, 600), (512, 288), (300, 300)] * 4):
        write_image(tmp_path / "data" / f"{number}.png", (width + number, height + number))
    shape: dict[str, Any] = {"batch_size": 4, "gradient_accumulation_steps": 2, "steps": 5}
    options = shape | {"dataset_path": str(tmp_path / "data"), "learning_rate": 0.01}
    results = []
    for name, stops in (("at once", [None]), ("in parts", [1, 3, None])):
        config = tiny_config(ground, "sdxl", output_path=str(tmp_path / name), **options)
        seen = Counter[int]()
        for last in stops:
            run = start_until(config, last)
            for step in range(run.state.first_step, run.state.step + 1):
                seen.update(run.order.window(step))
                counts = [seen[number] for number in range(12)]
                assert max(counts) - min(counts) <= 1
        results.append((config.output_path / "lora_final.safetensors").read_bytes())
        assert sorted(seen.values()) == [3] * 8 + [4] * 4  # 5 times 8, by 12 images
    assert results[0] == results[1]
    for image in run.cache.images:
        high, wide, top, left, *size = image.time_ids.tolist()
        scale = max(size[0] / high, size[1] / wide)
        assert scale <= 1
        assert (
            abs(2 * top - (high * scale - size[0])) < 2 > abs(2 * left - (wide * scale - size[1]))
        )
        assert max(top, left) < 32
        assert top < 0.03 * high * scale  # above, where a portrait has its head
        assert train_lora.kept((wide, high), (size[1], size[0])) > 1 - train_lora.CROP_LOSS
        assert image.latent_dist.shape[-2:] == (size[0] // 32, size[1] // 32)


def test_batches_are_as_full_as_shapes_allow(mixed: Path) -> None:
    """Eight slots of three shapes, in batches of three; each process has its share of each."""
    ready = prepare(tiny_config(mixed, batch_size=3))
    window = [0, 3, 0, 4, 0, 3, 0, 4]
    assert [len(part) for part in ready.batches(window)] == [2, 2, 3, 1]
    ready.team = train_lora.Team(rank=1, size=2)
    assert [len(part) for part in ready.batches(window)] == [1, 1, 2]


def test_the_report_has_a_row_for_every_size(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many are trained at it, and what cropping takes of them."""
    monkeypatch.chdir(mixed)
    recorder = prepare(tiny_config(mixed)).recorder
    (told,) = (r["data"] for r in recorder.of_type("info") if r["topic"] == "dataset")
    assert told["buckets"] == {
        "256x256": {"images": 2, "cropped": 0.0, "cropped_at_most": 0.0},
        "192x320": {"images": 2, "cropped": 0.081, "cropped_at_most": 0.1},
        "320x192": {"images": 2, "cropped": 0.081, "cropped_at_most": 0.1},
    }


def test_a_thousand_sizes_still_fit_into_a_line(ground: Path) -> None:
    """The most frequent are told."""
    config = config_of(ground, bucket_step=8)
    pictures = [
        train_lora.Picture(f"{n}.png", Path("x"), *size, "", sizes_of(size, config))
        for n, size in enumerate((1000 + 5 * n, 3000 - 2 * n) for n in range(999))
    ]
    table = train_lora.count_buckets(pictures)
    counts = [row["images"] for row in table.values()]
    assert len(counts) == 40
    assert counts == sorted(counts, reverse=True)


def test_steps_that_a_family_cannot_take_are_refused(ground: Path) -> None:
    """Sides have to be multiples of what its patches and its VAE take together."""
    _, base = train_lora.inspect_model(config_of(ground))
    assert base is not None
    strict = replace(base, pixel_step=16)
    wrong = config_of(ground, bucket_step=24, sample_width=520, sample_height=640)
    with pytest.raises(train_lora.TrainError) as refused:
        train_lora.check_knobs(wrong, strict)
    assert [problem.path for problem in refused.value.problems] == ["bucket_step", "sample_width"]
    train_lora.check_knobs(replace(wrong, bucket_step=32, sample_width=None), strict)


# --- crops ---


def test_a_picture_is_cropped_in_four_places_that_it_alone_decides(tmp_path: Path) -> None:
    """Each with the numbers that SDXL is told, mirrored too, and with the pixels that they name."""
    columns = np.repeat(np.arange(192, dtype=np.uint8)[None], 128, axis=0)
    for name, brighter in (("a", 0), ("b", 1)):
        path = tmp_path / "data" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.stack([columns + brighter] * 3, axis=2)).save(path)
    config = tiny_config(tmp_path, "sdxl", bucket_step=128, crop="random", flip=True)
    pictures = [
        train_lora.Picture(name, tmp_path / "data" / name, 192, 128, "")
        for name in ("a.png", "b.png")
    ]
    forms, others = (train_lora.show_picture(each, (128, 128), config) for each in pictures)
    lefts = []
    for plain, turned in zip(forms[::2], forms[1::2], strict=True):
        *_, top, left, high, wide = plain.time_ids
        lefts.append(left)
        assert (top, high, wide) == (0, 128, 128)
        kept = ((plain.pixels[0, 0] + 1) * 127.5).round().int()
        assert kept.tolist() == list(range(left, left + 128))
        assert turned.time_ids == [128, 192, 0, 64 - left, 128, 128]
        assert torch.equal(turned.pixels, plain.pixels.flip(-1))
    assert len(set(lefts)) > 2
    assert lefts != [form.time_ids[3] for form in others[::2]]
    again = train_lora.show_picture(pictures[0], (128, 128), replace(config, seed=9))
    assert [form.time_ids for form in again] == [form.time_ids for form in forms]


def test_crops_take_turns_and_a_restart_goes_on_with_them(tmp_path: Path) -> None:
    """Which one an update has, chance decides by seed, step and slot; caches keep all."""
    for number in range(3):
        write_image(tmp_path / "data" / f"{number}.png", (300 + 9 * number, 256))
    options: dict[str, Any] = {"crop": "random", "steps": 3, "learning_rate": 0.01}
    one, two = (tiny_config(tmp_path, output_path=str(tmp_path / n), **options) for n in "ab")
    run = start_until(one)
    assert [len(image.latent_dist) for image in run.cache.images] == [4, 4, 4]
    told = {
        tuple(
            train_lora.draw_batch(run.models, run.cache, one, step, [(0, 2)]).time_ids[0].tolist()
        )
        for step in range(1, 30)
    }
    assert told == {tuple(numbers.tolist()) for numbers in run.cache.images[2].time_ids}
    start_until(two, 2)
    start_until(two)
    results = [(c.output_path / "lora_final.safetensors").read_bytes() for c in (one, two)]
    assert results[0] == results[1]


# --- augmentation ---


def shown(tmp_path: Path, picture: Image.Image, *augment: str) -> list[train_lora.Shown]:
    """Save a picture, and load its forms as the VAE is to see them."""
    path = tmp_path / "data" / "a.png"
    path.parent.mkdir(exist_ok=True)
    picture.save(path)
    config = tiny_config(tmp_path, augment=list(augment))
    told = train_lora.Picture("a.png", path, *picture.size, "")
    return train_lora.show_picture(told, bucket_of(picture.size, config), config)


def test_colours_change_by_a_tenth_at_most(tmp_path: Path) -> None:
    """Of even grey, brightness alone is seen; the first form is the picture itself."""
    plain, *others = shown(tmp_path, Image.new("RGB", (256, 256), (100, 100, 100)), "color")
    levels = [float((form.pixels + 1).mean() * 127.5) for form in (plain, *others)]
    assert levels[0] == pytest.approx(100, abs=0.5)
    assert len(levels) == 4
    assert len(set(levels)) == 4
    assert all(89 <= level <= 111 for level in levels)
    assert all(float(form.pixels.std()) < 1e-3 for form in others)


@pytest.mark.parametrize("size", [(256, 256), (384, 192)])
def test_a_turned_picture_has_no_empty_corner(size: tuple[int, int], tmp_path: Path) -> None:
    """Of a white picture, nothing but white is left."""
    forms = shown(tmp_path, Image.new("RGB", size, "white"), "rotate")
    assert all(float(form.pixels.min()) == 1.0 for form in forms)


def test_a_picture_is_turned_by_a_few_degrees_about_its_middle(tmp_path: Path) -> None:
    """A level edge through the middle gets a slope that tells the angle."""
    pixels = np.zeros((256, 256), np.uint8)
    pixels[128:] = 255
    slopes = []
    for form in shown(tmp_path, Image.fromarray(pixels).convert("RGB"), "rotate"):
        dark = (form.pixels[0] < 0).float().sum(dim=0)  # rows above the edge, by column
        middle = (dark[127] + dark[128]) / 2
        assert float(middle) == pytest.approx(128, abs=1.5)
        slopes.append(math.degrees(math.atan(float(dark[-1] - dark[0]) / 255)))
    assert slopes[0] == 0
    assert len(set(slopes)) == 4
    assert all(abs(slope) <= 5.2 for slope in slopes)


def test_altered_forms_take_turns_and_a_restart_goes_on_with_them(tmp_path: Path) -> None:
    """Four of each picture are cached, and chance that knows step and slot draws one."""
    for number in range(3):
        write_image(tmp_path / "data" / f"{number}.png", (256, 256))
    options: dict[str, Any] = {"augment": ["color", "rotate"], "flip": True, "steps": 3}
    one, two = (tiny_config(tmp_path, output_path=str(tmp_path / n), **options) for n in "ab")
    run = start_until(one)
    assert [len(image.latent_dist) for image in run.cache.images] == [8, 8, 8]
    start_until(two, 2)
    start_until(two)
    results = [(c.output_path / "lora_final.safetensors").read_bytes() for c in (one, two)]
    assert results[0] == results[1]
