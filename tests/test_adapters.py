"""Kinds of adapters: what each adds to which layers, as programs apply its file."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Recorder, write_safetensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_files import comfy_keys, load_pipeline
from tiny_models import FAMILIES, write_single_file
from tiny_runs import Ready, prepare, start_until, tiny_base, tiny_config

import train_lora
from train_lora import ADAPTERS, TrainError, taken_apart

Tensors = dict[str, torch.Tensor]
KINDS = tuple(ADAPTERS)

# --- what programs make of a file, from their published rules ---


def low_rank(given: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """Multiply a pair, whose kernel may stand apart."""
    down, up = given["lora_down.weight"], given["lora_up.weight"]
    flat = up.flatten(1) @ down.flatten(1)
    return flat.reshape(weight.shape) * (given["alpha"] / len(down))


def hadamard(given: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """Multiply two products number by number."""
    one, other = (given[f"hada_w{n}_a"] @ given[f"hada_w{n}_b"] for n in (1, 2))
    return (one * other).reshape(weight.shape) * (given["alpha"] / len(given["hada_w1_b"]))


def kronecker(given: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """Repeat a block; only where it is a product, the alpha counts."""
    one, other, scale = given["lokr_w1"], given.get("lokr_w2"), 1.0
    if other is None:
        other = given["lokr_w2_a"] @ given["lokr_w2_b"]
        scale = float(given["alpha"]) / len(given["lokr_w2_b"])
    if other.ndim == 4:
        one = one[:, :, None, None]
    whole: torch.Tensor = torch.kron(one, other).reshape(weight.shape) * scale
    return whole


def by_comfyui(given: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """Change a weight as ComfyUI, A1111 and Forge do."""
    given = {name: value.float() for name, value in given.items()}
    rules = {"lora_up.weight": low_rank, "hada_w1_a": hadamard, "lokr_w1": kronecker}
    (rule,) = (rule for mark, rule in rules.items() if mark in given)
    changed = weight + rule(given, weight)
    if (lengths := given.get("dora_scale")) is None:
        return changed
    # ComfyUI takes lengths for those of outputs where their first side is that of the weight's.
    assert lengths.shape[0] == 1 < len(weight)
    turned = changed.transpose(0, 1)
    norms = turned.reshape(len(turned), -1).norm(dim=1)
    norms = norms.reshape(len(turned), *[1] * (weight.ndim - 1)).transpose(0, 1)
    applied: torch.Tensor = changed * (lengths / norms)
    return applied


def apply_file(file: Path, base: Path, family: str, pipe: Any) -> set[str]:
    """Change a pipeline's weights by a file; name the networks it reached."""
    layers: dict[str, Tensors] = {}
    for key, value in load_file(file).items():
        module, _, kind = key.partition(".")
        layers.setdefault(module, {})[kind] = value
    known = comfy_keys(base, family)
    for module, given in layers.items():
        part, key = known[module]
        network = getattr(pipe, part)
        name = key.removesuffix(".weight")
        try:
            weight = network.get_submodule(name).weight
        except AttributeError:  # transformers 5 leaves a level out
            weight = network.get_submodule(name.removeprefix("text_model.")).weight
        weight.data = by_comfyui(given, weight.data)
    return {known[module][0] for module in layers}


@functools.cache
def learned(ground: Path, family: str, **changes: Any) -> Ready:
    """Prepare a run and give every number of its adapter a value."""
    ready = prepare(tiny_config(ground, family, **changes))
    wake(ready)
    return ready


def wake(ready: Ready) -> None:
    """Let nothing of an adapter be zero, as after a long training."""
    chance = torch.Generator().manual_seed(1)
    for matrix in ready.learner.matrices.values():
        matrix.copy_(0.2 * torch.randn(matrix.shape, generator=chance))
    ready.learner.refresh()


def saved(ready: Ready, out: Path, precision: str = "fp32") -> Path:
    """Write the adapter as a run does."""
    run = copy.copy(ready)
    run.config = replace(ready.config, output_path=out, save_precision=precision)
    run.write_files({"lora": out / "lora.safetensors"})
    return out / "lora.safetensors"


