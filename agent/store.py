"""The IPAM store: the truth about local pods, in SQLite.

One row per attachment, one per address; the address is a primary key, so no bug can give it twice. A row passes through
three phases. Only an active one outlives the agent: at start, rows that are not active (an ADD or DEL that a crash cut
short) and rows of an earlier boot (their pods are gone) are for the agent to release.

Commits are WAL with synchronous=NORMAL: they survive the death of the process at any instruction. A power loss may
take the last ones, and takes their pods as well.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from agent.ranges import Range, next_free
from agent.state import Address
from cni.call import Attachment

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE attachment (
    network TEXT NOT NULL,
    container_id TEXT NOT NULL,
    ifname TEXT NOT NULL,
    phase TEXT NOT NULL,
    device TEXT NOT NULL UNIQUE,
    mac TEXT NOT NULL,
    mtu INTEGER NOT NULL,
    netns_path TEXT NOT NULL,
    netns_id TEXT NOT NULL,
    boot_id TEXT NOT NULL,
    PRIMARY KEY (network, container_id, ifname)
) STRICT;
CREATE TABLE address (
    address BLOB PRIMARY KEY CHECK (length(address) = 16),
    device TEXT NOT NULL REFERENCES attachment (device) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;
CREATE INDEX address_device ON address (device);
CREATE TABLE last_given (family INTEGER PRIMARY KEY, address BLOB NOT NULL) STRICT;
"""


class StoreError(Exception):
    """The store cannot be opened or used; the message names the file."""


class AttachmentExists(Exception):
    """The attachment has its addresses already."""


class RangeExhausted(Exception):
    """All addresses of a family are in use; the message names the ranges."""


class Phase(StrEnum):
    """How far an attachment has come."""

    RESERVED = "reserved"  # ADD is at work
    ACTIVE = "active"  # ADD is done
    RELEASING = "releasing"  # DEL is at work


@dataclass(frozen=True, slots=True)
class Netns:
    """A pod's network namespace: the path that the runtime gave, and the identity "inode:cookie" of what was there."""

    path: str
    id: str


@dataclass(frozen=True, slots=True)
class Pod:
    """One attachment as the store knows it. `device` is the host end of its veth pair, `mac` the pod's own MAC."""

    attachment: Attachment
    device: str
    mac: str
    mtu: int
    netns: Netns
    addresses: tuple[Address, ...]
    phase: Phase
    boot_id: str


