"""A chat completion request: what is accepted, what is refused and why. No I/O.

The fields that we know are checked strictly. Messages and all other fields are passed on as they came, so that an agent
may heed what we do not know. The files in the messages are the matter of api/attachments.py.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    field_validator,
)

from api.errors import InvalidRequestError
from api.webhook_request import WebhookRequest
from shared.jobs import Once, Submission, WebhookTarget, session_key
from shared.settings import DEFAULT_TENANT

MAX_ELEMENTS = 10_000  # messages, and parts and tool calls of all messages together
MAX_METADATA_PAIRS = 16
MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
SessionId = Annotated[str, StringConstraints(max_length=256)]
_CONTROL_OR_SURROGATE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class Strict(BaseModel):
    """What we read of a client's JSON: nothing is converted, and what we do not know does not matter."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: str


class ImageUrl(Strict):
    url: str
    detail: str | None = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class Audio(Strict):
    data: str
    format: str


class AudioPart(Strict):
    type: Literal["input_audio"]
    input_audio: Audio


class FileRef(Strict):
    filename: str | None = None
    file_data: str | None = None
    file_id: str | None = None


class FilePart(Strict):
    type: Literal["file"]
    file: FileRef


def check_plain(name: str | None) -> str | None:
    """A name that a client makes up becomes a part of a key. Raises ValueError."""
    if name is not None and _CONTROL_OR_SURROGATE.search(name):
        raise ValueError("must not hold control characters")
    return name


def _content_tag(content: object) -> str:
    return "text" if isinstance(content, str) else "parts"


UserPart = Annotated[TextPart | ImagePart | AudioPart | FilePart, Discriminator("type")]
AssistantPart = Annotated[TextPart | RefusalPart, Discriminator("type")]
UserContent = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[UserPart], Field(min_length=1), Tag("parts")],
    Discriminator(_content_tag),
]
TextContent = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextPart], Tag("parts")], Discriminator(_content_tag)
]
AssistantContent = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[AssistantPart], Tag("parts")], Discriminator(_content_tag)
]


class SystemMessage(Strict):
    role: Literal["system"]
    content: TextContent


class DeveloperMessage(Strict):
    role: Literal["developer"]
    content: TextContent


class UserMessage(Strict):
    role: Literal["user"]
    content: UserContent


class FunctionCall(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: AssistantContent | None = None
    tool_calls: list[ToolCall] | None = None


class ToolMessage(Strict):
    role: Literal["tool"]
    content: TextContent
    tool_call_id: str


Message = Annotated[
    SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage, Discriminator("role")
]


class StreamOptions(Strict):
    include_usage: bool = False
    include_tool_events: bool = False  # ours: what the agent's own tools do, as `tool_event` of otherwise empty chunks
    include_sequence_numbers: bool = False  # ours: `sequence_number` on every chunk, to resume the stream behind it


class ChatRequest(Strict):
    """The fields of a request that we read. All others are passed to the agent, which heeds those that it knows."""

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    session_id: SessionId | None = None
    on_disconnect: Literal["cancel", "continue"] = "cancel"
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=MAX_METADATA_PAIRS)
    store: bool | None = None
    user: str | None = Field(None, max_length=512)
    n: Literal[1] | None = None
    webhook: WebhookRequest | None = None  # ours: where the job's end is told

    @field_validator("session_id")
    @classmethod
    def _session_id_is_plain(cls, value: str | None) -> str | None:
        return check_plain(value)

    @field_validator("messages")
    @classmethod
    def _somebody_asks(cls, messages: list[Message]) -> list[Message]:
        if not any(message.role == "user" for message in messages):
            raise ValueError("must hold at least one message with the role 'user'")
        return messages


OUR_FIELDS = frozenset(ChatRequest.model_fields) - {"user"}  # what concerns the delivery, not the answer


def parse_chat_request(body: object) -> ChatRequest:
    """Checks a parsed JSON body. Raises InvalidRequestError, naming the parameter."""
    if not isinstance(body, dict):
        raise InvalidRequestError("The request body must be a JSON object.")
    _refuse_excess(body)
    try:
        return ChatRequest.model_validate(body)
    except ValidationError as error:
        raise _first_error(error) from None