STRENGTHS: list[dict[str, Any]] = [
    {"lora_alpha": 1},
    {"lora_alpha": 4},
    {"lora_alpha": 8, "use_rslora": True},
]
CASES = [
    (family, kind, {"lora_targets": "all", "train_text_encoder": True, "lora_alpha": 8})
    for family in FAMILIES
    for kind in KINDS
]
CASES += [("sd1", kind, each) for kind in KINDS for each in STRENGTHS]
CASES += [("sd1", "lokr", {"lora_rank": 2, "lora_targets": "all", "lora_alpha": 3})]


@pytest.mark.parametrize(("family", "kind", "changes"), CASES)
def test_programs_apply_a_file_as_the_model_in_training_computes(
    family: str, kind: str, changes: dict[str, Any], ground: Path, tmp_path: Path
) -> None:
    """Linear layers and convolutions, text encoders, alpha over rank of 1/4, 1, 2 and by root."""
    ready = learned(ground, family, adapter=kind, **changes)
    base = tiny_base(family, ground / "bases")
    pipe = load_pipeline(base)
    plain = answer(ready, pipe)
    reached = apply_file(saved(ready, tmp_path), base, family, pipe)
    found, own = answer(ready, pipe), answer(ready)
    assert float((found - own).abs().max()) < 1e-5 * max(1, float(own.abs().max()))
    assert float((plain - own).abs().max()) > 1e-3
    assert ("text_encoder" in reached) == bool(changes.get("train_text_encoder"))


def answer(ready: Ready, pipe: Any = None) -> torch.Tensor:
    """Let the model in training, or a pipeline's networks, predict for a caption they read."""
    models = ready.models
    if pipe:
        parts = models.base.family.text_encoders if models.text_encoders else ()
        encoders = [getattr(pipe, part.folder) for part in parts]
        models = replace(models, denoiser=pipe.unet, text_encoders=encoders)
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for network in (models.denoiser, *models.text_encoders):
            network.eval()
        text = models.read_text(ready.cache.read([ready.cache.images[0].caption]))
        sizes = ready.cache.images[0].time_ids[None]
        return models.predict(latents, torch.tensor([500]), text, sizes)


# --- which layers, and how many numbers ---

KOHYA = {"attention-mlp": {"Transformer2DModel"}}
KOHYA["all"] = KOHYA["attention-mlp"] | {"ResnetBlock2D", "Downsample2D", "Upsample2D"}


@pytest.mark.parametrize("targets", KOHYA)
@pytest.mark.parametrize("family", FAMILIES)
def test_wider_targets_are_those_of_kohyas_programs(
    family: str, targets: str, ground: Path
) -> None:
    """Every linear layer and convolution inside the modules that they choose by their classes."""
    ready = learned(ground, family, lora_targets=targets, train_text_encoder=True)
    pipe = load_pipeline(tiny_base(family, ground / "bases"))
    wanted = set(layers_inside(pipe.unet, KOHYA[targets], "unet."))
    for part in ready.models.base.family.text_encoders:
        inner = layers_inside(getattr(pipe, part.folder), {"CLIPAttention", "CLIPMLP"}, "")
        layers = getattr(pipe, part.folder).config.num_hidden_layers - part.unread_layers
        wanted |= {f"{part.folder}.{name}" for name in inner if f"layers.{layers}" not in name}
    assert {".".join(taken_apart(name)[:2]) for name in ready.learner.matrices} == wanted


