"""What tests ask of the chart's objects."""

from collections.abc import Iterator, Mapping
from typing import Any

Object = dict[str, Any]


def of(objects: list[Object], kind: str) -> dict[str, Object]:
    """Name -> object."""
    return {found["metadata"]["name"]: found for found in objects if found["kind"] == kind}


def component(found: Object) -> str:
    return str(found["metadata"]["labels"].get("app.kubernetes.io/component", ""))


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Component -> template of every pod there will be, Ray's included."""
    for found in objects:
        spec = found.get("spec", {})
        if found["kind"] in ("Deployment", "Job"):
            yield component(found), spec["template"]
        if found["kind"] == "RayCluster":
            yield "ray-head", spec["headGroupSpec"]["template"]
            for group in spec["workerGroupSpecs"]:
                yield "ray-worker", group["template"]


def environment(template: Object, objects: list[Object]) -> dict[str, str]:
    """Of the pod's only container. A secret is `secret <name>/<key>`, MongoDB's a URL; an authority's file is one that exists here."""
    (container,) = template["spec"]["containers"]
    known: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        known |= of(objects, "ConfigMap")[source["configMapRef"]["name"]]["data"]
    for variable in container.get("env", ()):
        secret = variable.get("valueFrom", {}).get("secretKeyRef")
        known[variable["name"]] = f"secret {secret['name']}/{secret['key']}" if secret else variable["value"]
    known |= {name: __file__ for name in known if name.endswith("__CA_FILE")}
    if "MINI_STUDIO_RECORDS__MONGO_URL" in known:
        known["MINI_STUDIO_RECORDS__MONGO_URL"] = "mongodb://mongo.mongo.svc"
    return known


class Policies:
    """What network policies let through, as a cluster's network plugin would read them.

    Pods are (namespace, labels). Namespaces have the label of their name alone. Addresses outside of the cluster are not looked at.
    """

    def __init__(self, objects: list[Object], namespace: str) -> None:
        self._policies = [
            (found["metadata"].get("namespace", namespace), found["spec"])
            for found in objects
            if found["kind"] == "NetworkPolicy"
        ]

    def passes(
        self, source: tuple[str, Mapping[str, str]], target: tuple[str, Mapping[str, str]], port: object
    ) -> bool:
        """Whether `source` may leave to, and `target` let in, this port (of the target by number or name)."""
        return self.lets_out(source, target, port) and self._side("Ingress", target, source, port)

    def lets_out(
        self, source: tuple[str, Mapping[str, str]], target: tuple[str, Mapping[str, str]], port: object
    ) -> bool:
        return self._side("Egress", source, target, port)

    def leaves(self, source: tuple[str, Mapping[str, str]], port: int) -> bool:
        """Whether `source` may call this port somewhere outside of the cluster, if only within a range."""
        rules = self._rules("Egress", source)
        return rules is None or any(_has_port(rule, port) and _outside(rule.get("to")) for rule in rules)

    def _rules(self, direction: str, pod: tuple[str, Mapping[str, str]]) -> list[Object] | None:
        """None: nothing selects the pod, so all is allowed."""
        chosen = [
            spec
            for namespace, spec in self._policies
            if namespace == pod[0] and selects(spec["podSelector"], pod[1]) and direction in spec["policyTypes"]
        ]
        return [rule for spec in chosen for rule in spec.get(direction.lower(), ())] if chosen else None

    def _side(
        self, direction: str, pod: tuple[str, Mapping[str, str]], peer: tuple[str, Mapping[str, str]], port: object
    ) -> bool:
        rules = self._rules(direction, pod)
        named = "to" if direction == "Egress" else "from"
        return rules is None or any(_has_port(rule, port) and _is_peer(rule.get(named), peer, pod[0]) for rule in rules)


def selects(selector: Object, labels: Mapping[str, str]) -> bool:
    by_name = all(labels.get(name) == value for name, value in selector.get("matchLabels", {}).items())
    return by_name and all(
        labels.get(wanted["key"]) in wanted["values"] for wanted in selector.get("matchExpressions", ())
    )


def _has_port(rule: Object, port: object) -> bool:
    # both sides of a call are asked about one port: its name stands for its number
    return "ports" not in rule or any(_number(found["port"]) == _number(port) for found in rule["ports"])


def _number(port: object) -> object:
    return 8000 if port == "http" else port


def _is_peer(peers: list[Object] | None, pod: tuple[str, Mapping[str, str]], own: str) -> bool:
    if not peers:
        return True
    name = {"kubernetes.io/metadata.name": pod[0]}
    return any(
        (selects(peer["namespaceSelector"], name) if "namespaceSelector" in peer else pod[0] == own)
        and selects(peer.get("podSelector", {}), pod[1])
        for peer in peers
        if "ipBlock" not in peer
    )


def _outside(peers: list[Object] | None) -> bool:
    return not peers or any("ipBlock" in peer for peer in peers)
