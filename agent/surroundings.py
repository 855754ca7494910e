"""What lies outside, as it is now: the node's uplinks and addresses, and the rules of masquerading."""

from __future__ import annotations

import logging
from dataclasses import replace

from agent import masquerade, netlink
from agent.cluster import Cluster, ClusterNode
from agent.config import Config
from agent.ipmasq import Rules, RulesFile
from agent.peers import Place, Ways
from agent.plan import Outside
from agent.state import Address

log = logging.getLogger(__name__)


class Surroundings:
    """Looks around anew with every call of `outside`."""

    def __init__(self, config: Config) -> None:
        """Read the file of ip-masq-agent's, if the configuration names one. Raises ConfigError."""
        self._config = config
        path = config.masquerade.config_file
        self._file = RulesFile(path) if path else None
        self._rules = masquerade.inline_rules(config.masquerade)
        self._prefixes = masquerade.prefixes(config, self._rules)
        self._settings = masquerade.settings(config.masquerade)
        self._ways = Ways()
        self._known: Outside | None = None

    def outside(self, cluster: Cluster, *, look: bool = True) -> Outside:
        """Return what the plan must know; unless it is to `look`, of the node itself what it found the last time.

        Raises KernelError.
        """
        now = self._known
        if look or now is None:
            now = Outside(
                uplinks=netlink.uplinks(self._config.masquerade.uplinks),
                node_addresses=netlink.node_addresses(),
                settings=self._settings,
            )
            if self._known is None or now.uplinks != self._known.uplinks:
                _tell(now)
            self._current_prefixes()
        place = Place(
            routing=self._config.routing,
            uplinks=tuple(now.uplinks.values()),
            addresses=_own_addresses(now, cluster.own),
            prefixes=self._prefixes,
        )
        peers = self._ways.find(place, cluster)
        self._known = replace(now, prefixes=peers.prefixes, peer_routes=peers.routes, live=cluster.live)
        return self._known

    @property
    def known(self) -> Outside:
        """What `outside` last returned; empty before."""
        return self._known or Outside()

    def _current_prefixes(self) -> None:
        rules: Rules = self._file.current() if self._file else self._rules
        if rules != self._rules:
            self._rules = rules
            self._prefixes = masquerade.prefixes(self._config, rules)


def _own_addresses(outside: Outside, own: ClusterNode | None) -> tuple[Address, ...]:
    """Return the node's addresses towards other nodes: those that the cluster knows, as far as it has them."""
    if own and (known := tuple(each for each in own.addresses if each in outside.node_addresses)):
        return known
    sources = [each.sources for each in outside.uplinks.values()]
    ipv4 = next((each.ipv4 for each in sources if each.ipv4), None)
    ipv6 = next((each.ipv6 for each in sources if each.ipv6), None)
    return tuple(each for each in (ipv4, ipv6) if each)


def _tell(outside: Outside) -> None:
    if not outside.uplinks:
        log.warning("no uplinks: pods reach nothing outside this node; see masquerade.uplinks in the configuration")
    for device, uplink in sorted(outside.uplinks.items()):
        log.info("uplink device=%s ipv4=%s ipv6=%s", device, uplink.sources.ipv4, uplink.sources.ipv6)