def layers_inside(network: Any, classes: set[str], prefix: str) -> list[str]:
    """Name the layers inside modules of some classes."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    outer = [n for n, m in network.named_modules() if type(m).__name__ in classes]
    inner = [n for n, m in network.named_modules() if isinstance(m, kinds)]
    return [prefix + name for name in inner if name.startswith(tuple(f"{o}." for o in outer))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_preflight_knows_every_number_that_will_learn(
    family: str, kind: str, ground: Path, tmp_path: Path
) -> None:
    """By name and shape, also from a single file under its original names."""
    changes = {"adapter": kind, "lora_targets": "all", "train_text_encoder": True}
    ready = learned(ground, family, **changes, lora_alpha=8)
    base = ready.models.base
    matrices = ready.learner.matrices
    weights = {
        f"{folder.removesuffix('.text_model')}.{name.removeprefix('text_model.')}": shape
        for layer, shape in train_lora.adapted_layers(ready.config, base).items()
        for folder, _, name in [layer.partition(".")]
    }
    found = {
        (layer, name): shape
        for layer, weight in weights.items()
        for name, shape in ADAPTERS[kind].shapes(ready.config.lora_rank, weight).items()
    }
    own = {}
    for name, matrix in matrices.items():
        folder, module, side = taken_apart(name)
        own[f"{folder}.{module.removeprefix('text_model.')}", side] = tuple(matrix.shape)
    assert found == own
    single = write_single_file(Path(ready.config.base_model), tmp_path / "one.safetensors", family)
    options = {"base_model": str(single), "model_config_path": ready.config.base_model, **changes}
    _, other = train_lora.inspect_model(tiny_config(ground, family, **options))
    assert other
    assert train_lora.adapted_layers(ready.config, other) == weights


def test_patterns_choose_among_all_layers(ground: Path) -> None:
    """By parts of names, with * for anything between."""
    patterns = ["attn2.to_k", "up_blocks.*.conv1", "q_proj"]
    ready = prepare(tiny_config(ground, lora_targets=patterns, train_text_encoder=True))
    names = {".".join(taken_apart(name)[:2]) for name in ready.learner.matrices}
    assert all(n.endswith(("attn2.to_k", ".conv1", ".q_proj")) for n in names)
    assert {n.partition(".")[0] for n in names if n.endswith("conv1")} == {"unet"}
    assert all("up_blocks" in n for n in names if n.endswith("conv1"))
    assert len(names) == len([n for n in names if "attn2" in n]) + 6 + 2


# --- DoRA ---


def test_dora_descends_as_its_definition_does(ground: Path) -> None:
    """The gradient equals that of the whole weight written out, whose norms count as given."""
    ready = learned(ground, "sd1", adapter="dora", lora_targets="all", lora_alpha=8)
    layers = dict(ready.models.denoiser.named_modules())
    for name in ("down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.proj_in"):
        layer = layers[name]
        base, pair = layer.get_base_layer(), (layer.lora_A["default"], layer.lora_B["default"])
        learns = [*(each.weight for each in pair), layer.lora_magnitude]
        x = torch.randn((2, base.weight.shape[1], 4, 4), generator=torch.Generator().manual_seed(1))
        own = torch.autograd.grad(layer(x).square().sum(), learns)
        flat = pair[1].weight.flatten(1) @ pair[0].weight.flatten(1)
        whole = base.weight + 2 * flat.view_as(base.weight)
        norms = whole.detach().square().sum((0, 2, 3), keepdim=True).sqrt()
        first = base.weight.square().sum((0, 2, 3), keepdim=True).sqrt()
        turned = whole * (first * (1 + learns[2]) / norms)
        expected = base._conv_forward(x, turned, base.bias).square().sum()
        for found, wanted in zip(own, torch.autograd.grad(expected, learns), strict=True):
            assert float((found - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_begins_with_the_base_model(
    kind: str, dtype: torch.dtype, ground: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, in half precision too; then every number of it can learn."""
    monkeypatch.setattr(train_lora, "choose_precision", lambda *_: dtype)
    ready = prepare(tiny_config(ground, adapter=kind, lora_targets="all", learning_rate=0.01))
    pipe = load_pipeline(tiny_base("sd1", ground / "bases"))
    pipe.unet.to(dtype)
    assert torch.equal(answer(ready), answer(ready, pipe))
    before = {name: matrix.clone() for name, matrix in ready.learner.matrices.items()}
    ready.make_updates(3)
    assert all((matrix != before[name]).any() for name, matrix in ready.learner.matrices.items())


