"""Every code a host may meet is reached by a real run."""

from __future__ import annotations

import contextlib
import json
import math
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    PROGRAM,
    Record,
    Recorder,
    check_stream,
    write_config,
    write_image,
    write_model,
    write_safetensors,
)
from processes import program, run_program, started
from tiny_models import build_tiny, change_weights
from tiny_runs import going_short_of_memory

import train_lora
from train_lora import ErrorCode, WarningCode

Scene = Callable[[Path], list[Record]]


def configured(*arguments: str, **changes: Any) -> Scene:
    """Set a scene in which the config alone is out of the ordinary."""

    def play(folder: Path) -> list[Record]:
        write_config(folder, **changes)
        return play_it(folder, *arguments)

    return play


def play_it(folder: Path, *arguments: str, **environment: Any) -> list[Record]:
    """Run a preflight, or with arguments of one's own something else; return its lines."""
    command = ("--config", "config.json", *(arguments or ("--validate-only",)))
    cold = bool(environment)  # which is of the kind that is read while modules are imported
    return run_program(*command, cwd=folder, cold=cold, **environment).lines


def prepared(prepare: Callable[[Path], object], *arguments: str, **changes: Any) -> Scene:
    """Set a scene in which files are out of the ordinary, and maybe the config."""

    def play(folder: Path) -> list[Record]:
        prepare(folder)
        return configured(*arguments, **changes)(folder)

    return play


def write_text(name: str, text: str) -> Callable[[Path], object]:
    """Put a text file into the workspace."""

    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")

    return write


def truncate_config(folder: Path) -> list[Record]:
    """Cut the config short."""
    (folder / "config.json").write_text('{"dataset_path": "da', encoding="utf-8")
    return play_it(folder)


def remove_images(folder: Path) -> None:
    """Leave an empty dataset."""
    shutil.rmtree(folder / "data")
    (folder / "data").mkdir()


def write_inpainting_model(folder: Path) -> None:
    """Make the base model one that repairs pictures."""
    write_model(folder / "model", in_channels=9)


def damage_model(folder: Path) -> None:
    """Append a byte to a file of the base model."""
    path = write_safetensors(folder / "model" / "text_encoder" / "model.safetensors", {"w": (4,)})
    path.write_bytes(path.read_bytes() + b"x")


def hold_output(folder: Path) -> list[Record]:
    """Preflight while the output folder is in use."""
    with train_lora.claimed(folder / "out"):
        return play_it(folder)


def take_package_away(folder: Path) -> list[Record]:
    """Run where a package is not installed."""
    text = 'raise ModuleNotFoundError("No module named jsonschema", name="jsonschema")'
    write_text("jsonschema.py", text)(folder)
    return play_it(folder, PYTHONPATH=str(folder))


