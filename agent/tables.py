"""The kernel's tables as the loop sees them: which there are, and in which order they are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from agent.diff import Delta
from agent.state import (
    Address,
    Attached,
    Endpoint,
    Gateway,
    Hook,
    HostPort,
    HostRoute,
    Lanes,
    Neighbour,
    Network,
    PeerRoute,
    PodPort,
    Prefix,
    Queue,
    Settings,
    Sources,
    State,
    Table,
    TunnelDevice,
    TunnelEnd,
)


@dataclass(frozen=True)
class Tables:
    """The kernel's tables, in the order of creation; deletion goes the other way. Names are those of `State`.

    Devices and queues come before what sends through them. Uplinks and tunnels come after hooks: `from_pod` sends
    nothing there before `to_uplink` and `to_tunnel` run, nor after they stop. (Where these run, it is the other way
    round: see `in_order`.) Gateways come before the routes that name them as a source.
    """

    tunnel_devices: Table[str, TunnelDevice]
    queues: Table[int, Queue]
    endpoints: Table[Address, Endpoint]
    settings: Table[int, Settings]
    prefixes: Table[Prefix, Lanes]
    node_addresses: Table[Address, int]
    host_ports: Table[HostPort, PodPort]
    hooks: Table[Hook, Attached]
    sockets: Table[str, int]
    uplinks: Table[int, Sources]
    tunnels: Table[int, TunnelEnd]
    neighbours: Table[Neighbour, str]
    gateways: Table[Gateway, int]
    routes: Table[Address, HostRoute]
    peer_routes: Table[Prefix, PeerRoute]
    subnets: Table[Network, Literal["unreachable"]]


MANY = ("prefixes", "peer_routes")
"""Those that may have thousands of entries."""
_OF_PEERS = ("tunnel_devices", "prefixes", "tunnels", "peer_routes")
_LEADING_OUT = ("uplinks", "tunnels")  # by the index of their devices
NAMES: tuple[str, ...] = tuple(each.name for each in fields(Tables))
"""All of them, in the order of creation."""


def in_order(deltas: Mapping[str, Delta[Any, Any]], known: State) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yield what to write. Devices whose programs run already come before hooks: new ones may look into another map."""
    served = {attached.ifindex for hook, attached in known.hooks.items() if hook.direction == "egress"}
    for name, delta in deltas.items():
        if name == "hooks":
            for each in _LEADING_OUT:
                yield each, {key: value for key, value in deltas[each].upsert.items() if key in served}
        if name in _LEADING_OUT:
            yield name, {key: value for key, value in delta.upsert.items() if key not in served}
        else:
            yield name, delta.upsert


def surely_outdated(name: str, keys: frozenset[Any], known: State) -> frozenset[Any]:
    """Return what may go before the nodes of the cluster are known: nothing by which this one reaches them."""
    if name in _OF_PEERS:
        return frozenset()
    return frozenset(key for key in keys if name != "hooks" or key.device not in known.tunnel_devices)
