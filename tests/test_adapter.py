"""Adapter and optimizer: what learns, how far an update goes, and what is never touched."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers.optimization
import pytest
import torch
from conftest import Install, Recorder
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from safetensors.torch import load_file
from tiny_models import FAMILIES, build_tiny, change_weights
from tiny_runs import Ready, one_of, prepare, tiny_base, tiny_config

import train_lora
from launches import Calls
from train_lora import ErrorCode, ImageOrder, TrainState

Tensors = dict[str, torch.Tensor]

UNET_TARGET = re.compile(r"(.*\.attn[12]\.to_(?:q|k|v|out\.0))\.weight")
TEXT_TARGET = re.compile(r"text_model\.(.*\.self_attn\.(?:q|k|v|out)_proj)\.weight")


def wake(ready: Ready, seed: int = 1) -> None:
    """Give lora_B values other than zero, so that lora_A has a gradient too."""
    chance = torch.Generator().manual_seed(seed)
    for parameter in ready.learner.matrices.values():
        with torch.no_grad():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=chance))


def descend(ready: Ready) -> None:
    """Follow the plain gradient at rate 1, so that the difference of two states is the gradient."""
    groups = ready.learner.optimizer.param_groups
    optimizer: Any = torch.optim.SGD([p for g in groups for p in g["params"]], lr=1.0)
    optimizer.param_groups[0]["full_lr"] = 1.0
    ready.learner.optimizer = optimizer


def snapshot(ready: Ready) -> Tensors:
    """Copy the adapter's numbers."""
    return {name: value.detach().clone() for name, value in ready.learner.matrices.items()}


def gradient(ready: Ready) -> Tensors:
    """Make one update along the plain gradient and tell that gradient."""
    descend(ready)
    before = snapshot(ready)
    ready.make_updates()
    return {name: before[name] - value for name, value in snapshot(ready).items()}


def largest_difference(one: Tensors, other: Tensors) -> float:
    """Compare two sets of the same tensors."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# --- what learns ---


def published_targets(base: Path, part: str) -> set[str]:
    """List a network's attention projections from its weights on disk."""
    (file,) = (base / part).glob("*.safetensors")
    pattern = UNET_TARGET if part == "unet" else TEXT_TARGET
    return {match[1] for key in load_file(file) if (match := pattern.fullmatch(key))}


def adapted(ready: Ready) -> dict[str, set[str]]:
    """List the adapted modules of every network, without the level transformers leaves out."""
    found: dict[str, set[str]] = {}
    for name in ready.learner.matrices:
        part, _, rest = name.partition(".")
        module = rest.partition(".lora_")[0].removeprefix("text_model.")
        found.setdefault(part, set()).add(module)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_all_attention_projections_that_are_read_get_an_adapter(family: str, ground: Path) -> None:
    """Layers come from the published weights; the last one of SDXL's first encoder is unread."""
    ready = prepare(tiny_config(ground, family, train_text_encoder=True))
    base = tiny_base(family, ground / "bases")
    parts = ["unet", "text_encoder"] + ["text_encoder_2"] * (family == "sdxl")
    expected = {part: published_targets(base, part) for part in parts}
    assert all(len(modules) >= 8 for modules in expected.values())
    if family == "sdxl":
        unread = {name for name in expected["text_encoder"] if "layers.1." in name}
        assert len(unread) == 4
        expected["text_encoder"] -= unread
    assert adapted(ready) == expected


def test_the_denoiser_alone_learns_unless_more_is_asked_for(ground: Path) -> None:
    """Text encoders cost memory and time; by default they are dropped."""
    ready = prepare(tiny_config(ground))
    assert adapted(ready).keys() == {"unet"}
    assert ready.models.text_encoders == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_gets_a_gradient(family: str, ground: Path) -> None:
    """At the first update only lora_B can have one, since lora_B is zero."""
    found = gradient(prepare(tiny_config(ground, family, train_text_encoder=True)))
    up = {name: bool(value.any()) for name, value in found.items() if "lora_B" in name}
    assert up == dict.fromkeys(up, True)
    assert len(up) == len(found) / 2
    assert not any(value.any() for name, value in found.items() if "lora_A" in name)


