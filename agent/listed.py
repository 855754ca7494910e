"""The nodes that the configuration file lists, for clusters that have no Kubernetes: read again when it changes.

So are the prefixes that bound what a node may claim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from agent.cluster import ClusterNode
from agent.config import Config, ConfigError, load
from agent.state import Network

log = logging.getLogger(__name__)

Report = Callable[[Sequence[ClusterNode], Sequence[Network]], None]
"""Takes the nodes, and the configuration's `cluster_cidrs`."""

_READ_AGAIN = ("nodes", "cluster_cidrs")  # keys


class ListedNodes:
    """Reports the list of `nodes`, with every call of `poll` that finds another one. Not thread-safe."""

    def __init__(self, config: Config, path: Path | None, report: Report) -> None:
        """`path` is the file that the configuration came from, if it came from one."""
        self._config = config
        self._path = path
        self._text: str | None = None
        self._report = report
        self._trouble = ""
        report(cluster_nodes(config), config.cluster_cidrs)

    def poll(self) -> None:
        """Look at the file. While it cannot be used, the last list stays in force; why is logged once."""
        if self._path is None:
            return
        try:
            text = self._path.read_text()
            if text == self._text:
                return
            config = load(self._path)
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            if str(error) != self._trouble:
                log.error("bad configuration, the last good list of nodes stays in force error=%r", str(error))
            self._trouble = str(error)
            return
        self._text, self._trouble = text, ""
        if config.model_copy(update={key: getattr(self._config, key) for key in _READ_AGAIN}) != self._config:
            keys = " and ".join(_READ_AGAIN)
            log.warning("the configuration has changed: all but its %s takes effect when the agent starts again", keys)
        if any(getattr(config, key) != getattr(self._config, key) for key in _READ_AGAIN):
            log.info("nodes listed count=%d", len(config.nodes))
            self._report(cluster_nodes(config), config.cluster_cidrs)
        self._config = config


def cluster_nodes(config: Config) -> list[ClusterNode]:
    """Return the nodes that a configuration lists; this one is always among them, with its ranges."""
    nodes = [ClusterNode(each.name, each.addresses, each.pod_cidrs) for each in config.nodes]
    if all(each.name != config.node_name for each in nodes):
        nodes.append(ClusterNode(config.node_name, (), tuple(each.subnet for each in config.ranges)))
    return nodes
