"""The agent from start to stop: every long-lived object is built here, each after those that it relies on."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from agent import kernel, masquerade, netlink, supply
from agent.collector import Collector
from agent.config import Config
from agent.datapath import cache, loader, requirements, tables
from agent.datapath.source import CompileError
from agent.following import Following, tell_failure
from agent.gc import SelfGc
from agent.install import InstallError, install_conflist, install_launcher
from agent.journal import Journal
from agent.loop import Loop
from agent.membership import Membership
from agent.metrics import Metrics, serve
from agent.node import Node, Readiness
from agent.pods import shaper_of
from agent.sections import Paths
from agent.selftest import ScratchPod, SelfTestFailed
from agent.server import Server, observed
from agent.spool import Spool
from agent.state import KernelError
from agent.statedir import StartError, boot_id, lock_state, open_store
from agent.store import Phase, Store, StoreError
from agent.surroundings import Surroundings
from agent.sysctls import Sysctls
from agent.wiring import HOST_MAC, Wiring
from cni.commands import handle
from cni.errors import CniError

log = logging.getLogger(__name__)

_FIRST_PASS_SECONDS = 60.0
_UNREADY_SECONDS = 1.0
_REFUSALS = ("drop_masq_exhausted", "drop_masq_full")
_AT_UPLINKS = ("from_uplink", "to_uplink", "from_tunnel", "to_tunnel")
_ENDPOINTS_PER_POD = 3  # an IPv4, an IPv6 and a link-local address; one more is the self-test's


@dataclass
class Stop:
    """Whether the agent shall end. No lock, since a signal's handler sets it, and would wait for the main thread."""

    asked: bool = False


@dataclass(frozen=True)
class _Parts:
    """What is there before the start, and most of its steps need."""

    config: Config
    surroundings: Surroundings
    metrics: Metrics
    readiness: Readiness
    cleanup: ExitStack


@dataclass(frozen=True)
class _Running:
    """What the main thread needs of an agent that has started."""

    chores: Sequence[Callable[[], None]]
    """What is to be done time and again."""
    scratch: ScratchPod
    loop: Loop


def run(config: Config, version: str, stop: Stop, config_path: Path | None = None) -> NoReturn:
    """Run an agent. Pods and what carries their packets stay as they are when it ends, by SystemExit.

    A signal's handler raises that wherever the main thread is, at the start or later: as a crash there, it does no
    harm, and calls in hand are finished. `stop` is for when the interpreter loses it (as in a finalizer). The file that
    the configuration comes from, if any, is read again for its list of nodes. Raises ConfigError, before anything is
    touched, and StartError.
    """
    surroundings = Surroundings(config, HOST_MAC)
    metrics, readiness = Metrics(version), Readiness()
    metrics.watch_readiness(readiness)
    with ExitStack() as cleanup:
        try:
            lock_state(config.paths.state, cleanup)
            _serve_metrics(config.metrics, metrics, readiness, cleanup)
            running = _start(_Parts(config, surroundings, metrics, readiness, cleanup), config_path)
        except (KernelError, StoreError, CompileError, OSError, TimeoutError) as error:
            failure = f"{error}{requirements.remark(os.uname().release)}"
            tell_failure(config, failure)
            raise StartError(failure) from error
        while not stop.asked:
            for chore in running.chores:
                chore()
            if readiness.unproved:
                _prove(running.scratch, metrics, readiness)
            if not readiness.unproved and (not readiness.uninstalled or _can_serve(running.loop, readiness)):
                _install(config, readiness)
            time.sleep(min(config.resync_seconds, _UNREADY_SECONDS) if readiness.uninstalled else config.resync_seconds)
    raise SystemExit


def _serve_metrics(address: str, metrics: Metrics, readiness: Readiness, cleanup: ExitStack) -> None:
    try:
        server = serve(address, metrics.registry, readiness)
    except OSError as error:
        raise StartError(f"serve metrics on {address}: {error.strerror}") from error
    cleanup.callback(server.shutdown)


