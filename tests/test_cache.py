"""The cache: pictures as viewers show them, and what VAE and text encoders make of them once."""

from __future__ import annotations

import dataclasses
import errno
import functools
import gc
import hashlib
import itertools
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from conftest import Recorder, change_json, load_config, write_image
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny, change_weights
from tiny_runs import dataset_of

import train_lora
from train_lora import (
    Cache,
    CachedImage,
    Emitter,
    ErrorCode,
    LoRATrainer,
    Models,
    Picture,
    Record,
    Shelf,
    StopRequest,
    TrainError,
    TrainingConfig,
)

CPU = torch.device("cpu")
SIDE = 256
Bytes = NDArray[np.uint8]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def random_pixels(height: int, width: int, seed: int = 0) -> Bytes:
    """Make a picture of noise, in which no two places are alike."""
    chance = np.random.default_rng(seed)
    return chance.integers(0, 256, (height, width, 3), dtype=np.uint8)


def shown(path: Path) -> Bytes:
    """Load a picture as numbers, [height, width, 3]."""
    picture = train_lora.load_picture(path)
    assert picture.mode == "RGB"
    return np.asarray(picture)


# --- how a picture is loaded ---

UPRIGHT: dict[int, Callable[[Bytes], Bytes]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path, orientation: int) -> None:
    """All eight orientations, among them the mirrored ones."""
    pixels, exif = random_pixels(3, 5), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(shown(tmp_path / "a.png"), UPRIGHT[orientation](pixels))


@pytest.mark.parametrize("format_name", ["png", "webp"])
def test_transparent_places_are_white(tmp_path: Path, format_name: str) -> None:
    """Half transparent ones are mixed with white."""
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[..., 0], pixels[:, 1, 3], pixels[:, 2, 3] = 200, 128, 255
    path = tmp_path / f"a.{format_name}"
    Image.fromarray(pixels).save(path, lossless=True, exact=True)
    mixed = round(255 - 128 / 255 * (255 - 0))
    wanted = [[255, 255, 255], [round(255 - 128 / 255 * 55), mixed, mixed], [200, 0, 0]]
    assert np.abs(shown(path)[0].astype(int) - wanted).max() <= 1


def test_transparency_in_a_palette_is_white(tmp_path: Path) -> None:
    """Old icons and screenshots are like that."""
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "a.png", transparency=0)
    assert shown(tmp_path / "a.png").tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_one_colour_that_stands_for_transparency_is_white(tmp_path: Path) -> None:
    """PNG can name it without an alpha channel."""
    picture = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    picture.save(tmp_path / "a.png", transparency=(1, 2, 3))
    assert shown(tmp_path / "a.png").tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_grey_with_alpha_is_on_white(tmp_path: Path) -> None:
    """Scanned drawings come this way."""
    picture = Image.merge("LA", [Image.new("L", (1, 2), 90), Image.new("L", (1, 2), 255)])
    picture.putpixel((0, 1), (90, 0))
    picture.save(tmp_path / "a.png")
    assert shown(tmp_path / "a.png").tolist() == [[[90, 90, 90]], [[255, 255, 255]]]


def test_sixteen_bits_of_grey_are_scaled_to_eight(tmp_path: Path) -> None:
    """Pillow alone would turn nearly all of it white."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "a.png")
    grey = shown(tmp_path / "a.png").astype(float)
    assert np.abs(grey - (values / 65535 * 255)[..., None]).max() <= 1
    assert (grey[0, 0, 0], grey[-1, -1, 0]) == (0, 255)


def test_sixteen_bits_of_grey_with_a_transparent_value_load(tmp_path: Path) -> None:
    """That value is counted in 16 bits, too."""
    values = np.array([[0, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png", transparency=0)
    grey = shown(tmp_path / "a.png")[0, :, 0].astype(int)
    assert np.abs(grey - [255, 127, 255]).max() <= 1


def test_print_colours_become_screen_colours(tmp_path: Path) -> None:
    """CMYK JPEGs are read as other programs show them."""
    for name, ink, light in (("c", (255, 0, 0, 0), (0, 255, 255)), ("k", (0, 0, 0, 255), (0,) * 3)):
        Image.new("CMYK", (16, 16), ink).save(tmp_path / f"{name}.jpg", quality=100)
        assert np.abs(shown(tmp_path / f"{name}.jpg")[8, 8].astype(int) - light).max() <= 4


@pytest.mark.parametrize(("mode", "ink"), [("1", 1), ("L", 255), ("P", 255), ("RGB", (255,) * 3)])
def test_every_other_mode_is_read(tmp_path: Path, mode: str, ink: Any) -> None:
    """White stays white."""
    Image.new(mode, (2, 2), ink).save(tmp_path / "a.bmp")
    assert (shown(tmp_path / "a.bmp") == 255).all()


# --- how a picture is fitted ---

# Width, height and side; then original height and width, crop top and left, target both.
FITTED = [
    ((1024, 768), 512, [768, 1024, 0, 85, 512, 512]),  # 683 x 512
    ((768, 1024), 512, [1024, 768, 85, 0, 512, 512]),
    ((300, 300), 256, [300, 300, 0, 0, 256, 256]),
    ((1000, 600), 256, [600, 1000, 0, 85, 256, 256]),  # 427 x 256
    ((200, 500), 256, [500, 200, 192, 0, 256, 256]),  # 256 x 640, enlarged
    ((256, 256), 256, [256, 256, 0, 0, 256, 256]),
    ((257, 256), 256, [256, 257, 0, 0, 256, 256]),
]


@pytest.mark.parametrize(("size", "side", "wanted"), FITTED)
def test_the_size_numbers_tell_what_was_done(
    size: tuple[int, int], side: int, wanted: list[int]
) -> None:
    """The original size, and the crop in pixels of the resized picture."""
    fitted, numbers = train_lora.fit_picture(Image.new("RGB", size), (side, side))
    assert fitted.size == (side, side)
    assert numbers == wanted


def test_the_size_numbers_are_those_of_the_upright_picture(tmp_path: Path) -> None:
    """What lies sideways in the file is turned before anything is measured."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (1000, 600)).save(tmp_path / "a.jpg", exif=exif)
    _, numbers = train_lora.fit_picture(train_lora.load_picture(tmp_path / "a.jpg"), (256, 256))
    assert numbers == [1000, 600, 85, 0, 256, 256]


