"""Stands in for train_lora.py: tells a recorded real run again, quickly, and obeys as that does.

    python replay.py --config CONFIG [--SWITCH VALUE ...]

It takes output_path, steps, checkpoint_steps, validation_steps, validation_split and sample_prompts
from the config, holds the lock of the output folder, honours signals and the stop file, saves, goes
on from what was saved, and ends with the same bytes however often it was stopped. The switches make
it misbehave. They may also stand in replay.json beside the program, where the command line is not
ours to write.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import signal
import struct
import sys
import time
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NoReturn

Record = dict[str, Any]

HERE = Path(__file__).resolve().parent
EXIT_CODES = {"SIGINT": 130, "SIGHUP": 129}  # 143 for all else


def parser() -> argparse.ArgumentParser:
    """Describe the command line: the trainer's, and the switches."""
    whole = argparse.ArgumentParser()
    add = whole.add_argument
    add("--config", required=True)
    add("--fresh", action="store_true")
    add("--step-seconds", type=float, default=0.02, help="how long an update takes")
    add("--silent-seconds", type=float, default=0, help="before the first update")
    add("--crash-at", type=int, help="be killed at this step, if that is not behind us")
    add("--crash-after", type=int, help="be killed after so many updates, at every start")
    add("--error-at", type=int, help="fail at this step")
    add("--error-code", default="out_of_memory")
    add("--exit-code", type=int, help="end without a last line")
    add("--ignore-stop", action="store_true", help="go on whoever asks")
    add("--linger-seconds", type=float, default=0, help="live on after the last line")
    add("--garbage", action="store_true", help="say what is no event")
    add("--long-line-bytes", type=int, default=0)
    add("--stderr-bytes", type=int, default=0)
    add("--picture-pixels", type=int, default=64)
    return whole


def switches() -> list[str]:
    """Read the switches that lie beside the program."""
    path = Path(sys.argv[0]).resolve().parent / "replay.json"
    if not path.exists():
        return []
    options = json.loads(path.read_text("utf-8"))
    return [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()
    ]


def recorded() -> dict[str, list[Record]]:
    """Read the recorded lines, by type."""
    lines: dict[str, list[Record]] = {}
    for line in (HERE / "recorded.jsonl").read_text("ascii").splitlines():
        record = json.loads(line)
        lines.setdefault(record["type"], []).append(record)
    return lines


class Ended(Exception):
    """The run is over; the last line was said."""

    def __init__(self, code: int) -> None:
        """Keep the exit code."""
        self.code = code


