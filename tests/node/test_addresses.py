"""Ranges of addresses on a node: used up, used in turn, of one family only; and readiness that depends on them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.node.machine import Machine, Netns, Outcome, TestPod, machine
from tests.node.programs import wait_settled


@contextmanager
def ready_node(directory: Path, *subnets: str, **config: object) -> Iterator[Machine]:
    """Make a node whose pods have addresses of these subnets."""
    with machine(directory, ranges=[{"subnet": subnet} for subnet in subnets], **config) as it:
        it.add_uplink()
        it.start_agent()
        yield it


@pytest.fixture
def netns() -> Iterator[Netns]:
    """Make a network namespace for a container."""
    it = Netns("one")
    yield it
    it.delete()


def add(node: Machine, netns: Netns, **config: object) -> Outcome:
    """ADD a namespace, under its own name."""
    return node.cni("ADD", container_id=netns.name, netns=str(netns.path), config=config)


def usage(node: Machine, what: str) -> dict[str, float]:
    """Return how many addresses are "used" or "free", by range."""
    name = f"podlane_ipam_addresses_{what}"
    return {labels[0]: value for (metric, labels), value in node.metrics().items() if metric == name}


def test_exhaustion(tmp_path: Path, netns: Netns) -> None:
    """When every range of a family is used up, the error names them; after one DEL the next ADD works again."""
    with ready_node(tmp_path, "10.9.0.0/30", "10.9.1.0/30", "fd09::/120") as node:
        pods = [node.make_pod() for _ in range(4)]
        assert sorted(pod.addresses[0] for pod in pods) == ["10.9.0.1", "10.9.0.2", "10.9.1.1", "10.9.1.2"]
        wait_settled(node, *pods)  # else their links come between the two looks
        before = node.traces()
        outcome = add(node, netns)
        assert (outcome.exit_code, outcome.json()["code"]) == (1, 101)
        assert "10.9.0.0/30" in outcome.json()["msg"]
        assert "10.9.1.0/30" in outcome.json()["msg"]
        assert node.traces() == before
        assert usage(node, "free") == {"10.9.0.0/30": 0, "10.9.1.0/30": 0, "fd09::/120": 255 - 4}
        node.delete_pod(pods[2])
        assert add(node, netns).json()["ips"][0]["address"] == f"{pods[2].addresses[0]}/32"


def test_exhaustion_of_one_family(tmp_path: Path, netns: Netns) -> None:
    """An ADD that finds no address of one family keeps none of the other."""
    with ready_node(tmp_path, "10.9.0.0/24", "fd09::/127") as node:
        for _ in range(2):
            node.make_pod()
        outcome = add(node, netns)
        assert (outcome.exit_code, outcome.json()["code"]) == (1, 101)
        assert "fd09::/127" in outcome.json()["msg"]
        assert usage(node, "used") == {"10.9.0.0/24": 2, "fd09::/127": 2}


def test_addresses_are_used_in_turn(tmp_path: Path, netns: Netns) -> None:
    """An address is not given again before all others had their turn, and a restart does not change that."""
    with ready_node(tmp_path, "10.9.0.0/29") as node:
        given = []
        for turn in range(13):
            given.append(add(node, netns).json()["ips"][0]["address"])
            node.cni("DEL", container_id=netns.name, netns=str(netns.path))
            if turn == 9:
                node.kill_agent()
                node.start_agent()
                node.kill_agent()
                node.start_agent()
    order = [int(address.removesuffix("/32").rpartition(".")[2]) for address in given]
    assert order == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 1]


def test_not_ready_while_exhausted(tmp_path: Path) -> None:
    """While an ADD could not be served, STATUS, probe and metric say so, also after a restart; a DEL ends it.

    The probe of those who only wait for the node to work, as a rolling update does, says that it works.
    """
    with ready_node(tmp_path, "10.9.0.0/30") as node:
        a = node.make_pod("a")
        assert node.cni("STATUS").exit_code == 0
        b = node.make_pod("b")
        assert_not_ready(node, "10.9.0.0/30")
        node.stop_agent()
        away = node.cni("STATUS")
        assert (away.exit_code, away.json()["code"]) == (1, 50)
        node.start_agent(wait=False)
        node.wait_for(lambda: "10.9.0.0/30" in node.get("/readyz")[1], "the reason")
        assert_not_ready(node, "10.9.0.0/30")
        assert node.pings(a, b.addresses[0])
        node.delete_pod(b)
        node.wait_ready()
        assert (node.cni("STATUS").exit_code, node.metrics()["podlane_ready", ()]) == (0, 1)


def assert_not_ready(node: Machine, word: str) -> None:
    """Assert that all who are asked agree that ADD cannot be served, and why, and that the agent is well."""
    status, reason = node.get("/readyz")
    refused = node.cni("STATUS")
    assert (status, refused.exit_code, refused.json()["code"]) == (503, 1, 50)
    assert refused.json()["details"] == reason.strip()
    assert word in reason
    assert node.metrics()["podlane_ready", ()] == 0
    assert node.get("/healthz")[0] == 200
    assert node.get("/readyz?exclude=exhausted")[0] == 200


def shown(pod: TestPod) -> dict[str, list[str]]:
    """Return the addresses that a pod's interface has, by family."""
    (eth0,) = json.loads(pod.netns.run("ip", "-j", "address", "show", "eth0").stdout)
    families: dict[str, list[str]] = {"inet": [], "inet6": []}
    for each in eth0["addr_info"]:
        families[each["family"]].append(each["local"])
    return families


