"""What processes cost, from /proc: CPU seconds, memory, connections; and what the rest of the machine did meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_ESTABLISHED = "01"


def cpu_s(pid: int) -> float:
    """CPU seconds of a process since its start, of all its threads. Raises FileNotFoundError if it has ended."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def machine_cpu_s() -> float:
    """Busy CPU seconds of the whole machine since it was started."""
    user, nice, system, idle, iowait, *rest = (
        int(field) for field in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
    )
    del idle, iowait
    return (user + nice + system + sum(rest)) / TICKS_PER_S


def resident_bytes(pid: int) -> int:
    """Memory of a process, its share of what it shares (Pss)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not tell the Pss")


def connections_to(pid: int, port: int) -> int:
    """Established TCP connections of a process to a port of this machine."""
    inodes = set()
    for row in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = row.split()
        if fields[3] == _ESTABLISHED and int(fields[2].rpartition(":")[2], 16) == port:
            inodes.add(fields[9])
    return sum(_inode(link) in inodes for link in Path(f"/proc/{pid}/fd").iterdir())


def _inode(link: Path) -> str:
    try:
        return str(link.readlink()).removeprefix("socket:[").removesuffix("]")
    except FileNotFoundError:  # closed since it was listed
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """CPU between two instants."""

    server_s: dict[str, float]  # of the system under test, by role
    tools_s: float  # of the load generator, and of what stands in for a model or a worker
    foreign_cores: float  # used by nobody that we account for, as a mean; above 0.3 of two, repeat the run
    wall_s: float

    @property
    def servers_s(self) -> float:
        return sum(self.server_s.values())


class Meter:
    """Counts from when it is made until `read`. No process may end meanwhile."""

    def __init__(self, servers: Mapping[str, Iterable[int]], tools: Iterable[int], now_s: float) -> None:
        """`servers`: process ids by role. `now_s` is of any monotonic clock, as in `read`."""
        self._servers = {role: tuple(pids) for role, pids in servers.items()}
        self._tools = tuple(tools)
        self._began_s = now_s
        self._servers_before = self._read_servers()
        self._tools_before = sum(map(cpu_s, self._tools))
        self._machine_before = machine_cpu_s()

    def _read_servers(self) -> dict[str, float]:
        return {role: sum(map(cpu_s, pids)) for role, pids in self._servers.items()}

    def read(self, now_s: float) -> Cost:
        servers = {role: total - self._servers_before[role] for role, total in self._read_servers().items()}
        tools_s = sum(map(cpu_s, self._tools)) - self._tools_before
        wall_s = now_s - self._began_s
        foreign_s = machine_cpu_s() - self._machine_before - sum(servers.values()) - tools_s
        return Cost(
            server_s={role: round(used, 2) for role, used in servers.items()},
            tools_s=round(tools_s, 2),
            foreign_cores=round(max(0.0, foreign_s) / wall_s, 2),
            wall_s=round(wall_s, 3),
        )
