"""What should be in the kernel: a pure function of the pods in the store, the devices there are and what is outside."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv6Address

from agent.pods import shaper_of
from agent.state import (
    Address,
    Attached,
    Endpoint,
    Gateway,
    Hook,
    HostRoute,
    Lanes,
    Neighbour,
    Network,
    PeerRoute,
    PodPort,
    Prefix,
    Queue,
    Settings,
    State,
    TunnelDevice,
    TunnelEnd,
    Uplink,
)
from agent.store import Phase, Pod, Subnet

_ETHERNET_HEADER = 14  # bytes


@dataclass(frozen=True)
class Tunnel:
    """The tunnel that there should be, and the index of its device, 0 as long as that is not there."""

    name: str
    device: TunnelDevice
    end: TunnelEnd
    ifindex: int = 0


@dataclass(frozen=True)
class Outside:
    """All that the way out of the node depends on.

    `uplinks` are by device name. `mtu` is that of new pods, in bytes, where their network says nothing; 0: not known.
    """

    uplinks: Mapping[str, Uplink] = field(default_factory=dict)
    node_addresses: frozenset[Address] = frozenset()
    prefixes: dict[Prefix, Lanes] = field(default_factory=dict)
    settings: Settings | None = None
    mtu: int = 0
    sockets: Mapping[str, int] = field(default_factory=dict)
    """As in `State`; nothing if the node has no cgroup2."""
    tunnel: Tunnel | None = None
    peer_routes: dict[Prefix, PeerRoute] = field(default_factory=dict)
    live: bool = True
    """Whether the cluster's nodes are known; if not, what there is of others stays."""


@dataclass(frozen=True)
class Inside:
    """What plans of all pods and plans of some of them must agree on.

    `subnets` are the pods' whose gateway the node is (see `routed_subnets`), `macs` the MAC addresses of the pods' own
    ends, by index of the host end, where these are known to be others than at ADD; `queued` are the indexes of devices
    that have a queue of somebody else's, which what is sent there must not pass by.
    """

    subnets: Collection[Subnet] = ()
    macs: Mapping[int, str] = field(default_factory=dict)
    queued: Collection[int] = ()


def routed_subnets(pods: Iterable[Pod], node_addresses: Collection[Address]) -> frozenset[Subnet]:
    """Return the pods' subnets whose gateway the node is. `node_addresses` are those that it has anyway.

    An address that a pod has is no gateway. Where the node lives in a subnet under another address, it is no router of
    podlane's either: the gateway, then, is some other machine.
    """
    pods = [pod for pod in pods if pod.phase is not Phase.RELEASING]
    asked = {each for pod in pods for each in pod.subnets if each.gateway is not None}
    taken = {address for pod in pods for address in pod.addresses}
    homes = set(node_addresses) - {each.gateway for each in asked}
    return frozenset(
        each
        for each in asked
        if each.gateway not in taken
        and (each.network.num_addresses == 1 or not any(home in each.network for home in homes))
    )


def plan(
    pods: Iterable[Pod],
    indexes: Mapping[str, int],
    subnets: Iterable[Network] = (),
    outside: Outside | None = None,
    inside: Inside | None = None,
) -> State:
    """Return the desired state.

    `indexes` gives the interface index of each host-side device that exists (host ends and shapers); a pod whose device
    is missing gets nothing, since packets to it could go nowhere. A pod that is being released keeps its programs,
    which drop whatever it still sends, until its device is gone. What is of the node's own `subnets` and no pod's is
    unreachable: the default route would send it away, and the world's routes send it back. Without `subnets` and
    `outside`, the state is what these pods need, no more.
    """
    inside, outside = inside or Inside(), outside or Outside()
    desired = State(
        prefixes=outside.prefixes,  # themselves, not copies: there may be thousands, and the loop compares identities
        peer_routes=outside.peer_routes,
        subnets=dict.fromkeys((each for each in subnets if each.num_addresses > 1), "unreachable"),
    )
    _plan_outside(desired, outside)
    for pod in pods:
        ifindex = indexes.get(pod.device)
        if ifindex is None:
            continue
        desired.hooks[Hook(pod.device, "ingress")] = Attached(ifindex, "from_pod")
        desired.hooks[Hook(pod.device, "egress")] = Attached(ifindex, "to_pod")
        if pod.phase is not Phase.RELEASING:
            shaper = _plan_queues(desired, pod, ifindex, indexes)
            _plan_addresses(desired, pod, ifindex, inside, shaper)
    return desired