# --- beginning with a file ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_begins_with_what_a_file_does(
    kind: str, family: str, ground: Path, tmp_path: Path
) -> None:
    """At another alpha and a higher rank; what the rank adds learns from nothing."""
    shape = {"adapter": kind, "lora_targets": "all", "train_text_encoder": True}
    first = learned(ground, family, **shape, lora_alpha=8)
    file = saved(first, tmp_path)
    rank = 4 if kind == "lokr" else 6
    more = {"lora_alpha": 3, "lora_rank": rank, "use_rslora": True, "init_lora": str(file)}
    ready = begun(ground, family, **shape, **more)
    assert float((answer(ready) - answer(first)).abs().max()) < 2e-5
    ready.make_updates(2)
    assert float((answer(ready) - answer(first)).abs().max()) > 1e-3


def begun(ground: Path, family: str, **changes: Any) -> Ready:
    """Prepare a run up to where it begins with a file."""
    ready = prepare(tiny_config(ground, family, learning_rate=0.05, **changes))
    ready.restore()
    return ready


def test_dora_goes_on_from_a_lora(ground: Path, tmp_path: Path) -> None:
    """The lengths are those that the pair makes, so that nothing changes at first."""
    first = learned(ground, "sd1", lora_targets="all", lora_alpha=8)
    shape = {"lora_targets": "all", "adapter": "dora", "init_lora": str(saved(first, tmp_path))}
    ready = begun(ground, "sd1", **shape)
    assert float((answer(ready) - answer(first)).abs().max()) < 1e-5


def renamed(file: Path, naming: str, alpha: float, out: Path) -> Path:
    """Write a LoRA as diffusers' and PEFT's programs do, which tell the alpha in words."""
    tensors: Tensors = {}
    words: dict[str, Any] = {}
    for layer, keys in train_lora.lora_layers(load_file(file)).items():
        folder, _, flat = layer.partition(".")
        module = MODULES[flat]
        down, up = (load_file(file)[keys[side]] for side in ("lora_A", "lora_B"))
        if naming == "peft":
            name = f"base_model.model.{module}"
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
            words = {"r": len(down), "lora_alpha": alpha}
        elif naming == "old":
            name = f"{folder}.{module}".replace(".to_", ".processor.to_").replace(
                "to_out.0", "to_out"
            )
            tensors |= {f"{name}_lora.down.weight": down, f"{name}_lora.up.weight": up * alpha / 4}
        else:
            name = f"{folder}.{module}"
            tensors |= {f"{name}.lora.down.weight": down, f"{name}.lora.up.weight": up}
            words = {"unet.r": len(down), "unet.lora_alpha": alpha}
    save_file(tensors, out, {"lora_adapter_metadata": json.dumps(words)})
    return out


MODULES: dict[str, str] = {}


@pytest.mark.parametrize("naming", ["diffusers", "old", "peft"])
def test_a_file_of_any_naming_is_begun_with_at_its_strength(
    naming: str, ground: Path, tmp_path: Path
) -> None:
    """Whether its alpha stands in tensors, in words or nowhere."""
    first = learned(ground, "sd1", lora_alpha=8)
    for name in first.learner.matrices:
        module = taken_apart(name)[1]
        MODULES[module.replace(".", "_")] = module
    file = renamed(saved(first, tmp_path), naming, 8.0, tmp_path / "other.safetensors")
    ready = begun(ground, "sd1", init_lora=str(file))
    assert float((answer(ready) - answer(first)).abs().max()) < 1e-5
    layer = "text_encoder.encoder_layers_0_self_attn_q_proj"
    bare = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert train_lora.lora_layers([bare]) == {layer: {"lora_A": bare}}


# --- stops ---


def train_in(out: Path, ground: Path, *ends: int, **changes: Any) -> bytes:
    """Train to one step after another, with a start for each."""
    for steps in ends:
        options = {"learning_rate": 0.01, "output_path": str(out), "steps": steps, **changes}
        done = train_lora.LoRATrainer(tiny_config(ground, **options)).train()
    return Path(done.final_path).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_two_parts_is_the_run_in_one_with_every_adapter(
    kind: str, ground: Path, tmp_path: Path
) -> None:
    """To the last byte; also where it began with a file, which counts at the start alone."""
    shape: dict[str, Any] = {"adapter": kind, "lora_targets": ["attn2", "conv1"]}
    shape["init_lora"] = str(saved(prepare(tiny_config(ground, **shape)), tmp_path))
    shape |= {"lora_dropout": 0.1} if not ADAPTERS[kind].folded else {"ema_decay": 0.9}
    whole = train_in(tmp_path / "whole", ground, 2, **shape)
    assert train_in(tmp_path / "parts", ground, 1, 2, **shape) == whole


