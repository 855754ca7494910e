"""The demo, run as `make demo` runs it: it succeeds, and when it does not it says why; it leaves nothing either way."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import netfilter
from tests.e2e.story import Story, Unexpected
from tests.node.machine import ROOT, Netns

pytestmark = pytest.mark.root

_SECONDS = 100


class Demo:
    """A running demo whose temporary files are in a directory of their own."""

    def __init__(self, directory: Path, nodes: str) -> None:
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.demo", nodes],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(directory)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def read_to(self, text: str) -> None:
        """Wait until the demo prints this."""
        assert self.process.stdout
        assert any(text in line for line in self.process.stdout), f"the demo ended without {text!r}"

    def agent(self) -> int:
        """Return the PID of a demo's only agent."""
        found = subprocess.check_output(["pgrep", "--full", f"^{sys.executable} -m agent --config {self.directory}/"])
        return int(found)

    def end(self) -> str:
        """Wait for the end and return what was not yet read of the output."""
        output, _ = self.process.communicate(timeout=_SECONDS)
        return output


@pytest.fixture
def demo(request: pytest.FixtureRequest) -> Iterator[Demo]:
    """Start a demo, of one node or as many as the parameter says.

    pytest's own directories have names too long for containerd's sockets in them.
    """
    with tempfile.TemporaryDirectory(prefix="plt-") as directory:
        demo = Demo(Path(directory), getattr(request, "param", "1"))
        try:
            yield demo
        finally:
            if demo.process.poll() is None:
                demo.process.terminate()
                demo.end()


def traces(demo: Demo) -> list[str]:
    """Return the processes, mounts and files in which a demo's directory appears."""
    home = str(demo.directory)
    processes = subprocess.run(["pgrep", "--full", "--list-full", home], capture_output=True, text=True).stdout
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if home in line]
    return [*processes.splitlines(), *mounts, *map(str, demo.directory.iterdir())]


def test_demo_succeeds(demo: Demo) -> None:
    """The demo ends with status 0, shows eleven steps without colours to what is no terminal, and leaves nothing."""
    output = demo.end()
    assert demo.process.returncode == 0, output
    assert re.findall(r"^ ?(\d+)  ", output, re.MULTILINE) == [str(number) for number in range(1, 12)]
    assert "ttl=63" in output
    assert "\x1b" not in output
    assert traces(demo) == []


@pytest.mark.parametrize("demo", ["3"], indirect=True)
def test_cluster_demo_succeeds(demo: Demo) -> None:
    """The demo of three nodes ends with status 0, has all pairs of pods in its table by lane, and leaves nothing."""
    output = demo.end()
    assert demo.process.returncode == 0, output
    assert re.findall(r"^ ?(\d+)  ", output, re.MULTILINE) == [str(number) for number in range(1, 9)]
    met = re.findall(r"^ +([a-d]) on n\d → ([a-d]) on n\d +(\w+) ", output, re.MULTILINE)
    assert Counter(lane for _, _, lane in met) == {"local": 2, "direct": 4, "vxlan": 6}
    assert len({(one, other) for one, other, _ in met}) == 12
    assert traces(demo) == []


@pytest.mark.parametrize("demo", ["3"], indirect=True)
def test_interrupted_cluster_demo_cleans_up(demo: Demo) -> None:
    """Ctrl-C ends the demo of three nodes with status 130, and nothing is left of it."""
    demo.read_to("ip route show")
    demo.process.send_signal(signal.SIGINT)
    assert demo.end().endswith("interrupted, and cleaned up\n")
    assert demo.process.returncode == 130
    assert traces(demo) == []


@pytest.mark.parametrize("demo", ["2"], indirect=True)
def test_no_such_demo(demo: Demo) -> None:
    """Of a number of nodes for which there is no demo it says so, with status 2."""
    assert demo.end() == "NODES is 1 or 3, not 2\n"
    assert demo.process.returncode == 2


def test_demo_that_fails_says_so(demo: Demo) -> None:
    """When its agent dies, the demo names the step and the reason, ends with status 1, and leaves nothing."""
    demo.read_to("ready after")
    os.kill(demo.agent(), signal.SIGKILL)
    output = demo.end()
    assert re.search(r"✗ step \d failed\n +\w+Error: .*podlane", output), output
    assert demo.process.returncode == 1
    assert traces(demo) == []


def test_interrupted_demo_cleans_up(demo: Demo) -> None:
    """Ctrl-C ends the demo with status 130, and nothing is left of it."""
    demo.read_to("pod b has")
    netns = subprocess.check_output(["ip", "netns", "identify", str(demo.agent())], text=True).strip()
    assert netns
    demo.process.send_signal(signal.SIGINT)
    assert demo.end().endswith("interrupted, and cleaned up\n")
    assert demo.process.returncode == 130
    assert traces(demo) == []
    assert not Path("/run/netns", netns).exists()


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


def test_colour_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A story is coloured on a terminal, not elsewhere, and not where NO_COLOR is set."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    files = [Terminal(), io.StringIO()]
    for file in files:
        Story(file).fact("pods", expected=3, seen=3)
    monkeypatch.setenv("NO_COLOR", "1")
    files.append(Terminal())
    Story(files[-1]).fact("pods", expected=3, seen=3)
    assert ["\x1b" in file.getvalue() for file in files] == [True, False, False]


def test_a_wrong_fact_is_told() -> None:
    """What is not as expected raises, and is shown with both values under the number of its step."""
    out = io.StringIO()
    story = Story(out)
    with story.step("First"):
        story.fact("pods", expected=3, seen=3)
    with pytest.raises(Unexpected) as raised, story.step("Second"):
        story.fact("nodes", expected=1, seen=2)
    story.failed(raised.value)
    assert re.search(r"step 2 failed\n +nodes\n +expected +1\n +seen +2\n$", out.getvalue())


def test_packet_filters_are_seen() -> None:
    """Tables of iptables, ip6tables and nftables are found without their tools; a new namespace has none."""
    netns = Netns("filter")
    try:
        assert netns.call(netfilter.tables) == []
        netns.run("iptables-nft", "-A", "FORWARD", "-j", "ACCEPT")
        netns.run("ip6tables-nft", "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE")
        assert sorted(netns.call(netfilter.tables)) == ["nftables filter", "nftables nat"]
        netns.run("iptables-legacy", "-A", "FORWARD", "-j", "ACCEPT")
        netns.run("ip6tables-legacy", "-A", "FORWARD", "-j", "ACCEPT")
        assert {"iptables filter", "ip6tables filter"} < set(netns.call(netfilter.tables))
    finally:
        netns.delete()
