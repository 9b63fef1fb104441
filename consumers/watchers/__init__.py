"""Level-based reconcilers: compare what should be with what is, act, report. They run beside a consumer's handlers."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

from mini_studio.errors import StudioError

log = structlog.get_logger(__name__)


async def turn(look: Callable[[], Awaitable[float]], changed: asyncio.Event) -> None:
    """Call `look` for ever: when `changed` is set, or after as many seconds as it last asked for."""
    while True:
        changed.clear()
        try:
            pause_s = await look()
        except StudioError as error:
            log.warning("watcher.waiting", reason=error.message)
            pause_s = 1.0
        except Exception:
            log.exception("watcher.failed")
            pause_s = 1.0
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), pause_s)
