"""nanobot as an agent, through its public facade. Importing this module imports nanobot, which takes a second.

Rule 1: a run that returns has not therefore succeeded. nanobot reports a failed model as a normal return whose content
        is the error; only `RunResult` and the last model response tell (case by case in its integration test).
Rule 2: a stream that nanobot starts over after it has shown text is a failure: the text would be there twice.
Rule 3: a tool is announced before it runs. nanobot's events come through a queue, so a hook holds the tools back until
        the announcement has been read from it and delivered.
Rule 4: nothing of a turn stays in the worker: its session goes with the outcome (worker/agents/nanobot_sessions.py),
        and subagents and processes that it started end with it. A request that brings its own history leaves nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import openai.resources.chat.completions  # noqa: F401 - or nanobot would import it in the middle of the first turn
from loguru import logger as nanobot_logger
from nanobot import Nanobot
from nanobot.agent import context_governance
from nanobot.agent.hook import AgentHook, AgentHookContext
from nanobot.agent.hooks import create_file_edit_activity_hook
from nanobot.agent.tools.registry import ToolRegistry
from nanobot.agent.tools.spawn import SpawnTool
from nanobot.command import CommandRouter
from nanobot.config.errors import ConfigLoadError
from nanobot.config.loader import load_config, resolve_config_env_vars, set_config_path
from nanobot.config.paths import get_media_dir
from nanobot.providers.factory import validate_provider_setup
from nanobot.providers.image_generation import image_gen_provider_configs

from shared.settings import DEFAULT_TENANT
from worker.agents.contract import AgentError, FinishReason, Outcome, Turn, Usage, Voice
from worker.agents.media import (
    EncodedFile,
    Message,
    divide_for_model,
    file_of,
    files_of,
    files_on_disk,
    parts_of,
    text_of,
)
from worker.agents.nanobot_mcp import ToolServers
from worker.agents.nanobot_sessions import TurnLoop, TurnSession, TurnSessions, TurnSessionStore, turn_session

# How the providers of nanobot say that an answer is whole. Anything else is a failure.
FINISH_REASONS: Final[Mapping[str, FinishReason]] = {
    "stop": "stop",
    "stop_sequence": "stop",  # Anthropic, Bedrock
    "length": "length",
    "content_filter": "content_filter",
    "content_filtered": "content_filter",  # Bedrock
    "guardrail_intervened": "content_filter",  # Bedrock
    "refusal": "content_filter",  # Anthropic, OpenAI Responses
}

# Tools that reach beyond the turn. A client must not read what others have said, and nobody would get the messages.
NOT_OFFERED: Final = ("list_sessions", "search_sessions", "read_session", "send_session_message", "message")

# Slash commands that concern the session of the turn. The others operate nanobot: its memory, its channels, its host.
OFFERED_COMMANDS: Final = ("/new", "/compact", "/history", "/model", "/status")

STARTED_OVER: Final = "The model behind the agent stopped in the middle of its answer."


class NanobotRunError(Exception):
    """What nanobot knew about a failed run, for the log. Its own text is left out: it may quote the answer."""


class NanobotAgent:
    """Runs each turn on one shared nanobot; turns of different sessions run side by side."""

    name = "nanobot"

    def __init__(self, bot: Nanobot, tool_servers: ToolServers) -> None:
        self._bot = bot
        self._tool_servers = tool_servers

    @classmethod
    def from_config(cls, path: Path) -> NanobotAgent:
        """Build nanobot from its configuration file; see `configuration_problem` for whether that can succeed.

        As nanobot's own `from_config` does, but with sessions, background work and MCP servers of our own.
        """
        nanobot_logger.disable("nanobot")  # it logs the beginning of every question and answer
        set_config_path(path)  # nanobot keeps its media beside its configuration
        config = resolve_config_env_vars(load_config(path), config_path=path)
        tools = ToolRegistry()
        loop = TurnLoop.from_config(
            config,
            image_generation_provider_configs=image_gen_provider_configs(config),
            hook_factories=[create_file_edit_activity_hook],
            tool_registry=tools,
            session_manager=TurnSessions(
                config.workspace_path, store=TurnSessionStore(), sessions_root=path.resolve().parent / "sessions"
            ),
        )
        for name in NOT_OFFERED:
            tools.unregister(name)
        loop.commands = _offered(loop.commands)
        context_governance.maybe_persist_tool_result = _shortened
        if tools.has("spawn"):
            tools.register(_WaitingSpawnTool(loop.subagents))
        return cls(Nanobot(loop, config=config), ToolServers(config, tools))

    async def run(self, turn: Turn, voice: Voice) -> Outcome:
        if turn.tenant != DEFAULT_TENANT:  # one workspace, one memory, one media folder
            raise AgentError("This agent serves one tenant only: keys with a tenant's name cannot use it.")
        await self._tool_servers.connect()
        key = f"endmark:{turn.job_id}:{turn.attempt}" if turn.owns_history else turn.session_key
        async with turn_session(key, None if turn.owns_history else turn.session_state) as session:
            try:
                outcome = await self._answer(turn, voice, session)
                await session.background()
            finally:
                await self._bot._loop.discard_session(key)  # subagents, processes, which files it has read
            return replace(outcome, session_state=None if turn.owns_history else session.record())

    async def _answer(self, turn: Turn, voice: Voice, session: TurnSession) -> Outcome:
        conversation = divide_for_model(turn)
        earlier = conversation.earlier
        earlier_files = [file for message in earlier for file in _referenced_files(message)]
        files = [*earlier_files, *files_of(conversation.question)]
        # nanobot's file tools may be confined to its workspace, but may always read its media directory.
        async with files_on_disk(files, parent=get_media_dir("api")) as paths:
            earlier_paths, media = paths[: len(earlier_files)], paths[len(earlier_files) :]
            if earlier:
                await self._bot.sessions.ingest(session.key, seed_messages(earlier, earlier_paths))
            hook = _TurnHook(self._tool_servers)
            stream = await self._bot.run_streamed(
                text_of(conversation.question),
                session_key=session.key,
                channel="api",
                chat_id="default",
                media=media or None,
                ephemeral=turn.owns_history,  # neither summarise the session nor learn from it
                hooks=[hook],
            )
            # Leaving this block early, cancelled or not, cancels the run and waits for its end.
            async with aclosing(stream.stream_events()) as events:
                speech = _Speech(voice, hook)
                async for event in events:
                    await speech.relay(event)
            result = await stream.wait()
        self._discard_channel_messages()
        outcome = _outcome(result, hook)
        await speech.finish(result.content)
        return outcome

    def _discard_channel_messages(self) -> None:
        """Empty nanobot's bus: its chat channels do not run here, and what is meant for them would pile up."""
        bus = self._bot._loop.bus
        for queue in (bus.outbound, bus.inbound):
            while not queue.empty():
                queue.get_nowait()

    async def aclose(self) -> None:
        try:
            await self._bot.aclose()
        finally:
            await self._tool_servers.aclose()


