"""The commands, on a node that records what is asked of it and fails where a test wants it to."""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager, nullcontext
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cni.call import Attachment, Call
from cni.commands import handle
from cni.errors import CniError, Code
from cni.result import Interface, Ip, Result, Route, parse_result
from cni.wire import STDOUT_LIMIT, Reply, Request
from tests.unit.calls import VERSIONS, config, environment, environments, stdins

ATTACHMENT = Attachment("podlane", "c0ffee", "eth0")
NETNS = 7
RESULT = Result(
    interfaces=(Interface("pl1", "02:00:00:00:00:01", 1500), Interface("eth0", "02:00:00:00:00:02", 1500, "/x")),
    ips=(Ip(ip_interface("10.0.0.1/32"), ip_address("169.254.1.1"), interface=1),),
    routes=(Route(ip_network("0.0.0.0/0"), ip_address("169.254.1.1")),),
)
PREVIOUS = {
    "cniVersion": "1.1.0",
    "interfaces": [{"name": "eth1", "sandbox": "/x"}],
    "ips": [{"address": "10.9.0.1/24", "interface": 0}],
    "dns": {"nameservers": ["10.9.0.53"]},
}
REFUSED = CniError(Code.KERNEL_REFUSED, "the kernel said no", "EPERM")


class RecordingNode:
    """Implements `cni.commands.Node`; `failures` are raised by the methods of those names."""

    def __init__(self, **failures: Exception) -> None:
        self.calls: list[tuple[object, ...]] = []
        self._failures = failures

    def _record(self, name: str, *arguments: object) -> None:
        self.calls.append((name, *arguments))
        if name in self._failures:
            raise self._failures[name]

    def turn(self, attachment: Attachment) -> AbstractContextManager[None]:  # noqa: ARG002  # as the protocol has it
        """Let everybody at once: see test_node for the real one."""
        return nullcontext()

    def refuse_own_netns(self, netns: int, path: str) -> None:
        """Record."""
        self._record("refuse_own_netns", netns, path)

    def reserve(self, call: Call, request: Request, netns: int) -> None:
        """Record."""
        self._record("reserve", call.attachment, request.stdin, netns)

    def connect(self, call: Call, request: Request, netns: int) -> Result:
        """Record."""
        self._record("connect", call.attachment, request.stdin, netns)
        return RESULT

    def commit(self, call: Call, result: Result) -> None:
        """Record."""
        self._record("commit", call.attachment, result)

    def release(self, attachment: Attachment, request: Request | None = None) -> None:
        """Record."""
        self._record("release", attachment, request and request.stdin)

    def check(self, call: Call, request: Request, netns: int, prev: Result) -> None:
        """Record."""
        self._record("check", call.attachment, request.stdin, netns, prev)

    def gc(self, call: Call, request: Request) -> None:
        """Record."""
        self._record("gc", call.config.valid_attachments, request.stdin)

    def status(self, call: Call, request: Request) -> None:
        """Record."""
        self._record("status", call.config.name, request.stdin)

    @property
    def names(self) -> list[object]:
        """What was called, without arguments."""
        return [name for name, *_ in self.calls]


def request(command: str, stdin: bytes | None = None, netns: int | None = NETNS, **changes: str | None) -> Request:
    """Return what the launcher sends."""
    return Request(environment(command, **changes), config() if stdin is None else stdin, netns)


def error(reply: Reply) -> dict[str, Any]:
    """Return the error object of a failed call."""
    assert reply.exit_code == 1
    document = json.loads(reply.stdout)
    assert set(document) <= {"cniVersion", "code", "msg", "details"}
    assert {"cniVersion", "code", "msg"} <= set(document)
    return dict(document)


@pytest.mark.parametrize("version", VERSIONS)
def test_add(version: str) -> None:
    """ADD reserves, connects and commits, and prints the result in the version of the configuration."""
    node, stdin = RecordingNode(), config(cniVersion=version)
    reply = handle(request("ADD", stdin), node)
    assert reply == Reply(0, json.dumps(RESULT.to_json(version)).encode())
    assert node.calls == [
        ("refuse_own_netns", NETNS, "/run/netns/x"),
        ("reserve", ATTACHMENT, stdin, NETNS),
        ("connect", ATTACHMENT, stdin, NETNS),
        ("commit", ATTACHMENT, RESULT),
    ]


