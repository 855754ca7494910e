"""IPAM by other plugins: the reference implementation's own, as Debian has them, and scripts that fail when told to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.node.machine import Machine, Netns, Outcome, machine

PLUGINS = "/usr/lib/cni"  # of Debian's containernetworking-plugins
SUBNET = "10.244.1.0/24"

# host-local, that notes its calls, and does what a file beside it says: fails, waits, or in the end kills the agent.
WRAPPER = f"""#!/bin/sh
if [ $CNI_COMMAND = VERSION ]; then echo '{{"cniVersion": "1.1.0", "supportedVersions": ["1.1.0"]}}'; exit 0; fi
stdin=$(cat)
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME" >> "$0.calls"
echo "$stdin" >> "$0.stdin"
told=$(cat "$0.told" 2>/dev/null)
if [ "$told" = "fail $CNI_COMMAND" ]; then echo '{{"code": 11, "msg": "the server is away"}}'; exit 1; fi
if [ "$told" = "wait $CNI_COMMAND" ]; then read word < "$0.go"; fi
case $CNI_COMMAND in STATUS | GC) exit 0 ;; esac
echo "$stdin" | sed 's/"noting"/"host-local"/; s/1[.]1[.]0/1.0.0/' | {PLUGINS}/host-local || exit 1
if [ "$told" = "kill after $CNI_COMMAND" ]; then kill -KILL $PPID; fi
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node that all tests of this module share: each leaves it as it found it."""
    with machine(tmp_path_factory.mktemp("node")) as it:
        it.add_uplink()
        it.start_agent()
        yield it


@dataclass
class Network:
    """A network whose addresses are those of an IPAM plugin, and containers on it."""

    node: Machine
    config: dict[str, Any]
    containers: list[Netns] = field(default_factory=list)

    def call(self, command: str, netns: Netns | None = None, **changes: object) -> Outcome:
        """Call the launcher, for a container if the command has one."""
        return self.node.cni(
            command,
            container_id=netns.name if netns else "",
            netns=str(netns.path) if netns else "",
            ifname="eth0" if netns else "",
            config={**self.config, **changes},
            env={"CNI_PATH": f"{self.node.directory}/bin:{PLUGINS}"},
        )

    def make(self) -> Netns:
        """Make a network namespace."""
        netns = Netns("delegated")
        self.containers.append(netns)
        return netns

    def add(self, **changes: object) -> tuple[Netns, Any]:
        """ADD a new container; return it, and the result."""
        netns = self.make()
        outcome = self.call("ADD", netns, **changes)
        assert outcome.exit_code == 0, f"{outcome.stdout}\n{self.node.log_tail()}"
        return netns, outcome.json()

    def delete(self, netns: Netns) -> None:
        """DEL it."""
        outcome = self.call("DEL", netns)
        assert (outcome.exit_code, outcome.stdout) == (0, ""), outcome.stdout

    @property
    def data(self) -> Path:
        """Where host-local keeps its addresses."""
        return Path(self.config["ipam"]["dataDir"])

    def held(self) -> list[str]:
        """Return the addresses that host-local holds."""
        return sorted(path.name for path in self.data.glob("*/*.*.*.*"))


@pytest.fixture
def network(node: Machine, tmp_path: Path) -> Iterator[Network]:
    """Return a network with host-local's addresses; nothing of it may be left in the end."""
    ipam = {"type": "host-local", "subnet": SUBNET, "routes": [{"dst": "0.0.0.0/0"}], "dataDir": str(tmp_path)}
    it = Network(node, {"cniVersion": "1.0.0", "name": "delegated", "type": "podlane", "ipMasq": True, "ipam": ipam})
    yield it
    told(node, "")
    for netns in it.containers:
        it.delete(netns)
        netns.delete()
    assert it.held() == []
    assert node.traces()["rows"] == []


@pytest.fixture
def noting(network: Network) -> Network:
    """Return that network with a plugin in host-local's place that notes its calls, and can be told to fail."""
    plugin = network.node.directory / "bin" / "noting"
    plugin.write_text(WRAPPER)
    plugin.chmod(0o755)
    for name in ("noting.calls", "noting.stdin"):
        plugin.with_name(name).write_text("")
    network.config["ipam"]["type"] = "noting"
    return network


