"""Base models: recognised from headers alone, refused with a reason, never run."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import load_config, write_json, write_model, write_safetensors

import train_lora
from train_lora import ErrorCode, ModelFacts

Shapes = dict[str, tuple[int, ...]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide an empty current folder and an empty Hugging Face cache."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_CACHE", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def inspect(base_model: str = "model") -> ModelFacts:
    """Tell what a base model in the current folder is."""
    facts, _ = train_lora.inspect_model(load_config(base_model=base_model))
    return facts


def refusal(base_model: str = "model") -> tuple[ErrorCode, str]:
    """Tell why a base model is refused: the code and what was found instead."""
    with pytest.raises(train_lora.TrainError) as refused:
        inspect(base_model)
    return refused.value.code, refused.value.problems[0].found


# --- single files in the original layout ---

UNET = "model.diffusion_model"
FIRST = "input_blocks.1.1"
CLIP_L = "text_model.embeddings.token_embedding.weight"
CLIP_G = "transformer.resblocks.0.attn.in_proj_weight"


def original_unet(linear: bool, channels: int = 4) -> Shapes:
    """Name the first weights of a denoiser as the original code does."""
    projection: tuple[int, ...] = (32, 32) if linear else (32, 32, 1, 1)
    attention = f"{UNET}.{FIRST}.transformer_blocks.0"
    return {
        f"{UNET}.input_blocks.0.0.weight": (32, channels, 3, 3),
        f"{UNET}.{FIRST}.proj_in.weight": projection,
        f"{attention}.attn1.to_q.weight": (32, 32),
        f"{attention}.attn1.to_out.0.weight": (32, 32),
        f"{attention}.attn2.to_k.weight": (32, 24),
        "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
    }


LABEL: Shapes = {f"{UNET}.label_emb.0.0.weight": (32, 24)}
SINGLE_FILES: dict[str, Shapes] = {
    "sd1": original_unet(False) | {f"cond_stage_model.transformer.{CLIP_L}": (9, 8)},
    "sd2": original_unet(True) | {f"cond_stage_model.model.{CLIP_G}": (24, 8)},
    "sdxl": original_unet(True)
    | LABEL
    | {
        f"conditioner.embedders.0.transformer.{CLIP_L}": (9, 8),
        f"conditioner.embedders.1.model.{CLIP_G}": (24, 8),
    },
}


@pytest.mark.parametrize("family", train_lora.FAMILIES)
def test_a_single_file_is_recognised_by_its_header(here: Path, family: str) -> None:
    """The names and shapes of the weights are enough."""
    write_safetensors(here / "model.safetensors", SINGLE_FILES[family])
    facts = inspect("model.safetensors")
    assert (facts.source, facts.cached, facts.family) == ("file", True, family)
    assert facts.native_resolution == train_lora.FAMILIES[family].native_resolution
    assert facts.weights_bytes == (here / "model.safetensors").stat().st_size
    assert facts.parameters == (facts.weights_bytes - 8 - header_bytes(here)) / 2


def header_bytes(folder: Path) -> int:
    """Read the length of a header."""
    with (folder / "model.safetensors").open("rb") as file:
        return int.from_bytes(file.read(8), "little")


def test_only_a_marked_single_file_states_its_prediction_type(here: Path) -> None:
    """An unmarked file may be of either type, which null admits."""
    write_safetensors(here / "plain.safetensors", SINGLE_FILES["sd2"])
    write_safetensors(here / "velocity.safetensors", SINGLE_FILES["sdxl"] | {"v_pred": (0,)})
    assert inspect("plain.safetensors").prediction_type is None
    assert inspect("velocity.safetensors").prediction_type == "v_prediction"


@pytest.mark.parametrize("family", train_lora.FAMILIES)
def test_the_attention_layers_are_named_alike_in_both_layouts(here: Path, family: str) -> None:
    """What the disk estimate counts is found in folders and in single files."""
    write_safetensors(here / "model.safetensors", SINGLE_FILES[family])
    _, structure = train_lora.inspect_model(load_config(base_model="model.safetensors"))
    assert structure is not None
    pattern = structure.family.denoiser.targets + r"\.weight"
    found = [name for name in structure.shapes if re.fullmatch(pattern, name)]
    assert len(found) == 3


@pytest.mark.parametrize("shape", [(), (32,)])
def test_a_first_layer_that_is_none_is_refused(here: Path, shape: tuple[int, ...]) -> None:
    """The right names with the wrong shapes are no model."""
    first: Shapes = {f"{UNET}.input_blocks.0.0.weight": shape}
    write_safetensors(here / "model", SINGLE_FILES["sd1"] | first)
    code, _ = refusal()
    assert code in (ErrorCode.MODEL_DAMAGED, ErrorCode.MODEL_UNSUPPORTED)


# --- folders ---


@pytest.mark.parametrize(
    ("family", "prediction", "native"),
    [("sd1", "epsilon", 512), ("sd2", "v_prediction", 512), ("sdxl", "epsilon", 1024)],
)
def test_a_folder_is_recognised_by_its_configs(
    here: Path, family: str, prediction: str, native: int
) -> None:
    """The denoiser's config decides, the scheduler's states the prediction type."""
    write_model(here / "model", family)
    facts = inspect()
    assert (facts.source, facts.cached, facts.family) == ("folder", True, family)
    assert (facts.prediction_type, facts.native_resolution) == (prediction, native)
    weights = sum(file.stat().st_size for file in here.glob("model/*/*.safetensors"))
    assert facts.weights_bytes == weights


@pytest.mark.parametrize(
    ("sample_size", "native"), [(96, 768), (64, 512), (None, 512), ([64, 64], 512)]
)
def test_the_native_size_is_what_the_config_says_or_else_the_familys(
    here: Path, sample_size: object, native: int
) -> None:
    """A latent pixel stands for eight."""
    write_model(here / "model", "sd1", sample_size=sample_size)
    assert inspect().native_resolution == native


def test_a_scheduler_that_says_nothing_predicts_noise(here: Path) -> None:
    """That is the default of the library that wrote the folder."""
    write_model(here / "model")
    write_json(here / "model" / "scheduler" / "scheduler_config.json", {})
    assert inspect().prediction_type == "epsilon"


def test_a_folder_of_half_precision_files_alone_is_used(here: Path) -> None:
    """Some publish nothing but the fp16 variant."""
    write_model(here / "model", "sdxl")
    whole = inspect()
    for file in here.glob("model/*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert inspect() == whole


def shard(folder: Path, stem: str) -> Path:
    """Split a file into two shards and an index; return the second shard."""
    folder.joinpath(f"{stem}.safetensors").unlink()
    shards = [f"{stem}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    write_safetensors(folder / shards[0], {"a": (4, 4)})
    write_safetensors(folder / shards[1], {"b": (2, 4)})
    index = {"metadata": {}, "weight_map": {"a": shards[0], "b": shards[1]}}
    write_json(folder / f"{stem}.safetensors.index.json", index)
    return folder / shards[1]


def test_all_shards_of_a_component_count(here: Path) -> None:
    """Large components come in several files and an index."""
    write_model(here / "model")
    before = inspect().parameters
    assert before is not None
    shard(here / "model" / "vae", "diffusion_pytorch_model")
    assert inspect().parameters == before - 16 + 16 + 8


def test_a_missing_shard_is_damage(here: Path) -> None:
    """A download that stopped halfway lacks one."""
    write_model(here / "model")
    shard(here / "model" / "unet", "diffusion_pytorch_model").unlink()
    code, _ = refusal()
    assert code is ErrorCode.MODEL_DAMAGED


@pytest.mark.parametrize("weight_map", [["a"], "a", 1, None, {"a": ["b"]}, {}, {"a": "../vae/x"}])
def test_a_senseless_index_is_damage(here: Path, weight_map: object) -> None:
    """Whatever stands where the map of weights should be."""
    write_model(here / "model")
    folder, stem = here / "model" / "unet", "diffusion_pytorch_model"
    shard(folder, stem)
    write_json(folder / f"{stem}.safetensors.index.json", {"weight_map": weight_map})
    code, _ = refusal()
    assert code is ErrorCode.MODEL_DAMAGED


# --- models of another kind ---


@pytest.mark.parametrize(
    ("channels", "kind"),
    [
        *((9, "an inpainting model"), (8, "an instruct-pix2pix model")),
        *((5, "a depth model"), (7, "a model with other inputs")),
    ],
)
@pytest.mark.parametrize("layout", ["folder", "file"])
def test_a_model_with_further_inputs_is_refused_by_name(
    here: Path, layout: str, channels: int, kind: str
) -> None:
    """It would train without complaint and produce nothing."""
    write_model(here / "folder", in_channels=channels)
    write_safetensors(here / "file", SINGLE_FILES["sd1"] | original_unet(False, channels))
    assert refusal(layout) == (ErrorCode.MODEL_UNSUPPORTED, kind)


def write_refiner_folder(path: Path) -> None:
    """Write an SDXL refiner as diffusers does: the second text encoder alone."""
    write_model(path, "sdxl")
    shutil.rmtree(path / "text_encoder")


def write_refiner_file(path: Path) -> None:
    """Write an SDXL refiner in the original layout."""
    encoder: Shapes = {f"conditioner.embedders.0.model.{CLIP_G}": (24, 8)}
    write_safetensors(path, original_unet(True) | LABEL | encoder)


def write_unet_only(path: Path) -> None:
    """Write the denoiser of an SD 1 alone."""
    write_safetensors(path, original_unet(False))


def write_large_unet_only(path: Path) -> None:
    """Write the denoiser of an SDXL alone."""
    write_safetensors(path, original_unet(True) | LABEL)


def write_bare_folder(path: Path) -> None:
    """Write a diffusers folder without text encoder."""
    write_model(path)
    shutil.rmtree(path / "text_encoder")


def write_transformer_folder(path: Path) -> None:
    """Write a diffusers folder of a transformer model."""
    write_json(path / "model_index.json", {"_class_name": "FluxPipeline"})
    write_json(path / "transformer" / "config.json", {"in_channels": 64})
    write_safetensors(path / "transformer" / "diffusion_pytorch_model.safetensors", {"w": (4, 4)})


def write_video_folder(path: Path) -> None:
    """Write a diffusers folder of a text-to-video model, which has all the parts of an SD 2."""
    write_model(path, "sd2", _class_name="UNet3DConditionModel")


def write_flux_file(path: Path) -> None:
    """Write a FLUX denoiser."""
    write_safetensors(path, {"double_blocks.0.img_attn.qkv.weight": (24, 8)})


def write_sd3_file(path: Path) -> None:
    """Write an SD 3 checkpoint."""
    write_safetensors(path, {f"{UNET}.joint_blocks.0.x_block.attn.qkv.weight": (24, 8)})


def write_kohya_lora(path: Path) -> None:
    """Write a LoRA as this program does."""
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    write_safetensors(path, {f"{stem}.lora_down.weight": (4, 8), f"{stem}.alpha": ()})


def write_diffusers_lora(path: Path) -> None:
    """Write a LoRA as diffusers does."""
    write_safetensors(path, {"unet.down_blocks.0.attn1.to_q.lora_A.weight": (4, 8)})


def write_vae_file(path: Path) -> None:
    """Write a VAE alone."""
    write_safetensors(path, {"decoder.conv_in.weight": (8, 4, 3, 3)})


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (write_refiner_folder, "refiner"),
        (write_refiner_file, "refiner"),
        (write_unet_only, "without text encoder"),
        (write_large_unet_only, "without text encoder"),
        (write_bare_folder, "without text encoder"),
        (write_transformer_folder, "transformer"),
        (write_video_folder, "UNet3DConditionModel"),
        (write_flux_file, "transformer"),
        (write_sd3_file, "transformer"),
        (write_kohya_lora, "LoRA"),
        (write_diffusers_lora, "LoRA"),
        (write_vae_file, "original"),
    ],
)
def test_a_model_of_another_kind_is_refused_by_name(
    here: Path, write: Callable[[Path], None], kind: str
) -> None:
    """The message says what it is instead."""
    write(here / "model")
    code, found = refusal()
    assert code is ErrorCode.MODEL_UNSUPPORTED
    assert kind in found


# --- pickles ---


class Payload:
    """An object that runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        """Ask the unpickler to make a folder named marker."""
        return os.mkdir, ("marker",)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "MODEL.PTH", "model.bin"])
