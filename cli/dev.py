"""`endmark dev`: Valkey, workers and the API as one command, for a person at a terminal."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import urllib.request
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import HTTPError
from urllib.parse import urlsplit

import click
from rich.console import Console

from api.dashboard.access import is_offered
from cli.embedded import claim
from cli.environment import free_port, override, read_settings, require_free_port, variable, without_password
from cli.supervisor import Child, StartFailed, Supervisor
from shared.settings import Settings
from worker.agents.load import choose_agent

READY_TIMEOUT_S = 30.0
STOP_MARGIN_S = 5.0  # what a child gets on top of its own drain
_POLL_S = 0.1
_COLOURS = {"api": "cyan", "valkey": "magenta"}  # a worker is green, whatever its number
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared with, not bound


def run(*, data_dir: Path, workers: int) -> None:
    """Serve until a signal. Raises a `click.ClickException` that says why it cannot."""
    settings = read_settings()
    if settings.port == 0:
        override(port=free_port(settings.host))
        settings = read_settings()
    require_free_port(settings.host, settings.port)
    choice = choose_agent(settings, os.environ)
    if choice.name == "openai" and _is_ours(os.environ.get("OPENAI_BASE_URL", ""), settings):
        raise AsksItself(os.environ["OPENAI_BASE_URL"])
    console = Console(highlight=False, soft_wrap=True)

    with ExitStack() as stack:
        first_stage: list[Child] = []
        metrics_folder = stack.enter_context(TemporaryDirectory(prefix="endmark-metrics-"))
        if "redis_url" in settings.model_fields_set:
            kept = f"Redis at {without_password(settings.redis_url)}"
        else:
            valkey = stack.enter_context(claim(data_dir / "valkey"))
            override(redis_url=valkey.redis_url)
            settings = read_settings()
            first_stage.append(valkey.child())
            kept = f"{valkey.folder} (embedded Valkey, {valkey.redis_url})"
        console.print(f"[bold]agent[/]   {choice.name}: ", end="")
        console.print(choice.reason, markup=False)
        console.print("[bold]data[/]    ", end="")
        console.print(kept, markup=False)
        asyncio.run(_supervise([first_stage, *_stages(settings, workers, metrics_folder)], settings))


class AsksItself(click.ClickException):
    """The agent would ask the model of this very deployment."""

    exit_code = 2

    def __init__(self, base_url: str) -> None:
        super().__init__(
            f"OPENAI_BASE_URL={base_url} is the address that Endmark is about to serve: the agent `openai` would ask "
            "itself. Unset it and OPENAI_API_KEY in this shell, or name another agent: ENDMARK_AGENT=echo."
        )


def _is_ours(base_url: str, settings: Settings) -> bool:
    url = urlsplit(base_url)
    hosts = {"localhost", "127.0.0.1", "::1", settings.host}
    try:
        return url.hostname in hosts and (url.port or 80) == settings.port
    except ValueError:  # the port is no number
        return False


def _stages(settings: Settings, workers: int, metrics_folder: str) -> list[list[Child]]:
    """The workers, then the API: so that the API stops first and its open streams still get their ends.

    With the folder, the API's /metrics tells of all of them.
    """
    env = {"PYTHONUNBUFFERED": "1", "PROMETHEUS_MULTIPROC_DIR": metrics_folder, variable("metrics_port"): "0"}
    if sys.stdout.isatty() and settings.log_format == "auto":
        env[variable("log_format")] = "console"  # a person reads it, though the child writes to a pipe
    child = partial(Child, env=env, stop_timeout_s=settings.drain_timeout_s + STOP_MARGIN_S)
    names = ["worker"] if workers == 1 else [f"worker-{number}" for number in range(1, workers + 1)]
    # -P: a folder named `api` or `worker` where the person works must not shadow ours.
    command = (sys.executable, "-P", "-m", "cli.main")
    return [
        [child(name=name, command=(*command, "worker")) for name in names],
        [child(name="api", command=(*command, "api"))],
    ]


async def _supervise(stages: list[list[Child]], settings: Settings) -> None:
    width = max(len(child.name) for stage in stages for child in stage)

    def relay(name: str, line: str) -> None:
        _tell(click.style(f"{name:<{width}} │ ", fg=_COLOURS.get(name, "green")) + line)

    def say(message: str) -> None:
        _tell(click.style(f"{'endmark':<{width}} │ {message}", bold=True))

    async def ready() -> None:
        base_url = f"http://{_reachable_host(settings.host)}:{settings.port}"
        await wait_until_serving(f"{base_url}/ready")
        for line in first_steps(f"{base_url}/v1", settings.model_name, keyed=bool(settings.api_keys)):
            _tell(line)
        if is_offered(settings):
            _tell(f"The dashboard: {base_url}/dashboard\n")

    await Supervisor(stages, say=say, relay=relay).run(ready)


def _tell(line: str) -> None:
    # Nobody reads any more, as after `endmark dev | head`, or the disk is full: serving goes on.
    with suppress(OSError, ValueError):
        click.echo(line)


async def wait_until_serving(url: str, timeout_s: float = READY_TIMEOUT_S) -> None:
    """Return once the URL answers 200. Raises `StartFailed`, with the last answer, after `timeout_s`."""
    missing = "no answer yet"
    try:
        async with asyncio.timeout(timeout_s):
            while missing := await asyncio.to_thread(_what_is_missing, url):  # noqa: ASYNC110 - another process
                await asyncio.sleep(_POLL_S)
    except TimeoutError as error:
        raise StartFailed(f"not ready after {timeout_s:g} s: {url} says: {missing}") from error


def _what_is_missing(url: str) -> str:
    """Empty if the URL answers 200, else what it says instead."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not see our loopback address
    try:
        with direct.open(url, timeout=2):
            return ""
    except HTTPError as answer:
        with answer:
            return f"{answer.code} {answer.read(1000).decode(errors='replace')}"
    except OSError as error:
        return str(error)


def first_steps(base_url: str, model: str, *, keyed: bool) -> list[str]:
    """What a person pastes first: a curl line, and six lines of Python for the OpenAI SDK."""
    key = "YOUR_API_KEY" if keyed else "not-needed"
    messages = [{"role": "user", "content": "Hello"}]
    body = json.dumps({"model": model, "stream": True, "messages": messages}).replace("'", r"\u0027")
    authorization = f" -H 'Authorization: Bearer {key}'" if keyed else ""
    return [
        "",
        f"Endmark serves {base_url}",
        "",
        f"curl -N {base_url}/chat/completions{authorization} -H 'Content-Type: application/json' -d '{body}'",
        "",
        "from openai import OpenAI",
        f'client = OpenAI(base_url="{base_url}", api_key="{key}")',
        f"messages = {json.dumps(messages)}",
        f"stream = client.chat.completions.create(model={json.dumps(model)}, messages=messages, stream=True)",
        "for chunk in stream:",
        '    print(chunk.choices[0].delta.content or "", end="", flush=True)',
        "",
    ]


def _reachable_host(host: str) -> str:
    """The bind address as the host part of a URL on this machine."""
    host = _WILDCARDS.get(host, host)
    return f"[{host}]" if ":" in host else host