def _refuse_excess(body: dict[str, Any]) -> None:
    """Bounds the lists before they are looked at one by one: each element costs time, and its error memory."""
    messages = body.get("messages")
    total = 0
    for name, value in (("messages", messages), ("metadata", body.get("metadata"))):
        if isinstance(value, (list, dict)) and len(value) > MAX_ELEMENTS:
            raise InvalidRequestError(f"{name} holds more than {MAX_ELEMENTS} elements.", param=name)
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        for name in ("content", "tool_calls"):
            value = message.get(name) if isinstance(message, dict) else None
            total += len(value) if isinstance(value, list) else 0
            if total > MAX_ELEMENTS:
                param = f"messages[{index}].{name}"
                raise InvalidRequestError(f"{param}: the messages hold more than {MAX_ELEMENTS} parts.", param=param)


class CompletionUpdate(Strict):
    """What may be changed of a stored completion: its metadata, as a whole."""

    metadata: dict[MetadataKey, MetadataValue] | None = Field(max_length=MAX_METADATA_PAIRS)


def parse_completion_update(body: object) -> dict[str, str]:
    """The new metadata; null removes it. Raises InvalidRequestError, naming the parameter."""
    if not isinstance(body, dict):
        raise InvalidRequestError("The request body must be a JSON object.")
    _refuse_excess(body)
    try:
        return CompletionUpdate.model_validate(body).metadata or {}
    except ValidationError as error:
        raise _first_error(error) from None


def submission(
    request: ChatRequest,
    body: dict[str, Any],
    *,
    job_id: str,
    model: str,
    default_session: str,
    request_id: str,
    tenant: str = DEFAULT_TENANT,
    is_waited_for: bool = False,
    patience_ms: int | None = None,
    once: Once | None = None,
    webhook: WebhookTarget | None = None,
) -> Submission:
    """The job that a checked request asks for.

    One user message without `session_id` belongs to the default session, as with nanobot. A longer list without
    `session_id` is a history that the client owns: the turn belongs to no session. With `session_id`, the session owns
    the history, and the last user message is the turn.
    """
    alone = len(request.messages) == 1
    session_id = request.session_id or (default_session if alone else "")
    return Submission(
        job_id=job_id,
        tenant=tenant,
        session=session_key(tenant, session_id) if session_id else "",
        model=model,
        messages=body["messages"],
        owns_history=not session_id,
        params={name: value for name, value in body.items() if name not in OUR_FIELDS and value is not None},
        metadata=request.metadata or {},
        user=request.user or "",
        store=bool(request.store),
        request_id=request_id,
        is_waited_for=is_waited_for,
        patience_ms=patience_ms,
        once=once,
        webhook=webhook,
    )


def _first_error(error: ValidationError) -> InvalidRequestError:
    """The first of the errors, in our clients' words: `messages[0].content: Input should be …`."""
    first = error.errors(include_url=False, include_context=True, include_input=False)[0]
    param = _path(first["loc"])
    if first["type"].startswith("union_tag"):
        param = f"{param}.{first['ctx']['discriminator'].strip(chr(39))}"
    message = first["msg"].removeprefix("Value error, ")
    return InvalidRequestError(f"{param}: {message}", param=param)


def _path(location: tuple[int | str, ...]) -> str:
    """Where the error is: `messages[0].content`.

    pydantic puts in the name of the branch that it took: behind the index of a message or of a part of its content,
    and behind `content`, which may be text or parts.
    """
    path, name = "", ""  # `name` is the field that we are in
    previous: int | str | None = None
    for position, step in enumerate(location):
        is_last = position == len(location) - 1
        if isinstance(step, int):
            path += f"[{step}]"
        elif step == "[key]":  # it is the key itself that is wrong
            break
        elif (isinstance(previous, int) and name in ("messages", "content") and not is_last) or previous == "content":
            previous = None
            continue
        else:
            name = step
            path += f".{step}" if path else step
        previous = step
    return path
