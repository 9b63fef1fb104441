"""The main job on what compose.yaml describes, as far as that goes without containers (see `composed`)."""

import signal
from pathlib import Path

import httpx
import pytest

from tests.fakes.running import Running
from tests.install import compose_file
from tests.install.composed import SERVERS_ADDRESS, composed
from tests.install.test_compose import make_env

pytestmark = pytest.mark.real


@pytest.mark.timeout(600)
def test_the_services_do_the_main_job(tmp_path: Path) -> None:
    assert make_env(tmp_path).returncode == 0
    services = compose_file.services(compose_file.read_env(tmp_path / ".env"))
    ours = [service.name for service in services.values() if service.is_studio and service.name != "prepare"]
    with composed(services, tmp_path) as compose:
        compose.start("prepare")
        assert compose.processes.pop("prepare").wait(60) == 0, (tmp_path / "prepare.log").read_text()
        for name in ours:
            compose.start(name)
        compose.wait(*ours)

        studio = Running(tmp_path, compose.ports["api"])
        assert studio.call("GET", "/fine_tuning/cluster-status", 200)["status"]["available"] is True
        token = services["api"].environment["MINI_STUDIO_API__ADMIN_TOKEN"]
        assert studio.call("GET", "/admin/dead-letters", 401)["ok"] is False
        studio.call("GET", "/admin/dead-letters", 200, headers={"authorization": f"Bearer {token}"})

        dataset = studio.upload("acme")["dataset_id"]
        job = studio.submit("acme", dataset, n_epochs=60, batch_size=4, learning_rate_multiplier=0.2)
        done = studio.finished(job["id"])
        assert done["status"] == "succeeded", done
        body = {
            "client_code": "acme",
            "base_model": "tiny-llama",
            "fine_tuned_weights_path": done["fine_tuned_weights_path"],
        }
        studio.call("POST", "/inference/deploy/fine_tuned", 200, json=body)

        def answer(name: str) -> str:
            asked = {"prompt": "What is the word of Anna? ", "max_tokens": 8, "temperature": 0}
            response = Running(tmp_path, compose.ports[name]).infer("tiny-llama", asked, "acme")
            return str(response.json()["choices"][0]["text"]) if response.is_success else f"{response.status_code}"

        for name in ("api", "gateway"):
            Running.until(lambda name=name: answer(name) == "apple", 60)
        ((host, port),) = compose.children_listen("serving")
        assert host == SERVERS_ADDRESS

        # as Docker does when a container ends: its model servers have ended with it
        compose.kill("serving")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://{host}:{port}/health", trust_env=False)
        compose.start("serving")
        Running.until(lambda: answer("gateway") == "apple", 60)

        # uvicorn raises the signal again once it is done
        served = dict.fromkeys(("api", "gateway"), -signal.SIGTERM)
        assert compose.stop() == dict.fromkeys(ours, 0) | served
