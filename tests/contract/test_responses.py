"""Responses as the OpenAI SDK sees them: created, followed, resumed, chained, cancelled and deleted, on any replica."""

from __future__ import annotations

import asyncio
import json
import threading
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from shared.jobs import Status
from tests.deployment import KEY, Deployment, Start, noted, notes
from tests.media_samples import png
from tests.waiting import wait_until

ALL = {  # says something of every kind
    "reasoning": ["hm ", "so"],
    "tools": ["search"],
    "tool_calls": [
        {"index": 0, "id": "call_a", "function": {"name": "weather", "arguments": '{"city"'}},
        {"index": 0, "function": {"arguments": ':"Paris"}'}},
    ],
    "say": ["Hel", "lo"],
}


def steps(**script: Any) -> str:
    """The input that makes the scripted agent do this."""
    return json.dumps(script)


def gated(tmp_path: Path, **script: Any) -> tuple[str, Path]:
    """An input whose agent waits for a file before it says anything."""
    gate = tmp_path / "gate"
    return steps(waits_for=str(gate), **script), gate


def create(client: openai.OpenAI, input_: Any, **fields: Any) -> Any:
    return client.responses.create(model="endmark", input=input_, **fields)


def wait_until_ended(client: openai.OpenAI, response_id: str) -> Response:
    def ended() -> Response | None:
        response = client.responses.retrieve(response_id)
        return None if response.status in ("queued", "in_progress") else response

    response = wait_until(ended, timeout=10, description=f"end of {response_id}")
    assert response is not None
    return response


def raw_stream(
    service: Deployment, response_id: str, *, base_url: str | None = None, after: int | None = None
) -> bytes:
    """The bytes of a stream of a response, to its end."""
    query = {"stream": "true"} | ({} if after is None else {"starting_after": str(after)})
    with service.http() as http:
        answer = http.get(f"{base_url or service.base_url}/v1/responses/{response_id}", params=query)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return b"".join(frame + b"\n\n" for frame in answer.content.split(b"\n\n")[:-1] if not frame.startswith(b":"))


def numbers_of(stream: bytes) -> list[int]:
    return [json.loads(frame.split(b"\ndata: ")[1])["sequence_number"] for frame in stream.split(b"\n\n")[:-1]]


def without_heartbeats(frames: bytes) -> bytes:
    """A heartbeat is the one frame that repeats a number."""
    kept: list[bytes] = []
    for frame in frames.split(b"\n\n")[:-1]:
        if not frame.startswith(b":") and not (kept and numbers_of(kept[-1]) == numbers_of(frame + b"\n\n")):
            kept.append(frame + b"\n\n")
    return b"".join(kept)


# -- in the foreground -------------------------------------------------------------------------------------------------


def test_an_answer_is_a_response(service: Deployment) -> None:
    with service.client() as client:
        response = create(client, "Hello", metadata={"a": "b"}, instructions="Be brief.", temperature=0.5)
        assert response.output_text == "Hello"
        assert response.status == "completed"
        assert (response.metadata, response.instructions, response.temperature) == ({"a": "b"}, "Be brief.", 0.5)
        assert response.usage.total_tokens > 0
        assert response.created_at <= response.completed_at
        assert client.responses.retrieve(response.id) == response


