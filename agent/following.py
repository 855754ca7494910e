"""How the agent follows its cluster: who tells of it, what is remembered, what it means for the own addresses."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from ipaddress import ip_address
from pathlib import Path

from agent.cluster import ClusterNode
from agent.config import Config
from agent.kubernetes import Api, ApiError, Herald, NodeSource, tell_once
from agent.listed import ListedNodes
from agent.membership import Membership
from agent.metrics import Metrics
from agent.pods import Pod
from agent.ranges import Range
from agent.readiness import Readiness
from agent.remembered import NAME, Remembered
from agent.state import Address, Network
from agent.store import Store

log = logging.getLogger(__name__)


class Following:
    """Follows the cluster that the configuration names or lists.

    What an earlier agent knew is in force from the beginning on: `membership` has it, and the store its ranges.
    """

    def __init__(self, config: Config, path: Path | None, store: Store, readiness: Readiness) -> None:
        """`path` is the file that the configuration came from, if it came from one."""
        self._config = config
        self._store = store
        self._readiness = readiness
        self._changed: Callable[[], None] = lambda: None
        self._refused: Callable[[], Mapping[str, str]] = dict
        self._own: ClusterNode | None = None
        self._may_have_outsiders = False
        self.membership = Membership(config.node_name, self._follow)
        self._source: NodeSource | None = None
        self._remembered = Remembered(config.paths.state / NAME)
        self._listed: ListedNodes | None = None
        readiness.refused = lambda: self.membership.cluster.refused.get(config.node_name, "")
        if config.kubernetes is None:
            self._listed = ListedNodes(config, path, self.membership.report)
        else:
            readiness.unaddressed = self.unaddressed
            self._recall()

    def poll(self) -> None:
        """Look whether the configuration lists other nodes now; see `agent.listed`."""
        if self._listed is not None:
            self._listed.poll()

    def start(
        self,
        changed: Callable[[], None],
        refused: Callable[[], Mapping[str, str]],
        metrics: Metrics,
        cleanup: ExitStack,
    ) -> None:
        """Follow the cluster, and tell it of this node, until `cleanup`; call `changed` after each change.

        `refused` tells whose pod CIDRs this node does not reach, and why, by name.
        """
        self._changed, self._refused = changed, refused
        settings = self._config.kubernetes
        if settings is None:
            return
        connect = partial(Api, settings.kubeconfig)
        source = NodeSource(connect, self._config.node_name, self._take)
        herald = Herald(
            connect=connect,
            node=self._config.node_name,
            own=lambda: source.own,
            is_ready=lambda: not self._readiness.unwell,
            cut_off=lambda: self._readiness.cut_off,
            troubles=self._troubles,
            startup_taint=settings.startup_taint,
        )
        self._source = source
        metrics.watch_source(lambda: not source.trouble)
        for each in (self._remembered, herald, source):
            cleanup.callback(each.stop)
            each.start()

    def unaddressed(self) -> str:
        """Say why this node has no addresses to give; empty if it has some."""
        name, cluster = self._config.node_name, self.membership.cluster
        if self._store.default_pools:
            return ""
        if not cluster.live:
            trouble = self._source.trouble if self._source else ""
            return f"the pod CIDR of node {name} is not known yet: {trouble or 'the API server is being asked'}"
        if cluster.own is None:
            return f"the cluster has no node {name}: is node_name right?"
        return f"node {name} has no pod CIDR yet: does the cluster assign them (--allocate-node-cidrs)?"

    def _recall(self) -> None:
        nodes = self._remembered.recall()
        if nodes:
            log.info("recalled the cluster nodes=%d", len(nodes))
            self.membership.report(nodes, self._config.cluster_cidrs, live=False)

    def _take(self, nodes: Sequence[ClusterNode]) -> None:
        """Remember a report before it has consequences, where it concerns the node itself."""
        own = next((each for each in nodes if each.name == self._config.node_name), None)
        self._remembered.keep(nodes, at_once=own != self._own)
        self._own = own
        self.membership.report(nodes, self._config.cluster_cidrs)

    def _follow(self) -> None:
        """Bring a change of the membership into force."""
        if self._config.kubernetes is not None:
            self._set_ranges()
        self._changed()

    def _set_ranges(self) -> None:
        cluster = self.membership.cluster
        ranges = [Range.of(each) for each in (cluster.own.pod_cidrs if cluster.own else ())]
        if {each.subnet for each in ranges} == set(self._store.subnets):
            return
        self._store.set_ranges(ranges)
        self._may_have_outsiders = True
        log.info("addresses for pods are those of ranges=%s", ",".join(str(each.subnet) for each in ranges) or "none")

    def _troubles(self) -> dict[str, str]:
        """Return what needs a person, by the reason of its event."""
        troubles = {"DatapathFailed": self._readiness.unproved}
        troubles["PodCIDRConflict"] = self._readiness.refused()
        if self._may_have_outsiders:  # only another pod CIDR makes new ones
            self._may_have_outsiders = False  # before looking, for the pod CIDRs may change meanwhile
            troubles["PodsOutsidePodCIDR"] = found = outsiders(self._store.pods(), self.membership.cluster.own)
            self._may_have_outsiders |= bool(found)
        refused = sorted((*self.membership.cluster.outlying.items(), *self._refused().items()))
        troubles["PodCIDRRefused"] = "; ".join(f"node {name}: {why}" for name, why in refused)
        if missing := self._readiness.no_tunnel():
            troubles["TunnelUnavailable"] = self._readiness.cut_off or f"no node needs the tunnel now, but {missing}"
        troubles["UnknownServices"] = unknown_services(self._config, os.environ)
        return {reason: message for reason, message in troubles.items() if message}


def outsiders(pods: Iterable[Pod], own: ClusterNode | None) -> str:
    """Say which pods have an address that the node's pod CIDRs no longer have, as when its Node was made anew; or "".

    Only of pods with addresses from the agent's own ranges: what another range was asked for is its owner's business.
    """
    cidrs = own.pod_cidrs if own else ()
    outside = [pod for pod in pods if not pod.subnets and any(not _is_in(each, cidrs) for each in pod.addresses)]
    if not cidrs or not outside:
        return ""
    first, known = outside[0], ", ".join(map(str, cidrs))
    return (
        f"other nodes do not reach pods whose addresses are not in this node's pod CIDRs ({known}): "
        f"delete them, so that they are made again; {len(outside)} in all, the first is "
        f"{first.pod_name or first.attachment} ({', '.join(map(str, first.addresses))})"
    )


def _is_in(address: Address, cidrs: Iterable[Network]) -> bool:
    return any(address in each for each in cidrs)


def unknown_services(config: Config, environment: Mapping[str, str]) -> str:
    """Say that the configuration lacks the services' addresses, as far as the agent's environment shows; else empty.

    Every pod's environment has the address of one service, the API server's, unless somebody has put another there.
    What is in none of the `service_cidrs` goes past kube-proxy, into the world.
    """
    try:
        address = ip_address(environment.get("KUBERNETES_SERVICE_HOST", ""))
    except ValueError:  # nothing, or a name that somebody has given
        return ""
    is_asked = config.kubernetes is not None and config.kubernetes.kubeconfig is None
    if not is_asked or any(address in each for each in config.masquerade.service_cidrs):
        return ""
    return f"masquerade.service_cidrs lack {address}, where the API server's service is: pods reach no services"


def tell_failure(config: Config, failure: str) -> None:
    """Write an event that says why the agent cannot start, where there is a cluster to hear it."""
    if config.kubernetes is None:
        return
    try:
        tell_once(partial(Api, config.kubernetes.kubeconfig), config.node_name, "StartFailed", failure)
    except ApiError as error:
        log.warning("cannot tell the cluster about the failure error=%r", str(error))
