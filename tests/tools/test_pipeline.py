"""tools/pipeline.py: the whole way in one command, and never a step twice without a reason."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Recorder, write_image, write_json
from scenes import scene

import train_lora
from tools import pipeline
from tools.child import as_event, follow
from tools.pipeline import CAPTION, DATA, EVALUATE, GENERATE, Plan
from tools.reading import load_yaml, read_file
from train_lora import Emitter, ErrorCode, StopRequest, TrainError, TrainingInterrupted

PROGRAM = ROOT / "tools" / "pipeline.py"


def document(root: Path, model: Path, eyes: Path) -> dict[str, Any]:
    """Write down a way for tiny models."""
    return {
        "output_path": str(root / "out"),
        "data": {"source": str(root / "raw"), "validation": 0.3},
        "caption": {"with": "template", "template": "a {trigger} {name}"},
        "training": {
            "base_model": str(model),
            "trigger_words": ["zkb"],
            "resolution": 256,
            "steps": 2,
            "checkpoint_steps": 1,
            "lora_rank": 2,
            "sample_steps": 1,
            "device": "cpu",
        },
        "generate": {
            "prompts": ["zkb on grass", {"text": "a dog", "role": "prior"}],
            "seeds": [1, 2],
            "steps": 1,
            "device": "cpu",
        },
        "evaluate": {"vision": str(eyes / "dino")},
    }


def way(config: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    """Go the way as a host lets it go; return the exit code and all lines."""
    command = [sys.executable, str(PROGRAM), "--config", str(config), "--events", *options]
    done = subprocess.run(command, cwd=config.parent, stdout=subprocess.PIPE, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    check_lines(lines)
    return done.returncode, lines


def check_lines(lines: list[dict[str, Any]]) -> None:
    """Hold a stream against what the trainer promises of its own: one row, one last line."""
    last = [line["type"] in ("complete", "interrupted", "error") for line in lines]
    assert last == [False] * (len(lines) - 1) + [True]
    assert [line["seq"] for line in lines] == list(range(1, len(lines) + 1))
    assert all({"type", "seq", "timestamp", "message"} <= set(line) for line in lines)


def states(lines: list[dict[str, Any]]) -> dict[str, str]:
    """Tell of each step how it began."""
    steps = [line["data"] for line in lines if line.get("topic") == "step"]
    return {step["name"]: step["state"] for step in reversed(steps)}


@pytest.fixture(scope="module")
def gone(
    tmp_path_factory: pytest.TempPathFactory, built: Path, eyes: Path
) -> tuple[Path, list[dict[str, Any]]]:
    """Go the whole way once; provide the folder of it, and what was said."""
    root = tmp_path_factory.mktemp("way")
    for number in range(11):
        (root / "raw").mkdir(exist_ok=True)
        scene(number, 256).save(root / "raw" / f"{number}.png")
    config = write_json(root / "pipeline.json", document(root, built / "sd1", eyes))
    code, lines = way(config)
    assert code == 0, lines[-1]
    return root, lines


@pytest.fixture
def plan(gone: tuple[Path, list[dict[str, Any]]]) -> Plan:
    """Provide the plan of a way that was gone."""
    return Plan.of(json.loads((gone[0] / "pipeline.json").read_text("utf-8")))


def to_do(plan: Plan) -> list[str]:
    """List the steps that would be done, each for a reason of its own."""
    return [step.name for step in plan.steps if plan.reason(step)]


# --- the whole way ---


def test_the_way_leads_from_pictures_to_a_verdict(gone: tuple[Path, list[dict[str, Any]]]) -> None:
    """Every step leaves what it is there for, and the stream has all that was said on the way."""
    root, lines = gone
    out = root / "out"
    assert {"start", "progress", "checkpoint", "sample", "complete"} <= {s["type"] for s in lines}
    assert list(states(lines)) == ["evaluate", "generate", "training", "caption", "data"]
    assert (out / "dataset" / "train" / "1.txt").read_text("utf-8") == "a zkb 1\n"
    grid = json.loads((out / "grid" / "grid.json").read_text("utf-8"))
    assert [each["id"] for each in grid["loras"]] == ["base", "step_1", "step_2"]
    assert {p["text"]: p["role"] for p in grid["prompts"]} == {
        "zkb on grass": "subject",
        "a dog": "prior",
    }
    result = json.loads((out / "eval.json").read_text("utf-8"))
    assert len(result["arms"]) == 3
    held = [*(out / "dataset" / "validation").glob("*.png")]
    assert (result["training_images"], result["heldout_images"]) == (11 - len(held), len(held))
    assert 0 <= result["arms"][1]["copying"]["above_heldout"] <= 1
    assert lines[-1]["files"][-1] == str(out / "eval.json")
    assert not list((root / "raw").glob("*.txt"))
    assert str(root) not in (out / "pipeline.json").read_text("utf-8")


def test_a_second_start_does_nothing(gone: tuple[Path, list[dict[str, Any]]]) -> None:
    """Without a program being started, and without a file being touched."""
    root, _ = gone
    times = {p: p.stat().st_mtime_ns for p in (root / "out").rglob("*") if p.name != ".lock"}
    code, lines = way(root / "pipeline.json")
    assert (code, set(states(lines).values())) == (0, {"done already"})
    assert lines[-1]["summary"].startswith("Nothing to do")
    assert {p: p.stat().st_mtime_ns for p in times} == times


def test_only_what_depends_on_a_change_is_done_again(plan: Plan) -> None:
    """A prompt concerns the pictures drawn; what judges them is known only afterwards."""
    assert to_do(plan) == []
    plan.document["generate"]["prompts"].append("zkb in the snow")
    assert to_do(plan) == ["generate"]
    plan.document["training"]["steps"] = 3
    assert to_do(plan) == ["training", "generate"]


def test_files_are_told_apart_by_what_is_in_them(plan: Plan) -> None:
    """A caption that somebody mended is trained on; a picture that is gone is drawn again."""
    caption = plan.dataset / "1.txt"
    former = caption.read_bytes()
    caption.write_text("by hand", encoding="utf-8")
    assert to_do(plan) == ["training", "evaluate"]
    caption.write_bytes(former)
    os.utime(caption, (1, 1))
    assert to_do(plan) == []
    drawn = next((plan.out / "grid" / "images").rglob("*.png"))
    content = drawn.read_bytes()
    drawn.unlink()
    assert to_do(plan) == ["generate", "evaluate"]
    drawn.write_bytes(content)
    assert to_do(plan) == []


def test_what_was_held_back_is_what_it_is_judged_by(plan: Plan) -> None:
    """Unless other pictures are named, or none were held back; a change of them is one."""
    assert f"--heldout={plan.out / 'dataset' / 'validation'}" in plan.command(EVALUATE)
    text = min((plan.out / "dataset" / "validation").glob("*.txt"))
    content = text.read_bytes()
    text.write_bytes(content + b"more")
    assert to_do(plan) == ["training", "evaluate"]
    text.write_bytes(content)
    plan.document["evaluate"]["heldout"] = "mine"
    assert [w for w in plan.command(EVALUATE) if "heldout" in w] == ["--heldout=mine"]
    del plan.document["evaluate"]["heldout"], plan.document["data"]
    assert plan.heldout is None


def test_a_new_picture_changes_all_that_follows(plan: Plan, tmp_path: Path) -> None:
    """Its dataset is made beside the former one."""
    new = write_image(Path(plan.document["data"]["source"]) / "new.png", (300, 300))
    reasons = {step.name: plan.reason(step) for step in plan.steps}
    new.unlink()
    assert reasons["data"] == "what it reads or is asked for has changed"
    walk = pipeline.Walk(plan, None, Emitter(), StopRequest())
    copy = Plan(plan.document, tmp_path)
    (tmp_path / "dataset" / "train").mkdir(parents=True)
    walk.plan = copy
    walk.set_aside(plan.steps[0])
    assert (tmp_path / "dataset_earlier_1" / "train").is_dir()


def test_a_dataset_that_is_made_again_is_captioned_again(tmp_path: Path) -> None:
    """What was mended by hand is kept beside it; what was begun is gone on with."""
    (tmp_path / "raw").mkdir()
    for number in range(3):
        scene(number, 256).save(tmp_path / "raw" / f"{number}.png")
    said = document(tmp_path, tmp_path, tmp_path)
    said = {key: said[key] for key in ("output_path", "data", "caption", "training")}
    said["data"]["validation"] = 0
    plan = Plan.of(said)
    walk = pipeline.Walk(plan, None, Emitter(), StopRequest())
    plan.out.mkdir()
    walk.do(DATA)
    walk.do(CAPTION)
    (plan.dataset / "1.txt").write_text("by hand", encoding="utf-8")
    (plan.dataset / "2.png").unlink()
    assert plan.reason(DATA) == "dataset/train/2.png is missing"
    walk.do(DATA)
    earlier = plan.out / "dataset_earlier_1" / "train"
    assert (earlier / "1.txt").read_text("utf-8") == "by hand"
    assert plan.reason(DATA) is None
    assert plan.reason(CAPTION) == "it was never done"
    plan.done["data"]["outputs"] = None
    walk.do(DATA)
    assert not (plan.out / "dataset_earlier_2").exists()


def test_pictures_are_drawn_by_the_model_that_was_trained(tmp_path: Path) -> None:
    """With all that the training is told of it, wherever that stands; what is read is watched."""
    said = document(tmp_path, tmp_path, tmp_path)
    (tmp_path / "configs").mkdir()
    nested = {"vae": "other/vae", "model_config_path": str(tmp_path / "configs")}
    taught = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
    said["training"] |= {"training_params": nested | taught, "vae": "some/vae"}
    plan = Plan.of(said)
    options = plan.command(GENERATE)
    assert options[1:5] == [
        "--vae=other/vae",
        f"--model-config={tmp_path / 'configs'}",
        "--prediction-type=v_prediction",
        "--zero-terminal-snr=true",
    ]
    assert tmp_path / "configs" in plan.reads(GENERATE)
    assert {"vae", "zero_terminal_snr"}.isdisjoint(pipeline.keys_of(GENERATE))


def test_a_file_of_prompts_is_read_by_what_is_in_it(plan: Plan, tmp_path: Path) -> None:
    """Its name alone says nothing."""
    plan.document["generate"]["prompts"] = str(tmp_path / "prompts.txt")
    found = set()
    for text in ("zkb", "zkb\n", "zkb in the snow"):
        (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
        found.add(plan.inputs(GENERATE))
    assert len(found) == 2


def test_a_dry_run_tells_what_and_why(
    gone: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """And writes nothing."""
    code, lines = way(gone[0] / "pipeline.json", "--dry-run", "--from", "generate")
    assert (code, lines[-1]["summary"]) == (0, "Would run: generate, evaluate")
    assert states(lines)["training"] == "done already"
    options = ("--dry-run", "--set", f"output_path={tmp_path / 'other'}")
    code, lines = way(gone[0] / "pipeline.json", *options)
    assert states(lines)["caption"] == "would run, as a step before it comes first"
    assert not (tmp_path / "other").exists()


@pytest.mark.skipif(os.name != "posix", reason="the signals are POSIX's")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_reaches_the_step_and_a_second_start_goes_on(
    number: signal.Signals, tmp_path: Path, built: Path, eyes: Path
) -> None:
    """The trainer saves; the pipeline ends as the trainer would, with one last line."""
    for each in range(3):
        write_image(tmp_path / "raw" / f"{each}.png", (256, 256))
    said = document(tmp_path, built / "sd1", eyes)
    said = {key: said[key] for key in ("output_path", "data", "training")}
    said["training"] |= {"steps": 4000, "checkpoint_steps": 4000, "validation_steps": 4000}
    config = write_json(tmp_path / "pipeline.json", said)
    command = [sys.executable, str(PROGRAM), "--config", str(config), "--events"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE) as child:
        lines = []
        for line in child.stdout or ():
            lines.append(json.loads(line))
            if lines[-1]["type"] == "progress" and lines[-1]["step"] >= 2:
                child.send_signal(number)
    check_lines(lines)
    assert child.returncode == 128 + number
    assert (lines[-1]["type"], lines[-1]["reason"]) == ("interrupted", number.name)
    step = lines[-1]["step"]
    assert step >= 2
    code, lines = way(config, "--set", f"training.steps={step + 1}")
    assert code == 0
    assert states(lines)["data"] == "done already"
    assert [line["resumed_step"] for line in lines if line["type"] == "start"] == [step]


def test_a_failure_of_a_step_is_that_of_the_way(tmp_path: Path, eyes: Path) -> None:
    """With the code and the problems of the program; what was done before stays done."""
    write_image(tmp_path / "raw" / "0.png", (256, 256))
    said = document(tmp_path, tmp_path / "no model", eyes)
    config = write_json(tmp_path / "pipeline.json", said)
    code, lines = way(config)
    assert (code, lines[-1]["code"]) == (1, "model_not_found")
    assert lines[-1]["message"].startswith("training: ")
    assert lines[-1]["problems"][0]["path"] == "base_model"
    assert set(json.loads((tmp_path / "out" / "pipeline.json").read_text("utf-8"))["steps"]) == {
        "data",
        "caption",
        "training",
    }


# --- programs as processes ---


def events_to(recorder: Recorder) -> Emitter:
    """Make a stream that is kept."""
    return Emitter(recorder)


def test_what_a_program_says_is_numbered_anew(recorder: Recorder) -> None:
    """Facts, warnings and progress pass; an unknown type does no harm, nor does what is no line."""
    lines = [
        {"type": "info", "topic": "phase", "data": {"name": "x", "done": 1, "total": 2}, "seq": 7},
        {"type": "warning", "code": "image_skipped", "message": "Skipped x", "data": {}, "seq": 8},
        {"type": "warning", "code": "worth_a_look", "message": "Look", "data": {}, "seq": 9},
        {"type": "strange", "seq": 10},
        {"type": "complete", "message": "Done", "seq": 11},
    ]
    program = f"print('no line'); print({chr(10).join(map(json.dumps, lines))!r})"
    told = follow("x", ["-c", program], Emitter(recorder), StopRequest())
    assert told == "Done"
    phase, *warnings = recorder.records
    assert (phase["seq"], phase["data"]["name"], phase["data"]["done"]) == (1, "x", 1)
    assert [(r["seq"], r["message"]) for r in warnings] == [(2, "Skipped x"), (3, "Look")]
    assert recorder.codes() == ["image_skipped", "worth_a_look"]
    assert as_event({"type": "error"}) is None


def test_a_program_that_dies_is_an_error() -> None:
    """It had no last line; the exit code is told."""
    with pytest.raises(TrainError, match="exit code 3"):
        follow("x", ["-c", "import os; os._exit(3)"], Emitter(), StopRequest())


@pytest.mark.skipif(os.name != "posix", reason="the signals are POSIX's")
def test_a_stop_is_passed_on_once() -> None:
    """A second signal, a second later, would end the program at once."""
    program = (
        "import json, signal, time\n"
        "got = []\n"
        "signal.signal(signal.SIGINT, lambda number, _: got.append(number))\n"
        'print(\'{"type": "strange"}\', flush=True)\n'
        "while not got: time.sleep(0.01)\n"
        "time.sleep(1.5)\n"
        "last = {'type': 'interrupted', 'reason': 'SIGINT', 'step': len(got), 'path': None}\n"
        "print(json.dumps(last))"
    )
    stop = StopRequest()
    threading.Timer(1.0, stop.request, ("SIGINT",)).start()
    with pytest.raises(TrainingInterrupted) as stopped:
        follow("x", ["-c", program], Emitter(), stop)
    assert (stopped.value.reason, stopped.value.step) == ("SIGINT", 1)


def test_an_accident_leaves_no_program_behind(recorder: Recorder) -> None:
    """Whoever listens may fail."""

    def fail(record: dict[str, Any]) -> None:
        raise RuntimeError(record["message"])

    program = (
        "import os, time\n"
        "line = {'type': 'warning', 'code': 'x', 'message': str(os.getpid()), 'data': {}}\n"
        "import json; print(json.dumps(line), flush=True); time.sleep(60)"
    )
    began = time.monotonic()
    with pytest.raises(RuntimeError) as failed:
        follow("x", ["-c", program], Emitter(fail), StopRequest())
    assert time.monotonic() - began < 50
    with pytest.raises(ProcessLookupError):
        os.kill(int(str(failed.value)), 0)


# --- the file ---


def test_yaml_says_what_people_mean(tmp_path: Path) -> None:
    """1e-4 is a number, dates and words are text, and JSON is as good."""
    text = "a: 1e-4\nb: -2.5E+3\nc: 1-4\nd: [1, 2.5, x]\ne: zkb\n"
    known = {"a": 1e-4, "b": -2500.0, "c": "1-4", "d": [1, 2.5, "x"], "e": "zkb"}
    assert load_yaml(text) == known
    (tmp_path / "x.yml").write_text("\ufeff" + text, encoding="utf-8")
    assert read_file(tmp_path / "x.yml") == known
    assert read_file(write_json(tmp_path / "x.json", known)) == known


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2", "a stands twice"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: [1", "expected"),
        ("- a", "sections"),
        ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("a: .nan", "not JSON compliant"),
        ("[" * 3000, "recursion"),
        ("a: 2024-01-01", "not JSON serializable"),
    ],
)
def test_yaml_that_is_no_plain_data_is_refused(text: str, words: str, tmp_path: Path) -> None:
    """With the reason; nothing of it is run."""
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(TrainError, match=words) as refused:
        read_file(tmp_path / "x.yaml")
    assert refused.value.code == ErrorCode.CONFIG_NOT_JSON


def test_without_pyyaml_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON needs nothing."""
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "x.yaml").write_text("a: 1", encoding="utf-8")
    with pytest.raises(TrainError, match=r"pip install -r tools/requirements\.txt"):
        read_file(tmp_path / "x.yaml")
    assert read_file(write_json(tmp_path / "x.json", {"a": 1})) == {"a": 1}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown section": ({"trainning": {}}, "Did you mean training"),
    "an unknown key": ({"generate.seed": 1}, "generate.seed: .*Did you mean seeds"),
    "a key that follows": ({"evaluate.train": "x"}, "evaluate.train: expected a known key"),
    "an unknown knob": ({"training.stepz": 1}, r"training\.stepz: .*Did you mean steps"),
    "a knob out of range": ({"training.steps": 0}, r"training\.steps: expected a whole number"),
    "a knob that follows": ({"training.output_path": "x"}, "it follows from the rest"),
    "a value no program takes": ({"data.fit": "stretch"}, "data: .*argument --fit: invalid choice"),
    "a switch that is none": ({"caption.overwrite": "yes"}, "caption.overwrite: expected true"),
    "an object": ({"data.seed": {"a": 1}}, "data.seed: expected text, a number"),
    "prompts that are none": ({"generate.prompts": [{"role": "prior"}]}, "generate.prompts"),
    "no prompts": ({"generate.prompts": []}, "generate.prompts"),
    "ids that are no names": (
        {"generate.prompts": [{"text": "x", "id": "a/b"}]},
        "generate.prompts: expected an id",
    ),
    "a knob that follows, further in": (
        {"training.training_params": {"output_path": "x"}},
        "it follows from the rest",
    ),
    "no LoRA to draw with": (
        {"training.embedding_tokens": 2, "training.train_lora": False},
        "generate: expected a training of a LoRA",
    ),
    "no source": ({"data": {}}, "data.source: expected a folder"),
    "a section alone": ({"training": None}, "training: expected keys and values"),
    "no place": ({"output_path": ""}, "output_path: expected a folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_cannot_be_meant_is_refused_before_anything_is_done(
    name: str, tmp_path: Path
) -> None:
    """With the place, and the nearest name."""
    changes, words = WRONG[name]
    said = document(tmp_path, tmp_path, tmp_path)
    for key, value in changes.items():
        pipeline.put(said, key, value)
    with pytest.raises(TrainError, match=words):
        Plan.of(said)
    assert list(tmp_path.iterdir()) == []


