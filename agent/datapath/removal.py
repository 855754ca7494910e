"""Taking the datapath out of the kernel: nothing of it stays attached, and nothing pinned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..state import KernelError
from . import links

_LINKS = ("links", "sockets")  # at devices, and at calls on sockets


def remove(pin_dir: Path) -> Iterator[str]:
    """Detach the pinned links, then remove all pins; yield what there was. Raises KernelError.

    Maps and programs end with their last user: what has just been detached may run for a moment yet.
    """
    try:
        for name in (*_LINKS, "programs", "maps"):
            folder = pin_dir / name
            pins = sorted(folder.iterdir()) if folder.is_dir() else []
            for pin in pins:
                if name in _LINKS:
                    links.detach(pin)
                else:
                    pin.unlink()
            if pins:
                yield f"{name}: {len(pins)}"
            if folder.is_dir():
                folder.rmdir()
        if pin_dir.is_dir():
            pin_dir.rmdir()
    except OSError as error:
        raise KernelError(f"remove the pins in {pin_dir}: {error}") from error
