"""What is known to differ in how the plugins are called, and answer. The texts are the README's."""

from __future__ import annotations

from cni.versions import VERSIONS
from tests.node.reference.case import Difference
from tests.node.reference.cases_calls import STDIN
from tests.node.reference.cases_ipam import FAULTS
from tests.node.reference.known import DEFECT, codes, refused, served, where

_SEVERAL = Difference(
    "two interfaces of a pod",
    "ADD of the second one fails in ptp, DEL of either in bridge if both masquerade",
    "as many as are asked for",
    f"{DEFECT}: both have one chain of rules, named after the container",
    served("DEL of net1", "two interfaces", "two interfaces, ptp")
    | served("DEL of eth0", "two interfaces")
    | served("ADD of net1", "two interfaces, ptp"),
)
_CHAIN = Difference(
    "`prevResult`",
    "ADD forgets it, whatever it is",
    "passed on, with podlane's own after it; refused if it is no result",
    "the specification wants it, and so podlane may stand anywhere in a chain",
    where("result: the pod's interfaces", ["eth0"], ["lo", "eth0"], "prevResult")
    | refused("ADD", "prevResult that is none"),
)
_OWN_NETNS = Difference(
    "`CNI_NETNS`",
    "the node's own: 1.1.1 makes the interface there; later versions say, afterwards, that they should not have",
    "refused (code 8) before anything is done, ADD and DEL",
    "nobody means it; CNI_NETNS_OVERRIDE allows it",
    refused("ADD", "CNI_NETNS of the node, ADD")
    | refused("DEL", "CNI_NETNS of the node, DEL")
    | where("interface in the node", True, False, "CNI_NETNS of the node, ADD"),
)
_FAILED = Difference(
    "failed ADD",
    "leaves the interface in the pod; DEL fails as long as the configuration is wrong",
    "leaves nothing; DEL succeeds",
    f"{DEFECT}; a DEL that fails keeps a pod from ending",
    where(
        "before DEL, left: interfaces in the pod",
        ["eth0"],
        [],
        "ADD that fails at a route",
        "ADD that fails at the address",
    )
    | served("DEL", "ADD that fails at a route", "ADD that fails at the address"),
)
_WITHOUT_NETNS = ("namespace empty", "namespace dangling", "namespace empty, ptp")
_DEL = Difference(
    "DEL",
    "without the namespace, masquerade rules and interface stay; with a path that is no namespace it fails",
    "always by container and interface name: nothing stays, and it succeeds",
    f"{DEFECT}",
    where("left: interfaces in the pod", ["eth0"], [], *_WITHOUT_NETNS, "namespace no namespace")
    | where("left: masquerade rules", True, False, *_WITHOUT_NETNS, "namespace no namespace", "interface gone already")
    | where("left: reserved addresses", ["10.77.0.2"], [], "namespace no namespace")
    | served("DEL", "namespace no namespace"),
)
_CHECK = Difference(
    "CHECK",
    "compares prevResult with interface, addresses and routes; `sandbox` as text",
    "also the neighbours, the host's end, programs, maps and reservation; the namespace itself, not its name;"
    " says so if prevResult is missing",
    "a CHECK is to find what breaks a pod",
    refused("CHECK", "neighbours gone")
    | served("CHECK", "another namespace recorded")
    | where("CHECK: says", [], ["Required prevResult missing"], "without prevResult"),
)
_MENDED = Difference(
    "broken links",
    "stay so until the pod ends",
    "are mended within seconds: an interface that was deleted, a host's end that was set down",
    "the agent watches the kernel",
    where("works again", False, True, "interface deleted", "host's end set down"),
)
_VERSION = Difference(
    "`cniVersion`",
    "0.1.0 to 1.0.0; later versions of the plugins have 1.1.0 with GC and STATUS, of which they do nothing",
    "0.1.0 to 1.1.0, with a GC and a STATUS that mean it; an empty `dns` is left out in 1.0.0",
    "it is the present specification",
    served("ADD", "cniVersion 1.1.0")
    | {
        ("cniVersion 1.0.0", "result: keys"): (
            ["cniVersion", "dns", "interfaces", "ips", "routes"],
            ["cniVersion", "interfaces", "ips", "routes"],
        ),
        ("VERSION", "stdout"): (
            {"cniVersion": "1.0.0", "supportedVersions": list(VERSIONS[:-1])},
            {"cniVersion": "1.1.0", "supportedVersions": list(VERSIONS)},
        ),
    },
)
_CODES = Difference(
    "error codes",
    "999 for almost everything",
    "4 `CNI_ARGS`, 7 configuration, 8 namespace, 100 second ADD, 101 no address left, 103 CHECK, 104 IPAM plugin,"
    " 105 address in use",
    "so that a runtime, and a person, can tell them apart; the words are those of the reference, where it has some",
    codes(7, "ADD 1", ["resolvConf absent", *(each.name for each in FAULTS)])
    | codes(7, "ADD 1", ["the gateway", "outside the ranges", "no address"])
    | codes(7, "ADD", ["ipam.type with a path", "MAC that is none", "vlan 4095", "hairpinMode and promiscMode"])
    | codes(7, "ADD", [each.name for each in STDIN if each.key == "wrong JSON types"])
    | codes(7, "ADD", ["ADD that fails at a route", "ADD that fails at the address"])
    | codes(7, "CHECK", ["without prevResult"])
    | codes(4, "ADD", ["CNI_ARGS without =", "CNI_ARGS with two =", "CNI_ARGS ends with ;", "CNI_ARGS unknown"])
    | codes(8, "ADD", ["CNI_NETNS dangling", "CNI_NETNS no namespace"])
    | codes(100, "ADD again", ["ADD twice"])
    | codes(101, "ADD 2", ["exhausted"])
    | codes(103, "CHECK", ["interface down", "address gone", "default route gone", "MAC address changed"])
    | codes(103, "CHECK", ["another address recorded"])
    | codes(104, "ADD", ["ipam.type that does not exist"])
    | codes(105, "ADD 2", ["one that is taken"]),
)
CALLS_DIFFER = (
    _SEVERAL,
    _CHAIN,
    _OWN_NETNS,
    _FAILED,
    _DEL,
    _CHECK,
    _MENDED,
    _VERSION,
    _CODES,
)