def _plan_outside(desired: State, outside: Outside) -> None:
    if outside.settings is not None:
        desired.settings[0] = outside.settings
    desired.node_addresses.update(dict.fromkeys(outside.node_addresses, 1))
    desired.sockets.update(outside.sockets)
    for device, uplink in outside.uplinks.items():
        desired.uplinks[uplink.ifindex] = uplink.sources
        desired.hooks[Hook(device, "ingress")] = Attached(uplink.ifindex, "from_uplink")
        desired.hooks[Hook(device, "egress")] = Attached(uplink.ifindex, "to_uplink")
    if outside.tunnel is not None:
        _plan_tunnel(desired, outside.tunnel)


def _plan_tunnel(desired: State, tunnel: Tunnel) -> None:
    desired.tunnel_devices[tunnel.name] = tunnel.device
    if tunnel.ifindex:
        desired.tunnels[tunnel.ifindex] = tunnel.end
        desired.hooks[Hook(tunnel.name, "ingress")] = Attached(tunnel.ifindex, "from_tunnel")
        desired.hooks[Hook(tunnel.name, "egress")] = Attached(tunnel.ifindex, "to_tunnel")


def _plan_queues(desired: State, pod: Pod, ifindex: int, indexes: Mapping[str, int]) -> int:
    """Plan what the pod's limits ask for; return the index of its shaper, 0 if it has none."""
    limits, packet = pod.limits, pod.mtu + _ETHERNET_HEADER
    if limits.ingress_rate:
        desired.queues[ifindex] = Queue.of(limits.ingress_rate, limits.ingress_burst, packet)
    shaper = indexes.get(shaper_of(pod.device), 0) if limits.egress_rate else 0
    if shaper:
        desired.queues[shaper] = Queue.of(limits.egress_rate, limits.egress_burst, packet)
    return shaper


def _plan_addresses(desired: State, pod: Pod, ifindex: int, inside: Inside, shaper: int) -> None:
    mac = inside.macs.get(ifindex, pod.mac)
    subnets = [each for each in pod.subnets if each in inside.subnets]
    endpoint = Endpoint(
        ifindex,
        mac,
        native=pod.masquerade is False,
        network=_network_number(pod),
        shaper=shaper,
        queued=bool(pod.limits.ingress_rate) or ifindex in inside.queued,
        serves=bool(pod.published),
    )
    first = {address.version: address for address in reversed(pod.addresses)}
    for each in pod.published:
        if address := first.get(each.at.address.version):
            desired.host_ports[each.at] = PodPort(address, each.port)
    for address in pod.addresses:
        gateway = next((each.gateway for each in subnets if address in each.network), None)
        desired.endpoints[address] = endpoint
        desired.neighbours[Neighbour(address, ifindex)] = mac
        desired.routes[address] = HostRoute(ifindex, gateway)
        if gateway is not None:
            desired.gateways[Gateway(gateway, ifindex)] = 1
            desired.node_addresses[gateway] = 1
    if any(address.version == 6 for address in pod.addresses):
        # An endpoint, so that anti-spoofing knows it; link-local destinations are never forwarded. It is made of the
        # MAC address of ADD, and stays when that changes.
        desired.endpoints[link_local(pod.mac)] = endpoint


def _network_number(pod: Pod) -> int:
    """Return the number of the pod's network: 0 for the flat one, else 32 bits of the name's hash.

    A network is one of its own where no gateway leads out of its subnets: on a bridge such pods reach each other only.
    """
    wide = [each for each in pod.subnets if each.network.num_addresses > 1]
    if not wide or any(each.gateway is not None for each in wide):
        return 0
    return int.from_bytes(hashlib.sha256(pod.attachment.network.encode()).digest()[:4], "big") or 1


def link_local(mac: str) -> IPv6Address:
    """Return the link-local address of a MAC address "xx:xx:xx:xx:xx:xx" (RFC 4291, appendix A: modified EUI-64)."""
    octets = bytes.fromhex(mac.replace(":", ""))
    identifier = bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:]
    return IPv6Address(b"\xfe\x80" + bytes(6) + identifier)
