"""A word of its own: what stands for it, what learns, what other programs make of its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import Record, Recorder, load_config, write_model
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import FAMILIES, PIPELINES
from tiny_runs import Ready, prepare, tiny_base, tiny_config

import train_lora
from train_lora import ErrorCode, LoRATrainer, TrainError, WarningCode

CAPTION = "a cat, zkb's dog and (zkb) of zkb; zkb,a!zkb. zkb"
WORD: dict[str, Any] = {
    "embedding_tokens": 3,
    "embedding_init": "cat dog",
    "embedding_learning_rate": 0.01,
}


def learning(ground: Path, family: str = "sd1", **changes: Any) -> Ready:
    """Prepare a run that learns a word, all of whose captions are the same."""
    ready = prepare(tiny_config(ground, family, **WORD | {"max_grad_norm": 0} | changes))
    texts = [("", CAPTION), ("", "a cat"), ("", "")]
    told = train_lora.tokenize(texts, ready.models, ready.events)
    images = tuple(replace(image, caption=CAPTION) for image in ready.cache.images)
    ready.cache = replace(ready.cache, images=images, texts=ready.cache.texts | told)
    return ready


def copied(matrices: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy what learns."""
    return {name: matrix.clone() for name, matrix in matrices.items()}


def ids_of(ready: Ready, text: str) -> list[int]:
    """Turn a text into the first encoder's token ids, without its ends."""
    found = train_lora.read_tokens(text, ready.models)["input_ids_1"][0].tolist()
    start, end = ready.models.tokenizers[0].bos_token_id, ready.models.tokenizers[0].eos_token_id
    assert found[0] == start
    return list(found[1 : found.index(end)])


# --- what stands for it ---


def test_tokens_stand_for_the_word_wherever_it_stands_alone(ground: Path) -> None:
    """Whatever its case and whatever is beside it, as long as that is no letter or digit."""
    ready = learning(ground)
    new, plain = [-1, -2, -3], ready.models.tokenizers[0]
    assert ids_of(ready, "ZKB") == new
    for before, after in (("a ", " cat"), ("(", ")"), ("", "'s"), ("cat,", ", dog"), ("a-", "-a")):
        parts = [plain(part, add_special_tokens=False).input_ids for part in (before, after)]
        assert ids_of(ready, f"{before}zkb{after}") == [*parts[0], *new, *parts[1]]
    for other in ("zkbs", "azkb", "zkb2", "zkb_"):
        assert min(ids_of(ready, other)) >= 0


def test_a_caption_counts_as_long_as_its_new_tokens_make_it(ground: Path) -> None:
    """In preflight, without the tokens themselves, as in training."""
    ready = learning(ground, embedding_tokens=5)
    caption = "zkb " * 15  # 75 tokens
    for text, warned in ((caption, []), (caption + "a", ["caption_truncated"])):
        ready.recorder.records.clear()
        train_lora.tokenize([("x.png", text)], ready.models, ready.events)
        train_lora.report_long(
            ready.config.word.weigh([("x.png", text)]), ready.models.base, ready.events
        )
        assert ready.recorder.codes() == 2 * warned
    assert ids_of(ready, caption + "a") == [-1, -2, -3, -4, -5] * 15


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_word_begins_as_what_it_is_said_to_be(family: str, ground: Path) -> None:
    """Spread over the tokens of the words given; by default as its own letters, to no effect."""
    ready = learning(ground, family)
    for tokenizer, encoder, vectors in readers(ready):
        cat, dog = tokenizer("cat dog", add_special_tokens=False).input_ids
        assert torch.equal(vectors, encoder.get_input_embeddings().weight[[cat, cat, dog]])
    own = learning(ground, family, embedding_init=None)
    plain = prepare(tiny_config(ground, family))  # whose captions are the word alone
    with torch.no_grad():
        read = own.models.read_text(train_lora.read_tokens("zkb", own.models))
    expected = plain.cache.read(["zkb"])
    assert all(torch.allclose(read[name], expected[name], atol=1e-6) for name in expected)


