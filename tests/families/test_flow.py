"""Families of flow-matching transformers: each against its own diffusers pipeline."""

from __future__ import annotations

import itertools
import re
import shutil
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from conftest import ROOT, Recorder, change_json, write_config, write_image, write_safetensors
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file
from tiny_flow import FLOW_FAMILIES, build_flow
from tiny_runs import Ready, prepare

import on_meta
import train_lora
from train_lora import Emitter, LoRATrainer, TrainError, TrainingConfig

PROMPT, OTHER = "a photo of zkb dog", "a painting of a cat"
SIDE = 256
each_family = pytest.mark.parametrize("family", FLOW_FAMILIES)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide images, one tiny base of each family, and a cache that all tests share."""
    folder = tmp_path_factory.mktemp("flow")
    for number, words in enumerate(("", " on a red sofa", " and a cat")):
        picture = write_image(folder / "data" / f"{number}.png", (SIDE + 10 * number, SIDE))
        picture.with_suffix(".txt").write_text(f"{PROMPT}{words}")
    for family in FLOW_FAMILIES:
        build_flow(family, folder / family)
    return folder


def config_of(place: Path, family: str, output: Path, **changes: Any) -> TrainingConfig:
    """Load a config for a tiny base."""
    values = {
        "dataset_path": str(place / "data"),
        "base_model": str(place / family),
        "output_path": str(output),
        "cache_dir": str(place / "cache"),
        "trigger_words": ["zkb"],
        "resolution": SIDE,
        "batch_size": 2,
        "lora_rank": 4,
        "lora_alpha": 8,
        "learning_rate": 0.002,
        "sample_steps": 3,
        "device": "cpu",
    }
    output.mkdir(parents=True, exist_ok=True)
    return TrainingConfig.from_json(write_config(output, **values | changes))


def train(config: TrainingConfig) -> Recorder:
    """Train, and keep what was told."""
    recorder = Recorder()
    LoRATrainer(config, Emitter(recorder)).train()
    return recorder


def pipeline_of(base: Path) -> Any:
    """Load a base as a user of diffusers does."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(base), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def guidance_of(family: str, usual: float) -> dict[str, Any]:
    """Say guidance as a pipeline counts it: two begin at 0, which is none."""
    begins_at_zero = family in ("z_image", "krea2")
    return {"guidance_scale": usual - 1 if begins_at_zero else usual}


# --- against the pipelines ---------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@each_family
def test_a_preview_is_what_the_pipeline_draws(
    family: str, guidance: float, place: Path, tmp_path: Path
) -> None:
    """With the same noise, before anything is rounded; guidance is said in one way for all."""
    config = config_of(place, family, tmp_path, sample_prompts=[PROMPT], sample_guidance=guidance)
    ready = prepare(config)
    own = pixels_of(ready, seed=7)
    theirs = pipeline_of(place / family)(
        prompt=PROMPT,
        height=SIDE,
        width=SIDE,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
        **guidance_of(family, guidance),
    ).images[0]
    assert float((own - theirs).abs().max()) < 1e-4
    assert float(own.std()) > 0.01
    wanted = [(PROMPT, 7)]
    (drawn,) = train_lora.draw_previews(ready.models, ready.cache, wanted, config, ready.stop)
    assert drawn.tobytes() == (255 * own).round().byte().permute(1, 2, 0).numpy().tobytes()


def pixels_of(ready: Ready, seed: int) -> torch.Tensor:
    """Draw a preview up to where its numbers, from 0 to 1, are rounded to bytes."""
    models, sketch = ready.models, train_lora.Sketch.of(ready.config, ready.models.base)
    with models.at_rest():
        pairs = train_lora.read_pairs(models, ready.cache, [PROMPT], sketch)
        latents = train_lora.sample_latents(models, pairs, sketch, [seed], ready.stop)
        pixels = models.base.family.decode(models.load_vae(), latents, None)[0]
    return (pixels / 2 + 0.5).clamp(0, 1)


@each_family
def test_a_loaded_file_acts_as_the_model_in_training(
    family: str, place: Path, tmp_path: Path
) -> None:
    """Through the pipeline's own loader, at the strength that was learned."""
    for alpha in (1.0, 4.0, 8.0):
        exact = {"lora_alpha": alpha, "save_precision": "fp32"}
        ready = prepare(config_of(place, family, tmp_path / str(alpha), **exact))
        ready.make_updates(2)
        ready.write_files({"lora": tmp_path / str(alpha) / "lora_final.safetensors"})
        pipe = pipeline_of(place / family)
        plain = answer(ready, pipe.transformer)
        pipe.load_lora_weights(str(tmp_path / str(alpha)), weight_name="lora_final.safetensors")
        loaded, own = answer(ready, pipe.transformer), answer(ready)
        assert float((loaded - own).abs().max()) < 1e-5
        assert float((plain - own).abs().max()) > 1e-4


