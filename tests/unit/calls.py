"""Calls of the plugin for tests: the environment and stdin that a runtime gives, and arbitrary ones."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from hypothesis import strategies as st

VERSIONS = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]
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


text = st.binary(max_size=40).filter(lambda data: 0 not in data).map(os.fsdecode)  # as the wire decodes it
plausible = {
    "CNI_COMMAND": st.sampled_from(["ADD", "DEL", "STATUS", "CHECK", "GC", "VERSION", "add", ""]) | text,
    "CNI_CONTAINERID": st.sampled_from(["c1", "a/b", ""]) | text,
    "CNI_NETNS": st.sampled_from(["/run/netns/x", ""]) | text,
    "CNI_IFNAME": st.sampled_from(["eth0", "..", "sixteen-bytes-xx", ""]) | text,
    "CNI_PATH": st.sampled_from(["/opt/cni/bin", ""]) | text,
    "CNI_ARGS": text,
}
environments = st.fixed_dictionaries({}, optional=plausible)
"""Environments as the agent decodes them, right and wrong, with any bytes."""

_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_configs = st.fixed_dictionaries(
    {},
    optional={
        "cniVersion": st.sampled_from([*VERSIONS, "0.2.0", "9.9.9"]) | _values,
        "name": st.sampled_from(["podlane", "a b", ""]) | _values,
        "mtu": st.integers(-1, 70000) | _values,
        "ipam": st.just({"type": "host-local"}) | _values,
        "prevResult": st.just({}) | _values,
        "unknown": _values,
    },
)
stdins = st.binary(max_size=60) | (_configs | _values).map(lambda value: json.dumps(value).encode())
"""Bytes on stdin: rubbish, any JSON, and network configurations with right and wrong fields."""
