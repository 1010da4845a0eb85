"""What every program in tools/ does alike: help, plans, events, exit codes, stops, no places."""

from __future__ import annotations

import getpass
import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_image
from scenes import scene
from test_evaluate import write_grid
from test_generate import write_pair

from tools import program

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HEAVY = {"torch", "diffusers", "transformers", "numpy", "PIL", "safetensors"}
SCREEN = 48, 100  # lines and columns
PLURAL_OF_ONE = re.compile(r"(?<![\d.,])1 (?:[a-z]+ )?[a-z]{2,}s\b")
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@dataclass(frozen=True)
class Case:
    """A command that does something: the program, its arguments, and what of it is missing then."""

    program: str
    arguments: str  # with the names of the folder below
    missing: str  # the same with an input that is not there
    plans: bool = True  # whether it has --dry-run
    writes: bool = True


# A further program, or command of one, is one more line here.
CASES = {
    "prepare check": Case("prepare", "check images --report out/x.json", "check gone", plans=False),
    "prepare build": Case("prepare", "build images out/set --trigger zkb", "build gone out/set"),
    "prepare caption": Case(
        "prepare",
        "caption images --with template --template {name} --overwrite",
        "caption gone --with template --template {name}",
        writes=False,  # but beside the pictures
    ),
    "generate": Case(
        "generate",
        "--base sd1 --lora run --prompts zkb --seeds 1 --steps 1 --width 64 --height 64"
        " --device cpu --out out/grid",
        "--base sd1 --lora gone --prompts zkb --out out/grid",
    ),
    "generate fuse": Case(
        "generate",
        "--base sd1 --lora a.safetensors --fuse out/fused --device cpu",
        "--base sd1 --lora gone --fuse out/fused",
    ),
    "evaluate": Case(
        "evaluate",
        "grid --train images --vision dino --out out/eval.json",
        "gone --train images --vision dino",
    ),
    "lora info": Case("lora", "info a.safetensors", "info gone", plans=False, writes=False),
    "lora convert": Case(
        "lora", "convert a.safetensors out/x.safetensors", "convert gone out/x.safetensors"
    ),
    "lora merge": Case(
        "lora",
        "merge out/x.safetensors a.safetensors=0.5 run/lora_final.safetensors",
        "merge out/x.safetensors a.safetensors gone",
    ),
    "lora resize": Case(
        "lora", "resize a.safetensors out/x.safetensors --rank 1", "resize gone out/x --rank 1"
    ),
    "lora extract": Case(
        "lora",
        "extract sd1 tuned out/x.safetensors --rank 4 --device cpu",
        "extract sd1 ./gone/model.safetensors out/x.safetensors --rank 4",
    ),
    "report": Case("report", "run --out out/report.html", "gone --out out/report.html"),
}
PROGRAMS = sorted({case.program for case in CASES.values()})
PLANS = [name for name, case in CASES.items() if case.plans]
WRITES = [name for name, case in CASES.items() if case.writes]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, built: Path, eyes: Path) -> Path:
    """Provide a folder with an input for every program; nobody may change them."""
    from test_extraction import UNET, alter

    folder = tmp_path_factory.mktemp("stock")
    for number in range(6):
        write_image(folder / "images" / f"{number}.png")
        scene(number, 64).save(folder / "images" / f"{number}.png")
    write_pair(folder / "a.safetensors", 0.1)
    write_pair(folder / "run" / "lora_final.safetensors", 0.2)
    start = {"type": "start", "config": {"output_path": str(folder / "run")}}
    (folder / "run" / "events.jsonl").write_text(json.dumps(start) + "\n", encoding="utf-8")
    write_grid(folder / "grid")
    for name, place in (("sd1", built / "sd1"), ("dino", eyes / "dino")):
        (folder / name).symlink_to(place)
    shutil.copytree(built / "sd1", folder / "tuned")
    alter(folder / "tuned", UNET, conv_in_bias=_ones(), conv_in_weight=_ones()[:, None, None, None])
    return folder


def _ones() -> Any:
    """Make what is added to a layer with sixteen rows."""
    import torch

    return torch.ones(16)


