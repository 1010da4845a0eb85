"""Stopping: who may ask for it, and how a run ends when somebody did."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAM, Record, Recorder, check_stream, load_config, write_config, write_image
from processes import CONTRACT_SECONDS, Child, program, script, started, wait_until

from train_lora import (
    EXIT_CODES,
    Emitter,
    LoRATrainer,
    StopReason,
    StopRequest,
    TrainingInterrupted,
    encode_line,
    patience,
    reader_gone,
    take_stop_file,
    watch_parent,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")

SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}

# A run in miniature. It works until a stop is asked for, notices that as late as its argument
# says, as if a step took so long, and ends as the program does.
RUN = """
import contextlib, functools, os, signal, subprocess, sys, threading, time
import train_lora as t

stop = t.StopRequest()

def run(late_seconds, watch=lambda descriptor: None):
    descriptor = t.claim_stdout()
    writer = t.LineWriter(descriptor, lambda error: None)
    events = t.Emitter(writer)
    watch(descriptor)
    try:
        with t.reporting(events):
            events.emit(t.PhaseFacts(name="working", done=0, total=None))
            while stop.reason is None:
                time.sleep(0.01)
            noticed = time.monotonic() + late_seconds
            while time.monotonic() < noticed:
                events.warn(t.WarningCode.IMAGE_SKIPPED, "Still at work")
                time.sleep(0.001)
            stop.check()
    except t.TrainingInterrupted as stopped:
        writer.close(lambda: True)
        return t.EXIT_CODES[stopped.reason]
"""
ON_SIGNALS = RUN + "with stop.on_signals(): code = run(float(sys.argv[1]))\nsys.exit(code)"


@pytest.fixture(scope="session")
def slow_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a picture that is small on disk and takes long to decode."""
    folder = tmp_path_factory.mktemp("slow")
    return write_image(folder / "slow.webp", (3000, 2000), lossless=True)


@pytest.fixture
def slow(workspace: Path, slow_image: Path) -> Path:
    """Provide a workspace with so many large images that checking them takes long."""
    for number in range(1500):
        (workspace / "data" / f"large{number}.webp").hardlink_to(slow_image)
    return workspace


# --- The request -------------------------------------------------------------


def test_nobody_has_asked_at_first(stop: StopRequest) -> None:
    """A new request has no reason, and checking it does nothing."""
    stop.check()

    assert stop.reason is None
    assert stop.requested_at > time.monotonic() + 10**6


@pytest.mark.parametrize("reason", typing.get_args(StopReason))
def test_checking_leaves_with_the_reason(reason: StopReason, stop: StopRequest) -> None:
    """Every reason comes out as it went in, again and again."""
    stop.request(reason)
    with pytest.raises(TrainingInterrupted):
        stop.check()
    with pytest.raises(TrainingInterrupted) as stopped:
        stop.check()

    assert (stopped.value.reason, stopped.value.step, stopped.value.path) == (reason, 0, None)


@pytest.mark.parametrize("validate", [True, False])
def test_a_start_that_is_stopped_at_once_begins_with_start(
    validate: bool, in_workspace: Path, events: Emitter, recorder: Recorder, stop: StopRequest
) -> None:
    """Whoever reads the events later never finds the end of something that did not begin."""
    stop.request("SIGTERM")
    trainer = LoRATrainer(load_config(), events, stop)
    with pytest.raises(TrainingInterrupted):
        trainer.validate() if validate else trainer.train()

    assert [record["type"] for record in recorder.records] == ["start", "interrupted"]
    mirror = in_workspace / "out" / "events.jsonl"
    told = b"".join(map(encode_line, recorder.records))
    assert validate or mirror.read_bytes() == told


def test_the_first_reason_counts(stop: StopRequest) -> None:
    """Later ones change neither the reason nor the time from which patience is counted."""
    before = time.monotonic()
    stop.request("stop_file")
    requested_at = stop.requested_at
    stop.request("SIGTERM")

    assert (stop.reason, stop.requested_at) == ("stop_file", requested_at)
    assert before <= requested_at <= time.monotonic()


