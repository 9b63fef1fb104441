"""What a client does while lives end under it, in parts small enough to be done once for every point.

A scenario is done, cut off by a kill, and done again in the next life: what was answered is not asked again, what was not is, under the
same Idempotency-Key. So each is written such that its beginning can be repeated.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from consumers.app import CONSUMERS
from events.topics import Topic
from events.types import derived_id
from mini_studio.drivers.releases import RELEASE
from mini_studio.records.projection import timestamp
from tests.faults.crash_client import MANY_ROWS, MODEL, ROWS, Client, lines
from tests.faults.crash_life import Died
from tests.faults.standins import Seed

ASYNC: dict[str, Any] = {"headers": {"Prefer": "respond-async"}}


def upload(client: Client) -> None:
    """Large and small, twice under one key, one that is wrong, one under a key that stands for another."""
    client.upload("large", MANY_ROWS)
    client.upload("large again", MANY_ROWS, key="large")
    client.upload("wrong", [{"prompt": 1}], allowed=[422])
    client.upload("key of another", ROWS, key="large", allowed=[422])
    half = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + lines(MANY_ROWS)["file"][1]
    form = {"content": half, "headers": {"Content-Type": "multipart/form-data; boundary=b"}}
    client.ask("cut off", "upload", "POST", f"/fine_tuning/upload-dataset/{client.code}", allowed=[400], **form)


def submit(client: Client) -> None:
    """By id twice under one key, by path, as a form."""
    client.submit()
    client.submit("submit again", key="submit")
    client.submit("by path", dataset="dataset_dfs")
    form = {"model": MODEL, "client_code": client.code}
    client.ask("form", "submit", "POST", "/fine_tuning/submit-finetune", key="form", data=form, files=lines(ROWS))


def look(client: Client) -> None:
    """Everything there is to GET."""
    client.submit("first")
    job = client.submit("second")["job"]["id"]
    client.get(f"/fine_tuning/jobs/{job}")
    client.get(f"/fine_tuning/jobs/client/{client.code}?limit=1&after={job}")
    now = timestamp(datetime.now(UTC))
    assert client.get(f"/fine_tuning/jobs/{job}?as_of={now}")["job"]["id"] == job
    assert len(client.get(f"/fine_tuning/jobs/client/{client.code}?as_of={now}")["jobs"]) == 2
    client.get("/fine_tuning/cluster-status")
    client.get("/health")
    name = client.deploy()["deployment"]
    client.get(f"/inference/deployments/{name}")
    client.get(f"/inference/deployments?client_code={client.code}&limit=1")
    now = timestamp(datetime.now(UTC))
    assert client.get(f"/inference/deployments/{name}?as_of={now}")["deployment"]["name"] == name


def train(*seeds: Seed) -> Callable[["Client"], None]:
    def run(client: Client) -> None:
        for seed in seeds:
            client.submit(seed.name, seed)
        client.until(lambda: all(job["status"] in ("succeeded", "failed") for job in client.mine("jobs")))

    return run


def no_room(client: Client) -> None:
    """The job's folder cannot be made: a file is in its place."""
    client.upload()
    folder = client.world.settings.models / client.code / derived_id("job", client.code, f"{client.code}.submit")
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.touch()
    client.submit()
    client.until(lambda: [job["status"] for job in client.mine("jobs")] == ["failed"])


def too_small(client: Client) -> None:
    """The cluster could not hold the training, and then it grows. The life before may have submitted it already."""
    client.upload()
    if "submit" not in client.answers:
        client.world.outages.begin("cluster", "too small")
    client.submit()
    client.until(lambda: any(run["waits_for"] or run["phase"] != "queued" for run in client.mine("training_runs")))
    client.world.outages.end("cluster")
    client.until(lambda: [job["status"] for job in client.mine("jobs")] == ["succeeded"])


