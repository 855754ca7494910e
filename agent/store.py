"""The IPAM store: the truth about local pods, in SQLite.

One row per attachment, one per address; the address is a primary key, so no bug can give it twice, not even on two
networks. A row passes through three phases. Only an active one outlives the agent, and an imported one, whose pod
another plugin has wired: at start, rows that are neither (an ADD or DEL that a crash cut short) and rows of an earlier
boot (their pods are gone) are for the agent to release.

Commits are WAL with synchronous=NORMAL: they survive the death of the process at any instruction. A power loss may
take the last ones, and takes their pods as well.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from agent import allotment, pods, schema
from agent.allotment import AddressTaken, HostPortTaken
from agent.pods import IS, NO_LIMITS, Netns, Origin, Phase, Pod, Published, Subnet, encode_subnets, key
from agent.ranges import AddressNotInRange, Pool, Range, RangeExhausted, exhaustion, match_requests, next_free
from agent.schema import pack, unpack
from agent.state import Address, Network
from cni.call import Attachment
from cni.netconf import Bandwidth

__all__ = [
    "AddressNotInRange",
    "AddressTaken",
    "AttachmentExists",
    "HostPortTaken",
    "Netns",
    "Origin",
    "Phase",
    "Pod",
    "Pool",
    "Published",
    "RangeExhausted",
    "Store",
    "StoreError",
    "Subnet",
    "pack",
    "unpack",
]


class StoreError(Exception):
    """The store cannot be opened or used; the message names the file."""


class AttachmentExists(Exception):
    """The attachment has its addresses already."""


class Store:
    """The database, used from many threads; each method is one transaction. All may raise StoreError."""

    def __init__(
        self,
        path: Path,
        ranges: Sequence[Range],
        boot_id: str,
        *,
        exclude: Sequence[Network] = (),
        reserved: Sequence[Network] = (),
        sticky: bool = False,
    ) -> None:
        """Open, create or migrate the database. Raises StoreError.

        `ranges` are the agent's own; `exclude`, `reserved` and `sticky` apply to them.
        """
        self._pools_of = partial(_default_pools, exclude=exclude, reserved=reserved)
        self.default_pools = self._pools_of(ranges)
        self._sticky = sticky
        self.boot_id = boot_id
        self._path = path
        self._lock = threading.Lock()
        self._decoded: dict[pods.Row, Pod] = {}  # of the last time that all were asked for
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            path.chmod(0o600)
            schema.prepare(self._db)
        except schema.UnknownSchema as error:
            raise StoreError(f"the IPAM store {path} {error}") from error
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"cannot open the IPAM store {path}: {error}") from error

    def set_ranges(self, ranges: Sequence[Range]) -> None:
        """Give addresses of these from now on, in place of the agent's own ones before; pods keep what they have."""
        self.default_pools = self._pools_of(ranges)

    @property
    def subnets(self) -> tuple[Network, ...]:
        """The subnets of the agent's own ranges."""
        return tuple(each.subnet for pool in self.default_pools for each in pool.ranges)

    def close(self) -> None:
        """Close the database; the store cannot be used afterwards."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Do all of it or nothing; one thread at a time. Raises StoreError."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                raise StoreError(f"cannot use the IPAM store {self._path}: {error}") from error
            finally:
                if self._db.in_transaction:  # SQLite itself rolls back when the disk fails
                    self._db.execute("ROLLBACK")

    def reserve(
        self,
        attachment: Attachment,
        *,
        device: str,
        mac: str,
        mtu: int,
        netns: Netns,
        pools: Sequence[Pool] | None = None,
        requested: Sequence[Address] = (),
        pod_name: str = "",
        masquerade: bool | None = None,
        origin: Origin | None = None,
        sticky: bool = False,
        limits: Bandwidth | None = None,
        published: Sequence[Published] = (),
    ) -> Pod:
        """Give the attachment one address of each pool, in phase RESERVED.

        `pools` default to the agent's own ranges, one for each family, with their own setting of `sticky`. Each of the
        `requested` addresses is for the first pool that has it. With `sticky`, the pod of this name gets the addresses
        that it had last on this network and interface, where they are free. Raises AttachmentExists, RangeExhausted,
        AddressTaken, AddressNotInRange or HostPortTaken; then nothing has changed.
        """
        if pools is None:
            pools, sticky = self.default_pools, self._sticky
            if not pools:
                raise RangeExhausted("this node has no addresses of its own to give")
        requests = match_requests(pools, requested)
        pod = Pod(
            attachment=attachment,
            device=device,
            mac=mac,
            mtu=mtu,
            netns=netns,
            addresses=(),
            phase=Phase.RESERVED,
            boot_id=self.boot_id,
            pod_name=pod_name,
            masquerade=masquerade,
            origin=origin or Origin(),
            limits=limits if limits and limits.limits else NO_LIMITS,
            published=tuple(published),
        )
        with self._transaction() as db:
            _insert(db, pod)
            for each in published:
                allotment.publish(db, device, each)
            addresses = [
                _take(db, pod, position, pool, request, sticky=sticky)
                for position, (pool, request) in enumerate(zip(pools, requests, strict=True))
            ]
        return replace(pod, addresses=tuple(addresses))

    def assign(self, attachment: Attachment, addresses: Sequence[Address], subnets: Sequence[Subnet] = ()) -> bool:
        """Note addresses that somebody else has chosen for a reserved attachment, after those that it has.

        `subnets` are those of all its addresses. Returns False if it is not reserved (any more). Raises AddressTaken;
        then nothing has changed.
        """
        with self._transaction() as db:
            row = db.execute(
                f"UPDATE attachment SET subnets = ? WHERE {IS} AND phase = ? RETURNING device",  # noqa: S608
                (encode_subnets(subnets), *key(attachment), Phase.RESERVED),
            ).fetchone()
            if row is None:
                return False
            (count,) = db.execute("SELECT count(*) FROM address WHERE device = ?", row).fetchone()
            for position, address in enumerate(addresses, start=count):
                allotment.hold(db, row[0], position, address)
        return True

    def adopt(self, strangers: Iterable[Pod], last_given: Mapping[str, Address]) -> list[Pod]:
        """Take over attachments with their addresses; return those that were not known yet.

        What the store knows already stays as it is, and so do rings that have begun: `last_given` is by pool name. An
        attachment that is unknown since it was released is not taken again. Raises AddressTaken, and AttachmentExists
        for one that is podlane's own and has other addresses; then nothing has changed.
        """
        with self._transaction() as db:
            adopted = [pod for pod in strangers if _adopt(db, pod)]
            for pool, address in last_given.items():
                db.execute("INSERT OR IGNORE INTO last_given VALUES (?, ?)", (pool, pack(address)))
        return adopted

    def activate(self, attachment: Attachment, routes: str = "", own: Sequence[Address] = ()) -> bool:
        """Make a reserved attachment active, with these `Pod.routes`.

        `own` are its addresses if they are of the agent's own ranges. Returns False if it is not reserved (any more).
        Raises AddressNotInRange if the agent's ranges are others by now; then nothing has changed.
        """
        with self._transaction() as db:
            if own:
                _check_current(self.default_pools, own)
            cursor = db.execute(
                f"UPDATE attachment SET phase = ?, routes = ? WHERE {IS} AND phase = ?",  # noqa: S608
                (Phase.ACTIVE, routes, *key(attachment), Phase.RESERVED),
            )
            return cursor.rowcount == 1

    def begin_release(self, attachment: Attachment) -> bool:
        """Note that the attachment is going. Returns False if it is unknown."""
        with self._transaction() as db:
            cursor = db.execute(
                f"UPDATE attachment SET phase = ? WHERE {IS}",  # noqa: S608
                (Phase.RELEASING, *key(attachment)),
            )
            return cursor.rowcount == 1

    def remove(self, attachment: Attachment) -> None:
        """Forget the attachment: its addresses are free from here on."""
        with self._transaction() as db:
            allotment.remember(db, attachment)
            db.execute(f"DELETE FROM attachment WHERE {IS}", key(attachment))  # noqa: S608

    def pods(self) -> list[Pod]:
        """Return all attachments."""
        with self._transaction() as db:
            self._decoded = pods.find_all(db, self._decoded)
            return list(self._decoded.values())

    def get(self, attachment: Attachment) -> Pod | None:
        """Return one attachment, or None."""
        with self._transaction() as db:
            return pods.find(db, attachment)

    def exhausted(self, pools: Sequence[Pool] | None = None) -> str:
        """Say which pool, of the agent's own or the given ones, has no address left; empty if all have some."""
        with self._transaction() as db:
            for pool in self.default_pools if pools is None else pools:
                if next_free(pool.ranges, None, lambda *span: allotment.used(db, *span), pool.withheld) is None:
                    return exhaustion(pool)
        return ""

    def usage(self) -> list[tuple[Range, int]]:
        """Return each of the agent's own ranges with the number of its addresses in use."""
        with self._transaction() as db:
            return [
                (each, allotment.count_used(db, each.first, each.last))
                for pool in self.default_pools
                for each in pool.ranges
            ]


