"""Logs for one test alone: what others left on a shared one would be forged for this test's journal."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.broker import running_broker
from tests.fakes.real_kafka import own_kafka

BROKERS = ["embedded", pytest.param("real", marks=pytest.mark.real)]


@contextlib.contextmanager
def a_log(broker: str, folder: Path) -> Iterator[str]:
    """Bootstrap address of a fresh broker of that kind, with its data in `folder`; it ends with the context."""
    if broker == "embedded":
        with running_broker() as address:
            yield address
        return
    # session timeouts of a second or so make tests of a lost member quick
    with own_kafka(folder / "kafka", "group.min.session.timeout.ms=1000") as kafka:
        yield kafka.bootstrap
