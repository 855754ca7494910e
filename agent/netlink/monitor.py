"""Tells the loop that devices, addresses, routes or neighbours changed, so that what follows need not wait."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType

from pyroute2.netlink import NETLINK_LISTEN_ALL_NSID, SOL_NETLINK
from pyroute2.netlink.rtnl import (
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_DELNEIGH,
    RTM_DELQDISC,
    RTM_DELROUTE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWNEIGH,
    RTM_NEWQDISC,
    RTM_NEWROUTE,
    TC_H_ROOT,
)

from agent.netlink.channel import RECEIVE, Message, attributes, kernel_error, messages
from agent.netlink.devices import NAME_PREFIX, name_of
from agent.netlink.rtnl import FILTER, IFLA_LINK, IFLA_LINK_NETNSID, LINK, NDA_PROTOCOL, PROTOCOL, ROUTE, u32
from agent.netlink.shaping import HANDLE, THE_KERNELS_OWN

log = logging.getLogger(__name__)

# linux/rtnetlink.h, enum rtnetlink_groups: LINK, NEIGH, TC, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE
GROUPS = sum(1 << (group - 1) for group in (1, 3, 4, 5, 7, 9, 11))
LINK_GROUP = 1
# Milliseconds, after the first news, to let more come. An ADD causes two dozen, one by one: a thread that woke for each
# would take the interpreter from the one that serves the ADD.
_BURST = 20
# Any device may be an uplink, or become one: by its name, its kind or its addresses.
ALWAYS = {RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR}
# As it stands in a message. Decoding each one would cost a busy node far more than what it tells.
OUR_NEIGHBOUR = struct.pack("=HHBxxx", 5, NDA_PROTOCOL, PROTOCOL)


class Monitor:
    """Calls `changed`, from a thread of its own, when something has changed in the kernel that podlane builds on.

    That is: devices and addresses, others' queues, default routes, podlane's own routes and neighbours, and the pods'
    ends of the veth pairs, each in its own namespace.

    Once per burst, and also when the kernel could not deliver all news (ENOBUFS). A context manager: the
    thread runs within. For use once.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._thread = threading.Thread(target=self._run, name="netlink-monitor", daemon=True)

    def __enter__(self) -> Monitor:
        try:
            self._sources = {_subscribe(): _concerns_us, _subscribe_abroad(): _is_pod_end}
        except OSError as error:
            raise kernel_error("subscribe to changes of devices, addresses, routes and neighbours", error) from error
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        for news in self._sources:
            news.close()
        os.close(self._stop)

    def _run(self) -> None:
        waiting, stopping = select.poll(), select.poll()
        for news in self._sources:
            waiting.register(news, select.POLLIN)
        for each in (waiting, stopping):
            each.register(self._stop, select.POLLIN)
        while self._stop not in (fd for fd, _ in waiting.poll()) and not stopping.poll(_BURST):
            heard = [_drain(news, concerns) for news, concerns in self._sources.items()]
            if any(heard):
                self._changed()


def _subscribe() -> socket.socket:
    news = _open()
    news.bind((0, GROUPS))
    return news


def _subscribe_abroad() -> socket.socket:
    """Listen to the links of all namespaces that links lead to. Without CAP_NET_BROADCAST the full passes must do."""
    news = _open()
    try:
        news.setsockopt(SOL_NETLINK, NETLINK_LISTEN_ALL_NSID, 1)
        news.bind((0, 1 << (LINK_GROUP - 1)))
    except PermissionError:
        log.info("without CAP_NET_BROADCAST: MAC addresses that change in pods are seen somewhat later")
    return news


def _open() -> socket.socket:
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    return socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)


def _drain(news: socket.socket, concerns: Callable[[Message], bool]) -> bool:
    """Take all that is there; say whether any of it, or of what the kernel left out, may concern podlane."""
    concerned = False
    while True:
        try:
            concerned |= any(concerns(message) for message in messages(news.recv(RECEIVE)))
        except BlockingIOError:
            return concerned
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            concerned = True


def _concerns_us(message: Message) -> bool:
    if message.type in (RTM_NEWROUTE, RTM_DELROUTE):
        _, bits, _, protocol, _, _, _ = ROUTE.unpack_from(message.body)
        return bool(protocol == PROTOCOL or bits == 0)
    if message.type in (RTM_NEWNEIGH, RTM_DELNEIGH):
        return OUR_NEIGHBOUR in message.body
    if message.type in (RTM_NEWQDISC, RTM_DELQDISC):
        _, _, handle, parent, _ = FILTER.unpack_from(message.body)
        return bool(parent == TC_H_ROOT and handle not in (HANDLE, THE_KERNELS_OWN))
    return message.type in ALWAYS


def _is_pod_end(message: Message) -> bool:
    """Say whether a link's other end seems to be a pod's host end; what else pods do with links is not looked at."""
    if message.type != RTM_NEWLINK:
        return False
    end = attributes(message.body, LINK.size)
    if IFLA_LINK not in end or IFLA_LINK_NETNSID not in end:
        return False
    return (name_of(u32(end[IFLA_LINK])) or "").startswith(NAME_PREFIX)