class _WaitingSpawnTool(SpawnTool):  # type: ignore[misc] # nanobot ships no types
    """nanobot's tool for subagents, which always waits for the result: after the turn nobody would receive it."""

    async def execute(self, **arguments: Any) -> Any:
        return await super().execute(**(arguments | {"wait": True}))


def _offered(commands: CommandRouter) -> CommandRouter:
    """The commands that a client may give. Others are text for the model, like anything else that begins with `/`."""
    offered = CommandRouter()
    for name, handler in commands._exact.items():
        if name in OFFERED_COMMANDS:
            offered.exact(name, handler)
    for prefix, handler in commands._prefix:
        if prefix.strip() in OFFERED_COMMANDS:
            offered.prefix(prefix, handler)
    return offered


def _shortened(
    _workspace: Path | None, _session_key: str | None, _tool_call_id: str, content: str, *, max_chars: int
) -> str:
    """A tool's result that is too long for the model, without its middle.

    nanobot would keep the whole in a file of its workspace, under names that sessions may share, and put a path into
    the session that means nothing on another host.
    """
    if max_chars <= 0 or len(content) <= max_chars:
        return content
    half = max_chars // 2
    left_out = len(content) - 2 * half
    return f"{content[:half]}\n[… {left_out} characters left out …]\n{content[-half:]}"


class _TurnHook(AgentHook):  # type: ignore[misc] # nanobot ships no types
    """What the events of one run do not tell."""

    def __init__(self, tool_servers: ToolServers) -> None:
        super().__init__(reraise=True)
        self._tool_servers = tool_servers
        self.announced_tools = asyncio.Semaphore(0)  # released once for each tool whose start was delivered
        self.last_response: Any = None  # the model's; None for a slash command, which asks no model
        self.started_over = False

    async def before_execute_tools(self, context: AgentHookContext) -> None:
        for _call in context.tool_calls:
            await self.announced_tools.acquire()

    async def on_stream_end(self, context: AgentHookContext, *, resuming: bool) -> None:  # noqa: ARG002 - their signature
        if context.response is None:  # a segment ended, but the request did not: the provider is about to repeat it
            self.started_over = True
            raise AgentError(STARTED_OVER)

    async def after_iteration(self, context: AgentHookContext) -> None:
        self.last_response = context.response
        for call, event in zip(context.tool_calls, context.tool_events, strict=False):  # no events: no tool ran
            server = self._tool_servers.lost_server_of(call.name) if event.get("status") != "ok" else None
            if server is not None:
                raise AgentError(f"The agent needs its tool server {server!r}, which is not available.")


