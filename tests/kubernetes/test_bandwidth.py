"""Limits of bandwidth as Kubernetes has them: by annotations, which runtimes hand on."""

from __future__ import annotations

import pytest

from tests.kubernetes.cluster import Cluster, pod

pytestmark = pytest.mark.timeout(600)  # for clusters that are slower than the tests' own

_RATE = 100_000_000  # bits per second
_BURST = 640 << 20  # bytes: more than the 512 MiB that runtimes let pass at once, whatever the rate
_MEASURED = 32 << 20  # bytes


@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_a_limit_is_kept(cluster: Cluster, direction: str) -> None:
    """A pod with a limit starts, and once its burst is used up gets, or sends, no more than that to another node."""
    other = cluster.peers("one")[-1]
    document = pod(cluster.namespace, direction, cluster.image, cluster.peers("host")[0].node)
    document["metadata"]["annotations"] = {f"kubernetes.io/{direction}-bandwidth": "100M"}
    limited = cluster.start(document)
    try:
        asker, asked = (limited, other) if direction == "ingress" else (other, limited)
        requests = [{**asked.target("bytes"), "count": count} for count in (_BURST, _MEASURED)]
        _, answer = cluster.ask(asker, requests)
        assert answer.get("bytes") == _MEASURED, answer
        assert _MEASURED * 8 / answer["seconds"] < 1.1 * _RATE
    finally:
        cluster.end(limited)
