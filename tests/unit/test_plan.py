"""What should be in the kernel, computed from pods and devices."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.plan import Inside, Outside, Tunnel, link_local, plan, routed_subnets
from agent.state import (
    Attached,
    Endpoint,
    Gateway,
    Hook,
    HostRoute,
    Lanes,
    Neighbour,
    PeerRoute,
    Prefix,
    Settings,
    Sources,
    State,
    TunnelDevice,
    TunnelEnd,
    Uplink,
)
from agent.store import Netns, Phase, Pod, Subnet
from cni.call import Attachment
from tests.support import prefix

MAC = "02:00:5e:10:00:01"
LINK_LOCAL = ip_address("fe80::5eff:fe10:1")
V4, V6 = ip_address("10.0.0.1"), ip_address("fd00::1")


def pod(
    *addresses: str,
    device: str = "pl1",
    mac: str = MAC,
    phase: Phase = Phase.ACTIVE,
    subnets: tuple[Subnet, ...] = (),
) -> Pod:
    """Return a pod with these addresses."""
    return Pod(
        attachment=Attachment("net", device, "eth0"),
        device=device,
        mac=mac,
        mtu=1500,
        netns=Netns("/run/netns/x", "4:1"),
        addresses=tuple(ip_address(address) for address in addresses),
        phase=phase,
        boot_id="boot",
        subnets=subnets,
    )


def hooks(device: str, ifindex: int) -> dict[Hook, Attached]:
    """Return the two programs of a pod's host end."""
    return {
        Hook(device, "ingress"): Attached(ifindex, "from_pod"),
        Hook(device, "egress"): Attached(ifindex, "to_pod"),
    }


@pytest.mark.parametrize("phase", [Phase.RESERVED, Phase.ACTIVE])
def test_pod_of_both_families(phase: Phase) -> None:
    """A pod has two programs, a neighbour and a route per address, and is an endpoint under its link-local one too."""
    assert plan([pod("10.0.0.1", "fd00::1", phase=phase)], {"pl1": 7, "eth0": 2}) == State(
        endpoints={V4: Endpoint(7, MAC), V6: Endpoint(7, MAC), LINK_LOCAL: Endpoint(7, MAC)},
        hooks=hooks("pl1", 7),
        neighbours={Neighbour(V4, 7): MAC, Neighbour(V6, 7): MAC},
        routes={V4: HostRoute(7), V6: HostRoute(7)},
    )


def test_pod_without_ipv6_has_no_link_local_address() -> None:
    """A pod that has no IPv6 may not send from a link-local address either."""
    assert plan([pod("10.0.0.1")], {"pl1": 7}).endpoints.keys() == {V4}
    assert plan([pod("fd00::1")], {"pl1": 7}).endpoints.keys() == {V6, LINK_LOCAL}


def test_releasing_pod_keeps_its_programs_only() -> None:
    """While a pod is released, nothing leads to it, and its programs drop whatever it still sends."""
    assert plan([pod("10.0.0.1", "fd00::1", phase=Phase.RELEASING)], {"pl1": 7}) == State(hooks=hooks("pl1", 7))


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("indexes", [{}, {"pl2": 7}])
def test_pod_without_device_gets_nothing(phase: Phase, indexes: dict[str, int]) -> None:
    """Nothing leads to a device that does not exist."""
    assert plan([pod("10.0.0.1", "fd00::1", phase=phase)], indexes) == State()


def test_no_pods() -> None:
    """Devices alone get nothing."""
    assert plan([], {"pl1": 7}) == State()


numbers = st.lists(st.integers(1, 250), unique=True, max_size=6)


