"""Turns of one session run one at a time, in order of acceptance, whoever accepts and whoever runs them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.deployment import Deployment, deployed, noted, notes, script
from tests.waiting import wait_until

SESSION = {"session_id": "ours"}


@pytest.fixture
def fleet(tmp_path: Path, redis_url: str, prefix: str) -> Iterator[Deployment]:
    """Two workers with two slots each."""
    folder = tmp_path / "service"
    folder.mkdir()
    with deployed(folder, redis_url, prefix, workers=2, max_jobs=2, lease_s=1) as deployment:
        yield deployment
        deployment.wait_until_idle()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as executor:
        yield executor


def ask(fleet: Deployment, messages: list[Any], base_url: str | None = None, **body: Any) -> str | None:
    url = f"{base_url or fleet.base_url}/v1"
    with fleet.client(base_url=url, timeout=60) as client:
        answer = client.chat.completions.create(model="endmark", messages=messages, extra_body=body)
    return answer.choices[0].message.content


def accepted(fleet: Deployment) -> int:
    return len(fleet.job_ids())


def test_turns_that_two_apis_accept_run_in_the_order_of_acceptance(
    fleet: Deployment, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    log, urls = tmp_path / "log", (fleet.base_url, fleet.start_another_api())
    answers: list[Future[str | None]] = []
    for number in range(8):
        messages = script(say=[str(number)], every_s=0.05, log=str(log))
        answers.append(pool.submit(ask, fleet, messages, urls[number % 2], **SESSION))
        wait_until(lambda: accepted(fleet) == len(answers), timeout=10, description=f"turn {number} to be accepted")
    assert [answer.result() for answer in answers] == [str(number) for number in range(8)]
    assert [note["what"] for note in notes(log)] == ["started", "finished"] * 8, "one at a time"
    by_acceptance = sorted(fleet.job_ids(), key=lambda job_id: int(fleet.job_field(job_id, "accepted_ms")))
    by_start = [note["job"] for note in notes(log) if note["what"] == "started"]
    assert [int(fleet.job_field(job_id, "accepted_ms")) for job_id in by_start] == sorted(
        int(fleet.job_field(job_id, "accepted_ms")) for job_id in by_acceptance
    )


def test_waiting_turns_take_no_slot_from_others(fleet: Deployment, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    log = tmp_path / "log"
    slow = pool.submit(ask, fleet, script(say=["slow"], every_s=2, log=str(log)), **SESSION)
    wait_until(lambda: noted(log, "started") == 1, timeout=10, description="the first turn")
    waiting = [pool.submit(ask, fleet, script(say=["late"]), **SESSION) for _ in range(6)]
    wait_until(lambda: accepted(fleet) == 7, timeout=10, description="the turns that wait")
    others = [pool.submit(ask, fleet, script(say=["other"]), session_id=f"other-{number}") for number in range(6)]
    assert [other.result() for other in others] == ["other"] * 6
    assert not slow.done()
    assert [answer.result() for answer in (slow, *waiting)] == ["slow"] + ["late"] * 6


@pytest.mark.parametrize("said", [[], ["a"]], ids=["before it said anything", "in mid-answer"])
def test_a_turn_whose_worker_is_killed_lets_the_next_one_go(
    fleet: Deployment, pool: ThreadPoolExecutor, tmp_path: Path, said: list[str]
) -> None:
    log = tmp_path / "log"
    first = pool.submit(ask, fleet, script(say=said, then="hang", log=str(log)), **SESSION)
    wait_until(lambda: noted(log, "started") == 1, timeout=10, description="the first turn")
    job_id = notes(log)[0]["job"]
    if said:
        wait_until(lambda: fleet.redis.xlen(fleet.keys.stream(job_id)) == 2, timeout=5, description="its text")
    second = pool.submit(ask, fleet, script(say=["second"]), **SESSION)
    wait_until(lambda: accepted(fleet) == 2, timeout=10, description="the second turn")
    for worker in worker_of(fleet, job_id):
        worker.process.kill()
    if not said:  # it runs again, on the other worker: kill that one as well
        wait_until(lambda: noted(log, "started") == 2, timeout=10, description="the second attempt")
        for worker in worker_of(fleet, job_id):
            worker.process.kill()
        fleet.start_worker()
    assert second.result(timeout=20) == "second"
    with pytest.raises(openai.InternalServerError) as raised:
        first.result()
    assert raised.value.code == "worker_lost"


def worker_of(fleet: Deployment, job_id: str) -> list[Any]:
    pid = int(fleet.job_field(job_id, "worker").split("-")[-2])
    return [worker for worker in fleet.workers if worker.process.pid == pid]


def test_a_cancelled_turn_lets_the_next_one_go(fleet: Deployment, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    log = tmp_path / "log"
    body = {"messages": script(say=["a"], then="hang", log=str(log)), "stream": True, **SESSION}
    with fleet.http() as http:
        request = http.build_request("POST", "/v1/chat/completions", json=body)
        with closing(http.send(request, stream=True)):
            wait_until(lambda: noted(log, "started") == 1, timeout=10, description="the first turn")
            second = pool.submit(ask, fleet, script(say=["second"], log=str(log)), **SESSION)
            wait_until(lambda: accepted(fleet) == 2, timeout=10, description="the second turn")
    assert second.result(timeout=10) == "second"
    assert [note["what"] for note in notes(log)] == ["started", "cancelled", "started", "finished"]