class Replay:
    """One start of a run."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Read the config and make the output folder."""
        config = json.loads(Path(options.config).read_text("utf-8"))
        self.options, self.config = options, config | config.get("training_params", {})
        self.total = self.config.get("steps", 24)
        self.prompts = self.config.get("sample_prompts", ["zkb"])
        self.output = Path(self.config["output_path"])
        self.output.mkdir(parents=True, exist_ok=True)
        self.lines, self.seq, self.began = recorded(), 0, time.monotonic()
        self.step, self.sum, self.resumed_step, self.asked = 0, b"", 0, ""
        self.held: dict[int, float] = {}  # losses on images held back, by step

    def say(self, kind: str, number: int = 0, **changes: Any) -> None:
        """Say a recorded line again, with other values."""
        self.seq += 1
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        lines = self.lines[kind]
        record = lines[min(number, len(lines) - 1)] | {"seq": self.seq, "timestamp": now} | changes
        line = (json.dumps(record) + "\n").encode("ascii")
        os.write(1, line)
        with (self.output / "events.jsonl").open("ab") as mirror:
            mirror.write(line)

    def go(self) -> int:
        """Run to the end, and return the exit code."""
        with (self.output / ".lock").open("ab") as lock:
            try:
                self.claim(lock)
                self.restore()
                self.prepare()
                while self.step < self.total:
                    self.update()
                self.complete()
            except Ended as ended:
                time.sleep(self.options.linger_seconds)
                return ended.code

    def claim(self, lock: IO[bytes]) -> None:
        """Be the only run of this folder, and forget stop files from before."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.fail("output_busy", None)
        (self.output / "stop").unlink(missing_ok=True)

    def restore(self) -> None:
        """Go on from what was saved."""
        saved = self.output / "state.json"
        if saved.exists() and not self.options.fresh:
            state = json.loads(saved.read_text("ascii"))
            self.step, self.sum = state["step"], bytes.fromhex(state["sum"])
        self.resumed_step = self.step
        config = self.lines["start"][0]["config"] | {"output_path": str(self.output)}
        facts = {"resumed_step": self.step, "total_steps": self.total, "pid": os.getpid()}
        self.say("start", config=config | {"steps": self.total}, **facts)

    def prepare(self) -> None:
        """Say what a run says before its first update, and misbehave."""
        for number in range(len(self.lines["info"]) - 1):
            self.say("info", number)
        if self.options.garbage:
            os.write(1, b"no event\n\xff\xfe\n[1]\n{}\n\x1b[31mred\x1b[0m\n" + b"[" * 5000 + b"\n")
        if self.options.long_line_bytes:
            os.write(1, b"x" * self.options.long_line_bytes + b"\n")
        for _ in range(0, self.options.stderr_bytes, 1 << 16):
            os.write(2, (b"y" * 99 + b"\n") * 655)
        if self.options.exit_code is not None:
            os._exit(self.options.exit_code)
        self.wait(self.options.silent_seconds)

    def wait(self, seconds: float) -> None:
        """Let time pass, and hear whether to stop."""
        deadline = time.monotonic() + seconds
        while not self.asked and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))
            self.look()
        self.look()

    def look(self) -> None:
        """See whether somebody wants a stop."""
        if (self.output / "stop").exists() and not self.asked:
            self.asked = "stop_file"
        if self.asked and not self.options.ignore_stop:
            self.interrupt()

    def update(self) -> None:
        """Make an update, and what is due after it."""
        self.wait(self.options.step_seconds)
        self.step += 1
        self.sum = hashlib.sha256(self.sum + self.step.to_bytes(8, "big")).digest()
        self.crash()
        where = len(self.lines["progress"]) * self.step // (self.total + 1)
        percent = min(99, 100 * self.step // self.total)
        facts = {"step": self.step, "total_steps": self.total, "percent": percent}
        message = f"Step {self.step} of {self.total}"
        self.say("progress", where, **facts, message=message, elapsed_seconds=self.elapsed())
        if self.step % self.config.get("checkpoint_steps", 8) == 0:
            self.save("periodic")
        if self.step % self.config.get("validation_steps", 12) == 0:
            self.measure()
            self.draw()

    def measure(self) -> None:
        """Tell how images held back are met, where any are: best half-way, and then worse again."""
        if not self.config.get("validation_split"):
            return
        self.held[self.step] = 0.25 + abs(self.step / self.total - 0.5)
        facts: Record = {"step": self.step, "loss": self.held[self.step]}
        facts["best_step"] = self.best_step()
        self.say("validation", message=f"Loss on images held back at {self.step}", **facts)

    def best_step(self) -> int | None:
        """Return where the loss on images held back was least."""
        return min(self.held, key=self.held.__getitem__, default=None)

    def elapsed(self) -> float:
        """Tell how long this start has taken."""
        return round(time.monotonic() - self.began, 3)

    def crash(self) -> None:
        """Die or fail, if this is the moment."""
        options = self.options
        if options.crash_at == self.step or options.crash_after == self.step - self.resumed_step:
            sys.stderr.write("about to be killed\n")
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        if options.error_at == self.step:
            self.fail(options.error_code, self.step)

    def save(self, reason: str) -> Path:
        """Save what a restart needs, and a checkpoint."""
        path = self.output / "checkpoints" / f"lora_step_{self.step}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(self.sum)
        part = self.output / "state.part"
        part.write_text(json.dumps({"step": self.step, "sum": self.sum.hex()}), encoding="ascii")
        part.replace(self.output / "state.json")
        facts: Record = {"step": self.step, "path": str(path), "bytes": len(self.sum)}
        self.say("checkpoint", message=f"Checkpoint at step {self.step}", reason=reason, **facts)
        return path

    def draw(self) -> None:
        """Write a preview per prompt."""
        folder = self.output / "samples"
        folder.mkdir(exist_ok=True)
        for number, prompt in enumerate(self.prompts, 1):
            path = folder / f"step_{self.step}{f'_{number}' * (number > 1)}.png"
            path.write_bytes(picture(self.options.picture_pixels, self.step * 37 + number * 90))
            message = f"Sample at step {self.step}: {prompt}"
            self.say("sample", step=self.step, image_path=str(path), prompt=prompt, message=message)

    def complete(self) -> NoReturn:
        """Write the LoRA and say so."""
        final = self.output / "lora_final.safetensors"
        final.write_bytes(self.sum)
        facts: Record = {"final_path": str(final), "bytes": len(self.sum), "step": self.total}
        facts |= {"sha256": hashlib.sha256(self.sum).hexdigest(), "total_time": self.elapsed()}
        facts |= {"best_step": self.best_step(), "best_path": None}
        if self.held:
            best = self.output / "checkpoints" / f"lora_step_{self.best_step()}.safetensors"
            facts["best_path"] = str(best)
            self.warn("overfitted", f"Overfitted since step {self.best_step()}")
        self.say("complete", message=f"Complete: {self.total} steps", **facts)
        raise Ended(0)

    def warn(self, code: str, message: str) -> None:
        """Say what speaks against the run."""
        self.lines["warning"] = [{"type": "warning", "data": {}}]
        self.say("warning", code=code, message=message)

    def interrupt(self) -> NoReturn:
        """Save and end, as was asked."""
        path = str(self.save("interrupted")) if self.step else None
        self.lines["interrupted"] = [{"type": "interrupted"}]
        message = f"Interrupted by {self.asked} at step {self.step}"
        facts: Record = {"step": self.step, "path": path, "total_time": self.elapsed()}
        self.say("interrupted", reason=self.asked, message=message, **facts)
        raise Ended(EXIT_CODES.get(self.asked, 143))

    def fail(self, code: str, step: int | None) -> NoReturn:
        """Say what went wrong."""
        self.lines["error"] = [{"type": "error", "hint": "Try something else.", "problems": []}]
        self.say("error", code=code, step=step, path=None, message=f"It failed: {code}")
        raise Ended(1)


def picture(pixels: int, hue: int) -> bytes:
    """Write a PNG of one colour."""
    row = b"\0" + bytes((hue % 256, (hue * 3) % 256, 200)) * pixels
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", pixels, pixels, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(row * pixels)),
        (b"IEND", b""),
    ]
    whole = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        check = struct.pack(">I", zlib.crc32(name + data))
        whole += struct.pack(">I", len(data)) + name + data + check
    return whole


def main() -> int:
    """Run the program."""
    replay = Replay(parser().parse_args([*switches(), *sys.argv[1:]]))

    def note(number: int, _frame: object) -> None:
        replay.asked = replay.asked or signal.Signals(number).name

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, note)
    return replay.go()


if __name__ == "__main__":
    sys.exit(main())
