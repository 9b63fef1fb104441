"""Every setting of the studio. Environment variables: `MINI_STUDIO_<SECTION>__<NAME>`, for instance `MINI_STUDIO_API__PORT`.

A running studio writes where its parts listen to `<data>/run/studio.json`; other commands with the same `MINI_STUDIO_DATA`
read it, below the environment and above the defaults.
"""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FilePath,
    SecretStr,
    StringConstraints,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from events.types import CLIENT_CODE_PATTERN, ClientCode

MIB = 1024 * 1024
OPERATOR = "*"
"""Whose key acts as no client in particular."""


def run_file(data: Path) -> Path:
    """Where the launcher of the studio in `data` says which addresses its parts have."""
    return data / "run" / "studio.json"


class Api(BaseModel):
    host: str = Field("127.0.0.1", description="Address the REST API listens on.")
    port: int = Field(8000, ge=1, le=65535, description="Port of the REST API.")
    listener: int | None = Field(
        None,
        ge=3,
        description="File descriptor of an inherited socket that listens already, used instead of host and port; "
        "whoever passes it on lets callers wait while the API is started again.",
    )
    deploy_wait_s: float = Field(
        20.0,
        ge=0,
        description="How long a deploy request waits for the first status before it answers 202 (not at all while the broker is away).",
    )
    max_body_bytes: int = Field(
        16 * MIB, gt=0, description="Largest JSON body accepted (uploads have their own limit)."
    )
    admin_token: SecretStr | None = Field(
        None,
        description="Bearer token of `/admin`; without one it is open, as all of the API is without keys, to whoever reaches its address.",
    )
    keys: dict[str, list[str]] = Field(
        {},
        description="Client code -> SHA-256 of its API key in hex, or a list of several; `*` is the operator, who may name any "
        "client or none. `mini-studio keys new CLIENT` makes one. Without keys the studio believes whom callers say they are.",
    )

    @field_validator("keys", mode="before")
    @classmethod
    def _lists(cls, given: Any) -> Any:
        """One digest is a list of one."""
        if not isinstance(given, dict):
            return given
        return {code: [digests] if isinstance(digests, str) else digests for code, digests in given.items()}

    @field_validator("keys")
    @classmethod
    def _digests(cls, keys: dict[str, list[str]]) -> dict[str, list[str]]:
        """No digest is shown: what is wrong may be the key itself."""
        how = "`mini-studio keys new CLIENT` makes a key and says what to set"
        for code, digests in keys.items():
            if code != OPERATOR and not re.fullmatch(CLIENT_CODE_PATTERN, code):
                raise ValueError(f"{code[:80]!r} is no client code, nor {OPERATOR!r} for the operator; {how}")
            if not digests or not all(re.fullmatch(r"[0-9a-fA-F]{64}", digest) for digest in digests):
                raise ValueError(f"{code} needs the SHA-256 of its key, as 64 hex digits, not the key itself; {how}")
        found = {code: [digest.lower() for digest in digests] for code, digests in keys.items()}
        ((_, times),) = Counter(digest for digests in found.values() for digest in digests).most_common(1) or [("", 0)]
        if times > 1:
            raise ValueError(f"a key is there twice; every client needs its own: {how}")
        return found


class ClientLimits(BaseModel):
    """One client's own limits at one gateway; what is left out is as for everybody."""

    model_config = ConfigDict(extra="forbid")

    requests_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    tokens_min: int | None = Field(None, gt=0)
    streams: int | None = Field(None, gt=0)


