"""tools/generate.py: a picture is what LoRA, strength, prompt and seed make, nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open

from tools import generate
from tools.evaluate import read_grid
from tools.generate import (
    Attached,
    config_of,
    find_sources,
    load_models,
    networks_of,
    parse_numbers,
    read_prompts,
    without,
)
from tools.lora_file import Layer, LoRA, Module, write_lora
from train_lora import Emitter, TrainError

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # numpy's

FAMILIES = ("sd1", "sdxl")


def load(base: Path) -> Any:
    """Load a tiny model as the program does."""
    arguments = generate.parser().parse_args(["--base", str(base), "--out", "out"])
    arguments.resolution, arguments.device = 256, "cpu"
    return load_models(config_of(arguments), Emitter())


def make_lora(models: Any, size: float = 0.3) -> LoRA:
    """Make a LoRA that changes attention of all networks, and some convolutions."""
    chance, layers = torch.Generator().manual_seed(3), {}
    for network, net in networks_of(models).items():
        for name, module in net.named_modules():
            plain = name.removeprefix("text_model.")
            if name.endswith(("to_q", "to_v", "q_proj", "conv1", "conv_shortcut")):
                weight = module.weight
                down = torch.randn((4, *weight.shape[1:]), generator=chance) * size
                up = torch.randn((len(weight), 4, *[1] * (weight.ndim - 2)), generator=chance)
                layers[Module(network, plain)] = Layer(down, up * size, 0.5)
    return LoRA(dict(sorted(layers.items())), {"ss_output_name": "x"})


@pytest.fixture(scope="module", params=FAMILIES)
def ready(
    request: pytest.FixtureRequest, built: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Provide a tiny base of each family, and a LoRA file for it."""
    base = built / request.param
    file = tmp_path_factory.mktemp("loras") / f"lora_step_{len(request.param)}.safetensors"
    write_lora(file, make_lora(load(base)), "kohya")
    return base, file


def draw(base: Path, out: Path, *options: object, code: int = 0) -> dict[str, Path]:
    """Run the program; return the pictures by what they show."""
    arguments = ["--base", base, "--out", out, "--steps", 2, "--resolution", 256, "--device", "cpu"]
    assert generate.main([str(each) for each in (*arguments, *options)]) == code
    return {path.relative_to(out / "images").as_posix(): path for path in out.rglob("images/*/*")}


def pixels(path: Path) -> torch.Tensor:
    """Read a picture as numbers."""
    with Image.open(path) as image:
        return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).int()


def test_strength_0_is_the_base_and_1_is_not(ready: tuple[Path, Path], tmp_path: Path) -> None:
    """To the last bit; every strength is a picture of its own."""
    base, file = ready
    options = ("--lora", file, "--prompts", "zkb", "--seeds", "1", "--strengths", "0,1,-1")
    found = draw(base, tmp_path, *options)
    name = file.stem.removeprefix("lora_")
    plain = pixels(found["base/p00_w0.00_s1.png"])
    drawn = {w: pixels(found[f"{name}/p00_w{w}_s1.png"]) for w in ("0.00", "1.00", "-1.00")}
    assert torch.equal(plain, drawn["0.00"])
    assert float((drawn["1.00"] - plain).abs().float().mean()) > 1
    assert float((drawn["-1.00"] - drawn["1.00"]).abs().float().mean()) > 1


def test_nothing_of_one_picture_is_left_in_the_next(
    ready: tuple[Path, Path], tmp_path: Path
) -> None:
    """Strengths in either order, and seeds alone or together, give the same pictures."""
    base, file = ready
    common = ("--lora", file, "--prompts", "zkb", "--prompts", "a cat", "--seeds", "1,2")
    one = draw(base, tmp_path / "one", *common, "--strengths", "1,-1", "--batch", "1")
    other = draw(base, tmp_path / "other", *common, "--strengths=-1,1", "--batch", "4")
    assert one.keys() == other.keys()
    assert all(int((pixels(one[n]) - pixels(other[n])).abs().max()) <= 1 for n in one)


def test_a_fused_model_draws_what_the_lora_beside_it_does(
    ready: tuple[Path, Path], tmp_path: Path
) -> None:
    """Loaded anew, from a folder that holds no trace of a LoRA, and that diffusers loads too."""
    base, file = ready
    fused = tmp_path / "fused"
    arguments = ["--base", base, "--lora", file, "--strengths", "0.7", "--fuse", fused]
    assert generate.main([str(each) for each in (*arguments, "--device", "cpu")]) == 0
    for weights in fused.rglob("*.safetensors"):
        with safe_open(weights, "pt") as opened:
            assert not any("lora" in key or "base_layer" in key for key in opened.keys())  # noqa: SIM118
    common = ("--prompts", "zkb", "--seeds", "5")
    own = draw(base, tmp_path / "own", *common, "--lora", file, "--strengths", "0.7")
    anew = draw(fused, tmp_path / "anew", *common)
    name = file.stem.removeprefix("lora_")
    beside, inside = own[f"{name}/p00_w0.70_s5.png"], anew["base/p00_w0.00_s5.png"]
    assert int((pixels(beside) - pixels(inside)).abs().max()) <= 1
    pipe: Any = DiffusionPipeline.from_pretrained(fused, local_files_only=True)
    assert type(pipe).__name__.startswith("StableDiffusion")


