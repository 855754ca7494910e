"""The tables of the IPAM store, how addresses are written in them, and how a store of an older agent becomes one."""

from __future__ import annotations

import sqlite3
from ipaddress import IPv4Address, IPv6Address

from agent.state import Address

VERSION = 4

_V4_MAPPED = bytes(10) + b"\xff\xff"

# The address of a host port is 0.0.0.0 or :: where it is any of the family.
_HOST_PORT = """
CREATE TABLE host_port (
    address BLOB NOT NULL CHECK (length(address) = 16),
    port INTEGER NOT NULL,
    protocol INTEGER NOT NULL,
    pod_port INTEGER NOT NULL,
    device TEXT NOT NULL REFERENCES attachment (device) ON DELETE CASCADE,
    PRIMARY KEY (address, port, protocol)
) STRICT, WITHOUT ROWID;
CREATE INDEX host_port_device ON host_port (device);
"""

# An address's `position` is its place in the pod's result. `former` has what was released, the oldest first.
_SCHEMA = f"""
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
    pod_name TEXT NOT NULL,
    masquerade INTEGER CHECK (masquerade IN (0, 1)),
    environment TEXT NOT NULL,
    stdin BLOB NOT NULL,
    routes TEXT NOT NULL,
    subnets TEXT NOT NULL,
    limits TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (network, container_id, ifname)
) STRICT;
CREATE TABLE address (
    address BLOB PRIMARY KEY CHECK (length(address) = 16),
    device TEXT NOT NULL REFERENCES attachment (device) ON DELETE CASCADE,
    position INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX address_device ON address (device);
CREATE TABLE last_given (pool TEXT PRIMARY KEY, address BLOB NOT NULL) STRICT;
CREATE TABLE former (
    sequence INTEGER PRIMARY KEY,
    address BLOB NOT NULL UNIQUE CHECK (length(address) = 16),
    network TEXT NOT NULL,
    container_id TEXT NOT NULL,
    ifname TEXT NOT NULL,
    pod_name TEXT NOT NULL
) STRICT;
CREATE INDEX former_pod ON former (pod_name, network, ifname);
{_HOST_PORT}"""

# Schema 1 had one ring per family, and neither names, origins nor former addresses. IPv4 came first in a pod's result:
# a v4-mapped address (pack) begins with twelve bytes that no IPv6 address of a pod has.
_FROM_1 = f"""
ALTER TABLE attachment RENAME TO attachment_1;
ALTER TABLE address RENAME TO address_1;
ALTER TABLE last_given RENAME TO last_given_1;
DROP INDEX address_device;
{_SCHEMA}
INSERT INTO attachment SELECT *, '', NULL, '{{}}', x'', '', '[]', '' FROM attachment_1;
INSERT INTO address
    SELECT address, device, substr(address, 1, 12) <> x'00000000000000000000ffff' FROM address_1;
INSERT INTO last_given SELECT 'ranges/ipv' || family, address FROM last_given_1;
DROP TABLE address_1;
DROP TABLE attachment_1;
DROP TABLE last_given_1;
"""  # noqa: S608
# Schema 2 had no limits, schema 3 no host ports.
_FROM_2 = f"""
ALTER TABLE attachment ADD COLUMN limits TEXT NOT NULL DEFAULT '';
{_HOST_PORT}"""
_MIGRATIONS = {0: _SCHEMA, 1: _FROM_1, 2: _FROM_2, 3: _HOST_PORT}


class UnknownSchema(Exception):
    """The database was made by a newer agent; the message has both versions."""


def prepare(db: sqlite3.Connection) -> None:
    """Set the connection up, and make or migrate the tables, in one transaction.

    Raises UnknownSchema and sqlite3.Error; then the tables are as they were.
    """
    for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "busy_timeout = 5000"):
        db.execute(f"PRAGMA {pragma}")
    if _version(db) != VERSION:
        _migrate(db)
    db.execute("PRAGMA foreign_keys = ON")


def _version(db: sqlite3.Connection) -> int:
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    return version


def _migrate(db: sqlite3.Connection) -> None:
    # Foreign keys are off by default, and legacy_alter_table keeps references from following a renamed table.
    db.execute("PRAGMA legacy_alter_table = ON")
    db.execute("BEGIN IMMEDIATE")
    try:
        version = _version(db)  # again: another process may have been faster
        if version != VERSION:
            if version not in _MIGRATIONS:
                raise UnknownSchema(f"has schema {version}, this agent knows {VERSION}: run the agent that made it")
            for statement in _MIGRATIONS[version].split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {VERSION}")
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def pack(address: Address) -> bytes:
    """Return the 16 bytes of an address; IPv4 is v4-mapped (RFC 4291 section 2.5.5.2)."""
    return address.packed if address.version == 6 else _V4_MAPPED + address.packed


def unpack(packed: bytes) -> Address:
    """Return the address of 16 bytes; the inverse of `pack`."""
    return IPv4Address(packed[12:]) if packed.startswith(_V4_MAPPED) else IPv6Address(packed)
