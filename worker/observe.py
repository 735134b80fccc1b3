"""What a worker tells about an attempt: its metrics, its spans, and the names that every log line of it carries."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any

import structlog
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from shared import metrics, tracing
from shared.jobs import Status as JobStatus
from shared.store import Claim
from worker.agents.contract import Usage

_NS_PER_MS = 1_000_000


class Observation:
    """One attempt, watched from its beginning to its end. A context manager around its execution.

    Inside of it the agent's span is the current one, and `job` and `attempt` are on every log line.
    """

    def __init__(self, claim: Claim, agent: str) -> None:
        self._claim = claim
        self._agent = agent
        self._span: Span | None = None  # None: nobody records it
        self._stack = ExitStack()

    def __enter__(self) -> Observation:
        claim = self._claim
        metrics.attempt_begun(claim)
        tokens = structlog.contextvars.bind_contextvars(job=claim.job_id, attempt=claim.attempt)
        self._stack.callback(structlog.contextvars.reset_contextvars, **tokens)
        parent = tracing.context_of(claim.trace)
        if parent or tracing.records():
            self._open_spans(parent)
        return self

    def _open_spans(self, parent: Context) -> None:
        """That of the wait, which is over, and the agent's, which is the current one until the end."""
        claim = self._claim
        job: dict[str, Any] = {"endmark.job.id": claim.job_id, "endmark.attempt": claim.attempt}
        if claim.accepted_ms and tracing.records():
            tracing.tracer.start_span(
                "queue", parent, SpanKind.CONSUMER, job, start_time=claim.accepted_ms * _NS_PER_MS
            ).end(claim.started_ms * _NS_PER_MS)
        asked = {
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.provider.name": "endmark",
            "gen_ai.agent.name": self._agent,
            "gen_ai.response.id": claim.job_id,
        }
        span = self._stack.enter_context(tracing.span(f"invoke_agent {self._agent}", parent, attributes=job | asked))
        self._span = span if span.is_recording() else None

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stack.close()

    def _tell(self, **attributes: Any) -> None:
        """`a__b_c` is the attribute `a.b_c`."""
        if self._span is not None:
            self._span.set_attributes({name.replace("__", "."): value for name, value in attributes.items()})

    def asked(self, model: str, session: str) -> None:
        """What the request says of itself, as far as it may be told."""
        self._tell(gen_ai__request__model=model)
        if session:
            self._tell(gen_ai__conversation__id=session)

    def ended_well(self, *, ran_s: float, first_said_s: float | None, finish_reason: str, usage: Usage | None) -> None:
        """The job succeeded."""
        usage = usage or Usage()
        self._finished(JobStatus.SUCCEEDED, metrics.NO_CODE, ran_s, first_said_s, usage)
        self._tell(gen_ai__response__finish_reasons=[finish_reason])
        if usage.total_tokens:
            self._tell(
                gen_ai__usage__input_tokens=usage.prompt_tokens, gen_ai__usage__output_tokens=usage.completion_tokens
            )

    def failed(self, code: str, *, ran_s: float, first_said_s: float | None) -> None:
        """The job ended with this code."""
        self._finished(JobStatus.FAILED, code, ran_s, first_said_s, Usage())
        self.cut_off(code)

    def cut_off(self, why: str) -> None:
        """The attempt did not end well; whether and how its job ends, somebody else decides or has decided."""
        self._tell(error__type=why)
        if self._span is not None:
            self._span.set_status(Status(StatusCode.ERROR))

    def _finished(self, status: JobStatus, code: str, ran_s: float, first_said_s: float | None, usage: Usage) -> None:
        end = metrics.Finished(
            claim=self._claim,
            status=status,
            code=code,
            ran_s=ran_s,
            first_said_s=first_said_s,
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
        )
        metrics.job_finished(end)
