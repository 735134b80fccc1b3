"""Key names: the same in Python and in Lua, apart for each deployment, together for each job."""

from __future__ import annotations

import re
from typing import get_args

import fakeredis
import pytest
from arq.constants import job_key_prefix

from shared import scripts
from shared.keys import Keys, lua_names

IDS = ["chatcmpl-0123456789abcdef", "host-17-ab%s", "api:é 🙂", "%d%%"]

SHARED = ("queue", "bell", "deadlines", "workers", "webhooks", "paused", "audit", "sweeper", "shelves")
PER_ID = {
    "job_key": "job",
    "request_key": "request",
    "attachments_key": "attachments",
    "files_key": "files",
    "file_bytes_key": "file_bytes",
    "stream_key": "stream",
    "packing_key": "packing",
    "times_key": "times",
    "stream_channel": "stream_channel",
    "webhook_key": "webhook",
    "turns_key": "turns",
    "session_key": "session",
    "once_key": "once",
    "worker_key": "worker",
    "worker_jobs_key": "worker_jobs",
    "worker_channel": "worker_channel",
    "shelf_key": "shelf",
    "ended_key": "ended",
    "session_jobs_key": "session_jobs",
    "worker_jobs_ended_badly_key": "worker_jobs_ended_badly",
}  # Lua's name of each: Python's


def in_lua(expression: str, prefix: str, *args: str) -> str:
    """What an expression is in a script that begins with all key names."""
    with fakeredis.FakeRedis(server=fakeredis.FakeServer(version=(7,))) as redis:
        answer = redis.eval(f"{lua_names()}\nreturn {expression}", 0, prefix, *args)
    assert isinstance(answer, bytes)
    return answer.decode()


@pytest.mark.parametrize("name", SHARED)
def test_lua_names_the_keys_of_a_deployment_as_python_does(name: str) -> None:
    assert in_lua(name, "some-prefix") == getattr(Keys("some-prefix"), name)


@pytest.mark.parametrize("lua_name", PER_ID)
@pytest.mark.parametrize("identity", IDS)
def test_lua_names_what_belongs_to_an_id_as_python_does(lua_name: str, identity: str) -> None:
    expected = getattr(Keys("some-prefix"), PER_ID[lua_name])(identity)
    assert in_lua(f"{lua_name}(ARGV[2])", "some-prefix", identity) == expected


def test_lua_names_the_file_of_a_tenant_as_python_does() -> None:
    assert in_lua("file_key(ARGV[2] .. ':' .. ARGV[3])", "p", "acme", "file-1") == Keys("p").file("acme", "file-1")


def test_lua_names_the_jobs_with_a_pair_of_metadata_as_python_does() -> None:
    expected = Keys("p").pair_jobs("acme", "q83vEjRWeJA")
    assert in_lua("pair_jobs_key(ARGV[2] .. ':' .. ARGV[3])", "p", "acme", "q83vEjRWeJA") == expected


def test_lua_names_the_place_of_a_deleted_job_as_python_does() -> None:
    assert in_lua("deleted_key(ARGV[2] .. ':' .. ARGV[3])", "p", "acme", "J") == Keys("p").deleted("acme", "J")


def test_lua_names_arqs_keys_as_arq_does() -> None:
    assert in_lua("arq_job_key(ARGV[2])", "p", "id") == f"{job_key_prefix}id"


def test_every_name_that_lua_knows_is_tested_here() -> None:
    known = re.findall(r"^local (?:function )?(\w+)", lua_names(), re.MULTILINE)
    assert sorted(known) == sorted(["P", *SHARED, *PER_ID, "file_key", "pair_jobs_key", "deleted_key", "arq_job_key"])


def test_what_belongs_to_one_job_is_one_slot() -> None:
    keys = Keys("p")
    for name in (keys.job("id"), keys.request("id"), keys.stream("id"), keys.stream_channel("id")):
        assert re.findall(r"\{(.*?)\}", name) == ["id"]


def test_deployments_do_not_meet() -> None:
    ours, theirs = Keys("a"), Keys("b")
    assert not {ours.queue, ours.bell, ours.deadlines, ours.workers} & {theirs.queue, theirs.bell, theirs.deadlines}
    assert ours.job("x") != theirs.job("x")


@pytest.mark.parametrize("name", get_args(scripts.ScriptName))
def test_every_script_can_be_loaded(name: scripts.ScriptName) -> None:
    with fakeredis.FakeRedis(server=fakeredis.FakeServer(version=(7,))) as redis:
        assert redis.script_load(scripts.source(name))
