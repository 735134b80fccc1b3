"""What the latest jobs tell together: how much, how fast, how well. No I/O, no clock.

Durations are ms, instants ms since the epoch on Redis's clock.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shared.jobs import JobRecord, Status

BUCKETS = 30  # equal parts of the time that the jobs span


class Spread(NamedTuple):
    """Percentiles of a duration; None if nothing was measured."""

    p50_ms: float | None
    p95_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """The jobs that were accepted in one part of the time."""

    start_ms: int
    succeeded: int
    failed: int
    cancelled: int
    unfinished: int
    wait: Spread
    first_token: Spread

    @property
    def jobs(self) -> int:
        return self.succeeded + self.failed + self.cancelled + self.unfinished


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLine:
    """What one worker did."""

    worker: str
    jobs: int
    failed: int
    first_token: Spread
    run: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """Everything, over the same jobs."""

    jobs: int
    since_ms: int  # when the oldest of them was accepted
    until_ms: int
    bucket_ms: float
    buckets: list[Bucket]
    wait: Spread
    first_token: Spread
    run: Spread
    failures: list[tuple[str, int]]  # by error code, the most frequent first
    workers: list[WorkerLine]

    @property
    def per_minute(self) -> float:
        return self.jobs * 60_000 / max(1, self.until_ms - self.since_ms)


def overview(jobs: Sequence[JobRecord], now_ms: int) -> Overview | None:
    """None if there are no jobs."""
    if not jobs:
        return None
    since_ms = min(job.accepted_ms for job in jobs)
    until_ms = max(now_ms, *(job.accepted_ms for job in jobs))
    bucket_ms = max(1.0, (until_ms - since_ms + 1) / BUCKETS)
    parts: list[list[JobRecord]] = [[] for _ in range(BUCKETS)]
    for job in jobs:
        parts[min(BUCKETS - 1, int((job.accepted_ms - since_ms) / bucket_ms))].append(job)
    by_worker: dict[str, list[JobRecord]] = {}
    for job in jobs:
        if job.worker:
            by_worker.setdefault(job.worker, []).append(job)
    codes = Counter(job.error.code for job in jobs if job.error)
    return Overview(
        jobs=len(jobs),
        since_ms=since_ms,
        until_ms=until_ms,
        bucket_ms=bucket_ms,
        buckets=[_bucket(round(since_ms + number * bucket_ms), part) for number, part in enumerate(parts)],
        wait=_spread(jobs, wait_ms),
        first_token=_spread(jobs, first_token_ms),
        run=_spread(jobs, run_ms),
        failures=codes.most_common(),
        workers=[_worker(worker, done) for worker, done in sorted(by_worker.items(), key=lambda item: -len(item[1]))],
    )


def wait_ms(job: JobRecord) -> int | None:
    return _between(job.accepted_ms, job.started_ms)


def first_token_ms(job: JobRecord) -> int | None:
    return _between(job.accepted_ms, job.first_token_ms)


def run_ms(job: JobRecord) -> int | None:
    return _between(job.started_ms, job.finished_ms)


def _between(start_ms: int | None, end_ms: int | None) -> int | None:
    return None if start_ms is None or end_ms is None else max(0, end_ms - start_ms)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The nearest rank: a value that was measured, at least as great as so many percent of them."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def _spread(jobs: Sequence[JobRecord], measure: Callable[[JobRecord], int | None]) -> Spread:
    values = [value for job in jobs if (value := measure(job)) is not None]
    return Spread(percentile(values, 50), percentile(values, 95))


def _bucket(start_ms: int, jobs: Sequence[JobRecord]) -> Bucket:
    by_status = Counter(job.status for job in jobs)
    return Bucket(
        start_ms=start_ms,
        succeeded=by_status[Status.SUCCEEDED],
        failed=by_status[Status.FAILED],
        cancelled=by_status[Status.CANCELLED],
        unfinished=by_status[Status.QUEUED] + by_status[Status.RUNNING],
        wait=_spread(jobs, wait_ms),
        first_token=_spread(jobs, first_token_ms),
    )


def _worker(worker: str, jobs: Sequence[JobRecord]) -> WorkerLine:
    return WorkerLine(
        worker=worker,
        jobs=len(jobs),
        failed=sum(job.status is Status.FAILED for job in jobs),
        first_token=_spread(jobs, first_token_ms),
        run=_spread(jobs, run_ms),
    )
