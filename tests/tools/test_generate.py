"""tools/generate.py: a picture is what LoRA, strength, prompt and seed make, nothing else."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_flow import build_flow
from tiny_models import build_tiny

import train_lora
from tools import generate
from tools.base_model import Attached, ask_for, draw, find_model, load_models, networks_of
from tools.fusing import PRECISIONS, Views, Wish, compare, view
from tools.generate import find_sources, parse_numbers
from tools.grid import read_grid
from tools.lora_file import Layer, LoRA, Module, write_lora
from tools.prompts import read_prompts
from train_lora import Emitter, Sketch, StopRequest, TrainError, TrainingInterrupted

if TYPE_CHECKING:
    from conftest import Recorder

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # numpy's

FAMILIES = ("sd1", "sd2", "sdxl")


def load(base: Path) -> Any:
    """Load a tiny model as the program does."""
    return load_models(ask_for(str(base), device="cpu"), Emitter(), StopRequest())


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


def draw_grid(base: Path, out: Path, *options: object, code: int = 0) -> dict[str, Path]:
    """Run the program; return the pictures by what they show."""
    arguments = ["--base", base, "--out", out, "--steps", 2, "--resolution", 256, "--device", "cpu"]
    assert generate.main([str(each) for each in (*arguments, *options)]) == code
    return {path.relative_to(out / "images").as_posix(): path for path in out.rglob("images/*/*")}


def grid_of(out: Path) -> dict[str, Any]:
    """Read the list of all pictures."""
    document: dict[str, Any] = json.loads((out / "grid.json").read_text(encoding="utf-8"))
    return document


def pixels(path: Path) -> torch.Tensor:
    """Read a picture as numbers."""
    with Image.open(path) as image:
        return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).int()


def test_strength_0_is_the_base_and_1_is_not(ready: tuple[Path, Path], tmp_path: Path) -> None:
    """To the last bit; every strength is a picture of its own."""
    base, file = ready
    options = ("--lora", file, "--prompts", "zkb", "--seeds", "1", "--strengths", "0,1,-1")
    found = draw_grid(base, tmp_path, *options)
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
    one = draw_grid(base, tmp_path / "one", *common, "--strengths", "1,-1", "--batch", "1")
    other = draw_grid(base, tmp_path / "other", *common, "--strengths=-1,1", "--batch", "4")
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
    own = draw_grid(base, tmp_path / "own", *common, "--lora", file, "--strengths", "0.7")
    anew = draw_grid(fused, tmp_path / "anew", *common)
    name = file.stem.removeprefix("lora_")
    beside, inside = own[f"{name}/p00_w0.70_s5.png"], anew["base/p00_w0.00_s5.png"]
    assert int((pixels(beside) - pixels(inside)).abs().max()) <= 1
    pipe: Any = DiffusionPipeline.from_pretrained(fused, local_files_only=True)
    assert type(pipe).__name__.startswith("StableDiffusion")


@pytest.mark.parametrize(("precision", "off"), [("fp32", 0.01), ("fp16", 1), ("bf16", 8)])
def test_a_fused_model_is_saved_as_asked_and_says_how_close_it_is(
    precision: str, off: float, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rounding is all that may be between its picture and that of base and LoRA."""
    base, file = built / "sd1", tmp_path / "lora.safetensors"
    write_lora(file, make_lora(load(base), 0.2), "kohya")
    assert generate.main([*fusing_of(base, file, tmp_path / "out"), "--dtype", precision]) == 0
    kinds = {t.dtype for f in tmp_path.rglob("out/*/*.safetensors") for t in load_file(f).values()}
    assert {kind for kind in kinds if kind.is_floating_point} == {PRECISIONS[precision]}
    note = json.loads((tmp_path / "out" / "fused.json").read_text("utf-8"))
    assert (note["lora"]["file"], note["strength"], note["dtype"]) == (file.name, 1, precision)
    assert note["check"]["off"] <= off
    assert note["check"]["lora_changes"] > 8
    assert f"draw but for {note['check']['off']:.2f} of 255" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.safetensors", "out"]


