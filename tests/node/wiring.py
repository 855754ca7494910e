"""A pod wired as an ADD wires it, with everything that the caller of `agent.netlink` has to choose."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from agent import netlink
from agent.state import Address, HostRoute, Neighbour

GATEWAYS: dict[int, Address] = {4: IPv4Address("169.254.1.1"), 6: IPv6Address("fe80::1")}
MTU = 1450


@dataclass(frozen=True)
class Pod:
    """Everything that one wired pod has."""

    number: int
    netns: int
    name: str = "eth0"

    @property
    def host(self) -> str:
        """The name of the end on the host."""
        return f"pl{self.number:08x}{self.name[-1]}"

    @property
    def host_mac(self) -> str:
        """The MAC address of that end."""
        return f"02:aa:00:00:00:{self.number:02x}"

    @property
    def mac(self) -> str:
        """The MAC address of the end in the pod."""
        return f"02:bb:00:00:00:{self.number:02x}"

    @property
    def addresses(self) -> list[Address]:
        """One address per family."""
        return [IPv4Address(f"10.77.0.{self.number}"), IPv6Address(f"fd77::{self.number:x}")]

    @property
    def link_local(self) -> IPv6Address:
        """The link-local address in the pod."""
        return IPv6Address(f"fe80::bb:{self.number:x}")

    def create(self) -> int:
        """Create the pair; return the host end's index."""
        alias = f"podlane:test/{self.number}/{self.name}"
        return netlink.create_pair(self.host, self.host_mac, self.name, self.mac, MTU, alias, self.netns)

    def configure(self, addresses: list[Address] | None = None) -> None:
        """Configure the pod side, by default with all addresses."""
        wanted = self.addresses if addresses is None else addresses
        link_local = self.link_local if any(address.version == 6 for address in wanted) else None
        netlink.configure_pod(self.netns, self.name, wanted, link_local, self.host_mac, MTU, GATEWAYS)

    def wire(self) -> int:
        """Do all that an ADD does, host route and neighbour included; return the host end's index."""
        number = self.create()
        netlink.raise_host(self.host)
        self.configure()
        self.make_reachable(number)
        return number

    def make_reachable(self, number: int) -> None:
        """Give the host, where `number` is the host end, its routes and neighbours for the pod."""
        neighbours = {Neighbour(address, number): self.mac for address in self.addresses}
        assert netlink.RouteTable().upsert(dict.fromkeys(self.addresses, HostRoute(number))) == {}
        assert netlink.NeighbourTable().upsert(neighbours) == {}
