"""The cluster of these tests, which PODLANE_TEST_KUBECONFIG names; without it they do not exist."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.kubernetes.caller import Caller
from tests.kubernetes.cluster import APPS, SYSTEM, Cluster, daemonset, script, service

_KUBECONFIG = os.environ.get("PODLANE_TEST_KUBECONFIG", "")
collect_ignore_glob = [] if _KUBECONFIG else ["test_*.py"]


@pytest.fixture(scope="session")
def caller() -> Caller:
    """Return what the caller of the tests can do to the cluster."""
    return Caller(os.environ)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Fill the cluster with peers: on each node two pods, and one in the node's network; and services."""
    cluster = Cluster(_KUBECONFIG)
    cluster.wait_rolled_out()
    cluster.kubectl("create", "namespace", cluster.namespace)
    try:
        namespace = cluster.namespace
        cluster.apply(script(namespace), *(daemonset(namespace, app, cluster.image) for app in APPS))
        cluster.apply(service(namespace, "one", {"app": "one"}))
        cluster.wait_peers()
        yield cluster
    except AssertionError:
        print(cluster.kubectl("-n", SYSTEM, "logs", "-l", "app.kubernetes.io/name=podlane", "--tail=20", check=False))
        raise
    finally:
        cluster.kubectl("delete", "namespace", cluster.namespace, "--wait=false")
