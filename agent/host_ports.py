"""The ports of the node's that a runtime wants for a pod: `runtimeConfig.portMappings`. Pure.

CONVENTIONS.md describes the capability; the plugin portmap is its reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

from agent.state import Address, HostPort
from agent.store import Pod, Published
from cni.errors import CniError, Code
from cni.netconf import PORT_PROTOCOLS, PortMapping

_ANY: tuple[Address, ...] = (IPv4Address("0.0.0.0"), IPv6Address("::"))  # noqa: S104


def read(mappings: Sequence[PortMapping], masqueraded: range) -> tuple[Published, ...]:
    """Return the host ports that valid mappings ask for: without an address, at any of both families.

    What is asked for twice is asked for once. Raises CniError 7 for a port that leads to two, and for one of those from
    which pods are masqueraded: answers to a pod could not be told from what is for the host port.
    """
    found: dict[HostPort, int] = {}
    for each in mappings:
        if each.host_port in masqueraded:
            span = f"{masqueraded.start}-{masqueraded.stop - 1}"
            raise CniError(
                Code.INVALID_NETWORK_CONFIG,
                f"host port {each.host_port} is one of those for masquerading ({span}): choose another one, or change "
                "masquerade.first_port and last_port in the agent's configuration",
            )
        addresses = (ip_address(each.host_ip),) if each.host_ip else _ANY
        for address in addresses:
            at = HostPort(address, each.host_port, PORT_PROTOCOLS[each.protocol.lower()])
            if found.setdefault(at, each.container_port) != each.container_port:
                raise CniError(
                    Code.INVALID_NETWORK_CONFIG,
                    f"host port {at} is to lead to two ports of the pod, {found[at]} and {each.container_port}",
                )
    return tuple(Published(at, port) for at, port in found.items())


def check_families(pod: Pod) -> None:
    """Raise CniError 7 for a host port at an address of a family of which the pod has none: it could lead nowhere."""
    families = {address.version for address in pod.addresses}
    for each in pod.published:
        address = each.at.address
        if address not in _ANY and address.version not in families:
            message = f"host port {each.at} cannot lead to the pod, which has no IPv{address.version} address"
            raise CniError(Code.INVALID_NETWORK_CONFIG, message)
