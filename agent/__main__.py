"""The agent's command: reads the configuration, builds every object, runs until SIGTERM."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from contextlib import closing
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import NoReturn

from agent.config import Config, ConfigError, load
from agent.import_host_local import ImportRefused, import_directory
from agent.lifecycle import StartError, open_store, run
from agent.logs import set_up
from agent.store import StoreError

log = logging.getLogger(__name__)


def main() -> None:
    """Run the agent, or a sub-command; exits with 2 for a bad configuration, 1 if it cannot do what it shall."""
    arguments = _parse_arguments()
    try:
        config = load(arguments.config) if arguments.config else Config()
    except ConfigError as error:
        _refuse(error)
    if arguments.command == "import":
        _import(config, arguments)
    else:
        _run(config, arguments.config)


def _run(config: Config, path: Path | None) -> None:
    set_up(config.log_level)
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    try:
        run(config, _version(), stop, path)
    except ConfigError as error:  # in the file of ip-masq-agent's that the configuration names
        _refuse(error)
    except StartError as error:
        log.error("cannot start error=%r", str(error))
        sys.exit(1)
    logging.shutdown()
    # Threads that still serve a launcher are cut off here, as by a crash, which the store is made for.
    os._exit(0)


def _import(config: Config, arguments: argparse.Namespace) -> None:
    network = arguments.network or arguments.directory.resolve().name
    try:
        with closing(open_store(config)) as store:
            for line in import_directory(arguments.directory, network, arguments.ifname, store):
                print(line)
    except (ImportRefused, StoreError, OSError) as error:
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
    return parser.parse_args()


def _version() -> str:
    try:
        return metadata.version("podlane")
    except metadata.PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    main()
