"""What the configuration of masquerading means for the datapath."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from agent.config import Config
from agent.ipmasq import Rules
from agent.masquerade import flow_limit, inline_rules, lanes, map_sizes, prefixes, settings
from agent.netlink.sysctl import with_range
from agent.sections import Masquerade
from agent.state import Address, Lanes, Network

NATIVE, STACK, BOTH, NEITHER = Lanes(native=True), Lanes(stack=True), Lanes(native=True, stack=True), Lanes()
MAPPED = int(IPv6Address("::ffff:0:0"))


def net(text: str) -> Network:
    """Return a prefix."""
    return ip_network(text)


def longest(table: dict[Network, Lanes], address: Address) -> Lanes:
    """Return what the kernel's longest prefix match over 128 bits finds: IPv4 is v4-mapped there."""

    def mapped(network: Network) -> IPv6Network:
        if isinstance(network, IPv4Network):
            return IPv6Network((MAPPED | int(network.network_address), 96 + network.prefixlen))
        return network

    found = address if isinstance(address, IPv6Address) else IPv6Address(MAPPED | int(address))
    matching = [(mapped(network).prefixlen, value) for network, value in table.items() if found in mapped(network)]
    return max(matching, key=lambda item: item[0])[1] if matching else NEITHER


v4 = st.builds(
    lambda bits, length: IPv4Network((bits << 24, length), strict=False), st.integers(0, 255), st.integers(0, 10)
)
v6 = st.builds(
    lambda bits, length: IPv6Network((bits << 120, length), strict=False), st.integers(0, 255), st.integers(0, 10)
)
networks = st.lists(st.one_of(v4, v6), max_size=6)
addresses = st.one_of(
    st.integers(0, 2**32 - 1).map(lambda number: ip_address(number)),
    st.integers(0, 255).map(lambda bits: IPv6Address(bits << 120)),
)


@given(networks, networks, addresses)
def test_lanes_are_those_of_all_prefixes(native: list[Network], stack: list[Network], address: Address) -> None:
    """The longest match tells of an address whether any prefix of each list covers it, families apart."""
    expected = Lanes(
        native=any(address in network for network in native), stack=any(address in network for network in stack)
    )
    assert longest(lanes(native=native, stack=stack), address) == expected


def test_default_prefixes() -> None:
    """By default, the pods' own ranges and link-local ones are not masqueraded, and usual services are kube-proxy's."""
    config = Config()
    own = [each.subnet for each in config.own_ranges]
    assert prefixes(config.masquerade, inline_rules(config.masquerade), own) == {
        net("10.244.0.0/24"): NATIVE,
        net("fd00:10:244::/64"): NATIVE,
        net("169.254.0.0/16"): NATIVE,
        net("fe80::/10"): NATIVE,
        net("10.96.0.0/12"): STACK,
        net("fd00:10:96::/112"): STACK,
    }


def test_rules_become_prefixes() -> None:
    """What ip-masq-agent exempts is native, services in it are so too; link-local addresses may be masqueraded."""
    rules = Rules(masqLinkLocal=True, masqLinkLocalIPv6=True)
    masquerade = Masquerade(service_cidrs=("10.96.0.0/12",))
    assert prefixes(masquerade, rules, [net("100.64.0.0/24")]) == {
        net("100.64.0.0/24"): NATIVE,
        net("10.0.0.0/8"): NATIVE,
        net("172.16.0.0/12"): NATIVE,
        net("192.168.0.0/16"): NATIVE,
        net("10.96.0.0/12"): BOTH,
    }


def test_switched_off() -> None:
    """Without masquerading, every destination is native."""
    masquerade = Masquerade(enabled=False)
    table = prefixes(masquerade, inline_rules(masquerade), [])
    assert longest(table, ip_address("192.0.2.1")) == longest(table, ip_address("2001:db8::1")) == NATIVE
    assert longest(table, ip_address("10.96.0.1")) == BOTH


def test_settings_are_the_configuration() -> None:
    """Every setting is the field of its name, but for the network namespace, which is no configuration."""
    masquerade = Masquerade(
        first_port=1,
        last_port=2,
        tcp_open=3,
        tcp_established=4,
        tcp_closed=5,
        udp=6,
        icmp=7,
        other=8,
        other_protocols="stack",
        stack_routes=True,
    )
    assert settings(masquerade, 4789).tunnel_port == 4789
    for name in settings(masquerade).__dataclass_fields__.keys() - {"netns", "tunnel_port"}:
        assert getattr(settings(masquerade), name) == getattr(masquerade, name)


