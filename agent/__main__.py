"""The agent's command: reads the configuration, builds every object, runs until SIGTERM."""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import os
import signal
import sys
from contextlib import closing, suppress
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import NoReturn

from agent.config import Config, ConfigError, load
from agent.import_host_local import ImportRefused, import_directory
from agent.install import InstallError, install_launcher
from agent.lifecycle import Stop, run
from agent.logs import set_up
from agent.statedir import StartError, open_store
from agent.store import StoreError
from agent.uninstall import UninstallFailed, UninstallRefused, uninstall

log = logging.getLogger(__name__)

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 256 * 1024  # bytes


def main() -> None:
    """Run the agent, or a sub-command; exits with 2 for a bad configuration, 1 if it cannot do what it shall."""
    arguments = _parse_arguments()
    try:
        config = load(arguments.config) if arguments.config else Config()
    except ConfigError as error:
        _refuse(error)
    if arguments.command == "import":
        _import(config, arguments)
    elif arguments.command == "install":
        _install(config)
    elif arguments.command == "uninstall":
        _uninstall(config, force=arguments.force)
    else:
        _run(config, arguments.config)


def _run(config: Config, path: Path | None) -> None:
    set_up(config.log_level)
    _set_up_memory()
    stop = Stop()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        if not stop.asked:  # else it is under way
            stop.asked = True
            raise SystemExit

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    try:
        run(config, _version(), stop, path)
    except ConfigError as error:  # in the file of ip-masq-agent's that the configuration names
        _refuse(error)
    except StartError as error:
        log.error("cannot start error=%r", str(error))
        sys.exit(1)
    except SystemExit:
        log.info("stopped")
        logging.shutdown()
        # Threads that still serve a launcher are cut off here, as by a crash, which the store is made for.
        os._exit(0)


def _set_up_memory() -> None:
    """Have the C library give large blocks back, and the collector leave alone what stays."""
    # The tables of a large cluster are made anew with each of its changes. Left alone, the library keeps such blocks on
    # its heap from the second time on (mallopt(3)), in pieces: 4 MB with 5,000 nodes. musl's has no such function.
    with suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
    gc.freeze()  # the modules stay for ever: to look through them takes a collection 50 ms, in which no pod is served


def _import(config: Config, arguments: argparse.Namespace) -> None:
    network = arguments.network or arguments.directory.resolve().name
    try:
        with closing(open_store(config)) as store:
            for line in import_directory(arguments.directory, network, arguments.ifname, store):
                print(line)
    except (ImportRefused, StoreError, OSError) as error:
        print(f"podlane-agent: {error}", file=sys.stderr)
        sys.exit(1)


def _install(config: Config) -> None:
    try:
        install_launcher(config.paths.launcher, config.paths.cni_bin_dir)
    except InstallError as error:
        print(f"podlane-agent: {error}", file=sys.stderr)
        sys.exit(1)


def _uninstall(config: Config, *, force: bool) -> None:
    try:
        uninstall(config, force=force, removed=lambda what: print(f"removed {what}"))
    except (UninstallRefused, UninstallFailed) as error:
        print(f"podlane-agent: {error}", file=sys.stderr)
        sys.exit(1)


def _refuse(error: ConfigError) -> NoReturn:
    print(f"podlane-agent: {error}", file=sys.stderr)
    sys.exit(2)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="podlane-agent", description="The podlane node agent.")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file; without it every default applies")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", help="without one, the agent runs")
    take_over = commands.add_parser(
        "import",
        help="take over the addresses of a host-local directory",
        description="Take over the addresses that host-local gave, before and once more after the change of plugin.",
    )
    take_over.add_argument("directory", type=Path, metavar="DIR", help="such as /var/lib/cni/networks/NAME")
    take_over.add_argument("--network", metavar="NAME", help="the network's name; default: that of the directory")
    take_over.add_argument(
        "--ifname", metavar="NAME", default="eth0", help="the interface where old entries do not say it; default: eth0"
    )
    commands.add_parser(
        "install",
        help="put the launcher where the runtime looks for it, and no more",
        description="Put the launcher where the runtime looks for it: from then on a DEL succeeds, with or without the "
        "agent. The agent does the same, and writes the network configuration, once it is ready.",
    )
    remove = commands.add_parser(
        "uninstall",
        help="remove all that podlane has put on this node",
        description="Remove devices, programs, maps, routes, changed settings and files. The agent must not run.",
    )
    remove.add_argument("--force", action="store_true", help="also while pods are attached: they are cut off")
    return parser.parse_args()


def _version() -> str:
    try:
        return metadata.version("podlane")
    except metadata.PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    main()