def told(node: Machine, what: str) -> None:
    """Tell the noting plugin what to do."""
    (node.directory / "bin" / "noting.told").write_text(what)


def gate(node: Machine) -> Path:
    """Return the FIFO at which the noting plugin waits when it is told to."""
    path = node.directory / "bin" / "noting.go"
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def calls(node: Machine) -> list[str]:
    """Return the commands that the noting plugin was called with, and forget them."""
    file = node.directory / "bin" / "noting.calls"
    lines = file.read_text().splitlines()
    file.write_text("")
    return [line.split()[0] for line in lines]


def test_addresses_of_the_plugin_are_in_force(network: Network) -> None:
    """What host-local gives is what the pods have: in result, kernel and maps; they reach each other and the world."""
    (one, first), (_, second) = network.add(), network.add()
    assert [each["ips"][0]["address"] for each in (first, second)] == ["10.244.1.2/32", "10.244.1.3/32"]
    assert network.held() == ["10.244.1.2", "10.244.1.3"]
    assert first["ips"][0]["gateway"] == "169.254.1.1"
    assert first["routes"] == [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}, {"dst": SUBNET, "gw": "169.254.1.1"}]
    before = network.node.packets()
    for address in ("10.244.1.3", "192.0.2.1"):
        one.run("ping", "-c", "2", "-i", "0.01", "-W", "2", address)
    after = network.node.packets()
    assert after["fwd_local"] - before["fwd_local"] == 4
    assert network.call("CHECK", one, prevResult=first).exit_code == 0


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0"])
def test_versions(network: Network, version: str) -> None:
    """The plugin is given the version of the configuration, and answers in it: all that it has can be used."""
    network.config["cniVersion"] = version
    _, result = network.add()
    text = json.dumps(result)
    assert result["cniVersion"] == version
    assert f"{network.held()[0]}/32" in text


def test_static(node: Machine) -> None:
    """The plugin `static` gives addresses of both families, routes and DNS settings: all of it arrives in the pod."""
    ipam = {
        "type": "static",
        "addresses": [
            {"address": "10.9.0.5/24", "gateway": "10.9.0.1"},
            {"address": "fd09::5/64", "gateway": "fd09::1"},
        ],
        "routes": [{"dst": "10.50.0.0/16", "gw": "10.9.0.1"}, {"dst": "fd50::/16"}],
        "dns": {"nameservers": ["10.9.0.53"], "search": ["example.org"]},
    }
    network = Network(node, {"cniVersion": "1.0.0", "name": "static", "type": "podlane", "ipam": ipam})
    netns, result = network.add()
    assert [each["address"] for each in result["ips"]] == ["10.9.0.5/32", "fd09::5/128"]
    assert result["dns"] == ipam["dns"]
    destinations = ["10.50.0.0/16", "fd50::/16", "10.9.0.0/24", "fd09::/64"]
    assert [each["dst"] for each in result["routes"]] == destinations
    shown = "".join(netns.run("ip", family, "route").stdout for family in ("-4", "-6"))
    assert [each for each in destinations if f"{each} via " not in shown] == []
    assert "default" not in shown  # nobody asked for it
    for address in ("10.9.0.5", "fd09::5"):
        node.netns.run("ip", "route", "get", address)
    network.delete(netns)
    netns.delete()


def test_errors_of_the_plugin_come_out_as_they_are(network: Network) -> None:
    """Code and message of the plugin's error are those of the answer; nothing is left, though its DEL fails as well."""
    before = network.node.traces()
    network.config["ipam"]["subnet"] = "10.244.1.0/31"
    outcome = network.call("ADD", network.make())
    assert outcome.exit_code == 1
    assert "too small to allocate from" in outcome.json()["msg"]
    assert network.node.traces() == before
    network.config["ipam"]["subnet"] = SUBNET


def test_plugin_that_is_missing(network: Network) -> None:
    """A plugin that is nowhere on CNI_PATH fails ADD and STATUS by its name."""
    config = {**network.config, "ipam": {"type": "nowhere"}, "cniVersion": "1.1.0"}
    netns = Netns("delegated")
    for command, code in (("ADD", 104), ("STATUS", 50)):
        outcome = network.call(command, netns, **config)
        assert (outcome.exit_code, outcome.json()["code"]) == (1, code)
        assert 'failed to find plugin "nowhere"' in outcome.json()["msg"]
    netns.delete()