def test_no_library_swallows_an_interruption() -> None:
    """What catches every Exception lets a stop request through."""
    assert not issubclass(TrainingInterrupted, Exception)


def test_every_reason_has_its_exit_code() -> None:
    """128 + signal; a stop file, a vanished host and a full disk end like SIGTERM."""
    codes = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
    codes |= dict.fromkeys(["stop_file", "host_gone", "output_full"], 143)

    assert codes == EXIT_CODES
    assert set(codes) == set(typing.get_args(StopReason))


# --- Signals -----------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), SIGNALS.items())
def test_a_signal_ends_the_run_with_its_name_and_number(number: signal.Signals, code: int) -> None:
    """One last line says which signal, and the exit code is 128 + its number."""
    with started(*script(ON_SIGNALS, 0)) as child:
        child.line()
        child.process.send_signal(number)

        assert child.end() == code
        assert (child.last["type"], child.last["reason"]) == ("interrupted", number.name)


def test_nohup_is_respected() -> None:
    """A process told to ignore the end of its terminal does, and still obeys SIGTERM."""
    with started("nohup", *script(ON_SIGNALS, 0), stderr=subprocess.DEVNULL) as child:
        child.line()
        child.process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert child.process.poll() is None
        child.process.send_signal(signal.SIGTERM)

        assert child.end() == 143
        assert child.last["reason"] == "SIGTERM"


def test_a_storm_of_signals_is_one_graceful_stop() -> None:
    """1,000 signals in a row, amid other lines, leave one last line and no torn one."""
    with started(*script(ON_SIGNALS, 0.5)) as child:
        child.line()
        child.process.send_signal(signal.SIGINT)
        time.sleep(0.02)
        for number in [*SIGNALS, signal.SIGTERM] * 250:
            child.process.send_signal(number)

        assert child.end() == 130
        assert (child.last["type"], child.last["reason"]) == ("interrupted", "SIGINT")


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_two_signals_within_50_ms_are_one_stop(second: signal.Signals) -> None:
    """Ctrl-C reaches the whole process group, and the launcher passes it on once more."""
    with started(*script(ON_SIGNALS, 0.3)) as child:
        child.line()
        child.process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        child.process.send_signal(second)

        assert child.end() == 130
        assert child.last["reason"] == "SIGINT"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_a_second_later_ends_the_process_at_once(
    number: signal.Signals, code: int
) -> None:
    """A person who means it does not wait for a step that takes half a minute."""
    with started(*script(ON_SIGNALS, 30)) as child:
        child.line()
        child.process.send_signal(signal.SIGTERM)
        time.sleep(1.1)
        child.process.send_signal(number)

        assert child.end() == code
        assert b"interrupted" not in child.received


# A module that is imported early, in the place of the library's own.
EARLY = """
import os, signal, sys
os.kill(os.getpid(), signal.{name})
sys.path.remove(os.path.dirname(__file__))
del sys.modules["argparse"]
import argparse
"""


@pytest.mark.parametrize(("number", "code"), SIGNALS.items())
def test_a_signal_during_the_first_imports_is_heard(
    number: signal.Signals, code: int, workspace: Path
) -> None:
    """The program is not killed without a word while it is still getting ready."""
    early = workspace / "early"
    early.mkdir()
    (early / "argparse.py").write_text(EARLY.format(name=number.name), encoding="utf-8")
    environment = {"PYTHONPATH": str(early)}
    with started(*program(), cwd=workspace, environment=environment, cold=True) as child:
        assert child.end() == code
        assert (child.last["type"], child.last["reason"]) == ("interrupted", number.name)


