"""The list of all outcomes: each is reached by a packet, and explained to people."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from scapy.all import UDP, Packet

from agent.datapath.tables import outcomes
from agent.datapath.testrun import SkBuff

from ..support import ROOT
from .harness import DROP, A, B, Ran, Rig, verdicts_of
from .test_host_ports import CLIENT, HOST, OWN, publish
from .test_host_ports_limited import CALL
from .test_to_pod import EXAMPLES
from .tunnel import PEERS, Tunnel, pod_of
from .world import NATIVE, NODE, UNREACHABLE, WORLD, Node, answer, arriving, delivered, from_pod, leaving, request

pytestmark = pytest.mark.root

PORT = 50000


def opened(node: Node) -> None:
    """Let a pod open a masqueraded flow."""
    node.out(leaving(4, A.ipv4) / request("udp", 4, PORT))


def called(node: Node) -> None:
    """Let an outsider send something to a pod's own address."""
    node.into(arriving(4, A.ipv4) / request("udp", 4, 5000))


def brought(node: Node) -> None:
    """Let the host stack bring something to a pod."""
    node.to_pod(arriving(4, A.ipv4) / request("udp", 4, 5000))


def exhausted(node: Node) -> None:
    """Leave a pod only a port that another flow has."""
    node.configure(first_port=PORT, last_port=PORT)
    node.out(leaving(4, A.ipv4) / request("udp", 4, 1))


def filled(node: Node) -> None:
    """Leave no room for another flow."""
    for port in range(node.datapath.maps["flows"].spec.max_entries):
        node.out(leaving(4, A.ipv4) / request("udp", 4, 20000 + port))


def parted(node: Node) -> None:
    """Put a pod into a network of its own."""
    node.alter_endpoints(B, network=1)


def published(node: Node) -> None:
    """Give a pod a host port."""
    publish(node, "udp", 4, pod=B)


def called_by_port(node: Node) -> None:
    """Let an outsider send something to a host port."""
    published(node)
    node.into(arriving(4, NODE[4]) / request("udp", 4, CLIENT, to_port=HOST))


def limited(node: Node) -> None:
    """Limit what a pod sends: there is no such device, but the verdict is the same."""
    node.alter_endpoints(A, shaper=0x7FFFFFFF)


def completed(node: Node, packet: Packet) -> Ran:
    """Run to_pod on what a limited pod has sent to a host port of another."""
    return node.run_in(SkBuff(ifindex=node.indexes[B], mark=CALL), packet, program="to_pod")


def nothing(_: Node) -> None:
    """Need nothing."""


Example = tuple[Callable[[Node], None], Callable[[Node, Packet], Ran], Packet]

UP, OUT, IN = Node.leave, Node.out, Node.into
LATER: dict[str, Any] = {"frag": 10, "id": 7, "proto": 17}

WORLDLY: dict[str, Example] = {
    "fwd_uplink": (nothing, UP, from_pod(4) / UDP()),
    "fwd_shaped": (limited, UP, from_pod(4) / UDP()),
    "fwd_queued": (nothing, Node.to_queue, delivered(4, A) / UDP()),
    "fwd_inbound": (nothing, IN, arriving(4, A.ipv4) / UDP()),
    "fwd_host_in": (nothing, IN, arriving(4, NODE[4]) / UDP()),
    "fwd_host_out": (nothing, OUT, leaving(4, NODE[4]) / UDP()),
    "fwd_native": (lambda node: node.prefix(f"{WORLD[4]}/32", NATIVE), OUT, leaving(4, A.ipv4) / UDP()),
    "fwd_reply": (called, OUT, leaving(4, A.ipv4) / answer("udp", 4, 5000)),
    "masq_in": (opened, IN, arriving(4, NODE[4]) / answer("udp", 4, PORT)),
    "masq_out": (nothing, OUT, leaving(4, A.ipv4) / UDP()),
    "port_in": (published, IN, arriving(4, NODE[4]) / UDP(dport=HOST)),
    "port_local": (published, UP, from_pod(4, A, NODE[4]) / UDP(dport=HOST)),
    "port_shaped": (nothing, completed, delivered(4, B) / UDP()),
    "port_out": (called_by_port, OUT, leaving(4, B.ipv4) / answer("udp", 4, CLIENT, to_port=OWN)),
    "punt_fragment": (nothing, IN, arriving(4, NODE[4], **LATER) / bytes(8)),
    "punt_limited": (lambda node: node.alter_endpoints(B, shaper=7), UP, from_pod(4, A, B.ipv4) / UDP()),
    "punt_no_route": (nothing, UP, from_pod(4, A, UNREACHABLE[4]) / UDP()),
    "punt_reply": (brought, UP, from_pod(4) / answer("udp", 4, 5000)),
    "punt_too_big": (nothing, UP, from_pod(4) / UDP() / bytes(1500)),
    "drop_masq_exhausted": (exhausted, OUT, leaving(4, A.ipv4) / request("udp", 4, 2)),
    "drop_masq_fragment": (nothing, OUT, leaving(4, A.ipv4, **LATER) / bytes(8)),
    "drop_masq_full": (filled, OUT, leaving(4, A.ipv4) / UDP()),
    "drop_masq_no_address": (nothing, OUT, leaving(4, A.ipv4, UNREACHABLE[4]) / UDP()),
    "drop_other_network": (parted, UP, from_pod(4, A, B.ipv4) / UDP()),
    "drop_masq_unsupported": (nothing, OUT, leaving(4, A.ipv4, proto=253) / bytes(8)),
}
"""For each outcome between pods and the world: what must be, the program, and a packet."""

