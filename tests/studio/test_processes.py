"""Attempts as processes: they outlive the service, and what becomes of them is seen as it is."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from studio_ground import (
    QUICK,
    at_step,
    attempt_folder,
    end_all,
    enqueue,
    final_bytes,
    in_state,
    kill_group,
    pid_of,
    reconciler_of,
    rounds_until,
    service,
    shim_of,
    wait_until,
    write_command,
)

from studio import local
from studio.__main__ import alone, main
from studio.local import Local, is_locked
from studio.store import Store

if TYPE_CHECKING:
    from pathlib import Path

    from studio.reconcile import Reconciler
    from studio.settings import Settings
    from studio.store import Job

LONG = 100_000  # steps of a run that ends when it is told to


def run_alone(settings: Settings, store: Store, reconciler: Reconciler) -> bytes:
    """Let a run go through undisturbed, and return what it made."""
    job = enqueue(settings, store, "--step-seconds=0")
    rounds_until(reconciler, in_state(store, job, "completed"))
    return final_bytes(settings, job)


# --- With a reconciler in this process ---


def test_a_run_is_followed_to_its_end(
    settings: Settings, store: Store, reconciler: Reconciler
) -> None:
    """A queued job runs, its progress is kept, and it is completed with what it made."""
    told = []
    reconciler.listeners.append(lambda job: told.append(job.state))
    job = enqueue(settings, store)
    rounds_until(reconciler, in_state(store, job, "completed"))
    done = store.job(job.id)
    assert (done.step, done.total_steps, done.phase) == (24, 24, "training")
    assert done.final
    assert done.final["bytes"] == 32
    assert not store.holds()
    assert [(each.outcome, each.exit_code) for each in store.attempts(job.id)] == [("complete", 0)]
    assert told == ["running", "completed"]


def test_a_stop_saves_and_a_resume_ends_with_the_same_bytes(
    settings: Settings, store: Store, reconciler: Reconciler
) -> None:
    """Stopped twice on its way, a run makes what it makes in one go."""
    job = enqueue(settings, store)
    for step in (3, 9):
        rounds_until(reconciler, at_step(store, job, step))
        store.request_stop(job.id)
        rounds_until(reconciler, in_state(store, job, "stopped"))
        assert store.job(job.id).continues_from
        store.resume(job.id)
    rounds_until(reconciler, in_state(store, job, "completed"))
    outcomes = [each.outcome for each in store.attempts(job.id)]
    assert outcomes == ["interrupted", "interrupted", "complete"]
    assert final_bytes(settings, job) == run_alone(settings, store, reconciler)


def test_a_killed_trainer_is_started_again_and_goes_on(
    settings: Settings, store: Store, reconciler: Reconciler
) -> None:
    """Killed without a word, it is resumed from what it had saved, and ends as it should."""
    job = enqueue(settings, store, "--crash-at=12")
    second = attempt_folder(settings, job, 2)
    rounds_until(reconciler, (second / "process.json").exists)
    first = store.attempts(job.id)[0]
    assert (first.outcome, first.exit_code, first.last_step) == ("vanished", 137, 11)
    write_command(settings, job.id, *json_command(settings, job)[:-1])
    rounds_until(reconciler, in_state(store, job, "completed"))
    assert final_bytes(settings, job) == run_alone(settings, store, reconciler)


def json_command(settings: Settings, job: Job) -> list[str]:
    """Read what a job runs."""
    command: list[str] = json.loads((settings.job(job.id) / "command.json").read_bytes())["argv"]
    return command


def test_a_trainer_that_is_killed_again_and_again_has_failed(
    settings: Settings, store: Store, reconciler: Reconciler
) -> None:
    """Three attempts without progress are enough; the end of the log tells why."""
    job = enqueue(settings, store, "--crash-after=2", "--step-seconds=0")
    rounds_until(reconciler, in_state(store, job, "failed"))
    error = store.job(job.id).error
    assert error
    assert (error["code"], error["tail"]) == ("process_vanished", "about to be killed")
    assert "SIGKILL" in error["message"]
    assert [each.outcome for each in store.attempts(job.id)] == ["vanished"] * 4


def test_an_error_is_told_and_not_repeated(
    settings: Settings, store: Store, reconciler: Reconciler
) -> None:
    """A program that says it failed has failed."""
    job = enqueue(settings, store, "--error-at=2")
    rounds_until(reconciler, in_state(store, job, "failed"))
    error = store.job(job.id).error
    assert error
    assert error["code"] == "out_of_memory"
    assert len(store.attempts(job.id)) == 1


def test_without_its_shim_a_run_is_alive_until_it_ends(
    settings: Settings, store: Store, reconciler: Reconciler
) -> None:
    """The lock is the trainer's as well."""
    job = enqueue(settings, store)
    rounds_until(reconciler, at_step(store, job, 2))
    shim = shim_of(attempt_folder(settings, job))
    assert shim
    os.kill(shim, signal.SIGKILL)
    reconciler.make_round()
    assert store.job(job.id).state == "running"
    rounds_until(reconciler, in_state(store, job, "completed"))
    assert [(each.outcome, each.exit_code) for each in store.attempts(job.id)] == [
        ("complete", None)
    ]


