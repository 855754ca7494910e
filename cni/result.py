"""The result of ADD, in the form of each CNI version (specification 0.3.0 to 1.1.0, section "Result")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network

from cni.call import VERSIONS


@dataclass(frozen=True, slots=True)
class Interface:
    """One end of the veth pair; the pod's end has the path of its network namespace as sandbox."""

    name: str
    mac: str
    mtu: int
    sandbox: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    """A route inside the pod."""

    destination: IPv4Network | IPv6Network
    gateway: str


@dataclass(frozen=True, slots=True)
class Result:
    """What ADD made. The addresses belong to the last of the interfaces."""

    interfaces: Sequence[Interface]
    addresses: Sequence[IPv4Interface | IPv6Interface]
    gateways: Sequence[str]  # one for each address
    routes: Sequence[Route] = field(default_factory=tuple)

    def to_json(self, version: str) -> dict[str, object]:
        """Return the result object of the given CNI version, one of `cni.call.VERSIONS`."""
        before_1_0 = VERSIONS.index(version) < VERSIONS.index("1.0.0")
        ips = [self._ip(index, before_1_0) for index in range(len(self.addresses))]
        body: dict[str, object] = {
            "cniVersion": version,
            "interfaces": [_interface(interface, with_mtu=version == "1.1.0") for interface in self.interfaces],
            "ips": ips,
            "routes": [{"dst": str(route.destination), "gw": route.gateway} for route in self.routes],
        }
        if before_1_0:
            body["dns"] = {}
        return body

    def _ip(self, index: int, with_version: bool) -> dict[str, object]:
        address = self.addresses[index]
        body: dict[str, object] = {"version": str(address.version)} if with_version else {}
        return body | {
            "interface": len(self.interfaces) - 1,
            "address": str(address),
            "gateway": self.gateways[index],
        }


def _interface(interface: Interface, *, with_mtu: bool) -> dict[str, object]:
    body: dict[str, object] = {"name": interface.name, "mac": interface.mac}
    if with_mtu:
        body["mtu"] = interface.mtu
    if interface.sandbox:
        body["sandbox"] = interface.sandbox
    return body
