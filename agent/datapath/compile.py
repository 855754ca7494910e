"""Compiles the datapath with bcc; runs as a process of its own, so that clang's 74 MB go when it ends.

    python -m agent.datapath.compile < source > object.json

Diagnostics go to stderr; the exit status is 1 if there is no object. The maps that bcc creates on the way end
with the process, and no program is loaded.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import struct
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path

from bcc import BPF
from bcc.libbcc import lib

from .object import MapSpec, Object, ProgramSpec

_UAPI = Path("/usr/include")

# What bcc's own headers, and C as the kernel writes it, want of a kernel's internal headers.
_KCONFIG = """\
#define CONFIG_BPF_SYSCALL 1
#include <linux/types.h>
typedef __u8 u8; typedef __u16 u16; typedef __u32 u32; typedef __u64 u64;
typedef __s8 s8; typedef __s16 s16; typedef __s32 s32; typedef __s64 s64;
typedef __SIZE_TYPE__ size_t; typedef __UINTPTR_TYPE__ uintptr_t; typedef _Bool bool;
enum { false, true };
"""

# What clang only warns of, and never is right. Not all warnings: the compiler is whatever version the node has.
_ERRORS = ("-Werror=incompatible-pointer-types", "-Werror=int-conversion", "-Werror=return-type")

# The instruction that loads 64 bits, and its source registers that mean "the map with this descriptor" and
# "the value of the map with this descriptor" (linux/bpf.h).
_LD_IMM64 = 0x18
_MAP_SOURCES = {1, 2}
_INSTRUCTION = struct.Struct("<BBhi")

_NUMERIC_MACRO = re.compile(r"^#define[ \t]+(\w+)[ \t]+(0x[0-9a-fA-F]+|[0-9]+)[ \t]*(?:/\*.*)?$", re.MULTILINE)


def main() -> int:
    """Compile standard input and write the object to standard output; return the exit status."""
    try:
        with tempfile.TemporaryDirectory(prefix="podlane-headers-") as headers:
            _make_headers(Path(headers))
            os.environ["BCC_KERNEL_SOURCE"] = headers
            flags = [*_ERRORS, *(f"-I{path}" for path in _include_path())]
            source = sys.stdin.read()
            module = BPF(text=source, cflags=flags, allow_rlimit=False)
            sys.stdout.write(_object(module, source).to_json())
    except Exception as error:  # bcc raises nothing more specific; clang has already said why on stderr
        print(f"compile the datapath: {error}", file=sys.stderr)
        return 1
    return 0


def _include_path() -> list[Path]:
    """Debian keeps an architecture's headers in a folder named by its triplet, others with the rest."""
    triplet = sysconfig.get_config_var("MULTIARCH") or f"{platform.machine()}-linux-gnu"
    return [path for path in (_UAPI / triplet, _UAPI) if path.is_dir()]


def _make_headers(tree: Path) -> None:
    """Make a folder that bcc takes for a kernel's source: the UAPI headers, and stubs of what is not UAPI.

    Without it bcc insists on the running kernel's headers (iovisor/bcc issues 397, 743, 2028, 3819, 4705).
    """
    asm = next((path / "asm" for path in _include_path() if (path / "asm").is_dir()), None)
    if asm is None or not (_UAPI / "linux/pkt_cls.h").exists():
        raise FileNotFoundError(f"no UAPI headers in {_UAPI}: install the package linux-libc-dev")
    include = tree / "include"
    uapi = include / "uapi/linux"
    for folder in (include / "linux", include / "asm", uapi):
        folder.mkdir(parents=True)
    (include / "asm-generic").symlink_to(_UAPI / "asm-generic")
    for header in asm.iterdir():
        (include / "asm" / header.name).symlink_to(header)
    for header in (_UAPI / "linux").iterdir():
        if header.name != "bpf.h":  # bcc brings its own
            (uapi / header.name).symlink_to(header)
    for stub in (uapi / "bpf.h", include / "linux/log2.h", include / "asm/page.h"):
        stub.touch()
    (include / "linux/kconfig.h").write_text(_KCONFIG)


def _object(module: BPF, source: str) -> Object:
    handle = ctypes.c_void_p(module.module)
    lib.bpf_table_name.restype = ctypes.c_char_p
    lib.bpf_table_key_size_id.restype = lib.bpf_table_leaf_size_id.restype = ctypes.c_size_t
    names = [lib.bpf_table_name(handle, ctypes.c_uint64(at)) for at in range(lib.bpf_num_tables(handle))]
    descriptors = {lib.bpf_table_fd(handle, name): name.decode() for name in names}
    functions = [lib.bpf_function_name(handle, at) for at in range(lib.bpf_num_functions(handle))]
    return Object(
        maps=tuple(_map(handle, at, name) for at, name in enumerate(names)),
        programs=tuple(_program(name.decode(), module.dump_func(name), descriptors) for name in functions),
        constants=_constants(source),
    )


def _constants(source: str) -> dict[str, int]:
    """Return the macros that are plain numbers: flags and kinds that map entries hold. bcc does not report them."""
    return {name: int(value, 0) for name, value in _NUMERIC_MACRO.findall(source)}


def _map(handle: ctypes.c_void_p, at: int, name: bytes) -> MapSpec:
    index = ctypes.c_uint64(at)
    return MapSpec(
        name=name.decode(),
        type=lib.bpf_table_type_id(handle, index),
        key_size=lib.bpf_table_key_size_id(handle, index),
        value_size=lib.bpf_table_leaf_size_id(handle, index),
        max_entries=lib.bpf_table_max_entries_id(handle, index),
        flags=lib.bpf_table_flags_id(handle, index),
        key=json.dumps(json.loads(lib.bpf_table_key_desc(handle, name))),
        value=json.dumps(json.loads(lib.bpf_table_leaf_desc(handle, name))),
    )


def _program(name: str, code: bytes, descriptors: Mapping[int, str]) -> ProgramSpec:
    """Replace the descriptors of this process's maps, which mean nothing to another, by relocations."""
    instructions = bytearray(code)
    relocations: list[tuple[int, str]] = []
    at = 0
    while at < len(instructions) // _INSTRUCTION.size:
        opcode, registers, offset, immediate = _INSTRUCTION.unpack_from(instructions, at * _INSTRUCTION.size)
        if opcode == _LD_IMM64 and registers >> 4 in _MAP_SOURCES:
            _INSTRUCTION.pack_into(instructions, at * _INSTRUCTION.size, opcode, registers, offset, 0)
            relocations.append((at, descriptors[immediate]))
        at += 2 if opcode == _LD_IMM64 else 1
    return ProgramSpec(name=name, instructions=bytes(instructions), relocations=tuple(relocations))


if __name__ == "__main__":
    sys.exit(main())
