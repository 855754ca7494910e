"""The keys of the reference plugins bridge and ptp: which are served, which cannot matter, which are refused."""

from __future__ import annotations

import pytest

from cni.call import parse
from cni.errors import CniError
from cni.netconf import NetConf
from tests.unit.calls import config, environment

PORT = {"hostPort": 80, "containerPort": 80}


def read(**keys: object) -> NetConf:
    """Return the configuration with these keys, and others that are right."""
    return parse(environment(), config(**keys)).config


def test_textbook_configuration_of_bridge() -> None:
    """Every key of the reference plugins' configurations is taken over as it is documented."""
    conf = read(
        bridge="cni0",
        isGateway=True,
        isDefaultGateway=True,
        forceAddress=False,
        ipMasq=False,
        ipMasqBackend="nftables",
        hairpinMode=True,
        promiscMode=False,
        vlan=0,
        vlanTrunk=[{"id": 5}],
        preserveDefaultVlan=False,
        macspoofchk=True,
        enabledad=True,
        portIsolation=True,
        disableContainerInterface=True,
        prevResult={"ips": []},
    )
    assert (conf.bridge, conf.is_gateway, conf.is_default_gateway, conf.force_address) == ("cni0", True, True, False)
    assert (conf.ip_masq, conf.ip_masq_backend, conf.hairpin_mode, conf.promisc_mode) == (
        False,
        "nftables",
        True,
        False,
    )
    assert (conf.vlan, conf.vlan_trunk, conf.preserve_default_vlan) == (0, ({"id": 5},), False)
    assert (conf.macspoofchk, conf.enabledad) == (True, True)
    assert (conf.port_isolation, conf.disable_container_interface) == (True, True)
    assert (conf.prev_result, read().ip_masq) == ({"ips": []}, None)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"bridge": "cni0", "isGateway": True, "ipMasq": True, "mtu": 1400, "isDefaultGateway": True},
        {"hairpinMode": True, "forceAddress": True, "macspoofchk": True, "enabledad": True},
        {"promiscMode": True},
        {"ipMasqBackend": "iptables"},
        {"ipMasqBackend": "nftables"},
        {"vlan": 0, "vlanTrunk": [], "preserveDefaultVlan": True},
        {"preserveDefaultVlan": False},
        {"portIsolation": False, "disableContainerInterface": False},
        {"runtimeConfig": {"portMappings": [], "bandwidth": {}}},
        {"runtimeConfig": {"portMappings": [{"HostPort": 80, "ContainerPort": 8080, "Protocol": "TCP"}]}},
        {"runtimeConfig": {"portMappings": [{**PORT, "hostIP": "127.0.0.1"}]}},
        {"runtimeConfig": {"portMappings": [{**PORT, "protocol": "SCTP", "hostIP": "192.0.2.1"}]}},
        {"runtimeConfig": {"bandwidth": {"ingressRate": 0, "ingressBurst": 4294967295}}},
        {"runtimeConfig": {"bandwidth": {"IngressRate": 8, "IngressBurst": 34359738359}}},
    ],
)
def test_what_is_served(keys: dict[str, object]) -> None:
    """What podlane does, and what cannot matter without a bridge, is accepted."""
    read(**keys).check_served()


@pytest.mark.parametrize(
    ("keys", "code", "message"),
    [
        ({"vlan": 5}, 2, 'unsupported field "vlan": 5; podlane does not have it'),
        ({"vlanTrunk": [{"id": 5}]}, 2, 'unsupported field "vlanTrunk": [{"id": 5}]; podlane does not have it'),
        ({"portIsolation": True}, 2, 'unsupported field "portIsolation": true; podlane does not have it'),
        ({"disableContainerInterface": True}, 2, 'unsupported field "disableContainerInterface": true; podlane does'),
        (
            {"runtimeConfig": {"portMappings": [{**PORT, "protocol": "DCCP"}]}},
            2,
            'unsupported field "runtimeConfig.portMappings.protocol": "DCCP"; no such protocol; allowed are tcp, udp',
        ),
        (
            {"runtimeConfig": {"portMappings": [{**PORT, "protocol": "SCTP", "hostIP": "127.0.0.1"}]}},
            2,
            'unsupported field "runtimeConfig.portMappings.hostIP": "127.0.0.1"; the node\'s own calls by SCTP cannot',
        ),
        (
            {"runtimeConfig": {"portMappings": [{**PORT, "hostIP": "169.254.1.1"}]}},
            2,
            'unsupported field "runtimeConfig.portMappings.hostIP": "169.254.1.1"; a pod cannot answer from there',
        ),
        (
            {"runtimeConfig": {"portMappings": [{**PORT, "hostIP": "10.0.0"}]}},
            7,
            "runtimeConfig.portMappings.hostIP",
        ),
        ({"runtimeConfig": {"portMappings": [{"containerPort": 80}]}}, 7, "Invalid host port number: 0"),
        (
            {"runtimeConfig": {"bandwidth": {"egressRate": 8000}}},
            7,
            "runtimeConfig.bandwidth.egressBurst: if egressRate is set (8000), egressBurst must also be set",
        ),
        (
            {"runtimeConfig": {"bandwidth": {"ingressRate": 5, "ingressBurst": 8000}}},
            7,
            "runtimeConfig.bandwidth.ingressRate: 5 bits per second are less than a byte (8)",
        ),
        (
            {"runtimeConfig": {"bandwidth": {"ingressRate": 8, "ingressBurst": 8 * 0xFFFFFFFF}}},
            7,
            "runtimeConfig.bandwidth.ingressBurst: 34359738360 bits are more than the 4 GiB that can wait",
        ),
        ({"vlan": -1}, 7, "invalid VLAN ID -1 (must be between 0 and 4094)"),
        ({"vlan": 4095}, 7, "invalid VLAN ID 4095 (must be between 0 and 4094)"),
        ({"ipMasqBackend": "foo"}, 7, 'unknown ipmasq backend "foo"'),
        (
            {"hairpinMode": True, "promiscMode": True},
            7,
            "cannot set hairpin mode and promiscuous mode at the same time",
        ),
    ],
)
def test_what_is_not_served(keys: dict[str, object], code: int, message: str) -> None:
    """What would silently not happen is refused by key and value; what bridge refuses, in its words."""
    with pytest.raises(CniError) as caught:
        read(**keys).check_served()
    assert caught.value.code == code
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"ipMasq": True, "mtu": 1400, "isDefaultGateway": True, "dns": {"domain": "a"}}, []),
        ({"isGateway": False, "hairpinMode": False, "bridge": ""}, []),
        (
            {
                "bridge": "cni0",
                "isGateway": True,
                "forceAddress": True,
                "ipMasqBackend": "nftables",
                "hairpinMode": True,
                "promiscMode": True,
                "preserveDefaultVlan": False,
                "macspoofchk": True,
                "enabledad": True,
            },
            [
                "bridge",
                "forceAddress",
                "hairpinMode",
                "promiscMode",
                "ipMasqBackend",
                "preserveDefaultVlan",
                "macspoofchk",
                "enabledad",
            ],
        ),
    ],
)
def test_what_has_no_effect(keys: dict[str, object], named: list[str]) -> None:
    """A key that asks for what cannot matter is named, with the reason; one that asks for nothing is not."""
    without_effect = read(**keys).without_effect
    assert list(without_effect) == named
    assert all(without_effect.values())
