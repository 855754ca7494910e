"""One map: typed access by the layouts that the C declares."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator, Mapping
from functools import reduce

from . import libbpf
from .layout import Layout, Value
from .object import MapSpec

# enum bpf_map_type: PERCPU_HASH, PERCPU_ARRAY, LRU_PERCPU_HASH.
_PER_CPU_TYPES = {5, 6, 10}

# Entries per batched system call: large enough to make calls rare, small enough for buffers of some 10 kB.
_BATCH = 512

# Kernels learnt batches map type by map type (hash 5.6, per-CPU array 5.13); with these errors they refuse.
# 524 is the kernel's ENOTSUPP, which it should not show to user space, and does.
_NO_BATCHES = {errno.EINVAL, errno.EOPNOTSUPP, 524}


class Map:
    """A map by a descriptor, which its opener closes. Keys and values are what `Layout` makes of the C.

    In a per-CPU map a value is a list with one value for each possible CPU. Errors are KernelErrors that
    name the map.
    """

    def __init__(self, descriptor: int, spec: MapSpec) -> None:
        self.spec = spec
        self.descriptor = descriptor
        self.id = libbpf.map_info(descriptor, spec.name).id
        self.key = Layout.from_description(spec.key, name=f"{spec.name}'s key", size=spec.key_size)
        self.value = Layout.from_description(spec.value, name=f"{spec.name}'s value", size=spec.value_size)
        self._per_cpu = spec.type in _PER_CPU_TYPES
        # In a per-CPU map the kernel rounds each CPU's value up to 8 bytes.
        self._slot = (spec.value_size + 7) // 8 * 8 if self._per_cpu else spec.value_size
        self._bytes = self._slot * libbpf.possible_cpus() if self._per_cpu else self._slot
        self._unread = ctypes.create_string_buffer(self._bytes)

    def get(self, key: object) -> Value | None:
        """Return the value of a key, or None."""
        found = self._lookup(self.key.encode(key))
        return None if found is None else self._decoded(found)

    def sum(self, key: object) -> Value:
        """Return the sum over the CPUs, field by field, of a per-CPU map's values for a key that exists."""
        values = self.get(key)
        if values is None:
            raise libbpf.BpfError("look up in map", self.spec.name, errno.ENOENT)
        return reduce(_added, values)

    def update(self, key: object, value: object, *, flags: int = 0) -> None:
        """Set the value of a key; with `flags` 1 the key must be new, with 2 it must exist (bpf(2))."""
        self.update_bytes(self.key.encode(key), self._encoded(value), flags=flags)

    def delete(self, key: object) -> bool:
        """Delete a key; return whether it was there."""
        return self.delete_bytes(self.key.encode(key))

    def contains_bytes(self, key: bytes) -> bool:
        """Return whether a key, given as it stands in memory, is there."""
        result = libbpf.library().bpf_map_lookup_elem(self.descriptor, key, self._unread)
        return result != -errno.ENOENT and libbpf.checked(result, "look up in map", self.spec.name) == 0

    def get_bytes(self, key: bytes) -> bytes | None:
        """Return the value of a key, or None, both as they stand in memory."""
        return self._lookup(key)

    def update_bytes(self, key: bytes, value: bytes, *, flags: int = 0) -> None:
        """Set the value of a key, both as they stand in memory; `flags` as in `update`."""
        result = libbpf.library().bpf_map_update_elem(self.descriptor, key, value, ctypes.c_uint64(flags))
        libbpf.checked(result, "update map", self.spec.name)

    def delete_bytes(self, key: bytes) -> bool:
        """Delete a key, given as it stands in memory; return whether it was there."""
        result = libbpf.library().bpf_map_delete_elem(self.descriptor, key)
        return result != -errno.ENOENT and libbpf.checked(result, "delete from map", self.spec.name) == 0

    def batches(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield all keys and values as they stand in memory, some hundred at a time, one behind the other.

        Entries written meanwhile may or may not be among them. Raises BpfError, also if the kernel has no batches for
        this type of map.
        """
        position = None
        size = min(_BATCH, self.spec.max_entries)
        result = 0
        while result != -errno.ENOENT:  # which says that this batch is the last
            keys = ctypes.create_string_buffer(size * self.spec.key_size)
            values = ctypes.create_string_buffer(size * self._bytes)
            following = ctypes.create_string_buffer(max(self.spec.key_size, 8))
            count = ctypes.c_uint32(size)
            result = libbpf.library().bpf_map_lookup_batch(
                self.descriptor, position, following, keys, values, ctypes.byref(count), None
            )
            if result == -errno.ENOSPC:  # one hash bucket alone holds more
                size *= 2
                continue
            if result != -errno.ENOENT:
                libbpf.checked(result, "list map", self.spec.name)
            yield keys.raw[: count.value * self.spec.key_size], values.raw[: count.value * self._bytes]
            position = following

    def items(self) -> Iterator[tuple[Value, Value]]:
        """Yield keys and values. Entries written meanwhile may or may not be among them."""
        for key, value in self.items_bytes():
            yield self.key.decode(key), self._decoded(value)

    def items_bytes(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield keys and values as they stand in memory, as `items` does."""
        try:
            yield from self._batched_items()
        except libbpf.BpfError as error:
            if error.errno not in _NO_BATCHES:
                raise
            yield from self._single_items()

    def _lookup(self, key: bytes) -> bytes | None:
        value = ctypes.create_string_buffer(self._bytes)
        result = libbpf.library().bpf_map_lookup_elem(self.descriptor, key, value)
        if result == -errno.ENOENT:
            return None
        libbpf.checked(result, "look up in map", self.spec.name)
        return value.raw

    def _batched_items(self) -> Iterator[tuple[bytes, bytes]]:
        for keys, values in self.batches():
            for at in range(len(keys) // self.spec.key_size):
                yield _part(keys, at, self.spec.key_size), _part(values, at, self._bytes)

    def _single_items(self) -> Iterator[tuple[bytes, bytes]]:
        for key in self._keys():
            value = self._lookup(key)
            if value is not None:
                yield key, value

    def _keys(self) -> list[bytes]:
        keys: dict[bytes, None] = {}
        current = None
        following = ctypes.create_string_buffer(self.spec.key_size)
        # If the current key is deleted meanwhile, the kernel starts over; the bound ends that.
        for _ in range(2 * self.spec.max_entries):
            result = libbpf.library().bpf_map_get_next_key(self.descriptor, current, following)
            if result == -errno.ENOENT:
                break
            libbpf.checked(result, "list map", self.spec.name)
            current = following.raw
            keys[current] = None
        return list(keys)

    def _decoded(self, data: bytes) -> Value:
        if not self._per_cpu:
            return self.value.decode(data)
        size = self.spec.value_size
        return [self.value.decode(data[at : at + size]) for at in range(0, self._bytes, self._slot)]

    def _encoded(self, value: Value) -> bytes:
        if not self._per_cpu:
            return self.value.encode(value)
        return b"".join(self.value.encode(item).ljust(self._slot, b"\0") for item in value)


def _part(data: bytes, at: int, size: int) -> bytes:
    return data[at * size : (at + 1) * size]


def _added(left: Value, right: Value) -> Value:
    if isinstance(left, Mapping):
        return {name: _added(left[name], right[name]) for name in left}
    return left + right
