"""`/v1/files` through the `openai` package."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from events.base import Envelope
from events.datasets import DatasetProfiled
from tests.openai.conftest import Elsewhere, ask, client_for

ROWS = b"".join(json.dumps({"prompt": f"the {n}th ", "completion": "word"}).encode() + b"\n" for n in range(3))


def upload(client: openai.OpenAI, name: str = "rows.jsonl", content: bytes = ROWS, **options: Any) -> Any:
    return client.files.create(file=(name, content), **{"purpose": "fine-tune", **options})


async def profile(elsewhere: Elsewhere, id: str, **found: Any) -> None:
    event = DatasetProfiled(
        dataset_id=id, rows=3, characters=1, longest_line_bytes=1, tokens_estimated=1, **{"state": "verified", **found}
    )
    dataset = await elsewhere.studio.datasets.get("acme", id)
    assert dataset is not None
    envelope = Envelope.of(event, subject=id, sequence=1, client_code="acme", cause=dataset.cause)
    await elsewhere.studio.datasets.apply(envelope)


async def test_a_file_is_uploaded_shown_and_read_back(client: openai.OpenAI) -> None:
    made = await ask(lambda: upload(client))
    assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(ROWS), "rows.jsonl", "fine-tune")
    assert made.status == "uploaded"
    assert await ask(lambda: client.files.retrieve(made.id)) == made
    assert (await ask(lambda: client.files.content(made.id))).read() == ROWS


async def test_a_file_is_waited_for_until_both_copies_were_read_back(
    client: openai.OpenAI, elsewhere: Elsewhere
) -> None:
    made = await ask(lambda: upload(client))
    waiting = asyncio.create_task(ask(lambda: client.files.wait_for_processing(made.id, poll_interval=0.05)))
    await profile(elsewhere, made.id)
    assert (await waiting).status == "processed"


async def test_a_damaged_file_says_so_and_is_not_trained_on(client: openai.OpenAI, elsewhere: Elsewhere) -> None:
    made = await ask(lambda: upload(client))
    await profile(elsewhere, made.id, state="damaged", message="the copy on S3 is missing")
    shown = await ask(lambda: client.files.wait_for_processing(made.id, poll_interval=0.05))
    assert (shown.status, shown.status_details) == ("error", "the copy on S3 is missing")
    with pytest.raises(openai.ConflictError, match="the copy on S3 is missing") as refused:
        await ask(
            lambda: client_for(str(client.base_url)[:-4], max_retries=5).fine_tuning.jobs.create(
                model="tiny-llama", training_file=made.id
            )
        )
    assert refused.value.param == "training_file"
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert refused.value.response.request.headers["x-stainless-retry-count"] == "0"


async def test_files_are_listed_page_by_page_in_both_orders(client: openai.OpenAI) -> None:
    made = [(await ask(lambda n=n: upload(client, f"{n}.jsonl"))).id for n in range(5)]  # type: ignore[misc]
    assert [file.id for file in await ask(lambda: list(client.files.list(limit=2)))] == made[::-1]
    assert [file.id for file in await ask(lambda: list(client.files.list(limit=2, order="asc")))] == made
    first = await ask(lambda: client.files.list(limit=2, order="asc"))
    assert (first.has_more, [file.id for file in first.data]) == (True, made[:2])
    assert len((await ask(client.files.list)).data) == 5
    assert (await ask(lambda: client.files.list(purpose="batch"))).data == []
    for order in ("asc", "desc"):
        nobodys = await ask(lambda order=order: client.files.list(after="ds_" + "0" * 24, order=order))  # type: ignore[misc]
        assert (nobodys.data, nobodys.has_more) == ([], False)


async def test_another_clients_files_are_not_there(client: openai.OpenAI, url: str) -> None:
    made, rival = await ask(lambda: upload(client)), client_for(url, "rival")
    assert (await ask(rival.files.list)).data == []
    for call in (rival.files.retrieve, rival.files.content):
        with pytest.raises(openai.NotFoundError, match="has no file"):
            await ask(lambda call=call: call(made.id))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"purpose": "assistants", "content": b"%PDF-1.7"}, "purpose"),
        ({"expires_after": {"anchor": "created_at", "seconds": 3600}}, "expires_after"),
        ({"content": b'{"prompt": "a"}\n{"prompt": 1, "completion": "b"}\n'}, "file"),
        ({"content": b""}, "file"),
        ({"extra_body": {"colour": "red"}}, "colour"),
    ],
)
async def test_what_is_wrong_with_an_upload_is_named(
    client: openai.OpenAI, settings: Any, tmp_path: Path, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await ask(lambda: upload(client, **options))
    assert refused.value.param == param
    assert param in str(refused.value)
    stored = [path for folder in (settings.dfs, tmp_path / "s3") for path in folder.rglob("*.jsonl")]
    assert stored == [], "nothing of it is kept"


async def test_dataset_errors_name_every_line(client: openai.OpenAI) -> None:
    wrong = b'{"prompt": "a"}\n' * 5
    with pytest.raises(openai.BadRequestError) as refused:
        await ask(lambda: upload(client, content=wrong))
    assert all(f"line {number}: " in str(refused.value) for number in range(1, 6))


async def test_a_repeated_upload_under_a_key_is_one_file(client: openai.OpenAI) -> None:
    keyed = {"extra_headers": {"Idempotency-Key": "k"}}
    made = [(await ask(lambda: upload(client, **keyed))).id for _ in range(2)]
    assert made[0] == made[1]
    assert len((await ask(client.files.list)).data) == 1


async def test_the_purpose_may_stand_behind_the_file_or_be_missing(url: str) -> None:
    file = ("file", ("rows.jsonl", ROWS))
    async with httpx.AsyncClient(base_url=url, trust_env=False, headers={"X-User-ID": "acme"}) as http:
        behind = await http.post("/v1/files", files=[file, ("purpose", (None, b"fine-tune"))])
        assert behind.status_code == 200
        wrong = await http.post("/v1/files", files=[file, ("purpose", (None, b"batch"))])
        missing = await http.post("/v1/files", files=[file])
        assert [(r.status_code, r.json()["error"]["param"]) for r in (wrong, missing)] == [(400, "purpose")] * 2


async def test_a_file_whose_bytes_are_gone_is_not_half_an_answer(client: openai.OpenAI, elsewhere: Elsewhere) -> None:
    made = await ask(lambda: upload(client))
    dataset = await elsewhere.studio.datasets.get("acme", made.id)
    assert dataset is not None
    Path(dataset.dfs_path).unlink()
    with pytest.raises(openai.NotFoundError, match="shared file system"):
        await ask(lambda: client.files.content(made.id))


async def test_a_deleted_file_is_gone_unless_a_job_needs_it(client: openai.OpenAI, elsewhere: Elsewhere) -> None:
    made, kept = await ask(lambda: upload(client)), await ask(lambda: upload(client))
    job = await ask(lambda: client.fine_tuning.jobs.create(model="tiny-llama", training_file=made.id))
    with pytest.raises(openai.ConflictError, match=job.id):
        await ask(lambda: client.files.delete(made.id))
    await elsewhere.train(job.id)
    assert (await ask(lambda: client.files.delete(made.id))).deleted is True
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            await ask(lambda call=call: call(made.id))  # type: ignore[misc]
    assert [file.id for file in (await ask(client.files.list)).data] == [kept.id]
    with pytest.raises(openai.NotFoundError):
        await ask(lambda: client.fine_tuning.jobs.create(model="tiny-llama", training_file=made.id))
