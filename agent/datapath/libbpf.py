"""The few calls of libbpf 1.x that the datapath needs, each raising an error that says what failed on what.

Descriptors are plain ints here; whoever asks for one closes it. `what` names the object in errors.
libbpf.so.1 is a dependency of bcc; it may be older than the kernel, whose newer constants are therefore
spelled out here.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..state import KernelError

SCHED_CLS = 3  # BPF_PROG_TYPE_SCHED_CLS, a program at a tc hook
CGROUP_SOCK_ADDR = 18  # BPF_PROG_TYPE_CGROUP_SOCK_ADDR, a program at calls on sockets
TCX_INGRESS, TCX_EGRESS = 46, 47  # enum bpf_attach_type, Linux 6.6
SOCKET_CALLS: Mapping[str, int] = {
    "connect4": 10,
    "connect6": 11,
    "sendmsg4": 14,
    "sendmsg6": 15,
    "recvmsg4": 19,
    "recvmsg6": 20,
    "getpeername4": 29,
    "getpeername6": 30,
}
"""The same for calls on sockets, BPF_CGROUP_INET4_CONNECT and so on; Linux 5.8 has them all."""
_FILESYSTEM_MAGIC = 0xCAFE4A11  # BPF_FS_MAGIC, linux/magic.h

# Room for the verifier's log (the kernel keeps the end of it since 6.4), and how much of it goes into a
# message.
_LOG_BYTES = 1 << 20
_LOG_LINES = 30


class BpfError(KernelError):
    """libbpf reported a failure; `errno` says which."""

    def __init__(self, operation: str, what: str, code: int, details: str = "") -> None:
        name = errno.errorcode.get(code, f"error {code}")
        super().__init__(f"{operation} {what}: {name} ({os.strerror(code)}){details}")
        self.errno = code


class _MapCreateOptions(Structure):
    _fields_ = [
        ("sz", c_size_t),
        ("btf_fd", c_uint32),
        ("btf_key_type_id", c_uint32),
        ("btf_value_type_id", c_uint32),
        ("btf_vmlinux_value_type_id", c_uint32),
        ("inner_map_fd", c_uint32),
        ("map_flags", c_uint32),
        ("map_extra", c_uint64),
        ("numa_node", c_uint32),
        ("map_ifindex", c_uint32),
    ]


class _ProgramLoadOptions(Structure):
    _fields_ = [
        ("sz", c_size_t),
        ("attempts", c_int),
        ("expected_attach_type", c_int),
        ("prog_btf_fd", c_uint32),
        ("prog_flags", c_uint32),
        ("prog_ifindex", c_uint32),
        ("kern_version", c_uint32),
        ("attach_btf_id", c_uint32),
        ("attach_prog_fd", c_uint32),
        ("attach_btf_obj_fd", c_uint32),
        ("fd_array", POINTER(c_int)),
        ("func_info", c_void_p),
        ("func_info_cnt", c_uint32),
        ("func_info_rec_size", c_uint32),
        ("line_info", c_void_p),
        ("line_info_cnt", c_uint32),
        ("line_info_rec_size", c_uint32),
        ("log_level", c_uint32),
        ("log_size", c_uint32),
        ("log_buf", c_char_p),
    ]


class _MapInfo(Structure):
    """The start of struct bpf_map_info; the kernel fills in as much as it is given room for."""

    _fields_ = [
        ("type", c_uint32),
        ("id", c_uint32),
        ("key_size", c_uint32),
        ("value_size", c_uint32),
        ("max_entries", c_uint32),
        ("map_flags", c_uint32),
    ]


class _ProgramInfo(Structure):
    """The start of struct bpf_prog_info."""

    _fields_ = [
        ("type", c_uint32),
        ("id", c_uint32),
        ("tag", ctypes.c_uint8 * 8),
        ("jited_prog_len", c_uint32),
        ("xlated_prog_len", c_uint32),
        ("jited_prog_insns", c_uint64),
        ("xlated_prog_insns", c_uint64),
        ("load_time", c_uint64),
        ("created_by_uid", c_uint32),
        ("nr_map_ids", c_uint32),
        ("map_ids", c_uint64),
    ]


class _LinkInfo(Structure):
    """The start of struct bpf_link_info, with the member of its union where links say what they are at."""

    _fields_ = [
        ("type", c_uint32),
        ("id", c_uint32),
        ("prog_id", c_uint32),
        ("padding", c_uint32),
        ("target", c_uint32),
    ]


@dataclass(frozen=True, slots=True)
class MapInfo:
    """What the kernel says of a map; sizes in bytes."""

    id: int
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int


@dataclass(frozen=True, slots=True)
class ProgramInfo:
    """What the kernel says of a program."""

    id: int
    map_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """What the kernel says of a link; `target` is the index of its device or the number of its cgroup, 0 if gone.

    Of the number of a cgroup, these are the lower 32 bits.
    """

    program_id: int
    target: int


@cache
def library() -> ctypes.CDLL:
    """Return libbpf itself, loaded on first use."""
    try:
        return ctypes.CDLL("libbpf.so.1")
    except OSError as error:
        raise KernelError(f"load libbpf: {error}: install the package libbpf1") from error


def checked(result: int, operation: str, what: str) -> int:
    """Return libbpf's result if it is one, else raise BpfError: libbpf 1.x returns negative error numbers."""
    if result < 0:
        raise BpfError(operation, what, -result)
    return result


