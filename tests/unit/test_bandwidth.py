"""Limits of bandwidth: from what the runtime asks to the queues and endpoints that keep them."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

import pytest

from agent.plan import plan
from agent.pods import NO_LIMITS, shaper_of
from agent.ranges import Range
from agent.state import KernelError, Queue
from agent.store import Netns, Phase, Pod, Store
from cni.call import Attachment
from cni.netconf import Bandwidth
from tests.unit.memory import World

PACKET = 1514  # bytes: the MTU and an Ethernet header


def limits(ingress: int = 0, egress: int = 0) -> Bandwidth:
    """Return limits of these rates, in bits per second, with bursts of the bits of 100 ms."""
    return Bandwidth(ingressRate=ingress, ingressBurst=ingress // 10, egressRate=egress, egressBurst=egress // 10)


def pod(limit: Bandwidth, phase: Phase = Phase.ACTIVE) -> Pod:
    """Return a pod with these limits."""
    it = Attachment("net", "a", "eth0")
    mac = "02:00:00:00:00:01"
    address = ip_network("10.0.0.1/32").network_address
    return Pod(it, "pl1", mac, 1500, Netns("/x", "4:1"), (address,), phase, "boot", limits=limit)


@pytest.mark.parametrize(
    ("rate", "burst", "queue", "limit"),
    [
        (80_000_000, 8_000_000, Queue(10_000_000, 1_000_000), 1_250_000),  # the example of plugins:bandwidth's README
        (15, 8 * PACKET + 7, Queue(1, PACKET), PACKET),  # whole bytes
        (8_000, 8, Queue(1_000, PACKET), PACKET + 25),  # less than a packet would let none pass
        (1_000_000, 2**32 - 1, Queue(125_000, 2**29 - 1), 2**29 - 1 + 3_125),  # containerd's burst
        (1_000_000, 2**35 - 9, Queue(125_000, 2**32 - 1 - 3_125), 2**32 - 1),  # CRI-O's: a queue has 32 bits
        (2**64 - 1, 2**35 - 9, Queue(2**61 - 1, 2**31), 2**32 - 1),
    ],
)
def test_conversion(rate: int, burst: int, queue: Queue, limit: int) -> None:
    """Bits become bytes; the burst and what goes in 25 ms may wait; and both can be told from what the kernel shows."""
    made = Queue.of(rate, burst, PACKET)
    assert (made, made.limit) == (queue, limit)
    assert Queue.of_limit(made.rate, made.limit) == made


@pytest.mark.parametrize("egress", [0, 8_000_000])
@pytest.mark.parametrize("ingress", [0, 16_000_000])
def test_plan(ingress: int, egress: int) -> None:
    """Each direction that is limited has its queue, and the endpoint says so; a pod without limits has nothing."""
    it = pod(limits(ingress, egress))
    desired = plan([it], {it.device: 5, shaper_of(it.device): 6})
    queues = {5: Queue(2_000_000, 200_000)} if ingress else {}
    queues |= {6: Queue(1_000_000, 100_000)} if egress else {}
    assert desired.queues == queues
    assert {(each.queued, each.shaper) for each in desired.endpoints.values()} == {(bool(ingress), 6 if egress else 0)}


def test_plan_without_the_shaper() -> None:
    """As long as the shaper is missing, the pod is not sent through it: it has no limit, but it goes on."""
    it = pod(limits(egress=8_000_000))
    desired = plan([it], {it.device: 5})
    assert desired.queues == {}
    assert {each.shaper for each in desired.endpoints.values()} == {0}


def test_released_pod_has_no_queues() -> None:
    """What is being released keeps its programs, and nothing else."""
    it = pod(limits(8_000_000, 8_000_000), Phase.RELEASING)
    assert plan([it], {it.device: 5, shaper_of(it.device): 6}).queues == {}


def test_store_keeps_them(tmp_path: Path) -> None:
    """The row has the limits, also after a restart; a burst without a rate is none."""
    path = tmp_path / "ipam.db"
    ranges = [Range.of(ip_network("10.0.0.0/24"))]
    store = Store(path, ranges, "boot")
    given = {"a": limits(8_000, 16_000), "b": Bandwidth(egressBurst=2**35 - 9), "c": NO_LIMITS}
    for name, each in given.items():
        it = Attachment("net", name, "eth0")
        store.reserve(it, device=name, mac=name, mtu=1500, netns=Netns("/x", "4:1"), limits=each)
    store.close()
    store = Store(path, ranges, "boot")
    found = {each.attachment.container_id: each.limits for each in store.pods()}
    store.close()
    assert found == {**given, "b": NO_LIMITS}


@pytest.mark.parametrize("trouble", ["gone", "down"])
def test_shaper_is_mended(tmp_path: Path, trouble: str) -> None:
    """A shaper that somebody deletes or sets down is there again after a full pass; its pair is left alone."""
    world = World(tmp_path)
    shaper = shaper_of(world.add("a").device)
    with world.running():
        if trouble == "gone":
            world.devices.existing.pop(shaper)
        else:
            world.devices.down.add(shaper)
        world.wait_until(lambda: shaper in world.devices.existing and not world.devices.down)
        world.full_pass()
        assert world.actual() == world.desired()
        assert world.devices.existing[shaper] in world.desired().queues
        assert world.repairs["devices"] == 1
        assert not any(what == "restore" for what, _ in world.journal)


def test_check_without_the_shaper(tmp_path: Path) -> None:
    """CHECK, and ADD before it, see to it that what a limited pod sends goes through its shaper."""
    world = World(tmp_path, resync_seconds=3600)
    world.add("a")
    with world.running():
        it = world.store.pods()[0]
        world.loop.check(it)
        world.devices.existing.pop(shaper_of(it.device))
        with pytest.raises(KernelError, match="what the pod sends is not limited"):
            world.loop.check(it)
