"""Kubernetes as an engine: a Job per training, suspended to stop it, and unsuspended to go on.

The data root lies on a volume that the studio and the pods mount at the same path, and both run the
same image. So a pod finds its config there, and writes what it says to where a program of this
machine would. An eviction costs nothing: the next pod goes on, and says so in the same file.
"""

from __future__ import annotations

import contextlib
import json
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from studio import local
from studio.engine import EngineError, Record, Seen, Unreachable

if TYPE_CHECKING:
    from studio.engine import Attempt
    from studio.settings import Settings

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
PATIENCE_SECONDS = 5.0
GRACE_SECONDS = 60  # to save; the trainer needs 8
RETRIES = 20  # after evictions that the cluster does not call so, and lost nodes
KEPT_SECONDS = 86_400  # of a Job that is over, for people to look at
NUMBER = "lora-studio/attempt"
# The attempt may be another one when a pod starts than when its Job was made, which cannot change.
SCRIPT = 'read n <attempt && exec "$@" >>"attempts/$n/stdout.jsonl" 2>>"attempts/$n/stderr.log"'
PASSED_ON = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "OMP_NUM_THREADS")
# First match wins. What the trainer itself calls an error is one again at every try.
FAILURES = {
    "rules": [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [1, 2]}},
    ]
}


@dataclass(frozen=True)
class Options:
    """What pods are made of."""

    image: str  # the studio's own
    claim: str  # the volume claim of the data root; many pods have to be able to write to it
    namespace: str = ""
    gpus: int = 1
    secret: str = ""  # a Secret whose keys become variables, such as HF_TOKEN
    api: str = ""  # where `kubectl proxy` listens, for a studio outside the cluster


class Kubernetes:
    """Runs attempts as Jobs of a cluster. A handle is `JOB/N`, which names the attempt's folder."""

    def __init__(self, settings: Settings, options: Options) -> None:
        """Take what pods are made of."""
        self._root, self._jobs, self._options = settings.root, settings.jobs, options
        self._files = local.Local(settings)
        self._cluster = Cluster(options.api, options.namespace)

    def submit(self, attempt: Attempt) -> str:
        """Make a Job, or let the one that is there go on."""
        name = name_of(attempt.job)
        handle = f"{attempt.job}/{attempt.n}"
        attempt.folder.mkdir(parents=True, exist_ok=True)
        job = self._cluster.job(name)
        if job is None:
            point_to(attempt)
            self._cluster.create(self._manifest(attempt))
        elif number_of(job) == attempt.n:
            pass  # it was asked for before
        elif is_over(job):
            self._cluster.delete(name)
            raise EngineError("The Job of an earlier attempt is being removed.")
        elif not is_suspended(job) or any(map(is_alive, self._cluster.pods(name))):
            raise EngineError("The pod of an earlier attempt is still ending.")
        else:
            point_to(attempt)
            marked = {"annotations": {NUMBER: str(attempt.n)}}
            self._cluster.change(name, {"metadata": marked, "spec": {"suspend": False}})
        return handle

    def observe(self, handle: str) -> Seen:
        """Look at the Job, its pods, and what they have written."""
        folder, n = self._folder(handle), int(handle.rpartition("/")[2])
        name = name_of(handle.partition("/")[0])
        job, pods = self._cluster.job(name), self._cluster.pods(name)
        waits = job and number_of(job) == n and not is_suspended(job) and not is_over(job)
        alive = bool(waits) or any(map(is_alive, pods))
        said = folder / "stdout.jsonl"
        return Seen(
            alive=alive,
            # While it is to go on, the last word of an evicted pod is not that of the attempt.
            terminal=None if alive else local.last_line(said),
            exit_code=None if alive else exit_code(pods),
            silent_for=time.time() - local.changed_at(said),
            ended_at=None if alive else local.changed_at(said),
            failure=why(job) if job and not alive and not said.exists() else "",
            tail="" if alive else local.tail_of(folder / "stderr.log"),
        )

    def stop(self, handle: str, *, force: bool = False) -> None:
        """Suspend the Job, which sends its pod SIGTERM, or remove both."""
        name = name_of(handle.partition("/")[0])
        if force:
            self._cluster.delete(name)
        else:
            self._cluster.change(name, {"spec": {"suspend": True}})

    def events(self, handle: str, after: int = 0) -> Iterator[tuple[int, bytes]]:
        """Read what the pods have written."""
        return self._files.events(handle, after)

    def _folder(self, handle: str) -> Path:
        """Find the folder of an attempt."""
        job, _, n = handle.partition("/")
        return self._jobs / job / "attempts" / n

    def _manifest(self, attempt: Attempt) -> Record:
        """Describe the Job of a training."""
        labels = {"app": "lora-studio"}
        marks = {NUMBER: str(attempt.n)}
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": name_of(attempt.job), "labels": labels, "annotations": marks},
            "spec": {
                "suspend": False,
                "backoffLimit": RETRIES,
                "podFailurePolicy": FAILURES,
                "ttlSecondsAfterFinished": KEPT_SECONDS,
                "template": {"metadata": {"labels": labels}, "spec": self._pod(attempt)},
            },
        }

    def _pod(self, attempt: Attempt) -> Record:
        """Describe a pod: the files it makes belong to whom the studio's own do."""
        return {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {"runAsUser": os.getuid(), "runAsGroup": os.getgid()},
            "containers": [self._container(attempt)],
            "volumes": [
                {"name": "root", "persistentVolumeClaim": {"claimName": self._options.claim}}
            ],
        }

    def _container(self, attempt: Attempt) -> Record:
        """Describe what runs in it."""
        known = attempt.environment
        secret = [{"secretRef": {"name": self._options.secret}}] if self._options.secret else []
        cards = {"nvidia.com/gpu": str(self._options.gpus)} if self._options.gpus else {}
        return {
            "name": "trainer",
            "image": self._options.image,
            "command": ["sh", "-c", SCRIPT, "sh", *map(plain, attempt.command)],
            "workingDir": str(attempt.folder.parent.parent),
            "env": [{"name": name, "value": known[name]} for name in PASSED_ON if name in known],
            "envFrom": secret,
            "resources": {"limits": cards},
            "securityContext": {"allowPrivilegeEscalation": False},
            "volumeMounts": [{"name": "root", "mountPath": str(self._root)}],
        }


