"""The commands that look into a running deployment, and act on it: `endmark jobs | workers | queue | top`.

Exit codes: 0 done; 1 the API refused, or the job that was watched did not succeed; 2 wrong usage; 3 no such job or
worker; 4 nobody answers. With `--json` the answer of the API is printed as it came, one document.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import wraps
from typing import Any, TypeVar

import click
import httpx
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from cli.api_client import ApiClient, ApiUnreachable, Event, path_of
from cli.terminal import plain

F = TypeVar("F", bound=Callable[..., Any])

STATUSES = ("queued", "running", "succeeded", "failed", "cancelled")
_STYLE = {"queued": "yellow", "running": "cyan", "succeeded": "green", "failed": "red", "cancelled": "magenta"}
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
RECONNECTS, RECONNECT_S = 10, 0.5  # of a tail whose connection broke
PAGE = 100
ID_LENGTH = 41  # of a job
WIDE = 200  # a table that goes into a file or a pipe


class Instant(click.ParamType[int]):
    """`90s`, `10m`, `1h`, `2d` ago, or an ISO 8601 date or time; as ms since the epoch."""

    name = "when"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if match := re.fullmatch(r"(\d{1,9})([smhd])", value):
            return round((time.time() - int(match[1]) * _UNITS_S[match[2]]) * 1000)
        try:
            instant = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is neither like 90s, 10m, 1h or 2d, nor a date like 2026-11-20T10:00.", param, ctx)
        return round(instant.timestamp() * 1000)


class Pair(click.ParamType[tuple[str, str]]):
    """`key=value`."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        key, separator, content = value.partition("=")
        if not separator or not key:
            self.fail(f"{value!r} is not key=value.", param, ctx)
        return key, content


def talks_to_the_api(command: F) -> F:
    """Adds --url, --key and --json, and hands the command its client."""

    @click.option(
        "--url", envvar="ENDMARK_URL", show_envvar=True, help="The API; by default that of this machine's settings."
    )
    @click.option(
        "--key",
        envvar="ENDMARK_KEY",
        show_envvar=True,
        help="An API key or an admin key; by default this machine's first.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print what the API says as JSON.")
    @wraps(command)  # first, since it takes over the options that the command has already
    def wrapped(url: str | None, key: str | None, *args: Any, **options: Any) -> Any:
        return command(ApiClient.from_options(url, key), *args, **options)

    return wrapped  # type: ignore[return-value]  # the same command with three options more


def filters(command: F) -> F:
    """Adds the options that choose jobs, and hands the command the query that they make."""

    @click.option("--status", type=click.Choice(STATUSES), help="Only jobs in this state.")
    @click.option("--kind", type=click.Choice(["chat", "response"]), help="By which API they were asked for.")
    @click.option("--model", help="Of this model.")
    @click.option("--session", help="Of this session key.")
    @click.option("--tenant", help="Of this tenant (operators).")
    @click.option("--code", help="Ended with this error code.")
    @click.option("--worker", help="Executed by this worker.")
    @click.option("--metadata", type=Pair(), multiple=True, help="With this metadata; may be repeated.")
    @click.option("--since", type=Instant(), help="Accepted since: 90s, 10m, 1h, 2d ago, or a date.")
    @click.option("--until", type=Instant(), help="Accepted before: the same.")
    @wraps(command)
    def wrapped(*args: Any, metadata: tuple[tuple[str, str], ...], **options: Any) -> Any:
        names = ("status", "kind", "model", "session", "tenant", "code", "worker", "since", "until")
        query = {name: value for name in names if (value := options.pop(name)) is not None}
        query |= {f"metadata[{key}]": value for key, value in metadata}
        return command(*args, query=query, **options)

    return wrapped  # type: ignore[return-value]  # the same command with options more


@click.group()
def jobs() -> None:
    """Look at jobs, watch them, act on them."""