def in_the_way(client: Client) -> None:
    """The artifact is chosen and cannot be put in its place for a moment."""
    client.upload()
    job = client.world.settings.models / client.code / derived_id("job", client.code, f"{client.code}.submit")
    if "submit" not in client.answers:
        (job / "model").mkdir(parents=True, exist_ok=True)
    client.submit()
    client.until(lambda: [run["phase"] for run in client.mine("training_runs")] in (["committed"], ["succeeded"]))
    client.pause(0.2)
    if (job / "model").is_dir() and not (job / "model").is_symlink():
        (job / "model").rmdir()
    client.until(lambda: [job["status"] for job in client.mine("jobs")] == ["succeeded"])


def deploy(client: Client) -> None:
    """Twice under one key, then another scale; asked as soon as it is ready; and removed."""
    name = client.deploy()["deployment"]
    client.deploy("deploy again", key="deploy")
    client.deploy("same", key=None)
    client.until(lambda: client.going() or client.infer("base").is_success)
    client.deploy("rescale", scale=2)
    client.until(lambda: client.going() or [d["status"] for d in client.mine("deployments")] == ["ready"])
    if not client.going():
        client.remove("remove", name)


def tuned(client: Client) -> None:
    """Weights that a job made, and some that were put there by hand."""
    folder = client.world.settings.models / client.code / "by-hand" / "model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.bin").write_bytes(b"weights")
    client.tuned("by hand", str(folder), key="by hand")
    client.until(lambda: "ready" in [d["status"] for d in client.mine("deployments")])


def troubled(client: Client) -> None:
    """One that the driver refuses, one that never starts, and one that stops answering, fails and comes back."""
    client.deploy("refused", "refused-model", allowed=[202, 500])  # a slow machine may answer before it knows
    client.deploy("slow", "slow", allowed=[200, 202, 500])  # it may have failed by the time that it is asked for again
    name = client.deploy()["deployment"]
    folder = client.world.data / "serving" / name
    for state, status in (("failed", "failed"), ("ready", "ready"), ("starting", "failed"), ("ready", "ready")):
        (folder / "state").write_text(state)
        client.until(
            lambda status=status: status in [d["status"] for d in client.mine("deployments") if d["name"] == name]
        )


def poison(client: Client) -> None:
    """What is no event, on every topic, between events that are; the dead letters cannot be written for a moment."""
    for topic in Topic:
        client.poison(topic, b"{not json")
    client.upload()


def no_dead_letters(client: Client) -> None:
    client.world.outages.begin("dead-letters", "away")
    client.poison(Topic.DATASETS, b"\xff")
    client.pause(0.3)
    client.world.outages.end("dead-letters")
    client.until(lambda: client.buried(Topic.DATASETS, "datasets"))


def trouble(part: str, kind: str, *, buries: bool) -> Callable[["Client"], None]:
    """A store is out of order when an upload is profiled. A buried event is put back once the cause is gone."""

    def run(client: Client) -> None:
        client.world.outages.begin(part, kind)
        client.upload()
        if buries:
            client.until(lambda: client.mine("dataset_profiles") or client.buried(Topic.DATASETS, "datasets"))
        else:
            client.until(lambda: client.mine("dataset_profiles") or client.world.outages.met(part))
            client.pause(0.3)
        client.world.outages.end(part)
        if buries:
            client.again(Topic.DATASETS)
        client.until(lambda: client.mine("dataset_profiles"))

    return run


def backlog(client: Client) -> None:
    """Events wait for the broker, more than one batch of them."""
    client.world.outages.begin("publisher", "away")
    client.upload()
    client.upload("second")
    client.pause(0.3)
    client.world.outages.end("publisher")
    client.until(lambda: len(client.mine("dataset_profiles")) == 2)


def put_off(client: Client) -> None:
    """Routes cannot be written for a moment, until more than one event waits for that."""
    client.world.outages.begin("routes", "away")
    client.deploy(**ASYNC)
    client.until(lambda: [(r["status"], r["outbox"]) for r in client.mine("releases")] == [("ready", [])])
    before = client.world.said().count("delivery.put_off")
    client.until(lambda: client.mine("routes") or client.world.said().count("delivery.put_off") > before + 1)
    client.world.outages.end("routes")


