"""What the figures have to reach, and whether they do. No I/O but the reading of result files.

Rule 1: a goal is judged by the median of its rounds, and a ratio by systems of the same sitting.
Rule 2: a goal of which a figure is missing is not judged, and a run that failed counts for none.
Rule 3: a goal that compares is met if Endmark is good enough beside the seam. How it does beside the bare seam, which
        is more than was asked for, is told as well (docs/decisions/0023-two-seams.md).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

SEAM, BARE_SEAM = "seam", "bare seam"
OTHERS = (SEAM, BARE_SEAM, "bare relay", "naive arq")
ENOUGH = 0.9  # of a figure, where the goal is "no worse": what two runs of the same differ by


class Missing(Exception):
    """There is no such figure."""


class Results:
    """The runs of all questions that have been asked."""

    def __init__(self, reports: Mapping[str, dict[str, Any]]) -> None:
        self.reports = reports

    @classmethod
    def read(cls, folder: Path) -> Results:
        """From what `benchmarks.rounds.write_results` has written."""
        return cls({path.stem: orjson.loads(path.read_bytes()) for path in sorted(folder.glob("*.json"))})

    def runs(self, question: str, system: str, case: str) -> list[dict[str, Any]]:
        return [
            run
            for run in self.reports.get(question, {"runs": []})["runs"]
            if (run["system"], run["case"]) == (system, case) and "failed" not in run
        ]

    def cases(self, question: str, system: str) -> list[str]:
        """In the order in which they were first run."""
        runs = self.reports.get(question, {"runs": []})["runs"]
        return list(dict.fromkeys(run["case"] for run in runs if run["system"] == system))

    def median(self, question: str, system: str, case: str, path: str) -> float:
        """Of one figure, named by its way through a run: `loads.streams.ttft_ms.p50`. Raises Missing."""
        return self.median_of(question, system, case, lambda run: _at(run, path))

    def median_of(
        self, question: str, system: str, case: str, figure: Callable[[dict[str, Any]], float | None]
    ) -> float:
        values = [value for run in self.runs(question, system, case) if (value := figure(run)) is not None]
        if not values:
            raise Missing(f"{question}: {system}, {case}")
        return statistics.median(values)


def _at(run: dict[str, Any], path: str) -> float | None:
    value: Any = run
    for name in path.split("."):
        if value is None or name not in value:
            return None
        value = value[name]
    return None if value is None else float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One goal, and how it stands."""

    what: str
    goal: str
    endmark: str
    others: Mapping[str, str]  # the same figures of the other systems; empty where they have nothing to compare
    is_met: bool | None  # None: not measured
    is_met_beside_bare_seam: bool | None  # None: not measured, or it does not compare