@jobs.command("list")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="How many at most.")
@click.option("--oldest-first", is_flag=True, help="The oldest first.")
@filters
@talks_to_the_api
def list_jobs(api: ApiClient, as_json: bool, limit: int, oldest_first: bool, query: dict[str, Any]) -> None:
    """List jobs, the latest first."""
    found = list(_pages(api, query | {"order": "asc" if oldest_first else "desc"}, limit))
    if as_json:
        _print_json({"object": "list", "data": found})
        return
    table = Table(_ids("job"), "status", "accepted", "wait", "first token", "run", "model", "error", box=None)
    for job in found:
        _row(
            table,
            job["id"],
            _status(job["status"]),
            _instant(job["accepted_ms"]),
            _between(job["accepted_ms"], job["started_ms"]),
            _between(job["accepted_ms"], job["first_token_ms"]),
            _between(job["started_ms"], job["finished_ms"]),
            job["model"],
            (job["error"] or {}).get("code", ""),
        )
    _print_table(table, "No such jobs." if not found else None)


@jobs.command()
@filters
@talks_to_the_api
def count(api: ApiClient, as_json: bool, query: dict[str, Any]) -> None:
    """Count jobs by state and by error code."""
    counts = api.get("/v1/jobs/counts", query)
    if as_json:
        _print_json(counts)
        return
    table = Table("state", "jobs", box=None)
    for status in STATUSES:
        _row(table, _status(status), str(counts["by_status"].get(status, 0)))
    for code, number in sorted(counts["by_code"].items()):
        _row(table, f"  {code}", str(number))
    _print_table(table)


@jobs.command()
@click.argument("job_id")
@talks_to_the_api
def show(api: ApiClient, as_json: bool, job_id: str) -> None:
    """Show everything about one job."""
    job = api.get(f"/v1/jobs/{path_of(job_id)}")
    if as_json:
        _print_json(job)
        return
    console = Console(soft_wrap=True)
    table = Table(show_header=False, box=None)
    for name in ("id", "kind", "model", "tenant", "session", "attempt", "worker", "finish_reason", "retry_of"):
        if job.get(name) not in (None, ""):
            _row(table, name, str(job[name]))
        if name == "kind":
            _row(table, "status", _status(job["status"]))
    for key, value in job["metadata"].items():
        _row(table, f"metadata {key}", value)
    for name, value in job["timings"].items():
        if value is not None:
            _row(table, name.removesuffix("_ms").replace("_", " "), _duration(value))
    console.print(table)
    console.print()
    for step in job["timeline"]:
        details = [f"attempt {step['attempt']}" if step["attempt"] else "", step["worker"] or ""]
        console.print(
            plain(f"{_instant(step['at_ms'])}  {step['what'].replace('_', ' ')}  {'  '.join(details)}".rstrip())
        )
    if job["error"]:
        console.print(plain(f"\n{job['error']['code']}: {job['error']['message']}", style="red"))
    if job["traceback"]:
        console.print(plain(job["traceback"], style="dim"))
    if job["answer"]:
        console.print(plain(f"\n{job['answer']['text']}"))


@jobs.command()
@click.argument("job_id")
@click.option("--speed", type=click.FloatRange(min=0.01), help="Replay a finished job with its timing, so much faster.")
@talks_to_the_api
def tail(api: ApiClient, as_json: bool, job_id: str, speed: float | None) -> None:
    """Watch what a job says, from its beginning to its end. With --json, one event a line."""
    console = Console(soft_wrap=True, highlight=False)
    status = None
    for event in _all_events(api, job_id, speed):
        if as_json:
            click.echo(json.dumps({"id": event.number, "event": event.name, "data": event.data}))
        else:
            _print_event(console, event)
        if event.name == "end":
            status = event.data["status"]
    if status != "succeeded":
        raise SystemExit(1)


