"""What is known to differ by the keys of the configuration. The texts are the README's."""

from __future__ import annotations

from tests.node.reference.case import Difference
from tests.node.reference.known import DEFECT, refused, served, where

_LINK = Difference(
    "the pod's link",
    "`10.77.0.2/24`, gateway `10.77.0.1` on the bridge (ptp: on each host end), one shared layer 2 (ptp: none)",
    "`10.77.0.2/32`, gateway `169.254.1.1` (IPv6 `fe80::1`), whose MAC address the pod knows from the start; routes to"
    " the subnets of its addresses by it, in the result too; no bridge; one hop between pods",
    "each pod is a link of its own, so that no packet needs a bridge, ARP or a lookup of MAC addresses",
    {
        ("bridge", "result: interfaces"): (["bridge", "host's end", "pod's end"], ["host's end", "pod's end"]),
        ("bridge", "node: new devices"): (["bridge", "host's end"], ["host's end"]),
        ("bridge", "pod: hops to another pod"): (0, 1),
        ("bridge", "pod: subnet"): (["on-link"], ["via 169.254.1.1"]),
        ("ptp", "pod: subnet"): (["via 10.77.0.1"], ["via 169.254.1.1"]),
        ("bridge", "result: routes"): (
            ["0.0.0.0/0 via 10.77.0.1", "::/0 via fd77::1"],
            [
                "0.0.0.0/0 via 169.254.1.1",
                "10.77.0.0/24 via 169.254.1.1",
                "::/0 via fe80::1",
                "fd77::/64 via fe80::1",
            ],
        ),
        ("ptp", "result: routes"): (
            ["0.0.0.0/0 via None", "::/0 via None"],
            [
                "0.0.0.0/0 via 169.254.1.1",
                "10.77.0.0/24 via 169.254.1.1",
                "::/0 via fe80::1",
                "fd77::/64 via fe80::1",
            ],
        ),
    }
    | where("result: address", "10.77.0.2/24", "10.77.0.2/32", "bridge", "ptp")
    | where("result: gateway", "10.77.0.1", "169.254.1.1", "bridge", "ptp")
    | where("pod: prefix length", 24, 32, "bridge", "ptp")
    | where("pod: default route via", "10.77.0.1", "169.254.1.1", "bridge", "ptp")
    | where("pod: knows the MAC address of its neighbour", False, True, "bridge", "ptp")
    | where(
        "result: keys of routes",
        ["dst"],
        ["dst", "gw"],
        *(f"cniVersion {version}" for version in ("0.3.0", "0.3.1", "0.4.0", "1.0.0")),
    ),
)
_DEFAULT_ROUTE = Difference(
    "`isDefaultGateway`",
    "ADD fails if IPAM gives a default route without `gw`",
    "one default route",
    f"{DEFECT}: it adds the route twice",
    served("ADD", "isDefaultGateway, default route of IPAM without gw"),
)
_ROUTES = Difference(
    "`ipam.routes`",
    "a `gw` may be any address; CHECK fails for a route without one",
    "a `gw` is the subnet's gateway, or absent; another one is refused by name; CHECK works",
    f"the pod's only neighbour is its node; the other is {DEFECT}",
    refused("ADD", "a route of IPAM by another pod") | served("CHECK", "a route of IPAM"),
)
_BACKEND = Difference(
    "`ipMasqBackend`",
    "unknown to 1.1.1; later versions refuse what is neither iptables nor nftables",
    "these two are accepted, without effect; others are refused",
    "podlane needs neither to masquerade",
    refused("ADD", "ipMasqBackend unknown"),
)
_BRIDGE = Difference(
    "`bridge`",
    "must not name a device that is no bridge",
    "without effect",
    "there is no bridge",
    served("ADD", "bridge that is no bridge"),
)
_FORCE = Difference(
    "`forceAddress`",
    "two networks on one bridge need it, and the second takes the first one's gateway away",
    "without effect: any number of networks, each with its gateway",
    "the gateway's address is on no bridge",
    served("ADD 2", "two networks on a bridge"),
)
_VLAN = Difference(
    "`vlan`",
    "puts the pod into a VLAN of the bridge",
    "refused by name (code 2), unless 0",
    "there is no layer 2 that a VLAN could divide; silence would be a lie",
    where("ADD: refused by name", False, True, "vlan 100"),
)
_NEWER = Difference(
    "`vlanTrunk`, `portIsolation`, `disableContainerInterface`",
    "unknown to 1.1.1, so without effect; later versions have them",
    "refused by name (code 2)",
    "as for `vlan`",
    where("ADD: refused by name", False, True, "vlanTrunk", "portIsolation", "disableContainerInterface"),
)
_SENDERS = Difference(
    "`macspoofchk`",
    "on: what a pod sends under another MAC address than that of ADD is dropped;"
    " off: a pod may send under any address, IP or MAC",
    "always: a pod sends under its IP addresses only, and under the MAC address that its interface has",
    "nobody can pass for another pod; a changed MAC address fools nobody on a link of two, and tuning changes it",
    where("reaches a pod under another MAC address", False, True, "other MAC address, macspoofchk")
    | where("reaches a pod under an address that nobody gave it", True, False, "other address"),
)
_LAYER_2 = Difference(
    "layer 2",
    "broadcasts and multicasts reach the other pods on the bridge",
    "they do not",
    "there is no layer 2 between pods; mDNS and the like do not cross it",
    where("a broadcast reaches the other pod", True, False, "broadcast and multicast")
    | where("a multicast reaches the other pod", True, False, "broadcast and multicast"),
)
_FIREWALL = Difference(
    "the node's firewall",
    "what pods send and receive passes FORWARD (between pods of a bridge: with br_netfilter)",
    "packets between pods, and from and to the world, do not; those to the node do pass INPUT",
    "that is what makes it fast; a policy for pods has to be made elsewhere",
    where("pod reaches pod", False, True, "FORWARD drops all", "FORWARD drops all, ptp")
    | where("pod reaches the world", False, True, "FORWARD drops all", "FORWARD drops all, ptp")
    | where("world reaches pod", False, True, "FORWARD drops all", "FORWARD drops all, ptp"),
)
_ABSENT = ("ipam absent", "ipam null", "ipam {}", "ipam absent, isGateway")
_NO_IPAM = Difference(
    "no `ipam`",
    "bridge: an interface without addresses, for which CHECK fails; ptp: refused",
    "addresses of the agent's own ranges (`ranges`), with default routes",
    "what a Kubernetes node wants; without an address podlane has nothing to deliver to",
    where("result: addresses", [], ["10.244.0.1", "fd00:10:244::1"], *_ABSENT)
    | where("pod: addresses", [], ["10.244.0.1", "fd00:10:244::1"], *_ABSENT)
    | where("result: routes", [], ["0.0.0.0/0", "::/0"], *_ABSENT)
    | where("pod: routes", [], ["default"], *_ABSENT)
    | served("CHECK", *_ABSENT)
    | served("ADD", "ipam absent, ptp"),
)
_TYPE = Difference(
    "`ipam.type`",
    "absent in an `ipam` that has other keys: taken for no `ipam` at all",
    "absent in an `ipam` that has other keys: refused",
    "whoever writes a subnet wants addresses of it",
    refused("ADD", "ipam without type"),
)
_OFF_LINK = Difference(
    "`ipam.type`",
    "`static` with a gateway outside the address's own subnet (`/32`): ADD and DEL fail",
    "works",
    "the pod's gateway is link-local in any case",
    served("ADD 1", "static, gateway outside the subnet") | served("DEL 2", "static, gateway outside the subnet"),
)
_RESOLV_CONF = Difference(
    "`ipam.resolvConf`",
    "bridge 1.1.1 loses what IPAM says of DNS; ptp, and later versions, pass it on",
    "passes it on",
    DEFECT,
    where(
        "result: dns",
        {},
        {"nameservers": ["10.0.0.53"], "search": ["a", "b", "d"], "options": ["c"]},
        "resolvConf",
    ),
)
_DATA_DIR = Difference(
    "`ipam.dataDir`",
    "host-local has a file per address there, also after a reboot",
    "without effect in podlane's own IPAM: its store has them, and frees those of an earlier boot",
    "`podlane-agent import` takes over such a directory",
    where("files in dataDir", True, False, "dataDir"),
)
_SHARED_MAC = Difference(
    "MAC requested",
    "two pods may have the same",
    "the second one is refused (code 105)",
    "their IPv6 link-local addresses would be the same, too",
    refused("ADD 2", "MAC of another pod"),
)
_REQUESTS = Difference(
    "addresses requested",
    "all sources are added up, and ADD fails if they differ; a list in `CNI_ARGS` is refused",
    "`runtimeConfig.ips`, else `args.cni.ips`, else `CNI_ARGS`, for each family; a list is one there, too",
    "as for MAC addresses; Multus sends such lists",
    served("ADD 1", "several in CNI_ARGS", "different ones in runtimeConfig and args.cni"),
)
_ARGS = Difference(
    "`CNI_ARGS`",
    "`IP` without `IgnoreUnknown` is refused by bridge, and meant for its IPAM",
    "accepted",
    "one plugin does both",
    served("ADD 1", "address in CNI_ARGS, no IgnoreUnknown"),
)
_RUNTIME_DNS = Difference(
    "`runtimeConfig.dns`",
    "without effect",
    "in the result, in place of `dns`",
    "CONVENTIONS.md has it as a capability",
    where("ADD 1: dns", {}, {"nameservers": ["10.0.0.53"]}, "runtimeConfig.dns"),
)
_PORTS = Difference(
    "`runtimeConfig.portMappings`",
    "without effect: portmap, if it is in the chain, reads them",
    "host ports of podlane's own: a port is one pod's (code 105), and those for masquerading are refused (code 7); the "
    "node's own processes do not reach SCTP's by them, so that SCTP's at loopback addresses are refused, too (code 2)",
    "neither iptables nor conntrack; give `portMappings` as a capability to one of the two plugins",
)
_BANDWIDTH = Difference(
    "`runtimeConfig.bandwidth`",
    "without effect: another plugin of the chain (bandwidth) reads it",
    "kept, both ways; a rate without a burst is refused, as by that plugin",
    "that plugin's queue for what a pod sends cannot be where podlane's programs are",
    where("node: limited directions", 0, 2, "runtimeConfig.bandwidth"),
)
KEYS_DIFFER = (
    _LINK,
    _DEFAULT_ROUTE,
    _ROUTES,
    _BACKEND,
    _BRIDGE,
    _FORCE,
    _VLAN,
    _NEWER,
    _SENDERS,
    _LAYER_2,
    _FIREWALL,
    _NO_IPAM,
    _TYPE,
    _OFF_LINK,
    _RESOLV_CONF,
    _DATA_DIR,
    _SHARED_MAC,
    _REQUESTS,
    _ARGS,
    _RUNTIME_DNS,
    _PORTS,
    _BANDWIDTH,
)
