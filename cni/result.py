"""The result of ADD in the form of each CNI version: printed, and read from those that other plugins printed.

Sources: specification 0.1.0 to 1.1.0, section "Result"; cni:pkg/types/{020,040,100}/types.go for what they leave open.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
)
from typing import Annotated, Any

from pydantic import ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError

from cni.document import explain, lowered
from cni.errors import CniError, Code
from cni.versions import VERSIONS, at_least

_PREFIX = re.compile(r"[0-9a-fA-F:.]+/[0-9]{1,3}")  # neither netmasks nor zones, unlike Python's own parsers
_DEPTH = 5  # of keys: result, list or ip4, entry or routes, entry, and one to spare
_KEYS = ConfigDict(alias_generator=lambda name: name.replace("_", ""))  # as `lowered` leaves them


def _read_address(value: object) -> IPv4Address | IPv6Address | None:
    if value == "":
        return None  # as Go's net.IP does
    if not isinstance(value, str) or "%" in value:
        raise ValueError("Input should be an IP address")
    return ip_address(value)


def _read_interface(value: object) -> IPv4Interface | IPv6Interface:
    if not isinstance(value, str) or not _PREFIX.fullmatch(value):
        raise ValueError("Input should be an IP address with a prefix length")
    return ip_interface(value)


def _read_network(value: object) -> IPv4Network | IPv6Network:
    return _read_interface(value).network


OptionalAddress = Annotated[IPv4Address | IPv6Address | None, PlainValidator(_read_address)]
InterfaceAddress = Annotated[IPv4Interface | IPv6Interface, PlainValidator(_read_interface)]
Number = Annotated[int, Field(strict=True, ge=0, le=0xFFFFFFFF)]
Prefix = Annotated[IPv4Network | IPv6Network, PlainValidator(_read_network)]


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface of the host, or of the container whose network namespace is its sandbox. `mtu` is in bytes."""

    __pydantic_config__ = _KEYS
    name: str
    mac: str = ""
    mtu: Number = 0
    sandbox: str = ""
    socket_path: str = ""
    pci_id: str = ""

    def to_json(self, version: str) -> dict[str, object]:
        """Return the entry of `interfaces`, in versions that have it."""
        body: dict[str, object] = {"name": self.name, "mac": self.mac, "sandbox": self.sandbox}
        if at_least(version, "1.1.0"):
            body |= {"mtu": self.mtu, "socketPath": self.socket_path, "pciID": self.pci_id}
        return {key: value for key, value in body.items() if value or key == "name"}


@dataclass(frozen=True, slots=True)
class Ip:
    """An address, and the index of its interface within the result; None if nobody said."""

    __pydantic_config__ = _KEYS
    address: InterfaceAddress
    gateway: OptionalAddress = None
    interface: Number | None = None

    def to_json(self, version: str) -> dict[str, object]:
        """Return the entry of `ips`, in versions that have it."""
        body: dict[str, object] = {} if at_least(version, "1.0.0") else {"version": str(self.address.version)}
        if self.interface is not None:  # 0 is an interface, too
            body["interface"] = self.interface
        body["address"] = str(self.address)
        if self.gateway is not None:
            body["gateway"] = str(self.gateway)
        return body


@dataclass(frozen=True, slots=True)
class Route:
    """A route inside the container; without `gw` it is up to the plugin which gateway that means.

    `mtu` and `advmss` are in bytes; 0 is the kernel's choice, as is None for `table` and `scope` (rtnetlink(7)).
    """

    __pydantic_config__ = _KEYS
    dst: Prefix
    gw: OptionalAddress = None
    mtu: Number = 0
    advmss: Number = 0
    priority: Number = 0
    table: Number | None = None
    scope: Number | None = None

    def to_json(self, version: str) -> dict[str, object]:
        """Return the entry of `routes`."""
        body: dict[str, object] = {"dst": str(self.dst)}
        if self.gw is not None:
            body["gw"] = str(self.gw)
        if at_least(version, "1.1.0"):
            body |= {key: value for key in ("mtu", "advmss", "priority") if (value := getattr(self, key))}
            body |= {key: value for key in ("table", "scope") if (value := getattr(self, key)) is not None}
        return body


