"""A kernel in memory: tables and devices that implement the loop's interfaces, and refuse when told to."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from ipaddress import IPv4Address, ip_address, ip_network
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from agent.loop import Loop
from agent.plan import Inside, Outside, Tunnel, plan, routed_subnets
from agent.pods import shaper_of
from agent.ranges import Range
from agent.state import (
    Address,
    Attached,
    Endpoint,
    Gateway,
    Hook,
    HostPort,
    HostRoute,
    KernelError,
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
    TunnelDevice,
    TunnelEnd,
    Uplink,
)
from agent.store import Netns, Phase, Pod, Published, Store, Subnet
from agent.tables import Tables
from cni.call import Attachment
from cni.netconf import Bandwidth
from tests.support import prefix

K = TypeVar("K")
V = TypeVar("V")
NAMES = tuple(each.name for each in fields(State))
POD_TABLES = (
    "queues",
    "endpoints",
    "host_ports",
    "hooks",
    "neighbours",
    "gateways",
    "routes",
)  # with entries for all pods
SECONDS = 30.0  # until a test that waits for something gives up


FOREIGN: dict[str, tuple[Any, Any]] = {
    "tunnel_devices": ("podlane.old", TunnelDevice(4789, 1450)),
    "queues": (99, Queue(1, 2)),
    "endpoints": (ip_address("192.0.2.1"), Endpoint(99, "02:00:00:00:00:99")),
    "settings": (1, Settings(1, 2, 3, 4, 5, 6, 7, 8, "drop", True)),
    "prefixes": (prefix("192.0.2.0/24"), Lanes(native=True, stack=True)),
    "node_addresses": (ip_address("192.0.2.1"), 0),
    "host_ports": (HostPort(ip_address("192.0.2.1"), 99, 6), PodPort(ip_address("192.0.2.1"), 99)),
    "hooks": (Hook("pl-gone", "ingress"), Attached(99, "from_pod")),
    "sockets": ("strange4", 1),
    "uplinks": (99, Sources()),
    "tunnels": (99, TunnelEnd(1, 1450, "02:00:00:00:00:99")),
    "neighbours": (Neighbour(ip_address("192.0.2.1"), 99), "02:00:00:00:00:99"),
    "gateways": (Gateway(ip_address("192.0.2.1"), 99), 0),
    "routes": (ip_address("192.0.2.1"), HostRoute(99)),
    "peer_routes": (prefix("192.0.2.0/24"), PeerRoute(99)),
    "subnets": (ip_network("192.0.2.0/24"), "blackhole"),
}
"""One object of each table that belongs to no pod."""


SUBNETS = tuple(
    Subnet(ip_network(network), ip_address(gateway))
    for network, gateway in (("10.0.0.0/24", "10.0.0.254"), ("fd00::/64", "fd00::ffff"))
)
"""Of the pods' addresses, with the node's own in them."""

LIMITS = Bandwidth(ingressRate=8000, ingressBurst=80000, egressRate=8000, egressBurst=80000)
"""Of each pod."""


OUTSIDE = Outside(
    sockets={"connect4": 7, "connect6": 7},
    uplinks={f"eth{number}": Uplink(number + 2, Sources(IPv4Address(f"198.51.100.{number}"))) for number in (0, 1)},
    node_addresses=frozenset(ip_address(f"198.51.100.{number}") for number in (0, 1)),
    prefixes={prefix("198.18.0.0/15"): Lanes(stack=True), prefix("fd00::/8"): Lanes(native=True)},
    settings=Settings(49152, 65535, 240, 7440, 60, 300, 60, 600, "masquerade", False),
    tunnel=Tunnel(
        "podlane.vx",
        TunnelDevice(4789, 1450, frozenset({ip_address("198.51.100.0")})),
        TunnelEnd(112, 1450, "02:00:00:00:00:01", IPv4Address("198.51.100.0")),
        ifindex=4,
    ),
    peer_routes={
        prefix("10.0.1.0/24"): PeerRoute(2, gateway=IPv4Address("198.51.100.9")),
        prefix("10.0.2.0/24"): PeerRoute(3, gateway=IPv4Address("198.51.100.10")),
    },
)
"""What a node sees around it."""


class MemoryTable(Generic[K, V]):
    """Implements `agent.state.Table`. `journal` takes ("read" | "upsert" | "delete", name) of all tables in order."""

    def __init__(self, name: str, journal: list[tuple[str, str]]) -> None:
        self.objects: dict[K, V] = {}
        self.refused: dict[K, str] = {}
        self.before_read: Callable[[], None] = lambda: None
        self.after_read: Callable[[], None] = lambda: None
        self._name = name
        self._journal = journal

    def read(self) -> dict[K, V]:
        """Return a copy of all objects."""
        self.before_read()
        result = dict(self.objects)
        self._journal.append(("read", self._name))
        self.after_read()
        return result

    def upsert(self, items: Mapping[K, V]) -> dict[K, KernelError]:
        """Put what is not refused."""
        self._journal.append(("upsert", self._name))
        self.objects.update({key: value for key, value in items.items() if key not in self.refused})
        return self._failures(items)

    def delete(self, keys: Iterable[K]) -> dict[K, KernelError]:
        """Remove what is not refused."""
        keys = list(keys)
        self._journal.append(("delete", self._name))
        for key in keys:
            if key not in self.refused:
                self.objects.pop(key, None)
        return self._failures(keys)

    def _failures(self, keys: Iterable[K]) -> dict[K, KernelError]:
        return {key: KernelError(self.refused[key]) for key in keys if key in self.refused}


class MemoryDevices:
    """Implements `agent.loop.Devices`. What is restored gets an index that no device had before."""

    def __init__(self, journal: list[tuple[str, str]]) -> None:
        self.existing: dict[str, int] = {}
        self.down: set[str] = set()
        self.refused: dict[str, str] = {}
        self.other_ends: dict[int, str] = {}
        self.others_queues: set[int] = set()
        self._numbers = itertools.count(10)
        self._journal = journal

    def create(self, device: str) -> None:
        """Make a host end."""
        self.existing[device] = next(self._numbers)

    def indexes(self, pods: Sequence[Pod]) -> dict[str, int]:
        """Return what exists of the pods' host ends and shapers."""
        existing = dict(self.existing)
        names = [name for pod in pods for name in (pod.device, shaper_of(pod.device))]
        return {name: existing[name] for name in names if name in existing}

    def restore(self, pod: Pod) -> None:
        """Make it again, unless refused."""
        self._try("restore", pod)
        self.create(pod.device)
        if pod.limits.egress_rate:
            self.create(shaper_of(pod.device))

    def finish_restore(self, pod: Pod) -> None:
        """Do nothing but to say so."""
        self._try("finish_restore", pod)

    def shape(self, pod: Pod) -> None:
        """Make the shaper again, unless refused."""
        self._try("shape", pod)
        self.create(shaper_of(pod.device))

    def fallen(self) -> set[str]:
        """Return what is down."""
        return set(self.down)

    def lift(self, pod: Pod) -> None:
        """Set it up, unless refused."""
        self._try("lift", pod)
        self.down -= {pod.device, shaper_of(pod.device)}

    def macs(self) -> dict[int, str]:
        """Return the MAC addresses that tests have set."""
        return dict(self.other_ends)

    def queued(self) -> set[int]:
        """Return where tests have put a queue."""
        return set(self.others_queues)

    def introduce(self, pod: Pod) -> None:
        """Do nothing but to say so."""
        self._try("introduce", pod)

    def _try(self, what: str, pod: Pod) -> None:
        self._journal.append((what, pod.device))
        if pod.device in self.refused:
            raise KernelError(self.refused[pod.device])


