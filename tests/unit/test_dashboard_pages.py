"""What the pages of the dashboard are made of: filters, numbers, curves, and the words of strangers."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest
from starlette.requests import Request

from api.dashboard.charts import HEIGHT, WIDTH, speed, stretches, throughput
from api.dashboard.curl import commands
from api.dashboard.filters import FIELDS, Filters
from api.dashboard.rendering import HERE as DASHBOARD
from api.dashboard.rendering import ago, duration, page
from api.dashboard.statistics import overview, percentile
from shared.entries import ErrorMarker
from shared.jobs import JobRecord

HERE = "http://127.0.0.1:8900"


# -- filters -----------------------------------------------------------------------------------------------------------


def test_filters_go_from_the_form_to_the_url_and_to_the_api() -> None:
    filters = Filters.parse(
        [
            ("status", "failed"),
            ("kind", ""),
            ("since", "1h"),
            ("metadata_key", "a b"),
            ("metadata_value", "c&d"),
            ("x", "y"),
        ]
    )
    assert filters.url() == "/dashboard/jobs?status=failed&since=1h&metadata%5Ba+b%5D=c%26d"
    assert Filters.parse(filters.items()) == filters
    assert filters.query(10_000_000) == {"status": "failed", "since": "6400000", "metadata[a b]": "c&d"}
    assert filters.counted(10_000_000) == {"since": "6400000"}
    assert filters.chosen(10_000_000) == {"status": "failed", "since": 6_400_000, "metadata": {"a b": "c&d"}}
    assert not filters.are_counted
    assert filters.with_(status=None, since=None).fields == {}


# -- numbers -----------------------------------------------------------------------------------------------------------


def a_record(**fields: object) -> JobRecord:
    known = {"kind": "chatcmpl", "status": "succeeded", "accepted_ms": 0} | fields
    return JobRecord.from_hash("chatcmpl-1", {name.encode(): str(value).encode() for name, value in known.items()})


def test_a_percentile_is_a_value_that_was_measured() -> None:
    assert percentile([], 50) is None
    assert percentile([7], 95) == 7
    assert percentile(range(1, 101), 50) == 50
    assert percentile(range(1, 101), 95) == 95
    assert percentile([1, 2], 50) == 1


def test_the_overview_tells_how_many_how_fast_and_why_not() -> None:
    failed = ErrorMarker("agent_error", "no").payload().decode()
    records = [
        a_record(accepted_ms=1000 * n, started_ms=1000 * n + n, first_token_ms=1000 * n + 2 * n, worker="w1")
        for n in range(20)
    ]
    records.append(a_record(accepted_ms=20_000, status="failed", error=failed, worker="w2"))
    found = overview(records, now_ms=30_000)
    assert found is not None
    assert (found.jobs, found.since_ms, found.until_ms) == (21, 0, 30_000)
    assert (found.wait.p50_ms, found.wait.p95_ms) == (9, 18)
    assert found.failures == [("agent_error", 1)]
    assert [(line.worker, line.jobs, line.failed) for line in found.workers] == [("w1", 20, 0), ("w2", 1, 1)]
    assert sum(bucket.jobs for bucket in found.buckets) == 21
    assert found.per_minute == 42
    chart = throughput(found)
    assert all(0 <= bar.y < HEIGHT and 0 <= bar.x < WIDTH for bar in chart.bars)
    assert {bar.look for bar in chart.bars} == {"succeeded", "failed"}
    curve = speed(found, "wait", "Waited")
    assert all(0 <= y <= HEIGHT for line in curve.lines for _, y, _ in line.dots)
    assert overview([], now_ms=1) is None


@pytest.mark.parametrize("records", [[a_record()], [a_record(status="queued"), a_record(status="queued")]])
def test_an_overview_needs_no_measurements(records: list[JobRecord]) -> None:
    found = overview(records, now_ms=0)
    assert found is not None
    assert throughput(found).bars
    assert speed(found, "first_token", "First token").lines[0].dots == []


def test_the_time_of_a_job_is_divided_without_a_gap() -> None:
    job = {"accepted_ms": 0, "started_ms": 100, "first_token_ms": 200, "finished_ms": 400}
    assert [(part.look, part.x, part.width) for part in stretches(job, 0)] == [
        ("waits", 0, 75),
        ("thinks", 75, 75),
        ("speaks", 150, 150),
    ]
    waiting = job | {"started_ms": None, "first_token_ms": None, "finished_ms": None}
    assert [(part.look, part.width) for part in stretches(waiting, 50)] == [("waits", WIDTH)]
    running = job | {"first_token_ms": None, "finished_ms": None}
    assert [(part.look, part.width) for part in stretches(running, 200)] == [("waits", 150), ("runs", 150)]


@pytest.mark.parametrize(
    ("ms", "text"),
    [(None, "–"), (3, "3 ms"), (1250, "1.25 s"), (59_999, "1 min"), (200_000, "3 min 20 s"), (7_500_000, "2 h 5 min")],
)
def test_durations_are_short(ms: float | None, text: str) -> None:
    assert duration(ms) == text


@pytest.mark.parametrize(("age_s", "text"), [(-5, "just now"), (30, "30 s ago"), (300, "5 min ago"), (7200, "2 h ago")])
def test_ages_are_in_whole_units(age_s: int, text: str) -> None:
    assert ago(0, age_s * 1000) == text


def test_a_command_holds_the_request_and_never_a_key() -> None:
    job = {
        "id": "chatcmpl-1",
        "kind": "chat",
        "model": "endmark",
        "session": "api@acme:s1",
        "metadata": {"a": "b"},
        "request": {"messages": [{"role": "user", "content": "it's $HOME"}], "params": {"temperature": 0}},
    }
    (what, command), *_ = commands(job, HERE)
    assert what == "Ask for the same"
    assert "$ENDMARK_KEY" in command
    assert """it'"'"'s $HOME""" in command
    assert '"session_id":"s1"' in command
    for other in ({"request": None}, {"kind": "response"}):
        assert [what for what, _ in commands(job | other, HERE)] == ["Look at it", "Watch it"]


