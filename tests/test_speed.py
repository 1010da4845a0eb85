"""What makes updates fast, and what notices that they are not."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import write_config
from processes import Ended, run_program
from safetensors.torch import load_file
from tiny_runs import Ready, prepare, tiny_base, tiny_config
from torch._inductor.output_code import CompiledFxGraph

import train_lora
from train_lora import Batch, DeviceFacts, ImageOrder, MemoryPlan

# --- Slow updates ---


@pytest.mark.parametrize(
    ("clock", "told_at"),
    [([1, 2, 4, 11, 19, 20], 5), ([1, 2, 4, 11, 12, 20], None), ([9, 19, 30, 50, 70], None)],
)
def test_a_pace_that_drops_and_stays_low_is_noticed(
    ground: Path, monkeypatch: pytest.MonkeyPatch, clock: list[float], told_at: int | None
) -> None:
    """Against the best between two progress lines, not against the mean."""
    ready = prepare(tiny_config(ground))
    ready.models.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2**29)
    for number, ready.state.busy_seconds in enumerate(clock, start=1):
        ready.state.step = 10 * number
        ready.watch_pace()
        assert bool(ready.recorder.codes()) == (told_at is not None and number >= told_at)
    for warning in ready.recorder.of_type("warning"):
        best, latest = 0.1, (clock[4] - clock[3]) / 10
        told = {"step": 50, "seconds_per_step": latest, "best_seconds_per_step": best}
        assert warning["data"] == told


@pytest.mark.parametrize("free", [0.01, 0.5])
def test_slow_updates_on_a_full_card_are_told_once(
    ground: Path, monkeypatch: pytest.MonkeyPatch, free: float
) -> None:
    """A slow card with free memory is only slow."""
    ready = prepare(tiny_config(ground))
    ready.models.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free * 2**30), 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2**29)
    for seconds in (1.0, 2.0, 60.0, 120.0, 180.0):
        ready.state.busy_seconds, ready.state.step = seconds, ready.state.step + 10
        ready.watch_pace()
    assert ready.recorder.codes() == ["memory_spilled"] * (free < 0.03)


@pytest.mark.parametrize(("held", "spills"), [(0.9, True), (0.7, False)])
def test_a_card_that_swaps_from_the_first_update_is_told_of(
    ground: Path, monkeypatch: pytest.MonkeyPatch, *, held: float, spills: bool
) -> None:
    """Its pace never falls, but torch holds more than was free when the run began."""
    ready = prepare(tiny_config(ground))
    ready.models.device = torch.device("cuda")
    monkeypatch.setattr(ready, "memory", SimpleNamespace(free=int(0.8 * 2**30)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: int(held * 2**30))
    for ready.state.step in (1, 2, 3):
        ready.state.busy_seconds = float(ready.state.step - 1)
        ready.watch_pace()
    assert ready.recorder.codes() == ["memory_spilled"] * spills


def test_the_time_left_counts_previews_and_checkpoints(ground: Path) -> None:
    """Each as long as the last one took; what is due at this very step is still to come."""
    ready = prepare(tiny_config(ground, validation_steps=4, checkpoint_steps=5))
    ready.total_steps, ready.state.first_step = 10, 0
    ready.state.preview_seconds, ready.state.checkpoint_seconds = 100.0, 1000.0
    left = []
    for ready.state.step in (1, 4, 5, 9, 10):
        ready.state.busy_seconds = 2.0 * ready.state.step
        left.append(ready.eta_seconds())
    assert left == [18 + 300 + 2000, 12 + 300 + 2000, 10 + 200 + 2000, 2 + 100 + 1000, 100 + 1000]


def test_a_run_measures_what_its_previews_and_checkpoints_take(ground: Path) -> None:
    """A foresight rests on the last of each."""
    ready = prepare(tiny_config(ground, validation_steps=1, checkpoint_steps=2))
    ready.total_steps = 2
    ready.go()
    assert ready.state.preview_seconds > 0
    assert ready.state.checkpoint_seconds > 0


def test_main_memory_is_never_a_full_card(ground: Path) -> None:
    """On a CPU the system swaps, which its owner sees."""
    ready = prepare(tiny_config(ground))
    vars(ready)["memory"] = SimpleNamespace(free=1)
    for ready.state.step, ready.state.busy_seconds in ((1, 0.0), (2, 1.0), (3, 90.0), (4, 180.0)):
        ready.watch_pace()
    assert ready.recorder.codes() == []


# --- Recorded updates ---


class Graph:
    """What a card would repeat: the calls of an update, which read where they read before."""

    def __init__(self, ready: Ready, batch: Batch, count: int) -> None:
        """Note where the numbers lie."""
        self.ready, self.batch, self.count = ready, batch, count
        self.replays = 0

    def replay(self) -> None:
        """Make the calls."""
        models, learner = self.ready.models, self.ready.learner
        train_lora.there_and_back(models, learner, self.batch, self.count)
        self.replays += 1


def recorded(ready: Ready) -> Graph:
    """Let a run have a recording of its first update."""
    slots = list(enumerate(ready.order.window(1)))
    part = slots[: ready.config.batch_size]
    batch = train_lora.draw_batch(ready.models, ready.cache, ready.config, 1, part)
    graph = Graph(ready, batch, len(slots))
    ready.replay = train_lora.Replay(batch, len(slots), graph)
    return graph


@pytest.mark.parametrize("learns_text", [False, True])
def test_a_recording_is_given_the_numbers_of_each_update(ground: Path, learns_text: bool) -> None:
    """Pictures, noise, times and texts; what is learned is the same, dropout included."""
    choices = {"lora_dropout": 0.1, "gradient_accumulation_steps": 2}
    config = tiny_config(ground, "sdxl", train_text_encoder=learns_text, **choices)
    plain, fast = prepare(config), prepare(config)
    graph = recorded(fast)
    for ready in (plain, fast):
        ready.make_updates(3)
    assert graph.replays == 6
    assert torch.equal(plain.learner.learned, fast.learner.learned)
    losses = [[point.loss for point in ready.state.history] for ready in (plain, fast)]
    assert losses[0] == losses[1]


def test_what_a_recording_does_not_fit_is_done_call_by_call(ground: Path) -> None:
    """The last update of an epoch can have fewer images, and none counts more for it."""
    changes: dict[str, Any] = {"batch_size": 2, "steps": None, "epochs": 1}
    ready = prepare(tiny_config(ground, **changes))
    ready.order = ImageOrder(ready.config, 3)
    graph = recorded(ready)
    ready.make_updates(2, total_steps=2)
    assert (len(ready.order.window(2)), graph.replays) == (1, 1)


@pytest.mark.parametrize("checkpointing", ["auto", False])
def test_memory_that_runs_out_ends_a_recording(ground: Path, checkpointing: object) -> None:
    """It holds what an update kept; without it, nothing need be computed twice."""
    config = tiny_config(ground, gradient_checkpointing=checkpointing, lora_dropout=0.1)
    plain, ready = prepare(config), prepare(config)
    graph = recorded(ready)

    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    graph.replay = full  # type: ignore[method-assign]  # what a card without room does
    for each in (plain, ready):
        each.make_updates(1)
    assert ready.recorder.codes() == ["update_retried"]
    assert (ready.replay, ready.models.checkpointing) == (None, False)
    assert torch.equal(plain.learner.learned, ready.learner.learned)


def test_memory_that_is_short_without_a_recording_too_is_saved_elsewhere(ground: Path) -> None:
    """Gradient checkpointing comes last, as it takes time."""
    ready = prepare(tiny_config(ground))
    recorded(ready)
    went, go_through = list[tuple[bool, bool]](), ready.go_through

    def full_twice(step: int) -> None:
        went.append((bool(ready.replay), ready.models.checkpointing))
        if len(went) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        go_through(step)

    ready.go_through = full_twice  # type: ignore[method-assign]
    ready.make_updates(1)
    assert went == [(True, False), (False, False), (False, True)]
    assert ready.recorder.codes() == ["update_retried"] * 2


def test_no_more_than_a_batch_waits_for_a_card(
    ground: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recording is asked for at once, and a stop would wait for all that were."""
    ready = prepare(tiny_config(ground, gradient_accumulation_steps=2))
    graph, told = recorded(ready), list[str]()

    class End:
        """What a card would come to after a batch."""

        def __init__(self, *, blocking: bool) -> None:
            """Wait as it is asked for."""
            self.number, self.blocking = graph.replays, blocking

        def record(self) -> None:
            """Note when the card is to tell."""
            told.append(f"asked {self.number}")

        def synchronize(self) -> None:
            """Note who waited."""
            told.append(f"waited {self.number}")

    monkeypatch.setattr(torch.cuda, "Event", End)
    ready.device = torch.device("cuda")
    ready.make_updates(2)
    expected = ["asked 1", "asked 2", "waited 1", "asked 3", "waited 2", "asked 4", "waited 3"]
    assert told == expected


