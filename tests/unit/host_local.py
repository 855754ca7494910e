"""The real host-local, Debian's, run on a directory of its own."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BINARY = Path("/usr/lib/cni/host-local")
needs_host_local = pytest.mark.skipif(not BINARY.exists(), reason="host-local (containernetworking-plugins) is absent")


@dataclass(frozen=True)
class HostLocal:
    """One network's host-local. `directory` is what podlane imports."""

    data_dir: Path
    network: str = "net"

    @property
    def directory(self) -> Path:
        """Where it keeps the network's addresses."""
        return self.data_dir / self.network

    def call(
        self,
        command: str,
        container: str,
        ipam: dict[str, Any],
        ifname: str = "eth0",
        cni_args: str = "",
        **keys: object,
    ) -> dict[str, Any]:
        """Run it; return its result or error object. `keys` are further ones of the configuration."""
        config = {"cniVersion": "1.0.0", "name": self.network, **keys, "ipam": {**ipam, "dataDir": str(self.data_dir)}}
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": container,
            "CNI_IFNAME": ifname,
            "CNI_NETNS": "/run/netns/none",
            "CNI_PATH": str(BINARY.parent),
            "CNI_ARGS": cni_args,
        }
        done = subprocess.run([BINARY], input=json.dumps(config).encode(), env=environment, capture_output=True)
        answer: dict[str, Any] = json.loads(done.stdout or b"{}")
        assert (done.returncode == 0) is ("code" not in answer), done
        return answer
