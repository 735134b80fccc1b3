"""What an agent leaves to the next turn of its session, through the running service with two workers."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.deployment import Deployment, deployed, script

MAX_BYTES = 70_000  # of a state; more than a claim brings along


@pytest.fixture(scope="module")
def remembering(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[Deployment]:
    settings: dict[str, Any] = {"session_ttl_s": 60, "max_session_bytes": MAX_BYTES, "max_jobs": 1}
    folder, prefix = tmp_path_factory.mktemp("service"), f"test-{secrets.token_hex(4)}"
    with deployed(folder, redis_url, prefix, workers=2, **settings) as deployment:
        yield deployment
        deployment.wait_until_idle()
        assert deployment.keys_without_ttl() == []


def turn(service: Deployment, session: str, **steps: Any) -> str | None:
    with service.client() as client:
        answer = client.chat.completions.create(
            model="endmark", messages=script(**steps), extra_body={"session_id": session}
        )
    return answer.choices[0].message.content


def test_every_turn_gets_what_the_one_before_left_whichever_worker_runs_it(remembering: Deployment) -> None:
    assert turn(remembering, "counting", recalls=True, leaves="0") == "nothing"
    for number in range(6):
        assert turn(remembering, "counting", recalls=True, leaves=str(number + 1)) == str(number)
    assert turn(remembering, "another", recalls=True) == "nothing"


def test_a_state_that_is_too_large_fails_the_turn_and_is_not_kept(remembering: Deployment) -> None:
    turn(remembering, "growing", leaves="x" * MAX_BYTES)
    with pytest.raises(openai.APIStatusError) as refusal:
        turn(remembering, "growing", leaves="y" * (MAX_BYTES + 1))
    assert (refusal.value.status_code, refusal.value.code) == (500, "agent_error")
    assert "too large" in refusal.value.message
    assert turn(remembering, "growing", recalls=True) == "x" * MAX_BYTES


def test_without_a_session_nothing_is_kept(remembering: Deployment) -> None:
    history: list[Any] = [{"role": "system", "content": "Be brief."}, *script(leaves="x" * 2000, say=["fine"])]
    with remembering.client() as client:
        answer = client.chat.completions.create(model="endmark", messages=history)
    assert answer.choices[0].message.content == "fine"
    assert list(remembering.redis.scan_iter(remembering.keys.session("api:chatcmpl*"))) == []
