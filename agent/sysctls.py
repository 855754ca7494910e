"""The settings of the node's own kernel that podlane needs: forwarding, and the ports that masquerading may use."""

from __future__ import annotations

from agent import netlink
from agent.config import Masquerade


class Sysctls:
    """See `ensure`; `masquerade` tells the ports."""

    def __init__(self, masquerade: Masquerade) -> None:
        self._masquerade = masquerade

    def ensure(self) -> list[str]:
        """Set what is set otherwise; return what that was. Raises KernelError."""
        changed = []
        if not netlink.forwarding_enabled():
            netlink.enable_forwarding()
            changed.append("forwarding")
        first, last = self._masquerade.first_port, self._masquerade.last_port
        if self._masquerade.enabled and netlink.reserve_ports(first, last):
            changed.append(f"net.ipv4.ip_local_reserved_ports={first}-{last}")
        return changed
