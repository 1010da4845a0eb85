"""tools/embeddings.py: tiny models of the real classes, loaded as users load theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_json
from scenes import scene

from tools.embeddings import Eye
from train_lora import Emitter, Phase, StopRequest, TrainError


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Provide more pictures than are seen at once."""
    paths = [tmp_path / f"{number}.png" for number in range(18)]
    for number, path in enumerate(paths):
        scene(number, 64).save(path)
    return paths


def phase() -> Phase:
    """Make a phase that nobody watches."""
    return Phase("looking", 1, Emitter(), StopRequest())


@pytest.mark.parametrize("name", ["dino", "clip"])
def test_pictures_become_rows_of_length_one(name: str, eyes: Path, files: list[Path]) -> None:
    """Each the same whether seen alone or among others."""
    eye = Eye(str(eyes / name))
    rows = eye.see(files, phase())
    assert rows.shape == (18, 8 if name == "clip" else 16)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1)
    assert np.allclose(rows[[17]], eye.see(files[17:], phase()), atol=1e-6)
    assert not np.allclose(rows[0], rows[1])


def test_clip_sees_and_reads_as_it_does_itself(eyes: Path, files: list[Path]) -> None:
    """Held against what the whole model says of picture and text together."""
    eye = Eye(str(eyes / "clip"))
    tokens = eye.tokenizer(["a cat"], return_tensors="pt")  # type: ignore[misc]  # CLIP has one
    pixels = eye.processor(images=[scene(0, 64)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        both = eye.model(**tokens, pixel_values=pixels)
    assert np.allclose(eye.see(files[:1], phase()), both.image_embeds.numpy(), atol=1e-6)
    assert np.allclose(eye.read(["a cat"]), both.text_embeds.numpy(), atol=1e-6)


def test_a_transparent_picture_is_seen_on_white(eyes: Path, tmp_path: Path) -> None:
    """As the trainer sees it, and not with what lies hidden under it."""
    hidden = scene(1, 64).convert("RGBA")
    hidden.putalpha(0)
    hidden.save(tmp_path / "a.png")
    scene(1, 64).point(lambda _: 255).save(tmp_path / "b.png")
    rows = Eye(str(eyes / "dino")).see([tmp_path / "a.png", tmp_path / "b.png"], phase())
    assert np.allclose(rows[0], rows[1])


@pytest.mark.parametrize("what", ["nothing", "another kind", "no weights", "an id"])
def test_a_model_that_cannot_be_used_is_named(what: str, eyes: Path, tmp_path: Path) -> None:
    """With what to do; the network is never asked."""
    folder = tmp_path / "model"
    folder.mkdir()
    if what != "nothing":
        kind = "bert" if what == "another kind" else "dinov2"
        write_json(folder / "config.json", {"model_type": kind})
    with pytest.raises(TrainError) as caught:
        Eye("nobody/nothing" if what == "an id" else str(folder))
    assert caught.value.problems[0].hint or caught.value.hint


def test_a_model_that_only_sees_does_not_read(eyes: Path) -> None:
    """Which is told, and not guessed."""
    with pytest.raises(TrainError, match="only sees"):
        Eye(str(eyes / "dino")).read(["a cat"])
