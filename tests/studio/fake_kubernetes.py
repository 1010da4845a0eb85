"""A cluster of one node: an API of Jobs and pods, a controller, and pods that are processes.

The shapes are those that Kubernetes publishes (OpenAPI, release 1.37), cut down to the fields that
a program here has to do with; whatever else a manifest has is refused, as by strict validation.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jsonschema

Record = dict[str, Any]

TEXT, WHOLE, TRUTH = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
TEXTS: Record = {"type": "array", "items": TEXT}
NAMED: Record = {"type": "object", "additionalProperties": TEXT}
MOMENT = {"type": "string", "format": "date-time"}
CONDITION_NAMES = ["Suspended", "Complete", "Failed", "FailureTarget", "SuccessCriteriaMet"]


def shape(needed: str = "", **fields: Any) -> Record:
    """Describe an object by all of its fields, and by those that it needs."""
    closed = {"type": "object", "additionalProperties": False, "properties": fields}
    return {**closed, "required": needed.split()}


def several(items: Record) -> Record:
    """Describe a list."""
    return {"type": "array", "items": items}


METADATA = shape(
    name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63},
    namespace=TEXT,
    labels=NAMED,
    annotations=NAMED,
    uid=TEXT,
    resourceVersion=TEXT,
    creationTimestamp=MOMENT,
    deletionTimestamp=MOMENT,
)
CONTAINER = shape(
    "name",
    name=TEXT,
    image=TEXT,
    command=TEXTS,
    args=TEXTS,
    workingDir=TEXT,
    env=several(shape("name", name=TEXT, value=TEXT)),
    envFrom=several(shape(secretRef=shape(name=TEXT, optional=TRUTH), prefix=TEXT)),
    resources=shape(limits=NAMED, requests=NAMED),
    securityContext=shape(
        allowPrivilegeEscalation=TRUTH, privileged=TRUTH, runAsUser=WHOLE, runAsGroup=WHOLE
    ),
    volumeMounts=several(
        shape("name mountPath", name=TEXT, mountPath=TEXT, readOnly=TRUTH, subPath=TEXT)
    ),
)
POD_SPEC = shape(
    "containers",
    containers={**several(CONTAINER), "minItems": 1},
    # With a policy for failures, no other value is accepted.
    restartPolicy={"const": "Never"},
    terminationGracePeriodSeconds=WHOLE,
    automountServiceAccountToken=TRUTH,
    enableServiceLinks=TRUTH,
    securityContext=shape(runAsUser=WHOLE, runAsGroup=WHOLE, fsGroup=WHOLE, runAsNonRoot=TRUTH),
    volumes=several(
        shape(
            "name",
            name=TEXT,
            persistentVolumeClaim=shape("claimName", claimName=TEXT, readOnly=TRUTH),
        )
    ),
)
RULE = shape(
    "action",
    action={"enum": ["FailJob", "FailIndex", "Ignore", "Count"]},
    onExitCodes=shape(
        "operator values",
        containerName=TEXT,
        operator={"enum": ["In", "NotIn"]},
        values={**several(WHOLE), "minItems": 1, "maxItems": 255},
    ),
    onPodConditions=several(shape("type", type=TEXT, status=TEXT)),
)
JOB_CONDITION = shape(
    "type status",
    type={"enum": CONDITION_NAMES},
    status={"enum": ["True", "False", "Unknown"]},
    reason=TEXT,
    message=TEXT,
    lastTransitionTime=MOMENT,
)
JOB = shape(
    "apiVersion kind metadata spec",
    apiVersion={"const": "batch/v1"},
    kind={"const": "Job"},
    metadata=METADATA,
    spec=shape(
        "template",
        suspend=TRUTH,
        backoffLimit=WHOLE,
        parallelism=WHOLE,
        completions=WHOLE,
        activeDeadlineSeconds=WHOLE,
        ttlSecondsAfterFinished=WHOLE,
        podReplacementPolicy=TEXT,
        podFailurePolicy=shape("rules", rules={**several(RULE), "maxItems": 20}),
        template=shape(metadata=METADATA, spec=POD_SPEC),
    ),
    status=shape(
        active=WHOLE,
        ready=WHOLE,
        terminating=WHOLE,
        failed=WHOLE,
        succeeded=WHOLE,
        startTime=MOMENT,
        completionTime=MOMENT,
        conditions=several(JOB_CONDITION),
    ),
)
DELETE_OPTIONS = shape(
    apiVersion=TEXT,
    kind=TEXT,
    gracePeriodSeconds=WHOLE,
    propagationPolicy={"enum": ["Orphan", "Background", "Foreground"]},
)


def check(thing: object, expected: Record) -> None:
    """Refuse what has not the published shape."""
    jsonschema.Draft202012Validator(expected).validate(thing)


def now() -> str:
    """Write the time as the API does."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass
