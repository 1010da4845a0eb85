"""The database: what is accepted stays, nothing is given twice, and every change is whole."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from studio import store as database
from studio.store import Claim, DatabaseTooNew, Job, StateConflict, Store, UnknownJob, new_id

SLOTS = ["cpu:0", "cpu:1"]


def add(store: Store, **options: Any) -> Job:
    """Queue a job."""
    options = {"kind": "train", "name": "A run", "config": {"steps": 3}} | options
    return store.insert(Job(new_id(), **options))


def at_once(times: int, work: Callable[[], Any]) -> list[Any]:
    """Do the same in many threads."""
    with ThreadPoolExecutor(times) as threads:
        return [each.result() for each in [threads.submit(work) for _ in range(times)]]


def test_fifty_claims_at_once_fill_two_slots(store: Store) -> None:
    """However many ask, each slot is given once."""
    for _ in range(50):
        add(store)
    claims = [claim for claim in at_once(50, lambda: store.claim(SLOTS)) if claim]
    assert len(claims) == 2
    assert {slot for claim in claims for slot in claim.slots} == set(SLOTS)
    assert store.counts() == {("train", "running"): 2, ("train", "queued"): 48}


def test_two_services_cannot_hold_one_slot(store: Store, tmp_path: Path) -> None:
    """The database itself forbids it, also for another connection."""
    add(store)
    add(store)
    other = Store(tmp_path / "root" / "studio.db")
    first, second = store.claim(["cpu:0"]), other.claim(["cpu:0"])
    other.close()
    assert first
    assert second is None


def test_a_key_that_comes_again_gives_the_same_job(store: Store) -> None:
    """Fifty requests with one idempotency key make one job."""
    made = at_once(50, lambda: add(store, idempotency_key="again"))
    assert {job.id for job in made} == {store.jobs()[0].id}
    assert store.job_with_key("again") == made[0]
    assert store.job_with_key("never") is None
    assert len(store.jobs()) == 1


def claimed(store: Store) -> str | None:
    """Claim one slot, and name the job that got it."""
    claim = store.claim(["cpu:0"])
    return claim.job.name if claim else None


def finish(store: Store, name: str | None) -> None:
    """End the job of a name."""
    [job] = [job for job in store.active() if job.name == name]
    store.transition(job.id, "completed", attempt={"outcome": "complete"})


def test_higher_priority_comes_first_then_who_came_first(store: Store) -> None:
    """The queue is in the order of priorities, and among equals in that of time."""
    for each, priority in (("a", 0), ("b", 0), ("urgent", 5), ("c", 0)):
        add(store, name=each, priority=priority)
    assert [job.name for job in store.queue()] == ["urgent", "a", "b", "c"]
    turns: list[str | None] = []
    while name := claimed(store):
        turns.append(name)
        finish(store, name)
    assert turns == ["urgent", "a", "b", "c"]


def test_positions_count_from_one_and_end_with_the_wait(store: Store) -> None:
    """Who waits knows its place; who does not has none."""
    first, second = add(store), add(store)
    assert (store.position(first.id), store.position(second.id)) == (1, 2)
    store.claim(["cpu:0"])
    assert (store.position(first.id), store.position(second.id)) == (None, 1)


def test_an_interrupted_job_keeps_its_place(store: Store) -> None:
    """Who was running is ahead of who came later."""
    first = add(store, name="first")
    add(store, name="second")
    store.claim(["cpu:0"])
    store.transition(first.id, "queued", attempt={"outcome": "rebooted"})
    assert claimed(store) == "first"


def test_a_pause_lets_others_pass(store: Store) -> None:
    """A job that is to wait a while keeps no slot from the next one."""
    add(store, name="paused", not_before=database.from_now(60))
    add(store, name="next")
    assert claimed(store) == "next"


def test_nobody_passes_a_job_that_needs_both_slots(store: Store) -> None:
    """A job for two slots waits until both are free, and small ones wait behind it."""
    add(store, name="small")
    assert store.claim(SLOTS)
    add(store, name="large", slots=2)
    add(store, name="small too")
    assert store.claim(SLOTS) is None
    finish(store, "small")
    claim = store.claim(SLOTS)
    assert isinstance(claim, Claim)
    assert (claim.job.name, claim.slots) == ("large", ("cpu:0", "cpu:1"))


def test_jobs_without_a_slot_run_beside_the_others(store: Store) -> None:
    """Checking a folder needs no card; two such jobs run at once, and no third."""
    add(store, name="long")
    for _ in range(3):
        add(store, name="check", kind="prepare", slots=0)
    names: list[str | None] = []
    while name := claimed(store):
        names.append(name)
    assert names == ["long", "check", "check"]


def test_jobs_for_elsewhere_hold_no_slot_here(store: Store) -> None:
    """Another engine has a queue of its own."""
    add(store, name="there", engine="peer:attic")
    add(store, name="here")
    assert [claimed(store), claimed(store)] == ["here", "there"]
    assert len(store.holds()) == 1


def test_a_hold_lasts_until_someone_resumes(store: Store) -> None:
    """A held job is not started; its place in the queue stays."""
    job = add(store)
    store.hold(job.id)
    assert store.claim(SLOTS) is None
    store.resume(job.id)
    assert store.claim(SLOTS)


def test_a_state_that_is_final_is_left_by_resuming_alone(store: Store) -> None:
    """Nothing but a user's word starts a job that has ended."""
    job = add(store)
    store.claim(SLOTS)
    store.transition(job.id, "failed", attempt={"outcome": "error"}, error={"code": "x"})
    with pytest.raises(StateConflict):
        store.transition(job.id, "queued")
    assert store.request_stop(job.id).desired == "run"
    again = store.resume(job.id, {"steps": 9})
    assert (again.state, again.error, again.config) == ("queued", None, {"steps": 9})


