"""CHECK's comparison: it names every difference that matters, and takes what later plugins do for none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest

from agent.check import Found, check, differences
from agent.netlink.inspect import End, PodRoute, PodView
from agent.store import Netns, Phase, Pod
from agent.wiring import HOST_MAC
from cni.call import Attachment
from cni.errors import CniError, Code
from cni.result import Interface, Ip, Result, Route

MAC = "02:00:00:00:00:05"
OTHER_MAC = "02:00:00:00:00:99"
V4, V6 = ip_address("10.0.0.5"), ip_address("fd00::5")
VIA4, VIA6 = ip_address("169.254.1.1"), ip_address("fe80::1")
ANYWHERE4, ANYWHERE6 = ip_network("0.0.0.0/0"), ip_network("::/0")
POD = Pod(
    attachment=Attachment("net", "c1", "eth0"),
    device="pl0123",
    mac=MAC,
    mtu=1500,
    netns=Netns("/run/netns/x", "4:1"),
    addresses=(V4, V6),
    phase=Phase.ACTIVE,
    boot_id="boot",
)
PREV = Result(
    interfaces=(Interface("pl0123", HOST_MAC, 1500), Interface("eth0", MAC, 1500, sandbox="/run/netns/x")),
    ips=(Ip(ip_interface("10.0.0.5/32"), VIA4, 1), Ip(ip_interface("fd00::5/128"), VIA6, 1)),
    routes=(Route(ANYWHERE4, VIA4), Route(ANYWHERE6, VIA6)),
)
VIEW = PodView(
    end=End(index=2, peer=7, mac=MAC, mtu=1500, up=True),
    addresses=frozenset({ip_interface("10.0.0.5/32"), ip_interface("fd00::5/128"), ip_interface("fe80::5/64")}),
    routes=frozenset({PodRoute(ANYWHERE4, VIA4, 254), PodRoute(ANYWHERE6, VIA6, 254)}),
    neighbours={VIA4: HOST_MAC, VIA6: HOST_MAC},
)
FOUND = Found("4:1", VIEW, End(index=7, peer=2, mac=HOST_MAC, mtu=1500, up=True))


def found(**changes: Any) -> Found:  # noqa: ANN401  # fields of several types
    """Return what there is, with changes to the pod's side."""
    return replace(FOUND, view=replace(VIEW, **changes))


def end(**changes: Any) -> Found:  # noqa: ANN401  # fields of several types
    """Return what there is, with changes to the pod's end of the pair."""
    return found(end=replace(VIEW.end, **changes))


def host(**changes: Any) -> Found:  # noqa: ANN401  # fields of several types
    """Return what there is, with changes to the host's end of the pair."""
    assert FOUND.host is not None
    return replace(FOUND, host=replace(FOUND.host, **changes))


def eth0(**changes: Any) -> Result:  # noqa: ANN401  # fields of several types
    """Return prevResult with changes to the container's interface."""
    return replace(PREV, interfaces=(PREV.interfaces[0], replace(PREV.interfaces[1], **changes)))