def test_every_command_is_forwarded(noting: Network) -> None:
    """ADD, CHECK, GC, STATUS and DEL each call the plugin, once, with all of stdin; its failure is theirs."""
    netns, result = noting.add(marker="kept as it is")
    assert calls(noting.node) == ["ADD"]
    stdin = (noting.node.directory / "bin" / "noting.stdin").read_text()
    assert json.loads(stdin)["marker"] == "kept as it is"
    noting.config["cniVersion"] = "1.1.0"
    valid = {"cni.dev/valid-attachments": [{"containerID": netns.name, "ifname": "eth0"}]}
    for command, changes in (("CHECK", {"prevResult": result}), ("GC", valid), ("STATUS", {}), ("DEL", {})):
        its = netns if command in ("CHECK", "DEL") else None
        told(noting.node, f"fail {command}")
        outcome = noting.call(command, its, **changes)
        assert outcome.exit_code == 1, command
        assert (outcome.json()["code"], outcome.json()["msg"]) == (11, "the server is away")
        told(noting.node, "")
        outcome = noting.call(command, its, **changes)
        assert (outcome.exit_code, outcome.stdout) == (0, ""), command
        assert calls(noting.node) == [command] * 2
    assert noting.held() == []


def test_failed_delete_keeps_the_row(noting: Network) -> None:
    """As long as the plugin cannot take its address back podlane keeps it too, and the next DEL tries again."""
    netns, _ = noting.add()
    told(noting.node, "fail DEL")
    assert noting.call("DEL", netns).exit_code == 1
    assert len(noting.node.traces()["rows"]) == 2
    assert noting.node.traces()["devices"] == []
    told(noting.node, "")
    noting.delete(netns)
    assert noting.node.traces()["rows"] == []


def test_delete_of_what_podlane_does_not_know(noting: Network) -> None:
    """DEL calls the plugin also for a container that podlane has no row of: the plugin may have one."""
    noting.delete(noting.make())
    assert calls(noting.node) == ["DEL"]


def test_failure_after_the_plugin(noting: Network) -> None:
    """An ADD that fails after the plugin gave an address gives it back, by DEL, before it answers."""
    netns = noting.make()
    netns.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "other")
    before = noting.node.traces()
    assert noting.call("ADD", netns).json()["code"] == 102
    assert calls(noting.node) == ["ADD", "DEL"]
    assert noting.held() == []
    assert noting.node.traces() == before


def test_failure_of_the_plugin(noting: Network) -> None:
    """The plugin's DEL follows its failed ADD, too, as the specification asks."""
    told(noting.node, "fail ADD")
    assert noting.call("ADD", noting.make()).json()["msg"] == "the server is away"
    assert calls(noting.node) == ["ADD", "DEL"]


def test_address_that_another_pod_has(noting: Network) -> None:
    """An address that podlane has given to another pod is refused with the holder's name, and given back."""
    pod = noting.node.make_pod("other")
    noting.config["ipam"] |= {"subnet": "10.244.0.0/24", "rangeStart": pod.addresses[0], "rangeEnd": pod.addresses[0]}
    if pod.addresses[0].endswith(".1"):
        noting.config["ipam"]["gateway"] = "10.244.0.254"
    outcome = noting.call("ADD", noting.make())
    assert outcome.json()["code"] == 105
    assert pod.container_id in outcome.json()["msg"]
    assert noting.held() == []
    noting.node.delete_pod(pod)


def test_route_that_leads_nowhere(noting: Network) -> None:
    """A route via somebody who is not the node is refused by name with code 7, and everything is given back."""
    noting.config["ipam"]["routes"] = [{"dst": "10.99.0.0/16", "gw": "10.244.1.77"}]
    outcome = noting.call("ADD", noting.make())
    assert (outcome.json()["code"], "10.99.0.0/16 via 10.244.1.77" in outcome.json()["msg"]) == (7, True)
    assert noting.held() == []


