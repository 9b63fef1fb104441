"""Settings from the environment: what is misspelt, what is wrong, and what is not fit for production."""

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from mini_studio import maintenance, production, variables
from mini_studio.settings import Settings
from tests.fakes.broker import free_port
from tests.fakes.waiting import until

SECRET = "3f9c5f0b8c2d4e6f8a1b"
FIT: dict[str, Any] = {
    "production": True,
    "api": {"host": "0.0.0.0", "admin_token": SECRET},  # noqa: S104
    "kafka": {
        "bootstrap": "kafka-0.kafka.mini-studio.svc:9092,kafka-1.kafka.mini-studio.svc:9092",
        "idempotent": True,
        "security": "sasl_plaintext",
        "username": "studio",
        "password": SECRET,
    },
    "records": {"mongo_url": f"mongodb://studio:{SECRET}@mongo-0:27017,mongo-1:27017/?replicaSet=rs0"},
    "s3": {"endpoint": "http://minio:9000", "access_key": "studio", "secret_key": SECRET},
    "training": {"ray_address": "http://ray-head:8265", "ray_token": SECRET},
    "serving": {"driver": "kubernetes"},
}
PROCESSES = ("api", "gateway", "consumer:serving", "consumer:training+jobs", "relay", "prepare")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for name in [name for name in os.environ if name.startswith("MINI_STUDIO_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MINI_STUDIO_DATA", str(tmp_path))


def settings(**changes: dict[str, Any]) -> Settings:
    """Fit for production but for the changes, by section."""
    merged = {name: FIT[name] | changes[name] for name in changes}
    return Settings.model_validate(FIT | merged)


def test_lists_and_tables_are_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_STUDIO_SERVING__KUBERNETES__NODE_SELECTOR", '{"pool": "gpu"}')
    monkeypatch.setenv("MINI_STUDIO_SERVING__KUBERNETES__TOLERATIONS", '[{"key": "gpu", "operator": "Exists"}]')
    monkeypatch.setenv("MINI_STUDIO_SERVING__KUBERNETES__HUB_EGRESS", '["0.0.0.0/0"]')
    found = Settings().serving.kubernetes
    assert (found.node_selector, found.hub_egress) == ({"pool": "gpu"}, ["0.0.0.0/0"])
    assert found.tolerations == [{"key": "gpu", "operator": "Exists"}]
    assert found.namespace == "mini-studio-models", "the others keep their defaults"


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("MINI_STUDIO_KAFKA__BOOTSTRAPS", "x", "MINI_STUDIO_KAFKA__BOOTSTRAP"),
        ("MINI_STUDIO_API_PORT", "8080", "MINI_STUDIO_API__PORT"),
        ("MINI_STUDIO_S3_ENDPOINT", "http://minio:9000", "MINI_STUDIO_S3__ENDPOINT"),
    ],
)
def test_a_misspelt_variable_is_told(name: str, value: str, meant: str) -> None:
    assert list(variables.unknown({name: value})) == [(name, meant)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MINI_STUDIO_API__PORT", "8080"),
        ("mini_studio_api__port", "8080"),
        ("MINI_STUDIO_S3", '{"bucket": "b"}'),
        ("MINI_STUDIO_SERVING__KUBERNETES__NODE_SELECTOR__POOL", "gpu"),
        ("MINI_STUDIO_HEALTH_PORT", "9000"),
        ("MINI_STUDIO_TEST_REAL", "real"),
        # what Kubernetes tells the pods of a namespace of a Service `mini-studio-api`
        ("MINI_STUDIO_API_SERVICE_HOST", "10.0.0.1"),
        ("MINI_STUDIO_API_SERVICE_PORT_HTTP", "8000"),
        ("MINI_STUDIO_API_PORT", "tcp://10.0.0.1:8000"),
        ("MINI_STUDIO_API_PORT_8000_TCP_ADDR", "10.0.0.1"),
        ("PATH", "/bin"),
    ],
)
def test_others_are_not(name: str, value: str) -> None:
    assert list(variables.unknown({name: value})) == []


