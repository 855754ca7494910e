"""The real programs and a model of masquerading get the same random sequences, and must agree on all they do.

PODLANE_SOAK_STEPS sets how many steps the long walk takes.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from agent.datapath.object import Object

from .harness import A, B, Pod, random_source
from .nat_duel import CAPACITY, NOTES, Duel
from .nat_talk import FAMILIES, FLAGS, KINDS, POD_PORTS, PORTS, How, Talk
from .nat_words import Part
from .world import Node, loaded_node

pytestmark = pytest.mark.root

STEPS = int(os.environ.get("PODLANE_SOAK_STEPS", "100000"))
WALK = 400
"""Steps on one node, until it starts anew."""

WITHOUT_PORT = (
    Duel.pod_asks,
    Duel.pod_replies,
    Duel.remote_asks,
    Duel.remote_asks_node,
    Duel.router_complains_to_pod,
    Duel.node_asks,
    Duel.stack_sends,
)
WITH_PORT = (Duel.remote_answers, Duel.router_complains)
BY_SOMEBODY = (Duel.pod_complains, Duel.pod_complains_of_request)
PASSING = (1, 2, 3, 6)


@pytest.fixture(scope="module")
def tight_node(datapath_object: Object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Load the real datapath for a node whose maps are soon full; those of notes never are, as the model's are not."""
    sizes = {**dict.fromkeys((*NOTES, "fragments"), 4096), "flows": CAPACITY, "owners": CAPACITY}
    with loaded_node(datapath_object, tmp_path_factory.mktemp("tight"), sizes) as node:
        yield node


@pytest.fixture
def duel(tight_node: Node) -> Iterator[Duel]:
    """Begin a duel."""
    fresh = Duel(tight_node)
    yield fresh
    fresh.close()


# ---- By Hypothesis, which finds the shortest sequence that tells them apart. (Where it depends on the port that the
# program picked, it calls the failure flaky: that choice is not its own. The failure is real.)

TALKS = st.builds(
    Talk,
    st.sampled_from(KINDS),
    st.sampled_from(FAMILIES),
    st.sampled_from((A, B)),
    st.sampled_from(POD_PORTS),
    st.sampled_from((0, 1)),
)
HOWS = st.builds(
    How,
    flags=st.sampled_from(FLAGS),
    part=st.sampled_from((Part.WHOLE, Part.WHOLE, Part.FIRST, Part.LATER)),
    identification=st.sampled_from((1, 2)),
    size=st.sampled_from((32, 40, 41)),
    has_checksum=st.booleans(),
    quoted=st.sampled_from((8, 20, 61)),
)
NODE_PORTS = st.sampled_from(PORTS)


class Sequences(RuleBasedStateMachine):
    """Sequences of packets and events; every step compares what program and model do, the end what they remember."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.duel = Duel(node)

    @rule(act=st.sampled_from(WITHOUT_PORT), talk=TALKS, how=HOWS)
    def packet(self, act: Callable[[Duel, Talk, How], object], talk: Talk, how: How) -> None:
        """Send a packet."""
        act(self.duel, talk, how)

    @rule(act=st.sampled_from(WITH_PORT), talk=TALKS, port=NODE_PORTS, how=HOWS)
    def packet_to_port(self, act: Callable[[Duel, Talk, int, How], object], talk: Talk, port: int, how: How) -> None:
        """Send a packet that concerns a port of the node's."""
        act(self.duel, talk, port, how)

    @rule(act=st.sampled_from(BY_SOMEBODY), talk=TALKS, how=HOWS, pod=st.sampled_from((A, B)))
    def complaint(self, act: Callable[[Duel, Talk, How, Pod], object], talk: Talk, how: How, pod: Pod) -> None:
        """Let a pod send an error."""
        act(self.duel, talk, how, pod)

    @rule(steps=st.sampled_from(PASSING))
    def time_passes(self, steps: int) -> None:
        """Let time pass."""
        self.duel.time_passes(steps)

    @rule()
    def collector_scans(self) -> None:
        """Collect."""
        self.duel.collector_scans()

    @rule(name=st.sampled_from(("flows", "owners", *NOTES)), number=st.integers(0, CAPACITY))
    def entry_is_lost(self, name: str, number: int) -> None:
        """Lose an entry."""
        self.duel.entry_is_lost(name, number)

    @rule(talk=TALKS, port=NODE_PORTS)
    def socket_opens_or_closes(self, talk: Talk, port: int) -> None:
        """Open or close a socket of the node's."""
        self.duel.socket_opens_or_closes(talk, port)

    def teardown(self) -> None:
        """Compare what is left."""
        self.duel.close()
        self.duel.compare_memory()


