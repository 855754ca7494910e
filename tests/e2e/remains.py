"""What a demo may leave behind: processes, namespaces, mounts, cgroups, files. There should be nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.e2e.box import cgroups_named
from tests.e2e.containerd import Containerd
from tests.e2e.story import Story
from tests.node.machine import Machine, Netns
from tests.support import birth


@dataclass(frozen=True)
class Remains:
    """What there was, to look for when all has ended."""

    home: Path
    processes: dict[int, str]
    """By their numbers, when they began."""
    namespaces: list[Path]
    cgroups: list[str]

    @classmethod
    def of(
        cls, home: Path, machines: Iterable[Machine], runtimes: Iterable[Containerd], others: Iterable[Netns]
    ) -> Self:
        """Return all that belongs to nodes whose agents run, to their runtimes, and to other namespaces."""
        machines, runtimes = list(machines), list(runtimes)
        pids = [*(machine.agent.pid for machine in machines if machine.agent), *(each.pid for each in runtimes)]
        namespaces = [*(machine.netns.path for machine in machines), *(netns.path for netns in others)]
        return cls(home, {pid: birth(pid) for pid in pids}, namespaces, [each.cgroup for each in runtimes])

    def check(self, story: Story) -> None:
        """Tell that nothing is left. Raises `Unexpected`."""
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        left: dict[str, list[object]] = {
            "processes": [pid for pid, began in self.processes.items() if birth(pid) == began],
            "network namespaces": [path.name for path in self.namespaces if path.exists()],
            "mounts": [line for line in mounts if str(self.home) in line],
            "cgroups": [str(path) for name in self.cgroups for path in cgroups_named(name)],
            "files": list(self.home.rglob("*")),
        }
        for what, items in left.items():
            story.fact(what, expected=[], seen=items, shown=f"{len(items)} {what}")
