"""What no cluster does at kubectl's word: stop its API server, end a node, run something on a node or outside.

The caller of the tests has commands for it, in the environment. Each is a line for a shell, in which `{node}` stands
for a node's name. Tests skip if what they need is not given.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

from tests.kubernetes.cluster import Cluster

_MEANINGS = {
    "API_STOP": "stops the API server",
    "API_START": "starts the API server",
    "NODE_STOP": "ends {node} as if its power were cut",
    "NODE_START": "starts {node} again",
    "NODE_SHELL": "a root shell on {node} that reads its standard input",
    "WORLD_SHELL": "a shell that reads its standard input, outside the cluster, from where routes lead to pods",
    "REINSTALL": "the kustomization by which podlane was installed: the tests may uninstall it, and install it again",
}


class Caller:
    """The caller's commands."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._commands = {name: environment[name] for name in _MEANINGS if environment.get(name)}

    def need(self, *names: str) -> None:
        """Skip the test if one of them was not given."""
        missing = [f"{name} ({_MEANINGS[name]})" for name in names if name not in self._commands]
        if missing:
            pytest.skip(f"needs {', '.join(missing)}")

    def value(self, name: str) -> str:
        """Return what was given, as it is."""
        return self._commands[name]

    @contextmanager
    def without_api(self, cluster: Cluster) -> Iterator[None]:
        """Keep the API server stopped for as long as the block lasts."""
        self.run("API_STOP")
        try:
            cluster.wait(lambda: not cluster.is_up(), "the API server's end")
            yield
            assert not cluster.is_up(), "the API server has come back by itself"
        finally:
            self.run("API_START")
            cluster.wait(cluster.is_up, "the API server")

    def run(self, name: str, *, node: str = "", script: str = "", seconds: int = 120) -> str:
        """Run a command, with a script for it to read; return what it printed."""
        command = self._commands[name].replace("{node}", node)
        done = subprocess.run(
            ["sh", "-c", command], input=script, capture_output=True, text=True, check=False, timeout=seconds
        )
        assert done.returncode == 0, f"{name}: {command}: {done.stderr or done.stdout}"
        return done.stdout
