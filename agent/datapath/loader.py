"""From an object to maps and programs in the kernel, pinned: they outlive the agent and meet its next life.

    <pin dir>/maps/<name>:<hash of the layout>
    <pin dir>/programs/<name>:<hash of the instructions>

What is pinned under the right hash is used again: an agent that restarts unchanged creates and loads
nothing. (The separator is a colon since bpffs reserves dots.)
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Self

from ..state import KernelError
from . import libbpf
from .maps import Map
from .object import MapSpec, Object, ProgramSpec

# A name collision within one pin directory needs 2^32 versions of one map.
_HASH_DIGITS = 16

# struct bpf_insn: opcode, registers (source in the upper half), offset, immediate.
_INSTRUCTION_SIZE = 8
_IMMEDIATE = struct.Struct("=i")
_IMMEDIATE_OFFSET = 4


@dataclass(frozen=True)
class Datapath:
    """The datapath in the kernel; it owns the descriptors, and what is pinned outlives them.

    `programs` are descriptors and `program_ids` the kernel's identifiers, by name. `timings` are the seconds
    that making or finding "maps" and "programs" took. `constants` are the source's numeric macros.
    """

    maps: Mapping[str, Map]
    programs: Mapping[str, int]
    program_ids: Mapping[str, int]
    timings: Mapping[str, float]
    constants: Mapping[str, int]
    _folders: tuple[Path, ...]
    _pins: frozenset[Path]
    _descriptors: ExitStack

    def prune(self) -> list[Path]:
        """Remove the pins of other versions' maps and programs; return them.

        Call it when nothing is attached that uses them; what a link still runs stays alive without its pin.
        """
        stale = [pin for folder in self._folders for pin in sorted(folder.iterdir()) if pin not in self._pins]
        for pin in stale:
            _unpin(pin)
        return stale

    def close(self) -> None:
        """Close all descriptors."""
        self._descriptors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(compiled: Object, pin_dir: Path, sizes: Mapping[str, int]) -> Datapath:
    """Bring the object into the kernel, or find it there, and pin it under `pin_dir`.

    `sizes` overrides the source's number of entries, by map name. Raises KernelError: `pin_dir` is not on a
    bpf filesystem, the verifier refused a program (with its log), or a pin is not what its name says.
    """
    unknown = sizes.keys() - {spec.name for spec in compiled.maps}
    if unknown:
        raise ValueError(f"sizes given for maps that the source does not have: {', '.join(sorted(unknown))}")
    libbpf.require_bpffs(pin_dir)
    folders = (pin_dir / "maps", pin_dir / "programs")
    for folder in folders:
        libbpf.make_folder(folder)
    with ExitStack() as stack:
        started = time.monotonic()
        pins: set[Path] = set()
        maps: dict[str, Map] = {}
        for declared in compiled.maps:
            spec = replace(declared, max_entries=sizes.get(declared.name, declared.max_entries))
            pins.add(path := _map_pin(pin_dir, spec))
            maps[spec.name] = Map(_own(stack, _opened_map(spec, path)), spec)
        maps_ready = time.monotonic()
        programs: dict[str, int] = {}
        for program in compiled.programs:
            pins.add(path := _program_pin(pin_dir, program))
            programs[program.name] = _own(stack, _opened_program(program, path, maps))
        ids = {name: libbpf.program_info(descriptor, name).id for name, descriptor in programs.items()}
        timings = {"maps": maps_ready - started, "programs": time.monotonic() - maps_ready}
        return Datapath(maps, programs, ids, timings, compiled.constants, folders, frozenset(pins), stack.pop_all())


def _own(stack: ExitStack, descriptor: int) -> int:
    stack.callback(os.close, descriptor)
    return descriptor


def _map_pin(pin_dir: Path, spec: MapSpec) -> Path:
    return pin_dir / "maps" / f"{spec.name}:{_digest(*map(str, astuple(spec)))}"


def _program_pin(pin_dir: Path, program: ProgramSpec) -> Path:
    digest = _digest(program.instructions.hex(), str(program.relocations))
    return pin_dir / "programs" / f"{program.name}:{digest}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:_HASH_DIGITS]


def _unpin(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise KernelError(f"unpin {path}: {error}") from error


def _opened_map(spec: MapSpec, path: Path) -> int:
    """Return a descriptor of the pinned map, creating and pinning it if there is none."""
    found = libbpf.open_pin(path)
    if found is None:
        created = libbpf.map_create(spec.name, spec.type, spec.key_size, spec.value_size, spec.max_entries, spec.flags)
        return _pinned(created, path)
    info = libbpf.map_info(found, str(path))
    actual = (info.type, info.key_size, info.value_size, info.max_entries, info.flags)
    if actual != (spec.type, spec.key_size, spec.value_size, spec.max_entries, spec.flags):
        os.close(found)
        raise KernelError(f"open map {spec.name}: the pin {path} holds another map ({info}); remove it")
    return found


def _opened_program(program: ProgramSpec, path: Path, maps: Mapping[str, Map]) -> int:
    """Return a descriptor of the pinned program if it uses these very maps; else load one and pin that."""
    found = libbpf.open_pin(path)
    if found is not None:
        if libbpf.program_info(found, str(path)).map_ids == {maps[name].id for _, name in program.relocations}:
            return found
        os.close(found)
        _unpin(path)
    return _pinned(libbpf.program_load(program.name, _relocated(program, maps)), path)


def _pinned(descriptor: int, path: Path) -> int:
    try:
        libbpf.pin(descriptor, path)
    except KernelError:
        os.close(descriptor)
        raise
    return descriptor


def _relocated(program: ProgramSpec, maps: Mapping[str, Map]) -> bytes:
    instructions = bytearray(program.instructions)
    for at, name in program.relocations:
        _IMMEDIATE.pack_into(instructions, at * _INSTRUCTION_SIZE + _IMMEDIATE_OFFSET, maps[name].descriptor)
    return bytes(instructions)
