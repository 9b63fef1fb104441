"""The topics of the log. One per aggregate, keyed by aggregate id, so one aggregate's history stands in order in one partition."""

from enum import StrEnum


class Topic(StrEnum):
    DATASETS = "mini-studio.datasets"
    FINE_TUNES = "mini-studio.fine-tunes"
    DEPLOYMENTS = "mini-studio.deployments"


class Plain(StrEnum):
    """Topics that hold no events: not in the journal, not refilled, not replayed."""

    USAGE = "mini-studio.usage"
    """Batches of usage records (`events/usage.py`), keyed by the gateway process that they come from."""
    WAKEUPS = "mini-studio.wakeups"
    """Hints: a request waits at a gateway for the deployment whose id is the key, which sleeps. Kept for an hour."""


ROUTES = "mini-studio.routes"
"""Compacted, not events: the key is a route's key, the value the whole route, or nothing when the route is gone."""


def dead_letter_topic(topic: str, consumer: str) -> str:
    """Where `consumer` puts what it can never handle of `topic`, byte for byte."""
    return f"{topic}.{consumer}.dead"
