"""The arguments of model servers: what they are, and that nothing from a request becomes one."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.types import DeploymentKind
from mini_studio.drivers.kubernetes.arguments import predict_source, studio_arguments, threads, vllm_arguments
from mini_studio.drivers.ports import ReleaseSpec
from mini_studio.errors import Refused
from mini_studio.settings import Kubernetes
from workloads.predict import predict
from workloads.serve.__main__ import arguments as parsed_by_our_server

SETTINGS = Kubernetes()
RECORD = json.loads((Path(__file__).parents[1] / "vllm" / "options.json").read_text())
"""Options of vLLM's own parser; `tests/vllm/check_vllm.py` wrote it, and has that parser read our arguments."""
WEIGHTS = "/models/acme/job_1/attempts/1/weights"
SPEC = ReleaseSpec(
    name="vllm-ft-acme-tiny-llama",
    deployment_id="dep_" + "0" * 24,
    generation=1,
    kind=DeploymentKind.FINE_TUNED,
    client_code="acme",
    model="ft:tiny-llama:acme:c744c09c",
    base_model="facebook/opt-125m",
    weights_path=Path(WEIGHTS),
    gpu_count=1,
    min_replicas=1,
    max_replicas=1,
    prometheus_threshold=5,
)
HOSTILE = [
    "", "-", "--trust-remote-code", "a b", "a\n", "a\x00", "None", "../a", "a/../b", "$(HF_TOKEN)", "a=b", "s3://a/b", "ü/b", "a" * 300,
]  # fmt: skip
anything = st.one_of(st.sampled_from(HOSTILE), st.text(), st.from_regex(r"[-/a-zA-Z.:$()=]{0,12}", fullmatch=True))


def test_vllm_is_started_with_the_model_first() -> None:
    common = ["--host=0.0.0.0", "--port=8000"]
    rest = [
        "--shutdown-timeout=320",
        "--no-enable-log-requests",
        "--disable-access-log-for-endpoints=/health,/metrics",
        "--disable-fastapi-docs",
    ]
    name, middleware = "--served-model-name=ft:tiny-llama:acme:c744c09c", "--middleware=predict.Predict"
    assert vllm_arguments(SPEC, WEIGHTS) == [WEIGHTS, name, *common, middleware, *rest]
    several = vllm_arguments(replace(SPEC, gpu_count=4), None)
    assert several == ["facebook/opt-125m", name, *common, "--tensor-parallel-size=4", middleware, *rest]


def test_vllm_has_these_options() -> None:
    """Of the version that is the default image."""
    assert SETTINGS.vllm_image.endswith(f":v{RECORD['version']}")
    for argument in vllm_arguments(replace(SPEC, gpu_count=2), None)[1:]:
        option, has_value, _ = argument.partition("=")
        assert RECORD["options"][option] in (("one", "some") if has_value else ("none",)), argument


def test_the_middleware_is_what_vllm_is_told_to_load() -> None:
    space: dict[str, Any] = {}
    exec(predict_source(), space)  # noqa: S102
    assert space["Predict"].__doc__ == predict.Predict.__doc__


def our_server(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> Any:
    monkeypatch.setattr(sys, "argv", ["serve", *arguments])
    return parsed_by_our_server()


def test_our_server_reads_fine_tuned_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Kubernetes(cpu="3500m")
    found = our_server(monkeypatch, studio_arguments(SPEC, settings, WEIGHTS, "/models"))
    assert (found.served_model_name, found.weights, found.base_model) == (SPEC.model, Path(WEIGHTS), None)
    assert (found.host, found.port, found.threads, found.finish_s) == ("0.0.0.0", 8000, 3, 320)  # noqa: S104


@pytest.mark.parametrize("base_model", ["tiny-llama", "facebook/opt-125m"])
def test_our_server_fetches_what_is_not_there_into_its_cache(monkeypatch: pytest.MonkeyPatch, base_model: str) -> None:
    """The models root is read-only, so it is no place for it."""
    spec = replace(SPEC, base_model=base_model)
    found = our_server(monkeypatch, studio_arguments(spec, SETTINGS, None, "/models"))
    assert (found.weights, found.base_model, found.models_root) == (None, base_model, Path("/cache"))


@pytest.mark.parametrize("weights", ["/models", "/models/", "/modelsx/a", "/etc/passwd", "/models/../etc", "models/a"])
def test_our_server_has_only_the_models_root(weights: str) -> None:
    with pytest.raises(Refused):
        studio_arguments(SPEC, SETTINGS, weights, "/models")


@pytest.mark.parametrize("name", ["tiny-llama", "gpt2", *HOSTILE])
def test_vllm_fetches_only_hub_ids(name: str) -> None:
    with pytest.raises(Refused, match="base model"):
        vllm_arguments(replace(SPEC, base_model=name), None)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_refused(name: str) -> None:
    spec = replace(SPEC, model=name)
    with pytest.raises(Refused):
        vllm_arguments(spec, WEIGHTS)
    with pytest.raises(Refused):
        studio_arguments(spec, SETTINGS, WEIGHTS, "/models")


@pytest.mark.parametrize(
    "name", ["", "-", "../a", "/models/a b", "/models/../a", "/models/$(HF_TOKEN)", "/models/a:Q4_K", "/models/a\n"]
)
def test_a_hostile_folder_is_refused(name: str) -> None:
    with pytest.raises(Refused):
        vllm_arguments(SPEC, name)
    with pytest.raises(Refused):
        studio_arguments(SPEC, SETTINGS, name, "/models")


@given(model=anything, base_model=anything, folder=st.none() | anything)
def test_no_value_becomes_an_option(model: str, base_model: str, folder: str | None) -> None:
    spec = replace(SPEC, model=model, base_model=base_model)
    weights = None if folder is None else f"/models/{folder}"
    fixed = [argument.partition("=")[0] for argument in vllm_arguments(SPEC, WEIGHTS)[1:]]
    try:
        first, *rest = vllm_arguments(spec, weights)
    except Refused:
        return
    assert [argument.partition("=")[0] for argument in rest] == fixed
    for value in (first, *(argument.partition("=")[2] for argument in rest)):
        assert re.fullmatch(r"|[A-Za-z0-9/][A-Za-z0-9_.@+:/,-]*", value), value


@pytest.mark.parametrize(("cpu", "whole"), [("2", 2), ("1.5", 1), ("500m", 1), ("2500m", 2), ("0", 1), ("64", 64)])
def test_threads_are_whole_cpus(cpu: str, whole: int) -> None:
    assert threads(cpu) == whole


@pytest.mark.parametrize("cpu", ["", "two", "-1", "1e3", "2 "])
def test_an_amount_of_cpu_is_a_quantity(cpu: str) -> None:
    with pytest.raises(Refused, match=r"serving\.kubernetes\.cpu"):
        threads(cpu)
