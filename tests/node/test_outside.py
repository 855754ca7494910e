"""What changes around a running agent: uplinks and their addresses, the rules, the agent itself. Flows live on."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml
from scapy.layers.sctp import SCTP as SCTPHeader
from scapy.layers.sctp import SCTPChunkInit, SCTPChunkInitAck

from agent.datapath import libbpf
from tests.node.attached import filters, programs, wait_attached, wait_settled
from tests.node.echo import ESP, SCTP, UDP, Client, Server, client, raw_exchange, server, who
from tests.node.machine import ROOT, Machine, Netns, TestPod, machine, run

FAR = "198.51.100.1"
NODE = "192.0.2.10"
PASS = struct.pack("=BBhi", 0xB7, 0, 0, -1) + struct.pack("=BBhi", 0x95, 0, 0, 0)  # r0 = TC_ACT_UNSPEC; exit


@pytest.fixture(scope="module", params=["tcx"])
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node with a world that tests share: each leaves it as it found it."""
    with machine(tmp_path_factory.mktemp("node"), hooks=request.param, resync_seconds=0.5) as it:
        it.add_world()
        it.start_agent()
        yield it


both_hooks = pytest.mark.parametrize("node", ["tcx", "clsact"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def pod(node: Machine) -> TestPod:
    """Make a pod."""
    return node.make_pod()


@pytest.fixture
def far(node: Machine) -> Iterator[Server]:
    """Run a server in the world."""
    with server(node.world, UDP, FAR, 7) as it:
        yield it


@contextmanager
def configured(node: Machine, **config: object) -> Iterator[None]:
    """Restart the agent with another configuration, and afterwards with the one that it had."""
    before = node.config.read_text()
    changed = {**yaml.safe_load(before), **config}
    changed["masquerade"] = {**yaml.safe_load(before)["masquerade"], **changed["masquerade"]}
    changed["paths"] = {**yaml.safe_load(before)["paths"], **changed["paths"]}
    restart(node, yaml.safe_dump(changed))
    try:
        yield
    finally:
        restart(node, before)


def restart(node: Machine, config: str) -> None:
    """Restart the agent with a configuration."""
    node.stop_agent()
    node.config.write_text(config)
    node.start_agent()


def uplinks(node: Machine) -> set[tuple[str, ...]]:
    """Return name, IPv4 and IPv6 address of the uplinks that the agent knows."""
    return {labels for name, labels in node.metrics() if name == "podlane_uplink_info"}


def wait_known(node: Machine, uplink: tuple[str, ...]) -> None:
    """Wait until the agent knows an uplink."""
    node.wait_for(lambda: uplink in uplinks(node), f"the uplink {uplink}")


def asked(pod: TestPod, to: Server) -> str:
    """Return the address that the world takes a pod for, by a new flow; "" if there is no answer."""
    try:
        return who(pod.netns, to)[0]
    except (TimeoutError, OSError):
        return ""


@contextmanager
def conversation(flow: Client) -> Iterator[list[tuple[str, int]]]:
    """Keep asking during the block; yield the answers. A question without an answer fails at the end."""
    answers: list[tuple[str, int]] = [flow.ask()]
    stop, failures = threading.Event(), list[BaseException]()

    def talk() -> None:
        try:
            while not stop.is_set():
                answers.append(flow.ask())
                time.sleep(0.0005)
        except BaseException as error:  # for the test to see
            failures.append(error)

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        yield answers
    finally:
        stop.set()
        thread.join()
    assert failures == []
    assert len(answers) > 100


@both_hooks
def test_uplink_is_renamed(node: Machine, pod: TestPod, far: Server) -> None:
    """A renamed uplink carries on: no packet is lost, and one program runs at each hook."""
    with client(pod.netns, far) as flow, conversation(flow) as answers:
        for old, new in (("uplink", "lan0"), ("lan0", "uplink")):
            node.netns.run("ip", "link", "set", old, "name", new)
            wait_known(node, (new, NODE, "2001:db8::10"))
            wait_attached(node, new)
    assert len(set(answers)) == 1


@both_hooks
def test_uplinks_come_and_go(node: Machine, pod: TestPod, far: Server) -> None:
    """A second uplink is used as soon as it has an address; one that was removed and made again works again."""
    other = node.add_netns("other")
    for _ in range(2):
        add_second(node, other)
        wait_known(node, ("second", "203.0.113.10", ""))
        wait_attached(node, "second")
        with server(other, UDP, "203.0.113.1", 7) as near:
            assert asked(pod, near) == "203.0.113.10"
            assert asked(pod, far) == NODE
        node.netns.run("ip", "link", "delete", "second")
        node.wait_for(lambda: {each[0] for each in uplinks(node)} == {"uplink"}, "the second to be gone")


def add_second(node: Machine, other: Netns) -> None:
    """Connect the node with another network, 203.0.113.0/24."""
    link = ["ip", "-n", node.netns.name, "link", "add", "second", "type", "veth"]
    run(*link, "peer", "name", "there", "netns", other.name)
    other.run("ip", "address", "add", "203.0.113.1/24", "dev", "there")
    other.run("ip", "link", "set", "there", "up")
    node.netns.run("ip", "link", "set", "second", "up")
    node.netns.run("ip", "address", "add", "203.0.113.10/24", "dev", "second")


@both_hooks
@pytest.mark.parametrize("end", [Machine.stop_agent, Machine.kill_agent])
def test_restart(node: Machine, pod: TestPod, far: Server, end: Callable[[Machine], object]) -> None:
    """While the agent is away, and when it is back, flows go on, and new ones can be opened; nothing is repaired."""
    with client(pod.netns, far) as flow, conversation(flow) as answers:
        end(node)
        assert asked(pod, far) == NODE
        node.start_agent()
        assert asked(pod, far) == NODE
    assert len(set(answers)) == 1
    assert node.repairs() == {}
    assert programs(node, "uplink") == {"ingress": 1, "egress": 1}


@both_hooks
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("->packets++", "->packets += skb->len ? 1 : 2"),
        ("struct counter drop_vlan;", "struct counter drop_vlan;\n    struct counter drop_news;"),
    ],
    ids=["another program", "another layout of a map"],
)
def test_upgrade(node: Machine, pod: TestPod, far: Server, tmp_path: Path, old: str, new: str) -> None:
    """An agent with other programs replaces the old ones at the uplink, and flows go on."""
    source = tmp_path / "bpf"
    source.mkdir()
    for file in (ROOT / "bpf").iterdir():
        (source / file.name).write_text(file.read_text().replace(old, new))
    changed = {"bpf_source": str(source)}
    with client(pod.netns, far) as flow, conversation(flow) as answers, configured(node, paths=changed):
        assert programs(node, "uplink") == {"ingress": 1, "egress": 1}
    assert len(set(answers)) == 1


