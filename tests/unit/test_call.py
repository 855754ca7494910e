"""A call of the plugin, validated: each rule about the environment, and in which order they are applied."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress

import pytest
from hypothesis import given, settings

from cni.call import Attachment, Call, answer_version, parse
from cni.errors import CniError, Code
from tests.unit.calls import VERSIONS, config, environment, environments, refusal, stdins

ATTACHED = ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"]
DETACHED = ["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"]
COMMANDS = {"ADD": ATTACHED, "CHECK": ATTACHED, "DEL": DETACHED, "GC": ["CNI_PATH"], "STATUS": ["CNI_PATH"]}
WITH_CONTAINER = ["ADD", "CHECK", "DEL"]


@pytest.mark.parametrize("command", ["ADD", "CHECK"])
def test_add_and_check(command: str) -> None:
    """ADD and CHECK are taken over with all that the environment says; a directory without a name is none."""
    env = environment(command, CNI_PATH="/opt/cni/bin::/usr/lib/cni:", CNI_NETNS_OVERRIDE="1")
    call = parse(env, config(mtu=1400))
    assert (call.command, call.container_id, call.ifname, call.netns_path) == (
        command,
        "c0ffee",
        "eth0",
        "/run/netns/x",
    )
    assert call.path == ("/opt/cni/bin", "/usr/lib/cni")
    assert call.arguments == {"IgnoreUnknown": "1", "K8S_POD_NAME": "web"}
    assert call.attachment == Attachment("podlane", "c0ffee", "eth0")
    assert str(call.attachment) == "podlane/c0ffee/eth0"


@pytest.mark.parametrize("netns", [None, "", "/gone/netns"])
def test_del_needs_no_netns(netns: str | None) -> None:
    """B35, B36: a DEL is valid without a network namespace, and with one that is gone."""
    call = parse(environment("DEL", CNI_NETNS=netns), config())
    assert (call.command, call.netns_path) == ("DEL", netns or "")


@pytest.mark.parametrize("command", ["GC", "STATUS"])
@pytest.mark.parametrize("absent", [None, "", "-"])
def test_gc_and_status_have_no_attachment(command: str, absent: str | None) -> None:
    """GC and STATUS need only CNI_PATH: the others, which libcni sends as empty strings, are not even looked at."""
    names = ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS")
    call = parse(environment(command, **dict.fromkeys(names, absent)), config())
    given = absent or ""
    assert call == Call(command, given, given, given, call.config, path=("/opt/cni/bin",))


@pytest.mark.parametrize(("value", "allowed"), [("1", True), ("true", True), ("TRUE", True), ("0", False), ("", False)])
def test_netns_override(value: str, allowed: bool) -> None:
    """CNI_NETNS_OVERRIDE: 1 or any case of true allows the plugin's own network namespace."""
    assert parse(environment(CNI_NETNS_OVERRIDE=value), config()).netns_override is allowed


@pytest.mark.parametrize(("command", "required"), COMMANDS.items())
@pytest.mark.parametrize("absent", [None, ""])
def test_required_variables(command: str, required: list[str], absent: str | None) -> None:
    """P06 to P11: each variable that a command needs is missed by name, all together; an empty one is missing."""
    for name in required:
        error = refusal(environment(command, **{name: absent}), config())
        assert (error.code, error.message) == (4, f"required env variables [{name}] missing")
    error = refusal(environment(command, **dict.fromkeys(required, absent)), config())
    assert (error.code, error.message) == (4, f"required env variables [{','.join(required)}] missing")


def test_missing_command() -> None:
    """A call without CNI_COMMAND misses that, and no more: nobody knows what else it needs."""
    assert refusal({}, b"").message == "required env variables [CNI_COMMAND] missing"


@pytest.mark.parametrize("command", ["add", "ADD ", "VERSION", "VERSIONS", "Ädd", "\udcff"])
def test_unknown_command(command: str) -> None:
    """Commands that podlane does not have are code 4, in the words of the reference, and case matters."""
    error = refusal(environment(command), config())
    assert (error.code, error.message) == (4, f"unknown CNI_COMMAND: {command}")
    assert error.details == "podlane has ADD, CHECK, DEL, GC, STATUS, VERSION"


@pytest.mark.parametrize("command", WITH_CONTAINER)
@pytest.mark.parametrize("container_id", ["-a", ".a", "_a", "a/b", "a b", "a\n", "ä", "\udcff", "a:b"])
def test_bad_container_id(command: str, container_id: str) -> None:
    """A container id that could be no file name, option or rule comment is refused."""
    error = refusal(environment(command, CNI_CONTAINERID=container_id), config())
    assert (error.code, error.message, error.details) == (4, "invalid characters in containerID", container_id)


@pytest.mark.parametrize("container_id", ["a", "0", "a.b_c-D9", "f" * 64, "f" * 1000])
def test_good_container_id(container_id: str) -> None:
    """Everything that the specification allows is taken as it is."""
    assert parse(environment(CNI_CONTAINERID=container_id), config()).container_id == container_id


