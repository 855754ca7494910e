"""What is changed behind podlane's back is put back and counted; what is somebody else's is left alone.

In scope is what podlane keeps on the node, and that each pod has its interface. What a pod does to its interface from
within (addresses, routes, up or down) is its own business: see `test_inside_is_the_pods_own_business`.
"""

from __future__ import annotations

import json
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv6Address, ip_address
from pathlib import Path

import pytest

from agent.datapath import libbpf
from tests.node.machine import Machine, TestPod, machine, run

V4, V6 = 0, 1
PASS = struct.pack("=BBhi", 0xB7, 0, 0, -1) + struct.pack("=BBhi", 0x95, 0, 0, 0)  # r0 = TC_ACT_UNSPEC; exit


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node that all tests of this module share: each leaves it as it found it."""
    with machine(tmp_path_factory.mktemp("node"), resync_seconds=0.25) as it:
        it.add_uplink()
        it.start_agent()
        yield it


@pytest.fixture(scope="module")
def a(node: Machine) -> TestPod:
    """Make the pod that talks."""
    return settled(node, node.make_pod("a"))


@pytest.fixture(scope="module")
def b(node: Machine) -> TestPod:
    """Make the pod that is broken."""
    return settled(node, node.make_pod("b"))


def settled(node: Machine, pod: TestPod) -> TestPod:
    """Wait until a pod's programs are attached the way that lasts."""
    pins = {f"{pod.device}:ingress", f"{pod.device}:egress"}
    node.wait_for(lambda: pins <= set(node.traces()["links"]), "the links of a new pod")
    return pod


@contextmanager
def repaired(node: Machine, a: TestPod, b: TestPod, **expected: int) -> Iterator[None]:
    """Prove of what the block breaks: it is put back, counted under these kinds and no other, and all talk again."""
    before, untouched = node.repairs(), node.traces()

    def new() -> dict[str, int]:
        now = node.repairs()
        return {kind: now[kind] - before.get(kind, 0) for kind in now if now[kind] != before.get(kind, 0)}

    yield
    node.wait_for(lambda: new() == expected, f"the repairs {expected}")
    full_pass(node, a)
    expected["routes"] = expected.get("routes", 0) + 1
    assert new() == expected
    node.wait_for(lambda: node.traces() == untouched, "everything to be as it was")  # links come a little later
    assert_all_talk(node, a, b)


def assert_all_talk(node: Machine, a: TestPod, b: TestPod) -> None:
    """Both pods and the node reach each other by both families, without the stack between pods."""
    before = node.packets()["fwd_local"]
    for family in (V4, V6):
        assert node.pings(a, b.addresses[family])
        assert node.netns.run("ping", "-c", "1", "-W", "2", b.addresses[family], check=False).returncode == 0
        assert node.pings(b, ["192.0.2.10", "2001:db8::10"][family])
    assert node.packets()["fwd_local"] == before + 8


def full_pass(node: Machine, pod: TestPod) -> None:
    """Let the agent look at everything once more, from beginning to end: break a route, and wait for its repair."""
    before = node.repairs().get("routes", 0)
    node.netns.run("ip", "route", "delete", pod.addresses[V4])
    node.wait_for(lambda: node.repairs().get("routes", 0) > before, "the repair of a route")


def endpoints_pin(node: Machine) -> str:
    """Return the path of the endpoint map."""
    (pin,) = (node.bpffs / "maps").glob("endpoints*")
    return str(pin)


def key_of(address: str) -> list[str]:
    """Return an address as bpftool takes the endpoint map's key."""
    parsed = ip_address(address)
    mapped = parsed if isinstance(parsed, IPv6Address) else IPv6Address(f"::ffff:{address}")
    return ["hex", *(f"{octet:02x}" for octet in mapped.packed)]


def value_of(node: Machine, address: str) -> list[str]:
    """Return an endpoint's value as bpftool takes it."""
    shown = run("bpftool", "-j", "map", "lookup", "pinned", endpoints_pin(node), "key", *key_of(address)).stdout
    return ["hex", *(octet.removeprefix("0x") for octet in json.loads(shown)["value"])]


def update_endpoint(node: Machine, address: str, value: list[str]) -> None:
    """Write into the endpoint map behind the agent's back."""
    run("bpftool", "map", "update", "pinned", endpoints_pin(node), "key", *key_of(address), "value", *value)


