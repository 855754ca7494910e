"""What the agent has changed of the node's own settings (sysctls), so that an uninstall can take it back."""

from __future__ import annotations

import json
from pathlib import Path

from agent.files import replace_file
from agent.netlink import Change

NAME = "sysctls.json"
"""Within the state directory."""


class Journal:
    """A file of changes. Those of an earlier boot count for nothing: the kernel has forgotten them."""

    def __init__(self, state: Path, boot_id: str) -> None:
        self._path = state / NAME
        self._boot_id = boot_id

    def note(self, changes: dict[str, Change]) -> None:
        """Add changes that were made just now; what was before the first one counts. Raises OSError."""
        if not changes:
            return
        known = self.changes()
        for name, change in changes.items():
            known[name] = Change(known[name].before if name in known else change.before, change.after)
        document = {"boot_id": self._boot_id, "changes": known}
        replace_file(self._path, json.dumps(document, indent=1).encode(), 0o600)

    def changes(self) -> dict[str, Change]:
        """Return what was changed, and is not known to be taken back. Raises OSError."""
        try:
            document = json.loads(self._path.read_bytes())
            if document["boot_id"] != self._boot_id:
                return {}
            return {str(name): Change(str(before), str(after)) for name, (before, after) in document["changes"].items()}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}  # damaged, so nobody knows