def fusing_of(base: Path, file: Path, out: Path) -> list[str]:
    """Write the command line that fuses."""
    options = ["--fuse", str(out), "--device", "cpu", "--resolution", "64"]
    return ["--base", str(base), "--lora", str(file), *options]


def test_what_leaves_the_range_of_a_precision_is_not_saved(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is anything else left; in more digits, the same LoRA can be saved."""
    write_pair(tmp_path / "x.safetensors", 3e5)
    options = fusing_of(built / "sd1", tmp_path / "x.safetensors", tmp_path / "out")
    assert generate.main([*options, "--dtype", "fp16"]) == 1
    assert "numbers beyond all bounds at strength 1 in fp16" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert generate.main([*options, "--dtype", "fp32", "--no-verify"]) == 0


def test_a_model_that_draws_something_else_is_refused(built: Path, tmp_path: Path) -> None:
    """As one would that was saved wrongly."""
    models, lora = load(built / "sd1"), LoRA({}, {}, source="x")
    wish = Wish(
        config=ask_for(str(built / "sd1")),
        base={},
        lora=lora,
        digest=None,
        strength=1,
        precision="fp32",
        sketch=Sketch(64, 64, 2, 7, ""),
        prompt="zkb",
        seed=1,
    )
    right = view(models, wish, StopRequest())
    others = Views(alone=right, both=Image.new("RGB", (64, 64)))
    assert compare(built / "sd1", wish, Views(right, right), Emitter(), StopRequest())["off"] == 0
    with pytest.raises(TrainError, match="the picture of base and LoRA"):
        compare(built / "sd1", wish, others, Emitter(), StopRequest())


def test_what_is_drawn_is_not_drawn_again(ready: tuple[Path, Path], tmp_path: Path) -> None:
    """Only what is missing, damaged, or was asked for differently."""
    base, file = ready
    options = ("--lora", file, "--prompts", "zkb", "--seeds", "1-3")
    found = draw_grid(base, tmp_path, *options)
    before = {name: path.stat().st_mtime_ns for name, path in found.items()}
    found["base/p00_w0.00_s1.png"].write_bytes(b"broken")
    found["base/p00_w0.00_s2.png"].unlink()
    after = {n: p.stat().st_mtime_ns for n, p in draw_grid(base, tmp_path, *options).items()}
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"base/p00_w0.00_s1.png", "base/p00_w0.00_s2.png"}
    again = draw_grid(base, tmp_path, *options, "--guidance", "3")
    assert all(again[name].stat().st_mtime_ns != after[name] for name in again)


class Hasty(StopRequest):
    """A stop that comes when it has been asked for so often."""

    def __init__(self, checks: int) -> None:
        """Count down."""
        super().__init__()
        self.left = checks

    def check(self) -> None:
        """Come at the last."""
        self.left -= 1
        if self.left == 0:
            self.request("SIGINT")
        super().check()


def test_a_stopped_grid_keeps_what_is_drawn_and_goes_on(built: Path, tmp_path: Path) -> None:
    """Nothing is drawn twice, nothing is missing, and the list comes last."""
    options = ["--base", built / "sd1", "--out", tmp_path, "--prompts", "zkb", "--seeds", "1-4"]
    options += ["--steps", 2, "--width", 64, "--height", 64, "--device", "cpu", "--batch", 1]
    arguments = generate.parser().parse_args([str(each) for each in options])
    with pytest.raises(TrainingInterrupted):
        generate.work(arguments, Emitter(), Hasty(7))
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert 0 < len(kept) < 4
    assert not (tmp_path / "grid.json").exists()
    generate.work(arguments, Emitter(), StopRequest())
    assert len(list(tmp_path.rglob("images/*/*.png"))) == 4
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())


def test_a_killed_grid_goes_on_where_it_was(built: Path, tmp_path: Path) -> None:
    """A picture is there whole or not at all."""
    program = str(Path(generate.__file__))
    command = [sys.executable, program, "--base", built / "sd1", "--out", tmp_path, "--batch", 1]
    command += ["--prompts", "zkb", "--seeds", "1-40", "--steps", 4, "--device", "cpu"]
    command += ["--width", 64, "--height", 64]
    killed = subprocess.Popen([str(each) for each in command], stderr=subprocess.DEVNULL)
    while not list(tmp_path.rglob("*.png")) and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert 0 < len(kept) < 40
    assert generate.main([str(each) for each in command[2:]]) == 0
    pictures = list(tmp_path.rglob("images/*/*.png"))
    assert len(pictures) == 40
    assert all(len(pixels(path)) == 64 * 64 * 3 for path in pictures)
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())


def test_pictures_say_how_they_were_made_and_the_list_has_all_of_them(
    ready: tuple[Path, Path], tmp_path: Path
) -> None:
    """As A1111 reads it; and tools/evaluate.py takes the grid as it is."""
    base, file = ready
    prompts = [{"text": "zkb on grass", "role": "subject"}, {"text": "a dog", "role": "prior"}]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    options = ("--prompts", tmp_path / "prompts.json", "--trigger", "zkb", "--seeds", "1,2")
    found = draw_grid(base, tmp_path / "out", "--lora", file, *options)
    with Image.open(found["base/p00_w0.00_s1.png"]) as image:
        told = image.info["parameters"]
    assert told.startswith("zkb on grass\nNegative prompt: \nSteps: 2, ")
    assert f"Seed: 1, Size: 256x256, Model: {base.name}" in told
    assert (grid_of(tmp_path / "out")["base"]["id"]) == base.name
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
    found = draw_grid(built / "sd1", tmp_path / "out", *options, code=1)
    assert not any(name.startswith("x/") for name in found)


def test_hooks_are_taken_off_again(built: Path) -> None:
    """The model is as it was."""
    models = load(built / "sd1")
    attached = Attached(models, make_lora(models))
    hooked = [m for net in networks_of(models).values() for m in net.modules() if m._forward_hooks]
    assert len(hooked) == len(attached.handles)
    attached.remove()
    assert not any(m._forward_hooks for net in networks_of(models).values() for m in net.modules())


def write_pair(path: Path, number: float, **header: str) -> Path:
    """Write a LoRA of one layer, told from others by its number."""
    layer = Layer(torch.full((1, 32, 1, 1), number), torch.ones(32, 1, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lora(
        path, LoRA({Module("unet", "mid_block.attentions.0.proj_in"): layer}, header), "kohya"
    )
    return path


def test_a_runs_folder_stands_for_all_that_it_made(tmp_path: Path) -> None:
    """In the order of the steps; files of one name are told apart by their run."""
    for run in ("one", "two"):
        for number, name in enumerate(("checkpoints/lora_step_9", "checkpoints/lora_step_10")):
            write_pair(tmp_path / run / f"{name}.safetensors", number + 1)
        write_pair(tmp_path / run / "lora_final.safetensors", 3, ss_steps="12")
    alone = find_sources([tmp_path / "one"])
    assert [(each.name, each.step) for each in alone] == [
        ("step_9", 9),
        ("step_10", 10),
        ("final", 12),
    ]
    both = find_sources([tmp_path / "one", tmp_path / "two"])
    assert [each.name for each in both[3:]] == ["two_step_9", "two_step_10", "two_final"]
    for place in ("a", "b"):  # where all runs are called alike, as tools/pipeline.py does
        write_pair(tmp_path / place / "run" / "lora_final.safetensors", 3)
    runs = find_sources([tmp_path / place / "run" for place in ("a", "b")])
    assert [each.name for each in runs] == ["a_run_final", "b_run_final"]
    with pytest.raises(TrainError, match="twice"):
        find_sources([tmp_path / "a" / "run"] * 2)
    write_pair(tmp_path / "one" / "lora_final.safetensors", 2)  # as the last checkpoint is
    assert [each.name for each in find_sources([tmp_path / "one"])] == ["step_9", "step_10"]
    with pytest.raises(TrainError, match="neither"):
        find_sources([tmp_path])


# --- how texts are read ---

LONG = ", ".join(f"thing {number}" for number in range(40)) + ", zkb"


def write_read(file: Path, base: Path, **said: str) -> LoRA:
    """Write a LoRA that says how texts were read when it was trained."""
    lora = make_lora(load(base), 0.1)
    lora = LoRA(lora.layers, lora.header | said)
    write_lora(file, lora, "kohya")
    return lora


def test_texts_are_read_as_in_the_training_of_each_lora(built: Path, tmp_path: Path) -> None:
    """Beyond 75 tokens, and less the last layer; the picture is that of the trainer's own text."""
    base, files = built / "sd1", [tmp_path / name for name in ("long.safetensors", "b.safetensors")]
    lora = write_read(files[0], base, ss_max_token_length="150", ss_clip_skip="2")
    write_read(files[1], base, ss_max_token_length="75", ss_clip_skip="1")
    options = ("--prompts", LONG, "--seeds", "5", "--lora", files[0], "--lora", files[1])
    found = draw_grid(base, tmp_path / "out", *options)
    models = load_models(
        ask_for(str(base), device="cpu", max_tokens=150, clip_skip=2), Emitter(), StopRequest()
    )
    sketch = Sketch(**grid_of(tmp_path / "out")["settings"])
    plain = ask(models, LONG, sketch)
    attached = Attached(models, lora)
    wanted = ask(models, LONG, sketch)
    attached.remove()
    assert Image.open(found["long/p00_w1.00_s5.png"]).tobytes() == wanted.tobytes()
    assert Image.open(found["base/p00_w0.00_s5.png"]).tobytes() == plain.tobytes()
    usual = draw_grid(base, tmp_path / "usual", *options[:-4], "--lora", files[1])
    for name, path in usual.items():
        same = path.read_bytes() == found[name].read_bytes()
        assert same is name.startswith("b/")
    said = {each["id"]: each for each in grid_of(tmp_path / "out")["loras"]}
    assert (said["long"]["max_tokens"], said["long"]["clip_skip"]) == (150, 2)
    assert not {"max_tokens", "clip_skip"} & said["b"].keys()
    with Image.open(found["long/p00_w1.00_s5.png"]) as image:
        assert "Clip skip: 2, " in str(image.info["parameters"])
    before = {path: path.stat().st_mtime_ns for path in found.values()}
    draw_grid(base, tmp_path / "out", *options)
    assert {path: path.stat().st_mtime_ns for path in found.values()} == before


@pytest.mark.parametrize("said", ["100", "9" * 99, "None"])
def test_what_a_header_says_that_cannot_be_is_no_end(
    said: str, built: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A number that no base can take is named; what is no number says nothing."""
    file = tmp_path / "odd.safetensors"
    write_read(file, built / "sd1", ss_max_token_length=said, ss_clip_skip="12")
    source = find_sources([file])[0]
    asked = ["--base", str(built / "sd1"), "--lora", str(file), "--device", "cpu"]
    readings = generate.readings_of([source], generate.parser().parse_args(asked), Emitter())
    assert readings[source] == {}  # the tiny base has no twelve layers
    draw_grid(built / "sd1", tmp_path, "--lora", file, "--prompts", "zkb", "--dry-run")
    assert "odd was read as the base cannot be" in capfd.readouterr().err


# --- against the trainer and diffusers ---


def ask(models: Any, prompt: str, sketch: Sketch) -> Any:
    """Draw one picture with seed 5."""
    tokens = train_lora.tokenize([("", prompt), ("", sketch.negative)], models, Emitter())
    (image,) = draw(models, tokens, [(prompt, 5)], sketch, StopRequest())
    return image


@pytest.mark.parametrize("family", FAMILIES)
def test_a_square_is_the_picture_that_the_trainer_previews(family: str, built: Path) -> None:
    """To the last bit: the same loop, of which the trainer's knows squares alone."""
    models, size = load(built / family), {"resolution": 256, "sample_steps": 3}
    config = ask_for(str(built / family), sample_guidance=4.0, sample_negative_prompt="a", **size)
    tokens = train_lora.tokenize([("", "a cat"), ("", "a")], models, Emitter())
    cache = train_lora.Cache((), tokens)
    (preview,) = train_lora.draw_previews(models, cache, [("a cat", 5)], config, StopRequest())
    drawn = ask(models, "a cat", Sketch(256, 256, 3, 4.0, "a"))
    assert drawn.tobytes() == preview.tobytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_that_is_no_square_is_the_one_that_diffusers_draws(
    family: str, tmp_path: Path
) -> None:
    """From the same noise, by its own pipeline."""
    base = build_tiny(family, tmp_path / family, vae_levels=4)
    models = load(base)
    drawn = ask(models, "a cat", Sketch(128, 192, 3, 4.0, "a"))
    pipe: Any = DiffusionPipeline.from_pretrained(base, local_files_only=True)
    pipe.scheduler = models.base.objective.solver(models.schedule, 3, torch.zeros(1))
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn((1, 4, 24, 16), generator=torch.Generator().manual_seed(5))
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "negative_prompt": "a"}
    (wanted,) = pipe("a cat", latents=noise, width=128, height=192, **options).images
    assert drawn.size == wanted.size == (128, 192)
    apart = [abs(a - b) for a, b in zip(drawn.tobytes(), wanted.tobytes(), strict=True)]
    assert max(apart) <= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_draws_what_its_folder_does(
    family: str, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the configs of its kind from the Hugging Face cache."""
    reference = train_lora.FAMILIES[family].reference(train_lora.Headers(path=built))
    name = reference.replace("/", "--")
    place = tmp_path / "hub" / f"models--{name}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("x", encoding="ascii")
    shutil.copytree(built / family, place / "snapshots" / "x")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    bases, sketch = (built / family, built / f"{family}.safetensors"), Sketch(64, 64, 2, 4.0, "")
    folder, single = (ask(load(base), "a cat", sketch).tobytes() for base in bases)
    assert folder == single


def test_the_parts_that_a_training_names_are_taken(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configs of a single file from a folder, and another VAE, which draws all anew."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nowhere"))
    asked = ("--prompts", "zkb", "--seeds", "1", "--model-config", built / "sd1")
    single = built / "sd1.safetensors"
    (plain,) = (p.read_bytes() for p in draw_grid(single, tmp_path / "single", *asked).values())
    (folder,) = draw_grid(built / "sd1", tmp_path / "folder", *asked[:-2]).values()
    with Image.open(io.BytesIO(plain)) as one, Image.open(folder) as other:
        assert one.tobytes() == other.tobytes()
    (drawn,) = draw_grid(
        single, tmp_path / "single", *asked, "--vae", built / "sd2" / "vae"
    ).values()
    assert drawn.read_bytes() != plain
    assert grid_of(tmp_path / "single")["base"]["vae"] == "vae"


def test_what_a_training_says_of_the_base_is_heeded(built: Path, tmp_path: Path) -> None:
    """What it predicts is a matter of the picture, and so of whether it is drawn already."""
    asked = ("--prompts", "zkb", "--seeds", "1")
    (plain,) = (p.read_bytes() for p in draw_grid(built / "sd2", tmp_path, *asked).values())
    (same,) = draw_grid(built / "sd2", tmp_path, *asked, "--zero-terminal-snr", "false").values()
    with Image.open(io.BytesIO(plain)) as one, Image.open(same) as other:
        assert one.tobytes() == other.tobytes()
    for said in (["--zero-terminal-snr", "true"], ["--prediction-type", "epsilon"]):
        (drawn,) = draw_grid(built / "sd2", tmp_path, *asked, *said).values()
        with Image.open(io.BytesIO(plain)) as one, Image.open(drawn) as other:
            assert one.tobytes() != other.tobytes()
    assert grid_of(tmp_path)["base"]["prediction_type"] == "epsilon"


def test_a_word_that_is_not_drawn_with_is_named(
    tmp_path: Path, recorder: Recorder, built: Path
) -> None:
    """Beside a LoRA; alone it gives nothing to draw."""
    word = write_pair(tmp_path / "run" / "embeddings" / "zkb_embedding.safetensors", 1)
    with pytest.raises(TrainError, match="learned a word alone"):
        find_sources([tmp_path / "run"])
    write_pair(tmp_path / "run" / "lora_final.safetensors", 1)
    options = ["--base", built / "sd1", "--lora", tmp_path / "run", "--prompts", "zkb", "--dry-run"]
    arguments = [str(each) for each in (*options, "--out", tmp_path / "out", "--device", "cpu")]
    generate.work(generate.parser().parse_args(arguments), Emitter(recorder), StopRequest())
    (told,) = (r["message"] for r in recorder.records if r["type"] == "warning")
    assert told.startswith("run learned a word of its own too")
    word.unlink()
    word.parent.rmdir()
    recorder.records.clear()
    generate.work(generate.parser().parse_args(arguments), Emitter(recorder), StopRequest())
    assert recorder.codes() == []


@pytest.mark.parametrize("family", ["flux1", "krea2", "z_image"])
def test_a_side_is_whole_in_what_the_denoiser_takes(family: str, tmp_path: Path) -> None:
    """These take two places of the VAE at once."""
    folder = str(build_flow(family, tmp_path / family))
    _, base = find_model(ask_for(folder), Emitter())
    assert base.pixel_step == 2 * base.vae_scale_factor
    options = ["--base", folder, "--height", "64", "--width"]
    odd, even = (str(64 + n * base.vae_scale_factor) for n in (1, 2))
    with pytest.raises(TrainError, match=f"--width: expected a multiple of {base.pixel_step}"):
        generate.choose_sides(generate.parser().parse_args([*options, odd]), Emitter())
    sketch, _ = generate.choose_sides(generate.parser().parse_args([*options, even]), Emitter())
    assert sketch.width == int(even)


@pytest.mark.parametrize(
    ("option", "side", "words"),
    [("--width", "100", "a multiple of 32"), ("--height", "8192", "from 64 to 4096")],
)
def test_a_size_that_no_picture_has_is_refused_before_anything_is_loaded(
    option: str, side: str, words: str, built: Path, tmp_path: Path, capfd: Any
) -> None:
    """Naming the option and what would do."""
    draw_grid(built / "sd1", tmp_path, "--prompts", "zkb", option, side, code=1)
    told = capfd.readouterr().err
    assert option in told
    assert words in told
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_tells_what_is_missing_and_writes_nothing(
    ready: tuple[Path, Path], tmp_path: Path, capfd: Any
) -> None:
    """Also of a grid that is half drawn."""
    base, _ = ready
    options = ("--prompts", "zkb", "--seeds", "1,2")
    draw_grid(base, tmp_path, *options, "--dry-run")
    assert list(tmp_path.iterdir()) == []
    draw_grid(base, tmp_path, "--prompts", "zkb", "--seeds", "1")
    draw_grid(base, tmp_path, *options, "--dry-run")
    assert "Would draw 1 of 2 pictures" in capfd.readouterr().out


def test_numbers_beyond_all_bounds_make_a_black_picture_that_is_named(
    ready: tuple[Path, Path], tmp_path: Path, capfd: Any
) -> None:
    """As of a strength that no LoRA stands; the others are drawn."""
    base, file = ready
    options = ("--lora", file, "--prompts", "zkb", "--seeds", "1", "--strengths", "1,1e38")
    found = draw_grid(base, tmp_path, *options)
    black = [name for name, path in found.items() if not pixels(path).any()]
    assert len(black) == 1
    assert "numbers beyond all bounds" in capfd.readouterr().err
    assert black[0] in {
        image["file"].removeprefix("images/") for image in grid_of(tmp_path)["images"]
    }


def test_where_memory_is_short_a_batch_is_drawn_in_halves(built: Path, tmp_path: Path) -> None:
    """The pictures are the same; one alone that does not fit is an error."""
    out, models = tmp_path / "out", load(built / "sd1")
    arguments = generate.parser().parse_args(["--base", str(built / "sd1"), "--seeds", "1-4"])
    prompts, sketch = read_prompts(["zkb"], []), Sketch(128, 128, 1, 2.0, "")
    cells = generate.cells_of([], prompts, arguments)
    readings = generate.readings_of([], arguments, Emitter())
    studio = generate.Studio(out, {"id": "x", "family": "sd1"}, sketch, cells, readings)
    tokens = train_lora.tokenize([("", "zkb"), ("", "")], models, Emitter())

    failed: list[weakref.ref[torch.Tensor]] = []

    def run_out(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        assert not any(held() is not None for held in failed)  # it would be lacking
        if len(inputs[0]) > limit:
            failed.append(weakref.ref(inputs[0]))
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle, limit = models.denoiser.register_forward_pre_hook(run_out), 4
    studio.draw_batch(cells, models, tokens, Emitter(), StopRequest())
    assert len(list(out.rglob("*.png"))) == 4
    assert len(failed) == 1
    limit = 1
    with pytest.raises(torch.OutOfMemoryError):
        studio.draw_batch(cells, models, tokens, Emitter(), StopRequest())
    handle.remove()


def test_a_list_of_other_pictures_does_not_outlive_them(
    ready: tuple[Path, Path], tmp_path: Path
) -> None:
    """Else a stopped run would leave a list of which half is drawn anew."""
    base, _ = ready
    options = ("--prompts", "zkb", "--seeds", "1")
    draw_grid(base, tmp_path, *options)
    (tmp_path / "images/base/p00_w0.00_s1.png").unlink()
    (tmp_path / "images/base/p00_w0.00_s1.png").mkdir()  # cannot be written
    draw_grid(base, tmp_path, *options, "--guidance", "3", code=1)
    assert not (tmp_path / "grid.json").exists()


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


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ('{"text": "a cat"}', "a list of prompts"),
        ('"a cat"', "a list of prompts"),
        ('[{"text": "x", "id": "../../x"}]', "an id of up to 64 letters"),
        ('[{"text": "x", "id": ""}]', "an id of up to 64 letters"),
        ('[{"text": "x", "id": 7}]', "an id of up to 64 letters"),
        ('[{"text": "x", "id": "a"}, {"text": "y", "id": "A"}]', "A twice"),
        ('[{"text": "x", "id": "p01"}, "y"]', "p01 twice"),
    ],
)
def test_prompts_whose_pictures_have_no_name_of_their_own_are_refused(
    said: str, words: str, tmp_path: Path
) -> None:
    """A picture lies in the grid's folder, and is that of one prompt."""
    (tmp_path / "a.json").write_text(said, encoding="utf-8")
    with pytest.raises(TrainError, match=words):
        read_prompts([str(tmp_path / "a.json")], [])


def test_every_strength_has_a_picture_of_its_own() -> None:
    """Names have two digits, and more only where those would not do."""
    options = ["--base", "x", "--seeds", "1", "--strengths", "0.8,-1,0.12,0.125,1e-5"]
    arguments = generate.parser().parse_args(options)
    source = generate.Source("x", Path("x"))
    cells = generate.cells_of([source], read_prompts(["zkb"], []), arguments)
    names = [cell.name.removeprefix("images/x/p00_w") for cell in cells[1:]]
    assert names == [f"{w}_s1.png" for w in ("0.80", "-1.00", "0.12", "0.125", "1e-05")]


def test_trigger_words_are_left_out_as_words() -> None:
    """And nothing that only contains them."""
    assert train_lora.without_words("a photo of ZKB, zkbs and zkb on grass", ["zkb"]) == (
        "a photo of , zkbs and on grass"
    )
