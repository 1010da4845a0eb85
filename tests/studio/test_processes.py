"""Attempts as processes: they outlive the service, and what becomes of them is seen as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from studio_ground import enqueue, in_state, rounds_until

if TYPE_CHECKING:
    from studio.reconcile import Reconciler
    from studio.settings import Settings
    from studio.store import Store


def test_a_run_is_followed_to_its_end(
    settings: Settings, store: Store, reconciler: Reconciler
) -> None:
    """A queued job runs, its progress is kept, and it is completed with what it made."""
    job = enqueue(settings, store)
    rounds_until(reconciler, in_state(store, job, "completed"))
    done = store.job(job.id)
    assert (done.step, done.total_steps, done.phase) == (24, 24, "training")
    assert done.final
    assert done.final["type"] == "complete"
    assert not store.holds()
    assert [(each.outcome, each.exit_code) for each in store.attempts(job.id)] == [("complete", 0)]
