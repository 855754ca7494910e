"""The demo's story of one node: pods, the world, what is counted, and an agent that is killed."""

from __future__ import annotations

import platform
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from tests.e2e import netfilter
from tests.e2e.cluster_of_one import NODE_ADDRESSES, WORLD_ADDRESSES, Cluster, cluster_of_one, fetch, url
from tests.e2e.containerd import ContainerdError, Pod
from tests.e2e.remains import Remains
from tests.e2e.story import Story
from tests.e2e.world import world_server
from tests.support import birth

_PICTURE = """\
podlane: real pods, wired by eBPF

    ╭─ node ────────────────────────────────────────────────────────────╮
    │  ╭ pod a ╮                                             ╭ pod b ╮  │
    │  │  eth0 ╪══ veth ─▶ from_pod ── redirect_peer ───────▶│ eth0  │  │
    │  ╰───────╯              │                              ╰───────╯  │
    │                         ├─ redirect_neigh ─▶ uplink, masquerade ══╪══ world
    │                         ╰─ pass ─▶ host stack                     │
    │                                                                   │
    │  containerd ─▶ launcher ─▶ agent ─▶ addresses, veth pairs, maps   │
    ╰───────────────────────────────────────────────────────────────────╯"""

_PINGS = 40
_PING_PAUSE = "0.05"  # seconds
_KILL_AFTER = 0.5  # seconds; a quarter of the pings


def tell(story: Story, home: Path, stack: ExitStack) -> Remains:
    """Tell all steps in a directory of their own; return what must be gone after the stack is closed."""
    story.say(_PICTURE)
    cluster = stack.enter_context(cluster_of_one(home))
    _Steps(story, cluster).tell()
    return Remains.of(home, [cluster.node], [cluster.runtime], [cluster.world])


