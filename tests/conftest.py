"""What all tests share: the real services of `make test-real`, and no silent skips where that was promised."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import real_kafka, real_kubernetes, real_mongo
from tests.fakes.real_kafka import RealKafka
from tests.fakes.real_kubernetes import RealKubernetes
from tests.fakes.real_mongo import RealMongo

NO_SKIP = "MINI_STUDIO_TEST_NO_SKIP"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """With `MINI_STUDIO_TEST_NO_SKIP=1` a skipped test is a failed one."""
    report = yield
    if os.environ.get(NO_SKIP) and report.skipped:
        report.outcome = "failed"
    return report


@pytest.fixture(scope="session")
def stoppable_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealKafka]:
    """A real broker that a test may kill and pause."""
    # session timeouts of a second or so make tests of a lost member quick
    with real_kafka.own_kafka(tmp_path_factory.mktemp("kafka"), "group.min.session.timeout.ms=1000") as kafka:
        yield kafka


@pytest.fixture(scope="session")
def real_bootstrap(request: pytest.FixtureRequest) -> str:
    """The address of a real broker."""
    given = os.environ.get(real_kafka.ADDRESS)
    if given:
        return given
    if real_kafka.script() is None:
        pytest.skip(real_kafka.HOW)
    kafka: RealKafka = request.getfixturevalue("stoppable_kafka")
    return kafka.bootstrap


@pytest.fixture(scope="session")
def stoppable_kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealKubernetes]:
    """A real control plane that a test may kill and pause, with KEDA, and KubeRay's definitions."""
    script = real_kubernetes.script()
    if script is None:
        pytest.skip(real_kubernetes.HOW_TO_STOP_IT)
    cluster = RealKubernetes.start(
        script, tmp_path_factory.mktemp("kubernetes"), {"KUBE_REAL_CRDS": "keda kuberay", "KUBE_REAL_NODES": "2"}
    )
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def real_cluster(request: pytest.FixtureRequest) -> RealKubernetes:
    """A real Kubernetes, as its administrator."""
    given = os.environ.get(real_kubernetes.KUBECONFIG)
    if given:
        return RealKubernetes(Path(given))
    if real_kubernetes.script() is None:
        pytest.skip(real_kubernetes.HOW)
    cluster: RealKubernetes = request.getfixturevalue("stoppable_kubernetes")
    return cluster


@pytest.fixture(scope="session")
def mongo_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a MongoDB, or of what speaks its protocol; a test takes a database of its own there."""
    given, script = os.environ.get(real_mongo.ADDRESS), real_mongo.script()
    if given:
        yield given
    elif script is None:
        pytest.skip(real_mongo.HOW)
    else:
        mongo = RealMongo.start(script, tmp_path_factory.mktemp("mongo"))
        yield mongo.url
        mongo.stop()


@pytest.fixture
def mongo_database(mongo_url: str) -> Iterator[str]:
    with real_mongo.own_database(mongo_url) as name:
        yield name
