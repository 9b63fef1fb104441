"""The chart on a real control plane: installed, tried, upgraded, removed; and what its accounts may and may not do.

Nothing runs in the pods there (their kubelets are simulated), no network plugin reads the policies, and KubeRay is its definitions alone.
"""

import asyncio
import base64
import json
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from events.types import DeploymentKind
from mini_studio.drivers.kubernetes.api import DEPLOYMENT as DEPLOYMENTS
from mini_studio.drivers.kubernetes.api import KubeApi
from mini_studio.drivers.kubernetes.driver import KubernetesDriver
from mini_studio.drivers.ports import ReleaseSpec, ReleaseState
from mini_studio.errors import Refused
from mini_studio.settings import Settings
from tests.contracts.test_serving_driver import DEPLOYMENT, Bench
from tests.fakes.broker import free_port
from tests.fakes.helm import CHART, Helm, options
from tests.fakes.real_kubernetes import RealKubernetes
from tests.fakes.running import Running
from tests.fakes.waiting import until
from tests.install.rendered import Object, environment, of, pods
from tests.install.test_helm_values import NAMES

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

RELEASE = "mini-studio"
RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"
KINDS = {
    "configmaps": "api/v1",
    "services": "api/v1",
    "deployments": "apis/apps/v1",
    "poddisruptionbudgets": "apis/policy/v1",
    "networkpolicies": "apis/networking.k8s.io/v1",
    "scaledobjects": "apis/keda.sh/v1alpha1",
}
"""What the serving consumer applies."""
VERBS = {"get", "list", "watch", "create", "patch", "delete"}


@dataclass
class Installed:
    """A release in a namespace of its own, where only restricted pods may run."""

    helm: Helm
    cluster: RealKubernetes
    namespace: str
    values: str = "minimal"

    @property
    def models(self) -> str:
        return f"{self.namespace}-models"

    @property
    def options(self) -> list[str]:
        return [str(CHART), "-n", self.namespace, *options([self.values], [f"modelsNamespace.name={self.models}"])]

    def objects(self) -> list[Object]:
        return self.helm.render(self.values, sets=[f"modelsNamespace.name={self.models}"], namespace=self.namespace)

    def install(self) -> str:
        self.cluster.kubectl("label", "namespace", self.namespace, RESTRICTED)
        return self.helm.run("install", RELEASE, *self.options, "--wait", "--timeout", "150s")

    def uninstall(self) -> str:
        return self.helm.run("uninstall", RELEASE, "-n", self.namespace, "--wait", "--timeout", "100s")

    def token(self, component: str) -> str:
        account = f"{RELEASE}-{component}"
        return self.cluster.kubectl("create", "token", account, "-n", self.namespace, "--duration=1h").strip()