class Pod:
    """A process with the name of a pod."""

    name: str
    job: str
    process: subprocess.Popen[bytes]
    grace_seconds: float
    created: str = field(default_factory=now)
    disrupted: bool = False
    asked_at: float | None = None
    counted: bool = False

    def end(self) -> None:
        """Ask it to end, as the kubelet does."""
        if self.asked_at is None and self.process.poll() is None:
            self.asked_at = time.monotonic()
            self.process.send_signal(signal.SIGTERM)

    def look(self) -> None:
        """End by force what was given its time."""
        late = self.asked_at is not None and time.monotonic() - self.asked_at > self.grace_seconds
        if late and self.process.poll() is None:
            self.process.kill()

    @property
    def code(self) -> int | None:
        """Return the exit code as containers have it; None while it runs."""
        code = self.process.poll()
        return 128 - code if code is not None and code < 0 else code

    def record(self) -> Record:
        """Write it as the API does."""
        conditions = [{"type": "DisruptionTarget", "status": "True"}] if self.disrupted else []
        ended = {
            "terminated": {"exitCode": self.code, "reason": "Error" if self.code else "Completed"}
        }
        state = {"running": {"startedAt": self.created}} if self.code is None else ended
        container = {
            "name": "trainer",
            "image": "image",
            "imageID": "sha256:0",
            "ready": self.code is None,
            "restartCount": 0,
            "state": state,
        }
        phase = {None: "Running", 0: "Succeeded"}.get(self.code, "Failed")
        labels = {"batch.kubernetes.io/job-name": self.job, "job-name": self.job}
        meta = {"name": self.name, "labels": labels, "creationTimestamp": self.created}
        status = {"phase": phase, "conditions": conditions, "containerStatuses": [container]}
        return {"metadata": meta, "spec": {"containers": [{"name": "trainer"}]}, "status": status}