@pytest.fixture
def place(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide a folder of its own with all inputs in it, and work there."""
    for path in stock.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(case: Case, arguments: str) -> int:
    """Run a program in this process."""
    module: Any = importlib.import_module(f"tools.{case.program}")
    return int(module.main(arguments.split()))


def files_in(folder: Path) -> dict[Path, bytes]:
    """Read all files below a folder that are no inputs."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def events_of(text: str) -> list[dict[str, Any]]:
    """Read lines of events, and hold what surrounds each against the contract."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    assert [line["seq"] for line in lines] == list(range(1, len(lines) + 1))
    assert all(STAMP.fullmatch(line["timestamp"]) for line in lines)
    assert all(line["message"] and isinstance(line["message"], str) for line in lines)
    assert not any(PLURAL_OF_ONE.search(line["message"]) for line in lines)
    ends = [line["type"] in ("complete", "interrupted", "error") for line in lines]
    assert ends == [False] * (len(lines) - 1) + [True]
    return lines


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_fits_a_screen_and_loads_nothing_heavy(name: str) -> None:
    """Which is why it answers at once."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{name}.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'tools' / name)!r} + '.py', run_name='__main__')\n"
        "except SystemExit as end:\n"
        f"    loaded = sorted(set(sys.modules) & {HEAVY!r})\n"
        "    sys.exit(f'{end.code} {loaded}' if end.code or loaded else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) <= SCREEN[0]
    assert max(map(len, lines)) <= SCREEN[1]
    assert f"python tools/{name}.py" in done.stdout


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_writes_nothing(name: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And says what would be done."""
    case, before = CASES[name], files_in(place)
    assert call(case, f"{case.arguments} --dry-run") == 0
    told = capfd.readouterr().out
    assert "Would " in told
    assert not PLURAL_OF_ONE.search(told)
    assert files_in(place) == before


@pytest.mark.parametrize("name", WRITES)
def test_events_keep_the_contract_and_what_is_written_names_no_place(
    name: str, place: Path, stock: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The last line lists files that are there; none of them says where or whose they are."""
    case = CASES[name]
    assert call(case, f"{case.arguments} --events") == 0
    lines = events_of(capfd.readouterr().out)
    assert lines[-1]["type"] == "complete"
    assert lines[-1]["files"]
    assert all((place / file).exists() for file in lines[-1]["files"])
    secrets = [str(place), str(stock), str(Path.home())]
    for path, content in files_in(place / "out").items():
        assert not any(secret.encode() in content for secret in secrets if len(secret) > 5), path
        assert getpass.getuser() == "root" or getpass.getuser().encode() not in content, path


@pytest.mark.parametrize("name", CASES)
def test_what_is_missing_is_one_error_in_a_sentence(
    name: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a code and what to do; nothing is written."""
    case, before = CASES[name], files_in(place)
    assert call(case, f"{case.missing} --events") == 1
    last = events_of(capfd.readouterr().out)[-1]
    assert last["type"] == "error"
    assert last["code"] not in ("internal_error", "save_failed")
    assert "gone" in last["message"]
    assert "Errno" not in last["message"].replace("[Errno -", "")
    assert last["hint"]
    assert files_in(place) == before


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_wrong_command_line_is_its_own_kind_of_failure(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """As the trainer's."""
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"tools.{name}").main(["--no-such-option"])
    assert ended.value.code == 2
    assert "usage:" in capfd.readouterr().err


@pytest.mark.parametrize("name", CASES)
def test_ctrl_c_ends_a_program_and_leaves_no_half_of_a_file(
    name: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As soon as it may, with the trainer's exit code; started again, it does all of it."""
    case = CASES[name]
    module: Any = importlib.import_module(f"tools.{case.program}")
    work: Callable[..., Any] = module.work

    def interrupted(*given: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return work(*given)

    before = files_in(place)
    assert program.run(module.parser(), interrupted, [*case.arguments.split(), "--events"]) == 130
    last = events_of(capfd.readouterr().out)[-1]
    assert (last["type"], last["reason"]) == ("interrupted", "SIGINT")
    assert files_in(place) == before
    assert call(case, case.arguments) == 0
