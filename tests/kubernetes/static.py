"""Pods that a kubelet starts from files on its node: what can start there while nobody answers for the API."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from tests.kubernetes.caller import Caller
from tests.kubernetes.cluster import PODLANE, SCRIPT, SYSTEM, Cluster, Document


class StaticPods:
    """Starts static pods on one node, through the caller's shell there."""

    def __init__(self, cluster: Cluster, caller: Caller, node: str) -> None:
        """Ask the kubelet for its folder; skips the test if it has none."""
        configured = json.loads(cluster.kubectl("get", "--raw", f"/api/v1/nodes/{node}/proxy/configz"))
        self._folder = configured["kubeletconfig"].get("staticPodPath")
        if not self._folder:
            pytest.skip(f"needs a kubelet with static pods; that of {node} has no staticPodPath")
        self._caller, self._node = caller, node
        self._files = f"/run/{cluster.namespace}"

    def is_possible(self) -> bool:
        """Tell whether the node, which may be starting, has its shell and the folder."""
        try:
            self._shell(f"test -d {self._folder}")
        except AssertionError:
            return False
        return True

    @contextmanager
    def started(self, pod: Document, files: dict[str, str] | None = None) -> Iterator[None]:
        """Have a pod there for as long as the block lasts, with files for its host path "files"."""
        path = f"{self._folder}/{pod['metadata']['name']}.json"
        hidden = f"{self._folder}/.{pod['metadata']['name']}"
        for volume in pod["spec"].get("volumes", []):
            if volume.get("hostPath", {}).get("path") == "files":
                volume["hostPath"]["path"] = self._files
        try:
            self._shell(f"mkdir -p {self._files}")
            for name, text in (files or {}).items():
                self._write(f"{self._files}/{name}", text)
            self._write(hidden, json.dumps(pod))
            self._shell(f"mv {hidden} {path}")
            yield
        finally:
            self._shell(f"rm -rf {path} {hidden} {self._files}")

    def printed(self, pod: Document) -> list[Document]:
        """Return what a pod has printed, an answer to each of its requests; nothing until then."""
        about = pod["metadata"]
        container = pod["spec"]["containers"][0]["name"]
        folder = f"/var/log/pods/{about['namespace']}_{about['name']}-{self._node}_*/{container}"
        lines = self._shell(f"cat {folder}/*.log 2>/dev/null || true").splitlines()
        texts = [line.split(" ", 3)[3] for line in lines]  # of each line: time, stream, whole or in part, text
        answers: list[Document] = json.loads(texts[-1]) if texts else []
        return answers

    def _write(self, path: str, text: str) -> None:
        self._shell(f"cat > {shlex.quote(path)} <<'END OF FILE'\n{text}\nEND OF FILE\n")

    def _shell(self, script: str) -> str:
        return self._caller.run("NODE_SHELL", node=self._node, script=script)


def asker(cluster: Cluster, name: str, requests: Sequence[Document]) -> Document:
    """Return a pod that asks others and prints their answers; it needs nothing of the API server."""
    container = {
        "name": "peer",
        "image": cluster.image,
        "command": ["python3", "-c", SCRIPT.read_text(), "call", json.dumps(requests)],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": cluster.namespace},
        "spec": {"containers": [container], "restartPolicy": "Never", "terminationGracePeriodSeconds": 0},
    }


def agent(cluster: Cluster) -> tuple[Document, dict[str, str]]:
    """Return the agent's pod as its DaemonSet has it, but without an account, and its configuration as files."""
    (daemonset,) = cluster.get("-n", SYSTEM, "daemonsets", "-l", PODLANE)["items"]
    spec = daemonset["spec"]["template"]["spec"]
    for key in ("serviceAccount", "serviceAccountName"):
        spec.pop(key, None)
    (volume,) = (each for each in spec["volumes"] if "configMap" in each)
    files = cluster.get("-n", SYSTEM, "configmap", volume.pop("configMap")["name"])["data"]
    volume["hostPath"] = {"path": "files"}
    metadata = {"name": f"{cluster.namespace}-agent", "namespace": SYSTEM}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}, files
