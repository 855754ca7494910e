"""Limits on what pods receive and send: token buckets (tbf), and the devices through whose queue a pod sends (ifb).

A pod's own traffic comes in at its host end, where the kernel has no queue. So it is sent through a device of its own
(`bpf/shaping.h`), which hands it back.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Mapping

from pyroute2.netlink import NLM_F_CREATE, NLM_F_REQUEST
from pyroute2.netlink.rtnl import RTM_DELQDISC, RTM_GETQDISC, RTM_NEWLINK, RTM_NEWQDISC, TC_H_ROOT
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from agent.netlink import sysctl
from agent.netlink.channel import ATTRIBUTE, HEADER, Request, attributes, dump, each, perform, request
from agent.netlink.devices import delete_device, own_links
from agent.netlink.pods import set_link, up
from agent.netlink.rtnl import ADD, FILTER, TCA_KIND, TCA_OPTIONS, text
from agent.state import KernelError, Queue

HANDLE = 0x706C0000  # "pl": how a restarted agent recognises its own queues (`tc qdisc show`: 706c:)

# linux/pkt_sched.h
TCA_TBF_PARMS, TCA_TBF_RATE64, TCA_TBF_BURST = 1, 4, 6
TC_LINKLAYER_ETHERNET = 1
# struct tc_tbf_qopt: two tc_ratespec (linklayer, overhead, cell_align, mpu, rate), limit, buffer and mtu
PARAMETERS = struct.Struct("=xBHhHI12sIII")
U32, U64 = struct.Struct("=I"), struct.Struct("=Q")

GONE = (errno.ENOENT, errno.ENODEV, errno.EINVAL)  # EINVAL: the device has another root qdisc


def create_shaper(name: str, mtu: int, alias: str) -> None:
    """Make a shaper, up and without a limit. Raises KernelError; then nothing is left behind."""
    # ip link add NAME mtu MTU type ifb
    kind = {"attrs": [("IFLA_INFO_KIND", "ifb")]}
    values = [("IFLA_IFNAME", name), ("IFLA_MTU", mtu), ("IFLA_LINKINFO", kind)]
    perform([request(f"create ifb {name}", ifinfmsg, RTM_NEWLINK, ADD, attributes=values)])
    try:
        # Nobody speaks IPv6 there; and not in one batch with the above, as with veth pairs.
        if sysctl.ipv6_present():
            sysctl.ensure(f"net/ipv6/conf/{name}/disable_ipv6", "1")
        perform([set_link(name, mtu, [("IFLA_IFALIAS", alias)]), up(name)])
    except KernelError:
        delete_device(name)
        raise


def raise_shaper(name: str) -> None:
    """Set a shaper up. Raises KernelError."""
    perform([up(name)])


def shapers() -> dict[str, int]:
    """Return podlane's shapers, name to index. Raises KernelError."""
    return {link.name: link.index for link in own_links("ifb")}


class QueueTable:
    """`Table[int, Queue]`: the queues that are limited, by the index of their device. Others' qdiscs are left alone."""

    def read(self) -> dict[int, Queue]:
        """Return podlane's own queues. Raises KernelError."""
        # tc qdisc show
        found = {}
        for answer in dump(request("list qdiscs", tcmsg, RTM_GETQDISC)):
            _, number, handle, parent, _ = FILTER.unpack_from(answer.body)
            if answer.type == RTM_NEWQDISC and (handle, parent) == (HANDLE, TC_H_ROOT):
                values = attributes(answer.body, FILTER.size)
                if text(values.get(TCA_KIND, b"")) == "tbf":
                    found[number] = _decode(attributes(values[TCA_OPTIONS], 0))
        return found

    def upsert(self, items: Mapping[int, Queue]) -> dict[int, KernelError]:
        """Create queues or change their limits; return the failures, as where somebody else's qdisc is."""
        return each(list(items), [_put(*item) for item in items.items()])

    def delete(self, keys: Iterable[int]) -> dict[int, KernelError]:
        """Delete queues, and with them what waits there; one already gone, with its device or without, is deleted."""
        keys = list(keys)
        return each(keys, [_delete(key) for key in keys])


def _put(number: int, queue: Queue) -> Request:
    """Without NLM_F_REPLACE: it changes the queue with this handle, but takes no other's place."""
    # tc qdisc add dev DEVICE root handle 706c: tbf rate RATE burst BURST limit LIMIT
    rate = min(queue.rate, 0xFFFFFFFF)
    options = _attribute(
        TCA_TBF_PARMS, PARAMETERS.pack(TC_LINKLAYER_ETHERNET, 0, 0, 0, rate, bytes(12), queue.limit, 0, 0)
    )
    options += _attribute(TCA_TBF_BURST, U32.pack(queue.burst))
    if queue.rate > rate:
        options += _attribute(TCA_TBF_RATE64, U64.pack(queue.rate))
    entry = _attribute(TCA_KIND, b"tbf\0") + _attribute(TCA_OPTIONS, options)
    what = f"limit device {number} to {queue.rate} bytes/s"
    return _request(what, RTM_NEWQDISC, NLM_F_CREATE, number, entry)


def _delete(number: int) -> Request:
    # tc qdisc delete dev DEVICE root handle 706c:
    return _request(f"take the limit from device {number}", RTM_DELQDISC, 0, number, b"", tolerated=GONE)


def _request(
    what: str, kind: int, flags: int, number: int, entry: bytes, *, tolerated: tuple[int, ...] = ()
) -> Request:
    """Build the request by hand: pyroute2 knows neither of the two attributes that go beyond 32 bits and 274 s."""
    body = FILTER.pack(0, number, HANDLE, TC_H_ROOT, 0) + entry
    return Request(what, HEADER.pack(HEADER.size + len(body), kind, NLM_F_REQUEST | flags, 0, 0) + body, tolerated)


def _attribute(kind: int, value: bytes) -> bytes:
    return ATTRIBUTE.pack(ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def _decode(options: dict[int, bytes]) -> Queue:
    """Return the queue. The kernel does not tell the burst: it is what the limit has beyond the latency."""
    _, _, _, _, rate, _, limit, _, _ = PARAMETERS.unpack_from(options[TCA_TBF_PARMS])
    if TCA_TBF_RATE64 in options:
        (rate,) = U64.unpack(options[TCA_TBF_RATE64])
    return Queue.of_limit(rate, limit)
