"""The one writer of the kernel's shared state: the datapath's maps, hooks, neighbours and routes.

Everything else only wakes it. A pass plans the whole desired state and applies the difference to what is known to be
in the kernel; a full pass reads the kernel first, so that whatever was changed behind podlane's back is put back.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

from agent.diff import Delta, diff
from agent.failures import Failures
from agent.plan import Inside, Outside, plan, routed_subnets
from agent.pods import shaper_of
from agent.rounds import Rounds
from agent.state import Address, KernelError, State, Table
from agent.store import AddressTaken, Phase, Pod, Store
from agent.tables import MANY, NAMES, Tables, in_order, surely_outdated
from agent.upkeep import Devices, Upkeep

log = logging.getLogger(__name__)

_FULL_PASS_PAUSE = 0.2  # seconds; a burst of kernel events leads to one full pass, not to one each
_SHARE = 100  # times as long as reading them took, the tables of other nodes are not read again
_QUIET = 1.0  # seconds without a request, after which there is time for what can wait
_PATIENCE = 600.0  # seconds without a round: ten times what the agent waits for its first pass, in the largest cluster


class Reading(IntEnum):
    """What a pass reads of the kernel before it plans."""

    NOTHING = 0
    PODS = 1
    """All tables but those of other nodes, and the pods' devices: what a pod needs, and that does not take long."""
    ALL = 2
    """These too, unless it is too soon (`_SHARE`), and the node's surroundings."""


_NOTHING = Outside()


