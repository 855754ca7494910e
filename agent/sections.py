"""The sections of the agent's configuration. Every field says its unit, its default, and why that default."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from agent.files import HOST
from agent.ranges import Range, fits_no_pod
from agent.state import Network, OtherProtocols

_V4_MAPPED = IPv6Network("::ffff:0:0/96")


class Model(BaseModel):
    """Keys with their values: there are no others, and nobody changes them later."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _parse_network(value: object) -> Network:
    network = ip_network(str(value))  # says what is wrong, while pydantic's own types only say that something is
    if network.version == 6 and network.overlaps(_V4_MAPPED):
        raise ValueError(f"{network} has addresses that mean IPv4 ones (RFC 4291 section 2.5.5.2): give an IPv4 subnet")
    return network


def parse_prefix(value: object) -> Network:
    """Return a prefix of either family, given in CIDR form, host bits zero. Raises ValueError."""
    network = ip_network(str(value))
    if isinstance(network, IPv6Network) and network.subnet_of(_V4_MAPPED):
        raise ValueError(f"{network} means IPv4 addresses (RFC 4291 section 2.5.5.2): give an IPv4 prefix")
    return network


class Subnet(Model):
    """A range of addresses for pods."""

    subnet: Annotated[Network, BeforeValidator(_parse_network)]
    """In CIDR form, host bits zero. Required."""
    first: str = ""
    """First address to give. Default: the subnet's first but its network (IPv6: subnet-router anycast) address."""
    last: str = ""
    """Last address to give. Default: the subnet's last but, for IPv4, its broadcast address."""

    @model_validator(mode="after")
    def _is_usable(self) -> Subnet:
        its = self.range()
        if fits_no_pod(its.first) or fits_no_pod(its.last):
            raise ValueError(f"no pod can have an address of {its}")
        return self

    def range(self) -> Range:
        """Return the range that this describes. Raises ValueError if first and last do not fit the subnet."""
        whole = Range.of(self.subnet)
        first = ip_address(self.first) if self.first else whole.first
        last = ip_address(self.last) if self.last else whole.last
        return Range(subnet=self.subnet, first=first, last=last)


Prefix = Annotated[Network, BeforeValidator(parse_prefix)]
_Port = Annotated[int, Field(strict=True, ge=1, le=65535)]
_Seconds = Annotated[int, Field(strict=True, ge=1, le=1_000_000)]


