"""Nodes come, go, move, reboot and claim what others have; between the others, no packet is lost meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from tests.node.echo import UDP, server, who
from tests.node.machine import TestPod, pings
from tests.node.nodes import FAR, FIRST, PLACES, SECOND, Entry, Member, Nodes, nodes
from tests.node.traffic import lossless_traffic

NEWCOMER = Entry("n9", ("192.0.2.99", "2001:db8::99"), ("10.244.9.0/24", "fd00:10:244:9::/64"))
RATE = 400  # datagrams per second and flow, since several agents are to keep up beside them
PATIENCE = 30.0  # seconds
OTHER = {SECOND: FAR, FAR: SECOND}
either = pytest.mark.parametrize("place", [SECOND, FAR])
"""A node on the first one's link, and one behind the router."""


@dataclass
class Wired:
    """A cluster with a pod on each node."""

    nodes: Nodes
    pods: list[TestPod]

    def talk(self) -> bool:
        """Say whether all pods reach each other, by both families and both ways."""
        return all(
            pings(here.netns, address, "-W", "0.5", count=1)
            for here in self.pods
            for there in self.pods
            for address in there.addresses
        )

    def wait_talk(self) -> None:
        """Wait until they do."""
        self.nodes.members[FIRST].wait_for(self.talk, "all pods to talk", PATIENCE)

    def wait_apart(self, place: int) -> None:
        """Wait until pods of the first node and another one do not reach each other."""
        first, other = self.pods[FIRST], self.pods[place]

        def apart() -> bool:
            return not any(
                pings(here.netns, address, "-W", "0.2", count=1)
                for here, there in ((first, other), (other, first))
                for address in there.addresses
            )

        self.nodes.members[FIRST].wait_for(apart, f"pods of nodes {FIRST} and {place} to be apart", PATIENCE)

    @property
    def everybody(self) -> list[Entry]:
        """All nodes that there are."""
        return [member.entry for member in self.nodes.members]

    @contextmanager
    def back_to_normal(self) -> Iterator[None]:
        """Tell all nodes of all nodes afterwards, whatever they were told meanwhile."""
        try:
            yield
        finally:
            self.nodes.tell()

    def ways(self) -> list[list[str]]:
        """Return the ways of all nodes."""
        return [ways(member) for member in self.nodes.members]

    def wait_ways(self, wanted: Sequence[Sequence[str]]) -> None:
        """Wait until the nodes have these ways."""
        self.nodes.members[FIRST].wait_for(lambda: self.ways() == wanted, f"the routes {wanted}", PATIENCE)

    @contextmanager
    def undisturbed(self, here: int, there: int) -> Iterator[None]:
        """Assert that meanwhile nothing is lost of the traffic between the pods of two nodes."""
        with lossless_traffic(self.pods[here], self.pods[there], RATE):
            yield


def ways(node: Member) -> list[str]:
    """Return the prefixes that a node has routes to by podlane's hand, but for its own."""
    return sorted(
        line.split()[0]
        for family in ("-4", "-6")
        for line in node.netns.run("ip", family, "route", "show", "proto", "111").stdout.splitlines()
        if "/" in line.split()[0]
    )


@pytest.fixture(scope="module")
def it(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wired]:
    """Yield a cluster with a pod on each node; every test leaves it as it found it, but for the pods."""
    with nodes(tmp_path_factory.mktemp("changes"), routing="auto") as made:
        made.start()
        wired = Wired(made, made.make_pods())
        wired.wait_talk()
        yield wired


@either
def test_node_leaves_and_joins(it: Wired, place: int) -> None:
    """Who leaves is no longer reached, nor the way to it kept; back again it is reached at once; others talk on."""
    before, gone = it.ways(), it.nodes.members[place]
    stay = [each for each in PLACES if each != place]
    without = [[way for way in before[each] if way not in gone.pod_cidrs] for each in stay]
    with it.undisturbed(*stay):
        with it.back_to_normal():
            it.nodes.tell([it.everybody[each] for each in stay])
            gone.wait_for(lambda: [it.ways()[each] for each in stay] == without, "the ways to go", PATIENCE)
            it.wait_apart(place)
        it.wait_ways(before)
        it.wait_talk()


