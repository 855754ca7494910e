"""What can happen in a duel, and long random sequences of it."""

from __future__ import annotations

import random
from collections.abc import Callable

from .harness import A, B
from .nat_duel import CAPACITY, NOTES, Duel
from .nat_talk import FAMILIES, FLAGS, KINDS, POD_PORTS, PORTS, How, Talk
from .nat_words import Part, Rule

WITHOUT_PORT = (
    Duel.pod_asks,
    Duel.pod_replies,
    Duel.remote_asks,
    Duel.remote_asks_node,
    Duel.router_complains_to_pod,
    Duel.node_asks,
    Duel.node_complains,
    Duel.node_complains_of_request,
    Duel.stack_sends,
)
WITH_PORT = (Duel.remote_answers, Duel.router_complains)
BY_SOMEBODY = (Duel.pod_complains, Duel.pod_complains_of_request)
PASSING = (1, 2, 3, 6)
RULES = (Rule.MASQUERADE, Rule.MASQUERADE, Rule.MASQUERADE, Rule.DROP, Rule.STACK)
OFTEN = 32
"""Scans of the collector's, two of which look for owners without a flow."""


class Walk:
    """Random steps of a duel; most packets belong to flows that are there."""

    def __init__(self, duel: Duel, choose: random.Random) -> None:
        self.duel = duel
        self.choose = choose
        self.kinds = choose.choice([KINDS, KINDS, KINDS[:3], ("tcp",), ("udp",), ("echo",), KINDS[3:]])
        self._last: Talk | None = None
        if choose.random() < 0.3:
            duel.rule_is(choose.choice(RULES))

    def step(self) -> None:
        """Do something."""
        acts, weights = zip(*WEIGHTS, strict=True)
        self.choose.choices(acts, weights)[0](self)

    def talk(self) -> Talk:
        """Choose who talks; often, whoever did last: conversations take a few packets."""
        pick = self.choose.choice
        if self._last and self.choose.random() < 0.3:
            return self._last
        self._last = Talk(pick(self.kinds), pick(FAMILIES), pick((A, B)), pick(POD_PORTS), pick((0, 1)))
        return self._last

    def how(self) -> How:
        """Choose what else a packet has."""
        pick = self.choose.choice
        part = pick((Part.WHOLE,) * 8 + (Part.FIRST, Part.LATER))
        return How(pick(FLAGS), part, pick((1, 2)), pick((32, 40, 41)), pick((True, True, False)), pick((8, 20, 61)))

    def port(self, talk: Talk) -> int:
        """Choose a port of the node's, mostly one that such a flow has."""
        ports = [
            answer.destination_port
            for answer in self.duel.model.owners
            if answer.protocol == talk.protocol and answer.source == talk.remote_end.address
        ]
        return self.choose.choice(ports) if ports and self.choose.random() < 0.9 else self.choose.choice(PORTS)

    def with_port(self, act: Callable[[Duel, Talk, int, How], object]) -> None:
        """Send a packet that concerns a port of the node's."""
        talk = self.talk()
        act(self.duel, talk, self.port(talk), self.how())

    def without_port(self, act: Callable[[Duel, Talk, How], object]) -> None:
        """Send another packet."""
        act(self.duel, self.talk(), self.how())

    def complain(self) -> None:
        """Let a pod send an error."""
        self.choose.choice(BY_SOMEBODY)(self.duel, self.talk(), self.how(), self.choose.choice((A, B)))

    def lose(self) -> None:
        """Lose an entry, mostly half a flow."""
        name = self.choose.choice(("flows", "owners", "flows", "owners", *NOTES))
        self.duel.entry_is_lost(name, self.choose.randrange(CAPACITY))

    def change_socket(self) -> None:
        """Open or close a socket of the node's."""
        talk = self.talk()
        self.duel.socket_opens_or_closes(talk, self.port(talk))


WEIGHTS: list[tuple[Callable[[Walk], None], float]] = [
    (lambda walk: walk.without_port(Duel.pod_asks), 30),
    (lambda walk: walk.with_port(Duel.remote_answers), 25),
    (lambda walk: walk.without_port(Duel.pod_replies), 5),
    (lambda walk: walk.without_port(Duel.remote_asks), 6),
    (lambda walk: walk.without_port(Duel.remote_asks_node), 3),
    (lambda walk: walk.with_port(Duel.router_complains), 5),
    (lambda walk: walk.without_port(Duel.router_complains_to_pod), 2),
    (Walk.complain, 5),
    (lambda walk: walk.without_port(Duel.node_asks), 1),
    (lambda walk: walk.without_port(Duel.node_complains), 2),
    (lambda walk: walk.without_port(Duel.node_complains_of_request), 0.5),
    (lambda walk: walk.without_port(Duel.stack_sends), 0.5),
    (lambda walk: walk.duel.time_passes(walk.choose.choice(PASSING)), 1.5),
    (lambda walk: walk.duel.collector_scans(), 1),
    (lambda walk: walk.duel.collector_scans(OFTEN), 0.05),
    (lambda walk: walk.duel.rule_is(walk.choose.choice(RULES)), 0.2),
    (Walk.lose, 2),
    (Walk.change_socket, 0.5),
]
