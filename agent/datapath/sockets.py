"""Programs at calls on sockets, as the agent's loop sees them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..state import KernelError
from . import libbpf, links
from .entries import failures
from .loader import Datapath

CALLS = tuple(libbpf.SOCKET_CALLS)
"""All calls that there are programs for."""


class SocketHooks:
    """`Table[str, int]`: the programs for calls on sockets, by links pinned as `<pin dir>/sockets/<call>`.

    Keys are the calls, which are the programs' names; values the number of the cgroup whose processes' calls it sees.
    As with tcx links, the pin keeps the program attached, and says whose it is.
    """

    def __init__(self, datapath: Datapath, pin_dir: Path, cgroup: Path | None) -> None:
        self._programs = datapath.programs
        self._ids = datapath.program_ids
        self._pins = pin_dir / "sockets"
        self._cgroup = cgroup

    def read(self) -> dict[str, int]:
        """Return what runs; 0 where it is not the program of this datapath, or the cgroup is gone."""
        found: dict[str, int] = {}
        for call in links.names(self._pins):
            link = libbpf.open_pin(self._pins / call)
            if link is not None:
                with libbpf.closing(link):
                    info = libbpf.link_info(link, str(self._pins / call))
                found[call] = info.target if info.program_id == self._ids.get(call) else 0
        return found

    def upsert(self, items: Mapping[str, int]) -> dict[str, KernelError]:
        """Attach programs; one that replaces another does so between two calls. Return the failures."""
        return failures(items, lambda call: self._attach(call, items[call]))

    def delete(self, keys: Iterable[str]) -> dict[str, KernelError]:
        """Detach programs; return the failures."""
        return failures(keys, lambda call: links.detach(self._pins / call))

    def _attach(self, call: str, cgroup: int) -> None:
        what = f"{call} at the sockets of {self._cgroup}"
        link = libbpf.open_pin(self._pins / call)
        if link is not None:
            with libbpf.closing(link):
                if libbpf.link_info(link, what).target == cgroup:
                    libbpf.link_update(link, self._programs[call], what)
                    return
            links.detach(self._pins / call)
        libbpf.make_folder(self._pins)
        try:
            folder = os.open(self._cgroup or "", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise KernelError(f"attach {what}: {error.strerror}") from error
        with libbpf.closing(folder):
            created = libbpf.link_create(self._programs[call], folder, libbpf.SOCKET_CALLS[call], what)
        with libbpf.closing(created):
            libbpf.pin(created, self._pins / call)