@pytest.mark.parametrize("family", [V4, V6])
def test_endpoint_deleted(node: Machine, a: TestPod, b: TestPod, family: int) -> None:
    """An endpoint deleted from the map comes back."""
    with repaired(node, a, b, endpoints=1):
        run("bpftool", "map", "delete", "pinned", endpoints_pin(node), "key", *key_of(b.addresses[family]))


def test_endpoint_changed(node: Machine, a: TestPod, b: TestPod) -> None:
    """An endpoint that was made to point elsewhere points to its pod again."""
    right = value_of(node, b.addresses[V4])
    with repaired(node, a, b, endpoints=1):
        update_endpoint(node, b.addresses[V4], value_of(node, a.addresses[V4]))
    assert value_of(node, b.addresses[V4]) == right


def test_sysctls_changed(node: Machine, a: TestPod, b: TestPod) -> None:
    """Forwarding that was switched off is on again, and ports that were given free are reserved, beside others'."""
    for name, value in (("net.ipv4.ip_forward", "0"), ("net.ipv6.conf.all.forwarding", "0")):
        with repaired(node, a, b, sysctls=1):
            node.netns.run("sysctl", "-qw", f"{name}={value}")
        assert node.netns.run("sysctl", "-n", name).stdout.strip() == "1"
    with repaired(node, a, b, sysctls=1):
        node.netns.run("sysctl", "-qw", "net.ipv4.ip_local_reserved_ports=8080")
    assert node.netns.run("sysctl", "-n", "net.ipv4.ip_local_reserved_ports").stdout.strip() == "8080,49152-65535"


def test_foreign_endpoint_added(node: Machine, a: TestPod, b: TestPod) -> None:
    """An endpoint that nobody knows is removed: the map is podlane's alone."""
    with repaired(node, a, b, endpoints=1):
        update_endpoint(node, "10.244.0.250", value_of(node, a.addresses[V4]))


@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_link_unpinned(node: Machine, a: TestPod, b: TestPod, direction: str) -> None:
    """A program whose link's pin is removed, and which thereby is detached, is attached and pinned again."""
    with repaired(node, a, b, hooks=1):
        (node.bpffs / "links" / f"{b.device}:{direction}").unlink()


def test_link_detached(node: Machine, a: TestPod, b: TestPod) -> None:
    """A program whose link is detached while its pin stays is attached again."""
    with repaired(node, a, b, hooks=1):
        run("bpftool", "link", "detach", "pinned", str(node.bpffs / "links" / f"{b.device}:ingress"))


@pytest.mark.parametrize("family", [V4, V6])
def test_route_deleted(node: Machine, a: TestPod, b: TestPod, family: int) -> None:
    """The host's route to a pod comes back."""
    with repaired(node, a, b, routes=1):
        node.netns.run("ip", "route", "delete", b.addresses[family])


@pytest.mark.parametrize("family", [V4, V6])
def test_route_moved(node: Machine, a: TestPod, b: TestPod, family: int) -> None:
    """A host route of podlane's that leads to another device leads to the pod again."""
    with repaired(node, a, b, routes=1):
        target = (b.addresses[family], "dev", "uplink")
        node.netns.run("ip", "route", "replace", *target, "scope", "link", "proto", "112")


@pytest.mark.parametrize("family", [V4, V6])
def test_stray_route_goes(node: Machine, a: TestPod, b: TestPod, family: int) -> None:
    """A route that carries podlane's mark but leads to no pod is removed."""
    with repaired(node, a, b, routes=1):
        stray = ["10.244.0.251", "fd00:10:244::251"][family]
        node.netns.run("ip", "route", "add", stray, "dev", b.device, "scope", "link", "proto", "112")


@pytest.mark.parametrize("family", [V4, V6])
def test_neighbour_deleted(node: Machine, a: TestPod, b: TestPod, family: int) -> None:
    """A pod's permanent neighbour entry comes back."""
    with repaired(node, a, b, neighbours=1):
        node.netns.run("ip", "neighbour", "delete", b.addresses[family], "dev", b.device)


@pytest.mark.parametrize("mark", [(), ("protocol", "static")])
@pytest.mark.parametrize("family", [V4, V6])
def test_neighbour_changed(node: Machine, a: TestPod, b: TestPod, family: int, mark: tuple[str, ...]) -> None:
    """A pod's neighbour entry gets its MAC back, whoever changed it."""
    with repaired(node, a, b, neighbours=1):
        wrong = ("lladdr", a.mac, "dev", b.device, "nud", "permanent")
        node.netns.run("ip", "neighbour", "replace", b.addresses[family], *wrong, *mark)


