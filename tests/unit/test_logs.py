"""shared/logs.py: what a line may not say, whoever writes it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from shared import logs
from shared.settings import Settings


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def written(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize(
    "text",
    [
        "Error connecting to redis://user:pass-word@host:6379/0",
        "https://name:pass-word@proxy/v1 is not reachable",
        "the key was sk-of-acme",
        "so is sk-admin, and a%2Fpass or a/pass",
    ],
)
def test_a_line_hides_keys_and_passwords(capsys: pytest.CaptureFixture[str], log_format: str, text: str) -> None:
    settings = Settings(
        redis_url="redis://:a%2Fpass@localhost/0",
        api_keys="acme:sk-of-acme",
        admin_keys="sk-admin",
        log_format=log_format,
    )
    logs.configure(settings)
    logging.getLogger("somebody").error(text)
    structlog.get_logger("us").info("event", reason=text)
    try:
        raise RuntimeError(text)
    except RuntimeError:
        logging.getLogger("somebody").exception("failed")
    output = written(capsys)
    for secret in ("pass-word", "sk-of-acme", "sk-admin", "a%2Fpass", "a/pass"):
        assert secret not in output
    assert output.count(logs.HIDDEN) >= 3


def test_a_url_without_a_password_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(log_format="json"))
    logging.getLogger("somebody").error("http://host:80/a?b=c@d of user@host: x")
    assert json.loads(written(capsys))["event"] == "http://host:80/a?b=c@d of user@host: x"


def test_a_short_key_does_not_hide_parts_of_words() -> None:
    assert logs.secrets_of(Settings(api_keys="test")) == []
