"""`python -m tests.fakes.replica PORT`: a model server of one deployment, as a process that can be killed and stopped.

It answers `/predict` with its pid after `PAUSE_S`, so that requests are in flight when it is killed.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys

from tests.fakes.broker import free_port, wait_for

PAUSE_S = 0.01


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = head.partition(b"content-length: ")[2].split(b"\r\n")[0]
            await reader.readexactly(int(length or 0))
            await asyncio.sleep(PAUSE_S)
            body = json.dumps({"pid": os.getpid()}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
            writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def main() -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", int(sys.argv[1]), reuse_address=True)
    async with server:
        await server.serve_forever()


class ReplicaProcess:
    """One of them, whose address outlives its process."""

    def __init__(self) -> None:
        self.port = free_port()
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-m", "tests.fakes.replica", str(self.port)])
        wait_for(self.port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, signum: int) -> None:
        self.process.send_signal(signum)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """It keeps its connections, takes new ones, and says nothing."""
        self.send(signal.SIGSTOP)

    def go_on(self) -> None:
        self.send(signal.SIGCONT)


if __name__ == "__main__":
    asyncio.run(main())
