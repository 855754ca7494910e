"""What collecting costs on a busy node."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from agent.collector import Collector
from agent.datapath.loader import Datapath, load
from agent.datapath.object import Object
from agent.expiry import UDP, pauses

from .test_collector import NOW, SETTINGS, census, put

pytestmark = pytest.mark.root

FLOWS = 200_000
SIZE = 1 << 18
SCANS = 4  # one of which looks for owners without a flow
TUPLE = ("source", "destination", "source_port", "destination_port", "protocol")


def fill(datapath: Datapath) -> None:
    """Make flows to as many destinations, from copies of one."""
    put(datapath, 1, UDP, idle=0)
    for name, outside in (("flows", 1), ("owners", 0)):
        entries = datapath.maps[name]
        codec = entries.key.picker(*TUPLE)
        ((key, value),) = entries.batches()
        fields = list(codec.unpack(key))
        for number in range(1, FLOWS):
            fields[outside] = number.to_bytes(16, "big")
            entries.update_bytes(codec.pack(*fields), value)


def test_many_live_flows(datapath_object: Object, pins: Path) -> None:
    """To look after 200,000 flows, none of which is over, takes less than a tenth of a processor at the worst."""
    with load(datapath_object, pins, {"endpoints": 64, "flows": SIZE, "owners": SIZE}) as datapath:
        fill(datapath)
        collector = Collector(
            flows=datapath.maps["flows"],
            owners=datapath.maps["owners"],
            settings=SETTINGS,
            constants=datapath.constants,
            refused=lambda: 0,
            clock=lambda: NOW,
        )
        before = time.thread_time()
        for _ in range(SCANS):
            collector.scan()
        cost = (time.thread_time() - before) / SCANS
        found = census(collector)
        assert found.flows == {UDP: FLOWS}
        _, pause = pauses(found.fill["flows"], cost)
        assert cost / (cost + pause) < 0.1
