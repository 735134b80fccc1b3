"""api/submit.py: whether a client may send a request again whose submission was not confirmed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError

from api.errors import QueueUnreachableError
from api.submit import submit
from tests.jobs import a_submission


def lost_answer() -> Exception:
    return RedisConnectionError("Connection closed by server.")


def refused_connection() -> Exception:
    try:
        try:
            raise ConnectionRefusedError(111, "Connection refused")
        except ConnectionRefusedError:
            raise RedisConnectionError("Error 111 connecting.")  # noqa: B904 - as redis-py raises it
    except RedisConnectionError as error:
        return error


def full() -> Exception:
    return OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")


class FailingStore:
    """Fails each submission as it is told to."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)

    async def submit(self, _job: object) -> None:
        raise self._errors.pop(0)


@pytest.mark.parametrize(
    ("errors", "may_retry"),
    [
        ([refused_connection()], True),
        ([full()], True),
        ([lost_answer(), refused_connection()], False),
        ([lost_answer(), full()], False),
        ([lost_answer(), lost_answer(), refused_connection()], False),
    ],
    ids=["refused", "full", "lost, refused", "lost, full", "lost, lost, refused"],
)
async def test_a_request_that_redis_may_have_got_is_not_to_be_sent_again(
    errors: list[Exception], may_retry: bool
) -> None:
    services: Any = SimpleNamespace(store=FailingStore(*errors))
    with pytest.raises(QueueUnreachableError) as raised:
        await submit(services, a_submission(), [])
    headers = raised.value.headers or {}
    assert (headers.get("x-should-retry") != "false") is may_retry