def require_bpffs(path: Path) -> None:
    """Raise KernelError unless `path`, which need not exist yet, is on a bpf filesystem."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    libc = ctypes.CDLL(None, use_errno=True)
    answer = (ctypes.c_long * 32)()  # struct statfs is 120 bytes; its first member is f_type
    if libc.statfs(os.fsencode(existing), byref(answer)) != 0:
        raise BpfError("statfs", str(existing), ctypes.get_errno())
    if answer[0] != _FILESYSTEM_MAGIC:
        raise KernelError(
            f"pin to {path}: {existing} is not on a bpf filesystem; mount one: mount -t bpf bpf /sys/fs/bpf"
        )


def make_folder(path: Path) -> None:
    """Make a folder for pins, with its parents, unless it is there."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise KernelError(f"make the pin directory {path}: {error}") from error


@contextmanager
def closing(descriptor: int) -> Iterator[int]:
    """Close the descriptor at the end of the block."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def pin(descriptor: int, path: Path) -> None:
    """Pin a map, program or link: it stays in the kernel while the file exists."""
    checked(library().bpf_obj_pin(descriptor, os.fsencode(path)), "pin", str(path))


def open_pin(path: str | Path) -> int | None:
    """Return a descriptor of what is pinned at `path`, or None if nothing is."""
    descriptor: int = library().bpf_obj_get(os.fsencode(path))
    return None if descriptor == -errno.ENOENT else checked(descriptor, "open pin", str(path))


def map_create(what: str, kind: int, key_size: int, value_size: int, max_entries: int, flags: int) -> int:
    """Return a descriptor of a new map; `what` is its name (the kernel keeps 15 characters of it)."""
    options = _MapCreateOptions(sz=ctypes.sizeof(_MapCreateOptions), map_flags=flags)
    result = library().bpf_map_create(
        kind, what.encode(), c_uint32(key_size), c_uint32(value_size), c_uint32(max_entries), byref(options)
    )
    return checked(result, f"create map of {max_entries} entries,", what)


def program_load(what: str, instructions: bytes) -> int:
    """Return a descriptor of a new program; a refusal's error ends like the verifier's log.

    By its name it is for a call on sockets (`SOCKET_CALLS`), or else for tc hooks.
    """
    call = SOCKET_CALLS.get(what)
    log = ctypes.create_string_buffer(_LOG_BYTES)
    # libbpf loads without a log first and asks for one only if that fails: a log costs time.
    options = _ProgramLoadOptions(
        sz=ctypes.sizeof(_ProgramLoadOptions),
        expected_attach_type=call or 0,
        log_size=_LOG_BYTES,
        log_buf=ctypes.cast(log, c_char_p),
    )
    # The licence lets the program call the kernel's GPL-only helpers.
    kind = CGROUP_SOCK_ADDR if call else SCHED_CLS
    result = library().bpf_prog_load(
        kind, what.encode(), b"GPL", instructions, c_size_t(len(instructions) // 8), byref(options)
    )
    if result < 0:
        lines = log.value.decode(errors="replace").rstrip().splitlines()[-_LOG_LINES:]
        raise BpfError("load program", what, -result, "".join(f"\n{line}" for line in lines))
    return int(result)


def map_info(descriptor: int, what: str) -> MapInfo:
    """Return what the kernel says of a map."""
    info = _MapInfo()
    _fill(info, descriptor, what)
    return MapInfo(info.id, info.type, info.key_size, info.value_size, info.max_entries, info.map_flags)


def program_info(descriptor: int, what: str) -> ProgramInfo:
    """Return what the kernel says of a program."""
    counted = _ProgramInfo()
    _fill(counted, descriptor, what)
    ids = (c_uint32 * counted.nr_map_ids)()
    info = _ProgramInfo(nr_map_ids=counted.nr_map_ids, map_ids=ctypes.addressof(ids))
    _fill(info, descriptor, what)
    return ProgramInfo(info.id, frozenset(ids))


def link_info(descriptor: int, what: str) -> LinkInfo:
    """Return what the kernel says of a link."""
    info = _LinkInfo()
    _fill(info, descriptor, what)
    return LinkInfo(info.prog_id, info.target)


def _fill(info: Structure, descriptor: int, what: str) -> None:
    size = c_uint32(ctypes.sizeof(info))
    checked(library().bpf_obj_get_info_by_fd(descriptor, byref(info), byref(size)), "ask about", what)


def link_create(program: int, target: int, attach_type: int, what: str) -> int:
    """Return a descriptor of a new link: the program runs at the hook while the link is held or pinned.

    `target` is the index of a device, or the descriptor of a cgroup.
    """
    return checked(library().bpf_link_create(program, target, attach_type, None), "attach", what)


def link_update(link: int, program: int, what: str) -> None:
    """Make the link run another program from the next packet on; no packet goes without."""
    checked(library().bpf_link_update(link, program, None), "replace program at", what)


def link_detach(link: int, what: str) -> None:
    """Detach the link's program at once; to close or unpin the last reference does so a little later."""
    checked(library().bpf_link_detach(link), "detach", what)


def possible_cpus() -> int:
    """Return how many values a per-CPU map has for each key."""
    return checked(library().libbpf_num_possible_cpus(), "count", "possible CPUs")