@either
def test_node_moves(it: Wired, place: int) -> None:
    """A node that got other addresses is reached by these, once all are told, and again after it moved back."""
    member = it.nodes.members[place]
    home = int(member.addresses[0].rpartition(".")[2])
    with it.undisturbed(FIRST, OTHER[place]):
        for last in (77, home):
            member.move(last)
            it.nodes.tell()
            member.wait_for(lambda: seen_as_themselves(it, member), "the new addresses to be the node's", PATIENCE)
            it.wait_talk()


def seen_as_themselves(it: Wired, member: Member) -> bool:
    """Say whether pods reach a node as what they are: who does not know that it is one would masquerade them."""
    with ExitStack() as stack:
        servers = [stack.enter_context(server(member.netns, UDP, each, 7)) for each in member.addresses]
        try:
            return all(who(pod.netns, at)[0] in pod.addresses for pod in it.pods for at in servers)
        except TimeoutError:
            return False


@either
def test_node_reboots(it: Wired, place: int) -> None:
    """A node that reboots is back with new pods, and knows the others from its configuration."""
    member = it.nodes.members[place]
    with it.undisturbed(FIRST, OTHER[place]):
        member.reboot(it.pods[place])
        member.start_agent()
        it.pods[place] = member.make_pod(member.name)
        it.wait_talk()
    assert member.repairs() == {}


@either
def test_link_is_cut(it: Wired, place: int) -> None:
    """A link that was cut and healed carries what it carried before, without anybody's help."""
    with it.undisturbed(FIRST, OTHER[place]):
        with it.nodes.members[place].cut():
            it.wait_apart(place)
            time.sleep(1.5)  # a full pass of each agent sees it so
        it.wait_talk()


@either
def test_uplink_is_set_down(it: Wired, place: int) -> None:
    """Routes that the kernel forgets as the uplink is set down are back after it is up and has its addresses again."""
    before, member = it.ways(), it.nodes.members[place]
    with it.undisturbed(FIRST, OTHER[place]):
        member.netns.run("ip", "link", "set", "uplink", "down")
        time.sleep(1.5)  # a full pass of its agent sees it so
        member.restart_uplink()
        it.wait_ways(before)
        it.wait_talk()


def test_cidrs_change(it: Wired) -> None:
    """A node that was given other pod CIDRs is reached by these, and no longer by the old ones."""
    far, first = it.nodes.members[FAR], it.nodes.members[FIRST]
    with it.undisturbed(FIRST, SECOND):
        for cidrs in (("10.244.33.0/24", "fd00:10:244:33::/64"), far.pod_cidrs):
            gone = far.pod_cidrs
            far.delete_pod(it.pods[FAR])
            far.stop_agent()
            far.pod_cidrs = cidrs
            it.nodes.tell()
            far.start_agent()
            it.pods[FAR] = far.make_pod(far.name)
            it.wait_talk()
            assert set(ways(first)) & {*gone, *cidrs} == set(cidrs)


def test_overlap(it: Wired) -> None:
    """Who claims what others have is refused that, loudly, and nothing else; all others talk on."""
    first, second, far = it.nodes.members
    late = Entry("n9", NEWCOMER.addresses, (second.pod_cidrs[0], "10.244.3.128/25", *NEWCOMER.pod_cidrs))
    before = it.ways()
    with it.undisturbed(FIRST, SECOND), it.undisturbed(SECOND, FAR), it.back_to_normal():
        it.nodes.tell([*it.everybody, late])
        it.wait_ways([sorted([*each, *NEWCOMER.pod_cidrs]) for each in before])
        for cidr, holder in ((second.pod_cidrs[0], second), ("10.244.3.128/25", far)):
            words = f"{cidr} overlaps with {holder.pod_cidrs[0]} of node {holder.name}"
            first.wait_for(lambda words=words: words in first.log_tail(), f"words in the log: {words}", PATIENCE)  # type: ignore[misc]
    it.wait_ways(before)
    it.wait_talk()


