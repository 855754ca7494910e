"""A machine for node tests: a network namespace with a real agent, its own bpffs and directories, and pods."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import yaml
from prometheus_client.parser import text_string_to_metric_families

from agent.netlink.netns import in_netns
from tests.support import bpffs, warm_cache

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "build" / "podlane"
START_SECONDS = 30.0


class Netns:
    """A named network namespace with its loopback up."""

    def __init__(self, hint: str) -> None:
        self.name = f"plt-{hint}-{uuid.uuid4().hex[:8]}"
        self.path = Path("/run/netns") / self.name
        run("ip", "netns", "add", self.name)
        run("ip", "-n", self.name, "link", "set", "lo", "up")

    def delete(self) -> None:
        """Delete it, with all that is in it, once its last process ends."""
        subprocess.run(["ip", "netns", "delete", self.name], check=False, capture_output=True)

    def command(self, *argv: str) -> list[str]:
        """Return the argument list that runs a program in here; mounts stay those of the caller."""
        return ["nsenter", f"--net={self.path}", *argv]

    def run(self, *argv: str, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a program in here and return what it printed."""
        return run(*self.command(*argv), check=check, timeout=timeout)

    def call(self, work: Callable[[], T]) -> T:
        """Call a function in a thread that lives in here."""
        with self.path.open("rb") as file:
            return in_netns(file.fileno(), work)


