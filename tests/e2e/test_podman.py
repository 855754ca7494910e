"""podman, through its CNI backend and libcni: published ports, several networks, requested addresses, and what stays.

Debian's podman 4.3 has libcni 1.1.2. What libcni says is what a recording plugin in podlane's place passes on to it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.box import cgroups_named
from tests.e2e.cluster_of_one import NODE_ADDRESSES, fetch_command, url
from tests.e2e.podman import Container, Podman, PodmanError
from tests.node.machine import Machine, machine

pytestmark = pytest.mark.root

_PLUGINS = Path("/usr/lib/cni")  # of Debian's containernetworking-plugins
_RECORDER = """#!/bin/sh
stdin=$(cat)
[ "$CNI_COMMAND" = VERSION ] || printf '%s\\n' "$CNI_COMMAND $CNI_CONTAINERID $stdin" >> "$0.calls"
printf %s "$stdin" | exec "${0%recorder}podlane"
"""
_STORAGE = {"type": "podlane", "subnet": "10.20.0.0/24"}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node with a world around it, and an agent."""
    with machine(tmp_path_factory.mktemp("podman"), gc_grace_seconds=0.5) as node:
        node.add_world()
        node.start_agent()
        recorder = node.directory / "bin" / "recorder"
        recorder.write_text(_RECORDER)
        recorder.chmod(0o755)
        portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
        add_network(node, "published", "1.0.0", {"type": "podlane"}, portmap)
        add_network(node, "storage", "0.4.0", {"type": "podlane", "ipam": _STORAGE})
        add_network(node, "recorded", "1.0.0", {"type": "recorder"})
        add_network(node, "newest", "1.1.0", {"type": "podlane"})
        yield node


def add_network(node: Machine, name: str, version: str, *plugins: Mapping[str, Any]) -> None:
    """Put a configuration beside the one that the agent has installed."""
    content = {"cniVersion": version, "name": name, "plugins": plugins}
    (node.directory / "conf" / f"50-{name}.conflist").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def podman(node: Machine) -> Iterator[Podman]:
    """Make a podman on the node; when it is gone, nothing of its containers is left."""
    with Podman(
        node.directory,
        conf_dir=node.directory / "conf",
        bin_dirs=[node.directory / "bin", _PLUGINS],
        network="podlane",
        netns=node.netns.name,
        env={"PODLANE_SOCKET": str(node.directory / "cni.sock"), "PODLANE_SPOOL": str(node.directory / "spool")},
    ) as podman:
        yield podman
    assert not any(node.traces().values())
    assert not (node.directory / "podman").exists()
    assert cgroups_named(podman.cgroup) == []


@pytest.fixture(autouse=True)
def _no_containers(podman: Podman) -> Iterator[None]:
    """Remove what a test leaves."""
    yield
    podman.remove()


@pytest.fixture
def one(podman: Podman) -> Container:
    """Run a container on the network that the agent has installed."""
    return podman.run("one")


def rows(node: Machine) -> list[str]:
    """Return the containers in podlane's store, one entry for each attachment."""
    with closing(sqlite3.connect(f"file:{node.directory}/state/ipam.db?mode=ro", uri=True)) as store:
        return [container for (container,) in store.execute("SELECT container_id FROM attachment")]


def test_containers_reach_each_other(node: Machine, podman: Podman, one: Container) -> None:
    """Two containers on the installed network get each other's pages by both families, past the host stack."""
    other = podman.run("other")
    assert sorted(rows(node)) == sorted([one.id, other.id])
    before = node.packets()
    for client, server, name in (("one", other, "other"), ("other", one, "one")):
        assert len(server.ips("podlane")) == 2
        assert [podman.fetch(client, url(address)) for address in server.ips("podlane")] == [name, name]
    after = node.packets()
    assert after["fwd_local"] - before["fwd_local"] >= 6 * 4
    assert after["punt_host"] == before["punt_host"]
    podman.remove("other")
    assert rows(node) == [one.id]


def test_published_port(node: Machine, podman: Podman, one: Container) -> None:
    """A published port, by portmap behind podlane, leads world, node and containers to the container, and goes."""
    published = podman.run("web", "--network", "published", "--publish", "8888:8080")
    assert published.ips("published")[0]
    address = f"http://{NODE_ADDRESSES[0]}:8888/"
    for netns in (node.world, node.netns):
        assert netns.run("busybox", *fetch_command(NODE_ADDRESSES[0])[:-1], address).stdout == "web\n"
    assert podman.fetch("one", address) == "web"
    podman.remove("web")
    assert "8888" not in node.netns.run("iptables-save").stdout
    assert rows(node) == [one.id]


def test_stop_releases(node: Machine, podman: Podman) -> None:
    """`podman stop` gives the addresses back, `start` brings new ones, `rm --force` gives those back, too."""
    first = podman.run("web")
    podman.call("stop", "--time", "0", "web")
    node.wait_for(lambda: not any(node.traces().values()), "podman's cleaning up, which it does not wait for")
    podman.call("start", "web")
    second = podman.inspect("web")
    assert first.id == second.id
    assert set(first.ips("podlane")).isdisjoint(second.ips("podlane"))
    podman.remove("web")
    assert not any(node.traces().values())


