"""The agent from start to stop: every long-lived object is built here, each after those that it relies on."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import get_args

from agent import masquerade, netlink, supply
from agent.collector import Collector
from agent.config import Config, Paths
from agent.datapath import cache, entries, loader, requirements, tables
from agent.datapath.source import CompileError
from agent.following import Following, tell_failure
from agent.gc import SelfGc
from agent.hooks import StagedHooks
from agent.install import InstallError, install_conflist, install_launcher
from agent.journal import Journal
from agent.listed import ListedNodes
from agent.loop import Loop, Tables
from agent.membership import Membership
from agent.metrics import Metrics, serve
from agent.node import Node, Readiness
from agent.plan import Outside
from agent.pods import shaper_of
from agent.selftest import ScratchPod, SelfTestFailed
from agent.server import Server, observed
from agent.spool import Spool
from agent.state import KernelError, OtherProtocols
from agent.store import Phase, Store, StoreError
from agent.surroundings import Surroundings
from agent.wiring import HOST_MAC, Wiring
from cni.commands import handle
from cni.errors import CniError

log = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_FIRST_PASS_SECONDS = 60.0
_UNREADY_SECONDS = 1.0
_REFUSALS = ("drop_masq_exhausted", "drop_masq_full")
_AT_UPLINKS = ("from_uplink", "to_uplink", "from_tunnel", "to_tunnel")
_LOCK = "agent.lock"  # within the state directory
_ENDPOINTS_PER_POD = 3  # an IPv4, an IPv6 and a link-local address; one more is the self-test's


class StartError(Exception):
    """The agent cannot start; the message says what is wrong and, where it can, what to do."""


def run(config: Config, version: str, stop: threading.Event, config_path: Path | None = None) -> None:
    """Run an agent until `stop` is set. Pods and what carries their packets stay as they are.

    The file that the configuration comes from, if any, is read again for its list of nodes. Raises ConfigError, before
    anything is touched, and StartError.
    """
    surroundings = Surroundings(config, HOST_MAC)
    metrics, readiness = Metrics(version), Readiness()
    metrics.watch_readiness(readiness)
    with ExitStack() as cleanup:
        try:
            lock_state(config.paths.state, cleanup)
            _serve_metrics(config.metrics, metrics, readiness, cleanup)
            chores, scratch = _start(config, config_path, surroundings, metrics, readiness, cleanup)
        except (KernelError, StoreError, CompileError, OSError, TimeoutError) as error:
            failure = f"{error}{requirements.remark(os.uname().release)}"
            tell_failure(config, failure)
            raise StartError(failure) from error
        while not stop.is_set():
            for chore in chores:
                chore()
            if readiness.unproved:
                _prove(scratch, metrics, readiness)
            if not readiness.unproved and not (readiness.uninstalled and readiness.unaddressed()):
                _install(config, readiness)
            stop.wait(min(config.resync_seconds, _UNREADY_SECONDS) if readiness.uninstalled else config.resync_seconds)
    log.info("stopped")


def open_store(config: Config) -> Store:
    """Open the IPAM store of a configuration. Raises StoreError and OSError."""
    return Store(
        config.paths.state / "ipam.db",
        config.own_ranges,
        boot_id=boot_id(),
        exclude=config.exclude,
        reserved=config.reserved,
        sticky=config.sticky,
    )


def boot_id() -> str:
    """Return what tells this boot of the machine from all others."""
    return _BOOT_ID.read_text().strip()


def lock_state(directory: Path, cleanup: ExitStack) -> None:
    """Keep others off the state directory until `cleanup`; the kernel unlocks it however this process ends.

    Raises OSError, and StartError if another agent is at work.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = directory / _LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    cleanup.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StartError(f"another agent is at work: it holds {path} (fuser says which)") from error


def _serve_metrics(address: str, metrics: Metrics, readiness: Readiness, cleanup: ExitStack) -> None:
    try:
        server = serve(address, metrics.registry, readiness)
    except OSError as error:
        raise StartError(f"serve metrics on {address}: {error.strerror}") from error
    cleanup.callback(server.shutdown)


