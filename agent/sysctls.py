"""The settings of the node's own kernel that podlane needs: forwarding, and the ports that masquerading may use."""

from __future__ import annotations

from agent import netlink
from agent.journal import Journal
from agent.sections import Masquerade


class Sysctls:
    """See `ensure`; `masquerade` tells the ports, `journal` keeps what is to be taken back one day."""

    def __init__(self, masquerade: Masquerade, journal: Journal) -> None:
        self._masquerade = masquerade
        self._journal = journal

    def ensure(self) -> list[str]:
        """Set what is set otherwise; return that, as "name=value". Raises KernelError and OSError."""
        changes: dict[str, netlink.Change] = {}
        if not netlink.forwarding_enabled():
            changes |= netlink.enable_forwarding()
        if self._masquerade.enabled:
            changes |= netlink.reserve_ports(self._masquerade.first_port, self._masquerade.last_port)
        self._journal.note(changes)
        return [f"{name.replace('/', '.')}={change.after}" for name, change in changes.items()]
