"""Failures of NAT in eBPF that others reported, and that no other file here would show. Each test names its own."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from itertools import product

import pytest

from agent.datapath.maps import Map
from agent.datapath.object import Object
from agent.datapath.testrun import SkBuff, run

from .cases import BELOW, BY_FAMILY, IN_RANGE
from .harness import A, B, Pod
from .nat_duel import CAPACITY, NOTES, Duel
from .nat_frames import Body, frame, source_port
from .nat_talk import FAMILIES, How, Talk, mac, message_of
from .nat_words import UDP, Message
from .world import (
    FAST,
    NODE,
    ROUTER_MAC,
    UPLINK_MAC,
    WORLD,
    Node,
    address_of,
    answer,
    arriving,
    leaving,
    loaded_node,
    request,
    text,
)

pytestmark = pytest.mark.root

ROUNDS = 1000
HASH = 1  # BPF_MAP_TYPE_HASH (linux/bpf.h)

# ---- Two processors at once


@pytest.fixture(scope="module")
def large_node(datapath_object: Object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Load the real datapath with room for all flows of this file."""
    with loaded_node(datapath_object, tmp_path_factory.mktemp("large"), {"flows": 8192, "owners": 8192}) as node:
        yield node


def datagram(pod: Pod, port: int, to_port: int) -> Message:
    """Return a pod's UDP packet to the world."""
    return Message(UDP, ip_address(pod.ipv4).packed, port, ip_address(WORLD[4]).packed, to_port)


def send_at_once(node: Node, *sequences: Sequence[Message]) -> list[list[int]]:
    """Send two equally long sequences from two processes, in step; return the ports with which the packets left.

    A process is not held up by the other one's Python, as a thread would be: some pairs do meet in the kernel.
    """
    length = len(sequences[0])
    with mmap.mmap(-1, 8 + 4 * length) as shared:
        child = os.fork()
        if not child:
            try:
                send_in_step(node, shared, 1, sequences[1])
                os._exit(0)
            finally:
                os._exit(1)
        send_in_step(node, shared, 0, sequences[0])
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        return [list(struct.unpack_from(f"={length}H", shared, 8 + side * 2 * length)) for side in (0, 1)]


def send_in_step(node: Node, shared: mmap.mmap, side: int, messages: Sequence[Message]) -> None:
    """Send each message at the moment at which the other side does; write down the ports."""
    program, context = node.datapath.programs["to_uplink"], SkBuff(ifindex=node.uplink, mark=FAST)
    for number, message in enumerate(messages):
        given = frame(message, Body(b"?"), mac(UPLINK_MAC), mac(ROUTER_MAC))
        struct.pack_into("=I", shared, 4 * side, number + 1)
        deadline = time.monotonic() + 30
        while struct.unpack_from("=I", shared, 4 * (1 - side)) < (number + 1,):
            assert time.monotonic() < deadline, "the other side is gone"
        ran = run(program, given, context=context)
        struct.pack_into("=H", shared, 8 + 2 * (side * len(messages) + number), source_port(ran.packet, message))


@pytest.mark.parametrize("port", [IN_RANGE, BELOW])
def test_one_flow_on_two_processors(large_node: Node, port: int) -> None:
    """Two first packets of one flow at the same moment get one port, and no second one stays taken (cilium#40971)."""
    large_node.reset()
    messages = [datagram(A, port, 1 + number) for number in range(ROUNDS)]
    one, other = send_at_once(large_node, messages, messages)
    assert one == other
    assert len(large_node.entries("flows")) == len(large_node.entries("owners")) == ROUNDS


def test_repair_and_creation_at_once(large_node: Node) -> None:
    """While a lost half is put back another pod wants the port: one has it, the other another (cilium#40971)."""
    large_node.reset()
    pods = {pod: [datagram(pod, IN_RANGE, 1 + number) for number in range(ROUNDS)] for pod in (A, B)}
    send_at_once(large_node, pods[A], pods[A])
    large_node.alter("owners")
    large_node.alter("flows", checked=0)
    one, other = send_at_once(large_node, pods[A], pods[B])
    assert all(IN_RANGE in pair and pair[0] != pair[1] for pair in zip(one, other, strict=True))
    flows = {(key[3], socket.ntohs(flow["port"])): key[0] for key, flow in large_node.entries("flows").items()}
    owners = {(key[1], key[3]): text(owner["address"]) for key, owner in large_node.entries("owners").items()}
    assert len(flows) == 2 * ROUNDS
    assert flows == owners


