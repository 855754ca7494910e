"""The agent's configuration: one YAML file, one model. Every field says its unit, its default, and why that default.

Keys with keys of their own are in `agent.sections`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from ipaddress import ip_network
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from agent.ranges import Range, is_within
from agent.sections import Kubernetes, ListedNode, Masquerade, Model, Paths, Prefix, Subnet, Tunnel
from agent.state import Network, Routing
from cni.document import explain

IPV6_MIN_MTU = 1280  # bytes
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, where it is: ten times as fast, for many nodes


class ConfigError(Exception):
    """The configuration cannot be used; the message names the file, the field, what was given and what is allowed."""


def _given(value: object) -> object:
    """Return what a key with nothing behind it means: that it is wanted, with all defaults."""
    return {} if value is None else value


def _check_mtu(mtu: int) -> int:
    if 0 < mtu < IPV6_MIN_MTU:
        raise ValueError(f"allowed are 0 and {IPV6_MIN_MTU} to 65535: IPv6 needs that much (RFC 8200 section 5)")
    return mtu


def _check_port(address: str) -> str:
    if int(address.rpartition(":")[2]) > 65535:
        raise ValueError("the port is above 65535")
    return address


def _own_name() -> str:
    return os.environ.get("NODE_NAME") or socket.gethostname().lower()


class Config(Model):
    """All that a person can decide about an agent."""

    node_name: str = Field(min_length=1, default_factory=_own_name)
    """This node's name in the cluster. Default: $NODE_NAME, which the DaemonSet sets, else the host's name in lower
    case, which is what kubelet registers."""
    kubernetes: Annotated[Kubernetes | None, BeforeValidator(_given)] = None
    """Follow the Nodes of a Kubernetes cluster; `{}`, or nothing behind the key, does so with all defaults. The agent's
    own ranges are then the pod CIDRs of its Node, in place of `ranges`. Default: a node for itself."""

    network: Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.\-]*$")] = "podlane"
    """Name of the network in the CNI configuration that the agent installs."""
    ranges: tuple[Subnet, ...] = (
        Subnet(subnet=ip_network("10.244.0.0/24")),
        Subnet(subnet=ip_network("fd00:10:244::/64")),
    )
    """Each pod gets one address of every family that has a range; ranges of one family follow one another. Default:
    one node's share of what most clusters use; none with `kubernetes`."""
    exclude: tuple[Prefix, ...] = ()
    """Addresses and prefixes within the ranges that no pod gets, because something else has them. Default: none."""
    reserved: tuple[Prefix, ...] = ()
    """Addresses and prefixes within the ranges for pods that ask for them by name. Default: none."""
    sticky: bool = False
    """Give a pod the addresses again that the last one of its namespace and name had, where they are free. Default: an
    address rests as long as possible, since others may still remember whose it was."""
    cluster_cidrs: tuple[Prefix, ...] = ()
    """The prefixes in which all pod CIDRs of the cluster lie, of each family that pods have (kube-controller-manager's
    --cluster-cidr): a pod CIDR that is not within one of them is refused, whoever claims it. Without Kubernetes, this
    key is read again when the file changes, as `nodes` is. Default: a node may have any prefix that no older one has,
    so that who may register a Node can draw what pods send there, be it to the world."""
    nodes: tuple[ListedNode, ...] = ()
    """All nodes of the cluster, this one among them, where no Kubernetes tells of them. This key is read again when the
    file changes; the list may be the same on all nodes. Default: the node is alone."""
    routing: Routing = "auto"
    """How pods' packets get to other nodes. "direct": as they are, so the nodes, or the routers between them, must know
    the way; "vxlan": wrapped in UDP; "auto": direct to the nodes that are on-link, wrapped to the others. Default: what
    works where each link carries whatever addresses; "vxlan" also works where the network itself drops what is not from
    a node's own address (clouds that check sources, as AWS and OpenStack do unless told not to)."""
    tunnel: Tunnel = Tunnel()
    """How they are wrapped. Default: the usual port."""
    mtu: Annotated[int, Field(strict=True, ge=0, le=65535), AfterValidator(_check_mtu)] = 0
    """MTU of the pods' interfaces in bytes. Default 0: that of the uplink, so that no packet needs fragmenting; in a
    cluster, unless `routing` is "direct", less what wrapping adds (50 bytes over IPv4, 70 over IPv6)."""
    hooks: Literal["auto", "tcx", "clsact"] = "auto"
    """How programs are attached. Default: tcx where the kernel has it (6.6), since its links are pinned and swapped
    atomically; else clsact filters."""
    max_pods: Annotated[int, Field(strict=True, ge=1, le=65536)] = 1024
    """Size of the endpoint map in pods. Default: far above the 110 of a usual node, at 300 kB of kernel memory."""
    masquerade: Masquerade = Masquerade()
    """How pods reach the world. Default: under their node's address."""
    resync_seconds: Annotated[float, Field(strict=True, gt=0, le=3600)] = 5.0
    """How often the kernel is compared with what it should be, beside at every change that the kernel announces."""
    gc_grace_seconds: Annotated[float, Field(strict=True, ge=0, le=86400)] = 60.0
    """How long a pod's device and network namespace must be gone before its addresses are released without a DEL.
    Default: longer than runtimes take from the end of a namespace to their DEL."""
    metrics: Annotated[str, Field(pattern=r"^.+:[0-9]{1,5}$"), AfterValidator(_check_port)] = "127.0.0.1:9815"
    """Address ("[…]" around one of IPv6, "*" for all) and port of /metrics, /healthz and /readyz. Default: this machine
    only."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Default: one line per change of state."""
    paths: Paths = Paths()
    """Default: the usual places of a node."""

    @field_validator("ranges")
    @classmethod
    def _ranges_are_distinct(cls, ranges: tuple[Subnet, ...]) -> tuple[Subnet, ...]:
        if not ranges:
            raise ValueError("give at least one subnet")
        _refuse_overlaps([each.subnet for each in ranges])
        return ranges

    @field_validator("cluster_cidrs")
    @classmethod
    def _cluster_cidrs_are_distinct(cls, cluster_cidrs: tuple[Network, ...]) -> tuple[Network, ...]:
        if not cluster_cidrs:
            raise ValueError("give at least one prefix, or leave the key out: any may be a node's then")
        _refuse_overlaps(cluster_cidrs)
        return cluster_cidrs

    @model_validator(mode="after")
    def _ranges_are_the_clusters(self) -> Config:
        known = ", ".join(map(str, self.cluster_cidrs))
        for own in self.own_ranges if self.cluster_cidrs else ():
            if not is_within(own.subnet, self.cluster_cidrs):
                raise ValueError(f"cluster_cidrs ({known}) lack this node's range {own.subnet}: give other ones")
        return self

    @model_validator(mode="after")
    def _nodes_fit(self) -> Config:
        names = [each.name for each in self.nodes]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"nodes: {', '.join(sorted(twice))} is there twice")
        for own in (each for each in self.nodes if each.name == self.node_name):
            for subnet in (each.subnet for each in self.ranges):
                if not is_within(subnet, own.pod_cidrs):
                    raise ValueError(f"nodes: pod_cidrs of {own.name}, which is this node, lack its range {subnet}")
        return self

    @model_validator(mode="after")
    def _has_one_source_of_ranges(self) -> Config:
        if self.kubernetes is not None and "ranges" in self.model_fields_set:
            raise ValueError("kubernetes takes the place of ranges, which are the pod CIDRs of the Node: give either")
        if self.kubernetes is not None and self.nodes:
            raise ValueError("kubernetes takes the place of nodes, which are its Nodes: give either")
        return self

    @property
    def own_ranges(self) -> tuple[Range, ...]:
        """The ranges that are the node's own from the beginning on: none where the cluster assigns them."""
        return () if self.kubernetes else tuple(each.range() for each in self.ranges)


