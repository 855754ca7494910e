"""A client of the Container Runtime Interface v1: what a kubelet says to a runtime, as far as needed here."""

from __future__ import annotations

import json
import socket
import struct
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import grpc
from google.protobuf.json_format import ParseDict

# Compiled from cri.proto when this module is imported, in memory: no generated file lies about or goes stale.
_messages, _services = grpc.protos_and_services("tests/e2e/cri.proto")

Message: TypeAlias = Any
"""A message of cri.proto. Their classes exist only at run time, so no type checker knows them."""

CALL_TIMEOUT = 60.0  # seconds; what a pod may cost when dozens start at once on a small machine
EXEC_GRACE = 5.0  # seconds that the runtime has to report a command that it ended for taking too long


class CriError(Exception):
    """The runtime refused a call; the message names the call, its object and the runtime's reason."""


class CriUnavailableError(CriError):
    """Nobody serves the socket (any more)."""


class CriNotFoundError(CriError):
    """The runtime has no such object."""


class ExecResult(NamedTuple):
    """How a command in a container ended."""

    exit_code: int
    stdout: str
    stderr: str


class SandboxStatus(NamedTuple):
    """A sandbox's addresses, the primary one first, and the runtime's path of its network namespace."""

    ips: list[str]
    netns: str


class CriClient:
    """Speaks CRI over a runtime's unix socket. Any method may raise `CriError`. Threads may share one."""

    def __init__(self, path: Path) -> None:
        self._channel = grpc.insecure_channel(f"unix://{path}")
        self._runtime = _services.RuntimeServiceStub(self._channel)
        self._images = _services.ImageServiceStub(self._channel)

    def close(self) -> None:
        """Close the connection; later calls fail."""
        self._channel.close()

    def check_ready(self, *, network: bool) -> None:
        """Raise `CriError` unless pods can run; a missing CNI configuration matters only with `network`."""
        status = _call(self._runtime.Status, _messages.StatusRequest(), "runtime").status
        for condition in status.conditions:
            if not condition.status and (network or condition.type != "NetworkReady"):
                raise CriError(f"Status of runtime: no {condition.type}: {condition.message}")

    def networks(self) -> list[str]:
        """Return the names of the CNI networks in force."""
        info = _call(self._runtime.Status, _messages.StatusRequest(verbose=True), "runtime").info
        networks = json.loads(info["cniconfig"])["Networks"] if "cniconfig" in info else None
        return [network["Config"]["Name"] for network in networks or []]

    def check_image(self, reference: str) -> None:
        """Raise `CriError` unless the runtime can start containers of the image."""
        request = _messages.ImageStatusRequest(image=_messages.ImageSpec(image=reference))
        if not _call(self._images.ImageStatus, request, reference).image.id:
            raise CriError(f"ImageStatus of {reference}: no such image")

    def run_sandbox(self, config: Message) -> str:
        """Create a pod's sandbox, which calls the CNI plugin with ADD, and return its id."""
        request = _messages.RunPodSandboxRequest(config=config)
        return str(_call(self._runtime.RunPodSandbox, request, config.metadata.name).pod_sandbox_id)

    def run_container(self, sandbox: str, config: Message, image: str, command: Sequence[str]) -> str:
        """Start the pod's one container, with `config` as given to `run_sandbox`, and return its id."""
        document = {"metadata": {"name": "main"}, "image": {"image": image}, "command": list(command)}
        context = {"namespace_options": {"pid": "CONTAINER"}}
        return self.start_container(sandbox, config, {**document, "linux": {"security_context": context}})

    def start_container(self, sandbox: str, config: Message, document: Mapping[str, object]) -> str:
        """Start a container that a document, with the fields of a ContainerConfig, describes; return its id."""
        container = ParseDict(document, _messages.ContainerConfig())
        request = _messages.CreateContainerRequest(pod_sandbox_id=sandbox, config=container, sandbox_config=config)
        name = config.metadata.name
        container_id = str(_call(self._runtime.CreateContainer, request, name).container_id)
        _call(self._runtime.StartContainer, _messages.StartContainerRequest(container_id=container_id), name)
        return container_id

    def stop_container(self, container: str, timeout: int) -> None:
        """SIGTERM a container's first process, and SIGKILL it after `timeout` seconds."""
        request = _messages.StopContainerRequest(container_id=container, timeout=timeout)
        _call(self._runtime.StopContainer, request, container)

    def exit_code(self, container: str) -> int | None:
        """Return how a container has ended; None while it runs."""
        request = _messages.ContainerStatusRequest(container_id=container)
        status = _call(self._runtime.ContainerStatus, request, container).status
        return int(status.exit_code) if status.state == _messages.CONTAINER_EXITED else None

    def sandbox_status(self, sandbox: str) -> SandboxStatus:
        """Return where a sandbox is in the network."""
        request = _messages.PodSandboxStatusRequest(pod_sandbox_id=sandbox, verbose=True)
        reply = _call(self._runtime.PodSandboxStatus, request, sandbox)
        network = reply.status.network
        namespaces = json.loads(reply.info["info"])["runtimeSpec"]["linux"]["namespaces"]
        netns = next(n["path"] for n in namespaces if n["type"] == "network")
        return SandboxStatus([network.ip, *(extra.ip for extra in network.additional_ips)], netns)

    def sandboxes(self) -> list[str]:
        """Return the ids of all sandboxes, running or not."""
        reply = _call(self._runtime.ListPodSandbox, _messages.ListPodSandboxRequest(), "all")
        return [item.id for item in reply.items]

    def remove_sandbox(self, sandbox: str) -> None:
        """End a pod, which calls the CNI plugin with DEL, and forget it, if it is not gone already."""
        stop = _messages.StopPodSandboxRequest(pod_sandbox_id=sandbox)
        remove = _messages.RemovePodSandboxRequest(pod_sandbox_id=sandbox)
        # CRI says that to stop an unknown sandbox is no error; containerd 1.6 says otherwise.
        with suppress(CriNotFoundError):
            _call(self._runtime.StopPodSandbox, stop, sandbox)
        _call(self._runtime.RemovePodSandbox, remove, sandbox)

    def exec(self, container: str, argv: Sequence[str], timeout: int) -> ExecResult:
        """Run a command in a container for at most `timeout` seconds; a longer one is killed and raises."""
        request = _messages.ExecSyncRequest(container_id=container, cmd=argv, timeout=timeout)
        reply = _call(self._runtime.ExecSync, request, f"{list(argv)}", timeout + EXEC_GRACE)
        return ExecResult(reply.exit_code, reply.stdout.decode(), reply.stderr.decode())


