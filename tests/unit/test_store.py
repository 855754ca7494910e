"""The IPAM store: real SQLite files, in good order, after crashes, and on broken disks."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv6Address, ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.store import AttachmentExists, Netns, Phase, Pod, RangeExhausted, StoreError, pack, unpack
from cni.call import Attachment
from tests.unit.stores import NETNS, SUBNETS, addresses, attachment, open_store, reserve


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where a store goes; its directory does not exist yet."""
    return tmp_path / "state" / "ipam.db"


def test_life_of_an_attachment(path: Path) -> None:
    """An attachment is reserved, active, releasing and gone, with one address of each family, IPv4 first."""
    store = open_store(path)
    it = attachment("a")
    pod = reserve(store, it)
    assert pod == Pod(
        attachment=it,
        device=f"pl-{it}",
        mac="02:00:00:00:00:01",
        mtu=1500,
        netns=NETNS,
        addresses=(ip_address("10.0.0.1"), ip_address("fd00::1")),
        phase=Phase.RESERVED,
        boot_id="boot",
    )
    assert (store.get(it), store.pods()) == (pod, [pod])
    assert store.activate(it)
    assert store.get(it) == replace(pod, phase=Phase.ACTIVE)
    assert not store.activate(it)
    assert store.begin_release(it)
    assert store.begin_release(it)  # by a second DEL at the same time
    assert not store.activate(it)
    assert store.get(it) == replace(pod, phase=Phase.RELEASING)
    store.remove(it)
    store.remove(it)
    assert (store.get(it), store.pods()) == (None, [])
    assert not store.begin_release(it)
    assert not store.activate(it)


@pytest.mark.parametrize("phase", [Phase.RESERVED, Phase.ACTIVE, Phase.RELEASING])
def test_second_reservation_is_refused(path: Path, phase: Phase) -> None:
    """An attachment that exists, in whichever phase, is not touched by another ADD, which takes no address."""
    store = open_store(path)
    it = attachment("a")
    reserve(store, it)
    if phase is not Phase.RESERVED:
        store.activate(it)
    if phase is Phase.RELEASING:
        store.begin_release(it)
    before = store.pods()
    assert before[0].phase is phase
    with pytest.raises(AttachmentExists, match="net/container-a/eth0"):
        store.reserve(it, device="another", mac="02:00:00:00:00:02", mtu=9000, netns=Netns("/other", "4:2"))
    assert store.pods() == before
    assert addresses(reserve(store, attachment("b"))) == ["10.0.0.2", "fd00::2"]


def test_same_container_with_another_interface_or_network(path: Path) -> None:
    """Network, container and interface together are the key; each part alone may be the same."""
    store = open_store(path)
    keys = [Attachment("n", "c", "eth0"), Attachment("n", "c", "eth1"), Attachment("m", "c", "eth0")]
    assert [addresses(reserve(store, key))[0] for key in keys] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    store.remove(keys[1])
    assert {pod.attachment for pod in store.pods()} == {keys[0], keys[2]}


def test_exhaustion_takes_nothing(path: Path) -> None:
    """When one family is used up, the error names its ranges and no address of the other family is taken."""
    store = open_store(path, ("10.0.0.0/29", "fd00::/127", "fd00::8/128"))
    pods = [reserve(store, attachment(name)) for name in range(3)]
    with pytest.raises(RangeExhausted) as caught:
        reserve(store, attachment("late"))
    assert str(caught.value) == (
        "failed to allocate for range 1: no IP addresses available in range set: fd00::-fd00::1,fd00::8-fd00::8"
        " (all that may be given of fd00::/127, fd00::8/128 are in use)"
    )
    assert sorted(pod.device for pod in store.pods()) == sorted(pod.device for pod in pods)
    store.remove(attachment(1))
    assert addresses(reserve(store, attachment("late"))) == ["10.0.0.4", "fd00::1"]


def test_address_rests_until_all_others_had_their_turn(path: Path) -> None:
    """Reserved and removed over and over, also across restarts, each address comes once per round."""
    rounds = []
    for number in range(12):
        store = open_store(path, SUBNETS[:1])
        rounds += addresses(reserve(store, attachment(number)))
        store.remove(attachment(number))
        store.close()
    assert rounds == [f"10.0.0.{last}" for last in (1, 2, 3, 4, 5, 6)] * 2


def test_usage(path: Path) -> None:
    """Every range is listed with the number of its addresses in use, whichever pods have them."""
    store = open_store(path, ("10.0.0.0/30", "10.0.9.0/29", "fd00::/64"))
    for name in range(3):
        reserve(store, attachment(name))
    assert [(str(each.subnet), count) for each, count in store.usage()] == [
        ("10.0.0.0/30", 2),
        ("10.0.9.0/29", 1),
        ("fd00::/64", 3),
    ]


