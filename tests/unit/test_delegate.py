"""Delegated IPAM plugins: real processes, small shell scripts, with all that can be wrong about them."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

import pytest

from cni import delegate
from cni.delegate import Delegate
from cni.errors import CniError
from cni.result import Dns, Ip, Route
from tests.support import open_descriptors

ENVIRONMENT = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "c0ffee",
    "CNI_NETNS": "/run/netns/\udcff",  # not UTF-8
    "CNI_IFNAME": "eth0",
    "PATH": "/usr/bin:/bin",
    "TRACEPARENT": "00-1",
}
STDIN = json.dumps({"cniVersion": "0.4.0", "name": "n", "unknown": "x" * 200_000}).encode()
GIVEN = {"cniVersion": "0.3.1", "ips": [{"version": "4", "address": "10.1.2.3/24", "gateway": "10.1.2.1"}]}

Plugin = Callable[[str], Delegate]


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    """Return a maker of plugins from shell scripts; they are found in the second directory of the path."""

    def make(script: str) -> Delegate:
        file = tmp_path / "bin" / "ipam"
        file.parent.mkdir()
        file.write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
        file.chmod(0o755)
        return Delegate("ipam", (str(tmp_path / "nothing"), str(file.parent)))

    return make


def call(it: Delegate, command: str = "DEL") -> CniError:
    """Call it, and return the error that comes of it."""
    methods = {"DEL": it.delete, "CHECK": it.check, "GC": it.gc, "STATUS": it.status}
    with pytest.raises(CniError) as caught:
        methods[command](ENVIRONMENT, STDIN)
    return caught.value


def test_result(plugin: Plugin) -> None:
    """What the plugin gives is read in the version it names."""
    it = plugin(f"cat > /dev/null; echo '{json.dumps(GIVEN)}'")
    given = it.add(ENVIRONMENT, STDIN, "0.4.0")
    assert given.ips == (Ip(ip_interface("10.1.2.3/24"), ip_address("10.1.2.1")),)


def test_result_without_version(plugin: Plugin) -> None:
    """A result that names no version is of the configuration's: here one with families instead of lists."""
    body = {
        "ip4": {"ip": "10.1.2.3/24", "routes": [{"dst": "0.0.0.0/0"}]},
        "dns": {"nameservers": ["10.0.0.53"]},
    }
    given = plugin(f"echo '{json.dumps(body)}'").add(ENVIRONMENT, STDIN, "0.2.0")
    assert given.ips == (Ip(ip_interface("10.1.2.3/24")),)
    assert given.routes == (Route(ip_network("0.0.0.0/0")),)
    assert given.dns == Dns(("10.0.0.53",))


@pytest.mark.parametrize("command", ["DEL", "CHECK", "GC", "STATUS"])
def test_it_gets_the_call_as_it_was(plugin: Plugin, tmp_path: Path, command: str) -> None:
    """The plugin gets the whole of stdin, and the same environment but for the command, which is its own."""
    it = plugin(
        '[ $CNI_COMMAND = VERSION ] && exit; cat > stdin; env -0 > environment; [ "$CNI_COMMAND" = DEL ] || exit 3'
    )
    if command == "DEL":
        it.delete(ENVIRONMENT, STDIN)
    else:
        call(it, command)
    assert (tmp_path / "stdin").read_bytes() == STDIN
    seen = {line for line in (tmp_path / "environment").read_bytes().split(b"\0") if line}
    expected = {os.fsencode(f"{name}={value}") for name, value in {**ENVIRONMENT, "CNI_COMMAND": command}.items()}
    assert expected <= seen
    assert {line.partition(b"=")[0] for line in seen - expected} <= {b"PWD", b"OLDPWD", b"SHLVL", b"_"}


def test_its_errors_are_passed_on(plugin: Plugin) -> None:
    """Code, message and details of the plugin's own error come out as they are, whatever the code."""
    error = call(
        plugin("""printf %s '{"cniVersion": "0.4.0", "code": 4711, "msg": "no\\nway", "details": "d"}'; exit 1""")
    )
    assert (error.code, error.message, error.details) == (4711, "no\nway", "d")
    assert error.to_json("1.0.0")["code"] == 4711


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo trouble >&2; exit 7", ["exit status 7", "trouble"]),
        ("kill -KILL $$", ["exit status -9"]),
        ("echo nonsense; exit 1", ["not JSON", "nonsense"]),
        ("echo '[]'; exit 1", ["not a JSON object"]),
        ("""echo '{"code": "7", "msg": "x"}'; exit 1""", ["no error object"]),
        ("""echo '{"code": true, "msg": "x"}'; exit 1""", ["no error object"]),
        ("""echo '{"code": 7}'; exit 1""", ["no error object"]),
        ("yes", ["more than"]),
        ("yes >&2", ["more than"]),
    ],
)
def test_what_is_no_answer(plugin: Plugin, script: str, words: list[str]) -> None:
    """A plugin that fails without an error object is named, with all that is known of it."""
    error = call(plugin(script))
    assert error.code == 104
    assert [word for word in ["ipam", *words] if word not in error.message + error.details] == []


