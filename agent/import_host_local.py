"""Takes over the addresses that host-local gave, so that a node changes plugin without being drained.

host-local keeps a directory per network, /var/lib/cni/networks/NAME: a file per address, called by it, with container
and interface in two lines; `last_reserved_ip.N` for the N-th range set; `lock`. Each container becomes an attachment in
phase IMPORTED, whose addresses nobody else gets, until DEL, GC or a reboot.

Nothing in the directory is changed, and neither side sees what the other gives afterwards: while some calls still reach
host-local, both may give the same address. So import, put podlane into the network configuration, and import again: the
second time takes over what came in between.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from pathlib import Path

from agent.files import read_regular
from agent.state import Address
from agent.store import AddressTaken, AttachmentExists, Netns, Phase, Pod, Store
from agent.wiring import device_name, pod_mac
from cni.call import Attachment

_LOCK = "lock"
_LAST = re.compile(r"last_reserved_ip\.(\d+)")
_CONTAINER = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
_IFNAME = re.compile(r"[^/:\s]{1,15}")
_MAX_BYTES = 4096  # far above any container id with an interface name


class ImportRefused(Exception):
    """A directory cannot be taken over; the message names the file, and what is wrong. Nothing has been changed."""


@dataclass
class Found:
    """What a directory holds. `last_given` is by number of range set; `notes` tell what is left out, and why."""

    addresses: dict[Attachment, list[Address]] = field(default_factory=dict)
    last_given: dict[int, Address] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def import_directory(directory: Path, network: str, ifname: str, store: Store) -> list[str]:
    """Take over a directory for a network; return lines that tell what was done.

    `ifname` is the interface of entries without one, as old versions of host-local left them. May be done again, also
    while the agent runs. Raises ImportRefused and StoreError.
    """
    if not directory.is_dir():
        raise ImportRefused(f"{directory} is not a directory")
    with _locked(directory):
        found = read_directory(directory, network, ifname)
        pods = [_pod(attachment, addresses, store.boot_id) for attachment, addresses in found.addresses.items()]
        last_given = {f"{network}/{index}": address for index, address in found.last_given.items()}
        try:
            adopted = store.adopt(pods, last_given)
        except (AddressTaken, AttachmentExists) as error:
            raise ImportRefused(f"{directory}: {error}; nothing was imported") from error
    return [
        *found.notes,
        *(f"imported {pod.attachment} with {', '.join(map(str, pod.addresses))}" for pod in adopted),
        f"{directory}: {len(pods)} attachments found, {len(adopted)} imported; others are known, or released since",
    ]


def read_directory(directory: Path, network: str, ifname: str) -> Found:
    """Read a directory of host-local's. Raises ImportRefused."""
    found = Found()
    try:
        paths = sorted(directory.iterdir())
    except OSError as error:
        raise ImportRefused(f"cannot read {directory}: {error.strerror}") from error
    for path in paths:
        if path.name != _LOCK:
            _read_file(path, network, ifname, found)
    return found


def _read_file(path: Path, network: str, ifname: str, found: Found) -> None:
    try:
        text = read_regular(path, _MAX_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ImportRefused(f"cannot read {path}: {error}") from error
    last = _LAST.fullmatch(path.name)
    if last:
        try:
            found.last_given[int(last[1])] = _address(text)
        except ValueError:  # host-local, too, then begins at the start
            found.notes.append(f"{path}: no address in it, not imported")
        return
    try:
        address = _address(path.name)
    except ValueError as error:
        raise ImportRefused(f"{path}: not a file of host-local's: its name is no address ({error})") from error
    if not text:
        found.notes.append(f"{path}: empty, from an ADD that was killed; not imported")
        return
    found.addresses.setdefault(_attachment(path, text, network, ifname), []).append(address)


def _attachment(path: Path, text: str, network: str, ifname: str) -> Attachment:
    lines = text.splitlines()
    container = lines[0].strip()
    ifname = lines[1].strip() if len(lines) > 1 else ifname
    if len(lines) > 2 or not _CONTAINER.fullmatch(container) or not _IFNAME.fullmatch(ifname):
        raise ImportRefused(f"{path}: {text!r} is not a container id, or one with an interface name in a second line")
    return Attachment(network, container, ifname)


def _address(text: str) -> Address:
    address = ip_address(text)
    if isinstance(address, IPv6Address) and (address.ipv4_mapped or address.scope_id):
        raise ValueError(f"{text} is of no pod")
    return address


def _pod(attachment: Attachment, addresses: list[Address], boot_id: str) -> Pod:
    """Return the attachment as the store keeps it; the device is one that podlane would make, and has not made."""
    return Pod(
        attachment=attachment,
        device=device_name(attachment),
        mac=pod_mac(attachment),
        mtu=0,
        netns=Netns("", ""),
        addresses=tuple(sorted(addresses, key=lambda each: (each.version, each.packed))),
        phase=Phase.IMPORTED,
        boot_id=boot_id,
    )


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep host-local from changing the directory. Raises ImportRefused.

    Versions before 0.7 locked the directory itself.
    """
    lock = directory / _LOCK
    try:
        descriptor = os.open(lock if lock.exists() else directory, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ImportRefused(f"cannot lock {directory}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
