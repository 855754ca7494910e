"""Numbers and layouts of rtnetlink (linux/rtnetlink.h, if_link.h, if_addr.h, neighbour.h, pkt_cls.h)."""

from __future__ import annotations

import socket
import struct

from pyroute2.netlink import NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE

# How podlane marks its own routes and neighbours (`ip route show proto 112`), and its place among tc filters. Routes to
# other nodes have a number of their own, so that the kernel can leave them out where there are thousands.
PROTOCOL = 112
PEER_PROTOCOL = 111

FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}  # by IP version

ADD: int = NLM_F_CREATE | NLM_F_EXCL
CHANGE: int = NLM_F_REPLACE
PUT: int = NLM_F_CREATE | NLM_F_REPLACE

RT_TABLE_MAIN = 254
RTN_UNICAST, RTN_UNREACHABLE = 1, 7
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 0, 253

U32 = struct.Struct("=I")

# The fixed parts of messages, before their attributes.
LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type (ARPHRD_…), index, flags, change
ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix length, flags, scope, index
ROUTE = struct.Struct("=BBxxBBBBI")  # struct rtmsg: family, prefix length, table, protocol, scope, type, flags
NEIGHBOUR = struct.Struct("=BxxxiHBB")  # struct ndmsg: family, index, state, flags, type
FILTER = struct.Struct("=BxxxiIII")  # struct tcmsg: family, index, handle, parent, info
RULE = struct.Struct("=BBBxBxxBI")  # struct fib_rule_hdr: family, destination and source length, table, action, flags
NEXTHOP = struct.Struct("=HBBi")  # struct rtnexthop: length, flags, hops, index
NO_LINK = LINK.pack(0, 0, 0, 0, 0)  # one that its attributes name

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_LINKINFO, IFLA_IFALIAS = 1, 3, 4, 5, 18, 20
IFLA_AF_SPEC, IFLA_NET_NS_FD, IFLA_EXT_MASK, IFLA_LINK_NETNSID, IFLA_TARGET_NETNSID = 26, 28, 29, 37, 46
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
IFLA_VXLAN_LEARNING, IFLA_VXLAN_PORT, IFLA_VXLAN_COLLECT_METADATA = 7, 15, 25
IFA_ADDRESS, IFA_LOCAL, IFA_CACHEINFO, IFA_FLAGS = 1, 2, 6, 8
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC = 1, 4, 5, 6, 7
RTA_METRICS, RTA_MULTIPATH, RTA_TABLE, RTA_VIA = 8, 9, 15, 18
RTAX_LOCK, RTAX_MTU, RTAX_ADVMSS = 1, 2, 8
FRA_SRC, FRA_PRIORITY, FRA_TABLE, FRA_PROTOCOL = 2, 6, 15, 21
NDA_DST, NDA_LLADDR, NDA_PROTOCOL = 1, 2, 12
TCA_KIND, TCA_OPTIONS = 1, 2
TCA_BPF_FD, TCA_BPF_NAME, TCA_BPF_FLAGS, TCA_BPF_ID = 6, 7, 8, 11


def u32(value: bytes) -> int:
    """Return the number in a 32-bit attribute (device index, MTU, program id)."""
    return int(U32.unpack(value)[0])


def text(value: bytes) -> str:
    """Return the string in an attribute."""
    return value.rstrip(b"\0").decode(errors="replace")
