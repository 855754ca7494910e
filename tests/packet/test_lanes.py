"""Who carries a packet between a pod and the outside: the fast path or the host stack, masqueraded or as it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scapy.all import TCP, UDP, Raw

from ..support import ip
from .cases import BY_FAMILY, EACH, IN_RANGE
from .harness import PASS, REDIRECT, A, B
from .world import (
    FAMILIES,
    NATIVE,
    NODE,
    OTHER,
    SETTINGS,
    STACK,
    UNREACHABLE,
    UPLINK,
    WORLD,
    Node,
    address_of,
    answer,
    arriving,
    built,
    carrying,
    delivered,
    from_pod,
    leaving,
    request,
    word,
)

pytestmark = pytest.mark.root

NETWORK = {4: "203.0.113.0/24", 6: "2001:db8:9::/64"}
"""The part of the world that WORLD and OTHER are in."""

# ---- From a pod to an uplink


@EACH
def test_past_the_stack(node: Node, kind: str, family: int) -> None:
    """A packet to the world is sent by the host's own route; it has one hop less, a mark, and its old address still."""
    sent = from_pod(family, ttl=64) / request(kind, family, IN_RANGE)
    ran = node.leave(sent)
    assert (ran.verdict, ran.outcome, ran.mark) == (REDIRECT, "fwd_uplink", 0x706C0000)
    assert ran.packet == built(from_pod(family, ttl=63) / request(kind, family, IN_RANGE))


@BY_FAMILY
def test_any_protocol_leaves(node: Node, family: int) -> None:
    """The lane does not depend on the protocol: what cannot be masqueraded may go to where that is not needed."""
    fields = carrying(253, family)
    assert node.leave(from_pod(family, **fields) / Raw(bytes(20))).outcome == "fwd_uplink"


@BY_FAMILY
def test_no_uplink(node: Node, family: int) -> None:
    """Where a route leads to a device that is no uplink, the stack takes the packet."""
    node.datapath.maps["uplinks"].delete(node.uplink)
    assert node.leave(from_pod(family) / UDP()).outcome == "punt_host"


@BY_FAMILY
def test_no_settings_yet(node: Node, family: int) -> None:
    """Until the agent has written its settings, the stack carries everything but what is between pods."""
    node.configure(**dict.fromkeys(SETTINGS, 0))
    assert node.leave(from_pod(family) / UDP()).outcome == "punt_host"
    assert node.leave(from_pod(family, A, address_of(B, family)) / UDP()).outcome == "fwd_local"


@BY_FAMILY
def test_all_through_the_stack(node: Node, family: int) -> None:
    """An option sends all that leaves through the stack, for a firewall that must see it."""
    node.configure(stack_routes=1)
    assert node.leave(from_pod(family) / UDP()).outcome == "punt_host"


@BY_FAMILY
def test_to_the_node(node: Node, family: int) -> None:
    """The node's own addresses are the stack's."""
    assert node.leave(from_pod(family, A, NODE[family]) / UDP()).outcome == "punt_host"


@BY_FAMILY
@pytest.mark.parametrize("lanes", [STACK, STACK | NATIVE])
def test_stack_prefixes(node: Node, family: int, lanes: int) -> None:
    """Service addresses are the stack's, whatever else applies to them; others near them are not."""
    node.prefix(f"{WORLD[family]}/{32 if family == 4 else 128}", lanes)
    assert node.leave(from_pod(family) / UDP()).outcome == "punt_host"
    assert node.leave(from_pod(family, A, OTHER[family]) / UDP()).outcome == "fwd_uplink"


@BY_FAMILY
@pytest.mark.parametrize("ttl", [0, 1, 2])
def test_ttl(node: Node, family: int, ttl: int) -> None:
    """A spent TTL is the stack's, which answers as a router does; traceroute sees the node."""
    expected = "fwd_uplink" if ttl > 1 else "punt_ttl"
    assert node.leave(from_pod(family, ttl=ttl) / UDP()).outcome == expected


@pytest.fixture
def narrow(node: Node) -> Iterator[Node]:
    """Make the routes to part of the world narrow, 1,300 bytes (bpf_fib_lookup looks at locked MTUs only)."""
    changes = [
        [f"-{family}", "route", "add", NETWORK[family], "dev", UPLINK, "mtu", "lock", "1300"] for family in FAMILIES
    ]
    for change in changes:
        ip(*change)
    try:
        yield node
    finally:
        for change in changes:
            ip(change[0], "route", "delete", *change[3:6])


