"""shared/tracing.py: spans while nobody records them, and from the moment on at which somebody does."""

from __future__ import annotations

import subprocess
import sys

from opentelemetry import trace

from shared import tracing
from tests.processes import ROOT

SET_LATER = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from shared import tracing

with tracing.span("before") as span:
    assert not span.is_recording()
trace.set_tracer_provider(TracerProvider())
with tracing.span("after") as span:
    assert span.is_recording()
    assert trace.get_current_span() is span
"""


def test_a_provider_is_heard_of_whenever_it_is_set() -> None:
    subprocess.run([sys.executable, "-c", SET_LATER], check=True, cwd=ROOT, timeout=60)  # a process has one for ever


def test_a_trace_is_carried_on_though_nobody_records() -> None:
    carried = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "tracestate": "vendor=opaque"}
    with tracing.span("request", tracing.context_of(carried)), tracing.span("relay"):
        assert tracing.carry() == carried
    assert tracing.carry() == {}


def test_without_a_trace_there_is_nothing_to_carry() -> None:
    with tracing.span("request", tracing.context_of({"tracestate": "vendor=opaque"})) as span:
        assert tracing.carry() == {}
        assert trace.get_current_span() is trace.INVALID_SPAN is span