@pytest.mark.parametrize("turned", [False, True])
def test_the_centre_is_kept(turned: bool) -> None:
    """What is cut off is the same on either side."""
    pixels = np.zeros((256, 768, 3), np.uint8)
    pixels[:, :256, 0], pixels[:, 256:512, 1], pixels[:, 512:, 2] = 255, 255, 255
    picture = Image.fromarray(pixels.transpose(1, 0, 2) if turned else pixels)
    fitted, _ = train_lora.fit_picture(picture, (256, 256))
    assert np.array_equal(np.asarray(fitted), np.full((256, 256, 3), (0, 255, 0)))


def test_a_picture_is_averaged_when_made_smaller() -> None:
    """Fine stripes become grey; picking single pixels would keep black and white."""
    pixels = np.zeros((1024, 1024, 3), np.uint8)
    pixels[:, ::2] = 255
    fitted, _ = train_lora.fit_picture(Image.fromarray(pixels), (256, 256))
    inner = np.asarray(fitted)[8:-8, 8:-8].astype(float)
    assert abs(inner.mean() - 127.5) < 2
    assert inner.std() < 3


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    """Not one pixel changes."""
    pixels = random_pixels(256, 256)
    fitted, _ = train_lora.fit_picture(Image.fromarray(pixels), (256, 256))
    assert np.array_equal(np.asarray(fitted), pixels)


def test_pixels_run_from_minus_one_to_one() -> None:
    """Every value a byte can have, by the formula; channels come first."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[..., 1] = np.arange(256).reshape(16, 16)
    numbers = train_lora.to_pixels(Image.fromarray(pixels))
    assert numbers.shape == (3, 16, 16)
    assert (numbers[0] == -1).all()
    wanted = np.arange(256, dtype=np.float32) / np.float32(127.5) - 1
    assert np.array_equal(numbers[1].flatten().numpy(), wanted)
    assert (wanted[0], wanted[-1]) == (-1, 1)


# --- what the VAE makes of it ---


def pictures_of(*captions: str) -> list[Picture]:
    """Write one picture of noise per caption, of the right size."""
    pictures = []
    for number, caption in enumerate(captions):
        path = Path.cwd() / "data" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random_pixels(SIDE, SIDE, number)).save(path)
        facts = {"name": path.name, "path": path, "width": SIDE, "height": SIDE}
        pictures.append(Picture(**facts, caption=caption))  # type: ignore[arg-type]
    return pictures


@dataclasses.dataclass
class Encoded:
    """What encoding gave, and what it told."""

    cache: Cache
    models: Models
    recorder: Recorder


def models_of(config: TrainingConfig) -> Models:
    """Prepare the networks of a config."""
    _, base = train_lora.inspect_model(config)
    assert base is not None
    return Models.prepare(base, CPU, torch.float32)


def encode(folder: Path, *captions: str, **changes: Any) -> Encoded:
    """Let a trainer fill its cache from pictures with these captions."""
    pictures, recorder = pictures_of(*captions), Recorder()
    config = load_config(**{"base_model": str(folder), "resolution": SIDE, **changes})
    models = models_of(config)
    trainer = LoRATrainer(config, Emitter(recorder), StopRequest())
    trainer.models = models
    return Encoded(trainer.encode(dataset_of(pictures, config)), models, recorder)


def load_vae(folder: Path) -> Any:
    """Load a VAE as any program does."""
    return diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae").eval()


def posterior(vae: Any, pixels: Bytes) -> tuple[torch.Tensor, torch.Tensor]:
    """Ask a VAE for mean and deviation of one picture."""
    numbers = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        found = vae.encode(numbers).latent_dist
    return found.mean[0], found.std[0]


def assert_moments(image: CachedImage, form: int, wanted: tuple[torch.Tensor, ...]) -> None:
    """Compare one form of a cached image with mean and deviation."""
    for found, expected in zip(image.latent_dist[form], wanted, strict=True):
        assert found.dtype == torch.float32
        assert torch.allclose(found, expected, atol=1e-5, rtol=1e-4)


def test_every_picture_is_cached_as_the_vae_sees_it(here: Path, built: Path) -> None:
    """Five pictures are more than one batch; names and captions stay with them."""
    encoded, vae = encode(built / "sd1", "a", "b", "c", "d", "e"), load_vae(built / "sd1")
    assert [image.name for image in encoded.cache.images] == [f"{n}.png" for n in range(5)]
    assert [image.caption for image in encoded.cache.images] == list("abcde")
    for number, image in enumerate(encoded.cache.images):
        assert image.latent_dist.shape == (1, 2, 4, SIDE // 32, SIDE // 32)
        assert_moments(image, 0, posterior(vae, random_pixels(SIDE, SIDE, number)))


def test_both_forms_of_a_picture_are_cached_where_mirroring_is_wanted(
    here: Path, built: Path
) -> None:
    """A mirrored picture is encoded anew: a VAE does not mirror exactly."""
    (image,) = encode(built / "sdxl", "a", flip=True).cache.images
    vae, pixels = load_vae(built / "sdxl"), random_pixels(SIDE, SIDE)
    assert image.latent_dist.shape[0] == 2
    assert_moments(image, 0, posterior(vae, pixels))
    assert_moments(image, 1, posterior(vae, pixels[:, ::-1]))


def test_the_size_numbers_are_kept_exactly(here: Path, built: Path) -> None:
    """Half precision would round those above 256."""
    (image,) = encode(built / "sdxl", "a").cache.images
    assert image.time_ids.dtype == torch.float32
    assert image.time_ids.tolist() == [SIDE, SIDE, 0, 0, SIDE, SIDE]


@pytest.mark.parametrize(("family", "scale"), [("sd1", 0.18215), ("sdxl", 0.13025)])
def test_the_scale_of_latents_is_the_vaes_own(
    here: Path, built: Path, family: str, scale: float
) -> None:
    """It comes from the config beside the weights."""
    assert latent_scale(encode(built / family, "a").models.base) == scale


def latent_scale(base: train_lora.BaseModel) -> object:
    """Look up what latents are multiplied with."""
    return base.parts[base.family.vae].config["scaling_factor"]


def test_another_vae_brings_its_own_scale(here: Path, built: Path) -> None:
    """A family's usual number would be wrong for it."""
    path = build_tiny("sd1", here / "other") / "vae" / "config.json"
    change_json(path, scaling_factor=0.5)
    assert latent_scale(encode(built / "sd1", "a", vae="other/vae").models.base) == 0.5


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_latents_that_are_not_finite_name_the_picture(here: Path, value: float) -> None:
    """One such picture would spoil all that was learned."""
    path = build_tiny("sd1", here / "model") / "vae" / "diffusion_pytorch_model.safetensors"
    change_weights(path, lambda weights: weights["quant_conv.weight"][0, 0].fill_(value))
    with pytest.raises(TrainError) as failed:
        encode(here / "model", "a")
    assert failed.value.code is ErrorCode.LATENTS_NOT_FINITE
    assert failed.value.problems[0].path == "0.png"


