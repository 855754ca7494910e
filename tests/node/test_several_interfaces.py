"""Several interfaces on one container: each has its own addresses and routes, and none takes another's traffic."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import pytest

from tests.node.frames import Ears
from tests.node.machine import Machine, Netns, machine

WORLD = ("198.51.100.1", "2001:db8:f::1")
CLUSTER: Mapping[str, Any] = {"name": "podlane"}
"""The network that Kubernetes shows: the agent's own ranges, with default routes."""
STORAGE: Mapping[str, Any] = {
    "name": "storage",
    "ipam": {
        "type": "podlane",
        "ranges": [[{"subnet": "10.20.0.0/24"}], [{"subnet": "fd20::/64"}]],
        "routes": [{"dst": "172.20.0.0/16"}, {"dst": "fd20:1::/32"}],
    },
}
"""A network of its own, without a default route."""
WAN: Mapping[str, Any] = {
    "name": "wan",
    "isDefaultGateway": True,
    "ipMasq": True,
    "ipam": {"type": "podlane", "ranges": [[{"subnet": "10.30.0.0/24"}], [{"subnet": "fd30::/64"}]]},
}
"""A network with default routes of its own."""


@dataclass
class Container:
    """A network namespace and what its runtime keeps of it: a result for each interface."""

    node: Machine
    netns: Netns
    results: dict[str, Any] = field(default_factory=dict)

    def call(self, command: str, ifname: str, network: Mapping[str, Any], **env: str) -> str:
        """Call the plugin for an interface; it must succeed."""
        config = {**network, "prevResult": self.results[ifname]} if command == "CHECK" else network
        outcome = self.node.cni(
            command, container_id=self.netns.name, netns=str(self.netns.path), ifname=ifname, config=config, env=env
        )
        assert outcome.exit_code == 0, outcome.stdout
        return outcome.stdout

    def add(self, ifname: str, network: Mapping[str, Any], **env: str) -> list[str]:
        """ADD an interface; return its addresses, IPv4 first."""
        self.results[ifname] = json.loads(self.call("ADD", ifname, network, **env))
        return [each["address"].partition("/")[0] for each in self.results[ifname]["ips"]]

    def check(self, **networks: Mapping[str, Any]) -> None:
        """CHECK these interfaces."""
        for ifname, network in networks.items():
            self.call("CHECK", ifname, network)

    def way(self, target: str) -> tuple[str, str]:
        """Return the device and the source address that the container's kernel takes towards a target."""
        (route,) = json.loads(self.netns.run("ip", "-j", "route", "get", target).stdout)
        return route["dev"], route["prefsrc"]

    def received(self, ifname: str) -> int:
        """Return the packets that an interface has received."""
        (link,) = json.loads(self.netns.run("ip", "-j", "-s", "link", "show", ifname).stdout)
        packets: int = link["stats64"]["rx"]["packets"]
        return packets


FENCE = b"after the others"
"""16 bytes, as many as ping takes for a pattern, in the last packet."""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node that all tests of this module share."""
    with machine(tmp_path_factory.mktemp("node")) as it:
        it.add_world()
        it.start_agent()
        yield it


@pytest.fixture
def stack(node: Machine) -> Iterator[ExitStack]:
    """Yield a stack of what ends with the test; after it nothing is left on the node."""
    with ExitStack() as it:
        yield it
    assert not any(node.traces().values())


def make_container(node: Machine, stack: ExitStack) -> Container:
    """Make a container without interfaces; in the end those that it got are deleted."""
    container = Container(node, Netns("several"))
    stack.callback(container.netns.delete)
    for ifname, network in (("eth0", CLUSTER), ("net1", STORAGE), ("net2", WAN)):
        stack.callback(container.call, "DEL", ifname, network)
    return container


@pytest.fixture
def one(node: Machine, stack: ExitStack) -> Container:
    """Make a container."""
    return make_container(node, stack)


@pytest.fixture
def other(node: Machine, stack: ExitStack) -> Container:
    """Make another."""
    return make_container(node, stack)


def test_own_addresses_and_routes(one: Container) -> None:
    """Each interface has the addresses and routes of its own network; the default route stays the first one's."""
    eth0, net1 = one.add("eth0", CLUSTER), one.add("net1", STORAGE)
    assert (net1[0].rpartition(".")[0], net1[1].partition("::")[0]) == ("10.20.0", "fd20")
    ways = {target: one.way(target) for target in (*WORLD, "10.20.0.99", "172.20.9.9", "fd20::99", "fd20:1::9")}
    assert ways == {
        WORLD[0]: ("eth0", eth0[0]),
        WORLD[1]: ("eth0", eth0[1]),
        "10.20.0.99": ("net1", net1[0]),
        "172.20.9.9": ("net1", net1[0]),
        "fd20::99": ("net1", net1[1]),
        "fd20:1::9": ("net1", net1[1]),
    }
    one.check(eth0=CLUSTER, net1=STORAGE)
    for target in WORLD:
        one.netns.run("ping", "-c", "1", "-W", "5", target)


def test_each_goes_by_itself(one: Container, other: Container) -> None:
    """DEL of one interface leaves the others as they are, the first one's too."""
    other.add("net1", STORAGE)
    one.add("eth0", CLUSTER)
    net1 = one.add("net1", STORAGE)
    one.add("net2", WAN)
    assert len(rules(one.netns)) == 4
    one.call("DEL", "net2", WAN)
    assert sorted(each["src"] for each in rules(one.netns)) == sorted(net1)
    one.check(eth0=CLUSTER, net1=STORAGE)
    one.call("DEL", "eth0", CLUSTER)
    one.check(net1=STORAGE)
    for target in net1:
        other.netns.run("ping", "-c", "1", "-W", "5", target)
    one.netns.run("ip", "rule", "add", "from", net1[0], "lookup", "99", "pref", "30000")
    one.call("DEL", "net1", STORAGE)
    assert [each["table"] for each in rules(one.netns)] == ["99"]


