"""The network configuration of a call: every key that the reference plugins have, as runtimes and their users write it.

Sources: specification 1.1.0 section 1, CONVENTIONS.md, and the configuration structs of plugins:bridge, ptp, portmap
and bandwidth. Keys that only the runtime reads (`capabilities`, `disableCheck`…) are unknown here, and ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field

from cni.document import JsonObject, Many, lookup
from cni.errors import CniError, Code
from cni.result import Dns
from cni.versions import UNNAMED

PORT_PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
"""What can have host ports: numbers of the IP header, by the names that runtimes write, in lower case."""

_MASQUERADE_BACKENDS = ("", "iptables", "nftables")
_LAST_VLAN = 4094
_IPV4_MIN_MTU = 68  # bytes (RFC 791 section 3.2; the kernel takes no less for a veth pair)
_WHY_REFUSED = {"ipam.type": "its server must share a layer 2 with the pod, and a pod shares one with its node only"}
_BITS = 8  # of a byte
_U32_MAX, _U64_MAX = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
_WITHOUT_EFFECT = {
    "bridge": "there is no bridge",
    "force_address": "there is no bridge",
    "hairpin_mode": "a pod always reaches itself",
    "promisc_mode": "there is no bridge",
    "ip_masq_backend": "podlane masquerades by itself",
    "preserve_default_vlan": "there is no bridge, and no VLAN",
    "macspoofchk": "podlane always checks",
    "enabledad": "podlane gives no address twice",
}


def _unsupported(key: str, value: object, reason: str) -> CniError:
    return CniError(Code.UNSUPPORTED_FIELD, f'unsupported field "{key}": {json.dumps(value)}; {reason}')


class GivenDns(JsonObject):
    """`dns` of the configuration: a list that is empty is given all the same (plugins:bridge, dnsConfSet)."""

    nameservers: Many[str] | None = None
    domain: str = ""
    search: Many[str] | None = None
    options: Many[str] | None = None

    @property
    def settings(self) -> Dns | None:
        """What it says, in place of what IPAM says; None if it says nothing."""
        if not self.domain and self.nameservers is None and self.search is None and self.options is None:
            return None
        return Dns(self.nameservers or (), self.domain, self.search or (), self.options or ())


class RuntimeDns(JsonObject):
    """`runtimeConfig.dns`, whose keys are other ones than those of `dns` (CONVENTIONS.md)."""

    servers: Many[str] = ()
    searches: Many[str] = ()
    options: Many[str] = ()


class PortMapping(JsonObject):
    """One entry of `runtimeConfig.portMappings`: a port of the host that leads to one of the container."""

    host_port: int = Field(0, ge=0, le=65535)
    container_port: int = Field(ge=1, le=65535)
    protocol: str = "tcp"
    host_ip: str = Field("", alias="hostIP")

    def check(self) -> None:
        """Refuse by name what cannot be. Raises CniError 7, and 2 for what podlane does not have."""
        if not self.host_port:
            raise CniError(Code.INVALID_NETWORK_CONFIG, f"Invalid host port number: {self.host_port}")
        if self.protocol.lower() not in PORT_PROTOCOLS:
            reason = f"no such protocol; allowed are {', '.join(PORT_PROTOCOLS)}"
            raise _unsupported("runtimeConfig.portMappings.protocol", self.protocol, reason)
        if not self.host_ip:
            return
        try:
            address = ip_address(self.host_ip)
        except ValueError as error:
            raise CniError(Code.INVALID_NETWORK_CONFIG, "runtimeConfig.portMappings.hostIP", str(error)) from error
        if address.is_multicast or address.is_link_local or (address.version == 6 and address.ipv4_mapped):
            raise _unsupported("runtimeConfig.portMappings.hostIP", self.host_ip, "a pod cannot answer from there")
        if address.is_loopback and self.protocol.lower() == "sctp":
            reason = "the node's own calls by SCTP cannot be led to a pod"
            raise _unsupported("runtimeConfig.portMappings.hostIP", self.host_ip, reason)


class Bandwidth(JsonObject):
    """`runtimeConfig.bandwidth`: rates in bits per second, bursts in bits; 0 is no limit."""

    ingress_rate: int = Field(0, ge=0, le=_U64_MAX)
    ingress_burst: int = Field(0, ge=0, le=_U64_MAX)
    egress_rate: int = Field(0, ge=0, le=_U64_MAX)
    egress_burst: int = Field(0, ge=0, le=_U64_MAX)

    @property
    def limits(self) -> bool:
        """Whether it limits anything."""
        return bool(self.ingress_rate or self.egress_rate)

    def faults(self) -> dict[str, bool]:
        """Say of each fault that limits may have, in words, whether these have it.

        A rate without a burst and a burst of 4 GiB are what plugins:bandwidth refuses (validateRateAndBurst). A burst
        without a rate, which it refuses as well, limits nothing: some runtimes always send one.
        """
        found = {}
        for name, rate, burst in (
            ("ingress", self.ingress_rate, self.ingress_burst),
            ("egress", self.egress_rate, self.egress_burst),
        ):
            where = f"runtimeConfig.bandwidth.{name}"
            found[f"{where}Rate: {rate} bits per second are less than a byte (8)"] = 0 < rate < _BITS
            found[f"{where}Burst: if {name}Rate is set ({rate}), {name}Burst must also be set"] = bool(
                rate and not burst
            )
            found[f"{where}Burst: {burst} bits are more than the 4 GiB that can wait"] = burst // _BITS >= _U32_MAX
        return found


class RuntimeConfig(JsonObject):
    """What the runtime asks for this attachment. containerd writes keys like `HostPort`, the others like `hostPort`."""

    ips: Many[str] = ()
    mac: str = ""
    ip_ranges: Many[Many[dict[str, Any]]] = ()
    dns: RuntimeDns = RuntimeDns()
    port_mappings: Many[PortMapping] = ()
    bandwidth: Bandwidth = Bandwidth()


class NetArgs(JsonObject):
    """`args.cni`: what the user asks for this attachment."""

    ips: Many[str] = ()
    mac: str = ""
    labels: Any = None  # whatever it is: nothing is done with it


class Args(JsonObject):
    """`args`, of which only the part that CONVENTIONS.md describes means something here."""

    cni: NetArgs = NetArgs()


class GcAttachment(JsonObject):
    """One entry of the lists that GC gets."""

    container_id: str = Field(alias="containerID", min_length=1)
    ifname: str = Field(min_length=1)


_GcAttachments = Many[GcAttachment] | None


class NetConf(JsonObject):
    """The keys that podlane or one of the reference plugins reads. `mtu` is in bytes; 0: that of the uplink."""

    null_means: ClassVar[Mapping[str, object]] = {"cni.dev/valid-attachments": (), "cni.dev/attachments": ()}

    cni_version: Annotated[str, AfterValidator(lambda version: version or UNNAMED)] = UNNAMED
    name: str
    type: str = ""
    mtu: int = Field(0, ge=0, le=65535)
    ipam: dict[str, Any] | None = None
    prev_result: dict[str, Any] | None = None
    given_dns: GivenDns = Field(GivenDns(), alias="dns")
    args: Args = Args()
    runtime_config: RuntimeConfig = RuntimeConfig()
    is_default_gateway: bool = False
    ip_masq: bool | None = None
    ip_masq_backend: str = ""
    bridge: str = ""
    is_gateway: bool = False
    force_address: bool = False
    hairpin_mode: bool = False
    promisc_mode: bool = False
    vlan: int = 0
    vlan_trunk: Many[dict[str, Any]] = ()
    preserve_default_vlan: bool = True
    port_isolation: bool = False
    disable_container_interface: bool = False
    macspoofchk: bool = False
    enabledad: bool = False
    given_valid_attachments: _GcAttachments = Field(None, alias="cni.dev/valid-attachments")
    given_attachments: _GcAttachments = Field(None, alias="cni.dev/attachments")

    @property
    def ipam_type(self) -> str:
        """The plugin that gives the addresses; empty if the configuration names none.

        Raises CniError 7 if it is no string.
        """
        kind = lookup(self.ipam or {}, "type")
        if kind is not None and not isinstance(kind, str):
            raise CniError(Code.INVALID_NETWORK_CONFIG, "ipam.type: Input should be a valid string", repr(kind))
        return kind or ""

    @property
    def dns(self) -> Dns | None:
        """What replaces the DNS settings of IPAM: the runtime's, else the configuration's; None if neither has any."""
        runtime = self.runtime_config.dns
        return Dns(runtime.servers, "", runtime.searches, runtime.options) or self.given_dns.settings

    @property
    def masquerade(self) -> bool | None:
        """Whether pods of this network are masqueraded; None: as the agent's own setting says.

        Absent, `ipMasq` is false with bridge and ptp. Pods of the agent's own ranges go by the agent's setting.
        """
        return False if self.ip_masq is None and self.ipam else self.ip_masq

    @property
    def node_is_gateway(self) -> bool:
        """Whether the node has the address of the subnet's gateway: with bridge if asked for, with ptp always.

        Neither `bridge` nor `isGateway` is a key of ptp's.
        """
        asked = self.is_gateway or self.is_default_gateway
        return asked or not (self.bridge or "is_gateway" in self.model_fields_set)

    @property
    def valid_attachments(self) -> tuple[tuple[str, str], ...] | None:
        """Of GC: container id and interface of all attachments that are still valid; None if nobody told.

        libcni sends nothing if the runtime gave it nothing, CRI-O sends null if there are no pods. An attachment is
        valid if either of the two keys has it.
        """
        if self.given_valid_attachments is None and self.given_attachments is None:
            return None
        both = (*(self.given_valid_attachments or ()), *(self.given_attachments or ()))
        return tuple(dict.fromkeys((each.container_id, each.ifname) for each in both))

    @property
    def without_effect(self) -> dict[str, str]:
        """The keys that ask for something which cannot matter here, each with the reason why: for the log."""
        fields = type(self).model_fields
        asking = [name for name in _WITHOUT_EFFECT if getattr(self, name) != fields[name].default]
        found = {fields[name].alias or name: _WITHOUT_EFFECT[name] for name in asking}
        if self.args.cni.labels:
            found["args.cni.labels"] = "podlane has nothing that goes by labels"
        return found

    def check_served(self) -> None:
        """Refuse by name what would otherwise silently not happen.

        For ADD, and for STATUS, which speaks of ADD; DEL and CHECK come to what ADD has made. Raises CniError 7 for
        what the reference plugins refuse, too, and 2 for what podlane does not have.
        """
        self._check_values()
        refused = {
            "ipam.type": self.ipam_type if self.ipam_type == "dhcp" else "",
            "vlan": self.vlan,
            "vlanTrunk": self.vlan_trunk,
            "portIsolation": self.port_isolation,
            "disableContainerInterface": self.disable_container_interface,
        }
        for key, value in refused.items():
            if value:
                raise _unsupported(key, value, _WHY_REFUSED.get(key, "podlane does not have it"))

    def _check_values(self) -> None:
        """Refuse, in the words of plugins:bridge, what has no meaning anywhere."""
        for mapping in self.runtime_config.port_mappings:
            mapping.check()
        faults = {
            f"invalid VLAN ID {self.vlan} (must be between 0 and {_LAST_VLAN})": not 0 <= self.vlan <= _LAST_VLAN,
            f"unknown ipmasq backend {json.dumps(self.ip_masq_backend)}": self.ip_masq_backend
            not in _MASQUERADE_BACKENDS,
            f"mtu {self.mtu}: IPv4 needs {_IPV4_MIN_MTU} at least": 0 < self.mtu < _IPV4_MIN_MTU,
            "cannot set hairpin mode and promiscuous mode at the same time": self.hairpin_mode and self.promisc_mode,
            **self.runtime_config.bandwidth.faults(),
        }
        for message, wrong in faults.items():
            if wrong:
                raise CniError(Code.INVALID_NETWORK_CONFIG, message)
