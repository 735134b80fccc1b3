"""How a process connects to Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import redis
import structlog
from arq.connections import ArqRedis
from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection
from redis.backoff import NoBackoff
from redis.retry import Retry as SyncRetry

from shared.sentinel import BlockingPrimaryPool, PrimaryPool, is_sentinel_url, parse_sentinel_url
from shared.settings import Settings
from shared.text import json_bytes, parse_json

log = structlog.get_logger(__name__)
T = TypeVar("T")

FIRST_RETRY_S, LAST_RETRY_S = 0.02, 1.0  # between tries while Redis does not answer

CONNECT_TIMEOUT_S = 3
# Every way in which a command can fail. `passes` tells whether it is worth sending again.
FAILURES = (redis_errors.RedisError, OSError)
_PASSING_REPLIES = (
    "BUSY",
    "CLUSTERDOWN",
    "LOADING",
    "MASTERDOWN",
    "MISCONF",
    "NOREPLICAS",
    "OOM",
    "READONLY",
    "UNBLOCKED",
)

COMMAND_TIMEOUT_S = 10  # longer than any command that we send; BLPOP's own wait is 1 s


class _HonestConnection(AbstractConnection):
    """Reports a connection that was closed under redis-py's feet as what it is.

    On uvloop, a write to a transport that has just been closed raises RuntimeError or AttributeError.
    """

    async def send_packed_command(self, *args: Any, **kwargs: Any) -> None:
        try:
            await super().send_packed_command(*args, **kwargs)
        except (RuntimeError, AttributeError) as error:
            await self.disconnect(nowait=True)
            raise redis_errors.ConnectionError("the connection was closed while a command was written") from error


def passes(error: BaseException) -> bool:
    """Whether Redis may answer the same command later: it is away, starting, full, busy, or not (yet) the primary."""
    if isinstance(error, (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError)):
        return True
    if isinstance(error, (redis_errors.OutOfMemoryError, redis_errors.ReadOnlyError)):
        return True  # redis-py takes the first word off these two
    return isinstance(error, redis_errors.ResponseError) and str(error).startswith(_PASSING_REPLIES)


def connect(settings: Settings) -> ArqRedis:
    """A connection pool. Nothing is sent before its first command; it reconnects by itself.

    Commands are not retried here: who sends one knows whether it may be sent twice.
    """
    options: dict[str, Any] = {
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_timeout": COMMAND_TIMEOUT_S,
        "health_check_interval": 0,
    }
    if is_sentinel_url(settings.redis_url):
        client = ArqRedis(PrimaryPool(parse_sentinel_url(settings.redis_url), **options))
    else:
        client = ArqRedis.from_url(settings.redis_url, **options)
    pool = client.connection_pool
    pool.connection_class = type("Connection", (_HonestConnection, pool.connection_class), {})
    client.job_serializer = json_bytes
    client.job_deserializer = parse_json
    client.default_queue_name = f"{settings.prefix}:queue"
    return client


def connect_blocking(settings: Settings) -> redis.Redis:
    """A connection pool for a thread: the heartbeat's, which must not wait for the event loop. Nothing is retried."""
    options: dict[str, Any] = {
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_timeout": settings.lease_s / 2,
        "retry": SyncRetry(NoBackoff(), 0),
    }
    if is_sentinel_url(settings.redis_url):
        return redis.Redis.from_pool(BlockingPrimaryPool(parse_sentinel_url(settings.redis_url), **options))
    return redis.Redis.from_url(settings.redis_url, **options)


async def insist(call: Callable[[], Awaitable[T]]) -> T:
    """Repeats an idempotent call until Redis answers. Raises what will not pass."""
    retry_s = FIRST_RETRY_S
    while True:
        try:
            return await call()
        except FAILURES as error:
            if not passes(error):
                raise
            log.warning("redis_unreachable", reason=str(error))
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)


async def try_for(patience_s: float, call: Callable[[], Awaitable[T]]) -> T:
    """Repeats an idempotent call until Redis answers. Raises one of FAILURES after `patience_s`."""
    deadline = asyncio.get_running_loop().time() + patience_s
    while True:
        try:
            return await call()
        except FAILURES as error:
            if not passes(error) or asyncio.get_running_loop().time() > deadline:
                raise
            log.warning("redis_unreachable", reason=str(error))
            await asyncio.sleep(min(1.0, patience_s / 10))
