"""What 200 requests get that come at the same moment: `python -m benchmarks.herd [--rounds 5]`.

Each is a new connection. Endmark against the seams, the bare relay and the naive version.
"""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.load import Load
from benchmarks.rounds import Case, conclude, loaded, options, run_rounds
from benchmarks.systems import SYSTEMS

HERD = Load(users=200, tokens=20, interval_ms=20, ramp_s=0)


def cases() -> list[Case]:
    return [loaded(system, "200 at once", start, {"streams": HERD}) for system, start in SYSTEMS.items()]


@click.command(help=__doc__)
@options(rounds=5)
def main(rounds: int, results: Path) -> None:
    conclude("herd", run_rounds(cases(), rounds), results)


if __name__ == "__main__":
    main()