def test_made_again(one: Container) -> None:
    """An interface that is made again has one rule for each address, as before, and leaves none when it goes."""
    one.add("eth0", CLUSTER)
    net1 = one.add("net1", STORAGE)
    repairs = one.node.repairs().get("devices", 0)
    one.netns.run("ip", "link", "delete", "net1")
    one.node.wait_for(lambda: one.node.repairs().get("devices", 0) > repairs, "the interface to be made again")
    one.check(net1=STORAGE)
    assert sorted(each["src"] for each in rules(one.netns)) == sorted(net1)
    one.call("DEL", "net1", STORAGE)
    assert rules(one.netns) == []


def rules(netns: Netns) -> list[dict[str, str]]:
    """Return the rules of a namespace that are not the kernel's own."""
    shown = [each for family in ("-4", "-6") for each in json.loads(netns.run("ip", "-j", family, "rule").stdout)]
    return [each for each in shown if each["src"] != "all"]


def test_default_routes_in_order(one: Container) -> None:
    """Of several default routes the one that came first counts; when it goes, the next one does."""
    eth0, net2 = one.add("eth0", CLUSTER), one.add("net2", WAN)
    one.check(eth0=CLUSTER, net2=WAN)
    assert [one.way(target) for target in WORLD] == [("eth0", eth0[0]), ("eth0", eth0[1])]
    for target in WORLD:
        one.netns.run("ping", "-c", "1", "-W", "5", "-I", "net2", target)
    one.call("DEL", "eth0", CLUSTER)
    one.check(net2=WAN)
    assert [one.way(target) for target in WORLD] == [("net2", net2[0]), ("net2", net2[1])]
    for target in WORLD:
        one.netns.run("ping", "-c", "1", "-W", "5", target)


def test_no_default_route_unless_asked_for(one: Container) -> None:
    """A network without a default route gives none, also where there is no other interface."""
    one.add("net1", STORAGE)
    for family in ("-4", "-6"):
        assert one.netns.run("ip", family, "route", "show", "default").stdout == ""
    one.check(net1=STORAGE)


def test_traffic_stays_on_its_network(one: Container, other: Container) -> None:
    """What two containers say to each other on their second network passes no other interface of theirs."""
    first = [container.add("eth0", CLUSTER)[0] for container in (one, other)][1]
    one.add("net1", STORAGE)
    targets = other.add("net1", STORAGE)
    places = [one, other]
    before = [each.received("net1") for each in places]
    with ExitStack() as stack:
        ears = [stack.enter_context(Ears(each.netns)) for each in places]
        for target in targets:
            one.netns.run("ping", "-c", "5", "-i", "0.01", "-W", "5", target)
        one.netns.run("ping", "-c", "1", "-W", "5", "-p", FENCE.hex(), first)
        heard = [frame for each in ears for frame in each.until(lambda frame: FENCE in frame)]
    strays = [frame for frame in heard if any(ip_address(target).packed in frame for target in targets)]
    assert strays == []
    assert all(each.received("net1") >= then + 10 for each, then in zip(places, before, strict=True))


def test_address_of_another_interface(one: Container, other: Container) -> None:
    """A packet that leaves by one interface under the address of another is dropped as any forged one."""
    eth0 = one.add("eth0", CLUSTER)
    one.add("net1", STORAGE)
    target = other.add("net1", STORAGE)[0]
    one.netns.run("ip", "route", "add", f"{target}/32", "via", "169.254.1.1", "dev", "net1", "onlink", "src", eth0[0])
    before = one.node.packets()["drop_spoofed_address"]
    assert one.netns.run("ping", "-c", "2", "-i", "0.01", "-W", "1", target, check=False).returncode == 1
    assert one.node.packets()["drop_spoofed_address"] == before + 2


def test_as_multus_calls(one: Container, other: Container) -> None:
    """Multus repeats CNI_ARGS, and asks for address and MAC in several places: the last word counts."""
    one.add("eth0", CLUSTER)
    other.add("net1", STORAGE)
    pod = "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=till;K8S_POD_INFRA_CONTAINER_ID=x;K8S_POD_UID=1"
    arguments = f"IgnoreUnknown=true;{pod};IgnoreUnknown=1;{pod};MAC=02:00:00:00:00:01"
    asked = {
        **STORAGE,
        "cniVersion": "1.0.0",
        "deviceID": "",
        "args": {"cni": {"mac": "02:00:00:00:00:02"}},
        "runtimeConfig": {"ips": ["10.20.0.55/24", "fd20::55/64"], "mac": "02:00:00:00:00:03", "deviceID": "x"},
    }
    addresses = one.add("net1", asked, CNI_ARGS=arguments)
    assert addresses == ["10.20.0.55", "fd20::55"]
    assert one.results["net1"]["interfaces"][1]["mac"] == "02:00:00:00:00:03"
    one.call("CHECK", "net1", asked, CNI_ARGS=arguments)
    for target in addresses:
        other.netns.run("ping", "-c", "1", "-W", "5", target)
    assert "name=shop/till" in one.node.log_tail()
