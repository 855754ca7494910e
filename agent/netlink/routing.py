"""The routes of one interface of a pod, beside those of its other interfaces.

The first interface has its routes as they are asked for. Those of another one that collide with them get a larger
metric: they stand behind. What is sent from the other one's own addresses takes its routes all the same, by a rule and
a table of its own: on the first interface it would pass for spoofed, and no peer that is not of its subnets could have
an answer.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_network

from pyroute2.netlink.rtnl import RTM_DELRULE, RTM_NEWROUTE, RTM_NEWRULE
from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.rtmsg import RTNH_F_ONLINK, rtmsg

from agent.netlink.channel import Request, errno_of, perform, request
from agent.netlink.rtnl import ADD, FAMILY, PROTOCOL, RT_SCOPE_LINK, RT_SCOPE_UNIVERSE, RT_TABLE_MAIN, RTN_UNICAST
from agent.state import Address, KernelError
from cni.result import Route

DEFAULT_ROUTES = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}

RTPROT_STATIC = 4
RT_TABLE_UNSPEC = 0  # the table is in an attribute, whose numbers have 32 bits
FR_ACT_TO_TBL = 1
_BEHIND = 1 << 16  # plus the interface's index: its metric, above the kernel's own (0 and 1024), and its table's number
_RULE = 30000  # its priority: before that of the main table (32766)


class Routing:
    """What `pods.configure_pod` has to ask for, in the pod's namespace, of the interface with an index."""

    def __init__(self, number: int, addresses: Sequence[Address], gateways: Mapping[int, Address]) -> None:
        """`addresses` are those of the interface, `gateways` the node's inside the pod, by IP version."""
        self._number = number
        self._addresses = addresses
        self._hops: dict[int, Address] = {
            version: gateways[version] for version in sorted({each.version for each in addresses})
        }

    def requests(self, routes: Sequence[Route]) -> list[Request]:
        """Return the requests for routes to the gateways, and then for the given ones."""
        return [self._add(route) for route in self._with_hops(routes)]

    def settle(self, routes: Sequence[Route], failures: Sequence[KernelError | None]) -> tuple[Route, ...]:
        """Put behind what collided, as the answers to `requests` say; return the given routes as they are now.

        Raises KernelError.
        """
        wanted = self._with_hops(routes)
        taken = [failure is not None and errno_of(failure) == errno.EEXIST for failure in failures]
        raise_first(failure for failure, collided in zip(failures, taken, strict=True) if not collided)
        made = [self._behind(route) if collided else route for route, collided in zip(wanted, taken, strict=True)]
        second = [version for version, collided in zip(self._hops, taken, strict=False) if collided]
        again = [self._add(route) for route, collided in zip(made, taken, strict=True) if collided]
        perform([*again, *(each for version in second for each in self._own_table(version))])
        return tuple(made[len(self._hops) :])

    def _with_hops(self, routes: Sequence[Route]) -> list[Route]:
        return [*(Route(ip_network(hop)) for hop in self._hops.values()), *routes]

    def _behind(self, route: Route) -> Route:
        return replace(route, priority=route.priority + _BEHIND + self._number)

    def _own_table(self, version: int) -> list[Request]:
        table = _BEHIND + self._number
        default = Route(DEFAULT_ROUTES[version], gw=self._hops[version], table=table)
        sources = (address for address in self._addresses if address.version == version)
        return [self._add(default), *(_add_rule(address, table) for address in sources)]

    def _add(self, route: Route) -> Request:
        # ip route add DST [via GW onlink | scope link] dev POD [src ADDRESS] [metric M] [table T] [mtu N] [advmss N]
        fields = {
            "family": FAMILY[route.dst.version],
            "dst_len": route.dst.prefixlen,
            "table": RT_TABLE_MAIN if route.table is None else RT_TABLE_UNSPEC,
            "proto": RTPROT_STATIC,
            "scope": RT_SCOPE_UNIVERSE if route.gw else RT_SCOPE_LINK,
            "type": RTN_UNICAST,
            "flags": RTNH_F_ONLINK if route.gw else 0,
        }
        metrics = [(name, value) for name, value in (("RTAX_MTU", route.mtu), ("RTAX_ADVMSS", route.advmss)) if value]
        optional: list[tuple[str, object]] = [
            ("RTA_DST", str(route.dst.network_address) if route.dst.prefixlen else None),
            ("RTA_GATEWAY", str(route.gw) if route.gw else None),
            ("RTA_PREFSRC", self._source(route)),
            ("RTA_PRIORITY", route.priority or None),
            ("RTA_TABLE", route.table),
            ("RTA_METRICS", {"attrs": metrics} if metrics else None),
            ("RTA_OIF", self._number),
        ]
        attributes = [(name, value) for name, value in optional if value is not None]
        what = f"add route {route.dst}{f' via {route.gw}' if route.gw else ''} in the pod"
        return request(what, rtmsg, RTM_NEWROUTE, ADD, fields=fields, attributes=attributes)

    def _source(self, route: Route) -> str | None:
        """Say which of several addresses of a family the pod has towards its subnets: the one that is of the subnet."""
        family = [address for address in self._addresses if address.version == route.dst.version]
        if len(family) < 2 or not route.dst.prefixlen or route.gw is None:
            return None
        return next((str(address) for address in family if address in route.dst), None)


def raise_first(failures: Iterable[KernelError | None]) -> None:
    """Raise the first failure, if there is one."""
    for failure in failures:
        if failure is not None:
            raise failure


def _add_rule(source: Address, table: int) -> Request:
    # ip rule add from ADDRESS lookup TABLE pref 30000 protocol 112
    fields = {**_rule_fields(source), "action": FR_ACT_TO_TBL}
    entry = [*_rule_attributes(source), ("FRA_TABLE", table)]
    what = f"add a rule for packets from {source} in the pod"
    return request(what, fibmsg, RTM_NEWRULE, ADD, fields=fields, attributes=entry, tolerated=(errno.EEXIST,))


def delete_rule(source: Address) -> Request:
    """Return the request that deletes an address's rule, whatever its table; there need not be one."""
    # ip rule delete from ADDRESS pref 30000 protocol 112
    gone = (errno.ENOENT, errno.EAFNOSUPPORT)
    what = f"delete the rule for packets from {source} in the pod"
    return request(
        what,
        fibmsg,
        RTM_DELRULE,
        fields=_rule_fields(source),
        attributes=_rule_attributes(source),
        tolerated=gone,
    )


def _rule_fields(source: Address) -> dict[str, int]:
    return {"family": FAMILY[source.version], "src_len": source.max_prefixlen, "table": RT_TABLE_UNSPEC}


def _rule_attributes(source: Address) -> list[tuple[str, object]]:
    return [("FRA_SRC", str(source)), ("FRA_PRIORITY", _RULE), ("FRA_PROTOCOL", PROTOCOL)]
