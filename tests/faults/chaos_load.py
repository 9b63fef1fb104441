"""Clients that want things of a studio while it is being killed: uploads, fine-tunes, deploys, rescales and deletes, all in the history.

What has a key is sent until there is an answer; what has none is sent once, and stays unknown where no answer came.
"""

import itertools
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import httpx

from events.types import DeploymentKind
from mini_studio.records.deployments import deployment_id
from tests.fakes.running import ROWS
from tests.faults.history import History, Request

MODEL = "tiny-llama"
TWICE, ONCE_WITH_KEY = 0.2, 0.3
"""Shares of the POSTs: sent twice under a key, and once under a key."""
UPLOADS = 0.05
TIMEOUT_S = 15.0
TRY_AGAIN_S = 0.5
DEPLOYERS = 3
"""Clients that serve models, one at a time each: model servers are slow to start."""
DEPLOY_EVERY_S = 6.0


@dataclass(frozen=True)
class Call:
    """One HTTP request, as often as it is sent."""

    kind: str
    method: str
    path: str
    client_code: str
    body: dict[str, Any]
    key: str | None = None
    files: dict[str, Any] | None = None


class Load:
    """`clients` threads that together have `submits` fine-tunes accepted in `seconds`, or later if the studio is slower."""

    def __init__(self, url: str, history: History, seed: str, *, clients: int, submits: int, seconds: float) -> None:
        self.url, self.history, self.seed = url, history, seed
        self.sent = self.acknowledged = self.repeats = self.submitted = 0
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._stop = threading.Event()
        self._each, self._pause_s = submits // clients, seconds * clients / submits
        self._threads = [threading.Thread(target=Client(self, n).run, daemon=True) for n in range(clients)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def over(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """Nothing more is asked for; returns when the last request has its answer."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def send(self, call: Call) -> tuple[Request, Any]:
        """Send once. The request in the history, and what the answer said."""
        with self._lock:
            number = next(self._ids)
        request = Request(f"soak-{number}", call.kind, call.client_code, call.key, body=call.body)
        headers = {"X-Request-ID": request.request_id} | ({"Idempotency-Key": call.key} if call.key else {})
        content: dict[str, Any] = {"files": call.files} if call.files else {"json": call.body}
        if call.method == "DELETE":
            content = {}
        self.history.asked(request)
        said: Any = None
        try:
            answer = httpx.request(
                call.method, self.url + call.path, headers=headers, timeout=TIMEOUT_S, trust_env=False, **content
            )
            said = answer.json()
            request = replace(request, status=answer.status_code)
        except (httpx.HTTPError, ValueError):
            pass  # nobody knows whether it was done
        else:
            if request.acknowledged:
                request.subject = subject(call, said)
            self.history.answered(request)
        with self._lock:
            self.sent += 1
            self.acknowledged += request.acknowledged
        return request, said

    def until_answered(self, call: Call) -> tuple[Request, Any]:
        """Send until the studio has decided; only for what may be repeated."""
        while True:
            request, said = self.send(call)
            if (request.status is not None and request.status < 500) or self._stop.is_set():
                return request, said
            time.sleep(TRY_AGAIN_S)

    def ask(self, call: Call, choice: random.Random) -> Any:
        """As the share of its kind wants: twice with a key, once with one, or without. What it said, if it was accepted."""
        how, key = choice.random(), f"key-{choice.getrandbits(64):x}"
        if how < TWICE:
            keyed = replace(call, key=key)
            with self._lock:
                self.repeats += 1
            if choice.random() < 0.5:
                with ThreadPoolExecutor(2) as pool:
                    first, second = pool.map(self.until_answered, [keyed, keyed])
            else:
                first, second = self.until_answered(keyed), self.until_answered(keyed)
            request, said = first if first[0].acknowledged else second
        elif how < TWICE + ONCE_WITH_KEY:
            request, said = self.until_answered(replace(call, key=key))
        else:
            request, said = self.send(call)
        return said if request.acknowledged else None

    def wait(self, seconds: float) -> bool:
        """False when there is nothing more to be asked for."""
        return not self._stop.wait(seconds)

    def share(self) -> tuple[int, float]:
        """How many fine-tunes one client wants, and how long it pauses between them."""
        return self._each, self._pause_s

    def count_submit(self) -> None:
        with self._lock:
            self.submitted += 1


def subject(call: Call, said: Any) -> str:
    """The dataset, job or deployment that an answer is about."""
    if call.kind == "upload":
        return str(said["dataset_id"])
    if call.kind == "submit":
        return str(said["job"]["id"])
    if call.kind == "remove":
        return str(said["deployment"]["id"])
    weights = call.body.get("fine_tuned_weights_path")
    kind = DeploymentKind.FINE_TUNED if weights else DeploymentKind.BASE
    return deployment_id(call.client_code, kind, MODEL, weights)


class Client:
    """One client and what it has."""

    def __init__(self, load: Load, number: int) -> None:
        self.load, self.code, self.deploys = load, f"client{number}", number < DEPLOYERS
        self.random = random.Random(f"{load.seed}/{number}")
        self.datasets: list[str] = []
        self.jobs: list[str] = []
        self.deployed_at = time.monotonic()

    def run(self) -> None:
        wanted, pause_s = self.load.share()
        due = time.monotonic()
        while len(self.jobs) < wanted and self.load.wait(max(0.0, due - time.monotonic())):
            if not self.datasets or self.random.random() < UPLOADS:
                self.upload()
            elif self.submit():
                due += pause_s
            if self.deploys and time.monotonic() - self.deployed_at > DEPLOY_EVERY_S:
                self.deployed_at = time.monotonic()
                self.serve()

    def upload(self) -> None:
        rows = [*ROWS, {"prompt": self.code, "completion": f"{self.random.getrandbits(64)}"}]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path = f"/fine_tuning/upload-dataset/{self.code}"
        said = self.load.ask(
            Call("upload", "POST", path, self.code, {}, files={"file": ("rows.jsonl", content)}), self.random
        )
        if said:
            self.datasets.append(said["dataset_id"])

    def submit(self) -> bool:
        body = {
            "model": MODEL,
            "client_code": self.code,
            "dataset_filename": self.random.choice(self.datasets),
            "n_epochs": 1,
            "batch_size": 6,
            "seed": self.random.getrandbits(31),
        }
        said = self.load.ask(Call("submit", "POST", "/fine_tuning/submit-finetune", self.code, body), self.random)
        if said:
            self.jobs.append(said["job"]["id"])
            self.load.count_submit()
        return said is not None

    def serve(self) -> None:
        """Deploy something, or change or remove what there is: also what came of a deploy whose answer was never seen."""
        deployments = self.look(f"/inference/deployments?client_code={self.code}&limit=100").get("deployments")
        if deployments is None:
            return
        active = [d for d in deployments if d["status"] not in ("removing", "removed")]
        if not active:
            self.deploy(self.weights() if self.random.random() < 0.6 else None)
        elif len(active) == 1 and active[0]["status"] != "failed" and self.random.random() < 0.4:
            self.deploy(active[0]["weights_path"])
        else:
            name = self.random.choice(active)["name"]
            path = f"/inference/deployments/{name}?client_code={self.code}"
            self.load.until_answered(Call("remove", "DELETE", path, self.code, {"name": name}))

    def deploy(self, weights: str | None) -> None:
        scale = {"gpu_count": 0, "min_replicas": 1, "max_replicas": self.random.randint(1, 8)}
        body = {"client_code": self.code, **scale}
        if weights:
            body |= {"base_model": MODEL, "fine_tuned_weights_path": weights}
            self.load.ask(Call("deploy", "POST", "/inference/deploy/fine_tuned", self.code, body), self.random)
        else:
            body |= {"model_id": MODEL}
            self.load.ask(Call("deploy", "POST", "/inference/deploy/base", self.code, body), self.random)

    def weights(self) -> str | None:
        """Of one of its jobs, if that one has succeeded."""
        if not self.jobs:
            return None
        job = self.look(f"/fine_tuning/jobs/{self.random.choice(self.jobs)}").get("job", {})
        path: str | None = job.get("fine_tuned_weights_path")
        return path

    def look(self, path: str) -> dict[str, Any]:
        """What a GET says; nothing where there is no answer."""
        try:
            said: dict[str, Any] = httpx.get(self.load.url + path, timeout=TIMEOUT_S, trust_env=False).json()
        except (httpx.HTTPError, ValueError):
            return {}
        return said
