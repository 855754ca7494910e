"""A private, real podman with its CNI backend, the other libcni client that Debian has; it runs in a box (box.py)."""

from __future__ import annotations

import json
import subprocess
import tarfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.e2e.box import PATH, Box, cgroup_of
from tests.e2e.containerd import wait_for_server
from tests.e2e.image import SERVE_OWN_NAME, write_layer

_START_TIMEOUT = 10.0  # seconds
_CALL_TIMEOUT = 60.0  # seconds

# PID 1 of the box: reaps. All below /run (namespaces, locks, runc's state) and libcni's results are the box's own.
_INIT = """
mount -t tmpfs none /run && mkdir /run/lock && mount --bind "$1/cni" /var/lib/cni && touch "$1/ready" || exit
cat >/dev/null
"""

# Of cgroups there are only the containers' own, of which the harness says where; events would go to a journal.
_CONTAINERS_CONF = """
[containers]
cgroups = "no-conmon"
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
lock_type = "file"
runtime = "runc"
tmp_dir = "{home}/tmp"
static_dir = "{home}/static"
volume_path = "{home}/volumes"
[network]
network_backend = "cni"
network_config_dir = "{conf_dir}"
cni_plugin_dirs = {bin_dirs}
default_network = "{network}"
"""
_STORAGE_CONF = """
[storage]
driver = "vfs"
runroot = "{home}/runroot"
graphroot = "{home}/root"
"""


class PodmanError(Exception):
    """podman refused a command; the message is what it printed."""


@dataclass(frozen=True)
class Container:
    """A container as podman describes it."""

    id: str
    networks: Mapping[str, Mapping[str, Any]]
    """What `podman inspect` says of each network: IPAddress, GlobalIPv6Address, MacAddress…"""
    netns_path: Path
    """Its network namespace, by a path that opens from outside the box."""

    def ips(self, network: str) -> list[str]:
        """Return its addresses on a network, IPv4 first."""
        told = self.networks[network]
        return [told[key] for key in ("IPAddress", "GlobalIPv6Address") if told[key]]


class Podman:
    """One podman, for the time of a `with`; all of it is in `directory`/podman and in one cgroup (`cgroup` names it).

    `conf_dir` and `bin_dirs` are its CNI directories, `network` is the one for containers that name none, `netns` the
    name of the network namespace that stands for the node. CNI plugins inherit `env`, and a PATH.
    """

    def __init__(
        self,
        directory: Path,
        *,
        conf_dir: Path,
        bin_dirs: Sequence[Path],
        network: str,
        netns: str,
        env: Mapping[str, str],
    ) -> None:
        self._home = directory.resolve() / "podman"
        self.cgroup = cgroup_of(self._home)
        self._conf_dir, self._bin_dirs, self._network, self._netns = conf_dir, bin_dirs, network, netns
        self._env = {
            "PATH": PATH,
            "HOME": str(self._home),
            "CONTAINERS_CONF": str(self._home / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self._home / "storage.conf"),
            **env,
        }
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        (self._home / "cni").mkdir(parents=True)
        Path("/var/lib/cni").mkdir(exist_ok=True)
        bin_dirs = json.dumps([str(each) for each in self._bin_dirs])
        names = {"home": self._home, "conf_dir": self._conf_dir, "bin_dirs": bin_dirs, "network": self._network}
        for file, content in (("containers.conf", _CONTAINERS_CONF), ("storage.conf", _STORAGE_CONF)):
            (self._home / file).write_text(content.format(**names))
        with ExitStack() as undo:
            box = Box(self._home, _INIT, netns=self._netns, env=self._env)
            undo.callback(box.close)
            deadline = time.monotonic() + _START_TIMEOUT
            while not (self._home / "ready").exists():
                if box.ended or time.monotonic() > deadline:
                    raise PodmanError(f"the box did not start: {box.log_tail()}")
                time.sleep(0.01)
            self._init = box.init_pid
            undo.callback(self.remove)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    @property
    def results(self) -> Path:
        """Where libcni keeps the result of each attachment."""
        return self._home / "cni" / "results"

    def call(self, *arguments: str) -> str:
        """Run a podman command in the box; return what it printed. Raises PodmanError."""
        enter = ["nsenter", "--target", str(self._init), "--mount", "--pid", "--net"]
        done = subprocess.run(
            [*enter, "podman", *arguments], env=self._env, capture_output=True, text=True, timeout=_CALL_TIMEOUT
        )
        if done.returncode:
            raise PodmanError(f"podman {' '.join(arguments)}: {done.stderr}")
        return done.stdout.strip()

    def run(self, name: str, *options: str) -> Container:
        """Run a container with a web server on port 8080, whose page is its name; return when that answers.

        The container has a root file system of its own, in place of an image. Raises PodmanError, ContainerdError.
        """
        root = self._home / "roots" / name
        if not root.exists():
            with tarfile.open(fileobj=write_layer()) as layer:
                layer.extractall(root)  # noqa: S202  # written by ourselves
        given = ["--name", name, "--hostname", name, "--cgroup-parent", f"/{self.cgroup}", *options]
        self.call("run", "--detach", *given, "--rootfs", str(root), *SERVE_OWN_NAME)
        container = self.inspect(name)
        wait_for_server(name, container.netns_path)
        return container

    def inspect(self, name: str) -> Container:
        """Return what podman knows of a container."""
        (told,) = json.loads(self.call("inspect", name))
        settings = told["NetworkSettings"]
        netns = Path(f"/proc/{self._init}/root{settings['SandboxKey']}")
        return Container(told["Id"], settings["Networks"], netns)

    def fetch(self, name: str, url: str) -> str:
        """Return the page that a container gets. Raises PodmanError."""
        return self.call("exec", name, "timeout", "5", "wget", "-qO-", url)

    def remove(self, name: str = "--all") -> None:
        """Remove a container, by default all of them, running or not. Raises PodmanError."""
        self.call("rm", "--force", "--time", "0", name)