def test_uplink_gets_another_address(node: Machine, pod: TestPod, far: Server) -> None:
    """When the uplink's address changes, new flows have the new one at once, and old UDP flows within seconds."""
    with client(pod.netns, far) as old:
        for before, after in ((NODE, "192.0.2.77"), ("192.0.2.77", NODE)):
            assert old.ask()[0] == before
            node.netns.run("ip", "address", "delete", f"{before}/24", "dev", "uplink")
            node.netns.run("ip", "address", "add", f"{after}/24", "dev", "uplink")
            node.netns.run("ip", "route", "replace", "default", "via", "192.0.2.1")
            node.world.run("ip", "route", "replace", "10.244.0.0/24", "via", after)
            wait_known(node, ("uplink", after, "2001:db8::10"))
            assert asked(pod, far) == after
            time.sleep(1.1)  # an old flow is looked after once a second
    assert node.repairs() == {}


def test_foreign_filters_stay(node: Machine, pod: TestPod) -> None:
    """Somebody else's clsact qdisc and filter at an uplink outlive podlane's."""
    pin = node.bpffs.parent / "foreign"
    with libbpf.closing(libbpf.program_load("foreign", PASS)) as program:
        libbpf.pin(program, pin)
    node.netns.run("tc", "qdisc", "add", "dev", "uplink", "clsact")
    node.netns.run(*f"tc filter add dev uplink ingress prio 7 protocol all bpf da object-pinned {pin}".split())
    with configured(node, hooks="clsact"):
        assert node.pings(pod, FAR)
        wait_settled(node)
        assert programs(node, "uplink") == {"ingress": 2, "egress": 1}
        assert len(filters(node, "uplink", "ingress")) == 2
    wait_settled(node)
    assert programs(node, "uplink") == {"ingress": 2, "egress": 1}
    assert len(filters(node, "uplink", "ingress")) == 1
    assert node.pings(pod, FAR)
    node.netns.run("tc", "qdisc", "delete", "dev", "uplink", "clsact")
    pin.unlink()


def test_uplinks_by_name(node: Machine, pod: TestPod, far: Server) -> None:
    """With patterns in the configuration, no other device is an uplink; without any uplink, the log says so."""
    with configured(node, masquerade={"uplinks": ["eth*"]}):
        assert uplinks(node) == set()
        assert "no uplinks" in node.log_tail()
        assert asked(pod, far) == pod.addresses[0]  # by the stack, and the world knows the way
        node.netns.run("ip", "link", "set", "uplink", "name", "eth1")
        node.wait_for(lambda: asked(pod, far) == NODE, "an uplink")
        node.netns.run("ip", "link", "set", "eth1", "name", "uplink")


