"""What runs at the hooks of pods' devices, as the kernel shows it."""

from __future__ import annotations

import ctypes
import json
import socket

from agent.datapath import libbpf
from tests.node.machine import Machine, TestPod

DIRECTIONS = {"from_pod": "ingress", "to_pod": "egress"}
ATTACH_TYPES = {"from_pod": libbpf.TCX_INGRESS, "to_pod": libbpf.TCX_EGRESS}


def pinned(node: Machine) -> dict[str, int]:
    """Return the kernel's ids of the pinned maps and programs, by file name."""
    ids = {}
    for folder, info in (("maps", libbpf.map_info), ("programs", libbpf.program_info)):
        for path in sorted((node.bpffs / folder).iterdir()):
            descriptor = libbpf.open_pin(path)
            assert descriptor is not None
            with libbpf.closing(descriptor):
                ids[path.name] = info(descriptor, path.name).id
    return ids


def wanted(node: Machine) -> dict[str, list[int]]:
    """Return the id of the loaded program of each name, as the list that its hook should show."""
    loaded = {pin.partition(":")[0]: number for pin, number in pinned(node).items()}
    return {name: [loaded[name]] for name in DIRECTIONS}


def attached(node: Machine, pod: TestPod) -> dict[str, list[int]]:
    """Return the ids of the programs in all tcx links at the hooks of a pod, by the name of the one that should be."""

    def query(index: int, hook: int) -> list[int]:
        ids, count = (ctypes.c_uint32 * 16)(), ctypes.c_uint32(16)
        result = libbpf.library().bpf_prog_query(index, hook, 0, None, ids, ctypes.byref(count))
        libbpf.checked(result, "query", pod.device)
        return ids[: count.value]

    def query_all() -> dict[str, list[int]]:
        index = socket.if_nametoindex(pod.device)
        return {name: query(index, hook) for name, hook in ATTACH_TYPES.items()}

    found: dict[str, list[int]] = node.netns.call(query_all)
    return found


def filters(node: Machine, pod: TestPod) -> dict[str, list[int]]:
    """Return the ids of the programs in all filters at the hooks of a pod, by the name of the one that should be."""
    found = {}
    for name, direction in DIRECTIONS.items():
        shown = json.loads(node.netns.run("tc", "-j", "filter", "show", "dev", pod.device, direction).stdout or "[]")
        found[name] = [each["options"]["prog"]["id"] for each in shown if "handle" in each.get("options", {})]
    return found


def wait_settled(node: Machine, *pods: TestPod) -> None:
    """Wait until each hook runs the program of its name by a link, and nothing else."""
    right = wanted(node)
    none: dict[str, list[int]] = {name: [] for name in DIRECTIONS}
    for pod in pods:
        node.wait_for(
            lambda pod=pod: (attached(node, pod), filters(node, pod)) == (right, none),  # type: ignore[misc]
            f"the programs of {pod.container_id} to settle",
        )