def reboot(settings: Settings, store: Store) -> None:
    """End everything at once, and let it look as if it had been in another life of the machine."""
    for job in store.active():
        folder = attempt_folder(settings, job, store.attempts(job.id)[-1].n)
        shim = shim_of(folder)
        assert shim
        os.kill(shim, signal.SIGKILL)
        kill_group(pid_of(folder))
        process = local.read_json(folder / "process.json") | {"boot_id": "another"}
        (folder / "process.json").write_text(json.dumps(process), encoding="ascii")
    end_all(settings)


def test_after_a_reboot_all_goes_on_in_the_old_order(
    settings: Settings, store: Store, reconciler: Reconciler
) -> None:
    """What ran is first again, from what it had saved, and counts as no failure."""
    jobs = [enqueue(settings, store, name=name, steps=99) for name in ("a", "b", "c")]
    rounds_until(reconciler, at_step(store, jobs[1], 9))
    reboot(settings, store)
    after = reconciler_of(settings, store)
    after.look_after_all()
    assert [job.name for job in store.queue()] == ["a", "b", "c"]
    rounds_until(after, lambda: all(in_state(store, job, "completed")() for job in jobs))
    outcomes = [[each.outcome for each in store.attempts(job.id)] for job in jobs]
    assert outcomes == [["rebooted", "complete"]] * 2 + [["complete"]]


def test_after_a_reboot_a_studio_told_to_hold_waits(settings: Settings, store: Store) -> None:
    """With --on-start hold, nothing starts until somebody resumes it."""
    job = enqueue(settings, store, steps=LONG)
    rounds_until(reconciler_of(settings, store), at_step(store, job, 9))
    reboot(settings, store)
    after = reconciler_of(replace(settings, on_start="hold"), store)
    after.start()
    time.sleep(0.3)
    after.stop()
    held = store.job(job.id)
    assert (held.state, held.desired, len(store.attempts(job.id))) == ("queued", "hold", 1)
    store.resume(job.id)
    rounds_until(after, lambda: len(store.attempts(job.id)) == 2)


def test_after_its_last_word_a_process_keeps_its_slot_until_it_is_gone(
    settings: Settings, store: Store
) -> None:
    """It may still hold the card's memory; if it stays for too long, it is ended."""
    patient = reconciler_of(settings, store, replace(QUICK, ending=60))
    job = enqueue(settings, store, "--linger-seconds=600", "--step-seconds=0")
    engine = Local(settings)
    rounds_until(patient, lambda: engine.observe(f"{job.id}/1").terminal is not None)
    patient.make_round()
    assert store.job(job.id).state == "running"
    assert store.holds() == {"cpu:0": job.id}
    rounds_until(reconciler_of(settings, store), in_state(store, job, "completed"))
    assert not store.holds()


