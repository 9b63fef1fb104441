"""From REST 201 to a subscriber: `python -m benchmarks.event_latency DATA [REQUESTS]`, against a running studio.

A plain aiokafka subscriber notes when each DatasetUploaded arrives; the client notes when it has the 201.
Prints the delay in ms (0 when the event was there before the answer was read), for a subscriber that waits as the
documentation advises and for one with aiokafka's default.
"""

import asyncio
import statistics
import sys
import time
from pathlib import Path

import httpx
from aiokafka import AIOKafkaConsumer, TopicPartition

from events.datasets import DatasetUploaded
from mini_studio.settings import Settings

ADVISED_MS, DEFAULT_MS = 20, 500
"""`fetch_max_wait_ms`. The embedded broker does not wake a waiting fetch when news come: half of the wait is the longest delay."""
ROW = b'{"prompt": "a", "completion": "b"}\n'


async def follow(consumer: AIOKafkaConsumer, seen: dict[str, float]) -> None:
    async for record in consumer:
        if dict(record.headers)["ce_type"] == DatasetUploaded.TYPE.encode():
            seen[record.key.decode()] = time.perf_counter()


async def measure(settings: Settings, count: int, fetch_wait_ms: int) -> list[float]:
    """Sorted delays in ms."""
    topic = DatasetUploaded.TOPIC.value
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka.bootstrap, auto_offset_reset="earliest", fetch_max_wait_ms=fetch_wait_ms
    )
    await consumer.start()
    consumer.assign([TopicPartition(topic, p) for p in consumer.partitions_for_topic(topic) or ()])
    seen: dict[str, float] = {}
    following = asyncio.create_task(follow(consumer, seen))
    answered: dict[str, float] = {}
    url = f"http://{settings.api.host}:{settings.api.port}/fine_tuning/upload-dataset/benchmark"
    async with httpx.AsyncClient(trust_env=False) as client:
        await asyncio.sleep(1)
        for _ in range(count):
            response = await client.post(url, files={"file": ("x.jsonl", ROW)})
            answered[response.json()["dataset_id"]] = time.perf_counter()
            await asyncio.sleep(0.1)
    await asyncio.sleep(1)
    following.cancel()
    await consumer.stop()
    return sorted(max(0.0, (seen[id] - at) * 1000) for id, at in answered.items())


async def main() -> None:
    settings = Settings(data=Path(sys.argv[1]))
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 100
    for wait in (ADVISED_MS, DEFAULT_MS):
        delays = await measure(settings, count, wait)
        p50, p99 = statistics.median(delays), delays[int(len(delays) * 0.99) - 1]
        print(
            f"fetch_max_wait_ms {wait}: {count} events, p50 {p50:.1f} ms, p99 {p99:.1f} ms, longest {delays[-1]:.1f} ms"
        )


if __name__ == "__main__":
    asyncio.run(main())
