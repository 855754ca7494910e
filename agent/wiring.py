"""A pod's veth pair, from the netlink calls that make it: which names, addresses and order."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address

from agent import netlink, podroutes
from agent.plan import link_local
from agent.pods import shaper_of
from agent.state import Address, KernelError
from agent.store import Netns, Pod
from cni.call import Attachment
from cni.result import Route

log = logging.getLogger(__name__)

GATEWAYS: dict[int, Address] = {4: IPv4Address("169.254.1.1"), 6: IPv6Address("fe80::1")}
"""The pods' gateway of each family: link-local, so that it is of no range, and the same on all nodes."""

HOST_MAC = netlink.OWN_MAC
"""Of every host end. Pods are links of their own, so one serves all."""

_ALIAS_LENGTH = 240  # characters; the kernel takes 255 bytes (IFALIASZ), and container ids may be longer


def device_name(attachment: Attachment) -> str:
    """Return the host end's name: the prefix and 48 bits of a hash, within IFNAMSIZ."""
    return netlink.NAME_PREFIX + _digest(attachment)[:6].hex()


def pod_mac(attachment: Attachment) -> str:
    """Return the pod's own MAC: locally administered, unicast, and the same whenever the pair must be made again."""
    return ":".join(f"{octet:02x}" for octet in b"\x02" + _digest(attachment)[6:11])


def _digest(attachment: Attachment) -> bytes:
    return hashlib.sha256(str(attachment).encode()).digest()


def netns_id(netns: int) -> str:
    """Return the identity of the network namespace behind an open file. Raises KernelError."""
    return f"{os.fstat(netns).st_ino}:{netlink.netns_cookie(netns)}"


class Wiring:
    """Makes and removes the pairs. Thread-safe; all methods raise KernelError."""

    def create(self, pod: Pod, netns: int) -> None:
        """Make the pair, the host end up. The pod's end stays down: nothing flows before its programs are attached."""
        netlink.create_pair(
            host=pod.device,
            host_mac=HOST_MAC,
            pod=pod.attachment.ifname,
            pod_mac=pod.mac,
            mtu=pod.mtu,
            alias=_alias(pod),
            netns=netns,
        )
        if pod.limits.egress_rate:
            self.shape(pod)
        self.lift(pod)

    def shape(self, pod: Pod) -> None:
        """Make the device through which a limited pod sends, if it is not there."""
        if netlink.index(shaper_of(pod.device)) is None:
            netlink.create_shaper(shaper_of(pod.device), pod.mtu, _alias(pod))

    def configure(self, pod: Pod, netns: int, routes: Sequence[Route] | None = None) -> tuple[Route, ...]:
        """Give the pod's end its addresses, neighbours and routes, and set it up; return the routes as they are.

        Without `routes` it gets a default route of each family.
        """
        return netlink.configure_pod(
            netns,
            pod.attachment.ifname,
            addresses=pod.addresses,
            link_local=link_local(pod.mac) if _has_ipv6(pod) else None,
            host_mac=HOST_MAC,
            mtu=pod.mtu,
            gateways=GATEWAYS,
            routes=routes,
        )

    def introduce(self, pod: Pod) -> None:
        """Tell the pod's kernel again where the node is: it forgot when the MAC address of the pod's end changed."""
        with _opened(pod.netns) as netns:
            hops = [GATEWAYS[version] for version in sorted({each.version for each in pod.addresses})]
            netlink.introduce_node(netns, pod.attachment.ifname, hops, HOST_MAC)

    def forget(self, pod: Pod) -> None:
        """Take away what a deleted pair has left in the pod's namespace, if that is still there."""
        try:
            with _opened(pod.netns) as netns:
                netlink.forget_pod(netns, pod.addresses)
        except KernelError as error:  # as a rule, it is gone; and what is left does no harm but to be there
            log.debug("nothing to take away in the namespace of pod=%s: %s", pod.attachment, error)

    def macs(self) -> dict[int, str]:
        """Return the MAC address of each pod's own end as it is now, by the index of its host end."""
        return netlink.pod_macs()

    def queued(self) -> set[int]:
        """Return the indexes of the devices on which somebody else has put a queue, as a chained plugin may."""
        return netlink.foreign_queues()

    def delete(self, device: str) -> None:
        """Remove a pair, and its shaper, by the host end's name; what is gone already is fine."""
        for name in (device, shaper_of(device)):
            if netlink.index(name) is not None:  # most pods have no shaper, and to look costs a tenth
                netlink.delete_device(name)

    def indexes(self, pods: Sequence[Pod]) -> dict[str, int]:
        """Return the interface index of every given pod's host end and shaper that exists, by name."""
        names = [pod.device for pod in pods]
        names += [shaper_of(pod.device) for pod in pods if pod.limits.egress_rate]
        found = ((name, netlink.index(name)) for name in names)
        return {name: index for name, index in found if index is not None}

    def restore(self, pod: Pod) -> None:
        """Make the pair of an active pod again, without its addresses: `finish_restore` gives them, and sets it up."""
        with _opened(pod.netns) as netns:
            try:
                self.create(pod, netns)
            except KernelError:
                self.delete(pod.device)  # half of it would pass for all of it
                raise

    def finish_restore(self, pod: Pod) -> None:
        """Configure a restored pair, once its programs are in force; on failure it goes, to be made again."""
        try:
            with _opened(pod.netns) as netns:
                self.configure(pod, netns, podroutes.decode(pod.routes))
        except KernelError:
            self.delete(pod.device)
            raise

    def fallen(self) -> set[str]:
        """Return the names of host ends and shapers that somebody has set down, among podlane's."""
        return netlink.fallen_devices()

    def lift(self, pod: Pod) -> None:
        """Set the host end up, and the shaper."""
        netlink.raise_host(pod.device, ipv6=_has_ipv6(pod))
        if pod.limits.egress_rate:
            netlink.raise_shaper(shaper_of(pod.device))


def _alias(pod: Pod) -> str:
    return f"{netlink.ALIAS_PREFIX}{pod.attachment}"[:_ALIAS_LENGTH]


def _has_ipv6(pod: Pod) -> bool:
    return any(address.version == 6 for address in pod.addresses)


@contextmanager
def _opened(netns: Netns) -> Iterator[int]:
    """Open a network namespace by the path that the runtime gave, if it is still the same one."""
    try:
        descriptor = os.open(netns.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # not to be held up by a FIFO
    except OSError as error:
        raise KernelError(f"open network namespace {netns.path}: {error.strerror}") from error
    try:
        if netns_id(descriptor) != netns.id:
            raise KernelError(f"network namespace {netns.path} is another one than at ADD")
        yield descriptor
    finally:
        os.close(descriptor)