def test_new_flows_while_old_ones_go(large_node: Node) -> None:
    """While flows are read and deleted by the batch all new ones find room.

    cilium#35010, #47293: before Linux 6.15 an LRU map that is being read refuses new entries with EBUSY.
    """
    large_node.reset()
    maps = [large_node.datapath.maps[name] for name in ("flows", "owners")]
    assert [each.spec.type for each in maps] == [HASH, HASH]
    child = os.fork()
    if not child:
        try:
            delete_older_ones(*maps)
        finally:
            os._exit(1)
    try:
        messages = [datagram(A, BELOW, 1 + number) for number in range(5 * ROUNDS)]
        frames = [frame(each, Body(b"?"), mac(UPLINK_MAC), mac(ROUTER_MAC)) for each in messages]
        outcomes = Counter(large_node.out(each).outcome for each in frames)
        left = [len(list(each.items())) for each in maps]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert outcomes == {"masq_out": len(frames)}
    assert max(left) < len(frames)  # so there was something to get in the way of


def delete_older_ones(*maps: Map) -> None:
    """Go through maps for ever, and delete what was there the last time."""
    before: dict[Map, set[bytes]] = {each: set() for each in maps}
    while True:
        for each in maps:
            size = each.spec.key_size
            keys = {batch[at : at + size] for batch, _ in each.batches() for at in range(0, len(batch), size)}
            for key in keys & before[each]:
                each.delete_bytes(key)
            before[each] = keys


# ---- Ports that come back


@pytest.fixture
def duel(datapath_object: Object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Duel]:
    """Begin a duel on a node whose few ports are soon used up; the model judges every packet."""
    sizes = {**dict.fromkeys((*NOTES, "fragments"), 4096), "flows": CAPACITY, "owners": CAPACITY}
    with loaded_node(datapath_object, tmp_path_factory.mktemp("few"), sizes) as node:
        yield Duel(node)


def test_short_connections(duel: Duel) -> None:
    """Any number of short connections to one destination find ports, few as there are: they come back.

    cilium#8740, #20068: the rate of new connections was limited by the ports of those that were over.

    A connection that both sides have closed, or one has reset, gives its port back after its time-wait; the time-out of
    a connection that is only quiet is a hundred times as long, and would have them run out (cilium#33074).
    """
    for number, family in product(range(60), FAMILIES):
        talk = Talk("tcp", family, (A, B)[number % 2], 1000 + number % 7)
        assert duel.pod_asks(talk, How("S")) == "masq_out"
        port = port_of(duel, talk)
        duel.remote_answers(talk, port, How("SA"))
        if number % 3:
            assert duel.pod_asks(talk, How("FA")) == "masq_out"
            duel.remote_answers(talk, port, How("FA"))
        else:
            duel.remote_answers(talk, port, How("RA"))
        if number % 5 == 4:  # with one of six ports left, 32 random tries miss it in one of 340 cases
            duel.time_passes(1)
            duel.collector_scans()
            assert duel.model.flows == {}
    duel.compare_memory()


def port_of(duel: Duel, talk: Talk) -> int:
    """Return the node's port for a flow that is there."""
    flow = duel.model.flow(message_of(talk, talk.pod_end, talk.remote_end, How()))
    assert flow
    return duel.model.flows[flow].end.port


# ---- Full maps


@BY_FAMILY
def test_full_maps_leave_others_alone(node: Node, family: int) -> None:
    """When no flow finds room, the node's own traffic, and that from outside to pods, goes on (cilium#24177).

    felix#2456: full tables cut the node off from its cluster.
    """
    for port in range(1000, 1000 + node.datapath.maps["flows"].spec.max_entries):
        node.out(leaving(family, address_of(A, family)) / request("udp", family, port))
    assert node.out(leaving(family, address_of(A, family)) / request("udp", family, 10)).outcome == "drop_masq_full"
    pod = address_of(B, family)
    for kind in ("tcp", "udp", "echo"):
        for port in (BELOW, IN_RANGE):
            hosts = leaving(family, NODE[family]) / request(kind, family, port)
            assert node.out(hosts, fast=False).outcome == "fwd_host_out"
            assert node.into(arriving(family, NODE[family]) / answer(kind, family, 999)).outcome == "fwd_host_in"
        assert node.into(arriving(family, pod) / request(kind, family, 5000)).outcome == "fwd_inbound"
        assert node.out(leaving(family, pod) / answer(kind, family, 5000)).outcome == "fwd_reply"
