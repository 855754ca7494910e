"""Map keys and values as Python sees them, derived from what bcc reports of the C: no layout is typed twice.

bcc describes a scalar by its C name ("unsigned int"), a struct as `[name, [field, ...], "struct_packed"]`
where a field is `[name, type]` or `[name, type, [count]]`, with all padding explicit as fields named
`__pad_...`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

# Sizes are those of the BPF target, which is an LP64 one; bytes are in the machine's own order.
_SCALARS = {
    "_Bool": "=?",
    "char": "=b",
    "signed char": "=b",
    "unsigned char": "=B",
    "short": "=h",
    "unsigned short": "=H",
    "int": "=i",
    "unsigned int": "=I",
    "long": "=q",
    "unsigned long": "=Q",
    "long long": "=q",
    "unsigned long long": "=Q",
}
_PADDING = "__pad_"

# A decoded value: an int, bytes, a list of values or a dict of them, as the C type says and no checker of
# Python knows.
Value: TypeAlias = Any


class LayoutError(ValueError):
    """A C type that has no Python counterpart here, or a value that does not fit its type."""


class _Type(Protocol):
    @property
    def size(self) -> int: ...
    def pack(self, value: object, where: str) -> bytes: ...
    def unpack(self, data: bytes, offset: int) -> Value: ...


@dataclass(frozen=True, slots=True)
class _Scalar:
    codec: struct.Struct

    @property
    def size(self) -> int:
        return self.codec.size

    def pack(self, value: object, where: str) -> bytes:
        try:
            return self.codec.pack(value)
        except struct.error as error:
            raise LayoutError(f"{where}: {value!r}: {error}") from error

    def unpack(self, data: bytes, offset: int) -> Value:
        return self.codec.unpack_from(data, offset)[0]


@dataclass(frozen=True, slots=True)
class _Array:
    element: _Type
    count: int

    @property
    def size(self) -> int:
        return self.element.size * self.count

    def pack(self, value: object, where: str) -> bytes:
        if isinstance(value, bytes | bytearray | memoryview):
            if len(value) != self.size:
                raise LayoutError(f"{where}: {len(value)} bytes given, {self.size} needed")
            return bytes(value)
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != self.count:
            raise LayoutError(f"{where}: {value!r} is neither bytes nor a sequence of {self.count}")
        return b"".join(self.element.pack(item, f"{where}[{at}]") for at, item in enumerate(value))

    def unpack(self, data: bytes, offset: int) -> Value:
        if self.element.size == 1:
            return data[offset : offset + self.count]
        size = self.element.size
        return [self.element.unpack(data, offset + at * size) for at in range(self.count)]


@dataclass(frozen=True, slots=True)
class _Struct:
    fields: tuple[tuple[str, _Type], ...]
    size: int

    def pack(self, value: object, where: str) -> bytes:
        if not isinstance(value, Mapping):
            raise LayoutError(f"{where}: {value!r} is not a mapping of field names")
        unknown = value.keys() - {name for name, _ in self.fields}
        if unknown:
            raise LayoutError(f"{where}: no such fields: {', '.join(sorted(unknown))}")
        return b"".join(
            field.pack(value[name], f"{where}.{name}") if name in value else bytes(field.size)
            for name, field in self.fields
        )

    def unpack(self, data: bytes, offset: int) -> Value:
        values = {}
        for name, field in self.fields:
            if not name.startswith(_PADDING):
                values[name] = field.unpack(data, offset)
            offset += field.size
        return values


@dataclass(frozen=True, slots=True)
class Layout:
    """The bytes of one C type. `size` is in bytes."""

    name: str
    size: int
    _type: _Type

    @classmethod
    def from_description(cls, description: str, *, name: str, size: int) -> Layout:
        """Return the layout that bcc's JSON `description` describes; errors call it `name`.

        Raises LayoutError if it holds a type that is not supported (bit-field, union, pointer, 128-bit
        integer, floating point), or if its size is not `size`, the one that the kernel is told.
        """
        layout = _type(json.loads(description), name)
        if layout.size != size:
            raise LayoutError(f"{name}: {size} bytes, of which bcc describes {layout.size}: {description}")
        return cls(name, size, layout)

    def encode(self, value: object) -> bytes:
        """Return the bytes of a value: an int for a scalar, a mapping by field name for a struct.

        Fields left out are zero, as in a C initializer. Arrays are sequences, or bytes as they stand in
        memory. Raises LayoutError if the value does not fit.
        """
        return self._type.pack(value, self.name)

    def decode(self, data: bytes) -> Value:
        """Return the value: an int, or a dict by field name; arrays of bytes are bytes, others lists."""
        if len(data) != self.size:
            raise LayoutError(f"{self.name}: {len(data)} bytes given, {self.size} needed")
        return self._type.unpack(data, 0)

    def picker(self, *fields: str) -> struct.Struct:
        """Return a codec of some of a struct's fields, in the order of the C; all else is skipped, or packed as zero.

        It is for going through many entries at once, twenty times as fast as `decode`: integers are ints, arrays and
        structs are bytes as they stand in memory. Raises LayoutError for fields that do not exist in this order.
        """
        if not isinstance(self._type, _Struct):
            raise LayoutError(f"{self.name}: not a struct")
        wanted = list(fields)
        codes = ["="]
        for name, field in self._type.fields:
            if wanted and wanted[0] == name:
                codes.append(field.codec.format[1:] if isinstance(field, _Scalar) else f"{field.size}s")
                wanted.pop(0)
            else:
                codes.append(f"{field.size}x")
        if wanted:
            raise LayoutError(f"{self.name}: no field {wanted[0]}, or not in this order: {', '.join(fields)}")
        return struct.Struct("".join(codes))


def _type(description: object, where: str) -> _Type:
    if isinstance(description, str):
        if description not in _SCALARS:
            raise LayoutError(f"{where}: the C type {description!r} is not supported")
        return _Scalar(struct.Struct(_SCALARS[description]))
    match description:
        case [str(), list(members), "struct" | "struct_packed"]:
            fields = tuple(_field(member, where) for member in members)
            return _Struct(fields, sum(field.size for _, field in fields))
        case _:
            raise LayoutError(f"{where}: the C type {json.dumps(description)} is not supported")


def _field(description: object, where: str) -> tuple[str, _Type]:
    match description:
        case [str(name), inner]:
            return name, _type(inner, f"{where}.{name}")
        case [str(name), inner, [int(count)]]:
            return name, _Array(_type(inner, f"{where}.{name}"), count)
        case _:  # a bit-field has its width in third place, an anonymous union or struct its kind
            raise LayoutError(f"{where}: the C field {json.dumps(description)} is not supported")
