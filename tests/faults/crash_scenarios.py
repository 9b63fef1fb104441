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
from events.topics import Plain, Topic
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
        client.until(lambda: all(job["status"] in ("succeeded", "failed", "cancelled") for job in client.mine("jobs")))

    return run


def endless(client: Client) -> str:
    """A job that runs, and goes on as long as `training-end` is out of order; or that is cancelled by now."""
    if "cancel" not in client.answers:
        client.world.outages.begin("training-end", "on")
    job = str(client.submit("endless")["job"]["id"])
    client.until(lambda: status_of(client, job) in ("running", "cancelled"))
    return job


def cancel(client: Client) -> None:
    """One that runs, twice; then one that may be in the queue, or over, or anything between."""
    job = endless(client)
    client.cancel("cancel", job)
    client.cancel("cancel again", job)
    client.until(lambda: status_of(client, job) == "cancelled")
    client.world.outages.end("training-end")
    soon = client.submit("soon")["job"]["id"]
    client.cancel("cancel soon", soon, allowed=[200, 202, 409])
    client.until(lambda: status_of(client, soon) in ("succeeded", "cancelled"))
    client.cancel("cancel late", job)


def cancel_unread(client: Client) -> None:
    """The request and its cancel reach the log together, while the cluster is not there to stop anything."""
    client.world.outages.begin("publisher", "away")
    client.world.outages.begin("cluster", "away")
    job = client.submit()["job"]["id"]
    client.cancel("cancel", job, allowed=[200, 202, 409])  # the life before may have let it go on
    client.world.outages.end("publisher")
    client.pause(0.2)
    client.world.outages.end("cluster")
    client.until(lambda: status_of(client, job) in ("succeeded", "cancelled"))


def cancel_apart(client: Client) -> None:
    """The cluster cannot be asked for a while, in which a training is cancelled."""
    job = endless(client)
    client.world.outages.begin("reports", "away")
    client.cancel("cancel", job)
    client.until(lambda: status_of(client, job) == "cancelled" or client.world.outages.met("reports"))
    client.world.outages.end("reports")
    client.until(lambda: status_of(client, job) == "cancelled")
    client.world.outages.end("training-end")


def cancel_first(client: Client) -> None:
    """A cancel stands on the log before what it cancels, of which nobody but the journal knows."""
    client.world.start()
    client.world.outages.begin("publisher", "away")
    job = client.submit()["job"]["id"]
    client.cancel("cancel", job)
    client.world.end()
    client.world.outages.end("publisher")
    client.journal("jobs", job)
    client.publish(job, backwards=True)


def cancelled(client: Client) -> None:
    client.until(lambda: [job["status"] for job in client.mine("jobs")] == ["cancelled"])


def outrun(client: Client) -> None:
    """Another watcher gives an attempt up before it is submitted."""
    client.world.outages.begin("training_runs-rival", "on")
    client.submit()
    client.until(lambda: any(run["attempt"] > 1 for run in client.mine("training_runs")))
    client.world.outages.end("training_runs-rival")
    client.until(lambda: [job["status"] for job in client.mine("jobs")] == ["succeeded"])


def status_of(client: Client, job: str) -> str:
    return next(str(found["status"]) for found in client.mine("jobs") if found["_id"] == job)


def delete(client: Client) -> None:
    """A dataset that nothing uses, twice; one that a job has to be cancelled for; and what is asked of them after."""
    unused = client.upload("unused")["dataset_id"]
    client.get(f"/fine_tuning/datasets/client/{client.code}?limit=1")
    client.get(f"/fine_tuning/datasets/client/{client.code}?after={unused}")
    client.delete("delete", unused)
    client.delete("delete again", unused)
    client.get(f"/fine_tuning/datasets/{unused}", 404)
    client.upload("unused again", key="unused", allowed=[409])
    used = client.upload()["dataset_id"]
    job = endless(client)
    if "cancel" not in client.answers:
        client.delete("delete used", used, allowed=[200, 409])  # 200: the life before has cancelled it
    now = timestamp(datetime.now(UTC))
    if client.call("GET", f"/fine_tuning/datasets/{used}").is_success:
        assert client.get(f"/fine_tuning/datasets/client/{client.code}?as_of={now}")["datasets"]
    client.cancel("cancel", job)
    client.until(lambda: status_of(client, job) == "cancelled")
    client.world.outages.end("training-end")
    client.delete("delete used now", used)
    client.submit("endless again", key="endless")
    client.submit("too late", allowed=[404])
    client.until(lambda: all(profile["removed"] for profile in client.mine("dataset_profiles")))
    for store in (client.world.settings.dfs, client.world.data / "s3"):
        assert not [id for id in (unused, used) if list(store.rglob(f"{id}*"))]


def delete_first(client: Client) -> None:
    """A deletion stands on the log before the upload."""
    client.world.start()
    client.world.outages.begin("publisher", "away")
    dataset = client.upload()["dataset_id"]
    client.delete("delete", dataset)
    client.world.end()
    client.world.outages.end("publisher")
    client.journal("datasets", dataset)
    client.publish(dataset, backwards=True)


def deleted(client: Client) -> None:
    client.until(lambda: [profile["removed"] for profile in client.mine("dataset_profiles")] == [True])


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


