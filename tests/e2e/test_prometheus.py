"""Debian's own prometheus scrapes podlane, and its promtool finds nothing to complain about."""

from __future__ import annotations

import http.client
import json
import subprocess
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from tests.node.machine import Machine, machine

pytestmark = pytest.mark.root

_SCRAPE = {"job_name": "podlane", "static_configs": [{"targets": ["127.0.0.1:9815"]}]}

Query = Callable[[str], dict[str, float]]
"""Asks prometheus; returns the values by their `outcome` label, or by "" if they have none."""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node with a ready agent, and two pods that have talked."""
    with machine(tmp_path_factory.mktemp("prometheus")) as node:
        node.add_uplink()
        node.start_agent()
        one, other = node.make_pod(), node.make_pod()
        assert all(node.pings(one, address) for address in other.addresses)
        yield node


@pytest.fixture
def query(node: Machine, tmp_path: Path) -> Iterator[Query]:
    """Run a prometheus on the node, which scrapes the agent."""
    config = tmp_path / "prometheus.yml"
    config.write_text(yaml.safe_dump({"global": {"scrape_interval": "1s"}, "scrape_configs": [_SCRAPE]}))
    options = [f"--config.file={config}", f"--storage.tsdb.path={tmp_path}/data", "--web.listen-address=127.0.0.1:9090"]
    with (tmp_path / "log").open("wb") as log:
        command = node.netns.command("prometheus", *options, "--log.level=warn")
        with subprocess.Popen(command, stdout=log, stderr=log) as server:
            try:
                yield lambda expression: node.netns.call(lambda: ask(expression))
            finally:
                server.kill()


def ask(expression: str) -> dict[str, float]:
    """Query the prometheus of this network namespace; nothing while it starts."""
    with closing(http.client.HTTPConnection("127.0.0.1", 9090, timeout=10)) as connection:
        try:
            connection.request("GET", f"/api/v1/query?query={urllib.parse.quote(expression)}")
            answer = connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return {}
    if not answer.startswith(b"{"):
        return {}  # "Service Unavailable"
    return {each["metric"].get("outcome", ""): float(each["value"][1]) for each in json.loads(answer)["data"]["result"]}


def test_prometheus_scrapes(node: Machine, query: Query) -> None:
    """A real prometheus finds the target up and stores each outcome's packets as the agent tells them."""
    node.wait_for(lambda: query('up{job="podlane"}') == {"": 1}, "a scrape")
    assert node.packets()["fwd_local"] >= 8  # two pings by each family, and their answers
    # Both anew each time: kernels report their multicast groups and ask for routers whenever they like.
    node.wait_for(lambda: query("podlane_datapath_packets_total") == node.packets(), "the same counters in prometheus")


def test_promtool_accepts_the_exposition(node: Machine) -> None:
    """`promtool check metrics` finds no fault with names, types and help texts."""
    _, exposition = node.get("/metrics")
    done = subprocess.run(["promtool", "check", "metrics"], input=exposition, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