def test_an_update_that_cannot_be_recorded_is_made_call_by_call(ground: Path) -> None:
    """Without a card, a recording fails in earnest; it is told, and nothing is left of it."""
    ready = prepare(tiny_config(ground))
    before = ready.learner.learned.clone()
    card = DeviceFacts(kind="cuda", name="A card", memory_free_bytes=2**36)
    ready.memory = MemoryPlan.make(ready.config, ready.models.base, 3, card)
    assert ready.memory.recording
    ready.record()
    assert ready.replay is None
    assert ready.recorder.codes() == ["cuda_graph_failed"]
    assert torch.equal(ready.learner.learned, before)
    assert not ready.learner.gradient.any()


# --- Compiled blocks ---


def run_with(ground: Path, folder: Path, family: str = "sd1", **environment: Any) -> Ended:
    """Run the program on a tiny model with its blocks compiled."""
    config = {"output_path": str(folder / "out"), "compile": "on"}
    write_config(folder, **choices(ground, family), **config)
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")
    environment["OMP_NUM_THREADS"] = "1"
    return run_program("--config", "config.json", cwd=folder, cold=True, **environment)


def choices(ground: Path, family: str) -> dict[str, Any]:
    """Choose three updates with dropout, whose draws must not change either."""
    return {
        "dataset_path": str(ground / "data"),
        "base_model": str(tiny_base(family, ground / "bases")),
        "resolution": 256,
        "steps": 3,
        "lora_dropout": 0.2,
        "sample_steps": 1,
    }


