"""The routes inside a pod: what IPAM gives for a network with a layer 2, as it is on a link of its own. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_network

from agent.pods import Subnet
from agent.state import Address, Network
from cni.errors import CniError, Code
from cni.result import Result, Route, parse_result
from cni.versions import LATEST

_DEFAULT = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}
_LOCAL_SCOPES = (254, 255)  # host and nowhere (linux/rtnetlink.h): no packet leaves by such a route


def pod_routes(given: Result, gateways: Mapping[int, Address], *, is_default_gateway: bool) -> tuple[Route, ...]:
    """Return the routes of a pod that IPAM gave these addresses and routes; each leads to the node.

    To them come routes to the subnets of its addresses, which a bridge would have connected, and with
    `is_default_gateway` a default route of each family that has none. `gateways` are the node's addresses inside the
    pod, by IP version. Routes of a family that the pod has no address of are left out. Raises CniError 7 for what a
    route asks and no link of two ends can do.
    """
    families = sorted({ip.address.version for ip in given.ips})
    routes = [_via_node(route, given, gateways) for route in given.routes if route.dst.version in families]
    if is_default_gateway:
        present = {route.dst for route in routes if route.table is None}
        defaults = (_DEFAULT[family] for family in families)
        routes += [Route(dst, gw=gateways[dst.version]) for dst in defaults if dst not in present]
    subnets = (ip.address.network for ip in given.ips)
    routes += [Route(dst, gw=gateways[dst.version]) for dst in subnets if dst.num_addresses > 1]
    return tuple({(route.dst, route.table, route.priority): route for route in reversed(routes)}.values())[::-1]


def _via_node(route: Route, given: Result, gateways: Mapping[int, Address]) -> Route:
    allowed = [*_gateways(given, route.dst.version), gateways[route.dst.version]]
    if route.gw is not None and not route.gw.is_unspecified and route.gw not in allowed:
        raise CniError(
            Code.INVALID_NETWORK_CONFIG,
            f"route {route.dst} via {route.gw}: a pod's only neighbour is its node;"
            f" allowed is no gw, or one of {', '.join(map(str, allowed))}",
        )
    if route.scope in _LOCAL_SCOPES:
        raise CniError(
            Code.INVALID_NETWORK_CONFIG,
            f"route {route.dst}: scope {route.scope} keeps packets in the pod; allowed are 0 (global) and 253 (link)",
        )
    return replace(route, gw=gateways[route.dst.version], scope=None)


def _gateways(given: Result, version: int) -> Iterator[Address]:
    """Yield the gateways that IPAM names, where it names none the first of the subnet, as the bridge plugin has it."""
    for ip in given.ips:
        network = ip.address.network
        if network.version == version:
            yield ip.gateway or network[min(1, network.num_addresses - 1)]


def subnets(given: Result, *, with_gateway: bool) -> tuple[Subnet, ...]:
    """Return the subnets of the addresses that IPAM gave; `with_gateway`, the node has the gateway's address in each.

    Where IPAM names no gateway, that is the subnet's first address, as the bridge plugin has it.
    """
    found: dict[Network, Subnet] = {}
    for ip in given.ips:
        network = ip.address.network
        gateway = ip.gateway or (network[1] if network.num_addresses > 1 else None)
        if gateway is None or not with_gateway or gateway == ip.address.ip or not _can_be_assigned(gateway):
            gateway = None
        found.setdefault(network, Subnet(network, gateway, named=ip.gateway))
    return tuple(found.values())


def _can_be_assigned(gateway: Address) -> bool:
    """Say whether the node can be reached at an address from elsewhere than the link."""
    return not (gateway.is_unspecified or gateway.is_loopback or gateway.is_link_local or gateway.is_multicast)


def encode(routes: Iterable[Route]) -> str:
    """Return routes as text, to be kept."""
    return json.dumps(Result(routes=tuple(routes)).to_json(LATEST).get("routes", []))


def decode(text: str) -> Sequence[Route] | None:
    """Return the routes that `encode` wrote; None for an empty text."""
    return parse_result({"routes": json.loads(text)}, LATEST).routes if text else None