def test_a_command_tells_of_both() -> None:
    command = [sys.executable, "-m", "mini_studio.cli", "relay"]
    wrong = {"MINI_STUDIO_KAFKA__PARTITION": "6", "MINI_STUDIO_PRODUCTION": "true"}
    done = subprocess.run(command, env=os.environ | wrong, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "MINI_STUDIO_KAFKA__PARTITIONS" in done.stderr, "what was meant"
    assert "MINI_STUDIO_KAFKA__IDEMPOTENT is false" in done.stderr
    assert "MINI_STUDIO_RECORDS__MONGO_URL is not set" in done.stderr


def test_a_wrong_value_names_its_variable() -> None:
    command = [sys.executable, "-m", "mini_studio.cli", "prepare"]
    wrong = {"MINI_STUDIO_API__PORT": "http", "MINI_STUDIO_KAFKA__SECURITY": "sasl_ssl"}
    done = subprocess.run(command, env=os.environ | wrong, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "error: MINI_STUDIO_API__PORT: " in done.stderr
    assert "error: MINI_STUDIO_KAFKA: " in done.stderr
    assert "needs a username and a password" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_username_that_nobody_sends_is_refused() -> None:
    with pytest.raises(ValidationError, match="use sasl_ssl or sasl_plaintext"):
        settings(kafka={"security": "ssl"})


@pytest.mark.parametrize("process", PROCESSES)
def test_what_is_fit_for_production_starts(process: str) -> None:
    production.check(settings(), process)


@pytest.mark.parametrize(
    ("process", "changes", "setting"),
    [
        ("api", {"api": {"admin_token": None}}, "API__ADMIN_TOKEN"),
        ("api", {"api": {"admin_token": "short"}}, "API__ADMIN_TOKEN"),
        ("api", {"api": {"keys": {"acme": hashlib.sha256(b"changeme").hexdigest()}}}, "API__KEYS"),
        ("relay", {"kafka": {"refill": True}}, "KAFKA__REFILL"),
        ("relay", {"kafka": {"idempotent": False}}, "KAFKA__IDEMPOTENT"),
        ("gateway", {"kafka": {"bootstrap": "kafka.example.com:9092"}}, "KAFKA__SECURITY"),
        ("gateway", {"kafka": {"password": "password-of-kafka-1"}}, "KAFKA__PASSWORD"),
        ("prepare", {"records": {"mongo_url": None}}, "RECORDS__MONGO_URL"),
        ("prepare", {"records": {"mongo_url": "mongodb://studio:secret@mongo"}}, "RECORDS__MONGO_URL"),
        ("prepare", {"records": {"mongo_url": f"mongodb://a:{SECRET}@mongo,db.example.com/x"}}, "RECORDS__MONGO_URL"),
        ("api", {"s3": {"endpoint": "http://s3.example.com"}}, "S3__ENDPOINT"),
        ("api", {"s3": {"endpoint": "http://52.95.110.1:9000"}}, "S3__ENDPOINT"),
        ("api", {"s3": {"secret_key": "minioadmin"}}, "S3__SECRET_KEY"),
        ("api", {"s3": {"secret_key": "studio-test-secret"}}, "S3__SECRET_KEY"),
        ("consumer:training", {"training": {"ray_token": None}}, "TRAINING__RAY_TOKEN"),
        ("consumer:training", {"training": {"ray_address": "http://ray.example.com"}}, "TRAINING__RAY_ADDRESS"),
        ("consumer:serving", {"serving": {"driver": "local_process"}}, "SERVING__DRIVER"),
    ],
)
def test_what_is_unsafe_does_not_start(process: str, changes: dict[str, Any], setting: str) -> None:
    with pytest.raises(production.UnsafeSettings) as refused:
        production.check(settings(**changes), process)
    (_, problem) = str(refused.value).splitlines()
    assert problem.startswith(f"- MINI_STUDIO_{setting} ")
    assert SECRET not in problem


@pytest.mark.parametrize(
    ("process", "changes"),
    [
        ("api", {"api": {"host": "127.0.0.1", "admin_token": None}}),
        ("gateway", {"api": {"admin_token": None}, "records": {"mongo_url": None}}),
        ("relay", {"serving": {"driver": "local_process"}}),
        ("consumer:serving", {"serving": {"driver": "local_process", "host": "model-servers"}}),
        ("api", {"s3": {"endpoint": "https://s3.example.com", "access_key": None, "secret_key": None}}),
        ("api", {"s3": {"endpoint": "http://10.1.2.3:9000"}, "training": {"ray_address": "http://localhost:8265"}}),
        ("relay", {"kafka": {"bootstrap": "kafka.example.com:9092", "security": "sasl_ssl"}}),
        ("relay", {"records": {"mongo_url": f"mongodb+srv://studio:{SECRET}@cluster.example.com"}}),
        ("relay", {"records": {"mongo_url": f"mongodb://studio:{SECRET}@db.example.com/?tls=true"}}),
    ],
)
def test_what_is_safe_enough_starts(process: str, changes: dict[str, Any]) -> None:
    production.check(settings(**changes), process)


def test_the_embedded_defaults_are_refused_with_all_reasons_at_once() -> None:
    with pytest.raises(production.UnsafeSettings) as refused:
        production.check(Settings.model_validate({"production": True, "api": {"host": "::"}}), "api")
    assert len(str(refused.value).splitlines()) == 1 + 3


@pytest.mark.parametrize("process", ["api", "gateway", "relay"])
def test_that_anybody_may_ask_is_told(process: str, capsys: pytest.CaptureFixture[str]) -> None:
    production.check(settings(), process)
    assert ("production.no_keys" in capsys.readouterr().out) == (process != "relay")
    production.check(settings(api={"keys": {"acme": "0" * 64}}), process)
    assert "production.no_keys" not in capsys.readouterr().out


def test_limits_and_keys_of_single_clients_are_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_STUDIO_GATEWAY__CLIENTS", '{"Acme": {"requests_s": 0.5, "streams": 3}}')
    monkeypatch.setenv("MINI_STUDIO_API__KEYS", json.dumps({"Acme": "A" * 64, "*": ["b" * 64]}))
    found = Settings()
    assert found.api.keys == {"Acme": ["a" * 64], "*": ["b" * 64]}
    limits = found.gateway.clients["Acme"]
    assert (limits.requests_s, limits.tokens_min, limits.streams) == (0.5, None, 3)
    for wrong in ('{"acme": {"requests_s": 0}}', '{"a b": {}}', '{"acme": {"request_s": 1}}'):
        monkeypatch.setenv("MINI_STUDIO_GATEWAY__CLIENTS", wrong)
        with pytest.raises(ValidationError):
            Settings()


def test_an_open_door_is_told_outside_production_too(capsys: pytest.CaptureFixture[str]) -> None:
    production.check(Settings.model_validate({"api": {"host": "0.0.0.0"}}), "api")  # noqa: S104
    assert "MINI_STUDIO_API__ADMIN_TOKEN is not set" in capsys.readouterr().out


async def test_health_is_served_where_the_setting_says(tmp_path: Path) -> None:
    port, answered = free_port(), False
    relaying = asyncio.create_task(maintenance.relay(Settings(data=tmp_path, health_host="127.0.0.2"), port))
    async with httpx.AsyncClient(trust_env=False) as client:
        while not answered:
            await asyncio.sleep(0.05)
            try:
                answered = (await client.get(f"http://127.0.0.2:{port}/health")).json()["status"] == "ok"
            except httpx.ConnectError:
                continue
        with pytest.raises(httpx.ConnectError):
            await client.get(f"http://127.0.0.1:{port}/health")
    os.kill(os.getpid(), signal.SIGTERM)
    await until(relaying.done)
