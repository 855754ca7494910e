"""GC, the verb and the agent's own: what is not valid, or gone, is released; everything else is left alone."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.node.machine import Machine, Netns, Outcome, TestPod, machine, pings

KEYS = ("cni.dev/valid-attachments", "cni.dev/attachments")
EMPTY: Sequence[object] = ()
EAGER: Mapping[str, object] = {"gc_grace_seconds": 0.0, "resync_seconds": 0.2}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node whose agent collects only when it is told to."""
    with machine(tmp_path_factory.mktemp("node"), gc_grace_seconds=3600.0) as it:
        it.add_uplink()
        it.start_agent()
        yield it


def gc(node: Machine, **config: object) -> Outcome:
    """GC as libcni calls it: with the variables of an attachment empty."""
    return node.cni("GC", ifname="", config=config)


def name(*pods: TestPod) -> list[dict[str, str]]:
    """Return the list of valid attachments that names these pods."""
    return [{"containerID": pod.container_id, "ifname": "eth0"} for pod in pods]


def rows(node: Machine) -> set[str]:
    """Return the containers that the store knows; addresses are bare hexadecimal digits in it."""
    return {row for row in node.traces()["rows"] if "plt-" in row}


def assert_alive(node: Machine, pod: TestPod) -> None:
    """Assert that a pod has its addresses, and that they answer."""
    assert f"('{pod.container_id}',)" in rows(node)
    for address in pod.addresses:
        assert pings(node.netns, address, count=1)


@pytest.mark.parametrize("key", KEYS)
def test_releases_what_is_not_valid(node: Machine, key: str) -> None:
    """GC releases the attachments of its network that the list does not name, by either key; nothing is printed."""
    valid, other_ifname, gone = node.make_pod("valid"), node.make_pod("ifname"), node.make_pod("gone")
    listed = [*name(valid), {"containerID": other_ifname.container_id, "ifname": "net1"}]
    outcome = gc(node, **{key: listed})
    assert (outcome.exit_code, outcome.stdout) == (0, "")
    assert_alive(node, valid)
    assert rows(node) == {f"('{valid.container_id}',)"}
    assert node.netns.run("ip", "link", "show", gone.device, check=False).returncode != 0
    assert gc(node, **{key: listed}).exit_code == 0
    node.delete_pod(valid)
    node.delete_pod(gone)  # its DEL still comes, and succeeds
    assert not any(node.traces().values())


@pytest.mark.parametrize("nothing", [None, EMPTY])
def test_none_valid(node: Machine, nothing: object) -> None:
    """A list that is null or empty says that none is valid."""
    node.make_pod()
    assert gc(node, **{KEYS[0]: nothing}).exit_code == 0
    assert not any(node.traces().values())


def test_without_a_list(node: Machine) -> None:
    """Without either key GC knows nothing of what is valid, and does nothing."""
    pod = node.make_pod()
    assert gc(node).exit_code == 0
    assert_alive(node, pod)
    node.delete_pod(pod)


def test_other_networks(node: Machine) -> None:
    """Attachments of other networks are not concerned."""
    pod = node.make_pod()
    assert gc(node, name="another", **{KEYS[0]: None}).exit_code == 0
    assert_alive(node, pod)
    node.delete_pod(pod)


@pytest.mark.parametrize("version", ["0.3.1", "0.4.0", "1.0.0"])
def test_not_before_1_1_0(node: Machine, version: str) -> None:
    """Configurations before 1.1.0 do not have GC."""
    pod = node.make_pod()
    outcome = gc(node, cniVersion=version, **{KEYS[0]: None})
    assert (outcome.exit_code, outcome.json()["code"]) == (1, 1)
    assert_alive(node, pod)
    node.delete_pod(pod)


# The agent's own.


@pytest.fixture
def eager(tmp_path: Path) -> Iterator[Machine]:
    """Make a node whose agent looks often, and grants no time."""
    with machine(tmp_path, **EAGER) as it:
        it.add_uplink()
        it.start_agent()
        yield it


def released(node: Machine) -> Counter[str]:
    """Return how many attachments the agent has released by itself so far, by reason."""
    values = node.metrics().items()
    return Counter({labels[0]: int(value) for (it, labels), value in values if it == "podlane_gc_released_total"})


def wait_released(node: Machine, before: Counter[str], **expected: int) -> None:
    """Wait until so many more have been released, for these reasons."""
    node.wait_for(lambda: released(node) - before == expected, f"the self-GC to release {expected}")


