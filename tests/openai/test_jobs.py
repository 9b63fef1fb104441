"""`/v1/fine_tuning/jobs` through the `openai` package, from submission until the result can be asked."""

from typing import Any

import httpx
import openai
import pytest

from consumers import jobs
from events.base import Envelope
from events.deployments import DeploymentFailed
from events.fine_tuning import FineTuneCancelled, FineTuneFailed, FineTuneSucceeded
from mini_studio.records.deployments import removal
from tests.openai.conftest import WEIGHTS, Elsewhere, ask, client_for
from tests.openai.test_files import upload


async def create(client: openai.OpenAI, **options: Any) -> Any:
    file = options.pop("training_file", None) or (await ask(lambda: upload(client))).id
    return await ask(
        lambda: client.fine_tuning.jobs.create(**{"model": "tiny-llama", "training_file": file, **options})
    )


async def shown(client: openai.OpenAI, id: str) -> Any:
    return await ask(lambda: client.fine_tuning.jobs.retrieve(id))


async def test_a_job_shows_what_was_asked_for(client: openai.OpenAI) -> None:
    made = await create(
        client,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": "auto"}}},
        suffix="mine",
        seed=7,
        metadata={"team": "a"},
    )
    assert (made.object, made.status, made.model, made.organization_id) == (
        "fine_tuning.job", "queued", "tiny-llama", "acme",
    )  # fmt: skip
    used = made.hyperparameters
    assert (used.n_epochs, used.batch_size, used.learning_rate_multiplier) == (3, 1, 0.05)
    assert made.method.supervised.hyperparameters.n_epochs == 3
    assert (made.seed, made.metadata, made.result_files) == (7, {"team": "a"}, [])
    for unknown in (made.fine_tuned_model, made.finished_at, made.trained_tokens, made.error, made.validation_file):
        assert unknown is None
    assert await shown(client, made.id) == made


