"""The datapath's maps that the agent writes, as tables of the agent's own types. All of their entries are podlane's."""

from __future__ import annotations

import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict
from ipaddress import IPv4Address, IPv6Address
from typing import ClassVar, Generic, TypeVar

from ..state import Address, Endpoint, HostPort, KernelError, Lanes, PodPort, Prefix, Settings, Sources, TunnelEnd
from .layout import Value
from .maps import Map

K = TypeVar("K")
V = TypeVar("V")

_NOBODY = {"word": bytes(16)}


class MapTable(ABC, Generic[K, V]):
    """`Table[K, V]` by a map; subclasses say how keys and values stand in it."""

    KEEPS_KEYS: ClassVar[bool] = True
    """Whether keys are decoded once only."""

    def __init__(self, entries: Map) -> None:
        self._map = entries
        self._keys: dict[bytes, K] = {}  # as they stand in the map
        self._values: dict[bytes, V] = {}

    def read(self) -> dict[K, V]:
        """Return all entries."""
        known_keys, self._keys = self._keys, {}
        known_values, self._values = self._values, {}
        found: dict[K, V] = {}
        for raw_key, raw_value in self._map.items_bytes():
            key = known_keys.get(raw_key)
            if key is None:
                key = self._key(raw_key)
            if self.KEEPS_KEYS:
                self._keys[raw_key] = key
            if raw_value not in self._values:
                value = known_values.get(raw_value)
                self._values[raw_value] = self._value(self._map.value.decode(raw_value)) if value is None else value
            found[key] = self._values[raw_value]
        return found

    def upsert(self, items: Mapping[K, V]) -> dict[K, KernelError]:
        """Create or replace entries; return the failures."""
        return failures(items, lambda key: self._write(key, items[key]))

    def delete(self, keys: Iterable[K]) -> dict[K, KernelError]:
        """Delete entries; return the failures."""
        return failures(keys, lambda key: self._map.delete(self._raw_key(key)))

    def _write(self, key: K, value: V) -> None:
        raw_key = self._map.key.encode(self._raw_key(key))
        raw_value = self._map.value.encode(self._entry(key, raw_key, value))
        self._map.update_bytes(raw_key, raw_value)
        # So `read` returns this very object, or one that is equal: comparing by identity is twenty times as fast.
        self._values[raw_value] = value

    def _entry(self, _key: K, _raw_key: bytes, value: V) -> Value:
        """Return what is to stand in the map, with what there is not the agent's."""
        return self._raw_value(value)

    @abstractmethod
    def _key(self, raw: bytes) -> K: ...

    @abstractmethod
    def _value(self, raw: Value) -> V: ...

    @abstractmethod
    def _raw_key(self, key: K) -> Value: ...

    @abstractmethod
    def _raw_value(self, value: V) -> Value: ...


class EndpointTable(MapTable[Address, Endpoint]):
    """The map `endpoints`: the local pods by address.

    What the programs note in `via_stack` is kept: a pod that lost it would answer past the stack to those who have come
    through it, by a service's address, and they would reset the connection.
    """

    def __init__(self, entries: Map, former: Collection[Address] = ()) -> None:
        """`former` are the addresses that pods had before; who has no entry, as in a new map, may have had the note."""
        super().__init__(entries)
        self._former = set(former)

    def delete(self, keys: Iterable[Address]) -> dict[Address, KernelError]:
        """Delete entries: who has the address next, is another pod. Return the failures."""
        keys = list(keys)
        self._former.difference_update(keys)
        return super().delete(keys)

    def _entry(self, key: Address, raw_key: bytes, value: Endpoint) -> Value:
        found = self._map.get_bytes(raw_key)
        via_stack = self._map.value.decode(found)["via_stack"] if found else key in self._former
        return {**self._raw_value(value), "via_stack": int(via_stack)}

    def _key(self, raw: bytes) -> Address:
        return to_address(self._map.key.decode(raw))

    def _value(self, raw: Value) -> Endpoint:
        return Endpoint(
            raw["ifindex"],
            raw["mac"].hex(":"),
            native=bool(raw["native"]),
            network=raw["network"],
            shaper=raw["shaper"],
            queued=bool(raw["queued"]),
            serves=bool(raw["serves"]),
        )

    def _raw_key(self, key: Address) -> Value:
        return from_address(key)

    def _raw_value(self, value: Endpoint) -> Value:
        return {**asdict(value), "mac": bytes.fromhex(value.mac.replace(":", ""))}


class UplinkTable(MapTable[int, Sources]):
    """The map `uplinks`: the devices that lead out, by index."""

    def _key(self, raw: bytes) -> int:
        return int(self._map.key.decode(raw))

    def _value(self, raw: Value) -> Sources:
        return to_sources(raw)

    def _raw_key(self, key: int) -> Value:
        return key

    def _raw_value(self, value: Sources) -> Value:
        return from_sources(value)


class AddressTable(MapTable[Address, int]):
    """The map `node_addresses`: a set."""

    def _key(self, raw: bytes) -> Address:
        return to_address(self._map.key.decode(raw))

    def _value(self, raw: Value) -> int:
        return int(raw)

    def _raw_key(self, key: Address) -> Value:
        return from_address(key)

    def _raw_value(self, value: int) -> Value:
        return value


