"""Has pyroute2 imported in part: its `__init__` imports all of it, 7 MB and 0.1 s for what nobody here uses."""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec


def import_in_part(package: str) -> None:
    """Have a package's modules imported without its `__init__`, unless it is imported already."""
    spec = find_spec(package)
    if spec is not None and package not in sys.modules:
        sys.modules[package] = module_from_spec(spec)


import_in_part("pyroute2")
