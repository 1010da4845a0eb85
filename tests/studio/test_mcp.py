"""The verbs for an assistant, asked for by the protocol's own client."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from acting import acting, wanted
from conftest import ROOT
from PIL import Image
from serving import Served, picture

from studio import mcp as studio_mcp
from studio.remote import Remote

sdk = pytest.importorskip("mcp", reason="the protocol's SDK is not installed")

if TYPE_CHECKING:
    from mcp import Client


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Provide a studio whose runs are replays."""
    with acting(tmp_path_factory.mktemp("mcp"), switches={"step-seconds": 0.02}) as studio:
        yield studio


def with_client(served: Served, work: Any, token: str | None = None) -> Any:
    """Let a client that is connected to the server do some work."""

    async def connected() -> Any:
        remote = Remote(served.settings.url, token or served.settings.token)
        async with sdk.Client(studio_mcp.build(remote)) as client:
            return await work(client)

    return asyncio.run(connected())


async def call(client: Client, verb: str, **arguments: Any) -> dict[str, Any]:
    """Call a tool, and return what it says."""
    result = await client.call_tool(verb, arguments)
    assert not result.is_error, result.content
    said: dict[str, Any] | None = result.structured_content
    assert said is not None
    return said


def test_an_assistant_goes_the_whole_way(served: Served, tmp_path: Path) -> None:
    """From a folder of pictures to previews that it looks at, and a stop and a resume between."""
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture(size=(300, 300 + number)))
        (tmp_path / f"{number}.txt").write_text(f"a cat number {number}")

    async def work(client: Client) -> None:
        await call(client, "create_dataset", name="from afar")
        sent = await call(client, "add_images", dataset="from afar", paths=[str(tmp_path)])
        assert sent == {"added": ["0.png", "1.png", "2.png"], "refused": {}}
        await call(client, "change_captions", dataset="from afar", replace="cat", by="zkb")
        shown = await call(client, "show_dataset", name="from afar")
        assert shown["images"][0]["caption"] == "a zkb number 0"
        config = wanted(steps=120)["config"]
        judged = await call(client, "validate", config=config, dataset="from afar")
        assert judged["valid"]
        job = await call(client, "train", config=config, dataset="from afar", name="Afar")
        await call(client, "stop", job_id=job["job_id"])
        ended = await call(client, "wait", job_id=job["job_id"])
        assert ended["state"] in ("stopped", "cancelled")
        await call(client, "resume", job_id=job["job_id"])
        ended = await call(client, "wait", job_id=job["job_id"])
        assert (ended["state"], ended["step"]) == ("completed", 120)
        files = await call(client, "list_files", job_id=job["job_id"])
        previews = [each["path"] for each in files["files"] if "/samples/" in each["path"]]
        look = {"job_id": job["job_id"], "path": previews[0]}
        seen = await client.call_tool("show_picture", look)
        content: Any = seen.content[0]
        assert (content.type, content.mime_type) == ("image", "image/webp")
        Image.open(io.BytesIO(base64.b64decode(content.data))).load()
        curves = await call(client, "curves", job_id=job["job_id"], points=10)
        assert curves["steps"]

    with_client(served, work)


def test_every_verb_is_explained(served: Served) -> None:
    """Each tool says what it does and takes, and whether it changes anything."""

    async def work(client: Client) -> list[Any]:
        return (await client.list_tools()).tools

    tools = {tool.name: tool for tool in with_client(served, work)}
    assert {"train", "wait", "evaluate", "show_picture", "write_captions"} <= set(tools)
    assert all(tool.description and tool.description.endswith(".") for tool in tools.values())
    assert tools["status"].annotations.read_only_hint
    assert not tools["train"].annotations.read_only_hint
    assert tools["train"].input_schema["required"] == ["config"]
    captioner = tools["write_captions"].input_schema["properties"]["captioner"]
    assert "florence2" in captioner["enum"]


REFUSED = {
    "a config that is wrong": ("train", {"config": {"steps": 0}, "dataset": "imps"}, "steps"),
    "a place that is not allowed": (
        "train",
        {"config": wanted(base_model="/etc")["config"], "dataset": "imps"},
        "base_model",
    ),
    "a dataset that is not there": ("show_dataset", {"name": "../../etc"}, "not_found"),
    "a job that is not there": ("status", {"job_id": "../../healthz"}, "not_found"),
    "a caption that has changed": (
        "write_caption",
        {"dataset": "imps", "image": "0.png", "text": "x", "etag": "old"},
        "caption_changed",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_told_so_that_it_can_be_mended(served: Served, case: str) -> None:
    """The same checks as for any program, in the same words."""
    verb, arguments, said = REFUSED[case]

    async def work(client: Client) -> Any:
        return await client.call_tool(verb, arguments)

    result = with_client(served, work)
    assert result.is_error
    told = result.content[0].text
    assert said in told
    assert set(json.loads(told[told.index("{") :])) == {"code", "detail", "problems"}


def test_an_assistant_has_no_more_rights_than_its_token(served: Served) -> None:
    """A wrong one opens nothing."""

    async def work(client: Client) -> Any:
        return await client.call_tool("list_datasets", {})

    result = with_client(served, work, "wrong")
    assert result.is_error
    assert "unauthorized" in result.content[0].text


def test_what_is_no_picture_is_named_and_the_rest_is_taken(served: Served, tmp_path: Path) -> None:
    """One bad file costs no other."""
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.png").write_text("text")

    async def work(client: Client) -> dict[str, Any]:
        await call(client, "create_dataset", name="mixed")
        paths = [str(tmp_path), "/etc/passwd", "/nowhere"]
        return await call(client, "add_images", dataset="mixed", paths=paths)

    sent = with_client(served, work)
    assert sent["added"] == ["a.png"]
    assert set(sent["refused"]) == {str(tmp_path / "b.png"), "/etc/passwd", "/nowhere"}


def test_knobs_are_found_by_what_they_do(served: Served) -> None:
    """An assistant need not read the whole schema."""

    async def work(client: Client) -> dict[str, Any]:
        return await call(client, "find_knobs", search="lora_rank")

    found = with_client(served, work)
    assert found["knobs"]["lora_rank"]["default"] == 16


def test_it_is_started_by_the_command_line(served: Served) -> None:
    """As an assistant's settings name it: a process that speaks on stdin and stdout."""
    (served.settings.root / "studio.lock").write_text(served.settings.url)
    assert served.settings.token
    arguments = ["-m", "studio", "mcp", "--root", str(served.settings.root)]

    async def work() -> dict[str, Any]:
        from mcp import StdioServerParameters

        server = StdioServerParameters(command=sys.executable, args=arguments, cwd=ROOT)
        async with sdk.Client(server) as client:
            return await call(client, "list_datasets")

    names = [each["name"] for each in asyncio.run(work())["datasets"]]
    assert "imps" in names


def started(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the program to its end."""
    command = [sys.executable, "-m", "studio", "mcp", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        input="",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def test_without_a_studio_it_says_what_to_do(tmp_path: Path) -> None:
    """No traceback, nothing on stdout."""
    ended = started("--root", str(tmp_path))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "Start one, or give --url and --token-file" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_without_the_sdk_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """It is needed for this alone, so it is no requirement."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert studio_mcp.main([]) == 1
    assert "pip install mcp==" in capsys.readouterr().err