def _start(
    config: Config,
    config_path: Path | None,
    surroundings: Surroundings,
    metrics: Metrics,
    readiness: Readiness,
    cleanup: ExitStack,
) -> tuple[Sequence[Callable[[], None]], ScratchPod]:
    """Bring the datapath in force, settle what an earlier agent left, and serve launchers.

    Returns what is to be done time and again, and the pod of the self-test.
    """
    journal = Journal(config.paths.state, boot_id())
    journal.note(netlink.enable_forwarding())
    datapath = _load_datapath(config, metrics)
    cleanup.callback(datapath.close)
    store = open_store(config)
    cleanup.callback(store.close)
    readiness.exhausted = store.exhausted
    wiring = Wiring()
    following = Following(config, store, readiness)
    membership = following.membership
    readiness.refused = lambda: membership.cluster.refused.get(config.node_name, "")
    chores = []
    if config.kubernetes is None:
        chores.append(ListedNodes(config, config_path, membership.report).poll)
    outside = partial(_outside, surroundings, membership, store)
    loop = _make_loop(config, datapath, store, wiring, outside, metrics)
    readiness.trouble = loop.trouble
    node = Node(store=store, wiring=wiring, loop=loop, mtu=surroundings.pod_mtu, readiness=readiness)
    _reserve_ports(config, journal)
    _collect_flows(config, datapath, surroundings, metrics, cleanup)
    metrics.watch_cluster(lambda: surroundings.peers, lambda: len(membership.cluster.refused))
    metrics.watch(lambda: tables.outcomes(datapath), store.usage, lambda: len(store.pods()))
    _delete_strays(store, metrics)
    with _timed("attach", metrics):
        loop.start()
        cleanup.callback(loop.stop)
        loop.sync(_FIRST_PASS_SECONDS)
    datapath.prune()
    cleanup.enter_context(netlink.Monitor(loop.kernel_changed))
    _release_leftovers(store, node)
    scratch = ScratchPod(wiring, loop)
    _prove(scratch, metrics, readiness)
    following.start(loop.wake, metrics, cleanup)
    gc = SelfGc(store=store, node=node, grace_seconds=config.gc_grace_seconds, released=metrics.gc_released)
    spool = _serve_launchers(config.paths, node, metrics, cleanup)
    return (spool.drain, gc.collect, *chores), scratch


def _outside(surroundings: Surroundings, membership: Membership, store: Store, look: bool) -> Outside:
    return surroundings.outside(membership.cluster, store.subnets, look=look)


def _make_loop(
    config: Config,
    datapath: loader.Datapath,
    store: Store,
    wiring: Wiring,
    outside: Callable[[bool], Outside],
    metrics: Metrics,
) -> Loop:
    hooks = _hooks(config, datapath)
    return Loop(
        store=store,
        tables=_tables(datapath, hooks),
        devices=wiring,
        repaired=metrics.repaired,
        settle=hooks.settle,
        resync_seconds=config.resync_seconds,
        outside=outside,
    )


def _load_datapath(config: Config, metrics: Metrics) -> loader.Datapath:
    with _timed("compile", metrics):
        program = cache.compiled(config.paths.bpf_source, config.paths.state / "cache", defines={})
    with _timed("load", metrics):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        sizes = masquerade.map_sizes(config.masquerade, memory)
        return loader.load(
            program, config.paths.bpffs, {"endpoints": config.max_pods * _ENDPOINTS_PER_POD + 1, **sizes}
        )


def _tables(datapath: loader.Datapath, hooks: StagedHooks) -> Tables:
    maps, constants = datapath.maps, datapath.constants
    lanes = {name: constants[f"PREFIX_{name.upper()}"] for name in ("native", "stack", "node")}
    other_protocols = {name: constants[f"OTHER_{name.upper()}"] for name in get_args(OtherProtocols)}
    return Tables(
        tunnel_devices=netlink.TunnelDeviceTable(HOST_MAC),
        queues=netlink.QueueTable(),
        endpoints=entries.EndpointTable(maps["endpoints"]),
        settings=entries.SettingsTable(maps["settings"], other_protocols=other_protocols),
        prefixes=entries.PrefixTable(maps["prefixes"], **lanes),
        node_addresses=entries.AddressTable(maps["node_addresses"]),
        hooks=hooks,
        uplinks=entries.UplinkTable(maps["uplinks"]),
        tunnels=entries.TunnelTable(maps["tunnels"]),
        neighbours=netlink.NeighbourTable(),
        gateways=netlink.GatewayTable(),
        routes=netlink.RouteTable(),
        peer_routes=netlink.PeerRouteTable(),
        subnets=netlink.SubnetTable(),
    )


def _reserve_ports(config: Config, journal: Journal) -> None:
    first, last = config.masquerade.first_port, config.masquerade.last_port
    if config.masquerade.enabled and (changes := netlink.reserve_ports(first, last)):
        journal.note(changes)
        log.info("reserved for masquerading, in net.ipv4.ip_local_reserved_ports, ports=%d-%d", first, last)


