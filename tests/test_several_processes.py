"""Runs that several processes share under torchrun: on a CPU, by gloo, with tiny models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROGRAM, Record, check_stream, refuse, write_config, write_image
from processes import run_program
from safetensors.torch import load_file
from tiny_models import build_tiny

import train_lora
from train_lora import ErrorCode, Problem, Team, TrainError, TrainingInterrupted

LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--monitor-interval", "0.1")
HARD_LIMIT = 100  # seconds that nothing here may take, on a machine under load
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide five captioned images and tiny bases."""
    folder = tmp_path_factory.mktemp("team")
    for number in range(5):
        picture = write_image(folder / "data" / f"{number}.png", (256 + 10 * number, 256))
        picture.with_suffix(".txt").write_text("a photo of zkb dog" + " big" * number)
    for family in ("sd1", "sdxl"):
        build_tiny(family, folder / family)
    return folder


def config_for(place: Path, output: Path, family: str = "sd1", **changes: Any) -> Path:
    """Write a config whose file is the same from start to start."""
    values: Record = {
        "dataset_path": str(place / "data"),
        "base_model": str(place / family),
        "output_path": str(output),
        "trigger_words": ["zkb"],
        "resolution": 256,
        "lora_rank": 4,
        "lora_alpha": 4,
        "lora_name": "team",
        "sample_prompts": ["zkb"],
        "learning_rate": 1e-4,
        "save_precision": "fp32",
        "steps": 12,
        "sample_steps": 1,
        "validation_steps": 6,
        "checkpoint_steps": 6,
        "device": "cpu",
    }
    output.mkdir(parents=True, exist_ok=True)
    return write_config(output.parent / f"{output.name} config", **values | changes)


def launched(processes: int, config: Path, *arguments: str) -> tuple[int, list[Record], str]:
    """Run to the end under the launcher; what is told is held against the contract."""
    command = [*LAUNCHER, "--standalone", f"--nproc-per-node={processes}", str(PROGRAM)]
    done = subprocess.run(
        [*command, "--config", str(config), *arguments],
        capture_output=True,
        timeout=HARD_LIMIT,
        check=False,
        env=ENVIRONMENT,
    )
    check_stream(done.stdout)
    lines = [json.loads(line, parse_constant=refuse) for line in done.stdout.splitlines()]
    return done.returncode, lines, done.stderr.decode()


def alone(config: Path) -> list[Record]:
    """Run to the end in one process."""
    return run_program("--config", config, cwd=config.parent, OMP_NUM_THREADS="1").lines


def learned(output: Path) -> torch.Tensor:
    """Read what a run learned: the matrices that began at zero."""
    tensors = load_file(output / "lora_final.safetensors")
    return torch.cat(
        [value.flatten() for name, value in sorted(tensors.items()) if ".lora_" in name]
    )


def differs(one: torch.Tensor, other: torch.Tensor) -> float:
    """Tell how far apart two results are, relative to their length."""
    return float((one - other).norm() / one.norm())


# --- what is learned ---------------------------------------------------------------------------


def test_two_processes_learn_what_one_learns(place: Path, tmp_path: Path) -> None:
    """With half of the images each; then the run goes on in one process, and in two again."""
    alone(config_for(place, tmp_path / "one", gradient_accumulation_steps=4))
    shared = config_for(place, tmp_path / "two", gradient_accumulation_steps=2)
    code, lines, _ = launched(2, shared)
    assert code == 0
    assert (lines[0]["processes"], lines[0]["effective_batch"]) == (2, 4)
    assert differs(learned(tmp_path / "one"), learned(tmp_path / "two")) < 1e-6
    rates = [
        (tmp_path / name / "loss_history.csv").read_text().splitlines()[-1].split(",")[2]
        for name in ("one", "two")
    ]
    assert rates[0] == rates[1]
    steps = [line["step"] for line in lines if line["type"] in ("sample", "checkpoint")]
    assert steps == [6, 6, 12, 12]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["alone", "beside a LoRA"])
def test_two_processes_learn_the_word_that_one_learns(
    lora: bool, place: Path, tmp_path: Path
) -> None:
    """The sum of their gradients moves its vectors too."""
    options: Record = {"family": "sdxl", "embedding_tokens": 2, "train_lora": lora}
    alone(config_for(place, tmp_path / "one", gradient_accumulation_steps=2, **options))
    launched(2, config_for(place, tmp_path / "two", **options))
    one, two = (
        load_file(tmp_path / name / "embeddings" / "team_embedding.safetensors")
        for name in ("one", "two")
    )
    assert one.keys() == two.keys() == {"clip_l", "clip_g"}
    assert max(differs(one[key], two[key]) for key in one) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("family", "text"), [("sdxl", False), ("sd1", True), ("sdxl", True)])
def test_three_processes_learn_what_one_learns(
    family: str, text: bool, place: Path, tmp_path: Path
) -> None:
    """Other families, and text encoders that learn too."""
    options: Record = {"family": family, "train_text_encoder": text}
    alone(config_for(place, tmp_path / "one", gradient_accumulation_steps=3, **options))
    launched(3, config_for(place, tmp_path / "three", **options))
    assert differs(learned(tmp_path / "one"), learned(tmp_path / "three")) < 1e-6


