"""What masquerading should do, once more: small, in memory, without a byte of any packet. The programs must agree.

It says the rules of bpf/README.md. One thing it cannot know: which of the free ports a program picks at random. So it
is told what the program did (`Choice`), and judges whether that was allowed.

A second passes after everything that takes half a flow away. So the model has no ticks: the other half misses it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .nat_words import TCP, UDP, Choice, End, Fate, Flow, Lifetimes, Mapping, Message, Part, State


@dataclass
class Nat:
    """A node. `node` and `pods` are addresses, `capacity` is of either half of the flows; the rest is its memory."""

    node: dict[int, bytes]
    """By length."""
    pods: frozenset[bytes]
    ports: range
    capacity: int
    lifetimes: Lifetimes
    now: int = 0
    """Seconds."""
    flows: dict[Flow, Mapping] = field(default_factory=dict)
    owners: dict[Flow, End] = field(default_factory=dict)
    inbound: dict[Flow, int] = field(default_factory=dict)
    """When last seen, of flows that outsiders opened, as the pods' answers show them."""
    stack_flows: set[Flow] = field(default_factory=set)
    via_stack: set[bytes] = field(default_factory=set)
    fragments: dict[tuple[bytes, bytes, int, int], tuple[int, int]] = field(default_factory=dict)
    host_ports: set[tuple[int, bytes, int]] = field(default_factory=set)
    """Sockets of the node's: protocol, address, port."""
    suspects: set[Flow] = field(default_factory=set)
    scans: int = 0

    # ---- The programs

    def from_pod(self, message: Message) -> Fate:
        """Judge what a pod sends."""
        flow = self.flow(message)
        if message.source in self.via_stack and (message.is_fragment or flow in self.stack_flows):
            return Fate("punt_reply")
        return Fate("fwd_local" if message.destination in self.pods else "fwd_uplink", fast=True)

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
            if flow and message.source in self.node.values():
                self._reclaim(message, flow)
            return Fate("fwd_host_out")
        if not flow:
            return Fate("drop_masq_fragment" if message.part is Part.LATER else "drop_masq_unsupported")
        self._remember(message, flow)
        if not fast:
            self._keep_in_stack(message, flow, message.source)
        if self._is_reply(message, flow):
            return Fate("fwd_reply")
        if message.about:
            mapping = self.flows.get(flow) if flow.source == message.source else None
            return Fate("masq_out", source=mapping.end) if mapping else Fate("drop_masq_unsupported")
        refused = self._ensure(message, flow, did)
        if refused:
            return Fate(refused)
        self._follow(self.flows[flow], message, outgoing=True)
        return Fate("masq_out", source=self.flows[flow].end)

    def from_uplink(self, message: Message) -> Fate:
        """Judge what comes from outside."""
        flow = self.flow(message)
        owner = self.owners.get(flow) if flow else None
        if flow and owner and owner.address != message.destination:
            if not message.about:
                self._follow_answer(message, flow, owner)
                self._remember(message, flow)
            flow = flow._replace(destination=owner.address, destination_port=owner.port)
            return Fate("masq_in", destination=owner, fast=self._is_fast(message, flow))
        if message.part is Part.FIRST and flow:
            self.fragments.pop(_datagram(message), None)
        if message.destination not in self.pods:
            return Fate("punt_fragment" if message.part is Part.LATER else "fwd_host_in")
        fast = self._is_fast(message, flow or Flow(b"", 0, message.destination, 0, 0))
        if flow and fast:
            self._note_inbound(message, flow.reverse)
        return Fate("fwd_inbound", fast=fast)

    # ---- What else happens

    def collect(self) -> None:
        """Do what the agent's collector does in one scan: expired flows, and every fourth time owners without one."""
        for flow, mapping in list(self.flows.items()):
            if self.now - mapping.seen >= self.lifetimes.of(flow.protocol, mapping.state):
                del self.flows[flow]
                self._release(flow, mapping.end)
        self.scans += 1
        if self.scans % 4 == 1:
            orphans = {answer for answer, owner in self.owners.items() if _question(answer, owner) not in self.flows}
            for answer in orphans & self.suspects:
                del self.owners[answer]
            self.suspects = orphans - self.suspects

    def may_fail(self, flow: Flow) -> bool:
        """Say whether 32 random probes may find no free port: not (once in 4,000,000,000) while half are free."""
        return 2 * len(self._free(flow)) < len(self.ports)

    # ---- Flows that pods open

    def _ensure(self, message: Message, flow: Flow, did: Choice) -> str | None:
        """See to it that there are both halves; return why not."""
        mapping = self.flows.get(flow)
        if mapping and self._take(flow, mapping.end.port) is None:
            return None
        if mapping:
            del self.flows[flow]
            self._release(flow, mapping.end)
        if message.is_echo_reply or (message.part is Part.LATER and flow.source_port == 0):
            return "drop_masq_unsupported"
        end, refused = self._allocate(flow, did)
        if refused:
            return refused
        if len(self.flows) >= self.capacity:
            self._release(flow, end)
            return "drop_masq_full"
        self.flows[flow] = Mapping(end, self.now)
        self.inbound.pop(flow, None)
        return None

    def _allocate(self, flow: Flow, did: Choice) -> tuple[End, str | None]:
        """Take the pod's own port, or the one that the program chose."""
        port, refused = flow.source_port, "taken" if flow.source_port not in self.ports else None
        refused = refused or self._take(flow, port)
        if refused == "taken":
            free = self._free(flow)
            if not free or (did.outcome == "drop_masq_exhausted" and self.may_fail(flow)):
                refused = "drop_masq_exhausted"
            else:
                port = did.port or next(
                    port for port in free if _answer(flow, self._end(flow, port)) not in self.owners
                )
                assert port in free, f"{port} is not free for {flow}"
                refused = self._take(flow, port)
        return self._end(flow, port), refused

    def _take(self, flow: Flow, port: int) -> str | None:
        """Take the port for the flow, if nobody else has it; return why not."""
        answer = _answer(flow, self._end(flow, port))
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
        answers = {port: _answer(flow, self._end(flow, port)) for port in self.ports}
        return {
            port
            for port, answer in answers.items()
            if self.owners.get(answer, mine) == mine
            and (answer in self.owners or (flow.protocol, answer.destination, port) not in self.host_ports)
        }

    def _release(self, flow: Flow, end: End) -> None:
        if self.owners.get(_answer(flow, end)) == End(flow.source, flow.source_port):
            del self.owners[_answer(flow, end)]

    def _reclaim(self, message: Message, flow: Flow) -> None:
        """Give the node what it sends from; where nothing else would tell of it (echo), that is noted."""
        asks = not message.is_echo_reply and flow.protocol not in (TCP, UDP) and message.part is not Part.LATER
        node = End(flow.source, flow.source_port)
        if message.about or flow.source_port not in self.ports:
            return
        owner = self.owners.get(flow.reverse)
        question = _question(flow.reverse, owner) if owner else flow
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
        question = _question(flow, owner)
        if question not in self.flows and len(self.flows) < self.capacity:
            self.flows[question] = Mapping(End(flow.destination, flow.destination_port), self.now)
        if question in self.flows:
            self._follow(self.flows[question], message, outgoing=False)

    # ---- Flows that others open

    def _note_inbound(self, message: Message, answer: Flow) -> None:
        if answer in self.inbound or (not message.about and answer not in self.flows):
            self.inbound[answer] = self.now

    def _is_reply(self, message: Message, flow: Flow) -> bool:
        """Say whether there is a note that counts: it is not old (TCP's SYN tells), and the flow not the pod's own."""
        if message.opens or flow in self.flows or flow not in self.inbound or flow.source != message.source:
            return False
        old = self.now - self.inbound[flow] >= self.lifetimes.of(flow.protocol, State.NEW)
        if old and flow.protocol != TCP:
            return False
        self.inbound[flow] = self.now
        return True

    def _keep_in_stack(self, message: Message, flow: Flow, pod: bytes) -> None:
        if not message.about:
            self.stack_flows.add(flow.reverse)
            self.via_stack.add(pod)

    def _is_fast(self, message: Message, flow: Flow) -> bool:
        return flow.destination not in self.via_stack or not (message.is_fragment or flow in self.stack_flows)

    # ---- Which flow

    def flow(self, message: Message) -> Flow | None:
        """Return the flow that a packet belongs to: by its ports, its datagram's, or those of what it quotes."""
        if message.about:
            quoted = message.about
            known = quoted.has_ports and quoted.part is not Part.LATER and quoted.source == message.destination
            return _shown(quoted).reverse if known else None
        if message.part is Part.LATER:
            ports = self.fragments.get(_datagram(message))
            return _shown(replace(message, source_port=ports[0], destination_port=ports[1])) if ports else None
        return _shown(message) if message.has_ports else None

    def _remember(self, message: Message, flow: Flow) -> None:
        if message.part is Part.FIRST:
            self.fragments[_datagram(message)] = flow.source_port, flow.destination_port

    def _end(self, flow: Flow, port: int) -> End:
        return End(self.node[len(flow.source)], port)


def _shown(message: Message) -> Flow:
    return Flow(message.source, message.source_port, message.destination, message.destination_port, message.protocol)


def _datagram(message: Message) -> tuple[bytes, bytes, int, int]:
    return message.source, message.destination, message.identification, message.protocol


def _answer(flow: Flow, end: End) -> Flow:
    return flow.reverse._replace(destination=end.address, destination_port=end.port)


def _question(answer: Flow, owner: End) -> Flow:
    return answer.reverse._replace(source=owner.address, source_port=owner.port)
