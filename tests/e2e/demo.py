"""The demo: real pods in a real containerd, wired by podlane. Every sentence is checked while it is told.

Run as `python -m tests.e2e.demo [NODES]`, as root; NODES is 1 (the default) or 3. Exits with 0 if all was as promised,
1 if not, 130 if interrupted; it cleans up after itself in any case.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from tests.e2e import demo_cluster, demo_node
from tests.e2e.story import Story
from tests.node.machine import LAUNCHER

_STORIES = {"1": demo_node.tell, "3": demo_cluster.tell}
"""By the number of nodes."""


def main(arguments: Sequence[str]) -> int:
    """Tell the story of as many nodes as the argument says; return the exit status."""
    nodes = arguments[0] if arguments else "1"
    if nodes not in _STORIES:
        print(f"NODES is {' or '.join(_STORIES)}, not {nodes}", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("the demo makes network namespaces and loads eBPF programs: run it as root", file=sys.stderr)
        return 2
    if not LAUNCHER.exists():
        print(f"{LAUNCHER} is missing: run `make build`, or `make demo`, which does", file=sys.stderr)
        return 2
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    story = Story(sys.stdout)
    try:
        return 0 if _tell(story, nodes) else 1
    except KeyboardInterrupt:
        story.say("\ninterrupted, and cleaned up")
        return 130


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    _ignore_interrupts()  # one is enough: what follows is cleaning up, which is not to be interrupted
    raise KeyboardInterrupt


def _ignore_interrupts() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _tell(story: Story, nodes: str) -> bool:
    """Tell all steps; return whether all was as promised."""
    with ExitStack() as stack:
        home = Path(tempfile.mkdtemp(prefix="podlane-demo-"))
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        try:
            remains = _STORIES[nodes](story, home, stack)
            with story.step("Nothing is left of all this"):
                _ignore_interrupts()
                stack.close()
                remains.check(story)
            story.summary()
        except Exception as error:  # whatever it is, it is for people to read, and then to clean up after
            story.failed(error)
            return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
