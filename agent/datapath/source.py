"""One text out of many files: bcc rewrites map calls in the main source only, not in #included headers."""

from __future__ import annotations

import re
from pathlib import Path

_INCLUDE = re.compile(r'\s*#\s*include\s*"([^"]+)"')
_PRAGMA_ONCE = re.compile(r"\s*#\s*pragma\s+once\b")


class CompileError(Exception):
    """The datapath's source cannot be turned into an object; the message has the compiler's own words."""


def expand(path: Path) -> str:
    """Return the source with every `#include "file"` replaced by that file, each once (as by `#pragma once`).

    Quoted names are relative to the including file. `#line` directives keep the compiler's messages right;
    they name files relative to the parent of the source's folder ("bpf/maps.h"), so that the text does not
    depend on where the folder is. `#include <...>` stays. Raises CompileError if a file is missing or
    includes itself.
    """
    main = path.resolve()
    return "".join(_expanded(main, root=main.parent.parent, active=(), done=set()))


def _expanded(path: Path, *, root: Path, active: tuple[Path, ...], done: set[Path]) -> list[str]:
    done.add(path)
    active = (*active, path)
    name = _shown(path, root)
    output = [f'#line 1 "{name}"\n']
    for number, line in enumerate(_read(path, root, active), start=1):
        include = _INCLUDE.match(line)
        if include:
            target = (path.parent / include[1]).resolve()
            if target in active:
                chain = " -> ".join(_shown(file, root) for file in (*active[active.index(target) :], target))
                raise CompileError(f"{name}:{number}: include cycle: {chain}")
            if target not in done:
                output += _expanded(target, root=root, active=active, done=done)
            output.append(f'#line {number + 1} "{name}"\n')
        else:
            output.append("\n" if _PRAGMA_ONCE.match(line) else f"{line}\n")
    return output


def _read(path: Path, root: Path, active: tuple[Path, ...]) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        by = f", included by {_shown(active[-2], root)}" if len(active) > 1 else ""
        raise CompileError(f"read {_shown(path, root)}{by}: {error}") from error


def _shown(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
