"""Run programs one after another as one: the first that fails, or is stopped, ends it.

python chain.py '[["python", "generate.py", …], ["python", "evaluate.py", …]]'

What they say goes through to stdout; only the last line of the last one ends the stream. It imports
nothing of the studio's, as it may run in another Python.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from datetime import UTC, datetime
from types import FrameType
from typing import Any

STOPS = (signal.SIGTERM, signal.SIGINT)


class Chain:
    """The programs, and the one at work."""

    def __init__(self, commands: list[list[str]]) -> None:
        """Take the programs."""
        self.commands, self.stopped_by, self.said = commands, 0, 0
        self.child: subprocess.Popen[bytes] | None = None
        for number in STOPS:
            signal.signal(number, self.stop)

    def stop(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002, as handlers are
        """Pass a stop on to the program at work."""
        self.stopped_by = number
        if self.child and self.child.poll() is None:
            self.child.send_signal(number)

    def run(self) -> int:
        """Run all programs; return the exit code of the last one that ran."""
        for place, command in enumerate(self.commands, start=1):
            if self.stopped_by:
                return self.tell_interrupted()
            last = place == len(self.commands)
            with subprocess.Popen(command, stdout=subprocess.PIPE) as self.child:
                if self.stopped_by:  # between the look above and the start
                    self.child.send_signal(self.stopped_by)
                for line in self.child.stdout or ():
                    self.pass_on(line, last=last)
            if code := self.child.returncode:
                return code if code > 0 else 128 - code
        return 0

    def pass_on(self, line: bytes, *, last: bool) -> None:
        """Pass a line on, numbered anew; that a program is complete is a fact if others follow."""
        try:
            record = json.loads(line)
            if record["type"] == "complete" and not last:
                data = {"files": record.get("files", [])}
                record |= {"type": "info", "topic": "step", "data": data}
        except (ValueError, KeyError, TypeError):
            write(line)
        else:
            self.tell(record)

    def tell(self, record: dict[str, Any]) -> None:
        """Say the next line."""
        self.said += 1
        write(json.dumps(record | {"seq": self.said}, separators=(",", ":")).encode() + b"\n")

    def tell_interrupted(self) -> int:
        """Say the last line for a program that was not begun."""
        name = signal.Signals(self.stopped_by).name
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        told = {"type": "interrupted", "seq": 0, "timestamp": now, "message": f"Stopped by {name}"}
        self.tell({**told, "step": 0, "reason": name, "path": None, "total_time": 0.0})
        return 128 + self.stopped_by


def write(line: bytes) -> None:
    """Pass a line on at once."""
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(Chain(json.loads(sys.argv[1])).run())
