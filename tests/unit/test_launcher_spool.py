"""The launcher with a DEL that no agent takes: it waits in the spool directory."""

import os
import re
import stat

import pytest

from cni import wire
from tests.unit.launchers import (
    INVALID_ENVIRONMENT,
    IO_FAILURE,
    PLACES,
    Host,
    Place,
    assert_spooled,
    error,
    needs_strace,
    spooled_request,
)


@pytest.mark.parametrize("away", PLACES)
def test_del_is_spooled_when_the_agent_is_away(host: Host, away: Place) -> None:
    """Without an agent a DEL succeeds, and its request waits in the spool directory."""
    assert_spooled(host, host.call("DEL", PODLANE_SOCKET=away(host.socket)))


def test_spooled_request_is_the_request(host: Host) -> None:
    """The spool file holds environment, stdin and errno as the agent would have received them."""
    stdin = b'{"cniVersion":"1.0.0","name":"n"}\0\xff'
    variables: dict[str, str | bytes] = {
        "CNI_NETNS": "/gone/netns",
        "ODD": b"\xff=\n",
        "EMPTY": "",
        "": "no name",
    }
    host.call("DEL", stdin, **variables)
    environment = {key: os.fsdecode(value) for key, value in host.environment("DEL", **variables).items() if key}
    assert spooled_request(host) == wire.Request(env=environment, stdin=stdin, netns_errno=2)
    assert stat.S_IMODE(host.spooled()[0].stat().st_mode) == 0o600
    assert {stat.S_IMODE(path.stat().st_mode) for path in (host.spool, host.spool.parent)} == {0o700}


def test_every_del_has_its_own_spool_file(host: Host) -> None:
    """A second DEL of the same attachment does not replace the first, and sorts after it."""
    for stdin in (b"first", b"second"):
        host.call("DEL", stdin, PODLANE_SPOOL=f"{host.spool}//")
    assert [wire.decode(path.read_bytes()).stdin for path in host.spooled()] == [b"first", b"second"]


@pytest.mark.parametrize(
    "missing",
    [["CNI_CONTAINERID"], ["CNI_IFNAME"], ["CNI_PATH"], ["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"]],
)
def test_del_that_the_agent_would_refuse_is_not_spooled(host: Host, missing: list[str]) -> None:
    """P06: a DEL that lacks what every DEL needs could never be finished: it fails, and names what is missing."""
    variables: dict[str, str | bytes] = dict.fromkeys(missing, "")
    document = error(host.call("DEL", b"{}", **variables))
    assert document["code"] == INVALID_ENVIRONMENT
    assert document["msg"] == f"required env variables [{','.join(missing)}] missing"
    assert host.spooled() == []


def test_unusable_spool_directory_fails_the_del(host: Host) -> None:
    """A DEL that can be neither done nor kept fails, with both reasons."""
    host.spool.parent.write_text("a file where a directory should be")
    document = error(host.call("DEL"))
    assert document["code"] == IO_FAILURE
    assert str(host.spool) in document["msg"]
    assert "Not a directory" in document["msg"]
    assert "does not exist" in document["details"]


@needs_strace
def test_spool_file_is_durable_before_it_has_its_name(host: Host) -> None:
    """The file is written and synced, then renamed, then its directory is synced; new directories are too."""
    calls = "trace=mkdirat,openat,write,fsync,rename,renameat,renameat2,close"
    result, trace = host.trace(["-y", "-e", calls], "DEL")
    assert_spooled(host, result)
    steps = [
        rf'mkdirat\(\d+<{host.directory}>, "state", 0700\)\s+= 0',
        rf"fsync\(\d+<{host.directory}>\)\s+= 0",
        rf'mkdirat\(\d+<{host.spool.parent}>, "spool", 0700\)\s+= 0',
        rf"fsync\(\d+<{host.spool.parent}>\)\s+= 0",
        rf'openat\(\d+<{host.spool}>, "\.[^"]+\.tmp", .*O_EXCL.*O_CLOEXEC',
        rf"write\(\d+<{host.spool}/\.[^>]+\.tmp>, .*PLN1",
        rf"fsync\(\d+<{host.spool}/\.[^>]+\.tmp>\)\s+= 0",
        r'rename.*\.tmp".*\.del".* = 0',
        rf"fsync\(\d+<{host.spool}>\)\s+= 0",
    ]
    assert first_matches(trace, steps) == steps


def first_matches(lines: list[str], patterns: list[str]) -> list[str]:
    """Return the patterns that match lines in this order, up to the first that does not."""
    rest = iter(lines)
    found = []
    for pattern in patterns:
        if not any(re.match(pattern, line) for line in rest):
            break
        found.append(pattern)
    return found


@pytest.mark.parametrize("closed", [[1], [2], [1, 2]])
@pytest.mark.parametrize("depth", [1, 2])
def test_spool_file_is_no_substitute_for_a_closed_descriptor(host: Host, closed: list[int], depth: int) -> None:
    """A runtime that closes stdout or stderr does not find the launcher's messages in the spool file."""
    spool = host.spool.parents[depth - 1] / "spool"  # the depth decides which number the file gets
    environment = host.environment("DEL", PODLANE_SPOOL=str(spool))

    def close() -> None:
        for descriptor in closed:
            os.close(descriptor)

    assert host.run([host.binary], environment, input=b"{}", preexec_fn=close).returncode == 0
    (path,) = spool.iterdir()
    assert wire.decode(path.read_bytes()).stdin == b"{}"


@needs_strace
@pytest.mark.parametrize("failure", ["write:error=ENOSPC", "fsync:error=EIO:when=3", "renameat:error=EROFS"])
def test_failed_spooling_leaves_nothing(host: Host, failure: str) -> None:
    """When the disk fails, the DEL fails too, and neither a whole nor a partial file stays behind."""
    result, _ = host.trace(["-e", f"inject={failure}"], "DEL")
    if failure.startswith("write"):  # stdout goes through writev, and works
        assert "No space left" in error(result)["msg"]
    assert error(result)["code"] == IO_FAILURE
    assert host.spooled() == []


@needs_strace
@pytest.mark.parametrize("step", ["write", "fsync", "renameat"])
def test_killed_launcher_leaves_no_partial_spool_file(host: Host, step: str) -> None:
    """A launcher that is killed while it spools leaves no file that the agent would take for a DEL."""
    host.spool.mkdir(parents=True)
    result, _ = host.trace(["-e", f"inject={step}:error=EIO:signal=SIGKILL"], "DEL")
    assert result.returncode == -9
    assert [path.suffix for path in host.spooled()] == [".tmp"]