@pytest.mark.slow
def test_a_run_may_be_continued_by_another_number_of_processes(place: Path, tmp_path: Path) -> None:
    """One, two, one: as long as the images per update stay the same."""
    alone(config_for(place, tmp_path / "whole", gradient_accumulation_steps=2))
    output = tmp_path / "parts"
    alone(config_for(place, output, gradient_accumulation_steps=2, steps=4))
    _, lines, _ = launched(2, config_for(place, output, steps=8))
    assert lines[0]["resumed_step"] == 4
    alone(config_for(place, output, gradient_accumulation_steps=2))
    assert differs(learned(tmp_path / "whole"), learned(output)) < 1e-6
    code, lines, _ = launched(2, config_for(place, output, gradient_accumulation_steps=2, steps=20))
    assert (code, lines[-1]["code"]) == (1, "run_changed")
    assert lines[-1]["problems"][0]["path"] == "batch_size"


@pytest.mark.slow
def test_the_same_number_of_processes_gives_the_same_bytes(place: Path, tmp_path: Path) -> None:
    """As one process does."""
    for name in ("one", "two"):
        launched(2, config_for(place, tmp_path / name, steps=3))
    one, two = (tmp_path / name / "lora_final.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_preflight_answers_once(place: Path, tmp_path: Path) -> None:
    """The first process tells what is valid, or not; all end alike."""
    config = config_for(place, tmp_path / "out")
    code, lines, _ = launched(2, config, "--validate-only")
    assert (code, lines[-1]["topic"], lines[-1]["data"]["effective_batch"]) == (0, "valid", 2)
    code, lines, _ = launched(2, config, "--validate-only", "--set", "lora_rank=0")
    assert (code, len(lines), lines[-1]["code"]) == (1, 1, "config_invalid")


# --- stops and deaths --------------------------------------------------------------------------


@dataclass
class Running:
    """A run that two processes share, in the middle of its updates."""

    launcher: subprocess.Popen[bytes]
    ranks: list[int]  # their process ids
    output: Path
    stdout: Path

    def lines(self) -> list[Record]:
        """Read what was told so far, in whole lines."""
        whole = self.stdout.read_bytes().rpartition(b"\n")[0].splitlines()
        return [json.loads(line) for line in whole]

    def end(self) -> tuple[float, Record]:
        """Wait until nobody is left; tell how long it took, and the last line."""
        began = time.monotonic()
        self.launcher.wait(timeout=HARD_LIMIT)
        while any(map(lives, self.ranks)):
            assert time.monotonic() - began < HARD_LIMIT
            time.sleep(0.05)
        return time.monotonic() - began, self.lines()[-1]


def lives(pid: int) -> bool:
    """Look into the table of processes."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def children(pid: int) -> list[int]:
    """List the processes that one started, in their order."""
    told = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return sorted(map(int, told.split()))


@contextmanager
def running(place: Path, output: Path) -> Iterator[Running]:
    """Start a long run in two processes, and wait for its first updates."""
    config = config_for(place, output, steps=10**6, checkpoint_steps=10**6)
    stdout = output.parent / "stdout"
    command = [*LAUNCHER, "--standalone", "--nproc-per-node=2", str(PROGRAM), "--config"]
    with stdout.open("wb") as file:
        launcher = subprocess.Popen(
            [*command, str(config)], stdout=file, stderr=subprocess.DEVNULL, env=ENVIRONMENT
        )
    run = Running(launcher, [], output, stdout)
    began = time.monotonic()
    try:
        while not any(line["type"] == "progress" for line in run.lines()):
            assert launcher.poll() is None
            assert time.monotonic() - began < HARD_LIMIT
            time.sleep(0.1)
        first = run.lines()[0]["pid"]
        run.ranks = [first, *(pid for pid in children(launcher.pid) if pid != first)]
        assert len(run.ranks) == 2
        yield run
    finally:
        for pid in (launcher.pid, *run.ranks):
            if lives(pid):
                os.kill(pid, signal.SIGKILL)
        launcher.wait()


@pytest.mark.parametrize(
    "who",
    [
        "launcher",
        *(pytest.param(who, marks=pytest.mark.slow) for who in ("first", "second", "stop file")),
    ],
)
def test_a_stop_is_one_for_all(who: str, place: Path, tmp_path: Path) -> None:
    """Whoever is asked: one checkpoint, one last line, and a run that goes on from there."""
    with running(place, tmp_path / "out") as run:
        if who == "stop file":
            (run.output / "stop").touch()
        else:
            pids = {"launcher": run.launcher.pid, "first": run.ranks[0], "second": run.ranks[1]}
            os.kill(pids[who], signal.SIGTERM)
        _, last = run.end()
    check_stream(run.stdout.read_bytes())
    reason = "stop_file" if who == "stop file" else "SIGTERM"
    assert (last["type"], last["reason"]) == ("interrupted", reason)
    assert last["path"] == str(run.output / "state" / f"step_{last['step']}")
    assert [line["reason"] for line in run.lines() if line["type"] == "checkpoint"] == [
        "interrupted"
    ]


def test_the_death_of_one_is_told_by_the_first(place: Path, tmp_path: Path) -> None:
    """Within half a minute, with what a restart continues from, which then does."""
    with running(place, tmp_path / "out") as run:
        os.kill(run.ranks[1], signal.SIGKILL)
        seconds, last = run.end()
    check_stream(run.stdout.read_bytes())
    assert (last["type"], last["code"]) == ("error", "process_lost")
    assert seconds < 30
    config = config_for(place, run.output, steps=last["step"] + 1, gradient_accumulation_steps=2)
    lines = alone(config)
    assert (lines[0]["resumed_step"], lines[-1]["type"]) == (last["step"], "complete")


@pytest.mark.slow
@pytest.mark.parametrize("who", ["first", "launcher"])
def test_nobody_outlives_the_others(who: str, place: Path, tmp_path: Path) -> None:
    """Without the first, nobody is left to speak; without the launcher, all stop."""
    with running(place, tmp_path / "out") as run:
        os.kill(run.ranks[0] if who == "first" else run.launcher.pid, signal.SIGKILL)
        seconds, last = run.end()
    assert seconds < 30
    if who == "launcher":
        assert (last["type"], last["reason"]) == ("interrupted", "host_gone")


# --- the team itself ---------------------------------------------------------------------------


def test_shares_are_all_of_it_and_put_together_in_order() -> None:
    """Also where some get less, or nothing."""
    for size in (1, 2, 3, 7):
        shares = [Team(rank, size).share(range(5)) for rank in range(size)]
        assert sorted(item for share in shares for item in share) == list(range(5))
    assert Team().gather([3, 1]) == [3, 1]
    assert Team().told(lambda: "said") == "said"


def test_the_launcher_says_who_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variables that torchrun and accelerate set; without them, one is alone."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Team.found() == Team()
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert Team.found() == Team(rank=3, size=4, place=1)
    assert not Team.found().leads


def lose_touch() -> None:
    """Fail as a collective does that somebody left."""
    raise RuntimeError("Connection closed by peer")


def test_last_words_are_told_by_the_first() -> None:
    """An error keeps its code, message and problems; a stop its reason; silence is a loss."""
    first, second = Team(0, 2), Team(1, 2)
    lost = "2 processes .* is gone: Connection closed by peer"
    with pytest.raises(TrainError, match=lost) as caught, first.together():
        lose_touch()
    assert caught.value.code == ErrorCode.PROCESS_LOST
    distributed: Any = torch.distributed
    first.store = second.store = distributed.HashStore()
    problem = Problem("cat.png", "a readable image", "a torn one", "Save it anew.")
    second.leave_words(TrainError.listing(ErrorCode.IMAGE_UNREADABLE, [problem]))
    with pytest.raises(TrainError, match=r"cat\.png") as caught, first.together():
        lose_touch()
    assert caught.value.code == ErrorCode.IMAGE_UNREADABLE
    assert list(caught.value.problems) == [problem]
    second.leave_words(TrainingInterrupted("SIGINT"))
    with pytest.raises(TrainingInterrupted) as stopped, first.together():
        lose_touch()
    assert stopped.value.reason == "SIGINT"


def test_what_lacks_is_memory_and_no_process() -> None:
    """A card that is full in the middle of a sum says so, and what would help follows from it."""
    with pytest.raises(torch.OutOfMemoryError), Team(0, 2).together():
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_team_has_a_card_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The number among those of one machine chooses; who is alone may name a card."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cases = (("auto", 2, 1, 1), ("cuda", 2, 0, 0), ("cuda:0", 1, 0, 0), ("cuda:1", 1, 0, 1))
    for wanted, processes, place, index in cases:
        config = device_config(tmp_path, wanted, processes)
        assert train_lora.choose_device(config, place).index == index
    with pytest.raises(TrainError, match="device"):
        train_lora.choose_device(device_config(tmp_path, "cuda", 3), 2)


def device_config(folder: Path, device: str, processes: int) -> train_lora.TrainingConfig:
    """Load a config for a device that several processes are to share, or a card each."""
    config = train_lora.TrainingConfig.from_json(write_config(folder, device=device))
    return replace(config, processes=processes)


def test_one_card_is_not_for_several_processes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL would refuse it later; the check before a run says so too."""
    with pytest.raises(TrainError, match="card") as refused:
        train_lora.choose_device(device_config(tmp_path, "cuda:0", 2), 1)
    assert refused.value.code is ErrorCode.DEVICE_UNAVAILABLE
    path = config_for(place, tmp_path / "out", device="cuda:0")
    config = train_lora.TrainingConfig.from_json(path)
    card = train_lora.DeviceFacts(kind="cuda", name="A card", memory_free_bytes=2**36)
    monkeypatch.setattr(train_lora, "inspect_device", lambda _: card)
    with pytest.raises(TrainError) as checked:
        train_lora.LoRATrainer(config, team=Team(0, 2)).validate()
    assert checked.value.problems == refused.value.problems
