"""How failures look: one shape, the field or the body by name, and the id under which the log has them."""

import httpx
import pytest
from fastapi import FastAPI

SUBMIT, DEPLOY = "/fine_tuning/submit-finetune", "/inference/deploy/base"
JSON = {"Content-Type": "application/json"}


async def test_what_nobody_foresaw_has_the_requests_id_in_answer_and_log(
    app: FastAPI, client: httpx.AsyncClient, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    app.add_api_route("/fail", fail)
    failed = await client.get("/fail", headers={"X-Request-ID": "find-me"})
    assert (failed.status_code, failed.json()["code"]) == (500, "internal")
    assert failed.headers["X-Request-ID"] == failed.json()["request_id"] == "find-me"
    lines = "".join(capsys.readouterr()).splitlines()
    done = next(line for line in lines if "request.done" in line)
    assert "status=500" in done
    assert len([line for line in lines if line.startswith("ZeroDivisionError")]) <= 1, "told once"


@pytest.mark.parametrize("path", [SUBMIT, DEPLOY])
@pytest.mark.parametrize(
    ("content", "says"), [(b'{"model": x}', "body: is not JSON: "), (b"", "body"), (b"[]", "body: Input should be")]
)
async def test_a_body_that_is_wrong_as_a_whole_is_named(
    client: httpx.AsyncClient, path: str, content: bytes, says: str
) -> None:
    refused = await client.post(path, content=content, headers=JSON)
    assert 400 <= refused.status_code < 500
    assert says in refused.json()["error"]


async def test_a_rule_about_two_fields_names_them(client: httpx.AsyncClient) -> None:
    refused = await client.post(DEPLOY, json={"model_id": "m", "min_replicas": 3, "max_replicas": 1})
    assert refused.json()["error"] == "max_replicas: must not be below min_replicas"
