"""The routes that follow OpenAI's APIs: chat completions, responses, files and models. No I/O."""

from __future__ import annotations

from typing import Any, Final

from api.openapi.operation import (
    BODY,
    BYTES,
    ENDED_BADLY,
    EVENTS,
    FILES,
    FORM,
    IDEMPOTENCY_KEY,
    INVALID,
    JSON,
    MEDIA,
    METADATA,
    MISSING,
    NOT_WHOLE,
    REDIS,
    STARTING_AFTER,
    SUBMITTED,
    Content,
    Operation,
    after,
    all_of,
    limit,
    order,
    path,
    query,
)
from api.openapi.shapes import STRING, one_of, ref
from shared.files import MAX_TENANT_FILES

CHAT, RESPONSES, UPLOADS, MODELS = "Chat completions", "Responses", "Files", "Models"

_DIGITS: Final = "0f8f2e6c1d5b4a39a7c0b1d2e3f40516"
_HEAD: Final[dict[str, Any]] = {"id": f"chatcmpl-{_DIGITS}", "created": 1700000000, "model": "endmark"}
_COMPLETION: Final[dict[str, Any]] = _HEAD | {
    "object": "chat.completion",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello!", "refusal": None, "annotations": []},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    "service_tier": "default",
    "system_fingerprint": None,
    "metadata": {},
}
_CHUNKS: Final = (
    'data: {"id":"chatcmpl-...","object":"chat.completion.chunk","created":1700000000,"model":"endmark",'
    '"system_fingerprint":null,"choices":[{"index":0,"delta":{"role":"assistant","content":"Hello!"},"logprobs":null,'
    '"finish_reason":null}]}\n\n'
    'data: {... "choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}\n\n'
    "data: [DONE]\n\n"
)
_EVENTS: Final = (
    "event: response.output_text.delta\n"
    'data: {"type":"response.output_text.delta","sequence_number":4,"item_id":"msg_..._0","output_index":0,'
    '"content_index":0,"delta":"Hello!","logprobs":[]}\n\n'
)
_MESSAGES: Final = [{"role": "user", "content": "Hello."}]
_METADATA: Final = {"metadata": {"topic": "greetings"}}
_FILE: Final[dict[str, Any]] = {
    "id": f"file-{_DIGITS}",
    "object": "file",
    "bytes": 12,
    "created_at": 1700000000,
    "filename": "hello.txt",
    "purpose": "user_data",
    "status": "processed",
    "expires_at": 1700086400,
}
_COMPLETION_ID: Final = path("id", "The id of a chat completion.", _HEAD["id"])
_RESPONSE_ID: Final = path("id", "The id of a response.", f"resp_{_DIGITS}")
_FILE_ID: Final = path("file_id", "The id of a file.", _FILE["id"])
_CHUNK_STREAM: Final = Content(schema=STRING, events="ChatCompletionChunk", example=_CHUNKS)
_EVENT_STREAM: Final = Content(schema=STRING, events="ResponseEvent", example=_EVENTS)
_STORED: Final = all_of({409: ("not_finished",)}, ENDED_BADLY, NOT_WHOLE, MISSING, REDIS)
_NO_FILE: Final = all_of({404: ("file_not_found",)}, FILES)


def _json(name: str, example: Any = None) -> dict[str, Content]:
    return {JSON: Content(schema=ref(name), example=example)}