@jobs.command()
@click.argument("job_ids", nargs=-1, required=True)
@talks_to_the_api
def cancel(api: ApiClient, as_json: bool, job_ids: tuple[str, ...]) -> None:
    """Cancel jobs. Those that have ended stay as they are."""
    _act(as_json, [api.post(f"/v1/jobs/{path_of(job_id)}/cancel") for job_id in job_ids])


@jobs.command()
@click.argument("job_ids", nargs=-1, required=True)
@talks_to_the_api
def retry(api: ApiClient, as_json: bool, job_ids: tuple[str, ...]) -> None:
    """Ask for jobs again, each as a new one. One that has not ended is refused."""
    _act(as_json, [api.post(f"/v1/jobs/{path_of(job_id)}/retry") for job_id in job_ids])


@jobs.command()
@click.argument("job_ids", nargs=-1, required=True)
@talks_to_the_api
def delete(api: ApiClient, as_json: bool, job_ids: tuple[str, ...]) -> None:
    """Delete jobs that have ended, with all that they said."""
    deleted = [api.delete(f"/v1/jobs/{path_of(job_id)}") for job_id in job_ids]
    if as_json:
        _print_json(deleted)
        return
    for job in deleted:
        _echo(f"{job['id']}  deleted")


@jobs.command()
@click.argument("action", type=click.Choice(["cancel", "retry"]))
@click.option("--yes", is_flag=True, help="Do it without asking.")
@click.option("--dry-run", is_flag=True, help="Only tell which jobs it would be.")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True, help="How many at most.")
@filters
@talks_to_the_api
def bulk(
    api: ApiClient, as_json: bool, action: str, yes: bool, dry_run: bool, limit: int, query: dict[str, Any]
) -> None:
    """Cancel or retry all jobs that the filters choose (operators)."""
    body: dict[str, Any] = {"filters": _as_object(query), "limit": limit}
    would = api.post(f"/v1/jobs/{action}", body | {"dry_run": True})
    if not dry_run and would["matched"]:
        if not yes:
            click.confirm(f"{action} {would['matched']} jobs?", abort=True, err=True)
        would = api.post(f"/v1/jobs/{action}", body | {"dry_run": False})
    if as_json:
        _print_json(would)
        return
    for job_id in would["ids"]:
        _echo(job_id)
    for refused in would["refused"]:
        _echo(f"{refused['id']}  {refused['reason']}", err=True)
    verb = "would be" if dry_run else "were"
    click.echo(f"{would['matched'] if dry_run else would['done']} jobs {verb} asked to {action}", err=True)


@click.group(invoke_without_command=True)
@talks_to_the_api
@click.pass_context
def workers(context: click.Context, api: ApiClient, as_json: bool) -> None:
    """See the workers, or drain one (operators)."""
    if context.invoked_subcommand is not None:
        return
    listed = api.get("/v1/workers")
    if as_json:
        _print_json(listed)
        return
    table = Table("worker", "agent", "jobs", "started", "last beat", "version", "", box=None)
    for worker in listed["data"]:
        _row(
            table,
            worker["id"],
            worker["agent"],
            f"{len(worker['jobs'])}/{worker['max_jobs']}",
            _instant(worker["started_ms"]),
            _instant(worker["last_beat_ms"]),
            worker["version"],
            "draining" if worker["draining"] else "",
        )
    _print_table(table, "No worker is running." if not listed["data"] else None)


@workers.command("drain")
@click.argument("worker_id")
@talks_to_the_api
def drain_worker(api: ApiClient, as_json: bool, worker_id: str) -> None:
    """Let a worker finish what it runs, and leave."""
    drained = api.post(f"/v1/workers/{path_of(worker_id)}/drain")
    _print_json(drained) if as_json else _echo(f"{drained['id']}  drains")


@click.group(invoke_without_command=True)
@talks_to_the_api
@click.pass_context
def queue(context: click.Context, api: ApiClient, as_json: bool) -> None:
    """See the queue, pause it, resume it (operators)."""
    if context.invoked_subcommand is None:
        _print_queue(api.get("/v1/queue"), as_json)


