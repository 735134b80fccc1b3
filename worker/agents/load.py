"""Which agent a worker runs, and why.

`ENDMARK_AGENT` names it: `nanobot`, `openai`, `echo`, `module:attribute`, or `auto`, which takes the first of the three
that is ready to run.

Errors:
    AgentLoadError        the agent cannot be built; the message says what to do about it
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from traceback import StackSummary, TracebackException
from typing import Any

from shared.settings import Settings
from worker.agents.contract import Agent
from worker.agents.echo import EchoAgent
from worker.agents.events import EventsAgent
from worker.agents.process_direct import ProcessDirectAgent

INSTALL_NANOBOT = "install the extra `nanobot`: `make install EXTRA=nanobot` in a checkout"


class AgentLoadError(Exception):
    """The agent that the settings name cannot be built."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """An agent, before it is built."""

    name: str  # `nanobot`, `openai`, `echo` or `module:attribute`
    reason: str  # one sentence for the start-up message, without a full stop

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def choose_agent(settings: Settings, environ: Mapping[str, str]) -> Choice:
    """Decide which agent to run. Reads nanobot's configuration, builds nothing."""
    if settings.agent != "auto":
        return Choice(name=settings.agent, reason="named by ENDMARK_AGENT")
    problem = nanobot_problem(environ)
    if problem is None:
        return Choice(name="nanobot", reason="nanobot is installed and configured")
    for variable in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        if environ.get(variable):
            return Choice(name="openai", reason=f"{variable} is set, and {problem}")
    return Choice(name="echo", reason=f"{problem}, and neither OPENAI_API_KEY nor OPENAI_BASE_URL is set")


def nanobot_problem(environ: Mapping[str, str]) -> str | None:
    """Why nanobot cannot run here, as one clause; None if it can."""
    if find_spec("nanobot") is None:
        return "nanobot is not installed"
    path = nanobot_config_path(environ)
    if not path.is_file():  # asked first: importing nanobot takes a second
        return f"nanobot is not configured ({path} does not exist)"
    from worker.agents.nanobot import configuration_problem

    problem = configuration_problem(path)
    return problem and f"nanobot is not configured ({problem})"


def nanobot_config_path(environ: Mapping[str, str]) -> Path:
    """Where nanobot's configuration is: `NANOBOT_CONFIG`, or nanobot's own default."""
    named = environ.get("NANOBOT_CONFIG")
    return Path(named).expanduser() if named else Path.home() / ".nanobot" / "config.json"


def load_agent(settings: Settings, environ: Mapping[str, str] = os.environ) -> Agent:
    """Build the agent that the settings choose. Raises `AgentLoadError`."""
    choice = choose_agent(settings, environ)
    match choice.name:
        case "echo":
            return EchoAgent()
        case "openai":
            return _load_openai(settings, environ)
        case "nanobot":
            return _load_nanobot(environ)
        case name:
            return adapt(_import_attribute(name), name)


def _load_openai(settings: Settings, environ: Mapping[str, str]) -> Agent:
    from worker.agents.openai import OpenAIAgent

    if not (environ.get("OPENAI_API_KEY") or environ.get("OPENAI_BASE_URL")):
        raise AgentLoadError("the openai agent needs OPENAI_API_KEY, or OPENAI_BASE_URL for a server without keys")
    return OpenAIAgent.from_environment(model=settings.openai_model, environ=environ)


def _load_nanobot(environ: Mapping[str, str]) -> Agent:
    problem = nanobot_problem(environ)
    if find_spec("nanobot") is None:
        raise AgentLoadError(f"{problem}; {INSTALL_NANOBOT}")
    if problem is not None:
        raise AgentLoadError(f"{problem}; run `nanobot onboard`, or set NANOBOT_CONFIG to a configuration file")
    from worker.agents.nanobot import NanobotAgent

    return NanobotAgent.from_config(nanobot_config_path(environ))


