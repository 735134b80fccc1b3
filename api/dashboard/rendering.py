"""Templates, and how instants and durations are written. Everything that a template shows is escaped."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import Response

from api.middleware import LOCAL_OPERATOR
from shared.text import json_bytes

HERE = Path(__file__).parent
DONE = {  # what the page after an action says
    "cancelled": "The job was cancelled.",
    "retried": "This is the new job, which asks for the same again.",
    "deleted": "The job was deleted.",
    "paused": "The queue is paused: workers finish what they run, and start nothing.",
    "resumed": "The queue goes on.",
    "drained": "The worker was told to finish what it runs, and to leave.",
}


def page(
    request: Request, template: str, *, status: int = 200, headers: Mapping[str, str] | None = None, **values: Any
) -> Response:
    """A page, as a response."""
    html = _ENVIRONMENT.get_template(template).render(
        operator=request.scope["operator"],
        path=request.url.path,
        done=DONE.get(request.query_params.get("done", "")),
        now_ms=now_ms(),
        **values,
    )
    # A lone surrogate has no UTF-8: it is shown as its escape.
    return Response(
        html.encode("utf-8", "backslashreplace"), status, dict(headers or {}), media_type="text/html; charset=utf-8"
    )


def now_ms() -> int:
    """By the clock of this process: good enough to say how long ago something was."""
    return round(time.time() * 1000)


def duration(ms: float | None) -> str:
    """Three digits and a unit: `12 ms`, `1.25 s`, `3 min 20 s`, `2 h 5 min`."""
    if ms is None:
        return "–"
    if ms < 1000:
        return f"{round(ms)} ms"
    if ms < 59_950:
        return f"{ms / 1000:.3g} s"
    minutes, seconds = divmod(round(ms / 1000), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} days"


def ago(at_ms: float, now_ms: float) -> str:
    """How long ago, in whole units: a list that is drawn again every other second is not to flicker."""
    seconds = max(0, round((now_ms - at_ms) / 1000))
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago" if seconds else "just now"


def instant(at_ms: float) -> str:
    """In UTC, with milliseconds; a number where no calendar has it, as somebody may type into a filter."""
    try:
        at = datetime.fromtimestamp(at_ms / 1000, UTC)
    except (OverflowError, ValueError, OSError):
        return f"{at_ms:.0f} ms"
    return at.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + " UTC"


def clock(at_ms: float) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%H:%M:%S")


def _json(value: Any) -> str:
    return json_bytes(value).decode()


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": duration,
        "instant": instant,
        "clock": clock,
        "as_json": _json,
        "path": lambda text: quote(text, safe=""),
    }
    environment.globals |= {"ago": ago, "LOCAL_OPERATOR": LOCAL_OPERATOR}
    return environment


_ENVIRONMENT = _environment()
