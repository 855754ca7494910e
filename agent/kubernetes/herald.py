"""What the cluster is told of this node: that its network works, and what needs a person."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from agent.kubernetes.api import Api, ApiError, Conflict
from agent.kubernetes.backoff import Backoff
from agent.kubernetes.nodes import OwnNode

log = logging.getLogger(__name__)

NODE_READY_REASON = "PodlaneIsUp"
"""The reason of the node's condition NetworkUnavailable=False."""

NODE_CUT_OFF_REASON = "PodlaneIsCutOff"
"""The reason of the node's condition NetworkUnavailable=True."""

_COMPONENT = "podlane-agent"
_NAMESPACE = "default"  # where events of objects without a namespace are
_CHECK_SECONDS = 1.0
_EVENT_SECONDS = 3000.0  # API servers forget events after an hour, as a rule
_MOST_EVENTS = 5  # of one reason within that time: what fails time and again may do it in ever new words
_NAME_LENGTH = 236  # characters: with a dot and a number, 253 (RFC 1123 subdomains)
_MESSAGE_LENGTH = 1024  # characters (Kubernetes: apis/core/validation/events.go)

Troubles = Callable[[], Mapping[str, str]]
"""Returns what needs a person at present, by the reason of its event: one word in CamelCase."""


class Herald:
    """Sets the node's condition, removes its start-up taint while the node is ready, and writes events.

    The condition stays as it is while the node is neither ready nor cut off, as when an agent starts.
    """

    def __init__(
        self,
        *,
        connect: Callable[[], Api],
        node: str,
        own: Callable[[], OwnNode | None],
        is_ready: Callable[[], bool],
        cut_off: Callable[[], str],
        troubles: Troubles,
        startup_taint: str,
    ) -> None:
        """`own` tells the node as it is in the API; `startup_taint` is a key, empty for none.

        `cut_off` says why the node does not reach the others; empty if it does.
        """
        self._connect = connect
        self._node = node
        self._own = own
        self._is_ready = is_ready
        self._cut_off = cut_off
        self._troubles = troubles
        self._taint = startup_taint
        self._done = ("", "")  # the version of the own Node at which all was as it shall be, or asked for; and why not
        self._told: dict[tuple[str, str], float] = {}
        self._failure = ""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="herald", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Say no more."""
        self._stopped.set()
        self._thread.join(timeout=1)

    def _run(self) -> None:
        backoff, wait = Backoff(), 0.0
        while not self._stopped.wait(wait):
            wait = _CHECK_SECONDS
            try:
                self._tell()
            except Conflict:
                continue  # the watch brings the newer one
            except ApiError as error:
                if not self._failure:
                    log.warning("cannot tell the cluster about this node error=%r", str(error))
                self._failure = str(error)
                wait += backoff.next()
                continue
            except Exception:  # the thread must live
                log.exception("cannot tell the cluster about this node")
                wait += backoff.next()
                continue
            self._failure = ""
            backoff.reset()

    def _tell(self) -> None:
        """Bring the cluster up to date, if it is not. Raises ApiError, Conflict."""
        own, cut_off = self._own(), self._cut_off()
        if own is not None and (own.version, cut_off) != self._done and (cut_off or self._is_ready()):
            self._correct(own, cut_off)
            self._done = (own.version, cut_off)
        now = time.monotonic()
        current = dict(self._troubles())
        self._told = {each: when for each, when in self._told.items() if now - when < _EVENT_SECONDS}
        for trouble in current.items():
            count = sum(reason == trouble[0] for reason, _ in self._told)
            if trouble not in self._told and count < _MOST_EVENTS:
                tell_once(self._connect, self._node, *trouble)
                self._told[trouble] = now

    def _correct(self, own: OwnNode, cut_off: str) -> None:
        wanted = "True" if cut_off else "False"
        kept = [each for each in own.taints if each.get("key") != self._taint]
        is_tainted = len(kept) < len(own.taints) and not cut_off
        if own.network_unavailable == wanted and not is_tainted:
            return
        with self._connect() as api:
            path = f"/api/v1/nodes/{quote(self._node)}"
            if is_tainted:
                # Taints are one list: the server compares the version, so that nobody else's change to it is lost.
                version = {"resourceVersion": own.version}
                api.patch(path, {"metadata": version, "spec": {"taints": kept}}, "merge")
                log.info("removed the start-up taint key=%s", self._taint)
            if own.network_unavailable != wanted:
                condition = _condition(wanted, cut_off)
                api.patch(f"{path}/status", {"status": {"conditions": [condition]}}, "strategic-merge")
                log.info("told the cluster of this node's network unavailable=%s", wanted)


def tell_once(connect: Callable[[], Api], node: str, reason: str, message: str) -> None:
    """Write an event that `kubectl describe node` shows. Raises ApiError."""
    with connect() as api:
        api.create(f"/api/v1/namespaces/{_NAMESPACE}/events", _event(node, reason, message))
    log.warning("wrote an event reason=%s message=%r", reason, message)


def _condition(status: str, cut_off: str) -> dict[str, str]:
    now = _timestamp()
    return {
        "type": "NetworkUnavailable",
        "status": status,
        "reason": NODE_CUT_OFF_REASON if cut_off else NODE_READY_REASON,
        "message": cut_off or "podlane is running on this node",
        "lastHeartbeatTime": now,
        "lastTransitionTime": now,
    }


def _event(node: str, reason: str, message: str) -> dict[str, Any]:
    """Return a core/v1 Event of the Node. The uid is the name, as in kubelet's, for which `kubectl describe` looks."""
    now = _timestamp()
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{node[:_NAME_LENGTH].rstrip('-.')}.{secrets.token_hex(8)}", "namespace": _NAMESPACE},
        "involvedObject": {"kind": "Node", "name": node, "uid": node},
        "reason": reason,
        "message": message[:_MESSAGE_LENGTH],
        "type": "Warning",
        "source": {"component": _COMPONENT, "host": node},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }


def _timestamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
