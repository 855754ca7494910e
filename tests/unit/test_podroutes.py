"""The routes inside a pod: pure functions of what IPAM gave."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface, ip_network

import pytest

from agent.podroutes import decode, encode, pod_routes, subnets
from agent.store import Subnet
from agent.wiring import GATEWAYS
from cni.errors import CniError
from cni.result import Ip, Result, Route

V4, V6 = GATEWAYS[4], GATEWAYS[6]
ONE = Ip(ip_interface("10.1.0.5/16"), ip_address("10.1.0.1"))
SIX = Ip(ip_interface("fd01::5/64"), ip_address("fd01::1"))


def route(dst: str, gw: str = "", **changes: int) -> Route:
    """Return a route, as IPAM gives it."""
    return Route(ip_network(dst), ip_address(gw) if gw else None, **changes)


def made(*routes: Route, ips: tuple[Ip, ...] = (ONE,), is_default_gateway: bool = False) -> list[str]:
    """Return the pod's routes in words."""
    found = pod_routes(Result(ips=ips, routes=routes), GATEWAYS, is_default_gateway=is_default_gateway)
    return [f"{each.dst} {each.gw}" for each in found]


@pytest.mark.parametrize("gw", ["", "10.1.0.1", "0.0.0.0", "169.254.1.1"])  # noqa: S104  # nobody listens there
def test_routes_lead_to_the_node(gw: str) -> None:
    """A route without gateway, via IPAM's or via podlane's own becomes one via podlane's."""
    assert made(route("0.0.0.0/0", gw)) == [f"0.0.0.0/0 {V4}", f"10.1.0.0/16 {V4}"]


def test_subnets_are_always_reachable() -> None:
    """Without any routes of IPAM a pod gets those to its own subnets, as a bridge would have connected them."""
    assert made(ips=(ONE, SIX)) == [f"10.1.0.0/16 {V4}", f"fd01::/64 {V6}"]


def test_addresses_without_a_subnet() -> None:
    """An address that is alone in its subnet gets no route to itself."""
    assert made(ips=(Ip(ip_interface("10.1.0.5/32")),)) == []


def test_default_gateway() -> None:
    """With isDefaultGateway there is a default route of each family that the pod has, and just one."""
    both = (ONE, SIX)
    assert made(ips=both, is_default_gateway=True)[:2] == [f"0.0.0.0/0 {V4}", f"::/0 {V6}"]
    assert made(route("0.0.0.0/0"), ips=(ONE,), is_default_gateway=True) == made(route("0.0.0.0/0"))
    assert made(route("0.0.0.0/0", table=100), is_default_gateway=True).count(f"0.0.0.0/0 {V4}") == 2


def test_the_same_route_twice() -> None:
    """A route that comes twice is made once; other tables and metrics make it another one."""
    assert made(route("10.2.0.0/16"), route("10.2.0.0/16", "10.1.0.1"), route("10.1.0.0/16")) == [
        f"10.2.0.0/16 {V4}",
        f"10.1.0.0/16 {V4}",
    ]
    assert len(made(route("10.2.0.0/16"), route("10.2.0.0/16", priority=5), route("10.2.0.0/16", table=7))) == 4


def test_other_family() -> None:
    """Routes of a family that the pod has no address of are left out."""
    assert made(route("::/0"), route("0.0.0.0/0", "10.1.0.1")) == [f"0.0.0.0/0 {V4}", f"10.1.0.0/16 {V4}"]


def test_attributes_are_kept() -> None:
    """Metric, table, MTU and MSS of a route stay; a scope of link is what every route of the pod has in effect."""
    asked = route("10.2.0.0/16", mtu=1400, advmss=1360, priority=7, table=100, scope=253)
    first, *_ = pod_routes(Result(ips=(ONE,), routes=(asked,)), GATEWAYS, is_default_gateway=False)
    assert first == Route(ip_network("10.2.0.0/16"), V4, mtu=1400, advmss=1360, priority=7, table=100)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (route("10.2.0.0/16", "10.1.0.77"), ["10.2.0.0/16 via 10.1.0.77", "10.1.0.1", "169.254.1.1"]),
        (route("10.2.0.0/16", "fd01::1"), ["via fd01::1"]),
        (route("10.2.0.0/16", scope=254), ["scope 254"]),
    ],
)
def test_what_cannot_be_done(bad: Route, words: list[str]) -> None:
    """A route via somebody else than the node is refused by name with code 7: there is nobody else on the link."""
    with pytest.raises(CniError) as caught:
        made(bad, ips=(ONE, SIX))
    assert caught.value.code == 7
    assert [word for word in words if word not in caught.value.message] == []


def test_gateway_that_ipam_does_not_name() -> None:
    """Without a gateway from IPAM the first address of the subnet counts as one, as with the bridge's isGateway."""
    assert made(route("0.0.0.0/0", "10.1.0.1"), ips=(Ip(ip_interface("10.1.0.5/16")),))[0] == f"0.0.0.0/0 {V4}"


@pytest.mark.parametrize(
    "routes", [(), (route("0.0.0.0/0", "169.254.1.1", priority=65540), route("fd00::/8", "fe80::1", mtu=1400, table=0))]
)
def test_text(routes: tuple[Route, ...]) -> None:
    """Routes survive being written and read; an empty text is none at all, which is not the same as no routes."""
    assert tuple(decode(encode(routes)) or ()) == routes
    assert decode(encode(routes)) is not None
    assert decode("") is None


@pytest.mark.parametrize(
    ("ip", "gateway", "expected"),
    [
        ("10.1.0.5/16", "10.1.0.9", "10.1.0.9"),
        ("10.1.0.5/16", "", "10.1.0.1"),
        ("fd01::5/64", "", "fd01::1"),
        ("10.1.0.1/16", "", ""),  # it is the pod's own
        ("10.1.0.5/32", "10.1.0.1", "10.1.0.1"),
        ("10.1.0.5/32", "", ""),
        ("10.1.0.5/16", "169.254.1.1", ""),
        ("fd01::5/64", "fe80::1", ""),
        ("10.1.0.5/16", "127.0.0.1", ""),
    ],
)
def test_gateways(ip: str, gateway: str, expected: str) -> None:
    """The gateway is IPAM's, else the first address; none that the node cannot have for others to reach it."""
    given = Result(ips=(Ip(ip_interface(ip), ip_address(gateway) if gateway else None),))
    network = ip_interface(ip).network
    assert subnets(given, with_gateway=True) == (Subnet(network, ip_address(expected) if expected else None),)
    assert subnets(given, with_gateway=False) == (Subnet(network),)