def take_schema_away(folder: Path) -> list[Record]:
    """Run a copy of the program that was taken without the schema beside it."""
    shutil.copy(PROGRAM, folder / "vendored.py")
    command = [sys.executable, "vendored.py", "--config", "config.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=60, check=False)
    check_stream(done.stdout)
    return [train_lora.parse_json(line)[0] for line in done.stdout.decode().splitlines()]


def write_wide_image(folder: Path) -> None:
    """Add an image of which the most slender size keeps half."""
    write_image(folder / "data" / "wide.png", (1024, 128))


def name_folder_like_image(folder: Path) -> None:
    """Put a folder where an image would be."""
    (folder / "data" / "x.png").mkdir()


def obstruct_mirror(folder: Path) -> None:
    """Put a folder where the run keeps its events."""
    (folder / "out" / "events.jsonl").mkdir(parents=True)


# The shortest run there is; the device is named because a GPU would change what is warned of.
SHORT: Record = {"resolution": 256, "steps": 1, "sample_steps": 1, "lora_rank": 1, "device": "cpu"}


def trained(prepare: Callable[[Path], object] | None = None, **changes: Any) -> Scene:
    """Set a scene in which a tiny model is trained, in this process because torch loads slowly."""

    def play(folder: Path) -> list[Record]:
        write_tiny_run(folder, **changes)
        if prepare:
            prepare(folder)
        return start(folder)

    return play


def start(folder: Path, *listeners: Callable[[Record], None]) -> list[Record]:
    """Start a training that may fail."""
    heard = Recorder()
    config = train_lora.TrainingConfig.from_json(folder / "config.json")
    with contextlib.suppress(train_lora.TrainError):
        train_lora.LoRATrainer(config, train_lora.Emitter(heard, *listeners)).train()
    return heard.records


def write_tiny_run(folder: Path, **changes: Any) -> None:
    """Put a tiny model into the workspace and a config that does not depend on the folder."""
    build_tiny("sd2", folder / "tiny")
    places = {"dataset_path": "data", "base_model": "tiny", "output_path": "out"}
    paths = {key: str(folder / name) for key, name in places.items()}
    write_config(folder, **{**SHORT, **paths, **changes})


def poison(part: str, name: str, row: int | None = None) -> Callable[[Path], None]:
    """Put what is no number into the weights of the base model."""
    stem = "model" if part.startswith("text") else "diffusion_pytorch_model"

    def prepare(folder: Path) -> None:
        path, rows = folder / "tiny" / part / f"{stem}.safetensors", slice(row, row and row + 1)
        change_weights(path, lambda weights: weights[name][rows].fill_(math.nan))

    return prepare


def poison_a_word(folder: Path) -> None:
    """Make the base model fail on the caption of one image."""
    vocabulary = json.loads((folder / "tiny" / "tokenizer" / "vocab.json").read_text("utf-8"))
    row = vocabulary["q</w>"]
    poison("text_encoder", "text_model.embeddings.token_embedding.weight", row)(folder)
    write_text("data/image1.txt", "q")(folder)


def limit_memory(folder: Path) -> list[Record]:
    """Allow the process little more memory than it has when training is about to begin."""
    write_tiny_run(folder, batch_size=64, gradient_checkpointing=False)
    build_tiny("sd2", folder / "tiny", vae_levels=4)  # which has more to compute
    # A fork could use what tests before it have freed.
    with started(*program(), cwd=folder, cold=True) as child:
        lines = []
        for line in child.stdout:
            lines.append(line)
            if b'"phase":"loading"' in line:
                statm = Path(f"/proc/{child.process.pid}/statm").read_text(encoding="ascii")
                limit = int(statm.split()[0]) * resource.getpagesize() + 2**28
                resource.prlimit(child.process.pid, resource.RLIMIT_AS, (limit, limit))
    check_stream(b"".join(lines))
    return [json.loads(line) for line in lines]


def run_short_of_memory(folder: Path) -> list[Record]:
    """Train where memory runs out once."""
    write_tiny_run(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lora.LoRATrainer, "go", going_short_of_memory(1))
        return start(folder)


class Remover(Recorder):
    """A listener that removes the output folder once the device is known."""

    def __init__(self, output: Path) -> None:
        """Take the folder."""
        super().__init__()
        self.output = output

    def __call__(self, record: Record) -> None:
        """Keep the record, and maybe strike."""
        super().__call__(record)
        if record.get("topic") == "device":
            shutil.rmtree(self.output)


def remove_output(folder: Path) -> list[Record]:
    """Train while somebody tidies up."""
    write_tiny_run(folder)
    return start(folder, Remover(folder / "out"))


def obstruct(name: str, *, by_folder: bool) -> Callable[[Path], object]:
    """Put a folder where the run writes a file, or a file where it writes a folder."""

    def prepare(folder: Path) -> None:
        path = folder / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if by_folder:
            path.mkdir()
        else:
            path.touch()

    return prepare


def again(change: Callable[[Path], object], **changes: Any) -> Scene:
    """Train once, change something, and start again."""

    def play(folder: Path) -> list[Record]:
        write_tiny_run(folder, **changes)
        start(folder)
        change(folder)
        return start(folder)

    return play


def ask_for_nonsense(folder: Path) -> list[Record]:
    """Ask a run for what it does not know, once it has begun."""
    write_tiny_run(folder, steps=2)

    def ask(record: Record) -> None:
        if record.get("topic") == "dataset":
            write_text("out/request.json", '{"pause": true}')(folder)

    return start(folder, ask)


def damage_newest_state(folder: Path) -> None:
    """Flip what the last update of a run of two wrote."""
    (folder / "out" / "state" / "step_2" / "adapter.safetensors").write_bytes(b"flipped")


def damage_cache(folder: Path) -> list[Record]:
    """Flip a bit in everything that is kept for later runs, and start another one."""
    write_tiny_run(folder, cache_dir=str(folder / "kept"))
    start(folder)
    for path in (folder / "kept").rglob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    shutil.rmtree(folder / "out")
    return start(folder)


def write_sd2_file(folder: Path) -> None:
    """Write the header of a single file of SD 2, which does not say what it predicts."""
    unet = "model.diffusion_model.input_blocks"
    shapes: dict[str, tuple[int, ...]] = {
        f"{unet}.0.0.weight": (8, 4, 3, 3),
        f"{unet}.1.1.proj_in.weight": (8, 8),
        "cond_stage_model.model.ln_final.weight": (8,),
    }
    write_safetensors(folder / "sd2.safetensors", shapes)


def change_image_after_the_check(folder: Path) -> list[Record]:
    """Overwrite an image as soon as the dataset has been found sound."""
    write_tiny_run(folder)

    def overwrite(record: Record) -> None:
        if record.get("topic") == "dataset":
            write_text("data/image1.png", "no image any more")(folder)

    return start(folder, overwrite)


def obstruct_a_checkpoint_meanwhile(folder: Path) -> list[Record]:
    """Put a folder where the next checkpoint goes, once the run has begun."""
    write_tiny_run(folder, steps=2, checkpoint_steps=1)

    def put(record: Record) -> None:
        if record.get("topic") == "dataset":
            obstruct("checkpoints/lora_step_1.safetensors", by_folder=True)(folder)

    return start(folder, put)


def compile_without_compiler(folder: Path) -> list[Record]:
    """Ask for compiled blocks where there is no C++ compiler, and no earlier result."""
    from torch._inductor import config

    write_tiny_run(folder, compile="on")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config.cpp, "cxx", ("/nowhere/c++",))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "compiled"))
        return start(folder)


