"""Programs on real devices by tcx links."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.datapath import libbpf
from agent.datapath.loader import Datapath, load
from agent.datapath.tables import TcxHooks, outcomes, tcx_supported
from agent.state import Attached, Hook

from ..support import ip, open_descriptors, veth
from .conftest import Compile

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("network")]

FRAME = bytes.fromhex("0a0000000001 0a0000000002 88b5") + bytes(46)
INGRESS = Hook("pl0", "ingress")
EGRESS = Hook("pl0", "egress")


@pytest.fixture
def small(compile_small: Compile, pins: Path) -> Iterator[Datapath]:
    """Load the small datapath."""
    with load(compile_small(), pins, {}) as datapath:
        yield datapath


def send(device: str, *, count: int) -> None:
    """Send frames out of a device; on a veth pair they have arrived when this returns."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((device, 0))
        for _ in range(count):
            raw.send(FRAME)


def test_the_probe_knows_this_kernel() -> None:
    """The probe says yes exactly on kernels that have tcx."""
    version = tuple(int(number) for number in platform.release().split(".")[:2])
    assert tcx_supported() == (version >= (6, 6))


def test_an_attached_program_sees_the_packets(small: Datapath, pins: Path) -> None:
    """Each packet that enters the device is counted once, and reading shows device and program."""
    index = veth("pl0", "peer0")
    hooks = TcxHooks(small, pins)
    wanted = {INGRESS: Attached(index, "from_pod"), EGRESS: Attached(index, "to_pod")}
    assert hooks.upsert(wanted) == {}
    assert hooks.read() == wanted
    send("peer0", count=5)
    assert outcomes(small)["first"] == (5, 5 * len(FRAME))
    assert outcomes(small)["other"].packets == 0
    send("pl0", count=2)
    assert outcomes(small)["other"].packets == 2


def test_detaching_is_at_once(small: Datapath, pins: Path) -> None:
    """The next packet after a deletion is not counted, and attaching again finds the place free."""
    wanted = {INGRESS: Attached(veth("pl0", "peer0"), "from_pod")}
    hooks = TcxHooks(small, pins)
    for _ in range(20):
        assert hooks.upsert(wanted) == {}
        assert hooks.delete([INGRESS]) == {}
        assert hooks.read() == {}
        send("peer0", count=1)
    assert outcomes(small)["first"].packets == 0


def test_deleting_what_is_gone_is_no_failure(small: Datapath, pins: Path) -> None:
    """A hook that was never attached counts as deleted."""
    assert TcxHooks(small, pins).delete([INGRESS, EGRESS]) == {}


def test_replacing_loses_no_packet(compile_small: Compile, small: Datapath, pins: Path) -> None:
    """While two versions replace each other under traffic, every packet meets exactly one of them."""
    index = veth("pl0", "peer0")
    with load(compile_small(COUNTS_AS="second"), pins, {}) as other:
        versions = [TcxHooks(small, pins), TcxHooks(other, pins)]
        wanted = {INGRESS: Attached(index, "from_pod")}
        versions[0].upsert(wanted)
        sender = threading.Thread(target=send, args=("peer0",), kwargs={"count": 20_000})
        sender.start()
        swaps = 0
        while sender.is_alive():
            swaps += 1
            assert versions[swaps % 2].upsert(wanted) == {}
        sender.join()
        counted = outcomes(small)
    assert counted["first"].packets + counted["second"].packets == 20_000
    assert counted["first"].packets > 0
    assert counted["second"].packets > 0
    assert swaps > 10


def test_another_version_is_stale(compile_small: Compile, small: Datapath, pins: Path) -> None:
    """A program of an earlier version is reported by its id, until it is replaced; the link stays the same."""
    index = veth("pl0", "peer0")
    wanted = {INGRESS: Attached(index, "from_pod")}
    TcxHooks(small, pins).upsert(wanted)
    inode = (pins / "links/pl0:ingress").stat().st_ino
    with load(compile_small(COUNTS_AS="second"), pins, {}) as other:
        hooks = TcxHooks(other, pins)
        assert hooks.read() == {INGRESS: Attached(index, f"stale:{small.program_ids['from_pod']}")}
        hooks.upsert(wanted)
        assert hooks.read() == wanted
    assert (pins / "links/pl0:ingress").stat().st_ino == inode


_ATTACH_AND_DIE = """
import os, sys
from pathlib import Path
from agent.datapath.loader import load
from agent.datapath.object import Object
from agent.datapath.tables import TcxHooks
from agent.state import Attached, Hook
datapath = load(Object.from_json(sys.stdin.read()), Path(sys.argv[1]), {})
wanted = {Hook("pl0", "ingress"): Attached(int(sys.argv[2]), "from_pod")}
failures = TcxHooks(datapath, Path(sys.argv[1])).upsert(wanted)
os._exit(1 if failures else 0)
"""


