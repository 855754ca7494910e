"""Host ports of limited pods: what they send waits under their own address, and is completed where it arrives."""

from __future__ import annotations

import pytest
from scapy.all import UDP, Packet

from agent.datapath.testrun import SkBuff

from .cases import BY_FAMILY, WITH_PORTS
from .harness import PASS, REDIRECT, A, B, Pod, Ran
from .test_host_ports import CLIENT, HOST, OWN, publish
from .world import NODE, Node, address_of, answer, built, from_pod, request

pytestmark = pytest.mark.root

CALL, ANSWER = 0x706C0001, 0x706C0002
"""Marks: CALL_MARK and ANSWER_MARK of bpf/mark.h."""

SHAPER = 0x7FFFFFFF
"""The index of no device: BPF_PROG_TEST_RUN redirects nothing."""


def wait(node: Node, packet: Packet, pod: Pod, mark: int) -> bytes:
    """Let a limited pod send something that belongs to a host port; return it as it waits, and goes through the stack.

    The stack's routing is not part of this: only addresses and ports count.
    """
    ran = node.leave(packet, pod=pod)
    assert (ran.outcome, ran.verdict, ran.mark) == ("fwd_shaped", REDIRECT, mark)
    return ran.packet


def arrive(node: Node, waited: bytes, pod: Pod, mark: int) -> Ran:
    """Let it arrive at the host end of the receiver."""
    ran = node.run_in(SkBuff(ifindex=node.indexes[pod], mark=mark), waited, program="to_pod")
    assert (ran.verdict, ran.mark) == (PASS, 0)
    return ran


def answered(kind: str, family: int) -> bytes:
    """Return what A is to see of the answer of B's."""
    seen = from_pod(family, B, address_of(A, family)) / answer(kind, family, CLIENT, to_port=HOST)
    seen.payload.src = NODE[family]
    return built(seen)


@WITH_PORTS
def test_a_limited_pod_calls(node: Node, kind: str, family: int) -> None:
    """Its call waits with the serving pod as destination, arrives so, and the answer takes the same way back."""
    publish(node, kind, family, pod=B)
    node.alter_endpoints(A, shaper=SHAPER)
    called = from_pod(family, A, NODE[family]) / request(kind, family, CLIENT, to_port=HOST)
    meant = built(from_pod(family, A, address_of(B, family)) / request(kind, family, CLIENT, to_port=OWN))
    assert wait(node, called, A, CALL) == meant
    came = arrive(node, meant, B, CALL)
    assert (came.outcome, came.packet) == ("port_shaped", meant)
    assert node.entries("stack_flows") == {}
    replied = from_pod(family, B, address_of(A, family)) / answer(kind, family, CLIENT, to_port=OWN)
    left = node.leave(replied, pod=B)
    assert (left.outcome, left.verdict, left.mark, left.packet) == ("port_local", PASS, ANSWER, built(replied))
    came = arrive(node, left.packet, A, ANSWER)
    assert came.packet == answered(kind, family)


@WITH_PORTS
def test_a_limited_pod_answers(node: Node, kind: str, family: int) -> None:
    """Its answer waits under its own address, and arrives from the node's port."""
    publish(node, kind, family, pod=B)
    node.alter_endpoints(B, shaper=SHAPER)
    called = node.leave(from_pod(family, A, NODE[family]) / request(kind, family, CLIENT, to_port=HOST))
    assert (called.outcome, called.verdict, called.mark) == ("port_local", PASS, CALL)
    assert called.packet == built(
        from_pod(family, A, address_of(B, family)) / request(kind, family, CLIENT, to_port=OWN)
    )
    replied = from_pod(family, B, address_of(A, family)) / answer(kind, family, CLIENT, to_port=OWN)
    assert wait(node, replied, B, ANSWER) == built(replied)
    came = arrive(node, built(replied), A, ANSWER)
    assert (came.outcome, came.packet) == ("port_shaped", answered(kind, family))


@WITH_PORTS
def test_a_limited_pod_calls_itself(node: Node, kind: str, family: int) -> None:
    """Both ways it waits as the pod's own, to itself, and arrives from the node."""
    publish(node, kind, family)
    node.alter_endpoints(A, shaper=SHAPER)
    pod = address_of(A, family)
    for to, port, from_port, mark, make in (
        (HOST, OWN, CLIENT, CALL, request),
        (OWN, OWN, HOST, ANSWER, answer),
    ):
        sent = from_pod(family, A, NODE[family]) / make(kind, family, CLIENT, to_port=to)
        waited = built(from_pod(family, A, pod) / make(kind, family, CLIENT, to_port=port))
        assert wait(node, sent, A, mark) == waited
        seen = from_pod(family, A, pod) / make(kind, family, CLIENT, to_port=OWN if mark == CALL else from_port)
        seen.payload.src = NODE[family]
        came = arrive(node, waited, A, mark)
        assert (came.outcome, came.packet) == ("port_shaped", built(seen))


@BY_FAMILY
def test_nothing_is_known_any_more(node: Node, family: int) -> None:
    """What waited for longer than its note lived arrives as the pod sent it: the receiver refuses it by itself."""
    sent = built(from_pod(family, B, address_of(A, family)) / answer("udp", family, CLIENT, to_port=OWN))
    for mark in (CALL, ANSWER):
        ran = arrive(node, sent, A, mark)
        assert (ran.outcome, ran.packet) == ("fwd_from_stack" if mark == ANSWER else "port_shaped", sent)


@BY_FAMILY
def test_what_only_the_stack_understands(node: Node, family: int) -> None:
    """A call of a limited pod's with a spent TTL waits as it is: it is the stack's to answer."""
    publish(node, "udp", family, pod=B)
    node.alter_endpoints(A, shaper=SHAPER)
    called = from_pod(family, A, NODE[family], ttl=1) / UDP(sport=CLIENT, dport=HOST)
    assert wait(node, called, A, 0) == built(called)
