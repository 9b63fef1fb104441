"""The main job on the embedded stack, as a client does it: nothing here is replaced by a fake."""

import asyncio
import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes.log import read_all, write

pytestmark = pytest.mark.timeout(400)

LEARN = {"n_epochs": 60, "batch_size": 6, "learning_rate_multiplier": 0.2, "seed": 1}
QUICK = {"n_epochs": 1, "batch_size": 6}
PROMPT, ANSWER = "What is the word of Anna? ", "apple"


def deploy(studio: Any, client: str, job: Any) -> Any:
    body = {
        "client_code": client,
        "base_model": "tiny-llama",
        "fine_tuned_weights_path": job["fine_tuned_weights_path"],
        "gpu_count": 0,
    }
    return studio.call("POST", "/inference/deploy/fine_tuned", 200, json=body)


def answer(studio: Any, model: str, client: str) -> str:
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    studio.until(lambda: studio.infer(model, body, client).status_code == 200, 90)
    return str(studio.infer(model, body, client).json()["choices"][0]["text"])


@pytest.fixture(scope="session")
def trained(studio: Any) -> Any:
    """Client acme's job on the example rows, succeeded and deployed."""
    dataset = studio.upload("acme")
    job = studio.submit("acme", dataset["dataset_id"], **LEARN)
    assert job["status"] == "queued"
    assert studio.call("GET", "/fine_tuning/jobs/client/acme")["jobs"][0]["id"] == job["id"]
    done = studio.finished(job["id"])
    assert done["status"] == "succeeded", done["error"]
    deployed = deploy(studio, "acme", done)
    assert deployed["status"] == "deployed"
    return {"dataset": dataset, "job": done, "deployment": deployed}


def test_the_fine_tuned_model_answers_from_the_dataset(studio: Any, trained: Any) -> None:
    job = trained["job"]
    assert trained["deployment"]["deployment"] == "vllm-ft-acme-tiny-llama"
    assert answer(studio, "tiny-llama", "acme") == ANSWER
    assert answer(studio, job["fine_tuned_model"], "acme") == ANSWER
    assert job["dataset"]["tokens"] > 0
    assert job["progress"]["step"] == job["progress"]["total_steps"] == 60


def test_two_clients_cannot_see_each_other(studio: Any, trained: Any) -> None:
    job, dataset = trained["job"], trained["dataset"]
    other = {"X-User-ID": "rival"}
    assert studio.infer("tiny-llama", {"prompt": "x"}, "rival").status_code == 404
    assert studio.infer(job["fine_tuned_model"], {"prompt": "x"}, "rival").status_code == 404
    assert studio.call("GET", f"/fine_tuning/jobs/{job['id']}", 404, headers=other)["ok"] is False
    assert studio.call("GET", "/fine_tuning/jobs/client/acme", 404, headers=other)["ok"] is False
    assert studio.call("GET", "/fine_tuning/jobs/client/rival", 200)["jobs"] == []
    for name in (dataset["dataset_id"], dataset["dataset_dfs"], dataset["dataset_s3"]):
        body = {"model": "tiny-llama", "client_code": "rival", "dataset_filename": name}
        assert "no dataset" in studio.call("POST", "/fine_tuning/submit-finetune", 404, json=body)["error"]
    stolen = {
        "client_code": "rival",
        "base_model": "tiny-llama",
        "fine_tuned_weights_path": job["fine_tuned_weights_path"],
    }
    assert studio.call("POST", "/inference/deploy/fine_tuned", 422, json=stolen)["ok"] is False


def test_a_client_cannot_act_as_another(studio: Any, trained: Any) -> None:
    rival, dataset = {"X-User-ID": "rival"}, trained["dataset"]["dataset_id"]
    weights = trained["job"]["fine_tuned_weights_path"]
    row = {"file": ("x.jsonl", b'{"prompt": "a", "completion": "b"}\n')}
    form = {"model": "tiny-llama", "client_code": "acme"}
    for path, options in (
        ("/fine_tuning/upload-dataset/acme", {"files": row}),
        ("/fine_tuning/submit-finetune", {"json": {**form, "dataset_filename": dataset}}),
        ("/fine_tuning/submit-finetune", {"data": form, "files": row}),
        ("/inference/deploy/base", {"json": {"client_code": "acme", "model_id": "tiny-llama"}}),
        (
            "/inference/deploy/fine_tuned",
            {"json": {"client_code": "acme", "base_model": "tiny-llama", "fine_tuned_weights_path": weights}},
        ),
    ):
        assert "no client 'acme'" in studio.call("POST", path, 404, headers=rival, **options)["error"]
    name = trained["deployment"]["deployment"]
    studio.call("DELETE", f"/inference/deployments/{name}", 404, headers=rival)
    studio.call("DELETE", f"/inference/deployments/{name}?client_code=acme", 404, headers=rival)