def test_a_stream_has_events_of_every_kind_and_its_last_one_is_the_response(service: Deployment) -> None:
    with service.client() as client:
        events: list[ResponseStreamEvent] = list(create(client, steps(**ALL), stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        last: Any = events[-1]
        assert last.type == "response.completed"
        assert [item.type for item in last.response.output] == ["reasoning", "mcp_call", "function_call", "message"]
        assert last.response.output_text == "Hello"
        assert last.response.output[2].arguments == '{"city":"Paris"}'
        assert client.responses.retrieve(last.response.id) == last.response


def test_the_helper_of_the_sdk_follows_a_stream(service: Deployment) -> None:
    with service.client() as client, client.responses.stream(model="endmark", input=steps(**ALL)) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == "Hello"


async def test_the_async_client_streams_and_retrieves(service: Deployment) -> None:
    async with service.async_client() as client:
        stream = await client.responses.create(model="endmark", input=steps(**ALL), stream=True)
        events: list[Any] = [event async for event in stream]
        async with client.responses.stream(response_id=events[0].response.id, starting_after=3) as replay:
            again: list[Any] = [event async for event in replay]
    assert [event.type for event in again] == [event.type for event in events[4:]]
    assert again[-1].response.id == events[-1].response.id


def test_an_answer_that_was_cut_short_is_incomplete(service: Deployment) -> None:
    with service.client() as client:
        response = create(client, steps(say=["Hel"], finish_reason="length"))
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        last: Any = list(create(client, steps(say=["Hel"], finish_reason="content_filter"), stream=True))[-1]
    assert (last.type, last.response.incomplete_details.reason) == ("response.incomplete", "content_filter")


def test_an_empty_answer_is_an_empty_text(service: Deployment) -> None:
    with service.client() as client:
        assert create(client, steps(say=[])).output_text == ""
        with client.responses.stream(model="endmark", input=steps(say=[])) as stream:
            assert stream.get_final_response().output_text == ""


@pytest.mark.parametrize("said", [[], ["Hel", "lo"]], ids=["before the first token", "after some tokens"])
def test_a_failed_response_raises_in_every_way(service: Deployment, tmp_path: Path, said: list[str]) -> None:
    log = tmp_path / "log"
    script = steps(say=said, then="raise", log=str(log))
    with service.client(max_retries=2) as client:
        with pytest.raises(openai.InternalServerError) as refused:
            create(client, script)
        assert refused.value.code == "agent_error"
        seen: list[Any] = []
        with pytest.raises(openai.APIError) as raised:
            seen += create(client, script, stream=True)
        assert raised.value.code == "agent_error"
        with client.responses.stream(model="endmark", input=script) as stream, pytest.raises(openai.APIError):
            stream.until_done()
    assert noted(log, "started") == 3, "the SDK's retries must not run the agent again"


def test_a_failed_response_is_found_with_its_error_and_what_it_said(service: Deployment) -> None:
    with service.client() as client:
        failed: list[Any] = []
        with pytest.raises(openai.APIError):
            for event in create(client, steps(say=["Hel"], then="raise"), stream=True):
                failed.append(event)
        assert [event.type for event in failed[-1:]] == ["response.failed"]
        response = client.responses.retrieve(failed[0].response.id)
        assert response.status == "failed"
        assert response.error is not None
        assert (response.error.code, response.error.message) == ("agent_error", "The agent failed.")
        assert response.output_text == "Hel"
        assert response == failed[-1].response
        with pytest.raises(openai.APIError):
            list(client.responses.retrieve(response.id, stream=True))


def test_an_agent_that_takes_too_long_fails_its_response(impatient: Deployment) -> None:
    with impatient.client() as client:
        with pytest.raises(openai.APIError) as raised:
            list(create(client, steps(say=["a"], then="hang"), stream=True))
        assert raised.value.code == "timeout"
        with pytest.raises(openai.InternalServerError) as refused:
            create(client, steps(say=["a"], then="hang"))
    assert (refused.value.status_code, refused.value.code) == (504, "timeout")


def test_a_response_whose_worker_dies_in_the_middle_fails(own_service: Start) -> None:
    service = own_service(lease_s=1)
    with service.client() as client:
        response = create(client, steps(say=["a"], then="hang"), background=True)
        with pytest.raises(openai.APIError) as raised:
            for event in client.responses.retrieve(response.id, stream=True):
                if event.type == "response.output_text.delta":
                    service.workers[0].process.kill()
        assert raised.value.code == "worker_lost"
        failed = client.responses.retrieve(response.id)
    assert (failed.status, failed.output_text) == ("failed", "a")


def test_a_client_that_goes_away_cancels_its_response(service: Deployment, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with service.client() as client:
        stream = create(client, steps(say=["a"], then="hang", log=str(log)), stream=True)
        response_id = next(stream).response.id
        wait_until(lambda: noted(log, "started") == 1, timeout=10, description="the agent to start")
        stream.close()
        service.wait_for_status(response_id, Status.CANCELLED)
        assert client.responses.retrieve(response_id).status == "cancelled"
        last: Any = list(client.responses.retrieve(response_id, stream=True))[-1]
    assert (last.type, last.response.status) == ("response.incomplete", "cancelled")
    wait_until(lambda: noted(log, "cancelled") == 1, timeout=5, description="the agent to be cancelled")


def test_a_client_may_ask_that_its_response_goes_on_without_it(service: Deployment, tmp_path: Path) -> None:
    script, gate = gated(tmp_path, say=["whole"])
    with service.client() as client:
        stream = create(client, script, stream=True, extra_body={"on_disconnect": "continue"})
        response_id = next(stream).response.id
        stream.close()
        gate.touch()
        assert wait_until_ended(client, response_id).output_text == "whole"


def test_a_silent_stream_is_kept_alive_without_new_numbers(own_service: Start, tmp_path: Path) -> None:
    service = own_service(heartbeat_interval_s=0.2)
    script, gate = gated(tmp_path, say=["a"])
    with service.client() as client:
        stream = create(client, script, stream=True)
        seen: list[Any] = []
        while len([event for event in seen if event.sequence_number == 1]) < 3:  # the start, and two heartbeats
            seen.append(next(stream))
            assert seen[-1].type in ("response.created", "response.in_progress")
        gate.touch()
        seen += stream
    assert seen[-1].type == "response.completed"
    assert sorted({event.sequence_number for event in seen}) == list(range(seen[-1].sequence_number + 1))


# -- in the background -------------------------------------------------------------------------------------------------


def test_a_background_response_is_created_retrieved_resumed_and_cancelled(service: Deployment, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with service.client() as client:
        response = create(client, steps(say=["a", "b"], then="hang", log=str(log)), background=True)
        assert (response.status, response.background, response.output) == ("queued", True, [])
        wait_until(
            lambda: client.responses.retrieve(response.id).status == "in_progress", timeout=10, description="a start"
        )
        seen: list[Any] = []
        for event in client.responses.retrieve(response.id, stream=True):
            seen.append(event)
            if event.type == "response.output_text.delta":
                break
        rest = client.responses.retrieve(response.id, stream=True, starting_after=seen[1].sequence_number)
        assert [next(rest) for _ in seen[2:]] == seen[2:]
        cancelled = client.responses.cancel(response.id)
        assert cancelled.status == "cancelled"
        assert client.responses.cancel(response.id) == cancelled, "to cancel twice changes nothing"
        last: Any = list(rest)[-1]
    assert (last.type, last.response.status) == ("response.incomplete", "cancelled")
    assert [event.type for event in seen[:3]] == ["response.created", "response.queued", "response.in_progress"]
    wait_until(lambda: noted(log, "cancelled") == 1, timeout=5, description="the agent to be cancelled")


def test_a_background_response_outlives_the_client_that_streams_it(service: Deployment, tmp_path: Path) -> None:
    script, gate = gated(tmp_path, say=["whole"])
    with service.client() as client:
        stream = create(client, script, background=True, stream=True)
        first: Any = next(stream)
        stream.close()
        gate.touch()
        assert wait_until_ended(client, first.response.id).output_text == "whole"


def test_a_background_response_that_fails_says_so_with_a_200(service: Deployment) -> None:
    with service.client() as client:
        response = wait_until_ended(client, create(client, steps(say=["a"], then="raise"), background=True).id)
        assert response.status == "failed"
        assert client.responses.cancel(response.id).status == "failed"


def test_a_response_that_waits_for_a_worker_can_be_watched_and_cancelled(own_service: Start) -> None:
    service = own_service(workers=0)
    with service.client() as client:
        response = create(client, "Hello", background=True)
        assert client.responses.retrieve(response.id).status == "queued"
        stream = client.responses.retrieve(response.id, stream=True)
        assert [next(stream).type for _ in range(2)] == ["response.created", "response.queued"]
        assert client.responses.cancel(response.id).status == "cancelled"
        assert [event.type for event in stream] == ["response.incomplete"]


def test_a_foreground_response_is_not_cancelled_by_its_id(service: Deployment) -> None:
    with service.client() as client:
        response = create(client, "Hello")
        with pytest.raises(openai.BadRequestError):
            client.responses.cancel(response.id)


def test_a_request_that_comes_twice_is_one_response(service: Deployment, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = steps(say=["a"], log=str(log))
    with service.client() as client:
        keyed = {"extra_headers": {"Idempotency-Key": "one"}}
        first = create(client, script, background=True, **keyed)
        wait_until_ended(client, first.id)
        second = create(client, script, background=True, **keyed)
        assert (second.id, second.status) == (first.id, "completed")
        with pytest.raises(openai.UnprocessableEntityError):
            create(client, "another", background=True, **keyed)
    assert noted(log, "started") == 1


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_every_number_resumes_at_exactly_the_rest(service: Deployment) -> None:
    with service.client() as client:
        response = wait_until_ended(client, create(client, steps(**ALL), background=True).id)
    whole = raw_stream(service, response.id)
    numbers = numbers_of(whole)
    assert numbers == list(range(len(numbers)))
    for seen in numbers:
        rest = raw_stream(service, response.id, after=seen)
        assert whole.endswith(rest)
        assert numbers_of(rest) == numbers[seen + 1 :]
    with service.client() as client, pytest.raises(openai.BadRequestError) as raised:
        client.responses.retrieve(response.id, stream=True, starting_after=len(numbers))
    assert raised.value.param == "starting_after"


def test_live_on_one_replica_and_resumed_on_the_other_are_the_same_bytes(own_service: Start, tmp_path: Path) -> None:
    service = own_service()
    other_url = service.start_another_api()
    script, gate = gated(tmp_path, **ALL)
    body = {"model": "endmark", "input": script, "background": True, "stream": True}
    with service.http() as http, http.stream("POST", "/v1/responses", json=body) as answer:
        chunks = answer.iter_bytes()
        live = next(chunks)
        response_id = json.loads(live.split(b"\ndata: ")[1].split(b"\n\n")[0])["response"]["id"]
        gate.touch()
        live += b"".join(chunks)
    live = without_heartbeats(live)
    replay = raw_stream(service, response_id, base_url=other_url)
    assert replay == live
    for seen in (0, 5, numbers_of(live)[-1]):
        resumed = raw_stream(service, response_id, base_url=other_url, after=seen)
        assert numbers_of(live)[seen + 1 :] == numbers_of(resumed)
        assert live.endswith(resumed)


def test_many_watchers_see_the_same(service: Deployment, tmp_path: Path) -> None:
    script, gate = gated(tmp_path, **ALL)
    with service.client() as client:
        response = create(client, script, background=True)
    watching = threading.Barrier(9)

    def watch(_: int) -> bytes:
        url = f"/v1/responses/{response.id}"
        with service.http() as http, http.stream("GET", url, params={"stream": "true"}) as answer:
            chunks = answer.iter_bytes()
            first = next(chunks)
            watching.wait(timeout=20)
            return without_heartbeats(first + b"".join(chunks))

    with ThreadPoolExecutor(8) as pool:
        watchers = [pool.submit(watch, number) for number in range(8)]
        watching.wait(timeout=20)
        gate.touch()
        seen = {watcher.result(timeout=20) for watcher in watchers}
    assert seen == {raw_stream(service, response.id)}


def test_a_stream_of_a_killed_replica_goes_on_at_the_other(own_service: Start) -> None:
    service = own_service()
    other_url = service.start_another_api()
    said = [f"{number} " for number in range(100)]
    seen: list[Any] = []
    with service.client() as client:
        stream = create(client, steps(say=said, every_s=0.05), background=True, stream=True)
        with pytest.raises(openai.APIConnectionError):
            for event in stream:
                seen.append(event)
                if event.type == "response.output_text.delta" and event.sequence_number > 6:
                    service.api.process.kill()
    with service.client(base_url=f"{other_url}/v1") as client:
        last = seen[-1].sequence_number
        seen += client.responses.retrieve(seen[0].response.id, stream=True, starting_after=last)
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert "".join(event.delta for event in seen if event.type == "response.output_text.delta") == "".join(said)
    assert seen[-1].type == "response.completed"


# -- chains and conversations ------------------------------------------------------------------------------------------


def messages_seen(service: Deployment, response_id: str) -> list[Any]:
    """What the agent was given."""
    stored: bytes = service.redis.get(service.keys.request(response_id))  # type: ignore[assignment]  # redis-py types
    messages: list[Any] = json.loads(stored)["messages"]
    return messages


def test_a_chain_brings_its_history_without_its_instructions(service: Deployment) -> None:
    with service.client() as client:
        first = create(client, "one", instructions="Be brief.")
        second = create(client, "two", previous_response_id=first.id)
        third = create(client, "three", previous_response_id=second.id, instructions="Be long.")
        assert third.previous_response_id == second.id
    assert messages_seen(service, third.id) == [
        {"role": "system", "content": "Be long."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "one"},  # the scripted agent repeats what it is told
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]


def test_a_response_may_be_gone_on_from_twice_and_its_past_be_deleted(service: Deployment) -> None:
    with service.client() as client:
        first = create(client, "one")
        left = create(client, "left", previous_response_id=first.id)
        right = create(client, "right", previous_response_id=first.id)
        client.responses.delete(first.id)
        further = create(client, "further", previous_response_id=left.id)
    assert [m["content"] for m in messages_seen(service, right.id)] == ["one", "one", "right"]
    assert [m["content"] for m in messages_seen(service, further.id)] == ["one", "one", "left", "left", "further"]


def test_a_function_call_is_answered_by_the_next_response(service: Deployment) -> None:
    call = {"index": 0, "id": "call_a", "function": {"name": "weather", "arguments": "{}"}}
    with service.client() as client:
        first = create(client, steps(tool_calls=[call], finish_reason="tool_calls"))
        output = [{"type": "function_call_output", "call_id": "call_a", "output": "rain"}]
        second = create(client, output, previous_response_id=first.id)
    *_, said, answered = messages_seen(service, second.id)
    assert said["tool_calls"][0]["function"] == {"name": "weather", "arguments": "{}"}
    assert answered == {"role": "tool", "tool_call_id": "call_a", "content": "rain"}


def test_a_file_of_an_earlier_request_is_named_but_gone(service: Deployment) -> None:
    image = {"type": "input_image", "image_url": f"data:image/png;base64,{b64encode(png()).decode()}"}
    with service.client() as client:
        first = create(client, [{"role": "user", "content": [{"type": "input_text", "text": "Look"}, image]}])
        second = create(client, "Again", previous_response_id=first.id)
    asked = messages_seen(service, second.id)[0]["content"]
    assert "no longer stored" in asked[1]["text"]


def test_an_unknown_previous_response_is_refused_as_openai_does(service: Deployment) -> None:
    missing = f"resp_{'0' * 32}"
    with service.client() as client:
        unstored = create(client, "Hello", store=False)
        for previous in (missing, "nonsense", "\ud800", unstored.id):
            with service.http() as http:
                content = json.dumps({"input": "a", "previous_response_id": previous})
                answer = http.post("/v1/responses", content=content)
            error = answer.json()["error"]
            assert answer.status_code == 400
            assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")
        running = create(client, steps(then="hang"), background=True)
        with pytest.raises(openai.BadRequestError) as raised:
            create(client, "a", previous_response_id=running.id)
        assert "is not completed" in raised.value.message
        client.responses.cancel(running.id)


def test_a_conversation_is_a_session_whose_turns_any_worker_runs(own_service: Start, tmp_path: Path) -> None:
    service = own_service(workers=2, max_jobs=1, session_ttl_s=60)
    log = tmp_path / "log"
    with service.client() as client:
        pending = [
            create(client, steps(leaves=str(n), recalls=True, log=str(log)), conversation="c", background=True)
            for n in range(4)
        ]
        answers = [wait_until_ended(client, response.id).output_text for response in pending]
        last = create(client, steps(recalls=True), conversation={"id": "c"})
        with pytest.raises(openai.BadRequestError) as raised:
            create(client, "a", previous_response_id=last.id)
        assert "conversation" in raised.value.message
    assert answers == ["nothing", "0", "1", "2"]
    assert last.output_text == "3"
    assert last.conversation.id == "c"
    assert [note["what"] for note in notes(log)] == ["started", "finished"] * 4, "one at a time"


def test_single_messages_share_no_session(service: Deployment) -> None:
    with service.client() as client:
        response = create(client, "Hello")
    assert service.job_field(response.id, "session") == ""


def test_items_of_earlier_responses_can_be_referred_to(service: Deployment) -> None:
    with service.client() as client:
        first = create(client, steps(**ALL))
        references = [{"type": "item_reference", "id": item.id} for item in first.output]
        second = create(
            client,
            [
                {"role": "user", "content": "one"},
                *references,
                {"type": "function_call_output", "call_id": "call_a", "output": "rain"},
                {"role": "user", "content": "two"},
            ],
        )
        seen = messages_seen(service, second.id)
        for wrong in ("msg_1", f"msg_{'0' * 32}_0", f"{first.output[0].id}9"):
            with pytest.raises(openai.NotFoundError) as raised:
                create(client, [{"role": "user", "content": "a"}, {"type": "item_reference", "id": wrong}])
            assert raised.value.param == "input[1].id"
    assert [message["role"] for message in seen] == ["user", "assistant", "assistant", "tool", "user"]
    assert seen[2]["content"] == "Hello"


def test_the_output_of_a_response_can_be_sent_back_as_it_is(service: Deployment) -> None:
    with service.client() as client:
        first = create(client, steps(**ALL))
        output = [item.to_dict() for item in first.output]
        answered = {"type": "function_call_output", "call_id": "call_a", "output": "rain"}
        history = [{"role": "user", "content": "one"}, *output, answered, {"role": "user", "content": "two"}]
        assert create(client, history).output_text == "two"


def test_a_history_may_not_outgrow_what_a_request_may_hold(own_service: Start) -> None:
    service = own_service(max_body_bytes=4096)
    with service.client() as client:
        first = create(client, "a" * 1500)
        second = create(client, "b" * 1500, previous_response_id=first.id)
        with pytest.raises(openai.APIStatusError) as raised:
            create(client, "c", previous_response_id=second.id)
        assert (raised.value.status_code, raised.value.param) == (413, "previous_response_id")
        reference = {"type": "item_reference", "id": first.output[0].id}
        with pytest.raises(openai.APIStatusError) as raised:
            create(client, [{"role": "user", "content": "c"}, *[reference] * 3])
        assert (raised.value.status_code, raised.value.param) == (413, "input[3].id")


def test_an_uploaded_file_stays_in_the_history_by_its_id(service: Deployment) -> None:
    def ask(file_id: str, **fields: Any) -> Any:
        parts = [{"type": "input_text", "text": "Look"}, {"type": "input_file", "file_id": file_id}]
        return create(client, [{"role": "user", "content": parts}], **fields)

    with service.client() as client:
        file = client.files.create(file=("a.txt", b"hello"), purpose="user_data")
        first = ask(file.id)
        second = create(client, "Again", previous_response_id=first.id)
        assert messages_seen(service, second.id)[0]["content"][1] == {"type": "file", "file": {"file_id": file.id}}
        client.files.delete(file.id)
        with pytest.raises(openai.NotFoundError) as raised:
            ask(file.id)
        assert (raised.value.code, raised.value.param) == ("file_not_found", "input[0].content[1].file_id")
        with pytest.raises(openai.NotFoundError) as raised:
            create(client, "Again", previous_response_id=second.id)
        assert (raised.value.code, raised.value.param) == ("file_not_found", "previous_response_id")


# -- what is stored ----------------------------------------------------------------------------------------------------


def test_input_items_are_paged_through_in_both_orders(service: Deployment) -> None:
    texts = [f"message {number}" for number in range(5)]
    with service.client() as client:
        first = create(client, "before")
        response = create(client, [{"role": "user", "content": text} for text in texts], previous_response_id=first.id)
        pages: Any = client.responses.input_items
        for order, expected in (("asc", texts), ("desc", texts[::-1])):
            items = list(pages.list(response.id, limit=2, order=order))
            assert [item.content[0].text for item in items] == expected
        newest = pages.list(response.id)
        assert (len(newest.data), newest.has_more, newest.first_id) == (5, False, newest.data[0].id)
        for wrong in ({"limit": 0}, {"limit": 101}, {"limit": "x"}, {"order": "random"}, {"after": "msg_1"}):
            with pytest.raises(openai.BadRequestError) as raised:
                pages.list(response.id, **wrong)
            assert raised.value.param == next(iter(wrong))


def test_a_deleted_response_is_gone(service: Deployment) -> None:
    with service.client() as client:
        response = create(client, "Hello")
        with service.http() as http:
            deleted = http.delete(f"/v1/responses/{response.id}", headers={"content-type": "application/json"})
        assert deleted.json() == {"id": response.id, "object": "response", "deleted": True}
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.delete(response.id)


def test_deleting_a_response_that_runs_cancels_it(service: Deployment, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with service.client() as client:
        response = create(client, steps(then="hang", log=str(log)), background=True)
        wait_until(lambda: noted(log, "started") == 1, timeout=10, description="the agent to start")
        client.responses.delete(response.id)
    assert noted(log, "cancelled") == 1
    assert response.id not in service.job_ids()


def test_a_response_that_is_not_stored_is_nobodys(service: Deployment) -> None:
    with service.client() as client:
        response = create(client, "Hello", store=False)
        assert response.store is False
        for ask in (
            client.responses.retrieve,
            client.responses.cancel,
            client.responses.delete,
            client.responses.input_items.list,
        ):
            with pytest.raises(openai.NotFoundError):
                ask(response.id)


def test_a_response_of_another_tenant_does_not_exist(own_service: Start) -> None:
    service = own_service(ENDMARK_API_KEYS=f"{KEY},acme:sk-acme")
    with service.client() as client, service.client(api_key="sk-acme") as other:
        mine = create(client, "Hello", background=True)
        item_id = wait_until_ended(client, mine.id).output[0].id
        for ask in (
            lambda: other.responses.retrieve(mine.id),
            lambda: list(other.responses.retrieve(mine.id, stream=True)),
            lambda: other.responses.cancel(mine.id),
            lambda: other.responses.delete(mine.id),
            lambda: other.responses.input_items.list(mine.id),
            lambda: create(other, [{"role": "user", "content": "a"}, {"type": "item_reference", "id": item_id}]),
        ):
            with pytest.raises(openai.NotFoundError):
                ask()
        with pytest.raises(openai.BadRequestError) as raised:
            create(other, "a", previous_response_id=mine.id)
        assert raised.value.code == "previous_response_not_found"
        assert client.responses.retrieve(mine.id).status == "completed"


def test_a_chat_completion_is_no_response(service: Deployment) -> None:
    with service.client() as client:
        chat = client.chat.completions.create(
            model="endmark", messages=[{"role": "user", "content": "a"}], extra_body={"session_id": "x"}
        )
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(chat.id)


def test_an_unknown_model_is_not_found(service: Deployment) -> None:
    with service.client() as client, pytest.raises(openai.NotFoundError) as raised:
        client.responses.create(model="gpt-0", input="a")
    assert raised.value.code == "model_not_found"


@pytest.mark.parametrize(
    "fields",
    [{"background": True, "store": False}, {"metadata": {"a": 1}}, {"tools": [{"type": "web_search"}]}],
)
def test_a_wrong_field_is_refused_before_anything_is_queued(service: Deployment, fields: dict[str, Any]) -> None:
    before = len(service.job_ids())
    with service.client() as client, pytest.raises(openai.BadRequestError) as raised:
        create(client, "a", **fields)
    assert raised.value.param is not None
    assert len(service.job_ids()) == before


# -- the end of a replica ----------------------------------------------------------------------------------------------


def test_a_stopped_replica_takes_no_number_with_it(own_service: Start, tmp_path: Path) -> None:
    """Its last frame repeats a number, so that a client which resumes behind it misses nothing."""
    service = own_service(drain_timeout_s=0)
    other_url = service.start_another_api()
    script, gate = gated(tmp_path, say=["whole"])
    body = {"model": "endmark", "input": script, "background": True, "stream": True}
    with service.http() as http, http.stream("POST", "/v1/responses", json=body) as answer:
        chunks = answer.iter_bytes()
        live = next(chunks)
        service.api.process.terminate()
        live += b"".join(chunks)
    frames = live.split(b"\n\n")[:-1]
    first, last = (json.loads(frame.split(b"\ndata: ")[1]) for frame in (frames[0], frames[-1]))
    assert (last["type"], last["error"]["code"]) == ("error", "stream_interrupted")
    gate.touch()
    rest = raw_stream(service, first["response"]["id"], base_url=other_url, after=last["sequence_number"])
    assert numbers_of(rest) == list(range(last["sequence_number"] + 1, numbers_of(rest)[-1] + 1))
    assert b"response.completed" in rest


async def test_many_responses_at_once(service: Deployment) -> None:
    async with service.async_client() as client:

        async def ask(number: int) -> str:
            response = await client.responses.create(model="endmark", input=f"{number}")
            return response.output_text

        assert await asyncio.gather(*(ask(number) for number in range(20))) == [f"{n}" for n in range(20)]
