"""What lies outside, as it is now: the node's uplinks and addresses, and the rules of masquerading."""

from __future__ import annotations

import logging
from dataclasses import replace

from agent import cgroup, masquerade, netlink
from agent.config import Config
from agent.datapath.sockets import CALLS
from agent.ipmasq import Rules, RulesFile
from agent.plan import Outside
from agent.state import Lanes, Network

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
        self._settings = replace(masquerade.settings(config.masquerade), netns=netlink.own_netns_cookie())
        self.cgroup = cgroup.find()
        if self.cgroup is None:
            log.warning("no cgroup2 is mounted: the node's own processes do not reach host ports")
        self._known: Outside | None = None  # before the first look

    def outside(self) -> Outside:
        """Return what the plan must know. Raises KernelError."""
        now = Outside(
            uplinks=netlink.uplinks(self._config.masquerade.uplinks),
            node_addresses=netlink.node_addresses(),
            prefixes=self._current_prefixes(),
            settings=self._settings,
            mtu=self._pod_mtu(),
            sockets=dict.fromkeys(CALLS, cgroup.number(self.cgroup)) if self.cgroup else {},
        )
        _tell(now, self._known)
        self._known = now
        return now

    @property
    def known(self) -> Outside:
        """What `outside` last returned; empty before."""
        return self._known or Outside()

    def mtu(self) -> int:
        """Return the MTU of a pod that is made now, in bytes. Raises KernelError.

        As it was at the last look: a change of the uplink's leads to the next one, and each ADD would spend a
        millisecond on its own.
        """
        return self.known.mtu or self._pod_mtu()

    def _pod_mtu(self) -> int:
        return self._config.mtu or netlink.uplink_mtu()

    def _current_prefixes(self) -> dict[Network, Lanes]:
        rules: Rules = self._file.current() if self._file else self._rules
        if rules != self._rules:
            self._rules = rules
            self._prefixes = masquerade.prefixes(self._config, rules)
        return self._prefixes


def _tell(outside: Outside, before: Outside | None) -> None:
    """Log what is new."""
    if before is None or outside.mtu != before.mtu:
        log.info("new pods have mtu=%d", outside.mtu)
    if before is not None and outside.uplinks == before.uplinks:
        return
    if not outside.uplinks:
        log.warning("no uplinks: pods reach nothing outside this node; see masquerade.uplinks in the configuration")
    for device, uplink in sorted(outside.uplinks.items()):
        log.info("uplink device=%s ipv4=%s ipv6=%s", device, uplink.sources.ipv4, uplink.sources.ipv6)
