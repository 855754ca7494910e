"""Taking podlane from a node: all that it has put there, and nothing else.

First the network configuration, so that no pod comes to podlane any more, and last the files that tell what is ours. An
uninstall that was cut short is done by the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from agent import netlink, supply
from agent.config import Config
from agent.datapath import removal
from agent.files import remove_file
from agent.install import remove_conflist, remove_launcher
from agent.journal import NAME as JOURNAL
from agent.journal import Journal
from agent.remembered import NAME as REMEMBERED
from agent.state import KernelError, Table
from agent.statedir import LOCK, STORE, StartError, boot_id, lock_state, open_store
from agent.store import Pod, StoreError
from cni.errors import CniError

_STATE = (STORE, f"{STORE}-wal", f"{STORE}-shm", JOURNAL, REMEMBERED, LOCK)


class UninstallRefused(Exception):
    """Nothing was touched; the message says why not."""


class UninstallFailed(Exception):
    """Not all could be removed; the message says what, and why."""


def uninstall(config: Config, *, force: bool, removed: Callable[[str], None]) -> None:
    """Remove podlane, and tell of every kind of thing that was there. Raises UninstallRefused and UninstallFailed.

    With `force`, also while pods are attached: they lose their interface.
    """
    failures = []
    with ExitStack() as cleanup:
        try:
            lock_state(config.paths.state, cleanup)
        except (StartError, OSError) as error:
            raise UninstallRefused(str(error)) from error
        if not force:
            _refuse_if_in_use(config)
        for step in (_conflist, _leases, _devices, _hooks, _entries, _settings, _files):
            try:
                for line in step(config):
                    removed(line)
            except (KernelError, StoreError, CniError, OSError) as error:
                failures.append(str(error))
    if failures:
        raise UninstallFailed("; ".join(failures))


def _refuse_if_in_use(config: Config) -> None:
    try:
        devices = set(netlink.devices())
        pods = [pod.pod_name or str(pod.attachment) for pod in _pods(config) if pod.device in devices]
    except (KernelError, StoreError) as error:
        raise UninstallRefused(f"cannot tell which pods are attached: {error}") from error
    if devices:
        names = f" ({', '.join(sorted(pods))})" if pods else ""
        raise UninstallRefused(f"pods are attached: {len(devices)}{names}; drain the node, or cut them off by --force")


def _pods(config: Config) -> list[Pod]:
    if not (config.paths.state / STORE).exists():
        return []
    with closing(open_store(config)) as store:
        return store.pods()


def _conflist(config: Config) -> Iterator[str]:
    if remove_conflist(config.paths.cni_conf_dir):
        yield f"the network configuration in {config.paths.cni_conf_dir}"


def _leases(config: Config) -> Iterator[str]:
    """Give back what other IPAM plugins gave: nobody else will."""
    for pod in _pods(config):
        if supply.is_delegated(pod.origin):
            supply.give_back(None, pod.origin)
            yield f"addresses of {pod.attachment}"


def _devices(_: Config) -> Iterator[str]:
    for name in netlink.own_devices():
        netlink.delete_device(name)
        yield f"device {name}"


def _hooks(config: Config) -> Iterator[str]:
    """Detach first: a program that is still there when its maps' pins go would work on with them."""
    for device in netlink.ClsactHooks({}, {}).sweep():
        yield f"filters at {device}"
    yield from removal.remove(config.paths.bpffs)


def _entries(_: Config) -> Iterator[str]:
    netlink.adopt_peer_routes()
    tables: dict[str, Table[Any, Any]] = {
        "neighbours": netlink.NeighbourTable(),
        "routes to pods": netlink.RouteTable(),
        "routes to nodes": netlink.PeerRouteTable(),
        "unreachable subnets": netlink.SubnetTable(),
    }
    for kind, table in tables.items():
        keys = list(table.read())
        for failure in table.delete(keys).values():
            raise failure
        if keys:
            yield f"{kind}: {len(keys)}"


def _settings(config: Config) -> Iterator[str]:
    for name in netlink.restore_sysctls(Journal(config.paths.state, boot_id()).changes()):
        yield f"change of sysctl {name}"


def _files(config: Config) -> Iterator[str]:
    paths = config.paths
    remove_launcher(paths.cni_bin_dir)
    _remove(paths.spool.glob("*") if paths.spool.is_dir() else ())
    _remove((paths.state / "cache").glob("*.object*"))
    _remove(paths.state / name for name in _STATE)
    _remove([paths.socket])
    for directory in (paths.spool, paths.state / "cache", paths.state, paths.socket.parent):
        with suppress(OSError):  # somebody else's files are in it, or it is mounted there
            directory.rmdir()
    yield f"files in {paths.state}, {paths.socket.parent} and {paths.cni_bin_dir}"


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        remove_file(file)
