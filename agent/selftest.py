"""The proof that the datapath works, before the agent says so: a packet through attached programs and back.

A scratch namespace is attached as any pod is. It sends one packet to its own address by way of its gateway: if compiling,
loading, attaching, maps and redirection all work, the packet comes back with its TTL reduced by one.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from agent.netlink.netns import in_netns
from agent.wiring import HOST_MAC, pod_mac
from cni.call import Attachment
from cni.commands import Node
from cni.errors import CniError

_ATTACHMENT = Attachment("podlane", "podlane-selftest", "eth0")
_PATH = "/proc/self/ns/net"  # recorded, never opened: the scratch namespace has no name
_SECONDS = 1.0
_TTL = 64
_TEST_PROTOCOL = 253  # "for experimentation and testing" (RFC 3692)
_ETHERTYPES = {4: 0x0800, 6: 0x86DD}
_TTL_OFFSET = {4: 14 + 8, 6: 14 + 7}
_CLONE_NEWNET = 0x40000000


class SelfTestFailed(Exception):
    """The datapath does not carry packets; the message says what was seen."""


def self_test(node: Node) -> None:
    """Attach a scratch pod, send a packet, expect it back, detach. Raises SelfTestFailed."""
    try:
        with _scratch_netns() as netns:
            node.release(_ATTACHMENT)
            try:
                node.reserve(_ATTACHMENT, _PATH, netns, 0)
                result = node.connect(_ATTACHMENT, netns)
                address = result.addresses[0].ip.packed
                in_netns(netns, lambda: _exchange(address))
            finally:
                node.release(_ATTACHMENT)
    except OSError as error:
        raise SelfTestFailed(f"the scratch pod cannot send: {error.strerror}; is CAP_NET_RAW missing?") from error
    except CniError as error:
        raise SelfTestFailed(f"the scratch pod cannot be attached: {error.message} {error.details}".strip()) from error


@contextmanager
def _scratch_netns() -> Iterator[int]:
    """Make a network namespace that lives as long as this block."""
    descriptors: list[int] = []

    def make() -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) == 0:
            descriptors.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if not descriptors:
        raise SelfTestFailed("cannot make a network namespace: is CAP_SYS_ADMIN missing?")
    try:
        yield descriptors[0]
    finally:
        os.close(descriptors[0])


def _exchange(address: bytes) -> None:
    """In the scratch pod: send to ourselves through the gateway and wait for the packet's return."""
    family = 4 if len(address) == 4 else 6
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETHERTYPES[family])) as wire:
        wire.bind((_ATTACHMENT.ifname, _ETHERTYPES[family]))
        frame = _frame(family, address)
        wire.send(frame)
        deadline = time.monotonic() + _SECONDS
        while (left := deadline - time.monotonic()) > 0:
            wire.settimeout(left)
            try:
                received, sender = wire.recvfrom(2048)
            except TimeoutError:
                break
            if sender[2] != socket.PACKET_OUTGOING and received[-len(_PAYLOAD) :] == _PAYLOAD:
                return _judge(family, received)
    raise SelfTestFailed(f"no packet came back within {_SECONDS:g} s")


_PAYLOAD = b"podlane self-test"


def _frame(family: int, address: bytes) -> bytes:
    ethernet = _octets(HOST_MAC) + _octets(pod_mac(_ATTACHMENT)) + struct.pack("!H", _ETHERTYPES[family])
    if family == 6:
        header = struct.pack("!IHBB", 6 << 28, len(_PAYLOAD), _TEST_PROTOCOL, _TTL) + address + address
    else:
        size = 20 + len(_PAYLOAD)
        fields = struct.pack("!BBHHHBBH", 0x45, 0, size, 0, 0, _TTL, _TEST_PROTOCOL, 0) + address + address
        header = fields[:10] + struct.pack("!H", _checksum(fields)) + fields[12:]
    return ethernet + header + _PAYLOAD


def _checksum(header: bytes) -> int:
    """RFC 1071."""
    total: int = sum(struct.unpack(f"!{len(header) // 2}H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _judge(family: int, received: bytes) -> None:
    ttl = received[_TTL_OFFSET[family]]
    if ttl != _TTL - 1:
        raise SelfTestFailed(f"the packet came back with TTL {ttl}, not {_TTL - 1}")


def _octets(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))