def test_host_device_deleted(node: Machine, a: TestPod, b: TestPod) -> None:
    """When the host end is deleted, and with it the pod's, the pair is made again with the same addresses and MAC."""
    before = inside(b)
    with repaired(node, a, b, devices=1):
        node.netns.run("ip", "link", "delete", b.device)
    assert inside(b) == before


def test_pod_device_deleted(node: Machine, a: TestPod, b: TestPod) -> None:
    """When the pod deletes its own interface, it gets the same one again."""
    before = inside(b)
    with repaired(node, a, b, devices=1):
        b.netns.run("ip", "link", "delete", "eth0")
    assert inside(b) == before


def inside(pod: TestPod) -> object:
    """Return what a pod has: its interface, addresses, routes and neighbours."""
    (link,) = json.loads(pod.netns.run("ip", "-j", "address", "show", "eth0").stdout)
    addresses = sorted((each["local"], each["prefixlen"]) for each in link["addr_info"])
    tables = [pod.netns.run("ip", *words).stdout for words in (("route",), ("-6", "route"), ("neighbour",))]
    return link["address"], link["mtu"], link["operstate"], addresses, tables


def test_host_device_set_down(node: Machine, a: TestPod, b: TestPod) -> None:
    """A host end that was set down is set up again, with the routes and neighbours that the kernel took with it."""
    before = inside(b)
    with repaired(node, a, b, devices=1, routes=2, neighbours=2):
        node.netns.run("ip", "link", "set", b.device, "down")
    assert inside(b) == before


def test_inside_is_the_pods_own_business(node: Machine, a: TestPod) -> None:
    """A pod that sets its interface down or removes its addresses has it so: podlane does not meddle."""
    pod = node.make_pod("own")
    repairs = node.repairs()
    pod.netns.run("ip", "address", "delete", f"{pod.addresses[V4]}/32", "dev", "eth0")
    pod.netns.run("ip", "link", "set", "eth0", "down")
    changed = inside(pod)
    full_pass(node, a)
    assert inside(pod) == changed
    assert node.repairs() == {**repairs, "routes": repairs.get("routes", 0) + 1}
    node.delete_pod(pod)


def test_foreign_objects_are_left_alone(node: Machine, a: TestPod, b: TestPod) -> None:
    """Routes, neighbours, devices, links and pins of others stay, however near to podlane's they are."""
    pin = node.bpffs.parent / "foreign"
    for command in (
        "ip route add 10.244.0.240 dev uplink",
        "ip route add 10.244.0.241 dev uplink proto 113",
        f"ip route add 10.244.0.242/31 dev {b.device} proto 112",
        f"ip -6 route add fd00:10:244::240 dev {b.device} metric 5",
        f"ip neighbour add 10.244.0.240 lladdr 02:00:00:00:00:01 dev {b.device} nud permanent",
        f"ip neighbour add 10.244.0.241 lladdr 02:00:00:00:00:01 dev {b.device} nud permanent protocol static",
        "ip link add plforeign type veth peer name outlander",
        "ip link set dev outlander alias podlane:podlane/somebody/eth0",
    ):
        node.netns.run(*command.split())
    node.netns.call(lambda: attach_foreign(b.device, pin))
    before = foreign_view(node, b)
    full_pass(node, a)
    assert foreign_view(node, b) == before
    assert_all_talk(node, a, b)
    pin.unlink()
    for command in (
        "ip link delete plforeign",
        f"ip neighbour delete 10.244.0.240 dev {b.device}",
        f"ip neighbour delete 10.244.0.241 dev {b.device}",
        f"ip -6 route delete fd00:10:244::240 dev {b.device}",
        f"ip route delete 10.244.0.242/31 dev {b.device}",
        "ip route delete 10.244.0.241",
        "ip route delete 10.244.0.240",
    ):
        node.netns.run(*command.split())


def attach_foreign(device: str, pin: Path) -> None:
    """Attach a program of somebody else's to a pod's host end, before podlane's."""
    index = socket.if_nametoindex(device)
    with (
        libbpf.closing(libbpf.program_load("foreign", PASS)) as program,
        libbpf.closing(libbpf.link_create(program, index, libbpf.TCX_INGRESS, device)) as link,
    ):
        libbpf.pin(link, pin)


