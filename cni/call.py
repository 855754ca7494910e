"""One call of the plugin, validated: the environment variables and the network configuration.

The rules are those of the reference implementation (cni:pkg/skel/skel.go), so that a runtime sees the errors it knows.
Of several faults the first is told, in this order: values of variables and what is missing of them (code 4), JSON (6),
the network's name (7), the command (4), the version (1, 6), and then what podlane itself reads: CNI_ARGS (4) and the
other keys of the configuration (7), except for DEL.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from cni.document import decode, explain, lookup
from cni.errors import CniError, Code
from cni.netconf import NetConf
from cni.versions import LATEST, SINCE, UNNAMED, VERSIONS, at_least

_CONTAINER = {"CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"}
_REQUIRED = {
    "ADD": _CONTAINER | {"CNI_NETNS"},
    "CHECK": _CONTAINER | {"CNI_NETNS"},
    "DEL": _CONTAINER,
    "GC": {"CNI_PATH"},
    "STATUS": {"CNI_PATH"},
}
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
_IFNAME_MAX_BYTES = 15  # IFNAMSIZ less its NUL
_KNOWN_ARGS = {
    "IP",
    "MAC",
    "K8S_POD_NAMESPACE",
    "K8S_POD_NAME",
    "K8S_POD_INFRA_CONTAINER_ID",
    "K8S_POD_UID",
    "IgnoreUnknown",
}
_POD_NAME_MAX = 253  # characters, of a Kubernetes object's name (RFC 1123 subdomain)
_MAC = re.compile(r"([0-9a-f]{2}[:-]){5}[0-9a-f]{2}|([0-9a-f]{4}\.){2}[0-9a-f]{4}")


@dataclass(frozen=True, slots=True)
class Attachment:
    """What names one interface of one container on one network; the key of everything podlane knows of a pod."""

    network: str
    container_id: str
    ifname: str

    def __str__(self) -> str:
        return f"{self.network}/{self.container_id}/{self.ifname}"


@dataclass(frozen=True, slots=True)
class Call:
    """A valid call. `container_id` and `ifname` are empty where the command has none, so is an absent `netns_path`.

    `arguments` are those of CNI_ARGS, printable; `path` the directories of CNI_PATH. With `netns_override` the pod may
    have the plugin's own network namespace (CNI_NETNS_OVERRIDE).
    """

    command: str
    container_id: str
    ifname: str
    netns_path: str
    config: NetConf
    arguments: Mapping[str, str] = field(default_factory=dict)
    path: tuple[str, ...] = ()
    netns_override: bool = False

    @property
    def attachment(self) -> Attachment:
        """The attachment that ADD, CHECK and DEL speak of."""
        return Attachment(self.config.name, self.container_id, self.ifname)

    @property
    def pod(self) -> tuple[str, str]:
        """Namespace and name of the Kubernetes pod; empty where the runtime did not tell."""
        namespace, name = (self.arguments.get(f"K8S_POD_{key}", "") for key in ("NAMESPACE", "NAME"))
        return namespace[:_POD_NAME_MAX], name[:_POD_NAME_MAX]

    @property
    def requested_mac(self) -> str:
        """The MAC address that is asked for, as 02:00:…; empty if none. The runtime's word counts most."""
        digits = re.sub("[:.-]", "", self._wanted_mac.lower())
        return ":".join(digits[i : i + 2] for i in range(0, len(digits), 2))

    @property
    def requested_ips(self) -> tuple[str, ...]:
        """The addresses that are asked for, as they are written (with or without a prefix length).

        Of each family, those of the strongest source that names one: runtimeConfig.ips, args.cni.ips, CNI_ARGS IP.
        """
        sources = (
            [each.strip() for each in self.arguments.get("IP", "").split(",")],
            self.config.args.cni.ips,
            self.config.runtime_config.ips,
        )
        chosen: dict[bool, list[str]] = {}
        for source in sources:
            for is_ipv6 in (False, True):
                of_family = [each for each in source if each and (":" in each) == is_ipv6]
                chosen[is_ipv6] = of_family or chosen.get(is_ipv6, [])
        return tuple(dict.fromkeys(chosen[False] + chosen[True]))

    @property
    def _wanted_mac(self) -> str:
        config = self.config
        return config.runtime_config.mac or config.args.cni.mac or self.arguments.get("MAC", "")


