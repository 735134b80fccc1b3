"""What the environment may say."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from shared.settings import Settings, is_loopback


def test_everything_has_a_default() -> None:
    settings = Settings()
    assert (settings.prefix, settings.agent, settings.port, settings.tenant_keys) == ("endmark", "auto", 8900, ())


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENDMARK_REDIS_URL", "redis://redis:6379/2")
    monkeypatch.setenv("ENDMARK_MAX_JOBS", "7")
    monkeypatch.setenv("ENDMARK_API_KEYS", " one, two ,,")
    monkeypatch.setenv("ENDMARK_CORS_ORIGINS", "https://a.example,https://b.example")
    settings = Settings()
    assert (settings.redis_url, settings.max_jobs) == ("redis://redis:6379/2", 7)
    assert settings.tenant_keys == ((b"one", "default"), (b"two", "default"))
    assert settings.cors_origins == ("https://a.example", "https://b.example")


def test_keys_are_not_shown() -> None:
    settings = Settings(api_keys="sesame")
    assert "sesame" not in repr(settings)
    assert "sesame" not in str(settings.model_dump())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "example.org"])
def test_beyond_loopback_a_key_is_required(host: str) -> None:
    with pytest.raises(ValidationError, match="ENDMARK_API_KEYS"):
        Settings(host=host)
    assert Settings(host=host, api_keys="k").host == host


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_what_counts_as_this_machine(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    "changes",
    [
        {"prefix": ""},
        {"prefix": "a:b"},
        {"prefix": "a%s"},
        {"prefix": "{a}"},
        {"prefix": "a\n"},
        {"prefix": "x" * 65},
        {"agent": "no such agent"},
        {"agent": "module:"},
        {"port": 65536},
        {"max_jobs": 0},
        {"max_attempts": 0},
        {"lease_s": 0.5},
        {"retention_s": 0.5},
        {"queue_timeout_s": 0},
        {"default_session": "a\nb"},
        {"model_name": ""},
        {"log_level": "LOUD"},
        {"webhook_url": "https://example.org/"},
        {"webhook_url": "example.org", "webhook_secret": "whsec_" + "A" * 32},
        {"webhook_secret": "sesame"},
        {"webhook_secret": "whsec_" + "A" * 32 + ",sesame"},
        {"webhook_max_attempts": 0},
        {"webhook_retry_s": 0},
    ],
    ids=repr,
)
def test_a_bad_value_is_refused_at_the_start(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Settings(**changes)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:secret@redis:6379/2",
        "rediss://redis",
        "unix:///run/redis.sock",
        "redis+sentinel://a,b:26380,[::1]:26381/agents/0",
        "rediss+sentinel://user:secret@a/agents?sentinel_password=secret",
    ],
)
def test_redis_has_a_url(url: str) -> None:
    assert Settings(redis_url=url).redis_url == url


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:6379", "begins with redis://"),
        ("sentinel://:secret@a:26379/agents", r"redis\+sentinel://"),
        ("redis+sentinel://:secret@a:26379", "/service"),
        ("redis+sentinel://:secret@a:26379/", "/service"),
        ("redis+sentinel://:secret@a:26379/agents/zero", "database"),
        ("redis+sentinel://:secret@a:26379/agents/0/0", "/service"),
        ("redis+sentinel://:secret@/agents", "host:port"),
        ("redis+sentinel://:secret@a,,b/agents", "host:port"),
        ("redis+sentinel://:secret@a:port/agents", "host:port"),
        ("redis+sentinel://:secret@a/agents?socket_timeout=long", "socket_timeout"),
    ],
)
def test_a_wrong_redis_url_is_explained_without_its_password(url: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message) as refused:
        Settings(redis_url=url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("agent", ["auto", "nanobot", "openai", "echo", "my_agents.support:build"])
def test_agents_have_names_or_places(agent: str) -> None:
    assert Settings(agent=agent).agent == agent
