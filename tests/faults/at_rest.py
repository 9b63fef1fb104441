"""Whether a studio has come to rest: what is still on its way, by its records alone. It must come to an end by itself."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

FOLLOWS = {
    "datasets": ("dataset_profiles", "datasets"),
    "jobs": ("training_runs", "training"),
    "deployments": ("releases", "serving"),
}
"""Which decider's records, and source of events, a projection follows."""


def moving(records: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """In words, of records by collection and id; nothing when all is over."""
    found = []
    for projection, (decider, source) in FOLLOWS.items():
        for id, record in records[projection].items():
            decided = records[decider].get(id, defaultdict(int))
            begun = decided["sequence"] or decided.get(
                "removed"
            )  # a deletion that was read first leaves nothing to decide
            if not begun or record["applied"].get(source, 0) != decided["sequence"]:
                found.append(f"{projection}/{id} has not followed {source}")
    found += [
        f"jobs/{id} has not ended"
        for id, job in records["jobs"].items()
        if job["status"] not in ("succeeded", "failed", "cancelled")
    ]
    found += [
        f"datasets/{id} is deleted, and its bytes are not removed"
        for id, dataset in records["datasets"].items()
        if dataset["state"] == "deleted" and not records["dataset_profiles"].get(id, {}).get("removed")
    ]
    for id, deployment in records["deployments"].items():
        release, route = records["releases"].get(id), records["routes"].get(id)
        wanted = (deployment["generation"], deployment["status"])
        if release is None or (release["generation"], release["status"]) != wanted:
            found.append(f"deployments/{id} is not as its release")
        elif deployment["status"] not in ("ready", "failed", "removed"):
            found.append(f"deployments/{id} is {deployment['status']}")
        elif route is None or route["revision"] != sum(deployment["applied"].values()):
            found.append(f"routes/{id} is not as its deployment")
    return found
