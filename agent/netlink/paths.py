"""What the kernel has learnt about the ways to single addresses."""

from __future__ import annotations

import ipaddress

from pyroute2.netlink.rtnl import RTM_GETROUTE, RTM_NEWROUTE
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from agent.netlink.channel import attributes, dump, request
from agent.netlink.rtnl import FAMILY, ROUTE, RTA_DST, RTA_METRICS, RTAX_MTU, u32
from agent.netlink.sysctl import ipv6_present
from agent.state import Address

RTM_F_CLONED = 0x200  # linux/rtnetlink.h


def path_mtus() -> dict[Address, int]:
    """Return the path MTUs, in bytes, that routers have told of by IPv6 (RFC 8201), by destination. Raises KernelError.

    Over IPv4 they are not asked to, as long as packets may be fragmented on their way.
    """
    found: dict[Address, int] = {}
    if not ipv6_present():
        return found
    # ip -6 route show cache
    fields = {"family": FAMILY[6], "flags": RTM_F_CLONED}
    for answer in dump(request("list path MTUs", rtmsg, RTM_GETROUTE, fields=fields)):
        _, _, _, _, _, _, flags = ROUTE.unpack_from(answer.body)
        if answer.type == RTM_NEWROUTE and flags & RTM_F_CLONED:
            route = attributes(answer.body, ROUTE.size)
            metrics = attributes(route.get(RTA_METRICS, b""), 0)
            if RTA_DST in route and RTAX_MTU in metrics:
                found[ipaddress.ip_address(route[RTA_DST])] = u32(metrics[RTAX_MTU])
    return found
