"""Maps and programs in the kernel: loaded, pinned, found again, replaced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from agent.datapath import libbpf
from agent.datapath.cache import compile_source
from agent.datapath.loader import Datapath, load
from agent.datapath.tables import EndpointTable, outcomes
from agent.datapath.testrun import run
from agent.state import Address, Endpoint, KernelError

from ..support import open_descriptors
from .conftest import Compile

pytestmark = pytest.mark.root

SIZES = {"endpoints": 128}
FRAME = bytes.fromhex("0a0000000001 0a0000000002 88b5") + bytes(46)

# Reads a packet's byte without asking whether the packet has it.
_UNSAFE = """\
int unsafe(struct __sk_buff *skb) { return *(char *)(long)skb->data; }
"""


@pytest.fixture
def small(compile_small: Compile, pins: Path) -> Iterator[Datapath]:
    """Load the small datapath."""
    with load(compile_small(), pins, SIZES) as datapath:
        yield datapath


def ids(datapath: Datapath) -> tuple[dict[str, int], dict[str, int]]:
    """Return the kernel's identifiers of all maps and programs."""
    return {name: one.id for name, one in datapath.maps.items()}, dict(datapath.program_ids)


def test_a_loaded_program_counts_into_its_map(small: Datapath) -> None:
    """A packet through the loaded program shows in the counters by its C name, with packets and bytes."""
    ran = run(small.programs["from_pod"], FRAME, repeat=3)
    assert ran.verdict == -1
    assert ran.packet == FRAME
    assert outcomes(small)["first"] == (3, 3 * len(FRAME))
    assert outcomes(small)["second"] == (0, 0)


def test_the_configuration_decides_the_size(small: Datapath) -> None:
    """The kernel's map has the configured number of entries, not the source's."""
    map_of = small.maps["endpoints"]
    assert libbpf.map_info(map_of.descriptor, "endpoints").max_entries == 128


def test_a_restart_finds_everything_as_it_was(compile_small: Compile, pins: Path) -> None:
    """Loading the same object again makes nothing: same maps, same programs, and the entries still there."""
    table = {ip_address("10.0.0.1"): Endpoint(5, "0a:00:00:00:00:01")}
    with load(compile_small(), pins, SIZES) as first:
        before = ids(first)
        EndpointTable(first.maps["endpoints"]).upsert(table)
    with load(compile_small(), pins, SIZES) as second:
        assert ids(second) == before
        assert EndpointTable(second.maps["endpoints"]).read() == table
        assert second.prune() == []


@pytest.mark.parametrize(("defines", "sizes"), [({"EXTRA_MEMBER": "__u32 zone;"}, SIZES), ({}, {"endpoints": 256})])
def test_another_layout_is_another_map(
    compile_small: Compile, pins: Path, small: Datapath, defines: dict[str, str], sizes: dict[str, int]
) -> None:
    """A changed struct or size makes a new map, and programs that use it; the old ones work on until pruned."""
    with load(compile_small(**defines), pins, sizes) as changed:
        assert changed.maps["endpoints"].id != small.maps["endpoints"].id
        assert changed.maps["outcomes"].id == small.maps["outcomes"].id
        assert changed.program_ids["from_pod"] != small.program_ids["from_pod"]
        assert changed.program_ids["to_pod"] == small.program_ids["to_pod"]
        used = libbpf.program_info(changed.programs["from_pod"], "from_pod").map_ids
        assert used == {changed.maps["endpoints"].id, changed.maps["outcomes"].id}


def test_pruning_leaves_what_is_in_use(compile_small: Compile, pins: Path, small: Datapath) -> None:
    """Pruning removes the other version's map and program, keeps our own, and does not touch links."""
    (pins / "links").mkdir()
    libbpf.pin(small.programs["to_pod"], pins / "links" / "kept")
    upgraded = compile_small(EXTRA_MEMBER="__u32 zone;", COUNTS_AS="second")
    with load(upgraded, pins, SIZES) as changed:
        removed = changed.prune()
        assert sorted(pin.name.split(":")[0] for pin in removed) == ["endpoints", "from_pod"]
        assert changed.prune() == []
        before = ids(changed)
    assert (pins / "links" / "kept").exists()
    with load(upgraded, pins, SIZES) as again:
        assert ids(again) == before


def test_a_lost_map_brings_new_programs(compile_small: Compile, pins: Path, small: Datapath) -> None:
    """A pinned program that uses a map which is no longer pinned is replaced: it would count where nobody looks."""
    next((pins / "maps").glob("outcomes:*")).unlink()
    with load(compile_small(), pins, SIZES) as again:
        assert again.maps["outcomes"].id != small.maps["outcomes"].id
        run(again.programs["from_pod"], FRAME)
        assert outcomes(again)["first"].packets == 1
        after = ids(again)
    with load(compile_small(), pins, SIZES) as third:
        assert ids(third) == after


def test_a_pin_with_another_map_is_not_used(compile_small: Compile, pins: Path, small: Datapath) -> None:
    """Where a pin's name promises our layout and the kernel says otherwise, loading stops and says so."""
    pin = next((pins / "maps").glob("endpoints:*"))
    pin.unlink()
    libbpf.pin(small.maps["odd"].descriptor, pin)
    with pytest.raises(KernelError, match=r"open map endpoints: .* holds another map .*; remove it"):
        load(compile_small(), pins, SIZES)


