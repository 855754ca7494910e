"""What lies outside, as it is now: the node's uplinks and addresses, and the rules of masquerading."""

from __future__ import annotations

import logging

from agent import masquerade, netlink
from agent.config import Config
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
        self._own: tuple[Network, ...] = ()
        self._prefixes: dict[Network, Lanes] = {}
        self._settings = masquerade.settings(config.masquerade)
        self._known: Outside | None = None

    def outside(self, own: tuple[Network, ...]) -> Outside:
        """Return what the plan must know; `own` are the subnets of the node's own ranges. Raises KernelError."""
        now = Outside(
            uplinks=netlink.uplinks(self._config.masquerade.uplinks),
            node_addresses=netlink.node_addresses(),
            prefixes=self._current_prefixes(own),
            settings=self._settings,
        )
        if self._known is None or now.uplinks != self._known.uplinks:
            _tell(now)
        self._known = now
        return now

    @property
    def known(self) -> Outside:
        """What `outside` last returned; empty before."""
        return self._known or Outside()

    def _current_prefixes(self, own: tuple[Network, ...]) -> dict[Network, Lanes]:
        rules: Rules = self._file.current() if self._file else self._rules
        if not self._prefixes or (rules, own) != (self._rules, self._own):
            self._rules, self._own = rules, own
            self._prefixes = masquerade.prefixes(self._config.masquerade, rules, own)
        return self._prefixes


def _tell(outside: Outside) -> None:
    if not outside.uplinks:
        log.warning("no uplinks: pods reach nothing outside this node; see masquerade.uplinks in the configuration")
    for device, uplink in sorted(outside.uplinks.items()):
        log.info("uplink device=%s ipv4=%s ipv6=%s", device, uplink.sources.ipv4, uplink.sources.ipv6)