FAR, STRANGER = PEERS[4]
TUNNELLED: dict[str, Callable[[Tunnel], Ran]] = {
    "fwd_tunnel": lambda it: it.node.leave(from_pod(4, A, pod_of(2, 4)) / UDP()),
    "fwd_to_peer": lambda it: it.out(leaving(4, A.ipv4, pod_of(2, 4)) / UDP()),
    "fwd_from_peer": lambda it: it.into(arriving(4, A.ipv4, pod_of(2, 4)) / UDP(), FAR),
    "fwd_peer_host": lambda it: it.into(arriving(4, NODE[4], pod_of(2, 4)) / UDP(), FAR),
    "drop_forged_peer": lambda it: it.into(arriving(4, A.ipv4, pod_of(2, 4)) / UDP(), STRANGER),
    "drop_no_peer": lambda it: it.out(leaving(4, A.ipv4, WORLD[4]) / UDP()),
}
"""For each outcome at the tunnel, a packet of it."""


def test_the_list_is_complete(rig: Rig) -> None:
    """Each outcome that the C declares has its packet here or at the pods' hooks, and none that it does not declare."""
    examples = [*EXAMPLES, *WORLDLY, *TUNNELLED]
    assert sorted(outcomes(rig.datapath)) == sorted(examples)


@pytest.mark.parametrize("name", EXAMPLES)
def test_reached_at_a_pods_hooks(rig: Rig, name: str) -> None:
    """The packet ends in this outcome."""
    rig.forget_stack_flows()
    program = "to_pod" if name == "fwd_from_stack" else "from_pod"
    assert rig.run(EXAMPLES[name], program=program).outcome == name


@pytest.mark.parametrize("name", WORLDLY)
def test_reached_at_an_uplink(node: Node, name: str) -> None:
    """The packet ends in this outcome."""
    prepare, program, packet = WORLDLY[name]
    prepare(node)
    assert program(node, packet).outcome == name


@pytest.mark.parametrize("name", TUNNELLED)
def test_reached_at_the_tunnel(tunnel: Tunnel, name: str) -> None:
    """The packet ends in this outcome."""
    tunnel.peers(4)
    assert TUNNELLED[name](tunnel).outcome == name


def test_names_say_the_verdict(rig: Rig) -> None:
    """An outcome's prefix is its verdict; there is no other."""
    assert {name.partition("_")[0] for name in outcomes(rig.datapath)} == {"fwd", "masq", "port", "punt", "drop"}


def names_in_table(heading: str) -> list[str]:
    """Return the first column of the table under a heading of bpf/README.md."""
    section = (ROOT / "bpf/README.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)


def test_the_readme_explains_every_outcome(rig: Rig) -> None:
    """The operator's table has exactly the outcomes of the C, in its order, and the exceptions are all the drops."""
    names = list(outcomes(rig.datapath))
    assert names_in_table("Outcomes") == names
    assert names_in_table("The exceptions") == [name for name in names if verdicts_of(name) == {DROP}]
