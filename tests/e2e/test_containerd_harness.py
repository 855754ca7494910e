"""The harness itself, with the reference bridge plugin in podlane's place: it works, and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import pytest

from tests.e2e.box import cgroups_named
from tests.e2e.containerd import Containerd, ContainerdError, Pod
from tests.e2e.cri import CriError
from tests.support import birth

pytestmark = pytest.mark.root

REFERENCE_PLUGINS = Path("/usr/lib/cni")


class Node:
    """A network namespace, CNI directories with the reference bridge plugin, and a place for a containerd."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.netns = directory, f"harness-{uuid4().hex[:8]}"
        self.conf_dir, self.bin_dir, self.ipam = directory / "net.d", directory / "bin", directory / "ipam"
        for path in (self.conf_dir, self.bin_dir, self.ipam):
            path.mkdir(parents=True)
        for plugin in ("bridge", "host-local"):
            (self.bin_dir / plugin).symlink_to(REFERENCE_PLUGINS / plugin)
        subprocess.run(["ip", "netns", "add", self.netns], check=True)

    def configure(self) -> None:
        """Put the CNI configuration in place as an agent does: written under another name, then renamed."""
        ranges = [[{"subnet": "10.97.0.0/24"}], [{"subnet": "fd97::/64"}]]
        ipam = {"type": "host-local", "dataDir": str(self.ipam), "ranges": ranges}
        bridge = {"type": "bridge", "bridge": "br0", "isDefaultGateway": True, "ipam": ipam}
        draft = self.conf_dir / "draft"
        draft.write_text(json.dumps({"cniVersion": "1.0.0", "name": "net", "plugins": [bridge]}))
        draft.rename(self.conf_dir / "10-net.conflist")

    def containerd(self, **env: str) -> Containerd:
        """Return a containerd of this node, not started."""
        return Containerd(self.directory, conf_dir=self.conf_dir, bin_dir=self.bin_dir, netns=self.netns, env=env)

    def leases(self) -> set[str]:
        """Return the addresses that host-local has given out."""
        return {path.name for path in (self.ipam / "net").iterdir() if path.name[0].isdigit() or ":" in path.name}

    def devices(self) -> set[str]:
        """Return the names of the devices in the node's network namespace."""
        listing = subprocess.check_output(["ip", "-n", self.netns, "-json", "link"])
        return {link["ifname"] for link in json.loads(listing)}

    def delete(self) -> None:
        """Delete the node's network namespace."""
        subprocess.run(["ip", "netns", "del", self.netns], check=True)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """Make a node, without a CNI configuration yet."""
    node = Node(tmp_path)
    try:
        yield node
    finally:
        node.delete()


@pytest.fixture
def runtime(node: Node) -> Iterator[Containerd]:
    """Run a containerd on the node, ready for pods."""
    node.configure()
    with node.containerd() as containerd:
        containerd.wait_ready()
        yield containerd


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what the kernel does in its own time; the limit only keeps a failure from hanging."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came to pass"
        time.sleep(0.02)


def fetch(client: Pod, address: str) -> str:
    """Return the page that a pod gets from an address."""
    host = f"[{address}]" if ":" in address else address
    result = client.exec(["timeout", "5", "wget", "-qO-", f"http://{host}:8080/"])
    assert result.exit_code == 0, result
    return result.stdout.strip()


class Traced(NamedTuple):
    """A process, when it began, and a descriptor of its PID namespace."""

    pid: int
    began: str
    pid_namespace: int


@contextmanager
def traced(pid: int) -> Iterator[Traced]:
    """Hold a process' PID namespace, and yield what tells both from others.

    The kernel gives the inode number of a namespace that is gone to the next that anybody makes: it is only told from
    others as long as it is held.
    """
    descriptor = os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY)
    try:
        yield Traced(pid, birth(pid), descriptor)
    finally:
        os.close(descriptor)


def processes_in(pid_namespace: int) -> list[int]:
    """Return the processes of a PID namespace."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if os.path.samestat((entry / "ns/pid").stat(), os.fstat(pid_namespace)):
                found.append(int(entry.name))
    return found


def assert_nothing_left(node: Node, runtime: Containerd, process: Traced) -> None:
    """Compare the machine with what it was before `runtime` ran, which was this process."""
    assert processes_in(process.pid_namespace) == []
    assert str(node.directory) not in Path("/proc/self/mountinfo").read_text()
    assert birth(process.pid) != process.began
    assert cgroups_named(runtime.cgroup) == []
    assert sorted(path.name for path in node.directory.iterdir()) == ["bin", "ipam", "net.d"]
    assert sorted(path.name for path in node.bin_dir.iterdir()) == ["bridge", "host-local"]
    eventually(lambda: node.devices() == {"lo", "br0"})


def test_pods_reach_each_other(runtime: Containerd) -> None:
    """Five pods, each with an address of either family, fetch one another's pages by all of them."""
    pods = runtime.run_pods(5)
    assert len({ip for pod in pods for ip in pod.ips}) == 10
    for client, server in zip(pods, pods[1:] + pods[:1], strict=True):
        assert [fetch(client, ip) for ip in server.ips] == [server.name, server.name]


def test_exec_reports_how_a_command_ended(runtime: Containerd) -> None:
    """Exit code, stdout and stderr come back apart, and a command that takes too long raises."""
    pod = runtime.run_pod("a")
    assert pod.exec(["sh", "-c", "hostname; echo no >&2; exit 3"]) == (3, "a\n", "no\n")
    with pytest.raises(CriError, match=r"ExecSync of \['sleep', '60'\]"):
        pod.exec(["sleep", "60"], timeout=1)


