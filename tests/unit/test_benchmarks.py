"""What the benchmarks rest on: no answer counts as whole that is not, and a goal is judged by its words."""

from __future__ import annotations

import time
from typing import Any

import pytest

from benchmarks.goals import GOALS, Results, verdicts
from benchmarks.load import Load, Stream, spread
from benchmarks.report import REGIONS, fill
from benchmarks.wire import Close
from tests.upstream import stamped_token

ENDING = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
ERROR = b'data: {"error":{"message":"It failed.","code":"agent_error"}}\n\n'


def event(*numbers: int) -> bytes:
    """An SSE event with some tokens."""
    content = "".join(stamped_token(number) for number in numbers)
    return f'data: {{"choices":[{{"delta":{{"content":"{content}"}},"finish_reason":null}}]}}\n\n'.encode()


def received(*data: bytes, tokens: int = 3, how: Close = Close.END, status: int = 200) -> Stream:
    stream = Stream(tokens)
    for piece in data:
        stream.feed(piece, time.monotonic_ns())
    stream.how, stream.status = how, status
    return stream


@pytest.mark.parametrize(
    ("stream", "outcome"),
    [
        (received(event(0), event(1), event(2), ENDING), "ok"),
        (received(event(0, 1, 2), ENDING), "ok"),
        (received(event(0), event(2), ENDING), "FALSE SUCCESS"),
        (received(event(0), event(1), ENDING), "FALSE SUCCESS"),
        (received(event(0), event(1), event(1), event(2), ENDING), "FALSE SUCCESS"),
        (received(ENDING), "FALSE SUCCESS"),
        (received(event(0), ERROR), "told error"),
        (received(event(0), event(1), event(2)), "ended without a word"),
        (received(event(0), how=Close.EOF), "eof"),
        (received(event(0), how=Close.CUT), "cut"),
        (received(b"{}", status=429), "http 429"),
    ],
)
def test_an_outcome_is_what_came_and_not_what_was_claimed(stream: Stream, outcome: str) -> None:
    assert stream.outcome == outcome


def test_a_token_counts_when_its_event_is_complete() -> None:
    whole = event(0)
    stream = received(whole[:-1])
    assert stream.received == 0
    stream.feed(whole[-1:], time.monotonic_ns())
    assert stream.received == 1


def test_a_delay_is_counted_from_when_the_token_was_made() -> None:
    stream = Stream(1)
    data = event(0)
    stream.feed(data, time.monotonic_ns() + 5_000_000)
    (delay_ns,) = stream.delays_ns
    assert delay_ns >= 5_000_000


def test_the_plan_of_a_load_is_the_same_for_every_system() -> None:
    load = Load(users=20, tokens=100, interval_ms=20, rounds=3)
    assert load.pauses_s == Load(users=20, tokens=100, interval_ms=20, rounds=3).pauses_s
    assert load.ideal_s >= 3 * load.stream_s
    assert load.offered_tokens_per_s == pytest.approx(20 * 3 * 100 / load.ideal_s)


def test_a_burst_comes_as_a_whole_and_when_it_is_to_come() -> None:
    burst = Load(users=20, tokens=100, interval_ms=0, begins_s=2, ramp_s=0)
    assert burst.pauses_s == [[2]] * 20


def test_a_spread_of_nothing_is_nothing() -> None:
    assert spread([]) is None
    measured = spread(number * 1_000_000 for number in range(100))
    assert measured is not None
    assert (measured.p50, measured.p99, measured.most, measured.count) == (50, 99, 99, 100)


# -- goals -------------------------------------------------------------------------------------------------------------


def results(**of_system: list[dict[str, Any]]) -> Results:
    runs = [
        {"system": system, "case": "200 at once", "loads": {"streams": {"ttft_ms": ttft}}}
        for system, spreads in of_system.items()
        for ttft in spreads
    ]
    return Results({"herd": {"runs": runs}})


def herd(measured: Results) -> bool | None:
    (verdict,) = [one for one in verdicts(measured) if one.what.startswith("200 requests")]
    return verdict.is_met


def test_a_goal_is_judged_by_the_median_of_its_rounds() -> None:
    seam = [{"p50": 10.0, "p99": 20.0}]
    fast, slow = {"p50": 9.0, "p99": 20.0}, {"p50": 90.0, "p99": 200.0}
    assert herd(results(endmark=[fast, slow, fast], seam=seam)) is True
    assert herd(results(endmark=[slow, slow, fast], seam=seam)) is False


def test_a_goal_is_judged_beside_the_seam_and_the_bare_seam_is_told_as_well() -> None:
    measured = results(
        endmark=[{"p50": 9.0, "p99": 20.0}],
        seam=[{"p50": 10.0, "p99": 20.0}],
        **{"bare seam": [{"p50": 1.0, "p99": 2.0}]},
    )
    (verdict,) = [one for one in verdicts(measured) if one.what.startswith("200 requests")]
    assert (verdict.is_met, verdict.is_met_beside_bare_seam) == (True, False)
    assert verdict.others == {"seam": "10.0 ms", "bare seam": "1.0 ms", "bare relay": "", "naive arq": ""}


def test_a_goal_without_its_figures_is_not_judged() -> None:
    assert herd(results(endmark=[{"p50": 9.0, "p99": 20.0}])) is None
    assert {verdict.is_met for verdict in verdicts(Results({}))} == {None}


def test_a_failed_run_counts_for_none() -> None:
    measured = results(endmark=[{"p50": 9.0, "p99": 20.0}], seam=[{"p50": 10.0, "p99": 20.0}])
    measured.reports["herd"]["runs"].append({"system": "endmark", "case": "200 at once", "failed": "no answer"})
    assert herd(measured) is True


def test_the_report_can_be_made_again() -> None:
    page = "".join(f"# {name}\n\n<!-- generated: {name} -->\nold\n<!-- end -->\n" for name in REGIONS)
    once = fill(page, Results({}))
    assert "old" not in once
    assert all(goal.what in once for goal in GOALS)
    assert fill(once, Results({})) == once
