"""The examples run and print what they should, and the pages that a person starts with name only what there is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import click
import pytest

from cli.environment import NOT_SETTINGS
from cli.main import main
from shared.settings import Settings
from tests.deployment import KEY, Deployment, deployed, free_port
from tests.processes import ROOT, running

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests").rglob("*.md")])

_CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def run_example(service: Deployment, name: str, *arguments: str) -> str:
    """What an example prints, run as a person runs it. Warnings are errors there, too."""
    completed = subprocess.run(
        [sys.executable, "-W", "error", f"examples/{name}.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"OPENAI_BASE_URL": f"{service.base_url}/v1", "OPENAI_API_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stderr == ""
    return completed.stdout


# -- examples ----------------------------------------------------------------------------------------------------------


def test_hello_prints_what_the_readme_shows(tmp_path: Path, redis_url: str, prefix: str) -> None:
    with deployed(tmp_path, redis_url, prefix, agent="echo") as service:
        printed = run_example(service, "hello")
    after_snippet = README.split(f"```python\n{(ROOT / 'examples' / 'hello.py').read_text()}```\n")[1]
    shown = _CODE_BLOCK.search(after_snippet)
    assert shown
    assert printed == shown[2]


def test_the_receiver_prints_what_it_is_told(tmp_path: Path, redis_url: str, prefix: str) -> None:
    secret, port = "whsec_" + "A" * 32, free_port()
    command = [sys.executable, "-W", "error", "examples/webhook_receiver.py"]
    with ExitStack() as stack:
        receiver = stack.enter_context(
            running(command, folder=tmp_path, env={"WEBHOOK_SECRET": secret, "PORT": str(port)})
        )
        (tmp_path / "service").mkdir()
        service = stack.enter_context(
            deployed(
                tmp_path / "service",
                redis_url,
                prefix,
                agent="echo",
                webhook_url=f"http://127.0.0.1:{port}/",
                webhook_secret=secret,
                webhook_retry_s=0.1,
            )
        )
        with service.client() as client:
            answer = client.chat.completions.create(model="endmark", messages=[{"role": "user", "content": "Hello"}])
        receiver.wait_for_output(f"chat.completion.completed {answer.id}\n")


def test_the_concurrent_streams_are_all_whole(tmp_path: Path, redis_url: str, prefix: str) -> None:
    with deployed(tmp_path, redis_url, prefix, agent="echo") as service:
        printed = run_example(service, "stream_async")
    assert printed == "".join(f"{name}: Hello {name} (2 tokens)\n" for name in ("anna", "ben", "cleo"))


def test_both_ways_to_upload_reach_the_agent(tmp_path: Path, redis_url: str, prefix: str) -> None:
    with deployed(tmp_path, redis_url, prefix, agent="echo") as service:
        printed = run_example(service, "upload")
    assert printed == (
        "in the message: What is on my list? (1 file)\n"  # the echo agent counts files
        "as a form: What is on my list? (1 file)\n"
    )


def test_the_error_example_tells_whole_from_refused(tmp_path: Path, redis_url: str, prefix: str) -> None:
    with deployed(tmp_path, redis_url, prefix, agent="echo") as service:
        whole, refused = run_example(service, "errors").splitlines()
    assert whole == "whole: 'Hello'"
    assert refused.startswith("refused: 404 model_not_found: ")


def test_the_error_example_tells_whole_from_broken_off(tmp_path: Path, redis_url: str, prefix: str) -> None:
    with deployed(tmp_path, redis_url, prefix) as service:
        broken, _ = run_example(service, "errors", json.dumps({"say": ["Hel"], "then": "raise"})).splitlines()
    assert broken == "broken off after 'Hel': agent_error: The agent failed."


def test_the_background_example_goes_on_where_it_was_left(tmp_path: Path, redis_url: str, prefix: str) -> None:
    with deployed(tmp_path, redis_url, prefix, agent="echo") as service:
        printed = run_example(service, "background").splitlines()
    assert printed == ["Every word of this comes back.", printed[1], "And then?"]
    assert re.fullmatch(r"completed, \d+ tokens", printed[1])


@pytest.mark.parametrize(
    ("agent", "answers"),
    [
        (
            "my_agent",
            [
                "You have said 1 things, first 'one', last 'one'. ",
                "You have said 2 things, first 'one', last 'two'. ",
                "You have said 1 things, first 'three', last 'three'. ",
            ],
        ),
        ("generator_agent", ["On your list: one ", "On your list: one two ", "On your list: three "]),
        ("pydantic_agent", ['{"population":"unknown"}'] * 3),
        (
            "langgraph_agent",
            [f"Hello from a graph. You have asked {times} times." for times in (1, 2, 1)],
        ),
    ],
)
def test_the_example_agents_answer_and_remember_each_session(
    tmp_path: Path, redis_url: str, prefix: str, agent: str, answers: list[str]
) -> None:
    def say(session: str, text: str) -> str | None:
        answer = client.chat.completions.create(
            model="endmark", messages=[{"role": "user", "content": text}], extra_body={"session_id": session}
        )
        return answer.choices[0].message.content

    with (
        deployed(tmp_path, redis_url, prefix, agent=f"examples.{agent}:agent", session_ttl_s=60) as service,
        service.client() as client,
    ):
        assert [say("a", "one"), say("a", "two"), say("b", "three")] == answers


def test_every_example_is_tried_here() -> None:
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {
        *("hello", "stream_async", "upload", "errors", "background", "webhook_receiver"),
        *("my_agent", "generator_agent", "pydantic_agent", "langgraph_agent"),
    }


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_fits_on_a_screen(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40


# -- pages -------------------------------------------------------------------------------------------------------------


def code_of(page: str) -> list[str]:
    """The lines of all code blocks, and all code spans."""
    blocks = [line for _, block in _CODE_BLOCK.findall(page) for line in block.splitlines()]
    return blocks + _CODE_SPAN.findall(_CODE_BLOCK.sub("", page))


def anchors_of(page: str) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", _CODE_BLOCK.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_snippet_of_the_readme_is_the_first_example() -> None:
    [snippet] = [block for language, block in _CODE_BLOCK.findall(README) if language == "python"]
    assert snippet.encode() == (ROOT / "examples" / "hello.py").read_bytes()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    for link in _LINK.findall(_CODE_BLOCK.sub("", page)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{link} does not exist"
        assert target.is_relative_to(ROOT), f"{link} is outside of the project"
        assert not anchor or anchor in anchors_of(target.read_text(encoding="utf-8")), f"{link} has no such heading"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_that_is_named_exists(path: Path) -> None:
    for code in code_of(path.read_text(encoding="utf-8")):
        for name, rest in re.findall(r"\bendmark ([a-z]+)\b([^|&;#]*)", code):
            command = main.commands.get(name)
            assert isinstance(command, click.Command), f"there is no `endmark {name}`"
            for word in rest.split():
                if isinstance(command, click.Group) and word in command.commands:
                    command = command.commands[word]
            options = {option for parameter in command.params for option in parameter.opts}
            assert set(re.findall(r"--[a-z-]+", rest)) <= options, code


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_make_target_that_is_named_exists(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    for code in code_of(path.read_text(encoding="utf-8")):
        assert set(re.findall(r"\bmake ([a-z]+)", code)) <= targets, code


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_variable_that_is_named_exists(path: Path) -> None:
    known = {f"ENDMARK_{name.upper()}" for name in Settings.model_fields}
    known |= NOT_SETTINGS
    page = path.read_text(encoding="utf-8")
    assert set(re.findall(r"ENDMARK_[A-Z_]*[A-Z]", page)) <= known
