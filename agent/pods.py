"""A pod as the IPAM store knows it, and the rows that hold it: statements within a transaction of the store."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import ip_address, ip_network
from typing import Any

from agent.schema import unpack
from agent.state import Address, HostPort, Network
from cni.call import Attachment
from cni.netconf import Bandwidth

IS = "network = ? AND container_id = ? AND ifname = ?"
"""The condition that selects an attachment, for the values of `key`."""

NO_LIMITS = Bandwidth()

Row = tuple[tuple[Any, ...], tuple[bytes, ...], tuple[tuple[Any, ...], ...]]
"""A pod as the tables have it: its columns, its addresses in order, and its host ports."""

_COLUMNS = (
    "network, container_id, ifname, phase, device, mac, mtu, netns_path, netns_id, boot_id,"
    " pod_name, masquerade, environment, stdin, routes, subnets, limits"
)
_HOST_PORT = "address, port, protocol, pod_port"


class Phase(StrEnum):
    """How far an attachment has come."""

    RESERVED = "reserved"  # ADD is at work
    ACTIVE = "active"  # ADD is done
    RELEASING = "releasing"  # DEL is at work
    IMPORTED = "imported"  # another plugin made it: its addresses are kept for it until DEL or GC, and that is all


@dataclass(frozen=True, slots=True)
class Netns:
    """A pod's network namespace: the path that the runtime gave, and the identity "inode:cookie" of what was there."""

    path: str
    id: str


@dataclass(frozen=True, slots=True)
class Origin:
    """The call of ADD, so that what a delegate holds can be released without a DEL: CNI_* variables, and stdin."""

    environment: Mapping[str, str] = field(default_factory=dict, hash=False)
    stdin: bytes = b""


@dataclass(frozen=True, slots=True)
class Subnet:
    """What an address is of, by its IPAM. `gateway` is the node's own address there; None if that is not the node's.

    `named` is the gateway that IPAM named, if any, whoever has it.
    """

    network: Network
    gateway: Address | None = None
    named: Address | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Published:
    """A host port, and the pod's port that it leads to."""

    at: HostPort
    port: int


@dataclass(frozen=True, slots=True)
class Pod:
    """One attachment. `device` is the host end of its veth pair, `mac` the pod's own MAC.

    `addresses` are in the order of the result. `pod_name` is "namespace/name", or empty; `masquerade` is None where the
    agent's own setting applies. `routes` are those inside the pod, as text that only their writer reads; empty means a
    default route of each family. `subnets` are those of its addresses; the agent's own ranges have none. `limits` are
    the runtime's.
    """

    attachment: Attachment
    device: str
    mac: str
    mtu: int
    netns: Netns
    addresses: tuple[Address, ...]
    phase: Phase
    boot_id: str
    pod_name: str = ""
    masquerade: bool | None = None
    origin: Origin = Origin()
    routes: str = ""
    subnets: tuple[Subnet, ...] = ()
    limits: Bandwidth = NO_LIMITS
    published: tuple[Published, ...] = ()


def shaper_of(device: str) -> str:
    """Return the name of the device through which the pod behind a host end sends, if that is limited."""
    return device + "o"  # "out"; the host end's name leaves one character of IFNAMSIZ


def key(attachment: Attachment) -> tuple[str, str, str]:
    """Return an attachment as the tables name it."""
    return attachment.network, attachment.container_id, attachment.ifname


def insert(db: sqlite3.Connection, pod: Pod) -> None:
    """Make a pod's row; its addresses and host ports are not part of it. Raises sqlite3.IntegrityError if it exists."""
    row = (
        *key(pod.attachment),
        pod.phase,
        pod.device,
        pod.mac,
        pod.mtu,
        pod.netns.path,
        pod.netns.id,
        pod.boot_id,
        pod.pod_name,
        pod.masquerade,
        json.dumps(dict(pod.origin.environment)),
        pod.origin.stdin,
        pod.routes,
        encode_subnets(pod.subnets),
        pod.limits.model_dump_json(by_alias=True) if pod.limits.limits else "",
    )
    db.execute(f"INSERT INTO attachment ({_COLUMNS}) VALUES ({', '.join('?' * len(row))})", row)  # noqa: S608


def find(db: sqlite3.Connection, attachment: Attachment) -> Pod | None:
    """Return one pod, or None."""
    row = db.execute(f"SELECT {_COLUMNS} FROM attachment WHERE {IS}", key(attachment)).fetchone()  # noqa: S608
    if row is None:
        return None
    addresses = db.execute("SELECT address FROM address WHERE device = ? ORDER BY position", (row[4],))
    published = db.execute(f"SELECT {_HOST_PORT} FROM host_port WHERE device = ?", (row[4],))  # noqa: S608
    return _pod(row, (address for (address,) in addresses), published)


def find_all(db: sqlite3.Connection, known: Mapping[Row, Pod]) -> dict[Row, Pod]:
    """Return all pods, by their rows. Those `known` from an earlier time are not decoded again (10 µs each)."""
    attachments = db.execute(f"SELECT {_COLUMNS} FROM attachment").fetchall()  # noqa: S608
    addresses: dict[str, tuple[bytes, ...]] = {}
    for device, address in db.execute("SELECT device, address FROM address ORDER BY position"):
        addresses[device] = (*addresses.get(device, ()), address)
    published: dict[str, tuple[tuple[Any, ...], ...]] = {}
    for device, *host_port in db.execute(f"SELECT device, {_HOST_PORT} FROM host_port"):  # noqa: S608
        published[device] = (*published.get(device, ()), tuple(host_port))
    rows = [(each, addresses.get(each[4], ()), published.get(each[4], ())) for each in attachments]
    return {row: known.get(row) or _pod(*row) for row in rows}


def _pod(row: tuple[Any, ...], addresses: Iterable[bytes], published: Iterable[tuple[Any, ...]]) -> Pod:
    return Pod(
        attachment=Attachment(*row[:3]),
        phase=Phase(row[3]),
        device=row[4],
        mac=row[5],
        mtu=row[6],
        netns=Netns(row[7], row[8]),
        boot_id=row[9],
        pod_name=row[10],
        masquerade=None if row[11] is None else bool(row[11]),
        origin=Origin(json.loads(row[12]), row[13]),
        routes=row[14],
        subnets=_decode_subnets(row[15]),
        limits=Bandwidth.model_validate_json(row[16]) if row[16] else NO_LIMITS,
        addresses=tuple(unpack(address) for address in addresses),
        published=tuple(
            Published(HostPort(unpack(address), port, protocol), pod_port)
            for address, port, protocol, pod_port in published
        ),
    )


def encode_subnets(subnets: Iterable[Subnet]) -> str:
    """Return subnets as a row has them."""
    return json.dumps([(str(each.network), str(each.gateway or ""), str(each.named or "")) for each in subnets])


def _decode_subnets(text: str) -> tuple[Subnet, ...]:
    """Read subnets; those of older rows have no named gateway."""
    return tuple(
        Subnet(ip_network(network), *(ip_address(each) if each else None for each in gateways))
        for network, *gateways in json.loads(text)
    )
