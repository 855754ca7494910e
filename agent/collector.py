"""Removes masqueraded flows that are over, since nothing else does: the datapath only ever adds.

A flow is two entries (bpf/masquerade.h), and packets may pass at any moment. So an entry is read again right before it
is deleted, and stays if it has changed. What remains is a packet, of a flow that was silent for its whole lifetime, in
the microsecond between these two calls. It finds half a flow. Either the datapath makes that whole; or it is done here:
if after the deletion of the second half the first one is there again, the second one is put back.
"""

from __future__ import annotations

import heapq
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Any

from agent.datapath.maps import Map
from agent.expiry import FlowStates, lifetimes, pauses
from agent.state import Address, KernelError, Settings

log = logging.getLogger(__name__)

_REST = 0.004  # seconds between batches, in which others get the interpreter: a pod that waits for its ADD
_RETRY = 5.0  # seconds after a scan that failed
# Scans. To look for owners that must not exist takes a system call for each: it costs more than all the rest.
_OWNERS_EVERY, _ORPHANS_EVERY = 4, 16
_CROWDED = 0.5  # of the owners' map: above it each scan looks, for the node's own traffic makes such owners as well
_NOEXIST = 1  # BPF_NOEXIST
# Above the first number of destinations, all but the busiest are forgotten. Those that matter have thousands of flows.
_DESTINATIONS, _KEPT_DESTINATIONS = 20_000, 2_000
_TOP = 10

Destination = tuple[bytes, int, int]
"""Address, port in network order, protocol: as they stand in a key."""


@dataclass(frozen=True)
class Census:
    """What the last scan left. Fill ratios are 0 to 1, of maps; destinations are those with the most ports in use."""

    flows: Mapping[int, int]
    """By protocol number."""
    fill: Mapping[str, float]
    """By map. Of `owners`, what was found when they were last counted."""
    destinations: Mapping[tuple[Address, int, int], int]
    """By address, port (0 where the protocol has none there) and protocol number."""


