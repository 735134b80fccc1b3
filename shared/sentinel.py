"""Redis behind Sentinel: the URL that names the sentinels, and connections that follow the primary.

Rule 1: a connection is used only if its server says itself that it is a primary. Sentinels may be behind the times.
Rule 2: when the primary is another, every connection to the old one ends, also one that is in use. A failover that was
        planned leaves the old primary writable for some seconds, and one that hangs breaks no connection at all.
Rule 3: nothing is tried twice here, as with a plain URL.

redis-py's own classes do the rest. Its search for the primary is replaced: it loses sentinels if two connections
search at the same time.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import redis.asyncio.sentinel as aio
import redis.sentinel as blocking
import structlog
from redis import exceptions as redis_errors
from redis.connection import parse_url
from redis.utils import str_if_bytes

log = structlog.get_logger(__name__)

DEFAULT_PORT = 26379
SENTINEL_TIMEOUT_S = 1.0  # to connect to a sentinel, and for its answer
LOOK_INTERVAL_S = 0.5  # how often a process asks who the primary is
_SCHEMES = {"redis+sentinel": "redis", "rediss+sentinel": "rediss"}
_SENTINEL_OPTIONS = {"sentinel_username": "username", "sentinel_password": "password"}

Address = tuple[str, int]


class SentinelUrl(NamedTuple):
    """What `redis+sentinel://[user:password@]host[:port],…/service[/db][?option=value&…]` says."""

    sentinels: tuple[Address, ...]
    service: str  # what the sentinels call the primary and its replicas
    tls: bool  # of the connections to Redis and to the sentinels
    options: dict[str, Any]  # of connections to Redis, as redis-py names them
    sentinel_options: dict[str, Any]  # of connections to sentinels


def is_sentinel_url(url: str) -> bool:
    return url.partition("://")[0] in _SCHEMES


def parse_sentinel_url(url: str) -> SentinelUrl:
    """Raises ValueError; its message holds no password."""
    scheme, _, rest = url.partition("://")
    location, _, query = rest.partition("?")
    netloc, _, path = location.partition("/")
    user_info, at, hosts = netloc.rpartition("@")
    service, _, db = path.partition("/")
    if not service or "/" in db:
        raise ValueError("the path of a Sentinel URL is /service or /service/db, such as /mymaster/0")
    if db and not db.isdecimal():
        raise ValueError(f"the database of a Sentinel URL is a number, not {db!r}")
    sentinels = tuple(_address(host) for host in hosts.split(","))

    fields = {name: values[0] for name, values in parse_qs(query).items()}
    sentinel_options = {ours: fields.pop(theirs) for theirs, ours in _SENTINEL_OPTIONS.items() if theirs in fields}
    # redis-py reads the rest: user, password, database, and every option that a plain URL may have.
    options = parse_url(f"redis://{user_info}{at}primary/{db or 0}?{urlencode(fields)}")  # type: ignore[no-untyped-call]  # redis-py
    del options["host"]
    tls = _SCHEMES[scheme] == "rediss"
    if tls:
        sentinel_options |= {"ssl": True} | {name: value for name, value in options.items() if name.startswith("ssl_")}
    return SentinelUrl(sentinels, unquote(service), tls, options, sentinel_options)


def _address(host: str) -> Address:
    try:
        parts = urlsplit(f"//{host}")
        name, port = parts.hostname, parts.port
    except ValueError:
        name, port = None, None
    if not name:
        raise ValueError(f"a Sentinel URL names hosts as host:port,host:port, not {host!r}")
    return name, port or DEFAULT_PORT


def _require_primary(role: Any, connection: Any) -> None:
    """Raises ConnectionError if a server's answer to ROLE is not that of a primary."""
    if str_if_bytes(role[0]) != "master":
        connection.connection_pool.sentinel_manager.believe_less()
        raise redis_errors.ConnectionError(f"{connection.host}:{connection.port} is not the primary any more")


# -- for the event loop ------------------------------------------------------------------------------------------------


class _Sentinels(aio.Sentinel):
    """The sentinels, the one that was right last first."""

    async def discover_master(self, service_name: str) -> Address:
        refusals = []
        for sentinel in tuple(self.sentinels):
            try:
                masters = await sentinel.sentinel_masters()  # type: ignore[no-untyped-call]  # redis-py
            except (redis_errors.RedisError, OSError) as error:
                refusals.append(str(error))
                continue
            state = masters.get(service_name)
            if state is None:
                refusals.append(f"a sentinel knows no {service_name!r}")
            elif not self.check_master_state(state, service_name):
                refusals.append("it is down")
            else:
                self.sentinels.remove(sentinel)
                self.sentinels.insert(0, sentinel)
                return state["ip"], state["port"]
        raise aio.MasterNotFoundError(f"no primary of {service_name!r}: {'; '.join(refusals)}")

    def believe_less(self) -> None:
        """The sentinel that was asked last was wrong."""
        self.sentinels.append(self.sentinels.pop(0))


