"""`?as_of=<time>` on jobs and deployments: what the log says of that time."""

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from events.base import Envelope, Event
from events.deployments import DeploymentReady, DeploymentRemoved, UndeployRequested
from events.fine_tuning import FineTuneQueued, FineTuneStarted
from events.types import new_id
from mini_studio.records.jobs import Job
from mini_studio.records.projection import requested
from mini_studio.wiring import Studio
from tests.consumers.cases import CAUSE, deploy, fine_tune

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


def at(minutes: float) -> str:
    return (NOON + timedelta(minutes=minutes)).isoformat().replace("+00:00", "Z")


def told(events: list[Event], subject: str, minutes: list[int], client: str = "acme") -> list[Envelope[Any]]:
    """The events of one aggregate, decided so many minutes after noon, numbered per source."""
    numbers: dict[str, int] = {}
    envelopes = []
    for event, minute in zip(events, minutes, strict=True):
        numbers[event.SOURCE] = number = numbers.get(event.SOURCE, 0) + 1
        time = NOON + timedelta(minutes=minute)
        envelopes.append(
            Envelope.of(event, subject=subject, sequence=number, client_code=client, cause=CAUSE, time=time)
        )
    return envelopes


async def a_job(studio: Studio, minutes: list[int], client: str = "acme") -> str:
    id = new_id("job")
    started = FineTuneStarted(job_id=id, attempt=1, submission_id="s")
    envelopes = told([fine_tune(id), FineTuneQueued(job_id=id, attempt=0), started], id, minutes, client)
    await studio.store.journal([envelope.stored() for envelope in envelopes])
    await studio.jobs.apply_all(envelopes)
    return id


async def a_deployment(studio: Studio, client: str = "acme") -> str:
    """Requested at noon, ready a minute later, asked to go at two, gone at three. Its name."""
    id = new_id("dep")
    name = deploy(id).name
    of: dict[str, Any] = {"deployment_id": id, "name": name}
    events: list[Event] = [
        deploy(id), DeploymentReady(**of, generation=1, endpoints=["http://h:1"], replicas=1),
        UndeployRequested(**of, generation=2), DeploymentRemoved(**of, generation=2),
    ]  # fmt: skip
    envelopes = told(events, id, [0, 1, 2, 3], client)
    await studio.store.journal([envelope.stored() for envelope in envelopes])
    await studio.deployments.apply_all(envelopes)
    return name


async def test_a_job_is_what_its_events_up_to_then_made(client: httpx.AsyncClient, studio: Studio) -> None:
    id = await a_job(studio, [0, 1, 2])
    url = f"/fine_tuning/jobs/{id}"
    assert (await client.get(url, params={"as_of": at(-0.01)})).status_code == 404
    seen = [(await client.get(url, params={"as_of": at(minute)})).json()["job"] for minute in (0, 1, 1.5, 2, 999)]
    assert [(job["status"], job["attempt"]) for job in seen] == [("queued", 0)] * 3 + [("running", 1)] * 2
    assert [job["updated_at"][14:16] for job in seen] == ["00", "01", "01", "02", "02"]
    assert seen[-1] == (await client.get(url)).json()["job"]
    moved = (NOON + timedelta(hours=2)).isoformat().replace("+00:00", "+02:00")
    assert (await client.get(url, params={"as_of": moved})).json()["job"] == seen[0], "a zone is a zone"


async def test_a_job_of_the_log_needs_no_record(client: httpx.AsyncClient, studio: Studio) -> None:
    id = await a_job(studio, [0, 1, 2])
    await studio.store.clear(Job.COLLECTION)
    assert (await client.get(f"/fine_tuning/jobs/{id}", params={"as_of": at(1)})).json()["job"]["status"] == "queued"


