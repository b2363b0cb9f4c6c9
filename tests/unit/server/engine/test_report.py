"""Measured rates."""

import pytest

from server.engine.report import RATE_MEMORY_S, Rate


def test_is_zero_until_measured() -> None:
    """A rate that nobody measured is 0, not a division by it."""
    assert Rate().tokens_per_s == 0.0


def test_a_steady_rate_is_reported_as_it_is() -> None:
    """Equal steps give their own rate."""
    rate = Rate()
    for _ in range(50):
        rate.add(32, 0.25)

    assert rate.tokens_per_s == pytest.approx(128.0)


def test_forgets_what_is_long_ago() -> None:
    """After a few time constants only the new rate is left."""
    rate = Rate()
    rate.add(1000, 1.0)
    for _ in range(10):
        rate.add(10, RATE_MEMORY_S)

    assert rate.tokens_per_s == pytest.approx(10 / RATE_MEMORY_S, rel=0.01)
