"""What a kubelet makes of a DaemonSet's pod: the manifest's own words in CRI's, so that there is one truth."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.e2e.containerd import Containerd, ContainerdError
from tests.e2e.cri import pod_config
from tests.manifests import Manifest

# Those of procMount: Default (kubernetes:pkg/securitycontext/util.go).
_MASKED = ("acpi", "kcore", "keys", "latency_stats", "timer_list", "timer_stats", "sched_debug", "scsi")
_READ_ONLY = ("asound", "bus", "fs", "irq", "sys", "sysrq-trigger")
_PROPAGATION = {"HostToContainer": "PROPAGATION_HOST_TO_CONTAINER"}


class DaemonPod:
    """The pod of a DaemonSet on a node of tests.

    `places` says where a test keeps what the manifest's volumes (by name) have on a real node.
    """

    def __init__(self, runtime: Containerd, daemonset: Manifest, places: Mapping[str, Path]) -> None:
        self._runtime = runtime
        self._spec = daemonset["spec"]["template"]["spec"]
        self._places = places
        self.log = places["log"]
        for old in self.log.iterdir():
            old.unlink()
        self._pod = pod_config(self._sandbox())
        self._id = runtime.cri.run_sandbox(self._pod)

    def run_init(self) -> None:
        """Run the init containers to their ends, one after the other. Raises ContainerdError if one fails."""
        for container in self._spec["initContainers"]:
            started = self._start(container)
            self._runtime.retry(lambda started=started: self._ended(started))  # type: ignore[misc]
            if code := self._runtime.cri.exit_code(started):
                raise ContainerdError(f"init container {container['name']}: exit code {code}\n{self.log_tail()}")

    def start(self) -> str:
        """Start the one container; return its id."""
        (container,) = self._spec["containers"]
        return self._start(container)

    def remove(self) -> None:
        """Remove the pod, whatever of it runs."""
        self._runtime.cri.remove_sandbox(self._id)

    def log_tail(self) -> str:
        """Return the end of what its containers have printed."""
        texts = (path.read_text() for path in sorted(self.log.iterdir(), key=lambda path: path.stat().st_mtime))
        return "".join(texts)[-4000:]

    def _start(self, container: Mapping[str, Any]) -> str:
        return self._runtime.cri.start_container(self._id, self._pod, self._document(container))

    def _ended(self, container: str) -> None:
        if self._runtime.cri.exit_code(container) is None:
            raise FileNotFoundError("an init container still runs")

    def _sandbox(self) -> dict[str, Any]:
        context = {"namespace_options": _namespaces(self._spec), "seccomp": _seccomp(self._spec)}
        return {
            "metadata": {"name": "podlane", "uid": str(uuid.uuid4()), "namespace": "kube-system"},
            "log_directory": str(self.log),
            "linux": {"cgroup_parent": f"/{self._runtime.cgroup}", "security_context": context},
        }

    def _document(self, container: Mapping[str, Any]) -> dict[str, Any]:
        variables = [{"key": each["name"], "value": each.get("value", "node")} for each in container.get("env", [])]
        return {
            "metadata": {"name": container["name"], "attempt": uuid.uuid4().int >> 97},
            "image": {"image": container["image"]},
            "args": container["args"],
            "envs": variables,
            "mounts": [self._mount(each) for each in container["volumeMounts"]],
            "log_path": f"{container['name']}.log",
            "linux": {"security_context": self._context(container["securityContext"])},
        }

    def _mount(self, mount: Mapping[str, Any]) -> dict[str, Any]:
        place = self._places[mount["name"]]
        # What the runtime names by its path has to be in the same place inside.
        inside = place if mount["name"] == "netns" else mount["mountPath"]
        return {
            "container_path": str(inside),
            "host_path": str(place),
            "readonly": mount.get("readOnly", False),
            "propagation": _PROPAGATION.get(mount.get("mountPropagation", ""), "PROPAGATION_PRIVATE"),
        }

    def _context(self, context: Mapping[str, Any]) -> dict[str, Any]:
        """As kubernetes:pkg/kubelet/kuberuntime/security_context.go does; refuses what it does not know."""
        known = {"allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities", "runAsUser"}
        assert not context.keys() - known, f"teach this function {context.keys() - known}"
        capabilities = context["capabilities"]
        return {
            "capabilities": {
                "add_capabilities": capabilities.get("add", []),
                "drop_capabilities": capabilities.get("drop", []),
            },
            "namespace_options": _namespaces(self._spec),
            "run_as_user": {"value": context.get("runAsUser", 0)},
            "readonly_rootfs": context["readOnlyRootFilesystem"],
            "no_new_privs": not context["allowPrivilegeEscalation"],
            "masked_paths": [f"/proc/{name}" for name in _MASKED] + ["/sys/firmware"],
            "readonly_paths": [f"/proc/{name}" for name in _READ_ONLY],
            "seccomp": _seccomp(self._spec),
        }


def _namespaces(spec: Mapping[str, Any]) -> dict[str, str]:
    network = "NODE" if spec.get("hostNetwork") else "POD"
    return {"network": network, "pid": "NODE" if spec.get("hostPID") else "CONTAINER"}


def _seccomp(spec: Mapping[str, Any]) -> dict[str, str]:
    return {"profile_type": spec["securityContext"]["seccompProfile"]["type"]}