def answer(ready: Ready, denoiser: Any = None) -> torch.Tensor:
    """Let the model in training, or another denoiser, predict for two captions."""
    models = replace(ready.models, denoiser=denoiser or ready.models.denoiser)
    batch = train_lora.draw_batch(models, ready.cache, ready.config, 3, [(0, 0), (1, 1)])
    text = models.read_text(batch.text)
    with torch.no_grad():
        said: torch.Tensor = models.predict(batch.latents, batch.timesteps, text, batch.time_ids)
    return said


@each_family
def test_the_loss_is_that_of_flow_matching(family: str, place: Path, tmp_path: Path) -> None:
    """Computed anew from the pipeline's own parts: latents, texts, path and direction."""
    ready = prepare(config_of(place, family, tmp_path))
    batch = train_lora.draw_batch(ready.models, ready.cache, ready.config, 1, [(0, 1)])
    own = float(train_lora.batch_losses(ready.models, batch)[0].detach())
    pipe = pipeline_of(place / family)
    caption, latents = ready.cache.images[1].caption, scaled(family, pipe, batch.latents)
    sigma, noise = batch.timesteps, batch.noise
    noisy = (1 - sigma) * latents + sigma * noise
    with torch.no_grad():
        said = DENOISE[family](pipe, noisy, sigma, caption)
    assert own == pytest.approx(float((said - (noise - latents)).square().mean()), rel=1e-5)


def scaled(family: str, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Give drawn latents the scale of a pipeline; klein's have theirs when they are kept."""
    said = pipe.vae.config
    if family == "krea2":
        rows = [torch.tensor(r).view(1, -1, 1, 1) for r in (said.latents_mean, said.latents_std)]
        return (latents - rows[0]) / rows[1]
    if family == "flux2_klein":
        return latents
    return (latents - float(said.shift_factor)) * float(said.scaling_factor)


def denoise_z_image(pipe: Any, noisy: Any, sigma: Any, caption: str) -> Any:
    """Ask as Z-Image's pipeline does."""
    texts, _ = pipe.encode_prompt(prompt=[caption], do_classifier_free_guidance=False)
    (said,) = pipe.transformer([noisy[0].unsqueeze(1)], 1 - sigma, texts, return_dict=False)[0]
    return -said.squeeze(1)[None]


def denoise_klein(pipe: Any, noisy: Any, sigma: Any, caption: str) -> Any:
    """Ask as FLUX.2 klein's pipeline does."""
    text, ids = pipe.encode_prompt(prompt=caption, device="cpu")
    said = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy),
        timestep=sigma,
        guidance=None,
        encoder_hidden_states=text,
        txt_ids=ids,
        img_ids=pipe._prepare_latent_ids(noisy),
        return_dict=False,
    )[0]
    return said.transpose(1, 2).reshape(noisy.shape)


def denoise_flux1(pipe: Any, noisy: Any, sigma: Any, caption: str) -> Any:
    """Ask as FLUX.1's pipeline does, with the guidance of training."""
    text, pooled, ids = pipe.encode_prompt(prompt=caption, prompt_2=None, device="cpu")
    batch, channels, high, wide = noisy.shape
    said = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy, batch, channels, high, wide),
        timestep=sigma,
        guidance=torch.ones(1),
        pooled_projections=pooled,
        encoder_hidden_states=text,
        txt_ids=ids,
        img_ids=pipe._prepare_latent_image_ids(batch, high // 2, wide // 2, "cpu", text.dtype),
        return_dict=False,
    )[0]
    factor = pipe.vae_scale_factor
    return pipe._unpack_latents(said, high * factor, wide * factor, factor)


def denoise_krea2(pipe: Any, noisy: Any, sigma: Any, caption: str) -> Any:
    """Ask as Krea 2's pipeline does, which fills texts up and masks that."""
    text, mask = pipe.encode_prompt(prompt=caption, device="cpu")
    batch, channels, high, wide = noisy.shape
    said = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy, batch, channels, high, wide),
        encoder_hidden_states=text,
        timestep=sigma,
        position_ids=pipe.prepare_position_ids(text.shape[1], high // 2, wide // 2, "cpu"),
        encoder_attention_mask=mask,
        return_dict=False,
    )[0]
    factor = pipe.vae_scale_factor
    return pipe._unpack_latents(said, high * factor, wide * factor).squeeze(2)


DENOISE: dict[str, Callable[..., Any]] = {
    "z_image": denoise_z_image,
    "flux2_klein": denoise_klein,
    "flux1": denoise_flux1,
    "krea2": denoise_krea2,
}


# --- training ----------------------------------------------------------------------------------


