"""Results at random: what survives of one in each version, and what is made of other plugins' output."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_interface, ip_network
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cni.errors import CniError
from cni.result import Dns, Interface, Ip, Result, Route, parse_result
from tests.unit.calls import VERSIONS, anything

names = st.text(min_size=1, max_size=8)
numbers = st.integers(0, 0xFFFFFFFF)
addresses = st.ip_addresses(v=4) | st.ip_addresses(v=6)
interfaces = st.builds(Interface, names, st.text(max_size=8), numbers, st.text(max_size=8), names, names)


@st.composite
def prefixed(draw: st.DrawFn) -> str:
    """Return an address with a prefix length."""
    address: IPv4Address | IPv6Address = draw(addresses)
    return f"{address}/{draw(st.integers(0, address.max_prefixlen))}"


ips = st.builds(Ip, prefixed().map(ip_interface), st.none() | addresses, st.none() | numbers)
routes = st.builds(
    Route,
    prefixed().map(lambda text: ip_network(text, strict=False)),
    st.none() | addresses,
    numbers,
    numbers,
    numbers,
    st.none() | numbers,
    st.none() | numbers,
)
texts = st.lists(names, max_size=2).map(tuple)
results = st.builds(
    Result,
    st.lists(interfaces, max_size=3).map(tuple),
    st.lists(ips, min_size=1, max_size=3).map(tuple),
    st.lists(routes, max_size=3).map(tuple),
    st.builds(Dns, texts, st.text(max_size=8), texts, texts),
)


def kept(result: Result, version: str) -> Result:
    """Return what a version can hold of a result."""
    if version == "1.1.0":
        return result
    routes = tuple(Route(route.dst, route.gw) for route in result.routes)
    if version in ("0.1.0", "0.2.0"):
        firsts = {ip.address.version: replace(ip, interface=None) for ip in reversed(result.ips)}
        return Result(
            ips=tuple(firsts[family] for family in sorted(firsts)),
            routes=tuple(route for family in sorted(firsts) for route in routes if route.dst.version == family),
            dns=result.dns,
        )
    bare = tuple(Interface(each.name, each.mac, sandbox=each.sandbox) for each in result.interfaces)
    return replace(result, interfaces=bare, routes=routes)


@settings(max_examples=150, deadline=None)
@given(results, st.sampled_from(VERSIONS))
def test_nothing_is_lost_that_a_version_can_hold(result: Result, version: str) -> None:
    """A result that was printed in a version, and read again, is the same but for what that version cannot hold."""
    printed = json.loads(json.dumps(result.to_json(version)))
    assert parse_result(printed, "1.1.0") == kept(result, version)


_entries = st.lists(
    st.dictionaries(st.sampled_from(["address", "dst", "name", "interface", "gw"]), anything) | anything
)
_documents: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "cniVersion": st.sampled_from(VERSIONS) | anything,
        **dict.fromkeys(("ips", "routes", "interfaces", "ip4", "ip6", "dns"), _entries | anything),
    },
)


@settings(max_examples=300, deadline=None)
@given(_documents | st.dictionaries(st.text(max_size=8), anything), st.sampled_from(VERSIONS))
def test_any_object_is_a_result_or_an_error(document: dict[str, Any], version: str) -> None:
    """Whatever another plugin prints, it is a result that can be printed in any version, or a CniError."""
    with suppress(CniError):
        read = parse_result(document, version)
        for each in reversed(VERSIONS):  # the oldest cannot hold every result
            json.dumps(read.to_json(each), allow_nan=False)
