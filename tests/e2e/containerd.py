"""A private, real containerd for tests and the demo; whichever CNI plugin is configured wires its pods.

It runs in a box (box.py) with all of its shims, containers and mounts.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from tests.e2e.box import PATH, Box, cgroup_of
from tests.e2e.cri import CriClient, CriError, CriUnavailableError, ExecResult, sandbox_config, server_pid
from tests.e2e.image import IMAGE, SERVE_OWN_NAME, write_image

START_TIMEOUT = 30.0  # seconds; a start takes a third of one
SERVER_TIMEOUT = 10.0  # seconds until a pod's web server must answer
PARALLEL_CALLS = 8  # pods; the best of 2, 4, 8 and 16 on two cores
# From Debian's containernetworking-plugins; containerd 1.6 calls it for every pod.
_LOOPBACK = Path("/usr/lib/cni/loopback")
_UNIX_PATH_MAX = 107  # bytes; unix(7)

# Directories whose names are compiled in, for shim sockets (containerd) and results (libcni): made private.
_SHARED_DIRECTORIES = {"shims": "/run/containerd", "cni": "/var/lib/cni"}

# PID 1 of the box: reaps, and ends when either containerd or the harness does (end of file on stdin). Its mounts are
# shared, as on any node: a container may ask to see those that come later.
_INIT = """
mount --make-rshared / &&
mount --bind "$1/shims" /run/containerd && mount --bind "$1/cni" /var/lib/cni && ip link set lo up || exit
containerd --config "$1/config.toml" </dev/null &
cat <&0 >/dev/null &
wait -n
"""

T = TypeVar("T")


class ContainerdError(Exception):
    """containerd did not start or become ready; the message ends with the last lines of its log."""


@dataclass(frozen=True)
class Pod:
    """A running pod with one container."""

    id: str
    """The sandbox's id, which is the container id that CNI plugins see."""
    name: str
    ips: list[str]
    """Its addresses as CRI reports them, the primary one first."""
    netns_path: Path
    """Its network namespace, by a path that opens from outside containerd's mount namespace."""
    container_id: str
    _cri: CriClient = field(repr=False, compare=False)

    def exec(self, argv: Sequence[str], *, timeout: int = 10) -> ExecResult:
        """Run a command in the pod's container; after `timeout` seconds it is killed, and `CriError`."""
        return self._cri.exec(self.container_id, argv, timeout)

    def remove(self) -> None:
        """Stop and remove the pod, as a kubelet does: the CNI plugin sees two DELs. Idempotent."""
        self._cri.remove_sandbox(self.id)


