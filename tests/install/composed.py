"""What compose.yaml describes, as processes of this machine: the same commands with the same variables, other addresses.

The servers are real ones that need no engine: Apache Kafka with the options of service `kafka`, the S3 server of service `s3` with its
command, a Ray head with its token; and in MongoDB's place a server that speaks its protocol, without users.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from tests.fakes import real_kafka
from tests.fakes.broker import lasting_port
from tests.fakes.local_servers import end_all
from tests.fakes.ray_head import running_head
from tests.fakes.real_mongo import own_mongo
from tests.fakes.real_services import script_of
from tests.fakes.running import Running
from tests.install.compose_file import Service
from tests.install.test_dockerfile import ROOTS, environment

SERVERS, SERVERS_ADDRESS = "127.44", "127.0.0.44"
"""Where the model servers are, and nothing else is. The short form of the address resolves as a name does, and is none of this
machine to the checks of production, as the name in compose.yaml is not."""
MEANT_FOR_CONTAINERS = ("ADVERTISED", "LISTENER", "NODE_ID", "PROCESS_ROLES", "QUORUM", "LOG_DIRS", "HEAP")
GRACE_S = 30
"""As `stop_grace_period`."""


@dataclass
class Composed:
    """The studio's services, each as a process; `places` says where what they are told to reach is here."""

    services: dict[str, Service]
    folder: Path
    places: dict[str, str]
    ports: dict[str, int] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str) -> None:
        service = self.services[name]
        self.ports.setdefault(name, lasting_port())
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "mini_studio.cli", *service.command],
                cwd=self.folder,
                env=self._environment(service),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _environment(self, service: Service) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MINI_STUDIO_")}
        told = {name: self._here(value) for name, value in service.environment.items()}
        roots = {name: str(self.folder / folder.strip("/")) for name, folder in ROOTS.items()}
        port = str(self.ports[service.name])
        ports = {"MINI_STUDIO_HEALTH_PORT": port, "MINI_STUDIO_API__PORT": port}
        assert environment("studio")["MINI_STUDIO_HEALTH_PORT"] == "8000"
        return {**kept, **told, **roots, **ports}

    def _here(self, value: str) -> str:
        for there, here in self.places.items():
            value = re.sub(rf"(?<![\w-]){re.escape(there)}(?![\w-])", here, value)
        return value

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    def answers(self, name: str) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url(name)}/health", timeout=5, trust_env=False).json()["status"] == "ok"
        return False

    def wait(self, *names: str) -> None:
        for name in names:
            Running.until(lambda name=name: self.answers(name), 60)

    def children_listen(self, name: str) -> list[tuple[str, int]]:
        """Addresses at which the processes that a service has started listen."""
        children = psutil.Process(self.processes[name].pid).children(recursive=True)
        connections = [connection for child in children for connection in child.net_connections("tcp")]
        return [(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN]

    def kill(self, name: str) -> None:
        """As a container ends: with all that it started."""
        root = psutil.Process(self.processes[name].pid)
        all_of_it = [root, *root.children(recursive=True)]
        for process in all_of_it:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.processes.pop(name).wait()
        psutil.wait_procs(all_of_it, timeout=10)

    def stop(self) -> dict[str, int]:
        """As `docker compose stop`; the exit codes by service."""
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        codes = {name: process.wait(deadline - time.monotonic()) for name, process in self.processes.items()}
        self.processes.clear()
        return codes

    def end(self) -> None:
        """Also of the model servers, which outlive the process that has started them, though no container."""
        for name in list(self.processes):
            self.kill(name)
        end_all(self.folder / "data" / "serving")


@contextlib.contextmanager
def composed(services: dict[str, Service], folder: Path) -> Iterator[Composed]:
    """The servers that the studio's services need, and the services, none of them started."""
    for place in ROOTS.values():
        (folder / place.strip("/")).mkdir()
    with contextlib.ExitStack() as stack:
        kafka = stack.enter_context(_kafka(services["kafka"], folder / "kafka"))
        mongo = stack.enter_context(own_mongo(folder / "mongo"))
        s3 = stack.enter_context(_s3(services["s3"], folder))
        head = stack.enter_context(running_head(services["ray"].environment["RAY_AUTH_TOKEN"]))
        password = services["mongo"].environment["STUDIO_MONGO_PASSWORD"]
        places = {
            "kafka:9092": kafka,
            f"mini-studio:{password}@mongo:27017": mongo.url.removeprefix("mongodb://"),
            "s3:9000": s3,
            "ray:8265": head.address.removeprefix("http://"),
            "model-servers": SERVERS,
            "0.0.0.0": "127.0.0.1",  # noqa: S104
        }
        running = Composed(services, folder, places)
        stack.callback(running.end)
        yield running


@contextlib.contextmanager
def _kafka(service: Service, data: Path) -> Iterator[str]:
    script = real_kafka.script()
    assert script is not None, real_kafka.HOW_TO_STOP_IT
    options = [
        f"{name.removeprefix('KAFKA_').lower().replace('_', '.')}={value}"
        for name, value in service.environment.items()
        if name.startswith("KAFKA_") and not any(part in name for part in MEANT_FOR_CONTAINERS)
    ]
    assert "auto.create.topics.enable=false" in options
    kafka = real_kafka.RealKafka.start(script, data, *options)
    try:
        yield kafka.bootstrap
    finally:
        kafka.stop()


@contextlib.contextmanager
def _s3(service: Service, folder: Path) -> Iterator[str]:
    script = script_of("s3")
    said = subprocess.run([str(script), "install"], check=True, capture_output=True, text=True).stdout
    binary = Path(said.split(" in ")[-1].strip()) / "versitygw"
    address = f"127.0.0.1:{lasting_port()}"
    places = {":9000": address, "/meta": str(folder / "meta"), "/objects": str(folder / "objects")}
    for name in ("meta", "objects"):
        (folder / name).mkdir()
    command = [str(binary), *(places.get(word, word) for word in service.command)]
    with (folder / "s3.log").open("wb") as log:
        process = subprocess.Popen(command, env={**os.environ, **service.environment}, stdout=log, stderr=log)
    health = service.content["healthcheck"]["test"][-1].replace("127.0.0.1:9000", address)
    try:
        Running.until(lambda: httpx.get(health, timeout=2, trust_env=False).is_success, 30)
        yield address
    finally:
        process.terminate()
        process.wait(15)