@BY_FAMILY
def test_a_narrow_route(narrow: Node, family: int) -> None:
    """What is longer than the route's MTU goes to the stack, which fragments it, or tells the pod (path MTU)."""
    header = 20 if family == 4 else 40
    fits = from_pod(family) / UDP() / bytes(1300 - header - 8)
    assert narrow.leave(fits).outcome == "fwd_uplink"
    assert narrow.leave(fits / b"1").outcome == "punt_too_big"


@BY_FAMILY
@pytest.mark.parametrize("options", [[], [("Timestamp", (1, 2)), ("NOP", None), ("NOP", None)]])
def test_segments(node: Node, family: int, options: list[tuple[str, object]]) -> None:
    """Of a GSO packet, each segment must fit the MTU: full-sized ones do, to the byte, with TCP options and without."""
    packet = from_pod(family) / TCP(options=options) / bytes(3000)
    headers = len(built(packet)) - 14 - 3000
    assert node.leave(packet, gso_size=1500 - headers).outcome == "fwd_uplink"
    assert node.leave(packet, gso_size=1500 - headers + 1).outcome == "punt_too_big"
    assert node.leave(from_pod(family) / UDP() / bytes(3000), gso_size=1500 - headers).outcome == "fwd_uplink"


@BY_FAMILY
def test_longer_than_the_device_takes(node: Node, family: int) -> None:
    """A packet that is too big for the uplink, and no GSO packet, goes to the stack."""
    assert node.leave(from_pod(family) / UDP() / bytes(1500)).outcome == "punt_too_big"


@BY_FAMILY
def test_no_route(node: Node, family: int) -> None:
    """Where no route leads, the stack answers "unreachable"."""
    assert node.leave(from_pod(family, A, UNREACHABLE[family]) / UDP()).outcome == "punt_no_route"


# ---- Not masqueraded


@EACH
def test_native_prefixes(node: Node, kind: str, family: int) -> None:
    """To where masquerading does not apply, a packet leaves as it is; the longest prefix that matches decides."""
    node.prefix(NETWORK[family], NATIVE)
    node.prefix(f"{OTHER[family]}/{32 if family == 4 else 128}", 0)
    pod = address_of(A, family)
    assert node.out(leaving(family, pod) / request(kind, family, IN_RANGE)).outcome == "fwd_native"
    assert node.out(leaving(family, pod, OTHER[family]) / request(kind, family, IN_RANGE)).outcome == "masq_out"


def test_everything_native(node: Node) -> None:
    """A prefix of length 0 is its own family's alone: IPv4's in its mapped form."""
    node.prefix("0.0.0.0/0", NATIVE)
    assert node.out(leaving(4, A.ipv4) / request("udp", 4, IN_RANGE)).outcome == "fwd_native"
    assert node.out(leaving(6, A.ipv6) / request("udp", 6, IN_RANGE)).outcome == "masq_out"


@BY_FAMILY
def test_any_protocol_is_native(node: Node, family: int) -> None:
    """What could not be masqueraded leaves if it need not be."""
    node.prefix(NETWORK[family], NATIVE)
    fields = carrying(253, family)
    assert node.out(leaving(family, address_of(A, family), **fields) / Raw(bytes(20))).outcome == "fwd_native"


@BY_FAMILY
def test_multicast_is_native(node: Node, family: int) -> None:
    """Multicast that the stack forwards is not masqueraded."""
    group = {4: "239.1.2.3", 6: "ff0e::1"}[family]
    assert node.out(leaving(family, address_of(A, family), group) / UDP(), fast=False).outcome == "fwd_native"


# ---- The address


@EACH
def test_the_address_that_the_host_would_use(node: Node, kind: str, family: int) -> None:
    """The address is that of the route to the destination, not the uplink's first one.

    cilium#41866, #17463, #40705
    """
    preferred, size = {4: ("192.0.2.77", 24), 6: ("2001:db8:1::77", 64)}[family]
    ip("address", "add", f"{preferred}/{size}", "dev", UPLINK, *(["nodad"] if family == 6 else []))
    ip(f"-{family}", "route", "add", NETWORK[family], "dev", UPLINK, "src", preferred)
    try:
        sent = request(kind, family, IN_RANGE)
        ran = node.out(leaving(family, address_of(A, family)) / sent)
        assert ran.packet == built(leaving(family, preferred) / sent)
    finally:
        ip(f"-{family}", "route", "delete", NETWORK[family], "dev", UPLINK)
        ip("address", "delete", f"{preferred}/{size}", "dev", UPLINK)