class Gateway(BaseModel):
    """What takes requests to the models, in the API's process and in `mini-studio gateway`."""

    client: Literal["fast", "plain"] = Field(
        "fast",
        description="What asks the model servers: the studio's own HTTP/1.1 client on the hot path, or httpx behind FastAPI, "
        "a hundred times slower, for whoever trusts that more.",
    )
    connect_s: float = Field(2.0, gt=0, description="Time to connect to a model server.")
    first_byte_s: float = Field(300.0, gt=0, description="Longest wait for the first byte of a model server's answer.")
    between_bytes_s: float = Field(300.0, gt=0, description="Longest silence of a model server within its answer.")
    total_s: float = Field(3600.0, gt=0, description="Longest time from a request's arrival to the end of its answer.")
    hold_requests: int = Field(
        100,
        ge=0,
        description="Requests that may wait at one gateway for a deployment that was scaled to zero; more are answered 503.",
    )
    hold_s: float = Field(
        120.0,
        ge=0,
        description="How long such a request waits before it is answered 503: longer than the usual model takes to load. "
        "Clients, and proxies before the gateway, have to be as patient.",
    )
    eject_after: int = Field(
        3, ge=1, description="Failures in a row after which a replica is given no requests for a while."
    )
    eject_s: float = Field(
        5.0, gt=0, description="How long, the first time; then one request probes it. Each time in a row it doubles."
    )
    affinity_load: float = Field(
        1.25,
        ge=1,
        description="Requests with the same beginning go to the same replica, whose caches know it, as long as its load is at "
        "most so many times the average.",
    )
    client_requests_s: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Requests a second that one client may make at one gateway; none: no limit.",
    )
    client_tokens_min: int | None = Field(
        None, gt=0, description="Tokens a minute that one client may use at one gateway; none: no limit."
    )
    client_streams: int | None = Field(
        None, gt=0, description="Requests that one client may have in flight at one gateway; none: no limit."
    )
    clients: dict[ClientCode, ClientLimits] = Field(
        {},
        description='Limits of single clients instead of those for everybody: `{"acme": {"requests_s": 50, "tokens_min": 200000, '
        '"streams": 20}}`; what is left out is as for everybody.',
    )
    usage_sample: float = Field(
        1.0, ge=0, le=1, description="Share of the requests whose usage is recorded; sums are scaled up by it."
    )


class Kafka(BaseModel):
    bootstrap: str = Field("127.0.0.1:9092", description="Bootstrap servers, comma separated.")
    partitions: int = Field(3, ge=1, description="Partitions of a topic that the studio creates.")
    replication: int = Field(
        1, ge=1, description="Replicas of a topic that the studio creates; writes go on while one of them is away."
    )
    retention_ms: int = Field(
        -1,
        ge=-1,
        description="How long a topic of events that the studio creates keeps them; -1 for ever, as its subscribers and replays expect.",
    )
    security: Literal["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"] = Field(
        "plaintext", description="How to connect: with TLS (ssl) or without, as a user (sasl) or without."
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "SCRAM-SHA-512", description="How a user proves its password; PLAIN shows it to the broker, so over TLS only."
    )
    username: str | None = Field(None, description="User of the sasl connections.")
    password: SecretStr | None = Field(None, description="That user's password.")
    ca_file: FilePath | None = Field(
        None,
        description="PEM file of the authorities that may have signed the brokers' certificates; by default the system's.",
    )
    idempotent: bool = Field(
        False, description="Idempotent producer; the embedded broker has none, Apache Kafka should use it."
    )
    publish_timeout_s: float = Field(
        5.0, gt=0, description="A publish that takes longer is unknown and is tried again."
    )
    session_timeout_ms: int = Field(10_000, description="A consumer that is silent longer loses its partitions.")
    fetch_wait_ms: int = Field(
        500,
        ge=1,
        description="How long a fetch waits for news. The embedded broker does not wake a waiting fetch: less is faster and busier.",
    )
    route_wait_ms: int | None = Field(
        None,
        ge=1,
        description="The same for what makes and follows the routes, where every wait is one for whoever waits for a model; "
        "by default no other.",
    )
    refill: bool = Field(False, description="The broker starts empty: refill its topics from the journal.")

    @property
    def routes_wait_ms(self) -> int:
        return self.route_wait_ms or self.fetch_wait_ms

    @model_validator(mode="after")
    def _user_and_security_agree(self) -> Self:
        as_user = self.security.startswith("sasl_")
        if as_user and not (self.username and self.password):
            raise ValueError(f"security {self.security} needs a username and a password")
        if self.username and not as_user:
            raise ValueError(f"security {self.security} sends no username: use sasl_ssl or sasl_plaintext")
        return self


