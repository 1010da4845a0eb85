"""The command line: quick answers, the right exit code, nothing foreign on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAM, ROOT, check_stream, write_config, write_image
from processes import run_program, started

import train_lora

POSIX = pytest.mark.skipif(os.name != "posix", reason="needs pseudo-terminals")
HEAVY = ("torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "safetensors")


def start(*arguments: str, cwd: Path, **environment: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the program and take whatever it says."""
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def without_heavy(tmp_path: Path) -> str:
    """Provide a search path on which every heavy package fails to import."""
    folder = tmp_path / "absent"
    for name in HEAVY:
        (folder / name).mkdir(parents=True)
        text = f'raise ModuleNotFoundError("No module named {name}", name="{name}")'
        (folder / name / "__init__.py").write_text(text, encoding="utf-8")
    return str(folder)


# --- without torch ---


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--help",), 0),
        (("--version",), 0),
        (("--event-schema",), 0),
        (("--config", "gone.json"), 1),
        (("--config", "config.json", "--set", "lora_rank=0"), 1),
        (("--config", "config.json", "--validate-only"), 0),
        (("--config", "config.json", "--set", "dataset_path=gone"), 1),
    ],
)
def test_what_does_not_train_answers_without_torch(
    workspace: Path, without_heavy: str, arguments: tuple[str, ...], code: int
) -> None:
    """A host can check a config where nothing heavy is installed, which is why it is quick."""
    done = start(*arguments, cwd=workspace, PYTHONPATH=without_heavy)
    assert (done.returncode, done.stderr) == (code, b"")


def test_the_packages_made_absent_are_absent(tmp_path: Path, without_heavy: str) -> None:
    """So that the test before means what it says."""
    script = f"import {HEAVY[0]}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": without_heavy},
        capture_output=True,
        check=False,
    )
    assert b"ModuleNotFoundError: No module named" in done.stderr


def test_importing_the_program_loads_nothing_heavy(tmp_path: Path) -> None:
    """Neither models nor images nor the schema library."""
    script = "import sys, train_lora; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=True)
    loaded = done.stdout.decode().split()
    assert "train_lora" in loaded
    assert {*HEAVY, "PIL", "jsonschema"} & set(loaded) == set()


def test_importing_the_program_changes_nothing(tmp_path: Path) -> None:
    """A library leaves signals, streams, threads and the current folder alone."""
    script = (
        "import os, signal, sys, threading\n"
        "def state():\n"
        "    handlers = [signal.getsignal(s) for s in signal.valid_signals()]\n"
        "    threads = threading.active_count()\n"
        "    return handlers, threads, os.getcwd(), os.fstat(1).st_ino, sys.stdout\n"
        "before = state()\n"
        "import train_lora\n"
        "sys.exit(before != state())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert done.returncode == 0


# --- what needs no config ---


def test_help_names_every_flag_of_the_contract(tmp_path: Path) -> None:
    """There are no others: everything else is config."""
    done = start("--help", cwd=tmp_path, COLUMNS="100")
    flags = ["--config", "--validate-only", "--set", "--fresh", "--debug", "--event-schema"]
    flags += ["--json", "--devices"]
    words = done.stdout.decode().replace(",", " ").split()
    named = {word for word in words if word.startswith("--")}
    assert named == {*flags, "--version", "--help"}


def test_the_version_names_program_and_protocol(tmp_path: Path) -> None:
    """What a bug report needs."""
    done = start("--version", cwd=tmp_path)
    wanted = f"train_lora {train_lora.__version__}, protocol {train_lora.PROTOCOL}\n"
    assert (done.returncode, done.stdout.decode()) == (0, wanted)


def test_the_event_schema_is_printed_as_json_in_ascii(tmp_path: Path) -> None:
    """The same as the one the program is tested by."""
    done = start("--event-schema", cwd=tmp_path)
    assert json.loads(done.stdout) == train_lora.event_schema()
    assert done.stdout.isascii()


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX pipes")
@pytest.mark.parametrize("flag", ["--event-schema", "--help", "--version"])
def test_a_pipe_closed_early_is_no_crash(tmp_path: Path, flag: str) -> None:
    """`| head -1` has read enough, and says so by closing."""
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        [sys.executable, str(PROGRAM), flag], stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path
    ) as process:
        os.close(writer)
        _, stderr = process.communicate(timeout=30)
    assert stderr == b""
    assert process.returncode != 120


