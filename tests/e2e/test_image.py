"""The image of deploy/image, in a real containerd, with exactly the DaemonSet's settings: it wires real pods."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from tests.e2e.cluster_of_one import WORLD_ADDRESSES, fetch, fetch_command
from tests.e2e.containerd import Containerd, Pod
from tests.e2e.daemonset import DaemonPod
from tests.e2e.world import PAGE, world_server
from tests.manifests import FOLDER, Manifest, find, render
from tests.node.machine import ROOT, Machine, machine

pytestmark = pytest.mark.root

_MEGABYTE = 1 << 20
_CONFIG = {
    "ranges": [{"subnet": "10.244.0.0/24"}, {"subnet": "fd00:10:244::/64"}],
    "masquerade": {"max_flows": 1 << 16},
}


def build(archive: Path) -> None:
    """Build the image; what seldom changes of it is in build/image from then on."""
    command = [sys.executable, str(ROOT / "deploy" / "image" / "build.py"), str(archive)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the image, built."""
    archive = tmp_path_factory.mktemp("image") / "podlane.tar"
    build(archive)
    return archive


@pytest.fixture(scope="module")
def daemonset() -> Manifest:
    """Return the DaemonSet as a cluster gets it."""
    return find(render(FOLDER / "base"), "DaemonSet")


class Node:
    """A machine with a real containerd and no agent but the one that a container runs."""

    def __init__(self, directory: Path, image: Path, name: str, stack: ExitStack) -> None:
        self.machine: Machine = stack.enter_context(machine(directory))
        self.world = self.machine.add_uplink()
        names = ("bin", "conf", "run", "pod-state", "tmp", "etc", "log")
        self.places = {name: directory / name for name in names}
        for place in self.places.values():
            place.mkdir(exist_ok=True)
        (directory / "etc" / "agent.yaml").write_text(yaml.safe_dump(_CONFIG))
        self.runtime = Containerd(
            directory,
            conf_dir=directory / "conf",
            bin_dir=directory / "bin",
            netns=self.machine.netns.name,
            env={
                "PODLANE_SOCKET": str(directory / "run" / "cni.sock"),
                "PODLANE_SPOOL": str(directory / "pod-state" / "spool"),
            },
        )
        stack.enter_context(self.runtime)
        self.runtime.import_image(image, name)
        self.runtime.netns_dir.mkdir(parents=True, exist_ok=True)

    def make_daemon_pod(self, daemonset: Manifest) -> DaemonPod:
        """Run the DaemonSet's pod up to its main container."""
        of_volumes = {
            "cni-bin": "bin",
            "cni-conf": "conf",
            "run": "run",
            "state": "pod-state",
            "tmp": "tmp",
            "config": "etc",
            "log": "log",
        }
        places = {volume: self.places[place] for volume, place in of_volumes.items()}
        places |= {
            "bpf": self.machine.bpffs.parent,
            "sysctls": Path("/proc/sys/net"),
            "cgroup": Path("/sys/fs/cgroup"),
            "netns": self.runtime.netns_dir,
        }
        return DaemonPod(self.runtime, daemonset, places)

    def wait_ready(self, pod: DaemonPod) -> None:
        """Wait until the agent says that it is ready."""
        try:
            self.machine.wait_ready()
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.machine.get('/readyz')}\n{pod.log_tail()}") from error


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, image: Path, daemonset: Manifest) -> Iterator[Node]:
    """Make a node that has the image under the name that the DaemonSet asks for."""
    (container,) = daemonset["spec"]["template"]["spec"]["containers"]
    with ExitStack() as stack:
        yield Node(tmp_path_factory.mktemp("node"), image, container["image"], stack)


def test_same_image_again(image: Path, tmp_path: Path) -> None:
    """The same sources give the same bytes, and not too many of them."""
    build(tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == image.read_bytes()
    assert image.stat().st_size < 350 * _MEGABYTE


def test_pods_are_wired(node: Node, daemonset: Manifest) -> None:
    """An agent in a container, with the DaemonSet's settings, wires pods: to each other, the node and the world.

    They talk on while it is replaced by another one, which takes them over.
    """
    agent = node.make_daemon_pod(daemonset)
    try:
        agent.run_init()
        assert (node.places["bin"] / "podlane").exists()
        container = agent.start()
        node.wait_ready(agent)
        one, other = node.runtime.run_pods(2)
        _meet(node, one, other)
        node.runtime.cri.stop_container(container, 10)
        assert fetch(one, other.ips[0]) == other.name
        agent.start()
        node.wait_ready(agent)
        _meet(node, one, other)
        for pod in (one, other):
            pod.remove()
    finally:
        agent.remove()


def _meet(node: Node, one: Pod, other: Pod) -> None:
    with world_server(node.world):
        for address in other.ips:
            assert fetch(one, address) == other.name
            assert node.machine.netns.run("busybox", *fetch_command(address)).stdout.strip() == other.name
        for address in WORLD_ADDRESSES:
            assert fetch(one, address) == PAGE.decode().strip()


def test_settings_hold(node: Node, daemonset: Manifest) -> None:
    """The agent has the capabilities that the manifest names and no other, seccomp's filter, and a read-only root."""
    agent = node.make_daemon_pod(daemonset)
    try:
        container = agent.start()
        node.wait_ready(agent)
        script = "print(open('/proc/1/status').read()); open('/x', 'w')"
        done = node.runtime.cri.exec(container, ["/usr/bin/python3", "-c", script], 20)
        status = dict(line.split(":\t") for line in done.stdout.splitlines() if ":\t" in line)
        assert "Read-only file system" in done.stderr
        bits = {"NET_BROADCAST": 11, "NET_ADMIN": 12, "NET_RAW": 13, "SYS_ADMIN": 21}
        wanted = daemonset["spec"]["template"]["spec"]["containers"][0]["securityContext"]["capabilities"]["add"]
        assert int(status["CapBnd"], 16) == int(status["CapEff"], 16) == sum(1 << bits[name] for name in wanted)
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    finally:
        agent.remove()


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("NET_ADMIN", "Operation not permitted"),
        ("SYS_ADMIN", "Operation not permitted"),
        ("NET_RAW", "is CAP_NET_RAW missing?"),
        ("NET_BROADCAST", "without CAP_NET_BROADCAST"),
    ],
)
def test_no_capability_too_many(node: Node, daemonset: Manifest, missing: str, reason: str) -> None:
    """Without any one of its capabilities an agent says what it cannot do."""
    less = copy.deepcopy(daemonset)
    less["spec"]["template"]["spec"]["containers"][0]["securityContext"]["capabilities"]["add"].remove(missing)
    agent = node.make_daemon_pod(less)
    try:
        agent.start()
        node.machine.wait_for(lambda: reason in agent.log_tail(), f"{reason}; the log was {agent.log_tail()}")
    finally:
        agent.remove()
