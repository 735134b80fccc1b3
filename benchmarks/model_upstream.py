"""What a model over HTTP costs: `python -m benchmarks.model_upstream [--rounds 3]`.

The `openai` agent, which asks a scripted model (tests/upstream.py) through the official SDK. Flat out it shows how many
tokens a second one worker's core can take from a model; at 20 ms, what a user sees.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click

from benchmarks.load import Load
from benchmarks.rounds import Case, conclude, loaded, options, run_rounds
from benchmarks.systems import Serving, endmark
from tests.deployment import free_port
from tests.processes import running

FLAT_OUT = Load(users=20, tokens=2000, interval_ms=0, ramp_s=0.2)
PACED = Load(users=100, tokens=200, interval_ms=20)


@contextmanager
def behind_a_model(folder: Path) -> Iterator[Serving]:
    """One API and one worker, whose agent asks the scripted model."""
    port = free_port()
    (folder / "model").mkdir()
    command = [sys.executable, "-m", "tests.upstream", "--port", str(port)]
    with running(command, folder=folder / "model") as model:
        model.wait_for_output("scripted model on")
        environment = {"OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1", "OPENAI_API_KEY": "not-needed"}
        with endmark(folder, agent="openai", environment=environment) as serving:
            yield replace(serving, name="endmark, openai agent", tools=(model.process.pid,))


def cases(*, short: bool = False) -> list[Case]:
    loads = {"flat out": FLAT_OUT} if short else {"flat out": FLAT_OUT, "100 streams": PACED}
    return [loaded("endmark", name, behind_a_model, {"streams": load}) for name, load in loads.items()]


@click.command(help=__doc__)
@options(rounds=3)
def main(rounds: int, results: Path) -> None:
    conclude("model_upstream", run_rounds(cases(), rounds), results)


if __name__ == "__main__":
    main()
