"""Waiting for a condition instead of for time. What was waited for in vain is in the message of the failure."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

T = TypeVar("T")

POLL_S = 0.02


def wait_until(predicate: Callable[[], T], *, timeout: float, description: str) -> T:
    """The first truthy value of `predicate`. Fails the test if there is none within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() >= deadline:
            raise AssertionError(f"waited {timeout:g} s in vain: {description}")
        time.sleep(POLL_S)
    return value


async def async_wait_until(predicate: Callable[[], T | Awaitable[T]], *, timeout: float, description: str) -> T:
    """As `wait_until`, for a running event loop; `predicate` may be a coroutine function."""
    deadline = time.monotonic() + timeout
    while True:
        result = predicate()
        value = cast(T, await result if inspect.isawaitable(result) else result)
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"waited {timeout:g} s in vain: {description}")
        await asyncio.sleep(POLL_S)