@dataclass(frozen=True, slots=True)
class Dns:
    """What a resolver in the container should use; it is for the runtime to tell it."""

    __pydantic_config__ = _KEYS
    nameservers: tuple[str, ...] = ()
    domain: str = ""
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.nameservers or self.domain or self.search or self.options)

    def to_json(self) -> dict[str, object]:
        """Return the object, which is the same in all versions."""
        lists = {"nameservers": self.nameservers, "search": self.search, "options": self.options}
        body: dict[str, object] = {key: list(value) for key, value in lists.items() if value}
        return body | ({"domain": self.domain} if self.domain else {})


@dataclass(frozen=True, slots=True)
class Result:
    """What ADD made, or what an IPAM plugin gave (then without interfaces)."""

    __pydantic_config__ = _KEYS
    interfaces: tuple[Interface, ...] = ()
    ips: tuple[Ip, ...] = ()
    routes: tuple[Route, ...] = ()
    dns: Dns = Dns()

    def to_json(self, version: str) -> dict[str, object]:
        """Return the result object of one of `VERSIONS`; empty lists are left out.

        Raises CniError 7 if the version cannot hold a result without addresses (before 0.3.0).
        """
        if not at_least(version, "0.3.0"):
            return {"cniVersion": version, **self._families(), "dns": self.dns.to_json()}
        lists: dict[str, Sequence[Interface | Ip | Route]]
        lists = {"interfaces": self.interfaces, "ips": self.ips, "routes": self.routes}
        body: dict[str, object] = {"cniVersion": version}
        body |= {key: [entry.to_json(version) for entry in entries] for key, entries in lists.items() if entries}
        if self.dns or not at_least(version, "1.0.0"):
            body["dns"] = self.dns.to_json()
        return body

    def _families(self) -> dict[str, object]:
        """Return `ip4` and `ip6`: the first address of each family, with the routes of that family."""
        firsts = {ip.address.version: ip for ip in reversed(self.ips)}
        if not firsts:
            raise CniError(
                Code.INVALID_NETWORK_CONFIG,
                "cannot convert: no valid IP addresses",
                "before CNI version 0.3.0 a result has at least one address",
            )
        return {f"ip{family}": self._family(family, first) for family, first in sorted(firsts.items())}

    def _family(self, family: int, ip: Ip) -> dict[str, object]:
        body: dict[str, object] = {"ip": str(ip.address)}
        if ip.gateway is not None:
            body["gateway"] = str(ip.gateway)
        routes = [route.to_json("0.2.0") for route in self.routes if route.dst.version == family]
        return body | ({"routes": routes} if routes else {})

    def after(self, previous: Result) -> Result:
        """Return the result of a chain: what came before, then this; of two DNS settings this one counts."""
        shift = len(previous.interfaces)
        ips = [ip if ip.interface is None else replace(ip, interface=ip.interface + shift) for ip in self.ips]
        return Result(
            interfaces=(*previous.interfaces, *self.interfaces),
            ips=(*previous.ips, *ips),
            routes=(*previous.routes, *self.routes),
            dns=self.dns or previous.dns,
        )


@dataclass(frozen=True, slots=True)
class _Family:
    """`ip4` or `ip6` of a result before 0.3.0."""

    ip: InterfaceAddress
    gateway: OptionalAddress = None
    routes: tuple[Route, ...] = ()


@dataclass(frozen=True, slots=True)
class _Families:
    """A result before 0.3.0."""

    ip4: _Family | None = None
    ip6: _Family | None = None
    dns: Dns = Dns()

    def upgraded(self) -> Result:
        families = [family for family in (self.ip4, self.ip6) if family]
        return Result(
            ips=tuple(Ip(family.ip, family.gateway) for family in families),
            routes=tuple(route for family in families for route in family.routes),
            dns=self.dns,
        )


_READER = TypeAdapter(Result)
_READER_BEFORE_0_3 = TypeAdapter(_Families)


def parse_result(raw: Mapping[str, Any], default_version: str) -> Result:
    """Read a result of any version: a `prevResult`, or what a delegated plugin printed.

    `default_version` is for results that name none: that of the configuration. What a newer version has is understood
    in older ones, too, as the reference implementation does. Raises CniError 6, which names the field.
    """
    body = lowered(dict(raw), _DEPTH)
    version = body.get("cniversion") or default_version
    if version not in VERSIONS:
        raise CniError(Code.DECODING_FAILURE, f'unsupported CNI result version "{version}"')
    try:
        if at_least(version, "0.3.0"):
            return _READER.validate_python(body)
        return _READER_BEFORE_0_3.validate_python(body).upgraded()
    except ValidationError as error:
        raise CniError(Code.DECODING_FAILURE, f"invalid CNI result of version {version}", explain(error)) from error
