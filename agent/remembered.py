"""Who was in the cluster, on disk: a node that reboots while nobody tells it still serves pods, and finds its peers.

One line of JSON for each node, after one with the version: so neither way takes memory for all of them at once.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path

from agent.cluster import ClusterNode
from agent.files import replace_file

log = logging.getLogger(__name__)

NAME = "cluster.json"
"""Within the state directory."""

_VERSION = 1
_PAUSE = 30.0  # seconds between two writes: a large cluster's file is a megabyte


class Remembered:
    """A file with the nodes that were reported last."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._nodes: Sequence[ClusterNode] | None = None
        self._news = threading.Event()
        self._stopped = threading.Event()
        self._failure = ""
        self._thread = threading.Thread(target=self._run, name="remember", daemon=True)

    def recall(self) -> list[ClusterNode]:
        """Return the nodes of the file; none if there is no file, or none that can be read."""
        try:
            with self._path.open() as file:
                return list(_decode(file))
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("cannot recall who was in the cluster path=%s error=%r", self._path, error)
            return []

    def start(self) -> None:
        """Begin to write what is kept."""
        self._thread.start()

    def stop(self) -> None:
        """Write what was kept last, and no more."""
        self._stopped.set()
        self._news.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=5)
        self._write()

    def keep(self, nodes: Sequence[ClusterNode], *, at_once: bool) -> None:
        """Have these nodes written soon; `at_once` does it before this returns."""
        with self._lock:
            self._nodes = nodes
        if at_once:
            self._write()
        else:
            self._news.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._news.wait()
            self._news.clear()
            self._write()
            self._stopped.wait(_PAUSE)

    def _write(self) -> None:
        with self._lock:
            nodes, self._nodes = self._nodes, None
            if nodes is None:
                return
            try:
                replace_file(self._path, "".join(_encode(nodes)).encode(), 0o600)
            except OSError as error:
                if self._failure != str(error):
                    log.error("cannot remember who is in the cluster path=%s error=%r", self._path, str(error))
                self._failure = str(error)
                self._nodes = nodes
                self._news.set()
                return
            self._failure = ""


def _encode(nodes: Iterable[ClusterNode]) -> Iterator[str]:
    yield json.dumps({"version": _VERSION}) + "\n"
    for node in nodes:
        content = {
            "name": node.name,
            "addresses": [str(each) for each in node.addresses],
            "pod_cidrs": [str(each) for each in node.pod_cidrs],
            "created": node.created,
        }
        yield json.dumps(content) + "\n"


def _decode(lines: Iterable[str]) -> Iterator[ClusterNode]:
    """Yield the nodes. Raises ValueError, KeyError and TypeError if these are not the lines of a whole file."""
    lines = iter(lines)
    version = json.loads(next(lines, ""))["version"]
    if version != _VERSION:
        raise ValueError(f"its version is {version}, not {_VERSION}")
    for line in lines:
        content = json.loads(line)
        yield ClusterNode(
            name=str(content["name"]),
            addresses=tuple(map(ip_address, content["addresses"])),
            pod_cidrs=tuple(map(ip_network, content["pod_cidrs"])),
            created=str(content["created"]),
        )
