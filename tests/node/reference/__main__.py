"""Write the table of the README: `python -m tests.node.reference`."""

from __future__ import annotations

from tests.node.reference.table import README, replaced

README.write_text(replaced(README.read_text()))
