"""The node's addresses towards its pods: a gateway's, on the host end of each pod that has it.

There, and not on one device for all pods, because an address goes with its device: whose it is, and whether somebody
still needs it, is never a question. The plugin ptp has them in the same place.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Mapping

from pyroute2.netlink.rtnl import RTM_DELADDR, RTM_NEWADDR

from agent.netlink.channel import Request, each
from agent.netlink.encode import Attributes, message
from agent.netlink.rtnl import (
    ADDRESS,
    FAMILY,
    IFA_ADDRESS,
    IFA_CACHEINFO,
    IFA_FLAGS,
    IFA_LOCAL,
    PUT,
    RT_SCOPE_LINK,
    RT_SCOPE_UNIVERSE,
)
from agent.netlink.uplinks import assigned_addresses, on_host_ends
from agent.state import Gateway, KernelError

# linux/if_addr.h. No duplicate address detection, and no route to the address but the local one.
IFA_F_NODAD, IFA_F_NOPREFIXROUTE = 0x02, 0x200
FOREVER = 0xFFFFFFFF  # seconds
# struct ifa_cacheinfo, in seconds: preferred for none, valid for ever, and two times that the kernel tells.
NEVER_PREFERRED = struct.pack("=IIII", 0, FOREVER, 0, 0)


class GatewayTable:
    """`Table[Gateway, int]`: all addresses on pods' host ends that are alone in their subnet. The values are 1."""

    def read(self) -> dict[Gateway, int]:
        """Return what there is. Raises KernelError."""
        return {Gateway(each.address, each.device): 1 for each in on_host_ends(assigned_addresses())}

    def upsert(self, items: Mapping[Gateway, int]) -> dict[Gateway, KernelError]:
        """Assign the given addresses; return the failures."""
        return each(list(items), [_add(key) for key in items])

    def delete(self, keys: Iterable[Gateway]) -> dict[Gateway, KernelError]:
        """Remove the given addresses; one already gone, with its device or without, counts as removed."""
        keys = list(keys)
        return each(keys, [_delete(key) for key in keys])


def _add(key: Gateway) -> Request:
    """Assign an address that the node never takes as its own by itself, but only towards this pod.

    That is what an IPv4 address of link scope is (net/ipv4/devinet.c, inet_select_addr), and a deprecated IPv6 address
    (RFC 6724 section 5, rule 3): the route to the pod names it as the source.
    """
    # ip address replace ADDRESS dev HOST scope link; ip address replace ADDRESS dev HOST nodad noprefixroute
    # preferred_lft 0
    scope = RT_SCOPE_LINK if key.address.version == 4 else RT_SCOPE_UNIVERSE
    entry: Attributes = [(IFA_LOCAL, key.address), (IFA_ADDRESS, key.address)]
    if key.address.version == 6:
        entry = [*entry, (IFA_CACHEINFO, NEVER_PREFERRED), (IFA_FLAGS, IFA_F_NODAD | IFA_F_NOPREFIXROUTE)]
    return message(f"add address {key.address} to device {key.ifindex}", RTM_NEWADDR, PUT, _body(key, scope), entry)


def _delete(key: Gateway) -> Request:
    # ip address delete ADDRESS dev HOST
    gone = (errno.ENODEV, errno.EADDRNOTAVAIL)
    what = f"delete address {key.address} from device {key.ifindex}"
    return message(what, RTM_DELADDR, 0, _body(key, 0), [(IFA_LOCAL, key.address)], tolerated=gone)


def _body(key: Gateway, scope: int) -> bytes:
    return ADDRESS.pack(FAMILY[key.address.version], key.address.max_prefixlen, 0, scope, key.ifindex)