class _Speech:
    """Turns the events of one run into what the voice says."""

    def __init__(self, voice: Voice, hook: _TurnHook) -> None:
        self._voice = voice
        self._hook = hook
        self._said_text = False
        self._said_text_since_tool = False

    async def relay(self, event: Any) -> None:
        match event.type:
            case "text.delta":
                self._said_text = self._said_text_since_tool = True
                await self._voice.text(event.delta)
            case "reasoning.delta":
                await self._voice.reasoning(event.delta)
            case "tool.started":
                self._said_text_since_tool = False
                await self._voice.tool(event.name, "started", call_id=event.tool_call_id)
                self._hook.announced_tools.release()
            case "tool.completed":
                await self._voice.tool(event.name or "", "completed", call_id=event.tool_call_id)
            case "tool.failed":
                await self._voice.tool(event.name or "", "failed", call_id=event.tool_call_id)

    async def finish(self, content: str) -> None:
        """Say an answer that came in one piece after a tool, if text before the tool was streamed.

        `Outcome.text` is not delivered then. nanobot ends like this when it had to ask the model again, because the
        answer was empty.
        """
        if content and self._said_text and not self._said_text_since_tool:
            await self._voice.text(f"\n\n{content}")


def _outcome(result: Any, hook: _TurnHook) -> Outcome:
    """How a run ended. Raises `AgentError` unless its answer is whole."""
    response = hook.last_response
    finish_reason = response.finish_reason if response is not None else "stop"
    whole = result.error is None and result.stop_reason in (None, "completed") and not hook.started_over
    if not whole or finish_reason not in FINISH_REASONS:
        raise AgentError(_public_message(result, hook)) from NanobotRunError(
            f"stop_reason={result.stop_reason} finish_reason={finish_reason} started_over={hook.started_over} "
            f"http_status={getattr(response, 'error_status_code', None)} kind={getattr(response, 'error_kind', None)} "
            f"code={getattr(response, 'error_code', None)}"
        )
    usage = result.usage and Usage(
        prompt_tokens=result.usage.input_tokens, completion_tokens=result.usage.output_tokens
    )
    return Outcome(finish_reason=FINISH_REASONS[finish_reason], usage=usage, text=result.content)


def _public_message(result: Any, hook: _TurnHook) -> str:
    if hook.started_over:
        return STARTED_OVER
    response = hook.last_response
    status = getattr(response, "error_status_code", None)
    if status:
        return f"The model behind the agent failed (HTTP {status})."
    if result.stop_reason == "max_iterations":
        return "The agent reached its limit of steps before it had an answer."
    if result.stop_reason == "empty_final_response":
        return "The model behind the agent gave no answer."
    if getattr(response, "error_kind", None) in ("connection", "timeout"):
        return "The connection to the model behind the agent failed."
    return "The model behind the agent failed."


def seed_messages(earlier: Sequence[Message], paths: Sequence[str]) -> list[dict[str, Any]]:
    """Earlier messages in the form that a nanobot session keeps and replays.

    nanobot has its own system prompt and replays a session from its first *user* message on. So the client's system
    and developer messages, which it would drop, become an opening user message. Images stay in place; other files are
    replaced by a reference to their path, as nanobot does with attachments. `paths` are those of `_referenced_files`
    of all the messages, in order.
    """
    instructions = [text_of(message) for message in earlier if message.get("role") in ("system", "developer")]
    others = [message for message in earlier if message.get("role") not in ("system", "developer")]
    seed: list[dict[str, Any]] = []
    if instructions:
        opening = "\n\n".join(["Instructions of the application that you are serving:", *instructions])
        seed.append({"role": "user", "content": opening})
    elif others and others[0].get("role") != "user":
        seed.append({"role": "user", "content": "(You speak first.)"})
    remaining = iter(paths)
    for message in others:
        kept = {key: message[key] for key in ("tool_calls", "tool_call_id", "name") if key in message}
        seed.append({"role": message["role"], "content": _seed_content(message, remaining), **kept})
    return seed


def _seed_content(message: Message, remaining_paths: Any) -> str | list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for part in parts_of(message):
        if _is_referenced(part):
            parts.append({"type": "text", "text": f"[Attachment: {next(remaining_paths)}]"})
        elif part.get("type") == "refusal":
            parts.append({"type": "text", "text": part.get("refusal") or ""})
        else:
            parts.append(dict(part))
    if any(part.get("type") != "text" for part in parts):
        return parts
    return " ".join(str(part.get("text") or "") for part in parts)


def _referenced_files(message: Message) -> list[EncodedFile]:
    return [file for part in parts_of(message) if _is_referenced(part) and (file := file_of(part)) is not None]


def _is_referenced(part: Mapping[str, Any]) -> bool:
    return part.get("type") in ("file", "input_audio")


def configuration_problem(path: Path) -> str | None:
    """Why nanobot cannot run with this existing configuration file, as a clause; None if it can."""
    try:
        validate_provider_setup(resolve_config_env_vars(load_config(path), config_path=path))
    except (ConfigLoadError, ValueError) as error:
        return f"{path}: {str(error).rstrip('.')}"
    return None
