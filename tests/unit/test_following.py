"""What the agent can tell about its cluster from where it runs."""

from __future__ import annotations

import re
from ipaddress import ip_network

import pytest

from agent.cluster import ClusterNode
from agent.config import Config
from agent.following import outsiders, unknown_services
from agent.state import Network
from agent.store import Subnet

from .test_plan import pod


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


def node(*cidrs: str) -> ClusterNode:
    """Return the node with these pod CIDRs."""
    return ClusterNode(name="n", addresses=(), pod_cidrs=tuple(ip_network(each) for each in cidrs))


@pytest.mark.parametrize(
    ("cidrs", "told"),
    [
        (("10.77.0.0/24", "fd00:77::/64"), ""),
        (
            ("10.77.0.0/24", "fd00:78::/64"),
            r".*\(10.77.0.0/24, fd00:78::/64\): .* 1 in all, .* net/pl1/eth0 \(10.77.0.1, fd00:77::1\)",
        ),
        (("10.78.0.0/24",), ".* 2 in all"),
        ((), ""),
    ],
)
def test_pods_of_another_pod_cidr(cidrs: tuple[str, ...], told: str) -> None:
    """Pods that other nodes do not reach, as its pod CIDRs are others now, are named; not those of other IPAM."""
    elsewhere: Network = ip_network("10.99.0.0/24")
    pods = [
        pod("10.77.0.1", "fd00:77::1", device="pl1"),
        pod("10.77.0.2", device="pl2"),
        pod("10.99.0.1", device="pl3", subnets=(Subnet(elsewhere),)),
    ]
    said = outsiders(pods, node(*cidrs))
    assert re.match(told, said) if told else said == ""
