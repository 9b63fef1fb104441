"""Serving on Kubernetes from end to end: deploy over REST, ask through the gateway, and watch what becomes of it.

Control plane, KEDA, Prometheus, studio and model servers are real; a small kubelet of ours stands for a container runtime.
"""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.fakes.log import read_all
from tests.kubernetes.world import SCALE_DOWN_S, World

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

THRESHOLD = 2
QUESTION = {"prompt": "What is the word of Anna? ", "max_tokens": 16, "temperature": 0}


@dataclass
class Deployed:
    """A deployment of this test's own."""

    world: World
    name: str
    id: str
    model: str
    client: str | None

    def ask(self, body: Any = QUESTION, at: str | None = None) -> httpx.Response:
        """Through the API, or through the gateway at that address."""
        headers = {"X-User-ID": self.client} if self.client else {}
        url = f"{at or self.world.studio.url}/inference/infer/{self.model}"
        return httpx.post(url, json=body, headers=headers, timeout=120, trust_env=False)

    def answer(self) -> str:
        response = self.ask()
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    def view(self) -> Any:
        path = f"/inference/deployments/{self.name}?client_code={self.client or ''}"
        return self.world.studio.call("GET", path, 200)["deployment"]

    def scaled_to(self, replicas: int, seconds: float = 120) -> float:
        """Seconds until the deployment's record says so."""
        begun = time.monotonic()
        self.world.studio.until(lambda: self._is(replicas), seconds)
        return time.monotonic() - begun

    def first_answer(self) -> str:
        """What it says once it is ready. Its record and the gateways follow the log each for itself: the record may be ahead."""
        self.scaled_to(1)
        self.world.studio.until(lambda: self.ask().status_code == 200, 10)
        return self.answer()

    def _is(self, replicas: int) -> bool:
        view = self.view()
        return bool(view["status"] == "ready" and view["replicas"] == replicas)

    def told(self) -> list[Any]:
        """What the log says became of it, in order: the replicas of every ready event, and the types of others."""
        events = asyncio.run(read_all(self.world.studio.bootstrap, "mini-studio.deployments"))
        own = [event for event in events if event.key == self.id.encode()]
        types = [dict(event.headers)["ce_type"].decode().split(".")[1] for event in own]
        replicas = [json.loads(event.value).get("replicas") for event in own]
        return [now if type == "ready" else type for now, type in zip(replicas, types, strict=True)]


@contextlib.contextmanager
def deployed(world: World, kind: str, client: str = "", **body: Any) -> Iterator[Deployed]:
    """Deploy, and undeploy at the end: then nothing of it is left in the cluster."""
    answer = deploy(world, kind, client, **body)
    name = answer["deployment"]
    view = world.studio.call("GET", f"/inference/deployments/{name}?client_code={client}", 200)["deployment"]
    assert world.objects(name)
    yield Deployed(world, name, view["id"], answer["model"], client or None)
    world.studio.call("DELETE", f"/inference/deployments/{name}?client_code={client}", 202)
    world.studio.until(lambda: not world.objects(name), 60)


def deploy(world: World, kind: str, client: str = "", **body: Any) -> Any:
    fields = {"client_code": client, "gpu_count": 0, "prometheus_threshold": THRESHOLD, **body}
    return world.studio.call("POST", f"/inference/deploy/{kind}", json=fields)


@dataclass
class Load:
    """So many callers at the same time, each asking again as soon as it was answered."""

    on: Deployed
    callers: int
    max_tokens: int
    statuses: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __enter__(self) -> "Load":
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(self.callers)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _call(self) -> None:
        while not self._over.is_set():
            try:
                response = self.on.ask({**QUESTION, "max_tokens": self.max_tokens})
            except httpx.HTTPError as error:
                self.errors.append(repr(error))
                continue
            self.statuses.append(response.status_code)
            if response.status_code != 200:
                self.errors.append(response.text)


def report(**figures: object) -> None:
    """For who reads the log of `make test-real`."""
    print(json.dumps(figures))


def test_a_model_is_served_restarted_and_scaled(world: World) -> None:
    begun = time.monotonic()
    with deployed(world, "base", model_id="tiny-llama", max_replicas=3) as model:
        assert model.first_answer() == model.answer()
        ready_s = time.monotonic() - begun

        world.kill_server(model.name)
        world.studio.until(lambda: world.running(model.name) == 0, 10)
        killed = time.monotonic()
        world.studio.until(lambda: world.restarts(model.name) == 1 and model.ask().status_code == 200, 60)
        replaced_s = time.monotonic() - killed

        with Load(model, callers=3 * THRESHOLD, max_tokens=200) as load:
            up_s = model.scaled_to(3)
            assert world.running(model.name) == 3
        assert load.errors == []
        down_s = model.scaled_to(1)
        told = model.told()
        assert told[:5] == ["requested", "applied", 1, "applied", 1], "the kill was noticed"
        assert set(told[5:-1]) <= {2, 3} and 3 in told and told[-1] == 1
    report(ready_s=ready_s, replaced_s=replaced_s, up_s=up_s, down_s=down_s, replicas_told=told)


def test_a_model_that_sleeps_is_woken_by_a_request(world: World) -> None:
    with deployed(world, "base", "sleepy", model_id="tiny-llama", min_replicas=0) as model:
        slept_s = model.scaled_to(0)
        world.studio.until(lambda: world.running(model.name) == 0)
        with ThreadPoolExecutor() as callers:
            begun = time.monotonic()
            first = callers.submit(model.ask, at=world.gateway)
            world.studio.until(lambda: any(found.startswith("Pod/") for found in world.objects(model.name)))
            started_s = time.monotonic() - begun
            assert world.running(model.name) == 0
            while_it_wakes = callers.submit(model.ask)
            assert first.result().status_code == while_it_wakes.result().status_code == 200
            woke_s = time.monotonic() - begun
        assert model.view()["replicas"] == 1
        again_s = model.scaled_to(0)
        assert again_s > SCALE_DOWN_S / 2
        told = model.told()
        assert told[:2] == ["requested", "applied"] and told[-3:] == [0, 1, 0]
        assert set(told[2:]) <= {0, 1}, "once ready, it is so all the time"
    report(slept_s=slept_s, started_s=started_s, woke_s=woke_s, slept_again_s=again_s, replicas_told=told)


def test_a_rolling_update_under_load_loses_no_request(world: World) -> None:
    current = world.models / "acme" / "current"
    current.symlink_to("one")
    path = {"base_model": "tiny-llama", "fine_tuned_weights_path": str(current)}
    with deployed(world, "fine_tuned", "acme", **path, prometheus_threshold=100) as model:
        first = model.first_answer()
        current.unlink()
        current.symlink_to("two")
        with Load(model, callers=4, max_tokens=16) as load:
            time.sleep(2)
            before, begun = len(load.statuses), time.monotonic()
            deploy(world, "fine_tuned", "acme", **path, prometheus_threshold=90)  # the same again would change nothing
            world.studio.until(lambda: model.view()["generation"] == 2 and model.view()["status"] == "ready", 90)
            rolled_s = time.monotonic() - begun
            world.studio.until(lambda: len([o for o in world.objects(model.name) if o.startswith("Pod/")]) == 1, 60)
            time.sleep(1)
        assert model.answer() != first
        assert load.errors == []
        assert before > 0 and set(load.statuses) == {200}
    report(rolled_s=rolled_s, requests=len(load.statuses), lost=len(load.errors))
