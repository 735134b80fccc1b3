"""Finds the job that a request names."""

from __future__ import annotations

from starlette.requests import Request

from api.errors import InvalidRequestError, NotFoundError
from api.services import reached, services_of
from shared import tracing
from shared.jobs import JobKind, JobRecord

_WHAT = {JobKind.CHAT: "chat completion", JobKind.RESPONSE: "response"}
MAX_NUMBER_DIGITS = 18


async def find_job(request: Request, kind: JobKind | None = None, *, job_id: str | None = None) -> JobRecord:
    """The job of `{id}` in the path, if no other id is given. Operators see every tenant's.

    Raises NotFoundError, also for another tenant's, or QueueUnreachableError.
    """
    named: str = request.path_params["id"] if job_id is None else job_id
    record = await reached(lambda: services_of(request).store.record(named))
    is_theirs = record is not None and (request.scope["operator"] or record.tenant == request.scope["tenant"])
    if record is None or not is_theirs or not _is_shown(record, kind):
        what = _WHAT[kind] if kind else "job"
        raise NotFoundError(f"No such {what}: {named[:100]!r}. It may have expired.")
    tracing.link_to(record.trace)
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