def test_what_was_before_is_what_the_run_began_with(ground: Path, tmp_path: Path) -> None:
    """Not the base, also after a stop; how far answers moved is still told from the base."""
    file = saved(learned(ground, "sd1", lora_alpha=8), tmp_path)
    asked: dict[str, Any] = {"init_lora": str(file), "validation_split": 1, "steps": 2}
    config = tiny_config(ground, **asked, output_path=str(tmp_path / "out"), learning_rate=1e-6)
    start_until(config, 1)
    done = train_lora.LoRATrainer(config).train()
    lines = (tmp_path / "out" / "events.jsonl").read_text(encoding="ascii").splitlines()
    told = [event for event in map(json.loads, lines) if event["type"] == "validation"]
    assert told[0]["step"] == 0
    assert done.loss_before == pytest.approx(told[0]["loss"], rel=1e-5)
    assert done.loss_after == pytest.approx(done.loss_before, rel=1e-2)
    assert done.moved is not None
    assert done.moved > 0.01


def test_a_run_is_told_by_the_numbers_it_began_with(ground: Path, tmp_path: Path) -> None:
    """Not by the place of the file, nor by what it says of itself."""
    first = learned(ground, "sd1", lora_alpha=8)
    file, moved = saved(first, tmp_path), tmp_path / "moved.safetensors"
    save_file(load_file(file), moved, {"ss_output_name": "other"})
    train_in(tmp_path / "out", ground, 1, init_lora=str(file))
    train_in(tmp_path / "out", ground, 2, init_lora=str(moved))
    tensors = load_file(file)
    tensors[max(tensors)] *= 2
    save_file(tensors, moved)
    for other in (str(moved), None):
        with pytest.raises(TrainError) as refused:
            train_in(tmp_path / "out", ground, 3, init_lora=other)
        assert [problem.path for problem in refused.value.problems] == ["init_lora"]


# --- what is refused, and what is told ---


def preflight(ground: Path, family: str = "sd1", **changes: Any) -> Recorder:
    """Check a config as --validate-only does."""
    recorder, config = Recorder(), tiny_config(ground, family, **changes)
    train_lora.LoRATrainer(config, train_lora.Emitter(recorder)).validate()
    return recorder


def refusal(ground: Path, family: str = "sd1", **changes: Any) -> list[tuple[str, str]]:
    """Let preflight refuse a config; tell where and what to do."""
    with pytest.raises(TrainError) as refused:
        preflight(ground, family, **changes)
    return [(problem.path, problem.hint) for problem in refused.value.problems]


