"""A case: one configuration, what is done with it, and what is known to differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.node.machine import Netns, Outcome
from tests.node.reference.sides import Side

Seen = dict[str, object]
"""What was observed, by name; plain values that compare equal if a user of the plugin cannot tell them apart."""


class Scene:
    """A case on one side: the plugin called with the case's configuration."""

    def __init__(self, side: Side, config: Mapping[str, Any], *, own_ipam: bool = False) -> None:
        self.side = side
        self.given = config
        self._own_ipam = own_ipam
        self._undo: list[Callable[[], Outcome]] = []

    @property
    def kind(self) -> str:
        """The reference plugin that the configuration is for."""
        return str(self.given["type"])

    def config(self, **changes: object) -> dict[str, Any]:
        """Return the configuration of this side's plugin; None takes a key away."""
        changed = {key: value for key, value in {**self.given, **changes}.items() if value is not None}
        return self.side.configured(changed, own_ipam=self._own_ipam)

    def pod(self, name: str = "a") -> Netns:
        """Return a container's network namespace."""
        return self.side.pods[name]

    def call(
        self,
        command: str,
        pod: str = "a",
        *,
        ifname: str = "eth0",
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
        **changes: object,
    ) -> Outcome:
        """Call the plugin for a container, with the configuration so changed, or with `stdin` in its place."""
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": f"container-{pod}",
            "CNI_NETNS": str(self.pod(pod).path),
            "CNI_IFNAME": ifname,
            **(env or {}),
        }
        given = json.dumps(self.config(**changes)) if stdin is None else stdin
        if command == "ADD":
            self._undo.append(lambda: self.side.execute(self.kind, given, {**environment, "CNI_COMMAND": "DEL"}))
        return self.side.execute(self.kind, given, environment)

    def undo(self) -> None:
        """DEL whatever was asked to be added."""
        for each in reversed(self._undo):
            each()


Act = Callable[[Scene], Seen]


@dataclass(frozen=True)
class Case:
    """`key` is the row of the README's table that it belongs to; `rule` its number among the contract's rules."""

    name: str
    key: str
    config: Mapping[str, Any]
    act: Act
    rule: str = ""
    own_ipam: bool = False

    def observe(self, side: Side) -> Seen:
        """Play it on one side, and leave nothing behind."""
        scene = Scene(side, self.config, own_ipam=self.own_ipam)
        side.reset()
        try:
            return self.act(scene)
        finally:
            scene.undo()
            side.clean_pods()


Pair = tuple[object, object]
"""What the reference plugin does, and what podlane does."""


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same, in words, and all observations that show it.

    `seen` has them by case and observation; what is not there must be equal.
    """

    key: str
    reference: str
    podlane: str
    why: str
    seen: Mapping[tuple[str, str], Pair] = field(default_factory=dict)


def compare(reference: Seen, podlane: Seen) -> dict[str, Pair]:
    """Return the observations that are not equal.

    What only one of the two came to is not among them: another one, of a call that was refused, tells why.
    """
    names = [name for name in reference if name in podlane]
    return {name: (reference[name], podlane[name]) for name in names if reference[name] != podlane[name]}
