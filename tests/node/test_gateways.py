"""The gateway of a pod's subnet is the node, where bridge and ptp have it so; and nobody else suffers from that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.node.echo import TCP, Server, server, who
from tests.node.machine import Machine, TestPod, machine

IPAM = {"type": "podlane", "ranges": [[{"subnet": "10.77.0.0/24"}], [{"subnet": "fd77::/64"}]]}
GATEWAYS = ["10.77.0.1", "fd77::1"]
NETWORK: dict[str, Any] = {"name": "inner", "ipam": IPAM}  # without a default route


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node that all tests of this module share."""
    with machine(tmp_path_factory.mktemp("node")) as it:
        it.add_world()
        it.start_agent()
        yield it


@pytest.fixture
def node(shared: Machine) -> Iterator[Machine]:
    """Return that node; in the end all must be as it was before."""
    before = state(shared)
    yield shared
    assert not any(shared.traces().values())
    assert state(shared) == before


def state(node: Machine) -> dict[str, list[str]]:
    """Return the node's addresses, and the subnets that it has made unreachable."""
    routes = [line for each in ("-4", "-6") for line in node.netns.run("ip", each, "route").stdout.splitlines()]
    return {"addresses": addresses(node), "unreachable": sorted(line for line in routes if "unreachable" in line)}


def addresses(node: Machine) -> list[str]:
    """Return the node's addresses, sorted; as often as it has them."""
    shown = json.loads(node.netns.run("ip", "-j", "address", "show").stdout)
    return sorted(each["local"] for device in shown for each in device["addr_info"])


def add(node: Machine, hint: str, **config: object) -> TestPod:
    """Make a pod of a network."""
    netns = node.add_netns(hint)
    outcome = node.cni("ADD", container_id=netns.name, netns=str(netns.path), config={**NETWORK, **config})
    assert outcome.exit_code == 0, f"{outcome.stdout}\n{node.log_tail()}"
    return TestPod(netns, netns.name, outcome.json())


def delete(node: Machine, pod: TestPod, **config: object) -> None:
    """DEL it; its namespace stays for a while, as it may."""
    outcome = node.cni("DEL", container_id=pod.container_id, config={**NETWORK, **config})
    assert outcome.exit_code == 0, f"{outcome.stdout}\n{node.log_tail()}"


def assert_answers(source: Any, *targets: str) -> None:  # noqa: ANN401  # whatever can run a program
    """Assert that each target answers a ping."""
    for target in targets:
        source.run("ping", "-c", "1", "-W", "2", target)


@pytest.mark.parametrize(
    "keys",
    [{"bridge": "cni0", "isGateway": True}, {"bridge": "cni0", "isDefaultGateway": True}, {"ipMasq": True}],
    ids=["bridge, isGateway", "bridge, isDefaultGateway", "ptp"],
)
def test_node_is_the_gateway(node: Machine, keys: dict[str, object]) -> None:
    """Pods find the node's services at their gateway's address, and it speaks to them from there, in both families.

    They need no default route for that.
    """
    pod = add(node, "inside", **keys)
    for gateway, address in zip(GATEWAYS, pod.addresses, strict=True):
        assert_answers(pod.netns, gateway)
        with server(node.netns, TCP, gateway, 53) as it:
            assert who(pod.netns, Server(gateway, 53, TCP))[0] == address
            assert len(it.peers) == 1
        with server(pod.netns, TCP, address, 80):
            assert who(node.netns, Server(address, 80, TCP))[0] == gateway
    delete(node, pod, **keys)


@pytest.mark.parametrize("keys", [{"bridge": "cni0"}, {"isGateway": False}])
def test_bridge_without_gateway(node: Machine, keys: dict[str, object]) -> None:
    """A bridge that is not asked to be a gateway is none: the node gets no address, and claims no subnet."""
    before = state(node)
    pod = add(node, "inside", **keys)
    assert state(node) == before
    delete(node, pod, **keys)


def test_pods_share_it(node: Machine) -> None:
    """Of several pods each keeps the gateway as long as it is there itself; pods of other networks never see it."""
    one, two, other = add(node, "one"), add(node, "two"), node.make_pod("other")
    assert [addresses(node).count(each) for each in GATEWAYS] == [2, 2]
    assert_answers(one.netns, *two.addresses)
    for address in other.addresses:
        with server(other.netns, TCP, address, 80):
            assert who(node.netns, Server(address, 80, TCP))[0] not in GATEWAYS
    delete(node, one)
    assert_answers(two.netns, *GATEWAYS)
    assert_answers(node.netns, *two.addresses)
    delete(node, two)
    node.delete_pod(other)


