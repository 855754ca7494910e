"""Stores for tests: small ones, and attachments to put in."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path

from agent.ranges import Pool, Range
from agent.store import Netns, Pod, Store
from cni.call import Attachment

SUBNETS = ("10.0.0.0/29", "fd00::/126")  # six and three addresses
NETNS = Netns("/run/netns/x", "4:1")


def open_store(path: Path, subnets: Sequence[str] = SUBNETS, boot_id: str = "boot") -> Store:
    """Open a store that gives addresses of these subnets."""
    return Store(path, [Range.of(ip_network(subnet)) for subnet in subnets], boot_id)


def pool(
    name: str, *subnets: str, exclude: Sequence[str] = (), reserved: Sequence[str] = (), gateway: str = ""
) -> Pool:
    """Return a pool of these subnets."""
    return Pool(
        name=name,
        ranges=tuple(Range.of(ip_network(subnet)) for subnet in subnets),
        excluded=tuple(ip_network(each) for each in exclude),
        reserved=tuple(ip_network(each) for each in reserved),
        gateways=frozenset({ip_address(gateway)} if gateway else ()),
    )


def attachment(name: object, network: str = "net") -> Attachment:
    """Return the attachment of some container."""
    return Attachment(network, f"container-{name}", "eth0")


def reserve(
    store: Store,
    it: Attachment,
    pools: Sequence[Pool] | None = None,
    *requested: str,
    pod_name: str = "",
    sticky: bool = False,
) -> Pod:
    """Reserve, with a device name that is as unique as the attachment."""
    return store.reserve(
        it,
        device=f"pl-{it}",
        mac="02:00:00:00:00:01",
        mtu=1500,
        netns=NETNS,
        pools=pools,
        requested=[ip_address(each) for each in requested],
        pod_name=pod_name,
        sticky=sticky,
    )


def addresses(pod: Pod) -> list[str]:
    """Return a pod's addresses as text."""
    return [str(address) for address in pod.addresses]
