"""An agent whose loop hangs."""

from __future__ import annotations

from pathlib import Path

from tests.node.forked import start_held_loop
from tests.node.machine import machine

PATIENCE = 0.5  # seconds
WHY = "the loop has not come round for more than 0.5 s"


def test_a_loop_that_hangs(tmp_path: Path) -> None:
    """The probes say so, and STATUS, until it goes on; pods talk on meanwhile; in the end another agent serves them."""
    with machine(tmp_path) as node:
        node.add_uplink()
        hold = start_held_loop(node, PATIENCE)
        a, b = node.make_pod("a"), node.make_pod("b")
        node.wait_for(lambda: node.get("/healthz") == (200, "ok\n"), "the agent to be alive")
        hold.arrange(1)
        hold.wait_held()
        node.wait_for(lambda: node.get("/healthz") == (503, f"{WHY}\n"), "the loop to be missed")
        assert node.get("/readyz") == (503, f"{WHY}\n")
        told = node.cni("STATUS", ifname="").json()
        assert (told["code"], told["details"]) == (51, WHY)
        assert "< ensure (" in node.log_tail().partition("the loop does not come round where=")[2]
        assert all(node.pings(a, each) for each in (*b.addresses, "192.0.2.1"))
        hold.let_go()
        node.wait_for(lambda: node.get("/healthz") == (200, "ok\n"), "the agent to be alive again")
        hold.arrange(1)
        hold.wait_held()
        assert node.stop_agent() == 0
        node.start_agent()
        assert node.get("/healthz") == (200, "ok\n")
        assert all(node.pings(a, each) for each in (*b.addresses, *node.make_pod("c").addresses))
