"""With `MINI_STUDIO_PRODUCTION=true` the studio's processes refuse to start with settings that are fit for one machine only.

What is refused: an open door (`/admin` or Ray's Jobs API without a token), a secret that can be guessed, what crosses a network
in the clear, and what loses or splits the state of several machines (the embedded broker, SQLite, local model servers, a producer
that may repeat or reorder). What is merely less resilient, such as one replica of a topic, is logged; so is that there are no API
keys, since what authenticates callers may stand in front.
"""

import hashlib
import ipaddress
from collections.abc import Iterator
from urllib.parse import urlsplit

import structlog
from pydantic import SecretStr

from mini_studio.settings import Settings

log = structlog.get_logger(__name__)

LEAST_SECRET = 16
GUESSED = ("minioadmin", "studio-test", "changeme", "change-me", "password", "examplekey")
"""Parts of the secrets that examples, test tools and default installations have."""
INSIDE = (".svc", ".cluster.local", ".internal")
RANDOM = "a random one, such as `openssl rand -hex 24` makes"


class UnsafeSettings(Exception):
    """Settings that must not be used in production."""

    def __init__(self, problems: list[str]) -> None:
        lines = "".join(f"\n- {problem}" for problem in problems)
        super().__init__(f"MINI_STUDIO_PRODUCTION is set, and this is not fit for production:{lines}")


def check(settings: Settings, process: str) -> None:
    """To be called at the start of a `process` of the studio. Raises `UnsafeSettings` with all that is wrong."""
    if settings.production:
        problems = unsafe(settings, process)
        if problems:
            raise UnsafeSettings(problems)
        if settings.kafka.replication < 3:
            log.warning(
                "production.few_replicas", setting="MINI_STUDIO_KAFKA__REPLICATION", topics_lost_with="one broker"
            )
        if process in ("api", "gateway") and not settings.api.keys and not _this_machine(settings.api.host):
            log.warning(
                "production.no_keys", setting="MINI_STUDIO_API__KEYS", needs="what authenticates callers in front"
            )
    else:
        for problem in _open_door(settings, process):
            log.warning("settings.unsafe", reason=problem)


def unsafe(settings: Settings, process: str) -> list[str]:
    """What is wrong with the settings of a process, and what to do about each."""
    return [
        *_open_door(settings, process),
        *_open_ray(settings),
        *_guessed(settings),
        *_in_the_clear(settings),
        *_for_one_machine(settings, process),
    ]


def _open_door(settings: Settings, process: str) -> Iterator[str]:
    host = settings.api.host
    if process == "api" and not settings.api.admin_token and not _this_machine(host):
        yield (
            f"MINI_STUDIO_API__ADMIN_TOKEN is not set, so /admin is open to whoever reaches {host or 'any address'}: "
            f"set {RANDOM}, or MINI_STUDIO_API__HOST=127.0.0.1"
        )


def _open_ray(settings: Settings) -> Iterator[str]:
    host = urlsplit(settings.training.ray_address).hostname or ""
    if not settings.training.ray_token and not _this_machine(host):
        yield (
            f"MINI_STUDIO_TRAINING__RAY_TOKEN is not set, and whoever reaches {host} runs programs there: "
            "start Ray with RAY_AUTH_MODE=token, and set its token"
        )


def _guessed(settings: Settings) -> Iterator[str]:
    secrets = {
        "API__ADMIN_TOKEN": settings.api.admin_token,
        "KAFKA__PASSWORD": settings.kafka.password,
        "RECORDS__MONGO_URL": SecretStr(urlsplit(_mongo(settings)).password or "")
        if settings.records.mongo_url
        else None,
        "S3__SECRET_KEY": settings.s3.secret_key,
        "TRAINING__RAY_TOKEN": settings.training.ray_token,
    }
    for name, secret in secrets.items():
        text = secret.get_secret_value().lower() if secret else ""
        if secret and text and (len(text) < LEAST_SECRET or any(part in text for part in GUESSED)):
            yield f"MINI_STUDIO_{name} has a secret that can be guessed: use {RANDOM}"
    weak = {hashlib.sha256(word.encode()).hexdigest() for word in ("", *GUESSED)}
    for code, digests in settings.api.keys.items():
        if weak & set(digests):
            yield f"MINI_STUDIO_API__KEYS has a key of {code} that can be guessed: use `mini-studio keys new`"


def _in_the_clear(settings: Settings) -> Iterator[str]:
    kafka, mongo = settings.kafka, _mongo(settings)
    servers = [server.rpartition(":")[0] for server in kafka.bootstrap.split(",")]
    if not kafka.security.endswith("ssl") and (host := _outside(servers)):
        yield f"MINI_STUDIO_KAFKA__SECURITY is {kafka.security}, and {host} is not within this network: use sasl_ssl"
    servers = [server.rpartition(":")[0] or server for server in urlsplit(mongo).netloc.rpartition("@")[2].split(",")]
    encrypted = mongo.startswith("mongodb+srv:") or "tls=true" in mongo or "ssl=true" in mongo
    if mongo and not encrypted and (host := _outside(servers)):
        yield f"MINI_STUDIO_RECORDS__MONGO_URL has no tls=true, and {host} is not within this network: add it"
    for name, url in (("S3__ENDPOINT", settings.s3.endpoint), ("TRAINING__RAY_ADDRESS", settings.training.ray_address)):
        if url and url.startswith("http:") and (host := _outside([urlsplit(url).hostname or ""])):
            yield f"MINI_STUDIO_{name} is an http:// address, and {host} is not within this network: use https://"


def _for_one_machine(settings: Settings, process: str) -> Iterator[str]:
    if settings.kafka.refill:
        yield "MINI_STUDIO_KAFKA__REFILL is for the embedded broker, which keeps nothing: use an Apache Kafka, and unset it"
    if not settings.kafka.idempotent:
        yield "MINI_STUDIO_KAFKA__IDEMPOTENT is false, so a broker's failure repeats events: set it to true"
    if process != "gateway" and not settings.records.mongo_url:
        yield "MINI_STUDIO_RECORDS__MONGO_URL is not set, and a SQLite file serves one machine: set MongoDB's"
    local = settings.serving.driver == "local_process" and _this_machine(settings.serving.host)
    if local and process.startswith("consumer:") and "serving" in process:
        yield (
            "MINI_STUDIO_SERVING__DRIVER is local_process, whose model servers answer this machine alone: set it to kubernetes, "
            "or MINI_STUDIO_SERVING__HOST to an address of this machine that gateways reach"
        )


def _mongo(settings: Settings) -> str:
    return settings.records.mongo_url.get_secret_value() if settings.records.mongo_url else ""


def _this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _outside(hosts: list[str]) -> str | None:
    """The first host that is neither a private address, nor a name that only a cluster or a compose network knows."""
    for host in hosts:
        try:
            inside = ipaddress.ip_address(host.strip("[]")).is_private
        except ValueError:
            inside = "." not in host or host.endswith(INSIDE)
        if not inside:
            return host
    return None
