"""The memory plan: what a run will hold, told before anything is loaded."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from conftest import Record, Recorder, load_config, write_config, write_image
from diffusers import UNet2DConditionModel
from processes import run_program
from tiny_models import build_tiny, write_single_file
from tiny_runs import Ready, fail_once, going_short_of_memory, prepare, tiny_config

import models
import train_lora
from train_lora import (
    BaseModel,
    DeviceFacts,
    Emitter,
    Located,
    MemoryPlan,
    StopRequest,
    TrainingConfig,
)

GIB = 2**30
CARD = DeviceFacts(
    kind="cuda", name="A card", memory_total_bytes=8 * GIB, memory_free_bytes=8 * GIB
)


def on_meta(size: str) -> Any:
    """Make a denoiser of real size that has shapes and no numbers."""
    with torch.device("meta"):
        return UNet2DConditionModel(**models.DENOISERS[size])


def structure_of(unet: Any, **parts: train_lora.Shapes) -> BaseModel:
    """Describe a base model as its headers would."""
    shapes = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    networks = {"unet": shapes, "vae": {}, "text_encoder": {}} | parts
    large = unet.config.addition_embed_type == "text_time"
    family = train_lora.SDXL if large else train_lora.SD1
    networks |= {"text_encoder_2": {}} if large else {}
    located = {part: Located(shapes=networks[part.folder]) for part in family.networks}
    return BaseModel(
        name="base",
        family=family,
        objective=family.objectives[0],
        parts=located,
        reference=None,
        **family.measure(located),
    )


def kept_by_torch(unet: Any, config: TrainingConfig, dtype: torch.dtype) -> int:
    """Count the bytes that torch keeps of a forward pass for the way back.

    Without what attention keeps only where no fast kernel is at hand, as on the meta device.
    """
    unet.requires_grad_(requires_grad=False)
    base = structure_of(unet)
    alone = SimpleNamespace(base=base, learning=[(base.family.denoiser, unet)], adapted=[])
    train_lora.add_adapters(cast("Any", alone), config)
    unet.to("meta", dtype)
    ours = {value.untyped_storage()._cdata for value in unet.parameters()}
    kept: dict[int, torch.Tensor] = {}
    scores: list[torch.Tensor] = []

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()._cdata
        if value.grad_fn is not None and "Softmax" in value.grad_fn.name():
            ours.add(storage)
            scores.append(value)
        if storage not in ours:
            kept[storage] = value
        return value

    side, width = config.side // 8, unet.config.cross_attention_dim
    told = {"text_embeds": torch.zeros(config.batch_size, 1280, device="meta")}
    told["time_ids"] = torch.zeros(config.batch_size, 6, device="meta")
    noisy = torch.zeros(config.batch_size, 4, side, side, device="meta", dtype=dtype)
    times = torch.zeros(config.batch_size, device="meta")
    text = torch.zeros(config.batch_size, 77, width, device="meta", dtype=dtype)
    if config.base_precision == "int8":  # what bitsandbytes holds on to beside autograd
        for layer in unet.modules():
            if isinstance(layer, torch.nn.Linear) and not layer.weight.requires_grad:
                layer.register_forward_pre_hook(lambda _, inputs: void(keep(inputs[0])))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        answer = unet.train()(noisy, times, text, added_cond_kwargs=told)
    assert answer.sample.requires_grad
    return sum(value.untyped_storage().nbytes() for value in kept.values())


def void(_: object) -> None:
    """Leave what a hook sees as it is."""


WIDE: list[dict[str, Any]] = [
    {"resolution": 1024, "adapter": "dora"},
    {"resolution": 1024, "adapter": "dora", "lora_targets": "all"},
    {"resolution": 768, "adapter": "lokr"},
    {"resolution": 1024, "adapter": "loha", "lora_targets": "attention-mlp"},
    {"resolution": 768, "lora_targets": "attention-mlp"},
]


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        ("sd15", {"resolution": 256}),
        ("sd15", {"resolution": 512, "batch_size": 2, "mixed_precision": "no"}),
        ("sd15", {"resolution": 512, "lora_dropout": 0.1}),
        ("sdxl", {"resolution": 1024}),
        ("sdxl", {"resolution": 1024, "lora_dropout": 0.1}),
        ("sdxl", {"resolution": 1024, "base_precision": "int8"}),
        *(("sd15", {"resolution": 512, "adapter": kind}) for kind in ("dora", "loha", "lokr")),
        ("sd15", {"resolution": 512, "lora_targets": "all"}),
        *(pytest.param("sdxl", each, marks=pytest.mark.slow) for each in WIDE),
    ],
)
def test_activations_are_what_torch_keeps_with_a_margin(
    in_workspace: Path, size: str, changes: dict[str, Any]
) -> None:
    """One figure per family foresees a real forward pass at real sizes: never less, if little more.

    With dropout and int8 layers too, which keep more.
    """
    config, unet = load_config(**changes), on_meta(size)
    dtype = torch.float32 if config.mixed_precision == "no" else torch.bfloat16
    chosen = MemoryPlan.make(config, structure_of(unet), 1, with_free(80))
    planned = chosen.parts["activations"]
    assert not chosen.checkpointing
    assert 1.0 < planned / kept_by_torch(unet, config, dtype) < 1.4


def test_a_file_in_the_original_layout_needs_what_its_folder_needs(
    tmp_path: Path, in_workspace: Path
) -> None:
    """Names differ, the network does not; a file's VAE has as many levels as all have."""
    for family in ("sd1", "sd2", "sdxl"):
        folder, file = tmp_path / family, tmp_path / f"{family}.safetensors"
        write_single_file(build_tiny(family, folder, vae_levels=4), file, family)
        forms = (str(folder), str(file))
        found = [train_lora.inspect_model(load_config(base_model=form))[1] for form in forms]
        whole, single = found
        assert whole is not None
        assert single is not None
        assert single.tokens == whole.tokens
        assert single.text_width == whole.text_width
        assert single.vae_width == whole.vae_width
        assert single.vae_scale_factor == whole.vae_scale_factor == 8
        assert needs(single) == pytest.approx(needs(whole), rel=0.02)


