"""Optimizers and schedules: what they compute, what a run gives in the end, what is refused."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers.optimization
import pytest
import torch
import transformers.optimization
from conftest import load_config
from safetensors.torch import load_file
from tiny_runs import Ready, prepare, tiny_config

import train_lora
from train_lora import ErrorCode, TrainError, WarningCode

Tensors = dict[str, torch.Tensor]

# Of each optimizer whose package is to be there: values under which a few updates show.
RUNS: dict[str, dict[str, Any]] = {
    "adamw": {"betas": [0.8, 0.9], "optimizer_arguments": {"eps": 1e-6}},
    "adamw8bit": {"betas": [0.8, 0.9]},
    "lion": {"betas": [0.8, 0.9]},
    "prodigy": {"learning_rate": 1, "optimizer_arguments": {"d0": 1e-3, "d_coef": 2}},
    "adafactor": {"optimizer_arguments": {"beta1": 0.9, "scale_parameter": True}},
    "schedulefree": {"betas": [0.8, 0.9], "optimizer_arguments": {"r": 0.5}},
}

OWN_WAYS = ("prodigy", "schedulefree")  # that keep more than moments


def run_of(ground: Path, optimizer: str, **changes: Any) -> train_lora.TrainingConfig:
    """Load a config for an optimizer, where its package is installed."""
    package, _, _ = train_lora.OPTIMIZERS[optimizer].module.partition(".")
    pytest.importorskip(package)
    options = {"learning_rate": 0.01, "lr_warmup_steps": 2, "save_precision": "fp32"}
    values = {**options, **RUNS[optimizer], "optimizer": optimizer, **changes}
    return tiny_config(ground, **values)


def snapshot(numbers: Tensors) -> Tensors:
    """Copy tensors."""
    return {name: value.detach().clone() for name, value in numbers.items()}


def largest_difference(one: Tensors, other: Tensors) -> float:
    """Compare two sets of the same tensors."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).detach().abs().max()) for name in one)


def draw_gradients(ready: Ready, step: int) -> Tensors:
    """Give every matrix a gradient that depends on the step alone."""
    chance = torch.Generator().manual_seed(step)
    found = {}
    for name, gradient in ready.learner.gradients.items():
        gradient.copy_(torch.randn(gradient.shape, generator=chance))
        found[name] = gradient.clone()
    return found


# --- schedules ---


@pytest.fixture
def given(in_workspace: Path) -> train_lora.TrainingConfig:
    """Provide a config of which only the schedule matters."""
    return load_config()


def rates(config: train_lora.TrainingConfig, total: int) -> list[float]:
    """List the factors of all updates of a run."""
    return [train_lora.rate(config, step, total) for step in range(1, total + 1)]


Made = Callable[[Any, int, int], Any]
REFERENCES: dict[str, tuple[dict[str, Any], Made]] = {
    "cosine_restarts": (
        {"lr_cycles": 4},
        lambda optimizer, warmup, steps: diffusers.optimization.get_scheduler(
            *("cosine_with_restarts", optimizer),
            num_warmup_steps=warmup,
            num_training_steps=steps,
            num_cycles=4,
        ),
    ),
    "polynomial": (
        {"lr_power": 2.5, "min_lr_ratio": 0.25},
        lambda optimizer, warmup, steps: (
            diffusers.optimization.get_polynomial_decay_schedule_with_warmup(
                optimizer, warmup, steps, lr_end=0.25, power=2.5
            )
        ),
    ),
    "cosine": (
        {"min_lr_ratio": 0.2},
        lambda optimizer, warmup, steps: (
            transformers.optimization.get_cosine_with_min_lr_schedule_with_warmup(
                optimizer, warmup, steps, min_lr_rate=0.2
            )
        ),
    ),
}


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 23), (5, 23), (1, 2)])
@pytest.mark.parametrize("kind", REFERENCES)
def test_a_schedule_is_that_of_the_libraries_without_their_zeros(
    kind: str, warmup: int, total: int, given: train_lora.TrainingConfig
) -> None:
    """Of one update more, whose first rate is 0 and whose end is the lowest."""
    changes, make = REFERENCES[kind]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = make(optimizer, max(1, warmup), total + 1)
    config = replace(given, lr_scheduler=kind, lr_warmup_steps=warmup, **changes)
    for found in rates(config, total):
        optimizer.step()
        reference.step()
        assert found == pytest.approx(reference.get_last_lr()[0], abs=1e-9)


