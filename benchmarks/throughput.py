"""How many tokens get through: `python -m benchmarks.throughput [--rounds 3]`.

    flat out        50 streams whose agent speaks as fast as it can; others begin beside them and want their tokens
    flat out by 8   the same, with an event loop that turns after every eighth token only
    short answers   50 users who ask for one token, again and again: answers a second
    API alone       one API process; the entries come from a publisher without an agent, one token each

All but the last against the seams and the naive version, as far as that can follow.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import redis

from benchmarks.load import Load
from benchmarks.rounds import Case, conclude, loaded, options, run_rounds
from benchmarks.systems import MAX_JOBS, PREFIX, START_TIMEOUT_S, SYSTEMS, Serving, Start, endmark
from tests.processes import running
from tests.waiting import wait_until

FLOOD = Load(users=50, tokens=10_000, interval_ms=0, ramp_s=0.1, words="b=1")
OTHERS = Load(users=4, tokens=3, interval_ms=10, rounds=20, ramp_s=0.5, think_s=0.15)
ANSWERS = Load(users=50, tokens=1, interval_ms=0, rounds=100, ramp_s=0.1, think_s=0)
FED = Load(users=50, tokens=10_000, interval_ms=0, ramp_s=0.1)
FED_AT_ONCE = (10, 1)


@contextmanager
def fed_api(folder: Path, *, at_once: int) -> Iterator[Serving]:
    """One API process without a worker, and a publisher in its place."""
    with endmark(folder, workers=0) as serving:
        settings = {
            "ENDMARK_REDIS_URL": serving.redis_url or "",
            "ENDMARK_PREFIX": PREFIX,
            "ENDMARK_MAX_JOBS": str(MAX_JOBS),
        }
        (folder / "feeder").mkdir()
        command = [sys.executable, "-m", "benchmarks.feeder", "--at-once", str(at_once)]
        with running(command, folder=folder / "feeder", env=settings) as feeder:
            with redis.Redis.from_url(serving.redis_url or "") as client:
                wait_until(
                    lambda: client.zcard(f"{PREFIX}:workers"), timeout=START_TIMEOUT_S, description="the publisher"
                )
            yield replace(serving, name="endmark API", tools=(feeder.process.pid,))


def cases(*, short: bool = False) -> list[Case]:
    share = 2 if short else 1
    flood, fed = replace(FLOOD, tokens=FLOOD.tokens // share), replace(FED, tokens=FED.tokens // share)
    by_8 = replace(flood, words="b=8")
    naive = replace(flood, tokens=flood.tokens // 10)
    runs: list[tuple[str, str, Start, Load]] = [
        ("endmark", "flat out", endmark, flood),
        ("seam", "flat out", SYSTEMS["seam"], flood),
        ("bare seam", "flat out", SYSTEMS["bare seam"], flood),
        ("naive arq", "flat out", SYSTEMS["naive arq"], naive),
    ]
    if not short:
        runs += [(system, "flat out by 8", SYSTEMS[system], by_8) for system in ("endmark", "seam", "bare seam")]
    flooded = [loaded(system, name, start, {"flood": load, "others": OTHERS}) for system, name, start, load in runs]
    if not short:
        few = replace(ANSWERS, rounds=ANSWERS.rounds // 10)  # what the naive version can follow
        flooded += [
            loaded(system, "short answers", start, {"flood": few if system == "naive arq" else ANSWERS})
            for system, start in SYSTEMS.items()
        ]
    return flooded + [
        loaded("endmark API", f"{at_once} at once", partial(fed_api, at_once=at_once), {"streams": fed})
        for at_once in (FED_AT_ONCE[:1] if short else FED_AT_ONCE)
    ]


@click.command(help=__doc__)
@options(rounds=3)
def main(rounds: int, results: Path) -> None:
    conclude("throughput", run_rounds(cases(), rounds), results)


if __name__ == "__main__":
    main()
