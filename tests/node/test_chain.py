"""podlane in a chain with the reference implementation's own plugins, called in libcni's order: each does its work."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from agent.plan import link_local
from tests.node.echo import TCP, UDP, Server, server, transfer, who
from tests.node.frames import COUNT, ether, packet, send
from tests.node.machine import LAUNCHER, Machine, Netns, TestPod, machine

PLUGINS = Path("/usr/lib/cni")  # of Debian's containernetworking-plugins
PODLANE = {"type": "podlane"}
NODE = ("192.0.2.10", "2001:db8::10")
WORLD = ("198.51.100.1", "2001:db8:f::1")

versions = pytest.mark.parametrize("version", ["0.4.0", "1.0.0"])  # the plugins have no 1.1.0


class Chain:
    """A network of several plugins, and a runtime that calls them as libcni does (cni:libcni/api.go)."""

    def __init__(
        self,
        node: Machine,
        *plugins: Mapping[str, Any],
        name: str = "chained",
        ifname: str = "eth0",
        version: str = "1.0.0",
        runtime_config: Mapping[str, Any] | None = None,
        unchecked: Sequence[str] = (),
    ) -> None:
        """`unchecked` are plugins whose own CHECK does not work: portmap 1.1.1 looks for IPv4 rules in ip6tables."""
        self.node = node
        self.plugins = plugins
        self.name = name
        self.ifname = ifname
        self.version = version
        self.runtime_config = runtime_config or {}
        self.unchecked = unchecked
        self.results: dict[Netns, Any] = {}  # libcni's cache: the last plugin's results

    def add(self, netns: Netns) -> Any:  # noqa: ANN401  # whatever the last plugin printed
        """ADD, each plugin with the result of the one before; return the last one's."""
        result = None
        for plugin in self.plugins:
            result = json.loads(self._call("ADD", plugin, netns, result))
        self.results[netns] = result
        return result

    def check(self, netns: Netns) -> None:
        """CHECK in the same order, each plugin with the last result."""
        for plugin in (each for each in self.plugins if each["type"] not in self.unchecked):
            self._call("CHECK", plugin, netns, self.results[netns])

    def delete(self, netns: Netns) -> None:
        """DEL in the opposite order, with the last result."""
        for plugin in reversed(self.plugins):
            self._call("DEL", plugin, netns, self.results.get(netns))
        self.results.pop(netns, None)

    def _call(self, command: str, plugin: Mapping[str, Any], netns: Netns, prev: object) -> str:
        enabled = [name for name, on in plugin.get("capabilities", {}).items() if on]
        runtime = {key: value for key, value in self.runtime_config.items() if key in enabled}
        config = {"name": self.name, "cniVersion": self.version, **plugin}
        config |= {"prevResult": prev} if prev else {}
        config |= {"runtimeConfig": runtime} if runtime else {}
        binary = LAUNCHER if plugin["type"] == "podlane" else PLUGINS / plugin["type"]
        environment = {
            "PATH": os.environ["PATH"],
            "PODLANE_SOCKET": str(self.node.directory / "cni.sock"),
            "PODLANE_SPOOL": str(self.node.directory / "spool"),
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": netns.name,
            "CNI_NETNS": str(netns.path),
            "CNI_IFNAME": self.ifname,
            "CNI_PATH": f"{self.node.directory / 'bin'}:{PLUGINS}",
        }
        done = subprocess.run(
            self.node.netns.command(str(binary)),
            input=json.dumps(config),
            env=environment,
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == 0, f"{command} of {plugin['type']}: {done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node with a world around it that all tests of this module share."""
    with machine(tmp_path_factory.mktemp("node")) as it:
        it.add_world()
        it.start_agent()
        yield it


@pytest.fixture
def netns() -> Iterator[Netns]:
    """Make a network namespace for a container."""
    it = Netns("chain")
    yield it
    it.delete()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Yield a stack of what is to be undone, also if the test fails: its node is that of others, too."""
    with ExitStack() as it:
        yield it


@contextmanager
def attached(chain: Chain, netns: Netns) -> Iterator[Any]:
    """ADD and CHECK at once, as CRI-O does; afterwards CHECK again, DEL, and see that podlane has left nothing."""
    try:
        result = chain.add(netns)
        chain.check(netns)
        yield result
        chain.check(netns)
    finally:
        chain.delete(netns)
    assert not any(chain.node.traces().values()), f"{chain.node.traces()}\n{chain.node.log_tail()}"


def addresses(result: Mapping[str, Any], ifname: str = "eth0") -> list[str]:
    """Return the addresses that a result has for the container's interface."""
    own = [number for number, each in enumerate(result["interfaces"]) if each["name"] == ifname]
    return [each["address"].partition("/")[0] for each in result["ips"] if each["interface"] in own]


def assert_reaches_world(netns: Netns, *options: str) -> None:
    """Assert that the world answers in both families."""
    for address in WORLD:
        netns.run("ping", "-c", "1", "-W", "5", *options, address)


PORTS = {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}
PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}}