def needs(structure: BaseModel) -> float:
    """Count activations at 512 pixels, with and without computing them twice."""
    configs = [
        load_config(train_text_encoder=True, gradient_checkpointing=checkpointing)
        for checkpointing in (False, True)
    ]
    plans = [MemoryPlan.make(config, structure, 1, CARD) for config in configs]
    return sum(plan.parts["activations"] for plan in plans)


def plan(device: DeviceFacts = CARD, images: int = 20, **changes: Any) -> MemoryPlan:
    """Plan a run of SDXL's size."""
    text: train_lora.Shapes = {
        "text_model.embeddings.position_embedding.weight": (77, 768),
        "w": (120, 10**6),
    }
    vae = {"decoder.conv_out.weight": (3, 128, 3, 3), "w": (84, 10**6)}
    structure = structure_of(on_meta("sdxl"), vae=vae, text_encoder=text)
    return MemoryPlan.make(load_config(**changes), structure, images, device)


def with_free(gib: float) -> DeviceFacts:
    """Describe a card with so much free memory."""
    return dataclasses.replace(CARD, memory_free_bytes=int(gib * GIB))


def test_activations_are_computed_twice_only_where_memory_is_short(in_workspace: Path) -> None:
    """The fastest way that fits is chosen: a large card keeps everything."""
    chosen = [plan(with_free(gib), resolution=1024).checkpointing for gib in (6, 8, 24)]
    assert chosen == [True, True, False]


@pytest.mark.parametrize("wanted", [True, False])
def test_what_was_asked_for_is_done(in_workspace: Path, wanted: bool) -> None:
    """Also against the plan's advice."""
    for gib in (4, 80):
        changes = {"gradient_checkpointing": wanted, "resolution": 1024}
        assert plan(with_free(gib), **changes).checkpointing is wanted


def test_previews_are_decoded_in_pieces_where_memory_is_short(in_workspace: Path) -> None:
    """Decoding 1024 pixels at once takes more than a step."""
    changes = {"resolution": 1024, "gradient_checkpointing": True}
    whole, pieces = plan(with_free(24), **changes), plan(with_free(7.5), **changes)
    assert (whole.tiling, pieces.tiling) == (False, True)
    assert pieces.parts["preview"] < whole.parts["preview"] / 2


def test_previews_of_their_own_size_take_memory_and_disk_of_their_own(in_workspace: Path) -> None:
    """By their area; fewer of larger ones are drawn at once, and the update is as it was."""
    roomy = {"resolution": 1024, "batch_size": 8, "gradient_checkpointing": False}
    square, wide = (plan(with_free(400), **roomy, **size) for size in ({}, {"sample_width": 2048}))
    assert wide.parts["preview"] == 2 * square.parts["preview"]
    assert {k: v for k, v in wide.parts.items() if k != "preview"} == {
        k: v for k, v in square.parts.items() if k != "preview"
    }
    assert abs(square.previews_at_once - 2 * wide.previews_at_once) <= 1
    disk = [train_lora.disk_needed(each.config, each.structure, 100) for each in (square, wide)]
    pictures = 2 * train_lora.OWN_PROMPTS  # two rounds
    assert disk[1] - disk[0] == pictures * 3 * 1024**2


