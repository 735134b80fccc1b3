"""The MCP servers of nanobot's configuration: connected once for each worker, and again when one was lost.

Rule 1: a server that is down is no error of the worker, nor of a turn that does not call it: the model is not told of
        its tools. A turn that calls one all the same, or finds the server lost when it does, fails.
Rule 2: each server is connected for itself and within a deadline. nanobot connects them one after the other, without
        one, and lets go of all of them when a connect is cancelled: a server that hangs would cost the others, too.
Rule 3: a turn waits for the first attempt to connect a server. One that is down is tried again every few seconds, by a
        turn that waits for it a little.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import structlog
from nanobot.agent.plugins import agent_plugin_mcp_servers
from nanobot.agent.tools.mcp import MCPProvider, _tool_prefix
from nanobot.agent.tools.registry import ToolRegistry

log = structlog.get_logger(__name__)

CONNECT_TIMEOUT_S: Final = 30.0  # after which an attempt is given up; a server may first have to be downloaded
RETRY_PAUSE_S: Final = 5.0  # between the end of an attempt that failed and the next one
RETRY_PATIENCE_S: Final = 5.0  # how long turns wait for another attempt, from its beginning


class ToolServer:
    """One server, connected or not."""

    def __init__(self, name: str, config: Any, tools: ToolRegistry) -> None:
        self.name = name
        self.tool_prefix: str = _tool_prefix(name)
        self._provider = MCPProvider({name: config}, tools)
        self._attempt: asyncio.Task[None] | None = None
        self._next_attempt_at = float("-inf")  # on the loop's clock, like the following
        self._wait_until = 0.0  # for the attempt that runs

    @property
    def connected(self) -> bool:
        return bool(self._provider.connected_server_names)

    async def connect(self) -> None:
        """Connects the server, unless it is not yet time to try again. Concurrent calls share one attempt."""
        if self.connected:
            return
        now = asyncio.get_running_loop().time()
        if self._attempt is None or self._attempt.done():
            if now < self._next_attempt_at:
                return
            self._wait_until = now + (CONNECT_TIMEOUT_S if self._attempt is None else RETRY_PATIENCE_S)
            self._attempt = asyncio.create_task(self._connect(), name=f"connect MCP server {self.name}")
        await asyncio.wait({self._attempt}, timeout=max(0, self._wait_until - now))

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._provider.connect()  # logs what goes wrong, and raises nothing
        except TimeoutError:
            pass
        finally:
            self._next_attempt_at = asyncio.get_running_loop().time() + RETRY_PAUSE_S
        if self.connected:
            log.info("mcp_server_connected", server=self.name)
        else:
            log.warning("mcp_server_down", server=self.name)

    async def aclose(self) -> None:
        if self._attempt is not None:
            self._attempt.cancel()
            await asyncio.wait({self._attempt})
        await self._provider.aclose()


class ToolServers:
    """All servers that the configuration names."""

    def __init__(self, config: Any, tools: ToolRegistry) -> None:
        configured: Mapping[str, Any] = agent_plugin_mcp_servers(config.workspace_path, config.tools.mcp_servers)
        self._servers = [ToolServer(name, server, tools) for name, server in configured.items()]
        self._tools = tools

    async def connect(self) -> None:
        """Connects what is not connected, as far as it is time to try."""
        missing = [server for server in self._servers if not server.connected]
        if missing:
            await asyncio.gather(*(server.connect() for server in missing))

    def lost_server_of(self, tool_name: str) -> str | None:
        """The name of the server that this tool belongs to, if it is not connected."""
        if self._tools.has(tool_name):
            return None
        lost = [server for server in self._servers if not server.connected and tool_name.startswith(server.tool_prefix)]
        return max(lost, key=lambda server: len(server.tool_prefix)).name if lost else None

    async def aclose(self) -> None:
        await asyncio.gather(*(server.aclose() for server in self._servers))
