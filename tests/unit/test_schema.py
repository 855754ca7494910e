"""The IPAM store's tables: what becomes of a database that another version of the agent made."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path

import pytest

from agent.schema import VERSION
from agent.state import HostPort
from agent.store import Netns, Phase, Pod, Published, StoreError
from cni.call import Attachment
from cni.netconf import Bandwidth
from tests.unit.stores import NETNS, addresses, attachment, open_store, reserve

# Dumped from a database that the last agent with schema 1 wrote: three ADDs, one of them deleted, one being deleted.
SCHEMA_1 = """
BEGIN TRANSACTION;
CREATE TABLE address (
    address BLOB PRIMARY KEY CHECK (length(address) = 16),
    device TEXT NOT NULL REFERENCES attachment (device) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;
INSERT INTO "address" VALUES(X'00000000000000000000FFFF0A000001','pla');
INSERT INTO "address" VALUES(X'FD000000000000000000000000000001','pla');
INSERT INTO "address" VALUES(X'00000000000000000000FFFF0A000002','plb');
INSERT INTO "address" VALUES(X'FD000000000000000000000000000002','plb');
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
INSERT INTO "attachment"
    VALUES('net','container-a','eth0','active','pla','02:00:00:00:00:0a',1450,'/run/netns/a','4:1','boot');
INSERT INTO "attachment"
    VALUES('net','container-b','eth0','releasing','plb','02:00:00:00:00:0b',1450,'/run/netns/b','4:1','boot');
CREATE TABLE last_given (family INTEGER PRIMARY KEY, address BLOB NOT NULL) STRICT;
INSERT INTO "last_given" VALUES(4,X'00000000000000000000FFFF0A000003');
INSERT INTO "last_given" VALUES(6,X'FD000000000000000000000000000003');
CREATE INDEX address_device ON address (device);
PRAGMA user_version = 1;
COMMIT;
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Make a database of schema 1."""
    path = tmp_path / "ipam.db"
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript(SCHEMA_1)
    db.close()
    return path


def tables(path: Path) -> list[tuple[str, ...]]:
    """Return the definitions of all tables and indexes."""
    db = sqlite3.connect(path)
    try:
        rows = db.execute("SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY name").fetchall()
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        return rows
    finally:
        db.close()


def columns(path: Path) -> dict[str, list[tuple[str, ...]]]:
    """Return the columns of each table and index: a column that was added later is written elsewhere in its text."""
    names = [name for _, name, _ in tables(path)]
    db = sqlite3.connect(path)
    try:
        return {name: db.execute(f"PRAGMA table_xinfo({name})").fetchall() for name in names}  # names are our own
    finally:
        db.close()


def test_schema_1_is_taken_over(old: Path, tmp_path: Path) -> None:
    """Pods, phases, addresses in their order and both rings of a schema 1 database go on in the tables of today."""
    store = open_store(old)
    pods = [
        Pod(
            attachment=Attachment("net", f"container-{name}", "eth0"),
            device=f"pl{name}",
            mac=f"02:00:00:00:00:0{name}",
            mtu=1450,
            netns=Netns(f"/run/netns/{name}", "4:1"),
            addresses=(ip_address(f"10.0.0.{number}"), ip_address(f"fd00::{number}")),
            phase=phase,
            boot_id="boot",
        )
        for number, name, phase in ((1, "a", Phase.ACTIVE), (2, "b", Phase.RELEASING))
    ]
    assert store.pods() == pods
    assert addresses(reserve(store, attachment("c"))) == ["10.0.0.4", "fd00::3"]
    store.remove(pods[0].attachment)
    assert [pod.attachment.container_id for pod in store.pods()] == ["container-b", "container-c"]
    store.close()
    open_store(tmp_path / "new.db").close()
    assert tables(old) == tables(tmp_path / "new.db")


# What turns a database of today into one of an earlier schema.
EARLIER = {
    2: "ALTER TABLE attachment DROP COLUMN limits; DROP TABLE host_port",
    3: "DROP TABLE host_port",
}


@pytest.mark.parametrize("version", EARLIER)
def test_earlier_schema_is_taken_over(tmp_path: Path, version: int) -> None:
    """A pod of a database without limits (schema 2) and without host ports (schema 3) has none, and may get some."""
    path = tmp_path / "ipam.db"
    store = open_store(path)
    pod = reserve(store, attachment("a"))
    store.close()
    db = sqlite3.connect(path)
    db.executescript(f"{EARLIER[version]}; PRAGMA user_version = {version}")
    db.close()
    store = open_store(path)
    assert store.pods() == [pod]
    assert (pod.limits.limits, pod.published) == (False, ())
    added = store.reserve(
        attachment("b"),
        device="pl-b",
        mac="02:00:00:00:00:0b",
        mtu=1500,
        netns=NETNS,
        published=[Published(HostPort(ip_address("192.0.2.1"), 80, 6), 8080)],
        limits=Bandwidth(ingress_rate=8000, ingress_burst=8000),
    )
    assert store.get(added.attachment) == added
    store.close()
    open_store(tmp_path / "new.db").close()
    assert columns(path) == columns(tmp_path / "new.db")


def test_failed_migration_changes_nothing(old: Path) -> None:
    """A migration that fails half way leaves the old tables, and is done when its cause is gone."""
    with sqlite3.connect(old) as db:
        db.execute("CREATE TABLE former (unexpected)")
    before = tables(old)
    with pytest.raises(StoreError, match=f"cannot open the IPAM store {old}: .*former"):
        open_store(old)
    assert tables(old) == before
    with sqlite3.connect(old) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        db.execute("DROP TABLE former")
    assert len(open_store(old).pods()) == 2


@pytest.mark.parametrize("is_new", [True, False])
def test_opened_by_many_at_once(tmp_path: Path, old: Path, is_new: bool) -> None:
    """Agent and command may open a new, or an old, database at the same time: it is made, or migrated, once."""
    path = tmp_path / "many.db" if is_new else old
    with ThreadPoolExecutor(8) as threads:
        stores = list(threads.map(lambda _: open_store(path, ("10.0.0.0/24",)), range(8)))
    given = [addresses(reserve(store, attachment(number)))[0] for number, store in enumerate(stores[:4])]
    assert len(set(given)) == 4
    assert len(stores[7].pods()) == (4 if is_new else 6)


@pytest.mark.parametrize("version", [VERSION + 1, 99])
def test_unknown_schema(tmp_path: Path, version: int) -> None:
    """A store of a newer agent is refused with both versions, and is left as it is."""
    path = tmp_path / "ipam.db"
    open_store(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {version}")
    before = tables(path)
    with pytest.raises(StoreError) as caught:
        open_store(path)
    assert str(caught.value) == (
        f"the IPAM store {path} has schema {version}, this agent knows {VERSION}: run the agent that made it"
    )
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (version,)
    assert tables(path) == before
