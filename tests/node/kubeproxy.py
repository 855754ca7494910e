"""Services and host ports as kube-proxy and portmap write them on a node: real rules of iptables and conntrack."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from tests.node.machine import Netns

PROTOCOLS = ("tcp", "udp")
CLUSTER = ("10.244.0.0/16", "fd00:10:244::/48")
"""Where pods have their addresses."""

# pkg/proxy/iptables/proxier.go of Kubernetes 1.28, without the rules that no test here could reach.
_HEAD = """\
*filter
:KUBE-FORWARD - [0:0]
-A FORWARD -j KUBE-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:CNI-HOSTPORT-DNAT - [0:0]
:CNI-HOSTPORT-SETMARK - [0:0]
:CNI-HOSTPORT-MASQ - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A POSTROUTING -j CNI-HOSTPORT-MASQ
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A CNI-HOSTPORT-SETMARK -j MARK --or-mark 0x2000
-A CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE
"""
_TAIL = """\
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
COMMIT
"""


@dataclass(frozen=True)
class Service:
    """A service of one family, for TCP and UDP, with all its backends at one port."""

    address: str
    port: int
    backends: Sequence[str]
    backend_port: int
    node_port: int = 0
    local: bool = False
    """externalTrafficPolicy: Local; all backends are on this node."""


@dataclass(frozen=True)
class HostPort:
    """A port of the node's that is a pod's, for TCP and UDP."""

    port: int
    pod: str
    pod_port: int


def write_rules(netns: Netns, services: Sequence[Service], host_ports: Sequence[HostPort] = ()) -> None:
    """Write the rules of both families."""
    for version, tool in ((4, "iptables-restore"), (6, "ip6tables-restore")):
        lines: list[str] = []
        for number, service in enumerate(services):
            if ip_address(service.address).version == version:
                for protocol in PROTOCOLS:
                    lines += _service(service, protocol, f"{number}-{protocol}")
        for host_port in host_ports:
            if ip_address(host_port.pod).version == version:
                for protocol in PROTOCOLS:
                    lines += _host_port(host_port, protocol)
        chains = sorted({line.split()[1] for line in lines if line.split()[1].startswith(("KUBE-S", "KUBE-E"))})
        made = "".join(f":{chain} - [0:0]\n" for chain in chains if chain != "KUBE-SERVICES")
        head, commit, nat = _HEAD.partition("*nat\n")
        rules = head + commit + made + nat + "\n".join(lines) + "\n" + _TAIL
        subprocess.run(netns.command(tool), input=rules, text=True, check=True, capture_output=True)


def delete_rules(netns: Netns) -> None:
    """Delete all rules of both families."""
    for tool in ("iptables-restore", "ip6tables-restore"):
        empty = "*filter\nCOMMIT\n*nat\nCOMMIT\n"
        subprocess.run(netns.command(tool), input=empty, text=True, check=True, capture_output=True)


def _service(service: Service, protocol: str, name: str) -> list[str]:
    version = ip_address(service.address).version
    to_it = f"-d {service.address} -p {protocol} -m {protocol} --dport {service.port}"
    lines = [
        f"-A KUBE-SERVICES {to_it} -j KUBE-SVC-{name}",
        f"-A KUBE-SVC-{name} ! -s {CLUSTER[version == 6]} {to_it} -j KUBE-MARK-MASQ",
    ]
    for number, backend in enumerate(service.backends):
        left = len(service.backends) - number
        chance = f"-m statistic --mode random --probability {1 / left:.10f}" if left > 1 else ""
        where = f"[{backend}]" if version == 6 else backend
        lines += [
            f"-A KUBE-SVC-{name} {chance} -j KUBE-SEP-{name}-{number}",
            f"-A KUBE-SEP-{name}-{number} -s {backend} -j KUBE-MARK-MASQ",
            f"-A KUBE-SEP-{name}-{number} -p {protocol} -m {protocol} -j DNAT "
            f"--to-destination {where}:{service.backend_port}",
        ]
    return lines + (_node_port(service, protocol, name) if service.node_port else [])


def _node_port(service: Service, protocol: str, name: str) -> list[str]:
    version = ip_address(service.address).version
    from_pods = f"-A KUBE-EXT-{name} -s {CLUSTER[version == 6]} -j KUBE-SVC-{name}"
    from_node = f"-A KUBE-EXT-{name} -m addrtype --src-type LOCAL"
    policy = (
        [from_pods, f"{from_node} -j KUBE-MARK-MASQ"] if service.local else [f"-A KUBE-EXT-{name} -j KUBE-MARK-MASQ"]
    )
    return [
        f"-A KUBE-NODEPORTS -p {protocol} -m {protocol} --dport {service.node_port} -j KUBE-EXT-{name}",
        *policy,
        f"-A KUBE-EXT-{name} -j KUBE-SVC-{name}",  # with all backends local, what KUBE-SVL would do
    ]


def _host_port(host_port: HostPort, protocol: str) -> list[str]:
    """Return what the portmap plugin (1.1) writes."""
    version = ip_address(host_port.pod).version
    where = f"[{host_port.pod}]" if version == 6 else host_port.pod
    to_it = f"-p {protocol} -m {protocol} --dport {host_port.port}"
    return [
        f"-A CNI-HOSTPORT-DNAT {to_it} -s {host_port.pod} -j CNI-HOSTPORT-SETMARK",
        f"-A CNI-HOSTPORT-DNAT {to_it} -j DNAT --to-destination {where}:{host_port.pod_port}",
    ]
