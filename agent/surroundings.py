"""What lies outside, as it is now: the node's uplinks and addresses, and the rules of masquerading."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address

from agent import cgroup, masquerade, netlink
from agent.cluster import Cluster, ClusterNode
from agent.config import IPV6_MIN_MTU, Config
from agent.datapath.sockets import CALLS
from agent.ipmasq import Rules, RulesFile
from agent.peers import WRAPPING, Peers, Place, Ways
from agent.plan import Outside, Tunnel
from agent.state import Address, Lanes, Network, TunnelDevice, TunnelEnd, Uplink

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Seen:
    """What was found by looking at the node, which the cluster calls by the addresses `named`.

    `mtu` is that of its uplinks, of those to the world and to other nodes the smallest, and `paths` those known to
    others, in bytes.
    """

    named: tuple[Address, ...]
    uplinks: Mapping[str, Uplink]
    node_addresses: frozenset[Address]
    mtu: int
    paths: Mapping[Address, int]
    sockets: Mapping[str, int]


class Surroundings:
    """Looks around anew with every call of `outside`, unless told not to."""

    def __init__(self, config: Config, tunnel_mac: str) -> None:
        """Read the file of ip-masq-agent's, if the configuration names one. Raises ConfigError."""
        self._config = config
        self._tunnel_mac = tunnel_mac
        path = config.masquerade.config_file
        self._file = RulesFile(path) if path else None
        self._rules = masquerade.inline_rules(config.masquerade)
        self._prefixes: dict[Network, Lanes] = {}
        self._prefixes_of: tuple[Rules, tuple[Network, ...]] | None = None
        self._settings = replace(masquerade.settings(config.masquerade), netns=netlink.own_netns_cookie())
        self._settings_with_tunnel = replace(self._settings, tunnel_port=config.tunnel.port)
        self.cgroup = cgroup.find()
        if self.cgroup is None:
            log.warning("no cgroup2 is mounted: the node's own processes do not reach host ports")
        self._ways = Ways()
        self._peers = Peers()
        self._overhead = 0
        self._seen: _Seen | None = None
        self._is_stranger = False
        self._known = Outside()

    def outside(self, cluster: Cluster, ranges: tuple[Network, ...], *, look: bool = True) -> Outside:
        """Return what the plan must know; unless it is to `look`, of the node itself what it found the last time.

        `ranges` are the subnets of the node's own. The same object, if it knows of no change. Raises KernelError.
        """
        named = cluster.own.addresses if cluster.own else ()
        seen = self._seen
        if seen is None or look or named != seen.named:
            seen = self._seen = self._look(named)
        own = _own_addresses(seen, cluster.own)
        self._tell_of_stranger(own, cluster)
        self._overhead = self._wrapping(cluster, own)
        tunnel = self._tunnel(seen.mtu, own) if self._overhead and cluster.peers else None
        place = Place(
            routing=self._config.routing,
            uplinks=tuple(seen.uplinks.values()),
            addresses=own,
            tunnel=tunnel.ifindex if tunnel else 0,
            tunnel_mtu=tunnel.device.mtu if tunnel else 0,
            mtu=seen.mtu,
            prefixes=self._current_prefixes(ranges),
        )
        peers = self._ways.find(place, cluster, seen.paths)
        _tell_refused(peers, self._peers)
        self._peers = peers
        now = Outside(
            uplinks=seen.uplinks,
            node_addresses=seen.node_addresses,
            prefixes=peers.prefixes,
            settings=self._settings_with_tunnel if self._overhead else self._settings,
            tunnel=tunnel,
            peer_routes=peers.routes,
            live=cluster.live,
            mtu=self._pod_mtu(seen.mtu),
            sockets=seen.sockets,
        )
        if now != self._known:
            _tell(now, self._known)
            self._known = now
        return self._known

    @property
    def known(self) -> Outside:
        """What `outside` last returned; empty before."""
        return self._known

    @property
    def peers(self) -> Peers:
        """The ways to other nodes, as they were when `outside` was last called."""
        return self._peers

    def mtu(self) -> int:
        """Return the MTU of a pod that is made now, in bytes. Raises KernelError.

        As it was at the last look: a change of the uplink's leads to the next one, and each ADD would spend a
        millisecond on its own.
        """
        return self._known.mtu or self._pod_mtu(netlink.uplink_mtu())

    def _pod_mtu(self, uplink_mtu: int) -> int:
        return self._config.mtu or _inside(uplink_mtu, self._overhead)

    def _tell_of_stranger(self, own: Sequence[Address], cluster: Cluster) -> None:
        """Log if others cannot know what comes from here: what they have wrapped, they take for forged."""
        known = cluster.own.addresses if cluster.own else ()
        is_wrapping = bool(cluster.live and cluster.peers) and self._config.routing != "direct"
        is_stranger = is_wrapping and not set(own).intersection(known)
        if is_stranger != self._is_stranger:
            addresses = {"known": known, "own": own}
            words = " ".join(f"{name}={','.join(map(str, each)) or 'none'}" for name, each in addresses.items())
            if is_stranger:
                log.warning(
                    "other nodes do not know this one by an address that it has, and drop what it wraps %s", words
                )
            else:
                log.info("other nodes know this one by its own addresses %s", words)
        self._is_stranger = is_stranger

    def _look(self, named: tuple[Address, ...]) -> _Seen:
        ways = netlink.hops()  # once: among thousands of routes it takes 10 ms
        uplinks = netlink.uplinks(self._config.masquerade.uplinks, ways)
        leading_to_nodes = {
            uplink.ifindex
            for uplink in uplinks.values()
            if any(address in network for network in uplink.networks for address in named)
        }
        if self._file:
            self._rules = self._file.current()
        return _Seen(
            named,
            uplinks,
            netlink.node_addresses(),
            netlink.uplink_mtu(netlink.default_devices(ways) | leading_to_nodes),
            netlink.path_mtus() if self._overhead else {},
            dict.fromkeys(CALLS, cgroup.number(self.cgroup)) if self.cgroup else {},
        )

    def _wrapping(self, cluster: Cluster, own: Sequence[Address]) -> int:
        """Return the bytes to leave free for wrapping: in a cluster always, since nodes behind routers may join."""
        if self._config.routing == "direct" or not (self._config.kubernetes or self._config.nodes or cluster.peers):
            return 0
        return WRAPPING[own[0].version if own else 4]

    def _tunnel(self, uplink_mtu: int, own: Sequence[Address]) -> Tunnel:
        mtu = _inside(uplink_mtu, self._overhead)
        ipv4 = next((each for each in own if isinstance(each, IPv4Address)), None)
        ipv6 = next((each for each in own if isinstance(each, IPv6Address)), None)
        return Tunnel(
            netlink.TUNNEL,
            TunnelDevice(self._config.tunnel.port, mtu, frozenset(each for each in (ipv4, ipv6) if each)),
            TunnelEnd(self._config.tunnel.vni, mtu, self._tunnel_mac, ipv4, ipv6),
            netlink.tunnel_index(),
        )

    def _current_prefixes(self, ranges: tuple[Network, ...]) -> dict[Network, Lanes]:
        if self._prefixes_of != (self._rules, ranges):
            self._prefixes = masquerade.prefixes(self._config.masquerade, self._rules, ranges)
            self._prefixes_of = (self._rules, ranges)
        return self._prefixes


