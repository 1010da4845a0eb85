"""Preflight: everything wrong is found at once, quickly, and without a trace."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    ROOT,
    load_config,
    snapshot,
    write_config,
    write_earlier_run,
    write_image,
    write_safetensors,
)
from processes import Ended, run_program

import train_lora

POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
NOT_ROOT = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is closed to root"
)


def validate(folder: Path, *arguments: str, **environment: Any) -> Ended:
    """Run a preflight of the config in a folder."""
    command = ("--config", "config.json", "--validate-only", *arguments)
    return run_program(*command, cwd=folder, stdin=b"", **environment)


def paths(ended: Ended) -> list[str]:
    """List the places a run complains about."""
    return [problem["path"] for problem in ended.last["problems"]]


# --- the report ---


def test_the_last_line_carries_the_whole_report(workspace: Path) -> None:
    """All that a host shows before it offers the start button."""
    (workspace / "data" / "image1.txt").write_text("a cat", encoding="utf-8")
    (workspace / "data" / "broken.png").write_bytes(b"x")
    write_config(workspace, epochs=4, batch_size=2, resolution=256)
    ended = validate(workspace, PATH="")
    assert (ended.code, ended.last["type"], ended.last["topic"]) == (0, "info", "valid")
    report = ended.last["data"]
    assert report.pop("disk_free_bytes") > report.pop("disk_needed_bytes") > 0
    assert report == {
        "images": 3,
        "skipped": 1,
        "captions_found": 1,
        "captions_missing": 2,
        "resolutions": {"320x300": 3},
        "images_per_resolution": {"256": 3},
        "regularization_images": 0,
        "validation_images": 0,
        "cropped": 0,
        "masks": 0,
        "buckets": {"256x256": {"images": 3, "cropped": 0.062, "cropped_at_most": 0.062}},
        "effective_batch": 2,
        "steps_per_epoch": 2,
        "total_steps": 6,
        "resumed_step": 0,
        "family": "sd1",
        "device": "cpu",
        "warnings": {"image_skipped": 1, "resolution_unusual": 1},
    }


def test_the_facts_come_one_by_one_before_the_report(workspace: Path) -> None:
    """Each as soon as it is known."""
    lines = validate(workspace).lines
    topics = [line["topic"] for line in lines if line["type"] == "info"]
    assert lines[0]["type"] == "start"
    assert topics == ["model", "dataset", "preset", "device", "memory", "valid"]


def test_a_model_that_is_not_cached_leaves_gaps_and_a_warning(workspace: Path) -> None:
    """Offline is no error: what is not known is null."""
    write_config(workspace, base_model="some/model")
    ended = validate(workspace, HF_HOME=str(workspace / "hub"))
    assert ended.code == 0
    assert (ended.last["data"]["family"], ended.last["data"]["disk_needed_bytes"]) == (None, None)
    assert ended.last["data"]["warnings"]["model_not_cached"] == 1


@pytest.mark.parametrize(
    ("resolution", "unusual"), [(256, True), (384, False), (512, False), (768, False), (776, True)]
)
def test_a_resolution_far_from_the_models_own_is_remarked(
    workspace: Path, resolution: int, unusual: bool
) -> None:
    """The base was made for 512; a little less and half as much again are fine."""
    write_config(workspace, resolution=resolution)
    assert ("resolution_unusual" in validate(workspace).last["data"]["warnings"]) is unusual


# --- without a trace ---


@pytest.mark.parametrize("arguments", [(), ("--fresh",), ("--debug",)])
@pytest.mark.parametrize("earlier", [False, True])
def test_preflight_writes_nothing(
    workspace: Path, earlier: bool, arguments: tuple[str, ...]
) -> None:
    """No file appears, changes or goes, whatever lies in the output folder."""
    if earlier:
        write_earlier_run(workspace / "out")
    refused = earlier and "--fresh" not in arguments  # what lies there is no run to go on with
    before = snapshot(workspace)
    assert validate(workspace, *arguments).code == refused
    assert snapshot(workspace) == before


def test_a_failed_preflight_writes_nothing(workspace: Path) -> None:
    """Nor does one that finds something wrong."""
    (workspace / "model" / "unet" / "config.json").write_text("{", encoding="utf-8")
    before = snapshot(workspace)
    assert validate(workspace).code == 1
    assert snapshot(workspace) == before


# --- places that do not work ---


def test_all_three_places_are_complained_about_at_once(workspace: Path) -> None:
    """Nobody mends one path to be told of the next."""
    (workspace / "file").touch()
    write_config(workspace, dataset_path="gone", output_path="file", base_model="nothing")
    ended = validate(workspace)
    assert (ended.code, len(ended.lines), ended.last["code"]) == (1, 1, "dataset_not_found")
    assert paths(ended) == ["dataset_path", "output_path", "base_model"]
    assert all(problem["hint"] for problem in ended.last["problems"])


@pytest.mark.parametrize("folder", ["gone", "config.json", "config.json/inner", 300 * "x"])
@pytest.mark.parametrize("knob", ["dataset_path", "regularization_path"])
def test_images_in_no_folder_are_refused(workspace: Path, knob: str, folder: str) -> None:
    """Missing, a file, below a file, or with a name no system has."""
    write_config(workspace, **{knob: folder})
    ended = validate(workspace)
    assert (ended.last["code"], paths(ended)) == ("dataset_not_found", [knob])


@NOT_ROOT
def test_a_dataset_without_the_right_to_look_is_refused(workspace: Path) -> None:
    """It exists, but not for this user."""
    (workspace / "data").chmod(0)
    assert validate(workspace).last["code"] == "dataset_not_found"


@pytest.mark.parametrize(
    "output", ["config.json", "config.json/out/deep", 300 * "y", "x/" + 300 * "y", 100 * "猫"]
)
def test_an_output_that_cannot_be_made_is_refused(workspace: Path, output: str) -> None:
    """It is a file, lies below a file, or has a name no system has."""
    write_config(workspace, output_path=output)
    ended = validate(workspace)
    assert (ended.last["code"], paths(ended)) == ("output_unusable", ["output_path"])


@POSIX
@pytest.mark.parametrize("output", ["link", "link/deep"])
def test_an_output_behind_a_broken_link_is_refused(workspace: Path, output: str) -> None:
    """A link to a disk that is not mounted must not fill the disk in front of it."""
    (workspace / "link").symlink_to(workspace / "unmounted")
    write_config(workspace, output_path=output)
    assert validate(workspace).last["code"] == "output_unusable"


@pytest.mark.parametrize("name", ["state", "checkpoints", "samples"])
def test_a_file_where_a_folder_belongs_is_refused(workspace: Path, name: str) -> None:
    """Otherwise the run would train to its end and have nowhere to put what it learned."""
    (workspace / "out").mkdir()
    (workspace / "out" / name).touch()
    ended = validate(workspace)
    assert (ended.last["code"], paths(ended)) == ("output_unusable", ["output_path"])


@POSIX
@pytest.mark.parametrize("arguments", [("--validate-only",), ()])
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_lock_that_is_no_file_is_refused(
    workspace: Path, kind: str, arguments: tuple[str, ...]
) -> None:
    """A pipe would be waited for, and what a link leads to is none of ours to make."""
    (workspace / "out").mkdir()
    if kind == "pipe":
        os.mkfifo(workspace / "out" / ".lock")
    else:
        (workspace / "out" / ".lock").symlink_to(workspace / "elsewhere")
    ended = run_program("--config", "config.json", *arguments, cwd=workspace)
    assert (ended.code, ended.last["code"]) == (1, "output_unusable")
    assert not (workspace / "elsewhere").exists()


@NOT_ROOT
def test_a_read_only_output_is_refused(workspace: Path) -> None:
    """Found out without trying to write."""
    (workspace / "out").mkdir(mode=0o555)
    assert validate(workspace).last["code"] == "output_unusable"


@POSIX
@pytest.mark.parametrize("name", ["a b", "ä ö 猫", "'quoted\"", "a\\b", "-out", 200 * "x"])
def test_a_place_may_have_any_name(workspace: Path, name: str) -> None:
    """Blanks, quotes and the letters of every language work for all three."""
    changes = {key: name + key for key in ("dataset_path", "base_model", "output_path")}
    (workspace / "data").rename(workspace / changes["dataset_path"])
    (workspace / "model").rename(workspace / changes["base_model"])
    (workspace / changes["output_path"]).mkdir()
    write_config(workspace, **changes)
    assert validate(workspace).code == 0


# --- space ---


def test_a_run_that_cannot_fit_is_refused_before_it_begins(workspace: Path) -> None:
    """A full disk after a night of training helps nobody."""
    write_config(workspace, steps=10**9, checkpoint_steps=1, validation_steps=1, resolution=2048)
    ended = validate(workspace)
    assert (ended.code, ended.last["code"], paths(ended)) == (1, "disk_full", ["output_path"])


# Eight weights of 8 by 8 take an adapter of rank × 16 numbers each. A LoRA file holds them in
# 2 bytes; each of four states holds them and two moments in 4; a picture has 3 bytes a pixel.
NUMBERS = 8 * (8 + 8)


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, 3 * 2 * 16 * NUMBERS + 4 * 12 * 16 * NUMBERS + 11 * 3 * 512**2),
        ({"lora_rank": 1}, 3 * 2 * NUMBERS + 4 * 12 * NUMBERS + 11 * 3 * 512**2),
        ({"steps": 1}, 2 * 16 * NUMBERS + 4 * 12 * 16 * NUMBERS + 3 * 512**2),
        (
            {"steps": 1, "sample_prompts": []},  # then there are up to three
            2 * 16 * NUMBERS + 4 * 12 * 16 * NUMBERS + 3 * 3 * 512**2,
        ),
        (
            {"steps": 10, "checkpoint_steps": 3, "validation_steps": 5, "resolution": 256},
            4 * 2 * 16 * NUMBERS + 4 * 12 * 16 * NUMBERS + 3 * 3 * 256**2,
        ),
    ],
)
def test_the_space_needed_is_added_up_from_shapes(
    in_workspace: Path, changes: dict[str, Any], needed: int
) -> None:
    """LoRA files, the states kept for resuming, and previews, counted by hand."""
    config = load_config(**{"sample_prompts": ["zkb"]} | changes)
    _, structure = train_lora.inspect_model(config)
    assert structure is not None
    assert (
        train_lora.disk_needed(config, structure, train_lora.ImageOrder(config, 3).total_steps)
        == needed
    )


def test_layers_without_an_adapter_take_no_space(in_workspace: Path) -> None:
    """Convolutions, norms and biases stay as they are."""
    name = "diffusion_pytorch_model.safetensors"
    config = load_config(steps=1)
    _, before = train_lora.inspect_model(config)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    kept = {f"{block}.attn{a}.to_{p}.weight": (8, 8) for a in (1, 2) for p in ("q", "k")}
    other = {f"{block}.norm1.weight": (8,), f"{block}.ff.net.0.proj.weight": (64, 8)}
    write_safetensors(in_workspace / "model" / "unet" / name, {**kept, **other})
    _, after = train_lora.inspect_model(config)
    assert before is not None
    assert after is not None
    saved = train_lora.disk_needed(config, before, 1) - train_lora.disk_needed(config, after, 1)
    assert saved == (2 + 4 * 12) * 16 * NUMBERS // 2


# --- the device ---


@POSIX
@pytest.mark.parametrize("name", ["cuda", "cuda:3", "mps"])
def test_a_device_that_training_refuses_is_refused_before(workspace: Path, name: str) -> None:
    """Preflight says no to what cannot begin."""
    (workspace / "bin").mkdir()
    write_config(workspace, device=name)
    ended = validate(workspace, PATH=str(workspace / "bin"))
    assert (ended.code, ended.last["code"]) == (1, "device_unavailable")
    assert paths(ended) == ["device"]


# --- captions that are too long ---

TEXTS = (
    *("", "a", "A photo of ZKB", "zkb person, a cat's-eye view", "word " * 90),
    *("don't can't we've I'm they'll he'd it's", "DON'T", "'s 's", "s's", "’curly’ it’s"),
    *("1234 56", "3.14", "a1b2", "x²", "½ ² ³", "Ⅷ", "٣", "$5.00 #tag @me", "#&@*%^"),
    *("hello,world!!", "...", "!!??", "(masterpiece:1.2)", '"quoted"', "— dash – en"),
    *("_under_score_", "__", "a_b", "http://x.y/z?q=1&r=2", "C:\\dir\\file"),
    *("naïve café", "e\u0301clair", "ÀÉÎ", "Straße ẞ İ ı", "ﬁ ligature", "ｆｕｌｌ", "𝔘𝔫𝔦"),
    *("日本語", "한국어", "العربية", "עברית", "Ω≈ç√∫"),
    *("😀", "😀😀😀", "👨\u200d👩\u200d👧", "🇩🇪", "a😀b"),
    *("\ttab\nnewline", "  two  spaces ", "\u00a0nbsp", "\u200bzero", "a\0b"),
    *("<|startoftext|>", "a <|endoftext|> b"),
)


@pytest.mark.parametrize("vocabulary", ["bundled", "bundled without tokenizer.json", "sd1", "sdxl"])
def test_tokens_are_counted_as_the_models_own_tokenizer_does(
    vocabulary: str, built: Path, tmp_path: Path
) -> None:
    """By the files it is made of, without what takes seconds to import."""
    from transformers import CLIPTokenizer

    folder = ROOT / "examples" / "tiny-sd" / "tokenizer"
    if vocabulary in ("sd1", "sdxl"):
        folder = built / vocabulary / "tokenizer"
    if "without" in vocabulary:
        for name in ("vocab.json", "merges.txt"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        folder = tmp_path
    count, tokenizer = train_lora.token_counter(folder), CLIPTokenizer.from_pretrained(folder)
    assert count is not None
    assert len(set(TEXTS)) >= 50
    wanted = {text: len(tokenizer(text, verbose=False).input_ids) for text in TEXTS}
    assert {text: count(text) for text in TEXTS} == wanted


@pytest.mark.parametrize("damage", ["gone", "[]", '{"a": "b"}', "no JSON"])
def test_a_tokenizer_that_cannot_be_read_counts_nothing(damage: str, tmp_path: Path) -> None:
    """It is refused when it is loaded; until then words are counted."""
    if damage != "gone":
        for name in ("vocab.json", "merges.txt"):
            (tmp_path / name).write_text(damage, encoding="utf-8")
    assert train_lora.token_counter(tmp_path) is None


def long_captions(workspace: Path, **changes: Any) -> tuple[list[Any], Path]:
    """Preflight two captions of which one is too long by a token; return what is warned of."""
    for number, words in ((1, 75), (2, 76)):
        text = " ".join(["of"] * words)
        (workspace / "data" / f"image{number}.txt").write_text(text, encoding="utf-8")
    write_config(workspace, trigger_words=["of"], **changes)
    lines = validate(workspace, HF_HUB_CACHE=str(workspace / "hub")).lines
    assert lines[-1].get("topic") == "valid"
    return [line for line in lines if line.get("code") == "caption_truncated"], workspace


def test_a_caption_that_is_too_long_is_named_before_training(workspace: Path, built: Path) -> None:
    """By the image it belongs to; the caption itself may be a page."""
    ((warned,), _) = long_captions(workspace, base_model=str(built / "sd1"), resolution=256)
    assert warned["message"] == "Read up to 75 tokens: 1 caption, such as that of image2.png"
    assert warned["data"] == {"captions": 1, "files": ["image2.png"], "estimated": False}


@pytest.mark.parametrize(("tokens", "told"), [(75, 1), (150, 0), (225, 0)])
@pytest.mark.parametrize("base", ["here", "some/model"])
def test_captions_may_be_as_long_as_was_asked_for(
    workspace: Path, built: Path, base: str, tokens: int, told: int
) -> None:
    """With the tokenizer at hand, and by a rough count without it."""
    model = str(built / "sd1") if base == "here" else base
    warned, _ = long_captions(workspace, base_model=model, resolution=256, max_tokens=tokens)
    assert len(warned) == told


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("sd1", {"clip_skip": 9}, "null or 1 or 2"),
        ("sd2", {"clip_skip": 1}, "null or 2 with"),
        ("sd2", {"clip_skip": 3}, "null or 2 with"),
        ("sdxl", {"clip_skip": 1}, "null or 2 with"),
    ],
)
def test_a_layer_that_no_program_would_read_is_refused(
    workspace: Path, built: Path, family: str, changes: dict[str, int], expected: str
) -> None:
    """SDXL is always read at its last layer but one, and SD 2 has no other."""
    write_config(workspace, base_model=str(built / family), resolution=256, **changes)
    last = validate(workspace).lines[-1]
    assert (last["type"], last["code"]) == ("error", "config_conflict")
    (problem,) = last["problems"]
    assert problem["path"] == "clip_skip"
    assert problem["expected"].startswith(expected)
    write_config(workspace, base_model=str(built / family), resolution=256, clip_skip=2)
    assert validate(workspace).lines[-1].get("topic") == "valid"


def test_repeats_make_an_epoch_longer(workspace: Path) -> None:
    """Every place in it is counted, and every image once."""
    write_image(workspace / "data" / "3_more" / "a.png", (600, 600))
    told = []
    for repeating in (False, True):
        write_config(workspace, folder_repeats=repeating)
        told.append(validate(workspace).lines[-1]["data"])
    once, thrice = told
    assert thrice["images"] == once["images"] == 4
    assert (once["steps_per_epoch"], thrice["steps_per_epoch"]) == (4, 6)


def test_without_the_tokenizer_the_count_is_called_rough(workspace: Path) -> None:
    """Of a model that is not here yet, words are counted."""
    ((warned,), _) = long_captions(workspace, base_model="some/model")
    assert warned["data"] == {"captions": 1, "files": ["image2.png"], "estimated": True}
    assert "by a rough count" in warned["message"]


def test_the_tokenizer_of_another_folder_is_not_used(workspace: Path, built: Path) -> None:
    """A single file has none of its own; what lies in the current folder is nobody's."""
    for name in ("vocab.json", "merges.txt"):
        (workspace / name).write_bytes((built / "sd1" / "tokenizer" / name).read_bytes())
    single = str(built / "sd1.safetensors")
    ((warned,), _) = long_captions(workspace, base_model=single, resolution=256)
    assert warned["data"]["estimated"] is True