# The main thread waits in the kernel, where handled signals do not reach it, as it does while a
# disk hangs. Its child holds it there and lets go in the end.
IN_THE_KERNEL = (
    RUN
    + """
import ctypes
libc, CLONE_VFORK = ctypes.CDLL(None), 0x4000
events = t.Emitter(writer := t.LineWriter(t.claim_stdout(), lambda error: None))
stop.end = functools.partial(t.end_at_once, events, writer)
with stop.on_signals():
    events.emit(t.PhaseFacts(name="working", done=0, total=None))
    if libc.syscall(56, CLONE_VFORK | signal.SIGCHLD, 0, 0, 0, 0) == 0:
        os.close(writer.descriptor)
        libc.sleep(60)
        libc._exit(0)
"""
)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="makes a system call by its number")
@pytest.mark.skipif(sys.platform != "linux", reason="makes a system call of Linux")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_heard_while_the_main_thread_waits_for_a_disk(number: signal.Signals) -> None:
    """Another thread takes it, says the last line, and ends the process."""
    with started(*script(IN_THE_KERNEL), start_new_session=True, cold=True) as child:
        child.line()
        time.sleep(0.3)  # until it waits; nothing tells when
        os.kill(child.process.pid, number)
        try:
            assert child.line()["reason"] == number.name
            assert child.process.wait(CONTRACT_SECONDS) == SIGNALS[number]
        finally:
            os.killpg(child.process.pid, signal.SIGKILL)


@pytest.mark.parametrize("before", [set(), {signal.SIGTERM}])
def test_the_mask_of_signals_is_lent_and_given_back(
    before: set[signal.Signals], own_handlers: Handlers, stop: StopRequest
) -> None:
    """A parent that blocked a signal by accident does not make the run deaf to it."""
    former = signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        with stop.on_signals():
            within = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        after = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)

    assert within & set(SIGNALS) == set()
    assert after == before


def test_one_thread_listens_for_signals_and_for_the_host(stop: StopRequest) -> None:
    """It is gone when nothing is to be heard any more."""
    before, gone = threading.active_count(), threading.Event()
    with stop.on_signals():
        stop.host_gone = gone.is_set
        assert threading.active_count() == before + 1
        gone.set()
        wait_until(lambda: stop.reason == "host_gone")

    assert threading.active_count() == before


Handlers = dict[signal.Signals, Any]


def own_handler(_number: int, _frame: Any) -> None:
    """Stand for a handler that the surrounding program has set."""


@pytest.fixture
def own_handlers() -> Iterator[Handlers]:
    """Set handlers of our own for a while; the one for SIGHUP ignores it."""
    wanted: Handlers = dict.fromkeys([*SIGNALS, signal.SIGUSR1], own_handler)
    wanted[signal.SIGHUP] = signal.SIG_DFL
    former = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    yield wanted
    for number, handler in former.items():
        signal.signal(number, handler)


def handlers_of(numbers: Handlers) -> Handlers:
    """Tell the handlers these signals have at the moment."""
    return {number: signal.getsignal(number) for number in numbers}


def test_handlers_are_lent_and_given_back(own_handlers: Handlers, stop: StopRequest) -> None:
    """Within the block the stop signals are ours; SIGUSR1 never is, and nothing is afterwards."""
    with stop.on_signals() as lent:
        within = handlers_of(own_handlers)
    changed = {number for number in within if within[number] != own_handlers[number]}

    assert lent is stop
    assert changed == set(SIGNALS)
    assert handlers_of(own_handlers) == own_handlers


def test_handlers_are_given_back_after_an_exception(
    own_handlers: Handlers, stop: StopRequest
) -> None:
    """However the block ends, the surrounding program has its handlers again."""

    def work() -> None:
        with stop.on_signals():
            signal.raise_signal(signal.SIGTERM)
            stop.check()

    with pytest.raises(TrainingInterrupted):
        work()
    assert handlers_of(own_handlers) == own_handlers


def test_a_handler_asks_and_does_nothing_else(
    own_handlers: Handlers, stop: StopRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    """It raises nothing where it strikes and prints nothing."""
    with stop.on_signals():
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGINT)

    assert stop.reason == "SIGHUP"
    assert capfd.readouterr() == ("", "")


def test_a_thread_leaves_the_handlers_alone(own_handlers: Handlers, stop: StopRequest) -> None:
    """Only the main thread may set handlers; used in another, the block works without."""

    def work() -> Handlers:
        with stop.on_signals():
            return handlers_of(own_handlers)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == own_handlers
    assert handlers_of(own_handlers) == own_handlers


