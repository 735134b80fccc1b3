"""A job as the inspection API shows it. No I/O.

Instants (`*_at_ms`, `*_ms` of the record) are ms since the epoch on Redis's clock; `timings` are durations in ms.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from shared.entries import Entry, Kind
from shared.jobs import JobRecord, Status
from shared.text import bytes_text, parse_json


def job_object(job: JobRecord) -> dict[str, Any]:
    """What a list shows of a job."""
    return {
        "id": job.job_id,
        "object": "job",
        "kind": job.kind.name.lower(),
        "status": job.status.value,
        "model": job.model,
        "session": job.session or None,
        "tenant": job.tenant,
        "attempt": job.attempt,
        "worker": job.worker or None,
        "accepted_ms": job.accepted_ms,
        "started_ms": job.started_ms,
        "first_token_ms": job.first_token_ms,
        "finished_ms": job.finished_ms,
        "finish_reason": job.finish_reason,
        "usage": job.usage and job.usage._asdict(),
        "error": job.error and job.error._asdict(),
        "metadata": job.metadata,
        "retry_of": job.retry_of or None,
    }


def timings(job: JobRecord) -> dict[str, int | None]:
    """How long what took; None: it has not happened."""
    return {
        "wait_ms": _between(job.accepted_ms, job.started_ms),
        "first_token_ms": _between(job.accepted_ms, job.first_token_ms),
        "run_ms": _between(job.started_ms, job.finished_ms),
        "tool_ms": job.tool_ms,
    }


def _between(start_ms: int | None, end_ms: int | None) -> int | None:
    return None if start_ms is None or end_ms is None else max(0, end_ms - start_ms)


def timeline(job: JobRecord) -> list[dict[str, Any]]:
    """What happened, in order."""
    steps: list[tuple[int | None, str, int | None, str | None]] = [
        (job.accepted_ms, "accepted", None, None),
        (job.promoted_ms, "promoted", None, None),
    ]
    for lost in job.lost:
        steps.append((lost.started_ms, "claimed", lost.attempt, lost.worker))
        steps.append((lost.lost_ms, "lost", lost.attempt, lost.worker))
    if job.started_ms is not None and _is_claimed(job):
        steps.append((job.started_ms, "claimed", job.attempt, job.worker or None))
    steps += [
        (job.first_token_ms, "first_token", job.attempt, None),
        (job.last_token_ms, "last_token", job.attempt, None),
        (job.finished_ms, "ended", None, None),
    ]
    return [
        {"at_ms": at_ms, "what": what, "attempt": attempt, "worker": worker}
        for at_ms, what, attempt, worker in steps
        if at_ms is not None
    ]


def _is_claimed(job: JobRecord) -> bool:
    """Whether `started_ms` is of the last attempt, not of one that was lost before it."""
    return not (job.lost and job.lost[-1].started_ms == job.started_ms)


def attempts(job: JobRecord) -> list[dict[str, Any]]:
    """Every execution of the job, the first one first."""
    shown = [
        {
            "attempt": lost.attempt,
            "worker": lost.worker,
            "started_ms": lost.started_ms,
            "ended_ms": lost.lost_ms,
            "outcome": "worker_lost",
        }
        for lost in job.lost
    ]
    if job.started_ms is not None and _is_claimed(job):
        outcome = job.error.code if job.error else job.status.value
        shown.append(
            {
                "attempt": job.attempt,
                "worker": job.worker,
                "started_ms": job.started_ms,
                "ended_ms": job.finished_ms,
                "outcome": None if job.status is Status.RUNNING else outcome,
            }
        )
    return shown


def answer_object(entries: Iterable[Entry], *, is_cut: bool) -> dict[str, Any]:
    """What the agent said, as far as it has; `is_cut`: there is more than is shown."""
    text: list[bytes] = []
    reasoning: list[bytes] = []
    tool_calls: list[Any] = []
    tools: list[Any] = []
    for entry in entries:
        match entry.kind:
            case Kind.DELTA:
                text.append(entry.payload)
            case Kind.REASONING:
                reasoning.append(entry.payload)
            case Kind.TOOL_CALL:
                tool_calls.append(parse_json(entry.payload))
            case Kind.TOOL:
                tools.append(parse_json(entry.payload))
    return {
        "text": bytes_text(b"".join(text)),
        "reasoning": bytes_text(b"".join(reasoning)),
        "tool_calls": tool_calls,
        "tools": tools,
        "is_cut": is_cut,
    }
