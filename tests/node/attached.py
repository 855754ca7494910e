"""What runs at the hooks of a device, in whichever way it is attached."""

from __future__ import annotations

import ctypes
import json
import socket

from agent.datapath import libbpf
from tests.node.machine import Machine

DIRECTIONS = {"ingress": libbpf.TCX_INGRESS, "egress": libbpf.TCX_EGRESS}


def programs(node: Machine, device: str) -> dict[str, int]:
    """Return how many programs run at the hooks of a device, in tcx links and filters together."""
    return {
        direction: links(node, device, hook) + len(filters(node, device, direction))
        for direction, hook in DIRECTIONS.items()
    }


def links(node: Machine, device: str, hook: int) -> int:
    """Return how many programs run at a hook by tcx links."""

    def query() -> int:
        ids, count = (ctypes.c_uint32 * 16)(), ctypes.c_uint32(16)
        index = socket.if_nametoindex(device)
        libbpf.checked(libbpf.library().bpf_prog_query(index, hook, 0, None, ids, ctypes.byref(count)), "query", device)
        return count.value

    found: int = node.netns.call(query)
    return found


def filters(node: Machine, device: str, direction: str) -> list[str]:
    """Return the names of the filters at a hook."""
    shown = json.loads(node.netns.run("tc", "-j", "filter", "show", "dev", device, direction).stdout or "[]")
    return [each["options"]["bpf_name"] for each in shown if "handle" in each.get("options", {})]


def wait_attached(node: Machine, device: str) -> None:
    """Wait until exactly one program runs at each hook of a device."""
    node.wait_for(lambda: programs(node, device) == {"ingress": 1, "egress": 1}, "one program at each hook")


def wait_settled(node: Machine) -> None:
    """Wait until no hook is left that an earlier agent attached the other way."""
    by_links = "links" if "hooks: tcx" in node.config.read_text() else "filters"
    node.wait_for(lambda: way(node, "uplink") == {by_links}, "one way to attach")


def way(node: Machine, device: str) -> set[str]:
    """Return in which ways podlane's programs are attached."""
    return {
        kind
        for direction, hook in DIRECTIONS.items()
        for kind, there in (
            ("links", links(node, device, hook)),
            ("filters", sum("podlane" in each for each in filters(node, device, direction))),
        )
        if there
    }