TOO_LONG = "interface name is too long"
DOTS = "interface name is . or .."
CHARACTERS = "interface name contains / or : or whitespace characters"


@pytest.mark.parametrize(
    ("ifname", "message"),
    [
        ("sixteen-bytes-xx", TOO_LONG),
        ("üüüüüüüü", TOO_LONG),
        ("\udcff" * 16, TOO_LONG),
        (".", DOTS),
        ("..", DOTS),
        *((name, CHARACTERS) for name in ("eth/0", "eth:0", "eth 0", "eth0\n", "\t", "eth\u2003", "eth\xa0")),
        ("eth\x01", "interface name has characters that cannot be printed"),
        ("\udcff", "interface name has characters that cannot be printed"),
    ],
)
@pytest.mark.parametrize("command", WITH_CONTAINER)
def test_bad_interface_name(command: str, ifname: str, message: str) -> None:
    """An interface name that the kernel would refuse is refused before anything is done, in the reference's words."""
    error = refusal(environment(command, CNI_IFNAME=ifname), config())
    assert (error.code, error.message) == (4, message)
    assert ifname in error.details or repr(ifname) in error.details


@pytest.mark.parametrize("ifname", ["eth0", "fifteen-bytes-x", "...", "net@1", "-"])
def test_good_interface_name(ifname: str) -> None:
    """Whatever the kernel takes is taken."""
    assert parse(environment(CNI_IFNAME=ifname), config()).ifname == ifname


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (None, {}),
        ("", {}),
        ("IgnoreUnknown=true;A=b", {"IgnoreUnknown": "true", "A": "b"}),
        ("A=b;IgnoreUnknown=TRUE", {"A": "b", "IgnoreUnknown": "TRUE"}),
        ("IP=;MAC=", {"IP": "", "MAC": ""}),
        ("IP=10.0.0.1;IP=10.0.0.2", {"IP": "10.0.0.2"}),  # Multus appends what it was given to its own
        ("IgnoreUnknown=0;IgnoreUnknown=1;A=b", {"IgnoreUnknown": "1", "A": "b"}),
        ("K8S_POD_NAME=a\nb\udcff", {"K8S_POD_NAME": "a\ufffdb\ufffd"}),
    ],
)
def test_arguments(text: str | None, arguments: dict[str, str]) -> None:
    """P24: CNI_ARGS are pairs, of which the last of a name counts; what cannot be printed becomes U+FFFD."""
    assert parse(environment(CNI_ARGS=text), config()).arguments == arguments


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo", 'ARGS: invalid pair "foo"'),
        ("A=b=c", 'ARGS: invalid pair "A=b=c"'),
        ("IgnoreUnknown=1;", 'ARGS: invalid pair ""'),
        ("A=b;X=y", 'ARGS: unknown args ["A=b" "X=y"]'),
        ("A=b;IgnoreUnknown=0", 'ARGS: unknown args ["A=b"]'),
        ("A=b;ignoreunknown=1", 'ARGS: unknown args ["A=b" "ignoreunknown=1"]'),
        ("A=b;IgnoreUnknown=yes", 'ARGS: error parsing value of pair "IgnoreUnknown=yes"'),
    ],
)
def test_bad_arguments(text: str, message: str) -> None:
    """P24: CNI_ARGS that the reference plugins refuse are refused with their message; DEL needs none of them."""
    for command in ("ADD", "CHECK"):
        error = refusal(environment(command, CNI_ARGS=text), config())
        assert (error.code, error.message) == (4, f"CNI_{message}")
    assert parse(environment("DEL", CNI_ARGS=text), config()).arguments == {}


def test_pod() -> None:
    """The pod's name comes from what containerd, CRI-O and Multus say in CNI_ARGS, and fits Kubernetes' limit."""
    names = "K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=c0ffee;K8S_POD_UID=u"
    assert parse(environment(CNI_ARGS=names), config()).pod == ("default", "web")
    assert parse(environment(CNI_ARGS=f"K8S_POD_NAME={'x' * 300}"), config()).pod == ("", "x" * 253)
    assert parse(environment(CNI_ARGS=None), config()).pod == ("", "")


@pytest.mark.parametrize(
    ("arguments", "args", "runtime", "mac"),
    [
        ("", "", "", ""),
        ("02:00:00:00:00:0A", "", "", "02:00:00:00:00:0a"),
        ("02:00:00:00:00:01", "02-00-00-00-00-02", "", "02:00:00:00:00:02"),
        ("02:00:00:00:00:01", "02:00:00:00:00:02", "0200.0000.0003", "02:00:00:00:00:03"),
        ("rubbish", "", "02:00:00:00:00:03", "02:00:00:00:00:03"),
    ],
)
def test_requested_mac(arguments: str, args: str, runtime: str, mac: str) -> None:
    """P24: args.cni.mac counts more than CNI_ARGS, runtimeConfig.mac more than both."""
    stdin = config(args={"cni": {"mac": args}}, runtimeConfig={"mac": runtime})
    assert parse(environment(CNI_ARGS=f"MAC={arguments}"), stdin).requested_mac == mac


