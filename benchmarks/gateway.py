"""What the gateway costs a request: `python -m benchmarks.gateway [--rounds N] [--seconds N] [--litellm PYTHON] [--only NAME ...]`.

It starts a model server that answers at once (nginx), and before it, one at a time, in turns, each with one worker:

- nginx (Debian's package, with kept connections), the yardstick;
- ours: `mini-studio gateway` on a log with one route of one tenant, with limits, metrics, request ids and usage records on,
  asked at `/inference/infer/{model}`, at `/v1/chat/completions`, and with `gateway.client` `plain`;
- FastAPI with httpx, and raw ASGI with aiohttp, which do nothing but pass the request on (benchmarks/proxies);
- the LiteLLM proxy, if `--litellm` names the Python of an environment with `litellm[proxy]`.

wrk asks with 32 kept connections (requests a second, CPU of the proxy's processes a request), then with one (p50, less what
the model server takes when it is asked directly). Then streams: the delay of a chunk, from its writing by the model server
to its reading by the client, with one stream and with 200; and what 1,000 open streams take of the gateway's memory.
Targets: throughput >= 0.35x nginx, added p50 <= 0.35 ms, a chunk's delay <= 3x nginx's, <= 60 KB a stream.
nginx and wrk have to be installed (Debian: nginx-light, wrk).
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import uvloop

from benchmarks.proxies.streaming import Reader
from events.types import DeploymentKind
from mini_studio.records.routes import Route
from tests.fakes.broker import free_port, running_broker, wait_for
from tests.fakes.gateways import gateways, publish_routes, shared_route

QUESTION = json.dumps(
    {"model": "m", "messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 16}
)
USAGE = {"prompt_tokens": 12, "completion_tokens": 8, "total_tokens": 20}
ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "The capital of France is Paris."},
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }
)
CONNECTIONS = 32
STREAMS = 200
MANY_STREAMS = 1000
KEY = "sk-" + "0" * 64
"""LiteLLM does not start without one."""
HEADERS = {"Content-Type": "application/json", "X-User-ID": "acme", "Authorization": f"Bearer {KEY}"}
NGINX = """
daemon off; worker_processes 1; pid %(folder)s/%(name)s.pid; error_log stderr crit;
events { worker_connections 4096; }
http {
  access_log off; keepalive_requests 1000000000; client_max_body_size 64m;
  client_body_temp_path %(folder)s/%(name)s-body; proxy_temp_path %(folder)s/%(name)s-proxy;
  fastcgi_temp_path %(folder)s/%(name)s-f; uwsgi_temp_path %(folder)s/%(name)s-u; scgi_temp_path %(folder)s/%(name)s-s;
  %(http)s
}
"""
MODEL = "server {{ listen 127.0.0.1:{port}; default_type application/json; location / {{ return 200 '{answer}'; }} }}"
PROXY = (
    "upstream model {{ server 127.0.0.1:{model}; keepalive 1024; keepalive_requests 1000000000; }}"
    " server {{ listen 127.0.0.1:{port} backlog=2048; location / {{ proxy_pass http://model; proxy_http_version 1.1;"
    ' proxy_set_header Connection ""; proxy_buffering off; }} }}'
)


@dataclass
class Proxy:
    """One way to the model server, listening."""

    name: str
    port: int
    path: str
    process: psutil.Process
    new_heads: bool = False
    """Each request has an id of its own: nothing that is remembered of earlier heads helps."""
    rates: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    chunk_us: dict[int, list[float]] = field(default_factory=dict)

    def cpu_s(self) -> float:
        """User and system time of its processes so far."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(times.user + times.system for times in (process.cpu_times() for process in family))

    def rss(self) -> int:
        return sum(process.memory_info().rss for process in (self.process, *self.process.children(recursive=True)))


