"""Follows all Nodes: one list, then what changes, for as long as the agent runs, whatever the API server does.

The list comes in pages; a watch goes on where the last one ended, also after an outage, unless the server has forgotten
that version: then the list is read again. What was known stays in force all the while.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from agent.cluster import ClusterNode
from agent.kubernetes.api import Api, ApiError, Gone
from agent.kubernetes.backoff import Backoff
from agent.kubernetes.nodes import Change, OwnNode, read_change, read_page

log = logging.getLogger(__name__)

Report = Callable[[Sequence[ClusterNode]], None]

_PATH = "/api/v1/nodes"
_PAGE = 100  # nodes: of 25 kB each as a rule, so that a page takes 2.5 MB while it is read, and not 12 as with 500
_WATCH_SECONDS = 290  # then the server ends the watch; API servers give 30 to 60 minutes, load balancers less
_SILENCE_SECONDS = _WATCH_SECONDS + 30.0
_STEADY_SECONDS = 10.0  # a watch that lived as long is no failure
_PAUSE = 0.3  # seconds between reports, at least
_NOT_ASKED = "the API server was not asked yet"
_SHARE = 25  # a report that took a second is followed by so many without one


class NodeSource:
    """Reports all nodes, and again soon after each change, but never so often that it takes much of a processor."""

    def __init__(self, connect: Callable[[], Api], own_name: str, report: Report) -> None:
        self._connect = connect
        self._own_name = own_name
        self._report = report
        self._nodes: dict[str, ClusterNode] = {}
        self._own: OwnNode | None = None
        self._version = ""
        self._trouble = _NOT_ASKED
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for name, run in (("nodes-watch", self._follow), ("nodes-report", self._tell))
        ]

    @property
    def own(self) -> OwnNode | None:
        """The own Node; None while it is not known, or there is none."""
        return self._own

    @property
    def trouble(self) -> str:
        """Why the cluster is not followed at present; empty if it is."""
        return self._trouble

    def start(self) -> None:
        """Begin; it may take any time until the first report."""
        for each in self._threads:
            each.start()

    def stop(self) -> None:
        """Report no more. The thread that waits for the API server ends when that says something, or with the agent."""
        self._stopped.set()
        self._news.set()
        self._threads[1].join(timeout=1)

    def _follow(self) -> None:
        backoff = Backoff()
        while not self._stopped.is_set():
            started = time.monotonic()
            try:
                with self._connect() as api:
                    if not self._version:
                        self._list(api)
                    self._watch(api)
            except Gone as error:
                self._version = ""
                log.info("reading the nodes again reason=%r", str(error))
            except ApiError as error:
                self._note_trouble(str(error))
            except Exception as error:  # the thread must live, whatever a server sends
                log.exception("cannot follow the cluster's nodes")
                self._note_trouble(repr(error))
                self._version = ""
            if time.monotonic() - started >= _STEADY_SECONDS:
                backoff.reset()
            self._stopped.wait(backoff.next())

    def _list(self, api: Api) -> None:
        """Replace what is known by a list; its pages are of one moment. Raises ApiError, Gone."""
        nodes, own, rest = {}, None, ""
        while True:
            query = {"limit": str(_PAGE)} | ({"continue": rest} if rest else {})
            page = read_page(api.get(_PATH, query), self._own_name)
            for each in page.nodes:
                known = self._nodes.get(each.name)
                nodes[each.name] = known if known == each else each
            own, rest = own or page.own, page.rest
            if not rest:
                break
        with self._lock:
            self._nodes = nodes
        self._version = page.version
        self._news.set()
        self._own = own

    def _watch(self, api: Api) -> None:
        """Follow what changes until the server ends it. Raises ApiError, Gone."""
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(_WATCH_SECONDS),
        }
        with api.stream(_PATH, query, _SILENCE_SECONDS) as lines:
            if self._trouble:
                log.info("following the cluster's nodes count=%d version=%s", len(self._nodes), self._version)
                self._trouble = ""
            for line in lines:
                if self._stopped.is_set():
                    return
                self._take(read_change(line, self._own_name))

    def _take(self, change: Change) -> None:
        node = change.node
        if node is not None:
            with self._lock:
                if change.is_deleted:
                    is_new = self._nodes.pop(node.name, None) is not None
                else:
                    is_new = self._nodes.get(node.name) != node
                    if is_new:
                        self._nodes[node.name] = node
            if is_new:
                self._news.set()
            if change.own is not None:
                self._own = None if change.is_deleted else change.own
        self._version = change.version

    def _note_trouble(self, trouble: str) -> None:
        if trouble != self._trouble:
            log.warning("cannot follow the cluster's nodes; what is known stays in force error=%r", trouble)
        self._trouble = trouble

    def _tell(self) -> None:
        while True:
            self._news.wait()
            if self._stopped.is_set():
                return
            self._news.clear()
            with self._lock:
                nodes = list(self._nodes.values())
            started = time.monotonic()
            try:
                self._report(nodes)
            except Exception:  # the thread must live: a report is a whole one, so that the next makes good for it
                log.exception("cannot pass on who is in the cluster")
            self._stopped.wait(max(_PAUSE, _SHARE * (time.monotonic() - started)))
