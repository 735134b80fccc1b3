"""The other agents behind the service: an OpenAI-compatible model, the real nanobot, and any `process_direct`."""

from __future__ import annotations

import base64
import json
import re
import secrets
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion

from tests import media_samples as samples
from tests.deployment import Deployment, deployed

TOKEN = re.compile(r"@(\d+)\.[0-9a-f]+;")


@pytest.fixture(scope="module", params=["openai", "nanobot"])
def model_service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, redis_url: str, upstream_url: str
) -> Iterator[Deployment]:
    """The service in front of that model, through either agent; `auto` chooses it."""
    home = tmp_path_factory.mktemp(request.param)
    settings: dict[str, Any] = {"agent": "auto", "NANOBOT_CONFIG": home / "config.json"}
    if request.param == "nanobot":
        config = {
            "agents": {"defaults": {"workspace": str(home / "workspace"), "model": "mock", "provider": "custom"}},
            "providers": {"custom": {"apiKey": "none", "apiBase": upstream_url}},
        }
        (home / "config.json").write_text(json.dumps(config))
    else:
        settings |= {"OPENAI_BASE_URL": upstream_url, "OPENAI_API_KEY": "none"}
    folder = tmp_path_factory.mktemp("service")
    with deployed(folder, redis_url, f"test-{secrets.token_hex(4)}", **settings) as deployment:
        deployment.workers[0].wait_for_output(f'"agent":"{request.param}"')
        yield deployment
        deployment.wait_until_idle()
        assert deployment.keys_without_ttl() == []


def ask(content: str) -> list[Any]:
    """A history of its own, so that no turn waits for another."""
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]


def read(service: Deployment, content: str) -> tuple[list[int], str | None, openai.APIError | None]:
    """The numbers of the tokens that came, the finish reason, and what the SDK raised."""
    text, finish_reason = "", None
    with service.client(timeout=60) as client:
        stream = client.chat.completions.create(model="endmark", messages=ask(content), stream=True)
        try:
            for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                finish_reason = chunk.choices[0].finish_reason or finish_reason
        except openai.APIError as error:
            return _numbers(text), finish_reason, error
    return _numbers(text), finish_reason, None


def _numbers(text: str) -> list[int]:
    return [int(number) for number in TOKEN.findall(text)]


def test_an_answer_of_the_model_arrives_whole(model_service: Deployment) -> None:
    assert read(model_service, "[[mock k=50 i=1]]") == (list(range(50)), "stop", None)


def test_usage_is_what_the_model_counted(model_service: Deployment) -> None:
    with model_service.client() as client:
        answer: ChatCompletion = client.chat.completions.create(model="endmark", messages=ask("[[mock k=7 i=1]]"))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1, 7)


@pytest.mark.parametrize("fault", ["close", "eof", "sse", "badjson", "status401"])
def test_a_model_that_fails_in_mid_answer_is_an_error(model_service: Deployment, fault: str) -> None:
    numbers, finish_reason, error = read(model_service, f"[[mock k=20 i=1 fail={fault} at=5]]")
    assert error is not None
    assert error.code == "agent_error"
    assert finish_reason is None
    assert numbers == list(range(len(numbers))), "no token twice, none lost before the failure"
    assert len(numbers) <= 5


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_an_answer_that_was_cut_short_says_so(model_service: Deployment, reason: str) -> None:
    numbers, finish_reason, error = read(model_service, f"[[mock k=20 i=1 fail={reason} at=5]]")
    assert error is None
    assert finish_reason == reason
    assert numbers


def test_a_failure_that_is_not_streamed_is_a_500(model_service: Deployment) -> None:
    with model_service.client(timeout=60) as client, pytest.raises(openai.InternalServerError) as raised:
        client.chat.completions.create(model="endmark", messages=ask("[[mock k=20 i=1 fail=close at=5]]"))
    assert raised.value.code == "agent_error"


def test_the_model_gets_to_see_an_uploaded_picture(model_service: Deployment, upstream_url: str) -> None:
    token = f"token-{secrets.token_hex(8)}"
    with model_service.client(timeout=60) as client:
        picture = client.files.create(file=("a.png", samples.png()), purpose="vision")
        parts = [
            {"type": "text", "text": f"[[mock k=3 i=0]] {token}"},
            {"type": "file", "file": {"file_id": picture.id}},
        ]
        messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
        client.chat.completions.create(model="endmark", messages=messages)
    requests = httpx.get(upstream_url.removesuffix("/v1") + "/requests").json()
    [asked] = [json.dumps(request) for request in requests if token in json.dumps(request)]
    assert base64.b64encode(samples.png()).decode() in asked


# -- process_direct ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def direct_service(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[Deployment]:
    folder, prefix = tmp_path_factory.mktemp("service"), f"test-{secrets.token_hex(4)}"
    with deployed(folder, redis_url, prefix, agent="tests.process_direct_agent:make") as deployment:
        yield deployment


def called_with(service: Deployment, messages: list[Any], **body: Any) -> dict[str, Any]:
    with service.client() as client:
        answer = client.chat.completions.create(model="endmark", messages=messages, extra_body=body)
    return json.loads(answer.choices[0].message.content or "")  # type: ignore[no-any-return]


def test_an_agent_is_called_as_nanobot_calls_it(direct_service: Deployment) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "you"}]}]
    assert called_with(direct_service, messages, session_id="mine") == {
        "content": "Hello you",
        "media": {},
        "paths": None,
        "session_key": "api:mine",
        "channel": "api",
        "chat_id": "default",
        "connected": 1,
    }
    assert called_with(direct_service, messages)["session_key"] == "api:default"


def test_a_segment_end_is_not_the_end_of_the_stream(direct_service: Deployment) -> None:
    with direct_service.client() as client:
        stream = client.chat.completions.create(
            model="endmark", messages=[{"role": "user", "content": "Hello"}], stream=True
        )
        chunks = list(stream)
    assert json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks))["content"] == "Hello"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]


def test_files_reach_the_agent_as_paths(direct_service: Deployment) -> None:
    data = base64.b64encode(b"some notes").decode()
    part = {"type": "file", "file": {"filename": "notes.txt", "file_data": f"data:text/plain;base64,{data}"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "read"}, part]}]
    assert called_with(direct_service, messages)["media"] == {"notes.txt": "some notes"}
    with direct_service.http() as http:
        answer = http.post(
            "/v1/chat/completions",
            data={"message": "read"},
            files=[("files", ("a.txt", b"one", "text/plain")), ("files", ("b.txt", b"two", "text/plain"))],
        ).json()
    called = json.loads(answer["choices"][0]["message"]["content"])
    assert called["media"] == {"a.txt": "one", "b.txt": "two"}


def test_a_history_of_the_client_reaches_an_agent_that_takes_one_message(direct_service: Deployment) -> None:
    messages = [
        {"role": "system", "content": "You are a pirate."},
        {"role": "user", "content": "My name is Ann."},
        {"role": "assistant", "content": "Ahoy Ann."},
        {"role": "user", "content": "What is my name?"},
    ]
    called = called_with(direct_service, messages)
    for text in ("You are a pirate.", "My name is Ann.", "Ahoy Ann.", "What is my name?"):
        assert text in called["content"]
    assert called["session_key"].startswith("api:chatcmpl-")
    assert called_with(direct_service, messages, session_id="s")["content"] == "What is my name?"
