"""What masquerading should do, once more: small, in memory, without a byte of any packet. The programs must agree.

It says the rules of bpf/README.md. One thing it cannot know: which of the free ports a program picks at random. So it
is told what the program did (`Choice`), and judges whether that was allowed.

A second passes after everything that takes half a flow away. So the model has no ticks: the other half misses it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from .nat_notes import Notes
from .nat_words import (
    ICMP,
    PORTLESS,
    Choice,
    End,
    Fate,
    Flow,
    Lifetimes,
    Mapping,
    Message,
    Part,
    Rule,
    State,
    answer_to,
    family_of,
    is_known,
    is_other,
    keeps_port,
    question_of,
)

_OWNERS_EVERY, _ORPHANS_EVERY = 4, 16  # scans


@dataclass
class Nat:
    """A node. `node` and `pods` are addresses, `capacity` is of either half of the flows; the rest is its memory."""

    node: dict[int, bytes]
    """By length."""
    pods: frozenset[bytes]
    ports: range
    capacity: int
    lifetimes: Lifetimes
    rule: Rule = Rule.MASQUERADE
    """For protocols other than TCP, UDP and ICMP."""
    now: int = 0
    """Seconds."""
    flows: dict[Flow, Mapping] = field(default_factory=dict)
    owners: dict[Flow, End] = field(default_factory=dict)
    notes: Notes = field(init=False)
    stack_flows: set[Flow] = field(default_factory=set)
    via_stack: set[bytes] = field(default_factory=set)
    fragments: dict[tuple[bytes, bytes, int, int], tuple[int, int]] = field(default_factory=dict)
    host_ports: set[tuple[int, bytes, int]] = field(default_factory=set)
    """Sockets of the node's: protocol, address, port."""
    suspects: set[Flow] = field(default_factory=set)
    scans: int = 4
    owners_counted: int = 0
    """When the collector last did."""
    counted: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Masqueraded packets, by the flow's protocol and direction."""
    allocations: int = 0
    may_have_tried: tuple[int, int] = 0, 0
    """The least and the most ports that allocations may have tried beyond the first of each."""

    def __post_init__(self) -> None:
        self.notes = Notes(self.lifetimes)

    # ---- The programs

    def from_pod(self, message: Message) -> Fate:
        """Judge what a pod sends."""
        flow = self.flow(message)
        if message.source in self.via_stack and (message.is_fragment or self._is_kept(flow)):
            return Fate("punt_reply")
        # What an IPv6 fragment is of, the program does not look for here.
        other = is_other(message.protocol) or (message.is_fragment and len(message.source) == 16)
        if self.rule is Rule.STACK and other:
            return Fate("punt_host")
        return Fate("fwd_uplink", fast=True)

    def to_pod(self, message: Message) -> Fate:
        """Judge what the stack sends to a pod."""
        flow = self.flow(message)
        if flow and message.destination in self.pods and message.source not in self.node.values():
            self._keep_in_stack(message, flow, message.destination)
        return Fate("fwd_from_stack")

    def to_uplink(self, message: Message, did: Choice, *, fast: bool) -> Fate:
        """Judge what leaves the node; `fast`: not through the stack."""
        flow = self.flow(message)
        if message.source not in self.pods:
            return self._leaves_from_node(message, flow)
        if flow:
            self._remember(message, flow)
            if not fast:
                self._keep_in_stack(message, flow, message.source)
            if self.notes.allow(message, flow, self.now, is_pods=flow in self.flows):
                return Fate("fwd_reply")
        rule = self.rule if is_other((message.about or message).protocol) else Rule.MASQUERADE
        if rule is not Rule.MASQUERADE:
            return Fate("fwd_native" if rule is Rule.STACK and not fast else "drop_masq_unsupported")
        if not flow:
            return Fate("drop_masq_fragment" if message.part is Part.LATER else "drop_masq_unsupported")
        if message.about:
            return self._complains(flow) if flow.source == message.source else Fate("drop_masq_unsupported")
        refused = self._ensure(message, flow, did)
        if refused:
            return Fate(refused)
        self._follow(self.flows[flow], message, outgoing=True)
        return self._masqueraded(flow)

    def from_uplink(self, message: Message) -> Fate:
        """Judge what comes from outside."""
        flow = self.flow(message)
        owner = self.owners.get(flow) if flow else None
        if flow and owner and owner.address != message.destination:
            if not message.about:
                self._follow_answer(message, flow, owner)
                self._remember(message, flow)
            flow = flow._replace(destination=owner.address, destination_port=owner.port)
            self.counted[family_of(flow.protocol), "in"] += 1
            return Fate("masq_in", destination=owner, fast=self._is_fast(message, flow))
        if message.part is Part.FIRST and flow:
            self.fragments.pop(message.datagram, None)
        if message.destination not in self.pods:
            return Fate("punt_fragment" if message.part is Part.LATER else "fwd_host_in")
        fast = self._is_fast(message, flow or Flow(b"", 0, message.destination, 0, 0))
        if flow and fast:
            self.notes.take(message, flow.reverse, self.now, is_pods=flow.reverse in self.flows)
        return Fate("fwd_inbound", fast=fast)

    # ---- What else happens

    def collect(self) -> None:
        """Do what the agent's collector does in one scan: expired flows, and now and then owners without one."""
        for flow, mapping in list(self.flows.items()):
            if self.now - mapping.seen >= self.lifetimes.of(flow.protocol, mapping.state):
                del self.flows[flow]
                self._release(flow, mapping.end)
        crowded = 2 * self.owners_counted > self.capacity
        if crowded or self.scans % _ORPHANS_EVERY == 0:
            orphans = {answer for answer, owner in self.owners.items() if question_of(answer, owner) not in self.flows}
            for answer in orphans & self.suspects:
                del self.owners[answer]
            self.suspects = orphans - self.suspects
        if crowded or self.scans % _OWNERS_EVERY == 0:
            self.owners_counted = len(self.owners)
        self.scans += 1

    def may_fail(self, flow: Flow) -> bool:
        """Say whether 32 random probes may find no free port: not (once in 4,000,000,000) while half are free."""
        return 2 * len(self._free(flow)) < len(self.ports)

    # ---- Flows that pods open

    def _leaves_from_node(self, message: Message, flow: Flow | None) -> Fate:
        """Judge what is no pod's. Errors about what was to be given back to a pod are as if they were the pod's."""
        if flow and message.source in self.node.values():
            if message.about and flow in self.flows:
                return self._complains(flow)
            self._reclaim(message, flow)
        return Fate("fwd_host_out")

    def _complains(self, flow: Flow) -> Fate:
        return self._masqueraded(flow) if flow in self.flows else Fate("drop_masq_unsupported")

    def _masqueraded(self, flow: Flow) -> Fate:
        self.counted[family_of(flow.protocol), "out"] += 1
        return Fate("masq_out", source=self.flows[flow].end)

    def _ensure(self, message: Message, flow: Flow, did: Choice) -> str | None:
        """See to it that there are both halves; return why not."""
        mapping = self.flows.get(flow)
        if mapping and self._take(flow, mapping.end.port) is None:
            return None
        if mapping:
            del self.flows[flow]
            self._release(flow, mapping.end)
        if message.is_echo_reply or (message.hides_ports and flow.source_port == 0):
            return "drop_masq_unsupported"
        end, refused = self._allocate(flow, did)
        if refused:
            return refused
        if len(self.flows) >= self.capacity:
            self._release(flow, end)
            return "drop_masq_full"
        self.flows[flow] = Mapping(end, self.now)
        self.notes.forget(flow)
        return None

    def _allocate(self, flow: Flow, did: Choice) -> tuple[End, str | None]:
        """Take the pod's own port, or the one that the program chose."""
        port = flow.source_port
        own = keeps_port(flow.protocol) or port in self.ports
        refused = self._take(flow, port) if own else "taken"
        tried = (0, 0)
        if refused == "taken":
            tried = (1, 32) if own else (0, 31)
            free = set() if flow.protocol in PORTLESS else self._free(flow)
            if not free or (did.outcome == "drop_masq_exhausted" and self.may_fail(flow)):
                refused = "drop_masq_exhausted"
            else:
                port = did.port or next(
                    port for port in free if answer_to(flow, self._end(flow, port)) not in self.owners
                )
                assert port in free, f"{port} is not free for {flow}"
                refused = self._take(flow, port)
        if not refused:
            self.allocations += 1
            self.may_have_tried = self.may_have_tried[0] + tried[0], self.may_have_tried[1] + tried[1]
        return self._end(flow, port), refused

    def _take(self, flow: Flow, port: int) -> str | None:
        """Take the port for the flow, if nobody else has it; return why not."""
        answer = answer_to(flow, self._end(flow, port))
        if answer in self.owners:
            return None if self.owners[answer] == End(flow.source, flow.source_port) else "taken"
        if (flow.protocol, answer.destination, port) in self.host_ports:
            return "taken"
        if len(self.owners) >= self.capacity:
            return "drop_masq_full"
        self.owners[answer] = End(flow.source, flow.source_port)
        return None

    def _free(self, flow: Flow) -> set[int]:
        """Return the ports that the flow may take: nobody's, or its own from before."""
        mine = End(flow.source, flow.source_port)
        answers = {port: answer_to(flow, self._end(flow, port)) for port in self.ports}
        return {
            port
            for port, answer in answers.items()
            if self.owners.get(answer, mine) == mine
            and (answer in self.owners or (flow.protocol, answer.destination, port) not in self.host_ports)
        }

    def _release(self, flow: Flow, end: End) -> None:
        if self.owners.get(answer_to(flow, end)) == End(flow.source, flow.source_port):
            del self.owners[answer_to(flow, end)]

    def _reclaim(self, message: Message, flow: Flow) -> None:
        """Give the node what it sends from; where nothing else may tell of it, that is noted."""
        is_echo = flow.protocol in ICMP.values() and not message.is_echo_reply and not message.hides_ports
        asks = is_echo or flow.protocol in PORTLESS or message.opens
        node = End(flow.source, flow.source_port)
        if message.about or not (keeps_port(flow.protocol) or flow.source_port in self.ports):
            return
        owner = self.owners.get(flow.reverse)
        question = question_of(flow.reverse, owner) if owner else flow
        if question in self.flows and self.flows[question].end == node:
            del self.flows[question]
        if flow.reverse in self.owners or (asks and len(self.owners) < self.capacity):
            self.owners[flow.reverse] = node

    def _follow(self, mapping: Mapping, message: Message, *, outgoing: bool) -> None:
        if outgoing and message.opens:
            mapping.state = State.NEW
        if not outgoing:
            mapping.state |= State.REPLIED
        if message.fin:
            mapping.state |= State.FIN_OUT if outgoing else State.FIN_IN
        if message.rst:
            mapping.state |= State.RESET
        mapping.seen = self.now

    def _follow_answer(self, message: Message, flow: Flow, owner: End) -> None:
        """Note an answer; the pod's half is put back if it was lost and there is room."""
        question = question_of(flow, owner)
        if question not in self.flows and len(self.flows) < self.capacity:
            self.flows[question] = Mapping(End(flow.destination, flow.destination_port), self.now)
        if question in self.flows:
            self._follow(self.flows[question], message, outgoing=False)

    # ---- Flows of the stack's

    def _keep_in_stack(self, message: Message, flow: Flow, pod: bytes) -> None:
        if not message.about:
            self.stack_flows.add(flow.reverse)
            self.via_stack.add(pod)

    def _is_fast(self, message: Message, flow: Flow) -> bool:
        return flow.destination not in self.via_stack or not (message.is_fragment or self._is_kept(flow))

    def _is_kept(self, flow: Flow | None) -> bool:
        return flow is not None and not self.stack_flows.isdisjoint({flow, flow.reverse})

    # ---- Which flow

    def flow(self, message: Message) -> Flow | None:
        """Return the flow that a packet belongs to: by its ports, its datagram's, or those of what it quotes."""
        if message.about:
            quoted = message.about
            known = is_known(quoted.protocol) and not quoted.hides_ports and quoted.source == message.destination
            return quoted.flow.reverse if known else None
        if message.hides_ports:
            ports = self.fragments.get(message.datagram)
            return replace(message, source_port=ports[0], destination_port=ports[1]).flow if ports else None
        return message.flow if is_known(message.protocol) else None

    def _remember(self, message: Message, flow: Flow) -> None:
        if message.part is Part.FIRST and message.protocol not in PORTLESS:
            self.fragments[message.datagram] = flow.source_port, flow.destination_port

    def _end(self, flow: Flow, port: int) -> End:
        return End(self.node[len(flow.source)], port)
