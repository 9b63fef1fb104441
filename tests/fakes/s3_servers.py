"""S3 servers for tests: the embedded one, and a real one at the address given or started by the script of a folder given.

`MINI_STUDIO_TEST_S3=http://host:port` names a running one, whose keys are in `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, its
region in `AWS_REGION`. `MINI_STUDIO_TEST_REAL=DIR`, which `make test-real` sets, names a folder with a script `s3`: `install`,
`start DATA PORT`, `stop DATA`.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from mini_studio.settings import S3
from tests.fakes.broker import lasting_port, wait_for
from tests.fakes.real_services import SCRIPTS

ADDRESS = "MINI_STUDIO_TEST_S3"
KEY, SECRET = "studio-test-key", "studio-test-secret"
REGION = "eu-central-1"
"""Not the one that is assumed where none is named."""


@contextlib.contextmanager
def embedded_s3(folder: Path, *options: str) -> Iterator[S3]:
    """The server that `make run` starts, on a folder of its own."""
    port = lasting_port()
    rclone = Path(sys.executable).parent / "rclone"
    program = str(rclone) if rclone.exists() else shutil.which("rclone")
    assert program is not None
    command = [program, "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}", "--vfs-cache-mode", "off"]
    process = subprocess.Popen([*command, "--auth-key", f"{KEY},{SECRET}", *options], stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        yield S3(endpoint=f"http://127.0.0.1:{port}", access_key=KEY, secret_key=SecretStr(SECRET))
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def real_s3(folder: Path) -> Iterator[S3]:
    """Skips where there is none. One that is started takes the bucket from the path, and from the host's name below `localhost`."""
    given, scripts = os.environ.get(ADDRESS), os.environ.get(SCRIPTS)
    if given:
        secret = SecretStr(os.environ["AWS_SECRET_ACCESS_KEY"])
        region = os.environ.get("AWS_REGION", "us-east-1")
        yield S3(endpoint=given, access_key=os.environ["AWS_ACCESS_KEY_ID"], secret_key=secret, region=region)
        return
    if not scripts:
        pytest.skip(f"needs a real S3: run `make test-real`, or set {ADDRESS}=http://host:port")
    script, port = Path(scripts).resolve() / "s3", lasting_port()
    environment = {
        **os.environ,
        "ROOT_ACCESS_KEY": KEY,
        "ROOT_SECRET_KEY": SECRET,
        "VGW_REGION": REGION,
        "VGW_VIRTUAL_DOMAIN": "localhost",
    }
    subprocess.run([script, "install"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([script, "start", folder, str(port)], check=True, env=environment, stdout=subprocess.DEVNULL)
    try:
        yield S3(endpoint=f"http://127.0.0.1:{port}", access_key=KEY, secret_key=SecretStr(SECRET), region=REGION)
    finally:
        subprocess.run([script, "stop", folder], check=True)
