"""The model server as a process, over real sockets."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from workloads.base_models.install import ensure
from workloads.serve.text import Detokenizer
from workloads.specs import ServerStatus

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


def start(status: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "workloads.serve", "--served-model-name", "tiny", "--status-file", str(status)]
    return subprocess.Popen([*command, *options])


def wait_for(status: Path, process: subprocess.Popen[bytes]) -> ServerStatus:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if status.exists():
            found = ServerStatus.model_validate_json(status.read_text())
            if found.state != "starting":
                return found
        time.sleep(0.05)
    raise AssertionError(f"no status, exit code {process.poll()}")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("serve")
    ensure("tiny-llama", folder / "models")
    process = start(folder / "status", "--base-model", "tiny-llama", "--models-root", str(folder / "models"))
    status = wait_for(folder / "status", process)
    yield f"http://127.0.0.1:{status.port}"
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 0


def post(url: str, path: str, body: Any, status: int = 200) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = httpx.post(url + path, content=content, timeout=60)
    assert response.status_code == status, response.text
    return response.json()


def events(url: str, path: str, body: dict[str, Any]) -> list[Any]:
    with httpx.stream("POST", url + path, json={**body, "stream": True}, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def metric(url: str, name: str) -> float:
    line = next(x for x in httpx.get(url + "/metrics").text.splitlines() if x.startswith(f"vllm:{name}{{"))
    return float(line.rpartition(" ")[2])


def test_predict_picks_by_payload(url: str) -> None:
    completion = post(url, "/predict", {"prompt": "One two", **GREEDY})
    assert completion["object"] == "text_completion"
    chat = post(url, "/predict", {"messages": [{"role": "user", "content": "Hi"}], **GREEDY})
    assert chat["object"] == "chat.completion"
    assert chat["choices"][0]["message"]["role"] == "assistant"
    assert chat["usage"]["total_tokens"] == chat["usage"]["prompt_tokens"] + chat["usage"]["completion_tokens"]
    assert post(url, "/predict", {}, 400)["error"]["message"].startswith("give either messages")


@pytest.mark.parametrize("chat", [True, False])
def test_streaming_says_the_same(url: str, chat: bool) -> None:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body: dict[str, Any] = {**GREEDY, "model": "tiny", "max_tokens": 40}
    body |= {"messages": [{"role": "user", "content": "Hello"}]} if chat else {"prompt": "Hello"}
    whole = post(url, path, body)["choices"][0]
    parts = events(url, path, {**body, "stream_options": {"include_usage": True}})
    assert parts[-1]["usage"]["completion_tokens"] > 0
    choices = [part["choices"][0] for part in parts[:-1]]
    text = "".join(c["delta"].get("content", "") if chat else c["text"] for c in choices)
    assert text == (whole["message"]["content"] if chat else whole["text"])
    assert choices[-1]["finish_reason"] == whole["finish_reason"]


async def test_a_batch_says_what_single_requests_say(url: str) -> None:
    prompts = [f"{'word ' * n}number {n}" for n in range(6)]
    single = [post(url, "/v1/completions", {"prompt": p, **GREEDY})["choices"][0]["text"] for p in prompts]
    async with httpx.AsyncClient(timeout=60) as client:
        calls = [client.post(url + "/v1/completions", json={"prompt": p, **GREEDY}) for p in prompts]
        batched = [r.json()["choices"][0]["text"] for r in await asyncio.gather(*calls)]
    assert batched == single


def test_stop_strings_are_not_shown(url: str) -> None:
    text = post(url, "/v1/completions", {"prompt": "abc", **GREEDY, "max_tokens": 30})["choices"][0]["text"]
    stop = text[5:8]
    choice = post(url, "/v1/completions", {"prompt": "abc", **GREEDY, "max_tokens": 30, "stop": stop})["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_seeds_repeat(url: str) -> None:
    body = {"prompt": "abc", "temperature": 1.0, "seed": 7, "max_tokens": 12}
    assert post(url, "/predict", body)["choices"] == post(url, "/predict", body)["choices"]


def test_choices_of_one_seed_differ(url: str) -> None:
    body = {"prompt": "abc", "temperature": 2.0, "seed": 7, "max_tokens": 12, "n": 3}
    choices = post(url, "/predict", body)["choices"]
    assert len({choice["text"] for choice in choices}) == 3
    assert choices == post(url, "/predict", body)["choices"]


def test_parameters_that_ask_for_nothing_are_taken(url: str) -> None:
    neutral = {
        "logit_bias": {},
        "tools": [],
        "presence_penalty": 0.0,
        "best_of": 1,
        "logprobs": False,
        "tool_choice": "auto",
    }
    assert post(url, "/predict", {"prompt": "abc", **GREEDY, **neutral})["choices"]


@pytest.mark.parametrize("temperature", [1e-40, 1e-37, 1e-20, 1e-5])
def test_a_tiny_temperature_is_greedy(url: str, temperature: float) -> None:
    greedy = post(url, "/predict", {"prompt": "abc", **GREEDY})["choices"]
    assert post(url, "/predict", {"prompt": "abc", **GREEDY, "temperature": temperature})["choices"] == greedy


def test_a_client_that_hangs_up_frees_its_place(url: str) -> None:
    with httpx.stream("POST", url + "/predict", json={"prompt": "a", "max_tokens": 200, "stream": True}) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 10
    while metric(url, "num_requests_running"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_answer_goes_on_to_its_end_after_sigterm(tmp_path: Path) -> None:
    base = str(ensure("tiny-llama", tmp_path / "models"))
    process = start(tmp_path / "status", "--weights", base, "--finish-s", "60")
    url = f"http://127.0.0.1:{wait_for(tmp_path / 'status', process).port}"
    body = {"prompt": "a", "temperature": 0, "max_tokens": 500, "stream": True}
    with httpx.stream("POST", url + "/predict", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert process.wait(60) == 0


BAD: list[tuple[Any, int, str]] = [
    (b"{", 400, "not JSON"),
    (b"[]", 400, "object"),
    ({"prompt": 3}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text parts"),
    ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
    ({"prompt": "x", "max_tokens": 10_000}, 400, "context"),
    ({"prompt": "x " * 5000}, 400, "context"),
    ({"prompt": "x", "temperature": "hot"}, 400, "temperature"),
    ({"prompt": "x", "stop": ["a"] * 5}, 400, "stop"),
    ({"prompt": "x", "n": 99}, 400, "n must"),
    ({"prompt": "x", "logprobs": 3}, 400, "logprobs"),
    ({"prompt": "x", "logprobs": 0}, 400, "logprobs"),
    ({"prompt": "x", "frequency_penalty": 0.5}, 400, "frequency_penalty"),
    ({"prompt": "x", "repetition_penalty": 1.2}, 400, "repetition_penalty"),
    ({"prompt": "x", "ignore_eos": True}, 400, "ignore_eos"),
    ({"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}, 400, "tool_choice"),
    ({"prompt": "x", "model": "other"}, 404, "other"),
]


@pytest.mark.parametrize(("body", "status", "text"), BAD)
def test_bad_input_is_said_clearly(url: str, body: Any, status: int, text: str) -> None:
    assert text in post(url, "/predict", body, status)["error"]["message"]


def test_a_folder_that_is_no_model_is_said_in_the_status(tmp_path: Path) -> None:
    process = start(tmp_path / "status", "--weights", str(tmp_path / "absent"))
    status = wait_for(tmp_path / "status", process)
    assert status.state == "failed"
    assert "config.json" in (status.error or "")
    assert process.wait(10) == 1


def test_text_is_whole_and_hides_stop_strings() -> None:
    def decode(tokens: Any) -> str:
        return bytes(tokens).decode(errors="replace")

    text = "héllo €uro STOP never"
    shown = Detokenizer(decode, ("STOP",))
    pieces = [shown.push(byte) for byte in text.encode()]
    assert "".join(pieces) + shown.finish() == "héllo €uro "
    assert shown.stopped
    free = Detokenizer(decode, ("STOPS",))
    assert "".join(free.push(byte) for byte in b"ends in STOP") + free.finish() == "ends in STOP"