Judged = tuple[str, bool]  # the figures of Endmark as text, and whether they are good enough


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What is to be reached. Its functions raise Missing."""

    what: str
    goal: str
    judge: Callable[[Results], Judged] | None = None  # by figures of Endmark alone
    compare: Callable[[Results, str], Judged] | None = None  # beside one of the seams
    others: Callable[[Results, str], str] | None = None  # the same figures of another system

    def verdict(self, results: Results) -> Verdict:
        endmark, is_met = self._judged(results, SEAM)
        return Verdict(
            what=self.what,
            goal=self.goal,
            endmark=endmark,
            others={system: self._other(results, system) for system in OTHERS},
            is_met=is_met,
            is_met_beside_bare_seam=self._judged(results, BARE_SEAM)[1] if self.compare is not None else None,
        )

    def _judged(self, results: Results, seam: str) -> tuple[str, bool | None]:
        try:
            if self.compare is not None:
                return self.compare(results, seam)
            if self.judge is not None:
                return self.judge(results)
        except Missing:
            pass
        return "not measured", None

    def _other(self, results: Results, system: str) -> str:
        if self.others is None:
            return ""
        try:
            return self.others(results, system)
        except Missing:
            return ""


def _pair(
    question: str, case: str, figure: str, load: str = "streams"
) -> Callable[[Results, str], tuple[float, float]]:
    """p50 and p99 of something that is measured in milliseconds."""

    def pair(results: Results, system: str) -> tuple[float, float]:
        path = f"loads.{load}.{figure}"
        p50 = results.median(question, system, case, f"{path}.p50")
        return p50, results.median(question, system, case, f"{path}.p99")

    return pair


def _ms(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.2f} / {pair[1]:.2f} ms"


def _share_ok(results: Results, question: str, case: str) -> float:
    """Of the streams of all rounds, how many were answered whole."""
    outcomes = [run["loads"]["streams"]["outcomes"] for run in results.runs(question, "endmark", case)]
    if not outcomes:
        raise Missing(case)
    ok: int = sum(counted.get("ok", 0) for counted in outcomes)
    return ok / sum(sum(counted.values()) for counted in outcomes)


_ttft_1 = _pair("latency", "1 stream", "ttft_ms")
_delay_200 = _pair("latency", "200 streams", "delay_ms")
_ttft_500 = _pair("latency", "500 streams", "ttft_ms")
_delay_500 = _pair("latency", "500 streams", "delay_ms")
_ttft_1000 = _pair("latency", "1000 streams", "ttft_ms")
_late_1000 = _pair("latency", "1000 streams", "late_ms")
_delay_1000 = _pair("latency", "1000 streams", "delay_ms")
_first_of_others = _pair("throughput", "flat out", "ttft_ms", load="others")
_ttft_herd = _pair("herd", "200 at once", "ttft_ms")


def _one_stream(results: Results, seam: str) -> Judged:
    ours, theirs = _ttft_1(results, "endmark"), _ttft_1(results, seam)
    return _ms(ours), ours[0] <= theirs[0] + 1 and ours[1] <= theirs[1] + 4


def _delay_at_200(results: Results) -> Judged:
    ours = _delay_200(results, "endmark")
    return _ms(ours), ours[0] <= 0.5 and ours[1] <= 5


def _at_500(results: Results) -> Judged:
    ok, share = _share_ok(results, "latency", "500 streams"), _share_of_offered(results, "endmark")
    ttft, delay = _ttft_500(results, "endmark"), _delay_500(results, "endmark")
    told = f"{ok:.1%} ok, {share:.3f}, {ttft[0]:.2f} ms, {delay[0]:.2f} ms"
    return told, ok == 1 and share >= 0.98 and ttft[0] <= 5 and delay[0] <= 1


def _share_of_offered(results: Results, system: str) -> float:
    return results.median("latency", system, "500 streams", "loads.streams.share_of_offered")


def _at_500_of(results: Results, system: str) -> str:
    ttft, delay = _ttft_500(results, system), _delay_500(results, system)
    return f"{_share_of_offered(results, system):.3f}, {ttft[0]:.2f} ms, {delay[0]:.2f} ms"


def _at_1000(results: Results, seam: str) -> Judged:
    met = all(pair(results, "endmark")[0] < pair(results, seam)[0] for pair in (_ttft_1000, _late_1000))
    return _at_1000_of(results, "endmark"), met


def _at_1000_of(results: Results, system: str) -> str:
    ttft, late, delay = (pair(results, system)[0] for pair in (_ttft_1000, _late_1000, _delay_1000))
    return f"{ttft:.1f} ms, {late:.1f} ms; {delay:.2f} ms"


def _cpu_at_500(results: Results, system: str) -> float:
    return results.median("latency", system, "500 streams", "cpu_us_per_token")


def _cpu(results: Results, seam: str) -> Judged:
    ours = _cpu_at_500(results, "endmark")
    ratio = ours / _cpu_at_500(results, seam)
    return f"{ours:.1f} µs a token, {ratio:.2f} ×", ratio <= 1.5


def _flood(results: Results, system: str) -> float:
    return results.median("throughput", system, "flat out", "loads.flood.tokens_per_s")


def _flat_out(results: Results, seam: str) -> Judged:
    ours, theirs = _flood(results, "endmark"), _flood(results, seam)
    return f"{ours:,.0f} tokens/s, {ours / theirs:.2f} ×", ours >= 2 * theirs and ours >= 100_000


def _others_begin(results: Results) -> Judged:
    ours = _first_of_others(results, "endmark")
    return _ms(ours), ours[1] <= 20


def _api_alone(results: Results) -> Judged:
    def per_core(run: dict[str, Any]) -> float | None:
        used_s: float = run["cost"]["server_s"]["api"]
        return run["loads"]["streams"]["tokens"] / used_s if used_s else None

    rate = results.median_of("throughput", "endmark API", "10 at once", per_core)
    return f"{rate:,.0f} tokens/s", rate >= 100_000


def _herd(results: Results, seam: str) -> Judged:
    ours = _ttft_herd(results, "endmark")
    return f"{ours[0]:.1f} ms", ours[0] <= _ttft_herd(results, seam)[0]


def _idle(results: Results) -> Judged:
    case = "5000 idle streams"
    held, cores, connections = (
        results.median("idle_memory", "endmark", case, name)
        for name in ("api_bytes_per_stream", "api_cores", "api_redis_connections")
    )
    lost = results.median("idle_memory", "endmark", case, "lost")
    told = f"{held / 1024:.1f} kB, {connections:.0f} connections, {cores:.1%} of a core"
    return told, held <= 16 * 1024 and connections <= 4 and cores < 0.03 and lost == 0


def _idle_of(results: Results, system: str) -> str:
    role = "app" if system in (SEAM, BARE_SEAM) else "api"
    held = results.median("idle_memory", system, "5000 idle streams", f"{role}_bytes_per_stream")
    return f"{held / 1024:.1f} kB"


def _start(results: Results, system: str) -> tuple[float, float]:
    p50 = results.median("dispatch", system, "idle", "start_ms.p50")
    return p50, results.median("dispatch", system, "idle", "start_ms.p99")


def _dispatch(results: Results) -> Judged:
    ours = _start(results, "endmark")
    return _ms(ours), ours[0] <= 1 and ours[1] <= 5


def _jobs_per_s(results: Results, system: str, workers: int) -> float:
    return results.median("dispatch", system, f"no-op, {workers} workers", "jobs_per_s")


def _no_op(results: Results) -> Judged:
    one, four, eight = (_jobs_per_s(results, "endmark", workers) for workers in (1, 4, 8))
    met = one >= 4000 and four >= 5000 and eight >= 5000 and four >= ENOUGH * one and eight >= ENOUGH * four
    return f"{one:,.0f} / {four:,.0f} / {eight:,.0f}", met


def _model_per_core(results: Results, system: str) -> float:
    """Of the process that asks the model."""
    role = "app" if system == SEAM else "worker"

    def per_core(run: dict[str, Any]) -> float | None:
        used_s: float = run["cost"]["server_s"][role]
        return sum(load["tokens"] for load in run["loads"].values()) / used_s if used_s else None

    return results.median_of("model_upstream", system, "flat out", per_core)


def _model(results: Results) -> Judged:
    rate = _model_per_core(results, "endmark")
    return f"{rate:,.0f} tokens/s", rate >= 8000


def _of_replicas(results: Results, system: str, case: str) -> tuple[float, float]:
    ttft, delay = (_pair("replicas", case, figure)(results, system)[0] for figure in ("ttft_ms", "delay_ms"))
    return ttft, delay


def _replicas(results: Results) -> Judged:
    one, two = (_of_replicas(results, "endmark", case) for case in ("1 + 1", "2 + 2"))
    return _one_and_two(results, "endmark"), two[0] * ENOUGH <= one[0] and two[1] * ENOUGH <= one[1]


def _one_and_two(results: Results, system: str) -> str:
    one, two = (_of_replicas(results, system, case) for case in ("1 + 1", "2 + 2"))
    return f"{two[0]:.2f} ms, {two[1]:.2f} ms; of one each: {one[0]:.2f} ms, {one[1]:.2f} ms"


GOALS = (
    Goal(
        what="TTFT, 1 stream, p50 / p99",
        goal="seam + 1 ms / seam + 4 ms",
        compare=_one_stream,
        others=lambda results, system: _ms(_ttft_1(results, system)),
    ),
    Goal(
        what="delay of a token, 200 streams, p50 / p99",
        goal="≤ 0.5 ms / ≤ 5 ms",
        judge=_delay_at_200,
        others=lambda results, system: _ms(_delay_200(results, system)),
    ),
    Goal(
        what="500 streams: ok, share of the offered rate, TTFT p50, delay p50",
        goal="all, ≥ 0.98, ≤ 5 ms, ≤ 1 ms",
        judge=_at_500,
        others=_at_500_of,
    ),
    Goal(
        what="1,000 streams: TTFT p50, last token behind an ideal server p50; delay p50",
        goal="the first two better than the seam",
        compare=_at_1000,
        others=_at_1000_of,
    ),
    Goal(
        what="CPU at 500 streams: API, worker and Valkey",
        goal="≤ 1.5 × seam",
        compare=_cpu,
        others=lambda results, system: f"{_cpu_at_500(results, system):.1f} µs a token",
    ),
    Goal(
        what="flat out, 50 streams",
        goal="≥ 2 × seam, ≥ 100,000 tokens/s",
        compare=_flat_out,
        others=lambda results, system: f"{_flood(results, system):,.0f} tokens/s",
    ),
    Goal(
        what="first tokens of others meanwhile, p50 / p99",
        goal="p99 ≤ 20 ms",
        judge=_others_begin,
        others=lambda results, system: _ms(_first_of_others(results, system)),
    ),
    Goal(what="API process alone, a core of it", goal="≥ 100,000 tokens/s", judge=_api_alone),
    Goal(
        what="200 requests at once, TTFT p50",
        goal="≤ seam",
        compare=_herd,
        others=lambda results, system: f"{_ttft_herd(results, system)[0]:.1f} ms",
    ),
    Goal(
        what="5,000 idle streams on one API process: memory of each, connections to Redis, CPU",
        goal="≤ 16 kB, ≤ 4, < 3 % of a core",
        judge=_idle,
        others=_idle_of,
    ),
    Goal(
        what="submitted → agent started, idle, p50 / p99",
        goal="≤ 1 ms / ≤ 5 ms",
        judge=_dispatch,
        others=lambda results, system: _ms(_start(results, system)),
    ),
    Goal(
        what="no-op jobs/s with 1 / 4 / 8 workers",
        goal="≥ 4,000 / 5,000 / 5,000, not falling",
        judge=_no_op,
        others=lambda results, system: f"{_jobs_per_s(results, system, 1):,.0f} with 1",
    ),
    Goal(
        what="from a model over HTTP, a core of the worker",
        goal="≥ 8,000 tokens/s",
        judge=_model,
        others=lambda results, system: f"{_model_per_core(results, system):,.0f} tokens/s",
    ),
    Goal(
        what="2 APIs and 2 workers, TTFT p50 and delay p50",
        goal="no worse than 1 + 1 at half the load",
        judge=_replicas,
        others=_one_and_two,
    ),
)


def verdicts(results: Results) -> list[Verdict]:
    return [goal.verdict(results) for goal in GOALS]