class FakeCluster:
    """What the API server and the controllers know."""

    def __init__(self, grace_seconds: float = 5.0) -> None:
        """Begin with nothing."""
        self.jobs: dict[str, Record] = {}
        self.pods: list[Pod] = []
        self.asked: list[tuple[str, str]] = []
        self.address = ""
        self.grace_seconds, self.lock, self.over = grace_seconds, threading.RLock(), False

    # --- Controllers ---

    def run(self) -> None:
        """Do what controllers do, over and over."""
        while not self.over:
            with self.lock:
                for pod in self.pods:
                    pod.look()
                for name in list(self.jobs):
                    self.look_after(name)
            time.sleep(0.02)

    def look_after(self, name: str) -> None:
        """Bring the pods of a Job to what its spec says, and its status to what its pods are."""
        job, pods = self.jobs[name], [pod for pod in self.pods if pod.job == name]
        for pod in pods:
            if pod.code is not None and not pod.counted:
                pod.counted = True
                self.count(job, pod)
        living = [pod for pod in pods if pod.code is None]
        status = job["status"]
        if self.is_over(job):
            return
        if job["spec"].get("suspend"):
            for pod in living:
                pod.end()
            gone = [pod for pod in pods if pod not in living]  # a suspended Job's pods are deleted
            self.pods = [pod for pod in self.pods if pod not in gone]
            self.set_condition(job, "Suspended", "True", "JobSuspended", "Job suspended")
            status.pop("startTime", None)
        else:
            self.set_condition(job, "Suspended", "False", "JobResumed", "Job resumed")
            status.setdefault("startTime", now())
            if not living:
                living.append(self.start(name, job))
        status["active"] = sum(pod.asked_at is None for pod in living)
        status["terminating"] = len(living) - status["active"]

    def start(self, name: str, job: Record) -> Pod:
        """Start a pod."""
        spec = job["spec"]["template"]["spec"]
        container = spec["containers"][0]
        environment = {each["name"]: each["value"] for each in container.get("env", ())}
        process = subprocess.Popen(
            [expanded(word, environment) for word in container["command"]],
            cwd=container["workingDir"],
            env={"PATH": "/usr/bin:/bin", **environment},
            start_new_session=True,
        )
        pod = Pod(f"{name}-{len(self.pods):05d}", name, process, self.grace_seconds)
        self.pods.append(pod)
        return pod

    def count(self, job: Record, pod: Pod) -> None:
        """Say what the end of a pod means for its Job."""
        status = job["status"]
        if pod.code == 0:
            status["succeeded"] = 1
            self.set_condition(job, "Complete", "True", "CompletionsReached", "Reached 1")
            return
        action = self.action(job, pod)
        if action == "Ignore" or job["spec"].get("suspend"):
            return
        status["failed"] = status.get("failed", 0) + 1
        if action == "FailJob":
            message = f"Container trainer failed with exit code {pod.code}"
            self.set_condition(job, "Failed", "True", "PodFailurePolicy", message)
        elif status["failed"] > job["spec"]["backoffLimit"]:
            self.set_condition(job, "Failed", "True", "BackoffLimitExceeded", "Too many failures")

    def action(self, job: Record, pod: Pod) -> str:
        """Find the first rule that fits the end of a pod."""
        for rule in job["spec"].get("podFailurePolicy", {}).get("rules", ()):
            types = [each["type"] for each in rule.get("onPodConditions", ())]
            if pod.disrupted and "DisruptionTarget" in types:
                return str(rule["action"])
            if codes := rule.get("onExitCodes"):
                inside = pod.code in codes["values"]
                if inside == (codes["operator"] == "In"):
                    return str(rule["action"])
        return "Count"

    def set_condition(self, job: Record, kind: str, status: str, reason: str, message: str) -> None:
        """Write a condition of a Job."""
        others = [each for each in job["status"].get("conditions", ()) if each["type"] != kind]
        made = {"type": kind, "status": status, "reason": reason, "message": message}
        job["status"]["conditions"] = [*others, {**made, "lastTransitionTime": now()}]

    def is_over(self, job: Record) -> bool:
        """Tell whether a Job has ended."""
        found = job["status"].get("conditions", ())
        return any(e["status"] == "True" and e["type"] in ("Complete", "Failed") for e in found)

    def evict(self, name: str) -> None:
        """Take a node away under the pod of a Job."""
        with self.lock:
            for pod in self.pods:
                if pod.job == name and pod.code is None:
                    pod.disrupted = True
                    pod.end()

    def end_all(self) -> None:
        """End everything."""
        self.over = True
        for pod in self.pods:
            pod.process.kill()
            pod.process.wait(30)

    # --- The API ---

    def answer(self, method: str, path: str, kind: str, body: Any) -> tuple[int, Record]:
        """Answer a request."""
        parts = urlsplit(path)
        self.asked.append((method, parts.path))
        pods = re.fullmatch(r"/api/v1/namespaces/default/pods", parts.path)
        jobs = re.fullmatch(r"/apis/batch/v1/namespaces/default/jobs(?:/([\w.-]+))?", parts.path)
        with self.lock:
            if pods and method == "GET":
                return 200, self.list_pods(parse_qs(parts.query).get("labelSelector", [""])[0])
            if jobs and method == "POST" and not jobs[1]:
                return self.create(body)
            if jobs and jobs[1] and jobs[1] not in self.jobs:
                return refusal(404, "NotFound", f'jobs.batch "{jobs[1]}" not found')
            if jobs and method == "GET":
                return 200, self.jobs[jobs[1]]
            if jobs and method == "PATCH":
                return self.patch(jobs[1], kind, body)
            if jobs and method == "DELETE":
                return self.delete(jobs[1], body)
        return refusal(405, "MethodNotAllowed", f"{method} {path}")

    def list_pods(self, selector: str) -> Record:
        """List the pods that a selector names."""
        name, _, value = selector.partition("=")
        found = [pod.record() for pod in self.pods]
        items = [each for each in found if each["metadata"]["labels"].get(name) == value]
        return {"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": items}

    def create(self, body: Record) -> tuple[int, Record]:
        """Take a new Job."""
        check(body, JOB)
        name = body["metadata"]["name"]
        if name in self.jobs:
            return refusal(409, "AlreadyExists", f'jobs.batch "{name}" already exists')
        body["metadata"] |= {"namespace": "default", "uid": name, "creationTimestamp": now()}
        self.jobs[name] = {**body, "status": {}}
        return 201, self.jobs[name]

    def patch(self, name: str, kind: str, body: Record) -> tuple[int, Record]:
        """Change a Job by a merge patch; its template is not to be changed."""
        assert kind == "application/merge-patch+json"
        if "template" in body.get("spec", {}):
            return refusal(422, "Invalid", "spec.template: Invalid value: field is immutable")
        made = merged(self.jobs[name], body)
        check(made, JOB)
        self.jobs[name] = made
        return 200, made

    def delete(self, name: str, body: Record | None) -> tuple[int, Record]:
        """Remove a Job; with it, unless they are orphaned, its pods."""
        check(body or {}, DELETE_OPTIONS)
        del self.jobs[name]
        for pod in self.pods:
            if pod.job == name:
                pod.end()
        return 200, {"apiVersion": "v1", "kind": "Status", "status": "Success"}


