"""Consumer `jobs` whose event loop SIGUSR1 blocks for good: `blockable_consumer HEALTH_PORT`."""

import asyncio
import signal
import sys
import time

from consumers.app import run
from mini_studio.settings import Settings


async def main(port: int) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, time.sleep, 10_000)
    await run(["jobs"], Settings(), port)


asyncio.run(main(int(sys.argv[1])))