def dialect(client: Client) -> None:
    """All of `/v1`: a file, its bytes, a job that deploys its result by itself, what is said of it, and its end."""
    rows = {"data": {"purpose": "fine-tune"}, "files": lines(ROWS)}
    file = client.ask("file", "upload", "POST", "/v1/files", key="file", **rows)["id"]
    client.get("/v1/files?order=asc")
    body = {"model": MODEL, "training_file": file, "seed": Seed.SUCCEEDS}
    job = client.ask("job", "submit", "POST", "/v1/fine_tuning/jobs", key="job", json=body)["id"]
    if not client.going():
        client.until(lambda: [d["status"] for d in client.mine("deployments")] == ["ready"])
        client.get(f"/v1/files/{file}")
        assert client.call("GET", f"/v1/files/{file}/content", headers={"X-User-ID": client.code}).content
    client.until(lambda: client.get(f"/v1/fine_tuning/jobs/{job}")["status"] == "succeeded")
    assert client.get("/v1/fine_tuning/jobs")["data"][0]["id"] == job
    assert client.get(f"/v1/fine_tuning/jobs/{job}/events")["data"]
    client.get(f"/v1/fine_tuning/jobs/{job}/checkpoints")
    client.get("/v1/models")
    model = client.get(f"/v1/fine_tuning/jobs/{job}")["fine_tuned_model"]
    client.ask("late cancel", "cancel", "POST", f"/v1/fine_tuning/jobs/{job}/cancel", allowed=(409,))
    # the life before may have done it
    client.ask("delete model", "remove", "DELETE", f"/v1/models/{model}", allowed=(200, 404, 409))
    client.ask("delete file", "delete", "DELETE", f"/v1/files/{file}", allowed=(200, 404))


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
    client.until(folder.exists)
    for state, status in (("failed", "failed"), ("ready", "ready"), ("starting", "failed"), ("ready", "ready")):
        (folder / "state").write_text(state)
        client.until(
            lambda status=status: status in [d["status"] for d in client.mine("deployments") if d["name"] == name]
        )


def woken(client: Client) -> None:
    """It sleeps, and a request wakes it, once, however often it is woken and killed in between."""
    name = client.deploy(least=0)["deployment"]
    client.until(lambda: [d["status"] for d in client.mine("deployments")] == ["ready"])
    (client.world.data / "serving" / name / "state").write_text("asleep")
    client.until(lambda: [(r["replicas"], r["outbox"]) for r in client.mine("releases")] == [(0, [])])
    client.until(lambda: [r["route"]["replicas"] for r in client.mine("routes")] == [0])
    # a gateway that does not know yet that it sleeps asks the model as before
    client.until(lambda: client.infer("base").is_success and [d["replicas"] for d in client.mine("deployments")] == [1])


def poison(client: Client) -> None:
    """What is no event, on every topic, between events that are; the dead letters cannot be written for a moment."""
    for topic in Topic:
        client.poison(topic, b"{not json")
    client.upload()


def no_dead_letters(client: Client) -> None:
    client.world.outages.begin("dead-letters", "away")
    client.poison(Topic.DATASETS, b"\xff")
    client.until(lambda: client.buried(Topic.DATASETS, "datasets") or client.world.outages.met("dead-letters"))
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


def usage(client: Client) -> None:
    """Gateways say what was used, again and again, while another member writes and while nobody can; and what is no batch."""
    for part in ("usage_hours", "usage_hours-rival"):
        client.world.outages.end(part)  # the life before may have died in the middle
    client.say_used(1)
    client.until(lambda: used(client) >= 1)
    client.world.outages.begin("usage_hours-rival", "on")
    client.say_used(1, 2)
    client.until(lambda: used(client) >= 2)
    client.world.outages.end("usage_hours-rival")
    client.world.outages.begin("usage_hours", "away")
    client.say_used(*range(1, 6))
    client.until(lambda: used(client) >= 5 or client.world.outages.met("usage_hours"))
    client.pause(0.3)
    client.world.outages.end("usage_hours")
    client.poison(Plain.USAGE, b"{not json")
    client.say_used(6)
    client.until(lambda: used(client) >= 6)
    client.pause(0.3)  # whatever else would be counted
    hours = "from=2026-01-31T12:00:00Z&to=2026-01-31T13:00:00Z"
    assert client.get(f"/usage?{hours}")["total"]["prompt_tokens"] == 6


def used(client: Client) -> float:
    """How many requests are summed up."""
    return sum(hour["tally"]["requests"] for hour in client.mine("usage_hours"))


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
    client.until(lambda: all(job["status"] in ("succeeded", "failed", "cancelled") for job in client.mine("jobs")))
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
    "cancel": Scenario(cancel),
    "cancel unread": Scenario(cancel_unread),
    "cancel apart": Scenario(cancel_apart),
    "cancel first": Scenario(cancelled, cancel_first),
    "outrun": Scenario(outrun),
    "delete": Scenario(delete),
    "delete first": Scenario(deleted, delete_first),
    "no room": Scenario(no_room),
    "too small": Scenario(too_small),
    "in the way": Scenario(in_the_way),
    "dialect": Scenario(dialect),
    "deploy": Scenario(deploy),
    "tuned": Scenario(tuned),
    "troubled": Scenario(troubled),
    "woken": Scenario(woken),
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
    "usage": Scenario(usage),
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
