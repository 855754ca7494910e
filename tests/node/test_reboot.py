"""What the agent makes of a node that was rebooted, of a state directory that was lost, and of a second agent on it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from tests.node.machine import Machine, Netns, Outcome, TestPod

PLUGINS = "/usr/lib/cni"  # of Debian's containernetworking-plugins
EVERYWHERE = {"routes": [{"dst": "0.0.0.0/0"}]}
OWN = {"name": "own", "ipam": {"type": "podlane", "subnet": "10.77.0.0/24", **EVERYWHERE}}
STICKY = {"name": "sticky", "ipam": {"type": "podlane", "subnet": "10.78.0.0/24", "sticky": True, **EVERYWHERE}}
WEB = {"CNI_ARGS": "K8S_POD_NAMESPACE=default;K8S_POD_NAME=web"}


def call(
    node: Machine, command: str, netns: Netns, config: Mapping[str, object], env: Mapping[str, str] | None = None
) -> Outcome:
    """Call the launcher for a container of the namespace's name, with the reference plugins in reach."""
    path = {"CNI_PATH": f"{node.directory}/bin:{PLUGINS}", **(env or {})}
    return node.cni(command, container_id=netns.name, netns=str(netns.path), config=config, env=path)


def add(node: Machine, hint: str, config: Mapping[str, object], env: Mapping[str, str] | None = None) -> TestPod:
    """Make a namespace and ADD it."""
    netns = node.add_netns(hint)
    outcome = call(node, "ADD", netns, config, env)
    assert outcome.exit_code == 0, f"{outcome.stdout}\n{node.log_tail()}"
    return TestPod(netns, netns.name, outcome.json())


def host_local(directory: Path) -> dict[str, Any]:
    """Return a network whose addresses are host-local's, kept in a directory."""
    ipam = {"type": "host-local", "subnet": "10.79.0.0/24", "dataDir": str(directory), **EVERYWHERE}
    return {"cniVersion": "1.0.0", "name": "delegated", "ipam": ipam}


def held(directory: Path) -> list[str]:
    """Return the addresses that host-local holds."""
    return sorted(path.name for path in directory.glob("*/*.*.*.*"))


def reboot(node: Machine, *pods: TestPod) -> None:
    """Take away what a reboot takes, and have the next agents see another boot id; the state directory stays."""
    node.kill_agent()
    node.configure(gc_grace_seconds=0.0)  # the self-GC has what a delegate must take back
    for pod in pods:
        pod.netns.delete()
    shutil.rmtree(node.bpffs)
    for family, protocol in product(("-4", "-6"), ("111", "112")):
        node.netns.run(
            "ip", family, "route", "flush", "proto", protocol, check=False
        )  # some go with the pods meanwhile
    boot_id = node.directory / "boot_id"
    boot_id.write_text("another boot\n")
    other_boot = f'mount --bind {boot_id} /proc/sys/kernel/random/boot_id && exec "$@"'
    node.agent_command = ("unshare", "--mount", "sh", "-c", other_boot, "sh", *node.agent_command)


def test_reboot(node: Machine, tmp_path: Path) -> None:
    """After a reboot all addresses are free, those of delegates and imported ones too; a sticky pod gets its own."""
    delegated, data, imported = host_local(tmp_path / "data"), tmp_path / "data", tmp_path / "imported"
    shutil.copytree(_host_local_directory(imported), imported / "old")
    run = node.netns.run(*node.agent_command, "--config", str(node.config), "import", str(imported / "old"))
    assert "10.80.0.5" in run.stdout
    plain, own = add(node, "plain", {}), add(node, "own", OWN)
    sticky, away = add(node, "sticky", STICKY, WEB), add(node, "delegated", delegated)
    assert held(data) == away.addresses
    assert len(node.traces()["rows"]) == 5 + 6
    reboot(node, plain, own, sticky, away)
    assert call(node, "DEL", plain.netns, {}).exit_code == 0  # spooled: the agent is not there yet
    node.start_agent()
    node.wait_for(lambda: held(data) == [] and not any(node.traces().values()), "all of the earlier boot to go")
    assert node.repairs() == {}
    news = [add(node, "new", {}), add(node, "new", OWN), add(node, "new", STICKY, WEB), add(node, "new", delegated)]
    assert not {*plain.addresses, *own.addresses} & {address for each in news for address in each.addresses}
    assert news[2].addresses == sticky.addresses
    assert all(node.pings(news[0], address, count=1) for each in news for address in each.addresses)
    assert call(node, "DEL", away.netns, delegated).exit_code == 0  # kubelet comes with it long after
    assert held(data) == news[3].addresses
    for pod, config in zip(news, ({}, OWN, STICKY, delegated), strict=True):
        assert call(node, "DEL", pod.netns, config).exit_code == 0
    assert not any(node.traces().values())