def test_as_added() -> None:
    """What ADD made, seen right after it, has no differences."""
    assert list(differences(POD, PREV, FOUND)) == []


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (replace(FOUND, netns_id="4:2"), "CNI_NETNS is another network namespace than at ADD"),
        (replace(FOUND, view=None), "interface eth0 is missing"),
        (end(up=False), "interface eth0 is down"),
        (end(mac=OTHER_MAC), f"interface eth0 has MAC address {OTHER_MAC}, not {MAC}"),
        (end(mtu=9000), "interface eth0 has MTU 9000, above 1500"),
        (found(addresses=VIEW.addresses - {ip_interface("10.0.0.5/32")}), "address 10.0.0.5/32 is missing"),
        (found(addresses=VIEW.addresses - {ip_interface("fd00::5/128")}), "address fd00::5/128 is missing"),
        (found(routes=frozenset({PodRoute(ANYWHERE4, VIA4, 254)})), "route ::/0 via fe80::1 is missing"),
        (
            found(routes=VIEW.routes - {PodRoute(ANYWHERE4, VIA4, 254)} | {PodRoute(ANYWHERE4, V4, 254)}),
            "route 0.0.0.0/0 via 169.254.1.1 is missing",
        ),
        (found(neighbours={VIA6: HOST_MAC}), f"neighbour 169.254.1.1 is missing, not {HOST_MAC}"),
        (found(neighbours={VIA4: HOST_MAC, VIA6: MAC}), f"neighbour fe80::1 is {MAC}, not {HOST_MAC}"),
        (replace(FOUND, host=None), "host device pl0123 is missing"),
        (host(up=False), "host device pl0123 is down"),
        (host(mac=OTHER_MAC), f"host device pl0123 has MAC address {OTHER_MAC}, not {HOST_MAC}"),
        (host(peer=3), "host device pl0123 is not the other end of eth0"),
        (end(peer=8), "host device pl0123 is not the other end of eth0"),
        (end(peer=0), "host device pl0123 is not the other end of eth0"),
    ],
)
def test_difference_in_the_kernel(seen: Found, said: str) -> None:
    """Each thing that is not as ADD left it is named, and nothing else."""
    assert list(differences(POD, PREV, seen)) == [said]


@pytest.mark.parametrize(
    ("prev", "said"),
    [
        (replace(PREV, interfaces=PREV.interfaces[:1]), "prevResult has no interface eth0 of a container"),
        (eth0(sandbox=""), "prevResult has no interface eth0 of a container"),
        (eth0(name="eth1"), "prevResult has no interface eth0 of a container"),
        (replace(PREV, ips=PREV.ips[:1]), "address fd00::5 is reserved, but not in prevResult"),
        (eth0(mac=OTHER_MAC), f"interface eth0 has MAC address {MAC}, not {OTHER_MAC}"),
    ],
)
def test_difference_from_prev_result(prev: Result, said: str) -> None:
    """What prevResult records otherwise is named."""
    assert list(differences(POD, prev, FOUND)) == [said]


def test_no_longer_reserved() -> None:
    """An address that podlane gave, but does not reserve any more, is named; so is an attachment that is going."""
    assert list(differences(replace(POD, addresses=(V4,)), PREV, FOUND)) == [
        "address fd00::5 is in prevResult, but not reserved"
    ]
    assert list(differences(replace(POD, phase=Phase.RELEASING), PREV, FOUND)) == ["it is being released"]


def test_all_differences_are_told() -> None:
    """Several differences are told at once."""
    seen = replace(end(up=False, mtu=9000), host=None)
    assert len(list(differences(POD, PREV, seen))) == 3


@pytest.mark.parametrize(
    ("prev", "seen"),
    [
        # tuning's MAC: recorded, in any spelling
        (eth0(mac="02-00-00-00-00-99"), end(mac=OTHER_MAC)),
        (eth0(mac="02:00:00:00:00:0A"), end(mac="02:00:00:00:00:0a")),
        (eth0(mac=""), end(mac=OTHER_MAC)),
        # tuning's MTU: not recorded
        (PREV, end(mtu=1280)),
        (eth0(mtu=0), FOUND),
        # addresses and routes of others: on our interface, and recorded or not
        (PREV, found(addresses=VIEW.addresses | {ip_interface("192.0.2.1/24")})),
        (
            replace(PREV, ips=(*PREV.ips, Ip(ip_interface("192.0.2.1/24"), None, 1))),
            found(addresses=VIEW.addresses | {ip_interface("192.0.2.1/24")}),
        ),
        (PREV, found(routes=VIEW.routes | {PodRoute(ip_network("192.0.2.0/24"), None, 254)})),
        # of other interfaces
        (replace(PREV, ips=(*PREV.ips, Ip(ip_interface("192.0.2.1/24"), None, 0))), FOUND),
        (replace(PREV, routes=(*PREV.routes, Route(ip_network("192.0.2.0/24"), ip_address("192.0.2.1")))), FOUND),
        (replace(PREV, routes=(*PREV.routes, Route(ip_network("192.0.2.0/24"), None))), FOUND),
        # sbr moves routes to a table of its own
        (PREV, found(routes=frozenset({PodRoute(ANYWHERE4, VIA4, 100), PodRoute(ANYWHERE6, VIA6, 100)}))),
        # Multus takes a default route away, and out of the record
        (replace(PREV, routes=PREV.routes[1:]), found(routes=frozenset({PodRoute(ANYWHERE6, VIA6, 254)}))),
        # indexes of addresses are optional
        (replace(PREV, ips=tuple(replace(ip, interface=None) for ip in PREV.ips)), FOUND),
    ],
)
def test_tolerated(prev: Result, seen: Found) -> None:
    """What later plugins and Multus do is no difference."""
    assert list(differences(POD, prev, seen)) == []


