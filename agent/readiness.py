"""Whether the node can serve ADD, and whom it concerns if it cannot; and whether the agent is to be restarted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from agent.store import StoreError


@dataclass
class Readiness:
    """Whether ADD can be served, for STATUS and /readyz, which must say the same."""

    unproved: str = "the agent is starting"
    """What the datapath's proof lacks; empty once it is there."""
    uninstalled: str = "the CNI configuration is not installed yet"
    """What could not be put where the runtime looks; empty if nothing."""
    hung: Callable[[], str] = lambda: ""
    """Says that the loop does not come round any more, which only another agent may mend; empty if it does."""
    trouble: Callable[[], str] = lambda: ""
    """Says what keeps the kernel from being brought up to date; empty if nothing."""
    unaddressed: Callable[[], str] = lambda: ""
    """Says why the agent has no addresses of its own to give, full or not; empty if it has some."""
    exhausted: Callable[[], str] = lambda: ""
    """Says which of the agent's own addresses have run out; empty while there are some."""
    refused: Callable[[], str] = lambda: ""
    """Says which of the node's own pod CIDRs is another node's; empty if none."""
    no_tunnel: Callable[[], str] = lambda: ""
    """Says why there is no tunnel to other nodes; empty if there is one, or nobody asked for one."""
    needs_tunnel: Callable[[], bool] = lambda: False
    """Says whether another node, or its pods, are reached by the tunnel."""

    @property
    def cut_off(self) -> str:
        """Why other nodes cannot be reached; empty if they can. A tunnel that nobody needs now is not missed."""
        missing = self.no_tunnel()
        return f"other nodes cannot be reached: {missing}" if missing and self.needs_tunnel() else ""

    @property
    def limited(self) -> str:
        """Why pods cannot be served as they should be now, if running ones may be cut off as well; else empty."""
        return self.unproved or self.hung() or self.trouble() or self.cut_off

    @property
    def unwell(self) -> str:
        """Why ADD could not be served now if there were addresses; empty if it could."""
        return self.limited or self.refused() or self.unaddressed() or self.uninstalled

    @property
    def reason(self) -> str:
        """Why the node is not ready; empty if it is."""
        try:
            return self.unwell or self.exhausted()
        except StoreError as error:
            return str(error)