def readers(ready: Ready) -> list[tuple[Any, Any, torch.Tensor]]:
    """List tokenizers and text encoders with the vectors that are learned for each."""
    models, keys = ready.models, ready.models.base.family.embedding_keys
    vectors = [ready.learner.matrices[f"embedding.{key}"] for key in keys]
    return list(zip(models.tokenizers, models.text_encoders, vectors, strict=True))


# --- what learns ---


@pytest.mark.parametrize(("family", "text"), [("sd1", False), ("sdxl", True)])
def test_the_gradient_is_that_of_rows_in_a_longer_table(
    family: str, text: bool, ground: Path
) -> None:
    """By autograd through encoders whose whole table learns, the new rows at its end."""
    ready = learning(ground, family, train_text_encoder=text)
    slots = list(enumerate(ready.order.window(1)))
    batch = train_lora.draw_batch(ready.models, ready.cache, ready.config, 1, slots)
    ready.go_through(1)
    keys = ready.models.base.family.embedding_keys
    found = [ready.learner.gradients[f"embedding.{key}"] for key in keys]

    tables = []
    longer = [train_lora.load_part(ready.models.base, p, torch.float32) for p in parts_of(ready)]
    for number, (encoder, (tokenizer, _, vectors)) in enumerate(
        zip(longer, readers(ready), strict=True), start=1
    ):
        known = encoder.get_input_embeddings().weight
        table = torch.nn.Parameter(torch.cat([known, vectors]))
        encoder.get_input_embeddings().weight = table
        next(
            m for m in encoder.modules() if "eos_token_id" in vars(m)
        ).eos_token_id = tokenizer.eos_token_id
        ids = batch.text[f"input_ids_{number}"]
        batch.text[f"input_ids_{number}"] = torch.where(ids < 0, len(known) - 1 - ids, ids)
        tables.append(table)
    models = replace(ready.models, text_encoders=longer)
    torch.autograd.backward(train_lora.batch_losses(models, batch).sum() / len(slots))
    for gradient, table in zip(found, tables, strict=True):
        assert table.grad is not None
        assert float(gradient.abs().max()) > 1e-6
        assert torch.allclose(gradient, table.grad[-3:], rtol=1e-4, atol=1e-8)


def parts_of(ready: Ready) -> tuple[train_lora.Part, ...]:
    """List the text encoders."""
    return ready.models.base.family.text_encoders


@pytest.mark.parametrize(("family", "lora"), [("sd2", False), ("sdxl", True)])
def test_nothing_but_the_new_vectors_moves(family: str, lora: bool, ground: Path) -> None:
    """And the LoRA, where one is trained; each weight still equals the file's, bit for bit."""
    ready = learning(ground, family, train_lora=lora, learning_rate=0.01)
    learns = {name.partition(".")[0] for name in ready.learner.matrices}
    assert learns == ({"unet", "embedding"} if lora else {"embedding"})
    before = copied(ready.learner.matrices)
    ready.make_updates(2)
    moved = {
        n for n, matrix in ready.learner.matrices.items() if not torch.equal(matrix, before[n])
    }
    assert moved == set(before)
    for part, network in ready.networks().items():
        (file,) = (tiny_base(family, ground / "bases") / part).glob("*.safetensors")
        published = {k.removeprefix("text_model."): v for k, v in load_file(file).items()}
        state = {k.replace(".base_layer", ""): v for k, v in network.state_dict().items()}
        state = {k.removeprefix("text_model."): v for k, v in state.items() if ".lora_" not in k}
        extra = set() if part == "unet" else {"embeddings.token_embedding.new"}
        assert state.keys() - published.keys() == extra
        assert all(torch.equal(state[name], published[name]) for name in published)


def test_the_optimizer_holds_the_new_rows_and_no_table(ground: Path) -> None:
    """With a rate of its own, and without decay."""
    ready = learning(ground, train_lora=False, weight_decay=0.5)
    (group,) = ready.learner.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.01, 0)
    assert [p.numel() for p in group["params"]] == [3 * 32]
    ready.make_updates(1)
    assert ready.recorder.of_type("progress")[-1]["learning_rate"] == 0.01


