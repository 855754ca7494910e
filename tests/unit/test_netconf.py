"""The network configuration: JSON as Go reads it, and the keys as each runtime writes them."""

from __future__ import annotations

import json

import pytest

from cni.call import parse
from cni.errors import CniError, Code
from cni.netconf import NetConf
from cni.result import Dns
from tests.unit.calls import config, environment, refusal


def read(**keys: object) -> NetConf:
    """Return the configuration with these keys, and others that are right."""
    return parse(environment(), config(**keys)).config


@pytest.mark.parametrize(
    ("stdin", "details"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"{} {}", "Extra data"),
        (b"\xff\xff", "Expecting value"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"mtu": ' + b"9" * 5000 + b"}", "integer string conversion"),
        (b'{"mtu": NaN}', "NaN is not JSON"),
        (b'{"mtu": -Infinity}', "-Infinity is not JSON"),
        (b"[]", "it is a list, not an object"),
        (b"null", "it is a NoneType, not an object"),
        (b'"x"', "it is a str, not an object"),
    ],
)
def test_stdin_that_is_no_object(stdin: bytes, details: str) -> None:
    """Stdin must be one JSON object, else code 6."""
    error = refusal(environment(), stdin)
    assert (error.code, error.message) == (6, "the network configuration is not a JSON object")
    assert details in error.details


def test_bytes_that_are_no_utf8() -> None:
    """Bytes that are no UTF-8 within a text become U+FFFD, as in Go."""
    conf = parse(environment(), b'{"cniVersion":"1.0.0","name":"n","bridge":"\xff"}').config
    assert conf.bridge == "\ufffd"


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        (None, 7, "missing network name"),
        ("", 7, "missing network name"),
        *((bad, 7, "invalid characters found in network name") for bad in ("a b", "-a", "a\n", "ä", "a/b", "../a")),
        (3, 6, "the network configuration's name is not a string"),
    ],
)
@pytest.mark.parametrize("command", ["ADD", "DEL", "STATUS"])
def test_bad_name(command: str, name: object, code: int, message: str) -> None:
    """P16: a network without a name, or with one that could be no file name, is code 7; one that is no text code 6."""
    error = refusal(environment(command), config(name=name))
    assert (error.code, error.message) == (code, message)


@pytest.mark.parametrize(
    ("keys", "details"),
    [
        ({"mtu": "1400"}, "mtu: Input should be a valid integer (given: '1400')"),
        ({"mtu": True}, "mtu: Input should be a valid integer (given: True)"),
        ({"mtu": 1400.0}, "mtu: Input should be a valid integer"),
        ({"mtu": -1}, "mtu: Input should be greater than or equal to 0 (given: -1)"),
        ({"mtu": 65536}, "mtu: Input should be less than or equal to 65535 (given: 65536)"),
        ({"isGateway": "true"}, "isGateway: Input should be a valid boolean (given: 'true')"),
        ({"ipMasq": 1}, "ipMasq: Input should be a valid boolean (given: 1)"),
        ({"bridge": 3}, "bridge: Input should be a valid string (given: 3)"),
        ({"ipam": []}, "ipam: Input should be a valid dictionary (given: [])"),
        ({"prevResult": "x"}, "prevResult: Input should be a valid dictionary (given: 'x')"),
        ({"dns": {"search": "x"}}, "dns.search: Input should be a valid"),
        ({"dns": {"search": [3]}}, "dns.search.0: Input should be a valid string (given: 3)"),
        ({"args": {"cni": {"ips": "10.0.0.1"}}}, "args.cni.ips: "),
        ({"runtimeConfig": []}, "runtimeConfig: "),
        ({"runtimeConfig": {"bandwidth": {"ingressRate": -1}}}, "runtimeConfig.bandwidth.ingressRate: "),
        ({"runtimeConfig": {"portMappings": [{"hostPort": 65536}]}}, "runtimeConfig.portMappings.0.hostPort: "),
        ({"runtimeConfig": {"ipRanges": [{}]}}, "runtimeConfig.ipRanges.0: "),
        ({"cni.dev/valid-attachments": [{"ifname": "eth0"}]}, "cni.dev/valid-attachments.0.containerID: "),
        ({"cni.dev/attachments": [None]}, "cni.dev/attachments.0: "),
        ({"mtu": -1, "vlan": ""}, "; vlan: "),
    ],
)
def test_bad_fields(keys: dict[str, object], details: str) -> None:
    """B51: a field of the wrong type or value is code 7, and is named with what was given and what is allowed."""
    error = refusal(environment(), config(**keys))
    assert (error.code, error.message) == (7, "invalid network configuration")
    assert details in error.details


