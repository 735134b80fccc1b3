"""The running API, as the commands that inspect it see it.

click.ClickException
├── ApiUnreachable     nobody answers there (exit code 4)
└── ApiRefused         the API says no (exit code 1)
    └── ApiNotFound    there is no such job, or worker (exit code 3)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote

import click
import httpx

from cli.environment import read_settings
from cli.terminal import plain

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5.0, 30.0
QUIET_S = 60.0  # a stream says something more often, if only a comment


class ApiUnreachable(click.ClickException):
    """Nobody answers at this URL."""

    exit_code = 4

    def __init__(self, url: str, reason: Exception) -> None:
        super().__init__(
            f"no Endmark API answers at {url}: {str(reason) or type(reason).__name__}. Start it with `endmark dev` or "
            "`endmark api`, or name another with --url or ENDMARK_URL."
        )


class ApiRefused(click.ClickException):
    """The API answered with an error."""


class ApiNotFound(ApiRefused):
    """There is no such job, or worker."""

    exit_code = 3


class Event(NamedTuple):
    """An event of a job's stream."""

    number: int | None  # its place in the stream; None for an event that has none
    name: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiClient:
    """One API, by its URL and a key."""

    url: str
    key: str

    @classmethod
    def from_options(cls, url: str | None, key: str | None) -> ApiClient:
        """What is not given is taken from this machine's own settings: its port, and its first admin or API key."""
        settings = read_settings()
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        keys = [secret.get_secret_value() for secret in settings.admin_keys]
        keys += [tenant_key.key.decode() for tenant_key in settings.tenant_keys]
        base_url = (url or f"http://{host}:{settings.port}").rstrip("/").removesuffix("/v1")
        if not base_url.startswith(("http://", "https://")):
            raise click.UsageError(f"--url or ENDMARK_URL is {url!r}: it must begin with http:// or https://.")
        return cls(url=base_url, key=key or next(iter(keys), ""))

    def get(self, path: str, query: Mapping[str, Any] | None = None) -> Any:
        return self._ask("GET", path, params=_given(query))

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        return self._ask("POST", path, json=dict(body) if body is not None else {})

    def delete(self, path: str) -> Any:
        return self._ask("DELETE", path)

    def _ask(self, method: str, path: str, **options: Any) -> Any:
        with self._talk() as http:
            answer = http.request(method, path, **options)
            _raise_for_status(answer)
            return answer.json()

    def events(self, job_id: str, *, starting_after: int = 0, speed: float | None = None) -> Iterator[Event]:
        """The events of a job, to its end or until the connection breaks. Nothing if there is nothing more."""
        query = _given({"starting_after": starting_after or None, "speed": speed})
        with self._talk() as http:
            path = f"/v1/jobs/{path_of(job_id)}/events"
            with http.stream("GET", path, params=query, timeout=httpx.Timeout(READ_TIMEOUT_S, read=QUIET_S)) as answer:
                if answer.is_error:
                    answer.read()
                _raise_for_status(answer)
                yield from _parse_events(_lines(answer.iter_bytes()))

    @contextmanager
    def _talk(self) -> Iterator[httpx.Client]:
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        try:
            with httpx.Client(base_url=self.url, headers=headers, timeout=timeout) as http:
                yield http
        except (httpx.TransportError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise ApiUnreachable(self.url, error) from error


def path_of(identity: str) -> str:
    """An id as one segment of a path."""
    return quote(identity, safe="")


def _given(query: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (query or {}).items() if value is not None}


def _raise_for_status(answer: httpx.Response) -> None:
    if not answer.is_error:
        return
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"the API answered {answer.status_code} {answer.reason_phrase}"
    message = plain(message).plain
    if answer.status_code == 404:
        raise ApiNotFound(message)
    hint = " Give one with --key or ENDMARK_KEY." if answer.status_code in (401, 403) else ""
    raise ApiRefused(message + hint)


def _lines(pieces: Iterator[bytes]) -> Iterator[str]:
    """Divided at line feeds only: httpx divides at every line end of Unicode, and JSON may hold some of them."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from (line.decode() for line in lines)


def _parse_events(lines: Iterator[str]) -> Iterator[Event]:
    """Server-sent events as our API writes them: each field once, on one line."""
    fields: dict[str, str] = {}
    for line in lines:
        if not line:
            if "event" in fields:
                number = fields.get("id")
                yield Event(int(number) if number else None, fields["event"], json.loads(fields["data"]))
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
