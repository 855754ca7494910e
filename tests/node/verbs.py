"""Calls of the CNI plugin as a runtime makes them, and what is said of their outcome."""

from __future__ import annotations

from tests.node.machine import Machine, Netns, Outcome

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")


def traces(node: Machine) -> dict[str, list[str]]:
    """Return what pods have on the node from ADD on; links may come a little later."""
    return {kind: lines for kind, lines in node.traces().items() if kind != "links"}


def add(node: Machine, netns: Netns, **config: object) -> Outcome:
    """ADD a namespace, under its own name."""
    return node.cni("ADD", container_id=netns.name, netns=str(netns.path), config=config)


def delete(node: Machine, netns: Netns, **config: object) -> None:
    """DEL it; there is nothing to print."""
    done = node.cni("DEL", container_id=netns.name, netns=str(netns.path), config=config)
    assert (done.exit_code, done.stdout) == (0, "")


def assert_refused(outcome: Outcome, code: int, *words: str) -> None:
    """Assert that the call failed with this code, and an error object that says all of these words."""
    error = outcome.json()
    assert outcome.exit_code == 1
    assert error["code"] == code, error
    assert error.keys() <= {"cniVersion", "code", "msg", "details"}
    text = error["msg"] + " " + error.get("details", "")
    assert [word for word in words if word not in text] == [], text