def assert_host_port_leads_to(node: Machine, netns: Netns, pods: list[str]) -> None:
    """Assert that the node's port leads to the pod, for the world and for another pod."""
    other = node.make_pod("other")
    for pod, host in zip(pods, NODE, strict=False):
        with server(netns, TCP, pod, 80) as it:
            for asker in (node.world, other.netns):
                who(asker, Server(host, 8080, TCP))
            assert len(it.peers) == 2
    node.delete_pod(other)


@versions
def test_portmap(node: Machine, netns: Netns, version: str) -> None:
    """Before portmap: its host port leads to the pod, in both families, and goes with the pod."""
    chain = Chain(node, PODLANE, PORTMAP, version=version, runtime_config=PORTS, unchecked=("portmap",))
    with attached(chain, netns) as result:
        assert_reaches_world(netns)
        assert_host_port_leads_to(node, netns, addresses(result))
    assert "8080" not in node.netns.run("sh", "-c", "iptables-save; ip6tables-save").stdout


def seen_by_host_ports(node: Machine, chain: Chain, netns: Netns) -> dict[tuple[str, str, str], str]:
    """Ask a pod's host ports from everywhere but the node; return whom the pod saw, by protocol, address and asker."""
    seen = {}
    with attached(chain, netns) as result:
        other = node.make_pod("other")
        names = dict.fromkeys(addresses(result), "itself") | dict.fromkeys(other.addresses, "other")
        for kind, (pod, host) in product((TCP, UDP), zip(addresses(result), NODE, strict=True)):
            with server(netns, kind, pod, 80):
                for name, asker in {"world": node.world, "other": other.netns, "itself": netns}.items():
                    address, _ = who(asker, Server(host, 8080, kind))
                    seen[kind.name, host, name] = names.get(address, address)
        node.delete_pod(other)
    return seen