@contextlib.contextmanager
def started(command: list[str], port: int, **environment: str) -> Iterator[psutil.Process]:
    """A process, from when it listens to the end of the context."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
        try:
            try:
                wait_for(port, 60)
            except TimeoutError as error:
                log.seek(0)
                raise TimeoutError(log.read()[-2000:].decode(errors="replace")) from error
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(30)


@contextlib.contextmanager
def nginx(folder: Path, name: str, port: int, http: str) -> Iterator[psutil.Process]:
    conf = folder / f"{name}.conf"
    conf.write_text(NGINX % {"folder": folder, "name": name, "http": http})
    with started(["nginx", "-c", str(conf)], port) as process:
        yield process


def route(name: str, port: int) -> Route:
    """A fine-tuned model of tenant acme, served at `port`."""
    owned = {"client_code": "acme", "kind": DeploymentKind.FINE_TUNED, "base_model": "base"}
    return shared_route(name, f"http://127.0.0.1:{port}").model_copy(update=owned)


@contextlib.contextmanager
def ours(folder: Path, bootstrap: str, client: str = "fast") -> Iterator[tuple[int, psutil.Process]]:
    settings = {
        "GATEWAY__CLIENT": client,
        "GATEWAY__CLIENT_REQUESTS_S": 1_000_000,
        "GATEWAY__CLIENT_TOKENS_MIN": 1_000_000_000,
        "GATEWAY__CLIENT_STREAMS": 100_000,
    }
    with gateways(bootstrap, folder / "data", **settings) as [gateway]:
        yield gateway.port, psutil.Process(gateway.process.pid)


@contextlib.contextmanager
def uvicorn(module: str, model: int) -> Iterator[tuple[int, psutil.Process]]:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", f"benchmarks.proxies.{module}:app", "--port", str(port)]
    command += ["--no-access-log", "--log-level", "critical", "--loop", "uvloop", "--http", "httptools"]
    with started(command, port, UPSTREAM=f"http://127.0.0.1:{model}") as process:
        yield port, process


@contextlib.contextmanager
def litellm(python: str, folder: Path, model: int) -> Iterator[tuple[int, psutil.Process]]:
    port, conf = free_port(), folder / "litellm.yaml"
    base = f"http://127.0.0.1:{model}/v1"
    params = {"model": "openai/m", "api_base": base, "api_key": "x"}
    conf.write_text(json.dumps({"model_list": [{"model_name": "m", "litellm_params": params}]}))
    command = [str(Path(python).parent / "litellm"), "--config", str(conf), "--host", "127.0.0.1", "--port", str(port)]
    with started(
        command, port, LITELLM_MASTER_KEY=KEY, LITELLM_LOG="ERROR", LITELLM_LOCAL_MODEL_COST_MAP="True"
    ) as process:
        yield port, process


@contextlib.contextmanager
def proxies(folder: Path, model: int, streams: int, bootstrap: str, python: str | None) -> Iterator[list[Proxy]]:
    """All of them, and the model server itself first. Those that stream have a twin before the streaming server."""
    asyncio.run(publish_routes(bootstrap, [route("m", model), route("s", streams)]))
    front, front_streams = free_port(), free_port()
    with contextlib.ExitStack() as stack:
        http = PROXY.format(model=model, port=front)
        before = stack.enter_context(nginx(folder, "front", front, http))
        http = PROXY.format(model=streams, port=front_streams)
        before_streams = stack.enter_context(nginx(folder, "streams", front_streams, http))
        fast = stack.enter_context(ours(folder, bootstrap))
        plain = stack.enter_context(ours(folder, bootstrap, "plain"))
        aiohttp = stack.enter_context(uvicorn("asgi_aiohttp", model))
        fastapi = stack.enter_context(uvicorn("fastapi_httpx", model))
        infer, chat = "/inference/infer/", "/v1/chat/completions"
        found = [
            Proxy("nginx", front, infer + "m", before),
            Proxy("nginx, streams", front_streams, infer + "s", before_streams),
            Proxy("ours", fast[0], infer + "m", fast[1]),
            Proxy("nginx, new heads", front, infer + "m", before, new_heads=True),
            Proxy("ours, new heads", fast[0], infer + "m", fast[1], new_heads=True),
            Proxy("ours, /v1", fast[0], chat, fast[1]),
            Proxy("ours, plain", plain[0], infer + "m", plain[1]),
            Proxy("raw ASGI + aiohttp", aiohttp[0], infer + "m", aiohttp[1]),
            Proxy("FastAPI + httpx", fastapi[0], infer + "m", fastapi[1]),
        ]
        if python:
            lite = stack.enter_context(litellm(python, folder, model))
            found.append(Proxy("LiteLLM", lite[0], chat, lite[1]))
        yield found


@dataclass(frozen=True)
class Wrk:
    rate: float
    requests: int
    p50_ms: float


NEW_HEADS = """
local n = 0
request = function() n = n + 1; wrk.headers["X-Request-ID"] = "r-" .. n; return wrk.format() end
"""


def wrk(folder: Path, port: int, path: str, connections: int, seconds: float, new_heads: bool = False) -> Wrk:
    """Ask for a while; every answer has to be a 200."""
    script = folder / "post.lua"
    headers = "".join(f'wrk.headers["{name}"] = "{value}"\n' for name, value in HEADERS.items())
    script.write_text(f"wrk.method = 'POST'\nwrk.body = '{QUESTION}'\n{headers}{NEW_HEADS if new_heads else ''}")
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency", "--timeout", "20s", "-s", str(script)]
    said = subprocess.run(
        [*command, f"http://127.0.0.1:{port}{path}"], check=True, capture_output=True, text=True
    ).stdout
    assert "Non-2xx" not in said and "Socket errors" not in said, said
    rate, requests = re.search(r"Requests/sec:\s+([\d.]+)", said), re.search(r"(\d+) requests in", said)
    p50 = re.search(r"50%\s+([\d.]+)(us|ms|s)", said)
    assert rate and requests and p50, said
    return Wrk(float(rate[1]), int(requests[1]), float(p50[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[p50[2]])


def load(folder: Path, proxy: Proxy, model: int, seconds: float) -> None:
    """One round of one proxy."""
    before = proxy.cpu_s()
    full = wrk(folder, proxy.port, proxy.path, CONNECTIONS, seconds, proxy.new_heads)
    proxy.rates.append(full.rate)
    proxy.cpu_us.append((proxy.cpu_s() - before) / full.requests * 1e6)
    direct = wrk(folder, model, "/", 1, seconds / 2)
    proxy.p50_ms.append(wrk(folder, proxy.port, proxy.path, 1, seconds / 2).p50_ms - direct.p50_ms)


def head(path: str, chunks: int, interval_s: float) -> bytes:
    body = json.dumps({"chunks": chunks, "interval_s": interval_s}).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: x",
        f"Content-Length: {len(body)}",
        *(f"{n}: {v}" for n, v in HEADERS.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def streamed(port: int, path: str, streams: int, chunks: int, interval_s: float) -> list[float]:
    """Delays of all chunks of so many streams at the same time, in microseconds."""
    loop = asyncio.get_running_loop()
    readers: list[Reader] = []
    for _ in range(streams):
        _, reader = await loop.create_connection(lambda: Reader(head(path, chunks, interval_s)), "127.0.0.1", port)
        readers.append(reader)
        await asyncio.sleep(interval_s / streams)
    await asyncio.gather(*(reader.ended for reader in readers))
    for reader in readers:
        reader.transport.close()
    return [delay for reader in readers for delay in reader.delays]


async def opened(proxy: Proxy, path: str, streams: int) -> float:
    """KB of the proxy's memory for each of so many open streams."""
    await streamed(proxy.port, path, 10, 3, 0.1)
    loop, before = asyncio.get_running_loop(), proxy.rss()
    made = [
        (await loop.create_connection(lambda: Reader(head(path, 10_000, 1.0)), "127.0.0.1", proxy.port))[1]
        for _ in range(streams)
    ]
    await asyncio.gather(*(reader.started for reader in made))
    await asyncio.sleep(3)
    grown = proxy.rss() - before
    for reader in made:
        reader.transport.abort()
        reader.ended.add_done_callback(lambda done: done.exception())
    return grown / streams / 1024


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def report(found: list[Proxy], say: Callable[[str], None]) -> None:
    yardsticks = {proxy.new_heads: proxy.rates for proxy in reversed(found) if proxy.name.startswith("nginx")}
    say(f"{'':20} {'req/s':>8} {'x nginx':>8} {'rounds':>14} {'CPU us':>8} {'added p50 ms':>13}")
    for proxy in found:
        if not proxy.rates:
            continue
        yardstick = yardsticks[proxy.new_heads]
        ratios = [rate / base for rate, base in zip(proxy.rates, yardstick, strict=True)]
        say(
            f"{proxy.name:20} {statistics.median(proxy.rates):8.0f} {statistics.median(proxy.rates) / statistics.median(yardstick):8.3f} "
            f"{min(ratios):6.3f}-{max(ratios):.3f} {statistics.median(proxy.cpu_us):8.1f} "
            f"{statistics.median(proxy.p50_ms):13.3f}"
        )


