"""Single packets at the tunnel: as if a node far away had wrapped them, for BPF_PROG_TEST_RUN has no tunnels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from pathlib import Path

from scapy.all import Packet

from agent.datapath.cache import compiled
from agent.datapath.entries import PrefixTable, TunnelTable
from agent.datapath.loader import Datapath, load
from agent.datapath.testrun import SkBuff
from agent.state import Address, Lanes, Network, Prefix, TunnelEnd
from agent.wiring import HOST_MAC

from .harness import Ran
from .world import FAST, NATIVE, NODE_OWN, STACK, Node

VNI, MTU = 112, 1450

PEERS: dict[int, tuple[Address, Address]] = {
    4: (ip_address("198.51.100.2"), ip_address("198.51.100.3")),
    6: (ip_address("2001:db8:2::2"), ip_address("2001:db8:2::3")),
}
"""Two other nodes, by the family of the underlay."""

_SOURCE = """\
#include <linux/pkt_cls.h>

struct tunnel_key {
    __u32 vni;
    __u32 remote[4];
    __u8 tos;
    __u8 ttl;
    __u16 flags;
    __u32 label;
    __u32 local[4];
};
struct wrapping {
    struct tunnel_key key;
    __u64 flags;
};
BPF_TABLE("array", __u32, struct wrapping, wrappings, 1);
BPF_TABLE("prog", __u32, __u32, unwrapping, 1);

static int (*set_tunnel_key)(struct __sk_buff *skb, struct tunnel_key *key, __u32 size,
                             __u64 flags) = (void *)BPF_FUNC_skb_set_tunnel_key;

/* Whom set_tunnel_key is told to pass for is whom get_tunnel_key names as the sender. */
int unwrapped(struct __sk_buff *skb)
{
    __u32 zero = 0;
    struct wrapping *wrapping = wrappings.lookup(&zero);

    if (!wrapping || set_tunnel_key(skb, &wrapping->key, sizeof(wrapping->key), wrapping->flags))
        return TC_ACT_SHOT;
    unwrapping.call(skb, 0);
    return TC_ACT_SHOT;
}
"""
_BY_IPV6 = 1  # BPF_F_TUNINFO_IPV6


@dataclass(frozen=True)
class Tunnel:
    """A node whose uplink plays the tunnel's device; the two peers have a pod CIDR of each family, and themselves."""

    node: Node
    helper: Datapath

    def peers(self, underlay: int, *, mtu: int = 0) -> None:
        """Tell the node of its two peers, which are reached over IPv4 or IPv6."""
        table = PrefixTable(self.node.datapath.maps["prefixes"], native=NATIVE, stack=STACK, node=NODE_OWN)
        for number, peer in enumerate(PEERS[underlay], start=2):
            lanes = Lanes(native=True, peer=peer, tunnel=self.node.uplink, mtu=mtu)
            own = Prefix.of_address(peer)
            pods = dict.fromkeys(map(Prefix.of, pod_cidrs(number)), lanes)
            assert table.upsert({**pods, own: replace(lanes, node=True)}) == {}
        end = TunnelEnd(VNI, MTU, HOST_MAC)
        assert TunnelTable(self.node.datapath.maps["tunnels"]).upsert({self.node.uplink: end}) == {}

    def into(self, packet: Packet | bytes, sender: Address | str, *, vni: int = VNI) -> Ran:
        """Run from_tunnel on what a node has wrapped."""
        who = ip_address(str(sender))
        packed = who.packed if who.version == 6 else int(who).to_bytes(4, "little")
        key = {"vni": vni, "remote": bytes(16), "local": packed.ljust(16, b"\0")}
        self.helper.maps["wrappings"].update(0, {"key": key, "flags": _BY_IPV6 if who.version == 6 else 0})
        context = SkBuff(ifindex=self.node.uplink)
        return self.node.run_program(context, packet, program=self.helper.programs["unwrapped"])

    def unwrapped_by_nobody(self, packet: Packet | bytes) -> Ran:
        """Run from_tunnel on what does not come out of a tunnel."""
        return self.node.run_in(SkBuff(ifindex=self.node.uplink), packet, program="from_tunnel")

    def out(self, packet: Packet | bytes, *, fast: bool = True) -> Ran:
        """Run to_tunnel on what goes there: past the host stack, or through it."""
        return self.node.run_in(SkBuff(ifindex=self.node.uplink, mark=FAST if fast else 0), packet, program="to_tunnel")


def pod_cidrs(number: int) -> list[Network]:
    """Return the prefixes of a peer's pods, of both families."""
    return [ip_network(f"10.1.{number}.0/24"), ip_network(f"fd00:{number}::/64")]


def pod_of(number: int, family: int) -> str:
    """Return the address of a pod on a peer."""
    return f"10.1.{number}.7" if family == 4 else f"fd00:{number}::7"


@contextmanager
def tunnel_at(node: Node, folder: Path) -> Iterator[Tunnel]:
    """Give a node a tunnel. `folder` takes the helper's source; its pins are beside those of the node."""
    source = folder / "bpf"
    source.mkdir()
    (source / "datapath.c").write_text(_SOURCE)
    with load(compiled(source, folder / "cache", defines={}), node.pins.parent / "tunnel", {}) as helper:
        helper.maps["unwrapping"].update(0, node.datapath.programs["from_tunnel"])
        yield Tunnel(node, helper)