def hollow_png() -> bytes:
    """Make a PNG with sound checksums and too few pixels, which only decoding finds out."""
    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        png += struct.pack(">I", len(data)) + kind + data + checksum
    return png


@pytest.mark.parametrize("harm", ["removed", "replaced", "hollow"])
def test_a_picture_that_cannot_be_read_any_more_is_named(
    here: Path, built: Path, harm: str
) -> None:
    """Somebody tidied up after the scan, or the damage lies too deep for the scan."""
    config = load_config(base_model=str(built / "sd1"), resolution=SIDE)
    (picture,) = pictures_of("a")
    assert picture.digest  # is part of what makes a run this run
    picture.path.unlink()
    if harm != "removed":
        picture.path.write_bytes({"replaced": b"no picture", "hollow": hollow_png()}[harm])
    phase = train_lora.Phase("encoding images", 1, Emitter(), StopRequest())
    models, shelf = models_of(config), Shelf(None, CPU, Emitter())
    with pytest.raises(TrainError, match=r"0\.png"):
        list(train_lora.encode_images(models, [(picture, (SIDE, SIDE))], config, shelf, phase))


# --- what is kept for later runs ---


def packs_in(folder: Path) -> list[Path]:
    """List the files in a cache folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def kept_things(folder: Path) -> set[str]:
    """List what lies in all packs of a cache folder."""
    things: set[str] = set()
    for path in packs_in(folder):
        with safe_open(path, "pt") as pack:
            things |= {name.partition("/")[0] for name in pack.keys()}  # noqa: SIM118, no dictionary
    return things


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_later_run_finds_what_was_encoded(
    here: Path, built: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers come from the disk, and no encoder is loaded."""
    first = encode(built / family, "a", "b", flip=True, cache_dir="kept").cache
    for library in (diffusers.AutoencoderKL, transformers.CLIPTextModel):
        monkeypatch.setattr(library, "from_pretrained", None)
    second = encode(built / family, "a", "b", flip=True, cache_dir="kept").cache

    for one, other in zip(first.images, second.images, strict=True):
        assert torch.equal(one.latent_dist, other.latent_dist)
        assert torch.equal(one.time_ids, other.time_ids)
    for text in ("a", "b", ""):
        assert torch.equal(first.texts[text]["prompt_embeds"], second.texts[text]["prompt_embeds"])
        assert ("pooled_prompt_embeds" not in first.texts[text]) == (family == "sd1")


def test_what_is_kept_equals_what_is_not(here: Path, built: Path) -> None:
    """A folder for the cache changes no bit of the result."""
    kept, made = (encode(built / "sd1", "a", cache_dir=folder).cache for folder in ("kept", None))

    assert torch.equal(kept.images[0].latent_dist, made.images[0].latent_dist)
    assert torch.equal(kept.texts["a"]["prompt_embeds"], made.texts["a"]["prompt_embeds"])