def learns_the_same(ended: Ended, ground: Path, folder: Path, family: str) -> None:
    """Hold an adapter against that of a plain run, but for its last bits and its strength."""
    config = write_config(folder, **choices(ground, family), output_path=str(folder / "plain"))
    plain = train_lora.LoRATrainer(train_lora.TrainingConfig.from_json(config)).train()
    found = load_file(ended.last["final_path"])
    for name, value in load_file(plain.final_path).items():
        if not name.endswith(".alpha"):
            torch.testing.assert_close(found[name], value, rtol=0.01, atol=1e-4)


def repeated(unet: Any) -> list[Any]:
    """List the blocks that are compiled."""
    return [module for module in unet.modules() if type(module).__name__ in unet._repeated_blocks]


def warnings(ended: Ended) -> list[str]:
    """List what a run warned of."""
    return [line["code"] for line in ended.lines if line["type"] == "warning"]


@pytest.mark.slow
def test_a_denoiser_that_cannot_be_compiled_runs_as_it_is(ground: Path, tmp_path: Path) -> None:
    """Without a C++ compiler, the run warns and learns the same."""
    ended = run_with(ground, tmp_path, CXX="/nowhere/c++")
    assert (ended.code, warnings(ended)) == (0, ["compile_failed"])
    learns_the_same(ended, ground, tmp_path, "sd1")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_compiled_blocks_learn_the_same(ground: Path, tmp_path: Path, family: str) -> None:
    """But for the last bits; previews are drawn too."""
    ended = run_with(ground, tmp_path, family)
    assert (ended.code, warnings(ended)) == (0, [])
    assert [line["type"] for line in ended.lines].count("sample") == 1
    learns_the_same(ended, ground, tmp_path, family)


