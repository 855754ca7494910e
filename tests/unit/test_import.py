"""Taking over a host-local directory: what the real one wrote, what old versions left, and what is no such thing."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agent.import_host_local import ImportRefused, import_directory
from agent.store import AttachmentExists, Phase, Store
from agent.wiring import device_name
from cni.call import Attachment
from tests.unit.host_local import HostLocal, needs_host_local
from tests.unit.launchers import ROOT
from tests.unit.stores import addresses, open_store, pool, reserve

IPAM = {"type": "host-local", "ranges": [[{"subnet": "10.1.0.0/29"}], [{"subnet": "fd01::/64"}]]}
POOLS = [pool("net/0", "10.1.0.0/29", gateway="10.1.0.1"), pool("net/1", "fd01::/64", gateway="fd01::1")]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Open a store."""
    return open_store(tmp_path / "state" / "ipam.db")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Make an empty directory of host-local's."""
    path = tmp_path / "networks" / "net"
    path.mkdir(parents=True)
    (path / "lock").touch()
    return path


def take_over(directory: Path, store: Store) -> list[str]:
    """Import the directory."""
    return import_directory(directory, "net", "eth0", store)


def found(store: Store) -> dict[str, list[str]]:
    """Return the addresses of all attachments, by container and interface."""
    return {f"{pod.attachment.container_id}/{pod.attachment.ifname}": addresses(pod) for pod in store.pods()}


def snapshot(directory: Path) -> dict[str, bytes]:
    """Return all files with their content."""
    return {each.name: each.read_bytes() for each in directory.iterdir() if each.is_file()}


@needs_host_local
def test_what_host_local_gave(tmp_path: Path, store: Store) -> None:
    """All of a live directory is taken over, and the next address is the one that host-local would give."""
    host_local = HostLocal(tmp_path / "networks")
    for container, ifname in (("a", "eth0"), ("a", "net1"), ("b", "eth0"), ("c", "eth0")):
        host_local.call("ADD", container, IPAM, ifname)
    host_local.call("DEL", "b", IPAM)
    before = snapshot(host_local.directory)
    assert take_over(host_local.directory, store) == [
        "imported net/a/eth0 with 10.1.0.2, fd01::2",
        "imported net/a/net1 with 10.1.0.3, fd01::3",
        "imported net/c/eth0 with 10.1.0.5, fd01::5",
        f"{host_local.directory}: 3 attachments found, 3 imported; others are known, or released since",
    ]
    assert snapshot(host_local.directory) == before
    it = Attachment("net", "c", "eth0")
    pod = store.get(it)
    assert pod is not None
    assert (pod.phase, pod.device, pod.boot_id, pod.netns.path) == (Phase.IMPORTED, device_name(it), "boot", "")
    with pytest.raises(AttachmentExists):
        reserve(store, it, POOLS)
    theirs = host_local.call("ADD", "next", IPAM)["ips"]
    assert [each["address"].split("/")[0] for each in theirs] == ["10.1.0.6", "fd01::6"]
    assert addresses(reserve(store, Attachment("net", "next", "eth0"), POOLS)) == ["10.1.0.6", "fd01::6"]
    # Round the ring: what b had is free, what the others have is not.
    assert addresses(reserve(store, Attachment("net", "d", "eth0"), POOLS)) == ["10.1.0.4", "fd01::7"]
    assert store.exhausted(POOLS)


@needs_host_local
def test_again(tmp_path: Path, store: Store) -> None:
    """A second import takes what came in between; what podlane has released since does not come back."""
    host_local = HostLocal(tmp_path / "networks")
    host_local.call("ADD", "a", IPAM)
    host_local.call("ADD", "b", IPAM)
    take_over(host_local.directory, store)
    assert take_over(host_local.directory, store)[:-1] == []
    host_local.call("ADD", "c", IPAM)
    store.begin_release(Attachment("net", "a", "eth0"))
    store.remove(Attachment("net", "a", "eth0"))
    assert take_over(host_local.directory, store)[:-1] == ["imported net/c/eth0 with 10.1.0.4, fd01::4"]
    assert found(store) == {"b/eth0": ["10.1.0.3", "fd01::3"], "c/eth0": ["10.1.0.4", "fd01::4"]}