class World:
    """A loop over a real store and a kernel in memory."""

    def __init__(self, directory: Path, *, resync_seconds: float = 0.02, patience_seconds: float = 600) -> None:
        ranges = [Range.of(ip_network(subnet)) for subnet in ("10.0.0.0/24", "fd00::/64")]
        self.subnets = [each.subnet for each in ranges]
        self.store = Store(directory / "ipam.db", ranges, "boot")
        self.journal: list[tuple[str, str]] = []
        self.tables = Tables(
            tunnel_devices=MemoryTable[str, TunnelDevice]("tunnel_devices", self.journal),
            queues=MemoryTable[int, Queue]("queues", self.journal),
            endpoints=MemoryTable[Address, Endpoint]("endpoints", self.journal),
            settings=MemoryTable[int, Settings]("settings", self.journal),
            prefixes=MemoryTable[Prefix, Lanes]("prefixes", self.journal),
            node_addresses=MemoryTable[Address, int]("node_addresses", self.journal),
            host_ports=MemoryTable[HostPort, PodPort]("host_ports", self.journal),
            hooks=MemoryTable[Hook, Attached]("hooks", self.journal),
            sockets=MemoryTable[str, int]("sockets", self.journal),
            uplinks=MemoryTable[int, Sources]("uplinks", self.journal),
            tunnels=MemoryTable[int, TunnelEnd]("tunnels", self.journal),
            neighbours=MemoryTable[Neighbour, str]("neighbours", self.journal),
            gateways=MemoryTable[Gateway, int]("gateways", self.journal),
            routes=MemoryTable[Address, HostRoute]("routes", self.journal),
            peer_routes=MemoryTable[Prefix, PeerRoute]("peer_routes", self.journal),
            subnets=MemoryTable[Network, Literal["unreachable"]]("subnets", self.journal),
        )
        self.devices = MemoryDevices(self.journal)
        self.repairs: Counter[str] = Counter()
        self.to_settle = 0
        self.looks = 0  # at the kernel, for what is outside
        self._last_port = 0
        self.outside = OUTSIDE
        self.loop = Loop(
            store=self.store,
            tables=self.tables,
            devices=self.devices,
            repaired=lambda kind, count: self.repairs.update({kind: count}),
            settle=self.settle,
            outside=self._tell_outside,
            resync_seconds=resync_seconds,
            patience_seconds=patience_seconds,
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the loop; the first pass is over when the block begins."""
        self.loop.start()
        try:
            self.sync()
            yield
        finally:
            self.loop.stop()
            self.store.close()

    def _tell_outside(self, look: bool) -> Outside:
        self.looks += look
        return self.outside

    def settle(self) -> bool:
        """Do one of the things that can wait; say whether there are more."""
        if self.to_settle:
            self.to_settle -= 1
            self.journal.append(("settle", "hooks"))
        return self.to_settle > 0

    def sync(self) -> None:
        """Wait for a pass."""
        self.loop.sync(SECONDS)

    def full_pass(self) -> None:
        """Wait until the kernel has been read from the beginning, and what followed from it is done."""
        before = self.journal.count(("read", "endpoints"))
        self.wait_until(lambda: self.journal.count(("read", "endpoints")) > before)
        self.sync()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Poll until the condition holds."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            threading.Event().wait(0.002)

    def add(self, name: str, phase: Phase = Phase.ACTIVE) -> Pod:
        """Give a pod addresses and a device, as ADD does up to the given phase."""
        it = Attachment("net", name, "eth0")
        mac = "02:" + hashlib.sha256(name.encode()).digest()[:5].hex(":")
        device = f"pl-{name}"
        self._last_port += 1
        published = [Published(HostPort(ip_address("0.0.0.0"), self._last_port, 6), 80)]  # noqa: S104
        pod = self.store.reserve(
            it, device=device, mac=mac, mtu=1500, netns=Netns("/x", "4:1"), published=published, limits=LIMITS
        )
        self.store.assign(it, (), SUBNETS)
        pod = replace(pod, subnets=SUBNETS)
        self.devices.create(device)
        self.devices.create(shaper_of(device))
        if phase is not Phase.RESERVED:
            self.store.activate(it)
        if phase is Phase.RELEASING:
            self.store.begin_release(it)
        return pod

    def remove(self, pod: Pod) -> None:
        """Take a pod away as DEL does: with a device all that refers to it is gone, but not its endpoints."""
        self.store.begin_release(pod.attachment)
        index = self.devices.existing.pop(pod.device)
        shaper = self.devices.existing.pop(shaper_of(pod.device))
        for limited in (index, shaper):
            self.table("queues").objects.pop(limited, None)
        self.table("hooks").objects.pop(Hook(pod.device, "ingress"), None)
        self.table("hooks").objects.pop(Hook(pod.device, "egress"), None)
        for address in pod.addresses:
            self.table("neighbours").objects.pop(Neighbour(address, index), None)
            self.table("routes").objects.pop(address, None)
        for subnet in pod.subnets:
            assert subnet.gateway
            self.table("gateways").objects.pop(Gateway(subnet.gateway, index), None)
        self.sync()
        self.store.remove(pod.attachment)

    def table(self, name: str) -> MemoryTable[Any, Any]:
        """Return a table by its name."""
        table = getattr(self.tables, name)
        assert isinstance(table, MemoryTable)
        return table

    def actual(self) -> State:
        """Return all that the tables hold."""
        return State(**{name: dict(self.table(name).objects) for name in NAMES})

    def desired(self) -> State:
        """Return what the tables should hold."""
        pods = self.store.pods()
        indexes = self.devices.indexes(pods)
        subnets = routed_subnets(pods, self.outside.node_addresses)
        inside = Inside(subnets, self.devices.other_ends, self.devices.others_queues)
        return plan(pods, indexes, self.subnets, self.outside, inside)
