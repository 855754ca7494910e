"""Pods, nodes and the world of a cluster, in every lane: who reaches whom, and who is seen to come."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from tests.node.echo import TCP, UDP, Server, server, who
from tests.node.machine import Netns, TestPod, pings
from tests.node.nodes import BOTH, PLACES, WORLD, Nodes, nodes

PORT = 7
KINDS = {TCP: "TCP", UDP: "UDP"}


@dataclass(frozen=True)
class Meeting:
    """Somebody asks at an address, and should be seen as coming from another one."""

    name: str
    asker: Netns
    address: str
    seen: str

    def __str__(self) -> str:
        return f"{self.name} → {self.address}"


@dataclass
class Mesh:
    """A cluster with a pod on each node, and servers at every pod, every node and the world."""

    nodes: Nodes
    pods: list[TestPod]
    servers: dict[tuple[str, socket.SocketKind], Server] = field(default_factory=dict)

    def serve(self, stack: ExitStack) -> None:
        """Run the servers."""
        places = [(pod.netns, pod.addresses) for pod in self.pods]
        places += [(member.netns, list(member.addresses)) for member in self.nodes.members]
        places.append((self.nodes.world, list(WORLD)))
        for netns, addresses in places:
            for address in addresses:
                for kind in KINDS:
                    self.servers[address, kind] = stack.enter_context(server(netns, kind, address, PORT))

    def seen(self, netns: Netns, address: str) -> dict[str, str]:
        """Return, by protocol, whom the server at an address takes somebody for."""
        found = {}
        for kind, name in KINDS.items():
            try:
                found[name] = who(netns, self.servers[address, kind])[0]
            except OSError as error:
                found[name] = repr(error)
        found["ping"] = "answered" if pings(netns, address, count=1) else "no answer"
        return found

    def check(self, meetings: Sequence[Meeting]) -> None:
        """Assert that everybody is seen under the address that is expected, by TCP and UDP, and that pings work."""
        wanted = {each: {"TCP": each.seen, "UDP": each.seen, "ping": "answered"} for each in meetings}
        found = {each: self.seen(each.asker, each.address) for each in meetings}
        assert {str(each): what for each, what in found.items() if what != wanted[each]} == {}


@pytest.fixture(scope="module", params=["direct", "vxlan", "auto"])
def mesh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Yield a cluster of each kind of routing. Only with `direct` does the router know the way to pods."""
    with nodes(tmp_path_factory.mktemp("mesh"), routing=request.param) as made, ExitStack() as stack:
        if request.param == "direct":
            stack.enter_context(made.router_knows_pods(*PLACES))
        made.start()
        it = Mesh(made, made.make_pods())
        it.serve(stack)
        yield it


def test_pod_to_pod(mesh: Mesh) -> None:
    """Every pod reaches every other one, which sees the address that the asking pod has."""
    mesh.check(
        [
            Meeting(f"pod on {mesh.nodes.members[here].name}", asker.netns, other.addresses[family], own)
            for here, asker in enumerate(mesh.pods)
            for other in mesh.pods
            for family, own in enumerate(asker.addresses)
            if other is not asker
        ]
    )


def test_node_to_pod(mesh: Mesh) -> None:
    """Every node reaches the pods of the others, which see the node's address."""
    mesh.check(
        [
            Meeting(member.name, member.netns, pod.addresses[family], member.addresses[family])
            for here, member in enumerate(mesh.nodes.members)
            for there, pod in enumerate(mesh.pods)
            for family in BOTH
            if here != there
        ]
    )


def test_pod_to_node(mesh: Mesh) -> None:
    """Every pod reaches every node, which sees the pod's own address: within the cluster nothing is masqueraded."""
    mesh.check(
        [
            Meeting(f"pod on {mesh.nodes.members[here].name}", pod.netns, member.addresses[family], own)
            for here, pod in enumerate(mesh.pods)
            for member in mesh.nodes.members
            for family, own in enumerate(pod.addresses)
        ]
    )


def test_node_to_node(mesh: Mesh) -> None:
    """Nodes reach each other under their own addresses, as without podlane."""
    mesh.check(
        [
            Meeting(member.name, member.netns, other.addresses[family], own)
            for member in mesh.nodes.members
            for other in mesh.nodes.members
            for family, own in enumerate(member.addresses)
            if other is not member
        ]
    )


def test_pod_to_world(mesh: Mesh) -> None:
    """Pods of every node reach the world, which sees their node."""
    mesh.check(
        [
            Meeting(f"pod on {member.name}", pod.netns, WORLD[family], member.addresses[family])
            for member, pod in zip(mesh.nodes.members, mesh.pods, strict=True)
            for family in BOTH
        ]
    )


def test_world_to_pod(mesh: Mesh) -> None:
    """Where the network knows the way to pods, the world reaches them by their own addresses, and is seen as itself."""
    with mesh.nodes.router_knows_pods(*PLACES):
        mesh.check(
            [
                Meeting("world", mesh.nodes.world, pod.addresses[family], WORLD[family])
                for pod in mesh.pods
                for family in BOTH
            ]
        )