def test_a_section_that_another_one_needs_is_asked_for(tmp_path: Path) -> None:
    """Captions are written into the dataset that is made, never beside originals."""
    said = document(tmp_path, tmp_path, tmp_path)
    del said["data"]
    with pytest.raises(TrainError, match="Add a section data"):
        Plan.of(said)
    del said["caption"]
    with pytest.raises(TrainError, match="dataset_path"):
        Plan.of(said)
    said["training"]["dataset_path"] = str(tmp_path)
    assert Plan.of(said).dataset == tmp_path


def test_values_are_overridden_inside_sections() -> None:
    """A section that is not there begins; a value is no section."""
    said: dict[str, Any] = {"training": {"steps": 1}}
    pipeline.put(said, "training.steps", 2)
    pipeline.put(said, "generate.seeds", "1-2")
    assert said == {"training": {"steps": 2}, "generate": {"seeds": "1-2"}}
    with pytest.raises(TrainError, match="a key inside a section"):
        pipeline.put(said, "training.steps.x", 1)


def test_all_that_may_stand_in_the_file_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """Key for key, from the command lines of the programs themselves."""
    assert pipeline.main(["--keys"]) == 0
    keys = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert {"data.source", "caption.with", "generate.seeds", "evaluate.clip"} <= keys
    assert not {"generate.out", "data.target", "caption.source", "data.help"} & keys


def test_the_file_of_the_example_can_be_meant() -> None:
    """As it is, from the root of the repository."""
    plan = Plan.of(read_file(ROOT / "examples" / "pipeline.yaml"))
    assert [step.name for step in plan.steps] == ["data", "training", "generate", "evaluate"]
    example = train_lora.TrainingConfig.from_json(ROOT / "example_config.json")
    assert plan.config().learning_rate == example.learning_rate
