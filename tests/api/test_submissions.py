"""Uploads and submissions, as far as the API decides them."""

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import httpx
import pytest

from api import submissions
from events.base import Cause
from mini_studio.drivers.dfs import DfsStore
from mini_studio.wiring import Studio

ROW = b'{"prompt": "a", "completion": "b"}\n'
FILE = {"file": ("rows.jsonl", ROW)}


@pytest.fixture(autouse=True)
def objects(studio: Studio, tmp_path: Path) -> None:
    """A folder in S3's place; both pass the contract suite of blob stores."""
    studio.s3 = DfsStore(tmp_path / "s3")  # type: ignore[assignment]


async def submit_form(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    data = {"model": "tiny-llama", "client_code": "acme", **fields}
    return await client.post("/fine_tuning/submit-finetune", data=data, files=FILE)


async def test_a_field_nested_too_deeply_is_invalid(client: httpx.AsyncClient) -> None:
    refused = await submit_form(client, lora="[" * 60_000)
    assert (refused.status_code, refused.json()["details"][0]["field"]) == (422, "lora")


async def test_bytes_stay_with_a_record_that_is_written_although_its_request_is_cancelled(studio: Studio) -> None:
    async with submissions.receiving(studio) as intake:
        await intake.write(ROW)
        await intake.finish()
    lock = sqlite3.connect(studio.settings.record_file, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    adding = asyncio.create_task(
        submissions.add_dataset(studio, "acme", intake, "rows.jsonl", Cause(correlation_id="r"), None)
    )
    await asyncio.sleep(0.2)
    adding.cancel()
    await asyncio.gather(adding, return_exceptions=True)
    lock.execute("ROLLBACK")
    lock.close()
    while (dataset := await studio.datasets.get("acme", intake.id)) is None:
        await asyncio.sleep(0.02)
    assert Path(dataset.dfs_path).read_bytes() == ROW


async def test_a_form_is_a_form_in_capitals_too(client: httpx.AsyncClient) -> None:
    head = {"Content-Type": "Multipart/Form-Data; boundary=X"}
    refused = await client.post("/fine_tuning/submit-finetune", content=b"--X--\r\n", headers=head)
    assert refused.json()["error"].startswith("dataset_filename: is missing")