class Records(BaseModel):
    sqlite: Path | None = Field(None, description="The record file; by default `records.sqlite` in the data folder.")
    mongo_url: SecretStr | None = Field(
        None,
        description="Keep the records in the MongoDB at this URL, with its TLS and login options, and not in a file.",
    )
    mongo_database: str = Field("mini_studio", min_length=1, description="Database of the records in that MongoDB.")
    busy_timeout_s: float = Field(
        2.0, gt=0, description="How long a write waits for another process's lock, and any exchange with MongoDB."
    )


class S3(BaseModel):
    endpoint: str | None = Field("http://127.0.0.1:9000", description="S3 endpoint; empty for AWS itself.")
    bucket: str = Field("mini-studio", description="Bucket of the datasets.")
    region: str = Field("us-east-1", description="Region of the bucket.")
    access_key: str | None = Field(None, description="Access key; empty for the usual AWS credentials chain.")
    secret_key: SecretStr | None = Field(None, description="Secret key.")
    addressing: Literal["path", "virtual", "auto"] = Field(
        "path",
        description="Where a request names the bucket: in its path, in its host name (the endpoint has to be a name then), "
        "or as AWS likes it.",
    )
    ca_file: FilePath | None = Field(
        None,
        description="PEM file of the authorities that may have signed the endpoint's certificate; by default the public ones.",
    )


class Uploads(BaseModel):
    max_bytes: int = Field(4 * 1024 * MIB, gt=0, description="Largest dataset file.")
    max_line_bytes: int = Field(1 * MIB, gt=0, description="Longest line of a dataset.")
    max_depth: int = Field(32, gt=0, description="Deepest nesting of a line's JSON.")
    max_errors: int = Field(20, gt=0, description="Errors reported of an invalid dataset.")
    sweep_after_s: float = Field(
        3600.0, gt=0, description="Age at which stored bytes that no record names are deleted."
    )


class Training(BaseModel):
    ray_address: str = Field("http://127.0.0.1:8265", description="Address of Ray's HTTP API (Jobs and state).")
    ray_timeout_s: float = Field(5.0, gt=0, description="Longest wait for one answer of Ray.")
    ray_token: SecretStr | None = Field(
        None, description="Token of a Ray cluster that runs with RAY_AUTH_MODE=token; it is sent with every request."
    )
    max_running: int = Field(1, ge=1, description="Trainings that run at once; the others wait in our own queue.")
    threads: int = Field(
        default_factory=lambda: max(1, os.cpu_count() or 1),
        ge=1,
        description="CPU threads of a training with one worker; tiny models use one. Of several workers each has `cpus` threads.",
    )
    workers: int = Field(
        1, ge=1, description="Workers that train one model together, through Ray Train when there are several."
    )
    cpus: float = Field(1.0, gt=0, description="CPUs that Ray keeps for each worker.")
    gpus: float = Field(0.0, ge=0, description="GPUs of each worker.")
    checkpoint_every_s: float = Field(
        60.0,
        ge=0,
        description="Least time between two checkpoints of a training; it is longer where saving takes over a twentieth of it.",
    )
    max_attempts: int = Field(
        3,
        ge=1,
        description="Attempts whose trainer is killed or falls silent before a job fails for good; restarts of the studio do not count.",
    )
    poll_s: float = Field(0.5, gt=0, description="How often a running attempt's folder is read.")
    lost_after_s: float = Field(30.0, gt=0, description="Silence of a trainer after which its attempt counts as lost.")
    start_timeout_s: float = Field(120.0, gt=0, description="Time from submit to the trainer's first sign of life.")
    lora_over_parameters: int = Field(
        20_000_000, ge=0, description="Larger models are trained with LoRA unless told otherwise."
    )


Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
"""An amount as Kubernetes writes it: `500m`, `2`, `8Gi`."""