# --- wrong command lines ---


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--validate-only",),
        ("--config",),
        ("--config", "config.json", "--unknown"),
        ("--conf", "config.json"),
        ("--config", "config.json", "--valid"),
        ("config.json",),
        ("--config", "config.json", "extra"),
        ("--config", "config.json", "--set"),
        ("--config", "config.json", "--set", "seed"),
        ("--config", "config.json", "--set", "=1"),
        ("--config", "config.json", "--debug=1"),
        ("--config", ""),
    ],
)
def test_a_wrong_command_line_is_explained_on_stderr(
    arguments: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and not a byte on stdout."""
    with pytest.raises(SystemExit) as ended:
        train_lora.main(arguments)
    printed = capfd.readouterr()
    assert (ended.value.code, printed.out) == (2, "")
    assert printed.err.startswith("usage: ")
    assert "error: " in printed.err


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_wrong_command_line_is_no_traceback_in_any_locale(tmp_path: Path, locale: str) -> None:
    """Also where what was typed cannot be written."""
    done = start(
        "--config", "c", "--s\N{LATIN SMALL LETTER E WITH ACUTE}t", cwd=tmp_path, LC_ALL=locale
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"usage: ")
    assert b"Traceback" not in done.stderr


# --- exactly one line ---

PLACES = {"dataset_path": "data", "base_model": "model", "output_path": "out", "trigger_words": []}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (None, "config_not_found"),
        ("", "config_not_json"),
        ("{", "config_not_json"),
        ("[]", "config_not_json"),
        ('{"lora_rank": "x", "unknown": 1}', "config_invalid"),
        (json.dumps(PLACES | {"learning_rate": 0.9}), "config_conflict"),
    ],
)
@pytest.mark.parametrize("arguments", [("--validate-only",), ("--fresh",)])
def test_an_invalid_or_missing_config_prints_one_line(
    tmp_path: Path, text: str | None, code: str, arguments: tuple[str, ...]
) -> None:
    """The error, and nothing before it or on stderr; nothing is written either."""
    source = ["--config", "-"] if text is not None else ["--config", "gone.json"]
    ended = run_program(*source, *arguments, cwd=tmp_path, stdin=(text or "").encode())
    assert [(line["type"], line["code"]) for line in ended.lines] == [("error", code)]
    assert (ended.code, ended.stderr) == (1, "")
    assert ended.last["hint"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", [".", "gone/config.json", "n" * 300, "caf\N{COMBINING ACUTE ACCENT}"]
)
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    """A folder, a missing folder, a name no system has: the error says which."""
    ended = run_program("--config", name, cwd=tmp_path)
    assert (ended.code, ended.last["code"]) == (1, "config_not_found")
    assert name[:40] in ended.last["message"]


# --- overrides ---


def test_an_override_shows_in_the_first_line(workspace: Path) -> None:
    """The last of several wins; a value that is no JSON is a string."""
    write_image(workspace / "other" / "x.png")
    overrides = ["--set", "dataset_path=other", "--set", "seed=1", "--set", "seed=2"]
    ended = run_program("--config", "config.json", "--validate-only", *overrides, cwd=workspace)
    config = ended.lines[0]["config"]
    assert (ended.code, config["dataset_path"], config["seed"]) == (0, str(workspace / "other"), 2)
    assert ended.last["data"]["images"] == 1


def test_an_override_is_checked_like_the_config(workspace: Path) -> None:
    """An unknown key names the nearest known one."""
    overrides = ["--set", "lora_rnak=4", "--set", "seed=true"]
    ended = run_program("--config", "config.json", *overrides, cwd=workspace)
    assert (ended.code, ended.last["code"]) == (1, "config_invalid")
    hints = {problem["path"]: problem["hint"] for problem in ended.last["problems"]}
    assert "lora_rank" in hints["lora_rnak"]
    assert "seed" in hints


# --- streams ---


@pytest.mark.parametrize("broken", [False, True])
def test_debug_adds_a_traceback_on_stderr_alone(workspace: Path, broken: bool) -> None:
    """Whoever asks for it sees where an error came from; stdout stays the same."""
    write_config(workspace, dataset_path="gone" if broken else "data")
    command = ("--config", "config.json", "--validate-only")
    quiet = run_program(*command, cwd=workspace)
    loud = run_program(*command, "--debug", cwd=workspace)
    assert quiet.stderr == ""
    assert ("Traceback" in loud.stderr) is broken
    assert [line["type"] for line in loud.lines] == [line["type"] for line in quiet.lines]


@pytest.mark.parametrize(
    "environment",
    [
        {"LANG": "C", "LC_ALL": "C"},
        {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"},
        {"PYTHONUTF8": "1", "LC_ALL": "C"},
        {"PYTHONUNBUFFERED": "1", "PYTHONDEVMODE": "1"},
    ],
)
def test_output_is_ascii_under_any_locale(workspace: Path, environment: dict[str, Any]) -> None:
    """Hosts start programs with the barest of environments."""
    (workspace / "data" / "image1.txt").write_text("eine Kätzin 猫", encoding="utf-8")
    (workspace / "data" / "größe.png").write_bytes(b"x")
    write_config(workspace, trigger_words=["zkb 猫"])
    command = ("--config", "config.json", "--validate-only")
    ended = run_program(*command, cwd=workspace, cold=True, **environment)
    assert (ended.code, ended.stdout.isascii(), ended.stderr) == (0, True, "")
    (skipped,) = [line for line in ended.lines if line.get("code") == "image_skipped"]
    assert skipped["data"]["file"] == "größe.png"
    assert ended.lines[0]["config"]["trigger_words"] == ["zkb 猫"]


def test_the_program_runs_from_anywhere_and_in_isolation(workspace: Path, tmp_path: Path) -> None:
    """It finds its schema beside itself, and imports nothing from the current folder."""
    (workspace / "json.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    command = [sys.executable, "-I", str(PROGRAM), "--config", "config.json", "--validate-only"]
    done = subprocess.run(command, cwd=workspace, capture_output=True, timeout=60, check=False)
    check_stream(done.stdout)
    assert (done.returncode, done.stderr) == (0, b"")


# --- a person at a terminal ---

PREFLIGHT = ("--config", "config.json", "--validate-only")


def on_terminal(
    folder: Path, *arguments: str, names: tuple[str, ...] = ("stdout", "stderr"), **pipes: Any
) -> tuple[int, str]:
    """Run the program with a terminal as some of its streams; return what was shown there."""
    ours, theirs = os.openpty()
    command = (sys.executable, PROGRAM, *arguments)
    with started(*command, cwd=folder, **{**pipes, **dict.fromkeys(names, theirs)}) as child:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # a terminal that nobody holds any more
            while chunk := os.read(ours, 4096):
                shown += chunk
        code = child.process.wait(60)
    os.close(ours)
    return code, shown.decode().replace("\r\n", "\n")


def sentences(shown: str) -> list[str]:
    """List the lines on a terminal without what cleans it."""
    return [line.removeprefix("\r\x1b[K") for line in shown.removesuffix("\n").split("\n")]


@POSIX
def test_a_person_at_a_terminal_reads_sentences_and_each_once(workspace: Path) -> None:
    """Also where stdout and stderr are the same terminal."""
    (workspace / "data" / "x.png").write_bytes(b"x")
    code, shown = on_terminal(workspace, *PREFLIGHT)
    lines = sentences(shown)
    assert code == 0
    assert lines[0].startswith("train_lora ")
    assert lines[-1].startswith("Valid: 3 images, ")
    assert [line for line in lines if line.startswith("Warning: Skipped x.png")]
    assert len(set(lines)) == len(lines)
    assert "{" not in shown


@POSIX
def test_with_json_a_terminal_shows_the_lines_of_a_host_alone(workspace: Path) -> None:
    """Nothing runs through them."""
    code, shown = on_terminal(workspace, *PREFLIGHT, "--json")
    check_stream(shown.encode())
    assert code == 0


@POSIX
@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_pipe_gets_json_lines_while_a_terminal_shows_sentences(
    workspace: Path, flags: tuple[str, ...]
) -> None:
    """A host reads stdout; whoever looks at stderr sees how far it is."""
    with (workspace / "lines").open("wb") as file:
        command = (*PREFLIGHT, *flags)
        code, shown = on_terminal(workspace, *command, names=("stderr",), stdout=file)
    written = (workspace / "lines").read_bytes()
    check_stream(written)
    messages = [json.loads(line)["message"] for line in written.splitlines()]
    assert code == 0
    assert [line.removeprefix("Warning: ") for line in sentences(shown)] == messages


@POSIX
def test_a_person_is_shown_all_problems_of_a_config(workspace: Path) -> None:
    """Each once, with what to do."""
    write_config(workspace, lora_rank=0, steps="60", device="gpu")
    code, shown = on_terminal(workspace, *PREFLIGHT)
    assert code == 1
    assert "Error: 3 problems, the first: " in shown
    for part in ("lora_rank: ", "steps: ", "device: ", "Remove the quotes."):
        assert shown.count(part) == 1


@POSIX
@pytest.mark.parametrize("name", ["evil\x1b[2J\x9b\n\t.png", "\udcff\udcfe.png"])
def test_a_file_name_neither_moves_the_cursor_nor_ends_the_run(workspace: Path, name: str) -> None:
    """Whatever bytes it consists of."""
    (workspace / "data" / name).write_bytes(b"x")
    code, shown = on_terminal(workspace, *PREFLIGHT)
    assert code == 0
    assert set(shown.replace("\r\x1b[K", "")) & set(map(chr, {*range(32), *range(127, 160)})) == {
        "\n"
    }
    assert ".png" in shown


# --- what could train here ---


def test_the_devices_are_listed_as_json_without_torch(tmp_path: Path, without_heavy: str) -> None:
    """A form is filled before anything is installed; the names are those that `device` takes."""
    done = start("--devices", cwd=tmp_path, PYTHONPATH=without_heavy)
    assert (done.returncode, done.stderr) == (0, b"")
    devices = json.loads(done.stdout)["devices"]
    assert devices[-1]["device"] == devices[-1]["kind"] == "cpu"
    assert devices[-1]["memory_total_bytes"] is None or devices[-1]["memory_total_bytes"] > 0
    facts = train_lora.field_types(train_lora.DeviceFacts)
    allowed = re.compile(train_lora.knobs()["device"]["pattern"])
    assert all(list(each) == ["device", *facts] for each in devices)
    assert all(allowed.match(each["device"]) for each in devices)


def test_listing_devices_imports_nothing_heavy_and_opens_no_config(tmp_path: Path) -> None:
    """Which is why it takes no seconds."""
    text = (
        "import sys, train_lora; code = train_lora.main(['--devices'])\n"
        f"print(code, {{*{HEAVY}, 'PIL', 'jsonschema'}} & sys.modules.keys(), file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=True)
    assert done.stderr.decode().strip() == "0 set()"
    assert list(tmp_path.iterdir()) == []


SECRET = "hf_aSecretThatNobodyShouldSee"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--validate-only",),
        ("--validate-only", "--debug"),
        ("--debug", "--set", "dataset_path=gone"),
        ("--debug", "--set", "lora_rank=0"),
        ("--debug", "--fresh"),
        ("--validate-only", "--debug", "--set", "base_model=some/model"),
    ],
)
def test_secrets_of_the_environment_stay_there(workspace: Path, arguments: tuple[str, ...]) -> None:
    """A token for the hub never reaches a line, a log or a file."""
    tokens = dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"), SECRET)
    done = start("--config", "config.json", *arguments, cwd=workspace, **tokens)
    assert done.stdout != b""
    assert SECRET.encode() not in done.stdout + done.stderr
    files = [path for path in workspace.rglob("*") if path.is_file()]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
