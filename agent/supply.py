"""Where a pod's addresses come from: which IPAM serves a call is decided here, and nowhere else.

Without `ipam` in the network configuration it is the agent's own ranges, with `ipam.type` "podlane" podlane's own IPAM
(`agent.ipam`), with any other type the plugin of that name on CNI_PATH.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_interface
from typing import Any

from agent import ipam
from agent.ranges import Pool, fits_no_pod
from agent.resolv import read_resolv_conf
from agent.state import Address
from agent.store import Origin, Pod
from cni.call import Call
from cni.delegate import Delegate
from cni.document import decode, lookup
from cni.errors import CniError, Code
from cni.netconf import NetConf
from cni.result import Dns, Ip, Result
from cni.wire import Request

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Supply:
    """The IPAM of a call: what the store has to give, and who says the rest.

    `pools` are those to take addresses from, None means the agent's own; with a `delegate` there are none.
    """

    pools: tuple[Pool, ...] | None = None
    requested: tuple[Address, ...] = ()
    own: ipam.OwnIpam | None = None
    delegate: Delegate | None = None

    @property
    def sticky(self) -> bool:
        """Whether a pod of the same name shall get its former addresses."""
        return self.own is not None and self.own.sticky

    def lease(self, pod: Pod, call: Call, request: Request) -> Result | None:
        """Return what IPAM gives this reserved pod: addresses with their subnets, gateways, routes, DNS settings.

        None for the agent's own ranges, which say nothing of the kind. Raises CniError.
        """
        if self.delegate is not None:
            given = self.delegate.add(request.env, request.stdin, call.config.cni_version)
            _check_given(self.delegate, given)
            return given
        if self.own is None:
            return None
        for note in self.own.notes:
            log.info("pod=%s %s", pod.attachment, note)
        dns = read_resolv_conf(self.own.resolv_conf) if self.own.resolv_conf else Dns()
        return self.own.result(pod.addresses, dns)


def of(call: Call) -> Supply:
    """Return the supply of a valid call. Raises CniError 7."""
    config = call.config
    ranges = config.runtime_config.ip_ranges
    if config.ipam and not config.ipam_type:
        raise CniError(
            Code.INVALID_NETWORK_CONFIG,
            f'ipam has no type: allowed are "{ipam.TYPE}", the name of an IPAM plugin, or no ipam',
            f"its keys are {', '.join(config.ipam)}",
        )
    if config.ipam_type not in ("", ipam.TYPE):
        return Supply(pools=(), delegate=Delegate(config.ipam_type, call.path))
    requested = ipam.parse_requests(call.requested_ips)
    if not config.ipam and not ranges:
        return Supply(requested=requested)
    own = ipam.read(config.ipam or {}, network=config.name, version=config.cni_version, ip_ranges=ranges)
    _check_pools(own.pools)
    return Supply(pools=own.pools, requested=requested, own=own)


def dns(config: NetConf, given: Result | None) -> Dns:
    """Return the DNS settings of a result: those of the call in place of IPAM's, not beside them."""
    if config.dns is not None:
        return config.dns
    return given.dns if given else Dns()


def give_back(request: Request | None, origin: Origin) -> None:
    """Have delegates take back what they gave: the one of the call, and that of ADD if it was another.

    An attachment that podlane does not know may still be known to the delegate. Raises CniError.
    """
    calls = [] if request is None else [(request.env, request.stdin)]
    if request is None or _ipam_of(request.stdin) != _ipam_of(origin.stdin):
        calls.append((origin.environment, origin.stdin))
    for environment, stdin in calls:
        if kind := _delegate_of(stdin):
            path = tuple(each for each in environment.get("CNI_PATH", "").split(":") if each)
            Delegate(kind, path).delete(environment, stdin)


def as_given(call: Call, stdin: bytes, prev: Result, pod: Pod) -> bytes:
    """Return the configuration of a CHECK with prevResult as the delegate knows it.

    ADD has put the pod's own gateways and prefix lengths in place of the delegate's, and static compares gateways.
    """
    given = replace(prev, ips=tuple(_as_given(ip, pod) for ip in prev.ips))
    if given == prev:
        return stdin
    rest = {key: value for key, value in decode(stdin).items() if key.casefold() != "prevresult"}
    return json.dumps({**rest, "prevResult": given.to_json(call.config.cni_version)}).encode()


def _as_given(ip: Ip, pod: Pod) -> Ip:
    address = ip.address.ip
    subnet = next((each for each in pod.subnets if address in each.network), None)
    if subnet is None or address not in pod.addresses:
        return ip
    return replace(ip, address=ip_interface(f"{address}/{subnet.network.prefixlen}"), gateway=subnet.named)


def is_delegated(origin: Origin) -> bool:
    """Say whether a delegate has to take back what an attachment has."""
    return bool(_delegate_of(origin.stdin))


def _delegate_of(stdin: bytes) -> str:
    """Return the name of the plugin that a configuration's addresses are from; empty if they are podlane's."""
    kind = lookup(_ipam_of(stdin), "type")
    return kind if isinstance(kind, str) and kind != ipam.TYPE else ""


def _ipam_of(stdin: bytes) -> Mapping[str, Any]:
    """Return the `ipam` object of a configuration; empty if there is none, or the configuration is not readable."""
    try:
        found = lookup(decode(stdin), "ipam")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _check_pools(pools: Iterable[Pool]) -> None:
    """Refuse ranges whose addresses no pod can use."""
    for each in (each for pool in pools for each in pool.ranges):
        if fits_no_pod(each.first) or fits_no_pod(each.last):
            raise CniError(Code.INVALID_NETWORK_CONFIG, f"ipam: no pod can have an address of {each}")


def _check_given(delegate: Delegate, given: Result) -> None:
    """Refuse a result that no pod can use."""
    if not given.ips:
        raise CniError(Code.DELEGATE_FAILED, f"IPAM plugin {delegate.type} returned missing IP config")
    for address in (ip.address.ip for ip in given.ips):
        if fits_no_pod(address):
            raise CniError(
                Code.DELEGATE_FAILED,
                f"IPAM plugin {delegate.type} gave {address}: no pod can have that address",
            )
