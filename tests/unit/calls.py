"""Calls of the plugin for tests: the environment and stdin that a runtime gives, and arbitrary ones."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import pytest
from hypothesis import strategies as st

from cni.call import parse
from cni.errors import CniError

VERSIONS = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]
ENVIRONMENT = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "c0ffee",
    "CNI_NETNS": "/run/netns/x",
    "CNI_IFNAME": "eth0",
    "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAME=web",
    "CNI_PATH": "/opt/cni/bin",
    "PATH": "/usr/bin",
}


def environment(command: str = "ADD", **changes: str | None) -> dict[str, str]:
    """Return what a runtime sets; None leaves a variable out."""
    merged: Mapping[str, str | None] = {**ENVIRONMENT, "CNI_COMMAND": command, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def config(**changes: object) -> bytes:
    """Return a network configuration; None leaves a key out."""
    merged = {"cniVersion": "1.1.0", "name": "podlane", "type": "podlane", **changes}
    return json.dumps({key: value for key, value in merged.items() if value is not None}).encode()


def refusal(env: dict[str, str], stdin: bytes) -> CniError:
    """Return the error that a call is refused with."""
    with pytest.raises(CniError) as caught:
        parse(env, stdin)
    return caught.value


text = st.binary(max_size=40).filter(lambda data: 0 not in data).map(os.fsdecode)  # as the wire decodes it
plausible = {
    "CNI_COMMAND": st.sampled_from(["ADD", "CHECK", "DEL", "GC", "STATUS", "VERSION", "add", ""]) | text,
    "CNI_CONTAINERID": st.sampled_from(["c1", "a/b", ""]) | text,
    "CNI_NETNS": st.sampled_from(["/run/netns/x", ""]) | text,
    "CNI_IFNAME": st.sampled_from(["eth0", "..", "sixteen-bytes-xx", ""]) | text,
    "CNI_PATH": st.sampled_from(["/opt/cni/bin", "/a::/b", ""]) | text,
    "CNI_ARGS": st.sampled_from(["", "IP=10.0.0.1,fd00::1;MAC=02:00:00:00:00:01", "A=b", "IgnoreUnknown=1;A=b"]) | text,
    "CNI_NETNS_OVERRIDE": st.sampled_from(["1", "TRUE", ""]) | text,
}
_commands = st.sampled_from(["ADD", "CHECK", "DEL", "GC", "STATUS"])
environments = st.fixed_dictionaries({}, optional=plausible) | _commands.map(environment)
"""Environments as the agent decodes them, right and wrong, with any bytes."""

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
"""Any JSON value, and beside them Python's NaN and Infinity."""
_mac = st.sampled_from(["02:00:00:00:00:01", "", "x"])
_ips = st.sampled_from([[], ["10.0.0.1", "fd00::1/64"], ["x"]])
_attachments = st.lists(st.just({"containerID": "c1", "ifname": "eth0"}), max_size=2) | st.none()
_right = {
    "type": st.just("podlane"),
    "mtu": st.integers(0, 65535),
    "ipam": st.just({"type": "host-local"}) | st.none(),
    "prevResult": st.just({}),
    "dns": st.just({"nameservers": ["10.0.0.53"]}),
    "ipMasq": st.booleans(),
    "args": st.fixed_dictionaries({}, optional={"cni": st.fixed_dictionaries({}, optional={"ips": _ips, "mac": _mac})}),
    "runtimeConfig": st.fixed_dictionaries({}, optional={"ips": _ips, "mac": _mac, "dns": st.just({"Servers": ["a"]})}),
    "cni.dev/valid-attachments": _attachments,
    "cni.dev/attachments": _attachments,
    "unknown": anything,
}
_sound = st.fixed_dictionaries(
    {"name": st.just("podlane"), "cniVersion": st.sampled_from([*VERSIONS, "1.1.0", "9.9.9"])}, optional=_right
)
_wrong = st.builds(
    lambda sound, wrong: {**sound, **wrong}, _sound, st.dictionaries(st.sampled_from([*_right, "name"]), anything)
)
stdins = (
    _sound.map(json.dumps).map(str.encode)
    | (_wrong | anything).map(json.dumps).map(str.encode)
    | st.binary(max_size=60)
)
"""Bytes on stdin: rubbish, any JSON, and network configurations with right and wrong fields."""
