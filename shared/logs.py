"""Logging: one structured line for each change of state, never the text of a prompt or an answer.

Every line of a process has the same form, whoever writes it. It says `job` and `attempt` while an attempt runs,
`request_id` while a request is answered, `trace_id` and `span_id` if there is a trace, and no secret of the settings.
"""

from __future__ import annotations

import logging
import re
import sys
from urllib.parse import unquote

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
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _name_trace,
    ]
    renderer: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if as_json
        else [  # the default shows local variables with a traceback, and so prompts and keys
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _DiscreetFormatter(
            secrets_of(settings),
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
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


def _name_trace(
    _logger: structlog.typing.WrappedLogger, _method: str, line: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        line["trace_id"] = trace.format_trace_id(span.trace_id)
        line["span_id"] = trace.format_span_id(span.span_id)
    return line


def secrets_of(settings: Settings) -> list[str]:
    """What no line may say."""
    found = [key.decode() for key, _ in settings.tenant_keys]
    found += [secret.get_secret_value() for secret in (*settings.admin_keys, *settings.webhook_secret)]
    for credentials in _PASSWORD.findall(f"{settings.redis_url} {settings.webhook_url}"):
        password = credentials.partition(":")[2]
        found += [password, unquote(password)]
    return sorted({secret for secret in found if len(secret) >= SHORTEST_SECRET}, key=len, reverse=True)


class _DiscreetFormatter(structlog.stdlib.ProcessorFormatter):
    """Hides secrets in whole lines, so also in a library's words and in tracebacks."""

    def __init__(self, secrets: list[str], **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]  # passed on as they are
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        line = _PASSWORD.sub(HIDDEN, super().format(record))
        for secret in self._secrets:
            line = line.replace(secret, HIDDEN)
        return line