def test_add_in_a_chain() -> None:
    """What came before in the chain is in the result, before podlane's own; only the latter is recorded."""
    node = RecordingNode()
    reply = handle(request("ADD", config(prevResult=PREVIOUS)), node)
    printed = json.loads(reply.stdout)
    assert [each["name"] for each in printed["interfaces"]] == ["eth1", "pl1", "eth0"]
    assert [(each["address"], each["interface"]) for each in printed["ips"]] == [("10.9.0.1/24", 0), ("10.0.0.1/32", 2)]
    assert printed["dns"] == PREVIOUS["dns"]
    assert node.calls[-1] == ("commit", ATTACHMENT, RESULT)


def test_prev_result_that_cannot_be_read() -> None:
    """A prevResult that is none is refused with code 6 before anything is done; DEL does not look at it."""
    node, stdin = RecordingNode(), config(prevResult={"ips": [{"address": "nonsense"}]})
    assert error(handle(request("ADD", stdin), node))["code"] == 6
    assert node.calls == []
    assert handle(request("DEL", stdin), node).exit_code == 0


@pytest.mark.parametrize("command", ["ADD", "DEL"])
@pytest.mark.parametrize("override", [None, "0", "1", "true", "TRUE"])
def test_own_namespace(command: str, override: str | None) -> None:
    """The node's own namespace is refused before anything is done, unless CNI_NETNS_OVERRIDE says otherwise."""
    node = RecordingNode(refuse_own_netns=CniError(Code.INVALID_NETNS, "own"))
    reply = handle(request(command, CNI_NETNS_OVERRIDE=override), node)
    if override in (None, "0"):
        assert error(reply)["code"] == 8
        assert node.names == ["refuse_own_netns"]
    else:
        assert reply.exit_code == 0
        assert "refuse_own_netns" not in node.names


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("netns", [NETNS, None])
def test_del(version: str, netns: int | None) -> None:
    """DEL releases, with and without a network namespace, and prints nothing."""
    node, stdin = RecordingNode(), config(cniVersion=version)
    assert handle(request("DEL", stdin, netns, CNI_NETNS="/gone"), node) == Reply(0, b"")
    assert node.calls[-1] == ("release", ATTACHMENT, stdin)


@pytest.mark.parametrize("version", ["0.4.0", "1.0.0", "1.1.0"])
def test_check(version: str) -> None:
    """CHECK hands prevResult to the node, whichever version it is in, and prints nothing."""
    node, stdin = RecordingNode(), config(cniVersion=version, prevResult=PREVIOUS)
    assert handle(request("CHECK", stdin), node) == Reply(0, b"")
    assert node.calls == [("check", ATTACHMENT, stdin, NETNS, parse_result(PREVIOUS, version))]


def test_check_needs_prev_result() -> None:
    """CHECK without prevResult fails, in the words of the reference plugins."""
    node = RecordingNode()
    assert error(handle(request("CHECK"), node))["msg"] == "Required prevResult missing"
    assert node.calls == []


@pytest.mark.parametrize(
    ("keys", "valid"),
    [
        ({}, None),
        ({"cni.dev/valid-attachments": None}, ()),
        ({"cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth0"}]}, (("a", "eth0"),)),
    ],
)
def test_gc(keys: dict[str, object], valid: object) -> None:
    """GC tells absence from null, and prints nothing."""
    node = RecordingNode()
    stdin = json.dumps({"cniVersion": "1.1.0", "name": "podlane", "type": "podlane", **keys}).encode()
    assert handle(request("GC", stdin, None), node) == Reply(0, b"")
    assert node.calls == [("gc", valid, stdin)]


def test_status() -> None:
    """STATUS asks the node, and prints nothing when all is well."""
    node = RecordingNode()
    assert handle(request("STATUS", netns=None), node) == Reply(0, b"")
    assert node.calls == [("status", "podlane", config())]


