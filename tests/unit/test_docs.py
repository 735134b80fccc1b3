"""The documents are complete: what the code knows, they name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from api.errors import JobFailedError
from shared.entries import ErrorMarker, Kind, OkMarker, Tally
from shared.jobs import ErrorCode, Status
from shared.keys import Keys
from shared.scripts import ScriptName
from tests.processes import ROOT

DOCS = ROOT / "docs"
PROTOCOL = (DOCS / "protocol.md").read_text(encoding="utf-8")
ARCHITECTURE = (DOCS / "architecture.md").read_text(encoding="utf-8")
GLOSSARY = (DOCS / "glossary.md").read_text(encoding="utf-8")
DECISIONS = DOCS / "decisions"

TERMS = {
    *("job", "arq job", "attempt", "claim", "lease", "zombie", "stream", "entry", "entry id", "delta", "marker"),
    *("terminal", "cursor", "catch-up", "tail", "relay", "frame", "chunk", "heartbeat", "ping", "deadline", "timeout"),
    *("drain", "retention", "session", "turn", "sweep", "bell", "release", "fenced", "opening", "tally", "agent"),
}


@pytest.mark.parametrize("word", [*Kind, *ErrorCode], ids=lambda word: f"{type(word).__name__} {word.value}")
def test_the_protocol_explains_it_in_a_row(word: Kind | ErrorCode) -> None:
    heading = "## 3. The stream" if isinstance(word, Kind) else "## 5. Markers"
    section = PROTOCOL.split(f"\n{heading}\n")[1].split("\n## ")[0]
    assert f"\n| `{word.value}` |" in section


@pytest.mark.parametrize("status", list(Status))
def test_the_protocol_names_every_status(status: Status) -> None:
    assert f"`{status.value}`" in PROTOCOL


@pytest.mark.parametrize("code", list(ErrorCode))
def test_the_protocol_gives_the_http_status_of_a_code(code: ErrorCode) -> None:
    [row] = [line for line in PROTOCOL.splitlines() if line.startswith(f"| `{code.value}` |")]
    status = row.rsplit("|", 2)[1].strip()
    assert int(status) == JobFailedError(ErrorMarker(code, "")).status


def test_the_protocol_names_every_key_and_channel() -> None:
    keys = Keys("P")
    names = {keys.queue, keys.bell, keys.deadlines, keys.workers, keys.sweeper, keys.webhooks}
    names |= {keys.job("J"), keys.request("J"), keys.stream("J"), keys.stream_channel("J"), keys.packing("J")}
    names |= {keys.webhook("J")}
    names |= {keys.shelves, keys.shelf("L"), keys.ended("L"), keys.session_jobs("S"), keys.pair_jobs("T", "D")}
    names |= {keys.worker_jobs_ended_badly("W"), keys.deleted("T", "J")}
    names |= {keys.worker("W"), keys.worker_jobs("W"), keys.worker_channel("W"), keys.turns("S"), keys.session("S")}
    assert [name for name in names if f"`{name}`" not in PROTOCOL] == []


def test_the_ok_marker_of_the_protocol_is_the_one_of_its_example() -> None:
    tally = Tally()
    for payload in (b"Hel", b"lo"):
        tally.add(Kind.DELTA, payload)
    [example] = re.findall(r'^\{"entries".*\}$', PROTOCOL, re.MULTILINE)
    assert OkMarker.parse(example.encode()).confirms(tally)
    assert list(json.loads(example)) == list(OkMarker._fields)


def test_the_protocol_names_every_script() -> None:
    names = get_args(ScriptName)
    assert {path.stem for path in (ROOT / "shared" / "lua").glob("[a-z]*.lua")} == set(names)
    assert [name for name in names if f"{name}.lua" not in PROTOCOL] == []


def test_the_tests_that_the_guarantees_name_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (DOCS / "guarantees.md").read_text(encoding="utf-8")))
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert named
    assert [name for name in sorted(named) if f"def {name}(" not in sources] == []


def test_the_architecture_names_every_module() -> None:
    modules = [
        path.relative_to(ROOT).as_posix()
        for package in ("api", "worker", "shared", "cli")
        for path in (ROOT / package).glob("*.py")
        if path.name != "__init__.py"
    ]
    assert [module for module in modules if f"`{module}`" not in ARCHITECTURE] == []


def test_the_architecture_names_every_status() -> None:
    assert [status.value for status in Status if f"`{status.value}`" not in ARCHITECTURE] == []


def test_the_glossary_has_every_term() -> None:
    first_cells = re.findall(r"^\| ([^|]+) \|", GLOSSARY, re.MULTILINE)
    defined = {term.strip() for cell in first_cells for term in cell.split(",")}
    assert TERMS - defined == set()


def test_no_term_is_defined_twice() -> None:
    first_cells = re.findall(r"^\| ([^|]+) \|", GLOSSARY, re.MULTILINE)
    terms = [term.strip() for cell in first_cells for term in cell.split(",")]
    assert sorted(terms) == sorted(set(terms))


def test_the_list_of_decisions_is_complete() -> None:
    files = sorted(path.name for path in DECISIONS.glob("0*.md"))
    index = (DECISIONS / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((0[^)]+)\)", index) == files
    numbers = [int(name.partition("-")[0]) for name in files]
    assert numbers == list(range(1, len(files) + 1))


@pytest.mark.parametrize("path", sorted(DECISIONS.glob("0*.md")), ids=lambda path: path.stem)
def test_a_decision_has_its_three_parts(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == ["Context", "Decision", "Consequences"]
    assert page.startswith(f"# {path.stem[:4]}: ")
