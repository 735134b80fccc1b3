"""A request for a response: what is accepted, what is refused and why, and the job that it asks for. No I/O.

Rule 1: the fields that we know are checked strictly, those that we do not are passed on to the agent.
Rule 2: an agent sees chat messages and chat parameters, whichever API a request came by.
Rule 3: what is ignored changes nothing of the answer. What an agent could not give is refused: tools of OpenAI's own,
        files by URL, prompt templates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag, ValidationError, field_validator, model_validator

from api.attachments import MediaPart, Place, UploadedFile
from api.chat_request import (
    MAX_ELEMENTS,
    MAX_METADATA_PAIRS,
    OUR_FIELDS,
    FilePart,
    FileRef,
    ImagePart,
    ImageUrl,
    MetadataKey,
    MetadataValue,
    SessionId,
    Strict,
    check_plain,
)
from api.errors import ApiError, InvalidRequestError
from api.response_objects import Echo
from api.webhook_request import WebhookRequest
from shared.jobs import Attachment, JobKind, Once, Submission, WebhookTarget, session_key

Name = Annotated[str, StringConstraints(max_length=512)]
Message = dict[str, Any]  # a chat message

# Branches of unions are named `<like this>`, so that they are told from fields in the place of an error.


def _type_of(value: object) -> str | None:
    """What the client says that it is; a message or a reference needs no type."""
    if not isinstance(value, dict):
        return None
    kind = value.get("type")
    if kind is None:
        kind = "message" if "role" in value else "item_reference" if "id" in value else None
    return f"<{kind}>" if isinstance(kind, str) else None


def _role_of(value: object) -> str | None:
    role = value.get("role") if isinstance(value, dict) else None
    return f"<{role}>" if isinstance(role, str) else None


def _form_of(value: object) -> str:
    return "<text>" if isinstance(value, str) else "<list>"


# -- the parts of a message --------------------------------------------------------------------------------------------


class InputText(Strict):
    type: Literal["input_text"]
    text: str


class OutputText(Strict):
    type: Literal["output_text"]
    text: str


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: str


class InputImage(Strict):
    type: Literal["input_image"]
    image_url: str | None = None
    file_id: str | None = None
    detail: str | None = None

    @model_validator(mode="after")
    def _is_one_image(self) -> InputImage:
        if (self.image_url is None) == (self.file_id is None):
            raise ValueError("needs either `image_url`, a base64 data URL, or `file_id`, the id of an uploaded file")
        return self


class InputFile(Strict):
    type: Literal["input_file"]
    file_data: str | None = None
    file_id: str | None = None
    filename: str | None = None
    file_url: None = None  # we fetch nothing from elsewhere


_Text = Annotated[str, Tag("<text>")]
_TextPart = Annotated[InputText, Tag("<input_text>")]
UserPart = Annotated[
    _TextPart | Annotated[InputImage, Tag("<input_image>")] | Annotated[InputFile, Tag("<input_file>")],
    Discriminator(_type_of),
]
AssistantPart = Annotated[
    _TextPart | Annotated[OutputText, Tag("<output_text>")] | Annotated[RefusalPart, Tag("<refusal>")],
    Discriminator(_type_of),
]
UserContent = Annotated[_Text | Annotated[list[UserPart], Field(min_length=1), Tag("<list>")], Discriminator(_form_of)]
TextContent = Annotated[_Text | Annotated[list[InputText], Tag("<list>")], Discriminator(_form_of)]
AssistantContent = Annotated[_Text | Annotated[list[AssistantPart], Tag("<list>")], Discriminator(_form_of)]


# -- the items of the input --------------------------------------------------------------------------------------------


class UserItem(Strict):
    role: Literal["user"]
    content: UserContent


class SystemItem(Strict):
    role: Literal["system", "developer"]
    content: TextContent


class AssistantItem(Strict):
    role: Literal["assistant"]
    content: AssistantContent


class FunctionCallItem(Strict):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionOutputItem(Strict):
    type: Literal["function_call_output"]
    call_id: str
    output: TextContent


class ItemReference(Strict):
    id: str


class IgnoredItem(Strict):
    """What an agent has thought and done: clients send the whole output back, and the agent needs none of it."""

    type: Literal["reasoning", "mcp_call"]


MessageItem = Annotated[
    Annotated[UserItem, Tag("<user>")]
    | Annotated[SystemItem, Tag("<system>")]
    | Annotated[SystemItem, Tag("<developer>")]
    | Annotated[AssistantItem, Tag("<assistant>")],
    Discriminator(_role_of),
]
Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionOutputItem, Tag("<function_call_output>")]
    | Annotated[ItemReference, Tag("<item_reference>")]
    | Annotated[IgnoredItem, Tag("<reasoning>")]
    | Annotated[IgnoredItem, Tag("<mcp_call>")],
    Discriminator(_type_of),
]
Input = Annotated[_Text | Annotated[list[Item], Field(min_length=1), Tag("<list>")], Discriminator(_form_of)]


# -- what else shapes the answer ---------------------------------------------------------------------------------------


class FunctionTool(Strict):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Strict):
    type: Literal["function"]
    name: str


class AllowedTools(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FunctionChoice]


def _choice_of(value: object) -> str | None:
    return "<text>" if isinstance(value, str) else _type_of(value)


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<text>")]
    | Annotated[FunctionChoice, Tag("<function>")]
    | Annotated[AllowedTools, Tag("<allowed_tools>")],
    Discriminator(_choice_of),
]


class PlainFormat(Strict):
    type: Literal["text", "json_object"]


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


TextFormat = Annotated[
    Annotated[PlainFormat, Tag("<text>")]
    | Annotated[PlainFormat, Tag("<json_object>")]
    | Annotated[SchemaFormat, Tag("<json_schema>")],
    Discriminator(_type_of),
]


class TextOptions(Strict):
    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(Strict):
    effort: str | None = None
    summary: str | None = None


class ConversationRef(Strict):
    id: SessionId


Conversation = Annotated[
    Annotated[SessionId, Tag("<text>")] | Annotated[ConversationRef, Tag("<list>")], Discriminator(_form_of)
]


class ResponseRequest(Strict):
    """The fields of a request that we read. All others are passed to the agent, which heeds those that it knows."""

    input: Input
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: Conversation | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    background: bool | None = None
    store: bool | None = None
    on_disconnect: Literal["cancel", "continue"] = "cancel"  # ours, as for chat completions
    webhook: WebhookRequest | None = None  # ours: where the job's end is told
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=MAX_METADATA_PAIRS)
    include: list[str] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = Field(None, ge=1)
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    service_tier: str | None = None
    user: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    prompt: None = None  # a template that is stored at OpenAI

    @field_validator("conversation")
    @classmethod
    def _conversation_is_plain(cls, value: str | ConversationRef | None) -> str | ConversationRef | None:
        check_plain(value.id if isinstance(value, ConversationRef) else value)
        return value

    @property
    def conversation_id(self) -> str | None:
        return self.conversation.id if isinstance(self.conversation, ConversationRef) else self.conversation

    @property
    def references(self) -> dict[int, str]:
        """The ids of output items of earlier responses, by their places in the input."""
        if isinstance(self.input, str):
            return {}
        return {place: item.id for place, item in enumerate(self.input) if isinstance(item, ItemReference)}

    @property
    def is_stored(self) -> bool:
        return self.store is not False


def parse_response_request(body: object) -> ResponseRequest:
    """Checks a parsed JSON body. Raises InvalidRequestError, naming the parameter."""
    if not isinstance(body, dict):
        raise InvalidRequestError("The request body must be a JSON object.")
    _refuse_excess(body)
    try:
        request = ResponseRequest.model_validate(body)
    except ValidationError as error:
        raise _first_error(error) from None
    if request.previous_response_id is not None and request.conversation is not None:
        raise InvalidRequestError(
            "Give either `previous_response_id` or `conversation`, not both.", param="previous_response_id"
        )
    if request.background and not request.is_stored:
        raise InvalidRequestError("A background response needs `store`: it is found again by its id.", param="store")
    return request


def _refuse_excess(body: Mapping[str, Any]) -> None:
    """Bounds the lists before they are looked at one by one: each element costs time, and its error memory."""
    for name in ("input", "metadata", "include", "tools"):
        value = body.get(name)
        if isinstance(value, (list, dict)) and len(value) > MAX_ELEMENTS:
            raise InvalidRequestError(f"{name} holds more than {MAX_ELEMENTS} elements.", param=name)
    total, items = 0, body.get("input")
    for index, item in enumerate(items if isinstance(items, list) else ()):
        for name in ("content", "output"):
            value = item.get(name) if isinstance(item, dict) else None
            total += len(value) if isinstance(value, list) else 0
            if total > MAX_ELEMENTS:
                param = f"input[{index}].{name}"
                raise InvalidRequestError(f"{param}: the input holds more than {MAX_ELEMENTS} parts.", param=param)


def _first_error(error: ValidationError) -> InvalidRequestError:
    """The first of the errors, in our clients' words: `input[0].content: Input should be …`."""
    first = error.errors(include_url=False, include_context=True, include_input=False)[0]
    param, message = "", first["msg"].removeprefix("Value error, ")
    for step in first["loc"]:
        if step == "[key]":  # it is the key itself that is wrong
            break
        if isinstance(step, int):
            param += f"[{step}]"
        elif not step.startswith("<"):
            param += f".{step}" if param else step
    if first["type"].startswith("union_tag"):
        param += ".role" if first["ctx"]["discriminator"] == "_role_of()" else ".type"
        known = re.findall(r"<(\w+)>", first["ctx"].get("expected_tags", ""))
        message = f"Supported values are {', '.join(map(repr, known))}." if known else "Field required."
    return InvalidRequestError(f"{param}: {message}", param=param)


