"""Cancelling a job and deleting a dataset, as far as the API decides them."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from events.base import Event
from events.datasets import DatasetProfiled
from events.fine_tuning import FineTuneCancelled, FineTuneFailed, FineTuneStarted, FineTuneSucceeded
from events.types import new_id
from mini_studio.wiring import Studio
from tests.consumers.cases import envelope
from tests.faults.standins import FolderS3

FILE = {"file": ("rows.jsonl", b'{"prompt": "a", "completion": "b"}\n')}


@pytest.fixture(autouse=True)
def objects(studio: Studio, tmp_path: Path) -> None:
    """A folder in S3's place; both pass the contract suite of blob stores."""
    studio.s3 = FolderS3(tmp_path)  # type: ignore[assignment]


async def upload(client: httpx.AsyncClient, key: str | None = None, status: int = 201) -> str:
    headers = {"Idempotency-Key": key} if key else {}
    answer = await client.post("/fine_tuning/upload-dataset/acme", files=FILE, headers=headers)
    assert answer.status_code == status, answer.text
    return str(answer.json().get("dataset_id"))


async def submit(client: httpx.AsyncClient, dataset: str, key: str | None = None) -> httpx.Response:
    body = {"model": "tiny-llama", "client_code": "acme", "dataset_filename": dataset}
    return await client.post("/fine_tuning/submit-finetune", json=body, headers={"Idempotency-Key": key} if key else {})


async def a_job(client: httpx.AsyncClient, dataset: str | None = None) -> str:
    answer = await submit(client, dataset or await upload(client))
    assert answer.status_code == 201, answer.text
    return str(answer.json()["job"]["id"])


async def training_says(studio: Studio, job: str, *events: Event) -> None:
    for number, event in enumerate(events, start=1):
        await studio.jobs.apply(envelope(event, job, number))


def started(job: str) -> FineTuneStarted:
    return FineTuneStarted(job_id=job, attempt=1, submission_id=f"{job}-1")


def cancelled(job: str) -> FineTuneCancelled:
    return FineTuneCancelled(job_id=job, attempt=1)


async def cancel(client: httpx.AsyncClient, job: str, **headers: str) -> httpx.Response:
    return await client.post(f"/fine_tuning/jobs/{job}/cancel", headers=headers)


async def asked(studio: Studio, id: str) -> list[str]:
    """Types of the API's own events of the aggregate, in order."""
    found = [*await studio.jobs.history(id), *await studio.datasets.history(id)]
    return list(dict.fromkeys(e.type for e in sorted(found, key=lambda e: e.sequence) if e.source == "api"))


async def test_a_cancel_is_asked_for_once_and_shows_until_it_is_over(client: httpx.AsyncClient, studio: Studio) -> None:
    job = await a_job(client)
    for _ in range(3):
        answer = await cancel(client, job)
        assert (answer.status_code, answer.json()["job"]["status"], answer.json()["job"]["cancelling"]) == (
            202, "queued", True,
        )  # fmt: skip
    assert await asked(studio, job) == ["fine_tune.requested.v1", "fine_tune.cancel_requested.v1"]
    await training_says(studio, job, started(job), cancelled(job))
    answer = await cancel(client, job)
    shown = answer.json()["job"]
    assert (answer.status_code, shown["status"], shown["cancelling"], shown["finished_at"] is None) == (
        200, "cancelled", False, False,
    )  # fmt: skip
    assert (await client.get("/fine_tuning/jobs/client/acme")).json()["jobs"] == [shown]


@pytest.mark.parametrize("status", ["succeeded", "failed"])
async def test_what_is_over_otherwise_is_a_conflict(client: httpx.AsyncClient, studio: Studio, status: str) -> None:
    job = await a_job(client)
    end: Event = FineTuneFailed(job_id=job, attempt=1, code="internal", message="x")
    if status == "succeeded":
        end = FineTuneSucceeded(
            job_id=job, attempt=1, fine_tuned_model="m", fine_tuned_weights_path="/m", train_loss=1, steps=1, tokens=1
        )
    await training_says(studio, job, started(job), end)
    answer = await cancel(client, job)
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    assert status in answer.json()["error"]
    assert await asked(studio, job) == ["fine_tune.requested.v1"]


async def test_nobody_cancels_or_deletes_what_is_not_theirs(client: httpx.AsyncClient, studio: Studio) -> None:
    dataset = await upload(client)
    job = await a_job(client, dataset)
    theirs = {"X-User-ID": "mallory"}
    assert (await cancel(client, job, **theirs)).status_code == 404
    assert (await cancel(client, new_id("job"))).status_code == 404
    for method in ("GET", "DELETE"):
        for id in (dataset, new_id("ds")):
            headers = theirs if id == dataset else {}
            assert (await client.request(method, f"/fine_tuning/datasets/{id}", headers=headers)).status_code == 404
    assert (await client.get("/fine_tuning/datasets/client/acme", headers=theirs)).status_code == 404
    assert await asked(studio, job) == ["fine_tune.requested.v1"]
    assert await asked(studio, dataset) == ["dataset.uploaded.v1"]


