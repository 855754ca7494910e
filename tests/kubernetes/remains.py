"""What podlane has put on a node, as the node's own ip, tc and bpftool see it, through the caller's shell there."""

from __future__ import annotations

import json
import sys
from ipaddress import IPv6Address, IPv6Network, ip_network

from tests.kubernetes.caller import Caller

_MAPPED = 96  # bits: an IPv4 prefix in a map is a v4-mapped one
_DUMP = "bpftool -j map dump pinned /sys/fs/bpf/podlane/maps/prefixes:*"
_ALL = """
ls -d /run/podlane /sys/fs/bpf/podlane /opt/cni/bin/podlane /etc/cni/net.d/10-podlane.conflist
find /var/lib/podlane -mindepth 1
grep -l '^podlane:' /sys/class/net/*/ifalias
for family in -4 -6; do
    ip $family route show table all proto 111
    ip $family route show table all proto 112
    ip $family neighbour show proto 112
done
for device in $(ls /sys/class/net); do
    tc filter show dev $device ingress
    tc filter show dev $device egress
done | grep -w -e from_pod -e to_pod -e from_uplink -e to_uplink -e from_tunnel -e to_tunnel
true
"""


def found(caller: Caller, node: str) -> list[str]:
    """Return a line for each device, route, neighbour, filter and file of podlane's."""
    return caller.run("NODE_SHELL", node=node, script=f"exec 2>/dev/null\n{_ALL}").splitlines()


def settings(caller: Caller, node: str) -> dict[str, str]:
    """Return the sysctls that the agent has changed since the node's start, and what they were before."""
    text = caller.run("NODE_SHELL", node=node, script="cat /var/lib/podlane/sysctls.json")
    return {name: before for name, (before, _) in json.loads(text)["changes"].items()}


def current(caller: Caller, node: str, names: list[str]) -> dict[str, str]:
    """Return what sysctls are now."""
    script = "\n".join(f"cat /proc/sys/{name}" for name in names)
    values = caller.run("NODE_SHELL", node=node, script=script).splitlines()
    return dict(zip(names, values, strict=True))


def known_prefixes(caller: Caller, node: str) -> set[str]:
    """Return the prefixes that a node knows of others: those of its kernel routes, and of the datapath's map."""
    routes = [
        route["dst"]
        for family in ("-4", "-6")
        for route in json.loads(caller.run("NODE_SHELL", node=node, script=f"ip -j {family} route show proto 111"))
    ]
    dumped = caller.run(
        "NODE_SHELL", node=node, script="bpftool -j map dump pinned /sys/fs/bpf/podlane/maps/prefixes:*"
    )
    return {str(ip_network(each)) for each in routes} | {_prefix(entry["key"]) for entry in json.loads(dumped)}


def _prefix(key: list[str]) -> str:
    """Read a key of the map: the length in bits, and a 128-bit address (bpf/maps.h)."""
    raw = bytes(int(each, 16) for each in key)
    length, address = int.from_bytes(raw[:4], sys.byteorder), IPv6Address(raw[4:])
    if address.ipv4_mapped is None or length < _MAPPED:
        return str(IPv6Network((address, length)))
    return str(ip_network((str(address.ipv4_mapped), length - _MAPPED)))