def test_step_is_torchs_own_with_stairs_of_one_length(given: train_lora.TrainingConfig) -> None:
    """Four stairs in twenty updates."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.3)
    config = replace(given, lr_scheduler="step", lr_cycles=4, lr_gamma=0.3)
    for found in rates(config, 20):
        assert found == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()


def test_rex_falls_as_its_paper_says(given: train_lora.TrainingConfig) -> None:
    """By (1 - p) / (1/2 + (1 - p) / 2): slowly at first, to zero behind the last update."""
    shares = [done / 10 for done in range(10)]
    expected = [(1 - p) / (0.5 + 0.5 * (1 - p)) for p in shares]
    assert rates(replace(given, lr_scheduler="rex"), 10) == pytest.approx(expected)


@pytest.mark.parametrize("cycles", [1, 3, 7, 49])
def test_every_cycle_begins_at_the_full_rate(cycles: int, given: train_lora.TrainingConfig) -> None:
    """49 / 49 of a run are 0.99… of it in binary, and the rate there would be 0."""
    config = replace(given, lr_scheduler="cosine_restarts", lr_cycles=cycles)
    for each in (1, 2, 5):
        assert rates(config, cycles * each)[::each] == [1.0] * cycles


@pytest.mark.parametrize("kind", train_lora.SCHEDULES)
def test_every_update_moves_something(kind: str, given: train_lora.TrainingConfig) -> None:
    """Whatever the run's length and warm-up; never above the full rate, and once at it."""
    for total, warmup, lowest in itertools.product((1, 2, 7, 100), (0, 1, 5, 200), (0.0, 0.1, 1.0)):
        changes: dict[str, Any] = {"lr_warmup_steps": warmup, "min_lr_ratio": lowest}
        found = rates(replace(given, lr_scheduler=kind, **changes), total)
        assert all(0 < each <= 1 for each in found)
        assert max(found) == 1
        assert all(each >= lowest for each in found[min(warmup, total) :])


# --- what a package computes ---


@pytest.mark.parametrize("optimizer", [name for name in RUNS if name != "adamw8bit"])
def test_an_optimizer_moves_what_its_package_would(optimizer: str, ground: Path) -> None:
    """Three updates equal those of the package on the matrices one by one."""
    config = run_of(ground, optimizer, max_grad_norm=0, weight_decay=0.1)
    ready, kind = prepare(config), train_lora.OPTIMIZERS[optimizer]
    held = {n: torch.nn.Parameter(m) for n, m in snapshot(ready.learner.matrices).items()}
    made = getattr(importlib.import_module(kind.module), kind.name)
    given = {"weight_decay": 0.1, **config.optimizer_arguments}
    given |= {"betas": config.betas} if config.betas else {}
    given |= {"relative_step": False} if optimizer == "adafactor" else {}
    reference = made(held.values(), lr=config.learning_rate, **given)
    if optimizer == "schedulefree":
        reference.train()
    for step in range(1, 4):
        reference.param_groups[0]["lr"] = config.learning_rate * (1 if step > 1 else 0.5)
        for name, value in draw_gradients(ready, step).items():
            held[name].grad = value
        reference.step()
        ready.learner.step(train_lora.rate(config, step, 100))
    assert largest_difference(ready.learner.matrices, dict(held)) < 1e-6
    if optimizer == "schedulefree":
        reference.eval()
        result = ready.learner.named(ready.learner.result())
        assert largest_difference(result, dict(held)) < 1e-6


