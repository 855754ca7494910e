"""The DNS settings of a resolv.conf file, for `ipam.resolvConf`."""

from __future__ import annotations

from pathlib import Path

from agent.files import read_regular
from cni.errors import CniError, Code
from cni.result import Dns

_MAX_BYTES = 1 << 20


def read_resolv_conf(path: str) -> Dns:
    """Return the settings of a file. Raises CniError with code 7, naming file and reason."""
    try:
        content = read_regular(Path(path), _MAX_BYTES)
    except (OSError, ValueError) as error:
        raise CniError(Code.INVALID_NETWORK_CONFIG, f"ipam.resolvConf: cannot read {path!r}", str(error)) from error
    return parse_resolv_conf(content.decode(errors="replace"))


def parse_resolv_conf(text: str) -> Dns:
    """Return the settings of a resolv.conf(5).

    As in host-local, the last `domain` counts, the other lists add up, and what is unknown or has no value is ignored.
    """
    values: dict[str, list[str]] = {"nameserver": [], "domain": [], "search": [], "options": []}
    for line in text.splitlines():
        key, *rest = line.split() or [""]
        if rest and key in values:
            values[key] += rest if key in ("search", "options") else rest[:1]
    return Dns(
        nameservers=tuple(values["nameserver"]),
        domain=values["domain"][-1] if values["domain"] else "",
        search=tuple(values["search"]),
        options=tuple(values["options"]),
    )