def test_weights_that_are_packed_take_less(in_workspace: Path) -> None:
    """Each precision by the size of its numbers, on CUDA alone."""
    sizes = {
        p: plan(base_precision=p).parts["denoiser"] for p in ("auto", "bf16", "int8", "nf4", "fp32")
    }
    assert sizes["auto"] == sizes["bf16"]
    assert 0.3 < sizes["nf4"] / sizes["bf16"] < 0.5  # convolutions stay as they are
    assert 0.5 < sizes["int8"] / sizes["bf16"] < 0.7
    assert sizes["fp32"] == 3 * sizes["bf16"]  # a step reads a copy in its own precision
    cpu = dataclasses.replace(CARD, kind="cpu")
    assert plan(cpu, base_precision="nf4").parts["denoiser"] == 2 * sizes["bf16"]


def test_images_on_a_shelf_take_no_memory(in_workspace: Path) -> None:
    """What lies in cache_dir is mapped and can be read again."""
    cpu = dataclasses.replace(CARD, kind="cpu")
    assert plan(cpu).parts["cache"] > 0
    assert plan(cpu, cache_dir="shelf").parts["cache"] == 0


def test_a_card_sees_one_batch_and_main_memory_holds_the_rest(in_workspace: Path) -> None:
    """Images, captions and the waiting VAE lie beside the card, and in it elsewhere."""
    cpu = dataclasses.replace(CARD, kind="cpu")
    few, many = (plan(CARD, images=images) for images in (20, 2000))
    assert few.phases == many.phases
    assert many.main - few.main == many.parts["cache"] - few.parts["cache"] > 0
    assert plan(cpu, images=2000).phases["training"] > plan(cpu, images=20).phases["training"]
    assert plan(cpu, images=2000).main == 0


def test_images_that_do_not_fit_beside_a_card_are_refused_with_a_remedy(in_workspace: Path) -> None:
    """A folder for them comes first: it is the only help, as nothing on the card is short."""
    structure, config = structure_of(on_meta("sdxl")), load_config()
    chosen = MemoryPlan.make(config, structure, 10**9, with_free(80))
    assert chosen.fits
    assert chosen.shortage
    assert "main memory" in chosen.shortage
    assert chosen.remedies()[0].path == "cache_dir"


def test_unknown_memory_is_no_obstacle(in_workspace: Path) -> None:
    """Some drivers do not tell; the run tries, in the fastest way."""
    unknown = plan(dataclasses.replace(CARD, memory_free_bytes=None), resolution=2048)
    assert unknown.fits
    assert not unknown.shortage
    assert not unknown.checkpointing


def test_a_preview_that_does_not_fit_is_no_reason_to_refuse(in_workspace: Path) -> None:
    """Training goes on without it, as it does when a preview fails for another reason."""
    wide: train_lora.Shapes = {"decoder.conv_out.weight": (3, 1024, 3, 3)}
    structure, config = structure_of(on_meta("sdxl"), vae=wide), load_config(lora_rank=1)
    tight = MemoryPlan.make(config, structure, 20, with_free(11))
    assert tight.free
    assert tight.phases["previews"] > train_lora.SLACK * tight.free
    assert not tight.fits
    assert not tight.shortage


def test_remedies_are_ranked_by_what_they_save(in_workspace: Path) -> None:
    """What makes the run fit comes first; what is in force is not offered."""
    structure = structure_of(on_meta("sd15"))
    config = load_config(batch_size=8, resolution=896, gradient_checkpointing=False)
    offers = MemoryPlan.make(config, structure, 10, with_free(8)).remedies()
    assert [offer.path for offer in offers[:2]] == ["gradient_checkpointing", "resolution"]
    assert {"batch_size", "base_precision"} <= {offer.path for offer in offers}
    saved = [
        int(offer.hint.split("about ")[1].split(" MiB")[0].replace(",", "")) for offer in offers
    ]
    assert saved[1:] == sorted(saved[1:], reverse=True)
    better = dataclasses.replace(config, gradient_checkpointing=True, resolution=512)
    left = [offer.path for offer in MemoryPlan.make(better, structure, 10, with_free(6)).remedies()]
    assert not {"gradient_checkpointing", "resolution"} & set(left)


