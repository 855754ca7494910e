"""What the cluster is told of a node, against a real API server's rules for patches and events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.kubernetes import Api, Herald, NodeSource
from tests.node.api.objects import make_node
from tests.node.api.server import ApiServer

TAINT = {"key": "podlane.io/agent-not-ready", "effect": "NoSchedule", "value": "true"}
OTHER = {"key": "dedicated", "effect": "NoExecute", "timeAdded": "2026-01-01T00:00:00Z"}
UP = ("False", "PodlaneIsUp")
CUT_OFF = ("True", "PodlaneIsCutOff")


class Told:
    """A herald at work, with the source that tells it of its node, which is called "n"."""

    def __init__(self, server: ApiServer) -> None:
        kubeconfig = server.write_kubeconfig()
        self.server = server
        self.is_ready = False
        self.cut_off = ""
        self.troubles: dict[str, str] = {}
        self.source = NodeSource(lambda: Api(kubeconfig), "n", lambda _: None)
        self.herald = Herald(
            connect=lambda: Api(kubeconfig),
            node="n",
            own=lambda: self.source.own,
            is_ready=lambda: self.is_ready,
            cut_off=lambda: self.cut_off,
            troubles=lambda: self.troubles,
            startup_taint=TAINT["key"],
        )
        self.source.start()
        self.herald.start()

    @property
    def node(self) -> Any:  # noqa: ANN401  # a JSON object
        """The Node as the server has it."""
        return self.server.objects.get("n")

    @property
    def condition(self) -> tuple[str, str] | None:
        """Status and reason of NetworkUnavailable."""
        found = [each for each in self.node["status"]["conditions"] if each["type"] == "NetworkUnavailable"]
        return (found[0]["status"], found[0]["reason"]) if found else None

    def set(self, *, taints: list[dict[str, str]], condition: tuple[str, str] | None = None) -> None:
        """Write the Node as somebody else does."""
        node = make_node("n", ["10.0.0.0/24"], ["192.168.0.1"])
        node["spec"]["taints"] = taints
        if condition:
            status, reason = condition
            node["status"]["conditions"] += [{"type": "NetworkUnavailable", "status": status, "reason": reason}]
        self.server.objects.put(node)

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Poll until the condition holds."""
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}"
            threading.Event().wait(0.01)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    """Serve."""
    it = ApiServer(tmp_path)
    it.start()
    yield it
    it.stop()


@pytest.fixture
def told(server: ApiServer) -> Iterator[Told]:
    """Start a herald for a tainted node of which nobody has said anything yet."""
    it = Told(server)
    it.set(taints=[OTHER, TAINT])
    yield it
    it.herald.stop()
    it.source.stop()


def test_a_node_that_is_not_ready_is_left_alone(server: ApiServer, told: Told) -> None:
    """Before the node is ready, its taint stays and nothing is said of its network."""
    told.wait_for(lambda: told.source.own, "the node")
    threading.Event().wait(1.5)
    assert told.node["spec"]["taints"] == [OTHER, TAINT]
    assert told.condition is None
    assert server.requests("PATCH") + server.requests("PATCH", "nodes/status") == []


def test_a_ready_node_is_untainted_and_said_to_be_up(server: ApiServer, told: Told) -> None:
    """Once ready, the node loses the start-up taint and no other one, and its network is said to be available."""
    told.is_ready = True
    told.wait_for(lambda: told.condition == UP, "the condition")
    told.wait_for(lambda: told.node["spec"]["taints"] == [OTHER], "the taint to go")
    assert [each["type"] for each in told.node["status"]["conditions"]] == ["Ready", "NetworkUnavailable"]
    assert {each.status for each in server.seen} == {200}
    threading.Event().wait(1.5)
    assert len(server.requests("PATCH")) == len(server.requests("PATCH", "nodes/status")) == 1


@pytest.mark.parametrize("before", [("True", "NoRouteCreated"), ("Unknown", "NodeStatusUnknown")])
def test_it_is_kept_so(told: Told, before: tuple[str, str]) -> None:
    """If somebody says that the network is unavailable, or taints the node anew, that is put right."""
    told.is_ready = True
    told.wait_for(lambda: told.condition == UP, "the condition")
    told.set(taints=[TAINT], condition=before)
    told.wait_for(lambda: told.condition == UP and told.node["spec"]["taints"] == [], "both again")


