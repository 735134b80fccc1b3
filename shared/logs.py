"""Logging: one structured line for each change of state, never the text of a prompt or an answer.

Every line of a process has the same form, whoever writes it. It says `job` and `attempt` while an attempt runs,
`request_id` while a request is answered, `trace_id` and `span_id` if there is a trace, and no secret of the settings.

Our own lines do not pass through `logging`, which costs several times as much as to write them.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from functools import partial
from typing import Any
from urllib.parse import unquote

import orjson
import structlog
from opentelemetry import trace

from shared.settings import Settings

QUIET = (  # libraries whose INFO lines repeat ours, name URLs, or quote what was asked
    *("arq", "asyncio", "hpack", "httpcore", "httpcore2", "httpx", "httpx2"),
    *("multipart", "openai", "python_multipart"),
)
HIDDEN = "***"
SHORTEST_SECRET = 6  # a shorter one is a part of other words
_PASSWORD = re.compile(r"(?<=://)[^/\s@'\"]*:[^/\s@'\"]*(?=@)")  # of a URL, with the user's name


def configure(settings: Settings) -> None:
    """Sends our lines and those of uvicorn, arq and every other library to stderr, in one form."""
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    told: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _name_trace,
    ]
    rendered: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, _unfailing(_as_json)]
        if as_json
        else [  # the default shows local variables with a traceback, and so prompts and keys
            _unfailing(
                structlog.dev.ConsoleRenderer(
                    colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
                )
            )
        ]
    )
    stderr = _Stderr(secrets_of(settings))
    stderr.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=told,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendered],
        )
    )
    structlog.configure(
        processors=[*told, *rendered],
        logger_factory=partial(_OurLogger, stderr),
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers[:] = [stderr]
    root.setLevel(settings.log_level)
    for name in QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    for name in ("uvicorn", "uvicorn.error", "arq"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    access = logging.getLogger("uvicorn.access")
    if access.handlers:  # otherwise nobody wants a line for each request
        access.handlers.clear()
        access.propagate = True


def _as_json(_logger: structlog.typing.WrappedLogger, _method: str, line: structlog.typing.EventDict) -> str:
    try:  # of a dataclass, what its `repr` shows
        return orjson.dumps(line, default=repr, option=orjson.OPT_PASSTHROUGH_DATACLASS).decode()
    except TypeError:  # a lone surrogate, or a number beyond 64 bits
        return json.dumps(line, default=repr)


def _unfailing(render: structlog.typing.Processor) -> structlog.typing.Processor:
    """An agent may log anything: what cannot be rendered must not fail whoever says it."""

    def rendered(logger: structlog.typing.WrappedLogger, method: str, line: structlog.typing.EventDict) -> Any:
        try:
            return render(logger, method, dict(line))
        except Exception as error:  # noqa: BLE001 - of a `__repr__`, whatever it raises
            known = {name: value for name, value in line.items() if isinstance(value, str)}
            return json.dumps(known | {"not_rendered": type(error).__name__})

    return rendered


def _name_trace(
    _logger: structlog.typing.WrappedLogger, _method: str, line: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        line["trace_id"] = trace.format_trace_id(span.trace_id)
        line["span_id"] = trace.format_span_id(span.span_id)
    return line


def secrets_of(settings: Settings) -> list[str]:
    """What no line may say, in each form in which it would be in a line."""
    found = [key.decode() for key, _ in settings.tenant_keys]
    found += [secret.get_secret_value() for secret in (*settings.admin_keys, *settings.webhook_secret)]
    for credentials in _PASSWORD.findall(f"{settings.redis_url} {settings.webhook_url}"):
        password = credentials.partition(":")[2]
        found += [password, unquote(password)]
    forms = {secret for secret in found if len(secret) >= SHORTEST_SECRET}
    for _ in range(2):  # a line is JSON, and quotes the `repr` or the JSON of somebody else
        forms |= {write(form)[1:-1] for form in forms for write in (json.dumps, _json_utf8, repr)}
    return sorted(forms, key=len, reverse=True)


def _json_utf8(text: str) -> str:
    return orjson.dumps(text).decode()


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]  # sys.stderr
    """Writes each line in one piece, without secrets: they are hidden in words of libraries and in tracebacks, too."""

    def __init__(self, secrets: list[str]) -> None:
        super().__init__(sys.stderr)
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        return self._discreet(super().format(record))

    def write(self, line: str) -> None:
        """Writes a line of ours. One that cannot be written is lost, as `logging` does with those of libraries."""
        whole = f"{self._discreet(line)}\n"
        self.acquire()
        try:
            self.stream.write(whole)
            self.stream.flush()
        except (OSError, ValueError, RuntimeError):  # a full disk, a reader that has gone, a closed file, a line that
            # a signal handler writes in the middle of another: no job fails of that
            return
        finally:
            self.release()

    def _discreet(self, line: str) -> str:
        if "://" in line:
            line = _PASSWORD.sub(HIDDEN, line)
        for secret in self._secrets:
            line = line.replace(secret, HIDDEN)
        return line


class _OurLogger:
    """What structlog hands a rendered line to, by the name of its level."""

    def __init__(self, stderr: _Stderr, name: str = "root") -> None:
        self.name = name
        self.debug = self.info = self.warning = self.error = self.critical = stderr.write
