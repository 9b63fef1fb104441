"""The light catalogue reads what the heavy half installs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mini_studio.drivers.catalogue import ModelCatalogue
from mini_studio.errors import Invalid


def folder_of_a_model(at: Path) -> Path:
    at.mkdir(parents=True)
    (at / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"a": np.zeros((2, 3)), "b": np.zeros(4)}, at / "model.safetensors")
    (at / "tokenizer.json").write_text("{}")
    return at


def test_the_built_in_models_are_known_before_they_are_installed(tmp_path: Path) -> None:
    catalogue = ModelCatalogue(tmp_path / "none")
    assert catalogue.names() == ["tiny-llama", "smollm2-135m-instruct"]
    tiny = catalogue.require("tiny-llama")
    assert not tiny.installed
    assert tiny.parameters
    assert catalogue.get("other") is None


@pytest.mark.parametrize("name", ["facebook/opt-125m", "../../etc", "", "x" * 10_000, "tiny-llama\n"])
def test_an_unknown_model_is_invalid_and_the_error_says_what_to_do(tmp_path: Path, name: str) -> None:
    with pytest.raises(Invalid) as caught:
        ModelCatalogue(tmp_path).require(name)
    assert caught.value.message.startswith("model: unknown base model ")
    assert "tiny-llama, smollm2-135m-instruct" in caught.value.message
    assert "mini-studio models add" in caught.value.message
    assert len(caught.value.message) < 500


def test_a_local_folder_is_added_under_a_name(tmp_path: Path) -> None:
    catalogue = ModelCatalogue(tmp_path / "models")
    folder = folder_of_a_model(tmp_path / "mine")
    said = list(catalogue.add("org/mine", folder))
    assert said == [f"org/mine is ready in {folder}"]
    assert (catalogue.require("org/mine").installed, catalogue.require("org/mine").parameters) == (True, 10)
    assert catalogue.names()[-1] == "org/mine"


def test_what_cannot_be_added_says_why(tmp_path: Path) -> None:
    catalogue = ModelCatalogue(tmp_path)
    with pytest.raises(Invalid, match=r"config\.json"):
        list(catalogue.add("mine", tmp_path))
    broken = folder_of_a_model(tmp_path / "broken")
    (broken / "model.safetensors").write_text("cut")
    with pytest.raises(Invalid, match="copy the model's folder again"):
        list(catalogue.add("mine", broken))
    with pytest.raises(Invalid, match="models add"):
        list(catalogue.add("no-such-model"))
    with pytest.raises(Invalid, match="cannot name"):
        list(catalogue.add("--path"))


def test_it_needs_no_machine_learning_library() -> None:
    import subprocess

    code = "import sys, mini_studio.drivers.catalogue; print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