def test_ipv4_only(tmp_path: Path, netns: Netns) -> None:
    """With ranges of IPv4 only, pods have IPv4 and nothing else, and may have an MTU that IPv6 could not live with."""
    with ready_node(tmp_path, "10.9.0.0/24") as node:
        a, b = node.make_pod("a"), node.make_pod("b")
        assert [each["dst"] for each in a.result["routes"]] == ["0.0.0.0/0"]
        assert shown(a) == {"inet": a.addresses, "inet6": []}
        small = TestPod(netns, netns.name, add(node, netns, mtu=600).json())
        assert [each["mtu"] for each in small.result["interfaces"]] == [600, 600]
        for target in (b.addresses[0], small.addresses[0], "192.0.2.10"):
            assert node.pings(a, target)
        for pod in (a, b, small):
            node.delete_pod(pod)
        assert not any(node.traces().values())


def test_ipv6_only(tmp_path: Path) -> None:
    """With ranges of IPv6 only, pods have IPv6 and nothing else."""
    with ready_node(tmp_path, "fd09::/64") as node:
        a, b = node.make_pod("a"), node.make_pod("b")
        assert [each["dst"] for each in a.result["routes"]] == ["::/0"]
        assert (shown(a)["inet"], len(shown(a)["inet6"])) == ([], 2)
        assert node.pings(a, b.addresses[0], "-s", "2000")
        assert node.pings(a, "2001:db8::10")
        for pod in (a, b):
            node.delete_pod(pod)
        assert not any(node.traces().values())


def test_delete_while_the_agent_is_away(tmp_path: Path) -> None:
    """A DEL without an agent succeeds at once and is done when it is back, whatever else lies in the spool."""
    with ready_node(tmp_path, "10.9.0.0/30") as node, ExitStack() as others:
        pods = [node.make_pod("a"), node.make_pod("b")]
        node.kill_agent()
        spool = tmp_path / "spool"
        spool.mkdir(exist_ok=True)
        (spool / "00000000000000000000-1.del").write_bytes(b"not a request")
        (spool / "99999999999999999999-1.del").write_bytes(b"PLN1")
        (spool / ".half.tmp").write_bytes(b"PLN")
        for pod in pods:
            node.delete_pod(pod)
        assert len(list(spool.glob("*.del"))) == 4
        node.start_agent()
        left = [".half.tmp", "00000000000000000000-1.bad", "99999999999999999999-1.bad"]
        assert {kind: lines for kind, lines in node.traces().items() if lines} == {"spool": left}
        assert node.log.read_text().count("is unreadable") == 2
        for _ in range(2):
            others.callback(Netns.delete, netns := Netns("next"))
            assert add(node, netns).exit_code == 0