class Store:
    """The database, used from many threads; each method is one transaction. All may raise StoreError."""

    def __init__(self, path: Path, ranges: Sequence[Range], boot_id: str) -> None:
        """Open or create the database. Raises StoreError."""
        self._ranges = {
            family: [each for each in ranges if each.first.version == family]
            for family in sorted({each.first.version for each in ranges})
        }
        self._boot_id = boot_id
        self._path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            path.chmod(0o600)
            self._prepare()
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"cannot open the IPAM store {path}: {error}") from error

    def _prepare(self) -> None:
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON", "busy_timeout = 5000"):
            self._db.execute(f"PRAGMA {pragma}")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._db.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {_SCHEMA_VERSION};COMMIT;")
        elif version != _SCHEMA_VERSION:
            raise StoreError(
                f"the IPAM store {self._path} has schema {version}, this agent knows {_SCHEMA_VERSION}:"
                " run the agent that made it"
            )

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

    def reserve(self, attachment: Attachment, *, device: str, mac: str, mtu: int, netns: Netns) -> Pod:
        """Give the attachment one address of each family, in phase RESERVED.

        Raises AttachmentExists or RangeExhausted; then nothing has changed.
        """
        with self._transaction() as db:
            try:
                db.execute(
                    "INSERT INTO attachment VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (*_key(attachment), Phase.RESERVED, device, mac, mtu, netns.path, netns.id, self._boot_id),
                )
            except sqlite3.IntegrityError as error:
                raise AttachmentExists(str(attachment)) from error
            addresses = tuple(_take_next(db, family, ranges, device) for family, ranges in self._ranges.items())
        return Pod(attachment, device, mac, mtu, netns, addresses, Phase.RESERVED, self._boot_id)

    def activate(self, attachment: Attachment) -> bool:
        """Make a reserved attachment active. Returns False if it is not reserved (any more)."""
        return self._move(attachment, Phase.ACTIVE, (Phase.RESERVED,))

    def begin_release(self, attachment: Attachment) -> bool:
        """Note that the attachment is going. Returns False if it is unknown."""
        return self._move(attachment, Phase.RELEASING, tuple(Phase))

    def _move(self, attachment: Attachment, to: Phase, origins: Sequence[Phase]) -> bool:
        places = ", ".join("?" * len(origins))
        with self._transaction() as db:
            cursor = db.execute(
                "UPDATE attachment SET phase = ? WHERE network = ? AND container_id = ? AND ifname = ?"  # noqa: S608
                f" AND phase IN ({places})",  # question marks only
                (to, *_key(attachment), *origins),
            )
            return cursor.rowcount == 1

    def remove(self, attachment: Attachment) -> None:
        """Forget the attachment: its addresses are free from here on."""
        with self._transaction() as db:
            db.execute("DELETE FROM attachment WHERE network = ? AND container_id = ? AND ifname = ?", _key(attachment))

    def pods(self) -> list[Pod]:
        """Return all attachments."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT network, container_id, ifname, device, mac, mtu, netns_path, netns_id, phase, boot_id"
                " FROM attachment"
            ).fetchall()
            addresses: dict[str, list[Address]] = {}
            for device, address in db.execute("SELECT device, address FROM address ORDER BY address"):
                addresses.setdefault(device, []).append(unpack(address))
        return [
            Pod(
                attachment=Attachment(*row[:3]),
                device=row[3],
                mac=row[4],
                mtu=row[5],
                netns=Netns(row[6], row[7]),
                addresses=_by_family(addresses.get(row[3], [])),
                phase=Phase(row[8]),
                boot_id=row[9],
            )
            for row in rows
        ]

    def get(self, attachment: Attachment) -> Pod | None:
        """Return one attachment, or None."""
        return next((pod for pod in self.pods() if pod.attachment == attachment), None)

    def exhausted(self) -> str:
        """Say which family has no address left; empty if all have some."""
        usage = self.usage()
        for family, ranges in self._ranges.items():
            if all(used == each.size for each, used in usage if each.first.version == family):
                return _exhaustion(ranges)
        return ""

    def usage(self) -> list[tuple[Range, int]]:
        """Return every configured range with the number of its addresses in use."""
        with self._transaction() as db:
            return [
                (each, sum(1 for _ in _used(db, each.first, each.last)))
                for ranges in self._ranges.values()
                for each in ranges
            ]


def _exhaustion(ranges: Sequence[Range]) -> str:
    return f"no free address in {', '.join(map(str, ranges))}: all {sum(each.size for each in ranges)} are in use"


def _key(attachment: Attachment) -> tuple[str, str, str]:
    return attachment.network, attachment.container_id, attachment.ifname


def _take_next(db: sqlite3.Connection, family: int, ranges: Sequence[Range], device: str) -> Address:
    row = db.execute("SELECT address FROM last_given WHERE family = ?", (family,)).fetchone()
    address = next_free(ranges, unpack(row[0]) if row else None, lambda first, last: _used(db, first, last))
    if address is None:
        raise RangeExhausted(_exhaustion(ranges))
    db.execute("INSERT INTO address VALUES (?, ?)", (pack(address), device))
    db.execute("INSERT OR REPLACE INTO last_given VALUES (?, ?)", (family, pack(address)))
    return address


def _used(db: sqlite3.Connection, first: Address, last: Address) -> Iterator[Address]:
    rows = db.execute(
        "SELECT address FROM address WHERE address BETWEEN ? AND ? ORDER BY address", (pack(first), pack(last))
    )
    return (unpack(address) for (address,) in rows)


def _by_family(addresses: list[Address]) -> tuple[Address, ...]:
    """IPv4 first, as `reserve` returns them: Kubernetes shows the first address as the pod's."""
    return tuple(sorted(addresses, key=lambda address: address.version))


def pack(address: Address) -> bytes:
    """Return the 16 bytes of an address; IPv4 is v4-mapped (RFC 4291 section 2.5.5.2)."""
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


def unpack(packed: bytes) -> Address:
    """Return the address of 16 bytes; the inverse of `pack`."""
    address = ip_address(packed)
    assert isinstance(address, IPv6Address)
    mapped: IPv4Address | None = address.ipv4_mapped
    return mapped or address
