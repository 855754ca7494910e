"""The agent's command: reads the configuration, builds every object, runs until SIGTERM."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import NoReturn

from agent.config import Config, ConfigError, load
from agent.lifecycle import StartError, run
from agent.logs import set_up

log = logging.getLogger(__name__)


def main() -> None:
    """Run the agent; exits with 2 for a bad configuration, 1 if it cannot start."""
    arguments = _parse_arguments()
    try:
        config = load(arguments.config) if arguments.config else Config()
    except ConfigError as error:
        _refuse(error)
    set_up(config.log_level)
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    try:
        run(config, _version(), stop)
    except ConfigError as error:  # in the file of ip-masq-agent's that the configuration names
        _refuse(error)
    except StartError as error:
        log.error("cannot start error=%r", str(error))
        sys.exit(1)
    logging.shutdown()
    # Threads that still serve a launcher are cut off here, as by a crash, which the store is made for.
    os._exit(0)


def _refuse(error: ConfigError) -> NoReturn:
    print(f"podlane-agent: {error}", file=sys.stderr)
    sys.exit(2)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="podlane-agent", description="The podlane node agent.")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file; without it every default applies")
    parser.add_argument("--version", action="version", version=_version())
    return parser.parse_args()


def _version() -> str:
    try:
        return metadata.version("podlane")
    except metadata.PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    main()