@given(numbers, st.data())
def test_pods_are_planned_independently(chosen: list[int], data: st.DataObject) -> None:
    """The plan of many pods is the union of their plans, whatever their order is."""
    pods = [
        pod(
            f"10.0.0.{number}",
            f"fd00::{number:x}",
            device=f"pl{number}",
            mac=f"02:00:00:00:00:{number:02x}",
            phase=data.draw(st.sampled_from(Phase)),
        )
        for number in chosen
    ]
    indexes = {f"pl{number}": number for number in data.draw(st.lists(st.integers(1, 250), unique=True)) + chosen[1:]}
    union = State()
    for each in pods:
        alone = plan([each], indexes)
        union.endpoints.update(alone.endpoints)
        union.hooks.update(alone.hooks)
        union.neighbours.update(alone.neighbours)
        union.routes.update(alone.routes)
    assert plan(data.draw(st.permutations(pods)), indexes) == union
    assert {attached.ifindex for attached in union.hooks.values()} <= set(indexes.values())


@pytest.mark.parametrize(
    ("mac", "address"),
    [
        ("00:00:5e:00:53:01", "fe80::200:5eff:fe00:5301"),
        ("34:56:78:9a:bc:de", "fe80::3656:78ff:fe9a:bcde"),  # RFC 4291, appendix A: the universal bit is inverted
        ("36:56:78:9A:BC:DE", "fe80::3456:78ff:fe9a:bcde"),
        ("02:00:00:00:00:01", "fe80::ff:fe00:1"),
        ("ff:ff:ff:ff:ff:ff", "fe80::fdff:ffff:feff:ffff"),
    ],
)
def test_link_local_address(mac: str, address: str) -> None:
    """The link-local address is the modified EUI-64 of the MAC address."""
    assert link_local(mac) == ip_address(address)


@given(st.binary(min_size=6, max_size=6))
def test_link_local_addresses_differ(octets: bytes) -> None:
    """The MAC address can be read back from its link-local address, so no two share one."""
    address: IPv6Address = link_local(octets.hex(":"))
    identifier = address.packed[8:]
    assert address.is_link_local
    assert bytes([identifier[0] ^ 2]) + identifier[1:3] + identifier[5:] == octets


def test_own_subnets_are_unreachable() -> None:
    """The node's own subnets are unreachable, pods or none; one of a single address is all its pod's."""
    subnets = [ip_network(each) for each in ("10.0.0.0/24", "fd00::/64", "10.0.1.1/32")]
    assert plan([], {}, subnets).subnets == {subnets[0]: "unreachable", subnets[1]: "unreachable"}


def test_outside() -> None:
    """An uplink has two programs and its addresses; addresses, prefixes, settings, sockets are as given."""
    settings = Settings(1, 2, 3, 4, 5, 6, 7, 8, "stack", False)
    sources = Sources(IPv4Address("192.0.2.1"), None)
    prefixes: dict[Prefix, Lanes] = {prefix("10.0.0.0/8"): Lanes(native=True)}
    outside = Outside(
        uplinks={"eth0": Uplink(2, sources)},
        node_addresses=frozenset([V4, V6]),
        prefixes=prefixes,
        settings=settings,
        sockets={"connect4": 7},
    )
    assert plan([], {}, outside=outside) == State(
        settings={0: settings},
        prefixes=prefixes,
        node_addresses={V4: 1, V6: 1},
        hooks={Hook("eth0", "ingress"): Attached(2, "from_uplink"), Hook("eth0", "egress"): Attached(2, "to_uplink")},
        uplinks={2: sources},
        sockets={"connect4": 7},
    )


TUNNEL = Tunnel("podlane.vx", TunnelDevice(4789, 1450, frozenset([V4])), TunnelEnd(112, 1450, "02:00:00:00:00:01"))


def test_tunnel_before_its_device() -> None:
    """Of a tunnel whose device is not there yet, that is all that can be asked for."""
    assert plan([], {}, outside=Outside(tunnel=TUNNEL)) == State(tunnel_devices={TUNNEL.name: TUNNEL.device})