@BY_FAMILY
def test_the_address_where_the_kernel_knows_none(node: Node, family: int) -> None:
    """Where no route tells, the agent's word for the uplink counts; without one, nothing leaves as a pod's."""
    packet = leaving(family, address_of(A, family), UNREACHABLE[family]) / request("udp", family, IN_RANGE)
    assert node.out(packet).outcome == "drop_masq_no_address"
    node.datapath.maps["uplinks"].update(node.uplink, {f"ipv{each}": word(NODE[each]) for each in FAMILIES})
    expected = leaving(family, NODE[family], UNREACHABLE[family]) / request("udp", family, IN_RANGE)
    assert node.out(packet).packet == built(expected)


# ---- Flows of the host stack


@EACH
def test_a_reply_follows_its_request(node: Node, kind: str, family: int) -> None:
    """What the stack brought to a pod is answered through the stack, so that conntrack can undo what it did."""
    pod = address_of(A, family)
    reply = from_pod(family) / answer(kind, family, 5000)
    assert node.leave(reply).outcome == "fwd_uplink"
    node.to_pod(arriving(family, pod) / request(kind, family, 5000))
    assert node.leave(reply).outcome == "punt_reply"
    assert node.leave(from_pod(family) / answer(kind, family, 5001)).outcome == "fwd_uplink"


@EACH
def test_between_pods_by_a_service(node: Node, kind: str, family: int) -> None:
    """The same holds between pods: an answer to what came by a service address is not delivered past the stack."""
    node.to_pod(arriving(family, address_of(A, family), address_of(B, family)) / request(kind, family, 5000))
    reply = from_pod(family, A, address_of(B, family)) / answer(kind, family, 5000)
    assert node.leave(reply).outcome == "punt_reply"
    assert node.leave(from_pod(family, A, address_of(B, family)) / answer(kind, family, 1)).outcome == "fwd_local"


@EACH
def test_what_the_node_sends_leaves_no_note(node: Node, kind: str, family: int) -> None:
    """The node's own packets to a pod (probes) make nothing a matter of the stack."""
    node.to_pod(arriving(family, address_of(A, family), NODE[family]) / request(kind, family, 5000))
    assert node.entries("stack_flows") == {}


@EACH
def test_a_flow_that_the_stack_sent_out(node: Node, kind: str, family: int) -> None:
    """If the stack sent a pod's packet out (a service elsewhere), the answer goes back to the stack's conntrack."""
    pod = address_of(A, family)
    ran = node.out(leaving(family, pod) / request(kind, family, IN_RANGE), fast=False)
    assert ran.packet == built(leaving(family, NODE[family]) / request(kind, family, IN_RANGE))
    back = answer(kind, family, IN_RANGE)
    ran = node.into(arriving(family, NODE[family]) / back)
    assert (ran.verdict, ran.outcome) == (PASS, "masq_in")
    assert ran.packet == built(arriving(family, pod) / back)


@EACH
def test_an_inbound_flow_of_the_stacks(node: Node, kind: str, family: int) -> None:
    """A flow that the stack answers for a pod stays with the stack on its way in."""
    pod = address_of(A, family)
    node.out(leaving(family, pod) / answer(kind, family, 5000), fast=False)
    ran = node.into(arriving(family, pod) / request(kind, family, 5000))
    assert (ran.verdict, ran.outcome) == (PASS, "fwd_inbound")


# ---- From outside, not an answer


@EACH
def test_to_the_node_from_outside(node: Node, kind: str, family: int) -> None:
    """What is for the node, or for nobody here, is the stack's, unchanged."""
    for destination in (NODE[family], OTHER[family]):
        packet = arriving(family, destination) / request(kind, family, 5000)
        assert node.into(packet).outcome == "fwd_host_in"


@BY_FAMILY
def test_any_protocol_to_a_pod(node: Node, family: int) -> None:
    """Whatever IP carries reaches a pod's own address."""
    fields = carrying(253, family)
    ran = node.into(arriving(family, address_of(A, family), **fields) / Raw(bytes(20)))
    assert (ran.verdict, ran.outcome) == (REDIRECT, "fwd_inbound")
    assert ran.packet == built(delivered(family, A, **fields) / Raw(bytes(20)))


@BY_FAMILY
def test_to_a_pod_with_a_spent_ttl(node: Node, family: int) -> None:
    """A packet for a pod that must not go further is the stack's to answer."""
    ran = node.into(arriving(family, address_of(A, family), ttl=1) / UDP())
    assert (ran.verdict, ran.outcome) == (PASS, "fwd_inbound")


def test_link_local_from_outside(node: Node) -> None:
    """A pod's link-local address is nobody's on another link."""
    assert node.into(arriving(6, A.link_local) / UDP()).outcome == "fwd_host_in"
