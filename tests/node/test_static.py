"""The IPAM plugin static, as Debian has it, given its addresses in each of the ways that it knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import ip_interface
from typing import Any

import pytest

from tests.node.contract import PLUGINS, Container, assert_refused, rows
from tests.node.machine import Machine, Netns

OWN = {"addresses": [{"address": "10.9.0.5/24", "gateway": "10.9.0.1"}]}


@pytest.fixture
def it(shared_node: Machine) -> Iterator[Container]:
    """Make a container of a network whose addresses are static's; nothing of it is left in the end."""
    netns = Netns("static")
    config = {"cniVersion": "1.0.0", "name": "fixed", "ipMasq": True}
    it = Container(shared_node, netns, config)
    try:
        yield it
    finally:
        it.done("DEL")
        netns.delete()
    assert rows(shared_node) == []


@pytest.mark.parametrize(
    ("given", "arguments", "expected"),
    [
        ({"ipam": OWN}, "", ["10.9.0.5"]),
        ({"ipam": OWN, "runtimeConfig": {"ips": ["10.9.0.6/24", "fd09::6/64"]}}, "", ["10.9.0.6", "fd09::6"]),
        ({"ipam": OWN, "args": {"cni": {"ips": ["10.9.0.7/24"]}}}, "", ["10.9.0.7"]),
        ({}, "IP=10.9.0.8/24,fd09::8/64;GATEWAY=10.9.0.1,fd09::1", ["10.9.0.8", "fd09::8"]),
    ],
)
def test_asked_for(it: Container, given: Mapping[str, Any], arguments: str, expected: list[str]) -> None:
    """Addresses that configuration, runtime or user ask static for are what the pod has, and they work."""
    ipam = {"type": "static", "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}], **given.get("ipam", {})}
    env = {"CNI_PATH": PLUGINS, "CNI_ARGS": f"IgnoreUnknown=1;{arguments}".rstrip(";")}
    call: dict[str, Any] = {**given, "ipam": ipam, "env": env}
    result = it.add(**call)
    assert [each["address"].partition("/")[0] for each in result["ips"]] == expected
    worlds = ["192.0.2.1", "2001:db8::1"][: len(expected)]
    assert [world for world in worlds if not it.pings(world)] == []
    it.done("CHECK", prevResult=result, **call)
    it.done("DEL", prevResult=result, **call)


def test_asked_for_twice(it: Container, shared_node: Machine) -> None:
    """Static gives one address as often as it is asked for; podlane refuses the second pod, and names the first."""
    call: dict[str, Any] = {"ipam": {"type": "static", **OWN}, "env": {"CNI_PATH": PLUGINS}}
    it.add(**call)
    other = Container(shared_node, Netns("static"), it.config)
    try:
        assert_refused(other.call("ADD", **call), 105, "10.9.0.5", it.netns.name)
        other.done("DEL", **call)
        it.pings("192.0.2.1")
    finally:
        other.netns.delete()
    it.done("DEL", **call)


@pytest.mark.parametrize("own", ["192.0.2.10/24", "2001:db8::10/64"])
@pytest.mark.parametrize("kind", ["static", "podlane"])
def test_address_of_the_node(it: Container, kind: str, own: str) -> None:
    """No pod gets an address that the node has: what the world sends to the node would reach the pod."""
    ipam: dict[str, Any] = {"type": kind, "addresses": [{"address": own}], "subnet": str(ip_interface(own).network)}
    call: dict[str, Any] = {"ipam": ipam, "runtimeConfig": {"ips": [own]}, "env": {"CNI_PATH": PLUGINS}}
    before = it.node.traces()
    assert_refused(it.call("ADD", **call), 105, own.partition("/")[0], "node itself")
    assert it.node.traces() == before