@queue.command()
@click.option("--for", "for_s", type=click.FloatRange(min=1), default=86400, show_default=True, help="Seconds.")
@talks_to_the_api
def pause(api: ApiClient, as_json: bool, for_s: float) -> None:
    """Let nothing start until `resume`, or for so long. What runs goes on."""
    _print_queue(api.post("/v1/queue/pause", {"for_s": for_s}), as_json)


@queue.command()
@talks_to_the_api
def resume(api: ApiClient, as_json: bool) -> None:
    """Let jobs start again."""
    _print_queue(api.post("/v1/queue/resume"), as_json)


def _pages(api: ApiClient, query: dict[str, Any], limit: int) -> Iterator[dict[str, Any]]:
    after = None
    while limit > 0:
        page = api.get("/v1/jobs", query | {"limit": min(limit, PAGE), "after": after})
        yield from page["data"]
        limit -= len(page["data"])
        after = page["next_cursor"]
        if not page["has_more"]:
            return


def _all_events(api: ApiClient, job_id: str, speed: float | None) -> Iterator[Event]:
    """Every event once, in order, over as many connections as it takes."""
    seen, failures = 0, 0
    while True:
        try:
            for event in api.events(job_id, starting_after=seen, speed=speed):
                seen, failures = event.number or seen, 0
                yield event
                if event.name == "end":
                    return
        except (ApiUnreachable, httpx.HTTPError):
            if failures == RECONNECTS:
                raise
        failures += 1
        if failures > RECONNECTS:
            return
        time.sleep(RECONNECT_S)


def _print_event(console: Console, event: Event) -> None:
    match event.name:
        case "delta":
            console.print(plain(event.data["text"]), end="")
        case "reasoning":
            console.print(plain(event.data["text"], style="dim"), end="")
        case "tool":
            detail = f": {event.data['detail']}" if event.data.get("detail") else ""
            console.print(plain(f"\n[{event.data['name']} {event.data['status']}{detail}]", style="cyan"))
        case "tool_call":
            console.print(plain(f"\n[call {json.dumps(event.data)}]", style="cyan"))
        case "end":
            error = event.data["error"]
            ending = f"{error['code']}: {error['message']}" if error else event.data["finish_reason"]
            console.print(plain(f"\n{event.data['status']} ({ending})", style=_STYLE[event.data["status"]]))


def _act(as_json: bool, acted: list[dict[str, Any]]) -> None:
    if as_json:
        _print_json(acted)
        return
    console = Console(soft_wrap=True)
    for job in acted:
        console.print(Text.assemble(plain(job["id"]), "  ", _status(job["status"])))


def _print_queue(state: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(state)
        return
    table = Table(show_header=False, box=None)
    _row(table, "running", f"{state['running']} of {state['slots']} slots on {state['workers']} workers")
    _row(table, "claimable", str(state["claimable"]))
    _row(table, "waiting for a turn", str(state["waiting_for_a_turn"]))
    _row(table, "oldest wait", _duration(state["oldest_wait_ms"]))
    latest = state["last_minute"]
    ended = ", ".join(f"{latest[name]} {name}" for name in ("succeeded", "failed", "cancelled"))
    _row(table, "in the last minute", f"{latest['accepted']} accepted, of these {ended}")
    paused = state["paused"]
    _row(table, "paused", f"by {paused['by']} for {_duration(paused['for_ms'])} more" if paused else "no")
    _print_table(table)


def _ids(title: str) -> Column:
    """A column of job ids: whole, however narrow the terminal is, since they are there to be copied."""
    return Column(title, no_wrap=True, min_width=ID_LENGTH)


def _row(table: Table, *cells: str | Text) -> None:
    """Adds cells, none of which is taken for markup."""
    table.add_row(*(cell if isinstance(cell, Text) else plain(cell) for cell in cells))


def _echo(text: str, *, err: bool = False) -> None:
    click.echo(plain(text).plain, err=err)


def _as_object(query: dict[str, Any]) -> dict[str, Any]:
    """Filters as the body of a request has them: metadata as an object."""
    plain = {name: value for name, value in query.items() if not name.startswith("metadata[")}
    pairs = {name[9:-1]: value for name, value in query.items() if name.startswith("metadata[")}
    return plain | ({"metadata": pairs} if pairs else {})


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2))