def parse(environment: Mapping[str, str], stdin: bytes) -> Call:
    """Validate a call.

    Raises CniError: code 4 for the environment, 6 for stdin that is not a JSON object or has no readable version, 7 for
    a configuration with a bad field, 1 for a version that podlane, or the command, does not have.
    """
    command = environment.get("CNI_COMMAND", "")
    _check_environment(command, environment)
    document = _decode(stdin)
    _check_name(document)
    if command not in _REQUIRED:
        raise CniError(
            Code.INVALID_ENVIRONMENT, f"unknown CNI_COMMAND: {command}", f"podlane has {', '.join(_REQUIRED)}, VERSION"
        )
    _check_version(command, _version(document))
    call = Call(
        command=command,
        container_id=environment.get("CNI_CONTAINERID", ""),
        ifname=environment.get("CNI_IFNAME", ""),
        netns_path=environment.get("CNI_NETNS", ""),
        arguments=_arguments(command, environment.get("CNI_ARGS", "")),
        path=tuple(each for each in environment.get("CNI_PATH", "").split(":") if each),
        netns_override=environment.get("CNI_NETNS_OVERRIDE", "").lower() in ("1", "true"),
        config=_parse_config(command, document),
    )
    if command == "ADD":
        _check_mac(call)
    return call


def answer_version(stdin: bytes) -> str:
    """Return the version in which to answer whoever sent this configuration, however bad it is."""
    try:
        version = _version(decode(stdin))
    except (ValueError, CniError):
        return LATEST
    return version if version in VERSIONS else LATEST


def _check_environment(command: str, environment: Mapping[str, str]) -> None:
    required = _REQUIRED.get(command, set())
    checks: dict[str, Callable[[str], None] | None] = {
        "CNI_COMMAND": None,
        "CNI_CONTAINERID": _check_container_id,
        "CNI_NETNS": _check_netns,
        "CNI_IFNAME": _check_ifname,
        "CNI_PATH": None,
    }
    missing = []
    for name, check in checks.items():
        value = environment.get(name, "")
        if not value and (name in required or name == "CNI_COMMAND"):
            missing.append(name)
        elif value and name in required and check:
            check(value)
    if missing:
        raise CniError(Code.INVALID_ENVIRONMENT, f"required env variables [{','.join(missing)}] missing")


def _check_container_id(container_id: str) -> None:
    if not _NAME.fullmatch(container_id):
        raise CniError(Code.INVALID_ENVIRONMENT, "invalid characters in containerID", container_id)