def test_host_ports_as_portmap(node: Machine, netns: Netns) -> None:
    """Host ports show a pod the same clients whether they are podlane's own or portmap's behind it."""
    mappings = {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": kind} for kind in ("tcp", "udp")]}
    native = {**PODLANE, "capabilities": {"portMappings": True}}
    portmap = Chain(node, PODLANE, PORTMAP, runtime_config=mappings, unchecked=("portmap",))
    theirs = seen_by_host_ports(node, portmap, netns)
    before = node.packets()
    assert seen_by_host_ports(node, Chain(node, native, runtime_config=mappings), netns) == theirs
    after = node.packets()
    assert [name for name in ("port_in", "port_local", "port_out") if after[name] == before[name]] == []


@versions
def test_tuning(node: Machine, netns: Netns, version: str, tmp_path: Path) -> None:
    """Before tuning: what it sets in the pod holds, and is no fault for CHECK."""
    tuning = {
        "type": "tuning",
        "sysctl": {"net.ipv4.conf.eth0.arp_filter": "1"},
        "mtu": 1300,
        "promisc": True,
        "allmulti": True,
        "dataDir": str(tmp_path),
    }
    with attached(Chain(node, PODLANE, tuning, version=version), netns):
        shown = netns.run("ip", "link", "show", "eth0").stdout
        assert [word for word in ("mtu 1300", "PROMISC", "ALLMULTI") if word not in shown] == []
        assert netns.run("sysctl", "-n", "net.ipv4.conf.eth0.arp_filter").stdout == "1\n"
        assert_reaches_world(netns)


def test_tuning_mac(node: Machine, netns: Netns, tmp_path: Path) -> None:
    """Before tuning, which changes the MAC address and records it: the pod goes on under the new one, and no other."""
    tuning = {"type": "tuning", "mac": "02:11:22:33:44:55", "dataDir": str(tmp_path)}
    other = node.make_pod("other")
    with attached(Chain(node, PODLANE, tuning), netns) as result:
        assert result["interfaces"][1]["mac"] == "02:11:22:33:44:55"
        assert_reaches_world(netns)
        pod = TestPod(netns, netns.name, result)
        for target in pod.addresses:
            node.netns.run("ping", "-c", "1", "-W", "5", target)
            other.netns.run("ping", "-c", "1", "-W", "5", target)
        for mac in (other.mac, "02:99:99:99:99:99"):
            before = node.packets()
            frame = ether(pod, src=mac) / packet(pod.addresses[0], other.addresses[0])
            send(pod, bytes(frame))
            assert node.packets()["drop_spoofed_mac"] == before["drop_spoofed_mac"] + COUNT
        node.delete_pod(other)


def test_mac_that_the_pod_changes(node: Machine, netns: Netns) -> None:
    """A pod may give its interface another MAC address, even another pod's: it goes on, and takes nothing by it."""
    other = node.make_pod("other")
    with attached(Chain(node, PODLANE), netns) as result:
        netns.run("ip", "link", "set", "eth0", "address", other.mac)
        node.wait_for(lambda: "169.254.1.1" in netns.run("ip", "neigh").stdout, "the pod to know its node again")
        assert_reaches_world(netns)
        me = TestPod(netns, netns.name, result)
        before = node.packets()
        for source in (other.addresses[1], str(link_local(other.mac))):
            send(me, bytes(ether(me, src=other.mac) / packet(source, other.addresses[1])))
        assert node.packets()["drop_spoofed_address"] == before["drop_spoofed_address"] + 2 * COUNT
        for target in other.addresses:
            node.netns.run("ping", "-c", "1", "-W", "5", target)
        netns.run("ip", "link", "set", "eth0", "address", me.mac)
        node.wait_for(lambda: "169.254.1.1" in netns.run("ip", "neigh").stdout, "the pod to know its node again")
        node.delete_pod(other)


def test_firewall(node: Machine, netns: Netns, stack: ExitStack) -> None:
    """Before firewall: a node that forwards nothing by itself lets this pod's packets pass, as long as there is one."""
    by_the_stack = ("ping", "-c", "1", "-W", "1", "-R", WORLD[0])  # for its IP option
    other = node.make_pod("other")
    stack.callback(node.netns.run, "iptables", "-P", "FORWARD", "ACCEPT")
    node.netns.run("iptables", "-P", "FORWARD", "DROP")
    with attached(Chain(node, PODLANE, {"type": "firewall", "backend": "iptables"}), netns) as result:
        assert f"-s {addresses(result)[0]}/32 -j ACCEPT" in node.netns.run("iptables-save").stdout
        assert_reaches_world(netns)
        netns.run(*by_the_stack, "-W", "5")
        assert other.netns.run(*by_the_stack, check=False).returncode == 1
        node.delete_pod(other)
    assert addresses(result)[0] not in node.netns.run("iptables-save").stdout


@versions
def test_sbr(node: Machine, netns: Netns, version: str) -> None:
    """Before sbr, on a second interface: what has its address goes by it, and the first interface keeps the rest."""
    first = Chain(node, PODLANE, name="first", version=version)
    second = Chain(node, PODLANE, {"type": "sbr"}, name="second", ifname="net1", version=version)
    ours = addresses(first.add(netns))
    theirs = addresses(second.add(netns), "net1")
    for _ in range(2):
        first.check(netns)
        second.check(netns)
        for device, sources in (("eth0", ours), ("net1", theirs)):
            for source, target in zip(sources, WORLD, strict=True):
                assert f" dev {device} " in netns.run("ip", "route", "get", target, "from", source).stdout
                netns.run("ping", "-c", "1", "-W", "5", "-I", source, target)
    second.delete(netns)
    first.check(netns)
    assert_reaches_world(netns)
    first.delete(netns)
    assert not any(node.traces().values())


@pytest.mark.parametrize("rates", [("ingress",), ("egress",), ("ingress", "egress")])
def test_portmap_and_limits(node: Machine, netns: Netns, rates: tuple[str, ...]) -> None:
    """In a chain as well, the runtime's limits are podlane's to keep: portmap's host port leads through them."""
    limits = {f"{way}{what}": 40_000_000 for way in rates for what in ("Rate", "Burst")}
    own = {**PODLANE, "capabilities": {"bandwidth": True}}
    chain = Chain(node, own, PORTMAP, runtime_config={**PORTS, "bandwidth": limits}, unchecked=("portmap",))
    with attached(chain, netns) as result:
        before = node.packets()
        assert_reaches_world(netns)
        assert_host_port_leads_to(node, netns, addresses(result))
        device = result["interfaces"][0]["name"]
        queued = {"ingress": device, "egress": f"{device}o"}
        for way in rates:
            (queue,) = json.loads(node.netns.run("tc", "-s", "-j", "qdisc", "show", "dev", queued[way], "root").stdout)
            assert queue["kind"] == "tbf"
            assert queue["packets"] > 0
        assert ("egress" in rates) == (node.packets()["fwd_shaped"] > before["fwd_shaped"])


def limit(way: str) -> dict[str, Any]:
    """Return the plugin bandwidth with a limit for one way."""
    return {"type": "bandwidth", f"{way}Rate": 100_000_000, f"{way}Burst": 10_000_000}


def test_bandwidth(node: Machine, netns: Netns) -> None:
    """Before bandwidth: all that a pod receives passes its queue, from the world and from other pods."""
    with attached(Chain(node, PODLANE, limit("ingress")), netns) as result:
        address, device = addresses(result)[0], result["interfaces"][0]["name"]
        other = node.make_pod("other")

        def is_noticed() -> bool:
            before = through(node, device)
            assert node.pings(other, address)
            return through(node, device) > before

        node.wait_for(is_noticed, "podlane to notice the queue")
        for source in (node.world, other.netns):
            before = through(node, device)
            transfer(source, netns, address, 4 << 20)
            assert through(node, device) > before + (4 << 20)
        node.delete_pod(other)


def through(node: Machine, device: str) -> int:
    """Return how many bytes have passed a device's queue."""
    (queue,) = json.loads(node.netns.run("tc", "-s", "-j", "qdisc", "show", "dev", device, "root").stdout)
    return int(queue["bytes"])


def test_bandwidth_of_what_pods_send(node: Machine, netns: Netns) -> None:
    """Its limit of what a pod sends wants the place of podlane's programs: its ADD says so, and nothing is left."""
    chain = Chain(node, PODLANE, limit("egress"))
    with pytest.raises(AssertionError, match="create ingress qdisc: file exists"):
        chain.add(netns)
    chain.delete(netns)
    assert not any(node.traces().values())


@versions
def test_in_the_middle(node: Machine, netns: Netns, version: str) -> None:
    """Between two plugins: what the first one made stays in the result, before podlane's, with its own indexes."""
    chain = Chain(node, {"type": "loopback"}, PODLANE, {"type": "tuning"}, version=version)
    with attached(chain, netns) as result:
        names = [(each["name"], each.get("sandbox", "")) for each in result["interfaces"]]
        path = str(netns.path)
        assert [names[0], names[2]] == [("lo", path), ("eth0", path)]
        assert names[1][1] == ""
        found = [(each["interface"], each["address"].partition("/")[2]) for each in result["ips"]]
        assert found == [(0, "8"), (0, "128"), (2, "32"), (2, "128")]
        assert {each["gw"] for each in result["routes"]} == {"169.254.1.1", "fe80::1"}
        assert_reaches_world(netns)