# -- as a chat agent sees it -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class NewMessages:
    """The input as chat messages, and where in it their files came from."""

    messages: list[Message]
    parts: dict[Place, MediaPart]  # the files, by their places in `messages`
    items: dict[int, int]  # for each message of the user, the place of its item in the input

    def name_input(self, error: ApiError) -> ApiError:
        """The same error in the client's words, which knows of an input only."""
        if error.param is not None:
            param = self._param(error.param)
            error.message, error.param = error.message.replace(error.param, param), param
        return error

    def _param(self, param: str) -> str:
        match = re.match(r"messages\[(\d+)\](\.content\[\d+\])(?:\.file|(\.image_url)\.url)?", param)
        if match:
            return f"input[{self.items[int(match[1])]}]{match[2]}{match[3] or ''}{param[match.end() :]}"
        return "input" if param == "messages" else param


def new_messages(request: ResponseRequest, referenced: Mapping[str, Mapping[str, Any]]) -> NewMessages:
    """`referenced`: the output items that the input refers to, by their ids."""
    new = NewMessages(messages=[], parts={}, items={})
    if isinstance(request.input, str):
        new.messages.append({"role": "user", "content": request.input})
        return new
    for place, item in enumerate(request.input):
        match item:
            case UserItem(content=content):
                new.items[len(new.messages)] = place
                new.messages.append({"role": "user", "content": _asked(content, new)})
            case SystemItem(role=role, content=text):
                new.messages.append({"role": role, "content": _chat_text(text)})
            case AssistantItem(content=said):
                new.messages.append({"role": "assistant", "content": _said(said)})
            case FunctionCallItem(call_id=call_id, name=name, arguments=arguments):
                _add_call(new.messages, call_id, name, arguments)
            case FunctionOutputItem(call_id=call_id, output=output):
                new.messages.append({"role": "tool", "tool_call_id": call_id, "content": _chat_text(output)})
            case ItemReference(id=item_id):
                add_output_item(new.messages, referenced[item_id])
    return new