async def test_a_request_that_has_not_left_its_outbox_counts(client: httpx.AsyncClient, studio: Studio) -> None:
    id = new_id("job")
    job = requested(Job, fine_tune(id), subject=id, client_code="acme", cause=CAUSE)
    await studio.jobs._store.insert(Job.COLLECTION, job.document())  # no relay is woken
    now = {"as_of": datetime.now(UTC).isoformat()}
    assert (await client.get(f"/fine_tuning/jobs/{id}", params=now)).json()["job"]["id"] == id


async def test_a_list_has_those_that_there_were(client: httpx.AsyncClient, studio: Studio) -> None:
    ids = [await a_job(studio, [n, n + 10, n + 20]) for n in range(5)]
    await a_job(studio, [0, 0, 0], "rival")
    url = "/fine_tuning/jobs/client/acme"
    assert [job["id"] for job in (await client.get(url)).json()["jobs"]] == ids[::-1]
    then: dict[str, Any] = {"as_of": at(2), "limit": 2}
    first = (await client.get(url, params=then)).json()
    assert ([job["id"] for job in first["jobs"]], first["has_more"]) == (ids[2:0:-1], True)
    assert {job["status"] for job in first["jobs"]} == {"queued"}
    rest = (await client.get(url, params={**then, "after": first["last_id"]})).json()
    assert ([job["id"] for job in rest["jobs"]], rest["has_more"]) == ([ids[0]], False)
    newer = (await client.get(url, params={**then, "after": ids[4]})).json()
    assert [job["id"] for job in newer["jobs"]] == ids[2:0:-1], "a cursor from after that time adds nothing"
    assert (await client.get(url, params={"as_of": at(-1)})).json()["jobs"] == []


async def test_a_deployment_is_what_its_events_up_to_then_made(client: httpx.AsyncClient, studio: Studio) -> None:
    name = await a_deployment(studio)
    url, mine = f"/inference/deployments/{name}", {"client_code": "acme"}
    assert (await client.get(url, params={**mine, "as_of": at(-1)})).status_code == 404
    seen = [
        (await client.get(url, params={**mine, "as_of": at(minute)})).json()["deployment"] for minute in (0, 1, 2, 3)
    ]
    assert [found["status"] for found in seen] == ["deploying", "ready", "removing", "removed"]
    assert seen[-1] == (await client.get(url, params=mine)).json()["deployment"]
    listed = (await client.get("/inference/deployments", params={**mine, "as_of": at(1)})).json()["deployments"]
    assert listed == [seen[1]]
    assert not (await client.get("/inference/deployments", params={**mine, "as_of": at(-1)})).json()["deployments"]


async def test_the_past_belongs_to_its_client_too(client: httpx.AsyncClient, studio: Studio) -> None:
    job, name = await a_job(studio, [0, 1, 2]), await a_deployment(studio)
    then = {"as_of": at(1)}
    for url in (
        f"/fine_tuning/jobs/{job}",
        f"/inference/deployments/{name}",
        "/fine_tuning/jobs/client/acme",
        "/inference/deployments?client_code=acme",
    ):
        for who, status in (("acme", 200), ("rival", 404)):
            answer = await client.get(
                url, headers={"X-User-ID": who}, params=httpx.QueryParams(httpx.URL(url).params).merge(then)
            )
            assert answer.status_code == status, (url, who)
    assert (await client.get(f"/inference/deployments/{name}", params=then)).status_code == 404


@pytest.mark.parametrize(
    "time",
    [
        "2026-01-31T12:00:00",
        "2026-01-31",
        "1769860800",
        "yesterday",
        "2026-02-30T12:00:00Z",
        "",
        "2026-01-31T12:00:00 02:00",
    ],
)
async def test_what_is_no_time_with_a_zone_is_invalid(client: httpx.AsyncClient, studio: Studio, time: str) -> None:
    job = await a_job(studio, [0, 1, 2])
    for url in (
        f"/fine_tuning/jobs/{job}",
        "/fine_tuning/jobs/client/acme",
        "/inference/deployments",
        "/inference/deployments/a",
    ):
        answer = await client.get(url, params={"as_of": time})
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid"), url
        assert "as_of" in answer.json()["error"]
