"""Kubernetes as an engine, against a cluster of one node whose pods are processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jsonschema
import pytest
from fake_kubernetes import JOB, FakeCluster, check, cluster_at, expanded
from studio_ground import CPUS, QUICK, enqueue, in_state, rounds_until, wait_until, write_command

from studio import kubernetes
from studio.engine import Attempt, EngineError, Seen, Unreachable
from studio.engines import further
from studio.kubernetes import Kubernetes, Options, name_of
from studio.local import Local
from studio.reconcile import Reconciler

if TYPE_CHECKING:
    from pathlib import Path

    from studio.engine import Engine
    from studio.settings import Settings
    from studio.store import Job, Store


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    """Provide a cluster."""
    with cluster_at() as made:
        yield made


@pytest.fixture
def engine(settings: Settings, cluster: FakeCluster) -> Kubernetes:
    """Provide the engine."""
    return Kubernetes(settings, Options("image", "studio", api=cluster.address, gpus=0))


@pytest.fixture
def reconciler(settings: Settings, store: Store, engine: Kubernetes) -> Reconciler:
    """Provide a reconciler that knows the cluster."""
    engines: dict[str, Engine] = {"local": Local(settings), "kubernetes": engine}
    return Reconciler(settings, store, engines, CPUS, QUICK)


def send(
    settings: Settings, store: Store, *switches: object, steps: int = 24, **config: object
) -> Job:
    """Queue a replay for the cluster."""
    return enqueue(settings, store, *switches, steps=steps, config=config, engine="kubernetes")


def lines(settings: Settings, job: Job, n: int = 1) -> list[dict[str, object]]:
    """Read what an attempt has said."""
    path = settings.job(job.id) / "attempts" / str(n) / "stdout.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def until_step(reconciler: Reconciler, store: Store, job: Job, step: int) -> None:
    """Make rounds until a job has come so far."""
    rounds_until(reconciler, lambda: (store.job(job.id).step or 0) >= step, 60)


def test_a_training_runs_as_a_job(
    settings: Settings, store: Store, reconciler: Reconciler, cluster: FakeCluster
) -> None:
    """It is complete, its lines and files are here, and the Job is there to be looked at."""
    job = send(settings, store)
    rounds_until(reconciler, in_state(store, job, "completed"))
    assert lines(settings, job)[-1]["type"] == "complete"
    assert (settings.job(job.id) / "output" / "lora_final.safetensors").is_file()
    made = cluster.jobs[name_of(job.id)]
    assert cluster.is_over(made)
    assert made["spec"]["ttlSecondsAfterFinished"] > 3600


def test_stopping_suspends_and_going_on_unsuspends(
    settings: Settings, store: Store, reconciler: Reconciler, cluster: FakeCluster
) -> None:
    """The Job stays the same, the pod saves, and the end has the bytes of an unstopped run."""
    job, alone = send(settings, store, steps=60), enqueue(settings, store, steps=60)
    until_step(reconciler, store, job, 5)
    store.request_stop(job.id)
    rounds_until(reconciler, in_state(store, job, "stopped"))
    made = cluster.jobs[name_of(job.id)]
    assert (made["spec"]["suspend"], made["status"]["active"]) == (True, 0)
    assert lines(settings, job)[-1]["type"] == "interrupted"
    store.resume(job.id)
    rounds_until(reconciler, in_state(store, job, "completed"))
    assert cluster.jobs[name_of(job.id)]["metadata"]["uid"] == made["metadata"]["uid"]
    assert lines(settings, job, 2)[0]["resumed_step"] == lines(settings, job)[-1]["step"]
    rounds_until(reconciler, in_state(store, alone, "completed"))
    final = "output/lora_final.safetensors"
    assert (settings.job(job.id) / final).read_bytes() == (
        settings.job(alone.id) / final
    ).read_bytes()


def test_an_eviction_is_no_end(
    settings: Settings, store: Store, reconciler: Reconciler, cluster: FakeCluster
) -> None:
    """The next pod goes on in the same attempt, and it is not counted as a failure."""
    job = send(settings, store, steps=60)
    until_step(reconciler, store, job, 5)
    cluster.evict(name_of(job.id))
    rounds_until(reconciler, in_state(store, job, "completed"))
    said = [line["type"] for line in lines(settings, job)]
    assert said.count("start") == 2
    assert said.count("interrupted") == 1
    assert len(store.attempts(job.id)) == 1
    assert "failed" not in cluster.jobs[name_of(job.id)]["status"]


def test_a_killed_pod_is_tried_again_by_the_cluster(
    settings: Settings, store: Store, reconciler: Reconciler, cluster: FakeCluster
) -> None:
    """An exit code of 137 counts and retries; the training goes on from its last checkpoint."""
    job = send(settings, store, "--crash-after", 13, checkpoint_steps=4)
    rounds_until(reconciler, in_state(store, job, "completed"))
    assert cluster.jobs[name_of(job.id)]["status"]["failed"] == 1
    assert [line["type"] for line in lines(settings, job)].count("start") == 2


def test_an_error_of_the_trainer_is_final(
    settings: Settings, store: Store, reconciler: Reconciler, cluster: FakeCluster
) -> None:
    """Exit code 1 fails the Job at once: it would be one again."""
    job = send(settings, store, "--error-at", 5)
    rounds_until(reconciler, in_state(store, job, "failed"))
    made = cluster.jobs[name_of(job.id)]
    reasons = [each["reason"] for each in made["status"]["conditions"]]
    assert "PodFailurePolicy" in reasons
    error = store.job(job.id).error
    assert error
    assert error["code"] == "out_of_memory"
    store.resume(job.id)
    rounds_until(reconciler, lambda: len(store.attempts(job.id)) == 2)
    rounds_until(reconciler, in_state(store, job, "failed"))
    assert [method for method, _ in cluster.asked].count("POST") == 2
    assert [method for method, _ in cluster.asked].count("DELETE") == 1


def test_a_pod_that_does_not_stop_is_removed(
    settings: Settings, store: Store, engine: Kubernetes
) -> None:
    """By force, after the time that a stop may take."""
    with cluster_at(grace_seconds=2.5) as cluster:
        options = Options("image", "studio", api=cluster.address, gpus=0)
        engines = {"kubernetes": Kubernetes(settings, options)}
        reconciler = Reconciler(settings, store, engines, CPUS, QUICK)
        job = send(settings, store, "--ignore-stop", steps=1_000_000)
        until_step(reconciler, store, job, 5)
        store.request_stop(job.id)
        rounds_until(reconciler, in_state(store, job, "stopped"), 60)
        assert name_of(job.id) not in cluster.jobs


def test_submitting_twice_makes_one_job(
    settings: Settings, store: Store, engine: Kubernetes, cluster: FakeCluster
) -> None:
    """As after a crash between the Job and the note of it."""
    job = send(settings, store, steps=200)
    attempt = attempt_of(settings, job)
    assert engine.submit(attempt) == engine.submit(attempt) == f"{job.id}/1"
    assert [method for method, _ in cluster.asked].count("POST") == 1


def attempt_of(settings: Settings, job: Job, n: int = 1) -> Attempt:
    """Describe an attempt."""
    folder = settings.job(job.id)
    argv = json.loads((folder / "command.json").read_bytes())["argv"]
    environment = {"HF_TOKEN": "hf_abc", "HF_HOME": "/cache"}
    return Attempt(job.id, n, tuple(argv), environment, folder / f"attempts/{n}", folder / "output")


def test_a_new_attempt_waits_for_the_pod_of_the_last(
    settings: Settings, store: Store, engine: Kubernetes, cluster: FakeCluster
) -> None:
    """Two trainers never write into one folder."""
    job = send(settings, store, "--ignore-stop", steps=1_000_000)
    engine.submit(attempt_of(settings, job))
    wait_for_a_word(settings, job)
    engine.stop(f"{job.id}/1")
    with pytest.raises(EngineError, match="still ending"):
        engine.submit(attempt_of(settings, job, 2))
    assert engine.observe(f"{job.id}/1").alive


def wait_for_a_word(settings: Settings, job: Job) -> None:
    """Wait until a pod has said something."""
    path = settings.job(job.id) / "attempts/1/stdout.jsonl"
    wait_until(lambda: path.exists() and path.stat().st_size > 0)


def test_a_pod_gets_no_secret_of_the_studio(
    settings: Settings, store: Store, engine: Kubernetes, cluster: FakeCluster
) -> None:
    """Tokens do not stand in a manifest, and the pod may not speak with the cluster."""
    job = send(settings, store)
    engine.submit(attempt_of(settings, job))
    text = json.dumps(cluster.jobs[name_of(job.id)])
    assert "hf_abc" not in text
    assert settings.token not in text
    pod = cluster.jobs[name_of(job.id)]["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False
    assert {"name": "HF_HOME", "value": "/cache"} in pod["containers"][0]["env"]


def test_cards_and_secrets_are_asked_for(
    settings: Settings, store: Store, cluster: FakeCluster
) -> None:
    """As engines.json says."""
    said = {"image": "i", "claim": "c", "gpus": 2, "secret": "hf", "api": cluster.address}
    (settings.root / "engines.json").write_text(json.dumps({"kubernetes": said}))
    engine = further(settings)["kubernetes"]
    job = send(settings, store)
    engine.submit(attempt_of(settings, job))
    container = cluster.jobs[name_of(job.id)]["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "2"}}
    assert container["envFrom"] == [{"secretRef": {"name": "hf"}}]


def test_words_of_a_command_stay_what_they_are(
    settings: Settings, store: Store, reconciler: Reconciler, tmp_path: Path
) -> None:
    """What looks like a variable of Kubernetes or of a shell is neither."""
    words = ["$(HOME)", "$$(HOME)", "$HOME", "`id`", "; rm -rf", "a\nb", '"', "-c"]
    program = "import json, sys; print(json.dumps({'words': sys.argv[1:]}))"
    job = send(settings, store)
    write_command(settings, job.id, sys.executable, "-c", program, *words)
    path = settings.job(job.id) / "attempts" / "1" / "stdout.jsonl"
    rounds_until(reconciler, lambda: path.exists() and path.read_bytes().endswith(b"\n"))
    assert lines(settings, job)[0]["words"] == words
    assert expanded("$(A) $(B) $$(A)", {"A": "1"}) == "1 $(B) $(A)"


def test_a_cluster_that_does_not_answer_is_waited_for(settings: Settings, store: Store) -> None:
    """The job says so."""
    engines = {"kubernetes": Kubernetes(settings, Options("i", "c", api="http://127.0.0.1:9"))}
    reconciler = Reconciler(settings, store, engines, CPUS, QUICK)
    job = send(settings, store)
    rounds_until(reconciler, lambda: "cannot be reached" in (store.job(job.id).phase or ""))
    assert store.job(job.id).state == "running"


class Lost:
    """An engine whose machine is gone: it takes long to say nothing."""

    def __init__(self) -> None:
        """Count how often it is asked."""
        self.asked = 0

    def submit(self, _: Attempt) -> str:
        """Answer nothing."""
        self.asked += 1
        raise Unreachable("It cannot be reached.")

    def observe(self, _: str) -> Seen:
        """Answer nothing."""
        self.asked += 1
        raise Unreachable("It cannot be reached.")

    def stop(self, handle: str, *, force: bool = False) -> None:
        """Never come to be asked."""

    def events(self, _: str, __: int = 0, /) -> Iterator[tuple[int, bytes]]:
        """Never come to be asked."""
        return iter(())


def test_an_engine_that_is_gone_is_asked_once_in_a_round(settings: Settings, store: Store) -> None:
    """Whatever waits for it, new jobs and old ones: others are not held up by each of them."""
    engine = Lost()
    reconciler = Reconciler(settings, store, {"kubernetes": engine}, CPUS, QUICK)
    jobs = [send(settings, store) for _ in range(3)]
    reconciler.make_round()
    assert engine.asked == 1
    store.confirm(jobs[0].id, 1, f"{jobs[0].id}/1")
    reconciler.make_round()
    assert engine.asked == 2
    assert {store.job(job.id).phase for job in jobs} == {"It cannot be reached."}


def test_a_job_ends_without_an_engine_that_stays_away(settings: Settings, store: Store) -> None:
    """In the time that saving may take; it says that nobody knows whether it still runs."""
    reconciler = Reconciler(settings, store, {"kubernetes": Lost()}, CPUS, QUICK)
    job = send(settings, store)
    reconciler.make_round()
    store.confirm(job.id, 1, f"{job.id}/1")
    store.request_stop(job.id)
    reconciler.make_round()
    assert store.job(job.id).state == "running"
    rounds_until(reconciler, in_state(store, job, "stopped"))
    error = store.job(job.id).error
    assert error
    assert error["message"] == "It cannot be reached. It may still run there."
    assert store.attempts(job.id)[0].outcome == "out_of_reach"


def test_what_the_cluster_refuses_is_told(
    settings: Settings,
    store: Store,
    engine: Kubernetes,
    cluster: FakeCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In its own words."""
    monkeypatch.setattr(kubernetes, "RETRIES", "many")
    job = send(settings, store)
    with pytest.raises(EngineError, match=r"refuses: .*backoffLimit: 'many' is not of type"):
        engine.submit(attempt_of(settings, job))


def test_outside_a_cluster_an_address_is_needed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside, pods are told where the API is."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ValueError, match="inside a cluster"):
        Kubernetes(settings, Options("i", "c"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    assert Kubernetes(settings, Options("i", "c"))._cluster._api == "https://[fd00::1]:443"


@pytest.mark.parametrize(
    ("path", "value"),
    [("spec.suspended", True), ("spec.template.spec.restartPolicy", "Always"), ("kind", "CronJob")],
)
def test_the_cluster_refuses_other_shapes(
    settings: Settings, store: Store, engine: Kubernetes, path: str, value: object
) -> None:
    """A test against a cluster that takes everything would prove nothing."""
    manifest = engine._manifest(attempt_of(settings, send(settings, store)))
    check(manifest, JOB)
    *way, last = path.split(".")
    place = manifest
    for name in way:
        place = place[name]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        check(manifest, JOB)
