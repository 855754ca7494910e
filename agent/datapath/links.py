"""Links that keep programs attached, by their pins: one folder for each kind."""

from __future__ import annotations

from pathlib import Path

from ..state import KernelError
from . import libbpf


def names(folder: Path) -> list[str]:
    """Return the names of the pins in a folder, which need not be there. Raises KernelError."""
    try:
        return [pin.name for pin in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise KernelError(f"list links: {error}") from error


def detach(pin: Path) -> None:
    """Detach what a pinned link has attached, whoever else holds it, and unpin it. Raises KernelError."""
    link = libbpf.open_pin(pin)
    if link is None:
        return
    with libbpf.closing(link):
        libbpf.link_detach(link, str(pin))
    try:
        pin.unlink(missing_ok=True)
    except OSError as error:
        raise KernelError(f"unpin link {pin}: {error}") from error