def test_a_prompt_that_is_too_long_is_named_too(workspace: Path, built: Path) -> None:
    """By its knob; and of ever so many captions, the first ten are named."""
    write_config(workspace, base_model=str(built / "sd1"), sample_prompts=["of " * 80])
    for number in range(20, 35):
        write_image(workspace / "data" / f"image{number}.png", (320, 300))
        (workspace / "data" / f"image{number}.txt").write_text("of " * 80, encoding="utf-8")
    (warned,) = [
        line for line in validate(workspace).lines if line.get("code") == "caption_truncated"
    ]
    assert warned["data"]["captions"] == 16
    assert warned["data"]["files"] == [f"image{number}.png" for number in range(20, 30)]


# --- quickly ---


@pytest.mark.parametrize(("suffix", "side"), [("jpg", 1024), ("png", 1024), ("webp", 512)])
def test_a_preflight_of_100_photos_reads_none_thrice_and_imports_nothing_heavy(
    workspace: Path, suffix: str, side: int
) -> None:
    """Which is why it takes less than a second."""
    first = write_image(workspace / "data" / f"0.{suffix}", (side, side))
    for number in range(1, 97):
        os.link(first, workspace / "data" / f"{number}.{suffix}")
    program = (
        "import collections, json, sys; opened = collections.Counter()\n"
        "sys.addaudithook(lambda n, given: n == 'open' and opened.update([str(given[0])]))\n"
        f"sys.path.insert(0, {str(ROOT)!r}); import train_lora\n"
        "code = train_lora.main(['--config', 'config.json', '--validate-only'])\n"
        f"photos = [n for path, n in opened.items() if path.endswith({suffix!r})]\n"
        "heavy = sorted({'torch', 'numpy', 'diffusers', 'transformers'} & sys.modules.keys())\n"
        "print(json.dumps([code, len(photos), max(photos), heavy]), file=sys.stderr)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=workspace, capture_output=True, check=True)
    code, photos, most, heavy = json.loads(done.stderr.splitlines()[-1])
    # What Pillow has verified it does not decode: such a file is opened again.
    assert (code, most, heavy) == (0, 2 if suffix == "png" else 1, [])
    assert photos == (100 if suffix == "png" else 97)  # three are there as png anyway


def test_ten_times_the_images_take_ten_times_the_work(
    in_workspace: Path, events: train_lora.Emitter, stop: train_lora.StopRequest
) -> None:
    """Nothing in the scan looks at every pair of files; a pair-wise scan would take a hundred."""

    def calls(folder: str, images: int) -> int:
        first = write_image(in_workspace / folder / "0.png")
        for number in range(1, images):
            os.link(first, in_workspace / folder / f"{number}.png")
            (in_workspace / folder / f"{number}.txt").write_text("a cat", encoding="utf-8")
        config, made = load_config(dataset_path=folder), itertools.count()
        sys.setprofile(lambda *_: next(made))
        train_lora.scan_dataset(config, events, stop)
        sys.setprofile(None)
        return next(made)

    few = calls("few", 30)
    assert calls("many", 300) < 12 * few
