"""A compiled datapath as plain data: what the compiling child hands to the agent, and the cache holds."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class MapSpec:
    """How to create one map. Sizes in bytes; `type` and `flags` as in linux/bpf.h.

    `key` and `value` are the C types as bcc describes them (JSON), for `layout.Layout`.
    """

    name: str
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    key: str
    value: str


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """One program: its instructions (8 bytes each), and which of them load the address of which map.

    A relocation is the index of a two-slot load instruction whose `imm` (zero here) takes the map's
    descriptor.
    """

    name: str
    instructions: bytes
    relocations: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class Object:
    """Everything the source declares, in its order, and its numeric macros by name."""

    maps: tuple[MapSpec, ...]
    programs: tuple[ProgramSpec, ...]
    constants: Mapping[str, int]

    def to_json(self) -> str:
        """Return the object as one line of JSON; `from_json` is its inverse."""
        programs = [
            {
                "name": program.name,
                "instructions": base64.b64encode(program.instructions).decode(),
                "relocations": program.relocations,
            }
            for program in self.programs
        ]
        maps = [asdict(spec) for spec in self.maps]
        return json.dumps({"maps": maps, "programs": programs, "constants": dict(self.constants)})

    @classmethod
    def from_json(cls, text: str) -> Object:
        """Return the object that `to_json` wrote. Raises ValueError if the text is anything else."""
        try:
            document: Any = json.loads(text)
            return cls(
                maps=tuple(MapSpec(**spec) for spec in document["maps"]),
                programs=tuple(
                    ProgramSpec(
                        name=program["name"],
                        instructions=base64.b64decode(program["instructions"], validate=True),
                        relocations=tuple((int(at), str(name)) for at, name in program["relocations"]),
                    )
                    for program in document["programs"]
                ),
                constants={str(name): int(value) for name, value in document["constants"].items()},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a compiled datapath: {error}") from error
