"""What the API server holds: Nodes by name, every change of them by its resource version, and Events.

As in Kubernetes: pages of one list are of one moment; a version that was compacted away is answered by 410.
"""

from __future__ import annotations

import base64
import copy
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

Object = dict[str, Any]

_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
_FIRST_VERSION = 1000


class Refusal(Exception):
    """What a request is refused with: an HTTP status, and the reason of the Status object."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason

    def status(self) -> Object:
        """Return the Status object."""
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": str(self),
            "reason": self.reason,
            "code": self.code,
        }


def make_node(
    name: str, cidrs: Iterable[str] = (), addresses: Iterable[str] = (), *, age: int = 0, images: int = 0
) -> Object:
    """Return a Node as kubelets and controllers leave it. `age` in seconds; 50 `images` make it full-size (25 kB)."""
    cidrs = list(cidrs)
    created = (_EPOCH - timedelta(seconds=age)).strftime("%Y-%m-%dT%H:%M:%SZ")
    digest = "0123456789abcdef" * 4
    names = [f"registry.example.com/team-{number}/some/application" for number in range(images)]
    return {
        "metadata": {
            "name": name,
            "uid": f"6f1c7f4e-{abs(hash(name)) % 0xFFFF:04x}-4b7e-8f3e-0123456789ab",
            "creationTimestamp": created,
            "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"},
            "annotations": {"node.alpha.kubernetes.io/ttl": "0"},
            "managedFields": [{"manager": "kubelet", "fieldsV1": {f"f:field-{n}": {} for n in range(15 * images)}}],
        },
        "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs} if cidrs else {},
        "status": {
            "capacity": {"cpu": "4", "memory": "16384000Ki", "pods": "110"},
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": created}],
            "addresses": [
                {"type": "Hostname", "address": name},
                *({"type": "InternalIP", "address": each} for each in addresses),
            ],
            "images": [
                {"names": [f"{each}@sha256:{digest}", f"{each}:v1.2.3"], "sizeBytes": 123456789} for each in names
            ],
        },
    }


class Objects:
    """The store of one API server. Objects are replaced, never changed; `changed` is notified of each change."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.nodes: dict[str, Object] = {}
        self.events: list[Object] = []
        self.version = _FIRST_VERSION
        self._history: list[tuple[int, str, Object]] = []
        self._oldest = _FIRST_VERSION
        self._snapshots: dict[int, list[Object]] = {}

    def put(self, *nodes: Object) -> None:
        """Create or replace Nodes."""
        with self.changed:
            for node in nodes:
                name = node["metadata"]["name"]
                self._note("MODIFIED" if name in self.nodes else "ADDED", node)
            self.changed.notify_all()

    def delete(self, name: str) -> None:
        """Delete a Node."""
        with self.changed:
            self._note("DELETED", self.nodes[name])
            self.changed.notify_all()

    def _note(self, kind: str, node: Object) -> None:
        self.version += 1
        node = {**node, "metadata": {**node["metadata"], "resourceVersion": str(self.version)}}
        name = node["metadata"]["name"]
        if kind == "DELETED":
            del self.nodes[name]
        else:
            self.nodes[name] = node
        self._history.append((self.version, kind, node))

    def compact(self) -> None:
        """Forget the history, as etcd does every five minutes, and the moments that lists are of."""
        with self.changed:
            self.version += 1  # of something that is no Node
            self._history.clear()
            self._snapshots.clear()
            self._oldest = self.version

    def get(self, name: str) -> Object:
        """Return a Node. Raises Refusal."""
        with self.changed:
            if name not in self.nodes:
                raise Refusal(404, "NotFound", f'nodes "{name}" not found')
            return self.nodes[name]

    def page(self, limit: int, token: str) -> Object:
        """Return a page of the list of all Nodes, in the order of their names. Raises Refusal."""
        with self.changed:
            version, start = self.version, ""
            if token:
                version, start = json.loads(base64.b64decode(token))
                if version not in self._snapshots:
                    raise Refusal(410, "Expired", "The provided continue parameter is too old")
            if version not in self._snapshots:
                self._snapshots[version] = [self.nodes[name] for name in sorted(self.nodes)]
            rest = [each for each in self._snapshots[version] if each["metadata"]["name"] > start]
        items = rest[:limit] if limit else rest
        metadata: Object = {"resourceVersion": str(version)}
        if len(items) < len(rest):
            last = items[-1]["metadata"]["name"]
            metadata["continue"] = base64.b64encode(json.dumps([version, last]).encode()).decode()
            metadata["remainingItemCount"] = len(rest) - len(items)
        return {"kind": "NodeList", "apiVersion": "v1", "metadata": metadata, "items": items}

    def check(self, version: int) -> None:
        """Check that a watch can begin after this version. Raises Refusal."""
        if version < self._oldest:
            raise Refusal(410, "Expired", f"too old resource version: {version} ({self._oldest})")

    def since(self, version: int) -> list[tuple[int, str, Object]]:
        """Return the changes after a version, in order."""
        first = next((at for at, each in enumerate(self._history) if each[0] > version), len(self._history))
        return self._history[first:]

    def patch(self, name: str, patch: Mapping[str, Any], kind: str, *, status: bool) -> Object:
        """Patch a Node, or with `status` its status only; `kind` is the media type. Raises Refusal."""
        with self.changed:
            old = self.get(name)
            expected = patch.get("metadata", {}).get("resourceVersion")
            if expected not in (None, old["metadata"]["resourceVersion"]):
                raise Refusal(409, "Conflict", f'Operation cannot be fulfilled on nodes "{name}": it has been modified')
            merged = _merged(old, patch, strategic=kind == "application/strategic-merge-patch+json")
            part = "status" if status else "spec"
            new = {**copy.deepcopy(old), part: merged[part]}
            if new != old:
                self._note("MODIFIED", new)
                self.changed.notify_all()
            return self.nodes[name]


def _merged(old: Any, patch: Any, *, strategic: bool, key: str = "") -> Any:  # noqa: ANN401  # any JSON
    """Merge as RFC 7396 says; `strategic` merges lists of conditions and addresses by their `type`."""
    if strategic and key in ("conditions", "addresses"):
        return _merged_lists(old or [], patch)
    if not isinstance(patch, dict):
        return patch
    base = dict(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        if value is None:
            base.pop(name, None)
        else:
            base[name] = _merged(base.get(name), value, strategic=strategic, key=name)
    return base


def _merged_lists(old: Sequence[Object], patch: Sequence[Object]) -> list[Object]:
    by_type = {each["type"]: each for each in old}
    for each in patch:
        by_type[each["type"]] = {**by_type.get(each["type"], {}), **each}
    return list(by_type.values())