def test_the_average_of_schedulefree_is_read_without_moving_anything(ground: Path) -> None:
    """As its own eval would give it, to the last bit, from which its train does not come back."""
    ready = prepare(run_of(ground, "schedulefree"))
    assert torch.equal(ready.learner.result(), ready.learner.learned)
    ready.make_updates(3)
    before, found = ready.learner.learned.clone(), ready.learner.result()
    assert torch.equal(ready.learner.learned, before)
    assert not torch.equal(found, before)
    ready.learner.optimizer.eval()
    assert torch.equal(ready.learner.learned, found)


def test_the_rate_that_prodigy_finds_is_told(ground: Path) -> None:
    """Its scale times what the schedule says, as it was before each update."""
    ready = prepare(run_of(ground, "prodigy"))
    scales = []
    for _ in range(4):
        scales.append(ready.learner.optimizer.param_groups[0]["d"])
        ready.make_updates()
    told = [point.learning_rate for point in ready.state.history]
    assert told == [scales[0] / 2, *scales[1:]]
    assert scales[0] == 1e-3
    assert len(set(scales)) > 1


def final(config: train_lora.TrainingConfig, out: Path, *ends: int) -> bytes:
    """Train to one step after another, with a start for each; read the final file."""
    for steps in ends:
        done = train_lora.LoRATrainer(replace(config, output_path=out, steps=steps)).train()
    return Path(done.final_path).read_bytes()


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in RUNS if name not in OWN_WAYS]


@pytest.mark.parametrize("optimizer", [*OWN_WAYS, *SLOW])
@pytest.mark.filterwarnings("ignore")  # the packages' own
def test_a_run_in_two_parts_is_the_run_in_one_with_every_optimizer(
    optimizer: str, ground: Path, tmp_path: Path
) -> None:
    """To the last byte, where its package is installed."""
    config = run_of(ground, optimizer, lora_name="lora", lr_warmup_steps=0)
    whole = final(config, tmp_path / "whole", 2)
    assert final(config, tmp_path / "parts", 1, 2) == whole
    tensors = load_file(tmp_path / "whole" / train_lora.FINAL)
    assert any(value.any() for name, value in tensors.items() if "lora_up" in name)


# --- the average ---

AVERAGED: dict[str, Any] = {"ema_decay": 0.6, "learning_rate": 0.01, "save_precision": "fp32"}


def test_the_average_is_that_of_all_updates_weighted(ground: Path) -> None:
    """By hand, in double precision; what is learned is what is learned without it."""
    ready = prepare(tiny_config(ground, **AVERAGED))
    plain = prepare(tiny_config(ground, **{**AVERAGED, "ema_decay": 0}))
    average = {n: m.double() for n, m in snapshot(ready.learner.matrices).items()}
    for step in range(1, 9):
        ready.make_updates()
        plain.make_updates()
        kept = min(0.6, (1 + step) / (10 + step))
        for name, matrix in ready.learner.matrices.items():
            average[name] = kept * average[name] + (1 - kept) * matrix.double()
    assert kept < 0.6
    assert min(0.6, 20 / 29) == 0.6
    found = ready.learner.named(ready.learner.result())
    assert largest_difference(found, average) < 1e-7
    assert largest_difference(found, ready.learner.matrices) > 1e-3
    assert largest_difference(plain.learner.matrices, ready.learner.matrices) == 0
    assert plain.learner.result() is plain.learner.learned


