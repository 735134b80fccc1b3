"""Small charts as shapes: what a template draws as SVG. No I/O.

A chart is WIDTH by HEIGHT units, stretched to the room that there is. y grows downwards, as in SVG.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from api.dashboard.rendering import clock, duration
from api.dashboard.statistics import Overview, Spread

WIDTH, HEIGHT = 300.0, 60.0
GAP = 1.0  # between bars


class Bar(NamedTuple):
    """One part of a column."""

    look: str  # class of its colour
    x: float
    y: float
    width: float
    height: float
    tip: str


class Line(NamedTuple):
    """A curve, in pieces where nothing was measured."""

    look: str
    pieces: list[str]  # `points` of a polyline
    dots: list[tuple[float, float, str]]  # x, y, and what it says


class Chart(NamedTuple):
    title: str
    top: str  # what the greatest value is
    bars: list[Bar]
    lines: list[Line]


class Stretch(NamedTuple):
    """A part of a job's time."""

    look: str
    x: float
    width: float
    tip: str


def throughput(of: Overview) -> Chart:
    """Columns of jobs by when they were accepted, divided by what became of them."""
    most = max(bucket.jobs for bucket in of.buckets)
    step = WIDTH / len(of.buckets)
    bars: list[Bar] = []
    for number, bucket in enumerate(of.buckets):
        y = HEIGHT
        for look in ("succeeded", "failed", "cancelled", "unfinished"):
            count: int = getattr(bucket, look)
            if count:
                height = HEIGHT * count / most
                y -= height
                tip = f"{count} {look}, accepted from {clock(bucket.start_ms)}"
                bars.append(Bar(look, round(number * step, 2), round(y, 2), step - GAP, round(height, 2), tip))
    return Chart("Jobs accepted", f"{most} in {duration(of.bucket_ms)}", bars, [])


def speed(of: Overview, measure: str, title: str) -> Chart:
    """The median and the 95th percentile of `wait` or `first_token` over the time."""
    spreads: list[Spread] = [getattr(bucket, measure) for bucket in of.buckets]
    top = max([spread.p95_ms for spread in spreads if spread.p95_ms is not None], default=0.0)
    starts = [bucket.start_ms for bucket in of.buckets]
    lines = [
        _line("p95", [spread.p95_ms for spread in spreads], top, starts),
        _line("p50", [spread.p50_ms for spread in spreads], top, starts),
    ]
    return Chart(title, duration(top), [], lines)


def _line(look: str, values: Sequence[float | None], top: float, starts: Sequence[int]) -> Line:
    step = WIDTH / len(values)
    pieces: list[list[str]] = [[]]
    dots: list[tuple[float, float, str]] = []
    for number, value in enumerate(values):
        if value is None:
            pieces.append([])
            continue
        x, y = round((number + 0.5) * step, 2), round(HEIGHT - 2 - (HEIGHT - 4) * value / (top or 1), 2)
        pieces[-1].append(f"{x},{y}")
        dots.append((x, y, f"{look} {duration(value)}, accepted from {clock(starts[number])}"))
    return Line(look, [" ".join(piece) for piece in pieces if len(piece) > 1], dots)


def stretches(job: dict[str, Any], now_ms: int) -> list[Stretch]:
    """How a job's time went. `job` is as `GET /v1/jobs/{id}` answers: it knows of the first token when all is over."""
    start_ms: int = job["accepted_ms"]
    marks: list[tuple[str, int | None]] = [("waits", job["started_ms"])]
    if job["first_token_ms"] is None:
        marks.append(("runs", job["finished_ms"]))
    else:
        marks += [("thinks", job["first_token_ms"]), ("speaks", job["finished_ms"])]
    end_ms = job["finished_ms"] or max(now_ms, start_ms)
    whole = max(1, end_ms - start_ms)
    parts: list[Stretch] = []
    at_ms = start_ms
    for look, until in marks:
        until_ms = end_ms if until is None else max(at_ms, min(until, end_ms))
        if until_ms > at_ms:
            x, width = WIDTH * (at_ms - start_ms) / whole, WIDTH * (until_ms - at_ms) / whole
            parts.append(Stretch(look, round(x, 2), round(width, 2), f"{look} for {duration(until_ms - at_ms)}"))
        at_ms = until_ms
        if until is None:
            break
    return parts
