"""Who is in the cluster, between the sources that report it and the loop that follows it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence

from agent.cluster import Cluster, ClusterNode, settle
from agent.state import Network

log = logging.getLogger(__name__)


class Membership:
    """What was reported last. Thread-safe; sources report, others read `cluster`."""

    def __init__(self, own_name: str, changed: Callable[[], None]) -> None:
        """Call `changed` after each report that differs from the one before, in the thread that reports."""
        self._own_name = own_name
        self._changed = changed
        self._lock = threading.Lock()
        self._cluster = Cluster()

    @property
    def cluster(self) -> Cluster:
        """The cluster as it is known now."""
        return self._cluster

    def report(self, nodes: Iterable[ClusterNode], cluster_cidrs: Sequence[Network] = (), *, live: bool = True) -> None:
        """Replace what is known by these nodes: all there are, the own one among them.

        If there are `cluster_cidrs`, no node has a pod CIDR that is not within one of them.
        """
        with self._lock:
            cluster = settle(nodes, self._own_name, cluster_cidrs, live=live)
            if cluster == self._cluster:
                return
            _tell(self._cluster, cluster)
            self._cluster = cluster
        self._changed()


def _tell(before: Cluster, now: Cluster) -> None:
    nodes = len(now.peers) + bool(now.own)
    log.log(logging.DEBUG if now.live and before.live else logging.INFO, "cluster nodes=%d live=%s", nodes, now.live)
    for name in sorted(now.refused):
        if now.refused[name] != before.refused.get(name):
            log.error("a node is refused what it claims: %s node=%s", now.refused[name], name)
    for name in sorted(before.refused.keys() - now.refused.keys()):
        log.info("a node is refused nothing any more node=%s", name)