def test_int8_layers_are_never_checkpointed(in_workspace: Path) -> None:
    """They keep their inputs beside autograd, so that dropping activations frees nothing."""
    assert plan(with_free(6), resolution=1024).checkpointing
    assert not plan(with_free(6), resolution=1024, base_precision="int8").checkpointing
    with pytest.raises(train_lora.TrainError) as refused:
        load_config(base_precision="int8", gradient_checkpointing=True)
    assert refused.value.code is train_lora.ErrorCode.CONFIG_CONFLICT
    assert "nf4" in refused.value.hint


def test_previews_are_drawn_together_where_an_update_takes_as_much(in_workspace: Path) -> None:
    """What is kept for the way back has room for prompts; on a CPU nothing is won by it."""
    roomy = plan(with_free(80), resolution=1024)
    tight = plan(with_free(80), resolution=1024, gradient_checkpointing=True)
    wide = plan(with_free(80), resolution=1024, gradient_checkpointing=True, batch_size=8)
    assert roomy.previews_at_once > tight.previews_at_once == 1
    assert wide.previews_at_once == 4
    assert plan(dataclasses.replace(CARD, kind="cpu"), batch_size=8).previews_at_once == 1


def test_an_update_is_recorded_where_previews_have_room_beside_it(in_workspace: Path) -> None:
    """The recording keeps what is kept for the way back, also while pictures are drawn."""
    roomy, tight = plan(with_free(80), resolution=1024), plan(with_free(14), resolution=1024)
    assert (roomy.recording, tight.recording) == (True, False)
    assert not tight.checkpointing
    more = roomy.phases["previews"] - tight.phases["previews"]
    assert more == roomy.parts["activations"]
    assert (roomy.facts().choices or {})["cuda_graph"].startswith("on: ")
    off: list[dict[str, Any]] = [{"cuda_graph": "off"}, {"base_precision": "int8"}]
    off += [{"gradient_checkpointing": True}]
    assert not any(plan(with_free(80), resolution=1024, **each).recording for each in off)
    cpu = plan(dataclasses.replace(CARD, kind="cpu"))
    assert not cpu.recording
    assert "cuda_graph" not in (cpu.facts().choices or {})


def test_a_recording_leaves_room_for_batches_of_other_shapes(in_workspace: Path) -> None:
    """Those go there and back beside what the recording keeps; where all are alike, none do."""
    choices: Record = {"resolution": 1024, "gradient_checkpointing": False, "batch_size": 4}
    several, alike = (plan(with_free(200), buckets=b, **choices) for b in (True, False))
    kept = several.parts["activations"]
    assert several.phases["training"] == alike.phases["training"] + kept
    between = (several.peaks["training"] + max(alike.peaks.values())) / 2 + train_lora.CONTEXT_BYTES
    for changes, records in (
        ({"buckets": False}, True),
        ({"buckets": True}, False),
        ({"buckets": False, "resolution": [512, 1024]}, False),
    ):
        tight = plan(with_free(between / GIB), **choices | changes)
        assert (tight.recording, tight.fits) == (records, True)


@pytest.mark.parametrize("sides", [[(300, 300)], [(300, 300), (300, 512)]])
def test_a_plan_knows_what_shapes_there_are(tmp_path: Path, sides: list[tuple[int, int]]) -> None:
    """Pictures that all come to one shape need no second room, also where buckets are on."""
    for number, size in enumerate(sides):
        write_image(tmp_path / "data" / f"{number}.png", size)
    config = tiny_config(tmp_path)
    facts, base = train_lora.inspect_model(config)
    dataset = train_lora.scan_dataset(config, Emitter(Recorder()), StopRequest())
    chosen = train_lora.Preflight(config, facts, base, dataset).on(CARD, Emitter(Recorder()))
    assert chosen is not None
    more = chosen.phases["training"] - chosen.phases["loading"] - chosen.parts["activations"]
    assert more == (chosen.parts["activations"] if len(sides) > 1 else 0)


def test_what_cannot_fit_is_refused_before_anything_is_loaded(workspace: Path) -> None:
    """Preflight and training say the same, and name what would help."""
    for number in range(3):
        write_image(workspace / "data" / f"{number}.png", (2048, 2048))
    write_config(workspace, resolution=2048, batch_size=64)
    widen_model(workspace / "model")
    for arguments in (("--validate-only",), ()):
        ended = run_program("--config", "config.json", *arguments, cwd=workspace)
        assert (ended.code, ended.last["code"]) == (1, "out_of_memory")
        assert ended.last["problems"][0]["path"] in ("batch_size", "resolution")
        planned = next(line for line in ended.lines if line.get("topic") == "memory")
        assert planned["data"]["planned_bytes"] > planned["data"]["free_bytes"]


