"""Limits on what pods receive and send: token buckets (tbf), and the devices through whose queue a pod sends (ifb).

A pod's own traffic comes in at its host end, where the kernel has no queue. So it is sent through a device of its own
(`bpf/shaping.h`), which hands it back.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Iterator, Mapping

from pyroute2.netlink import NLM_F_CREATE
from pyroute2.netlink.rtnl import RTM_DELQDISC, RTM_GETQDISC, RTM_NEWLINK, RTM_NEWQDISC, TC_H_ROOT
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from agent.netlink import sysctl
from agent.netlink.channel import Request, attributes, dump, each, perform, request
from agent.netlink.devices import delete_device, own_links
from agent.netlink.encode import Attributes, Value, message
from agent.netlink.pods import set_link, up
from agent.netlink.rtnl import (
    ADD,
    FILTER,
    IFLA_IFALIAS,
    IFLA_IFNAME,
    IFLA_INFO_KIND,
    IFLA_LINKINFO,
    IFLA_MTU,
    NO_LINK,
    TCA_KIND,
    TCA_OPTIONS,
    text,
)
from agent.state import KernelError, Queue

HANDLE = 0x706C0000  # "pl": how a restarted agent recognises its own queues (`tc qdisc show`: 706c:)

THE_KERNELS_OWN = 0  # of a qdisc that nobody has asked for

# linux/pkt_sched.h
TCA_TBF_PARMS, TCA_TBF_RATE64, TCA_TBF_BURST = 1, 4, 6
TC_LINKLAYER_ETHERNET = 1
# struct tc_tbf_qopt: two tc_ratespec (linklayer, overhead, cell_align, mpu, rate), limit, buffer and mtu
PARAMETERS = struct.Struct("=xBHhHI12sIII")
U64 = struct.Struct("=Q")

GONE = (errno.ENOENT, errno.ENODEV, errno.EINVAL)  # EINVAL: the device has another root qdisc


def create_shaper(name: str, mtu: int, alias: str) -> None:
    """Make a shaper, up and without a limit. Raises KernelError; then nothing is left behind."""
    # ip link add NAME mtu MTU type ifb
    values: Attributes = [(IFLA_IFNAME, name), (IFLA_MTU, mtu), (IFLA_LINKINFO, [(IFLA_INFO_KIND, "ifb")])]
    perform([message(f"create ifb {name}", RTM_NEWLINK, ADD, NO_LINK, values)])
    try:
        # Nobody speaks IPv6 there; and not in one batch with the above, as with veth pairs.
        if sysctl.ipv6_present():
            sysctl.ensure(f"net/ipv6/conf/{name}/disable_ipv6", "1")
        perform([set_link(name, mtu, [(IFLA_IFALIAS, alias)]), up(name)])
    except KernelError:
        delete_device(name)
        raise


def raise_shaper(name: str) -> None:
    """Set a shaper up. Raises KernelError."""
    perform([up(name)])


def shapers() -> dict[str, int]:
    """Return podlane's shapers, name to index. Raises KernelError."""
    return {link.name: link.index for link in own_links("ifb")}


def foreign_queues() -> set[int]:
    """Return the indexes of the devices where somebody else has put a root qdisc. Raises KernelError."""
    return {number for number, handle, _ in _roots() if handle not in (HANDLE, THE_KERNELS_OWN)}


class QueueTable:
    """`Table[int, Queue]`: the queues that are limited, by the index of their device. Others' qdiscs are left alone."""

    def read(self) -> dict[int, Queue]:
        """Return podlane's own queues. Raises KernelError."""
        found = {}
        for number, handle, values in _roots():
            if handle == HANDLE and text(values.get(TCA_KIND, b"")) == "tbf":
                found[number] = _decode(attributes(values[TCA_OPTIONS], 0))
        return found

    def upsert(self, items: Mapping[int, Queue]) -> dict[int, KernelError]:
        """Create queues or change their limits; return the failures, as where somebody else's qdisc is."""
        return each(list(items), [_put(*item) for item in items.items()])

    def delete(self, keys: Iterable[int]) -> dict[int, KernelError]:
        """Delete queues, and with them what waits there; one already gone, with its device or without, is deleted."""
        keys = list(keys)
        return each(keys, [_delete(key) for key in keys])


def _roots() -> Iterator[tuple[int, int, dict[int, bytes]]]:
    """Yield the device's index, the handle and the attributes of each root qdisc."""
    # tc qdisc show
    for answer in dump(request("list qdiscs", tcmsg, RTM_GETQDISC)):
        _, number, handle, parent, _ = FILTER.unpack_from(answer.body)
        if answer.type == RTM_NEWQDISC and parent == TC_H_ROOT:
            yield number, handle, attributes(answer.body, FILTER.size)


def _put(number: int, queue: Queue) -> Request:
    """Without NLM_F_REPLACE: it changes the queue with this handle, but takes no other's place."""
    # tc qdisc add dev DEVICE root handle 706c: tbf rate RATE burst BURST limit LIMIT
    rate = min(queue.rate, 0xFFFFFFFF)
    parameters = PARAMETERS.pack(TC_LINKLAYER_ETHERNET, 0, 0, 0, rate, bytes(12), queue.limit, 0, 0)
    options: list[tuple[int, Value]] = [(TCA_TBF_PARMS, parameters), (TCA_TBF_BURST, queue.burst)]
    if queue.rate > rate:
        options.append((TCA_TBF_RATE64, U64.pack(queue.rate)))
    entry: Attributes = [(TCA_KIND, "tbf"), (TCA_OPTIONS, options)]
    return message(f"limit device {number} to {queue.rate} bytes/s", RTM_NEWQDISC, NLM_F_CREATE, _root(number), entry)


def _delete(number: int) -> Request:
    # tc qdisc delete dev DEVICE root handle 706c:
    return message(f"take the limit from device {number}", RTM_DELQDISC, 0, _root(number), tolerated=GONE)


def _root(number: int) -> bytes:
    return FILTER.pack(0, number, HANDLE, TC_H_ROOT, 0)


def _decode(options: dict[int, bytes]) -> Queue:
    """Return the queue. The kernel does not tell the burst: it is what the limit has beyond the latency."""
    _, _, _, _, rate, _, limit, _, _ = PARAMETERS.unpack_from(options[TCA_TBF_PARMS])
    if TCA_TBF_RATE64 in options:
        (rate,) = U64.unpack(options[TCA_TBF_RATE64])
    return Queue.of_limit(rate, limit)