def _collect_flows(
    config: Config, datapath: loader.Datapath, surroundings: Surroundings, metrics: Metrics, cleanup: ExitStack
) -> None:
    collector = Collector(
        flows=datapath.maps["flows"],
        owners=datapath.maps["owners"],
        settings=masquerade.settings(config.masquerade),
        constants=datapath.constants,
        refused=lambda: sum(tables.outcomes(datapath)[name].packets for name in _REFUSALS),
    )
    metrics.watch_masquerade(
        collector, masqueraded=lambda: tables.masqueraded(datapath), uplinks=lambda: surroundings.known.uplinks
    )
    collector.start()
    cleanup.callback(collector.stop)


def _hooks(config: Config, datapath: loader.Datapath) -> StagedHooks:
    """Return the way to attach programs. See `agent.hooks` for why new ones begin as filters."""
    has_tcx = tables.tcx_supported() if config.hooks == "auto" else config.hooks == "tcx"
    log.info("attaching by hooks=%s", "tcx" if has_tcx else "clsact")
    tcx = tables.TcxHooks(datapath, config.paths.bpffs)
    clsact = netlink.ClsactHooks(datapath.programs, datapath.program_ids)
    if not has_tcx:
        return StagedHooks(first=clsact, final=clsact, other=tcx)
    first = tcx if config.hooks == "tcx" else clsact
    return StagedHooks(first=first, final=tcx, other=clsact, patient=_AT_UPLINKS)


def _delete_strays(store: Store, metrics: Metrics) -> None:
    """Delete host ends and shapers that no row names, as when the store was lost: their addresses will be given again.

    Before the loop's first pass, which takes the programs from what it does not know: a pod without them could pass for
    any other. A crash leaves none, for rows come before devices, but that of the self-test.
    """
    known = store.pods()
    strays = sorted(netlink.devices().keys() - {pod.device for pod in known})
    strays += sorted(netlink.shapers().keys() - {shaper_of(pod.device) for pod in known if pod.limits.egress_rate})
    for device in strays:
        log.warning("deleting the device of a pod that the IPAM store does not know device=%s", device)
        netlink.delete_device(device)
    if strays:
        metrics.repaired("devices", len(strays))


def _release_leftovers(store: Store, node: Node) -> None:
    """Undo what a crash cut short, and forget the pods of an earlier boot: their namespaces are gone.

    What a delegate has to take back is left to the self-GC: it may hang, and calls are not to wait for it.
    """
    for pod in store.pods():
        if pod.phase in (Phase.ACTIVE, Phase.IMPORTED) and pod.boot_id == store.boot_id:
            continue
        log.info("releasing leftover pod=%s phase=%s", pod.attachment, pod.phase)
        if supply.is_delegated(pod.origin):
            store.begin_release(pod.attachment)
            continue
        try:
            node.release(pod.attachment)
        except CniError as error:  # the other pods matter more; the self-GC, or a DEL, tries again
            log.error("cannot release leftover pod=%s error=%r", pod.attachment, str(error))


def _serve_launchers(paths: Paths, node: Node, metrics: Metrics, cleanup: ExitStack) -> Spool:
    served = observed(partial(handle, node=node), metrics.observe_call)
    spool = Spool(paths.spool, served)
    spool.drain()
    server = Server(paths.socket, spool.serve)
    server.start()
    cleanup.callback(server.stop)
    return spool


def _prove(scratch: ScratchPod, metrics: Metrics, readiness: Readiness) -> None:
    """Send a packet through the datapath; what fails is tried again, and said once."""
    try:
        with _timed("selftest", metrics):
            scratch.test()
    except SelfTestFailed as error:
        if readiness.unproved != str(error):
            log.error("the datapath does not work reason=%r", str(error))
        readiness.unproved = str(error)
        return
    readiness.unproved = ""
    log.info("the datapath works")


def _install(config: Config, readiness: Readiness) -> None:
    """Tell the runtime, last of all, and again should somebody undo it; what fails is tried again, and said once."""
    try:
        install_launcher(config.paths.launcher, config.paths.cni_bin_dir)
        install_conflist(config.paths.cni_conf_dir, config.network)
    except InstallError as error:
        if readiness.uninstalled != str(error):
            log.error("the runtime cannot be told reason=%r", str(error))
        readiness.uninstalled = str(error)
        return
    if readiness.uninstalled:
        log.info("ready network=%s socket=%s", config.network, config.paths.socket)
    readiness.uninstalled = ""


@contextmanager
def _timed(phase: str, metrics: Metrics) -> Iterator[None]:
    start = time.perf_counter()
    yield
    metrics.start_phase(phase, time.perf_counter() - start)
