"""From a source folder to a compiled object, by way of a cache: a node compiles one source once."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ..files import replace_file
from .object import Object
from .source import CompileError, expand

MAIN_SOURCE = "datapath.c"

# Part of the cache's key: raise it whenever `object` or `compile` changes what it writes for the same source.
_FORMAT = 2

# Compiling takes well under a second; a machine that is busy starting a node may need many times as long.
_TIMEOUT_SECONDS = 120.0

# Enough to go back to an earlier release without compiling.
_KEPT_OBJECTS = 4


def compiled(source_dir: Path, cache: Path, *, defines: Mapping[str, str]) -> Object:
    """Return the object of `source_dir`'s datapath.c, from the folder `cache` if it was compiled before.

    `defines` are C macros, defined before the first line. A cache that cannot be read or written costs time,
    no more. Raises CompileError with clang's own messages.
    """
    macros = "".join(f"#define {name} {text}\n" for name, text in sorted(defines.items()))
    source = macros + expand(source_dir / MAIN_SOURCE)
    entry = cache / f"{_key(source)}.object"
    cached = _read(entry)
    if cached:
        return cached
    fresh = compile_source(source)
    with suppress(OSError):
        _write(entry, fresh)
        _forget_old(cache)
    return fresh


def compile_source(source: str) -> Object:
    """Return the object of a source text that includes no file of ours. Raises CompileError."""
    command = [sys.executable, "-P", "-m", "agent.datapath.compile"]  # -P: nothing from the current directory
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    try:
        child = subprocess.run(
            command, input=source, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise CompileError(f"the compiler did not end within {_TIMEOUT_SECONDS:.0f} s") from error
    if child.returncode != 0:
        raise CompileError(f"the compiler failed (status {child.returncode}):\n{child.stderr.strip()}")
    try:
        return Object.from_json(child.stdout)
    except ValueError as error:
        raise CompileError(f"the compiler ended well, but its output is {error}") from error


def _key(source: str) -> str:
    """Hash all that the object depends on."""
    parts = (str(_FORMAT), os.uname().machine, _bcc_version(), _headers_version(), source)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _bcc_version() -> str:
    """Identify bcc without importing it, which would cost this process 74 MB."""
    package = importlib.util.find_spec("bcc")
    if package is None or package.origin is None:
        raise CompileError("bcc is not installed: install the package python3-bpfcc")
    version = Path(package.origin).with_name("version.py")
    try:
        # A rebuild of the same version (another LLVM, a fix) shows in the file's time.
        return f"{version.read_text(encoding='utf-8')} {version.stat().st_mtime_ns}"
    except OSError as error:
        raise CompileError(f"bcc is not the BPF compiler collection: {error}") from error


def _headers_version() -> str:
    try:
        return Path("/usr/include/linux/version.h").read_text(encoding="utf-8")
    except OSError:
        return ""


def _read(entry: Path) -> Object | None:
    """Return what the entry holds, or None if it is missing, damaged, or not ours."""
    try:
        checksum, _, body = entry.read_text(encoding="utf-8").partition("\n")
        if checksum != _checksum(body):
            return None
        return Object.from_json(body)
    except (OSError, ValueError):
        return None


def _write(entry: Path, compiled_object: Object) -> None:
    body = compiled_object.to_json()
    replace_file(entry, f"{_checksum(body)}\n{body}".encode(), 0o600)


def _forget_old(cache: Path) -> None:
    entries = sorted(cache.glob("*.object"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for entry in entries[_KEPT_OBJECTS:]:
        entry.unlink(missing_ok=True)


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()