def test_several_interfaces() -> None:
    """Of a container with two interfaces, each is compared with its own part of prevResult."""
    second = Interface("net1", OTHER_MAC, 1500, sandbox="/run/netns/x")
    prev = replace(
        PREV,
        interfaces=(*PREV.interfaces, second),
        ips=(*PREV.ips, Ip(ip_interface("10.9.0.9/32"), VIA4, 2)),
    )
    assert list(differences(POD, prev, FOUND)) == []


IMPORTED = replace(POD, phase=Phase.IMPORTED, device="imported-1", mac="", mtu=0, netns=Netns("", ""), addresses=(V4,))
BRIDGED = Result(
    interfaces=(Interface("cni0"), Interface("veth1"), Interface("eth0", MAC, sandbox="/run/netns/x")),
    ips=(Ip(ip_interface("10.0.0.5/24"), ip_address("10.0.0.1"), 2),),
    routes=(Route(ANYWHERE4, None), Route(ip_network("192.0.2.0/24"), ip_address("10.0.0.9"))),
)
BRIDGED_VIEW = PodView(
    end=End(index=2, peer=9, mac=MAC, mtu=1500, up=True),
    addresses=frozenset({ip_interface("10.0.0.5/24")}),
    routes=frozenset(
        {
            PodRoute(ANYWHERE4, ip_address("10.0.0.1"), 254),
            PodRoute(ip_network("192.0.2.0/24"), ip_address("10.0.0.9"), 254),
        }
    ),
    neighbours={},
)


def test_imported() -> None:
    """An attachment that another plugin wired is compared with what that plugin's result records, and no more."""
    seen = Found("4:7", BRIDGED_VIEW, None)
    assert list(differences(IMPORTED, BRIDGED, seen)) == []
    gone = replace(seen, view=replace(BRIDGED_VIEW, addresses=frozenset(), routes=frozenset()))
    assert list(differences(IMPORTED, BRIDGED, gone)) == [
        "address 10.0.0.5/24 is missing",
        "route 0.0.0.0/0 is missing",
        "route 192.0.2.0/24 via 10.0.0.9 is missing",
    ]


def test_without_addresses() -> None:
    """An interface without addresses has no gateways, and lacks none."""
    pod, prev = replace(POD, addresses=()), replace(PREV, ips=(), routes=())
    seen = found(addresses=frozenset(), routes=frozenset(), neighbours={})
    assert list(differences(pod, prev, seen)) == []


def test_without_a_record() -> None:
    """An attachment that the store does not know fails by name."""
    refused: Callable[[], None] = lambda: check(POD.attachment, None, PREV, -1)  # noqa: E731
    with pytest.raises(CniError, match="no addresses are reserved") as caught:
        refused()
    assert (caught.value.code, caught.value.details) == (Code.NOT_AS_ADDED, "net/c1/eth0")