FORK = (
    RUN
    + """
with stop.on_signals():
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, b"x")
        time.sleep(30)
        os._exit(77)
    os.read(ready, 1)
    os.kill(child, int(sys.argv[1]))
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), stop.reason)
"""
)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_forked_helper_dies_by_the_signal(number: signal.Signals) -> None:
    """It inherits the handler but neither outlives the signal nor asks for a stop."""
    with started(*script(FORK, int(number))) as child:
        assert child.end() == 0
        assert child.received.decode().split() == [str(-number), "None"]


HELPER = (
    RUN
    + """
with stop.on_signals():
    helper = subprocess.Popen(["sleep", "30"])
    helper.send_signal(int(sys.argv[1]))
    print(helper.wait(), stop.reason)
"""
)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_helper_program_does_not_inherit_the_handlers(number: signal.Signals) -> None:
    """A program started meanwhile ends by the signal as any other."""
    with started(*script(HELPER, int(number))) as child:
        assert child.end() == 0
        assert child.received.decode().split() == [str(-number), "None"]


# --- The program -------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), SIGNALS.items())
def test_a_long_preflight_can_be_stopped(number: signal.Signals, code: int, slow: Path) -> None:
    """One last line `interrupted`, the signal's exit code, and nothing written."""
    with started(*program("--validate-only"), cwd=slow) as child:
        assert child.line()["type"] == "start"
        child.process.send_signal(number)

        assert child.end() == code
        assert (child.last["type"], child.last["reason"]) == ("interrupted", number.name)
        assert (child.last["step"], child.last["path"]) == (0, None)
        assert not (slow / "out").exists()


def test_a_run_can_be_stopped_while_it_scans(slow: Path) -> None:
    """The mirror holds the same lines as stdout, the last one included, and the lock is free."""
    with started(*program(), cwd=slow) as child:
        child.line()
        child.process.send_signal(signal.SIGTERM)

        assert child.end() == 143
        assert child.last["type"] == "interrupted"
        assert (slow / "out" / "events.jsonl").read_bytes() == child.received


def test_waiting_for_a_config_can_be_stopped(workspace: Path) -> None:
    """A host that never sends the config can still end the program."""
    (workspace / "config.json").unlink()
    os.mkfifo(workspace / "config.json")
    with (
        started(*program(), cwd=workspace) as child,
        (workspace / "config.json").open("wb"),  # opens when the trainer reads
    ):
        child.process.send_signal(signal.SIGTERM)

        assert child.end() == 143
        assert child.last["reason"] == "SIGTERM"


def sick_driver(folder: Path) -> dict[str, str]:
    """Let nvidia-smi hang; return the PATH that leads to it."""
    tool = folder / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\ntouch '{folder}/asked'\nexec sleep 30\n", encoding="utf-8")
    tool.chmod(0o755)
    return {"PATH": f"{tool.parent}:{os.environ['PATH']}"}


def test_a_hanging_device_query_does_not_delay_the_stop(slow: Path) -> None:
    """nvidia-smi hangs on a machine with a sick driver; the run ends in time all the same."""
    path = sick_driver(slow)
    with started(*program("--validate-only"), cwd=slow, environment=path) as child:
        child.line()
        time.sleep(0.5)  # until the query is under way
        child.process.send_signal(signal.SIGTERM)

        assert child.end() == 143
        assert child.last["type"] == "interrupted"


def test_a_list_of_devices_that_takes_long_can_be_stopped(tmp_path: Path) -> None:
    """It is not printed, and the exit code tells."""
    command, path = [sys.executable, str(PROGRAM), "--devices"], sick_driver(tmp_path)
    child = subprocess.Popen(command, env={**os.environ, **path}, stdout=subprocess.PIPE)
    while not (tmp_path / "asked").exists():
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    assert (child.communicate(timeout=20)[0], child.returncode) == (b"", 143)