def test_gc_gives_back(noting: Network) -> None:
    """GC has the plugin take back what invalid attachments hold, as ADD was called, and then its own GC."""
    noting.config["cniVersion"] = "1.1.0"
    (valid, _), (gone, _) = noting.add(), noting.add()
    calls(noting.node)
    assert len(noting.held()) == 2
    listed = {"cni.dev/valid-attachments": [{"containerID": valid.name, "ifname": "eth0"}]}
    outcome = noting.call("GC", None, **listed)
    assert (outcome.exit_code, outcome.stdout) == (0, "")
    assert calls(noting.node) == ["DEL", "GC"]
    assert len(noting.held()) == 1
    assert gone.name not in str(noting.node.traces())


def test_crash_between_plugin_and_commit(noting: Network) -> None:
    """An agent that dies when the plugin has just given an address has the plugin take it back when it is back itself.

    Nobody waits for that: neither its start nor other calls, should the plugin hang.
    """
    netns, node = noting.make(), noting.node
    told(node, "kill after ADD")
    assert noting.call("ADD", netns).json()["code"] == 11  # the launcher's own answer
    assert node.agent is not None
    node.agent.wait()
    node.agent = None
    assert len(noting.held()) == 1
    told(node, "wait DEL")
    calls(node)
    go = gate(node)
    node.configure(gc_grace_seconds=0.1)
    node.start_agent()
    node.wait_for(lambda: calls(node) == ["DEL"], "the plugin to be called")
    assert node.get("/readyz")[0] == 200
    node.delete_pod(node.make_pod("other"))
    assert len(noting.held()) == 1
    go.write_text("go\n")
    node.wait_for(lambda: noting.held() == [] and not any(node.traces().values()), "all to be given back")


def test_repair_keeps_the_routes(network: Network) -> None:
    """A pair that somebody deleted is made again with the addresses and routes that the plugin gave."""
    netns, result = network.add()
    shown = netns.run("ip", "route").stdout
    network.node.netns.run("ip", "link", "delete", result["interfaces"][0]["name"])
    network.node.wait_for(lambda: netns.run("ip", "route").stdout == shown, "the same routes")
    netns.run("ping", "-c", "1", "-W", "2", "192.0.2.1")


def test_slow_plugins_hold_nobody_up(node: Machine) -> None:
    """While a plugin takes its time for one container, others are attached."""
    plugin = node.directory / "bin" / "slow"
    go, begun = node.directory / "bin" / "slow.go", node.directory / "bin" / "slow.begun"
    os.mkfifo(go)
    plugin.write_text(
        f"""#!/bin/sh
        [ $CNI_COMMAND = ADD ] || exit 0
        touch {begun}
        read word < {go}
        echo '{{"ips": [{{"address": "10.9.9.9/24"}}]}}'
        """
    )
    plugin.chmod(0o755)
    network = Network(node, {"cniVersion": "1.0.0", "name": "slow", "type": "podlane", "ipam": {"type": "slow"}})
    netns = network.make()
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(network.call, "ADD", netns)
        node.wait_for(begun.exists, "the plugin to be called")
        node.delete_pod(node.make_pod("quick"))
        assert not outcome.done()
        go.write_text("go\n")
        assert outcome.result().exit_code == 0, outcome.result().stdout
    network.delete(netns)
    netns.delete()


def test_call_in_hand_when_the_agent_stops(noting: Network) -> None:
    """SIGTERM lets an ADD that has begun end: its runtime gets the result, and the pod is there for the next agent."""
    node = noting.node
    go = gate(node)
    told(node, "wait ADD")
    with ThreadPoolExecutor() as pool:
        add = pool.submit(noting.add)
        node.wait_for(lambda: calls(node) == ["ADD"], "the plugin to be called")
        stop = pool.submit(node.stop_agent)
        node.wait_for(lambda: not (node.directory / "cni.sock").exists(), "the agent to hear no more calls")
        go.write_text("go\n")
        netns, result = add.result()
        assert stop.result() == 0
    node.start_agent()
    address = result["ips"][0]["address"].partition("/")[0]
    assert node.netns.run("ping", "-c", "1", "-W", "5", address).returncode == 0
    noting.delete(netns)