@pytest.mark.parametrize(
    ("step", "calls"),
    [
        ("refuse_own_netns", []),
        ("reserve", ["reserve"]),  # which leaves nothing, and what exists belongs to an earlier ADD
        ("connect", ["reserve", "connect", "release"]),
        ("commit", ["reserve", "connect", "commit", "release"]),
    ],
)
@pytest.mark.parametrize("failure", [REFUSED, RuntimeError("a bug")])
@pytest.mark.parametrize("undo", [None, CniError(Code.TRY_AGAIN_LATER, "undo"), RuntimeError("undo")])
def test_undo(step: str, calls: list[str], failure: Exception, undo: Exception | None) -> None:
    """An ADD that fails releases what it has reserved, once, and tells its own reason even if that fails too."""
    node = RecordingNode(**{step: failure}, **({"release": undo} if undo else {}))
    document = error(handle(request("ADD"), node))
    assert node.names == ["refuse_own_netns", *calls]
    if failure is REFUSED:
        assert document == {"cniVersion": "1.1.0", "code": 102, "msg": "the kernel said no", "details": "EPERM"}
    else:
        assert (document["code"], document["msg"]) == (999, "podlane failed: RuntimeError('a bug')")


def test_undo_if_the_result_cannot_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that the version cannot hold is noticed before the attachment is complete, and undone."""
    node = RecordingNode()
    monkeypatch.setattr(node, "connect", lambda *_: Result())
    document = error(handle(request("ADD", config(cniVersion="0.2.0")), node))
    assert document["msg"] == "cannot convert: no valid IP addresses"
    assert node.names == ["refuse_own_netns", "reserve", "release"]


@pytest.mark.parametrize(
    ("command", "step"), [("DEL", "release"), ("STATUS", "status"), ("CHECK", "check"), ("GC", "gc")]
)
@pytest.mark.parametrize("failure", [REFUSED, KeyError("a bug")])
def test_failures_of_other_commands(command: str, step: str, failure: Exception) -> None:
    """A DEL or STATUS that fails says why, and is not tried twice."""
    node = RecordingNode(**{step: failure})
    stdin = config(prevResult=PREVIOUS)
    assert error(handle(request(command, stdin), node))["code"] == (102 if failure is REFUSED else 999)
    assert [name for name in node.names if name != "refuse_own_netns"] == [step]


def test_what_is_not_served() -> None:
    """ADD and STATUS refuse by name what would otherwise silently not be done; DEL does not care."""
    node, stdin = RecordingNode(), config(vlan=7)
    for command in ("ADD", "STATUS"):
        document = error(handle(request(command, stdin), node))
        assert (document["code"], document["msg"][:24]) == (2, 'unsupported field "vlan"')
    assert node.calls == []
    assert handle(request("DEL", stdin), node).exit_code == 0


def test_what_has_no_effect_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Keys that cannot matter without a bridge are named in one line of the log, each with the reason."""
    with caplog.at_level(logging.INFO, "cni.commands"):
        handle(request("ADD", config(bridge="cni0", hairpinMode=True)), RecordingNode())
        handle(request("ADD"), RecordingNode())
    (record,) = caplog.records
    assert "bridge (there is no bridge), hairpinMode (" in record.getMessage()


def test_netns_that_did_not_open() -> None:
    """ADD needs the open network namespace, and says why there is none; nothing is reserved."""
    node = RecordingNode()
    missing = Request(environment("ADD", CNI_NETNS="/gone"), config(), None, netns_errno=2)
    document = error(handle(missing, node))
    assert document == {
        "cniVersion": "1.1.0",
        "code": 8,
        "msg": "cannot open the network namespace: errno 2",
        "details": "/gone",
    }
    assert node.calls == []


@pytest.mark.parametrize("version", VERSIONS)
def test_errors_are_in_the_version_of_the_configuration(version: str) -> None:
    """Once the configuration's version is known, errors are printed in it."""
    node = RecordingNode(reserve=REFUSED)
    assert error(handle(request("ADD", config(cniVersion=version)), node))["cniVersion"] == version
    assert error(handle(request("ADD", config(cniVersion=version, mtu="x")), node))["cniVersion"] == version
    assert error(handle(request("ADD", b"{"), node))["cniVersion"] == "1.1.0"


