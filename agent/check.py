"""CHECK: whether an attachment is still what ADD made and prevResult records.

Plugins that come after podlane in a chain may add to what is there, change the MAC address if they record it, lower
the MTU, or move routes to another table (tuning and sbr do, and record only the MAC): none of that is a fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from agent.netlink.inspect import End, PodView, read_end, read_pod
from agent.pods import NO_LIMITS
from agent.store import Phase, Pod
from agent.wiring import GATEWAYS, HOST_MAC, netns_id
from cni.call import Attachment
from cni.errors import CniError, Code
from cni.netconf import Bandwidth
from cni.result import Interface, Ip, Result, Route


@dataclass(frozen=True, slots=True)
class Found:
    """What there is: the identity of the network namespace, the pod's interface in it, and the pair's host end."""

    netns_id: str
    view: PodView | None
    host: End | None


def check(attachment: Attachment, pod: Pod | None, prev: Result, netns: int, limits: Bandwidth = NO_LIMITS) -> None:
    """Compare the attachment, in the network namespace of an open file, with its record and with prevResult.

    `pod` is what the store knows of it, None if nothing; `limits` are those that the call names, if any. The datapath
    itself (programs, map entries) is the loop's to check: `Loop.check`, for an attachment that is active. Raises
    CniError 103 that names all that differs, or KernelError.
    """
    if pod is None:
        raise CniError(Code.NOT_AS_ADDED, "no addresses are reserved for this interface", str(attachment))
    if wrong := [*differences(pod, prev, look(pod, netns)), *_limits(pod, limits)]:
        message = f"{attachment.ifname} is not as ADD left it: {'; '.join(wrong)}"
        raise CniError(Code.NOT_AS_ADDED, message, str(attachment))


def _limits(pod: Pod, asked: Bandwidth) -> Iterator[str]:
    if asked.limits and asked != pod.limits:
        given, had = (each.model_dump_json(by_alias=True) for each in (asked, pod.limits))
        yield f"the limits are {had}, not {given}"


def has_new_mac(pod: Pod, netns: int) -> bool:
    """Say whether the pod's interface has another MAC address than podlane gave it. Raises KernelError."""
    view = read_pod(netns, pod.attachment.ifname)
    return view is not None and view.end.mac != pod.mac


def look(pod: Pod, netns: int) -> Found:
    """Read all that `differences` compares. Raises KernelError."""
    host = read_end(pod.device) if pod.phase is not Phase.IMPORTED else None
    return Found(netns_id(netns), read_pod(netns, pod.attachment.ifname), host)


def differences(pod: Pod, prev: Result, found: Found) -> Iterator[str]:
    """Yield all that is not as it should be, in words. Pure.

    Of an imported attachment, which another plugin wired, only what prevResult records is compared.
    """
    name = pod.attachment.ifname
    if pod.netns.id and found.netns_id != pod.netns.id:
        yield "CNI_NETNS is another network namespace than at ADD"
        return
    recorded = _recorded(prev, name)
    if recorded is None:
        yield f"prevResult has no interface {name} of a container"
        return
    yield from _reservation(pod, prev)
    if found.view is None:
        yield f"interface {name} is missing"
    else:
        yield from _interface(found.view, recorded, pod)
        yield from _addresses(pod, prev, found.view)
        yield from _routes(pod, prev, found.view)
    if pod.phase is not Phase.IMPORTED:
        yield from _host(pod, found)


def _recorded(prev: Result, name: str) -> Interface | None:
    return next((each for each in prev.interfaces if each.name == name and each.sandbox), None)


def _ips(prev: Result, pod: Pod) -> list[Ip]:
    """Return the addresses that prevResult gives to the pod's interface; an index is optional in it."""
    name = pod.attachment.ifname
    own = [number for number, each in enumerate(prev.interfaces) if each.name == name and each.sandbox]
    return [ip for ip in prev.ips if ip.interface in own or (ip.interface is None and ip.address.ip in pod.addresses)]


def _reservation(pod: Pod, prev: Result) -> Iterator[str]:
    """Compare addresses: podlane's own, which carry its gateway, with the store's; later plugins may add some."""
    if pod.phase is Phase.RELEASING:
        yield "it is being released"
    recorded = {ip.address.ip: ip for ip in _ips(prev, pod)}
    for address in pod.addresses:
        if address not in recorded:
            yield f"address {address} is reserved, but not in prevResult"
    for address, ip in recorded.items():
        if ip.gateway in GATEWAYS.values() and address not in pod.addresses:
            yield f"address {address} is in prevResult, but not reserved"


def _interface(view: PodView, recorded: Interface, pod: Pod) -> Iterator[str]:
    name, end = pod.attachment.ifname, view.end
    if not end.up:
        yield f"interface {name} is down"
    if recorded.mac and _octets(recorded.mac) != _octets(end.mac):
        yield f"interface {name} has MAC address {end.mac}, not {recorded.mac}"
    mtu = recorded.mtu or pod.mtu
    if mtu and end.mtu > mtu:
        yield f"interface {name} has MTU {end.mtu}, above {mtu}"
    if pod.phase is Phase.IMPORTED:
        return
    for gateway in {GATEWAYS[address.version] for address in pod.addresses}:
        mac = view.neighbours.get(gateway, "missing")
        if mac != HOST_MAC:
            yield f"neighbour {gateway} is {mac}, not {HOST_MAC}"


def _addresses(pod: Pod, prev: Result, view: PodView) -> Iterator[str]:
    for ip in _ips(prev, pod):
        if ip.address not in view.addresses:
            yield f"address {ip.address} is missing"


def _octets(mac: str) -> str:
    """Return the digits of a MAC address: people and plugins write it in several ways."""
    return "".join(each for each in mac.lower() if each.isalnum())


def _routes(pod: Pod, prev: Result, view: PodView) -> Iterator[str]:
    """Compare the routes of prevResult; podlane's own are those via its gateways, others may be of any interface."""
    for route in prev.routes:
        is_own = route.gw in GATEWAYS.values() or pod.phase is Phase.IMPORTED
        if is_own and not _has_route(view, route):
            yield f"route {route.dst}{f' via {route.gw}' if route.gw else ''} is missing"


def _has_route(view: PodView, route: Route) -> bool:
    return any(there.destination == route.dst and route.gw in (None, there.gateway) for there in view.routes)


def _host(pod: Pod, found: Found) -> Iterator[str]:
    if found.host is None:
        yield f"host device {pod.device} is missing"
        return
    if not found.host.up:
        yield f"host device {pod.device} is down"
    if found.host.mac != HOST_MAC:
        yield f"host device {pod.device} has MAC address {found.host.mac}, not {HOST_MAC}"
    if found.view and (found.host.peer, found.view.end.peer) != (found.view.end.index, found.host.index):
        yield f"host device {pod.device} is not the other end of {pod.attachment.ifname}"