class PrimaryConnection(aio.SentinelManagedConnection):
    """A connection to whoever is the primary when it is made."""

    async def on_connect(self) -> None:
        await super().on_connect()
        await self.send_command("ROLE", check_health=False)
        _require_primary(await self.read_response(), self)

    def cut(self) -> None:
        """Ends it as its server would: whoever waits for an answer is told."""
        if self._writer is not None:
            self._writer.transport.abort()


class _PrimaryTlsConnection(PrimaryConnection, aio.SentinelManagedSSLConnection):
    pass


class PrimaryPool(aio.SentinelConnectionPool):
    """Connections to the primary. `connection_class` may be replaced by a subclass of it."""

    def __init__(self, url: SentinelUrl, **options: Any) -> None:
        timeouts: dict[str, Any] = {"socket_connect_timeout": SENTINEL_TIMEOUT_S, "socket_timeout": SENTINEL_TIMEOUT_S}
        sentinel_options = timeouts | url.sentinel_options
        super().__init__(  # type: ignore[no-untyped-call]  # redis-py
            url.service,
            _Sentinels(url.sentinels, sentinel_kwargs=sentinel_options),  # type: ignore[no-untyped-call]  # redis-py
            connection_class=_PrimaryTlsConnection if url.tls else PrimaryConnection,
            **(options | url.options),
        )

    async def get_master_address(self) -> Address:
        """Asks the sentinels. Raises redis.exceptions.ConnectionError."""
        address: Address = await self.sentinel_manager.discover_master(self.service_name)
        before, self.master_address = self.master_address, address
        if before not in (None, address):
            log.warning("primary_changed", before=before, now=address)
            for connection in tuple(self._in_use_connections):
                connection.cut()  # type: ignore[attr-defined]  # it is a PrimaryConnection
            await super().disconnect(inuse_connections=False)
        return address

    async def release(self, connection: Any) -> None:
        """What could not be connected is taken last: without sentinels nothing new can be, so what is there must do."""
        await super().release(connection)
        free = self._available_connections
        if not connection.is_connected and free and free[-1] is connection:
            free.insert(0, free.pop())

    async def disconnect(self, inuse_connections: bool = True) -> None:
        """Also from the sentinels."""
        await super().disconnect(inuse_connections)
        for sentinel in self.sentinel_manager.sentinels:
            await sentinel.connection_pool.disconnect(inuse_connections)


def address_of_primary(client: Any) -> Address | None:
    """Whom this client took for the primary last; None: it has asked nobody yet, or its URL names the server itself."""
    return getattr(client.connection_pool, "master_address", None)


async def follow_primary(client: Any) -> None:
    """Asks the sentinels now and then, so that a failover is noticed although no connection breaks.

    Runs until it is cancelled; returns at once if the client's URL names the server itself.
    """
    pool = client.connection_pool
    while isinstance(pool, PrimaryPool):
        try:
            await pool.get_master_address()
        except (redis_errors.RedisError, OSError):
            pass  # whoever sends a command learns it, too
        except Exception:  # a defect must not end the looking
            log.exception("sentinels_cannot_be_asked")
        await asyncio.sleep(LOOK_INTERVAL_S)


# -- for a thread ------------------------------------------------------------------------------------------------------


class _BlockingSentinels(blocking.Sentinel):
    def believe_less(self) -> None:
        self.sentinels.append(self.sentinels.pop(0))


class _BlockingConnection(blocking.SentinelManagedConnection):
    def on_connect(self) -> None:
        super().on_connect()  # type: ignore[no-untyped-call]  # redis-py
        self.send_command("ROLE", check_health=False)  # type: ignore[no-untyped-call]  # redis-py
        _require_primary(self.read_response(), self)


class _BlockingTlsConnection(_BlockingConnection, blocking.SentinelManagedSSLConnection):
    pass


class BlockingPrimaryPool(blocking.SentinelConnectionPool):
    """The same for one thread."""

    def __init__(self, url: SentinelUrl, **options: Any) -> None:
        timeout_s = min(SENTINEL_TIMEOUT_S, options["socket_timeout"])
        timeouts: dict[str, Any] = {"socket_connect_timeout": timeout_s, "socket_timeout": timeout_s}
        sentinel_options = timeouts | url.sentinel_options
        super().__init__(  # type: ignore[no-untyped-call]  # redis-py
            url.service,
            _BlockingSentinels(url.sentinels, sentinel_kwargs=sentinel_options),  # type: ignore[no-untyped-call]  # redis-py
            connection_class=_BlockingTlsConnection if url.tls else _BlockingConnection,
            **(options | url.options),
        )

    def disconnect(self, inuse_connections: bool = True) -> None:
        """Also from the sentinels."""
        super().disconnect(inuse_connections)
        for sentinel in self.sentinel_manager.sentinels:
            sentinel.connection_pool.disconnect(inuse_connections)


def look_for_primary(client: Any) -> Address | None:
    """Asks the sentinels who the primary is; None: nobody knows, or the client's URL names the server itself."""
    pool = client.connection_pool
    if isinstance(pool, BlockingPrimaryPool):
        with suppress(redis_errors.RedisError, OSError):
            address: Address = pool.get_master_address()  # type: ignore[no-untyped-call]  # redis-py
            return address
    return None