@pytest.fixture
def chatty(slow: Path) -> Path:
    """Provide a slow workspace that first makes more warnings than a pipe holds."""
    for number in range(800):
        (slow / "data" / f"broken{number}.png").touch()
    return slow


def fill_pipe(child: Child) -> None:
    """Wait until so much lies unread in the pipe that no further line fits."""

    def waiting_bytes() -> int:
        answer = fcntl.ioctl(child.stdout, termios.FIONREAD, bytes(4))
        return int(struct.unpack("i", answer)[0])

    def is_full() -> bool:
        before = waiting_bytes()
        time.sleep(0.2)
        return before == waiting_bytes() > 2**15

    wait_until(is_full)


def test_a_host_that_does_not_read_cannot_keep_the_run_alive(chatty: Path) -> None:
    """With the pipe full, SIGTERM ends the process in time; the lines cannot be delivered."""
    with started(*program("--validate-only"), cwd=chatty) as child:
        fill_pipe(child)
        child.process.send_signal(signal.SIGTERM)

        assert child.process.wait(CONTRACT_SECONDS) == 143


def test_a_finished_run_waits_a_minute_for_a_host_that_does_not_read(stop: StopRequest) -> None:
    """A stopped one 6 seconds from the request on; both leave time for the last line."""
    clock = [1000.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: clock[0])

        def patient(waits: Callable[[], bool], *seconds: float) -> list[bool]:
            found = []
            for later in seconds:
                clock[0] = 1000.0 + later
                found.append(waits())
            clock[0] = 1000.0
            return found

        assert patient(patience(stop), 0, 59, 61) == [True, True, False]
        stop.request("SIGTERM")
        assert patient(patience(stop), 0, 5, 7) == [True, True, False]
        stop.requested_at -= 60
        assert patient(patience(stop), 0, 0.9, 1.1) == [True, True, False]


def test_a_host_that_reads_again_gets_all_lines(chatty: Path) -> None:
    """The stopped run waits a little for a full pipe, and then nothing is missing."""
    with started(*program("--validate-only"), cwd=chatty) as child:
        fill_pipe(child)
        child.process.send_signal(signal.SIGTERM)
        time.sleep(1)

        assert child.end() == 143
        assert (child.last["type"], child.last["reason"]) == ("interrupted", "SIGTERM")


# --- Stop file ---------------------------------------------------------------


def test_a_stop_file_ends_the_run_and_is_gone(slow: Path) -> None:
    """One left from earlier is removed at the start; a new one is honoured and removed."""
    stop_file = slow / "out" / "stop"
    stop_file.parent.mkdir()
    stop_file.touch()
    os.utime(stop_file, (time.time() - 60,) * 2)
    with started(*program(), cwd=slow) as child:
        wait_until(lambda: not stop_file.exists())
        time.sleep(0.7)  # longer than the file is looked for
        assert child.process.poll() is None
        stop_file.touch()

        assert child.end() == 143
        assert (child.last["type"], child.last["reason"]) == ("interrupted", "stop_file")
        assert not stop_file.exists()


def test_a_stop_file_that_is_younger_than_the_process_is_a_request(slow: Path) -> None:
    """Also where it was written before the program came to look; the run does not begin."""
    reader, writer = os.pipe()
    stop_file = slow / "out" / "stop"
    stop_file.parent.mkdir()
    command = (sys.executable, PROGRAM, "--config", "-")
    with started(*command, cwd=slow, stdin=reader) as child:
        os.close(reader)
        with os.fdopen(writer, "wb") as config:  # until it comes, the process waits
            wait_until(lambda: listens(child.process.pid))
            stop_file.touch()
            config.write((slow / "config.json").read_bytes())

        assert child.end() == 143
        assert (child.last["type"], child.last["reason"]) == ("interrupted", "stop_file")
        assert not stop_file.exists()


