"""What the CNI commands do on this node: the store, the veth pairs and the loop, in the order that loses nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_interface

from agent import check, host_ports, netlink, podroutes, supply
from agent.config import IPV6_MIN_MTU
from agent.loop import Loop
from agent.readiness import Readiness
from agent.store import AddressNotInRange, Netns, Origin, Phase, Pod, Store, StoreError
from agent.translated import translated
from agent.wiring import GATEWAYS, HOST_MAC, Wiring, device_name, netns_id, pod_mac
from cni.call import Attachment, Call
from cni.delegate import Delegate, Refusal
from cni.errors import CniError, Code
from cni.result import Dns, Interface, Ip, Result, Route
from cni.wire import Request

__all__ = ["Node", "Readiness"]

log = logging.getLogger(__name__)

# Below the launcher's deadlines (60 s for ADD, 10 s for DEL), so that the runtime hears the reason.
_ADD_SECONDS = 20.0
_DEL_SECONDS = 8.0


class Node:
    """Implements `cni.commands.Node`. Thread-safe."""

    def __init__(
        self,
        *,
        store: Store,
        wiring: Wiring,
        loop: Loop,
        mtu: Callable[[], int],
        readiness: Readiness,
        masqueraded_ports: range = range(0),
    ) -> None:
        """`mtu` tells that of a new pod, in bytes, where its network says nothing; it may raise KernelError.

        None of the `masqueraded_ports` can be a host port.
        """
        self._store = store
        self._wiring = wiring
        self._loop = loop
        self._mtu = mtu
        self._readiness = readiness
        self._masqueraded_ports = masqueraded_ports
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

    def is_at_work(self, attachment: Attachment) -> bool:
        """Say whether a call has its `turn`."""
        with self._turns:
            return attachment in self._at_work

    def refuse_own_netns(self, netns: int, path: str) -> None:
        """See `cni.commands.Node`."""
        if netlink.same_netns(netns):
            raise CniError(Code.INVALID_NETNS, "plugin's netns and netns from CNI_NETNS should not be the same", path)

    def reserve(self, call: Call, request: Request, netns: int) -> None:
        """See `cni.commands.Node`.

        Codes: 7 for a bad configuration or request, 8 for a bad namespace, 11 before the datapath is proved or the
        node's own addresses are known, 100 for a second ADD, 101 for no free address, 105 for an address, MAC or host
        port that another pod has.
        """
        if reason := self._readiness.unproved or self._readiness.refused():
            raise CniError(Code.TRY_AGAIN_LATER, "podlane cannot serve ADD now", reason)
        source = supply.of(call)
        if reason := self._unaddressed(source):
            raise CniError(Code.TRY_AGAIN_LATER, "podlane cannot serve ADD now", reason)
        published = host_ports.read(call.config.runtime_config.port_mappings, self._masqueraded_ports)
        _check_netns(netns, call)
        with translated():
            pod = self._store.reserve(
                call.attachment,
                device=device_name(call.attachment),
                mac=call.requested_mac or pod_mac(call.attachment),
                mtu=call.config.mtu or self._mtu(),
                netns=Netns(call.netns_path, netns_id(netns)),
                pools=source.pools,
                requested=source.requested,
                sticky=source.sticky,
                pod_name=_pod_name(call),
                masquerade=call.config.masquerade,
                limits=call.config.runtime_config.bandwidth,
                origin=_origin(request),
                published=published,
            )
            if call.requested_mac:
                self._refuse_shared_mac(pod)  # now that the row is there: two calls at a time cannot miss each other
        log.info("reserved pod=%s addresses=%s", _label(pod), _addresses(pod))

    def _refuse_shared_mac(self, pod: Pod) -> None:
        """Refuse a requested MAC that is another's: by the link-local addresses nobody could tell the two apart."""
        holders = [
            str(other.attachment)
            for other in self._store.pods()
            if other.mac == pod.mac and other.attachment != pod.attachment and other.phase is not Phase.IMPORTED
        ]
        if pod.mac == HOST_MAC:
            holders = ["the node's own end of every pod's link"]
        if holders:
            self._store.remove(pod.attachment)
            raise CniError(Code.ADDRESS_TAKEN, f"MAC address {pod.mac} is in use by {', '.join(holders)}")

    def connect(self, call: Call, request: Request, netns: int) -> Result:
        """See `cni.commands.Node`. Codes: 102 when the kernel refuses, 11 when it takes too long, 105."""
        pod, source = self._known(call.attachment), supply.of(call)
        given = self._leased(pod, source, call, request)
        pod = self._noted(pod, given, call)
        _check_mtu(pod)
        host_ports.check_families(pod)
        routes = None
        if given is not None:
            default = call.config.is_default_gateway
            routes = podroutes.pod_routes(given, GATEWAYS, is_default_gateway=default)
        with translated():
            self._loop.refuse_own(pod.addresses)
            self._wiring.create(pod, netns)
            self._loop.sync(_ADD_SECONDS)
            self._loop.check(pod)
            routes = self._wiring.configure(pod, netns, routes)
        return _result(pod, routes, supply.dns(call.config, given))

    def _leased(self, pod: Pod, source: supply.Supply, call: Call, request: Request) -> Result | None:
        try:
            return source.lease(pod, call, request)
        except Refusal:
            # Were the row kept, and the delegate's DEL as impossible as its ADD, each retry would leave one more.
            with translated():
                self._store.remove(pod.attachment)
            raise

    def _noted(self, pod: Pod, given: Result | None, call: Call) -> Pod:
        """Note the subnets that IPAM names, and the addresses if a delegate gave them."""
        if given is None:
            return pod
        addresses = () if pod.addresses else tuple(ip.address.ip for ip in given.ips)
        subnets = podroutes.subnets(given, with_gateway=call.config.node_is_gateway)
        with translated():
            if not self._store.assign(pod.attachment, addresses, subnets):
                raise _deleted(pod.attachment)
        if addresses:
            pod = replace(pod, addresses=addresses)
            log.info("assigned pod=%s addresses=%s", _label(pod), _addresses(pod))
        return replace(pod, subnets=subnets)

    def commit(self, call: Call, result: Result) -> None:
        """See `cni.commands.Node`. Code 11 if a DEL came in between, or the node's own pod CIDRs changed."""
        own = [each.address.ip for each in result.ips] if supply.of(call).pools is None else []
        with translated():
            try:
                is_active = self._store.activate(call.attachment, podroutes.encode(result.routes), own)
            except AddressNotInRange as error:  # other nodes may have no way to these any more, or another one
                raise CniError(Code.TRY_AGAIN_LATER, "the node's pod CIDRs have changed", str(error)) from error
        if not is_active:
            raise _deleted(call.attachment)
        log.info("attached pod=%s", call.attachment)

    def release(self, attachment: Attachment, request: Request | None = None) -> None:
        """See `cni.commands.Node`. The addresses are free only when nothing in the kernel knows them any more."""
        with translated():
            known = self._store.begin_release(attachment)
            pod = self._store.get(attachment) if known else None
            if pod is not None:
                self._wiring.delete(pod.device)
                self._loop.sync(_DEL_SECONDS)
                # A repair that was under way may have made it again; the pass that has just ended makes no more.
                self._wiring.delete(pod.device)
                self._wiring.forget(pod)
        supply.give_back(request, pod.origin if pod else Origin())
        if pod is not None:
            with translated():
                self._store.remove(attachment)
            log.info("released pod=%s", _label(pod))

    def check(self, call: Call, request: Request, netns: int, prev: Result) -> None:
        """See `cni.commands.Node`. Codes 8, 102 and 103, and those of a delegate."""
        _check_netns(netns, call)
        with translated():
            pod = self._store.get(call.attachment)
        if delegate := supply.of(call).delegate:
            stdin = supply.as_given(call, request.stdin, prev, pod) if pod else request.stdin
            delegate.check(request.env, stdin)
        with translated():
            is_active = pod is not None and pod.phase is Phase.ACTIVE
            if pod is not None and is_active and check.has_new_mac(pod, netns):
                self._loop.sync(_ADD_SECONDS, look=True)  # a plugin after podlane may have changed it a moment ago
            check.check(call.attachment, pod, prev, netns, call.config.runtime_config.bandwidth)
            if pod is not None and is_active:
                self._loop.sync(_ADD_SECONDS, look=True)  # what was changed since the last full pass counts too
                self._loop.check(pod)

    def gc(self, call: Call, request: Request) -> None:
        """See `cni.commands.Node`. Attachments that a call is at work on are left alone: the list may be older."""
        failures: list[CniError] = []
        for attachment in self._invalid(call):
            try:
                with self.turn(attachment):
                    log.info("GC releases pod=%s", attachment)
                    self.release(attachment)
            except CniError as error:
                failures.append(error)
        try:
            if delegate := supply.of(call).delegate:
                delegate.gc(request.env, request.stdin)
        except CniError as error:
            failures.append(error)
        if failures:
            message = "; ".join(error.message for error in failures)
            raise CniError(failures[0].code, message, "; ".join(filter(None, (error.details for error in failures))))

    def _invalid(self, call: Call) -> list[Attachment]:
        valid = call.config.valid_attachments
        if valid is None:
            return []
        with self._turns:
            at_work = set(self._at_work)
        with translated():
            settled = [pod.attachment for pod in self._store.pods() if pod.phase is not Phase.RESERVED]
        of_network = [each for each in settled if each.network == call.config.name and each not in at_work]
        return [each for each in of_network if (each.container_id, each.ifname) not in valid]

    def status(self, call: Call, request: Request) -> None:
        """See `cni.commands.Node`. Code 51 if running pods may be cut off too, else 50; and those of a delegate."""
        if reason := self._readiness.limited:
            raise CniError(Code.NOT_AVAILABLE_LIMITED, "podlane cannot serve ADD now", reason)
        source = supply.of(call)
        try:
            reason = (
                self._readiness.refused()
                or self._unaddressed(source)
                or self._readiness.uninstalled
                or self._store.exhausted(source.pools)
            )
        except StoreError as error:
            reason = str(error)
        if reason:
            raise CniError(Code.NOT_AVAILABLE, "podlane cannot serve ADD now", reason)
        if source.delegate:
            _ask(source.delegate, request)

    def _unaddressed(self, source: supply.Supply) -> str:
        """Say why there are no addresses for calls that want the agent's own; empty if there are."""
        return self._readiness.unaddressed() if source.pools is None else ""

    def _known(self, attachment: Attachment) -> Pod:
        with translated():
            pod = self._store.get(attachment)
        if pod is None:
            raise _deleted(attachment)
        return pod


