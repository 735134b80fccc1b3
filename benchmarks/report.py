"""Writes what was measured into docs/performance.md: `python -m benchmarks.report`.

Fills the regions between `<!-- generated: NAME -->` and `<!-- end -->`, and draws the plots beside the page. All of it
follows from the result files alone, so that a second run changes nothing. The plots need the group `bench`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from benchmarks.goals import OTHERS, Missing, Results, verdicts
from benchmarks.rounds import RESULTS
from tests.processes import ROOT

PAGE = ROOT / "docs" / "performance.md"
PLOTS = ROOT / "docs" / "performance"
NOISY_CORES = 0.3  # used by others; above, a run says little about milliseconds

_REGION = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_MARKS = {True: "met", False: "**missed**", None: "–"}
_BESIDE_BARE_SEAM = {True: "met", False: "missed", None: ""}
_SYSTEMS = {"endmark": "Endmark"} | {name: name for name in OTHERS}
# Which loads of which questions are told of, in this order, and how they are called.
_LOADS = (
    ("latency", "streams", "{case}"),
    ("herd", "streams", "{case}"),
    ("burst", "steady", "burst: steady"),
    ("burst", "burst", "burst: burst"),
    ("throughput", "flood", "{case}"),
    ("model_upstream", "streams", "model, {case}"),
    ("model_upstream", "flood", "model, {case}"),
    ("model_upstream", "others", "model, {case}: others"),
    ("replicas", "streams", "{case}"),
)
_LOAD_HEADINGS = (
    "Load",
    "System",
    "ok",
    "TTFT p50 / p99, ms",
    "delay p50 / p99, ms",
    "tokens/s",
    "CPU, µs a token",
    "of it",
)
_COLOURS = {
    "endmark": "tab:blue",
    "seam": "tab:orange",
    "bare seam": "tab:red",
    "bare relay": "tab:purple",
    "naive arq": "tab:green",
}


# -- tables ------------------------------------------------------------------------------------------------------------


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_row(headings), "|" + "---|" * len(headings), *map(_row, rows)]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def goals(results: Results) -> str:
    rows = [
        (
            verdict.what,
            verdict.goal,
            verdict.endmark,
            _MARKS[verdict.is_met],
            *verdict.others.values(),
            _BESIDE_BARE_SEAM[verdict.is_met_beside_bare_seam],
        )
        for verdict in verdicts(results)
    ]
    return table(("What", "Goal", "Endmark", "", *map(str.capitalize, OTHERS), "Beside the bare seam"), rows)


def systems(results: Results) -> str:
    """Every load on every system."""
    rows = []
    for question, load, told in _LOADS:
        for case in sorted({case for system in _SYSTEMS for case in results.cases(question, system)}, key=_by_number):
            for system, name in _SYSTEMS.items():
                if any(load in run["loads"] for run in results.runs(question, system, case)):
                    cells = _load_cells(results, question, system, case, load)
                    rows.append((told.format(case=case), name, *cells))
    return table(_LOAD_HEADINGS, rows)


def nanobot(results: Results) -> str:
    """The same nanobot behind Endmark and behind its own server."""
    names = {"endmark": "Endmark", "endmark, 2 workers": "Endmark, 2 workers", "nanobot serve": "`nanobot serve`"}
    rows = [
        (case, name, *_load_cells(results, "nanobot_serve", system, case, "streams"))
        for case in sorted(
            {case for system in names for case in results.cases("nanobot_serve", system)}, key=_by_number
        )
        for system, name in names.items()
        if results.runs("nanobot_serve", system, case)
    ]
    return table(_LOAD_HEADINGS, rows)


def _load_cells(results: Results, question: str, system: str, case: str, load: str) -> tuple[str, ...]:
    runs = results.runs(question, system, case)
    outcomes = [run["loads"][load]["outcomes"] for run in runs]
    ok = sum(counted.get("ok", 0) for counted in outcomes)

    def median(path: str) -> float:
        return results.median(question, system, case, path)

    def pair(figure: str) -> str:
        return f"{median(f'loads.{load}.{figure}.p50'):.2f} / {median(f'loads.{load}.{figure}.p99'):.2f}"

    tokens = median_tokens(results, question, system, case)
    roles = runs[0]["cost"]["server_s"]
    shares = [f"{role} {median(f'cost.server_s.{role}') * 1e6 / tokens:.1f}" for role in roles]
    return (
        f"{ok} of {sum(sum(counted.values()) for counted in outcomes)}",
        pair("ttft_ms"),
        pair("delay_ms"),
        f"{median(f'loads.{load}.tokens_per_s'):,.0f}",
        f"{median('cpu_us_per_token'):.1f}",
        ", ".join(shares),
    )


def median_tokens(results: Results, question: str, system: str, case: str) -> float:
    return results.median_of(question, system, case, lambda run: sum(load["tokens"] for load in run["loads"].values()))


def growth(results: Results) -> str:
    rows = []
    for case in sorted({case for system in _SYSTEMS for case in results.cases("growth", system)}, key=_by_kind):
        for system, name in _SYSTEMS.items():
            if not results.runs("growth", system, case):
                continue

            def cell(path: str, form: str, system: str = system, case: str = case) -> str:
                try:
                    return format(results.median("growth", system, case, path), form)
                except Missing:
                    return ""

            rows.append(
                (
                    case,
                    name,
                    cell("cpu_us_per_token", ".1f"),
                    cell("loads.streams.ttft_ms.p50", ".2f"),
                    cell("loads.streams.delay_ms.p50", ".2f"),
                    cell("redis_bytes_per_token", ".1f"),
                    cell("redis_bytes_per_job", ".0f"),
                )
            )
    headings = (
        "",
        "System",
        "CPU, µs a token",
        "TTFT p50, ms",
        "delay p50, ms",
        "Redis, bytes a token",
        "Redis, bytes a job",
    )
    return table(headings, rows)


def _by_number(case: str) -> tuple[int, str]:
    """ "200 streams" before "1000 streams", and what begins with no number behind them."""
    number = case.partition(" ")[0]
    return (int(number), case) if number.isdecimal() else (1 << 62, case)


def _by_kind(case: str) -> tuple[str, int]:
    """ "10 open streams" before "100 open streams"."""
    number, _, kind = case.partition(" ")
    return kind, int(number)


def machine(results: Results) -> str:
    """Where and when, and how much others used of the machine."""
    rows = []
    for question, report in results.reports.items():
        foreign = [cores for run in report["runs"] if (cores := _foreign_cores(run)) is not None]
        rounds = 1 + max((run["round"] for run in report["runs"]), default=0)
        failed = sum("failed" in run for run in report["runs"])
        noise = f"{sorted(foreign)[len(foreign) // 2]:.2f}, at most {max(foreign):.2f}" if foreign else ""
        rows.append((question, report["taken"], f"`{report['commit']}`", str(rounds), str(failed), noise))
    runs = table(("Question", "Taken, UTC", "Commit", "Rounds", "Failed runs", "Cores used by others"), rows)
    if not results.reports:
        return runs
    about = next(iter(results.reports.values()))["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    return (
        f"{about['cpu']}, {about['cores']} cores, {about['system']}, Python {about['python']}; {packages}. "
        f"Above {NOISY_CORES} cores used by others, milliseconds say little; ratios and CPU say more.\n\n{runs}"
    )


def _foreign_cores(run: dict[str, Any]) -> float | None:
    cores: float | None = run.get("cost", run).get("foreign_cores")
    return cores


REGIONS: dict[str, Callable[[Results], str]] = {
    "goals": goals,
    "systems": systems,
    "nanobot": nanobot,
    "growth": growth,
    "machine": machine,
}


def fill(page: str, results: Results) -> str:
    """The page with its regions written anew. Raises KeyError for a region that nobody knows."""
    return _REGION.sub(lambda region: f"{region[1]}\n{REGIONS[region[2]](results)}\n{region[3]}", page)


# -- plots -------------------------------------------------------------------------------------------------------------

Points = list[tuple[float, float]]


def draw(results: Results, folder: Path) -> None:
    """One SVG for each plot; a plot without figures is left as it was."""
    folder.mkdir(exist_ok=True)
    for figure, title in (("ttft_ms", "time to first token"), ("delay_ms", "delay of a token")):
        lines = {
            f"{name}, {quantile}": _over(results, "latency", system, " stream", f"loads.streams.{figure}.{quantile}")
            for system, name in _SYSTEMS.items()
            for quantile in ("p50", "p99")
        }
        _plot(folder / f"{figure.removesuffix('_ms')}.svg", lines, title=title, x="streams", y="ms")
    for kind, name in ((" open streams", "open-streams"), (" tokens a job", "tokens-a-job")):
        lines = {told: _over(results, "growth", system, kind, "cpu_us_per_token") for system, told in _SYSTEMS.items()}
        _plot(folder / f"{name}.svg", lines, title="CPU of all processes", x=kind.strip(), y="µs a token")
    jobs = {
        "Endmark": [
            (float(case.removeprefix("no-op, ").split()[0]), results.median("dispatch", "endmark", case, "jobs_per_s"))
            for case in results.cases("dispatch", "endmark")
            if case.startswith("no-op") and results.runs("dispatch", "endmark", case)
        ]
    }
    _plot(folder / "jobs.svg", jobs, title="no-op jobs", x="workers", y="jobs/s", scales="")


def _over(results: Results, question: str, system: str, kind: str, path: str) -> Points:
    """A figure over the number with which the names of the cases begin."""
    return sorted(
        (float(case.split()[0]), results.median(question, system, case, path))
        for case in results.cases(question, system)
        if kind in case and results.runs(question, system, case)
    )


def _plot(path: Path, lines: dict[str, Points], *, title: str, x: str, y: str, scales: str = "xy") -> None:
    """`scales` names the axes that are logarithmic."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    if not any(lines.values()):
        return
    mpl.rcParams["svg.hashsalt"] = "endmark"  # the same figures give the same file
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for name, points in lines.items():
        if points:
            style = "--" if "p99" in name else "-"
            colour = _COLOURS[name.partition(",")[0].lower()]
            axes.plot(*zip(*sorted(points), strict=True), style, marker="o", markersize=4, color=colour, label=name)
    if "x" in scales:
        axes.set_xscale("log")
    if "y" in scales:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


@click.command(help=__doc__)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="Where the raw figures are.")
def main(results: Path) -> None:
    if find_spec("matplotlib") is None:
        raise click.ClickException("the plots need matplotlib: make .venv/.bench")
    measured = Results.read(results)
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), measured), encoding="utf-8")
    draw(measured, PLOTS)


if __name__ == "__main__":
    main()
