"""The real programs and a model of masquerading get the same random sequences, and must agree on all they do.

PODLANE_SOAK_STEPS sets how many steps the long walk takes.
"""

from __future__ import annotations

import os
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
from .nat_walk import BY_SOMEBODY, OFTEN, PASSING, RULES, WITH_PORT, WITHOUT_PORT, Walk
from .nat_words import Part, Rule
from .world import Node, loaded_node

pytestmark = pytest.mark.root

STEPS = int(os.environ.get("PODLANE_SOAK_STEPS", "60000"))
WALK = 400
"""Steps on one node, until it starts anew."""


@pytest.fixture(scope="module")
def tight_node(datapath_object: Object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Load the real datapath for a node whose maps are soon full; those of notes never are, as the model's are not."""
    sizes = {**dict.fromkeys((*NOTES, "fragments"), 4096), "flows": CAPACITY, "owners": CAPACITY}
    with (
        loaded_node(datapath_object, tmp_path_factory.mktemp("tight"), sizes) as node,
        pytest.MonkeyPatch.context() as it,
    ):
        it.setattr("agent.collector._REST", 0.0)  # nobody else waits for the interpreter
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

    @rule(times=st.sampled_from((1, 1, 1, 1, OFTEN)))
    def collector_scans(self, times: int) -> None:
        """Collect."""
        self.duel.collector_scans(times)

    @rule(which=st.sampled_from(RULES))
    def rule_changes(self, which: Rule) -> None:
        """Configure what becomes of other protocols."""
        self.duel.rule_is(which)

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
        self.duel.compare_counters()


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


REACHED = {
    "fwd_uplink", "punt_host", "punt_reply",
    "masq_out", "fwd_native", "fwd_reply", "fwd_host_out",
    "drop_masq_exhausted", "drop_masq_fragment", "drop_masq_full", "drop_masq_unsupported",
    "masq_in", "fwd_inbound", "fwd_host_in", "punt_fragment",
    "fwd_from_stack",
}  # fmt: skip


@pytest.mark.timeout(120 + STEPS // 250)
def test_long_walk(tight_node: Node) -> None:
    """Program and model agree on every outcome, verdict, packet and entry, through 60,000 random steps."""
    choose, seen = random_source(), Counter[str]()
    for start in range(0, STEPS, WALK):
        duel = Duel(tight_node, seen)
        walk = Walk(duel, choose)
        try:
            for number in range(WALK):
                walk.step()
                if number % 50 == 49:
                    duel.compare_memory()
                    duel.compare_counters()
        except AssertionError as error:
            raise AssertionError(f"in the walk that begins at step {start}") from error
        finally:
            duel.close()
    assert seen.keys() == REACHED


# ---- What they once disagreed about


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS[:-1])
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


@pytest.mark.parametrize("went_on", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_note_ends_with_the_pods_own_flow(duel: Duel, family: int, went_on: bool) -> None:
    """An outsider's packet of long ago does not let a connection out that the pod opened after it (cilium#47425)."""
    talk = Talk("tcp", family)
    duel.remote_asks(talk, How("S"))
    if went_on:
        assert duel.pod_replies(talk, How("SA")) == "fwd_reply"
        duel.remote_asks(talk, How("A"))
        assert duel.model.notes.conversations
    assert duel.pod_asks(talk, How("S")) == "masq_out"
    assert not duel.model.notes.conversations
    duel.compare_memory()
    duel.time_passes(6)
    duel.collector_scans()
    assert duel.model.flows == {}
    assert duel.pod_asks(talk, How("A")) == "masq_out"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_about_a_later_fragment(duel: Duel, family: int) -> None:
    """What has no ports is known by its addresses, also where an error quotes a later fragment of it."""
    talk, how = Talk("gre", family), How(part=Part.LATER)
    assert duel.pod_asks(talk, How()) == "masq_out"
    duel.router_complains(talk, 0, how)
    assert duel.pod_complains(talk, how, A) == "masq_out"
    assert duel.model.counted == {("other", "out"): 2, ("other", "in"): 1}
    duel.compare_counters()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["sctp", "gre", "ah"])
def test_errors_past_the_stack(duel: Duel, kind: str, family: int) -> None:
    """If other protocols are the stack's, a pod's error about what the stack did not bring does not leave as it is."""
    talk = Talk(kind, family)
    duel.rule_is(Rule.STACK)
    assert duel.pod_complains(talk, How(), A) == "drop_masq_unsupported"
    duel.stack_sends(talk, How())
    assert duel.pod_complains(talk, How(), A) == ("drop_masq_unsupported" if kind == "ah" else "fwd_native")


@pytest.mark.parametrize("part", Part)
@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_fragments(duel: Duel, family: int, part: Part) -> None:
    """If other protocols are dropped, their fragments are, as what they are: not as fragments without the first."""
    duel.rule_is(Rule.DROP)
    for kind in ("sctp", "gre", "ah"):
        assert duel.pod_asks(Talk(kind, family), How(part=part)) == "drop_masq_unsupported"


def test_ports_tried(duel: Duel) -> None:
    """A flow's first port is no retry: its own if it may have it, else one by chance; what was taken is one."""
    duel.pod_asks(Talk("udp", 4, A, PORTS[0]), How())
    duel.pod_asks(Talk("udp", 6, A, 1111), How())
    duel.pod_asks(Talk("sctp", 4, A, 1111), How())
    assert (duel.model.allocations, duel.model.may_have_tried) == (3, (0, 31))
    assert duel.retries() == 0
    duel.pod_asks(Talk("udp", 4, B, PORTS[0]), How())
    assert duel.retries() > 0
    duel.compare_counters()
