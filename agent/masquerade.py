"""What the configuration of masquerading means for the datapath. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network

from agent.ipmasq import Rules
from agent.sections import Masquerade
from agent.state import Lanes, Network, Settings

_LINK_LOCAL: dict[int, Network] = {4: IPv4Network("169.254.0.0/16"), 6: IPv6Network("fe80::/10")}
_EVERYTHING: dict[int, Network] = {4: IPv4Network("0.0.0.0/0"), 6: IPv6Network("::/0")}
_V4_MAPPED = IPv6Network("::ffff:0:0/96")

_BYTES_PER_FLOW = 32 * 1024  # of the node's memory
_FLOWS = (1 << 16, 1 << 20)
_LEAST_NOTES = 1 << 12
_LEAST_INBOUND = 1 << 14
_FRAGMENTS = 1 << 13  # datagrams under way at a time
_UPLINKS = 1 << 8
_NODE_ADDRESSES = 1 << 14  # services have theirs on the node where kube-proxy uses IPVS
_PREFIXES = 1 << 16  # 5,000 nodes, with two addresses and two pod CIDRs each, three times over
_TUNNELS = 8  # there is one, but for the moment in which it is made anew
_HOST_PORTS = 1 << 13
_PEERS = 1 << 14  # sockets of the node's own, each with one peer


def settings(masquerade: Masquerade, tunnel_port: int = 0) -> Settings:
    """Return what the programs themselves must know; `tunnel_port` is that of the nodes' tunnels, 0 without any."""
    return Settings(
        first_port=masquerade.first_port,
        last_port=masquerade.last_port,
        tcp_open=masquerade.tcp_open,
        tcp_established=masquerade.tcp_established,
        tcp_closed=masquerade.tcp_closed,
        udp=masquerade.udp,
        icmp=masquerade.icmp,
        other=masquerade.other,
        other_protocols=masquerade.other_protocols,
        stack_routes=masquerade.stack_routes,
        tunnel_port=tunnel_port,
    )


def inline_rules(masquerade: Masquerade) -> Rules:
    """Return the rules that the agent's own configuration has, where it names no file of ip-masq-agent's."""
    return Rules(
        nonMasqueradeCIDRs=masquerade.non_masquerade_cidrs,
        masqLinkLocal=masquerade.masq_link_local,
        masqLinkLocalIPv6=masquerade.masq_link_local_ipv6,
        cidrLimit=len(masquerade.non_masquerade_cidrs),
    )


def prefixes(masquerade: Masquerade, rules: Rules, own: Iterable[Network]) -> dict[Network, Lanes]:
    """Return the prefixes that have lanes of their own; `own` are the subnets of the node's own ranges."""
    native: set[Network] = set(own) | set(rules.non_masquerade)
    for version, masqueraded in ((4, rules.masq_link_local), (6, rules.masq_link_local_ipv6)):
        if not masqueraded:
            native.add(_LINK_LOCAL[version])
    if not masquerade.enabled:
        native |= set(_EVERYTHING.values())
    return lanes(native=native, stack=masquerade.service_cidrs)


def lanes(*, native: Iterable[Network], stack: Iterable[Network]) -> dict[Network, Lanes]:
    """Return every given prefix with all lanes of the prefixes that cover it: the kernel looks at the longest only.

    IPv4 has an entry of its own where an IPv6 prefix is so short that its addresses' mapped form falls into it.
    """
    native, stack = set(native), set(stack)
    every = native | stack
    if any(each.version == 6 and _V4_MAPPED.subnet_of(each) for each in every):
        every.add(_EVERYTHING[4])
    return {each: Lanes(native=_is_covered(each, native), stack=_is_covered(each, stack)) for each in every}


def ports(masquerade: Masquerade) -> range:
    """Return the ports from which pods are masqueraded."""
    return range(masquerade.first_port, masquerade.last_port + 1) if masquerade.enabled else range(0)


def flow_limit(masquerade: Masquerade, memory: int) -> int:
    """Return how many flows there may be on a node of so much memory, in bytes.

    A power of two, so that a node whose memory varies a little (a new kernel, a balloon) keeps its maps, and flows.
    """
    least, most = _FLOWS
    wanted = min(max(memory // _BYTES_PER_FLOW, least), most)
    return masquerade.max_flows or 1 << (wanted.bit_length() - 1)


def map_sizes(masquerade: Masquerade, memory: int) -> dict[str, int]:
    """Return the numbers of entries of the datapath's maps, for a node of so much memory, in bytes."""
    flows = flow_limit(masquerade, memory)
    # The least-recently-used maps keep what matters only while it is in use; but they give up too much when tiny.
    return {
        "flows": flows,
        "owners": flows,
        # One for every 64 KB of memory: more open connections than the servers behind them have room for. Whose note is
        # lost is cut off when the pod speaks next.
        "conversations": max(flows // 2, _LEAST_NOTES),
        # A note is needed from an outsider's packet to the pod's answer. With the least of them, a pod has 100 ms for
        # that in a flood of 160,000 packets a second. Larger nodes need more, since each CPU holds 128 free ones.
        "inbound": max(flows // 16, _LEAST_INBOUND),
        "stack_flows": max(flows // 4, _LEAST_NOTES),
        "fragments": _FRAGMENTS,
        "uplinks": _UPLINKS,
        "tunnels": _TUNNELS,
        "node_addresses": _NODE_ADDRESSES,
        "host_ports": _HOST_PORTS,
        "peers": _PEERS,
        "prefixes": _PREFIXES,
    }


def _is_covered(network: Network, by: set[Network]) -> bool:
    return any(network.supernet(new_prefix=length) in by for length in range(network.prefixlen + 1))
