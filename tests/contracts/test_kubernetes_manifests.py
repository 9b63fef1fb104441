"""What a release's objects contain. That the API server takes them is seen in test_serving_driver and tests/kubernetes."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from events.types import DeploymentKind
from mini_studio.drivers.kubernetes.manifests import MANIFEST, Content, covers, manifests
from mini_studio.drivers.ports import ReleaseSpec
from mini_studio.errors import Refused
from mini_studio.settings import Kubernetes

WEIGHTS = "/models/acme/job_1/attempts/1/weights"
SPEC = ReleaseSpec(
    name="vllm-ft-acme-opt",
    deployment_id="dep_" + "1" * 24,
    generation=3,
    kind=DeploymentKind.FINE_TUNED,
    client_code="acme",
    model="ft:opt:acme:1",
    base_model="facebook/opt-125m",
    weights_path=Path(WEIGHTS),
    gpu_count=2,
    min_replicas=0,
    max_replicas=4,
    prometheus_threshold=2.5,
)


def made(spec: ReleaseSpec = SPEC, weights: str | None = WEIGHTS, **settings: Any) -> dict[str, Any]:
    found = manifests(spec, Content("/models", weights), Kubernetes(**settings), patience_s=900)
    return {kind.name: manifest for kind, manifest in found}


def pod(objects: dict[str, Any]) -> Any:
    return objects["Deployment"]["spec"]["template"]["spec"]


def test_every_object_says_whose_it_is() -> None:
    objects = made()
    assert list(objects) == [
        "ConfigMap",
        "Service",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "Deployment",
        "ScaledObject",
    ]
    for manifest in objects.values():
        assert manifest["metadata"]["name"] == SPEC.name
        about = {name: text for name, text in manifest["metadata"]["annotations"].items() if name != MANIFEST}
        weights = {"mini-studio.io/weights": WEIGHTS} if manifest["kind"] == "Deployment" else {}
        assert about == weights | {
            "mini-studio.io/deployment-id": SPEC.deployment_id,
            "mini-studio.io/generation": "3",
            "mini-studio.io/client-code": "acme",
            "mini-studio.io/model": "ft:opt:acme:1",
        }


def test_a_pod_may_do_nothing_but_serve() -> None:
    made_pod = pod(made())
    [container] = made_pod["containers"]
    assert made_pod["automountServiceAccountToken"] is False
    assert made_pod["securityContext"]["runAsNonRoot"] is True
    assert made_pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in made_pod["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert mounts["models"] == {"name": "models", "mountPath": "/models", "readOnly": True}
    assert volumes["models"]["persistentVolumeClaim"] == {"claimName": "mini-studio-models", "readOnly": True}
    assert volumes["predict"] == {"name": "predict", "configMap": {"name": SPEC.name}}
    assert volumes["cache"] == {"name": "cache", "emptyDir": {"sizeLimit": "50Gi"}}


def test_gpus_are_limits() -> None:
    [container] = pod(made())["containers"]
    assert container["resources"]["limits"] == {"memory": "8Gi", "nvidia.com/gpu": "2"}
    [container] = pod(made(replace(SPEC, gpu_count=0)))["containers"]
    assert container["resources"]["limits"] == {"memory": "8Gi"}


def test_a_hub_model_has_a_cache_and_no_models_root() -> None:
    base = replace(SPEC, kind=DeploymentKind.BASE, weights_path=None)
    objects = made(base, None, cache_claim="hub-cache", hub_egress=["0.0.0.0/0"])
    volumes = {volume["name"]: volume for volume in pod(objects)["volumes"]}
    assert "models" not in volumes
    assert volumes["cache"] == {"name": "cache", "persistentVolumeClaim": {"claimName": "hub-cache"}}
    assert len(objects["NetworkPolicy"]["spec"]["egress"]) == 2
    [container] = pod(objects)["containers"]
    assert container["args"][0] == "facebook/opt-125m"


def test_only_the_gateway_comes_in_and_only_names_go_out() -> None:
    policy = made(gateway_namespace="front", hub_egress=["0.0.0.0/0"])["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    [rule] = policy["ingress"]
    [source] = rule["from"]
    assert source["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "front"}}
    assert source["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "gateway"
    [egress] = policy["egress"]
    assert {port["port"] for port in egress["ports"]} == {53}


def test_replicas_are_the_autoscalers() -> None:
    objects = made()
    scaled = objects["ScaledObject"]["spec"]
    assert "replicas" not in objects["Deployment"]["spec"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (0, 4)
    assert scaled["initialCooldownPeriod"] == 900, "what has never answered does not sleep"
    assert scaled["fallback"] == {"failureThreshold": 3, "replicas": 1}
    [trigger] = scaled["triggers"]
    assert trigger["metadata"]["query"] == 'sum(mini_studio_gateway_requests{deployment="vllm-ft-acme-opt"})'
    assert (trigger["metadata"]["threshold"], trigger["metadata"]["activationThreshold"]) == ("2.5", "0")


def test_on_cpus_our_own_server_runs() -> None:
    objects = made(replace(SPEC, gpu_count=0), runtime="studio", server_image="registry.example/server:1")
    assert "ConfigMap" not in objects
    [container] = pod(objects)["containers"]
    assert container["image"] == "registry.example/server:1"
    assert f"--weights={WEIGHTS}" in container["args"]


@pytest.mark.parametrize("model", ["--trust-remote-code", "a b", "$(HOME)", "a\nb", ""])
def test_nothing_of_a_request_becomes_an_argument(model: str) -> None:
    with pytest.raises(Refused):
        made(replace(SPEC, model=model))
    with pytest.raises(Refused):
        made(replace(SPEC, base_model=model, weights_path=None), None)


def test_what_was_applied_is_found_in_what_the_server_makes_of_it() -> None:
    wanted = made(cpu="0.5")["Deployment"]
    live = copy.deepcopy(wanted)
    live["spec"]["replicas"] = 3
    live["status"] = {"replicas": 3}
    wanted["spec"]["selector"]["matchExpressions"] = []  # the server drops what is empty
    live["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"] = "500m"
    live["spec"]["template"]["spec"]["containers"].insert(0, {"name": "added", "image": "x"})
    assert covers(live, wanted)
    for change in ("image", "args", "securityContext"):
        edited = copy.deepcopy(live)
        edited["spec"]["template"]["spec"]["containers"][1][change] = "other"
        assert not covers(edited, wanted)
    edited = copy.deepcopy(live)
    edited["spec"]["template"]["spec"]["containers"][1]["args"].append("--more")
    assert not covers(edited, wanted)