def _default_pools(
    ranges: Sequence[Range], exclude: Sequence[Network], reserved: Sequence[Network]
) -> tuple[Pool, ...]:
    """One for each family, IPv4 first: Kubernetes shows the first address as the pod's."""
    families = sorted({each.first.version for each in ranges})
    return tuple(
        Pool(
            name=f"ranges/ipv{family}",  # a network's own pools are numbered, so that none of them is called like this
            ranges=tuple(each for each in ranges if each.first.version == family),
            excluded=tuple(exclude),
            reserved=tuple(reserved),
        )
        for family in families
    )


def _check_current(pools: Sequence[Pool], addresses: Sequence[Address]) -> None:
    if len(pools) != len(addresses) or not all(map(Pool.__contains__, pools, addresses)):
        given, allowed = ", ".join(map(str, addresses)), "; ".join(map(str, pools)) or "none"
        raise AddressNotInRange(f"{given} (allowed is by now one of each range set: {allowed})")


def _insert(db: sqlite3.Connection, pod: Pod) -> None:
    try:
        pods.insert(db, pod)
    except sqlite3.IntegrityError as error:
        raise AttachmentExists(str(pod.attachment)) from error


def _take(
    db: sqlite3.Connection, pod: Pod, position: int, pool: Pool, requested: Address | None, *, sticky: bool
) -> Address:
    try:
        if requested is not None:
            return allotment.take_requested(db, pool, requested, pod.device, position)
        if sticky and pod.pod_name:
            former = allotment.take_former(db, pool, pod, position)
            if former is not None:
                return former
        return allotment.take_next(db, pool, pod.device, position)
    except (AddressTaken, RangeExhausted) as error:
        raise type(error)(f"failed to allocate for range {position}: {error}") from error


def _adopt(db: sqlite3.Connection, pod: Pod) -> bool:
    known = pods.find(db, pod.attachment)
    if known is None:
        if allotment.was_released(db, pod.attachment):
            return False
        pods.insert(db, pod)
    missing = [each for each in pod.addresses if known is None or each not in known.addresses]
    if missing and known and known.phase is not Phase.IMPORTED:
        raise AttachmentExists(f"{pod.attachment} is no imported attachment, and has not {missing[0]}")
    for position, address in enumerate(missing, start=len(known.addresses) if known else 0):
        allotment.hold(db, pod.device, position, address)
    return bool(missing)