@pytest.mark.parametrize(
    ("gigabytes", "flows"), [(0.5, 1 << 16), (2, 1 << 16), (4, 1 << 17), (23, 1 << 19), (32, 1 << 20), (999, 1 << 20)]
)
def test_flows_by_memory(gigabytes: float, flows: int) -> None:
    """The default number of flows is a power of two that grows with the node's memory, within bounds."""
    assert flow_limit(Masquerade(), int(gigabytes * (1 << 30))) == flows


def test_flows_by_configuration() -> None:
    """The configured number is taken as it is, for both halves."""
    sizes = map_sizes(Masquerade(max_flows=1000), 1 << 40)
    assert (sizes["flows"], sizes["owners"]) == (1000, 1000)


@pytest.mark.parametrize("flows", [1, 1 << 16, 1 << 20, 1 << 24])
def test_flows_size_the_other_maps(flows: int) -> None:
    """Notes of open connections have most room, those of first packets least; none has too little to be of use."""
    sizes = map_sizes(Masquerade(max_flows=flows), 1 << 40)
    assert sizes["conversations"] >= max(flows // 2, 1 << 12)
    assert sizes["stack_flows"] >= max(flows // 4, 1 << 12)
    assert sizes["inbound"] >= max(flows // 16, 1 << 14)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first_port": 2000, "last_port": 1000}, "first_port 2000 is above last_port 1000"),
        ({"first_port": 0}, "greater than or equal to 1"),
        ({"last_port": 65536}, "less than or equal to 65535"),
        ({"udp": 0}, "greater than or equal to 1"),
        ({"udp": "300"}, "valid integer"),
        ({"other": 0}, "greater than or equal to 1"),
        ({"other_protocols": "punt"}, "'masquerade', 'stack' or 'drop'"),
        ({"max_flows": -1}, "greater than or equal to 0"),
        ({"non_masquerade_cidrs": ["10.0.0.1/8"]}, "has host bits set"),
        ({"service_cidrs": ["::ffff:10.0.0.0/104"]}, "give an IPv4 prefix"),
        ({"config_file": "/x", "masq_link_local": False}, "takes the place of masq_link_local: give either"),
        ({"uplink": "eth0"}, "Extra inputs are not permitted"),
    ],
)
def test_bad_configuration(fields: dict[str, object], message: str) -> None:
    """What makes no sense is refused, and the message says why."""
    with pytest.raises(ValidationError, match=message):
        Masquerade.model_validate(fields)


def test_whole_ipv6_is_a_prefix() -> None:
    """An IPv6 prefix so short that it covers the mapped addresses is allowed, and does not mean IPv4."""
    rules = inline_rules(Masquerade(non_masquerade_cidrs=("::/0",)))
    table = prefixes(Masquerade(), rules, [])
    assert longest(table, ip_address("2001:db8::1")) == NATIVE
    assert longest(table, ip_address("192.0.2.1")) == NEITHER


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("\n", "49152-65535"),
        ("8080\n", "8080,49152-65535"),
        ("1-2,9000,30000-32767\n", "1-2,9000,30000-32767,49152-65535"),
        ("49151", "49151-65535"),
        ("50000-50010,60000", "49152-65535"),
        ("49000-50000,65535", "49000-65535"),
    ],
)
def test_reserved_ports(before: str, after: str) -> None:
    """The range is added to what others reserved; to add it again changes nothing."""
    assert with_range(before, 49152, 65535) == after
    assert with_range(after, 49152, 65535) == after


ports = st.tuples(st.integers(1, 65535), st.integers(0, 100)).map(lambda pair: (pair[0], min(pair[0] + pair[1], 65535)))


@given(st.lists(ports, min_size=1, max_size=8))
def test_any_reserved_ports(spans: list[tuple[int, int]]) -> None:
    """Adding one range after another reserves exactly all of their ports."""
    text = ""
    for first, last in spans:
        text = with_range(text, first, last)
    listed = [(int(low), int(high or low)) for low, _, high in (span.partition("-") for span in text.split(","))]
    reserved = {port for low, high in listed for port in range(low, high + 1)}
    assert reserved == {port for low, high in spans for port in range(low, high + 1)}


def test_room_for_a_large_cluster() -> None:
    """The prefixes of 5,000 nodes, with a pod CIDR and an address of each family, leave room for others."""
    assert map_sizes(Masquerade(), 1 << 30)["prefixes"] >= 2 * 5000 * 4