def name_of(job_id: str) -> str:
    """Name the Job of a training."""
    return f"lora-{job_id.lower()}"


def plain(word: str) -> str:
    """Keep Kubernetes from replacing what looks like a variable."""
    return word.replace("$(", "$$(")


def point_to(attempt: Attempt) -> None:
    """Say to pods which attempt they belong to, before there are any."""
    folder = attempt.folder.parent.parent
    part = folder / ".attempt.part"
    part.write_text(f"{attempt.n}\n", encoding="ascii")
    part.replace(folder / "attempt")


def number_of(job: Record) -> int | None:
    """Tell which attempt a Job is at."""
    said = (job["metadata"].get("annotations") or {}).get(NUMBER, "")
    return int(said) if said.isdecimal() else None


def is_suspended(job: Record) -> bool:
    """Tell whether a Job is to have no pods."""
    return bool(job["spec"].get("suspend"))


def conditions_of(thing: Record) -> Iterator[Record]:
    """List the conditions that hold."""
    found = (thing.get("status") or {}).get("conditions") or []
    return (each for each in found if each["status"] == "True")


def is_over(job: Record) -> bool:
    """Tell whether a Job will have no more pods."""
    return any(each["type"] in ("Complete", "Failed") for each in conditions_of(job))


def why(job: Record) -> str:
    """Say in the cluster's words how a Job failed."""
    found = (each for each in conditions_of(job) if each["type"] == "Failed")
    return next((f"{each.get('reason')}: {each.get('message')}" for each in found), "")


def is_alive(pod: Record) -> bool:
    """Tell whether a pod may still write, one that is ending included."""
    return (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")


def exit_code(pods: list[Record]) -> int | None:
    """Return the exit code of the youngest pod."""
    if not pods:
        return None
    last = max(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp")))
    for container in (last.get("status") or {}).get("containerStatuses") or []:
        if ended := (container.get("state") or {}).get("terminated"):
            return int(ended["exitCode"])
    return None


class Cluster:
    """The API of a cluster, as a pod in it may use it, or anyone by `kubectl proxy`."""

    def __init__(self, api: str, namespace: str) -> None:
        """Find the API and our place in it."""
        host, port = (os.environ.get(f"KUBERNETES_SERVICE_{x}", "") for x in ("HOST", "PORT"))
        inside = f"https://{f'[{host}]' if ':' in host else host}:{port}" if host else ""
        self._api = (api or inside).rstrip("/")
        if not self._api.startswith(("http://", "https://")):
            raise ValueError("api: expected an address, or to run inside a cluster, got neither")
        self._is_inside = not api
        self._namespace = namespace or read_account("namespace") or "default"

    def job(self, name: str) -> Record | None:
        """Read a Job, if it is there."""
        return self._ask("GET", f"{self._jobs()}/{name}")

    def create(self, manifest: Record) -> None:
        """Make a Job."""
        self._ask("POST", self._jobs(), manifest)

    def change(self, name: str, changes: Record) -> None:
        """Change a Job, if it is there."""
        self._ask("PATCH", f"{self._jobs()}/{name}", changes, "application/merge-patch+json")

    def delete(self, name: str) -> None:
        """Remove a Job and its pods."""
        options = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        self._ask("DELETE", f"{self._jobs()}/{name}", options)

    def pods(self, name: str) -> list[Record]:
        """List the pods of a Job."""
        chosen = quote(f"batch.kubernetes.io/job-name={name}")
        pods = f"/api/v1/namespaces/{self._namespace}/pods?labelSelector={chosen}"
        found: list[Record] = (self._ask("GET", pods) or {}).get("items") or []
        return found

    def _jobs(self) -> str:
        """Return the path of our Jobs."""
        return f"/apis/batch/v1/namespaces/{self._namespace}/jobs"

    def _ask(
        self, method: str, path: str, body: Record | None = None, kind: str = "application/json"
    ) -> Record | None:
        """Send a request; what is not there gives None."""
        headers: dict[str, str] = {"Accept": "application/json", "Content-Type": kind}
        if self._is_inside:  # the token is renewed by the hour
            headers["Authorization"] = f"Bearer {read_account('token')}"
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._api + path, content, headers, method=method)
        context = ssl.create_default_context(cafile=ACCOUNT / "ca.crt") if self._is_inside else None
        try:
            with urllib.request.urlopen(
                request, timeout=PATIENCE_SECONDS, context=context
            ) as answer:
                found: Record = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 404 and method != "POST":
                    return None
                said = message_of(error)
            raise EngineError(f"Kubernetes refuses: {said}") from error
        except (OSError, ValueError, HTTPException) as error:
            raise Unreachable(f"Kubernetes cannot be reached: {error}") from error


def read_account(name: str) -> str:
    """Read what a pod is given to know itself by; empty outside a cluster."""
    with contextlib.suppress(OSError):
        return (ACCOUNT / name).read_text("utf-8").strip()
    return ""


def message_of(error: urllib.error.HTTPError) -> str:
    """Read why a request was refused."""
    try:
        said: Mapping[str, object] = json.load(error)
        return str(said["message"])
    except (OSError, ValueError, LookupError, TypeError, HTTPException):
        return str(error)
