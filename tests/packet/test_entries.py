"""The agent's tables in the datapath's maps: what is written is what is read, and what the programs understand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.datapath.entries import (
    AddressTable,
    EndpointTable,
    PrefixTable,
    SettingsTable,
    TunnelTable,
    UplinkTable,
    to_address,
)
from agent.datapath.loader import Datapath, load
from agent.datapath.object import Object
from agent.state import (
    Address,
    Endpoint,
    Lanes,
    Network,
    OtherProtocols,
    Prefix,
    Settings,
    Sources,
    Table,
    TunnelEnd,
)
from tests.support import prefix

SIZES = {"endpoints": 16, "uplinks": 16, "tunnels": 16, "node_addresses": 16, "prefixes": 64}


@pytest.fixture
def datapath(datapath_object: Object, pins: Path) -> Iterator[Datapath]:
    """Load the datapath with room in the maps."""
    with load(datapath_object, pins, SIZES) as loaded:
        yield loaded


@pytest.fixture
def prefixes(datapath: Datapath) -> PrefixTable:
    """Return the table of prefixes, as the agent makes it."""
    constants = datapath.constants
    lanes = {name: constants[f"PREFIX_{name.upper()}"] for name in ("native", "stack", "node")}
    return PrefixTable(datapath.maps["prefixes"], **lanes)


def assert_holds(table: Table[Any, Any], entries: Mapping[Any, Any]) -> None:
    """Write, read, write again, delete."""
    assert table.upsert(entries) == {}
    assert table.read() == entries
    assert table.upsert(entries) == {}
    assert table.read() == entries
    assert table.delete(list(entries)) == {}
    assert table.delete(list(entries)) == {}
    assert table.read() == {}


def test_endpoints(datapath: Datapath) -> None:
    """What the programs have noted of a pod outlives each change of the rest; in a new map, pods of before have it."""
    old, new = ip_address("10.0.0.1"), ip_address("fd00::2")
    table = EndpointTable(datapath.maps["endpoints"], former=[old])

    def noted() -> dict[Address, int]:
        return {to_address(key): value["via_stack"] for key, value in datapath.maps["endpoints"].items()}

    one, other = Endpoint(7, "02:00:00:00:00:07"), Endpoint(8, "02:00:00:00:00:08", queued=True)
    assert table.upsert({old: one, new: one}) == {}
    assert noted() == {old: 1, new: 0}
    assert table.upsert({old: other, new: other}) == {}
    assert noted() == {old: 1, new: 0}
    assert table.read() == {old: other, new: other}
    table.delete([old])
    table.upsert({old: one})
    assert noted() == {old: 0, new: 0}  # another pod's by now


def test_uplinks(datapath: Datapath) -> None:
    """An uplink may have an address of either family, both or none."""
    ipv4, ipv6 = IPv4Address("192.0.2.1"), IPv6Address("2001:db8::1")
    entries = {1: Sources(ipv4, ipv6), 2: Sources(ipv4, None), 3: Sources(None, ipv6), 2**31 - 1: Sources(None, None)}
    assert_holds(UplinkTable(datapath.maps["uplinks"]), entries)


def test_tunnels(datapath: Datapath) -> None:
    """A tunnel has a number, an MTU and a MAC address, and the node's addresses as an uplink has them."""
    mac, ipv4, ipv6 = "02:70:6c:61:6e:65", IPv4Address("192.0.2.1"), IPv6Address("2001:db8::1")
    entries = {7: TunnelEnd(112, 1450, mac, ipv4, ipv6), 8: TunnelEnd(2**24 - 1, 1430, mac, None, ipv6)}
    assert_holds(TunnelTable(datapath.maps["tunnels"]), entries)


def test_node_addresses(datapath: Datapath) -> None:
    """Addresses of both families, the loopback ones among them."""
    entries = {ip_address(each): 1 for each in ("127.0.0.1", "0.0.0.1", "192.0.2.1", "::1", "fe80::1", "2001:db8::")}
    assert_holds(AddressTable(datapath.maps["node_addresses"]), entries)


def test_settings(datapath: Datapath) -> None:
    """The one entry is there from the start, with zeros, and takes what it is given."""
    constants = datapath.constants
    choices = {name: constants[f"OTHER_{name.upper()}"] for name in get_args(OtherProtocols)}
    table = SettingsTable(datapath.maps["settings"], other_protocols=choices)
    assert table.read() == {0: Settings(0, 0, 0, 0, 0, 0, 0, 0, "drop", False)}
    for choice in choices:
        wanted = {0: Settings(1, 65535, 3, 4, 5, 6, 7, 8, choice, True)}
        assert table.upsert(wanted) == {}
        assert table.read() == wanted


def test_unknown_choice(datapath: Datapath) -> None:
    """What no agent of this version has written is no choice, and so is written again."""
    datapath.maps["settings"].update(0, {"other_protocols": 99})
    table = SettingsTable(datapath.maps["settings"], other_protocols={"drop": 0})
    assert table.read()[0].other_protocols == "unknown:99"


@pytest.mark.parametrize(
    "lanes",
    [
        Lanes(),
        Lanes(native=True),
        Lanes(stack=True),
        Lanes(native=True, stack=True),
        Lanes(native=True, peer=IPv4Address("192.0.2.1"), tunnel=7, mtu=1350),
        Lanes(peer=IPv6Address("2001:db8::1"), node=True),
    ],
)
def test_lanes(prefixes: PrefixTable, lanes: Lanes) -> None:
    """Each combination of lanes, of prefixes of all lengths."""
    texts = ("0.0.0.0/0", "10.0.0.0/8", "192.0.2.1/32", "::/0", "::/1", "fd00::/8", "2001:db8::1/128", "::/96")
    assert_holds(prefixes, dict.fromkeys(map(prefix, texts), lanes))


networks = st.one_of(
    st.builds(
        lambda bits, length: ip_network((bits, length), strict=False), st.integers(0, 2**32 - 1), st.integers(0, 32)
    ),
    st.builds(
        lambda bits, length: ip_network((IPv6Address(bits), length), strict=False),
        st.integers(2**96, 2**128 - 1),  # beyond the mapped addresses
        st.integers(0, 128),
    ),
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(networks, st.builds(Lanes, native=st.booleans(), stack=st.booleans()), max_size=10))
def test_any_prefixes(prefixes: PrefixTable, entries: dict[Network, Lanes]) -> None:
    """Whatever prefixes there are, they are read as they were written."""
    packed = {Prefix.of(network): lanes for network, lanes in entries.items()}
    assert_holds(prefixes, packed)
    assert [each.network for each in packed] == list(entries)


def test_full(datapath: Datapath) -> None:
    """What does not fit is a failure by its key; the rest is in force."""
    entries = {ip_address(number): 1 for number in range(1, SIZES["node_addresses"] + 3)}
    table = AddressTable(datapath.maps["node_addresses"])
    failures = table.upsert(entries)
    assert len(failures) == 2
    assert all("node_addresses" in str(failure) for failure in failures.values())
    assert table.read().keys() == entries.keys() - failures.keys()
