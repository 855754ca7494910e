"""Compiling in a child process, and the cache before it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agent.datapath.cache import compile_source, compiled
from agent.datapath.object import Object
from agent.datapath.source import CompileError

from .conftest import Compile

pytestmark = pytest.mark.root

DEFINES = {"COUNTS_AS": "first", "EXTRA_MEMBER": ""}


def break_compiler(patch: pytest.MonkeyPatch) -> None:
    """Let no child process compile any more: the only way to an object is the cache."""
    patch.setattr(sys, "executable", "/bin/false")


@pytest.fixture(scope="module")
def known(small_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the small datapath; return the cache, which is not to be changed."""
    cache = tmp_path_factory.mktemp("known")
    compiled(small_source, cache, defines=DEFINES)
    return cache


@pytest.fixture
def entry(known: Path, tmp_path: Path) -> Path:
    """Provide a cache that has compiled the small datapath, by its one entry."""
    (there,) = known.iterdir()
    return Path(shutil.copy2(there, tmp_path))


def test_the_object_describes_the_source(compile_small: Compile) -> None:
    """Every program and map of the source is in the object, with sizes, layouts and references by name."""
    small = compile_small()
    assert [program.name for program in small.programs] == ["from_pod", "to_pod"]
    maps = {spec.name: spec for spec in small.maps}
    assert maps.keys() == {"endpoints", "outcomes", "per_cpu", "odd", "routes"}
    assert (maps["endpoints"].key_size, maps["endpoints"].value_size) == (16, 24)
    assert '"mac"' in maps["endpoints"].value
    used = [{name for _, name in program.relocations} for program in small.programs]
    assert used == [{"endpoints", "outcomes"}, {"outcomes"}]


def test_the_object_survives_json(compile_small: Compile) -> None:
    """What the child prints and the cache holds is the whole object."""
    small = compile_small()
    assert Object.from_json(small.to_json()) == small


def test_compiling_is_reproducible(small_source: Path, tmp_path: Path) -> None:
    """Two compilations give the same object, or a restart without a cache would replace every program."""
    first = compiled(small_source, tmp_path / "one", defines=DEFINES)
    assert compiled(small_source, tmp_path / "two", defines=DEFINES) == first


def test_an_error_in_a_header_is_shown_at_its_place(tmp_path: Path) -> None:
    """Clang's message names the file and line of the mistake, although bcc sees one text."""
    folder = tmp_path / "bpf"
    folder.mkdir()
    (folder / "datapath.c").write_text('#include "wrong.h"\nint from_pod(struct __sk_buff *skb) { return 0; }\n')
    (folder / "wrong.h").write_text("#pragma once\n\nstatic int mistaken(void) { return nothing; }\n")
    with pytest.raises(CompileError, match=r"bpf/wrong\.h:3:\d+: error: use of undeclared identifier 'nothing'"):
        compiled(folder, tmp_path / "cache", defines={})


def test_a_pointer_to_something_else_is_an_error() -> None:
    """What is no more than a warning in C, though it cannot be right, is an error here."""
    with pytest.raises(CompileError, match="incompatible pointer types"):
        compile_source("int from_pod(struct __sk_buff *skb) { struct __sk_buff **p = &skb; return (p = skb) != 0; }")


def test_a_known_source_is_not_compiled_again(
    small_source: Path, entry: Path, compile_small: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no compiler works, a source that was compiled before is still there."""
    first = compile_small()
    break_compiler(monkeypatch)
    assert compiled(small_source, entry.parent, defines=DEFINES) == first


def test_another_macro_is_another_object(small_source: Path, entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache tells options apart."""
    break_compiler(monkeypatch)
    with pytest.raises(CompileError):
        compiled(small_source, entry.parent, defines={**DEFINES, "COUNTS_AS": "second"})


@pytest.mark.parametrize("damage", ["truncated", "flipped", "binary", "empty"])
def test_a_damaged_cache_is_a_miss(small_source: Path, entry: Path, compile_small: Compile, damage: str) -> None:
    """A damaged entry is compiled again and repaired, whatever the damage."""
    first = compile_small()
    whole = entry.read_bytes()
    digit = whole.index(b'"max_entries": ') + len(b'"max_entries": ')
    entry.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "flipped": whole[:digit] + b"7" + whole[digit + 1 :],
            "binary": b"\xff\xfe" * 100,
            "empty": b"",
        }[damage]
    )
    assert compiled(small_source, entry.parent, defines=DEFINES) == first
    assert entry.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_only_time(small_source: Path, tmp_path: Path) -> None:
    """If the cache's place is taken by a file, compiling works all the same."""
    (tmp_path / "cache").write_text("in the way")
    assert compiled(small_source, tmp_path / "cache", defines=DEFINES).programs


def test_the_cache_does_not_grow_for_ever(small_source: Path, tmp_path: Path) -> None:
    """Old objects go when new ones come; the newest is kept."""
    for number in range(6):
        newest = compiled(small_source, tmp_path, defines={**DEFINES, "NUMBER": str(number)})
    assert len(list(tmp_path.iterdir())) == 4
    assert newest == compiled(small_source, tmp_path, defines={**DEFINES, "NUMBER": "5"})


def test_the_agent_never_holds_the_compiler() -> None:
    """No module of the datapath but `compile` brings bcc, and with it LLVM, into the agent's process."""
    program = (
        "import sys, agent.datapath.cache, agent.datapath.tables, agent.datapath.testrun\n"
        "assert not [name for name in sys.modules if name.startswith('bcc')], 'bcc was imported'\n"
        "assert 'libbcc' not in open('/proc/self/maps').read(), 'libbcc was loaded'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
