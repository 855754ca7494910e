"""Flows as they stand in the maps."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any

from .nat_talk import packed
from .nat_words import End, Flow
from .world import text, word


def raw(flow: Flow) -> dict[str, object]:
    """Return a flow as `struct tuple`."""
    return {
        "source": word(ip_address(flow.source)),
        "source_port": socket.htons(flow.source_port),
        "destination": word(ip_address(flow.destination)),
        "destination_port": socket.htons(flow.destination_port),
        "protocol": flow.protocol,
    }


def cooked(key: Mapping[str, Any]) -> Flow:
    """Return a `struct tuple` as a flow."""
    ports = [socket.ntohs(key[name]) for name in ("source_port", "destination_port")]
    ends = [_address(key[name]) for name in ("source", "destination")]
    return Flow(ends[0], ports[0], ends[1], ports[1], key["protocol"])


def end(value: Mapping[str, Any]) -> End:
    """Return the address and port of a flow's or owner's value."""
    return End(_address(value["address"]), socket.ntohs(value["port"]))


def _address(raw: Mapping[str, Any]) -> bytes:
    return packed(text(raw))