def test_files_hold_the_average_and_states_both(ground: Path, tmp_path: Path) -> None:
    """Over stops to the last byte; what is learned goes on from what was learned."""
    config = tiny_config(ground, **AVERAGED, lora_name="lora")
    whole = final(config, tmp_path / "whole", 3)
    assert final(config, tmp_path / "parts", 1, 3) == whole
    saved = load_file(tmp_path / "whole" / "state" / "step_3" / "adapter.safetensors")
    family = train_lora.FAMILIES["sd1"]
    raw = {train_lora.kohya_name(n, family): v for n, v in saved.items() if "average" not in n}
    cut = {n.removeprefix("average."): v for n, v in saved.items() if "average" in n}
    average = {train_lora.kohya_name(n, family): v for n, v in cut.items()}
    tensors = load_file(tmp_path / "whole" / train_lora.FINAL)
    written = {name: value for name, value in tensors.items() if ".lora_" in name}
    assert largest_difference(written, average) == 0
    assert largest_difference(written, raw) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_previews_show_the_average_and_leave_what_learns_alone(
    ground: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The networks get their own numbers back, where a recording looks for them."""
    monkeypatch.setattr(train_lora, "choose_precision", lambda *_: dtype)
    ready = prepare(tiny_config(ground, **AVERAGED))
    ready.make_updates(3)
    learner, parameters = ready.learner, ready.learner.parameters
    places = [p.data_ptr() for p in parameters.values()]
    before, expected = snapshot(parameters), learner.named(learner.result().to(dtype))
    learned = learner.learned.clone()
    with learner.showing():
        assert largest_difference(parameters, expected) == 0
        assert torch.equal(learner.learned, learned)
    assert largest_difference(parameters, before) == 0
    assert [p.data_ptr() for p in parameters.values()] == places


def test_a_preview_is_drawn_with_what_the_file_will_hold(ground: Path, tmp_path: Path) -> None:
    """The same picture as that of a run whose matrices are the average."""
    pictures = []
    for folder in ("average", "copied", "raw"):
        changes = {"learning_rate": 0.1, "output_path": str(tmp_path / folder)}
        ready = prepare(tiny_config(ground, **{**AVERAGED, **changes}))
        ready.make_updates(2)
        if folder == "copied":
            ready.learner.learned.copy_(ready.learner.result())
        if folder != "average":
            ready.learner.average = ready.learner.learned
        ready.preview()
        pictures.append(ready.sample_path(1).read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0] != pictures[2]


# --- LoRA+ ---


def test_lora_plus_is_two_groups_of_rates(ground: Path) -> None:
    """As AdamW would take them, made by hand, with the text encoders' rate beside."""
    rated = {"learning_rate": 0.01, "text_encoder_learning_rate": 0.002, "lora_plus_ratio": 8}
    options: dict[str, Any] = {"max_grad_norm": 0, "train_text_encoder": True, **rated}
    ready = prepare(tiny_config(ground, **options))
    held = {n: torch.nn.Parameter(m) for n, m in snapshot(ready.learner.matrices).items()}
    groups: list[dict[str, Any]] = []
    for part, rate in (("unet.", 0.01), ("text_encoder.", 0.002)):
        for side, factor in (("lora_A", 1), ("lora_B", 8)):
            members = [held[n] for n in held if n.startswith(part) and side in n]
            groups.append({"params": members, "lr": rate * factor})
    assert sum(len(group["params"]) for group in groups) == len(held)
    reference = torch.optim.AdamW(groups, weight_decay=0.01, foreach=False)
    for step in range(3):
        for name, value in draw_gradients(ready, step).items():
            held[name].grad = value
        reference.step()
        ready.learner.step(1.0)
    assert largest_difference(ready.learner.matrices, dict(held)) < 1e-6
    assert [group["full_lr"] for group in ready.learner.optimizer.param_groups] == [
        group["lr"] for group in groups
    ]
    assert all(len(g["params"]) == 1 for g in ready.learner.optimizer.param_groups)


@pytest.mark.slow
def test_a_run_with_lora_plus_in_two_parts_is_the_run_in_one(ground: Path, tmp_path: Path) -> None:
    """Each group keeps its own."""
    config = tiny_config(ground, lora_plus_ratio=4, train_text_encoder=True, lora_name="lora")
    whole = final(config, tmp_path / "whole", 2)
    assert final(config, tmp_path / "parts", 1, 2) == whole


# --- what is refused, and what is remarked on ---

PRODIGY = {"optimizer": "prodigy", "learning_rate": 1}
FREE = {"optimizer": "schedulefree"}
IN_TEXT = {"train_text_encoder": True, "text_encoder_learning_rate": 0.02}
CONFLICTS: list[tuple[dict[str, Any], list[str]]] = [
    ({"optimizer": "prodigy"}, ["learning_rate"]),
    ({**PRODIGY, "learning_rate": 0.05}, ["learning_rate"]),
    ({**PRODIGY, "lora_plus_ratio": 2}, ["lora_plus_ratio"] * 2),
    ({**PRODIGY, "text_encoder_learning_rate": 0.5}, ["text_encoder_learning_rate"]),
    ({"learning_rate": 0.02, "lora_plus_ratio": 16}, ["lora_plus_ratio"]),
    ({**IN_TEXT, "lora_plus_ratio": 16}, ["lora_plus_ratio"]),
    ({**IN_TEXT, "learning_rate": 0.02, "lora_plus_ratio": 16}, ["lora_plus_ratio"] * 2),
    ({**FREE, "lr_scheduler": "cosine", "ema_decay": 0.9}, ["lr_scheduler", "ema_decay"]),
    ({"optimizer": "adafactor", "betas": [0.9, 0.99]}, ["betas"]),
    ({"optimizer_arguments": {"d_coef": 2.0}}, ["optimizer_arguments.d_coef"]),
    ({"optimizer": "lion", "optimizer_arguments": {"eps": 1e-6}}, ["optimizer_arguments.eps"]),
]


@pytest.mark.parametrize(("changes", "paths"), CONFLICTS)
def test_what_an_optimizer_does_not_go_with_is_refused_before_anything_is_loaded(
    changes: dict[str, Any], paths: list[str], in_workspace: Path
) -> None:
    """With path, expectation, finding and remedy; its package need not even be there."""
    with pytest.raises(TrainError) as refused:
        load_config(**changes)
    assert refused.value.code is ErrorCode.CONFIG_CONFLICT
    problems = refused.value.problems
    assert [problem.path for problem in problems] == paths
    assert all(
        changes.get("optimizer", "adamw") in p.expected or "product" in p.expected for p in problems
    )
    assert all(problem.hint for problem in problems)


@pytest.mark.parametrize(
    ("arguments", "path", "expected", "hint"),
    [
        ({"d_coeff": 2}, "d_coeff", "one of beta1, ", "Did you mean d_coef?"),
        ({"betas": 2}, "betas", "one of beta1, ", "It belongs at the top level."),
        ({"d_coef": 0}, "d_coef", "a number above 0", "0.5 to 2 is usual; more learns faster."),
        ({"d_coef": "2"}, "d_coef", "a number above 0", "Remove the quotes."),
        ({"decouple": 1}, "decouple", "true or false", "true is usual."),
    ],
)
def test_an_argument_that_no_optimizer_takes_is_refused_by_the_schema(
    arguments: dict[str, Any], path: str, expected: str, hint: str, in_workspace: Path
) -> None:
    """The known ones are named."""
    with pytest.raises(TrainError) as refused:
        load_config(**PRODIGY, optimizer_arguments=arguments)
    assert refused.value.code is ErrorCode.CONFIG_INVALID
    (problem,) = refused.value.problems
    assert problem.path == f"optimizer_arguments.{path}"
    assert problem.expected.startswith(expected)
    assert problem.hint == hint


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({"optimizer": "lion"}, ["learning_rate_high"]),
        ({"optimizer": "lion", "learning_rate": 2e-5}, []),
        ({"optimizer": "lion", "learning_rate": 3e-6}, []),
        (PRODIGY, []),
        ({"optimizer": "schedulefree"}, []),
        ({"lr_scheduler": "step", "lr_cycles": 4, "lr_gamma": 0.5, "min_lr_ratio": 0.1}, []),
        ({"lr_scheduler": "polynomial", "lr_power": 2, "min_lr_ratio": 0.1}, []),
        ({"lr_scheduler": "polynomial", "lr_cycles": 4}, ["knob_without_effect"]),
        ({"lr_cycles": 4, "lr_gamma": 0.5, "lr_power": 2}, ["knob_without_effect"] * 3),
        ({"min_lr_ratio": 0.1}, ["knob_without_effect"]),
    ],
)
def test_what_is_seldom_meant_with_an_optimizer_is_remarked_on(
    changes: dict[str, Any], codes: list[str], in_workspace: Path
) -> None:
    """A rate that suits another one, and what a schedule has no use for."""
    assert [remark.code.word for remark in load_config(**changes).remarks] == codes
    assert WarningCode.LEARNING_RATE_HIGH.hint


