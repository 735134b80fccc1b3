"""shared/sentinel.py: what a Sentinel URL says, and who is asked."""

from __future__ import annotations

from typing import Any

import pytest
from redis.asyncio.connection import SSLConnection
from redis.connection import SSLConnection as BlockingSSLConnection
from redis.exceptions import ConnectionError as RedisConnectionError

from cli.environment import without_password
from shared.connection import connect, connect_blocking
from shared.sentinel import (
    DEFAULT_PORT,
    BlockingPrimaryPool,
    PrimaryPool,
    address_of_primary,
    look_for_primary,
    parse_sentinel_url,
)
from shared.settings import Settings

UP = {"is_master": True, "is_sdown": False, "is_odown": False, "num-other-sentinels": 2, "ip": "10.0.0.1", "port": 6379}


def test_a_url_names_sentinels_service_and_database() -> None:
    url = parse_sentinel_url("redis+sentinel://user:p%40ss@a:26380,b,[::1]:26381/agents/3?client_name=us")
    assert url.sentinels == (("a", 26380), ("b", DEFAULT_PORT), ("::1", 26381))
    assert (url.service, url.tls) == ("agents", False)
    assert url.options == {"username": "user", "password": "p@ss", "db": 3, "client_name": "us"}
    assert url.sentinel_options == {}, "the password is that of Redis"


def test_the_sentinels_may_have_a_password_of_their_own_and_share_the_tls_options() -> None:
    url = parse_sentinel_url("rediss+sentinel://:p@a/agents?sentinel_password=s+%26&ssl_ca_certs=%2Fca.pem")
    assert url.tls
    assert url.options == {"password": "p", "db": 0, "ssl_ca_certs": "/ca.pem"}
    assert url.sentinel_options == {"password": "s &", "ssl": True, "ssl_ca_certs": "/ca.pem"}


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
def test_a_url_makes_connections_of_both_kinds(scheme: str) -> None:
    settings = Settings(redis_url=f"{scheme}+sentinel://:p@a,b/agents/3")
    client, blocking = connect(settings), connect_blocking(settings)
    assert isinstance(client.connection_pool, PrimaryPool)
    assert isinstance(blocking.connection_pool, BlockingPrimaryPool)
    for pool in (client.connection_pool, blocking.connection_pool):
        connection: Any = pool.make_connection()
        assert (connection.db, connection.password) == (3, "p")
        assert isinstance(connection, (SSLConnection, BlockingSSLConnection)) is (scheme == "rediss")


def test_a_plain_url_has_no_primary_to_look_for() -> None:
    assert address_of_primary(connect(Settings())) is None
    assert look_for_primary(connect_blocking(Settings())) is None


class ScriptedSentinel:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    async def sentinel_masters(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def test_the_first_sentinel_that_knows_the_primary_is_asked_first_from_then_on() -> None:
    sentinels: Any = PrimaryPool(parse_sentinel_url("redis+sentinel://a/agents")).sentinel_manager
    away, ignorant = ScriptedSentinel(RedisConnectionError("away")), ScriptedSentinel({})
    down, right = ScriptedSentinel({"agents": UP | {"is_odown": True}}), ScriptedSentinel({"agents": UP})
    sentinels.sentinels = [away, ignorant, down, right]
    assert await sentinels.discover_master("agents") == ("10.0.0.1", 6379)
    assert sentinels.sentinels == [right, away, ignorant, down]
    sentinels.believe_less()
    assert sentinels.sentinels == [away, ignorant, down, right]


async def test_without_a_primary_every_reason_is_told() -> None:
    sentinels: Any = PrimaryPool(parse_sentinel_url("redis+sentinel://a/agents")).sentinel_manager
    sentinels.sentinels = [ScriptedSentinel(RedisConnectionError("away")), ScriptedSentinel({})]
    with pytest.raises(RedisConnectionError, match="away; a sentinel knows no 'agents'"):
        await sentinels.discover_master("agents")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://redis:6379/0", "redis://redis:6379/0"),
        ("redis://:secret@redis", "redis://redis"),
        (
            "redis+sentinel://u:secret@a,[::1]:1/agents/0?sentinel_password=secret",
            "redis+sentinel://a,[::1]:1/agents/0",
        ),
        ("unix:///run/redis.sock?password=secret", "unix:///run/redis.sock"),
    ],
)
def test_a_url_is_shown_without_its_passwords(url: str, shown: str) -> None:
    assert without_password(url) == shown