class Kubernetes(BaseModel):
    """What the Kubernetes driver needs; used with `serving.driver` `kubernetes`."""

    namespace: str = Field("mini-studio-models", description="Namespace of the model servers' objects.")
    kubeconfig: Path | None = Field(
        None, description="Kubeconfig file; by default the pod's own service account, else the usual kubeconfig."
    )
    request_timeout_s: float = Field(10.0, gt=0, description="Longest wait for one answer of the API server.")
    max_requests: int = Field(8, ge=1, description="Calls to the API server at the same time.")
    runtime: Literal["vllm", "studio"] = Field(
        "vllm", description="The model server: vLLM on GPUs, or the studio's own on CPUs."
    )
    vllm_image: str = Field("vllm/vllm-openai:v0.33.0", description="Image of vLLM's API server, by tag or digest.")
    server_image: str = Field(
        "mini-studio-server:0.1.0", description="Image of the studio's own model server (target `server`)."
    )
    image_pull_secrets: list[str] = Field([], description="Names of the secrets that pull these images.")
    models_claim: str = Field(
        "mini-studio-models", description="Claim of the models root, mounted read-only at the same path as here."
    )
    cache_claim: str | None = Field(
        None,
        description="Claim that model servers share as cache of hub models; by default each has its own, for its life.",
    )
    cache_size: Quantity = Field("50Gi", description="Most that a model server's own cache may hold.")
    cpu: Quantity = Field("2", description="CPU that one replica asks for.")
    memory: Quantity = Field("8Gi", description="Memory that one replica asks for, and its limit.")
    gpu_resource: str = Field("nvidia.com/gpu", description="What a GPU is called in a pod's limits.")
    node_selector: dict[str, str] = Field({}, description="Labels of the nodes that run model servers.")
    tolerations: list[dict[str, str | int]] = Field([], description="Taints of those nodes, as pods tolerate them.")
    gateway_namespace: str = Field("mini-studio", description="Namespace of the gateway's pods.")
    gateway_labels: dict[str, str] = Field(
        {"app.kubernetes.io/name": "mini-studio", "app.kubernetes.io/component": "gateway"},
        min_length=1,
        description="Labels of the only pods that may reach model servers.",
    )
    hub_egress: list[str] = Field(
        [], description="Address ranges that servers of hub models may reach on port 443, such as 0.0.0.0/0."
    )
    endpoint: str = Field(
        "http://{name}.{namespace}.svc:8000", description="Where the gateway reaches the Service of a deployment."
    )
    prometheus: str = Field(
        "http://prometheus-server.monitoring.svc", description="The Prometheus that scrapes the gateways, for KEDA."
    )
    scale_poll_s: int = Field(5, ge=1, description="How often KEDA looks at a deployment's load.")
    scale_down_s: int = Field(300, ge=0, description="Silence after which replicas are taken away.")