def _ask(delegate: Delegate, request: Request) -> None:
    """Ask a delegate for its STATUS; one that has no say says 50. What it does say comes out as it is."""
    try:
        delegate.status(request.env, request.stdin)
    except CniError as error:
        if error.code != Code.DELEGATE_FAILED:
            raise
        raise CniError(Code.NOT_AVAILABLE, error.message, error.details) from error


def _deleted(attachment: Attachment) -> CniError:
    return CniError(Code.TRY_AGAIN_LATER, "the attachment was deleted while it was being made", str(attachment))


def _check_netns(netns: int, call: Call) -> None:
    if not netlink.is_netns(netns):
        raise CniError(Code.INVALID_NETNS, "CNI_NETNS is not a network namespace", call.netns_path)


def _check_mtu(pod: Pod) -> None:
    """Refuse what the kernel has no IPv6 for (RFC 8200 section 5), in other words than its own."""
    if pod.mtu < IPV6_MIN_MTU and any(address.version == 6 for address in pod.addresses):
        raise CniError(Code.INVALID_NETWORK_CONFIG, f"mtu {pod.mtu}: IPv6 needs {IPV6_MIN_MTU} at least")


def _pod_name(call: Call) -> str:
    return "/".join(part for part in call.pod if part)


def _origin(request: Request) -> Origin:
    variables = {name: value for name, value in request.env.items() if name.startswith("CNI_")}
    return Origin(variables, request.stdin)


def _label(pod: Pod) -> str:
    """Return the pod's name in a log line, with Kubernetes' name for it if there is one."""
    return f"{pod.attachment} name={pod.pod_name}" if pod.pod_name else str(pod.attachment)


def _addresses(pod: Pod) -> str:
    return ",".join(map(str, pod.addresses))


def _result(pod: Pod, routes: tuple[Route, ...], dns: Dns) -> Result:
    return Result(
        interfaces=(
            Interface(name=pod.device, mac=HOST_MAC, mtu=pod.mtu),
            Interface(name=pod.attachment.ifname, mac=pod.mac, mtu=pod.mtu, sandbox=pod.netns.path),
        ),
        ips=tuple(Ip(ip_interface(address), GATEWAYS[address.version], interface=1) for address in pod.addresses),
        routes=routes,
        dns=dns,
    )