def test_null_is_absent() -> None:
    """A key whose value is null is as good as none, at every level."""
    keys = ("ipam", "prevResult", "mtu", "dns", "args", "runtimeConfig", "ipMasq", "isGateway", "type", "vlanTrunk")
    nothing = parse(environment(), config()).config.model_copy(update={"type": ""})
    nulls = json.dumps({"cniVersion": "1.1.0", "name": "podlane", **dict.fromkeys(keys)}).encode()
    assert parse(environment(), nulls).config == nothing
    inner = config(type="", args={"cni": None}, runtimeConfig={"ips": None, "portMappings": None}, dns={"search": None})
    assert parse(environment(), inner).config == nothing
    assert refusal(environment(), b'{"cniVersion":"1.0.0","name":null}').message == "missing network name"


def test_unknown_keys_are_ignored() -> None:
    """P22: what nobody knows is ignored, and the capabilities that libcni leaves in are, whatever they hold."""
    assert read(capabilities={"mac": True}, unknown=[], dns={"x": 1}, runtimeConfig={"cgroupPath": "/x"}) == read()


def test_keys_match_in_any_case() -> None:
    """P23: keys match whatever their case, as in Go; of those that are the same then, the last counts."""
    stdin = (
        b'{"CNIVersion":"0.4.0","Name":"n","MTU":9000,"mtu":1400,"mTu":null,"Ipam":{"Type":"host-local"},"ipmasq":true}'
    )
    conf = parse(environment(), stdin).config
    assert (conf.cni_version, conf.name, conf.mtu, conf.ipam_type, conf.ip_masq) == (
        "0.4.0",
        "n",
        1400,
        "host-local",
        True,
    )
    assert conf.ipam == {"Type": "host-local"}


@pytest.mark.parametrize(
    "given",
    [
        # containerd (Go structs without JSON tags), CRI-O and podman (CONVENTIONS.md)
        {
            "portMappings": [{"HostPort": 80, "ContainerPort": 8080, "Protocol": "tcp", "HostIP": "10.0.0.9"}],
            "bandwidth": {"IngressRate": 1, "IngressBurst": 2, "EgressRate": 3, "EgressBurst": 34359738359},
            "dns": {"Servers": ["10.0.0.53"], "Searches": ["svc"], "Options": ["ndots:5"]},
            "io.kubernetes.cri.pod-annotations": {"a": "b"},
        },
        {
            "portMappings": [{"hostPort": 80, "containerPort": 8080, "protocol": "tcp", "hostIP": "10.0.0.9"}],
            "bandwidth": {"ingressRate": 1, "ingressBurst": 2, "egressRate": 3, "egressBurst": 34359738359},
            "dns": {"servers": ["10.0.0.53"], "searches": ["svc"], "options": ["ndots:5"]},
            "aliases": {"podlane": ["web"]},
        },
    ],
    ids=["containerd", "CRI-O"],
)
def test_runtime_config(given: dict[str, object]) -> None:
    """What a runtime asks for is read the same, with containerd's capital letters and without."""
    conf = read(runtimeConfig=given)
    (mapping,) = conf.runtime_config.port_mappings
    assert (mapping.host_port, mapping.container_port, mapping.protocol, mapping.host_ip) == (
        80,
        8080,
        "tcp",
        "10.0.0.9",
    )
    bandwidth = conf.runtime_config.bandwidth
    assert (bandwidth.ingress_rate, bandwidth.ingress_burst, bandwidth.egress_rate) == (1, 2, 3)
    assert bandwidth.egress_burst == 34359738359
    assert conf.dns == Dns(("10.0.0.53",), "", ("svc",), ("ndots:5",))


