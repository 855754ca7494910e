"""Expanding our own includes into one text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agent.datapath.source import CompileError, expand


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make the source folder."""
    folder = tmp_path / "bpf"
    folder.mkdir()
    return folder


def origins(text: str) -> dict[str, tuple[str, int]]:
    """Map each line to the file and number that its `#line` directives give it, as a compiler would."""
    where = {}
    name, number = "", 0
    for line in text.splitlines():
        directive = re.fullmatch(r'#line (\d+) "(.*)"', line)
        if directive:
            name, number = directive[2], int(directive[1])
        else:
            where[line] = (name, number)
            number += 1
    return where


def test_every_line_keeps_its_file_and_number(folder: Path) -> None:
    """Lines before, inside and after nested includes are where the compiler will say that they are."""
    (folder / "datapath.c").write_text('before\n#include "a.h"\n  #  include "b.h" // b\nafter\n')
    (folder / "a.h").write_text('#pragma once\na1\n#include "b.h"\na2\n')
    (folder / "b.h").write_text("#pragma once\n\nb1\n")
    assert {
        "before": ("bpf/datapath.c", 1),
        "a1": ("bpf/a.h", 2),
        "b1": ("bpf/b.h", 3),
        "a2": ("bpf/a.h", 4),
        "after": ("bpf/datapath.c", 4),
    }.items() <= origins(expand(folder / "datapath.c")).items()


def test_a_file_is_included_once(folder: Path) -> None:
    """Two files that include a third do not define its contents twice, and no pragma is left in the text."""
    (folder / "datapath.c").write_text('#include "a.h"\n#include "b.h"\n#include "./a.h"\n')
    (folder / "a.h").write_text('#pragma once\n#include "b.h"\n')
    (folder / "b.h").write_text("#pragma once\nonly\n")
    text = expand(folder / "datapath.c")
    assert text.count("only") == 1
    assert "pragma" not in text


def test_system_includes_stay(folder: Path) -> None:
    """`#include <...>` is the compiler's business."""
    (folder / "datapath.c").write_text("#include <linux/ip.h>\n")
    assert "#include <linux/ip.h>\n" in expand(folder / "datapath.c")


def test_quoted_names_are_relative_to_the_including_file(folder: Path) -> None:
    """A header in a subfolder includes its neighbour by its bare name."""
    (folder / "nat").mkdir()
    (folder / "datapath.c").write_text('#include "nat/a.h"\n')
    (folder / "nat/a.h").write_text('#include "b.h"\n')
    (folder / "nat/b.h").write_text("deep\n")
    assert origins(expand(folder / "datapath.c"))["deep"] == ("bpf/nat/b.h", 1)


def test_the_text_does_not_depend_on_the_place(folder: Path, tmp_path: Path) -> None:
    """The same folder elsewhere expands to the same text, so that it meets the same cache entry."""
    copy = tmp_path / "elsewhere/bpf"
    copy.mkdir(parents=True)
    for place in (folder, copy):
        (place / "datapath.c").write_text('#include "a.h"\n')
        (place / "a.h").write_text("int a;\n")
    assert expand(folder / "datapath.c") == expand(copy / "datapath.c")


def test_a_missing_file_is_named_with_its_includer(folder: Path) -> None:
    """The error says which file is missing and who wanted it."""
    (folder / "datapath.c").write_text('#include "gone.h"\n')
    with pytest.raises(CompileError, match=r"bpf/gone\.h, included by bpf/datapath\.c: .*No such file"):
        expand(folder / "datapath.c")


def test_a_cycle_is_an_error_that_shows_it(folder: Path) -> None:
    """A file that includes itself by way of others is an error, not an endless text or a silent hole."""
    (folder / "datapath.c").write_text('#include "a.h"\n')
    (folder / "a.h").write_text('\n#include "b.h"\n')
    (folder / "b.h").write_text('#include "a.h"\n')
    with pytest.raises(CompileError, match=r"bpf/b\.h:1: include cycle: bpf/a\.h -> bpf/b\.h -> bpf/a\.h"):
        expand(folder / "datapath.c")
