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

import httpx
import psutil
import pytest

from mini_studio.drivers.ports import RunReport, RunState, Workers
from mini_studio.drivers.ray import LOG_BYTES, RayCluster
from mini_studio.errors import Denied, Refused, Unavailable
from tests.fakes.ray_head import RayHead, free_ports, stub_trainer

SPEC = Path("/nowhere/spec.json")
Answer = tuple[int, str]


@pytest.fixture
async def cluster(ray_head: RayHead) -> AsyncIterator[RayCluster]:
    cluster = RayCluster(ray_head.address, timeout_s=30, token=ray_head.token, **stub_trainer())
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


@contextlib.asynccontextmanager
async def recording() -> AsyncIterator[tuple[RayCluster, list[dict[str, Any]]]]:
    """A cluster that takes every submission, and the bodies it got."""
    bodies: list[dict[str, Any]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length: ")[2].split("\r\n")[0])
        bodies.append(json.loads(await reader.readexactly(length)))
        writer.write(b"HTTP/1.1 200 x\r\ncontent-length: 2\r\n\r\n{}")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    cluster = RayCluster(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", timeout_s=30)
    yield cluster, bodies
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


@pytest.mark.parametrize(("token", "says"), [(None, "wants a token"), ("another", "does not take")])
async def test_without_the_right_token_every_call_says_what_to_set(
    ray_head: RayHead, token: str | None, says: str
) -> None:
    stranger = RayCluster(ray_head.address, timeout_s=30, token=token)
    room = stranger.has_room(Workers(), running=0)
    for call in (submitted(stranger), stranger.report("x"), stranger.stop("x"), room):
        with pytest.raises(Denied, match=f"{says}.*MINI_STUDIO_TRAINING__RAY_TOKEN") as error:
            await call
        assert not isinstance(error.value, Refused), "the job has done nothing wrong"
        assert token is None or token not in error.value.message
    status = await stranger.status()
    assert (status["available"], status["nodes"]) == (False, 0)
    assert "MINI_STUDIO_TRAINING__RAY_TOKEN" in status["reason"]
    assert await stranger.logs("x", 5) == []
    await stranger.aclose()


async def test_the_trainer_has_the_token_from_the_cluster_and_no_list_of_jobs_shows_it(
    ray_head: RayHead, cluster: RayCluster, tmp_path: Path
) -> None:
    assert ray_head.token
    seen = await seen_by_trainer(cluster, "ray-token-1", tmp_path / "spec.json")
    assert seen["ray_token"] == ray_head.token
    (tmp_path / "spec.json.exit").write_text("0")
    assert (await until_over(cluster, "ray-token-1")).state is RunState.SUCCEEDED
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {ray_head.token}"}, trust_env=False) as client:
        jobs = await client.get(f"{ray_head.address}/api/jobs/", timeout=30)
    assert "ray-token-1" in jobs.text
    assert ray_head.token not in jobs.text


def a_cluster(*nodes: tuple[float, float], used: tuple[float, float] = (0, 0)) -> Callable[[str], Answer]:
    """Answers of a cluster whose nodes have so many CPUs and GPUs."""
    cpus, gpus = (sum(node[index] for node in nodes) for index in (0, 1))
    state = [{"state": "ALIVE", "resources_total": {"CPU": cpu, "GPU": gpu, "memory": 1.0}} for cpu, gpu in nodes]
    state.append({"state": "DEAD", "resources_total": {"CPU": 64.0, "GPU": 8.0}})
    usage = {"CPU": [used[0], cpus], "GPU": [used[1], gpus]}
    data = {"result": {"result": state}, "clusterStatus": {"loadMetricsReport": {"usage": usage}}}
    return lambda _: (200, json.dumps({"data": data}))


@pytest.mark.parametrize(
    ("answers", "workers", "running", "room"),
    [
        (a_cluster((4, 1), (4, 1)), Workers(2, 4, 1), 0, True),
        (a_cluster((4, 1), (4, 1), used=(4, 1)), Workers(2, 4, 1), 0, False),
        (a_cluster((4, 1), (4, 1), used=(4, 1)), Workers(1, 4, 1), 0, True),
        (a_cluster((4, 1), (4, 1), used=(1, 0)), Workers(1, 4, 1), 2, False),
        (a_cluster((4, 0), (4, 0), used=(1, 0)), Workers(1, 3, 0), 1, True),
        (a_cluster((4, 2), (4, 0)), Workers(3, 1, 1), 0, None),
        (a_cluster((2, 1), (2, 1)), Workers(1, 4, 1), 0, None),
        (a_cluster((2, 0)), Workers(1, 1, 1), 0, None),
    ],
)
async def test_a_worker_needs_its_place_on_one_node(
    answers: Callable[[str], Answer], workers: Workers, running: int, room: bool | None
) -> None:
    async with answering(answers) as cluster:
        if room is None:
            with pytest.raises(Refused, match="MINI_STUDIO_TRAINING__WORKERS"):
                await cluster.has_room(workers, running=running)
        else:
            assert await cluster.has_room(workers, running=running) is room
    async with answering(a_cluster()) as cluster:
        with pytest.raises(Unavailable, match="no node that is alive"):
            await cluster.has_room(workers, running=running)


@pytest.mark.parametrize(
    ("workers", "reserved"),
    [
        (Workers(), {"entrypoint_num_cpus": 1}),
        (Workers(1, 4, 2), {"entrypoint_num_cpus": 4, "entrypoint_num_gpus": 2}),
        (Workers(2, 4, 1), {"entrypoint_num_cpus": 0}),
    ],
)
async def test_the_submission_reserves_what_its_own_process_needs(workers: Workers, reserved: dict[str, float]) -> None:
    async with recording() as (cluster, bodies):
        await cluster.submit("job-1", SPEC, workers=workers, metadata={})
    (body,) = bodies
    assert {name: value for name, value in body.items() if name.startswith("entrypoint_num")} == reserved
