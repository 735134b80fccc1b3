"""An MCP server over stdio, with tools that a test can see at work: `python -m tests.mcp_server <file>`.

Every start and every call appends a line to the file. While a file `<file>.down` exists, a start fails; while
`<file>.hangs` exists, it never answers.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from mcp.server.fastmcp import FastMCP

JOURNAL = Path(sys.argv[1])
server = FastMCP("test")


def note(what: str) -> None:
    with JOURNAL.open("a", encoding="utf-8") as journal:
        journal.write(f"{what} {os.getpid()}\n")


@server.tool()
def shout(text: str) -> str:
    """The text in upper case."""
    note("shout")
    return text.upper()


@server.tool()
def die() -> str:
    """Ends the server in mid-call."""
    note("die")
    os._exit(1)


if __name__ == "__main__":
    note("start")
    if JOURNAL.with_suffix(".down").exists():
        sys.exit("the server is down")
    if JOURNAL.with_suffix(".hangs").exists():
        time.sleep(1000)
    server.run()
