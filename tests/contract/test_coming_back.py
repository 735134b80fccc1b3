"""A job is more than its connection: found, resumed, watched and cancelled, on whatever replica."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
from openai._streaming import SSEDecoder
from openai.types.chat import ChatCompletionChunk

from shared.jobs import Status
from tests.deployment import KEY, Deployment, Start, noted, script
from tests.waiting import wait_until

WORDS = [f"word-{number} " for number in range(30)]


class Chunk(NamedTuple):
    number: int
    text: str


def resumed(
    service: Deployment, job_id: str, *, base_url: str | None = None, **query: Any
) -> list[ChatCompletionChunk]:
    """The chunks of a resumed stream, to its verified end. Raises what the SDK raises."""
    with service.client(base_url=f"{base_url or service.base_url}/v1") as client:
        return list(resumed_stream(client, job_id, **query))


def resumed_stream(client: openai.OpenAI, job_id: str, **query: Any) -> openai.Stream[ChatCompletionChunk]:
    """The documented extension, by the SDK's own means."""
    return client.get(
        f"/chat/completions/{job_id}/stream",
        cast_to=ChatCompletionChunk,
        stream=True,
        stream_cls=openai.Stream[ChatCompletionChunk],
        options={"params": query},
    )


def shown(chunks: list[ChatCompletionChunk]) -> list[Chunk]:
    return [
        Chunk(number_of(chunk), chunk.choices[0].delta.content)
        for chunk in chunks
        if chunk.choices and chunk.choices[0].delta.content
    ]


def number_of(chunk: ChatCompletionChunk) -> int:
    assert chunk.model_extra is not None
    number: int = chunk.model_extra["sequence_number"]
    return number


def is_whole(chunks: list[ChatCompletionChunk]) -> bool:
    """Whether the finish reason came, which is followed by nothing but the usage."""
    return bool(chunks[-2].choices[0].finish_reason) and chunks[-1].usage is not None


def finished(service: Deployment, **steps: Any) -> str:
    """The id of a job that said its words."""
    with service.client() as client:
        return client.chat.completions.create(model="endmark", messages=script(**steps)).id


class Event(NamedTuple):
    id: str | None
    name: str | None
    data: Any


@contextmanager
def event_source(service: Deployment, job_id: str, **options: Any) -> Iterator[Iterator[Event]]:
    """What a browser's EventSource gets."""
    with service.http() as http, http.stream("GET", f"/v1/jobs/{job_id}/events", **options) as response:
        assert response.status_code == 200, response.read()
        events = SSEDecoder().iter_bytes(response.iter_bytes())
        yield (Event(event.id, event.event, json.loads(event.data)) for event in events if event.event)


# -- resumed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 7, len(WORDS)])
def test_a_finished_stream_is_replayed_behind_any_number(service: Deployment, after: int) -> None:
    job_id = finished(service, say=WORDS, every_s=0.001)
    everything = shown(resumed(service, job_id))
    assert [chunk.number for chunk in everything] == list(range(1, len(everything) + 1))
    assert "".join(chunk.text for chunk in everything) == "".join(WORDS)
    after = min(after, len(everything))
    rest = resumed(service, job_id, starting_after=after)
    assert shown(rest) == everything[after:]
    assert is_whole(rest)
    assert {chunk.id for chunk in rest} == {job_id}


def test_a_resumed_stream_is_a_stream_of_its_own(service: Deployment) -> None:
    """The role comes once, with the first chunk, so that the SDK's helpers can take it up."""
    job_id = finished(service, say=WORDS, every_s=0.001)
    roles = [chunk.choices[0].delta.role for chunk in resumed(service, job_id, starting_after=3) if chunk.choices]
    assert roles == ["assistant"] + [None] * (len(roles) - 1)


def test_created_is_the_same_wherever_it_is_told(service: Deployment) -> None:
    with service.client() as client:
        whole = client.chat.completions.create(model="endmark", messages=script(say=WORDS))
    assert {chunk.created for chunk in resumed(service, whole.id)} == {whole.created}


def test_a_killed_api_replica_costs_nothing_but_a_new_connection(own_service: Start, tmp_path: Path) -> None:
    """Another replica goes on with the same job, behind the last chunk that the client has."""
    service = own_service()
    other = service.start_another_api()
    log = tmp_path / "log"
    got: list[ChatCompletionChunk] = []
    with service.client() as client:
        stream = client.chat.completions.create(
            model="endmark",
            messages=script(say=WORDS, every_s=0.02, log=str(log)),
            stream=True,
            extra_body={"stream_options": {"include_sequence_numbers": True}},
        )
        with pytest.raises(openai.APIConnectionError):
            for chunk in stream:
                got.append(chunk)
                if len(got) == 3:
                    service.api.process.kill()
    rest = resumed(service, got[0].id, base_url=other, starting_after=number_of(got[-1]))
    assert "".join(chunk.text for chunk in shown(got) + shown(rest)) == "".join(WORDS)
    assert is_whole(rest)
    assert noted(log, "started") == 1