def test_a_node_that_is_cut_off(server: ApiServer, told: Told) -> None:
    """A node that does not reach others is said to have no network, and stays tainted, until it is ready."""
    told.cut_off = "UDP port 4789 is in use"
    told.wait_for(lambda: told.condition == CUT_OFF, "the condition")
    told.is_ready, told.cut_off = True, ""
    told.wait_for(lambda: told.condition == UP and told.node["spec"]["taints"] == [OTHER], "both")
    told.is_ready, told.cut_off = False, "UDP port 4789 is in use"
    told.wait_for(lambda: told.condition == CUT_OFF, "the condition again")
    assert told.node["status"]["conditions"][-1]["message"] == "UDP port 4789 is in use"
    assert len(server.requests("PATCH", "nodes/status")) == 3
    assert len(server.requests("PATCH")) == 1


def test_what_others_say_to_the_same_effect_stays(server: ApiServer, told: Told) -> None:
    """Where somebody else, such as a cloud's route controller, keeps the condition False, it stays theirs."""
    told.set(taints=[], condition=("False", "RouteCreated"))
    told.is_ready = True
    threading.Event().wait(1.5)
    assert told.condition == ("False", "RouteCreated")
    assert server.requests("PATCH", "nodes/status") == []


def test_a_taint_that_comes_in_between_is_kept(server: ApiServer, told: Told) -> None:
    """If others change the taints while podlane removes its own, the server refuses (409), and theirs are kept."""
    raced: list[str] = []

    def race_once(verb: str, _query: dict[str, str]) -> None:
        if verb == "PATCH" and not raced:
            raced.append(verb)
            told.set(taints=[TAINT, {"key": "late", "effect": "NoSchedule"}])

    server.faults.before = race_once
    told.is_ready = True
    told.wait_for(lambda: told.condition == UP, "the condition")
    assert told.node["spec"]["taints"] == [{"key": "late", "effect": "NoSchedule"}]
    assert [each.status for each in server.requests("PATCH")] == [409, 200]


def test_events(server: ApiServer, told: Told) -> None:
    """What needs a person is written as one event, in the form by which `kubectl describe node` finds it."""
    told.troubles = {"PodCIDRConflict": "pod CIDR 10.0.0.0/24 overlaps"}
    told.wait_for(lambda: server.objects.events, "an event")
    (event,) = server.objects.events
    assert event["involvedObject"] == {"kind": "Node", "name": "n", "uid": "n"}
    assert (event["type"], event["reason"]) == ("Warning", "PodCIDRConflict")
    assert event["message"] == "pod CIDR 10.0.0.0/24 overlaps"
    assert (event["metadata"]["namespace"], event["count"]) == ("default", 1)
    threading.Event().wait(1.5)
    assert len(server.objects.events) == 1
    told.troubles = {"PodCIDRConflict": "pod CIDR 10.0.1.0/24 overlaps"}
    told.wait_for(lambda: len(server.objects.events) == 2, "an event of what is new")


def test_events_are_few(server: ApiServer, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told in other words each time, such as with the index of a device, fills nobody's list of events."""
    monkeypatch.setattr("agent.kubernetes.herald._CHECK_SECONDS", 0.01)
    for number in range(20):
        told.troubles = {"DatapathFailed": f"attach from_pod (index {number})"}
        threading.Event().wait(0.1)
    told.troubles["PodCIDRConflict"] = "pod CIDR 10.0.0.0/24 overlaps"
    told.wait_for(lambda: "PodCIDRConflict" in str(server.objects.events), "the event of another reason")
    assert len(server.objects.events) <= 6


def test_events_wait_for_the_server(server: ApiServer, told: Told) -> None:
    """An event that the server did not take is written later."""
    told.wait_for(lambda: server.watches, "the watch")
    server.faults.refusals.extend([500, 500])
    told.troubles = {"NotReady": "no bpffs"}
    told.wait_for(lambda: server.objects.events, "the event")
    assert [each.status for each in server.requests("POST", "events")] == [500, 500, 201]


def test_a_missing_permission_hinders_nothing_else(server: ApiServer, told: Told) -> None:
    """Without the right to write events, the node is untainted and said to be up all the same."""
    server.rules.discard(("POST", "events"))
    told.troubles = {"NotReady": "no bpffs"}
    told.is_ready = True
    told.wait_for(lambda: told.condition == UP and told.node["spec"]["taints"] == [OTHER], "both")
    assert {each.status for each in server.requests("POST", "events")} <= {403}
