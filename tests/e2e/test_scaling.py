"""Scale to zero, from zero, and between, on the embedded stack with real model servers."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.fakes.broker import free_port
from tests.fakes.log import read_all
from tests.fakes.running import Running

pytestmark = pytest.mark.timeout(400)
NAME = "vllm-base-tiny-llama"


@pytest.fixture(scope="module")
def scaling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    environment = {"MINI_STUDIO_SERVING__SCALE_DOWN_S": "3", "MINI_STUDIO_SERVING__POLL_S": "0.3"}
    running = Running(tmp_path_factory.mktemp("scaling") / "data", free_port(), environment)
    running.start()
    yield running
    running.stop()
    assert running.children() == []


def deployment(studio: Running) -> Any:
    return studio.call("GET", f"/inference/deployments/{NAME}", 200)["deployment"]


def stands(studio: Running, replicas: int, seconds: float = 120) -> None:
    def reached() -> bool:
        seen = deployment(studio)
        return (seen["status"], seen["replicas"]) == ("ready", replicas)

    studio.until(reached, seconds)


def test_it_sleeps_wakes_grows_shrinks_and_sleeps_and_no_request_fails(scaling: Running) -> None:
    body = {"model_id": "tiny-llama", "gpu_count": 0, "min_replicas": 0, "max_replicas": 2, "prometheus_threshold": 2}
    scaling.call("POST", "/inference/deploy/base", json=body)
    stands(scaling, 0)
    scaling.until(lambda: not scaling.children("workloads.serve"), 60)

    woken = scaling.infer("tiny-llama", {"prompt": "hello", "max_tokens": 4})
    assert woken.status_code == 200, woken.text
    assert woken.json()["choices"][0]["text"] is not None
    stands(scaling, 1)

    def ask(_number: int) -> tuple[int, str]:
        asked = {"prompt": "hello", "max_tokens": 200, "stream": True}
        answer = scaling.infer("tiny-llama", asked)
        return answer.status_code, answer.text.rstrip()[-12:]

    with ThreadPoolExecutor(8) as clients:
        answers: list[tuple[int, str]] = []
        while deployment(scaling)["replicas"] != 2:
            answers += clients.map(ask, range(8))
            assert len(answers) < 2000, "it never grew"
        more = clients.map(ask, range(8))
        answers += more
    assert set(answers) == {(200, "data: [DONE]")}
    stands(scaling, 0)

    events = asyncio.run(read_all(scaling.bootstrap, "mini-studio.deployments"))
    told = [json.loads(e.value) for e in events if dict(e.headers)["ce_type"] == b"deployment.ready.v1"]
    replicas = [event["replicas"] for event in told]
    assert replicas[0] == 1 and replicas[-1] == 0
    assert 2 in replicas and replicas.index(0) < replicas.index(2), replicas
    assert all(len(event["endpoints"]) == event["replicas"] for event in told)
