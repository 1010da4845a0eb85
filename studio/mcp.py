"""The studio's verbs for an assistant, over the Model Context Protocol.

python -m studio mcp                            for the studio whose data root is ./studio-data
python -m studio mcp --root /data               for another one on this machine
python -m studio mcp --url URL --token-file F   for one on another machine

It speaks with the studio over HTTP, as any program does, and so may do no more than one.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import inspect
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, urlencode

from studio.engine import Unreachable
from studio.pictures import FORMATS
from studio.remote import Refused, Remote
from studio.store import FINAL

if TYPE_CHECKING:
    from mcp.server import MCPServer

Record = dict[str, Any]

MISSING = "python -m studio mcp needs the protocol's official SDK: pip install mcp==2.3.0\n"
INSTRUCTIONS = """Prepare datasets, train LoRAs, watch and compare them.
The way: create_dataset, add_images, captions (write_captions or write_caption), check_dataset,
validate, train, wait, evaluate, wait. Jobs go on whether anybody waits or not. What a refusal
names under `problems` is to be mended by you; each has path, expected, found and hint."""
MOST_WAITING_SECONDS = 300
MOST_KNOBS = 40
PICTURE_SIDE = 768


class Verbs:
    """What an assistant may do: each public method is one tool, its docstring what it is told."""

    def __init__(self, remote: Remote) -> None:
        """Take the studio that is meant."""
        self._remote = remote

    # --- Datasets ---

    def list_datasets(self) -> Record:
        """List the datasets, with how many images and captions each has."""
        return self._get("/datasets")

    def show_dataset(self, name: str, offset: int = 0, limit: int = 60, filter: str = "") -> Record:  # noqa: A002, as REST has it
        """Show images of a dataset with captions, sizes and what was found about them."""
        query = urlencode({"offset": offset, "limit": limit, "filter": filter})
        return self._get(f"/datasets/{part(name)}?{query}")

    def create_dataset(self, name: str) -> Record:
        """Make an empty dataset."""
        return self._post("/datasets", {"name": name})

    def add_images(self, dataset: str, paths: list[str]) -> Record:
        """Upload images from this machine: files, or folders of which all images are taken.

        A text file beside an image becomes its caption. Those that are refused are named.
        """
        added, refused = [], {}
        for path in pictures_at(paths):
            place = f"{part(dataset)}/{{}}/{part(path.name)}"
            try:
                self._remote.send(f"/datasets/{place.format('images')}", path)
                if text := caption_beside(path):
                    address = f"/datasets/{place.format('captions')}"
                    self._remote.ask("PUT", address, {"text": text}, {"If-Match": "*"})
            except (Refused, OSError) as error:
                refused[str(path)] = str(error)
            else:
                added.append(path.name)
        return {"added": added, "refused": refused}

    def remove_image(self, dataset: str, image: str) -> Record:
        """Put an image and its caption into the studio's trash."""
        return self._ask("DELETE", f"/datasets/{part(dataset)}/images/{part(image)}")

    def write_caption(self, dataset: str, image: str, text: str, etag: str) -> Record:
        """Write the caption of one image; etag is that of the caption you have seen."""
        seen = {"If-Match": f'"{etag}"'}
        address = f"/datasets/{part(dataset)}/captions/{part(image)}"
        return self._ask("PUT", address, {"text": text}, seen)

    def change_captions(
        self,
        dataset: str,
        replace: str | None = None,
        by: str = "",
        add_prefix: str | None = None,
        filter: str = "",  # noqa: A002, as REST has it
        dry_run: bool = False,
    ) -> Record:
        """Replace a text in all captions, or put one in front; dry_run only counts."""
        body: Record = {"filter": filter, "dry_run": dry_run}
        body |= {"replace": {"from": replace, "to": by}} if replace is not None else {}
        body |= {"add_prefix": add_prefix} if add_prefix is not None else {}
        return self._post(f"/datasets/{part(dataset)}/captions", body)

    def undo_captions(self, dataset: str) -> Record:
        """Take the last change of captions back."""
        return self._post(f"/datasets/{part(dataset)}/undo")

    def write_captions(
        self,
        dataset: str,
        captioner: Literal["template", "florence2", "blip", "vlm", "tagger"],
        prefix: str | None = None,
        template: str | None = None,
        model: str | None = None,
        overwrite: bool = False,
    ) -> Record:
        """Start a job that writes the captions a dataset lacks; prefix is the trigger word."""
        said = {"prefix": prefix, "template": template, "model": model}
        body = {"dataset": dataset, "captioner": captioner, "overwrite": overwrite, **given(said)}
        return self._post("/caption", body)

    def check_dataset(
        self, dataset: str, resolution: int = 512, trigger_words: list[str] | None = None
    ) -> Record:
        """Start a job that judges images and captions; show_dataset then has its report."""
        body = {"dataset": dataset, "resolution": resolution, "trigger_words": trigger_words or []}
        return self._post("/prepare", body)

    # --- Jobs ---

    def find_knobs(self, search: str = "") -> Record:
        """Explain the knobs of a training config: those whose name or prose has a text in it."""
        schema = self._get("/schema")
        nested = schema["definitions"]["training_params"]["properties"]
        knobs = {name: nested.get(name, rule) for name, rule in schema["properties"].items()}
        found = {n: r for n, r in knobs.items() if search.lower() in f"{n} {r}".lower()}
        return {"knobs": dict(list(found.items())[:MOST_KNOBS]), "matching": len(found)}

    def validate(self, config: Record, dataset: str | None = None) -> Record:
        """Check a training config as the trainer would, and say whether it fits this machine."""
        return self._post("/validate", {"config": config, "dataset": dataset})

    def train(
        self,
        config: Record,
        dataset: str | None = None,
        name: str | None = None,
        engine: str = "local",
    ) -> Record:
        """Start a training of a dataset; config is the trainer's, without its two paths."""
        said = {"dataset": dataset, "name": name}
        return self._post("/train", {"config": config, "engine": engine, **given(said)})

    def generate(
        self,
        job_id: str,
        prompts: list[str],
        seeds: list[int] | None = None,
        scales: list[float] | None = None,
        checkpoints: list[str] | None = None,
    ) -> Record:
        """Start a job that draws what a training came to, by checkpoint, prompt, seed and scale."""
        said = {"seeds": seeds, "scales": scales, "checkpoints": checkpoints}
        return self._post("/generate", {"job_id": job_id, "prompts": prompts, **given(said)})

    def evaluate(
        self,
        job_id: str,
        prompts: list[str],
        seeds: list[int] | None = None,
        scales: list[float] | None = None,
        checkpoints: list[str] | None = None,
    ) -> Record:
        """Start a job that draws as generate does, and judges; its status then has the scores."""
        said = {"seeds": seeds, "scales": scales, "checkpoints": checkpoints}
        return self._post("/evaluate", {"job_id": job_id, "prompts": prompts, **given(said)})

    def list_jobs(
        self, state: str | None = None, kind: str | None = None, limit: int = 20
    ) -> Record:
        """List jobs, the newest first."""
        return self._get(
            f"/jobs?{urlencode(given({'state': state, 'kind': kind, 'limit': limit}))}"
        )

    def status(self, job_id: str) -> Record:
        """Say how a job stands: state, step, loss, time left, error with hint, results."""
        return self._get(f"/status/{part(job_id)}")

    def wait(self, job_id: str, seconds: float = 60) -> Record:
        """Wait until a job has ended, or so many seconds, at most 300; return its status."""
        deadline = time.monotonic() + min(seconds, MOST_WAITING_SECONDS)
        told = self.status(job_id)
        while told["state"] not in FINAL and time.monotonic() < deadline:
            time.sleep(1)
            told = self.status(job_id)
        return told

    def curves(self, job_id: str, points: int = 100) -> Record:
        """Return loss and learning rate of a training by step, in so many points."""
        return self._get(f"/jobs/{part(job_id)}/metrics?points={points}")

    def log(self, job_id: str) -> Record:
        """Return the end of what a job's program wrote to stderr."""
        return self._get(f"/jobs/{part(job_id)}/log")

    def list_files(self, job_id: str) -> Record:
        """List the files that a job has made: previews, checkpoints, the finished LoRA."""
        return self._get(f"/jobs/{part(job_id)}/files")

    def stop(self, job_id: str) -> Record:
        """Ask a job to save and end; resume lets it go on."""
        return self._post(f"/jobs/{part(job_id)}/stop")

    def resume(self, job_id: str, changes: Record | None = None) -> Record:
        """Let a job go on; changes may give more steps, or other knobs that are not fixed."""
        return self._post(f"/jobs/{part(job_id)}/resume", {"set": changes or {}})

    def ask_for_preview(self, job_id: str, prompts: list[str] | None = None) -> Record:
        """Ask a training under way for a preview now, perhaps with other prompts."""
        return self._post(
            f"/jobs/{part(job_id)}/request", {"preview": True, **given({"sample_prompts": prompts})}
        )

    def machine(self) -> Record:
        """Say which cards there are, what is in use of their memory, and by which job."""
        return self._get("/devices")

    # --- Speaking with the studio ---

    def _get(self, address: str) -> Record:
        """Read something."""
        return self._ask("GET", address)

    def _post(self, address: str, body: Record | None = None) -> Record:
        """Ask for something."""
        return self._ask("POST", address, body)

    def _ask(
        self, method: str, address: str, body: Record | None = None, headers: Any = None
    ) -> Record:
        """Send a request."""
        found: Record = self._remote.ask(method, address, body, headers)
        return found