def _start(parts: _Parts, config_path: Path | None) -> _Running:
    """Bring the datapath in force, settle what an earlier agent left, and serve launchers."""
    config, metrics, readiness, cleanup = parts.config, parts.metrics, parts.readiness, parts.cleanup
    sysctls = Sysctls(config.masquerade, Journal(config.paths.state, boot_id()))
    for changed in sysctls.ensure():
        log.info("set sysctl=%s", changed)
    datapath = _load_datapath(config, metrics)
    cleanup.callback(datapath.close)
    store = open_store(config)
    cleanup.callback(store.close)
    readiness.exhausted = store.exhausted
    following, wiring = Following(config, config_path, store, readiness), Wiring()
    loop = _make_loop(parts, datapath, store, wiring, following.membership, sysctls)
    node = Node(
        store=store,
        wiring=wiring,
        loop=loop,
        mtu=parts.surroundings.mtu,
        readiness=readiness,
        masqueraded_ports=masquerade.ports(config.masquerade),
    )
    _collect_flows(parts, datapath)
    metrics.watch(lambda: tables.outcomes(datapath), store.usage, store.pods)
    metrics.watch_cluster(lambda: following.membership.cluster, lambda: parts.surroundings.peers)
    _delete_strays(store, metrics)
    _bring_in_force(parts, loop, datapath)
    _release_leftovers(store, node)
    scratch = ScratchPod(wiring, loop)
    _prove(scratch, metrics, readiness)
    following.start(loop.wake, lambda: parts.surroundings.peers.refused, metrics, cleanup)
    gc = SelfGc(store=store, node=node, grace_seconds=config.gc_grace_seconds, released=metrics.gc_released)
    spool = _serve_launchers(config.paths, node, metrics, cleanup)
    return _Running((spool.drain, gc.collect, following.poll), scratch, loop)


def _load_datapath(config: Config, metrics: Metrics) -> loader.Datapath:
    if refusal := requirements.refusal(os.uname().version):
        raise KernelError(refusal)
    with _timed("compile", metrics):
        program = cache.compiled(config.paths.bpf_source, config.paths.state / "cache", defines={})
    with _timed("load", metrics):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        sizes = masquerade.map_sizes(config.masquerade, memory)
        return loader.load(
            program, config.paths.bpffs, {"endpoints": config.max_pods * _ENDPOINTS_PER_POD + 1, **sizes}
        )


def _make_loop(
    parts: _Parts, datapath: loader.Datapath, store: Store, wiring: Wiring, membership: Membership, sysctls: Sysctls
) -> Loop:
    """Make the loop, which is not started yet; readiness hears of its troubles."""
    config, surroundings, readiness = parts.config, parts.surroundings, parts.readiness
    hooks = kernel.staged_hooks(config.hooks, datapath, config.paths.bpffs)
    former = [address for pod in store.pods() for address in pod.addresses]
    loop = Loop(
        store=store,
        tables=kernel.open_tables(datapath, hooks, config.paths.bpffs, surroundings.cgroup, former),
        devices=wiring,
        repaired=parts.metrics.repaired,
        settle=hooks.settle,
        resync_seconds=config.resync_seconds,
        outside=lambda look: surroundings.outside(membership.cluster, store.subnets, look=look),
        sysctls=sysctls.ensure,
    )
    readiness.hung, readiness.trouble = loop.hung, loop.trouble
    readiness.no_tunnel = partial(loop.refusal, "tunnel_devices", netlink.TUNNEL)
    readiness.needs_tunnel = lambda: surroundings.peers.needs_tunnel
    return loop


def _bring_in_force(parts: _Parts, loop: Loop, datapath: loader.Datapath) -> None:
    """Run the loop, wait for its first pass, and drop what an earlier datapath had; then hear of the kernel's news."""
    with _timed("attach", parts.metrics):
        loop.start()
        parts.cleanup.callback(loop.stop)
        loop.sync(_FIRST_PASS_SECONDS)
    datapath.prune()
    parts.cleanup.enter_context(netlink.Monitor(loop.kernel_changed))


def _collect_flows(parts: _Parts, datapath: loader.Datapath) -> None:
    collector = Collector(
        flows=datapath.maps["flows"],
        owners=datapath.maps["owners"],
        settings=masquerade.settings(parts.config.masquerade),
        constants=datapath.constants,
        refused=lambda: sum(tables.outcomes(datapath)[name].packets for name in _REFUSALS),
    )
    parts.metrics.watch_masquerade(
        collector, masqueraded=lambda: tables.masqueraded(datapath), uplinks=lambda: parts.surroundings.known.uplinks
    )
    collector.start()
    parts.cleanup.callback(collector.stop)


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


def _can_serve(loop: Loop, readiness: Readiness) -> bool:
    """Say whether the runtime can be told of podlane for the first time: there are addresses, and ways to all nodes."""
    if readiness.unaddressed() or readiness.limited:
        return False
    try:
        loop.sync(_FIRST_PASS_SECONDS)  # only a pass finds out whether what the cluster has just told can be had
    except (KernelError, TimeoutError):
        return False
    return not readiness.limited


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