def test_survives_the_agent(node: Machine) -> None:
    """A killed agent leaves the gateway, and its heir knows it as its own, puts it back and takes it away."""
    pod = add(node, "inside")
    node.kill_agent()
    assert_answers(pod.netns, *GATEWAYS)
    node.start_agent()
    assert node.repairs() == {}
    for address in GATEWAYS:
        node.netns.run("ip", "address", "delete", address, "dev", pod.device)
    node.wait_for(lambda: set(GATEWAYS) <= set(addresses(node)), "the gateway to be back")
    node.wait_for(lambda: node.repairs().get("gateways") == 2, "two repairs")
    assert_answers(pod.netns, *GATEWAYS)
    assert_answers(node.netns, *pod.addresses)
    delete(node, pod)


def test_address_that_a_pod_has(node: Machine) -> None:
    """A pod that has another network's gateway address has it for all; when it goes, the node is the gateway again."""
    one = add(node, "one")
    ranges = [[{"subnet": "10.77.0.0/24", "gateway": "10.77.0.254"}], [{"subnet": "fd77::/64", "gateway": "fd77::fe"}]]
    other = {"name": "other", "ipam": {**IPAM, "ranges": ranges}}
    two = add(node, "two", **other, runtimeConfig={"ips": GATEWAYS})
    assert two.addresses == GATEWAYS
    for address in two.addresses:
        for asker in (node.netns, one.netns):
            with server(two.netns, TCP, address, 80) as it:
                who(asker, Server(address, 80, TCP))
                assert len(it.peers) == 1
    assert_answers(node.netns, *two.addresses)
    delete(node, two, **other)
    assert_answers(one.netns, *GATEWAYS)
    assert_answers(node.netns, *one.addresses)
    delete(node, one)


def test_address_that_the_node_has(node: Machine) -> None:
    """Where the node is in the subnet already, under the gateway's address, it stays there, and reaches what it did."""
    node.netns.run("ip", "address", "add", "10.77.0.1/24", "dev", "uplink")
    node.world.run("ip", "address", "add", "10.77.0.200/24", "dev", "outside")
    pod = add(node, "inside")
    assert_answers(pod.netns, *GATEWAYS)
    assert_answers(node.netns, "10.77.0.200", *pod.addresses)
    delete(node, pod)
    assert_answers(node.netns, "10.77.0.200")
    node.netns.run("ip", "address", "delete", "10.77.0.1/24", "dev", "uplink")
    node.world.run("ip", "address", "delete", "10.77.0.200/24", "dev", "outside")


@pytest.mark.parametrize("subnet", ["192.0.2.0/24", "192.0.2.0/26"])
def test_gateway_that_is_another_machine(node: Machine, subnet: str) -> None:
    """Where the node lives under another address, it is no gateway: who is, and their neighbours, stay in reach."""
    node.world.run("ip", "address", "add", "192.0.2.50/24", "dev", "outside")
    ipam = {"type": "podlane", "subnet": subnet, "gateway": "192.0.2.1", "rangeStart": "192.0.2.40"}
    before = state(node)
    pod = add(node, "inside", ipam=ipam)
    assert state(node) == before
    assert_answers(node.netns, "192.0.2.1", "192.0.2.50")
    assert who_answers(node, "192.0.2.1") == "uplink"
    delete(node, pod, ipam=ipam)
    node.world.run("ip", "address", "delete", "192.0.2.50/24", "dev", "outside")


def who_answers(node: Machine, address: str) -> str:
    """Return the device by which the node reaches an address."""
    (route,) = json.loads(node.netns.run("ip", "-j", "route", "get", address).stdout)
    device: str = route["dev"]
    return device


@pytest.mark.parametrize("address", ["10.77.0.99", "fd77::99"])
def test_unused_addresses_are_unreachable(node: Machine, address: str) -> None:
    """A packet to an address of the subnet that no pod has is answered "unreachable", not sent into the world."""
    pod = add(node, "inside")
    done = pod.netns.run("ping", "-c", "1", "-W", "2", address, check=False)
    assert done.returncode == 1
    assert "nreachable" in done.stdout
    delete(node, pod)