def run(*argv: str, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a program; a failure shows what it printed."""
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=timeout)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(argv)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done


@dataclass(frozen=True)
class Outcome:
    """What the runtime sees of a CNI call."""

    exit_code: int
    stdout: str
    stderr: str

    def json(self) -> Any:  # noqa: ANN401  # whatever the plugin printed
        """Return the one JSON document on stdout."""
        return json.loads(self.stdout)


@dataclass(frozen=True)
class TestPod:
    """A pod that ADD has wired: a network namespace and the addresses that ADD reported."""

    __test__ = False
    netns: Netns
    container_id: str
    result: Mapping[str, Any]

    @property
    def addresses(self) -> list[str]:
        """Its addresses, IPv4 first."""
        return [each["address"].partition("/")[0] for each in self.result["ips"]]

    @property
    def device(self) -> str:
        """The host end of its veth pair."""
        return str(self.result["interfaces"][0]["name"])

    @property
    def mac(self) -> str:
        """Its own MAC address."""
        return str(self.result["interfaces"][1]["mac"])


def add_uplink(node: Netns, stack: ExitStack) -> Netns:
    """Give a node a way out, as every node has: 192.0.2.10 and 2001:db8::10, and a neighbour at .1 and ::1."""
    world = Netns("world")
    stack.callback(world.delete)
    link = ["ip", "-n", node.name, "link", "add", "uplink", "type", "veth"]
    run(*link, "peer", "name", "outside", "netns", world.name)
    for netns, device, last in ((node, "uplink", "10"), (world, "outside", "1")):
        run("ip", "-n", netns.name, "address", "add", f"192.0.2.{last}/24", "dev", device)
        run("ip", "-n", netns.name, "address", "add", f"2001:db8::{last}/64", "dev", device, "nodad")
        run("ip", "-n", netns.name, "link", "set", "dev", device, "up")
    node.run("ip", "route", "add", "default", "via", "192.0.2.1")
    node.run("ip", "route", "add", "default", "via", "2001:db8::1")
    return world


def own_routes(netns: Netns) -> list[str]:
    """Return podlane's routes in a node's namespace, as ip shows them: those to other nodes are of protocol 111."""
    return [
        line
        for family, protocol in product(("-4", "-6"), ("111", "112"))
        for line in netns.run("ip", family, "route", "show", "proto", protocol).stdout.splitlines()
    ]


class Machine:
    """One node. `config` overrides the agent's configuration, key by key."""

    def __init__(self, directory: Path, stack: ExitStack, **config: object) -> None:
        self.directory = directory
        self.netns = Netns("node")
        self._stack = stack
        stack.callback(self.netns.delete)
        self.bpffs = stack.enter_context(bpffs(directory / "bpf")) / "podlane"
        for name in ("conf", "bin", "state"):
            (directory / name).mkdir()
        warm_cache(directory / "state" / "cache")
        self.config = directory / "agent.yaml"
        self.configure(**config)
        self.world = self.netns  # until there is an uplink
        self.agent: subprocess.Popen[bytes] | None = None
        self.agent_command: Sequence[str] = (sys.executable, "-m", "agent")
        self.log = directory / "agent.log"
        stack.callback(self.kill_agent)

    def configure(self, **config: object) -> None:
        """Write the configuration: defaults, this machine's paths, and the given keys (of `paths`, those given)."""
        paths = {
            "socket": self.directory / "cni.sock",
            "state": self.directory / "state",
            "spool": self.directory / "spool",
            "bpffs": self.bpffs,
            "cni_conf_dir": self.directory / "conf",
            "cni_bin_dir": self.directory / "bin",
            "launcher": LAUNCHER,
        }
        given, masquerade = config.pop("paths", {}), config.pop("masquerade", {})
        assert isinstance(given, Mapping)
        assert isinstance(masquerade, Mapping)
        all_paths = {key: str(path) for key, path in {**paths, **given}.items()}
        content = {
            "resync_seconds": 1.0,
            "paths": all_paths,
            "masquerade": {"max_flows": 1 << 16, **masquerade},  # the default depends on the machine
            **config,
        }
        fresh = self.config.with_suffix(".new")
        fresh.write_text(yaml.safe_dump(content))
        fresh.rename(self.config)  # an agent that reads it meanwhile never sees half of it

    def add_netns(self, hint: str) -> Netns:
        """Make a network namespace that goes with this machine."""
        netns = Netns(hint)
        self._stack.callback(netns.delete)
        return netns

    def add_uplink(self) -> Netns:
        """Give the node a way out; return the world that it leads to."""
        return add_uplink(self.netns, self._stack)

    def add_world(self) -> Netns:
        """Give the node an uplink to a world that has far addresses too, and knows the way to the node's pods."""
        self.world = world = self.add_uplink()
        for far, pods, node in (
            ("198.51.100.1/32", "10.244.0.0/24", "192.0.2.10"),
            ("2001:db8:f::1/128", "fd00:10:244::/64", "2001:db8::10"),
        ):
            world.run("ip", "address", "add", far, "dev", "lo", *(["nodad"] if ":" in far else []))
            world.run("ip", "route", "add", pods, "via", node)
        return world

    def start_agent(self, *, wait: bool = True) -> None:
        """Start the agent; by default, wait until it is ready."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with self.log.open("ab") as log:
            command = self.netns.command(*self.agent_command, "--config", str(self.config))
            self.agent = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        if wait:
            self.wait_ready()

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Wait until /readyz says yes."""
        self.wait_for(lambda: self.get("/readyz")[0] == 200, "the agent to be ready", seconds)

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
        """Poll until the condition holds; fail with the agent's log."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or (self.agent and self.agent.poll() is not None):
                raise AssertionError(f"waited in vain for {what}; the agent's log ends:\n{self.log_tail()}")
            time.sleep(0.02)

    def log_tail(self) -> str:
        """Return the end of the agent's log."""
        return self.log.read_text()[-4000:] if self.log.exists() else ""

    def stop_agent(self) -> int:
        """SIGTERM the agent and return its exit status."""
        assert self.agent is not None
        self.agent.terminate()
        status = self.agent.wait(timeout=START_SECONDS)
        self.agent = None
        return status

    def kill_agent(self) -> None:
        """SIGKILL the agent, if it runs."""
        if self.agent is not None:
            self.agent.send_signal(signal.SIGKILL)
            self.agent.wait()
            self.agent = None

    def get(self, path: str) -> tuple[int, str]:
        """GET from the agent's metrics port; status 0 if nobody listens."""

        def fetch() -> tuple[int, str]:
            connection = http.client.HTTPConnection("127.0.0.1", 9815, timeout=START_SECONDS)
            try:
                connection.request("GET", path)
                response = connection.getresponse()
                return response.status, response.read().decode()
            except OSError:
                return 0, ""
            finally:
                connection.close()

        answer: tuple[int, str] = self.netns.call(fetch)
        return answer

    def metrics(self) -> dict[tuple[str, tuple[str, ...]], float]:
        """Scrape: (name, label values in the labels' alphabetical order) → value."""
        status, text = self.get("/metrics")
        assert status == 200, text
        return {
            (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def packets(self) -> dict[str, int]:
        """Return the packets counted so far, by outcome."""
        return {
            labels[0]: int(value)
            for (name, labels), value in self.metrics().items()
            if name == "podlane_datapath_packets_total"
        }

    def repairs(self) -> dict[str, int]:
        """Return the repairs counted so far, by kind, without those that are 0."""
        return {
            labels[0]: int(value)
            for (name, labels), value in self.metrics().items()
            if name == "podlane_repairs_total" and value
        }

    def cni(
        self,
        command: str,
        *,
        container_id: str = "",
        netns: str = "",
        ifname: str = "eth0",
        config: Mapping[str, object] | None = None,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
    ) -> Outcome:
        """Call the launcher as a runtime would, in the node's network namespace; `stdin` is in place of `config`."""
        environment = {
            "PATH": os.environ["PATH"],
            "PODLANE_SOCKET": str(self.directory / "cni.sock"),
            "PODLANE_SPOOL": str(self.directory / "spool"),
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": container_id,
            "CNI_NETNS": netns,
            "CNI_IFNAME": ifname,
            "CNI_PATH": str(self.directory / "bin"),
            **(env or {}),
        }
        given = json.dumps({"cniVersion": "1.1.0", "name": "podlane", "type": "podlane", **(config or {})})
        given = given if stdin is None else stdin
        done = subprocess.run(
            self.netns.command(str(LAUNCHER)), input=given, env=environment, capture_output=True, text=True, timeout=90
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def make_pod(self, hint: str = "pod") -> TestPod:
        """Make a network namespace and ADD it."""
        netns = Netns(hint)
        self._stack.callback(netns.delete)
        outcome = self.cni("ADD", container_id=netns.name, netns=str(netns.path))
        assert outcome.exit_code == 0, f"{outcome.stdout}\n{self.log_tail()}"
        return TestPod(netns, netns.name, outcome.json())

    def delete_pod(self, pod: TestPod) -> None:
        """DEL a pod and delete its network namespace."""
        outcome = self.cni("DEL", container_id=pod.container_id, netns=str(pod.netns.path))
        assert outcome.exit_code == 0, f"{outcome.stdout}\n{self.log_tail()}"
        pod.netns.delete()

    def traces(self) -> dict[str, list[str]]:
        """Return everything that pods have left on this machine, in order: empty lists when nothing is left.

        Of devices the names, of routes all but the state of the link, since the kernel tells those late. The node's own
        subnets, which are unreachable but for pods, are no traces of a pod.
        """
        import sqlite3

        with sqlite3.connect(f"file:{self.directory}/state/ipam.db?mode=ro", uri=True) as db:
            rows = [
                str(row)
                for row in db.execute("SELECT container_id FROM attachment UNION ALL SELECT hex(address) FROM address")
            ]
        names = [line.split()[1].partition("@")[0] for line in self.netns.run("ip", "-o", "link").stdout.splitlines()]
        found = {
            "devices": [name for name in names if name.startswith("pl")],
            "routes": [
                line.replace(" linkdown", "") for line in own_routes(self.netns) if not line.startswith("unreachable")
            ],
            "neighbours": [
                line
                for line in self.netns.run("ip", "neigh", "show", "nud", "permanent").stdout.splitlines()
                if "dev pl" in line
            ],
            "links": [name for name in _names(self.bpffs / "links") if name.startswith("pl")],
            "rows": rows,
            "endpoints": self.endpoints(),
            "spool": _names(self.directory / "spool"),
        }
        return {kind: sorted(lines) for kind, lines in found.items()}

    def endpoints(self) -> list[str]:
        """Return the entries of the endpoint map, as bpftool prints them."""
        pins = sorted((self.bpffs / "maps").glob("endpoints*"))
        if not pins:
            return []
        return [
            str(entry["key"])
            for entry in json.loads(run("bpftool", "-j", "map", "dump", "pinned", str(pins[0])).stdout)
        ]

    def pings(self, source: TestPod, address: str, *options: str, count: int = 2) -> bool:
        """Say whether every ping from the pod to the address is answered."""
        return pings(source.netns, address, *options, count=count)


def pings(source: Netns, address: str, *options: str, count: int = 2) -> bool:
    """Say whether every ping is answered. They are sent again if the kernel, for want of time, discarded something."""
    for _ in range(10):
        before = overflows()
        done = source.run("ping", "-c", str(count), "-i", "0.01", "-W", "2", *options, address, check=False)
        if done.returncode == 0 and " 0% packet loss" in done.stdout:
            return True
        if overflows() == before:
            return False
    return False


def overflows() -> int:
    """Return how many packets, of anybody's, were discarded as a processor's queue was full (netdev_max_backlog)."""
    lines = Path("/proc/net/softnet_stat").read_text().splitlines()
    return sum(int(line.split()[1], 16) for line in lines)


def _names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()] if directory.is_dir() else []


@contextmanager
def machine(directory: Path, **config: object) -> Iterator[Machine]:
    """Yield a node with nothing running on it yet."""
    with ExitStack() as stack:
        yield Machine(directory, stack, **config)
