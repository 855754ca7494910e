"""The manifests of deploy/kubernetes as a cluster gets them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, TypeAlias

import yaml

FOLDER = Path(__file__).resolve().parents[1] / "deploy" / "kubernetes"

Manifest: TypeAlias = dict[str, Any]
"""An object of Kubernetes' API."""


def render(folder: Path) -> list[Manifest]:
    """Return what `kubectl apply -k` would apply."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def find(manifests: list[Manifest], kind: str) -> Manifest:
    """Return the one object of a kind."""
    (found,) = (each for each in manifests if each["kind"] == kind)
    return found
