"""What the document says of one method of one route. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from http import HTTPStatus
from typing import Any, Final

from api.errors import JobFailedError
from api.openapi.shapes import STRING, Schema, one_of, ref, said
from api.paging import DEFAULT_LIMIT, MAX_LIMIT
from shared.entries import ErrorMarker
from shared.jobs import ErrorCode

JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
FORM: Final = "multipart/form-data"
BYTES: Final = "application/octet-stream"

Errors = Mapping[int, tuple[str, ...]]  # the codes of an HTTP status; none: the code is null


class Key(Enum):
    """Whose key an operation asks for: the name of a security scheme."""

    NONE = None
    ANY = "key"
    ADMIN = "adminKey"


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """A body in one media type."""

    schema: Schema
    example: Any = None  # None: there is none
    events: str | None = None  # of a stream: the name of the schema of an event's data

    def to_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {"schema": self.schema}
        if self.events is not None:
            content["x-event-schema"] = ref(self.events)
        if self.example is not None:
            content["example"] = self.example
        return content


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one route."""

    method: str
    path: str
    name: str  # operationId
    tag: str
    summary: str
    description: str = ""
    key: Key = Key.ANY
    parameters: tuple[dict[str, Any], ...] = ()
    body: Mapping[str, Content] = field(default_factory=dict)  # by media type
    body_required: bool = True
    status: int = 200  # of success
    answer: Mapping[str, Content] = field(default_factory=dict)  # by media type
    others: Mapping[int, dict[str, Any]] = field(default_factory=dict)  # responses that are neither success nor error
    errors: Errors = field(default_factory=dict)  # beside those of every operation with a key

    def to_json(self) -> dict[str, Any]:
        """The operation object."""
        answer: dict[str, Any] = {"description": HTTPStatus(self.status).phrase}
        if self.answer:
            answer["content"] = _contents(self.answer)
        responses = {self.status: answer, **self.others}
        for status, codes in all_of(self.errors, {} if self.key is Key.NONE else KEYED).items():
            responses[status] = _error(status, codes)
        said_of_it: dict[str, Any] = {"operationId": self.name, "tags": [self.tag], "summary": self.summary}
        if self.description:
            said_of_it["description"] = self.description
        said_of_it["security"] = [] if self.key.value is None else [{self.key.value: []}]
        if self.parameters:
            said_of_it["parameters"] = list(self.parameters)
        if self.body:
            said_of_it["requestBody"] = {"required": self.body_required, "content": _contents(self.body)}
        said_of_it["responses"] = {str(status): responses[status] for status in sorted(responses)}
        return said_of_it


def _contents(contents: Mapping[str, Content]) -> dict[str, Any]:
    return {media_type: content.to_json() for media_type, content in contents.items()}


def _error(status: int, codes: tuple[str, ...]) -> dict[str, Any]:
    known = ", ".join(f"`{code}`" for code in codes)
    description = f"{HTTPStatus(status).phrase}: {known}." if known else f"{HTTPStatus(status).phrase}."
    return {"description": description, "content": {JSON: {"schema": ref("Error")}}}


# -- errors ------------------------------------------------------------------------------------------------------------


def all_of(*several: Errors) -> dict[int, tuple[str, ...]]:
    """Their codes together, each once."""
    together: dict[int, tuple[str, ...]] = {}
    for errors in several:
        for status, codes in errors.items():
            together[status] = tuple(dict.fromkeys((*together.get(status, ()), *codes)))
    return together


def _of_jobs() -> Errors:
    by_status: dict[int, tuple[str, ...]] = {}
    for code in ErrorCode:
        status = JobFailedError(ErrorMarker(code, "")).status
        by_status[status] = (*by_status.get(status, ()), code.value)
    return by_status


KEYED: Final[Errors] = {401: ("invalid_api_key",), 403: ("forbidden",), 500: ()}
REDIS: Final[Errors] = {503: ("queue_unreachable",)}
INVALID: Final[Errors] = {400: ("invalid_request",)}
MISSING: Final[Errors] = {404: ("not_found",)}
FILES: Final[Errors] = {503: ("files_unavailable",)}
BODY: Final[Errors] = {400: ("invalid_request", "invalid_json"), 413: ("payload_too_large",)}
MEDIA: Final[Errors] = {
    400: (
        *("invalid_form", "unsupported_file", "empty_file", "invalid_filename"),
        *("invalid_image", "invalid_archive", "decompression_bomb"),
    ),
    413: ("file_too_large",),
}
ENDED_BADLY: Final[Errors] = _of_jobs()  # a job's own error, as an answer
NOT_WHOLE: Final[Errors] = {410: ("stream_expired", "stream_incomplete")}
SUBMITTED: Final[Errors] = all_of(
    BODY,
    MEDIA,
    {400: ("invalid_idempotency_key",), 404: ("model_not_found", "file_not_found"), 422: ("idempotency_key_reused",)},
    {429: ("queue_full",)},
    REDIS,
    FILES,
    ENDED_BADLY,
)


# -- parameters --------------------------------------------------------------------------------------------------------


def path(name: str, description: str, example: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": description,
        "schema": {"type": "string", "minLength": 1},
        "example": example,
    }


def query(name: str, schema: Schema, description: str = "") -> dict[str, Any]:
    parameter = {"name": name, "in": "query", "schema": schema}
    return said(parameter, description) if description else parameter


def header(name: str, schema: Schema, description: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "schema": schema, "description": description}


def limit(most: int = MAX_LIMIT, default: int = DEFAULT_LIMIT) -> dict[str, Any]:
    schema = {"type": "integer", "minimum": 1, "maximum": most, "default": default}
    return query("limit", schema, "How many rows a page may hold.")


def order(default: str) -> dict[str, Any]:
    return query("order", one_of("asc", "desc") | {"default": default}, "By time, the oldest or the newest first.")


def after(what: str) -> dict[str, Any]:
    return query("after", STRING, f"{what} The page begins behind it.")


METADATA: Final = query(
    "metadata", {"type": "object", "additionalProperties": STRING}, "`metadata[key]=value`: those that have this pair."
) | {"style": "deepObject", "explode": True}
STARTING_AFTER: Final = query(
    "starting_after",
    {"type": "integer", "minimum": 0, "maximum": 10**18 - 1},
    "The number of the last event that was seen. The stream goes on behind it.",
)
IDEMPOTENCY_KEY: Final = header(
    "Idempotency-Key",
    {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[\\x20-\\x7e]*$"},
    "Names the request for as long as its job is kept: the same key with the same body gets the same job.",
)