def test_bugs_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """An unexpected exception reaches the agent's log with its traceback, the runtime with its name."""
    with caplog.at_level(logging.ERROR, "cni.commands"):
        handle(request("ADD"), RecordingNode(connect=ZeroDivisionError("oops")))
    (record,) = caplog.records
    assert record.getMessage() == "internal error"
    assert record.exc_info
    assert record.exc_info[0] is ZeroDivisionError


failures = st.none() | st.sampled_from([REFUSED, RuntimeError("a bug"), KeyError(), CniError(Code.NOT_AVAILABLE, "")])


@settings(max_examples=300, deadline=None)
@given(environments, stdins, st.none() | st.just(NETNS), st.lists(failures, min_size=8, max_size=8))
def test_every_call_has_one_valid_answer(
    env: dict[str, str], stdin: bytes, netns: int | None, raised: list[Exception | None]
) -> None:
    """Any environment, any bytes and any failure lead to exit code 0, or 1 with one error object, and no exception."""
    steps = ("reserve", "connect", "commit", "release", "status", "check", "gc", "refuse_own_netns")
    node = RecordingNode(**{step: failure for step, failure in zip(steps, raised, strict=True) if failure})
    reply = handle(Request(env, stdin, netns, 0 if netns else 2), node)
    if reply.exit_code:
        document = error(reply)
        assert document["cniVersion"] in VERSIONS
        assert isinstance(document["code"], int)
        assert isinstance(document["msg"], str)
    elif env["CNI_COMMAND"] == "ADD":
        assert json.loads(reply.stdout).keys() & {"ips", "ip4"}  # the latter up to 0.2.0
        assert [name for name in node.names if name != "refuse_own_netns"] == ["reserve", "connect", "commit"]
    else:
        assert reply.stdout == b""
    assert reply.exit_code in (0, 1)


@settings(max_examples=100, deadline=None)
@given(st.lists(failures, min_size=4, max_size=4))
def test_addresses_are_reserved_or_released(raised: list[Exception | None]) -> None:
    """After an ADD the attachment is complete, or was released after the last thing that was done for it."""
    steps = ("reserve", "connect", "commit", "release")
    node = RecordingNode(**{step: failure for step, failure in zip(steps, raised, strict=True) if failure})
    reply = handle(request("ADD"), node)
    if reply.exit_code == 0:
        assert "release" not in node.names
    else:
        assert (node.names[-1] == "release") == (raised[0] is None)
        assert node.names.count("release") <= 1


@pytest.mark.parametrize(
    "call",
    [
        Request(environment("\udcff" * (1 << 20)), config()),
        Request(environment(CNI_CONTAINERID="\udcff" * (1 << 20)), config()),
        Request(environment(CNI_IFNAME="\udcff" * (1 << 20)), config()),
        Request(environment(CNI_NETNS="\udcff" * (1 << 20)), config(), netns_errno=2),
        Request(environment(), config(name="ü" * (4 << 20)), NETNS),
        Request(environment(), config(cniVersion="ü" * (4 << 20)), NETNS),
        Request(environment(), config(mtu="ü" * (4 << 20)), NETNS),
        Request(environment(), config(prevResult={"ips": "ü" * (4 << 20)}), NETNS),
        Request(environment(), b'{"name":"n","cniVersion":"1.0.0","mtu":' + b'{"a":' * 900 + b"1" + b"}" * 901, NETNS),
    ],
    ids=["command", "container", "interface", "netns", "name", "version", "mtu", "prevResult", "nested"],
)
def test_answers_fit_the_wire(call: Request) -> None:
    """However much is repeated of a hostile input, the answer is short enough to reach the launcher."""
    reply = handle(call, RecordingNode())
    assert error(reply)["code"] in (1, 2, 4, 6, 7, 8)
    assert len(reply.stdout) < STDOUT_LIMIT // 100