def test_pods_keep_addresses_of_ranges_that_are_configured_no_more(path: Path) -> None:
    """Other ranges apply to new pods, and leave those that exist alone."""
    first = open_store(path)
    pod = reserve(first, attachment("a"))
    first.close()
    second = open_store(path, ("10.7.0.0/24",), boot_id="next")
    assert second.pods() == [pod]
    assert addresses(reserve(second, attachment("b"))) == ["10.7.0.1"]
    assert [count for _, count in second.usage()] == [1]
    assert {each.boot_id for each in second.pods()} == {"boot", "next"}


def die_before(statement: str, path: Path) -> None:
    """Reserve b, then remove a, and be killed when this SQL statement begins."""
    store = open_store(path)

    def on_statement(sql: str) -> None:
        if sql.startswith(statement):
            os.kill(os.getpid(), signal.SIGKILL)

    store._db.set_trace_callback(on_statement)
    reserve(store, attachment("b"))
    store.remove(attachment("a"))


@pytest.mark.parametrize(
    "statement",
    [
        "BEGIN",
        "INSERT INTO attachment",
        "INSERT INTO address",
        "INSERT OR REPLACE INTO last_given",
        "COMMIT",
        "INSERT OR REPLACE INTO former",
        "DELETE FROM attachment",
    ],
)
def test_killed_process_leaves_whole_transactions(path: Path, statement: str) -> None:
    """A process that is killed in the middle of a transaction leaves what was committed, and nothing of the rest."""
    store = open_store(path)
    reserve(store, attachment("a"))
    store.close()
    process = multiprocessing.get_context("fork").Process(target=die_before, args=(statement, path))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    store = open_store(path)
    committed = ["a", "b"] if statement.endswith(("former", "FROM attachment")) else ["a"]
    expected = {attachment(name): [f"10.0.0.{i}", f"fd00::{i}"] for i, name in enumerate(committed, start=1)}
    assert {pod.attachment: addresses(pod) for pod in store.pods()} == expected
    following = len(committed) + 1
    assert addresses(reserve(store, attachment("c"))) == [f"10.0.0.{following}", f"fd00::{following}"]


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no write to a file succeed in this process (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_changes_nothing(path: Path) -> None:
    """What cannot be written fails with the file's name, is undone, and works as soon as there is room again."""
    store = open_store(path)
    before = [reserve(store, attachment("a"))]
    with full_disk(), pytest.raises(StoreError, match=f"cannot use the IPAM store {path}: "):
        reserve(store, attachment("b"))
    assert store.pods() == before
    with full_disk(), pytest.raises(StoreError):
        store.remove(attachment("a"))
    assert store.pods() == before
    assert addresses(reserve(store, attachment("b"))) == ["10.0.0.2", "fd00::2"]


@pytest.mark.parametrize("content", [b"this is no database " * 100, b"SQLite format 3\0" + bytes(5000)])
def test_corrupt_file(path: Path, content: bytes) -> None:
    """A file that is no database is named, and stays for whoever wants to look at it."""
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(StoreError, match=f"cannot open the IPAM store {path}: "):
        open_store(path)
    assert path.read_bytes() == content


def test_file_that_is_damaged_later(path: Path) -> None:
    """Damage that is met in operation is an error that names the file."""
    store = open_store(path)
    reserve(store, attachment("a"))
    store.close()
    image = bytearray(path.read_bytes())
    image[4096:] = b"\xff" * (len(image) - 4096)  # all pages but the first
    path.write_bytes(image)
    with pytest.raises(StoreError, match=str(path)):
        open_store(path).pods()


@pytest.mark.parametrize("obstacle", ["file as directory", "directory as file"])
def test_path_that_cannot_be_used(path: Path, obstacle: str) -> None:
    """A place where no file can be made is named."""
    if obstacle == "file as directory":
        path.parent.write_text("")
    else:
        path.mkdir(parents=True)
    with pytest.raises(StoreError, match=f"cannot open the IPAM store {path}: "):
        open_store(path)


def test_nobody_else_may_read_it(path: Path) -> None:
    """The store, its companions and their directory are for their owner only, whatever the umask is."""
    previous = os.umask(0)
    try:
        store = open_store(path)
        reserve(store, attachment("a"))
    finally:
        os.umask(previous)
    files = {each.name: oct(each.stat().st_mode & 0o777) for each in path.parent.iterdir()}
    assert files == dict.fromkeys(("ipam.db", "ipam.db-wal", "ipam.db-shm"), "0o600")
    assert path.parent.stat().st_mode & 0o777 == 0o700


@given(st.ip_addresses())
def test_packing_loses_nothing(address: object) -> None:
    """Every address but a v4-mapped one is the same after a round trip through 16 bytes, and IPv4 is v4-mapped."""
    given_address = ip_address(str(address))
    packed = pack(given_address)
    if isinstance(given_address, IPv6Address) and given_address.ipv4_mapped is not None:
        return  # no range of pods may hold those
    assert len(packed) == 16
    assert unpack(packed) == given_address
    if given_address.version == 4:
        assert IPv6Address(packed).ipv4_mapped == given_address