def test_runtime_config_of_multus() -> None:
    """Multus and podman ask for addresses, a MAC address and ranges, which are passed on as they are."""
    ranges = [[{"subnet": "10.1.0.0/24", "rangeStart": "10.1.0.9"}], [{"subnet": "fd00::/64"}]]
    conf = read(runtimeConfig={"ips": ["10.1.0.9/24"], "mac": "02:00:00:00:00:01", "ipRanges": ranges})
    assert (conf.runtime_config.ips, conf.runtime_config.mac) == (("10.1.0.9/24",), "02:00:00:00:00:01")
    assert [list(each) for each in conf.runtime_config.ip_ranges] == ranges


@pytest.mark.parametrize(
    ("keys", "dns"),
    [
        ({}, None),
        ({"dns": {}}, None),
        ({"dns": {"domain": ""}}, None),
        ({"dns": {"nameservers": []}}, Dns()),
        ({"dns": {"nameservers": ["10.0.0.53"], "domain": "a"}}, Dns(("10.0.0.53",), "a")),
        ({"dns": {"domain": "a"}, "runtimeConfig": {"dns": {"searches": ["b"]}}}, Dns(search=("b",))),
        ({"dns": {"domain": "a"}, "runtimeConfig": {"dns": {"servers": []}}}, Dns(domain="a")),
    ],
)
def test_dns(keys: dict[str, object], dns: Dns | None) -> None:
    """Any DNS key, an empty list too, replaces what IPAM says; what the runtime says counts more."""
    assert read(**keys).dns == dns


ONE = {"containerID": "c1", "ifname": "eth0"}
TWO = {"ContainerID": "c2", "IfName": "net1"}


@pytest.mark.parametrize(
    ("keys", "valid"),
    [
        ({}, None),
        ({"cni.dev/valid-attachments": None}, ()),
        ({"cni.dev/valid-attachments": []}, ()),
        ({"cni.dev/attachments": None}, ()),
        ({"cni.dev/valid-attachments": [ONE]}, (("c1", "eth0"),)),
        ({"cni.dev/attachments": [ONE, TWO, ONE]}, (("c1", "eth0"), ("c2", "net1"))),
        ({"cni.dev/valid-attachments": [ONE], "cni.dev/attachments": [TWO]}, (("c1", "eth0"), ("c2", "net1"))),
        ({"cni.dev/valid-attachments": None, "cni.dev/attachments": [ONE]}, (("c1", "eth0"),)),
    ],
)
def test_valid_attachments(keys: dict[str, object], valid: tuple[tuple[str, str], ...] | None) -> None:
    """G03: a list of null says that no attachment is valid, no list says nothing; what either key has is valid."""
    stdin = json.dumps({"cniVersion": "1.1.0", "name": "podlane", **keys}).encode()
    assert parse(environment("GC"), stdin).config.valid_attachments == valid


def test_ipam_type() -> None:
    """The plugin that gives the addresses is named by ipam.type, which must be a text."""
    assert [read(ipam=ipam).ipam_type for ipam in (None, {}, {"type": None}, {"TYPE": "dhcp"})] == ["", "", "", "dhcp"]
    with pytest.raises(CniError) as caught:
        _ = read(ipam={"type": 3}).ipam_type
    assert (caught.value.code, caught.value.message) == (
        Code.INVALID_NETWORK_CONFIG,
        "ipam.type: Input should be a valid string",
    )


def test_what_is_given_is_abbreviated() -> None:
    """A megabyte in the wrong place does not become a megabyte of error message."""
    for mtu in ("x y" * 1_000_000, ["x"] * 1_000_000, {str(i): i for i in range(10_000)}):
        assert len(refusal(environment(), config(mtu=mtu)).details) < 1000
    many = refusal(environment(), config(**{"cni.dev/attachments": [3] * 100_000})).details
    assert len(many) < 2000
    assert many.endswith("and 99992 more")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, True),
        ({"ipMasq": True}, True),
        ({"bridge": "cni0"}, False),
        ({"isGateway": False}, False),
        ({"isGateway": None}, True),
        ({"bridge": "cni0", "isGateway": True}, True),
        ({"bridge": "cni0", "isGateway": False, "isDefaultGateway": True}, True),
    ],
)
def test_node_is_gateway(keys: dict[str, object], expected: bool) -> None:
    """A configuration of bridge says whether the node is the gateway; with ptp, which has no key for that, it is."""
    assert read(**keys).node_is_gateway == expected
