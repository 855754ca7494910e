"""Running a program on a packet of our own, without a network: BPF_PROG_TEST_RUN."""

from __future__ import annotations

import ctypes
from ctypes import Structure, byref, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass

from . import libbpf

# What a program may add to a packet (it may push headers), in bytes.
_ROOM = 256


CHECKSUM_COMPLETE = 4
"""Flag: the kernel keeps the packet's sum, as for some network cards; a program that breaks it fails (EBADMSG)."""


class SkBuff(Structure):
    """struct __sk_buff (linux/bpf.h), the packet's context as programs see it.

    As input the kernel takes mark, priority, ifindex, ingress_ifindex, cb, tstamp, wire_len, gso_segs,
    gso_size and hwtstamp; the others must be zero. `ifindex` is one of the calling thread's network
    namespace; 0 means the loopback device.
    """

    _fields_ = [
        *((name, c_uint32) for name in ("len", "pkt_type", "mark", "queue_mapping", "protocol")),
        *((name, c_uint32) for name in ("vlan_present", "vlan_tci", "vlan_proto", "priority")),
        *((name, c_uint32) for name in ("ingress_ifindex", "ifindex", "tc_index")),
        ("cb", c_uint32 * 5),
        *((name, c_uint32) for name in ("hash", "tc_classid", "data", "data_end", "napi_id", "family")),
        *((name, c_uint32) for name in ("remote_ip4", "local_ip4")),
        *((name, c_uint32 * 4) for name in ("remote_ip6", "local_ip6")),
        *((name, c_uint32) for name in ("remote_port", "local_port", "data_meta")),
        *((name, c_uint64) for name in ("flow_keys", "tstamp")),
        *((name, c_uint32) for name in ("wire_len", "gso_segs")),
        ("sk", c_uint64),
        *((name, c_uint32) for name in ("gso_size", "tstamp_type")),
        ("hwtstamp", c_uint64),
    ]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of it: the program's return value, the packet and context it left, the mean time it took."""

    verdict: int
    packet: bytes
    context: SkBuff
    nanoseconds: int


class _Options(Structure):
    _fields_ = [
        ("sz", c_size_t),
        *((name, c_void_p) for name in ("data_in", "data_out")),
        *((name, c_uint32) for name in ("data_size_in", "data_size_out")),
        *((name, c_void_p) for name in ("ctx_in", "ctx_out")),
        *((name, c_uint32) for name in ("ctx_size_in", "ctx_size_out", "retval")),
        ("repeat", c_int),
        *((name, c_uint32) for name in ("duration", "flags", "cpu", "batch_size")),
    ]


def run(program: int, packet: bytes, *, context: SkBuff | None = None, repeat: int = 1, flags: int = 0) -> Result:
    """Run the program, given by descriptor, `repeat` times on an Ethernet frame of at least 14 bytes.

    The verdict is signed as TC_ACT_* are (TC_ACT_UNSPEC is -1). A redirect is only a verdict here: the packet
    goes nowhere. Raises KernelError.
    """
    before = context if context is not None else SkBuff()
    after = SkBuff()
    result = ctypes.create_string_buffer(len(packet) + _ROOM)
    given = ctypes.create_string_buffer(packet, len(packet))
    options = _Options(
        sz=ctypes.sizeof(_Options),
        data_in=ctypes.addressof(given),
        data_out=ctypes.addressof(result),
        data_size_in=len(packet),
        data_size_out=len(result),
        ctx_in=ctypes.addressof(before),
        ctx_out=ctypes.addressof(after),
        ctx_size_in=ctypes.sizeof(before),
        ctx_size_out=ctypes.sizeof(after),
        repeat=repeat,
        flags=flags,
    )
    code = libbpf.library().bpf_prog_test_run_opts(program, byref(options))
    libbpf.checked(code, "test-run program", f"on {len(packet)} bytes")
    return Result(
        verdict=c_int(options.retval).value,
        packet=result.raw[: options.data_size_out],
        context=after,
        nanoseconds=options.duration,
    )
