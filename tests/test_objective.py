"""Objective: what the denoiser is asked, what it should answer, and where chance comes from."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from processes import script, started
from tiny_models import FAMILIES, SAMPLING
from tiny_runs import Ready, one_of, prepare, tiny_config

import train_lora
from train_lora import Batch, Cache, CachedImage, Conditioning, ImageOrder, TrainingConfig

LATENT_SCALE = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}


@pytest.fixture
def config(ground: Path) -> TrainingConfig:
    """Provide a config of which only the seed and the batch matter."""
    return tiny_config(ground, steps=10)


def synthetic_cache(images: int = 4, forms: int = 1, side: int = 16) -> Cache:
    """Make latents without a VAE: image n has mean 10 n (+ 100 mirrored) and deviation 1."""
    moments = torch.ones(images, forms, 2, 4, side, side)
    for number in range(images):
        for form in range(forms):
            moments[number, form, 0] = 10 * number + 100 * form
    time_ids = torch.zeros(6)
    items = [CachedImage(f"{n}.png", f"caption {n}", moments[n], time_ids) for n in range(images)]
    texts = {f"caption {n}": Conditioning(number=torch.tensor([[n]])) for n in range(images)}
    return Cache(tuple(items), texts)


def same_draws(one: Batch, other: Batch) -> bool:
    """Tell whether two batches are the same, bit for bit."""
    return all(map(torch.equal, one.tensors(), other.tensors()))


# --- the forward process ---


def closed_form_shares() -> torch.Tensor:
    """Compute the cumulative alphas of the scaled linear schedule in double precision."""
    ends = SAMPLING["beta_start"] ** 0.5, SAMPLING["beta_end"] ** 0.5
    betas = torch.linspace(*ends, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


class Overheard:
    """What a denoiser was asked and what it answered, noted by torch's own hook."""

    def __init__(self, unet: Any) -> None:
        """Listen from here on."""
        self.asked: tuple[Any, ...] = ()
        self.named: dict[str, Any] = {}
        self.answered = torch.empty(0)
        unet.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, _: Any, asked: tuple[Any, ...], named: dict[str, Any], answer: Any) -> None:
        """Keep one exchange."""
        self.asked, self.named, self.answered = asked, named, answer.sample


def exchange(ready: Ready) -> tuple[Batch, Overheard, torch.Tensor]:
    """Let a denoiser answer for four images; return what was drawn, said and lost."""
    batch = train_lora.draw_batch(
        ready.models, ready.cache, ready.config, 1, [(slot, slot) for slot in range(4)]
    )
    batch = batch._replace(timesteps=torch.tensor([0, 1, 500, 999]))
    overheard = Overheard(ready.models.denoiser)
    with torch.no_grad():
        losses = train_lora.batch_losses(ready.models, batch)
    return batch, overheard, losses