class Serving(BaseModel):
    driver: Literal["local_process", "kubernetes"] = Field("local_process", description="What runs the model servers.")
    host: str = Field(
        "127.0.0.1",
        description="Address that local model servers listen on, each at a free port, and at which gateways reach them; "
        "in containers a name that means this one to both.",
    )
    poll_s: float = Field(1.0, gt=0, description="How often the reconciler compares desired and observed state.")
    ready_timeout_s: float = Field(900.0, gt=0, description="Time from applied to ready before a deployment fails.")
    threads: int = Field(
        default_factory=lambda: max(1, os.cpu_count() or 1),
        ge=1,
        description="CPU threads of a local model server; tiny models use one.",
    )
    tuned_gpus: int = Field(
        1,
        ge=0,
        le=64,
        description="GPUs of a replica of a model that is served because its job, submitted below /v1, succeeded; "
        "ignored by local model servers and where the Kubernetes runtime is the studio's own.",
    )
    tuned_min_replicas: int = Field(
        1, ge=0, le=64, description="Least replicas of such a model; 0: it sleeps until it is asked."
    )
    max_servers: int = Field(
        16,
        ge=1,
        description="Local model servers of all deployments together; what would need more is refused, or scales no further.",
    )
    max_restarts: int = Field(5, ge=1, description="Crashes in a row after which a local deployment fails.")
    gateways: list[Annotated[str, StringConstraints(pattern=r"^https?://[^/?#]+/?$")]] = Field(
        [],
        description="Base URLs of all gateways, whose load scales local model servers; by default the REST API, as this machine "
        "reaches it. Each process needs an address of its own.",
    )
    scale_down_s: float = Field(
        60.0,
        ge=0,
        description="Local replicas are taken away when so many seconds have not needed them; kubernetes has its own.",
    )
    finish_s: int = Field(
        300, ge=1, description="How long answers that run at a local replica may go on when it is taken away."
    )
    kubernetes: Kubernetes = Field(default_factory=Kubernetes)


class Log(BaseModel):
    format: Literal["auto", "console", "json"] = Field(
        "auto", description="auto: readable on a terminal, JSON when piped."
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe level that is logged."
    )


class RunFileSource(PydanticBaseSettingsSource):
    """Reads `<data>/run/studio.json`, which a running studio's launcher wrote."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        data = self.current_state.get("data") or os.environ.get("MINI_STUDIO_DATA") or ".studio"
        try:
            content = json.loads(run_file(Path(data)).read_text())
        except (OSError, ValueError):
            return {}
        return content.get("settings", {}) if isinstance(content, dict) else {}


class Settings(BaseSettings):
    """The studio's settings; every default works on one machine."""

    model_config = SettingsConfigDict(env_prefix="MINI_STUDIO_", env_nested_delimiter="__", extra="ignore")

    data: Path = Field(Path(".studio"), description="Folder of everything the studio keeps on this machine.")
    models_root: Path | None = Field(
        None, description="Root of base models and fine-tuned weights; by default `models` in the data folder."
    )
    dfs_root: Path | None = Field(
        None, description="Root of the shared file system; by default `dfs` in the data folder."
    )
    production: bool = Field(False, description="Refuse to start with settings that are fit for one machine only.")
    health_host: str = Field(
        "127.0.0.1", description="Address of `/health` and `/metrics` of consumers and relay (MINI_STUDIO_HEALTH_PORT)."
    )
    api: Api = Field(default_factory=Api)
    gateway: Gateway = Field(default_factory=Gateway)
    kafka: Kafka = Field(default_factory=Kafka)
    records: Records = Field(default_factory=Records)
    s3: S3 = Field(default_factory=S3)
    uploads: Uploads = Field(default_factory=Uploads)
    training: Training = Field(default_factory=Training)
    serving: Serving = Field(default_factory=Serving)
    log: Log = Field(default_factory=Log)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, RunFileSource(settings_cls)

    @property
    def gateways(self) -> list[str]:
        """Where the gateways tell their load."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.api.host, self.api.host)  # noqa: S104
        own = f"http://[{host}]:{self.api.port}" if ":" in host else f"http://{host}:{self.api.port}"
        return list(self.serving.gateways) or [own]

    @property
    def models(self) -> Path:
        """Absolute root of all model folders."""
        return (self.models_root or self.data / "models").resolve()

    @property
    def dfs(self) -> Path:
        """Absolute root of the shared file system."""
        return (self.dfs_root or self.data / "dfs").resolve()

    @property
    def record_file(self) -> Path:
        return (self.records.sqlite or self.data / "records.sqlite").resolve()