class _Steps:
    """The steps of the story, in their order; each builds on those before it."""

    def __init__(self, story: Story, cluster: Cluster) -> None:
        self._story = story
        self._cluster = cluster
        self._node = cluster.node
        self._pods: dict[str, Pod] = {}

    def tell(self) -> None:
        """Tell all of them."""
        self._start_node()
        self._start_pods()
        self._fetch_pages()
        self._visit_world()
        self._count_hops()
        self._count_packets()
        self._look_for_others()
        self._kill_agent()
        self._remove_pod()
        self._restart_agent()

    def _start_node(self) -> None:
        story, node = self._story, self._node
        with story.step("A node with a container runtime, and podlane's agent"):
            version = subprocess.check_output(["containerd", "--version"], text=True).split()[2]
            story.note(f"Linux {platform.release()}, containerd {version}, and a network namespace for a node")
            self._cluster.start_runtime()
            state = self._network_state()
            shown = f'containerd, on its own, says "{state}"'
            story.fact("containerd's state", expected="cni plugin not initialized", seen=state, shown=shown)
            story.command("node", "podlane-agent --config agent.yaml &")
            seconds = self._start_agent()
            took = self._start_durations()
            story.note(
                f"ready after {seconds:.1f} s, of which compiling {took['compile']:.1f} s; a test packet came through"
            )
            (conflist,) = (node.directory / "conf").iterdir()
            kind = story.find("the type of the plugin", '"type": "([a-z]+)"', conflist.read_text())
            shown = f'the agent installed {conflist.name}: "type": "{kind}"'
            story.fact("the type of the plugin", expected="podlane", seen=kind, shown=shown)
            self._cluster.runtime.wait_ready()
            state = self._network_state()
            story.fact("containerd's state", expected="ready", seen=state, shown=f'containerd now says "{state}"')

    def _start_pods(self) -> None:
        story = self._story
        with story.step("Three pods, started through CRI as a kubelet does"):
            for name in ("a", "b", "c"):
                self._start_pod(name)

    def _start_pod(self, name: str) -> None:
        pod = self._pods[name] = self._cluster.runtime.run_pod(name)
        device = self._cluster.host_devices().get(pod.id, "")
        stored = [str(address) for address in self._cluster.stored_addresses()[pod.id]]
        shown = f"pod {name} has {' and '.join(pod.ips)}, and {device} on the node"
        self._story.fact(f"pod {name}'s addresses", expected=stored, seen=pod.ips, shown=shown)

    def _fetch_pages(self) -> None:
        story = self._story
        with story.step("Each serves its name; pods and node fetch it, by IPv4 and IPv6"):
            a, b = self._pods["a"], self._pods["b"]
            for client, server in ((a, b), (b, a)):
                for address in server.ips:
                    self._fetched(client.name, address, server, fetch(client, address))
            for address in b.ips:
                self._fetched("node", address, b, self._cluster.fetch_from_node(address))

    def _fetched(self, where: str, address: str, server: Pod, page: str) -> None:
        shown = f"{where}$ wget -qO- {url(address)}".ljust(48) + f" ▶ {page}"
        self._story.fact(f"the page that {where} gets from {address}", expected=server.name, seen=page, shown=shown)

    def _visit_world(self) -> None:
        story, world = self._story, self._cluster.world
        with (
            story.step("Pods reach the world as their node, and are reached as themselves"),
            world_server(world) as server,
        ):
            a = self._pods["a"]
            for address, node_address in zip(WORLD_ADDRESSES, NODE_ADDRESSES, strict=True):
                page = fetch(a, address)
                shown = f"a$ wget -qO- {url(address)}".ljust(48) + f" ▶ {page}"
                story.fact(f"the page at {address}", expected="the world", seen=page, shown=shown)
                shown = f"the world has logged a visit of {node_address}: the node's own address"
                story.fact("who visited", expected=node_address, seen=server.clients[-1], shown=shown)
            masqueraded = self._node.packets()["masq_out"]
            shown = f"in eBPF, without iptables or conntrack: masq_out is {masqueraded}"
            story.fact("packets were masqueraded", expected=True, seen=masqueraded > 0, shown=shown)
            for address in a.ips:
                page = self._cluster.fetch_from_world(address)
                self._fetched("world", address, a, page)
            now = self._node.packets()["masq_out"]
            shown = "and the answers kept the pod's address: not one was masqueraded"
            story.fact("packets masqueraded", expected=masqueraded, seen=now, shown=shown)

    def _count_hops(self) -> None:
        story = self._story
        with story.step("From pod to pod is one hop: what leaves with TTL 64 arrives with 63"):
            for address in self._pods["b"].ips:
                story.command("a", f"ping -c 1 {address}")
                output = self._pods["a"].exec(["ping", "-c", "1", address]).stdout
                line = story.find("an answer", ".* from .*", output)
                ttl = story.find("the answer's TTL", r"ttl=(\d+)", line)
                story.fact("the answer's TTL", expected="63", seen=ttl, shown=line)

    def _count_packets(self) -> None:
        story, node = self._story, self._node
        with story.step("Each packet is counted, once"):
            before = node.packets()["fwd_local"]
            story.command("a", f"ping -c 10 {self._pods['b'].ips[0]}")
            self._pods["a"].exec(["ping", "-c", "10", "-i", _PING_PAUSE, self._pods["b"].ips[0]])
            grown = node.packets()["fwd_local"] - before
            shown = f"ten pings and ten answers: fwd_local grew by {grown}"
            story.fact("packets for ten pings", expected=20, seen=grown, shown=shown)
            story.command("node", "curl -s http://127.0.0.1:9815/metrics    # all that is not zero")
            metrics, packets = node.metrics(), node.packets()
            rows = [("outcome", "packets", "bytes")]
            for name in sorted(filter(packets.__getitem__, packets)):
                size = int(metrics["podlane_datapath_bytes_total", (name,)])
                rows.append((name, f"{packets[name]:,}", f"{size:,}"))
            story.table(rows)
            dropped = sum(count for name, count in packets.items() if name.startswith("drop_"))
            story.fact("packets dropped", expected=0, seen=dropped)

    def _look_for_others(self) -> None:
        story, node = self._story, self._node
        with story.step("No bridge and no packet filter took part"):
            bridges = node.netns.run("ip", "-oneline", "link", "show", "type", "bridge").stdout.splitlines()
            story.command("node", "ip link show type bridge")
            story.fact("bridges", expected=[], seen=bridges, shown=f"{len(bridges)} bridges")
            tables = node.netns.call(netfilter.tables)
            shown = f"{len(tables)} tables of iptables, ip6tables or nftables, as the kernel says"
            story.fact("tables of packet filters", expected=[], seen=tables, shown=shown)

    def _kill_agent(self) -> None:
        story, node = self._story, self._node
        a, b = self._pods["a"], self._pods["b"]
        with story.step("The agent is killed. The pods do not notice"):
            assert node.agent is not None
            pid = node.agent.pid
            began = birth(pid)
            story.command("a", f"ping -c {_PINGS} -i {_PING_PAUSE} {b.ips[0]} &")
            with ThreadPoolExecutor(1) as pool:
                pings = pool.submit(a.exec, ["ping", "-c", str(_PINGS), "-i", _PING_PAUSE, b.ips[0]])
                time.sleep(_KILL_AFTER)
                story.fact("pings under way", expected=True, seen=not pings.done(), shown="the pings are under way")
                story.command("node", f"kill -KILL {pid}")
                node.kill_agent()
                alive = birth(pid) == began
                story.fact("the agent is alive", expected=False, seen=alive, shown=f"process {pid} is gone")
                result = story.find("a summary of the pings", ".*packets transmitted.*", pings.result().stdout)
            lost = story.find("packet loss", r"(\d+)% packet loss", result)
            story.fact("packet loss in %", expected="0", seen=lost, shown=result)
            self._fetched("b", a.ips[1], a, fetch(b, a.ips[1]))

    def _remove_pod(self) -> None:
        story, pod = self._story, self._pods["c"]
        with story.step("A pod can be removed all the same, at once"):
            start = time.monotonic()
            pod.remove()
            story.note(f"StopPodSandbox and RemovePodSandbox of pod c: {time.monotonic() - start:.2f} s, no error")
            waiting = self._cluster.spooled()
            shown = f"the launcher has left {len(waiting)} DELs for the agent: {waiting[0] if waiting else ''}, …"
            story.fact("a DEL is spooled", expected=True, seen=bool(waiting), shown=shown)

    def _restart_agent(self) -> None:
        story, gone = self._story, self._pods.pop("c")
        with story.step("The agent comes back: no address is lost, none is taken twice"):
            held = self._held(gone)
            story.fact("the addresses of pod c", expected=gone.ips, seen=held, shown=f"{' and '.join(held)} still held")
            story.command("node", "podlane-agent --config agent.yaml &")
            seconds = self._start_agent()
            story.note(f"ready after {seconds:.1f} s, nothing compiled")
            waiting = self._cluster.spooled()
            story.fact("spooled DELs", expected=[], seen=waiting, shown=f"{len(waiting)} DELs left in the spool")
            freed = self._held(gone)
            shown = f"{' and '.join(gone.ips)} free again"
            story.fact("addresses that pod c still has", expected=[], seen=freed, shown=shown)
            pods = {pod.id: pod.ips for pod in self._pods.values()}
            stored = {key: list(map(str, value)) for key, value in self._cluster.stored_addresses().items()}
            story.fact("addresses in use", expected=pods, seen=stored, shown="pods a and b kept theirs")
            story.fact("repairs", expected={}, seen=self._node.repairs(), shown="nothing had to be repaired")
            self._start_pod("d")
            self._fetched("d", self._pods["a"].ips[0], self._pods["a"], fetch(self._pods["d"], self._pods["a"].ips[0]))

    def _held(self, pod: Pod) -> list[str]:
        return [str(address) for address in self._cluster.stored_addresses().get(pod.id, [])]

    def _start_agent(self) -> float:
        start = time.monotonic()
        self._node.start_agent()
        return time.monotonic() - start

    def _start_durations(self) -> dict[str, float]:
        metrics = self._node.metrics().items()
        return {labels[0]: value for (name, labels), value in metrics if name == "podlane_start_duration_seconds"}

    def _network_state(self) -> str:
        """Return "ready", or why containerd cannot start pods."""
        try:
            self._cluster.runtime.wait_ready(timeout=0)
        except ContainerdError as error:
            return str(error).splitlines()[0].rpartition("error: ")[2]
        return "ready"