@pytest.mark.parametrize("prediction", ["auto", "epsilon", "v_prediction"])
@pytest.mark.parametrize("family", FAMILIES)
def test_noisy_latents_and_losses_follow_the_ddpm_formula(
    family: str, prediction: str, ground: Path
) -> None:
    """Whatever sampler the folder names, Euler too; from the first time step to the last."""
    ready = prepare(tiny_config(ground, family, prediction_type=prediction))
    batch, overheard, losses = exchange(ready)
    share = closed_form_shares()[batch.timesteps].view(-1, 1, 1, 1)
    clean, noise = batch.latents.double() * LATENT_SCALE[family], batch.noise.double()
    noisy, times, _ = overheard.asked
    assert torch.equal(times, batch.timesteps)
    assert torch.allclose(
        noisy.double(), share**0.5 * clean + (1 - share) ** 0.5 * noise, atol=1e-5
    )
    velocity = prediction == "v_prediction" or (prediction == "auto" and family == "sd2")
    wanted = share**0.5 * noise - (1 - share) ** 0.5 * clean if velocity else noise
    expected = (overheard.answered.double() - wanted).square().mean(dim=(1, 2, 3))
    assert losses.shape == (4,)
    assert losses.dtype == torch.float32
    assert torch.allclose(losses.double(), expected, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_and_velocity_equal_those_of_diffusers(family: str, ground: Path) -> None:
    """The reference is a DDPM scheduler with the published betas."""
    scheduler: Any = DDPMScheduler(**SAMPLING)
    ready = prepare(tiny_config(ground, family))
    batch, overheard, _ = exchange(ready)
    clean = batch.latents * LATENT_SCALE[family]
    reference = scheduler.add_noise(clean, batch.noise, batch.timesteps)
    assert torch.allclose(overheard.asked[0], reference, atol=1e-6)
    expected = scheduler.get_velocity(clean, batch.noise, batch.timesteps)
    numbers = (clean, batch.noise, batch.timesteps)
    found = train_lora.DDPM_VELOCITY.target(ready.models.schedule, *numbers)
    assert torch.allclose(found, expected, atol=1e-6)


# --- what is taught otherwise ---


def signal_to_noise(zero: bool = False) -> torch.Tensor:
    """Compute the squared ratio of every time; with a zero terminal SNR, by its paper."""
    roots = closed_form_shares().sqrt()
    if zero:
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return roots**2 / (1 - roots**2)


KINDS = {"epsilon": False, "v_prediction": False, "zero": True}


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weighs_times_by_its_papers_formula(kind: str, ground: Path) -> None:
    """Noise: min(snr, g) / snr. Velocity: min(snr, g) / (snr + 1), 0 where there is no signal."""
    prediction = "epsilon" if kind == "epsilon" else "v_prediction"
    options: dict[str, Any] = {"prediction_type": prediction, "zero_terminal_snr": KINDS[kind]}
    ready = prepare(tiny_config(ground, snr_gamma=5.0, **options))
    batch, overheard, losses = exchange(ready)
    snr = signal_to_noise(KINDS[kind])
    weights = snr.clamp(max=5) / (snr if kind == "epsilon" else snr + 1)
    objective, schedule = ready.models.base.objective, ready.models.schedule
    found = train_lora.min_snr(
        objective.snr(schedule, torch.arange(1000)), 5.0, float(kind != "epsilon")
    )
    assert bool(found.isfinite().all())
    assert torch.allclose(found.double(), weights, rtol=1e-3, atol=1e-7)
    assert float(found[-1]) == pytest.approx({"epsilon": 1.0, "zero": 0.0}.get(kind, found[-1]))
    wanted = objective.target(schedule, batch.latents * 0.18215, batch.noise, batch.timesteps)
    plain = (overheard.answered - wanted).double().square().mean(dim=(1, 2, 3))
    expected = plain * weights[batch.timesteps]
    assert torch.allclose(losses.double(), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("loss", "least"), [("l1", 0.1), ("huber", 0.1), ("huber", 0.4)])
def test_other_losses_follow_their_formulas(loss: str, least: float, ground: Path) -> None:
    """The pseudo-Huber loss is square far below its border, and straight far above."""
    batch, overheard, losses = exchange(prepare(tiny_config(ground, loss=loss, huber_delta=least)))
    off = (overheard.answered - batch.noise).double()
    sigmas = (1 / signal_to_noise()[batch.timesteps]).sqrt()
    border = ((1 - least) / (1 + sigmas) ** 2 + least).view(-1, 1, 1, 1)
    huber = 2 * border * ((off**2 + border**2).sqrt() - border)
    expected = (off.abs() if loss == "l1" else huber).mean(dim=(1, 2, 3))
    assert torch.allclose(losses.double(), expected, rtol=1e-4)


def test_a_border_for_large_errors_exists_at_both_ends_of_time() -> None:
    """1 where there is no noise, and the knob's value where there is nothing else."""
    off = torch.full((2, 1, 1, 1), 1e6)
    ends = torch.tensor([torch.inf, 0.0])
    found = train_lora.pseudo_huber(off, lambda: ends, 0.1).flatten() / 2e6
    assert found.tolist() == pytest.approx([1.0, 0.1], rel=1e-4)


def test_a_noise_offset_adds_one_number_to_each_channel(config: TrainingConfig) -> None:
    """Of its strength, by slot, and all else that is drawn stays."""
    cache, slots = synthetic_cache(side=4), [(slot, 0) for slot in range(400)]
    plain, moved = (
        train_lora.draw_batch(one_of(1000), cache, replace(config, noise_offset=o), 3, slots)
        for o in (0.0, 0.25)
    )
    added = moved.noise - plain.noise
    assert torch.allclose(added, added[..., :1, :1].expand_as(added), atol=1e-6)
    levels = added[..., 0, 0]  # [slots, channels]
    assert float(levels.std()) == pytest.approx(0.25, abs=0.02)
    assert float(levels.mean()) == pytest.approx(0, abs=0.03)
    assert abs(float(torch.corrcoef(levels.T)[0, 1])) < 0.2
    assert same_draws(plain, moved._replace(noise=plain.noise))


# The chance of a time below a share, each derived from the density that was published.
CHANCES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "uniform": lambda t: t,
    "sigmoid": lambda t: (1 + torch.erf((t / (1 - t)).log() / 2**0.5)) / 2,
    "cosmap": lambda t: 2 / torch.pi * torch.atan(t / (1 - t)),
    "cubic": lambda t: 1 - (1 - t) ** (1 / 3),
}


