"""Level-based reconcilers: compare what should be with what is, act, report. They run beside a consumer's handlers."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator

import structlog

from mini_studio.errors import StudioError

log = structlog.get_logger(__name__)

RETRY_S = 1.0


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """What one run or release runs into is logged and tried again at the next turn; the others of this turn go on."""
    try:
        yield
    except StudioError as error:
        log.warning("watcher.waiting", reason=error.message)
    except Exception:
        log.exception("watcher.failed")


async def turn(look: Callable[[], Awaitable[float]], changed: asyncio.Event) -> None:
    """Call `look` for ever: when `changed` is set, or after as many seconds as it last asked for."""
    while True:
        changed.clear()
        pause_s = RETRY_S
        with apart():
            pause_s = await look()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), pause_s)
