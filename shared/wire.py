"""A connection to Redis for what is sent and heard for every token: bytes out, parsed replies in, nothing in between.

Rule 1: redis-py makes the connection and owns it: address, TLS, password, database. Only its transport is taken over.
Rule 2: a wire is never repaired. When it breaks, whoever waits on it gets one of shared.connection.FAILURES; a new one
        is opened by whoever needs it.
Rule 3: a refusal is a reply, the exception that redis-py would raise. An answer that does not come breaks the wire.
Rule 4: no timer for a command or a message: one look a second at the whole wire.

redis-py costs more for each command, reply and message than all the rest of their way, see
docs/decisions/0015-hot-path.md.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final, Protocol, TypeVar, cast

import hiredis
from redis._parsers.base import BaseParser
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared.connection import COMMAND_TIMEOUT_S
from shared.listening import PROBE_S
from shared.tasks import end_task

LOOK_S = 1.0
_INCOMPLETE: Final = object()
_PING: Final = b"*1\r\n$4\r\nPING\r\n"


def command(*parts: str | bytes | int) -> bytes:
    """One command, as Redis reads it. Raises TypeError for anything else."""
    packed: bytes = hiredis.pack_command(parts)  # type: ignore[arg-type]  # typed for one element
    return packed


class Wire(asyncio.Protocol):
    """A connection that was taken over. Made by `open_wire`."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._former = transport.get_protocol()  # redis-py waits for its end
        self._reader = hiredis.Reader(
            protocolError=cast("Callable[[str], Exception]", InvalidResponse),
            replyError=cast("Callable[[str], Exception]", BaseParser.parse_error),
            notEnoughData=_INCOMPLETE,
        )
        self._received_at = self._loop.time()
        self._lost: Exception | None = None
        self._unsent: list[bytes] = []
        self._look = self._loop.call_later(LOOK_S, self._look_again)
        transport.set_protocol(self)

    def write(self, commands: bytes) -> None:
        """Sends commands with all others of this turn of the event loop.

        Does not wait, and does not fail: who waits for what follows is told.
        """
        if not self._unsent:
            self._loop.call_soon(self._send)
        self._unsent.append(commands)

    def _send(self) -> None:
        if self._lost is None:
            self._transport.write(b"".join(self._unsent))
        self._unsent.clear()

    def break_off(self, error: Exception) -> None:
        """Ends it; whoever waits on it gets this error, unless another one came first."""
        if self._lost is not None:
            return
        self._lost = error
        self._look.cancel()
        self._transport.abort()
        self.broken(error)

    # -- for subclasses ------------------------------------------------------------------------------------------------

    def heard(self, reply: Any) -> None:
        """What comes next."""
        raise NotImplementedError

    def heard_all(self) -> None:
        """Nothing more has come with this read of the socket."""
        raise NotImplementedError

    def broken(self, error: Exception) -> None:
        """Nothing will be heard any more."""
        raise NotImplementedError

    def look(self, silent_s: float) -> None:
        """Called every LOOK_S; nothing has come for `silent_s`."""
        raise NotImplementedError

    # -- for asyncio ---------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._received_at = self._loop.time()
        next_reply, heard = self._reader.gets, self.heard
        try:
            self._reader.feed(data)
            while (reply := next_reply()) is not _INCOMPLETE:
                heard(reply)
            self.heard_all()
        except InvalidResponse as error:
            self.break_off(RedisConnectionError(f"Redis does not speak its protocol: {error}"))
        except Exception as error:  # noqa: BLE001  # whoever waits is told, not the event loop
            self.break_off(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self.break_off(RedisConnectionError(f"the connection was closed: {exc or 'by the server'}"))
        self._former.connection_lost(exc)

    def _look_again(self) -> None:
        self._look = self._loop.call_later(LOOK_S, self._look_again)
        self.look(self._loop.time() - self._received_at)


class CallWire(Wire):
    """Commands, and all their replies. Calls may overlap: Redis answers in the order in which it was asked."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self._calls: deque[tuple[asyncio.Future[list[Any]], int]] = deque()  # oldest first; how many replies each gets
        self._replies: list[Any] = []  # that no call has got yet
        self.heard = self._replies.append  # type: ignore[assignment,method-assign]  # one call less for each reply

    @property
    def is_broken(self) -> bool:
        return self._lost is not None

    async def call(self, commands: bytes, replies: int) -> list[Any]:
        """Sends commands that Redis gives so many replies to, at least one, and returns these.

        Raises one of FAILURES if they did not all come: then everything may have been executed, or nothing.
        """
        if self._lost is not None:
            raise self._lost
        if not self._calls:
            self._received_at = self._loop.time()
        answered: asyncio.Future[list[Any]] = self._loop.create_future()
        self._calls.append((answered, replies))
        self.write(commands)
        return await answered

    def heard_all(self) -> None:
        replies, calls = self._replies, self._calls
        given = 0
        while calls and given + calls[0][1] <= len(replies):
            answered, expected = calls.popleft()
            if not answered.done():  # nobody waits for a call that was cancelled
                answered.set_result(replies[given : given + expected])
            given += expected
        del replies[:given]
        if replies and not calls:
            raise RedisConnectionError("Redis has answered what nobody asked")

    def broken(self, error: Exception) -> None:
        for answered, _ in self._calls:
            if not answered.done():
                answered.set_exception(error)
        self._calls.clear()

    def look(self, silent_s: float) -> None:
        if self._calls and silent_s > COMMAND_TIMEOUT_S:
            self.break_off(RedisTimeoutError("Redis does not answer"))


class Listener(Protocol):
    """Who listens on a pub/sub connection. What it raises breaks the wire."""

    def hear(self, response: Any) -> None:
        """What Redis sends: `[b"message", channel, payload]`, `[b"subscribe", channel, count]`, …, or a refusal."""

    def heard_all(self) -> None:
        """All was heard that has come at once."""


class ListenWire(Wire):
    """A pub/sub connection. Notices when it is dead, however silent the channels are."""

    def __init__(self, transport: asyncio.Transport, listener: Listener) -> None:
        super().__init__(transport)
        self.heard = listener.hear  # type: ignore[assignment,method-assign]  # one call less for each message
        self.heard_all = listener.heard_all  # type: ignore[method-assign]
        self._probed = False
        self._end: asyncio.Future[None] = self._loop.create_future()

    async def until_broken(self) -> None:
        """Never returns. Raises redis.exceptions.ConnectionError when the connection is gone or does not answer."""
        await self._end

    def broken(self, error: Exception) -> None:
        if not self._end.done():
            self._end.set_exception(error)
            self._end.exception()  # nobody has to look at it

    def look(self, silent_s: float) -> None:
        if silent_s > 2 * PROBE_S:
            self.break_off(RedisConnectionError("the pub/sub connection does not answer"))
        elif silent_s <= PROBE_S:
            self._probed = False
        elif not self._probed:
            self._probed = True
            self.write(_PING)


W = TypeVar("W", bound=Wire)


@asynccontextmanager
async def open_wire(redis: Redis, make: Callable[[asyncio.Transport], W]) -> AsyncIterator[W]:
    """A new connection of this client's pool, taken over until the block ends. Raises one of FAILURES.

    Never one that is free: those that need it next might not get another, see `PrimaryPool.release`.
    """
    pool: Any = redis.connection_pool
    connection = pool.make_connection()
    pool._in_use_connections.add(connection)
    try:
        await pool.ensure_connection(connection)
        wire = make(connection._writer.transport)
        try:
            yield wire
        finally:
            wire.break_off(RedisConnectionError("the wire was closed"))
    finally:
        await connection.disconnect(nowait=True)
        await pool.release(connection)


class Line:
    """One connection for the commands of many at a time, opened when it is needed, and again when it has broken."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._opening: asyncio.Task[CallWire] | None = None  # one try to connect is all the waiting callers' try
        self._wire: CallWire | None = None
        self._wires = AsyncExitStack()  # holds the one that is open
        self._opened = 0  # how many there have been

    @property
    def number(self) -> int:
        """Which connection takes the next call, counted from 1: another one than before if that has broken."""
        return self._opened if self._wire is not None and not self._wire.is_broken else self._opened + 1

    async def call(self, commands: bytes, replies: int) -> list[Any]:
        """As `CallWire.call`. Refusals are among the replies."""
        wire = self._wire
        if wire is None or wire.is_broken:
            if self._opening is None or self._opening.done():
                self._opening = asyncio.create_task(self._open())
            opening = self._opening
            await asyncio.wait({opening})  # a caller that goes away does not take the others' try along
            if opening.cancelled():
                raise RedisConnectionError("the line was closed")
            wire = opening.result()
        return await wire.call(commands, replies)

    async def _open(self) -> CallWire:
        if self._wire is None or self._wire.is_broken:
            self._wire = None
            await self._wires.aclose()
            self._wire = await self._wires.enter_async_context(open_wire(self._redis, CallWire))
            self._opened += 1
        return self._wire

    async def aclose(self) -> None:
        if self._opening is not None:
            await end_task(self._opening)
        await self._wires.aclose()