class HostPortTable(MapTable[HostPort, PodPort]):
    """The map `host_ports`."""

    def _key(self, raw: bytes) -> HostPort:
        key = self._map.key.decode(raw)
        return HostPort(to_address(key["address"]), socket.ntohs(key["port"]), key["protocol"])

    def _value(self, raw: Value) -> PodPort:
        return PodPort(to_address(raw["address"]), socket.ntohs(raw["port"]))

    def _raw_key(self, key: HostPort) -> Value:
        return {"address": from_address(key.address), "port": socket.htons(key.port), "protocol": key.protocol}

    def _raw_value(self, value: PodPort) -> Value:
        return {"address": from_address(value.address), "port": socket.htons(value.port)}


class TunnelTable(MapTable[int, TunnelEnd]):
    """The map `tunnels`: the tunnel's device, by index."""

    def _key(self, raw: bytes) -> int:
        return int(self._map.key.decode(raw))

    def _value(self, raw: Value) -> TunnelEnd:
        sources = to_sources(raw)
        return TunnelEnd(raw["vni"], raw["mtu"], raw["mac"].hex(":"), sources.ipv4, sources.ipv6)

    def _raw_key(self, key: int) -> Value:
        return key

    def _raw_value(self, value: TunnelEnd) -> Value:
        mac = bytes.fromhex(value.mac.replace(":", ""))
        return {"vni": value.vni, "mtu": value.mtu, "mac": mac, **from_sources(Sources(value.ipv4, value.ipv6))}


class PrefixTable(MapTable[Prefix, Lanes]):
    """The map `prefixes`; `native`, `stack` and `node` are the bits that lanes have in it."""

    KEEPS_KEYS = False  # to decode one takes no longer than to find it, and there may be thousands

    def __init__(self, entries: Map, *, native: int, stack: int, node: int) -> None:
        super().__init__(entries)
        self._packed = entries.key.picker("length", "address")
        self._native = native
        self._stack = stack
        self._node = node

    def _key(self, raw: bytes) -> Prefix:
        length, address = self._packed.unpack(raw)
        return Prefix.pack(address, length)

    def _value(self, raw: Value) -> Lanes:
        peer = to_address(raw["peer"])
        return Lanes(
            native=bool(raw["kind"] & self._native),
            stack=bool(raw["kind"] & self._stack),
            peer=peer if int(peer) else None,
            node=bool(raw["kind"] & self._node),
            tunnel=raw["tunnel"],
            mtu=raw["mtu"],
        )

    def _raw_key(self, key: Prefix) -> Value:
        return {"length": key[16], "address": {"word": key[:16]}}

    def _raw_value(self, value: Lanes) -> Value:
        return {
            "peer": from_address(value.peer) if value.peer else _NOBODY,
            "tunnel": value.tunnel,
            "mtu": value.mtu,
            "kind": value.native * self._native | value.stack * self._stack | value.node * self._node,
        }


class SettingsTable(MapTable[int, Settings]):
    """The map `settings`: an array of one; `other_protocols` are the numbers that its choices have in it."""

    def __init__(self, entries: Map, *, other_protocols: Mapping[str, int]) -> None:
        super().__init__(entries)
        self._numbers = other_protocols
        self._names = {number: name for name, number in other_protocols.items()}

    def _key(self, raw: bytes) -> int:
        return int(self._map.key.decode(raw))

    def _value(self, raw: Value) -> Settings:
        other = self._names.get(raw["other_protocols"], f"unknown:{raw['other_protocols']}")
        known = {name: number for name, number in raw.items() if name != "reserved"}
        return Settings(**{**known, "other_protocols": other, "stack_routes": bool(raw["stack_routes"])})

    def _raw_key(self, key: int) -> Value:
        return key

    def _raw_value(self, value: Settings) -> Value:
        return {**asdict(value), "other_protocols": self._numbers[value.other_protocols]}


def failures(keys: Iterable[K], operation: Callable[[K], object]) -> dict[K, KernelError]:
    """Do it for each key; return the refusals."""
    refused: dict[K, KernelError] = {}
    for key in keys:
        try:
            operation(key)
        except KernelError as error:
            refused[key] = error
    return refused


def from_address(address: Address) -> Value:
    """Return the C's `struct addr`: 128 bits, an IPv4 address v4-mapped (RFC 4291 section 2.5.5.2)."""
    mapped = address if isinstance(address, IPv6Address) else IPv6Address(f"::ffff:{address}")
    return {"word": mapped.packed}


def to_address(raw: Value) -> Address:
    """Return the address in a decoded `struct addr`."""
    address = IPv6Address(struct.pack("=4I", *raw["word"]))
    return address.ipv4_mapped or address


def from_sources(sources: Sources) -> dict[str, Value]:
    """Return the fields `ipv4` and `ipv6` of a C struct."""
    return {
        "ipv4": from_address(sources.ipv4) if sources.ipv4 else _NOBODY,
        "ipv6": from_address(sources.ipv6) if sources.ipv6 else _NOBODY,
    }


def to_sources(raw: Value) -> Sources:
    """Return what is in those fields."""
    ipv4, ipv6 = to_address(raw["ipv4"]), to_address(raw["ipv6"])
    return Sources(
        ipv4=ipv4 if isinstance(ipv4, IPv4Address) else None,
        ipv6=ipv6 if isinstance(ipv6, IPv6Address) and int(ipv6) else None,
    )