def test_namespace_gone(eager: Machine) -> None:
    """A pod whose namespace went without a DEL is released, and leaves nothing; the others stay."""
    before = released(eager)
    stays, goes = eager.make_pod("stays"), eager.make_pod("goes")
    goes.netns.delete()
    wait_released(eager, before, netns_missing=1)
    assert rows(eager) == {f"('{stays.container_id}',)"}
    assert_alive(eager, stays)
    eager.delete_pod(stays)
    assert not any(eager.traces().values())


def test_namespace_replaced(eager: Machine) -> None:
    """A pod whose path leads to another namespace now is gone."""
    before = released(eager)
    pod = eager.make_pod("old")
    pod.netns.delete()
    pod.netns.path.touch()
    eager.netns.run("mount", "--bind", "/proc/self/ns/net", str(pod.netns.path))
    wait_released(eager, before, netns_replaced=1)
    assert rows(eager) == set()


def test_deleted_device_of_a_living_pod(eager: Machine) -> None:
    """A pod that lives and has lost its device gets a new one, and is not released."""
    before = released(eager)
    pod, goes = eager.make_pod("lives"), eager.make_pod("goes")
    eager.netns.run("ip", "link", "delete", pod.device)
    goes.netns.delete()
    wait_released(eager, before, netns_missing=1)
    for address in pod.addresses:
        eager.wait_for(lambda to=address: pings(eager.netns, to, count=1), "the device to be made again")  # type: ignore[misc]
    assert_alive(eager, pod)
    eager.delete_pod(pod)
    assert released(eager) - before == {"netns_missing": 1}


def test_grace_period(node: Machine) -> None:
    """Before the grace period is over nothing is released, and a DEL that comes in it is as any other."""
    pod = node.make_pod("slow")
    pod.netns.delete()
    node.wait_for(lambda: not node.netns.run("ip", "link", "show", pod.device, check=False).stdout, "the device to go")
    (conflist,) = (node.directory / "conf").iterdir()
    for _ in range(2):  # rounds of the agent
        conflist.unlink()
        node.wait_for(conflist.exists, "the agent to do its duties")
    assert rows(node) == {f"('{pod.container_id}',)"}
    node.delete_pod(pod)
    assert (rows(node), released(node).total()) == (set(), 0)


def test_paths_out_of_sight(tmp_path: Path) -> None:
    """An agent that cannot see the runtime's paths releases what is gone, and nothing that lives."""
    hide = f'mount -t tmpfs none /run/netns && exec "{sys.executable}" -m agent "$@"'
    with machine(tmp_path, **EAGER) as node:
        node.agent_command = ("unshare", "--mount", "sh", "-c", hide, "sh")
        node.add_uplink()
        node.start_agent()
        stays = node.make_pod("stays")
        for _ in range(2):  # in between every pod is looked at again
            before, goes = released(node), node.make_pod("goes")
            goes.netns.delete()
            wait_released(node, before, netns_missing=1)
        assert rows(node) == {f"('{stays.container_id}',)"}
        assert_alive(node, stays)


IPAM = """#!/bin/sh
cat > "$0.stdin"
echo "$CNI_COMMAND $CNI_CONTAINERID" >> "$0.calls"
case $CNI_COMMAND in
ADD) echo '{"cniVersion": "1.0.0", "ips": [{"address": "10.244.0.77/24", "gateway": "10.244.0.1"}]}' ;;
DEL) if [ -e "$0.broken" ]; then echo '{"code": 11, "msg": "the server is away"}'; exit 1; fi ;;
esac
"""


def test_delegate_that_fails(eager: Machine) -> None:
    """What a delegate holds is released through it; while its DEL fails the row stays, it is tried again, told once."""
    node, before = eager, released(eager)
    plugin = node.directory / "bin" / "fake-ipam"
    plugin.write_text(IPAM)
    plugin.chmod(0o755)
    broken = plugin.with_name("fake-ipam.broken")
    broken.touch()
    netns = Netns("held")
    config = {"ipam": {"type": plugin.name}, "cniVersion": "1.0.0"}
    added = node.cni("ADD", container_id=netns.name, netns=str(netns.path), config=config)
    netns.delete()
    assert added.exit_code == 0, added.stdout
    calls = plugin.with_name("fake-ipam.calls")
    node.wait_for(lambda: calls.read_text().count("DEL") >= 3, "the delegate's DEL to be tried three times")
    assert rows(node) == {f"('{netns.name}',)"}
    assert node.log.read_text().count("the server is away") == 1
    broken.unlink()
    wait_released(node, before, delete_failed=1)
    assert rows(node) == set()
    assert calls.read_text().splitlines()[-1] == f"DEL {netns.name}"
    assert json.loads(plugin.with_name("fake-ipam.stdin").read_text())["ipam"] == {"type": plugin.name}
