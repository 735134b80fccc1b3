"""How long a token takes: `python -m benchmarks.latency [--rounds 3]`.

    1 stream        TTFT, one stream after another
    200 streams     200 tokens at 20 ms each, over and over by 200 users: the delay of every token
    500 streams     the same, and whether the offered rate is delivered and what it costs
    1,000 streams   the same, beyond what the seam's one core can do

Endmark against both seams and the bare relay in every case, and against the naive version as far as that can follow.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from benchmarks.load import Load
from benchmarks.rounds import Case, conclude, loaded, options, run_rounds
from benchmarks.systems import SYSTEMS

ONE = Load(users=1, tokens=10, interval_ms=5, rounds=200, think_s=0.05)
PACED = {
    name: Load(users=users, tokens=200, interval_ms=20, rounds=2)
    for name, users in (
        ("200 streams", 200),
        ("500 streams", 500),
        ("1000 streams", 1000),
    )
}
LOADS = {"1 stream": ONE} | PACED
FEW = {"1 stream": replace(ONE, rounds=20), "200 streams": PACED["200 streams"]}  # what the naive version can follow
SHORT = {"1 stream": replace(ONE, rounds=100)} | {name: replace(load, rounds=1) for name, load in PACED.items()}
SHORT_FEW = {"200 streams": replace(PACED["200 streams"], rounds=1)}


def cases(*, short: bool = False) -> list[Case]:
    plans = (
        {"endmark": SHORT, "seam": SHORT, "bare seam": SHORT, "naive arq": SHORT_FEW}
        if short
        else {"endmark": LOADS, "seam": LOADS, "bare seam": LOADS, "bare relay": LOADS, "naive arq": FEW}
    )
    return [
        loaded(system, name, SYSTEMS[system], {"streams": load})
        for system, loads in plans.items()
        for name, load in loads.items()
    ]


@click.command(help=__doc__)
@options(rounds=3)
def main(rounds: int, results: Path) -> None:
    conclude("latency", run_rounds(cases(), rounds), results)


if __name__ == "__main__":
    main()
