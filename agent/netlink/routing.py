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
from pyroute2.netlink.rtnl.rtmsg import RTNH_F_ONLINK

from agent.netlink.channel import Request, errno_of, perform
from agent.netlink.encode import Attributes, Value, message
from agent.netlink.rtnl import (
    ADD,
    FAMILY,
    FRA_PRIORITY,
    FRA_PROTOCOL,
    FRA_SRC,
    FRA_TABLE,
    PROTOCOL,
    ROUTE,
    RT_SCOPE_LINK,
    RT_SCOPE_UNIVERSE,
    RT_TABLE_MAIN,
    RTA_DST,
    RTA_GATEWAY,
    RTA_METRICS,
    RTA_OIF,
    RTA_PREFSRC,
    RTA_PRIORITY,
    RTA_TABLE,
    RTAX_ADVMSS,
    RTAX_MTU,
    RTN_UNICAST,
    RULE,
)
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
        sources = [address for address in self._addresses if address.version == version]
        # An interface that is made again has another index: its former rule would be there for ever.
        return [self._add(default), *map(delete_rule, sources), *(_add_rule(address, table) for address in sources)]

    def _add(self, route: Route) -> Request:
        # ip route add DST [via GW onlink | scope link] dev POD [src ADDRESS] [metric M] [table T] [mtu N] [advmss N]
        body = ROUTE.pack(
            FAMILY[route.dst.version],
            route.dst.prefixlen,
            RT_TABLE_MAIN if route.table is None else RT_TABLE_UNSPEC,
            RTPROT_STATIC,
            RT_SCOPE_UNIVERSE if route.gw else RT_SCOPE_LINK,
            RTN_UNICAST,
            RTNH_F_ONLINK if route.gw else 0,
        )
        metrics = [(number, value) for number, value in ((RTAX_MTU, route.mtu), (RTAX_ADVMSS, route.advmss)) if value]
        optional: list[tuple[int, Value | None]] = [
            (RTA_DST, route.dst.network_address if route.dst.prefixlen else None),
            (RTA_GATEWAY, route.gw),
            (RTA_PREFSRC, self._source(route)),
            (RTA_PRIORITY, route.priority or None),
            (RTA_TABLE, route.table),
            (RTA_METRICS, metrics or None),
            (RTA_OIF, self._number),
        ]
        attributes = [(number, value) for number, value in optional if value is not None]
        what = f"add route {route.dst}{f' via {route.gw}' if route.gw else ''} in the pod"
        return message(what, RTM_NEWROUTE, ADD, body, attributes)

    def _source(self, route: Route) -> Address | None:
        """Say which of several addresses of a family the pod has towards its subnets: the one that is of the subnet."""
        family = [address for address in self._addresses if address.version == route.dst.version]
        if len(family) < 2 or not route.dst.prefixlen or route.gw is None:
            return None
        return next((address for address in family if address in route.dst), None)


def raise_first(failures: Iterable[KernelError | None]) -> None:
    """Raise the first failure, if there is one."""
    for failure in failures:
        if failure is not None:
            raise failure


def _add_rule(source: Address, table: int) -> Request:
    # ip rule add from ADDRESS lookup TABLE pref 30000 protocol 112
    entry = [*_rule_attributes(source), (FRA_TABLE, table)]
    what = f"add a rule for packets from {source} in the pod"
    return message(what, RTM_NEWRULE, ADD, _rule(source, FR_ACT_TO_TBL), entry)


def delete_rule(source: Address) -> Request:
    """Return the request that deletes an address's rule, whatever its table; there need not be one."""
    # ip rule delete from ADDRESS pref 30000 protocol 112
    gone = (errno.ENOENT, errno.EAFNOSUPPORT)
    what = f"delete the rule for packets from {source} in the pod"
    return message(what, RTM_DELRULE, 0, _rule(source, 0), _rule_attributes(source), tolerated=gone)


def _rule(source: Address, action: int) -> bytes:
    return RULE.pack(FAMILY[source.version], 0, source.max_prefixlen, RT_TABLE_UNSPEC, action, 0)


def _rule_attributes(source: Address) -> Attributes:
    return [(FRA_SRC, source), (FRA_PRIORITY, _RULE), (FRA_PROTOCOL, bytes([PROTOCOL]))]
