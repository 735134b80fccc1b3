"""What Prometheus is told. Every metric is declared here; docs/observability.md lists them, and a test compares.

Rule 1: no label has a value that a client chooses: what a label may say is a list in this repository.
Rule 2: what happens often is counted once for each flush or each job, never for each token.
Rule 3: an event is counted by the process that knows of it, once; whoever wants the whole adds up the processes.
Rule 4: with `PROMETHEUS_MULTIPROC_DIR` all processes that share that folder answer as one. prometheus-client reads the
        variable when it is imported, so it has to be there when a process starts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from shared.jobs import ErrorCode, Status

if TYPE_CHECKING:  # both count what they do
    from shared.operations import QueueState
    from shared.store import Claim

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody asks for

NO_CODE = "none"  # the `code` of what ended well
CLIENT_GONE = "client_gone"  # the `code` of an answer whose client did not wait for its end
UNMATCHED = "unmatched"  # the `route` of a request that no route takes
OTHER = "other"  # any value that is not on the list
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

REPLAYED_MS = 1000  # an answer that ended longer than this before its client came is a replay

_WAIT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_WORK_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_LAG_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)

# -- the API ---------------------------------------------------------------------------------------------------------

http_requests = Counter(
    "endmark_http_requests_total",
    "HTTP requests by the template of their route and the status of the answer; 499: gone before there was one.",
    ["method", "route", "status"],
)
submissions = Counter(
    "endmark_submissions_total",
    "What became of requests for a job: `accepted`, `joined` (a request that came twice), `queue_full`, `unreachable`.",
    ["result"],
)
open_streams = Gauge(
    "endmark_open_streams",
    "Clients that follow a job now, streamed or not.",
    multiprocess_mode="livesum",
)
answers = Counter(
    "endmark_answers_total",
    "Answers by what their client was told last: `none` for a whole one, an error code, or `client_gone`.",
    ["code"],
)
relay_lag = Histogram(
    "endmark_relay_lag_seconds",
    "From the end of the agent to the moment at which the API has passed everything on and verified it; live answers "
    "only.",
    buckets=_LAG_S,
)
catch_ups = Counter("endmark_catch_ups_total", "Reads of a stream, where pub/sub does not tell, or is not believed.")
gaps = Counter("endmark_pubsub_gaps_total", "Entries that pub/sub had lost, so that the stream was read for them.")

# -- the workers -----------------------------------------------------------------------------------------------------

attempts = Counter("endmark_attempts_total", "Attempts that were begun.")
attempts_lost = Counter(
    "endmark_attempts_lost_total",
    "Attempts that found out by writing that they may write no more: `fenced` (somebody else has gone on, or ended the "
    "job), `expired`, `refused`.",
    ["loss"],
)
wait = Histogram("endmark_job_wait_seconds", "From acceptance to the claim of the first attempt.", buckets=_WAIT_S)
first_token = Histogram(
    "endmark_job_first_token_seconds",
    "From acceptance to the first entry that the agent said, of jobs that their worker ended.",
    buckets=_WORK_S,
)
duration = Histogram(
    "endmark_job_duration_seconds",
    "From acceptance to the end, of jobs that their worker ended.",
    ["status"],
    buckets=_WORK_S,
)
run_time = Histogram(
    "endmark_attempt_duration_seconds",
    "From the claim to the end, of attempts that ended their job.",
    ["status"],
    buckets=_WORK_S,
)
tokens = Counter("endmark_tokens_total", "Tokens of jobs that succeeded, as their agents reported them.", ["direction"])
entries = Counter("endmark_entries_total", "Entries that were sent to streams, without openings and markers.")
said_bytes = Counter("endmark_said_bytes_total", "What these entries held.")
flushes = Counter("endmark_flushes_total", "Round trips of the publishers to Redis.")

# -- both ------------------------------------------------------------------------------------------------------------

jobs_ended = Counter(
    "endmark_jobs_ended_total",
    "Jobs that ended, each counted by the process that ended it; the code is `none` for those that succeeded.",
    ["status", "code"],
)
swept = Counter(
    "endmark_swept_jobs_total",
    "Jobs that a sweep moved on: `retried` on another worker, or ended with that code.",
    ["what"],
)
scripts = Counter("endmark_redis_scripts_total", "Lua scripts that were run, one round trip each.", ["script"])

_SWEPT = ("retried", ErrorCode.WORKER_LOST, ErrorCode.TIMEOUT, ErrorCode.QUEUE_TIMEOUT, ErrorCode.NO_WORKER)
_ENDS = [
    (Status.SUCCEEDED, NO_CODE),
    (Status.CANCELLED, ErrorCode.CANCELLED),
    *((Status.FAILED, code) for code in ErrorCode if code is not ErrorCode.CANCELLED),
]
# Every label is there from the beginning, at 0: of a series that begins at 1, Prometheus does not see the increase.
for _result in ("accepted", "joined", "queue_full", "unreachable"):
    submissions.labels(_result)
for _loss in ("fenced", "expired", "refused"):
    attempts_lost.labels(_loss)
for _what in _SWEPT:
    swept.labels(_what)
for _status, _code in _ENDS:
    jobs_ended.labels(_status, _code)
for _code in (NO_CODE, CLIENT_GONE, *ErrorCode):
    answers.labels(_code)
for _direction in ("input", "output"):
    tokens.labels(_direction)


# -- what happened ---------------------------------------------------------------------------------------------------


def request_answered(method: str, route: str, status: int) -> None:
    """`route` is the template of a route, or UNMATCHED."""
    http_requests.labels(method if method in METHODS else OTHER, route, status).inc()


def job_ended(status: str, code: str) -> None:
    """A step in Redis has ended a job, and this process has its answer."""
    jobs_ended.labels(status, _known(code)).inc()


def job_swept(what: str) -> None:
    """A sweep has run a job again, or ended it."""
    swept.labels(what).inc()
    if what != "retried":
        job_ended(Status.FAILED, what)


def attempt_begun(claim: Claim) -> None:
    attempts.inc()
    if claim.attempt == 1 and claim.accepted_ms:
        wait.observe((claim.started_ms - claim.accepted_ms) / 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """How an attempt ended its job."""

    claim: Claim
    status: Status
    code: str  # NO_CODE if it succeeded
    ran_s: float  # since the claim
    first_said_s: float | None  # since the claim; None: nothing was said
    input_tokens: int = 0
    output_tokens: int = 0


def job_finished(end: Finished) -> None:
    """A worker has ended the job that it ran."""
    job_ended(end.status, end.code)
    run_time.labels(end.status).observe(end.ran_s)
    if end.claim.accepted_ms:
        waited_s = (end.claim.started_ms - end.claim.accepted_ms) / 1000
        duration.labels(end.status).observe(waited_s + end.ran_s)
        if end.first_said_s is not None:
            first_token.observe(waited_s + end.first_said_s)
    tokens.labels("input").inc(max(0, end.input_tokens))
    tokens.labels("output").inc(max(0, end.output_tokens))


def flushed(count: int, size: int) -> None:
    """One flush of so many entries, which hold so many bytes together."""
    flushes.inc()
    entries.inc(count)
    said_bytes.inc(size)


def answer_ended(code: str, finished_ms: int, opened_ms: int) -> None:
    """A client has got all that it gets. `finished_ms`: when the agent ended, 0 if nobody says.

    An answer that had long ended when the client came is not late. Redis's clock and ours are taken for the same.
    """
    answers.labels(_known(code)).inc()
    if finished_ms >= opened_ms - REPLAYED_MS:
        relay_lag.observe(max(0.0, time.time() - finished_ms / 1000))


_CODES = frozenset({NO_CODE, CLIENT_GONE, *(code.value for code in ErrorCode)})


def _known(code: str) -> str:
    return code if code in _CODES else OTHER


# -- what is the case now --------------------------------------------------------------------------------------------


class _QueueGauge(NamedTuple):
    """A gauge that is read from Redis when somebody asks, by the API. Every replica tells the same."""

    name: str
    help: str
    value: Callable[[QueueState], float]


_QUEUE_GAUGES = (
    _QueueGauge("endmark_queue_claimable_jobs", "Jobs that the next free worker takes.", lambda q: q.claimable),
    _QueueGauge(
        "endmark_queue_waiting_turns",
        "Jobs that wait for the turn before theirs.",
        lambda q: max(0, q.unfinished - q.claimable - q.running),
    ),
    _QueueGauge("endmark_queue_running_jobs", "Jobs that the workers hold.", lambda q: q.running),
    _QueueGauge(
        "endmark_queue_oldest_wait_seconds",
        "How long the oldest claimable job has been so; 0 without any.",
        lambda q: 0 if q.oldest_ms is None else max(0, q.now_ms - q.oldest_ms) / 1000,
    ),
    _QueueGauge("endmark_queue_paused", "1 while an operator has paused the queue.", lambda q: int(bool(q.paused_by))),
    _QueueGauge("endmark_workers", "Workers that hold a lease.", lambda q: q.workers),
    _QueueGauge("endmark_worker_slots", "Jobs that these may run at a time.", lambda q: q.slots),
)
_REDIS_UP = ("endmark_redis_up", "1 if Redis answered when the API was asked.")
_BUILD = ("endmark_build_info", "Always 1; the version is a label.")


class Described(NamedTuple):
    """A metric as docs/observability.md describes it."""

    name: str
    kind: str  # counter, gauge or histogram
    labels: tuple[str, ...]
    help: str


def catalog() -> list[Described]:
    """Every metric of ours."""
    declared = [metric for metric in globals().values() if isinstance(metric, Counter | Gauge | Histogram)]
    described = []
    for metric in declared:
        (family,) = metric.describe()
        name = f"{family.name}_total" if family.type == "counter" else family.name
        described.append(Described(name, family.type, tuple(metric._labelnames), family.documentation))
    described += [Described(gauge.name, "gauge", (), gauge.help) for gauge in _QUEUE_GAUGES]
    described.append(Described(_REDIS_UP[0], "gauge", (), _REDIS_UP[1]))
    described.append(Described(_BUILD[0], "gauge", ("version",), _BUILD[1]))
    return sorted(described)


class _Scrape(Collector):
    """What one scrape is answered with: what was counted, and gauges of this moment."""

    def __init__(self, gauges: Iterable[Metric] = ()) -> None:
        self._gauges = list(gauges)

    def collect(self) -> Iterable[Metric]:
        build = GaugeMetricFamily(*_BUILD, labels=["version"])
        build.add_metric([version("endmark")], 1)
        yield from (*_counted().collect(), build, *self._gauges)


def _counted() -> Collector:
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if folder is None:
        return REGISTRY
    for path in Path(folder).glob("gauge_live*.db"):  # a killed process still has the streams open that it had
        pid = int(path.stem.rpartition("_")[2])
        if not _lives(pid):
            mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
    return registry


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def exposition(accept: str, queue: QueueState | None) -> tuple[bytes, str]:
    """The answer to Prometheus, and its content type. `queue`: None if Redis did not answer."""
    gauges = [GaugeMetricFamily(*_REDIS_UP, value=int(queue is not None))]
    if queue is not None:
        gauges += [GaugeMetricFamily(gauge.name, gauge.help, value=gauge.value(queue)) for gauge in _QUEUE_GAUGES]
    encode, content_type = choose_encoder(accept)
    return encode(_Scrape(gauges)), content_type


def serve(host: str, port: int) -> None:
    """Answers Prometheus from a thread of its own, also while the event loop is stuck. Raises OSError."""
    start_http_server(port, host, _Scrape())