def test_netns_path_opens_from_outside(runtime: Containerd) -> None:
    """A pod's network namespace can be entered from where the tests run, and holds the pod's eth0."""
    pod = runtime.run_pod("a")
    inside = ["nsenter", f"--net={pod.netns_path}", "ip", "-json", "addr", "show", "eth0"]
    addresses = {info["local"] for info in json.loads(subprocess.check_output(inside))[0]["addr_info"]}
    assert addresses >= set(pod.ips)


def test_remove_calls_the_plugin(node: Node, runtime: Containerd) -> None:
    """Removing a pod gives its addresses back and takes its device; doing it again is no error."""
    pod, other = runtime.run_pods(2)
    assert node.leases() == {*pod.ips, *other.ips}
    pod.remove()
    pod.remove()
    assert node.leases() == set(other.ips)
    eventually(lambda: len(node.devices()) == 3)


def test_a_pod_that_cannot_start_is_removed(node: Node, runtime: Containerd) -> None:
    """A pod whose container cannot start raises, and its sandbox and addresses are gone."""
    with pytest.raises(CriError, match=r"StartContainer of a: .*no such file"):
        runtime.run_pod("a", ["/nonexistent"])
    assert node.leases() == set()


def test_stop_leaves_nothing(node: Node) -> None:
    """After stop, with pods running, no process, mount, cgroup, device, file or address of it is left."""
    node.configure()
    with ExitStack() as held:
        with node.containerd() as runtime:
            runtime.wait_ready()
            runtime.run_pods(3)
            process = held.enter_context(traced(runtime.pid))
            assert len(processes_in(process.pid_namespace)) > 3  # containerd and shims; containers are in the cgroups
            assert cgroups_named(runtime.cgroup) != []
        assert_nothing_left(node, runtime, process)
    assert node.leases() == set()


def test_a_killed_containerd_leaves_nothing(node: Node) -> None:
    """When containerd is killed with pods running, everything but the plugin's own records goes."""
    node.configure()
    with ExitStack() as held:
        with node.containerd() as runtime:
            runtime.wait_ready()
            runtime.run_pods(2)
            process = held.enter_context(traced(runtime.pid))
            os.kill(runtime.pid, signal.SIGKILL)
        assert_nothing_left(node, runtime, process)


def test_a_killed_harness_leaves_nothing(node: Node) -> None:
    """When the process that runs the harness is killed, everything goes too, but for a link to a plugin."""
    node.configure()
    script = f"""
import sys
from pathlib import Path
from tests.e2e.box import cgroups_named
from tests.e2e.containerd import Containerd
d = Path({str(node.directory)!r})
runtime = Containerd(d, conf_dir=d / "net.d", bin_dir=d / "bin", netns={node.netns!r})
runtime.start()
runtime.wait_ready()
runtime.run_pod("a")
print(runtime.pid, flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as harness:
        assert harness.stdout
        runtime = node.containerd()
        runtime.pid = int(harness.stdout.readline())
        with traced(runtime.pid) as process:
            harness.kill()
            eventually(lambda: not (node.directory / "containerd").exists())
            (node.bin_dir / "loopback").unlink()
            assert_nothing_left(node, runtime, process)


def test_two_at_once(tmp_path: Path) -> None:
    """Two containerds with pods of the same names do not disturb each other, nor does the end of one."""
    nodes = [Node(tmp_path / "one"), Node(tmp_path / "two")]
    try:
        for node in nodes:
            node.configure()
        with nodes[0].containerd() as first:
            first.wait_ready()
            with nodes[1].containerd() as second:
                second.wait_ready()
                pods, others = first.run_pods(2), second.run_pods(2)
                assert fetch(others[0], others[1].ips[0]) == "pod-1"
            assert fetch(pods[0], pods[1].ips[0]) == "pod-1"
    finally:
        for node in nodes:
            node.delete()


def test_plugins_inherit_the_environment(node: Node) -> None:
    """The CNI plugin gets what is passed as `env`, CNI's own variables and a PATH, and nothing else."""
    node.configure()
    record = node.directory / "env"
    (node.bin_dir / "bridge").unlink()
    wrapper = f'#!/bin/sh\nenv >> {record}\nexec {REFERENCE_PLUGINS}/bridge "$@"\n'
    (node.bin_dir / "bridge").write_text(wrapper)
    (node.bin_dir / "bridge").chmod(0o755)
    with node.containerd(PODLANE_SOCKET="/somewhere/cni.sock") as runtime:
        runtime.wait_ready()
        runtime.run_pod("a")
    lines = record.read_text().splitlines()
    assert "PODLANE_SOCKET=/somewhere/cni.sock" in lines
    shell = {"PWD", "OLDPWD", "SHLVL", "_"}  # set by every shell on the way
    names = {line.partition("=")[0] for line in lines}
    assert {name for name in names if not name.startswith("CNI_")} <= {"PATH", "PODLANE_SOCKET", *shell}


def test_ready_follows_the_configuration(node: Node) -> None:
    """A containerd starts without a CNI configuration, is not ready, and becomes so when one appears."""
    with node.containerd() as runtime:
        with pytest.raises(ContainerdError, match=r"no NetworkReady: .*cni plugin not initialized"):
            runtime.wait_ready(timeout=0)
        node.configure()
        runtime.wait_ready()
        assert runtime.run_pod("a").ips


def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    """A containerd that cannot start raises with the reason and leaves nothing."""
    runtime = Containerd(tmp_path, conf_dir=tmp_path, bin_dir=tmp_path, netns="nonexistent")
    with pytest.raises(ContainerdError, match="cannot open /run/netns/nonexistent"):
        runtime.start()
    assert list(tmp_path.iterdir()) == []
