"""What streams that are open notice of a burst: `python -m benchmarks.burst [--rounds 3]`.

    steady   100 streams, 200 tokens at 20 ms each
    burst    100 more requests at one moment, when all of those are open: 500 tokens each, as fast as they are taken

Endmark against the seams and the naive version. The delays of the steady streams are the answer.
"""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.load import Load
from benchmarks.rounds import Case, conclude, loaded, options, run_rounds
from benchmarks.systems import SYSTEMS

STEADY = Load(users=100, tokens=200, interval_ms=20, ramp_s=1)
BURST = Load(users=100, tokens=500, interval_ms=0, begins_s=2, ramp_s=0, words="b=1")
AGAINST = ("endmark", "seam", "bare seam", "naive arq")
SHORT_AGAINST = ("endmark", "seam")


def cases(*, short: bool = False) -> list[Case]:
    loads = {"steady": STEADY, "burst": BURST}
    return [loaded(system, "burst", SYSTEMS[system], loads) for system in (SHORT_AGAINST if short else AGAINST)]


@click.command(help=__doc__)
@options(rounds=3)
def main(rounds: int, results: Path) -> None:
    conclude("burst", run_rounds(cases(), rounds), results)


if __name__ == "__main__":
    main()