def _asked(content: str | Sequence[InputText | InputImage | InputFile], new: NewMessages) -> str | list[Message]:
    if isinstance(content, str):
        return content
    return [_chat_part(part, Place(len(new.messages), index), new) for index, part in enumerate(content)]


def _chat_part(part: InputText | InputImage | InputFile, place: Place, new: NewMessages) -> Message:
    media: MediaPart
    if isinstance(part, InputText):
        return {"type": "text", "text": part.text}
    extra: dict[str, Any] = {}
    if isinstance(part, InputFile):
        file = FileRef(filename=part.filename, file_data=part.file_data, file_id=part.file_id)
        media = FilePart(type="file", file=file)
    elif part.image_url is not None:
        media = ImagePart(type="image_url", image_url=ImageUrl(url=part.image_url, detail=part.detail))
    else:  # a worker sees by its bytes that it is an image; `detail` is how the input is told again
        media, extra = FilePart(type="file", file=FileRef(file_id=part.file_id)), {"detail": part.detail or "auto"}
    new.parts[place] = media
    return media.model_dump(exclude_none=True) | extra


def _chat_text(content: str | Sequence[InputText]) -> str | list[Message]:
    return content if isinstance(content, str) else [{"type": "text", "text": part.text} for part in content]


def _said(content: str | Sequence[InputText | OutputText | RefusalPart]) -> str | list[Message]:
    if isinstance(content, str):
        return content
    return [
        {"type": "refusal", "refusal": part.refusal}
        if isinstance(part, RefusalPart)
        else {"type": "text", "text": part.text}
        for part in content
    ]


