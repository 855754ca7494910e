"""Whether the node can serve ADD, and whom it concerns if it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from agent.store import StoreError


@dataclass
class Readiness:
    """Whether ADD can be served, for STATUS and the readiness probe, which must say the same."""

    unproved: str = "the agent is starting"
    """What the datapath's proof lacks; empty once it is there."""
    uninstalled: str = "the CNI configuration is not installed yet"
    """What could not be put where the runtime looks; empty if nothing."""
    trouble: Callable[[], str] = lambda: ""
    """Says what keeps the kernel from being brought up to date; empty if nothing."""
    unaddressed: Callable[[], str] = lambda: ""
    """Says why the agent has no addresses of its own to give, full or not; empty if it has some."""
    exhausted: Callable[[], str] = lambda: ""
    """Says which of the agent's own addresses have run out; empty while there are some."""

    refused: Callable[[], str] = lambda: ""
    """Says which of the node's own pod CIDRs is another node's; empty if none."""

    @property
    def limited(self) -> str:
        """Why ADD cannot be served now, if running pods may be cut off as well; else empty."""
        return self.unproved or self.trouble()

    @property
    def reason(self) -> str:
        """Why ADD cannot be served now; empty if it can."""
        try:
            return self.limited or self.refused() or self.unaddressed() or self.uninstalled or self.exhausted()
        except StoreError as error:
            return str(error)
