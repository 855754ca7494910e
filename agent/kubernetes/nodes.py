"""What podlane reads of a Node, which is little: the rest of these large objects is never decoded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any, TypeVar

import msgspec

from agent.cluster import ClusterNode
from agent.kubernetes.api import ApiError, Gone
from agent.state import Address, Network

log = logging.getLogger(__name__)

T = TypeVar("T")

_GONE = 410


@dataclass(frozen=True, slots=True)
class OwnNode:
    """What else must be known of the own Node, to keep it as it shall be."""

    version: str
    """Its resource version."""
    network_unavailable: str | None
    """The status of that condition; None where there is none."""
    taints: tuple[dict[str, Any], ...]
    """As they are."""


class _Struct(msgspec.Struct, rename="camel", frozen=True):
    """What is not named here is skipped; what is null in the answer counts as absent."""


class _Metadata(_Struct, frozen=True):
    name: str = ""
    creation_timestamp: str | None = None
    resource_version: str = ""


class _Spec(_Struct, frozen=True):
    pod_cidrs: tuple[str, ...] | None = msgspec.field(name="podCIDRs", default=None)
    taints: tuple[dict[str, Any], ...] | None = None


class _NodeAddress(_Struct, frozen=True):
    type: str = ""
    address: str = ""


class _Condition(_Struct, frozen=True):
    type: str = ""
    status: str = ""


class _Status(_Struct, frozen=True):
    addresses: tuple[_NodeAddress, ...] | None = None
    conditions: tuple[_Condition, ...] | None = None


class _Node(_Struct, frozen=True):
    metadata: _Metadata
    spec: _Spec = _Spec()
    status: _Status = _Status()

    def own(self) -> OwnNode:
        conditions = self.status.conditions or ()
        unavailable = (each.status for each in conditions if each.type == "NetworkUnavailable")
        return OwnNode(self.metadata.resource_version, next(unavailable, None), self.spec.taints or ())

    def of_cluster(self) -> ClusterNode:
        name = self.metadata.name
        addresses = [each.address for each in self.status.addresses or () if each.type == "InternalIP"]
        return ClusterNode(
            name=name,
            addresses=tuple(each for each in map(_address, addresses) if each is not None),
            pod_cidrs=tuple(each for each in (_network(name, cidr) for cidr in self.spec.pod_cidrs or ()) if each),
            created=self.metadata.creation_timestamp or "",
        )


class _ListMetadata(_Struct, frozen=True):
    resource_version: str = ""
    continue_: str = msgspec.field(name="continue", default="")


class _Page(_Struct, frozen=True):
    metadata: _ListMetadata
    items: list[_Node] | None = None


class _Change(_Struct, frozen=True):
    type: str
    object: msgspec.Raw


class _Failure(_Struct, frozen=True):
    code: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list. `rest` names what follows; empty after the last one."""

    nodes: list[ClusterNode]
    own: OwnNode | None
    version: str
    rest: str


@dataclass(frozen=True, slots=True)
class Change:
    """What a watch tells: a node as it is now, or one that is deleted, or (a bookmark) a version only."""

    version: str
    node: ClusterNode | None = None
    own: OwnNode | None = None
    is_deleted: bool = False


def read_page(answer: bytes, own_name: str) -> Page:
    """Read a page of a NodeList. Raises ApiError."""
    page = _decode(answer, _Page)
    items = page.items or []
    own = next((each.own() for each in items if each.metadata.name == own_name), None)
    nodes = [each.of_cluster() for each in items]
    return Page(nodes, own, page.metadata.resource_version, page.metadata.continue_)


def read_change(line: bytes, own_name: str) -> Change:
    """Read an event of a watch. Raises ApiError, and Gone if the watch began too far back."""
    change = _decode(line, _Change)
    if change.type == "ERROR":
        failure = _decode(change.object, _Failure)
        kind = Gone if failure.code == _GONE else ApiError
        raise kind(f"watch nodes: {failure.code} {failure.message}")
    node = _decode(change.object, _Node)
    version = node.metadata.resource_version
    if change.type == "BOOKMARK":
        return Change(version)
    own = node.own() if node.metadata.name == own_name else None
    return Change(version, node.of_cluster(), own, is_deleted=change.type == "DELETED")


def _decode(content: bytes | msgspec.Raw, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.DecodeError as error:
        raise ApiError(f"the API server sent what is no {kind.__name__[1:]}: {error}") from error


def _address(text: str) -> Address | None:
    try:
        return ip_address(_without_zone(text))
    except ValueError:  # in the API any text is allowed
        return None


def _without_zone(text: str) -> str:
    """Return the text; raise ValueError if it has a zone, which makes another address of it than the kernel tells."""
    if "%" in text:
        raise ValueError(f"{text!r} has a zone (RFC 4007), which means nothing on other nodes")
    return text


def _network(name: str, cidr: str) -> Network | None:
    try:
        return ip_network(_without_zone(cidr), strict=False)  # the API does not mind bits of hosts
    except ValueError as error:
        log.warning("a pod CIDR is of no use node=%s: %s", name, error)
        return None
