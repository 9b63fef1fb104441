"""A real Apache Kafka that lets in only who shows a certificate's trust or a password: one listener for each way to connect."""

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiokafka.conn import create_conn
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import CompactArray, CompactBytes, CompactString, Int8, Int16, Int32, Schema, TaggedFields

from mini_studio.settings import Kafka
from tests.fakes import real_kafka
from tests.fakes.broker import lasting_port
from tests.fakes.certificates import Certificates
from tests.fakes.real_kafka import RealKafka

USER, PASSWORD = "studio", "a-password-of-this-test"
SCRAM = {"SCRAM-SHA-256": (1, "sha256"), "SCRAM-SHA-512": (2, "sha512")}
"""Kafka's number and Python's name of the hash."""
MODULES = "org.apache.kafka.common.security"


@dataclass
class SecuredKafka:
    kafka: RealKafka
    ports: dict[str, int]
    ca_file: Path

    def settings(self, security: str, mechanism: str | None = None, password: str = PASSWORD) -> Kafka:
        """To connect by one of its listeners, in the ways of the settings."""
        user = {"sasl_mechanism": mechanism, "username": USER, "password": password} if mechanism else {}
        return Kafka.model_validate(
            {
                "bootstrap": f"127.0.0.1:{self.ports[security]}",
                "security": security,
                "ca_file": self.ca_file if security.endswith("ssl") else None,
                "idempotent": True,
                **user,
            }
        )


@contextlib.contextmanager
def secured_kafka(folder: Path, certificates: Certificates) -> Iterator[SecuredKafka]:
    """Skips where there is no script to start one."""
    script = real_kafka.script()
    if script is None:
        pytest.skip("starts a real Apache Kafka with TLS and users: run `make test-real`")
    ports = {name: lasting_port() for name in ("sasl_plaintext", "sasl_ssl", "ssl")}
    listeners = [f"{name.upper()}://127.0.0.1:{port}" for name, port in ports.items()]
    plain = f'{MODULES}.plain.PlainLoginModule required user_{USER}="{PASSWORD}";'
    jaas = {"plain": plain} | {name.lower(): f"{MODULES}.scram.ScramLoginModule required;" for name in SCRAM}
    protocols = ("PLAINTEXT", "SASL_PLAINTEXT", "SASL_SSL", "SSL")
    kafka = RealKafka(script, folder, lasting_port())
    own = [f"PLAINTEXT://127.0.0.1:{kafka.port}"]
    kafka.start_first(
        f"listeners={','.join([*own, f'CONTROLLER://127.0.0.1:{kafka.port + 1}', *listeners])}",
        # the script asks the last one whether the broker is up
        f"advertised.listeners={','.join([*listeners, *own])}",
        f"listener.security.protocol.map=CONTROLLER:PLAINTEXT,{','.join(f'{name}:{name}' for name in protocols)}",
        f"sasl.enabled.mechanisms=PLAIN,{','.join(SCRAM)}",
        *(
            f"listener.name.{listener}.{mechanism}.sasl.jaas.config={module}"
            for listener in ("sasl_plaintext", "sasl_ssl")
            for mechanism, module in jaas.items()
        ),
        "ssl.keystore.type=PEM",
        f"ssl.keystore.location={certificates.both}",
    )
    try:
        asyncio.run(_add_scram_user(kafka.port))
        yield SecuredKafka(kafka, ports, certificates.ca)
    finally:
        kafka.stop()


class AlterUserScramCredentialsResponse(Response):
    API_KEY, API_VERSION = 51, 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "results",
            CompactArray(
                ("user", CompactString("utf-8")),
                ("error_code", Int16),
                ("error_message", CompactString("utf-8")),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class AlterUserScramCredentialsStruct(RequestStruct):
    FLEXIBLE_VERSION = True
    API_KEY, API_VERSION = 51, 0
    RESPONSE_TYPE = AlterUserScramCredentialsResponse
    SCHEMA = Schema(
        ("deletions", CompactArray(("name", CompactString("utf-8")), ("mechanism", Int8), ("tags", TaggedFields))),
        (
            "upsertions",
            CompactArray(
                ("name", CompactString("utf-8")),
                ("mechanism", Int8),
                ("iterations", Int32),
                ("salt", CompactBytes),
                ("salted_password", CompactBytes),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class AlterUserScramCredentials(Request[AlterUserScramCredentialsStruct]):
    """What `kafka-configs --alter --add-config SCRAM-...` sends; the client library has no call for it."""

    API_KEY = 51

    def __init__(self, mechanism: str) -> None:
        self._number, self._hash = SCRAM[mechanism]

    def build(self, request_struct_class: type[AlterUserScramCredentialsStruct]) -> AlterUserScramCredentialsStruct:
        salt, rounds = secrets.token_bytes(16), 4096
        salted = hashlib.pbkdf2_hmac(self._hash, PASSWORD.encode(), salt, rounds)
        return request_struct_class([], [(USER, self._number, rounds, salt, salted, {})], {})


async def _add_scram_user(port: int) -> None:
    """Let `USER` in by each of the SCRAM mechanisms."""
    connection = await create_conn("127.0.0.1", port)
    for mechanism in SCRAM:
        answer = await connection.send(AlterUserScramCredentials(mechanism))
        assert [result[1] for result in answer.results] == [0], answer
    connection.close()