# -- what strangers have written ---------------------------------------------------------------------------------------

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&"


def evil_job(**fields: object) -> dict[str, Any]:
    """As `GET /v1/jobs/{id}` answers, with the worst in every text."""
    texts = ("id", "kind", "status", "model", "session", "tenant", "worker", "finish_reason", "traceback", "retry_of")
    attempt = {"attempt": 1, "worker": EVIL, "started_ms": 1, "ended_ms": 2, "outcome": EVIL}
    return {
        **dict.fromkeys(texts, EVIL),
        "accepted_ms": 0,
        "started_ms": 1,
        "first_token_ms": 1,
        "finished_ms": 2,
        "usage": {"prompt_tokens": 1, "completion_tokens": 1},
        "error": {"code": EVIL, "message": EVIL},
        "metadata": {EVIL: EVIL},
        "timeline": [{"at_ms": 1, "what": EVIL, "attempt": 1, "worker": EVIL}],
        "timings": dict.fromkeys(("wait_ms", "first_token_ms", "run_ms", "tool_ms"), 1),
        "attempts": [attempt],
        "request": {
            "messages": [
                {"role": EVIL, "content": EVIL},
                {"role": "user", "content": [{"type": "text", "text": EVIL}]},
            ],
            "params": {EVIL: EVIL},
        },
        "answer": {
            "text": EVIL,
            "reasoning": EVIL,
            "tools": [{"name": EVIL, "status": EVIL, "call_id": EVIL, "detail": EVIL}],
            "tool_calls": [{"index": 0, "function": {"name": EVIL, "arguments": EVIL}}],
            "is_cut": True,
        },
    } | fields


def evil_pages() -> dict[str, dict[str, Any]]:
    filters = Filters(dict.fromkeys(FIELDS, EVIL) | {"since": "1", "until": "1"}, {EVIL: EVIL})
    counts = {"total": 1, "by_status": {EVIL: 1}, "by_code": {EVIL: 1}}
    listed = {"data": [evil_job()], "has_more": True, "next_cursor": EVIL}
    queue = {
        **dict.fromkeys(("claimable", "waiting_for_a_turn", "running", "oldest_wait_ms", "workers", "slots"), 1),
        "paused": {"by": EVIL, "for_ms": 1},
    }
    worker = dict.fromkeys(("id", "host", "pid", "version", "agent"), EVIL)
    times = {"started_ms": 1, "last_beat_ms": 1, "draining": False, "max_jobs": 1, "jobs": [EVIL]}
    acted = {"at_ms": 1, "action": f"job.{EVIL}", "details": {EVIL: EVIL}}
    entry = dict.fromkeys(("entry_id", "operator", "target"), EVIL) | acted
    failed = ErrorMarker(EVIL, EVIL).payload().decode()
    found = overview([a_record(error=failed, worker=EVIL, status="failed")], 9)
    assert found is not None
    job = evil_job()
    return {
        "overview.html": {
            "found": found,
            "charts": [throughput(found), speed(found, "wait", EVIL), speed(found, "first_token", EVIL)],
            "counts": counts,
            "queue": queue,
            "most": 2,
        },
        "jobs.html": {
            "filters": filters,
            "found": listed,
            "counts": counts,
            "after": EVIL,
            "statuses": [EVIL],
            "codes": [EVIL],
            "periods": {},
        },
        "job.html": {
            "job": job,
            "is_over": False,
            "shows_content": True,
            "waits_because": {EVIL: EVIL},
            "stretches": stretches(job, 9),
            "commands": [*commands(job, EVIL), *commands(job | {"kind": "chat"}, EVIL)],
        },
        "entries.html": {
            "job_id": EVIL,
            "entries": [{"id": EVIL, "kind": EVIL, "bytes": 1, "text": EVIL}],
            "more": True,
        },
        "queue.html": {"queue": queue, "waiting": listed, "reasons": {EVIL: EVIL}},
        "workers.html": {"workers": [worker | times]},
        "audit.html": {"trail": {"data": [entry], "has_more": True, "last_id": EVIL}, "before": EVIL},
        "bulk.html": {
            "action": EVIL,
            "filters": filters,
            "result": {
                "dry_run": True,
                "matched": 1,
                "done": 1,
                "ids": [EVIL],
                "refused": [{"id": EVIL, "reason": EVIL}],
            },
        },
        "login.html": {"target": EVIL, "again": EVIL, "is_wrong": True},
        "error.html": {"message": EVIL},
    }


class Markup(HTMLParser):
    """The elements of a page, and the attributes that must not be there."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("img", "iframe", "style", "base", "object") or (tag == "script" and "src" not in given):
            self.found.append(tag)
        self.found += [name for name in given if name.startswith("on") or name == "style"]
        for name in ("href", "src", "action"):
            if not (given.get(name) or "/dashboard/").startswith(("/dashboard/", "#")):
                self.found.append(f"{name}={given[name]}")


TEMPLATES = sorted({path.name for path in (DASHBOARD / "templates").glob("[a-z]*.html")} - {"base.html"})


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_page_shows_the_worst_as_text(template: str) -> None:
    scope = {"type": "http", "operator": EVIL, "path": "/dashboard/", "query_string": b"done=%3Cscript%3E"}
    html = bytes(page(Request(scope | {"headers": []}), template, title=EVIL, **evil_pages()[template]).body).decode()
    markup = Markup()
    markup.feed(html)
    assert markup.found == []
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