def _refuse_overlaps(networks: Sequence[Network]) -> None:
    """Raise ValueError if two of them have addresses in common."""
    for one, other in combinations(networks, 2):
        if one.version == other.version and one.overlaps(other):
            raise ValueError(f"{one} and {other} overlap")


def load(path: Path) -> Config:
    """Read and validate a configuration file. Raises ConfigError."""
    try:
        raw: Any = yaml.load(path.read_text(), Loader=_LOADER)  # noqa: S506 - both are safe
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(raw, dict | None):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, allowed are keys with their values")
    try:
        return Config.model_validate(raw or {})
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error)}{_allowed_keys(error)}") from error


def _allowed_keys(error: ValidationError) -> str:
    """Say which keys there are, if one that there is not was given."""
    if all(fault["type"] != "extra_forbidden" for fault in error.errors()):
        return ""
    models: dict[str, type[BaseModel]] = {
        "": Config,
        "kubernetes.": Kubernetes,
        "masquerade.": Masquerade,
        "nodes.*.": ListedNode,
        "paths.": Paths,
        "ranges.*.": Subnet,
        "tunnel.": Tunnel,
    }
    keys = (f"{prefix}{name}" for prefix, model in models.items() for name in model.model_fields)
    return f"; the keys are {', '.join(keys)}"
