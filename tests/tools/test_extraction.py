"""tools/lora.py extract: what turns one model into another, held against what was put into it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import write_single_file

from tools import generate, lora
from tools.extraction import Wanted, change, directions, extract, largest
from tools.lora_file import Layer, LoRA, Module, read_lora, write_lora
from train_lora import Emitter, StopRequest

FAMILIES = ("sd1", "sd2", "sdxl")
UNET, TEXT = "unet/diffusion_pytorch_model", "text_encoder/model"


def wanted_lora(base: Path) -> LoRA:
    """Make one that changes attention and convolutions of all networks of a folder."""
    chance, layers = torch.Generator().manual_seed(3), {}
    for network in ("unet", "text_encoder", "text_encoder_2"):
        for file in (base / network).glob("*.safetensors"):
            for key, weight in sorted(load_file(file).items()):
                name = key.removeprefix("text_model.").removesuffix(".weight")
                # Without out_proj, diffusers 0.42 takes a text encoder's LoRA for one without q.
                if name.endswith(("to_q", "attn2.to_v", "q_proj", "out_proj", "fc1", "conv1")):
                    down = torch.randn((3, *weight.shape[1:]), generator=chance) / 4
                    up = torch.randn((len(weight), 3, *[1] * (weight.ndim - 2)), generator=chance)
                    layers[Module(network, name)] = Layer(down, up / 4, 0.5)
    return LoRA(dict(sorted(layers.items())), {})


@pytest.fixture(scope="module", params=FAMILIES)
def fused(
    request: pytest.FixtureRequest, built: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, LoRA]:
    """Provide a base, the same with a LoRA fused into it at 0.7, and that LoRA."""
    base, folder = built / request.param, tmp_path_factory.mktemp("fused")
    wanted = wanted_lora(base)
    write_lora(folder / "x.safetensors", wanted, "kohya")
    arguments = ["--base", base, "--lora", folder / "x.safetensors", "--strengths", "0.7"]
    options = ["--fuse", folder / "tuned", "--device", "cpu"]
    assert generate.main([str(each) for each in (*arguments, *options)]) == 0
    return base, folder / "tuned", wanted


def run(base: Path, tuned: Path, out: Path, *options: str, code: int = 0) -> None:
    """Run the program."""
    arguments = ["extract", str(base), str(tuned), str(out), "--device", "cpu", *options]
    assert lora.main(arguments) == code


@pytest.mark.parametrize("layout", ["folders", "single files"])
def test_what_was_fused_comes_back(
    layout: str, fused: tuple[Path, Path, LoRA], tmp_path: Path
) -> None:
    """Every module with its own rank, and no other module, whichever layout either model has."""
    base, tuned, wanted = fused
    if layout == "single files":
        family = base.name
        tuned = write_single_file(tuned, tmp_path / "tuned.safetensors", family)
        base = base.with_suffix(".safetensors")
    run(base, tuned, tmp_path / "out.safetensors", "--rank", "8", "--dtype", "fp32")
    found = read_lora(tmp_path / "out.safetensors")
    assert found.layers.keys() == wanted.layers.keys()
    assert {layer.rank for layer in found.layers.values()} == {3}
    for module, layer in wanted.layers.items():
        one, other = (0.7 * layer.delta()).flatten(), found.layers[module].delta().flatten()
        assert float(torch.cosine_similarity(one, other, dim=0)) > 0.9999, module
        assert float(other.norm() / one.norm()) == pytest.approx(1, abs=1e-4)


def test_diffusers_makes_the_tuned_model_of_the_base_with_it(
    fused: tuple[Path, Path, LoRA], tmp_path: Path
) -> None:
    """Under kohya's names, in half precision, as people pass it on."""
    base, tuned, wanted = fused
    run(base, tuned, tmp_path / "out.safetensors", "--rank", "8")
    pipe: Any = DiffusionPipeline.from_pretrained(base, local_files_only=True)
    goal: Any = DiffusionPipeline.from_pretrained(tuned, local_files_only=True)
    pipe.load_lora_weights(str(tmp_path), weight_name="out.safetensors")
    networks = [n for n in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipe, n)]
    pipe.fuse_lora(components=networks)
    pipe.unload_lora_weights()
    for network in networks:
        expected = dict(getattr(goal, network).named_parameters())
        for name, value in getattr(pipe, network).named_parameters():
            assert torch.allclose(value, expected[name], atol=2e-3), name
    assert len(wanted.layers) > 10