class Containerd:
    """One containerd, running from `start` (or `with`) to `stop`.

    Everything of it is in `directory`/containerd and in one cgroup (`cgroup` names it), and goes at `stop`; only
    the mount points /run/containerd and /var/lib/cni stay, empty, if the machine had none. `conf_dir` and `bin_dir`
    are its CNI directories; `bin_dir` gets a link to the `loopback` plugin if it has none. `netns` is the name, as
    of `ip netns`, of the network namespace that stands for the node; by default the caller's. CNI plugins inherit
    containerd's environment, which is a PATH and `env`. Once started, `pid` is its PID as seen from outside, `cri` its
    client, and `netns_dir` where it has its pods' network namespaces.
    """

    def __init__(
        self,
        directory: Path,
        *,
        conf_dir: Path,
        bin_dir: Path,
        netns: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._home = directory.resolve() / "containerd"
        self._socket = self._home / "containerd.sock"
        self.netns_dir = self._home / "state/io.containerd.grpc.v1.cri/netns"
        self.cgroup = cgroup_of(self._home)
        self._conf_dir, self._bin_dir = conf_dir.resolve(), bin_dir.resolve()
        self._netns, self._env = netns, {"PATH": PATH, **(env or {})}
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start containerd and give it the image that pods run; CNI need not be configured yet.

        Raises `ContainerdError`; FileExistsError if `directory` is in use by another one.
        """
        if len(bytes(self._socket)) + len(".ttrpc") > _UNIX_PATH_MAX:
            raise ContainerdError(f"start containerd: socket path too long: {self._socket}")
        with ExitStack() as undo:
            snapshotter = self._prepare(undo)
            self._box = Box(self._home, _INIT, netns=self._netns, env=self._env)
            undo.callback(self._box.close)
            self.pid = self.retry(lambda: server_pid(self._socket))
            self.cri = CriClient(self._socket)
            undo.callback(self.cri.close)
            self.retry(lambda: self.cri.check_ready(network=False))
            self._snapshotter = snapshotter
            archive = self._home / "image.tar"
            write_image(archive)
            self.import_image(archive, IMAGE)
            undo.callback(self._remove_pods)
            self._undo = undo.pop_all()

    def wait_ready(self, timeout: float = START_TIMEOUT) -> None:
        """Wait until a CNI configuration is in force; after `timeout` seconds, raise `ContainerdError`."""
        self.retry(lambda: self.cri.check_ready(network=True), timeout)

    def stop(self) -> None:
        """Remove all pods, end every process and remove everything that was made. Idempotent.

        All of that is done even if containerd is dead or a pod cannot be removed (which raises `CriError`). On
        return no process and no mount of it exists; the kernel removes namespaces and devices soon after.
        """
        self._undo.close()

    def networks(self) -> list[str]:
        """Return the names of the CNI networks that pods are attached to now, the loopback one first."""
        return self.cri.networks()

    def run_pod(
        self, name: str, command: Sequence[str] | None = None, *, host_ports: Mapping[int, int] | None = None
    ) -> Pod:
        """Run a pod with one container, by default a web server on port 8080 whose page is the pod's name.

        `host_ports` are TCP ports of the node with the pod's ports that they lead to. Returns when the server answers,
        and raises `CriError` or `ContainerdError`, having removed the pod.
        """
        config = sandbox_config(name, f"/{self.cgroup}", host_ports or {})
        sandbox = self.cri.run_sandbox(config)
        try:
            container = self.cri.run_container(sandbox, config, IMAGE, command or SERVE_OWN_NAME)
            status = self.cri.sandbox_status(sandbox)
            netns = Path(f"/proc/{self.pid}/root{status.netns}")
            if command is None:
                wait_for_server(name, netns)
        except (CriError, ContainerdError):
            self.cri.remove_sandbox(sandbox)
            raise
        return Pod(sandbox, name, status.ips, netns, container, self.cri)

    def run_pods(self, count: int, *, prefix: str = "pod-") -> list[Pod]:
        """Run `count` pods named `prefix`0, `prefix`1, … several at a time."""
        with ThreadPoolExecutor(PARALLEL_CALLS) as pool:
            return list(pool.map(self.run_pod, (f"{prefix}{number}" for number in range(count))))

    def import_image(self, archive: Path, name: str) -> None:
        """Make the image of that name in a docker archive known. Raises `ContainerdError`."""
        ctr = ["ctr", "--address", str(self._socket), "--namespace", "k8s.io"]
        done = subprocess.run(
            [*ctr, "images", "import", "--snapshotter", self._snapshotter, str(archive)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ContainerdError(f"import image {name}: {done.stderr.strip()}")
        self.retry(lambda: self.cri.check_image(name))

    def _prepare(self, undo: ExitStack) -> str:
        self._home.mkdir(parents=True)
        undo.callback(shutil.rmtree, self._home, ignore_errors=True)
        for name, shared in _SHARED_DIRECTORIES.items():
            (self._home / name).mkdir()
            Path(shared).mkdir(parents=True, exist_ok=True)
        loopback = self._bin_dir / "loopback"
        if not loopback.exists():
            loopback.symlink_to(_LOOPBACK)
            undo.callback(loopback.unlink, missing_ok=True)
        snapshotter = "overlayfs" if _overlay_works(self._home / "probe") else "native"
        (self._home / "config.toml").write_text(self._config(snapshotter))
        return snapshotter

    def _config(self, snapshotter: str) -> str:
        unused = ("aufs", "btrfs", "devmapper", "zfs")
        plugins = [f"io.containerd.snapshotter.v1.{name}" for name in unused]
        cri = 'plugins."io.containerd.grpc.v1.cri"'
        return f"""
version = 2
root = {_toml(self._home / "root")}
state = {_toml(self._home / "state")}
disabled_plugins = {json.dumps([*plugins, "io.containerd.internal.v1.opt"])}
[grpc]
  address = {_toml(self._socket)}
[{cri}]
  sandbox_image = {_toml(IMAGE)}
  # Pods' namespaces are mounted below `state`, not in /run/netns.
  netns_mounts_under_state_dir = true
  # A sandbox asks for less than the harness may have; without CAP_SYS_RESOURCE that would be refused.
  restrict_oom_score_adj = true
  disable_apparmor = true
  stream_server_address = "127.0.0.1"
[{cri}.cni]
  bin_dir = {_toml(self._bin_dir)}
  conf_dir = {_toml(self._conf_dir)}
[{cri}.containerd]
  snapshotter = {_toml(snapshotter)}
[{cri}.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
"""

    def retry(self, action: Callable[[], T], timeout: float = START_TIMEOUT) -> T:
        """Do `action` until it succeeds: a runtime that is still starting refuses connections and calls."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                return action()
            except (CriError, ConnectionRefusedError, FileNotFoundError) as error:
                if time.monotonic() > deadline or self._box.ended:
                    raise ContainerdError(f"wait for containerd: {error}\n{self._box.log_tail()}") from error
            time.sleep(0.02)

    def _remove_pods(self) -> None:
        # With a containerd that was killed its pods are gone already.
        with suppress(CriUnavailableError), ThreadPoolExecutor(PARALLEL_CALLS) as pool:
            list(pool.map(self.cri.remove_sandbox, self.cri.sandboxes()))


def wait_for_server(pod: str, netns: Path) -> None:
    """Wait for a pod's web server, on its loopback device, so that not a packet is seen on eth0.

    Raises ContainerdError.
    """
    connect = "until (exec 3<>/dev/tcp/127.0.0.1/8080) 2>/dev/null; do sleep 0.02; done"
    try:
        subprocess.run(["nsenter", f"--net={netns}", "bash", "-c", connect], timeout=SERVER_TIMEOUT, check=True)
    except subprocess.SubprocessError as error:
        raise ContainerdError(f"wait for the web server of pod {pod}: {error}") from error


def _toml(value: Path | str) -> str:
    return json.dumps(str(value))


def _overlay_works(probe: Path) -> bool:
    """Return whether the file system can hold overlay mounts (another overlay, for one, cannot)."""
    for name in ("lower", "upper", "work", "merged"):
        (probe / name).mkdir(parents=True)
    layers = f"lowerdir={probe}/lower,upperdir={probe}/upper,workdir={probe}/work"
    mount = ["unshare", "--mount", "mount", "-t", "overlay", "-o", layers, "overlay", str(probe / "merged")]
    return subprocess.run(mount, stderr=subprocess.DEVNULL).returncode == 0
