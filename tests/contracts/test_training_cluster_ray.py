"""What only Ray does: how the trainer is started, lost workers, and every way in which Ray's HTTP API can be away."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from mini_studio.drivers.ports import RunReport, RunState, Workers
from mini_studio.drivers.ray import LOG_BYTES, RayCluster
from mini_studio.errors import Refused, Unavailable
from tests.fakes.ray_head import RayHead, free_ports, stub_trainer

SPEC = Path("/nowhere/spec.json")
Answer = tuple[int, str]


@pytest.fixture
async def cluster(ray_head: RayHead) -> AsyncIterator[RayCluster]:
    cluster = RayCluster(ray_head.address, timeout_s=30, **stub_trainer())
    yield cluster
    await cluster.aclose()


@contextlib.asynccontextmanager
async def answering(answer: Callable[[str], Answer | None], **options: Any) -> AsyncIterator[RayCluster]:
    """A cluster behind an HTTP server that answers each request's head as told; None: never."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            if (said := answer(head)) is None:
                await asyncio.sleep(60)
            else:
                body = said[1].encode()
                writer.write(f"HTTP/1.1 {said[0]} x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    cluster = RayCluster(f"http://127.0.0.1:{port}/", timeout_s=options.pop("timeout_s", 5), **options)
    yield cluster
    await cluster.aclose()
    server.close()


def submitted(cluster: RayCluster) -> Awaitable[None]:
    return cluster.submit("job-1", SPEC, workers=Workers(), metadata={"job_id": "job", "attempt": "1"})


async def seen_by_trainer(cluster: RayCluster, id: str, spec: Path, cpus: float = 1) -> dict[str, Any]:
    """What the trainer says of itself once it runs."""
    spec.write_text("{}") if not spec.exists() else None
    await cluster.submit(id, spec, workers=Workers(cpus=cpus), metadata={})
    seen = Path(f"{spec}.seen")
    for _ in range(600):
        if seen.exists() and seen.read_text():
            return dict(json.loads(seen.read_text()))
        await asyncio.sleep(0.1)
    raise AssertionError(await cluster.report(id))


async def until_over(cluster: RayCluster, id: str) -> RunReport:
    for _ in range(600):
        report = await cluster.report(id)
        if report.state not in (RunState.PENDING, RunState.RUNNING):
            return report
        await asyncio.sleep(0.1)
    raise AssertionError(report)


async def test_the_trainer_runs_in_this_interpreter_and_replaces_its_shell(cluster: RayCluster, tmp_path: Path) -> None:
    seen = await seen_by_trainer(cluster, "ray-start-1", tmp_path / "spec.json", cpus=2)
    assert (seen["python"], seen["threads"]) == (sys.executable, "2")
    parent = psutil.Process(seen["pid"]).parent()
    assert parent is not None
    assert "JobSupervisor" in " ".join(parent.cmdline())
    os.kill(seen["pid"], signal.SIGKILL)
    report = await until_over(cluster, "ray-start-1")
    assert report.state is RunState.FAILED
    assert "exit code -9" in report.message


async def test_a_lost_worker_is_a_lost_run(cluster: RayCluster, tmp_path: Path) -> None:
    seen = await seen_by_trainer(cluster, "ray-worker-1", tmp_path / "spec.json")
    parent = psutil.Process(seen["pid"]).parent()
    assert parent is not None
    parent.kill()
    assert (await until_over(cluster, "ray-worker-1")).state is RunState.LOST


async def test_only_the_end_of_a_long_log_is_kept(cluster: RayCluster, tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    lines = [f'line {n} of a log "with" \\n escapes é' for n in range(4 * LOG_BYTES // 40)]
    spec.write_text(json.dumps({"say": lines}))
    await seen_by_trainer(cluster, "ray-log-1", spec)
    (tmp_path / "spec.json.exit").write_text("0")
    assert (await until_over(cluster, "ray-log-1")).state is RunState.SUCCEEDED
    assert await cluster.logs("ray-log-1", 100) == lines[-100:]
    everything = await cluster.logs("ray-log-1", 10**9)
    assert everything == lines[-len(everything) :]


async def test_what_never_fits_stays_pending(cluster: RayCluster, tmp_path: Path) -> None:
    await cluster.submit("ray-big-1", SPEC, workers=Workers(cpus=10_000), metadata={})
    await cluster.stop("ray-big-1")
    assert (await cluster.report("ray-big-1")).state is RunState.PENDING


async def test_nobody_listens() -> None:
    cluster = RayCluster(f"http://127.0.0.1:{free_ports(1)[0]}", timeout_s=5)
    for call in (submitted(cluster), cluster.report("x"), cluster.stop("x")):
        with pytest.raises(Unavailable, match="is away"):
            await call
    assert await cluster.logs("x", 5) == []
    status = await cluster.status()
    assert (status["available"], status["resources"], status["nodes"]) == (False, {}, 0)
    assert "is away" in status["reason"]
    await cluster.aclose()


async def test_a_frozen_head_is_away_in_time() -> None:
    async with answering(lambda _: None, timeout_s=0.3) as cluster:
        for call in (submitted(cluster), cluster.report("x"), cluster.stop("x")):
            with pytest.raises(Unavailable, match="did not answer within"):
                await call
        assert await cluster.logs("x", 5) == []
    async with answering(lambda _: None, timeout_s=60) as cluster, asyncio.timeout(20):
        assert "does not answer" in (await cluster.status())["reason"]


@pytest.mark.parametrize(
    ("code", "text", "error"),
    [
        (400, "Traceback\nTypeError: metadata values must be strings", Refused),
        (403, "no", Refused),
        (429, "slow down", Unavailable),
        (500, "No available agent to submit job, please try again later.", Unavailable),
        (502, "", Unavailable),
    ],
)
async def test_a_refusal_is_told_from_an_outage(code: int, text: str, error: type[Exception]) -> None:
    async with answering(lambda _: (code, text)) as cluster:
        with pytest.raises(error, match=text.splitlines()[-1] if text else "nothing"):
            await submitted(cluster)
        with pytest.raises(Unavailable):
            await cluster.report("x")
        assert (await cluster.status())["available"] is False


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"data": {}}', "<html>", '{"status": "DANCING"}', '{"data": null}'])
async def test_an_answer_that_is_no_ray_is_an_outage(text: str) -> None:
    async with answering(lambda _: (200, text)) as cluster:
        with pytest.raises(Unavailable):
            await cluster.report("x")
        assert (await cluster.status())["available"] is False
        assert await cluster.logs("x", 5) == []
    async with answering(lambda _: (404, "<html>Not Found</html>")) as cluster:
        with pytest.raises(Unavailable):  # some other server: the run is not lost for that
            await cluster.report("x")


async def test_nodes_that_are_all_dead_are_no_cluster() -> None:
    dead = json.dumps({"data": {"result": {"result": [{"state": "DEAD"}]}, "clusterStatus": None}})
    async with answering(lambda _: (200, dead)) as cluster:
        assert "no node" in (await cluster.status())["reason"]


async def test_a_token_is_sent() -> None:
    def guarded(head: str) -> Answer:
        return (200, "{}") if "authorization: bearer t0k" in head.lower() else (401, "who are you?")

    async with answering(guarded) as stranger:
        with pytest.raises(Refused, match="who are you"):
            await submitted(stranger)
        assert "wants a token" in (await stranger.status())["reason"]
    async with answering(guarded, token="t0k") as trusted:
        await submitted(trusted)
