"""A call of the plugin, validated: each rule of the specification, and in which order they are applied."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress

import pytest
from hypothesis import given, settings

from cni.call import LATEST, Attachment, Call, parse
from cni.call import VERSIONS as KNOWN
from cni.errors import CniError, Code
from tests.unit.calls import VERSIONS, config, environment, environments, stdins


def refused(env: dict[str, str], stdin: bytes) -> CniError:
    """Return the error that a call is refused with."""
    with pytest.raises(CniError) as caught:
        parse(env, stdin)
    return caught.value


def test_add() -> None:
    """An ADD is taken over with its netns, and unknown keys of the configuration are ignored."""
    call = parse(environment(), config(mtu=1400, capabilities={"mac": True}, isGateway="true"))
    assert (call.command, call.container_id, call.ifname, call.netns_path) == ("ADD", "c0ffee", "eth0", "/run/netns/x")
    assert (call.config.cni_version, call.config.name, call.config.mtu) == ("1.1.0", "podlane", 1400)
    assert (call.config.ipam, call.config.prev_result) == (None, None)
    assert call.attachment == Attachment("podlane", "c0ffee", "eth0")
    assert str(call.attachment) == "podlane/c0ffee/eth0"


@pytest.mark.parametrize("netns", [None, "", "/gone/netns"])
def test_del_needs_no_netns(netns: str | None) -> None:
    """A DEL is valid without a network namespace, and with one that is gone."""
    call = parse(environment("DEL", CNI_NETNS=netns), config())
    assert (call.command, call.netns_path) == ("DEL", netns or "")


@pytest.mark.parametrize("absent", [None, ""])
def test_status_has_no_attachment(absent: str | None) -> None:
    """STATUS is valid without container, namespace and interface, which libcni sends as empty strings."""
    env = environment("STATUS", CNI_CONTAINERID=absent, CNI_NETNS=absent, CNI_IFNAME=absent, CNI_ARGS=absent)
    assert parse(env, config()) == Call("STATUS", "", "", "", parse(env, config()).config)


@pytest.mark.parametrize(
    ("command", "required"),
    [
        ("ADD", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"]),
        ("DEL", ["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"]),
        ("STATUS", ["CNI_PATH"]),
    ],
)
@pytest.mark.parametrize("absent", [None, ""])
def test_required_variables(command: str, required: list[str], absent: str | None) -> None:
    """Each variable that a command needs is missed by name, all of them together; an empty one is missing."""
    for name in required:
        error = refused(environment(command, **{name: absent}), config())
        assert (error.code, error.message) == (4, f"required env variables [{name}] missing")
    error = refused(environment(command, **dict.fromkeys(required, absent)), config())
    assert (error.code, error.message) == (4, f"required env variables [{','.join(required)}] missing")


@pytest.mark.parametrize("command", ["add", "ADD ", "CHECK", "GC", "", "VERSIONS", "Ädd"])
def test_unknown_command(command: str) -> None:
    """Commands that podlane does not have are code 4, in the words of the reference, and case matters."""
    error = refused(environment(command), config())
    assert (error.code, error.message) == (4, f"unknown CNI_COMMAND: {command}")
    assert error.details == "podlane has ADD, DEL, STATUS, VERSION"


@pytest.mark.parametrize("command", ["ADD", "DEL"])
@pytest.mark.parametrize("container_id", ["-a", ".a", "_a", "a/b", "a b", "a\n", "ä", "\udcff", "a:b"])
def test_bad_container_id(command: str, container_id: str) -> None:
    """A container id that could be no file name, option or rule comment is refused."""
    error = refused(environment(command, CNI_CONTAINERID=container_id), config())
    assert (error.code, error.message, error.details) == (4, "invalid characters in containerID", container_id)


@pytest.mark.parametrize("container_id", ["a", "0", "a.b_c-D9", "f" * 64, "f" * 1000])
def test_good_container_id(container_id: str) -> None:
    """Everything that the specification allows is taken as it is."""
    assert parse(environment(CNI_CONTAINERID=container_id), config()).container_id == container_id


@pytest.mark.parametrize(
    ("ifname", "message"),
    [
        ("sixteen-bytes-xx", "interface name is 16 bytes long, at most 15 are allowed"),
        ("üüüüüüüü", "interface name is 16 bytes long, at most 15 are allowed"),
        ("\udcff" * 16, "interface name is 16 bytes long, at most 15 are allowed"),
        (".", "interface name may not be . or .., nor contain / or : or white space"),
        ("..", "interface name may not be . or .., nor contain / or : or white space"),
        ("eth/0", "interface name may not be . or .., nor contain / or : or white space"),
        ("eth:0", "interface name may not be . or .., nor contain / or : or white space"),
        ("eth 0", "interface name may not be . or .., nor contain / or : or white space"),
        ("eth0\n", "interface name may not be . or .., nor contain / or : or white space"),
        ("\t", "interface name may not be . or .., nor contain / or : or white space"),
    ],
)
@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_bad_interface_name(command: str, ifname: str, message: str) -> None:
    """An interface name that the kernel would refuse is refused before anything is done."""
    error = refused(environment(command, CNI_IFNAME=ifname), config())
    assert (error.code, error.message, error.details) == (4, message, ifname)


@pytest.mark.parametrize("ifname", ["eth0", "fifteen-bytes-x", "...", "net@1", "-"])
def test_good_interface_name(ifname: str) -> None:
    """Whatever the kernel takes is taken."""
    assert parse(environment(CNI_IFNAME=ifname), config()).ifname == ifname


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (b"", "the network configuration is not JSON"),
        (b"{", "the network configuration is not JSON"),
        (b"{} {}", "the network configuration is not JSON"),
        (b"\xff\xff", "the network configuration is not JSON"),
        (b"[" * 100_000, "the network configuration is not JSON"),
        (b'{"mtu": ' + b"9" * 5000 + b"}", "the network configuration is not JSON"),
        (b"[]", "the network configuration is a list, not an object"),
        (b"null", "the network configuration is a NoneType, not an object"),
        (b'"x"', "the network configuration is a str, not an object"),
    ],
)
def test_stdin_that_is_no_object(stdin: bytes, message: str) -> None:
    """Stdin must be one JSON object, else code 6."""
    error = refused(environment(), stdin)
    assert (error.code, error.message) == (6, message)


@pytest.mark.parametrize(
    ("changes", "details"),
    [
        ({"name": None}, "name: Field required"),
        ({"name": ""}, "name: String should match pattern"),
        ({"name": "a b"}, "(given: 'a b')"),
        ({"name": "-a"}, "(given: '-a')"),
        ({"name": "a\n"}, "name: String should match pattern"),
        ({"name": 3}, "name: Input should be a valid string (given: 3)"),
        ({"mtu": "1400"}, "mtu: Input should be a valid integer (given: '1400')"),
        ({"mtu": True}, "mtu: Input should be a valid integer (given: True)"),
        ({"mtu": 1400.5}, "mtu: Input should be a valid integer"),
        ({"mtu": -1}, "mtu: Input should be greater than or equal to 0 (given: -1)"),
        ({"mtu": 65536}, "mtu: Input should be less than or equal to 65535 (given: 65536)"),
        ({"ipam": []}, "ipam: Input should be a valid dictionary (given: [])"),
        ({"prevResult": "x"}, "prevResult: Input should be a valid dictionary (given: 'x')"),
        ({"cniVersion": 1}, "cniVersion: Input should be a valid string (given: 1)"),
        ({"mtu": -1, "name": ""}, "(given: ''); mtu: "),
    ],
)
def test_bad_fields(changes: dict[str, object], details: str) -> None:
    """A field of the wrong type or value is code 7, and is named with what was given and what is allowed."""
    error = refused(environment(), config(**changes))
    assert (error.code, error.message) == (7, "invalid network configuration")
    assert details in error.details


def test_null_is_absent() -> None:
    """A key whose value is null is as good as none."""
    call = parse(environment(), b'{"cniVersion": "1.0.0", "name": "n", "ipam": null, "prevResult": null}')
    assert (call.config.ipam, call.config.prev_result) == (None, None)


@pytest.mark.parametrize("version", VERSIONS)
def test_known_versions(version: str) -> None:
    """ADD and DEL are valid in every version from 0.3.0 on, STATUS from 1.1.0 on."""
    assert parse(environment(), config(cniVersion=version)).config.cni_version == version
    assert parse(environment("DEL"), config(cniVersion=version)).config.cni_version == version
    if version == "1.1.0":
        assert parse(environment("STATUS"), config(cniVersion=version)).command == "STATUS"
        return
    error = refused(environment("STATUS"), config(cniVersion=version))
    assert (error.code, error.message) == (1, "config version does not allow STATUS")
    assert error.details == f"{version} < 1.1.0"


@pytest.mark.parametrize("version", [None, "0.1.0", "0.2.0", "1.2.0", "9.9.9", "1.1", "1.1.0 ", "v1.1.0", ""])
@pytest.mark.parametrize("command", ["ADD", "DEL", "STATUS"])
def test_unknown_versions(command: str, version: str | None) -> None:
    """Any other version is code 1, with both sides' versions; a missing one means the first version."""
    error = refused(environment(command), config(cniVersion=version))
    assert (error.code, error.message) == (1, "incompatible CNI versions")
    shown = "0.1.0" if version is None else version
    assert error.details == f'config is "{shown}", plugin supports {json.dumps(VERSIONS)}'