_CHAT_OPERATIONS: Final = (
    Operation(
        method="POST",
        path="/v1/chat/completions",
        name="createChatCompletion",
        tag=CHAT,
        summary="Ask the agent",
        description="Everything that can be refused is refused before anything is queued. A stream is 200 at once; an "
        "answer that is not streamed is sent when the job has ended. If the client goes away before, its job is "
        "cancelled, unless `on_disconnect` is `continue`. As a form, one message with files.",
        parameters=(IDEMPOTENCY_KEY,),
        body={
            JSON: Content(schema=ref("ChatRequest"), example={"model": "endmark", "messages": _MESSAGES}),
            FORM: Content(schema=ref("ChatForm")),
        },
        answer=_json("ChatCompletion", _COMPLETION) | {EVENTS: _CHUNK_STREAM},
        errors=SUBMITTED,
    ),
    Operation(
        method="GET",
        path="/v1/chat/completions",
        name="listChatCompletions",
        tag=CHAT,
        summary="List stored completions",
        description="Those that were asked for with `store` and have succeeded. A page may be shorter than `limit`; it "
        "is empty only if nothing follows.",
        parameters=(limit(), order("asc"), after("The id of a completion."), query("model", STRING), METADATA),
        answer=_json("ChatCompletionPage"),
        errors=all_of(INVALID, MISSING, REDIS, {503: ("stream_unreachable", "stream_interrupted")}),
    ),
    Operation(
        method="GET",
        path="/v1/chat/completions/{id}",
        name="getChatCompletion",
        tag=CHAT,
        summary="Fetch a stored completion",
        description="The same object that the client got who waited. A completion that has failed is the error with "
        "which it did.",
        parameters=(_COMPLETION_ID,),
        answer=_json("ChatCompletion", _COMPLETION),
        errors=_STORED,
    ),
    Operation(
        method="POST",
        path="/v1/chat/completions/{id}",
        name="updateChatCompletion",
        tag=CHAT,
        summary="Change the metadata of a stored completion",
        parameters=(_COMPLETION_ID,),
        body=_json("CompletionUpdate", _METADATA),
        answer=_json("ChatCompletion", _COMPLETION | _METADATA),
        errors=all_of(BODY, _STORED),
    ),
    Operation(
        method="DELETE",
        path="/v1/chat/completions/{id}",
        name="deleteChatCompletion",
        tag=CHAT,
        summary="Delete a stored completion",
        description="However its job has ended.",
        parameters=(_COMPLETION_ID,),
        answer=_json("ChatCompletionDeleted"),
        errors=all_of({409: ("not_finished",)}, MISSING, REDIS),
    ),
    Operation(
        method="GET",
        path="/v1/chat/completions/{id}/messages",
        name="listChatCompletionMessages",
        tag=CHAT,
        summary="List the messages of a stored completion's request",
        description="Without the files in them: those are not kept.",
        parameters=(_COMPLETION_ID, limit(), order("asc"), after("The id of a message.")),
        answer=_json("StoredMessagePage"),
        errors=all_of(INVALID, {409: ("not_finished",), 410: ("request_expired",)}, ENDED_BADLY, MISSING, REDIS),
    ),
    Operation(
        method="GET",
        path="/v1/chat/completions/{id}/stream",
        name="resumeChatCompletion",
        tag=CHAT,
        summary="Watch a completion's stream, from any number on",
        description="Ours. The chunks from the first, or from behind `starting_after`, and on live; each has its "
        "`sequence_number`. Watching changes nothing: the job does not end with its watchers.",
        parameters=(_COMPLETION_ID, STARTING_AFTER),
        answer={EVENTS: _CHUNK_STREAM},
        errors=all_of(INVALID, MISSING, NOT_WHOLE, REDIS, {503: ("stream_unreachable",)}),
    ),
)

