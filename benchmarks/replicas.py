"""Whether more processes carry more: `python -m benchmarks.replicas [--rounds 3]`.

One API process and one worker with 100 streams, against two and two with 200.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from benchmarks.load import Load
from benchmarks.rounds import Case, conclude, loaded, options, run_rounds
from benchmarks.systems import endmark

HALF = Load(users=100, tokens=200, interval_ms=20)
WHOLE = Load(users=200, tokens=200, interval_ms=20)


def cases() -> list[Case]:
    return [
        loaded("endmark", f"{number} + {number}", partial(endmark, apis=number, workers=number), {"streams": load})
        for number, load in ((1, HALF), (2, WHOLE))
    ]


@click.command(help=__doc__)
@options(rounds=3)
def main(rounds: int, results: Path) -> None:
    conclude("replicas", run_rounds(cases(), rounds), results)


if __name__ == "__main__":
    main()