async def test_both_places_of_hyperparameters_count(client: openai.OpenAI) -> None:
    old = await create(client, hyperparameters={"n_epochs": 2, "learning_rate_multiplier": 0.5})
    assert (old.hyperparameters.n_epochs, old.hyperparameters.learning_rate_multiplier) == (2, 0.5)
    auto = await create(client, hyperparameters={"n_epochs": "auto", "learning_rate_multiplier": "auto"})
    assert (auto.hyperparameters.n_epochs, auto.hyperparameters.learning_rate_multiplier) == (4, 0.05)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"validation_file": "ds_1"}, "validation_file"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
        ({"method": {"type": "dpo", "dpo": {}}}, "method.type"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 0}}, "hyperparameters.batch_size"),
        ({"model": "none-such"}, "model"),
        ({"suffix": "Not This"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"metadata": {"a": "b" * 513}}, "metadata.a"),
        ({"extra_body": {"colour": "red"}}, "colour"),
    ],
)
async def test_what_is_not_supported_or_wrong_is_named(
    client: openai.OpenAI, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await create(client, **options)
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"
    assert (await ask(client.fine_tuning.jobs.list)).data == []


async def test_a_file_that_is_not_there_is_named(client: openai.OpenAI, url: str) -> None:
    rivals = (await ask(lambda: upload(client_for(url, "rival")))).id
    for file in ("ds_" + "0" * 24, rivals, "../../etc/passwd"):
        with pytest.raises(openai.NotFoundError) as refused:
            await create(client, training_file=file)
        assert refused.value.param == "training_file"


async def test_a_key_makes_a_job_once_and_not_the_other_dialects(client: openai.OpenAI, url: str) -> None:
    file = (await ask(lambda: upload(client))).id
    keyed = {"training_file": file, "extra_headers": {"Idempotency-Key": "k"}}
    assert (await create(client, **keyed)).id == (await create(client, **keyed)).id
    with pytest.raises(openai.BadRequestError) as refused:
        await create(client, **keyed, seed=1)
    assert refused.value.code == "idempotency_key_reused"
    body = {"model": "tiny-llama", "client_code": "acme", "dataset_filename": file}
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
        answer = await http.post("/fine_tuning/submit-finetune", json=body, headers=keyed["extra_headers"])
    assert answer.json()["code"] == "idempotency_key_reused", "that one would deploy nothing"


async def test_both_dialects_show_the_same_jobs(client: openai.OpenAI, url: str, elsewhere: Elsewhere) -> None:
    made = await create(client)
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
        body = {"model": "tiny-llama", "client_code": "acme", "dataset_filename": made.training_file}
        other = (await http.post("/fine_tuning/submit-finetune", json=body)).json()["job"]["id"]
        known = (await http.get("/fine_tuning/jobs/client/acme")).json()["jobs"]
    assert [job.id for job in await ask(lambda: list(client.fine_tuning.jobs.list(limit=1)))] == [other, made.id]
    assert [job["id"] for job in known] == [other, made.id]
    await elsewhere.train(other)
    assert (await shown(client, other)).status == "succeeded", "nobody asked for it to be deployed"
    assert await elsewhere.deployments() == []


async def test_a_job_has_succeeded_when_its_model_can_be_asked(client: openai.OpenAI, elsewhere: Elsewhere) -> None:
    made = await create(client, hyperparameters={"n_epochs": 2})
    await elsewhere.train(made.id)
    (deployment,) = await elsewhere.deployments()
    assert deployment.weights_path == WEIGHTS.format(made.id)
    for ready in (False, True):
        trained = await shown(client, made.id)
        listed = (await ask(client.fine_tuning.jobs.list)).data[0]
        assert trained == listed
        assert (trained.status, trained.fine_tuned_model, trained.finished_at) == ("running", None, None)
        if not ready:
            await elsewhere.serve(deployment, ready=False)
    (deployment,) = await elsewhere.deployments()
    await elsewhere.serve(deployment)
    done = await shown(client, made.id)
    assert (done.status, done.fine_tuned_model, done.trained_tokens) == ("succeeded", deployment.model, 60)
    assert done.finished_at >= done.created_at
    assert (await ask(lambda: client.models.retrieve(done.fine_tuned_model))).owned_by == "acme"


async def test_a_job_stays_succeeded_whatever_becomes_of_its_deployment(
    client: openai.OpenAI, elsewhere: Elsewhere
) -> None:
    made = await create(client)
    await elsewhere.train(made.id)
    (deployment,) = await elsewhere.deployments()
    await elsewhere.serve(deployment)
    await elsewhere.serve(deployment, ready=False)  # it is started again
    assert (await shown(client, made.id)).status == "succeeded"
    await ask(lambda: client.models.delete(deployment.model))
    assert (await shown(client, made.id)).status == "succeeded"


async def test_a_deployment_that_fails_ends_the_job_and_says_why(client: openai.OpenAI, elsewhere: Elsewhere) -> None:
    made = await create(client)
    await elsewhere.train(made.id)
    (deployment,) = await elsewhere.deployments()
    about = {"deployment_id": deployment.id, "generation": 1, "name": deployment.name}
    await elsewhere.say(deployment.id, DeploymentFailed.model_validate({**about, "message": "no memory"}))
    assert (await shown(client, made.id)).status == "succeeded"
    last = (await ask(lambda: client.fine_tuning.jobs.list_events(made.id, limit=1))).data[0]
    assert (last.level, "no memory" in last.message) == ("error", True)


async def test_a_failed_job_says_why(client: openai.OpenAI, elsewhere: Elsewhere) -> None:
    made = await create(client)
    await elsewhere.say(made.id, FineTuneFailed(job_id=made.id, attempt=1, code="bad_row", message="Row 3 is empty."))
    failed = await shown(client, made.id)
    assert (failed.status, failed.error.code, failed.error.param) == ("failed", "bad_row", "training_file")
    assert failed.error.message == "Row 3 is empty."
    assert await elsewhere.deployments() == []


async def test_a_removed_result_is_not_deployed_again_by_a_repeated_event(
    client: openai.OpenAI, elsewhere: Elsewhere
) -> None:
    """As when the embedded broker starts empty, and consumers read everything a second time."""
    made = await create(client)
    await elsewhere.train(made.id)
    (deployment,) = await elsewhere.deployments()
    studio = elsewhere.studio
    await studio.deployments.change("acme", deployment.id, lambda d: removal(d, d.cause))
    history = await studio.jobs.history(made.id)
    await jobs.project(history, studio)
    asked = ["deployment.requested.v1", "deployment.removal_requested.v1"]
    assert await elsewhere.requested(deployment.id) == asked
    await studio.store.journal([e.stored() for e in await studio.deployments.history(deployment.id)])
    await studio.store.clear(studio.deployments.collection)  # to be rebuilt from the journal
    await jobs.project(history, studio)
    assert await elsewhere.deployments() == []


async def test_another_holder_of_the_readable_name_does_not_stand_in_the_way(
    client: openai.OpenAI, elsewhere: Elsewhere
) -> None:
    made = [await create(client) for _ in range(2)]
    for job in made:
        await elsewhere.train(job.id)
    first, second = await elsewhere.deployments()
    assert first.name == "vllm-ft-acme-tiny-llama"
    assert second.name == f"{first.name}-{second.id[4:16]}"


async def test_only_an_event_that_was_applied_deploys(client: openai.OpenAI, elsewhere: Elsewhere) -> None:
    made = await create(client)
    await elsewhere.say(made.id, FineTuneFailed(job_id=made.id, attempt=1, code="internal", message="x"))
    late = FineTuneSucceeded(
        job_id=made.id, attempt=1, fine_tuned_model="m", fine_tuned_weights_path="/w", train_loss=0, steps=1, tokens=1
    )
    job = await elsewhere.studio.jobs.get("acme", made.id)
    assert job is not None
    await elsewhere.publish(Envelope.of(late, subject=made.id, sequence=2, client_code="acme", cause=job.cause))
    assert await elsewhere.deployments() == []


async def test_events_tell_the_story_newest_first_page_by_page(client: openai.OpenAI, elsewhere: Elsewhere) -> None:
    made = await create(client)
    await elsewhere.train(made.id)
    (deployment,) = await elsewhere.deployments()
    await elsewhere.serve(deployment)
    told = await ask(lambda: list(client.fine_tuning.jobs.list_events(made.id, limit=3)))
    assert [event.message for event in reversed(told)] == [
        f"Created fine-tuning job: {made.id}",
        "The job waits for its turn",
        "Fine-tuning job started, attempt 1",
        "The training file has 30 tokens",
        "Step 1/2: training loss=0.7500",
        "Step 2/2: training loss=0.5000",
        f"New fine-tuned model created: {deployment.model}",
        "Deploying the fine-tuned model",
        "The fine-tuned model is starting",
        "The fine-tuned model answers; the job has successfully completed",
    ]
    assert {(event.object, event.level) for event in told} == {("fine_tuning.job.event", "info")}
    numbers = [event.data for event in told if event.type == "metrics"]
    assert numbers[0] == {"step": 2, "total_steps": 2, "epoch": 1.0, "train_loss": 0.5}
    assert len({event.id for event in told}) == len(told)
    await elsewhere.serve(deployment, ready=False)
    assert await ask(lambda: list(client.fine_tuning.jobs.list_events(made.id))) == told, "that is another story"
    nothing = await ask(lambda: client.fine_tuning.jobs.list_events(made.id, after=told[-1].id))
    assert (nothing.data, nothing.has_more) == ([], False)


async def test_there_are_no_checkpoints_to_ask(client: openai.OpenAI) -> None:
    made = await create(client)
    assert await ask(lambda: list(client.fine_tuning.jobs.checkpoints.list(made.id))) == []


async def test_another_clients_jobs_are_not_there(client: openai.OpenAI, url: str) -> None:
    made, rival = await create(client), client_for(url, "rival").fine_tuning.jobs
    assert (await ask(rival.list)).data == []
    for call in (rival.retrieve, rival.list_events, rival.checkpoints.list):
        with pytest.raises(openai.NotFoundError, match="has no job"):
            await ask(lambda call=call: call(made.id))  # type: ignore[misc]


async def test_jobs_are_not_listed_by_metadata(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await ask(lambda: client.fine_tuning.jobs.list(metadata={"team": "a"}))
    assert refused.value.param == "metadata"


async def test_a_job_is_cancelled_when_its_training_has_ended(
    client: openai.OpenAI, url: str, elsewhere: Elsewhere
) -> None:
    made = await create(client)
    with pytest.raises(openai.NotFoundError):
        await ask(lambda: client_for(url, "rival").fine_tuning.jobs.cancel(made.id))
    assert (await ask(lambda: client.fine_tuning.jobs.cancel(made.id))).status == "queued"
    await elsewhere.say(made.id, FineTuneCancelled(job_id=made.id, attempt=0))
    ended = await shown(client, made.id)
    assert (ended.status, ended.fine_tuned_model) == ("cancelled", None)
    assert ended.finished_at is not None
    assert (await ask(lambda: client.fine_tuning.jobs.cancel(made.id))).status == "cancelled"


async def test_a_job_that_is_over_cannot_be_cancelled(client: openai.OpenAI, elsewhere: Elsewhere) -> None:
    made = await create(client)
    await elsewhere.train(made.id)
    with pytest.raises(openai.ConflictError):
        await ask(lambda: client.fine_tuning.jobs.cancel(made.id))
