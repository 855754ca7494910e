"""Which address of a pool an attachment gets, and what is remembered of those that come back.

Statements within a transaction of the store. An address is given again as late as possible: those come first that are
not among the last ones released, in the order of the pool's ring, then the one whose release is longest ago.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from agent.pods import IS, Pod, Published, key
from agent.ranges import Addresses, Pool, RangeExhausted, exhaustion, next_free
from agent.schema import pack, unpack
from agent.state import Address
from cni.call import Attachment

_RELEASES = 1024  # so many of the last releases are remembered: a search may have to walk over all of them


class AddressTaken(Exception):
    """An address is in use; the message says by whom."""


class HostPortTaken(Exception):
    """A host port is in use; the message says by whom."""


def hold(db: sqlite3.Connection, device: str, position: int, address: Address) -> None:
    """Note that an attachment has an address. Raises AddressTaken."""
    try:
        db.execute("INSERT INTO address VALUES (?, ?, ?)", (pack(address), device, position))
    except sqlite3.IntegrityError as error:
        raise AddressTaken(f"{address} is in use by {holder(db, address)}") from error
    db.execute("DELETE FROM former WHERE address = ?", (pack(address),))


def publish(db: sqlite3.Connection, device: str, published: Published) -> None:
    """Give an attachment a host port. Raises HostPortTaken; who has it at any address has it at each."""
    at = published.at
    others = db.execute(
        "SELECT address, network, container_id, ifname, pod_name FROM host_port JOIN attachment USING (device)"
        " WHERE port = ? AND protocol = ? AND device <> ?",
        (at.port, at.protocol, device),
    )
    for packed, *who in others:
        address = unpack(packed)
        is_any = address.is_unspecified or at.address.is_unspecified
        if address == at.address or (is_any and address.version == at.address.version):
            raise HostPortTaken(f"host port {at} is in use by {_named(who)}")
    row = (pack(at.address), at.port, at.protocol, published.port, device)
    db.execute("INSERT INTO host_port VALUES (?, ?, ?, ?, ?)", row)


def take_requested(db: sqlite3.Connection, pool: Pool, address: Address, device: str, position: int) -> Address:
    """Give an address that was asked for. Raises AddressTaken."""
    try:
        hold(db, device, position, address)
    except AddressTaken as error:
        raise AddressTaken(f"requested IP address {address} is not available in range set {pool} ({error})") from error
    _move_ring(db, pool, address)
    return address


def take_former(db: sqlite3.Connection, pool: Pool, pod: Pod, position: int) -> Address | None:
    """Give the address of the pool that the pod of this name had last, on this network and interface, if it is free."""
    rows = db.execute(
        "SELECT address FROM former WHERE pod_name = ? AND network = ? AND ifname = ? ORDER BY sequence DESC",
        (pod.pod_name, pod.attachment.network, pod.attachment.ifname),
    )
    address = next((each for (packed,) in rows if pool.gives(each := unpack(packed))), None)
    if address is not None:
        hold(db, pod.device, position, address)
    return address


def take_next(db: sqlite3.Connection, pool: Pool, device: str, position: int) -> Address:
    """Give the address whose turn it is. Raises RangeExhausted."""
    row = db.execute("SELECT address FROM last_given WHERE pool = ?", (pool.name,)).fetchone()
    last_given = unpack(row[0]) if row else None
    address = next_free(pool.ranges, last_given, lambda first, last: _resting(db, first, last), pool.withheld)
    if address is None:
        address = _longest_released(db, pool)
    if address is None:
        raise RangeExhausted(exhaustion(pool))
    hold(db, device, position, address)
    _move_ring(db, pool, address)
    return address


def remember(db: sqlite3.Connection, attachment: Attachment) -> None:
    """Note that an attachment's addresses are about to be free, and forget what was released long ago."""
    db.execute(
        "INSERT OR REPLACE INTO former (address, network, container_id, ifname, pod_name)"  # noqa: S608
        " SELECT address, network, container_id, ifname, pod_name FROM attachment JOIN address USING (device)"
        f" WHERE {IS} ORDER BY position",
        key(attachment),
    )
    db.execute("DELETE FROM former WHERE sequence <= (SELECT max(sequence) FROM former) - ?", (_RELEASES,))


def was_released(db: sqlite3.Connection, attachment: Attachment) -> bool:
    """Say whether an attachment is among those whose release is remembered."""
    return db.execute(f"SELECT 1 FROM former WHERE {IS}", key(attachment)).fetchone() is not None  # noqa: S608


def holder(db: sqlite3.Connection, address: Address) -> str:
    """Return who has an address, in words."""
    row = db.execute(
        "SELECT network, container_id, ifname, pod_name FROM attachment JOIN address USING (device) WHERE address = ?",
        (pack(address),),
    ).fetchone()
    return "nobody" if row is None else _named(row)


def _named(row: Sequence[str]) -> str:
    *attachment, pod_name = row
    return str(Attachment(*attachment)) + (f" (pod {pod_name})" if pod_name else "")


def used(db: sqlite3.Connection, first: Address, last: Address) -> Addresses:
    """Return the addresses of an interval that are in use, in ascending order."""
    rows = db.execute(
        "SELECT address FROM address WHERE address BETWEEN ? AND ? ORDER BY address", (pack(first), pack(last))
    )
    return _Addresses(rows.fetchall())


def count_used(db: sqlite3.Connection, first: Address, last: Address) -> int:
    """Return how many addresses of an interval are in use."""
    number: int = db.execute(
        "SELECT count(*) FROM address WHERE address BETWEEN ? AND ?", (pack(first), pack(last))
    ).fetchone()[0]
    return number


def _resting(db: sqlite3.Connection, first: Address, last: Address) -> Addresses:
    """Return the addresses of an interval that are, or lately were, in use, in ascending order."""
    interval = (pack(first), pack(last))
    rows = db.execute(
        "SELECT address FROM address WHERE address BETWEEN ? AND ?"
        " UNION SELECT address FROM former WHERE address BETWEEN ? AND ? ORDER BY address",
        interval * 2,
    )
    return _Addresses(rows.fetchall())


def _longest_released(db: sqlite3.Connection, pool: Pool) -> Address | None:
    oldest = []
    for each in pool.ranges:
        rows = db.execute(
            "SELECT sequence, address FROM former WHERE address BETWEEN ? AND ? ORDER BY sequence",
            (pack(each.first), pack(each.last)),
        )
        its = ((sequence, unpack(address)) for sequence, address in rows)
        oldest += [next((pair for pair in its if pool.gives(pair[1])), None)]
    return min((pair for pair in oldest if pair), default=(0, None), key=lambda pair: pair[0])[1]


def _move_ring(db: sqlite3.Connection, pool: Pool, address: Address) -> None:
    db.execute("INSERT OR REPLACE INTO last_given VALUES (?, ?)", (pool.name, pack(address)))


class _Addresses:
    """Addresses as the database has them; most are never looked at, so none is unpacked before."""

    def __init__(self, rows: list[tuple[bytes]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Address:
        return unpack(self._rows[index][0])
