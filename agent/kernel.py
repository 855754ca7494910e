"""The kernel's tables, as the loop writes to them: which object is kept where, and by which means."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Literal, get_args

from agent import netlink
from agent.datapath import entries, tables
from agent.datapath.loader import Datapath
from agent.datapath.sockets import SocketHooks
from agent.hooks import StagedHooks
from agent.state import Address, OtherProtocols
from agent.tables import Tables
from agent.wiring import HOST_MAC

log = logging.getLogger(__name__)

_OUTWARD = ("from_uplink", "to_uplink", "from_tunnel", "to_tunnel")


def open_tables(
    datapath: Datapath,
    hooks: StagedHooks,
    bpffs: Path,
    node_cgroup: Path | None,
    former: Collection[Address],
) -> Tables:
    """Return all tables of the loop; those in maps are of that datapath. `former`: see `EndpointTable`.

    Raises KernelError.
    """
    netlink.adopt_peer_routes()
    maps, constants = datapath.maps, datapath.constants
    lanes = {name: constants[f"PREFIX_{name.upper()}"] for name in ("native", "stack", "node")}
    other_protocols = {name: constants[f"OTHER_{name.upper()}"] for name in get_args(OtherProtocols)}
    return Tables(
        tunnel_devices=netlink.TunnelDeviceTable(HOST_MAC),
        queues=netlink.QueueTable(),
        endpoints=entries.EndpointTable(maps["endpoints"], former),
        settings=entries.SettingsTable(maps["settings"], other_protocols=other_protocols),
        prefixes=entries.PrefixTable(maps["prefixes"], **lanes),
        node_addresses=entries.AddressTable(maps["node_addresses"]),
        host_ports=entries.HostPortTable(maps["host_ports"]),
        hooks=hooks,
        sockets=SocketHooks(datapath, bpffs, node_cgroup),
        uplinks=entries.UplinkTable(maps["uplinks"]),
        tunnels=entries.TunnelTable(maps["tunnels"]),
        neighbours=netlink.NeighbourTable(),
        gateways=netlink.GatewayTable(),
        routes=netlink.RouteTable(),
        peer_routes=netlink.PeerRouteTable(),
        subnets=netlink.SubnetTable(),
    )


def staged_hooks(kind: Literal["auto", "tcx", "clsact"], datapath: Datapath, bpffs: Path) -> StagedHooks:
    """Return the way to attach that datapath's programs. See `agent.hooks` for why new ones begin as filters."""
    has_tcx = tables.tcx_supported() if kind == "auto" else kind == "tcx"
    log.info("attaching by hooks=%s", "tcx" if has_tcx else "clsact")
    tcx = tables.TcxHooks(datapath, bpffs)
    clsact = netlink.ClsactHooks(datapath.programs, datapath.program_ids)
    if not has_tcx:
        return StagedHooks(first=clsact, final=clsact, other=tcx)
    first = tcx if kind == "tcx" else clsact
    return StagedHooks(first=first, final=tcx, other=clsact, patient=_OUTWARD)
