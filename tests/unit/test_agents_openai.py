"""worker/agents/openai.py: what an upstream counts."""

from __future__ import annotations

from typing import Any

import pytest

from worker.agents.contract import Usage
from worker.agents.openai import _usage


@pytest.mark.parametrize(
    ("counted", "usage"),
    [
        ({"prompt_tokens": 1, "completion_tokens": 2}, Usage(prompt_tokens=1, completion_tokens=2)),
        ({"prompt_tokens": None}, Usage(prompt_tokens=0, completion_tokens=0)),
        ({"prompt_tokens": -1, "completion_tokens": 2}, None),
        ({"prompt_tokens": "1", "completion_tokens": 2}, None),
        ({"prompt_tokens": 1.5, "completion_tokens": 2}, None),
        ({"prompt_tokens": 2**70, "completion_tokens": 2}, None),
    ],
)
def test_a_count_that_is_none_costs_no_answer(counted: dict[str, Any], usage: Usage | None) -> None:
    assert _usage(counted) == usage