def test_all_forms_of_naming_a_dataset(studio: Any, trained: Any) -> None:
    dataset = trained["dataset"]
    key = dataset["dataset_s3"].removeprefix("s3://").partition("/")[2]
    for name in (dataset["dataset_s3"], key, dataset["dataset_dfs"]):
        assert studio.submit("acme", name, **QUICK)["dataset"]["id"] == dataset["dataset_id"]
    rows = "".join(json.dumps({"prompt": "a", "completion": "b"}) + "\n" for _ in range(3)).encode()
    for file_field in ("dataset_filename", "file"):
        form = {"model": "tiny-llama", "client_code": "acme", "n_epochs": "1", "batch_size": "3", "lora": "null"}
        sent = studio.call(
            "POST", "/fine_tuning/submit-finetune", 201, data=form, files={file_field: ("x.jsonl", rows)}
        )
        assert sent["job"]["dataset"]["rows"] == 3
    assert studio.finished(sent["job"]["id"])["status"] == "succeeded"


def test_keys_make_a_request_once(studio: Any, trained: Any) -> None:
    headers = {"Idempotency-Key": "k1"}
    body = {"model": "tiny-llama", "client_code": "acme", "dataset_filename": trained["dataset"]["dataset_id"], **QUICK}
    made = [studio.call("POST", "/fine_tuning/submit-finetune", 201, json=body, headers=headers) for _ in range(3)]
    assert len({m["job"]["id"] for m in made}) == 1
    other = studio.call("POST", "/fine_tuning/submit-finetune", 422, json={**body, "n_epochs": 2}, headers=headers)
    assert other["code"] == "idempotency_key_reused"


FAILURES: list[tuple[str, str, dict[str, Any], int, str]] = [
    ("GET", "/nowhere", {}, 404, "/nowhere"),
    ("PUT", "/health", {}, 405, "PUT"),
    ("GET", "/fine_tuning/jobs/nope", {}, 404, "no job"),
    ("GET", "/fine_tuning/jobs/client/a%20b", {}, 422, "client_code"),
    ("GET", "/fine_tuning/jobs/client/acme?limit=0", {}, 422, "limit"),
    ("POST", "/fine_tuning/submit-finetune", {"content": b"{"}, 422, ""),
    ("POST", "/fine_tuning/submit-finetune", {"json": {"client_code": "acme"}}, 422, "model"),
    (
        "POST", "/fine_tuning/submit-finetune",
        {"json": {"model": "none-such", "client_code": "acme", "dataset_filename": "x"}}, 422, "tiny-llama",
    ),
    ("POST", "/fine_tuning/upload-dataset/acme", {"files": {"other": ("x", b"x")}}, 422, "file"),
    ("POST", "/fine_tuning/upload-dataset/acme", {"files": {"file": ("x", b'{"prompt": 1}\n')}}, 422, "line 1"),
    ("POST", "/fine_tuning/upload-dataset/acme", {"files": {"file": ("x", b"")}}, 422, "no rows"),
    ("POST", "/inference/deploy/base", {"json": {"model_id": "../../etc"}}, 422, "model_id"),
    (
        "POST", "/inference/deploy/fine_tuned",
        {"json": {"client_code": "acme", "base_model": "tiny-llama", "fine_tuned_weights_path": "/etc/../etc"}},
        422, "fine_tuned_weights_path",
    ),
    ("POST", "/inference/infer/none", {"json": {}}, 404, "none"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "options", "status", "text"), FAILURES)
def test_every_failure_is_said_in_one_shape(
    studio: Any, method: str, path: str, options: dict[str, Any], status: int, text: str
) -> None:
    body = studio.call(method, path, status, **options)
    assert body["ok"] is False
    assert text in body["error"]


def test_hostile_filenames_harm_nothing(studio: Any) -> None:
    row = b'{"prompt": "a", "completion": "b"}\n'
    for name in ("../../etc/passwd", "x" * 3000, "a\x01b\x7f.jsonl"):
        stored = studio.call("POST", "/fine_tuning/upload-dataset/acme", 201, files={"file": (name, row)})
        assert stored["dataset_dfs"].endswith(f"/{stored['dataset_id']}.jsonl")


def test_a_client_that_hangs_up_leaves_nothing(studio: Any) -> None:
    def stored() -> set[Path]:
        return {path for store in ("dfs", "s3") for path in (studio.data / store).rglob("*") if path.is_file()}

    before = stored()
    head = b'--X\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    request = b"POST /fine_tuning/upload-dataset/acme HTTP/1.1\r\nHost: x\r\nContent-Length: 99000000\r\n"
    with socket.create_connection(("127.0.0.1", studio.port)) as client:
        client.sendall(request + b"Content-Type: multipart/form-data; boundary=X\r\n\r\n" + head)
        for _ in range(100):
            client.sendall(b'{"prompt": "a", "completion": "b"}\n' * 1000)
        studio.until(lambda: stored() - before, 10)
    studio.until(lambda: stored() == before, 10)