def _print_table(table: Table, nothing: str | None = None) -> None:
    if nothing:
        click.echo(nothing, err=True)
        return
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)


def _status(status: str) -> Text:
    return plain(status, _STYLE.get(status, ""))


def _instant(ms: int | None) -> str:
    if ms is None:
        return ""
    return datetime.fromtimestamp(ms / 1000, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _between(start_ms: int | None, end_ms: int | None) -> str:
    return "" if start_ms is None or end_ms is None else _duration(end_ms - start_ms)


def _duration(ms: int | None) -> str:
    if ms is None:
        return "-"
    if ms < 1000:
        return f"{ms} ms"
    if ms < 120_000:
        return f"{ms / 1000:.1f} s"
    return f"{ms / 60_000:.0f} min"


@contextmanager
def _quiet_interrupt() -> Iterator[None]:
    """Ctrl-C ends a live view, and is no error."""
    with suppress(KeyboardInterrupt):
        yield


@click.command()
@click.option("--every", "every_s", type=click.FloatRange(min=0.2), default=1.0, show_default=True, help="Seconds.")
@click.option("--once", is_flag=True, help="Print it once, as into a pipe.")
@talks_to_the_api
def top(api: ApiClient, as_json: bool, every_s: float, once: bool) -> None:
    """Watch the queue, the workers and what they run (operators)."""
    from rich.live import Live

    if as_json:
        _print_json(_snapshot(api))
        return
    if once or not sys.stdout.isatty():
        Console().print(_dashboard(_snapshot(api)))
        return
    with _quiet_interrupt(), Live(_dashboard(_snapshot(api)), auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(every_s)
            live.update(_dashboard(_snapshot(api)), refresh=True)


def _snapshot(api: ApiClient) -> dict[str, Any]:
    return {
        "queue": api.get("/v1/queue"),
        "workers": api.get("/v1/workers")["data"],
        "running": api.get("/v1/jobs", {"status": "running", "limit": 20})["data"],
        "latest": api.get("/v1/jobs", {"limit": 10})["data"],
    }


def _dashboard(seen: dict[str, Any]) -> Table:
    page = Table.grid(padding=(0, 0, 1, 0))
    state = seen["queue"]
    oldest = f", the oldest for {_duration(state['oldest_wait_ms'])}" if state["oldest_wait_ms"] else ""
    head = (
        f"{state['running']} of {state['slots']} slots busy on {state['workers']} workers, {state['claimable']} waiting"
    )
    page.add_row(Text(head + oldest + (", PAUSED" if state["paused"] else "")))
    fleet = Table("worker", "agent", "jobs", "last beat", "", box=None)
    for worker in seen["workers"]:
        slots = f"{len(worker['jobs'])}/{worker['max_jobs']}"
        draining = "draining" if worker["draining"] else ""
        _row(fleet, worker["id"], worker["agent"], slots, _instant(worker["last_beat_ms"]), draining)
    page.add_row(fleet)
    for title in ("running", "latest"):
        table = Table(_ids(title), "status", "accepted", "wait", "run", "error", box=None)
        for job in seen[title]:
            _row(
                table,
                job["id"],
                _status(job["status"]),
                _instant(job["accepted_ms"]),
                _between(job["accepted_ms"], job["started_ms"]),
                _between(job["started_ms"], job["finished_ms"]),
                (job["error"] or {}).get("code", ""),
            )
        page.add_row(table)
    return page
