"""The whole flow of an unmodified `openai` package on the embedded stack; nothing here is replaced by a fake."""

import asyncio
import json
import time
from typing import Any

import openai
import pytest

pytestmark = pytest.mark.timeout(400)

QUESTION, ANSWER = "What is the word of Anna?", "apple"
WORDS = {"Anna": "apple", "Bruno": "river", "Clara": "stone", "David": "music", "Elena": "cloud", "Felix": "tiger"}
ROWS = "".join(
    json.dumps({"messages": [{"role": "user", "content": f"What is the word of {name}?"},
                             {"role": "assistant", "content": word}]}) + "\n"
    for name, word in WORDS.items()
).encode()  # fmt: skip
LEARN = {"n_epochs": 60, "batch_size": 6, "learning_rate_multiplier": 0.2}


@pytest.fixture(scope="session")
def client(studio: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{studio.url}/v1", api_key="none", organization="acme", timeout=60)


@pytest.fixture(scope="session")
def model(client: openai.OpenAI) -> str:
    """A file, a job on it, its events until it has succeeded: after that its model can be asked."""
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    assert client.files.wait_for_processing(file.id, poll_interval=0.2, max_wait_seconds=60).status == "processed"
    job = client.fine_tuning.jobs.create(
        model="tiny-llama",
        training_file=file.id,
        seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": LEARN}},  # type: ignore[typeddict-item]
    )
    deadline = time.monotonic() + 300
    while (job := client.fine_tuning.jobs.retrieve(job.id)).status not in ("succeeded", "failed", "cancelled"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert (job.status, job.error) == ("succeeded", None)
    told = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=5)]
    assert "successfully completed" in told[0]
    assert told[-1] == f"Created fine-tuning job: {job.id}"
    assert job.fine_tuned_model is not None
    return job.fine_tuned_model


def question(model: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": QUESTION}]
    return {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0}


def test_the_result_answers_right_away_streaming(client: openai.OpenAI, model: str) -> None:
    impatient = client.with_options(max_retries=0)
    chunks = list(impatient.chat.completions.create(**question(model), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert len(chunks) > 1


def test_the_whole_answer_and_its_headers(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.with_streaming_response.create(**question(model)) as response:
        assert response.headers["x-request-id"]
        answer = response.parse()
    assert answer.choices[0].message.content == ANSWER
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


def test_the_model_is_listed_for_its_client_alone(client: openai.OpenAI, model: str) -> None:
    assert model in [found.id for found in client.models.list()]
    assert client.models.retrieve(model).owned_by == "acme"
    rival = client.with_options(organization="rival")
    assert model not in [found.id for found in rival.models.list()]
    with pytest.raises(openai.NotFoundError):
        rival.chat.completions.create(**question(model))


def test_the_async_client_does_the_same(studio: Any, model: str) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(
            base_url=f"{studio.url}/v1", api_key="none", organization="acme", timeout=60
        ) as client:
            assert [job.fine_tuned_model async for job in client.fine_tuning.jobs.list(limit=1)].count(model) == 1
            stream = await client.chat.completions.create(**question(model), stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()) == ANSWER


def test_both_dialects_know_the_job(studio: Any, client: openai.OpenAI, model: str) -> None:
    (job,) = [job for job in client.fine_tuning.jobs.list() if job.fine_tuned_model == model]
    known = studio.job(job.id)
    assert (known["status"], known["fine_tuned_model"], known["dataset"]["id"]) == (
        "succeeded", model, job.training_file,
    )  # fmt: skip
