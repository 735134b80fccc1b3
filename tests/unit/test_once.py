"""api/once.py: how long a client is waited for that sends its request again by itself."""

from __future__ import annotations

import pytest
from starlette.requests import Request

from api.once import comes_back_within_s


@pytest.mark.parametrize(
    ("tries", "pause_s"),
    [("0", 0.5), ("1", 1.0), ("2", 2.0), ("3", 4.0), ("4", 8.0), ("9", 8.0), ("", 0.5), ("-1", 0.5), ("x", 0.5)],
)
def test_it_is_longer_than_the_pause_of_the_sdks(tries: str, pause_s: float) -> None:
    """Of openai-python and openai-node: 0.5 s, doubled each time, up to 8 s, less at random."""
    request = Request({"type": "http", "headers": [(b"x-stainless-retry-count", tries.encode())]})
    assert pause_s < comes_back_within_s(request) < pause_s + 1


def test_other_clients_do_not_come_back_by_themselves() -> None:
    assert comes_back_within_s(Request({"type": "http", "headers": []})) == 0
