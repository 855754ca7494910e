"""Host ports: what a runtime may ask for, who has which, and where they lead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from agent import host_ports
from agent.allotment import HostPortTaken
from agent.plan import plan
from agent.state import Endpoint, HostPort, PodPort
from agent.store import Phase, Published, Store
from cni.call import Attachment
from cni.errors import CniError
from cni.netconf import PortMapping
from tests.unit.stores import NETNS, attachment, open_store
from tests.unit.test_plan import MAC, pod

TCP, UDP = 6, 17
RANGE = range(49152, 65536)


def mapping(**keys: object) -> PortMapping:
    """Return a mapping of port 8080 to port 80, but for these keys."""
    return PortMapping.model_validate({"hostPort": 8080, "containerPort": 80, **keys})


def published(address: str, port: int = 8080, protocol: int = TCP, to: int = 80) -> Published:
    """Return a host port."""
    return Published(HostPort(ip_address(address), port, protocol), to)


def reserve(store: Store, it: Attachment, *ports: Published) -> None:
    """Reserve with host ports."""
    store.reserve(it, device=f"pl-{it}", mac=MAC, mtu=1500, netns=NETNS, pod_name="shop/web", published=ports)


def test_any_address_is_one_of_each_family() -> None:
    """Without an address, or with the unspecified one of a family, a port is at any; twice the same is once."""
    both = (published("0.0.0.0"), published("::"))  # noqa: S104
    assert host_ports.read([mapping(), mapping(protocol="TCP")], RANGE) == both
    assert host_ports.read([mapping(hostIP="0.0.0.0")], RANGE) == both[:1]  # noqa: S104
    assert host_ports.read([mapping(hostIP="::", protocol="udp")], RANGE) == (published("::", protocol=UDP),)


@pytest.mark.parametrize("port", [RANGE.start, RANGE.stop - 1])
def test_ports_for_masquerading_are_refused(port: int) -> None:
    """A port from which pods are masqueraded is refused by number and range; without masquerading it is not."""
    with pytest.raises(
        CniError, match=rf"^host port {port} is one of those for masquerading \(49152-65535\)"
    ) as caught:
        host_ports.read([mapping(hostPort=port)], RANGE)
    assert caught.value.code == 7
    assert host_ports.read([mapping(hostPort=port)], range(0))
    assert host_ports.read([mapping(hostPort=RANGE.start - 1)], RANGE)


def test_one_port_cannot_lead_to_two() -> None:
    """Two mappings of one port to different ports of the pod contradict each other."""
    with pytest.raises(CniError, match=r"0\.0\.0\.0:8080/tcp is to lead to two ports of the pod, 80 and 81"):
        host_ports.read([mapping(), mapping(containerPort=81)], RANGE)


def test_a_port_at_an_address_of_a_family_that_the_pod_lacks() -> None:
    """It could lead nowhere, and is refused; at any address, only the family that the pod has counts."""
    single = replace(pod("10.0.0.1"), published=(published("0.0.0.0"), published("::")))  # noqa: S104
    host_ports.check_families(single)
    with pytest.raises(CniError, match=r"\[fd00::9\]:8080/tcp cannot lead to the pod, which has no IPv6 address"):
        host_ports.check_families(replace(single, published=(published("fd00::9"),)))


@pytest.mark.parametrize(
    ("first", "second", "conflict"),
    [
        ("0.0.0.0", "0.0.0.0", True),  # noqa: S104
        ("0.0.0.0", "192.0.2.1", True),  # noqa: S104
        ("192.0.2.1", "0.0.0.0", True),  # noqa: S104
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("0.0.0.0", "::", False),  # noqa: S104
        ("::", "2001:db8::1", True),
        ("::", "192.0.2.1", False),
    ],
)
def test_conflicts(tmp_path: Path, first: str, second: str, conflict: bool) -> None:
    """A port is one pod's at an address, at any of a family also at each; who comes second has nothing."""
    store = open_store(tmp_path / "ipam.db")
    reserve(store, attachment("a"), published(first))
    reserve(store, attachment("b"), published(first, port=8081), published(first, protocol=UDP))
    before = store.pods()
    if conflict:
        with pytest.raises(HostPortTaken, match=r":8080/tcp is in use by .*container-a.* \(pod shop/web\)"):
            reserve(store, attachment("c"), published(second))
        assert store.pods() == before
        store.remove(attachment("a"))
    reserve(store, attachment("c"), published(second))
    last = store.get(attachment("c"))
    assert last is not None
    assert last.published == (published(second),)


def ports_of(store: Store, it: Attachment) -> Sequence[Published]:
    """Return an attachment's host ports."""
    found = store.get(it)
    assert found is not None
    return found.published


def test_they_survive_the_agent(tmp_path: Path) -> None:
    """Host ports are in the store, by each way to read it, until the attachment is removed."""
    ports = (published("0.0.0.0"), published("::"))  # noqa: S104
    store = open_store(tmp_path / "ipam.db")
    reserve(store, attachment("a"), *ports)
    store.close()
    store = open_store(tmp_path / "ipam.db")
    assert set(ports_of(store, attachment("a"))) == set(store.pods()[0].published) == set(ports)


def test_plan() -> None:
    """A port leads to the pod's first address of the family, until the pod is released."""
    ports = (published("0.0.0.0"), published("2001:db8::1", to=81))  # noqa: S104
    it = replace(pod("10.0.0.1", "10.0.0.2", "fd00::1"), published=ports)
    desired = plan([it], {"pl1": 7})
    assert desired.host_ports == {
        ports[0].at: PodPort(ip_address("10.0.0.1"), 80),
        ports[1].at: PodPort(ip_address("fd00::1"), 81),
    }
    assert set(desired.endpoints.values()) == {Endpoint(7, MAC, serves=True)}
    assert plan([replace(it, phase=Phase.RELEASING)], {"pl1": 7}).host_ports == {}
