"""TLS and users on a real Apache Kafka: every client of the studio gets in, and whoever does not hears why."""

import asyncio
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from events.fine_tuning import FineTuneRequested
from events.topics import ROUTES, Plain, Topic
from mini_studio.bus.connection import client_options
from mini_studio.bus.consumer import Consumer, start_broker
from mini_studio.bus.kafka import HINT_MS, USAGE_RETENTION_MS, Outgoing, Publisher, all_topics, create_topics
from mini_studio.bus.liveness import Liveness, within_reach
from mini_studio.bus.reading import read_whole
from mini_studio.bus.routes import RouteFeed, RouteTable
from mini_studio.errors import Unavailable
from mini_studio.records.jobs import Job
from mini_studio.settings import Kafka, Settings
from mini_studio.wiring import ended, open_studio
from tests.consumers.cases import a_requested_job
from tests.fakes import certificates
from tests.fakes.secured_kafka import SecuredKafka, secured_kafka
from tests.fakes.waiting import until

pytestmark = pytest.mark.real

WAYS = [
    ("ssl", None),
    ("sasl_plaintext", "PLAIN"),
    ("sasl_plaintext", "SCRAM-SHA-256"),
    ("sasl_ssl", "SCRAM-SHA-512"),
]


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredKafka]:
    made = certificates.made(tmp_path_factory.mktemp("certificates"))
    with secured_kafka(tmp_path_factory.mktemp("kafka"), made) as kafka:
        yield kafka


@pytest.mark.parametrize(("security", "mechanism"), WAYS)
async def test_every_client_of_the_studio_gets_in(
    secured: SecuredKafka, security: str, mechanism: str | None, tmp_path: Path
) -> None:
    settings = Settings(data=tmp_path, kafka=secured.settings(security, mechanism))
    consumer, seen = Consumer("jobs", group=f"test.{uuid.uuid4()}"), []

    @consumer.on(FineTuneRequested)
    async def keep(envelope: object, studio: object) -> None:
        seen.append(envelope)

    await create_topics(settings.kafka)
    async with open_studio(settings, relayed=[Job.COLLECTION]) as studio:
        broker = consumer.broker(settings.kafka, studio.publisher, studio)
        await asyncio.wait_for(start_broker(broker, settings.kafka), 20)
        await studio.jobs.insert(a_requested_job())
        await until(lambda: seen)
        liveness = Liveness(consumer, broker, settings.kafka)
        await liveness.look()
        assert (liveness.problem(), await within_reach(settings.kafka, consumer)) == (None, True)
        await broker.stop()
    assert [1 async for batch in read_whole(settings.kafka, [Topic.FINE_TUNES]) for _ in batch]
    feed = RouteFeed(settings.kafka, table := RouteTable(), lambda: 0)
    following = asyncio.create_task(feed.run())
    await until(lambda: table.loaded)
    await ended(following)


@pytest.mark.parametrize(
    ("security", "mechanism", "change", "said"),
    [
        ("sasl_ssl", "SCRAM-SHA-512", {"password": "another"}, "refuses user studio.*MINI_STUDIO_KAFKA__PASSWORD"),
        ("sasl_plaintext", "PLAIN", {"username": "nobody"}, "refuses user nobody.*MINI_STUDIO_KAFKA__USERNAME"),
        ("sasl_ssl", "PLAIN", {"ca_file": None}, "no TLS with.*MINI_STUDIO_KAFKA__CA_FILE"),
    ],
)
async def test_who_is_not_let_in_hears_why(
    secured: SecuredKafka, security: str, mechanism: str, change: dict[str, object], said: str
) -> None:
    settings = Kafka.model_validate({**secured.settings(security, mechanism).model_dump(), **change})
    with pytest.raises(Unavailable, match=said):
        await create_topics(settings)
    async with Publisher(settings) as publisher:
        with pytest.raises(Unavailable, match=said):
            await publisher.publish([Outgoing(Topic.DATASETS, b"key", b"value", [])])
    feed = RouteFeed(settings, RouteTable(), lambda: 0)
    following = asyncio.create_task(feed.run())
    await until(lambda: feed.problem)
    await ended(following)
    assert re.search(said, feed.problem or "")


async def test_topics_keep_events_for_ever_and_only_the_last_routes(secured: SecuredKafka) -> None:
    settings = secured.settings("ssl")
    await create_topics(settings)
    admin = AIOKafkaAdminClient(**client_options(settings))
    await admin.start()
    answers = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name) for name in all_topics()])
    await admin.close()
    configs = {found[3]: {entry[0]: entry[1] for entry in found[4]} for answer in answers for found in answer.resources}
    assert set(configs) == set(all_topics())
    for name, config in configs.items():
        kept_ms = {Plain.WAKEUPS.value: HINT_MS, Plain.USAGE.value: USAGE_RETENTION_MS}.get(name, -1)
        kept = {"cleanup.policy": "delete", "retention.ms": str(kept_ms)}
        expected = {"cleanup.policy": "compact"} if name == ROUTES else kept
        assert config.items() >= {**expected, "retention.bytes": "-1", "min.insync.replicas": "1"}.items(), name