@pytest.mark.parametrize("sampling", CHANCES)
def test_times_are_drawn_by_their_curve_within_their_range(sampling: str) -> None:
    """4,000 draws lie below each ninth of the range as often as they should; ends are kept."""
    low, high = 200, 900
    asked: dict[str, Any] = {"timestep_sampling": sampling, "timestep_range": (low, high)}
    objective = replace(train_lora.DDPM_EPSILON, **asked)
    chance, schedule = train_lora.seeded("times"), one_of(1000).schedule
    drawn = torch.stack(
        [objective.draw_time(objective, schedule, torch.zeros(1), chance) for _ in range(4000)]
    )
    assert low <= int(drawn.min()) < int(drawn.max()) < high
    for share in torch.arange(1, 9) / 9:
        found = float((drawn < low + (high - low) * share).double().mean())
        assert found == pytest.approx(float(CHANCES[sampling](share)), abs=0.03)


def test_a_range_leaves_a_schedule_of_few_steps_one_of_them() -> None:
    """Whatever the range, there is a time to draw, and none beyond the schedule."""
    schedule, chance = one_of(3).schedule, train_lora.seeded("few")
    for ends in ((0, 1), (500, 501), (999, 1000), (0, 1000)):
        for sampling in CHANCES:
            asked: dict[str, Any] = {"timestep_sampling": sampling, "timestep_range": ends}
            objective = replace(train_lora.DDPM_EPSILON, **asked)
            time = objective.draw_time(objective, schedule, torch.zeros(1), chance)
            assert 0 <= int(time) < 3


def test_images_of_other_things_count_by_their_weight(ground: Path) -> None:
    """In the loss of their slot, whoever stands beside it."""
    plain, weighted = (prepare(tiny_config(ground, prior_weight=w)) for w in (1.0, 0.25))
    images = weighted.cache.images
    others = tuple(replace(image, weight=0.25) for image in images[2:])
    weighted.cache = replace(weighted.cache, images=(*images[:2], *others))
    (one, _, even_losses), (other, _, losses) = exchange(plain), exchange(weighted)
    assert one.weights is None
    assert other.weights is not None
    assert other.weights.tolist() == [1, 1, 0.25, 0.25]
    assert torch.allclose(losses, even_losses * other.weights)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, {}),
        (
            {"loss": "huber", "huber_delta": 0.2, "snr_gamma": 5, "noise_offset": 0.05},
            {
                "ss_loss_type": "huber",
                "ss_huber_c": "0.2",
                "ss_min_snr_gamma": "5.0",
                "ss_noise_offset": "0.05",
            },
        ),
        (
            {"prior_weight": 0.5, "timestep_sampling": "cubic"},
            {"ss_prior_loss_weight": "0.5", "ss_timestep_sampling": "cubic"},
        ),
    ],
)
def test_a_file_tells_in_kohyas_words_what_was_taught_otherwise(
    changes: dict[str, Any], said: dict[str, str], ground: Path
) -> None:
    """And nothing of it where nothing else was asked for."""
    config = tiny_config(ground, **changes)
    _, base = train_lora.inspect_model(config)
    assert base
    header = train_lora.lora_header(config, base, 1, 6)
    words = {knob["x-header"] for knob in train_lora.knobs().values() if "x-header" in knob}
    assert {word: header[word] for word in words if word in header} == said