def have_weights_that_cannot_be_read(folder: Path) -> list[Record]:
    """Let PEFT fail to unpack a layer, after all has been learned."""

    def fail(_: object) -> None:
        raise NotImplementedError("packed in another way")

    write_tiny_run(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft.utils.integrations.dequantize_module_weight", fail)
        return start(folder)


# These take a card; tests/test_speed.py reaches them by their parts.
BY_HARDWARE = {WarningCode.MEMORY_SPILLED, WarningCode.CUDA_GRAPH_FAILED}
# tests/test_several_processes.py, tests/families, tests/test_optimizers.py and
# tests/test_validation.py and tests/test_new_word.py reach these, with what they need for it.
ELSEWHERE = {ErrorCode.PROCESS_LOST, WarningCode.BASE_DISTILLED}
ELSEWHERE |= {WarningCode.LEARNING_RATE_HIGH, WarningCode.OVERFITTED, WarningCode.WORD_KNOWN}

ERRORS: dict[ErrorCode, Scene] = {
    ErrorCode.CONFIG_NOT_FOUND: lambda folder: play_it(folder, "--config", "gone.json"),
    ErrorCode.CONFIG_NOT_JSON: truncate_config,
    ErrorCode.CONFIG_INVALID: configured(lora_rank=0),
    ErrorCode.CONFIG_CONFLICT: configured(output_path="data"),
    ErrorCode.DATASET_NOT_FOUND: configured(dataset_path="gone"),
    ErrorCode.DATASET_EMPTY: prepared(remove_images),
    ErrorCode.REPEATS_INVALID: prepared(
        write_text("data/repeats.json", '{"gone": 2}'), folder_repeats=True
    ),
    ErrorCode.CAPTIONS_MISSING: configured(trigger_words=[]),
    ErrorCode.MODEL_NOT_FOUND: configured(base_model="gone"),
    ErrorCode.MODEL_UNSUPPORTED: prepared(write_inpainting_model),
    ErrorCode.MODEL_DAMAGED: prepared(damage_model),
    ErrorCode.OUTPUT_UNUSABLE: configured(output_path="config.json"),
    ErrorCode.OUTPUT_BUSY: hold_output,
    ErrorCode.DISK_FULL: configured(
        steps=10**9, checkpoint_steps=1, validation_steps=1, resolution=2048
    ),
    ErrorCode.PACKAGE_MISSING: take_package_away,
    ErrorCode.RUN_CHANGED: again(lambda folder: write_tiny_run(folder, seed=1)),
    ErrorCode.RUN_EXISTS: trained(obstruct("lora_final.safetensors", by_folder=False)),
    ErrorCode.STATE_DAMAGED: trained(obstruct("state/step_1", by_folder=True)),
    ErrorCode.IMAGE_UNREADABLE: change_image_after_the_check,
    ErrorCode.DEVICE_UNAVAILABLE: trained(device="cuda:99"),
    ErrorCode.LATENTS_NOT_FINITE: trained(poison("vae", "encoder.conv_in.bias")),
    ErrorCode.LOSS_NOT_FINITE: trained(poison("unet", "conv_out.bias"), steps=20),
    ErrorCode.OUT_OF_MEMORY: limit_memory,
    ErrorCode.SAVE_FAILED: trained(obstruct("loss_history.csv", by_folder=True)),
    ErrorCode.INTERNAL_ERROR: take_schema_away,
}

WARNINGS: dict[WarningCode, Scene] = {
    WarningCode.CONFIG_VALUE_TWICE: configured(seed=1, training_params={"seed": 2}),
    WarningCode.KNOB_WITHOUT_EFFECT: configured(steps=5, epochs=3),
    WarningCode.LEARNING_RATE_LOW: configured(learning_rate=5e-6),
    WarningCode.RESOLUTION_UNUSUAL: configured(resolution=2048),
    WarningCode.TRIGGER_WORDS_EMPTY: configured(trigger_words=[]),
    WarningCode.ADAPTER_UNREAD: configured(adapter="lokr"),
    WarningCode.IMAGE_SKIPPED: prepared(write_text("data/x.png", "no image")),
    WarningCode.FOLDER_SKIPPED: prepared(name_folder_like_image),
    WarningCode.FILES_UNREAD: prepared(write_text("data/image1.caption", "a cat")),
    WarningCode.REPEATS_IGNORED: prepared(write_text("data/10_zkb/a.txt", "a cat")),
    WarningCode.IMAGES_SMALL: configured(resolution=512),
    WarningCode.IMAGES_CROPPED: prepared(write_wide_image),
    WarningCode.CAPTION_UNUSABLE: prepared(write_text("data/image1.txt", "")),
    WarningCode.METADATA_LINE_REFUSED: prepared(write_text("data/metadata.jsonl", "no JSON")),
    WarningCode.MODEL_NOT_CACHED: configured(base_model="some-body/that-is-not-cached"),
    WarningCode.CAPTION_TRUNCATED: trained(write_text("data/image1.txt", "cat " * 76)),
    WarningCode.PRECISION_CHANGED: trained(mixed_precision="fp16"),
    WarningCode.UPDATE_RETRIED: run_short_of_memory,
    WarningCode.UPDATE_SKIPPED: trained(poison_a_word, steps=3),
    WarningCode.NOTHING_LEARNED: trained(learning_rate=1e-5),
    WarningCode.MEASURE_FAILED: have_weights_that_cannot_be_read,
    WarningCode.SAMPLE_FAILED: trained(obstruct("samples/step_1.png", by_folder=True)),
    WarningCode.PREDICTION_ASSUMED: prepared(write_sd2_file, base_model="sd2.safetensors"),
    WarningCode.CHECKPOINT_FAILED: obstruct_a_checkpoint_meanwhile,
    WarningCode.STEPS_DONE: again(lambda folder: write_tiny_run(folder, steps=1), steps=2),
    WarningCode.STATE_IGNORED: again(damage_newest_state, steps=2, checkpoint_steps=1),
    WarningCode.CACHE_DAMAGED: damage_cache,
    # A name that is just short enough, but not for the file that is written before it is renamed.
    WarningCode.COPY_FAILED: trained(loras_path=".", lora_name="\u5b57" * 80),
    WarningCode.CACHE_FAILED: trained(cache_dir="/dev/null"),
    WarningCode.COMPILE_FAILED: compile_without_compiler,
    WarningCode.REQUEST_REFUSED: ask_for_nonsense,
    WarningCode.MIRROR_FAILED: prepared(obstruct_mirror, "--debug"),
    WarningCode.WATCHER_FAILED: trained(metrics_file="/dev/null/zkb.prom"),
    WarningCode.OUTPUT_REMOVED: remove_output,
}


@pytest.mark.parametrize("code", ERRORS, ids=lambda code: code.word)
def test_every_error_code_is_the_last_line_of_some_run(workspace: Path, code: ErrorCode) -> None:
    """Each with a hint, and with at least one problem where input is to blame."""
    last = ERRORS[code](workspace)[-1]
    assert (last["type"], last["code"]) == ("error", code.word)
    assert last["hint"]
    assert last["message"]


@pytest.mark.parametrize("code", WARNINGS, ids=lambda code: code.word)
def test_every_warning_code_is_given_in_some_run(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, code: WarningCode
) -> None:
    """And the same run goes on after it."""
    monkeypatch.setenv("HF_HUB_CACHE", str(workspace / "cache"))
    lines = WARNINGS[code](workspace)
    given = [n for n, line in enumerate(lines) if line["type"] == "warning"]
    assert code.word in [lines[n]["code"] for n in given]
    assert lines[-1]["type"] != "warning"


@pytest.mark.parametrize(
    ("cases", "codes"), [(ERRORS, ErrorCode), (WARNINGS, WarningCode)], ids=["errors", "warnings"]
)
def test_the_table_holds_every_code(
    cases: dict[train_lora.Code, Scene], codes: type[train_lora.Code]
) -> None:
    """A new code comes with a run that reaches it."""
    assert set(cases) | (BY_HARDWARE | ELSEWHERE) & set(codes) == set(codes)


@pytest.mark.parametrize("code", [*ErrorCode, *WarningCode], ids=lambda code: code.word)
def test_every_code_says_what_it_means_and_what_to_do(code: train_lora.Code) -> None:
    """A host shows the word, the README the meaning, a person follows the hint."""
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", code.word)
    assert re.fullmatch(r"[A-Za-z].{9,}\.", code.meaning)
    assert re.fullmatch(r"[A-Z0-9a-z].{7,}[^\s]", code.hint)


def test_no_two_codes_share_a_word() -> None:
    """Errors and warnings can be told apart by the code alone, and no code hides another."""
    words = [code.word for cls in (ErrorCode, WarningCode) for code in cls.__members__.values()]

    assert len(set(words)) == len(words)
