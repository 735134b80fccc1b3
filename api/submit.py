"""Puts a job into the queue: its files first, then the job, once, however often Redis has to be asked."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import structlog
from redis.exceptions import ResponseError
from starlette.background import BackgroundTask

from api.attachments import Detached
from api.errors import (
    FilesUnavailableError,
    NotFoundError,
    OtherBodyError,
    PayloadTooLargeError,
    QueueFullError,
    QueueUnreachableError,
)
from api.services import Services
from shared import metrics
from shared.connection import FAILURES, FIRST_RETRY_S, passes
from shared.files import FileStoreFullError
from shared.jobs import Join, Once, Submission
from shared.store import Accepted
from shared.store import OtherBodyError as StoreOtherBodyError
from shared.store import QueueFullError as StoreQueueFullError

log = structlog.get_logger(__name__)

SUBMIT_PATIENCE_S = 3.0  # how long a submission without an answer is repeated


async def check_uploaded(services: Services, tenant: str, detached: Detached) -> None:
    """Raises NotFoundError, naming the parameter, for a file that the tenant does not have, and PayloadTooLargeError.

    A worker holds all files of a turn at once, so together they may be as large as a body that carries them.
    """
    if not detached.uploaded:
        return
    try:
        files = await services.files.find(tenant, [uploaded.file_id for uploaded in detached.uploaded])
    except FAILURES as error:
        if not passes(error):
            raise
        raise FilesUnavailableError from error
    size = sum(len(attachment) for attachment in detached.attachments)
    for uploaded, file in zip(detached.uploaded, files, strict=True):
        if file is None:
            raise NotFoundError(f"No such file: {uploaded.file_id[:50]!r}", code="file_not_found", param=uploaded.param)
        size += file.size
    if size > services.settings.max_body_bytes:
        raise PayloadTooLargeError(
            f"The files of the request are larger than {services.settings.max_body_bytes} bytes together.",
            param="messages",
        )


async def submit(services: Services, job: Submission, attachments: list[bytes]) -> Accepted:
    """Queues a job, or joins that of the same request before it.

    Raises FilesUnavailableError, QueueFullError, QueueUnreachableError or OtherBodyError.
    """
    await _attach(services, job, attachments)
    try:
        accepted = await _submit_once(services, job)
    except QueueUnreachableError:
        metrics.submissions.labels("unreachable").inc()
        raise
    except StoreOtherBodyError as error:
        await _discard(services, job, attachments)
        raise OtherBodyError from error
    except StoreQueueFullError as error:
        await _discard(services, job, attachments)
        metrics.submissions.labels("queue_full").inc()
        message = "The session has too many unfinished turns." if error.of_session else "Too many requests are waiting."
        raise QueueFullError(message) from error
    if accepted.job_id != job.job_id:
        await _discard(services, job, attachments)
        metrics.submissions.labels("joined").inc()
        log.info("job_joined", job=accepted.job_id, tenant=job.tenant)
    else:
        metrics.submissions.labels("accepted").inc()
        log.info("job_accepted", job=job.job_id, tenant=job.tenant, session=job.session or None)
    return accepted


def when_delivered(services: Services, job: Submission, job_id: str) -> BackgroundTask | None:
    """What is to be done once the client has its answer. It holds nothing of the request, which may be megabytes."""
    if job.once is None or job.once.join is Join.ALWAYS:
        return None
    return BackgroundTask(_forget, services, job.tenant, job.once, job_id)


async def _forget(services: Services, tenant: str, once: Once, job_id: str) -> None:
    """What looks like the same request from now on is another one."""
    try:
        await services.store.forget(tenant, once, job_id)
    except FAILURES as error:  # then a retry that never reached us the first time may get this answer
        log.warning("forget_failed", job=job_id, reason=str(error))


async def _discard(services: Services, job: Submission, attachments: list[bytes]) -> None:
    if attachments:
        with suppress(*FAILURES):  # they expire by themselves, only later
            await services.files.discard(job.job_id)


async def _attach(services: Services, job: Submission, attachments: list[bytes]) -> None:
    """Raises FilesUnavailableError."""
    if not attachments:
        return
    try:
        await services.files.attach(job.job_id, attachments)
    except FileStoreFullError as error:
        raise FilesUnavailableError("The files of the request cannot be stored now.") from error
    except FAILURES as error:
        if not passes(error):
            raise
        log.warning("attach_failed", job=job.job_id, reason=str(error))
        raise FilesUnavailableError from error


async def _submit_once(services: Services, job: Submission) -> Accepted:
    """A submission whose answer is lost is sent again under its id, so that it is accepted once.

    Raises QueueUnreachableError if Redis does not tell whether it has it.
    """
    deadline = asyncio.get_running_loop().time() + SUBMIT_PATIENCE_S
    may_have_started = False  # once true, whatever is said to the repetitions
    while True:
        try:
            return await services.store.submit(job)
        except FAILURES as error:
            if not passes(error):
                raise
            never_sent = _was_never_sent(error)
            may_have_started = may_have_started or not never_sent
            if never_sent or asyncio.get_running_loop().time() > deadline:
                log.warning("submit_failed", job=job.job_id, reason=str(error))
                raise QueueUnreachableError(may_have_started=may_have_started) from error
            log.warning("submit_repeated", job=job.job_id, reason=str(error))
            await asyncio.sleep(FIRST_RETRY_S)


def _was_never_sent(error: BaseException) -> bool:
    """Whether Redis cannot have got the command: nobody listened, or it says that it is full or not the primary."""
    return isinstance(error.__context__, ConnectionRefusedError) or isinstance(error, ResponseError)
