"""The real broker and the real S3 server, started as the studio starts them."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import aioboto3
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from botocore.config import Config
from botocore.exceptions import ClientError

from mini_studio.embedded import checks, ports, stack
from mini_studio.embedded.child import Child
from mini_studio.embedded.probe import Verdict, probe

KEYS = ("0123456789abcdef", secrets.token_hex(16))


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncIterator[stack.Stack]:
    data = checks.data_folder(tmp_path / "studio")
    block = ports.claim(None)
    built = stack.build(data, "127.0.0.1", 1, block, KEYS, data / "ray")
    environment = stack.environment(data, "test", built.settings)
    children = [Child(part, data / "logs", environment) for part in built.parts if part.needed_to_prepare]
    for child in children:
        child.start()
    async with asyncio.timeout(60):
        for child in children:
            while await probe(child.part.health) is not Verdict.HEALTHY:
                await asyncio.sleep(0.1)
    yield built
    for child in children:
        assert child.popen is not None
        child.popen.kill()
        child.popen.wait()
    block.release()


async def test_the_broker_speaks_kafka(parts: stack.Stack) -> None:
    address = parts.settings["kafka"]["bootstrap"]
    async with AIOKafkaProducer(bootstrap_servers=address, enable_idempotence=False) as producer:
        await producer.send_and_wait("greetings", b"hello")
    async with AIOKafkaConsumer("greetings", bootstrap_servers=address, auto_offset_reset="earliest") as consumer:
        message = await asyncio.wait_for(consumer.getone(), 60)
    assert message.value == b"hello"


async def test_s3_keeps_objects_and_asks_for_the_keys(parts: stack.Stack) -> None:
    s3 = parts.settings["s3"]
    config = Config(
        signature_version="s3v4", s3={"addressing_style": "path"}, response_checksum_validation="when_required"
    )
    session = aioboto3.Session(region_name="us-east-1")
    known = {"aws_access_key_id": s3["access_key"], "aws_secret_access_key": s3["secret_key"]}
    async with session.client("s3", endpoint_url=s3["endpoint"], config=config, **known) as client:
        await client.create_bucket(Bucket="bucket")
        await client.put_object(Bucket="bucket", Key="k", Body=b"bytes")
        answer = await client.get_object(Bucket="bucket", Key="k")
        assert await answer["Body"].read() == b"bytes"
    stranger = {**known, "aws_secret_access_key": "another-secret-key"}
    async with session.client("s3", endpoint_url=s3["endpoint"], config=config, **stranger) as client:
        with pytest.raises(ClientError):
            await client.list_objects_v2(Bucket="bucket")
