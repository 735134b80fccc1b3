"""What Redis is given to run: a script, and before it what it uses of the key names and the shared parts."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from shared import scripts

NAMES: tuple[scripts.ScriptName, ...] = get_args(scripts.ScriptName)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", re.sub(r"--.*", "", text))


def defined(text: str) -> list[str]:
    return re.findall(r"^local (?:function )?(\w+)", text, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_a_script_brings_along_no_more_than_it_uses(name: scripts.ScriptName) -> None:
    source = scripts.source(name)
    own = defined(scripts._read(name))
    assert [local for local in defined(source) if local not in own and words(source).count(local) < 2] == []


@pytest.mark.parametrize("name", NAMES)
def test_what_a_script_uses_stands_before_it(name: scripts.ScriptName) -> None:
    source = scripts.source(name)
    known = {local for local, _ in scripts._definitions()}
    assert known & set(words(source)) <= set(defined(source))