def _check_netns(path: str) -> None:
    """Refuse a path that is not UTF-8: the result repeats it, and JSON is UTF-8 (RFC 8259 section 8.1)."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise CniError(Code.INVALID_ENVIRONMENT, "CNI_NETNS is not UTF-8", repr(path)) from error


def _check_ifname(name: str) -> None:
    """Refuse what the kernel would refuse (net/core/dev.c, dev_valid_name)."""
    size = len(name.encode(errors="surrogateescape"))
    if size > _IFNAME_MAX_BYTES:
        raise CniError(
            Code.INVALID_ENVIRONMENT,
            "interface name is too long",
            f"{name}: {size} bytes, at most {_IFNAME_MAX_BYTES} are allowed",
        )
    if name in (".", ".."):
        raise CniError(Code.INVALID_ENVIRONMENT, "interface name is . or ..", name)
    if re.search(r"[/:\s]", name):
        raise CniError(Code.INVALID_ENVIRONMENT, "interface name contains / or : or whitespace characters", name)
    if not name.isprintable():  # neither control characters nor bytes that are not UTF-8
        raise CniError(Code.INVALID_ENVIRONMENT, "interface name has characters that cannot be printed", repr(name))


def _decode(stdin: bytes) -> dict[str, Any]:
    try:
        return decode(stdin)
    except ValueError as error:
        raise CniError(Code.DECODING_FAILURE, "the network configuration is not a JSON object", str(error)) from error


def _check_name(document: Mapping[str, Any]) -> None:
    name = _text_of(document, "name")
    if not name:
        raise CniError(Code.INVALID_NETWORK_CONFIG, "missing network name")
    if not _NAME.fullmatch(name):
        raise CniError(Code.INVALID_NETWORK_CONFIG, "invalid characters found in network name", name)


def _version(document: Mapping[str, Any]) -> str:
    return _text_of(document, "cniVersion") or UNNAMED


def _text_of(document: Mapping[str, Any], key: str) -> str:
    value = lookup(document, key)
    if value is not None and not isinstance(value, str):
        raise CniError(Code.DECODING_FAILURE, f"the network configuration's {key} is not a string", repr(value)[:100])
    return value or ""


def _check_version(command: str, version: str) -> None:
    since = SINCE[command]
    if since != UNNAMED and not _at_least(version, since):
        raise CniError(Code.INCOMPATIBLE_VERSION, f"config version does not allow {command}", f"{version} < {since}")
    if version not in VERSIONS:
        supported = " ".join(f'"{each}"' for each in VERSIONS)  # as Go prints a list
        raise CniError(
            Code.INCOMPATIBLE_VERSION,
            "incompatible CNI versions",
            f'config is "{version}", plugin supports [{supported}]',
        )


def _at_least(version: str, since: str) -> bool:
    try:
        return at_least(version, since)
    except ValueError as error:
        raise CniError(Code.DECODING_FAILURE, f"failed to parse version: {error}") from error


def _arguments(command: str, text: str) -> dict[str, str]:
    """Read CNI_ARGS, as cni:pkg/types/args.go does; of a key that comes twice the last counts.

    GC and STATUS have none. DEL takes away what there is, whatever they say.
    """
    if command not in ("ADD", "CHECK", "DEL") or not text:
        return {}
    try:
        return _pairs(_printable(text))
    except CniError:
        if command == "DEL":
            return {}
        raise


def _pairs(text: str) -> dict[str, str]:
    arguments, unknown = {}, []
    for pair in text.split(";"):
        key, equals, value = pair.partition("=")
        if not equals or "=" in value:
            raise CniError(Code.INVALID_ENVIRONMENT, f'CNI_ARGS: invalid pair "{pair}"', "allowed is KEY=VALUE;…")
        arguments[key] = value
        if key not in _KNOWN_ARGS:
            unknown.append(pair)
    if unknown and not _boolean(arguments.get("IgnoreUnknown", "0")):
        named = " ".join(f'"{pair}"' for pair in unknown)  # as Go prints a list
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_ARGS: unknown args [{named}]", "IgnoreUnknown=1 allows them")
    return arguments


def _boolean(text: str) -> bool:
    if text.lower() not in ("0", "1", "false", "true"):
        raise CniError(Code.INVALID_ENVIRONMENT, f'CNI_ARGS: error parsing value of pair "IgnoreUnknown={text}"')
    return text.lower() in ("1", "true")


def _printable(text: str) -> str:
    """Return the text with U+FFFD for control characters and what is not UTF-8: it goes into logs and the store."""
    return "".join(each if each.isprintable() else "\ufffd" for each in text)


def _parse_config(command: str, document: dict[str, Any]) -> NetConf:
    """Read the configuration; of DEL the name only, since no fault in the rest may keep a pod from ending."""
    if command == "DEL":
        document = {"name": _text_of(document, "name"), "cniVersion": _version(document)}
    try:
        return NetConf.model_validate(document)
    except ValidationError as error:
        raise CniError(Code.INVALID_NETWORK_CONFIG, "invalid network configuration", explain(error)) from error


def _check_mac(call: Call) -> None:
    """Refuse what the kernel would refuse (net/core/dev.c, is_valid_ether_addr), and what is no MAC address at all."""
    mac = call._wanted_mac.lower()  # the text as it was given
    if not mac:
        return
    if not _MAC.fullmatch(mac):
        raise CniError(Code.INVALID_NETWORK_CONFIG, "the requested MAC address is none", f"{mac[:100]}")
    first = int(mac[:2], 16)
    if first & 1 or not mac.strip("0:.-"):
        raise CniError(Code.INVALID_NETWORK_CONFIG, "the requested MAC address is a group address, or zero", mac)
