"""How long to wait before the next try."""

from __future__ import annotations

from agent.kubernetes.backoff import Backoff


def test_waits_grow_and_differ() -> None:
    """Waits are random up to a bound that doubles from 1 s to 30 s, and begins anew after a success."""
    rows = [[backoff.next() for _ in range(8)] for backoff in (Backoff() for _ in range(500))]
    longest = [max(column) for column in zip(*rows, strict=True)]
    for seen, bound in zip(longest, (1, 2, 4, 8, 16, 30, 30, 30), strict=True):
        assert 0.9 * bound < seen <= bound
    assert all(min(column) < 0.1 * max(column) for column in zip(*rows, strict=True))
    backoff = Backoff()
    for _ in range(8):
        backoff.next()
    backoff.reset()
    assert backoff.next() <= 1
