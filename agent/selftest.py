"""The proof that the datapath works, before the agent says so: a packet through attached programs and back.

A scratch namespace is attached as any pod is, but for an address from the ranges: an agent must get ready on a full
node too. It sends one packet to its own address by way of its gateway: if compiling, loading, attaching, maps and
redirection all work, the packet comes back with its TTL reduced by one.
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
from ipaddress import IPv4Address

from agent.loop import Loop
from agent.netlink.netns import in_netns
from agent.state import KernelError
from agent.store import Netns, Phase, Pod
from agent.wiring import HOST_MAC, Wiring, device_name, pod_mac
from cni.call import Attachment

_ATTACHMENT = Attachment("podlane", "podlane-selftest", "eth0")
_ADDRESS = IPv4Address("169.254.1.2")  # beside the gateway's: on no link but the scratch pod's own
_MTU = 1280
_SYNC_SECONDS = 20.0
_SECONDS = 1.0
_TTL = 64
_TEST_PROTOCOL = 253  # "for experimentation and testing" (RFC 3692)
_ETHERTYPE = 0x0800
_TTL_OFFSET = 14 + 8
_CLONE_NEWNET = 0x40000000


class SelfTestFailed(Exception):
    """The datapath does not carry packets; the message says what was seen."""


class ScratchPod:
    """A pod for one packet, in no store. Its phase keeps the loop from mending it."""

    def __init__(self, wiring: Wiring, loop: Loop) -> None:
        self._wiring = wiring
        self._loop = loop
        self._pod = Pod(
            attachment=_ATTACHMENT,
            device=device_name(_ATTACHMENT),
            mac=pod_mac(_ATTACHMENT),
            mtu=_MTU,
            netns=Netns("", ""),
            addresses=(_ADDRESS,),
            phase=Phase.RESERVED,
            boot_id="",
        )

    def test(self) -> None:
        """Attach the pod, send a packet, expect it back, detach. Raises SelfTestFailed."""
        try:
            with _scratch_netns() as netns:
                try:
                    with self._loop.guest(self._pod):
                        self._attach(netns)
                        in_netns(netns, _exchange)
                finally:
                    self._wiring.delete(self._pod.device)
                    self._loop.sync(_SYNC_SECONDS)
        except (KernelError, TimeoutError) as error:
            raise SelfTestFailed(f"the scratch pod cannot be attached: {error}") from error
        except OSError as error:
            raise SelfTestFailed(f"the scratch pod cannot send: {error.strerror}; is CAP_NET_RAW missing?") from error

    def _attach(self, netns: int) -> None:
        self._wiring.delete(self._pod.device)  # an earlier agent's, if it was killed at this
        self._wiring.create(self._pod, netns)
        self._loop.sync(_SYNC_SECONDS)
        self._loop.check(self._pod)
        self._wiring.configure(self._pod, netns)


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


def _exchange() -> None:
    """In the scratch pod: send to ourselves through the gateway and wait for the packet's return."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETHERTYPE)) as wire:
        wire.bind((_ATTACHMENT.ifname, _ETHERTYPE))
        wire.send(_frame())
        deadline = time.monotonic() + _SECONDS
        while (left := deadline - time.monotonic()) > 0:
            wire.settimeout(left)
            try:
                received, sender = wire.recvfrom(2048)
            except TimeoutError:
                break
            if sender[2] != socket.PACKET_OUTGOING and received[-len(_PAYLOAD) :] == _PAYLOAD:
                return _judge(received)
    raise SelfTestFailed(f"no packet came back within {_SECONDS:g} s")


_PAYLOAD = b"podlane self-test"


def _frame() -> bytes:
    address = _ADDRESS.packed
    ethernet = _octets(HOST_MAC) + _octets(pod_mac(_ATTACHMENT)) + struct.pack("!H", _ETHERTYPE)
    size = 20 + len(_PAYLOAD)
    header = struct.pack("!BBHHHBBH", 0x45, 0, size, 0, 0, _TTL, _TEST_PROTOCOL, 0) + address + address
    return ethernet + header[:10] + struct.pack("!H", _checksum(header)) + header[12:] + _PAYLOAD


def _checksum(header: bytes) -> int:
    """RFC 1071."""
    total: int = sum(struct.unpack(f"!{len(header) // 2}H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _judge(received: bytes) -> None:
    ttl = received[_TTL_OFFSET]
    if ttl != _TTL - 1:
        raise SelfTestFailed(f"the packet came back with TTL {ttl}, not {_TTL - 1}")


def _octets(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))