class Masquerade(Model):
    """How pods reach what lies outside the cluster: under their node's address.

    Everything is masqueraded but what goes to the pods' own ranges, to link-local addresses and to
    `non_masquerade_cidrs`.
    """

    enabled: bool = True
    """Default: pods reach the world. Without it they leave the node under their own addresses."""
    uplinks: tuple[str, ...] = ()
    """Names of the devices that lead out, as shell patterns ("eth*"); Ethernet devices only. Default: found by their
    routes and addresses (agent/netlink/uplinks.py has the rule)."""
    first_port: _Port = 49152
    """Lowest port, and ICMP identifier, that masqueraded flows have outside. Default: the dynamic ports (RFC 6335
    section 6), far from NodePorts (30000-32767)."""
    last_port: _Port = 65535
    """Highest one. The range limits the flows to one destination address, port and protocol; the agent reserves it in
    net.ipv4.ip_local_reserved_ports, so that the node itself picks from the rest. SCTP may keep one beside it."""
    max_flows: Annotated[int, Field(strict=True, ge=0, le=1 << 24)] = 0
    """Flows at a time. Each takes 264 bytes of kernel memory, and 92 to 114 more in maps whose sizes follow this one;
    they count as the agent's. Default 0: one for every 32 KB of the node's memory, rounded down to a power of two, from
    65,536 to 1,048,576: at most 1.2 % of it, with 2 GB or more. A change forgets all flows."""
    tcp_open: _Seconds = 240
    """Seconds until a TCP flow that nobody has answered may be forgotten. Default: the least that RFC 5382 REQ-5
    allows."""
    tcp_established: _Seconds = 7440
    """Seconds without a packet after which an open TCP flow may be forgotten. Default: the least that RFC 5382 REQ-5
    allows (2 hours and 4 minutes: longer than TCP's keep-alive)."""
    tcp_closed: _Seconds = 60
    """Seconds after a reset, or the second FIN, until the port may be used again. Default: Linux's own TIME-WAIT."""
    udp: _Seconds = 300
    """Seconds without a packet after which a UDP flow may be forgotten. Default: what RFC 4787 REQ-5 recommends."""
    icmp: _Seconds = 60
    """Seconds after the last echo until it may be forgotten. Default: the least that RFC 5508 REQ-2 allows."""
    other_protocols: OtherProtocols = "masquerade"
    """What becomes of pods' packets to the world that are neither TCP, UDP nor ICMP. "masquerade": SCTP, GRE, ESP,
    IPIP, IPv6-in-IP and L2TP pass for the node's. SCTP keeps the pod's own port where nobody else has it; of those
    without ports (all but SCTP), one pod at a time can talk to one remote address. What cannot be masqueraded is
    dropped. "stack": they go through the host stack and leave as its own rules (iptables, nftables) have made them;
    without such rules, under the pod's address. "drop": none leaves. Default: what needs no rules of anybody's."""
    other: _Seconds = 600
    """Seconds without a packet after which a flow of another protocol than TCP, UDP and ICMP may be forgotten. Default:
    that of Linux's conntrack for protocols that it does not know (nf_conntrack_generic_timeout), far longer than SCTP's
    30 seconds between heartbeats (RFC 9260 section 16)."""
    stack_routes: bool = False
    """Send everything that leaves the node through the host stack, for hosts whose firewall must see it. Default: past
    it, which is faster."""
    service_cidrs: tuple[Prefix, ...] = (parse_prefix("10.96.0.0/12"), parse_prefix("fd00:10:96::/112"))
    """Addresses of services, in CIDR form: left to the host stack, and so to kube-proxy, which would not see what goes
    past it. Default: those of most clusters (kubeadm, kind); must be given if the cluster has others."""
    non_masquerade_cidrs: tuple[Prefix, ...] = ()
    """Destinations that see the pods' own addresses; they must know the way back. Default none beside the pods' own
    ranges: unlike RFC 1918 as a whole, which ip-masq-agent exempts, this works in any network."""
    masq_link_local: bool = False
    """Masquerade to 169.254.0.0/16. Default: as ip-masq-agent."""
    masq_link_local_ipv6: bool = False
    """Masquerade to fe80::/10. Default: as ip-masq-agent."""
    config_file: Path | None = None
    """An ip-masq-agent configuration (YAML or JSON; usually its ConfigMap, mounted) in place of the three fields above.
    It is read again when it changes. Without the file or a key in it, ip-masq-agent's defaults apply, RFC 1918 among
    them. Default: none."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Masquerade:
        if self.first_port > self.last_port:
            raise ValueError(f"first_port {self.first_port} is above last_port {self.last_port}")
        beside = {"non_masquerade_cidrs", "masq_link_local", "masq_link_local_ipv6"} & self.model_fields_set
        if self.config_file is not None and beside:
            raise ValueError(f"config_file takes the place of {', '.join(sorted(beside))}: give either")
        return self


class Tunnel(Model):
    """How packets to nodes that are not on-link are wrapped: VXLAN over UDP (RFC 7348). The same on all nodes."""

    port: _Port = 4789
    """UDP port. Default: IANA's, which network cards and tools know. Another tunnel of the host's on the same port
    (Calico's, Docker Swarm's) must go first, or one of the two needs another port: meanwhile a node that reaches others
    by the tunnel is not ready."""
    vni: Annotated[int, Field(strict=True, ge=1, lt=1 << 24)] = 112
    """The network's number in the tunnel: two clusters with the same one must not reach each other's port. Default: not
    what others have by default (flannel 1, Calico 4096)."""


class ListedNode(Model):
    """A node of a cluster that has no Kubernetes to tell of it."""

    name: Annotated[str, Field(min_length=1)]
    """That by which it calls itself (`node_name`)."""
    addresses: Annotated[tuple[IPv4Address | IPv6Address, ...], Field(min_length=1)]
    """Its own, at which other nodes reach it; of each family the first."""
    pod_cidrs: tuple[Prefix, ...] = ()
    """Where its pods have their addresses from."""


class Kubernetes(Model):
    """How the agent reaches the API server, and what it does there beside reading Nodes."""

    kubeconfig: Path | None = None
    """Credentials for an agent that runs outside a pod: client certificate, token or token file. Default: those of the
    pod's service account."""
    startup_taint: str = "podlane.io/agent-not-ready"
    """Key of the taint to remove from the node once podlane is ready, so that pods which do not tolerate it wait until
    then; empty: none. Default: a key that nobody else uses; a node without this taint is fine."""


class Paths(Model):
    """Where the agent keeps and finds its files; change them to run several agents on one machine."""

    socket: Path = Path("/run/podlane/cni.sock")
    """Where the launcher reaches the agent; the launcher's environment names another one as PODLANE_SOCKET."""
    state: Path = Path("/var/lib/podlane")
    """The IPAM store and the cache of compiled programs. Must survive a reboot only to start without compiling."""
    spool: Path = Path("/var/lib/podlane/spool")
    """Where the launcher leaves DELs while the agent is away; PODLANE_SPOOL in its environment."""
    bpffs: Path = HOST / "sys/fs/bpf/podlane"
    """Pinned maps, programs and links; on a mounted bpf file system. Default: below PODLANE_HOST, if the environment
    has that, as in a container."""
    cni_conf_dir: Path = Path("/etc/cni/net.d")
    """Where the runtime looks for network configurations."""
    cni_bin_dir: Path = Path("/opt/cni/bin")
    """Where the runtime looks for plugins."""
    launcher: Path = Path("/usr/lib/podlane/podlane")
    """The launcher to install into cni_bin_dir."""
    bpf_source: Path = Path(__file__).resolve().parent.parent / "bpf"
    """The datapath's C sources. Default: those beside the agent."""
