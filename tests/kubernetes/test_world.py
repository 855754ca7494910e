"""The world, as far as it has a way to pods: machines that are no part of the cluster."""

from __future__ import annotations

import json
import shlex

import pytest

from tests.kubernetes.caller import Caller
from tests.kubernetes.cluster import SCRIPT, Cluster, Document
from tests.kubernetes.reach import pods

pytestmark = pytest.mark.timeout(600)  # for clusters that are slower than the tests' own


@pytest.mark.parametrize("kind", ["tcp", "udp", "ping"])
def test_world_reaches_pods(cluster: Cluster, caller: Caller, kind: str) -> None:
    """The world reaches each pod by its own address, and each sees who it is: nothing is masqueraded, either way."""
    caller.need("WORLD_SHELL")
    everybody = pods(cluster)
    sources = _call(caller, [peer.target("source") for peer in everybody])
    answers = _call(caller, [peer.target(kind) for peer in everybody])
    for peer, source, answer in zip(everybody, sources, answers, strict=True):
        wanted = {"client": peer.address} if kind == "ping" else {"name": peer.name, **source}
        assert answer == wanted, peer


def _call(caller: Caller, requests: list[Document]) -> list[Document]:
    command = f"python3 - call {shlex.quote(json.dumps(requests))} <<'END OF FILE'\n{SCRIPT.read_text()}\nEND OF FILE\n"
    answers: list[Document] = json.loads(caller.run("WORLD_SHELL", script=command))
    return answers
