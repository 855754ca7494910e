"""The periodic self-GC: releases attachments whose pods are gone, since most runtimes never call GC.

Two witnesses must agree that a pod is gone, and go on agreeing for the grace period. The host end of its veth pair is
missing: it goes with the pod's namespace. And the path that the runtime gave leads to no namespace, or to another one.
An agent that cannot see the runtime's paths still sees the devices; a device that somebody has deleted in a living pod
is one that the loop makes again.

What an ADD or a DEL could not finish, or its undo, needs no witness: no call is at work on it.

An imported attachment has no device of podlane's, and host-local kept no path: no witness, so it is never released
here, but by DEL, by the runtime's GC, or after a reboot.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from enum import StrEnum
from operator import itemgetter
from typing import Protocol

from agent import netlink
from agent.state import KernelError
from agent.store import Netns, Phase, Pod, Store, StoreError
from agent.wiring import netns_id
from cni.call import Attachment
from cni.errors import CniError

log = logging.getLogger(__name__)

_ROUND_SECONDS = 10.0  # in which a release may begin: a delegate that hangs shall not keep its caller for ever


class Reason(StrEnum):
    """Why an attachment is released."""

    NETNS_MISSING = "netns_missing"
    NETNS_REPLACED = "netns_replaced"  # another namespace has its path
    DELETE_FAILED = "delete_failed"  # a DEL, or the undo of an ADD, could not be finished


class Releaser(Protocol):
    """What the self-GC asks of the node, as `agent.node.Node` has it."""

    def turn(self, attachment: Attachment) -> AbstractContextManager[None]:
        """Keep other calls for the attachment waiting."""

    def is_at_work(self, attachment: Attachment) -> bool:
        """Say whether a call for the attachment has its turn."""

    def release(self, attachment: Attachment) -> None:
        """Take away all that the attachment has. Raises CniError."""


def reason_to_release(pod: Pod, device_exists: bool, netns_there: str | None) -> Reason | None:
    """Return why a pod counts as gone, None if it does not, where no call is at work on it. Pure.

    `netns_there` is the identity of the namespace at the pod's path: "" if there is none, None if nobody can tell.
    """
    if pod.phase in (Phase.RELEASING, Phase.RESERVED):
        return Reason.DELETE_FAILED
    if pod.phase is not Phase.ACTIVE or device_exists or netns_there in (None, pod.netns.id):
        return None
    return Reason.NETNS_REPLACED if netns_there else Reason.NETNS_MISSING


def netns_at(netns: Netns) -> str | None:
    """Return the identity of what is at the path now: "" if no namespace is there, None if that cannot be told."""
    try:
        descriptor = os.open(netns.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError:
        return None
    try:
        return netns_id(descriptor) if netlink.is_netns(descriptor) else ""
    except KernelError:
        return None
    finally:
        os.close(descriptor)


class SelfGc:
    """One round is `collect`. Not thread-safe."""

    def __init__(
        self,
        *,
        store: Store,
        node: Releaser,
        grace_seconds: float,
        released: Callable[[Reason], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`released` is told of each attachment that went; `clock` counts seconds."""
        self._store = store
        self._node = node
        self._grace = grace_seconds
        self._released = released
        self._clock = clock
        self._since: dict[Attachment, float] = {}
        self._told: dict[Attachment, str] = {}
        self._trouble = ""

    def collect(self) -> None:
        """Release what has been gone for the grace period; what fails is tried again after another one."""
        try:
            resting = (pod for pod in self._store.pods() if not self._node.is_at_work(pod.attachment))
            gone = [pod.attachment for pod in resting if _reason(pod)]
        except StoreError as error:
            if self._trouble != str(error):
                log.error("self-GC cannot read the store error=%r", str(error))
            self._trouble = str(error)
            return
        self._trouble = ""
        now = self._clock()
        self._since = {each: self._since.get(each, now) for each in gone}
        self._told = {each: text for each, text in self._told.items() if each in self._since}
        for attachment, since in sorted(self._since.items(), key=itemgetter(1)):  # what failed comes last
            if now - since >= self._grace and self._clock() - now < _ROUND_SECONDS:
                self._try_release(attachment)

    def _try_release(self, attachment: Attachment) -> None:
        try:
            self._release(attachment)
        except (CniError, StoreError) as error:
            self._since[attachment] = self._clock()
            if self._told.get(attachment) != str(error):
                log.error("self-GC cannot release, and tries again pod=%s error=%r", attachment, str(error))
            self._told[attachment] = str(error)
        else:
            del self._since[attachment]

    def _release(self, attachment: Attachment) -> None:
        with self._node.turn(attachment):
            pod = self._store.get(attachment)  # a call that had its turn before may have changed all
            reason = _reason(pod) if pod else None
            if reason is None:
                return
            self._node.release(attachment)
        log.info("self-GC released pod=%s reason=%s", attachment, reason)
        self._released(reason)


def _reason(pod: Pod) -> Reason | None:
    exists = netlink.index(pod.device) is not None
    return reason_to_release(pod, exists, None if exists else netns_at(pod.netns))
