"""Several resolutions at once: who is trained at which, how often, and what the run remembers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Recorder, load_config, write_image
from tiny_runs import start_until, tiny_config

import train_lora
from train_lora import Emitter, LoRATrainer, Size, StopRequest, TrainError, TrainingConfig

BOTH = [256, 384]
# The first fills 256 alone, the others both; the second and third in shapes of their own.
SHAPES: tuple[Size, ...] = ((300, 260), (400, 600), (768, 512), (512, 512))


def write_shapes(folder: Path) -> Path:
    """Write pictures of all shapes."""
    for number, size in enumerate(SHAPES):
        write_image(folder / f"{number}.png", size)
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a ground whose dataset has pictures of all shapes."""
    ground = tmp_path_factory.mktemp("mixed")
    write_shapes(ground / "data")
    return ground


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let configs be written where nobody looks."""
    monkeypatch.chdir(tmp_path)


def preflight_of(config: TrainingConfig) -> train_lora.Preflight:
    """Look at everything before the first weight is loaded."""
    facts, base = train_lora.inspect_model(config)
    dataset = train_lora.scan_dataset(config, Emitter(), StopRequest())
    return train_lora.Preflight(config, facts, base, dataset)


# --- Who is trained at which ---


@pytest.mark.parametrize(
    ("picture", "changes", "sizes"),
    [
        ((1024, 1024), {}, [(512, 512), (768, 768)]),
        ((800, 600), {}, [(576, 448)]),  # has fewer pixels than 768 asks for
        ((300, 300), {}, [(256, 256)]),  # fills none: the least, and nothing is enlarged
        ((300, 300), {"bucket_upscale": True}, [(512, 512), (768, 768)]),
        ((800, 600), {"buckets": False}, [(512, 512)]),
        ((300, 300), {"buckets": False}, [(512, 512)]),
        ((3000, 900), {"buckets": False}, [(512, 512), (768, 768)]),
        # Neither area nor upscaling decides where a square is cut out.
        ((900, 700), {"buckets": False, "bucket_upscale": True}, [(512, 512)]),
    ],
)
def test_a_picture_is_trained_at_every_size_that_it_fills(
    picture: Size, changes: dict[str, Any], sizes: list[Size]
) -> None:
    """Without enlarging it for the sake of a larger one."""
    config = load_config(resolution=[768, 512], **changes)
    assert list(train_lora.sizes_of(picture, config)) == sizes


def test_two_resolutions_that_come_to_one_size_count_once() -> None:
    """Of a strip, less than its area is trained; it would else be seen twice as often as others."""
    config = load_config(resolution=[432, 448], bucket_step=8)
    assert train_lora.sizes_of((211, 977), config) == ((208, 840),)


def test_the_report_tells_who_is_where(mixed: Path) -> None:
    """By resolution and by size of training; who is left out of one is named."""
    recorder, config = Recorder(), tiny_config(mixed, resolution=BOTH)
    facts = train_lora.scan_dataset(config, Emitter(recorder), StopRequest()).facts
    assert facts.images == 4
    assert facts.images_per_resolution == {"256": 4, "384": 3}
    assert sum(row["images"] for row in facts.buckets.values()) == 7
    (warned,) = recorder.of_type("warning")
    assert warned["code"] == "images_small"
    assert warned["data"] == {"images": 1, "file": "0.png", "resolution": 384}
    assert warned["message"] == (
        "Smaller than 384 pixels, and not trained so large: 1 image, such as 0.png"
    )


def test_steps_and_memory_follow_from_what_is_trained(mixed: Path) -> None:
    """An epoch is every picture at each of its sizes; a plan holds the largest."""
    plan = preflight_of(tiny_config(mixed, resolution=BOTH, epochs=2, batch_size=2))
    assert (plan.order.own, plan.order.total_steps) == (7, 7)
    card = train_lora.DeviceFacts(kind="cuda", name="a card")
    assert plan.structure is not None
    several, largest, least = (
        train_lora.MemoryPlan.make(tiny_config(mixed, resolution=each), plan.structure, 7, card)
        for each in (BOTH, 384, 256)
    )
    assert several.parts == largest.parts
    assert several.parts["activations"] > least.parts["activations"]
    assert [offer.found for offer in several.remedies() if offer.path == "resolution"] == []
    wide = replace(several, config=replace(several.config, resolution=(512, 1024)))
    (offer,) = [offer for offer in wide.remedies() if offer.path == "resolution"]
    assert (offer.expected, offer.found) == ("512", "[512, 1024]")


def test_pictures_are_drawn_at_the_largest() -> None:
    """Unless they have a size of their own."""
    assert load_config(resolution=[512, 768]).preview_size == (768, 768)
    assert load_config(resolution=[512, 768], sample_width=640).preview_size == (640, 768)


# --- How often ---


@pytest.mark.parametrize("batch", [1, 4])
def test_the_sizes_of_a_picture_are_seen_equally_often_to_within_one(
    batch: int, tmp_path: Path
) -> None:
    """After every update, with repeats for some."""
    write_shapes(tmp_path / "data")
    write_shapes(tmp_path / "data" / "3_often")
    config = tiny_config(tmp_path, resolution=BOTH, batch_size=batch)
    plan = preflight_of(config)
    entries, seen = train_lora.entries_of(plan.dataset.pictures), Counter[int]()
    assert len(entries) == 14
    for step in range(1, 60):
        seen.update(plan.order.window(step))
        counts: dict[str, list[float]] = {}
        for number, (picture, _) in enumerate(entries):
            counts.setdefault(picture.name, []).append(seen[number])
        for picture in plan.dataset.pictures:
            of_sizes = counts[picture.name]
            assert max(of_sizes) - min(of_sizes) <= picture.repeats


# --- What is learned ---


@pytest.fixture(scope="module")
def whole(mixed: Path) -> LoRATrainer:
    """Provide a run of SDXL at two resolutions that was never stopped."""
    changes: dict[str, Any] = {"steps": 3, "batch_size": 2, "learning_rate": 0.01}
    return start_until(tiny_config(mixed, "sdxl", resolution=BOTH, **changes))


def test_sdxl_is_told_the_numbers_of_every_size(whole: LoRATrainer) -> None:
    """How large a picture was, what of it is cropped at this size, and how large it is now."""
    told = [(i.name, [int(n) for n in i.time_ids.tolist()]) for i in whole.cache.images]
    assert len(told) == 7
    assert ("3.png", [512, 512, 0, 0, 256, 256]) in told
    assert ("3.png", [512, 512, 0, 0, 384, 384]) in told
    for image, (name, (high, wide, top, left, *size)) in zip(whole.cache.images, told, strict=True):
        assert (wide, high) == SHAPES[int(name[0])]
        assert image.latent_dist.shape[-2:] == (size[0] // 32, size[1] // 32)
        scale = max(size[0] / high, size[1] / wide)
        assert scale <= 1
        assert abs(2 * top - (high * scale - size[0])) < 2
        assert abs(2 * left - (wide * scale - size[1])) < 2


def test_a_run_at_two_resolutions_goes_on_to_the_same_bytes(
    mixed: Path, whole: LoRATrainer
) -> None:
    """Whatever was in the update after which it stopped, and in any order of the list."""
    changes: dict[str, Any] = {"steps": 3, "batch_size": 2, "learning_rate": 0.01}
    options = changes | {"output_path": str(mixed / "parts")}
    start_until(tiny_config(mixed, "sdxl", resolution=BOTH, **options), 1)
    parts = start_until(tiny_config(mixed, "sdxl", resolution=BOTH[::-1], **options))
    one, two = (run.config.output_path / train_lora.FINAL for run in (whole, parts))
    assert one.read_bytes() == two.read_bytes()


def encode(config: TrainingConfig) -> train_lora.Cache:
    """Let the encoders of a run work, and nothing else."""
    run = LoRATrainer(config, Emitter())
    _, model = train_lora.inspect_model(config)
    assert model is not None
    run.models = run.load(model)
    return run.encode(train_lora.scan_dataset(config, run.events, run.stop))


def test_what_was_kept_is_what_would_be_made(mixed: Path, whole: LoRATrainer) -> None:
    """Path and size together name what is encoded; a run at one of the sizes finds it too."""
    packs = sorted((mixed / "cache").rglob("*.safetensors"))
    again, single = encode(whole.config), encode(replace(whole.config, resolution=384))
    assert sorted((mixed / "cache").rglob("*.safetensors")) == packs
    made = encode(replace(whole.config, cache_dir=None)).images
    for image, kept, found in zip(made, again.images, whole.cache.images, strict=True):
        for other in (kept, found):
            assert torch.equal(image.latent_dist, other.latent_dist)
            assert torch.equal(image.time_ids, other.time_ids)
    large = [image for image in made if image.name == "3.png"][-1]
    assert torch.equal(large.latent_dist, single.images[-1].latent_dist)


def test_one_in_a_list_is_the_same_run_as_one_without(mixed: Path) -> None:
    """The config is the same, and so is all that follows from it; the order does not count."""
    assert load_config(resolution=[512]) == load_config(resolution=512)
    assert load_config(resolution=[768.0, 512]).as_record()["resolution"] == [512, 768]
    one, listed, other = (
        identity_of(tiny_config(mixed, resolution=each)) for each in (256, [256], [256, 264])
    )
    assert one == listed
    assert one["resolution"] == "256"
    assert {name for name in one if one[name] != other[name]} == {"resolution"}


def identity_of(config: TrainingConfig) -> dict[str, str | None]:
    """Sum up what makes a run this run."""
    plan = preflight_of(config)
    assert plan.structure is not None
    return train_lora.identify(config, plan, plan.structure)


# --- What is held back, and what is beside ---


def test_a_picture_that_is_held_back_is_trained_at_no_size(mixed: Path) -> None:
    """Whole pictures are held back, and measured at the sizes they would be trained at."""
    for seed in range(8):
        config = tiny_config(mixed, resolution=BOTH, seed=seed, validation_split=2)
        dataset = train_lora.scan_dataset(config, Emitter(), StopRequest())
        trained, held = ({p.name for p in each} for each in (dataset.pictures, dataset.held))
        assert len(trained) == len(held) == 2
        assert not trained & held
    cache = encode(config)
    assert {image.name for image in cache.images} == trained
    assert {image.name for image in cache.held} == held
    assert len(cache.images) + len(cache.held) == 7


def test_class_images_are_drawn_once_and_trained_at_both(mixed: Path) -> None:
    """At the largest, and then beside the others at each."""
    changes: dict[str, Any] = {"regularization_path": str(mixed / "class")}
    changes |= {"prior_preservation": True}
    changes |= {"prior_prompt": "a dog", "prior_images": 2, "output_path": str(mixed / "prior")}
    config = tiny_config(mixed, resolution=BOTH, **changes)
    plan = preflight_of(config)
    assert len(plan.dataset.missing) == 2
    assert (plan.order.own, plan.order.others) == (7, 4)
    drawn = encode(config).images[plan.order.own :]
    assert sorted(i.latent_dist.shape[-1] for i in drawn) == [8, 8, 12, 12]
    assert len(list((mixed / "class").glob("*.png"))) == 2


# --- What is refused ---


@pytest.mark.parametrize(
    ("resolution", "path", "said"),
    [
        ([512, 512], "resolution", "different numbers"),
        ([], "resolution", "at most 8 different numbers"),
        ([512, 700], "resolution[1]", "a multiple of 8"),
        ([128, 512], "resolution[0]", "256 … 2048"),
        ([*range(256, 330, 8)], "resolution", "at most 8"),
        (["512"], "resolution[0]", "a whole number"),
        ("512,768", "resolution", "a list of at most 8"),
        (True, "resolution", "a whole number 256 … 2048"),
    ],
)
def test_lists_that_make_no_sense_are_refused(resolution: Any, path: str, said: str) -> None:
    """By the place in the list, with what is expected and what to write."""
    with pytest.raises(TrainError) as refused:
        load_config(resolution=resolution)
    (problem,) = refused.value.problems
    assert problem.path == path
    assert said in problem.expected
    assert "512 for SD 1.5" in problem.hint or problem.hint == "Remove the quotes."


@pytest.mark.parametrize(
    ("text", "given"), [("[512,768]", [512, 768]), ("512", 512), ("[768]", 768)]
)
def test_a_list_may_be_given_on_the_command_line(text: str, given: Any, mixed: Path) -> None:
    """As JSON, like any other value."""
    key, value = train_lora.parse_override(f"resolution={text}")
    config = tiny_config(mixed, **{key: value})
    assert config.as_record()["resolution"] == given


def test_each_has_to_suit_the_base_model(mixed: Path) -> None:
    """A multiple of what its patches take; one that is far from its own is warned of."""
    config = tiny_config(mixed, resolution=[320, 328, 1024])
    facts, base = train_lora.inspect_model(config)
    assert base is not None
    with pytest.raises(TrainError) as refused:
        train_lora.check_knobs(config, replace(base, pixel_step=16))
    (problem,) = refused.value.problems
    assert (problem.path, problem.found) == ("resolution", "[320, 328, 1024]")
    recorder = Recorder()
    known = replace(facts, native_resolution=320)
    train_lora.report_model(config, (known, base), Emitter(recorder))
    told = [w["data"] for w in recorder.of_type("warning")]
    assert told == [{"resolution": 1024, "native_resolution": 320}]


def test_a_preflight_at_two_resolutions_counts_what_training_does(mixed: Path) -> None:
    """Nothing is loaded for it."""
    config = tiny_config(mixed, resolution=BOTH, epochs=3, output_path=str(mixed / "none"))
    report = LoRATrainer(config, Emitter()).validate()
    assert report.images_per_resolution == {"256": 4, "384": 3}
    assert (report.steps_per_epoch, report.total_steps) == (7, 21)