def contested(client: Client) -> None:
    """Another member of the group writes every route first."""
    client.world.outages.begin("routes-rival", "on")
    client.deploy()
    client.until(lambda: [deployment["status"] for deployment in client.mine("deployments")] == ["ready"])
    client.world.outages.end("routes-rival")


def handover(client: Client) -> None:
    """Another member joins the group between two events."""
    client.upload()
    client.until(lambda: client.mine("dataset_profiles"), 60)
    client.join("datasets")
    client.upload("second")
    client.until(lambda: len(client.mine("dataset_profiles")) == 2, 60)


def bury(client: Client) -> None:
    """The consumer cannot take the request, for a reason that goes away. Done again, it finds what was buried before."""
    if not client.buried(Topic.DEPLOYMENTS, "serving"):
        client.world.outages.begin("releases", "broken")
    client.deploy(**ASYNC)
    client.until(lambda: client.buried(Topic.DEPLOYMENTS, "serving"))
    client.world.outages.end("releases")


def redrive(client: Client) -> None:
    """A dead letter is looked at and put back, once: who does it again is told."""
    bury(client)
    id = client.letters("serving")[-1]["id"]
    assert client.admin("GET", f"/{id}")["dead_letter"]["event_type"]
    client.admin("POST", f"/{id}/redrive", 200, 409)
    client.admin("POST", f"/{id}/redrive", 409)
    assert client.admin("GET", f"/{id}")["dead_letter"]["state"] == "redriven"
    client.until(lambda: [deployment["status"] for deployment in client.mine("deployments")] == ["ready"])


def redrive_all(client: Client) -> None:
    """A later request is taken before the first is put back, and with it what is no event, which is buried again."""
    bury(client)
    client.deploy("rescale", scale=2)
    client.poison(Topic.DEPLOYMENTS, b"{not json")
    client.until(lambda: client.letters("serving")[0]["subject"] == client.code)
    client.admin("POST", "/redrive?consumer=serving")
    asked = [letter for letter in client.letters("serving") if letter["subject"] != client.code]
    assert {letter["state"] for letter in asked} == {"redriven"}
    client.until(lambda: client.letters("serving")[0]["state"] == "open")


def surprise(client: Client) -> None:
    """A handler runs into what nobody expected."""
    client.world.outages.begin("cluster", "broken")
    client.get("/fine_tuning/cluster-status", 500)
    client.world.outages.end("cluster")


def stop(client: Client) -> None:
    """The life is asked to stop."""
    client.upload()
    client.pause(1.2)
    client.world.signal(signal.SIGTERM)
    client.until(lambda: not client.world.alive, 20)
    raise Died


def start(client: Client) -> None:
    """The broker comes back after the consumers could not begin."""
    if client.world.outages.on("consumers"):
        client.until(lambda: client.world.said().count("consumer.waiting_for_broker") >= len(CONSUMERS))
        client.world.outages.end("consumers")
    client.upload()


def away(client: Client) -> None:
    client.world.outages.begin("consumers", "away")


def orphan(client: Client) -> None:
    """Bytes whose record was never written, in both stores."""
    for store in (client.world.settings.dfs, client.world.data / "s3"):
        file = store / "datasets" / f"{derived_id('ds', client.code)}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"{}\n")
        os.utime(file, (0, 0))


def swept(client: Client) -> None:
    id = derived_id("ds", client.code)
    client.until(lambda: not any(id in file.name for file in client.world.data.rglob("ds_*.jsonl")))


def left_over(client: Client) -> None:
    """A deployment that was removed is applied once more, by a watcher that was slow."""
    client.world.start()
    name = client.deploy()["deployment"]
    file = applied_as(name, client)
    client.until(file.exists)  # a deploy on a busy machine is answered before it is applied
    applied = file.read_bytes()
    client.remove("remove", name)
    client.until(lambda: [deployment["status"] for deployment in client.mine("deployments")] == ["removed"])
    client.world.end()
    file.write_bytes(applied)


def taken_away(client: Client) -> None:
    """Asked for before, so this asks for nothing again."""
    client.until(lambda: not applied_as(client.deploy()["deployment"], client).exists())


