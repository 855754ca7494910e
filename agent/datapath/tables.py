"""The datapath's tables as the agent's loop sees them: endpoints, hooks (by tcx links), outcome counters."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from ipaddress import IPv6Address
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..state import Address, Attached, Endpoint, Hook, KernelError
from . import libbpf
from .layout import Value
from .loader import Datapath
from .maps import Map

K = TypeVar("K")

_ATTACH_TYPES = {"ingress": libbpf.TCX_INGRESS, "egress": libbpf.TCX_EGRESS}

# `r0 = -1; exit`: the least program there is. -1 is TC_ACT_UNSPEC, "carry on".
_PASS = struct.pack("=BBhi", 0xB7, 0, 0, -1) + struct.pack("=BBhi", 0x95, 0, 0, 0)

# Interface indexes grow from 1; no device has ever come this far.
_NO_DEVICE = 0x7FFFFFFF


class Count(NamedTuple):
    """How often an outcome was counted, and the bytes of those packets."""

    packets: int
    bytes: int


def outcomes(datapath: Datapath) -> dict[str, Count]:
    """Return the outcome counters since the map was made, by the names that they have in the C."""
    totals = datapath.maps["outcomes"].sum(0)
    return {name: Count(**counter) for name, counter in totals.items()}


def tcx_supported() -> bool:
    """Return whether the kernel has tcx links (Linux 6.6): older ones do not know the attach type."""
    with libbpf.closing(libbpf.program_load("podlane_probe", _PASS)) as program:
        try:
            os.close(libbpf.link_create(program, _NO_DEVICE, libbpf.TCX_INGRESS, "nowhere"))
        except libbpf.BpfError as error:
            if error.errno in (errno.ENODEV, errno.EINVAL):
                return error.errno == errno.ENODEV
            raise
    return True


class EndpointTable:
    """The map `endpoints`: the local pods by address. All of its entries are podlane's."""

    def __init__(self, endpoints: Map) -> None:
        self._map = endpoints

    def read(self) -> dict[Address, Endpoint]:
        """Return all endpoints."""
        return {
            _address(key): Endpoint(ifindex=value["ifindex"], mac=value["mac"].hex(":"))
            for key, value in self._map.items()
        }

    def upsert(self, items: Mapping[Address, Endpoint]) -> dict[Address, KernelError]:
        """Create or replace endpoints; return the failures."""
        return _failures(items, lambda address: self._map.update(_key(address), _value(items[address])))

    def delete(self, keys: Iterable[Address]) -> dict[Address, KernelError]:
        """Delete endpoints; return the failures."""
        return _failures(keys, lambda address: self._map.delete(_key(address)))


class TcxHooks:
    """Programs at devices' hooks, by links pinned as `<pin dir>/links/<device>:<direction>`.

    The pin is what keeps the program attached, and what tells a restarted agent that the link is its own.
    """

    def __init__(self, datapath: Datapath, pin_dir: Path) -> None:
        self._programs = datapath.programs
        self._names = {identifier: name for name, identifier in datapath.program_ids.items()}
        self._links = pin_dir / "links"

    def read(self) -> dict[Hook, Attached]:
        """Return what runs where: program "stale:<id>" if none of ours, ifindex 0 if the device is gone."""
        attached: dict[Hook, Attached] = {}
        for pin in self._pins():
            path = f"{self._links}/{pin}"
            link = libbpf.open_pin(path)
            if link is not None:
                with libbpf.closing(link):
                    info = libbpf.link_info(link, path)
                program = self._names.get(info.program_id, f"stale:{info.program_id}")
                attached[_hook(pin)] = Attached(info.ifindex, program)
        return attached

    def upsert(self, items: Mapping[Hook, Attached]) -> dict[Hook, KernelError]:
        """Attach programs; one that replaces another does so between two packets. Return the failures."""
        return _failures(items, lambda hook: self._attach(hook, items[hook]))

    def delete(self, keys: Iterable[Hook]) -> dict[Hook, KernelError]:
        """Detach programs; return the failures."""
        return _failures(keys, self._detach)

    def _attach(self, hook: Hook, wanted: Attached) -> None:
        what = f"{wanted.program} at {hook.direction} of {hook.device} (index {wanted.ifindex})"
        program = self._programs.get(wanted.program)
        if program is None:
            raise KernelError(f"attach {what}: the datapath has no such program")
        pin = self._pin(hook)
        link = libbpf.open_pin(pin)
        if link is not None:
            with libbpf.closing(link):
                if libbpf.link_info(link, str(pin)).ifindex == wanted.ifindex:
                    libbpf.link_update(link, program, what)
                    return
        self._detach(hook)
        libbpf.make_folder(self._links)
        created = libbpf.link_create(program, wanted.ifindex, _ATTACH_TYPES[hook.direction], what)
        with libbpf.closing(created):
            libbpf.pin(created, pin)

    def _detach(self, hook: Hook) -> None:
        pin = self._pin(hook)
        link = libbpf.open_pin(pin)
        if link is None:
            return
        with libbpf.closing(link):
            libbpf.link_detach(link, str(pin))
        try:
            pin.unlink(missing_ok=True)
        except OSError as error:
            raise KernelError(f"unpin link {pin}: {error}") from error

    def _pins(self) -> list[str]:
        try:
            return [pin.name for pin in self._links.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise KernelError(f"list links: {error}") from error

    def _pin(self, hook: Hook) -> Path:
        # bpffs reserves dots, which device names may have ("eth0.100"); what they cannot have are "%" and ":".
        return self._links / f"{hook.device.replace('.', '%')}:{hook.direction}"


def _hook(pin_name: str) -> Hook:
    device, _, direction = pin_name.rpartition(":")
    return Hook(device.replace("%", "."), "ingress" if direction == "ingress" else "egress")


def _failures(keys: Iterable[K], operation: Callable[[K], object]) -> dict[K, KernelError]:
    failures: dict[K, KernelError] = {}
    for key in keys:
        try:
            operation(key)
        except KernelError as error:
            failures[key] = error
    return failures


def _key(address: Address) -> dict[str, bytes]:
    """Return the 128-bit form: an IPv4 address v4-mapped (RFC 4291 section 2.5.5.2)."""
    mapped = address if isinstance(address, IPv6Address) else IPv6Address(f"::ffff:{address}")
    return {"word": mapped.packed}


def _address(key: Value) -> Address:
    address = IPv6Address(struct.pack("=4I", *key["word"]))
    return address.ipv4_mapped or address


def _value(endpoint: Endpoint) -> dict[str, object]:
    return {"ifindex": endpoint.ifindex, "mac": bytes.fromhex(endpoint.mac.replace(":", ""))}