async def test_a_dataset_is_deleted_once_and_for_good(client: httpx.AsyncClient, studio: Studio) -> None:
    dataset = await upload(client, "k")
    assert (await client.get(f"/fine_tuning/datasets/{dataset}")).json()["dataset"]["state"] == "uploaded"
    for _ in range(2):
        answer = await client.delete(f"/fine_tuning/datasets/{dataset}")
        assert (answer.status_code, answer.json()["dataset"]["state"]) == (200, "deleted")
    assert await asked(studio, dataset) == ["dataset.uploaded.v1", "dataset.deleted.v1"]
    gone = await client.get(f"/fine_tuning/datasets/{dataset}")
    assert (gone.status_code, "deleted" in gone.json()["error"]) == (404, True)
    refused = await submit(client, dataset)
    assert (refused.status_code, dataset in refused.json()["error"]) == (404, True)
    await upload(client, "k", status=409)
    again = await upload(client, "another")
    assert [found["id"] for found in await listed(client)] == [again]


async def test_what_a_profile_says_late_does_not_bring_a_dataset_back(
    client: httpx.AsyncClient, studio: Studio
) -> None:
    dataset = await upload(client)
    await client.delete(f"/fine_tuning/datasets/{dataset}")
    late = DatasetProfiled(
        dataset_id=dataset, state="damaged", message="gone", rows=1, characters=2, longest_line_bytes=3,
        tokens_estimated=1,
    )  # fmt: skip
    await studio.datasets.apply(envelope(late, dataset))
    assert (await client.get(f"/fine_tuning/datasets/{dataset}")).status_code == 404


async def test_a_dataset_in_use_is_kept_until_its_job_is_over(client: httpx.AsyncClient, studio: Studio) -> None:
    dataset, other = await upload(client), await upload(client)
    await a_job(client, other)
    job = await a_job(client, dataset)
    for _ in range(2):
        refused = await client.delete(f"/fine_tuning/datasets/{dataset}")
        assert (refused.status_code, job in refused.json()["error"]) == (409, True)
        await training_says(studio, job, started(job))
    await training_says(studio, job, started(job), cancelled(job))
    assert (await client.delete(f"/fine_tuning/datasets/{dataset}")).status_code == 200


async def test_a_submission_that_is_repeated_finds_its_job_without_its_dataset(
    client: httpx.AsyncClient, studio: Studio
) -> None:
    dataset = await upload(client)
    job = (await submit(client, dataset, "k")).json()["job"]["id"]
    await training_says(studio, job, started(job), cancelled(job))
    await client.delete(f"/fine_tuning/datasets/{dataset}")
    repeated = await submit(client, dataset, "k")
    assert (repeated.status_code, repeated.json()["job"]["id"]) == (201, job)
    assert (await submit(client, dataset, "another")).status_code == 404


async def test_a_form_that_is_repeated_finds_its_job_without_its_dataset(
    client: httpx.AsyncClient, studio: Studio
) -> None:
    async def form() -> httpx.Response:
        data = {"model": "tiny-llama", "client_code": "acme"}
        return await client.post(
            "/fine_tuning/submit-finetune", data=data, files=FILE, headers={"Idempotency-Key": "f"}
        )

    job = (await form()).json()["job"]
    await training_says(studio, job["id"], started(job["id"]), cancelled(job["id"]))
    await client.delete(f"/fine_tuning/datasets/{job['dataset']['id']}")
    assert (await form()).json()["job"]["id"] == job["id"]


async def listed(client: httpx.AsyncClient, **query: Any) -> list[dict[str, Any]]:
    answer = await client.get("/fine_tuning/datasets/client/acme", params=query)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["datasets"]
    return found


async def test_datasets_are_listed_in_pages_without_deleted_ones(client: httpx.AsyncClient, studio: Studio) -> None:
    ids = [await upload(client) for _ in range(6)]
    before = datetime.now(UTC).isoformat()
    for id in (ids[1], ids[4], ids[5]):
        await client.delete(f"/fine_tuning/datasets/{id}")
    left = [ids[3], ids[2], ids[0]]
    page = await client.get("/fine_tuning/datasets/client/acme", params={"limit": 2})
    assert [found["id"] for found in page.json()["datasets"]] == left[:2]
    assert (page.json()["has_more"], page.json()["last_id"]) == (True, left[1])
    assert [found["id"] for found in await listed(client, after=left[1])] == left[2:]
    assert [found["id"] for found in await listed(client, after=ids[4])] == left, "a deleted one is a cursor still"
    assert [found["id"] for found in await listed(client, as_of=before)] == ids[::-1]
    oldest = await studio.datasets.present("acme", limit=2, newest_first=False)
    assert [found.id for found in oldest] == left[::-1][:2]
    behind = await studio.datasets.present("acme", limit=9, after=oldest[-1].id, newest_first=False)
    assert [found.id for found in behind] == left[:1]
    assert (await client.get(f"/fine_tuning/datasets/{ids[5]}", params={"as_of": before})).status_code == 200