def test_a_program_that_does_not_stop_is_ended_by_force(
    settings: Settings, store: Store, reconciler: Reconciler
) -> None:
    """After its time, with all that it has started."""
    job = enqueue(settings, store, "--ignore-stop", steps=LONG)
    rounds_until(reconciler, at_step(store, job, 2))
    store.request_stop(job.id)
    rounds_until(reconciler, in_state(store, job, "stopping"))
    rounds_until(reconciler, in_state(store, job, "stopped"))
    assert [(each.outcome, each.exit_code) for each in store.attempts(job.id)] == [
        ("vanished", 137)
    ]


def test_a_stop_is_asked_for_once(settings: Settings, store: Store, reconciler: Reconciler) -> None:
    """A second signal would end the trainer before it has saved."""
    job = enqueue(settings, store, "--ignore-stop", steps=LONG)
    rounds_until(reconciler, at_step(store, job, 2))
    engine, folder = Local(settings), attempt_folder(settings, job)
    engine.stop(f"{job.id}/1")
    asked_at = (folder / "asked").stat().st_mtime_ns
    (settings.job(job.id) / "output" / "stop").unlink()
    engine.stop(f"{job.id}/1")
    assert (folder / "asked").stat().st_mtime_ns == asked_at
    assert not (settings.job(job.id) / "output" / "stop").exists()


def test_a_run_whose_pid_was_never_written_down_is_stopped_by_the_file(
    settings: Settings, store: Store, reconciler: Reconciler
) -> None:
    """As when its shim was killed at the worst moment, or the disk was full."""
    job = enqueue(settings, store, steps=LONG)
    rounds_until(reconciler, at_step(store, job, 2))
    path = attempt_folder(settings, job) / "process.json"
    known = path.rename(path.with_suffix(".kept"))
    store.request_stop(job.id)
    rounds_until(reconciler, in_state(store, job, "stopped"))
    known.rename(path)
    assert store.attempts(job.id)[0].outcome == "interrupted"


@pytest.fixture
def decoy() -> Iterator[subprocess.Popen[bytes]]:
    """Provide a process that nobody may touch."""
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with subprocess.Popen(command, start_new_session=True) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("force", [False, True])
def test_a_process_that_got_an_old_pid_is_left_alone(
    settings: Settings,
    store: Store,
    reconciler: Reconciler,
    decoy: subprocess.Popen[bytes],
    force: bool,
) -> None:
    """A pid counts only together with the start of its process, and with the boot."""
    job = enqueue(settings, store, steps=LONG)
    rounds_until(reconciler, at_step(store, job, 2))
    path = attempt_folder(settings, job) / "process.json"
    true = local.read_json(path)
    for lie in ({"pid": decoy.pid}, {"pid": decoy.pid, "boot_id": "another"}):
        path.write_text(json.dumps(true | lie), encoding="ascii")
        Local(settings).stop(f"{job.id}/1", force=force)
    time.sleep(0.2)
    assert decoy.poll() is None
    path.write_text(json.dumps(true), encoding="ascii")


def test_a_start_that_is_repeated_starts_nothing(
    settings: Settings, store: Store, reconciler: Reconciler
) -> None:
    """Only one shim gets an attempt, also after that is over."""
    job = enqueue(settings, store)
    reconciler.make_round()
    attempt = reconciler._attempt(job, 1, [])
    engine, folder = Local(settings), attempt_folder(settings, job)
    pid = pid_of(folder)
    assert engine.submit(attempt) == f"{job.id}/1"
    rounds_until(reconciler, in_state(store, job, "completed"))
    size = (folder / "stdout.jsonl").stat().st_size
    engine.submit(attempt)
    wait_until(lambda: not is_locked(folder / "alive"))
    assert (pid_of(folder), (folder / "stdout.jsonl").stat().st_size) == (pid, size)


