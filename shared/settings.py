"""Every setting, read once from the environment (prefix `ENDMARK_`).

`docs/settings.md` lists them; a test keeps that list true. Durations are seconds, sizes are bytes.
"""

from __future__ import annotations

import re
from functools import cached_property
from ipaddress import ip_address
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from shared.destinations import destination
from shared.sentinel import is_sentinel_url, parse_sentinel_url
from shared.signing import signing_key

DEFAULT_TENANT = "default"  # of keys without a name, and of a deployment without keys
_TENANT = re.compile(r"[a-z][a-z0-9_]{0,31}")


class TenantKey(NamedTuple):
    """An API key, and whose it is. Several keys may be one tenant's, so that it can change its key."""

    key: bytes  # compared with what a client sends, in constant time
    tenant: str


class Settings(BaseSettings):
    """The configuration of one process. Building it raises `pydantic.ValidationError` on a bad value."""

    model_config = SettingsConfigDict(env_prefix="ENDMARK_", frozen=True, extra="ignore", hide_input_in_errors=True)

    redis_url: str = Field(
        "redis://127.0.0.1:6379/0",
        description="The Redis or Valkey server that all share: `redis://`, `rediss://` (TLS) or `unix://`; or the "
        "sentinels that know it: `redis+sentinel://[user:password@]host:26379,host:26379/service/db`, "
        "`rediss+sentinel://` (TLS).",
    )
    prefix: str = Field(
        "endmark",
        pattern=r"^[A-Za-z0-9_.-]{1,64}$",
        description="Prefix of our keys; deployments with different prefixes share a server.",
    )

    agent: str = Field(
        "auto",
        pattern=r"^(auto|nanobot|openai|echo|[A-Za-z_][\w.]*:[A-Za-z_][\w.]*)$",
        description="`auto`, `nanobot`, `openai`, `echo`, or `module:attribute` (see docs/agents.md).",
    )
    model_name: str = Field("endmark", min_length=1, max_length=200, description="The model id that clients name.")
    openai_model: str = Field("gpt-5-mini", min_length=1, description="The model that the `openai` agent asks.")

    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        description="Bearer keys, comma-separated. `name:key` belongs to the tenant `name`, a key without a name "
        "to the tenant `default`. Required as soon as `HOST` is not a loopback address.",
    )
    admin_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        description="Bearer keys of operators, comma-separated: they see every tenant's jobs, and may act on jobs, "
        "queue and workers, over HTTP or at `/dashboard`. Without any, only a deployment without `API_KEYS` can be "
        "operated.",
    )
    host: str = Field("127.0.0.1", description="The address that the API binds.")
    port: int = Field(8900, ge=0, le=65535, description="The port that the API binds; 0 takes a free one.")
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Browser origins that may call the API, comma-separated; `*` for any. Empty: CORS is off."
    )

    max_jobs: int = Field(50, ge=1, le=10_000, description="Jobs that one worker runs at a time.")
    max_unfinished: int = Field(10_000, ge=1, description="Jobs that may run or wait; more are refused with 429.")
    max_session_turns: int = Field(
        100, ge=1, description="Turns of one session that may run or wait; more are refused with 429."
    )
    max_attempts: int = Field(
        2, ge=1, le=10, description="Executions of a job whose worker dies before anything was shown."
    )
    max_body_bytes: int = Field(20 * 1024 * 1024, ge=1024, description="The largest request body; more is a 413.")
    max_file_bytes: int = Field(10 * 1024 * 1024, ge=1, description="The largest file in a request; more is a 413.")
    max_answer_bytes: int = Field(
        64 * 1024 * 1024, ge=1024, description="The most that an agent may say in one job; more fails it."
    )
    max_tenant_file_bytes: int = Field(
        1024 * 1024 * 1024, ge=1, description="What the uploaded files of one tenant may hold together; more is a 413."
    )
    file_ttl_s: int = Field(
        24 * 3600, ge=1, description="How long an uploaded file is kept; `expires_after` may shorten it."
    )
    default_session: str = Field(
        "default",
        pattern=r"^[^\x00-\x1f\x7f]{0,256}$",
        description="The session of a single user message without `session_id`. Empty: such a message has none.",
    )

    max_session_bytes: int = Field(
        10 * 1024 * 1024, ge=1024, description="The largest session state that an agent may leave to the next turn."
    )
    session_ttl_s: float = Field(
        0, ge=0, description="How long a session is remembered after its last turn; 0: for ever."
    )

    queue_timeout_s: float = Field(300, gt=0, description="How long a job may wait for a worker.")
    run_timeout_s: float = Field(600, gt=0, description="How long one attempt may run.")
    idle_timeout_s: float = Field(120, gt=0, description="How long a running agent may say nothing.")
    drain_timeout_s: float = Field(30, ge=0, description="How long a stopping worker lets its jobs finish.")
    lease_s: float = Field(5, gt=0.5, description="How long a worker may be silent before it counts as lost.")
    stuck_after_s: float = Field(
        30,
        ge=1,
        description="How long an agent may block its worker's event loop before the worker counts as lost. Longer than "
        "any blocking tool that you tolerate.",
    )
    redis_patience_s: float = Field(15, gt=0, description="How long an open stream outlives an unreachable Redis.")
    retention_s: float = Field(3600, ge=1, description="How long a finished job and its stream are kept.")
    ping_interval_s: float = Field(15, gt=0, description="A silent stream gets an SSE comment this often.")
    heartbeat_interval_s: float = Field(45, gt=0, description="A silent stream gets an empty chunk this often.")

    stall_timeout_s: float = Field(
        60,
        gt=0,
        description="How long a client may take nothing of its answer, or send nothing of its request, before its "
        "connection is closed.",
    )

    inspect_content: bool = Field(
        True,
        description="Whether `/v1/jobs/{id}` and the dashboard show what was said, and operators may watch it.",
    )
    webhook_url: str = Field("", description="Where the end of every job is told. Empty: only where a request says so.")
    webhook_secret: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        description="What webhooks are signed with: `whsec_` and the base64 of 24 to 64 bytes. Of several, "
        "comma-separated, each signs, so that a secret can be changed.",
    )
    webhook_allow_private: bool = Field(
        False,
        description="Whether requests may have their webhooks sent to private addresses, and over http. The "
        "deployment's own may always go there.",
    )
    webhook_timeout_s: float = Field(15, gt=0, le=300, description="How long an endpoint may take to answer a webhook.")
    webhook_max_attempts: int = Field(10, ge=1, le=20, description="How often a webhook is sent before it is given up.")
    webhook_retry_s: float = Field(
        5,
        gt=0,
        le=3600,
        description="How long after its first failure a webhook is sent again. Each later wait is four times as long, "
        "up to 6 hours.",
    )
    metrics_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="The port on which a worker answers Prometheus (docs/observability.md); 0: none. The API does on "
        "its own.",
    )
    metrics_host: str = Field(
        "127.0.0.1",
        description="The address for `METRICS_PORT`. It asks for no key: bind what only Prometheus reaches.",
    )
    log_format: Literal["auto", "console", "json"] = Field("auto", description="`auto`: console on a terminal.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="The least severe line logged.")

    @field_validator("redis_url")
    @classmethod
    def _redis_url_is_one_of_ours(cls, url: str) -> str:
        if is_sentinel_url(url):
            parse_sentinel_url(url)
        elif not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError(
                "a Redis URL begins with redis://, rediss://, unix://, redis+sentinel:// or rediss+sentinel://"
            )
        return url

    @field_validator("api_keys", "admin_keys", "cors_origins", "webhook_secret", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("api_keys")
    @classmethod
    def _keys_belong_to_somebody(cls, entries: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        """Neither a misspelt name nor a key of two tenants is found out by a request that should have been refused."""
        owners: dict[bytes, str] = {}
        for number, entry in enumerate(entries, start=1):
            key, tenant = _tenant_key(entry)
            if not key or not _TENANT.fullmatch(tenant):
                raise ValueError(
                    f"entry {number} must be a key without a colon, or name:key with a name of a-z, 0-9 and _ that "
                    "begins with a letter"
                )
            if owners.setdefault(key, tenant) != tenant:
                raise ValueError(f"the key of entry {number} belongs to two tenants")
        return entries

    @field_validator("webhook_url")
    @classmethod
    def _webhook_url_is_one(cls, url: str) -> str:
        if url:
            destination(url, public_only=False)
        return url

    @field_validator("webhook_secret")
    @classmethod
    def _webhook_secrets_are_keys(cls, secrets: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for secret in secrets:
            signing_key(secret.get_secret_value())
        return secrets

    @model_validator(mode="after")
    def _require_webhook_secret(self) -> Settings:
        if self.webhook_url and not self.webhook_secret:
            raise ValueError(
                "ENDMARK_WEBHOOK_URL needs ENDMARK_WEBHOOK_SECRET: without it nobody could tell who sent a webhook"
            )
        return self

    @model_validator(mode="after")
    def _require_keys_beyond_loopback(self) -> Settings:
        if not self.api_keys and not is_loopback(self.host):
            raise ValueError(
                f"ENDMARK_HOST={self.host} is reachable from other machines: set ENDMARK_API_KEYS to one or more "
                "comma-separated keys, or bind 127.0.0.1"
            )
        return self

    @model_validator(mode="after")
    def _admin_keys_are_no_tenants(self) -> Settings:
        if {key.get_secret_value().encode() for key in self.admin_keys} & {key for key, _ in self.tenant_keys}:
            raise ValueError("ENDMARK_ADMIN_KEYS holds one of ENDMARK_API_KEYS: give operators a key of their own")
        return self

    @cached_property
    def tenant_keys(self) -> tuple[TenantKey, ...]:
        """Every API key with its tenant."""
        return tuple(_tenant_key(entry) for entry in self.api_keys)

    @cached_property
    def webhook_keys(self) -> tuple[bytes, ...]:
        """What the deployment's webhooks are signed with."""
        return tuple(signing_key(secret.get_secret_value()) for secret in self.webhook_secret)


def _tenant_key(entry: SecretStr) -> TenantKey:
    name, colon, key = entry.get_secret_value().partition(":")
    return TenantKey(key.encode(), name) if colon else TenantKey(name.encode(), DEFAULT_TENANT)


def is_loopback(host: str) -> bool:
    """Whether a bind address is reachable from this machine only. A name other than localhost is not trusted."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
