"""A cluster as kubectl sees it, and the tests' pods in it."""

from __future__ import annotations

import json
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest

Document: TypeAlias = dict[str, Any]

SYSTEM = "kube-system"
PODLANE = "app.kubernetes.io/name=podlane"
SCRIPT = Path(__file__).with_name("peer.py")
APPS = ("one", "other", "host")
PORT, HOST_PORT = 8080, 18080


@dataclass(frozen=True)
class Peer:
    """A pod that answers, and asks."""

    name: str
    app: str
    node: str
    address: str
    port: int

    def target(self, kind: str) -> Document:
        """Return the request to ask it."""
        return {"kind": kind, "address": self.address, "port": self.port}


class Cluster:
    """Speaks to a cluster through kubectl, in a namespace of the tests' own."""

    def __init__(self, kubeconfig: str) -> None:
        self._kubeconfig = kubeconfig
        self.namespace = f"podlane-test-{uuid.uuid4().hex[:6]}"

    def kubectl(self, *arguments: str, document: Document | None = None, check: bool = True, seconds: int = 180) -> str:
        """Run kubectl, a document its input; return what it printed."""
        done = subprocess.run(
            ["kubectl", f"--kubeconfig={self._kubeconfig}", *arguments],
            input=None if document is None else json.dumps(document),
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
        assert not check or done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr or done.stdout}"
        return done.stdout

    def get(self, *arguments: str) -> Document:
        """Return an object, or a list of objects."""
        return dict(json.loads(self.kubectl("get", "-o", "json", *arguments)))

    def apply(self, *documents: Mapping[str, Any]) -> None:
        """Create or change objects."""
        self.kubectl("apply", "-f", "-", document={"apiVersion": "v1", "kind": "List", "items": list(documents)})

    def peers(self, app: str) -> list[Peer]:
        """Return the pods of an application, by node."""
        pods = self.get("-n", self.namespace, "pods", "-l", f"app={app}")["items"]
        port = HOST_PORT if app == "host" else PORT
        found = [
            Peer(pod["metadata"]["name"], app, pod["spec"]["nodeName"], pod["status"]["podIP"], port)
            for pod in pods
            if "deletionTimestamp" not in pod["metadata"]
        ]
        return sorted(found, key=lambda peer: peer.node)

    @property
    def image(self) -> str:
        """The image that peers run: podlane's own, which is on every node already and has Python."""
        return str(self.podlane_pods()[0]["spec"]["containers"][0]["image"])

    def start(self, pod: Document) -> Peer:
        """Start a single pod; return it when it is ready."""
        name = pod["metadata"]["name"]
        self.apply(pod)
        self.kubectl("-n", self.namespace, "wait", "--for=condition=Ready", f"pod/{name}", "--timeout=120s")
        (peer,) = self.peers(name)
        return peer

    def end(self, peer: Peer) -> None:
        """Delete a pod, and wait until it is gone."""
        self.kubectl("-n", self.namespace, "delete", "pod", peer.name, "--ignore-not-found")

    def ask(self, peer: Peer, requests: Sequence[Document]) -> list[Document]:
        """Have a pod carry out requests; return the answers."""
        command = ["python3", "/peer/peer.py", "ask", str(peer.port), json.dumps(requests)]
        answers: list[Document] = json.loads(self.kubectl("exec", "-n", self.namespace, peer.name, "--", *command))
        return answers

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 120) -> None:
        """Poll until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}"
            time.sleep(0.5)

    def podlane_pods(self) -> list[Document]:
        """Return podlane's own pods."""
        items: list[Document] = self.get("-n", SYSTEM, "pods", "-l", PODLANE)["items"]
        return items

    def worker(self) -> str:
        """Return the node whose end does the least harm: the last one that has no part of the control plane.

        Skips the test if there is none beside another node.
        """
        roles = {f"node-role.kubernetes.io/{role}" for role in ("control-plane", "master")}
        nodes = [node["metadata"] for node in self.get("nodes")["items"]]
        workers = [node["name"] for node in nodes if not roles & set(node.get("labels", {}))]
        if len(nodes) < 2 or not workers:
            pytest.skip("needs two nodes, one of them without a part of the control plane")
        return str(max(workers))

    def containers(self, node: str) -> dict[str, str]:
        """Return the ids of the agent's container and of the peers' on a node, of those that are ready."""
        peers = self.get("-n", self.namespace, "pods", "-l", f"app in ({','.join(APPS)})")["items"]
        return {
            pod["metadata"]["labels"].get("app", "podlane"): container["containerID"]
            for pod in (*self.podlane_pods(), *peers)
            if pod["spec"].get("nodeName") == node and "deletionTimestamp" not in pod["metadata"]
            for container in pod["status"].get("containerStatuses", [])
            if container["ready"]
        }

    def wait_restarted(self, node: str, before: Mapping[str, str]) -> None:
        """Wait until the agent and the peers of a node are ready, none of them in the container of before."""

        def all_anew() -> bool:
            now = self.containers(node)
            return set(now) == {*APPS, "podlane"} and not set(now.values()) & set(before.values())

        self.wait(all_anew, f"agent and pods of {node}", 300)

    def wait_peers(self) -> None:
        """Wait until there are the tests' pods on every node, ready."""
        for app in APPS:
            self.kubectl("-n", self.namespace, "rollout", "status", f"daemonset/{app}", "--timeout=120s")

    def is_up(self) -> bool:
        """Tell whether the API server answers."""
        return self.kubectl("get", "--raw", "/readyz", "--request-timeout=5s", check=False) == "ok"

    def wait_rolled_out(self) -> None:
        """Wait until podlane's agents are what their DaemonSet says, and ready."""
        for daemonset in self.get("-n", SYSTEM, "daemonsets", "-l", PODLANE)["items"]:
            name = daemonset["metadata"]["name"]
            self.kubectl("-n", SYSTEM, "rollout", "status", f"daemonset/{name}", "--timeout=180s", seconds=200)


