"""The REST API as a process of its own with real stores, a real log, and a model that answers. Nothing is trained or deployed:
so nothing that is made up costs more than a record."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from tests.fakes.broker import free_port, running_broker, wait_for
from tests.fakes.gateways import publish_routes, shared_route
from tests.fakes.s3_servers import embedded_s3

ADMIN_TOKEN = "a-token-of-the-tests"
MODEL = "tiny-llama"
STUDIO = [sys.executable, "-m", "mini_studio.cli"]
ROWS = b'{"prompt": "a", "completion": "b"}\n'


class Model(BaseHTTPRequestHandler):
    """Answers whatever it is asked."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        answer = b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        pass


@dataclass(frozen=True)
class Fuzzed:
    """The API, and what there is in it, all of client acme."""

    url: str
    dataset: str
    job: str
    deployment: str


@pytest.fixture(scope="session")
def model() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory, model: str) -> Iterator[Fuzzed]:
    folder, port = tmp_path_factory.mktemp("fuzz"), free_port()
    (folder / "s3").mkdir()
    with running_broker() as bootstrap, embedded_s3(folder / "s3") as s3:
        assert s3.secret_key is not None
        settings = {
            "DATA": str(folder / "data"),
            "API__PORT": str(port),
            "API__DEPLOY_WAIT_S": "0",
            "API__ADMIN_TOKEN": ADMIN_TOKEN,
            "KAFKA__BOOTSTRAP": bootstrap,
            "KAFKA__FETCH_WAIT_MS": "20",
            "S3__ENDPOINT": str(s3.endpoint),
            "S3__ACCESS_KEY": str(s3.access_key),
            "S3__SECRET_KEY": s3.secret_key.get_secret_value(),
        }
        environment = {**os.environ, **{f"MINI_STUDIO_{name}": value for name, value in settings.items()}}
        subprocess.run([*STUDIO, "prepare"], check=True, env=environment)
        asyncio.run(publish_routes(bootstrap, [shared_route(MODEL, model)]))
        with (folder / "api.log").open("w") as log:
            process = subprocess.Popen([*STUDIO, "api"], env=environment, stdout=log, stderr=log)
        try:
            wait_for(port, 60)
            yield filled(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()
            process.wait(30)


def filled(url: str) -> Fuzzed:
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        files = {"file": ("rows.jsonl", ROWS)}
        dataset = client.post("/fine_tuning/upload-dataset/acme", files=files).json()["dataset_id"]
        job = {"model": MODEL, "client_code": "acme", "dataset_filename": dataset}
        submitted = client.post("/fine_tuning/submit-finetune", json=job).json()["job"]["id"]
        deployed = client.post("/inference/deploy/base", json={"model_id": MODEL, "client_code": "acme"}).json()
        return Fuzzed(url, dataset, submitted, deployed["deployment"])
