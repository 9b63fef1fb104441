"""The REST application behind a real server, asked by the unmodified `openai` package; what other processes do is done here by hand."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import openai
import pytest
from fastapi import FastAPI

from api.app import create_app
from consumers import jobs, routes
from events.base import Envelope, Event
from events.deployments import DeploymentApplied, DeploymentReady
from events.fine_tuning import FineTuneProgressed, FineTuneQueued, FineTuneStarted, FineTuneSucceeded
from mini_studio.drivers.dfs import DfsStore
from mini_studio.records.deployments import Deployment
from mini_studio.settings import Api, Kafka, Settings
from mini_studio.wiring import Studio
from tests.api.conftest import served
from tests.fakes.broker import free_port

T = TypeVar("T")
WEIGHTS = "/models/acme/{}/model"


@dataclass
class Elsewhere:
    """The processes beside the API: what they decide, and how its records and routes come to know."""

    app: FastAPI

    @property
    def studio(self) -> Studio:
        found: Studio = self.app.state.studio
        return found

    async def publish(self, *envelopes: Envelope[Any]) -> None:
        """Journal the events and hand them to the consumers that project them."""
        await self.studio.store.journal([envelope.stored() for envelope in envelopes])
        for envelope in envelopes:
            consumer = jobs if envelope.topic == "mini-studio.fine-tunes" else routes
            await consumer.project([envelope], self.studio)

    async def say(self, id: str, *events: Event) -> None:
        """What one source says next of an aggregate."""
        history = [*await self.studio.jobs.history(id), *await self.studio.deployments.history(id)]
        await self.studio.store.journal([e.stored() for e in history])  # as the relay does, before anybody answers
        last = max((e.sequence for e in history if e.source == events[0].SOURCE), default=0)
        cause = history[0].follows()
        await self.publish(
            *(
                Envelope.of(event, subject=id, sequence=number, client_code="acme", cause=cause)
                for number, event in enumerate(events, start=last + 1)
            )
        )

    async def train(self, id: str) -> None:
        """One attempt that succeeds."""
        job = await self.studio.jobs.get("acme", id)
        assert job is not None
        about: dict[str, Any] = {"job_id": id, "attempt": 1}
        await self.say(
            id,
            FineTuneQueued(job_id=id, attempt=0),
            FineTuneStarted(**about, submission_id=f"{id}-1"),
            FineTuneProgressed(**about, tokens=30, truncated_rows=0),
            FineTuneProgressed(**about, step=1, total_steps=2, epoch=0.5, train_loss=0.75),
            FineTuneProgressed(**about, step=2, total_steps=2, epoch=1.0, train_loss=0.5),
            FineTuneSucceeded(
                **about,
                fine_tuned_model=job.fine_tuned_model,
                fine_tuned_weights_path=WEIGHTS.format(id),
                train_loss=0.5,
                steps=2,
                tokens=30,
            ),
        )

    async def deployments(self) -> list[Deployment]:
        return await self.studio.deployments.where("acme")

    async def serve(self, deployment: Deployment, *, ready: bool = True) -> None:
        """Serving has applied it, and it answers."""
        about: dict[str, Any] = {"deployment_id": deployment.id, "generation": 1, "name": deployment.name}
        await self.say(deployment.id, DeploymentApplied(**about))
        if ready:
            await self.say(deployment.id, DeploymentReady(**about, endpoints=["http://127.0.0.1:9"], replicas=1))
        await self.feed()

    async def feed(self) -> None:
        """Bring the routes to this gateway."""
        self.app.state.routes.loaded = True
        for record in await self.studio.routes.where("*"):
            self.app.state.routes.put(record.id, record.route, record.revision)

    async def requested(self, id: str) -> list[str]:
        """Types of all that was decided of the aggregate, what waits to be published included."""
        return [envelope.type for envelope in await self.studio.deployments.history(id)]


class Bucket(DfsStore):
    """A folder in S3's place; both pass the contract suite of blob stores."""

    def location(self, key: str) -> str:
        return f"s3://bucket/{key}"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        data=tmp_path, kafka=Kafka(bootstrap=f"127.0.0.1:{free_port()}"), api=Api(max_body_bytes=1024 * 1024)
    )


@pytest.fixture
def app(settings: Settings) -> FastAPI:
    return create_app(settings)


@pytest.fixture
async def url(app: FastAPI, tmp_path: Path) -> AsyncIterator[str]:
    async with served(app) as address:
        app.state.studio.s3 = Bucket(tmp_path / "s3")
        yield address


@pytest.fixture
def elsewhere(app: FastAPI, url: str) -> Elsewhere:
    return Elsewhere(app)


def client_for(url: str, organization: str | None = "acme", **options: Any) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", organization=organization, timeout=20, **{"max_retries": 0, **options}
    )


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return client_for(url)


async def ask(call: Callable[[], T]) -> T:
    """Ask with the blocking client, away from the loop that answers it."""
    return await asyncio.to_thread(call)
