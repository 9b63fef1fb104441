"""compose.yaml against the code that it starts: settings, commands, addresses, health checks, volumes, images."""

import json
import os
import re
import stat
import subprocess
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel, SecretStr

from mini_studio import production
from mini_studio.cli import app
from mini_studio.settings import Api, Settings
from tests.install import compose_file
from tests.install.compose_file import ROOT, SERVER, STUDIO, TRAINER, Service

SECRETS = {name: sha256(name.encode()).hexdigest()[:48] for name in sorted(compose_file.required())}
SERVICES = compose_file.services(SECRETS)
OURS = {name: service for name, service in SERVICES.items() if service.is_studio}
PORTS = {"kafka": 9092, "mongo": 27017, "s3": 9000, "ray": 8265}
"""Where the others listen: as their commands and variables here say, or by their own default (MongoDB, Ray's dashboard)."""


def make_env(folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["make", "--file", str(ROOT / "Makefile"), "env"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_make_env_writes_every_secret_once(tmp_path: Path) -> None:
    assert make_env(tmp_path).returncode == 0
    file = tmp_path / ".env"
    written = compose_file.read_env(file)
    assert set(written) == compose_file.required()
    assert len(set(written.values())) == len(written)
    assert all(re.fullmatch(r"[0-9a-f]{48}", value) for value in written.values())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600

    again = make_env(tmp_path)
    assert again.returncode == 2
    assert "left as it is" in again.stderr
    assert compose_file.read_env(file) == written


def test_no_secret_stands_in_the_file() -> None:
    secret = re.compile(r"(PASSWORD|SECRET_KEY|ACCESS_KEY|TOKEN|MONGO_URL): (.*)")
    found = secret.findall(compose_file.FILE.read_text())
    assert len(found) >= len(SECRETS)
    assert [value for _, value in found if "${STUDIO_" not in value] == []


@pytest.mark.parametrize("service", OURS.values(), ids=lambda service: service.name)
def test_every_variable_is_a_setting_that_takes_its_value(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(service, monkeypatch)
    assert service.environment, service.name
    for name, value in service.environment.items():
        assert _shown(_setting(settings, name)) == value, name


@pytest.mark.parametrize("service", OURS.values(), ids=lambda service: service.name)
def test_production_has_nothing_against_it(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(service, monkeypatch)
    assert settings.production
    process = ":".join(service.command).replace("consume:", "consumer:")
    assert production.unsafe(settings, process) == []


def settings_of(service: Service, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in os.environ:
        if name.startswith("MINI_STUDIO_"):
            monkeypatch.delenv(name)
    for name, value in service.environment.items():
        monkeypatch.setenv(name, value)
    return Settings(data=Path("/data"))


def _setting(settings: BaseModel, variable: str) -> Any:
    found: Any = settings
    for part in variable.removeprefix("MINI_STUDIO_").lower().split("__"):
        found = getattr(found, part)
    return found


def _shown(value: Any) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, list):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("service", OURS.values(), ids=lambda service: service.name)
def test_every_command_is_one_of_the_command_line(service: Service) -> None:
    group: Any = typer.main.get_command(app)
    name, command, rest = group.resolve_command(typer.Context(group), service.command)
    command.make_context(name, rest)  # raises on arguments it does not know


def test_each_consumer_has_a_service_of_its_own() -> None:
    from consumers.app import CONSUMERS

    consuming = [service.command[1:] for service in OURS.values() if service.command[0] == "consume"]
    assert sorted(consuming) == sorted([name] for name in CONSUMERS)
    assert {service.command[0] for service in OURS.values()} == {"api", "gateway", "consume", "relay", "prepare"}


def test_every_address_is_that_of_a_service_on_a_network_of_both() -> None:
    addressed = set()
    for service in OURS.values():
        for value in service.environment.values():
            for host, port in re.findall(r"(?:^|//|@)([a-z0-9-]+):(\d+)(?=/|$)", value):
                assert PORTS[host] == int(port), (service.name, value)
                assert service.networks & SERVICES[host].networks, (service.name, host)
                addressed.add(host)
    assert addressed == set(PORTS)
    assert f"PLAINTEXT://:{PORTS['kafka']}" in SERVICES["kafka"].environment["KAFKA_LISTENERS"]
    assert f"kafka:{PORTS['kafka']}" in SERVICES["kafka"].environment["KAFKA_ADVERTISED_LISTENERS"]
    assert f":{PORTS['s3']}" in SERVICES["s3"].command


def test_model_servers_are_reached_by_the_name_of_their_network_alone() -> None:
    serving = SERVICES["serving"]
    name = serving.environment["MINI_STUDIO_SERVING__HOST"]
    assert serving.content["networks"]["models"] == {"aliases": [name]}
    reaching = {service.name for service in SERVICES.values() if "models" in service.networks}
    assert reaching == {"serving", "api", "gateway"}
    assert compose_file.load(SECRETS)["networks"]["models"] == {"internal": True}


def test_only_api_and_gateway_are_published_and_only_on_this_machine() -> None:
    published = {service.name: service.content["ports"] for service in SERVICES.values() if "ports" in service.content}
    assert published == {"api": ["127.0.0.1:8000:8000"], "gateway": ["127.0.0.1:8001:8000"]}
    for name in published:
        assert SERVICES[name].environment["MINI_STUDIO_API__HOST"] == "0.0.0.0"  # noqa: S104
        assert "MINI_STUDIO_API__PORT" not in SERVICES[name].environment
    assert Api().port == 8000


@pytest.mark.parametrize("service", SERVICES.values(), ids=lambda service: service.name)
def test_every_service_may_do_no_more_than_it_has_to(service: Service) -> None:
    content = service.content
    assert content["cap_drop"] == ["ALL"]
    assert content["security_opt"] == ["no-new-privileges:true"]
    assert content["init"] is True
    assert {"memory", "pids"} == set(content["deploy"]["resources"]["limits"])
    assert content["restart"] == ("no" if service.name == "prepare" else "unless-stopped")
    assert content["stop_grace_period"] == "30s"
    # Kafka's image writes its configuration when it starts
    assert content.get("read_only", False) is (service.name != "kafka")
    assert not {"privileged", "devices", "network_mode", "pid", "cap_add"} & set(content)


@pytest.mark.parametrize("service", SERVICES.values(), ids=lambda service: service.name)
def test_every_image_is_pinned_to_a_whole_version(service: Service) -> None:
    assert re.fullmatch(r"[a-z/-]+:v?\d+\.\d+\.\d+", service.image)
    if "build" in service.content:
        target = {STUDIO: "studio", SERVER: "server", TRAINER: "trainer"}[service.image]
        assert service.content["build"] == {"context": ".", "target": target}
        assert service.image.endswith(f":{version('mini-studio')}")


def test_everyone_waits_for_prepare_and_it_for_the_servers() -> None:
    for service in SERVICES.values():
        waits = {name: on["condition"] for name, on in service.content.get("depends_on", {}).items()}
        if service.name == "prepare":
            assert waits == dict.fromkeys(("kafka", "mongo", "s3"), "service_healthy")
            assert all("test" in SERVICES[name].content["healthcheck"] for name in waits)
        elif "build" in service.content:
            assert waits == {"prepare": "service_completed_successfully"}
        else:
            assert waits == {}


def test_volumes_are_declared_and_mounted_where_the_code_looks() -> None:
    declared = set(compose_file.load(SECRETS)["volumes"])
    mounts = {
        (service.name, *mount.split(":"))
        for service in SERVICES.values()
        for mount in service.content.get("volumes", [])
    }
    assert {mount[1] for mount in mounts} == declared
    roots = {"models": "/models", "dfs": "/dfs", "serving": "/data"}
    assert all(mount[2] == roots.get(mount[1], mount[2]) for mount in mounts)
    writers = {volume: {m[0] for m in mounts if m[1] == volume and m[3:] != ("ro",)} for volume in roots}
    assert writers == {
        "dfs": {"api", "datasets", "prepare"},
        "models": {"training", "serving", "ray", "prepare"},
        "serving": {"serving", "prepare"},
    }
    # what it mounts first makes a volume belong to its image's user
    assert {mount[1] for mount in mounts if mount[0] == "prepare"} == set(roots)


def test_ray_and_the_studio_have_the_same_token() -> None:
    assert SERVICES["ray"].environment["RAY_AUTH_MODE"] == "token"
    with_token = [service for service in OURS.values() if "MINI_STUDIO_TRAINING__RAY_TOKEN" in service.environment]
    assert {service.name for service in with_token} == {"api", "training"}
    for service in with_token:
        assert service.environment["MINI_STUDIO_TRAINING__RAY_TOKEN"] == SERVICES["ray"].environment["RAY_AUTH_TOKEN"]


@pytest.mark.real
def test_compose_itself_loads_the_file_with_the_env_that_make_writes(tmp_path: Path) -> None:
    assert make_env(tmp_path).returncode == 0
    loaded = compose_file.load_as_compose_does(tmp_path / ".env")
    assert loaded.returncode == 0, loaded.stderr
    as_compose = compose_file.services_of(loaded.stdout)
    here = compose_file.services(compose_file.read_env(tmp_path / ".env"))
    assert as_compose.keys() == here.keys()
    for name, service in as_compose.items():
        assert (service.environment, service.command, service.networks) == (
            here[name].environment,
            here[name].command,
            here[name].networks,
        )


@pytest.mark.real
def test_compose_itself_refuses_to_start_without_secrets(tmp_path: Path) -> None:
    (tmp_path / ".env").touch()
    loaded = compose_file.load_as_compose_does(tmp_path / ".env")
    assert loaded.returncode != 0
    for name in SECRETS:
        assert f"required variable {name} is missing a value: make env writes it" in loaded.stderr