def test_order_of_the_checks() -> None:
    """Of several faults the environment's is told first, then JSON, then the fields, then the version."""
    bad = "-"
    assert refused(environment("X", CNI_PATH=""), b"{").message == "unknown CNI_COMMAND: X"
    assert "CNI_PATH" in refused(environment(CNI_PATH="", CNI_CONTAINERID=bad), b"{").message
    assert "containerID" in refused(environment(CNI_CONTAINERID=bad, CNI_IFNAME="."), b"{").message
    assert "interface" in refused(environment(CNI_IFNAME="."), b"{").message
    assert refused(environment(), b"{").code == Code.DECODING_FAILURE
    assert refused(environment(), config(name=bad, cniVersion="9.9.9")).code == Code.INVALID_NETWORK_CONFIG
    assert refused(environment(), config(cniVersion="9.9.9")).code == Code.INCOMPATIBLE_VERSION


def test_what_is_given_is_abbreviated() -> None:
    """A megabyte in the wrong place does not become a megabyte of error message."""
    for name in ("x y" * 1_000_000, ["x"] * 1_000_000, {str(i): i for i in range(10_000)}):
        assert len(refused(environment(), config(name=name)).details) < 1000


@settings(max_examples=300, deadline=None)
@given(environments, stdins)
def test_a_call_is_valid_or_a_cni_error(env: dict[str, str], stdin: bytes) -> None:
    """Whatever a runtime sends leads to a Call or a CniError, never to another exception."""
    with suppress(CniError):
        call = parse(env, stdin)
        assert (call.command, call.config.cni_version in VERSIONS) == (env["CNI_COMMAND"], True)


def test_versions() -> None:
    """The versions are those that the launcher names, the newest last."""
    assert (list(KNOWN), LATEST) == (VERSIONS, VERSIONS[-1])


def test_contract_needs_no_agent() -> None:
    """The package can be imported where neither the agent nor its libraries exist."""
    blocked = ["agent", "bcc", "pyroute2", "prometheus_client", "yaml", "sqlite3"]
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}));"
        "import cni.call, cni.commands, cni.errors, cni.result, cni.wire"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
