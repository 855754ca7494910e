"""One call of the plugin, validated: the environment variables and the network configuration.

The rules are those of the reference implementation (containernetworking/cni, pkg/skel), so that a runtime sees the
errors it knows. Of several faults the first is told, in this order: environment (code 4), JSON (6), network
configuration (7), version (1).
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from cni.errors import CniError, Code

VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
LATEST = VERSIONS[-1]

# Per command: the variables it needs, and the oldest version that has it (specification 1.1.0, section 2).
_ATTACHMENT = ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH")
_COMMANDS = {
    "ADD": (_ATTACHMENT, "0.3.0"),
    "DEL": (("CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"), "0.3.0"),
    "STATUS": (("CNI_PATH",), "1.1.0"),
}
_NAME = r"^[a-zA-Z0-9][a-zA-Z0-9_.\-]*$"
_IFNAME_MAX_BYTES = 15  # IFNAMSIZ less its NUL
_abbreviated = reprlib.Repr()  # what was given may be megabytes, nested a thousand times
_abbreviated.maxstring = 200


@dataclass(frozen=True, slots=True)
class Attachment:
    """What names one interface of one container on one network; the key of everything podlane knows of a pod."""

    network: str
    container_id: str
    ifname: str

    def __str__(self) -> str:
        return f"{self.network}/{self.container_id}/{self.ifname}"


class NetConf(BaseModel):
    """The keys of a network configuration that podlane reads; unknown ones are ignored, as the specification asks."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    cni_version: str = Field("0.1.0", alias="cniVersion")  # absent means the first version
    name: Annotated[str, StringConstraints(pattern=_NAME)]
    mtu: int = Field(0, ge=0, le=65535)  # bytes; 0: that of the uplink
    ipam: dict[str, Any] | None = None
    prev_result: dict[str, Any] | None = Field(None, alias="prevResult")


@dataclass(frozen=True, slots=True)
class Call:
    """A valid call. `container_id` and `ifname` are empty where the command has none, so is an absent `netns_path`."""

    command: str
    container_id: str
    ifname: str
    netns_path: str
    config: NetConf

    @property
    def attachment(self) -> Attachment:
        """The attachment that ADD and DEL speak of."""
        return Attachment(self.config.name, self.container_id, self.ifname)


def parse(environment: Mapping[str, str], stdin: bytes) -> Call:
    """Validate a call.

    Raises CniError: code 4 for the environment, 6 for stdin that is not a JSON object, 7 for a configuration with a
    bad field, 1 for a version that podlane, or the command, does not have.
    """
    command = environment.get("CNI_COMMAND", "")
    _check_environment(command, environment)
    config = _parse_config(stdin)
    _check_version(command, config.cni_version)
    return Call(
        command=command,
        container_id=environment.get("CNI_CONTAINERID", ""),
        ifname=environment.get("CNI_IFNAME", ""),
        netns_path=environment.get("CNI_NETNS", ""),
        config=config,
    )


def _check_environment(command: str, environment: Mapping[str, str]) -> None:
    if command not in _COMMANDS:
        raise CniError(
            Code.INVALID_ENVIRONMENT, f"unknown CNI_COMMAND: {command}", f"podlane has {', '.join(_COMMANDS)}, VERSION"
        )
    required, _ = _COMMANDS[command]
    missing = [name for name in required if not environment.get(name)]
    if missing:
        raise CniError(Code.INVALID_ENVIRONMENT, f"required env variables [{','.join(missing)}] missing")
    if "CNI_CONTAINERID" in required and not re.fullmatch(_NAME, environment["CNI_CONTAINERID"]):
        raise CniError(Code.INVALID_ENVIRONMENT, "invalid characters in containerID", environment["CNI_CONTAINERID"])
    if "CNI_IFNAME" in required:
        _check_ifname(environment["CNI_IFNAME"])


def _check_ifname(name: str) -> None:
    """Refuse what the kernel would refuse (net/core/dev.c, dev_valid_name)."""
    size = len(name.encode(errors="surrogateescape"))
    if size > _IFNAME_MAX_BYTES:
        raise CniError(
            Code.INVALID_ENVIRONMENT,
            f"interface name is {size} bytes long, at most {_IFNAME_MAX_BYTES} are allowed",
            name,
        )
    if name in (".", "..") or re.search(r"[/:\s]", name):
        raise CniError(
            Code.INVALID_ENVIRONMENT, "interface name may not be . or .., nor contain / or : or white space", name
        )
    if not name.isprintable():  # neither control characters nor bytes that are not UTF-8
        raise CniError(Code.INVALID_ENVIRONMENT, "interface name has characters that cannot be printed", repr(name))


def _parse_config(stdin: bytes) -> NetConf:
    try:
        raw = json.loads(stdin)
    except (ValueError, RecursionError) as error:
        raise CniError(Code.DECODING_FAILURE, "the network configuration is not JSON", str(error)) from error
    if not isinstance(raw, dict):
        raise CniError(Code.DECODING_FAILURE, f"the network configuration is a {type(raw).__name__}, not an object")
    try:
        return NetConf.model_validate(raw)
    except ValidationError as error:
        raise CniError(Code.INVALID_NETWORK_CONFIG, "invalid network configuration", explain(error)) from error


def explain(error: ValidationError) -> str:
    """Say of each field at fault: where it is, what was given, what is allowed."""
    return "; ".join(
        f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}"
        f" (given: {_abbreviated.repr(fault['input'])})"
        for fault in error.errors()
    )


def _check_version(command: str, version: str) -> None:
    if version not in VERSIONS:
        raise CniError(
            Code.INCOMPATIBLE_VERSION,
            "incompatible CNI versions",
            f'config is "{version}", plugin supports {json.dumps(VERSIONS)}',
        )
    _, since = _COMMANDS[command]
    if VERSIONS.index(version) < VERSIONS.index(since):
        raise CniError(Code.INCOMPATIBLE_VERSION, f"config version does not allow {command}", f"{version} < {since}")
