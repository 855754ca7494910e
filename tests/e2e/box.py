"""A box for a container runtime: PID and mount namespaces of its own, in which nothing of the machine's is touched.

Ending their first process ends the runtime, all containers and mounts at once, whatever state they are in. That first
process ends when the pipe from this one closes, so nothing outlives a harness that was killed either.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_STOP_TIMEOUT = 60.0  # seconds, after the containers' removal

# Stays outside, where the box's mounts do not exist, waits for the namespaces' end and removes what is left, also when
# the harness was killed. A cgroup can be busy for a moment after its last process.
_SUPERVISOR = """
home=$1 cgroup=$2; shift 2
"$@"
for attempt in {1..100}; do
  busy=
  for top in /sys/fs/cgroup/"$cgroup" /sys/fs/cgroup/*/"$cgroup"; do
    [ -d "$top" ] && ! find "$top" -depth -type d -delete && busy=1
  done 2>/dev/null
  [ $busy ] || break
  sleep 0.05
done
rm -rf --one-file-system "$home"
"""


def cgroup_of(home: Path) -> str:
    """Return the name of the cgroup, below the root of each hierarchy, that goes with the box of a directory."""
    return f"podlane-e2e-{sha256(bytes(home)).hexdigest()[:12]}"


def cgroups_named(name: str) -> list[Path]:
    """Return the directories of a cgroup right below the root of a hierarchy, of version 1 or 2.

    No deeper: cgroups of others come and go, and may be gone between being listed and being looked into.
    """
    root = Path("/sys/fs/cgroup")
    return [*root.glob(name), *root.glob(f"*/{name}")]


class Box:
    """Runs a script, as PID 1, in namespaces of its own until `close`; then its directory and cgroup are gone.

    `script` is bash; its $1 is `home`, its stdin ends when it has to. `netns` is the name, as of `ip netns`, of the
    network namespace that stands for the node; by default the caller's. `env` is the whole environment.
    """

    def __init__(self, home: Path, script: str, *, netns: str | None, env: Mapping[str, str]) -> None:
        self._log = (home / "log").open("w+b")
        enter = [] if netns is None else ["nsenter", f"--net=/run/netns/{netns}"]
        # Slave propagation: a network namespace that is deleted outside does not live on in a copied mount.
        unshare = ["unshare", "--mount", "--propagation=slave", "--pid", "--fork", "--kill-child"]
        init = ["--mount-proc", "bash", "-c", script, "init", str(home)]
        self._process = subprocess.Popen(
            ["bash", "-c", _SUPERVISOR, "supervisor", str(home), cgroup_of(home), *enter, *unshare, *init],
            env=env,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # an interrupt at the terminal is for the harness, which then stops this
        )

    @property
    def ended(self) -> bool:
        """Whether all of it has ended by itself."""
        return self._process.poll() is not None

    @property
    def init_pid(self) -> int:
        """PID of the box's first process, as seen from outside."""
        (unshare,) = _children(self._process.pid)
        (init,) = _children(unshare)
        return init

    def log_tail(self) -> str:
        """Return the end of what was printed in the box."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), 3000, max(0, size - 3000)).decode(errors="replace")

    def close(self) -> None:
        """End all processes in it and wait until nothing is left. Idempotent."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait(_STOP_TIMEOUT)
        self._log.close()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
