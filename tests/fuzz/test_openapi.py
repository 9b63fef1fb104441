"""Requests made up from the API's own description, good ones and bad ones: every answer has to be as described."""

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from mini_studio.settings import MIB, Api
from tests.fuzz.conftest import ADMIN_TOKEN, Fuzzed

CASES = 2000
EACH = 50
"""Made-up requests of an operation, beside the examples and the boundary values."""

pytestmark = pytest.mark.timeout(900)


def test_every_answer_is_as_described(api: Fuzzed, tmp_path: Path) -> None:
    st, config = Path(sys.executable).with_name("st"), Path(__file__).with_name("schemathesis.toml")
    command = [st, "--config-file", config, "run", f"{api.url}/openapi.json", "--checks", "all"]
    options = ["--max-examples", str(EACH), "--generation-database", "none", "--no-color"]
    known = {"JOB": api.job, "DATASET": api.dataset, "DEPLOYMENT": api.deployment, "ADMIN_TOKEN": ADMIN_TOKEN}
    environment = {**os.environ, **known, "NO_PROXY": "127.0.0.1"}
    said = subprocess.run(
        [*command, *options], check=False, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert said.returncode == 0, said.stdout[-20_000:] + said.stderr
    generated = re.search(r"(\d+) generated", said.stdout)
    assert generated and int(generated[1]) >= CASES, said.stdout


def operations(api: Fuzzed) -> list[tuple[str, str]]:
    """Method and path of each that takes JSON."""
    paths = httpx.get(f"{api.url}/openapi.json", trust_env=False).json()["paths"]
    return [
        (method, path)
        for path, methods in paths.items()
        for method, described in methods.items()
        if "application/json" in described.get("requestBody", {}).get("content", {})
    ]


@pytest.mark.parametrize("size", [MIB, 15 * MIB, 17 * MIB])
def test_large_bodies(api: Fuzzed, size: int) -> None:
    """JSON of a real size is read, and refused for what it says; beyond the limit for its size."""
    found = operations(api)
    assert len(found) >= 3
    body = b'{"made_up": "%s"}' % (b"x" * size)
    for method, path in found:
        response = httpx.request(
            method,
            api.url + path.replace("{model_name}", "unknown"),
            content=body,
            headers={"Content-Type": "application/json"},
            trust_env=False,
            timeout=60,
        )
        limit = Api().max_body_bytes
        assert response.status_code in ((413,) if size > limit else (400, 404, 422)), (path, response.text[:500])