READING = (
    *("list_datasets", "show_dataset", "find_knobs", "validate", "list_jobs", "status", "wait"),
    *("curves", "log", "list_files", "machine"),
)


def part(name: str) -> str:
    """Write a name as one part of an address."""
    return quote(name, safe="")


def given(said: Record) -> Record:
    """Leave out what was not said."""
    return {key: value for key, value in said.items() if value is not None}


def pictures_at(paths: Sequence[str]) -> list[Path]:
    """List the images that are meant; of a folder, those in it."""
    found: list[Path] = []
    for path in map(Path, paths):
        inside = path.iterdir() if path.is_dir() else [path]
        found += sorted(p for p in inside if p.suffix.lower() in FORMATS or not path.is_dir())
    return found


def caption_beside(path: Path) -> str:
    """Read the caption beside an image; empty if there is none that can be read."""
    try:
        return path.with_suffix(".txt").read_text("utf-8-sig").strip()
    except (OSError, ValueError):
        return ""


def small_picture(remote: Remote, job_id: str, path: str) -> bytes:
    """Fetch a picture of a job, small enough to be looked at by a model."""
    address = f"/jobs/{part(job_id)}/files/{quote(path)}?thumb={PICTURE_SIDE}"
    with remote.open("GET", address) as answer:
        content: bytes = answer.read()
        return content


