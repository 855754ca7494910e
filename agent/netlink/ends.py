"""The pods' own ends of the veth pairs, as they can be seen from the host: without entering any namespace."""

from __future__ import annotations

from pyroute2.netlink.rtnl import RTM_GETLINK

from agent.netlink.channel import Message, Request, ask, attributes
from agent.netlink.devices import RTEXT_FILTER_SKIP_STATS, Link, host_ends
from agent.netlink.encode import Value, message
from agent.netlink.rtnl import (
    IFLA_ADDRESS,
    IFLA_EXT_MASK,
    IFLA_LINK,
    IFLA_LINK_NETNSID,
    IFLA_TARGET_NETNSID,
    LINK,
    u32,
)


def pod_macs() -> dict[int, str]:
    """Return the MAC address of each pod's own end, by the index of its host end. Raises KernelError.

    The kernel says where the other end of a pair is, and answers for that namespace, too (Linux 4.15).
    """
    hosts = [link for link in host_ends() if IFLA_LINK in link.attributes]
    answers = zip(hosts, ask([_query(link) for link in hosts]), strict=True)
    return {host.index: mac for host, answer in answers if answer and (mac := _mac(host, answer))}


def _query(host: Link) -> Request:
    # ip -n NETNS link show dev POD
    body = LINK.pack(0, 0, u32(host.attributes[IFLA_LINK]), 0, 0)
    entry: list[tuple[int, Value]] = [(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS)]
    if IFLA_LINK_NETNSID in host.attributes:
        entry.append((IFLA_TARGET_NETNSID, host.attributes[IFLA_LINK_NETNSID]))
    return message(f"look at the other end of {host.name}", RTM_GETLINK, 0, body, entry)


def _mac(host: Link, answer: Message) -> str:
    """Return the MAC address; empty if that is no end of this pair: a namespace's number may be another's since."""
    end = attributes(answer.body, LINK.size)
    if IFLA_LINK not in end or u32(end[IFLA_LINK]) != host.index:
        return ""
    return end.get(IFLA_ADDRESS, b"").hex(":")