@pytest.mark.parametrize(
    ("changes", "texts", "images"),
    [
        ({}, 0, 0),
        ({"lora_rank": 2, "steps": 7, "trigger_words": ["other"]}, 0, 0),
        ({"resolution": SIDE + 64, "bucket_upscale": True}, 0, 1),
        ({"flip": True}, 0, 1),
        ({"sample_prompts": ["another"]}, 1, 0),
    ],
)
def test_only_what_changes_the_result_is_encoded_anew(
    here: Path, built: Path, changes: Record, texts: int, images: int
) -> None:
    """Each thing is known by all that it depends on, and by nothing else."""
    prompts = {"sample_prompts": ["a prompt"]}
    encode(built / "sd1", "a", cache_dir="kept", **prompts)
    before = kept_things(here / "kept")
    encode(built / "sd1", "a", cache_dir="kept", **{**prompts, **changes})

    assert len(kept_things(here / "kept") - before) == texts + images


def test_another_picture_under_the_same_name_is_encoded_anew(here: Path, built: Path) -> None:
    """Bytes count, names do not."""
    (first,) = encode(built / "sd1", "a", cache_dir="kept").cache.images
    pictures = pictures_of("a", "b")
    pictures[1].path.rename(pictures[0].path)
    config = load_config(base_model=str(built / "sd1"), resolution=SIDE, cache_dir="kept")
    trainer = LoRATrainer(config, Emitter(), StopRequest())
    trainer.models = models_of(config)
    (second,) = trainer.encode(dataset_of(pictures[:1], config)).images

    assert not torch.equal(first.latent_dist, second.latent_dist)


def test_models_share_what_is_the_same(here: Path, built: Path) -> None:
    """Weights are part of the name: another text encoder reads anew, the same VAE does not."""
    encode(built / "sd1", "a", cache_dir="kept")
    before = kept_things(here / "kept")
    encode(built / "sd2", "a", cache_dir="kept")
    vaes = [train_lora.sampled_digest(file) for file in built.glob("sd[12]/vae/*.safetensors")]

    assert vaes[0] == vaes[1]
    assert len(kept_things(here / "kept")) == 2 * len(before) - 1


def test_a_torn_file_is_made_again(here: Path, built: Path) -> None:
    """A full disk or a power cut costs the time to encode, and nothing else."""
    first = encode(built / "sd1", "a", cache_dir="kept").cache
    for path in (here / "kept").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-7])
    second = encode(built / "sd1", "a", cache_dir="kept").cache

    assert torch.equal(first.images[0].latent_dist, second.images[0].latent_dist)


def same_cache(one: Cache, other: Cache) -> bool:
    """Compare all numbers of two caches."""
    return all(
        torch.equal(a.latent_dist, b.latent_dist) and torch.equal(a.time_ids, b.time_ids)
        for a, b in zip(one.images, other.images, strict=True)
    ) and all(
        torch.equal(one.texts[text]["prompt_embeds"], other.texts[text]["prompt_embeds"])
        for text in one.texts
    )


def damage(path: Path) -> None:
    """Flip a bit of the last number in a file."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.unlink()  # else it would change under those that have it mapped
    path.write_bytes(content)


def test_a_flipped_bit_is_noticed_told_and_made_again(here: Path, built: Path) -> None:
    """Once: the next run finds what is whole, and has nothing to tell."""
    first = encode(built / "sd1", *"abc", cache_dir="kept")
    for path in packs_in(here / "kept"):
        damage(path)
    second, third = (encode(built / "sd1", *"abc", cache_dir="kept") for _ in range(2))

    assert same_cache(first.cache, second.cache)
    assert same_cache(first.cache, third.cache)
    told = [warning["data"] for warning in second.recorder.of_type("warning")]
    assert second.recorder.codes() == ["cache_damaged"] * 2  # one for texts, one for images
    assert [data["things"] for data in told] == [1, 1]
    assert (first.recorder.codes(), third.recorder.codes()) == ([], [])


def test_swapped_things_are_noticed(here: Path, built: Path) -> None:
    """Another image's latents are as finite and as well formed as the right ones."""
    first = encode(built / "sd1", "a", "b", cache_dir="kept").cache
    for path in packs_in(here / "kept"):
        tensors = load_file(path)
        one, other = sorted({name.partition("/")[0] for name in tensors})[:2]
        for part in {name.partition("/")[2] for name in tensors}:
            mine, yours = f"{one}/{part}", f"{other}/{part}"
            tensors[mine], tensors[yours] = tensors[yours].clone(), tensors[mine].clone()
        path.unlink()
        save_file(tensors, path)
    second = encode(built / "sd1", "a", "b", cache_dir="kept")

    assert same_cache(first, second.cache)
    assert [w["data"]["things"] for w in second.recorder.of_type("warning")] == [1, 1]


def test_swapped_packs_are_noticed(here: Path, built: Path) -> None:
    """A pack is named after its bytes; under another name it is made again."""
    first = encode(built / "sd1", "a", cache_dir="kept").cache
    encode(built / "sd1", "a", cache_dir="kept", sample_prompts=["another"])
    one, other = next(
        folder for folder in map(packs_in, (here / "kept").iterdir()) if len(folder) == 2
    )
    one.rename(here / "aside")
    other.rename(one)
    (here / "aside").rename(other)
    second = encode(built / "sd1", "a", cache_dir="kept")

    assert same_cache(first, second.cache)
    assert second.recorder.codes() == ["cache_damaged"]


def fill(shelf: Shelf, *names: str, made: list[str] | None = None) -> list[train_lora.Tensors]:
    """Let a shelf give back one small thing for every name, and note those that are made."""
    phase = train_lora.Phase("encoding", len(names), shelf.events, StopRequest())
    keys = [train_lora.digest_of(name) for name in names]

    def make(missing: Iterable[str]) -> Iterator[train_lora.Tensors]:
        for name in missing:
            if made is not None:
                made.append(name)
            chance = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            numbers_of = torch.randn((2, 3), generator=chance)
            yield {"a": numbers_of, "b": numbers_of.sum().half()}

    found = shelf.fill(["origin"], dict(zip(keys, names, strict=True)), make, phase)
    return [found[key] for key in keys]


