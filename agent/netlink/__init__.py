"""What the agent asks of the kernel over netlink: veth pairs, uplinks, addresses, host routes, neighbours, clsact.

The only package that imports pyroute2. Every function acts in the network namespace of the calling thread,
opens its own socket (5 µs) and keeps nothing: any number of threads may call. Every refusal is a
`KernelError`.
"""

import agent.netlink.sparing  # noqa: F401  # before the others, which import pyroute2

# isort: split
from agent.netlink.addresses import GatewayTable
from agent.netlink.clsact import ClsactHooks
from agent.netlink.devices import (
    ALIAS_PREFIX,
    NAME_PREFIX,
    OWN_MAC,
    TUNNEL,
    default_devices,
    delete_device,
    devices,
    enable_forwarding,
    fallen_devices,
    forwarding_enabled,
    hops,
    index,
    own_devices,
    tunnel_index,
    uplink_mtu,
)
from agent.netlink.ends import pod_macs
from agent.netlink.monitor import Monitor
from agent.netlink.netns import is_netns, netns_cookie, own_netns_cookie, same_netns
from agent.netlink.paths import path_mtus
from agent.netlink.peers import PeerRouteTable, adopt_peer_routes
from agent.netlink.pods import (
    InterfaceExists,
    configure_pod,
    create_pair,
    forget_pod,
    introduce_node,
    raise_host,
)
from agent.netlink.shaping import QueueTable, create_shaper, foreign_queues, raise_shaper, shapers
from agent.netlink.sysctl import Change, reserve_ports
from agent.netlink.sysctl import restore as restore_sysctls
from agent.netlink.tables import NeighbourTable, RouteTable, SubnetTable
from agent.netlink.tunnel import TunnelDeviceTable
from agent.netlink.uplinks import node_addresses, uplinks

__all__ = [
    "ALIAS_PREFIX",
    "NAME_PREFIX",
    "OWN_MAC",
    "TUNNEL",
    "Change",
    "ClsactHooks",
    "GatewayTable",
    "InterfaceExists",
    "Monitor",
    "NeighbourTable",
    "PeerRouteTable",
    "QueueTable",
    "RouteTable",
    "SubnetTable",
    "TunnelDeviceTable",
    "adopt_peer_routes",
    "configure_pod",
    "create_pair",
    "create_shaper",
    "default_devices",
    "delete_device",
    "devices",
    "enable_forwarding",
    "fallen_devices",
    "foreign_queues",
    "forget_pod",
    "forwarding_enabled",
    "hops",
    "index",
    "introduce_node",
    "is_netns",
    "netns_cookie",
    "node_addresses",
    "own_devices",
    "own_netns_cookie",
    "path_mtus",
    "pod_macs",
    "raise_host",
    "raise_shaper",
    "reserve_ports",
    "restore_sysctls",
    "same_netns",
    "shapers",
    "tunnel_index",
    "uplink_mtu",
    "uplinks",
]