def _import_attribute(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:  # a console script does not search the working directory
        sys.path.insert(0, here)
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _failed(name, "cannot be imported", error) from error  # one of its own imports is missing
        raise AgentLoadError(
            f"ENDMARK_AGENT={name}: there is no module {error.name!r} in {here} or on PYTHONPATH"
        ) from error
    except Exception as error:
        raise _failed(name, "cannot be imported", error) from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise AgentLoadError(f"ENDMARK_AGENT={name}: module {module_name!r} has no {attribute!r}") from error


def _failed(name: str, what: str, error: Exception) -> AgentLoadError:
    """With the lines of the user's own code, and none of ours or of Python's imports."""
    told = TracebackException.from_exception(error)
    told.stack = StackSummary.from_list(
        [frame for frame in told.stack if frame.filename != __file__ and "importlib" not in frame.filename]
    )
    lines = [line for line in told.format(chain=False) if not line.startswith("Traceback")]
    return AgentLoadError(f"ENDMARK_AGENT={name} {what}:\n\n{''.join(lines).rstrip()}")


def adapt(candidate: Any, name: str) -> Agent:
    """Make an agent of what ENDMARK_AGENT names: something that we can run, or a callable that returns it.

    `name` is what the user wrote, for messages. Raises `AgentLoadError` if it is none of these.
    """
    agent = None if inspect.isclass(candidate) else _as_agent(candidate, name)
    if agent is None and callable(candidate):
        candidate = _call_factory(candidate, name)
        agent = _as_agent(candidate, name)
    missing = [member for member in ("name", "run", "aclose") if not hasattr(candidate, member)]
    if agent is None and "run" not in missing:
        raise AgentLoadError(f"ENDMARK_AGENT={name} has `run`, but no {' and no '.join(f'`{it}`' for it in missing)}")
    if agent is None:
        raise AgentLoadError(
            f"ENDMARK_AGENT={name} is a {type(candidate).__name__}; it must be an async generator function, "
            "a pydantic-ai agent, a compiled LangGraph graph, an object with `process_direct`, or with `name`, `run` "
            "and `aclose` (worker/agents/contract.py), or a function without arguments that returns one of these"
        )
    return agent


def _as_agent(candidate: Any, name: str) -> Agent | None:
    """What runs this object; None if nothing does. Imports a library only for an object that comes from it."""
    if inspect.isasyncgenfunction(candidate):
        return _generator(candidate, name)
    libraries = {base.__module__.partition(".")[0] for base in type(candidate).__mro__}
    if "pydantic_ai" in libraries:
        from pydantic_ai.agent import AbstractAgent

        from worker.agents.pydantic_ai import PydanticAIAgent

        return PydanticAIAgent(candidate, name=name) if isinstance(candidate, AbstractAgent) else None
    if "langgraph" in libraries:
        from langgraph.graph.state import CompiledStateGraph

        from worker.agents.langgraph import LangGraphAgent

        if not isinstance(candidate, CompiledStateGraph):
            return None
        if "messages" not in candidate.channels:
            raise AgentLoadError(f"ENDMARK_AGENT={name} is a graph whose state has no `messages`")
        return LangGraphAgent(candidate, name=name)
    if isinstance(candidate, Agent):
        return candidate
    if callable(getattr(candidate, "process_direct", None)):
        return ProcessDirectAgent(candidate, name=name)
    return None


def _generator(function: Any, name: str) -> Agent:
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        raise AgentLoadError(f"ENDMARK_AGENT={name} must take the turn as its one argument ({error})") from error
    return EventsAgent(function, name=name)


def _call_factory(factory: Any, name: str) -> Any:
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        if inspect.iscoroutinefunction(factory) or inspect.isgeneratorfunction(factory):
            raise AgentLoadError(
                f"ENDMARK_AGENT={name} must be an async generator function: `async def`, and `yield` what it says"
            ) from error
        raise AgentLoadError(f"ENDMARK_AGENT={name} must be callable without arguments ({error})") from error
    except ValueError:
        pass  # a builtin without a signature: the call will tell
    try:
        made = factory()
    except Exception as error:
        raise _failed(name, "cannot be made", error) from error
    if inspect.iscoroutine(made):
        made.close()
        raise AgentLoadError(f"ENDMARK_AGENT={name} is an async function; make it a plain one that returns the agent")
    return made