def applied_as(name: str, client: Client) -> Path:
    """Where the driver keeps the release."""
    return client.world.data / "serving" / name / RELEASE


def dropped(client: Client) -> None:
    """A job's record is gone in mid-training: what comes next of it finds the journal only."""
    client.world.start()
    client.world.outages.begin("training-end", "on")  # however slow this machine is, more is to come
    job = client.submit("hangs", Seed.HANGS)["job"]["id"]
    client.until(lambda: [job["status"] for job in client.mine("jobs")] == ["running"])
    client.pause(0.1)  # until that is acknowledged
    client.world.end()
    client.world.forget("jobs", job)
    client.world.outages.end("training-end")


def rebuilt_elsewhere(client: Client) -> None:
    """The same, and another member of the group rebuilds the record first."""
    dropped(client)
    client.world.outages.begin("jobs-rival", "on")


def rebuilt(client: Client) -> None:
    client.until(lambda: [job["status"] for job in client.mine("jobs")] == ["succeeded"])
    client.world.outages.end("jobs-rival")


def doubled(client: Client) -> None:
    """A request is on the log twice, as two relays publish it, and its record is to be rebuilt from there."""
    client.world.start()
    client.world.outages.begin("publisher", "away")
    job = client.submit()["job"]["id"]
    client.until(lambda: client.world.journalled(job))
    client.world.end()
    client.world.outages.end("publisher")
    for _ in range(2):
        client.publish(job)
    client.world.forget("jobs", job)


def whole(client: Client) -> None:
    """All that a client does of its own accord, and then every event of it once more."""
    for part in (upload, submit, train(Seed.FAILS, Seed.IS_FORGOTTEN), deploy, tuned, poison):
        part(client)
    client.until(lambda: all(job["status"] in ("succeeded", "failed") for job in client.mine("jobs")))
    client.again(*Topic)


@dataclass(frozen=True)
class Scenario:
    """One way to use a studio."""

    run: Callable[[Client], None]
    before: Callable[[Client], None] | None = None
    """What is made of the world while nothing lives in it; the life begins after that."""
    grouped: bool = False
    """Whether its consumers have to join their groups."""


SCENARIOS = {
    "upload": Scenario(upload),
    "submit": Scenario(submit),
    "look": Scenario(look),
    "train": Scenario(train(Seed.SUCCEEDS)),
    "fail": Scenario(train(Seed.FAILS, Seed.IS_STOPPED, Seed.IS_REFUSED)),
    "lose": Scenario(train(Seed.IS_FORGOTTEN, Seed.IS_KILLED)),
    "stopped": Scenario(train(Seed.IS_STOPPED_OUTSIDE, Seed.HANGS)),
    "end badly": Scenario(train(Seed.BREAKS, Seed.LEAVES_NOTHING)),
    "no room": Scenario(no_room),
    "too small": Scenario(too_small),
    "in the way": Scenario(in_the_way),
    "deploy": Scenario(deploy),
    "tuned": Scenario(tuned),
    "troubled": Scenario(troubled),
    "poison": Scenario(poison),
    "no dead letters": Scenario(no_dead_letters),
    "store away": Scenario(trouble("s3", "away", buries=False)),
    "journal away": Scenario(trouble("journal", "away", buries=False)),
    "store wrong": Scenario(trouble("s3", "wrong", buries=True)),
    "store broken": Scenario(trouble("s3", "broken", buries=True)),
    "broker away": Scenario(backlog),
    "put off": Scenario(put_off),
    "contested": Scenario(contested),
    "handover": Scenario(handover, grouped=True),
    "redrive": Scenario(redrive),
    "redrive all": Scenario(redrive_all),
    "surprise": Scenario(surprise),
    "start": Scenario(start, away),
    "sweep": Scenario(swept, orphan),
    "left over": Scenario(taken_away, left_over),
    "dropped": Scenario(rebuilt, dropped),
    "rebuilt elsewhere": Scenario(rebuilt, rebuilt_elsewhere),
    "doubled": Scenario(rebuilt, doubled),
    "stop": Scenario(stop),
    "whole": Scenario(whole),
}
