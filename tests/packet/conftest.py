"""What the packet tests share: the real datapath, compiled once, and a small one that tests can vary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from agent.datapath.cache import compiled
from agent.datapath.loader import Datapath, load
from agent.datapath.object import Object

from ..support import bpffs, datapath_object, private_network
from .harness import Rig, two_pods
from .tunnel import Tunnel, tunnel_at
from .world import Node, loaded_node

# A datapath in miniature. The map calls are in headers, where bcc alone would not rewrite them.
_MAPS_H = """\
#pragma once
struct addr { __be32 word[4]; };
struct endpoint {
    __u32 ifindex;
    __u8 mac[6];
    __u8 via_stack;
    __u8 native;
    __u32 network;
    __u32 shaper;
    __u16 queued;
    __u16 serves;
    EXTRA_MEMBER
};
struct counter { __u64 packets; __u64 bytes; };
struct outcomes { struct counter first; struct counter second; struct counter other; };
struct odd { __u8 small; __u64 large; __u16 end; };
struct prefix { __u32 length; struct addr addr; };
BPF_TABLE("hash", struct addr, struct endpoint, endpoints, 1);
BPF_TABLE("percpu_array", __u32, struct outcomes, outcomes, 1);
BPF_TABLE("percpu_hash", __u32, __u32, per_cpu, 8);
BPF_TABLE("hash", __u32, struct odd, odd, 4096);
BPF_F_TABLE("lpm_trie", struct prefix, __u32, routes, 16, BPF_F_NO_PREALLOC);
"""
_COUNT_H = """\
#pragma once
#include "maps.h"
static int count(struct __sk_buff *skb, __u64 outcome)
{
    __u32 zero = 0;
    struct outcomes *all = outcomes.lookup(&zero);

    if (all) {
        struct counter *counter = (void *)all + outcome;
        counter->packets++;
        counter->bytes += skb->len;
    }
    return TC_ACT_UNSPEC;
}
"""
_DATAPATH_C = """\
#include <linux/pkt_cls.h>
#include "count.h"
#include "maps.h"

int from_pod(struct __sk_buff *skb)
{
    struct addr nobody = {};

    /* The test's own packets only: an EtherType for local experiments (IEEE 802). */
    if (skb->protocol != bpf_htons(0x88b5) || endpoints.lookup(&nobody))
        return count(skb, __builtin_offsetof(struct outcomes, other));
    return count(skb, __builtin_offsetof(struct outcomes, COUNTS_AS));
}

int to_pod(struct __sk_buff *skb)
{
    return count(skb, __builtin_offsetof(struct outcomes, other));
}
"""


class Compile(Protocol):
    """Compiles the small datapath, with its macros overridden."""

    def __call__(self, **defines: str) -> Object:
        """Return the object."""


@pytest.fixture(scope="session")
def small_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the small datapath's source, and return its folder, which is not to be changed."""
    folder = tmp_path_factory.mktemp("small") / "bpf"
    folder.mkdir()
    (folder / "maps.h").write_text(_MAPS_H)
    (folder / "count.h").write_text(_COUNT_H)
    (folder / "datapath.c").write_text(_DATAPATH_C)
    return folder


@pytest.fixture(scope="session")
def compile_small(small_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compile the small datapath: COUNTS_AS is the counter of from_pod, EXTRA_MEMBER is added to an endpoint."""
    cache = tmp_path_factory.mktemp("cache")

    def compile_small(**defines: str) -> Object:
        macros: Mapping[str, str] = {"COUNTS_AS": "first", "EXTRA_MEMBER": "", **defines}
        return compiled(small_source, cache, defines=macros)

    return compile_small


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Path]:
    """Provide a pin directory on a bpf filesystem of the test's own."""
    with bpffs(tmp_path / "bpffs") as mounted:
        yield mounted / "podlane"


@pytest.fixture
def network() -> Iterator[None]:
    """Run the test in a network namespace of its own."""
    with private_network():
        yield


@pytest.fixture(scope="session", name="datapath_object")
def real_datapath_object() -> Object:
    """Compile the real datapath, unless another test has."""
    return datapath_object()


@pytest.fixture
def datapath(datapath_object: Object, pins: Path) -> Iterator[Datapath]:
    """Load the real datapath, afresh for each test: its maps are empty."""
    with load(datapath_object, pins, {"endpoints": 64}) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def rig(datapath_object: Object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Load the real datapath for two pods with real devices, once for all tests of a module."""
    with bpffs(tmp_path_factory.mktemp("rig") / "bpffs") as mounted, two_pods() as pods, private_network():
        pins = mounted / "podlane"
        with load(datapath_object, pins, {"endpoints": 64}) as loaded:
            yield Rig(loaded, pins, pods)


@pytest.fixture(scope="module")
def shared_node(datapath_object: Object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Load the real datapath for a node with an uplink, once for all tests of a module."""
    with loaded_node(datapath_object, tmp_path_factory.mktemp("node"), {}) as node:
        yield node


@pytest.fixture
def node(shared_node: Node) -> Node:
    """Provide the node, without any flow."""
    shared_node.reset()
    return shared_node


@pytest.fixture(scope="module")
def shared_tunnel(shared_node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tunnel]:
    """Let the node's uplink play the device of a tunnel."""
    with tunnel_at(shared_node, tmp_path_factory.mktemp("tunnel")) as made:
        yield made


@pytest.fixture
def tunnel(node: Node, shared_tunnel: Tunnel) -> Tunnel:
    """Provide the tunnel of a node without flows or peers."""
    assert node is shared_tunnel.node
    return shared_tunnel