def test_what_is_drawn_is_not_drawn_again(ready: tuple[Path, Path], tmp_path: Path) -> None:
    """Only what is missing, damaged, or was asked for differently."""
    base, file = ready
    options = ("--lora", file, "--prompts", "zkb", "--seeds", "1-3")
    found = draw(base, tmp_path, *options)
    before = {name: path.stat().st_mtime_ns for name, path in found.items()}
    found["base/p00_w0.00_s1.png"].write_bytes(b"broken")
    found["base/p00_w0.00_s2.png"].unlink()
    after = {n: p.stat().st_mtime_ns for n, p in draw(base, tmp_path, *options).items()}
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"base/p00_w0.00_s1.png", "base/p00_w0.00_s2.png"}
    again = draw(base, tmp_path, *options, "--guidance", "3")
    assert all(again[name].stat().st_mtime_ns != after[name] for name in again)


def test_pictures_say_how_they_were_made_and_the_list_has_all_of_them(
    ready: tuple[Path, Path], tmp_path: Path
) -> None:
    """As A1111 reads it; and tools/evaluate.py takes the grid as it is."""
    base, file = ready
    prompts = [{"text": "zkb on grass", "role": "subject"}, {"text": "a dog", "role": "prior"}]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    options = ("--prompts", tmp_path / "prompts.json", "--trigger", "zkb", "--seeds", "1,2")
    found = draw(base, tmp_path / "out", "--lora", file, *options)
    with Image.open(found["base/p00_w0.00_s1.png"]) as image:
        told = image.info["parameters"]
    assert told.startswith("zkb on grass\nNegative prompt: \nSteps: 2, ")
    assert "Seed: 1, Size: 256x256" in told
    grid = read_grid(tmp_path / "out")
    assert [arm.lora for arm in grid.arms] == ["base", file.stem.removeprefix("lora_")]
    assert {p["plain"]: p["role"] for p in grid.prompts.values()} == {
        "on grass": "subject",
        "a dog": "prior",
    }
    with Image.open(tmp_path / "out" / "sheet_p00.png") as image:
        assert image.size == (2 * 264 + 8, 20 + 2 * 284)
    assert str(tmp_path) not in (tmp_path / "out" / "grid.json").read_text(encoding="utf-8")


def test_a_lora_of_another_family_is_refused(built: Path, tmp_path: Path) -> None:
    """It would change nothing, or fail in the middle."""
    write_lora(tmp_path / "x.safetensors", make_lora(load(built / "sdxl")), "kohya")
    options = ("--lora", tmp_path / "x.safetensors", "--prompts", "zkb", "--seeds", "1")
    found = draw(built / "sd1", tmp_path / "out", *options, code=1)
    assert not any(name.startswith("x/") for name in found)


def test_hooks_are_taken_off_again(built: Path) -> None:
    """The model is as it was."""
    models = load(built / "sd1")
    attached = Attached(models, make_lora(models))
    hooked = [m for net in networks_of(models).values() for m in net.modules() if m._forward_hooks]
    assert len(hooked) == len(attached.handles)
    attached.remove()
    assert not any(m._forward_hooks for net in networks_of(models).values() for m in net.modules())


def test_a_runs_folder_stands_for_all_that_it_made(tmp_path: Path) -> None:
    """In the order of the steps; files of one name are told apart by their run."""
    for run in ("one", "two"):
        for name in ("checkpoints/lora_step_9", "checkpoints/lora_step_10", "lora_final"):
            path = tmp_path / run / f"{name}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    alone = find_sources([tmp_path / "one"])
    assert [(each.name, each.step) for each in alone] == [
        ("step_9", 9),
        ("step_10", 10),
        ("final", None),
    ]
    both = find_sources([tmp_path / "one", tmp_path / "two"])
    assert [each.name for each in both[3:]] == ["two_step_9", "two_step_10", "two_final"]
    with pytest.raises(TrainError, match="neither"):
        find_sources([tmp_path])


@pytest.mark.parametrize(
    ("text", "numbers"), [("1-3", [1, 2, 3]), ("7,1-2,7", [7, 1, 2]), ("0", [0])]
)
def test_seeds_are_read_as_people_write_them(text: str, numbers: list[int]) -> None:
    """Ranges, lists, each once."""
    assert parse_numbers(text) == numbers


@pytest.mark.parametrize("text", ["", "a", "1-", "3-1", "-1", "0-99999"])
def test_seeds_that_are_none_are_refused(text: str) -> None:
    """By the command line, before anything is loaded."""
    with pytest.raises(SystemExit):
        generate.parser().parse_args(["--base", "x", f"--seeds={text}"])


def test_prompts_come_from_files_and_from_the_command_line(tmp_path: Path) -> None:
    """A line each, without remarks; what is no prompt is refused."""
    (tmp_path / "a.txt").write_text("# mine\none\n\n two \n", encoding="utf-8")
    found = read_prompts([str(tmp_path / "a.txt"), "three"], [])
    assert [(each["id"], each["text"]) for each in found] == [
        ("p00", "one"),
        ("p01", "two"),
        ("p02", "three"),
    ]
    (tmp_path / "b.json").write_text('[{"role": "prior"}]', encoding="utf-8")
    with pytest.raises(TrainError):
        read_prompts([str(tmp_path / "b.json")], [])


def test_trigger_words_are_left_out_as_words() -> None:
    """And nothing that only contains them."""
    assert without("a photo of ZKB, zkbs and zkb on grass", ["zkb"]) == (
        "a photo of , zkbs and on grass"
    )