def test_a_failed_job_fails_again_when_it_is_resumed(service: Deployment) -> None:
    with service.client() as client, pytest.raises(openai.APIError):
        client.chat.completions.create(model="endmark", messages=script(say=["a"], then="raise"))
    (job_id,) = (job for job in service.job_ids() if service.job_field(job, "status") == "failed")
    with pytest.raises(openai.APIError) as raised:
        resumed(service, job_id)
    assert raised.value.code == "agent_error"
    service.redis.delete(service.keys.job(job_id))


def test_many_watch_one_job_and_none_of_them_holds_it(service: Deployment, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with service.client() as client, ThreadPoolExecutor() as pool:
        live = client.chat.completions.create(
            model="endmark", messages=script(waits_for=str(gate), say=WORDS, every_s=0.002), stream=True
        )
        (job_id,) = (job for job in service.job_ids() if service.job_field(job, "status") in ("queued", "running"))
        with service.http() as http, http.stream("GET", f"/v1/chat/completions/{job_id}/stream"):
            pass  # one that goes away
        watchers = [pool.submit(resumed, service, job_id) for _ in range(5)]
        gate.touch()
        texts = {"".join(chunk.text for chunk in shown(watcher.result())) for watcher in watchers}
        assert texts == {"".join(WORDS)}
        assert "".join(chunk.choices[0].delta.content or "" for chunk in live) == "".join(WORDS)


@pytest.mark.parametrize("route", ["/v1/chat/completions/{}/stream", "/v1/jobs/{}/events"])
@pytest.mark.parametrize("given", ["-1", "1.5", "one", "", "9" * 19, "٣", "999"])
def test_a_number_that_is_none_is_refused(service: Deployment, route: str, given: str) -> None:
    job_id = finished(service, say=["a"])
    with service.http() as http:
        answer = http.get(route.format(job_id), params={"starting_after": given})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "starting_after"


@pytest.mark.parametrize("path", ["chat/completions/{}/stream", "jobs/{}", "jobs/{}/events"])
def test_an_unknown_job_is_not_found(service: Deployment, path: str) -> None:
    with service.http() as http:
        answer = http.get("/v1/" + path.format("chatcmpl-nobody"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_history_that_is_gone_is_told(service: Deployment) -> None:
    job_id = finished(service, say=WORDS, every_s=0.001)
    service.redis.delete(service.keys.stream(job_id))
    with pytest.raises(openai.APIStatusError) as raised:
        resumed(service, job_id)
    assert (raised.value.status_code, raised.value.code) == (410, "stream_expired")


def test_history_that_was_trimmed_is_told(service: Deployment) -> None:
    job_id = finished(service, say=WORDS, every_s=0.001)
    service.redis.xtrim(service.keys.stream(job_id), maxlen=1, approximate=False)  # packed, that is the marker
    with pytest.raises(openai.APIStatusError) as raised:
        resumed(service, job_id, starting_after=2)
    assert (raised.value.status_code, raised.value.code) == (410, "stream_incomplete")


def test_another_tenants_job_does_not_exist(own_service: Start) -> None:
    service = own_service(api_keys=f"{KEY},acme:sk-acme")
    job_id = finished(service, say=["a"])
    with service.http(key="sk-acme") as http:
        for method, path in (
            ("GET", f"chat/completions/{job_id}/stream"),
            ("GET", f"jobs/{job_id}"),
            ("GET", f"jobs/{job_id}/events"),
            ("POST", f"jobs/{job_id}/cancel"),
        ):
            assert http.request(method, f"/v1/{path}").status_code == 404


# -- watched by a browser ----------------------------------------------------------------------------------------------


def test_a_browser_sees_a_job_from_any_event_on(service: Deployment) -> None:
    job_id = finished(service, reasoning=["hm"], tools=["search"], say=["a", "b"])
    with event_source(service, job_id) as source:
        events = list(source)
    assert events[0].name == "open"
    assert [event.id for event in events[1:]] == [str(number) for number in range(1, len(events))]
    assert "".join(event.data["text"] for event in events if event.name == "delta") == "ab"
    assert [event.data["status"] for event in events if event.name == "tool"] == ["started", "completed"]
    assert (events[-1].name, events[-1].data["status"]) == ("end", "succeeded")
    with event_source(service, job_id, headers={"last-event-id": "2"}) as source:
        assert list(source) == events[3:]


def test_a_browser_that_has_seen_the_end_stays_away(service: Deployment) -> None:
    job_id = finished(service, say=["a"])
    with event_source(service, job_id) as source:
        last = list(source)[-1].id
    with service.http() as http:
        assert http.get(f"/v1/jobs/{job_id}/events", headers={"last-event-id": str(last)}).status_code == 204


def test_a_browser_that_has_seen_the_end_of_a_cancelled_job_stays_away(service: Deployment) -> None:
    with service.client() as client, service.http() as http:
        stream = client.chat.completions.create(model="endmark", messages=script(say=["a"], then="hang"), stream=True)
        job_id = next(stream).id
        http.post(f"/v1/jobs/{job_id}/cancel")
        with event_source(service, job_id) as source:
            end = list(source)[-1]
        assert (end.name, end.data["status"]) == ("end", "cancelled")
        answer = http.get(f"/v1/jobs/{job_id}/events", headers={"last-event-id": str(end.id)})
        assert answer.status_code == 204
        stream.close()


def test_a_browser_is_told_of_a_failure(service: Deployment) -> None:
    with service.client() as client, pytest.raises(openai.APIError):
        client.chat.completions.create(model="endmark", messages=script(say=["a"], then="raise"))
    (job_id,) = (job for job in service.job_ids() if service.job_field(job, "status") == "failed")
    with event_source(service, job_id) as source:
        end = list(source)[-1]
    assert (end.name, end.data["status"], end.data["error"]["code"]) == ("end", "failed", "agent_error")
    with service.http() as http:
        assert http.get(f"/v1/jobs/{job_id}/events", headers={"last-event-id": str(end.id)}).status_code == 204
    service.redis.delete(service.keys.job(job_id))


# -- replayed with its timing ------------------------------------------------------------------------------------------


def test_a_finished_job_is_replayed_with_its_pauses(service: Deployment) -> None:
    job_id = finished(service, say=["a", "b", "c"], every_s=0.2)
    with event_source(service, job_id) as source:
        at_once = list(source)
    arrived: list[float] = []
    replayed: list[Event] = []
    with event_source(service, job_id, params={"speed": 2}) as source:
        for event in source:
            arrived.append(time.monotonic())
            replayed.append(event)
    assert replayed == at_once
    deltas = [instant for instant, event in zip(arrived, replayed, strict=True) if event.name == "delta"]
    assert all(later - earlier >= 0.05 for earlier, later in pairwise(deltas)), "half of the pauses that there were"


@pytest.mark.parametrize("speed", ["0", "-1", "nan", "inf", "fast", "", "1e9"])
def test_a_speed_that_is_none_is_refused(service: Deployment, speed: str) -> None:
    job_id = finished(service, say=["a"])
    with service.http() as http:
        answer = http.get(f"/v1/jobs/{job_id}/events", params={"speed": speed})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "speed")


def test_only_what_has_ended_and_was_timed_is_replayed(service: Deployment) -> None:
    with service.client() as client, service.http() as http:
        stream = client.chat.completions.create(model="endmark", messages=script(say=["a"], then="hang"), stream=True)
        job_id = next(stream).id
        path, query = f"/v1/jobs/{job_id}/events", {"speed": "1"}
        assert http.get(path, params=query).status_code == 409
        http.post(f"/v1/jobs/{job_id}/cancel")
        stream.close()
        answer = http.get(path, params=query)
    assert (answer.status_code, answer.json()["error"]["code"]) == (410, "no_timing")


# -- cancelled by the API ----------------------------------------------------------------------------------------------


def test_a_running_job_is_cancelled_on_whatever_worker_it_runs(own_service: Start, tmp_path: Path) -> None:
    service = own_service(workers=2)
    other, log = service.start_another_api(), tmp_path / "log"
    with service.client() as client:
        stream = client.chat.completions.create(
            model="endmark", messages=script(say=["a"], then="hang", log=str(log)), stream=True
        )
        job_id = next(stream).id
        with httpx.Client(base_url=other, headers={"authorization": f"Bearer {KEY}"}) as http:
            answer = http.post(f"/v1/jobs/{job_id}/cancel", headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
        with pytest.raises(openai.APIError) as raised:
            list(stream)
    assert raised.value.code == "cancelled"
    wait_until(lambda: noted(log, "cancelled") == 1, timeout=10, description="the agent to be cancelled")


def test_a_cancel_after_the_end_tells_how_it_ended(service: Deployment) -> None:
    job_id = finished(service, say=["a"])
    with service.http() as http:
        answer = http.post(f"/v1/jobs/{job_id}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
        assert answer.json().items() <= http.get(f"/v1/jobs/{job_id}").json().items()


def test_a_waiting_job_that_is_cancelled_never_starts(own_service: Start, tmp_path: Path) -> None:
    service, log = own_service(max_jobs=1), tmp_path / "log"
    with service.client() as client, ThreadPoolExecutor() as pool:
        first = client.chat.completions.create(
            model="endmark", messages=script(say=["a"], then="hang"), stream=True, extra_body={"session_id": "1"}
        )
        running_id = next(first).id
        waiting = pool.submit(
            client.chat.completions.create,
            model="endmark",
            messages=script(say=["b"], log=str(log)),
            extra_body={"session_id": "2"},
        )
        wait_until(lambda: len(service.job_ids()) == 2, timeout=10, description="the second job")
        (waiting_id,) = set(service.job_ids()) - {running_id}
        with service.http() as http:
            assert http.post(f"/v1/jobs/{waiting_id}/cancel").json()["status"] == "cancelled"
            with pytest.raises(openai.APIStatusError) as raised:
                waiting.result()
            assert raised.value.code == "cancelled"
            http.post(f"/v1/jobs/{running_id}/cancel")
        first.close()
    service.wait_for_status(running_id, Status.CANCELLED)
    service.wait_until_idle()
    assert noted(log, "started") == 0