def widen_model(folder: Path) -> None:
    """Give the model of headers one convolution that keeps gigabytes at 2048 pixels."""
    from conftest import BLOCK, write_safetensors

    names = [f"{BLOCK}.attn{a}.to_{p}.weight" for a in (1, 2) for p in ("q", "k", "v", "out.0")]
    shapes: train_lora.Shapes = dict.fromkeys(names, (8, 8))
    shapes["conv_in.weight"] = (8, 4, 3, 3)
    shapes["down_blocks.0.resnets.0.conv1.weight"] = (2000, 2000, 3, 3)
    write_safetensors(folder / "unet" / "diffusion_pytorch_model.safetensors", shapes)


def test_the_plan_is_told_with_its_reasons(in_workspace: Path, recorder: Recorder) -> None:
    """Hosts can show the parts; each choice names what it rests on."""
    facts = plan(with_free(8), resolution=1024).facts()
    train_lora.Emitter(recorder).emit(facts)
    data = recorder.records[0]["data"]
    assert (data["phase"], data["peak_bytes"]) == ("planning", None)
    assert data["planned_bytes"] >= max(data["parts"].values())
    assert data["choices"]["gradient_checkpointing"].startswith("on")
    assert data["choices"]["preview_tiling"].endswith("7.5 GiB are free")


# --- What happens where the plan was wrong ---


def learned(ready: Ready, updates: int) -> dict[str, torch.Tensor]:
    """Make updates and copy what they learned."""
    ready.make_updates(updates)
    return {name: value.detach().clone() for name, value in ready.learner.parameters.items()}


@pytest.mark.parametrize("at", [1, 2])
def test_an_update_that_runs_out_of_memory_is_made_again(ground: Path, at: int) -> None:
    """In less memory, and to the last bit: draws are functions, also with dropout and windows."""
    changes: dict[str, Any] = {"lora_dropout": 0.2, "gradient_accumulation_steps": 2}
    config = tiny_config(ground, train_text_encoder=True, **changes)
    expected = learned(prepare(config), 3)
    ready = prepare(config)
    fail_once(ready, at)
    found = learned(ready, 3)
    assert ready.recorder.codes().count("update_retried") == 1
    (told,) = [r for r in ready.recorder.of_type("warning") if r["code"] == "update_retried"]
    assert told["data"]["step"] == at
    assert ready.models.checkpointing
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("asked", [True, False])
def test_memory_that_is_still_short_ends_the_run(ground: Path, *, asked: bool) -> None:
    """Where gradient checkpointing is on already, or was forbidden, nothing else is tried."""
    ready = prepare(tiny_config(ground, gradient_checkpointing=asked))
    fail_once(ready, 1)
    with pytest.raises(RuntimeError) as failed:
        ready.update()
    assert train_lora.is_out_of_memory(failed.value)
    assert ready.state.step == 0
    assert "update_retried" not in ready.recorder.codes()


def test_an_error_that_says_nothing_is_called_by_its_name() -> None:
    """Python's own allocator raises without a word."""
    assert train_lora.first_line(MemoryError()) == "MemoryError"
    assert train_lora.first_line(RuntimeError("out of memory\nCall stack:")) == "out of memory"


def test_a_whole_run_that_ran_out_of_memory_leaves_the_same_file(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, previews and all."""

    def run(name: str) -> bytes:
        config = tiny_config(ground, steps=3, output_path=str(tmp_path / name))
        return Path(train_lora.LoRATrainer(config).train().final_path).read_bytes()

    plain = run("plain")
    monkeypatch.setattr(train_lora.LoRATrainer, "go", going_short_of_memory(2))
    assert run("short") == plain


@pytest.mark.parametrize(
    ("name", "value"),
    [("PYTORCH_ALLOC_CONF", "backend:native"), ("PYTORCH_CUDA_ALLOC_CONF", "backend:native")],
)
def test_freed_memory_of_a_card_can_be_put_together(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """Unless the allocator was set up otherwise, by either of its variables."""
    for known in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(known, raising=False)
    train_lora.quiet_libraries()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv(name, value)
    train_lora.quiet_libraries()
    assert os.environ[name] == value
    assert os.environ.get("PYTORCH_ALLOC_CONF", value) == value