def test_a_vector_grows_no_longer_than_any_that_is_known(ground: Path) -> None:
    """Its direction stays as the update left it, and a shorter one is left alone."""
    ready = learning(ground)
    ((_, encoder, vectors),) = readers(ready)
    longest = encoder.get_input_embeddings().weight.norm(dim=1).max()
    vectors[0].mul_(50)
    before = vectors.clone()
    ready.learner.step(0.0)
    assert torch.allclose(vectors[0], before[0] * longest / before[0].norm())
    assert torch.equal(vectors[1:], before[1:])


def test_vectors_learn_in_full_precision_beside_half_of_it(ground: Path) -> None:
    """The encoders read a copy in their own."""
    ready = prepare(tiny_config(ground, **WORD))
    ready.models.denoiser, ready.models.dtype = None, torch.bfloat16
    ready.models.load_text_encoders(torch.bfloat16)
    facts, _ = train_lora.inspect_model(ready.config)
    ready.learner = ready.adapt(facts)
    ((_, encoder, vectors),) = readers(ready)
    used = encoder.get_input_embeddings().new
    before = vectors.clone()
    ready.make_updates(1)
    assert (vectors.dtype, used.dtype) == (torch.float32, torch.bfloat16)
    assert float((vectors - before).abs().max()) > 1e-3
    assert torch.equal(used, vectors.to(torch.bfloat16))


def test_a_preview_shows_what_the_word_has_become(ground: Path) -> None:
    """A prompt without it stays as it was, however the word changes."""
    ready = learning(ground, train_lora=False)
    sketch = train_lora.Sketch(256, 256, 1, 7.0, "")
    both: list[dict[str, torch.Tensor]] = []
    for _ in range(2):
        with torch.no_grad():
            prompts = [CAPTION, "a cat"]
            both.append(train_lora.read_pairs(ready.models, ready.cache, prompts, sketch))
        ready.make_updates(1)
    before, after = (each["prompt_embeds"] for each in both)
    assert [torch.equal(*rows) for rows in zip(before, after, strict=True)] == [
        True,
        True,
        False,
        True,
    ]


# --- its file in other programs ---


def loaded_by_diffusers(ready: Ready, file: Path) -> Any:
    """Load the file into a pipeline as the library's own pages do."""
    family = ready.models.base.family.name
    pipe = getattr(diffusers, PIPELINES[family]).from_pretrained(ready.config.base_model)
    pipe.set_progress_bar_config(disable=True)
    if family != "sdxl":
        where: Record = {"weight_name": file.name, "local_files_only": True}
        pipe.load_textual_inversion(str(file.parent), token="zkb", **where)
        return pipe
    tensors = load_file(file)
    for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
        reader: Record = {
            "text_encoder": getattr(pipe, f"text_encoder{suffix}"),
            "tokenizer": getattr(pipe, f"tokenizer{suffix}"),
        }
        pipe.load_textual_inversion(tensors[key], token="zkb", **reader)
    # Else transformers takes the new token for the end of a text, as A1111 and ComfyUI do not.
    pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
    return pipe


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_prompts_as_training_did(family: str, ground: Path, tmp_path: Path) -> None:
    """From the file that a run writes, for a prompt in which the word stands in many ways."""
    ready = learning(ground, family, output_path=str(tmp_path))
    ready.make_updates(2)
    file = train_lora.files_of(ready.config)["embedding"]
    ready.write_files({"embedding": file})
    pipe = loaded_by_diffusers(ready, file)
    with torch.no_grad():
        own = ready.models.read_text(ready.cache.read([CAPTION]))
        options: Record = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        theirs = pipe.encode_prompt(CAPTION, device=torch.device("cpu"), **options)
    assert float((own["prompt_embeds"] - theirs[0]).abs().max()) < 1e-5
    if family == "sdxl":
        assert float((own["pooled_prompt_embeds"] - theirs[2]).abs().max()) < 1e-5


KEYS = {"sd2": {"emb_params": 32}, "sdxl": {"clip_l": 32, "clip_g": 40}}


