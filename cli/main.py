"""The `endmark` command. An option wins over its ENDMARK_ variable, which wins over the default."""

from __future__ import annotations

import math
from pathlib import Path

import click

from cli import inspect
from cli.environment import (
    RedisUnreachable,
    UnusableAgent,
    allow_many_connections,
    override,
    read_settings,
    require_free_port,
    variable,
    warn_of_unknown_settings,
)

_host = click.option("--host", help="The address that the API binds (ENDMARK_HOST).")
_port = click.option(
    "--port", type=click.IntRange(0, 65535), help="The port that the API binds; 0 takes a free one (ENDMARK_PORT)."
)
_redis_url = click.option(
    "--redis-url", help="The Redis or Valkey server that all processes share (ENDMARK_REDIS_URL)."
)


@click.group()
@click.version_option(package_name="endmark", message="endmark %(version)s")
def main() -> None:
    """OpenAI-compatible completions of agents, on a queue. docs/settings.md lists every setting."""


@main.command()
@_host
@_port
@_redis_url
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".endmark"),
    show_default=True,
    help="The folder of the embedded Valkey; not used with a Redis of your own.",
)
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Worker processes to run.")
def dev(host: str | None, port: int | None, redis_url: str | None, data_dir: Path, workers: int) -> None:
    """Run an embedded Valkey, the API and workers, until Ctrl-C."""
    from cli.dev import run

    override(host=host, port=port, redis_url=redis_url)
    run(data_dir=data_dir, workers=workers)


@main.command()
@_host
@_port
@_redis_url
def api(host: str | None, port: int | None, redis_url: str | None) -> None:
    """Run one API process: it accepts requests and relays answers."""
    import uvicorn

    from api.protocol import protocol_for

    override(host=host, port=port, redis_url=redis_url)
    settings = read_settings()
    warn_of_unknown_settings()
    require_free_port(settings.host, settings.port)
    allow_many_connections()
    uvicorn.run(
        "api.app:create_app",
        factory=True,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=protocol_for(settings),
        ws="none",
        lifespan="on",
        log_config=None,  # create_app configures logging
        access_log=False,
        server_header=False,
        backlog=2048,
        timeout_graceful_shutdown=math.ceil(
            settings.drain_timeout_s
        ),  # as long as a worker may take to end the streams
    )


@main.command()
@_redis_url
def worker(redis_url: str | None) -> None:
    """Run one worker process: it runs the agent, several jobs at a time."""
    from shared.connection import FAILURES
    from worker.agents.load import AgentLoadError
    from worker.main import run

    override(redis_url=redis_url)
    settings = read_settings()  # so that a wrong one is explained before the worker reads them again
    warn_of_unknown_settings()
    if settings.metrics_port:
        require_free_port(settings.metrics_host, settings.metrics_port, variable("metrics_port"))
    try:
        run()
    except AgentLoadError as error:
        raise UnusableAgent(str(error)) from error
    except FAILURES as error:
        raise RedisUnreachable(settings.redis_url, error) from error


for command in (inspect.jobs, inspect.workers, inspect.queue, inspect.top):
    main.add_command(command)


if __name__ == "__main__":
    main()
