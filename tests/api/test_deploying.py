"""Deployments, as far as the API decides them: nobody serves anything here."""

from typing import Any

import httpx
import pytest

from mini_studio.records.jobs import Job
from mini_studio.records.projection import requested
from mini_studio.records.record import ANYONE
from mini_studio.wiring import Studio
from tests.consumers.cases import CAUSE, fine_tune

JOB = "job_" + "a" * 24
AT_ONCE = {"Prefer": "respond-async"}


async def running_job(studio: Studio) -> Job:
    """A job as the API wrote it; none of its status events is in its record yet."""
    job = requested(Job, fine_tune(JOB), subject=JOB, client_code="acme", cause=CAUSE)
    await studio.jobs.insert(job)
    return job


def weights(studio: Studio, *parts: str) -> str:
    folder = studio.settings.models.joinpath("acme", *parts)
    folder.mkdir(parents=True)
    return str(folder)


async def deploy(client: httpx.AsyncClient, path: str, **fields: Any) -> httpx.Response:
    body = {"client_code": "acme", "base_model": "tiny-llama", "fine_tuned_weights_path": path, **fields}
    return await client.post("/inference/deploy/fine_tuned", json=body, headers=AT_ONCE)


async def test_a_job_names_its_model_before_its_record_says_that_it_succeeded(
    client: httpx.AsyncClient, studio: Studio
) -> None:
    job = await running_job(studio)
    assert (await deploy(client, weights(studio, JOB, "model"))).json()["model"] == job.fine_tuned_model


async def test_folders_of_one_name_have_models_of_two_names(client: httpx.AsyncClient, studio: Studio) -> None:
    models = [(await deploy(client, weights(studio, parent, "w"))).json()["model"] for parent in "ab"]
    assert [model.rpartition("-")[0] for model in models] == ["ft:tiny-llama:acme:w"] * 2
    assert len(set(models)) == 2


async def test_deploying_again_corrects_a_models_name(client: httpx.AsyncClient, studio: Studio) -> None:
    path = weights(studio, JOB, "model")
    assert (await deploy(client, path)).json()["model"].startswith("ft:tiny-llama:acme:model-")
    job = await running_job(studio)
    answered = (await deploy(client, path)).json()
    assert answered["model"] == job.fine_tuned_model
    shown = (await client.get(answered["status_url"])).json()["deployment"]
    assert (shown["model"], shown["generation"]) == (job.fine_tuned_model, 2)


async def test_a_path_with_a_name_too_long_is_invalid(client: httpx.AsyncClient, studio: Studio) -> None:
    refused = await deploy(client, weights(studio) + "/" + "x" * 300)
    assert refused.status_code == 422
    assert refused.json()["error"].startswith("fine_tuned_weights_path: must be a folder")


@pytest.mark.parametrize("base_model", ["a/b/c/d", "/".join("x" * 66 for _ in range(3))[:200]])
async def test_a_base_model_that_makes_no_name_is_invalid(
    client: httpx.AsyncClient, studio: Studio, base_model: str
) -> None:
    refused = await deploy(client, weights(studio, "w"), base_model=base_model)
    assert refused.status_code == 422
    assert refused.json()["error"].startswith("base_model: ")


BASE = "/inference/deployments/vllm-base-tiny-llama"


async def deploy_base(client: httpx.AsyncClient, key: str | None = None, **fields: Any) -> httpx.Response:
    headers = AT_ONCE | ({"Idempotency-Key": key} if key else {})
    return await client.post("/inference/deploy/base", json={"model_id": "tiny-llama", **fields}, headers=headers)


async def shown(client: httpx.AsyncClient) -> Any:
    return (await client.get(BASE)).json()["deployment"]


async def test_a_late_repeat_of_a_deploy_does_not_undo_a_removal(client: httpx.AsyncClient) -> None:
    await deploy_base(client, "k")
    await client.delete(BASE)
    removed = await shown(client)
    assert (await deploy_base(client, "k")).status_code == 409
    assert await shown(client) == removed
    assert (await deploy_base(client, "another")).status_code == 202
    assert (await shown(client))["generation"] == 3


async def test_a_late_repeat_of_a_deploy_does_not_undo_a_later_scale(client: httpx.AsyncClient) -> None:
    await deploy_base(client, "k")
    await deploy_base(client, max_replicas=3)
    scaled = await shown(client)
    assert (await deploy_base(client, "k")).status_code == 202
    assert await shown(client) == scaled
    assert (await deploy_base(client, "k", max_replicas=4)).json()["code"] == "idempotency_key_reused"


async def test_a_deploy_that_was_only_claimed_is_done_by_its_repeat(client: httpx.AsyncClient, studio: Studio) -> None:
    """As when the process dies between the two writes."""
    await deploy_base(client, "k")
    key = (await studio.keys.where(ANYONE))[0]
    await deploy_base(client, max_replicas=3)
    await studio.keys.change(ANYONE, key.id, lambda key: key.model_copy(update={"generation": 3}))
    await deploy_base(client, "k")
    assert (await shown(client))["scale"]["max_replicas"] == 1


async def test_a_client_cannot_change_what_all_share(client: httpx.AsyncClient) -> None:
    await deploy_base(client)
    before = await shown(client)
    acme = {"X-User-ID": "acme"}
    assert (await client.get(BASE, headers=acme)).status_code == 200
    scaled = {"model_id": "tiny-llama", "max_replicas": 3}
    for refused in (
        await client.delete(BASE, headers=acme),
        await client.delete(BASE, params={"client_code": "acme"}),
        await client.post("/inference/deploy/base", json=scaled, headers=acme),
    ):
        assert refused.status_code == 404
        assert "client 'acme' cannot change what all clients share" in refused.json()["error"]
    assert await shown(client) == before
    own = await client.post("/inference/deploy/base", json={**scaled, "client_code": "acme"}, headers=acme | AT_ONCE)
    assert own.status_code == 202
    assert (await client.delete(f"/inference/deployments/{own.json()['deployment']}", headers=acme)).status_code == 202


async def test_a_repository_changes_and_lists_a_tenants_own_records_only(
    client: httpx.AsyncClient, studio: Studio
) -> None:
    await deploy_base(client)
    (mine,) = await studio.deployments.where(ANYONE)
    assert await studio.deployments.where("rival") == []
    assert await studio.deployments.change("rival", mine.id, lambda d: d.model_copy(update={"message": "x"})) is None
    assert await studio.deployments.change(mine.client_code, mine.id, lambda d: d.model_copy(update={"message": "x"}))