@pytest.mark.timeout(600)  # to find the shortest of a failure takes Hypothesis up to five minutes
def test_sequences(tight_node: Node) -> None:
    """Program and model agree on every outcome, verdict, packet and entry, through the sequences of Hypothesis."""
    run_state_machine_as_test(
        lambda: Sequences(tight_node),  # type: ignore[arg-type] # Hypothesis takes a factory, too
        settings=settings(
            max_examples=120,
            stateful_step_count=60,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


# ---- Many, with flows that live longer


class Walk:
    """Random steps of a duel; most packets belong to flows that are there."""

    def __init__(self, duel: Duel, choose: random.Random) -> None:
        self.duel = duel
        self.choose = choose
        self.kinds = choose.choice([KINDS, KINDS, ("tcp",), ("udp",), ("echo",)])

    def step(self) -> None:
        """Do something."""
        acts, weights = zip(*WEIGHTS, strict=True)
        self.choose.choices(acts, weights)[0](self)

    def talk(self) -> Talk:
        """Choose who talks."""
        pick = self.choose.choice
        return Talk(pick(self.kinds), pick(FAMILIES), pick((A, B)), pick(POD_PORTS), pick((0, 1)))

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
    (lambda walk: walk.without_port(Duel.stack_sends), 0.5),
    (lambda walk: walk.duel.time_passes(walk.choose.choice(PASSING)), 1.5),
    (lambda walk: walk.duel.collector_scans(), 1),
    (Walk.lose, 2),
    (Walk.change_socket, 0.5),
]

REACHED = {
    "fwd_uplink", "punt_reply",
    "masq_out", "fwd_reply", "fwd_host_out",
    "drop_masq_exhausted", "drop_masq_fragment", "drop_masq_full", "drop_masq_unsupported",
    "masq_in", "fwd_inbound", "fwd_host_in", "punt_fragment",
    "fwd_from_stack",
}  # fmt: skip


@pytest.mark.timeout(120 + STEPS // 250)
def test_long_walk(tight_node: Node) -> None:
    """Program and model agree on every outcome, verdict, packet and entry, through 100,000 random steps."""
    choose, seen = random_source(), Counter[str]()
    for start in range(0, STEPS, WALK):
        duel = Duel(tight_node, seen)
        walk = Walk(duel, choose)
        try:
            for number in range(WALK):
                walk.step()
                if number % 50 == 49:
                    duel.compare_memory()
        except AssertionError as error:
            raise AssertionError(f"in the walk that begins at step {start}") from error
        finally:
            duel.close()
    assert seen.keys() == REACHED


# ---- What they once disagreed about


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_about_another_pods_inbound_flow(duel: Duel, kind: str, family: int) -> None:
    """A pod's error about what an outsider sent to another pod does not leave; that pod's own does."""
    talk = Talk(kind, family, A)
    duel.remote_asks(talk, How())
    assert duel.pod_complains_of_request(talk, How(), B) == "drop_masq_unsupported"
    assert duel.pod_complains_of_request(talk, How(), A) == "fwd_reply"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fragment_of_an_echo_reply_opens_nothing(duel: Duel, family: int) -> None:
    """No fragment of an echo reply that answers nothing takes a port."""
    talk = Talk("echo", family)
    assert duel.pod_replies(talk, How(part=Part.FIRST)) == "drop_masq_unsupported"
    assert duel.pod_replies(talk, How(part=Part.LATER)) == "drop_masq_unsupported"
    assert duel.model.owners == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_note_ends_with_the_pods_own_flow(duel: Duel, family: int) -> None:
    """An outsider's packet of long ago does not let a connection out that the pod opened after it (cilium#47425)."""
    talk = Talk("tcp", family)
    duel.remote_asks(talk, How("S"))
    assert duel.pod_asks(talk, How("S")) == "masq_out"
    duel.time_passes(6)
    duel.collector_scans()
    assert duel.model.flows == {}
    assert duel.pod_asks(talk, How("A")) == "masq_out"
