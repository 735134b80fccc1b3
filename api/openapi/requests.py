"""The schemas of what clients send: those of the models that check it, and what the models cannot say. No I/O."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel

from api.body import MAX_FORM_FILES
from api.chat_request import ChatRequest, CompletionUpdate
from api.files import MAX_EXPIRES_AFTER_S, PURPOSES
from api.jobs import Bulk
from api.openapi.shapes import STRING, Schema, array, const, nullable, obj, one_of, said
from api.operations import Pause
from api.response_request import ResponseRequest

MODELS: Final[tuple[type[BaseModel], ...]] = (ChatRequest, CompletionUpdate, ResponseRequest, Bulk, Pause)
# Under other names than the code has for them: what there is a "pause" of, a reader of the document cannot see.
_NAMES: Final = {"Bulk": "BulkRequest", "Chosen": "JobFilters", "Pause": "PauseRequest"}

_METADATA: Final = "Up to 16 pairs; they come back with the answer, and jobs are found by them."
_ON_DISCONNECT: Final = (
    "Ours. What becomes of the job if its client goes away before the end: `cancel`, or `continue` to let it run."
)
_WEBHOOK: Final = "Ours. Where the end of the job is told, instead of to the deployment's own endpoint."
_MODEL: Final = "The model id of the deployment, see `GET /v1/models`; may be left out."

DESCRIPTIONS: Final[dict[str, dict[str, str]]] = {
    "ChatRequest": {
        "": "OpenAI's chat completion request. Fields that are not listed are passed on to the agent, which heeds "
        "those that it knows.",
        "messages": "The conversation. At least one message is the user's.",
        "model": _MODEL,
        "stream": "Whether the answer comes as server-sent events.",
        "session_id": "Ours. The session of this turn: its turns run one at a time, in order, and it owns the history. "
        "Without it, a list of several messages is its own history, and a single message belongs to the deployment's "
        "default session, if it has one.",
        "on_disconnect": _ON_DISCONNECT,
        "metadata": _METADATA,
        "store": "Whether the completion can be listed and fetched afterwards.",
        "n": "One choice; more are refused.",
        "webhook": _WEBHOOK,
    },
    "StreamOptions": {
        "include_usage": "Whether the chunk before `[DONE]` has the usage.",
        "include_tool_events": "Ours. Shows what the agent's own tools do, as `tool_event` of otherwise empty chunks.",
        "include_sequence_numbers": "Ours. Gives every chunk a `sequence_number`, behind which the stream can be "
        "resumed.",
    },
    "WebhookRequest": {
        "": "An endpoint of the client's own. A field that is not listed is refused.",
        "url": "An http or https URL, of a public address unless the deployment allows others.",
        "secret": "`whsec_` and the base64 of 24 to 64 bytes. Without it the deployment's secret signs.",
    },
    "CompletionUpdate": {"metadata": "Takes the place of all metadata; null removes it."},
    "ResponseRequest": {
        "": "OpenAI's response request. Fields that are not listed are passed on to the agent, which heeds those that "
        "it knows.",
        "input": "A text, or items. Somebody must ask: the input or what it builds upon has a message of the user.",
        "model": _MODEL,
        "instructions": "A system message of this turn alone.",
        "previous_response_id": "A completed response to go on from; not together with `conversation`.",
        "conversation": "The session of this turn, which owns its history.",
        "background": "Answers at once with the status `queued`; needs `store`.",
        "store": "Whether the response can be fetched afterwards; it can by default.",
        "on_disconnect": _ON_DISCONNECT,
        "webhook": _WEBHOOK,
        "metadata": _METADATA,
        "prompt": "Prompt templates are refused.",
    },
    "ItemReference": {"": "An output item of an earlier response.", "id": "The id of that item."},
    "InputFile": {"file_url": "Files elsewhere are refused."},
    "IgnoredItem": {"": "What an agent has thought and done; it changes nothing."},
    "BulkRequest": {
        "": "Which jobs, and whether to act on them. A field that is not listed is refused.",
        "filters": "All of them have to match.",
        "dry_run": "Only tells which jobs it would be.",
        "limit": "How many jobs at most.",
    },
    "JobFilters": {
        "": "The jobs that are meant.",
        "code": "The error code with which a job has ended.",
        "since": "Accepted at or after this instant, in milliseconds since the epoch.",
        "until": "Accepted before this instant, in milliseconds since the epoch.",
    },
    "PauseRequest": {
        "": "For how long; a field that is not listed is refused.",
        "for_s": "Seconds after which the queue goes on by itself.",
    },
}

# The type of an item, which its model does not read: it is told by what the item holds if it does not say.
_MESSAGE_TYPE: Final = nullable(const("message"))
_TYPES: Final[dict[str, Schema]] = {
    "UserItem": _MESSAGE_TYPE,
    "SystemItem": _MESSAGE_TYPE,
    "AssistantItem": _MESSAGE_TYPE,
    "ItemReference": nullable(const("item_reference")),
}

_FILE: Final[Schema] = {"type": "string", "contentMediaType": "application/octet-stream"}
_FORMS: Final[dict[str, Schema]] = {
    "ChatForm": obj(
        {
            "message": said(STRING, "What the user asks; without it, the files are to be analysed."),
            "files": array(_FILE) | {"maxItems": MAX_FORM_FILES},
            "session_id": {"type": "string", "maxLength": 256},
            "model": said(STRING, _MODEL),
            "stream": one_of("true", "false"),
        },
        optional=("message", "files", "session_id", "model", "stream"),
        description="One message with files, as nanobot's server takes it.",
    ),
    "FileForm": obj(
        {
            "file": _FILE,
            "purpose": said(one_of(*PURPOSES), "Kept, and heeded by nobody."),
            "expires_after[anchor]": const("created_at"),
            "expires_after[seconds]": {"type": "integer", "minimum": 1, "maximum": MAX_EXPIRES_AFTER_S},
        },
        optional=("expires_after[anchor]", "expires_after[seconds]"),
        description="A file, and how long it is to be kept: at most as long as the deployment keeps files.",
    ),
}


def request_schemas() -> dict[str, Schema]:
    """Every schema of what clients send, by its name. Raises ValueError if two different ones have the same name."""
    schemas: dict[str, Schema] = {}
    for model in MODELS:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        for name, found in {**schema.pop("$defs", {}), model.__name__: schema}.items():
            named = _NAMES.get(name, name)
            if schemas.setdefault(named, readable := _readable(found)) != readable:
                raise ValueError(f"two request schemas are called {named}")
    for name, kind in _TYPES.items():
        schemas[name]["properties"] = {"type": kind} | schemas[name]["properties"]
    for name, descriptions in DESCRIPTIONS.items():
        for field, text in descriptions.items():
            (schemas[name]["properties"][field] if field else schemas[name])["description"] = text
    return schemas | _FORMS


def _readable(schema: Any) -> Any:
    """Without pydantic's titles and our docstrings, and with what `oneOf` would get wrong put right.

    Unions are told apart by functions that a schema cannot express: an item may fit several branches.
    """
    if isinstance(schema, list):
        return [_readable(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    read: Schema = {}
    for name, value in schema.items():
        if name in ("properties", "$defs"):
            read[name] = {field: _readable(part) for field, part in value.items()}
        elif name == "oneOf" and "discriminator" not in schema:
            read["anyOf"] = _readable(value)
        elif name == "$ref":
            path, _, target = value.rpartition("/")
            read[name] = f"{path}/{_NAMES.get(target, target)}"
        elif name not in ("title", "description") and not (name == "default" and value is None):
            read[name] = _readable(value)
    return read
