"""What is shipped around the program: pinned packages, the header for uv, the container."""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from processes import CONTRACT_SECONDS

# The reference expression of PEP 723.
HEADER = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"


def read(name: str) -> str:
    """Read a file of the project."""
    return (ROOT / name).read_text(encoding="utf-8")


def requirements(name: str = "requirements.txt") -> list[str]:
    """List what a file of requirements asks for."""
    lines = read(name).splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def arguments(instruction: str) -> list[str]:
    """List what follows each use of an instruction in the Dockerfile, its lines joined."""
    joined = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", read("Dockerfile")))
    return re.findall(rf"(?m)^{instruction} +(.*)$", joined)


def copied() -> list[str]:
    """List the files that go into the image."""
    words = [word for line in arguments("COPY") for word in line.split()[:-1]]
    return sorted(word for word in words if not word.startswith("--"))


def test_every_package_is_pinned() -> None:
    """Another version of a package would be another program."""
    files = ["requirements.txt", "tools/requirements.txt", "studio/requirements.txt"]
    asked = [line for name in files for line in requirements(name)]
    loose = [line for line in asked if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]

    assert requirements()
    assert loose == []


def test_uv_installs_what_pip_installs() -> None:
    """The header of the program, read as PEP 723 reads it, repeats requirements.txt."""
    (found,) = [m for m in re.finditer(HEADER, read("train_lora.py")) if m["type"] == "script"]
    lines = found["content"].splitlines(keepends=True)
    header = tomllib.loads("".join(line[2 if line.startswith("# ") else 1 :] for line in lines))

    assert header == {"requires-python": ">=3.11", "dependencies": requirements()}


def test_the_context_of_the_image_holds_what_is_copied_and_nothing_else() -> None:
    """No photo, model or secret beside the program travels into the image."""
    refused, *admitted = read(".dockerignore").split()

    assert refused == "*"
    assert sorted(line.removeprefix("!") for line in admitted) == copied()


def test_every_file_of_the_image_exists() -> None:
    """A file that is renamed is renamed in the Dockerfile too."""
    assert "train_lora.py" in copied()
    assert [name for name in copied() if not any(p.is_file() for p in ROOT.glob(name))] == []


def test_the_image_takes_files_from_nowhere_else() -> None:
    """Nothing is fetched past the package managers and their checksums."""
    assert arguments("ADD") == []
    assert re.findall(r"\b(?:curl|wget|git clone)\b|https?://", " ".join(arguments("RUN"))) == []


def test_the_program_runs_under_an_init_process_that_passes_signals_on() -> None:
    """No shell stays in between, so docker stop reaches the program."""
    (entrypoint,) = arguments("ENTRYPOINT")
    init, dashes, shell, option, script, _ = json.loads(entrypoint)

    assert [init, dashes, shell, option] == ["/usr/bin/tini", "--", "sh", "-c"]
    assert script.count("exec") == script.count(";;") == 2
    assert arguments("STOPSIGNAL") == ["SIGTERM"]


@pytest.mark.skipif(os.name != "posix", reason="the image is a Linux one")
@pytest.mark.parametrize("command", [[], ["python", "train_lora.py"]], ids=["bare", "in full"])
def test_the_image_takes_options_alone_and_a_whole_command(command: list[str]) -> None:
    """A host may start it either way."""
    (entrypoint,) = arguments("ENTRYPOINT")
    start = [part.replace("/app", str(ROOT)) for part in json.loads(entrypoint)[2:]]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*start, *command, "--version"],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.startswith("train_lora ")


def test_the_program_does_not_run_as_root() -> None:
    """The user is a number, as Kubernetes cannot tell from a name that it is not root.

    Each stage goes back to it that installs something.
    """
    for stage in re.split(r"(?m)^FROM ", read("Dockerfile")):
        if users := re.findall(r"(?m)^USER (.*)$", stage):
            assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])


