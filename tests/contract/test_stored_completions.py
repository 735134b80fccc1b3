"""Stored chat completions as the official SDK asks for them, sync and async, of two tenants."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion

from shared.jobs import Status, new_job_id
from tests.contract.test_refusals import assert_refused
from tests.deployment import KEY, Deployment, deployed, script
from tests.media_samples import png
from tests.waiting import wait_until

ACME = "sk-acme"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[Deployment]:
    """The scripted agent, and keys of two tenants."""
    folder, prefix = tmp_path_factory.mktemp("storing"), f"test-{secrets.token_hex(4)}"
    with deployed(
        folder, redis_url, prefix, api_keys=f"{KEY},acme:{ACME}", default_session="", max_answer_bytes=100_000
    ) as deployment:
        yield deployment


@pytest.fixture
def client(service: Deployment) -> Iterator[openai.OpenAI]:
    with service.client() as client:
        yield client
        for completion in client.chat.completions.list():
            client.chat.completions.delete(completion.id)


@pytest.fixture
def http(service: Deployment) -> Iterator[httpx.Client]:
    with service.http() as http:
        yield http


def stored(client: openai.OpenAI, **options: Any) -> ChatCompletion:
    defaults: dict[str, Any] = {"model": "endmark", "messages": script(say=["a", "b"]), "store": True}
    completion: ChatCompletion = client.chat.completions.create(**(defaults | options))
    return completion


def running_job(service: Deployment) -> str:
    """Its id, or nothing."""
    running = [job_id for job_id in service.job_ids() if service.job_field(job_id, "status") == Status.RUNNING]
    return running[0] if running else ""


def path_of(completion_id: str) -> str:
    return f"/v1/chat/completions/{completion_id}"


# -- retrieve ----------------------------------------------------------------------------------------------------------


def test_a_stored_completion_is_the_one_that_the_client_got(client: openai.OpenAI) -> None:
    call = {"index": 0, "id": "call_1", "function": {"name": "search", "arguments": '{"q":1}'}}
    scripts: list[dict[str, Any]] = [
        {"say": ["a", "b"], "reasoning": ["hm"]},
        {"tool_calls": [call], "finish_reason": "tool_calls"},
        {"say": ["cut"], "finish_reason": "length"},
        {"say": []},
    ]
    for steps in scripts:
        got = stored(client, messages=script(**steps), metadata={"env": "prod"})
        assert client.chat.completions.retrieve(got.id).to_dict() == got.to_dict()


def test_a_streamed_completion_is_stored_too(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(model="endmark", messages=script(say=["a", "b"]), store=True, stream=True)
    )
    whole = client.chat.completions.retrieve(chunks[0].id)
    assert whole.choices[0].message.content == "ab"
    assert whole.created == chunks[0].created
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason


async def test_the_async_sdk_does_the_same(service: Deployment, client: openai.OpenAI) -> None:
    ids = [stored(client).id for _ in range(3)]
    async with service.async_client() as other:
        assert [completion.id async for completion in other.chat.completions.list(limit=2)] == ids
        assert (await other.chat.completions.retrieve(ids[0])).choices[0].message.content == "ab"
        assert (await other.chat.completions.update(ids[0], metadata={"a": "b"})).metadata == {"a": "b"}
        assert [message.role async for message in other.chat.completions.messages.list(ids[0])] == ["user"]
        assert (await other.chat.completions.delete(ids[0])).deleted
        with pytest.raises(openai.NotFoundError):
            await other.chat.completions.retrieve(ids[0])


def test_what_was_not_to_be_stored_does_not_exist(client: openai.OpenAI) -> None:
    for options in ({"store": False}, {"store": None}):
        completion = stored(client, **options)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.retrieve(completion.id)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.delete(completion.id)
        assert list(client.chat.completions.list()) == []
    for unknown in (new_job_id(), "x", "chatcmpl-é"):
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.retrieve(unknown)


def test_another_tenants_completion_does_not_exist(service: Deployment, client: openai.OpenAI) -> None:
    theirs = stored(client, metadata={"env": "prod"})
    with service.client(api_key=ACME) as acme:
        ours = stored(acme, metadata={"env": "prod"})
        completions = acme.chat.completions
        assert [completion.id for completion in completions.list(metadata={"env": "prod"})] == [ours.id]
        for refused in (
            lambda: completions.retrieve(theirs.id),
            lambda: completions.update(theirs.id, metadata={}),
            lambda: completions.delete(theirs.id),
            lambda: completions.messages.list(theirs.id),
            lambda: completions.list(after=theirs.id),
        ):
            with pytest.raises(openai.NotFoundError):
                refused()
        completions.delete(ours.id)
    assert client.chat.completions.retrieve(theirs.id).metadata == {"env": "prod"}


# -- what is not whole -------------------------------------------------------------------------------------------------


def test_a_running_completion_is_no_completion_yet(
    service: Deployment, client: openai.OpenAI, http: httpx.Client, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    stream = client.chat.completions.create(
        model="endmark", messages=script(say=["a"], waits_for=str(gate)), store=True, stream=True
    )
    job_id = wait_until(lambda: running_job(service), timeout=10, description="the job to run")
    for response in (
        http.get(path_of(job_id)),
        http.get(path_of(job_id) + "/messages"),
        http.post(path_of(job_id), json={"metadata": {}}),
        http.delete(path_of(job_id)),
    ):
        assert_refused(response, 409, code="not_finished")
        assert response.headers["x-should-retry"] == "false"
    assert list(client.chat.completions.list()) == []
    gate.touch()
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "a"
    assert client.chat.completions.retrieve(job_id).choices[0].message.content == "a"


@pytest.mark.parametrize(("then", "status", "code"), [("raise", 500, "agent_error"), ("hang", 409, "cancelled")])
def test_a_failed_completion_is_its_error_and_never_an_answer(
    service: Deployment, client: openai.OpenAI, http: httpx.Client, then: str, status: int, code: str
) -> None:
    stream = client.chat.completions.create(
        model="endmark", messages=script(say=["a"], then=then), store=True, stream=True
    )
    job_id = next(stream).id
    if then == "hang":
        stream.close()
    else:
        with pytest.raises(openai.APIError):
            list(stream)
    service.wait_until_idle()
    for response in (
        http.get(path_of(job_id)),
        http.get(path_of(job_id) + "/messages"),
        http.post(path_of(job_id), json={"metadata": {}}),
    ):
        assert_refused(response, status, code=code)
    assert list(client.chat.completions.list()) == []
    assert http.delete(path_of(job_id)).json() == {
        "id": job_id,
        "object": "chat.completion.deleted",
        "deleted": True,
    }
    assert_refused(http.get(path_of(job_id)), 404)


@pytest.mark.parametrize("damage", ["expired", "incomplete"])
def test_what_cannot_be_read_any_more_is_gone_and_not_listed(
    service: Deployment, client: openai.OpenAI, http: httpx.Client, damage: str
) -> None:
    damaged, whole = stored(client), stored(client)
    stream = service.keys.stream(damaged.id)
    if damage == "expired":
        service.redis.delete(stream)
    else:
        service.redis.xdel(stream, "1-1")
    assert_refused(http.get(path_of(damaged.id)), 410, code=f"stream_{damage}")
    assert [completion.id for completion in client.chat.completions.list(limit=1)] == [whole.id]
    client.chat.completions.delete(damaged.id)


# -- list --------------------------------------------------------------------------------------------------------------


def test_a_list_pages_by_itself_in_both_orders(client: openai.OpenAI) -> None:
    ids = [stored(client).id for _ in range(5)]
    for limit in (1, 2, 5, 100):
        assert [completion.id for completion in client.chat.completions.list(limit=limit)] == ids
        newest_first = client.chat.completions.list(limit=limit, order="desc")
        assert [completion.id for completion in newest_first] == ids[::-1]
    assert [completion.id for completion in client.chat.completions.list(after=ids[2])] == ids[3:]


def test_a_page_looks_as_openais(client: openai.OpenAI, http: httpx.Client) -> None:
    empty: dict[str, Any] = {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert http.get("/v1/chat/completions").json() == empty
    ids = [stored(client).id for _ in range(3)]
    page = http.get("/v1/chat/completions", params={"limit": 2}).json()
    assert [row["id"] for row in page.pop("data")] == ids[:2]
    assert page == {"object": "list", "first_id": ids[0], "last_id": ids[1], "has_more": True}
    last = http.get("/v1/chat/completions", params={"limit": 2, "after": ids[1]}).json()
    assert (len(last["data"]), last["has_more"]) == (1, False)


def test_a_list_can_be_emptied_while_it_is_paged(client: openai.OpenAI) -> None:
    ids = [stored(client).id for _ in range(5)]
    for completion in client.chat.completions.list(limit=2):
        client.chat.completions.delete(completion.id)
        ids.remove(completion.id)
    assert ids == []


def test_a_list_can_be_filtered(client: openai.OpenAI) -> None:
    both = stored(client, metadata={"env": "prod", "a key [x]": "é & ="}).id
    one = stored(client, metadata={"env": "prod"}).id
    stored(client, metadata={"env": "test"})
    stored(client)

    def listed(**filters: Any) -> list[str]:
        return [completion.id for completion in client.chat.completions.list(limit=1, **filters)]

    assert listed(metadata={"env": "prod"}) == [both, one]
    assert listed(metadata={"env": "prod", "a key [x]": "é & ="}) == [both]
    assert listed(metadata={"env": "prod", "other": "x"}) == []
    assert listed(model="endmark", metadata={"env": "prod"}) == [both, one]
    assert len(listed(model="endmark")) == 4
    assert listed(model="another") == []


def test_long_answers_make_short_pages_and_none_is_left_out(client: openai.OpenAI) -> None:
    ids = [stored(client, messages=script(say=["x" * 1000], times=60)).id for _ in range(4)]
    page = client.chat.completions.list()
    assert len(page.data) == 2
    assert page.has_more
    assert [completion.id for completion in page] == ids


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        *((f"limit={limit}", 400, "limit") for limit in ("0", "101", "x", "", "-1", "1.5", "٣", "9" * 50)),
        ("order=foo", 400, "order"),
        ("order=", 400, "order"),
        ("after=chatcmpl-unknown", 404, None),
        ("after=", 404, None),
        ("metadata[a]=b&metadata[a]=c", 400, "metadata"),
        ("&".join(f"metadata[{number}]=x" for number in range(17)), 400, "metadata"),
    ],
)
def test_a_bad_query_is_refused(http: httpx.Client, query: str, status: int, param: str | None) -> None:
    assert_refused(http.get(f"/v1/chat/completions?{query}"), status, param=param)


# -- update ------------------------------------------------------------------------------------------------------------


def test_other_metadata_takes_the_place_of_all_that_there_was(client: openai.OpenAI) -> None:
    before = stored(client, metadata={"env": "prod", "team": "a"})
    updated = client.chat.completions.update(before.id, metadata={"env": "test"})
    assert updated.to_dict() == before.to_dict() | {"metadata": {"env": "test"}}
    assert client.chat.completions.retrieve(before.id).to_dict() == updated.to_dict()

    def listed(**metadata: str) -> list[str]:
        return [completion.id for completion in client.chat.completions.list(metadata=metadata)]

    assert listed(env="test") == [before.id]
    assert listed(env="prod") == listed(team="a") == []
    assert client.chat.completions.update(before.id, metadata=None).to_dict()["metadata"] == {}
    assert listed(env="test") == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"{}",
        *(
            json.dumps({"metadata": metadata}).encode()
            for metadata in (
                "x",
                {"a": 1},
                {"a": None},
                {str(number): "x" for number in range(17)},
                {"k" * 65: "x"},
                {"k": "v" * 513},
            )
        ),
    ],
)
def test_bad_metadata_is_refused_and_changes_nothing(client: openai.OpenAI, http: httpx.Client, body: bytes) -> None:
    completion = stored(client, metadata={"env": "prod"})
    assert_refused(http.post(path_of(completion.id), content=body), 400)
    assert client.chat.completions.retrieve(completion.id).metadata == {"env": "prod"}


def test_as_much_metadata_as_openai_allows_is_taken(client: openai.OpenAI) -> None:
    most = {f"{number:064}": "é" * 512 for number in range(16)}
    completion = stored(client)
    assert client.chat.completions.update(completion.id, metadata=most).metadata == most
    assert [row.id for row in client.chat.completions.list(metadata=most)] == [completion.id]


# -- messages ----------------------------------------------------------------------------------------------------------


def test_the_messages_are_what_the_client_sent(client: openai.OpenAI, http: httpx.Client) -> None:
    image = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    messages: list[Any] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello", "name": "ann"},
        {"role": "assistant", "content": "hi"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "look"},
                {"type": "image_url", "image_url": {"url": image}},
            ],
        },
    ]
    completion = stored(client, messages=messages)
    rows = http.get(path_of(completion.id) + "/messages").json()["data"]
    assert rows == [
        {
            "id": f"{completion.id}-0",
            "role": "system",
            "content": "be brief",
            "content_parts": None,
            "name": None,
        },
        {"id": f"{completion.id}-1", "role": "user", "content": "hello", "content_parts": None, "name": "ann"},
        {"id": f"{completion.id}-2", "role": "assistant", "content": "hi", "content_parts": None, "name": None},
        {
            "id": f"{completion.id}-3",
            "role": "user",
            "content": "look",
            "content_parts": [{"type": "text", "text": "look"}],
            "name": None,
        },
    ]
    listing = client.chat.completions.messages
    ids = [row["id"] for row in rows]
    for limit in (1, 3, 4):
        assert [message.id for message in listing.list(completion.id, limit=limit)] == ids
        assert [message.id for message in listing.list(completion.id, limit=limit, order="desc")] == ids[::-1]
    assert [message.id for message in listing.list(completion.id, after=ids[1])] == ids[2:]
    for bad in ("limit=0", "limit=101", "order=foo"):
        assert_refused(http.get(f"{path_of(completion.id)}/messages?{bad}"), 400)
    for unknown in (f"{completion.id}-4", f"{completion.id}-01", "x", "", completion.id):
        assert_refused(http.get(f"{path_of(completion.id)}/messages", params={"after": unknown}), 404)


# -- methods -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/chat/completions", {"GET", "HEAD", "POST"}),
        ("/v1/chat/completions/x", {"GET", "HEAD", "POST", "DELETE"}),
        ("/v1/files", {"GET", "HEAD", "POST"}),
        ("/v1/files/file-1", {"GET", "HEAD", "DELETE"}),
    ],
)
def test_a_method_that_a_path_does_not_take_is_told_those_that_it_does(
    http: httpx.Client, path: str, methods: set[str]
) -> None:
    response = http.put(path)
    assert_refused(response, 405, code="method_not_allowed")
    assert set(response.headers["allow"].split(", ")) == methods
    assert http.head("/v1/chat/completions").status_code == 200
