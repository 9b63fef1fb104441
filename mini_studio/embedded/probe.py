"""Is a part healthy? HTTP by hand: an HTTP client would cost the supervisor more memory than all the rest of it."""

import asyncio
from enum import Enum, auto
from urllib.parse import urlsplit

ANSWER_S = 5.0
ANSWER_BYTES = 65_536


class Verdict(Enum):
    HEALTHY = auto()
    STARTING = auto()
    """Answers, but not yet with 200."""
    UNHEALTHY = auto()
    """Says so itself, and wants to be started again."""
    SILENT = auto()


async def probe(address: str) -> Verdict:
    """Look once, for at most `ANSWER_S`."""
    url = urlsplit(address)
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_connection(url.hostname, url.port)
            try:
                if url.scheme == "tcp":
                    return Verdict.HEALTHY
                head = f"GET {url.path or '/'} HTTP/1.1\r\nHost: {url.netloc}\r\nConnection: close\r\n\r\n"
                writer.write(head.encode())
                answer = await reader.read(ANSWER_BYTES)
                while len(answer) < ANSWER_BYTES and (more := await reader.read(ANSWER_BYTES)):
                    answer += more
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return Verdict.SILENT
    return judge(answer)


def judge(answer: bytes) -> Verdict:
    """The verdict of a whole HTTP answer."""
    words = answer.split(b" ", 2)
    if len(words) < 3 or not words[0].startswith(b"HTTP/"):
        return Verdict.SILENT
    if words[1] == b"200":
        return Verdict.HEALTHY
    return Verdict.UNHEALTHY if b'"unhealthy"' in answer else Verdict.STARTING