def test_own_overlap(it: Wired) -> None:
    """A node whose own pod CIDR is an older one's says so to the runtime, and is ready again when that has changed."""
    first, second, _ = it.nodes.members
    claim = Entry(first.name, first.addresses, (*first.pod_cidrs, second.pod_cidrs[0]))
    with it.undisturbed(FIRST, FAR), it.back_to_normal():
        second.told([claim, second.entry])
        second.wait_for(lambda: second.cni("STATUS").exit_code != 0, "STATUS to tell of the overlap", PATIENCE)
        told = second.cni("STATUS").json()
        assert told["code"] == 50
        assert f"{second.pod_cidrs[0]} overlaps with {second.pod_cidrs[0]} of node {first.name}" in str(told)
    second.wait_for(lambda: second.cni("STATUS").exit_code == 0, "STATUS to be well again", PATIENCE)
    it.wait_talk()


def test_churn(it: Wired) -> None:
    """While other nodes come and go ten times a second, nothing is lost in either lane, and in the end all is right."""
    before = it.ways()
    with it.undisturbed(FIRST, SECOND), it.undisturbed(SECOND, FAR), it.back_to_normal():
        for number in range(30):
            it.nodes.tell([*it.everybody, *(passing(each) for each in range(number % 7, 40, 1 + number % 5))])
            time.sleep(0.1)
        assert it.ways() != before
    it.wait_ways(before)
    it.wait_talk()


def passing(number: int) -> Entry:
    """Return a node that is not really there: every second one on the link, the others behind the router."""
    address = (f"192.0.2.{100 + number}", f"203.0.113.{100 + number}")[number % 2]
    return Entry(f"p{number}", (address,), (f"10.245.{number}.0/24", f"fd00:10:245:{number:x}::/64"))


def test_agents_restart(it: Wired) -> None:
    """Agents that are killed and started again lose nothing, in either lane."""
    with it.undisturbed(FIRST, SECOND), it.undisturbed(SECOND, FAR):
        for member in it.nodes.members:
            member.kill_agent()
        for member in it.nodes.members:
            member.start_agent(wait=False)
        for member in it.nodes.members:
            member.wait_ready()
    assert [member.repairs() for member in it.nodes.members] == [{}] * 3


def test_tunnel_port_is_taken(it: Wired) -> None:
    """Where another tunnel has the port, the node is not ready, and says why; it serves pods, and heals by itself."""
    far = it.nodes.members[FAR]
    with it.undisturbed(FIRST, SECOND):
        far.kill_agent()
        far.netns.run("ip", "link", "delete", "podlane.vx")
        with other_tunnel(far):
            far.start_agent(wait=False)
            why = "other nodes cannot be reached: set podlane.vx up: UDP port 4789 is in use, by the device other"
            far.wait_for(lambda: why in far.get("/readyz")[1], "the agent to miss the tunnel")
            assert far.cni("STATUS", ifname="").json()["code"] == 51
            assert "UDP port 4789 is in use" in far.log_tail()
            far.delete_pod(it.pods[FAR])
            it.pods[FAR] = far.make_pod(far.name)
            it.wait_apart(FAR)
        far.wait_ready()
        it.wait_talk()


@contextmanager
def other_tunnel(node: Member) -> Iterator[None]:
    """Have a VXLAN device of somebody else's on a node for the duration, by the usual port."""
    kind = ("type", "vxlan", "id", "5", "dstport", "4789", "local", node.addresses[0])
    node.netns.run("ip", "link", "add", "other", "up", *kind)
    try:
        yield
    finally:
        node.netns.run("ip", "link", "delete", "other")


def test_unusable_configuration(it: Wired) -> None:
    """A configuration that is broken or gone changes nothing: what was told last holds, and the log says why."""
    member, before = it.nodes.members[FIRST], it.ways()
    good = member.config.read_text()
    with it.back_to_normal():
        for bad in ("nodes: [", good.replace("n2", "n3"), good + "unknown: 1\n", None):
            said = complaints(member)
            member.config.unlink()
            if bad is not None:
                member.config.write_text(bad)
            member.wait_for(lambda said=said: complaints(member) > said, "words about the configuration", PATIENCE)  # type: ignore[misc]
            assert it.ways() == before
    assert it.talk()


def complaints(member: Member) -> int:
    """Return how often a node's agent has complained of its configuration."""
    return member.log.read_text().count("bad configuration")