def foreign_view(node: Machine, pod: TestPod) -> list[str]:
    """Return all that the node has by way of routes, neighbours and devices, and what is attached to a device."""
    commands = (
        "ip route",
        "ip -6 route show dev " + pod.device,
        f"ip neighbour show dev {pod.device} nud permanent",
        "ip -o link",
    )
    shown = [line for command in commands for line in sorted(node.netns.run(*command.split()).stdout.splitlines())]
    links = json.loads(run("bpftool", "-j", "link", "show", "pinned", str(node.bpffs.parent / "foreign")).stdout)
    return [*shown, json.dumps(links, sort_keys=True)]


def test_foreign_route_in_a_pods_place(node: Machine, a: TestPod, b: TestPod) -> None:
    """Somebody else's route to a pod's address stays, and is reported once; when it goes, podlane's is back."""
    address = b.addresses[V4]
    untouched = node.traces()
    node.netns.run("ip", "route", "replace", address, "dev", "uplink", "scope", "link", "proto", "static")
    node.wait_for(lambda: refusals(node, f"routes {address}") == 1, "the report")
    for _ in range(3):
        full_pass(node, a)
    assert "proto static" in node.netns.run("ip", "route", "show", address).stdout
    assert refusals(node, f"routes {address}") == 1
    node.netns.run("ip", "route", "delete", address)
    node.wait_for(lambda: node.traces() == untouched, "podlane's route")
    assert_all_talk(node, a, b)


def refusals(node: Machine, what: str) -> int:
    """Return how many lines of the log say that the kernel refused something."""
    return sum("kernel refused" in line and what in line for line in node.log.read_text().splitlines())


def test_pod_in_the_way(node: Machine, a: TestPod, b: TestPod) -> None:
    """A pod that puts an interface of its own in the place of eth0 keeps it; it is reported once, and hurts nobody."""
    pod = node.make_pod("stubborn")
    assert node.agent is not None
    pod.netns.run("ip", "link", "add", "impostor", "type", "veth", "peer", "name", "other")
    batch = node.directory / "impostor.batch"
    batch.write_text("link delete eth0\nlink set impostor name eth0\n")
    node.agent.send_signal(signal.SIGSTOP)  # or its repair might come between deleting and naming
    try:
        pod.netns.run("ip", "-batch", str(batch))
    finally:
        node.agent.send_signal(signal.SIGCONT)
    node.wait_for(lambda: refusals(node, pod.device) == 1, "the report")
    for _ in range(3):
        full_pass(node, a)
    assert refusals(node, pod.device) == 1
    assert_all_talk(node, a, b)
    devices = node.repairs().get("devices", 0)
    pod.netns.run("ip", "link", "delete", "eth0")
    node.wait_for(lambda: node.repairs().get("devices", 0) == devices + 1, "the pod's interface")
    full_pass(node, a)
    assert_all_talk(node, a, pod)
    node.delete_pod(pod)


def test_pod_whose_namespace_is_gone(node: Machine, a: TestPod, b: TestPod) -> None:
    """It is reported once, its leftovers go at once, others are not hurt, and its DEL frees the addresses."""
    before = node.traces()
    pod = node.make_pod("gone")
    repairs = node.repairs()
    pod.netns.delete()
    node.wait_for(lambda: refusals(node, pod.device) == 1, "the report")
    for _ in range(3):
        full_pass(node, a)
    assert refusals(node, pod.device) == 1
    assert node.repairs() == {**repairs, "routes": repairs.get("routes", 0) + 3}
    left = node.traces()
    assert {kind: left[kind] for kind in left if kind != "rows"} == {k: v for k, v in before.items() if k != "rows"}
    assert_all_talk(node, a, b)
    node.delete_pod(pod)
    assert node.traces() == before


def test_another_namespace_at_the_pods_path(node: Machine, a: TestPod) -> None:
    """A pair is not made in a namespace that only has the path of the pod's: the pod would be somebody else."""
    pod = node.make_pod("path")
    pod.netns.delete()
    node.wait_for(lambda: refusals(node, pod.device) == 1, "the report")
    pod.netns.path.touch()
    run("unshare", f"--net={pod.netns.path}", "true")
    full_pass(node, a)
    assert "eth0" not in pod.netns.run("ip", "-o", "link").stdout
    node.delete_pod(pod)


def test_unreachable_subnets(node: Machine, a: TestPod, b: TestPod) -> None:
    """The route that keeps packets for unused addresses of the node's own ranges here is put back."""
    with repaired(node, a, b, subnets=2):
        node.netns.run("ip", "route", "delete", "unreachable", "10.244.0.0/24")
        node.netns.run("ip", "-6", "route", "delete", "unreachable", "fd00:10:244::/64")
