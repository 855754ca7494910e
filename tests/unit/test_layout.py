"""Encoding and decoding by bcc's descriptions of C types."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.datapath.layout import Layout, LayoutError

# As bcc 0.26 reports them.
ADDRESS = ["addr", [["word", "unsigned int", [4]]], "struct_packed"]
ENDPOINT = [
    "endpoint",
    [["ifindex", "unsigned int"], ["mac", "unsigned char", [6]], ["flags", "unsigned short"]],
    "struct_packed",
]
PADDED = [
    "padded",
    [
        ["small", "unsigned char"],
        ["__pad_1", "char", [7]],
        ["large", "unsigned long long"],
        ["end", "short"],
        ["__pad_end", "char", [6]],
    ],
    "struct_packed",
]
FLOW = ["flow", [["source", ADDRESS], ["port", "unsigned short", [2]], ["hops", ADDRESS, [2]]], "struct_packed"]


def layout(description: object, size: int) -> Layout:
    """Return the layout of a description."""
    return Layout.from_description(json.dumps(description), name="map", size=size)


def test_a_struct_is_laid_out_as_in_c() -> None:
    """An endpoint's bytes are its members in the machine's own order; a left-out member is zero."""
    encoded = layout(ENDPOINT, 12).encode({"ifindex": 7, "mac": bytes.fromhex("0a0000000001")})
    assert encoded == struct.pack("=I6sH", 7, bytes.fromhex("0a0000000001"), 0)


def test_padding_is_where_the_compiler_puts_it_and_invisible() -> None:
    """Members after padding stand at their C offsets; padding is written as zero and not reported."""
    padded = layout(PADDED, 24)
    encoded = padded.encode({"small": 1, "large": 2, "end": -3})
    assert encoded == struct.pack("@BQh6x", 1, 2, -3)
    assert padded.decode(encoded) == {"small": 1, "large": 2, "end": -3}


def test_nested_structs_and_arrays_of_structs() -> None:
    """A struct in a struct is a dict in a dict; an array of structs is a list of dicts."""
    flow = layout(FLOW, 52)
    value = {
        "source": {"word": [1, 2, 3, 4]},
        "port": [80, 443],
        "hops": [{"word": [5, 6, 7, 8]}, {"word": [9, 10, 11, 12]}],
    }
    encoded = flow.encode(value)
    assert encoded == struct.pack("=4I2H8I", *range(1, 5), 80, 443, *range(5, 13))
    assert flow.decode(encoded) == value


def test_bytes_stand_for_any_array() -> None:
    """An address is given as its packed bytes, whatever the element type."""
    packed = bytes(range(16))
    assert layout(ADDRESS, 16).encode({"word": packed}) == packed


def test_a_scalar_is_a_layout_too() -> None:
    """A map's key may be a plain integer."""
    assert layout("unsigned int", 4).encode(1) == struct.pack("=I", 1)
    assert layout("_Bool", 1).decode(b"\1") is True


@given(
    ifindex=st.integers(0, 2**32 - 1),
    mac=st.binary(min_size=6, max_size=6),
    flags=st.integers(0, 2**16 - 1),
)
def test_what_is_encoded_is_decoded(ifindex: int, mac: bytes, flags: int) -> None:
    """Decoding is the inverse of encoding for every value in range; byte arrays come back as bytes."""
    endpoint = layout(ENDPOINT, 12)
    value = {"ifindex": ifindex, "mac": mac, "flags": flags}
    assert endpoint.decode(endpoint.encode(value)) == value


@pytest.mark.parametrize(
    ("description", "size"),
    [
        ("unsigned __int128", 16),
        ("void *", 8),
        (["bits", [["a", "unsigned int", 3], ["b", "unsigned int", 5]], "struct"], 4),
        (["s", [["", [["u", "unsigned int"]], "union"]], "struct_packed"], 4),
        (["s", [["named", ["", [["u", "unsigned int"]], "union"]]], "struct_packed"], 4),
    ],
)
def test_types_that_python_cannot_show_are_refused(description: object, size: int) -> None:
    """128-bit integers, pointers, bit-fields and unions are refused with the map's name, not misread."""
    with pytest.raises(LayoutError, match=r"^map.*not supported"):
        layout(description, size)


def test_a_description_of_another_size_is_refused() -> None:
    """If bcc's description and the map's size disagree (it drops an array's second dimension), nothing is read."""
    nested_array = ["s", [["z", "unsigned char", [2]], ["__pad_end", "char", [2]]], "struct_packed"]
    with pytest.raises(LayoutError, match=r"6 bytes, of which bcc describes 4"):
        layout(nested_array, 6)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({"ifindex": 2**32}, r"map\.ifindex: 4294967296"),
        ({"mac": b"short"}, r"map\.mac: 5 bytes given, 6 needed"),
        ({"mac": "0a0000"}, r"map\.mac: '0a0000' is neither bytes nor a sequence of 6"),
        ({"mac": [1, 2, 3, 4, 5, 256]}, r"map\.mac\[5\]: 256"),
        ({"ifidnex": 1}, r"map: no such fields: ifidnex"),
        (7, r"map: 7 is not a mapping"),
    ],
)
def test_a_value_that_does_not_fit_is_named(value: object, complaint: str) -> None:
    """The error names the member and the value."""
    with pytest.raises(LayoutError, match=complaint):
        layout(ENDPOINT, 12).encode(value)


def test_bytes_of_another_length_are_not_decoded() -> None:
    """Bytes from another layout are refused."""
    with pytest.raises(LayoutError, match="11 bytes given, 12 needed"):
        layout(ENDPOINT, 12).decode(bytes(11))
