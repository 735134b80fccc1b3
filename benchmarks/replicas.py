"""Whether more processes carry more: `python -m benchmarks.replicas [--rounds 3]`.

One API process and one worker with 100 streams, against two and two with 200; the seam with one process and with two.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import click

from benchmarks.load import Load
from benchmarks.rounds import Case, conclude, loaded, options, run_rounds
from benchmarks.systems import Serving, endmark, naive_arq, seam

HALF = Load(users=100, tokens=200, interval_ms=20)
WHOLE = Load(users=200, tokens=200, interval_ms=20)


def cases(*, short: bool = False) -> list[Case]:
    made: list[Case] = []
    for number, load in ((1, HALF), (2, WHOLE)):
        both: dict[str, Any] = {"apis": number, "workers": number}
        starts: dict[str, Callable[..., AbstractContextManager[Serving]]] = {"endmark": partial(endmark, **both)}
        if not short:
            starts |= {"seam": partial(seam, apis=number), "naive arq": partial(naive_arq, **both)}
        made += [loaded(system, f"{number} + {number}", start, {"streams": load}) for system, start in starts.items()]
    return made


@click.command(help=__doc__)
@options(rounds=3)
def main(rounds: int, results: Path) -> None:
    conclude("replicas", run_rounds(cases(), rounds), results)


if __name__ == "__main__":
    main()
