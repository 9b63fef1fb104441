"""What the chart makes of its values, as Helm renders it."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import click
import pytest
from typer.main import get_command

from consumers.app import CONSUMERS
from mini_studio import production
from mini_studio.bus.kafka import READERS
from mini_studio.cli import app
from mini_studio.settings import Settings
from mini_studio.variables import variables
from tests.fakes.helm import CHART, KUBERNETES, Helm, options
from tests.install.rendered import Object, Policies, component, environment, of, pods
from tests.install.test_helm_values import NAMES

pytestmark = pytest.mark.real

STUDIO = {"api", "gateway", "relay", *CONSUMERS}
MODELS = "mini-studio-models"


def commands() -> dict[str, click.Command]:
    group: Any = get_command(app)
    return dict(group.commands)


@pytest.fixture(scope="module", params=NAMES)
def objects(request: pytest.FixtureRequest, helm: Helm) -> list[Object]:
    return helm.render(request.param)


@pytest.fixture(scope="module")
def minimal(helm: Helm) -> list[Object]:
    return helm.render("minimal")


@pytest.mark.parametrize("name", NAMES)
def test_lint_finds_nothing(helm: Helm, name: str) -> None:
    assert "0 chart(s) failed" in helm.run(
        "lint", str(CHART), "--strict", "--kube-version", KUBERNETES, *options([name])
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("storage.models.storageClass=", "storage.models: name a claim, a volume"),
        ("storage.models.modelsNamespace.claim=", "storage.models.modelsNamespace: name a claim"),
        ("modelsNamespace.name=studio", "must be another namespace than the release's"),
        ("kafka.bootstrap=", "/kafka/bootstrap"),
        ("api.replica=3", "additional properties 'replica' not allowed"),
    ],
)
def test_what_cannot_work_is_refused_with_the_value_to_change(helm: Helm, change: str, said: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        helm.render("small", sets=[change])
    assert said in refused.value.stderr


def test_every_process_starts_in_production_with_settings_that_exist(
    objects: list[Object], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_commands = {
        str(name) for command in commands().values() for parameter in command.params for name in [parameter.envvar]
    }
    known = {*(variable.name for variable in variables()), *of_commands}
    for name, template in pods(objects):
        given = {
            variable: value
            for variable, value in environment(template, objects).items()
            if variable.startswith("MINI_STUDIO_")
        }
        assert set(given) <= known, f"{name}: no such settings"
        with monkeypatch.context() as process:
            for variable, value in given.items():
                process.setenv(variable, "d34db33f" * 4 if value.startswith("secret ") else value)
            settings = Settings()
        if name in {*STUDIO, "prepare"}:
            assert settings.production
            production.check(settings, f"consumer:{name}" if name in CONSUMERS else name)
            assert settings.serving.driver == "kubernetes"
            assert settings.serving.kubernetes.gateway_namespace == "studio"
            assert settings.serving.kubernetes.gateway_labels.items() <= labels_of("gateway", objects).items()
            assert (settings.api.host == "0.0.0.0") is (name in ("api", "gateway"))  # noqa: S104


def labels_of(name: str, objects: list[Object]) -> dict[str, str]:
    found: dict[str, str] = next(template["metadata"]["labels"] for at, template in pods(objects) if at == name)
    return found


def test_every_process_runs_a_command_that_exists(objects: list[Object]) -> None:
    ran = {}
    for name, template in pods(objects):
        command = template["spec"]["containers"][0].get("command", [])
        if command[:1] == ["mini-studio"]:
            assert command[1] in commands()
            ran[name] = command[1:]
    consumers = {name: ["consume", name] for name in CONSUMERS}
    assert {**consumers, "api": ["api"], "gateway": ["gateway"], "relay": ["relay"]}.items() <= ran.items()


def test_secrets_are_only_referred_to_and_only_by_who_needs_them(minimal: list[Object]) -> None:
    assert not of(minimal, "Secret")
    held = {
        name: {value for value in environment(template, minimal).values() if value.startswith("secret ")}
        for name, template in pods(minimal)
    }
    s3 = {"secret mini-studio-s3/access-key", "secret mini-studio-s3/secret-key"}
    ray = {"secret mini-studio-ray/token"}
    assert held["gateway"] == set()
    assert held["api"] == {*s3, *ray, "secret mini-studio-admin/token"}
    assert held["datasets"] == held["prepare"] == s3
    assert held["training"] == held["ray-head"] == held["ray-worker"] == ray
    for name in ("serving", "jobs", "routes", "relay"):
        assert held[name] == set()
    for name in STUDIO - {"gateway"}:
        variable = next(
            one for one in container(name, minimal)["env"] if one["name"] == "MINI_STUDIO_RECORDS__MONGO_URL"
        )
        assert variable["valueFrom"]["secretKeyRef"] == {"name": "mini-studio-mongo", "key": "url"}


def container(name: str, objects: list[Object]) -> Object:
    found: Object = next(template["spec"]["containers"][0] for at, template in pods(objects) if at == name)
    return found


def test_pods_have_no_more_than_they_need(objects: list[Object]) -> None:
    for name, template in pods(objects):
        spec, (only,) = template["spec"], template["spec"]["containers"]
        assert spec["automountServiceAccountToken"] is (name == "serving"), name
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert only["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= set(only["resources"]["requests"])
        assert "memory" in only["resources"]["limits"]


def test_a_rolling_update_takes_no_pod_away_before_its_successor_is_ready(minimal: list[Object]) -> None:
    for name, deployment in of(minimal, "Deployment").items():
        strategy = deployment["spec"]["strategy"]
        if name.endswith("-serving"):  # of two with other settings each would put right what the other applied
            assert strategy == {"type": "Recreate"}
        else:
            assert strategy["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}, name
        pod = deployment["spec"]["template"]["spec"]
        (only,) = pod["containers"]
        assert {only[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")} == {
            "/health"
        }
        pause_s = only["lifecycle"]["preStop"]["sleep"]["seconds"] if component(deployment) in ("api", "gateway") else 0
        assert pod["terminationGracePeriodSeconds"] - pause_s > 25  # the longest drain of any of them


def test_a_changed_setting_replaces_the_pods(helm: Helm, minimal: list[Object]) -> None:
    changed = of(helm.render("minimal", sets=["logLevel=debug"]), "Deployment")
    for name, deployment in of(minimal, "Deployment").items():
        before, after = (
            one["spec"]["template"]["metadata"]["annotations"]["checksum/config"] for one in (deployment, changed[name])
        )
        assert before != after


def test_what_is_scaled_has_no_replicas_of_its_own(objects: list[Object]) -> None:
    scaled = of(objects, "ScaledObject")
    for name, deployment in of(objects, "Deployment").items():
        assert ("replicas" in deployment["spec"]) is (name not in scaled), name


def test_consumers_scale_by_the_lag_of_what_they_read_up_to_its_partitions(helm: Helm) -> None:
    everything = [f"consumers.{name}.scale.enabled=true" for name in CONSUMERS]
    objects = helm.render("minimal", sets=[*everything, "kafka.partitions=6"])
    scaled = of(objects, "ScaledObject")
    assert set(scaled) == {f"mini-studio-{name}" for name in CONSUMERS}
    for name, consumer in CONSUMERS.items():
        (trigger,) = scaled[f"mini-studio-{name}"]["spec"]["triggers"]
        assert trigger["metadata"]["consumerGroup"] == consumer.group
        assert (trigger["metadata"]["topic"],) == tuple(topic.value for topic in READERS[name])
        assert scaled[f"mini-studio-{name}"]["spec"]["maxReplicaCount"] == 6


def test_keda_logs_in_to_kafka_as_the_studio_does(helm: Helm) -> None:
    objects = helm.render("secure")
    for scaled in of(objects, "ScaledObject").values():
        (trigger,) = scaled["spec"]["triggers"]
        assert trigger["metadata"]["tls"] == "enable"
        assert trigger["metadata"]["sasl"] == "scram_sha512"
        login = of(objects, "TriggerAuthentication")[trigger["authenticationRef"]["name"]]["spec"]
        assert {one["parameter"]: one["name"] for one in login["secretTargetRef"]} == {
            "username": "mini-studio-kafka",
            "password": "mini-studio-kafka",
        }
        assert login["configMapTargetRef"] == [{"parameter": "ca", "name": "kafka-ca", "key": "ca.crt"}]


def test_the_models_root_is_written_by_training_and_read_by_the_others(minimal: list[Object]) -> None:
    seen = {}
    for name, template in pods(minimal):
        mounts = {
            mount["name"]: mount.get("readOnly", False)
            for mount in template["spec"]["containers"][0].get("volumeMounts", ())
        }
        seen[name] = {root: "ro" if mounts[root] else "rw" for root in ("models", "dfs") if root in mounts}
    assert seen.pop("ray-head") == seen.pop("ray-worker") == {"models": "rw", "dfs": "ro"}
    assert {name: roots for name, roots in seen.items() if roots} == {
        "api": {"models": "ro", "dfs": "rw"},
        "datasets": {"dfs": "rw"},
        "training": {"models": "rw"},
        "serving": {"models": "ro"},
    }


def test_both_namespaces_bind_the_same_files(helm: Helm) -> None:
    objects = helm.render("minimal")
    volumes = [volume for volume in of(objects, "PersistentVolume").values() if "models" in volume["metadata"]["name"]]
    assert [volume["spec"]["nfs"] for volume in volumes] == [{"server": "files.example", "path": "/models"}] * 2
    assert {volume["spec"]["claimRef"]["namespace"] for volume in volumes} == {"studio", MODELS}
    assert {volume["spec"]["persistentVolumeReclaimPolicy"] for volume in volumes} == {"Retain"}
    claims = [
        (one["metadata"]["namespace"], one["metadata"]["name"])
        for one in objects
        if one["kind"] == "PersistentVolumeClaim"
    ]
    for volume in volumes:
        assert (volume["spec"]["claimRef"]["namespace"], volume["spec"]["claimRef"]["name"]) in claims


def test_policies_let_through_what_is_needed_and_nothing_else(minimal: list[Object]) -> None:
    """Rendered policies, read as a network plugin reads them: there is none on the tests' cluster."""
    policies = Policies(minimal, "studio")
    studio = {
        name: ("studio", {"app.kubernetes.io/instance": "mini-studio", **template["metadata"]["labels"]})
        for name, template in pods(minimal)
    }
    model = (MODELS, {"mini-studio.io/release": "vllm-base-x"})
    prometheus, stranger = ("monitoring", {"app": "prometheus"}), ("default", {"app": "other"})
    ingress = ("ingress", {"app": "nginx"})

    outside = {"kafka": 9092, "mongo": 27017, "s3": 443, "kubernetes": 6443}
    needs: dict[str, set[str]] = {
        "api": {"kafka", "mongo", "s3"},
        "datasets": {"kafka", "mongo", "s3"},
        "prepare": {"kafka", "mongo", "s3"},
        "serving": {"kafka", "mongo", "s3", "kubernetes"},  # 443 is the API server's port, too
        "gateway": {"kafka"},
        **{name: {"kafka", "mongo"} for name in ("training", "jobs", "usage", "routes", "relay")},
        **{name: set() for name in ("ray-head", "ray-worker", "test")},
    }
    for name, pod in studio.items():
        assert {what for what, port in outside.items() if policies.leaves(pod, port)} == needs[name], name
        assert policies.passes(pod, ("kube-system", {"k8s-app": "kube-dns"}), 53), name
        assert not policies.passes(stranger, pod, 8080), name
        port = "http" if name in STUDIO else 8265
        assert policies.passes(prometheus, pod, port) is (name in STUDIO), name
        assert policies.passes(ingress, pod, port) is (name in ("api", "gateway")), name
        assert policies.passes(pod, studio["ray-head"], 8265) is (
            name in ("api", "training", "ray-head", "ray-worker")
        ), name
        assert policies.passes(pod, studio["ray-head"], 6379) is (name in ("ray-head", "ray-worker")), name
    # the driver's own policy of a deployment opens the other side for the gateway
    assert {name for name, pod in studio.items() if policies.lets_out(pod, model, 8000)} == {"gateway"}
    assert not policies.passes(stranger, model, 8000)
    assert not policies.leaves(model, 443)