def test_the_verifier_is_heard(pins: Path) -> None:
    """The error of a refused program names it, and ends with the verifier's reason."""
    with pytest.raises(KernelError, match=r"(?s)load program unsafe: EACCES.*invalid access to packet"):
        load(compile_source(_UNSAFE), pins, {})


def test_pinning_needs_a_bpf_filesystem(compile_small: Compile, tmp_path: Path) -> None:
    """On any other filesystem nothing is made, and the error says what to mount."""
    with pytest.raises(KernelError, match=r"not on a bpf filesystem; mount one: mount -t bpf"):
        load(compile_small(), tmp_path / "run/podlane", {})
    assert list(tmp_path.iterdir()) == []


def test_a_size_for_no_map_is_a_mistake(compile_small: Compile, pins: Path) -> None:
    """A misspelt map name in the configuration's sizes does not pass unnoticed."""
    with pytest.raises(ValueError, match="endpiont"):
        load(compile_small(), pins, {"endpiont": 5})


def test_no_descriptor_is_left_open(compile_small: Compile, pins: Path) -> None:
    """Neither a closed datapath nor a failed load keeps descriptors."""
    small = compile_small()
    broken = replace(small, programs=(*small.programs, *compile_source(_UNSAFE).programs))
    before = open_descriptors()
    load(small, pins, SIZES).close()
    for _ in range(2):
        with pytest.raises(KernelError):
            load(broken, pins, SIZES)
    assert open_descriptors() == before


def test_more_entries_than_a_batch_are_all_listed(small: Datapath) -> None:
    """A map is listed completely, padding and all, by batches and by single calls alike."""
    odd = small.maps["odd"]
    expected = {key: {"small": key % 256, "large": key << 40, "end": key} for key in range(3000)}
    for key, value in expected.items():
        odd.update(key, value)
    assert dict(odd.items()) == expected
    assert {odd.key.decode(key): odd.value.decode(value) for key, value in odd._single_items()} == expected


def test_every_kind_of_map_is_listed(small: Datapath) -> None:
    """Arrays, tries and per-CPU maps are listed by the same call; a per-CPU value has one part for each CPU."""
    prefix = {"length": 120, "addr": {"word": [1, 2, 3, 4]}}
    small.maps["routes"].update(prefix, 9)
    assert list(small.maps["routes"].items()) == [(prefix, 9)]
    cpus = libbpf.possible_cpus()
    small.maps["per_cpu"].update(3, list(range(1, cpus + 1)))
    assert list(small.maps["per_cpu"].items()) == [(3, list(range(1, cpus + 1)))]
    assert small.maps["per_cpu"].sum(3) == cpus * (cpus + 1) // 2
    ((key, values),) = small.maps["outcomes"].items()
    assert (key, len(values)) == (0, cpus)


def test_single_entries(small: Datapath) -> None:
    """Get, delete and "must be new" do what they say, and errors name the map."""
    odd = small.maps["odd"]
    value = {"small": 1, "large": 2, "end": 3}
    odd.update(1, value, flags=1)
    assert odd.get(1) == value
    with pytest.raises(KernelError, match="update map odd: EEXIST"):
        odd.update(1, value, flags=1)
    assert odd.delete(1)
    assert not odd.delete(1)
    assert odd.get(1) is None


def test_endpoints_of_both_families(small: Datapath) -> None:
    """The endpoint table gives back what it was given, IPv4 and IPv6 side by side."""
    table = EndpointTable(small.maps["endpoints"])
    pods: dict[Address, Endpoint] = {
        ip_address("10.1.0.2"): Endpoint(3, "0a:00:00:00:00:02"),
        ip_address("fd00::2"): Endpoint(3, "0a:00:00:00:00:02"),
        ip_address("10.1.0.3"): Endpoint(4, "0a:00:00:00:00:03"),
    }
    assert table.upsert(pods) == {}
    assert table.read() == pods
    moved = {ip_address("10.1.0.3"): Endpoint(9, "0a:00:00:00:00:09")}
    assert table.upsert(moved) == {}
    assert table.delete([ip_address("fd00::2"), ip_address("fd00::3")]) == {}
    assert table.read() == {ip_address("10.1.0.2"): pods[ip_address("10.1.0.2")], **moved}


def test_a_full_table_fails_only_what_does_not_fit(compile_small: Compile, pins: Path) -> None:
    """When the map is full, the entry that did not fit is reported, and the others are in force."""
    pods: dict[Address, Endpoint] = {
        ip_address(f"10.0.0.{number}"): Endpoint(number, "0a:00:00:00:00:01") for number in (1, 2, 3)
    }
    with load(compile_small(), pins, {"endpoints": 2}) as datapath:
        table = EndpointTable(datapath.maps["endpoints"])
        failures = table.upsert(pods)
        assert list(failures) == [ip_address("10.0.0.3")]
        assert "update map endpoints: E2BIG" in str(failures[ip_address("10.0.0.3")])
        assert len(table.read()) == 2


def test_the_real_datapath_loads(datapath: Datapath) -> None:
    """The verifier accepts podlane's own programs, and a runt of a packet is counted exactly once."""
    run(datapath.programs["from_pod"], FRAME)
    assert sum(count.packets for count in outcomes(datapath).values()) == 1


def test_the_verifier_is_far_from_its_limit(datapath: Datapath) -> None:
    """No program of podlane's takes a tenth of the million instructions that the verifier follows: kernels differ."""
    for name, descriptor in datapath.programs.items():
        facts = dict(line.split(":", 1) for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines())
        assert 0 < int(facts["verified_insns"]) < 100_000, name