def test_what_runs_is_neither_resumed_nor_deleted(store: Store) -> None:
    """Both are refused while an attempt is under way."""
    job = add(store)
    store.claim(SLOTS)
    with pytest.raises(StateConflict):
        store.resume(job.id)
    with pytest.raises(StateConflict):
        store.delete(job.id)


def test_an_ended_job_can_be_forgotten(store: Store) -> None:
    """With it go its attempts."""
    job = add(store)
    store.claim(SLOTS)
    store.transition(job.id, "completed", attempt={"outcome": "complete"})
    store.delete(job.id)
    with pytest.raises(UnknownJob):
        store.job(job.id)
    assert store.attempts(job.id) == []


def test_lists_are_newest_first_and_can_be_continued(store: Store) -> None:
    """A page ends with the id from which the next one goes on."""
    made = [add(store, name=str(n)).id for n in range(5)]
    page = store.jobs(limit=2)
    assert [job.id for job in page] == [made[4], made[3]]
    assert [job.id for job in store.jobs(before=page[-1].id)] == [made[2], made[1], made[0]]
    assert store.jobs(kind="evaluate") == []


def test_ids_sort_by_time_and_are_never_equal() -> None:
    """Ids of 26 letters, later ones behind earlier ones."""
    made = [new_id() for _ in range(1000)]
    assert made == sorted(set(made))
    assert {len(each) for each in made} == {26}


def test_a_failing_transaction_changes_nothing(store: Store) -> None:
    """What fails half way is as if it had never begun."""
    job = add(store)
    with pytest.raises(sqlite3.IntegrityError):
        store.change(job.id, name="Renamed", slots=-1)
    assert store.job(job.id).name == "A run"


def test_sessions_end(store: Store) -> None:
    """A session is open until its time is over, or until somebody ends it."""
    store.open_session("short", -1)
    store.open_session("long", 60)
    assert (store.has_session("short"), store.has_session("long")) == (False, True)
    store.close_session("long")
    assert not store.has_session("long")


def test_an_empty_file_becomes_a_database(tmp_path: Path) -> None:
    """Version 0 is what SQLite makes; all scripts run, once."""
    path = tmp_path / "old.db"
    sqlite3.connect(path).close()
    Store(path).close()
    store = Store(path)
    add(store)
    assert len(store.jobs()) == 1
    store.close()


def test_an_older_database_gets_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A further script runs on what is there, and its content stays."""
    store = Store(tmp_path / "old.db")
    job = add(store)
    store.close()
    further = "CREATE TABLE more(a TEXT) STRICT; INSERT INTO more VALUES('new')"
    monkeypatch.setattr(database, "SCHEMA", (*database.SCHEMA, further))
    for _ in range(2):
        store = Store(tmp_path / "old.db")
        with store.writing() as db:
            assert [tuple(row) for row in db.execute("SELECT a FROM more")] == [("new",)]
        assert store.job(job.id).name == "A run"
        store.close()


def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    """An older program would damage what it does not know."""
    with sqlite3.connect(tmp_path / "new.db") as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(DatabaseTooNew, match="expected a database of version 1 or older, got 99"):
        Store(tmp_path / "new.db")