def test_tunnel() -> None:
    """A tunnel has two programs and what they must know; routes to other nodes are as they are given, not copied."""
    routes: dict[Prefix, PeerRoute] = {prefix("10.1.0.0/24"): PeerRoute(9)}
    desired = plan([], {}, outside=Outside(tunnel=replace(TUNNEL, ifindex=9), peer_routes=routes))
    assert desired == State(
        tunnel_devices={TUNNEL.name: TUNNEL.device},
        hooks={
            Hook(TUNNEL.name, "ingress"): Attached(9, "from_tunnel"),
            Hook(TUNNEL.name, "egress"): Attached(9, "to_tunnel"),
        },
        tunnels={9: TUNNEL.end},
        peer_routes=routes,
    )
    assert desired.peer_routes is routes


def subnet(network: str, gateway: str = "") -> Subnet:
    """Return a subnet, with the node's address in it."""
    return Subnet(ip_network(network), ip_address(gateway) if gateway else None)


NET4, NET6 = subnet("10.0.0.0/24", "10.0.0.254"), subnet("fd00::/64", "fd00::fe")


def test_gateways() -> None:
    """The node has a subnet's gateway towards each pod of it, and nobody else, and speaks to them from there."""
    pods = [
        pod("10.0.0.1", "fd00::1", subnets=(NET4, NET6)),
        pod("10.0.0.2", "10.9.0.2", device="pl2", mac="02:00:5e:10:00:02", subnets=(subnet("10.9.0.0/24"), NET4)),
    ]
    desired = plan(pods, {"pl1": 7, "pl2": 8}, inside=Inside(routed_subnets(pods, [])))
    four, six = NET4.gateway, NET6.gateway
    assert four
    assert six
    assert desired.gateways == {Gateway(four, 7): 1, Gateway(six, 7): 1, Gateway(four, 8): 1}
    assert desired.node_addresses == {four: 1, six: 1}
    sources = {str(address): route.source for address, route in desired.routes.items()}
    assert sources == {"10.0.0.1": four, "fd00::1": six, "10.0.0.2": four, "10.9.0.2": None}


@pytest.mark.parametrize(
    ("pods", "node_addresses", "expected"),
    [
        ([pod("10.0.0.1", subnets=(NET4, NET6))], [], {NET4, NET6}),
        ([pod("10.0.0.1", subnets=(subnet("10.0.0.0/24"),))], [], set()),
        ([pod("10.0.0.1", subnets=(NET4,), phase=Phase.RELEASING)], [], set()),
        ([pod("10.0.0.1", subnets=(NET4,)), pod("10.0.0.254", device="pl2")], [], set()),
        ([pod("10.0.0.1", subnets=(NET4,)), pod("10.0.0.254", device="pl2", phase=Phase.RELEASING)], [], {NET4}),
        ([pod("10.0.0.1", subnets=(NET4,))], ["10.0.0.254"], {NET4}),
        ([pod("10.0.0.1", subnets=(NET4, NET6))], ["10.0.0.9"], {NET6}),
        (
            [pod("10.0.0.1", subnets=(subnet("10.0.0.1/32", "10.0.0.254"),))],
            ["10.0.0.1"],
            {subnet("10.0.0.1/32", "10.0.0.254")},
        ),
        (
            [pod("10.0.0.1", subnets=(NET4,)), pod("10.0.0.2", subnets=(subnet("10.0.0.0/24", "10.0.0.99"),))],
            [],
            {NET4, subnet("10.0.0.0/24", "10.0.0.99")},
        ),
    ],
)
def test_routed_subnets(pods: list[Pod], node_addresses: list[str], expected: set[Subnet]) -> None:
    """The node is a gateway where that is asked for, unless a pod has the address, or the node another one there."""
    assert routed_subnets(pods, [ip_address(each) for each in node_addresses]) == expected


def test_new_mac() -> None:
    """A MAC address that changed counts, for all but the link-local address, which the pod keeps."""
    mac = "02:00:5e:10:00:99"
    desired = plan([pod("10.0.0.1", "fd00::1")], {"pl1": 7}, inside=Inside(macs={7: mac, 8: MAC}))
    assert desired.endpoints == dict.fromkeys((V4, V6, LINK_LOCAL), Endpoint(7, mac))
    assert set(desired.neighbours.values()) == {mac}