def expanded(word: str, environment: Record) -> str:
    """Replace $(NAME) by a variable, and $$ by $, as the kubelet does; the unknown stays."""

    def replace(found: re.Match[str]) -> str:
        if found[0].startswith("$$"):
            return found[0][1:]
        return str(environment.get(found[1], found[0]))

    return re.sub(r"\$\$\([A-Za-z_][\w.-]*\)|\$\(([A-Za-z_][\w.-]*)\)", replace, word)


def merged(thing: Any, patch: Any) -> Any:
    """Apply a merge patch (RFC 7396)."""
    if not isinstance(patch, dict):
        return patch
    made = dict(thing) if isinstance(thing, dict) else {}
    for key, value in patch.items():
        if value is None:
            made.pop(key, None)
        else:
            made[key] = merged(made.get(key), value)
    return made


def refusal(code: int, reason: str, message: str) -> tuple[int, Record]:
    """Say no as the API does."""
    said = {"status": "Failure", "reason": reason, "message": message, "code": code}
    return code, {"apiVersion": "v1", "kind": "Status", "metadata": {}, **said}


def handler_of(cluster: FakeCluster) -> type[BaseHTTPRequestHandler]:
    """Make what speaks HTTP for a cluster."""

    class Handler(BaseHTTPRequestHandler):
        """Passes requests on."""

        def do(self) -> None:
            """Answer one."""
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            kind = self.headers.get("Content-Type", "")
            body = json.loads(content) if content else None
            try:
                code, said = cluster.answer(self.command, self.path, kind, body)
            except jsonschema.ValidationError as error:
                code, said = refusal(422, "Invalid", f"{error.json_path}: {error.message}")
            text = json.dumps(said).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PATCH = do_DELETE = do  # noqa: N815, names of http.server

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002, its name there
            """Say nothing."""

    return Handler


@contextlib.contextmanager
def cluster_at(grace_seconds: float = 5.0) -> Iterator[FakeCluster]:
    """Provide a cluster that answers on a port of this machine."""
    cluster = FakeCluster(grace_seconds)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(cluster))
    for work in (server.serve_forever, cluster.run):
        threading.Thread(target=work, daemon=True).start()
    cluster.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield cluster
    finally:
        server.shutdown()
        server.server_close()
        cluster.end_all()
