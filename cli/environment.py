"""What a command reads from its environment, and how it says that something there is wrong.

click.ClickException
├── InvalidSettings    a setting is wrong; names the ENDMARK_ variable (exit code 2)
├── UnusableAgent      the agent that the settings choose cannot be built (exit code 2)
├── RedisUnreachable   Redis does not answer at the start (exit code 1)
└── PortTaken          another process listens where the API should (exit code 1)
"""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import suppress
from difflib import get_close_matches

import click
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from shared.settings import Settings

VARIABLE_PREFIX = "ENDMARK_"
# Of commands that talk to an API, of docker-compose.yml, and of the tests.
NOT_SETTINGS = frozenset(
    {"ENDMARK_IMAGE", "ENDMARK_KEY", "ENDMARK_PUBLISH", "ENDMARK_TEST_REDIS_SERVER", "ENDMARK_URL"}
)
# No value of these is shown: a URL may carry a password, and whoever receives webhooks may know senders by it.
_SECRET_FIELDS = frozenset({"admin_keys", "api_keys", "redis_url", "webhook_secret", "webhook_url"})


class InvalidSettings(click.ClickException):
    """A setting is wrong. The message names each variable, what is wrong with it and what it is for."""

    exit_code = 2

    def __init__(self, invalid: ValidationError) -> None:
        lines = [
            "these settings are wrong:",
            *(line for error in invalid.errors() for line in _explain(error)),
            "Correct or unset them; docs/settings.md explains every one.",
        ]
        super().__init__("\n".join(lines))


class UnusableAgent(click.ClickException):
    """The agent that the settings choose cannot be built. The message says what to do about it."""

    exit_code = 2


class RedisUnreachable(click.ClickException):
    """Redis does not answer at the start."""

    def __init__(self, redis_url: str, reason: Exception) -> None:
        super().__init__(
            f"Redis at {without_password(redis_url)} cannot be used: {reason}. Start it, or name another with "
            f"--redis-url or {VARIABLE_PREFIX}REDIS_URL; `endmark dev` without either brings its own."
        )


class PortTaken(click.ClickException):
    """Another process listens on the address that the API should bind."""

    def __init__(self, host: str, port: int, choice: str) -> None:
        super().__init__(
            f"port {port} on {host} is taken by another process. "
            f"Stop that process, or choose another port with {choice}."
        )


def variable(field: str) -> str:
    """The environment variable of a settings field."""
    return VARIABLE_PREFIX + field.upper()


def override(**fields: object) -> None:
    """Let options win over the environment: set the variable of each settings field that is not None.

    The variables are inherited by child processes, so that these see the same settings.
    """
    for field, value in fields.items():
        if value is not None:
            os.environ[variable(field)] = str(value)


def read_settings() -> Settings:
    """The settings of this process. Raises `InvalidSettings`."""
    try:
        return Settings()
    except ValidationError as invalid:
        raise InvalidSettings(invalid) from invalid


def warn_of_unknown_settings() -> None:
    """Names each ENDMARK_ variable that nothing reads: one that is misspelt would otherwise be left out in silence."""
    known = {variable(field) for field in Settings.model_fields}
    for name in sorted(set(os.environ) - known - NOT_SETTINGS):
        if name.startswith(VARIABLE_PREFIX):
            meant = get_close_matches(name.removeprefix(VARIABLE_PREFIX).lower(), Settings.model_fields, n=1)
            hint = f"; did you mean {variable(meant[0])}?" if meant else "; docs/settings.md lists all there are"
            click.echo(f"Warning: {name} is no setting and is ignored{hint}", err=True)


def require_free_port(host: str, port: int, choice: str = f"--port or {VARIABLE_PREFIX}PORT") -> None:
    """Raise `PortTaken` if the address could not be bound. Any other trouble is left to whoever binds it.

    `choice`: what chooses another port, for the message.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As uvicorn binds it: without this, the connections of a server that just stopped would look like a server.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortTaken(host, port, choice) from error


def allow_many_connections() -> None:
    """Lets this process open as many files as it may: each open stream is one, and the usual limit is 1,024.

    asyncio has no trouble with more, unlike programs that use `select`, for which the limit is kept low.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS has a limit that it does not tell
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def without_password(redis_url: str) -> str:
    """A Redis URL as it may be shown. Its options are left out: they may hold a password, too."""
    scheme, _, rest = redis_url.partition("?")[0].partition("://")
    netloc, slash, path = rest.partition("/")
    return f"{scheme}://{netloc.rpartition('@')[2]}{slash}{path}"


def free_port(host: str) -> int:
    """A port of this address that nobody listens on now. Somebody may by the time it is used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _explain(error: ErrorDetails) -> Iterator[str]:
    reason = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # a rule about several settings; its message names them
        yield f"  {reason}"
        return
    field = str(error["loc"][0])
    value = "" if field in _SECRET_FIELDS else f"={error['input']}"
    yield f"  {variable(field)}{value}: {reason}"
    yield f"    {Settings.model_fields[field].description}"
