"""What follows from what is seen: every state, every desire, everything that can be seen."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from studio.engine import Record, Seen
from studio.reconcile import Action, Ask, Finish, Kill, Pace, Requeue, Submit, Wait, decide
from studio.store import AttemptRow, Job, utc

NOW = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)
PACE = Pace()


def ago(seconds: float) -> str:
    """Write the time so many seconds before the present of these tests."""
    return utc(NOW - timedelta(seconds=seconds))


COMPLETE = {"type": "complete"}
INTERRUPTED = {"type": "interrupted", "path": "/output/state/step_8"}
ERROR: Record = {
    "type": "error",
    "code": "out_of_memory",
    "message": "No.",
    "hint": "",
    "problems": [],
}
LEFT_EARLIER = NOW.timestamp() - 100

# What is seen: what follows for (running, run), (running, stop), (stopping, any).
TABLE: dict[str, tuple[Seen | None, str, str, str]] = {
    "not confirmed": (None, "Submit", "Submit", "Submit"),
    "alive": (Seen(alive=True), "Wait", "Ask", "Ask"),
    "alive for long after its last line": (
        *(Seen(alive=True, terminal=COMPLETE, silent_for=31), "Kill", "Kill", "Kill"),
    ),
    "alive just after its last line": (
        *(Seen(alive=True, terminal=COMPLETE, silent_for=29), "Wait", "Ask", "Ask"),
    ),
    "complete": (Seen(alive=False, terminal=COMPLETE), "completed", "completed", "completed"),
    "error": (Seen(alive=False, terminal=ERROR), "failed", "failed", "failed"),
    "interrupted": (Seen(alive=False, terminal=INTERRUPTED), "stopped", "stopped", "stopped"),
    "interrupted as the service left": (
        *(Seen(alive=False, terminal=INTERRUPTED, ended_at=LEFT_EARLIER + 5),),
        *("Requeue", "stopped", "stopped"),
    ),
    "interrupted long after the service left": (
        *(Seen(alive=False, terminal=INTERRUPTED, ended_at=LEFT_EARLIER + 60),),
        *("stopped", "stopped", "stopped"),
    ),
    "interrupted before a reboot": (
        *(Seen(alive=False, terminal=INTERRUPTED, same_boot=False),),
        *("Requeue", "stopped", "stopped"),
    ),
    "gone": (Seen(alive=False, exit_code=137, signal=9), "Requeue", "stopped", "stopped"),
    "gone with a reboot": (Seen(alive=False, same_boot=False), "Requeue", "stopped", "stopped"),
    "never started": (Seen(alive=False, failure="no such file"), "failed", "stopped", "stopped"),
}


def job_in(state: str, desired: str = "run", **options: object) -> Job:
    """Make a job in a state."""
    job = Job("J", "train", "A run", {}, state=state, desired=desired, queued_at=ago(1000))
    return Job(**{**vars(job), **options})


def attempt(n: int = 1, **options: object) -> AttemptRow:
    """Make an attempt that began after the job was queued."""
    row = AttemptRow("J", n, f"J/{n}", started_at=ago(900 - n), left_at=None)
    return AttemptRow(**{**vars(row), **options})


def name_of(action: Action) -> str:
    """Name an action, or the state that it ends in."""
    return action.state if isinstance(action, Finish) else type(action).__name__


@pytest.mark.parametrize("seen", TABLE)
@pytest.mark.parametrize("desired", ["run", "hold", "stop"])
@pytest.mark.parametrize("state", ["running", "stopping"])
def test_what_follows_while_an_attempt_is_under_way(state: str, desired: str, seen: str) -> None:
    """Each state, desire and sight has one consequence."""
    sight, *expected = TABLE[seen]
    job = job_in(state, desired, stopping_at=ago(1) if state == "stopping" else None)
    left = datetime.fromtimestamp(LEFT_EARLIER, UTC)
    tries = [attempt(left_at=utc(left) if "left" in seen else None)]
    column = 2 if state == "stopping" else int(desired == "stop")
    assert name_of(decide(job, tries, sight, NOW, PACE)) == expected[column]


@pytest.mark.parametrize("tried", [0, 1])
@pytest.mark.parametrize("desired", ["run", "hold", "stop"])
def test_what_waits_waits_until_it_is_unwanted(desired: str, tried: int) -> None:
    """A queued job that is to stop was cancelled, or stopped if it had begun."""
    action = decide(job_in("queued", desired), [attempt()] * tried, None, NOW, PACE)
    expected = ["cancelled", "stopped"][tried] if desired == "stop" else "Wait"
    assert name_of(action) == expected


@pytest.mark.parametrize(
    ("age", "follows"), [(0, Ask()), (19.9, Ask()), (20, Kill()), (900, Kill())]
)
def test_who_does_not_end_in_time_is_ended(age: float, follows: Action) -> None:
    """Twenty seconds after it was asked, force is used."""
    job = job_in("stopping", "stop", stopping_at=ago(age))
    assert decide(job, [attempt()], Seen(alive=True), NOW, PACE) == follows


GONE = Seen(alive=False, exit_code=137, signal=9, tail="Killed")


def after(*tries: AttemptRow) -> Action:
    """Decide after these attempts, of which the last one has vanished as well."""
    return decide(job_in("running"), tries, GONE, NOW, PACE)


def vanished(n: int, last_step: int | None = None, outcome: str | None = "vanished") -> AttemptRow:
    """Make an attempt that came so far."""
    return attempt(n, outcome=outcome, first_step=0, last_step=last_step)


def test_pauses_grow_and_the_third_fruitless_attempt_is_the_last() -> None:
    """5 and 30 seconds, then the job has failed, with the end of its log."""
    assert after(vanished(1)) == Requeue("vanished", 5)
    assert after(vanished(1), vanished(2)) == Requeue("vanished", 30)
    action = after(vanished(1), vanished(2), vanished(3))
    assert isinstance(action, Finish)
    assert action.error
    assert (action.state, action.error["code"]) == ("failed", "process_vanished")
    assert action.error["message"].startswith("The process was ended by SIGKILL")
    assert action.error["tail"] == "Killed"


def test_who_comes_further_each_time_is_never_given_up() -> None:
    """Progress is what counts, not the number of attempts."""
    tries = [vanished(n, last_step=10 * n) for n in range(1, 9)]
    assert after(*tries) == Requeue("vanished", 120)


def test_the_same_step_again_is_no_progress() -> None:
    """Three attempts after the one that came furthest, it is over."""
    tries = [vanished(1, 50), vanished(2, 50), vanished(3, 40)]
    assert after(*tries) == Requeue("vanished", 120)
    assert name_of(after(*tries, vanished(4, 50))) == "failed"


def test_a_reboot_in_between_is_nobodys_fault() -> None:
    """It neither counts nor forgives."""
    tries = [vanished(1), vanished(2, outcome="rebooted"), vanished(3)]
    assert after(*tries) == Requeue("vanished", 30)


def test_a_user_who_resumes_gives_new_chances() -> None:
    """Attempts from before the job was queued again do not count."""
    old = [attempt(n, started_at=ago(2000), outcome="vanished") for n in (1, 2, 3)]
    assert after(*old, vanished(4)) == Requeue("vanished", 5)


def test_a_failure_is_told_in_the_programs_own_words() -> None:
    """Code, message, hint and problems are taken over."""
    action = decide(job_in("running"), [attempt()], Seen(alive=False, terminal=ERROR), NOW, PACE)
    assert isinstance(action, Finish)
    assert action.error == {name: ERROR[name] for name in ("code", "message", "hint", "problems")}


def test_actions_without_content_are_equal() -> None:
    """Nothing but the decision is in them."""
    assert (Wait(), Submit(), Ask()) == (Wait(), Submit(), Ask())
