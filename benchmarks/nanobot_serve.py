"""The same nanobot behind Endmark and behind its own server: `python -m benchmarks.nanobot_serve [--rounds 3]`.

    1 stream       10 tokens at 5 ms, one stream after another
    100 streams    200 tokens at 20 ms each, begun within four seconds
    flat out       20 streams of a model that speaks as fast as it is read

nanobot asks a scripted model (tests/upstream.py). Each stream is the first turn of a session of its own, since nanobot
answers those of one session one by one. Endmark with one worker, and with two, as `nanobot serve` cannot have. That one
needs aiohttp, which the group `bench` brings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from benchmarks.load import Load
from benchmarks.model_upstream import scripted_model
from benchmarks.rounds import Case, conclude, loaded, options, run_rounds
from benchmarks.systems import Serving, endmark, nanobot_serve

LOADS = {
    "1 stream": Load(users=1, tokens=10, interval_ms=5, rounds=60, think_s=0.05, in_sessions=True),
    "100 streams": Load(users=100, tokens=200, interval_ms=20, in_sessions=True),
    "flat out": Load(users=20, tokens=500, interval_ms=0, ramp_s=0.2, in_sessions=True),
}
SYSTEMS: dict[str, Callable[..., AbstractContextManager[Serving]]] = {
    "endmark": partial(endmark, agent="nanobot"),
    "endmark, 2 workers": partial(endmark, agent="nanobot", workers=2),
    "nanobot serve": nanobot_serve,
}


@contextmanager
def with_nanobot(system: str, folder: Path) -> Iterator[Serving]:
    """A system whose nanobot asks the scripted model, with a configuration and a workspace of its own."""
    with scripted_model(folder) as (base_url, model_pid):
        defaults = {"workspace": str(folder / "workspace"), "model": "mock", "provider": "custom"}
        providers = {"custom": {"apiKey": "not-needed", "apiBase": base_url}}
        config = folder / "config.json"
        config.write_text(json.dumps({"agents": {"defaults": defaults}, "providers": providers}))
        with SYSTEMS[system](folder, environment={"NANOBOT_CONFIG": str(config)}) as serving:
            yield replace(serving, tools=(model_pid,))


def cases() -> list[Case]:
    return [
        loaded(system, name, partial(with_nanobot, system), {"streams": load})
        for system in SYSTEMS
        for name, load in LOADS.items()
    ]


@click.command(help=__doc__)
@options(rounds=3)
def main(rounds: int, results: Path) -> None:
    conclude("nanobot_serve", run_rounds(cases(), rounds), results)


if __name__ == "__main__":
    main()
