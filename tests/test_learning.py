"""The study of learning: its judges can be trusted, and its tables are what was measured."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import concepts
import learning
import measure
from concepts import CONCEPTS, Case, Concept
from learning import Recipe, Task, Wish

EVERY = pytest.mark.parametrize("concept", CONCEPTS.values(), ids=CONCEPTS)


def judged_wrong(concept: Concept, case: Case) -> list[Image.Image]:
    """Draw a case in each of the wrong ways."""
    reach = concepts.PLACED if concept.placed else concepts.SIZES[case.size]
    return [concepts.paint(layers, case.background, reach=reach) for layers in concept.wrong(case)]


@EVERY
def test_real_drawings_are_right_and_wrong_ones_wrong(concept: Concept) -> None:
    """Each of the wrong ones has one thing that is not as it should be."""
    chance = random.Random(1)
    for case in concepts.cases(concept, concept.held_out, 3, 1):
        assert concepts.is_right(concept, case, concepts.draw(concept, case, chance))
        wrong = judged_wrong(concept, case)
        assert not any(concepts.is_right(concept, case, picture) for picture in wrong)


@pytest.mark.slow
@EVERY
def test_a_judge_sees_through_the_vae(concept: Concept) -> None:
    """What a perfect denoiser would give is right in all cases, and wrong drawings in none."""
    chance = random.Random(2)
    with torch.no_grad():
        for case in concepts.cases(concept, concept.backgrounds, 20, 2):
            drawn = [concepts.draw(concept, case, chance), *judged_wrong(concept, case)]
            verdicts = [concepts.is_right(concept, case, through_the_vae(each)) for each in drawn]
            assert verdicts == [True] + [False] * (len(drawn) - 1)


def through_the_vae(picture: Image.Image) -> Image.Image:
    """Encode and decode."""
    pipeline = learning.base_model()
    latents = learning.encode([picture]) / pipeline.vae.config.scaling_factor
    decoded: Image.Image = pipeline.image_processor.postprocess(
        pipeline.vae.decode(latents).sample
    )[0]
    return decoded


@EVERY
def test_no_picture_of_a_dataset_has_a_background_that_is_held_out(
    concept: Concept, tmp_path: Path
) -> None:
    """Nor does a concept stand on one of its own colours; a caption fits the text encoder."""
    learning.write_dataset(concept, 0, tmp_path)
    captions = [path.read_text("utf-8") for path in sorted(tmp_path.glob("*.txt"))]
    assert len(captions) == learning.PICTURES
    for caption in captions:
        assert concepts.TRIGGER in caption.split()
        assert caption.split()[-2] not in {*concept.held_out, *concept.colours}
        assert len(learning.base_model().tokenizer(caption).input_ids) <= 16


def test_a_seed_draws_the_same_dataset(tmp_path: Path) -> None:
    """And another seed another one."""
    concept = CONCEPTS["style"]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        learning.write_dataset(concept, seed, tmp_path / name)
    a, b, c = ((tmp_path / name / "03.png").read_bytes() for name in "abc")
    assert (a == b, a == c) == (True, False)


def test_pictures_that_do_not_change_do_not_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that is black instead of white has moved by all there is."""
    white = Image.new("RGB", (8, 8), "white")
    monkeypatch.setattr(learning, "base_pictures", lambda count: [white] * count)
    assert learning.drift([white, white]) == 0
    assert learning.drift([white, Image.new("RGB", (8, 8))]) == pytest.approx(0.5)


def test_the_loss_is_that_of_the_velocity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A denoiser that always answers nothing has the mean square of what was to be said."""
    pipeline = measure.load(measure.BASE)

    class Nothing(torch.nn.Module):
        def forward(self, noisy: torch.Tensor, *_rest: object) -> object:
            """Answer zeros."""
            return type("Answer", (), {"sample": torch.zeros_like(noisy)})

    monkeypatch.setattr(pipeline, "unet", Nothing())
    concept = CONCEPTS["nested"]
    with torch.no_grad():
        loss = learning.held_out_loss(pipeline, concept, concept.held_out)
        every = concepts.cases(concept, concept.held_out, learning.HELD_BACK, 1000)
        drawn = [concepts.draw(concept, c, random.Random(f"{c}")) for c in every]
        power = float(learning.encode(drawn).square().mean())
    alphas = pipeline.scheduler.alphas_cumprod.numpy()
    chosen = alphas[[int((n + 0.5) / learning.TIMES * 1000) for n in range(learning.TIMES)]]
    # v is noise, scaled by sqrt(alpha), less the latents, scaled by sqrt(1 - alpha).
    assert loss == pytest.approx(float(np.mean(chosen + (1 - chosen) * power)), rel=0.03)


def test_a_study_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the results is not run again."""
    results = tmp_path / "results.jsonl"
    row = {"recipe": "half", "concept": "pair", "seed": 0, "steps": 150}
    results.write_text(json.dumps(row) + "\n", "utf-8")
    learning.run([Task("half", "pair", 0)], results, 1, Wish(1))
    assert learning.read(results) == [row]


def test_a_table_holds_runs_against_the_same_of_the_textbook() -> None:
    """Half the width of an interval is 1.96 standard errors of the differences."""
    rows: list[dict[str, Any]] = [
        {"recipe": recipe, "concept": "pair", "seed": seed, "steps": 150, "loss": loss}
        | {"loss_held_out": 0.2, "right": 0.5, "drift": 0.01}
        for recipe, losses in {learning.TEXTBOOK: (0.2, 0.4), "half": (0.1, 0.1)}.items()
        for seed, loss in enumerate(losses)
    ]
    first, second = learning.table(rows).splitlines()[2:]
    assert first.startswith("| textbook | 150 | 2 | 0.300 |  | 0.200 |  | 50% | 0.010 |  |")
    assert second.startswith("| half | 150 | 2 | 0.100 | -0.200 ± 0.196 | 0.200 | +0.000 ± 0.000 |")
    assert "| pair | half | 2 | 0.100 | 0.200 | 50% | 0.010 |" in learning.by_concept(rows)


def test_the_tables_in_print_are_those_of_the_results() -> None:
    """Every number on the page comes from a run that learning.jsonl has."""
    rows, page = learning.read(learning.RESULTS), (ROOT / "benchmarks" / "README.md").read_text()
    main = [row for row in rows if row["recipe"] in learning.MAIN]
    assert len(main) == len(learning.MAIN) * len(CONCEPTS) * 3
    assert learning.table(rows) in page
    assert learning.by_concept(main) in page


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [learning.TEXTBOOK, "tiny"])
def test_both_loops_are_trained_and_measured(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a few updates the loss is a little lower than the base model's."""
    knobs = learning.RECIPES["all"].knobs if recipe == "tiny" else {}
    monkeypatch.setitem(learning.RECIPES, recipe, Recipe(20, knobs))
    found = learning.run_task(Task(recipe, "nested", 0), Wish(2))
    before = learning.judge(None, CONCEPTS["nested"], Wish(2))
    assert before["drift"] == 0 < found["drift"]
    assert found["loss"] < before["loss"]