def listens(process: int) -> bool:
    """Tell whether a process has handlers for signals, as the program has once it began."""
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    (caught,) = (line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_only_a_stop_file_from_before_the_process_is_taken_for_old(
    tmp_path: Path, stop: StopRequest
) -> None:
    """By the clock of files; the process began a moment before it could note the time."""
    path, moment = tmp_path / "stop", time.time()
    assert moment - 2 < stop.began <= moment
    for age, old in ((60, True), (-1, False)):
        path.touch()
        os.utime(path, (stop.began - age,) * 2)
        assert take_stop_file(path, stop.began) is old
        assert path.exists() is not old


AS_LIBRARY = """
import train_lora as t

t.LoRATrainer(t.TrainingConfig.from_json("config.json")).train()
"""


def test_a_stop_file_counts_also_for_a_run_as_a_library(slow: Path) -> None:
    """Without the command line nobody takes signals over, yet the file is looked for."""
    with started(*script(AS_LIBRARY), cwd=slow, stderr=subprocess.PIPE) as child:
        wait_until((slow / "out" / "events.jsonl").exists)
        time.sleep(0.2)  # past the start, which would remove the file
        (slow / "out" / "stop").touch()
        _, errors = child.process.communicate(timeout=CONTRACT_SECONDS)

        assert b"TrainingInterrupted: stop_file" in errors


def test_only_what_can_be_removed_is_a_stop_file(tmp_path: Path) -> None:
    """A missing file asks nothing, nor does a folder of that name, which would ask for ever."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()

    assert not take_stop_file(tmp_path / "missing")
    assert not take_stop_file(tmp_path / "folder")
    assert take_stop_file(tmp_path / "file")
    assert not take_stop_file(tmp_path / "file")


# --- Vanished host -----------------------------------------------------------

WATCHED = (
    RUN
    + """
def watch(descriptor):
    watching = stop.watching({"host_gone": functools.partial(t.reader_gone, descriptor)})
    watches.enter_context(watching)

with contextlib.ExitStack() as watches, stop.on_signals(): code = run(0, watch)
sys.exit(code)
"""
)


def pipe_pair() -> tuple[int, int]:
    """Make the two ends of a pipe, as most hosts give to a child."""
    return os.pipe()


def socket_pair() -> tuple[int, int]:
    """Make two connected sockets, which is what Node and Electron give to a child as stdout."""
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


@pytest.mark.parametrize("make", [pipe_pair, socket_pair])
def test_a_vanished_reader_is_noticed_although_nothing_is_written(
    make: Callable[[], tuple[int, int]],
) -> None:
    """A run whose next line is far away ends within a second or so of its host."""
    ours, theirs = make()
    with started(*script(WATCHED, 0), stdout=theirs) as child:
        os.close(theirs)
        assert os.read(ours, 4096).endswith(b"\n")
        time.sleep(0.6)  # one look at a reader who is there
        assert child.process.poll() is None
        os.close(ours)

        assert child.process.wait(CONTRACT_SECONDS) == 143


@pytest.mark.parametrize("make", [pipe_pair, socket_pair])
def test_a_reader_is_there_until_it_closes(make: Callable[[], tuple[int, int]]) -> None:
    """A reader who is slow, or has not yet read anything, is no vanished one."""
    ours, theirs = make()
    os.write(theirs, b"unread")
    assert not reader_gone(theirs)
    os.close(ours)

    assert reader_gone(theirs)
    os.close(theirs)


def test_a_file_never_vanishes(tmp_path: Path) -> None:
    """Output sent to a file has no reader who could leave."""
    with (tmp_path / "events").open("wb") as file:
        assert not reader_gone(file.fileno())


@pytest.mark.parametrize("validate", [["--validate-only"], []])
def test_a_vanished_reader_ends_the_program_quietly(validate: list[str], slow: Path) -> None:
    """No traceback and no exit code 120, although lines can no longer be written."""
    with started(*program(*validate), cwd=slow, stderr=subprocess.PIPE) as child:
        child.line()
        child.stdout.close()

        assert child.process.wait(CONTRACT_SECONDS) == 143
        assert child.process.stderr
        assert child.process.stderr.read() == b""


# --- Full disk ---------------------------------------------------------------


def test_a_full_disk_behind_stdout_is_told_in_the_mirror(slow: Path) -> None:
    """The run ends as if its host were gone, and says why where that can be written."""
    begun = b'{"type":"of an earlier run"}\n' * 1000
    (slow / "stdout").write_bytes(begun)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(begun), len(begun)))

    with (slow / "stdout").open("ab") as stdout:
        options: Record = {"preexec_fn": limit, "stdout": stdout, "stderr": subprocess.PIPE}
        with started(*program(), cwd=slow, cold=True, **options) as child:
            _, errors = child.process.communicate(timeout=60)

    assert (child.process.returncode, errors) == (143, b"")
    assert (slow / "stdout").read_bytes() == begun
    mirror = (slow / "out" / "events.jsonl").read_bytes()
    check_stream(mirror)
    assert json.loads(mirror.splitlines()[-1])["reason"] == "output_full"


# --- End of the parent -------------------------------------------------------

LAUNCHERS = {
    "python": (sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])"),
    "sh": ("sh", "-c", '"$@"; true', "sh"),
}


@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS.keys())
def test_the_end_of_the_parent_stops_the_run_where_asked(
    launcher: tuple[str, ...], slow: Path
) -> None:
    """A launcher that is killed passes nothing on; the run notices by itself."""
    write_config(slow, stop_with_parent=True)
    with started(*launcher, *program(), cwd=slow) as child:
        child.line()
        time.sleep(0.7)  # one look at a parent who is there
        child.process.kill()
        child.end()  # the trainer holds the pipe until it ends

        assert (child.last["type"], child.last["reason"]) == ("interrupted", "host_gone")


def test_the_end_of_the_parent_is_noticed_however_early_it_comes(slow: Path) -> None:
    """A parent killed before the config was read has ended as well."""
    text = write_config(slow, stop_with_parent=True).read_bytes()
    (slow / "config.json").unlink()
    os.mkfifo(slow / "config.json")
    with started(*LAUNCHERS["python"], *program(), cwd=slow) as child:
        with (slow / "config.json").open("wb") as config:  # opens when the trainer reads
            child.process.kill()
            child.process.wait()
            config.write(text)
        child.end()

        assert (child.last["type"], child.last["reason"]) == ("interrupted", "host_gone")


def test_without_the_wish_the_end_of_the_parent_means_nothing(slow: Path) -> None:
    """By default a run outlives its launcher, as under nohup."""
    with started(*LAUNCHERS["python"], *program(), cwd=slow) as child:
        pid = child.line()["pid"]
        child.process.kill()
        time.sleep(1.2)  # two looks
        os.kill(pid, signal.SIGTERM)
        child.end()

        assert (child.last["type"], child.last["reason"]) == ("interrupted", "SIGTERM")


def test_a_living_parent_has_not_ended(stop: StopRequest) -> None:
    """As long as it lives, nothing is asked for."""
    assert not stop.parent_ended()


class Kernel:
    """What Windows says of processes, as far as it is asked."""

    def __init__(self, looks: dict[int, int]) -> None:
        """Take the processes that may be watched, and for how many looks each lives."""
        self.looks = looks

    def OpenProcess(self, access: int, inherit: bool, pid: int) -> int:  # noqa: N802
        """Give a handle that can be waited for; 0 where there is no such process."""
        assert (access, inherit) == (0x00100000, False)
        return pid if pid in self.looks else 0

    def WaitForSingleObject(self, handle: int, milliseconds: int) -> int:  # noqa: N802
        """Tell at once whether it has ended: 0, or else that the time is up."""
        assert milliseconds == 0
        self.looks[handle] -= 1
        return 0 if self.looks[handle] < 0 else 0x102


def test_on_windows_a_handle_tells_that_the_parent_ended() -> None:
    """There its number stays that of the parent, dead or alive."""
    ended = watch_parent(Kernel({os.getppid(): 2}))

    assert [ended(), ended(), ended(), ended()] == [False, False, True, True]


def test_on_windows_a_parent_that_may_not_be_watched_has_not_ended() -> None:
    """One of a higher rank, such as a service, gives no handle."""
    assert not watch_parent(Kernel({}))()