@pytest.mark.parametrize(
    ("mac", "message"),
    [
        *(
            (mac, "the requested MAC address is none")
            for mac in ("x", "02:00:00:00:00", "02:00:00:00:00:00:01", "0g" * 6)
        ),
        *(
            (mac, "the requested MAC address is a group address, or zero")
            for mac in ("01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00", "0000.0000.0000")
        ),
    ],
)
def test_bad_mac(mac: str, message: str) -> None:
    """An ADD with a MAC address that no interface can have is refused; a DEL does not care."""
    error = refusal(environment(CNI_ARGS=f"MAC={mac}"), config())
    assert (error.code, error.message, error.details) == (7, message, mac)
    assert parse(environment("DEL", CNI_ARGS=f"MAC={mac}"), config()).command == "DEL"


@pytest.mark.parametrize(
    ("arguments", "args", "runtime", "ips"),
    [
        ("", [], [], ()),
        ("10.0.0.1", [], [], ("10.0.0.1",)),
        ("10.0.0.1, fd00::1,", [], [], ("10.0.0.1", "fd00::1")),
        ("10.0.0.1,10.0.0.1", [], [], ("10.0.0.1",)),
        ("10.0.0.1", ["10.0.0.2/24"], [], ("10.0.0.2/24",)),
        ("10.0.0.1", ["fd00::2"], [], ("10.0.0.1", "fd00::2")),
        ("10.0.0.1", ["10.0.0.2", "fd00::2"], ["10.0.0.3"], ("10.0.0.3", "fd00::2")),
    ],
)
def test_requested_ips(arguments: str, args: list[str], runtime: list[str], ips: tuple[str, ...]) -> None:
    """P24: of each family the strongest source counts: runtimeConfig.ips, args.cni.ips, CNI_ARGS IP (a comma list)."""
    stdin = config(args={"cni": {"ips": args}}, runtimeConfig={"ips": runtime})
    assert parse(environment(CNI_ARGS=f"IP={arguments}"), stdin).requested_ips == ips


def test_order_of_the_checks() -> None:
    """Of several faults that is told first which the reference implementation finds first."""
    bad = "-"
    steps = [
        ({"CNI_CONTAINERID": bad, "CNI_IFNAME": ".", "CNI_PATH": ""}, b"{", "invalid characters in containerID"),
        ({"CNI_IFNAME": ".", "CNI_PATH": ""}, b"{", DOTS),
        ({"CNI_PATH": ""}, b"{", "required env variables [CNI_PATH] missing"),
        ({"CNI_COMMAND": "X"}, b"{", "the network configuration is not a JSON object"),
        ({"CNI_COMMAND": "X"}, config(name=bad, cniVersion="9"), "invalid characters found in network name"),
        ({"CNI_COMMAND": "X"}, config(cniVersion="9", mtu=-1), "unknown CNI_COMMAND: X"),
        ({"CNI_ARGS": "x"}, config(cniVersion="9", mtu=-1), "incompatible CNI versions"),
        ({"CNI_ARGS": "x"}, config(mtu=-1), 'CNI_ARGS: invalid pair "x"'),
        ({"CNI_ARGS": "MAC=x"}, config(mtu=-1), "invalid network configuration"),
        ({"CNI_ARGS": "MAC=x"}, config(), "the requested MAC address is none"),
    ]
    for changes, stdin, message in steps:
        assert refusal(environment() | changes, stdin).message == message


@settings(max_examples=400, deadline=None)
@given(environments, stdins)
def test_a_call_is_valid_or_a_cni_error(env: dict[str, str], stdin: bytes) -> None:
    """Whatever a runtime sends leads to a Call or a CniError, never to another exception, and all of it can be said."""
    answer = answer_version(stdin)
    assert answer in VERSIONS
    try:
        call = parse(env, stdin)
    except CniError as error:
        json.dumps(error.to_json(answer), ensure_ascii=False).encode()
        return
    assert (call.command, call.config.cni_version) == (env["CNI_COMMAND"], answer)
    json.dumps([call.pod, call.requested_mac, dict(call.arguments)], ensure_ascii=False).encode()
    with suppress(CniError):
        assert isinstance(
            [call.requested_ips, call.config.dns, call.config.valid_attachments, call.config.ipam_type], list
        )


def test_contract_needs_no_agent() -> None:
    """The package can be imported where neither the agent nor its libraries exist."""
    blocked = ["agent", "bcc", "pyroute2", "prometheus_client", "yaml", "sqlite3"]
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}));"
        "import cni.call, cni.commands, cni.delegate, cni.errors, cni.result, cni.wire"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_codes_of_the_specification() -> None:
    """The error codes are those of the specification, section 5 "Error"."""
    assert {int(code) for code in Code if code < 100} == {1, 2, 3, 4, 5, 6, 7, 8, 11, 50, 51}