_RESPONSE_OPERATIONS: Final = (
    Operation(
        method="POST",
        path="/v1/responses",
        name="createResponse",
        tag=RESPONSES,
        summary="Ask the agent, in the shape of the Responses API",
        description="A background response is answered at once; neither it nor its stream ends with its clients.",
        parameters=(IDEMPOTENCY_KEY,),
        body=_json("ResponseRequest", {"model": "endmark", "input": "Hello."}),
        answer=_json("Response") | {EVENTS: _EVENT_STREAM},
        errors=all_of(
            SUBMITTED,
            {400: ("previous_response_not_found", "previous_response_not_completed"), 404: ("item_not_found",)},
            MISSING,
            NOT_WHOLE,
        ),
    ),
    Operation(
        method="GET",
        path="/v1/responses/{id}",
        name="getResponse",
        tag=RESPONSES,
        summary="Fetch a response as it is now, or watch it",
        description="With `stream` its events from the first, or from behind `starting_after`, and on live.",
        parameters=(_RESPONSE_ID, query("stream", one_of("true", "false")), STARTING_AFTER),
        answer=_json("Response") | {EVENTS: _EVENT_STREAM},
        errors=all_of(INVALID, MISSING, NOT_WHOLE, REDIS, {503: ("stream_unreachable",)}),
    ),
    Operation(
        method="DELETE",
        path="/v1/responses/{id}",
        name="deleteResponse",
        tag=RESPONSES,
        summary="Delete a response",
        description="One that has not ended is cancelled first; then the answer comes when its worker has let it go.",
        parameters=(_RESPONSE_ID,),
        answer=_json("ResponseDeleted"),
        errors=all_of(MISSING, REDIS),
    ),
    Operation(
        method="POST",
        path="/v1/responses/{id}/cancel",
        name="cancelResponse",
        tag=RESPONSES,
        summary="Cancel a background response",
        description="One that has ended stays as it is.",
        parameters=(_RESPONSE_ID,),
        answer=_json("Response"),
        errors=all_of(INVALID, MISSING, NOT_WHOLE, REDIS),
    ),
    Operation(
        method="GET",
        path="/v1/responses/{id}/input_items",
        name="listResponseInputItems",
        tag=RESPONSES,
        summary="List what a response's request brought",
        description="Without the history behind it.",
        parameters=(_RESPONSE_ID, limit(), order("desc"), after("The id of an item.")),
        answer=_json("ResponseItemPage"),
        errors=all_of(INVALID, MISSING, REDIS),
    ),
)

_FILE_OPERATIONS: Final = (
    Operation(
        method="POST",
        path="/v1/files",
        name="createFile",
        tag=UPLOADS,
        summary="Upload a file, to be named by its id in requests",
        body={FORM: Content(schema=ref("FileForm"))},
        answer=_json("File", _FILE),
        errors=all_of(INVALID, MEDIA, {413: ("payload_too_large", "file_too_large", "file_storage_full")}, FILES),
    ),
    Operation(
        method="GET",
        path="/v1/files",
        name="listFiles",
        tag=UPLOADS,
        summary="List the tenant's files",
        parameters=(
            limit(MAX_TENANT_FILES, MAX_TENANT_FILES),
            order("desc"),
            after("The id of a file."),
            query("purpose", STRING),
        ),
        answer=_json("FilePage"),
        errors=all_of(INVALID, FILES),
    ),
    Operation(
        method="GET",
        path="/v1/files/{file_id}",
        name="getFile",
        tag=UPLOADS,
        summary="Look at a file",
        parameters=(_FILE_ID,),
        answer=_json("File", _FILE),
        errors=_NO_FILE,
    ),
    Operation(
        method="DELETE",
        path="/v1/files/{file_id}",
        name="deleteFile",
        tag=UPLOADS,
        summary="Delete a file",
        parameters=(_FILE_ID,),
        answer=_json("FileDeleted"),
        errors=_NO_FILE,
    ),
    Operation(
        method="GET",
        path="/v1/files/{file_id}/content",
        name="getFileContent",
        tag=UPLOADS,
        summary="Download a file",
        description="Always as a download, never as what it is.",
        parameters=(_FILE_ID,),
        answer={BYTES: Content(schema={})},
        errors=_NO_FILE,
    ),
)

_MODEL_OPERATIONS: Final = (
    Operation(
        method="GET",
        path="/v1/models",
        name="listModels",
        tag=MODELS,
        summary="List the one model",
        answer=_json("ModelList"),
    ),
    Operation(
        method="GET",
        path="/v1/models/{model}",
        name="getModel",
        tag=MODELS,
        summary="Look at the model",
        parameters=(path("model", "The model id; it may hold slashes.", "endmark"),),
        answer=_json("Model"),
        errors={404: ("model_not_found",)},
    ),
)

OPERATIONS: Final = (*_CHAT_OPERATIONS, *_RESPONSE_OPERATIONS, *_FILE_OPERATIONS, *_MODEL_OPERATIONS)
