"""Reads a pub/sub connection that may be silent for long, and notices when it is dead."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError

PROBE_S = 10.0  # how long a connection may be silent before it is probed, and before the probe counts as lost


async def subscribe(pubsub: PubSub, *channels: str | bytes) -> None:
    """Sends SUBSCRIBE. redis-py's own method remembers every channel, for a reconnection that is not wanted here."""
    await pubsub.execute_command("SUBSCRIBE", *channels)


async def unsubscribe(pubsub: PubSub, *channels: str | bytes) -> None:
    """Sends UNSUBSCRIBE."""
    await pubsub.execute_command("UNSUBSCRIBE", *channels)


async def responses(pubsub: PubSub) -> AsyncIterator[list[Any]]:
    """What Redis sends, as it comes: `[b"message", channel, payload]`, `[b"subscribe", channel, count]`, …

    Never ends by itself. Raises redis.exceptions.ConnectionError when the connection is gone or does not answer.
    redis-py's own message objects cost more than all the rest of a message's way.
    """
    probed = False
    while True:
        response = await pubsub.parse_response(block=False, timeout=PROBE_S)
        if response is not None:
            probed = False
            yield response
        elif probed:
            raise RedisConnectionError("the pub/sub connection does not answer")
        else:
            await pubsub.ping()
            probed = True
