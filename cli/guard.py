"""The last resort of the supervisor: a tiny process that ends the children when the supervisor could not.

It runs as a script of its own, with the standard library only, in its own session. The supervisor holds the other end
of its standard input and writes one line whenever the set of children changes: the ids of their process groups,
separated by spaces. Only the last whole line counts. When the pipe ends, the supervisor is gone, even by SIGKILL, and
whatever that line still names is asked to stop (SIGTERM), then killed. A pipe works on every POSIX system, and a
process group takes along what a child started itself; Linux's PR_SET_PDEATHSIG does neither.
"""

import os
import signal
import sys
import time
from contextlib import suppress

TERM_PATIENCE_S = 5.0  # what the children get to save their data before they are killed
_POLL_S = 0.05


def last_groups() -> list[int]:
    """The process groups that the last whole line of standard input names, once it has ended."""
    groups: list[int] = []
    for line in sys.stdin:
        if line.endswith("\n"):
            groups = [int(group) for group in line.split()]
    return groups


def signal_group(group: int, signal_number: int) -> bool:
    """Signal a process group; whether it still has a process that can be signalled."""
    with suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
        os.killpg(group, signal_number)
        return True
    return False


def main() -> None:
    """Wait for the supervisor's end, then end its children."""
    groups = last_groups()
    groups = [group for group in groups if signal_group(group, signal.SIGTERM)]
    deadline = time.monotonic() + TERM_PATIENCE_S
    while groups and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        groups = [group for group in groups if signal_group(group, 0)]
    for group in groups:
        signal_group(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