def test_every_argument_of_the_schema_is_one_that_its_optimizer_has(in_workspace: Path) -> None:
    """And it is made with the values that the schema allows at both ends."""
    known = train_lora.knobs()["optimizer_arguments"]["properties"]
    assert {name for rule in known.values() for name in rule["x-of"]} <= set(train_lora.OPTIMIZERS)
    for name in ("adamw", "adafactor", *OPTIONAL):
        kind = train_lora.OPTIMIZERS[name]
        made = getattr(importlib.import_module(kind.module), kind.name)
        taken = [argument for argument, rule in known.items() if name in rule["x-of"]]
        for end in ("minimum", "maximum"):
            given = {each: extreme(known[each], end) for each in taken}
            made([torch.zeros(2, 2, requires_grad=True)], **{**kind.preset, **given})


OPTIONAL = [
    name
    for name in ("prodigy", "schedulefree")
    if importlib.util.find_spec(train_lora.OPTIMIZERS[name].module)
]


def extreme(rule: dict[str, Any], end: str) -> Any:
    """Take a value at an end of a range."""
    if rule["type"] == "boolean":
        return end == "maximum"
    return rule.get(end, rule.get("exclusiveMinimum", 0) + 1e-9)


# --- what is told and planned ---


def test_a_header_says_how_it_was_learned_in_kohyas_words(ground: Path) -> None:
    """Of the default it says nothing."""
    base = train_lora.inspect_model(tiny_config(ground))[1]
    assert base
    changes: dict[str, Any] = {"optimizer": "lion", "betas": [0.9, 0.99], "lr_scheduler": "rex"}
    header = train_lora.lora_header(tiny_config(ground, **changes), base, 1, 6)
    assert header["ss_optimizer"] == "lion_pytorch.Lion(weight_decay=0.01,betas=(0.9, 0.99))"
    assert header["ss_lr_scheduler"] == "rex"
    plain = train_lora.lora_header(tiny_config(ground), base, 1, 6)
    assert not {"ss_optimizer", "ss_lr_scheduler"} & plain.keys()


