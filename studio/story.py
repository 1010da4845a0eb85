"""What a job's events tell a reader: previews, checkpoints, messages, facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

Event = Mapping[str, Any]

MOST_MESSAGES = 1_000  # kept, the newest; all of them stand in events.jsonl
QUIET_TOPICS = ("phase", "memory")  # told elsewhere on the page, and often
NOTES = {"warning": "warn", "error": "bad", "complete": "good", "interrupted": "warn"}


@dataclass(frozen=True)
class Preview:
    """A picture that the trainer drew."""

    step: int
    prompt: str
    file: str  # below the output folder
    seed: int | None


@dataclass(frozen=True)
class Checkpoint:
    """A LoRA file that may be used."""

    step: int
    file: str  # below the output folder
    bytes: int | None


@dataclass(frozen=True)
class Message:
    """A line worth reading."""

    time: str
    kind: str  # nothing, warn, bad, good
    text: str
    code: str | None = None


@dataclass
class Story:
    """All that the pages show of a job's events."""

    previews: dict[tuple[str, int], Preview] = field(default_factory=dict)  # by prompt and step
    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    facts: dict[str, Event] = field(default_factory=dict)  # by topic, as told last
    plan: Event | None = None  # of memory, made before anything was loaded
    start: Event | None = None
    end: Event | None = None  # the last line of the last attempt, where there is one
    starts: int = 0
    position: str = ""  # of the last event, from which a stream goes on

    @property
    def prompts(self) -> list[str]:
        """Name the prompts, in the order of the newest round."""
        newest = max((step for _, step in self.previews), default=0)
        order = sorted(self.previews.values(), key=lambda each: (-each.step, each.file))
        latest = [each.prompt for each in order if each.step == newest]
        return list(dict.fromkeys([*latest, *(each.prompt for each in order)]))

    @property
    def steps(self) -> list[int]:
        """Name the steps at which previews were drawn."""
        return sorted({step for _, step in self.previews})


def tell(events: Iterable[tuple[str, Event]]) -> Story:
    """Read events with their positions, over all attempts."""
    story = Story()
    for position, event in events:
        story.position = position
        add(story, event)
    return story


def add(story: Story, event: Event) -> None:
    """Take one event into the story; what it lacks or adds does no harm."""
    name, step = event.get("type"), event.get("step")
    if name == "start":
        begin(story, event)
    elif name == "sample" and isinstance(step, int):
        preview = Preview(
            step,
            str(event.get("prompt", "")),
            inside("samples", event, "image_path"),
            number(event),
        )
        story.previews[preview.prompt, step] = preview
    elif name == "checkpoint" and isinstance(step, int):
        file = inside("checkpoints", event, "path")
        story.checkpoints[step] = Checkpoint(step, file, event.get("bytes"))
    elif name == "info":
        learn(story, event)
    if name in ("complete", "interrupted", "error"):
        story.end = event
    remember(story, event)


def begin(story: Story, event: Event) -> None:
    """Begin an attempt, which takes back what was said of later steps than it goes on from."""
    kept = event.get("resumed_step")
    story.start, story.end, story.starts = event, None, story.starts + 1
    if isinstance(kept, int):
        story.previews = {key: each for key, each in story.previews.items() if each.step <= kept}
        story.checkpoints = {step: each for step, each in story.checkpoints.items() if step <= kept}


def inside(folder: str, event: Event, key: str) -> str:
    """Name the file that an event speaks of, where the studio serves it; hosts differ in paths."""
    path = str(event.get(key, ""))
    name = (PureWindowsPath(path) if "\\" in path else PurePosixPath(path)).name
    return f"{folder}/{name}"


def number(event: Event) -> int | None:
    """Read the seed."""
    seed = event.get("seed")
    return seed if isinstance(seed, int) else None


def learn(story: Story, event: Event) -> None:
    """Keep a fact by its topic."""
    topic, data = str(event.get("topic")), event.get("data")
    if isinstance(data, Mapping):
        story.facts[topic] = data
        if topic == "memory" and data.get("phase") == "planning":
            story.plan = data


def remember(story: Story, event: Event) -> None:
    """Keep what a reader wants to see again; pictures and progress show themselves."""
    name = str(event.get("type"))
    quiet = name in ("progress", "sample", "start") or event.get("topic") in QUIET_TOPICS
    if not quiet:
        text, time = str(event.get("message", "")), str(event.get("timestamp", ""))
        code = event.get("code")
        story.messages.append(Message(time, NOTES.get(name, ""), text, str(code) if code else None))
        del story.messages[:-MOST_MESSAGES]
