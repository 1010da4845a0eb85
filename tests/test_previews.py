"""Previews: the picture diffusers would draw, at the right steps, and training takes no notice."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import Recorder, load_config, write_image, write_json
from PIL import Image
from safetensors.torch import load_file
from tiny_models import FAMILIES, build_tiny, change_weights
from tiny_runs import dataset_of, prepare, tiny_config

import train_lora
from train_lora import (
    Cache,
    Emitter,
    Learner,
    LoRATrainer,
    Models,
    Picture,
    Record,
    StopRequest,
    TrainingInterrupted,
)

SIDE = 256
SMALL = {
    "resolution": SIDE,
    "sample_steps": 2,
    "sample_guidance": 7.0,
    "lora_rank": 2,
    "learning_rate": 0.01,
    "sample_prompts": ["zkb"],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide a current folder with one image to train on."""
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "data" / "image.png", (320, 320))
    return tmp_path


def run(
    folder: Path,
    listener: Callable[[Record], None],
    stop: StopRequest | None = None,
    **changes: Any,
) -> train_lora.CompleteEvent:
    """Train in the current folder."""
    config = load_config(base_model=str(folder), **{**SMALL, **changes})
    return LoRATrainer(config, Emitter(listener), stop or StopRequest()).train()


def pixels(path: str | Path) -> Any:
    """Read a picture."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


# --- the files ---


def test_every_prompt_is_drawn_when_it_is_due_and_at_the_end(
    here: Path, built: Path, recorder: Recorder
) -> None:
    """The first picture of a step has no number; seeds are the same at every step."""
    prompts = ["zkb cat", "zkb dog"]
    run(built / "sd1", recorder, steps=5, validation_steps=2, sample_prompts=prompts, seed=7)
    told = [
        (r["step"], Path(r["image_path"]).name, r["prompt"], r["seed"])
        for r in recorder.of_type("sample")
    ]
    assert told == [
        (step, f"step_{step}{suffix}.png", prompt, seed)
        for step in (2, 4, 5)
        for suffix, prompt, seed in (("", "zkb cat", 7), ("_2", "zkb dog", 8))
    ]
    files = {path.name for path in (here / "out" / "samples").iterdir()}
    assert files == {name for _, name, _, _ in told} | {"strip.png"}


def test_the_last_step_is_drawn_once(here: Path, built: Path, recorder: Recorder) -> None:
    """Also when it is due anyway."""
    run(built / "sd1", recorder, steps=2, validation_steps=1)
    assert [record["step"] for record in recorder.of_type("sample")] == [1, 2]


def test_the_base_model_is_drawn_first_where_that_is_asked_for(
    here: Path, built: Path, recorder: Recorder
) -> None:
    """Before the first update, and with the same noise as ever after."""
    run(built / "sd1", recorder, steps=2, learning_rate=1e-6, sample_at_start=True)
    first, last = (pixels(r["image_path"]) for r in recorder.of_type("sample"))

    assert [r["step"] for r in recorder.of_type("sample")] == [0, 2]
    assert np.abs(first.astype(int) - last.astype(int)).max() <= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_preview_is_a_whole_picture_of_the_right_size(
    here: Path, built: Path, family: str, recorder: Recorder
) -> None:
    """It is neither black nor of one colour, and there when it is announced."""
    seen: list[Any] = []

    def listen(record: Record) -> None:
        recorder(record)
        if record["type"] == "sample":
            seen.append(pixels(record["image_path"]))

    run(built / family, listen, steps=1, resolution=288)
    (picture,) = seen
    assert picture.shape == (288, 288, 3)
    assert picture.std() > 1
    assert recorder.codes() == []


@pytest.mark.parametrize(("resolution", "side"), [(256, 256), (264, 256)])
def test_the_vae_tells_how_many_pixels_a_latent_stands_for(
    here: Path, recorder: Recorder, resolution: int, side: int
) -> None:
    """Sixteen to a side in a VAE of five levels; what is left over has no latent."""
    base = build_tiny("sd1", here / "model", vae_levels=5)
    run(base, recorder, steps=1, resolution=resolution)
    (sample,) = recorder.of_type("sample")
    (fact, *_) = (r["data"] for r in recorder.of_type("info") if r["topic"] == "model")
    assert pixels(sample["image_path"]).shape == (side, side, 3)
    assert fact["native_resolution"] == 8 * 16


# --- without prompts ---


def prompts_of(*captions: str, words: tuple[str, ...] = ("zkb",)) -> list[str]:
    """List what is drawn for pictures with these captions, the last one of another folder."""
    config = load_config(trigger_words=words)
    pictures = [Picture(f"{n}.png", Path(), 9, 9, c) for n, c in enumerate((*captions, "a house"))]
    dataset = dataset_of(pictures, config)
    dataset.facts.images = len(captions)  # type: ignore[misc]  # a stand-in
    return [prompt for _, prompt in train_lora.preview_texts(config, dataset)]


@pytest.mark.parametrize(
    ("captions", "words", "prompts"),
    [
        (["zkb", "zkb, a cat", "a red zkb on a chair", "zkb, a dog"], ["zkb"], None),
        (["zkb, person"] * 3, ["zkb", "person"], ["zkb, person", "zkb, person in the snow"]),
        (["a cat", "a cat by the sea"], [], ["a cat by the sea"]),
        (["a zkb\nzkb, a cat"], ["zkb"], ["a zkb", "zkb in the snow", "a"]),
    ],
)
def test_without_prompts_those_are_drawn_that_tell_most(
    here: Path, captions: list[str], words: list[str], prompts: list[str] | None
) -> None:
    """A caption of middling length, the trigger words elsewhere, and the caption without them."""
    expected = prompts or ["zkb, a dog", "zkb in the snow", "a dog"]
    assert prompts_of(*captions, words=tuple(words)) == expected


def test_prompts_of_its_own_are_drawn_by_seeds_of_their_own(
    here: Path, built: Path, recorder: Recorder
) -> None:
    """At every step; that they are cut is no matter of a warning."""
    (here / "data" / "image.txt").write_text("a cat on zkb", encoding="utf-8")
    run(built / "sd1", recorder, steps=2, validation_steps=1, sample_prompts=[], seed=3)
    told = [(r["step"], r["prompt"], r["seed"]) for r in recorder.of_type("sample")]
    prompts = ("a cat on zkb", 3), ("zkb in the snow", 4), ("a cat on", 5)
    assert told == [(step, *each) for step in (1, 2) for each in prompts]
    assert recorder.codes() == []


# --- the strip ---

CELL, BAND = 192, 20


def drawn_at(folder: Path, prompts: list[str], *steps: int) -> Any:
    """Lay out plain pictures, whose grey is their step, and return the pixels of their middles."""
    config = load_config(output_path=str(folder), sample_prompts=prompts)
    for step in steps:
        for number, prompt in enumerate(prompts, start=1):
            suffix = f"_{number}" if number > 1 else ""
            grey = Image.new("RGB", (64 if number == 1 else 300, 300), (step, number, 0))
            content = train_lora.encode_png(grey, prompt)
            train_lora.write_whole(folder / "samples" / f"step_{step}{suffix}.png", content)
    trainer = LoRATrainer(config, prompts=prompts)
    trainer.write_strip()
    assert trainer.strip == str(folder.absolute() / "samples" / "strip.png")
    sheet = pixels(trainer.strip)
    assert sheet.shape[0] == BAND + len(prompts) * (BAND + CELL)
    return sheet[BAND * 2 + CELL // 2 :: BAND + CELL, 10::CELL]


def test_the_strip_has_a_row_for_each_prompt_and_a_column_for_each_step(here: Path) -> None:
    """In the order of the numbers, not of the names; narrow pictures keep their shape."""
    rows = drawn_at(here / "out", ["a", "b"], 9, 10, 100)
    assert rows[..., 0].tolist() == [[9, 10, 100]] * 2
    assert rows[..., 1].tolist() == [[1] * 3, [2] * 3]


def test_of_many_steps_the_strip_shows_some_evenly(here: Path) -> None:
    """The first and the last are among them; a file of another name is none."""
    write_image(here / "out" / "samples" / "step_x.png")
    (row,) = drawn_at(here / "out", ["a"], *range(0, 200, 2))
    shown = row[..., 0].tolist()
    assert (len(shown), shown[0], shown[-1]) == (12, 0, 198)
    assert all(16 <= later - sooner <= 20 for sooner, later in itertools.pairwise(shown))


def test_what_was_drawn_for_other_prompts_is_left_out_of_the_strip(here: Path) -> None:
    """They were changed on the way; the place stays white."""
    drawn_at(here / "out", ["a dog"], 1)
    (row,) = drawn_at(here / "out", ["a cat"], 2)
    assert row[..., 0].tolist() == [255, 2]


def test_the_last_line_names_the_strip(here: Path, built: Path, recorder: Recorder) -> None:
    """It is there, with the picture of each step, and each says what it was asked to show."""
    done = run(built / "sd1", recorder, steps=2, validation_steps=1)
    assert done.strip_path == str(here / "out" / "samples" / "strip.png")
    assert pixels(done.strip_path).shape == (2 * BAND + CELL, 2 * CELL, 3)
    with Image.open(recorder.of_type("sample")[0]["image_path"]) as picture:
        assert picture.info["prompt"] == "zkb"


def test_a_strip_that_cannot_be_written_costs_nothing_but_a_warning(
    here: Path, built: Path, recorder: Recorder
) -> None:
    """The run is complete, and says that there is none."""
    (here / "out" / "samples" / "strip.png").mkdir(parents=True)
    done = run(built / "sd1", recorder, steps=1)
    assert (done.strip_path, recorder.codes()) == (None, ["sample_failed"])
    assert len(recorder.of_type("sample")) == 1
    assert Path(done.final_path).is_file()


# --- against diffusers ---


@dataclasses.dataclass
class Studio:
    """All that a preview needs."""

    models: Models
    cache: Cache
    config: train_lora.TrainingConfig

    def draw(self, seed: int = 3, stop: StopRequest | None = None, **changes: Any) -> Any:
        """Draw the prompt."""
        config = dataclasses.replace(self.config, **changes)
        stop = stop or StopRequest()
        wanted = [(config.sample_prompts[0], seed)]
        (picture,) = train_lora.draw_previews(self.models, self.cache, wanted, config, stop)
        return np.asarray(picture)


PROMPT = "zkb, a photo of a cat"


def open_studio(folder: Path, **changes: Any) -> tuple[Studio, Learner]:
    """Load a base model with fresh adapters, which have no effect yet."""
    settings = {**SMALL, "sample_prompts": [PROMPT], "sample_steps": 3, **changes}
    config = load_config(base_model=str(folder), **settings)
    trainer = LoRATrainer(config, Emitter(), StopRequest())
    facts, base = train_lora.inspect_model(config)
    assert base is not None
    trainer.models = trainer.load(base)
    picture = train_lora.Picture(
        name="image.png", path=Path("data/image.png"), width=320, height=320, caption="zkb"
    )
    cache = trainer.encode(dataset_of([picture], config))
    return Studio(trainer.models, cache, config), trainer.adapt(facts)


def draw_with_diffusers(
    folder: Path, family: str, config: Any, seed: int = 3, **schedule: Any
) -> Any:
    """Draw with the library's own pipeline, from the same noise and with the same solver."""
    kind: Any = diffusers.StableDiffusionPipeline
    if family == "sdxl":
        kind = diffusers.StableDiffusionXLPipeline
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction" if family == "sd2" else "epsilon",
        timestep_spacing="trailing",
        **schedule,
    )
    return np.asarray(
        pipe(
            config.sample_prompts[0],
            negative_prompt=config.sample_negative_prompt or None,
            num_inference_steps=config.sample_steps,
            guidance_scale=config.sample_guidance,
            height=config.preview_size[1],
            width=config.preview_size[0],
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
    )


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_preview_may_have_a_size_of_its_own(here: Path, built: Path, family: str) -> None:
    """It is the picture that diffusers draws of that size; training goes on with its own."""
    studio, _ = open_studio(built / family, sample_width=320, sample_height=192)
    drawn = studio.draw()
    assert drawn.shape == (192, 320, 3)
    assert distance(drawn, draw_with_diffusers(built / family, family, studio.config)) <= 1
    alone, _ = open_studio(built / family, sample_height=192)
    assert alone.draw().shape == (192, SIDE, 3)


def distance(one: Any, other: Any) -> float:
    """Measure how far two pictures are apart at most, in steps of 255."""
    return float(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize("negative", ["", "dog"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_preview_is_the_picture_that_diffusers_draws(
    here: Path, built: Path, family: str, negative: str
) -> None:
    """All families, velocity among them; SDXL's empty negative prompt is silence."""
    studio, _ = open_studio(built / family, sample_negative_prompt=negative)
    wanted = draw_with_diffusers(built / family, family, studio.config)
    assert distance(studio.draw(), wanted) <= 1


def test_a_preview_begins_with_pure_noise_where_training_does(here: Path, built: Path) -> None:
    """Asked for or read from the model, training and previews have the same schedule."""
    zero = {"rescale_betas_zero_snr": True}
    studio, _ = open_studio(built / "sd2", zero_terminal_snr=True)
    wanted = draw_with_diffusers(built / "sd2", "sd2", studio.config, **zero)
    assert studio.models.schedule.alphas_cumprod[-1] == 0
    assert distance(studio.draw(), wanted) <= 1
    other = draw_with_diffusers(built / "sd2", "sd2", studio.config)
    assert distance(wanted, other) > 1


@pytest.mark.parametrize("changes", [{"sample_guidance": 1.0}, {"sample_guidance": 12.0}])
def test_guidance_means_what_it_means_in_diffusers(
    here: Path, built: Path, changes: dict[str, float]
) -> None:
    """1 follows the prompt alone."""
    studio, _ = open_studio(built / "sd1", **changes)
    wanted = draw_with_diffusers(built / "sd1", "sd1", studio.config)
    assert distance(studio.draw(), wanted) <= 1


def test_seed_steps_guidance_and_prompts_all_matter(here: Path, built: Path) -> None:
    """The same ones give the same picture, others give another."""
    studio, _ = open_studio(built / "sd1", sample_negative_prompt="dog")
    first = studio.draw()
    assert distance(first, studio.draw()) == 0
    assert distance(first, studio.draw(seed=4)) > 0
    assert distance(first, studio.draw(sample_steps=2)) > 0
    assert distance(first, studio.draw(sample_guidance=30.0)) > 0
    assert distance(first, studio.draw(sample_prompts=("zkb",))) > 0
    assert distance(first, studio.draw(sample_negative_prompt="zkb")) > 0


def test_a_preview_shows_what_was_learned(here: Path, built: Path, recorder: Recorder) -> None:
    """The same seed gives another picture once the adapter has moved."""
    run(built / "sd1", recorder, steps=4, validation_steps=2, learning_rate=0.1)
    first, last = (pixels(record["image_path"]) for record in recorder.of_type("sample"))
    assert distance(first, last) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
        {"_class_name": "DDIMScheduler", "thresholding": True},
        {"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "sigma_min"},
    ],
)
def test_the_sampler_a_model_names_does_not_change_its_previews(
    here: Path, built: Path, options: dict[str, Any]
) -> None:
    """A preview shows the adapter; noise drawn on the way would even disturb training."""
    path = build_tiny("sd1", here / "model") / "scheduler" / "scheduler_config.json"
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    write_json(path, betas | options)
    studio, _ = open_studio(here / "model")
    before = torch.get_rng_state()
    wanted = draw_with_diffusers(built / "sd1", "sd1", studio.config)
    assert distance(studio.draw(), wanted) <= 1
    assert torch.equal(torch.get_rng_state(), before)


# --- several at once ---


@pytest.mark.parametrize("learns_text", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_drawn_together_are_those_drawn_alone(
    here: Path, built: Path, family: str, *, learns_text: bool
) -> None:
    """But for the last bits, which depend on the size of a batch."""
    prompts = [PROMPT, "zkb", "a dog"]
    changes: Record = {"sample_prompts": prompts, "train_text_encoder": learns_text}
    studio, _ = open_studio(built / family, **changes)
    wanted = list(zip(prompts, (3, 4, 3), strict=True))
    together = train_lora.draw_previews(
        studio.models, studio.cache, wanted, studio.config, StopRequest()
    )
    for (prompt, seed), picture in zip(wanted, together, strict=True):
        alone = studio.draw(seed, sample_prompts=(prompt,))
        assert distance(np.asarray(picture), alone) <= 1
    assert distance(*map(np.asarray, together[:2])) > 1


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_a_round_draws_every_prompt_however_many_at_once(
    ground: Path, tmp_path: Path, at_once: int
) -> None:
    """Each under its own number and with its own seed, in the order of the prompts."""
    prompts = ["zkb cat", "zkb dog", "zkb bird"]
    config = tiny_config(ground, output_path=str(tmp_path), sample_prompts=prompts, seed=7)
    ready = prepare(config)
    ready.models.previews_at_once = at_once
    batches: list[int] = []
    ready.models.denoiser.register_forward_hook(lambda *a: batches.append(len(a[1][0])))
    ready.preview()
    told = [(r["prompt"], r["seed"]) for r in ready.recorder.of_type("sample")]
    assert told == list(zip(prompts, (7, 8, 9), strict=True))
    assert batches == {1: [2, 2, 2], 2: [4, 2], 3: [6]}[at_once]


def test_the_vae_is_read_once_for_all_previews(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the disk, in a run: it waits in main memory after it encoded the images."""
    opened: list[str] = []
    real = diffusers.AutoencoderKL.load_config

    def counted(place: Any, **named: Any) -> Any:
        opened.append(str(place))
        return real(place, **named)

    monkeypatch.setattr(diffusers.AutoencoderKL, "load_config", counted)
    options: Record = {"steps": 3, "validation_steps": 1, "sample_prompts": ["a", "b"]}
    LoRATrainer(tiny_config(ground, output_path=str(tmp_path), **options)).train()
    assert len(opened) == 1
    assert len(list(tmp_path.glob("samples/step_*.png"))) == 6


@pytest.mark.parametrize("overflows", [False, True])
def test_a_vae_that_overflows_in_half_decodes_in_full(
    ground: Path, monkeypatch: pytest.MonkeyPatch, *, overflows: bool
) -> None:
    """As that of SDXL does in fp16; others decode in the run's precision."""
    monkeypatch.setattr(train_lora, "choose_precision", lambda *_: torch.float16)
    ready = prepare(tiny_config(ground))
    vae, seen = ready.models.load_vae(), []
    with torch.no_grad():
        for weight in (vae.decoder.conv_in.weight, vae.decoder.conv_in.bias):
            weight.mul_(1e8 if overflows else 1)
    vae.decoder.conv_in.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    ready.preview()
    assert "sample_failed" not in ready.recorder.codes()
    assert seen == [torch.float16, *[torch.float32] * overflows]
    assert vae.decoder.conv_in.weight.dtype == torch.float32


def test_after_a_preview_without_memory_the_next_ones_take_less(
    ground: Path, tmp_path: Path
) -> None:
    """One at a time, decoded in pieces."""
    prompts = ["zkb cat", "zkb dog"]
    ready = prepare(tiny_config(ground, output_path=str(tmp_path), sample_prompts=prompts))
    ready.models.previews_at_once = 2
    hook = ready.models.denoiser.register_forward_hook(lambda *_: torch.empty(2**60))
    ready.preview()
    hook.remove()
    assert ready.recorder.codes().count("sample_failed") == 1
    ready.make_updates()
    ready.preview()
    assert len(ready.recorder.of_type("sample")) == 2
    assert (ready.models.previews_at_once, ready.models.tiling) == (1, True)


# --- training takes no notice ---


def snapshot(networks: list[Any]) -> Record:
    """Note everything that training goes on from."""
    return {
        "chance": (torch.get_rng_state().tolist(), random.getstate()),
        "numpy": str(np.random.get_state()),
        "modes": [[module.training for module in network.modules()] for network in networks],
        "learns": [[p.requires_grad for p in network.parameters()] for network in networks],
        "sums": [[p.double().sum().item() for p in n.parameters()] for n in networks],
        "grad": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_training_state_is_the_same_after_a_preview(here: Path, built: Path, family: str) -> None:
    """Numbers, gradients, modes and every source of chance."""
    studio, learner = open_studio(built / family, train_text_encoder=True, lora_dropout=0.5)
    networks = [studio.models.denoiser, *studio.models.text_encoders]
    for gradient in learner.gradients.values():
        gradient.fill_(0.25)

    before = snapshot(networks)
    assert all(all(modes) for modes in before["modes"])
    studio.draw()
    assert snapshot(networks) == before
    assert all((gradient == 0.25).all() for gradient in learner.gradients.values())


def test_dropout_is_off_in_a_preview(here: Path, built: Path) -> None:
    """Two pictures of the same adapter are the same."""
    studio, learner = open_studio(built / "sd1", train_text_encoder=True, lora_dropout=0.9)
    for matrix in learner.matrices.values():
        matrix.fill_(0.05)
    assert distance(studio.draw(), studio.draw()) == 0


def test_previews_change_nothing_that_is_learned(here: Path, built: Path) -> None:
    """The same bytes come out whether pictures are drawn at every step or at the end alone."""
    options: Record = {"steps": 3, "train_text_encoder": True, "lora_dropout": 0.5}
    options["lora_name"] = "zkb"
    often = run(built / "sdxl", Recorder(), **options, validation_steps=1, output_path="often")
    seldom = run(built / "sdxl", Recorder(), **options, validation_steps=99, output_path="seldom")
    assert Path(often.final_path).read_bytes() == Path(seldom.final_path).read_bytes()


# --- what goes wrong ---


def test_a_preview_that_cannot_be_written_is_a_warning(
    here: Path, built: Path, recorder: Recorder
) -> None:
    """Training goes on to its end, and tells of every failure."""
    for step in (2, 4):
        (here / "out" / "samples" / f"step_{step}.png").mkdir(parents=True)
    done = run(built / "sd1", recorder, steps=4, validation_steps=2)
    assert recorder.codes() == ["sample_failed"] * 2
    failed = [r for r in recorder.of_type("warning") if r["code"] == "sample_failed"]
    assert [record["data"]["step"] for record in failed] == [2, 4]
    assert recorder.of_type("sample") == []
    assert recorder.records[-1]["type"] == "complete"
    assert Path(done.final_path).is_file()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_picture_that_is_not_finite_is_a_warning_and_not_a_black_file(
    here: Path, recorder: Recorder, value: float
) -> None:
    """Nobody is shown a black square as a sample."""
    path = build_tiny("sd1", here / "model") / "vae" / "diffusion_pytorch_model.safetensors"
    change_weights(path, lambda weights: weights["decoder.conv_in.weight"][0].fill_(value))
    run(here / "model", recorder, steps=1)
    assert recorder.codes() == ["sample_failed"]
    assert recorder.of_type("sample") == []
    assert not list((here / "out").glob("samples/*"))


def test_a_failed_preview_leaves_training_as_it_was(here: Path, built: Path) -> None:
    """The networks learn again, dropout and all."""
    studio, _ = open_studio(built / "sd1", lora_dropout=0.5)
    with pytest.raises(KeyError):
        studio.draw(sample_prompts=("never encoded",))
    assert all(module.training for module in studio.models.denoiser.modules())
    assert torch.is_grad_enabled()


def test_a_stop_ends_a_preview_before_its_next_step(here: Path, built: Path) -> None:
    """A picture of many steps does not hold a run up, and training mode is back."""
    studio, _ = open_studio(built / "sd1", sample_steps=50)
    stop = StopRequest()
    steps: list[int] = []

    def count(*_: object) -> None:
        steps.append(1)
        if len(steps) == 3:
            stop.request("SIGTERM")

    studio.models.denoiser.register_forward_hook(count)
    with pytest.raises(TrainingInterrupted):
        studio.draw(stop=stop)
    assert len(steps) == 3
    assert studio.models.denoiser.training


@pytest.mark.parametrize("validation_steps", [2, 99])
def test_a_run_stopped_while_it_draws_keeps_what_it_learned(
    here: Path, built: Path, validation_steps: int, recorder: Recorder
) -> None:
    """It ends as interrupted, between two steps or after the last one."""
    stop = StopRequest()

    def listen(record: Record) -> None:
        recorder(record)
        if record["type"] == "sample":
            stop.request("SIGINT")

    options = {"steps": 4, "validation_steps": validation_steps, "sample_prompts": ["a", "b"]}
    with pytest.raises(TrainingInterrupted):
        run(built / "sd1", listen, stop, **options)
    step = min(validation_steps, 4)
    last, output = recorder.records[-1], here / "out"
    assert (last["type"], last["step"], last["reason"]) == ("interrupted", step, "SIGINT")
    assert last["path"] == str(output.absolute() / "state" / f"step_{step}")
    # The last picture is drawn when the final file is there.
    name = "checkpoints/lora_step_2.safetensors" if step == 2 else "lora_final.safetensors"
    assert all(value.isfinite().all() for value in load_file(output / name).values())
    assert len(recorder.of_type("sample")) == 1
    assert not list((here / "out" / "samples").glob("*.tmp"))
