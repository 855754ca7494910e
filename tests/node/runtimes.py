"""Runtimes that are not at hand, as far as a plugin can tell: how libcni and Multus call it, from their sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.node.contract import WITH_CHECK, Container
from tests.node.machine import Outcome

POD = {"K8S_POD_NAMESPACE": "shop", "K8S_POD_NAME": "web-0", "K8S_POD_UID": "4a6f-1"}


def cni_args(container_id: str, *, ignore: str = "1") -> list[str]:
    """Return the pairs of CNI_ARGS that containerd and CRI-O send."""
    pod = [f"{key}={value}" for key, value in POD.items()]
    return [f"IgnoreUnknown={ignore}", *pod, f"K8S_POD_INFRA_CONTAINER_ID={container_id}"]


@dataclass
class Libcni:
    """A list with podlane as its only plugin, called as libcni does (cni:libcni/api.go): stdin, cache, prevResult."""

    it: Container
    version: str
    capabilities: Mapping[str, bool] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)

    def call(self, command: str, prev: object = None, **runtime: object) -> Outcome:
        """Call the plugin with its own object, and what libcni puts in."""
        enabled = {key: value for key, value in runtime.items() if self.capabilities.get(key)}
        config: dict[str, Any] = {"cniVersion": self.version, "capabilities": self.capabilities}
        config |= {"runtimeConfig": enabled} if enabled else {}
        config |= {"prevResult": prev} if prev else {}
        return self.it.call(command, **config)

    def add(self, **runtime: object) -> Any:  # noqa: ANN401
        """ADD; what it prints is in the cache, if it succeeds."""
        outcome = self.call("ADD", **runtime)
        assert outcome.exit_code == 0, outcome.stdout
        self.cache["eth0"] = outcome.json()
        return self.cache["eth0"]

    def check(self, **runtime: object) -> None:
        """CHECK with what the cache has."""
        assert self.call("CHECK", self.cache["eth0"], **runtime).exit_code == 0

    def delete(self, **runtime: object) -> None:
        """DEL with what the cache has, from 0.4.0 on; it goes from there then."""
        prev = self.cache.get("eth0") if self.version in WITH_CHECK else None
        assert self.call("DEL", prev, **runtime).exit_code == 0
        self.cache.clear()


@dataclass
class Multus:
    """Calls podlane for one pod as Multus does for each of its networks (multus:pkg/multus/multus.go)."""

    it: Container
    results: dict[str, Any] = field(default_factory=dict)

    def arguments(self, *more: str) -> dict[str, str]:
        """Return the environment: what Multus says, then what its caller said, and the requests behind."""
        name = self.it.netns.name
        ours, incoming = cni_args(name, ignore="true"), cni_args(name)
        return {"CNI_ARGS": ";".join([*ours, *incoming, *more])}

    def call(self, command: str, ifname: str, network: Mapping[str, Any], *more: str) -> Outcome:
        """Call it for an interface."""
        prev = {"prevResult": self.results[ifname]} if ifname in self.results and command != "ADD" else {}
        outcome = self.it.call(command, ifname=ifname, env=self.arguments(*more), **{**network, **prev})
        if command == "ADD" and outcome.exit_code == 0:
            self.results[ifname] = outcome.json()
        return outcome