def test_a_new_adapter_changes_nothing(ground: Path) -> None:
    """Training starts from the base model itself."""
    ready = prepare(tiny_config(ground))
    matrices = snapshot(ready)
    assert all(value.any() == ("lora_A" in name) for name, value in matrices.items())


def test_the_seed_alone_decides_where_an_adapter_starts(ground: Path) -> None:
    """What torch's own source of chance did before does not matter, and it is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first, expected = snapshot(prepare(tiny_config(ground))), torch.get_rng_state()
        torch.manual_seed(5)
        assert torch.equal(torch.get_rng_state(), expected)
        torch.manual_seed(6)
        second = snapshot(prepare(tiny_config(ground)))
    other = snapshot(prepare(tiny_config(ground, seed=1)))
    assert largest_difference(first, second) == 0
    assert largest_difference(first, other) > 0


# --- the frozen base ---


@pytest.mark.parametrize("family", FAMILIES)
def test_training_leaves_the_base_as_it_was(family: str, ground: Path) -> None:
    """Every weight in memory still equals the file's, bit for bit; the adapters moved."""
    ready = prepare(tiny_config(ground, family, train_text_encoder=True, learning_rate=0.01))
    before = snapshot(ready)
    ready.make_updates(3)
    assert largest_difference(before, snapshot(ready)) > 0.005
    for part, network in ready.networks().items():
        (file,) = (tiny_base(family, ground / "bases") / part).glob("*.safetensors")
        published = {k.removeprefix("text_model."): v for k, v in load_file(file).items()}
        state = {k.replace(".base_layer", ""): v for k, v in network.state_dict().items()}
        state = {k.removeprefix("text_model."): v for k, v in state.items() if ".lora_" not in k}
        assert state.keys() == published.keys()
        assert all(torch.equal(state[name], published[name]) for name in published)


# --- one tensor for all ---


def test_networks_compute_with_parts_of_one_tensor(ground: Path) -> None:
    """Numbers and gradients alike; nothing is copied on the way, and each rate has its part."""
    ready = prepare(tiny_config(ground, "sdxl", train_text_encoder=True))
    used = [p for net in ready.networks().values() for p in net.parameters() if p.requires_grad]
    groups = ready.learner.optimizer.param_groups
    wholes = [whole for group in groups for whole in group["params"]]
    assert len(groups) == len(wholes) == 2
    assert sum(whole.numel() for whole in wholes) == sum(p.numel() for p in used)
    assert {storage(p) for p in used} == {storage(w) for w in wholes}
    assert {storage(p.grad) for p in used} == {storage(w.grad) for w in wholes}
    assert len({storage(p) for p in used}) == len({storage(p.grad) for p in used}) == 1


def storage(tensor: torch.Tensor) -> int:
    """Tell where a tensor's numbers lie."""
    return tensor.untyped_storage().data_ptr()


def test_a_matrix_that_no_gradient_reaches_counts_as_zero(ground: Path) -> None:
    """It forgets and decays like the others, as if its gradient were zeros."""
    ready = prepare(tiny_config(ground, learning_rate=0.01, weight_decay=0.1))
    wake(ready)
    name, matrix = next(iter(ready.learner.matrices.items()))
    before = matrix.clone()
    others = [p for n, p in ready.learner.parameters.items() if n != name]
    sum(p.square().sum() for p in others).backward()
    ready.learner.collect()
    assert not ready.learner.gradients[name].any()
    ready.learner.step(1.0)
    assert torch.allclose(matrix, before * (1 - 0.01 * 0.1))