# --- The server ---


def build(remote: Remote) -> MCPServer:
    """Make the server: a tool for each verb, and one that shows a picture."""
    from mcp.server import MCPServer
    from mcp.server.mcpserver import Image
    from mcp.types import ToolAnnotations

    verbs = Verbs(remote)
    server = MCPServer(
        "lora-studio", title="LoRA Studio", instructions=INSTRUCTIONS, log_level="WARNING"
    )

    def show_picture(job_id: str, path: str) -> Any:
        """Show a picture that a job has made, as list_files or the results of a status name it."""
        return Image(data=small_picture(remote, job_id, path), format="webp")

    for name in (name for name in vars(Verbs) if not name.startswith("_")):
        hints = ToolAnnotations(read_only_hint=name in READING, open_world_hint=False)
        verb = getattr(verbs, name)
        server.add_tool(explaining(verb), description=inspect.getdoc(verb), annotations=hints)
    reading = ToolAnnotations(read_only_hint=True, open_world_hint=False)
    server.add_tool(explaining(show_picture), annotations=reading, structured_output=False)
    return server


def explaining(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Let an assistant read why the studio refuses."""
    from mcp.server.mcpserver.exceptions import ToolError

    @functools.wraps(verb)
    def explained(*args: Any, **kwargs: Any) -> Any:
        try:
            return verb(*args, **kwargs)
        except Refused as error:
            told = {"code": error.code, "detail": str(error), "problems": error.problems}
            raise ToolError(json.dumps(told, ensure_ascii=False)) from error
        except Unreachable as error:
            raise ToolError(f"{error}. Is it running? python -m studio") from error

    return explained


# --- The command line ---


def main(argv: Sequence[str]) -> int:
    """Serve on stdin and stdout until the assistant is gone."""
    arguments = parser().parse_args(argv)
    if importlib.util.find_spec("mcp") is None:
        sys.stderr.write(MISSING)
        return 1
    try:
        remote = remote_of(arguments)
    except (OSError, ValueError) as error:
        sys.stderr.write(
            f"No studio is found: {error}. Start one, or give --url and --token-file.\n"
        )
        return 1
    build(remote).run()
    return 0


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    layout = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser(
        "python -m studio mcp", description=__doc__, formatter_class=layout
    )
    whole.add_argument("--root", type=Path, default=Path("studio-data"), help="its data root")
    whole.add_argument("--url", help="its address; unless given, the data root knows it")
    whole.add_argument("--token-file", type=Path, help="unless given, ROOT/token")
    return whole


def remote_of(arguments: argparse.Namespace) -> Remote:
    """Find the studio that is meant."""
    url = arguments.url or (arguments.root / "studio.lock").read_text("utf-8").strip()
    token = (arguments.token_file or arguments.root / "token").read_text("utf-8").strip()
    return Remote(url, token)