def test_a_pickle_file_is_refused_and_never_opened(here: Path, name: str) -> None:
    """Loading one runs whatever its author wished."""
    (here / name).write_bytes(pickle.dumps(Payload()))
    code, found = refusal(name)
    assert (code, "pickle" in found) == (ErrorCode.MODEL_UNSUPPORTED, True)
    assert not (here / "marker").exists()


def test_a_pickle_in_disguise_is_damage_and_never_run(here: Path) -> None:
    """A name does not make a safetensors file."""
    (here / "model.safetensors").write_bytes(pickle.dumps(Payload()))
    code, _ = refusal("model.safetensors")
    assert code is ErrorCode.MODEL_DAMAGED
    assert not (here / "marker").exists()


@pytest.mark.parametrize(
    ("component", "file"),
    [
        ("unet", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.fp16.bin"),
        ("text_encoder", "pytorch_model.bin"),
    ],
)
def test_a_folder_with_a_component_in_pickle_alone_is_refused(
    here: Path, component: str, file: str
) -> None:
    """Each library has its own name for the same danger."""
    write_model(here / "model")
    next((here / "model" / component).glob("*.safetensors")).unlink()
    (here / "model" / component / file).write_bytes(pickle.dumps(Payload()))
    code, found = refusal()
    assert (code, "pickle" in found) == (ErrorCode.MODEL_UNSUPPORTED, True)
    assert not (here / "marker").exists()


def test_pickles_beside_sound_weights_do_not_matter(here: Path) -> None:
    """Many folders carry both; the pickle is left alone."""
    write_model(here / "model")
    (here / "model" / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    assert inspect().family == "sd1"
    assert not (here / "marker").exists()


# --- damage ---


def framed(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """Build a safetensors file around any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: object, end: object, *shape: object, dtype: str = "F16") -> dict[str, object]:
    """Describe a tensor."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


SOUND = framed({"w": entry(0, 8, 4)}, bytes(8))

DAMAGE = {
    "empty": b"",
    "three bytes": b"abc",
    "length alone": struct.pack("<Q", 10),
    "cut in the header": SOUND[:20],
    "cut in the data": SOUND[:-1],
    "appended": SOUND + b"x",
    "header longer than the file": framed({"w": entry(0, 8, 4)}, bytes(8), length=5000),
    "header beyond the format": framed({"w": entry(0, 8, 4)}, bytes(8), length=100_000_001),
    "header of all memory": framed({"w": entry(0, 8, 4)}, bytes(8), length=2**64 - 1),
    "header no JSON": framed(b"{w}"),
    "header no UTF-8": framed(b'{"\xff": 1}'),
    "header a list": framed([entry(0, 8, 4)], bytes(8)),
    "header a text": framed("w", bytes(8)),
    "header of brackets": framed(b"[" * 100_000),
    "no tensor": framed({}),
    "metadata alone": framed({"__metadata__": {"format": "pt"}}),
    "a name twice": framed(b'{"w": %s, "w": %s}' % (2 * (json.dumps(entry(0, 8, 4)).encode(),))),
    "entry a number": framed({"w": 5}),
    "no shape": framed({"w": {"dtype": "F16", "data_offsets": [0, 8]}}, bytes(8)),
    "no offsets": framed({"w": {"dtype": "F16", "shape": [4]}}, bytes(8)),
    "one offset": framed({"w": {"dtype": "F16", "shape": [4], "data_offsets": [8]}}, bytes(8)),
    "infinite offset": framed(b'{"w": {"dtype":"F16","shape":[4],"data_offsets":[0,1e999]}}'),
    "offset a text": framed({"w": entry(0, "x", 4)}, bytes(8)),
    "offsets behind the end": framed({"w": entry(0, 10**30, 4)}, bytes(8)),
    "offsets negative": framed({"w": entry(-8, 0, 4)}),
    "offsets backwards": framed({"v": entry(8, 0, 4), "w": entry(0, 8, 4)}, bytes(8)),
    "offsets overlapping": framed({"v": entry(0, 8, 4), "w": entry(0, 8, 4)}, bytes(8)),
    "offsets with a hole": framed({"v": entry(0, 8, 4), "w": entry(16, 24, 4)}, bytes(24)),
    "shape larger than its data": framed({"w": entry(0, 8, 10**9, 10**9)}, bytes(8)),
    "shape negative": framed({"w": entry(0, 8, -4)}, bytes(8)),
    "shape a fraction": framed({"w": entry(0, 8, 4.5)}, bytes(8)),
    "shape a text": framed({"w": {"dtype": "F16", "shape": "4", "data_offsets": [0, 8]}}, bytes(8)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_recognised_by_its_header(here: Path, kind: str) -> None:
    """The header must describe the bytes behind it, each of them once."""
    write_model(here / "model")
    (here / "model" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(DAMAGE[kind])
    code, _ = refusal()
    assert code is ErrorCode.MODEL_DAMAGED


def test_the_sound_file_behind_the_damaged_ones_is_accepted(here: Path) -> None:
    """So that the damage alone explains the refusals."""
    write_model(here / "model")
    (here / "model" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(SOUND)
    assert inspect().family == "sd1"


def test_a_header_beyond_16_megabytes_is_refused_unread(here: Path) -> None:
    """No model has one; spaces at its end are allowed, and reading them would take memory."""
    write_model(here / "model")
    path = here / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    header = json.dumps({"w": entry(0, 8, 4)}).encode()
    path.write_bytes(framed(header.ljust(train_lora.HEADER_BYTES), bytes(8)))
    assert inspect().family == "sd1"
    path.write_bytes(framed(header.ljust(train_lora.HEADER_BYTES + 1), bytes(8)))
    tracemalloc.start()
    code, found = refusal()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (code, "larger than any" in found) == (ErrorCode.MODEL_DAMAGED, True)
    assert peak < train_lora.HEADER_BYTES / 4


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000],
    ids=["empty", "open", "list", "null", "nan", "binary", "brackets", "braces"],
)
def test_a_config_that_is_no_json_object_is_damage(here: Path, file: str, content: bytes) -> None:
    """Each case is named with its file, none is a crash."""
    write_model(here / "model")
    (here / "model" / file).write_bytes(content)
    code, _ = refusal()
    assert code is ErrorCode.MODEL_DAMAGED


@pytest.mark.parametrize("channels", ["x", None, [4], {}, 4.5])
def test_senseless_values_in_a_config_are_damage(here: Path, channels: object) -> None:
    """A number of channels that is none makes the model unreadable."""
    write_model(here / "model", in_channels=channels)
    code, _ = refusal()
    assert code is ErrorCode.MODEL_DAMAGED


@pytest.mark.parametrize("prediction", [5, ["epsilon"], {"a": 1}, "sample"])
def test_a_prediction_type_that_cannot_be_trained_is_refused(
    here: Path, prediction: object
) -> None:
    """Only noise and velocity are known, and an event says no other."""
    write_model(here / "model")
    path = here / "model" / "scheduler" / "scheduler_config.json"
    write_json(path, {"prediction_type": prediction})
    code, _ = refusal()
    assert code in (ErrorCode.MODEL_DAMAGED, ErrorCode.MODEL_UNSUPPORTED)


@pytest.mark.parametrize(
    "missing",
    [
        *("unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        *("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"),
    ],
)
def test_a_folder_with_a_part_missing_is_damage_and_names_the_part(
    here: Path, missing: str
) -> None:
    """A copy that was cut short lacks something."""
    write_model(here / "model")
    (here / "model" / missing).unlink()
    with pytest.raises(train_lora.TrainError) as refused:
        inspect()
    assert refused.value.code is ErrorCode.MODEL_DAMAGED
    assert str(Path(missing).parent) in refused.value.problems[0].path


# --- where a base model may lie ---


@pytest.mark.parametrize(
    "base_model",
    [
        *("gone", "./gone/model", "/gone", "models/gone.safetensors", "gone/model.ckpt", "a/b/c"),
        *("~nobody-of-this-name/model", "not an id/at all", "a/" + 300 * "b", 300 * "b"),
    ],
)
def test_what_is_no_path_and_no_id_leads_nowhere(here: Path, base_model: str) -> None:
    """A mistyped path is not mistaken for something to download."""
    code, found = refusal(base_model)
    assert code is ErrorCode.MODEL_NOT_FOUND
    assert base_model[:40] in found


def test_a_leading_tilde_is_the_home_folder(here: Path) -> None:
    """Paths in a config are not seen by a shell."""
    write_model(here / "home" / "model")
    assert inspect("~/model").family == "sd1"


HUB_ID = "some-body/some.model_1"
SNAPSHOT = Path("models--some-body--some.model_1", "snapshots", "abc123")


def write_snapshot(cache: Path) -> Path:
    """Put a whole model into a Hugging Face cache as its library does, with links to blobs."""
    snapshot = write_model(cache / SNAPSHOT)
    reference = cache / SNAPSHOT.parts[0] / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text("abc123", encoding="ascii")
    for number, file in enumerate(sorted(snapshot.rglob("*.*"))):
        blob = cache / SNAPSHOT.parts[0] / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        file.symlink_to(file.rename(blob))
    return snapshot


@pytest.mark.parametrize(
    ("variables", "cache"),
    [
        ({"HF_HUB_CACHE": "cache"}, "cache"),
        ({"HUGGINGFACE_HUB_CACHE": "cache"}, "cache"),
        ({"HF_HOME": "hf"}, "hf/hub"),
        ({"HF_HOME": "elsewhere", "HF_HUB_CACHE": "cache"}, "cache"),
        ({"HF_HOME": "~/hf"}, "home/hf/hub"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/huggingface/hub"),
        ({}, "home/.cache/huggingface/hub"),
    ],
)
def test_a_hub_id_is_looked_up_where_the_hubs_own_library_keeps_it(
    here: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], cache: str
) -> None:
    """Users move the cache by environment variables."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    write_snapshot(here / cache)
    facts = inspect(HUB_ID)
    assert (facts.source, facts.cached, facts.family) == ("hub", True, "sd1")


def test_a_hub_id_that_is_not_cached_is_no_error(here: Path) -> None:
    """What is not known is null."""
    assert inspect(HUB_ID) == ModelFacts(source="hub", cached=False, hub_id=HUB_ID)


@pytest.mark.parametrize(
    "missing", ["**/*.*", "*/*.safetensors", "unet/*", "vae/*.safetensors", "text_encoder/*"]
)
def test_a_half_downloaded_model_counts_as_not_cached(
    here: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """The download will go on where it stopped: that is no damage."""
    monkeypatch.setenv("HF_HUB_CACHE", "cache")
    snapshot = write_snapshot(here / "cache")
    for file in snapshot.glob(missing):
        file.resolve().unlink()
        file.unlink()
    assert inspect(HUB_ID) == ModelFacts(source="hub", cached=False, hub_id=HUB_ID)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pickle_that_came_before_the_weights_counts_as_not_cached(
    here: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """A download of all there is was cut between the two."""
    monkeypatch.setenv("HF_HUB_CACHE", "cache")
    (weights,) = (write_snapshot(here / "cache") / part).glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    assert inspect(HUB_ID) == ModelFacts(source="hub", cached=False, hub_id=HUB_ID)


def test_a_pruned_cache_counts_as_not_cached(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links whose blobs are gone hold no weights."""
    monkeypatch.setenv("HF_HUB_CACHE", "cache")
    for file in write_snapshot(here / "cache").glob("*/*.safetensors"):
        file.resolve().unlink()
    assert inspect(HUB_ID) == ModelFacts(source="hub", cached=False, hub_id=HUB_ID)


@pytest.mark.parametrize("revision", [b"", b"\xff\xfe", b"gone", b"../../../elsewhere"])
def test_a_senseless_reference_counts_as_not_cached(
    here: Path, monkeypatch: pytest.MonkeyPatch, revision: bytes
) -> None:
    """The cache is the business of another library."""
    monkeypatch.setenv("HF_HUB_CACHE", "cache")
    write_snapshot(here / "cache")
    (here / "cache" / SNAPSHOT.parts[0] / "refs" / "main").write_bytes(revision)
    assert inspect(HUB_ID) == ModelFacts(source="hub", cached=False, hub_id=HUB_ID)


def test_a_folder_beats_a_hub_id_of_the_same_name(here: Path) -> None:
    """What lies here is what is meant."""
    write_model(here / HUB_ID)
    assert inspect(HUB_ID).source == "folder"