@pytest.mark.slow
def test_a_compiler_that_errs_does_no_harm(ground: Path, tmp_path: Path) -> None:
    """Inductor's C++ code has wrong gradients for one image of SD 1.x, at least in torch 2.13."""
    ended = run_with(ground, tmp_path)
    assert ended.code == 0
    learns_the_same(ended, ground, tmp_path, "sd1")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_blocks_in_half_precision_can_be_compiled(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card; few graphs serve all blocks, and updates run what was compiled."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(train_lora, "choose_precision", lambda *_: torch.bfloat16)
    config = tiny_config(ground, "sdxl", compile="on")
    ready = prepare(config)
    stance = ready.compile()
    calls, plain = [], CompiledFxGraph.__call__

    def counted(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return plain(graph, inputs)

    monkeypatch.setattr(CompiledFxGraph, "__call__", counted)
    with stance:
        ready.make_updates(2)
    blocks = repeated(ready.models.denoiser)
    assert "compile_failed" not in ready.recorder.codes()
    assert len(calls) == 2 * 2 * len(blocks)  # updates, there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, -1.0, 1.5, math.inf])
def test_blocks_with_other_gradients_are_not_used(
    ground: Path, monkeypatch: pytest.MonkeyPatch, factor: float, dtype: torch.dtype
) -> None:
    """A loss that is the same proves nothing; and nothing is left of a failure on the way back."""
    monkeypatch.setattr(train_lora, "choose_precision", lambda *_: dtype)
    config = tiny_config(ground, compile="on")
    ready = prepare(config)
    unet = ready.models.denoiser
    blocks = repeated(unet)

    def compile_wrongly(**_: object) -> None:
        for block in blocks:
            block._compiled_call_impl = block._call_impl
        blocks[0]._compiled_call_impl = bent  # the last on the way back

    def bent(*inputs: Any, **named: Any) -> torch.Tensor:
        true: torch.Tensor = blocks[0]._call_impl(*inputs, **named)
        if math.isinf(factor):
            true.register_hook(fail)
        return true.detach() + factor * (true - true.detach())

    monkeypatch.setattr(unet, "compile_repeated_blocks", compile_wrongly)
    ready.compile()
    harmless = factor == 1
    assert ("compile_failed" not in ready.recorder.codes()) == harmless
    assert all(bool(block._compiled_call_impl) == harmless for block in blocks)
    assert not any(p.grad is not None and p.grad.any() for p in unet.parameters())
    assert not any(g.any() for g in ready.learner.gradients.values())


@pytest.mark.parametrize("factor", [1.0, -1.0])
def test_a_compiler_that_errs_in_half_of_the_matrices_is_found(
    ground: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """An adapter that is zero gives its first half no gradient: it is moved for the trial."""
    config = tiny_config(ground, compile="on")
    ready = prepare(config)
    unet = ready.models.denoiser
    first_halves = [m for name, m in unet.named_modules() if name.endswith("lora_A.default")]

    def compile_wrongly(**_: object) -> None:
        for module in first_halves:
            module.register_forward_hook(bent)

    def bent(_: object, __: object, true: torch.Tensor) -> torch.Tensor:
        return true.detach() + factor * (true - true.detach())

    monkeypatch.setattr(unet, "compile_repeated_blocks", compile_wrongly)
    before = {name: matrix.clone() for name, matrix in ready.learner.matrices.items()}
    ready.compile()
    assert ("compile_failed" in ready.recorder.codes()) == (factor != 1)
    assert all(torch.equal(m, before[name]) for name, m in ready.learner.matrices.items())
    assert not any(g.any() for g in ready.learner.gradients.values())


def fail(_: object) -> None:
    """Do what a compiler does that finds out late."""
    raise RuntimeError


def test_a_cpu_compiles_only_when_it_is_told_to(ground: Path) -> None:
    """There, compiling takes a minute and wins nothing."""
    ready = prepare(tiny_config(ground))
    ready.total_steps = 2000
    ready.compile()
    assert not any(vars(m).get("_compiled_call_impl") for m in ready.models.denoiser.modules())
