"""The pods' devices: made again, set up and looked at, before a full pass of the loop reads the kernel's tables."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

from agent.failures import Failures
from agent.pods import shaper_of
from agent.state import KernelError
from agent.store import Phase, Pod

log = logging.getLogger(__name__)


class Devices(Protocol):
    """The pods' veth pairs, as far as the loop is concerned."""

    def indexes(self, pods: Sequence[Pod]) -> dict[str, int]:
        """Return the interface index of every given pod's host end and shaper that exists, by name."""

    def restore(self, pod: Pod) -> None:
        """Make a missing pair again, carrying nothing yet. Raises KernelError."""

    def finish_restore(self, pod: Pod) -> None:
        """Let a restored pair carry packets. Raises KernelError."""

    def shape(self, pod: Pod) -> None:
        """Make a missing shaper again. Raises KernelError."""

    def fallen(self) -> set[str]:
        """Return the names of host ends and shapers that exist, but are down. Raises KernelError."""

    def lift(self, pod: Pod) -> None:
        """Set a fallen host end up. Raises KernelError."""

    def macs(self) -> dict[int, str]:
        """Return the MAC address of each pod's own end, by the index of the host end. Raises KernelError."""

    def introduce(self, pod: Pod) -> None:
        """Tell the pod again where the node is. Raises KernelError."""


class Upkeep:
    """The part of a full pass that has to do with devices: `begin` before the tables are read, `finish` at its end.

    ADD and DEL see to the devices of pods that are not active themselves. Not thread-safe.
    """

    def __init__(self, devices: Devices, repaired: Callable[[str, int], None]) -> None:
        self._devices = devices
        self._repaired = repaired
        self._restored: list[Pod] = []
        self._strangers: list[Pod] = []
        self._macs: dict[int, str] = {}
        self._failures: dict[str, KernelError] = {}
        self._told = Failures()

    def begin(self, pods: Iterable[Pod]) -> dict[int, str]:
        """Mend what is missing or down; return `agent.plan.Inside.macs`. Raises KernelError.

        A plugin after podlane in the chain may give a pod another MAC address (tuning does), and so may the pod itself.
        The one that counts is what the kernel has for the pod's interface, not what frames carry: a pod still cannot
        send under any other. Its addresses stay bound to its device, and nobody shares a link with it.
        """
        self._failures = {}
        active = [pod for pod in pods if pod.phase is Phase.ACTIVE]
        existing, fallen = self._devices.indexes(active), self._devices.fallen()
        missing = [pod for pod in active if pod.device not in existing]
        self._restored = self._attempt(self._devices.restore, missing)
        shaped = self._attempt(self._devices.shape, [pod for pod in active if _lacks_shaper(pod, existing)])
        down = [pod for pod in active if pod.device in fallen or shaper_of(pod.device) in fallen]
        lifted = self._attempt(self._devices.lift, down)
        if mended := self._restored + shaped + lifted:
            self._repaired("devices", len(mended))
            log.warning("repaired kind=devices count=%d first=%s", len(mended), mended[0].attachment)
        return self._new_macs([pod for pod in active if pod.device in existing], existing)

    def finish(self) -> None:
        """Let what was made again, or has changed, carry packets, now that all is in force; tell what has failed."""
        self._attempt(self._devices.finish_restore, self._restored)
        self._attempt(self._devices.introduce, self._strangers)
        self._told.update(self._failures)

    def _new_macs(self, pods: Sequence[Pod], indexes: dict[str, int]) -> dict[int, str]:
        macs, before = self._devices.macs(), self._macs
        own = {indexes[pod.device]: pod.mac for pod in pods}
        self._macs = {number: mac for number, mac in macs.items() if number in own and mac != own[number]}
        changed = self._macs.keys() | before.keys()  # those that have theirs back, too
        self._strangers = [pod for pod in pods if indexes[pod.device] in changed]
        return self._macs

    def _attempt(self, action: Callable[[Pod], None], pods: Iterable[Pod]) -> list[Pod]:
        """Do it for each pod; return those for which it worked, and note the failures of the others."""
        done = []
        for pod in pods:
            try:
                action(pod)
            except KernelError as error:
                self._failures[f"device {pod.device}"] = error
            else:
                done.append(pod)
        return done


def _lacks_shaper(pod: Pod, existing: Collection[str]) -> bool:
    """Say whether only the shaper is missing: with the pair it is made again as well."""
    return bool(pod.limits.egress_rate) and pod.device in existing and shaper_of(pod.device) not in existing
