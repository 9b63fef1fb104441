"""Consumer `usage`: sums what the gateways say that requests used, by client, model and hour."""

from events.usage import UsageBatch
from mini_studio.bus.plain import PlainConsumer
from mini_studio.wiring import Studio

# A batch of a gateway may be a thousand requests: few at a time, so that reading them takes neither much memory nor long.
consumer = PlainConsumer("usage", UsageBatch.read, max_records=20)


@consumer.takes
async def sum_up(batches: list[UsageBatch], studio: Studio) -> None:
    """Add the batches to their hours."""
    await studio.usage.add(batches)
