"""What a request for a response builds upon: stored responses of the same tenant.

A response that names the one before it gets that one's messages and answer, so that it holds its whole history itself:
deleting, expiring or going on from an earlier one changes nothing of it (docs/decisions/0016-response-chains.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from api.answer import Answer
from api.chat_request import MAX_ELEMENTS
from api.errors import (
    ApiError,
    GoneError,
    InvalidRequestError,
    NotFoundError,
    PayloadTooLargeError,
    QueueUnreachableError,
)
from api.response_events import ended_response
from api.response_objects import Echo, ResponseHead, is_response_id, job_of_item
from api.response_request import Message, answer_message, without_files
from api.services import reachable, services_of
from api.stored import find_job
from shared.entries import Entry, ErrorMarker, OkMarker
from shared.jobs import ErrorCode, JobKind, JobRecord, Status
from shared.text import json_bytes

MAX_REFERENCED = 200  # responses whose items one request may refer to; each is read from the beginning


async def stored_messages(request: Request, job: JobRecord) -> list[Message]:
    """What the agent of a job is given. Raises NotFoundError if it has just expired."""
    with reachable():
        stored = await services_of(request).store.request(job.job_id)
    if stored is None:
        raise NotFoundError(f"No such response: {job.job_id!r}. It has just expired.")
    messages: list[Message] = stored["messages"]
    return messages


async def stored_answer(request: Request, job: JobRecord) -> tuple[list[Entry], OkMarker | ErrorMarker]:
    """What a job that has ended has said. Raises GoneError or QueueUnreachableError if it cannot be read as a whole."""
    entries, ending = await Answer(services_of(request), job.job_id).to_its_end(request)
    if isinstance(ending, ErrorMarker) and ending != job.error:  # it tells of the reader, not of the job
        if ending.code == ErrorCode.STREAM_UNREACHABLE:
            raise QueueUnreachableError(may_have_started=False)
        raise GoneError(ending.message, code=ending.code)
    return entries, ending


async def stored_response(request: Request, job: JobRecord) -> dict[str, Any]:
    """The response object as it is now. What an unfinished one has said is in its stream only."""
    head = ResponseHead.of_record(job)
    if job.status is Status.QUEUED:
        return head.response("queued")
    if job.status is Status.RUNNING:
        return head.response("in_progress")
    entries, ending = await stored_answer(request, job)
    return ended_response(head, entries, ending)


async def messages_before(request: Request, previous_id: str, *, max_bytes: int) -> list[Message]:
    """The history that a new response has from the one before: its messages, without instructions, and its answer.

    Raises InvalidRequestError or PayloadTooLargeError, naming `previous_response_id`.
    """
    try:
        if not is_response_id(previous_id):
            raise NotFoundError("No response has such an id.")
        job = await find_job(request, JobKind.RESPONSE, job_id=previous_id)
        if job.status is not Status.SUCCEEDED:
            state = {Status.QUEUED: "queued", Status.RUNNING: "in_progress"}.get(job.status, job.status.value)
            raise InvalidRequestError(
                f"Previous response with id {previous_id!r} is not completed: it is {state}.",
                code="previous_response_not_completed",
                param="previous_response_id",
            )
        if job.session:
            raise InvalidRequestError(
                f"Previous response with id {previous_id!r} is a turn of a conversation, which holds its history: "
                "name the `conversation` instead.",
                param="previous_response_id",
            )
        messages = await stored_messages(request, job)
        entries, ending = await stored_answer(request, job)
    except (NotFoundError, GoneError) as error:
        raise InvalidRequestError(
            f"Previous response with id {previous_id[:100]!r} not found.",
            code="previous_response_not_found",
            param="previous_response_id",
        ) from error
    output = ended_response(ResponseHead.of_record(job), entries, ending)["output"]
    kept = messages[1:] if Echo(**job.echo).has_instructions else messages
    history = [*without_files(kept), answer_message(output)]
    _check_size(history, max_bytes=max_bytes)
    return history


async def referenced_items(
    request: Request, references: Mapping[int, str], *, max_bytes: int
) -> dict[str, dict[str, Any]]:
    """The output items with these ids; the keys are their places in the input.

    Raises NotFoundError, InvalidRequestError or PayloadTooLargeError, naming a place.
    """
    items: dict[str, dict[str, Any]] = {}
    read: set[str] = set()
    wanted, sizes, size = set(references.values()), dict[str, int](), 0
    for place, item_id in references.items():
        job_id = job_of_item(item_id)
        if job_id is not None and job_id not in read:
            read.add(job_id)
            if len(read) > MAX_REFERENCED:
                raise InvalidRequestError(
                    f"The input refers to items of more than {MAX_REFERENCED} responses.", param=f"input[{place}].id"
                )
            found = {id_: item for id_, item in (await _output_items(request, job_id)).items() if id_ in wanted}
            items |= found
            sizes |= {id_: len(json_bytes(item)) for id_, item in found.items()}
        size += sizes.get(item_id, 0)  # each time: the agent gets as many copies
        if size > max_bytes:
            raise PayloadTooLargeError(
                f"The items that the input refers to are larger than {max_bytes} bytes.", param=f"input[{place}].id"
            )
        if item_id not in items:
            raise _no_item(item_id, place)
    return items


async def _output_items(request: Request, job_id: str) -> dict[str, dict[str, Any]]:
    """None of a response that is gone, or has not ended."""
    try:
        job = await find_job(request, JobKind.RESPONSE, job_id=job_id)
        response = await stored_response(request, job)
    except (NotFoundError, GoneError):
        return {}
    return {item["id"]: item for item in response["output"]}


def _no_item(item_id: str, place: int) -> ApiError:
    return NotFoundError(
        f"Item with id {item_id[:100]!r} not found. It is in no stored response that has ended.",
        code="item_not_found",
        param=f"input[{place}].id",
    )


def _check_size(history: list[Message], *, max_bytes: int) -> None:
    """A history grows with each response. Raises PayloadTooLargeError or InvalidRequestError."""
    param = "previous_response_id"
    contents = (message.get("content") for message in history)
    if len(history) + sum(len(content) for content in contents if isinstance(content, list)) > MAX_ELEMENTS:
        raise InvalidRequestError(
            f"The history of the response holds more than {MAX_ELEMENTS} messages and parts.", param=param
        )
    if len(json_bytes(history)) > max_bytes:
        raise PayloadTooLargeError(f"The history of the response is larger than {max_bytes} bytes.", param=param)
