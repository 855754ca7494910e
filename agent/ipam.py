"""podlane's own IPAM: what the `ipam` object of a network configuration asks for. Pure.

The fields and rules are host-local's (containernetworking/plugins, plugins/ipam/host-local), and so are its messages.
Beside them: `exclude` (never given) and `reserved` (given to those who ask for them only), lists of addresses and
prefixes, and `sticky` (a pod of the same name gets its former addresses again, where they are free). Where podlane is
stricter: a gateway must be of its subnet's family. Where it is kinder: an address that was asked for twice counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network, ip_address, ip_interface, ip_network
from typing import Any

from pydantic import NonNegativeInt, ValidationError

from agent.ranges import Pool, Range
from agent.state import Address, Network
from cni.document import JsonObject, Many, explain
from cni.errors import CniError, Code
from cni.result import Dns, Ip, Result, Route
from cni.versions import at_least

TYPE = "podlane"
"""The value of `ipam.type` that means this IPAM."""

_V4_MAPPED = IPv6Network("::ffff:0:0/96")
_MIN_HOST_BITS = 2


class _Range(JsonObject):
    subnet: str = ""
    range_start: str = ""
    range_end: str = ""
    gateway: str = ""


class _Route(JsonObject):
    dst: str
    gw: str = ""
    mtu: NonNegativeInt = 0
    advmss: NonNegativeInt = 0
    priority: NonNegativeInt = 0
    table: NonNegativeInt | None = None
    scope: NonNegativeInt | None = None


class _Ipam(_Range):
    """The older form, one range, is part of the object itself."""

    ranges: Many[Many[_Range]] = ()
    routes: Many[_Route] = ()
    data_dir: str = ""
    resolv_conf: str = ""
    exclude: Many[str] = ()
    reserved: Many[str] = ()
    sticky: bool = False


class _IpRanges(JsonObject):
    ip_ranges: Many[Many[_Range]] = ()


@dataclass(frozen=True)
class OwnIpam:
    """A valid `ipam` object of podlane's own IPAM.

    An attachment gets one address of each pool. `notes` say, for the log, which fields have no effect, and why.
    """

    pools: tuple[Pool, ...]
    gateways: Mapping[Range, Address]
    routes: tuple[Route, ...]
    resolv_conf: str
    sticky: bool
    notes: tuple[str, ...]

    def result(self, addresses: Sequence[Address], dns: Dns) -> Result:
        """Return what host-local would answer: addresses with their subnets' lengths and gateways, routes, DNS.

        An address outside all pools, which were others when it was given, is alone in its subnet.
        """
        return Result(ips=tuple(self._ip(each) for each in addresses), routes=self.routes, dns=dns)

    def _ip(self, address: Address) -> Ip:
        its = next((each for each in self.gateways if address in each), None)
        if its is None:
            return Ip(ip_interface(address))
        return Ip(ip_interface(f"{address}/{its.subnet.prefixlen}"), self.gateways[its])


def read(ipam: Mapping[str, Any], *, network: str, version: str, ip_ranges: Sequence[Sequence[Any]] = ()) -> OwnIpam:
    """Read an `ipam` object.

    `network` is the network's name, `version` its cniVersion; `ip_ranges`, of runtimeConfig.ipRanges, come before the
    configured ranges. Raises CniError with code 7, which names the field and what is allowed.
    """
    try:
        config = _Ipam.model_validate(dict(ipam))
        runtime = _IpRanges.model_validate({"ipRanges": [list(each) for each in ip_ranges]})
    except ValidationError as error:
        raise CniError(Code.INVALID_NETWORK_CONFIG, "invalid ipam configuration", explain(error)) from error
    legacy = [[config]] if config.subnet else []
    try:
        return _build(config, [*runtime.ip_ranges, *legacy, *config.ranges], network, version)
    except ValueError as error:
        raise CniError(Code.INVALID_NETWORK_CONFIG, str(error)) from error


def parse_requests(requested: Iterable[str]) -> tuple[Address, ...]:
    """Return the addresses of requests "address" or "address/length"; the length means nothing.

    Raises CniError with code 7.
    """
    try:
        return tuple(_canonical(ip_address(each.partition("/")[0])) for each in requested if ip_interface(each))
    except ValueError as error:
        raise CniError(
            Code.INVALID_NETWORK_CONFIG,
            f"cannot understand ip: {error}",
            "allowed are addresses, with or without /length",
        ) from error


def _build(config: _Ipam, sets: Sequence[Sequence[_Range]], network: str, version: str) -> OwnIpam:
    if not sets:
        raise ValueError("no IP ranges specified: ipam.subnet, ipam.ranges and runtimeConfig.ipRanges are absent")
    exclude = tuple(_prefix("exclude", each) for each in config.exclude)
    reserved = tuple(_prefix("reserved", each) for each in config.reserved)
    gateways: dict[Range, Address] = {}
    pools = []
    for index, its in enumerate(sets):
        try:
            pool_gateways = _range_set(its)
        except ValueError as error:
            raise ValueError(f"invalid range set {index}: {error}") from error
        gateways |= pool_gateways
        pools.append(
            Pool(f"{network}/{index}", tuple(pool_gateways), exclude, reserved, frozenset(pool_gateways.values()))
        )
    _check_sets(pools, version)
    return OwnIpam(
        pools=tuple(pools),
        gateways=gateways,
        routes=tuple(_route(index, each) for index, each in enumerate(config.routes)),
        resolv_conf=config.resolv_conf,
        sticky=config.sticky,
        notes=_notes(config),
    )


def _check_sets(pools: Sequence[Pool], version: str) -> None:
    families = [pool.family for pool in pools]
    if len(set(families)) < len(families) and not at_least(version, "0.3.0"):
        raise ValueError(f"CNI version {version} does not support more than 1 address per family")
    for index, one in enumerate(pools):
        for other_index, other in enumerate(pools[index + 1 :], start=index + 1):
            if any(a.overlaps(b) for a in one.ranges for b in other.ranges):
                raise ValueError(f"range set {index} overlaps with {other_index}")


def _range_set(configured: Sequence[_Range]) -> dict[Range, Address]:
    """Return the ranges of a set, in order, with their gateways. Raises ValueError."""
    if not configured:
        raise ValueError("empty range set")
    ranges: dict[Range, Address] = {}
    for each in configured:
        it, gateway = _range(each)
        for other in ranges:
            if other.first.version != it.first.version:
                raise ValueError("mixed address families")
            if other.overlaps(it):
                raise ValueError(f"subnets {other.first}-{other.last} and {it.first}-{it.last} overlap")
        ranges[it] = gateway
    return ranges


def _range(configured: _Range) -> tuple[Range, Address]:
    subnet = _subnet(configured.subnet)
    usable = Range.of(subnet)
    first = _address("rangeStart", configured.range_start) if configured.range_start else usable.first
    if first not in subnet:
        raise ValueError(f"RangeStart {first} not in network {subnet}")
    last = _address("rangeEnd", configured.range_end) if configured.range_end else usable.last
    if last not in subnet:
        raise ValueError(f"RangeEnd {last} not in network {subnet}")
    if int(last) < int(first):
        raise ValueError(f"RangeStart {first} not in network {subnet} up to RangeEnd {last}")
    gateway = _address("gateway", configured.gateway) if configured.gateway else subnet[1]
    if gateway.version != subnet.version:
        raise ValueError(f"gateway {gateway} is not of the family of network {subnet}")
    return Range(subnet, first, last), gateway


def _subnet(text: str) -> Network:
    if not text:
        raise ValueError("subnet is missing")
    if "/" not in text:
        raise ValueError(f"invalid CIDR address: {text}")
    subnet = ip_network(text, strict=False)
    if isinstance(subnet, IPv6Network) and subnet.overlaps(_V4_MAPPED):
        raise ValueError(f"network {text} has addresses that mean IPv4 ones (RFC 4291 section 2.5.5.2)")
    if subnet.max_prefixlen - subnet.prefixlen < _MIN_HOST_BITS:
        raise ValueError(
            f"Network {text} too small to allocate from: allowed is up to /{subnet.max_prefixlen - _MIN_HOST_BITS}"
        )
    if ip_interface(text).ip != subnet[0]:
        raise ValueError(
            f"Network has host bits set. For a subnet mask of length {subnet.prefixlen}"
            f" the network address is {subnet[0]}"
        )
    return subnet


def _address(field: str, text: str) -> Address:
    try:
        return _canonical(ip_address(text))
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


def _canonical(address: Address) -> Address:
    """Return the IPv4 address that a v4-mapped one means, as host-local does; scopes make no sense here."""
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            raise ValueError(f"{address} has a zone")
        return address.ipv4_mapped or address
    return address


def _prefix(field: str, text: str) -> Network:
    try:
        return ip_network(text)
    except ValueError as error:
        raise ValueError(f"ipam.{field}: {error}; allowed are addresses, and prefixes without host bits") from error


def _route(index: int, configured: _Route) -> Route:
    try:
        return Route(
            dst=ip_network(configured.dst, strict=False),
            gw=_address("gw", configured.gw) if configured.gw else None,
            mtu=configured.mtu,
            advmss=configured.advmss,
            priority=configured.priority,
            table=configured.table,
            scope=configured.scope,
        )
    except ValueError as error:
        raise ValueError(f"ipam.routes.{index}: {error}") from error


def _notes(config: _Ipam) -> tuple[str, ...]:
    notes = []
    if config.data_dir:
        notes.append(f"ipam.dataDir {config.data_dir} has no effect: the agent's store holds the addresses")
    beside = [name for name in ("range_start", "range_end", "gateway") if getattr(config, name)]
    if beside and not config.subnet:
        names = ", ".join(_Ipam.model_fields[name].alias or name for name in beside)
        notes.append(f"ipam.{names} without ipam.subnet: no effect, as in host-local; see ipam.ranges")
    return tuple(notes)