_ERRORS = {
    grpc.StatusCode.UNAVAILABLE: CriUnavailableError,
    grpc.StatusCode.NOT_FOUND: CriNotFoundError,
}


def server_pid(path: Path) -> int:
    """Return the PID, as seen from here, of the process that listens on a unix socket (unix(7), SO_PEERCRED).

    Raises ConnectionRefusedError or FileNotFoundError if there is none.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[0])


def sandbox_config(name: str, cgroup_parent: str, host_ports: Mapping[int, int]) -> Message:
    """Describe a pod as a kubelet does: named by its hostname, a fresh uid, PIDs of its own per container.

    `host_ports` are TCP ports of the node with those of the pod.
    """
    return _messages.PodSandboxConfig(
        metadata=_messages.PodSandboxMetadata(name=name, uid=str(uuid.uuid4()), namespace="default"),
        hostname=name,
        port_mappings=[_messages.PortMapping(host_port=host, container_port=own) for host, own in host_ports.items()],
        linux=_messages.LinuxPodSandboxConfig(
            cgroup_parent=cgroup_parent,
            security_context=_messages.LinuxSandboxSecurityContext(namespace_options=_own_pids()),
        ),
    )


def pod_config(document: Mapping[str, object]) -> Message:
    """Return the description of a pod from a document with the fields of a PodSandboxConfig."""
    return ParseDict(document, _messages.PodSandboxConfig())


def _own_pids() -> Message:
    return _messages.NamespaceOption(pid=_messages.CONTAINER)


def _call(method: Callable[..., Message], request: Message, subject: str, timeout: float = CALL_TIMEOUT) -> Message:
    try:
        return method(request, timeout=timeout)
    except grpc.RpcError as error:
        operation = type(request).__name__.removesuffix("Request")
        kind = _ERRORS.get(error.code(), CriError)
        raise kind(f"{operation} of {subject}: {error.code().name}: {error.details()}") from error
