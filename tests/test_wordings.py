"""Wordings: how the tags of captions are shuffled and left out, and what updates are told."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Recorder, write_image
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import one_of, prepare, tiny_config

import train_lora
from train_lora import Cache, Conditioning, TrainingConfig

TAGS = "zkb, red, blue, small, old, wet"
TAG = st.text("abc xyzé日", min_size=1).map(str.strip).filter(bool)


@pytest.fixture(scope="module")
def config(ground: Path) -> TrainingConfig:
    """Provide a config under which tags are shuffled; the trigger word is zkb."""
    return tiny_config(ground, trigger_words=["zkb"], shuffle_tags=True)


def words_of(config: TrainingConfig, line: str, count: int) -> list[list[str]]:
    """List the tags of so many wordings of a caption."""
    return [train_lora.word_anew(config, line, n).split(", ") for n in range(count)]


# --- One wording ---


def test_a_wording_has_the_same_tags_in_another_order(config: TrainingConfig) -> None:
    """The trigger word stays in front, and nothing is lost."""
    wordings = words_of(config, TAGS, 50)
    assert {tuple(sorted(words)) for words in wordings} == {tuple(sorted(TAGS.split(", ")))}
    assert {words[0] for words in wordings} == {"zkb"}
    assert len(set(map(tuple, wordings))) > 30


def test_every_order_of_tags_is_as_likely_as_another(config: TrainingConfig) -> None:
    """By counting: 400 are expected of each, with a deviation of 18."""
    counts = Counter(map(tuple, words_of(config, "zkb, a, b, c", 2400)))
    assert set(counts) == {("zkb", *order) for order in itertools.permutations("abc")}
    assert max(abs(count - 400) for count in counts.values()) < 90


@pytest.mark.parametrize(
    ("line", "kept", "front"),
    [
        ("red, ZKB, blue, old", 0, ["ZKB"]),
        ("red, a photo of zkb in blue, old, wet", 0, ["a photo of zkb in blue"]),
        ("red, zkbs, blue, zkb, old", 2, ["red", "zkbs", "zkb"]),
        ("red, blue, old, wet, zkb", 1, ["red", "zkb"]),
        ("zkb,  ,red,, blue", 3, ["zkb", "red", "blue"]),
        ("red, blue, zkb", 99, ["red", "blue", "zkb"]),
    ],
)
def test_trigger_words_and_the_first_tags_keep_their_order_in_front(
    config: TrainingConfig, line: str, kept: int, front: list[str]
) -> None:
    """A trigger word inside of a tag keeps it; one inside of a longer word does not."""
    changed = replace(config, keep_tokens=kept, tag_dropout=0.5)
    for words in words_of(changed, line, 20):
        assert words[: len(front)] == front


def test_a_trigger_word_of_several_tags_is_kept_whole(config: TrainingConfig) -> None:
    """Its commas divide it as those of the caption do."""
    changed = replace(config, trigger_words=("zkb, person", "red hat"))
    caption = train_lora.compose_caption("sitting, outside, day", changed.trigger_words)
    for words in words_of(changed, caption, 20):
        assert words[:3] == ["zkb", "person", "red hat"]


def test_tags_are_left_out_as_often_as_was_asked_for(config: TrainingConfig) -> None:
    """Each by itself, in the order of the caption where that is not to change."""
    changed = replace(config, shuffle_tags=False, tag_dropout=0.3)
    wordings = words_of(changed, TAGS, 2000)
    counts = Counter(itertools.chain.from_iterable(wordings))
    assert counts["zkb"] == 2000
    for tag in TAGS.split(", ")[1:]:
        assert abs(counts[tag] - 1400) < 5 * (2000 * 0.3 * 0.7) ** 0.5
    pairs = sum({"red", "blue"} <= set(words) for words in wordings)
    assert abs(pairs - 980) < 5 * (2000 * 0.49 * 0.51) ** 0.5
    assert all(words == [t for t in TAGS.split(", ") if t in words] for words in wordings)


def test_all_tags_may_be_left_out(config: TrainingConfig) -> None:
    """But for those that stay; where none does, nothing is told."""
    changed = replace(config, tag_dropout=1.0)
    assert train_lora.word_anew(changed, TAGS, 0) == "zkb"
    assert train_lora.word_anew(replace(changed, trigger_words=()), TAGS, 0) == ""


@given(tags=st.lists(TAG, min_size=1, max_size=12), number=st.integers(0, 15))
def test_a_wording_is_made_of_the_tags_of_its_caption(
    config: TrainingConfig, tags: list[str], number: int
) -> None:
    """Whatever they are; a function of seed, caption and number alone."""
    changed = replace(config, keep_tokens=1, tag_dropout=0.4)
    line = ", ".join(tags)
    wording = train_lora.word_anew(changed, line, number)
    assert wording.split(", ")[0] == tags[0]
    assert not Counter(wording.split(", ")) - Counter(tags)
    torch.manual_seed(number)
    assert train_lora.word_anew(changed, line, number) == wording


def test_wordings_differ_with_the_seed(config: TrainingConfig) -> None:
    """Two runs see two rows of them."""
    assert words_of(config, TAGS, 9) != words_of(replace(config, seed=1), TAGS, 9)


# --- All wordings of a caption ---


def test_a_caption_is_its_only_wording_unless_something_is_asked_for(
    config: TrainingConfig,
) -> None:
    """To the letter, commas and all; of several lines, each is one."""
    plain = replace(config, shuffle_tags=False)
    assert train_lora.word_caption(plain, "zkb,red ,, blue", 16) == ("zkb,red ,, blue",)
    assert train_lora.word_caption(plain, "zkb, a\nzkb, b", 16) == ("zkb, a", "zkb, b")


def test_lines_share_the_wordings_evenly(config: TrainingConfig) -> None:
    """Each has at least one."""
    for lines, each in ((1, 16), (3, 5), (20, 1)):
        caption = "\n".join(f"zkb, line{n}, red" for n in range(lines))
        wordings = train_lora.word_caption(config, caption, 16)
        found = Counter(n for n in range(lines) for w in wordings if f"line{n}" in w.split(", "))
        assert found == dict.fromkeys(range(lines), each)


@pytest.mark.parametrize("tokens", [75, 225])
@pytest.mark.parametrize("images", [1, 100, 5000, 10**6])
def test_all_wordings_take_a_gibibyte_at_most_or_are_two(
    images: int, tokens: int, ground: Path
) -> None:
    """So that neither memory nor disk fill up, however long the run is."""
    config = tiny_config(ground, "sdxl", shuffle_tags=True, max_tokens=tokens)
    _, base = train_lora.inspect_model(config)
    assert base
    each = train_lora.wordings_each(config, base, images)
    taken = 4 * each * images * (tokens // 75) * 77 * base.text_width
    assert each in range(2, 17)
    assert each == 2 or taken <= 2**30
    assert each == 16 or taken + taken // each > 2**30
    assert train_lora.wordings_each(replace(config, shuffle_tags=False), base, images) == 1


# --- What an update is told ---


def cache_of(wordings: tuple[str, ...]) -> Cache:
    """Make an image with some wordings, without a VAE."""
    moments, caption = torch.ones(1, 2, 4, 2, 2), "a caption"
    image = train_lora.CachedImage("a.png", caption, moments, torch.zeros(6))
    every = dict.fromkeys(("", *wordings))
    texts = {text: Conditioning(number=torch.tensor([[n]])) for n, text in enumerate(every)}
    return Cache((image,), texts, {caption: wordings})


def test_every_wording_is_told_as_often_as_the_others() -> None:
    """And the empty caption as often as caption_dropout says."""
    cache = cache_of(("a", "b", "c", "d"))
    counts = Counter(cache.draw_text("a caption", 0.2, step) for step in range(2000))
    assert set(counts) == {"", "a", "b", "c", "d"}
    assert all(abs(count - 400) < 5 * (2000 * 0.2 * 0.8) ** 0.5 for count in counts.values())


def test_a_slot_is_told_the_same_whoever_stands_beside_it(config: TrainingConfig) -> None:
    """However an update is split, and in whatever order its parts are made."""
    cache, dropping = cache_of(("a", "b", "c", "d")), replace(config, caption_dropout=0.2)
    slots = [(slot, 0) for slot in range(6)]
    together = train_lora.draw_batch(one_of(1000), cache, dropping, 7, slots)
    for part in ([5, 4], [0], [3, 1, 2]):
        batch = train_lora.draw_batch(
            one_of(1000), cache, dropping, 7, [slots[slot] for slot in part]
        )
        assert torch.equal(batch.text["number"], together.text["number"][part])


def test_wordings_change_neither_noise_nor_times(config: TrainingConfig) -> None:
    """What captions draw has a source of its own."""
    dropping = replace(config, caption_dropout=0.5)
    one, other = (
        train_lora.draw_batch(one_of(1000), cache_of(words), knobs, 3, [(0, 0), (1, 0)])
        for knobs, words in ((config, ("a",)), (dropping, ("a", "b", "c")))
    )
    for name in ("latents", "noise", "timesteps", "time_ids"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def tell_story(ground: Path, text: str, **changes: Any) -> tuple[Recorder, Cache]:
    """Prepare a run on two images that have the same caption."""
    folder = ground / f"story {len(text)}"
    for number in range(2):
        path = write_image(folder / f"{number}.png", (256, 256))
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
    ready = prepare(tiny_config(ground, dataset_path=str(folder), **changes))
    return ready.recorder, ready.cache


@pytest.mark.parametrize("learning", [False, True])
def test_a_run_reads_all_that_its_updates_may_be_told(ground: Path, learning: bool) -> None:
    """Every wording is read once, whether as an embedding or as token ids."""
    told: dict[str, Any] = {"shuffle_tags": True, "caption_lines": "random"}
    told |= {"caption_dropout": 0.1, "sample_negative_prompt": "bad"}
    text = "zkb, a, b, c, d\ne, f, g, h"
    _, cache = tell_story(ground, text, train_text_encoder=learning, **told)
    (wordings,) = cache.wordings.values()
    assert len(wordings) == 16
    assert {"", *wordings} < cache.texts.keys()
    kinds = {"input_ids_1"} if learning else {"prompt_embeds"}
    assert all(text.keys() == kinds for text in cache.texts.values())


def test_a_long_caption_is_told_of_once_however_it_is_worded(ground: Path) -> None:
    """By its image."""
    recorder, _ = tell_story(ground, "of, " * 40, shuffle_tags=True)
    (warned,) = [w["data"] for w in recorder.of_type("warning")]
    assert (warned["captions"], warned["files"]) == (2, ["0.png", "1.png"])


def test_layers_that_clip_skip_leaves_out_learn_nothing(ground: Path) -> None:
    """They get no adapter; those that are read learn in every update."""
    ready = prepare(tiny_config(ground, train_text_encoder=True, clip_skip=2, max_tokens=150))
    plain = prepare(tiny_config(ground, train_text_encoder=True))
    names, all_names = (
        {name.partition("layers.")[2][0] for name in each.learner.parameters if "layers." in name}
        for each in (ready, plain)
    )
    assert names == all_names - {max(all_names)}
    ready.make_updates(2)
    ups = [value for name, value in ready.learner.matrices.items() if "lora_B" in name]
    assert all(value.any() for value in ups)