def test_ray_wants_its_token(minimal: list[Object]) -> None:
    for name, template in pods(minimal):
        if name.startswith("ray"):
            given = environment(template, minimal)
            assert given["RAY_AUTH_MODE"] == "token"
            assert given["RAY_AUTH_TOKEN"] == "secret mini-studio-ray/token"


def test_gpus_are_asked_for_where_values_say_so(helm: Helm) -> None:
    objects = helm.render("gpu")
    templates = dict(pods(objects))
    assert templates["ray-worker"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in templates["ray-head"]["spec"]["containers"][0]["resources"]["limits"]
    assert templates["ray-worker"]["spec"]["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert "nodeSelector" not in templates["ray-head"]["spec"]


def test_what_is_off_is_not_there(helm: Helm) -> None:
    objects = helm.render("small")
    kinds = {found["kind"] for found in objects}
    assert not kinds & {
        "ScaledObject",
        "TriggerAuthentication",
        "RayCluster",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "Namespace",
    }
    (ingress,) = of(objects, "Ingress").values()
    paths = {path["path"]: path["backend"]["service"]["name"] for path in ingress["spec"]["rules"][0]["http"]["paths"]}
    asking = ("/inference/infer", "/v1/chat/completions", "/v1/completions", "/v1/embeddings")
    assert paths == {**dict.fromkeys(asking, "mini-studio-gateway"), "/": "mini-studio-api"}
    (monitor,) = of(objects, "ServiceMonitor").values()
    (scraped,) = [one for one in of(objects, "Service").values() if component(one) == "metrics"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= scraped["metadata"]["labels"].items()
    for name, template in pods(objects):
        if name in STUDIO:
            assert scraped["spec"]["selector"].items() <= template["metadata"]["labels"].items()
            assert "prometheus.io/scrape" not in template["metadata"]["annotations"]  # or all load would count twice


@contextmanager
def answering(body: bytes) -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/health"
        server.shutdown()


def test_the_helm_test_tells_a_well_studio_from_a_degraded_one(minimal: list[Object]) -> None:
    only = container("test", minimal)
    python, *command = only["command"]
    assert python == "python"
    assert only["args"] == ["http://mini-studio-api:8000/health", "http://mini-studio-gateway:8000/health"]
    with answering(b'{"status": "ok"}') as well, answering(b'{"status": "degraded", "problems": {}}') as degraded:
        assert subprocess.run([sys.executable, *command, well, well], check=False).returncode == 0
        assert subprocess.run([sys.executable, *command, well, degraded], check=False).returncode == 1
