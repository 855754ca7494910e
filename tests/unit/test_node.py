"""The node's order of calls: one at a time for each attachment, whatever its runtime gave up waiting for."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

from agent.node import Node, Readiness
from agent.store import StoreError
from cni.call import Attachment

ONE, OTHER = Attachment("net", "one", "eth0"), Attachment("net", "other", "eth0")


def make_node() -> Node:
    """Return a node whose kernel is never asked."""
    nothing: Any = None
    return Node(store=nothing, wiring=nothing, loop=nothing, mtu=0, readiness=Readiness())


def test_calls_of_one_attachment_take_turns() -> None:
    """A second call waits until the first has ended, also by an error; those of other attachments do not."""
    node, order = make_node(), []
    begun = threading.Event()

    def second() -> None:
        begun.set()
        with node.turn(ONE):
            order.append("second")

    thread = threading.Thread(target=second)
    with suppress(ZeroDivisionError), node.turn(ONE):
        thread.start()
        assert begun.wait(10)
        with node.turn(OTHER):
            order.append("other")
        order.append("first")
        _ = 1 // 0
    thread.join(10)
    assert order == ["other", "first", "second"]


def test_reasons_in_order() -> None:
    """The first thing that keeps ADD from being served is the reason, and a store in trouble is one."""
    readiness = Readiness(unproved="a", uninstalled="b", trouble=lambda: "c", exhausted=lambda: "d")
    seen = []
    for field, value in (("unproved", ""), ("uninstalled", ""), ("trouble", str), ("exhausted", str)):
        seen.append(readiness.reason)
        setattr(readiness, field, value)
    assert (seen, readiness.reason) == (["a", "b", "c", "d"], "")

    def broken() -> str:
        raise StoreError("disk full")

    assert Readiness("", "", exhausted=broken).reason == "disk full"