def _host_local_directory(parent: Path) -> Path:
    """Make a directory as host-local leaves it, with one address."""
    directory = parent / "made"
    directory.mkdir(parents=True)
    (directory / "10.80.0.5").write_text("old-container\r\neth0")
    (directory / "last_reserved_ip.0").write_text("10.80.0.5")
    return directory


def test_reboot_without_the_delegate(node: Machine, tmp_path: Path) -> None:
    """After a reboot, what a delegate holds stays noted while it is out of reach; all else goes at once."""
    config, data = host_local(tmp_path / "data"), tmp_path / "data"
    plugin = node.directory / "bin" / "host-local"
    shutil.copy(f"{PLUGINS}/host-local", plugin)
    env = {"CNI_PATH": str(plugin.parent)}
    plain, delegated = add(node, "plain", {}), add(node, "delegated", config, env)
    reboot(node, plain, delegated)
    plugin.rename(plugin.with_name("away"))
    node.start_agent()
    assert len(node.traces()["rows"]) == 2  # one attachment, one address
    assert held(data) == delegated.addresses
    assert node.make_pod("next").addresses  # the node serves all the same
    plugin.with_name("away").rename(plugin)
    node.wait_for(lambda: len(node.traces()["rows"]) == 3, "the next pod's rows alone")
    assert held(data) == []


def test_store_is_lost(node: Machine) -> None:
    """Without its store the agent cuts off the pods that it no longer knows: no address is ever on two devices."""
    lost = [node.make_pod("lost") for _ in range(3)]
    node.netns.run("ip", "link", "add", "plforeign", "type", "veth", "peer", "name", "other")  # has no alias of ours
    node.kill_agent()
    for path in (node.directory / "state").glob("ipam.db*"):
        path.rename(path.with_name(f"lost-{path.name}"))
    node.start_agent()
    assert {kind: found for kind, found in node.traces().items() if found} == {"devices": ["plforeign"]}
    assert node.repairs() == {"devices": 3}
    news = [node.make_pod("new") for _ in range(3)]
    assert [each.addresses for each in news] == [each.addresses for each in lost]  # the ring begins anew
    assert all(node.pings(news[0], address, count=1) for each in news[1:] for address in each.addresses)
    for pod in lost:
        assert pod.netns.run("ip", "link", "show", "eth0", check=False).returncode != 0
        node.delete_pod(pod)
    for pod in news:
        node.delete_pod(pod)
    assert node.traces()["rows"] == []


def test_second_agent(node: Machine) -> None:
    """A second agent on a state directory ends with status 1 and names the file; the first one notices nothing."""
    pod, first, plain = node.make_pod(), node.agent, node.config.read_text()
    for metrics in ("127.0.0.1:9815", "127.0.0.1:9816"):  # where the first one is, and where nobody is
        node.configure(metrics=metrics)
        node.start_agent(wait=False)
        second, node.agent = node.agent, first
        assert second is not None
        assert second.wait(timeout=30) == 1
        words = node.log.read_text().splitlines()[-1]
        assert "another agent is at work" in words
        assert str(node.directory / "state" / "agent.lock") in words
    node.config.write_text(plain)
    assert node.get("/readyz")[0] == 200
    assert node.pings(node.make_pod(), pod.addresses[0], count=1)
    node.kill_agent()
    node.start_agent()  # the lock went with its holder
