"""Which IPAM serves a call, and who is asked to take addresses back."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import supply
from agent.store import Origin
from cni.call import Call, parse
from cni.errors import CniError
from cni.result import Dns, Result
from cni.wire import Request
from tests.unit.calls import config, environment

SUBNET = {"type": "podlane", "subnet": "10.1.0.0/24"}


def call(**changes: object) -> Call:
    """Return an ADD."""
    return parse(environment(), config(**changes))


@pytest.mark.parametrize("ipam", [None, {}])
def test_own_ranges(ipam: object) -> None:
    """Without ipam the agent's own ranges serve, and requested addresses are taken from them."""
    found = supply.of(call(ipam=ipam, runtimeConfig={"ips": ["10.244.0.9/24"]}))
    assert (found.pools, found.own, found.delegate) == (None, None, None)
    assert [str(each) for each in found.requested] == ["10.244.0.9"]


@pytest.mark.parametrize("changes", [{"ipam": SUBNET}, {"runtimeConfig": {"ipRanges": [[{"subnet": "10.1.0.0/24"}]]}}])
def test_own_ipam(changes: dict[str, object]) -> None:
    """With ipam type "podlane", or with ranges from the runtime, podlane's own IPAM serves."""
    found = supply.of(call(**changes))
    assert found.pools is not None
    assert [str(pool) for pool in found.pools] == ["10.1.0.1-10.1.0.254"]
    assert found.delegate is None


def test_delegate() -> None:
    """Any other type is a plugin on CNI_PATH; there is nothing to take from the store then."""
    found = supply.of(call(ipam={"type": "host-local"}))
    assert found.pools == ()
    assert found.delegate is not None
    assert (found.delegate.type, found.delegate.path) == ("host-local", ("/opt/cni/bin",))


@pytest.mark.parametrize("ipam", [{"subnet": "10.1.0.0/24"}, {"type": "", "subnet": "10.1.0.0/24"}, {"type": 7}])
def test_no_type(ipam: object) -> None:
    """An ipam object that does not say whose it is is refused with code 7, and what is allowed is named."""
    with pytest.raises(CniError, match="type") as caught:
        supply.of(call(ipam=ipam))
    assert caught.value.code == 7


def test_dns() -> None:
    """What the configuration says of DNS takes the place of all that IPAM says, even if it is an empty list."""
    given = Result(dns=Dns(("10.0.0.53",), "ipam"))
    assert supply.dns(call().config, given) == given.dns
    assert supply.dns(call().config, None) == Dns()
    assert supply.dns(call(dns={"domain": "x"}).config, given) == Dns(domain="x")
    assert supply.dns(call(dns={"nameservers": []}).config, given) == Dns()
    assert supply.dns(call(runtimeConfig={"dns": {"servers": ["1.1.1.1"]}}).config, given) == Dns(("1.1.1.1",))


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """Return a directory with two plugins, one and two, that note their calls in the file `calls` beside them."""
    for name in ("one", "two"):
        plugin = tmp_path / name
        plugin.write_text(f'#!/bin/sh\necho {name} $CNI_COMMAND $CNI_CONTAINERID "$(cat)" >> {tmp_path}/calls\n')
        plugin.chmod(0o755)
    (tmp_path / "calls").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("now", "then", "expected"),
    [
        (None, None, []),
        ({"type": "podlane"}, {"type": "podlane"}, []),
        ({"type": "one"}, {"type": "one"}, ["one now"]),  # of one plugin the call itself counts
        ({"type": "one"}, None, ["one now"]),  # what podlane does not know the plugin may
        ({"type": "one"}, {"type": "two"}, ["one now", "two then"]),  # the configuration has changed
        (None, {"type": "two"}, ["two then"]),
        ("no call", {"type": "two"}, ["two then"]),  # after a crash, and for GC
    ],
)
def test_give_back(calls: Path, now: object, then: object, expected: list[str]) -> None:
    """Those are asked to take back what they gave who may have given something, each once, by DEL."""

    def request(ipam: object, container: str) -> Request:
        env = environment("ADD", CNI_CONTAINERID=container, CNI_PATH=str(calls), CNI_NETNS=None)
        return Request(env, config(ipam=ipam, name=container))

    add = request(then, "then")
    origin = Origin(add.env, add.stdin) if then else Origin()
    supply.give_back(None if now == "no call" else request(now, "now"), origin)
    lines = [line.split(maxsplit=3) for line in (calls / "calls").read_text().splitlines()]
    assert [f"{plugin} {container}" for plugin, _, container, _ in lines] == expected
    assert {command for _, command, *_ in lines} <= {"DEL"}
    assert all(f'"name": "{container}"' in stdin for *_, container, stdin in lines)


@pytest.mark.parametrize(
    ("ipam", "expected"), [(None, False), ({}, False), ({"type": "podlane"}, False), ({"type": "dhcp"}, True)]
)
def test_is_delegated(ipam: object, expected: bool) -> None:
    """Only another plugin has to take back what it gave; a call that nobody kept was none of that kind."""
    assert supply.is_delegated(Origin({}, config(ipam=ipam))) == expected
    assert not supply.is_delegated(Origin())
