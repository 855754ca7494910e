"""What the CNI commands do on this node: the store, the veth pairs and the loop, in the order that loses nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_interface, ip_network

from agent import netlink
from agent.loop import Loop
from agent.state import KernelError
from agent.store import AttachmentExists, Netns, Pod, RangeExhausted, Store, StoreError
from agent.wiring import GATEWAYS, HOST_MAC, Wiring, device_name, netns_id, pod_mac
from cni.call import Attachment
from cni.errors import CniError, Code
from cni.result import Interface, Result, Route

log = logging.getLogger(__name__)

# Below the launcher's deadlines (60 s for ADD, 10 s for DEL), so that the runtime hears the reason.
_ADD_SECONDS = 20.0
_DEL_SECONDS = 8.0
_DEFAULT_ROUTES = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}


@dataclass
class Readiness:
    """Whether ADD can be served, for STATUS and the readiness probe, which must say the same."""

    unproved: str = "the agent is starting"
    """What the datapath's proof lacks; empty once it is there."""
    uninstalled: str = "the CNI configuration is not installed yet"
    """What could not be put where the runtime looks; empty if nothing."""
    trouble: Callable[[], str] = lambda: ""
    """Says what keeps the kernel from being brought up to date; empty if nothing."""
    exhausted: Callable[[], str] = lambda: ""
    """Says which addresses have run out; empty while there are some."""

    @property
    def reason(self) -> str:
        """Why ADD cannot be served now; empty if it can."""
        try:
            return self.unproved or self.uninstalled or self.trouble() or self.exhausted()
        except StoreError as error:
            return str(error)


class Node:
    """Implements `cni.commands.Node`. Thread-safe."""

    def __init__(self, *, store: Store, wiring: Wiring, loop: Loop, mtu: int, readiness: Readiness) -> None:
        """`mtu` is the configured one in bytes; 0 means that of the uplink at the time of each ADD."""
        self._store = store
        self._wiring = wiring
        self._loop = loop
        self._mtu = mtu
        self._readiness = readiness
        self._turns = threading.Condition()
        self._at_work: set[Attachment] = set()

    @contextmanager
    def turn(self, attachment: Attachment) -> Iterator[None]:
        """See `cni.commands.Node`."""
        with self._turns:
            self._turns.wait_for(lambda: attachment not in self._at_work)
            self._at_work.add(attachment)
        try:
            yield
        finally:
            with self._turns:
                self._at_work.remove(attachment)
                self._turns.notify_all()

    def reserve(self, attachment: Attachment, netns_path: str, netns: int, mtu: int) -> None:
        """See `cni.commands.Node`.

        Codes: 8 for a bad namespace, 11 before the datapath is proved, 100 for a second ADD, 101 for no free address.
        """
        if self._readiness.unproved:
            raise CniError(Code.TRY_AGAIN_LATER, "podlane cannot serve ADD now", self._readiness.unproved)
        _check_netns(netns, netns_path)
        with _translated():
            mtu = mtu or self._mtu or netlink.uplink_mtu()
            identity = Netns(netns_path, netns_id(netns))
        try:
            pod = self._store.reserve(
                attachment, device=device_name(attachment), mac=pod_mac(attachment), mtu=mtu, netns=identity
            )
        except AttachmentExists as error:
            raise CniError(
                Code.ALREADY_ATTACHED, "the container has this interface already; DEL it first", str(attachment)
            ) from error
        except RangeExhausted as error:
            raise CniError(Code.ADDRESSES_EXHAUSTED, str(error)) from error
        log.info("reserved pod=%s addresses=%s", attachment, ",".join(map(str, pod.addresses)))

    def connect(self, attachment: Attachment, netns: int) -> Result:
        """See `cni.commands.Node`. Code 102 when the kernel refuses, 11 when it takes too long."""
        pod = self._known(attachment)
        with _translated():
            self._wiring.create(pod, netns)
            self._loop.sync(_ADD_SECONDS)
            self._loop.check(pod)
            self._wiring.configure(pod, netns)
        return _result(pod)

    def commit(self, attachment: Attachment) -> None:
        """See `cni.commands.Node`. Code 11 if a DEL came in between."""
        if not self._store.activate(attachment):
            raise CniError(Code.TRY_AGAIN_LATER, "the attachment was deleted while it was being made", str(attachment))
        log.info("attached pod=%s", attachment)

    def release(self, attachment: Attachment) -> None:
        """See `cni.commands.Node`. The addresses are free only when nothing in the kernel knows them any more."""
        if not self._store.begin_release(attachment):
            return
        device = device_name(attachment)
        with _translated():
            self._wiring.delete(device)
            self._loop.sync(_DEL_SECONDS)
            # A repair that was under way may have made it again; the pass that has just ended makes no more.
            self._wiring.delete(device)
        self._store.remove(attachment)
        log.info("released pod=%s", attachment)

    def status(self) -> None:
        """See `cni.commands.Node`. Code 50 with the reason."""
        reason = self._readiness.reason
        if reason:
            raise CniError(Code.NOT_AVAILABLE, "podlane cannot serve ADD now", reason)

    def _known(self, attachment: Attachment) -> Pod:
        pod = self._store.get(attachment)
        if pod is None:
            raise CniError(Code.TRY_AGAIN_LATER, "the attachment was deleted while it was being made", str(attachment))
        return pod


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise CniError(Code.TRY_AGAIN_LATER, str(error)) from error
    except KernelError as error:
        raise CniError(Code.KERNEL_REFUSED, str(error)) from error


def _check_netns(netns: int, path: str) -> None:
    if not netlink.is_netns(netns):
        raise CniError(Code.INVALID_NETNS, "CNI_NETNS is not a network namespace", path)
    if netlink.same_netns(netns):
        raise CniError(Code.INVALID_NETNS, "plugin's netns and netns from CNI_NETNS should not be the same", path)


def _result(pod: Pod) -> Result:
    return Result(
        interfaces=(
            Interface(name=pod.device, mac=HOST_MAC, mtu=pod.mtu),
            Interface(name=pod.attachment.ifname, mac=pod.mac, mtu=pod.mtu, sandbox=pod.netns.path),
        ),
        addresses=tuple(ip_interface(address) for address in pod.addresses),
        gateways=tuple(str(GATEWAYS[address.version]) for address in pod.addresses),
        routes=tuple(
            Route(_DEFAULT_ROUTES[address.version], str(GATEWAYS[address.version])) for address in pod.addresses
        ),
    )
