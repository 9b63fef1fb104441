"""Lists in pages, and watches that end, are resumed and grow too old, on a real API server."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from mini_studio.drivers.kubernetes import api as module
from mini_studio.drivers.kubernetes.api import CONFIG_MAP, SCALED_OBJECT, Kind, KubeApi, Object, TooOld
from mini_studio.drivers.kubernetes.mirror import Mirror
from mini_studio.settings import Kubernetes
from tests.fakes.real_kubernetes import RealKubernetes
from tests.fakes.waiting import until

pytestmark = pytest.mark.real

SELECTOR = "test=yes"


class Counting(KubeApi):
    """Counts the lists that were read, and keeps the events of the watches."""

    def __init__(self, settings: Kubernetes) -> None:
        super().__init__(settings)
        self.lists = 0
        self.watches = 0
        self.events: list[str] = []

    async def list(self, *arguments: Any) -> tuple[list[Object], str]:
        self.lists += 1
        return await super().list(*arguments)

    async def watch(self, *arguments: Any) -> AsyncIterator[tuple[str, Object]]:
        self.watches += 1
        async for type, found in super().watch(*arguments):
            self.events.append(type)
            yield type, found


@pytest_asyncio.fixture
async def api(real_cluster: RealKubernetes, namespace: str) -> AsyncIterator[Counting]:
    api = Counting(Kubernetes(namespace=namespace, kubeconfig=real_cluster.kubeconfig))
    yield api
    await api.aclose()


@contextlib.asynccontextmanager
async def mirrored(api: KubeApi, kind: Kind = CONFIG_MAP) -> AsyncIterator[Mirror]:
    mirror = Mirror(api, kind, SELECTOR, lambda: None)
    running = asyncio.create_task(mirror.run())
    await asyncio.wait_for(mirror.synced.wait(), 30)
    yield mirror
    running.cancel()
    await asyncio.wait([running])


async def put(api: KubeApi, name: str, value: str) -> Object:
    metadata = {"name": name, "labels": {"test": "yes"}}
    manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"value": value}}
    return await api.apply(CONFIG_MAP, manifest, force=True)


async def delete(api: KubeApi, name: str) -> None:
    found = await api.get(CONFIG_MAP, name)
    assert found is not None
    await api.delete(CONFIG_MAP, name, uid=found["metadata"]["uid"], version=found["metadata"]["resourceVersion"])


def values(mirror: Mirror) -> dict[str, str]:
    return {found["metadata"]["name"]: found["data"]["value"] for found in mirror.all()}


async def test_a_list_is_read_in_pages(api: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE", 3)
    for number in range(8):
        await put(api, f"c{number}", str(number))
    calls = api.calls
    found, version = await api.list(CONFIG_MAP, SELECTOR)
    assert [each["metadata"]["name"] for each in found] == [f"c{number}" for number in range(8)]
    assert api.calls - calls == 3
    assert int(version) > 0


async def test_a_watch_that_ends_goes_on_where_it_was(api: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCH_S", 1)
    async with mirrored(api) as mirror:
        wanted = {}
        for number in range(30):
            name = f"c{number % 7}"
            if number % 3 == 2 and name in wanted:
                await delete(api, name)
                del wanted[name]
            else:
                await put(api, name, str(number))
                wanted[name] = str(number)
            await asyncio.sleep(0.1)
        await until(lambda: values(mirror) == wanted)
        assert api.watches > 2
        assert api.lists == 1


async def test_a_version_that_is_too_old_is_listed_anew(api: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The API server keeps no history from before it knew the kind."""
    monkeypatch.setattr(module, "WATCH_S", 1)
    with pytest.raises(TooOld):
        async for _ in api.watch(SCALED_OBJECT, SELECTOR, "1"):
            pass
    manifest = {
        "apiVersion": SCALED_OBJECT.api_version,
        "kind": SCALED_OBJECT.name,
        "metadata": {"name": "a", "labels": {"test": "yes"}},
        "spec": {"scaleTargetRef": {"name": "none"}, "triggers": [{"type": "cpu", "metadata": {"value": "50"}}]},
    }
    async with mirrored(api, SCALED_OBJECT) as mirror:
        mirror._seen_to = 1
        await until(lambda: api.lists == 2)
        await api.apply(SCALED_OBJECT, manifest, force=True)
        await until(lambda: mirror.get("a") is not None)


async def test_bookmarks_carry_a_quiet_watch_on(api: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCH_S", 5)
    async with mirrored(api) as mirror:
        before = mirror._seen_to
        await api.apply(
            CONFIG_MAP, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "other"}}, force=True
        )
        await until(lambda: "BOOKMARK" in api.events)
        assert mirror._seen_to > before
        assert values(mirror) == {}
        assert api.lists == 1


async def test_an_answer_does_not_bring_back_what_is_deleted(api: Counting) -> None:
    async with mirrored(api) as mirror:
        late = await put(api, "a", "1")
        await delete(api, "a")
        await put(api, "b", "1")
        await until(lambda: values(mirror) == {"b": "1"})
        mirror.put(late)
        assert values(mirror) == {"b": "1"}
