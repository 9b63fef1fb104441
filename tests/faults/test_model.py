"""The decision core through every order of steps, crashes, repeats and lapses of memory, as far as the bounds reach.

The handlers, the relay, the watchers, the transitions and the projections are the real ones; tests/faults/model is the world.
From every state a fair run without further faults must end with everything done.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from consumers.watchers import training as watcher
from mini_studio.records.projection import Projection
from mini_studio.records.releases import Release
from mini_studio.records.training_runs import TrainingRun
from tests.faults.length import length
from tests.faults.model import cluster, deployments, fine_tunes, seeded
from tests.faults.model.deployments import Deployments
from tests.faults.model.fine_tunes import FineTunes
from tests.faults.model.kernel import Explored, Violation
from tests.faults.model.parts import repeatable

pytestmark = pytest.mark.timeout(900)

DELIVERY = ("api", "relay", "relay", "training", "jobs")
WATCHING = ("watcher", "watcher")
RIVALS = ("watcher", "watcher!")
THROUGH = ("api", "relay", "training", "jobs", "watcher!")


@pytest.fixture
def world() -> Iterator[None]:
    with repeatable(cluster.FILES):
        yield


SCENES = (
    "delivery", "two handlers", "lost log", "first attempt", "second attempt", "two watchers",
    "cancel", "cancel the first attempt", "cancel under way", "cancel beside success",
    "cancel beside two watchers",
)  # fmt: skip
CANCELLED = ("cancel!", "relay!", "training", "jobs!")


def whole(search: Callable[[str, int], Explored], scene: str, states: int) -> None:
    """So many states were searched, or all that there are."""
    explored = search(scene, states)
    print(f"{scene}: {explored}")
    assert explored.states == states or explored.complete


def fine_tunes_of(scene: str, states: int) -> Explored:
    faults = fine_tunes.Faults
    match scene:
        case "delivery":
            model = FineTunes(DELIVERY, faults(crash=2, again=1))
        case "two handlers":
            model = FineTunes(("api", "relay", "training", "training", "jobs", "jobs"), faults(crash=1, again=1))
        case "lost log":
            model = FineTunes(THROUGH, faults(crash=1, broker=1, death=1))
        case "first attempt":
            model = FineTunes(RIVALS, faults(crash=1, forget=1, death=1, silence=1, unknown=1))
            return model.search(model.claimed(), states)
        case "second attempt":
            model = FineTunes(RIVALS, faults(crash=1, forget=1, death=1, silence=1))
            return model.search(model.under_way(), states)
        case "cancel":
            model = FineTunes((*DELIVERY, "watcher!", "cancel"), faults(crash=1, again=1, broker=1))
        case "cancel the first attempt":
            model = FineTunes((*CANCELLED, "watcher"), faults(crash=1, forget=1, death=1, unknown=1))
            return model.search(model.claimed(), states)
        case "cancel under way":
            model = FineTunes((*CANCELLED, "watcher"), faults(crash=1, forget=1, death=1, silence=1, again=1))
            return model.search(model.under_way(), states)
        case "cancel beside success":
            model = FineTunes(
                ("cancel!", "relay!", "training", "jobs!", "watcher", "watcher!"), faults(crash=1, again=1)
            )
            return model.search(model.complete(), states)
        case "cancel beside two watchers":
            model = FineTunes(("cancel!", "relay!", "training!", "jobs!", "watcher", "watcher"), faults(crash=1))
            return model.search(model.claimed(), states)
        case _:
            model = FineTunes(WATCHING, faults(crash=1, forget=1, death=1, silence=1, unknown=1))
            return model.search(model.claimed(), states)
    return model.search(model.start(), states)


@pytest.mark.parametrize("scene", SCENES)
def test_a_fine_tune_in_every_order(world: None, scene: str) -> None:
    whole(fine_tunes_of, scene, 5000)


@pytest.mark.real
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scene", SCENES)
def test_a_fine_tune_in_many_more_orders(world: None, scene: str) -> None:
    whole(fine_tunes_of, scene, int(length(short=20_000, full=100_000)))


DEPLOYED = ("requests", "serving", "two watchers", "two routes")


def deployments_of(scene: str, states: int) -> Explored:
    faults = deployments.Faults
    match scene:
        case "requests":
            slots = ("deploy", "rescale", "remove", "relay!", "serving", "routes", "watcher!")
            model = Deployments(slots, faults(crash=1, again=1), ("deploy", "rescale", "remove"))
            return model.search(model.start(), states)
        case "serving":
            slots = ("deploy!", "rescale!", "remove!", "relay!", "serving!", "routes!", "watcher", "sweep!")
            model = Deployments(slots, faults(1, 0, 1, 1, 1, 1, 1), ("deploy", "remove", "rescale"))
        case "two watchers":
            slots = ("deploy!", "rescale!", "remove!", "relay!", "serving!", "watcher", "watcher", "sweep")
            model = Deployments(slots, faults(crash=1), ("deploy", "remove", "rescale"))
        case _:
            slots = ("remove!", "relay!", "serving!", "watcher!", "routes", "routes!")
            model = Deployments(slots, faults(again=1), ("remove",))
    return model.search(model.serving(), states)


@pytest.mark.parametrize("scene", DEPLOYED)
def test_a_deployment_in_every_order(world: None, scene: str) -> None:
    whole(deployments_of, scene, 5000)


@pytest.mark.real
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scene", DEPLOYED)
def test_a_deployment_in_many_more_orders(world: None, scene: str) -> None:
    whole(deployments_of, scene, int(length(short=20_000, full=100_000)))


# --- seeded bugs


def found(model: FineTunes | Deployments, start: Any) -> str:
    with pytest.raises(Violation) as violation:
        model.search(start, 40_000)
    print(violation.value)
    return violation.value.what


def test_without_a_fence_another_attempts_artifact_is_chosen() -> None:
    with repeatable(cluster.FILES, [(TrainingRun, "commit", seeded.commit_without_a_fence)]):
        model = FineTunes(RIVALS, fine_tunes.Faults(forget=1))
        assert "no artifact of its own" in found(model, model.under_way())


def test_without_a_new_token_a_new_attempt_is_taken_for_the_old_one() -> None:
    """What was read of the first attempt's progress counts as read of the second's, whose start is then never seen."""
    with repeatable(cluster.FILES, [(TrainingRun, "begin_attempt", seeded.begin_attempt_without_a_token)]):
        model = FineTunes(RIVALS, fine_tunes.Faults(forget=1))
        assert "in the end the run is submitted" in found(model, model.under_way())


def test_without_a_generation_a_late_removal_takes_the_successor(world: None) -> None:
    slots = ("deploy!", "remove!", "relay!", "serving!", "watcher", "watcher!")
    wishes = ("remove", "deploy")
    model = Deployments(slots, deployments.Faults(), wishes, removes=seeded.remove_whatever_there_is)
    assert "removal 2 took the objects of generation 3" in found(model, model.serving())


def test_without_a_generation_a_request_that_is_read_again_wins() -> None:
    with repeatable({}, [(Release, "want", seeded.want_without_a_generation)]):
        model = Deployments(("remove!", "relay!", "serving"), deployments.Faults(again=1), ("remove",))
        assert "releases went back" in found(model, model.serving())


def test_published_before_its_write_an_event_is_a_phantom(world: None) -> None:
    model = FineTunes(DELIVERY, fine_tunes.Faults(crash=1), replaced={"training": seeded.publish_before_write})
    assert "no record knows of" in found(model, model.start())


def test_acknowledged_before_its_write_a_request_is_lost(world: None) -> None:
    model = FineTunes(DELIVERY, fine_tunes.Faults(crash=1), acknowledges_first=True)
    assert "never taken up" in found(model, model.start())


def test_settled_before_the_ack_an_event_never_leaves(world: None) -> None:
    model = FineTunes(DELIVERY, fine_tunes.Faults(crash=1), replaced={"relay": seeded.settle_before_ack})
    assert "not on the log" in found(model, model.start())


def test_without_sequences_a_job_goes_back() -> None:
    with repeatable(cluster.FILES, [(Projection, "apply", seeded.apply_without_sequence)]):
        model = FineTunes(("relay!", "training!", "jobs", "watcher!"), fine_tunes.Faults(again=1))
        model.TAKES = (
            1  # a batch as a whole is written at once, and a whole one that comes again ends where it did before
        )
        assert "is not what its events make" in found(model, model.under_way())


OUTRUN = ("cancel!", "relay!", "training!", "watcher", "watcher!")


def test_without_a_second_look_a_cancelled_attempt_gets_a_trainer() -> None:
    with repeatable(cluster.FILES, [(watcher, "current", seeded.submit_without_a_second_look)]):
        model = FineTunes(OUTRUN, fine_tunes.Faults())
        assert "may go on" in found(model, model.claimed())


def test_without_a_choice_a_success_is_cancelled() -> None:
    with repeatable(cluster.FILES, [(TrainingRun, "cancel", seeded.cancel_whatever_was_chosen)]):
        model = FineTunes(("training", "watcher", "cancel!", "relay!"), fine_tunes.Faults())
        assert "was not chosen" in found(model, model.complete())