def test_old_and_broken_files(directory: Path, store: Store) -> None:
    """Entries without an interface count for eth0; what a killed host-local left half written is told and left out."""
    (directory / "10.1.0.2").write_bytes(b"old-container")
    (directory / "10.1.0.3").write_bytes(b"  spaced \r\n eth1 \r\n")
    (directory / "10.1.0.4").write_bytes(b"unix\nnet1")
    (directory / "10.1.0.5").write_bytes(b"")
    (directory / "last_reserved_ip.0").write_bytes(b"")
    (directory / "last_reserved_ip.1").write_bytes(b"fd01::9\n")
    lines = take_over(directory, store)
    assert lines[:2] == [
        f"{directory}/10.1.0.5: empty, from an ADD that was killed; not imported",
        f"{directory}/last_reserved_ip.0: no address in it, not imported",
    ]
    assert found(store) == {"old-container/eth0": ["10.1.0.2"], "spaced/eth1": ["10.1.0.3"], "unix/net1": ["10.1.0.4"]}
    assert addresses(reserve(store, Attachment("net", "next", "eth0"), POOLS)) == ["10.1.0.5", "fd01::a"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", b"a", r"notes.txt: not a file of host-local's"),
        ("10.1.0.256", b"a", "10.1.0.256: not a file of host-local's"),
        ("::ffff:10.1.0.2", b"a", "not a file of host-local's"),
        ("10.1.0.9", b"a\r\neth0\r\nmore", r"10.1.0.9: 'a\\r\\neth0\\r\\nmore' is not a container id"),
        ("10.1.0.9", b"a/b\r\neth0", "is not a container id"),
        ("10.1.0.9", b"a\r\ntoo long for a name", "is not a container id"),
        ("10.1.0.9", b"\xff\xfe", "cannot read .*/10.1.0.9: .*utf-8"),
        ("10.1.0.9", None, "cannot read .*/10.1.0.9: it is not a regular file"),
    ],
)
def test_what_cannot_be_read_is_refused(
    directory: Path, store: Store, name: str, content: bytes | None, message: str
) -> None:
    """A file that makes no sense is named, and neither store nor directory has changed."""
    (directory / "10.1.0.2").write_bytes(b"good\r\neth0")
    if content is None:
        (directory / name).mkdir()
    else:
        (directory / name).write_bytes(content)
    before = snapshot(directory)
    with pytest.raises(ImportRefused, match=message):
        take_over(directory, store)
    assert (store.pods(), snapshot(directory)) == ([], before)


def test_no_directory(tmp_path: Path, store: Store) -> None:
    """A place that is no directory, or is not there, is named."""
    for path in (tmp_path / "missing", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(ImportRefused, match=f"{path} is not a directory"):
            take_over(path, store)


def test_conflict(directory: Path, store: Store) -> None:
    """An address that a pod of podlane's has refuses the whole import, with the pod's name."""
    own = reserve(store, Attachment("net", "own", "eth0"), POOLS[:1])
    (directory / "10.1.0.2").write_bytes(b"theirs\r\neth0")
    (directory / "10.1.0.3").write_bytes(b"other\r\neth0")
    with pytest.raises(ImportRefused, match=r"10\.1\.0\.2 is in use by net/own/eth0; nothing was imported"):
        take_over(directory, store)
    assert store.pods() == [own]


@pytest.mark.parametrize("locked", ["lock", "."])
def test_waits_for_host_local(directory: Path, store: Store, locked: str) -> None:
    """While host-local holds its lock, a file or in old versions the directory, the import waits, and then sees all."""
    if locked == ".":
        (directory / "lock").unlink()
    lock = os.open(directory / locked, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as thread:
        try:
            done = thread.submit(take_over, directory, store)
            with pytest.raises(TimeoutError):
                done.result(0.2)
            (directory / "10.1.0.2").write_bytes(b"late\r\neth0")
        finally:
            os.close(lock)
        assert done.result(30)[0] == "imported net/late/eth0 with 10.1.0.2"


def test_command(directory: Path, tmp_path: Path) -> None:
    """The command names the network after the directory, says what it did, and fails with the reason."""
    config = tmp_path / "agent.yaml"
    config.write_text(f"paths: {{state: {tmp_path / 'state'}}}")
    (directory / "10.1.0.2").write_bytes(b"one\r\neth0")
    (directory / "10.1.0.3").write_bytes(b"old")

    def run(*arguments: object) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "agent", "--config", str(config), "import", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        return done.returncode, done.stdout, done.stderr

    code, out, err = run(directory, "--ifname", "net7")
    assert (code, err, out.splitlines()[:2]) == (
        0,
        "",
        ["imported net/one/eth0 with 10.1.0.2", "imported net/old/net7 with 10.1.0.3"],
    )
    (directory / "10.1.0.4").write_bytes(b"?")
    code, out, err = run(directory, "--network", "other")
    assert (code, out) == (1, "")
    assert err.startswith(f"podlane-agent: {directory}/10.1.0.4: '?' is not a container id")
    assert found(open_store(tmp_path / "state" / "ipam.db")) == {"one/eth0": ["10.1.0.2"], "old/net7": ["10.1.0.3"]}