@each_family
def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    family: str, place: Path, tmp_path: Path
) -> None:
    """Two updates at once, or one and one."""
    train(config_of(place, family, tmp_path / "one", lora_name="same", steps=2))
    train(config_of(place, family, tmp_path / "two", lora_name="same", steps=1))
    recorder = train(config_of(place, family, tmp_path / "two", lora_name="same", steps=2))
    assert recorder.of_type("start")[0]["resumed_step"] == 1
    one, two = (tmp_path / name / "lora_final.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert (tmp_path / "one" / "samples" / "step_2.png").is_file()


@pytest.mark.parametrize(
    ("knob", "value"), [("timestep_shift", 3.0), ("timestep_sampling", "uniform")]
)
def test_other_times_make_another_run(
    knob: str, value: object, place: Path, tmp_path: Path
) -> None:
    """What is fixed for a run is refused by its name."""
    train(config_of(place, "z_image", tmp_path, lora_name="same", steps=1))
    with pytest.raises(TrainError) as caught:
        train(config_of(place, "z_image", tmp_path, lora_name="same", steps=2, **{knob: value}))
    assert caught.value.code == train_lora.ErrorCode.RUN_CHANGED
    assert [problem.path for problem in caught.value.problems] == [knob]


@each_family
def test_gradient_checkpointing_changes_nothing(family: str, place: Path, tmp_path: Path) -> None:
    """The gradient is the same to the last bit."""
    gradients = []
    for wanted in (False, True):
        ready = prepare(config_of(place, family, tmp_path, gradient_checkpointing=wanted))
        ready.models.checkpoint_gradients() if wanted else None
        ready.go_through(1)
        gradients.append(ready.learner.gradient.clone())
    assert torch.equal(*gradients)
    assert float(gradients[0].norm()) > 0


@each_family
def test_every_matrix_learns(family: str, place: Path, tmp_path: Path) -> None:
    """No layer was chosen that gets no gradient."""
    ready = prepare(config_of(place, family, tmp_path))
    ready.go_through(1)
    up = {n: g for n, g in ready.learner.gradients.items() if ".lora_B." in n}
    assert up
    assert all(float(gradient.abs().max()) > 0 for gradient in up.values())


@each_family
def test_neighbours_of_other_length_change_nothing(
    family: str, place: Path, tmp_path: Path
) -> None:
    """Captions of a batch are filled up, which no answer depends on."""
    ready = prepare(config_of(place, family, tmp_path))
    slots = [(0, 0), (1, 1), (2, 2)]
    losses = [
        train_lora.batch_losses(
            ready.models, train_lora.draw_batch(ready.models, ready.cache, ready.config, 1, part)
        )
        for part in (slots, slots[:1], slots[1:2], slots[2:])
    ]
    assert torch.allclose(losses[0], torch.cat(losses[1:]), rtol=1e-5)


def test_times_are_moved_as_was_asked_for(place: Path, tmp_path: Path) -> None:
    """By the closed form: shifted(u) = s u / (1 + (s - 1) u)."""
    draws = {}
    for shift in (1.0, 3.0):
        config = config_of(
            place, "z_image", tmp_path, timestep_shift=shift, timestep_sampling="uniform"
        )
        ready = prepare(config)
        chance = train_lora.seeded("times")
        latents = torch.zeros(16, 8, 8)
        objective, schedule = ready.models.base.objective, ready.models.schedule
        draws[shift] = torch.stack(
            [objective.draw_time(objective, schedule, latents, chance) for _ in range(500)]
        )
    even = draws[1.0]
    assert torch.allclose(draws[3.0], 3 * even / (1 + 2 * even))
    assert float(even.mean()) == pytest.approx(0.5, abs=0.05)
    assert 0 < float(even.min()) < float(even.max()) < 1


def test_times_are_fitted_into_their_range_after_the_shift(place: Path, tmp_path: Path) -> None:
    """Low + (high - low) of what would have been drawn."""
    drawn = []
    for ends in ([0, 1000], [200, 600]):
        ready = prepare(config_of(place, "z_image", tmp_path, timestep_range=ends))
        objective, schedule = ready.models.base.objective, ready.models.schedule
        chance, latents = train_lora.seeded("times"), torch.zeros(16, 8, 8)
        draws = [objective.draw_time(objective, schedule, latents, chance) for _ in range(9)]
        drawn.append(torch.stack(draws))
    assert torch.allclose(drawn[1], 0.2 + 0.4 * drawn[0])


def test_hubers_border_follows_the_noise_of_flows(place: Path, tmp_path: Path) -> None:
    """Sigma s is s / (1 - s) of the picture: the border is .9 (1 - s)^2 + .1."""
    ready = prepare(config_of(place, "z_image", tmp_path, loss="huber"))
    sigmas = torch.tensor([0.0, 0.25, 0.9, 1.0])
    snr = ready.models.base.objective.snr(ready.models.schedule, sigmas)
    found = train_lora.pseudo_huber(torch.full((4, 1, 1, 1), 1e6), lambda: snr, 0.1)
    assert torch.allclose(found.flatten() / 2e6, 0.9 * (1 - sigmas) ** 2 + 0.1, rtol=1e-4)


@pytest.mark.parametrize(("knob", "value"), [("snr_gamma", 5.0), ("noise_offset", 0.1)])
def test_what_flows_have_no_use_for_is_refused_before_any_load(
    knob: str, value: float, place: Path, tmp_path: Path
) -> None:
    """By its name, with the value that does nothing."""
    with pytest.raises(TrainError) as caught:
        train_lora.inspect_model(config_of(place, "z_image", tmp_path, **{knob: value}))
    assert caught.value.code == train_lora.ErrorCode.CONFIG_CONFLICT
    assert [problem.path for problem in caught.value.problems] == [knob]


def test_previews_take_steps_and_guidance_of_the_family(place: Path, tmp_path: Path) -> None:
    """Where the config leaves them open."""
    config = config_of(place, "flux1", tmp_path, sample_steps=None, sample_guidance=None)
    assert (config.sample_steps, config.sample_guidance) == (None, None)
    _, base = train_lora.inspect_model(config)
    assert base
    assert base.family.previews[base.distilled] == (28, 3.5)


# --- what preflight knows ----------------------------------------------------------------------


# How published files name what diffusers names otherwise, in this order.
FLUX_NAMES = [
    (r"^x_embedder\.", "img_in."),
    (r"^context_embedder\.", "txt_in."),
    (r"^time_\w+_embed\.timestep_embedder\.", "time_in."),
    (r"^time_\w+_embed\.text_embedder\.", "vector_in."),
    (r"^time_\w+_embed\.guidance_embedder\.", "guidance_in."),
    (r"_in\.linear_1\.", "_in.in_layer."),
    (r"_in\.linear_2\.", "_in.out_layer."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"_modulation(_img|_txt|)\.linear\.", r"_modulation\1.lin."),
    (r"\.norm1\.linear\.", ".img_mod.lin."),
    (r"\.norm1_context\.linear\.", ".txt_mod.lin."),
    (r"\.norm\.linear\.", ".modulation.lin."),
    (r"\.ff\.(net\.0\.proj|linear_in)\.", ".img_mlp.0."),
    (r"\.ff\.(net\.2|linear_out)\.", ".img_mlp.2."),
    (r"\.ff_context\.(net\.0\.proj|linear_in)\.", ".txt_mlp.0."),
    (r"\.ff_context\.(net\.2|linear_out)\.", ".txt_mlp.2."),
    (r"\.attn\.to_out\.0\.", ".img_attn.proj."),
    (r"\.attn\.to_add_out\.", ".txt_attn.proj."),
    (r"\.attn\.norm_added_q\.weight$", ".txt_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_added_k\.weight$", ".txt_attn.norm.key_norm.scale"),
    (r"^(single_.*)\.attn\.norm_q\.weight$", r"\1.norm.query_norm.scale"),
    (r"^(single_.*)\.attn\.norm_k\.weight$", r"\1.norm.key_norm.scale"),
    (r"\.attn\.norm_q\.weight$", ".img_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_k\.weight$", ".img_attn.norm.key_norm.scale"),
    (r"\.attn\.to_qkv_mlp_proj\.", ".linear1."),
    (r"\.(attn\.to_out|proj_out)\.", ".linear2."),
    (r"^single_transformer_blocks\.", "single_blocks."),
    (r"^transformer_blocks\.", "double_blocks."),
]
OWN_NAMES = {
    "flux2_klein": FLUX_NAMES,
    "flux1": FLUX_NAMES,
    "z_image": [
        (r"\.to_out\.0\.", ".out."),
        (r"\.norm_([qk])\.", r".\1_norm."),
        (r"^all_x_embedder\.2-1\.", "x_embedder."),
        (r"^all_final_layer\.2-1\.", "final_layer."),
    ],
    "krea2": [
        (r"^img_in\.", "first."),
        (r"^time_embed\.linear_1\.", "tmlp.0."),
        (r"^time_embed\.linear_2\.", "tmlp.2."),
        (r"^time_mod_proj\.", "tproj.1."),
        (r"^txt_in\.norm\.weight$", "txtmlp.0.scale"),
        (r"^txt_in\.linear_1\.", "txtmlp.1."),
        (r"^txt_in\.linear_2\.", "txtmlp.3."),
        (r"^text_fusion\.", "txtfusion."),
        (r"^transformer_blocks\.", "blocks."),
        (r"^final_layer\.linear\.", "last.linear."),
        (r"^final_layer\.norm\.weight$", "last.norm.scale"),
        (r"^final_layer\.scale_shift_table$", "last.modulation.lin"),
        (r"\.attn\.to_([qkv])\.", r".attn.w\1."),
        (r"\.attn\.to_out\.0\.", ".attn.wo."),
        (r"\.attn\.to_gate\.", ".attn.gate."),
        (r"\.attn\.norm_([qk])\.weight$", r".attn.qknorm.\1norm.scale"),
        (r"\.ff\.", ".mlp."),
        (r"\.norm1\.weight$", ".prenorm.scale"),
        (r"\.norm2\.weight$", ".postnorm.scale"),
        (r"\.scale_shift_table$", ".mod.lin"),
    ],
}


JOINED = (  # what is one layer in published files, and its parts by diffusers' names
    (r"(.*attention)\.to_q\.(.*)", r"\1.qkv.\2", ("to_q", "to_k", "to_v")),
    (
        r"(single_.*)\.attn\.to_q\.(.*)",
        r"\1.linear1.\2",
        (*("attn.to_q", "attn.to_k", "attn.to_v"), "proj_mlp"),
    ),
    (r"(.*)\.attn\.to_q\.(.*)", r"\1.img_attn.qkv.\2", ("attn.to_q", "attn.to_k", "attn.to_v")),
    (
        r"(.*)\.attn\.add_q_proj\.(.*)",
        r"\1.txt_attn.qkv.\2",
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ),
)


def join_layers(weights: dict[str, torch.Tensor]) -> None:
    """Make one layer of those that are one in published files."""
    for pattern, joined, parts in JOINED:
        for name in list(weights):
            if match := re.fullmatch(pattern, name):
                rows = [weights.pop(f"{match[1]}.{part}.{match[2]}") for part in parts]
                weights[match.expand(joined)] = torch.cat(rows)


def write_transformer(folder: Path, target: Path, prefix: str | None) -> Path:
    """Write a transformer alone, as published for ComfyUI; without a prefix, as diffusers does."""
    (file,) = (folder / "transformer").glob("*.safetensors")
    if prefix is None:
        return Path(shutil.copy(file, target))
    weights = load_file(file)
    if folder.name != "krea2":
        join_layers(weights)
    for name in [name for name in weights if name.startswith("norm_out.linear.")]:
        weights[name] = torch.cat(weights[name].chunk(2)[::-1])  # shift before scale
    named = {own_name(folder.name, name): value for name, value in weights.items()}
    for name in [n for n in named if n.startswith("blocks.") and n.endswith(".mod.lin")]:
        named[name] = named[name].flatten()
    whole = {prefix + name: value for name, value in named.items()}
    safetensors.torch.save_file(whole, target, {"format": "pt"})
    return target


def own_name(family: str, name: str) -> str:
    """Name a weight as the published file does."""
    for pattern, own in OWN_NAMES[family]:
        name = re.sub(pattern, own, name)
    return name


@each_family
def test_a_folder_is_recognised(family: str, place: Path, tmp_path: Path) -> None:
    """By its denoiser's class; another family that was asked for is refused."""
    facts, base = train_lora.inspect_model(config_of(place, family, tmp_path))
    assert facts.family == family
    assert base
    assert (base.objective.prediction_type, base.distilled) == ("flow", False)
    with pytest.raises(TrainError, match="model_family"):
        train_lora.inspect_model(config_of(place, family, tmp_path, model_family="sdxl"))


@each_family
def test_a_transformer_alone_learns_what_its_folder_learns(
    family: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file brings neither texts nor VAE; these come from the folder that is named for them."""
    narrow_flux1(monkeypatch)
    written = [learned_from(place / family, place, family, tmp_path / "folder")]
    for number, prefix in enumerate(("", "model.diffusion_model.", None)):
        own = tmp_path / f"own{number}"
        file = write_transformer(place / family, own.with_suffix(".safetensors"), prefix)
        written.append(learned_from(file, place, family, own))
    assert written[1:] == written[:1] * 3


def learned_from(base: Path, place: Path, family: str, output: Path) -> tuple[int, bytes]:
    """Make two updates; return what was planned to learn, and the tensors of the LoRA file."""
    beside = {} if base.is_dir() else {"model_config_path": str(place / family)}
    config = config_of(place, family, output, base_model=str(base), **beside)
    ready = prepare(config)
    ready.make_updates(2)
    ready.write_files({"lora": output / "lora.safetensors"})
    planned = train_lora.adapter_numbers(config, ready.models.base)
    assert planned == ready.learner.learned.numel()
    return planned, safetensors.torch.save(load_file(output / "lora.safetensors"))


def narrow_flux1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let diffusers take FLUX.1's file apart at the tiny width: it has 3,072 written into it."""
    known: Any = SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    made = convert_flux_transformer_checkpoint_to_diffusers
    widths = tuple(32 if value == 3072 else value for value in made.__code__.co_consts)
    code = made.__code__.replace(co_consts=widths)
    narrow = types.FunctionType(code, made.__globals__)
    monkeypatch.setitem(known, "checkpoint_mapping_fn", narrow)


def test_texts_and_vae_of_a_file_come_from_its_reference(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of the cache of the hub; what lacks there is named, and fetched in training."""
    file = write_transformer(place / "z_image", tmp_path / "own.safetensors", "")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    config = config_of(place, "z_image", tmp_path / "out", base_model=str(file))
    _, base = train_lora.inspect_model(config)
    assert base
    assert base.reference == "Tongyi-MAI/Z-Image"
    home = tmp_path / "hub" / "models--Tongyi-MAI--Z-Image"
    snapshot = home / "snapshots" / "one"
    build_flow("z_image", snapshot)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("one")
    next((snapshot / "transformer").glob("*.safetensors")).unlink()
    _, base = train_lora.inspect_model(config)
    assert base
    assert base.reference is None
    assert [p.folder for p, found in base.parts.items() if file in found.files] == ["transformer"]
    weights = next((snapshot / "text_encoder").glob("*.safetensors"))
    weights.unlink()
    assert train_lora.missing_files(snapshot, beside_file=True) == [f"text_encoder/{weights.name}"]


DENOISER, INDEX = "transformer/config.json", "model_index.json"
DEV, KLEIN = "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.2-klein-base-4B"


@pytest.mark.parametrize(
    ("family", "path", "change", "said"),
    [
        ("flux1", DENOISER, {"in_channels": 384, "out_channels": 64}, f"FLUX.1 Fill; take {DEV}"),
        ("flux1", DENOISER, {"in_channels": 128, "out_channels": 64}, "FLUX.1 Canny or Depth"),
        ("flux1", INDEX, {"_class_name": "FluxKontextPipeline"}, f"FLUX.1 Kontext; take {DEV}"),
        ("flux2_klein", DENOISER, {"guidance_embeds": True}, f"FLUX.2 dev; take {KLEIN}"),
        ("flux2_klein", INDEX, {"_class_name": "Flux2KleinKVPipeline"}, "FLUX.2 klein KV"),
        ("z_image", INDEX, {"_class_name": "ZImageOmniPipeline"}, "Z-Image-Omni"),
    ],
)
def test_relatives_are_refused_by_name(
    family: str, path: str, change: dict[str, Any], said: str, place: Path, tmp_path: Path
) -> None:
    """Those that are given more than noise and text."""
    base = build_flow(family, tmp_path / family)
    change_json(base / path, **change)
    config = config_of(place, family, tmp_path / "out", base_model=str(base))
    with pytest.raises(TrainError, match=said):
        train_lora.inspect_model(config)


FLUX_1_AS_DIFFUSERS = {
    "context_embedder.weight": (4, 4),
    "time_text_embed.text_embedder.linear_1.weight": (4, 4),
    "time_text_embed.guidance_embedder.linear_1.weight": (4, 4),
    "single_transformer_blocks.0.proj_mlp.weight": (4, 4),
}
TOLD_GUIDANCE = {"guidance_in.in_layer.weight": (4, 4)}


@pytest.mark.parametrize(
    ("family", "name", "weights", "said"),
    [
        (
            "flux1",
            "mine",
            {**TOLD_GUIDANCE, "img_in.weight": (4, 384), "final_layer.linear.weight": (64, 4)},
            f"FLUX.1 Fill; take {DEV}",
        ),
        (
            "flux1",
            "diffusion_pytorch_model",
            {**FLUX_1_AS_DIFFUSERS, "x_embedder.weight": (4, 128), "proj_out.weight": (64, 4)},
            f"FLUX.1 Canny or Depth; take {DEV}",
        ),
        ("flux1", "flux1-dev-kontext_bf16", TOLD_GUIDANCE, f"FLUX.1 Kontext; take {DEV}"),
        ("flux1", "union", {**TOLD_GUIDANCE, "controlnet_blocks.0.weight": (4, 4)}, "a ControlNet"),
        ("flux2_klein", "flux-2-klein-9b-kv", {}, f"FLUX.2 klein KV; take {KLEIN}"),
        ("flux2_klein", "flux2-dev", TOLD_GUIDANCE, "FLUX.2 dev"),
        ("z_image", "z_image_edit_bf16", {}, "Z-Image-Edit; take Tongyi-MAI/Z-Image"),
        ("z_image", "mine", {"siglip_embedder.1.weight": (4, 4)}, "Z-Image-Omni"),
        (
            "z_image",
            "mine",
            {"x_embedder.weight": (4, 132), "final_layer.linear.weight": (64, 4)},
            "a model that is given a picture; take Tongyi-MAI/Z-Image",
        ),
        ("krea2", "Krea-2-Edit", {}, "a Krea 2 for editing; take krea/Krea-2-Raw"),
        (
            "krea2",
            "mine",
            {"first.weight": (4, 128), "last.linear.weight": (64, 4)},
            "a model that is given a picture; take krea/Krea-2-Raw",
        ),
        ("krea2", "diffusion_pytorch_model-00001-of-00003", {}, "take the folder of all"),
    ],
)
def test_files_of_relatives_are_refused_by_name(
    family: str,
    name: str,
    weights: dict[str, tuple[int, ...]],
    said: str,
    place: Path,
    tmp_path: Path,
) -> None:
    """By what their weights show, or else by a word of their published name."""
    file = tmp_path / f"{name}.safetensors"
    layout = {} if name == "diffusion_pytorch_model" else MARKS[family]
    write_safetensors(file, {**layout, **weights})
    beside = {"base_model": str(file), "model_config_path": str(place / family)}
    with pytest.raises(TrainError, match=said):
        train_lora.inspect_model(config_of(place, family, tmp_path / "out", **beside))


@pytest.mark.parametrize(
    ("family", "path", "change"),
    [
        ("z_image", "scheduler/scheduler_config.json", {"shift": 3.0}),
        ("flux2_klein", "model_index.json", {"is_distilled": True}),
        ("krea2", "model_index.json", {"is_distilled": True}),
        ("flux1", "transformer/config.json", {"guidance_embeds": False}),
    ],
)
def test_a_distilled_base_is_told(
    family: str, path: str, change: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    """It trains all the same, and previews need few steps."""
    base = build_flow(family, tmp_path / family)
    change_json(base / path, **change)
    recorder = Recorder()
    config = config_of(place, family, tmp_path / "out", base_model=str(base))
    LoRATrainer(config, Emitter(recorder)).validate()
    assert "base_distilled" in recorder.codes()
    _, found = train_lora.inspect_model(config)
    assert found
    assert found.family.previews[found.distilled][0] < 10


@pytest.mark.parametrize(
    ("family", "name", "distilled"),
    [
        ("z_image", "z_image_bf16", False),
        ("z_image", "z_image_turbo_bf16", True),
        ("z_image", "z_image_special_edition", False),
        ("krea2", "Krea2-Raw", False),
        ("krea2", "Krea2-Turbo", True),
        ("flux2_klein", "flux-2-klein-base-4b", False),
        ("flux2_klein", "flux-2-klein-4b", True),
        ("flux2_klein", "mine", False),
        ("flux1", "flux1-dev", False),
        ("flux1", "flux1-schnell", True),
    ],
)
def test_a_distilled_file_is_told(
    family: str, name: str, distilled: bool, place: Path, tmp_path: Path
) -> None:
    """By what is in it where that tells, or else by its published name."""
    file = tmp_path / f"{name}.safetensors"
    weights = MARKS[family] | ({} if distilled else {"guidance_in.in_layer.weight": (4, 4)})
    write_safetensors(file, weights if family == "flux1" else MARKS[family])
    beside = {"base_model": str(file), "model_config_path": str(place / family)}
    _, base = train_lora.inspect_model(config_of(place, family, tmp_path / "out", **beside))
    assert base
    assert (base.family.name, base.distilled) == (family, distilled)


# By which the files of each family are known.
MARKS: dict[str, dict[str, tuple[int, ...]]] = {
    "z_image": {"noise_refiner.0.attention.k_norm.weight": (4,), "cap_embedder.1.weight": (32, 16)},
    "krea2": {"txtfusion.projector.weight": (1, 3)},
    "flux2_klein": {"double_stream_modulation_img.lin.weight": (4, 4)},
    "flux1": {"double_blocks.0.img_attn.norm.key_norm.scale": (4,)},
}


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("train_text_encoder", True),
        ("embedding_tokens", 2),
        ("resolution", 264),
        ("mixed_precision", "fp16"),
        ("base_precision", "int8"),
        ("prediction_type", "epsilon"),
    ],
)
def test_what_means_nothing_here_is_refused(
    knob: str, value: object, place: Path, tmp_path: Path
) -> None:
    """With the knob's name and a value that does."""
    config = config_of(place, "z_image", tmp_path, **{knob: value})
    with pytest.raises(TrainError) as caught:
        train_lora.inspect_model(config)
    assert [problem.path for problem in caught.value.problems] == [knob]


def test_without_its_file_a_family_is_named(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer alone says what is missing beside it."""
    monkeypatch.setattr(train_lora, "FAMILY_FILES", tmp_path / "nowhere")
    train_lora.all_families.cache_clear()
    try:
        config = config_of(place, "z_image", tmp_path / "out")
        with pytest.raises(
            TrainError, match=r"ZImageTransformer2DModel.*families/z_image\.py is not there"
        ):
            train_lora.inspect_model(config)
    finally:
        train_lora.all_families.cache_clear()


FLUX1_NAMES = (
    "double_blocks.0.img_attn.norm.key_norm.scale",
    "double_blocks.0.img_attn.qkv.weight_scale",
)


def test_the_schema_knows_the_denoiser_of_every_file() -> None:
    """By which the file that is missing is named."""
    further = train_lora.all_families().keys() - train_lora.FAMILIES.keys()
    known = train_lora.knobs()["model_family"]["x-denoisers"]
    assert known == {train_lora.all_families()[n].denoiser.class_name: n for n in further}


def test_quantised_files_are_refused(place: Path, tmp_path: Path) -> None:
    """Their numbers mean nothing without scales; GGUF is another format altogether."""
    file = tmp_path / "packed.safetensors"
    named = {name: torch.ones(1) for name in FLUX1_NAMES}
    safetensors.torch.save_file(named, file)
    with pytest.raises(TrainError, match="quantised"):
        train_lora.inspect_model(config_of(place, "flux1", tmp_path / "out", base_model=str(file)))
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(TrainError, match="GGUF"):
        train_lora.inspect_model(config_of(place, "flux1", tmp_path / "out", base_model=str(gguf)))


# --- names in files, of the real sizes ---------------------------------------------------------

RANK = 2
# Written down from the layout of the files that ComfyUI loads: where the blocks are, how many,
# and what they have that learns, by its outputs and inputs. FLUX.1 is known by diffusers' names
# everywhere.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
Layers = dict[str, tuple[int, int]]
Z_IMAGE: Layers = dict.fromkeys(ATTENTION, (3840, 3840))
FLUX_1: Layers = dict.fromkeys(ATTENTION + ADDED, (3072, 3072))
KREA_2: Layers = dict.fromkeys(("wq", "wo", "gate"), (6144, 6144))
KREA_2 |= dict.fromkeys(("wk", "wv"), (1536, 6144))  # four heads of a question share a key
PUBLISHED: dict[str, list[tuple[str, int, Layers]]] = {
    "Z-Image": [
        ("diffusion_model.layers.{}.attention.{}", 30, Z_IMAGE),
        ("diffusion_model.noise_refiner.{}.attention.{}", 2, Z_IMAGE),
        ("diffusion_model.context_refiner.{}.attention.{}", 2, Z_IMAGE),
    ],
    "FLUX.2 klein 4B": [
        (
            "diffusion_model.double_blocks.{}.img_attn.{}",
            5,
            {"qkv": (9216, 3072), "proj": (3072, 3072)},
        ),
        (
            "diffusion_model.single_blocks.{}.{}",
            20,
            {"linear1": (27_648, 3072), "linear2": (3072, 12_288)},
        ),
    ],
    "FLUX.2 klein 9B": [
        (
            "diffusion_model.double_blocks.{}.img_attn.{}",
            8,
            {"qkv": (12_288, 4096), "proj": (4096, 4096)},
        ),
        (
            "diffusion_model.single_blocks.{}.{}",
            24,
            {"linear1": (36_864, 4096), "linear2": (4096, 16_384)},
        ),
    ],
    "FLUX.1": [
        ("transformer.transformer_blocks.{}.attn.{}", 19, FLUX_1),
        (
            "transformer.single_transformer_blocks.{}.attn.{}",
            38,
            dict.fromkeys(ATTENTION[:3], (3072, 3072)),
        ),
    ],
    "Krea 2": [("diffusion_model.blocks.{}.attn.{}", 28, KREA_2)],
}


@pytest.mark.parametrize("title", on_meta.NETWORKS)
def test_every_layer_of_the_real_size_has_its_published_name(title: str) -> None:
    """Built without memory; each name, and no other, with both matrices of the right shape."""
    name, builds = on_meta.NETWORKS[title]
    family = train_lora.all_families()[name]
    adapted = re.compile(family.denoiser.targets)
    matrices = {}
    with torch.device("meta"):
        for place, layer in builds["transformer"]().named_modules():
            if adapted.fullmatch(place):
                up, down = (
                    torch.empty(layer.out_features, RANK),
                    torch.empty(RANK, layer.in_features),
                )
                matrices[f"transformer.{place}.lora_A.default.weight"] = down
                matrices[f"transformer.{place}.lora_B.default.weight"] = up
    assert family.write_lora
    named = family.write_lora(matrices, 1.0)
    expected = {}
    for place, blocks, layers in PUBLISHED[title]:
        for block, (layer, (rows, columns)) in itertools.product(range(blocks), layers.items()):
            rank = 3 * RANK if layer == "qkv" else RANK  # three adapters of one input
            expected[f"{place.format(block, layer)}.lora_A.weight"] = rank, columns
            expected[f"{place.format(block, layer)}.lora_B.weight"] = rows, rank
    assert {name: tuple(matrix.shape) for name, matrix in named.items()} == expected


# --- memory ------------------------------------------------------------------------------------

CONFIGS = [
    path
    for path in sorted((ROOT / "examples" / "configs").glob("*gb.json"))
    if TrainingConfig.from_json(path).base_model in on_meta.TITLES
]
BASES: dict[str, train_lora.BaseModel] = {}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_ready_made_config_fits_the_card_that_it_is_called_after(path: Path) -> None:
    """By the plan for the real size, with a twelfth of the card taken by others."""
    config = TrainingConfig.from_json(path)
    title = on_meta.TITLES[config.base_model]
    base = BASES.get(title) or BASES.setdefault(title, on_meta.look_at(title)[0])
    size = int(re.findall(r"(\d+)gb", path.stem)[0]) * 2**30
    free = size - size // 12
    card = train_lora.DeviceFacts(
        kind="cuda", name="card", memory_total_bytes=size, memory_free_bytes=free
    )
    plan = train_lora.MemoryPlan.make(config, base, 30, card)
    assert plan.fits
    assert plan.phases["encoding"] <= (plan.free or 0)


def test_every_size_of_card_has_a_config() -> None:
    """From 8 GB to 24."""
    sizes = {int(re.findall(r"(\d+)gb", path.stem)[0]) for path in CONFIGS}
    assert sizes == {8, 12, 16, 24}


@pytest.mark.parametrize(
    ("title", "blocks", "block", "width"),
    [
        ("Z-Image", 32, 4 * 3840**2 + 3 * 3840 * 10_240, 3840),
        ("Krea 2", 28, 3 * 6144**2 + 2 * 6144 * 1536 + 3 * 6144 * 16_384, 6144),
    ],
)
def test_operations_are_those_counted_by_hand(
    title: str, blocks: int, block: int, width: int
) -> None:
    """Of 4,096 tokens of a picture and 128 of a caption: 2 a weight and token, 4 n^2 d to look."""
    tokens = 4096 + 128
    there = blocks * (2 * block * tokens + 4 * tokens**2 * width) / 1e12
    assert on_meta.operations(*on_meta.look_at(title)) == pytest.approx(2 * there, rel=0.01)
