"""The short set, in less than five minutes: `python -m benchmarks.short`. Prints each goal and what was measured.

One round, and shorter than the full set (benchmarks/full.py): good to see what a change has done, not to publish.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks import burst, dispatch, herd, idle_memory, latency, model_upstream, replicas, throughput
from benchmarks.goals import OTHERS, Results, Verdict, verdicts
from benchmarks.rounds import run_rounds, write_results

WIDTH = 200  # of the table, where it goes into a file


def show(judged: list[Verdict]) -> None:
    table = Table(title="goals, and medians of what was measured")
    for heading in ("", "goal", "Endmark", "", *OTHERS, "beside the bare seam"):
        table.add_column(heading, overflow="fold")
    for one in judged:
        beside_bare_seam = "" if one.is_met_beside_bare_seam is None else mark(one.is_met_beside_bare_seam)
        table.add_row(one.what, one.goal, one.endmark, mark(one.is_met), *one.others.values(), beside_bare_seam)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(table)


def mark(is_met: bool | None) -> str:
    return {True: "met", False: "missed", None: "?"}[is_met]


@click.command(help=__doc__)
@click.option("--rounds", default=1, show_default=True, help="How often each case is run.")
@click.option("--idle-streams", default=5000, show_default=True, help="Open at the same time.")
def main(rounds: int, idle_streams: int) -> None:
    sets = {
        "latency": latency.cases(short=True),
        "throughput": throughput.cases(short=True),
        "herd": herd.cases(),
        "burst": burst.cases(short=True),
        "dispatch": dispatch.cases(short=True),
        "model_upstream": model_upstream.cases(short=True),
        "replicas": replicas.cases(short=True),
        "idle_memory": idle_memory.cases(idle_streams, short=True),
    }
    with tempfile.TemporaryDirectory() as name:
        for question, cases in sets.items():
            write_results(question, run_rounds(cases, rounds), Path(name))
        show(verdicts(Results.read(Path(name))))


if __name__ == "__main__":
    main()