@pytest.mark.parametrize("script", ["echo nonsense", "echo '[]'", "true"])
def test_results_that_are_none(plugin: Plugin, script: str) -> None:
    """A plugin that says it succeeded, and prints no result, has failed."""
    with pytest.raises(CniError, match="ipam") as caught:
        plugin(script).add(ENVIRONMENT, STDIN, "0.4.0")
    assert caught.value.code == 104


def test_deadline(plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin that does not end is killed, and so are the processes that it has started."""
    monkeypatch.setattr(delegate, "_OTHER_SECONDS", 2.0)  # time enough to say who it is
    error = call(plugin("sleep 300 & echo $! $$ > pids; sleep 300"))
    assert (error.code, "in time" in error.message) == (104, True)
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in (tmp_path / "pids").read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _alive(pid: str) -> bool:
    try:
        return Path("/proc", pid, "stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_what_it_leaves_running_is_not_waited_for(plugin: Plugin, tmp_path: Path) -> None:
    """A plugin may leave a daemon behind that holds its output open: the answer counts as soon as the plugin ends."""
    it = plugin(f"sleep 300 & echo $! > pid; echo '{json.dumps(GIVEN)}'")
    assert it.add(ENVIRONMENT, STDIN, "0.4.0").ips
    pid = (tmp_path / "pid").read_text().strip()
    assert _alive(pid)
    os.kill(int(pid), 9)


def test_stderr_is_logged(plugin: Plugin, caplog: pytest.LogCaptureFixture) -> None:
    """What the plugin says on stderr is in the log, shortened."""
    with caplog.at_level(logging.INFO, "cni.delegate"):
        plugin("echo hello >&2; head -c 100000 /dev/zero | tr '\\0' x >&2").delete(ENVIRONMENT, STDIN)
    (record,) = caplog.records
    assert "plugin=ipam command=DEL stderr='hello" in record.getMessage()
    assert len(record.getMessage()) < 3000


OLD_ERROR = """{"code": 3, "msg": "missing containerID"}"""


def old(versions: str) -> str:
    """Return the script of a plugin that has no GC and no STATUS, and says that it supports these versions."""
    return f"""[ $CNI_COMMAND = VERSION ] || {{ echo '{OLD_ERROR}'; exit 1; }}; echo '{versions}'"""


def test_plugin_without_gc(plugin: Plugin, caplog: pytest.LogCaptureFixture) -> None:
    """GC of a plugin whose versions have none is nothing to do; STATUS says which versions it has."""
    it = plugin(old('{"cniVersion": "1.0.0", "supportedVersions": ["0.4.0", "1.0.0"]}'))
    with caplog.at_level(logging.INFO, "cni.delegate"):
        it.gc(ENVIRONMENT, STDIN)
    assert "plugin=ipam has no GC" in caplog.text
    error = call(it, "STATUS")
    assert (error.code, "0.4.0 1.0.0" in error.details) == (50, True)
    assert call(it, "CHECK").code == 3


@pytest.mark.parametrize(
    "versions",
    ['{"supportedVersions": ["1.0.0", "1.1.0"]}', '{"supportedVersions": ["one"]}', '{"supportedVersions": []}', "[]"],
)
def test_plugin_that_should_have_gc(plugin: Plugin, versions: str) -> None:
    """The error of a plugin that has GC, or does not say that it has none, is the answer."""
    it = plugin(old(versions))
    for command in ("GC", "STATUS"):
        assert (call(it, command).code, call(it, command).message) == (3, "missing containerID")


@pytest.mark.parametrize("name", ["", "a/b", "../ipam", "/bin/true"])
def test_type_is_a_name(name: str) -> None:
    """A type that is a path is refused: it would lead out of CNI_PATH."""
    error = call(Delegate(name, ("/usr/bin",)))
    assert (error.code, "plugin type" in error.message) == (7, True)


def test_missing_plugin(tmp_path: Path) -> None:
    """A plugin that is nowhere on CNI_PATH is named, with the path, in words that no runtime takes for success."""
    (tmp_path / "ipam").mkdir()  # a directory is no plugin
    error = call(Delegate("ipam", (str(tmp_path), "/nothing")))
    assert error.code == 104
    assert error.message == f'failed to find plugin "ipam" in path [{tmp_path} /nothing]'
    assert "not found" not in error.message + error.details


def test_file_that_cannot_be_executed(plugin: Plugin, tmp_path: Path) -> None:
    """The first regular file of the name counts; if it cannot be executed, that is told."""
    it = plugin("true")
    (tmp_path / "bin" / "ipam").chmod(0o644)
    error = call(it)
    assert (error.code, "Permission denied" in error.message) == (104, True)


def test_no_descriptors_are_left(plugin: Plugin) -> None:
    """Calls, good and bad, leave no descriptor open."""
    it = plugin('[ "$CNI_COMMAND" = DEL ] || exit 1')
    before = open_descriptors()
    for _ in range(5):
        it.delete(ENVIRONMENT, STDIN)
        call(it, "CHECK")
    assert open_descriptors() == before
