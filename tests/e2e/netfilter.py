"""Which packet filter tables a network namespace has, asked of the kernel itself: no nft or iptables is needed."""

from __future__ import annotations

import errno
import socket
import struct
from pathlib import Path

_NETLINK_NETFILTER = 12  # linux/netlink.h
_GET_TABLE = 10 << 8 | 1  # linux/netfilter/nfnetlink.h: NFNL_SUBSYS_NFTABLES; nf_tables.h: NFT_MSG_GETTABLE
_REQUEST_DUMP = 0x301  # linux/netlink.h: NLM_F_REQUEST | NLM_F_DUMP
_ERROR, _DONE = 2, 3  # linux/netlink.h: NLMSG_ERROR, NLMSG_DONE
_TABLE_NAME = 1  # linux/netfilter/nf_tables.h: NFTA_TABLE_NAME
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_FAMILY_HEADER = struct.Struct("=BBH")  # struct nfgenmsg
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr


def tables() -> list[str]:
    """Return the tables of iptables, ip6tables and nftables in the calling thread's network namespace.

    There is no rule without a table. Raises OSError if the kernel refuses to say.
    """
    legacy = [
        f"{tool} {name}"
        for tool, path in (("iptables", "ip_tables_names"), ("ip6tables", "ip6_tables_names"))
        for name in _lines(Path("/proc/thread-self/net") / path)
    ]
    return legacy + [f"nftables {name}" for name in _nftables()]


def _lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def _nftables() -> list[str]:
    names: list[str] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as kernel:
        size = _HEADER.size + _FAMILY_HEADER.size
        request = _HEADER.pack(size, _GET_TABLE, _REQUEST_DUMP, 1, 0) + _FAMILY_HEADER.pack(socket.AF_UNSPEC, 0, 0)
        kernel.send(request)
        while True:
            received = kernel.recv(1 << 16)
            while received:
                length, kind, *_ = _HEADER.unpack_from(received)
                message, received = received[_HEADER.size : length], received[length + -length % 4 :]
                if kind in (_ERROR, _DONE):
                    _check(message)
                    return names
                names += _table_names(message[_FAMILY_HEADER.size :])


def _check(message: bytes) -> None:
    (error,) = struct.unpack_from("=i", message)
    if error not in (0, -errno.EINVAL):  # EINVAL: this kernel has no nftables
        raise OSError(-error, "list nftables' tables")


def _table_names(attributes: bytes) -> list[str]:
    names = []
    while attributes:
        length, kind = _ATTRIBUTE.unpack_from(attributes)
        if kind == _TABLE_NAME:
            names.append(attributes[_ATTRIBUTE.size : length].rstrip(b"\0").decode())
        attributes = attributes[length + -length % 4 :]
    return names