def stream_report(ways: dict[str, tuple[int, str]], rounds: int, say: Callable[[str], None]) -> None:
    """Delays of chunks by way, all in turns."""
    delays: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for streams, chunks, interval_s in ((1, 100, 0.01), (STREAMS, 20, 0.2)):
            for name, (port, path) in ways.items():
                took = uvloop.run(streamed(port, path, streams, chunks, interval_s))
                delays.setdefault((name, streams), []).extend(took)
    for (name, streams), took in sorted(delays.items(), key=lambda item: item[0][1]):
        base = statistics.median(delays["nginx", streams])
        p50, p99 = statistics.median(took), quantile(took, 0.99)
        say(f"{streams:5} streams  {name:10} chunk p50 {p50:7.0f} us ({p50 / base:.2f}x nginx)  p99 {p99:7.0f} us")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of wrk, each time")
    parser.add_argument("--litellm", metavar="PYTHON", help="an environment's Python that has litellm[proxy]")
    parser.add_argument("--only", nargs="*", help="names of the proxies to load, beside nginx")
    return parser.parse_args()


def main() -> None:
    asked, model, streams = options(), free_port(), free_port()
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        answering = MODEL.format(port=model, answer=ANSWER)
        stack.enter_context(nginx(folder, "model", model, answering))
        stack.enter_context(started([sys.executable, "-m", "benchmarks.proxies.streaming", str(streams)], streams))
        bootstrap = stack.enter_context(running_broker())
        found = stack.enter_context(proxies(folder, model, streams, bootstrap, asked.litellm))
        loaded = [
            p
            for p in found
            if "streams" not in p.name and (not asked.only or p.name in ("nginx", "nginx, new heads", *asked.only))
        ]
        for proxy in loaded:
            wrk(folder, proxy.port, proxy.path, CONNECTIONS, 1)
        for _ in range(asked.rounds):
            for proxy in loaded:
                load(folder, proxy, model, asked.seconds)
        report(loaded, print)
        named = {proxy.name: proxy for proxy in found}
        infer = "/inference/infer/s"
        ways = {
            "direct": (streams, "/"),
            "nginx": (named["nginx, streams"].port, infer),
            "ours": (named["ours"].port, infer),
        }
        stream_report(ways, asked.rounds, print)
        for name in ("ours", "nginx, streams"):
            kilobytes = uvloop.run(opened(named[name], infer, MANY_STREAMS))
            print(f"{MANY_STREAMS} open streams  {name}: {kilobytes:.1f} KB each")
    print(f"in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