@pytest.mark.parametrize("family", KEYS)
def test_the_file_is_laid_out_as_a1111_and_comfyui_expect(
    family: str, ground: Path, tmp_path: Path
) -> None:
    """One tensor for each encoder, a row for each token, in full precision, and who it is."""
    ready = learning(ground, family, output_path=str(tmp_path), save_precision="bf16")
    ready.make_updates(1)
    ready.write_files(train_lora.files_of(ready.config))
    file = tmp_path / "embeddings" / "tiny_embedding.safetensors"
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["lora_final.safetensors"]
    tensors = load_file(file)
    assert {k: tuple(v.shape) for k, v in tensors.items()} == {
        key: (3, width) for key, width in KEYS[family].items()
    }
    assert all(torch.equal(v, ready.learner.matrices[f"embedding.{k}"]) for k, v in tensors.items())
    assert not any(key in load_file(tmp_path / "lora_final.safetensors") for key in tensors)
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    assert header["modelspec.architecture"].endswith("/textual-inversion")
    assert (header["modelspec.trigger_phrase"], header["ss_steps"]) == ("zkb", "1")
    assert not any(name.startswith("ss_network") for name in header)


# --- whole runs ---


def run(ground: Path, out: Path, **changes: Any) -> tuple[train_lora.CompleteEvent, Recorder]:
    """Make a run of two updates that learns a word."""
    heard, where = Recorder(), {"output_path": str(out), "steps": 2, "checkpoint_steps": 1}
    config = tiny_config(ground, **WORD | where | {"validation_steps": 2} | changes)
    return LoRATrainer(config, train_lora.Emitter(heard)).train(), heard


def test_a_word_alone_is_what_the_run_is_for(ground: Path, tmp_path: Path) -> None:
    """No LoRA is written; every event that names a file names the embedding."""
    done, heard = run(ground, tmp_path / "out", train_lora=False)
    final = tmp_path / "out" / "embeddings" / "tiny_embedding.safetensors"
    assert done.final_path == done.embedding_path == str(final)
    assert train_lora.file_digest(final) == done.sha256
    checkpoints = [(line["path"], line["embedding_path"]) for line in heard.of_type("checkpoint")]
    names = [str(final.with_name(f"embedding_step_{step}.safetensors")) for step in (1, 2)]
    assert checkpoints == [(name, name) for name in names]
    assert not [
        *(tmp_path / "out").glob("*.safetensors"),
        *(tmp_path / "out").glob("checkpoints/*"),
    ]
    assert set(heard.codes()) == {"knob_without_effect"}  # rank and alpha of no LoRA
    again, heard = run(ground, tmp_path / "out", train_lora=False)
    assert again == done
    final.write_bytes(b"something else")
    assert run(ground, tmp_path / "out", train_lora=False)[0].sha256 == done.sha256
    assert train_lora.file_digest(final) == done.sha256


def test_both_files_are_announced_and_put_where_programs_look(ground: Path, tmp_path: Path) -> None:
    """The embedding under the word itself, by which prompts call it there."""
    places = {name: tmp_path / name for name in ("loras", "embeddings")}
    for place in places.values():
        place.mkdir()
    options = {f"{name}_path": str(place) for name, place in places.items()}
    done, heard = run(ground, tmp_path / "out", **options)
    (last,) = heard.of_type("complete")
    assert Path(done.final_path).name == "lora_final.safetensors"
    assert last["copy_path"] == str(places["loras"] / "tiny.safetensors")
    assert last["embedding_copy_path"] == str(places["embeddings"] / "zkb.safetensors")
    copy = Path(last["embedding_copy_path"]).read_bytes()
    assert copy == Path(last["embedding_path"]).read_bytes()
    assert [path.name for path in places["embeddings"].iterdir()] == ["zkb.safetensors"]
    run(ground, tmp_path / "out", steps=3, **options)  # its own is replaced
    with pytest.raises(TrainError) as refused:
        run(ground, tmp_path / "other", lora_name="other", **options)
    assert refused.value.code is ErrorCode.RUN_EXISTS
    assert refused.value.problems[0].path == "trigger_words"


def test_a_folder_of_embeddings_that_is_none_is_refused(ground: Path, tmp_path: Path) -> None:
    """As one of LoRAs is."""
    where = {"output_path": str(tmp_path / "out"), "embeddings_path": str(tmp_path / "nowhere")}
    with pytest.raises(TrainError) as refused:
        LoRATrainer(tiny_config(ground, **WORD | where)).validate()
    assert refused.value.problems[0].path == "embeddings_path"


# --- preflight ---

