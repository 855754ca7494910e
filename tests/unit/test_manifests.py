"""The manifests of deploy/kubernetes: rendered, and held against Kubernetes' own schemas."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from agent.config import Config, load
from tests.manifests import FOLDER, Manifest, find, render

_OVERLAYS = ("base", "overlays/direct", "overlays/vxlan", "overlays/kind", "uninstall")
_VERSIONS = ("1.25", kubernetes_validate.latest_version())
_ROOT = FOLDER.parents[1]


@pytest.mark.parametrize("overlay", _OVERLAYS)
@pytest.mark.parametrize("version", _VERSIONS)
def test_manifests_are_valid(overlay: str, version: str) -> None:
    """Every object fits the schema of its kind, without a field too many, in an old and in the latest Kubernetes."""
    manifests = render(FOLDER / overlay)
    assert manifests
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_a_wrong_field_is_found() -> None:
    """The schemas know what a DaemonSet has, and what it has not."""
    daemonset = find(render(FOLDER / "base"), "DaemonSet")
    daemonset["spec"]["template"]["spec"]["hostNetworking"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="hostNetworking"):
        kubernetes_validate.validate(daemonset, "1.25", strict=True)


def test_pod_monitor_finds_the_metrics() -> None:
    """What the Prometheus operator shall scrape is the DaemonSet's port, by labels that its pods have."""
    monitor = find(render(FOLDER / "monitoring"), "PodMonitor")["spec"]
    template = find(render(FOLDER / "base"), "DaemonSet")["spec"]["template"]
    assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    ports = [port["name"] for container in template["spec"]["containers"] for port in container["ports"]]
    assert [endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]] == ports


@pytest.mark.parametrize("overlay", [each for each in _OVERLAYS if each != "uninstall"])
def test_configuration_is_the_agents(overlay: str, tmp_path: Path) -> None:
    """The agent accepts the configuration of each overlay, and serves metrics where the probes and Prometheus look."""
    manifests = render(FOLDER / overlay)
    (tmp_path / "agent.yaml").write_text(find(manifests, "ConfigMap")["data"]["agent.yaml"])
    config = load(tmp_path / "agent.yaml")
    container = _agent(manifests)
    assert int(config.metrics.rpartition(":")[2]) == container["ports"][0]["containerPort"]


def test_overlays_differ_from_the_base_in_routing_only() -> None:
    """An overlay's configuration repeats the base's, but for the routing that it is named after."""

    def config(overlay: str) -> dict[str, Any]:
        loaded: dict[str, Any] = yaml.safe_load(find(render(FOLDER / overlay), "ConfigMap")["data"]["agent.yaml"])
        return loaded

    for routing in ("direct", "vxlan"):
        assert config(f"overlays/{routing}") == {**config("base"), "routing": routing}


def test_every_path_of_the_agent_is_mounted() -> None:
    """Each file of the agent's that has to outlive its container, or that others read, is on a volume of the node's."""
    spec = find(render(FOLDER / "base"), "DaemonSet")["spec"]["template"]["spec"]
    on_node = {volume["name"]: volume["hostPath"]["path"] for volume in spec["volumes"] if "hostPath" in volume}
    (container,) = spec["containers"]
    mounts = {each["mountPath"]: on_node[each["name"]] for each in container["volumeMounts"] if each["name"] in on_node}
    paths = Config().paths
    for path in (paths.socket.parent, paths.state, paths.cni_conf_dir, paths.cni_bin_dir):
        assert mounts[str(path)] == str(path)
    host = next(each["value"] for each in container["env"] if each["name"] == "PODLANE_HOST")
    for place in ("/proc/sys/net", "/sys/fs/bpf"):
        assert mounts[host + place] == place


def test_roles_grant_the_least() -> None:
    """The agent may do to the cluster what it does, and no more."""
    rules = find(render(FOLDER / "base"), "ClusterRole")["rules"]
    granted = {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}
    assert granted == {
        *(("nodes", verb) for verb in ("list", "watch", "patch")),
        ("nodes/status", "patch"),
        ("events", "create"),
    }


def test_requirements_are_locked() -> None:
    """Each library that the agent needs is in the image, in a version that it accepts."""
    from packaging.requirements import Requirement

    text = (_ROOT / "deploy" / "image" / "requirements.txt").read_text()
    locked = {name.lower(): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        assert requirement.specifier.contains(locked[requirement.name.lower()]), requirement


def _agent(manifests: list[Manifest]) -> dict[str, Any]:
    (container,) = find(manifests, "DaemonSet")["spec"]["template"]["spec"]["containers"]
    return dict(container)