@pytest.mark.parametrize(
    ("changes", "knob"),
    [
        ({"zero_terminal_snr": True, "noise_offset": 0.1}, "noise_offset"),
        ({"timestep_shift": 3.0}, "timestep_shift"),
    ],
)
def test_what_does_not_suit_the_objective_is_refused(
    changes: dict[str, Any], knob: str, ground: Path
) -> None:
    """A base that begins with pure noise has no use for an offset, nor noise for a shift."""
    with pytest.raises(train_lora.TrainError) as caught:
        train_lora.inspect_model(tiny_config(ground, "sd2", **changes))
    assert [problem.path for problem in caught.value.problems] == [knob]


def test_sdxl_is_told_the_sizes_of_the_images_drawn(ground: Path) -> None:
    """Original height and width, crop top and left, target; slot by slot, in full precision."""
    _, overheard, _ = exchange(prepare(tiny_config(ground, "sdxl")))
    told = overheard.named["added_cond_kwargs"]["time_ids"]
    widths = [256 + 10 * number for number in range(4)]
    expected = [[256.0, w, 0, (w - 256) // 2, 256, 256] for w in widths]
    assert told.dtype == torch.float32
    assert told.tolist() == expected


def test_losses_are_in_full_precision_on_a_base_in_half(ground: Path) -> None:
    """The answer is widened before it is compared, not after."""
    ready = prepare(tiny_config(ground))
    base = ready.models.base
    ready.models = train_lora.Models.prepare(base, torch.device("cpu"), torch.bfloat16)
    ready.models.denoiser = train_lora.load_part(base, base.family.denoiser, torch.bfloat16)
    batch, overheard, losses = exchange(ready)
    assert overheard.answered.dtype == torch.bfloat16
    expected = (overheard.answered.double() - batch.noise.double()).square().mean(dim=(1, 2, 3))
    assert losses.dtype == torch.float32
    assert torch.allclose(losses.double(), expected, rtol=1e-5)


# --- chance ---

SLOTS = [(0, 2), (1, 0), (2, 3), (3, 0)]


@pytest.mark.parametrize(
    "parts", [[[0, 1, 2, 3]], [[0], [1], [2], [3]], [[0, 1, 2], [3]], [[3, 1], [0, 2]]]
)
def test_draws_do_not_depend_on_batches_or_order(
    parts: list[list[int]], config: TrainingConfig
) -> None:
    """A slot of an update draws the same, whoever stands beside it."""
    cache = synthetic_cache()
    together = train_lora.draw_batch(one_of(1000), cache, config, 7, SLOTS)
    for part in parts:
        batch = train_lora.draw_batch(one_of(1000), cache, config, 7, [SLOTS[n] for n in part])
        for one, all_ in zip(batch.tensors(), together.tensors(), strict=True):
            assert torch.equal(one, all_[part])


def test_draws_neither_use_nor_move_the_global_source_of_chance(config: TrainingConfig) -> None:
    """What a library draws in between changes nothing, and previews are not changed."""
    cache = synthetic_cache()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = train_lora.draw_batch(one_of(1000), cache, config, 3, SLOTS)
        moved = torch.rand(1)
        torch.manual_seed(1)
        assert torch.equal(torch.rand(1), moved)
        assert same_draws(first, train_lora.draw_batch(one_of(1000), cache, config, 3, SLOTS))


def test_every_step_slot_and_seed_draws_something_of_its_own(config: TrainingConfig) -> None:
    """Neighbours and pairs that read alike, such as (1, 11) and (11, 1), differ."""
    cache = synthetic_cache()
    seen = set()
    for seed in (0, 1):
        for step in (1, 2, 11, 111):
            slots = [(slot, 0) for slot in (0, 1, 2, 11, 111)]
            seeded = replace(config, seed=seed)
            batch = train_lora.draw_batch(one_of(1000), cache, seeded, step, slots)
            seen |= {tuple(noise.flatten()[:4].tolist()) for noise in batch.noise}
            seen |= {tuple((c.flatten()[:4]).tolist()) for c in batch.latents}
    assert len(seen) == 2 * 2 * 4 * 5


DIGEST = """
import hashlib, json, sys, torch, types
import train_lora as t
torch.rand(3)
config = t.TrainingConfig.from_json(sys.argv[1])
class Models:
    schedule = types.SimpleNamespace(config=types.SimpleNamespace(num_train_timesteps=1000))
    base, device = types.SimpleNamespace(objective=t.DDPM_EPSILON), torch.device("cpu")
image = t.CachedImage("a", "a", torch.ones(2, 2, 4, 8, 8), torch.zeros(6))
cache = t.Cache((image,) * 5, {"a": t.Conditioning()})
drawn = [t.draw_batch(Models, cache, config, step, [(0, 1), (1, 4)]) for step in (5, 6)]
numbers = [[b.latents.tolist(), b.noise.tolist(), b.timesteps.tolist()] for b in drawn]
numbers.append([t.ImageOrder(config, 5).window(step) for step in range(1, 9)])
print(hashlib.sha256(json.dumps(numbers).encode()).hexdigest())
"""


def test_another_process_draws_the_same(config: TrainingConfig, ground: Path) -> None:
    """Neither hash seeds nor anything else of a process goes into what is drawn."""
    found = []
    for cold in (False, True):  # only a cold start takes a seed of its own
        environment = {"PYTHONHASHSEED": "12345"}
        command = script(DIGEST, ground / "config.json")
        with started(*command, environment=environment, cold=cold) as child:
            assert child.end(seconds=60) == 0
        found.append(child.received)
    assert found[0] == found[1]
    assert len(found[0]) == 65


def test_latents_are_drawn_anew_from_the_images_distribution(config: TrainingConfig) -> None:
    """Mean 30 and deviation 1 for image 3, independent of the noise that is added."""
    cache, slots = synthetic_cache(side=32), [(slot, 3) for slot in range(20)]
    batch = train_lora.draw_batch(one_of(1000), cache, config, 1, slots)
    assert float(batch.latents.mean()) == pytest.approx(30, abs=0.02)
    assert float(batch.latents.std()) == pytest.approx(1, abs=0.02)
    assert float(batch.noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(batch.noise.std()) == pytest.approx(1, abs=0.02)
    both = torch.stack([batch.latents.flatten(), batch.noise.flatten()])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.02


def test_timesteps_are_uniform_over_the_whole_schedule(config: TrainingConfig) -> None:
    """Ten equal ranges of 4,000 draws hold 400 each, give or take five deviations; ends occur."""
    cache = synthetic_cache(side=1)
    drawn = train_lora.draw_batch(
        one_of(1000), cache, config, 1, [(s, 0) for s in range(4000)]
    ).timesteps
    counts = torch.histc(drawn.double(), bins=10, min=0, max=1000)
    assert bool(((counts - 400).abs() < 5 * 19).all())
    few = train_lora.draw_batch(one_of(3), cache, config, 1, [(s, 0) for s in range(200)]).timesteps
    assert set(few.tolist()) == {0, 1, 2}


def test_both_forms_of_a_flipped_image_are_drawn(config: TrainingConfig) -> None:
    """About as often plain as mirrored; the form decides the whole picture."""
    cache = synthetic_cache(forms=2)
    batch = train_lora.draw_batch(one_of(1000), cache, config, 1, [(s, 0) for s in range(200)])
    means = batch.latents.mean(dim=(1, 2, 3))
    mirrored = int((means > 50).sum())
    assert bool(((means < 1) | (means > 99)).all())
    assert 65 < mirrored < 135


def test_flip_keeps_a_form_mirrored_before_the_vae(ground: Path) -> None:
    """The second form is what the VAE makes of the mirrored picture."""
    ready = prepare(tiny_config(ground, flip=True))
    plain, mirrored = ready.cache.images[2].latent_dist
    assert len(ready.cache.images[2].latent_dist) == 2
    assert not torch.equal(plain, mirrored)
    without = prepare(tiny_config(ground)).cache.images[2].latent_dist
    assert without.shape[0] == 1
    assert torch.equal(without[0], plain)


# --- windows and epochs ---


@pytest.mark.parametrize(
    ("images", "epochs", "batch", "passes"),
    [(5, 3, 1, 1), (5, 3, 2, 1), (7, 2, 2, 2), (3, 4, 8, 1), (1, 5, 1, 2), (6, 1, 4, 4)],
)
def test_every_image_is_seen_once_an_epoch(
    images: int, epochs: int, batch: int, passes: int, ground: Path
) -> None:
    """Windows run on across epochs; only the last may be short, and none is empty."""
    shape: dict[str, Any] = {"batch_size": batch, "gradient_accumulation_steps": passes}
    config = tiny_config(ground, epochs=epochs, **shape)
    order = ImageOrder(config, images)
    windows = [order.window(step) for step in range(1, order.total_steps + 1)]
    assert {len(each) for each in windows[:-1]} <= {batch * passes}
    assert 0 < len(windows[-1]) <= batch * passes
    seen = [image for each in windows for image in each]
    assert Counter(seen) == dict.fromkeys(range(images), epochs)
    for epoch in range(epochs):
        assert sorted(seen[epoch * images : (epoch + 1) * images]) == list(range(images))


def test_epochs_are_shuffled_each_in_its_own_way(config: TrainingConfig) -> None:
    """Order depends on the seed and the epoch."""
    large = replace(config, batch_size=20)
    orders = [
        tuple(ImageOrder(replace(large, seed=seed), 20).window(step))
        for seed in (0, 1)
        for step in (1, 2, 3)
    ]
    assert len(set(orders)) == 6
    assert all(sorted(order) == list(range(20)) for order in orders)


@pytest.mark.parametrize("share", [0.25, 0.3, 0.5, 0.9])
def test_images_for_regularization_have_their_share_of_every_stretch(
    share: float, ground: Path
) -> None:
    """They take turns evenly with the others, and each folder is gone through in whole epochs."""
    own, regular = 5, 3
    config = tiny_config(ground, epochs=4, batch_size=2, regularization_share=share)
    order = ImageOrder(config, own, regular)
    windows = [order.window(step) for step in range(1, order.total_steps + 1)]
    drawn = [image for each in windows for image in each]
    others = [image - own for image in drawn if image >= own]
    for end in range(1, len(drawn) + 1):
        found = sum(image >= own for image in drawn[:end])
        assert abs(found - end * share) < 1
    for names, count in ((others, regular), ([n for n in drawn if n < own], own)):
        for begin in range(0, len(names) - count + 1, count):
            assert sorted(names[begin : begin + count]) == list(range(count))
    counts = Counter(image for image in drawn if image < own)
    assert counts == dict.fromkeys(range(own), 4)


def test_epochs_are_counted_exactly_for_every_share(config: TrainingConfig) -> None:
    """It ends with the last image of dataset_path; shares are taken as they are written."""
    counted = [
        ImageOrder(replace(config, regularization_share=share), own, 3).length(epochs)
        for own, share, epochs in ((21, 0.3, 1), (1, 0.9, 1), (1, 0.01, 99), (12, 0.5, 10))
    ]
    assert counted == [29, 1, 99, 239]


def test_folders_of_the_same_size_are_shuffled_apart(config: TrainingConfig) -> None:
    """Else the same two images would always stand beside each other."""
    pairs = replace(config, batch_size=2, regularization_share=0.5)
    order = ImageOrder(pairs, 6, 6)
    met = {tuple(sorted(order.window(step))) for step in range(1, 13)}
    assert len(met) > 6


def test_a_share_means_nothing_without_images_for_regularization(config: TrainingConfig) -> None:
    """Without them every slot belongs to the dataset."""
    halved = replace(config, regularization_share=0.9)
    for step in (1, 2, 7):
        assert ImageOrder(halved, 5).window(step) == ImageOrder(config, 5).window(step)
    assert ImageOrder(halved, 5).total_steps == ImageOrder(config, 5).total_steps


@pytest.mark.parametrize(("batch", "passes"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_windows_do_not_depend_on_how_an_update_is_split(
    batch: int, passes: int, config: TrainingConfig
) -> None:
    """Only the number of images behind an update counts."""
    split = replace(config, batch_size=batch, gradient_accumulation_steps=passes)
    whole = replace(config, batch_size=6, gradient_accumulation_steps=1)
    for step in (1, 2, 9):
        assert ImageOrder(split, 4).window(step) == ImageOrder(whole, 4).window(step)


# --- dropout and whole runs ---


def final_digest(config: TrainingConfig, disturbance: int) -> str:
    """Train for real after torch's global source of chance was moved; hash the result."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(disturbance)
        done = train_lora.LoRATrainer(config).train()
    content = Path(done.final_path).read_bytes()
    assert hashlib.sha256(content).hexdigest() == done.sha256
    return done.sha256


def test_dropout_is_a_function_of_the_seed(ground: Path, tmp_path: Path) -> None:
    """The same seed gives the same file, whatever was drawn before; and dropout acts."""
    options: dict[str, Any] = {"steps": 3, "learning_rate": 0.01, "gradient_accumulation_steps": 2}
    runs = [(0.3, 1, 0), (0.3, 2, 0), (0.0, 1, 0), (0.3, 1, 5)]
    found = [
        final_digest(
            tiny_config(
                ground,
                lora_dropout=dropout,
                seed=seed,
                output_path=str(tmp_path / str(n)),
                **options,
            ),
            disturbance,
        )
        for n, (dropout, disturbance, seed) in enumerate(runs)
    ]
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_events_tell_the_epoch_and_every_step_once(ground: Path, tmp_path: Path) -> None:
    """The history of a run by epochs has one row per update and ends with its last one."""
    config = tiny_config(ground, epochs=2, batch_size=5, output_path=str(tmp_path / "out"))
    train_lora.LoRATrainer(config).train()
    lines = (tmp_path / "out" / "events.jsonl").read_text().splitlines()
    progress = [r for r in map(json.loads, lines) if r["type"] == "progress"]
    rows = (tmp_path / "out" / "loss_history.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "2", "3"]
    assert (progress[-1]["step"], progress[-1]["total_steps"], progress[-1]["epoch"]) == (3, 3, 2)


def test_texts_of_different_lengths_stand_in_one_batch() -> None:
    """Zeros fill the shorter ones up, and a mask that a family gives tells where."""
    texts = [
        Conditioning(embeds=torch.ones(1, n, 2), mask=torch.ones(1, n, dtype=torch.bool))
        for n in (3, 1)
    ]
    batch = Conditioning.stack(texts).cast(torch.bfloat16)
    assert batch["embeds"].shape == (2, 3, 2)
    assert batch["mask"].tolist() == [[True] * 3, [True, False, False]]
    assert not batch["embeds"][1, 1:].any()
