"""The commands, on a node that records what is asked of it and fails where a test wants it to."""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager, nullcontext
from ipaddress import ip_interface, ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cni.call import Attachment
from cni.commands import handle
from cni.errors import CniError, Code
from cni.result import Interface, Result, Route
from cni.wire import STDOUT_LIMIT, Reply, Request
from tests.unit.calls import VERSIONS, config, environment, environments, stdins

ATTACHMENT = Attachment("podlane", "c0ffee", "eth0")
NETNS = 7
RESULT = Result(
    interfaces=(Interface("pl1", "02:00:00:00:00:01", 1500), Interface("eth0", "02:00:00:00:00:02", 1500, "/x")),
    addresses=(ip_interface("10.0.0.1/32"),),
    gateways=("169.254.1.1",),
    routes=(Route(ip_network("0.0.0.0/0"), "169.254.1.1"),),
)
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

    def reserve(self, attachment: Attachment, netns_path: str, netns: int, mtu: int) -> None:
        """Record."""
        self._record("reserve", attachment, netns_path, netns, mtu)

    def connect(self, attachment: Attachment, netns: int) -> Result:
        """Record."""
        self._record("connect", attachment, netns)
        return RESULT

    def commit(self, attachment: Attachment) -> None:
        """Record."""
        self._record("commit", attachment)

    def release(self, attachment: Attachment) -> None:
        """Record."""
        self._record("release", attachment)

    def status(self) -> None:
        """Record."""
        self._record("status")

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
    node = RecordingNode()
    reply = handle(request("ADD", config(cniVersion=version, mtu=1400)), node)
    assert reply == Reply(0, json.dumps(RESULT.to_json(version)).encode())
    assert node.calls == [
        ("reserve", ATTACHMENT, "/run/netns/x", NETNS, 1400),
        ("connect", ATTACHMENT, NETNS),
        ("commit", ATTACHMENT),
    ]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("netns", [NETNS, None])
def test_del(version: str, netns: int | None) -> None:
    """DEL releases, with and without a network namespace, and prints nothing."""
    node = RecordingNode()
    assert handle(request("DEL", config(cniVersion=version), netns, CNI_NETNS="/gone"), node) == Reply(0, b"")
    assert node.calls == [("release", ATTACHMENT)]


def test_status() -> None:
    """STATUS asks the node, and prints nothing when all is well."""
    node = RecordingNode()
    assert handle(request("STATUS", netns=None), node) == Reply(0, b"")
    assert node.calls == [("status",)]


@pytest.mark.parametrize(
    ("step", "calls"),
    [
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
    assert node.names == calls
    if failure is REFUSED:
        assert document == {"cniVersion": "1.1.0", "code": 102, "msg": "the kernel said no", "details": "EPERM"}
    else:
        assert (document["code"], document["msg"]) == (999, "podlane failed: RuntimeError('a bug')")


@pytest.mark.parametrize(("command", "step"), [("DEL", "release"), ("STATUS", "status")])
@pytest.mark.parametrize("failure", [REFUSED, KeyError("a bug")])
def test_failures_of_other_commands(command: str, step: str, failure: Exception) -> None:
    """A DEL or STATUS that fails says why, and is not tried twice."""
    node = RecordingNode(**{step: failure})
    assert error(handle(request(command), node))["code"] == (102 if failure is REFUSED else 999)
    assert node.names == [step]


@pytest.mark.parametrize(
    ("changes", "message", "details"),
    [
        ({"ipam": {"type": "host-local"}}, 'unsupported field "ipam": podlane gives', '{"type": "host-local"}'),
        ({"prevResult": {}}, 'unsupported field "prevResult": podlane must be the first', None),
    ],
)
def test_what_is_not_served(changes: dict[str, object], message: str, details: str | None) -> None:
    """ADD refuses by name what it would otherwise silently not do; DEL and STATUS do not care."""
    node = RecordingNode()
    document = error(handle(request("ADD", config(**changes)), node))
    assert document["code"] == 2
    assert document["msg"].startswith(message)
    assert document.get("details") == details
    assert node.calls == []
    assert handle(request("DEL", config(**changes)), node).exit_code == 0
    assert handle(request("STATUS", config(**changes)), node).exit_code == 0


def test_empty_ipam_is_none() -> None:
    """An empty ipam section asks for nothing, and is not refused."""
    assert handle(request("ADD", config(ipam={})), RecordingNode()).exit_code == 0


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
@given(environments, stdins, st.none() | st.just(NETNS), st.lists(failures, min_size=5, max_size=5))
def test_every_call_has_one_valid_answer(
    env: dict[str, str], stdin: bytes, netns: int | None, raised: list[Exception | None]
) -> None:
    """Any environment, any bytes and any failure lead to exit code 0, or 1 with one error object, and no exception."""
    steps = ("reserve", "connect", "commit", "release", "status")
    node = RecordingNode(**{step: failure for step, failure in zip(steps, raised, strict=True) if failure})
    reply = handle(Request(env, stdin, netns, 0 if netns else 2), node)
    if reply.exit_code:
        document = error(reply)
        assert document["cniVersion"] in VERSIONS
        assert isinstance(document["code"], int)
        assert isinstance(document["msg"], str)
    elif env["CNI_COMMAND"] == "ADD":
        assert json.loads(reply.stdout)["ips"]
        assert node.names == ["reserve", "connect", "commit"]
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
        Request(environment(), config(ipam={"x": "ü" * (4 << 20)}), NETNS),
        Request(environment(), b'{"name":"n","cniVersion":"1.0.0","ipam":' + b'{"a":' * 900 + b"1" + b"}" * 901, NETNS),
    ],
    ids=["command", "container", "interface", "netns", "name", "version", "ipam", "nested"],
)
def test_answers_fit_the_wire(call: Request) -> None:
    """However much is repeated of a hostile input, the answer is short enough to reach the launcher."""
    reply = handle(call, RecordingNode())
    assert error(reply)["code"] in (1, 2, 4, 7, 8)
    assert len(reply.stdout) < STDOUT_LIMIT // 100
