"""Requests that come twice run the agent once; requests that nobody waits for do not run it at all."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from shared.jobs import Status
from tests.deployment import KEY, Deployment, Start, noted, notes, script, text_of
from tests.proxy import Proxy
from tests.waiting import wait_until

Headers = dict[str, str]


def ask(service: Deployment, key: str, messages: list[Any], **options: Any) -> Any:
    with service.client() as client:
        return client.chat.completions.create(
            model="endmark", messages=messages, extra_headers={"Idempotency-Key": key}, **options
        )


# -- Idempotency-Key ---------------------------------------------------------------------------------------------------


def test_the_same_key_gets_the_same_finished_job(service: Deployment, tmp_path: Path) -> None:
    messages = script(say=["a", "b"], log=str(tmp_path / "log"))
    first, second = ask(service, "finished", messages), ask(service, "finished", messages)
    assert first == second
    assert noted(tmp_path / "log", "started") == 1


def test_the_same_key_gets_the_same_running_job(service: Deployment, tmp_path: Path) -> None:
    gate, log = tmp_path / "gate", tmp_path / "log"
    messages = script(waits_for=str(gate), say=["a", "b"], log=str(log))
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(ask, service, "running", messages) for _ in range(4)]
        wait_until(lambda: noted(log, "started") == 1, timeout=10, description="the agent to start")
        gate.touch()
        assert len({answer.result().id for answer in answers}) == 1
    assert noted(log, "started") == 1


def test_a_streamed_request_joins_a_running_one(service: Deployment, tmp_path: Path) -> None:
    gate, log = tmp_path / "gate", tmp_path / "log"
    messages = script(say=["a", "b"], waits_for=str(gate), log=str(log))
    with service.client() as one, service.client() as two:
        options: dict[str, Any] = {"model": "endmark", "messages": messages, "stream": True}
        first = one.chat.completions.create(**options, extra_headers={"Idempotency-Key": "streamed"})
        second = two.chat.completions.create(**options, extra_headers={"Idempotency-Key": "streamed"})
        first.close()  # one of two waiters: the job goes on
        gate.touch()
        assert text_of(second) == "ab"
    assert noted(log, "started") == 1


def test_the_last_waiter_takes_the_job_with_it(service: Deployment, tmp_path: Path) -> None:
    log = tmp_path / "log"
    messages = script(say=["a"], then="hang", log=str(log))
    with service.client() as one, service.client() as two:
        options: dict[str, Any] = {"model": "endmark", "messages": messages, "stream": True}
        streams = [
            client.chat.completions.create(**options, extra_headers={"Idempotency-Key": "last"})
            for client in (one, two)
        ]
        job_ids = {next(stream).id for stream in streams}
        for stream in streams:
            stream.close()
    (job_id,) = job_ids
    service.wait_for_status(job_id, Status.CANCELLED)
    wait_until(lambda: noted(log, "cancelled") == 1, timeout=10, description="the agent to be cancelled")


def test_the_same_key_with_another_body_is_refused(service: Deployment) -> None:
    ask(service, "other body", script(say=["a"]))
    with pytest.raises(openai.UnprocessableEntityError) as raised:
        ask(service, "other body", script(say=["b"]))
    assert raised.value.code == "idempotency_key_reused"


@pytest.mark.parametrize("key", ["", "x" * 256, "caf\xe9"])
def test_a_key_that_is_none_is_refused(service: Deployment, key: str) -> None:
    with service.http() as http:
        answer = http.post(
            "/v1/chat/completions",
            json={"messages": script(say=["a"])},
            headers=[(b"idempotency-key", key.encode("latin-1"))],
        )
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_idempotency_key")


def test_the_same_key_on_another_route_is_refused(service: Deployment) -> None:
    body = {"messages": script(say=["a"]), "input": "hi", "model": "endmark"}
    with service.http() as http:
        headers = {"idempotency-key": "both"}
        assert http.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
        answer = http.post("/v1/responses", json=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "idempotency_key_reused")


def test_a_key_belongs_to_its_tenant(own_service: Start) -> None:
    service = own_service(api_keys=f"{KEY},acme:sk-acme")
    messages = script(say=["a"])
    ids = []
    for key in (KEY, "sk-acme"):
        with service.client(api_key=key) as client:
            headers = {"Idempotency-Key": "shared"}
            ids.append(client.chat.completions.create(model="endmark", messages=messages, extra_headers=headers).id)
    assert len(set(ids)) == 2


# -- retries of the SDK ------------------------------------------------------------------------------------------------


def test_a_request_that_the_sdk_sends_again_runs_the_agent_once(service: Deployment, tmp_path: Path) -> None:
    """The first response is cut before its headers, with no change at the client."""
    gate, log = tmp_path / "gate", tmp_path / "log"
    messages = script(waits_for=str(gate), say=["a", "b"], log=str(log))
    with (
        Proxy(service.port) as proxy,
        ThreadPoolExecutor() as pool,
        service.client(base_url=f"http://127.0.0.1:{proxy.port}/v1", max_retries=2) as client,
    ):
        answer = pool.submit(client.chat.completions.create, model="endmark", messages=messages)
        wait_until(lambda: noted(log, "started") == 1, timeout=10, description="the agent to start")
        proxy.cut()
        (job_id,) = {note["job"] for note in notes(log)}
        wait_until(
            lambda: service.job_field(job_id, "waiters") == "2",
            timeout=10,
            description="the SDK to send its request again",
        )
        gate.touch()
        assert answer.result().choices[0].message.content == "ab"
    assert noted(log, "started") == 1


def test_a_stream_that_was_cut_before_anything_came_is_joined(service: Deployment, tmp_path: Path) -> None:
    gate, log = tmp_path / "gate", tmp_path / "log"
    body = {"messages": script(waits_for=str(gate), say=["a"], log=str(log)), "stream": True}
    with service.http() as http:
        with http.stream("POST", "/v1/chat/completions", json=body, headers={"x-stainless-retry-count": "0"}):
            wait_until(lambda: noted(log, "started") == 1, timeout=10, description="the agent to start")
        retry = {"x-stainless-retry-count": "1"}
        with http.stream("POST", "/v1/chat/completions", json=body, headers=retry) as again:
            gate.touch()
            assert again.read().endswith(b"data: [DONE]\n\n")
    assert noted(log, "started") == 1


def test_a_client_that_does_not_come_back_takes_its_job_with_it(service: Deployment, tmp_path: Path) -> None:
    log = tmp_path / "log"
    body = {"messages": script(then="hang", log=str(log)), "stream": True}
    headers = {"x-stainless-retry-count": "0"}
    with service.http() as http, http.stream("POST", "/v1/chat/completions", json=body, headers=headers):
        wait_until(lambda: noted(log, "started") == 1, timeout=10, description="the agent to start")
    wait_until(lambda: noted(log, "cancelled") == 1, timeout=10, description="the agent to be cancelled")


def test_a_client_that_leaves_in_mid_answer_takes_its_job_with_it_at_once(service: Deployment, tmp_path: Path) -> None:
    """It has got something, so its SDK will not send the request again."""
    log = tmp_path / "log"
    body = {"messages": script(say=["a"], times=8, every_s=0.01, then="hang", log=str(log)), "stream": True}
    headers = {"x-stainless-retry-count": "0"}
    with service.http() as http, http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
        events = (json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line.startswith("data: "))
        said = ""
        while said != "a" * 8:  # an agent that still speaks may learn of it by that, and not by being cancelled
            event = next(events)
            said += event["choices"][0]["delta"].get("content") or ""
    wait_until(lambda: noted(log, "cancelled") == 1, timeout=10, description="the agent to be cancelled")

    def left() -> list[str]:
        lines = [json.loads(line) for line in service.api.output.splitlines() if event["id"] in line]
        return [line["job_is"] for line in lines if line["event"] == "client_left"]

    wait_until(left, timeout=10, description="the API to say that its client has left")
    assert left() == ["done"], "not later"


def test_the_same_question_again_is_another_request(service: Deployment, tmp_path: Path) -> None:
    """The SDK counts its tries: each of these is a first one, and each has its answer."""
    messages = script(say=["a"], log=str(tmp_path / "log"))
    with service.client(max_retries=2) as client:
        ids = {client.chat.completions.create(model="endmark", messages=messages).id for _ in range(3)}
    assert len(ids) == 3
    assert noted(tmp_path / "log", "started") == 3


def test_a_retry_after_the_answer_was_delivered_is_another_request(service: Deployment) -> None:
    """Its first try never reached us: the answer before it was that of another request."""
    body = {"messages": script(say=["a"])}
    with service.http() as http:
        first = http.post("/v1/chat/completions", json=body, headers={"x-stainless-retry-count": "0"}).json()

        def remembered() -> bool:
            names = service.redis.scan_iter(service.keys.once("default:retry:*"))
            return any((service.redis.get(name) or b"").startswith(first["id"].encode()) for name in names)  # type: ignore[union-attr]  # redis-py types both its clients at once

        wait_until(lambda: not remembered(), timeout=5, description="the request to be forgotten")
        second = http.post("/v1/chat/completions", json=body, headers={"x-stainless-retry-count": "1"}).json()
    assert first["id"] != second["id"]


def test_a_retry_of_a_failed_request_tries_again(service: Deployment, tmp_path: Path) -> None:
    log = tmp_path / "log"
    body = {"messages": script(then="raise", log=str(log))}
    with service.http() as http:
        for count in ("0", "1"):
            headers = {"x-stainless-retry-count": count}
            assert http.post("/v1/chat/completions", json=body, headers=headers).status_code == 500
    assert noted(log, "started") == 2


# -- nobody waits ------------------------------------------------------------------------------------------------------


def test_a_waiting_job_does_not_start_after_its_clients_read_timeout(own_service: Start, tmp_path: Path) -> None:
    service, log = own_service(max_jobs=1), tmp_path / "log"
    with service.client() as client, service.http() as http:
        stream = client.chat.completions.create(model="endmark", messages=script(say=["a"], then="hang"), stream=True)
        running_id = next(stream).id
        answer = http.post(
            "/v1/chat/completions",
            json={"messages": script(say=["b"], log=str(log)), "session_id": "other"},
            headers={"x-stainless-read-timeout": "0.5"},
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "queue_timeout")
        http.post(f"/v1/jobs/{running_id}/cancel")
        stream.close()
    service.wait_until_idle()
    assert noted(log, "started") == 0


def age_ms(service: Deployment, job_id: str) -> int:
    """Since its acceptance, on Redis's clock."""
    seconds, microseconds = service.redis.time()  # type: ignore[misc]  # redis-py types both its clients at once
    return int(seconds * 1000 + microseconds // 1000) - int(service.job_field(job_id, "accepted_ms"))


def test_a_waiting_job_does_not_start_when_its_api_process_is_gone(own_service: Start, tmp_path: Path) -> None:
    """Nobody is left to cancel it; that nobody listens is seen when its turn comes."""
    service, log = own_service(max_jobs=1), tmp_path / "log"
    other = service.start_another_api()
    with httpx.Client(base_url=other, headers={"authorization": f"Bearer {KEY}"}, timeout=30) as http:
        request = {"messages": script(say=["a"], then="hang"), "session_id": "1", "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=request) as first:
            said = first.iter_bytes()
            next(said)
            (running_id,) = service.job_ids()
            with service.client() as client:
                stream = client.chat.completions.create(
                    model="endmark",
                    messages=script(say=["b"], log=str(log)),
                    stream=True,
                    extra_body={"session_id": "2"},
                )
                (waiting_id,) = set(service.job_ids()) - {running_id}
                service.api.process.kill()
                service.api.process.wait()
                stream.close()
            wait_until(lambda: age_ms(service, waiting_id) > 1000, timeout=5, description="the job to have waited")
            httpx.post(f"{other}/v1/jobs/{running_id}/cancel", headers={"authorization": f"Bearer {KEY}"})
    wait_until(lambda: service.job_field(waiting_id, "unheard_ms"), timeout=20, description="its turn")
    assert service.job_field(waiting_id, "status") == "queued"
    since, looked = service.job_field(waiting_id, "unheard_ms").split()
    service.redis.hset(service.keys.job(waiting_id), "unheard_ms", f"{int(since) - 25_000} {looked}")  # time passes
    service.wait_for_status(waiting_id, Status.CANCELLED, timeout=20)
    service.wait_until_idle()
    assert noted(log, "started") == 0


def test_a_job_that_nobody_has_to_wait_for_starts_all_the_same(own_service: Start, tmp_path: Path) -> None:
    service, log = own_service(max_jobs=1), tmp_path / "log"
    with service.client() as client:
        first = client.chat.completions.create(
            model="endmark", messages=script(say=["a"], then="hang"), stream=True, extra_body={"session_id": "1"}
        )
        running_id = next(first).id
        second = client.chat.completions.create(
            model="endmark",
            messages=script(say=["b"], log=str(log)),
            stream=True,
            extra_body={"session_id": "2", "on_disconnect": "continue"},
        )
        (waiting_id,) = set(service.job_ids()) - {running_id}
        second.close()
        first.close()
    service.wait_for_status(waiting_id, Status.SUCCEEDED)
