"""The image and the compose file, as far as they can be checked without a Docker daemon.

They are held against the Compose Specification's own schema, and against the code: commands exist, variables are
settings, and nothing in a service that is to be scaled ties it to one replica.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cli.main import main
from shared.settings import Settings
from tests.processes import ROOT

SCALED = ("api", "worker")
SETTING_VARIABLES = {f"ENDMARK_{name.upper()}" for name in Settings.model_fields}
COMPOSE_VARIABLES = {"ENDMARK_IMAGE", "ENDMARK_PUBLISH"}  # read by compose itself; no process sees them

# Compose's interpolation: `$$`, `$NAME`, `${NAME}`, `${NAME:-default}`, `${NAME-default}`, `${NAME:?message}`.
_VARIABLE = re.compile(r"\$(?:(?P<escaped>\$)|\{(?P<name>\w+)(?:(?P<rule>:?[-?])(?P<word>[^}$]*))?\}|(?P<bare>\w+))")


class Missing(Exception):
    """A variable with `:?` is not set; compose refuses to start with its message."""


def interpolate(text: str, environ: Mapping[str, str]) -> str:
    """The text as compose reads it. Raises `Missing`, or `ValueError` for a `$` that is not valid syntax."""

    def value(match: re.Match[str]) -> str:
        if match["escaped"]:
            return "$"
        name, rule, word = match["name"] or match["bare"], match["rule"] or "", match["word"] or ""
        set_value = environ.get(name)
        if set_value or (set_value is not None and not rule.startswith(":")):
            return set_value
        if rule.endswith("?"):
            raise Missing(f"{name}: {word}")
        return word

    if "$" in _VARIABLE.sub("", text):
        raise ValueError(f"not compose's syntax: {text!r}")
    return _VARIABLE.sub(value, text)


def each_string(node: object) -> list[str]:
    """Every string value in a document; keys and comments are not interpolated."""
    if isinstance(node, str):
        return [node]
    if isinstance(node, dict):
        return [text for child in node.values() for text in each_string(child)]
    if isinstance(node, list):
        return [text for child in node for text in each_string(child)]
    return []


def interpolated(node: Any, environ: Mapping[str, str]) -> Any:
    if isinstance(node, str):
        return interpolate(node, environ)
    if isinstance(node, dict):
        return {key: interpolated(child, environ) for key, child in node.items()}
    if isinstance(node, list):
        return [interpolated(child, environ) for child in node]
    return node


@pytest.fixture(scope="module")
def raw() -> Any:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def compose(raw: Any) -> Any:
    return interpolated(raw, {"ENDMARK_API_KEYS": "one,two"})


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text(encoding="utf-8")


def seconds(duration: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)([smh])", duration))


def test_it_is_a_valid_compose_file(raw: Any, compose: Any) -> None:
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text(encoding="utf-8"))
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    validator(schema).validate(raw)
    validator(schema).validate(compose)


def test_it_refuses_to_start_without_keys(raw: Any) -> None:
    with pytest.raises(Missing, match="ENDMARK_API_KEYS: set it to one or more comma-separated keys"):
        interpolated(raw, {})


def test_every_endmark_variable_is_a_setting(raw: Any) -> None:
    interpolations = {match["name"] or match["bare"] for text in each_string(raw) for match in _VARIABLE.finditer(text)}
    passed = {name for service in raw["services"].values() for name in service.get("environment", {})}
    ours = {name for name in (interpolations | passed) - {None} if name.startswith("ENDMARK_")}
    assert ours - SETTING_VARIABLES - COMPOSE_VARIABLES == set()
    assert passed & COMPOSE_VARIABLES == set()


@pytest.mark.parametrize("name", SCALED)
def test_its_environment_makes_valid_settings(compose: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in SETTING_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in compose["services"][name]["environment"].items():
        if value is not None:  # None passes on what compose's own environment has
            monkeypatch.setenv(variable, value)
    settings = Settings()
    assert settings.redis_url == "redis://redis:6379/0"
    assert seconds(compose["services"][name]["stop_grace_period"]) > settings.drain_timeout_s


def test_the_upstreams_key_reaches_the_worker_only(compose: Any) -> None:
    holders = {
        name
        for name, service in compose["services"].items()
        if {"OPENAI_API_KEY", "OPENAI_BASE_URL", "ENDMARK_AGENT"} & service.get("environment", {}).keys()
    }
    assert holders == {"worker"}
    assert "ENDMARK_API_KEYS" not in compose["services"]["worker"]["environment"]


@pytest.mark.parametrize("name", SCALED)
def test_it_runs_a_real_command(compose: Any, name: str) -> None:
    assert compose["services"][name]["command"] == [name]
    assert name in main.commands


@pytest.mark.parametrize("name", SCALED)
def test_it_can_be_scaled(compose: Any, name: str) -> None:
    tied_to_one_replica = {"container_name", "hostname", "ports", "volumes", "network_mode"}
    assert tied_to_one_replica & compose["services"][name].keys() == set()


def test_only_the_gateway_is_published(compose: Any) -> None:
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert published == {"gateway": ["127.0.0.1:8900:8900"]}
    assert set(compose["services"]["redis"]["networks"]) == {"inside"}
    assert compose["networks"]["inside"] == {"internal": True}


def test_the_gateway_forwards_to_the_api(compose: Any) -> None:
    gateway = (ROOT / "deploy" / "nginx.conf").read_text(encoding="utf-8")
    port = compose["services"]["api"]["environment"]["ENDMARK_PORT"]
    assert "set $replicas api;" in gateway
    assert f"proxy_pass http://$replicas:{port};" in gateway
    assert "listen 8900;" in gateway
    assert "proxy_buffering off;" in gateway
    assert compose["services"]["gateway"]["volumes"] == ["./deploy/nginx.conf:/etc/nginx/nginx.conf:ro"]


@pytest.mark.parametrize("name", ["gateway", *SCALED, "redis"])
def test_it_has_no_more_rights_than_it_needs(compose: Any, name: str) -> None:
    service = compose["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].partition(":")[0]) > 0
    assert service["restart"] == "unless-stopped"


def test_redis_keeps_every_accepted_job(compose: Any) -> None:
    command = " ".join(compose["services"]["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert compose["services"]["redis"]["volumes"] == ["redis:/data"]
    assert "redis" in compose["volumes"]


def test_services_wait_for_what_they_need(compose: Any) -> None:
    healthy = {"condition": "service_healthy"}
    for name in SCALED:
        assert compose["services"][name]["depends_on"] == {"redis": healthy}
    assert compose["services"]["gateway"]["depends_on"] == {"api": healthy}
    for name in ("api", "redis"):
        assert "test" in compose["services"][name]["healthcheck"]


def test_the_healthcheck_is_python_that_compiles(compose: Any) -> None:
    kind, program, option, code = compose["services"]["api"]["healthcheck"]["test"]
    assert (kind, program, option) == ("CMD", "python", "-c")
    compile(code, "healthcheck", "exec")


def test_the_image_runs_the_command_as_the_user_of_the_compose_file(compose: Any, dockerfile: str) -> None:
    assert 'ENTRYPOINT ["endmark"]' in dockerfile
    assert "USER 10001:10001" in dockerfile
    assert {compose["services"][name]["user"] for name in SCALED} == {"10001:10001"}
    variables = set(re.findall(r"ENDMARK_\w+", dockerfile))
    assert variables - SETTING_VARIABLES == set()


def test_the_image_gets_every_package_and_nothing_that_is_ignored(dockerfile: str) -> None:
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert all((ROOT / source).exists() for source in copied)
    assert {"api", "worker", "shared", "cli", "pyproject.toml", "uv.lock"} <= copied
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    assert copied == set(allowed)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${SET}", "yes"),
        ("$SET and $$SET", "yes and $SET"),
        ("${SET:-no}", "yes"),
        ("${UNSET:-no}", "no"),
        ("${EMPTY:-no}", "no"),
        ("${EMPTY-no}", ""),
        ("${UNSET}", ""),
        ("${SET:?why}", "yes"),
    ],
)
def test_interpolation_follows_compose(text: str, value: str) -> None:
    assert interpolate(text, {"SET": "yes", "EMPTY": ""}) == value


@pytest.mark.parametrize("text", ["${", "${A", "$(date)", "a $ b"])
def test_interpolation_refuses_what_compose_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="not compose's syntax"):
        interpolate(text, {})