# --- one update ---


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulation_equals_one_large_batch(family: str, ground: Path) -> None:
    """Six images once, four at a time: the second window, which is the last, has two."""
    ready = prepare(tiny_config(ground, family, epochs=1, batch_size=4, max_grad_norm=0))
    wake(ready)
    before = snapshot(ready)
    for done in (0, 1):
        found = []
        for batch in (4, 1, 2):
            shape: Any = {"batch_size": batch, "gradient_accumulation_steps": 4 // batch}
            ready.config = replace(ready.config, **shape)
            ready.state = TrainState(step=done)
            restore(ready, before)
            found.append(gradient(ready))
        assert max(float(value.abs().max()) for value in found[0].values()) > 1e-4
        assert all(largest_difference(found[0], other) < 1e-6 for other in found[1:])


def test_a_short_window_follows_the_mean_of_its_own_images(ground: Path) -> None:
    """The last window of five images, four at a time, is one image, and counts fully."""
    shape: dict[str, Any] = {"batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0}
    ready = prepare(tiny_config(ground, epochs=1, **shape))
    ready.cache = replace(ready.cache, images=ready.cache.images[:5])
    ready.order = ImageOrder(ready.config, 5)
    wake(ready)
    ready.state.step = 1
    before = snapshot(ready)
    found = gradient(ready)
    ready.learner.optimizer = None
    restore(ready, before)
    slots = [(0, ImageOrder(ready.config, 5).window(2)[0])]
    batch = train_lora.draw_batch(ready.models, ready.cache, ready.config, 2, slots)
    torch.autograd.backward(train_lora.batch_losses(ready.models, batch).mean())
    ready.learner.collect()
    assert largest_difference(found, ready.learner.gradients) < 1e-6


def restore(ready: Ready, values: Tensors) -> None:
    """Put the adapter's numbers back."""
    for name, parameter in ready.learner.matrices.items():
        with torch.no_grad():
            parameter.copy_(values[name])


def length(gradients: Tensors) -> float:
    """Measure a gradient as one vector."""
    return float(torch.cat([value.flatten() for value in gradients.values()]).norm())


def test_clipping_shortens_a_gradient_and_keeps_its_direction(ground: Path) -> None:
    """The reported norm is the one before; 0 switches clipping off."""
    ready = prepare(tiny_config(ground, max_grad_norm=0))
    wake(ready)
    free = gradient(ready)
    limit = length(free) / 10
    clipped = prepare(tiny_config(ground, max_grad_norm=limit))
    wake(clipped)
    short = gradient(clipped)
    assert length(short) == pytest.approx(limit, rel=1e-3)
    expected = {name: value / 10 for name, value in free.items()}
    assert largest_difference(short, expected) < limit * 1e-3
    for each in (ready, clipped):
        assert each.state.history[0].grad_norm == pytest.approx(length(free), rel=1e-4)


def test_a_gradient_below_the_limit_is_left_alone(ground: Path) -> None:
    """Clipping never lengthens."""
    found = []
    for limit in (0, 1000):
        ready = prepare(tiny_config(ground, max_grad_norm=limit))
        wake(ready)
        found.append(gradient(ready))
    assert largest_difference(*found) == 0


def test_gradient_checkpointing_gives_the_same_gradients(ground: Path) -> None:
    """It trades time for memory and nothing else, in every network and with dropout."""
    found = []
    for wanted in (False, True):
        changes = {"gradient_checkpointing": wanted, "train_text_encoder": True}
        ready = prepare(tiny_config(ground, "sdxl", lora_dropout=0.2, max_grad_norm=0, **changes))
        for network in ready.networks().values():
            layers = [m for m in network.modules() if "gradient_checkpointing" in vars(m)]
            assert {layer.gradient_checkpointing for layer in layers} == {wanted}
        wake(ready)
        found.append(gradient(ready))
    assert length(found[0]) > 1e-3
    assert largest_difference(*found) < 1e-6


def test_one_image_is_learned_by_heart(ground: Path) -> None:
    """Eighty updates on one image at one time step halve the loss."""
    ready = prepare(tiny_config(ground, learning_rate=0.02, lora_rank=16, lora_alpha=16))
    models, cache, learner = ready.models, ready.cache, ready.learner
    batch = train_lora.draw_batch(one_of(1000), cache, ready.config, 1, [(0, 0)])
    losses = []
    for _ in range(80):
        loss = train_lora.batch_losses(models, batch).mean()
        torch.autograd.backward(loss)
        learner.step(1.0)
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


# --- learning rates ---

KINDS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 1), (0, 10), (3, 10), (9, 10), (1, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_schedule_is_that_of_diffusers_without_its_zeros(
    kind: str, warmup: int, total: int, ground: Path
) -> None:
    """That of one update more, whose first rate is 0 and whose end is 0."""
    config = tiny_config(ground, lr_scheduler=kind, lr_warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = diffusers.optimization.get_scheduler(
        KINDS[kind], optimizer, num_warmup_steps=max(1, warmup), num_training_steps=total + 1
    )
    for step in range(1, total + 1):
        optimizer.step()
        reference.step()
        expected = reference.get_last_lr()[0]
        assert train_lora.rate(config, step, total) == pytest.approx(expected, abs=1e-12)
        assert expected > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_one_update_learns(kind: str, ground: Path) -> None:
    """Its only rate is the full one."""
    ready = prepare(tiny_config(ground, lr_scheduler=kind, learning_rate=0.01))
    before = snapshot(ready)
    ready.make_updates(total_steps=1)
    assert largest_difference(before, snapshot(ready)) == pytest.approx(0.01, rel=1e-3)


PREDICTIONS = {each.prediction_type for f in train_lora.FAMILIES.values() for each in f.objectives}


@pytest.mark.parametrize(
    ("knob", "table"),
    [
        ("lr_scheduler", train_lora.SCHEDULES),
        ("optimizer", train_lora.OPTIMIZERS),
        ("loss", train_lora.LOSSES),
        ("augment", train_lora.AUGMENTS),
        ("crop", train_lora.CROPS),
        ("adapter", train_lora.ADAPTERS),
        ("timestep_sampling", train_lora.TIMES),
        ("model_family", train_lora.all_families()),
        ("prediction_type", PREDICTIONS),
        ("base_precision", train_lora.NUMBER_BYTES),
    ],
)
def test_every_choice_of_the_schema_stands_in_the_table_that_makes_it(
    knob: str, table: Any
) -> None:
    """And the other way round: nothing falls through to something else."""
    schema = train_lora.knobs()[knob]
    assert set(schema.get("items", schema)["enum"]) - {"auto"} == set(table)


@pytest.mark.parametrize(
    ("kind", "middle", "end"),
    [("constant", 1.0, 1.0), ("linear", 0.5, 1 / 16), ("cosine", 0.5, 0.0096)],
)
def test_a_schedule_rises_falls_and_ends_above_zero(
    kind: str, middle: float, end: float, ground: Path
) -> None:
    """Four updates of warm-up in nineteen; twelve is half of the rest."""
    config = tiny_config(ground, lr_scheduler=kind, lr_warmup_steps=4)
    rates = [train_lora.rate(config, step, 19) for step in range(1, 20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[11] == pytest.approx(middle)
    assert rates[-1] == pytest.approx(end, rel=0.01)


def test_a_warm_up_longer_than_the_run_still_reaches_the_full_rate(ground: Path) -> None:
    """The run's length limits it."""
    config = tiny_config(ground, lr_warmup_steps=1000)
    assert [train_lora.rate(config, step, 4) for step in range(1, 5)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(("given", "used"), [(0.03, 0.03), (None, 0.01)])
def test_text_encoders_have_a_rate_of_their_own(
    given: float | None, used: float, ground: Path
) -> None:
    """At a first update AdamW moves every number by its rate, whatever the gradient."""
    options: dict[str, Any] = {"learning_rate": 0.01, "weight_decay": 0, "lr_warmup_steps": 2}
    options["text_encoder_learning_rate"] = given
    ready = prepare(tiny_config(ground, "sdxl", train_text_encoder=True, **options))
    before = snapshot(ready)
    ready.make_updates()
    moved = {n: float((v - before[n]).abs().max()) for n, v in snapshot(ready).items()}
    for part, rate in {"unet.": 0.01, "text_encoder.": used, "text_encoder_2.": used}.items():
        found = [m for name, m in moved.items() if name.startswith(part)]
        assert max(found) == pytest.approx(rate / 2, rel=1e-3)
    assert ready.state.history[0].learning_rate == pytest.approx(0.005)


# --- updates that are not finite ---


def poisoned(ready: Ready, *numbers: int) -> train_lora.Cache:
    """Spoil the latents of some images."""
    images = list(ready.cache.images)
    for number in numbers:
        spoiled = torch.full_like(images[number].latent_dist, torch.nan)
        images[number] = replace(images[number], latent_dist=spoiled)
    return replace(ready.cache, images=tuple(images))


def memory_of(optimizer: Any) -> list[Tensors]:
    """Copy what an optimizer remembers."""
    states = optimizer.state_dict()["state"].values()
    return [{name: torch.as_tensor(v).clone() for name, v in s.items()} for s in states]


def test_an_update_that_is_not_finite_leaves_no_trace(ground: Path) -> None:
    """Weights, moments and the optimizer's own count stay; the next good update goes on."""
    ready = prepare(tiny_config(ground, batch_size=6, learning_rate=0.01))
    ready.make_updates(2)
    weights, moments = snapshot(ready), memory_of(ready.learner.optimizer)
    clean, ready.cache = ready.cache, poisoned(ready, 3)
    ready.make_updates()
    assert largest_difference(weights, snapshot(ready)) == 0
    after = memory_of(ready.learner.optimizer)
    assert all(largest_difference(*pair) == 0 for pair in zip(moments, after, strict=True))
    assert len(moments) == len(ready.learner.optimizer.param_groups) == 1
    ready.cache = clean
    ready.make_updates()
    assert 0 < largest_difference(weights, snapshot(ready)) < 0.1


def test_a_skipped_update_is_told_with_its_images(ground: Path) -> None:
    """The images are those of the whole window; the step still counts, its loss is a gap."""
    ready = prepare(tiny_config(ground, gradient_accumulation_steps=3))
    ready.cache = poisoned(ready, *range(6))
    ready.make_updates()
    (warning,) = ready.recorder.of_type("warning")[-1:]
    assert warning["code"] == "update_skipped"
    expected = ImageOrder(ready.config, 6).window(1)
    assert warning["data"] == {"step": 1, "images": [f"{number}.png" for number in expected]}
    assert [(point.step, point.loss) for point in ready.state.history] == [(1, None)]
    assert ready.recorder.of_type("progress")[-1]["loss"] is None


def test_ten_bad_updates_in_a_row_end_a_run(ground: Path) -> None:
    """Nine and a good one do not."""
    ready = prepare(tiny_config(ground))
    clean, bad = ready.cache, poisoned(ready, *range(6))
    for cache, times in ((bad, 9), (clean, 1), (bad, 9)):
        ready.cache = cache
        ready.make_updates(times)
    with pytest.raises(train_lora.TrainError) as ended:
        ready.make_updates()
    assert ended.value.code is ErrorCode.LOSS_NOT_FINITE
    assert ready.recorder.codes().count("update_skipped") == 19


def test_a_base_that_answers_without_sense_ends_the_run(ground: Path, tmp_path: Path) -> None:
    """Ten warnings, one error, and no final file; what there was is saved, as at every end."""
    base = build_tiny("sd1", tmp_path / "base")
    (file,) = (base / "unet").glob("*.safetensors")
    change_weights(file, lambda weights: weights["conv_out.bias"].fill_(torch.nan))
    config = tiny_config(ground, base_model=str(base), output_path=str(tmp_path / "out"))
    recorder = Recorder()
    with pytest.raises(train_lora.TrainError):
        train_lora.LoRATrainer(config, train_lora.Emitter(recorder)).train()
    assert recorder.records[-1]["code"] == "loss_not_finite"
    assert recorder.codes().count("update_skipped") == 10
    assert recorder.records[-1]["path"] == str(tmp_path / "out" / "state" / "step_10")
    assert not list(tmp_path.glob("out/*.safetensors"))


# --- optimizers ---


@pytest.mark.parametrize(
    ("optimizer", "package"),
    [
        ("adamw8bit", "bitsandbytes"),
        ("lion", "lion-pytorch"),
        ("prodigy", "prodigyopt"),
        ("schedulefree", "schedulefree"),
    ],
)
def test_a_missing_optimizer_package_is_named_with_its_command(
    optimizer: str, package: str, ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends before anything is loaded or written."""
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)  # as if it were not there
    rate = 1 if optimizer == "prodigy" else 1e-4
    options: dict[str, Any] = {"learning_rate": rate, "output_path": str(tmp_path / "out")}
    config = tiny_config(ground, optimizer=optimizer, **options)
    recorder = Recorder()
    with pytest.raises(train_lora.TrainError):
        train_lora.LoRATrainer(config, train_lora.Emitter(recorder)).train()
    (error,) = recorder.records
    assert error["code"] == "package_missing"
    assert f"pip install {package}" in error["problems"][0]["hint"]
    assert not (tmp_path / "out").exists()


# Enough of the packages to see that they are asked: each moves everything by a number of its own.
FAKE = """
import torch

class {name}(torch.optim.Optimizer):
    def __init__(self, groups, lr=1.0, weight_decay=None):
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(group["lr"] * group["weight_decay"])
"""


@pytest.mark.parametrize(
    ("optimizer", "module", "name"),
    [
        ("adamw8bit", "bitsandbytes/optim.py", "AdamW8bit"),
        ("lion", "lion_pytorch/__init__.py", "Lion"),
    ],
)
def test_other_optimizers_come_from_their_packages(
    optimizer: str, module: str, name: str, ground: Path, install: Install
) -> None:
    """A package that is there is used, with the config's rate and weight decay."""
    # PEFT looks once whether the real one is there; the fake one shall not be what it finds.
    assert is_bnb_4bit_available() == is_bnb_available()
    install(module, FAKE.format(name=name))
    options: dict[str, Any] = {"optimizer": optimizer, "weight_decay": 0.5, "learning_rate": 0.01}
    ready = prepare(tiny_config(ground, **options))
    expected = {name: value + 0.005 for name, value in snapshot(ready).items()}
    ready.make_updates()
    moved = snapshot(ready)
    assert largest_difference(moved, expected) < 1e-7
    ready.cache = poisoned(ready, *range(6))
    ready.make_updates()
    assert largest_difference(moved, snapshot(ready)) == 0


# What packages do, all in one: numbers kept by the group, a plain count, a map that all share.
KEEPER = """
import torch

class AdamW8bit(torch.optim.Optimizer):
    MAP = torch.linspace(0.5, 1, 8)

    def __init__(self, groups, weight_decay=None):
        super().__init__(groups, dict(lr=1.0, weight_decay=weight_decay, d=1.0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["d"] *= 0.9
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    counts = torch.zeros(p.shape, dtype=torch.uint8)
                    state.update(step=0, qmap1=self.MAP, state1=counts)
                state["step"] += 1
                state["state1"] += (p.grad > 0).byte()
                factor = state["qmap1"][state["state1"].long() % 8] / state["step"]
                p -= group["lr"] * group["d"] * factor * p.grad.sign()
"""


@pytest.fixture
def keeper(install: Install) -> None:
    """Provide an optimizer that keeps something in every place where one can."""
    is_bnb_available()  # remembered, so that nobody else takes this for the real package
    install("bitsandbytes/optim.py", KEEPER)


def train_in(out: Path, ground: Path, *ends: int, **changes: Any) -> Tensors:
    """Train to one step after another, with a start for each; load what was learned."""
    for steps in ends:
        options = {"save_precision": "fp32", "learning_rate": 0.01, **changes}
        config = tiny_config(ground, output_path=str(out), steps=steps, **options)
        done = train_lora.LoRATrainer(config).train()
    return load_file(done.final_path)


def test_everything_an_optimizer_keeps_outlasts_a_restart(
    ground: Path, tmp_path: Path, keeper: None
) -> None:
    """In its groups as in its state, whatever is shared."""
    options: dict[str, Any] = {"optimizer": "adamw8bit", "train_text_encoder": True}
    whole = train_in(tmp_path / "whole", ground, 4, **options)
    parts = train_in(tmp_path / "parts", ground, 2, 4, **options)
    assert largest_difference(whole, parts) == 0


def test_a_restart_takes_rate_and_decay_from_the_config(ground: Path, tmp_path: Path) -> None:
    """They may change between two starts, and what was saved does not undo that."""
    train_in(tmp_path / "out", ground, 2, weight_decay=0.5)
    changes: Any = {"learning_rate": 0.03, "weight_decay": 0.25}
    ready = prepare(tiny_config(ground, output_path=str(tmp_path / "out"), **changes))
    earlier = train_lora.Earlier.find(tmp_path / "out")
    assert earlier.state
    train_lora.unpack_learner(earlier.state, earlier.manifest, ready.learner)
    (group,) = ready.learner.optimizer.param_groups
    assert (group["full_lr"], group["weight_decay"]) == (0.03, 0.25)
    assert ready.learner.optimizer.state[group["params"][0]]["step"] == 2


def test_adamw_is_torchs_own(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three updates equal those of the plain AdamW on the same gradients."""
    ready = prepare(tiny_config(ground, learning_rate=0.01, weight_decay=0.1, max_grad_norm=0))
    parameters = {n: torch.nn.Parameter(p) for n, p in snapshot(ready).items()}
    reference = torch.optim.AdamW(parameters.values(), lr=0.01, weight_decay=0.1, foreach=False)
    for _ in range(3):
        for name, value in gradient_of(ready).items():
            parameters[name].grad = value
        reference.step()
        ready.make_updates()
    found = {name: value.detach() for name, value in parameters.items()}
    assert largest_difference(found, snapshot(ready)) < 1e-6


def gradient_of(ready: Ready) -> Tensors:
    """Tell the gradient of the next update without making it."""
    config, step = ready.config, ready.state.step + 1
    slots = list(enumerate(ready.order.window(step)))
    batch = train_lora.draw_batch(ready.models, ready.cache, config, step, slots)
    torch.autograd.backward(train_lora.batch_losses(ready.models, batch).mean())
    ready.learner.collect()
    found = {name: value.clone() for name, value in ready.learner.gradients.items()}
    ready.learner.forget()
    return found


# --- in half precision ---


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def half(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Let runs choose half precision where they would not."""
    dtype: torch.dtype = request.param
    monkeypatch.setattr(train_lora, "choose_precision", lambda *_: dtype)
    return dtype


def gradients_of(ready: Ready, strength: float = 1.0, slots: int = 4) -> Tensors:
    """Compute where images would move an awake adapter, without moving it."""
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ready.learner.matrices.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=chance))
    ready.learner.refresh()
    for slot in range(slots):
        batch = train_lora.draw_batch(ready.models, ready.cache, ready.config, 1, [(slot, slot)])
        (train_lora.batch_losses(ready.models, batch).sum() * strength).backward()
        ready.learner.collect()
    return {name: g.clone() / strength for name, g in ready.learner.gradients.items()}


def largest_error(found: Tensors, expected: Tensors) -> float:
    """Compare matrix by matrix."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - e).norm() / e.norm()) for n, e in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_right_but_for_rounding(
    family: str, ground: Path, half: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For text encoders too; fp16 rounds to a thousandth, bf16 eight times as coarsely."""
    config = tiny_config(ground, family, train_text_encoder=True)
    found = gradients_of(prepare(config), strength=1024)
    monkeypatch.undo()
    expected = gradients_of(prepare(config))
    assert largest_error(found, expected) < (0.25 if half == torch.bfloat16 else 0.03)


def test_a_base_in_another_precision_is_computed_with_in_the_runs(
    ground: Path, half: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with base_precision fp32 on a card; the adapter is in half all the same."""
    config = tiny_config(ground)
    ready = prepare(config)
    for parameter in ready.models.denoiser.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.float()
    ready.models.mixes = True
    found = gradients_of(ready, strength=1024)
    monkeypatch.undo()
    expected = gradients_of(prepare(config))
    assert largest_error(found, expected) < (0.25 if half == torch.bfloat16 else 0.03)


def test_the_adapter_learns_in_full_precision(ground: Path, half: torch.dtype) -> None:
    """Half of it would lose updates as small as an adapter's; networks get the rounded numbers."""
    ready = prepare(tiny_config(ground, train_text_encoder=True))
    before = snapshot(ready)
    ready.make_updates(2)
    learned = ready.learner.matrices.values()
    used = [p for net in ready.networks().values() for p in net.parameters() if p.requires_grad]
    assert {p.dtype for p in learned} == {torch.float32}
    assert {p.dtype for net in ready.networks().values() for p in net.parameters()} == {half}
    assert any((p != before[name]).any() for name, p in ready.learner.matrices.items())
    assert Counter(map(fingerprint, used)) == Counter(fingerprint(p.to(half)) for p in learned)
    assert all(p.grad is None for p in used)
    assert not any(g.any() for g in ready.learner.gradients.values())


def fingerprint(matrix: torch.Tensor) -> tuple[Any, ...]:
    """Tell a matrix from others."""
    return (*matrix.shape, *matrix.detach().flatten().tolist())


def test_gradients_of_a_window_add_up_in_full_precision(ground: Path, half: torch.dtype) -> None:
    """In half, a small one would be lost beside a large one."""
    ready = prepare(tiny_config(ground))
    alone = gradients_of(ready, slots=1)
    ready.learner.forget()
    both = gradients_of(ready, slots=2)
    rounded = [value for value in both.values() if torch.equal(value, value.to(half).float())]
    assert alone.keys() == both.keys()
    assert len(rounded) < len(both) / 10


def test_in_half_a_run_in_two_parts_is_the_run_in_one(
    ground: Path, tmp_path: Path, half: torch.dtype
) -> None:
    """To the last bit, from what was learned and not from what is rounded of it."""
    del half

    def run(name: str, steps: int) -> Tensors:
        config = tiny_config(ground, steps=steps, output_path=str(tmp_path / name))
        precise = replace(config, save_precision="fp32")
        return load_file(train_lora.LoRATrainer(precise).train().final_path)

    whole = run("whole", 2)
    run("parts", 1)
    parts = run("parts", 2)
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_a_run_goes_on_in_another_precision(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From full to half, from one half to the other, and back: a scaler is only fp16's."""
    full, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    dtypes = iter((full, fp16, bf16, fp16, full))
    monkeypatch.setattr(train_lora, "choose_precision", lambda *_: next(dtypes))
    for steps in range(1, 6):
        config = tiny_config(ground, steps=steps, output_path=str(tmp_path / "out"))
        done = train_lora.LoRATrainer(config).train()
    assert done.step == 5
    assert all(value.isfinite().all() for value in load_file(done.final_path).values())


def test_in_half_a_matrix_that_no_gradient_reaches_counts_as_zero(
    ground: Path, half: torch.dtype
) -> None:
    """Its networks leave none at all."""
    ready = prepare(tiny_config(ground))
    first, *others = ready.learner.parameters.values()
    sum(p.sum() for p in others).backward()
    assert first.grad is None
    ready.learner.collect()
    zero, *ones = ready.learner.gradients.values()
    assert not zero.any()
    assert all((gradient == 1).all() for gradient in ones)


def test_an_update_that_overflows_moves_nothing(ground: Path, half: torch.dtype) -> None:
    """The next one finds nothing of it; in fp16, it comes with a smaller factor."""
    ready = prepare(tiny_config(ground))
    ready.make_updates(1)
    learner, before = ready.learner, snapshot(ready)
    scale = learner.scaler.get_scale()
    learner.gradient[0] = torch.inf
    (_, norm), _ = learner.step(1.0)
    assert not norm.isfinite()
    assert all(torch.equal(value, before[name]) for name, value in snapshot(ready).items())
    assert not learner.gradient.any()
    assert learner.scaler.get_scale() == (scale / 2 if half == torch.float16 else scale)
    ready.make_updates(1)
    assert all(value.isfinite().all() for value in snapshot(ready).values())
    assert any((value != before[name]).any() for name, value in snapshot(ready).items())


@pytest.mark.parametrize("rank", [2, 4])
def test_nothing_is_converted_layer_by_layer(ground: Path, half: torch.dtype, rank: int) -> None:
    """There are 60 matrices; on a card each conversion costs as much time as a small layer."""
    del half
    ready = prepare(tiny_config(ground, lora_rank=rank))
    ready.make_updates(1)
    calls = Calls()
    with calls:
        ready.update()
    assert len(ready.learner.matrices) > 60
    assert calls.names["aten::_to_copy"] + calls.names["aten::copy_"] < 20