@pytest.mark.parametrize(
    ("changes", "bytes_each"),
    [({}, 16), ({"optimizer": "lion"}, 12), (PRODIGY, 24), ({"ema_decay": 0.9}, 20)],
)
def test_what_an_optimizer_keeps_is_planned(
    changes: dict[str, Any], bytes_each: int, ground: Path
) -> None:
    """In memory with what is learned and its gradient; on the disk without the gradient."""
    config = tiny_config(ground, **changes)
    base = train_lora.inspect_model(config)[1]
    assert base
    device = train_lora.inspect_device("cpu")
    numbers = train_lora.adapter_numbers(config, base)
    plan = train_lora.MemoryPlan.make(config, base, 6, device)
    assert plan.parts["adapter"] == bytes_each * numbers
    disk = [train_lora.disk_needed(replace(config, keep_checkpoints=n), base, 1) for n in (1, 2)]
    assert disk[1] - disk[0] == (bytes_each - 4) * numbers


@pytest.mark.parametrize("optimizer", ["adafactor", "prodigy", "schedulefree"])
def test_what_is_learned_in_half_is_kept_in_full(
    optimizer: str, ground: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients reach the optimizer, whichever pieces it takes."""
    monkeypatch.setattr(train_lora, "choose_precision", lambda *_: torch.bfloat16)
    ready = prepare(run_of(ground, optimizer))
    before = ready.learner.learned.clone()
    ready.make_updates(2)
    assert ready.learner.learned.dtype == torch.float32
    assert not torch.equal(ready.learner.learned, before)
    assert torch.equal(ready.learner.used, ready.learner.learned.bfloat16())
