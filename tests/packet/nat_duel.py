"""The programs and the model side by side: the same packets and events, and the same outcome, packet and memory."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

from agent.collector import Collector
from agent.datapath.tables import masqueraded
from agent.state import Settings
from agent.wiring import HOST_MAC

from .harness import PASS, REDIRECT, A, B, Pod, Ran
from .nat_frames import changed, source_port
from .nat_maps import cooked, end, raw
from .nat_model import Nat
from .nat_talk import PORTS, How, Talk, error_of, frame_of, message_of, packed
from .nat_words import PORTLESS, Choice, End, Fate, Flow, Lifetimes, Message, Part, Rule, State
from .world import NODE, ROUTER, ROUTER_MAC, UPLINK_MAC, Node

CAPACITY = 40
"""Of either half of the flows, in entries: all kinds, families and remotes together want 112."""

STEP = 10
"""Seconds. All times in a duel are multiples of it, so that the time which a duel itself takes changes nothing."""

NOTES = ("inbound", "conversations", "stack_flows")
"""Maps with notes about flows that are not masqueraded."""

_LIFETIMES = Lifetimes(
    tcp_open=2 * STEP, tcp_established=5 * STEP, tcp_closed=STEP, udp=3 * STEP, icmp=STEP, other=4 * STEP
)
_NANOSECONDS = 1_000_000_000
_A_LITTLE = 1_000_000
_PODS = {ip_address(address).packed: pod for pod in (A, B) for address in (pod.ipv4, pod.ipv6)}


class Duel:
    """One sequence of packets and events on a node without any flow."""

    def __init__(self, node: Node, seen: Counter[str] | None = None) -> None:
        """`seen` takes the outcomes."""
        self._node = node
        self._seen = seen if seen is not None else Counter()
        node.reset()
        limits = {**vars(_LIFETIMES), "first_port": PORTS[0], "last_port": PORTS[-1]}
        self._limits = limits
        self._before = masqueraded(node.datapath)
        self.model = Nat({4: packed(NODE[4]), 16: packed(NODE[6])}, frozenset(_PODS), PORTS, CAPACITY, _LIFETIMES)
        maps = node.datapath.maps
        self._collector = Collector(
            flows=maps["flows"],
            owners=maps["owners"],
            settings=Settings(**limits, other_protocols="masquerade", stack_routes=False),
            constants=node.datapath.constants,
            refused=lambda: 0,
        )
        self._sockets: dict[tuple[int, bytes, int], socket.socket] = {}
        self.rule_is(Rule.MASQUERADE)

    def close(self) -> None:
        """Close the node's sockets."""
        for each in self._sockets.values():
            each.close()

    # ---- Packets. Of what a pod sends, the outcome at the uplink is returned.

    def pod_asks(self, talk: Talk, how: How) -> str:
        """Let a pod send a packet of a flow that it opens, or has opened."""
        return self._leaves(message_of(talk, talk.pod_end, talk.remote_end, how), how)

    def pod_replies(self, talk: Talk, how: How) -> str:
        """Let a pod send an answer: for TCP and UDP that is the same."""
        return self._leaves(message_of(talk, talk.pod_end, talk.remote_end, how, is_reply=True), how)

    def remote_answers(self, talk: Talk, port: int, how: How) -> None:
        """Let a remote send an answer to a port of the node's."""
        end = self._node_end(talk, port)
        self._arrives(message_of(talk, talk.remote_end, end, how, is_reply=True), how)

    def remote_asks(self, talk: Talk, how: How) -> None:
        """Let a remote send to a pod's own address; of an echo, the talk's port is its identifier."""
        self._arrives(message_of(talk, talk.remote_end, talk.pod_end, how), how)

    def remote_asks_node(self, talk: Talk, how: How) -> None:
        """Let a remote send to the node what is no answer, unless by its ports."""
        self._arrives(message_of(talk, talk.remote_end, self._node_end(talk, talk.port), how), how)

    def router_complains(self, talk: Talk, port: int, how: How) -> None:
        """Let a router send an error about a packet with that port of the node's."""
        about = message_of(talk, self._node_end(talk, port), talk.remote_end, how)
        self._arrives(error_of(talk, packed(ROUTER[talk.family]), about.source, about), how)

    def router_complains_to_pod(self, talk: Talk, how: How) -> None:
        """Let a router send an error about a packet that left under the pod's own address."""
        about = message_of(talk, talk.pod_end, talk.remote_end, how, is_reply=True)
        self._arrives(error_of(talk, packed(ROUTER[talk.family]), about.source, about), how)

    def pod_complains(self, talk: Talk, how: How, by: Pod) -> str:
        """Let a pod send an error about an answer that it got, or that another pod got."""
        about = message_of(talk, talk.remote_end, talk.pod_end, how, is_reply=True)
        sender = replace(talk, pod=by).pod_end.address
        return self._leaves(error_of(talk, sender, about.source, about), how)

    def pod_complains_of_request(self, talk: Talk, how: How, by: Pod) -> str:
        """Let a pod send an error about what a remote sent to its own address, or to another pod's."""
        about = message_of(talk, talk.remote_end, talk.pod_end, how)
        sender = replace(talk, pod=by).pod_end.address
        return self._leaves(error_of(talk, sender, about.source, about), how)

    def node_asks(self, talk: Talk, how: How) -> None:
        """Let the node itself send, from the talk's port."""
        message = message_of(talk, self._node_end(talk, talk.port), talk.remote_end, how)
        self._run_to_uplink(message, how, fast=False)
        self._a_second_passes()

    def node_complains(self, talk: Talk, how: How) -> None:
        """Let the node send an error about an answer that it could not give to a pod."""
        about = message_of(talk, talk.remote_end, talk.pod_end, how, is_reply=True)
        sender = packed(NODE[talk.family])
        self._run_to_uplink(error_of(talk, sender, about.source, about), how, fast=False)

    def node_complains_of_request(self, talk: Talk, how: How) -> None:
        """Let the node send an error about what a remote sent to a pod's own address."""
        about = message_of(talk, talk.remote_end, talk.pod_end, how)
        sender = packed(NODE[talk.family])
        self._run_to_uplink(error_of(talk, sender, about.source, about), how, fast=False)

    def stack_sends(self, talk: Talk, how: How) -> None:
        """Let a remote's packet reach the pod by the stack: a service's address, a port of the host's."""
        self._run_to_pod(message_of(talk, talk.remote_end, talk.pod_end, how), how)

    # ---- Events

    def rule_is(self, rule: Rule) -> None:
        """Let the configuration say what becomes of other protocols."""
        self.model.rule = rule
        number = self._node.datapath.constants[f"OTHER_{rule.name}"]
        self._node.configure(**self._limits, other_protocols=number)

    def time_passes(self, steps: int) -> None:
        """Let everything become older."""
        self.model.now += steps * STEP
        age = steps * STEP * _NANOSECONDS + _A_LITTLE
        maps = self._node.datapath.maps
        for key, flow in list(maps["flows"].items()):
            maps["flows"].update(key, {**flow, "seen": max(flow["seen"] - age, 1), "checked": 0})
        for name in ("inbound", "conversations"):
            for key, note in list(maps[name].items()):
                maps[name].update(key, {**note, "seen": max(note["seen"] - age, 1)})

    def collector_scans(self, times: int = 1) -> None:
        """Let the agent's collector do its scans."""
        for _ in range(times):
            self._collector.scan()
            self.model.collect()

    def entry_is_lost(self, name: str, number: int) -> None:
        """Delete an entry: of flows or owners, half a flow; of the others, a note."""
        memory = self._remembered(name)
        if not memory:
            return
        key = sorted(memory, key=repr)[number % len(memory)]
        memory.remove(key) if isinstance(memory, set) else memory.pop(key)
        assert self._node.datapath.maps[name].delete(raw(key))
        self._a_second_passes()

    def socket_opens_or_closes(self, talk: Talk, port: int) -> None:
        """Let the node open a socket on a port, or close the one that is there."""
        key = talk.protocol, self._node_end(talk, port).address, port
        if key in self._sockets:
            self._sockets.pop(key).close()
            self.model.host_ports.remove(key)
        elif talk.kind in ("tcp", "udp"):
            self._sockets[key] = _listen(talk, port)
            self.model.host_ports.add(key)

    def compare_memory(self) -> None:
        """Check that the maps hold what the model remembers."""
        model, held = self.model, {name: self._entries(name) for name in ("flows", "owners", *NOTES)}
        flows = {key: (end(flow), State(flow["state"])) for key, flow in held["flows"].items()}
        _same("flows", flows, {key: (mapping.end, mapping.state) for key, mapping in model.flows.items()})
        _same("owners", {key: end(owner) for key, owner in held["owners"].items()}, model.owners)
        for name in NOTES:
            _same(name, dict.fromkeys(held[name]), dict.fromkeys(self._remembered(name)))
        answered = {key: bool(note["answered"]) for key, note in held["inbound"].items()}
        _same("inbound", answered, {key: note.answered for key, note in model.notes.inbound.items()})
        assert len(list(self._node.datapath.maps["fragments"].items())) == len(model.fragments)

    def compare_counters(self) -> None:
        """Check that what was counted since the beginning is what the model did; ports tried are as many as may be."""
        before, after = self._before, masqueraded(self._node.datapath)
        grown = {key: after.flows[key].packets - before.flows[key].packets for key in after.flows}
        assert grown == {key: self.model.counted[key] for key in grown}
        assert after.allocations - before.allocations == self.model.allocations
        least, most = self.model.may_have_tried
        assert least <= self.retries() <= most

    def retries(self) -> int:
        """Return how many ports were tried since the beginning, beyond the first of each flow."""
        return masqueraded(self._node.datapath).retries - self._before.retries

    def _remembered(self, name: str) -> dict[Flow, object] | set[Flow]:
        owner = self.model.notes if name in ("inbound", "conversations") else self.model
        memory: dict[Flow, object] | set[Flow] = getattr(owner, name)
        return memory

    def _entries(self, name: str) -> dict[Flow, Any]:
        return {cooked(key): value for key, value in self._node.datapath.maps[name].items()}

    # ---- Paths

    def _leaves(self, message: Message, how: How) -> str:
        """From a pod: then by the fast path, or the stack, out of the node."""
        pod, fate = _PODS[message.source], self.model.from_pod(message)
        ran = self._node.leave(frame_of(message, how, pod.mac, HOST_MAC), pod=pod)
        expected = frame_of(message, how, pod.mac, HOST_MAC, ttl=63 if fate.fast else 64)
        self._agree(message, ran, fate, REDIRECT if fate.fast else PASS, expected)
        return self._run_to_uplink(message, how, fast=fate.fast)

    def _run_to_uplink(self, message: Message, how: How, *, fast: bool) -> str:
        ran = self._node.out(frame_of(message, how, UPLINK_MAC, ROUTER_MAC, ttl=63), fast=fast)
        did = Choice(ran.outcome, self._port_taken(message, ran))
        fate = self.model.to_uplink(message, did, fast=fast)
        expected = frame_of(changed(message, fate), how, UPLINK_MAC, ROUTER_MAC, ttl=63)
        self._agree(message, ran, fate, ran.verdict, expected)
        return ran.outcome

    def _arrives(self, message: Message, how: How) -> None:
        """From outside: then, if the fast path does not take it, by the stack to the pod."""
        fate = self.model.from_uplink(message)
        ran = self._node.into(frame_of(message, how, ROUTER_MAC, UPLINK_MAC))
        after = changed(message, fate)
        if fate.fast:
            expected = frame_of(after, how, UPLINK_MAC, _PODS[after.destination].mac, ttl=63)
        else:
            expected = frame_of(after, how, ROUTER_MAC, UPLINK_MAC)
        self._agree(message, ran, fate, REDIRECT if fate.fast else PASS, expected)
        if not fate.fast and after.destination in _PODS:
            self._run_to_pod(after, how)

    def _run_to_pod(self, message: Message, how: How) -> None:
        pod, fate = _PODS[message.destination], self.model.to_pod(message)
        given = frame_of(message, how, HOST_MAC, pod.mac, ttl=63)
        ran = self._node.to_pod(given, pod=pod)
        self._agree(message, ran, fate, PASS, given)

    def _agree(self, message: Message, ran: Ran, fate: Fate, verdict: int, packet: bytes) -> None:
        self._seen[ran.outcome] += 1
        assert ran.outcome == fate.outcome, message
        assert ran.verdict == verdict, message
        assert ran.packet == packet, message

    def _port_taken(self, message: Message, ran: Ran) -> int:
        """Return the port that the program took for a flow: by the packet, or by what is in the maps, or no more."""
        flow, maps = self.model.flow(message), self._node.datapath.maps
        if ran.outcome == "masq_out" and message.part is not Part.LATER:
            return source_port(ran.packet, message)
        if ran.outcome == "masq_out" and flow:
            return end(maps["flows"].get(raw(flow)) or {}).port
        if ran.outcome == "drop_masq_full" and flow and flow.protocol not in PORTLESS:
            # Of what the flow had before, it may have given back a port, as there is no room for the other half.
            mine = [
                answer
                for answer, owner in self.model.owners.items()
                if owner == flow[:2] and answer.source == flow.destination
            ]
            return next((each.destination_port for each in mine if maps["owners"].get(raw(each)) is None), 0)
        return 0

    def _a_second_passes(self) -> None:
        """Have the datapath look for the other halves: it does so once a second."""
        flows = self._node.datapath.maps["flows"]
        for key, flow in list(flows.items()):
            flows.update(key, {**flow, "checked": 0})

    def _node_end(self, talk: Talk, port: int) -> End:
        return talk.end(NODE[talk.family], port)


def _listen(talk: Talk, port: int) -> socket.socket:
    family = socket.AF_INET if talk.family == 4 else socket.AF_INET6
    it = socket.socket(family, socket.SOCK_STREAM if talk.kind == "tcp" else socket.SOCK_DGRAM)
    it.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    it.bind((NODE[talk.family], port))
    if talk.kind == "tcp":
        it.listen()
    return it


def _same(name: str, held: Mapping[Flow, object], expected: Mapping[Flow, object]) -> None:
    assert held == expected, (
        f"{name}: program {held.items() - expected.items()}, model {expected.items() - held.items()}"
    )
