"""Finds the job that a request names."""

from __future__ import annotations

from starlette.requests import Request

from api.errors import InvalidRequestError, NotFoundError, QueueUnreachableError
from api.services import services_of
from shared.connection import FAILURES, passes
from shared.jobs import JobKind, JobRecord

_WHAT = {JobKind.CHAT: "chat completion", JobKind.RESPONSE: "response"}
MAX_NUMBER_DIGITS = 18


async def find_job(request: Request, kind: JobKind | None = None) -> JobRecord:
    """The job of `{id}` in the path. Raises NotFoundError, also for another tenant's, or QueueUnreachableError."""
    return await find_job_by_id(request, request.path_params["id"], kind)


async def find_job_by_id(request: Request, job_id: str, kind: JobKind | None = None) -> JobRecord:
    """The same for a job that is named elsewhere in the request."""
    try:
        record = await services_of(request).store.record(job_id)
    except FAILURES as error:
        if not passes(error):
            raise
        raise QueueUnreachableError(may_have_started=False) from error
    if record is None or record.tenant != request.scope["tenant"] or not _is_shown(record, kind):
        what = _WHAT[kind] if kind else "job"
        raise NotFoundError(f"No such {what}: {job_id[:100]!r}. It may have expired.")
    return record


def _is_shown(record: JobRecord, kind: JobKind | None) -> bool:
    """A response that was not to be stored is nobody's but of the request that asked for it."""
    return kind is None or (kind is record.kind and (record.store or kind is not JobKind.RESPONSE))


def starting_after(request: Request, *, default: int = 0) -> int:
    """The number of the last frame that the client has seen. Raises InvalidRequestError.

    `default`: one less than the number of the first.
    """
    given = request.query_params.get("starting_after")
    if given is None:
        return default
    if not (given.isascii() and given.isdigit() and len(given) <= MAX_NUMBER_DIGITS):
        raise InvalidRequestError("starting_after must be a whole number from 0.", param="starting_after")
    return int(given)
