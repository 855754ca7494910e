"""How the demo speaks: numbered steps, the facts that prove them, and what is said when one does not hold."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

_BOLD, _DIM, _GREEN, _RED, _CYAN = "1", "2", "32", "31", "36"


class Unexpected(Exception):
    """What a step showed is not what podlane promises."""

    def __init__(self, what: str, expected: str, seen: str) -> None:
        super().__init__(f"{what}: expected {expected}, saw {seen}")
        self.what, self.expected, self.seen = what, expected, seen


class Story:
    """Writes to `out`, in colour if that is a terminal and NO_COLOR (no-color.org) is unset."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._colour = out.isatty() and not os.environ.get("NO_COLOR")
        self._start = time.monotonic()
        self.steps: list[tuple[str, float]] = []
        """Titles and durations in seconds of the steps that were finished."""
        self.facts = 0
        """How many claims were checked so far."""

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Tell a step: number it, and measure it."""
        start = time.monotonic()
        self.say()
        self.say(f"{self._paint(_BOLD, f'{len(self.steps) + 1:2}  {title}')}")
        yield
        self.steps.append((title, time.monotonic() - start))

    def say(self, text: str = "") -> None:
        """Print a line."""
        print(text, file=self._out, flush=True)

    def note(self, text: str) -> None:
        """Print an explanation, less loud than the facts."""
        self.say(f"    {self._paint(_DIM, text)}")

    def command(self, where: str, text: str) -> None:
        """Print a command that is being run, as on a terminal of pod or node `where`."""
        self.say(f"    {self._paint(_CYAN, f'{where}$')} {text}")

    def fact(self, what: str, *, expected: object, seen: object, shown: str | None = None) -> None:
        """Check that what was seen is what was expected, and print it. Raises `Unexpected`."""
        self.check(what, expected=expected, seen=seen)
        self.say(f"    {self._paint(_GREEN, '✓')} {shown or f'{what}: {seen}'}")

    def check(self, what: str, *, expected: object, seen: object) -> None:
        """Check that what was seen is what was expected, without a word if it is. Raises `Unexpected`."""
        if seen != expected:
            raise Unexpected(what, repr(expected), repr(seen))
        self.facts += 1

    def find(self, what: str, pattern: str, text: str) -> str:
        """Return the first match of a regular expression, its first group if it has one. Raises `Unexpected`."""
        match = re.search(pattern, text)
        if not match:
            raise Unexpected(what, f"something like {pattern!r}", repr(text))
        return match[match.lastindex or 0]

    def table(self, rows: Iterable[Sequence[str]]) -> None:
        """Print rows in columns; the first column is text, the others numbers."""
        lines = [list(row) for row in rows]
        widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
        for number, (first, *rest) in enumerate(lines):
            cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]
            line = "   ".join(cells)
            self.say(f"      {line if number else self._paint(_DIM, line)}")

    def failed(self, error: Exception) -> None:
        """Say which step failed, what it expected and what it saw."""
        self.say(f"    {self._paint(_RED, f'✗ step {len(self.steps) + 1} failed')}")
        if isinstance(error, Unexpected):
            self.say(f"      {error.what}\n      expected  {error.expected}\n      seen      {error.seen}")
        else:
            self.say(f"      {type(error).__name__}: {error}")

    def summary(self) -> None:
        """Close the story: how much was proved, and where the time went."""
        longest = max(len(title) for title, _ in self.steps)
        self.say()
        for number, (title, seconds) in enumerate(self.steps, 1):
            self.say(f"    {number:2}  {title.ljust(longest)}  {seconds:5.1f} s")
        total = time.monotonic() - self._start
        self.say(self._paint(_BOLD, f"\n{len(self.steps)} steps, {self.facts} facts checked, {total:.1f} s."))

    def _paint(self, colour: str, text: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colour else text