def equal_things(found: list[train_lora.Tensors], wanted: list[train_lora.Tensors]) -> bool:
    """Compare things with all their numbers."""
    return [{n: t.tolist() for n, t in kept.items()} for kept in found] == [
        {n: t.tolist() for n, t in kept.items()} for kept in wanted
    ]


def test_no_bit_of_a_pack_can_flip_without_being_noticed(here: Path) -> None:
    """In the header or in the numbers: what is given back is right, and the damage is told."""
    wanted = fill(Shelf(None, CPU, Emitter()), "x", "y")
    fill(Shelf(here / "kept", CPU, Emitter()), "x", "y")
    (path,) = packs_in(here / "kept")
    sound = path.read_bytes()
    for bit in range(0, 8 * len(sound), 37):
        changed = bytearray(sound)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        recorder = Recorder()
        assert equal_things(fill(Shelf(here / "kept", CPU, Emitter(recorder)), "x", "y"), wanted)
        assert recorder.codes() == ["cache_damaged"]


def test_a_pack_that_cannot_be_read_at_this_moment_stays(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share may fail for an instant, or a process have too many files open."""
    digest, failures = hashlib.file_digest, [OSError(errno.ESTALE, "Stale file handle")]

    def fail_once(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return digest(*arguments)

    recorder, made = Recorder(), list[str]()
    shelf = Shelf(here / "kept", CPU, Emitter(recorder))
    fill(shelf, "x", "y")
    monkeypatch.setattr(hashlib, "file_digest", fail_once)
    fill(shelf, "x", made=made)
    assert made == ["x"]  # anew, as it could not be read
    fill(shelf, "y", made=made)
    assert made == ["x"]
    assert recorder.codes() == []


def test_what_killed_runs_left_of_packs_goes_after_a_day(here: Path) -> None:
    """What is younger may be another run's at work, and what has another name is not ours."""
    shelf, letters = Shelf(here / "kept", CPU, Emitter()), "0123456789abcdef" * 2
    fill(shelf, "x")
    (pack,) = packs_in(here / "kept")
    other = letters[::-1]
    stale = [letters, f".{letters}.77.tmp"]
    kept = [other, f".{other}.77.tmp", "notes.tmp", f"{letters}.tmp", f"{letters}0"]
    for name in stale + kept:
        (pack.parent / name).write_bytes(b"half")
        age = 0 if other in name else 2 * 86_400
        os.utime(pack.parent / name, (time.time() - age,) * 2)
    fill(shelf, "x")
    assert {path.name for path in packs_in(here / "kept")} == {pack.name, *kept}


def test_a_pack_that_gets_no_name_leaves_nothing_behind(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The things are there all the same, and the run says so once."""
    recorder, replace = Recorder(), Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if target.suffix == ".safetensors":
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    assert len(fill(Shelf(here / "kept", CPU, Emitter(recorder)), "x", "y")) == 2
    assert recorder.codes() == ["cache_failed"]
    assert packs_in(here / "kept") == []


def test_many_things_lie_in_few_files_of_a_limited_size(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system maps some 65,000 files, and a dataset may have more images."""
    names = [str(number) for number in range(500)]
    fill(Shelf(here / "one", CPU, Emitter()), *names)
    assert len(packs_in(here / "one")) == 1
    monkeypatch.setattr(train_lora, "PACK_BYTES", 100 * 26)
    fill(Shelf(here / "five", CPU, Emitter()), *names)
    assert len(packs_in(here / "five")) == 5
    assert kept_things(here / "one") == kept_things(here / "five")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_what_is_kept_is_mapped_once_for_each_pack(here: Path) -> None:
    """Memory is taken by what is read alone, and no file stays open."""
    names = [str(number) for number in range(500)]
    fill(Shelf(here / "kept", CPU, Emitter()), *names)
    held = fill(Shelf(here / "kept", CPU, Emitter()), *names)
    (path,) = packs_in(here / "kept")
    assert Path("/proc/self/maps").read_text("utf-8").count(str(path)) == 1
    assert str(path) not in [
        str(f.readlink()) for f in Path("/proc/self/fd").iterdir() if f.exists()
    ]
    assert len(held) == 500


def test_runs_that_fill_one_folder_at_once_do_not_meet(here: Path) -> None:
    """Two containers give their only process the same number."""
    wanted = fill(Shelf(None, CPU, Emitter()), *"abcdef")
    with ThreadPoolExecutor(4) as pool:
        shelves = [Shelf(here / "kept", CPU, Emitter()) for _ in range(4)]
        results = list(pool.map(lambda shelf: fill(shelf, *"abcdef"), shelves))
    made: list[str] = []
    later = fill(Shelf(here / "kept", CPU, Emitter()), *"abcdef", made=made)
    assert all(equal_things(found, wanted) for found in [*results, later])
    assert made == []
    assert all(path.suffix == ".safetensors" for path in packs_in(here / "kept"))


def test_things_that_are_alike_are_made_once(here: Path) -> None:
    """The same picture may lie in a dataset twice."""
    made: list[str] = []
    found = fill(Shelf(here / "kept", CPU, Emitter()), "a", "b", "a", made=made)
    assert sorted(made) == ["a", "b"]
    assert equal_things(found[:1], found[2:])


def test_what_was_made_before_an_end_is_kept(here: Path) -> None:
    """A run that is stopped while it encodes goes on there."""
    shelf = Shelf(here / "kept", CPU, Emitter())
    phase = train_lora.Phase("encoding", 9, Emitter(), StopRequest())

    def make(numbers: Iterable[int]) -> Iterator[train_lora.Tensors]:
        yield from ({"a": torch.tensor([number])} for number in itertools.islice(numbers, 5))
        raise train_lora.TrainingInterrupted("SIGTERM")

    numbers = {train_lora.digest_of(number): number for number in range(9)}
    with pytest.raises(train_lora.TrainingInterrupted):
        shelf.fill(["origin"], numbers, make, phase)
    assert kept_things(here / "kept") == {key for key, number in numbers.items() if number < 5}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_plan_knows_what_an_image_and_its_caption_take(
    here: Path, built: Path, family: str, flip: bool
) -> None:
    """On the disk as in memory; names and sums beside them come to little."""
    changes = {"base_model": str(built / family), "resolution": SIDE, "flip": flip}
    config = load_config(**changes)
    _, structure = train_lora.inspect_model(config)
    assert structure
    found = encode(built / family, *"abcd", flip=flip).cache
    texts = [found.texts[image.caption] for image in found.images]
    tensors = [tensor for text in texts for tensor in text.values()]
    tensors += [image.latent_dist for image in found.images]
    tensors += [image.time_ids for image in found.images]
    cpu = train_lora.DeviceFacts(kind="cpu", name="A chip")
    planned = train_lora.MemoryPlan.make(config, structure, 4, cpu).parts["cache"]
    assert 0.9 <= planned / sum(tensor.nbytes for tensor in tensors) <= 1.1


def test_a_cache_folder_that_cannot_be_written_costs_a_warning(here: Path, built: Path) -> None:
    """The run goes on in memory, and says so once."""
    (here / "kept").write_text("a file stands in the way")
    encoded = encode(built / "sd1", "a", "b", cache_dir="kept")

    assert encoded.recorder.codes().count("cache_failed") == 1
    assert len(encoded.cache.images) == 2


# --- what the text encoders make of it ---

CAPTION = "zkb, a photo of a cat, (dog:1.2) running in the rain!"


def pipeline(folder: Path, family: str) -> Any:
    """Load diffusers' own pipeline."""
    if family == "sdxl":
        return diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    return diffusers.StableDiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("text", [CAPTION, "", "of " * 100])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_caption_is_read_as_by_the_pipeline(
    here: Path, built: Path, family: str, text: str
) -> None:
    """Bit for bit, the empty prompt and one that is too long included."""
    found = encode(built / family, text).cache.texts[text]
    wanted, _ = pipeline(built / family, family).encode_prompt(text, "cpu", 1, False)
    assert list(found) == ["prompt_embeds"]
    assert torch.equal(found["prompt_embeds"], wanted)


@pytest.mark.parametrize("text", [CAPTION, "", "of " * 100])
def test_a_caption_is_read_as_by_the_pipeline_with_two_encoders(
    here: Path, built: Path, text: str
) -> None:
    """Hidden states and their sum, bit for bit."""
    found = encode(built / "sdxl", text).cache.texts[text]
    encode_prompt = pipeline(built / "sdxl", "sdxl").encode_prompt
    hidden, _, pooled, _ = encode_prompt(text, do_classifier_free_guidance=False)
    assert torch.equal(found["prompt_embeds"], hidden)
    assert torch.equal(found["pooled_prompt_embeds"], pooled)


def test_silence_is_what_the_pipeline_takes_for_no_negative_prompt(here: Path, built: Path) -> None:
    """SDXL was trained with zeros there."""
    encoded = encode(built / "sdxl", "a")
    sketch = train_lora.Sketch(SIDE, SIDE, steps=1, guidance=7.0, negative="")
    pairs = train_lora.read_pairs(encoded.models, encoded.cache, ["a"], sketch)
    _, hidden, _, pooled = pipeline(built / "sdxl", "sdxl").encode_prompt("a")
    assert torch.equal(pairs["prompt_embeds"][:1], hidden)
    assert torch.equal(pairs["pooled_prompt_embeds"][:1], pooled)


def test_every_text_is_read_once(here: Path, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions that are alike share one embedding; prompts of samples are read too."""
    read: list[int] = []
    forward = transformers.CLIPTextModel.forward

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        read.append(1)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(transformers.CLIPTextModel, "forward", counted)
    encoded = encode(built / "sd1", "a", "b", "a", "a", sample_negative_prompt="bad")
    assert set(encoded.cache.texts) == {"a", "b", "zkb in the snow", "bad"}
    assert len(read) == 4


def test_texts_are_read_by_the_encoders_as_they_are_while_these_learn(
    here: Path, built: Path
) -> None:
    """Nothing is cached then but token ids, and the answer is that of the pipeline."""
    encoded = encode(built / "sd1", "a", train_text_encoder=True)
    assert encoded.cache.texts["a"].keys() == {"input_ids_1"}
    with torch.no_grad():
        found = encoded.models.read_text(encoded.cache.read(["a"]))
    wanted, _ = pipeline(built / "sd1", "sd1").encode_prompt("a", "cpu", 1, False)
    assert torch.equal(found["prompt_embeds"], wanted)


def summed_up(text: train_lora.Conditioning) -> torch.Tensor:
    """Take the sum of the only caption of a text."""
    return text["pooled_prompt_embeds"][0]


def test_a_batch_of_captions_keeps_their_order(here: Path, built: Path) -> None:
    """Every image is told its own caption."""
    encoded = encode(built / "sdxl", "a", "b")
    found = encoded.cache.read(["b", "a", "b"])
    texts = encoded.cache.texts
    for index, caption in enumerate("bab"):
        assert torch.equal(found["prompt_embeds"][index], texts[caption]["prompt_embeds"][0])
        assert torch.equal(found["pooled_prompt_embeds"][index], summed_up(texts[caption]))


@pytest.mark.parametrize(("words", "codes"), [(75, []), (76, ["caption_truncated"])])
def test_a_caption_that_is_too_long_is_warned_of(
    here: Path, built: Path, words: int, codes: list[str]
) -> None:
    """75 tokens are read between the marks of start and end; `of` is one token."""
    long = " ".join(["of"] * words)
    recorder = encode(built / "sd2", long, long, "short").recorder
    assert recorder.codes() == codes
    found = [warning["data"] for warning in recorder.of_type("warning")]
    told = {"captions": 2, "files": ["0.png", "1.png"], "estimated": False}
    assert found == [told] * len(codes)


def pieces(tokenizer: Any, text: str, count: int) -> torch.Tensor:
    """Cut the tokens of a text into pieces of 75, each with both ends, and fill them up."""
    words = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    begin, end, fill = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = []
    for number in range(count):
        row = [begin, *words[75 * number : 75 * number + 75], end]
        rows.append(row + [fill] * (77 - len(row)))
    return torch.tensor(rows)


def read_by_hand(folder: Path, text: str, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Let the encoders of a folder read piece after piece, as A1111 and ComfyUI do."""
    hidden, pooled = [], None
    for suffix in [""] + ["_2"] * (folder / "text_encoder_2").is_dir():
        cls = transformers.CLIPTextModelWithProjection if suffix else transformers.CLIPTextModel
        encoder: Any = cls.from_pretrained(folder / f"text_encoder{suffix}")
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / f"tokenizer{suffix}")
        rows = pieces(tokenizer, text, count)
        with torch.no_grad():
            said = [encoder(row[None], output_hidden_states=True) for row in rows]
        two = (folder / "text_encoder_2").is_dir()
        layers = [one.hidden_states[-2] if two else one.last_hidden_state for one in said]
        hidden.append(torch.cat(layers, dim=1))
        pooled = said[0].text_embeds if suffix else None
    return torch.cat(hidden, dim=-1), pooled


@pytest.mark.parametrize("words", [0, 75, 76, 300])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_long_caption_is_read_piece_by_piece(
    here: Path, built: Path, family: str, words: int
) -> None:
    """Each piece has both ends; empty ones follow a short text, and the first is summed up."""
    text = " ".join(["of", "cat", "to"] * 100).split()[:words]
    caption = " ".join(text)
    encoded = encode(built / family, caption, max_tokens=225)
    found = encoded.cache.texts[caption]
    hidden, pooled = read_by_hand(built / family, caption, 3)
    assert found["prompt_embeds"].shape == (1, 3 * 77, hidden.shape[-1])
    assert torch.allclose(found["prompt_embeds"], hidden, atol=1e-5)
    assert pooled is None or torch.allclose(found["pooled_prompt_embeds"], pooled, atol=1e-5)
    assert encoded.recorder.codes() == (["caption_truncated"] if words > 225 else [])


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_pieces_are_read_alike_while_text_encoders_learn(
    here: Path, built: Path, family: str
) -> None:
    """In batches, each text for itself."""
    long = " ".join(["of"] * 100)
    cached = encode(built / family, long, "a", max_tokens=150).cache.read([long, "a"])
    learning = encode(built / family, long, "a", max_tokens=150, train_text_encoder=True)
    with torch.no_grad():
        found = learning.models.read_text(learning.cache.read([long, "a"]))
    assert found.keys() == cached.keys()
    assert all(torch.allclose(found[name], cached[name], atol=1e-5) for name in found)


@pytest.mark.parametrize("skip", [1, 2])
@pytest.mark.parametrize("single", [False, True])
def test_clip_skip_reads_an_earlier_layer(here: Path, built: Path, skip: int, single: bool) -> None:
    """As A1111 and kohya's trainer count, with the norm that stands behind the last one."""
    base = built / ("sd1.safetensors" if single else "sd1")
    beside: dict[str, Any] = {"model_config_path": str(built / "sd1")} if single else {}
    found = encode(base, CAPTION, clip_skip=skip, **beside).cache.texts[CAPTION]["prompt_embeds"]
    encoder: Any = transformers.CLIPTextModel.from_pretrained(built / "sd1" / "text_encoder")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(built / "sd1" / "tokenizer")
    with torch.no_grad():
        layers = encoder(pieces(tokenizer, CAPTION, 1), output_hidden_states=True).hidden_states
        wanted = encoder.final_layer_norm(layers[-skip])
    assert torch.allclose(found, wanted, atol=1e-6)
    assert len(layers) == 3


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_the_last_layer_but_one_is_read_without_being_asked_for(
    here: Path, built: Path, family: str
) -> None:
    """It is what SD 2 and SDXL were made for, so that to ask for it changes nothing."""
    plain, asked = (encode(built / family, "a", clip_skip=n).cache.texts["a"] for n in (None, 2))
    assert all(torch.equal(plain[name], asked[name]) for name in plain)


def test_what_packed_encoders_read_is_not_taken_for_what_whole_ones_read(
    here: Path, built: Path
) -> None:
    """Large text encoders are packed as the denoiser is; what whole ones read stays valid."""
    models = models_of(load_config(base_model=str(built / "sd1"), resolution=SIDE))
    base, shelf = models.base, Shelf(here / "kept", CPU, Emitter())
    phase = train_lora.Phase("encoding", 1, Emitter(), StopRequest())
    (part,) = base.family.text_encoders
    large = dataclasses.replace(part, packed="no layer, as that takes a package")
    family = dataclasses.replace(base.family, text_precision="bf16", text_encoders=(large,))
    parts = {**base.parts, large: base.parts[part]}
    models = dataclasses.replace(models, base=dataclasses.replace(base, family=family, parts=parts))
    tokens, packs = {"a": train_lora.read_tokens("a", models)}, list[int]()
    for models.base_precision in ("auto", "nf4", "nf4", "bf16"):
        train_lora.read_texts(models, tokens, shelf, phase)
        packs.append(len(packs_in(here / "kept")))
    assert packs == [1, 2, 2, 2]


def test_what_is_kept_of_one_layer_is_not_taken_for_another(here: Path, built: Path) -> None:
    """Nor what is kept of a text in one piece for one in several; a second run finds its own."""
    made = [
        encode(built / "sd1", "a", cache_dir="kept", clip_skip=skip, max_tokens=tokens)
        for skip, tokens in ((None, 75), (2, 75), (None, 150), (2, 75), (1, 75))
    ]
    plain, earlier, longer, again, last = (one.cache.texts["a"]["prompt_embeds"] for one in made)
    assert not torch.allclose(plain, earlier, atol=1e-3)
    assert longer.shape[1] == 2 * plain.shape[1]
    assert torch.equal(earlier, again)
    assert torch.equal(plain, last)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_as_many_tokens_are_read_as_the_text_encoders_have_places(here: Path, family: str) -> None:
    """A smaller model has fewer; what is too long for it is warned of."""
    base, long = build_tiny(family, here / "model", tokens=16), " ".join(["of"] * 15)
    found = encode(base, long)
    assert found.cache.texts[long]["prompt_embeds"].shape[1] == 16
    (warning,) = found.recorder.of_type("warning")
    assert warning["message"] == "Read up to 14 tokens: 1 caption, such as that of 0.png"


# --- memory, phases, stopping ---


def alive(*classes: type, known: frozenset[int] = frozenset()) -> list[Any]:
    """List the networks that hold memory, without tidying up first, beside those known."""
    return [each for each in gc.get_objects() if type(each) in classes and id(each) not in known]


ENCODERS = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)


def watch_calls(
    monkeypatch: pytest.MonkeyPatch, cls: Any, method: str, see: Callable[[], object]
) -> None:
    """Look at something whenever a network is used."""
    original = getattr(cls, method)

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        see()
        return original(self, *arguments, **options)

    monkeypatch.setattr(cls, method, watched)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_only_one_phase_holds_its_networks(
    here: Path, built: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text encoders go before the VAE works; it waits in main memory, where previews find it."""
    write_image(here / "data" / "a.png", (SIDE, SIDE))
    gc.collect()
    seen: dict[str, list[type]] = {}
    vae, unet = diffusers.AutoencoderKL, diffusers.UNet2DConditionModel
    others = frozenset(map(id, alive(*ENCODERS, vae, unet)))  # of earlier tests

    def look(phase: str, *kinds: type) -> None:
        seen.setdefault(phase, [type(each) for each in alive(*kinds, known=others)])

    watch_calls(monkeypatch, vae, "encode", functools.partial(look, "vae", *ENCODERS, unet))
    watch_calls(monkeypatch, unet, "forward", functools.partial(look, "unet", *ENCODERS))
    config = load_config(
        base_model=str(built / family), resolution=SIDE, steps=1, sample_steps=1, lora_rank=1
    )
    LoRATrainer(config, Emitter()).train()
    assert seen == {"vae": [], "unet": []}


def test_phases_are_told_with_how_far_they_are(
    here: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most once a second: here every look at the clock is two seconds later."""
    ticks = itertools.count(0, 2)
    monkeypatch.setattr("time.monotonic", lambda: next(ticks))
    told = encode(built / "sd1", "a", "b", "a", "c", "d").recorder.of_type("info")
    phases = [record["data"] for record in told if record["topic"] == "phase"]
    images = [(p["done"], p["total"]) for p in phases if p["name"] == "encoding images"]
    texts = [(p["done"], p["total"]) for p in phases if p["name"] == "encoding captions"]
    assert images == [(n, 5) for n in range(5)]
    assert texts == [(done, 6) for done in range(6)]  # four captions, a prompt, its opposite


@pytest.mark.parametrize(
    ("network", "method"),
    [(diffusers.AutoencoderKL, "encode"), (transformers.CLIPTextModel, "forward")],
)
def test_a_stop_while_encoding_ends_the_run_before_the_next_batch(
    here: Path, built: Path, network: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has been learned, so nothing is saved."""
    for picture in pictures_of(*"abcde"):
        picture.path.with_suffix(".txt").write_text(picture.caption)
    stop, recorder = StopRequest(), Recorder()
    calls: list[int] = []

    def note() -> None:
        calls.append(1)
        stop.request("SIGTERM")

    watch_calls(monkeypatch, network, method, note)
    config = load_config(base_model=str(built / "sd1"), resolution=SIDE, steps=1)
    with pytest.raises(train_lora.TrainingInterrupted):
        LoRATrainer(config, Emitter(recorder), stop).train()
    last = recorder.records[-1]
    assert (last["type"], last["step"], last["reason"]) == ("interrupted", 0, "SIGTERM")
    assert last["path"] is None
    assert len(calls) == 1
    assert not (here / "out" / "checkpoints").exists()