def test_a_start_that_is_repeated_waits_for_no_end(
    settings: Settings, store: Store, reconciler: Reconciler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a crash between the start and the note of it: the run is followed, and obeys."""
    job = enqueue(settings, store, steps=LONG)
    reconciler.make_round()
    store.confirm(job.id, 1, "")
    monkeypatch.setattr(local, "SHIM_SECONDS", 5)
    rounds_until(reconciler, at_step(store, job, 5))
    store.request_stop(job.id)
    rounds_until(reconciler, in_state(store, job, "stopped"))
    assert [each.outcome for each in store.attempts(job.id)] == ["interrupted"]


def test_a_shim_that_does_not_answer_is_told_after_some_tries(
    settings: Settings, store: Store, reconciler: Reconciler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine may be too busy for a while only."""
    monkeypatch.setattr(local, "SHIM_SECONDS", 0)
    job = enqueue(settings, store)
    rounds_until(reconciler, in_state(store, job, "failed"))
    error = store.job(job.id).error
    assert error
    assert "no answer in 0 seconds" in error["message"]
    assert len(store.attempts(job.id)) == 3
    for log in settings.job(job.id).glob("attempts/*/stderr.log"):
        log.unlink()  # by which the end of this test would wait for who is about to begin


def test_a_python_that_is_not_there_fails_at_once_with_its_name(
    settings: Settings, store: Store, reconciler: Reconciler
) -> None:
    """What cannot be started is not tried again."""
    job = enqueue(settings, store)
    write_command(settings, job.id, "/nowhere/python", "train_lora.py")
    rounds_until(reconciler, in_state(store, job, "failed"))
    error = store.job(job.id).error
    assert error
    assert error["code"] == "not_started"
    assert "/nowhere/python: No such file or directory" in error["message"]
    assert len(store.attempts(job.id)) == 1


def test_a_folder_that_cannot_be_made_is_told_after_some_tries(
    settings: Settings, store: Store, reconciler: Reconciler
) -> None:
    """A disk may be full for a while only."""
    job = enqueue(settings, store)
    (settings.job(job.id) / "attempts").touch()
    rounds_until(reconciler, in_state(store, job, "failed"))
    error = store.job(job.id).error
    assert error
    assert "Not a directory" in error["message"]
    assert len(store.attempts(job.id)) == 3


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Provide a folder on a disk of 8 MiB, where this user may make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write until there is no space left."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass


def test_a_full_disk_holds_things_up_and_loses_nothing(
    small_disk: Path, settings: Settings, store: Store, reconciler: Reconciler
) -> None:
    """Neither run nor database can be written; when there is space again, all goes on."""
    there = replace(settings, root=small_disk / "root")
    there.prepare()
    on_disk = Store(there.database)
    job = enqueue(there, on_disk, steps=60)
    rounds_until(reconciler_of(there, on_disk), at_step(on_disk, job, 9))
    fill(small_disk / "filler")
    wait_until(lambda: not is_locked(attempt_folder(there, job) / "alive"))
    full = reconciler_of(there, on_disk)
    for _ in range(5):
        full.make_round()
    assert on_disk.job(job.id).state in ("running", "queued")
    (small_disk / "filler").unlink()
    rounds_until(full, in_state(on_disk, job, "completed"))
    on_disk.close()
    whole = enqueue(settings, store, "--step-seconds=0", steps=60)
    rounds_until(reconciler, in_state(store, whole, "completed"))
    assert final_bytes(there, job) == final_bytes(settings, whole)


def test_one_job_that_makes_trouble_stops_no_other(
    settings: Settings, store: Store, reconciler: Reconciler
) -> None:
    """A job of an engine that is gone waits for it, until it is stopped; the others go on."""
    lost = enqueue(settings, store, engine="peer:gone")
    job = enqueue(settings, store, "--step-seconds=0")
    rounds_until(reconciler, in_state(store, job, "completed"))
    waiting = store.job(lost.id)
    assert (waiting.state, waiting.phase) == ("running", "The engine peer:gone is not there.")
    store.request_stop(lost.id)
    rounds_until(reconciler, in_state(store, lost, "stopped"))


def test_a_flood_on_stderr_does_not_fill_the_disk(
    settings: Settings, store: Store, reconciler: Reconciler
) -> None:
    """Of 300 MB, the end stays, with a word about the beginning."""
    job = enqueue(settings, store, f"--stderr-bytes={300 << 20}")
    rounds_until(reconciler, in_state(store, job, "completed"))
    log = attempt_folder(settings, job) / "stderr.log"
    assert log.stat().st_size <= local.LOG_BYTES
    assert b"[the beginning was too long to be kept]" in log.read_bytes()


def test_what_is_no_event_does_no_harm(
    settings: Settings, store: Store, reconciler: Reconciler
) -> None:
    """Garbage and a line of 10 MB among the events change nothing."""
    job = enqueue(settings, store, "--garbage", f"--long-line-bytes={10 << 20}")
    rounds_until(reconciler, in_state(store, job, "completed"))
    assert store.job(job.id).step == 24


def test_a_silent_run_is_left_in_peace(
    settings: Settings, store: Store, reconciler: Reconciler
) -> None:
    """Silence is shown, and no reason to end anything."""
    job = enqueue(settings, store, "--silent-seconds=600")
    rounds_until(reconciler, in_state(store, job, "running"))
    wait_until(lambda: Local(settings).observe(f"{job.id}/1").silent_for > 1)
    reconciler.make_round()
    assert store.job(job.id).state == "running"


def test_children_get_no_secrets(
    settings: Settings, store: Store, reconciler: Reconciler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program sees what it needs of the environment, and the cards of its slots alone."""
    monkeypatch.setenv("STUDIO_CANARY", "secret")
    monkeypatch.setenv("HF_TOKEN", "the user's")
    job = enqueue(settings, store)
    show = "import json, os; print(json.dumps({'type': 'complete', **os.environ}))"
    write_command(settings, job.id, sys.executable, "-c", show)
    rounds_until(reconciler, in_state(store, job, "completed"))
    final = store.job(job.id).final
    assert final
    assert (final["HF_TOKEN"], final["CUDA_VISIBLE_DEVICES"]) == ("the user's", "")
    assert "STUDIO_CANARY" not in final
    assert settings.token not in json.dumps(final)


def test_arguments_reach_the_program_as_they_are(
    settings: Settings, store: Store, reconciler: Reconciler
) -> None:
    """No shell reads them."""
    words = [";rm -rf /", "'\"", "a\nb", "--help", "$HOME", "", "猫"]
    job = enqueue(settings, store)
    show = "import json, sys; print(json.dumps({'type': 'complete', 'argv': sys.argv[1:]}))"
    write_command(settings, job.id, sys.executable, "-c", show, *words)
    rounds_until(reconciler, in_state(store, job, "completed"))
    final = store.job(job.id).final
    assert final
    assert final["argv"] == words


# --- With the service as a process of its own ---


def test_a_killed_service_leaves_its_runs_and_the_next_one_knows_them(
    settings: Settings, store: Store
) -> None:
    """The run goes on meanwhile; what was asked for before the next kill is done after it."""
    job = enqueue(settings, store, steps=LONG)
    with service(settings):
        wait_until(at_step(store, job, 5))
    pid, step = pid_of(attempt_folder(settings, job)), store.job(job.id).step or 0
    time.sleep(0.5)
    assert store.job(job.id).step == step
    with service(settings):
        wait_until(at_step(store, job, step + 20))
        assert pid_of(attempt_folder(settings, job)) == pid
        assert (store.job(job.id).state, len(store.attempts(job.id))) == ("running", 1)
        store.request_stop(job.id)
        wait_until(lambda: store.job(job.id).state != "running")
    with service(settings):
        wait_until(in_state(store, job, "stopped"))
    assert store.job(job.id).continues_from


def test_a_service_that_ends_leaves_its_runs_alone(settings: Settings, store: Store) -> None:
    """SIGTERM is meant for the service."""
    job = enqueue(settings, store, steps=LONG)
    with service(settings) as process:
        wait_until(at_step(store, job, 5))
        process.terminate()
        assert process.wait(20) == 0
    assert is_locked(attempt_folder(settings, job) / "alive")
    assert store.attempts(job.id)[0].left_at


def test_runs_that_end_with_the_service_go_on_with_the_next(
    settings: Settings, store: Store
) -> None:
    """In a container all ends with the first process: runs save before, and are resumed."""
    job = enqueue(settings, store, steps=LONG)
    with service(settings, "--stop-jobs") as process:
        wait_until(at_step(store, job, 5))
        process.terminate()
        assert process.wait(20) == 0
    assert not is_locked(attempt_folder(settings, job) / "alive")
    assert store.job(job.id).state == "running"
    with service(settings):
        wait_until(lambda: len(store.attempts(job.id)) == 2)
    first = store.attempts(job.id)[0]
    assert (first.outcome, first.exit_code) == ("interrupted", 143)


def test_a_second_service_names_the_first_and_ends(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two on one folder would start everything twice."""
    with alone(settings) as lock:
        lock.write("http://127.0.0.1:8123")
        lock.flush()
        assert main(["--root", str(settings.root), "--no-browser"]) == 1
    assert "is in use by the studio at http://127.0.0.1:8123" in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    """The service says which, and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["--root", str(settings.root), "--port", port, "--no-browser"]) == 1
    assert f"127.0.0.1:{port} cannot be used: Address already in use" in capsys.readouterr().err


def test_a_studio_that_others_reach_asks_for_its_token(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without one, it answers this machine alone."""
    assert main(["--root", str(settings.root), "--host", "0.0.0.0", "--no-auth"]) == 1
    assert "--no-auth: expected a --host of this machine alone" in capsys.readouterr().err


# --- With the real trainer ---


def enqueue_training(settings: Settings, store: Store, ground: Path, base: Path) -> Job:
    """Queue a training of a tiny model."""
    job = enqueue(settings, store)
    folder = settings.job(job.id)
    config = {
        "dataset_path": str(ground / "data"),
        "base_model": str(base),
        "output_path": str(folder / "output"),
        "trigger_words": ["zkb"],
        "steps": 12,
        "checkpoint_steps": 4,
        "resolution": 256,
        "lora_rank": 4,
        "lora_alpha": 4,
        "device": "cpu",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    trainer = settings.repository / "train_lora.py"
    write_command(settings, job.id, settings.python, trainer, "--config", folder / "config.json")
    return job


@pytest.mark.slow
def test_a_real_training_that_is_stopped_and_killed_makes_the_same_file(
    settings: Settings, store: Store, ground: Path, built: Path
) -> None:
    """Stopped once and killed once, it ends with the bytes of a training left in peace."""
    reconciler = reconciler_of(settings, store, replace(QUICK, saving=20, ending=30))
    whole, job = (enqueue_training(settings, store, ground, built / "sd1") for _ in range(2))
    rounds_until(reconciler, at_step(store, job, 2), 300)
    store.request_stop(job.id)
    rounds_until(reconciler, in_state(store, job, "stopped"), 60)
    assert "state" in (store.job(job.id).continues_from or "")
    store.resume(job.id)
    rounds_until(reconciler, at_step(store, job, 9), 300)
    kill_group(pid_of(attempt_folder(settings, job, 2)))
    rounds_until(reconciler, in_state(store, job, "completed"), 300)
    rounds_until(reconciler, in_state(store, whole, "completed"), 300)
    outcomes = [each.outcome for each in store.attempts(job.id)]
    assert outcomes == ["interrupted", "vanished", "complete"]
    assert final_bytes(settings, job) == final_bytes(settings, whole)