class Loop:
    """Brings the kernel to the plan, in a thread of its own.

    It tells `repaired(kind, count)` what had to be put back, and calls `settle` when nobody waits, for as long as that
    returns True: there is more to do.
    """

    def __init__(
        self,
        *,
        store: Store,
        tables: Tables,
        devices: Devices,
        repaired: Callable[[str, int], None],
        settle: Callable[[], bool],
        resync_seconds: float,
        outside: Callable[[bool], Outside] = lambda _look: _NOTHING,
        sysctls: Callable[[], Sequence[str]] = tuple,
        patience_seconds: float = _PATIENCE,
    ) -> None:
        """`outside` tells what the plan is made for, and may raise KernelError.

        It is asked with every pass, and told whether to look at the kernel, as in a full pass; what else changes, the
        cluster, costs it nothing to know. `sysctls` is called with every full pass: see `Upkeep`. For
        `patience_seconds` see `Rounds`.
        """
        self._store = store
        self._tables = tables
        self._devices = devices
        self._upkeep = Upkeep(devices, repaired, sysctls)
        self._repaired = repaired
        self._settle = settle
        self._interval = resync_seconds
        self._ask_outside = outside
        self._outside = Outside()
        self._inside = Inside()
        self._indexes: dict[str, int] = {}  # of devices, by name
        self._known: State | None = None  # what is in the kernel, as far as we know
        self._settled = State()  # the last plan, if all of it is in force
        self._failures = Failures()  # of the tables, by object
        self._settle_failures = Failures()
        self._condition = threading.Condition()
        self._requested = 0  # passes asked for
        self._done = 0  # requests that a finished pass has covered
        self._trouble = ""  # why the last pass failed as a whole, if it did
        self._pods_asked = False  # whether a caller wants `Reading.PODS`
        self._full_due = time.monotonic()
        self._many_due = self._full_due
        self._settle_due = self._full_due + _QUIET
        self._guests: tuple[Pod, ...] = ()
        self._stopped = False
        self._rounds = Rounds(patience_seconds)
        self._thread = threading.Thread(target=self._run, name="loop", daemon=True)

    def start(self) -> None:
        """Start the thread; its first pass is a full one."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the pass in hand."""
        with self._condition:
            self._stopped = True
            self._condition.notify_all()
        self._thread.join(timeout=1)

    def trouble(self) -> str:
        """Say why the last pass failed as a whole, or that there will be none; empty if all is well."""
        if self._thread.ident is not None and not self._thread.is_alive():
            return "the loop has ended"
        return self._trouble

    def hung(self) -> str:
        """Say that no pass ends any more, nor begins; empty if all is well. A pass that fails is one that ends."""
        return self._rounds.missed()

    def kernel_changed(self) -> None:
        """Note that something may have changed behind our back: a full pass follows soon."""
        with self._condition:
            self._full_due = min(self._full_due, time.monotonic() + _FULL_PASS_PAUSE)
            self._condition.notify_all()

    def wake(self) -> None:
        """Ask for a pass, not a full one, as when the cluster has changed."""
        with self._condition:
            self._requested += 1
            self._condition.notify_all()

    @contextmanager
    def guest(self, pod: Pod) -> Iterator[None]:
        """Plan for a pod that is not in the store, as long as this block lasts; `sync` brings either into force."""
        self._guests = (*self._guests, pod)
        try:
            yield
        finally:
            self._guests = tuple(each for each in self._guests if each is not pod)

    def sync(self, timeout: float, *, look: bool = False) -> None:
        """Wait until a pass that began after this call has ended; with `look`, one that has read the pods' tables.

        Raises TimeoutError after `timeout` seconds, and KernelError if the pass failed as a whole.
        """
        with self._condition:
            self._pods_asked |= look
            self._requested += 1
            ticket = self._requested
            self._condition.notify_all()
            if not self._condition.wait_for(lambda: self._done >= ticket, timeout):
                raise TimeoutError(f"the kernel was not brought up to date within {timeout:g} s")
            if self._trouble:
                raise KernelError(f"the kernel cannot be brought up to date: {self._trouble}")

    def refuse_own(self, addresses: Iterable[Address]) -> None:
        """Raise AddressTaken for the node's own, and its routes' next hops: the pod would get what they are to get."""
        addresses, uplinks = set(addresses), self._outside.uplinks.values()
        for address in self._outside.node_addresses & addresses:
            raise AddressTaken(f"{address} is in use by the node itself")
        for address in frozenset[Address]().union(*(uplink.gateways for uplink in uplinks)) & addresses:
            raise AddressTaken(f"{address} is in use by a next hop of the node's routes")

    def refusal(self, table: str, key: object) -> str:
        """Say why the kernel refuses an object of a table at present; empty if it does not."""
        return self._failures.get(f"{table} {key}") or ""

    def check(self, pod: Pod) -> None:
        """Raise KernelError unless all that the pod needs is in force, as far as the last pass knows."""
        known = self._known or State()
        desired = plan([pod], self._devices.indexes([pod]), inside=self._inside)
        if not desired.hooks:
            raise KernelError(f"device {pod.device} is missing")
        if pod.limits.egress_rate and not any(each.shaper for each in desired.endpoints.values()):
            raise KernelError(f"device {shaper_of(pod.device)} is missing: what the pod sends is not limited")
        for name in NAMES:
            needed = getattr(desired, name)
            for key in diff(needed, getattr(known, name)).upsert if needed else ():
                raise KernelError(self.refusal(name, key) or f"{name} {key} is not in force")

    def _run(self) -> None:
        while True:
            with self._condition:
                due = self._rounds.note()
                while not self._has_work():
                    # Not wait_for(): its time is fixed, and kernel_changed() may bring the full pass forward.
                    self._condition.wait(min(self._full_due, self._settle_due, due) - time.monotonic())
                    due = self._rounds.note()
                if self._stopped:
                    return
                covered = self._requested
                reading = self._reading_due()
            if reading is Reading.NOTHING and covered == self._done:
                self._settle_due = time.monotonic() if self._try_settle() else math.inf
                continue
            trouble = self._try_pass(reading)
            with self._condition:
                self._trouble = trouble
                quiet_from = time.monotonic() + _QUIET
                self._settle_due = quiet_from if covered > self._done else min(self._settle_due, quiet_from)
                self._done = covered
                self._condition.notify_all()

    def _reading_due(self) -> Reading:
        """Return what is due now, and note it as done: what comes to be due during the pass is for the next one."""
        asked, self._pods_asked = self._pods_asked, False
        if time.monotonic() >= self._full_due:
            self._full_due = time.monotonic() + self._interval
            return Reading.ALL
        return Reading.PODS if asked else Reading.NOTHING

    def _try_settle(self) -> bool:
        """Return whether there is more to settle now; after a failure it waits for its next turn."""
        try:
            return self._settle()
        except Exception as error:  # as in a pass: the thread must live
            self._settle_failures.update({"settling": error})
            return False

    def _try_pass(self, reading: Reading) -> str:
        """Return what went wrong, if anything: kernel and store may be in trouble for a while, the pods must not be."""
        try:
            self._pass(reading)
        except Exception as error:
            self._known = None
            trouble = str(error) or repr(error)
            if trouble != self._trouble:
                log.exception("pass failed, and will be tried again")
            return trouble
        return ""

    def _has_work(self) -> bool:
        due = min(self._full_due, self._settle_due)
        return self._stopped or self._requested > self._done or time.monotonic() >= due

    def _pass(self, reading: Reading) -> None:
        pods = [*self._store.pods(), *self._guests]
        before, macs, queued = self._known, self._inside.macs, self._inside.queued
        reading = Reading.ALL if before is None else reading
        uplinks = self._outside.uplinks
        self._outside = self._ask_outside(reading is Reading.ALL)
        if self._outside.uplinks != uplinks:
            self._many_due = time.monotonic()  # with a device that was down, the kernel has dropped its routes
        if reading:
            macs, queued = self._upkeep.begin(pods), self._devices.queued()
            self._known = self._read(before, reading)
        known = self._known
        assert known is not None
        self._inside = Inside(routed_subnets(pods, self._outside.node_addresses), macs, queued)
        self._indexes = self._current_indexes(pods, {} if reading else self._indexes)
        desired = self._plan(pods)
        if before is not None and known is not before:
            self._count_repairs(desired, before, known)
        self._apply(desired, known)
        outside = self._ask_outside(False)
        if outside is not self._outside:  # a device was made, whose index the rest has waited for
            self._outside = outside
            self._apply(self._plan(pods), known)
        if reading:
            self._upkeep.finish()

    def _read(self, before: State | None, reading: Reading) -> State:
        """Read the kernel; but what there may be thousands of, so seldom that it takes little of a processor."""
        tables: dict[str, Any] = {}
        spent, is_due = 0.0, before is None or (reading is Reading.ALL and time.monotonic() >= self._many_due)
        for name in NAMES:
            if name not in MANY:
                tables[name] = self._table(name).read()
                continue
            tables[name] = known = getattr(before, name, None)
            if is_due:
                started = time.thread_time()
                found = self._table(name).read()
                spent += time.thread_time() - started
                if found != known:  # as a rule they are equal, and it is better to keep one of them than both
                    tables[name], self._settled = found, State()
        if is_due:
            self._many_due = time.monotonic() + _SHARE * spent
        return State(**tables)

    def _current_indexes(self, pods: Sequence[Pod], known: dict[str, int]) -> dict[str, int]:
        """Return `Devices.indexes`. Those of active pods are as `known`: were they not, a full pass would be due."""
        settled = [pod for pod in pods if pod.phase is Phase.ACTIVE and pod.device in known]
        names = {name for pod in settled for name in (pod.device, shaper_of(pod.device)) if name in known}
        others = self._devices.indexes([pod for pod in pods if pod.device not in names])
        return {name: known[name] for name in names} | others

    def _plan(self, pods: Sequence[Pod]) -> State:
        subnets = [*self._store.subnets, *(each.network for each in self._inside.subnets)]
        return plan(pods, self._indexes, subnets, self._outside, self._inside)

    def _count_repairs(self, desired: State, before: State, now: State) -> None:
        """Count as repairs the changes that are due now and were not before the kernel was read again."""
        for name in NAMES:
            want, there, was_there = getattr(desired, name), getattr(now, name), getattr(before, name)
            if there is was_there:  # not read again
                continue
            due, was_due = diff(want, there), diff(want, was_there)
            repairs = (due.upsert.keys() - was_due.upsert.keys()) | (due.delete - was_due.delete)
            if repairs:
                self._repaired(name, len(repairs))
                log.warning("repaired kind=%s count=%d first=%s", name, len(repairs), next(iter(repairs)))

    def _apply(self, desired: State, known: State) -> None:
        failures: dict[str, KernelError] = {}
        deltas = {name: self._delta(name, getattr(desired, name), getattr(known, name)) for name in NAMES}
        for name, upsert in in_order(deltas, known):
            if upsert:
                failed = self._table(name).upsert(upsert)
                failures |= {f"{name} {key}": error for key, error in failed.items()}
                getattr(known, name).update({k: v for k, v in upsert.items() if k not in failed})
        for name, delta in reversed(deltas.items()):
            outdated = delta.delete if self._outside.live else surely_outdated(name, delta.delete, known)
            if outdated:
                failed = self._table(name).delete(outdated)
                failures |= {f"{name} {key}": error for key, error in failed.items()}
                for key in outdated - failed.keys():
                    getattr(known, name).pop(key, None)
        self._failures.update(failures)
        self._settled = desired if not failures else State()

    def _delta(self, name: str, desired: dict[Any, Any], known: dict[Any, Any]) -> Delta[Any, Any]:
        """Compare; but not again what the last pass has brought in force: of other nodes there may be thousands."""
        if desired is getattr(self._settled, name) and self._outside.live:
            return Delta({}, frozenset())
        return diff(desired, known)

    def _table(self, name: str) -> Table[Any, Any]:
        table: Table[Any, Any] = getattr(self._tables, name)
        return table
