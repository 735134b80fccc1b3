"""Every benchmark, one after another, and then the report: `python -m benchmarks.full [--rounds 3]`.

Takes about an hour, and needs nobody: a benchmark that fails is told, and the others go on. Nothing else should run on
the machine meanwhile; each run notes how much of it was used by others.
"""

from __future__ import annotations

import subprocess
import sys

import click

QUESTIONS = {  # with how many rounds for one round of the whole
    "latency": 1,
    "throughput": 1,
    "herd": 2,
    "burst": 1,
    "dispatch": 1,
    "model_upstream": 1,
    "nanobot_serve": 1,
    "replicas": 1,
}
ONCE = ("idle_memory", "growth")  # long, and steady enough


@click.command(help=__doc__)
@click.option("--rounds", default=3, show_default=True, help="How often each case is run.")
def main(rounds: int) -> None:
    plan = {question: times * rounds for question, times in QUESTIONS.items()} | dict.fromkeys(ONCE, 1)
    failed = [question for question, times in plan.items() if _run(question, "--rounds", str(times))]
    if _run("report"):
        failed.append("report")
    if failed:
        raise click.ClickException(f"something failed in: {', '.join(failed)}")


def _run(name: str, *arguments: str) -> int:
    click.echo(f"-- {name} {' '.join(arguments)}", err=True)
    return subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], check=False).returncode


if __name__ == "__main__":
    main()