def _add_call(messages: list[Message], call_id: str, name: str, arguments: str) -> None:
    """Calls belong to the message before them, as models have said them."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    calls = messages[-1].setdefault("tool_calls", [])
    calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})


def add_output_item(messages: list[Message], item: Mapping[str, Any]) -> None:
    """What an agent has to know of an output item of an earlier response."""
    if item["type"] == "message":
        text = "".join(part["text"] for part in item["content"])
        messages.append({"role": "assistant", "content": text})
    elif item["type"] == "function_call":
        _add_call(messages, item["call_id"], item["name"], item["arguments"])


def answer_message(output: Sequence[Mapping[str, Any]]) -> Message:
    """The whole output of an earlier response, as the one message that its agent has said."""
    text = "".join(part["text"] for item in output if item["type"] == "message" for part in item["content"])
    messages: list[Message] = [{"role": "assistant", "content": text or None}]
    for item in output:
        if item["type"] == "function_call":
            _add_call(messages, item["call_id"], item["name"], item["arguments"])
    if not text and "tool_calls" not in messages[0]:
        messages[0]["content"] = ""
    return messages[0]


def without_files(messages: Sequence[Message]) -> list[Message]:
    """Messages of an earlier request: the files that came inside of it have gone with its end."""
    return [
        message | {"content": [_still_there(part) for part in message["content"]]}
        if message["role"] == "user" and isinstance(message["content"], list)
        else message
        for message in messages
    ]


def _still_there(part: Message) -> Message:
    match part:
        case {"type": "image_url", "image_url": {"url": held}} if Attachment.from_json(held):
            return {"type": "text", "text": "[An image of an earlier request, which is no longer stored.]"}
        case {"type": "file", "file": {"file_data": held} as file} if Attachment.from_json(held):
            name = file.get("filename") or "A file"
            return {"type": "text", "text": f"[{name} of an earlier request, which is no longer stored.]"}
    return part


def uploaded_files(messages: Sequence[Message], *, param: str) -> list[UploadedFile]:
    """The uploaded files that messages of earlier requests name."""
    return [
        UploadedFile(part["file"]["file_id"], param)
        for message in messages
        if message["role"] == "user" and isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "file" and part["file"].get("file_id")
    ]


# -- the job -----------------------------------------------------------------------------------------------------------


def submission(
    request: ResponseRequest,
    body: Mapping[str, Any],
    *,
    new: Sequence[Message],
    history: Sequence[Message] = (),
    job_id: str,
    tenant: str,
    model: str,
    request_id: str,
    is_waited_for: bool,
    patience_ms: int | None,
    once: Once | None,
    webhook: WebhookTarget | None,
) -> Submission:
    """The job that a checked request asks for: `new` are the messages of its input, without their files.

    A conversation is a session, which owns its history. Otherwise the messages are the whole of it: `history`, which
    earlier responses hold, and the input. Then there is no session, and nobody waits for another turn.
    Raises InvalidRequestError if nobody asks anything.
    """
    if not any(message["role"] == "user" for message in [*history, *new]):
        raise InvalidRequestError("input: must hold at least one message with the role 'user'", param="input")
    before = [] if request.instructions is None else [{"role": "system", "content": request.instructions}]
    before += history
    conversation = request.conversation_id
    return Submission(
        job_id=job_id,
        kind=JobKind.RESPONSE,
        tenant=tenant,
        session=session_key(tenant, conversation) if conversation else "",
        model=model,
        messages=[*before, *new],
        owns_history=not conversation,
        params=_chat_params(request, body),
        metadata=request.metadata or {},
        user=request.user or "",
        store=request.is_stored,
        background=bool(request.background),
        request_id=request_id,
        is_waited_for=is_waited_for,
        patience_ms=patience_ms,
        once=once,
        webhook=webhook,
        echo=Echo(_echoed(request, body), len(before)).to_json(),
    )


def _chat_params(request: ResponseRequest, body: Mapping[str, Any]) -> dict[str, Any]:
    """What an agent may heed, under the names and in the shapes of Chat Completions."""
    ours = OUR_FIELDS | ResponseRequest.model_fields.keys()
    params = {name: value for name, value in body.items() if name not in ours}
    for name in (
        *("temperature", "top_p", "parallel_tool_calls"),
        *("service_tier", "user", "safety_identifier", "prompt_cache_key"),
    ):
        params[name] = getattr(request, name)
    params["max_completion_tokens"] = request.max_output_tokens
    params["reasoning_effort"] = request.reasoning and request.reasoning.effort
    params["verbosity"] = request.text and request.text.verbosity
    params["response_format"] = request.text and _response_format(request.text.format)
    if request.tools:
        params["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in request.tools
        ]
        params["tool_choice"] = _chat_choice(request.tool_choice)
    return {name: value for name, value in params.items() if value is not None}


def _response_format(text_format: PlainFormat | SchemaFormat | None) -> dict[str, Any] | None:
    if isinstance(text_format, SchemaFormat):
        schema = text_format.model_dump(exclude={"type"}, exclude_none=True, by_alias=True)
        return {"type": "json_schema", "json_schema": schema}
    return {"type": "json_object"} if text_format and text_format.type == "json_object" else None


def _chat_choice(choice: str | FunctionChoice | AllowedTools | None) -> str | dict[str, Any] | None:
    match choice:
        case FunctionChoice(name=name):
            return {"type": "function", "function": {"name": name}}
        case AllowedTools(mode=mode, tools=tools):
            allowed = [_chat_choice(tool) for tool in tools]
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": allowed}}
        case _:
            return choice


def _echoed(request: ResponseRequest, body: Mapping[str, Any]) -> dict[str, Any]:
    """What the response object repeats: as it came, or OpenAI's default."""

    def as_it_came(name: str, default: object) -> Any:
        return default if body.get(name) is None else body[name]

    conversation = request.conversation_id
    return {
        "instructions": request.instructions,
        "previous_response_id": request.previous_response_id,
        "conversation": {"id": conversation} if conversation else None,
        "parallel_tool_calls": as_it_came("parallel_tool_calls", True),
        "tool_choice": as_it_came("tool_choice", "auto"),
        "tools": as_it_came("tools", []),
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "reasoning": {"effort": None, "summary": None} | as_it_came("reasoning", {}),
        "temperature": as_it_came("temperature", 1.0),
        "top_p": as_it_came("top_p", 1.0),
        "text": {"format": {"type": "text"}} | as_it_came("text", {}),
        "truncation": request.truncation or "disabled",
        "prompt_cache_key": request.prompt_cache_key,
        "safety_identifier": request.safety_identifier,
        "top_logprobs": request.top_logprobs or 0,
        "user": request.user,
    }
