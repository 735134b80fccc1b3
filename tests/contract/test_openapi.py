"""The running service answers what its OpenAPI document says, to requests that are right and to many that are not."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from api.openapi.document import openapi_document
from tests.deployment import Deployment, Start, deployed, script
from tests.endpoints import Endpoint, serving
from tests.openapi import check, closed_document, fresh_document, operations
from tests.waiting import wait_until

ADMIN = "sk-admin"
SECRET = "whsec_" + "A" * 32
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
OPERATIONS = {operation["operationId"]: (method, path) for method, path, operation in operations(openapi_document())}
PAUSES = "pauseQueue"  # the queue goes on behind it before anybody else is asked anything
EXAMPLES = 6  # of each operation, right and wrong ones each


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[Deployment]:
    """The scripted agent, operated by ADMIN; a single message belongs to no session, so that none waits for another."""
    folder, prefix = tmp_path_factory.mktemp("described"), f"test-{secrets.token_hex(4)}"
    with deployed(folder, redis_url, prefix, admin_keys=ADMIN, default_session="", queue_timeout_s=5) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with serving() as endpoint:
        yield endpoint


# -- what is right -----------------------------------------------------------------------------------------------------


class Caller:
    """Calls operations by their names, and checks that each answer is the success that the document describes."""

    def __init__(self, http: httpx.Client) -> None:
        self.called: set[str] = set()
        self._http = http

    def __call__(self, name: str, names: dict[str, str] | None = None, **request: Any) -> Any:
        method, path = OPERATIONS[name]
        operation = closed_document()["paths"][path][method]
        answer = self._http.request(method, path.format(**names or {}), **request)
        (success,) = [status for status in operation["responses"] if status in ("200", "201")]
        assert str(answer.status_code) == success, f"{name}: {answer.text}"
        media_type = answer.headers["content-type"].partition(";")[0]
        content = operation["responses"][success]["content"][media_type]
        self.called.add(name)
        match media_type:
            case "application/json":
                check(answer.json(), content["schema"])
                return answer.json()
            case "text/event-stream":
                events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
                assert events
                for event in events:
                    if event != "[DONE]" and "x-event-schema" in content:
                        check(json.loads(event), content["x-event-schema"])
                return events
            case _:
                return answer.content


def test_every_operation_answers_what_the_document_says(own_service: Start, endpoint: Endpoint) -> None:
    service = own_service(
        workers=2, admin_keys=ADMIN, webhook_url=endpoint.url("/"), webhook_secret=SECRET, webhook_allow_private=True
    )
    much = script(
        say=["Hel", "lo"],
        reasoning=["Hm."],
        tools=["search"],
        tool_calls=[{"index": 0, "id": "call_1", "function": {"name": "weather", "arguments": "{}"}}],
    )
    with service.http(key=ADMIN) as http:
        call = Caller(http)
        assert call("getHealth") == {"status": "ok"}
        assert call("getReady")["workers"] == 2
        model = call("listModels")["data"][0]["id"]
        call("getModel", {"model": model})

        file = {"file_id": call("createFile", data={"purpose": "user_data"}, files={"file": ("a.txt", b"text")})["id"]}
        assert call("listFiles")["data"][0]["id"] == file["file_id"]
        call("getFile", file)
        assert call("getFileContent", file) == b"text"
        call("deleteFile", file)

        chat = {
            "id": call("createChatCompletion", json={"messages": much, "store": True, "metadata": {"k": "v"}})["id"]
        }
        call("createChatCompletion", data={"message": "What is in it?"}, files={"files": ("a.txt", b"text")})
        options = {"include_usage": True, "include_tool_events": True, "include_sequence_numbers": True}
        streamed = call("createChatCompletion", json={"messages": much, "stream": True, "stream_options": options})
        assert streamed[-1] == "[DONE]"
        assert call("listChatCompletions", params={"metadata[k]": "v"})["data"][0]["id"] == chat["id"]
        call("getChatCompletion", chat)
        call("updateChatCompletion", chat, json={"metadata": {"k": "w"}})
        call("listChatCompletionMessages", chat)
        assert call("resumeChatCompletion", chat, params={"starting_after": 2})[-1] == "[DONE]"

        tools = [{"type": "function", "name": "weather"}]
        full = {"input": much, "tools": tools, "instructions": "Be brief.", "text": {"verbosity": "low"}}
        first = call("createResponse", json=full)["id"]
        call("createResponse", json={"input": "And?", "previous_response_id": first, "stream": True})
        response = {"id": call("createResponse", json={"input": "a", "background": True})["id"]}
        service.wait_until_idle()
        call("getResponse", response)
        call("getResponse", {"id": first}, params={"stream": "true"})
        call("cancelResponse", response)
        call("listResponseInputItems", {"id": first})
        call("deleteResponse", response)

        found = call("listJobs", params={"status": "succeeded", "metadata[k]": "w"})["data"]
        assert [job["id"] for job in found] == [chat["id"]]
        assert call("countJobs")["by_status"].keys() == {"succeeded"}
        details = call("getJob", chat)
        assert (details["answer"]["text"], details["answer"]["reasoning"]) == ("Hello", "Hm.")
        call("watchJob", chat)
        wait_until(
            lambda: http.get(f"/v1/jobs/{chat['id']}/webhook").json()["status"] == "delivered",
            timeout=10,
            description="a webhook to be delivered",
        )
        call("getJobWebhook", chat)
        for told in endpoint.at("/"):
            check(json.loads(told.body), "WebhookEvent")
        call("cancelJob", chat)
        again = call("retryJob", chat)
        service.wait_until_idle()
        call("deleteJob", {"id": again["id"]})
        call("cancelJobs", json={"filters": {"status": "queued"}})
        call("retryJobs", json={"filters": {"status": "succeeded"}, "dry_run": True})
        call("deleteChatCompletion", chat)

        assert call("pauseQueue", json={"for_s": 60})["paused"] is not None
        call("getQueue")
        call("resumeQueue")
        call("drainWorker", {"id": call("listWorkers")["data"][0]["id"]})
        call("listAudit")
        service.wait_until_idle()
    assert OPERATIONS.keys() - call.called == set()


def test_a_job_that_failed_is_shown_as_the_document_says(service: Deployment) -> None:
    with service.http(key=ADMIN) as http:
        call = Caller(http)
        failed = http.post("/v1/chat/completions", json={"messages": script(say=["a"], then="raise")})
        assert failed.status_code == 500
        check(failed.json(), "Error")
        (job,) = call("listJobs", params={"code": "agent_error"})["data"]
        assert call("getJob", {"id": job["id"]})["traceback"]
        response = call("createResponse", json={"input": script(then="raise"), "background": True})
        service.wait_until_idle()
        assert call("getResponse", {"id": response["id"]})["status"] == "failed"


def test_the_document_and_its_page_need_no_key_and_nothing_from_elsewhere(service: Deployment) -> None:
    with httpx.Client(base_url=service.base_url) as http:
        document, page = http.get("/openapi.json"), http.get("/docs")
        assert http.get("/v1/models").status_code == 401
    assert document.headers["content-type"] == "application/json"
    assert document.json() == openapi_document()
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"].split("; ")
    assert policy[0] == "default-src 'none'"
    assert [part for part in policy if "unsafe" in part or "http" in part] == []


# -- what may be wrong -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def names(service: Deployment) -> dict[str, list[str]]:
    """For each path with parameters, names of what there is, and of what there is not."""
    with service.http(key=ADMIN) as http:
        ask = {"messages": script(say=["a", "b"], reasoning=["c"]), "store": True}
        chats = [http.post("/v1/chat/completions", json=ask).json()["id"] for _ in range(3)]
        body = {"input": script(say=["a"], tools=["t"]), "background": True}
        answers = [http.post("/v1/responses", json=body).json()["id"] for _ in range(3)]
        upload: Any = {"data": {"purpose": "user_data"}, "files": {"file": ("a.txt", b"text")}}
        files = [http.post("/v1/files", **upload).json()["id"] for _ in range(2)]
    service.wait_until_idle()
    return {
        "/v1/chat/completions": [*chats, "chatcmpl-none"],
        "/v1/responses": [*answers, "resp_none"],
        "/v1/jobs": [*chats, *answers, "none"],
        "/v1/workers": ["none", "-", "ü"],  # the one that there is has work to do
        "/v1/files": [*files, "file-none"],
        "/v1/models": ["endmark", "none"],
    }


def described(name: str, names: dict[str, list[str]]) -> Any:
    """One operation for Schemathesis, with names in its path that lead somewhere."""
    method, path = OPERATIONS[name]
    document = fresh_document()
    operation = document["paths"][path][method]
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "path":
            parameter["schema"] = {"type": "string", "enum": names[path.partition("/{")[0]]}
    for answer in operation["responses"].values():
        if stream := answer.get("content", {}).get("text/event-stream"):
            stream["schema"] = {}  # it would be taken for that of an event; those are checked above
    document["paths"] = {path: {method: operation}}
    return schemathesis.openapi.from_dict(document)[path][method]


@pytest.mark.parametrize("name", sorted(OPERATIONS, key=lambda name: (OPERATIONS[name][0] == "delete", name == PAUSES)))
def test_whatever_is_asked_the_answer_is_one_that_the_document_describes(
    service: Deployment, names: dict[str, list[str]], name: str
) -> None:
    operation = described(name, names)
    key = {"authorization": f"Bearer {ADMIN}"}

    def ask(case: Any) -> None:
        case.call_and_validate(base_url=service.base_url, headers=key, checks=CHECKS, timeout=30)

    try:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query or operation.headers):
                continue  # nothing to get wrong
            cases = operation.as_strategy(generation_mode=mode)
            bounded = settings(
                max_examples=EXAMPLES,
                derandomize=True,
                database=None,
                deadline=None,
                suppress_health_check=[*HealthCheck],
            )
            bounded(given(case=cases)(ask))()
    finally:
        if name == PAUSES:
            with service.http(key=ADMIN) as http:
                assert http.post("/v1/queue/resume").status_code == 200