class Caller:
    """Requests to the API server with a service account's token and nothing else."""

    def __init__(self, cluster: RealKubernetes, token: str) -> None:
        (known,) = yaml.safe_load(cluster.kubeconfig.read_text())["clusters"]
        trusted = ssl.create_default_context(
            cadata=base64.b64decode(known["cluster"]["certificate-authority-data"]).decode()
        )
        headers = {"Authorization": f"Bearer {token}"}
        self._client = httpx.Client(base_url=known["cluster"]["server"], verify=trusted, headers=headers, timeout=30)

    def ask(self, method: str, path: str, body: Object | None = None, **headers: str) -> httpx.Response:
        kind = "application/apply-patch+yaml" if method == "PATCH" else "application/json"
        return self._client.request(method, path, json=body, headers={"Content-Type": kind, **headers})

    def rules(self, namespace: str) -> set[tuple[str, str, str]]:
        """(group, resource, verb) of all that it may do there, as the API server sees it."""
        path = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews"
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectRulesReview",
            "spec": {"namespace": namespace},
        }
        answer = self.ask("POST", path, body)
        assert answer.status_code == 201
        return {
            (group, resource, verb)
            for rule in answer.json()["status"]["resourceRules"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }


@pytest.fixture(scope="module")
def installed(helm: Helm, real_cluster: RealKubernetes) -> Iterator[Installed]:
    with real_cluster.namespace() as namespace:
        release = Installed(Helm(helm.binary, real_cluster.kubeconfig), real_cluster, namespace)
        assert "helm test mini-studio" in release.install()
        yield release
        release.uninstall()


def test_install_waits_for_all_of_it(installed: Installed) -> None:
    rendered = installed.objects()
    deployments = {
        found["metadata"]["name"]: found for found in installed.cluster.get("deployments", installed.namespace)
    }
    assert set(deployments) == set(of(rendered, "Deployment"))
    assert all(found["status"]["availableReplicas"] == found["spec"]["replicas"] for found in deployments.values())
    claims = [*installed.cluster.get("pvc", installed.namespace), *installed.cluster.get("pvc", installed.models)]
    assert len(claims) == 3
    assert {claim["status"]["phase"] for claim in claims} == {"Bound"}
    assert not installed.cluster.get("jobs", installed.namespace)  # the hook has done its work and is gone


def test_helm_test_passes(installed: Installed) -> None:
    assert "Phase:          Succeeded" in installed.helm.run("test", RELEASE, "-n", installed.namespace)


@pytest.mark.parametrize("values", NAMES)
def test_the_api_server_takes_every_object_of_every_value_set(
    helm: Helm, real_cluster: RealKubernetes, values: str
) -> None:
    with real_cluster.namespace() as namespace, real_cluster.namespace() as models:
        rendered = helm.render(values, sets=[f"modelsNamespace.name={models}"], namespace=namespace)
        # the Prometheus operator's kinds are not known there
        known = [found for found in rendered if found["kind"] != "ServiceMonitor"]
        for found in known:
            if found["kind"] not in ("Namespace", "PersistentVolume"):
                found["metadata"].setdefault("namespace", namespace)
        given = json.dumps({"apiVersion": "v1", "kind": "List", "items": known})
        said = real_cluster.kubectl(
            "apply", "--server-side", "--force-conflicts", "--dry-run=server", "-f", "-", given=given
        )
        assert said.count("(server dry run)") == len(known)


@pytest.mark.parametrize("values", NAMES)
def test_pods_pass_the_restricted_standard(installed: Installed, values: str) -> None:
    """Ray's, too, which the operator makes of the same templates."""
    made = [pod_of(name, template) for name, template in pods(installed.helm.render(values))]
    assert len(try_to_create(made, installed)) == len(made)


def test_a_pod_without_its_security_context_would_not_pass(installed: Installed) -> None:
    pod = pod_of(*next(pods(installed.objects())))
    pod["spec"]["securityContext"] = {}
    with pytest.raises(subprocess.CalledProcessError) as refused:
        try_to_create([pod], installed)
    assert 'violates PodSecurity "restricted' in refused.value.stderr


def pod_of(name: str, template: Object) -> Object:
    metadata = {**template["metadata"], "name": f"try-{name}"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {**template["spec"], "serviceAccountName": "default"},
    }


def try_to_create(made: list[Object], installed: Installed) -> list[str]:
    given = json.dumps({"apiVersion": "v1", "kind": "List", "items": made})
    return installed.cluster.kubectl(
        "create", "-n", installed.namespace, "--dry-run=server", "-o", "name", "-f", "-", given=given
    ).split()


@pytest.fixture
async def serving(
    installed: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Any:
    """The driver as the serving consumer of the chart has it: its environment, its account's token."""
    rendered = installed.objects()
    template = next(template for name, template in pods(rendered) if name == "serving")
    with monkeypatch.context() as process:
        for variable, value in environment(template, rendered).items():
            if variable.startswith("MINI_STUDIO_"):
                process.setenv(variable, value)
        process.setenv("MINI_STUDIO_SERVING__KUBERNETES__RUNTIME", request.param)
        process.setenv("MINI_STUDIO_SERVING__KUBERNETES__KUBECONFIG", str(kubeconfig(installed, tmp_path)))
        settings = Settings()
    driver = KubernetesDriver(tmp_path, settings.serving)
    yield Bench(driver, tmp_path, tmp_path)
    await driver.aclose()


def kubeconfig(installed: Installed, folder: Path) -> Path:
    known = yaml.safe_load(installed.cluster.kubeconfig.read_text())
    for user in known["users"]:
        user["user"] = {"token": installed.token("serving")}
    file = folder / "kubeconfig"
    file.write_text(yaml.safe_dump(known))
    return file


@pytest.mark.parametrize("serving", ["vllm", "studio"], indirect=True)
async def test_the_serving_account_does_the_drivers_whole_job(serving: Bench, installed: Installed) -> None:
    """In a namespace with the restricted standard: apply, follow, change, repair, list, remove."""
    weights = serving.models_root / "acme" / "weights"
    weights.mkdir(parents=True)
    spec = serving.spec("vllm-ft-acme-tiny", kind=DeploymentKind.FINE_TUNED, client_code="acme", weights_path=weights)
    assert (await serving.settle(spec.name, spec)).state is ReleaseState.READY
    newer = serving.spec(**{**vars(spec), "generation": 2, "max_replicas": 3})
    assert (await serving.settle(spec.name, newer)).generation == 2
    installed.cluster.kubectl("delete", "service", spec.name, "-n", installed.models)
    await reapplied(serving, newer, installed)
    assert [report.name async for report in serving.driver.list()] == [spec.name]
    await serving.remove(spec.name, DEPLOYMENT, 2)
    for kind in KINDS:
        left = installed.cluster.get(kind, installed.models)
        assert spec.name not in [found["metadata"]["name"] for found in left]


async def reapplied(serving: Bench, spec: ReleaseSpec, installed: Installed) -> None:
    for _ in range(100):
        await serving.driver.apply(spec)
        if spec.name in [found["metadata"]["name"] for found in installed.cluster.get("services", installed.models)]:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the service never came back")


def test_the_serving_consumer_does_its_whole_job_with_that_account(installed: Installed, tmp_path: Path) -> None:
    """A whole studio here, whose consumer `serving`, a process of its own, has nothing of the cluster but that account's token."""
    kubernetes = {
        "NAMESPACE": installed.models,
        "KUBECONFIG": str(kubeconfig(installed, tmp_path)),
        "RUNTIME": "studio",
    }
    studio = Running(
        tmp_path / "studio",
        free_port(),
        {
            "MINI_STUDIO_TRAINING__RAY_ADDRESS": "http://127.0.0.1:1",  # nobody trains here
            "MINI_STUDIO_SERVING__DRIVER": "kubernetes",
            **{f"MINI_STUDIO_SERVING__KUBERNETES__{name}": value for name, value in kubernetes.items()},
        },
    )
    studio.start()
    try:
        name = studio.call("POST", "/inference/deploy/base", json={"model_id": "tiny-llama", "gpu_count": 0})[
            "deployment"
        ]
        view = f"/inference/deployments/{name}"
        studio.until(lambda: studio.call("GET", view, 200)["deployment"]["status"] == "ready", 60)
        for kind in ("services", "deployments"):
            installed.cluster.kubectl("delete", kind, name, "-n", installed.models)
            studio.until(lambda kind=kind: name in names_of(installed, kind), 30)  # type: ignore[misc]
        studio.until(lambda: studio.call("GET", view, 200)["deployment"]["status"] == "ready", 60)
        studio.call("DELETE", view, 202)
        studio.until(lambda: studio.call("GET", view, 200)["deployment"]["status"] == "removed", 60)
        for kind in KINDS:
            assert name not in names_of(installed, kind)
    finally:
        studio.stop()


def names_of(installed: Installed, kind: str) -> list[str]:
    return [found["metadata"]["name"] for found in installed.cluster.get(kind, installed.models)]


def test_the_serving_account_has_exactly_its_role(installed: Installed) -> None:
    anybody = Caller(
        installed.cluster, installed.cluster.kubectl("create", "token", "default", "-n", installed.namespace).strip()
    )
    serving = Caller(installed.cluster, installed.token("serving"))
    groups = {"configmaps": "", "services": ""} | {
        kind: root.split("/")[1] for kind, root in KINDS.items() if root != "api/v1"
    }
    applied = {(group, kind, verb) for kind, group in groups.items() for verb in VERBS}
    looked_at = {("", "pods", verb) for verb in ("get", "list", "watch")}
    assert serving.rules(installed.models) - anybody.rules(installed.models) == applied | looked_at
    for namespace in (installed.namespace, "default", "kube-system"):
        assert serving.rules(namespace) == anybody.rules(namespace)


@pytest.mark.parametrize("component", ["api", "gateway", "datasets", "training", "jobs", "routes", "relay", "ray"])
def test_the_other_accounts_have_no_rights(installed: Installed, component: str) -> None:
    anybody = Caller(
        installed.cluster, installed.cluster.kubectl("create", "token", "default", "-n", installed.namespace).strip()
    )
    account = Caller(installed.cluster, installed.token(component))
    for namespace in (installed.namespace, installed.models, "kube-system"):
        assert account.rules(namespace) == anybody.rules(namespace)
        assert not {resource for _, resource, _ in account.rules(namespace)} & {*KINDS, "pods", "secrets"}


def refused_to_serving(namespace: str, models: str) -> list[tuple[str, str]]:
    """Requests that a consumer which was taken over would like to make."""
    there = f"/api/v1/namespaces/{models}"
    deployments = f"/apis/apps/v1/namespaces/{models}/deployments"
    roles = "/apis/rbac.authorization.k8s.io/v1"
    own = f"/api/v1/namespaces/{namespace}"
    return [
        ("GET", f"{there}/secrets"),
        ("GET", f"{there}/secrets/any"),
        ("POST", f"{there}/secrets"),
        ("POST", f"{there}/pods"),
        ("DELETE", f"{there}/pods/any"),
        ("POST", f"{there}/pods/any/exec?command=sh"),
        ("GET", f"{there}/pods/any/log"),
        ("POST", f"{there}/pods/any/portforward"),
        ("GET", f"{there}/services/any/proxy/health"),
        ("POST", f"{there}/serviceaccounts/default/token"),
        ("GET", f"{there}/persistentvolumeclaims"),
        ("DELETE", f"{there}/persistentvolumeclaims/mini-studio-models"),
        ("PUT", f"{deployments}/any"),
        ("DELETE", deployments),
        ("PATCH", f"{deployments}/any/scale"),
        ("POST", f"/apis/batch/v1/namespaces/{models}/jobs"),
        ("PATCH", f"/api/v1/namespaces/{models}"),
        ("DELETE", f"/api/v1/namespaces/{models}"),
        ("GET", f"{roles}/namespaces/{models}/rolebindings"),
        ("POST", f"{roles}/namespaces/{models}/rolebindings"),
        ("POST", f"{roles}/clusterrolebindings"),
        ("GET", f"{own}/secrets/mini-studio-mongo"),
        ("GET", f"{own}/configmaps"),
        ("GET", f"{own}/pods"),
        ("PATCH", f"/apis/apps/v1/namespaces/{namespace}/deployments/mini-studio-api"),
        ("GET", "/api/v1/namespaces/kube-system/secrets"),
        ("GET", "/api/v1/namespaces"),
        ("GET", "/api/v1/nodes"),
        ("GET", "/api/v1/secrets"),
        ("GET", "/apis/apps/v1/deployments"),
    ]


@pytest.mark.parametrize("component", ["serving", "api"])
def test_what_no_account_needs_is_refused(installed: Installed, component: str) -> None:
    caller = Caller(installed.cluster, installed.token(component))
    asked = refused_to_serving(installed.namespace, installed.models)
    if component == "api":
        asked += [
            (method, f"/{root}/namespaces/{installed.models}/{kind}{name}")
            for kind, root in KINDS.items()
            for method, name in [
                ("GET", ""),
                ("GET", "/any"),
                ("POST", ""),
                ("PATCH", "/any?fieldManager=x"),
                ("DELETE", "/any"),
            ]
        ]
        asked += [("GET", f"/api/v1/namespaces/{installed.models}/pods")]
    body: Object = {"apiVersion": "v1", "kind": "Any", "metadata": {"name": "any"}}
    answers = {
        (method, path): caller.ask(method, path, None if method == "GET" else body).status_code
        for method, path in asked
    }
    assert set(answers.values()) == {403}, {request: status for request, status in answers.items() if status != 403}
    assert caller.ask("GET", "/api/v1/namespaces", **{"Impersonate-User": "admin"}).status_code == 403


async def test_the_driver_says_what_an_account_without_the_role_may_not_do(
    installed: Installed, tmp_path: Path
) -> None:
    known = yaml.safe_load(installed.cluster.kubeconfig.read_text())
    known["users"][0]["user"] = {"token": installed.token("api")}
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(known))
    settings = Settings().serving.kubernetes
    there = settings.model_copy(update={"namespace": installed.models, "kubeconfig": tmp_path / "kubeconfig"})
    api = KubeApi(there)
    with pytest.raises(Refused, match=r"deployments\.apps is forbidden: User .*-api"):
        await api.list(DEPLOYMENTS, "app.kubernetes.io/managed-by=mini-studio")
    await api.aclose()


async def test_upgrade_and_uninstall_leave_what_they_say(helm: Helm, real_cluster: RealKubernetes) -> None:
    with real_cluster.namespace() as namespace:
        release = Installed(Helm(helm.binary, real_cluster.kubeconfig), real_cluster, namespace)
        release.install()
        before = {pod["metadata"]["name"] for pod in real_cluster.get("pods", namespace)}
        release.helm.run("upgrade", RELEASE, *release.options, "--set", "logLevel=debug", "--wait", "--timeout", "150s")
        await until(lambda: not before & {pod["metadata"]["name"] for pod in real_cluster.get("pods", namespace)}, 90)
        said = release.uninstall()
        assert "[PersistentVolumeClaim] mini-studio-dfs" in said

        def left() -> set[str]:
            kinds = "all,cm,sa,secret,pvc,pdb,netpol,role,rolebinding,scaledobject,raycluster,ingress"
            return set(real_cluster.kubectl("get", kinds, "-n", namespace, "-o", "name").split())

        own = {"configmap/kube-root-ca.crt", "serviceaccount/default", "persistentvolumeclaim/mini-studio-dfs"}
        await until(lambda: left() == own | {name for name in left() if name.startswith("secret/")}, 60)
        cluster_wide = real_cluster.kubectl("get", "namespace,pv", "-o", "name")
        assert f"namespace/{release.models}" not in cluster_wide
        assert f"{namespace}-mini-studio-models" not in cluster_wide
