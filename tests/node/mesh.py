"""Who talks to whom in a cluster: pods, nodes and the world, a server at each, and as whom everybody is seen."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address

from tests.node.echo import TCP, UDP, Server, server, who
from tests.node.machine import Netns, TestPod, pings
from tests.node.nodes import WORLD, Nodes

PORT = 7
KINDS = {TCP: "TCP", UDP: "UDP"}


@dataclass(frozen=True)
class Party:
    """Somebody who asks and answers; at most one address of each family (0 is IPv4, 1 is IPv6)."""

    name: str
    netns: Netns
    addresses: Mapping[int, str]

    @classmethod
    def of(cls, name: str, netns: Netns, addresses: Iterable[str]) -> Party:
        """Return who has these addresses."""
        return cls(name, netns, {int(ip_address(each).version == 6): each for each in addresses})


@dataclass
class Mesh:
    """A cluster with a pod on each node, and servers at every pod, every node and the world."""

    nodes: Nodes
    wired: list[TestPod]
    """The pods, by the places of their nodes."""
    servers: dict[tuple[str, socket.SocketKind], Server] = field(default_factory=dict)

    @property
    def pods(self) -> list[Party]:
        """The pods as those who talk."""
        places = zip(self.nodes.members, self.wired, strict=True)
        return [Party.of(f"pod on {member.name}", pod.netns, pod.addresses) for member, pod in places]

    @property
    def hosts(self) -> list[Party]:
        """The nodes themselves."""
        return [Party.of(member.name, member.netns, member.addresses) for member in self.nodes.members]

    @property
    def world(self) -> Party:
        """The world behind the router, by the families that nodes have addresses of."""
        return Party.of("world", self.nodes.world, [WORLD[family] for family in self.nodes.families.nodes])

    def serve(self, stack: ExitStack) -> None:
        """Run the servers."""
        for party in [*self.pods, *self.hosts, self.world]:
            for address in party.addresses.values():
                for kind in KINDS:
                    self.servers[address, kind] = stack.enter_context(server(party.netns, kind, address, PORT))

    def check(self, meetings: Iterable[tuple[Party, Party, Party]]) -> None:
        """Assert of each (asker, asked, seen): asked by TCP and UDP, the one sees the other as the third; pings work.

        By every family that all three have.
        """
        wrong = {}
        for asker, asked, seen in meetings:
            for family in asker.addresses.keys() & asked.addresses.keys() & seen.addresses.keys():
                wanted = {"TCP": seen.addresses[family], "UDP": seen.addresses[family], "ping": "answered"}
                found = self._meet(asker.netns, asked.addresses[family])
                if found != wanted:
                    wrong[f"{asker.name} → {asked.name}, {asked.addresses[family]}"] = found
        assert wrong == {}

    def _meet(self, asker: Netns, address: str) -> dict[str, str]:
        """Return, by protocol, whom the server at an address takes the asker for, or what went wrong."""
        found = {}
        for kind, name in KINDS.items():
            try:
                found[name] = who(asker, self.servers[address, kind])[0]
            except OSError as error:
                found[name] = repr(error)
        found["ping"] = "answered" if pings(asker, address, count=1) else "no answer"
        return found


@contextmanager
def mesh(nodes: Nodes) -> Iterator[Mesh]:
    """Start a cluster's agents, make its pods, and run the servers."""
    nodes.start()
    with ExitStack() as stack:
        it = Mesh(nodes, nodes.make_pods())
        it.serve(stack)
        yield it