def test_text_encoders_can_be_left_out(fused: tuple[Path, Path, LoRA], tmp_path: Path) -> None:
    """And diffusers' names be asked for."""
    base, tuned, _ = fused
    options = ("--rank", "8", "--text-encoder", "no", "--to", "diffusers")
    run(base, tuned, tmp_path / "out.safetensors", *options)
    found = read_lora(tmp_path / "out.safetensors")
    assert (found.networks, found.naming) == (["unet"], "diffusers")


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    """Provide a copy of a base whose weights may be changed."""
    shutil.copytree(built / "sd1", tmp_path / "tuned")
    return tmp_path / "tuned"


def alter(model: Path, stem: str, **changes: torch.Tensor | None) -> None:
    """Add to tensors of a model's file, named with _ for dots; None takes one away."""
    file = model / f"{stem}.safetensors"
    tensors = load_file(file)
    for said, change_ in changes.items():
        (name,) = [key for key in tensors if key.replace(".", "_") == said]
        if change_ is None:
            del tensors[name]
        else:
            tensors[name] = tensors[name] + change_
    save_file(tensors, file)


def test_what_no_lora_can_hold_is_told(
    built: Path, copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Norms and biases with their share of the change, and nothing of it in the file."""
    more = {"mid_block_attentions_0_norm_weight": torch.tensor(2.0)}
    more["conv_in_bias"] = torch.tensor(1.0)
    alter(
        copied, UNET, **more, conv_in_weight=torch.eye(16, 4)[:, :, None, None].expand(16, 4, 3, 3)
    )
    run(built / "sd1", copied, tmp_path / "out.safetensors", "--rank", "4")
    told = capfd.readouterr().out
    # 16 ones in the bias and 32 fours in the norm, beside 36 ones in the kernel.
    assert "100.00% of the change" in told
    assert f"not held: biases (1), norms (1), {(16 + 128) / (16 + 128 + 36):.2%} of all" in told
    assert [module.name for module in read_lora(tmp_path / "out.safetensors").layers] == ["conv_in"]


def test_rounding_is_no_change(built: Path, copied: Path, tmp_path: Path) -> None:
    """A model in half precision is the same model; what is changed on top of it is found."""
    file = copied / f"{UNET}.safetensors"
    save_file({k: v.half() for k, v in load_file(file).items()}, file)
    run(built / "sd1", copied, tmp_path / "none.safetensors", "--rank", "4", code=1)
    assert not (tmp_path / "none.safetensors").exists()
    name = "mid_block_attentions_0_proj_in_weight"
    column = torch.randn((32, 1, 1, 1), generator=torch.Generator().manual_seed(1)).half()
    alter(copied, UNET, **{name: column.expand(32, 32, 1, 1)})
    run(built / "sd1", copied, tmp_path / "one.safetensors", "--rank", "4")
    (layer,) = read_lora(tmp_path / "one.safetensors").layers.values()
    assert layer.rank == 1


def test_a_base_in_half_precision_costs_no_direction(copied: Path, tmp_path: Path) -> None:
    """What was added to it in full precision is found, far below what half precision holds."""
    half, file = tmp_path / "half", copied / f"{UNET}.safetensors"
    save_file({k: v.half() for k, v in load_file(file).items()}, file)
    shutil.copytree(copied, half)
    save_file({k: v.float() for k, v in load_file(file).items()}, file)
    chance = torch.Generator().manual_seed(1)
    down, up = torch.randn((2, 32), generator=chance), torch.randn((32, 2), generator=chance)
    delta = 1e-4 * (up @ down)[:, :, None, None]
    alter(copied, UNET, mid_block_attentions_0_proj_in_weight=delta)
    run(half, copied, tmp_path / "out.safetensors", "--rank", "4", "--dtype", "fp32")
    (layer,) = read_lora(tmp_path / "out.safetensors").layers.values()
    found = layer.delta().float().flatten()
    assert layer.rank == 2
    assert float(torch.cosine_similarity(found, delta.flatten(), dim=0)) > 0.9999


def test_models_of_two_kinds_are_refused(
    built: Path, copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Other families, other layers, what is no model; nothing is written."""
    out = tmp_path / "out.safetensors"
    run(built / "sd1", built / "sdxl", out, "--rank", "4", code=1)
    assert "expected a Stable Diffusion 1.x model" in capfd.readouterr().err
    alter(copied, UNET, mid_block_attentions_0_proj_in_weight=None)
    run(built / "sd1", copied, out, "--rank", "4", code=1)
    told = capfd.readouterr().err
    assert "the same layers in its unet" in told
    assert "mid_block.attentions.0.proj_in.weight" in told
    run(built / "sd1", tmp_path, out, "--rank", "4", code=1)
    assert str(tmp_path) in capfd.readouterr().err
    assert not out.exists()


def test_a_stop_is_heard_between_two_tensors(fused: tuple[Path, Path, LoRA]) -> None:
    """Before anything is written."""
    stop = StopRequest()
    stop.request("SIGINT")
    with pytest.raises(BaseException, match="SIGINT"):
        extract((str(fused[0]), str(fused[1])), Wanted(rank=4), Emitter(), stop)


def test_the_header_names_the_family_and_no_place(
    fused: tuple[Path, Path, LoRA], tmp_path: Path
) -> None:
    """By A1111's rule: sdxl_ in front, or ss_v2, or else SD 1."""
    base, tuned, _ = fused
    run(base, tuned, tmp_path / "zkb.safetensors", "--rank", "8")
    with safe_open(tmp_path / "zkb.safetensors", "pt") as opened:
        header = opened.metadata()
    kind = header["ss_base_model_version"]
    seen = "sdxl" if kind.startswith("sdxl_") else "sd2" if header["ss_v2"] == "True" else "sd1"
    assert seen == base.name
    assert (header["ss_output_name"], header["ss_network_dim"]) == ("zkb", "3")
    assert str(tmp_path.parent) not in str(header)


@pytest.mark.parametrize("shape", [(300, 200), (200, 900)])
def test_the_longest_directions_are_those_of_a_whole_decomposition(shape: tuple[int, int]) -> None:
    """Of a matrix that fades, to five digits; of one that does not, nearly all of the square."""
    chance = torch.Generator().manual_seed(0)
    flat = torch.randn(shape, generator=chance)
    left, _, right = torch.linalg.svd(flat, full_matrices=False)
    fading = left * torch.logspace(0, -3, 200) @ right
    for matrix, off in ((fading, 1e-5), (flat, 1e-3)):
        exact = torch.linalg.svdvals(matrix)
        missing = exact[8:].square().sum().sqrt()
        across, sizes, along = directions(matrix, 8)
        nearest = across[:, :8] * sizes[:8] @ along[:, :8].mT
        assert float((matrix - nearest).norm() / missing) == pytest.approx(1, abs=off)


def test_energy_takes_as_many_directions_as_a_share_needs() -> None:
    """Squares of 9, 4 and 1 of 14."""
    delta = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    for share, rank in ((0.6, 1), (0.9, 2), (0.99, 3)):
        layer = largest(delta, Wanted(energy=share), 0.0)
        assert layer
        assert layer.rank == rank


def test_kernels_may_have_a_rank_of_their_own() -> None:
    """Those of one place count as layers without."""
    asked = Wanted(rank=4, conv_rank=2)
    ranks = [asked.rank_for(torch.zeros(shape)) for shape in ((8, 8), (8, 8, 1, 1), (8, 8, 3, 3))]
    assert ranks == [4, 4, 2]
    assert Wanted(rank=4).rank_for(torch.zeros(8, 8, 3, 3)) == 4


def test_equal_in_the_coarser_precision_is_equal() -> None:
    """And what is more than that is taken in full."""
    one = torch.tensor([1.0, 1.0 + 2**-12])
    assert change(one, one.half()) is None
    assert change(one.half(), torch.tensor([1.0, 1.5])) is not None
