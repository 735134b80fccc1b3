"""shared/logs.py: what a line may not say, whoever writes it."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

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
        structlog.get_logger("us").exception("failed")
    output = written(capsys)
    for secret in ("pass-word", "sk-of-acme", "sk-admin", "a%2Fpass", "a/pass"):
        assert secret not in output
    assert output.count(logs.HIDDEN) >= 4


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_secret_is_hidden_however_it_is_escaped(
    capsys: pytest.CaptureFixture[str], log_format: Literal["json", "console"]
) -> None:
    secret = 'sk-"quoted\\\u00e9'
    logs.configure(Settings(log_format=log_format, api_keys=secret))
    structlog.get_logger("us").info("event", reason=secret, others=[secret])
    structlog.get_logger("us").info("event", reason=f"{secret}\ud800")  # with a lone surrogate JSON is ASCII
    logging.getLogger("somebody").error("refused %r", secret)
    output = written(capsys)
    assert "quoted" not in output
    assert output.count(logs.HIDDEN) >= 4


def test_a_url_without_a_password_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(log_format="json"))
    logging.getLogger("somebody").error("http://host:80/a?b=c@d of user@host: x")
    assert json.loads(written(capsys))["event"] == "http://host:80/a?b=c@d of user@host: x"


def test_a_short_key_does_not_hide_parts_of_words() -> None:
    assert logs.secrets_of(Settings(api_keys="test")) == []


def test_our_lines_and_those_of_libraries_have_one_form(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(log_format="json"))
    with structlog.contextvars.bound_contextvars(job="chatcmpl-1"):
        for name in ("us", "somebody"):
            logger = structlog.get_logger(name) if name == "us" else logging.getLogger(name)
            try:
                raise RuntimeError("why")
            except RuntimeError:
                logger.exception("failed")
    ours, theirs = (json.loads(line) for line in written(capsys).splitlines())
    assert set(ours) == set(theirs) == {"event", "exception", "job", "level", "logger", "timestamp"}
    assert [(line["event"], line["job"], line["level"]) for line in (ours, theirs)] == [
        ("failed", "chatcmpl-1", "error")
    ] * 2
    assert (ours["logger"], theirs["logger"]) == ("us", "somebody")
    assert all(line["exception"].endswith("RuntimeError: why") for line in (ours, theirs))


def test_less_severe_lines_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(log_format="json", log_level="WARNING"))
    for logger in (structlog.get_logger("us"), logging.getLogger("somebody")):
        logger.info("less")
        logger.warning("enough")
    assert [json.loads(line)["event"] for line in written(capsys).splitlines()] == ["enough"] * 2


@pytest.mark.parametrize("value", ["\ud800", 2**70, frozenset({1}), {1: "a"}], ids=ascii)
def test_a_line_is_json_whatever_it_says(capsys: pytest.CaptureFixture[str], value: object) -> None:
    logs.configure(Settings(log_format="json"))
    structlog.get_logger("us").info("event", value=value)
    line = json.loads(written(capsys))
    assert line["value"] in (value, repr(value), {"1": "a"})


def test_a_line_that_cannot_be_written_fails_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as that of a job that was accepted a moment ago."""
    reader, writer = os.pipe()
    os.close(reader)
    with io.TextIOWrapper(io.FileIO(writer, "w"), write_through=True) as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        logs.configure(Settings(log_format="json"))
        structlog.get_logger("us").info("to nobody")
    structlog.get_logger("us").info("to a closed file")


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("not bound to a session")


@dataclass
class Account:
    name: str
    token: str = field(repr=False)


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("value", [{(1, 2): 3}, {1: Unspeakable()}, Unspeakable()], ids=["key", "deep", "repr"])
def test_a_line_that_cannot_be_rendered_fails_nobody(
    capsys: pytest.CaptureFixture[str], log_format: str, value: object
) -> None:
    logs.configure(Settings.model_validate({"log_format": log_format}))
    structlog.get_logger("agent").info("it_happened", value=value)
    assert "it_happened" in capsys.readouterr().err


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_line_shows_of_a_dataclass_what_repr_shows(capsys: pytest.CaptureFixture[str], log_format: str) -> None:
    logs.configure(Settings.model_validate({"log_format": log_format}))
    structlog.get_logger("agent").info("it_happened", account=Account("alice", "s3cret-token"))
    line = capsys.readouterr().err
    assert "alice" in line
    assert "s3cret-token" not in line