@pytest.mark.parametrize(
    ("changes", "path", "hint"),
    [
        ({"adapter": "dora", "base_precision": "nf4"}, "adapter", "base_precision to auto"),
        ({"adapter": "loha", "base_precision": "int8"}, "adapter", "base_precision to auto"),
        ({"adapter": "lokr", "lora_dropout": 0.1}, "lora_dropout", "pairs"),
        ({"adapter": "loha", "lora_plus_ratio": 4}, "lora_plus_ratio", "pairs"),
        ({"lora_targets": "attentoin"}, "lora_targets", "attention-mlp"),
        ({"lora_targets": []}, "lora_targets", "attention-mlp"),
        ({"lora_targets": ["attn2", "attn3"]}, "lora_targets[1]", "attn2"),
        ({"lora_targets": ["q_proj"], "train_text_encoder": True}, "lora_targets", "attn2"),
        ({"lora_targets": ["attn2"], "train_text_encoder": True}, "lora_targets", "attn2"),
        ({"init_lora": "nowhere.safetensors"}, "init_lora", ""),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(
    changes: dict[str, Any], path: str, hint: str, ground: Path
) -> None:
    """Before anything is loaded."""
    ((where, remedy),) = refusal(ground, **changes)
    assert where == path
    assert hint in remedy


@pytest.mark.parametrize(
    ("file", "changes", "path", "hint"),
    [
        ({"lora_rank": 8}, {}, "lora_rank", "Set it to 8."),
        ({"lora_targets": "all"}, {}, "lora_targets", "to all"),
        ({"train_text_encoder": True}, {}, "train_text_encoder", "to true"),
        ({"adapter": "dora"}, {}, "adapter", "Set it to dora."),
        ({}, {"adapter": "loha"}, "adapter", "Set it to lora."),
        ({"adapter": "lokr", "lora_rank": 2}, {"adapter": "lokr"}, "init_lora", "base or rank"),
        ({"family": "sdxl"}, {}, "lora_targets", "to all"),
    ],
)
def test_a_file_that_the_adapter_has_no_place_for_is_refused(
    file: dict[str, Any],
    changes: dict[str, Any],
    path: str,
    hint: str,
    ground: Path,
    tmp_path: Path,
) -> None:
    """With the knob that would make one, where there is such a knob."""
    given = saved(learned(ground, **({"family": "sd1"} | file)), tmp_path)
    ((where, remedy),) = refusal(ground, init_lora=str(given), **changes)
    assert where == path
    assert hint in remedy


QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
STRANGE: list[dict[str, tuple[int, ...]]] = [
    {"model.layers.0.weight": (4, 4)},
    {"lora_unet_mid_block.lora_mid.weight": (4, 4, 3, 3)},
    {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight": ()},
    {"unet.a.lora_A.weight": (4, 4), "lora_unet_a.lora_down.weight": (4, 4)},
    {f"unet.{QUERY}.lora_A.weight": (4, 48), f"unet.{QUERY}.lora_B.weight": (32, 4)},
]


@pytest.mark.parametrize("shapes", STRANGE)
def test_what_is_no_lora_is_refused(
    shapes: dict[str, tuple[int, ...]], ground: Path, tmp_path: Path
) -> None:
    """Names of something else, half a layer, one under two names, other sizes: all have errors."""
    file = write_safetensors(tmp_path / "strange.safetensors", shapes)
    assert refusal(ground, init_lora=str(file))


def test_numbers_that_are_none_end_a_run_before_it_trains(ground: Path, tmp_path: Path) -> None:
    """Preflight reads no numbers; training does before the first update."""
    file = saved(learned(ground, "sd1", lora_alpha=8), tmp_path)
    tensors = load_file(file)
    tensors[max(tensors)].fill_(torch.nan)
    save_file(tensors, file)
    with pytest.raises(TrainError, match="finite"):
        begun(ground, "sd1", init_lora=str(file))


@pytest.mark.parametrize("kind", KINDS)
def test_preflight_tells_which_program_does_not_read_an_adapter(kind: str, ground: Path) -> None:
    """All read lora; diffusers does not read the others whole."""
    recorder = preflight(ground, adapter=kind)
    told = [w["message"] for w in recorder.of_type("warning") if w["code"] == "adapter_unread"]
    assert ["diffusers" in message for message in told] == [True] * (kind != "lora")


def test_every_value_has_what_implements_it() -> None:
    """No kind of adapter, and no word for targets, falls through."""
    knobs = train_lora.knobs()
    assert knobs["adapter"]["enum"] == list(ADAPTERS)
    words = "|".join(train_lora.LORA_TARGETS)
    assert knobs["lora_targets"]["pattern"].startswith(f"^({words})")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_says_what_it_is(kind: str, ground: Path, tmp_path: Path) -> None:
    """One alpha throughout, the same in the header; who knows the kind; lengths in full."""
    ready = learned(ground, "sd1", adapter=kind, lora_targets="all", lora_alpha=8)
    file = saved(ready, tmp_path, "fp16")
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    alphas = {float(value) for key, value in tensors.items() if key.endswith(".alpha")}
    assert alphas == {float(header["ss_network_alpha"])} == {4.0 if ADAPTERS[kind].folded else 8.0}
    arguments = json.loads(header.get("ss_network_args", "{}"))
    assert arguments.get("algo") == {"lora": None, "dora": "lora"}.get(kind, kind)
    full = {key.partition(".")[2] for key, v in tensors.items() if v.dtype == torch.float32}
    assert full == {"alpha"} | ({"dora_scale"} if kind == "dora" else set())
