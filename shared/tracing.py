"""Traces: one for each request, from HTTP through the queue to the agent and back.

    POST /v1/chat/completions        the API, from the request to the last byte of its answer
    ├── queue                        from acceptance to the claim; one for each attempt
    ├── invoke_agent NAME            the worker; the current span while the agent runs
    └── relay                        the API, while the client follows the job

Rule 1: off unless somebody sets a tracer provider, or the standard OTEL_ variables name an exporter. The context of a
        traced request is carried on all the same.
Rule 2: no span has text of a prompt or an answer, or a key.
Rule 3: W3C Trace Context, and nothing else, travels with the job: `traceparent` and `tracestate` of its record.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

log = structlog.get_logger(__name__)

CARRIED = ("traceparent", "tracestate")  # what of a trace travels: headers, and fields of the job record
FLUSH_MS = 5000  # how long a process that ends waits for its exporter

_W3C = TraceContextTextMapPropagator()
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

NO_SPAN = nullcontext(INVALID_SPAN)  # around what has none

tracer = trace.get_tracer("endmark", version("endmark"))


def records() -> bool:
    """Whether spans may go anywhere: there is a provider. One may be set at any time."""
    is_waiting = isinstance(tracer, trace.ProxyTracer)
    return not (is_waiting and isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider))


def span(
    name: str,
    parent: Context | None = None,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Mapping[str, Any] | None = None,
) -> AbstractContextManager[Span]:
    """The current span of the block; without `parent` a child of the one before.

    NO_SPAN if there is neither a provider nor a trace to be carried on. Exceptions are not recorded:
    their text may be of a prompt.
    """
    if not parent and not records():
        return NO_SPAN
    return tracer.start_as_current_span(
        name, parent, kind, attributes, record_exception=False, set_status_on_exception=False
    )


def carry() -> dict[str, str]:
    """The current span, as headers or fields; empty without any."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier)
    return carrier


def context_of(carrier: Mapping[str, str]) -> Context:
    """What `carry` has made, or a client has sent. What cannot be read is as good as nothing."""
    if CARRIED[0] not in carrier:
        return Context()
    return _W3C.extract({name: carrier[name] for name in CARRIED if name in carrier}, Context())


def link_to(carrier: Mapping[str, str]) -> None:
    """The current span has to do with the job that was asked for in another trace."""
    linked, current = trace.get_current_span(context_of(carrier)).get_span_context(), trace.get_current_span()
    if linked.is_valid and linked.trace_id != current.get_span_context().trace_id:
        current.add_link(linked)


def configure(service_name: str) -> None:
    """Exports spans as the OTEL_ variables say, if they say so. A provider that somebody has set is left alone.

    `OTEL_TRACES_EXPORTER` names exporters by their entry points; an OTLP endpoint alone means `otlp`.
    """
    default = "otlp" if any(os.environ.get(name) for name in _ENDPOINTS) else "none"
    names = [name.strip() for name in (os.environ.get("OTEL_TRACES_EXPORTER") or default).split(",")]
    is_disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or names == ["none"]
    if is_disabled or not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return
    try:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporters = [_exporter(name).load()() for name in names]
    except (ImportError, LookupError) as error:
        log.warning("tracing_unavailable", reason=str(error), hint="pip install 'endmark[otel]'")
        return
    ours = Resource.create({"service.name": service_name, "service.version": version("endmark")})
    provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()))  # the variables win
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    log.info("tracing_started", exporters=names)


def _exporter(name: str) -> EntryPoint:
    if name == "otlp":
        is_grpc = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf") == "grpc"
        name = "otlp_proto_grpc" if is_grpc else "otlp_proto_http"
    found = entry_points(group="opentelemetry_traces_exporter", name=name)
    if not found:
        raise LookupError(f"there is no exporter {name!r}")
    return next(iter(found))


def flush() -> None:
    """Sends what has not been sent yet, for FLUSH_MS at most. uvicorn ends by its signal: nothing is done at exit."""
    force_flush = getattr(trace.get_tracer_provider(), "force_flush", None)  # the SDK's; the API's own has none
    if force_flush is not None:
        force_flush(FLUSH_MS)