CONFLICTS: dict[str, tuple[Record, str]] = {
    "nothing is learned": ({"train_lora": False}, "train_lora"),
    "no word": ({"embedding_tokens": 2, "trigger_words": []}, "trigger_words"),
    "two words": ({"embedding_tokens": 2, "trigger_words": ["zkb person"]}, "trigger_words"),
    "signs": ({"embedding_tokens": 2, "trigger_words": ["<zkb>"]}, "trigger_words"),
    "a path": ({"embedding_tokens": 2, "trigger_words": ["../zkb"]}, "trigger_words"),
    "a long name": ({"embedding_tokens": 2, "output_path": "x" * 201}, "lora_name"),
    "one scale for all": (
        {"optimizer": "prodigy", "learning_rate": 1, "embedding_tokens": 2}
        | {"embedding_learning_rate": 1},
        "embedding_tokens",
    ),
    "a wild rate": (
        {"embedding_tokens": 2, "embedding_learning_rate": 0.2},
        "embedding_learning_rate",
    ),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_what_keeps_a_word_from_being_learned_is_refused(name: str, in_workspace: Path) -> None:
    """With the knob, what it should be, what it is, and what to do."""
    changes, path = CONFLICTS[name]
    with pytest.raises(TrainError) as refused:
        load_config(**changes)
    assert refused.value.code is ErrorCode.CONFIG_CONFLICT
    (problem,) = refused.value.problems
    assert problem.path == path
    assert problem.expected
    assert problem.found
    assert problem.hint


def test_the_first_trigger_word_is_the_one(in_workspace: Path) -> None:
    """Others may be of any kind."""
    config = load_config(embedding_tokens=2, trigger_words=[" zkb-7 ", "a person"])
    assert (config.word.text, config.word.tokens) == ("zkb-7", 2)


def test_knobs_without_effect_are_remarked_on(in_workspace: Path) -> None:
    """Those of a LoRA beside none, and those of a word beside none."""
    word = load_config(embedding_init="cat", embedding_learning_rate=0.01)
    assert [r.data["key"] for r in word.remarks] == ["embedding_init", "embedding_learning_rate"]
    lora = load_config(embedding_tokens=1, train_lora=False, lora_rank=8, loras_path="loras")
    assert [r.data["key"] for r in lora.remarks] == ["lora_rank", "loras_path"]


@pytest.mark.parametrize(("word", "known"), [("cat", True), ("zkb", False)])
def test_a_word_that_the_base_knows_is_warned_of(
    word: str, known: bool, ground: Path, tmp_path: Path
) -> None:
    """It would mean something else in every other prompt."""
    heard = Recorder()
    options: Record = {"trigger_words": [word], "output_path": str(tmp_path / "out")}
    LoRATrainer(tiny_config(ground, **WORD | options), train_lora.Emitter(heard)).validate()
    assert heard.codes() == [WarningCode.WORD_KNOWN.word] * known


def test_the_memory_plan_counts_encoders_and_vectors(in_workspace: Path) -> None:
    """The encoders stay, and activations with them; without a LoRA, there is little to learn."""
    write_model(in_workspace / "model")
    weights: train_lora.Shapes = {"text_model.encoder.layers.0.mlp.fc1.weight": (300, 100)}

    def planned(**changes: Any) -> train_lora.MemoryPlan:
        config = load_config(**changes)
        _, base = train_lora.inspect_model(config)
        assert base
        (part,) = base.family.text_encoders
        located = replace(base.parts[part], shapes=weights)
        base = replace(base, parts=base.parts | {part: located})
        device = train_lora.DeviceFacts(kind="cpu", name="x")
        return train_lora.MemoryPlan.make(config, base, 3, device)

    plain, word = planned(), planned(embedding_tokens=4)
    alone = planned(embedding_tokens=4, train_lora=False)
    width = plain.structure.text_width
    assert (plain.parts["learned_text"], word.parts["learned_text"]) == (0, 4 * 30_000)
    assert word.parts["activations"] > plain.parts["activations"]
    assert word.parts["adapter"] - plain.parts["adapter"] == 16 * 4 * width
    assert alone.parts["adapter"] == 16 * 4 * width
    assert train_lora.disk_needed(alone.config, plain.structure, 10) > 0
