"""What the agent can tell about its cluster from where it runs."""

from __future__ import annotations

import pytest

from agent.config import Config
from agent.following import unknown_services


@pytest.mark.parametrize(
    ("host", "is_known"),
    [("10.96.0.1", True), ("fd00:10:96::1", True), ("10.43.0.1", False), ("fd00:43::1", False), ("api.test", True)],
)
def test_services_in_other_places(host: str, is_known: bool) -> None:
    """An agent in a pod sees by its environment that the configured service addresses are another cluster's."""
    told = unknown_services(Config.model_validate({"kubernetes": {}}), {"KUBERNETES_SERVICE_HOST": host})
    assert (told == "") == is_known
    assert is_known or f"service_cidrs lack {host}" in told


@pytest.mark.parametrize("config", [{}, {"kubernetes": {"kubeconfig": "/etc/podlane/kubeconfig"}}])
def test_services_of_nobody(config: dict[str, object]) -> None:
    """An agent that has its credentials elsewhere, or follows no cluster, takes the environment for none of its own."""
    assert unknown_services(Config.model_validate(config), {"KUBERNETES_SERVICE_HOST": "10.43.0.1"}) == ""
