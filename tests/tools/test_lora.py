"""tools/lora.py: any LoRA file is read at its true strength, and written so for any reader."""

from __future__ import annotations

import contextlib
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Recorder
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import models
import train_lora
from tools import lora
from tools.lora_file import (
    Layer,
    LoRA,
    Module,
    difference,
    diffusers_name,
    dotted,
    merge,
    named,
    read_lora,
    reduce_rank,
    shorten,
    write_lora,
)
from train_lora import Emitter, Phase, StopRequest, TrainError

NETWORKS = {"sd1": ("unet", "text_encoder"), "sdxl": ("unet", "text_encoder", "text_encoder_2")}
TEXT = [f"encoder.layers.{n}.self_attn.{side}_proj" for n in (0, 1) for side in ("q", "out")]


@pytest.fixture(scope="module")
def pipes(built: Path) -> dict[str, Any]:
    """Provide a pipeline of diffusers for each family; whoever loads a LoRA unloads it."""
    options = {"use_safetensors": True, "local_files_only": True}
    kinds = {"sd1": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
    return {name: kind.from_pretrained(built / name, **options) for name, kind in kinds.items()}


def modules_of(pipe: Any, network: str) -> dict[str, Any]:
    """List the layers of a network that a LoRA may change, by their names inside it."""
    found: Any = getattr(pipe, network).named_modules()
    layers = {n.removeprefix("text_model."): m for n, m in found if hasattr(m, "weight")}
    if network == "unet":
        kinds = (torch.nn.Linear, torch.nn.Conv2d)
        return {n: m for n, m in layers.items() if isinstance(m, kinds)}
    return {n: m for n, m in layers.items() if n in TEXT}


def make_lora(pipe: Any, family: str, *, alphas: str = "equal", only: str = "") -> LoRA:
    """Make one with numbers in every layer of its networks."""
    chance, layers = torch.Generator().manual_seed(1), {}
    for network in NETWORKS[family]:
        for number, (name, module) in enumerate(modules_of(pipe, network).items()):
            if only in name:
                weight = module.weight
                rank = 2 + 2 * (number % 2) if alphas == "mixed" else 4
                down = torch.randn((rank, *weight.shape[1:]), generator=chance) / 10
                up = torch.randn((len(weight), rank, *[1] * (weight.ndim - 2)), generator=chance)
                scale = 0.5 if alphas == "equal" or number % 3 else 2.0
                layers[Module(network, name)] = Layer(down, up, scale)
    return LoRA(dict(sorted(layers.items())), {"ss_output_name": "x", "sshs_model_hash": "0"})


def effect_in_diffusers(pipe: Any, path: Path, networks: tuple[str, ...]) -> dict[Module, Any]:
    """Tell by how much each weight moves when diffusers fuses a file."""
    before = {
        Module(network, name): module.weight.detach().clone()
        for network in networks
        for name, module in modules_of(pipe, network).items()
    }
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    pipe.fuse_lora(components=list(networks))
    pipe.unload_lora_weights()
    after = {
        Module(network, name): module.weight.detach().clone()
        for network in networks
        for name, module in modules_of(pipe, network).items()
    }
    for place, value in before.items():
        modules_of(pipe, place.network)[place.name].weight.data = value
    return {place: after[place] - value for place, value in before.items()}


# --- names ---


@pytest.mark.parametrize("size", ["sd15", "sdxl"])
def test_every_module_of_a_denoiser_is_found_again_under_kohyas_name(size: str) -> None:
    """At real size: the dots that underscores have swallowed, and SDXL's block numbers."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**models.DENOISERS[size])
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    names = [name for name, module in unet.named_modules() if isinstance(module, kinds)]
    for name in names:
        original = train_lora.original_name(name) if size == "sdxl" else name
        assert diffusers_name(dotted(original.replace(".", "_"))) == name
    assert len(names) > 250


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize("family", NETWORKS)
def test_what_is_written_is_read_as_it_was(
    family: str, naming: str, pipes: dict[str, Any], tmp_path: Path
) -> None:
    """All layers, at their strength, under either naming."""
    wanted = make_lora(pipes[family], family)
    assert write_lora(tmp_path / "x.safetensors", wanted, naming) < 1e-6
    found = read_lora(tmp_path / "x.safetensors")
    assert found.naming == naming
    assert difference(wanted, found) < 1e-6


@pytest.mark.parametrize("family", NETWORKS)
def test_there_and_back_gives_the_same_tensors(
    family: str, pipes: dict[str, Any], tmp_path: Path
) -> None:
    """From kohya's names to diffusers' and back, bit for bit where the strength is 1."""
    files = [tmp_path / f"{n}.safetensors" for n in range(3)]
    wanted = make_lora(pipes[family], family)
    plain = LoRA({m: Layer(la.down, la.up) for m, la in wanted.layers.items()}, {})
    write_lora(files[0], plain, "kohya")
    write_lora(files[1], read_lora(files[0]), "diffusers")
    write_lora(files[2], read_lora(files[1]), "kohya")
    first, last = load_file(files[0]), load_file(files[2])
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)


# --- strength ---


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize("alphas", ["equal", "unequal", "mixed"])
@pytest.mark.parametrize("family", NETWORKS)
def test_diffusers_applies_what_was_written_at_its_true_strength(
    family: str, alphas: str, naming: str, pipes: dict[str, Any], tmp_path: Path
) -> None:
    """Unequal alphas and ranks too, which it applies wrongly when they stand in the file."""
    wanted = make_lora(pipes[family], family, alphas=alphas)
    if (family, naming) == ("sdxl", "kohya"):  # diffusers finds nothing outside of blocks there
        kept = {
            m: la for m, la in wanted.layers.items() if m.network != "unet" or "_block" in m.name
        }
        wanted = LoRA(kept, {})
    write_lora(tmp_path / "x.safetensors", wanted, naming)
    moved = effect_in_diffusers(pipes[family], tmp_path / "x.safetensors", NETWORKS[family])
    for place, change in moved.items():
        layer = wanted.layers.get(place)
        expected = layer.delta().float() if layer else torch.zeros(1)
        assert torch.allclose(change, expected, atol=2e-5), place


def test_the_alphas_of_each_layer_are_read(pipes: dict[str, Any], tmp_path: Path) -> None:
    """A file as other programs write it, with an alpha of its own for some layers only."""
    wanted = make_lora(pipes["sd1"], "sd1", alphas="unequal")
    tensors = named(
        LoRA({m: Layer(la.down, la.up) for m, la in wanted.layers.items()}, {}), "kohya"
    )
    modules = [key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")]
    for module, layer in zip(modules, wanted.layers.values(), strict=True):
        tensors[f"{module}.alpha"] = torch.tensor(layer.scale * layer.rank)
    del tensors[f"{modules[0]}.alpha"]  # then it acts as it is
    save_file(tensors, tmp_path / "x.safetensors")
    found = read_lora(tmp_path / "x.safetensors")
    scales = [layer.scale for layer in found.layers.values()]
    assert scales == [1.0, *(layer.scale for layer in list(wanted.layers.values())[1:])]


def test_a_folder_of_pefts_is_read_with_its_alpha(pipes: dict[str, Any], tmp_path: Path) -> None:
    """The strength stands in a file beside the tensors."""
    from peft import LoraConfig, get_peft_model

    network = UNet2DConditionModel.from_config(pipes["sd1"].unet.config)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"], init_lora_weights=False)
    get_peft_model(network, config).save_pretrained(str(tmp_path))
    found = read_lora(tmp_path)
    assert found.networks == ["unet"]
    assert {(layer.rank, layer.scale) for layer in found.layers.values()} == {(4, 2.0)}
    assert all(module.name.endswith("to_q") for module in found.layers)


def test_a_header_with_pefts_settings_is_heeded(pipes: dict[str, Any], tmp_path: Path) -> None:
    """As pipelines of diffusers write it."""
    wanted = make_lora(pipes["sd1"], "sd1", only="to_q")
    plain = LoRA({m: Layer(la.down, la.up) for m, la in wanted.layers.items()}, {})
    told = json.dumps({"unet.lora_alpha": 8, "unet.r": 4})
    save_file(named(plain, "diffusers"), tmp_path / "x", {"lora_adapter_metadata": told})
    assert {layer.scale for layer in read_lora(tmp_path / "x").layers.values()} == {2.0}


# --- sums and ranks ---


@pytest.mark.parametrize("family", NETWORKS)
def test_a_merged_lora_acts_as_both_together(
    family: str, pipes: dict[str, Any], tmp_path: Path
) -> None:
    """At 0.7 and -0.4, with layers that only one of them has."""
    one = make_lora(pipes[family], family, alphas="unequal", only="to_")
    other = make_lora(pipes[family], family, only="attn1")
    write_lora(tmp_path / "x.safetensors", merge([(one, 0.7), (other, -0.4)]), "kohya")
    moved = effect_in_diffusers(pipes[family], tmp_path / "x.safetensors", NETWORKS[family])
    for place, change in moved.items():
        expected = torch.zeros_like(change, dtype=torch.float64)
        for lora_, strength in ((one, 0.7), (other, -0.4)):
            if place in lora_.layers:
                expected += strength * lora_.layers[place].delta()
        assert torch.allclose(change, expected.float(), atol=1e-5), place


@pytest.mark.parametrize("shape", [(12, 8), (12, 8, 3, 3)])
def test_a_smaller_rank_is_the_nearest_there_is(shape: tuple[int, ...]) -> None:
    """Held against a decomposition of the whole matrix (Eckart and Young)."""
    chance = torch.Generator().manual_seed(0)
    down = torch.randn((6, *shape[1:]), generator=chance)
    layer = Layer(down, torch.randn((12, 6, *[1] * (len(shape) - 2)), generator=chance), 0.3)
    sizes = torch.linalg.svdvals(layer.delta().flatten(1))
    for rank in (1, 3, 5, 6):
        reduced = shorten(layer, rank, None)
        assert reduced
        assert (reduced.rank, reduced.down.shape[1:]) == (rank, down.shape[1:])
        missing = (reduced.delta() - layer.delta()).norm()
        assert float(missing) == pytest.approx(float(sizes[rank:].norm()), abs=1e-5)


def test_energy_keeps_as_few_directions_as_hold_the_share() -> None:
    """On the border exactly, and none for a layer that adds nothing."""
    sizes = torch.tensor([3.0, 2.0, 1.0, 0.0])  # squares: 9, 4, 1 of 14
    layer = Layer(torch.eye(4), torch.diag(sizes))
    ranks = {}
    for share in (0.1, 9 / 14, 0.65, 13 / 14, 1.0):
        reduced = shorten(layer, None, share)
        ranks[share] = reduced.rank if reduced else 0
    assert list(ranks.values()) == [1, 1, 2, 2, 3]
    assert shorten(Layer(torch.eye(4), torch.zeros(4, 4)), None, 0.9) is None


def test_a_rank_that_is_large_enough_changes_nothing(pipes: dict[str, Any]) -> None:
    """Nor is anything computed."""
    wanted = make_lora(pipes["sd1"], "sd1")
    phase = Phase("reducing ranks", 1, Emitter(), StopRequest())
    assert reduce_rank(wanted, 4, None, phase).layers == wanted.layers


# --- refusals ---


def pair(name: str = "lora_unet_mid_block_attentions_0_proj_in") -> dict[str, torch.Tensor]:
    """Make one small layer as in a file."""
    return {
        f"{name}.lora_down.weight": torch.ones(2, 3),
        f"{name}.lora_up.weight": torch.ones(4, 2),
    }


WRONG = {
    "half of one": {"lora_unet_conv_in.lora_up.weight": torch.ones(4, 2)},
    "LoHa": {"lora_unet_conv_in.hada_w1_a": torch.ones(4, 2)},
    "LoKr": {"lora_unet_conv_in.lokr_w1": torch.ones(4, 2)},
    "full weights": {"lora_unet_conv_in.diff": torch.ones(4, 2)},
    "DoRA": pair("lora_unet_conv_in") | {"lora_unet_conv_in.dora_scale": torch.ones(4)},
    "matrices that fit": {
        "lora_unet_conv_in.lora_down.weight": torch.ones(2, 3),
        "lora_unet_conv_in.lora_up.weight": torch.ones(4, 3),
    },
    "finite": {k: v * float("nan") for k, v in pair().items()},
    "under two names": pair("lora_unet_conv_in") | pair("lora_unet_input_blocks_0_0"),
    "belongs to no LoRA": {"model.weight": torch.ones(1)},
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_no_plain_lora_is_refused_by_name(words: str, tmp_path: Path) -> None:
    """Nothing is half understood."""
    save_file(WRONG[words], tmp_path / "x.safetensors")
    with pytest.raises(TrainError, match=words):
        read_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["x.pt", "x.ckpt", "gone.safetensors", "cut.safetensors"])
def test_what_cannot_be_read_safely_is_refused(name: str, tmp_path: Path) -> None:
    """A pickle runs code; a damaged file is told apart from one that is no LoRA."""
    save_file(pair(), tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    if not name.startswith("gone"):
        (tmp_path / name).write_bytes(content[:-3])
    with pytest.raises(TrainError) as caught:
        read_lora(tmp_path / name)
    assert caught.value.problems[0].path == str(tmp_path / name)


def test_loras_of_two_families_are_not_merged(pipes: dict[str, Any]) -> None:
    """They have no module in common."""
    loras = [(make_lora(pipes[family], family), 1.0) for family in NETWORKS]
    with pytest.raises(TrainError, match="one family"):
        merge(loras)


def test_damaged_files_are_refused_and_never_crash(tmp_path: Path) -> None:
    """Five hundred of them, cut short or with bits turned: a sentence each, or still a LoRA."""
    layers = {
        Module("unet", f"conv_in.{n}"): Layer(torch.ones(2, 3), torch.ones(4, 2)) for n in "ab"
    }
    write_lora(tmp_path / "whole.safetensors", LoRA(layers, {"ss_steps": "7"}), "kohya")
    content, chance = (tmp_path / "whole.safetensors").read_bytes(), random.Random(0)
    refused = 0
    for number in range(500):
        damaged = bytearray(content)
        if number % 3 == 0:
            damaged = damaged[: chance.randrange(len(damaged))]
        for _ in range(chance.randrange(1, 4) if damaged else 0):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        (tmp_path / "x.safetensors").write_bytes(bytes(damaged))
        found = None
        with contextlib.suppress(TrainError):  # anything else would end the test
            found = read_lora(tmp_path / "x.safetensors")
        refused += found is None
    assert refused > 250
    assert {path.name for path in tmp_path.iterdir()} == {"whole.safetensors", "x.safetensors"}


def applied_by_comfyui(tensors: dict[str, torch.Tensor], key: str) -> torch.Tensor | None:
    """Add up what ComfyUI adds to a weight, by its rule for a name in the file.

    Of its weight_adapter/lora.py: alpha by rank, or 1 without; up times down, as the weight is.
    """
    up, down = (tensors.get(f"{key}.lora_{side}.weight") for side in ("up", "down"))
    if up is None or down is None:
        return None
    alpha = tensors.get(f"{key}.alpha")
    scale = 1.0 if alpha is None else float(alpha) / len(down)
    delta = torch.mm(up.flatten(start_dim=1).float(), down.flatten(start_dim=1).float())
    return scale * delta.reshape(len(up), *down.shape[1:])


@pytest.mark.parametrize("alphas", ["equal", "unequal", "mixed"])
def test_comfyui_applies_what_was_written_at_its_true_strength(
    alphas: str, pipes: dict[str, Any], tmp_path: Path
) -> None:
    """Every layer is found under a name that ComfyUI makes of the model's own."""
    wanted = make_lora(pipes["sd1"], "sd1", alphas=alphas)
    write_lora(tmp_path / "x.safetensors", wanted, "kohya")
    tensors = load_file(tmp_path / "x.safetensors")
    starts = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
    for module, layer in wanted.layers.items():
        found = applied_by_comfyui(tensors, starts[module.network] + module.name.replace(".", "_"))
        assert found is not None, module
        assert torch.allclose(found, layer.delta().float(), atol=1e-5), module
    assert len(tensors) == 3 * len(wanted.layers)


def test_sdxl_is_known_by_its_header_where_no_layer_tells(
    pipes: dict[str, Any], tmp_path: Path
) -> None:
    """Such as one that changes self-attention alone; A1111 and kohya's programs then find it."""
    wanted = make_lora(pipes["sdxl"], "sdxl", only="attn1.to_q")
    told = {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    layers = {m: la for m, la in wanted.layers.items() if m.network == "unet"}
    write_lora(tmp_path / "x.safetensors", LoRA(layers, told), "kohya")
    keys = load_file(tmp_path / "x.safetensors")
    assert all(re.match(r"lora_unet_(input|output|middle)_block", key) for key in keys)
    assert read_lora(tmp_path / "x.safetensors").layers.keys() == layers.keys()


def test_a_tucker_kernel_is_read_as_the_layer_it_is(tmp_path: Path) -> None:
    """Three convolutions one after the other, as kohya's and LyCORIS' programs write them."""
    chance = torch.Generator().manual_seed(0)
    shapes = {"lora_down": (3, 5, 1, 1), "lora_mid": (3, 3, 3, 3), "lora_up": (6, 3, 1, 1)}
    parts = {side: torch.randn(shape, generator=chance) for side, shape in shapes.items()}
    tensors = {f"lora_unet_conv_in.{side}.weight": part for side, part in parts.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    (layer,) = read_lora(tmp_path / "x.safetensors").layers.values()
    picture, compute = torch.randn((1, 5, 7, 7), generator=chance), torch.nn.functional.conv2d
    wanted = picture
    for side in shapes:
        wanted = compute(wanted, parts[side])
    found = compute(picture, layer.delta().float())
    assert torch.allclose(found, wanted, atol=1e-4)


# --- the program ---


def test_a_person_sees_a_table_and_a_host_sees_events(
    pipes: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The last line names the file, and a name that is taken is refused."""
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_lora(source, make_lora(pipes["sd1"], "sd1"), "kohya")
    assert lora.main(["info", str(source)]) == 0
    shown = capfd.readouterr().out
    assert "unet" in shown
    assert lora.main(["convert", str(source), str(out), "--to", "diffusers", "--events"]) == 0
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (last["type"], last["files"]) == ("complete", [str(out)])
    assert lora.main(["convert", str(source), str(out)]) == 1
    assert "--overwrite" in capfd.readouterr().err


@pytest.mark.parametrize("out", ["same", "other", "other.pt"])
def test_what_fails_leaves_the_file_that_stood_there(
    out: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Numbers that are too small for the precision, or a name that no LoRA is read under."""
    content = {n: Layer(torch.full((2, 3), 1e-7), torch.full((4, 2), 1e-7)) for n in "ab"}
    layers = {Module("unet", f"conv_in.{n}"): layer for n, layer in content.items()}
    write_lora(tmp_path / "same", LoRA(layers, {}), "kohya")
    for name in ("other", "other.pt"):
        (tmp_path / name).write_bytes(b"precious")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    asked = ["convert", str(tmp_path / "same"), str(tmp_path / out), "--overwrite"]
    assert lora.main([*asked, "--dtype", "fp32" if out.endswith("pt") else "fp16"]) == 1
    assert f"{tmp_path / out}: expected" in capfd.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_can_be_replaced_by_what_becomes_of_it(tmp_path: Path) -> None:
    """In another precision, under the same name."""
    layer, file = Layer(torch.ones(2, 3), torch.ones(4, 2)), tmp_path / "x.safetensors"
    write_lora(file, LoRA({Module("unet", "conv_in"): layer}, {}), "kohya")
    assert lora.main(["convert", str(file), str(file), "--dtype", "bf16", "--overwrite"]) == 0
    assert read_lora(file).dtype == torch.bfloat16
    assert list(tmp_path.iterdir()) == [file]


def test_the_header_goes_along_without_what_is_no_longer_true(
    pipes: dict[str, Any], tmp_path: Path
) -> None:
    """Five times the same bytes; no hash of other tensors, no folder that names a person."""
    wanted = make_lora(pipes["sd1"], "sd1", alphas="mixed")
    told = {"ss_dataset_dirs": '{"/home/me": 1}', "ss_base_model_version": "sd_v1"}
    contents = set()
    for _ in range(5):
        write_lora(tmp_path / "x", LoRA(wanted.layers, wanted.header | told), "kohya")
        contents.add((tmp_path / "x").read_bytes())
    header = read_lora(tmp_path / "x").header
    assert len(contents) == 1
    assert "/home/me" not in str(header)
    assert header["sshs_model_hash"] != "0"
    assert (header["ss_base_model_version"], header["ss_network_dim"]) == ("sd_v1", "Dynamic")


def test_the_ranks_of_a_large_file_are_told_and_can_be_stopped(pipes: dict[str, Any]) -> None:
    """Between two modules, a stop is heard."""
    stop, recorder = StopRequest(), Recorder()
    stop.request("SIGTERM")
    phase = Phase("reducing ranks", 1, Emitter(recorder), stop)
    with pytest.raises(train_lora.TrainingInterrupted):
        reduce_rank(make_lora(pipes["sd1"], "sd1"), 2, None, phase)