def test_a_request_is_followed_through_its_events_and_logs(studio: Any, trained: Any) -> None:
    """As a service sees it that knows nothing of the studio but the topic."""
    sent = studio.call(
        "POST", "/fine_tuning/submit-finetune", 201, headers={"X-Request-ID": "follow-me"},
        json={"model": "tiny-llama", "client_code": "acme", "dataset_filename": trained["dataset"]["dataset_id"], **QUICK},
    )["job"]  # fmt: skip
    studio.finished(sent["id"])
    records = asyncio.run(read_all(studio.bootstrap, "mini-studio.fine-tunes"))
    mine = [{k: v.decode() for k, v in r.headers} for r in records if r.key == sent["id"].encode()]
    assert {event["ce_correlationid"] for event in mine} == {"follow-me"}
    verbs = [event["ce_type"].split(".")[1] for event in mine if event["ce_type"] != "fine_tune.progressed.v1"]
    assert verbs == ["requested", "queued", "started", "succeeded"]
    sequences = [int(event["ce_sequence"]) for event in mine if event["ce_source"].endswith("/training")]
    assert sequences == list(range(1, len(sequences) + 1))
    known = {event["ce_id"] for event in mine}
    assert {event["ce_causationid"] for event in mine[1:]} <= known
    logs = {path.stem for path in (studio.data / "logs").glob("*.log") if "follow-me" in path.read_text()}
    assert {"api", "training"} <= logs


def test_poison_on_the_log_goes_to_the_dead_letters_and_nothing_waits(studio: Any, trained: Any) -> None:
    mark, topic = b"poison", "mini-studio.fine-tunes"
    poison = [(b"\xff not json", [("ce_specversion", b"1.0"), ("ce_type", b"fine_tune.requested.v1")]), (b"{}", [])]
    for partition in range(3):
        asyncio.run(write(studio.bootstrap, topic, poison, key=mark, partition=partition))
    job = studio.submit("acme", trained["dataset"]["dataset_id"], **QUICK)
    assert studio.finished(job["id"])["status"] == "succeeded"
    for consumer in ("jobs", "training"):
        dead = asyncio.run(read_all(studio.bootstrap, f"{topic}.{consumer}.dead"))
        assert sorted(r.value for r in dead if r.key == mark) == sorted([value for value, _ in poison] * 3)
        metrics = studio.get(studio.run_file["health"][consumer].replace("/health", "/metrics")).text
        assert f'mini_studio_dead_letters_total{{consumer="{consumer}",topic="{topic}"}} 6.0' in metrics


def test_every_process_says_how_it_is(studio: Any, trained: Any) -> None:
    for name, url in studio.run_file["health"].items():
        if name in ("broker", "s3", "ray"):
            continue
        assert studio.get(url).status_code == 200, name
        assert "mini_studio_" in studio.get(url.replace("/health", "/metrics")).text, name


def test_answers_stream_through_the_proxy(studio: Any, trained: Any) -> None:
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "stream": True}
    answer(studio, "tiny-llama", "acme")
    lines = [line for line in studio.infer("tiny-llama", body, "acme").text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    pieces = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-1]]
    assert "".join(pieces) == ANSWER
    assert len(pieces) > 1


def test_a_model_that_cannot_be_had_fails_with_what_to_do(studio: Any) -> None:
    answered = httpx.post(
        f"{studio.url}/inference/deploy/base", json={"model_id": "nobody/nothing"}, timeout=60, trust_env=False
    )
    name = "vllm-base-nobody-nothing"
    studio.until(lambda: studio.call("GET", f"/inference/deployments/{name}")["deployment"]["status"] == "failed", 90)
    assert answered.status_code in (200, 202, 500)
    assert studio.call("GET", f"/inference/deployments/{name}")["deployment"]["message"]
    studio.call("DELETE", f"/inference/deployments/{name}", 202)
    studio.until(lambda: studio.call("GET", f"/inference/deployments/{name}")["deployment"]["status"] == "removed", 30)


@pytest.mark.parametrize("consumer", ["datasets", "training", "serving", "jobs", "routes"])
def test_a_killed_consumer_comes_back_and_catches_up(studio: Any, trained: Any, consumer: str) -> None:
    studio.kill("mini_studio.cli", "consume", consumer)
    assert answer(studio, "tiny-llama", "acme") == ANSWER, "inference goes on"
    job = studio.submit("acme", trained["dataset"]["dataset_id"], **QUICK)
    assert studio.finished(job["id"])["status"] == "succeeded"


def test_everything_survives_kill_9_in_the_middle_of_training(studio: Any, trained: Any) -> None:
    job = studio.submit("acme", trained["dataset"]["dataset_id"], **{**LEARN, "n_epochs": 400})
    studio.until(lambda: studio.job(job["id"])["progress"]["step"], 60)
    studio.stop(signal.SIGKILL)
    time.sleep(15)
    assert studio.children() == [], "nothing is left running"
    studio.start()
    assert answer(studio, "tiny-llama", "acme") == ANSWER, "served again without being asked"
    again = studio.finished(job["id"], 200)
    assert again["status"] == "succeeded"
    assert again["attempt"] == 2
    assert studio.job(trained["job"]["id"]) == trained["job"]
