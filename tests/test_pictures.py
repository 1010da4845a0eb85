"""The pictures of the examples, and the programs that recognise them."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

from conftest import ROOT
from PIL import Image

import mascot
import shapes

IMAGES = ROOT / "examples" / "images"


# --- What judges the pictures ---


def test_a_drawn_shape_is_recognised() -> None:
    """Every shape in every colour, on two backgrounds, small and large."""
    things = itertools.product(shapes.PALETTE, shapes.SHAPES, ("white", "blue"), (34.0, 72.0))
    for colour, shape, background, reach in things:
        if colour == background:
            continue
        scene = shapes.Scene("", background, (shapes.Thing(colour, shape, 120, 130, reach),))
        seen = shapes.recognise(shapes.draw_scene(scene))
        assert seen == (colour, shape, background)


def test_an_empty_picture_shows_nothing() -> None:
    """The recogniser does not guess."""
    assert shapes.recognise(Image.new("RGB", (256, 256), "white")) == ("", "", "white")


def test_the_imp_is_found_where_it_is_and_nowhere_else() -> None:
    """In every picture of the dataset, and in none of the shapes the base model knows."""
    chance = random.Random(3)
    plain = [shapes.draw_scene(shapes.invent_scene(chance)) for _ in range(200)]
    imps = [Image.open(path) for path in sorted(IMAGES.glob("*.png"))]

    assert len(imps) == 12
    assert all(map(mascot.shows_imp, imps))
    assert not any(map(mascot.shows_imp, plain))


def test_held_out_combinations_stand_in_no_training_picture() -> None:
    """Else the judgement would be about memory."""
    chance = random.Random(4)
    scenes = [shapes.invent_scene(chance) for _ in range(2000)]
    shown = {(t.colour, t.shape, scene.background) for scene in scenes for t in scene.things}

    assert len(shapes.unseen()) > 40
    assert shown.isdisjoint(shapes.unseen())


# --- The files ---


def test_the_images_are_those_of_the_script(tmp_path: Path) -> None:
    """examples/mascot.py draws the same pictures and captions again."""
    mascot.draw_pictures(tmp_path)
    for drawn in sorted(tmp_path.iterdir()):
        kept = IMAGES / drawn.name
        if drawn.suffix == ".txt":
            assert kept.read_text("utf-8") == drawn.read_text("utf-8")
        else:
            assert Image.open(kept).tobytes() == Image.open(drawn).tobytes()