def probe(answer: bytes | None) -> int:
    """Check a container's health where nobody listens, or somebody who answers so."""
    command = json.loads(arguments("HEALTHCHECK")[0].partition("CMD ")[2])
    with socket.create_server(("127.0.0.1", 0)) as door:
        environment = {**os.environ, "HEALTH_PORT": str(door.getsockname()[1])}
        door.settimeout(20)
        if answer is None:
            door.close()
        probing = subprocess.Popen([sys.executable, *command[1:]], env=environment)
        if answer is not None:
            with door.accept()[0] as caller:
                assert caller.recv(1000).startswith(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
                caller.sendall(answer)
        return probing.wait(20)


@pytest.mark.parametrize(
    ("answer", "status"),
    [(None, 0), (b"HTTP/1.1 200 OK\r\n", 0), (b"HTTP/1.1 503 \r\n", 1), (b"", 1)],
    ids=["off", "well", "failed", "mute"],
)
def test_a_container_that_serves_its_state_is_as_healthy_as_that(
    answer: bytes | None, status: int
) -> None:
    """One that serves nothing is healthy while it runs."""
    assert probe(answer) == status


def test_the_image_is_the_trainer_unless_the_tools_are_asked_for() -> None:
    """The last stage is what is built without a target; tools and studio are more on top."""
    stages = arguments("FROM")
    assert stages[0].endswith(" AS trainer")
    assert stages[1:] == ["trainer AS tools", "tools AS studio", "trainer"]
    tools = read("Dockerfile").partition("AS tools")[2]
    assert "tools/*.py" in tools
    assert "--requirement tools/requirements.txt" in tools


def test_compose_starts_the_studio_as_the_image_has_it() -> None:
    """What it mounts are the image's volumes, and a stop leaves time to save."""
    (service,) = yaml.safe_load(read("compose.yaml"))["services"].values()
    stage = read("Dockerfile").partition(f"AS {service['build']['target']}\n")[2]
    mounted = [volume.partition(":")[2] for volume in service["volumes"]]

    assert mounted == ["/studio", "/cache"]
    assert "VOLUME /studio\n" in stage
    assert '"--root", "/studio"' in stage
    assert int(service["stop_grace_period"].removesuffix("s")) > CONTRACT_SECONDS
    assert service["ports"] == ["127.0.0.1:8000:8000"]


def test_the_image_of_the_studio_has_all_of_it() -> None:
    """Each of its files is copied, and what it reads of the repository."""
    there = {path for name in copied() for path in ROOT.glob(name)}
    files = {path for path in (ROOT / "studio").rglob("*") if path.is_file()}
    left_out = {path.name for path in files - there if "__pycache__" not in path.parts}
    assert left_out <= {"README.md"}
    assert {ROOT / "config_schema.json", *(ROOT / "examples/configs").glob("*.json")} <= there


def test_packages_are_installed_before_the_program_is_copied() -> None:
    """A changed program does not install gigabytes anew."""
    text = read("Dockerfile")

    assert arguments("COPY")[0] == "requirements.txt ./"
    assert text.index("pip install") < text.rindex("COPY")


def imported(path: Path) -> set[str]:
    """List the packages that a file imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def test_imports_go_one_way() -> None:
    """The program knows nothing of what is around it; the tools know it, and nobody else."""
    around = {"tools", "studio", "families", "examples", "benchmarks", "tests", "conftest"}
    assert imported(ROOT / "train_lora.py").isdisjoint(around)
    tools = set.union(*(imported(path) for path in (ROOT / "tools").glob("*.py")))
    assert {"tools", "train_lora"} <= tools
    assert tools.isdisjoint(around - {"tools"})


def test_the_studio_imports_neither_trainer_nor_tools() -> None:
    """It starts them; so it proves that what they say is enough."""
    studio = set.union(*(imported(path) for path in (ROOT / "studio").glob("*.py")))
    assert studio.isdisjoint({"train_lora", "tools", "families", "torch"})
    shim = imported(ROOT / "studio" / "shim.py")
    assert shim <= set(sys.stdlib_module_names)