def test_switched_off(node: Machine, pod: TestPod, far: Server) -> None:
    """Without masquerading, pods go out under their own addresses, past the stack."""
    with configured(node, masquerade={"enabled": False}):
        before = node.packets()["fwd_uplink"]
        assert asked(pod, far) == pod.addresses[0]
        assert node.packets()["fwd_uplink"] > before
    assert asked(pod, far) == NODE


def test_stack_routes(node: Machine, pod: TestPod, far: Server) -> None:
    """On request, everything goes through the host stack, and is masqueraded all the same."""
    with configured(node, masquerade={"stack_routes": True}):
        before = node.packets()["fwd_uplink"]
        with client(pod.netns, far) as flow:
            assert {flow.ask()[0] for _ in range(3)} == {NODE}
        assert node.packets()["fwd_uplink"] == before


EXCHANGES = {
    ESP: (bytes(8) + b"?", bytes(8) + b"!"),
    SCTP: (
        bytes(SCTPHeader(sport=5, dport=6, tag=0) / SCTPChunkInit(init_tag=7)),
        bytes(SCTPHeader(sport=6, dport=5, tag=7) / SCTPChunkInitAck(init_tag=8)),
    ),
}


@pytest.mark.parametrize("protocol", EXCHANGES)
def test_other_protocols_by_the_stack(node: Machine, pod: TestPod, protocol: int) -> None:
    """On request, what is neither TCP, UDP nor ICMP goes through the host stack, and its rules masquerade it."""
    rule = ("POSTROUTING", "-s", "10.244.0.0/16", "-o", "uplink", "-j", "MASQUERADE")
    with configured(node, masquerade={"other_protocols": "stack"}):
        node.netns.run("iptables", "-t", "nat", "-A", *rule)
        try:
            assert raw_exchange(pod.netns, node.world, FAR, protocol, *EXCHANGES[protocol]) == NODE
        finally:
            node.netns.run("iptables", "-t", "nat", "-D", *rule)


def test_rules_of_ip_masq_agent(node: Machine, pod: TestPod, far: Server, tmp_path: Path) -> None:
    """The file of ip-masq-agent says what is not masqueraded, also when it changes; a broken one changes nothing."""
    rules, own = tmp_path / "rules", pod.addresses[0]

    def becomes(address: str) -> None:
        node.wait_for(lambda: asked(pod, far) == address, f"{address} to be what the world sees")

    with configured(node, masquerade={"config_file": str(rules)}):
        assert asked(pod, far) == NODE
        rules.write_text("nonMasqueradeCIDRs:\n- 198.51.100.0/24\n")
        becomes(own)
        rules.write_text('{"nonMasqueradeCIDRs": ["198.51.100.1/24"]}')
        node.wait_for(lambda: "host bits set" in node.log.read_text(), "a complaint")
        time.sleep(1.2)  # two more resyncs
        assert node.log.read_text().count("host bits set") == 1
        assert asked(pod, far) == own
        rules.write_text("nonMasqueradeCIDRs: []\n")
        becomes(NODE)


def test_exhaustion_and_recovery(node: Machine, pod: TestPod) -> None:
    """When all ports to a destination are in use, only new flows there fail; when old ones expire, there is room."""
    limits = {"first_port": 50000, "last_port": 50003, "udp": 2}
    with configured(node, masquerade=limits), ExitStack() as stack:
        near = stack.enter_context(server(node.world, UDP, "192.0.2.1", 7))
        busy = stack.enter_context(server(node.world, UDP, FAR, 8))
        used = [stack.enter_context(client(pod.netns, busy)) for _ in range(4)]
        assert {each.ask()[1] for each in used} == {50000, 50001, 50002, 50003}
        late = stack.enter_context(client(pod.netns, busy))
        late.socket.settimeout(0.1)
        before = node.packets()["drop_masq_exhausted"]
        with pytest.raises(TimeoutError):
            late.ask()
        assert node.packets()["drop_masq_exhausted"] == before + 1
        assert asked(pod, near) == NODE
        assert [each.ask()[0] for each in used] == [NODE] * 4

        def has_room() -> bool:
            try:
                return bool(late.ask())
            except TimeoutError:
                return False

        node.wait_for(has_room, "a port to be free again")
        node.wait_for(lambda: node.metrics()["podlane_masquerade_collected_total", ("flow",)] >= 4, "the scan's end")
