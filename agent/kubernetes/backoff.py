"""How long to wait before the next try, so that many agents do not come all at once."""

from __future__ import annotations

import random

_FIRST, _LONGEST = 1.0, 30.0  # seconds


class Backoff:
    """Twice as long each time, and a random part of that ("full jitter")."""

    def __init__(self) -> None:
        self._ceiling = _FIRST

    def reset(self) -> None:
        """Begin anew: the last try was none in vain."""
        self._ceiling = _FIRST

    def next(self) -> float:
        """Return the seconds to wait."""
        wait = random.uniform(0, self._ceiling)  # noqa: S311  # not cryptography
        self._ceiling = min(2 * self._ceiling, _LONGEST)
        return wait