def test_programs_outlive_the_process(compile_small: Compile, pins: Path) -> None:
    """After the process that attached it has died, the program counts on, and the next process knows it."""
    index = veth("pl0", "peer0")
    arguments = [sys.executable, "-c", _ATTACH_AND_DIE, str(pins), str(index)]
    subprocess.run(arguments, input=compile_small().to_json(), text=True, check=True)
    send("peer0", count=3)
    with load(compile_small(), pins, {}) as datapath:
        assert outcomes(datapath)["first"].packets == 3
        assert TcxHooks(datapath, pins).read() == {INGRESS: Attached(index, "from_pod")}


def test_a_deleted_device_leaves_a_defunct_link(small: Datapath, pins: Path) -> None:
    """The link of a deleted device reads as index 0; upserting for its successor attaches there."""
    index = veth("pl0", "peer0")
    hooks = TcxHooks(small, pins)
    hooks.upsert({INGRESS: Attached(index, "from_pod")})
    ip("link", "delete", "pl0")
    assert hooks.read() == {INGRESS: Attached(0, "from_pod")}
    successor = veth("pl0", "peer0")
    assert successor != index
    assert hooks.upsert({INGRESS: Attached(successor, "from_pod")}) == {}
    assert hooks.read() == {INGRESS: Attached(successor, "from_pod")}
    send("peer0", count=1)
    assert outcomes(small)["first"].packets == 1


def test_a_link_to_another_device_is_moved(small: Datapath, pins: Path) -> None:
    """If the name now belongs to another device, the program leaves the old one."""
    old = veth("pl0", "peer0")
    hooks = TcxHooks(small, pins)
    hooks.upsert({INGRESS: Attached(old, "from_pod")})
    ip("link", "set", "pl0", "down")
    ip("link", "set", "pl0", "name", "moved")
    ip("link", "set", "moved", "up")
    new = veth("pl0", "peer1")
    hooks.upsert({INGRESS: Attached(new, "from_pod")})
    send("peer0", count=4)
    send("peer1", count=1)
    assert outcomes(small)["first"].packets == 1


def test_lost_pins_are_put_back(small: Datapath, pins: Path) -> None:
    """When the pins and their folder are gone, reading shows nothing, and upserting attaches again."""
    wanted = {INGRESS: Attached(veth("pl0", "peer0"), "from_pod")}
    hooks = TcxHooks(small, pins)
    hooks.upsert(wanted)
    hooks.delete([INGRESS])
    (pins / "links").rmdir()
    assert hooks.read() == {}
    assert hooks.upsert(wanted) == {}
    assert hooks.read() == wanted


def test_failures_are_reported_by_hook(small: Datapath, pins: Path) -> None:
    """A device that is not there fails alone, with device, index and reason; the others are attached."""
    index = veth("pl0", "peer0")
    gone, nameless = Hook("gone", "ingress"), Hook("pl0", "egress")
    failures = TcxHooks(small, pins).upsert(
        {gone: Attached(999, "from_pod"), nameless: Attached(index, "nat"), INGRESS: Attached(index, "from_pod")}
    )
    assert failures.keys() == {gone, nameless}
    assert str(failures[gone]).startswith("attach from_pod at ingress of gone: ENODEV")
    assert "no such program" in str(failures[nameless])
    assert TcxHooks(small, pins).read() == {INGRESS: Attached(index, "from_pod")}


def test_device_names_with_dots(small: Datapath, pins: Path) -> None:
    """Names that bpffs would refuse as file names are hooks like any other."""
    index = veth("eth0.100", "peer0")
    wanted = {Hook("eth0.100", "ingress"): Attached(index, "from_pod")}
    hooks = TcxHooks(small, pins)
    assert hooks.upsert(wanted) == {}
    assert hooks.read() == wanted
    assert hooks.delete(wanted) == {}
    assert hooks.read() == {}


def test_hooks_keep_no_descriptors(small: Datapath, pins: Path) -> None:
    """Attaching, replacing, reading, failing and detaching leave no descriptor open."""
    index = veth("pl0", "peer0")
    hooks = TcxHooks(small, pins)
    before = open_descriptors()
    for ifindex in (index, index, 999):
        hooks.upsert({INGRESS: Attached(ifindex, "from_pod")})
        hooks.read()
    hooks.delete([INGRESS])
    assert open_descriptors() == before


def test_a_foreign_program_stays(small: Datapath, pins: Path) -> None:
    """A program that somebody else attached to the same hook is neither reported nor removed."""
    index = veth("pl0", "peer0")
    what = "a foreign program"
    foreign = libbpf.link_create(small.programs["to_pod"], index, libbpf.TCX_INGRESS, what)
    try:
        hooks = TcxHooks(small, pins)
        hooks.upsert({INGRESS: Attached(index, "from_pod")})
        hooks.delete([INGRESS])
        assert hooks.read() == {}
        send("peer0", count=2)
        assert outcomes(small)["other"].packets == 2
    finally:
        os.close(foreign)
