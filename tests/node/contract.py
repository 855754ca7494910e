"""What the tests of the CNI contract share: versions, a container with a runtime that calls for it, delegates."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.node.machine import LAUNCHER, Machine, Netns, Outcome

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
WITH_LISTS = VERSIONS[2:]  # of interfaces and addresses; prevResult, too
WITH_CHECK = VERSIONS[4:]
NEWEST = VERSIONS[-1]
SUPPORTED = " ".join(f'"{version}"' for version in VERSIONS)
"""The versions as they stand in the details of an error of code 1."""

PLUGINS = "/usr/lib/cni"  # of Debian's containernetworking-plugins

_RECORDING = """#!/bin/sh
cat > "$0.stdin.$CNI_COMMAND"
env | grep ^CNI_ | sort > "$0.env.$CNI_COMMAND"
echo "$CNI_COMMAND" >> "$0.calls"
if [ -e "$0.fail.$CNI_COMMAND" ]; then cat "$0.fail.$CNI_COMMAND"; exit 1; fi
if [ "$CNI_COMMAND" = ADD ]; then cat "$0.result"; fi
"""


@dataclass
class Container:
    """A container, and a runtime that calls the plugin for it; `config` is its network configuration."""

    node: Machine
    netns: Netns
    config: Mapping[str, Any] = field(default_factory=dict)

    def call(
        self,
        command: str,
        *,
        ifname: str = "eth0",
        env: Mapping[str, str] | None = None,
        **config: Any,  # noqa: ANN401
    ) -> Outcome:
        """Call the launcher; the keys of `config` replace those of the configuration."""
        return self.node.cni(
            command,
            container_id=self.netns.name,
            netns=str(self.netns.path),
            ifname=ifname,
            config={**self.config, **config},
            env=env,
        )

    def add(self, **given: Any) -> Any:  # noqa: ANN401  # whatever the plugin printed
        """ADD, which must succeed; return the result."""
        outcome = self.call("ADD", **given)
        assert outcome.exit_code == 0, f"{outcome.stdout}\n{self.node.log_tail()}"
        return outcome.json()

    def done(self, command: str, **given: Any) -> None:  # noqa: ANN401
        """Call a command that has nothing to print, and must succeed."""
        outcome = self.call(command, **given)
        assert (outcome.exit_code, outcome.stdout) == (0, ""), outcome.stdout

    def pings(self, target: str) -> bool:
        """Say whether a target answers the container."""
        return self.netns.run("ping", "-c", "1", "-W", "5", target, check=False).returncode == 0


@contextmanager
def container(node: Machine, **config: object) -> Iterator[Container]:
    """Make a container without interfaces; in the end its eth0 is deleted, and the store has nothing of it."""
    it = Container(node, Netns("contract"), config)
    try:
        yield it
        it.done("DEL", cniVersion=NEWEST)
        assert it.netns.name not in rows(node)
    finally:
        it.netns.delete()


def rows(node: Machine) -> list[str]:
    """Return the containers in the store, one entry for each attachment, in order."""
    with closing(sqlite3.connect(f"file:{node.directory}/state/ipam.db?mode=ro", uri=True)) as store:
        return sorted(container for (container,) in store.execute("SELECT container_id FROM attachment"))


def assert_refused(outcome: Outcome, code: int, *words: str, version: str = "") -> None:
    """Assert that a call failed so: status 1, and one error object on stdout, with this code, and all of these words.

    With `version` it is that of the error object.
    """
    assert outcome.exit_code == 1, outcome
    error = outcome.json()
    assert error["code"] == code, error
    assert {"cniVersion", "code", "msg"} <= error.keys() <= {"cniVersion", "code", "msg", "details"}
    text = f"{error['msg']}\n{error.get('details', '')}"
    assert [word for word in words if word not in text] == [], text
    assert error["cniVersion"] == (version or error["cniVersion"])


def launch(
    node: Machine, env: Mapping[str, str], stdin: str = "", command: Sequence[str] = (str(LAUNCHER),)
) -> subprocess.CompletedProcess[str]:
    """Run the launcher in the node's network namespace with this environment, and nothing else."""
    return subprocess.run(
        ["/usr/bin/nsenter", f"--net={node.netns.path}", *command],
        env={"PODLANE_SOCKET": f"{node.directory}/cni.sock", "PODLANE_SPOOL": f"{node.directory}/spool", **env},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )


class Delegate:
    """An IPAM plugin on the node that answers ADD with what it was told, fails where it was told to, and records."""

    def __init__(self, node: Machine, name: str = "canned") -> None:
        self.name = name
        self._file = node.directory / "bin" / name
        self._file.write_text(_RECORDING)
        self._file.chmod(0o755)
        self.gives({"cniVersion": "1.0.0", "ips": [{"address": "10.66.0.2/24"}]})
        self.forget()

    @property
    def ipam(self) -> dict[str, Any]:
        """The `ipam` object that names it, with a key that only it knows."""
        return {"type": self.name, "itsOwn": {"nested": [1, None, "ü"]}}

    def gives(self, result: Mapping[str, Any]) -> None:
        """Let ADD answer so."""
        self._beside("result").write_text(json.dumps(result))

    def fails(self, command: str, error: Mapping[str, Any] | None) -> None:
        """Let a command fail with an error object, or succeed again."""
        file = self._beside(f"fail.{command}")
        file.unlink(missing_ok=True) if error is None else file.write_text(json.dumps(error))

    def calls(self) -> list[str]:
        """Return the commands that it was called with since `forget`."""
        return self._beside("calls").read_text().split()

    def forget(self) -> None:
        """Forget the calls."""
        self._beside("calls").write_text("")

    def stdin(self, command: str) -> Any:  # noqa: ANN401
        """Return the configuration that came with the last call of a command."""
        return json.loads(self._beside(f"stdin.{command}").read_text())

    def env(self, command: str) -> dict[str, str]:
        """Return the CNI_* variables that came with the last call of a command."""
        lines = self._beside(f"env.{command}").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def _beside(self, name: str) -> Path:
        return self._file.with_name(f"{self.name}.{name}")