class Collector:
    """Scans the maps `flows` and `owners` in a thread of its own."""

    def __init__(
        self,
        *,
        flows: Map,
        owners: Map,
        settings: Settings,
        constants: Mapping[str, int],
        refused: Callable[[], int],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`constants` are the C's numeric macros, of which FLOW_* are the states.

        `refused` tells how many new flows have failed so far for want of ports or space: when it grows, it is time to
        look. It may raise KernelError. `clock` tells the time as bpf_ktime_get_coarse_ns does.
        """
        names = ("replied", "fin_out", "fin_in", "reset")
        self._lifetimes = lifetimes(settings, FlowStates(**{name: constants[f"FLOW_{name.upper()}"] for name in names}))
        self._ports = settings.last_port - settings.first_port + 1
        self._flows, self._owners = flows, owners
        self._tuple = flows.key.picker("source", "destination", "source_port", "destination_port", "protocol")
        self._destination = flows.key.picker("destination", "destination_port", "protocol")
        self._protocol = flows.key.picker("protocol")
        self._flow = flows.value.picker("address", "port")
        self._age = flows.value.picker("state", "seen")
        self._owner = owners.value.picker("address", "port")
        self._refused = refused
        self._clock = clock
        self._suspects: set[bytes] = set()
        self._fill: dict[str, float] = {}
        self._scans = _OWNERS_EVERY  # so that the first one, while the agent starts, does no search
        self.collected = {"flow": 0, "orphan": 0}
        """Entries collected so far: whole flows, and owners that had lost theirs."""
        self.census: Census | None = None
        """None until the first scan has seen all flows."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="collector", daemon=True)

    def start(self) -> None:
        """Start the thread; its first scan is at once."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the batch in hand."""
        self._stop.set()
        self._thread.join(timeout=1)

    def scan(self) -> None:
        """Go through all flows once, and through their owners every now and then. Raises KernelError."""
        flows: Counter[int] = Counter()
        destinations: Counter[Destination] = Counter()
        for keys, values in self._batches(self._flows):
            flows.update(protocol for (protocol,) in self._protocol.iter_unpack(keys))
            destinations.update(self._destination.iter_unpack(keys))
            collected = self._collect_expired(keys, values)
            flows.subtract(protocol for (protocol,) in self._protocol.iter_unpack(collected))
            destinations.subtract(self._destination.iter_unpack(collected))
            if len(destinations) > _DESTINATIONS:
                destinations = Counter(dict(destinations.most_common(_KEPT_DESTINATIONS)))
        self._take_census(flows, destinations)
        if self._scans % _OWNERS_EVERY == 0 or self._is_crowded():
            self._fill["owners"] = self._scan_owners() / self._owners.spec.max_entries
            self._take_census(flows, destinations)
        self._scans += 1

    def _take_census(self, flows: Counter[int], destinations: Counter[Destination]) -> None:
        self._fill["flows"] = flows.total() / self._flows.spec.max_entries
        self.census = Census(dict(+flows), dict(self._fill), _busiest(+destinations))

    def _run(self) -> None:
        trouble = ""
        while not self._stop.is_set():
            started = time.thread_time()
            try:
                self.scan()
                self._rest(*pauses(self._pressure(), time.thread_time() - started))
                trouble = ""
            except Exception as error:  # whatever it is, flows must go on being collected
                if str(error) != trouble:
                    log.error("cannot collect expired flows error=%r", str(error))
                trouble = str(error)
                self._stop.wait(_RETRY)

    def _rest(self, least: float, most: float) -> None:
        refused, until = self._refused(), time.monotonic() + most
        while not self._stop.wait(least) and time.monotonic() < until and self._refused() == refused:
            pass

    def _pressure(self) -> float:
        destinations = self.census.destinations if self.census else {}
        ports = max(destinations.values(), default=0) / self._ports
        return max(ports, *self._fill.values(), 0.0)

    def _is_crowded(self) -> bool:
        return self._fill.get("owners", 0.0) > _CROWDED

    def _batches(self, entries: Map) -> Iterator[tuple[bytes, bytes]]:
        for batch in entries.batches():
            yield batch
            if self._stop.wait(_REST):
                return

    def _collect_expired(self, keys: bytes, values: bytes) -> bytes:
        """Delete what is over; return the keys of that."""
        now = self._clock()
        rows = zip(self._protocol.iter_unpack(keys), self._age.iter_unpack(values), strict=True)
        expired = [
            number
            for number, ((protocol,), (state, seen)) in enumerate(rows)
            if now - seen > self._lifetimes[protocol][state] and seen  # 0: it is just being made
        ]
        collected = []
        for number in expired:
            key = _row(keys, number, self._flows.spec.key_size)
            value = _row(values, number, self._flows.spec.value_size)
            if self._flows.get_bytes(key) == value and self._flows.delete_bytes(key):
                self._delete_owner(self.answer(key, value), key)
                self.collected["flow"] += 1
                collected.append(key)
        return b"".join(collected)

    def _scan_owners(self) -> int:
        """Count the owners, and now and then collect those without a flow; return how many there are."""
        before, total, suspects = self.collected["orphan"], 0, set()
        searches = self._scans % _ORPHANS_EVERY == 0 or self._is_crowded()
        for keys, values in self._batches(self._owners):
            total += len(keys) // self._owners.spec.key_size
            if searches:
                suspects |= self._collect_orphans(keys, values)
        if searches:
            self._suspects = suspects
        return total - (self.collected["orphan"] - before)

    def _collect_orphans(self, keys: bytes, values: bytes) -> set[bytes]:
        """Delete the owners without a flow that the last time were so already; return those that now are."""
        suspects = set()
        rows = zip(self._tuple.iter_unpack(keys), self._owner.iter_unpack(values), strict=True)
        for number, (answer, owner) in enumerate(rows):
            flow = self._tuple.pack(*_question(answer, owner))
            if self._flows.contains_bytes(flow):
                continue
            key = _row(keys, number, self._owners.spec.key_size)
            if key not in self._suspects:
                suspects.add(key)
            elif self._delete_owner(key, flow):
                self.collected["orphan"] += 1
        return suspects

    def _delete_owner(self, key: bytes, flow_key: bytes) -> bool:
        """Delete the half that holds the port, unless the other half is there again; return whether it is gone."""
        value = self._owners.get_bytes(key)
        if value is None or self.question(key, value) != flow_key:
            return False  # somebody else's by now
        if self._flows.contains_bytes(flow_key):
            return False
        self._owners.delete_bytes(key)
        again = self._flows.get_bytes(flow_key)
        if again is not None and self.answer(flow_key, again) == key:
            self._restore_owner(key, value)
        return again is None

    def _restore_owner(self, key: bytes, value: bytes) -> None:
        try:
            self._owners.update_bytes(key, value, flags=_NOEXIST)
        except KernelError:
            log.debug("the datapath was faster to put an owner back")

    def answer(self, key: bytes, value: bytes) -> bytes:
        """Return the key in `owners` that belongs to an entry of `flows`."""
        _, outside, _, outside_port, protocol = self._tuple.unpack(key)
        node, node_port = self._flow.unpack(value)
        return self._tuple.pack(outside, node, outside_port, node_port, protocol)

    def question(self, key: bytes, value: bytes) -> bytes:
        """Return the key in `flows` that belongs to an entry of `owners`."""
        return self._tuple.pack(*_question(self._tuple.unpack(key), self._owner.unpack(value)))


def _question(answer: tuple[Any, ...], owner: tuple[Any, ...]) -> tuple[Any, ...]:
    outside, _, outside_port, _, protocol = answer
    return owner[0], outside, owner[1], outside_port, protocol


def _row(data: bytes, number: int, size: int) -> bytes:
    return data[number * size : (number + 1) * size]


def _busiest(destinations: Mapping[Destination, int]) -> dict[tuple[Address, int, int], int]:
    top = heapq.nlargest(_TOP, destinations.items(), key=lambda item: item[1])
    return {_destination(*destination): ports for destination, ports in top}


def _destination(packed: bytes, port: int, protocol: int) -> tuple[Address, int, int]:
    address = IPv6Address(packed)
    return address.ipv4_mapped or address, socket.ntohs(port), protocol