def _inside(mtu: int, overhead: int) -> int:
    """Return how large packets may be if so much is added to them; never too small for IPv6, if there is a choice."""
    return max(mtu - overhead, min(mtu, IPV6_MIN_MTU))


def _own_addresses(seen: _Seen, own: ClusterNode | None) -> tuple[Address, ...]:
    """Return the node's addresses towards other nodes: those that the cluster knows, as far as it has them."""
    if own and (known := tuple(each for each in own.addresses if each in seen.node_addresses)):
        return known
    sources = [each.sources for each in seen.uplinks.values()]
    ipv4 = next((each.ipv4 for each in sources if each.ipv4), None)
    ipv6 = next((each.ipv6 for each in sources if each.ipv6), None)
    return tuple(each for each in (ipv4, ipv6) if each)


def _tell_refused(peers: Peers, before: Peers) -> None:
    """Log what of other nodes is newly refused."""
    for name in sorted(peers.refused.keys() | before.refused.keys()):
        why = peers.refused.get(name)
        if why and why != before.refused.get(name):
            log.error("a node is refused what it claims: %s node=%s", why, name)
        elif not why:
            log.info("a node is refused nothing any more node=%s", name)


def _tell(outside: Outside, before: Outside) -> None:
    """Log what is new."""
    if outside.mtu != before.mtu:
        log.info("new pods have mtu=%d", outside.mtu)
    if outside.uplinks == before.uplinks and before.mtu:
        return
    if not outside.uplinks:
        log.warning("no uplinks: pods reach nothing outside this node; see masquerade.uplinks in the configuration")
    for device, uplink in sorted(outside.uplinks.items()):
        log.info("uplink device=%s ipv4=%s ipv6=%s", device, uplink.sources.ipv4, uplink.sources.ipv6)
