"""What a model over HTTP costs: `python -m benchmarks.model_upstream [--rounds 3]`.

All ask a scripted model (tests/upstream.py): Endmark with its `openai` agent, the seam and the naive version through
the official SDK, as its documentation shows it. Flat out it shows how many tokens a second one worker's core can take
from a model, and whether others get their first tokens beside it; at 20 ms, what a user sees.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from benchmarks.load import Load
from benchmarks.rounds import Case, conclude, loaded, options, run_rounds
from benchmarks.systems import Serving, endmark, naive_arq, seam
from benchmarks.throughput import OTHERS
from tests.deployment import free_port
from tests.processes import running

FLAT_OUT = Load(users=20, tokens=2000, interval_ms=0, ramp_s=0.2)
PACED = Load(users=100, tokens=200, interval_ms=20)
LOADS = {"flat out": {"flood": FLAT_OUT, "others": OTHERS}, "100 streams": {"streams": PACED}}
START: dict[str, Callable[..., AbstractContextManager[Serving]]] = {
    "endmark": partial(endmark, agent="openai"),
    "seam": seam,
    "naive arq": naive_arq,
}


@contextmanager
def scripted_model(folder: Path) -> Iterator[tuple[str, int]]:
    """As a process of its own: its base URL and its process id."""
    port = free_port()
    (folder / "model").mkdir()
    command = [sys.executable, "-m", "tests.upstream", "--port", str(port)]
    with running(command, folder=folder / "model") as model:
        model.wait_for_output("scripted model on")
        yield f"http://127.0.0.1:{port}/v1", model.process.pid


@contextmanager
def behind_a_model(system: str, folder: Path) -> Iterator[Serving]:
    """A system whose agent asks the scripted model."""
    with scripted_model(folder) as (base_url, model_pid):
        environment = {"OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": "not-needed"}
        with START[system](folder, environment=environment) as serving:
            yield replace(serving, tools=(model_pid,))


def cases(*, short: bool = False) -> list[Case]:
    systems = ("endmark", "seam") if short else tuple(START)
    loads = {"flat out": {"flood": replace(FLAT_OUT, tokens=1000), "others": OTHERS}} if short else LOADS
    return [
        loaded(system, name, partial(behind_a_model, system), load)
        for system in systems
        for name, load in loads.items()
    ]


@click.command(help=__doc__)
@options(rounds=3)
def main(rounds: int, results: Path) -> None:
    conclude("model_upstream", run_rounds(cases(), rounds), results)


if __name__ == "__main__":
    main()