def daemonset(namespace: str, app: str, image: str) -> Document:
    """Return a DaemonSet of peers, one on each node; that of the application "host" in the nodes' own network."""
    labels = {"app": app}
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": app, "namespace": namespace},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": _spec(app, image)},
        },
    }


def pod(namespace: str, app: str, image: str, node: str) -> Document:
    """Return a single peer, the only pod of its application, on a node."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": app, "namespace": namespace, "labels": {"app": app}},
        "spec": {**_spec(app, image), "nodeName": node},
    }


def _spec(app: str, image: str) -> Document:
    is_host = app == "host"
    port = HOST_PORT if is_host else PORT
    container = {
        "name": "peer",
        "image": image,
        "command": ["python3", "/peer/peer.py", "serve", str(port)],
        "volumeMounts": [{"name": "peer", "mountPath": "/peer"}],
        "readinessProbe": {"httpGet": {"path": "/who", "port": port}, "periodSeconds": 1},
    }
    return {
        "hostNetwork": is_host,
        "terminationGracePeriodSeconds": 0,
        "tolerations": [{"operator": "Exists"}],
        "containers": [container],
        "volumes": [{"name": "peer", "configMap": {"name": "peer"}}],
    }


def service(namespace: str, name: str, selector: Mapping[str, str], *, kind: str = "NodePort") -> Document:
    """Return a service for peers, by TCP and UDP."""
    ports = [{"name": each.lower(), "protocol": each, "port": 80, "targetPort": PORT} for each in ("TCP", "UDP")]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"type": kind, "selector": dict(selector), "ports": ports},
    }


def script(namespace: str) -> Document:
    """Return the ConfigMap with what peers run."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "peer", "namespace": namespace},
        "data": {"peer.py": SCRIPT.read_text()},
    }