def test_requests(node: Machine, podman: Podman) -> None:
    """`--ip`, `--ip6` and `--mac-address` are honoured through the capabilities that the installed list declares."""
    asked = ("--ip", "10.244.0.77", "--ip6", "fd00:10:244::77", "--mac-address", "02:00:00:00:77:77")
    container = podman.run("web", *asked)
    assert container.ips("podlane") == [asked[1], asked[3]]
    assert container.networks["podlane"]["MacAddress"] == asked[5]
    assert node.netns.run("busybox", *fetch_command(asked[1])).stdout == "web\n"
    with pytest.raises(PodmanError, match=r"10\.244\.0\.77"):
        podman.call(
            "run", "--name", "no", "--ip", asked[1], "--rootfs", str(node.directory / "podman/roots/web"), "true"
        )


def test_reload(podman: Podman, one: Container) -> None:
    """`podman network reload` is a DEL and an ADD of a container that runs: it has the addresses that it had."""
    podman.call("network", "reload", "one")
    again = podman.inspect("one")
    assert again.ips("podlane") == one.ips("podlane")
    assert again.networks["podlane"]["MacAddress"] == one.networks["podlane"]["MacAddress"]
    podman.run("other")
    assert [podman.fetch("other", url(address)) for address in one.ips("podlane")] == ["one", "one"]


def test_several_networks(node: Machine, podman: Podman, one: Container) -> None:
    """A container has an interface on each of two networks; one can be taken, and a third one given, as it runs."""
    two = podman.run("two", "--network", "podlane,storage")
    assert rows(node).count(two.id) == 2
    assert two.ips("storage")[0].startswith("10.20.0.")
    assert podman.fetch("one", url(two.ips("podlane")[1])) == "two"
    podman.call("network", "disconnect", "storage", "two")
    assert rows(node).count(two.id) == 1
    podman.call("network", "connect", "published", "two")
    assert podman.fetch("one", url(podman.inspect("two").ips("published")[0])) == "two"
    assert podman.fetch("one", url(two.ips("podlane")[0])) == "two"
    podman.remove("two")
    assert rows(node) == [one.id]


def test_network_list_and_inspect(podman: Podman) -> None:
    """`podman network ls` and `inspect` show podlane's networks, and warn of nothing."""
    assert {"podlane", "storage", "published"} <= set(podman.call("network", "ls", "--format", "{{.Name}}").split())
    (told,) = json.loads(podman.call("network", "inspect", "podlane"))
    assert (told["name"], told["driver"]) == ("podlane", "podlane")


def calls(node: Machine, command: str) -> list[dict[str, Any]]:
    """Return the configurations that the recording plugin got with a command."""
    lines = (node.directory / "bin" / "recorder.calls").read_text().splitlines()
    return [json.loads(line.split(" ", 2)[2]) for line in lines if line.startswith(f"{command} ")]


def test_prev_result_is_from_the_cache(node: Machine, podman: Podman) -> None:
    """2.1: what ADD printed is in libcni's cache, and comes back with DEL; the cache is gone then."""
    container = podman.run("web", "--network", "recorded")
    (cached,) = podman.results.iterdir()
    assert cached.name == f"recorded-{container.id}-eth0"
    result = json.loads(cached.read_text())["result"]
    assert result["cniVersion"] == "1.0.0"
    podman.remove("web")
    assert "prevResult" not in calls(node, "ADD")[-1]
    assert calls(node, "DEL")[-1]["prevResult"] == result
    assert list(podman.results.iterdir()) == []
    assert not any(node.traces().values())


def test_cache_is_lost(node: Machine, podman: Podman) -> None:
    """2.1: without a cached result DEL comes without a prevResult, and releases the container all the same."""
    podman.run("web", "--network", "recorded")
    (cached,) = podman.results.iterdir()
    cached.unlink()
    podman.remove("web")
    assert "prevResult" not in calls(node, "DEL")[-1]
    assert not any(node.traces().values())


def test_cache_is_unreadable(node: Machine, podman: Podman) -> None:
    """2.1: with an unreadable cache libcni 1.1.2 sends no DEL at all; podlane's own GC releases what is gone."""
    podman.run("web", "--network", "recorded")
    (cached,) = podman.results.iterdir()
    cached.write_text("rubbish")
    deletes = len(calls(node, "DEL"))
    podman.remove("web")
    assert len(calls(node, "DEL")) == deletes
    node.wait_for(lambda: not any(node.traces().values()), "the agent's own GC")


def test_too_new_for_this_libcni(node: Machine, podman: Podman) -> None:
    """2.1: a list of version 1.1.0 is refused by libcni 1.1.2, which cannot read the result; its DEL takes all away."""
    with pytest.raises(PodmanError, match=r'unsupported CNI result version "1\.1\.0"'):
        podman.run("web", "--network", "newest")
    podman.remove("web")
    assert not any(node.traces().values())
