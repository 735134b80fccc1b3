"""The OpenAPI document is valid, complete, and of one mind with the code that checks requests."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import jsonschema
import openai
import pytest
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR
from starlette.routing import Route

from api.app import create_app
from api.chat_request import parse_chat_request
from api.docs_page.page import docs_page, type_of
from api.openapi.document import openapi_document
from api.openapi.requests import request_schemas
from api.reference import DOCS_PATH, OPENAPI_PATH
from api.response_request import parse_response_request
from shared.settings import Settings
from tests.openapi import check, operations
from tests.processes import ROOT

# Routes that no program is meant to call as an API, each with the reason why the document does without it. A new route
# of the API belongs into api/openapi/completion_routes.py or api/openapi/job_routes.py instead.
NOT_API = {
    OPENAPI_PATH: "the document itself",
    DOCS_PATH: "a page for people",
    "/dashboard": "pages for people",
    "/metrics": "in the format of Prometheus, see docs/observability.md",
}

DOCUMENT = openapi_document()
PARSERS: dict[str, Callable[[object], object]] = {
    "ChatRequest": parse_chat_request,
    "ResponseRequest": parse_response_request,
}


def test_the_document_names_every_route_and_method_of_the_app_and_no_others() -> None:
    served = {
        (method, route.path.replace(":path}", "}"))
        for route in create_app(Settings()).routes
        if isinstance(route, Route) and route.path not in NOT_API
        for method in route.methods or ()
        if method != "HEAD"  # goes with every GET
    }
    described = {(method.upper(), path) for method, path, _ in operations(DOCUMENT)}
    assert served - described == set(), "describe these in api/openapi, or name them in NOT_API with a reason"
    assert described - served == set(), "the app has no such routes"


def test_what_is_no_api_is_served_and_not_described() -> None:
    served = {getattr(route, "path", "") for route in create_app(Settings()).routes}
    assert NOT_API.keys() - served == set()
    assert NOT_API.keys() & DOCUMENT["paths"].keys() == set()
    others = {getattr(route, "path", "") for route in create_app(Settings()).routes if not isinstance(route, Route)}
    assert others - NOT_API.keys() == set(), "name what is mounted in NOT_API, with a reason"


def test_the_document_is_valid_openapi() -> None:
    OPENAPI_31_VALIDATOR.validate(DOCUMENT)
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_reference_leads_somewhere_and_every_schema_is_needed() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    wanted = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(DOCUMENT)))
    assert wanted - schemas.keys() == set()
    assert schemas.keys() - wanted == set()


def test_operations_have_names_of_their_own_and_known_tags() -> None:
    names = [operation["operationId"] for _, _, operation in operations(DOCUMENT)]
    assert sorted(names) == sorted(set(names))
    tags = {tag["name"] for tag in DOCUMENT["tags"]}
    assert [operation["tags"] for _, _, operation in operations(DOCUMENT) if not set(operation["tags"]) <= tags] == []


def test_the_parameters_of_a_path_are_described() -> None:
    for _, path, operation in operations(DOCUMENT):
        described = [given["name"] for given in operation.get("parameters", ()) if given["in"] == "path"]
        assert described == re.findall(r"\{(\w+)\}", path), path


def test_the_examples_are_what_their_schemas_say() -> None:
    seen = 0
    for _, path, operation in operations(DOCUMENT):
        answers = [answer.get("content", {}) for answer in operation["responses"].values()]
        for contents in [operation.get("requestBody", {}).get("content", {}), *answers]:
            for content in contents.values():
                if "example" in content:
                    seen += 1
                    check(content["example"], content["schema"])
        for parameter in operation.get("parameters", ()):
            if parameter["in"] == "path":
                check(parameter["example"], parameter["schema"])
        if "application/json" in operation.get("requestBody", {}).get("content", {}):
            assert "example" in operation["requestBody"]["content"]["application/json"], path
    assert seen > 15


def test_the_codes_of_the_document_are_those_of_the_protocol() -> None:
    protocol = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    codes = {
        code
        for _, _, operation in operations(DOCUMENT)
        for status, answer in operation["responses"].items()
        if int(status) >= 400 and "Error" in json.dumps(answer.get("content"))
        for code in re.findall(r"`(\w+)`", answer["description"])
    }
    assert "queue_full" in codes
    assert [code for code in sorted(codes) if f"`{code}`" not in protocol] == []


def test_what_we_add_to_the_requests_of_openai_is_marked() -> None:
    schemas = request_schemas()
    ours = {
        "ChatRequest": ("session_id", "on_disconnect", "webhook"),
        "StreamOptions": ("include_tool_events", "include_sequence_numbers"),
        "ResponseRequest": ("on_disconnect", "webhook"),
    }
    for name, fields in ours.items():
        described = schemas[name]["properties"]
        assert [field for field in described if described[field].get("description", "").startswith("Ours.")] == [
            *fields
        ]


# -- requests ----------------------------------------------------------------------------------------------------------

TOOL = {"name": "weather", "description": "Of a place.", "parameters": {"type": "object", "properties": {}}}
IMAGE = "data:image/png;base64,iVBORw0KGgo="


@pytest.fixture
def sent() -> Iterator[tuple[openai.OpenAI, list[Any]]]:
    """The SDK, and the bodies that it sends."""
    bodies: list[Any] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        bodies.append(json.loads(request.content))
        return httpx2.Response(200, json={})

    with openai.OpenAI(
        api_key="k", base_url="http://api/v1", http_client=httpx2.Client(transport=httpx2.MockTransport(answer))
    ) as client:
        yield client, bodies


CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hello."}]},
    {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is this?"},
                    {"type": "image_url", "image_url": {"url": IMAGE, "detail": "low"}},
                    {"type": "file", "file": {"file_id": "file-1"}},
                ],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "rain"},
        ],
        "tools": [{"type": "function", "function": TOOL}],
        "tool_choice": "auto",
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "store": True,
        "metadata": {"k": "v"},
        "extra_body": {
            "session_id": "s",
            "on_disconnect": "continue",
            "webhook": {"url": "https://app.example/hooks", "secret": "whsec_" + "A" * 32},
        },
    },
]

RESPONSES: list[dict[str, Any]] = [
    {"input": "Hello."},
    {
        "input": [
            {"role": "user", "content": "Hello."},
            {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "Be brief."}]},
            {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "Hi.", "annotations": [], "logprobs": []}],
            },
            {"id": "rs_1", "type": "reasoning", "summary": []},
            {"id": "fc_1", "type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "rain"},
            {"id": "msg_2"},
            {"type": "item_reference", "id": "msg_3"},
            {"role": "user", "content": [{"type": "input_image", "image_url": IMAGE, "detail": "auto"}]},
        ],
        "tools": [{"type": "function", **TOOL, "strict": True}],
        "tool_choice": {"type": "function", "name": "weather"},
        "text": {"format": {"type": "json_schema", "name": "answer", "schema": {"type": "object"}, "strict": True}},
        "reasoning": {"effort": "low"},
        "previous_response_id": "resp_1",
        "background": True,
        "metadata": {"k": "v"},
        "extra_body": {"on_disconnect": "continue"},
    },
    {"input": "Hello.", "conversation": {"id": "c"}, "stream": True, "tool_choice": "none"},
]


@pytest.mark.parametrize("request_", CHATS)
def test_a_chat_request_of_the_sdk_is_what_the_document_describes(
    sent: tuple[openai.OpenAI, list[Any]], request_: dict[str, Any]
) -> None:
    client, bodies = sent
    client.chat.completions.create(model="endmark", **request_)
    check(bodies[0], "ChatRequest")
    parse_chat_request(bodies[0])


@pytest.mark.parametrize("request_", RESPONSES)
def test_a_response_request_of_the_sdk_is_what_the_document_describes(
    sent: tuple[openai.OpenAI, list[Any]], request_: dict[str, Any]
) -> None:
    client, bodies = sent
    client.responses.create(model="endmark", **request_)
    check(bodies[0], "ResponseRequest")
    parse_response_request(bodies[0])


@pytest.mark.parametrize(
    ("schema", "body"),
    [
        ("ChatRequest", {}),
        ("ChatRequest", {"messages": []}),
        ("ChatRequest", {"messages": [{"role": "nobody", "content": ""}]}),
        ("ChatRequest", {"messages": [{"role": "user", "content": "a"}], "n": 2}),
        ("ChatRequest", {"messages": [{"role": "user", "content": "a"}], "session_id": "s" * 257}),
        ("ChatRequest", {"messages": [{"role": "user", "content": "a"}], "on_disconnect": "wait"}),
        ("ChatRequest", {"messages": [{"role": "user", "content": "a"}], "webhook": {"url": "http://a", "x": 1}}),
        ("ResponseRequest", {}),
        ("ResponseRequest", {"input": []}),
        ("ResponseRequest", {"input": "a", "prompt": {"id": "p"}}),
        ("ResponseRequest", {"input": "a", "tools": [{"type": "web_search"}]}),
        ("ResponseRequest", {"input": [{"type": "web_search_call", "id": "w"}]}),
        ("ResponseRequest", {"input": "a", "top_p": 2}),
    ],
)
def test_what_the_api_refuses_is_not_what_the_document_describes(schema: str, body: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check(body, schema)
    with pytest.raises(Exception, match=r".+"):
        PARSERS[schema](body)


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_shows_every_operation_parameter_code_and_schema() -> None:
    page = html.unescape(docs_page(DOCUMENT).html)
    for method, path, operation in operations(DOCUMENT):
        assert f'<article id="{operation["operationId"]}">\n<h3><code>{method.upper()} {path}</code>' in page
        for parameter in operation.get("parameters", ()):
            assert f"<code>{parameter['name']}</code>" in page
    for name in DOCUMENT["components"]["schemas"]:
        assert f'<article id="{name}">' in page


def test_every_link_of_the_page_leads_somewhere_and_none_leads_away() -> None:
    page = docs_page(DOCUMENT).html
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert sorted(ids) == sorted(set(ids))
    links = set(re.findall(r'href="([^"]*)"', page))
    assert links - {f"#{name}" for name in ids} == {"openapi.json"}
    assert re.findall(r"<script|<link|<img|src=|style=|@import|url\(|\son\w+=", page) == []


def test_the_page_shows_what_looks_like_html_as_text() -> None:
    document = openapi_document()
    evil = "<script>alert(1)</script>"
    document["info"]["description"] = f"{evil} `{evil}`"
    document["components"]["schemas"][evil] = {"const": evil, "description": evil}
    assert evil not in docs_page(document).html
    assert "<b>" not in type_of({"$ref": "#/components/schemas/<b>"})
