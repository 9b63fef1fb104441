"""What one client's flood does to another one's latency: `python -m benchmarks.fairness`.

A gateway as a process, with a route from a log, a model server that answers after the time that a request's body says, and two
clients, each a process of its own. One asks one request at a time and is measured; the other keeps FLOOD requests in flight
(`--flood`), each of which the model server takes `--flood-s` for. Rounds without and with the flood alternate.
Printed per round: p50 and p99 of the measured client; at the end the median of the rounds' p50, and its ratio, flooded to quiet.
The ratio is of whole latencies, so the model's time is in it (`--model-ms 0` leaves it out): target <= 1.2.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from urllib.parse import urlsplit

from tests.fakes.broker import free_port, wait_for
from tests.fakes.gateways import routed_gateway, shared_route

MODEL = "tiny-llama"
TARGET = 1.2
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


class Model(asyncio.Protocol):
    """Answers each request after as many seconds as its body says."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._data = transport, b""

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, end, body = self._data.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
        if end and length and len(body) >= int(length):
            self._data = b""
            asyncio.get_running_loop().call_later(float(body), self._transport.write, ANSWER)


async def serve_model(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Model, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


class Connection:
    """A client's, kept."""

    def __init__(self, client: str, delay_s: float) -> None:
        body = str(delay_s).encode()
        head = f"POST /inference/infer/{MODEL} HTTP/1.1\r\nHost: x\r\nX-User-ID: {client}\r\nContent-Length: {len(body)}\r\n\r\n"
        self._request = head.encode() + body

    async def open(self, port: int) -> "Connection":
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", port)
        return self

    async def ask(self) -> float:
        """Seconds that the answer took."""
        began = time.perf_counter()
        self._writer.write(self._request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        await self._reader.readexactly(2)
        return time.perf_counter() - began


async def keep_asking(port: int, number: int, delay_s: float) -> None:
    """The flood. Prints a line when all of it is in flight."""
    connections = [await Connection("flood", delay_s).open(port) for _ in range(number)]

    async def ask_on(connection: Connection, position: int) -> None:
        await asyncio.sleep(delay_s * position / number)
        while True:
            await connection.ask()

    asking = [asyncio.create_task(ask_on(connection, n)) for n, connection in enumerate(connections)]
    await asyncio.sleep(delay_s)
    print("flooding", flush=True)
    await asyncio.gather(*asking)


async def measured(port: int, requests: int, delay_s: float) -> list[float]:
    connection = await Connection("other", delay_s).open(port)
    for _ in range(20):
        await connection.ask()
    return [await connection.ask() for _ in range(requests)]


async def flooded(port: int, args: argparse.Namespace) -> list[float]:
    flood = subprocess.Popen(command("flood", port, args), stdout=subprocess.PIPE)  # noqa: ASYNC220
    try:
        assert flood.stdout is not None
        assert await asyncio.to_thread(flood.stdout.readline), "the flood failed"
        took = await measured(port, args.requests, args.model_ms / 1000)
        assert flood.poll() is None, "the flood ended"
        return took
    finally:
        flood.kill()
        flood.wait()


def command(role: str, port: int, args: argparse.Namespace) -> list[str]:
    own = ["--role", role, "--port", str(port), "--flood", str(args.flood), "--flood-s", str(args.flood_s)]
    return [sys.executable, "-m", "benchmarks.fairness", *own]


def told(name: str, seconds: list[float]) -> float:
    p50, p99 = statistics.median(seconds), statistics.quantiles(seconds, n=100)[98]
    print(f"  {name}: p50 {p50 * 1000:.2f} ms, p99 {p99 * 1000:.2f} ms", flush=True)
    return p50


async def compare(args: argparse.Namespace) -> None:
    model_port = free_port()
    model = subprocess.Popen(command("model", model_port, args))  # noqa: ASYNC220
    try:
        wait_for(model_port)
        route = shared_route(MODEL, f"http://127.0.0.1:{model_port}")
        async with routed_gateway(route, GATEWAY__CLIENT=args.client) as url:
            port, quiet, loud = urlsplit(url).port or 0, [], []
            for number in range(1, args.rounds + 1):
                print(f"round {number}")
                quiet.append(told("quiet", await measured(port, args.requests, args.model_ms / 1000)))
                loud.append(told(f"with {args.flood} in flight", await flooded(port, args)))
    finally:
        model.kill()
        model.wait()
    before, after = statistics.median(quiet), statistics.median(loud)
    print(
        f"p50 {before * 1000:.2f} ms quiet, {after * 1000:.2f} ms flooded: {after / before:.2f}x (target {TARGET}x), "
        f"{(after - before) * 1000:+.2f} ms; client {args.client}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--client", choices=("fast", "plain"), default="fast", help="gateway.client")
    parser.add_argument("--flood", type=int, default=500, help="requests that the other client keeps in flight")
    parser.add_argument("--flood-s", type=float, default=5.0, help="the model's time for each of these")
    parser.add_argument("--model-ms", type=float, default=20.0, help="the model's time for a measured request")
    parser.add_argument("--requests", type=int, default=200, help="measured in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--role", choices=("compare", "model", "flood"), default="compare", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "model":
        asyncio.run(serve_model(args.port))
    elif args.role == "flood":
        asyncio.run(keep_asking(args.port, args.flood, args.flood_s))
    else:
        asyncio.run(compare(args))


if __name__ == "__main__":
    main()
